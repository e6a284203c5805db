"""Connections: how many there may be, whose, and for how long, so that silent and slow ones leave room for
those who are logged in.

A connection is a stranger's until a request on it has come with a valid token or session; then it is its
annotator's. Both have places of their own. Where there are too many, the oldest connection of the address
(or annotator) that has most is closed: an attack from one address pushes out its own, and one from many can
keep a newcomer waiting but nobody who is logged in.

Accepting and TLS handshakes take processor time, so both have a pace. What is beyond the pace waits as a bare
socket, by turns of addresses; an address at which somebody was logged in within the last hour is let in at
once, at a pace of its own.

Every stage has its time: the handshake, a request's header, its body, and of a stranger also the answer.
"""

import asyncio
import contextlib
import ipaddress
import logging
import math
import resource
import socket
import time
from asyncio import sslproto
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from eg3d_rlhf.people.label.server.identity import KEYS, Buckets, address_key
from eg3d_rlhf.people.label.server.models import LOGGER
from eg3d_rlhf.people.label.server.options import Limits

AT_ONCE = 16  # connections accepted before others have their turn
PAUSE = 0.5  # seconds without accepting where the system has no more descriptors
REGULAR_SECONDS = 3600.0  # an address is known for so long after a request of somebody who was logged in
FILES = 4096  # descriptors that are asked for
OTHER_FILES = 256  # of them, for the database, shapes and logs
# bytes; asyncio's own are 256 KiB for each connection, and outlive it until they are collected
TLS_BUFFER = 32 * 1024
GRACE = 1.0  # seconds after the body's time in which the gate says 408 itself


class Member(Protocol):
    """What a pool holds."""

    key: str
    deadline: float  # loop's time

    def close(self) -> None:
        """Close at once."""


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """At most `limit` members, and `each` of one key but ''; whoever is one too many pushes another out."""

    def __init__(self, limit: int, each: float = math.inf):
        self.limit = limit
        self.each = each
        self.size = 0
        self._groups: OrderedDict[str, dict[M, None]] = OrderedDict()  # the oldest first

    def add(self, member: M) -> None:
        """Take it in; of too many of its key, or else of the key that has most, the oldest is closed."""
        group = self._groups.setdefault(member.key, {})
        group[member] = None
        self.size += 1
        if member.key and len(group) > self.each:
            self.push_out(member.key)
        elif self.size > self.limit:
            self.push_out()

    def push_out(self, key: str | None = None) -> None:
        group = (
            self._groups.get(key) if key is not None else max(self._groups.values(), key=len, default=None)
        )
        if group:
            oldest = next(iter(group))
            self.discard(oldest)
            oldest.close()

    def discard(self, member: M) -> bool:
        group = self._groups.get(member.key, {})
        if member not in group:
            return False
        del group[member]
        self.size -= 1
        if not group:
            del self._groups[member.key]
        return True

    def touch(self, member: M) -> None:
        group = self._groups.get(member.key, {})
        if member in group:
            del group[member]
            group[member] = None

    def next(self) -> M:
        key, group = next(iter(self._groups.items()))
        member = next(iter(group))
        self._groups.move_to_end(key)
        self.discard(member)
        return member

    def __iter__(self) -> Iterator[M]:
        return (member for group in list(self._groups.values()) for member in list(group))


@dataclass(eq=False)
class Waiting:
    """A socket whose handshake has not begun."""

    sock: socket.socket
    key: str
    deadline: float

    def close(self) -> None:
        self.sock.close()


