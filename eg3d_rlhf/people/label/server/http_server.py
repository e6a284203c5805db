"""HTTP server: granian in this process, on one listening socket.

Each stage of a connection has a time limit, so that slow and silent clients do not occupy connections. The
stages are the TLS handshake (10 s, fixed by granian), the headers of a request and the pause before them
(`Limits.header_seconds`), the body (`Limits.body_seconds`, see request_checks.py), and the reception of the
answer by the client (`Limits.answer_seconds`, on Linux only).
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

BACKLOG = 4096  # largest number of connections that wait in the queue of the system until they are accepted
FILES = 65_536  # number of open files that the process requests as its limit
OTHER_FILES = 256  # number of open files that are reserved for the database, shapes and logs
STOP_SECONDS = 3.0  # time in seconds for answering requests that arrived before the server is stopped


def listen(host: str, port: int, limits: Limits | None = None) -> socket.socket:
    """Return a listening socket.

    Args:
        host: address to listen on.
        port: port to listen on; 0: any free port.
        limits: limits, of which `answer_seconds` is used; None: the default limits.

    Raises:
        OSError: the address or the port cannot be used. The message names the flags --host and --port.
    """
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening_socket = socket.socket(address_family, socket.SOCK_STREAM)
    # SO_REUSEADDR: a restarted server can use the port while connections of the old server are in TIME_WAIT.
    listening_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit these two options. TCP_NODELAY switches off Nagle's algorithm, with which
    # an answer over TLS takes 40 ms longer.
    listening_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: ends clients that do not read their answer
        milliseconds = round(1000 * (limits or Limits()).answer_seconds)
        listening_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listening_socket.bind((host.strip("[]"), port))
        listening_socket.listen(BACKLOG)
    except OSError as error:
        listening_socket.close()
        raise OSError(
            f"--host={host} --port={port}: the server cannot listen on this address:"
            f" {error.strerror or error}. Use another port, or --port=0 for any free port."
        ) from error
    return listening_socket


def available_connections(limits: Limits) -> int:
    """Return the largest number of connections that the limit of open files allows.

    The soft limit of open files of this process is raised first, as far as the system allows, because granian
    does not recover when a TLS connection gets no file descriptor.
    """
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    file_limit = FILES if hard_limit == resource.RLIM_INFINITY else min(FILES, hard_limit)
    if soft_limit != resource.RLIM_INFINITY and soft_limit < file_limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (file_limit, hard_limit))
            soft_limit = file_limit
    soft_limit = FILES if soft_limit == resource.RLIM_INFINITY else soft_limit
    # at least half of a very low limit is left for connections
    return min(limits.connections, soft_limit - min(OTHER_FILES, soft_limit // 2))


def trusted_proxies(proxy: str) -> list[str] | str:
    """Parse the value of --proxy.

    Returns:
        The networks as texts, or "*" for all addresses.

    Raises:
        ValueError: a part of the text is neither an address nor a network.
    """
    if proxy == "*":
        return proxy
    try:
        return [str(ipaddress.ip_network(part.strip(), strict=False)) for part in proxy.split(",")]
    except ValueError:
        raise ValueError(
            f"--proxy: {proxy!r} is not a list of addresses or networks. Write the address of the proxy,"
            " such as 192.0.2.1."
        ) from None


def foreign_threads() -> set[int]:
    """Return the ids of threads that run Python code but were not started by Python (those of granian)."""
    return set(sys._current_frames()) - {thread.ident for thread in threading.enumerate()}


class Server(embed.Server):
    """Server that runs granian in this process, on an existing listening socket.

    Args:
        app: ASGI application.
        listening: listening socket, which the server closes at its end.
        limits: limits of requests and connections.
        certificate: PEM file of the certificate; None: the server uses http.
        key: PEM file of the private key of the certificate.
        proxy: addresses of reverse proxies whose X-Forwarded headers are trusted; None: no proxy.

    Raises:
        ValueError: the certificate or the key is invalid, or `proxy` is not a list of addresses.
    """

    def __init__(
        self,
        app: ASGIApp,
        listening_socket: socket.socket,
        limits: Limits,
        certificate: Path | None = None,
        key: Path | None = None,
        proxy: str | None = None,
    ):
        try:
            if certificate is not None:
                # If granian cannot read the key, it ends the process. Loading the key here first raises an
                # error instead. Without `password`, OpenSSL would ask for a password in the terminal.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
            super().__init__(
                app if proxy is None else wrap_asgi_with_proxy_headers(app, trusted_proxies(proxy)),
                interface=Interfaces.ASGI,
                http=HTTPModes.http1,  # HTTPModes.auto has no time limit for the first byte of a connection
                websockets=False,
                backlog=BACKLOG,
                backpressure=available_connections(limits),
                http1_settings=HTTP1Settings(
                    header_read_timeout=round(1000 * limits.header_seconds),
                    max_buffer_size=2 * limits.headers,
                ),
                log_level=LogLevels.critical,  # RequestChecks logs errors of requests
                # an incremental configuration does not remove other logging handlers of the process
                log_dictconfig={"incremental": True, "handlers": {}, "loggers": {}},
                ssl_cert=certificate,
                ssl_key=key,
                ssl_protocol_min=SSLProtocols.tls12,
            )
        except ssl.SSLError as error:
            raise ValueError(
                f"--certificate={certificate} --key={key}: these files cannot be used:"
                f" {error.reason or error}. Pass the PEM files of a certificate and of its private key,"
                " which must have no password."
            ) from None
        self.listening = listening_socket
        self.running_loop: asyncio.AbstractEventLoop | None = None
        self.stopping = asyncio.Event()

    def _init_shared_socket(self) -> None:
        # granian's own method binds with SO_REUSEPORT, with which two servers would share a port without an
        # error. granian closes the descriptor at its end, so it is detached from the Python socket.
        self._shd = SocketHolder(self.listening.detach(), False, self.backlog)  # type: ignore

    def run(self) -> None:
        """Serve until `stop` is called or SIGINT or SIGTERM arrives.

        After a signal, the requests that have arrived are answered, and then the signal is raised again.
        """
        received_signal = asyncio.run(self._run())
        # A thread of granian returns from its last call into Python after `serve` has ended. If the
        # interpreter ends before that, the process aborts, which happened in one of four runs. So this waits
        # for at most one second.
        wait_end_time = time.monotonic() + 1
        while foreign_threads() and time.monotonic() < wait_end_time:
            time.sleep(0.01)
        if received_signal is not None:
            signal.raise_signal(received_signal)

    def stop(self) -> None:
        """Make `run` return. Any thread may call this method. It has no effect after `run` has returned."""
        assert self.running_loop is not None
        # RuntimeError: the event loop is closed, because `run` has returned
        with contextlib.suppress(RuntimeError):
            self.running_loop.call_soon_threadsafe(self.stopping.set)

    async def _run(self) -> signal.Signals | None:
        """Run granian until it ends, `stop` is called or a signal arrives.

        Returns:
            The signal that arrived first, or None.
        """
        self.running_loop = asyncio.get_running_loop()
        received_signals: list[signal.Signals] = []

        def interrupt(received_signal: signal.Signals) -> None:
            received_signals.append(received_signal)
            self.stopping.set()

        # Python allows signal handlers in the main thread only. Tests run the server in other threads.
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                self.running_loop.add_signal_handler(signal_number, interrupt, signal_number)
        serving_task = asyncio.create_task(self.serve())
        stop_task = asyncio.create_task(self.stopping.wait())
        await asyncio.wait([serving_task, stop_task], return_when=asyncio.FIRST_COMPLETED)
        self.signal_handler_interrupt()
        # Requests that have arrived are answered. The time limit is for clients that keep a connection open
        # without a request.
        await asyncio.wait([serving_task], timeout=STOP_SECONDS)
        # If neither a signal nor `stop` ended the server, its end is an error. result() raises the error of
        # granian if there is one.
        if not self.stopping.is_set():
            serving_task.result()
            raise RuntimeError(
                "granian stopped serving without a signal and without an error. Start the server again."
            )
        return received_signals[0] if received_signals else None
