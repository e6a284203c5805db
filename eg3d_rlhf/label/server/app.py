"""The application: its routes behind the gate, and the process that serves it."""

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from eg3d_rlhf.label.server.access_log import AccessLog
from eg3d_rlhf.label.server.errors import add_handlers
from eg3d_rlhf.label.server.gate import Gate
from eg3d_rlhf.label.server.identity import Identities
from eg3d_rlhf.label.server.options import AppOptions, Limits, is_loopback
from eg3d_rlhf.label.server.pages import pages, read_static, version_of
from eg3d_rlhf.label.server.prepared_shapes import PreparedShapes
from eg3d_rlhf.label.server.routes import Context, admin_api, label_api


def create_app(options: AppOptions) -> FastAPI:
    """The application for one campaign.

    Raises: ValueError where the campaign or the page's files are missing.
    """
    campaign = options.store.campaign(options.campaign)
    if campaign is None:
        raise ValueError(f"create_app: expected a campaign of the store, got {options.campaign!r}. Make it with tools/label.py.")
    files = read_static(options.static)
    identities, log = Identities(options, campaign.settings.mode), AccessLog(options.access_log)
    context = Context(
        options=options, campaign=campaign, identities=identities, shapes=PreparedShapes(options, campaign), files=files,
        page_version=version_of(files),
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        log.write("start", {"mode": campaign.settings.mode.value, "exposed": options.exposed, "page_version": context.page_version})
        yield
        log.close()

    app = FastAPI(title="Labelling application", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Gate, options=options, identities=identities, log=log)
    add_handlers(app)
    for router in (pages, label_api, admin_api):
        app.include_router(router(context))
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises: OSError naming the flags.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: asyncio sets TCP_NODELAY only where it is
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host.strip("[]"), port))
        server.listen(1024)
    except OSError as error:
        server.close()
        raise OSError(
            f"--host={host} --port={port}: expected a free port on an address of this machine, got: {error.strerror or error}. "
            "Choose another, or --port=0 for a free one."
        ) from error
    return server


def configure(app: FastAPI, certificate: Path | None = None, key: Path | None = None, proxy: str | None = None) -> uvicorn.Config:
    """uvicorn's settings; arguments as `serve`."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ssl_certfile=certificate, ssl_keyfile=key,
        proxy_headers=proxy is not None, forwarded_allow_ips=proxy, timeout_keep_alive=30, timeout_graceful_shutdown=5,
        limit_concurrency=1000, h11_max_incomplete_event_size=2 * Limits.headers,
    )


def serve(
    options: AppOptions, host: str = "127.0.0.1", port: int = 8000, *, certificate: Path | None = None, key: Path | None = None,
    proxy: str | None = None, on_listening: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted; the preparation runs meanwhile.

    Args:
        certificate, key: PEM files; with them the server speaks https.
        proxy: address of a reverse proxy whose X-Forwarded-For and X-Forwarded-Proto are believed.
        on_listening: is told the server's address.
    Raises: ValueError for a host that others can reach with options that are not `exposed`; OSError where the port is taken.
    """
    if not options.exposed and not is_loopback(host):
        raise ValueError(f"serve: expected AppOptions(exposed=True) for host {host}, which other machines can reach.")
    config = configure(create_app(options), certificate, key, proxy)
    server = listen(host, port)
    shown = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    try:
        if options.preparation is not None:
            options.preparation.start()
        on_listening(f"{'https' if certificate else 'http'}://{shown}:{server.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[server])
    finally:
        if options.preparation is not None:
            options.preparation.stop()
        server.close()
