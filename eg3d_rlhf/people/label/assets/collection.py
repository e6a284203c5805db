"""Reads the assets of a folder or of a list, with their generators, prompts and seeds, and plans pairs of
them.

The layout is recognised by the files that exist. Names of asset files end in .glb, .ply, .obj, .mp4 or .webm;
the format is recognised by content:

    FOLDER/GENERATOR/PROMPT.glb    one folder per generator, one file per prompt, named like it. The optional
                                   FOLDER/prompts.jsonl describes the prompts: {"prompt": "chair", "text":
                                   "a red chair", "image": "inputs/chair.png"}
    FOLDER/ranking.jsonl           as eg3d-rlhf flow sample writes it: one generator, several seeds of each
                                   prompt; or one such folder for each generator,
                                   FOLDER/GENERATOR/ranking.jsonl
    LIST.jsonl                     one line per asset: {"asset": "a/chair.glb", "generator": "a", "prompt":
                                   "chair", "text": "a red chair", "image": "inputs/chair.png", "seed": 3};
                                   generator, text, image and seed are optional; a text applies to all lines
                                   of its prompt

All files must lie in the folder, or in the folder of the list or below it.
"""

import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS, DAMAGES
from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, PlannedPair, Shape
from eg3d_rlhf.people.label.pairing import (
    PairingOptions,
    Plan,
    damaged_singles,
    interleave,
    known_answers,
    report_with_names,
)
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Item, Items, check_rewards
from eg3d_rlhf.preferences.pair_strategies.random_pairs import balanced

# The name of the list is the one of eg3d_rlhf.tuning.flow.base.ranking.
RANKING = "ranking.jsonl"
PROMPTS = "prompts.jsonl"
NOTED = 5  # number of files of which notes are reported
MAX_ASSETS = 100_000  # per collection
# Bytes of a line and of a list: bounds of the memory that a hostile list can use.
MAX_LINE = 64 << 10
MAX_LIST = 256 << 20
MAX_TEXT = 2000  # characters of a prompt
_SEEDS = 2**32  # seeds are smaller


