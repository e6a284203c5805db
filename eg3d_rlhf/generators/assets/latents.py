"""Assets as latents of the bundled generator: score distillation moves its shapes in its latent space.

A reward that was trained on shapes of this generator is then evaluated only on such shapes.

Letters: A assets, L layers of ws, W w_dim, P points.
"""

import functools
from collections.abc import Sequence
from typing import cast

import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.generators.assets.asset import Asset, sparsity
from eg3d_rlhf.generators.eg3d import PlaneField

_PROBES = 16  # grid points per edge at which regularisers evaluate the density


@functools.cache
def _bundled() -> LoadedGenerator:
    """Load the bundled generator once per process."""
    return load_generator()


class Latents(Asset):
    """Fields of ws [A, L, W], a latent for each layer. The initial value is the generator's mean latent."""

    kind = "latents"

    def __init__(self, assets: int, generator: str | None = None):
        """Create latents.

        Args: generator: SHA-256 of the generator's state; None: the bundled generator's.
        Raises: ValueError for another generator.
        """
        super().__init__()
        # Latents are meaningless for another network.
        if generator not in (None, _bundled().hash):
            bundled = _bundled().hash[:12]
            raise ValueError(
                f"Latents: expected latents of the bundled generator {bundled}, got those of {generator:.12}."
                " Restore the generator that they were made with to assets/."
            )
        # psi = 0 gives the mean latent for every seed
        mean = ws_of_seeds(_bundled().generator, [0], truncation_psi=0.0)
        # [A, L, W], every layer by itself (the W+ space)
        self.ws = torch.nn.Parameter(mean.repeat(assets, 1, 1))

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> "Latents":
        """Create latents of the generator's shapes of seeds."""
        asset = cls(len(seeds))
        with torch.no_grad():
            # In place, so that the parameter stays the same object.
            asset.ws.copy_(ws_of_seeds(_bundled().generator, seeds))
        return asset

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments, see `Asset`."""
        return {"generator": _bundled().hash}

    @property
    def samples(self) -> int:
        """Return the samples along a ray; planes have 64 texels."""
        return 48

    @property
    def generator(self) -> Generator:
        """Return the generator of these latents."""
        return _bundled().generator

    @property
    def field(self) -> PlaneField:
        """Synthesise the field of the present latents."""
        return cast(PlaneField, self.generator.field(self.ws))

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return density and colour, see `Asset`."""
        return self.field.decode(points)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density at grid points, see `Field`."""
        return self.field.density_grid(grid)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return the penalties [A].

        'sparsity' and 'opacity' on a coarse grid, see `sparsity`; 'roughness', the mean squared difference
        between latents of successive layers.
        """
        probes = SlabSpec.of(self.bounds, _PROBES)
        return {
            **sparsity(self.density_grid(probes), probes.voxel),
            "roughness": self.ws.diff(dim=1).square().flatten(1).mean(dim=1),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters by learning rate, see `Asset`."""
        return {"grid": [self.ws]}
