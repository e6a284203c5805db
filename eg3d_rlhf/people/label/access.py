"""Links that log an annotator in, and their QR codes. Imports no torch, no server.

A link is the token in another form and is valid as long: made void by another token (`new-token`) or by
revoking. The token stands behind '#', which browsers send to no server: neither logs nor a Referer hold it,
and what fetches a link for a preview logs nobody in.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PICTURES = (".svg", ".png")


def check_address(address: str) -> str:
    """The server's address without what a browser may have added. Raises: ValueError."""
    parts = urlsplit(address)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ValueError(f"expected the server's address, got {address!r}. Write it as https://host:8000.")
    return f"{parts.scheme}://{parts.netloc}"


def login_link(address: str, token: str) -> str:
    """The link; `address` is empty where it is not known: then it is a path."""
    return f"{address}/login#token={token}"


def qr_data(link: str) -> str:
    """The link's QR code as a data URL of an SVG picture, dark on light."""
    return qr_code(link).svg_data_uri(scale=4, dark="#000", light="#fff")


def qr_code(link: str, error: str = "m") -> Any:
    import segno  # of the extra, which help does without

    return segno.make(link, error=error)


def check_picture(path: Path) -> None:
    """Raises: ValueError for another suffix or a file that is there."""
    if path.suffix not in PICTURES:
        raise ValueError(f"expected a name with {' or '.join(PICTURES)}, got {path.name}. Rename it.")
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"expected a new file in a folder that is there, got {path}. Name another.")


def write_qr(path: Path, link: str) -> None:
    """The link's QR code as a new file that only its owner reads: who has the picture has the token."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        qr_code(link).save(file, kind=path.suffix[1:], scale=8, light="#fff")
