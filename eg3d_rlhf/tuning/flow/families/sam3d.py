"""SAM 3D Objects as a generator in two stages: shape and pose of an object together, then latents on the
shape's voxels.

The pose is drawn, tuned and kept with the shape's latent, or left alone while the shape is tuned; assets are
Gaussians in the object's own frame, and the list of drawn ones says where they are. Stages are tuned one by
one: of the two encoders that the loop would need only the shape's is read, by which meshes of one's own
become pairs of shapes.

Shape letters: N samples, R grid points per axis, S tokens of a shape, A its channels, v voxels of a sample;
of pictures h, w points, s the side of a square.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.image_preprocessing import ObjectCut, object_inputs, read_cut_out
from eg3d_rlhf.models.sam3d import SHAPE, LatentConfig, MixtureConfig, MixtureFlow, VoxelFlow, VoxelFlowConfig
from eg3d_rlhf.models.sparse import Batch, Latent, NamedBatch, NamedSample, SparseBatch
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.models.weights import empty, fingerprint, read
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions, read_array
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, SizedStage
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import Dictionary, FlowStage, Sampling, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.families import register
from eg3d_rlhf.tuning.flow.families import sam3d_files as files
from eg3d_rlhf.tuning.flow.families import sam3d_pose as pose
from eg3d_rlhf.tuning.flow.families.folder import (
    OpenedFolder,
    check_finite,
    embedding,
    even_points,
    never_empty,
    read_mesh,
    spare_memory,
)
from eg3d_rlhf.tuning.flow.families.opening import open_folder
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset, decoded, show

# what of the first stage is learnt, or SHAPE alone; see ProblemSource.parts
ALL = "all"
FILE = "file"
POINTS = 512  # on a mesh, per square of the grid: some 100 in a voxel of its surface
TOKENS = {files.STRUCTURE: 7528, files.LATENT: 5496}  # of the released embedder, by stage
MOST = 42000  # voxels that the second stage is given
# kept beside the tokens of a condition
SCALE = "pointmap_scale"
SHIFT = "pointmap_shift"
# linear layers of self-attention, and of attention to the condition
OWN = ("to_qkv", "to_out")
CROSS = ("to_q", "to_kv", "to_out")


def call_mixture(
    module: nn.Module, x_t: NamedBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> NamedBatch:
    """The first network's call; its t is 1 at the data."""
    return x_t.like(module(x_t.tensors, t, cond, *step))


