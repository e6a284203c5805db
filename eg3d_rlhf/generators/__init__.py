"""Interface of generators for the rest of the package, and the registry of their families.

A family is one file of this folder or of a plugin (see docs/extending.md): a network, and a class around it
that implements `Generator`. A network file contains the name of its family, and `load_generator` finds the
reader by this name.

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
    """A network that maps latents to fields."""

    @property
    def architecture(self) -> str:
        """Return the name of the family."""

    @property
    def module(self) -> torch.nn.Module:
        """Return the network itself, with its parameters, buffers and training mode."""

    @property
    def z_dim(self) -> int: ...

    @property
    def w_dim(self) -> int: ...

    @property
    def num_ws(self) -> int: ...

    @property
    def img_resolution(self) -> int:
        """Return the pixels per edge of the final image."""

    @property
    def bounds(self) -> Bounds:
        """Return the cube that contains the shapes of its fields."""

    @property
    def level(self) -> float:
        """Return the raw density at the surface."""

    @property
    def cameras(self) -> CameraFamily:
        """Return the family of cameras that it was trained with."""

    @property
    def conditioned(self) -> bool:
        """Return True if the mapping network is conditioned on the camera."""

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Map z [N, Z] and conditioning cameras c [N, 25] to ws [N, L, W]."""

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Field:
        """Synthesise the shapes of ws [N, L, W] immediately. Noise modes: see
        `training.config.NOISE_MODES`.
        """


def count_of(generator: Generator) -> int | None:
    """Return the number of shapes of a generator with countably many (attribute `count`), else None.

    Seeds 0 to `count` - 1 are then the only valid ones.
    """
    # Most families have a continuous latent space and no such attribute.
    return getattr(generator, "count", None)


def check_seeds(generator: Generator, last: int, who: str) -> None:
    """Raise ValueError if seeds up to `last` exceed the number of a generator's shapes."""
    count = count_of(generator)
    if count is not None and last >= count:
        raise ValueError(
            f"{who}: expected seeds 0 to {count - 1}, one for each shape of this network, got {last}. Use"
            " smaller seeds."
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network, and the functions to use it."""

    name: str  # the name in network files
    module: type[torch.nn.Module]  # built from the arguments that a network file contains
    discriminator: type[torch.nn.Module] | None  # None: the family cannot be trained in this project
    wrap: Callable[[Any], Generator]  # makes a `Generator` from a network


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
# File in a run folder: the snapshot that early stopping selected (eg3d_rlhf.tuning.gan.early_stop).
KEPT = "network-kept.safetensors"


def register(family: Family) -> Family:
    """Add a family to the registry, under its name."""
    return FAMILIES.add(family.name, family)


def classes_of(architecture: str) -> networks.Classes:
    """Return the classes of G and D of a family. Raises: ValueError that lists the known names."""
    family = FAMILIES[architecture]
    return family.module, family.discriminator


def of(network: Any) -> Generator:
    """Wrap a network as a `Generator`, by the family of its type. A Generator is returned unchanged.

    Raises: TypeError for a network of no known family.
    """
    # Already a `Generator`.
    if not isinstance(network, torch.nn.Module):
        return network
    kinds = {family.module: family for family in FAMILIES.values()}
    # Subclasses first, because a family may extend another one
    for kind in type(network).__mro__:
        if kind in kinds:
            return kinds[kind].wrap(network)
    raise TypeError(
        f"generator: expected a network of a known family ({', '.join(FAMILIES)}), got"
        f" {type(network).__name__}"
    )


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
    """A frozen generator, with the hash that identifies it."""

    generator: Generator  # G_ema, the moving average of the weights, in eval mode
    hash: str  # SHA-256 of its state dict
    path: Path
    nets: networks.Networks  # includes G and D if the file contains them

    @property
    def G(self) -> torch.nn.Module:
        """Return the network itself."""
        return self.generator.module


def load_generator(source: str | Path | None = None, device: str | torch.device = "cpu") -> LoadedGenerator:
    """Load a network.

    Args:
        source: a network file (ours, or an EG3D pickle, which is parsed without running code in it); a run
            folder (its selected snapshot if there is one, else its newest); or None for the bundled
            generator.
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
    """Load all networks of a file: ours with `training.networks.load`, EG3D's .pkl with `pickles.load`."""
    # No code of the pickle is executed, see `pickles`.
    if Path(path).suffix.lower() == ".pkl":
        return pickles.load(path, device, freeze_layers)
    return networks.load(path, device, freeze_layers, classes_of)


def find_network(source: str | Path | None) -> Path:
    """Return the path of the network file for `source`; see `load_generator`."""
    if source is None:
        if not bundled.GENERATOR.exists():
            raise FileNotFoundError(
                f"bundled generator: expected {bundled.GENERATOR}, got no such file. Restore assets/ from the"
                " repository."
            )
        return bundled.GENERATOR
    path = Path(source)
    if path.is_dir():
        # The snapshot that early stopping selected is better than the newest one.
        if (path / KEPT).is_file():
            return path / KEPT
        # names contain the number of images with leading zeros, so the last one is the newest
        snapshots = sorted(path.glob("network-snapshot-*.safetensors")) or sorted(
            path.glob("network-snapshot-*.pkl")
        )
        if not snapshots:
            expected = "a network-snapshot-*.safetensors or .pkl"
            raise FileNotFoundError(
                f"network: expected {expected} in {path}, got none. Pass a network file or another run."
            )
        return snapshots[-1]
    return path


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """Return z [N, Z] of integer seeds: RandomState(seed).randn(z_dim), as EG3D's scripts do. Labels
    refer to them.
    """
    return torch.from_numpy(
        # float64 random numbers, rounded to float32 as in EG3D's gen_samples.py.
        np.stack([np.random.RandomState(int(s)).randn(z_dim) for s in seeds]).astype(np.float32)
    )


def device_of(generator: Generator) -> torch.device:
    """Return the device of the generator's parameters."""
    return next(generator.module.parameters()).device


def camera(
    generator: Any, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, focal: float | None = None
) -> torch.Tensor:
    """Return camera labels [N, 25] of the generator's camera family.

    Args: yaw, pitch: radians from frontal; focal: focal length over image size, by default the family's.
    """
    generator = of(generator)
    cameras = generator.cameras if focal is None else dataclasses.replace(generator.cameras, focal=focal)
    return cameras.label(yaw, pitch, n, device_of(generator))


@torch.no_grad()
def ws_of_seeds(
    generator: Any, seeds: Sequence[int], truncation_psi: float = 1.0, truncation_cutoff: int | None = 14
) -> torch.Tensor:
    """Map seeds to ws [N, L, W], conditioned on the frontal camera. Not differentiable.

    >>> ws_of_seeds(load_generator().generator, [1, 2], truncation_psi=0.7).shape[0]
    2
    """
    generator = of(generator)
    # Before synthesis, so that the error names the seeds.
    check_seeds(generator, max(seeds, default=0), "seeds")
    z = latents(seeds, generator.z_dim).to(device_of(generator))
    return generator.mapping(
        z, camera(generator, n=len(z)), truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff
    )
