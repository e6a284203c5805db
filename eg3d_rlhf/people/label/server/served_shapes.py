"""A campaign's shapes as they are served: which are prepared, under which addresses, and their bytes.

Bodies are files that are streamed and never wholly in memory, made longer where sizes would tell something,
and parts of films. A gzip member is made longer by a comment in its header (RFC 1952, 2.3), an MP4 by a box
of kind 'free' at its end (ISO/IEC 14496-12, 8.1.2): what is read from them stays the same.
"""

import base64
import hashlib
import hmac
import itertools
import re
import struct
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from eg3d_rlhf.people.label.entities import Mode, Shape, StoredCampaign
from eg3d_rlhf.people.label.server.options import AppOptions

POLL = 0.5  # seconds between two looks at the cache
AHEAD = 64  # shapes are prepared in order of the plan: a look goes no further than so many missing ones
LETTERS = 32  # of an address
GRAIN = 16 * 1024  # bytes; padded lengths are multiples of it
CHUNK = 256 * 1024  # bytes read at once
WHOLE = 1024 * 1024  # bytes up to which a body is sent in one piece
BOX = struct.Struct(">I4s")  # of an MP4: length and kind
_COMMENT = 0x10  # gzip's flag FCOMMENT
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})?|bytes=-(\d{1,15})")


class Addresses:
    """Addresses under which annotators see shapes: others for each assignment, so that none is known again by
    its address.

        address = base64url(r, asset's number xor K("number", r), K("check", r, number)),
        r = K("pair", assignment, asset)

    K is HMAC-SHA256 under the server's secret, of which r takes 12 bytes, the number 4, the check 8. So an
    address tells nothing, cannot be made up, needs no table, and is the same after a restart: what a browser
    has kept stays good.
    """

    def __init__(self, secret: bytes, assets: Iterable[str]):
        self._secret = secret
        self._assets = list(assets)
        self._numbers = {asset: number for number, asset in enumerate(self._assets)}

    def of(self, assignment: str, asset: str) -> str:
        """The address of a shape in an assignment; of both sides the same where they are one shape."""
        number = self._numbers[asset].to_bytes(4)
        salt = self._keyed("pair", f"{assignment} {asset}".encode(), 12)
        hidden = _xor(number, self._keyed("number", salt, 4))
        return base64.urlsafe_b64encode(salt + hidden + self._keyed("check", salt + number, 8)).decode()

    def asset(self, address: str) -> str | None:
        """The store's token of the shape at an address; None for what is none. The token itself, which no
        annotator is told, is one too.
        """
        if address in self._numbers:
            return address
        if len(address) != LETTERS:
            return None
        raw = base64.urlsafe_b64decode(address)
        salt = raw[:12]
        hidden = raw[12:16]
        check = raw[16:]
        number = _xor(hidden, self._keyed("number", salt, 4))
        if not hmac.compare_digest(check, self._keyed("check", salt + number, 8)):
            return None
        return self._assets[int.from_bytes(number)]

    def _keyed(self, purpose: str, data: bytes, length: int) -> bytes:
        return hmac.new(self._secret, f"shape {purpose} ".encode() + data, hashlib.sha256).digest()[:length]


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Section:
    """A part of a body: bytes, one of which is repeated, or part of a file."""

    data: bytes | Path
    length: int
    start: int = 0  # in the file, which is read to its end


Body = Sequence[Section]


def body_of(path: Path, length: int | None = None) -> Body:
    """A prepared shape's file, made `length` bytes long."""
    size = path.stat().st_size
    if length is None:
        return [Section(path, size)]
    with path.open("rb") as file:
        head = file.read(10)
    if head[4:8] == b"ftyp":
        spare = length - size - BOX.size
        if spare < 0:
            raise ValueError(
                f"padded: expected an MP4 of at most {length - BOX.size} bytes, got {size}. Prepare the"
                " shapes again."
            )
        return [
            Section(path, size),
            Section(BOX.pack(BOX.size + spare, b"free"), BOX.size),
            Section(b"\0", spare),
        ]
    if head[:3] != b"\x1f\x8b\x08" or head[3] != 0 or size >= length:
        raise ValueError(
            f"padded: expected a bare gzip member of fewer than {length} bytes, got {size}. Prepare the"
            " shapes again."
        )
    first = head[:3] + bytes([_COMMENT]) + head[4:]
    return [
        Section(first, 10),
        Section(b" ", length - size - 1),
        Section(b"\0", 1),
        Section(path, size - 10, 10),
    ]


async def read(body: Body, first: int, stop: int) -> AsyncIterator[bytes]:
    """The bytes first..stop of a body in chunks; the event loop does not wait for the disk."""
    at = 0
    for section in body:
        low = max(first - at, 0)
        high = min(stop - at, section.length)
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
        s.data.read_bytes()[s.start :] if isinstance(s.data, Path) else s.data * (s.length // len(s.data))
        for s in body
        if s.length
    )


def respond(body: Body, request: Request, headers: dict[str, str], film: bool) -> Response:
    """The response; of a film also one part, where one is asked for (RFC 9110, 14.2).
    May block for a moment.
    """
    length = sum(section.length for section in body)
    if not film:
        kind = "application/octet-stream"
        headers = {**headers, "Content-Encoding": "gzip"}
        if length <= WHOLE:
            return Response(read_whole(body), media_type=kind, headers=headers)
        return StreamingResponse(read(body, 0, length), 200, {**headers, "Content-Length": str(length)}, kind)
    headers = {**headers, "Accept-Ranges": "bytes"}
    first = 0
    stop = length
    status = 200
    wanted = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if wanted and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        begin, end, last = wanted.groups()
        first, stop = (
            (max(0, length - int(last)), length)
            if last
            else (int(begin), min(int(end) + 1, length) if end else length)
        )
        if first >= stop:
            return Response(None, 416, {**headers, "Content-Range": f"bytes */{length}"})
        status = 206
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{length}"
    return StreamingResponse(
        read(body, first, stop), status, {**headers, "Content-Length": str(stop - first)}, "video/mp4"
    )


