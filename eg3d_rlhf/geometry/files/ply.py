"""Reader of PLY files of meshes and of Gaussian splats.

The sizes that a header states are compared with the size of the file before any data is read. Faces of a mesh
may have any number of corners.

Splats are read from the usual file of 3D Gaussian splatting (Kerbl et al. 2023). Its properties are x, y, z;
f_dc_0..2 and f_rest_* (coefficients of spherical harmonics); opacity (a logit); scale_0..2 (logarithms); and
rot_0..3 (quaternion w, x, y, z). Splats are sent to the browser in a format of this project, GSP1, in
little-endian byte order:

| bytes                       | content                                                |
| --------------------------- | ------------------------------------------------------ |
| 4                           | magic 'GSP1'                                           |
| 2 x uint32                  | N Gaussians, degree d of the spherical harmonics, 0..3 |
| 3 x float32, 3 x float32    | lowest corner and extent of the centres                |
| N x 3 x float32             | centres, as in the file                                |
| N x 3 x float16             | logarithms of the scales                               |
| N x 4 x int16               | rotations, unit quaternions w, x, y, z as q / 32767    |
| N x uint8                   | opacities as x / 255                                   |
| N x 3 x float16             | colours: coefficients of degree 0                      |
| N x 3 ((d+1)^2 - 1) float16 | the other coefficients, channel by channel as f_rest_* |

Each array starts at a multiple of 4 bytes.
"""

import contextlib
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.appearance import GREY_MATERIAL, colours_255, mended_normals
from eg3d_rlhf.geometry.files.companions import find_companion
from eg3d_rlhf.geometry.files.model import (
    ImageFile,
    Model,
    Note,
    model_from_primitives,
    read_texture,
    triangle_primitive,
)
from eg3d_rlhf.geometry.files.mtl import MAX_TEXTURE
from eg3d_rlhf.geometry.files.ply_tables import Header, Table, read_header, read_tables
from eg3d_rlhf.geometry.files.polygons import triangulate_faces

MAGIC = b"GSP1"
HEADER = struct.Struct("<4sII3f3f")  # header of GSP1, the first three rows of the table
MAX_SPLATS = 4_000_000  # largest number of Gaussians
MAX_FACES = 20_000_000  # largest number of faces of a mesh
MAX_TEXTURES = 100  # largest number of textures of a mesh
# Names of the properties of colours, with alpha.
_COLOURS = (
    ("red", "green", "blue", "alpha"),
    ("diffuse_red", "diffuse_green", "diffuse_blue", "diffuse_alpha"),
    ("r", "g", "b", "a"),
)
_SPLAT = (
    "x",
    "y",
    "z",
    "f_dc_0",
    "f_dc_1",
    "f_dc_2",
    "opacity",
    "scale_0",
    "scale_1",
    "scale_2",
    "rot_0",
    "rot_1",
    "rot_2",
    "rot_3",
)
# Number of properties f_rest_* -> degree d of the spherical harmonics. Each of the three colour channels has
# (d + 1)^2 coefficients, of which one is f_dc_*.
_DEGREES = {3 * ((d + 1) ** 2 - 1): d for d in range(4)}


def check_mesh(header: Header) -> None:
    """Raise ValueError unless the header describes a mesh with faces, and with at most MAX_FACES faces."""
    count_by_element = {element.name: element.count for element in header.elements}
    # missing elements, or elements without rows
    vertex_count = count_by_element.get("vertex", 0)
    face_count = count_by_element.get("face", 0)
    if not vertex_count or not face_count:
        raise ValueError(_other_kind(header, vertex_count, face_count))
    if face_count > MAX_FACES:
        raise ValueError(
            f"the mesh has {face_count:,} faces, but at most {MAX_FACES:,} are allowed. Simplify the"
            " mesh, or reduce its resolution."
        )


def _other_kind(header: Header, vertex_count: int, face_count: int) -> str:
    """Return what a PLY file without faces is, and how to export it as a mesh or as Gaussian splats.

    Args:
        header: header of the file.
        vertex_count: number of its points.
        face_count: number of its faces.
    """
    properties = {name for element in header.elements for name in element.properties}
    element_names = {element.name for element in header.elements}
    # A mesh has none of these properties.
    if "packed_position" in properties or len(properties & {"opacity", "scale_0", "rot_0", "f_dc_0"}) > 1:
        return _splat_fault(properties) or (
            "the file holds Gaussian splats, which have no faces. Export a mesh instead."
        )
    if "tristrips" in element_names:
        return (
            f"the PLY file holds {vertex_count} points with triangle strips (tristrips) instead of faces."
            " Export it with faces: open it in MeshLab and save it as PLY."
        )
    return (
        f"the PLY file has {vertex_count} points and {face_count} faces, and the points are no Gaussian"
        " splats. Export a mesh with faces, or Gaussian splats."
    )


def _splat_fault(properties: Collection[str]) -> str:
    """Return why Gaussian splats with these properties cannot be read and what to do; '' if they can.

    Args:
        properties: names of the properties of the points.
    """
    missing_names = [name for name in _SPLAT if name not in properties]
    if "packed_position" in properties:
        return (
            "the file holds compressed Gaussian splats (SuperSplat's compressed PLY: packed_position, chunk)."
            " Export them uncompressed: open the file in SuperSplat and export PLY."
        )
    if "scale_1" in properties and "scale_2" not in properties:
        return (
            "the file holds 2D Gaussian splats (scale_0 and scale_1 without scale_2), which are flat discs."
            " Export the mesh that 2D Gaussian splatting extracts from them, or train 3D Gaussian splats."
        )
    if {"red", "green", "blue"} <= set(properties) and "f_dc_0" in missing_names:
        return (
            "the file holds Gaussian splats with colours red, green, blue, as nerfstudio writes them with"
            " --ply-color-mode rgb. Export them with spherical harmonics: run ns-export gaussian-splat"
            " without this option."
        )
    if missing_names:
        return (
            f"the Gaussians lack the properties {', '.join(missing_names)}. Export the splats in the format"
            " of 3D Gaussian splatting."
        )
    return ""


def companion_files(data: bytes | memoryview, path: Path, root: Path) -> list[Path]:
    """Return the existing textures that a PLY file names (`comment TextureFile`).

    Args:
        data: content of the file.
        path: path of the file.
        root: folder that may be read, which contains the file.
    """
    companion_paths: dict[Path, None] = {}
    header = read_header(memoryview(data))
    for name in () if header.splats else header.textures[:MAX_TEXTURES]:
        with contextlib.suppress(ValueError):
            companion_paths[find_companion(path, name, root, MAX_TEXTURE)] = None
    return list(companion_paths)


