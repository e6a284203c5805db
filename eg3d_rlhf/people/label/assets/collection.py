"""The assets of a folder or of a list, with their generators, prompts and seeds.

Layouts, told apart by what is there; asset files end in .glb, .ply, .obj, .mp4 or .webm and are told apart by
content:

    FOLDER/GENERATOR/PROMPT.glb    one generator a folder, one prompt a file's name; FOLDER/prompts.jsonl may
                                   say what is asked for: {"prompt": "chair", "text": "a red chair", "image":
                                   "inputs/chair.png"}
    FOLDER/ranking.jsonl           as eg3d-rlhf flow sample writes it: one generator, several seeds of each
                                   condition; or one such folder for each generator,
                                   FOLDER/GENERATOR/ranking.jsonl
    LIST.jsonl                     a line for each asset: {"asset": "a/chair.glb", "generator": "a", "prompt":
                                   "chair", "text": "a red chair", "image": "inputs/chair.png", "seed": 3};
                                   generator, text, image and seed may be left out; text stays with the prompt
                                   once it is given

Every file lies in the folder, or beside or below the list.
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
    broken_shapes,
    known_answers,
    named_in,
    spread,
)
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Item, Items, check_rewards
from eg3d_rlhf.preferences.pair_strategies.random_pairs import balanced

# the first as eg3d_rlhf.tuning.flow.base.ranking names it
RANKING = "ranking.jsonl"
PROMPTS = "prompts.jsonl"
NOTED = 5  # files of which it is said what is shown otherwise
MAX_ASSETS = 100_000
# bytes
MAX_LINE = 64 << 10
MAX_LIST = 256 << 20
MAX_TEXT = 2000  # characters of a prompt
_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One asset's file."""

    path: Path  # resolved
    generator: str  # a label
    prompt: str  # name
    seed: int  # the manifest's, or its number among the generator's files
    kind: str = ""  # as reading.Examined; '' before it was examined
    hash: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What was asked for."""

    text: str | None = None
    image: Path | None = None  # resolved
    hash: str | None = None  # of the image's file

    def to_json(self) -> dict:
        return {
            "text": self.text,
            "image": str(self.image) if self.image else None,
            **({"hash": self.hash} if self.hash else {}),
        }


@dataclass(frozen=True)
class Collection:
    """Assets by generator, prompt and seed, and their prompts by name."""

    assets: list[Asset]
    prompts: dict[str, Prompt] = field(default_factory=dict)

    @property
    def generators(self) -> list[str]:
        return sorted({asset.generator for asset in self.assets})


def read_collection(
    source: Path, tell: Callable[[str], None] = lambda text: None, lenient: bool = False
) -> Collection:
    """The assets of a folder or list, each examined; `tell` hears how far that is.

    Args: lenient: assets that cannot be shown are left out, and told; otherwise they are refused.
    """
    source = source.resolve()
    if source.is_dir():
        collection = _of_folder(source)
    elif source.is_file():
        collection = _of_list(source)
    else:
        raise FileNotFoundError(
            f"expected a folder of assets or a list, got nothing at {source}. Check the path."
        )
    return _checked(collection, source, tell, lenient)


def is_asset_folder(path: Path) -> bool:
    """Whether a folder holds one generator's assets: PROMPT.glb, or what a generator's tool drew."""
    if not path.is_dir() or any(path.glob("network-snapshot-*")):
        return False
    return (path / RANKING).is_file() or any(
        file.suffix.lower() in reading.SUFFIXES for file in path.iterdir()
    )


def read_generator(folder: Path, tell: Callable[[str], None] = lambda text: None) -> Collection:
    """The assets of one generator's folder, examined; prompts.jsonl lies in it or beside it.

    Raises: as `read_collection`.
    """
    folder = folder.resolve()
    _name(folder.name, "folder")
    if (folder / RANKING).is_file():
        return _checked(_of_rankings({folder.name: folder / RANKING}, folder), folder, tell)
    assets = [
        Asset(path=path, generator=folder.name, prompt=_name(path.stem, path.name), seed=0)
        for path in asset_files(folder, folder)
    ]
    root = folder if (folder / PROMPTS).is_file() else folder.parent
    return _checked(
        Collection(_stems_once(assets), _prompts(root, {asset.prompt for asset in assets})), folder, tell
    )


def _checked(
    collection: Collection, source: Path, tell: Callable[[str], None], lenient: bool = False
) -> Collection:
    if not collection.assets:
        raise ValueError(
            f"expected assets in {source.name}, got none. Lay them out as GENERATOR/PROMPT.glb, or give a"
            " list."
        )
    if len(collection.assets) > MAX_ASSETS:
        raise ValueError(f"expected up to {MAX_ASSETS:,} assets, got {len(collection.assets):,}. Split them.")
    twice: dict[tuple, Asset] = {}
    for asset in collection.assets:
        other = twice.setdefault((asset.generator, asset.prompt, asset.seed), asset)
        if other is not asset:
            names = f"{other.path.name} and {asset.path.name}"
            raise ValueError(
                f"expected one asset of {asset.generator} for {asset.prompt} and seed {asset.seed}, got"
                f" {names}. Give seeds."
            )
    return _examined(collection, tell, lenient)


def _examined(collection: Collection, tell: Callable[[str], None], lenient: bool) -> Collection:
    pictures = [prompt.image for prompt in collection.prompts.values() if prompt.image]
    paths = list(dict.fromkeys([*pictures, *(asset.path for asset in collection.assets)]))

    def count(done: int) -> None:
        if done % 100 == 0 or done == len(paths):
            tell(f"examined {done} of {len(paths)} files")

    seen = dict(zip(paths, reading.looked_at(paths, count), strict=True))
    known = {path: kind for path, kind in seen.items() if isinstance(kind, reading.Examined)}
    unfit = [asset for asset in collection.assets if asset.path not in known]
    if len(known) < len(paths) and not (
        lenient and len(unfit) == len(paths) - len(known) < len(collection.assets)
    ):
        reading.refuse({path: kind for path, kind in seen.items() if isinstance(kind, str)})
    if unfit:
        tell(
            f"{len(unfit)} of {len(collection.assets)} assets are left out: {unfit[0].path.name}:"
            f" {seen[unfit[0].path]}"
        )
        collection = Collection(
            [asset for asset in collection.assets if asset.path in known], collection.prompts
        )
    noted = [f"{path.name}: {known[path].note}" for path in paths if path in known and known[path].note]
    for line in [*noted[:NOTED], *([f"and {len(noted) - NOTED} more"] if len(noted) > NOTED else [])]:
        tell(line)
    wrong = [path.name for path in pictures if known[path].kind != "picture"]
    wrong += [asset.path.name for asset in collection.assets if known[asset.path].kind == "picture"]
    if wrong:
        raise ValueError(
            f"{wrong[0]}: expected pictures as prompts and assets as assets, got the other. Correct the list."
        )
    assets = [
        replace(asset, kind=known[asset.path].kind, hash=known[asset.path].hash)
        for asset in collection.assets
    ]
    prompts = {
        name: replace(prompt, hash=known[prompt.image].hash if prompt.image else None)
        for name, prompt in collection.prompts.items()
    }
    return Collection(assets, prompts)


# ---- layouts


def _of_folder(folder: Path) -> Collection:
    if (folder / RANKING).is_file():
        return _of_rankings({folder.name: folder / RANKING}, folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    ranked = {path.name: path / RANKING for path in inner if (path / RANKING).is_file()}
    if ranked:
        return _of_rankings(ranked, folder)
    assets = []
    for generator in inner:
        _name(generator.name, folder.name)
        for number, path in enumerate(asset_files(generator, folder)):
            assets.append(
                Asset(path=path, generator=generator.name, prompt=_name(path.stem, path.name), seed=number)
            )
    if not assets and asset_files(folder, folder):
        raise ValueError(
            f"{folder.name}: expected a folder for each generator, GENERATOR/PROMPT.glb, got files alone. Put"
            " them in one."
        )
    return Collection(_stems_once(assets), _prompts(folder, {asset.prompt for asset in assets}))


def asset_files(folder: Path, root: Path) -> list[Path]:
    """The asset files of a folder, sorted and resolved.

    Raises: ValueError for one that leads out of `root`.
    """
    named = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in reading.SUFFIXES and not path.name.startswith(".")
    )
    return [inside(path, root, path.name) for path in named]


def _stems_once(assets: list[Asset]) -> list[Asset]:
    seen: dict[tuple[str, str], Asset] = {}
    for asset in assets:
        other = seen.setdefault((asset.generator, asset.prompt), asset)
        if other is not asset:
            names = f"{other.path.name} and {asset.path.name}"
            raise ValueError(
                f"{asset.generator}: expected one file for {asset.prompt}, got {names}. Remove one, or give a"
                " list."
            )
    return assets


def _prompts(folder: Path, known: set[str]) -> dict[str, Prompt]:
    prompts = {name: Prompt() for name in sorted(known)}
    if (folder / PROMPTS).is_file():
        for record, where in _lines(folder / PROMPTS):
            name = _text(record, "prompt", where)
            if name in known:
                prompts[name] = _prompt(record, folder, where)
        if known and not any(prompt.text or prompt.image for prompt in prompts.values()):
            raise ValueError(
                f"{PROMPTS}: expected prompts named as the files are, such as {min(known)!r}, got none of"
                " them. Correct them."
            )
    return prompts


def _of_rankings(lists: dict[str, Path], root: Path) -> Collection:
    assets = []
    prompts = {}
    for generator, path in lists.items():
        _name(generator, root.name)
        for record, where in _lines(path):
            condition = _text(record, "condition", where)
            look_at = _text(record, "look_at", where)
            prompts[condition] = Prompt(text=condition)
            file = inside(path.parent / look_at, path.parent, where)
            assets.append(Asset(path=file, generator=generator, prompt=condition, seed=_seed(record, where)))
    return Collection(assets, _prompts(root, set(prompts)) if (root / PROMPTS).is_file() else prompts)


def _of_list(path: Path) -> Collection:
    assets: list[Asset] = []
    prompts: dict[str, Prompt] = {}
    counts: dict[tuple[str, str], int] = {}
    for record, where in _lines(path):
        name = _text(record, "prompt", where)
        generator = _text(record, "generator", where) if record.get("generator") is not None else path.stem
        number = counts.get((generator, name), 0)
        counts[generator, name] = number + 1
        file = inside(path.parent / _text(record, "asset", where), path.parent, where)
        seed = _seed(record, where) if record.get("seed") is not None else number
        assets.append(Asset(path=file, generator=generator, prompt=name, seed=seed))
        prompt = _prompt(record, path.parent, where)
        before = prompts.get(name, Prompt())
        if any(
            new and old and new != old
            for new, old in ((prompt.text, before.text), (prompt.image, before.image))
        ):
            raise ValueError(
                f"{where}: expected one text and one image of prompt {name!r}, got others before. Give"
                " prompts other names."
            )
        prompts[name] = Prompt(text=prompt.text or before.text, image=prompt.image or before.image)
    return Collection(assets, prompts)


# ---- lines


def _lines(path: Path) -> Iterable[tuple[dict, str]]:
    if path.stat().st_size > MAX_LIST:
        raise ValueError(
            f"{path.name}: expected a list of up to {MAX_LIST >> 20} MB, got {path.stat().st_size >> 20} MB."
            " Split it."
        )
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{where}: expected a JSON object of up to {MAX_LINE >> 10} kB, got {line[:40]!r}."
                    " Correct it."
                )
            yield record, where


def _text(record: dict, key: str, where: str) -> str:
    return _name(record.get(key), f'{where}: "{key}"')


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(
            f"{where}: expected a printable text of up to {MAX_TEXT} characters, got {str(value)[:40]!r}."
            " Correct it."
        )
    return value


def _seed(record: dict, where: str) -> int:
    seed = record.get("seed")
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ValueError(
            f'{where}: expected "seed" as a number from 0 on, got {str(seed)[:40]!r}. Correct it.'
        )
    return seed


def _prompt(record: dict, root: Path, where: str) -> Prompt:
    text = record.get("text")
    if text is not None and (
        not isinstance(text, str)
        or len(text) > MAX_TEXT
        # lines and tabs may be in a text; other control characters, and halves of surrogate pairs, which no
        # answer can hold, may not
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
    """A file's resolved path. Raises: ValueError for one that does not lie below `root`, or is not there."""
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise ValueError(
                f"{where}: expected a file within {root.name}, got {path.name}, which leads elsewhere. Copy"
                " it there."
            )
        if not resolved.is_file():
            raise ValueError(
                f"{where}: expected a file, got nothing of that kind at {path.name}. Correct the name."
            )
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise ValueError(
            f"{where}: expected a file, got {path.name[:60]}: {error}. Correct the name."
        ) from None
    return resolved