def call_voxels(
    module: nn.Module, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> SparseBatch:
    """The second network's call; its t is 1 at the data."""
    return module(x_t, t, cond, *step)


def targets_of(config: Any, groups: Sequence[str] | None = None) -> tuple[str, ...]:
    """Layers of a mixture that adapters sit on. Args: groups: of latents that are learnt; None: all."""
    own = [f"self_attn.{layer}.{group}" for group in groups or config.groups for layer in OWN]
    return (*own, *(f"cross_attn.{group}.{layer}" for group in groups or config.groups for layer in CROSS))


class ShapeAndPose(Dictionary):
    """The first stage's dictionary."""

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        posed = not isinstance(latent, NamedSample) or set(latent.tensors) != {SHAPE}
        super().check(
            who, latent, remedy if posed else "Meshes have no pose: tune the shape alone, --set parts=shape."
        )


class ShapeAlone(Dictionary):
    """Of the first stage's dictionary the shape, which the pose has no part in; latents may have the pose
    besides.
    """

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        super().check(who, shape_alone(latent), remedy)


def shape_alone(latent: Latent) -> Latent:
    """Without the pose."""
    return (
        NamedSample({SHAPE: latent[SHAPE]})
        if isinstance(latent, NamedSample) and SHAPE in latent.tensors
        else latent
    )


class Sam3dPipeline(OpenedFolder):
    """Implements `Pipeline`; assets are `SplatAsset`. Autoencoders are loaded when they are first needed."""

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
        learnt: str = ALL,
    ):
        """Args: flows by stage name; conditions: None where nothing is sampled; parts: by their names in
        files.AUTOENCODERS; learnt: see ProblemSource.parts.
        """
        super().__init__(conditions, parts, device, {files.LATENT: (file.mean, file.std)})
        self.file = file
        self.learnt = learnt
        self.stages = [self._stage(name, flows[name]) for name in files.STAGES]
        channels = self._config(files.LATENT).in_channels
        if len(file.mean) != channels:
            raise ValueError(
                f"{files.PIPELINE}: expected slat_mean of {channels} channels, got {len(file.mean)}."
                " Correct it."
            )
        if self._config(files.STRUCTURE).latents[SHAPE].resolution is None:
            raise ValueError(
                f"stage {files.STRUCTURE!r}: expected a latent {SHAPE!r} on a grid, got none. Name SAM 3D's"
                " files."
            )

    def _config(self, stage: str) -> Any:
        return self.file.generators[stage].config

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        config = self._config(name)
        generator = self.file.generators[name]
        self.check_tokens(name, config.cond_channels, f"Embed them with {REMEDY}.")
        call = call_voxels if name == files.LATENT else call_mixture
        common: dict[str, Any] = dict(
            name=name,
            model=model,
            data_at_one=True,
            path=generator.path,
            sampling=self.file.sampling[name],
            call=call,
            call_step=call if config.is_shortcut_model else None,
        )
        if name == files.LATENT:
            return FlowStage(
                latents=SparseVoxels(channels=config.in_channels, resolution=config.resolution), **common
            )
        sizes = {part: [latent.tokens, latent.in_channels] for part, latent in config.latents.items()}
        groups: list[str] = list(config.groups)
        latents: Dictionary = ShapeAndPose(shapes=sizes)
        if self.learnt == SHAPE:
            groups = [SHAPE]
            latents = ShapeAlone(shapes={SHAPE: sizes[SHAPE]})
        elif self.learnt == FILE:
            if not generator.weights or not any(generator.weights.values()):
                raise ValueError(
                    f"--set parts={FILE}: expected loss_weights in the file of stage {name!r}, got none. Set"
                    " another."
                )
            common["path"] = replace(generator.path, weights=generator.weights)
        return FlowStage(latents=latents, lora_targets=targets_of(config, groups), **common)

    def conditioning_key(self, stage: str) -> str:
        """Return the stage's name: each reads tokens of its own."""
        return stage

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Shapes and poses -> the voxels of each shape, [v, 3] int32;
        of a shape without any, its likeliest.
        """
        if stage != files.STRUCTURE:
            raise ValueError(
                f"advance: expected stage {files.STRUCTURE!r}, got {stage!r}. Nothing comes after the last"
                " stage."
            )
        check_finite("advance", x_0)
        assert isinstance(x_0, NamedBatch)
        return [self.structure(tokens)[0] for tokens in x_0[SHAPE]]  # one by one: 64^3 x 128 floats each

    @torch.no_grad()
    def structure(self, shape: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Voxels [v, 3] int32 of a shape [S, A], and by how much it was made small, since there were too
        many.
        """
        resolution = self._config(files.STRUCTURE).latents[SHAPE].resolution
        decoder = self.part("structure decoder")
        grid = shape.T.unflatten(1, [resolution] * 3)[None]  # [1, A, R, R, R]
        logits = decoder(grid.to(self.device, torch.float32))
        (voxels,) = voxels_of(never_empty(logits, f"stage {files.STRUCTURE!r}"))
        return thinned(pruned(voxels, self.file.prune), MOST)

    def pose(self, condition: str, latents: NamedSample) -> pose.Pose | None:
        """Where an object of the first stage is; None where the condition's file does not say its point map's
        scale and shift.
        """
        tensors = None if self.tokens is None else self.tokens.tokens[condition]
        if not isinstance(tensors, Mapping) or SCALE not in tensors:
            return None
        factor = self.structure(latents[SHAPE])[1]
        parts = {name: tensor[None].cpu() for name, tensor in latents.tensors.items()}
        return pose.decoded(parts, self.file.pose, tensors[SCALE][None], tensors[SHIFT][None], factor)

    @torch.no_grad()
    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Latent]]:
        """Shapes of meshes, z up, that fill the cube; without a pose, which no mesh says."""
        encoder = self.part("structure encoder")
        resolution = self._config(files.LATENT).resolution
        made = list[dict[str, Latent]]()
        tokens = self._config(files.STRUCTURE).latents[SHAPE]
        for mesh in assets:
            grid = grid_of([surface_voxels(mesh, resolution)], resolution)
            mean, _ = encoder(grid.to(self.device))  # [1, A, R, R, R]
            check_shape(
                files.ENCODER,
                mean,
                [1, tokens.in_channels, *[tokens.resolution] * 3],
                "Name the released encoder.",
            )
            made.append({files.STRUCTURE: NamedSample({SHAPE: mean[0].flatten(1).T.contiguous().cpu()})})
        return made

    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        return decoded(self, "decoder", x_0)


def surface_voxels(mesh: Mesh, resolution: int) -> torch.Tensor:
    """Voxels [v, 3] int32 that a mesh's surface goes through, in a cube that it fills.

    Deviates: found by points, always alike, so that a voxel which is barely touched may be missing.
    """
    places, _ = even_points(mesh, 1 - 1e-6, POINTS * resolution**2, torch.Generator().manual_seed(0))
    return torch.unique(((places + 0.5) * resolution).int(), dim=0)


