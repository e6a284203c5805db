"""TRELLIS among the families of flow generators; its files have a tool of their own, eg3d-rlhf flow trellis."""

import json
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, register
from eg3d_rlhf.tuning.flow.families.trellis.files import FLOWS, KINDS, NEEDED, find_model, find_weights, read_pipeline, with_ending
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import Encoding, TrellisPipeline, load_pipeline
from eg3d_rlhf.tuning.flow.families.trellis.problem import RewardOfPairs, trellis_problem
from eg3d_rlhf.tuning.flow.problem import Problem, ProblemSource


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS's; a file that is none is left to the reader, which says what is wrong."""
    path = root / "pipeline.json"
    if not path.is_file():
        return False
    try:
        name = json.loads(path.read_text()).get("name", "")
    except (ValueError, AttributeError):
        return True
    return any(str(name).lower() == f"trellis{kind}to3dpipeline" for kind in KINDS)


def open_problem(source: ProblemSource, device: str | torch.device) -> Problem:
    """With all that its options say."""
    weights = {stage: Path(file) for stage, _, file in (text.partition("=") for text in source.flow_weights)}
    return trellis_problem(
        Path(source.pipeline), Path(source.pairs or Path(source.pipeline) / "pairs"), dtype=getattr(torch, source.dtype), device=device,
        conditions=None if source.conditions is None else Path(source.conditions), also=[Path(folder) for folder in source.also],
        seed=source.seed, held_out=source.held_out, weights=weights, encoding=Encoding(share=source.voxel_share, views=source.views),
    )


def load(root: Path, conditions: Conditions | None, **options: Any) -> TrellisPipeline:
    """Without its encoders, which sampling does not need."""
    return load_pipeline(root, conditions, whole=False, **options)


def files(root: Path) -> dict[str, Path]:
    """Of the flows, and of what else is there."""
    file = read_pipeline(root)
    found = {"pipeline.json": root / "pipeline.json"}
    for name in (*FLOWS.values(), *NEEDED):
        stem = find_model(file, name)
        found |= {f"{name}.json": with_ending(stem, ".json"), name: find_weights(stem) or stem}
    return found


register(FlowFamily(
    name="trellis", layout="pipeline.json of TrellisTextTo3DPipeline or TrellisImageTo3DPipeline", recognises=recognises,
    stages=tuple(FLOWS), load=load, files=files, judge=RewardOfPairs, open=open_problem,
    options=("also", "flow_weights", "voxel_share", "views"),
))
