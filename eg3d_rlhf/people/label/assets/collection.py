"""Collections of asset files with their generators, prompts and seeds, and planning of pairs of them.

A collection is a folder or a list. The layout of a folder is recognised by the files that it contains. Names
of asset files end in .glb, .ply, .obj, .mp4 or .webm; their format is recognised by their content:

    FOLDER/GENERATOR/PROMPT.glb    one folder per generator, and in it one file per prompt with the name of
                                   the prompt. The optional FOLDER/prompts.jsonl describes the prompts:
                                   {"prompt": "chair", "text": "a red chair", "image": "inputs/chair.png"}
    FOLDER/ranking.jsonl           as eg3d-rlhf flow sample writes it: one generator, several seeds of each
                                   prompt; or one such folder for each generator,
                                   FOLDER/GENERATOR/ranking.jsonl
    LIST.jsonl                     one line per asset: {"asset": "a/chair.glb", "generator": "a", "prompt":
                                   "chair", "text": "a red chair", "image": "inputs/chair.png", "seed": 3};
                                   generator, text, image and seed are optional; a text applies to all lines
                                   of its prompt

All files must lie in the folder, or below the folder that contains the list.
"""

import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS, DAMAGES
from eg3d_rlhf.people.label.assets.examinations import examine_with_records
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

# name of the list that `eg3d-rlhf flow sample` writes, see tuning.flow.base.ranking
RANKING = "ranking.jsonl"
PROMPTS = "prompts.jsonl"  # name of the file that describes prompts
NOTED = 5  # largest number of files whose notes are reported
MAX_ASSETS = 100_000  # largest number of assets in a collection
# Largest size in bytes of a line and of a list. They limit the memory that a malicious list can use.
MAX_LINE = 64 << 10
MAX_LIST = 256 << 20
MAX_TEXT = 2000  # largest number of characters of a prompt
_SEEDS = 2**32  # number that is larger than every seed


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Asset file with its generator, prompt and seed."""

    path: Path  # resolved path, without links
    generator: str  # name of the generator in reports
    prompt: str  # name of the prompt
    seed: int  # seed in the list, or the number of the file among the files of the generator
    kind: str = ""  # kind of the file, see reading.Examined; '' before the file was examined
    hash: str = ""  # SHA-256 of the file in hex; '' before the file was examined
    untextured: bool = False  # True if the page does not show a texture or colour of the file


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt for which assets were generated: a text, an image, or both."""

    text: str | None = None  # text; None: the prompt has only a name or an image
    image: Path | None = None  # resolved path of the image; None: no image
    hash: str | None = None  # SHA-256 of the image file in hex; None: no image, or it was not examined yet

    def to_json(self) -> dict:
        """Return the prompt in JSON types. A prompt without a hash has no key "hash"."""
        return {
            "text": self.text,
            "image": str(self.image) if self.image else None,
            **({"hash": self.hash} if self.hash else {}),
        }


@dataclass(frozen=True)
class Collection:
    """Asset files, and the prompts for which they were generated."""

    assets: list[Asset]
    prompts: dict[str, Prompt] = field(default_factory=dict)  # by name
    notes: list[str] = field(
        default_factory=list
    )  # lines on files that are left out or not shown as they are

    @property
    def generators(self) -> list[str]:
        """Return the sorted names of the generators."""
        return sorted({asset.generator for asset in self.assets})


def check_collection_path(folder_or_list: str | Path) -> None:
    """Raise FileNotFoundError if there is neither a folder nor a list of assets at a path."""
    if not (Path(folder_or_list).is_dir() or Path(folder_or_list).is_file()):
        raise FileNotFoundError(
            f"there is no folder and no list of assets at {folder_or_list}. Pass the path of a folder or a"
            " list."
        )