def read_mesh(
    data: bytes | memoryview,
    geometry_only: bool = False,
    path: Path | None = None,
    root: Path | None = None,
) -> Model:
    """Read a mesh from a PLY file, with its textures, or with colours and normals of vertices or faces.

    Textures are named by comments `TextureFile`. Their coordinates are the list property `texcoord` of the
    faces, with the property `texnumber` if there are several textures, or the properties s and t, or u and v,
    of the vertices. A texture that cannot be used is left out, and a note of the model names it.

    Args:
        data: content of the file.
        geometry_only: True to read neither normals nor textures.
        path: path of the file, beside which textures are searched; None: no texture can be found.
        root: folder that may be read, which contains the file; None: the folder of the file.

    Raises: ValueError for a damaged file, and for a file without triangles.
    """
    header = read_header(memoryview(data))
    check_mesh(header)
    tables = read_tables(memoryview(data), header)
    vertices = tables["vertex"]
    faces = tables["face"]
    positions = np.stack([_column(vertices, name) for name in "xyz"], axis=1)
    index_property = next((name for name in ("vertex_indices", "vertex_index") if name in faces), None)
    if index_property is None:
        raise ValueError(
            "the faces in the PLY file have no property vertex_indices, only"
            f" {', '.join(faces)[:80] or 'no properties'}. Export the mesh again."
        )
    corner_counts, corners = faces[index_property]
    corners = corners.astype(np.int64)
    if not len(corners) or corners.min() < 0 or corners.max() >= len(positions):
        range_text = f"are {corners.min()}..{corners.max()}" if len(corners) else "are missing"
        raise ValueError(
            f"the indices of the faces {range_text}, but must be 0..{len(positions) - 1}, since the mesh has"
            f" {len(positions)} vertices. Export the mesh again."
        )
    # Faces with more than three corners are cut into triangles.
    corner_of_triangle, face_of_triangle = triangulate_faces(positions, corners, corner_counts)
    triangles = corners[corner_of_triangle]
    colours = _colours(vertices)
    normals = None
    face_colours = _colours(faces)
    if not geometry_only and all(name in vertices for name in ("nx", "ny", "nz")):
        normals = np.stack([_column(vertices, name) for name in ("nx", "ny", "nz")], axis=1)
    notes: list[Note] = []
    if header.textures and not geometry_only:
        texture_numbers = _texture_numbers(faces, face_of_triangle, len(header.textures))
        corner_uv = _corner_uv(vertices, faces, corners, corner_of_triangle)
        images, image_by_number, notes = _images(header.textures, corner_uv is not None, path, root)
        if images:
            assert corner_uv is not None
            return _textured_model(
                positions, triangles, normals, corner_uv, texture_numbers, images, image_by_number, notes
            )
    # Colours of vertices take precedence over colours of faces.
    if face_colours is not None and colours is None:
        # Faces of different colours must not share vertices, so each triangle gets three vertices of its own.
        positions = positions[triangles.reshape(-1)]
        colours = np.repeat(face_colours[face_of_triangle], 3, axis=0)
        # Normals of shared vertices do not apply any more; without normals, each triangle is shaded flat.
        normals = None
        triangles = np.arange(len(positions)).reshape(-1, 3)
    # A mesh whose only colour was a texture is grey.
    is_grey = bool(notes) and colours is None
    return model_from_primitives(
        [
            triangle_primitive(
                positions, triangles, colours=colours, normals=normals, material=0 if is_grey else None
            )
        ],
        [GREY_MATERIAL] if is_grey else [],
        notes=notes,
    )


def _images(
    names: list[str], has_uv: bool, path: Path | None, root: Path | None
) -> tuple[list[ImageFile], dict[int, int], list[Note]]:
    """Read the textures of a PLY file.

    Args:
        names: names of the textures in the file.
        has_uv: True if the mesh has texture coordinates.
        path: path of the file; None: no texture can be found.
        root: folder that may be read; None: the folder of the file.

    Returns: the images; the index of the image of each texture that can be shown; and notes on the others.
    """
    images: list[ImageFile] = []
    image_by_number: dict[int, int] = {}
    reasons = []
    if not has_uv:
        reasons.append(
            f"the texture {names[0][:40]!r} is left out, because the PLY file has no texture coordinates that"
            " are numbers (texcoord of the faces, or s and t of the vertices). Export the asset with them."
        )
    elif path is None:
        reasons.append(f"the texture {names[0][:40]!r} is left out. Pass the path of the file.")
    else:
        for number, name in enumerate(names[:MAX_TEXTURES]):
            try:
                texture_path = find_companion(path, name, root or path.parent, MAX_TEXTURE)
                images.append(read_texture(texture_path.read_bytes())[0])
                image_by_number[number] = len(images) - 1
            except (ValueError, OSError) as error:
                reasons.append(f"the texture {name[:40]!r} is left out: {error}")
        if len(names) > MAX_TEXTURES:
            reasons.append(f"the file names {len(names)} textures. Join them to at most {MAX_TEXTURES}.")
    return images, image_by_number, [Note("untextured", reason) for reason in reasons]


