"""Load anything that names a network, and draw latents from it.

Letters: N batch, Z z_dim, K c_dim (25), L num_ws, W w_dim.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf import bundled, pickles
from training import networks
from training.rendering.cameras import LookAtPoseSampler, intrinsics_matrix, pack_label
from training.triplane import TriPlaneGenerator

FFHQ_FOCAL = 4.2647


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
    """A frozen generator and its identity."""

    G: TriPlaneGenerator  # the moving average, in eval mode
    hash: str  # SHA-256 of its state
    path: Path
    nets: networks.Networks  # with G and D where the file holds them

    @property
    def config(self) -> dict:
        """Constructor arguments of G."""
        return self.nets.G_kwargs


def load_generator(source: str | Path | None = None, device: str | torch.device = "cpu") -> LoadedGenerator:
    """Load a network.

    Args:
        source: a network file (ours, or a pickle of EG3D, which is read without running it), a run folder (its newest network snapshot),
            or None for the bundled generator.
    Raises: FileNotFoundError, ValueError.
    """
    path = find_network(source)
    nets = load_networks(path, device)
    return LoadedGenerator(nets.G_ema, networks.state_hash(nets.G_ema), path, nets)


def load_networks(path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None) -> networks.Networks:
    """`training.networks.load` for our files, `pickles.load` for EG3D's .pkl; see there."""
    load = pickles.load if Path(path).suffix.lower() == ".pkl" else networks.load
    return load(path, device, freeze_layers)


def find_network(source: str | Path | None) -> Path:
    """The network file that `source` names; see `load_generator`."""
    if source is None:
        if not bundled.GENERATOR.exists():
            raise FileNotFoundError(f"bundled generator: expected {bundled.GENERATOR}, got nothing. Restore assets/ from the repository.")
        return bundled.GENERATOR
    path = Path(source)
    if path.is_dir():
        snapshots = sorted(path.glob("network-snapshot-*.safetensors")) or sorted(path.glob("network-snapshot-*.pkl"))
        if not snapshots:
            raise FileNotFoundError(
                f"network: expected a network-snapshot-*.safetensors or .pkl in {path}, got none. Name a file or another run."
            )
        return snapshots[-1]
    return path


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """z [N, Z] of integer seeds: RandomState(seed).randn(z_dim), as the field's labels refer to them."""
    return torch.from_numpy(np.stack([np.random.RandomState(int(s)).randn(z_dim) for s in seeds]).astype(np.float32))


def camera(G: TriPlaneGenerator, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, focal: float = FFHQ_FOCAL) -> torch.Tensor:
    """Camera labels [N, 25] looking at the generator's pivot; yaw and pitch in radians about frontal."""
    kwargs = G.rendering_kwargs
    device = next(G.parameters()).device
    pivot = torch.tensor(kwargs.get("avg_camera_pivot", [0, 0, 0]), dtype=torch.float32, device=device)
    radius = kwargs.get("avg_camera_radius", 2.7)
    half_pi = float(np.pi / 2)
    pose = LookAtPoseSampler.sample(half_pi + yaw, half_pi + pitch, pivot, radius=radius, device=device)
    label = pack_label(pose, intrinsics_matrix(focal, device=device).reshape(1, 3, 3))
    return label.expand(n, -1)


@torch.no_grad()
def ws_of_seeds(
    G: TriPlaneGenerator, seeds: Sequence[int], truncation_psi: float = 1.0, truncation_cutoff: int | None = 14
) -> torch.Tensor:
    """ws [N, L, W] of seeds, conditioned on the frontal camera. Not differentiable."""
    device = next(G.parameters()).device
    z = latents(seeds, G.z_dim).to(device)
    return G.mapping(z, camera(G, n=len(z)), truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
