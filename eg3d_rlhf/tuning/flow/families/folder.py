"""Code that several families of flow generators share.

It has base classes of pipelines, and functions for JSON files, user meshes, latents and memory.

Shapes: N number of samples, L number of tokens, E channels of a token, v voxels of a sample, C channels of a
latent, F faces of a mesh, P sampled points.
"""

import ctypes
import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.models.sparse import Batch, Latent, feats_of
from eg3d_rlhf.models.weights import read
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, to_device
from eg3d_rlhf.tuning.flow.base.pairs import Lazy
from eg3d_rlhf.tuning.flow.base.stage import reject_empty
from eg3d_rlhf.tuning.flow.families import print_notice
from training.progress import tqdm
from training.storage import load_strict, reject_lfs_pointer

T = TypeVar("T")
LARGEST_SEARCHED_FILE = 1 << 16  # bytes; `mentions` does not read larger files
EMPTY_STRUCTURE_ADVICE = (
    "If this happens often, the decoder may not be the one that the flow was trained with: check its folder"
    " and the conditioning."
)
LARGE = 10**8  # number of parameters of a flow from which freed memory must return to the system at once


class OpenedFolder:
    """Base class of pipelines whose networks are read from a folder.

    It provides the conditioning, normalises latents, and reads decoders when they are first needed.

    Args:
        conditioning: embeddings of the prompts, or None if nothing is sampled.
        parts: function that reads a network, such as a decoder, by its name.
        device: device of the networks and of the conditioning.
        scales: mean and standard deviation per channel, for each stage whose latents are normalised.
    """

    def __init__(
        self,
        conditioning: Conditioning | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device,
        scales: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ):
        self.tokens = conditioning
        self.device = device
        self.scales = scales
        self._parts = parts  # reads a network; called once per name
        self._loaded = dict[str, nn.Module]()  # networks that were read, by name

    def part(self, name: str) -> Any:
        """Return a network by its name, frozen and in eval mode.

        The network is read at the first call. Later calls return the same object.
        """
        if name not in self._loaded:
            # Decoders and encoders are never trained.
            self._loaded[name] = self._parts(name).eval().requires_grad_(False).to(self.device)
        return self._loaded[name]

    def conditioning_key(self, stage: str) -> str | None:
        """Return the name of the conditioning tensor that a stage reads, or None if it reads all tensors."""
        return None

    def check_tokens(self, stage: str, channels: int, remedy: str) -> None:
        """Raise ValueError if the conditioning has no tokens of shape [L, channels] for a stage.

        Without conditioning nothing is checked.

        Args:
            stage: name of the stage.
            channels: number of channels of a token that the stage's network expects.
            remedy: last sentence of the message.
        """
        if self.tokens is None:
            return
        token_form = self.tokens.form
        tensor_name = self.conditioning_key(stage)
        # The form is a shape [L, E], or shapes by name if the conditioning has several tensors.
        shape: Any
        if tensor_name is None:
            shape = token_form
        else:
            shape = token_form.get(tensor_name) if isinstance(token_form, Mapping) else None
        if not isinstance(shape, list) or len(shape) != 2 or shape[-1] != channels:
            name_text = f" named {tensor_name!r}" if tensor_name else ""
            expected_text = f"tokens [L, {channels}]{name_text} for stage {stage!r}"
            source_text = f" of {self.tokens.encoder}" if self.tokens.encoder else ""
            raise ValueError(
                f"conditioning: expected {expected_text}, but the file has {token_form}{source_text}."
                f" {remedy}"
            )

    def conditioning(self, names: Sequence[str], stage: str) -> Any:
        """Return the conditioning of these prompts for a stage.

        Returns: tokens [N, L, E]; or a dictionary of tensors if the stage reads several.
        Raises: ValueError for prompts without an embedding.
        """
        assert self.tokens is not None
        return self._conditioning(self.tokens.select(names), stage)

    def null_conditioning(self, n: int, stage: str) -> Any:
        """Return the empty conditioning for n samples: tokens [n, L, E], or a dictionary of tensors."""
        assert self.tokens is not None
        return self._conditioning(self.tokens.null(n), stage)

    def _conditioning(self, tensors: Any, stage: str) -> Any:
        """Select the conditioning tensor that a stage reads and move it to the pipeline's device."""
        tensor_name = self.conditioning_key(stage)
        return to_device(tensors if tensor_name is None else tensors[tensor_name], self.device)

    def normalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        """Convert latents [v, C] from the decoder's to the flow's scale of a stage: (x - mean) / std."""
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return (feats - mean) / std

    def unnormalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        """Convert latents [v, C] from the flow's to the decoder's scale of a stage: x * std + mean."""
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return feats * std + mean