class Connection(H11Protocol):
    """uvicorn's protocol with a time for each stage; the gate tells it who asks."""

    def __init__(self, door: "Door", key: str):
        server = door.server
        state = {**server.lifespan.state, "connection": self}  # each request has a copy
        super().__init__(server.config, server.server_state, state, door.loop)
        self.door = door
        self.key = key
        self.stage = (None, None)
        self.known = False
        self.deadline = door.loop.time() + door.limits.handshake_seconds
        self.shaking: asyncio.Task | None = None

    def known_as(self, who: str) -> None:
        self.door.welcome(self, who)
        if self.stage[0] == "answer":
            self.deadline = math.inf

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.shaking is not None:
            self.shaking.cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(("header", None), self.door.limits.header_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(begun=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.door.touch(self)
        self._look(begun=bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.door.forget(self)
        # they lead back here: nothing is left to the garbage collector
        self.app_state = {}
        self.cycle = None  # type: ignore[assignment]

    def _look(self, begun: bool) -> None:
        """Find the stage; `begun`: where a header is awaited, some of it is there."""
        limits = self.door.limits
        theirs = self.conn.their_state
        if theirs is h11.IDLE and begun:
            self._enter(("header", None), limits.header_seconds)
        elif theirs is h11.IDLE:
            self._enter(("idle", None), math.inf if self.known else limits.idle_seconds)
        elif theirs is h11.SEND_BODY:
            self._enter(("body", self.cycle), limits.body_seconds + GRACE)
        else:
            self._enter(("answer", self.cycle), math.inf if self.known else limits.answer_seconds)

    def _enter(self, stage: tuple, seconds: float) -> None:
        if stage != self.stage:  # more of the same gives no more time
            self.stage = stage
            self.deadline = self.door.loop.time() + seconds


class Door:
    """Accepts connections for a server, and ends those that are too slow or too many."""

    def __init__(self, server: "Server", sockets: list[socket.socket]):
        self.server = server
        self.limits = server.limits
        self.loop = asyncio.get_running_loop()
        self.sockets = sockets
        limits = server.limits
        places = descriptors()
        self.waiting: Pool[Waiting] = Pool(min(limits.strangers_connections, places // 4))
        self.strangers: Pool[Connection] = Pool(self.waiting.limit, max(1, self.waiting.limit // 2))
        self.known: Pool[Connection] = Pool(
            min(limits.connections, places - 2 * self.waiting.limit), limits.annotator_connections
        )
        self.accepts = Buckets(*limits.accepts)
        self.starts = Buckets(*limits.starts)
        self.regular_starts = Buckets(*limits.regular_starts)
        # address -> last seen with somebody who was logged in
        self.regulars: OrderedDict[str, float] = OrderedDict()
        self._turn: asyncio.TimerHandle | None = None
        for sock in sockets:
            sock.setblocking(False)
            self._listen(sock)
        self._sweeping = self.loop.call_later(1.0, self._sweep)

    def close(self) -> None:
        for sock in self.sockets:
            self.loop.remove_reader(sock)
        self.sockets = []
        self._sweeping.cancel()
        if self._turn:
            self._turn.cancel()
        for member in [*self.waiting, *self.strangers]:
            if not isinstance(member, Connection) or member.cycle is None:
                member.close()

    async def wait_closed(self) -> None:
        """Nothing to wait for: uvicorn waits for the connections itself."""

    def welcome(self, connection: Connection, who: str) -> None:
        """A request of `who`, who is logged in: she gets a place of her own."""
        if connection.known:
            return
        self.regulars[connection.key] = self.loop.time()
        self.regulars.move_to_end(connection.key)
        if len(self.regulars) > KEYS:
            self.regulars.popitem(last=False)
        if self.strangers.discard(connection):  # else it was pushed out meanwhile
            connection.known = True
            connection.key = who
            self.known.add(connection)

    def touch(self, connection: Connection) -> None:
        if connection.known:
            self.known.touch(connection)

    def forget(self, connection: Connection) -> None:
        (self.known if connection.known else self.strangers).discard(connection)

    def _listen(self, sock: socket.socket) -> None:
        if sock in self.sockets:
            self.loop.add_reader(sock, self._accept, sock)

    def _rest(self, sock: socket.socket, seconds: float) -> None:
        self.loop.remove_reader(sock)
        self.loop.call_later(seconds, self._listen, sock)

    def _accept(self, sock: socket.socket) -> None:
        for number in range(AT_ONCE):
            try:
                wait = self.accepts.take("")
                if wait:
                    return self._rest(sock, wait)
                client, peer = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                self.accepts.take("", -1)
                return None
            except OSError as error:  # no descriptors or no memory
                LOGGER.warning("cannot accept connections for the moment: %s", error.strerror)
                if number == 0:  # else perhaps nobody waits any more
                    (self.waiting if self.waiting.size else self.strangers).push_out()
                return self._rest(sock, PAUSE)
            client.setblocking(False)
            self._admit(client, peer[0])
        return None

    def _admit(self, sock: socket.socket, address: str) -> None:
        key = address_key(address)
        proxy = self.server.is_proxy(address)
        regular = self.regulars.get(key, -math.inf) > self.loop.time() - REGULAR_SECONDS
        if (
            proxy
            or regular
            and not self.regular_starts.take(key)
            or not self.waiting.size
            and not self.starts.take("")
        ):
            return self._start(sock, key, proxy)
        self.waiting.add(Waiting(sock, key, self.loop.time() + self.limits.handshake_seconds))
        self._turn = self._turn or self.loop.call_later(1 / self.starts.rate, self._next)
        return None

    def _next(self) -> None:
        self._turn = None
        while self.waiting.size and not self.starts.take(""):
            waiting = self.waiting.next()
            self._start(waiting.sock, waiting.key)
        if self.waiting.size:
            self._turn = self.loop.call_later(1 / self.starts.rate, self._next)

    def _start(self, sock: socket.socket, key: str, proxy: bool = False) -> None:
        connection = Connection(self, key)
        connection.shaking = self.loop.create_task(self._shake(connection, sock))
        connection.shaking.add_done_callback(lambda _: self._shaken(connection, sock))
        if proxy:  # who sits behind it, only a request says; it may have all places
            connection.known = True
            connection.key = ""
        (self.known if proxy else self.strangers).add(connection)

    async def _shake(self, connection: Connection, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # a handshake that fails is no news
            await self.loop.connect_accepted_socket(lambda: connection, sock, ssl=self.server.config.ssl)

    def _shaken(self, connection: Connection, sock: socket.socket) -> None:
        connection.shaking = None
        if connection.transport is None:
            self.forget(connection)
            sock.close()

    def _sweep(self) -> None:
        now = self.loop.time()
        for pool in (self.waiting, self.strangers, self.known):
            for member in pool:
                if member.deadline < now:
                    if isinstance(member, Waiting):
                        self.waiting.discard(member)
                    member.close()
        self._sweeping = self.loop.call_later(1.0, self._sweep)


class Server(uvicorn.Server):
    """uvicorn behind a `Door`. Arguments: limits; proxy: addresses or networks, comma-separated, whose
    connections count as many.
    """

    def __init__(self, config: uvicorn.Config, limits: Limits, proxy: str | None = None):
        super().__init__(config)
        self.limits = limits
        self._everybody = proxy == "*"
        named = [part.strip() for part in proxy.split(",")] if proxy and not self._everybody else []
        try:
            self._proxies = [ipaddress.ip_network(name, strict=False) for name in named]
        except ValueError:
            raise ValueError(
                f"--proxy: expected addresses or networks, got {proxy!r}. Give the proxy's address as"
                " 192.0.2.1."
            ) from None
        for logger in ("uvicorn.error", "asyncio", LOGGER.name):
            logging.getLogger(logger).addFilter(SPARING)

    def is_proxy(self, address: str) -> bool:
        return (
            self._everybody
            or bool(self._proxies)
            and any(ipaddress.ip_address(address) in network for network in self._proxies)
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        sslproto.SSLProtocol.max_size = TLS_BUFFER
        await super().startup(sockets=[])
        if not self.should_exit:
            self.servers.append(Door(self, list(sockets or [])))  # type: ignore[arg-type]


def descriptors() -> int:
    """How many connections the system allows; the process's soft limit is raised to FILES where that is
    allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    soft = FILES if soft == resource.RLIM_INFINITY else soft
    return soft - min(OTHER_FILES, soft // 2)


@dataclass(eq=False)
class Sparing(logging.Filter):
    """Lets `burst` records of one wording through in a period; the first of a later one says how many were
    left out.
    """

    burst: int = 5
    period: float = 60.0  # seconds
    _seen: dict[tuple, list] = field(default_factory=dict)  # wording -> [since, count]

    def filter(self, record: logging.LogRecord) -> bool:
        if len(self._seen) > KEYS:
            self._seen.clear()
        seen = self._seen.setdefault(
            (record.name, record.levelno, str(record.msg)[:80]), [time.monotonic(), 0]
        )
        if time.monotonic() - seen[0] > self.period:
            if seen[1] > self.burst:
                record.msg = f"{record.msg} (and {seen[1] - self.burst} more since the last such line)"
            seen[:] = time.monotonic(), 0
        seen[1] += 1
        return seen[1] <= self.burst


SPARING = Sparing()
