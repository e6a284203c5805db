"""Access of annotators: lost tokens, revoked access, names that differ only in their form, and links."""

import html
import json
import re
import stat
from collections import Counter
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.entities import ConflictError, Kind
from eg3d_rlhf.people.label.server.app import TEXTS
from eg3d_rlhf.people.label.store import Store, check_name
from tests.people.label import serving
from tests.people.label.serving import GENEROUS, SAME, answer
from tests.rejections import raising, rejected


def run(*flags):
    return CliRunner().invoke(main, [str(f) for f in flags])


@pytest.fixture
def db(tmp_path) -> str:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        store.create_campaign(serving.settings(), serving.plan(5))
    return url


def answered(client, count: int = 1) -> list[str]:
    """Answer so many pairs; returns the assignments."""
    done = []
    for _ in range(count):
        (pair,) = client.get("/api/assignments?count=1").json()["assignments"]
        assert answer(client, pair["assignment"], f"k-{pair['assignment']}").status_code == 201
        done.append(pair["assignment"])
    return done


# ---- lost tokens and withdrawn access


def test_a_lost_token_is_replaced_and_the_work_stays(database_url):
    with Store.open(database_url) as store:
        old = store.add_annotator("ann")
        boss = store.add_annotator("boss", "admin")
        ann = store.authenticate(old)
        login = store.open_session(ann.id, 60)
        mine = store.open_session(store.authenticate(boss).id, 60)
        new = store.new_token("ann")
        assert (
            store.authenticate(old) is None
            and store.session(login) is None
            and store.authenticate(new) == ann
        )
        assert not store.withdrawn(old) and store.session(mine).name == "boss"
        store.new_token("boss", kept_session_id=mine)
        assert store.session(mine).name == "boss" and store.authenticate(boss) is None
        login = store.open_session(ann.id, 60)
        store.revoke_annotator("ann")
        assert store.authenticate(new) is None and store.withdrawn(new) and store.withdrawn(login)
        again = store.new_token("ann")
        assert store.authenticate(again).id == ann.id and store.annotators()[0].revoked is None
        assert store.session(login) is None, "what was opened before stays closed"
        for name in ("nobody", "local"):
            with raising("annotator", f"'{name}'", "token"):
                store.new_token(name)


def test_only_revoked_annotators_see_the_reason(exposed):
    token = exposed.store.add_annotator("rue")
    page = exposed.browser(token)
    exposed.store.revoke_annotator("rue")
    response = page.get("/api/session")
    unknown = exposed.client("x" * 32).get("/api/session")
    assert response.status_code == unknown.status_code == 401 and response.json() != unknown.json()
    assert page.get("/").headers["location"] == "/login"
    assert alert(page.get("/login")) == TEXTS["en"]["withdrawn"]
    assert alert(page.get("/login", headers={"Accept-Language": "de"})) == TEXTS["de"]["withdrawn"]
    stranger = exposed.client(**SAME)
    assert alert(stranger.get("/login")) is None
    wrong = serving.login(stranger, "x" * 32)
    right = serving.login(stranger, token)
    assert (wrong.status_code, right.status_code) == (401, 401)
    assert (alert(wrong), alert(right)) == (TEXTS["en"]["401"], TEXTS["en"]["withdrawn"])


def alert(response) -> str | None:
    """Return the alert on the log-in page, if there is one."""
    match = re.search(r"<p role=alert>(.*?)</p>", response.text)
    return html.unescape(match[1]) if match else None


def test_the_last_admin_stays_where_one_is_to_be_kept(exposed, database_url):
    boss = exposed.browser(exposed.tokens["boss"])
    response = boss.post("/api/admin/annotators/revoke", json={"name": "boss"})
    assert (
        response.status_code == 409
        and "yourself" in response.json()["error"]
        and boss.get("/api/session").status_code == 200
    )
    with Store.open(database_url) as store:
        store.annotator_without_token("imported", "admin")
        for name in ("ada", "bea"):
            store.add_annotator(name, "admin")
        store.revoke_annotator("ada", must_keep_admin=True)
        with raising("bea", "admin", kind=ConflictError):
            store.revoke_annotator("bea", must_keep_admin=True)
        store.revoke_annotator("bea")  # from the command line, where a leaked token must not stay


# ---- names