def pruned(voxels: torch.Tensor, distance: int) -> torch.Tensor:
    """Voxels [v, 3] without the inner ones, all of whose neighbours up to `distance` away, corners too, are
    there; 0 leaves all.
    """
    if not distance:
        return voxels
    x, y, z = (voxels.long() + distance).unbind(1)
    free = torch.ones(1, *[int(voxels.max()) + 1 + 2 * distance] * 3, device=voxels.device)
    free[0, x, y, z] = 0
    near = F.max_pool3d(free, 2 * distance + 1, stride=1)[0]  # whether any around is free
    x, y, z = voxels.long().unbind(1)
    return voxels[near[x, y, z] > 0]


def thinned(voxels: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """At most so many voxels [v, 3], and by how much the shape was made small: 2 where it was, about the
    middle of its cube.
    """
    if len(voxels) <= most:
        return voxels, 1
    low = int(voxels.min())
    high = int(voxels.max())
    size = high - low
    small = (voxels - low) / size * (size / 2 - 1) + low + size / 4
    kept = torch.unique(small.round().int().clamp(low, high), dim=0)
    if len(kept) > most:
        kept = kept[
            torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:most]
            .sort()
            .values.to(kept.device)
        ]
    return kept, 2


REMEDY = "`eg3d-rlhf flow new` and these checkpoints"
NOTICE = (
    "SAM 3D Objects is under Meta's SAM License: what is derived is passed on under the same agreement alone,"
    " with a copy, and for no military, nuclear, espionage or weapon ends (1.b): read the LICENSE beside its"
    " weights."
)


def _source(file: files.PipelineFile, prints: Sequence[str]) -> str:
    """Describe what computes conditions, for their file."""
    return f"SAM 3D's embedders {' '.join(prints)}, {file.preparation}"


def _without_pose(pairs: Mapping[str, Sequence[PreferencePair]]) -> PairsByStage:
    return PairsByStage(
        pairs,
        lambda stage: [
            replace(pair, preferred=shape_alone(pair.preferred), rejected=shape_alone(pair.rejected))
            for pair in pairs[stage]
        ],
    )


# What the embedder reads. An object is a picture <name>.png or .webp whose opacity is its mask, with all
# around it still in the colours, and a point map <name>.npy [h, w, 3] of the same picture: places, x left, y
# up, z forward, not a number where there is none.


def inputs_of(path: Path, cut: ObjectCut, maps: bool) -> dict[str, torch.Tensor]:
    """Read what the embedder of a stage reads of an object, [., s, s] by name; see `object_inputs`.

    Args: maps: with point maps.

    Raises: FileNotFoundError for a point map that is not there; ValueError for a picture that shows nothing,
        or a map of another shape.
    """
    points = _points(path.with_suffix(".npy")) if maps else None

    def inputs(image: Image.Image) -> dict[str, torch.Tensor]:
        return object_inputs(np.asarray(image), points, cut)

    given = read_cut_out(path, inputs)
    if points is not None and float(points[..., 2].nanmedian()) <= 0:
        raise ValueError(
            f"{path.with_suffix('.npy')}: expected places in front of the camera (z > 0), got others. Turn"
            " the axes."
        )
    return given


