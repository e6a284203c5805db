"""PLY files of meshes and of Gaussian splats.

The claims of a header are compared with the size of the file before any data is read. Faces of a mesh may
have any number of corners.

Splats are read from the usual file of 3D Gaussian splatting (Kerbl et al. 2023): x, y, z, f_dc_0..2,
f_rest_*, opacity (a logit), scale_0..2 (logarithms) and rot_0..3 (w, x, y, z). They are sent to the browser
as GSP1, little-endian:

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

import struct
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.geometry.files.model import Model, scene_of, triangles
from eg3d_rlhf.geometry.files.polygons import triangulated

MAGIC = b"GSP1"
HEADER = struct.Struct("<4sII3f3f")
MAX_HEADER = 64 << 10  # bytes
MAX_SPLATS = 4_000_000
MAX_FACES = 20_000_000
_MOST = 2**40  # largest count of elements that is accepted at all; keeps the arithmetic of sizes small
_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
# byte order of numpy; '' is text
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
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
# degree of the spherical harmonics by the number of f_rest_*, three channels
_DEGREES = {3 * ((d + 1) ** 2 - 1): d for d in range(4)}


@dataclass(frozen=True)
class Element:
    """An element of a header, such as vertex or face."""

    name: str
    count: int  # number of rows
    properties: dict[str, str]  # numpy type of each property; of a list, the type of its length
    lists: dict[str, str]  # numpy type of the items of each list property

    @property
    def row(self) -> int:
        """Return the bytes of a row, lists as if they were empty."""
        return sum(np.dtype(kind).itemsize for kind in self.properties.values())


@dataclass(frozen=True)
class Header:
    """The header of a PLY file."""

    order: str  # byte order of numpy; '' is text
    elements: list[Element]
    length: int  # bytes of the header

    @property
    def splats(self) -> bool:
        """Return True if the vertices are Gaussian splats."""
        return any(
            element.name == "vertex" and {"f_dc_0", "opacity", "scale_0", "rot_0"} <= set(element.properties)
            for element in self.elements
        )


def read_header(data: memoryview) -> Header:
    """Read the header of a PLY file, and check its claims against the size of the file.

    Raises: ValueError for a damaged header, or for claims that exceed the size of the file.
    """
    head = bytes(data[:MAX_HEADER])
    end = head.find(b"end_header")
    stop = head.find(b"\n", end)
    if not head.startswith(b"ply") or end < 0 or stop < 0:
        raise ValueError("expected a PLY file with a complete header, got another or a damaged file")
    order = None
    elements: list[tuple[str, int, dict[str, str], dict[str, str]]] = []
    try:
        for line in head[:end].decode("ascii", "replace").splitlines():
            words = line.split()
            if words[:1] == ["format"]:
                order = _ORDERS[words[1]]
            elif words[:1] == ["element"]:
                elements.append((words[1], int(words[2]), {}, {}))
            elif words[:1] == ["property"]:
                _, _, properties, lists = elements[-1]
                # property list TYPE_OF_LENGTH TYPE_OF_ITEMS NAME, or property TYPE NAME
                properties[words[-1]] = _TYPES[words[2] if words[1] == "list" else words[1]]
                if words[1] == "list":
                    lists[words[-1]] = _TYPES[words[3]]
    except (KeyError, IndexError, ValueError):
        raise ValueError("expected a PLY header, got a damaged one") from None
    if order is None:
        raise ValueError("expected a PLY header with a format line, got none")
    header = Header(order, [Element(*element) for element in elements], stop + 1)
    rest = len(data) - header.length
    for element in header.elements:
        # In text a number takes at least two bytes: a digit and a space.
        rest -= min(element.count, _MOST) * (element.row if order else 2 * len(element.properties))
        # The last line of text may lack its line break, hence -1.
        if not 0 <= element.count <= _MOST or rest < (0 if order else -1):
            claimed = f"{str(element.count)[:20]} of {element.name!r:.40}"
            raise ValueError(
                f"expected a PLY file as large as its header claims, got {claimed} in {len(data):,} bytes"
            )
    return header


def check_mesh(header: Header) -> None:
    """Raise ValueError unless the file contains a mesh of acceptable size."""
    counts = {element.name: element.count for element in header.elements}
    if not counts.get("vertex") or not counts.get("face"):
        raise ValueError("expected a mesh or Gaussian splats, got points without faces")
    if counts["face"] > MAX_FACES:
        raise ValueError(f"expected up to {MAX_FACES:,} faces, got {counts['face']:,}")


def read_mesh(data: bytes | memoryview) -> Model:
    """Read a mesh with colours and normals of its vertices, or with colours of its faces. Raises:
    ValueError.
    """
    header = read_header(memoryview(data))
    check_mesh(header)
    tables = _tables(memoryview(data), header)
    vertices = tables["vertex"]
    faces = tables["face"]
    positions = np.stack([_column(vertices, name) for name in "xyz"], axis=1)
    index_property = next((name for name in ("vertex_indices", "vertex_index") if name in faces), None)
    if index_property is None:
        raise ValueError(
            "expected a property vertex_indices of the faces in the PLY file, got"
            f" {', '.join(faces)[:80] or 'none'}"
        )
    counts, corners = faces[index_property]
    corners = corners.astype(np.int64)
    if not len(corners) or corners.min() < 0 or corners.max() >= len(positions):
        got = f"{corners.min()}..{corners.max()}" if len(corners) else "none"
        raise ValueError(f"expected indices of the {len(positions)} vertices, got {got}")
    corner_of_triangle, face_of_triangle = triangulated(positions, corners, counts)
    triangle = corners[corner_of_triangle]
    colours = _colours(vertices)
    normals = None
    face_colours = _colours(faces)
    if all(name in vertices for name in ("nx", "ny", "nz")):
        normals = np.stack([_column(vertices, name) for name in ("nx", "ny", "nz")], axis=1)
    if face_colours is not None and colours is None:
        # Vertices are not shared between faces of different colours: each triangle gets its own three.
        positions = positions[triangle.reshape(-1)]
        colours = np.repeat(face_colours[face_of_triangle], 3, axis=0)
        # With its own vertices, each triangle is shaded flat
        normals = None
        triangle = np.arange(len(positions)).reshape(-1, 3)
    return scene_of([triangles(positions, triangle, colours=colours, normals=normals)])


# property -> values [N]; of a list property, the lengths [N] and all items
Table = dict[str, "np.ndarray | tuple[np.ndarray, np.ndarray]"]


def _column(table: Table, name: str) -> np.ndarray:
    """Return a property that is no list. Raises: ValueError if the file has no such property."""
    if not isinstance(table.get(name), np.ndarray):
        raise ValueError(f"expected {name} of each vertex in the PLY file, got none")
    return np.asarray(table[name])


def _colours(table: Table) -> np.ndarray | None:
    """Return colours [N, 3 or 4] as whole numbers 0..255; None without colours. Floats in the file are
    0..1.
    """
    names = [name for name in ("red", "green", "blue", "alpha") if isinstance(table.get(name), np.ndarray)]
    if names[:3] != ["red", "green", "blue"]:
        return None
    columns = np.stack([np.asarray(table[name]) for name in names], axis=1)
    if columns.dtype.kind == "f":
        return np.rint(np.nan_to_num(columns).clip(0, 1) * 255)
    largest = np.iinfo(columns.dtype).max
    # 16-bit colours are scaled; 8-bit ones, and wider types that hold 0..255, are not.
    return (
        np.rint(columns.clip(0, largest) / largest * 255)
        if largest in (32767, 65535)
        else columns.clip(0, 255).astype(np.uint8)
    )


def _tables(data: memoryview, header: Header) -> dict[str, Table]:
    """Read all elements of a PLY file.

    Raises: ValueError for a file that ends early, or whose text is not numbers.
    """
    at = header.length
    tables = dict[str, Table]()
    words = None if header.order else bytes(data[at:]).split()
    # a position in the list of words, or in the bytes
    at = at if header.order else 0
    for element in header.elements:
        try:
            table, at = (
                _read_text(words, at, element)
                if words is not None
                else _read_binary(data, at, element, header.order)
            )
        except (struct.error, IndexError, ValueError, OverflowError):
            raise ValueError(
                f"expected {element.count:,} of {element.name!r:.40} in the PLY file, got fewer or damaged"
                " ones"
            ) from None
        tables.setdefault(element.name, table)
    return tables


def _read_text(words: list[bytes], at: int, element: Element) -> tuple[Table, int]:
    """Read an element from words of text. Return the table and the position after it."""
    columns: dict[str, list] = {name: [] for name in element.properties}
    items: dict[str, list] = {name: [] for name in element.lists}
    for _ in range(element.count):
        for name in element.properties:
            value = float(words[at])
            columns[name].append(value)
            at += 1
            if name in items:
                if not 0 <= value <= len(words) - at:  # the length of a list
                    raise ValueError(name)
                items[name] += map(float, words[at : at + int(value)])
                at += int(value)
    return _typed(element, columns, items), at


def _read_binary(data: memoryview, at: int, element: Element, order: str) -> tuple[Table, int]:
    """Read an element from bytes. Return the table and the position after it.

    Rows of equal length are read at once, others one by one.
    """
    kinds = element.properties
    if not element.lists:
        rows = np.frombuffer(data, [(name, order + kind) for name, kind in kinds.items()], element.count, at)
        return {name: rows[name] for name in kinds}, at + rows.nbytes
    if element.count and len(element.lists) == 1:
        (name,) = element.lists
        # Read as if all lists were as long as the first one, e.g. a mesh of triangles only.
        before = sum(np.dtype(kind).itemsize for kind in list(kinds.values())[: list(kinds).index(name)])
        length = int(np.frombuffer(data, order + kinds[name], 1, at + before)[0])
        fields = [
            field
            for key, kind in kinds.items()
            for field in (
                [(key, order + kind), (f"{key} items", order + element.lists[key], (length,))]
                if key == name
                else [(key, order + kind)]
            )
        ]
        if 0 <= length <= len(data) and at + np.dtype(fields).itemsize * element.count <= len(data):
            rows = np.frombuffer(data, fields, element.count, at)
            if (rows[name] == length).all():  # the guess holds for every row
                columns: Table = {key: rows[key] for key in kinds if key != name}
                return {**columns, name: (rows[name], rows[f"{name} items"].reshape(-1))}, at + rows.nbytes
    # Lists of different lengths: row by row.
    values: dict[str, list] = {name: [] for name in kinds}
    items: dict[str, list] = {name: [] for name in element.lists}
    dtypes = {name: np.dtype(order + kind) for name, kind in kinds.items()}
    for _ in range(element.count):
        for name, kind in dtypes.items():
            values[name].append(np.frombuffer(data, kind, 1, at)[0])
            at += kind.itemsize
            if name in items:
                list_items = np.frombuffer(data, order + element.lists[name], int(values[name][-1]), at)
                items[name].append(list_items)
                at += list_items.nbytes
    return (
        _typed(element, values, {name: np.concatenate(rows) if rows else [] for name, rows in items.items()}),
        at,
    )


def _typed(element: Element, values: dict[str, list], items: dict) -> Table:
    """Convert columns and items of lists to the types of the header."""
    columns = {name: np.array(values[name]).astype(kind) for name, kind in element.properties.items()}
    return {
        name: (column, np.asarray(items[name]).astype(element.lists[name])) if name in items else column
        for name, column in columns.items()
    }


@dataclass(frozen=True)
class Splats:
    """Gaussians with the types of GSP1."""

    centres: np.ndarray  # [N, 3] float32
    scales: np.ndarray  # logarithms; float16 limits their relative error to 0.05 %
    rotations: np.ndarray  # unit quaternions w, x, y, z times 32767
    opacities: np.ndarray  # 0..255
    colours: np.ndarray  # coefficients of degree 0, float16
    rest: np.ndarray  # [N, 3 ((d+1)^2 - 1)] float16, coefficients of higher degrees
    degree: int  # of the spherical harmonics, 0..3


def read_splats(data: memoryview) -> Splats:
    """Read Gaussians from the usual PLY file. Raises: ValueError."""
    header = read_header(data)
    count = check_splats(header)
    first = header.elements[0]
    rows = np.frombuffer(
        data,
        [(name, header.order + kind) for name, kind in first.properties.items()],
        first.count,
        header.length,
    )

    def columns(*names: str) -> np.ndarray:
        """Return properties as columns [N, number of names] float32. Raises: ValueError for NaN or
        infinity.
        """
        stacked = np.stack([rows[name].astype("<f4") for name in names], axis=1)
        if not np.isfinite(stacked).all():
            raise ValueError(f"expected finite numbers in {names[0]}, got NaN or infinity")
        return stacked

    rotations = columns(*_SPLAT[10:])
    lengths = np.linalg.norm(rotations, axis=1, keepdims=True)
    # A quaternion of length 0 becomes the identity.
    rotations = np.where(
        lengths > 0, rotations / np.where(lengths > 0, lengths, 1), np.array([1, 0, 0, 0], np.float32)
    )
    # Clipping keeps exp() finite; sigmoid(+-80) is 0 or 1 in 8 bits.
    logits = columns("opacity")[:, 0].clip(-80, 80)
    return Splats(
        columns(*_SPLAT[:3]),
        _half(columns(*_SPLAT[7:10])),
        np.rint(rotations * 32767).astype("<i2"),
        np.rint(255 / (1 + np.exp(-logits))).astype("u1"),
        _half(columns(*_SPLAT[3:6])),
        _rest(rows, count),
        _DEGREES[count],
    )


def check_splats(header: Header) -> int:
    """Return the number of f_rest_* properties. Raises: ValueError for splats that cannot be shown."""
    first = header.elements[0]
    if first.name != "vertex" or first.lists or not first.count:
        raise ValueError("expected splats as the first element of the PLY file, without list properties")
    if first.count > MAX_SPLATS:
        raise ValueError(f"expected up to {MAX_SPLATS:,} Gaussians, got {first.count:,}")
    if not header.order:
        raise ValueError("expected splats in a binary PLY file, got text; save it as binary_little_endian")
    missing = [name for name in _SPLAT if name not in first.properties]
    rest = [name for name in first.properties if name.startswith("f_rest_")]
    if missing or len(rest) not in _DEGREES or set(rest) != {f"f_rest_{i}" for i in range(len(rest))}:
        lacking = f", without {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"expected splats with harmonics of degree 0 to 3, got {len(rest)} f_rest_*{lacking}"
        )
    return len(rest)


def _rest(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the coefficients of higher degrees, [N, count] float16, clipped to its range."""
    out = np.empty((len(rows), count), "<f2")
    for i in range(count):
        out[:, i] = rows[f"f_rest_{i}"].clip(-65504, 65504)
    if not np.isfinite(out).all():
        raise ValueError("expected finite numbers in f_rest, got NaN or infinity")
    return out


def _half(values: np.ndarray) -> np.ndarray:
    """Convert to float16, clipped to its largest finite value."""
    return values.clip(-65504, 65504).astype("<f2")


def splat_parts(splats: Splats) -> list[bytes | memoryview]:
    """Serialise splats as GSP1, in parts so that large arrays are not copied again."""
    lowest = splats.centres.min(axis=0)
    header = HEADER.pack(
        MAGIC,
        len(splats.centres),
        splats.degree,
        *lowest.tolist(),
        *(splats.centres.max(axis=0) - lowest).tolist(),
    )
    parts: list[bytes | memoryview] = [header]
    for values in (
        splats.centres,
        splats.scales,
        splats.rotations,
        splats.opacities,
        splats.colours,
        splats.rest,
    ):
        data = np.ascontiguousarray(values).tobytes()
        parts += [data, bytes(-len(data) % 4)]
    return parts
