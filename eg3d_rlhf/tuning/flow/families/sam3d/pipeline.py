"""SAM 3D Objects as a generator in two stages: shape and pose of an object together, then latents on the shape's voxels.

The pose is drawn, tuned and kept with the shape's latent; assets are Gaussians in the object's own frame. Stages are tuned one by one: the
loop would need encoders that are not read.

Shape letters: N samples, R grid points per axis, v voxels of a sample, L tokens of a condition, W their size; of pictures H, W pixels,
h, w points, s the side of a square.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.policies import link
from eg3d_rlhf.models.sam3d import Embedder, MixtureFlow, VoxelFlow
from eg3d_rlhf.models.sparse import Batch, NamedBatch, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.autoencoders import voxels_of
from eg3d_rlhf.models.weights import content, in_types_of, rewrite
from eg3d_rlhf.tuning.flow.conditions import Conditions, read_array
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, register
from eg3d_rlhf.tuning.flow.families.folder import OpenedFolder, check_finite, merged, spare_memory
from eg3d_rlhf.tuning.flow.families.sam3d import files
from eg3d_rlhf.tuning.flow.families.trellis.assets import SplatAsset, write_ply
from eg3d_rlhf.tuning.flow.stage import Dictionary, FlowPath, FlowStage, SparseVoxels, Voxels

SHAPE = "shape"  # the tensor of the first stage's dictionary that structures are decoded from
OWN, CROSS = ("to_qkv", "to_out"), ("to_q", "to_kv", "to_out")  # linear layers of self-attention, and of attention to the condition


def call_mixture(module: nn.Module, x_t: NamedBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor) -> NamedBatch:
    """The first network's call; its t is 1 at the data."""
    return x_t.like(module(x_t.tensors, t, cond, *step))


def call_voxels(module: nn.Module, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor) -> SparseBatch:
    """The second network's call; its t is 1 at the data."""
    return module(x_t, t, cond, *step)


