"""The registry of families of flow generators: what tells a family's folder, and what is done with it.

A family is a module of this package that FAMILIES names, or a plugin's file (docs/extending.md): it registers
a `FlowFamily`, and `train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow` then know its folders
by what lies in them.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.registry import Registry, load_plugins
from eg3d_rlhf.models.sparse import Latent
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditions, read_conditions
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, pairs_hash
from eg3d_rlhf.tuning.flow.base.problem import (
    Problem,
    ProblemSource,
    chosen_precision,
    conditions_beside,
    divided,
    hash_of,
    pair_folders,
    read_stages,
)
from eg3d_rlhf.tuning.flow.base.ranking import Candidates, drawn_candidate
from eg3d_rlhf.tuning.flow.base.stage import AssetReward

# (pipeline, pairs of its last stage, title)
Judge = Callable[[Any, Callable[[], Sequence[PreferencePair]], str], AssetReward]
# (root, Conditions, *, dtype, device) -> Pipeline; without conditions nothing is sampled
Load = Callable[..., Any]
# of ProblemSource, read by all families
COMMON = ("pipeline", "pairs", "seed", "held_out", "splits", "conditions", "dtype", "precision")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a folder, for `eg3d-rlhf flow check`: what its file should hold and what it does."""

    name: str
    file: Path
    expected: Mapping[str, Sequence[int]]  # shapes by name, of the folder's own settings
    found: Mapping[str, Any]  # tensors by name, of which only shapes and types are looked at; none: not there
    without: str = ""  # what cannot be done without it; "": it must be there
    released: tuple[int, int] | None = None  # tensors and numbers in all of the published one


@dataclass(frozen=True, kw_only=True)
class FlowFamily:
    """A kind of generator, and how its folders are read and written."""

    name: str
    layout: str  # what its folder holds, for messages
    recognises: Callable[[Path], bool]  # whether a folder is one of its own, by names and headers alone
    stages: tuple[str, ...]  # names of its stages, in order
    load: Load  # strictly by name and shape; ValueError for what is missing, unexpected or misshapen
    # (root): all that networks and settings come from, by name: their hashes identify a problem
    files: Callable[..., Mapping[str, Path]]
    # a reward of people's pairs; None: stages are trained one by one, and nothing is judged
    judge: Judge | None = None
    zero_null: bool = True  # the empty condition is zeros
    bundled: bool = False  # it comes with this package, and is called by its name in place of a folder's
    common: tuple[str, ...] = COMMON  # fields of ProblemSource that it reads as every other family does
    options: tuple[str, ...] = ()  # of ProblemSource, that it reads besides the common ones
    open: Callable[[ProblemSource, str | torch.device], Problem] | None = None  # in place of `open_folder`
    # (root, pictures by name, device)
    embed: Callable[[Path, Mapping[str, Path], torch.device], Conditions] | None = None
    # (root, texts, device)
    embed_texts: Callable[[Path, Sequence[str], torch.device], Conditions] | None = None
    show: Callable[..., Path] | None = None  # write (asset, path without ending) to look at; returns the file
    # (pipeline, condition, latents by stage): JSON that the list
    facts: Callable[[Any, str, Mapping[str, Latent]], Mapping] | None = None
    # of drawn assets says besides
    # (folder of drawn assets, its list, pipeline): said of them
    remark: Callable[[Path, Sequence[Mapping], Any], str] | None = None
    up: str = "y"  # axis of what `show` writes that points up
    # per axis of the grid that show reads an asset on, its third argument; None: nothing to choose
    cells: int | None = None
    # (root, tuned stages): its folder with others of these, an export.Release
    release: Callable[[Path, Sequence[str]], Any] | None = None
    loaded_by: str = ""  # how the original's own program opens an exported folder {out}
    # (file, pipeline, stage, latent): each in its own format
    write_latent: Callable[[Path, Any, str, Latent], None] | None = None
    # (root, *, device): a pipeline that encodes assets which others made; with "views" among
    encoder: Callable[..., Any] | None = None
    # the options also share, views
    candidate: Candidates = drawn_candidate  # reads a line of a ranked list
    # (pipeline, stage, report): what imported pairs state besides
    pair_meta: Callable[[Any, str, Mapping], Mapping] | None = None
    # (pipeline, stage) -> shape of a condition, [L, E], or by name; for estimates
    told: Callable[[Any, str], Any] | None = None
    # of a folder; None: it is opened to see whether it fits
    networks: Callable[[Path], Sequence[Network]] | None = None
    version: str = ""  # which release it is, in words
    # of a bundled generator: all that it knows, and what it is told where none are given
    prompts: tuple[str, ...] = ()
    batch: int = 1  # assets that are drawn at once, unless told otherwise
    address: str = ""  # where its folder is published
    notice: str = ""  # printed once when a folder is opened: licences that exclude somebody


