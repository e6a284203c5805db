"""SAM 3D Objects as a generator in two stages: shape and pose of an object together, then latents on the shape's voxels.

The pose is drawn, tuned and kept with the shape's latent; assets are Gaussians in the object's own frame.

Shape letters: N samples, R grid points per axis, v voxels of a sample, L tokens of a condition, W their size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.models.sparse import Batch, Latent, NamedBatch, SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.structure_vae import voxels_of
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import OpenedFolder, normalised, unnormalised
from eg3d_rlhf.tuning.flow.families.sam3d import files
from eg3d_rlhf.tuning.flow.families.trellis.assets import SplatAsset
from eg3d_rlhf.tuning.flow.families.trellis.files import return_freed_memory
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import LARGE, check_finite
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
        super().__init__(conditions, parts, device)
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
        if self.tokens is not None:
            form = self.tokens.form
            size = form[name][-1] if isinstance(form, Mapping) and name in form and len(form[name]) == 2 else None
            if size != config.cond_channels:
                source = f" of {self.tokens.encoder}" if self.tokens.encoder else ""
                raise ValueError(
                    f"conditions: expected tokens [L, {config.cond_channels}] named {name!r}, got {form}{source}. Embed the pictures by "
                    "`eg3d-rlhf flow files conditions` with these checkpoints."
                )
        common: dict[str, Any] = dict(
            name=name, model=model, data_at_one=True, path=FlowPath(sigma_min=self.file.generators[name].sigma_min),
            sampling=self.file.sampling[name],
        )
        if name == files.LATENT:
            kind = SparseVoxels(channels=config.in_channels, resolution=config.resolution)
            return FlowStage(latents=kind, call=call_voxels, call_step=call_voxels if config.is_shortcut_model else None, **common)
        shapes = {part: [one.tokens, one.in_channels] for part, one in config.latents.items()}
        targets = [f"self_attn.{layer}.{group}" for group in config.groups for layer in OWN]
        targets += [f"cross_attn.{group}.{layer}" for group in config.groups for layer in CROSS]
        return FlowStage(
            latents=Dictionary(shapes=shapes), call=call_mixture, call_step=call_mixture if config.is_shortcut_model else None,
            lora_targets=tuple(targets), **common,
        )

    def conditions(self, names: Sequence[str], stage: str) -> torch.Tensor:
        """[N, L, W]."""
        return self.embedded(names, stage)

    def no_condition(self, n: int, stage: str) -> torch.Tensor:
        """[n, L, W] of zeros."""
        return self.embedded(n, stage)

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Shapes and poses -> the voxels of each shape, [v, 3] int32; of a shape without any, its likeliest."""
        if stage != files.STRUCTURE:
            raise ValueError(f"advance: expected stage {files.STRUCTURE!r}, got {stage!r}. Nothing comes after the last stage.")
        check_finite("advance", x_0)
        assert isinstance(x_0, NamedBatch)
        resolution, decoder, found = self._config(stage).latents[SHAPE].resolution, self.part("structure decoder"), list[Voxels]()
        for tokens in x_0[SHAPE]:  # one by one: 64^3 x 128 floats each
            grid = tokens.T.unflatten(1, [resolution] * 3)[None]  # [1, C, R, R, R]
            logits = decoder(grid.to(self.device, torch.float32))
            found.append(pruned(voxels_of(logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0)))[0], self.file.prune))
        return found

    @torch.no_grad()
    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        """Latents of the last stage -> assets."""
        check_finite("decode", x_0)
        decoder, found = self.part("decoder"), []
        for sample in x_0.samples():
            latent = SparseSample(sample.coords, self.unnormalised(sample.feats.float()))
            (g,) = decoder(SparseBatch.join([latent]).to(self.device))
            found.append(SplatAsset(
                means=g.means, features_dc=g.features_dc[:, 0], scales=g.scales, rotations=g.rotations, opacities=g.opacities[:, 0]
            ))
        return found

    def encode(self, assets: Sequence[SplatAsset]) -> Sequence[Mapping[str, Latent]]:
        """Not there: weights to draw with are read, no encoders."""
        raise ValueError("SAM 3D: expected no assets to encode, got some. Its stages are tuned one by one, without the loop.")

    def normalised(self, feats: torch.Tensor) -> torch.Tensor:
        """Latents [v, C] as the decoder reads them -> as the flow sees them."""
        return normalised(feats, self.file.mean, self.file.std)

    def unnormalised(self, feats: torch.Tensor) -> torch.Tensor:
        """Inverse of `normalised`."""
        return unnormalised(feats, self.file.mean, self.file.std)


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
    if torch.device(device).type == "cpu" and max(sum(p.numel() for p in flow.parameters()) for flow in flows.values()) > LARGE:
        return_freed_memory()
    return Sam3dPipeline(file, flows, conditions, lambda part: files.load_decoder(file, part, device), device)