def read_collection(
    folder_or_list: Path, report_line: Callable[[str], None] = lambda text: None, lenient: bool = False
) -> Collection:
    """Read a collection of assets, and examine each file.

    Args:
        folder_or_list: path of a folder of assets, or of a list of assets, in a layout that the docstring of
            this module describes.
        report_line: function that is called with lines of progress.
        lenient: True leaves out assets that cannot be shown, and reports them; False raises an error for
            them.

    Raises:
        FileNotFoundError: `folder_or_list` does not exist.
        ValueError: the layout is not valid, or a file cannot be shown.
    """
    folder_or_list = folder_or_list.resolve()
    check_collection_path(folder_or_list)
    if folder_or_list.is_dir():
        collection = _from_folder(folder_or_list)
    else:
        collection = _from_list(folder_or_list)
    return _checked(collection, folder_or_list, report_line, lenient)


def is_asset_folder(path: Path) -> bool:
    """Return True if a path is a folder that contains the assets of one generator.

    Such a folder contains asset files such as PROMPT.glb, or a list that `eg3d-rlhf flow sample` has written.
    """
    # A folder with snapshots of a network is the folder of a training. Videos in it are not assets.
    if not path.is_dir() or any(path.glob("network-snapshot-*")):
        return False
    return (path / RANKING).is_file() or any(
        file.suffix.lower() in reading.SUFFIXES for file in path.iterdir()
    )


def read_generator(folder: Path, report_line: Callable[[str], None] = lambda text: None) -> Collection:
    """Read the assets in the folder of one generator, and examine each file.

    Args:
        folder: folder of the assets. The file prompts.jsonl may lie in it or beside it.
        report_line: function that is called with lines of progress.

    Raises:
        ValueError: the layout is not valid, or a file cannot be shown.
    """
    folder = folder.resolve()
    # The name of the folder becomes the name of the generator, so it must be printable.
    _name(folder.name, "folder")
    if (folder / RANKING).is_file():
        return _checked(_from_rankings({folder.name: folder / RANKING}, folder), folder, report_line)
    assets = [
        Asset(path=path, generator=folder.name, prompt=_name(path.stem, path.name), seed=0)
        for path in asset_files(folder, folder)
    ]
    # Two generators that are compared usually share a prompts.jsonl, which lies beside their folders.
    prompts_folder = folder if (folder / PROMPTS).is_file() else folder.parent
    return _checked(
        Collection(_check_stems(assets), _prompts(prompts_folder, {asset.prompt for asset in assets})),
        folder,
        report_line,
    )


def _checked(
    collection: Collection, folder_or_list: Path, report_line: Callable[[str], None], lenient: bool = False
) -> Collection:
    """Check the number of assets, and that no asset occurs twice. Then examine the files, see `_examined`."""
    if not collection.assets:
        raise ValueError(
            f"{folder_or_list.name} contains no assets. Arrange the files as GENERATOR/PROMPT.glb, or write a"
            " list."
        )
    if len(collection.assets) > MAX_ASSETS:
        raise ValueError(
            f"{folder_or_list.name} contains {len(collection.assets):,} assets, but at most {MAX_ASSETS:,}"
            " are allowed. Divide them among several campaigns: make a folder or list for each."
        )
    asset_by_key: dict[tuple, Asset] = {}
    for asset in collection.assets:
        # setdefault returns the first asset with this key
        first_asset = asset_by_key.setdefault((asset.generator, asset.prompt, asset.seed), asset)
        if first_asset is not asset:
            raise ValueError(
                f"{first_asset.path.name} and {asset.path.name} are both the asset of generator"
                f" {asset.generator} for prompt {asset.prompt} and seed {asset.seed}. Write a list that"
                " gives them different seeds."
            )
    root = folder_or_list if folder_or_list.is_dir() else folder_or_list.parent
    return _examined(collection, root, report_line, lenient)


