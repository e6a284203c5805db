"""Scene of a mesh file with materials and textures for display, and its serialisation as GLB 2.0.

Every reader of this package returns a `Model`, and the bytes that are sent to a browser are written from the
model alone. Names, comments and metadata of the original file are not copied. Arrays are written with the
same types and values, so positions, normals and texture coordinates are bitwise unchanged.

Shapes: N vertices or indices, F faces, W numbers per vertex.
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
GLB_HEADER = struct.Struct("<4sII")  # magic, version, number of bytes of the file
CHUNK_HEADER = struct.Struct("<II")  # number of bytes of the chunk, type of the chunk
# Component types of glTF: number in the file -> numpy dtype
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TRIANGLES = 4  # mode of a glTF primitive with three indices per triangle
_NUMBERS = {np.dtype(name).str: number for number, name in COMPONENTS.items()}
_TYPES = {width: name for name, width in WIDTHS.items()}
# Targets of buffer views in glTF, which say how the data is used.
_VERTICES = 34962  # ARRAY_BUFFER
_INDICES = 34963  # ELEMENT_ARRAY_BUFFER


@dataclass(frozen=True, eq=False)
class Array:
    """Values of an attribute of vertices, or indices.

    An object that several primitives use is written once.
    """

    values: np.ndarray  # [N, W]
    normalized: bool = False  # True: integers represent numbers in 0..1 or -1..1 (glTF 2.0, section 3.11)


@dataclass(frozen=True, eq=False)
class Primitive:
    """Triangles with one material, a part of a mesh."""

    attributes: dict[str, Array]  # by their names in glTF; POSITION is always present
    indices: Array | None = None  # [N, 1] indices of vertices; None: the vertices in their order
    mode: int = TRIANGLES  # how the indices form triangles: 4 separate triangles, 5 a strip, 6 a fan
    material: int | None = None  # index into Model.materials


@dataclass(frozen=True)
class ImageFile:
    """An image file of a texture, without metadata."""

    data: bytes
    kind: str  # media type, such as image/png


@dataclass
class Node:
    """A node of the scene graph: a mesh with a transformation, and further nodes below it."""

    children: list[int] = field(default_factory=list)  # indices into Model.nodes
    mesh: int | None = None  # index into Model.meshes
    # transformation, as in glTF: a matrix, or translation, rotation and scale
    place: dict = field(default_factory=dict)


@dataclass
class Model:
    """A scene. Materials, textures and samplers are records of glTF with allowed keys only."""

    nodes: list[Node] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)  # indices of the nodes without a parent
    meshes: list[list[Primitive]] = field(default_factory=list)  # primitives of each mesh
    materials: list[dict] = field(default_factory=list)
    textures: list[dict] = field(default_factory=list)
    samplers: list[dict] = field(default_factory=list)
    images: list[ImageFile] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)  # glTF extensions that the model uses


class _Buffer:
    """Binary chunk of a GLB file during its assembly, with the JSON records that refer to it."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self.length = 0  # number of bytes so far
        self.views: list[dict] = []
        self.accessors: list[dict] = []
        self._written: dict[int, int] = {}  # id() of an array that was written -> index of its accessor

    def view(self, data: bytes | memoryview, **fields: int) -> int:
        """Append data to the chunk, and return the index of its buffer view.

        Args:
            data: bytes to append.
            fields: further fields of the record of the buffer view.
        """
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(data), **fields})
        # Every view starts at a multiple of 4 bytes: -length % 4 bytes are missing to such a multiple.
        padding = bytes(-len(data) % 4)
        self.pieces += [data, padding]
        self.length += len(data) + len(padding)
        return len(self.views) - 1

    def accessor(self, array: Array, is_index: bool = False) -> int:
        """Append an array to the chunk unless it is there already, and return the index of its accessor.

        Args:
            array: array to append.
            is_index: True for indices, False for an attribute of vertices.
        """
        # Arrays are compared by identity: the arrays of a model live as long as this object.
        if id(array) not in self._written:
            values = array.values
            view_fields = {}
            row_count, row_width = values.shape
            row_bytes = row_width * values.itemsize
            # glTF requires that the data of each vertex starts at a multiple of 4 bytes, so rows are padded.
            if not is_index and row_bytes % 4:
                # zeros after the numbers of each row
                values = np.concatenate(
                    [
                        np.ascontiguousarray(values).view(np.uint8).reshape(row_count, row_bytes),
                        np.zeros((row_count, -row_bytes % 4), np.uint8),
                    ],
                    axis=1,
                )
                view_fields = {"byteStride": row_bytes + -row_bytes % 4}
            array_bytes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            accessor_record = {
                "bufferView": self.view(
                    array_bytes, target=_INDICES if is_index else _VERTICES, **view_fields
                ),
                "count": row_count,
                "componentType": _NUMBERS[array.values.dtype.str],
                "type": _TYPES[row_width],
                **({"normalized": True} if array.normalized else {}),
            }
            self.accessors.append(accessor_record)
            self._written[id(array)] = len(self.accessors) - 1
        return self._written[id(array)]


