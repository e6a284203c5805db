"""Serves the shapes of a campaign: determines which are prepared, gives them addresses, and sends their
files.

Large files are streamed and never completely in memory. Of a video, a client may request a part.
"""

import base64
import hashlib
import hmac
import re
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from eg3d_rlhf.people.label.entities import Mode, Shape, StoredCampaign
from eg3d_rlhf.people.label.server.options import AppOptions

POLL = 0.5  # seconds between two checks of the cache
AHEAD = 64  # shapes are prepared in order of the plan, so a check ends after this many missing ones
LETTERS = 32  # length of an address
CHUNK = 256 * 1024  # bytes that are read at once
ONE_PIECE = 1024 * 1024  # files of up to this many bytes are sent in one piece
# A Range header with one range: first-last, first-, or -length.
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})?|bytes=-(\d{1,15})")


class Addresses:
    """Addresses under which annotators see shapes. They differ from assignment to assignment, so that
    annotators cannot recognise a shape by its address.

        address = base64url(r, asset's number xor K("number", r), K("check", r, number)),
        r = K("pair", assignment, asset)

    K is HMAC-SHA256 under the server's secret. r has 12 bytes, the number 4, the check 8. An address reveals
    nothing, cannot be forged, and needs no table. It is the same after a restart, so copies in the browser's
    cache remain valid.
    """

    def __init__(self, secret: bytes, assets: Iterable[str]):
        self._secret = secret
        self._assets = list(assets)
        self._numbers = {asset: number for number, asset in enumerate(self._assets)}

    def address(self, assignment: str, asset: str) -> str:
        """Return the address of a shape in an assignment; equal shapes on both sides have equal addresses."""
        # 4 bytes: up to 4 billion shapes.
        number = self._numbers[asset].to_bytes(4)
        salt = self._keyed("pair", f"{assignment} {asset}".encode(), 12)
        encrypted = _xor(number, self._keyed("number", salt, 4))
        return base64.urlsafe_b64encode(salt + encrypted + self._keyed("check", salt + number, 8)).decode()

    def asset(self, address: str) -> str | None:
        """Return the store's token of the shape at an address, or None for an invalid address. The token
        itself, which annotators never see, is a valid address, too.
        """
        if address in self._numbers:
            return address
        # Longer or shorter texts would make the decoding fail.
        if len(address) != LETTERS:
            return None
        raw = base64.urlsafe_b64decode(address)
        salt = raw[:12]
        encrypted = raw[12:16]
        check = raw[16:]
        number = _xor(encrypted, self._keyed("number", salt, 4))
        # Without the server's secret an address is valid with a probability of 2^-64 only.
        if not hmac.compare_digest(check, self._keyed("check", salt + number, 8)):
            return None
        return self._assets[int.from_bytes(number)]

    def _keyed(self, purpose: str, data: bytes, length: int) -> bytes:
        """Return the first bytes of an HMAC-SHA256. `purpose` separates its uses, so that they share no
        values.
        """
        return hmac.new(self._secret, f"shape {purpose} ".encode() + data, hashlib.sha256).digest()[:length]


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


async def read(path: Path, first: int, stop: int) -> AsyncIterator[bytes]:
    """Yield the bytes from `first` to before `stop` of a file in chunks, without blocking the event loop."""
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(first)
        # An empty read means that the file has become shorter.
        while first < stop and (data := await file.read(min(CHUNK, stop - first))):
            first += len(data)
            yield data


def respond(path: Path, request: Request, headers: dict[str, str]) -> Response:
    """Respond with the file of a prepared shape. Of a video, the client may request one part (RFC 9110,
    14.2).

    May block for a moment.
    """
    length = path.stat().st_size
    if path.suffix != ".mp4":
        # Everything but videos is stored with gzip, and the browser decompresses it.
        kind = "application/octet-stream"
        headers = {**headers, "Content-Encoding": "gzip"}
        if length <= ONE_PIECE:
            return Response(path.read_bytes(), media_type=kind, headers=headers)
        return StreamingResponse(read(path, 0, length), 200, {**headers, "Content-Length": str(length)}, kind)
    headers = {**headers, "Accept-Ranges": "bytes"}
    first = 0
    stop = length
    status = 200
    requested = _RANGE.fullmatch(request.headers.get("range", "").strip())
    # With another ETag in If-Range the client has an older file: it gets the new one completely.
    if requested and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        begin, end, last = requested.groups()
        first, stop = (
            (max(0, length - int(last)), length)
            if last
            # The client's `end` is inclusive, `stop` is not.
            else (int(begin), min(int(end) + 1, length) if end else length)
        )
        # RFC 9110: 416 for a range outside the file.
        if first >= stop:
            return Response(None, 416, {**headers, "Content-Range": f"bytes */{length}"})
        status = 206
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{length}"
    return StreamingResponse(
        read(path, first, stop), status, {**headers, "Content-Length": str(stop - first)}, "video/mp4"
    )


