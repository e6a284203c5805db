"""Shared parts of the families of flow generators: a base class of their pipelines, files, meshes and
memory.
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
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions, to_device
from eg3d_rlhf.tuning.flow.base.pairs import Lazy
from eg3d_rlhf.tuning.flow.base.stage import refuse_empty
from eg3d_rlhf.tuning.flow.families import print_notice
from training.progress import tqdm
from training.storage import load_strict

T = TypeVar("T")
LARGEST = 1 << 16  # bytes; larger files are not searched for a word
ELSEWHERE = (
    "If this happens often, the decoder may not be the one that the flow was trained with: check its folder"
    " and the conditioning."
)
LARGE = 10**8  # number of parameters of a flow from which freed memory must return to the system at once


class OpenedFolder:
    """Base class of pipelines whose networks lie in a folder: conditioning, scales of latents, and decoders
    by name.

    Args:
        conditioning: None if nothing is sampled.
        parts: reads a network, such as a decoder, by its name.
        scales: mean and standard deviation per channel for each stage whose latents are normalised.
    """

    def __init__(
        self,
        conditioning: Conditions | None,
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
        """Return a network by its name, frozen and in eval mode. It is read at the first call and then
        kept.
        """
        if name not in self._loaded:
            self._loaded[name] = self._parts(name).eval().requires_grad_(False).to(self.device)
        return self._loaded[name]

    def conditioning_key(self, stage: str) -> str | None:
        """Return the name of the conditioning tensor that a stage reads; None: the stage reads all of it."""
        return None

    def check_tokens(self, stage: str, channels: int, remedy: str) -> None:
        """Raise ValueError if the conditioning holds no tokens [L, channels] for a stage."""
        if self.tokens is None:
            return
        form = self.tokens.form
        name = self.conditioning_key(stage)
        # The form is a shape [L, E], or shapes by name if the conditioning has several tensors.
        shape = form if name is None else form.get(name) if isinstance(form, Mapping) else None
        if not isinstance(shape, list) or len(shape) != 2 or shape[-1] != channels:
            expected = f"tokens [L, {channels}]{f' named {name!r}' if name else ''} for stage {stage!r}"
            source = f" of {self.tokens.encoder}" if self.tokens.encoder else ""
            raise ValueError(f"conditioning: expected {expected}, got {form}{source}. {remedy}")

    def conditions(self, names: Sequence[str], stage: str) -> Any:
        """Return what a stage reads for these prompts, tokens [N, L, E] or tensors by name.

        Raises: ValueError for names without an embedding.
        """
        assert self.tokens is not None
        return self._conditioning(self.tokens.select(names), stage)

    def no_condition(self, n: int, stage: str) -> Any:
        """Return the empty conditioning for n samples, [n, L, E] or tensors by name."""
        assert self.tokens is not None
        return self._conditioning(self.tokens.null(n), stage)

    def _conditioning(self, condition: Any, stage: str) -> Any:
        """Select the tensor that a stage reads and move it to the pipeline's device."""
        name = self.conditioning_key(stage)
        return to_device(condition if name is None else condition[name], self.device)

    def normalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        """Convert latents [v, C] from the decoders' scale to the scale of a stage's flow."""
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return (feats - mean) / std

    def unnormalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        """Convert latents [v, C] from the scale of a stage's flow to the decoders' scale; inverse of
        `normalised`.
        """
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return feats * std + mean