def _points(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise FileNotFoundError(
            f"conditions: expected a point map at {path}, got none. Make it by a depth network, and save it"
            " there."
        )
    points = read_array(path).float()
    check_shape(str(path), points, ["h", "w", 3], "Save one place per pixel.")
    return points


@dataclass(frozen=True)
class Sam3d(FlowFamily):
    """The family; its option says what of the first stage is learnt."""

    parts: str = ALL  # see ProblemSource.parts

    name = "sam3d"
    layout = f"{files.PIPELINE} of {files.PACKAGE}"
    stages = files.STAGES
    version = "SAM 3D Objects, shape with pose and Gaussians"
    address = "https://huggingface.co/facebook/sam-3d-objects"
    notice = NOTICE
    up = "z"
    options = ("parts",)
    recognises = staticmethod(files.recognises)
    read_asset = staticmethod(read_mesh)
    networks = staticmethod(files.networks)
    release = staticmethod(files.release)
    show = staticmethod(show)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> Mapping[str, Path]:
        return files.read_pipeline(root).files

    def load(
        self,
        root: Path,
        conditions: Conditions | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Sam3dPipeline:
        """See `FlowFamily.load`; blocks are computed again in the backward pass. Decoders are float32.

        Without conditions the first stage's latents are those of meshes, which have no pose.
        """
        file = files.read_pipeline(root)
        flows = dict[str, nn.Module]()
        prints = []
        for stage, generator in file.generators.items():
            if stages is not None and stage not in stages:
                flows[stage] = empty(partial(files.network_of(generator.config), generator.config))
                continue
            state = read(generator.checkpoint, "weights")  # the larger part of the memory: one at a time
            flow: Any = files.load_flow(generator, dtype, device, state=state)
            flows[stage] = flow
            flow.recompute = True
            prints.append(fingerprint(files.embedder_state(generator, state)))
        if conditions is not None and len(prints) == len(files.STAGES):
            conditions.check_source("conditions", _source(file, prints), REMEDY)
        spare_memory(flows.values(), device)
        parts = SHAPE if conditions is None else self.parts

        def part(name: str) -> nn.Module:
            return files.load_part(file, name, device)

        return Sam3dPipeline(file, flows, conditions, part, device, parts)

    def condition(self, pipeline: Sam3dPipeline, stage: str) -> list[int]:
        return [TOKENS[stage], pipeline.file.generators[stage].config.cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder as any other's; with the shape alone the pose is taken out of the pairs."""
        problem = open_folder(replace(self, parts=source.parts), source, device)
        if source.parts == ALL:
            return problem
        identity = {**problem.identity, "parts": source.parts}
        if source.parts != SHAPE:
            return replace(problem, identity=identity)
        assert problem.unseen_pairs is not None
        return replace(
            problem,
            train_pairs=_without_pose(problem.train_pairs),
            unseen_pairs=_without_pose(problem.unseen_pairs),
            identity=identity,
        )

    @torch.no_grad()
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions:
        """Embed images whose opacity is the mask, with point maps beside them, by the embedders of both
        checkpoints; see inputs_of.
        """
        file = files.read_pipeline(root)
        tokens = {name: dict[str, torch.Tensor]() for name in images}
        prints = []
        for stage in files.STAGES:  # one at a time: each has a DINOv2 or two
            embedder = files.load_embedder(file.generators[stage], device)
            maps = any("pointmap" in name for name in embedder.names)
            prints.append(fingerprint(files.embedder_state(file.generators[stage])))
            for name, path in embedding(images.items(), "picture"):
                given = inputs_of(path, file.cuts[stage], maps)
                tokens[name] |= {key: given[key] for key in (SCALE, SHIFT) if key in given}
                tokens[name][stage] = (
                    embedder({key: given[key][None].to(device) for key in embedder.names})[0].float().cpu()
                )
        return Conditions(tokens=tokens, encoder=_source(file, prints), zero_null=True)

    def facts(self, pipeline: Sam3dPipeline, condition: str, latents: Mapping[str, Latent]) -> dict:
        """Return the pose of a sampled object, for the list: quaternion (real part first), place and size in
        the camera's space.
        """
        structure = latents[files.STRUCTURE]
        where = pipeline.pose(condition, structure) if isinstance(structure, NamedSample) else None
        if where is None:
            return {}
        values = {"rotation": where.quaternion, "translation": where.translation, "scale": where.scale}
        return {"pose": {name: [round(x, 6) for x in value[0].tolist()] for name, value in values.items()}}

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        return {"SAM 3D Objects": released_stages}


def released_stages() -> list[SizedStage]:
    """Make the stages of SAM 3D Objects without weights."""
    common: dict[str, Any] = dict(
        model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, qk_rms_norm=True
    )
    pose = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
    latents = {SHAPE: LatentConfig(in_channels=8, tokens=4096, resolution=16)}
    latents |= {name: LatentConfig(in_channels=channels, tokens=1) for name, channels in pose.items()}
    first = MixtureConfig(
        latents=latents,
        latent_share_transformer={"6drotation_normalized": tuple(pose)},
        is_shortcut_model=True,
        **common,
    )
    second = VoxelFlowConfig(
        resolution=64,
        in_channels=8,
        out_channels=8,
        patch_size=2,
        io_block_channels=(128,),
        num_io_res_blocks=2,
        **common,
    )
    sizes = {name: [latent.tokens, latent.in_channels] for name, latent in latents.items()}
    return [
        SizedStage(
            conditioning=[TOKENS["structure"], 1024],
            stage=FlowStage(
                name="structure",
                model=empty(partial(MixtureFlow, first)),
                latents=Dictionary(shapes=sizes),
                data_at_one=True,
                call=call_mixture,
                sampling=Sampling(cfg_strength=7.0),
                lora_targets=targets_of(first),
            ),
        ),
        SizedStage(
            conditioning=[TOKENS["latent"], 1024],
            stage=FlowStage(
                name="latent",
                model=empty(partial(VoxelFlow, second)),
                latents=SparseVoxels(channels=8, resolution=64),
                data_at_one=True,
                call=call_voxels,
                sampling=Sampling(rescale_t=1.0, cfg_strength=1.0),
            ),
        ),
    ]


FAMILY = register(Sam3d())
