"""Rows: from a latent to a checked mesh.

Fast: everything that tools/export_mesh.py does but colours and writing. Reference: the density at every grid point, one synthesis and a
full decode for each million of points, marching cubes on the whole volume, and the same choice of the largest part, normals and checks. So
the checks count on both sides, although EG3D has none.
"""

import functools

import numpy as np
import torch
from scipy.spatial import cKDTree

from benchmarks import configurations
from benchmarks.rows import Agreement, Case, Outcome, Row, Target
from eg3d_rlhf.generators import load_generator, of
from eg3d_rlhf.sigma import SlabSpec
from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.mesh_checks import largest_part, vertex_normals
from eg3d_rlhf.sigma.mesh_export import Mesh, MeshOptions, check_mesh, export_mesh
from eg3d_rlhf.sigma.slab import sigma_grid

TINY = 24  # grid points per edge
WITHIN = 1e-4  # world units by which vertices of both meshes may lie apart: a twentieth of a grid step at 512


def mesh_case(device: str, tiny: bool, size: str, resolution: int) -> Case:
    """A mesh of `resolution` points per edge."""
    G = load_generator(None, device).G if size == "bundled" and not tiny else configurations.build(tiny, device)[0].G_ema
    ws, _ = configurations.latent(G, device)
    options = MeshOptions(resolution=TINY if tiny else resolution, colors=False)

    def fast() -> Outcome:
        mesh, _ = export_mesh(of(G).field(ws), options)
        return _outcome(mesh)

    def reference() -> Outcome:
        return _outcome(_export_pointwise(G, ws, options))

    return Case(fast=fast, reference=reference, compare=compare_meshes)


@torch.no_grad()
def _export_pointwise(G: torch.nn.Module, ws: torch.Tensor, options: MeshOptions) -> Mesh:
    """The whole volume, then what `export_mesh` does with a surface."""
    spec = SlabSpec.cube(options.resolution, float(G.rendering_kwargs["box_warp"]))
    vertices, faces = extract_mesh(sigma_grid(G, ws, spec)[0], spec, options.level)
    found = len(faces)
    vertices, faces, components = largest_part(vertices, faces)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces))
    check_mesh(mesh, of(G).field(ws), options, found, components)
    return mesh


def _outcome(mesh: Mesh) -> Outcome:
    return Outcome({"vertices": torch.from_numpy(mesh.vertices), "faces": torch.tensor(len(mesh.faces))})


def compare_meshes(fast: Outcome, reference: Outcome) -> Agreement:
    """Largest distance, in world units, from a vertex of one mesh to the nearest of the other; the order of vertices does not matter."""
    a, b = (outcome.outputs["vertices"].numpy() for outcome in (fast, reference))
    apart = max(cKDTree(b).query(a)[0].max(), cKDTree(a).query(b)[0].max()) if min(len(a), len(b)) else np.inf
    return Agreement(max_abs_error=float(apart), relative_error=float(apart))


ROWS = [
    Row(
        name="mesh 512^3, from a latent", size="full", make=functools.partial(mesh_case, size="full", resolution=512), seconds=320,
        target=Target(at_least=15, aim=40, memory_mb_below=4000), tolerance=WITHIN, meter_in_round=True,
    ),
    Row(
        name="mesh 128^3, from a latent", size="bundled", make=functools.partial(mesh_case, size="bundled", resolution=128), seconds=1.5,
        tolerance=WITHIN,
    ),
]
