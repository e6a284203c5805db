"""Access to the API: no data without authentication, and a 4xx for every malformed, foreign or oversized
request.
"""

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from eg3d_rlhf.people.label.server.options import Limits
from eg3d_rlhf.people.label.server.request_checks import OPEN
from tests.people.label import serving
from tests.people.label.serving import SAME, routes

BODY = {"key": "k-rejected", "assignment": "x" * 22, "choice": "left", "milliseconds": 1, "views": []}
BODY |= {"answered_at": 1.0, "page_version": "t"}
FOREIGN = {"Sec-Fetch-Site": "cross-site"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DEEP = b"[" * 30_000 + b"]" * 30_000
LONG = b'{"key": "' + b"x" * 70_000 + b'"}'


def raw(served, head: str, body: bytes = b"", close: bool = True) -> tuple[int, bytes]:
    """Status (0: the connection was cut) and everything that follows, of a request written byte by byte."""
    parts = urlsplit(served.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(
            (head.format(host=parts.netloc) + "\nConnection: close" * close + "\n\n")
            .replace("\n", "\r\n")
            .encode("latin-1")
        )
        try:
            connection.sendall(body)
        except OSError:
            pass  # rejected before all was sent
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass
    return int(received.split()[1]) if received else 0, received


def test_without_a_token_nothing_but_login_and_health_answers(exposed):
    client = exposed.client(**SAME)
    known = routes(exposed)
    assert {("GET", "/api/session"), ("GET", "/api/admin/export"), *OPEN} <= set(known) and len(known) >= 18
    paths = {path for _, path in known} | {"/docs", "/openapi.json", "/redoc", "/nothing", "/static/app.js"}
    for path in sorted(paths):
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
            if (method, path) in OPEN:
                continue
            response = client.request(method, path)
            page = method == "GET" and path in ("/", "/admin")
            assert response.status_code == (303 if page else 401), (method, path)
            assert len(response.content) < 200
            assert (
                response.headers["location"] == "/login" if page else "www-authenticate" in response.headers
            )
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/login").status_code == 200


# name -> (method, path, arguments of the request, status); asked by a page on loopback, which may ask
# everything
REJECTED = {
    "another site": ("POST", "/api/judgements", {"json": BODY, "headers": FOREIGN}, 403),
    "another port of this machine": (
        "POST",
        "/api/undo",
        {"json": {"key": "k"}, "headers": {"Sec-Fetch-Site": "same-site"}},
        403,
    ),
    "another origin": (
        "POST",
        "/api/judgements",
        {"json": BODY, "headers": {"Origin": "http://evil.example"}},
        403,
    ),
    "origin with another port": (
        "POST",
        "/api/judgements",
        {"json": BODY, "headers": {"Origin": "http://127.0.0.1:1"}},
        403,
    ),
    "origin with https": (
        "POST",
        "/api/undo",
        {"json": {"key": "k"}, "headers": {"Origin": "https://127.0.0.1"}},
        403,
    ),
    "another site reads pairs": ("GET", "/api/assignments", {"headers": FOREIGN}, 403),
    "another site embeds the page": (
        "GET",
        "/",
        {
            "headers": {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "iframe",
            }
        },
        403,
    ),
    "another site loads a script": ("GET", "/static/app.js", {"headers": FOREIGN}, 403),
    "another site logs in": (
        "POST",
        "/login",
        {"data": {"token": "x" * 32, "csrf": "y"}, "headers": FOREIGN},
        403,
    ),
    "no CSRF token": ("POST", "/api/judgements", {"json": BODY, "headers": {"X-CSRF-Token": ""}}, 403),
    "wrong CSRF token": (
        "POST",
        "/api/judgements",
        {"json": BODY, "headers": {"X-CSRF-Token": "0" * 64}},
        403,
    ),
    "CSRF token that is no ASCII": (
        "POST",
        "/api/undo",
        {"json": {"key": "k"}, "headers": {"X-CSRF-Token": "ä".encode()}},
        403,
    ),
    "no CSRF token at log-out": ("POST", "/logout", {"headers": {"X-CSRF-Token": ""}}, 403),
    "no CSRF token, admin": (
        "POST",
        "/api/admin/annotators",
        {"json": {"name": "x"}, "headers": {"X-CSRF-Token": ""}},
        403,
    ),
    "log-in without its cookie": ("POST", "/login", {"data": {"token": "x" * 32, "csrf": "0" * 64}}, 403),
    "log-in without fields": ("POST", "/login", {"content": b"", "headers": FORM}, 400),
    "log-in with a field twice": (
        "POST",
        "/login",
        {"content": b"token=a&token=b&csrf=c", "headers": FORM},
        400,
    ),
    "log-in with many fields": ("POST", "/login", {"content": b"a=1&" * 5000, "headers": FORM}, 400),
    "log-in as JSON": ("POST", "/login", {"json": {"token": "x", "csrf": "y"}}, 415),
    "log-in in bytes that are no text": (
        "POST",
        "/login",
        {"content": b"\xff\xfe=\x00", "headers": FORM},
        400,
    ),
    "foreign host": ("GET", "/", {"headers": {"Host": "evil.example"}}, 421),
    "foreign host that begins like ours": (
        "GET",
        "/api/session",
        {"headers": {"Host": "127.0.0.1.evil.example"}},
        421,
    ),
    "host with a path": ("GET", "/", {"headers": {"Host": "127.0.0.1/x"}}, 400),
    "host with a user": ("GET", "/", {"headers": {"Host": "a@127.0.0.1"}}, 400),
    "empty host": ("GET", "/", {"headers": {"Host": ""}}, 400),
    "wrong bearer token": ("GET", "/api/session", {"headers": {"Authorization": "Bearer " + "x" * 32}}, 401),
    "traversal": ("GET", "/static/../../store.py", {}, 404),
    "traversal, encoded": ("GET", "/static/%2e%2e%2f%2e%2e%2fstore.py", {}, 404),
    "traversal, encoded twice": ("GET", "/static/%252e%252e%252fstore.py", {}, 404),
    "absolute path": ("GET", "/static//etc/passwd", {}, 404),
    "traversal in an asset": ("GET", "/api/shapes/..%2f..%2fetc%2fpasswd", {}, 404),
    "dots for an asset": ("GET", "/api/shapes/....", {}, 422),
    "file that is not the page's": ("GET", "/static/notes.py", {}, 404),
    "NUL in a path": ("GET", "/static/app.js%00.css", {}, 400),
    "NUL in an asset": ("GET", "/api/shapes/abc%00", {}, 400),
    "line break in a path": ("GET", "/api/shapes/abc%0d%0aX-A:1", {}, 400),
    "unknown asset": ("GET", "/api/shapes/" + "A" * 22, {}, 404),
    "image that is not shown": ("GET", "/api/renders/" + "A" * 22, {}, 404),
    "long address": ("GET", "/api/session?" + "a" * 4000, {}, 414),
    "large headers": ("GET", "/api/session", {"headers": {"X-A": "a" * 33_000}}, 431),
    "large headers in small ones": (
        "GET",
        "/api/session",
        {"headers": {f"X-{i}": "a" * 1000 for i in range(40)}},
        431,
    ),
    "oversized body": ("POST", "/api/judgements", {"content": LONG, "headers": JSON}, 413),
    "oversized body in chunks": (
        "POST",
        "/api/judgements",
        {"content": [LONG[:40_000], LONG[40_000:]], "headers": JSON},
        413,
    ),
    "oversized log-in": ("POST", "/login", {"content": b"token=" + b"x" * 70_000, "headers": FORM}, 413),
    "oversized body of a GET": ("GET", "/api/session", {"content": LONG}, 413),
    "deep JSON": ("POST", "/api/judgements", {"content": DEEP, "headers": JSON}, 400),
    "deep JSON in a field": (
        "POST",
        "/api/judgements",
        {"content": b'{"views": ' + DEEP[:60_000] + b"}", "headers": JSON},
        400,
    ),
    "bytes that are no UTF-8": (
        "POST",
        "/api/undo",
        {"content": b'{"key": "\xff\xfe"}', "headers": JSON},
        (400, 422),
    ),
    "UTF-16": (
        "POST",
        "/api/undo",
        {"content": json.dumps({"key": "k"}).encode("utf-16-le"), "headers": JSON},
        400,
    ),
    "a form where JSON belongs": ("POST", "/api/judgements", {"data": {"key": "k"}}, 415),
    "text where JSON belongs": (
        "POST",
        "/api/undo",
        {"content": b'{"key": "k"}', "headers": {"Content-Type": "text/plain"}},
        415,
    ),
    "no content type": ("POST", "/api/undo", {"content": b'{"key": "k"}'}, 415),
    "compressed body": (
        "POST",
        "/api/undo",
        {"content": b"x", "headers": {**JSON, "Content-Encoding": "gzip"}},
        415,
    ),
    "unknown field": ("POST", "/api/judgements", {"json": {**BODY, "annotator": "ann"}}, 422),
    "huge number": (
        "POST",
        "/api/judgements",
        {"content": json.dumps(BODY).replace('s": 1,', 's": ' + "9" * 5000 + ",").encode(), "headers": JSON},
        (400, 422),
    ),
    "skip without a reason": ("POST", "/api/judgements", {"json": {**BODY, "choice": "skip"}}, 422),
    "reason without a skip": ("POST", "/api/judgements", {"json": {**BODY, "reason": "unsure"}}, 422),
    "negative time": ("POST", "/api/judgements", {"json": {**BODY, "milliseconds": -1}}, 422),
    "infinity": (
        "POST",
        "/api/judgements",
        {"content": json.dumps({**BODY, "answered_at": float("inf")}).encode(), "headers": JSON},
        422,
    ),
    "NaN": (
        "POST",
        "/api/judgements",
        {"content": json.dumps({**BODY, "answered_at": float("nan")}).encode(), "headers": JSON},
        422,
    ),
    "NUL in a key": ("POST", "/api/judgements", {"json": {**BODY, "key": "a\0b"}}, 422),
    "half a surrogate pair": (
        "POST",
        "/api/judgements",
        {"content": json.dumps(BODY).replace("k-rejected", "\\ud800").encode(), "headers": JSON},
        422,
    ),
    "script as a key": (
        "POST",
        "/api/judgements",
        {"json": {**BODY, "key": "<script>alert(1)</script>"}},
        422,
    ),
    "script as a view": ("POST", "/api/judgements", {"json": {**BODY, "views": ["<script>"]}}, 422),
    "too many views": ("POST", "/api/judgements", {"json": {**BODY, "views": ["front"] * 65}}, 422),
    "script as a page version": (
        "POST",
        "/api/judgements",
        {"json": {**BODY, "page_version": "<img onerror=1>"}},
        422,
    ),
    "SQL as an assignment": (
        "POST",
        "/api/judgements",
        {"json": {**BODY, "assignment": "x' OR '1'='1"}},
        422,
    ),
    "unknown assignment": ("POST", "/api/judgements", {"json": BODY}, 404),
    "undo of an unknown assignment": (
        "POST",
        "/api/undo",
        {"json": {"key": "k-undo", "assignment": "nothing"}},
        (404, 409),
    ),
    "script in a name": (
        "POST",
        "/api/admin/annotators",
        {"json": {"name": "<script>alert(1)</script>"}},
        422,
    ),
    "line break in a name": ("POST", "/api/admin/annotators", {"json": {"name": "a\nb"}}, 422),
    "path as a name": ("POST", "/api/admin/annotators", {"json": {"name": "../x"}}, 422),
    "spreadsheet formula as a name": (
        "POST",
        "/api/admin/annotators",
        {"json": {"name": "=cmd|' /C calc'!A0"}},
        422,
    ),
    "right-to-left override in a name": (
        "POST",
        "/api/admin/annotators",
        {"json": {"name": "a\u202eb"}},
        422,
    ),
    "name that is reserved": ("POST", "/api/admin/annotators", {"json": {"name": "local"}}, 409),
    "revoking an unknown annotator": (
        "POST",
        "/api/admin/annotators/revoke",
        {"json": {"name": "nobody"}},
        404,
    ),
    "unknown export": ("GET", "/api/admin/export?format=../../x", {}, 422),
    "TRACE": ("TRACE", "/", {}, 405),
    "origin null": ("POST", "/api/judgements", {"json": BODY, "headers": {"Origin": "null"}}, 403),
    "basic authentication": ("GET", "/api/session", {"headers": {"Authorization": "Basic bG9jYWw6"}}, 401),
    "empty bearer token": ("GET", "/api/session", {"headers": {"Authorization": "Bearer"}}, 401),
    "traversal, backslashes": ("GET", "/static/..%5c..%5cstore.py", {}, 404),
    "JSON that is no object": ("POST", "/api/judgements", {"json": [1, 2]}, 422),
    "JSON null": ("POST", "/api/undo", {"content": b"null", "headers": JSON}, 422),
    "another charset": (
        "POST",
        "/api/undo",
        {"content": b"{}", "headers": {"Content-Type": "application/json; charset=utf-7"}},
        415,
    ),
    "description of the API": ("GET", "/openapi.json", {}, 404),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(local, case):
    method, path, kwargs, status = REJECTED[case]
    before = len(list(local.store.judgements()))
    page = local.browser()
    url = httpx.URL(local.url).copy_with(raw_path=path.encode())
    chunks = {"content": iter(kwargs["content"])} if isinstance(kwargs.get("content"), list) else {}
    response = page.request(method, url, **{**kwargs, **chunks})
    page.close()
    assert response.status_code in (status if isinstance(status, tuple) else (status,)), response.text
    assert "<script" not in response.text and "Traceback" not in response.text
    if method != "TRACE" and path != "/login":
        assert set(response.json()) == {"error", "remedy"} and all(response.json().values())
    assert len(list(local.store.judgements())) == before


RAW = {  # requests that no well-behaved client sends
    "no host": ("GET /api/session HTTP/1.1", b"", 400),
    "two hosts": ("GET /api/session HTTP/1.1\nHost: {host}\nHost: evil.example", b"", 400),
    "length that is no number": ("POST /api/undo HTTP/1.1\nHost: {host}\nContent-Length: many", b"", 400),
    "negative length": ("POST /api/undo HTTP/1.1\nHost: {host}\nContent-Length: -5", b"", 400),
    "two lengths": (
        "POST /api/undo HTTP/1.1\nHost: {host}\nContent-Length: 5\nContent-Length: 6",
        b"hello",
        400,
    ),
    "huge declared length": (
        "POST /login HTTP/1.1\nHost: {host}\nSec-Fetch-Site: same-origin\nContent-Length: " + "9" * 19,
        b"",
        413,
    ),
    "length of more than 64 bits": (
        "POST /login HTTP/1.1\nHost: {host}\nContent-Length: " + "9" * 20,
        b"",
        400,
    ),
    "endless chunks": (
        (
            "POST /login HTTP/1.1\nHost: {host}\nSec-Fetch-Site: same-origin\nContent-Type:"
            " application/x-www-form-urlencoded\nTransfer-Encoding: chunked"
        ),
        b"4000\r\n"
        + b"x" * 0x4000
        + b"\r\n"
        + b"4000\r\n"
        + b"x" * 0x4000
        + b"\r\n"
        + b"8001\r\n"
        + b"x" * 0x8001
        + b"\r\n",
        413,
    ),
    "huge header": ("GET / HTTP/1.1\nHost: {host}\nX-A: " + "a" * 100_000, b"", (0, 400, 431)),
    "NUL in a header": ("GET / HTTP/1.1\nHost: {host}\nX-A: a\0b", b"", 400),
    "no HTTP": ("HELLO", b"", 400),
    "a proxy's request": ("GET http://evil.example/ HTTP/1.1\nHost: evil.example", b"", 421),
    "a tunnel": (
        "CONNECT evil.example:443 HTTP/1.1\nHost: {host}\nSec-Fetch-Site: same-origin",
        b"",
        (400, 403, 404, 405),
    ),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_requests_are_rejected(local, case):
    head, body, status = RAW[case]
    answered, received = raw(local, head, body)
    assert answered in (status if isinstance(status, tuple) else (status,)), received[:500]
    assert local.client().get("/health").status_code == 200


@pytest.mark.parametrize("order", [1, -1])
def test_what_follows_a_length_and_chunks_is_no_request(local, order):
    """A proxy may use the length, and take a request that a client hides behind the chunks for a body."""
    both = "\n".join(["Content-Length: 99", "Transfer-Encoding: chunked"][::order])
    head = f"POST /login HTTP/1.1\nHost: {{host}}\n{both}"
    status, received = raw(
        local, head, b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", close=False
    )
    assert status in (400, 403) and received.count(b"HTTP/1.1 ") == 1


def test_a_slow_body_is_given_up(tmp_path):
    limits = Limits(body_seconds=0.2)
    with serving.running(tmp_path, limits=limits) as served:
        parts = urlsplit(served.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            head = (
                f"POST /login HTTP/1.1\r\nHost: {parts.netloc}\r\nSec-Fetch-Site:"
                " same-origin\r\nContent-Length: 9\r\n"
            )
            connection.sendall((head + "Content-Type: application/x-www-form-urlencoded\r\n\r\ntok").encode())
            assert connection.recv(4096).split()[1] == b"408"


def test_websockets_are_closed(local):
    head = "GET / HTTP/1.1\nHost: {host}\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13"
    assert raw(local, head + "\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")[0] != 101
