"""Settings and limits of a label server."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.shape_files import ShapeCache

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

STATIC = Path(__file__).resolve().parents[1] / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # host names that only this machine can reach


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one client. A pair (r, b) allows b requests at once and then r per second."""

    body: int = 64 * 1024  # bytes of a request's body
    body_seconds: float = 15.0  # time within which a body must have arrived
    url: int = 2048  # bytes of path and query
    headers: int = 32 * 1024  # bytes of the names and values of a request's headers
    requests: tuple[float, float] = (40.0, 200.0)  # rate and burst for one annotator
    # rate and burst for one address, of requests without a valid token or session
    anonymous: tuple[float, float] = (20.0, 300.0)
    guesses: tuple[float, float] = (1 / 30, 10.0)  # rate and burst for one address, of wrong tokens
    session_seconds: float = 14 * 24 * 3600.0  # time after which a login expires
    connections: int = 4096  # at the same time; fewer if the system allows fewer open files
    header_seconds: float = 10.0  # for the headers of a request, and between two requests of a connection
    answer_seconds: float = 30.0  # time without acknowledgement of any byte of the answer


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Settings of one server, which serves one campaign of one store."""

    store: "Store"
    campaign: str  # name
    cache: ShapeCache
    # None: all shapes are in the cache already, or another process prepares them
    preparation: Preparation | None = None
    exposed: bool = False  # other machines can reach the server: tokens are required
    # heading of the page, which annotators read; empty: the question, in the language of each annotator
    title: str = ""
    static: Path = STATIC  # folder of the page's files
    access_log: Path | None = None  # see request_checks.py; None: no log
    # key of the CSRF values of the local annotator; None: a file in the cache folder contains it
    secret: bytes | None = None
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach a server that listens on `host`."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK
