"""tools/label.py from the outside: its flags, planning and resuming, sub-commands, and one line for every
mistake.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes import label
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store import Store
from tests.people.label import serving
from tests.people.label.plans import answer_all
from tests.rejections import rejected


def run(*flags) -> object:
    return CliRunner().invoke(label.main, [str(f) for f in flags])


@pytest.fixture
def db(tmp_path) -> str:
    """URL of a database that does not exist yet, in a folder that does not either."""
    return f"sqlite:///{tmp_path / 'new' / 'labels.db'}"


@pytest.fixture
def planned(db, monkeypatch):
    """Start the command without serving; returns the result and what would have been served."""
    served = []
    monkeypatch.setattr(
        "eg3d_rlhf.people.label.server.app.serve",
        lambda options, *args, **kwargs: served.append((options, args, kwargs)),
    )

    def go(*flags):
        served.clear()
        result = run(f"--db={db}", *flags)
        return result, served[0] if served else None

    return go


def test_dry_run_prints_everything_and_touches_nothing(db, tmp_path):
    result = run(
        "-n", f"--db={db}", "--pairs=7", "--strategy=active", "--seed=3", f"--set=cache={tmp_path / 'cache'}"
    )
    settings = json.loads(result.stdout)
    expected = {
        "action": "plan",
        "pairs": 7,
        "strategy": "active",
        "seed": 3,
        "network": None,
        "host": "127.0.0.1",
        "exposed": False,
    }
    assert {k: settings[k] for k in expected} == expected and list(tmp_path.iterdir()) == []
    dashes = run("-n", "--first-seed=5", "--annotators-per-pair=2", "--set=repeat-share=0.2")
    assert (
        run("-n", "--first_seed=5", "--annotators_per_pair=2", "--set=repeat_share=0.2").stdout
        == dashes.stdout
        != run("-n").stdout
    )
    assert "sesame" not in run("-n", "--db=postgresql://user:sesame@127.0.0.1:1/x").output
    defaults = launch.with_defaults(
        {"pairs": None, "gold_every": None, "psi": 0.3, "db": None}, PairingOptions, CampaignSettings
    )
    assert defaults == {"pairs": 1000, "gold_every": 25, "psi": 0.3, "db": None}


def test_a_campaign_is_planned_once_and_taken_up_again(planned, db):
    first, (options, args, _) = planned("--pairs=5", "--seed=2", "--set=psi=0.8")
    assert first.exit_code == 0, first.stderr
    assert (
        "12" in first.stdout.split()
        and args == ("127.0.0.1", 8000)
        and options.campaign == "labels"
        and not options.exposed
    )
    assert options.preparation is not None and options.access_log.name == "access.jsonl"
    with Store.open(db, create=False) as store:
        shapes = store.shapes(1)
        # 3 practice answers, which are not counted, and one answer
        answer_all(store, 1, store.annotator_without_token("local", "admin").id, most=4)
    again, (options, _, _) = planned()
    assert {"12", "1"} <= set(again.stdout.split()), "pairs, and judgements so far"
    with Store.open(db, create=False) as store:
        assert (
            store.shapes(1) == shapes and len(store.campaigns()) == 1 and {s.psi for _, s in shapes} == {0.8}
        )
    resumed = json.loads(run(f"--db={db}", "-n").stdout)
    assert (resumed["action"], resumed["pairs"], resumed["psi"]) == ("resume", 5, 0.8)


def test_a_resumed_campaign_keeps_its_flags(planned):
    planned("--pairs=5")
    result, served = planned("--pairs=6")
    rejected(result, "--pairs", "5", "'labels'", "6", "--campaign=NAME")
    assert served is None and planned("--pairs=5")[0].exit_code == 0
    rejected(planned("--strategy=tournament")[0], "--strategy", "random", "'labels'", "tournament")


def test_a_tournament_goes_on_from_its_results(planned, db):
    planned("--strategy=tournament", "--pairs=8", "--set=rounds=2", "--campaign=first")
    with Store.open(db, create=False) as store:
        answer_all(store, 1, store.annotator_without_token("local", "admin").id)
        seeds = {s.seed for _, s in store.shapes(1)}
    result, _ = planned(
        "--strategy=tournament", "--pairs=4", "--set=rounds=2", "--campaign=second", "--after=first"
    )
    assert result.exit_code == 0, result.stderr
    with Store.open(db, create=False) as store:
        assert len({s.seed for _, s in store.shapes(2)} & seeds) >= 8
    rejected(planned("--after=first", "--campaign=x")[0], "--after", "--strategy=tournament", "random")
    rejected(planned("--strategy=tournament", "--after=none", "--campaign=x")[0], "--after", "'none'")


def test_exposing_needs_an_annotator_and_says_that_tokens_are_compulsory(planned, db, tmp_path):
    result, served = planned("--pairs=5", "--host=0.0.0.0")
    rejected(result, "--host=0.0.0.0", "token", "add-annotator NAME")
    assert served is None and not (tmp_path / "new").exists()
    assert len(run("add-annotator", "ann", f"--db={db}").stdout.strip()) >= 32
    result, (options, _, kwargs) = planned("--pairs=5", "--host=0.0.0.0")
    assert result.exit_code == 0 and options.exposed
    assert planned("--proxy=127.0.0.1")[1][0].exposed
    run("revoke", "ann", f"--db={db}")
    rejected(planned("--host=0.0.0.0")[0], "--host=0.0.0.0", "add-annotator NAME")


def test_export_and_import(planned, db, tmp_path):
    planned("--pairs=5", "--set=training=0", "--set=gold=0")
    with Store.open(db, create=False) as store:
        me = store.annotator_without_token("local", "admin").id
        for number in range(5):
            answer_all(store, 1, me, most=1, milliseconds=100 * number)
    assert run("export", tmp_path / "all.jsonl", f"--db={db}").exit_code == 0
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 5
    assert "5" in run("export", tmp_path / "mine.csv", "--annotator=local", f"--db={db}").stdout.split()
    assert len((tmp_path / "mine.csv").read_text().splitlines()) == 1 + 5
    (tmp_path / "table.csv").write_text(",rank1,rank2\n0,1,2\n1,3,4\n")
    assert run("export", tmp_path / "whole.jsonl", "--kind=judgements", f"--db={db}").exit_code == 0
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert "5" in run("import", tmp_path / "whole.jsonl", f"--db={other}").stdout.split()
    table = run("import", tmp_path / "table.csv", "--campaign=table", f"--db={other}")
    assert "2" in table.stdout.split()
    status = json.loads(run("status", "--json", f"--db={other}").stdout)
    assert [(c["name"], c["judgements"]) for c in status["campaigns"]] == [("labels", 5), ("table", 2)]
    (line,) = [
        line for line in run("status", f"--db={other}").stdout.splitlines() if line.startswith("labels")
    ]
    assert re.findall(r"\d+", line)[:3] == ["5", "5", "1"], "pairs, judgements, annotators"


MISTAKES = {  # flags -> what the line must name
    "rare": (["--level=3"], ("--level", "--set level=VALUE")),
    "rare before a command": (["--set=level=3", "status"], ("--set level=VALUE", "--db", "status")),
    "missing network": (["--network={tmp}/none.pkl", "-n"], ("--network", "{tmp}/none.pkl")),
    "shares": (
        ["--set=repeat_share=0.3", "--set=swap_share=0.3"],
        ("repeat_share", "swap_share", "0.5", "0.3"),
    ),
    "tournament too small": (["--strategy=tournament", "--pairs=3"], ("pairs", "rounds", "9", "3")),
    "certificate alone": (["--certificate={file}"], ("--certificate", "--key")),
    "no URL": (["--db=labels"], ("--db", "'labels'", "sqlite:///")),
    "another database": (["--db=mysql://x/y"], ("--db", "SQLite", "PostgreSQL", "mysql")),
    "flags before a command": (["--pairs=3", "status"], ("--pairs", "--db", "status")),
    "no database": (["status", "--db=sqlite:///{tmp}/none.db"], ("--db", "{tmp}/none.db")),
    "revoking an unknown annotator": (
        ["revoke", "nobody", "--db=sqlite:///{tmp}/some.db"],
        ("annotator", "'nobody'", "token"),
    ),
    "script in a name": (
        ["add-annotator", "<script>", "--db=sqlite:///{tmp}/some.db"],
        ("annotator", "'<script>'", "80"),
    ),
    "export to another form": (
        ["export", "{tmp}/x.txt", "--db=sqlite:///{tmp}/some.db"],
        ("FILE", ".jsonl", ".csv", "x.txt"),
    ),
    "filter on a whole export": (
        ["export", "{tmp}/x.jsonl", "--kind=judgements", "--drop-repeats"],
        ("--drop-repeats", "--kind=judgements"),
    ),
    "import of another form": (["import", "{file}"], ("FILE", ".jsonl", ".csv", "file.pem")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, tmp_path):
    flags, names = MISTAKES[case]
    file = tmp_path / "file.pem"
    file.write_text("x")
    Store.open(f"sqlite:///{tmp_path / 'some.db'}").close()
    flags = [flag.format(tmp=tmp_path, file=file) for flag in flags]
    if not any(flag.startswith("--db") for flag in flags) and not set(flags) & set(label.main.commands):
        flags.append(f"--db=sqlite:///{tmp_path / 'new' / 'labels.db'}")
    rejected(run(*flags), *(name.format(tmp=tmp_path) for name in names))
    assert not (tmp_path / "new").exists() and not (tmp_path / "none.db").exists()


def test_a_taken_port_is_named(db, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(f"--db={db}", "--pairs=4", f"--port={port}", f"--set=cache={tmp_path / 'cache'}")
    rejected(result, "--host=127.0.0.1", f"--port={port}", "--port=0")


@pytest.mark.long
def test_the_command_serves_prepares_and_stops(repo, db, tmp_path):
    """The whole: the bundled generator, a worker that draws, pairs that can be fetched, Ctrl-C, and the same
    command again.
    """
    settings = ("training=1", "gold=1", "resolution=32", "triangles=2000", f"cache={tmp_path / 'cache'}")
    command = [
        sys.executable,
        "tools/label.py",
        f"--db={db}",
        "--pairs=4",
        "--port=0",
        *(f"--set={setting}" for setting in settings),
    ]
    process = subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or "label at" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "the command ended early"
        url = re.search(r"http://127\.0\.0\.1:\d+", lines[-1]).group()
        client = httpx.Client(base_url=url, verify=False, timeout=30, headers=serving.SAME)
        end = time.monotonic() + 120
        while not (state := client.get("/api/assignments").json())["assignments"]:
            assert state["waiting"] and time.monotonic() < end
            time.sleep(0.2)
        pair = state["assignments"][0]
        mesh = client.get(f"/api/shapes/{pair['left']}").content
        assert mesh[:4] == b"SHP1" and int.from_bytes(mesh[8:12], "little") > 100
        client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
        assert serving.answer(client, pair["assignment"], "k").status_code == 201
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.splitlines(), "a last line says that it ended as it should"
    with Store.open(db, create=False) as store:
        assert len(list(store.judgements())) == 1
