"""Colours, normals and opacities of an asset in the views of the rig: of meshes, splats and fields.

Every kind of asset gives the same maps, so that shading is the same, too. Meshes are rasterised at twice the
resolution; splats are blended (geometry/splat_rendering.py); fields are marched (core/field.py). Normals of
splats and fields come from differences of the depth map.

Shapes: V views, R pixels per side, N vertices or Gaussians, F triangles, P covered pixels.
"""

import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from eg3d_rlhf.core.field import Field, RenderOptions, march
from eg3d_rlhf.geometry.files.appearance import vertex_normals
from eg3d_rlhf.geometry.files.model import (
    Model,
    Primitive,
    array_numbers,
)
from eg3d_rlhf.geometry.files.ply import Splats
from eg3d_rlhf.geometry.files.triangles import scene_parts
from eg3d_rlhf.geometry.splat_rendering import View, render
from eg3d_rlhf.measures.views import normals_from_points
from eg3d_rlhf.people.judge.rig import Rig
from training.heads.people import rasterise
from training.rendering.cameras import RaySampler, intrinsics_matrix, pack_label

_GREY = 0.65  # sRGB of a surface whose colour is not known
_SH_C0 = 0.28209479177387814  # value of the constant spherical harmonic, 1 / (2 sqrt(pi))
_CREASE = 0.766  # cosine of 40 degrees, see `_corner_normals`
_SOLID = 0.5  # least opacity of a pixel that has a normal
_FAR_SPLATS = 0.005  # share of the Gaussians on each side that do not count for the bounds


class ViewMaps(NamedTuple):
    """Maps of one asset in the V views of the rig."""

    colours: np.ndarray  # [V, R, R, 3] in 0..1, sRGB, multiplied by the opacity
    normals: np.ndarray  # [V, R, R, 3] in camera axes (x right, y up, z to the camera); 0 where undefined
    opacity: np.ndarray  # [V, R, R] in 0..1


@dataclass(frozen=True)
class ColouredMesh:
    """Mesh whose vertices have colours, such as the level set of a field."""

    vertices: np.ndarray  # [N, 3], y up
    faces: np.ndarray  # [F, 3]
    colours: np.ndarray | None = None  # [N, 3] sRGB in 0..1; None: grey


def y_up(points: np.ndarray, up: str) -> np.ndarray:
    """Return points [N, 3] in a world whose y axis points up, as `up` ("y" or "z") pointed before."""
    # (x, y, z) -> (x, z, -y) is a rotation about x. Exchanging y and z alone would mirror the asset.
    return points if up == "y" else points[:, [0, 2, 1]] * np.array([1.0, 1.0, -1.0])


