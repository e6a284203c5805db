"""Rate limits: token buckets by key, and what a wrong token costs."""

import hashlib
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

KEYS = 10_000  # buckets kept; the least recently used is forgotten


class Buckets:
    """One bucket of `burst` tokens per key, refilled at `rate` a second. Thread-safe."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (tokens, when)
        self._lock = threading.Lock()

    def take(self, key: str, count: float = 1.0) -> float:
        """Take tokens (put back where `count` < 0). Returns 0, or the seconds until there are enough; then nothing is taken."""
        with self._lock:
            now = self.clock()
            level, since = self._levels.pop(key, (self.burst, now))
            level = min(self.burst, level + (now - since) * self.rate)
            enough = level >= count
            self._levels[key] = (min(self.burst, level - count) if enough else level, now)
            if len(self._levels) > KEYS:
                self._levels.popitem(last=False)
            return 0.0 if enough else (count - level) / self.rate


class Guesses:
    """Limits wrong tokens, per address and over all. A token that was right once since the start is never held up."""

    def __init__(self, one: tuple[float, float], everyone: tuple[float, float], clock: Callable[[], float] = time.monotonic):
        self._one, self._everyone = Buckets(*one, clock=clock), Buckets(*everyone, clock=clock)
        self._right: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, address: str, token: str) -> float:
        """Before a token is looked up: pays for a wrong one. Returns 0, or the seconds to wait."""
        if self._known(token):
            return 0.0
        wait = self._one.take(address)
        if wait:
            return wait
        wait = self._everyone.take("")
        if wait:
            self._one.take(address, -1)
        return wait

    def right(self, address: str, token: str) -> None:
        """The token was right: what it paid is given back."""
        if self._known(token):
            return
        self._one.take(address, -1)
        self._everyone.take("", -1)
        with self._lock:
            self._right[_digest(token)] = None
            if len(self._right) > KEYS:
                self._right.popitem(last=False)

    def _known(self, token: str) -> bool:
        with self._lock:
            return _digest(token) in self._right


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def address_key(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 network of an IPv6 one, which belongs to one subscriber."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return str(mapped)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network(f"{ip}/64", strict=False))
