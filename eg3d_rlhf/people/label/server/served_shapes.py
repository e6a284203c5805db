"""A campaign's shapes as they are served: which are prepared, under which addresses, and their files.

Large files are streamed and never wholly in memory; of films a part may be asked for.
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

POLL = 0.5  # seconds between two looks at the cache
AHEAD = 64  # shapes are prepared in order of the plan: a look goes no further than so many missing ones
LETTERS = 32  # of an address
CHUNK = 256 * 1024  # bytes read at once
WHOLE = 1024 * 1024  # bytes up to which a file is sent in one piece
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


async def read(path: Path, first: int, stop: int) -> AsyncIterator[bytes]:
    """Yield the bytes first..stop of a file in chunks; the event loop does not wait for the disk."""
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(first)
        while first < stop and (data := await file.read(min(CHUNK, stop - first))):
            first += len(data)
            yield data


def respond(path: Path, request: Request, headers: dict[str, str]) -> Response:
    """Answer with a prepared shape's file; of a film also with one part, where one is asked for
    (RFC 9110, 14.2). May block for a moment.
    """
    length = path.stat().st_size
    if path.suffix != ".mp4":
        kind = "application/octet-stream"
        headers = {**headers, "Content-Encoding": "gzip"}
        if length <= WHOLE:
            return Response(path.read_bytes(), media_type=kind, headers=headers)
        return StreamingResponse(read(path, 0, length), 200, {**headers, "Content-Length": str(length)}, kind)
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
        read(path, first, stop), status, {**headers, "Content-Length": str(stop - first)}, "video/mp4"
    )


class PreparedShapes:
    """Looks shapes up by the store's asset token. Thread-safe; its methods block.

    In a blind study nothing is served before every shape is prepared, so that waiting tells nothing. Sizes of
    files are not hidden: somebody who measures them may tell two generators apart.
    """

    def __init__(self, options: AppOptions, campaign: StoredCampaign):
        self.cache = options.cache
        self.worker = options.preparation
        self.blind = campaign.settings.mode is Mode.STUDY
        self.shapes = dict(options.store.shapes(campaign.id))  # by asset token
        self._missing = dict(self.shapes)  # in order of the plan
        self._files: dict[str, Path] = {}
        self._failed: set[str] = set()  # cannot be drawn
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

    def path(self, asset: str) -> Path:
        """The prepared file."""
        return self._files[asset]

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