def are_scales(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return True if latents can be normalised by these means and standard deviations per channel.

    Both must have the same length. Means must be finite, standard deviations finite and above 0.
    """
    return len(mean) == len(std) and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)


class EncodingFolder(OpenedFolder, ABC):
    """Base class of pipelines that also have encoders for every stage."""

    def encode(self, assets: Sequence[Any]) -> Sequence[Mapping[str, Latent]]:
        """Return one mapping per asset from the name of a stage to its latent.

        A latent is computed when it is first read from the mapping.
        """
        return [Lazy(self.encodes(asset), functools.partial(self.encode_stage, asset)) for asset in assets]

    @abstractmethod
    def encodes(self, asset: Any) -> Sequence[str]:
        """Return the names of the stages for which `encode_stage` can encode the asset."""

    @abstractmethod
    def encode_stage(self, asset: Any, stage: str) -> Latent:
        """Encode an asset as the latent of one stage, in the scale of the flow.

        The latent is the mean of the encoder's distribution, without noise.
        """


def embedding_progress(items: Collection[T], unit: str) -> Iterable[T]:
    """Iterate over the items to be embedded and show a progress bar that counts them in `unit`."""
    return tqdm(items, desc="embedding", unit=unit)


def mentions(path: Path, word: str) -> bool:
    """Return True if a file exists, has at most 64 KiB, and contains a word."""
    # Bytes that are not UTF-8 are replaced, because the file may be of any kind.
    return (
        path.is_file()
        and path.stat().st_size <= LARGEST_SEARCHED_FILE
        and word in path.read_text(errors="replace")
    )


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises: ValueError, naming the file, for any other content."""
    reject_lfs_pointer(path)
    try:
        json_value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path}: the file is not valid JSON ({error}). Download or write it again."
        ) from None
    # Valid JSON may also be a list or a number.
    if not isinstance(json_value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got a {type(json_value).__name__}. Download or write the file"
            " again."
        )
    return json_value


def read_network(
    root: Path, file_names: tuple[str, str], make_network: Callable[..., nn.Module]
) -> nn.Module:
    """Build a network from a JSON file of its arguments and a file of its tensors, in eval mode.

    Args:
        root: folder of both files.
        file_names: name of the JSON file, and name of the file of tensors.
        make_network: class or function that builds the network from the arguments.
    Raises: OSError for a missing file; ValueError for tensors whose names or shapes do not match.
    """
    # The keys of the JSON file are the names of the arguments.
    network = make_network(**read_json(root / file_names[0]))
    path = root / file_names[1]
    load_strict(network, read(path, str(path)), str(path))
    return network.eval()


def read_mesh(path: Path) -> Mesh:
    """Read a triangle mesh from a file of the user; see `rewards.meshes.dataset.load_mesh`."""
    # Imported only here, because the package of rewards takes long to import.
    from eg3d_rlhf.rewards.meshes.dataset import load_mesh

    return load_mesh(path)