def are_scales(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return whether these are means and standard deviations by which latents can be normalised, per
    channel.
    """
    return len(mean) == len(std) and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)


class EncodingFolder(OpenedFolder, ABC):
    """Base class of pipelines that also have encoders for every stage."""

    def encode(self, assets: Sequence[Any]) -> Sequence[Mapping[str, Latent]]:
        """Return, per asset, the latents of its stages. Each is computed when it is first read."""
        return [Lazy(self.encodes(asset), functools.partial(self.encode_stage, asset)) for asset in assets]

    @abstractmethod
    def encodes(self, asset: Any) -> Sequence[str]:
        """Return the names of the stages for which `encode_stage` can encode the asset."""

    @abstractmethod
    def encode_stage(self, asset: Any, stage: str) -> Latent:
        """Encode an asset as the latent of one stage: the mean of the encoder's distribution, in the flow's
        scale.
        """


def embedding_progress(items: Collection[T], unit: str) -> Iterable[T]:
    """Iterate over the items to be embedded and show a progress bar."""
    return tqdm(items, desc="embedding", unit=unit, disable=None)


def mentions(path: Path, word: str) -> bool:
    """Return whether a small text file exists and contains a word."""
    return path.is_file() and path.stat().st_size <= LARGEST and word in path.read_text(errors="replace")


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises: ValueError with the path."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Restore the file.") from None
    # Valid JSON may also be a list or a number.
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}. Restore the file.")
    return content


def read_network(root: Path, files: tuple[str, str], make: Callable[..., nn.Module]) -> nn.Module:
    """Build a network from two files: its arguments as JSON, and its tensors, which must match by name and
    shape.

    Args: files: names of the JSON file and the file of tensors in the folder.
    Raises: OSError, ValueError.
    """
    module = make(**read_json(root / files[0]))
    path = root / files[1]
    load_strict(module, read(path, str(path)), str(path))
    return module.eval()


def read_mesh(path: Path) -> Mesh:
    """Read a triangle mesh of the user's; see `load_mesh`."""
    # Imported only here, because the package of rewards takes long to import.
    from eg3d_rlhf.rewards.meshes.dataset import load_mesh

    return load_mesh(path)


def even_points(
    mesh: Mesh, side: float, count: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample points uniformly on a mesh's surface.

    The mesh is moved and scaled so that its bounding box is centred at 0 and its longest side is `side`.

    Args:
        count: P, number of points.
        draw: random generator.
    Returns: points [P, 3] and the normals of their faces [P, 3], both float64.
    Raises: ValueError for a mesh without area.
    """
    vertices = mesh.vertices.double()
    low = vertices.amin(0)
    high = vertices.amax(0)
    corners = ((vertices - (low + high) / 2) * (side / (high - low).max()))[mesh.faces]  # [F, 3, 3]
    # The cross product has the normal's direction and twice the area as its length.
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = cross.norm(dim=1)  # twice the area, which cancels in shares
    if not (bool(area.isfinite().all()) and float(area.sum()) > 0):
        raise ValueError("expected a mesh with an area above 0. Export the surface as triangles.")
    # A face is chosen with a probability proportional to its area, by inverting the cumulative sum.
    ends = area.cumsum(0)
    face = torch.searchsorted(ends, torch.rand(count, generator=draw, dtype=torch.float64) * ends[-1]).clamp(
        max=len(ends) - 1
    )
    u, v = torch.rand(2, count, 1, generator=draw, dtype=torch.float64)  # [P, 1] each
    # The square root makes the points uniform in the triangle (Osada et al. 2002, equation 1).
    a, b, c = corners[face].unbind(1)
    return a + (1 - u.sqrt()) * (b - a) + u.sqrt() * v * (c - a), cross[face] / area[face, None]


def check_finite(who: str, x_0: Batch) -> None:
    """Raise ValueError, beginning with `who`, for latents that are not finite."""
    # NaN > 0 is false: a decoder would return an empty grid without an error.
    values = feats_of(x_0)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{who}: {bad} of {values.numel()} latent values are NaN or infinite. Use an earlier checkpoint."
        )


def never_empty(logits: torch.Tensor, who: str) -> torch.Tensor:
    """Return occupancy logits of one structure in which at least the likeliest voxel is occupied.

    If no voxel was occupied, a notice is printed once per process.

    Raises: EmptyStructure within `refusing_empty`.
    """
    if not bool((logits > 0).any()):
        # Raises within `refusing_empty`, where an empty structure counts as a failed sample.
        refuse_empty(who, ELSEWHERE)
        notice_empty(who)
    # Where a voxel is occupied already, its largest logit may grow to 1, which does not change the occupancy.
    return logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0))


@functools.cache
def notice_empty(who: str) -> None:
    """Print the notice of an empty structure, once per process."""
    print_notice(
        f"{who}: a decoded structure is empty. Only its likeliest voxel is used in its place. {ELSEWHERE}"
    )


def spare_memory(flows: Iterable[nn.Module], device: str | torch.device) -> None:
    """Return freed memory to the system at once if a flow is large and runs on a CPU."""
    if (
        # On a GPU, torch allocates without glibc's heap.
        torch.device(device).type == "cpu"
        and max(sum(p.numel() for p in flow.parameters()) for flow in flows) > LARGE
    ):
        return_freed_memory()


def return_freed_memory() -> bool:
    """Make glibc return every freed block of 8 MiB or more to the system at once, for the rest of this
    process.

    By default glibc adapts its threshold and keeps freed blocks of up to 32 MiB in a heap. The few tensors
    that are kept between a network's blocks then fragment this heap: a pass over TRELLIS's flows grew by 15
    times what it keeps. Smaller blocks, such as tiles of attention, are made by the thousand; up to 64 MiB of
    free memory stay available for them.

    Returns: False if there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # Parameters -3 and -1 are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h, in bytes.
    return bool(mallopt(-3, 8 << 20) and mallopt(-1, 64 << 20))
