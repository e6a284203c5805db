"""Assets as latents of the bundled generator: its shapes, moved through its own latent space.

A reward that learned from this generator's shapes is asked about nothing else. Letters: A assets, L layers of
ws, W w_dim, P points.
"""

import functools
from collections.abc import Sequence
from typing import cast

import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.generators.assets.asset import Asset, sparsity
from eg3d_rlhf.generators.eg3d import PlaneField

_PROBES = 16  # grid points per edge at which regularisers read the density


@functools.cache
def _bundled() -> LoadedGenerator:
    return load_generator()


class Latents(Asset):
    """The fields of ws [A, L, W], a latent for each layer; starts at the generator's mean latent."""

    kind = "latents"

    def __init__(self, assets: int, generator: str | None = None):
        """Args: generator: SHA-256 of the state that the latents are of; None: that of the bundled one.

        Raises: ValueError for another.
        """
        super().__init__()
        if generator not in (None, _bundled().hash):
            bundled = _bundled().hash[:12]
            raise ValueError(
                f"Latents: expected those of the bundled generator {bundled}, got {generator:.12}. Bring its"
                " file."
            )
        mean = ws_of_seeds(_bundled().generator, [0], truncation_psi=0.0)
        self.ws = torch.nn.Parameter(mean.repeat(assets, 1, 1))

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> "Latents":
        """The generator's shapes of seeds."""
        made = cls(len(seeds))
        with torch.no_grad():
            made.ws.copy_(ws_of_seeds(_bundled().generator, seeds))
        return made

    @property
    def settings(self) -> dict:
        """See `Asset`."""
        return {"generator": _bundled().hash}

    @property
    def samples(self) -> int:
        """Along the cube; planes have 64 texels."""
        return 48

    @property
    def generator(self) -> Generator:
        """Whose latents these are."""
        return _bundled().generator

    @property
    def field(self) -> PlaneField:
        """Synthesised now."""
        return cast(PlaneField, self.generator.field(self.ws))

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Asset`."""
        return self.field.decode(points)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """See `Field`."""
        return self.field.density_grid(grid)

    def regularisers(self) -> dict[str, torch.Tensor]:
        """'sparsity' and 'opacity' on a coarse grid, see `sparsity`; 'roughness', the mean squared step
        between the layers' latents.
        """
        probes = SlabSpec.of(self.bounds, _PROBES)
        return {
            **sparsity(self.density_grid(probes), probes.voxel),
            "roughness": self.ws.diff(dim=1).square().flatten(1).mean(dim=1),
        }

    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """See `Asset`."""
        return {"grid": [self.ws]}
