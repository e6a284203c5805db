"""Reader of GLB 2.0 files from untrusted sources. Allowed parts become a `Model`; other parts are dropped or
rejected.

Dropped, because they are invisible or the mesh is shown correctly without them: names, extras, cameras,
lights, animations, and minor material extensions. Rejected with an error, because the mesh would be shown
wrongly without them or they cannot be trusted: external files, compression (Draco, meshopt, KTX2), skins,
instancing, points and lines, references out of bounds, and sizes out of proportion to the file.

No memory is allocated because of a number in the file: arrays are views into the file, and copies are counted
against a budget before they are made.
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
    Model,
    Node,
    Picture,
    Primitive,
    kind_of_picture,
    stripped,
)

MAX_JSON = 16 << 20  # bytes; Python objects take up to about 40 times as many
MAX_NODES = 20_000
MAX_PARTS = 20_000
MAX_DEPTH = 500  # of the tree of nodes, since browsers traverse it by recursion
MAX_TRIANGLES = 20_000_000  # as rendered: a mesh that occurs twice counts twice
MAX_PIXELS = 3 * 8192 * 8192  # of all textures together
SPARE = 1 << 20  # bytes that arrays may take in addition to _SHARE times the size of the file
_SHARE = 4
_REACH = 1e18  # larger numbers overflow when they are squared in 32 bits
KEPT = {"KHR_materials_unlit", "KHR_texture_transform", "KHR_mesh_quantization"}
# EXT_texture_webp is resolved: the image becomes the texture's source
_RESOLVED = KEPT | {"EXT_texture_webp"}
_NAMES = {  # allowed attributes and their widths
    "POSITION": (3,),
    "NORMAL": (3,),
    "TANGENT": (4,),
    "COLOR_0": (3, 4),
    **{f"TEXCOORD_{i}": (2,) for i in range(4)},
}
_TRIANGLE_MODES = (4, 5, 6)  # list, strip, fan
_SAMPLERS = {  # allowed values (glTF's numbers of filters and wrapping modes)
    "magFilter": (9728, 9729),
    "minFilter": (9728, 9729, 9984, 9985, 9986, 9987),
    "wrapS": (33071, 33648, 10497),
    "wrapT": (33071, 33648, 10497),
}


def read_glb(data: memoryview, geometry_only: bool = False) -> Model:
    """Read the visible parts of a GLB file. The model's arrays are views into `data`.

    Args:
        geometry_only: read positions and indices alone, with the same checks. Other attributes, materials,
            textures and images are neither read nor checked.
    Raises: ValueError.
    """
    document, binary = _chunks(data)
    try:
        return _Reader(document, binary, _SHARE * len(data) + SPARE, geometry_only).model()
    # records of wrong types, which are not checked one by one
    except (TypeError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"expected the records of glTF 2.0, got something else ({type(error).__name__})"
        ) from None


def _chunks(data: memoryview) -> tuple[dict, memoryview]:
    """Return the JSON document and the binary chunk of a GLB. Raises: ValueError."""
    if len(data) < GLB_HEADER.size + CHUNK_HEADER.size:
        raise ValueError("expected a complete GLB, got a truncated one")
    magic, version, length = GLB_HEADER.unpack_from(data)
    if magic != GLB_MAGIC or version != 2 or length > len(data):
        raise ValueError(
            f"expected a complete GLB of version 2, got version {version} and {len(data)} of {length} bytes"
        )
    size, kind = CHUNK_HEADER.unpack_from(data, GLB_HEADER.size)
    start = GLB_HEADER.size + CHUNK_HEADER.size
    if kind != JSON_CHUNK or size > MAX_JSON or start + size > length:
        raise ValueError(
            f"expected a GLB that starts with up to {MAX_JSON >> 20} MB of JSON, got {size} bytes"
        )
    try:
        document = json.loads(bytes(data[start : start + size]).decode())
    except (ValueError, RecursionError):
        raise ValueError("expected JSON in the GLB, got something else") from None
    if not isinstance(document, dict):
        raise ValueError("expected a JSON object in the GLB, got something else")
    start += size
    if start + CHUNK_HEADER.size > length:  # the binary chunk is optional
        return document, memoryview(b"")
    size, kind = CHUNK_HEADER.unpack_from(data, start)
    start += CHUNK_HEADER.size
    if kind != BIN_CHUNK or start + size > length:
        raise ValueError(
            "expected the binary chunk of the GLB to end within the file, got a longer or another one"
        )
    return document, data[start : start + size]


class _Reader:
    """Conversion of one file into a model. Args: budget: bytes that all arrays together may take."""

    def __init__(self, document: dict, binary: memoryview, budget: int, geometry_only: bool):
        self.document = document
        self.binary = binary
        self.budget = budget
        self.geometry_only = geometry_only
        # pixels that further textures may have
        self.pixels = MAX_PIXELS
        self.out = Model()
        # (index of the accessor, used as indices) -> array
        self._arrays: dict[tuple[int, bool], Array] = {}
        # (kind, index in the file) -> index in the model
        self._indices: dict[tuple[str, int], int] = {}

    def model(self) -> Model:
        """Convert the scene. Raises: ValueError for rejected parts."""
        required = set(self.document.get("extensionsRequired", [])) - _RESOLVED
        if required:
            raise ValueError(
                f"expected a GLB without {', '.join(sorted(map(str, required)))[:200]}, got one that needs it"
            )
        if len(self._records("buffers")) > 1 or any("uri" in buffer for buffer in self._records("buffers")):
            raise ValueError("expected all data inside the GLB, got a reference to another file")
        scenes = self._records("scenes")
        if not scenes:
            raise ValueError("expected a scene in the GLB, got none")
        scene = self._record("scenes", self.document.get("scene", 0))
        self._nodes(scene.get("nodes", []))
        # A mesh counts as often as nodes refer to it.
        triangle_counts = [self._triangle_count(mesh) for mesh in self.out.meshes]
        rendered = sum(triangle_counts[n.mesh] for n in self.out.nodes if n.mesh is not None)
        if not rendered:
            raise ValueError("expected triangles in the GLB, got none")
        if rendered > MAX_TRIANGLES:
            raise ValueError(f"expected up to {MAX_TRIANGLES:,} triangles, got {rendered:,}")
        return self.out

    @staticmethod
    def _triangle_count(mesh: list[Primitive]) -> int:
        """Count the triangles of a mesh: a list has N // 3, a strip or fan N - 2."""
        counts = [len((part.indices or part.attributes["POSITION"]).values) for part in mesh]
        return sum(n // 3 if part.mode == 4 else max(n - 2, 0) for n, part in zip(counts, mesh, strict=True))

    # ---- records

    def _records(self, kind: str) -> list[dict]:
        """Return all records of a kind, such as "buffers"."""
        records = self.document.get(kind, [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"expected a list of {kind}, got something else")
        return records

    def _record(self, kind: str, number: object) -> dict:
        """Return a record by its index. Raises: ValueError for an invalid index."""
        records = self.document.get(kind, [])
        # type(): a bool is an int, but no index
        if type(number) is not int or not 0 <= number < len(records) or not isinstance(records[number], dict):
            raise ValueError(f"expected the number of one of {len(records)} {kind}, got {str(number)[:40]}")
        return records[number]

    def _once(self, kind: str, number: Any, kept: list, make: Callable[[dict], Any]) -> int:
        """Return the model's index of a record. The record is converted on the first call and appended to
        `kept`.
        """
        record = self._record(kind, number)
        if (kind, number) not in self._indices:
            converted = make(record)
            kept.append(converted)
            self._indices[kind, number] = len(kept) - 1
        return self._indices[kind, number]

    # ---- scene

    def _nodes(self, roots: list) -> None:
        """Convert the nodes that the roots lead to. Nodes without a mesh below them are dropped."""
        order: list[tuple[int, int | None]] = []
        seen: set[int] = set()
        # Depth-first with a stack, because recursion could exceed Python's limit.
        waiting: list[tuple[Any, int | None, int]] = [(number, None, 1) for number in reversed(roots)]
        while waiting:
            number, parent, depth = waiting.pop()
            record = self._record("nodes", number)
            if depth > MAX_DEPTH:
                raise ValueError(f"expected a tree of nodes up to {MAX_DEPTH} deep, got a deeper one")
            if number in seen or len(seen) >= MAX_NODES:
                raise ValueError(
                    f"expected a tree of up to {MAX_NODES:,} nodes, got a larger one or one with a cycle or a"
                    " node of two parents"
                )
            seen.add(number)
            order.append((number, parent))
            waiting += [(child, number, depth + 1) for child in reversed(record.get("children", []))]
        children: dict[int | None, list[int]] = {}
        converted: dict[int, Node] = {}
        for number, parent in reversed(order):  # children before their parents
            record = self._record("nodes", number)
            if "skin" in record or "EXT_mesh_gpu_instancing" in record.get("extensions", {}):
                raise ValueError(
                    "expected a static mesh, got one with a skin or instances; export it as a static mesh"
                )
            mesh = (
                None
                if "mesh" not in record
                else self._once("meshes", record["mesh"], self.out.meshes, self._mesh)
            )
            if mesh is not None or number in children:
                converted[number] = Node(children.get(number, [])[::-1], mesh, _place(record))
                children.setdefault(parent, []).append(number)
        new_index = {number: i for i, number in enumerate(n for n, _ in order if n in converted)}
        self.out.nodes = [converted[number] for number in new_index]
        for node in self.out.nodes:
            node.children = [new_index[child] for child in node.children]
        self.out.roots = [new_index[number] for number in children.get(None, [])[::-1]]

    def _mesh(self, record: dict) -> list[Primitive]:
        """Convert a mesh into its primitives."""
        if any(record.get("weights") or []):
            raise ValueError("expected a static mesh, got one with morph targets; export it as a static mesh")
        parts = record.get("primitives", [])
        if sum(len(mesh) for mesh in self.out.meshes) + len(parts) > MAX_PARTS:
            raise ValueError(f"expected up to {MAX_PARTS:,} parts, got more")
        return [self._primitive(part) for part in parts]

    def _primitive(self, record: dict) -> Primitive:
        """Convert a primitive. Raises: ValueError for compression, other modes than triangles, and
        invalid arrays.
        """
        if set(record.get("extensions", {})) & {"KHR_draco_mesh_compression"}:
            raise ValueError("expected uncompressed arrays, got Draco compression; export the GLB without it")
        mode = record.get("mode", 4)
        if mode not in _TRIANGLE_MODES:
            raise ValueError("expected triangles, got points or lines")
        names = ("POSITION",) if self.geometry_only else _NAMES
        attributes = {
            name: self._array(number) for name, number in record["attributes"].items() if name in names
        }
        if "POSITION" not in attributes:
            raise ValueError("expected the attribute POSITION, got a primitive without it")
        count = len(attributes["POSITION"].values)
        for name, array in attributes.items():
            if array.values.shape[1] not in _NAMES[name] or len(array.values) != count:
                raise ValueError(f"expected {count} of {name}, got {list(array.values.shape)}")
            if array.values.dtype.kind == "f" and not (np.abs(array.values) < _REACH).all():
                raise ValueError(
                    f"expected finite numbers in {name}, got NaN, infinity or numbers beyond {_REACH:g}"
                )
            if array.values.dtype.str == "<u4":
                raise ValueError(f"expected {name} as floats or integers of 8 or 16 bits, got 32 bits")
            # glTF 2.0 itself allows integers for these; others need the extension.
            is_core_gltf = name == "COLOR_0" or (
                name.startswith("TEXCOORD") and array.normalized and array.values.dtype.kind == "u"
            )
            if array.values.dtype.itemsize < 4 and not is_core_gltf:
                self.out.extensions.add("KHR_mesh_quantization")
        indices = None if "indices" not in record else self._array(record["indices"], indices=True)
        if indices is not None:
            if (
                indices.values.shape[1] != 1
                or indices.values.dtype.kind != "u"
                or (len(indices.values) and indices.values.max() >= count)
            ):
                raise ValueError(f"expected indices of the {count} vertices, got other ones")
        material = None
        if "material" in record and not self.geometry_only:
            material = self._once("materials", record["material"], self.out.materials, self._material)
        if not count or (indices is not None and not len(indices.values)):
            raise ValueError("expected at least one triangle in each part, got none")
        return Primitive(attributes, indices, mode, material)

    # ---- arrays

    def _array(self, number: Any, indices: bool = False) -> Array:
        """Return the array of an accessor, read once per use."""
        if (number, indices) not in self._arrays:
            self._arrays[number, indices] = self._read_array(self._record("accessors", number))
        return self._arrays[number, indices]

    def _read_array(self, record: dict) -> Array:
        """Read an accessor. Raises: ValueError if it exceeds the budget or the file."""
        if record.get("componentType") not in COMPONENTS or record.get("type") not in WIDTHS:
            raise ValueError("expected an array of known numbers, got another")
        dtype = np.dtype(COMPONENTS[record["componentType"]])
        width = WIDTHS[record["type"]]
        count = _count(record, "count")
        self.budget -= count * width * dtype.itemsize
        if self.budget < 0:
            raise ValueError(f"expected arrays in proportion to the file, got {count:,} x {width} and more")
        if "bufferView" in record:
            values = self._view(record["bufferView"], _count(record, "byteOffset", 0), dtype, width, count)
        else:
            # an accessor without a view consists of zeros (glTF 2.0, section 5.1)
            values = np.zeros((count, width), dtype)
        if "sparse" in record:
            values = self._sparse(record["sparse"], values)
        return Array(values, bool(record.get("normalized", False)) and dtype.kind != "f")

    def _sparse(self, record: dict, values: np.ndarray) -> np.ndarray:
        """Replace values of an array at the places that a sparse accessor gives."""
        replaced = _count(record, "count")
        places = record["indices"]
        numbers = record["values"]
        kind = np.dtype(COMPONENTS[places["componentType"]])
        positions = self._view(places["bufferView"], _count(places, "byteOffset", 0), kind, 1, replaced)[:, 0]
        if kind.kind != "u" or (replaced and positions.max() >= len(values)):
            raise ValueError("expected the places of a sparse array to lie within it, got others")
        # The view into the file is read-only, and other accessors may share it.
        values = values.copy()
        values[positions] = self._view(
            numbers["bufferView"], _count(numbers, "byteOffset", 0), values.dtype, values.shape[1], replaced
        )
        return values

    def _bytes(self, number: Any) -> tuple[memoryview, dict]:
        """Return the bytes and the record of a buffer view."""
        record = self._record("bufferViews", number)
        if "EXT_meshopt_compression" in record.get(
            "extensions", {}
        ) or "KHR_meshopt_compression" in record.get("extensions", {}):
            raise ValueError(
                "expected uncompressed arrays, got meshopt compression; export the GLB without it"
            )
        start = _count(record, "byteOffset", 0)
        length = _count(record, "byteLength")
        if record.get("buffer") != 0 or start + length > len(self.binary):
            raise ValueError(
                f"expected data within the GLB's {len(self.binary)} bytes, got {start}..{start + length}"
            )
        return self.binary[start : start + length], record

    def _view(self, number: Any, offset: int, dtype: np.dtype, width: int, count: int) -> np.ndarray:
        """Return an array [count, width] as a view into the file."""
        data, record = self._bytes(number)
        size = width * dtype.itemsize
        # interleaved attributes have a stride
        stride = _count(record, "byteStride", size)
        if stride < size or (count and offset + stride * (count - 1) + size > len(data)):
            raise ValueError(f"expected {count:,} x {width} numbers within {len(data):,} bytes, got more")
        if not count:
            return np.zeros((0, width), dtype)
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize))

    # ---- materials

    def _material(self, record: dict) -> dict:
        """Copy the allowed fields of a material, with their values checked."""
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
        """Copy the allowed fields of a reference to a texture."""
        out: dict = {"index": self._once("textures", info["index"], self.out.textures, self._source)}
        if "texCoord" in info:
            out["texCoord"] = _set(info["texCoord"])
        transform = info.get("extensions", {}).get("KHR_texture_transform")
        if transform is not None:
            placed: dict = {
                name: _numbers(transform[name], 2) for name in ("offset", "scale") if name in transform
            }
            placed |= {"rotation": _number(transform["rotation"])} if "rotation" in transform else {}
            placed |= {"texCoord": _set(transform["texCoord"])} if "texCoord" in transform else {}
            out["extensions"] = {"KHR_texture_transform": placed}
            self.out.extensions.add("KHR_texture_transform")
        return out

    def _source(self, record: dict) -> dict:
        """Convert a texture: its image and sampler."""
        extensions = record.get("extensions", {})
        # A WebP image takes precedence over its fallback, as in viewers that support the extension.
        source = extensions.get("EXT_texture_webp", {}).get("source", record.get("source"))
        if source is None:
            raise ValueError(
                f"expected PNG, JPEG or WebP textures, got {', '.join(map(str, extensions))[:80] or 'none'}"
            )
        out = {"source": self._once("images", source, self.out.pictures, self._image)}
        if "sampler" in record:
            out["sampler"] = self._once("samplers", record["sampler"], self.out.samplers, _sampler)
        return out

    def _image(self, record: dict) -> Picture:
        """Convert an image, from the binary chunk or a data URI. Raises: ValueError for external files."""
        if "bufferView" in record:
            data, _ = self._bytes(record["bufferView"])
        else:
            uri = record.get("uri", "")
            if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
                raise ValueError("expected all textures inside the GLB, got a reference to another file")
            try:
                data = memoryview(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
            except binascii.Error:
                raise ValueError("expected a texture in base64, got something else") from None
        if kind_of_picture(data) is None:
            raise ValueError("expected PNG, JPEG or WebP textures, got another format")
        # the image is copied, so it counts
        self.budget -= len(data)
        image, pixels = stripped(data)
        self.pixels -= pixels
        if self.pixels < 0 or self.budget < 0:
            raise ValueError(f"expected textures of up to {MAX_PIXELS >> 20} megapixels together, got more")
        return image


def _count(record: dict, name: str, default: int | None = None) -> int:
    """Return a field that is an integer in 0..2^40. Raises: ValueError."""
    value = record.get(name, default)
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"expected a count as {name}, got {str(value)[:40]}")
    return value


