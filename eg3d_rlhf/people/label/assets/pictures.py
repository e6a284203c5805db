"""PNG, JPEG and WebP files without what is not their picture: EXIF, comments, colour profiles, previews, whatever follows the end.

The compressed pixels are copied byte by byte; nothing is decoded, so a small file that would unpack to a huge picture costs nothing here,
and is refused by the size that it states.
"""

import io
import struct
from collections.abc import Iterator

from eg3d_rlhf.people.label.assets.model import Picture

MAX_SIDE, MAX_PIXELS = 16384, 8192 * 8192
SMALL = 1024  # pixels: longest side of a prompt's picture
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
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
    """A picture's file with its pixels alone, and how many there are.

    Raises: ValueError for another format, a damaged file, or a picture too large.
    """
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
    """A picture of at most SMALL pixels a side as WebP, as it is shown beside a pair. Raises: ValueError for what is none."""
    from PIL import Image, ImageOps

    stripped(data)  # no other format reaches the decoders, and no more pixels than are allowed
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as opened:
            opened.draft("RGB", (2 * SMALL, 2 * SMALL))
            image = ImageOps.exif_transpose(opened)
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a picture that can be decoded, got a damaged one ({type(error).__name__})") from None
    image.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, exif=b"", xmp=b"", icc_profile=b"")
    return out.getvalue()


def _png(data: bytes) -> tuple[tuple[int, int], list[bytes]]:
    pieces, at, size = [data[:8]], 8, (0, 0)
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
    pieces, size = [data[:2], _JFIF], (0, 0)
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
    at, size, canvas = 12, (0, 0), None
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
        if name in _WEBP_KEPT and name in seen or name in (b"VP8 ", b"VP8L") and seen & {b"VP8 ", b"VP8L"}:  # decoders may take the other
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