def _examined(
    collection: Collection, root: Path, report_line: Callable[[str], None], lenient: bool
) -> Collection:
    """Examine all files in a separate process, and return the collection with their kinds and hashes.

    Args:
        collection: collection that was not examined yet.
        root: folder in which the textures of the files may lie.
        report_line: function that is called with lines of progress.
        lenient: True leaves out assets that cannot be shown, and reports them; False raises an error for
            them.
    """
    image_paths = [prompt.image for prompt in collection.prompts.values() if prompt.image]
    # dict.fromkeys removes repetitions and keeps the order
    paths = list(dict.fromkeys([*image_paths, *(asset.path for asset in collection.assets)]))

    def report_count(done: int) -> None:
        # one line for 100 files, so that the log stays short
        if done % 100 == 0 or done == len(paths):
            report_line(f"examined {done} of {len(paths)} files")

    examination_by_path = dict(zip(paths, examine_with_records(paths, report_count, root), strict=True))
    examined_by_path = {
        path: examination
        for path, examination in examination_by_path.items()
        if isinstance(examination, reading.Examined)
    }
    unfit_assets = [asset for asset in collection.assets if asset.path not in examined_by_path]
    unfit_count = len(paths) - len(examined_by_path)
    # The image of a prompt must not be left out, and at least one asset must remain. The first comparison is
    # False if an image is among the unfit files.
    may_leave_out = lenient and len(unfit_assets) == unfit_count < len(collection.assets)
    if unfit_count and not may_leave_out:
        reading.reject(
            {path: reason for path, reason in examination_by_path.items() if isinstance(reason, str)}
        )
    notes = []
    if unfit_assets:
        notes.append(
            f"{len(unfit_assets)} of {len(collection.assets)} assets are left out:"
            f" {unfit_assets[0].path.name}: {examination_by_path[unfit_assets[0].path]}"
        )
        collection = Collection(
            [asset for asset in collection.assets if asset.path in examined_by_path], collection.prompts
        )
    file_notes = [
        f"{path.name}: {examined_by_path[path].note}"
        for path in paths
        if path in examined_by_path and examined_by_path[path].note
    ]
    notes += file_notes[:NOTED]
    if len(file_notes) > NOTED:
        notes.append(f"{len(file_notes) - NOTED} more files have such notes")
    if untextured_line := _untextured_line(collection, examined_by_path):
        notes.append(untextured_line)
    for note in notes:
        report_line(note)
    # The kind of a file is recognised by its content, so it may differ from the suffix.
    for path in image_paths:
        if examined_by_path[path].kind != "image":
            raise ValueError(
                f"{path.name} is used as the image of a prompt, but it is no image. Use an image file as the"
                " image of the prompt."
            )
    for asset in collection.assets:
        if examined_by_path[asset.path].kind == "image":
            raise ValueError(
                f"{asset.path.name} is used as an asset, but it is an image. Use a 3D file or a video as the"
                " asset."
            )
    assets = [
        replace(
            asset,
            kind=examined_by_path[asset.path].kind,
            hash=examined_by_path[asset.path].hash,
            untextured=examined_by_path[asset.path].untextured,
        )
        for asset in collection.assets
    ]
    prompts = {
        prompt_name: replace(prompt, hash=examined_by_path[prompt.image].hash if prompt.image else None)
        for prompt_name, prompt in collection.prompts.items()
    }
    return Collection(assets, prompts, notes)


def _untextured_line(collection: Collection, examined_by_path: Mapping[Path, reading.Examined]) -> str:
    """Return a line on the assets of which textures or colours are not shown, by generator; '' without any.

    Args:
        collection: collection of assets.
        examined_by_path: result of the examination of each file.
    """
    untextured_assets = [asset for asset in collection.assets if examined_by_path[asset.path].untextured]
    if not untextured_assets:
        return ""
    counts = [
        f"{sum(asset.generator == generator for asset in untextured_assets)} of"
        f" {sum(asset.generator == generator for asset in collection.assets)} of {generator}"
        for generator in collection.generators
    ]
    return (
        f"{len(untextured_assets)} of {len(collection.assets)} assets are shown without their textures"
        f" ({', '.join(counts[:NOTED])}{', ...' if len(counts) > NOTED else ''}). People would compare"
        " textured with flat assets: correct the files, or export them as GLB with PNG or JPEG textures"
        " inside. The page says so beside each of them."
    )


# ---- layouts


