"""What the families of flow generators share: half of their pipelines, small files, meshes, memory."""

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
LARGEST = 1 << 16  # bytes of a file that is looked into
ELSEWHERE = (
    "Where this is usual, the decoder is not the one that the flow was trained with: check its folder, and"
    " the conditions."
)
LARGE = 10**8  # parameters of a flow from which freed memory must go back to the system at once


class OpenedFolder:
    """Half of a `Pipeline` whose networks lie in a folder of a published layout: conditioning, latents'
    scales, decoders by name.

    Args:
        conditions: None where nothing is sampled; parts: reads a network, such as a decoder, by its name.
        scales: mean and std per channel of the latents of stages that are normalised.
    """

    def __init__(
        self,
        conditions: Conditions | None,
        parts: Callable[[str], nn.Module],
        device: str | torch.device,
        scales: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ):
        self.tokens = conditions
        self.device = device
        self.scales = scales
        self._parts = parts
        self._loaded = dict[str, nn.Module]()

    def part(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._parts(name).eval().requires_grad_(False).to(self.device)
        return self._loaded[name]

    def conditioning_key(self, stage: str) -> str | None:
        """Return the name of the tensor of a condition that a stage reads; None: all of it."""
        return None

    def check_tokens(self, stage: str, channels: int, remedy: str) -> None:
        """Raise ValueError for conditions without tokens [L, channels] for a stage."""
        if self.tokens is None:
            return
        form = self.tokens.form
        name = self.conditioning_key(stage)
        shape = form if name is None else form.get(name) if isinstance(form, Mapping) else None
        if not isinstance(shape, list) or len(shape) != 2 or shape[-1] != channels:
            expected = f"tokens [L, {channels}]{f' named {name!r}' if name else ''} for stage {stage!r}"
            source = f" of {self.tokens.encoder}" if self.tokens.encoder else ""
            raise ValueError(f"conditions: expected {expected}, got {form}{source}. {remedy}")

    def conditions(self, names: Sequence[str], stage: str) -> Any:
        """[N, L, E] of what a stage reads, or tensors by name.

        Raises: ValueError for names without an embedding.
        """
        assert self.tokens is not None
        return self._conditioning(self.tokens.select(names), stage)

    def no_condition(self, n: int, stage: str) -> Any:
        """[n, L, E], the empty condition, or its tensors by name."""
        assert self.tokens is not None
        return self._conditioning(self.tokens.null(n), stage)

    def _conditioning(self, condition: Any, stage: str) -> Any:
        name = self.conditioning_key(stage)
        return to_device(condition if name is None else condition[name], self.device)

    def normalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        """Latents [v, C] as decoders read them -> as the flow of a stage sees them."""
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return (feats - mean) / std

    def unnormalised(self, feats: torch.Tensor, stage: str = "latent") -> torch.Tensor:
        mean, std = (feats.new_tensor(values) for values in self.scales[stage])
        return feats * std + mean


def are_scales(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether latents can be normalised by these, per channel."""
    return len(mean) == len(std) and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)


class EncodingFolder(OpenedFolder, ABC):
    """One that has encoders of every stage."""

    def encode(self, assets: Sequence[Any]) -> Sequence[Mapping[str, Latent]]:
        """Return per asset the latents of its stages, each computed when it is first asked for."""
        return [Lazy(self.encodes(asset), functools.partial(self.encode_stage, asset)) for asset in assets]

    @abstractmethod
    def encodes(self, asset: Any) -> Sequence[str]:
        """Names of the stages that `encode_stage` has latents of."""

    @abstractmethod
    def encode_stage(self, asset: Any, stage: str) -> Latent:
        """An asset's latent of one stage: the mean of the encoder's distribution, as the stage's flow sees
        it.
        """


def embedding(things: Collection[T], unit: str) -> Iterable[T]:
    """What is embedded, with a bar."""
    return tqdm(things, desc="embedding", unit=unit, disable=None)


def mentions(path: Path, word: str) -> bool:
    """Whether a small text file is there and has a word in it."""
    return path.is_file() and path.stat().st_size <= LARGEST and word in path.read_text(errors="replace")


def read_json(path: Path) -> dict:
    """An object from a JSON file. Raises: ValueError with the path."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Restore the file.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}. Restore the file.")
    return content


def read_network(root: Path, files: tuple[str, str], make: Callable[..., nn.Module]) -> nn.Module:
    """The network of two files, its arguments as JSON and its tensors, strictly by name and shape.

    Raises: OSError, ValueError.
    """
    module = make(**read_json(root / files[0]))
    path = root / files[1]
    load_strict(module, read(path, str(path)), str(path))
    return module.eval()


def read_mesh(path: Path) -> Mesh:
    """A triangle mesh of one's own; see `load_mesh`."""
    from eg3d_rlhf.rewards.meshes.dataset import load_mesh  # only here: rewards take long to import

    return load_mesh(path)


def even_points(
    mesh: Mesh, side: float, count: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a mesh's surface [P, 3] in a cube about 0 with the longest side of its box, and the normals
    of their faces [P, 3]; float64.

    Raises: ValueError for a mesh without area.
    """
    vertices = mesh.vertices.double()
    low = vertices.amin(0)
    high = vertices.amax(0)
    corners = ((vertices - (low + high) / 2) * (side / (high - low).max()))[mesh.faces]  # [F, 3, 3]
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = cross.norm(dim=1)
    if not (bool(area.isfinite().all()) and float(area.sum()) > 0):
        raise ValueError("expected a mesh with area, got one without. Export the surface as triangles.")
    ends = area.cumsum(0)
    face = torch.searchsorted(ends, torch.rand(count, generator=draw, dtype=torch.float64) * ends[-1]).clamp(
        max=len(ends) - 1
    )
    u, v = torch.rand(2, count, 1, generator=draw, dtype=torch.float64)
    a, b, c = corners[face].unbind(1)
    return a + (1 - u.sqrt()) * (b - a) + u.sqrt() * v * (c - a), cross[face] / area[face, None]


def check_finite(who: str, x_0: Batch) -> None:
    """Raise ValueError, in the name of `who`, for latents that are not finite."""
    values = feats_of(x_0)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{who}: expected finite latents, got {bad} of {values.numel()} NaN or infinite. Use an earlier"
            " checkpoint."
        )


def never_empty(logits: torch.Tensor, who: str) -> torch.Tensor:
    """Occupancy of one structure with its likeliest voxel occupied at least; says so, the first time, where
    there would be none.

    Raises: EmptyStructure within `refusing_empty`.
    """
    if not bool((logits > 0).any()):
        refuse_empty(who, ELSEWHERE)
        notice_empty(who)
    return logits.where(logits != logits.amax(), logits.amax().clamp_min(1.0))


@functools.cache
def notice_empty(who: str) -> None:
    """Print the notice once in this process."""
    print_notice(f"{who}: the decoded structure is empty, and its likeliest voxel stands for it. {ELSEWHERE}")


def spare_memory(flows: Iterable[nn.Module], device: str | torch.device) -> None:
    """On a CPU have the memory that a large flow frees go back to the system at once."""
    if (
        torch.device(device).type == "cpu"
        and max(sum(p.numel() for p in flow.parameters()) for flow in flows) > LARGE
    ):
        return_freed_memory()


def return_freed_memory() -> bool:
    """Have glibc return every freed tensor of 8 MiB or more to the system, from now on in this process. False
    where there is no glibc.

    By itself glibc comes to keep freed blocks of up to 32 MiB for later, in a heap that the few tensors kept
    between a network's blocks then break into pieces too small to use: a pass over TRELLIS's flows grew by 15
    times what it keeps. Smaller ones, such as tiles of attention, are made by the thousand, and up to 64 MiB
    of free memory stay at hand for them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of glibc's malloc.h; bytes
    return bool(mallopt(-3, 8 << 20) and mallopt(-1, 64 << 20))
