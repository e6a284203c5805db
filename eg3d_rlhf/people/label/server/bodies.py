"""Bodies of shapes: files that are streamed and never wholly in memory, made longer so that sizes tell nothing, and parts of films.

A gzip member is made longer by a comment in its header (RFC 1952, 2.3), an MP4 by a box of kind 'free' at its end (ISO/IEC 14496-12,
8.1.2): what is read from them stays the same.
"""

import re
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

GRAIN = 16 * 1024  # bytes; padded lengths are multiples of it
CHUNK = 256 * 1024  # bytes read at once
WHOLE = 1024 * 1024  # bytes up to which a body is sent in one piece
BOX = struct.Struct(">I4s")  # of an MP4: length and kind
_COMMENT = 0x10  # gzip's flag FCOMMENT
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})?|bytes=-(\d{1,15})")


@dataclass(frozen=True)
class Section:
    """A part of a body: bytes, one of which is repeated, or part of a file."""

    data: bytes | Path
    length: int
    start: int = 0  # in the file


Body = Sequence[Section]


def length_of(body: Body) -> int:
    """Bytes in all."""
    return sum(section.length for section in body)


def body_of(path: Path, length: int | None = None) -> Body:
    """A prepared shape's file, made `length` bytes long.

    Raises: ValueError for a file that cannot be made so long; it must have `BOX.size` bytes less at least.
    """
    size = path.stat().st_size
    if length is None:
        return [Section(path, size)]
    with path.open("rb") as file:
        head = file.read(10)
    if head[4:8] == b"ftyp":
        spare = length - size - BOX.size
        if spare < 0:
            raise ValueError(f"padded: expected an MP4 of at most {length - BOX.size} bytes, got {size}. Prepare the shapes again.")
        return [Section(path, size), Section(BOX.pack(BOX.size + spare, b"free"), BOX.size), Section(b"\0", spare)]
    if head[:3] != b"\x1f\x8b\x08" or head[3] != 0 or size >= length:
        raise ValueError(f"padded: expected a bare gzip member of fewer than {length} bytes, got {size}. Prepare the shapes again.")
    first = head[:3] + bytes([_COMMENT]) + head[4:]
    return [Section(first, 10), Section(b" ", length - size - 1), Section(b"\0", 1), Section(path, size - 10, 10)]


async def read(body: Body, first: int, stop: int) -> AsyncIterator[bytes]:
    """The bytes first..stop of a body in chunks; the event loop does not wait for the disk."""
    at = 0
    for section in body:
        low, high = max(first - at, 0), min(stop - at, section.length)
        at += section.length
        if low >= high:
            continue
        if isinstance(section.data, bytes):
            if len(section.data) == section.length:
                yield section.data[low:high]
            else:
                for place in range(low, high, CHUNK):
                    yield section.data * min(CHUNK, high - place)
            continue
        async with await anyio.open_file(section.data, "rb") as file:
            await file.seek(section.start + low)
            while low < high and (data := await file.read(min(CHUNK, high - low))):
                low += len(data)
                yield data


def read_whole(body: Body) -> bytes:
    """All bytes at once; blocks."""
    return b"".join(
        _part_of_file(section) if isinstance(section.data, Path) else section.data * (section.length // len(section.data))
        for section in body if section.length
    )  # fmt: skip


def _part_of_file(section: Section) -> bytes:
    with Path(section.data).open("rb") as file:  # type: ignore[arg-type]
        file.seek(section.start)
        return file.read(section.length)


def respond(body: Body, request: Request, headers: dict[str, str], film: bool) -> Response:
    """The response; of a film also one part, where one is asked for (RFC 9110, 14.2). May block for a moment."""
    length = length_of(body)
    if not film:
        kind, headers = "application/octet-stream", {**headers, "Content-Encoding": "gzip"}
        if length <= WHOLE:
            return Response(read_whole(body), media_type=kind, headers=headers)
        return StreamingResponse(read(body, 0, length), 200, {**headers, "Content-Length": str(length)}, kind)
    headers, first, stop, status = {**headers, "Accept-Ranges": "bytes"}, 0, length, 200
    wanted = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if wanted and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        begin, end, last = wanted.groups()
        first, stop = (max(0, length - int(last)), length) if last else (int(begin), min(int(end) + 1, length) if end else length)
        if first >= stop:
            return Response(None, 416, {**headers, "Content-Range": f"bytes */{length}"})
        status, headers["Content-Range"] = 206, f"bytes {first}-{stop - 1}/{length}"
    return StreamingResponse(read(body, first, stop), status, {**headers, "Content-Length": str(stop - first)}, "video/mp4")
