"""Tuned flows back into TRELLIS's own layout: a folder that stock TRELLIS loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from eg3d_rlhf.flow.lora import merge_rounding, merged_state
from eg3d_rlhf.flow.policies import link, tuned_model
from eg3d_rlhf.flow.trellis.files import FLOWS, find_model, find_weights, read_pipeline
from eg3d_rlhf.flow.trellis.models import base_state, load_model
from training.storage import write_atomic


def export(root: Path, out: Path, tuned: Mapping[str, Path], also: Sequence[Path] = ()) -> dict:
    """Write pipeline.json and all models that are on this machine to a new folder, with tuned flows in place of those of `root`.

    Tuned weights are merged and rounded to the types of the file that they replace. Models that nothing changed are linked, or copied where
    the file system cannot; those that are elsewhere ("owner/repo/path") and not found stay references.

    Args: tuned: by stage, a folder or file of weights in any layout that policies.tuned_model reads.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}; rounding: share of the update that merging loses.
    Raises: FileNotFoundError or ValueError for stages, files or a folder that do not fit.
    """
    file, out = read_pipeline(root), Path(out)
    unknown = sorted(set(tuned) - set(FLOWS))
    if unknown or not tuned:
        raise ValueError(f"export: expected weights of stages among {', '.join(FLOWS)}, got {', '.join(unknown) or 'none'}. Name a stage.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"export: expected a new folder, got {out} with files in it. Name another.")
    models, done, kept, elsewhere = dict(file.models), {}, [], []
    sources: dict[str, Path] = {}  # by stem
    stages = {FLOWS[stage]: stage for stage in tuned}
    for name in tqdm(file.models, desc="export", unit="model", leave=False, disable=None):
        try:
            stem = find_model(file, name, also)
        except FileNotFoundError:
            if name in stages or (file.root / file.models[name]).parent.is_dir():
                raise
            elsewhere.append(name)
            continue
        if sources.setdefault(stem.name, stem) != stem:
            raise ValueError(f"export: expected models of different names, got {stem} and {sources[stem.name]}. Rename one.")
        target = out / "ckpts" / stem.name
        link(stem.with_name(stem.name + ".json"), target.with_name(stem.name + ".json"))
        if name in stages:
            done[stages[name]] = _merge(stem, tuned[stages[name]], target.with_name(stem.name + ".safetensors"))
        else:
            weights = find_weights(stem)
            link(weights, target.with_name(stem.name + weights.suffix))
            kept.append(name)
        models[name] = f"ckpts/{stem.name}"
    content = {**file.content, "args": {**file.content["args"], "models": models}}
    write_atomic(out / "pipeline.json", (json.dumps(content, indent=4) + "\n").encode())
    return {"tuned": done, "kept": kept, "elsewhere": elsewhere}


def _merge(stem: Path, weights: Path, target: Path) -> dict:
    """Write merged weights in the base's types."""
    types = {name: tensor.dtype for name, tensor in base_state(find_weights(stem)).items()}
    model = tuned_model(load_model(stem, dtype=torch.float32), weights)
    state = {name: tensor.detach().cpu().to(types[name]).contiguous() for name, tensor in merged_state(model).items()}
    write_atomic(target, save({name: tensor.clone() for name, tensor in state.items()}, metadata={"format": "pt"}))
    return {"file": target.name, "rounding": merge_rounding(tuned_model(load_model(stem), weights))}
