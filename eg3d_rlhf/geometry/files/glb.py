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
    magic, version, length = GLB_HEADER.unpack_from(data)
    if magic != GLB_MAGIC or version != 2 or length > len(data):
        raise ValueError(
            f"the file must be a complete GLB file of version 2, but it has version {version} and {len(data)}"
            f" of {length} bytes. Export it again."
        )
    size, kind = CHUNK_HEADER.unpack_from(data, GLB_HEADER.size)
    start = GLB_HEADER.size + CHUNK_HEADER.size
    if kind != JSON_CHUNK or size > MAX_JSON or start + size > length:
        raise ValueError(
            f"the GLB file must begin with JSON of at most {MAX_JSON >> 20} MB, but its first part has {size}"
            " bytes. Export it again."
        )
    try:
        document = json.loads(bytes(data[start : start + size]).decode())
    except (ValueError, RecursionError):
        raise ValueError("the GLB file has invalid JSON. Export it again.") from None
    if not isinstance(document, dict):
        raise ValueError("the JSON of the GLB file is no object. Export it again.")
    start += size
    # The binary chunk is optional.
    if start + CHUNK_HEADER.size > length:
        return document, memoryview(b"")
    size, kind = CHUNK_HEADER.unpack_from(data, start)
    start += CHUNK_HEADER.size
    if kind != BIN_CHUNK or start + size > length:
        raise ValueError(
            "the second part of the GLB file is no binary chunk, or is longer than the file. Export it again."
        )
    return document, data[start : start + size]


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
        required = set(self.document.get("extensionsRequired", [])) - _RESOLVED
        if required:
            raise ValueError(
                f"the GLB file requires {', '.join(sorted(map(str, required)))[:200]}, which is not"
                " supported. Export it without this extension."
            )
        if len(self._records("buffers")) > 1 or any("uri" in buffer for buffer in self._records("buffers")):
            raise ValueError(
                "the GLB file refers to data in another file. Export it with all data inside the file."
            )
        scenes = self._records("scenes")
        if not scenes:
            raise ValueError("the GLB file has no scene. Export it with a scene.")
        # The field `scene` is the index of the scene to show, by default the first.
        scene = self._record("scenes", self.document.get("scene", 0))
        self._nodes(scene.get("nodes", []))
        # The triangles of a mesh count once for each node that refers to the mesh.
        triangle_counts = [self._triangle_count(mesh) for mesh in self.out.meshes]
        rendered_count = sum(triangle_counts[node.mesh] for node in self.out.nodes if node.mesh is not None)
        if not rendered_count:
            raise ValueError("the GLB file has no triangles. Export a mesh that has faces.")
        if rendered_count > MAX_TRIANGLES:
            raise ValueError(
                f"the GLB file has {rendered_count:,} triangles, but at most {MAX_TRIANGLES:,} are allowed."
                " Simplify the mesh, or reduce its resolution."
            )
        return self.out

    @staticmethod
    def _triangle_count(mesh: list[Primitive]) -> int:
        """Count the triangles of a mesh. N indices form N // 3 separate triangles, or N - 2 in a strip or
        fan.
        """
        count = 0
        for primitive in mesh:
            # Without indices, the vertices in their order form the triangles.
            index_count = len((primitive.indices or primitive.attributes["POSITION"]).values)
            count += index_count // 3 if primitive.mode == 4 else max(index_count - 2, 0)
        return count

    # ---- records

    def _records(self, kind: str) -> list[dict]:
        """Return all records of a kind, such as "buffers". Raises: ValueError for other data than a list of
        objects.
        """
        records = self.document.get(kind, [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{kind} in the GLB file must be a list of objects. Export it again.")
        return records

    def _record(self, kind: str, number: object) -> dict:
        """Return a record by its kind, such as "nodes", and its index. Raises: ValueError for a wrong
        index.
        """
        records = self.document.get(kind, [])
        # type() instead of isinstance(): in Python a bool is an int, but it is no index.
        if type(number) is not int or not 0 <= number < len(records) or not isinstance(records[number], dict):
            raise ValueError(
                f"the GLB file refers to {kind} number {str(number)[:40]}, but it has {len(records)} {kind}."
                " Export it again."
            )
        return records[number]

    def _once(self, kind: str, number: Any, kept: list, make: Callable[[dict], Any]) -> int:
        """Return the index in the model of a record of the file. The record is converted at its first use.

        Args:
            kind: kind of the record, such as "meshes".
            number: index of the record in the file.
            kept: list of the model, to which the converted record is appended.
            make: function that converts the record.
        """
        record = self._record(kind, number)
        if (kind, number) not in self._indices:
            converted = make(record)
            kept.append(converted)
            self._indices[kind, number] = len(kept) - 1
        return self._indices[kind, number]

    # ---- scene

    def _nodes(self, roots: list) -> None:
        """Convert the nodes of a scene. Nodes without a mesh, and without such nodes below them, are dropped.

        Args:
            roots: indices in the file of the nodes without a parent.

        Raises: ValueError for cycles, skins and instances, and for too many nodes.
        """
        # (index of a node, index of its parent), parents before their children
        order: list[tuple[int, int | None]] = []
        visited_nodes: set[int] = set()
        # Depth-first traversal with a stack, because recursion could exceed Python's limit. An entry is
        # (node, parent, depth). Lists are reversed, because the last entry of the stack is taken first.
        pending: list[tuple[Any, int | None, int]] = [(number, None, 1) for number in reversed(roots)]
        while pending:
            number, parent, depth = pending.pop()
            record = self._record("nodes", number)
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"the tree of nodes is more than {MAX_DEPTH} levels deep. Export the file with fewer"
                    " levels."
                )
            if number in visited_nodes or len(visited_nodes) >= MAX_NODES:
                raise ValueError(
                    f"the nodes must form a tree of at most {MAX_NODES:,} nodes, without cycles and without"
                    " nodes that have two parents. Export the file again."
                )
            visited_nodes.add(number)
            order.append((number, parent))
            pending += [(child, number, depth + 1) for child in reversed(record.get("children", []))]
        children: dict[int | None, list[int]] = {}
        converted: dict[int, Node] = {}
        # Reversed, so that children are converted before their parents.
        for number, parent in reversed(order):
            record = self._record("nodes", number)
            if "skin" in record or "EXT_mesh_gpu_instancing" in record.get("extensions", {}):
                raise ValueError(
                    "the GLB file has a mesh with a skin or instances, which are not supported. Export it as"
                    " a static mesh."
                )
            mesh = (
                None
                if "mesh" not in record
                else self._once("meshes", record["mesh"], self.out.meshes, self._mesh)
            )
            # [::-1] restores the order of the children, which were converted in reversed order.
            if mesh is not None or number in children:
                converted[number] = Node(children.get(number, [])[::-1], mesh, _place(record))
                children.setdefault(parent, []).append(number)
        new_index = {number: i for i, number in enumerate(node for node, _ in order if node in converted)}
        self.out.nodes = [converted[number] for number in new_index]
        for node in self.out.nodes:
            node.children = [new_index[child] for child in node.children]
        self.out.roots = [new_index[number] for number in children.get(None, [])[::-1]]

    def _mesh(self, record: dict) -> list[Primitive]:
        """Convert the record of a mesh into its primitives. Raises: ValueError for active morph targets."""
        # Morph targets whose weights are all 0 do not change the mesh.
        if any(record.get("weights") or []):
            raise ValueError(
                "the GLB file has a mesh with morph targets, which are not supported. Export it as a static"
                " mesh."
            )
        primitive_records = record.get("primitives", [])
        if sum(len(mesh) for mesh in self.out.meshes) + len(primitive_records) > MAX_PARTS:
            raise ValueError(
                f"the meshes have more than {MAX_PARTS:,} primitives. Join parts of the same material."
            )
        return [self._primitive(primitive_record) for primitive_record in primitive_records]

    def _primitive(self, record: dict) -> Primitive:
        """Convert the record of a primitive.

        Raises: ValueError for compression, for points and lines, and for invalid arrays.
        """
        if set(record.get("extensions", {})) & {"KHR_draco_mesh_compression"}:
            raise ValueError(
                "the GLB file uses Draco compression, which is not supported. Export it without compression."
            )
        mode = record.get("mode", 4)
        if mode not in _TRIANGLE_MODES:
            raise ValueError(
                "the GLB file contains points or lines instead of triangles. Export a mesh that has faces."
            )
        names = ("POSITION",) if self.geometry_only else _NAMES
        attributes = {
            name: self._array(number) for name, number in record["attributes"].items() if name in names
        }
        if "POSITION" not in attributes:
            raise ValueError("a primitive in the GLB file has no attribute POSITION. Export the file again.")
        # All attributes must have one row for each vertex.
        count = len(attributes["POSITION"].values)
        for name, array in attributes.items():
            if array.values.shape[1] not in _NAMES[name] or len(array.values) != count:
                widths = " or ".join(map(str, _NAMES[name]))
                raise ValueError(
                    f"{name} must have the shape [{count}, {widths}], got {list(array.values.shape)}. Export"
                    " the file again."
                )
            if array.values.dtype.kind == "f" and not (np.abs(array.values) < _REACH).all():
                raise ValueError(
                    f"{name} contains NaN, infinity or numbers beyond {_REACH:g}. Export the file again."
                )
            if array.values.dtype.str == "<u4":
                raise ValueError(
                    f"{name} has integers of 32 bits, but floats or integers of 8 or 16 bits are allowed."
                    " Export the file again."
                )
            # glTF 2.0 itself allows integers for these attributes. Integers in others need an extension.
            is_core_gltf = name == "COLOR_0" or (
                name.startswith("TEXCOORD") and array.normalized and array.values.dtype.kind == "u"
            )
            # 8 or 16 bits
            if array.values.dtype.itemsize < 4 and not is_core_gltf:
                self.out.extensions.add("KHR_mesh_quantization")
        indices = None if "indices" not in record else self._array(record["indices"], indices=True)
        if indices is not None:
            if (
                indices.values.shape[1] != 1
                or indices.values.dtype.kind != "u"
                or (len(indices.values) and indices.values.max() >= count)
            ):
                raise ValueError(
                    f"the indices of a primitive must be unsigned integers below {count}, its number of"
                    " vertices. Export the file again."
                )
        material = None
        if "material" in record and not self.geometry_only:
            material = self._once("materials", record["material"], self.out.materials, self._material)
        if not count or (indices is not None and not len(indices.values)):
            raise ValueError("a primitive in the GLB file has no triangles. Export the file again.")
        return Primitive(attributes, indices, mode, material)

    # ---- arrays

    def _array(self, number: Any, indices: bool = False) -> Array:
        """Return the array of an accessor. It is read once as an attribute, and once as indices.

        Args:
            number: index of the accessor.
            indices: True if the array is used as indices.
        """
        # Two copies, because indices and attributes are written with different targets and padding.
        if (number, indices) not in self._arrays:
            self._arrays[number, indices] = self._read_array(self._record("accessors", number))
        return self._arrays[number, indices]

    def _read_array(self, record: dict) -> Array:
        """Read the array of an accessor's record.

        Raises: ValueError for an unknown type, and for an array beyond the budget or the end of the file.
        """
        if record.get("componentType") not in COMPONENTS or record.get("type") not in WIDTHS:
            raise ValueError(
                "an array in the GLB file has a type that is not supported. Export the file again."
            )
        dtype = np.dtype(COMPONENTS[record["componentType"]])
        width = WIDTHS[record["type"]]
        count = _count(record, "count")
        # Subtracted before the array exists; Python integers cannot overflow.
        self.budget -= count * width * dtype.itemsize
        if self.budget < 0:
            raise ValueError(
                f"the arrays of the GLB file are too large for the size of the file: one has {count:,} x"
                f" {width} numbers. Export the file again."
            )
        if "bufferView" in record:
            values = self._view(record["bufferView"], _count(record, "byteOffset", 0), dtype, width, count)
        else:
            # An accessor without a buffer view consists of zeros (glTF 2.0, section 5.1).
            values = np.zeros((count, width), dtype)
        if "sparse" in record:
            values = self._sparse(record["sparse"], values)
        # floats are never normalised
        return Array(values, bool(record.get("normalized", False)) and dtype.kind != "f")

    def _sparse(self, record: dict, values: np.ndarray) -> np.ndarray:
        """Return a copy of an array with the values that a sparse accessor replaces.

        Args:
            record: field `sparse` of the accessor: indices, and new values.
            values: array [N, W] without the replacements.

        Raises: ValueError for indices outside the array.
        """
        replaced_count = _count(record, "count")
        index_record = record["indices"]
        value_record = record["values"]
        kind = np.dtype(COMPONENTS[index_record["componentType"]])
        positions = self._view(
            index_record["bufferView"], _count(index_record, "byteOffset", 0), kind, 1, replaced_count
        )[:, 0]
        if kind.kind != "u" or (replaced_count and positions.max() >= len(values)):
            raise ValueError(
                "a sparse array in the GLB file has indices outside the array. Export the file again."
            )
        # A copy, because the view into the file is read-only, and other accessors may share it.
        values = values.copy()
        values[positions] = self._view(
            value_record["bufferView"],
            _count(value_record, "byteOffset", 0),
            values.dtype,
            values.shape[1],
            replaced_count,
        )
        return values

    def _bytes(self, number: Any) -> tuple[memoryview, dict]:
        """Return the bytes of a buffer view, and its record.

        Raises: ValueError for compression, and for bytes outside the binary chunk.
        """
        record = self._record("bufferViews", number)
        if "EXT_meshopt_compression" in record.get(
            "extensions", {}
        ) or "KHR_meshopt_compression" in record.get("extensions", {}):
            raise ValueError(
                "the GLB file uses meshopt compression, which is not supported. Export it without it."
            )
        start = _count(record, "byteOffset", 0)
        length = _count(record, "byteLength")
        # A GLB file has one buffer, its binary chunk.
        if record.get("buffer") != 0 or start + length > len(self.binary):
            raise ValueError(
                f"the GLB file refers to the bytes {start}..{start + length} of its binary chunk, which has"
                f" {len(self.binary)} bytes. Export the file again."
            )
        return self.binary[start : start + length], record

    def _view(self, number: Any, offset: int, dtype: np.dtype, width: int, count: int) -> np.ndarray:
        """Return an array [count, width] as a view into the file.

        Args:
            number: index of the buffer view.
            offset: position of the first number in the buffer view, in bytes.
            dtype: type of the numbers.
            width: number of numbers per row.
            count: number of rows.

        Raises: ValueError for rows beyond the end of the buffer view.
        """
        data, record = self._bytes(number)
        size = width * dtype.itemsize
        # Interleaved attributes have a stride, the distance in bytes from one row to the next.
        stride = _count(record, "byteStride", size)
        if stride < size or (count and offset + stride * (count - 1) + size > len(data)):
            raise ValueError(
                f"an array of {count:,} x {width} numbers does not fit into the {len(data):,} bytes of its"
                " buffer view. Export the file again."
            )
        if not count:
            return np.zeros((0, width), dtype)
        # This constructor makes a view with a stride, without a copy.
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize))

    # ---- materials

    def _material(self, record: dict) -> dict:
        """Return a copy of a material's record that contains only allowed fields with allowed values."""
        pbr = record.get("pbrMetallicRoughness", {})
        out: dict = {}
        surface: dict = {}
        for name, size in (("baseColorFactor", 4), ("metallicFactor", 0), ("roughnessFactor", 0)):
            if name in pbr:
                surface[name] = _share(pbr[name], size)
        for name in ("baseColorTexture", "metallicRoughnessTexture"):
            if name in pbr:
                surface[name] = self._texture(pbr[name])
        out["pbrMetallicRoughness"] = surface
        for name, amount in (
            ("normalTexture", "scale"),
            ("occlusionTexture", "strength"),
            ("emissiveTexture", ""),
        ):
            if name in record:
                out[name] = self._texture(record[name])
                if amount in record[name]:
                    out[name][amount] = _number(record[name][amount])
        if "emissiveFactor" in record:
            out["emissiveFactor"] = _share(record["emissiveFactor"], 3)
        # "OPAQUE" is the default of glTF, so it need not be written.
        if record.get("alphaMode") in ("MASK", "BLEND"):
            out["alphaMode"] = record["alphaMode"]
        if "alphaCutoff" in record and out.get("alphaMode") == "MASK":
            out["alphaCutoff"] = _number(record["alphaCutoff"])
        if record.get("doubleSided") is True:
            out["doubleSided"] = True
        if "KHR_materials_unlit" in record.get("extensions", {}):
            out["extensions"] = {"KHR_materials_unlit": {}}
            self.out.extensions.add("KHR_materials_unlit")
        return out

    def _texture(self, info: dict) -> dict:
        """Return a copy of a material's reference to a texture that contains only allowed fields."""
        out: dict = {"index": self._once("textures", info["index"], self.out.textures, self._source)}
        if "texCoord" in info:
            out["texCoord"] = _set(info["texCoord"])
        transform = info.get("extensions", {}).get("KHR_texture_transform")
        # Offset, scale and rotation of the texture coordinates.
        if transform is not None:
            transform_fields: dict = {
                name: _numbers(transform[name], 2) for name in ("offset", "scale") if name in transform
            }
            transform_fields |= (
                {"rotation": _number(transform["rotation"])} if "rotation" in transform else {}
            )
            transform_fields |= {"texCoord": _set(transform["texCoord"])} if "texCoord" in transform else {}
            out["extensions"] = {"KHR_texture_transform": transform_fields}
            self.out.extensions.add("KHR_texture_transform")
        return out

    def _source(self, record: dict) -> dict:
        """Convert the record of a texture: its image, and its sampler if it has one."""
        extensions = record.get("extensions", {})
        # A WebP image takes precedence over its fallback, as in viewers that support the extension.
        source = extensions.get("EXT_texture_webp", {}).get("source", record.get("source"))
        if source is None:
            raise ValueError(
                "a texture in the GLB file has no PNG, JPEG or WebP image, only"
                f" {', '.join(map(str, extensions))[:80] or 'an empty record'}. Convert the textures to one"
                " of these formats."
            )
        out = {"source": self._once("images", source, self.out.images, self._image)}
        if "sampler" in record:
            out["sampler"] = self._once("samplers", record["sampler"], self.out.samplers, _sampler)
        return out

    def _image(self, record: dict) -> ImageFile:
        """Convert the record of an image. Its data lies in the binary chunk, or in a data URI.

        Raises: ValueError for external files, other formats, and images with too many pixels.
        """
        if "bufferView" in record:
            data, _ = self._bytes(record["bufferView"])
        else:
            uri = record.get("uri", "")
            if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
                raise ValueError(
                    "the GLB file refers to textures in other files. Export it with all textures inside."
                )
            try:
                data = memoryview(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
            except binascii.Error:
                raise ValueError(
                    "a texture in the GLB file is no valid base64 text. Export the file again."
                ) from None
        if image_format(data) is None:
            raise ValueError(
                "the GLB file has textures that are not PNG, JPEG or WebP. Convert them to one of these"
                " formats."
            )
        # The image is copied, so its size is subtracted from the budget.
        self.budget -= len(data)
        image, pixels = strip_image(data)
        self.pixels -= pixels
        if self.pixels < 0 or self.budget < 0:
            raise ValueError(
                f"the textures of the GLB file have more than {MAX_PIXELS >> 20} megapixels together, or"
                " their data is too large. Reduce the textures."
            )
        return image


def _count(record: dict, name: str, default: int | None = None) -> int:
    """Return a field of a record that is a size or a number of elements.

    Args:
        record: the record.
        name: name of the field.
        default: value if the field is missing.

    Raises: ValueError for a value that is no integer in 0..2^40 - 1.
    """
    value = record.get(name, default)
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(
            f"{name} in the GLB file must be an integer >= 0, got {str(value)[:40]}. Export the file again."
        )
    return value


def _number(value: object) -> float:
    """Return a number unchanged. Raises: ValueError if it is not finite, or beyond +-_REACH."""
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or abs(value) > _REACH:  # type: ignore[arg-type]
        raise ValueError(
            # shortened, because the value comes from an untrusted file and may be long
            f"the GLB file has {str(value)[:40]} in place of a finite number. Export the file again."
        )
    return value  # type: ignore[return-value]


def _numbers(values: object, size: int) -> list[float]:
    """Return a list of `size` finite numbers unchanged. Raises: ValueError for other values."""
    if not isinstance(values, list) or len(values) != size:
        raise ValueError(
            f"the GLB file has {str(values)[:40]} in place of {size} numbers. Export the file again."
        )
    return [_number(value) for value in values]


def _share(value: object, size: int) -> Any:
    """Return a number, or a list of numbers, clipped to 0..1.

    Args:
        value: the number or the list.
        size: length of the list; 0 for a single number.
    """
    if size:
        return [min(max(number, 0), 1) for number in _numbers(value, size)]
    return min(max(_number(value), 0), 1)


def _set(value: object) -> int:
    """Return the index of a set of texture coordinates unchanged. Raises: ValueError unless it is 0 to 3."""
    if type(value) is not int or not 0 <= value < 4:
        raise ValueError(
            f"a texture uses the texture coordinates number {str(value)[:40]}, but only 0 to 3 are allowed."
            " Export the file again."
        )
    return value


def _sampler(record: dict) -> dict:
    """Return a copy of a sampler's record that contains only allowed fields with allowed values."""
    return {name: record[name] for name, allowed in _SAMPLERS.items() if record.get(name) in allowed}


def _place(record: dict) -> dict:
    """Return the transformation of a node: the fields matrix, translation, rotation and scale of its record,
    without fields that are missing.
    """
    sizes = {"matrix": 16, "translation": 3, "rotation": 4, "scale": 3}
    return {name: _numbers(record[name], size) for name, size in sizes.items() if name in record}
