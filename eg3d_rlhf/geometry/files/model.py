"""A mesh as it is shown: all of a GLB that can be seen and nothing else, and its bytes as GLB 2.0.

Whatever a mesh is read from becomes a `Model`, and what is sent is written from that alone: no name, comment,
extra or generator survives. Arrays are kept as they were stored, so positions, normals and texture
coordinates keep every bit.

Letters: N vertices or indices, W numbers in each.
"""

import io
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

GLB_MAGIC = b"glTF"
JSON_CHUNK = 0x4E4F534A
BIN_CHUNK = 0x004E4942
GLB_HEADER = struct.Struct("<4sII")
CHUNK_HEADER = struct.Struct("<II")
# glTF's numbers of component types
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES = 4  # glTF's number of a mode: three indices each
_NUMBERS = {np.dtype(name).str: number for number, name in COMPONENTS.items()}
_TYPES = {width: name for name, width in WIDTHS.items()}
# targets of buffer views
_VERTICES = 34962
_INDICES = 34963


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
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), **fields})
        padding = bytes(-len(data) % 4)
        self.pieces += [data, padding]
        self.length += len(data) + len(padding)
        return len(self.views) - 1

    def accessor(self, array: Array, indices: bool = False) -> int:
        if id(array) not in self._written:
            values = array.values
            fields = {}
            count, width = values.shape
            size = width * values.itemsize
            if not indices and size % 4:  # vertices begin at multiples of 4 bytes
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
    """The bytes of a GLB in parts, so that large arrays are not copied; `b"".join` makes one of them."""
    buffer = _Buffer()
    meshes = [{"primitives": [_primitive(buffer, part) for part in mesh]} for mesh in model.meshes]
    images = [
        {"bufferView": buffer.view(picture.data), "mimeType": picture.kind} for picture in model.pictures
    ]
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
        "extensionsRequired": sorted(model.extensions & {"KHR_mesh_quantization"}),
    }
    text = json.dumps(
        {k: v for k, v in document.items() if v or k == "scene"}, separators=(",", ":"), allow_nan=False
    ).encode()
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
    """A primitive of arrays.

    Args: positions [N, 3]; faces [F, 3]; uv [N, 2] as glTF has them, v downwards; colours [N, 3 or 4] uint8,
        sRGB; normals [N, 3].
    """
    positions = np.asarray(positions, dtype="<f4")
    faces = np.asarray(faces)
    check_triangles(positions, faces)
    if not np.isfinite(positions).all():
        raise ValueError("expected finite positions, got others")
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
    return Primitive(
        attributes, Array(np.ascontiguousarray(faces, dtype=narrow).reshape(-1, 1)), material=material
    )


def scene_of(
    primitives: Iterable[Primitive], materials: Iterable[dict] = (), pictures: Iterable[Picture] = ()
) -> Model:
    """A model of one mesh at the origin; texture i is picture i."""
    shown = list(pictures)
    textures = [{"source": i} for i in range(len(shown))]
    return Model([Node(mesh=0)], [0], [list(primitives)], list(materials), textures, pictures=shown)


# ---- textures and prompts' pictures
#
# PNG, JPEG and WebP files without what is not their picture: EXIF, comments, colour profiles, previews,
# whatever follows the end. The compressed pixels are copied byte by byte; nothing is decoded, so a small file
# that would unpack to a huge picture costs nothing here, and is refused by the size that it states.

MAX_SIDE = 16384
MAX_PIXELS = 8192 * 8192
SMALL = 1024  # pixels: longest side of a prompt's picture
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame
_JPEG_KEPT = {*_JPEG_SIZES, 0xC4, 0xDB, 0xDD, 0xEE}  # ... tables, restart interval, Adobe's kind of colour
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_WEBP_KEPT = {b"VP8 ", b"VP8L", b"ALPH", b"VP8X"}


def kind_of_picture(data: bytes | memoryview) -> str | None:
    """The media type of a PNG, JPEG or WebP by its first bytes; None for anything else."""
    head = bytes(data[:16])
    if head.startswith(PNG):
        return "image/png"
    if head.startswith(JPEG):
        return "image/jpeg"
    return "image/webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def stripped(data: bytes | memoryview) -> tuple[Picture, int]:
    """A picture's file with its pixels alone, and how many there are."""
    kind = kind_of_picture(data)
    parts = {"image/png": _png, "image/jpeg": _jpeg, "image/webp": _webp}
    if kind is None:
        raise ValueError("expected PNG, JPEG or WebP, got another format")
    try:
        (width, height), pieces = parts[kind](bytes(data))
    except (struct.error, IndexError):
        raise ValueError(f"expected a whole {kind}, got a damaged one") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(f"expected a picture of up to {MAX_PIXELS >> 20} megapixels, got {width} x {height}")
    return Picture(b"".join(pieces), kind), width * height