def _sphere(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the centre [3] of the box of points [N, 3], and the radius of the sphere around it; > 0."""
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    # The sphere around the box of an elongated asset would be much larger.
    radius = float(np.linalg.norm(points - centre, axis=1).max())
    return centre, radius if radius > 0 else 1.0


class _Part(NamedTuple):
    """Triangles of one material, in arrays of their own."""

    triangles: np.ndarray  # [F, 3] indices of vertices of the whole mesh
    uv: np.ndarray | None  # [N, 2] of the part's vertices
    texture: np.ndarray | None  # [H, W, 3] sRGB in 0..1
    colours: np.ndarray | None  # [N, 3] sRGB in 0..1 of the part's vertices
    factor: np.ndarray  # [3] sRGB, by which texture and colours are multiplied
    offset: int  # index of the part's first vertex in the whole mesh


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Convert linear RGB in 0..1 to sRGB (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _part(model: Model, primitive: Primitive, triangles: np.ndarray, offset: int) -> _Part:
    """Return the triangles of a primitive with its colours. Metal and roughness are not shown."""
    # glTF allows primitives without a material, which are white.
    material = model.materials[primitive.material] if primitive.material is not None else {}
    pbr = material.get("pbrMetallicRoughness", {})
    factor = _srgb(np.array(pbr.get("baseColorFactor", [1, 1, 1, 1])[:3], dtype=np.float64))
    # Textures and factors of the base colour are multiplied.
    texture_record = pbr.get("baseColorTexture")
    uv = None
    texture = None
    if texture_record is not None:
        uv_array = primitive.attributes.get(f"TEXCOORD_{texture_record.get('texCoord', 0)}")
        image_index = model.textures[texture_record["index"]].get("source")
        # Files with a texture but without coordinates exist; their factor is shown.
        if uv_array is not None and image_index is not None:
            uv = array_numbers(uv_array)
            with Image.open(io.BytesIO(model.images[image_index].data)) as image:
                texture = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    colour_array = primitive.attributes.get("COLOR_0")
    # Vertex colours of glTF are linear.
    colours = None if colour_array is None else _srgb(array_numbers(colour_array)[:, :3])
    # Otherwise an asset without any colour would be white on grey.
    if texture is None and colours is None and "baseColorFactor" not in pbr:
        factor = np.full(3, _GREY)
    return _Part(triangles, uv, texture, colours, factor, offset)


def model_maps(model: Model, rig: Rig, up: str = "y") -> ViewMaps:
    """Render a mesh file with its materials. Transparent surfaces are shown opaque.

    Args:
        model: mesh, see geometry/files.
        rig: cameras and resolution.
        up: axis of the file that points up, "y" (glTF) or "z".

    Raises: ValueError if the scene has no triangles.
    """
    vertices = []
    parts = []
    offset = 0
    for primitive, points, triangles in scene_parts(model):
        # Nodes may place parts anywhere, so the points are those of the scene.
        vertices.append(y_up(points, up))
        parts.append(_part(model, primitive, triangles, offset))
        offset += len(points)
    if not vertices:
        raise ValueError("the file has no triangles that can be seen. Export a mesh that has faces.")
    return _mesh_maps(np.concatenate(vertices), parts, rig)


def mesh_maps(mesh: ColouredMesh, rig: Rig) -> ViewMaps:
    """Render a mesh with colours at its vertices."""
    factor = np.full(3, _GREY) if mesh.colours is None else np.ones(3)
    return _mesh_maps(
        np.asarray(mesh.vertices, dtype=np.float64),
        [_Part(np.asarray(mesh.faces), None, None, mesh.colours, factor, 0)],
        rig,
    )


def _mesh_maps(vertices: np.ndarray, parts: list[_Part], rig: Rig) -> ViewMaps:
    """Rasterise parts of a mesh in all views at twice the resolution, and average 2 x 2 pixels.

    Args:
        vertices: positions [N, 3], y up.
        parts: triangles with their colours.
        rig: cameras and resolution.
    """
    triangles = np.concatenate([part.triangles + part.offset for part in parts])
    # Each pixel finds its texture by the part of its triangle.
    part_of_triangle = np.repeat(np.arange(len(parts)), [len(part.triangles) for part in parts])
    # Vertices that no triangle uses would make the asset small.
    used = vertices[np.unique(triangles)]
    centre, radius = _sphere(used)
    points = (vertices - centre) / radius
    corner_normals = _corner_normals(points, triangles)
    # Two samples along each edge of a pixel, against jagged edges.
    fine = 2 * rig.resolution
    maps = []
    for pose in rig.cam2world():
        # A triangle without area has weights of 0, of which `rasterise` takes the reciprocal.
        with np.errstate(divide="ignore"):
            nearest, weights, _ = rasterise(points, triangles, pose, rig.focal, fine)
        is_covered = nearest >= 0
        # Only covered pixels are shaded: most of a view is ground.
        hit = nearest[is_covered]  # [P]
        hit_weights = weights[is_covered]  # [P, 3]
        colour = np.zeros((fine, fine, 3), np.float32)
        colour[is_covered] = _colours_at(hit, hit_weights, triangles, part_of_triangle, parts)
        normal = np.zeros((fine, fine, 3), np.float32)
        world_normals = np.einsum("pcd,pc->pd", corner_normals[hit], hit_weights)
        normal[is_covered] = _camera_normals(world_normals, pose)
        maps.append((colour, normal, is_covered.astype(np.float32)))
    colours, normal_maps, opacity = (np.stack([view[i] for view in maps]) for i in range(3))

    def averaged(values: np.ndarray) -> np.ndarray:
        """Average blocks of 2 x 2 pixels: [V, 2R, 2R, ...] -> [V, R, R, ...]."""
        # Colours are multiplied by the opacity, so their mean is that of the surface.
        blocks = values.reshape(len(values), rig.resolution, 2, rig.resolution, 2, *values.shape[3:])
        return blocks.mean(axis=(2, 4))

    return ViewMaps(averaged(colours), _unit(averaged(normal_maps)), averaged(opacity))


def _corner_normals(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return the normals [F, corner, 3] of the corners of triangles, smooth except at sharp edges.

    A corner has the mean normal of the triangles at its vertex, unless this is more than 40 degrees away from
    the triangle's own: smooth normals would show a box as a cushion.

    Args:
        points: positions [N, 3].
        triangles: indices of vertices [F, 3].
    """
    smooth = vertex_normals(points, triangles).astype(np.float64)[triangles]
    a, b, c = (points[triangles[:, corner]] for corner in range(3))
    flat = _unit(np.cross(b - a, c - a))[:, None]  # [F, 1, 3]
    is_sharp = (smooth * flat).sum(axis=2, keepdims=True) < _CREASE
    return np.where(is_sharp, flat, smooth)


def _camera_normals(world_normals: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return normals [P, 3] in camera axes (x right, y up, z to the camera), turned to the camera.

    The back of a surface is shown like its front, so that an open shell has no black inside.
    """
    normals = _unit(world_normals @ pose[:3, :3]) * np.array([1.0, -1.0, -1.0])
    return np.where(normals[:, 2:] < 0, -normals, normals)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., 3] to length 1; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 1e-12, lengths, 1.0)


def _colours_at(
    hit: np.ndarray,
    weights: np.ndarray,
    triangles: np.ndarray,
    part_of_triangle: np.ndarray,
    parts: list[_Part],
) -> np.ndarray:
    """Return the sRGB colours [P, 3] of the surface at covered pixels.

    Args:
        hit: index of each pixel's triangle [P].
        weights: weights of the corners [P, 3].
        triangles: indices of vertices [F, 3].
        part_of_triangle: index of each triangle's part [F].
        parts: parts with their colours.
    """
    # Filled part by part, since each part has its own texture.
    colours = np.empty((len(hit), 3), np.float32)
    hit_parts = part_of_triangle[hit]
    for part_index in np.unique(hit_parts):
        part = parts[part_index]
        is_part = hit_parts == part_index
        # Attributes are counted from the first vertex of the part.
        corners = triangles[hit[is_part]] - part.offset  # [P', 3]
        part_weights = weights[is_part]
        values = np.broadcast_to(part.factor, (len(corners), 3))
        if part.colours is not None:
            values = values * np.einsum("pcd,pc->pd", part.colours[corners], part_weights)
        if part.uv is not None and part.texture is not None:
            uv = np.einsum("pcd,pc->pd", part.uv[corners], part_weights)
            values = values * _sample(part.texture, uv)
        colours[is_part] = values
    return np.clip(colours, 0, 1)


def _sample(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Sample a texture [H, W, 3] bilinearly at coordinates [P, 2] of glTF; it repeats beyond 0..1."""
    # glTF: u runs to the right and v down, from the upper left corner.
    height, width = texture.shape[:2]
    # texel centres are at + 0.5
    # NaN in texture coordinates becomes 0.
    x = (np.nan_to_num(uv[:, 0]) % 1.0) * width - 0.5
    y = (np.nan_to_num(uv[:, 1]) % 1.0) * height - 0.5
    left = np.floor(x).astype(int)
    top = np.floor(y).astype(int)
    right_share = (x - left)[:, None]
    lower_share = (y - top)[:, None]

    def texel(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return texels [P, 3] of a repeating texture."""
        return texture[row % height, column % width]

    upper = texel(top, left) * (1 - right_share) + texel(top, left + 1) * right_share
    lower = texel(top + 1, left) * (1 - right_share) + texel(top + 1, left + 1) * right_share
    return upper * (1 - lower_share) + lower * lower_share


@dataclass(frozen=True)
class _Gaussians:
    """Gaussians whose blended channels are RGB, depth and 1."""

    means: torch.Tensor  # [N, 3]
    scales: torch.Tensor  # [N, 3]
    rotations: torch.Tensor  # [N, 4]
    opacities: torch.Tensor  # [N]
    colours: torch.Tensor  # [N, 5]


def splat_maps(splats: Splats, rig: Rig, up: str = "y") -> ViewMaps:
    """Render Gaussian splats. Higher spherical harmonics are ignored.

    Args:
        splats: Gaussians of a PLY file.
        rig: cameras and resolution.
        up: axis of the file that points up, "y" or "z".
    """
    rotations = torch.from_numpy(splats.rotations.astype(np.float32))
    if up == "z":
        # `y_up` rotates points by -90 degrees about x; its quaternion is (s, -s, 0, 0) with s = sqrt(1/2).
        w, x, y, z = (rotations / 32767).unbind(1)
        half = math.sqrt(0.5)
        rotations = torch.stack([half * (w + x), half * (x - w), half * (y + z), half * (z - y)], dim=1)
    centres = y_up(splats.centres.astype(np.float64), up)
    # Transparent Gaussians and a few distant ones would make the asset small in the image.
    # Opacities are 0..255 here, so 26 is about 0.1.
    solid = centres[splats.opacities >= 26] if (splats.opacities >= 26).any() else centres
    centre, radius = _sphere(solid.clip(*np.quantile(solid, [_FAR_SPLATS, 1 - _FAR_SPLATS], axis=0)))
    means = torch.from_numpy(((centres - centre) / radius).astype(np.float32))
    # Files hold coefficients of spherical harmonics, of which 0 is a medium grey.
    colours = torch.from_numpy((0.5 + _SH_C0 * splats.colours.astype(np.float32)).clip(0, 1))
    scales = torch.from_numpy(np.exp(splats.scales.astype(np.float32))) / radius  # files hold logarithms
    opacities = torch.from_numpy(splats.opacities.astype(np.float32) / 255)
    colour_maps = []
    depth_maps = []
    opacity_maps = []
    poses = rig.cam2world()
    for pose in poses:
        view = View(
            # From camera to world -> from world to camera: the transpose inverts a rotation.
            torch.from_numpy(pose[:3, :3].T.astype(np.float32)),
            torch.from_numpy(pose[:3, 3].astype(np.float32)),
            rig.focal,
        )
        # Depth is the distance along the camera's axis, and 1 gives the opacity.
        depth = view.camera(means)[:, 2:]
        channels = torch.cat([colours, depth, torch.ones_like(depth)], dim=1)
        image = render(_Gaussians(means, scales, rotations, opacities, channels), view, rig.resolution)
        opacity = image[4].clamp(0, 1)
        colour_maps.append(image[:3].permute(1, 2, 0).clamp(0, 1).numpy())
        # The blended depth is a weighted sum. Divided by the sum of the weights, it is the mean depth.
        depth_maps.append(image[3] / image[4].clamp_min(1e-6))
        opacity_maps.append(opacity)
    # from the depth along the axis to the distance along the ray of each pixel
    steps = (torch.arange(rig.resolution) + 0.5) / rig.resolution - 0.5
    ray_lengths = torch.sqrt(1 + (steps[:, None] / rig.focal) ** 2 + (steps[None] / rig.focal) ** 2)
    opacity = torch.stack(opacity_maps)
    normals = _depth_normals(torch.stack(depth_maps) * ray_lengths, opacity, poses, rig.focal)
    return ViewMaps(np.stack(colour_maps), normals, opacity.numpy())


def field_maps(field: Field, rig: Rig) -> ViewMaps:
    """March a field of one shape, and enlarge the images to the resolution of the rig.

    Args:
        field: one shape, y up, whose bounds decide the distance of the cameras.
        rig: cameras and resolutions.
    """
    bounds = field.bounds
    # The cube without its empty border; a sphere through its face centres touches most heads.
    radius = bounds.side * (0.5 - bounds.border) * 1.2
    poses = rig.cam2world()
    # The rig is for a sphere of radius 1 about the origin.
    poses[:, :3, 3] = poses[:, :3, 3] * radius + np.array(bounds.centre)
    colour_maps = []
    depths = []
    opacities = []
    # 96 samples along a ray resolve a head of 64 voxels.
    options = RenderOptions(resolution=rig.field_resolution)
    with torch.no_grad():
        for pose in poses:
            label = pack_label(
                torch.from_numpy(pose[None].astype(np.float32)), intrinsics_matrix(rig.focal)[None]
            )
            rendering = march(field, label, options, sample_count=96)
            colour_maps.append(((rendering.raw[0] + 1) / 2).clamp(0, 1).cpu())  # -1..1 -> 0..1
            depths.append(rendering.depth[0, 0].cpu())
            opacities.append(rendering.opacity[0, 0].cpu())
    normals = _depth_normals(torch.stack(depths), torch.stack(opacities), poses, rig.focal)

    def enlarged(maps: torch.Tensor) -> np.ndarray:
        """Enlarge maps [V, C, r, r] bilinearly, and move the channels to the end: [V, R, R, C]."""
        large = torch.nn.functional.interpolate(
            maps, (rig.resolution, rig.resolution), mode="bilinear", align_corners=False
        )
        return large.permute(0, 2, 3, 1).numpy()

    return ViewMaps(
        enlarged(torch.stack(colour_maps)),
        # Interpolation between different normals makes them shorter.
        _unit(enlarged(torch.from_numpy(normals).permute(0, 3, 1, 2).float())),
        enlarged(torch.stack(opacities)[:, None])[..., 0],
    )


def _depth_normals(
    distances: torch.Tensor, opacity: torch.Tensor, poses: np.ndarray, focal: float
) -> np.ndarray:
    """Compute normals [V, R, R, 3] in camera axes from distances along the rays.

    Args:
        distances: distances [V, R, R] from the camera along each pixel's ray.
        opacity: opacities [V, R, R].
        poses: poses [V, 4, 4].
        focal: focal length in sides of the image.
    """
    resolution = distances.shape[-1]
    cam2world = torch.from_numpy(poses).float()
    intrinsics = intrinsics_matrix(focal).expand(len(poses), 3, 3)
    origins, directions = RaySampler()(cam2world, intrinsics, resolution)  # [V, R*R, 3]
    points = (origins + distances.flatten(1)[..., None] * directions).unflatten(1, (resolution, resolution))
    # The depth of a pixel that shows mostly the ground is unreliable.
    normals, has_normal = normals_from_points(points, opacity >= _SOLID)
    maps = []
    for view_normals, is_defined, pose in zip(normals, has_normal, poses, strict=True):
        camera_normals = _camera_normals(view_normals.reshape(-1, 3).double().numpy(), pose)
        maps.append(camera_normals.reshape(view_normals.shape) * is_defined.numpy()[..., None])
    return np.stack(maps)


def is_pale(maps: ViewMaps, rig: Rig) -> bool:
    """Return True if the foreground has little saturation and is not dark, see `Rig.pale_saturation`."""
    # An empty asset has no colours, and is not pale.
    weight = float(maps.opacity.sum())
    if weight == 0:
        return False
    # colours are multiplied by the opacity, so that sums are means over the foreground
    saturation = (maps.colours.max(axis=-1) - maps.colours.min(axis=-1)).sum() / weight
    brightness = maps.colours.mean(axis=-1).sum() / weight
    return bool(saturation < rig.pale_saturation and brightness > rig.pale_brightness)


def images_of(maps: ViewMaps, mode: str, ground: int) -> np.ndarray:
    """Return the views of a mode over a ground, uint8 [V, R, R, 3].

    Args:
        maps: maps of the asset.
        mode: "textured" (colours with soft light), "shaded" (grey clay) or "normals".
        ground: grey of the ground, 0..255.
    """
    opacity: Any = maps.opacity[..., None]
    # Normals -1..1 become colours 0..1: right is red, up is green, towards the camera is blue.
    if mode == "normals":
        colours = (maps.normals * 0.5 + 0.5) * opacity
    else:
        # The light is at the camera and above it, so that no side of an asset is dark.
        light = np.clip(maps.normals @ np.array([0.0, 0.35, 0.94]), 0, 1)[..., None]
        # Pixels without a normal, whose vector is 0, get a medium brightness.
        is_shaded = np.linalg.norm(maps.normals, axis=-1, keepdims=True) > 0.5
        if mode == "textured":
            colours = maps.colours * np.where(is_shaded, 0.7 + 0.3 * light, 0.85)
        else:
            clay = opacity * np.where(is_shaded, 0.12 + 0.78 * light, 0.5)
            colours = np.repeat(clay, 3, axis=-1)
    # Colours are multiplied by the opacity already.
    over_ground = colours * 255 + (1 - opacity) * ground
    return np.rint(over_ground.clip(0, 255)).astype(np.uint8)
