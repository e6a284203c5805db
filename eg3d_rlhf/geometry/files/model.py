"""A mesh as it is shown: all visible parts of a GLB file, and its serialisation as GLB 2.0.

Every reader produces a `Model`, and the bytes that are sent to a browser are written from the model alone. No
name, comment, extra or generator of the original file is copied. Arrays keep their types and values, so
positions, normals and texture coordinates are bitwise unchanged.

Letters: N vertices or indices, W numbers per vertex.
"""

import io
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

GLB_MAGIC = b"glTF"
# glTF 2.0, section 4.4 (binary container)
JSON_CHUNK = 0x4E4F534A  # "JSON"
BIN_CHUNK = 0x004E4942  # "BIN"
GLB_HEADER = struct.Struct("<4sII")  # magic, version, bytes of the file
CHUNK_HEADER = struct.Struct("<II")  # bytes of the chunk, its type
# glTF's component types: number -> numpy dtype
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES = 4  # glTF's mode of a primitive with three indices per triangle
_NUMBERS = {np.dtype(name).str: number for number, name in COMPONENTS.items()}
_TYPES = {width: name for name, width in WIDTHS.items()}
# glTF's targets of buffer views
_VERTICES = 34962  # ARRAY_BUFFER
_INDICES = 34963  # ELEMENT_ARRAY_BUFFER


@dataclass(frozen=True, eq=False)
class Array:
    """An attribute of vertices, or indices. An object that is used several times is written once."""

    values: np.ndarray  # [N, W]
    normalized: bool = False  # integers represent 0..1 or -1..1, see glTF


@dataclass(frozen=True, eq=False)
class Primitive:
    """Triangles of one material."""

    attributes: dict[str, Array]  # by glTF's names; POSITION is always present
    indices: Array | None = None  # [N, 1]
    mode: int = TRIANGLES
    material: int | None = None


@dataclass(frozen=True)
class Picture:
    """An image file of a texture, without metadata."""

    data: bytes
    kind: str  # media type, such as image/png


@dataclass
class Node:
    """A node of the scene graph."""

    # indices into Model.nodes
    children: list[int] = field(default_factory=list)  # index into Model.meshes
    mesh: int | None = None
    place: dict = field(default_factory=dict)  # glTF's matrix; or translation, rotation and scale


@dataclass
class Model:
    """A scene. Materials, textures and samplers are glTF's records, reduced to allowed keys."""

    nodes: list[Node] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)  # indices of the nodes without a parent
    meshes: list[list[Primitive]] = field(default_factory=list)  # primitives of each mesh
    materials: list[dict] = field(default_factory=list)
    textures: list[dict] = field(default_factory=list)
    samplers: list[dict] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)  # glTF extensions that the model uses