# ---- pairs


def shape_of(asset: Asset) -> Shape:
    """An asset as a campaign keeps it."""
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
    tell: Callable[[str], None] = lambda text: None,
    answers: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
) -> Plan:
    """Plan the pairs of a campaign, or the assets one by one.

    Args: tell: prints what differs from what was asked for; answers: see `answers_of`, for strategies that
        read answers; ensemble: scores the collection's assets by their numbers,
        for strategies that read scores.
    """
    rng = np.random.default_rng(options.seed)
    items = items_of(collection, ensemble)
    chosen: list[tuple[int, int]]
    more: dict = {}
    if options.single:
        buckets = items.by(lambda item: (item.source, item.prompt))
        chosen = [(i, i) for i in itertools.islice(balanced(buckets, rng), options.pairs)]
    else:
        check_rewards(options.strategy, 0 if ensemble is None else ensemble.size)
        planned = STRATEGIES[options.strategy].plan(items, answers, rng, options)
        chosen = [(a, b) if rng.integers(2) else (b, a) for a, b in planned.pairs]
        more = named_in(planned.report, lambda a, b: _facts(collection.assets[a], collection.assets[b]))
    if not chosen:
        raise ValueError(
            "expected at least two assets of one prompt that differ, got none. Give each prompt a file of"
            " each generator."
        )
    if len(chosen) < options.pairs:
        tell(f"{len(chosen)} {'assets' if options.single else 'pairs'}: there are no more")
    options = replace(options, pairs=len(chosen))
    shapes = [shape_of(asset) for asset in collection.assets]
    shown = [PlannedPair(first=shapes[a], second=shapes[b]) for a, b in chosen]
    gold, training = _known(options, collection, rng, tell)
    used = {
        key: value for key, value in asdict(options).items() if key in ("pairs", "seed", "single", "strategy")
    }
    report = {
        **used,
        **more,
        "generators": collection.generators,
        "assets": len(collection.assets),
        "gold": len(gold),
        "training": len(training),
    }
    return Plan(training + spread(shown, gold), report)


