"""Generators as the rest of the package meets them, and the registry of their families.

A family is one file of this folder, or a plugin's (see docs/extending.md): a network, and a class that fits
`Generator` around it. Network files name their family; `load_generator` reads them by that name.

Letters: N samples, Z z_dim, L layers of ws, W w_dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Bounds, CameraFamily, Field
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.generators import pickles
from training import networks


@runtime_checkable
class Generator(Protocol):
    """A network that turns latents into fields."""

    @property
    def architecture(self) -> str:
        """Name of the family."""

    @property
    def module(self) -> torch.nn.Module:
        """The network itself: its parameters, its state, its training mode."""

    @property
    def z_dim(self) -> int: ...

    @property
    def w_dim(self) -> int: ...

    @property
    def num_ws(self) -> int: ...

    @property
    def img_resolution(self) -> int:
        """Pixels per edge of the final image."""

    @property
    def bounds(self) -> Bounds:
        """Of its fields."""

    @property
    def level(self) -> float:
        """Raw density of the surface."""

    @property
    def cameras(self) -> CameraFamily:
        """Where it was trained to be seen from."""

    @property
    def conditioned(self) -> bool:
        """Whether the mapping reads the camera."""

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """z [N, Z], conditioning camera c [N, 25] -> ws [N, L, W]."""

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Field:
        """The shapes of ws [N, L, W], synthesised once, now. Noise modes: see
        `training.config.NOISE_MODES`.
        """


def count_of(generator: Generator) -> int | None:
    """How many shapes a generator has that can be counted (attribute `count`): seeds 0 to `count` - 1 name
    them, and no others do.
    """
    return getattr(generator, "count", None)


def check_seeds(generator: Generator, last: int, who: str) -> None:
    """Raise ValueError where seeds up to `last` are more than a generator has shapes."""
    count = count_of(generator)
    if count is not None and last >= count:
        raise ValueError(
            f"{who}: expected seeds 0 to {count - 1}, one for each shape of this network, got {last}. Choose"
            " smaller ones."
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network and how to use it."""

    name: str  # as network files name it
    module: type[torch.nn.Module]  # built from the arguments that a network file states
    discriminator: type[torch.nn.Module] | None  # None where the family cannot be trained here
    wrap: Callable[[Any], Generator]  # a network -> what the package speaks to


FAMILIES: Registry[Family] = Registry(
    "generator family",
    {
        "eg3d": "eg3d_rlhf.generators.eg3d",
        "hyplanehead": "eg3d_rlhf.generators.full_heads",
        "panohead": "eg3d_rlhf.generators.full_heads",
        "spherehead": "eg3d_rlhf.generators.full_heads",
        "assets": "eg3d_rlhf.generators.assets.asset",
    },
)
# in a run folder: the snapshot that an early stop chose (eg3d_rlhf.tuning.gan.early_stop)
KEPT = "network-kept.safetensors"


def register(family: Family) -> Family:
    """Make a family known by its name and by the type of its networks."""
    return FAMILIES.add(family.name, family)


def classes_of(architecture: str) -> networks.Classes:
    """G and D of the family called so. Raises: ValueError naming those that are known."""
    family = FAMILIES[architecture]
    return family.module, family.discriminator


def of(network: Any) -> Generator:
    """A network as a `Generator`, by the family of its type; a Generator comes back as it is.

    Raises: TypeError for a network of no known family.
    """
    if not isinstance(network, torch.nn.Module):
        return network
    kinds = {family.module: family for family in FAMILIES.values()}
    for kind in type(network).__mro__:  # families may build upon each other
        if kind in kinds:
            return kinds[kind].wrap(network)
    raise TypeError(
        f"generator: expected a network of a known family ({', '.join(FAMILIES)}), got"
        f" {type(network).__name__}"
    )


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
    """A frozen generator and its identity."""

    generator: Generator  # the moving average, in eval mode
    hash: str  # SHA-256 of its state
    path: Path
    nets: networks.Networks  # with G and D where the file holds them

    @property
    def G(self) -> torch.nn.Module:
        """The network itself."""
        return self.generator.module


def load_generator(source: str | Path | None = None, device: str | torch.device = "cpu") -> LoadedGenerator:
    """Load a network.

    Args:
        source: a network file (ours, or a pickle of EG3D, which is read without running it), a run folder
            (the snapshot that it kept, else its newest), or None for the bundled generator.
    Raises: FileNotFoundError, ValueError.

    >>> load_generator().generator.z_dim
    64
    """
    path = find_network(source)
    nets = load_networks(path, device)
    return LoadedGenerator(of(nets.G_ema), networks.state_hash(nets.G_ema), path, nets)


def load_networks(
    path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None
) -> networks.Networks:
    """`training.networks.load` for our files, `pickles.load` for EG3D's .pkl; see there."""
    if Path(path).suffix.lower() == ".pkl":
        return pickles.load(path, device, freeze_layers)
    return networks.load(path, device, freeze_layers, classes_of)


def find_network(source: str | Path | None) -> Path:
    """The network file that `source` names; see `load_generator`."""
    if source is None:
        if not bundled.GENERATOR.exists():
            raise FileNotFoundError(
                f"bundled generator: expected {bundled.GENERATOR}, got nothing. Restore assets/ from the"
                " repository."
            )
        return bundled.GENERATOR
    path = Path(source)
    if path.is_dir():
        if (path / KEPT).is_file():
            return path / KEPT
        snapshots = sorted(path.glob("network-snapshot-*.safetensors")) or sorted(
            path.glob("network-snapshot-*.pkl")
        )
        if not snapshots:
            wanted = "a network-snapshot-*.safetensors or .pkl"
            raise FileNotFoundError(
                f"network: expected {wanted} in {path}, got none. Name a file or another run."
            )
        return snapshots[-1]
    return path


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """z [N, Z] of integer seeds: RandomState(seed).randn(z_dim), as the field's labels refer to them."""
    return torch.from_numpy(
        np.stack([np.random.RandomState(int(s)).randn(z_dim) for s in seeds]).astype(np.float32)
    )


def device_of(generator: Generator) -> torch.device:
    """Where the generator's parameters lie."""
    return next(generator.module.parameters()).device


def camera(
    generator: Any, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, focal: float | None = None
) -> torch.Tensor:
    """Camera labels [N, 25] of the generator's own camera family; yaw and pitch in radians about frontal."""
    generator = of(generator)
    cameras = generator.cameras if focal is None else dataclasses.replace(generator.cameras, focal=focal)
    return cameras.label(yaw, pitch, n, device_of(generator))


@torch.no_grad()
def ws_of_seeds(
    generator: Any, seeds: Sequence[int], truncation_psi: float = 1.0, truncation_cutoff: int | None = 14
) -> torch.Tensor:
    """ws [N, L, W] of seeds, conditioned on the frontal camera. Not differentiable.

    >>> ws_of_seeds(load_generator().generator, [1, 2], truncation_psi=0.7).shape[0]
    2
    """
    generator = of(generator)
    check_seeds(generator, max(seeds, default=0), "seeds")
    z = latents(seeds, generator.z_dim).to(device_of(generator))
    return generator.mapping(
        z, camera(generator, n=len(z)), truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff
    )