def sample_surface_points(
    mesh: Mesh, side: float, point_count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample points uniformly on a mesh's surface.

    The mesh is moved and scaled so that its bounding box is centred at 0 and its longest side is `side`.

    Args:
        mesh: triangle mesh.
        side: length of the longest side of the bounding box after scaling.
        point_count: P, number of points.
        generator: random generator on the CPU.
    Returns: points [P, 3] and the unit normals of their faces [P, 3], both float64.
    Raises: ValueError for a mesh without area.
    """
    vertices = mesh.vertices.double()
    box_min = vertices.amin(0)
    box_max = vertices.amax(0)
    corners = ((vertices - (box_min + box_max) / 2) * (side / (box_max - box_min).max()))[
        mesh.faces
    ]  # [F, 3, 3]
    # The cross product has the normal's direction and twice the area as its length.
    cross_products = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_area = cross_products.norm(dim=1)  # the factor 2 cancels in the probabilities
    if not (bool(double_area.isfinite().all()) and float(double_area.sum()) > 0):
        raise ValueError(
            "the mesh has no surface, because the area of its faces is 0 or not finite. Export the surface as"
            " triangles."
        )
    # A face is chosen with a probability proportional to its area, by inverting the cumulative sum.
    cumulative_area = double_area.cumsum(0)
    uniform_numbers = torch.rand(point_count, generator=generator, dtype=torch.float64)
    # The clamp is only a guard: the values are at most the total, so the index is that of a face.
    face_index = torch.searchsorted(cumulative_area, uniform_numbers * cumulative_area[-1]).clamp(
        max=len(cumulative_area) - 1
    )
    u, v = torch.rand(2, point_count, 1, generator=generator, dtype=torch.float64)  # [P, 1] each
    # The square root makes the points uniform in the triangle (Osada et al. 2002, equation 1).
    a, b, c = corners[face_index].unbind(1)
    return a + (1 - u.sqrt()) * (b - a) + u.sqrt() * v * (c - a), cross_products[face_index] / double_area[
        face_index, None
    ]


def check_finite(message_prefix: str, x_0: Batch) -> None:
    """Raise ValueError, beginning with `message_prefix`, if latents contain NaN or infinite values."""
    # NaN > 0 is false: a decoder would return an empty grid without an error.
    latent_values = feats_of(x_0)
    invalid_count = int((~torch.isfinite(latent_values)).sum())
    if invalid_count:
        raise ValueError(
            f"{message_prefix}: {invalid_count} of {latent_values.numel()} latent values are NaN or infinite."
            " Use an earlier checkpoint of the flow."
        )


def occupy_best_voxel(logits: torch.Tensor, message_prefix: str) -> torch.Tensor:
    """Return occupancy logits in which at least the most probable voxel is occupied, that is, above 0.

    If no voxel of the structure was occupied, a notice is printed once per process.

    Args:
        logits: occupancy logits of one structure, [1, 1, R, R, R] with R voxels per axis.
        message_prefix: beginning of the notice, such as the name of the stage.
    Raises: EmptyStructure for an empty structure within the context `rejecting_empty`.
    """
    if not bool((logits > 0).any()):
        # Raises within `rejecting_empty`, where an empty structure counts as a failed sample.
        reject_empty(message_prefix, EMPTY_STRUCTURE_ADVICE)
        notice_empty(message_prefix)
    # Only the largest logit is replaced, by at least 1. If it was above 0, the occupancy does not change.
    return logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0))


@functools.cache
def notice_empty(message_prefix: str) -> None:
    """Print the notice of an empty structure. Through the cache it is printed once per process and prefix."""
    print_notice(
        f"{message_prefix}: a decoded structure has no occupied voxel. Its most probable voxel is used"
        f" instead. {EMPTY_STRUCTURE_ADVICE}"
    )


def return_memory_if_large(flows: Iterable[nn.Module], device: str | torch.device) -> None:
    """Let this process return freed memory to the system at once if a flow is large and runs on a CPU.

    See `return_freed_memory`.

    Args:
        flows: networks of all stages.
        device: device of the networks.
    """
    if (
        # On a GPU, torch allocates without glibc's heap.
        torch.device(device).type == "cpu"
        and max(sum(p.numel() for p in flow.parameters()) for flow in flows) > LARGE
    ):
        return_freed_memory()


def return_freed_memory() -> bool:
    """Make glibc return every freed block of 8 MiB or more to the system at once, in this process.

    By default glibc adapts its threshold and keeps freed blocks of up to 32 MiB in a heap. The few tensors
    that stay allocated between a network's blocks then fragment this heap. In a pass over TRELLIS's flows,
    the memory of the process grew by 15 times the size of these tensors. Blocks below 8 MiB, such as tiles of
    attention, are allocated thousands of times; up to 64 MiB of free memory are kept for them.

    Returns: True if glibc accepted both settings; False if it rejected one or is not in use.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        # Other C libraries, as on macOS, Windows or Alpine Linux, have no mallopt.
        return False
    # Parameters -3 and -1 are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h, in bytes.
    return bool(mallopt(-3, 8 << 20) and mallopt(-1, 64 << 20))
