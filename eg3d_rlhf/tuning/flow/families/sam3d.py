"""Family of SAM 3D Objects, a generator in two stages that is conditioned on images and point maps.

The first stage samples an object's shape and pose. The second stage samples latents on the shape's voxels,
which are decoded to Gaussians in the object's own frame. Shape and pose are tuned together, or only the shape
is tuned and the pose stays unchanged. The list of sampled assets states the poses.

The stages are tuned one by one, without the tuning loop. The loop would need encoders for both stages, but
only the encoder of shapes is supported. With it, pairs of shapes can be made from meshes of the user.

Shapes: N number of samples, R grid points per axis, S number of tokens of a shape, A channels of such a
token, v voxels of a sample, L number of conditioning tokens, E channels of a token; for images h rows,
w columns, s pixels per side.
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
from eg3d_rlhf.geometry.point_maps import rising_axes
from eg3d_rlhf.models.image_preprocessing import ObjectCut, object_inputs, read_cut_out
from eg3d_rlhf.models.sam3d import SHAPE, LatentConfig, MixtureConfig, MixtureFlow, VoxelFlow, VoxelFlowConfig
from eg3d_rlhf.models.sparse import Batch, Latent, NamedBatch, NamedSample, SparseBatch
from eg3d_rlhf.models.trellis.autoencoders import grid_of, voxels_of
from eg3d_rlhf.models.weights import empty, fingerprint, read
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_array
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, SizedStage
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import Dictionary, FlowStage, Sampling, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.families import ADDRESSES, register
from eg3d_rlhf.tuning.flow.families import sam3d_files as files
from eg3d_rlhf.tuning.flow.families import sam3d_pose as pose
from eg3d_rlhf.tuning.flow.families.folder import (
    OpenedFolder,
    check_finite,
    embedding_progress,
    occupy_best_voxel,
    read_mesh,
    return_memory_if_large,
    sample_surface_points,
)
from eg3d_rlhf.tuning.flow.families.opening import open_folder
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset, decode_gaussians, show
from training.image_reading import name_list, stored_orientation

# Values of ProblemSource.parts, the latents of the first stage that are tuned. The third value is SHAPE.
ALL = "all"  # all latents, with equal weights in the loss
FILE = "file"  # all latents, with the weights loss_weights of the generator's file
# Random points on a mesh, per square of the grid's resolution; about 100 points per voxel of the surface.
POINTS = 512
TOKENS = {
    files.STRUCTURE: 7528,
    files.LATENT: 5496,
}  # conditioning tokens of the released embedders, by stage
MAX_VOXELS = 42000  # largest number of voxels of the second stage
# Names of tensors that are stored beside the conditioning tokens.
SCALE = "pointmap_scale"
SHIFT = "pointmap_shift"
# Names of the linear layers of self-attention and of cross-attention.
SELF = ("to_qkv", "to_out")
CROSS = ("to_q", "to_kv", "to_out")


def call_mixture(
    network: nn.Module, x_t: NamedBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> NamedBatch:
    """Call the first stage's network as the original program does, where t = 1 is data and t = 0 is noise.

    Args:
        network: network of the first stage.
        x_t: noisy latents by name.
        t: times [N] in 0..1.
        cond: conditioning tokens [N, L, E].
        step: optionally the step size, which a shortcut model reads.
    """
    return x_t.like(network(x_t.tensors, t, cond, *step))


def call_voxels(
    network: nn.Module, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor
) -> SparseBatch:
    """Call the second stage's network as the original program does, where t = 1 is data and t = 0 is noise.

    Args:
        network: network of the second stage.
        x_t: noisy latents on voxels.
        t: times [N] in 0..1.
        cond: conditioning tokens [N, L, E].
        step: optionally the step size, which a shortcut model reads.
    """
    return network(x_t, t, cond, *step)


def targets_of(config: Any, groups: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the layers of the first stage's network that get LoRA adapters.

    The network has separate layers for each group of latents.

    Args:
        config: configuration of the network.
        groups: names of the groups that are tuned; None means all groups.
    """
    layer_names = []
    # In self-attention the group is the last part of a name; in cross-attention it is the middle part.
    for group in groups or config.groups:
        layer_names += [f"self_attn.{layer}.{group}" for layer in SELF]
    for group in groups or config.groups:
        layer_names += [f"cross_attn.{group}.{layer}" for layer in CROSS]
    return tuple(layer_names)


