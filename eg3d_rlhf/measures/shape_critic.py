"""A second opinion on shapes, learnt from pictures of normals alone: the shape critic, and the features of the shape Fréchet distance.

Two small networks of one kind read normal maps (normal_maps.py). The critic tells true heads from shapes of early generators; its score is
the logit that a shape is a true head, averaged over views. The other one learnt the family's shape parameters from true heads alone and saw
no generator: its penultimate layer, standardised over true heads, is the feature of the Fréchet distance. Judges alone may read this file,
never an annotator, a reward or an early stop (tests/test_structure.py).
Letters: N shapes, F views, Q features, K true heads, S shape parameters, R pixels.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.measures.normal_maps import CHANNELS, RESOLUTION
from training import storage
from training.heads.family import SHAPE_COUNT

DEFAULT_ASSET = ASSETS / "critic.safetensors"
KIND = "shape critic"
WIDTHS = (CHANNELS, 12, 24, 40, 48)
FEATURES = 32  # Q


class MapNet(nn.Module):
    """Four strided convolutions, a hidden layer and a linear output; 55 thousand parameters."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], size, stride=2, padding=size // 2), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [B, 4, R, R] -> [B, 48, R/16, R/16]
        self.hidden = nn.Linear(WIDTHS[-1] * (RESOLUTION // 16) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def penultimate(self, maps: Tensor) -> Tensor:
        """[B, Q] of maps [B, 4, R, R]."""
        return functional.silu(self.hidden(self.trunk(maps).flatten(1)))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, outputs]."""
        return self.head(self.penultimate(maps))


class ShapeCritic:
    """The two networks, the features of true heads that neither saw, and the record of their training."""

    def __init__(self, critic: MapNet, features: MapNet, true: Tensor, scale: Tensor, record: dict) -> None:
        self.critic, self.features_net = (net.eval().requires_grad_(False) for net in (critic, features))
        self.true, self.scale = true, scale  # [K, Q] features of true heads; [2, Q] mean and deviation of their raw ones
        self.record = record

    @torch.no_grad()
    def logits(self, maps: Tensor) -> Tensor:
        """Logit [N] that each shape is a true head, of maps [N, F, 4, R, R]; the mean over views. Higher is better."""
        return self.critic(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=(1, 2))

    @torch.no_grad()
    def features(self, maps: Tensor) -> Tensor:
        """Features [N, Q] of maps [N, F, 4, R, R], in deviations of true heads; the mean over views."""
        raw = self.features_net.penultimate(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).mean(dim=1)
        return (raw - self.scale[0]) / self.scale[1]

    def to(self, device: torch.device) -> "ShapeCritic":
        """Move the networks; returns self."""
        self.critic.to(device)
        self.features_net.to(device)
        self.scale = self.scale.to(device)
        return self

    def save(self, path: Path) -> None:
        """Write the networks and features at `path`, and the record as JSON beside them."""
        tensors = {f"{name}.{key}": value for name, net in self._nets().items() for key, value in net.state_dict().items()}
        storage.write_tensors(path, KIND, {**tensors, "true": self.true, "scale": self.scale}, self.record)
        storage.write_atomic(path.with_suffix(".json"), (json.dumps(self.record, indent=1, sort_keys=True) + "\n").encode())

    def _nets(self) -> dict[str, MapNet]:
        return {"critic": self.critic, "features": self.features_net}

    @classmethod
    def load(cls, path: Path = DEFAULT_ASSET) -> "ShapeCritic":
        """Read a file that `save` wrote. Raises: FileNotFoundError; ValueError for a damaged or foreign file."""
        tensors, record = storage.read_tensors(path, KIND)
        nets = {"critic": MapNet(1), "features": MapNet(SHAPE_COUNT)}
        for name, net in nets.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            storage.load_strict(net, own, str(path))
        return cls(nets["critic"], nets["features"], tensors["true"], tensors["scale"], record)
