"""Sizes of requests: headers within their limit; bodies read whole before anything parses them, and never more than the limit."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from eg3d_rlhf.label.server.errors import Refusal
from eg3d_rlhf.label.server.options import Limits

_CLOSE = {"Connection": "close"}  # the rest of the body is not waited for


class Disconnected(Exception):
    """The client left before its request was complete."""


def check_headers(headers: Headers, limits: Limits) -> None:
    """Refuse headers that are too large; the HTTP parser does so only where they arrive in several reads.

    Raises: Refusal 431.
    """
    if sum(len(name) + len(value) for name, value in headers.raw) > limits.headers:
        raise Refusal(431, f"Expected headers of at most {limits.headers} bytes.", "Send less.", _CLOSE)


def check_length(headers: Headers, limits: Limits) -> None:
    """Refuse a declared length that is wrong or too large, before a byte of the body is read.

    Raises: Refusal 400, 413.
    """
    lengths = headers.getlist("content-length")
    if not lengths:
        return
    if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
        raise Refusal(400, "Expected one Content-Length of digits.", "Correct the header.", _CLOSE)
    if int(lengths[0][:20]) > limits.body:
        raise _too_large(limits)


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body, chunked or not.

    Raises: Refusal 408, 413; Disconnected.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body:
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refusal(408, "The request took too long to arrive.", "Send it again.", _CLOSE) from None


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once, then what the client does."""
    handed = False

    async def received() -> Message:
        nonlocal handed
        if not handed:
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return received


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"Expected a body of at most {limits.body} bytes.", "Send less.", _CLOSE)