def _number(value: object) -> float:
    """Return a finite number of acceptable size. Raises: ValueError."""
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or abs(value) > _REACH:  # type: ignore[arg-type]
        raise ValueError(f"expected a finite number, got {str(value)[:40]}")
    return value  # type: ignore[return-value]


def _numbers(values: object, size: int) -> list[float]:
    """Return a list of `size` numbers. Raises: ValueError."""
    if not isinstance(values, list) or len(values) != size:
        raise ValueError(f"expected {size} numbers, got {str(values)[:40]}")
    return [_number(value) for value in values]


def _share(value: object, size: int) -> Any:
    """Return a number (size 0) or a list of numbers, clipped to 0..1."""
    return [min(max(v, 0), 1) for v in _numbers(value, size)] if size else min(max(_number(value), 0), 1)


def _set(value: object) -> int:
    """Return the index of a set of texture coordinates, 0..3. Raises: ValueError."""
    if type(value) is not int or not 0 <= value < 4:
        raise ValueError(f"expected a set of texture coordinates 0..3, got {str(value)[:40]}")
    return value


def _sampler(record: dict) -> dict:
    """Copy the allowed fields of a sampler."""
    return {name: record[name] for name, allowed in _SAMPLERS.items() if record.get(name) in allowed}


def _place(record: dict) -> dict:
    """Return the transformation of a node: the fields that it has of matrix, translation, rotation, scale."""
    sizes = {"matrix": 16, "translation": 3, "rotation": 4, "scale": 3}
    return {name: _numbers(record[name], size) for name, size in sizes.items() if name in record}
