"""Reader of GLB 2.0 files from untrusted sources.

Allowed parts of a file become a `Model`. Parts without which the mesh is shown correctly are dropped: names,
extras, cameras, lights, animations, and minor material extensions. Other parts cause an error, because the
mesh would be shown wrongly without them, or because they are not safe: external files, compression (Draco,
meshopt, KTX2), skins, instancing, points and lines, references out of bounds, and arrays that are too large
for the size of the file.

A large number in the file never causes a large allocation of memory: arrays are views into the file, and the
size of a copy is subtracted from a budget before the copy is made.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from eg3d_rlhf.geometry.files.model import (
    BIN_CHUNK,
    CHUNK_HEADER,
    COMPONENTS,
    GLB_HEADER,
    GLB_MAGIC,
    JSON_CHUNK,
    WIDTHS,
    Array,
    ImageFile,
    Model,
    Node,
    Primitive,
    image_format,
    strip_image,
)

MAX_JSON = 16 << 20  # largest JSON chunk in bytes; its Python objects take up to about 40 times as many
MAX_NODES = 20_000  # largest number of nodes
MAX_PARTS = 20_000  # largest number of primitives of all meshes
MAX_DEPTH = 500  # largest depth of the tree of nodes, because browsers traverse it by recursion
MAX_TRIANGLES = 20_000_000  # largest number of rendered triangles; a mesh that two nodes use counts twice
MAX_PIXELS = 3 * 8192 * 8192  # largest number of pixels of all textures together
# Largest number of bytes of all arrays: _SHARE times the size of the file, plus SPARE.
SPARE = 1 << 20
_SHARE = 4
_REACH = 1e18  # larger numbers overflow when they are squared in float32
# Extensions of glTF that are copied.
KEPT = {"KHR_materials_unlit", "KHR_texture_transform", "KHR_mesh_quantization"}
# EXT_texture_webp is supported, too, but not copied: its image becomes the source of the texture.
_RESOLVED = KEPT | {"EXT_texture_webp"}
# Allowed attributes of vertices, and their allowed numbers of components.
_NAMES = {
    "POSITION": (3,),
    "NORMAL": (3,),
    "TANGENT": (4,),
    "COLOR_0": (3, 4),
    **{f"TEXCOORD_{i}": (2,) for i in range(4)},
}
_TRIANGLE_MODES = (4, 5, 6)  # modes of primitives: separate triangles, strip, fan
# Allowed values of the fields of a sampler: the numbers of filters and wrapping modes in glTF.
_SAMPLERS = {
    "magFilter": (9728, 9729),
    "minFilter": (9728, 9729, 9984, 9985, 9986, 9987),
    "wrapS": (33071, 33648, 10497),
    "wrapT": (33071, 33648, 10497),
}


def read_glb(data: memoryview, geometry_only: bool = False) -> Model:
    """Read the visible parts of a GLB file.

    Args:
        data: content of the file. Arrays of the result are views into it.
        geometry_only: True to read only positions and indices, with the same checks. Other attributes,
            materials, textures and images are then neither read nor checked.

    Raises: ValueError for a damaged file, and for parts that are not allowed.
    """
    document, binary = _chunks(data)
    try:
        return _Reader(document, binary, _SHARE * len(data) + SPARE, geometry_only).model()
    # Records with fields of wrong types cause one of these exceptions; the types are not checked one by one.
    except (TypeError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"the GLB file has records that glTF 2.0 does not allow ({type(error).__name__}). Export it"
            " again."
        ) from None


def _chunks(data: memoryview) -> tuple[dict, memoryview]:
    """Return the JSON document and the binary chunk of a GLB file. The chunk is empty if it is missing.

    Raises: ValueError for a damaged file.
    """
    if len(data) < GLB_HEADER.size + CHUNK_HEADER.size:
        raise ValueError("the GLB file is incomplete. Export it again.")
    magic, version, file_length = GLB_HEADER.unpack_from(data)
    if magic != GLB_MAGIC:
        raise ValueError("the file is not a GLB file: it does not begin with glTF. Export it as GLB.")
    if version != 2 or file_length > len(data):
        raise ValueError(
            f"the file must be a complete GLB file of version 2, but it has version {version} and {len(data)}"
            f" of {file_length} bytes. Export it again."
        )
    chunk_size, chunk_kind = CHUNK_HEADER.unpack_from(data, GLB_HEADER.size)
    chunk_start = GLB_HEADER.size + CHUNK_HEADER.size
    if chunk_size > MAX_JSON:
        raise ValueError(
            f"the JSON of the GLB file is too large: its first part has {chunk_size:,} bytes, but at most"
            f" {MAX_JSON >> 20} MB are allowed. Export the file with fewer nodes, materials and extras."
        )
    if chunk_kind != JSON_CHUNK or chunk_start + chunk_size > file_length:
        raise ValueError(
            "the GLB file is damaged: its first part is no JSON, or is longer than the file. Export it again."
        )
    try:
        document = json.loads(bytes(data[chunk_start : chunk_start + chunk_size]).decode())
    except (ValueError, RecursionError):
        raise ValueError("the GLB file has invalid JSON. Export it again.") from None
    if not isinstance(document, dict):
        raise ValueError("the JSON of the GLB file is no object. Export it again.")
    chunk_start += chunk_size
    # The binary chunk is optional.
    if chunk_start + CHUNK_HEADER.size > file_length:
        return document, memoryview(b"")
    chunk_size, chunk_kind = CHUNK_HEADER.unpack_from(data, chunk_start)
    chunk_start += CHUNK_HEADER.size
    if chunk_kind != BIN_CHUNK or chunk_start + chunk_size > file_length:
        raise ValueError(
            "the second part of the GLB file is no binary chunk, or is longer than the file. Export it again."
        )
    return document, data[chunk_start : chunk_start + chunk_size]


class _Reader:
    """Conversion of one GLB file into a model.

    Args:
        document: JSON document of the file.
        binary: binary chunk of the file.
        budget: largest number of bytes of all arrays together.
        geometry_only: True to read only positions and indices.
    """

    def __init__(self, document: dict, binary: memoryview, budget: int, geometry_only: bool):
        self.document = document
        self.binary = binary
        self.budget = budget
        self.geometry_only = geometry_only
        # number of pixels that further textures may have
        self.pixels = MAX_PIXELS
        self.out = Model()
        # (index of the accessor, True if it holds indices) -> array
        self._arrays: dict[tuple[int, bool], Array] = {}
        # (kind of record, index in the file) -> index in the model
        self._indices: dict[tuple[str, int], int] = {}

    def model(self) -> Model:
        """Convert the scene, and return the model. Raises: ValueError for parts that are not allowed."""
        # extensions without which the file cannot be shown
        unsupported_extensions = set(self.document.get("extensionsRequired", [])) - _RESOLVED
        if unsupported_extensions:
            raise ValueError(
                "the GLB file requires extensions that are not supported:"
                f" {', '.join(sorted(map(str, unsupported_extensions)))[:200]}. Export it without them."
            )
        if len(self._records("buffers")) > 1 or any("uri" in buffer for buffer in self._records("buffers")):
            raise ValueError(
                "the GLB file has several buffers, or a buffer with a URI instead of data inside the file."
                " Export it with all data inside the file."
            )
        scenes = self._records("scenes")
        if not scenes:
            raise ValueError("the GLB file has no scene. Export it with a scene.")
        # The field `scene` is the index of the scene to show, by default the first.
        scene = self._record("scenes", self.document.get("scene", 0))
        self._nodes(scene.get("nodes", []))
        # The triangles of a mesh count once for each node that refers to the mesh.
        triangle_counts = [self._triangle_count(mesh) for mesh in self.out.meshes]
        rendered_triangle_count = sum(
            triangle_counts[node.mesh] for node in self.out.nodes if node.mesh is not None
        )
        if not rendered_triangle_count:
            raise ValueError("the GLB file has no triangles. Export a mesh that has faces.")
        if rendered_triangle_count > MAX_TRIANGLES:
            raise ValueError(
                f"the GLB file has {rendered_triangle_count:,} triangles, but at most {MAX_TRIANGLES:,} are"
                " allowed. Simplify the mesh, or reduce its resolution."
            )
        return self.out

    @staticmethod
    def _triangle_count(mesh: list[Primitive]) -> int:
        """Count the triangles of a mesh.

        N indices form N // 3 separate triangles, or N - 2 triangles in a strip or a fan.
        """
        triangle_count = 0
        for primitive in mesh:
            # Without indices, the vertices in their order form the triangles.
            index_count = len((primitive.indices or primitive.attributes["POSITION"]).values)
            triangle_count += index_count // 3 if primitive.mode == 4 else max(index_count - 2, 0)
        return triangle_count

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

    # ---- scene

    def _nodes(self, root_indices: list) -> None:
        """Convert the nodes of a scene. Nodes without a mesh on them or on a node below them are dropped.

        Args:
            root_indices: indices in the file of the nodes without a parent.

        Raises: ValueError for cycles, skins and instances, and for too many nodes.
        """
        # (index of a node, index of its parent), parents before their children
        visit_order: list[tuple[int, int | None]] = []
        visited_nodes: set[int] = set()
        # Depth-first traversal with a stack, because recursion could exceed Python's limit. An entry is
        # (node, parent, depth). Lists are reversed, because the last entry of the stack is taken first.
        pending_nodes: list[tuple[Any, int | None, int]] = [
            (node_index, None, 1) for node_index in reversed(root_indices)
        ]
        while pending_nodes:
            node_index, parent_index, depth = pending_nodes.pop()
            node_record = self._record("nodes", node_index)
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"the tree of nodes is more than {MAX_DEPTH} levels deep. Export the file with fewer"
                    " levels."
                )
            if node_index in visited_nodes or len(visited_nodes) >= MAX_NODES:
                raise ValueError(
                    f"the nodes must form a tree of at most {MAX_NODES:,} nodes. The file has more nodes, or"
                    " a node with two parents, or a cycle. Join nodes if there are too many; otherwise"
                    " export the file again."
                )
            visited_nodes.add(node_index)
            visit_order.append((node_index, parent_index))
            pending_nodes += [
                (child, node_index, depth + 1) for child in reversed(node_record.get("children", []))
            ]
        children: dict[int | None, list[int]] = {}
        converted_nodes: dict[int, Node] = {}
        # Reversed, so that children are converted before their parents.
        for node_index, parent_index in reversed(visit_order):
            node_record = self._record("nodes", node_index)
            if "skin" in node_record or "EXT_mesh_gpu_instancing" in node_record.get("extensions", {}):
                raise ValueError(
                    "the GLB file has a mesh with a skin or instances, which are not supported. Export it as"
                    " a static mesh."
                )
            mesh = (
                None
                if "mesh" not in node_record
                else self._once("meshes", node_record["mesh"], self.out.meshes, self._mesh)
            )
            # [::-1] restores the order of the children, which were converted in reversed order.
            if mesh is not None or node_index in children:
                converted_nodes[node_index] = Node(
                    children.get(node_index, [])[::-1], mesh, _place(node_record)
                )
                children.setdefault(parent_index, []).append(node_index)
        new_index_by_node = {
            node_index: position
            for position, node_index in enumerate(node for node, _ in visit_order if node in converted_nodes)
        }
        self.out.nodes = [converted_nodes[node_index] for node_index in new_index_by_node]
        for node in self.out.nodes:
            node.children = [new_index_by_node[child] for child in node.children]
        self.out.roots = [new_index_by_node[node_index] for node_index in children.get(None, [])[::-1]]

    def _mesh(self, mesh_record: dict) -> list[Primitive]:
        """Convert the record of a mesh into its primitives. Raises: ValueError for active morph targets."""
        # Morph targets whose weights are all 0 do not change the mesh.
        if any(mesh_record.get("weights") or []):
            raise ValueError(
                "the GLB file has a mesh with morph targets, which are not supported. Export it as a static"
                " mesh."
            )
        primitive_records = mesh_record.get("primitives", [])
        if sum(len(mesh) for mesh in self.out.meshes) + len(primitive_records) > MAX_PARTS:
            raise ValueError(
                f"the meshes have more than {MAX_PARTS:,} primitives. Join parts of the same material."
            )
        return [self._primitive(primitive_record) for primitive_record in primitive_records]

    def _primitive(self, primitive_record: dict) -> Primitive:
        """Convert the record of a primitive.

        Raises: ValueError for compression, for points and lines, and for invalid arrays.
        """
        if set(primitive_record.get("extensions", {})) & {"KHR_draco_mesh_compression"}:
            raise ValueError(
                "the GLB file uses Draco compression, which is not supported. Export it without compression."
            )
        mode = primitive_record.get("mode", 4)
        if mode not in _TRIANGLE_MODES:
            raise ValueError(
                "the GLB file contains points or lines instead of triangles. Export a mesh that has faces."
            )
        allowed_names = ("POSITION",) if self.geometry_only else _NAMES
        attributes = {
            attribute_name: self._array(accessor_index)
            for attribute_name, accessor_index in primitive_record["attributes"].items()
            if attribute_name in allowed_names
        }
        if "POSITION" not in attributes:
            raise ValueError("a primitive in the GLB file has no attribute POSITION. Export the file again.")
        # All attributes must have one row for each vertex.
        vertex_count = len(attributes["POSITION"].values)
        for attribute_name, attribute in attributes.items():
            if (
                attribute.values.shape[1] not in _NAMES[attribute_name]
                or len(attribute.values) != vertex_count
            ):
                allowed_widths = " or ".join(map(str, _NAMES[attribute_name]))
                raise ValueError(
                    f"the attribute {attribute_name} must have the shape [{vertex_count}, {allowed_widths}],"
                    " got"
                    f" {list(attribute.values.shape)}. Export the file again."
                )
            if attribute.values.dtype.kind == "f" and not (np.abs(attribute.values) < _REACH).all():
                raise ValueError(
                    f"the attribute {attribute_name} contains NaN, infinity or numbers beyond {_REACH:g}."
                    " Export the file again."
                )
            if attribute.values.dtype.str == "<u4":
                raise ValueError(
                    f"the attribute {attribute_name} has integers of 32 bits, but only floats and integers of"
                    " 8 or 16 bits are allowed. Export the file again."
                )
            # glTF 2.0 itself allows integers for these attributes. Integers in others need an extension.
            is_core_gltf = attribute_name == "COLOR_0" or (
                attribute_name.startswith("TEXCOORD")
                and attribute.normalized
                and attribute.values.dtype.kind == "u"
            )
            # 8 or 16 bits
            if attribute.values.dtype.itemsize < 4 and not is_core_gltf:
                self.out.extensions.add("KHR_mesh_quantization")
        indices = (
            None
            if "indices" not in primitive_record
            else self._array(primitive_record["indices"], is_index=True)
        )
        if indices is not None:
            if (
                indices.values.shape[1] != 1
                or indices.values.dtype.kind != "u"
                or (len(indices.values) and indices.values.max() >= vertex_count)
            ):
                raise ValueError(
                    f"the indices of a primitive must be unsigned integers below {vertex_count}, its number"
                    " of vertices. Export the file again."
                )
        material = None
        if "material" in primitive_record and not self.geometry_only:
            material = self._once(
                "materials", primitive_record["material"], self.out.materials, self._material
            )
        if not vertex_count or (indices is not None and not len(indices.values)):
            raise ValueError("a primitive in the GLB file has no triangles. Export the file again.")
        return Primitive(attributes, indices, mode, material)

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
        row_count = _count(accessor_record, "count")
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
                _count(accessor_record, "byteOffset", 0),
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
        replaced_count = _count(sparse_record, "count")
        index_record = sparse_record["indices"]
        value_record = sparse_record["values"]
        index_dtype = np.dtype(COMPONENTS[index_record["componentType"]])
        replaced_rows = self._view(
            index_record["bufferView"], _count(index_record, "byteOffset", 0), index_dtype, 1, replaced_count
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
            _count(value_record, "byteOffset", 0),
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
                "the GLB file uses meshopt compression, which is not supported. Export it without this"
                " compression."
            )
        first_byte = _count(view_record, "byteOffset", 0)
        byte_length = _count(view_record, "byteLength")
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
        stride = _count(view_record, "byteStride", row_bytes)
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

    # ---- materials

    def _material(self, material_record: dict) -> dict:
        """Return a copy of a material's record that contains only allowed fields with allowed values."""
        pbr_record = material_record.get("pbrMetallicRoughness", {})
        material: dict = {}
        pbr_fields: dict = {}
        for field_name, length in (("baseColorFactor", 4), ("metallicFactor", 0), ("roughnessFactor", 0)):
            if field_name in pbr_record:
                pbr_fields[field_name] = _share(pbr_record[field_name], length)
        for field_name in ("baseColorTexture", "metallicRoughnessTexture"):
            if field_name in pbr_record:
                pbr_fields[field_name] = self._texture(pbr_record[field_name])
        material["pbrMetallicRoughness"] = pbr_fields
        for field_name, factor_name in (
            ("normalTexture", "scale"),
            ("occlusionTexture", "strength"),
            ("emissiveTexture", ""),
        ):
            if field_name in material_record:
                material[field_name] = self._texture(material_record[field_name])
                if factor_name in material_record[field_name]:
                    material[field_name][factor_name] = _number(material_record[field_name][factor_name])
        if "emissiveFactor" in material_record:
            material["emissiveFactor"] = _share(material_record["emissiveFactor"], 3)
        # "OPAQUE" is the default of glTF, so it need not be written.
        if material_record.get("alphaMode") in ("MASK", "BLEND"):
            material["alphaMode"] = material_record["alphaMode"]
        if "alphaCutoff" in material_record and material.get("alphaMode") == "MASK":
            material["alphaCutoff"] = _number(material_record["alphaCutoff"])
        if material_record.get("doubleSided") is True:
            material["doubleSided"] = True
        if "KHR_materials_unlit" in material_record.get("extensions", {}):
            material["extensions"] = {"KHR_materials_unlit": {}}
            self.out.extensions.add("KHR_materials_unlit")
        return material

    def _texture(self, texture_reference: dict) -> dict:
        """Return a copy of a material's reference to a texture that contains only allowed fields."""
        kept_reference: dict = {
            "index": self._once("textures", texture_reference["index"], self.out.textures, self._source)
        }
        if "texCoord" in texture_reference:
            kept_reference["texCoord"] = _set(texture_reference["texCoord"])
        transform_record = texture_reference.get("extensions", {}).get("KHR_texture_transform")
        # Offset, scale and rotation of the texture coordinates.
        if transform_record is not None:
            transform_fields: dict = {
                field_name: _numbers(transform_record[field_name], 2)
                for field_name in ("offset", "scale")
                if field_name in transform_record
            }
            transform_fields |= (
                {"rotation": _number(transform_record["rotation"])} if "rotation" in transform_record else {}
            )
            transform_fields |= (
                {"texCoord": _set(transform_record["texCoord"])} if "texCoord" in transform_record else {}
            )
            kept_reference["extensions"] = {"KHR_texture_transform": transform_fields}
            self.out.extensions.add("KHR_texture_transform")
        return kept_reference

    def _source(self, texture_record: dict) -> dict:
        """Return the record of a texture with new indices of its image and of its sampler, if it has one."""
        extensions = texture_record.get("extensions", {})
        # A WebP image takes precedence over its fallback, as in viewers that support the extension.
        image_index = extensions.get("EXT_texture_webp", {}).get("source", texture_record.get("source"))
        if image_index is None:
            raise ValueError(
                "a texture in the GLB file has no PNG, JPEG or WebP image, only"
                f" {', '.join(map(str, extensions))[:80] or 'an empty record'}. Convert the textures to one"
                " of these formats."
            )
        texture = {"source": self._once("images", image_index, self.out.images, self._image)}
        if "sampler" in texture_record:
            texture["sampler"] = self._once(
                "samplers", texture_record["sampler"], self.out.samplers, _sampler
            )
        return texture

    def _image(self, image_record: dict) -> ImageFile:
        """Convert the record of an image. Its data lies in the binary chunk, or in a data URI.

        Raises: ValueError for external files, other formats, and images with too many pixels.
        """
        if "bufferView" in image_record:
            image_bytes, _ = self._bytes(image_record["bufferView"])
        else:
            uri = image_record.get("uri", "")
            if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
                raise ValueError(
                    "a texture of the GLB file is neither in the binary chunk nor in a base64 data URI of an"
                    " image. Export the file with all textures inside."
                )
            try:
                image_bytes = memoryview(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
            except binascii.Error:
                raise ValueError(
                    "a texture in the GLB file is no valid base64 text. Export the file again."
                ) from None
        if image_format(image_bytes) is None:
            raise ValueError(
                "the GLB file has textures that are not PNG, JPEG or WebP. Convert them to one of these"
                " formats."
            )
        # The image is copied, so its size is subtracted from the budget.
        self.budget -= len(image_bytes)
        image, pixel_count = strip_image(image_bytes)
        self.pixels -= pixel_count
        if self.pixels < 0 or self.budget < 0:
            raise ValueError(
                "the textures of the GLB file are too large: together, they have more than"
                f" {MAX_PIXELS >> 20} megapixels, or their data exceeds the limit for a file of this size."
                " Reduce the resolution of the textures, and store each texture once."
            )
        return image


def _count(glb_record: dict, field_name: str, default: int | None = None) -> int:
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


def _number(value: object) -> float:
    """Return a number unchanged. Raises: ValueError if it is not finite, or beyond +-_REACH."""
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or abs(value) > _REACH:  # type: ignore[arg-type]
        raise ValueError(
            # shortened, because the value comes from an untrusted file and may be long
            f"the GLB file has {str(value)[:40]} in place of a number from {-_REACH:g} to {_REACH:g}. Export"
            " the file again."
        )
    return value  # type: ignore[return-value]


def _numbers(values: object, length: int) -> list[float]:
    """Return a list of `length` finite numbers unchanged. Raises: ValueError for other values."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(
            f"the GLB file has {str(values)[:40]} in place of {length} numbers. Export the file again."
        )
    return [_number(value) for value in values]


def _share(value: object, length: int) -> Any:
    """Clip a number, or each number of a list, to 0..1.

    Args:
        value: the number or the list.
        length: length of the list; 0 for a single number.
    """
    if length:
        return [min(max(number, 0), 1) for number in _numbers(value, length)]
    return min(max(_number(value), 0), 1)


def _set(value: object) -> int:
    """Return n of an attribute TEXCOORD_n (texture coordinates) unchanged. Raises: ValueError unless 0..3."""
    if type(value) is not int or not 0 <= value < 4:
        raise ValueError(
            f"a texture has the texCoord {str(value)[:40]}, but only the integers 0 to 3 are allowed. Export"
            " the file again."
        )
    return value


def _sampler(sampler_record: dict) -> dict:
    """Return a copy of a sampler's record that contains only allowed fields with allowed values."""
    return {
        field_name: sampler_record[field_name]
        for field_name, allowed_values in _SAMPLERS.items()
        if sampler_record.get(field_name) in allowed_values
    }


def _place(node_record: dict) -> dict:
    """Return the transformation of a node: its fields matrix, translation, rotation and scale, if present."""
    length_by_field = {"matrix": 16, "translation": 3, "rotation": 4, "scale": 3}
    return {
        field_name: _numbers(node_record[field_name], length)
        for field_name, length in length_by_field.items()
        if field_name in node_record
    }
