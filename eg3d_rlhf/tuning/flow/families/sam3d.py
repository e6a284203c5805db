"""SAM 3D Objects, a generator in two stages: an object's shape and pose, then latents on the shape's voxels.

The pose is sampled, tuned and stored together with the shape's latent, or it is left unchanged while only the
shape is tuned. Assets are Gaussians in the object's own frame; the list of sampled assets states the poses.
The stages are tuned one by one: of the two encoders that the loop would need, only that of shapes is
supported. It makes pairs of shapes from the user's own meshes.

Shape letters: N samples, R grid points per axis, S tokens of a shape, A channels of such a token, v voxels of
a sample; for images h, w rows and columns, s pixels per side of a square.
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
    embedding_progress,
    even_points,
    never_empty,
    read_mesh,
    spare_memory,
)
from eg3d_rlhf.tuning.flow.families.opening import open_folder
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset, decoded, show

# Values of ProblemSource.parts: which latents of the first stage are tuned. A third value is SHAPE.
ALL = "all"  # all latents alike
FILE = "file"  # all latents, weighted by loss_weights of the generator's file
POINTS = 512  # points on a mesh per grid square, about 100 per voxel of the surface
TOKENS = {files.STRUCTURE: 7528, files.LATENT: 5496}  # tokens of the released embedders, by stage
MOST = 42000  # largest number of voxels of the second stage
# Names of tensors that are stored beside the conditioning tokens.
SCALE = "pointmap_scale"
SHIFT = "pointmap_shift"
# Linear layers of self-attention and of cross-attention.
SELF = ("to_qkv", "to_out")
CROSS = ("to_q", "to_kv", "to_out")


def call_mixture(
    module: nn.Module, x_t: NamedBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> NamedBatch:
    """Call the first network with the original's arguments; its t is 1 at the data."""
    return x_t.like(module(x_t.tensors, t, cond, *step))


