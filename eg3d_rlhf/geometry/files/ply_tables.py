"""Header and tables of PLY files.

The sizes that a header states are compared with the size of the file before any data is read.

Shapes: N rows of a table.
"""

import re
import struct
from dataclasses import dataclass, field

import numpy as np

MAX_HEADER = 64 << 10  # largest number of bytes of the header
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
# Name of a property -> its values [N]; for a list property, the lengths [N] of the lists and all their items.
Table = dict[str, "np.ndarray | tuple[np.ndarray, np.ndarray]"]


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
    textures: list[str] = field(default_factory=list)  # names after `comment TextureFile`

    @property
    def splats(self) -> bool:
        """Return True if the vertices are Gaussian splats."""
        return any(
            element.name == "vertex" and {"f_dc_0", "opacity", "scale_0", "rot_0"} <= set(element.properties)
            for element in self.elements
        )


def read_header(data: memoryview) -> Header:
    """Read the header of a PLY file, and compare the sizes that it states with the size of the file.

    Lines end with LF, CR LF or CR, all alike.

    Raises: ValueError for a damaged header, and for sizes that exceed the size of the file.
    """
    # A header that is longer is rejected like a damaged one.
    header_bytes = bytes(data[:MAX_HEADER])
    # CR alone ends lines only if the first line ends so. The data after `end_header` may begin with the byte
    # of LF, which must not be taken for a part of the line break.
    line_break = rb"\r" if re.match(rb"ply[ \t]*\r(?!\n)", header_bytes) else rb"\r?\n"
    # A comment may contain the word, so it must be a whole line.
    end_match = re.search(line_break + rb"end_header[ \t]*" + line_break, header_bytes)
    if not header_bytes.startswith(b"ply") or end_match is None:
        raise ValueError(
            "the file has no complete PLY header: it is damaged or of another format. Export it again."
        )
    byte_order = None
    elements: list[tuple[str, int, dict[str, str], dict[str, str]]] = []
    textures: list[str] = []
    try:
        for header_line in header_bytes[: end_match.start()].decode("utf-8", "replace").splitlines():
            words = header_line.split()
            if words[:1] == ["format"]:
                byte_order = _ORDERS[words[1]]
            elif words[:1] == ["comment"] and len(words) > 2 and words[1].lower() == "texturefile":
                textures.append(header_line.split(maxsplit=2)[2].strip())
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
    header = Header(byte_order, [Element(*element) for element in elements], end_match.end(), textures)
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


def read_tables(data: memoryview, header: Header) -> dict[str, Table]:
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
