"""Shapes of a campaign as the server sends them: state of their preparation, addresses, and files.

Large files are streamed, so that they are never completely in memory. A client may request a part of a video.
"""

import base64
import hashlib
import hmac
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from eg3d_rlhf.people.label.entities import Mode, Shape, StoredCampaign
from eg3d_rlhf.people.label.server.options import AppOptions

POLL = 0.5  # smallest time between two checks of the cache, in seconds
# Number of missing shapes after which a check of the cache ends. Shapes are prepared in order of the plan, so
# the shapes after them are missing as well.
AHEAD = 64
LETTERS = 32  # number of characters of an address
CHUNK = 256 * 1024  # number of bytes that are read at once
ONE_PIECE = 1024 * 1024  # size in bytes up to which a file is sent in one piece
# Range header with one range: "bytes=FIRST-LAST", "bytes=FIRST-" or "bytes=-LENGTH".
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})?|bytes=-(\d{1,15})")


class Addresses:
    """Addresses under which the page loads shapes.

    The address of a shape is different in each assignment, so that annotators cannot recognise a shape by it.

        address = base64url(r, index xor K("number", r), K("check", r, index))
        r = K("pair", assignment token, asset token)

    Here `index` is the position of the shape in the plan (4 bytes), K is HMAC-SHA256 with the secret of the
    server, cut to the needed length, r has 12 bytes, and the check has 8 bytes. Without the secret, an
    address contains no information and cannot be forged. It is computed and needs no table. It is the same
    after a restart, so that copies in the cache of the browser remain valid.

    Args:
        secret: secret key of the server.
        asset_tokens: asset tokens of all shapes, in order of the plan.
    """

    def __init__(self, secret: bytes, asset_tokens: Iterable[str]):
        self._secret = secret
        self._assets: list[str] = []
        self._numbers: dict[str, int] = {}
        self.add(asset_tokens)

    def add(self, asset_tokens: Iterable[str]) -> None:
        """Add the asset tokens of shapes that were appended to the plan."""
        for asset_token in asset_tokens:
            # The list grows first, so that another thread finds the token of every number.
            self._assets.append(asset_token)
            self._numbers[asset_token] = len(self._assets) - 1

    def address(self, assignment_token: str, asset_token: str) -> str:
        """Return the address of a shape in an assignment.

        If the same shape is on both sides, its two addresses are equal.

        Args:
            assignment_token: token of the assignment.
            asset_token: asset token of the shape.
        """
        # 4 bytes are enough for 4 billion shapes
        index_bytes = self._numbers[asset_token].to_bytes(4)
        salt = self._keyed("pair", f"{assignment_token} {asset_token}".encode(), 12)
        encrypted_index = _xor(index_bytes, self._keyed("number", salt, 4))
        return base64.urlsafe_b64encode(
            salt + encrypted_index + self._keyed("check", salt + index_bytes, 8)
        ).decode()

    def asset(self, address: str) -> str | None:
        """Return the asset token of the shape at an address, or None if the address is invalid.

        An asset token, which annotators never receive, is a valid address as well.
        """
        if address in self._numbers:
            return address
        # b64decode raises an error for texts of some other lengths
        if len(address) != LETTERS:
            return None
        address_bytes = base64.urlsafe_b64decode(address)  # 24 bytes
        salt = address_bytes[:12]
        encrypted_index = address_bytes[12:16]
        check_bytes = address_bytes[16:]
        index_bytes = _xor(encrypted_index, self._keyed("number", salt, 4))
        # The check has 64 bits, so an address that was made without the secret is valid with probability
        # 2^-64.
        if not hmac.compare_digest(check_bytes, self._keyed("check", salt + index_bytes, 8)):
            return None
        return self._assets[int.from_bytes(index_bytes)]

    def _keyed(self, purpose: str, message: bytes, length: int) -> bytes:
        """Return the first `length` bytes of the HMAC-SHA256 of `message` with the secret.

        `purpose` is a part of the input, so that values for different purposes are independent.
        """
        return hmac.new(self._secret, f"shape {purpose} ".encode() + message, hashlib.sha256).digest()[
            :length
        ]


def _xor(first_bytes: bytes, second_bytes: bytes) -> bytes:
    """Return the bitwise exclusive or of two byte strings of equal length."""
    return bytes(x ^ y for x, y in zip(first_bytes, second_bytes, strict=True))


async def read(path: Path, start_byte: int, stop_byte: int) -> AsyncIterator[bytes]:
    """Yield the bytes `start_byte` to `stop_byte` - 1 of a file in chunks, without blocking the event loop.

    Args:
        path: path of the file.
        start_byte: index of the first byte, from 0.
        stop_byte: index after the last byte.
    """
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(start_byte)
        position = start_byte
        # `read` returns no bytes if the file has become shorter in the meantime
        while position < stop_byte and (chunk := await file.read(min(CHUNK, stop_byte - position))):
            position += len(chunk)
            yield chunk