def call_voxels(
    module: nn.Module, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> SparseBatch:
    """Call the second network with the original's arguments; its t is 1 at the data."""
    return module(x_t, t, cond, *step)


def targets_of(config: Any, groups: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the layers of a mixture that get adapters.

    Args: groups: groups of the latents that are tuned; None: all groups.
    """
    # In self-attention the group is the last part of a name, in cross-attention the middle one.
    within = [f"self_attn.{layer}.{group}" for group in groups or config.groups for layer in SELF]
    return (*within, *(f"cross_attn.{group}.{layer}" for group in groups or config.groups for layer in CROSS))


class ShapeAndPose(Dictionary):
    """Latents of the first stage: a dictionary of the shape and the pose."""

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        posed = not isinstance(latent, NamedSample) or set(latent.tensors) != {SHAPE}
        # Latents of meshes have only the shape; the remedy then is another one.
        super().check(
            who, latent, remedy if posed else "Meshes have no pose. Tune only the shape: --set parts=shape."
        )


class ShapeAlone(Dictionary):
    """Latents of the first stage without the pose, on which the shape does not depend.

    Latents that also have a pose are accepted.
    """

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        super().check(who, shape_alone(latent), remedy)


def shape_alone(latent: Latent) -> Latent:
    """Return the latent without the pose."""
    return (
        # Other kinds of latents, such as those of the second stage, pass unchanged.
        NamedSample({SHAPE: latent[SHAPE]})
        if isinstance(latent, NamedSample) and SHAPE in latent.tensors
        else latent
    )


class Sam3dPipeline(OpenedFolder):
    """Pipeline of both stages; implements `Pipeline`. Assets are `SplatAsset`.

    Autoencoders are loaded when they are first needed.
    """

    def __init__(
        self,
        file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditioning: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
        learnt: str = ALL,
    ):
        """Build the stages.

        Args:
            flows: networks by stage name.
            conditioning: None if nothing is sampled.
            parts: reads an autoencoder by its name in files.AUTOENCODERS.
            learnt: which latents are tuned; see ProblemSource.parts.
        """
        super().__init__(conditioning, parts, device, {files.LATENT: (file.mean, file.std)})
        self.file = file
        self.learnt = learnt
        self.stages = [self._stage(name, flows[name]) for name in files.STAGES]
        # Checked here because the scales come from pipeline.yaml and the channels from the generator's file.
        channels = self._config(files.LATENT).in_channels
        if len(file.mean) != channels:
            raise ValueError(
                f"{files.PIPELINE}: expected slat_mean of {channels} channels, got {len(file.mean)}."
                " Correct it."
            )
        if self._config(files.STRUCTURE).latents[SHAPE].resolution is None:
            raise ValueError(
                f"stage {files.STRUCTURE!r}: the latent {SHAPE!r} is not on a grid. Name the files of SAM 3D"
                " Objects."
            )

    def _config(self, stage: str) -> Any:
        """Return the settings of a stage's network."""
        return self.file.generators[stage].config

    def _stage(self, name: str, model: nn.Module) -> FlowStage:
        """Build a stage around its network."""
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
            # Only a shortcut model reads the step size, which allows sampling in few steps.
            call_step=call if config.is_shortcut_model else None,
        )
        # The second stage has no parts to choose from.
        if name == files.LATENT:
            return FlowStage(
                latents=SparseVoxels(channels=config.in_channels, resolution=config.resolution), **common
            )
        sizes = {part: [latent.tokens, latent.in_channels] for part, latent in config.latents.items()}
        # By default adapters sit on all groups and all latents have the same weight.
        groups: list[str] = list(config.groups)
        latents: Dictionary = ShapeAndPose(shapes=sizes)
        if self.learnt == SHAPE:
            groups = [SHAPE]
            # Adapters then sit only on layers of the shape, and the pose's layers stay unchanged.
            latents = ShapeAlone(shapes={SHAPE: sizes[SHAPE]})
        elif self.learnt == FILE:
            # Published weights of the shape are 0: with this option only the pose is tuned.
            if not generator.weights or not any(generator.weights.values()):
                raise ValueError(
                    f"--set parts={FILE}: the file of stage {name!r} has no loss_weights above 0. Set"
                    f" parts={ALL} or parts={SHAPE}."
                )
            common["path"] = replace(generator.path, weights=generator.weights)
        return FlowStage(latents=latents, lora_targets=targets_of(config, groups), **common)

    def conditioning_key(self, stage: str) -> str:
        """Return the stage's name, because each stage reads tokens of its own embedder."""
        return stage

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Decode shapes and poses to the voxels of each shape, [v, 3] int32.

        A shape without any voxel gets its likeliest one.
        """
        if stage != files.STRUCTURE:
            raise ValueError(
                f"advance: expected the stage {files.STRUCTURE!r}, got {stage!r}. No stage follows the last"
                " one."
            )
        check_finite("advance", x_0)
        assert isinstance(x_0, NamedBatch)
        # One sample at a time, because the decoder needs 64^3 x 128 floats for each.
        return [self.structure(tokens)[0] for tokens in x_0[SHAPE]]

    @torch.no_grad()
    def structure(self, shape: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Decode a shape [S, A] to its voxels [v, 3] int32.

        Returns also the factor, 1 or 2, by which the shape was shrunk because it had too many voxels.
        """
        resolution = self._config(files.STRUCTURE).latents[SHAPE].resolution
        decoder = self.part("structure decoder")
        # Tokens are in the order of the grid, the last axis fastest: [S, A] -> [1, A, R, R, R].
        grid = shape.T.unflatten(1, [resolution] * 3)[None]
        logits = decoder(grid.to(self.device, torch.float32))
        (voxels,) = voxels_of(never_empty(logits, f"stage {files.STRUCTURE!r}"))
        return thinned(pruned(voxels, self.file.prune), MOST)

    def pose(self, condition: str, latents: NamedSample) -> pose.Pose | None:
        """Return the pose of an object of the first stage, or None if the conditioning lacks its point map's
        scale.
        """
        tensors = None if self.tokens is None else self.tokens.tokens[condition]
        if not isinstance(tensors, Mapping) or SCALE not in tensors:
            return None
        # A shape that was shrunk for the second stage is as much larger in space.
        factor = self.structure(latents[SHAPE])[1]
        parts = {name: tensor[None].cpu() for name, tensor in latents.tensors.items()}
        return pose.decoded(parts, self.file.pose, tensors[SCALE][None], tensors[SHIFT][None], factor)

    @torch.no_grad()
    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Latent]]:
        """Encode meshes, z up, as shapes that fill the cube. There is no pose, because a mesh does not have
        one.
        """
        encoder = self.part("structure encoder")
        resolution = self._config(files.LATENT).resolution
        made = list[dict[str, Latent]]()
        tokens = self._config(files.STRUCTURE).latents[SHAPE]
        for mesh in assets:
            # The voxels of the surface are occupied, as TRELLIS's data tools define it.
            grid = grid_of([surface_voxels(mesh, resolution)], resolution)
            mean, _ = encoder(grid.to(self.device))  # [1, A, R, R, R]
            check_shape(
                files.ENCODER,
                mean,
                [1, tokens.in_channels, *[tokens.resolution] * 3],
                "Use the released encoder.",
            )
            # [1, A, R, R, R] -> tokens [S, A]
            made.append({files.STRUCTURE: NamedSample({SHAPE: mean[0].flatten(1).T.contiguous().cpu()})})
        return made

    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        """Decode latents on voxels to Gaussians."""
        return decoded(self, "decoder", x_0)


