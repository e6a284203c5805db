"""Records, arrays and numbers of a glTF 2.0 document from an untrusted source.

A large number in the file never causes a large allocation of memory: arrays are views into the file, and the
size of a copy is subtracted from a budget before the copy is made.

Shapes: N rows of an array, W numbers per row.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from eg3d_rlhf.geometry.files.model import COMPONENTS, WIDTHS, Array, Model

# What to do with a file that meshopt has compressed. gltfpack reads such files.
MESHOPT_REMEDY = "Export it without this compression, or run: gltfpack -noq -i in.glb -o out.glb."
REACH = 1e18  # larger numbers overflow when they are squared in float32


class GltfArrays:
    """Access to the records and arrays of a glTF document whose data lies in one binary chunk.

    Args:
        document: JSON document of the file.
        binary: binary chunk of the file.
        budget: largest number of bytes of all arrays together.
    """

    def __init__(self, document: dict, binary: memoryview, budget: int):
        self.document = document
        self.binary = binary
        self.budget = budget
        self.out = Model()
        # (index of the accessor, True if it holds indices) -> array
        self._arrays: dict[tuple[int, bool], Array] = {}
        # (kind of record, key of the record) -> index in the model
        self._indices: dict[tuple[str, Any], int] = {}

    # ---- records

    def _records(self, record_kind: str) -> list[dict]:
        """Return the list `record_kind`, such as "buffers", of the JSON document; empty if it is missing.

        Raises: ValueError for other data than a list of objects.
        """
        records = self.document.get(record_kind, [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{record_kind} in the GLB file must be a list of objects. Export it again.")
        return records

    def _record(self, record_kind: str, record_index: object) -> dict:
        """Return the record with the index `record_index` in the list `record_kind`, such as "nodes".

        Raises: ValueError for a wrong index.
        """
        records = self.document.get(record_kind, [])
        # type() instead of isinstance(): in Python a bool is an int, but it is no index.
        if (
            type(record_index) is not int
            or not 0 <= record_index < len(records)
            or not isinstance(records[record_index], dict)
        ):
            raise ValueError(
                f"the GLB file refers to {record_kind} number {str(record_index)[:40]}, but it has"
                f" {len(records)} {record_kind}. Export it again."
            )
        return records[record_index]

    def _once(
        self, record_kind: str, record_index: Any, converted_records: list, convert: Callable[[dict], Any]
    ) -> int:
        """Convert a record of the file at its first use, and return the index of the result in the model.

        Args:
            record_kind: kind of the record, such as "meshes".
            record_index: index of the record in the file.
            converted_records: list of the model, to which the converted record is appended.
            convert: function that converts the record.
        """
        file_record = self._record(record_kind, record_index)
        if (record_kind, record_index) not in self._indices:
            converted_record = convert(file_record)
            converted_records.append(converted_record)
            self._indices[record_kind, record_index] = len(converted_records) - 1
        return self._indices[record_kind, record_index]

    # ---- arrays

    def _array(self, accessor_index: Any, is_index: bool = False) -> Array:
        """Return the array of an accessor, which is read from the file at its first use.

        Args:
            accessor_index: index of the accessor.
            is_index: True if the array is used as indices.
        """
        # Two copies, because indices and attributes are written with different targets and padding.
        if (accessor_index, is_index) not in self._arrays:
            self._arrays[accessor_index, is_index] = self._read_array(
                self._record("accessors", accessor_index)
            )
        return self._arrays[accessor_index, is_index]

    def _read_array(self, accessor_record: dict) -> Array:
        """Read the array of an accessor's record.

        Raises: ValueError for an unknown type, and for an array beyond the budget or the end of the file.
        """
        if (
            accessor_record.get("componentType") not in COMPONENTS
            or accessor_record.get("type") not in WIDTHS
        ):
            component_type = accessor_record.get("componentType")
            raise ValueError(
                f"an array (accessor) in the GLB file has componentType {component_type!r:.40} and type"
                f" {accessor_record.get('type')!r:.40}, but only componentType"
                f" {', '.join(map(str, COMPONENTS))} and type {', '.join(WIDTHS)} can be read. Export the"
                " file with one of these types."
            )
        dtype = np.dtype(COMPONENTS[accessor_record["componentType"]])
        row_width = WIDTHS[accessor_record["type"]]
        row_count = read_count(accessor_record, "count")
        # Subtracted before the array exists; Python integers cannot overflow.
        self.budget -= row_count * row_width * dtype.itemsize
        if self.budget < 0:
            raise ValueError(
                f"the arrays of the GLB file are too large for the size of the file: one has {row_count:,} x"
                f" {row_width} numbers. Export the file again."
            )
        if "bufferView" in accessor_record:
            array_values = self._view(
                accessor_record["bufferView"],
                read_count(accessor_record, "byteOffset", 0),
                dtype,
                row_width,
                row_count,
            )
        else:
            # An accessor without a buffer view consists of zeros (glTF 2.0, section 5.1).
            array_values = np.zeros((row_count, row_width), dtype)
        if "sparse" in accessor_record:
            array_values = self._sparse(accessor_record["sparse"], array_values)
        # floats are never normalised
        return Array(array_values, bool(accessor_record.get("normalized", False)) and dtype.kind != "f")

    def _sparse(self, sparse_record: dict, values: np.ndarray) -> np.ndarray:
        """Return a copy of an array in which a sparse accessor has replaced some rows.

        Args:
            sparse_record: field `sparse` of the accessor: indices of the replaced rows, and their new values.
            values: array [N, W] without the replacements.

        Raises: ValueError for indices outside the array.
        """
        replaced_count = read_count(sparse_record, "count")
        index_record = sparse_record["indices"]
        value_record = sparse_record["values"]
        index_dtype = np.dtype(COMPONENTS[index_record["componentType"]])
        replaced_rows = self._view(
            index_record["bufferView"],
            read_count(index_record, "byteOffset", 0),
            index_dtype,
            1,
            replaced_count,
        )[:, 0]
        if index_dtype.kind != "u" or (replaced_count and replaced_rows.max() >= len(values)):
            raise ValueError(
                "a sparse array in the GLB file has indices that are no unsigned integers or lie outside the"
                " array. Export the file again."
            )
        # A copy, because the view into the file is read-only, and other accessors may share it.
        values = values.copy()
        values[replaced_rows] = self._view(
            value_record["bufferView"],
            read_count(value_record, "byteOffset", 0),
            values.dtype,
            values.shape[1],
            replaced_count,
        )
        return values

    def _bytes(self, view_index: Any) -> tuple[memoryview, dict]:
        """Return the bytes of a buffer view, and its record.

        Raises: ValueError for compression, and for bytes outside the binary chunk.
        """
        view_record = self._record("bufferViews", view_index)
        if "EXT_meshopt_compression" in view_record.get(
            "extensions", {}
        ) or "KHR_meshopt_compression" in view_record.get("extensions", {}):
            raise ValueError(
                f"the GLB file uses meshopt compression, which is not supported. {MESHOPT_REMEDY}"
            )
        first_byte = read_count(view_record, "byteOffset", 0)
        byte_length = read_count(view_record, "byteLength")
        # A GLB file has one buffer, its binary chunk.
        if view_record.get("buffer") != 0 or first_byte + byte_length > len(self.binary):
            raise ValueError(
                f"a buffer view in the GLB file refers to the bytes {first_byte}..{first_byte + byte_length}"
                f" of buffer {str(view_record.get('buffer'))[:40]}, but the file only has buffer 0, its"
                f" binary chunk with {len(self.binary)} bytes. Export the file again."
            )
        return self.binary[first_byte : first_byte + byte_length], view_record

    def _view(
        self, view_index: Any, byte_offset: int, dtype: np.dtype, row_width: int, row_count: int
    ) -> np.ndarray:
        """Return an array [row_count, row_width] as a view into the file.

        Args:
            view_index: index of the buffer view.
            byte_offset: position of the first number in the buffer view, in bytes.
            dtype: type of the numbers.
            row_width: number of numbers per row.
            row_count: number of rows.

        Raises: ValueError for rows beyond the end of the buffer view.
        """
        view_bytes, view_record = self._bytes(view_index)
        row_bytes = row_width * dtype.itemsize
        # Interleaved attributes have a stride, the distance in bytes from one row to the next.
        stride = read_count(view_record, "byteStride", row_bytes)
        if stride < row_bytes or (
            row_count and byte_offset + stride * (row_count - 1) + row_bytes > len(view_bytes)
        ):
            raise ValueError(
                f"an array of {row_count:,} x {row_width} numbers with a stride of {stride} bytes does not"
                f" fit into the {len(view_bytes):,} bytes of its buffer view. Export the file again."
            )
        if not row_count:
            return np.zeros((0, row_width), dtype)
        # This constructor makes a view with a stride, without a copy.
        return np.ndarray((row_count, row_width), dtype, view_bytes, byte_offset, (stride, dtype.itemsize))


def read_count(glb_record: dict, field_name: str, default: int | None = None) -> int:
    """Return a field of a record that is a size or a number of elements.

    Args:
        glb_record: the record.
        field_name: name of the field.
        default: value if the field is missing; None: the field is required.

    Raises: ValueError for a value that is no integer in 0..2^40 - 1.
    """
    field_value = glb_record.get(field_name, default)
    if type(field_value) is not int or not 0 <= field_value < 2**40:
        raise ValueError(
            f"{field_name} in the GLB file must be an integer from 0 to 2^40 - 1, got"
            f" {str(field_value)[:40]}. Export the file again."
        )
    return field_value


def read_number(value: object) -> float:
    """Return a number unchanged. Raises: ValueError if it is not finite, or beyond +-REACH."""
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or abs(value) > REACH:  # type: ignore[arg-type]
        raise ValueError(
            # shortened, because the value comes from an untrusted file and may be long
            f"the GLB file has {str(value)[:40]} in place of a number from {-REACH:g} to {REACH:g}. Export"
            " the file again."
        )
    return value  # type: ignore[return-value]


def read_numbers(values: object, length: int) -> list[float]:
    """Return a list of `length` finite numbers unchanged. Raises: ValueError for other values."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(
            f"the GLB file has {str(values)[:40]} in place of {length} numbers. Export the file again."
        )
    return [read_number(value) for value in values]


def read_share(value: object, length: int) -> Any:
    """Clip a number, or each number of a list, to 0..1.

    Args:
        value: the number or the list.
        length: length of the list; 0 for a single number.
    """
    if length:
        return [min(max(number, 0), 1) for number in read_numbers(value, length)]
    return min(max(read_number(value), 0), 1)


def read_set(value: object) -> int:
    """Return n of an attribute TEXCOORD_n (texture coordinates) unchanged. Raises: ValueError unless 0..3."""
    if type(value) is not int or not 0 <= value < 4:
        raise ValueError(
            f"a texture has the texCoord {str(value)[:40]}, but only the integers 0 to 3 are allowed. Export"
            " the file again."
        )
    return value
