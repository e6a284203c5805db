"""SAM 3D Objects among the families of flow generators. Stages are tuned one by one: the loop would need encoders that are not read."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.models.sam3d.mixture import MixtureFlow
from eg3d_rlhf.models.sam3d.voxel_flow import VoxelFlow
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, register
from eg3d_rlhf.tuning.flow.families.sam3d import files
from eg3d_rlhf.tuning.flow.families.sam3d.conditions import inputs_of
from eg3d_rlhf.tuning.flow.families.sam3d.pipeline import Sam3dPipeline, load_pipeline
from eg3d_rlhf.tuning.flow.families.trellis.assets import SplatAsset, write_ply


def load(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Sam3dPipeline:
    """To sample and to train: blocks are computed again in the backward pass."""
    pipeline = load_pipeline(root, conditions, dtype=dtype, device=device)
    for stage in pipeline.stages:
        if isinstance(stage.model, (MixtureFlow, VoxelFlow)):
            stage.model.recompute = True
    return pipeline


@torch.no_grad()
def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    """By the embedders of both checkpoints: pictures whose opacity is the mask, with point maps beside them; see conditions.py."""
    file, tokens = files.read_pipeline(root), {name: dict[str, torch.Tensor]() for name in pictures}
    for stage in files.STAGES:  # one at a time: each has a DINOv2 or two
        embedder = files.load_embedder(file.generators[stage], device)
        for name, path in pictures.items():
            given = {key: tensor.to(device) for key, tensor in inputs_of(path, embedder).items()}
            tokens[name][stage] = embedder(given)[0].float().cpu()
    return Conditions(tokens=tokens, encoder="the embedders of SAM 3D's checkpoints", zero_null=True)


def show(asset: SplatAsset, path: Path) -> Path:
    """Gaussian splats in the object's own frame, .ply."""
    file = path.with_name(path.name + ".ply")
    write_ply(file, asset)
    return file


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """All files of the folder in a new one, tuned networks merged into their checkpoints, in the types of those.

    What nothing changed is linked, or copied where the file system cannot.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...]}; rounding: share of the update that merging loses.
    """
    check_stages("export", FAMILY, list(tuned))
    file = files.read_pipeline(root)
    changed, done = {file.generators[stage].checkpoint.resolve() for stage in tuned}, {}
    kept = sorted(path.relative_to(root) for path in Path(root).rglob("*") if path.is_file() and path.resolve() not in changed)
    for path in kept:
        link(Path(root) / path, out / path)
    for stage, weights in tuned.items():
        generator = file.generators[stage]
        state = merged_state(tuned_model(files.load_flow(generator, torch.float32), weights))
        target = out / generator.checkpoint.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(generator.checkpoint, target, state)
        done[stage] = {"file": target.name, "rounding": _rounding(generator, weights)}
    return {"tuned": done, "kept": [str(path) for path in kept]}


def _rounding(generator: files.GeneratorFile, weights: Path) -> float:
    base: nn.Module = files.load_flow(generator)
    return merge_rounding(tuned_model(base, weights))


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """A generator's checkpoint again, all that it held, with its network replaced, every tensor in its old type."""
    content = torch.load(source, map_location="cpu", weights_only=True)
    held = content.get("state_dict", content)
    for name, tensor in state.items():
        held[files.FLOW + name] = tensor.detach().cpu().to(held[files.FLOW + name].dtype).contiguous().clone()
    unfinished = target.with_name(f".{target.name}.part")
    try:
        torch.save(content, unfinished)
        unfinished.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


FAMILY = register(FlowFamily(
    name="sam3d", layout=f"{files.PIPELINE} of {files.PACKAGE}", recognises=files.recognises, stages=files.STAGES, load=load,
    files=lambda root: files.read_pipeline(root).files, embed=embed, show=show, export=export,
))
