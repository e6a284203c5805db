"""Tokens, sessions, roles, rates, headers and the access log of the server."""

import base64
import hashlib
import html
import json
import re
import time

import pytest

from eg3d_rlhf.people.label.server.app import TEXTS
from eg3d_rlhf.people.label.server.identity import address_key
from eg3d_rlhf.people.label.server.options import Limits
from tests.people.label import serving
from tests.people.label.serving import SAME, answer, routes

# ---- tokens, sessions and roles


def test_a_token_a_session_and_their_ends(exposed):
    assert exposed.client(exposed.tokens["ann"]).get("/api/session").json()["annotator"] == "ann"
    assert exposed.client(exposed.tokens["gone"]).get("/api/session").status_code == 401
    page = exposed.browser(exposed.tokens["ann"])
    assert page.get("/api/session").json()["role"] == "annotator"
    assert page.get("/").status_code == page.get("/static/app.js").status_code == 200
    cookie = page.cookies["session"]
    response = page.post("/logout")
    assert response.status_code == 303 and page.get("/api/session").status_code == 401
    assert exposed.client(Cookie=f"session={cookie}").get("/api/session").status_code == 401
    page = exposed.browser(exposed.store.add_annotator("short"))
    boss = exposed.client(exposed.tokens["boss"])
    assert page.get("/api/session").status_code == 200
    listed = boss.post("/api/admin/annotators/revoke", json={"name": "short"}).json()
    assert next(a for a in listed if a["name"] == "short")["revoked"] is not None
    assert page.get("/api/session").status_code == 401, "revoking ends sessions at once"


def test_the_session_cookie_is_kept_from_scripts_and_other_sites(exposed):
    response = serving.login(exposed.client(**SAME), exposed.tokens["ann"])
    cookie = next(c for c in response.headers.get_list("set-cookie") if c.startswith("session="))
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; ")) and "Secure" not in cookie
    assert exposed.tokens["ann"] not in str(response.headers) and response.headers["location"] == "/"


def test_an_annotator_is_no_admin(exposed):
    ann = exposed.client(exposed.tokens["ann"])
    admins_only = [(m, p) for m, p in routes(exposed) if "admin" in p]
    assert len(admins_only) >= 6
    for method, path in admins_only:
        response = ann.request(method, path, **({"json": {"name": "x"}} if method == "POST" else {}))
        assert response.status_code == 403, (method, path)
    boss = exposed.client(exposed.tokens["boss"])
    for method, path in admins_only:
        assert method != "GET" or boss.get(path).status_code == 200, path


def test_an_admin_makes_an_annotator(exposed):
    boss = exposed.client(exposed.tokens["boss"])
    made = boss.post("/api/admin/annotators", json={"name": "Zoë Ångström"})
    assert (
        made.status_code == 201
        and exposed.client(made.json()["token"]).get("/api/session").json()["annotator"] == "Zoë Ångström"
    )
    assert boss.post("/api/admin/annotators", json={"name": "Zoë Ångström"}).status_code == 409
    assert made.json()["token"] not in boss.get("/api/admin/annotators").text


def test_one_annotators_assignment_and_csrf_token_are_not_anothers(exposed):
    first = exposed.browser(exposed.tokens["ann"])
    second = exposed.browser(exposed.tokens["boss"])
    assert first.headers["X-CSRF-Token"] != second.headers["X-CSRF-Token"]
    assert (
        first.post(
            "/api/undo", json={"key": "k1"}, headers={"X-CSRF-Token": second.headers["X-CSRF-Token"]}
        ).status_code
        == 403
    )
    assert first.post("/api/undo", json={"key": "k1"}).status_code == 200
    ann, boss = (exposed.client(exposed.tokens[name]) for name in ("ann", "boss"))
    token = ann.get("/api/assignments?count=1").json()["assignments"][0]["assignment"]
    assert answer(boss, token, "steal").status_code == 404
    assert answer(ann, token, "mine").status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        # a link from elsewhere
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
        *({"Host": host} for host in ("localhost:9", "127.0.0.1", "[::1]:8000", "LOCALHOST")),
    ],
)
def test_the_page_opens_by_a_link_and_by_every_name_of_this_machine(local, headers):
    assert local.client(**headers).get("/").status_code == 200


# ---- guessing


def test_wrong_tokens_are_limited_and_right_ones_are_let_in_all_the_same(tmp_path):
    with serving.running(tmp_path, exposed=True, limits=Limits(guesses=(0.01, 5.0))) as served:
        first = served.store.add_annotator("ann")
        late = served.store.add_annotator("late")
        responses = [served.client("guess" * 5 + str(i)).get("/api/session") for i in range(8)]
        assert [r.status_code for r in responses] == [401] * 5 + [429] * 3
        assert 60 < int(responses[-1].headers["Retry-After"]) <= 100
        assert served.client(first).get("/api/session").status_code == 200
        assert serving.login(served.client(**SAME), late).status_code == 303
        # a right token in between changes nothing
        assert served.client("guess" * 6).get("/api/session").status_code == 429
    with serving.running(tmp_path / "page", exposed=True, limits=Limits(guesses=(0.01, 4.0))) as served:
        responses = [serving.login(served.client(**SAME), f"guess-number-{i:020d}") for i in range(6)]
        assert [r.status_code for r in responses] == [401] * 4 + [429] * 2 and int(
            responses[-1].headers["Retry-After"]
        ) > 60
        assert html.escape(TEXTS["en"]["401"]) in responses[0].text
        assert "guess-number" not in responses[0].text