class _Buffer:
    """The binary chunk while it is assembled: its pieces, and the records that refer to it."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self.length = 0  # bytes so far
        self.views: list[dict] = []
        self.accessors: list[dict] = []
        self._written: dict[int, int] = {}  # id of an array -> accessor

    def view(self, data: bytes | memoryview, **fields: int) -> int:
        """Append data and return the index of its buffer view. `fields` are further fields of the view."""
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), **fields})
        # every view starts at a multiple of 4 bytes
        padding = bytes(-len(data) % 4)
        self.pieces += [data, padding]
        self.length += len(data) + len(padding)
        return len(self.views) - 1

    def accessor(self, array: Array, indices: bool = False) -> int:
        """Append an array, unless it was appended before, and return the index of its accessor."""
        if id(array) not in self._written:
            values = array.values
            fields = {}
            count, width = values.shape
            size = width * values.itemsize
            # glTF requires that each vertex starts at a multiple of 4 bytes.
            if not indices and size % 4:
                values = np.concatenate(
                    [
                        np.ascontiguousarray(values).view(np.uint8).reshape(count, size),
                        np.zeros((count, -size % 4), np.uint8),
                    ],
                    axis=1,
                )
                fields = {"byteStride": size + -size % 4}
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            record = {
                "bufferView": self.view(data, target=_INDICES if indices else _VERTICES, **fields),
                "count": count,
                "componentType": _NUMBERS[array.values.dtype.str],
                "type": _TYPES[width],
                **({"normalized": True} if array.normalized else {}),
            }
            self.accessors.append(record)
            self._written[id(array)] = len(self.accessors) - 1
        return self._written[id(array)]


def glb_parts(model: Model) -> list[bytes | memoryview]:
    """Serialise a model as GLB, in parts so that large arrays are not copied. `b"".join` gives the file."""
    buffer = _Buffer()
    meshes = [{"primitives": [_primitive(buffer, part) for part in mesh]} for mesh in model.meshes]
    images = [{"bufferView": buffer.view(image.data), "mimeType": image.kind} for image in model.pictures]
    nodes = [
        {
            **({"children": n.children} if n.children else {}),
            **({} if n.mesh is None else {"mesh": n.mesh}),
            **n.place,
        }
        for n in model.nodes
    ]
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": model.roots}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": model.materials,
        "textures": model.textures,
        "samplers": model.samplers,
        "images": images,
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": buffer.length}],
        "extensionsUsed": sorted(model.extensions),
        # viewers without support would show a quantised mesh wrongly; other extensions are optional
        "extensionsRequired": sorted(model.extensions & {"KHR_mesh_quantization"}),
    }
    text = json.dumps(
        # glTF forbids empty arrays. "scene" stays, though its value 0 is false.
        {k: v for k, v in document.items() if v or k == "scene"},
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    # Chunks are padded to multiples of 4 bytes, JSON with spaces
    text += b" " * (-len(text) % 4)
    total = GLB_HEADER.size + 2 * CHUNK_HEADER.size + len(text) + buffer.length
    return [
        GLB_HEADER.pack(GLB_MAGIC, 2, total),
        CHUNK_HEADER.pack(len(text), JSON_CHUNK),
        text,
        CHUNK_HEADER.pack(buffer.length, BIN_CHUNK),
        *buffer.pieces,
    ]


def _primitive(buffer: _Buffer, part: Primitive) -> dict:
    """Write a primitive's arrays into the buffer and return its glTF record."""
    record: dict = {"attributes": {}, "mode": part.mode}
    for name, array in part.attributes.items():
        record["attributes"][name] = number = buffer.accessor(array)
        if name == "POSITION":
            # glTF requires the bounds of positions
            ends = [array.values.min(axis=0).tolist(), array.values.max(axis=0).tolist()]
            buffer.accessors[number] |= dict(zip(("min", "max"), ends, strict=True))
    if part.indices is not None:
        record["indices"] = buffer.accessor(part.indices, indices=True)
    if part.material is not None:
        record["material"] = part.material
    return record


def linear(srgb: np.ndarray) -> np.ndarray:
    """Convert colours in 0..1 from sRGB to linear (IEC 61966-2-1). glTF stores linear colours."""
    srgb = np.asarray(srgb, dtype=np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype("<f4")


def check_triangles(points: np.ndarray, faces: np.ndarray) -> None:
    """Raise ValueError for what is no points [N, 3] with triangles [F, 3] of them."""
    if points.shape[1:] != (3,) or faces.shape[1:] != (3,) or not len(faces) or not len(points):
        raise ValueError(f"expected a mesh of triangles, got {len(points)} points and {len(faces)} faces")
    if faces.min() < 0 or faces.max() >= len(points):
        raise ValueError(f"expected indices of {len(points)} vertices, got {faces.min()}..{faces.max()}")


def triangles(
    positions: np.ndarray,
    faces: np.ndarray,
    *,
    uv: np.ndarray | None = None,
    colours: np.ndarray | None = None,
    normals: np.ndarray | None = None,
    material: int | None = None,
) -> Primitive:
    """Build a primitive from arrays.

    Args:
        positions: [N, 3].
        faces: [F, 3].
        uv: [N, 2] in glTF's convention, v increases downwards.
        colours: [N, 3 or 4] uint8, sRGB.
        normals: [N, 3].
        material: index into Model.materials.
    Raises: ValueError for arrays of other shapes, positions that are not finite, and indices out of range.
    """
    positions = np.asarray(positions, dtype="<f4")
    faces = np.asarray(faces)
    check_triangles(positions, faces)
    if not np.isfinite(positions).all():
        raise ValueError("expected finite positions, got NaN or infinity")
    attributes = {"POSITION": Array(positions)}
    for name, values in (("NORMAL", normals), ("TEXCOORD_0", uv)):
        if values is not None:
            if len(values) != len(positions) or not np.isfinite(values).all():
                raise ValueError(f"expected {name} with finite numbers for each vertex, got another array")
            attributes[name] = Array(np.ascontiguousarray(values, dtype="<f4"))
    if colours is not None:
        if len(colours) != len(positions) or colours.ndim != 2 or colours.shape[1] not in (3, 4):
            raise ValueError("expected one colour per vertex, got another array")
        linear_colours = colours / 255.0
        linear_colours[:, :3] = linear(linear_colours[:, :3])
        attributes["COLOR_0"] = Array(np.ascontiguousarray(linear_colours, dtype="<f4"))
    # uint16 indices take half the memory; 65535 is the primitive restart value and never an index
    narrow = "<u2" if len(positions) <= 65535 else "<u4"
    return Primitive(
        attributes, Array(np.ascontiguousarray(faces, dtype=narrow).reshape(-1, 1)), material=material
    )


def scene_of(
    primitives: Iterable[Primitive], materials: Iterable[dict] = (), pictures: Iterable[Picture] = ()
) -> Model:
    """Build a model of one mesh at the origin. Texture i uses image i."""
    images = list(pictures)
    textures = [{"source": i} for i in range(len(images))]
    return Model([Node(mesh=0)], [0], [list(primitives)], list(materials), textures, pictures=images)


# ---- images of textures and prompts
#
# PNG, JPEG and WebP files are reduced to their pixel data: EXIF, comments, colour profiles, previews and
# trailing bytes are removed. The compressed pixels are copied byte by byte and not decoded. A small file that
# would unpack to a very large image therefore costs nothing here; it is rejected because of the size in its
# header.

MAX_SIDE = 16384  # pixels
MAX_PIXELS = 8192 * 8192
SMALL = 1024  # longest side of a prompt's image, pixels
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers, which contain the size
# Besides these: Huffman and quantisation tables, restart interval, Adobe's colour transform (APP14).
_JPEG_KEPT = {*_JPEG_SIZES, 0xC4, 0xDB, 0xDD, 0xEE}
# a JFIF header (APP0) without resolution and preview
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_WEBP_KEPT = {b"VP8 ", b"VP8L", b"ALPH", b"VP8X"}


def kind_of_picture(data: bytes | memoryview) -> str | None:
    """Return the media type of a PNG, JPEG or WebP file from its first bytes; None for other files."""
    head = bytes(data[:16])
    if head.startswith(PNG):
        return "image/png"
    if head.startswith(JPEG):
        return "image/jpeg"
    return "image/webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def stripped(data: bytes | memoryview) -> tuple[Picture, int]:
    """Remove all metadata from an image file. Return the image and its number of pixels.

    Raises: ValueError for other formats, damaged files, and images that are too large.
    """
    kind = kind_of_picture(data)
    parts = {"image/png": _png, "image/jpeg": _jpeg, "image/webp": _webp}
    if kind is None:
        raise ValueError("expected PNG, JPEG or WebP, got another format")
    try:
        (width, height), pieces = parts[kind](bytes(data))
    except (struct.error, IndexError):  # the file ends within a field
        raise ValueError(f"expected a complete {kind} file, got a damaged one") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(f"expected an image of up to {MAX_PIXELS >> 20} megapixels, got {width} x {height}")
    return Picture(b"".join(pieces), kind), width * height


def small(data: bytes | memoryview) -> bytes:
    """Convert an image to WebP with at most SMALL pixels a side, as it is shown beside a pair.

    Raises: ValueError for a file that is no image.
    """
    from PIL import Image, ImageOps

    # Rejects other formats and too many pixels before a decoder reads the file
    stripped(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as opened:
            # JPEG only: decode at reduced resolution, which is faster
            opened.draft("RGB", (2 * SMALL, 2 * SMALL))
            # The orientation of photographs is in their EXIF data
            image = ImageOps.exif_transpose(opened)
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected an image that can be decoded, got a damaged one ({type(error).__name__})"
        ) from None
    image.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, exif=b"", xmp=b"", icc_profile=b"")
    return out.getvalue()