class ShapeAndPose(Dictionary):
    """Kind of the first stage's latents: a dictionary with the shape and the tensors of the pose."""

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """Raise ValueError, beginning with `who`, if a latent lacks the shape or the pose."""
        # Latents of meshes have only the shape, for which there is a better remedy.
        if isinstance(latent, NamedSample) and set(latent.tensors) == {SHAPE}:
            remedy = "Meshes have no pose. Tune only the shape with --set parts=shape."
        super().check(who, latent, remedy)


class ShapeAlone(Dictionary):
    """Kind of the first stage's latents without the pose, on which the shape does not depend.

    Latents that also have a pose are accepted.
    """

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """Raise ValueError, beginning with `who`, if a latent lacks the shape."""
        super().check(who, shape_alone(latent), remedy)


def shape_alone(latent: Latent) -> Latent:
    """Return a latent of the first stage without its pose.

    Latents of the second stage are returned unchanged.
    """
    if isinstance(latent, NamedSample) and SHAPE in latent.tensors:
        return NamedSample({SHAPE: latent[SHAPE]})
    return latent


class Sam3dPipeline(OpenedFolder):
    """Pipeline of both stages of SAM 3D Objects; implements `Pipeline`. Its assets are `SplatAsset`.

    Decoders and the encoder are loaded when they are first needed.
    """

    def __init__(
        self,
        pipeline_file: files.PipelineFile,
        flows: Mapping[str, nn.Module],
        conditioning: Conditioning | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device = "cpu",
        tuned_parts: str = ALL,
    ):
        """Build the stages.

        Args:
            pipeline_file: settings of pipeline.yaml and of the generators' files.
            flows: networks by stage name.
            conditioning: embeddings of the images, or None if nothing is sampled.
            parts: function that reads a decoder or the encoder by its name in sam3d_files.AUTOENCODERS.
            device: device of decoders and encoder.
            tuned_parts: latents of the first stage that are tuned: "all", "shape" or "file"; see
                ProblemSource.parts.
        Raises: ValueError if conditioning, files and networks do not fit each other.
        """
        super().__init__(conditioning, parts, device, {files.LATENT: (pipeline_file.mean, pipeline_file.std)})
        self.file = pipeline_file
        self.tuned_parts = tuned_parts
        self.stages = [self._make_stage(name, flows[name]) for name in files.STAGES]
        # The scales are from pipeline.yaml and the channels from the generator's file, so they may differ.
        channels = self._config(files.LATENT).in_channels
        if len(pipeline_file.mean) != channels:
            raise ValueError(
                f"{files.PIPELINE}: slat_mean has {len(pipeline_file.mean)} channels, but the model of stage"
                f" {files.LATENT!r} has {channels}. Use files of one release."
            )
        if self._config(files.STRUCTURE).latents[SHAPE].resolution is None:
            raise ValueError(
                f"stage {files.STRUCTURE!r}: the file of the generator states no grid for the latent"
                f" {SHAPE!r}. Pass the folder of SAM 3D Objects."
            )

    def _config(self, stage: str) -> Any:
        """Return the configuration of a stage's network."""
        return self.file.generators[stage].config

    def _make_stage(self, name: str, model: nn.Module) -> FlowStage:
        """Build the stage `name` with its network.

        Raises: ValueError if the conditioning or the files do not fit the stage.
        """
        config = self._config(name)
        generator = self.file.generators[name]
        self.check_tokens(name, config.cond_channels, f"Embed them with {REMEDY}.")
        call = call_voxels if name == files.LATENT else call_mixture
        stage_kwargs: dict[str, Any] = dict(
            name=name,
            model=model,
            data_at_one=True,
            path=generator.path,
            sampling=self.file.sampling[name],
            call=call,
            # A shortcut model (Frans et al. 2024) also reads the step size, for sampling in few steps.
            call_step=call if config.is_shortcut_model else None,
        )
        # The second stage has a single latent, which is tuned as a whole.
        if name == files.LATENT:
            return FlowStage(
                latents=SparseVoxels(channels=config.in_channels, resolution=config.resolution),
                **stage_kwargs,
            )
        latent_shapes = {
            latent_name: [latent.tokens, latent.in_channels] for latent_name, latent in config.latents.items()
        }
        # By default all groups of layers get adapters, and all latents have the same weight in the loss.
        groups: list[str] = list(config.groups)
        latents: Dictionary = ShapeAndPose(shapes=latent_shapes)
        if self.tuned_parts == SHAPE:
            # Only layers of the shape get adapters, so that the pose stays unchanged.
            groups = [SHAPE]
            latents = ShapeAlone(shapes={SHAPE: latent_shapes[SHAPE]})
        elif self.tuned_parts == FILE:
            # In the published file the weight of the shape is 0, so with this option only the pose is tuned.
            if not generator.weights or not any(generator.weights.values()):
                raise ValueError(
                    f"--set parts={FILE} does not apply, because the file of stage {name!r} has no"
                    f" loss_weights above 0. Use --set parts={ALL} or --set parts={SHAPE}."
                )
            stage_kwargs["path"] = replace(generator.path, weights=generator.weights)
        return FlowStage(latents=latents, lora_targets=targets_of(config, groups), **stage_kwargs)

    def conditioning_key(self, stage: str) -> str:
        """Return the name of the stage, because each stage reads the tokens of its own embedder."""
        return stage

    @torch.no_grad()
    def advance(self, stage: str, x_0: Batch) -> list[Voxels]:
        """Decode shapes to their voxels, [v, 3] int32 per sample. The poses are not used.

        If a shape has no occupied voxel, its most probable voxel is returned.

        Args:
            stage: name of the first stage; no other stage has a next stage.
            x_0: latents of the first stage.
        Raises: ValueError for another stage, or for latents that are not finite; EmptyStructure for a shape
            without occupied voxels within the context `rejecting_empty`.
        """
        if stage != files.STRUCTURE:
            raise ValueError(
                f"advance: expected the stage {files.STRUCTURE!r}, got {stage!r}. The last stage has no next"
                " stage; call decode for it."
            )
        check_finite("advance", x_0)
        assert isinstance(x_0, NamedBatch)
        # One sample at a time, because the decoder needs 64^3 x 128 floats for each.
        return [self.structure(tokens)[0] for tokens in x_0[SHAPE]]

    @torch.no_grad()
    def structure(self, shape: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Decode a shape [S, A] to its voxels.

        Returns: voxels [v, 3] int32; and the factor by which the shape was shrunk, which is 2 if it had too
            many voxels and 1 otherwise.
        Raises: EmptyStructure for a shape without occupied voxels within the context `rejecting_empty`.
        """
        resolution = self._config(files.STRUCTURE).latents[SHAPE].resolution
        decoder = self.part("structure decoder")
        # Tokens are in the order of the grid, the last axis fastest: [S, A] -> [1, A, R, R, R].
        grid = shape.T.unflatten(1, [resolution] * 3)[None]
        logits = decoder(grid.to(self.device, torch.float32))
        # An empty structure would leave the next stage without voxels, so its most probable voxel is
        # occupied.
        (voxels,) = voxels_of(occupy_best_voxel(logits, f"stage {files.STRUCTURE!r}"))
        return reduce_voxels(remove_inner_voxels(voxels, self.file.prune), MAX_VOXELS)

    def pose(self, condition: str, latents: NamedSample) -> pose.Pose | None:
        """Decode the pose of an object in the camera's space.

        Args:
            condition: name of the image.
            latents: latents of the first stage.
        Returns: pose; or None if the conditioning does not have the scale of the image's point map.
        """
        tensors = None if self.tokens is None else self.tokens.tokens[condition]
        if not isinstance(tensors, Mapping) or SCALE not in tensors:
            return None
        # The second stage may have a smaller copy of the shape, which must then be enlarged in space.
        shrink_factor = self.structure(latents[SHAPE])[1]
        sample_latents = {
            name: tensor[None].cpu() for name, tensor in latents.tensors.items()
        }  # of one sample
        return pose.decode_pose(
            sample_latents, self.file.pose, tensors[SCALE][None], tensors[SHIFT][None], shrink_factor
        )

    @torch.no_grad()
    def encode(self, assets: Sequence[Mesh]) -> list[dict[str, Latent]]:
        """Encode meshes, z up, as latents of the first stage without pose. A mesh is scaled to fill the cube.

        Returns: for each mesh, a dictionary with the latent of the first stage.
        """
        encoder = self.part("structure encoder")
        resolution = self._config(files.LATENT).resolution
        latents = list[dict[str, Latent]]()
        shape_config = self._config(files.STRUCTURE).latents[SHAPE]
        for mesh in assets:
            # The voxels of the surface are occupied, as TRELLIS's data tools define it.
            grid = grid_of([surface_voxels(mesh, resolution)], resolution)
            mean, _ = encoder(grid.to(self.device))  # [1, A, R, R, R]
            check_shape(
                files.ENCODER,
                mean,
                [1, shape_config.in_channels, *[shape_config.resolution] * 3],
                "Use the released encoder.",
            )
            # [1, A, R, R, R] -> tokens [S, A]
            latents.append({files.STRUCTURE: NamedSample({SHAPE: mean[0].flatten(1).T.contiguous().cpu()})})
        return latents

    def decode(self, x_0: SparseBatch) -> list[SplatAsset]:
        """Decode latents on voxels to one asset of Gaussians per sample."""
        return decode_gaussians(self, "decoder", x_0)


def surface_voxels(mesh: Mesh, resolution: int) -> torch.Tensor:
    """Find the voxels that a mesh's surface passes through, after the mesh was scaled to fill the cube.

    Deviates: voxels are found by random points on the surface, the same at every call. A voxel that the
        surface barely touches may be missing.

    Args:
        mesh: triangle mesh.
        resolution: voxels per axis.
    Returns: voxels [v, 3] int32, sorted.
    """
    # The 1e-6 keeps points on the upper border from falling into a voxel outside the grid.
    points, _ = sample_surface_points(
        mesh, 1 - 1e-6, POINTS * resolution**2, torch.Generator().manual_seed(0)
    )
    return torch.unique(((points + 0.5) * resolution).int(), dim=0)


def remove_inner_voxels(voxels: torch.Tensor, voxel_distance: int) -> torch.Tensor:
    """Remove inner voxels from voxels [v, 3].

    A voxel is inner if all voxels up to `voxel_distance` away along each axis exist, including diagonal
    neighbours. With distance 0, all voxels are returned.
    """
    if not voxel_distance:
        return voxels
    # The grid has a margin of empty cells on all sides, so voxels at its border are never inner.
    x, y, z = (voxels.long() + voxel_distance).unbind(1)
    empty_grid = torch.ones(1, *[int(voxels.max()) + 1 + 2 * voxel_distance] * 3, device=voxels.device)
    empty_grid[0, x, y, z] = 0
    # 1 if any cell of the surrounding cube is empty.
    near_empty_grid = F.max_pool3d(empty_grid, 2 * voxel_distance + 1, stride=1)[0]
    x, y, z = voxels.long().unbind(1)
    return voxels[near_empty_grid[x, y, z] > 0]


def reduce_voxels(voxels: torch.Tensor, max_voxels: int) -> tuple[torch.Tensor, int]:
    """Reduce the number of voxels [v, 3] to at most `max_voxels`, as the original does.

    If there are too many voxels, the shape is shrunk to about half its size, about the centre of its bounding
    box. If there are still too many voxels, a random subset is returned, the same at every call.

    Returns: voxels [fewer, 3], and the factor by which the shape was shrunk: 2, or 1 if it was not.
    """
    if len(voxels) <= max_voxels:
        return voxels, 1
    lowest_index = int(voxels.min())
    highest_index = int(voxels.max())
    extent = highest_index - lowest_index  # one size for all axes
    # Half the size, and centred. Voxels with the same new indices become one voxel.
    shrunk_voxels = (voxels - lowest_index) / extent * (extent / 2 - 1) + lowest_index + extent / 4
    reduced_voxels = torch.unique(shrunk_voxels.round().int().clamp(lowest_index, highest_index), dim=0)
    if len(reduced_voxels) > max_voxels:
        generator = torch.Generator().manual_seed(0)
        # Sorted, so that the voxels keep their order.
        subset_indices = torch.randperm(len(reduced_voxels), generator=generator)[:max_voxels].sort().values
        reduced_voxels = reduced_voxels[subset_indices.to(reduced_voxels.device)]
    return reduced_voxels, 2


REMEDY = "`eg3d-rlhf flow new` and these checkpoints"
NOTICE = (
    "SAM 3D Objects is under Meta's SAM License. Derived models may only be passed on under the same"
    " licence, with a copy of it, and not for military, nuclear, espionage or weapon purposes (1.b). Read"
    " the file LICENSE beside its weights."
)


def _source(pipeline_file: files.PipelineFile, fingerprints: Sequence[str]) -> str:
    """Return a text that names the embedders and the preprocessing of images.

    Files of embeddings contain this text and are compared by it, so it must not change.

    Args:
        pipeline_file: settings of the pipeline.
        fingerprints: fingerprints (hashes) of the embedders' weights.
    """
    return f"SAM 3D's embedders {' '.join(fingerprints)}, {pipeline_file.preparation}"


def _without_pose(pairs: Mapping[str, Sequence[PreferencePair]]) -> PairsByStage:
    """Return the pairs of all stages without poses.

    The pairs of a stage are computed when they are accessed.
    """
    return PairsByStage(
        pairs,
        # Latents of a stage are read from disk only when the stage is trained.
        lambda stage: [
            replace(pair, preferred=shape_alone(pair.preferred), rejected=shape_alone(pair.rejected))
            for pair in pairs[stage]
        ],
    )


# Input files of the embedder. An object is an image <name>.png or .webp with the object's mask as alpha
# channel; the colours still contain the background. The point map <name>.npy [h, w, 3] of the same image
# states a position for each pixel, with x left, y up, z forward, and NaN for pixels without a point.


def inputs_of(path: Path, cut: ObjectCut, reads_point_map: bool) -> dict[str, torch.Tensor]:
    """Read the inputs of a stage's embedder for one object.

    Args:
        path: path of the image.
        cut: settings for cropping the image to the object.
        reads_point_map: True if the embedder reads point maps.
    Returns: tensors [channels, s, s] by name, and scale and shift of the point map; see `object_inputs`.
    Raises: FileNotFoundError for a missing point map; ValueError for an image with an empty mask, for a point
        map of another shape, or for one with points behind the camera.
    """
    points = _read_points(path.with_suffix(".npy")) if reads_point_map else None
    # `read_cut_out` turns the image upright. It is unknown whether the depth network did, too.
    if points is not None and stored_orientation(path) != 1:
        raise ValueError(
            f"{path}: the EXIF data states that the image must be turned to be upright, and"
            f" {path.with_suffix('.npy').name} may or may not be turned. Save the image upright without this"
            " entry, for example with ImageMagick: magick mogrify -auto-orient, and compute the point map"
            " again."
        )

    def make_inputs(image: Image.Image) -> dict[str, torch.Tensor]:
        """Crop the image and the point map to the object."""
        return object_inputs(np.asarray(image), points, cut)

    inputs = read_cut_out(path, make_inputs)
    # A median depth below 0 shows that the map's z axis points backward.
    if points is not None and float(points[..., 2].nanmedian()) <= 0:
        raise ValueError(
            f"{path.with_suffix('.npy')}: the median of z is {float(points[..., 2].nanmedian()):g}, but must"
            " be above 0, because z > 0 is in front of the camera. Convert the axes to x left, y up, z"
            " forward."
        )
    return inputs


# Axes of a point map, and the command that makes point maps, for messages.
AXES = "x left, y up, z forward, and NaN where there is no point"
POINT_MAPS = "eg3d-rlhf data point-maps DEPTHS --images=IMAGES --fov=DEGREES"


def _check_point_maps(paths: Sequence[Path]) -> None:
    """Check the point maps of all images before the first one is embedded.

    Raises: FileNotFoundError that lists all images without a point map; ValueError that lists all maps with
        other axes.
    """
    missing_names = [
        path.with_suffix(".npy").name for path in paths if not path.with_suffix(".npy").is_file()
    ]
    if missing_names:
        raise FileNotFoundError(
            f"--images: {len(missing_names)} point maps of images are missing: {name_list(missing_names)}."
            f" A map is an array [h, w, 3] beside its image, with {AXES}. From depth maps, make them with:"
            f" {POINT_MAPS}. Maps of a depth network such as MoGe, which has x right and y down, must be"
            " saved as (-x, -y, z)."
        )
    turned_names = []
    for path in paths:
        map_path = path.with_suffix(".npy")
        is_rising = rising_axes(_read_points(map_path).numpy())
        wrong_axes = [axis for axis, rises in zip("xy", is_rising, strict=True) if rises]
        if wrong_axes:
            turned_names.append(f"{map_path.name} ({' and '.join(wrong_axes)})")
    if turned_names:
        raise ValueError(
            f"--images: {len(turned_names)} point maps have other axes: {name_list(turned_names)}. Expected"
            f" {AXES}, so that x falls from the left to the right column, and y from the top to the bottom"
            " row. MoGe has x right and y down; save (-x, -y, z): np.save(path, np.load(path) * [-1, -1, 1])."
            f" From depth maps, make point maps with: {POINT_MAPS}"
        )


def _read_points(path: Path) -> torch.Tensor:
    """Read a point map [h, w, 3] as float32. Raises: FileNotFoundError; ValueError for another shape."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--images: the point map {path} of the image is missing. It is an array [h, w, 3] with {AXES}."
            f" From depth maps, make it with: {POINT_MAPS}"
        )
    # Depth networks may write float16 or float64.
    points = read_array(path).float()
    check_shape(str(path), points, ["h", "w", 3], "Save one point per pixel.")
    return points