def _texture_numbers(faces: Table, face_of_triangle: np.ndarray, texture_count: int) -> np.ndarray:
    """Return the number of the texture of each triangle [F]; -1 for none.

    Args:
        faces: table of the faces.
        face_of_triangle: index [F] of the face of each triangle.
        texture_count: number of textures.
    """
    numbers = faces.get("texnumber")
    if not isinstance(numbers, np.ndarray):
        # Without numbers, all faces have the first texture.
        return np.zeros(len(face_of_triangle), dtype=np.int64)
    triangle_numbers = numbers.astype(np.int64)[face_of_triangle]
    return np.where((triangle_numbers >= 0) & (triangle_numbers < texture_count), triangle_numbers, -1)


def _corner_uv(
    vertices: Table, faces: Table, corners: np.ndarray, corner_of_triangle: np.ndarray
) -> np.ndarray | None:
    """Return the texture coordinates of the corners of all triangles [F, 3, 2], v downwards.

    Args:
        vertices: table of the vertices.
        faces: table of the faces.
        corners: indices [C] of the vertices at all corners.
        corner_of_triangle: indices [F, 3] into `corners`.

    Returns: None if the file has no texture coordinates, or if some are not finite.
    """
    uv = None
    face_coordinates = faces.get("texcoord")
    if isinstance(face_coordinates, tuple):
        # two numbers for each corner of a face
        coordinate_counts, coordinates = face_coordinates
        if len(coordinates) == 2 * len(corners):
            uv = np.asarray(coordinates, dtype=np.float64).reshape(-1, 2)[corner_of_triangle]
    else:
        for u_name, v_name in (("s", "t"), ("u", "v"), ("texture_u", "texture_v")):
            u = vertices.get(u_name)
            v = vertices.get(v_name)
            if isinstance(u, np.ndarray) and isinstance(v, np.ndarray):
                uv = np.stack([u, v], axis=1).astype(np.float64)[corners[corner_of_triangle]]
                break
    if uv is None or not np.isfinite(uv).all():
        return None
    # The texture coordinate v increases upwards in PLY, and downwards in glTF.
    return np.stack([uv[..., 0], 1 - uv[..., 1]], axis=-1)


def _textured_model(
    positions: np.ndarray,
    triangles: np.ndarray,
    normals: np.ndarray | None,
    corner_uv: np.ndarray,
    texture_numbers: np.ndarray,
    images: list[ImageFile],
    image_by_number: dict[int, int],
    notes: list[Note],
) -> Model:
    """Build a model with one primitive for each texture, and one in grey for faces without a texture.

    Args:
        positions: coordinates [N, 3] of the vertices.
        triangles: indices [F, 3] of vertices.
        normals: normals [N, 3] of the vertices; None: no normals.
        corner_uv: texture coordinates [F, 3, 2] of the corners.
        texture_numbers: number [F] of the texture of each triangle; -1 for none.
        images: images of the textures.
        image_by_number: index of the image of each texture that can be shown.
        notes: notes on textures that are left out.
    """
    if normals is not None:
        normals = mended_normals(normals, positions, triangles)
    image_indices = np.array([image_by_number.get(int(number), len(images)) for number in texture_numbers])
    primitives = []
    for image_index in np.unique(image_indices):
        is_selected = image_indices == image_index
        uv = corner_uv[is_selected].reshape(-1, 2)
        vertex_indices = triangles[is_selected].reshape(-1)
        # A vertex with several texture coordinates becomes several vertices.
        distinct_rows, faces = np.unique(np.column_stack([vertex_indices, uv]), axis=0, return_inverse=True)
        used_vertices = distinct_rows[:, 0].astype(np.int64)
        primitives.append(
            triangle_primitive(
                positions[used_vertices],
                faces.reshape(-1, 3),
                uv=distinct_rows[:, 1:],
                normals=None if normals is None else normals[used_vertices],
                material=int(image_index),
            )
        )
    materials: list[dict] = [
        {
            "pbrMetallicRoughness": {
                "metallicFactor": 0,
                "roughnessFactor": 1,
                "baseColorTexture": {"index": image_index},
            },
            "doubleSided": True,
        }
        for image_index in range(len(images))
    ]
    # Faces without a texture have the index after the last image.
    if len(images) in image_indices:
        materials.append(GREY_MATERIAL)
    return model_from_primitives(primitives, materials, images, notes)


