"""Rows of the benchmark that measure the density field: slabs, cubes, meshes and renderings.

Only the rows of the reward's slab also measure the backward pass.
Shapes: L num_ws, W w_dim, P points, D, H, W grid points along z, y, x.
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
from eg3d_rlhf.generators import as_generator, load_generator
from eg3d_rlhf.geometry.mesh import extract_mesh, largest_part, vertex_normals
from eg3d_rlhf.geometry.mesh_export import Mesh, check_mesh, export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.geometry.slab import DecoderWeights, plane_features, sigma_from_planes, tri_grid_density
from training.fullhead import sample_tri_grid
from training.rendering.renderer import generate_planes
from training.triplane import TriPlaneGenerator

POINTS_AT_ONCE = 10**7  # points per call of the decoder, as in EG3D
LAYOUTS = {"eg3d": "", "fixed": ", fixed layout"}  # layout of the planes -> suffix of the row's name
# largest distance between the vertices of both meshes in world units, a twentieth of a grid step at 512^3
WITHIN = 1e-4

# Tolerance of renderings. The measured differences of the full renderer are 6e-5 in the features and 1.6e-4
# in the depth for a few of 16 thousand rays, and 1e-7 and 4e-7 on average. The cause is the rounding of
# float32: compared with a rendering in float64, the features differ by 1.4e-4 in the reference and by 1.3e-4
# in the fast path.
FEW_RAYS = 5e-4

# Tolerance of densities from a latent. `configurations.shape_as_head` makes the density a difference of two
# terms of up to 800, whose rounding is 1e-5 of the density's range, while the planes agree within 2e-6. Rows
# that start from the same planes have the default tolerance, 1e-5.
_FROM_LATENT = 5e-5


@dataclass(frozen=True, kw_only=True)
class PlaneSize:
    """Sizes of the planes, the decoder and the grid."""

    plane: int  # texels per side
    channels: int
    hidden: int
    outputs: int  # number of outputs of the decoder: the density and the colour features
    spec: SlabSpec


TINY = PlaneSize(plane=8, channels=4, hidden=8, outputs=5, spec=SlabSpec.cube(8))


def _sizes(full_grid: SlabSpec, bundled_grid: SlabSpec) -> dict[str, PlaneSize]:
    """Return the sizes of both configurations, with these grids."""
    return {
        "full": PlaneSize(plane=256, channels=32, hidden=64, outputs=33, spec=full_grid),
        "bundled": PlaneSize(plane=64, channels=16, hidden=64, outputs=17, spec=bundled_grid),
    }


SLAB = _sizes(SlabSpec(), SlabSpec(resolution=64))
CUBE = _sizes(SlabSpec.cube(256), SlabSpec.cube(64))


class PlaneField:
    """Random planes and decoder weights, and two paths from them to the density sigma_raw [1, D, H, W]."""

    def __init__(self, plane_size: PlaneSize, layout: str, device: str):
        rng = torch.Generator().manual_seed(0)  # on the CPU, so that all devices get the same values

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=rng) * scale).to(device).requires_grad_()

        self.spec = plane_size.spec
        self.axes = generate_planes(layout).to(device)
        self.planes = normal(1, 3, plane_size.channels, plane_size.plane, plane_size.plane)
        self.w0 = normal(plane_size.hidden, plane_size.channels, scale=plane_size.channels**-0.5)
        self.b0 = normal(plane_size.hidden, scale=0.1)
        self.w1 = normal(plane_size.outputs, plane_size.hidden, scale=plane_size.hidden**-0.5)
        self.b1 = normal(plane_size.outputs, scale=0.1)
        self.cotangent = torch.randn((1, *plane_size.spec.shape), generator=rng).to(device)

    def separable(self) -> torch.Tensor:
        """Compute the density by the fast path, which uses that the grid is a product of three axes."""
        weights = DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])
        return sigma_from_planes(self.planes, self.axes, weights, self.spec, impl="separable")

    def pointwise(self) -> torch.Tensor:
        """Compute the density by the reference path.

        At every point, the features of three planes are read and averaged, and the decoder computes the
        hidden layer and all outputs, as in EG3D.
        """
        points = self.spec.points().to(self.planes).reshape(-1, 3)
        # A copy of the density, since a view would keep the memory of all outputs.
        sigma_parts = [
            self._decode(points_part)[0].contiguous() for points_part in points.split(POINTS_AT_ONCE)
        ]
        return torch.cat(sigma_parts, dim=1).view(1, *self.spec.shape)

    def _decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sigma_raw [1, P] and the colour features [1, P, outputs - 1] at points [P, 3]."""
        features = plane_features(self.planes, self.axes, points, 1.0).transpose(1, 2)
        outputs = F.linear(F.softplus(F.linear(features, self.w0, self.b0)), self.w1, self.b1)
        # the scaling of the colour features in EG3D's OSGDecoder
        return outputs[..., 0], torch.sigmoid(outputs[..., 1:]) * 1.002 - 0.001

    def gradients(self, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the gradients of the planes, the hidden layer and the density's weights.

        The gradient of sigma is a fixed random tensor. Of the output layer, only the density's row is
        compared.
        """
        planes, w0, b0, w1, b1 = torch.autograd.grad(
            sigma, [self.planes, self.w0, self.b0, self.w1, self.b1], self.cotangent
        )
        return {"planes": planes, "w0": w0, "b0": b0, "w_sigma": w1[0], "b_sigma": b1[:1]}


def from_planes(device: str, tiny: bool, size: str, cube: bool, train: bool, layout: str = "eg3d") -> Case:
    """Make the case of the density on a grid, from planes that both paths share.

    Args:
        device: device of the planes and of the computation.
        tiny: True: tiny planes and a tiny grid, whatever the size.
        size: "full" or "bundled".
        cube: True: a grid over the whole cube; False: the reward's slab.
        train: True: forward and backward; False: forward only.
        layout: layout of the planes: "eg3d", "fixed", or "panohead" for tri-grids.
    """
    plane_size = TINY if tiny else (CUBE if cube else SLAB)[size]
    field = TriGrid(plane_size, device) if layout == "panohead" else PlaneField(plane_size, layout, device)

    def run(compute_density) -> Outcome:
        with torch.set_grad_enabled(train):
            sigma = compute_density()
        return Outcome({"sigma": sigma.detach()}, field.gradients(sigma) if train else {})

    return Case(fast=lambda: run(field.separable), reference=lambda: run(field.pointwise))


def _generator(device: str, tiny: bool, size: str) -> TriPlaneGenerator:
    """Return a generator in eval mode: the bundled one, or one of full or tiny size with random weights."""
    return (
        load_generator(None, device).generator.module
        if size == "bundled" and not tiny
        else configurations.build(tiny, device)[0].G_ema
    )


def from_latent(device: str, tiny: bool, size: str, cube: bool) -> Case:
    """Make the case of the density on a grid, from ws.

    Both paths synthesise the planes once. EG3D's own code repeats this for every ten million points.
    """
    G = _generator(device, tiny, size)
    ws, _ = configurations.sample_latent(G, device)
    spec = TINY.spec if tiny else (CUBE if cube else SLAB)[size].spec

    def run() -> Outcome:
        with torch.no_grad():
            return Outcome({"sigma": as_generator(G).field(ws).density_grid(spec)})

    return Case(fast=run)


def mesh_case(device: str, tiny: bool, size: str, resolution: int) -> Case:
    """Make the case of a mesh, from a latent.

    The fast path does the same as `eg3d-rlhf samples mesh`, without colours and writing. The reference
    decodes every grid point and applies marching cubes to the volume. Then it selects the largest part,
    computes normals and checks the mesh as the fast path does. The time of the checks is thus part of both
    paths, although EG3D has no such checks.

    Args: resolution: grid points per edge.
    """
    G = _generator(device, tiny, size)
    ws, _ = configurations.sample_latent(G, device)
    mesh_options = MeshOptions(resolution=24 if tiny else resolution, colors=False)

    def to_outcome(mesh: Mesh) -> Outcome:
        return Outcome({"vertices": torch.from_numpy(mesh.vertices), "faces": torch.tensor(len(mesh.faces))})

    return Case(
        fast=lambda: to_outcome(export_mesh(as_generator(G).field(ws), mesh_options)[0]),
        reference=lambda: to_outcome(_export_pointwise(G, ws, mesh_options)),
        compare=compare_meshes,
    )


@torch.no_grad()
def _export_pointwise(G: torch.nn.Module, ws: torch.Tensor, mesh_options: MeshOptions) -> Mesh:
    """Extract a mesh from the density at every grid point, and process it as `export_mesh` does."""
    field = as_generator(G).field(ws)
    spec = SlabSpec.from_bounds(field.bounds, mesh_options.resolution)
    vertices, faces = extract_mesh(field.density_grid(spec)[0], spec, field.level)  # [0]: the only shape
    extracted_face_count = len(faces)  # before small parts are removed
    vertices, faces, component_count = largest_part(vertices, faces)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces))
    check_mesh(mesh, field, mesh_options, extracted_face_count, component_count)
    return mesh


def compare_meshes(fast: Outcome, reference: Outcome) -> Agreement:
    """Return as error the largest distance from a vertex of one mesh to the nearest vertex of the other.

    The distance is in world units. The order of the vertices does not matter. The distance is infinite if a
    mesh has no vertices.
    """
    fast_vertices, reference_vertices = (outcome.outputs["vertices"].numpy() for outcome in (fast, reference))
    largest_distance = (
        max(
            cKDTree(reference_vertices).query(fast_vertices)[0].max(),
            cKDTree(fast_vertices).query(reference_vertices)[0].max(),
        )
        if min(len(fast_vertices), len(reference_vertices))
        else np.inf
    )
    return Agreement(max_abs_error=float(largest_distance), relative_error=float(largest_distance))


def rendering(device: str, tiny: bool, size: str, full_image: bool) -> Case:
    """Make the case of a rendering.

    Args: full_image: True: from latent and camera to the image; False: from planes and rays to features,
        depth and opacity, in a coarse and a fine pass.
    """
    G = _generator(device, tiny, size)
    resolution = G.neural_rendering_resolution if size == "bundled" or tiny else 128  # pixels per edge
    ws, camera_label = configurations.sample_latent(G, device)
    # the latent of `configurations.sample_latent`
    z = torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        planes = G.planes(ws, noise_mode="const")
        origins, directions = G.ray_sampler(
            camera_label[:, :16].reshape(-1, 4, 4), camera_label[:, 16:].reshape(-1, 3, 3), resolution
        )

    @torch.no_grad()
    def run() -> Outcome:
        if full_image:
            images = G.synthesis(
                G.mapping(z, camera_label),
                camera_label,
                neural_rendering_resolution=resolution,
                noise_mode="const",
            )
            return Outcome({output_name: images[output_name] for output_name in ("image", "image_raw")})
        features, depth, opacity = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)
        # The depth of rays that hit nothing is not defined, so it is weighted by the opacity.
        return Outcome({"features": features, "depth times opacity": depth * opacity, "opacity": opacity})

    return Case(fast=run)


def _rows(size: str) -> list[Row]:
    """Return the rows that both sizes have."""
    is_full = size == "full"
    partial = functools.partial

    def row(name: str, make, seconds: float, target: Target | None = None, **kwargs) -> Row:
        return Row(
            name=name,
            size=size,
            make=partial(make, size=size),
            # a rough duration for the bundled size, whose rows have no targets
            seconds=seconds if is_full else 0.05,
            target=target if is_full else None,
            **kwargs,
        )

    # Both layouts of the planes have a row; only the first one has a target.
    def slab(name: str, seconds: float, train: bool, target: Target) -> list[Row]:
        make_case = partial(from_planes, cube=False, train=train)
        return [
            row(
                name + layout_suffix,
                partial(make_case, layout=layout),
                seconds,
                None if layout_suffix else target,
            )
            for layout, layout_suffix in LAYOUTS.items()
        ]

    cube_title = "cube 256^3" if is_full else "cube 64^3"
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
            partial(from_latent, cube=False),
            5,
            Target(at_least=7, aim=10),
            tolerance=_FROM_LATENT,
        ),
        row(
            f"{cube_title}, from planes",
            partial(from_planes, cube=True, train=False),
            30,
            Target(at_least=20, aim=40),
            meter_in_round=is_full,
        ),
        row(
            f"{cube_title}, from a latent",
            partial(from_latent, cube=True),
            42,
            meter_in_round=is_full,
            tolerance=_FROM_LATENT,
        ),
        row(
            "renderer forward",
            partial(rendering, full_image=False),
            2.5,
            Target(at_least=2.5, aim=4),
            tolerance=FEW_RAYS,
        ),
        row(
            "G forward",
            partial(rendering, full_image=True),
            6,
            Target(at_least=3, aim=4),
            tolerance=FEW_RAYS,
            half_on_cuda=is_full,
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


# The density of full-head generators (PanoHead) on grids. Their planes are tri-grids, which have several
# slices along their third axis. The reference decodes the density at every point.

SLICES = 3  # number of slices of a tri-grid
_POINTS_AT_ONCE = 1 << 16  # points per call of the decoder


class TriGrid(PlaneField):
    """Random tri-grids and decoder weights, and two paths from them to the density sigma_raw [1, D, H, W]."""

    def __init__(self, plane_size: PlaneSize, device: str):
        super().__init__(plane_size, "panohead", device)
        rng = torch.Generator().manual_seed(1)
        shape = (1, 3, plane_size.channels, SLICES, plane_size.plane, plane_size.plane)
        self.planes = torch.randn(shape, generator=rng).to(device).requires_grad_()
        self.orders = [tuple(int(axis) for axis in axis_matrix.argmax(dim=1)) for axis_matrix in self.axes]

    @property
    def weights(self) -> DecoderWeights:
        """Return the weights of the decoder that the density depends on."""
        return DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])

    def separable(self) -> torch.Tensor:
        """Compute the density by the fast path, from the slices of the tri-grids."""
        axes = [axis * 2 for axis in self.spec.axes()]
        return tri_grid_density(self.planes, self.orders, self.weights, axes).permute(0, 3, 2, 1)

    def pointwise(self) -> torch.Tensor:
        """Compute the density by the reference path, which reads the features of every point trilinearly."""
        points = self.spec.points().to(self.planes).reshape(1, -1, 3)
        return torch.cat(
            [self._density(points_part) for points_part in points.split(_POINTS_AT_ONCE, dim=1)], dim=1
        ).view(1, *self.spec.shape)

    def _density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the density [1, P] at points [1, P, 3]."""
        # mean over the three planes
        features = sample_tri_grid(self.axes, self.planes, points, 1.0).mean(dim=1)
        weights = self.weights
        hidden = F.softplus(F.linear(features, weights.w0, weights.b0))
        return hidden @ weights.w_sigma + weights.b_sigma


def _tri_grid_row(
    name: str, size: str, seconds: float, target: Target | None, cube: bool = False, train: bool = False
) -> Row:
    """Return a row of the density of tri-grids on a grid, see `from_planes`."""
    make_case = functools.partial(from_planes, size=size, cube=cube, train=train, layout="panohead")
    return Row(name=name, size=size, make=make_case, seconds=seconds, target=target)


_TRI_GRID_SLAB = Target(at_least=5, aim=10)
ROWS += [
    _tri_grid_row("slab of a tri-grid, from slices", "full", 8, _TRI_GRID_SLAB),
    _tri_grid_row("slab of a tri-grid, from slices", "bundled", 0.1, None),
    _tri_grid_row("slab of a tri-grid, forward + backward", "bundled", 0.3, None, train=True),
    _tri_grid_row("cube 64^3 of a tri-grid, from slices", "bundled", 0.5, None, cube=True),
]
