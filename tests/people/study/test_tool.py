"""tools/study.py from the outside: its flags, a study designed, served, answered and reported,
and mistakes.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.study.design import content_hash
from tests import tiny_runs
from tests.people.study.people import Person
from tests.rejections import check_message, rejected
from tools import study
from training import networks

SMALL = (
    "--annotators=2",
    "--n=12",
    "--gold-every=4",
    *(
        f"--set={setting}"
        for setting in ("resolution=16", "level=1.1", "triangles=400", "resamples=200", "psi=1")
    ),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_networks):
    path = tmp_path_factory.mktemp("after") / "after.safetensors"
    nets = tiny_runs.build_networks()
    for parameter in nets.G_ema.parameters():
        parameter.data.mul_(1.2)
    networks.save(path, nets)
    return (f"--a={tiny_networks}", f"--b={path}")


@pytest.fixture
def served(monkeypatch):
    """Servers that were started, without starting them."""
    started = []
    serve = lambda options, *args, **kwargs: started.append((options.campaign, args))  # noqa: E731
    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    return started


def run(*flags):
    return CliRunner().invoke(study.main, [str(f) for f in flags])


def stopped(result, *names):
    """Check an error that follows lines of warning or progress."""
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: "), result.stderr
    check_message(line, names)


def answer_all(folder: Path, *people: Person) -> None:
    from eg3d_rlhf.people.study.design import read_design

    design = read_design(folder / "design.json")
    with Store.open(f"sqlite:///{folder / 'study.db'}", create=False) as store:
        campaign = store.campaign(design.name).id
        for person in people:
            person.answer(store, campaign, design)


def test_a_study_from_design_to_report(pair, tmp_path, served):
    folder = tmp_path / "mine"
    started = run(*pair, *SMALL, f"--outdir={folder}")
    assert started.exit_code == 0, started.output
    assert started.stderr.startswith("--n=12") and "0 of 12" in started.stderr
    assert served == [("mine", ("127.0.0.1", 8000))]
    assert (
        run(f"--outdir={folder}").exit_code == 0 and run(*pair, *SMALL, f"--outdir={folder}").exit_code == 0
    )
    stopped(run("report", f"--outdir={folder}"), "mine", "12", "0", "--interim")
    early = run(f"--outdir={folder}", "report", "--interim", "--images=0")
    assert early.exit_code == 0 and "0 of 12" in early.stdout and (folder / "interim-report.html").is_file()
    answer_all(folder, Person("ann", 0.9), Person("bob", 0.9))
    stopped(run(f"--outdir={folder}"), "mine", "12 of 12", f"report --outdir={folder}")
    done = run("report", f"--outdir={folder}", "--images=1")
    assert done.exit_code == 0 and " 12 " in done.stdout, done.output
    report = json.loads((folder / "report.json").read_text())
    assert report["answered"] == 12 and not report["interim"] and (folder / "report.html").is_file()


def test_a_design_that_was_altered_stops_everything(pair, tmp_path, served):
    folder = tmp_path / "altered"
    assert run(*pair, *SMALL, f"--outdir={folder}").exit_code == 0
    path = folder / "design.json"
    original = path.read_text()
    made = json.loads(original)
    content = {**made, "trials": 2}
    path.write_text(json.dumps(content))
    for command in ((f"--outdir={folder}",), ("report", f"--outdir={folder}", "--interim")):
        rejected(run(*command), str(path), made["hash"][:12])
    content["hash"] = content_hash(content)
    path.write_text(json.dumps(content))
    for command in ((f"--outdir={folder}",), ("report", f"--outdir={folder}", "--interim")):
        rejected(run(*command), str(path), made["hash"][:12])
    path.unlink()
    rejected(run(*pair, *SMALL, f"--outdir={folder}"), str(path), "'altered'", "--set name")
    path.write_text(original)
    assert run(f"--outdir={folder}").exit_code == 0 and len(served) == 2


def test_flags_cannot_change_a_study(pair, tmp_path, served):
    folder = tmp_path / "fixed"
    assert run(*pair, *SMALL, f"--outdir={folder}").exit_code == 0
    rejected(run(f"--outdir={folder}", "--n=13"), "--n", "12", "13", "--outdir")
    rejected(run(f"--outdir={folder}", "--ties=excluded"), "--ties", "half", "excluded")
    result = run(f"--outdir={folder}", "--set=gold_accuracy=0.1")
    rejected(result, "--set gold_accuracy", "0.75", "0.1")
    rejected(run(f"--outdir={folder}", pair[1].replace("--b", "--a")), "--a", "after.safetensors")
    rejected(run(f"--outdir={folder}", "--set=name=other"), "--set name", "'fixed'", "other")
    copied = tmp_path / "b.safetensors"
    copied.write_bytes(Path(pair[1].removeprefix("--b=")).read_bytes())
    assert run(pair[0], f"--b={copied}", *SMALL, f"--outdir={tmp_path / 's'}").exit_code == 0
    copied.write_bytes(Path(pair[0].removeprefix("--a=")).read_bytes())
    rejected(run(f"--outdir={tmp_path / 's'}"), "--b", str(copied))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), ("--a", "--b", "network")),
        (("--b=/nowhere.pt",), ("--b", "/nowhere.pt")),
        (("--true-rate=0.5",), ("--true-rate", "0.5")),
        (("--annotators=2", "--annotators-per-pair=3"), ("--annotators-per-pair", "2", "3")),
        (("--n=5", "power"), ("--n", "--outdir", "--db", "power")),
        (("report", "--outdir=/nowhere"), ("/nowhere/design.json",)),
        (("power", "--annotators=3", "--set=annotator_icc=0.3"), ("--annotators", "65", "3", "0.3")),
        (("simulate", "--set=left_bias=1"), ("left_bias", "0<x<1")),
    ],
)
def test_mistakes_are_one_line(flags, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rejected(run(*flags), *names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--gold-every=1",), ("--gold-every", ">= 2", "1")),
        (("--set=until=soon",), ("--set until", "ISO 8601", "'soon'")),
        (("--host=0.0.0.0",), ("--host=0.0.0.0", "add-annotator")),
    ],
)
def test_mistakes_in_a_design_leave_no_files(pair, tmp_path, flags, names):
    folder = tmp_path / "none"
    stopped(run(*pair, *SMALL, f"--outdir={folder}", *flags), *names)
    assert not (folder / "design.json").exists()


def test_a_dry_run_shows_the_design_and_writes_nothing(pair, tmp_path):
    result = run(*pair, *SMALL, f"--outdir={tmp_path / 'x'}", "-n")
    shown = json.loads(result.stdout)
    assert result.exit_code == 0 and shown["action"] == "design" and not (tmp_path / "x").exists()
    assert (shown["design"]["trials"], shown["latents"], shown["design"]["annotators_per_pair"]) == (12, 6, 2)
    assert "Warning: --n=12" in result.stderr  # nothing is enough with two annotators
    power = json.loads(run(*pair, "--n=30", f"--outdir={tmp_path / 'x'}", "-n").stdout)["design"]["power"]
    assert power["trials"] > 200 and power["options"]["true_rate"] == 0.6
    shown = json.loads(
        run(*pair, f"--outdir={tmp_path / 'x'}", "--true-rate=0.7", "--set=tie_share=0", "-n").stdout
    )
    assert shown["design"]["trials"] == 54 and shown["design"]["power"]["decided"] == 54, (
        "without --n the calculation decides"
    )
    folder = tmp_path / "00000-x.v1.5"  # a run folder's name is not cut at a dot
    folder.mkdir()
    (folder / "network-snapshot-000001.safetensors").write_bytes(
        Path(pair[1].removeprefix("--b=")).read_bytes()
    )
    shown = json.loads(run(pair[0], f"--b={folder}", *SMALL, f"--outdir={tmp_path / 'x'}", "-n").stdout)
    assert shown["design"]["b"]["label"] == "00000-x.v1.5"


def test_a_study_without_a_surface_is_not_designed(pair, served, tmp_path):
    """The density of the tiny networks does not reach the default level."""
    folder = tmp_path / "x"
    result = run(*pair, "--n=400", f"--outdir={folder}")
    assert result.exit_code == 2 and not served and not (folder / "design.json").exists()
    assert "--a: " in result.stderr and "--set level=" in result.stderr


def test_a_run_is_compared_with_the_network_from_which_it_began(pair, tmp_path):
    """It is the side that no flag names, and never the bundled generator in its place."""
    before = Path(pair[0].removeprefix("--a="))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "network-snapshot-000001.safetensors").write_bytes(
        Path(pair[1].removeprefix("--b=")).read_bytes()
    )
    record = {"init": str(before), "hashes": {"init": file_hash(before)}}
    (folder / "training_options.json").write_text(json.dumps(record))
    for side in ("a", "b"):
        shown = run(f"--{side}={folder}", *SMALL, f"--outdir={tmp_path / 'x'}", "-n")
        other = "b" if side == "a" else "a"
        assert json.loads(shown.stdout)["design"][other]["source"] == str(before.resolve()), shown.output
    (folder / "training_options.json").write_text(json.dumps({**record, "init": str(tmp_path / "gone.pkl")}))
    result = run(f"--b={folder}", *SMALL, f"--outdir={tmp_path / 'x'}", "-n")
    assert result.exit_code == 2
    # a warning on the number of trials comes first
    check_message(result.stderr.splitlines()[-1], ("--a", "gone.pkl", str(folder)))


def test_what_is_printed_counts_who_has_a_token(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "eg3d_rlhf.people.label.server.app.serve",
        lambda *args, on_listening, **kwargs: on_listening("http://127.0.0.1:1/"),
    )
    folder = tmp_path / "x"
    line = run(*pair, *SMALL, f"--outdir={folder}").stdout.splitlines()[-1]
    assert {"0", "2"} <= set(line.split()) and "add-annotator" in line
    for name in ("ann", "bob"):
        run(f"--outdir={folder}", "add-annotator", name)
    line = run(f"--outdir={folder}").stdout.splitlines()[-1]
    assert "2" in line.split() and "add-annotator" not in line


def test_power_and_simulation_print_and_speak_json():
    assert "54" in run("power", "--true-rate=0.7").stdout.split()
    size = json.loads(run("power", "--true-rate=0.7", "--n=49", "--json").stdout)
    assert size["decided"] == 54 and size["power_of_n"]["power"] == pytest.approx(0.81, abs=1e-3)
    result = json.loads(
        run("simulate", "--studies=50", "--set=latents=40", "--set=bootstrap_studies=5", "--json").stdout
    )
    assert set(result["intervals"]) == {
        "clustered",
        "wilson",
        "bootstrap_annotators",
        "bootstrap_latents",
        "bootstrap_both",
    }
    assert "clustered" in run("simulate", "--studies=50").stdout