class Sam3dPipeline(OpenedFolder):
    """Implements `Pipeline`; assets are `SplatAsset`. Decoders are loaded when they are first needed; there are no encoders."""

    def __init__(
        self, file: files.PipelineFile, flows: Mapping[str, nn.Module], conditions: Conditions | None, parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
    ):
        """Args: flows by stage name; conditions: None where nothing is sampled; parts: decoders by their names in files.PARTS."""
        super().__init__(conditions, parts, device, {files.LATENT: (file.mean, file.std)})
        self.file = file
        self.stages = [self._stage(name, flows[name]) for name in files.STAGES]
        channels = self._config(files.LATENT).in_channels
        if len(file.mean) != channels:
            raise ValueError(f"{files.PIPELINE}: expected slat_mean of {channels} channels, got {len(file.mean)}. Correct it.")
        if self._config(files.STRUCTURE).latents.get(SHAPE) is None or self._config(files.STRUCTURE).latents[SHAPE].resolution is None:
            raise ValueError(f"stage {files.STRUCTURE!r}: expected a latent {SHAPE!r} on a grid, got none. Name SAM 3D's files.")

    def _config(self, stage: str) -> Any:
        return self.file.generators[stage].config

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self._config(name)
        self.check_tokens(name, config.cond_channels, "Embed the pictures by `eg3d-rlhf flow files conditions` with these checkpoints.")
        common: dict[str, Any] = dict(
            name=name, model=model, data_at_one=True, path=FlowPath(sigma_min=self.file.generators[name].sigma_min),
            sampling=self.file.sampling[name],
        )
        if name == files.LATENT:
            kind = SparseVoxels(channels=config.in_channels, resolution=config.resolution)
            return FlowStage(latents=kind, call=call_voxels, call_step=call_voxels if config.is_shortcut_model else None, **common)
        shapes = {part: [latent.tokens, latent.in_channels] for part, latent in config.latents.items()}
        targets = [f"self_attn.{layer}.{group}" for group in config.groups for layer in OWN]
        targets += [f"cross_attn.{group}.{layer}" for group in config.groups for layer in CROSS]
        return FlowStage(
            latents=Dictionary(shapes=shapes), call=call_mixture, call_step=call_mixture if config.is_shortcut_model else None,
            lora_targets=tuple(targets), **common,
        )

    def told(self, stage: str) -> str:
        """Tokens of its own."""
        return stage

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Shapes and poses -> the voxels of each shape, [v, 3] int32; of a shape without any, its likeliest."""
        if stage != files.STRUCTURE:
            raise ValueError(f"advance: expected stage {files.STRUCTURE!r}, got {stage!r}. Nothing comes after the last stage.")
        check_finite("advance", x_0)
        assert isinstance(x_0, NamedBatch)
        resolution, decoder, voxels = self._config(stage).latents[SHAPE].resolution, self.part("structure decoder"), list[Voxels]()
        for tokens in x_0[SHAPE]:  # one by one: 64^3 x 128 floats each
            grid = tokens.T.unflatten(1, [resolution] * 3)[None]  # [1, C, R, R, R]
            logits = decoder(grid.to(self.device, torch.float32))
            voxels.append(pruned(voxels_of(logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0)))[0], self.file.prune))
        return voxels

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        """Latents of the last stage -> assets."""
        check_finite("decode", x_0)
        decoder, assets = self.part("decoder"), []
        for sample in x_0.samples():
            latent = SparseSample(sample.coords, self.unnormalised(sample.feats.float()))
            (gaussians,) = decoder(SparseBatch.join([latent]).to(self.device))
            assets.append(SplatAsset.of(gaussians))
        return assets


def pruned(voxels: torch.Tensor, distance: int) -> torch.Tensor:
    """Voxels [v, 3] without the inner ones, which have `distance` voxels on all six sides; 0 leaves all."""
    if not distance:
        return voxels
    side = int(voxels.max()) + 1 + 2 * distance
    grid = torch.zeros(side, side, side, dtype=torch.bool, device=voxels.device)
    x, y, z = (voxels.long() + distance).unbind(1)
    grid[x, y, z] = True
    inner = torch.ones(len(voxels), dtype=torch.bool, device=voxels.device)
    for step in (k * sign for k in range(1, distance + 1) for sign in (-1, 1)):
        inner &= grid[x + step, y, z] & grid[x, y + step, z] & grid[x, y, z + step]
    return voxels[~inner]


def load_pipeline(
    root: Path, conditions: Conditions | None, *, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Sam3dPipeline:
    """A pipeline from SAM 3D's files.

    Args: dtype: of the flows' weights; None keeps the file's. Decoders are float32.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit; nothing is downloaded.
    """
    file = files.read_pipeline(root)
    flows = {stage: files.load_flow(generator, dtype, device) for stage, generator in file.generators.items()}
    spare_memory(flows.values(), device)
    return Sam3dPipeline(file, flows, conditions, lambda part: files.load_decoder(file, part, device), device)


# What the embedder is told. An object is a picture <name>.png or .webp whose opacity is its mask, with all around it still in the colours,
# and a point map <name>.npy [h, w, 3] of the same picture: places as seen from the camera, z forward, not finite where there is none.


MARGIN = 0.1  # around the mask's box, in sides of it


def inputs_of(path: Path, embedder: Embedder) -> dict[str, torch.Tensor]:
    """What the embedder is told of an object, [1, ., s, s] by name: cut out about the mask, and whole in the middle of a square.

    Raises: FileNotFoundError for a point map that is not there; ValueError for a picture that shows nothing, or a map of another shape.
    """
    image = Image.open(path)
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
        raise ValueError(f"{path}: expected the object's mask as opacity (RGBA), got {image.mode} without. Save the mask with the picture.")
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)  # [4, H, W]
    mask = (pixels[3:] > 0.5).float()
    if not mask.any():
        raise ValueError(f"{path}: expected a mask of a pixel or more, got none. Choose another picture.")
    inputs = {"rgb_image": squared(pixels[:3], 0.0), "rgb_image_mask": squared(mask, 0.0)}
    inputs |= {"image": cut(pixels[:3], mask, 0.0), "mask": cut(mask, mask, 0.0)}
    if "pointmap" in embedder.names or "rgb_pointmap" in embedder.names:
        points = _points(path.with_suffix(".npy"), mask)
        inputs |= {"rgb_pointmap": squared(points, float("nan")), "pointmap": cut(points, mask, float("nan"))}
    return {name: tensor[None] for name, tensor in inputs.items() if name in embedder.names}


def _points(path: Path, mask: torch.Tensor) -> torch.Tensor:
    """A point map, [3, H, W] by the nearest point, in units of the object's median depth."""
    if not path.is_file():
        raise FileNotFoundError(f"conditions: expected a point map at {path}, got none. Make it by a depth network, and save it there.")
    points = read_array(path).float()
    check_shape(str(path), points, ["h", "w", 3], "Save one place per pixel.")
    points = points.permute(2, 0, 1)
    if points.shape[1:] != mask.shape[1:]:
        points = torch.nn.functional.interpolate(points[None], mask.shape[1:], mode="nearest")[0]
    depths = points[2][(mask[0] > 0) & points.isfinite().all(0)]
    if not len(depths) or float(depths.median()) <= 0:
        raise ValueError(f"{path}: expected places in front of the camera (z > 0) on the object, got none. Turn the axes.")
    return points / depths.median()