@dataclass(frozen=True)
class Sam3d(FlowFamily):
    """Family of SAM 3D Objects. Its option `parts` states which latents of the first stage are tuned."""

    parts: str = ALL  # see ProblemSource.parts

    name = "sam3d"
    layout = f"{files.PIPELINE} of {files.PACKAGE}"
    stages = files.STAGES
    version = "SAM 3D Objects, shape with pose and Gaussians"
    address = ADDRESSES["sam3d"]
    notice = NOTICE
    # `Inference` is in the folder notebook/ of the original repository
    loaded_by = 'from inference import Inference; Inference("{settings}", compile=False)'
    up = "z"
    options = ("parts",)
    recognises = staticmethod(files.recognises)
    read_asset = staticmethod(read_mesh)
    networks = staticmethod(files.networks)
    release = staticmethod(files.release)
    show = staticmethod(show)

    def files(self, root: Path, stages: Sequence[str] | None = None) -> Mapping[str, Path]:
        """Return pipeline.yaml and all files that it names, by name. `stages` is not used."""
        return files.read_pipeline(root).files

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Sam3dPipeline:
        """Read the pipeline; see `FlowFamily.load`.

        Blocks are recomputed in the backward pass. Decoders are float32. Without conditioning, the first
        stage accepts latents of meshes, which have no pose.
        """
        pipeline_file = files.read_pipeline(root)
        flows = dict[str, nn.Module]()
        fingerprints = []
        for stage, generator in pipeline_file.generators.items():
            if stages is not None and stage not in stages:
                # A flow that is not needed stays on the meta device, and its embedder is not compared.
                flows[stage] = empty(partial(files.network_of(generator.config), generator.config))
                fingerprints.append("*")
                continue
            # Checkpoints are read one after the other, because they take most of the memory.
            checkpoint_tensors = read(generator.checkpoint, "weights")
            flow: Any = files.load_flow(generator, dtype, device, state=checkpoint_tensors)
            flows[stage] = flow
            flow.recompute = True
            fingerprints.append(fingerprint(files.embedder_state(generator, checkpoint_tensors)))
        # Files of embeddings name both embedders, of which those are compared whose checkpoint was read.
        if conditioning is not None:
            conditioning.check_source("conditioning", _source(pipeline_file, fingerprints), REMEDY)
        # Called after both flows are built, because the size of the larger flow decides.
        return_memory_if_large(flows.values(), device)
        # Meshes have no pose, so latents without one must be accepted.
        tuned_parts = SHAPE if conditioning is None else self.parts

        def read_part(name: str) -> nn.Module:
            """Read a decoder or the encoder by its name."""
            return files.load_part(pipeline_file, name, device)

        return Sam3dPipeline(pipeline_file, flows, conditioning, read_part, device, tuned_parts)

    def condition(self, pipeline: Sam3dPipeline, stage: str) -> list[int]:
        """Return the shape [L, E] of the conditioning tokens of one sample."""
        return [TOKENS[stage], pipeline.file.generators[stage].config.cond_channels]

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open a folder and its preference pairs as a problem.

        If only the shape is tuned, the pose is removed from the pairs.
        """
        problem = open_folder(replace(self, parts=source.parts), source, device)
        if source.parts == ALL:
            return problem
        # With the default, the option is not part of the identity, so that existing hashes stay valid.
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
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditioning:
        """Embed images of objects by the embedders of the two stages' checkpoints.

        The alpha channel of an image is the object's mask, and its point map is a file beside it; see
        `inputs_of`.
        """
        pipeline_file = files.read_pipeline(root)
        tokens = {name: dict[str, torch.Tensor]() for name in images}
        fingerprints = []
        # One embedder is in memory at a time, because each has two DINOv2 networks.
        for stage in files.STAGES:
            embedder = files.load_embedder(pipeline_file.generators[stage], device)
            reads_point_map = any("pointmap" in name for name in embedder.names)
            if reads_point_map:
                _check_point_maps(list(images.values()))
            fingerprints.append(fingerprint(files.embedder_state(pipeline_file.generators[stage])))
            for name, path in embedding_progress(images.items(), "image"):
                inputs = inputs_of(path, pipeline_file.cuts[stage], reads_point_map)
                # Stored for decoding the pose, which is in units of the point map.
                tokens[name] |= {
                    tensor_name: inputs[tensor_name]
                    for tensor_name in (SCALE, SHIFT)
                    if tensor_name in inputs
                }
                tokens[name][stage] = (
                    embedder(
                        {tensor_name: inputs[tensor_name][None].to(device) for tensor_name in embedder.names}
                    )[0]
                    .float()
                    .cpu()
                )
        return Conditioning(tokens=tokens, encoder=_source(pipeline_file, fingerprints), zero_null=True)

    def facts(self, pipeline: Sam3dPipeline, condition: str, latents: Mapping[str, Latent]) -> dict:
        """Return the pose of a sampled object for the list of sampled assets, in JSON types.

        The entry "pose" has the rotation as a quaternion (real part first), the translation, and the size
        along each axis, all in the camera's space. Without a pose, the dictionary is empty.
        """
        structure_latent = latents[files.STRUCTURE]
        # There is no pose for latents of meshes, or for embeddings without point maps.
        object_pose = (
            pipeline.pose(condition, structure_latent) if isinstance(structure_latent, NamedSample) else None
        )
        if object_pose is None:
            return {}
        pose_tensors = {
            "rotation": object_pose.quaternion,
            "translation": object_pose.translation,
            "scale": object_pose.scale,
        }
        # Six decimals are below the accuracy of the pose and keep the list readable.
        return {
            "pose": {name: [round(x, 6) for x in value[0].tolist()] for name, value in pose_tensors.items()}
        }

    def released(self) -> dict[str, Callable[[], list[SizedStage]]]:
        """Return the function that builds the published stages, by the generator's name."""
        return {"SAM 3D Objects": released_stages}