def _column(table: Table, property_name: str) -> np.ndarray:
    """Return the values [N] of a property. Raises: ValueError if it is missing or a list property."""
    if not isinstance(table.get(property_name), np.ndarray):
        raise ValueError(
            f"the vertices in the PLY file have no property {property_name}. Export the mesh again."
        )
    return np.asarray(table[property_name])


def _colours(table: Table) -> np.ndarray | None:
    """Return the colours [N, 3 or 4] of a table as integral numbers in 0..255, or None if it has no colours.

    Colours that the file stores as floats are in 0..1 or in 0..255, see `colours_255`.
    """
    # alpha is optional
    for colour_names in _COLOURS:
        channel_names = [name for name in colour_names if isinstance(table.get(name), np.ndarray)]
        if channel_names[:3] == list(colour_names[:3]):
            break
    else:
        return None
    colour_columns = np.stack([np.asarray(table[channel_name]) for channel_name in channel_names], axis=1)
    if colour_columns.dtype.kind == "f":
        return np.concatenate(
            [colours_255(colour_columns[:, :3]), colours_255(colour_columns[:, 3:])], axis=1
        )
    # 255, 32767, 65535 or the largest number of 32 bits
    max_value = np.iinfo(colour_columns.dtype).max
    # Colours of 16 bits are scaled. Colours of 8 bits, and of 32 bits, which hold 0..255, are not scaled.
    return (
        np.rint(colour_columns.clip(0, max_value) / max_value * 255)
        if max_value in (32767, 65535)
        else colour_columns.clip(0, 255).astype(np.uint8)
    )


@dataclass(frozen=True)
class Splats:
    """Gaussians as arrays in the number types of the format GSP1, see the module's docstring."""

    centres: np.ndarray  # [N, 3] float32
    scales: np.ndarray  # [N, 3] float16, logarithms; their relative error is at most 0.05 %
    rotations: np.ndarray  # [N, 4] int16, unit quaternions w, x, y, z times 32767
    opacities: np.ndarray  # [N] uint8, opacity times 255
    colours: np.ndarray  # [N, 3] float16, coefficients of degree 0
    rest: np.ndarray  # [N, 3 ((d+1)^2 - 1)] float16, coefficients of higher degrees
    degree: int  # degree d of the spherical harmonics, 0..3


def read_splats(data: memoryview) -> Splats:
    """Read Gaussians from a PLY file of 3D Gaussian splatting.

    Raises: ValueError for a damaged file, for missing properties, and for numbers that are not finite.
    """
    header = read_header(data)
    rest_count = check_splats(header)
    vertex_element = header.elements[0]
    rows = np.frombuffer(
        data,
        [(name, header.order + numpy_type) for name, numpy_type in vertex_element.properties.items()],
        vertex_element.count,
        header.length,
    )

    def read_columns(*property_names: str) -> np.ndarray:
        """Return properties of all Gaussians as columns [N, number of names] float32.

        Raises: ValueError for NaN or infinity.
        """
        stacked_columns = np.stack(
            [rows[property_name].astype("<f4") for property_name in property_names], axis=1
        )
        if not np.isfinite(stacked_columns).all():
            raise ValueError(
                f"the Gaussians have NaN or infinity among the properties {', '.join(property_names)}. Export"
                " the splats again."
            )
        return stacked_columns

    rotations = read_columns(*_SPLAT[10:])
    quaternion_lengths = np.linalg.norm(rotations, axis=1, keepdims=True)
    # A quaternion of length 0 becomes the identity (1, 0, 0, 0); the inner `where` avoids a division by 0.
    rotations = np.where(
        quaternion_lengths > 0,
        rotations / np.where(quaternion_lengths > 0, quaternion_lengths, 1),
        np.array([1, 0, 0, 0], np.float32),
    )
    # Clipping keeps exp() finite. It changes no result, because sigmoid(+-80) is 0 or 1 in 8 bits.
    logits = read_columns("opacity")[:, 0].clip(-80, 80)
    return Splats(
        read_columns(*_SPLAT[:3]),
        _half(read_columns(*_SPLAT[7:10])),
        np.rint(rotations * 32767).astype("<i2"),
        # sigmoid of the logit, in 0..255
        np.rint(255 / (1 + np.exp(-logits))).astype("u1"),
        _half(read_columns(*_SPLAT[3:6])),
        _rest(rows, rest_count),
        _DEGREES[rest_count],
    )


