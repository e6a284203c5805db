"""The σ slab of arXiv 2606.27305: raw density on a box of grid points, each shape on its own scale.

Letters: N shapes, D, H, W = grid points along z, y, x.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from eg3d_rlhf.field import Field
from eg3d_rlhf.observations import Observation, register
from eg3d_rlhf.sigma.slab import normalise_slab
from eg3d_rlhf.sigma.spec import SlabSpec

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

_RESOLUTION = 64  # grid points per axis of the cube; the paper's crop then leaves a slab of 33 x 36 x 32


@register
@dataclass(frozen=True)
class SigmaSlab(Observation):
    """Slabs [N, 1, D, H, W] in [0, value_max] at the points of `spec`."""

    spec: SlabSpec = SlabSpec()
    kind: ClassVar[str] = "sigma"

    @classmethod
    def of(  # type: ignore[override]  # its keywords are its own
        cls, generator: "Generator", *, resolution: int = _RESOLUTION, crop: tuple[float, float, float, float, float, float] | None = None
    ) -> Self:
        """Args: resolution: grid points per axis of the whole cube; crop: shares trimmed from each face (x, x, y, y, z, z), the paper's."""
        return cls(SlabSpec.of(generator.bounds, resolution, crop=SlabSpec.crop if crop is None else tuple(crop)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, D, H, W)."""
        return (1, *self.spec.shape)

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`. A constant slab gives zeros with zero gradient."""
        return normalise_slab(field.density_grid(self.spec), self.spec.value_max).unsqueeze(1)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Left and right are exchanged with probability one half."""
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None, None], observed.flip(-1), observed)

    def misfits(self, generator: "Generator") -> list[str]:
        """The scene cube must be the generator's."""
        bounds = generator.bounds
        pairs = (("box_warp", self.spec.box_warp, bounds.side), ("centre", self.spec.centre, bounds.centre))
        return [f"{name} {mine}, got {theirs}" for name, mine, theirs in pairs if mine != theirs]

    def to_dict(self) -> dict[str, Any]:
        """See `Observation`."""
        return {"kind": self.kind, **self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """See `Observation`."""
        return cls(SlabSpec.from_dict(values))