def items_of(collection: Collection, ensemble: Ensemble | None = None) -> Items:
    """Describe assets for a strategy: those of one prompt are compared, between generators where there are
    several, else between seeds; files that are equal are not compared.
    """
    members = [Item(prompt=a.prompt, source=a.generator, content=a.hash) for a in collection.assets]
    return Items(members=members, ensemble=ensemble)


def answers_of(collection: Collection, results: Sequence[JudgementRow]) -> list[Preference]:
    """Turn answers to an earlier campaign into preferences between the assets' numbers in the collection.

    Raises: ValueError for answers on an asset that is not in it.
    """
    numbers = {(a.generator, a.prompt, a.hash): i for i, a in enumerate(collection.assets)}
    answers = []
    for row in results:
        sides = []
        for shape in (row.left, row.right):
            number = numbers.get((shape.generator, shape.condition, shape.file))
            if number is None:
                raise ValueError(
                    f"expected answers on these assets, got one on {shape.condition!r}, seed {shape.seed}."
                    " Name a campaign on the same files."
                )
            sides.append(number)
        left, right = sides
        winner, loser = (right, left) if row.choice is Choice.RIGHT else (left, right)
        answers.append(Preference(winner=winner, loser=loser, tie=row.choice.equal))
    return answers


def _facts(a: Asset, b: Asset) -> dict:
    return {"prompt": a.prompt, "generators": [a.generator, b.generator], "seeds": [a.seed, b.seed]}


def conditions(collection: Collection) -> dict[str, dict]:
    """Prompts as a campaign keeps them."""
    return {name: prompt.to_json() for name, prompt in collection.prompts.items()}


def _known(
    options: PairingOptions, collection: Collection, rng: np.random.Generator, tell: Callable[[str], None]
) -> tuple[list[PlannedPair], list[PlannedPair]]:
    whole = [asset for asset in collection.assets if asset.kind in DAMAGED_KINDS]
    if not whole:
        tell("no attention checks and no practice: videos cannot be damaged on purpose")
        return [], []
    order = itertools.cycle([whole[i] for i in rng.permutation(len(whole))])
    answers = broken_shapes if options.single else known_answers
    gold = answers(
        [shape_of(asset) for asset in itertools.islice(order, options.gold_pairs)], Kind.GOLD, rng, DAMAGES
    )
    return gold, answers(
        [shape_of(asset) for asset in itertools.islice(order, options.training)], Kind.TRAINING, rng, DAMAGES
    )
