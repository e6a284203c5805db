"""A mesh as it is shown: all of a GLB that can be seen and nothing else, and its bytes as GLB 2.0.

Whatever a mesh is read from becomes a `Model`, and what is sent is written from that alone: no name, comment, extra or generator survives.
Arrays are kept as they were stored, so positions, normals and texture coordinates keep every bit.

Letters: N vertices or indices, W numbers in each.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

GLB_MAGIC, JSON_CHUNK, BIN_CHUNK = b"glTF", 0x4E4F534A, 0x004E4942
GLB_HEADER, CHUNK_HEADER = struct.Struct("<4sII"), struct.Struct("<II")
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}  # glTF's numbers of component types
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES = 4  # glTF's number of a mode: three indices each
_NUMBERS = {np.dtype(name).str: number for number, name in COMPONENTS.items()}
_TYPES = {width: name for name, width in WIDTHS.items()}
_VERTICES, _INDICES = 34962, 34963  # targets of buffer views


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers of vertices; the same object is written once."""

    values: np.ndarray  # [N, W]
    normalized: bool = False  # integers stand for 0..1 or -1..1


@dataclass(frozen=True, eq=False)
class Primitive:
    """Triangles of one material."""

    attributes: dict[str, Array]  # by glTF's names; POSITION is there
    indices: Array | None = None  # [N, 1]
    mode: int = TRIANGLES
    material: int | None = None


@dataclass(frozen=True)
class Picture:
    """A texture's file, stripped."""

    data: bytes
    kind: str  # media type


@dataclass
class Node:
    """A place in the scene."""

    children: list[int] = field(default_factory=list)
    mesh: int | None = None
    place: dict = field(default_factory=dict)  # glTF's matrix, or translation, rotation and scale


@dataclass
class Model:
    """What is shown; materials, textures and samplers are glTF's records with whitelisted keys."""

    nodes: list[Node] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    meshes: list[list[Primitive]] = field(default_factory=list)
    materials: list[dict] = field(default_factory=list)
    textures: list[dict] = field(default_factory=list)
    samplers: list[dict] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)


