"""Options and limits of a label server."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.shape_files import ShapeCache

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

STATIC = Path(__file__).resolve().parents[1] / "static"  # folder of the page's files
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # host names that only this machine can reach


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one client.

    A limit (rate, burst) allows `burst` requests at once, and then `rate` requests per second.
    """

    body: int = 64 * 1024  # largest body of a request, in bytes
    body_seconds: float = 15.0  # time within which a body must arrive
    url: int = 2048  # largest path and query together, in bytes
    headers: int = 32 * 1024  # largest names and values of all headers of a request together, in bytes
    requests: tuple[float, float] = (40.0, 200.0)  # (rate, burst) of the requests of one annotator
    # (rate, burst) of the requests from one address without a valid token or session
    anonymous: tuple[float, float] = (20.0, 300.0)
    guesses: tuple[float, float] = (1 / 30, 10.0)  # (rate, burst) of wrong tokens from one address
    session_seconds: float = 14 * 24 * 3600.0  # time after which a login expires
    # largest number of connections at the same time; it is lowered if the system allows fewer open files
    connections: int = 4096
    # time within which the headers of a request must arrive, also after the previous request of the
    # connection
    header_seconds: float = 10.0
    # time after which a connection is closed if the client acknowledges no byte of an answer
    answer_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Options of one server, which serves one labelling campaign of one store."""

    store: "Store"
    campaign: str  # name of the campaign
    cache: ShapeCache  # prepared shapes
    # worker that prepares shapes; None: all shapes are in the cache, or another process prepares them
    preparation: Preparation | None = None
    exposed: bool = False  # True if other machines can reach the server, so that tokens are required
    # heading of the page; "": the question of the campaign, in the language of each annotator
    title: str = ""
    static: Path = STATIC  # folder of the page's files
    access_log: Path | None = None  # file of the access log, see request_checks.py; None: no log
    # secret key of the CSRF values of the local annotator and of the addresses of shapes; None: the key is
    # stored in a file in the folder of the cache
    secret: bytes | None = None
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach a server that listens on `host`."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK
