"""Links that log an annotator in, and their QR codes.

A login link contains the annotator's token and is valid as long as the token is. It becomes invalid when the
annotator gets another token (`new-token`) or the access is revoked. The token is in the fragment of the
URL, after '#'. Browsers do not send the fragment to a server. Neither server logs nor the Referer header
contain it, and a program that fetches the link for a preview does not log in.

This module imports neither torch nor the server, so that commands that only manage annotators are fast.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

IMAGE_SUFFIXES = (".svg", ".png")  # suffixes of the formats in which a QR code can be written


def check_address(address: str) -> str:
    """Return the address of a server as scheme://host[:port], without a path.

    Raises:
        ValueError: `address` is not an http or https address of a server.
    """
    # A path is removed without an error, because an address that is copied from a browser often has one.
    url_parts = urlsplit(address)
    if (
        url_parts.scheme not in ("http", "https")
        or not url_parts.hostname
        or "@" in url_parts.netloc
        or url_parts.query
        or url_parts.fragment
    ):
        raise ValueError(
            f"{address!r} is not the address of a server. Write the address in the form https://host:8000."
        )
    return f"{url_parts.scheme}://{url_parts.netloc}"


def login_link(address: str, token: str) -> str:
    """Return the link that logs in the annotator who has a token.

    Args:
        address: address of the server, see `check_address`; "" if it is not known. The link is then a path on
            the server.
        token: token of the annotator.
    """
    return f"{address}/login#token={token}"


def qr_data(link: str) -> str:
    """Return the QR code of a link as a data: URL of an SVG image, black on white."""
    return qr_code(link).svg_data_uri(scale=4, dark="#000", light="#fff")


def qr_code(link: str, error_correction: str = "m") -> Any:
    """Encode a link as a QR code, and return the segno.QRCode object.

    Args:
        link: text to encode.
        error_correction: level of error correction of the QR standard: "l", "m", "q" or "h", in ascending
            order. A higher level makes the code larger, and readable if more of it is damaged.
    """
    # segno belongs to the optional dependencies [label]. It is imported here, so that --help works without
    # it.
    import segno

    return segno.make(link, error=error_correction)


def check_image_path(path: Path) -> None:
    """Check that a QR code can be written to a path.

    Raises:
        ValueError: the suffix is not one of IMAGE_SUFFIXES, the file exists, or its folder does not exist.
    """
    if path.suffix not in IMAGE_SUFFIXES:
        raise ValueError(
            f"the file name {path.name} does not end in {' or '.join(IMAGE_SUFFIXES)}. Choose a name with one"
            " of these suffixes."
        )
    # An existing file could be readable for other users, and writing to it would keep its permissions.
    if path.exists():
        raise ValueError(f"the file {path} exists. Choose the name of a new file.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist. Create it, or choose another folder.")


def write_qr(path: Path, link: str) -> None:
    """Write the QR code of a login link to a new file.

    The code contains the token, so the file is readable for its owner only.

    Raises:
        FileExistsError: the file exists.
    """
    # O_EXCL makes open() fail if the file exists. The mode 0o600 is set at creation, so that the file is not
    # readable for others even for a moment, as it would be before a later chmod().
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as qr_file:
        # segno names its formats like the suffixes, without the dot
        qr_code(link).save(qr_file, kind=path.suffix[1:], scale=8, light="#fff")