class _Buffer:
    """The binary part as it grows: its pieces, and the records that point into it."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self.length = 0
        self.views: list[dict] = []
        self.accessors: list[dict] = []
        self._written: dict[int, int] = {}  # id of an array -> accessor

    def view(self, data: bytes | memoryview, **fields: int) -> int:
        """A further buffer view."""
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), **fields})
        padding = bytes(-len(data) % 4)
        self.pieces += [data, padding]
        self.length += len(data) + len(padding)
        return len(self.views) - 1

    def accessor(self, array: Array, indices: bool = False) -> int:
        """The accessor of an array, made on the first call."""
        if id(array) not in self._written:
            values, fields = array.values, {}
            count, width = values.shape
            size = width * values.itemsize
            if not indices and size % 4:  # vertices begin at multiples of 4 bytes
                values = np.concatenate([
                    np.ascontiguousarray(values).view(np.uint8).reshape(count, size), np.zeros((count, -size % 4), np.uint8)
                ], axis=1)  # fmt: skip
                fields = {"byteStride": size + -size % 4}
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            record = {
                "bufferView": self.view(data, target=_INDICES if indices else _VERTICES, **fields), "count": count,
                "componentType": _NUMBERS[array.values.dtype.str], "type": _TYPES[width],
                **({"normalized": True} if array.normalized else {}),
            }  # fmt: skip
            self.accessors.append(record)
            self._written[id(array)] = len(self.accessors) - 1
        return self._written[id(array)]


def glb_parts(model: Model) -> list[bytes | memoryview]:
    """The bytes of a GLB in parts, so that large arrays are not copied; `b"".join` makes one of them."""
    buffer = _Buffer()
    meshes = [{"primitives": [_primitive(buffer, part) for part in mesh]} for mesh in model.meshes]
    images = [{"bufferView": buffer.view(picture.data), "mimeType": picture.kind} for picture in model.pictures]
    nodes = [
        {**({"children": n.children} if n.children else {}), **({} if n.mesh is None else {"mesh": n.mesh}), **n.place} for n in model.nodes
    ]
    document = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": model.roots}], "nodes": nodes, "meshes": meshes,
        "materials": model.materials, "textures": model.textures, "samplers": model.samplers, "images": images,
        "accessors": buffer.accessors, "bufferViews": buffer.views, "buffers": [{"byteLength": buffer.length}],
        "extensionsUsed": sorted(model.extensions), "extensionsRequired": sorted(model.extensions & {"KHR_mesh_quantization"}),
    }  # fmt: skip
    text = json.dumps({k: v for k, v in document.items() if v or k == "scene"}, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    total = GLB_HEADER.size + 2 * CHUNK_HEADER.size + len(text) + buffer.length
    return [
        GLB_HEADER.pack(GLB_MAGIC, 2, total), CHUNK_HEADER.pack(len(text), JSON_CHUNK), text,
        CHUNK_HEADER.pack(buffer.length, BIN_CHUNK), *buffer.pieces,
    ]  # fmt: skip


def _primitive(buffer: _Buffer, part: Primitive) -> dict:
    record: dict = {"attributes": {}, "mode": part.mode}
    for name, array in part.attributes.items():
        record["attributes"][name] = number = buffer.accessor(array)
        if name == "POSITION":
            ends = [array.values.min(axis=0).tolist(), array.values.max(axis=0).tolist()]
            buffer.accessors[number] |= dict(zip(("min", "max"), ends, strict=True))
    if part.indices is not None:
        record["indices"] = buffer.accessor(part.indices, indices=True)
    if part.material is not None:
        record["material"] = part.material
    return record


def linear(srgb: np.ndarray) -> np.ndarray:
    """Colours 0..1 from sRGB to linear, as glTF wants those of vertices and materials (IEC 61966-2-1)."""
    srgb = np.asarray(srgb, dtype=np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype("<f4")


def triangles(
    positions: np.ndarray, faces: np.ndarray, *, uv: np.ndarray | None = None, colours: np.ndarray | None = None,
    normals: np.ndarray | None = None, material: int | None = None,
) -> Primitive:
    """A primitive of arrays.

    Args: positions [N, 3]; faces [F, 3]; uv [N, 2] as glTF has them, v downwards; colours [N, 3 or 4] uint8, sRGB; normals [N, 3].
    Raises: ValueError for an empty mesh, numbers that are not finite, and indices out of range.
    """
    positions, faces = np.asarray(positions, dtype="<f4"), np.asarray(faces)
    if positions.ndim != 2 or positions.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3 or not len(faces) or not len(positions):
        raise ValueError(f"expected a mesh of triangles, got {len(positions)} points and {len(faces)} faces")
    if not np.isfinite(positions).all():
        raise ValueError("expected finite positions, got others")
    if faces.min() < 0 or faces.max() >= len(positions):
        raise ValueError(f"expected indices of {len(positions)} vertices, got {faces.min()}..{faces.max()}")
    attributes = {"POSITION": Array(positions)}
    for name, values in (("NORMAL", normals), ("TEXCOORD_0", uv)):
        if values is not None:
            if len(values) != len(positions) or not np.isfinite(values).all():
                raise ValueError(f"expected {name.lower()} as finite numbers for each vertex, got others")
            attributes[name] = Array(np.ascontiguousarray(values, dtype="<f4"))
    if colours is not None:
        if len(colours) != len(positions) or colours.ndim != 2 or colours.shape[1] not in (3, 4):
            raise ValueError("expected a colour for each vertex, got others")
        shown = colours / 255.0
        shown[:, :3] = linear(shown[:, :3])
        attributes["COLOR_0"] = Array(np.ascontiguousarray(shown, dtype="<f4"))
    narrow = "<u2" if len(positions) <= 65535 else "<u4"
    return Primitive(attributes, Array(np.ascontiguousarray(faces, dtype=narrow).reshape(-1, 1)), material=material)


def scene_of(primitives: Iterable[Primitive], materials: Iterable[dict] = (), pictures: Iterable[Picture] = ()) -> Model:
    """A model of one mesh at the origin; texture i is picture i."""
    shown = list(pictures)
    textures = [{"source": i} for i in range(len(shown))]
    return Model([Node(mesh=0)], [0], [list(primitives)], list(materials), textures, pictures=shown)
