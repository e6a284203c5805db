"""Rows: what is asked of a field. The reward's slab and whole cubes of density, checked meshes, and
renderings, without gradients but for the slab's.

Letters: N batch, K planes, C channels, J hidden units, P points, D, H, W = grid points along z, y, x.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch.nn import functional as F

from benchmarks import configurations
from benchmarks.rows import Agreement, Case, Outcome, Row, Target
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator, of
from eg3d_rlhf.geometry.mesh import extract_mesh, largest_part, vertex_normals
from eg3d_rlhf.geometry.mesh_export import Mesh, check_mesh, export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.geometry.slab import DecoderWeights, plane_features, sigma_from_planes, tri_grid_density
from training.fullhead import sample_tri_grid
from training.rendering.renderer import generate_planes
from training.triplane import TriPlaneGenerator

POINTS_AT_ONCE = 10**7  # as EG3D decodes them
LAYOUTS = {"eg3d": "", "fixed": ", fixed layout"}  # of the planes, and what it adds to a row's name
WITHIN = 1e-4  # world units by which vertices of both meshes may lie apart: a twentieth of a grid step at 512

# Measured on the full renderer: 6e-5 in the features, 1.6e-4 in the depth, on a few of 16 thousand rays; 1e-7
# and 4e-7 on average. It is float32: from the same rendering in float64 the reference's features are 1.4e-4
# off, the fast path's 1.3e-4.
FEW_RAYS = 5e-4

# The decoder that gives an untrained generator a closed surface takes the difference of two terms of up to
# 800: what rounds away there is 1e-5 of the density's own range, from planes that agree within 2e-6. The rows
# that start from the same planes keep the default, 1e-5.
_FROM_LATENT = 5e-5


@dataclass(frozen=True, kw_only=True)
class PlaneSize:
    """Sizes of the planes, the decoder and the grid."""

    plane: int  # texels per side
    channels: int
    hidden: int
    outputs: int  # density and colour features
    spec: SlabSpec


TINY = PlaneSize(plane=8, channels=4, hidden=8, outputs=5, spec=SlabSpec.cube(8))


def _sizes(full: SlabSpec, bundled: SlabSpec) -> dict[str, PlaneSize]:
    """Planes and decoder of both configurations, on these grids."""
    return {
        "full": PlaneSize(plane=256, channels=32, hidden=64, outputs=33, spec=full),
        "bundled": PlaneSize(plane=64, channels=16, hidden=64, outputs=17, spec=bundled),
    }


SLAB = _sizes(SlabSpec(), SlabSpec(resolution=64))
CUBE = _sizes(SlabSpec.cube(256), SlabSpec.cube(64))


class PlaneField:
    """Leaves (planes N(0, 1) and the decoder's four tensors), and the two paths from them to sigma_raw
    [1, D, H, W].
    """

    def __init__(self, size: PlaneSize, layout: str, device: str):
        rng = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=rng) * scale).to(device).requires_grad_()

        self.spec = size.spec
        self.axes = generate_planes(layout).to(device)
        self.planes = normal(1, 3, size.channels, size.plane, size.plane)
        self.w0 = normal(size.hidden, size.channels, scale=size.channels**-0.5)
        self.b0 = normal(size.hidden, scale=0.1)
        self.w1 = normal(size.outputs, size.hidden, scale=size.hidden**-0.5)
        self.b1 = normal(size.outputs, scale=0.1)
        self.cotangent = torch.randn((1, *size.spec.shape), generator=rng).to(device)

    def separable(self) -> torch.Tensor:
        """The fast path."""
        weights = DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])
        return sigma_from_planes(self.planes, self.axes, weights, self.spec, impl="separable")

    def pointwise(self) -> torch.Tensor:
        """The reference: three look-ups, their mean, a hidden layer and all outputs at every point, as EG3D's
        decoder gives them.
        """
        points = self.spec.points().to(self.planes).reshape(-1, 3)
        # a view would keep all outputs
        parts = [self._decode(part)[0].contiguous() for part in points.split(POINTS_AT_ONCE)]
        return torch.cat(parts, dim=1).view(1, *self.spec.shape)

    def _decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma_raw [1, P] and colour features [1, P, outputs - 1]."""
        features = plane_features(self.planes, self.axes, points, 1.0).transpose(1, 2)
        out = F.linear(F.softplus(F.linear(features, self.w0, self.b0)), self.w1, self.b1)
        return out[..., 0], torch.sigmoid(out[..., 1:]) * 1.002 - 0.001

    def gradients(self, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients of planes, hidden layer and density row under a random cotangent."""
        planes, w0, b0, w1, b1 = torch.autograd.grad(
            sigma, [self.planes, self.w0, self.b0, self.w1, self.b1], self.cotangent
        )
        return {"planes": planes, "w0": w0, "b0": b0, "w_sigma": w1[0], "b_sigma": b1[:1]}


def from_planes(device: str, tiny: bool, size: str, cube: bool, train: bool, layout: str = "eg3d") -> Case:
    """Density on a grid from planes that are already there, the same for both paths; the reference decodes
    all outputs at every point.
    """
    planes = TINY if tiny else (CUBE if cube else SLAB)[size]
    field = TriGrid(planes, device) if layout == "panohead" else PlaneField(planes, layout, device)

    def run(path) -> Outcome:
        with torch.set_grad_enabled(train):
            sigma = path()
        return Outcome({"sigma": sigma.detach()}, field.gradients(sigma) if train else {})

    return Case(fast=lambda: run(field.separable), reference=lambda: run(field.pointwise))


def _generator(device: str, tiny: bool, size: str) -> TriPlaneGenerator:
    """G in eval mode."""
    return (
        load_generator(None, device).generator.module
        if size == "bundled" and not tiny
        else configurations.build(tiny, device)[0].G_ema
    )


def from_latent(device: str, tiny: bool, size: str, cube: bool) -> Case:
    """From ws to the grid. One synthesis; EG3D's own code takes one more for every further ten million
    points.
    """
    G = _generator(device, tiny, size)
    ws, _ = configurations.latent(G, device)
    spec = TINY.spec if tiny else (CUBE if cube else SLAB)[size].spec

    def run() -> Outcome:
        with torch.no_grad():
            return Outcome({"sigma": of(G).field(ws).density_grid(spec)})

    return Case(fast=run)


def mesh_case(device: str, tiny: bool, size: str, resolution: int) -> Case:
    """From a latent to a checked mesh of `resolution` points per edge.

    Fast: everything that eg3d-rlhf samples mesh does but colours and writing. Reference: every grid point
    decoded, marching cubes on the whole volume, and the same choice of the largest part, normals and checks;
    so the checks count on both sides, although EG3D has none.
    """
    G = _generator(device, tiny, size)
    ws, _ = configurations.latent(G, device)
    options = MeshOptions(resolution=24 if tiny else resolution, colors=False)

    def outcome(mesh: Mesh) -> Outcome:
        return Outcome({"vertices": torch.from_numpy(mesh.vertices), "faces": torch.tensor(len(mesh.faces))})

    return Case(
        fast=lambda: outcome(export_mesh(of(G).field(ws), options)[0]),
        reference=lambda: outcome(_export_pointwise(G, ws, options)),
        compare=compare_meshes,
    )


@torch.no_grad()
def _export_pointwise(G: torch.nn.Module, ws: torch.Tensor, options: MeshOptions) -> Mesh:
    """The whole volume, then what `export_mesh` does with a surface."""
    field = of(G).field(ws)
    spec = SlabSpec.of(field.bounds, options.resolution)
    vertices, faces = extract_mesh(field.density_grid(spec)[0], spec, field.level)
    faces_before = len(faces)
    vertices, faces, components = largest_part(vertices, faces)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces))
    check_mesh(mesh, field, options, faces_before, components)
    return mesh


def compare_meshes(fast: Outcome, reference: Outcome) -> Agreement:
    """Largest distance, in world units, from a vertex of one mesh to the nearest of the other; the order of
    vertices does not matter.
    """
    a, b = (outcome.outputs["vertices"].numpy() for outcome in (fast, reference))
    apart = max(cKDTree(b).query(a)[0].max(), cKDTree(a).query(b)[0].max()) if min(len(a), len(b)) else np.inf
    return Agreement(max_abs_error=float(apart), relative_error=float(apart))


def rendering(device: str, tiny: bool, size: str, full_image: bool) -> Case:
    """Compare rendering: planes and rays to features, depth and opacity, in a coarse and a fine pass.

    With `full_image`, compare the whole way from latent and camera to the image.
    """
    G = _generator(device, tiny, size)
    resolution = G.neural_rendering_resolution if size == "bundled" or tiny else 128  # pixels per edge
    ws, c = configurations.latent(G, device)
    z = torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        planes = G.planes(ws, noise_mode="const")
        origins, directions = G.ray_sampler(
            c[:, :16].reshape(-1, 4, 4), c[:, 16:].reshape(-1, 3, 3), resolution
        )

    @torch.no_grad()
    def run() -> Outcome:
        if full_image:
            images = G.synthesis(
                G.mapping(z, c), c, neural_rendering_resolution=resolution, noise_mode="const"
            )
            return Outcome({name: images[name] for name in ("image", "image_raw")})
        features, depth, opacity = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)
        # what a ray misses has no depth
        return Outcome({"features": features, "depth times opacity": depth * opacity, "opacity": opacity})

    return Case(fast=run)


def _rows(size: str) -> list[Row]:
    """Those that both sizes have."""
    full = size == "full"
    part = functools.partial

    def row(name: str, make, seconds: float, target: Target | None = None, **kwargs) -> Row:
        return Row(
            name=name,
            size=size,
            make=part(make, size=size),
            seconds=seconds if full else 0.05,
            target=target if full else None,
            **kwargs,
        )

    def slab(name: str, seconds: float, train: bool, target: Target) -> list[Row]:
        make = part(from_planes, cube=False, train=train)
        return [
            row(name + more, part(make, layout=k), seconds, None if more else target)
            for k, more in LAYOUTS.items()
        ]

    cube = "cube 256^3" if full else "cube 64^3"
    return [
        *slab("slab forward, from planes", 4.5, False, Target(at_least=15, aim=25)),
        *slab(
            "slab forward + backward to planes and decoder",
            14,
            True,
            Target(at_least=12, aim=25, memory_mb_below=200),
        ),
        row(
            "slab forward, from a latent",
            part(from_latent, cube=False),
            5,
            Target(at_least=7, aim=10),
            tolerance=_FROM_LATENT,
        ),
        row(
            f"{cube}, from planes",
            part(from_planes, cube=True, train=False),
            30,
            Target(at_least=20, aim=40),
            meter_in_round=full,
        ),
        row(
            f"{cube}, from a latent",
            part(from_latent, cube=True),
            42,
            meter_in_round=full,
            tolerance=_FROM_LATENT,
        ),
        row(
            "renderer forward",
            part(rendering, full_image=False),
            2.5,
            Target(at_least=2.5, aim=4),
            tolerance=FEW_RAYS,
        ),
        row(
            "G forward",
            part(rendering, full_image=True),
            6,
            Target(at_least=3, aim=4),
            tolerance=FEW_RAYS,
            half_on_cuda=full,
        ),
    ]


ROWS = [
    *_rows("full"),
    *_rows("bundled"),
    Row(
        name="mesh 512^3, from a latent",
        size="full",
        make=functools.partial(mesh_case, size="full", resolution=512),
        seconds=320,
        target=Target(at_least=15, aim=40, memory_mb_below=4000),
        tolerance=WITHIN,
        meter_in_round=True,
    ),
    Row(
        name="mesh 128^3, from a latent",
        size="bundled",
        make=functools.partial(mesh_case, size="bundled", resolution=128),
        seconds=1.5,
        tolerance=WITHIN,
    ),
]


# The density of full heads on grids: a tri-grid is read from its D slices; the reference decodes every point,
# density alone.

SLICES = 3  # D
_POINTS_AT_ONCE = 1 << 16  # as the families read points


class TriGrid(PlaneField):
    """Leaves (slices N(0, 1) and the decoder's density row), and the two paths from them to sigma_raw
    [1, D, H, W].
    """

    def __init__(self, size: PlaneSize, device: str):
        super().__init__(size, "panohead", device)
        rng = torch.Generator().manual_seed(1)
        shape = (1, 3, size.channels, SLICES, size.plane, size.plane)
        self.planes = torch.randn(shape, generator=rng).to(device).requires_grad_()
        self.orders = [tuple(int(i) for i in rows.argmax(dim=1)) for rows in self.axes]

    @property
    def weights(self) -> DecoderWeights:
        """The density row."""
        return DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])

    def separable(self) -> torch.Tensor:
        """From slices."""
        axes = [axis * 2 for axis in self.spec.axes()]
        return tri_grid_density(self.planes, self.orders, self.weights, axes).permute(0, 3, 2, 1)

    def pointwise(self) -> torch.Tensor:
        """Three trilinear reads, their mean, the hidden layer and the density row at every point."""
        points = self.spec.points().to(self.planes).reshape(1, -1, 3)
        return torch.cat([self._density(part) for part in points.split(_POINTS_AT_ONCE, dim=1)], dim=1).view(
            1, *self.spec.shape
        )

    def _density(self, points: torch.Tensor) -> torch.Tensor:
        features = sample_tri_grid(self.axes, self.planes, points, 1.0).mean(dim=1)
        weights = self.weights
        hidden = F.softplus(F.linear(features, weights.w0, weights.b0))
        return hidden @ weights.w_sigma + weights.b_sigma


def _tri_grid_row(
    name: str, size: str, seconds: float, target: Target | None, cube: bool = False, train: bool = False
) -> Row:
    make = functools.partial(from_planes, size=size, cube=cube, train=train, layout="panohead")
    return Row(name=name, size=size, make=make, seconds=seconds, target=target)


_TRI_GRID_SLAB = Target(at_least=5, aim=10)
ROWS += [
    _tri_grid_row("slab of a tri-grid, from slices", "full", 8, _TRI_GRID_SLAB),
    _tri_grid_row("slab of a tri-grid, from slices", "bundled", 0.1, None),
    _tri_grid_row("slab of a tri-grid, forward + backward", "bundled", 0.3, None, train=True),
    _tri_grid_row("cube 64^3 of a tri-grid, from slices", "bundled", 0.5, None, cube=True),
]
