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

import struct
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.geometry.files.model import Model, model_from_primitives, triangle_primitive
from eg3d_rlhf.geometry.files.polygons import triangulate_faces

MAGIC = b"GSP1"
HEADER = struct.Struct("<4sII3f3f")  # header of GSP1, the first three rows of the table
MAX_HEADER = 64 << 10  # largest number of bytes of the header
MAX_SPLATS = 4_000_000  # largest number of Gaussians
MAX_FACES = 20_000_000  # largest number of faces of a mesh
_MAX_COUNT = 2**40  # larger numbers of elements are rejected without computing with them
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
# Format in the header -> byte order of numpy; '' means text.
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
# Number of properties f_rest_* -> degree d of the spherical harmonics. Each of the three colour channels has
# (d + 1)^2 coefficients, of which one is f_dc_*.
_DEGREES = {3 * ((d + 1) ** 2 - 1): d for d in range(4)}


@dataclass(frozen=True)
class Element:
    """An element of a PLY header: a table with named columns, such as vertex or face."""

    name: str  # such as "vertex"
    count: int  # number of rows
    properties: dict[str, str]  # numpy type of each property; of a list, the type of its length
    lists: dict[str, str]  # numpy type of the items of each list property

    @property
    def row(self) -> int:
        """Return the number of bytes of a row whose lists are all empty."""
        return sum(np.dtype(numpy_type).itemsize for numpy_type in self.properties.values())


@dataclass(frozen=True)
class Header:
    """The header of a PLY file."""

    order: str  # byte order of numpy; '' means text
    elements: list[Element]  # in the order of the file
    length: int  # number of bytes of the header

    @property
    def splats(self) -> bool:
        """Return True if the vertices are Gaussian splats."""
        return any(
            element.name == "vertex" and {"f_dc_0", "opacity", "scale_0", "rot_0"} <= set(element.properties)
            for element in self.elements
        )


def read_header(data: memoryview) -> Header:
    """Read the header of a PLY file, and compare the sizes that it states with the size of the file.

    Raises: ValueError for a damaged header, and for sizes that exceed the size of the file.
    """
    # A header that is longer is rejected like a damaged one.
    header_bytes = bytes(data[:MAX_HEADER])
    keyword_position = header_bytes.find(b"end_header")
    header_end = header_bytes.find(b"\n", keyword_position)
    if not header_bytes.startswith(b"ply") or keyword_position < 0 or header_end < 0:
        raise ValueError(
            "the file has no complete PLY header: it is damaged or of another format. Export it again."
        )
    byte_order = None
    elements: list[tuple[str, int, dict[str, str], dict[str, str]]] = []
    try:
        for header_line in header_bytes[:keyword_position].decode("ascii", "replace").splitlines():
            words = header_line.split()
            if words[:1] == ["format"]:
                byte_order = _ORDERS[words[1]]
            elif words[:1] == ["element"]:
                # properties follow in the next lines
                elements.append((words[1], int(words[2]), {}, {}))
            elif words[:1] == ["property"]:
                _, _, properties, lists = elements[-1]
                # property list TYPE_OF_LENGTH TYPE_OF_ITEMS NAME, or property TYPE NAME
                properties[words[-1]] = _TYPES[words[2] if words[1] == "list" else words[1]]
                if words[1] == "list":
                    lists[words[-1]] = _TYPES[words[3]]
    except (KeyError, IndexError, ValueError):
        raise ValueError("the PLY header is damaged. Export the file again.") from None
    if byte_order is None:
        raise ValueError("the PLY header has no line `format`. Export the file again.")
    header = Header(byte_order, [Element(*element) for element in elements], header_end + 1)
    # number of bytes that are left for the elements
    remaining_bytes = len(data) - header.length
    for element in header.elements:
        # In a text file, a number takes at least two bytes: a digit and a space.
        remaining_bytes -= min(element.count, _MAX_COUNT) * (
            element.row if byte_order else 2 * len(element.properties)
        )
        # The last line of a text file may have no line break at its end, hence -1.
        if not 0 <= element.count <= _MAX_COUNT or remaining_bytes < (0 if byte_order else -1):
            # shortened, because an untrusted file may contain very long texts
            stated_size = f"{str(element.count)[:20]} elements {element.name!r:.40}"
            raise ValueError(
                f"the PLY header states {stated_size}, which do not fit into the {len(data):,} bytes of the"
                " file. Export it again."
            )
    return header


def check_mesh(header: Header) -> None:
    """Raise ValueError unless the header describes a mesh with faces, and with at most MAX_FACES faces."""
    count_by_element = {element.name: element.count for element in header.elements}
    # missing elements, or elements without rows
    vertex_count = count_by_element.get("vertex", 0)
    face_count = count_by_element.get("face", 0)
    if not vertex_count or not face_count:
        raise ValueError(
            f"the PLY file has {vertex_count} points and {face_count} faces, and the points are no Gaussian"
            " splats. Export a mesh with faces, or Gaussian splats."
        )
    if face_count > MAX_FACES:
        raise ValueError(
            f"the mesh has {face_count:,} faces, but at most {MAX_FACES:,} are allowed. Simplify the"
            " mesh, or reduce its resolution."
        )


def read_mesh(data: bytes | memoryview, geometry_only: bool = False) -> Model:
    """Read a mesh from a PLY file, with colours and normals of its vertices, or with colours of its faces.

    Args:
        data: content of the file.
        geometry_only: True to read no normals.

    Raises: ValueError for a damaged file, and for a file without triangles.
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
    # Colours of vertices take precedence over colours of faces.
    if face_colours is not None and colours is None:
        # Faces of different colours must not share vertices, so each triangle gets three vertices of its own.
        positions = positions[triangles.reshape(-1)]
        colours = np.repeat(face_colours[face_of_triangle], 3, axis=0)
        # Normals of shared vertices do not apply any more; without normals, each triangle is shaded flat.
        normals = None
        triangles = np.arange(len(positions)).reshape(-1, 3)
    return model_from_primitives([triangle_primitive(positions, triangles, colours=colours, normals=normals)])


# Name of a property -> its values [N]; for a list property, the lengths [N] of the lists and all their items.
Table = dict[str, "np.ndarray | tuple[np.ndarray, np.ndarray]"]


def _column(table: Table, property_name: str) -> np.ndarray:
    """Return the values [N] of a property. Raises: ValueError if it is missing or a list property."""
    if not isinstance(table.get(property_name), np.ndarray):
        raise ValueError(
            f"the vertices in the PLY file have no property {property_name}. Export the mesh again."
        )
    return np.asarray(table[property_name])


def _colours(table: Table) -> np.ndarray | None:
    """Return the colours [N, 3 or 4] of a table as integral numbers in 0..255, or None if it has no colours.

    Colours that the file stores as floats are in 0..1.
    """
    # alpha is optional
    channel_names = [
        channel_name
        for channel_name in ("red", "green", "blue", "alpha")
        if isinstance(table.get(channel_name), np.ndarray)
    ]
    if channel_names[:3] != ["red", "green", "blue"]:
        return None
    colour_columns = np.stack([np.asarray(table[channel_name]) for channel_name in channel_names], axis=1)
    if colour_columns.dtype.kind == "f":
        # NaN becomes 0
        return np.rint(np.nan_to_num(colour_columns).clip(0, 1) * 255)
    # 255, 32767, 65535 or the largest number of 32 bits
    max_value = np.iinfo(colour_columns.dtype).max
    # Colours of 16 bits are scaled. Colours of 8 bits, and of 32 bits, which hold 0..255, are not scaled.
    return (
        np.rint(colour_columns.clip(0, max_value) / max_value * 255)
        if max_value in (32767, 65535)
        else colour_columns.clip(0, 255).astype(np.uint8)
    )


def _tables(data: memoryview, header: Header) -> dict[str, Table]:
    """Read all elements of a PLY file, by name.

    Raises: ValueError for a file that ends too early, or whose text is not numbers.
    """
    read_position = header.length
    tables = dict[str, Table]()
    # text files are split into words at once
    words = None if header.order else bytes(data[read_position:]).split()
    # index of the next word in a text file, else position of the next byte
    read_position = read_position if header.order else 0
    for element in header.elements:
        try:
            table, read_position = (
                _read_text(words, read_position, element)
                if words is not None
                else _read_binary(data, read_position, element, header.order)
            )
        except (struct.error, IndexError, ValueError, OverflowError):
            raise ValueError(
                f"the PLY file is damaged: it must contain {element.count:,} elements {element.name!r:.40}."
                " Export it again."
            ) from None
        # If an element occurs twice, its first occurrence counts.
        tables.setdefault(element.name, table)
    return tables


def _read_text(words: list[bytes], word_index: int, element: Element) -> tuple[Table, int]:
    """Read an element from the words of a text file.

    Args:
        words: all words of the file after the header.
        word_index: index of the first word of the element.
        element: description of the element.

    Returns: the table, and the index of the word after the element.
    """
    values_by_property: dict[str, list] = {property_name: [] for property_name in element.properties}
    items_by_property: dict[str, list] = {property_name: [] for property_name in element.lists}
    for _ in range(element.count):
        for property_name in element.properties:
            number = float(words[word_index])
            values_by_property[property_name].append(number)
            word_index += 1
            if property_name in items_by_property:
                # The value is the length of a list; its items must follow.
                # `_tables` turns this error into a message.
                if not 0 <= number <= len(words) - word_index:
                    raise ValueError(property_name)
                items_by_property[property_name] += map(float, words[word_index : word_index + int(number)])
                word_index += int(number)
    return _typed(element, values_by_property, items_by_property), word_index


def _read_binary(
    data: memoryview, byte_position: int, element: Element, byte_order: str
) -> tuple[Table, int]:
    """Read an element from the bytes of a binary file.

    If all rows have the same length, they are read at once, otherwise one by one.

    Args:
        data: bytes of the file.
        byte_position: position of the first byte of the element.
        element: description of the element.
        byte_order: byte order of numpy.

    Returns: the table, and the position after the element.
    """
    type_by_property = element.properties
    if not element.lists:
        rows = np.frombuffer(
            data,
            [
                (property_name, byte_order + numpy_type)
                for property_name, numpy_type in type_by_property.items()
            ],
            element.count,
            byte_position,
        )
        return {
            property_name: rows[property_name] for property_name in type_by_property
        }, byte_position + rows.nbytes
    if element.count and len(element.lists) == 1:
        (list_property,) = element.lists
        # Assume that all lists are as long as the first list, for example in a mesh of triangles only.
        offset_in_row = sum(
            np.dtype(numpy_type).itemsize
            for numpy_type in list(type_by_property.values())[: list(type_by_property).index(list_property)]
        )
        list_length = int(
            np.frombuffer(
                data, byte_order + type_by_property[list_property], 1, byte_position + offset_in_row
            )[0]
        )
        # numpy fields of a row: each property, and after the length of the list its items
        row_fields = [
            field
            for property_name, numpy_type in type_by_property.items()
            for field in (
                [
                    (property_name, byte_order + numpy_type),
                    (f"{property_name} items", byte_order + element.lists[property_name], (list_length,)),
                ]
                if property_name == list_property
                else [(property_name, byte_order + numpy_type)]
            )
        ]
        if 0 <= list_length <= len(data) and byte_position + np.dtype(
            row_fields
        ).itemsize * element.count <= len(data):
            rows = np.frombuffer(data, row_fields, element.count, byte_position)
            # The assumption holds if every row states the same length.
            if (rows[list_property] == list_length).all():
                columns: Table = {
                    property_name: rows[property_name]
                    for property_name in type_by_property
                    if property_name != list_property
                }
                return {
                    **columns,
                    list_property: (rows[list_property], rows[f"{list_property} items"].reshape(-1)),
                }, byte_position + rows.nbytes
    # The lists have different lengths, so the rows are read one by one.
    values_by_property: dict[str, list] = {property_name: [] for property_name in type_by_property}
    items_by_property: dict[str, list] = {property_name: [] for property_name in element.lists}
    dtypes = {
        property_name: np.dtype(byte_order + numpy_type)
        for property_name, numpy_type in type_by_property.items()
    }
    for _ in range(element.count):
        for property_name, numpy_type in dtypes.items():
            values_by_property[property_name].append(np.frombuffer(data, numpy_type, 1, byte_position)[0])
            byte_position += numpy_type.itemsize
            if property_name in items_by_property:
                list_items = np.frombuffer(
                    data,
                    byte_order + element.lists[property_name],
                    int(values_by_property[property_name][-1]),
                    byte_position,
                )
                items_by_property[property_name].append(list_items)
                byte_position += list_items.nbytes
    return (
        _typed(
            element,
            values_by_property,
            {
                property_name: np.concatenate(rows) if rows else []
                for property_name, rows in items_by_property.items()
            },
        ),
        byte_position,
    )


def _typed(element: Element, values_by_property: dict[str, list], items_by_property: dict) -> Table:
    """Convert the columns of a table, and the items of its lists, to the types that the header states.

    Args:
        element: description of the table.
        values_by_property: name of each property -> its values; of a list property, the lengths of the lists.
        items_by_property: name of each list property -> the items of all its lists.
    """
    columns = {
        property_name: np.array(values_by_property[property_name]).astype(numpy_type)
        for property_name, numpy_type in element.properties.items()
    }
    return {
        property_name: (
            column,
            np.asarray(items_by_property[property_name]).astype(element.lists[property_name]),
        )
        if property_name in items_by_property
        else column
        for property_name, column in columns.items()
    }


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
    missing_names = [name for name in _SPLAT if name not in vertex_element.properties]
    rest_names = [name for name in vertex_element.properties if name.startswith("f_rest_")]
    if missing_names:
        raise ValueError(
            f"the Gaussians lack the properties {', '.join(missing_names)}. Export the splats in the format"
            " of 3D Gaussian splatting."
        )
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