def check_splats(header: Header) -> int:
    """Check that splats can be shown, and return the number of their properties f_rest_*.

    Raises: ValueError for a text file, for missing properties, and for too many Gaussians.
    """
    vertex_element = header.elements[0]
    if vertex_element.name != "vertex" or vertex_element.lists or not vertex_element.count:
        raise ValueError(
            "the first element of the PLY file must be `vertex`, with at least one Gaussian and without list"
            " properties. Export the splats again."
        )
    if vertex_element.count > MAX_SPLATS:
        raise ValueError(
            f"the file has {vertex_element.count:,} Gaussians, but at most {MAX_SPLATS:,} are allowed. Reduce"
            " their number."
        )
    if not header.order:
        raise ValueError("the PLY file of splats is a text file. Save it as binary_little_endian.")
    if splat_fault := _splat_fault(vertex_element.properties):
        raise ValueError(splat_fault)
    rest_names = [name for name in vertex_element.properties if name.startswith("f_rest_")]
    if len(rest_names) not in _DEGREES or set(rest_names) != {f"f_rest_{i}" for i in range(len(rest_names))}:
        raise ValueError(
            f"the splats have {len(rest_names)} f_rest_* properties, but there must be"
            f" {' or '.join(map(str, _DEGREES))}, numbered from 0. Export splats with harmonics of degree 0"
            " to 3."
        )
    return len(rest_names)


def _rest(rows: np.ndarray, property_count: int) -> np.ndarray:
    """Return the coefficients f_rest_* of the degrees above 0 as float16 [N, property_count].

    Args:
        rows: table of all Gaussians [N].
        property_count: number of properties f_rest_*.

    Raises: ValueError for NaN or infinity.
    """
    coefficients = np.empty((len(rows), property_count), "<f2")
    for property_index in range(property_count):
        # 65504 is the largest finite number of float16
        coefficients[:, property_index] = rows[f"f_rest_{property_index}"].clip(-65504, 65504)
    if not np.isfinite(coefficients).all():
        raise ValueError("the properties f_rest_* contain NaN or infinity. Export the splats again.")
    return coefficients


def _half(values: np.ndarray) -> np.ndarray:
    """Convert numbers to float16. Numbers beyond its range become its largest finite numbers, +-65504."""
    return values.clip(-65504, 65504).astype("<f2")


def splat_parts(splats: Splats) -> list[bytes | memoryview]:
    """Serialise splats as GSP1.

    Returns: parts of the file in order, which `b"".join` joins. The parts avoid a further copy of large
        arrays.
    """
    lowest_corner = splats.centres.min(axis=0)
    header = HEADER.pack(
        MAGIC,
        len(splats.centres),
        splats.degree,
        *lowest_corner.tolist(),
        *(splats.centres.max(axis=0) - lowest_corner).tolist(),
    )
    file_parts: list[bytes | memoryview] = [header]
    for array in (
        splats.centres,
        splats.scales,
        splats.rotations,
        splats.opacities,
        splats.colours,
        splats.rest,
    ):
        # Each array is padded to a multiple of 4 bytes.
        array_bytes = np.ascontiguousarray(array).tobytes()
        file_parts += [array_bytes, bytes(-len(array_bytes) % 4)]
    return file_parts
