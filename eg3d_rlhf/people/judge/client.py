"""Asynchronous client of a chat-completions server: retries, back-off, limits and counts.

An attempt fails if the connection breaks or times out, if the status is 429 or 5xx, or if the body is no
chat completion (HTML of a proxy, truncated JSON). A call has at most five attempts. The pause before the next
one doubles and has a random part; a server's Retry-After replaces it, and then holds for all calls. Other
statuses, such as 401 and 404, end the run, because the next call would fail alike.
"""

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from eg3d_rlhf.core.http_headers import retry_after_seconds
from eg3d_rlhf.people.judge.settings import KEY_VARIABLE, JudgeSettings, server_key

ATTEMPTS = 5  # greatest number of attempts of a call
_MAX_BODY = 4 << 20  # bytes of a response that are read; an answer has a few kB
_EXCERPT = 160  # characters of a server's error that are shown


class LimitReachedError(Exception):
    """The limit on calls or tokens does not allow another call."""


class FailedCallError(Exception):
    """All attempts of a call failed; the message is the last reason."""


@dataclass(kw_only=True)
class Counts:
    """Calls, tokens and seconds of a run. Only `calls` reached the server."""

    calls: int = 0  # requests that were sent, repeated attempts included
    cached: int = 0  # answers that were read from the file of answers
    retried: int = 0  # attempts after the first one of a call
    failed: int = 0  # calls of which every attempt failed
    unreadable: int = 0  # questions without a readable answer after they were asked once more
    prompt_tokens: int = 0  # as the server counts them
    completion_tokens: int = 0
    image_bytes: int = 0  # bytes of the PNG files that were sent
    seconds: float = 0.0  # time of all comparisons
    limit_reached: bool = False  # True: a limit ended the run early
    models: dict[str, int] = field(default_factory=dict)  # name that the server reported -> answers

    @property
    def tokens(self) -> int:
        """Return the number of tokens of questions and answers."""
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the counts in JSON types."""
        return {**asdict(self), "tokens": self.tokens, "seconds": round(self.seconds, 3)}

    def line(self) -> str:
        """Return one line for the end of a run."""
        return (
            f"{self.calls} calls, {self.cached} cached, {self.retried} retried, {self.failed} failed,"
            f" {self.unreadable} unreadable, {self.tokens} tokens, {self.seconds:.1f} s"
            + ("; a limit ended the run early" if self.limit_reached else "")
        )


class ChatClient:
    """Connection to a server, for use in `async with`.

    Args:
        settings: address, time-out, limits.
        counts: counts that every call changes.
    """

    def __init__(self, settings: JudgeSettings, counts: Counts):
        self.settings = settings
        self.counts = counts
        # Local servers need no key, and then get no header.
        key = server_key()
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.timeout),  # seconds
            limits=httpx.Limits(
                max_connections=settings.parallel, max_keepalive_connections=settings.parallel
            ),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._has_response_format = True  # False after the server rejected the field
        self._has_answered = False  # True after any response, also one with an error
        self._failed_in_a_row = 0
        self._resume_time = 0.0  # time.monotonic() before which no call is sent, by Retry-After
        self._jitter = random.Random(0)  # of the pauses; tests of times repeat exactly

    async def __aenter__(self) -> "ChatClient":
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request, and return the completion: text, logprobs, model, tokens and finish reason.

        Args:
            body: fields of the request, with its `response_format`.

        Raises:
            LimitReachedError: the limits allow no further call.
            FailedCallError: all attempts failed.
            ValueError: the server rejects the request, so that the settings must be changed.
            ConnectionError: the server cannot be reached, and has never answered.
        """
        # After many failures in a row the server is taken for gone: one attempt shows whether it is back.
        attempts = 1 if self._failed_in_a_row >= max(2, self.settings.parallel) else ATTEMPTS
        # the last failure, for the message
        reason = ""
        attempt = 0
        while attempt < attempts:
            if attempt:
                self.counts.retried += 1
            try:
                completion = await self._attempt(body)
            except _RetryError as error:
                reason = str(error)  # the message names the last failure only
                attempt += 1
                if attempt < attempts:
                    await self._pause(attempt, error.retry_after)
                continue
            self._failed_in_a_row = 0
            return completion
        self._failed_in_a_row += 1
        # A wrong address or a server that is not running: every further call would fail alike.
        if not self._has_answered:
            raise ConnectionError(
                f"--judge: the server {self.settings.url} does not answer ({reason}). Start it, or correct"
                " the address."
            )
        # The pair of this question counts as unreadable, and a later run asks it again.
        self.counts.failed += 1
        raise FailedCallError(reason)

    async def _pause(self, attempt: int, retry_after: float | None) -> None:
        """Wait before the next attempt: Retry-After if the server gave one, else a random part of 2^k."""
        if retry_after is not None:
            self._resume_time = max(self._resume_time, time.monotonic() + retry_after)
            return
        # between half the time and the whole time, so that calls that failed together do not return together
        # 0.5, 1, 2 and 4 seconds by default
        delay = self.settings.backoff * 2 ** (attempt - 1)
        await asyncio.sleep(delay * (0.5 + self._jitter.random() / 2))

    async def _attempt(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request once. Raises `_RetryError` for a failure that may pass."""
        # a loop, because another call may have moved the time while this one slept
        while (wait := self._resume_time - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        settings = self.settings
        if settings.limit is not None and self.counts.calls >= settings.limit:
            raise LimitReachedError
        if settings.budget is not None and self.counts.tokens >= settings.budget:
            raise LimitReachedError
        # Read before the call, because another call may change it meanwhile.
        had_response_format = self._has_response_format
        if not had_response_format:
            body = {name: value for name, value in body.items() if name != "response_format"}
        # Counted before it is sent: a call that times out may cost money, too.
        self.counts.calls += 1
        try:
            response = await self._http.post(settings.endpoint, json=body)
        except httpx.TransportError as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _RetryError(text) from None
        except (httpx.InvalidURL, httpx.HTTPError) as error:
            raise ValueError(f"--judge: {settings.url}: {error}. Correct the address.") from None
        self._has_answered = True
        # Redirects are not followed, so that nothing is sent to another host.
        status = response.status_code
        if status in (400, 415, 422) and had_response_format and "response_format" in body:
            # Older servers do not know the field; the answer is then read from the text.
            self._has_response_format = False
            return await self._attempt(body)
        if status == 429 or status >= 500 or status == 408:
            raise _RetryError(f"status {status}", retry_after_seconds(response.headers.get("Retry-After")))
        if status >= 400:
            # Servers state the reason in the body, often in several lines.
            excerpt = " ".join(response.text[:_EXCERPT].split())
            remedy = (
                f"Set the environment variable {KEY_VARIABLE}."
                if status in (401, 403)
                else "Correct --judge or --judge-model."
            )
            raise ValueError(
                f"--judge: {settings.url} rejects the request with status {status}"
                f" ({excerpt or 'no text'}). {remedy}"
            )
        # An answer has a few kB; a longer body is a page of a proxy.
        if len(response.content) > _MAX_BODY:
            raise _RetryError("the response is too long")
        return self._completion(response)

    def _completion(self, response: httpx.Response) -> dict[str, Any]:
        """Return the fields of a response that are kept. Raises `_RetryError` if it is no completion."""
        try:
            # Any missing field means that this is no completion.
            record = json.loads(response.content)
            choice = record["choices"][0]
            content = choice["message"]["content"]
            # Some servers leave the usage out, or send null.
            usage = record.get("usage") or {}
            tokens = [usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _RetryError("the response is no chat completion") from None
        # Some servers return a list of parts; others null, for an answer that is empty.
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        prompt_tokens, completion_tokens = (
            count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
            for count in tokens
        )
        self.counts.prompt_tokens += prompt_tokens
        self.counts.completion_tokens += completion_tokens
        return {
            "text": content if isinstance(content, str) else "",
            "logprobs": choice.get("logprobs"),
            "model": str(record.get("model") or "") + _fingerprint(record),
            "tokens": [prompt_tokens, completion_tokens],
            "finish": str(choice.get("finish_reason") or ""),
        }


class _RetryError(Exception):
    """Failure of an attempt that may pass, with the server's Retry-After in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


def _fingerprint(record: dict[str, Any]) -> str:
    """Return the version that a server states besides the model's name, or ""."""
    version = record.get("system_fingerprint")
    return f" ({version})" if isinstance(version, str) and version else ""