def surface_voxels(mesh: Mesh, resolution: int) -> torch.Tensor:
    """Find the voxels [v, 3] int32 that a mesh's surface passes through, in a cube that the mesh fills.

    Deviates: they are found by random points, the same at every call, so a voxel that is barely touched may
        be missing.
    """
    # The 1e-6 keeps points on the upper border from falling into a voxel outside the grid.
    places, _ = even_points(mesh, 1 - 1e-6, POINTS * resolution**2, torch.Generator().manual_seed(0))
    return torch.unique(((places + 0.5) * resolution).int(), dim=0)


def pruned(voxels: torch.Tensor, distance: int) -> torch.Tensor:
    """Remove inner voxels from voxels [v, 3].

    A voxel is inner if all its neighbours up to `distance` away exist, diagonal ones included. Distance 0
    keeps all voxels.
    """
    if not distance:
        return voxels
    # A margin of free cells on all sides: voxels at the border of the grid are never inner.
    x, y, z = (voxels.long() + distance).unbind(1)
    free = torch.ones(1, *[int(voxels.max()) + 1 + 2 * distance] * 3, device=voxels.device)
    free[0, x, y, z] = 0
    # 1 if any cell of the surrounding cube is free.
    near = F.max_pool3d(free, 2 * distance + 1, stride=1)[0]
    x, y, z = voxels.long().unbind(1)
    return voxels[near[x, y, z] > 0]


