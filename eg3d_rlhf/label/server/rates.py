"""Rate limits: token buckets by key, and what a wrong token costs."""

import hashlib
import ipaddress
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeVar

KEYS = 10_000  # buckets kept; the least recently used is forgotten
PATIENCE = 2.0  # seconds for which an attempt waits for others of its address
T = TypeVar("T")


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
    """Limits wrong tokens, per address and over all. A token that was right once since the start is never held up.

    An attempt pays before it is looked up and is paid back if it was right. Where an address can pay no more while attempts of its own are
    under way, the next one waits for them: many people behind one address may log in at once.
    """

    def __init__(self, one: tuple[float, float], everyone: tuple[float, float], clock: Callable[[], float] = time.monotonic):
        self._one, self._everyone = Buckets(*one, clock=clock), Buckets(*everyone, clock=clock)
        self._right: OrderedDict[str, None] = OrderedDict()
        self._under_way: Counter[str] = Counter()  # attempts by address
        self._turn = threading.Condition()

    def attempt(self, address: str, token: str, look_up: Callable[[], T | None]) -> tuple[T | None, float]:
        """What `look_up` finds for the token, None where it is wrong; and the seconds to wait where it may not be looked up now, else 0."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        with self._turn:
            known = digest in self._right
            if not known:
                wait = self._pay(address)
                if wait:
                    return None, wait
                self._under_way[address] += 1
        if known:
            return look_up(), 0.0
        found = None
        try:
            found = look_up()
        finally:
            self._settle(address, digest, found is not None)
        return found, 0.0

    def _pay(self, address: str) -> float:
        """Pay for a wrong token; returns 0, or the seconds until it can be paid. Holds the lock, except while waiting."""
        end = time.monotonic() + PATIENCE
        while wait := self._one.take(address):
            left = end - time.monotonic()
            if not self._under_way[address] or left <= 0:
                return wait
            self._turn.wait(left)
        wait = self._everyone.take("")
        if wait:
            self._one.take(address, -1)
        return wait

    def _settle(self, address: str, digest: str, right: bool) -> None:
        with self._turn:
            self._under_way[address] -= 1
            if not self._under_way[address]:
                del self._under_way[address]
            if right:
                self._one.take(address, -1)
                self._everyone.take("", -1)
                self._right[digest] = None
                if len(self._right) > KEYS:
                    self._right.popitem(last=False)
            self._turn.notify_all()


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
