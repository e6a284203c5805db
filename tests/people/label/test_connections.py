"""Time-outs and places of connections: small numbers, quick; many are in test_slow_connections.py."""

import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from eg3d_rlhf.people.label.server.connections import SPARING, Pool, Server
from eg3d_rlhf.people.label.server.options import Limits
from tests.people.label import serving
from tests.people.label.attack import any_server
from tests.rejections import raising

HALF = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
# is answered before its body has come
REFUSED = b"POST /api/undo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"


def connect(served, data: bytes = b"") -> socket.socket:
    parts = urlsplit(served.url)
    made = socket.create_connection((parts.hostname, parts.port), timeout=5)
    made.sendall(data)
    return made


def is_open(connection: socket.socket, seconds: float = 0.0) -> bool:
    """Whether the server has not closed it after so long."""
    connection.settimeout(seconds or 0.001)
    try:
        while connection.recv(65536):
            pass
        return False
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_every_stage_has_its_time(tmp_path):
    limits = Limits(header_seconds=0.3, body_seconds=0.2, idle_seconds=0.3)
    with serving.running(tmp_path, exposed=True, limits=limits) as served:
        token = served.store.add_annotator("ann")
        head = (
            f"GET /api/session HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        known = connect(served, head)
        again = connect(served, head + HALF)
        slow = {"silent": connect(served), "header": connect(served, HALF), "body": connect(served, REFUSED)}
        slow |= {"idle": connect(served, HALF + b"\r\n\r\n"), "second": again}
        end = time.monotonic() + 4
        for number in range(30):  # byte by byte is not faster
            for name in ("header", "second", "body"):
                if number % 3 == 0 and is_open(slow[name]):
                    with contextlib.suppress(ConnectionError):
                        slow[name].sendall(b"a")
            time.sleep(0.05)
        assert [
            name
            for name, connection in slow.items()
            if is_open(connection, max(0.01, end - time.monotonic()))
        ] == []
        assert is_open(known)
        known.sendall(head)
        known.settimeout(5)
        assert known.recv(65536).startswith(b"HTTP/1.1 200")


def test_half_a_handshake_has_its_time(tmp_path, certificate):
    config = dict(zip(("certificate", "key"), certificate, strict=True))
    limits = Limits(handshake_seconds=0.3)
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        any_server().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    hello = out.read()
    with serving.running(tmp_path, config=config, exposed=True, limits=limits) as served:
        halves = [connect(served), connect(served, hello[: len(hello) // 2])]
        end = time.monotonic() + 4
        assert [is_open(connection, max(0.01, end - time.monotonic())) for connection in halves] == [
            False
        ] * 2
        assert served.client().get("/health").status_code == 200


def test_who_is_logged_in_keeps_her_place_and_newcomers_get_in(tmp_path):
    with serving.running(
        tmp_path, exposed=True, limits=Limits(strangers_connections=8, annotator_connections=4)
    ) as served:
        token = served.store.add_annotator("ann")
        head = (
            f"GET /api/session HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        known = [connect(served, head) for _ in range(3)]
        for connection in known:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        others = [connect(served, HALF) for _ in range(60)]
        assert served.client(token).get("/api/session").status_code == 200
        assert all(is_open(connection) for connection in known)
        assert sum(is_open(connection) for connection in others) <= 8
        more = [connect(served, head) for _ in range(6)]
        assert more[-1].recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        # her own limit: those used last
        assert sum(is_open(connection) for connection in [*known, *more]) == 4


def test_a_named_proxy_may_have_all_connections(tmp_path):
    limits = Limits(strangers_connections=4, annotator_connections=4)
    with serving.running(tmp_path, config={"proxy": "127.0.0.0/8"}, exposed=True, limits=limits) as served:
        held = [connect(served) for _ in range(40)]
        assert served.client().get("/health").status_code == 200
        assert all(is_open(connection) for connection in held)
        with raising("--proxy", "'proxy.example'", "192.0.2.1"):
            Server(serving.configure(served.app), Limits(), "proxy.example")


@pytest.mark.long
def test_no_descriptors_are_no_news(tmp_path, caplog):
    SPARING._seen.clear()
    with serving.running(tmp_path) as served:
        assert served.client().get("/health").status_code == 200
        late = socket.socket()
        taken = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 8, hard)
            )
            with pytest.raises(OSError) as none_left:
                while True:
                    taken.append(os.dup(0))
            assert none_left.value.errno == errno.EMFILE
            late.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
            late.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            used = time.process_time()
            time.sleep(1.2)
            assert time.process_time() - used < 0.5
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for connection in taken:
                os.close(connection)
        late.settimeout(5)
        assert late.recv(4096).startswith(b"HTTP/1.1 200")
        assert 1 <= len(caplog.messages) <= 5
        assert all(os.strerror(errno.EMFILE) in message for message in caplog.messages)


def test_garbage_is_noted_a_few_times(tmp_path, caplog):
    SPARING._seen.clear()
    with serving.running(tmp_path) as served:
        logger = logging.getLogger("uvicorn.error")
        logger.addHandler(caplog.handler)
        try:
            for _ in range(50):
                with connect(served, b"\0\r\n\r\n") as connection:
                    assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        finally:
            logger.removeHandler(caplog.handler)
    assert 1 <= len([m for m in caplog.messages if "Invalid HTTP request" in m]) <= 5


@dataclass(eq=False)
class Member:
    key: str
    closed: list[str] = field(default_factory=list)
    deadline: float = 0.0

    def close(self) -> None:
        self.closed.append(self.key)


def test_those_with_most_connections_are_pushed_out_first():
    pool: Pool[Member] = Pool(6, each=4)
    greedy = [Member("a") for _ in range(7)]
    for member in greedy:
        pool.add(member)
    assert [len(member.closed) for member in greedy] == [1, 1, 1, 0, 0, 0, 0]  # the oldest
    modest = [Member(key) for key in "bcd"]
    for member in modest:
        pool.add(member)
    assert pool.size == 6 and not any(member.closed for member in modest) and greedy[3].closed
    pool.touch(greedy[4])
    pool.add(Member("e"))
    assert greedy[5].closed and not greedy[4].closed
    # by turns
    assert [pool.next().key for _ in range(6)] == ["a", "b", "c", "d", "e", "a"] and pool.size == 0
