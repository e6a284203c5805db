"""What a labelling server is made of, its limits, and its campaign's shapes: which are prepared, and their bytes."""

import ipaddress
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eg3d_rlhf.people.label.entities import Mode, Shape, StoredCampaign
from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.server.bodies import GRAIN, Body, body_of
from eg3d_rlhf.people.label.shape_files import ShapeCache
from eg3d_rlhf.people.label.store import Store

STATIC = Path(__file__).resolve().parents[1] / "static"
POLL = 0.5  # seconds between two looks at the cache
AHEAD = 64  # shapes are prepared in order of the plan: a look goes no further than so many missing ones
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may use. A rate of r with a burst of b: b at once, then r a second."""

    body: int = 64 * 1024  # bytes of a request's body
    body_seconds: float = 15.0  # until a body must have arrived
    url: int = 2048  # bytes of path and query
    headers: int = 32 * 1024  # bytes of the names and values of a request's headers
    requests: tuple[float, float] = (40.0, 200.0)  # rate and burst of one annotator
    strangers: tuple[float, float] = (20.0, 300.0)  # of one address, for requests without a valid token or session
    guesses: tuple[float, float] = (1 / 30, 10.0)  # of one address: wrong tokens
    session_seconds: float = 14 * 24 * 3600.0  # a login lasts so long
    connections: int = 1000  # on which somebody was logged in; fewer where the system allows less
    annotator_connections: int = 100  # of them, one annotator's
    strangers_connections: int = 256  # others; as many again wait for their turn; half of them from one address
    accepts: tuple[float, float] = (1000.0, 500.0)  # connections taken from the system
    starts: tuple[float, float] = (100.0, 200.0)  # of them, those that are begun with; handshakes take processor time
    regular_starts: tuple[float, float] = (20.0, 100.0)  # of one address where somebody was logged in of late, beyond those
    handshake_seconds: float = 10.0  # for the handshake, and for waiting until it begins
    header_seconds: float = 10.0  # for a request's header, from its first byte; of a connection's first one, from the handshake
    idle_seconds: float = 15.0  # between two requests of a stranger's connection
    answer_seconds: float = 30.0  # until a stranger has read the answer
    keep_seconds: float = 120.0  # between two requests of a connection on which somebody was logged in

    def __post_init__(self):
        for name in ("requests", "strangers", "guesses", "accepts", "starts", "regular_starts"):
            rate, burst = getattr(self, name)
            if rate <= 0 or burst < 1:
                raise ValueError(f"Limits.{name}: expected a rate > 0 and a burst >= 1, got {rate} and {burst}")


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """One server: one campaign of one store."""

    store: Store
    campaign: str  # name
    cache: ShapeCache
    preparation: Preparation | None = None  # None: all shapes are in the cache already, or are put there by somebody else
    exposed: bool = False  # can be reached from other machines: tokens are compulsory
    title: str = ""  # heading of the page; annotators read it; empty: the question, in the language of each
    static: Path = STATIC  # the page's files
    access_log: Path | None = None  # see gate.py; None: not kept
    secret: bytes | None = None  # signs the CSRF tokens of the local annotator; None: kept in the cache folder
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK


class PreparedShapes:
    """Looks shapes up by the store's asset token. Thread-safe; its methods block.

    In a blind study nothing is served before every shape is prepared, so that waiting tells nothing, and all bodies have one length, so
    that neither size nor transfer time tells which generator a shape is from. Assets differ more in size: there, those that meet have one.
    """

    def __init__(self, options: AppOptions, campaign: StoredCampaign):
        self.cache, self.worker, self.blind = options.cache, options.preparation, campaign.settings.mode is Mode.STUDY
        self.shapes = dict(options.store.shapes(campaign.id))  # by asset token
        self._missing = dict(self.shapes)  # in order of the plan
        self._files: dict[str, Path] = {}
        self._failed: set[str] = set()  # cannot be drawn
        self._lengths: dict[str, int] = {}  # of the bodies of a study, by asset token
        self._pairs = options.store.pairs(campaign.id) if self.blind else []
        self._conditions: Mapping[str, Mapping] = campaign.settings.extra.get("conditions", {})
        self._looked = -POLL
        self._lock = threading.Lock()
        self._look()  # at tens of thousands of shapes it takes a second, for which the first to ask would all wait
        self._looked = -POLL  # what is still missing may be there when the first one asks

    def known(self, asset: str) -> bool:
        """Whether the campaign has such a shape, and it can be drawn."""
        self._look()
        return asset in self.shapes and asset not in self._failed

    def ready(self, asset: str) -> bool:
        """Whether a shape may be shown now."""
        self._look()
        return asset in self._files and (not self.blind or not self._missing)

    def lost(self, asset: str) -> bool:
        """Whether a shape will never be shown: it cannot be drawn, or who draws has given up."""
        self._look()
        return asset in self._failed or (asset in self._missing and self.worker is not None and self.worker.gave_up)

    def settled(self) -> bool:
        """Whether every shape is prepared or given up."""
        self._look()
        return not self._missing

    def body(self, asset: str) -> Body:
        """A prepared shape's file: gzip, or an MP4."""
        if not self.blind:
            return body_of(self._files[asset])
        with self._lock:
            self._lengths = self._lengths or self._common_lengths()
        return body_of(self._files[asset], self._lengths[asset])

    def film(self, asset: str) -> bool:
        """Whether a prepared shape is a video."""
        return self._files[asset].suffix == ".mp4"

    def prompt(self, asset: str, address: str) -> dict | None:
        """What an asset was asked for: its text, and where its picture is, by the asset's address."""
        condition = self._condition(asset)
        shown = {"text": condition.get("text"), "image": f"/api/prompts/{address}" if self.prompt_picture(asset) else None}
        return shown if any(shown.values()) else None

    def prompt_picture(self, asset: str) -> Path | None:
        """The picture of an asset's prompt (WebP), where there is one."""
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
        """Shapes done and in total, and the seconds left, None where unknown."""
        self._look()
        done, total = len(self.shapes) - len(self._missing), len(self.shapes)
        pace = self.worker.progress()["seconds_per_shape"] if self.worker is not None and self._missing else None
        return {"done": done, "total": total, "seconds_left": 0.0 if done == total else pace and pace * (total - done)}

    def trouble(self) -> str | None:
        """Why the preparation is stuck, or why shapes are not shown, for administrators: it may name files."""
        if self.worker is None or not (self._missing or self._failed):
            return None
        progress = self.worker.progress()
        left_out = f"{progress['failed']} not shown; {progress['reason']}" if progress["failed"] and progress["reason"] else None
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
