"""Convert the surfaces of fields to patches of faces, which a mesh reward reads, differentiably.

    reader = MeshReader(cube(16), PatchOptions(patches=32, faces=32))
    patches = reader(field, step)         # differentiable in the parameters of the field
    reward.score(patches, prompts)

Two choices are made without a gradient: the edges of the lattice that the surface crosses, and the faces that
form a patch. They are made again at every rebuild, which happens every k steps. Between two rebuilds, every
crossing of the surface stays on its edge and moves along it. If the surface no longer crosses the edge, the
crossing stays at the end of the edge, without a gradient. Parts of the surface therefore appear and disappear
only at rebuilds, and topology has no gradient.

Shapes: V vertices of the lattice, P patches, F faces of a patch. A is the number of assets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.rewards.meshes.patchifiers import (
    Owners,
    Plan,
    compute_frames,
    features_in_frame,
    maps,
    patch_features,
    regions,
    vertex_normals,
)
from eg3d_rlhf.rewards.meshes.settings import PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import (
    Lattice,
    Net,
    closed_level,
    crossing_share,
    densities,
    net,
    net_mesh,
)

PATCHIFIERS = {"regions": regions, "maps": maps}  # by PatchOptions.kind


def make_plan(mesh: Mesh, options: PatchOptions) -> Plan:
    """Assign the faces of a mesh to patches, with the method `options.kind`."""
    return PATCHIFIERS[options.kind](mesh, options.patches, options.faces)


def compute_patches(vertices: torch.Tensor, plan: Plan, options: PatchOptions) -> Patches:
    """Compute the patches [1, P, F, ...] of a mesh. Differentiable in the vertices.

    Args:
        vertices: positions [N, 3] of the mesh's vertices.
        plan: faces of each patch, the result of `make_plan`.
        options: settings of the patches.
    """
    return patch_features(vertices, plan, options.area, options.place)


def concatenate(patches: Sequence[Patches]) -> Patches:
    """Concatenate patches [A, P, F, ...] of several batches of meshes along the first axis."""
    return Patches(*(torch.cat(tensors) for tensors in zip(*patches, strict=True)))


def compute_mesh_patches(meshes: Sequence[Mesh], options: PatchOptions) -> Patches:
    """Compute the patches [A, P, F, ...] of meshes. Differentiable in the vertices."""
    return concatenate([compute_patches(mesh.vertices, make_plan(mesh, options), options) for mesh in meshes])


class AssetChoices(NamedTuple):
    """Discrete choices for one asset (edges of the lattice that the surface crosses, faces of each patch).

    These choices, and the normals, do not change between two rebuilds.
    """

    is_inside: torch.Tensor  # bool [V], True for vertices of the lattice inside the surface
    normals: torch.Tensor  # normals [N', 3] at the vertices of the plan's faces
    net: Net  # edges of the lattice that the surface crosses, and the mesh that they give
    plan: Plan  # faces of each patch


class _BatchChoices(NamedTuple):
    """Discrete choices (see `AssetChoices`) for all assets, concatenated.

    Shapes: N crossings of all assets, U vertices of all meshes, M faces of all meshes.
    """

    # Indices [2 N] into levels [A * V]: the start points of all crossed edges, followed by their end points
    ends: torch.Tensor
    net: Net  # net of all assets; its vertex 0 is fixed and belongs to no asset
    # Indices [U, 3] of the net's vertices, and weights [U, 3, 1] with which they give the U vertices; None if
    # the U vertices are the net's vertices
    mixture: tuple[torch.Tensor, torch.Tensor] | None
    faces: torch.Tensor  # [M, 3] indices of the U vertices
    owners: Owners  # asset of each of the U vertices and M faces
    corners: torch.Tensor  # [A, P, F, 3] indices of the U vertices at the corners of the patches' faces
    corner_normals: torch.Tensor  # [A, P, F, 3, 3] normals at these corners
    mask: torch.Tensor  # bool [A, P], False for patches that do not exist


class MeshReader:
    """Converter of fields to patches, which is called once per step of an optimisation.

    At a rebuild, the edges of the lattice that the surface crosses and the faces of each patch are chosen
    again. `state_dict` and `load_state_dict` store and restore the choices of the last rebuild, so that an
    interrupted run resumes exactly.

    Args:
        lattice: lattice on which surfaces are extracted, made by `cube`.
        options: settings of the patches.
        rebuild_interval: number of steps between two rebuilds. At the default learning rate, a vertex needs
            more than 20 steps to leave its edge.
    """

    def __init__(self, lattice: Lattice, options: PatchOptions, rebuild_interval: int = 20):
        self.lattice = lattice
        self.options = options
        self.rebuild_interval = rebuild_interval
        self.choices: list[AssetChoices] = []
        self._batch: _BatchChoices | None = None

    def __call__(self, field: Field, step: int) -> Patches:
        """Compute the patches [A, P, F, ...] of the shapes of a field.

        Edges and patches are chosen again at steps that are multiples of `rebuild_interval`. Differentiable
        in the parameters of the field, except that normals at vertices are constant between two rebuilds.

        Args:
            field: field of A shapes.
            step: number of the step, from 0.
        """
        density = densities(field, self.lattice)  # [A, V]
        # If the number of shapes has changed, the choices of the last rebuild cannot be used.
        if step % self.rebuild_interval == 0 or len(self.choices) != len(density):
            self.choices = self._rebuild(density.detach(), field.level)
            self._batch = None
        # The choices are concatenated at the first call after a rebuild.
        self._batch = concatenated = self._batch or self._concatenate()
        level = closed_level(field.level - density, self.lattice)
        # Levels [N] at both ends of the crossed edges, and the share of each edge at which the level is 0
        start_level, end_level = level.flatten().index_select(0, concatenated.ends).view(2, -1)
        vertices = concatenated.net.vertices(crossing_share(start_level, end_level))
        if concatenated.mixture is not None:
            mixture_indices, mixture_weights = concatenated.mixture
            vertices = (vertices[mixture_indices] * mixture_weights).sum(dim=1)
        frames_and_areas = compute_frames(
            Mesh(vertices, concatenated.faces), concatenated.owners, self.options.place
        )
        face_corners = vertices.index_select(0, concatenated.corners.flatten()).view(
            *concatenated.corners.shape, 3
        )
        return Patches(
            *features_in_frame(
                face_corners, concatenated.corner_normals, *frames_and_areas, self.options.area
            ),
            concatenated.mask,
        )

    @torch.no_grad()
    def _rebuild(self, density: torch.Tensor, level: float) -> list[AssetChoices]:
        """Compute the choices for all assets: new normals, and new nets and plans of changed surfaces.

        A net contains the edges of the lattice that the surface crosses, and a plan the faces of each patch.
        Both stay valid as long as the surface crosses the same edges.

        Args:
            density: raw densities [A, V] at the vertices of the lattice.
            level: raw density at the surface.
        """
        new_choices = []
        for i, asset_density in enumerate(density):
            levels = closed_level(level - asset_density, self.lattice)
            previous_choice = self.choices[i] if len(self.choices) == len(density) else None
            if previous_choice is not None and torch.equal(previous_choice.is_inside, levels < 0):
                # With equal signs the surface crosses the same edges, so net and plan are still valid.
                asset_net = previous_choice.net
                plan = previous_choice.plan
                mesh = net_mesh(levels, self.lattice, asset_net)
            else:
                asset_net = net(levels, self.lattice)
                mesh = net_mesh(levels, self.lattice, asset_net)
                plan = make_plan(mesh, self.options)
            normals = vertex_normals(plan.mixed(mesh.vertices), plan.faces)
            new_choices.append(AssetChoices(levels < 0, normals, asset_net, plan))
        return new_choices

    @torch.no_grad()
    def _concatenate(self) -> _BatchChoices:
        """Concatenate the choices for all assets, and return them.

        The corners of all faces of an asset without a surface are the fixed vertex 0.
        """
        lattice_vertices = self.lattice.vertices
        device = lattice_vertices.device
        patch_shape = (self.options.patches, self.options.faces, 3)
        nets = []
        mixture_sources = []
        mixture_weights = []
        faces = []
        corners = []
        corner_normals = []
        vertex_and_face_counts = []
        has_mixture = any(asset_choices.plan.source is not None for asset_choices in self.choices)
        # Index of the first vertex of the next asset, among the vertices of all nets and among the U
        # vertices. Index 0 is the fixed vertex.
        net_offset = 1
        vertex_offset = 1
        for i, (_, normals, asset_net, plan) in enumerate(self.choices):
            nets.append(
                (
                    asset_net.edges + i * len(lattice_vertices),
                    asset_net.corners + net_offset,
                    asset_net.row + 3 * net_offset,
                    asset_net.reach,
                    asset_net.base,
                )
            )
            if plan.source is not None and plan.weight is not None:
                mixture_sources.append(plan.source + net_offset)
                mixture_weights.append(plan.weight)
            if len(plan.faces):
                asset_corners = plan.faces[plan.select]  # [P, F, 3]
                corner_normals.append(normals[asset_corners])
                corners.append(asset_corners + vertex_offset)
            else:
                corner_normals.append(lattice_vertices.new_zeros(*patch_shape, 3))
                corners.append(torch.zeros(patch_shape, dtype=torch.int64, device=device))
            faces.append(plan.faces + vertex_offset)
            vertex_and_face_counts.append((len(normals), len(plan.faces)))
            # `base_coordinates` contains three coordinates per vertex.
            net_offset = net_offset + len(asset_net.base) // 3
            vertex_offset = vertex_offset + len(normals)
        edges, net_corners, coordinate_rows, reach, base_coordinates = (
            torch.cat(tensors) for tensors in zip(*nets, strict=True)
        )
        asset_index = torch.arange(len(self.choices), device=device)
        # The index of its asset, once for each vertex [U] and for each face [M] of the batch
        vertex_asset, face_asset = (
            asset_index.repeat_interleave(torch.tensor(counts_by_asset, device=device))
            for counts_by_asset in zip(*vertex_and_face_counts, strict=True)
        )
        # Three times the index of the fixed vertex, which is also the row of its mixture
        fixed_vertex = torch.zeros(1, 3, dtype=torch.int64, device=device)
        mixture = None
        if has_mixture:
            fixed_weight = lattice_vertices.new_zeros(1, 3)
            mixture = (
                torch.cat([fixed_vertex, *mixture_sources]),
                torch.cat([fixed_weight, *mixture_weights])[..., None],
            )
        return _BatchChoices(
            ends=edges.T.flatten(),
            net=Net(
                edges,
                net_corners,
                coordinate_rows,
                reach,
                torch.cat([base_coordinates.new_zeros(3), base_coordinates]),
            ),
            mixture=mixture,
            faces=torch.cat(faces),
            # The fixed vertex counts as a vertex of asset 0.
            owners=Owners(len(self.choices), torch.cat([fixed_vertex[0, :1], vertex_asset]), face_asset),
            corners=torch.stack(corners),
            corner_normals=torch.stack(corner_normals),
            mask=torch.stack([asset_choices.plan.mask for asset_choices in self.choices]),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the choices of the last rebuild as tensors by name, for a run that resumes."""
        state_tensors: dict[str, torch.Tensor] = {}
        for i, (is_inside, normals, asset_net, plan) in enumerate(self.choices):
            # The keys are those of stored runs.
            choices = {"inside": is_inside, "around": normals, **asset_net._asdict(), **plan._asdict()}
            state_tensors |= {f"{i}.{name}": value for name, value in choices.items() if value is not None}
        return state_tensors

    def load_state_dict(self, state_tensors: dict[str, torch.Tensor]) -> None:
        """Restore the choices that `state_dict` returned."""
        self.choices = []
        self._batch = None
        get_tensor = state_tensors.get
        # Names begin with the index of the asset. The state does not contain fields that are None.
        while (prefix := f"{len(self.choices)}.") + "inside" in state_tensors:
            # The stored values have the types of the fields, which mypy cannot verify.
            asset_net = Net(*(get_tensor(prefix + name) for name in Net._fields))  # type: ignore[arg-type]
            plan = Plan(*(get_tensor(prefix + name) for name in Plan._fields))  # type: ignore[arg-type]
            is_inside = state_tensors[prefix + "inside"]
            normals = state_tensors[prefix + "around"]
            self.choices.append(AssetChoices(is_inside, normals, asset_net, plan))