def thinned(voxels: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """Reduce voxels [v, 3] to at most `most`.

    Returns also the factor by which the shape was shrunk, about the middle of its box: 2 if it was, else 1.
    """
    if len(voxels) <= most:
        return voxels, 1
    low = int(voxels.min())
    high = int(voxels.max())
    size = high - low  # one size for all axes
    # To half the size, centred; voxels that fall together become one.
    small = (voxels - low) / size * (size / 2 - 1) + low + size / 4
    kept = torch.unique(small.round().int().clamp(low, high), dim=0)
    if len(kept) > most:
        # Still too many: a random subset, the same at every call, in the old order.
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
    """Describe the embedders and the preprocessing of images, as files of embeddings state them.

    Args: prints: fingerprints of the embedders.
    """
    return f"SAM 3D's embedders {' '.join(prints)}, {file.preparation}"


def _without_pose(pairs: Mapping[str, Sequence[PreferencePair]]) -> PairsByStage:
    """Return pairs whose latents have only the shape, computed on access."""
    return PairsByStage(
        pairs,
        # Lazy: latents of a stage are read from disk only when it is trained.
        lambda stage: [
            replace(pair, preferred=shape_alone(pair.preferred), rejected=shape_alone(pair.rejected))
            for pair in pairs[stage]
        ],
    )


# Input files of the embedder. An object is an image <name>.png or .webp whose alpha is its mask; the colours
# still contain the background. The point map <name>.npy [h, w, 3] of the same image holds positions, x left,
# y up, z forward, NaN where there is no point.


def inputs_of(path: Path, cut: ObjectCut, maps: bool) -> dict[str, torch.Tensor]:
    """Read the inputs of a stage's embedder for one object, [., s, s] by name; see `object_inputs`.

    Args:
        path: the image.
        maps: whether the embedder reads point maps.
    Raises: FileNotFoundError for a missing point map; ValueError for an image that shows nothing, or a point
        map of another shape.
    """
    points = _points(path.with_suffix(".npy")) if maps else None

    def inputs(image: Image.Image) -> dict[str, torch.Tensor]:
        return object_inputs(np.asarray(image), points, cut)

    given = read_cut_out(path, inputs)
    # A median depth below 0 shows that the map's z axis points backward.
    if points is not None and float(points[..., 2].nanmedian()) <= 0:
        raise ValueError(
            f"{path.with_suffix('.npy')}: expected points in front of the camera (z > 0). Convert the axes to"
            " x left, y up, z forward."
        )
    return given


def _points(path: Path) -> torch.Tensor:
    """Read a point map [h, w, 3]."""
    if not path.is_file():
        raise FileNotFoundError(
            f"conditioning: expected a point map at {path}, got none. Compute it with a depth network and"
            " save it there."
        )
    # Depth networks may write float16 or float64.
    points = read_array(path).float()
    check_shape(str(path), points, ["h", "w", 3], "Save one point per pixel.")
    return points


@dataclass(frozen=True)
class Sam3d(FlowFamily):
    """Family of SAM 3D Objects. Its option states which latents of the first stage are tuned."""

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
        """Return all files that pipeline.yaml names, by name."""
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
        """Read the pipeline; see `FlowFamily.load`.

        Blocks are recomputed in the backward pass. Decoders are float32. Without conditioning, the first
        stage's latents are those of meshes, which have no pose.
        """
        file = files.read_pipeline(root)
        flows = dict[str, nn.Module]()
        prints = []
        for stage, generator in file.generators.items():
            if stages is not None and stage not in stages:
                # A flow that is not needed stays on the meta device.
                flows[stage] = empty(partial(files.network_of(generator.config), generator.config))
                continue
            # One checkpoint at a time, because they take most of the memory.
            state = read(generator.checkpoint, "weights")
            flow: Any = files.load_flow(generator, dtype, device, state=state)
            flows[stage] = flow
            flow.recompute = True
            prints.append(fingerprint(files.embedder_state(generator, state)))
        # Embeddings name both embedders, so they can be compared only if both checkpoints were read.
        if conditions is not None and len(prints) == len(files.STAGES):
            conditions.check_source("conditions", _source(file, prints), REMEDY)
        # After both flows exist, because the larger one decides.
        spare_memory(flows.values(), device)
        # Meshes have no pose, so latents without one must be accepted.
        parts = SHAPE if conditions is None else self.parts

        def part(name: str) -> nn.Module:
            return files.load_part(file, name, device)

        return Sam3dPipeline(file, flows, conditions, part, device, parts)

    def condition(self, pipeline: Sam3dPipeline, stage: str) -> list[int]:
        """Return the shape [L, E] of a stage's conditioning."""
        return [TOKENS[stage], pipeline.file.generators[stage].config.cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder as a problem. If only the shape is tuned, the pose is removed from the pairs."""
        problem = open_folder(replace(self, parts=source.parts), source, device)
        if source.parts == ALL:
            return problem
        # The identity names the option only if it is not the default, so hashes of the default case stay.
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
        """Embed images whose alpha is the mask, with point maps beside them, by the embedders of both
        checkpoints.

        See `inputs_of` for the files.
        """
        file = files.read_pipeline(root)
        tokens = {name: dict[str, torch.Tensor]() for name in images}
        prints = []
        # One embedder at a time, because each holds two DINOv2 networks.
        for stage in files.STAGES:
            embedder = files.load_embedder(file.generators[stage], device)
            maps = any("pointmap" in name for name in embedder.names)
            prints.append(fingerprint(files.embedder_state(file.generators[stage])))
            for name, path in embedding_progress(images.items(), "image"):
                given = inputs_of(path, file.cuts[stage], maps)
                # Kept for the pose, which is in units of the point map.
                tokens[name] |= {key: given[key] for key in (SCALE, SHIFT) if key in given}
                tokens[name][stage] = (
                    embedder({key: given[key][None].to(device) for key in embedder.names})[0].float().cpu()
                )
        return Conditions(tokens=tokens, encoder=_source(file, prints), zero_null=True)

    def facts(self, pipeline: Sam3dPipeline, condition: str, latents: Mapping[str, Latent]) -> dict:
        """Return the pose of a sampled object for the list: quaternion (real part first), position and size
        in the camera's space.
        """
        structure = latents[files.STRUCTURE]
        # Latents of meshes, or embeddings without point maps, have no pose.
        where = pipeline.pose(condition, structure) if isinstance(structure, NamedSample) else None
        if where is None:
            return {}
        values = {"rotation": where.quaternion, "translation": where.translation, "scale": where.scale}
        # Six decimals are below the accuracy of the pose and keep the list readable.
        return {"pose": {name: [round(x, 6) for x in value[0].tolist()] for name, value in values.items()}}

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stages, by the generator's name."""
        return {"SAM 3D Objects": released_stages}


def released_stages() -> list[SizedStage]:
    """Build the stages of SAM 3D Objects without weights, with the sizes of its YAML files."""
    common: dict[str, Any] = dict(
        model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, qk_rms_norm=True
    )
    # Name and channels of the latents of the pose; each is one token.
    pose = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
    latents = {SHAPE: LatentConfig(in_channels=8, tokens=4096, resolution=16)}
    latents |= {name: LatentConfig(in_channels=channels, tokens=1) for name, channels in pose.items()}
    first = MixtureConfig(
        latents=latents,
        # The four tensors of the pose form one group
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
                # pipeline.yaml names no settings of the first stage: these are the code's defaults
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
