"""Client of a reward server: a program that scores assets over HTTP, with JSON alone.

Each asset is one request, POST with

    {"id": text, "prompt": text, "images": [PNG as base64, ...], "mesh": GLB as base64, or null}

and the answer is {"scores": [{"name": text, "value": number}, ...]}. Nothing is ever pickled, neither sent
nor received, so a server cannot run code here. The id is a hash of the asset: equal assets have equal ids,
and a server may cache its scores by them.

An attempt fails with a time-out, a broken connection, a status of 429 or 5xx, or an answer of another form.
It is repeated with a growing pause; a Retry-After is kept. A request that has failed TRIES times has no
score.
"""

import asyncio
import base64
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eg3d_rlhf.core.http_headers import retry_after_seconds

TRIES = 5  # attempts of a request
BACKOFF = 0.5  # seconds before the second attempt; the pause doubles with each further attempt
LONGEST_PAUSE = 60.0  # seconds; a longer Retry-After is shortened
MAX_ANSWER = 1 << 20  # bytes of an answer
_REPEATED_STATUSES = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class ScoredAsset:
    """Asset as a reward server is sent it. No name of a file is sent."""

    id: str  # hash of the asset
    prompt: str
    images: Sequence[bytes]  # PNG files
    mesh: bytes | None  # GLB file; None for an asset that is no mesh

    def body(self) -> dict[str, Any]:
        """Return the request in JSON types."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "images": [base64.b64encode(image).decode() for image in self.images],
            "mesh": None if self.mesh is None else base64.b64encode(self.mesh).decode(),
        }


@dataclass(kw_only=True)
class ScoreServer:
    """Client of one reward server.

    Raises: ValueError for an address that is not http or https.
    """

    url: str
    timeout: float = 60.0  # seconds until an attempt counts as failed
    parallel: int = 8  # requests at a time
    backoff: float = BACKOFF
    calls: int = 0  # attempts so far
    retried: int = 0  # attempts that were repetitions
    failed: int = 0  # requests without a score
    last_failure: str = ""  # reason of the last failed request
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"--reward: the address {self.url!r} must start with http:// or https://. Pass, for example,"
                " http://127.0.0.1:9000/score."
            )

    def score(self, assets: Sequence[ScoredAsset]) -> list[dict[str, float] | None]:
        """Return the scores of each asset by name, or None for an asset whose request has failed.

        Raises: ValueError if the server rejects a request (a status of 4xx).
        """
        return asyncio.run(self._score(assets))

    async def _score(self, assets: Sequence[ScoredAsset]) -> list[dict[str, float] | None]:
        """Send the requests with a bounded number at a time."""
        # imported here, because the package is optional
        import httpx

        free = asyncio.Semaphore(self.parallel)

        async def score_asset(asset: ScoredAsset) -> dict[str, float] | None:
            async with free:
                return await self._request(client, asset)

        async with httpx.AsyncClient(timeout=self.timeout, follow_redirects=False) as client:
            return list(await asyncio.gather(*(score_asset(asset) for asset in assets)))

    async def _request(self, client: Any, asset: ScoredAsset) -> dict[str, float] | None:
        """Return the scores of one asset, after repeated attempts; None if all have failed."""
        import httpx

        body = asset.body()
        reason = ""
        for attempt in range(TRIES):
            retry_after: float | None = None
            self.calls += 1
            self.retried += attempt > 0
            try:
                response = await client.post(self.url, json=body)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    scores = parse_scores(response.content)
                    if scores is not None:
                        return scores
                    reason = f"the answer {response.content[:60]!r} is not {{'scores': [...]}}"
                elif response.status_code in _REPEATED_STATUSES:
                    reason = f"status {response.status_code}"
                    retry_after = retry_after_seconds(response.headers.get("Retry-After"))
                else:
                    # The same request would be rejected again.
                    raise ValueError(
                        f"--reward={self.url}: the server rejects the request with status"
                        f" {response.status_code}. Check the address, and the log of the server."
                    )
            if attempt + 1 < TRIES:
                # The jitter keeps requests that failed together from being repeated together.
                pause = self.backoff * 2**attempt * self._random.uniform(0.5, 1.5)
                await asyncio.sleep(min(max(pause, retry_after or 0.0), LONGEST_PAUSE))
        self.failed += 1
        self.last_failure = reason
        return None

    def line(self) -> str:
        """Return one line on the calls so far."""
        text = f"reward server: {self.calls} calls, {self.retried} repeated"
        return text + (
            f", {self.failed} assets without a score (last reason: {self.last_failure})"
            if self.failed
            else ""
        )


def parse_scores(answer: bytes) -> dict[str, float] | None:
    """Return the scores of an answer by name; None for an answer of another form.

    >>> parse_scores(b'{"scores": [{"name": "shape", "value": 0.5}]}')
    {'shape': 0.5}
    >>> parse_scores(b'{"scores": []}')
    """
    if len(answer) > MAX_ANSWER:
        return None
    try:
        record = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    entries = record.get("scores") if isinstance(record, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    scores: dict[str, float] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            return None
        value = entry.get("value")
        # bool is a subclass of int
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        scores[entry["name"]] = float(value)
    return scores