class PreparedShapes:
    """State of the shapes of a campaign, looked up by the store's asset token. Thread-safe; all methods
    block.

    In a blind study nothing is served before all shapes are prepared, so that waiting times reveal nothing.
    The sizes of files are not hidden: a person who measures them may be able to distinguish two generators.
    """

    def __init__(self, options: AppOptions, campaign: StoredCampaign):
        self.cache = options.cache
        self.worker = options.preparation
        self.blind = campaign.settings.mode is Mode.STUDY
        self.shapes = dict(options.store.shapes(campaign.id))  # by asset token
        self._missing = dict(self.shapes)  # not prepared yet, in order of the plan
        self._files: dict[str, Path] = {}
        self._failed: set[str] = set()  # cannot be prepared
        self._prompts: Mapping[str, Mapping] = campaign.settings.extra.get("conditions", {})
        self._checked = -POLL  # time of the last check of the cache
        self._lock = threading.Lock()
        # With tens of thousands of shapes the first check takes a second. Doing it now keeps the first
        # requests from waiting for it.
        self._check()
        self._checked = -POLL  # shapes that are missing now may be there at the first request

    def known(self, asset: str) -> bool:
        """Return True for a shape of this campaign that is prepared or may still be."""
        self._check()
        return asset in self.shapes and asset not in self._failed

    def ready(self, asset: str) -> bool:
        """Return True for a shape that can be served."""
        self._check()
        return asset in self._files and (not self.blind or not self._missing)

    def lost(self, asset: str) -> bool:
        """Return True for a shape that can never be served."""
        self._check()
        return asset in self._failed or (
            # A shape that is missing when the worker has stopped for good is lost as well.
            asset in self._missing and self.worker is not None and self.worker.gave_up
        )

    def settled(self) -> bool:
        """Return True if no shape is missing: all are prepared or have failed."""
        self._check()
        return not self._missing

    def path(self, asset: str) -> Path:
        """Return the file of a prepared shape."""
        return self._files[asset]

    def prompt(self, asset: str, address: str) -> dict | None:
        """Return text and image address of the prompt of a shape; None if it has neither."""
        stored = self._prompt(asset)
        shown = {
            "text": stored.get("text"),
            "image": f"/api/prompts/{address}" if self.prompt_image(asset) else None,
        }
        return shown if any(shown.values()) else None

    def prompt_image(self, asset: str) -> Path | None:
        """Return the prepared image of a shape's prompt, or None."""
        key = self._prompt(asset).get("hash")
        return self.cache.prompt(key) if key else None

    def _prompt(self, asset: str) -> Mapping:
        """Return the prompt of a shape as the campaign stores it."""
        shape = self.shapes.get(asset)
        return self._prompts.get(shape.condition, {}) if shape is not None else {}

    def progress(self) -> dict:
        """Return the progress of the preparation, with an estimate of the remaining seconds."""
        self._check()
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
        """Return why the preparation has stopped, or why shapes are not shown. The text may contain names of
        files, so only admins see it.
        """
        if self.worker is None or not (self._missing or self._failed):
            return None
        progress = self.worker.progress()
        left_out = (
            f"{progress['failed']} shapes are not shown: {progress['reason']}"
            if progress["failed"] and progress["reason"]
            else None
        )
        return progress["error"] if self._missing and progress["error"] else left_out

    def _check(self) -> None:
        """Look for shapes that were prepared since the last check, at most every POLL seconds."""
        with self._lock:
            if not self._missing or time.monotonic() - self._checked < POLL:
                return
            # Starts the worker again if it has died.
            if self.worker is not None:
                self.worker.ensure()
            absent = 0
            # A copy of the items, because entries are deleted in the loop.
            for asset, shape in list(self._missing.items()):
                path = self.cache.mesh(shape)
                # A shape is served with its prompt, so it waits until the prompt's image is prepared or has
                # failed.
                if path is not None and self._prompt_settled(shape):
                    self._files[asset] = path
                elif path is None and self.cache.failure(shape) is not None:
                    self._failed.add(asset)
                elif (absent := absent + 1) > AHEAD:
                    break
                else:
                    continue
                # Prepared or failed: not looked for again.
                del self._missing[asset]
            self._checked = time.monotonic()

    def _prompt_settled(self, shape: Shape) -> bool:
        """Return True if the prompt of a shape has no image, or its image is prepared or has failed."""
        key = self._prompts.get(shape.condition, {}).get("hash") if shape.condition else None
        return not key or self.cache.prompt_settled(key)