ALIKE = {
    "capitals": ("ann", "Ann"),
    "width": ("ann", "ａｎｎ"),
    "sharp s": ("straße", "STRASSE"),
    "two spaces": ("ann b", "ann  b"),
    "composed otherwise": ("José", "JOSE\u0301"),
    "reserved": ("zoe", "Local"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_names_that_are_equal_but_for_their_form_are_rejected(store, case):
    known, name = ALIKE[case]
    store.add_annotator(known)
    with raising("annotator", repr(name)):
        store.add_annotator(name)


def test_other_names_are_not():
    known: list[str] = []
    scripts = ("李明", "李鸣", "田中さくら", "Иван Петров", "Ада", "김철수 Kim")
    for name in ("ann", "anna", "Zoë", "Zoe", *scripts, *(f"student {i}" for i in range(30))):
        check_name(name, known)
        known.append(name)


def test_databases_that_hold_such_names_go_on(store):
    for name in ("ann", "Ann", "аnn"):
        store.annotator_without_token(name)
    tokens = {name: store.new_token(name) for name in ("ann", "Ann", "аnn")}
    assert {name: store.authenticate(token).name for name, token in tokens.items()} == {
        name: name for name in tokens
    }
    store.revoke_annotator("Ann")
    assert [a.name for a in store.annotators() if a.revoked] == ["Ann"]


# ---- the command line


def test_a_token_comes_with_its_link_and_qr_code(db, tmp_path):
    code = tmp_path / "ann.svg"
    result = run("add-annotator", "ann", f"--db={db}", "--address=https://lab.example:8000/", f"--qr={code}")
    token = result.stdout.strip()
    assert f"https://lab.example:8000/login#token={token}" in result.stderr.splitlines()
    assert (
        ElementTree.parse(code).getroot().tag.endswith("svg") and stat.S_IMODE(code.stat().st_mode) == 0o600
    )
    result = run("new-token", "ann", f"--db={db}", f"--qr={tmp_path / 'b.png'}", "--address=http://lab")
    assert (tmp_path / "b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Store.open(db, create=False) as store:
        assert store.authenticate(token) is None and store.authenticate(result.stdout.strip()).name == "ann"
    run("add-annotator", "ada", "--admin", f"--db={db}")
    run("add-annotator", "bea", "--admin", f"--db={db}")
    first = run("revoke", "ada", f"--db={db}")
    last = run("revoke", "bea", f"--db={db}")
    assert first.exit_code == last.exit_code == 0
    assert len(last.stderr.splitlines()) == len(first.stderr.splitlines()) + 1, "that no admin is left"


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--qr={tmp}/a.gif", "--address=http://x"], ("--qr", ".svg", ".png", "a.gif")),
        (["--qr={tmp}/a.svg"], ("--qr", "--address")),
        (["--qr={tmp}/labels.db.svg", "--address=lab:8000"], ("--address", "'lab:8000'", "https://")),
        (["--address=https://u:p@lab"], ("--address", "'https://u:p@lab'")),
    ],
)
def test_nothing_is_made_where_the_link_cannot_be_handed_over(db, tmp_path, flags, names):
    result = run("add-annotator", "ann", f"--db={db}", *(flag.format(tmp=tmp_path) for flag in flags))
    rejected(result, *names)
    with Store.open(db, create=False) as store:
        assert store.annotators() == []


def test_status_counts_what_counts(tmp_path):
    with serving.running(tmp_path, exposed=True, limits=GENEROUS) as served:
        for name, count in (("ann", 4), ("bob", 2)):
            page = served.browser(served.store.add_annotator(name))
            done = answered(page, count)
        page.post("/api/undo", json={"key": "u", "assignment": done[-1]})
        rows = list(served.store.judgements())
    shown = json.loads(run("status", "--json", f"--db=sqlite:///{tmp_path / 'labels.db'}").stdout)[
        "campaigns"
    ][0]
    # practice answers are stored, but they are no answers of the campaign
    counted = Counter(row.annotator for row in rows if row.kind is not Kind.TRAINING)
    assert len(rows) == 5 and counted.total() < 5
    assert (
        shown["judgements"] == counted.total()
        and shown["annotators"] == {name: counted[name] for name in ("ann", "bob") if counted[name]}
        and shown["last"]
    )
