"""Access log: one JSON object a line for each request; no token, session, CSRF value, body or query ever enters it.

Fields:
    time          ISO 8601, UTC, milliseconds
    event         'request'; 'start' with mode, exposed and version when a server starts
    request       8 random hex digits, also sent as the header X-Request-Id
    address       of the client
    method        GET, POST, ...
    route         template of the route, as '/api/shapes/{asset}'; of an unknown address its path, long words replaced by '*'
    status        of the response; 0 where the client left before it began
    milliseconds  from the request's head to the response's last byte
    bytes         of the response's body
    annotator     name, or null where nobody is known
    by            'token', 'session', 'local' or null: how she is known
    refused       short reason of a refusal, else absent

A file is continued as FILE.1 ... FILE.5 at 20 MB each.
"""

import datetime
import json
import logging
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

_LONG_WORD = re.compile(r"[^/]{16,}")


@dataclass
class Entry:
    """One request as it proceeds."""

    address: str
    method: str
    route: str
    request: str = field(default_factory=lambda: secrets.token_hex(4))
    status: int = 0
    bytes: int = 0
    annotator: str | None = None
    by: str | None = None
    refused: str | None = None
    began: float = field(default_factory=time.perf_counter)

    def fields(self) -> dict:
        """The entry's part of the line."""
        found = asdict(self) | {"milliseconds": round(1000 * (time.perf_counter() - self.began), 1)}
        return {k: v for k, v in found.items() if k != "began" and (k != "refused" or v is not None)}


class AccessLog:
    """Writes the lines; without a path, drops them."""

    def __init__(self, path: Path | None):
        self._logger = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._logger = logging.Logger(f"access:{path}")  # not registered: nobody else's settings reach it
            self._logger.addHandler(RotatingFileHandler(path, maxBytes=20_000_000, backupCount=5, encoding="utf-8", delay=True))

    def write(self, event: str, fields: dict) -> None:
        """One line."""
        if self._logger is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._logger.info("%s", json.dumps({"time": now, "event": event, **fields}))

    def close(self) -> None:
        """Close the file."""
        for handler in self._logger.handlers if self._logger else ():
            handler.close()


def masked(path: str) -> str:
    """An unknown path without what might be a token."""
    return _LONG_WORD.sub("*", path)[:200]
