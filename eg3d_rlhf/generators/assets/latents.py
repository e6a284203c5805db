"""Assets that are latents of the bundled generator. Score distillation optimises the latents.

A reward that was trained on shapes of this generator is then evaluated only on shapes of this generator.

Shapes: A is the number of assets, L of style vectors of a shape, P of points, and W is w_dim.
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
    """Load the bundled generator. The result is cached for the process."""
    return load_generator()


class Latents(Asset):
    """Assets whose parameters are style vectors ws [A, L, W] of the bundled generator, one for each layer.

    The initial value is the generator's mean latent.
    """

    kind = "latents"

    def __init__(self, assets: int, generator: str | None = None):
        """Create assets with the generator's mean latent.

        Args:
            assets: number of assets A.
            generator: SHA-256 of the state dict of the generator to which stored latents belong; None: the
                latents are new, and nothing is checked.
        Raises: ValueError if `generator` is not the hash of the bundled generator.
        """
        super().__init__()
        # Latents of one network have no meaning for another network.
        if generator not in (None, _bundled().hash):
            raise ValueError(
                f"Latents: the latents belong to the generator {generator:.12}, but the bundled generator is"
                f" {_bundled().hash[:12]}. Restore the generator with the hash {generator:.12} to assets/."
            )
        # With a truncation psi of 0, every seed is mapped to the mean latent.
        mean_ws = ws_of_seeds(_bundled().generator, [0], truncation_psi=0.0)
        # [A, L, W]. Each layer has its own latent (the space W+).
        self.ws = torch.nn.Parameter(mean_ws.repeat(assets, 1, 1))

    @classmethod
    def from_seeds(cls, seeds: Sequence[int]) -> "Latents":
        """Create one asset per seed. Its style vectors are those of the bundled generator for this seed."""
        new_assets = cls(len(seeds))
        with torch.no_grad():
            # In place, so that the parameter remains the same object.
            new_assets.ws.copy_(ws_of_seeds(_bundled().generator, seeds))
        return new_assets

    @property
    def settings(self) -> dict:
        """Return the constructor's arguments other than `assets`, see `Asset`."""
        return {"generator": _bundled().hash}

    @property
    def samples(self) -> int:
        """Return the default number of samples along a ray."""
        return 48

    @property
    def generator(self) -> Generator:
        """Return the bundled generator, to which the latents belong."""
        return _bundled().generator

    @property
    def field(self) -> PlaneField:
        """Synthesise the shapes of the current style vectors."""
        return cast(PlaneField, self.generator.field(self.ws))

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density and colour, see `Asset`."""
        return self.field.decode(points)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density [A, D, H, W] at grid points, see `Field`."""
        return self.field.density_grid(grid)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return penalties by name, each [A], see `Asset`.

        'sparsity' and 'opacity' are computed on a coarse grid, see the function `sparsity`. 'roughness' is
        the mean squared difference between the latents of successive layers.
        """
        probe_grid = SlabSpec.from_bounds(self.bounds, _PROBES)
        return {
            **sparsity(self.density_grid(probe_grid), probe_grid.voxel),
            "roughness": self.ws.diff(dim=1).square().flatten(1).mean(dim=1),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters in groups with different learning rates, see `Asset`."""
        return {"grid": [self.ws]}