def test_wrong_tokens_from_everywhere_keep_nobody_from_the_first_log_in(tmp_path):
    with serving.running(tmp_path, config={"proxy": "127.0.0.1"}, exposed=True) as served:
        with served.client() as client:
            for i in range(150):
                headers = {
                    "X-Forwarded-For": f"10.1.{i}.7",
                    "Authorization": f"Bearer wrong-token-number-{i:06d}",
                }
                assert client.get("/api/session", headers=headers).status_code == 401
        new = served.client(**SAME, **{"X-Forwarded-For": "10.2.0.1"})
        assert serving.login(new, served.store.add_annotator("ann")).status_code == 303


@pytest.mark.parametrize(
    ("limits", "exposed", "path"),
    [({"anonymous": (0.1, 5.0)}, True, "/health"), ({"requests": (0.1, 5.0)}, False, "/api/session")],
)
def test_requests_are_limited(tmp_path, limits, exposed, path):
    with serving.running(tmp_path, exposed=exposed, limits=Limits(**limits)) as served:
        client = served.client()
        responses = [client.get(path) for _ in range(7)]
        assert [r.status_code for r in responses] == [200] * 5 + [429] * 2 and "Retry-After" in responses[
            -1
        ].headers


def test_the_rate_of_an_ipv6_subscriber_is_one():
    keys = {address_key(f"2001:db8:1:2::{i:x}") for i in range(1, 50)}
    assert len(keys) == 1 and address_key("2001:db8:1:3::1") not in keys
    assert address_key("::ffff:10.0.0.1") == address_key("10.0.0.1") != address_key("10.0.0.2")


# ---- headers and log


def test_every_response_has_the_protective_headers(exposed):
    page = exposed.browser(exposed.tokens["boss"])
    asset = page.get("/api/assignments").json()["assignments"][0]["left"]
    kept = ("/", "/admin", "/static/app.js", f"/api/shapes/{asset}")
    for path in (*kept, "/api/session", "/nothing", "/health", "/login", "/api/admin/quality"):
        headers = page.get(path).headers
        assert (
            headers["x-content-type-options"] == "nosniff"
            and headers["cross-origin-opener-policy"] == "same-origin"
        )
        assert headers["referrer-policy"] == ("same-origin" if path == "/login" else "no-referrer")
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in str(policy) and "*" not in str(policy) and "http" not in str(policy)
        assert headers["server"] == "-" and "x-powered-by" not in headers
        assert ("no-store" in headers["cache-control"]) == (path not in kept)
        assert "public" not in headers["cache-control"]


def test_the_log_in_page_needs_nothing_else_and_its_policy_fits(exposed):
    response = exposed.client().get("/login")
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in response.headers["content-security-policy"]
    assert not re.search(r"<link|<img|src=|href=|style=|onload", response.text)


def test_the_access_log_tells_who_and_what_but_no_secret(exposed):
    token = exposed.tokens["ann"]
    page = exposed.browser(token)
    asset = page.get("/api/assignments").json()["assignments"][0]["left"]
    page.get(f"/api/shapes/{asset}?token={token}")
    page.get(f"/{token}")
    exposed.client(token).get("/api/session")
    exposed.client("wrong" * 6).get("/api/session")
    exposed.client(**{"X-Injected": "a"}).get("/x\u2028%22,%20%22annotator%22:%20%22boss")
    time.sleep(0.1)
    text = exposed.options.access_log.read_text()
    secrets = [
        token,
        page.cookies["session"],
        page.headers["X-CSRF-Token"],
        asset,
        "wrong" * 6,
        exposed.tokens["boss"],
    ]
    assert [s for s in secrets if s in text] == []
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["event"] == "start" and {line["event"] for line in lines[1:]} == {"request"}
    for line in lines[1:]:
        assert {
            "time",
            "request",
            "address",
            "method",
            "route",
            "status",
            "milliseconds",
            "bytes",
            "annotator",
            "by",
        } <= set(line)
    responses = [(line["route"], line["status"], line["annotator"], line["by"]) for line in lines[1:]]
    assert ("/api/shapes/{address}", 200, "ann", "session") in responses and (
        "/api/session",
        200,
        "ann",
        "token",
    ) in responses
    assert ("/*", 404, "ann", "session") in responses and ("/api/session", 401, None, None) in responses
    assert any("token" in line.get("rejected", "") for line in lines if line.get("status") == 401)
