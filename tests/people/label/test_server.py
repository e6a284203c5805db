"""Answers of the server to the page and the admin, and the stored parts of their requests."""

import gzip
import json
import time

import numpy as np
import pytest

from eg3d_rlhf.people.label.entities import SKIP_REASONS, Mode, PlannedPair
from eg3d_rlhf.people.label.server.app import serve
from eg3d_rlhf.people.label.server.options import is_loopback
from tests.people.label import serving
from tests.people.label.plans import decode_mesh
from tests.people.label.serving import GENEROUS, answer
from tests.rejections import raising

REASON = "the density does not cross the level 10"  # for which a shape cannot be prepared


@pytest.fixture
def served(tmp_path):
    with serving.running(tmp_path / "server", limits=GENEROUS) as served:
        yield served


def next_pair(page) -> dict:
    return page.get("/api/assignments?count=1").json()["assignments"][0]


def past_training(page) -> dict:
    """The first pair after the training round."""
    while (pair := next_pair(page))["training"]:
        answer(page, pair["assignment"], f"t-{pair['assignment']}")
    return pair


def test_the_session_tells_the_page_what_it_needs(served):
    reply = served.browser().get("/api/session").json()
    expected = {
        "annotator": "local",
        "role": "admin",
        "mode": "label",
        "title": "",
        "show_render": False,
        "exposed": False,
        "skip_reasons": list(SKIP_REASONS),
    }
    assert (
        {k: reply[k] for k in expected} == expected
        and len(reply["csrf"]) == 64
        and len(reply["page_version"]) == 12
    )


def test_a_judgement_is_kept_as_it_was_sent(served):
    page = served.browser()
    pair = past_training(page)
    values = {"milliseconds": 4321, "views": ["front", "orbit"], "answered_at": 1.7e9, "page_version": "abc"}
    response = answer(page, pair["assignment"], "key-1", "right", **values)
    assert response.status_code == 201
    reply = response.json()
    assert reply.pop("progress")["done"] == 1 and reply == {
        "accepted": True,
        "duplicate": False,
        "training": None,
        "reveal": None,
    }
    row = list(served.store.judgements())[-1]
    assert (row.assignment, row.choice, row.milliseconds, row.views) == (
        pair["assignment"],
        "right",
        4321,
        ("front", "orbit"),
    )
    assert (row.answered_at, row.page_version, row.annotator) == (1.7e9, "abc", "local")
    tokens = dict(served.store.shapes(served.campaign))
    assert (row.left, row.right) == (tokens[served.asset(pair["left"])], tokens[served.asset(pair["right"])])
    assert answer(page, next_pair(page)["assignment"], "key-2", "skip", reason="identical").status_code == 201
    assert list(served.store.judgements())[-1].reason == "identical"


