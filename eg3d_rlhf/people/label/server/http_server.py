"""The HTTP server: granian in this process, behind one listening socket.

Each stage of a connection has a time limit, so that slow and silent clients do not keep places: the TLS
handshake (10 s, fixed by granian), a request's header and the pause before it (`Limits.header_seconds`), its
body (`Limits.body_seconds`, see gate.py) and a client that does not read its answer (`Limits.answer_seconds`,
on Linux only).
"""

import asyncio
import contextlib
import ipaddress
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketHolder
from granian.server import embed
from granian.utils.proxies import wrap_asgi_with_proxy_headers
from starlette.types import ASGIApp

from eg3d_rlhf.people.label.server.options import Limits

BACKLOG = 4096  # connections that the system keeps until they are accepted
FILES = 65_536  # open files that are asked for
OTHER_FILES = 256  # of them, for the database, shapes and logs
STOP_SECONDS = 3.0  # for answers to requests that had come before the end


def listen(host: str, port: int, limits: Limits | None = None) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises: OSError naming the flags."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit these two. With Nagle's algorithm an answer over TLS takes 40 ms more.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: ends clients that do not read their answer
        milliseconds = round(1000 * (limits or Limits()).answer_seconds)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        server.bind((host.strip("[]"), port))
        server.listen(BACKLOG)
    except OSError as error:
        server.close()
        raise OSError(
            f"--host={host} --port={port}: expected a free port, got: {error.strerror or error}. Use"
            " --port=0."
        ) from error
    return server


def available_connections(limits: Limits) -> int:
    """Return how many connections fit beside the other open files.

    Raises the process's soft limit of open files first. Over TLS, granian does not recover once no
    descriptor is left, so the limit is as high as the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            soft = files
    soft = FILES if soft == resource.RLIM_INFINITY else soft
    return min(limits.connections, soft - min(OTHER_FILES, soft // 2))


def trusted_proxies(proxy: str) -> list[str] | str:
    """Return the networks of --proxy, or '*'. Raises: ValueError where one is no address."""
    if proxy == "*":
        return proxy
    try:
        return [str(ipaddress.ip_network(part.strip(), strict=False)) for part in proxy.split(",")]
    except ValueError:
        raise ValueError(
            f"--proxy: expected addresses or networks, got {proxy!r}. Give the proxy's address as 192.0.2.1."
        ) from None


def foreign_threads() -> set[int]:
    """Return the threads that are in Python code and that Python has not started."""
    return set(sys._current_frames()) - {thread.ident for thread in threading.enumerate()}


class Server(embed.Server):
    """granian in this process, serving `app` on a socket that listens already; other arguments as `serve`."""

    def __init__(
        self,
        app: ASGIApp,
        listening: socket.socket,
        limits: Limits,
        certificate: Path | None = None,
        key: Path | None = None,
        proxy: str | None = None,
    ):
        try:
            if certificate is not None:
                # granian aborts the process for a key that it cannot read; without `password`, OpenSSL asks
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
            super().__init__(
                app if proxy is None else wrap_asgi_with_proxy_headers(app, trusted_proxies(proxy)),
                interface=Interfaces.ASGI,
                http=HTTPModes.http1,  # `auto` waits without end for the first byte of a connection
                websockets=False,
                backlog=BACKLOG,
                backpressure=available_connections(limits),
                http1_settings=HTTP1Settings(
                    header_read_timeout=round(1000 * limits.header_seconds),
                    max_buffer_size=2 * limits.headers,
                ),
                log_level=LogLevels.critical,  # the gate notes what goes wrong in a request
                # sets the level alone: handlers of others stay
                log_dictconfig={"incremental": True, "handlers": {}, "loggers": {}},
                ssl_cert=certificate,
                ssl_key=key,
                ssl_protocol_min=SSLProtocols.tls12,
            )
        except ssl.SSLError as error:
            raise ValueError(
                f"--certificate={certificate} --key={key}: expected a PEM certificate and its key without a"
                f" password, got: {error.reason or error}. Give both files of one certificate."
            ) from None
        self.listening = listening
        self.running_loop: asyncio.AbstractEventLoop | None = None
        self.stopping = asyncio.Event()

    def _init_shared_socket(self) -> None:
        # granian itself binds with SO_REUSEPORT, with which two servers would share a port unnoticed. It
        # closes the descriptor at its end.
        self._shd = SocketHolder(self.listening.detach(), False, self.backlog)  # type: ignore

    def run(self) -> None:
        """Serve until `stop` or a signal, which is raised again after the last answer."""
        number = asyncio.run(self._run())
        # granian's thread returns from its last call into Python. If the interpreter ended meanwhile, the
        # process would abort: this happened at one of four ends.
        end = time.monotonic() + 1
        while foreign_threads() and time.monotonic() < end:
            time.sleep(0.01)
        if number is not None:
            signal.raise_signal(number)

    def stop(self) -> None:
        """Make `run` return; from any thread, and without effect where it has returned."""
        assert self.running_loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.running_loop.call_soon_threadsafe(self.stopping.set)

    async def _run(self) -> signal.Signals | None:
        self.running_loop = asyncio.get_running_loop()
        received: list[signal.Signals] = []

        def interrupt(number: signal.Signals) -> None:
            received.append(number)
            self.stopping.set()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.running_loop.add_signal_handler(number, interrupt, number)
        serving = asyncio.create_task(self.serve())
        stopped = asyncio.create_task(self.stopping.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        self.signal_handler_interrupt()
        # Requests are answered; clients that hold a connection without a request are not waited for.
        await asyncio.wait([serving], timeout=STOP_SECONDS)
        if not self.stopping.is_set():
            serving.result()
            raise RuntimeError("granian ended by itself")
        return received[0] if received else None