def released_stages() -> list[SizedStage]:
    """Build the stages of SAM 3D Objects without weights, for estimates of memory and time.

    The sizes are copied from the published YAML files.
    """
    network_kwargs: dict[str, Any] = dict(
        model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, qk_rms_norm=True
    )
    # Latent of the pose -> its channels. Each of them is a single token.
    pose_channels = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
    latents = {SHAPE: LatentConfig(in_channels=8, tokens=4096, resolution=16)}
    latents |= {
        name: LatentConfig(in_channels=channels, tokens=1) for name, channels in pose_channels.items()
    }
    structure_config = MixtureConfig(
        latents=latents,
        # The four latents of the pose share the layers of one group.
        latent_share_transformer={"6drotation_normalized": tuple(pose_channels)},
        is_shortcut_model=True,
        **network_kwargs,
    )
    latent_config = VoxelFlowConfig(
        resolution=64,
        in_channels=8,
        out_channels=8,
        patch_size=2,
        io_block_channels=(128,),
        num_io_res_blocks=2,
        **network_kwargs,
    )
    latent_shapes = {name: [latent.tokens, latent.in_channels] for name, latent in latents.items()}
    return [
        SizedStage(
            conditioning=[TOKENS["structure"], 1024],
            stage=FlowStage(
                name="structure",
                model=empty(partial(MixtureFlow, structure_config)),
                latents=Dictionary(shapes=latent_shapes),
                data_at_one=True,
                call=call_mixture,
                # pipeline.yaml has no settings for the first stage; these are the defaults of the original's
                # code.
                sampling=Sampling(cfg_strength=7.0),
                lora_targets=targets_of(structure_config),
            ),
        ),
        SizedStage(
            conditioning=[TOKENS["latent"], 1024],
            stage=FlowStage(
                name="latent",
                model=empty(partial(VoxelFlow, latent_config)),
                latents=SparseVoxels(channels=8, resolution=64),
                data_at_one=True,
                call=call_voxels,
                sampling=Sampling(rescale_t=1.0, cfg_strength=1.0),
            ),
        ),
    ]


FAMILY = register(Sam3d())