@dataclass(frozen=True, kw_only=True)
class Asset:
    """An asset file with its generator, prompt and seed."""

    path: Path  # resolved, without links
    generator: str  # name that is shown in reports
    prompt: str  # name
    seed: int  # from the list, or the number of the file among the generator's files
    kind: str = ""  # as in reading.Examined; '' before the file was examined
    hash: str = ""  # SHA-256 in hex; '' before the file was examined


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Text and image for which assets were generated."""

    text: str | None = None  # None: only a name or an image
    image: Path | None = None  # resolved
    hash: str | None = None  # of the image's file

    def to_json(self) -> dict:
        """Return the prompt as JSON values, without the empty hash."""
        return {
            "text": self.text,
            "image": str(self.image) if self.image else None,
            **({"hash": self.hash} if self.hash else {}),
        }


@dataclass(frozen=True)
class Collection:
    """Assets with generator, prompt and seed, and the prompts by name."""

    assets: list[Asset]
    prompts: dict[str, Prompt] = field(default_factory=dict)

    @property
    def generators(self) -> list[str]:
        """Sorted names of the generators."""
        return sorted({asset.generator for asset in self.assets})


def read_collection(
    source: Path, report: Callable[[str], None] = lambda text: None, lenient: bool = False
) -> Collection:
    """Read the assets of a folder or list and examine each of them.

    Args:
        source: folder or list, see the module's docstring.
        report: called with lines of progress.
        lenient: leave out assets that cannot be shown, and report them; otherwise they are an error.

    Raises: ValueError, FileNotFoundError.
    """
    source = source.resolve()
    if source.is_dir():
        collection = _from_folder(source)
    elif source.is_file():
        collection = _from_list(source)
    else:
        raise FileNotFoundError(
            f"expected a folder of assets or a list, found nothing at {source}. Check the path."
        )
    return _checked(collection, source, report, lenient)


def is_asset_folder(path: Path) -> bool:
    """Return True for a folder of one generator's assets: PROMPT.glb, or the list of a generator's tool."""
    # A training's folder contains snapshots of a network; its other files are no assets.
    if not path.is_dir() or any(path.glob("network-snapshot-*")):
        return False
    return (path / RANKING).is_file() or any(
        file.suffix.lower() in reading.SUFFIXES for file in path.iterdir()
    )


def read_generator(folder: Path, report: Callable[[str], None] = lambda text: None) -> Collection:
    """Read and examine the assets of one generator's folder. prompts.jsonl may lie in it or beside it.

    Raises: as `read_collection`.
    """
    folder = folder.resolve()
    # The name of the folder becomes the name of the generator, so it must be printable.
    _name(folder.name, "folder")
    if (folder / RANKING).is_file():
        return _checked(_from_rankings({folder.name: folder / RANKING}, folder), folder, report)
    assets = [
        Asset(path=path, generator=folder.name, prompt=_name(path.stem, path.name), seed=0)
        for path in asset_files(folder, folder)
    ]
    # Two generators that are compared usually share one list of prompts beside their folders.
    root = folder if (folder / PROMPTS).is_file() else folder.parent
    return _checked(
        Collection(_check_stems(assets), _prompts(root, {asset.prompt for asset in assets})), folder, report
    )


def _checked(
    collection: Collection, source: Path, report: Callable[[str], None], lenient: bool = False
) -> Collection:
    """Check the number of assets and that none occurs twice; then examine the files."""
    if not collection.assets:
        raise ValueError(
            f"expected assets in {source.name}, found none. Arrange them as GENERATOR/PROMPT.glb, or write a"
            " list."
        )
    if len(collection.assets) > MAX_ASSETS:
        raise ValueError(
            f"expected up to {MAX_ASSETS:,} assets, got {len(collection.assets):,}. Split them into several"
            " campaigns."
        )
    first: dict[tuple, Asset] = {}
    for asset in collection.assets:
        # setdefault returns the first asset with this key.
        other = first.setdefault((asset.generator, asset.prompt, asset.seed), asset)
        if other is not asset:
            names = f"{other.path.name} and {asset.path.name}"
            raise ValueError(
                f"expected one asset of {asset.generator} for {asset.prompt} and seed {asset.seed}, found"
                f" {names}. Write a list with seeds."
            )
    return _examined(collection, report, lenient)


def _examined(collection: Collection, report: Callable[[str], None], lenient: bool) -> Collection:
    """Examine all files in a separate process, and add their kinds and hashes."""
    images = [prompt.image for prompt in collection.prompts.values() if prompt.image]
    # Each file once, in a fixed order.
    paths = list(dict.fromkeys([*images, *(asset.path for asset in collection.assets)]))

    def count(done: int) -> None:
        # One line per 100 files keeps the log short.
        if done % 100 == 0 or done == len(paths):
            report(f"examined {done} of {len(paths)} files")

    results = dict(zip(paths, reading.looked_at(paths, count), strict=True))
    examined = {path: result for path, result in results.items() if isinstance(result, reading.Examined)}
    unfit = [asset for asset in collection.assets if asset.path not in examined]
    unreadable = len(paths) - len(examined)
    # A prompt's image that cannot be shown is an error even if assets may be left out. So is a collection of
    # which nothing would remain.
    if unreadable and not (lenient and len(unfit) == unreadable < len(collection.assets)):
        reading.reject({path: reason for path, reason in results.items() if isinstance(reason, str)})
    if unfit:
        report(
            f"{len(unfit)} of {len(collection.assets)} assets are left out: {unfit[0].path.name}:"
            f" {results[unfit[0].path]}"
        )
        collection = Collection(
            [asset for asset in collection.assets if asset.path in examined], collection.prompts
        )
    noted = [
        f"{path.name}: {examined[path].note}" for path in paths if path in examined and examined[path].note
    ]
    for line in [*noted[:NOTED], *([f"and {len(noted) - NOTED} more"] if len(noted) > NOTED else [])]:
        report(line)
    # The content of a file decides its kind, not its suffix.
    wrong = [path.name for path in images if examined[path].kind != "image"]
    wrong += [asset.path.name for asset in collection.assets if examined[asset.path].kind == "image"]
    if wrong:
        raise ValueError(
            f"{wrong[0]}: expected images as prompts and 3D files or videos as assets, got the opposite."
            " Correct the list."
        )
    assets = [
        replace(asset, kind=examined[asset.path].kind, hash=examined[asset.path].hash)
        for asset in collection.assets
    ]
    prompts = {
        name: replace(prompt, hash=examined[prompt.image].hash if prompt.image else None)
        for name, prompt in collection.prompts.items()
    }
    return Collection(assets, prompts)


# ---- layouts


def _from_folder(folder: Path) -> Collection:
    """Read a folder in one of its three layouts."""
    if (folder / RANKING).is_file():
        return _from_rankings({folder.name: folder / RANKING}, folder)
    # Hidden folders, such as .git, are skipped.
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # As soon as one folder has a list, folders without a list are ignored.
    ranked = {path.name: path / RANKING for path in folders if (path / RANKING).is_file()}
    if ranked:
        return _from_rankings(ranked, folder)
    assets = []
    for generator in folders:
        _name(generator.name, folder.name)
        # Without a list, the number of a file replaces its seed.
        for number, path in enumerate(asset_files(generator, folder)):
            assets.append(
                Asset(path=path, generator=generator.name, prompt=_name(path.stem, path.name), seed=number)
            )
    if not assets and asset_files(folder, folder):
        raise ValueError(
            f"{folder.name}: expected one folder per generator, GENERATOR/PROMPT.glb, found files only. Move"
            " them to such a folder."
        )
    return Collection(_check_stems(assets), _prompts(folder, {asset.prompt for asset in assets}))


def asset_files(folder: Path, root: Path) -> list[Path]:
    """List the asset files of a folder, sorted and resolved.

    Raises: ValueError for a link that leads out of `root`.
    """
    # Sorted, because the order decides the seeds of the assets.
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in reading.SUFFIXES and not path.name.startswith(".")
    )
    return [inside(path, root, path.name) for path in paths]


def _check_stems(assets: list[Asset]) -> list[Asset]:
    """Return `assets`. Raises: ValueError if two files of a generator have the same name but for the
    suffix.
    """
    seen: dict[tuple[str, str], Asset] = {}
    for asset in assets:
        other = seen.setdefault((asset.generator, asset.prompt), asset)
        if other is not asset:
            names = f"{other.path.name} and {asset.path.name}"
            raise ValueError(
                f"{asset.generator}: expected one file for {asset.prompt}, found {names}. Remove one of"
                " them, or write a list."
            )
    return assets


def _prompts(folder: Path, known: set[str]) -> dict[str, Prompt]:
    """Read the prompts with these names from prompts.jsonl; without that file they have only their names."""
    prompts = {name: Prompt() for name in sorted(known)}
    if (folder / PROMPTS).is_file():
        for record, where in _lines(folder / PROMPTS):
            name = _text(record, "prompt", where)
            # The file may describe prompts for which there is no asset.
            if name in known:
                prompts[name] = _prompt(record, folder, where)
        if known and not any(prompt.text or prompt.image for prompt in prompts.values()):
            raise ValueError(
                f"{PROMPTS}: expected prompts named like the files, such as {min(known)!r}, found none of"
                " them. Correct the names."
            )
    return prompts


def _from_rankings(lists: dict[str, Path], root: Path) -> Collection:
    """Read lists that `flow sample` has written, by generator."""
    assets = []
    prompts = {}
    for generator, path in lists.items():
        _name(generator, root.name)
        for record, where in _lines(path):
            prompt = _text(record, "condition", where)
            look_at = _text(record, "look_at", where)
            prompts[prompt] = Prompt(text=prompt)
            # `look_at` is the file that shows the sample; the list also names its latents.
            file = inside(path.parent / look_at, path.parent, where)
            assets.append(Asset(path=file, generator=generator, prompt=prompt, seed=_seed(record, where)))
    return Collection(assets, _prompts(root, set(prompts)) if (root / PROMPTS).is_file() else prompts)


def _from_list(path: Path) -> Collection:
    """Read a list of assets, one JSON object per line."""
    assets: list[Asset] = []
    prompts: dict[str, Prompt] = {}
    counts: dict[tuple[str, str], int] = {}
    for record, where in _lines(path):
        name = _text(record, "prompt", where)
        generator = _text(record, "generator", where) if record.get("generator") is not None else path.stem
        # Without a seed, the assets of a generator and prompt are numbered.
        number = counts.get((generator, name), 0)
        counts[generator, name] = number + 1
        file = inside(path.parent / _text(record, "asset", where), path.parent, where)
        seed = _seed(record, where) if record.get("seed") is not None else number
        assets.append(Asset(path=file, generator=generator, prompt=name, seed=seed))
        prompt = _prompt(record, path.parent, where)
        before = prompts.get(name, Prompt())
        # A text or an image may stand on one line of the prompt only, but two lines must not contradict each
        # other.
        if any(
            new and old and new != old
            for new, old in ((prompt.text, before.text), (prompt.image, before.image))
        ):
            raise ValueError(
                f"{where}: prompt {name!r} has another text or image on an earlier line. Give different"
                " prompts different names."
            )
        prompts[name] = Prompt(text=prompt.text or before.text, image=prompt.image or before.image)
    return Collection(assets, prompts)


# ---- lines


def _lines(path: Path) -> Iterable[tuple[dict, str]]:
    """Yield each line's JSON object and its place for messages. Raises: ValueError for other lines."""
    # Before the file is opened.
    if path.stat().st_size > MAX_LIST:
        raise ValueError(
            f"{path.name}: expected a list of up to {MAX_LIST >> 20} MB, got {path.stat().st_size >> 20} MB."
            " Split it."
        )
    with path.open("rb") as file:
        # One byte more than the limit is read, so that a longer line is recognised without reading all of it.
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line) if len(line) <= MAX_LINE else None
            # Deeply nested brackets exceed Python's recursion limit.
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{where}: expected a JSON object of up to {MAX_LINE >> 10} kB, got {line[:40]!r}."
                    " Correct it."
                )
            yield record, where


