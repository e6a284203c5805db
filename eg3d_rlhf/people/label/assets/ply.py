"""PLY files: what their headers claim, held against their size before anything is read; meshes, and Gaussian splats.

A mesh is read by trimesh. Splats are the usual file of 3D Gaussian splatting (Kerbl et al. 2023): x, y, z, f_dc_0..2, f_rest_*, opacity
(a logit), scale_0..2 (logarithms) and rot_0..3 (w, x, y, z); they are sent as GSP1, little-endian:

| bytes                       | what                                                                          |
| --------------------------- | ----------------------------------------------------------------------------- |
| 4                           | magic 'GSP1'                                                                  |
| 2 x uint32                  | N Gaussians, degree d of the spherical harmonics, 0..3                        |
| 3 x float32, 3 x float32    | least corner and extent of the centres                                        |
| N x 3 x float32             | centres, as in the file                                                       |
| N x 3 x float16             | logarithms of the scales                                                      |
| N x 4 x int16               | rotations, unit quaternions w, x, y, z as q / 32767                           |
| N x uint8                   | opacities as x / 255                                                          |
| N x 3 x float16             | colours: coefficients of degree 0                                             |
| N x 3 ((d+1)^2 - 1) float16 | the others, channel after channel as f_rest_*                                 |

Each array begins at a multiple of 4 bytes.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.people.label.assets.model import Model, scene_of, triangles

MAGIC = b"GSP1"
HEADER = struct.Struct("<4sII3f3f")
MAX_HEADER = 64 << 10  # bytes
MAX_SPLATS = 4_000_000
MAX_FACES = 20_000_000
_MOST = 2**40  # of anything
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2", "int": "i4",
    "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_SPLAT = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
_DEGREES = {3 * ((d + 1) ** 2 - 1): d for d in range(4)}  # by the number of f_rest_*


@dataclass(frozen=True)
class Element:
    """One of a header's elements."""

    name: str
    count: int
    properties: dict[str, str]  # type of each; of a list, that of its length
    lists: frozenset[str]

    @property
    def row(self) -> int:
        return sum(np.dtype(kind).itemsize for kind in self.properties.values())


@dataclass(frozen=True)
class Header:
    """What a PLY file claims."""

    order: str  # of the bytes; '' is text
    elements: list[Element]
    length: int  # bytes of the header

    @property
    def splats(self) -> bool:
        return any(element.name == "vertex" and {"f_dc_0", "opacity", "scale_0", "rot_0"} <= set(element.properties)
                   for element in self.elements)  # fmt: skip


def read_header(data: memoryview) -> Header:
    """The header of a PLY file whose bytes are all there. Raises: ValueError for a damaged one, or claims that the file cannot hold."""
    head = bytes(data[:MAX_HEADER])
    end = head.find(b"end_header")
    stop = head.find(b"\n", end)
    if not head.startswith(b"ply") or end < 0 or stop < 0:
        raise ValueError("expected a PLY file with its header, got something else")
    order = None
    elements: list[tuple[str, int, dict[str, str], set[str]]] = []
    try:
        for line in head[:end].decode("ascii", "replace").splitlines():
            words = line.split()
            if words[:1] == ["format"]:
                order = _ORDERS[words[1]]
            elif words[:1] == ["element"]:
                elements.append((words[1], int(words[2]), {}, set()))
            elif words[:1] == ["property"]:
                _, _, properties, lists = elements[-1]
                properties[words[-1]] = _TYPES[words[2] if words[1] == "list" else words[1]]
                if words[1] == "list":
                    _ = _TYPES[words[3]]
                    lists.add(words[-1])
    except (KeyError, IndexError, ValueError):
        raise ValueError("expected a PLY header, got a damaged one") from None
    if order is None:
        raise ValueError("expected a PLY header with a format, got none")
    header = Header(order, [Element(name, count, kinds, frozenset(lists)) for name, count, kinds, lists in elements], stop + 1)
    rest = len(data) - header.length
    for element in header.elements:
        rest -= min(element.count, _MOST) * (element.row if order else 2 * len(element.properties))
        if not 0 <= element.count <= _MOST or rest < (0 if order else -1):  # text may end without a line break
            claimed = f"{str(element.count)[:20]} of {element.name!r:.40}"
            raise ValueError(f"expected a PLY file that holds what it claims, got {claimed} in {len(data):,} bytes")
    return header


def check_mesh(header: Header) -> None:
    """Whether there is a mesh to be read. Raises: ValueError."""
    counts = {element.name: element.count for element in header.elements}
    if not counts.get("vertex") or not counts.get("face"):
        raise ValueError("expected a mesh or Gaussian splats, got points alone")
    if counts["face"] > MAX_FACES:
        raise ValueError(f"expected up to {MAX_FACES:,} triangles, got {counts['face']:,}")