def respond(path: Path, request: Request, headers: dict[str, str]) -> Response:
    """Return the response with the file of a prepared shape. The function may block for a moment.

    The client may request one part of a video (Range header, RFC 9110, section 14.2).

    Args:
        path: file of the shape.
        request: request of the client.
        headers: headers of the response, among them ETag.
    """
    file_size = path.stat().st_size
    if path.suffix != ".mp4":
        # All files except videos are stored with gzip, and the browser decompresses them.
        media_type = "application/octet-stream"
        headers = {**headers, "Content-Encoding": "gzip"}
        if file_size <= ONE_PIECE:
            return Response(path.read_bytes(), media_type=media_type, headers=headers)
        headers = {**headers, "Content-Length": str(file_size)}
        return StreamingResponse(read(path, 0, file_size), 200, headers, media_type)
    headers = {**headers, "Accept-Ranges": "bytes"}
    start_byte = 0
    stop_byte = file_size
    status = 200
    range_match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    # If the ETag in If-Range is another one, the client has a part of an older file, and gets the new file
    # completely.
    if range_match and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        first_byte, last_byte, suffix_length = range_match.groups()
        if suffix_length:
            start_byte = max(0, file_size - int(suffix_length))
        else:
            start_byte = int(first_byte)
            # the last byte belongs to the range, whereas `stop` is the position after it
            stop_byte = min(int(last_byte) + 1, file_size) if last_byte else file_size
        # Status 416 for a range outside the file (RFC 9110).
        if start_byte >= stop_byte:
            return Response(None, 416, {**headers, "Content-Range": f"bytes */{file_size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start_byte}-{stop_byte - 1}/{file_size}"
    headers = {**headers, "Content-Length": str(stop_byte - start_byte)}
    return StreamingResponse(read(path, start_byte, stop_byte), status, headers, "video/mp4")


class PreparedShapes:
    """State of the preparation of a campaign's shapes, by asset token.

    The object is thread-safe. All methods may block for a moment.

    In a blind study no shape is served before all shapes are prepared, so that waiting times contain no
    information about the generators. The sizes of files are not hidden: a person who measures them may be
    able to distinguish two generators.

    Args:
        options: options of the server.
        campaign: served campaign.
        on_new: function that is called with the asset tokens of shapes that were appended to the campaign,
            before any of them is ready.
    """

    def __init__(
        self,
        options: AppOptions,
        campaign: StoredCampaign,
        on_new: Callable[[list[str]], None] = lambda tokens: None,
    ):
        self._store = options.store
        self._campaign_id = campaign.id
        self._on_new = on_new
        # True while pairs will still be appended to the campaign
        self._grows = options.store.plan(campaign.id).missing_count > 0
        self.cache = options.cache
        self.worker = options.preparation
        self.blind = campaign.settings.mode is Mode.STUDY
        self.shapes = dict(options.store.shapes(campaign.id))  # by asset token
        self._missing = dict(self.shapes)  # shapes that are not prepared yet, in order of the plan
        self._files: dict[str, Path] = {}  # files of prepared shapes
        self._failed: set[str] = set()  # asset tokens of shapes that cannot be prepared
        # name of a prompt -> its values "text" and "hash"
        self._prompts: Mapping[str, Mapping] = campaign.settings.extra.get("conditions", {})
        # Warning of the planning about samples without a surface.
        self._planning_warning: str | None = campaign.settings.extra.get("surface_warning")
        # how to start again with another level
        self._other_plan = "study with --outdir=FOLDER" if self.blind else "campaign with --campaign=NAME"
        self._checked_at = -POLL  # time of the last check of the cache, in seconds of time.monotonic
        self._lock = threading.Lock()
        # With tens of thousands of shapes the first check takes a second. It is made now, so that the first
        # request does not wait for it.
        self._check()
        # Shapes that are missing now may be prepared before the first request, which shall make a new check.
        self._checked_at = -POLL

    def is_available(self, asset_token: str) -> bool:
        """Return True if a shape belongs to this campaign, and is prepared or can still be prepared."""
        self._check()
        return asset_token in self.shapes and asset_token not in self._failed

    def is_ready(self, asset_token: str) -> bool:
        """Return True if a shape can be served now."""
        self._check()
        return asset_token in self._files and (not self.blind or not self._missing)

    def has_failed(self, asset_token: str) -> bool:
        """Return True if a shape can never be served."""
        self._check()
        # After the worker has given up, missing shapes will not be prepared.
        worker_gave_up = self.worker is not None and self.worker.gave_up
        return asset_token in self._failed or (asset_token in self._missing and worker_gave_up)

    def is_settled(self) -> bool:
        """Return True if every shape is prepared or has failed, and no further shapes will be appended."""
        self._check()
        worker_gave_up = self.worker is None or self.worker.gave_up
        return not self._missing and (not self._grows or worker_gave_up)

    def path(self, asset_token: str) -> Path:
        """Return the path of the file of a prepared shape."""
        return self._files[asset_token]

    def prompt(self, asset_token: str, address: str) -> dict | None:
        """Return the prompt of a shape as the page shows it, or None if it has neither text nor image.

        Args:
            asset_token: asset token of the shape.
            address: address of the shape in the assignment, see `Addresses`.

        Returns:
            {"text": text or None, "image": path on the server or None}
        """
        stored_prompt = self._prompt(asset_token)
        page_prompt = {
            "text": stored_prompt.get("text"),
            "image": f"/api/prompts/{address}" if self.prompt_image(asset_token) else None,
        }
        return page_prompt if any(page_prompt.values()) else None

    def prompt_image(self, asset_token: str) -> Path | None:
        """Return the file of the prepared image of a shape's prompt, or None if there is none."""
        image_hash = self._prompt(asset_token).get("hash")
        return self.cache.prompt(image_hash) if image_hash else None

    def _prompt(self, asset_token: str) -> Mapping:
        """Return the prompt of a shape as the campaign stores it; {} if there is none."""
        shape = self.shapes.get(asset_token)
        return self._prompts.get(shape.condition, {}) if shape is not None else {}

    def progress(self) -> dict:
        """Return the progress of the preparation.

        Returns:
            {"done": number of shapes that are prepared, "failed": number of shapes that can never be served,
            "total": number of all shapes, "seconds_left": estimated time, or None if it is not known}
        """
        self._check()
        # After the worker has given up, missing shapes will not be prepared.
        worker_gave_up = self.worker is not None and self.worker.gave_up
        missing_count = 0 if worker_gave_up else len(self._missing)
        failed_count = len(self._failed) + len(self._missing) - missing_count
        seconds_per_shape = None
        if self.worker is not None and missing_count:
            seconds_per_shape = self.worker.progress()["seconds_per_shape"]
        if missing_count == 0:
            seconds_left: float | None = 0.0
        else:
            # `and` keeps None, which means an unknown time
            seconds_left = seconds_per_shape and seconds_per_shape * missing_count
        return {
            "done": len(self.shapes) - missing_count - failed_count,
            "failed": failed_count,
            "total": len(self.shapes),
            "seconds_left": seconds_left,
        }

    def trouble(self) -> str | None:
        """Return the reason why the preparation has stopped or why shapes are not shown, or None.

        The text may contain names of files, so it is shown to admins only.
        """
        if self.worker is not None and self._missing:
            worker_error = self.worker.progress()["error"]
            if worker_error:
                return worker_error
        if not self._failed:
            return self._planning_warning
        # The cache states the reason of every failure. The pairs of these shapes are not shown.
        failed_shape = self.shapes[next(iter(self._failed))]
        # The surface of an asset file is fixed, whereas the level of a generator's surface can be chosen.
        remedy = (
            ""
            if failed_shape.file
            else (
                f" A few such shapes do no harm. If they are many, plan another {self._other_plan} and the"
                " --set level that eg3d-rlhf generator inspect proposes."
            )
        )
        reason = str(self.cache.failure(failed_shape)).rstrip(".")
        if failed_shape.degradation:
            reason = f"the damaged copy of a shape for a practice or gold pair could not be made: {reason}"
        return (
            f"{len(self._failed)} of {len(self.shapes)} shapes have failed and are not shown. The reason of"
            f" one of them: {reason}.{remedy}"
        )

    def _check(self) -> None:
        """Look for shapes that were prepared, or have failed, since the last check.

        Within POLL seconds after a check, nothing is done.
        """
        with self._lock:
            if not (self._missing or self._grows) or time.monotonic() - self._checked_at < POLL:
                return
            # starts the worker again if its process has died
            if self.worker is not None:
                self.worker.ensure()
            if self._grows:
                self._add_new()
            missing_count = 0
            known_failures = len(self._failed)
            # a copy of the items, because the loop deletes entries
            for asset_token, shape in list(self._missing.items()):
                shape_path = self.cache.mesh(shape)
                # A shape is shown with its prompt. It is ready when the image of the prompt is prepared or
                # has failed.
                if shape_path is not None and self._prompt_settled(shape):
                    self._files[asset_token] = shape_path
                    del self._missing[asset_token]
                elif shape_path is None and self.cache.failure(shape) is not None:
                    self._failed.add(asset_token)
                    del self._missing[asset_token]
                else:
                    missing_count += 1
                    if missing_count > AHEAD:
                        break
            self._checked_at = time.monotonic()
        # The first failure is printed at once, and their number once more at the end.
        is_new_failure = len(self._failed) > known_failures
        if (is_new_failure and known_failures == 0) or (self._failed and not self._missing):
            print(f"Warning: {self.trouble()}", file=sys.stderr, flush=True)

    def _add_new(self) -> None:
        """Add the shapes that were appended to the campaign since the last check."""
        plan = self._store.plan(self._campaign_id)
        new_shapes = {token: shape for token, shape in plan.shapes.items() if token not in self.shapes}
        self._on_new(list(new_shapes))
        # replaced and not changed, because other threads may read the dictionary
        self.shapes = {**self.shapes, **new_shapes}
        self._missing |= new_shapes
        self._grows = plan.missing_count > 0

    def _prompt_settled(self, shape: Shape) -> bool:
        """Return True if the prompt of a shape has no image, or its image is prepared or has failed."""
        image_hash = self._prompts.get(shape.condition, {}).get("hash") if shape.condition else None
        return not image_hash or self.cache.prompt_settled(image_hash)
