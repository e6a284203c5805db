"""Export of a generator's folder in its released layout, with tuned networks in place of the original ones.

A family describes its folder (`Release`); merging, rounding, linking and the report are here.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.tuning.flow.base.family import Exports, FlowFamily, check_stages
from training.progress import tqdm
from training.storage import write_atomic


def export(family: FlowFamily, root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """Write a new folder with tuned weights merged, rounded to the types of the files that they replace.

    Args: root: the generator that was tuned, or a bundled one's name; tuned: by stage, a folder or file of
        weights in any layout that policies.tuned_model reads.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}; rounding: share of
        the update that merging loses.
    Raises: FileNotFoundError or ValueError for files or a folder that do not fit.
    """
    check_stages("export", family, list(tuned))
    if not isinstance(family, Exports):
        raise ValueError(
            f"export: expected a family that exports networks, got {family.name}. See --adapter."
        )
    release = family.release(root, tuple(tuned))
    done = dict[str, dict]()
    # files that stay are linked, since published weights are large; settings that change are written
    for name, content in release.files.items():
        if isinstance(content, bytes):
            write_atomic(out / name, content)
        else:
            link(content, out / name)
    for stage, stored in tqdm(
        release.networks.items(), desc="export", unit="stage", leave=False, disable=None
    ):
        # merged in float32, then rounded once to the types of the file
        state = merged_state(tuned_model(stored.load(torch.float32), tuned[stage]))
        done[stage] = {
            "file": stored.file,
            "rounding": merge_rounding(tuned_model(stored.load(None), tuned[stage])),
        }
        stored.write(out / stored.file, state)
    kept = sorted(name for name, content in release.files.items() if isinstance(content, Path))
    return {"tuned": done, "kept": kept, "elsewhere": list(release.elsewhere)}
