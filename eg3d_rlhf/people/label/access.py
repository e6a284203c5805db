"""Links that log an annotator in, and their QR codes. Imports no torch, no server.

A login link contains the annotator's token and is valid as long as the token is. It becomes invalid when the
annotator gets another token (`new-token`) or is revoked. The token stands in the fragment of the URL, after
'#'. Browsers send the fragment to no server, so neither server logs nor the Referer header contain it, and a
program that fetches the link for a preview does not log in.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

IMAGE_SUFFIXES = (".svg", ".png")  # the formats in which a QR code can be written


def check_address(address: str) -> str:
    """Return the server's address as scheme://host[:port]. Raises: ValueError."""
    # A trailing path is dropped without an error, because an address that is copied from a browser ends in
    # one.
    parts = urlsplit(address)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ValueError(
            f"expected the address of the server, got {address!r}. Write it as https://host:8000."
        )
    return f"{parts.scheme}://{parts.netloc}"


def login_link(address: str, token: str) -> str:
    """Return the login link; with an empty `address` (unknown) it is a path on the same server."""
    return f"{address}/login#token={token}"


def qr_data(link: str) -> str:
    """Return the link's QR code as a data URL of an SVG image, dark on light."""
    return qr_code(link).svg_data_uri(scale=4, dark="#000", light="#fff")


def qr_code(link: str, error: str = "m") -> Any:
    """Encode a link; `error` is the level of error correction of the QR standard: l, m, q or h."""
    # segno belongs to the optional dependencies [label]. Help texts must work without them.
    import segno

    return segno.make(link, error=error)


def check_picture(path: Path) -> None:
    """Check the path of a QR code's file. Raises: ValueError for another suffix or an existing file."""
    if path.suffix not in IMAGE_SUFFIXES:
        raise ValueError(
            f"expected a file name that ends in {' or '.join(IMAGE_SUFFIXES)}, got {path.name}. Rename it."
        )
    # An existing file could be readable for others, and writing to it would keep its permissions.
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"expected a new file in an existing folder, got {path}. Name another file.")


def write_qr(path: Path, link: str) -> None:
    """Write the link's QR code to a new file, readable for its owner only, because it contains the token."""
    # O_EXCL fails if the file exists. The mode is given at creation, so that the file is never readable for
    # others, not even between open() and chmod().
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        qr_code(link).save(file, kind=path.suffix[1:], scale=8, light="#fff")