def _from_folder(folder: Path) -> Collection:
    """Read the assets of a folder, in one of the layouts that the docstring of this module describes."""
    if (folder / RANKING).is_file():
        return _from_rankings({folder.name: folder / RANKING}, folder)
    # hidden folders such as .git are ignored
    generator_folders = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    # If at least one folder contains a list, folders without a list are ignored.
    list_by_generator = {
        path.name: path / RANKING for path in generator_folders if (path / RANKING).is_file()
    }
    if list_by_generator:
        return _from_rankings(list_by_generator, folder)
    assets = []
    for generator_folder in generator_folders:
        _name(generator_folder.name, folder.name)
        # without a list, the number of a file is used as its seed
        for file_number, path in enumerate(asset_files(generator_folder, folder)):
            assets.append(
                Asset(
                    path=path,
                    generator=generator_folder.name,
                    prompt=_name(path.stem, path.name),
                    seed=file_number,
                )
            )
    if not assets and asset_files(folder, folder):
        raise ValueError(
            f"{folder.name} contains asset files, but no folders of generators. Move the files into a folder"
            " for each generator: GENERATOR/PROMPT.glb."
        )
    return Collection(_check_stems(assets), _prompts(folder, {asset.prompt for asset in assets}))


def asset_files(folder: Path, root: Path) -> list[Path]:
    """Return the resolved paths of the asset files in a folder, sorted by name.

    Args:
        folder: folder. Files in its subfolders are not listed.
        root: folder in which all files must lie.

    Raises:
        ValueError: a link leads out of `root`.
    """
    # The paths are sorted, because their order decides the seeds of the assets.
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in reading.SUFFIXES and not path.name.startswith(".")
    )
    return [inside(path, root, path.name) for path in paths]


def _check_stems(assets: list[Asset]) -> list[Asset]:
    """Check that each generator has only one file for each prompt, and return `assets`.

    Raises:
        ValueError: the names of two files of a generator differ only in their suffix.
    """
    asset_by_key: dict[tuple[str, str], Asset] = {}
    for asset in assets:
        # setdefault returns the first asset with this key
        first_asset = asset_by_key.setdefault((asset.generator, asset.prompt), asset)
        if first_asset is not asset:
            raise ValueError(
                f"{asset.generator}: {first_asset.path.name} and {asset.path.name} are both the file of"
                f" prompt {asset.prompt}. Remove one of them, or write a list."
            )
    return assets


def _prompts(folder: Path, prompt_names: set[str]) -> dict[str, Prompt]:
    """Read the prompts with the given names from prompts.jsonl.

    Args:
        folder: folder that may contain the file. Without it, the prompts have neither text nor image.
        prompt_names: names of the prompts.
    """
    prompt_by_name = {prompt_name: Prompt() for prompt_name in sorted(prompt_names)}
    if (folder / PROMPTS).is_file():
        for prompt_record, location in _lines(folder / PROMPTS):
            prompt_name = _text(prompt_record, "prompt", location)
            # The file may also describe prompts for which there is no asset.
            if prompt_name in prompt_names:
                prompt_by_name[prompt_name] = _prompt(prompt_record, folder, location)
        if prompt_names and not any(prompt.text or prompt.image for prompt in prompt_by_name.values()):
            raise ValueError(
                f"{PROMPTS} describes none of the prompts of the asset files. Write the name of an asset file"
                f' without its suffix, such as {min(prompt_names)!r}, as "prompt" on each line.'
            )
    return prompt_by_name


def _from_rankings(list_by_generator: dict[str, Path], root: Path) -> Collection:
    """Read lists that `eg3d-rlhf flow sample` has written.

    Args:
        list_by_generator: name of a generator -> path of its list.
        root: folder of the collection, which may contain prompts.jsonl.
    """
    assets = []
    prompts = {}
    for generator, list_path in list_by_generator.items():
        _name(generator, root.name)
        for asset_record, location in _lines(list_path):
            prompt_text = _text(asset_record, "condition", location)
            look_at_path = _text(asset_record, "look_at", location)
            prompts[prompt_text] = Prompt(text=prompt_text)
            # `look_at_path` is the file that annotators see; the list also contains the paths of latents
            asset_path = inside(list_path.parent / look_at_path, list_path.parent, location)
            assets.append(
                Asset(
                    path=asset_path,
                    generator=generator,
                    prompt=prompt_text,
                    seed=_seed(asset_record, location),
                )
            )
    return Collection(assets, _prompts(root, set(prompts)) if (root / PROMPTS).is_file() else prompts)