def _text(record: dict, key: str, where: str) -> str:
    """Return a field that must be a printable text."""
    return _name(record.get(key), f'{where}: "{key}"')


def _name(value: object, where: str) -> str:
    """Return a value that must be a printable text of bounded length. Raises: ValueError."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(
            f"{where}: expected a printable text of up to {MAX_TEXT} characters, got {str(value)[:40]!r}."
            " Correct it."
        )
    return value


def _seed(record: dict, where: str) -> int:
    """Return the seed of a line. Raises: ValueError for anything but a whole number from 0 on."""
    # type() and not isinstance(): true and false are integers for isinstance.
    seed = record.get("seed")
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ValueError(
            f'{where}: expected "seed" as a whole number from 0 on, got {str(seed)[:40]!r}. Correct it.'
        )
    return seed


def _prompt(record: dict, root: Path, where: str) -> Prompt:
    """Return the text and the image of a line; both are optional. Raises: ValueError."""
    text = record.get("text")
    if text is not None and (
        not isinstance(text, str)
        or len(text) > MAX_TEXT
        # A text may contain line breaks and tabs, but no other control characters, and no lone surrogates,
        # which the page's answers cannot transport.
        or any(
            unicodedata.category(character) in ("Cc", "Cs") for character in text if character not in "\n\r\t"
        )
    ):
        raise ValueError(
            f'{where}: expected "text" of up to {MAX_TEXT} characters, got {str(text)[:40]!r}. Correct it.'
        )
    image = (
        inside(root / _text(record, "image", where), root, where) if record.get("image") is not None else None
    )
    return Prompt(text=text or None, image=image)


def inside(path: Path, root: Path, where: str) -> Path:
    """Resolve a path. Raises: ValueError if it is no file, or does not lie below `root`."""
    try:
        resolved = path.resolve()
        # After resolve(), so that neither .. nor links lead out of the folder.
        if not resolved.is_relative_to(root.resolve()):
            raise ValueError(
                f"{where}: expected a file within {root.name}, but {path.name} leads out of it. Copy the file"
                " there."
            )
        if not resolved.is_file():
            raise ValueError(f"{where}: expected a file, but there is none at {path.name}. Correct the name.")
    except (OSError, RuntimeError) as error:  # the name is too long, or links form a loop
        raise ValueError(
            f"{where}: expected a file, but {path.name[:60]} cannot be opened: {error}. Correct the name."
        ) from None
    return resolved


# ---- pairs


def asset_shape(asset: Asset) -> Shape:
    """Return the shape that a campaign stores for an asset."""
    fields = {
        "generator": asset.generator,
        "source": str(asset.path),
        "seed": asset.seed,
        "file": asset.hash,
        "condition": asset.prompt,
    }
    return Shape.of_asset(**fields)


def plan_assets(
    options: PairingOptions,
    collection: Collection,
    report: Callable[[str], None] = lambda text: None,
    answers: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
) -> Plan:
    """Plan the pairs of a campaign of assets, or a campaign of single assets.

    Args:
        options: number of pairs, strategy and seed.
        collection: the assets.
        report: called with a line if fewer pairs than requested are planned.
        answers: see `answers_of`, for strategies that read answers.
        ensemble: scores assets by their index in the collection, for strategies that read scores.

    Raises: ValueError if no pair can be planned.
    """
    # One generator for the entire plan: equal options give equal plans.
    rng = np.random.default_rng(options.seed)
    items = items_of(collection, ensemble)
    chosen: list[tuple[int, int]]
    more: dict = {}
    if options.single:
        # Single assets are chosen evenly from all generators and prompts.
        buckets = items.by(lambda item: (item.source, item.prompt))
        chosen = [(index, index) for index in itertools.islice(balanced(buckets, rng), options.pairs)]
    else:
        check_rewards(options.strategy, 0 if ensemble is None else ensemble.size)
        planned = STRATEGIES[options.strategy].plan(items, answers, rng, options)
        # Strategies return unordered pairs. A random bit per pair decides which asset comes first.
        chosen = [(a, b) if rng.integers(2) else (b, a) for a, b in planned.pairs]
        more = report_with_names(
            planned.report, lambda a, b: _facts(collection.assets[a], collection.assets[b])
        )
    if not chosen:
        raise ValueError(
            "expected at least two different assets of one prompt, found none. Give each prompt a file of"
            " each generator."
        )
    if len(chosen) < options.pairs:
        report(f"planned {len(chosen)} {'assets' if options.single else 'pairs'}: there are no more")
    options = replace(options, pairs=len(chosen))
    shapes = [asset_shape(asset) for asset in collection.assets]
    pairs = [PlannedPair(first=shapes[a], second=shapes[b]) for a, b in chosen]
    gold, training = _known_pairs(options, collection, rng, report)
    used = {
        key: value for key, value in asdict(options).items() if key in ("pairs", "seed", "single", "strategy")
    }
    plan_report = {
        **used,
        **more,
        "generators": collection.generators,
        "assets": len(collection.assets),
        "gold": len(gold),
        "training": len(training),
    }
    return Plan(training + interleave(pairs, gold), plan_report)


def items_of(collection: Collection, ensemble: Ensemble | None = None) -> Items:
    """Describe the assets for a strategy. It compares assets of one prompt: between generators if there are
    several, else between seeds. Equal files are not compared.
    """
    # Equal hashes mean equal files, which annotators could not distinguish.
    members = [Item(prompt=a.prompt, source=a.generator, content=a.hash) for a in collection.assets]
    return Items(members=members, ensemble=ensemble)


def answers_of(collection: Collection, results: Sequence[JudgementRow]) -> list[Preference]:
    """Convert answers of an earlier campaign to preferences between indices of the collection.

    Raises: ValueError for an answer about an asset that is not in the collection.
    """
    # Assets are identified by content: the files may have been moved since the earlier campaign.
    indices = {(a.generator, a.prompt, a.hash): index for index, a in enumerate(collection.assets)}
    answers = []
    for row in results:
        sides = []
        for shape in (row.left, row.right):
            index = indices.get((shape.generator, shape.condition, shape.file))
            if index is None:
                raise ValueError(
                    f"expected answers about these assets, got one about {shape.condition!r}, seed"
                    f" {shape.seed}. Name a campaign of the same files."
                )
            sides.append(index)
        left, right = sides
        winner, loser = (right, left) if row.choice is Choice.RIGHT else (left, right)
        answers.append(Preference(winner=winner, loser=loser, tie=row.choice.equal))
    return answers


def _facts(a: Asset, b: Asset) -> dict:
    """Return the names of a pair's assets for the report."""
    return {"prompt": a.prompt, "generators": [a.generator, b.generator], "seeds": [a.seed, b.seed]}


def prompts_json(collection: Collection) -> dict[str, dict]:
    """Return the prompts as a campaign stores them."""
    return {name: prompt.to_json() for name, prompt in collection.prompts.items()}


def _known_pairs(
    options: PairingOptions, collection: Collection, rng: np.random.Generator, report: Callable[[str], None]
) -> tuple[list[PlannedPair], list[PlannedPair]]:
    """Plan the gold and the training pairs. Videos cannot be damaged, so without other assets there are
    none.
    """
    damageable = [asset for asset in collection.assets if asset.kind in DAMAGED_KINDS]
    if not damageable:
        report("no gold checks and no training pairs: videos cannot be damaged deliberately")
        return [], []
    # In a small collection the same asset is used several times.
    order = itertools.cycle([damageable[i] for i in rng.permutation(len(damageable))])
    known_pairs = damaged_singles if options.single else known_answers
    gold = known_pairs(
        [asset_shape(asset) for asset in itertools.islice(order, options.gold_pairs)], Kind.GOLD, rng, DAMAGES
    )
    return gold, known_pairs(
        [asset_shape(asset) for asset in itertools.islice(order, options.training)],
        Kind.TRAINING,
        rng,
        DAMAGES,
    )
