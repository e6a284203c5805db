"""Runs the HTTP server: granian in this process, on one listening socket.

Each stage of a connection has a time limit, so that slow and silent clients do not occupy connections: the
TLS handshake (10 s, fixed by granian), a request's headers and the pause before them
(`Limits.header_seconds`), the body (`Limits.body_seconds`, see request_checks.py), and a client that does not
read its answer (`Limits.answer_seconds`, on Linux only).
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

BACKLOG = 4096  # connections that wait in the system's queue until they are accepted
FILES = 65_536  # requested limit of open files
OTHER_FILES = 256  # open files that are reserved for the database, shapes and logs
STOP_SECONDS = 3.0  # time for answering requests that arrived before the end


def listen(host: str, port: int, limits: Limits | None = None) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises: OSError with the names of the flags."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    # A restarted server can use the port again at once, while connections of the old one are in TIME_WAIT.
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
            f"--host={host} --port={port}: cannot listen there: {error.strerror or error}. Use --port=0 for a"
            " free port."
        ) from error
    return server


def available_connections(limits: Limits) -> int:
    """Return the number of connections that fit beside the other open files.

    The process's soft limit of open files is raised first. Over TLS, granian does not recover when no
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
    """Return the networks of --proxy, or '*'. Raises: ValueError for anything but addresses."""
    if proxy == "*":
        return proxy
    try:
        return [str(ipaddress.ip_network(part.strip(), strict=False)) for part in proxy.split(",")]
    except ValueError:
        raise ValueError(
            f"--proxy: expected addresses or networks, got {proxy!r}. Write the proxy's address as 192.0.2.1."
        ) from None


def foreign_threads() -> set[int]:
    """Return the threads that run Python code but were not started by Python."""
    return set(sys._current_frames()) - {thread.ident for thread in threading.enumerate()}


class Server(embed.Server):
    """granian in this process, serving `app` on an existing listening socket; other arguments as of
    `serve`.
    """

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
                # granian ends the process for a key that it cannot read, so the key is loaded here first.
                # Without `password`, OpenSSL would ask for one in the terminal.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
            super().__init__(
                app if proxy is None else wrap_asgi_with_proxy_headers(app, trusted_proxies(proxy)),
                interface=Interfaces.ASGI,
                http=HTTPModes.http1,  # `auto` has no time limit for the first byte of a connection
                websockets=False,
                backlog=BACKLOG,
                backpressure=available_connections(limits),
                http1_settings=HTTP1Settings(
                    header_read_timeout=round(1000 * limits.header_seconds),
                    max_buffer_size=2 * limits.headers,
                ),
                log_level=LogLevels.critical,  # RequestChecks logs errors of requests
                # sets the level only: other handlers of the process stay
                log_dictconfig={"incremental": True, "handlers": {}, "loggers": {}},
                ssl_cert=certificate,
                ssl_key=key,
                ssl_protocol_min=SSLProtocols.tls12,
            )
        except ssl.SSLError as error:
            raise ValueError(
                f"--certificate={certificate} --key={key}: expected a PEM certificate and its key without a"
                f" password: {error.reason or error}. Use the two files of one certificate."
            ) from None
        self.listening = listening
        self.running_loop: asyncio.AbstractEventLoop | None = None
        self.stopping = asyncio.Event()

    def _init_shared_socket(self) -> None:
        # granian itself binds with SO_REUSEPORT, with which two servers would share a port without an error.
        # It closes the descriptor when it ends.
        self._shd = SocketHolder(self.listening.detach(), False, self.backlog)  # type: ignore

    def run(self) -> None:
        """Serve until `stop` or a signal. The signal is raised again after the last answer."""
        number = asyncio.run(self._run())
        # granian's thread returns from its last call into Python after `serve` has ended. If the interpreter
        # ended before that, the process would abort. This happened in one of four runs.
        end = time.monotonic() + 1
        while foreign_threads() and time.monotonic() < end:
            time.sleep(0.01)
        if number is not None:
            signal.raise_signal(number)

    def stop(self) -> None:
        """Make `run` return. It may be called from any thread, and has no effect after `run` has returned."""
        assert self.running_loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.running_loop.call_soon_threadsafe(self.stopping.set)

    async def _run(self) -> signal.Signals | None:
        """Run granian and wait for its end or a signal. Returns the signal."""
        self.running_loop = asyncio.get_running_loop()
        received: list[signal.Signals] = []

        def interrupt(number: signal.Signals) -> None:
            received.append(number)
            self.stopping.set()

        # Python allows signal handlers in the main thread only; tests serve in others.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.running_loop.add_signal_handler(number, interrupt, number)
        serving = asyncio.create_task(self.serve())
        stopped = asyncio.create_task(self.stopping.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        self.signal_handler_interrupt()
        # Requests are answered. The server does not wait for clients that hold a connection without a
        # request.
        await asyncio.wait([serving], timeout=STOP_SECONDS)
        # Without a signal or `stop`, the end is an error: result() raises granian's own one if there is one.
        if not self.stopping.is_set():
            serving.result()
            raise RuntimeError("granian ended by itself")
        return received[0] if received else None