def small(data: bytes | memoryview) -> bytes:
    """A picture of at most SMALL pixels a side as WebP, as it is shown beside a pair.

    Raises: ValueError for what is none.
    """
    from PIL import Image, ImageOps

    stripped(data)  # no other format reaches the decoders, and no more pixels than are allowed
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as opened:
            opened.draft("RGB", (2 * SMALL, 2 * SMALL))
            image = ImageOps.exif_transpose(opened)
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a picture that can be decoded, got a damaged one ({type(error).__name__})"
        ) from None
    image.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, exif=b"", xmp=b"", icc_profile=b"")
    return out.getvalue()


def _png(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    pieces = [data[:8]]
    at = 8
    size = (0, 0)
    while True:
        length, name = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) != 12 + length or (name == b"IHDR") != (at == 8):
            raise ValueError("expected a whole PNG, got a damaged one")
        if name == b"IHDR":
            size = struct.unpack_from(">II", chunk, 8)
        if name in _PNG_KEPT:
            pieces.append(chunk)
        elif not name[0] & 0x20:  # critical, and not known
            raise ValueError("expected a plain PNG, got one with parts that are not known")
        if name == b"IEND":
            return size, pieces
        at += 12 + length


def _jpeg(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    pieces = [data[:2], _JFIF]
    size = (0, 0)
    adobe = False
    for marker, segment in _jpeg_segments(data):
        if marker in _JPEG_SIZES:
            if size != (0, 0):  # decoders may believe the other one
                raise ValueError("expected a JPEG of one size, got one that states several")
            height, width = struct.unpack_from(">HH", segment, 5)
            size = width, height
        if marker == 0xEE and (adobe or segment[4:9] != b"Adobe" or len(segment) < 16):
            continue
        if marker == 0xEE:
            adobe = True
            segment = b"\xff\xee\x00\x0e" + segment[4:16]
        if marker in _JPEG_KEPT or marker in (0xDA, 0xD9):
            pieces.append(segment)
    if adobe:
        del pieces[1]  # Adobe's files have no JFIF part
    return size, pieces


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments; that of a scan brings the compressed pixels along."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise ValueError("expected a whole JPEG, got a damaged one")
        marker = data[at + 1]
        if marker == 0xD9:
            yield marker, data[at : at + 2]
            return
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if end < at + 4 or end > len(data):
            raise ValueError("expected a whole JPEG, got a damaged one")
        if marker == 0xDA:
            while True:  # the pixels end at a marker that is neither a stuffed byte nor a restart
                end = data.find(b"\xff", end)
                if end < 0 or end + 1 >= len(data):
                    raise ValueError("expected a whole JPEG, got one that is cut off")
                if data[end + 1] != 0 and not 0xD0 <= data[end + 1] <= 0xD7:
                    break
                end += 2
        yield marker, data[at:end]
        at = end


def _webp(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    pieces: list[bytes] = []
    at = 12
    size = (0, 0)
    canvas = None
    seen: set[bytes] = set()
    stated = struct.unpack_from("<I", data, 4)[0] + 8
    if stated > len(data):
        raise ValueError("expected a whole WebP, got one that is cut off")
    while at + 8 <= stated:
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) != length:
            raise ValueError("expected a whole WebP, got a damaged one")
        if name in (b"ANIM", b"ANMF"):
            raise ValueError("expected one picture, got a film in WebP")
        # decoders may take the other
        if name in _WEBP_KEPT and name in seen or name in (b"VP8 ", b"VP8L") and seen & {b"VP8 ", b"VP8L"}:
            raise ValueError("expected one picture, got several in one WebP")
        seen.add(name)
        if name == b"VP8X":
            canvas = size = int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
            body = bytes([body[0] & 0x10]) + bytes(3) + body[4:10]  # of the flags, that there is transparency
        elif name == b"VP8L":
            bits = struct.unpack_from("<I", body, 1)[0]
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif name == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            size = width & 0x3FFF, height & 0x3FFF
        if name in (b"VP8 ", b"VP8L") and canvas not in (None, size):
            raise ValueError("expected a plain WebP, got one of two sizes")
        if name in _WEBP_KEPT:
            pieces.append(struct.pack("<4sI", name, len(body)) + body + bytes(len(body) % 2))
        at += 8 + length + length % 2
    joined = b"".join(pieces)
    return size, [struct.pack("<4sI4s", b"RIFF", 4 + len(joined), b"WEBP"), joined]
