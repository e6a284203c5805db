"""The registry of families of flow generators: what tells a family's folder, and what is done with it.

A family is one folder of this package with a `family.py`, or a plugin's file (docs/extending.md): it registers a `FlowFamily`, and
`train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow files` then know its folders by what lies in them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.plugins import load_plugins
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.models.sparse import Latent
from eg3d_rlhf.tuning.flow.conditions import NULL, Conditions, read_conditions
from eg3d_rlhf.tuning.flow.problem import (
    Judge,
    Problem,
    ProblemSource,
    conditions_beside,
    conditions_problem,
    folder_problem,
    hash_of,
    pair_folders,
)
from eg3d_rlhf.tuning.flow.ranking import Candidates, drawn_candidate
from eg3d_rlhf.tuning.flow.stage import Asset

Load = Callable[..., Any]  # (root, Conditions, *, dtype, device) -> Pipeline; without conditions nothing is sampled
COMMON = ("pipeline", "pairs", "seed", "held_out", "conditions", "dtype")  # fields of ProblemSource that every family reads


@dataclass(frozen=True, kw_only=True)
class FlowFamily:
    """A kind of generator, and how its folders are read and written."""

    name: str
    layout: str  # what its folder holds, for messages
    recognises: Callable[[Path], bool]  # whether a folder is one of its own, by names and headers alone
    stages: tuple[str, ...]  # names of its stages, in order
    load: Load  # strictly by name and shape; ValueError for what is missing, unexpected or misshapen
    files: Callable[..., Mapping[str, Path]]  # (root): all that networks and settings come from, by name: their hashes identify a problem
    judge: Judge | None = None  # a reward of people's pairs; None: stages are trained one by one, and nothing is judged
    zero_null: bool = True  # the empty condition is zeros
    options: tuple[str, ...] = ()  # of ProblemSource, that it reads besides the common ones; with "also", so do load, files and export
    open: Callable[[ProblemSource, str | torch.device], Problem] | None = None  # in place of `open_folder`
    embed: Callable[[Path, Mapping[str, Path], torch.device], Conditions] | None = None  # (root, pictures by name, device)
    embed_texts: Callable[[Path, Sequence[str], torch.device], Conditions] | None = None  # (root, texts, device)
    show: Callable[[Asset, Path], Path] | None = None  # write an asset to look at, beside a path without ending; returns the file
    export: Callable[..., dict] | None = None  # (root, new folder to write, tuned weights by stage)
    write_latent: Callable[[Path, Any, str, Latent], None] | None = None  # (file, pipeline, stage, latent): each in its own format
    encoder: Callable[..., Any] | None = None  # (root, *, device, share, views): a pipeline that encodes assets which others made
    candidate: Candidates = drawn_candidate  # reads a line of a ranked list
    pair_meta: Callable[[Any, str, Mapping], Mapping] | None = None  # (pipeline, stage, report): what imported pairs state besides
    notice: str = ""  # printed once when a folder is opened: licences that exclude somebody


FAMILIES: Registry[FlowFamily] = Registry("flow family", {
    "trellis": "eg3d_rlhf.tuning.flow.families.trellis.family",
    "trellis2": "eg3d_rlhf.tuning.flow.families.trellis2.family",
    "hunyuan3d": "eg3d_rlhf.tuning.flow.families.hunyuan3d.family",
    "sam3d": "eg3d_rlhf.tuning.flow.families.sam3d.family",
})  # fmt: skip
_told: set[str] = set()


def tell(text: str) -> None:
    """Say something apart from results."""
    print(text, file=sys.stderr, flush=True)


def register(family: FlowFamily) -> FlowFamily:
    """Make a family known."""
    return FAMILIES.add(family.name, family)


def family_of(root: Path, say: Callable[[str], None] = tell) -> FlowFamily:
    """The family of a folder; its notice is said once.

    Raises: FileNotFoundError for no folder, or one of no known family.
    """
    root = Path(root)
    load_plugins()  # any of theirs may know the folder
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _told:
                _told.add(family.name)
                say(family.notice)
            return family
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(f"pipeline: expected the folder of a known generator ({layouts}), got {root}. Name such a folder.")


def open_source(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """The problem of a folder of any family. Raises: ValueError for options that its family does not read."""
    family = family_of(Path(source.pipeline))
    read = (*COMMON, *family.options)
    extra = [f"--{f.name.replace('_', '-')}" for f in fields(source) if f.name not in read and getattr(source, f.name) != f.default]
    if extra:
        raise ValueError(f"{', '.join(extra)}: belongs to other generators, and would have no effect on {family.name}. Leave it out.")
    if source.pairs is None and not source.needs_pairs:
        return open_conditions(family, source, device)
    return family.open(source, device) if family.open else open_folder(family, source, device)


def open_folder(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """The problem of a folder, by what its family says of it."""
    root = Path(source.pipeline)
    folders = pair_folders([Path(source.pairs or root / "pairs")], family.stages)
    tokens = conditions_beside(folders, None if source.conditions is None else Path(source.conditions))
    read = read_conditions(tokens, zero_null=family.zero_null)
    pipeline: Any = family.load(root, read, dtype=getattr(torch, source.dtype), device=device)
    identity = {
        "problem": family.name, "dtype": source.dtype, "conditions": hash_of(tokens),
        "files": {name: file_hash(path) for name, path in family.files(root).items()},
    }  # fmt: skip
    return folder_problem(pipeline, folders, read, identity=identity, seed=source.seed, held_out=source.held_out, judge=family.judge)


def open_conditions(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """The problem of a folder and of embeddings alone, without pairs; the empty condition is '' where the file has it.

    Raises: ValueError for no embeddings, or for options that are then not read.
    """
    extra = [f"--{f.name.replace('_', '-')}" for f in fields(source) if f.name not in COMMON and getattr(source, f.name) != f.default]
    if source.conditions is None or extra:
        got = f"{', '.join(extra)} beside none" if extra else "none"
        raise ValueError(f"--conditions: expected embeddings alone with --pipeline=DIR without --pairs, got {got}. Name the file.")
    root, place = Path(source.pipeline), Path(source.conditions)
    tokens = read_conditions(place, zero_null=family.zero_null)
    tokens = replace(tokens, zero_null=tokens.zero_null and NULL not in tokens.tokens)
    pipeline = family.load(root, tokens, dtype=getattr(torch, source.dtype), device=device)
    identity = {
        "problem": family.name, "dtype": source.dtype, "conditions": hash_of(place),
        "files": {name: file_hash(path) for name, path in family.files(root).items()},
    }  # fmt: skip
    return conditions_problem(pipeline, tokens, identity=identity, seed=source.seed, held_out=source.held_out)


def check_stages(who: str, family: FlowFamily, names: Sequence[str]) -> None:
    """Raise ValueError for names that are no stages of a family."""
    unknown = sorted(set(names) - set(family.stages))
    if unknown:
        raise ValueError(f"{who}: expected stages among {', '.join(family.stages)}, got {', '.join(unknown)}. Name a stage.")