def read_mesh(data: memoryview) -> Model:
    """A mesh with its vertices' colours and normals. Raises: ValueError."""
    check_mesh(read_header(data))
    from trimesh.exchange.ply import load_ply

    try:
        loaded = load_ply(io.BytesIO(data), fix_texture=False)
        vertices, faces = np.asarray(loaded["vertices"]), np.asarray(loaded["faces"])
    except Exception as error:  # whatever a damaged file makes of the parser
        raise ValueError(f"expected a PLY mesh, got a damaged one ({type(error).__name__})") from None
    colours, normals, painted = loaded.get("vertex_colors"), loaded.get("vertex_normals"), loaded.get("face_colors")
    whole = len(faces) > 0 and faces.min() >= 0 and faces.max() < len(vertices)
    if painted is not None and colours is None and whole and len(painted) == len(faces):
        vertices, colours, normals = vertices[faces.reshape(-1)], np.repeat(painted, 3, axis=0), None
        faces = np.arange(len(vertices)).reshape(-1, 3)
    return scene_of([triangles(vertices, faces, colours=colours, normals=normals)])


@dataclass(frozen=True)
class Splats:
    """Gaussians as GSP1 holds them."""

    centres: np.ndarray  # [N, 3] float32
    scales: np.ndarray  # [N, 3] float16, logarithms
    rotations: np.ndarray  # [N, 4] int16
    opacities: np.ndarray  # [N] uint8
    colours: np.ndarray  # [N, 3] float16
    rest: np.ndarray  # [N, 3 ((d+1)^2 - 1)] float16
    degree: int


def read_splats(data: memoryview) -> Splats:
    """Gaussians from the usual PLY. Raises: ValueError."""
    header = read_header(data)
    count = check_splats(header)
    first = header.elements[0]
    rows = np.frombuffer(data, [(name, header.order + kind) for name, kind in first.properties.items()], first.count, header.length)

    def columns(*wanted: str) -> np.ndarray:
        """[N, number of names]"""
        stacked = np.stack([rows[name].astype("<f4") for name in wanted], axis=1)
        if not np.isfinite(stacked).all():
            raise ValueError(f"expected finite numbers in {wanted[0]}, got others")
        return stacked

    turns = columns(*_SPLAT[10:])
    lengths = np.linalg.norm(turns, axis=1, keepdims=True)
    turns = np.where(lengths > 0, turns / np.where(lengths > 0, lengths, 1), np.array([1, 0, 0, 0], np.float32))
    logits = columns("opacity")[:, 0].clip(-80, 80)
    return Splats(
        columns(*_SPLAT[:3]), _half(columns(*_SPLAT[7:10])), np.rint(turns * 32767).astype("<i2"),
        np.rint(255 / (1 + np.exp(-logits))).astype("u1"), _half(columns(*_SPLAT[3:6])),
        _rest(rows, count), _DEGREES[count],
    )  # fmt: skip


def check_splats(header: Header) -> int:
    """How many f_rest_* there are. Raises: ValueError for splats that cannot be shown."""
    first = header.elements[0]
    if first.name != "vertex" or first.lists or not first.count:
        raise ValueError("expected splats to come first in the PLY file, each with the same properties")
    if first.count > MAX_SPLATS:
        raise ValueError(f"expected up to {MAX_SPLATS:,} Gaussians, got {first.count:,}")
    if not header.order:
        raise ValueError("expected splats in a binary PLY file, got text; write it as binary_little_endian")
    missing = [name for name in _SPLAT if name not in first.properties]
    rest = [name for name in first.properties if name.startswith("f_rest_")]
    if missing or len(rest) not in _DEGREES or set(rest) != {f"f_rest_{i}" for i in range(len(rest))}:
        lacking = f", without {', '.join(missing)}" if missing else ""
        raise ValueError(f"expected splats with harmonics of degree 0 to 3, got {len(rest)} f_rest_*{lacking}")
    return len(rest)


def _rest(rows: np.ndarray, count: int) -> np.ndarray:
    out = np.empty((len(rows), count), "<f2")
    for i in range(count):
        out[:, i] = rows[f"f_rest_{i}"].clip(-65504, 65504)
    if not np.isfinite(out).all():
        raise ValueError("expected finite numbers in f_rest, got others")
    return out


def _half(values: np.ndarray) -> np.ndarray:
    return values.clip(-65504, 65504).astype("<f2")


def splat_parts(splats: Splats) -> list[bytes | memoryview]:
    """GSP1 in parts."""
    least = splats.centres.min(axis=0)
    header = HEADER.pack(MAGIC, len(splats.centres), splats.degree, *least.tolist(), *(splats.centres.max(axis=0) - least).tolist())
    parts: list[bytes | memoryview] = [header]
    for values in (splats.centres, splats.scales, splats.rotations, splats.opacities, splats.colours, splats.rest):
        data = np.ascontiguousarray(values).tobytes()
        parts += [data, bytes(-len(data) % 4)]
    return parts