def _png(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a PNG, and its chunks that are kept."""
    pieces = [data[:8]]
    at = 8
    size = (0, 0)
    while True:
        # A chunk: length, name, data, checksum; 12 bytes besides the data.
        length, name = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) != 12 + length or (name == b"IHDR") != (at == 8):  # IHDR must be the first chunk
            raise ValueError("expected a complete PNG, got a damaged one")
        if name == b"IHDR":
            size = struct.unpack_from(">II", chunk, 8)
        if name in _PNG_KEPT:
            pieces.append(chunk)
        elif not name[0] & 0x20:  # a critical chunk that we do not know (PNG, section 5.4)
            raise ValueError(
                "expected a PNG with standard chunks only, got one with an unknown critical chunk"
            )
        if name == b"IEND":
            return size, pieces
        at += 12 + length


def _jpeg(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a JPEG, and its segments that are kept."""
    pieces = [data[:2], _JFIF]
    size = (0, 0)
    adobe = False
    for marker, segment in _jpeg_segments(data):
        if marker in _JPEG_SIZES:
            # Decoders differ in which of several sizes they use, so the check above could be bypassed.
            if size != (0, 0):
                raise ValueError("expected a JPEG of one size, got one that states several")
            height, width = struct.unpack_from(">HH", segment, 5)
            size = width, height
        # Only Adobe's first APP14 segment is kept, cut to its defined length.
        if marker == 0xEE and (adobe or segment[4:9] != b"Adobe" or len(segment) < 16):
            continue
        if marker == 0xEE:
            adobe = True
            segment = b"\xff\xee\x00\x0e" + segment[4:16]
        if marker in _JPEG_KEPT or marker in (0xDA, 0xD9):
            pieces.append(segment)
    if adobe:
        # files with Adobe's segment have no JFIF header
        del pieces[1]
    return size, pieces


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield markers with their segments. The segment of a scan includes its compressed pixels."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise ValueError("expected a complete JPEG, got a damaged one")
        marker = data[at + 1]
        # end of image; bytes after it are dropped
        if marker == 0xD9:
            yield marker, data[at : at + 2]
            return
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if end < at + 4 or end > len(data):
            raise ValueError("expected a complete JPEG, got a damaged one")
        if marker == 0xDA:  # start of a scan
            # The pixels end at a marker that is neither a stuffed byte (FF 00) nor a restart marker.
            while True:
                end = data.find(b"\xff", end)
                if end < 0 or end + 1 >= len(data):
                    raise ValueError("expected a complete JPEG, got a truncated one")
                if data[end + 1] != 0 and not 0xD0 <= data[end + 1] <= 0xD7:
                    break
                end += 2
        yield marker, data[at:end]
        at = end


def _webp(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a WebP, and its chunks that are kept."""
    pieces: list[bytes] = []
    # after "RIFF", the size and "WEBP"
    at = 12
    size = (0, 0)
    # size in the extended header (VP8X)
    canvas = None
    seen: set[bytes] = set()
    stated = struct.unpack_from("<I", data, 4)[0] + 8
    if stated > len(data):
        raise ValueError("expected a complete WebP, got a truncated one")
    while at + 8 <= stated:
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) != length:
            raise ValueError("expected a complete WebP, got a damaged one")
        if name in (b"ANIM", b"ANMF"):
            raise ValueError("expected a still image, got an animated WebP")
        # Decoders differ in which of several images they use.
        if name in _WEBP_KEPT and name in seen or name in (b"VP8 ", b"VP8L") and seen & {b"VP8 ", b"VP8L"}:
            raise ValueError("expected one image, got several in one WebP")
        seen.add(name)
        if name == b"VP8X":
            canvas = size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
            # of the flags, only alpha is kept
            body = bytes([body[0] & 0x10]) + bytes(3) + body[4:10]
        elif name == b"VP8L":
            # lossless: 14 bits each for width - 1 and height - 1
            bits = struct.unpack_from("<I", body, 1)[0]
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif name == b"VP8 ":
            # lossy: 14 bits each; the upper two bits are a scaling hint
            width, height = struct.unpack_from("<HH", body, 6)
            size = width & 0x3FFF, height & 0x3FFF
        if name in (b"VP8 ", b"VP8L") and canvas not in (None, size):
            raise ValueError("expected a WebP of one size, got one that states two")
        if name in _WEBP_KEPT:
            # chunks are padded to even lengths
            pieces.append(struct.pack("<4sI", name, len(body)) + body + bytes(len(body) % 2))
        at += 8 + length + length % 2
    joined = b"".join(pieces)
    return size, [struct.pack("<4sI4s", b"RIFF", 4 + len(joined), b"WEBP"), joined]