class PreparedShapes:
    """Looks shapes up by the store's asset token. Thread-safe; its methods block.

    In a blind study nothing is served before every shape is prepared, so that waiting tells nothing, and all
    bodies have one length, so that neither size nor transfer time tells which generator a shape is from.
    Assets differ more in size: there, those that meet have one.
    """

    def __init__(self, options: AppOptions, campaign: StoredCampaign):
        self.cache = options.cache
        self.worker = options.preparation
        self.blind = campaign.settings.mode is Mode.STUDY
        self.shapes = dict(options.store.shapes(campaign.id))  # by asset token
        self._missing = dict(self.shapes)  # in order of the plan
        self._files: dict[str, Path] = {}
        self._failed: set[str] = set()  # cannot be drawn
        self._lengths: dict[str, int] = {}  # of the bodies of a study, by asset token
        self._pairs = options.store.pairs(campaign.id) if self.blind else []
        self._conditions: Mapping[str, Mapping] = campaign.settings.extra.get("conditions", {})
        self._looked = -POLL
        self._lock = threading.Lock()
        # at tens of thousands of shapes it takes a second, for which the first to ask would all wait
        self._look()
        self._looked = -POLL  # what is still missing may be there when the first one asks

    def known(self, asset: str) -> bool:
        self._look()
        return asset in self.shapes and asset not in self._failed

    def ready(self, asset: str) -> bool:
        self._look()
        return asset in self._files and (not self.blind or not self._missing)

    def lost(self, asset: str) -> bool:
        self._look()
        return asset in self._failed or (
            asset in self._missing and self.worker is not None and self.worker.gave_up
        )

    def settled(self) -> bool:
        self._look()
        return not self._missing

    def body(self, asset: str) -> Body:
        if not self.blind:
            return body_of(self._files[asset])
        with self._lock:
            self._lengths = self._lengths or self._common_lengths()
        return body_of(self._files[asset], self._lengths[asset])

    def film(self, asset: str) -> bool:
        return self._files[asset].suffix == ".mp4"

    def prompt(self, asset: str, address: str) -> dict | None:
        condition = self._condition(asset)
        shown = {
            "text": condition.get("text"),
            "image": f"/api/prompts/{address}" if self.prompt_picture(asset) else None,
        }
        return shown if any(shown.values()) else None

    def prompt_picture(self, asset: str) -> Path | None:
        key = self._condition(asset).get("hash")
        return self.cache.prompt(key) if key else None

    def _condition(self, asset: str) -> Mapping:
        shape = self.shapes.get(asset)
        return self._conditions.get(shape.condition, {}) if shape is not None else {}

    def _common_lengths(self) -> dict[str, int]:
        """One length for all shapes of generators, and for all assets that a chain of pairs links."""
        group = {asset: asset for asset in self._files}

        def first_of(asset: str) -> str:
            while group[asset] != asset:
                group[asset] = asset = group[group[asset]]
            return asset

        isosurfaces = [asset for asset in self._files if not self.shapes[asset].file]
        for a, b in (*self._pairs, *itertools.pairwise(isosurfaces)):
            if a in group and b in group:
                group[first_of(a)] = first_of(b)
        largest: dict[str, int] = defaultdict(int)
        for asset, path in self._files.items():
            largest[first_of(asset)] = max(largest[first_of(asset)], path.stat().st_size)
        return {asset: (largest[first_of(asset)] // GRAIN + 2) * GRAIN for asset in self._files}

    def progress(self) -> dict:
        self._look()
        done = len(self.shapes) - len(self._missing)
        total = len(self.shapes)
        pace = (
            self.worker.progress()["seconds_per_shape"] if self.worker is not None and self._missing else None
        )
        return {
            "done": done,
            "total": total,
            "seconds_left": 0.0 if done == total else pace and pace * (total - done),
        }

    def trouble(self) -> str | None:
        """Why the preparation is stuck, or why shapes are not shown, for administrators:
        it may name files.
        """
        if self.worker is None or not (self._missing or self._failed):
            return None
        progress = self.worker.progress()
        left_out = (
            f"{progress['failed']} not shown; {progress['reason']}"
            if progress["failed"] and progress["reason"]
            else None
        )
        return progress["error"] if self._missing and progress["error"] else left_out

    def _look(self) -> None:
        with self._lock:
            if not self._missing or time.monotonic() - self._looked < POLL:
                return
            if self.worker is not None:
                self.worker.ensure()
            absent = 0
            for asset, shape in list(self._missing.items()):
                path = self.cache.mesh(shape)
                if path is not None and self._prompt_settled(shape):
                    self._files[asset] = path
                elif path is None and self.cache.failure(shape) is not None:
                    self._failed.add(asset)
                elif (absent := absent + 1) > AHEAD:
                    break
                else:
                    continue
                del self._missing[asset]
            self._looked = time.monotonic()

    def _prompt_settled(self, shape: Shape) -> bool:
        key = self._conditions.get(shape.condition, {}).get("hash") if shape.condition else None
        return not key or self.cache.prompt_settled(key)