def glb_parts(model: Model) -> list[bytes | memoryview]:
    """Serialise a model as GLB.

    Returns: parts of the file in order, which `b"".join` joins. The parts avoid a copy of large arrays.
    """
    buffer = _Buffer()
    meshes = [{"primitives": [_primitive(buffer, primitive) for primitive in mesh]} for mesh in model.meshes]
    images = [{"bufferView": buffer.view(image.data), "mimeType": image.kind} for image in model.images]
    nodes = [
        {
            **({"children": node.children} if node.children else {}),
            **({} if node.mesh is None else {"mesh": node.mesh}),
            **node.place,
        }
        for node in model.nodes
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
        # A viewer without this extension would show a quantised mesh wrongly. Other extensions are optional.
        "extensionsRequired": sorted(model.extensions & {"KHR_mesh_quantization"}),
    }
    json_bytes = json.dumps(
        # glTF forbids empty arrays. "scene" is kept, although its value 0 is false in Python.
        {name: value for name, value in document.items() if value or name == "scene"},
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    # Chunks are padded to multiples of 4 bytes; the JSON chunk is padded with spaces.
    json_bytes += b" " * (-len(json_bytes) % 4)
    # number of bytes of the file, which its header states
    file_length = GLB_HEADER.size + 2 * CHUNK_HEADER.size + len(json_bytes) + buffer.length
    return [
        GLB_HEADER.pack(GLB_MAGIC, 2, file_length),
        CHUNK_HEADER.pack(len(json_bytes), JSON_CHUNK),
        json_bytes,
        CHUNK_HEADER.pack(buffer.length, BIN_CHUNK),
        *buffer.pieces,
    ]


def _primitive(buffer: _Buffer, primitive: Primitive) -> dict:
    """Append the arrays of a primitive to the binary chunk, and return the JSON record of the primitive."""
    primitive_record: dict = {"attributes": {}, "mode": primitive.mode}
    for name, array in primitive.attributes.items():
        primitive_record["attributes"][name] = accessor_index = buffer.accessor(array)
        if name == "POSITION":
            # glTF requires the bounds of the positions in their accessor.
            bounds = [array.values.min(axis=0).tolist(), array.values.max(axis=0).tolist()]
            buffer.accessors[accessor_index] |= dict(zip(("min", "max"), bounds, strict=True))
    if primitive.indices is not None:
        primitive_record["indices"] = buffer.accessor(primitive.indices, is_index=True)
    if primitive.material is not None:
        primitive_record["material"] = primitive.material
    return primitive_record


def srgb_to_linear(srgb: np.ndarray) -> np.ndarray:
    """Convert colours in 0..1 from sRGB to linear RGB (IEC 61966-2-1), which glTF uses.

    Args:
        srgb: colours of any shape.

    Returns: float32 array of the same shape.
    """
    srgb = np.asarray(srgb, dtype=np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype("<f4")


def check_triangles(points: np.ndarray, faces: np.ndarray) -> None:
    """Raise ValueError unless two arrays are points [N, 3] and triangles [F, 3] with indices of points."""
    if points.shape[1:] != (3,) or faces.shape[1:] != (3,) or not len(faces) or not len(points):
        raise ValueError(
            f"the mesh must have at least one point [N, 3] and one triangle [F, 3], got {list(points.shape)}"
            f" and {list(faces.shape)}. Export a mesh that has triangles."
        )
    # numpy would silently accept negative indices
    if faces.min() < 0 or faces.max() >= len(points):
        raise ValueError(
            f"the indices of the faces are {faces.min()}..{faces.max()}, but the {len(points)} vertices have"
            f" the indices 0 to {len(points) - 1}. Export the mesh again."
        )


def triangle_primitive(
    positions: np.ndarray,
    faces: np.ndarray,
    *,
    uv: np.ndarray | None = None,
    colours: np.ndarray | None = None,
    normals: np.ndarray | None = None,
    material: int | None = None,
) -> Primitive:
    """Build a primitive of separate triangles from arrays.

    Args:
        positions: coordinates [N, 3] of the vertices.
        faces: triangles [F, 3] as indices of vertices.
        uv: texture coordinates [N, 2] as in glTF, where v increases downwards; None: no texture.
        colours: colours [N, 3 or 4] of the vertices, sRGB and alpha in 0..255; None: no colours.
        normals: normals [N, 3] of the vertices; None: no normals.
        material: index into Model.materials; None: the default material of glTF.

    Raises: ValueError for arrays of other shapes, numbers that are not finite, and indices out of range.
    """
    positions = np.asarray(positions, dtype="<f4")
    faces = np.asarray(faces)
    check_triangles(positions, faces)
    if not np.isfinite(positions).all():
        raise ValueError(
            "the positions of the vertices are not finite: some are NaN or infinity. Export the mesh again."
        )
    attributes = {"POSITION": Array(positions)}
    for attribute_name, attribute_values in (("NORMAL", normals), ("TEXCOORD_0", uv)):
        if attribute_values is not None:
            if len(attribute_values) != len(positions) or not np.isfinite(attribute_values).all():
                raise ValueError(
                    f"the attribute {attribute_name} must have finite numbers for each of the"
                    f" {len(positions)} vertices. Export the mesh again."
                )
            attributes[attribute_name] = Array(np.ascontiguousarray(attribute_values, dtype="<f4"))
    if colours is not None:
        if len(colours) != len(positions) or colours.ndim != 2 or colours.shape[1] not in (3, 4):
            raise ValueError(
                f"colours must have the shape [{len(positions)}, 3 or 4], one colour per vertex, got"
                f" {list(colours.shape)}. Export the mesh again."
            )
        linear_colours = colours / 255.0
        # Files store sRGB colours, glTF linear colours. Alpha is linear in both.
        linear_colours[:, :3] = srgb_to_linear(linear_colours[:, :3])
        attributes["COLOR_0"] = Array(np.ascontiguousarray(linear_colours, dtype="<f4"))
    # Indices of 16 bits need half of the memory. 65535 is reserved in glTF, so it must not be an index.
    index_dtype = "<u2" if len(positions) <= 65535 else "<u4"
    return Primitive(
        attributes, Array(np.ascontiguousarray(faces, dtype=index_dtype).reshape(-1, 1)), material=material
    )


def model_from_primitives(
    primitives: Iterable[Primitive], materials: Iterable[dict] = (), images: Iterable[ImageFile] = ()
) -> Model:
    """Build a model that consists of one mesh at the origin.

    The primitives are the parts of the mesh. They refer to the materials, which are glTF records, by index.
    Texture i of the materials uses image i.
    """
    images = list(images)
    # in glTF, a material refers to a texture, and only the texture to an image
    textures = [{"source": image_index} for image_index in range(len(images))]
    return Model([Node(mesh=0)], [0], [list(primitives)], list(materials), textures, images=images)


# ---- images of textures and prompts
#
# PNG, JPEG and WebP files are reduced to their pixel data: EXIF, comments, colour profiles, previews and
# trailing bytes are removed. The compressed pixels are copied byte by byte and not decoded. A small file that
# would unpack to a very large image therefore costs nothing here; it is rejected because of the size in its
# header.

MAX_SIDE = 16384  # largest width and height of an image in pixels
MAX_PIXELS = 8192 * 8192  # largest number of pixels of an image
SMALL = 1024  # largest width and height of the shown image of a prompt, in pixels
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers, which contain the size
# Other segments that are copied: Huffman tables, quantisation tables, the restart interval, and Adobe's
# colour transform (APP14).
_JPEG_KEPT = {*_JPEG_SIZES, 0xC4, 0xDB, 0xDD, 0xEE}
# JFIF header (APP0) without resolution and preview, which replaces the header of the file
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_WEBP_KEPT = {b"VP8 ", b"VP8L", b"ALPH", b"VP8X"}


def image_format(data: bytes | memoryview) -> str | None:
    """Return the media type of an image file by its first bytes.

    Returns: "image/png", "image/jpeg" or "image/webp"; None for every other file.
    """
    first_bytes = bytes(data[:16])
    if first_bytes.startswith(PNG):
        return "image/png"
    if first_bytes.startswith(JPEG):
        return "image/jpeg"
    return "image/webp" if first_bytes[:4] == b"RIFF" and first_bytes[8:12] == b"WEBP" else None


def strip_image(data: bytes | memoryview) -> tuple[ImageFile, int]:
    """Remove all metadata from an image file.

    Returns: the image, and its number of pixels.

    Raises: ValueError for other formats, damaged files, and images that are too large.
    """
    media_type = image_format(data)
    readers = {"image/png": _png, "image/jpeg": _jpeg, "image/webp": _webp}
    # by the first bytes, not by the name of the file
    if media_type is None:
        raise ValueError("the image is no PNG, JPEG or WebP file. Convert it to one of these formats.")
    try:
        (width, height), pieces = readers[media_type](bytes(data))
    # the file ends within a field
    except (struct.error, IndexError):
        raise ValueError(f"the {media_type} file is damaged or incomplete. Export the image again.") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ValueError(
            f"the image has {width} x {height} pixels, but at most {MAX_PIXELS >> 20} megapixels and"
            f" {MAX_SIDE} pixels per side are allowed. Reduce the image."
        )
    return ImageFile(b"".join(pieces), media_type), width * height


def preview_image(data: bytes | memoryview) -> bytes:
    """Convert an image prompt to WebP with at most SMALL pixels per side, for display in the browser.

    The image is read as generators read it; transparent parts stay transparent.

    Raises: ValueError for a file that is no image, or that is damaged.
    """
    # imported here, because few functions need this library
    from PIL import Image

    from training.image_reading import read_image

    # In these formats, a file can state one size to its reader and another one to the decoder.
    if image_format(data):
        strip_image(data)
    # A JPEG file is decoded at reduced resolution, which is faster. Other formats are not affected.
    image = read_image(data, "the image", background=None, needed_size=(2 * SMALL, 2 * SMALL))
    # WebP has no greyscale.
    image = image.convert("RGBA" if image.mode in ("LA", "RGBA") else "RGB")
    # keeps the aspect ratio, and never enlarges
    image.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    webp_buffer = io.BytesIO()
    # Empty texts: no metadata is written.
    image.save(webp_buffer, "WEBP", quality=90, exif=b"", xmp=b"", icc_profile=b"")
    return webp_buffer.getvalue()


def _png(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a PNG file, and the parts of the file without metadata."""
    pieces = [data[:8]]  # the signature
    file_position = 8  # position in the file
    image_size = (0, 0)
    while True:
        # A chunk consists of length (4 bytes), name (4), data and checksum (4).
        data_length, chunk_name = struct.unpack_from(">I4s", data, file_position)
        chunk = data[file_position : file_position + 12 + data_length]
        # The chunk IHDR must be the first chunk and occur once.
        if len(chunk) != 12 + data_length or (chunk_name == b"IHDR") != (file_position == 8):
            raise ValueError("the PNG file is damaged or incomplete. Export the image again.")
        if chunk_name == b"IHDR":
            image_size = struct.unpack_from(">II", chunk, 8)
        if chunk_name in _PNG_KEPT:
            pieces.append(chunk)
        # Bit 5 of the first letter is 0 in chunks without which the image cannot be shown (PNG, section 5.4).
        elif not chunk_name[0] & 0x20:
            raise ValueError(
                "the PNG file has a critical chunk that is not in the standard. Export the image again with"
                " standard chunks only."
            )
        if chunk_name == b"IEND":
            return image_size, pieces
        file_position += 12 + data_length


def _jpeg(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a JPEG file, and the parts of the file without metadata."""
    pieces = [data[:2], _JFIF]  # start of the image, and a header
    image_size = (0, 0)
    has_adobe_segment = False
    for marker, segment in _jpeg_segments(data):
        if marker in _JPEG_SIZES:
            # Decoders differ in which of several sizes they use, so the limit of pixels could be evaded.
            if image_size != (0, 0):
                raise ValueError("the JPEG file states several sizes. Export the image again.")
            height, width = struct.unpack_from(">HH", segment, 5)
            image_size = width, height
        # Only the first APP14 segment of Adobe is copied, and only the 12 bytes that are defined.
        if marker == 0xEE and (has_adobe_segment or segment[4:9] != b"Adobe" or len(segment) < 16):
            continue
        if marker == 0xEE:
            has_adobe_segment = True
            segment = b"\xff\xee\x00\x0e" + segment[4:16]
        # 0xDA: a scan with its compressed pixels; 0xD9: end of the image
        if marker in _JPEG_KEPT or marker in (0xDA, 0xD9):
            pieces.append(segment)
    # A file has either a JFIF header or Adobe's segment, so the header is removed again.
    if has_adobe_segment:
        del pieces[1]
    return image_size, pieces


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, bytes of the segment) for all segments of a JPEG file.

    The segment of a scan includes its compressed pixels.
    """
    file_position = 2  # position in the file, after the marker of the start
    while True:
        # Any number of fill bytes 0xFF may precede a marker.
        while data[file_position] == 0xFF and data[file_position + 1] == 0xFF:
            file_position += 1
        if data[file_position] != 0xFF:
            raise ValueError("the JPEG file is damaged or incomplete. Export the image again.")
        marker = data[file_position + 1]
        # End of the image. Bytes after it are dropped.
        if marker == 0xD9:
            yield marker, data[file_position : file_position + 2]
            return
        segment_end = file_position + 2 + struct.unpack_from(">H", data, file_position + 2)[0]
        if segment_end < file_position + 4 or segment_end > len(data):
            raise ValueError("the JPEG file is damaged or incomplete. Export the image again.")
        # start of a scan
        if marker == 0xDA:
            # The pixels end at a marker that is neither a stuffed byte (FF 00) nor a restart marker.
            while True:
                segment_end = data.find(b"\xff", segment_end)
                if segment_end < 0 or segment_end + 1 >= len(data):
                    raise ValueError("the JPEG file is incomplete. Export the image again.")
                if data[segment_end + 1] != 0 and not 0xD0 <= data[segment_end + 1] <= 0xD7:
                    break
                segment_end += 2
        yield marker, data[file_position:segment_end]
        file_position = segment_end


def _webp(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return the size (width, height) of a WebP file, and the parts of the file without metadata."""
    pieces: list[bytes] = []
    # position in the file, after "RIFF", the length and "WEBP"
    file_position = 12
    image_size = (0, 0)
    # size in the extended header (VP8X), if there is one
    canvas_size = None
    earlier_names: set[bytes] = set()
    # number of bytes of the file according to its header; bytes after it are dropped
    stated_length = struct.unpack_from("<I", data, 4)[0] + 8
    if stated_length > len(data):
        raise ValueError("the WebP file is incomplete. Export the image again.")
    image_names = {b"VP8 ", b"VP8L"}
    while file_position + 8 <= stated_length:
        chunk_name, chunk_length = struct.unpack_from("<4sI", data, file_position)
        chunk_body = data[file_position + 8 : file_position + 8 + chunk_length]
        if len(chunk_body) != chunk_length:
            raise ValueError("the WebP file is damaged or incomplete. Export the image again.")
        if chunk_name in (b"ANIM", b"ANMF"):
            raise ValueError("the WebP file is animated. Export a still image.")
        # Decoders differ in which of several images they use.
        if (
            chunk_name in _WEBP_KEPT
            and chunk_name in earlier_names
            or chunk_name in image_names
            and earlier_names & image_names
        ):
            raise ValueError("the WebP file contains several images. Export a single image.")
        earlier_names.add(chunk_name)
        if chunk_name == b"VP8X":
            # 24 bits each for width - 1 and height - 1
            canvas_size = image_size = (
                int.from_bytes(chunk_body[4:7], "little") + 1,
                int.from_bytes(chunk_body[7:10], "little") + 1,
            )
            # Of the flags in the first byte, only alpha is copied.
            chunk_body = bytes([chunk_body[0] & 0x10]) + bytes(3) + chunk_body[4:10]
        elif chunk_name == b"VP8L":
            # lossless compression: 14 bits each for width - 1 and height - 1
            size_bits = struct.unpack_from("<I", chunk_body, 1)[0]
            image_size = (size_bits & 0x3FFF) + 1, (size_bits >> 14 & 0x3FFF) + 1
        elif chunk_name == b"VP8 ":
            # lossy compression: 14 bits each for width and height; the upper two bits are a scaling hint
            width, height = struct.unpack_from("<HH", chunk_body, 6)
            image_size = width & 0x3FFF, height & 0x3FFF
        if chunk_name in image_names and canvas_size not in (None, image_size):
            raise ValueError("the WebP file states two different sizes. Export the image again.")
        if chunk_name in _WEBP_KEPT:
            # Chunks are padded to even lengths.
            pieces.append(
                struct.pack("<4sI", chunk_name, len(chunk_body)) + chunk_body + bytes(len(chunk_body) % 2)
            )
        file_position += 8 + chunk_length + chunk_length % 2
    chunk_bytes = b"".join(pieces)
    # The length in the header counts all bytes after it, "WEBP" included.
    return image_size, [struct.pack("<4sI4s", b"RIFF", 4 + len(chunk_bytes), b"WEBP"), chunk_bytes]
