"""Under which addresses annotators see shapes: others for each assignment, so that a shape that comes again is not known by its address.

    address = base64url(r, asset's number xor K("number", r), K("check", r, number)),  r = K("pair", assignment, asset)

K is HMAC-SHA256 under the server's secret, of which r takes 12 bytes, the number 4, the check 8. So an address tells nothing, cannot be
made up, needs no table, and is the same after a restart: what a browser has kept stays good.
"""

import base64
import hashlib
import hmac
from collections.abc import Iterable

LETTERS = 32  # of an address


class Addresses:
    """Args: secret: of the server; assets: the store's tokens of all shapes, in their order."""

    def __init__(self, secret: bytes, assets: Iterable[str]):
        self._secret, self._assets = secret, list(assets)
        self._numbers = {asset: number for number, asset in enumerate(self._assets)}

    def of(self, assignment: str, asset: str) -> str:
        """The address of a shape in an assignment; of both sides the same where they are one shape."""
        number = self._numbers[asset].to_bytes(4)
        salt = self._keyed("pair", f"{assignment} {asset}".encode(), 12)
        hidden = _xor(number, self._keyed("number", salt, 4))
        return base64.urlsafe_b64encode(salt + hidden + self._keyed("check", salt + number, 8)).decode()

    def asset(self, address: str) -> str | None:
        """The store's token of the shape at an address; None for what is none. The token itself, which no annotator is told, is one too."""
        if address in self._numbers:
            return address
        if len(address) != LETTERS:
            return None
        raw = base64.urlsafe_b64decode(address)
        salt, hidden, check = raw[:12], raw[12:16], raw[16:]
        number = _xor(hidden, self._keyed("number", salt, 4))
        if not hmac.compare_digest(check, self._keyed("check", salt + number, 8)):
            return None
        return self._assets[int.from_bytes(number)]

    def _keyed(self, purpose: str, data: bytes, length: int) -> bytes:
        return hmac.new(self._secret, f"shape {purpose} ".encode() + data, hashlib.sha256).digest()[:length]


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