def squared(x: torch.Tensor, around: float) -> torch.Tensor:
    """[C, H, W] in the middle of a square [C, s, s]."""
    height, width = x.shape[1:]
    s = max(height, width)
    top, left = (s - height) // 2, (s - width) // 2
    return torch.nn.functional.pad(x, (left, s - width - left, top, s - height - top), value=around)


def cut(x: torch.Tensor, mask: torch.Tensor, around: float) -> torch.Tensor:
    """The square [C, s, s] of [C, H, W] about the box of mask [1, H, W], with a margin; what is outside has the value `around`."""
    rows, columns = (mask[0].any(axis).nonzero() for axis in (1, 0))
    (top, bottom), (left, right) = ((int(places[0]), int(places[-1]) + 1) for places in (rows, columns))
    s = max(1, round((1 + 2 * MARGIN) * max(bottom - top, right - left)))
    y, x0 = (top + bottom - s) // 2, (left + right - s) // 2
    pad = (max(0, -x0), max(0, x0 + s - x.shape[2]), max(0, -y), max(0, y + s - x.shape[1]))
    wide = torch.nn.functional.pad(x, pad, value=around)
    return wide[:, y + pad[2] : y + pad[2] + s, x0 + pad[0] : x0 + pad[0] + s]


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
    """By the embedders of both checkpoints: pictures whose opacity is the mask, with point maps beside them; see inputs_of."""
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
        state, rounding = merged(partial(files.load_flow, generator), weights)
        target = out / generator.checkpoint.relative_to(root)
        write_checkpoint(generator.checkpoint, target, state)
        done[stage] = {"file": target.name, "rounding": rounding}
    return {"tuned": done, "kept": [str(path) for path in kept]}


def write_checkpoint(source: Path, target: Path, state: Mapping[str, torch.Tensor]) -> None:
    """A generator's checkpoint again, all that it held, with its network replaced, every tensor in its old type."""
    held = content(source, "export")
    tensors = held.get("state_dict", held)
    tensors |= in_types_of(tensors, {files.FLOW + name: tensor for name, tensor in state.items()})
    rewrite(target, held)


FAMILY = register(FlowFamily(
    name="sam3d", layout=f"{files.PIPELINE} of {files.PACKAGE}", recognises=files.recognises, stages=files.STAGES, load=load,
    files=lambda root: files.read_pipeline(root).files, embed=embed, show=show, export=export,
))