def _from_list(path: Path) -> Collection:
    """Read a list of assets, which has one JSON object per line."""
    assets: list[Asset] = []
    prompt_by_name: dict[str, Prompt] = {}
    asset_counts: dict[tuple[str, str], int] = {}  # (generator, prompt) -> number of assets so far
    for asset_record, location in _lines(path):
        prompt_name = _text(asset_record, "prompt", location)
        generator = (
            _text(asset_record, "generator", location)
            if asset_record.get("generator") is not None
            else path.stem
        )
        # without seeds, the assets of a generator and prompt are numbered
        asset_number = asset_counts.get((generator, prompt_name), 0)
        asset_counts[generator, prompt_name] = asset_number + 1
        asset_path = inside(path.parent / _text(asset_record, "asset", location), path.parent, location)
        seed = _seed(asset_record, location) if asset_record.get("seed") is not None else asset_number
        assets.append(Asset(path=asset_path, generator=generator, prompt=prompt_name, seed=seed))
        line_prompt = _prompt(asset_record, path.parent, location)
        earlier_prompt = prompt_by_name.get(prompt_name, Prompt())
        # Not every line of a prompt must contain its text and image, but two lines must not contradict.
        has_other_text = line_prompt.text and earlier_prompt.text and line_prompt.text != earlier_prompt.text
        has_other_image = (
            line_prompt.image and earlier_prompt.image and line_prompt.image != earlier_prompt.image
        )
        if has_other_text or has_other_image:
            raise ValueError(
                f"{location}: the prompt {prompt_name!r} has another text or image on an earlier line. Give"
                " different prompts different names."
            )
        prompt_by_name[prompt_name] = Prompt(
            text=line_prompt.text or earlier_prompt.text, image=line_prompt.image or earlier_prompt.image
        )
    return Collection(assets, prompt_by_name)


# ---- lines


def _lines(path: Path) -> Iterable[tuple[dict, str]]:
    """Yield (JSON object, name of the line for messages) for each line of a list. Empty lines are skipped.

    Raises:
        ValueError: the list is too large, or a line is not a JSON object.
    """
    if path.stat().st_size > MAX_LIST:
        raise ValueError(
            f"{path.name}: the list has {path.stat().st_size >> 20} MB, but at most {MAX_LIST >> 20} MB are"
            " allowed. Divide it, and make several lists."
        )
    with path.open("rb") as list_file:
        # readline returns at most MAX_LINE + 1 bytes. So a line that is too long is recognised, but never
        # completely in memory.
        for line_number, line_bytes in enumerate(iter(lambda: list_file.readline(MAX_LINE + 1), b""), 1):
            location = f"{path.name}, line {line_number}"
            if not line_bytes.strip():
                continue
            try:
                line_record = json.loads(line_bytes) if len(line_bytes) <= MAX_LINE else None
            # RecursionError: the line contains very deeply nested brackets
            except (ValueError, RecursionError):
                line_record = None
            if not isinstance(line_record, dict):
                raise ValueError(
                    f"{location}: the line must be a JSON object of at most {MAX_LINE >> 10} kB, but it"
                    f" begins with {line_bytes[:40]!r}. Write one JSON object per line, in UTF-8."
                )
            yield line_record, location


def _text(line_record: dict, field_name: str, location: str) -> str:
    """Return a field of a line, which must be a printable text.

    Args:
        line_record: JSON object of the line.
        field_name: name of the field.
        location: name of the line for messages.

    Raises:
        ValueError: the field is missing or not such a text.
    """
    return _name(line_record.get(field_name), f'{location}: "{field_name}"')


