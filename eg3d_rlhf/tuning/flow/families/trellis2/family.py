"""TRELLIS.2 among the families of flow generators. Stages are tuned one by one: the encoders, which the loop would need, are not read."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.models.trellis2.flows import Flow
from eg3d_rlhf.models.trellis2.voxel_decoder import VoxelAsset
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, register
from eg3d_rlhf.tuning.flow.families.trellis.files import base_state, find_model, find_weights, with_ending
from eg3d_rlhf.tuning.flow.families.trellis2 import files
from eg3d_rlhf.tuning.flow.families.trellis2.conditions import PictureEncoder, embedded
from eg3d_rlhf.tuning.flow.families.trellis2.pipeline import Trellis2Pipeline, load_pipeline
from eg3d_rlhf.tuning.flow.families.trellis2.surface import surface_of
from training.storage import write_atomic


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS.2's."""
    path = root / "pipeline.json"
    try:
        return path.is_file() and json.loads(path.read_text()).get("name") == files.NAME
    except (ValueError, AttributeError):
        return False


def load(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Trellis2Pipeline:
    """To sample and to train: blocks are computed again in the backward pass."""
    pipeline = load_pipeline(root, conditions, dtype=dtype, device=device)
    for stage in pipeline.stages:
        if isinstance(stage.model, Flow):
            stage.model.recompute = True
    return pipeline


def model_files(root: Path) -> dict[str, Path]:
    """All files that a pipeline is read from."""
    return files.model_files(files.read_pipeline(root))


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """By the DINOv3 that pipeline.json names; see conditions.py."""
    return embedded(pictures, PictureEncoder(files.read_pipeline(root).encoder, device))


def show(asset: VoxelAsset, path: Path) -> Path:
    """The surface with its base colours, .ply."""
    vertices, faces = surface_of(asset)
    colours = None if asset.materials is None else (255 * asset.materials[:, :3]).round().byte().cpu().numpy()
    return save_mesh(path.with_name(path.name + ".ply"), vertices.cpu().numpy(), faces.cpu().numpy(), colours)


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """pipeline.json and all models in a new folder, with tuned flows merged, in the types of the files that they replace.

    Models that nothing changed are linked, or copied where the file system cannot; those that are elsewhere ("owner/repo/path") and not
    read here stay references.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}; rounding: share of the update that merging loses.
    """
    file = files.read_pipeline(root)
    check_stages("export", FAMILY, list(tuned))
    models, done, kept, elsewhere = dict(file.models), {}, [], []
    stages = {model: stage for stage, model in file.flows.items() if stage in tuned}
    absent = sorted(set(tuned) - set(stages.values()))
    if absent:
        raise ValueError(f"export: expected stages of {file.kind!r}, {', '.join(file.flows)}, got {', '.join(absent)}. Leave it out.")
    needed = {*file.flows.values(), *files.DECODERS}
    for name in file.models:
        try:
            stem = find_model(file, name)
        except FileNotFoundError:
            if name in needed:
                raise
            elsewhere.append(name)
            continue
        target = out / "ckpts" / stem.name
        weights = find_weights(stem)
        assert weights is not None  # find_model looked
        link(with_ending(stem, ".json"), with_ending(target, ".json"))
        if name in stages:
            write_atomic(with_ending(target, ".safetensors"), save(_merged(stem, tuned[stages[name]]), metadata={"format": "pt"}))
            rounding = merge_rounding(tuned_model(files.load_model(stem), tuned[stages[name]]))
            done[stages[name]] = {"file": f"{stem.name}.safetensors", "rounding": rounding}
        else:
            link(weights, with_ending(target, weights.suffix))
            kept.append(name)
        models[name] = f"ckpts/{stem.name}"
    content = {**file.content, "args": {**file.content["args"], "models": models}}
    write_atomic(out / "pipeline.json", (json.dumps(content, indent=4) + "\n").encode())
    return {"tuned": done, "kept": kept, "elsewhere": elsewhere}


def _merged(stem: Path, weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of a flow's file, those of the network merged."""
    stored = base_state(find_weights(stem) or stem)
    state = merged_state(tuned_model(files.load_model(stem, dtype=torch.float32), weights))
    return stored | {name: tensor.detach().cpu().to(stored[name].dtype).contiguous().clone() for name, tensor in state.items()}


FAMILY = register(FlowFamily(
    name="trellis2", layout=f"pipeline.json of {files.NAME}", recognises=recognises, stages=files.STAGES, load=load, files=model_files,
    embed=embed, show=show, export=export,
))
