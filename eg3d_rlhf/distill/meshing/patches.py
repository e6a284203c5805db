"""From fields to patches that a mesh reward reads. Cuts and patches are chosen without gradient every k steps, and kept between.

    read = MeshReader(cube(16), PatchOptions(patches=32, faces=32))
    patches = read(field, step)           # differentiable in what made the field
    reward.score(patches, prompts)

Between rebuilds every vertex stays on its lattice edge and moves along it; one whose edge is no longer crossed waits at its end, without
gradient. A surface therefore neither appears nor vanishes until the next rebuild, and topology gets no gradient at all.
Letters: A assets, V vertices of the lattice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from eg3d_rlhf.distill.interfaces import Mesh, Patches
from eg3d_rlhf.distill.meshing.features import AREAS, PLACES, Plan, patch_features
from eg3d_rlhf.distill.meshing.lattice import Lattice
from eg3d_rlhf.distill.meshing.maps import maps
from eg3d_rlhf.distill.meshing.regions import regions
from eg3d_rlhf.distill.meshing.tetrahedra import closed_level, cut, densities, isovalues, on_edges
from eg3d_rlhf.field import Field

PATCHIFIERS = {"regions": regions, "maps": maps}


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """What a reward of meshes reads; its file says so."""

    kind: str = "regions"  # of PATCHIFIERS
    patches: int = 64
    faces: int = 64  # of a patch; a power of 4 for maps
    area: str = "share"  # of AREAS
    place: str = "centre"  # of PLACES: where centres are measured from

    def __post_init__(self) -> None:
        for name, known in (("kind", tuple(PATCHIFIERS)), ("area", AREAS), ("place", PLACES)):
            if getattr(self, name) not in known:
                raise ValueError(f"PatchOptions: expected {name} of {', '.join(known)}, got {getattr(self, name)!r}. Choose one.")
        if min(self.patches, self.faces) < 1:
            raise ValueError(f"PatchOptions: expected positive numbers, got {self.patches} patches of {self.faces} faces. Correct them.")

    def plan(self, mesh: Mesh) -> Plan:
        """Which faces stand in which patch."""
        return PATCHIFIERS[self.kind](mesh, self.patches, self.faces)

    def features(self, vertices: torch.Tensor, plan: Plan) -> Patches:
        """Patches [1, ...] of vertices [N, 3]. Differentiable in them."""
        return patch_features(vertices, plan, self.area, self.place)


def stacked(patches: Sequence[Patches]) -> Patches:
    """Patches of several meshes as one."""
    return Patches(*(torch.cat(parts) for parts in zip(*patches, strict=True)))


def patches_of(meshes: Sequence[Mesh], options: PatchOptions) -> Patches:
    """Patches [A, ...] of meshes, with plans of their own. Differentiable in vertices."""
    return stacked([options.features(mesh.vertices, options.plan(mesh)) for mesh in meshes])


class Held(NamedTuple):
    """What is kept between rebuilds for one asset."""

    isovalue: float
    edges: torch.Tensor  # [N, 2] int64, lattice vertices at the ends of each cut edge
    plan: Plan


class MeshReader:
    """Fields to patches. Call it with steps in order; `state_dict` and `load_state_dict` carry on where a run was cut off.

    Args: every: steps between rebuilds; isovalue: as `tetrahedra.extract` has it.
    """

    def __init__(self, lattice: Lattice, options: PatchOptions, isovalue: float | str | None = None, every: int = 10):
        if every < 1:
            raise ValueError(f"MeshReader: expected at least 1 step between rebuilds, got {every}. Raise it.")
        self.lattice, self.options, self.isovalue, self.every = lattice, options, isovalue, every
        self.held: list[Held] = []

    def __call__(self, field: Field, step: int) -> Patches:
        """Patches [A, ...] of a field of A shapes. Differentiable in what made the field. Rebuilds at multiples of `every`."""
        density = densities(field, self.lattice)  # [A, V]
        if step % self.every == 0 or len(self.held) != len(density):
            self.held = self._rebuilt(density.detach(), field.level)
        found = []
        for one, held in zip(density, self.held, strict=True):
            level = closed_level(held.isovalue - one, self.lattice)
            found.append(self.options.features(on_edges(level, self.lattice, held.edges), held.plan))
        return stacked(found)

    @torch.no_grad()
    def _rebuilt(self, density: torch.Tensor, level: float) -> list[Held]:
        held = []
        for one, iso in zip(density, isovalues(density, self.lattice, level, self.isovalue), strict=True):
            own = closed_level(iso - one, self.lattice)
            edges, faces = cut(own, self.lattice)
            held.append(Held(iso, edges, self.options.plan(Mesh(on_edges(own, self.lattice, edges), faces))))
        return held

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, as tensors by name."""
        found: dict[str, torch.Tensor] = {}
        for i, (iso, edges, plan) in enumerate(self.held):
            own = {"isovalue": torch.tensor(iso, dtype=torch.float64), "edges": edges, **plan._asdict()}
            found |= {f"{i}.{name}": value for name, value in own.items() if value is not None}
        return found

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.held = []
        while f"{len(self.held)}.edges" in state:
            own = {name: state.get(f"{len(self.held)}.{name}") for name in ("isovalue", "edges", *Plan._fields)}
            iso, edges = own.pop("isovalue"), own.pop("edges")
            assert iso is not None and edges is not None
            self.held.append(Held(float(iso), edges, Plan(**own)))  # type: ignore[arg-type]