def _name(field_value: object, location: str) -> str:
    """Return `field_value` if it is a printable text of at most MAX_TEXT characters.

    Args:
        field_value: value of a JSON file, which may have any type.
        location: name of the value for the message.

    Raises:
        ValueError: the value is not such a text.
    """
    if (
        not isinstance(field_value, str)
        or not field_value.strip()
        or len(field_value) > MAX_TEXT
        or not field_value.isprintable()
    ):
        raise ValueError(
            f"{location}: {str(field_value)[:40]!r} is not allowed. Use a printable text of 1 to {MAX_TEXT}"
            " characters."
        )
    return field_value


def _seed(line_record: dict, location: str) -> int:
    """Return the seed of a line, which must be an integer from 0 to 2^32 - 1.

    Raises:
        ValueError: the field "seed" is missing or not such an integer.
    """
    # isinstance(True, int) is True, so the type is compared.
    seed = line_record.get("seed")
    if type(seed) is not int or not 0 <= seed < _SEEDS:
        raise ValueError(
            f'{location}: the "seed" {str(seed)[:40]!r} is not allowed. Use an integer from 0 to'
            f" {_SEEDS - 1}."
        )
    return seed


def _prompt(line_record: dict, root: Path, location: str) -> Prompt:
    """Return the prompt of a line. Its text and its image are optional.

    Args:
        line_record: JSON object of the line.
        root: folder in which the image must lie, and to which its path is relative.
        location: name of the line for messages.

    Raises:
        ValueError: the text is not allowed, or the image is no file in `root`.
    """
    prompt_text = line_record.get("text")
    if prompt_text is not None and (
        not isinstance(prompt_text, str)
        or len(prompt_text) > MAX_TEXT
        # A text may contain line breaks and tabs. Other control characters (category Cc) cannot be shown, and
        # lone surrogates (Cs) cannot be encoded as UTF-8.
        or any(
            unicodedata.category(character) in ("Cc", "Cs")
            for character in prompt_text
            if character not in "\n\r\t"
        )
    ):
        raise ValueError(
            f'{location}: the "text" {str(prompt_text)[:40]!r} is not allowed. Use a text of at most'
            f" {MAX_TEXT}"
            " characters without control characters."
        )
    image = (
        inside(root / _text(line_record, "image", location), root, location)
        if line_record.get("image") is not None
        else None
    )
    return Prompt(text=prompt_text or None, image=image)


def inside(path: Path, root: Path, location: str) -> Path:
    """Return the resolved path of a file that must lie below a folder.

    Args:
        path: path of the file.
        root: folder.
        location: name of the line or file for messages.

    Raises:
        ValueError: the path is no file, or does not lie below `root`.
    """
    try:
        resolved_path = path.resolve()
        # The resolved path contains neither ".." nor links, with which a path could lead out of the folder.
        if not resolved_path.is_relative_to(root.resolve()):
            raise ValueError(
                f"{location}: the file {path.name} does not lie in the folder {root.name}. Copy it into this"
                " folder."
            )
        if not resolved_path.is_file():
            raise ValueError(f"{location}: there is no file {path.name}. Use the name of a file that exists.")
    except (OSError, RuntimeError) as error:  # OSError: the name is too long; RuntimeError: links form a loop
        raise ValueError(
            f"{location}: the file {path.name[:60]} cannot be opened: {error}. Use the name of another file."
        ) from None
    return resolved_path


# ---- pairs


def asset_shape(asset: Asset) -> Shape:
    """Return the `Shape` with which a campaign represents an asset."""
    shape_fields = {
        "generator": asset.generator,
        "source": str(asset.path),
        "seed": asset.seed,
        "file": asset.hash,
        "condition": asset.prompt,
    }
    return Shape.from_asset(**shape_fields)