def test_shapes_are_sent_as_they_lie_in_the_cache_and_cached(served):
    page = served.browser()
    asset = next_pair(page)["left"]
    path = served.options.cache.mesh(dict(served.store.shapes(served.campaign))[served.asset(asset)])
    with page.stream("GET", f"/api/shapes/{asset}") as response:
        assert b"".join(response.iter_raw()) == path.read_bytes()
    assert (
        response.headers["content-encoding"] == "gzip"
        and response.headers["content-type"] == "application/octet-stream"
    )
    assert response.headers["cache-control"] == "private, max-age=31536000, immutable"
    vertices, faces = decode_mesh(page.get(f"/api/shapes/{asset}").content)
    assert len(vertices) == 40 and np.asarray(faces).shape == (80, 3)
    again = page.get(f"/api/shapes/{asset}", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


def test_shapes_that_are_not_prepared_wait_alone(tmp_path):
    with serving.running(tmp_path, prepared=False, limits=GENEROUS) as served:
        page = served.browser()
        shapes = served.store.shapes(served.campaign)
        assert page.get("/api/assignments").json()["waiting"]
        missing = page.get(f"/api/shapes/{shapes[0][0]}")
        assert missing.status_code == 503 and missing.headers["retry-after"] == "5"
        serving.fill(served.options.cache, [s for _, s in shapes[:4]])  # the two training pairs
        time.sleep(0.6)
        state = page.get("/api/assignments").json()
        assert [p["training"] for p in state["assignments"]] == [True, True] and not state["waiting"]
        assert (
            state["preparation"]["done"] == 4 and page.get(f"/api/shapes/{shapes[0][0]}").status_code == 200
        )


def test_failed_shapes_are_not_counted_as_ready(tmp_path, capfd):
    with serving.running(tmp_path, prepared=False, limits=GENEROUS) as served:
        page = served.browser()
        shapes = [shape for _, shape in served.store.shapes(served.campaign)]
        cache = served.options.cache
        for shape in shapes[:5]:
            cache.put_failure(shape, REASON)
        serving.fill(cache, shapes[5:9])
        time.sleep(0.6)
        expected = {"done": 4, "failed": 5, "total": len(shapes), "seconds_left": None}
        assert page.get("/api/assignments").json()["preparation"] == expected
        report = page.get("/api/admin/quality").json()["preparation"]
        assert {name: report[name] for name in expected} == expected
        assert REASON in report["error"] and "--set level" in report["error"]
        warning = capfd.readouterr().err
        assert warning.count(REASON) == 1
        for shape in shapes[9:]:
            cache.put_failure(shape, REASON)
        time.sleep(0.6)
        state = page.get("/api/assignments").json()
        assert not state["waiting"] and state["preparation"]["failed"] == len(shapes) - 4
        assert state["preparation"]["done"] == 4 and state["preparation"]["seconds_left"] == 0


def test_prepared_shapes_are_known_before_the_first_request(tmp_path, monkeypatch):
    """After a restart all annotators send requests at once: none may wait for a search through tens of
    thousands of files.
    """
    with serving.running(tmp_path, limits=GENEROUS) as served:
        monkeypatch.setattr(
            served.options.cache, "mesh", lambda shape: pytest.fail("looked into the cache for a request")
        )
        assert served.browser().get("/api/assignments").json()["preparation"] == {
            "done": 32,
            "failed": 0,
            "total": 32,
            "seconds_left": 0.0,
        }


def test_images_are_shown_where_the_campaign_allows(tmp_path):
    for mode, status in ((Mode.LABEL, 200), (Mode.STUDY, 404)):
        with serving.running(tmp_path / mode, mode=mode, pairs=2, campaign={"show_render": True}) as served:
            page = served.browser()
            asset = next_pair(page)["left"]
            served.options.cache.put_render(
                dict(served.store.shapes(served.campaign))[served.asset(asset)], b"\x89PNG"
            )
            response = page.get(f"/api/renders/{asset}")
            assert response.status_code == status and page.get("/api/session").json()["show_render"] == (
                status == 200
            )
            assert status == 404 or (response.content, response.headers["content-type"]) == (
                b"\x89PNG",
                "image/png",
            )


def test_static_files_are_compressed_and_revalidated(served):
    client = served.client()
    with client.stream("GET", "/static/app.js") as response:
        packed = b"".join(response.iter_raw())
    assert (
        gzip.decompress(packed) == (served.options.static / "app.js").read_bytes()
        and response.headers["vary"] == "Accept-Encoding"
    )
    uncompressed = client.get("/static/app.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in uncompressed.headers and uncompressed.headers["content-type"].startswith(
        "text/javascript"
    )
    assert (
        client.get("/static/app.js", headers={"If-None-Match": uncompressed.headers["etag"]}).status_code
        == 304
    )


def test_an_open_page_survives_a_restart(tmp_path):
    with serving.running(tmp_path) as served:
        page = served.browser()
        options = served.options
        before = page.get("/api/session").json()["page_version"]
        (options.static / "app.js").write_text("'other'")
        # files are read when it starts
        assert served.browser().get("/api/session").json()["page_version"] == before
    assert (options.cache.folder / "server.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "labels.db").rename(tmp_path / "old.db")
    with serving.running(tmp_path) as served:
        assert served.browser().headers["X-CSRF-Token"] == page.headers["X-CSRF-Token"]


def test_the_admin_sees_quality_and_exports(tmp_path, served):
    planned = [
        PlannedPair(first=serving.shape("a", 2 * i), second=serving.shape("a", 2 * i + 1)) for i in range(3)
    ]
    with serving.running(tmp_path, planned=planned) as seeds:
        page = seeds.browser()
        answer(page, next_pair(page)["assignment"], "k")
        report = page.get("/api/admin/quality").json()
        assert report["annotators"][0]["name"] == "local" and report["preparation"]["error"] is None
        for kind, count in (("csv", 2), ("jsonl", 1), ("judgements", None)):
            response = page.get(f"/api/admin/export?format={kind}")
            assert response.status_code == 200 and "attachment" in response.headers["content-disposition"]
            assert count is None or len(response.text.splitlines()) == count
        assert any(json.loads(line)["record"] == "judgement" for line in response.text.splitlines())
    # the two shapes of its pairs are of two generators, which the label format cannot hold
    page = served.browser()
    answer(page, past_training(page)["assignment"], "k")
    response = page.get("/api/admin/export?format=csv")
    assert response.status_code == 409 and response.json()["remedy"].startswith(
        "Request the export with format=judgements"
    )


def test_a_report_is_not_computed_for_every_look(served, monkeypatch):
    from eg3d_rlhf.people.label.server import routes

    calls = []
    monkeypatch.setattr(routes, "quality_report", lambda *_, **__: calls.append(1) or {"judgements": 0})
    assert [served.browser().get("/api/admin/quality").status_code for _ in range(4)] == [200] * 4 and len(
        calls
    ) == 1


def test_errors_of_the_database_say_to_try_again(served, monkeypatch, caplog):
    from sqlalchemy.exc import OperationalError

    def raise_error(*_):
        raise OperationalError("SELECT secret", {}, Exception("disk"))

    monkeypatch.setattr(served.store, "progress", raise_error)
    response = served.browser().get("/api/assignments")
    assert (
        response.status_code == 503
        and "secret" not in response.text
        and response.headers["retry-after"] == "2"
    )
    assert caplog.messages == ["database: disk"]  # a line, without the statement
    monkeypatch.setattr(served.store, "session", raise_error)
    response = served.client(Cookie="session=" + "a" * 40).get("/api/session")
    assert (
        response.status_code == 503 and response.headers["retry-after"] == "2" and len(caplog.messages) == 2
    )
    monkeypatch.setattr(served.store, "progress", lambda *_: 1 / 0)
    response = served.browser().get("/api/assignments")
    assert response.status_code == 500 and set(response.json()) == {"error", "remedy"}
    assert "ZeroDivisionError" not in response.text


# ---- how it is reached


def test_a_proxy_is_believed_only_where_it_is_named(tmp_path):
    forwarded = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    for config, https in (({}, False), ({"proxy": "127.0.0.1"}, True)):
        log = tmp_path / f"{https}.jsonl"
        with serving.running(tmp_path / str(https), config=config, exposed=True, access_log=log) as served:
            response = served.client(**forwarded).get("/login")
            assert (
                ("strict-transport-security" in response.headers)
                is https
                is ("Secure" in response.headers["set-cookie"])
            )
            time.sleep(0.1)
            assert json.loads(log.read_text().splitlines()[-1])["address"] == (
                "203.0.113.9" if https else "127.0.0.1"
            )


def test_https(tmp_path, certificate):
    with serving.running(
        tmp_path, config=dict(zip(("certificate", "key"), certificate, strict=True)), exposed=True
    ) as served:
        token = served.store.add_annotator("ann")
        page = served.browser(token)
        assert page.get("/api/session").json()["annotator"] == "ann"
        origin = {"Origin": served.url}
        assert page.post("/api/undo", json={"key": "k"}, headers=origin).status_code == 200
        assert (
            page.post(
                "/api/undo", json={"key": "k"}, headers={"Origin": served.url.replace("https", "http")}
            ).status_code
            == 403
        )
        page.close()  # the server would wait for it


def test_a_server_that_others_reach_must_be_exposed(tmp_path):
    served = serving.build(tmp_path)
    with raising("AppOptions(exposed=True)", "0.0.0.0"):
        serve(served.options, "0.0.0.0")
    assert [is_loopback(h) for h in ("127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]")] == [True] * 5
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.evil.example")] == [
        False
    ] * 5
