"""Make networks, inputs and pictures for make_<family>.py, which write sets of reference values."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import shared_copy, write_adapter
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis import blocks
from tests.compat.family_reference import plain_rates


class Maker:
    """Random draws of one generator, and values by name, which `write` stores."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.values: dict[str, np.ndarray] = {}

    def put(self, **values) -> None:
        """Add values by name; "__" stands for a slash."""
        self.add({name.replace("__", "/"): value for name, value in values.items()})

    def add(self, values: Mapping[str, object], prefix: str = "") -> None:
        for name, value in values.items():
            self.values[prefix + name] = (
                value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.asarray(value)
            )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **self.values)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=self.generator)

    def times(self, count: int) -> torch.Tensor:
        return 0.02 + 0.96 * torch.rand(count, generator=self.generator)

    def fill(self, model: nn.Module, gain: float = 1.0) -> nn.Module:
        """Set random weights: matrices scaled by gain / sqrt(fan-in), other parameters near their values."""
        for tensor in model.parameters():
            own = tensor.detach()
            drawn = self.normal(*own.shape)
            scale = gain / own[0].numel() ** 0.5 if own.ndim > 1 else 0.1
            own.copy_(scale * drawn + (own if own.ndim < 2 else 0))
        return model.eval()

    def voxels(self, counts: Iterable[int], side: int) -> torch.Tensor:
        """Sample coords [V, 4] int32 of samples with so many voxels."""
        return torch.cat(
            [
                torch.nn.functional.pad(self._places(count, side), (1, 0), value=sample)
                for sample, count in enumerate(counts)
            ]
        ).int()

    def _places(self, count: int, side: int) -> torch.Tensor:
        chosen = torch.randperm(side**3, generator=self.generator)[:count].sort().values
        return torch.stack([chosen // side**2, chosen // side % side, chosen % side], 1)

    def picture(self, height: int, width: int, kind: str = "soft") -> np.ndarray:
        """Draw an ellipse of noise [h, w, 4], whose edge is soft or hard, or which is opaque."""
        y, x = (torch.linspace(-1, 1, size) for size in (height, width))
        far = (1.6 * y[:, None] ** 2 + 1.9 * x[None] ** 2).sqrt()
        opacity = (8 * (1 - far)).clamp(0, 1)
        opacity = {"hard": (far < 1).float(), "opaque": torch.ones_like(far)}.get(kind, opacity)
        colours = torch.rand(height, width, 3, generator=self.generator)
        return (255 * torch.cat([colours, opacity[..., None]], 2)).round().byte().numpy()

    def adapters(self, model: nn.Module, folder: Path, rank: int, alpha: float, targets) -> nn.Module:
        """Return a copy of the network with random adapters, which are written in PEFT's form."""
        tuned = shared_copy(model)
        add_lora(tuned, LoraConfig(rank=rank, alpha=alpha, targets=tuple(targets)), seed=self.seed)
        for tensor in lora_parameters(tuned):
            tensor.detach().copy_(self.normal(*tensor.shape, scale=0.15))
        write_adapter(tuned, folder)
        return tuned.eval()


def on(coords: torch.Tensor, feats: torch.Tensor, given: torch.Tensor | None = None) -> SparseBatch:
    return SparseBatch(coords.contiguous(), feats, int(coords[:, 0].max()) + 1, given=given)


def json_bytes(content: object) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def norm_of(model: nn.Module) -> torch.Tensor:
    """Compute the norm of all parameters' gradients."""
    grads = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(grads).sum().sqrt().float()


@contextmanager
def as_the_references() -> Iterator[None]:
    """Use the rates of time that the tests use."""
    rates = plain_rates()
    own = blocks.time_rates
    with mock.patch.object(blocks, "time_rates", lambda count: rates if count == len(rates) else own(count)):
        yield