def plan_assets(
    pairing: PairingOptions,
    collection: Collection,
    report_line: Callable[[str], None] = lambda text: None,
    answers: Sequence[Preference] = (),
    ensemble: Ensemble | None = None,
    answered: frozenset[frozenset[int]] = frozenset(),
) -> Plan:
    """Plan the pairs of a campaign that compares assets, or that shows assets one by one.

    Args:
        pairing: options of the pairs.
        collection: assets.
        report_line: function that is called with a line if fewer pairs than requested can be planned.
        answers: preferences of an earlier campaign, see `answers_of`, for strategies that use answers.
        ensemble: rewards that score assets by their index in the collection, for strategies that use scores.
        answered: pairs of indices that are not asked again, see `answered_pairs`.

    Raises:
        ValueError: no pair can be planned.
    """
    # All random choices come from this generator, so that equal options give equal plans.
    rng = np.random.default_rng(pairing.seed)
    strategy_items = replace(items_of(collection, ensemble), answered=answered)
    index_pairs: list[tuple[int, int]]  # pairs of indices into collection.assets
    strategy_report: dict = {}
    if pairing.single:
        # The assets are chosen evenly from all generators and prompts. Each is paired with itself.
        asset_buckets = strategy_items.by(lambda item: (item.source, item.prompt))
        index_pairs = [
            (index, index) for index in itertools.islice(balanced(asset_buckets, rng), pairing.pairs)
        ]
    else:
        check_rewards(pairing.strategy, 0 if ensemble is None else ensemble.size)
        strategy_plan = STRATEGIES[pairing.strategy].plan(strategy_items, answers, rng, pairing)
        # The order of an asset in a pair of a strategy has no meaning, so it is chosen at random.
        index_pairs = [(a, b) if rng.integers(2) else (b, a) for a, b in strategy_plan.pairs]
        # the strategy of a plugin need not call `Items.comparable`
        index_pairs = [pair for pair in index_pairs if frozenset(pair) not in answered]
        strategy_report = report_with_names(
            strategy_plan.report, lambda a, b: _facts(collection.assets[a], collection.assets[b])
        )
    if not index_pairs and answered:
        raise ValueError(
            f"the strategy {pairing.strategy} finds no pair that was not answered in an earlier campaign"
            f" ({len(answered)} were). Use --strategy=random, or compare further assets, of more prompts or"
            " images."
        )
    if not index_pairs:
        raise ValueError(
            "no prompt has two different assets that could be compared. Add a file of each generator for"
            " each prompt."
        )
    if len(index_pairs) < pairing.pairs:
        unit_noun = "assets" if pairing.single else "pairs"
        report_line(
            f"planned only {len(index_pairs)} of {pairing.pairs} {unit_noun}, because there are no more"
        )
    pairing = replace(pairing, pairs=len(index_pairs))
    asset_shapes = [asset_shape(asset) for asset in collection.assets]
    planned_pairs = [
        PlannedPair(first=asset_shapes[first_index], second=asset_shapes[second_index])
        for first_index, second_index in index_pairs
    ]
    gold_pairs, practice_pairs = _known_pairs(pairing, collection, rng, report_line)
    # the other options do not apply to assets
    asset_options = {
        key: value for key, value in asdict(pairing).items() if key in ("pairs", "seed", "single", "strategy")
    }
    plan_report = {
        **asset_options,
        **strategy_report,
        "generators": collection.generators,
        "assets": len(collection.assets),
        "gold": len(gold_pairs),
        "training": len(practice_pairs),
    }
    if untextured_count := sum(asset.untextured for asset in collection.assets):
        plan_report["untextured"] = untextured_count
    return Plan(practice_pairs + interleave(planned_pairs, gold_pairs), plan_report)


def items_of(collection: Collection, ensemble: Ensemble | None = None) -> Items:
    """Convert the assets of a collection to `Items`, from which a strategy chooses pairs.

    A strategy compares assets of the same prompt: of different generators if there are several generators,
    and otherwise of different seeds. Equal files, which annotators could not distinguish, are not compared.

    Args:
        collection: examined collection. The number of an item is the index of its asset.
        ensemble: rewards that score the assets; None for strategies that do not use scores.
    """
    members = [
        Item(prompt=asset.prompt, source=asset.generator, content=asset.hash) for asset in collection.assets
    ]
    return Items(members=members, ensemble=ensemble)


