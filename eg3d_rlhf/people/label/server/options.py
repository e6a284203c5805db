"""What a labelling server is made of, and its limits."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.shape_files import ShapeCache

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

STATIC = Path(__file__).resolve().parents[1] / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may use. A rate of r with a burst of b: b at once, then r a second."""

    body: int = 64 * 1024  # bytes of a request's body
    body_seconds: float = 15.0  # until a body must have arrived
    url: int = 2048  # bytes of path and query
    headers: int = 32 * 1024  # bytes of the names and values of a request's headers
    requests: tuple[float, float] = (40.0, 200.0)  # rate and burst of one annotator
    # of one address, for requests without a valid token or session
    strangers: tuple[float, float] = (20.0, 300.0)
    guesses: tuple[float, float] = (1 / 30, 10.0)  # of one address: wrong tokens
    session_seconds: float = 14 * 24 * 3600.0  # a login lasts so long
    connections: int = 4096  # at once; fewer where the system allows fewer open files
    header_seconds: float = 10.0  # for a request's header, and between two requests of a connection
    answer_seconds: float = 30.0  # without the client's acknowledgement of a byte of the answer


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """One server: one campaign of one store."""

    store: "Store"
    campaign: str  # name
    cache: ShapeCache
    # None: all shapes are in the cache already, or are put there by somebody else
    preparation: Preparation | None = None
    exposed: bool = False  # can be reached from other machines: tokens are compulsory
    title: str = ""  # heading of the page; annotators read it; empty: the question, in the language of each
    static: Path = STATIC  # the page's files
    access_log: Path | None = None  # see gate.py; None: not kept
    # signs the CSRF tokens of the local annotator; None: kept in the cache folder
    secret: bytes | None = None
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK
