"""The flags of a labelling server, and what they say together."""

from dataclasses import dataclass
from pathlib import Path

import click

from eg3d_rlhf.cli import option, together
from eg3d_rlhf.label.server.options import AppOptions, is_loopback


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """How the server is reached."""

    host: str
    port: int
    certificate: Path | None
    key: Path | None
    proxy: str | None
    access_log: Path | None
    title: str
    cache: Path

    def __post_init__(self):
        if (self.certificate is None) != (self.key is None):
            raise ValueError("--certificate, --key: expected both or neither. Give the PEM files of the certificate and of its key.")

    @property
    def exposed(self) -> bool:
        """Whether other machines reach the server; then tokens are compulsory."""
        return not is_loopback(self.host) or self.proxy is not None


def server_options(access_log: str, title: str = "Heading of the page."):
    """A decorator: the flags that a labelling server takes; `access_log` says where that file lies by default."""
    file = click.Path(path_type=Path, dir_okay=False)
    pem = click.Path(path_type=Path, exists=True, dir_okay=False)
    flags = (
        option("--host", metavar="ADDRESS", default="127.0.0.1", group="Server",
               help="Address to bind to. Any but loopback makes annotators' tokens compulsory."),
        option("--port", metavar="INT", type=click.IntRange(0, 65535), default=8000, help="0: a free one.", group="Server"),
        option("--certificate", metavar="FILE", type=pem, default=None, group="Server",
               help="PEM file; with --key, the server speaks https."),
        option("--key", metavar="FILE", type=pem, default=None, group="Server", help="PEM file of the certificate's key."),
        option("--proxy", metavar="ADDRESS", default=None, group="Server",
               help="Reverse proxy whose X-Forwarded headers are believed; makes tokens compulsory."),
        option("--access-log", metavar="FILE", type=file, default=None, group="Server", show_default=access_log,
               help="Requests as JSON lines, without tokens."),
        option("--title", metavar="TEXT", default=AppOptions.title, help=title, group="Server"),
    )
    return together(*flags)
