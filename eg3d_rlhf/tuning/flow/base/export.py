"""The one way out of tuning: a generator's folder in its released layout, with tuned networks in place of its
own.

A family says what its folder holds (`Release`); merging, rounding, linking and the report are here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.models.weights import State
from eg3d_rlhf.tuning.flow.families import check_stages, family_of
from training.progress import tqdm
from training.storage import write_atomic


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file of a folder that holds a stage's network."""

    file: str
    # the network that was tuned, in a type, or in those of its file (None)
    load: Callable[[torch.dtype | None], nn.Module]
    # (file to write, tensors): in the file's own types, with all else that it held
    write: Callable[[Path, State], None]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A folder with other networks of some stages; files are named relative to it."""

    # all that stays, linked, or copied where the file system cannot; or what is written
    files: Mapping[str, Path | bytes]
    networks: Mapping[str, Stored]  # by stage
    elsewhere: Sequence[str] = ()  # names of models that are not on this machine, and stay references


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """Write a new folder with tuned weights merged, rounded to the types of the files that they replace.

    Args: root: the generator that was tuned, or a bundled one's name; tuned: by stage, a folder or file of
        weights in any layout that policies.tuned_model reads.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}; rounding: share of
        the update that merging loses.
    Raises: FileNotFoundError or ValueError for files or a folder that do not fit.
    """
    family = family_of(root)
    check_stages("export", family, list(tuned))
    if family.release is None:
        raise ValueError(
            f"export: expected a family that exports networks, got {family.name}. See --adapter."
        )
    release = family.release(root, tuple(tuned))
    done = dict[str, dict]()
    for name, content in release.files.items():
        if isinstance(content, bytes):
            write_atomic(out / name, content)
        else:
            link(content, out / name)
    for stage, stored in tqdm(
        release.networks.items(), desc="export", unit="stage", leave=False, disable=None
    ):
        state = merged_state(tuned_model(stored.load(torch.float32), tuned[stage]))
        done[stage] = {
            "file": stored.file,
            "rounding": merge_rounding(tuned_model(stored.load(None), tuned[stage])),
        }
        stored.write(out / stored.file, state)
    kept = sorted(name for name, content in release.files.items() if isinstance(content, Path))
    return {"tuned": done, "kept": kept, "elsewhere": list(release.elsewhere)}