FAMILIES: Registry[FlowFamily] = Registry(
    "flow family",
    {
        "toy": "eg3d_rlhf.tuning.flow.toy.bundled",
        "trellis": "eg3d_rlhf.tuning.flow.families.trellis",
        "trellis2": "eg3d_rlhf.tuning.flow.families.trellis2",
        "hunyuan3d": "eg3d_rlhf.tuning.flow.families.hunyuan3d",
        "sam3d": "eg3d_rlhf.tuning.flow.families.sam3d",
    },
)
_told: set[str] = set()


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def register(family: FlowFamily) -> FlowFamily:
    return FAMILIES.add(family.name, family)


def bundled_family(name: str) -> FlowFamily | None:
    """The family that comes with this package under a name, if there is one."""
    family = FAMILIES[name] if name in FAMILIES else None
    return family if family is not None and family.bundled else None


def family_of(root: Path, say: Callable[[str], None] = tell) -> FlowFamily:
    """The family of a folder, or the bundled one of that name; its notice is said once.

    Raises: FileNotFoundError for no folder, or one of no known family.
    """
    root, bundled = Path(root), bundled_family(str(root))
    if bundled is not None:
        return bundled
    load_plugins()  # any of theirs may know the folder
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _told:
                _told.add(family.name)
                say(family.notice)
            return family
    if not root.is_dir() or not any(root.iterdir()):
        got = "an empty folder" if root.is_dir() else "no such folder" if not root.exists() else "a file"
        addresses = [family.address for family in FAMILIES.values() if family.address]
        same = [address for address in addresses if address.rpartition("/")[2].lower() == root.name.lower()]
        fetch = " or ".join(same or addresses)
        raise FileNotFoundError(
            f"pipeline: expected a generator's folder, got {got}: {root}. Name it, or fetch one: {fetch}"
        )
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(
        f"pipeline: expected the folder of a known generator ({layouts}), got {root}. Name such a folder."
    )


def check_source(source: ProblemSource) -> None:
    """Refuse what has no effect on a problem, or lacks, as far as its names tell.

    Raises: ValueError naming it.
    """
    family = bundled_family(source.pipeline)
    if family is not None:
        _refuse(
            source,
            (*family.common, *family.options),
            f"belongs to --pipeline=DIR, and would have no effect on the {family.name}",
        )
        return
    alone = {name for family in FAMILIES.values() if family.bundled for name in family.options}
    read = [f.name for f in fields(source) if f.name not in alone]
    _refuse(source, read, "belongs to a bundled generator, and would have no effect on --pipeline=DIR")
    if source.pairs is None and source.needs_pairs:
        raise ValueError(
            "--pairs: expected a folder of people's pairs beside --pipeline=DIR, got none. The toy alone"
            " brings its own."
        )


def _beyond(source: ProblemSource, read: Sequence[str]) -> str:
    """Options that are given though they are not read."""
    return ", ".join(
        f"--{f.name.replace('_', '-')}"
        for f in fields(source)
        if f.name not in read and getattr(source, f.name) != f.default
    )


def _refuse(source: ProblemSource, read: Sequence[str], why: str) -> None:
    extra = _beyond(source, read)
    if extra:
        raise ValueError(f"{extra}: {why}. Leave it out.")


