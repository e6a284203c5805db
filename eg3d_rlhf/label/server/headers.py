"""Headers of every response: what a browser may do with it."""

import base64
import hashlib

from starlette.datastructures import MutableHeaders

_COMMON = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; {_COMMON}"
)
FIXED = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "accelerometer=(), camera=(), geolocation=(), gyroscope=(), microphone=(), payment=(), usb=()",
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
}


def policy_of_style(style: str) -> str:
    """Content-Security-Policy of a page without script whose one <style> element holds exactly `style`."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; {_COMMON}"


def add_headers(headers: MutableHeaders, https: bool) -> None:
    """Add what a response does not set itself."""
    for name, value in FIXED.items():
        headers.setdefault(name, value)
    if https:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")
