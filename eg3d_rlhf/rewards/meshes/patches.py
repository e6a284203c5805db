"""Convert fields to patches that a mesh reward reads.

Which lattice edges are cut and which faces form a patch is decided without gradient every k steps, and kept
in between.

    read = MeshReader(cube(16), PatchOptions(patches=32, faces=32))
    patches = read(field, step)           # differentiable in what created the field
    reward.score(patches, prompts)

Between rebuilds, every crossing of the surface stays on its lattice edge and moves along it. A crossing whose
edge is no longer cut stays at the edge's end, without a gradient. A surface therefore does not appear or
disappear before the next rebuild, and topology has no gradient at all.
Letters: A assets, V vertices of the lattice, P patches, F faces of a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.rewards.meshes.patchifiers import (
    Owners,
    Plan,
    framed,
    maps,
    patch_features,
    regions,
    vertex_normals,
    whereabouts,
)
from eg3d_rlhf.rewards.meshes.settings import PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, Net, closed_level, crossed, densities, net, net_mesh

PATCHIFIERS = {"regions": regions, "maps": maps}  # by PatchOptions.kind


def plan_of(mesh: Mesh, options: PatchOptions) -> Plan:
    """Assign the faces of a mesh to patches."""
    return PATCHIFIERS[options.kind](mesh, options.patches, options.faces)


def features_of(vertices: torch.Tensor, plan: Plan, options: PatchOptions) -> Patches:
    """Compute the patches [1, ...] of vertices [N, 3]. Differentiable in the vertices."""
    return patch_features(vertices, plan, options.area, options.place)


def stacked(patches: Sequence[Patches]) -> Patches:
    """Concatenate the patches of several meshes."""
    return Patches(*(torch.cat(parts) for parts in zip(*patches, strict=True)))


def patches_of(meshes: Sequence[Mesh], options: PatchOptions) -> Patches:
    """Compute the patches [A, ...] of meshes, each with its own plan. Differentiable in vertices."""
    return stacked([features_of(mesh.vertices, plan_of(mesh, options), options) for mesh in meshes])


class Held(NamedTuple):
    """State of one asset that is kept between rebuilds."""

    inside: torch.Tensor  # [V] bool
    around: torch.Tensor  # [N', 3] normals at the vertices of the plan's faces
    net: Net  # cut edges, and the mesh that they give
    plan: Plan  # faces of each patch


class _Batch(NamedTuple):
    """State of all assets, concatenated.

    Letters: N crossings of A assets, U vertices of all meshes, M faces.
    """

    ends: torch.Tensor  # [2 N] indices into levels [A * V]: the first ends of cut edges, then the second ones
    net: Net  # of all assets; vertex 0 is a fixed one that belongs to no asset
    # indices [U, 3] of the net's vertices and weights [U, 3, 1]; None: the net's vertices are used themselves
    mixture: tuple[torch.Tensor, torch.Tensor] | None
    faces: torch.Tensor  # [M, 3] indices of the U vertices
    owners: Owners  # asset of each of the U vertices and M faces
    corners: torch.Tensor  # [A, P, F, 3] indices of the U vertices
    around: torch.Tensor  # [A, P, F, 3, 3] normals at the corners
    mask: torch.Tensor  # [A, P] bool; False: no such patch


class MeshReader:
    """Converter of fields to patches. Call it with steps in order.

    `state_dict` and `load_state_dict` continue an interrupted run.

    Args: lattice: a `cube`; every: steps between rebuilds. At the default learning rate, a vertex takes more
        than 20 steps to leave its edge.
    """

    def __init__(self, lattice: Lattice, options: PatchOptions, every: int = 20):
        self.lattice = lattice
        self.options = options
        self.every = every
        self.held: list[Held] = []
        self._batch: _Batch | None = None

    def __call__(self, field: Field, step: int) -> Patches:
        """Return patches [A, ...] of a field of A shapes. Rebuilds at multiples of `every`.

        Differentiable in what created the field, except that vertex normals are constant between rebuilds.
        """
        density = densities(field, self.lattice)  # [A, V]
        if step % self.every == 0 or len(self.held) != len(density):
            self.held = self._rebuilt(density.detach(), field.level)
            self._batch = None
        # Concatenated state, created at the first call after a rebuild
        self._batch = batch = self._batch or self._joined()
        level = closed_level(field.level - density, self.lattice)
        # Shares of the edges at which the level is 0 now
        vertices = batch.net.vertices(crossed(*level.flatten().index_select(0, batch.ends).view(2, -1)))
        if batch.mixture is not None:
            vertices = (vertices[batch.mixture[0]] * batch.mixture[1]).sum(dim=1)
        frame = whereabouts(Mesh(vertices, batch.faces), batch.owners, self.options.place)
        corner = vertices.index_select(0, batch.corners.flatten()).view(*batch.corners.shape, 3)
        return Patches(*framed(corner, batch.around, *frame, self.options.area), batch.mask)

    @torch.no_grad()
    def _rebuilt(self, density: torch.Tensor, level: float) -> list[Held]:
        """Compute vertex normals of all assets, and new nets and plans where signs have changed."""
        rebuilt = []
        for i, raw in enumerate(density):
            levels = closed_level(level - raw, self.lattice)
            past = self.held[i] if len(self.held) == len(density) else None
            # With equal signs, the same edges are cut, so the net and the plan are still valid.
            same = past is not None and torch.equal(past.inside, levels < 0)
            known = past.net if past is not None and same else net(levels, self.lattice)
            mesh = net_mesh(levels, self.lattice, known)
            plan = past.plan if past is not None and same else plan_of(mesh, self.options)
            rebuilt.append(
                Held(levels < 0, vertex_normals(plan.mixed(mesh.vertices), plan.faces), known, plan)
            )
        return rebuilt

    @torch.no_grad()
    def _joined(self) -> _Batch:
        """Concatenate the state of all assets. An asset without a surface reads vertex 0."""
        places = self.lattice.vertices
        shape = (self.options.patches, self.options.faces, 3)
        nets = []
        sources = []
        weights = []
        faces = []
        corners = []
        around = []
        counts = []
        mixed = any(held.plan.source is not None for held in self.held)
        # Numbers of the next free vertex, in nets and in meshes; 0 is the fixed vertex.
        first = 1
        new = 1
        for i, (_, normals, known, plan) in enumerate(self.held):
            nets.append(
                (
                    known.edges + i * len(places),
                    known.corners + first,
                    known.row + 3 * first,
                    known.reach,
                    known.base,
                )
            )
            if plan.source is not None and plan.weight is not None:
                sources.append(plan.source + first)
                weights.append(plan.weight)
            has_faces = len(plan.faces) > 0
            # [P, F, 3]
            pick = (
                plan.faces[plan.select]
                if has_faces
                else torch.zeros(shape, dtype=torch.int64, device=places.device)
            )
            around.append(normals[pick] if has_faces else places.new_zeros(*shape, 3))
            corners.append(pick + new if has_faces else pick)
            faces.append(plan.faces + new)
            counts.append((len(normals), len(plan.faces)))
            first = first + len(known.base) // 3
            new = new + len(normals)
        edges, cells, row, reach, base = (torch.cat(parts) for parts in zip(*nets, strict=True))
        index = torch.arange(len(self.held), device=places.device)
        of_vertices, of_faces = (
            index.repeat_interleave(torch.tensor(n, device=places.device)) for n in zip(*counts, strict=True)
        )
        still = torch.zeros(1, 3, dtype=torch.int64, device=places.device)  # indices of the fixed vertex 0
        return _Batch(
            ends=edges.T.flatten(),
            net=Net(edges, cells, row, reach, torch.cat([base.new_zeros(3), base])),
            mixture=(
                (torch.cat([still, *sources]), torch.cat([places.new_zeros(1, 3), *weights])[..., None])
                if mixed
                else None
            ),
            faces=torch.cat(faces),
            owners=Owners(len(self.held), torch.cat([still[0, :1], of_vertices]), of_faces),
            corners=torch.stack(corners),
            around=torch.stack(around),
            mask=torch.stack([held.plan.mask for held in self.held]),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, as tensors by name."""
        state: dict[str, torch.Tensor] = {}
        for i, (inside, around, known, plan) in enumerate(self.held):
            held = {"inside": inside, "around": around, **known._asdict(), **plan._asdict()}
            state |= {f"{i}.{name}": value for name, value in held.items() if value is not None}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.held = []
        self._batch = None
        # Names begin with the asset's number; None entries are missing in the state.
        while (first := f"{len(self.held)}.") + "inside" in state:
            parts = [
                part(*(state.get(first + name) for name in part._fields))  # type: ignore[arg-type]
                for part in (Net, Plan)
            ]
            inside = state[first + "inside"]
            around = state[first + "around"]
            self.held.append(Held(inside, around, *parts))  # type: ignore[arg-type]