def open_problem(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """The problem of a bundled generator or a folder of any family; pairs of a stage are made or read once.

    Raises: ValueError or OSError for what is missing or does not fit, and for options that its family does
        not read.
    """
    check_source(source)
    family = family_of(Path(source.pipeline))
    _refuse(
        source,
        (*family.common, *family.options),
        f"belongs to other generators, and would have no effect on {family.name}",
    )
    if source.pairs is None and not source.needs_pairs and not family.bundled:
        problem = open_conditions(family, source, device)
    else:
        problem = family.open(source, device) if family.open else open_folder(family, source, device)
    precision = chosen_precision(source.precision, device)
    for stage in problem.pipeline.stages:
        stage.precision = precision
    identity = {**problem.identity, "precision": precision}
    return replace(problem, human_pairs=functools.cache(problem.human_pairs), identity=identity)


def pairs_in(family: FlowFamily, source: ProblemSource) -> dict[str, Path]:
    """Folders of people's pairs by stage. Raises: see `pair_folders`."""
    return pair_folders(Path(source.pairs or Path(source.pipeline) / "pairs"), family.stages)


def open_folder(
    family: FlowFamily,
    source: ProblemSource,
    device: str | torch.device = "cpu",
    check: Callable[[Any, Path, str, Mapping], None] = lambda pipeline, folder, stage, meta: None,
) -> Problem:
    """The problem of a folder and pairs of its stages, by what its family says of it.

    Conditions are divided by a hash of their names: a share is held out, half of it to choose checkpoints on
    where there are two or more. Where the family makes a reward of people's pairs of the last stage, three
    are fitted to pairs of different conditions: one half of the trained (w1 and w2), the other half
    (held-out win rate), the held-out (the final table). Where pairs of a stage are missing, there is the
    first alone.

    Args: check: refuses pairs of another pipeline, from the pipeline, the folder, the stage and what the
        writer had to say.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """
    folders = pairs_in(family, source)
    judge = family.judge
    place = conditions_beside(folders, None if source.conditions is None else Path(source.conditions))
    tokens = read_conditions(place, zero_null=family.zero_null)
    pipeline: Any = family.load(
        Path(source.pipeline), tokens, dtype=getattr(torch, source.dtype), device=device
    )
    files = _identity(family, source, place)
    read = read_stages(folders, pipeline, functools.partial(check, pipeline))
    named = sorted({pair.condition for stage in folders for pair in read(stage)})
    tokens.of(named)  # raises for those that are missing
    trained, choosing, held = map(list, source.splits or divided(named, source.seed, source.held_out))

    def human_pairs(stage: str, names: Sequence[str] = trained) -> list[PreferencePair]:
        kept = set(names)
        return [pair for pair in read(stage) if pair.condition in kept]

    last = pipeline.stages[-1].name

    def fitted(title: str, names: Sequence[str]) -> AssetReward | None:
        return None if judge is None else judge(pipeline, lambda: human_pairs(last, names), title)

    judged = judge is not None and set(folders) == {stage.name for stage in pipeline.stages} and bool(held)
    halves = (trained[0::2], trained[1::2]) if len(trained) > 1 else (trained, [])
    return Problem(
        pipeline=pipeline,
        human_pairs=human_pairs,
        reward=fitted("reward", halves[0]),
        chooser=fitted("chooser", halves[1]) if judged and halves[1] else None,
        final=fitted("final judge", held) if judged else None,
        train_conditions=trained,
        held_out_conditions=held,
        choosing_conditions=choosing,
        unseen_pairs=human_pairs,
        teach=(
            None
            if judge is None or last not in folders
            else lambda pairs, seed: judge(pipeline, lambda: pairs, "reward")
        ),
        fitted_to={"reward": halves[0], "chooser": halves[1], "final": held},
        identity={
            **files,
            "pairs": {stage: pairs_hash(folder) for stage, folder in folders.items()},
            "seed": source.seed,
            **(
                {"held_out": source.held_out}
                if source.splits is None
                else {"splits": list(map(list, source.splits))}
            ),
        },
    )


def open_conditions(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """The problem of a folder and of embeddings alone, for a reward from elsewhere; the empty condition is ''
    where the file has it.

    Raises: ValueError for no embeddings, or for options that are then not read.
    """
    extra = _beyond(source, COMMON)
    if source.conditions is None or extra:
        got = f"{extra} beside none" if extra else "none"
        raise ValueError(
            f"--conditions: expected embeddings alone with --pipeline=DIR without --pairs, got {got}. Name"
            " the file."
        )
    root = Path(source.pipeline)
    place = Path(source.conditions)
    tokens = read_conditions(place, zero_null=family.zero_null)
    tokens = replace(tokens, zero_null=tokens.zero_null and NULL not in tokens.tokens)
    pipeline = family.load(root, tokens, dtype=getattr(torch, source.dtype), device=device)
    identity = _identity(family, source, place)
    trained, choosing, held = divided(tokens.names, source.seed, source.held_out)
    return Problem(
        pipeline=pipeline,
        human_pairs=lambda stage: [],
        reward=None,
        chooser=None,
        final=None,
        train_conditions=trained,
        choosing_conditions=choosing,
        held_out_conditions=held,
        identity={**identity, "seed": source.seed, "held_out": source.held_out},
    )


def _identity(family: FlowFamily, source: ProblemSource, conditions: Path) -> dict:
    hashes = {name: file_hash(path) for name, path in family.files(Path(source.pipeline)).items()}
    return {"problem": family.name, "dtype": source.dtype, "conditions": hash_of(conditions), "files": hashes}


def check_stages(who: str, family: FlowFamily, names: Sequence[str]) -> None:
    """Raise ValueError for names that are no stages of a family."""
    unknown = sorted(set(names) - set(family.stages))
    if unknown:
        raise ValueError(
            f"{who}: expected stages among {', '.join(family.stages)}, got {', '.join(unknown)}. Name a"
            " stage."
        )