def answers_of(collection: Collection, judgement_rows: Sequence[JudgementRow]) -> list[Preference]:
    """Convert judgements of an earlier campaign to preferences.

    The winner and the loser of a preference are indices of assets in the collection.

    Raises:
        ValueError: a judgement is about an asset that is not in the collection.
    """
    # The files may have been moved since the earlier campaign, so an asset is identified by the hash of its
    # content.
    index_by_asset = {
        (asset.generator, asset.prompt, asset.hash): index for index, asset in enumerate(collection.assets)
    }
    preferences = []
    for judgement in judgement_rows:
        pair_indices = []
        for shape in (judgement.left, judgement.right):
            index = index_by_asset.get((shape.generator, shape.condition, shape.file))
            if index is None:
                raise ValueError(
                    f"the earlier campaign contains an answer about the asset of prompt {shape.condition!r}"
                    f" and seed {shape.seed}, which is not in this collection. Name an earlier campaign that"
                    " compared the same files."
                )
            pair_indices.append(index)
        left_index, right_index = pair_indices
        winner, loser = (
            (right_index, left_index) if judgement.choice is Choice.RIGHT else (left_index, right_index)
        )
        preferences.append(Preference(winner=winner, loser=loser, tie=judgement.choice.equal))
    return preferences


def answered_pairs(
    collection: Collection, judgement_rows: Iterable[JudgementRow]
) -> frozenset[frozenset[int]]:
    """Return the pairs of assets that judgements are about, as indices of assets in the collection.

    Judgements about assets that are not in the collection are ignored.
    """
    index_by_asset = {
        (asset.generator, asset.prompt, asset.hash): index for index, asset in enumerate(collection.assets)
    }
    index_pairs = set()
    for judgement in judgement_rows:
        indices = frozenset(
            index_by_asset.get((shape.generator, shape.condition, shape.file))
            for shape in (judgement.left, judgement.right)
        )
        index_pairs.add(frozenset(index for index in indices if index is not None))
    return frozenset(pair for pair in index_pairs if len(pair) == 2)


def _facts(first_asset: Asset, second_asset: Asset) -> dict:
    """Return the prompt, the generators and the seeds of the two assets of a pair, for the plan's report."""
    return {
        "prompt": first_asset.prompt,
        "generators": [first_asset.generator, second_asset.generator],
        "seeds": [first_asset.seed, second_asset.seed],
    }


def prompts_json(collection: Collection) -> dict[str, dict]:
    """Return the prompts of a collection as a campaign stores them: name -> prompt in JSON types."""
    return {name: prompt.to_json() for name, prompt in collection.prompts.items()}


def _known_pairs(
    pairing: PairingOptions,
    collection: Collection,
    rng: np.random.Generator,
    report_line: Callable[[str], None],
) -> tuple[list[PlannedPair], list[PlannedPair]]:
    """Plan the gold pairs and the practice pairs of a campaign.

    These pairs contain damaged assets, and videos cannot be damaged. If all assets are videos, both lists are
    empty.

    Returns:
        Gold pairs, and practice pairs.
    """
    damageable_assets = [asset for asset in collection.assets if asset.kind in DAMAGED_KINDS]
    if not damageable_assets:
        report_line(
            "There are no gold checks and no practice pairs, because they need damaged assets, and videos"
            " cannot be damaged."
        )
        return [], []
    # A random order, which is repeated: in a small collection an asset is used several times.
    shuffled_indices = rng.permutation(len(damageable_assets))
    shape_cycle = itertools.cycle([asset_shape(damageable_assets[index]) for index in shuffled_indices])
    make_pairs = damaged_singles if pairing.single else known_answers
    gold_shapes = list(itertools.islice(shape_cycle, pairing.gold_pair_count))
    gold_pairs = make_pairs(gold_shapes, Kind.GOLD, rng, DAMAGES)
    practice_shapes = list(itertools.islice(shape_cycle, pairing.training))
    practice_pairs = make_pairs(practice_shapes, Kind.TRAINING, rng, DAMAGES)
    return gold_pairs, practice_pairs
