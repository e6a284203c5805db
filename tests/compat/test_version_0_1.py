"""Folders that version 0.1 left on a disk: the present commands open them, compute the same numbers, and make
nothing in them again. tests/references/version_0_1/make.py made them with that version's own code.
"""

import json
import runpy
import shutil
import sqlite3
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests import tiny_runs
from tests.compat.reference import OURS

ARCHIVE = OURS / "version_0_1" / "folders.tar.xz"
FINISHED = Path("runs/00000-heads64-data-batch4-gamma0.3-sigma-lambda10-finished")
STOPPED = Path("runs/00001-heads64-data-batch4-gamma0.3-sigma-lambda10-stopped")
SNAPSHOT = "network-snapshot-000000.safetensors"
WORK = Path("WORK")
# computed again on another processor, in single precision
NEAR = {"rel": 1e-3, "abs": 1e-4}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """A copy of the folders, in which the test works: their paths are relative."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job(monkeypatch, capsys):
    """Runs a command of eg3d-rlhf in this process; returns what it printed on stdout."""

    def call(*words: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["eg3d-rlhf", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("eg3d_rlhf", run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code in (0, None), printed.err
        return printed.out

    return call


def contents(*folders: Path) -> dict[str, bytes]:
    """The bytes of all files below some folders, by path."""
    return {str(path): path.read_bytes() for f in folders for path in f.rglob("*") if path.is_file()}


def rows(database: Path, columns_of: Path) -> dict[str, list[tuple]]:
    """The rows of each table of an SQLite database, in the columns that the tables of another one have."""
    ours = sqlite3.connect(database)
    other = sqlite3.connect(columns_of)
    # the table of versions gains a row whenever the database is brought to a later one
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'schema_versions'"
    tables = [name for (name,) in other.execute(query)]
    found = {}
    for table in tables:
        names = ", ".join(f'"{row[1]}"' for row in other.execute(f'PRAGMA table_info("{table}")'))
        found[table] = ours.execute(f'SELECT {names} FROM "{table}" ORDER BY 1').fetchall()
    return found


def assert_near(found: object, expected: object) -> None:
    """Equal JSON values; numbers may differ by rounding, and new keys may have come."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and expected.keys() <= found.keys()
        for name, value in expected.items():
            assert_near(found[name], value)
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **NEAR)
    else:
        assert found == expected


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_network_is_read(folders, job):
    found = json.loads(job("generator", "inspect", "network.safetensors", "--json"))
    facts = json.loads(Path("expected/reward-shift.json").read_text())["facts"]
    assert found["networks"]["G_ema"]["hash"] == facts["networks"]["before"]


def test_a_run_that_was_stopped_ends_as_the_one_that_was_not(folders):
    result = tiny_runs.run(f"--resume={STOPPED}", "--kimg=0.016")
    assert result.exit_code == 0, result.output
    expected = load_file(FINISHED / SNAPSHOT)
    found = load_file(STOPPED / SNAPSHOT)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].numpy() == pytest.approx(value.numpy(), rel=1e-2, abs=1e-3), name
    stopped, finished = (
        [version_0_1.gan_stats(line) for line in lines(run / "stats.jsonl")] for run in (STOPPED, FINISHED)
    )
    assert_near(stopped, finished)


def test_a_reward_scores_as_before_in_the_report_of_a_finished_run(folders, job):
    flags = ("--only=reward-shift", "--n=16", "--device=cpu", "--outdir=found")
    job("report", "evaluate", "--before=network.safetensors", f"--run={FINISHED}", *flags)
    found = json.loads(Path("found/data/reward-shift.json").read_text())
    expected = json.loads(Path("expected/reward-shift.json").read_text())
    assert found["facts"]["networks"] == expected["facts"]["networks"]  # the reward's hash among them
    assert_near(found["data"], expected["data"])


@pytest.mark.parametrize("kind", ["labels", "judgements"])
def test_a_store_of_labels_gives_the_same_export(folders, job, kind):
    job("label", "export", "found.jsonl", "--db=sqlite:///labels.db", f"--kind={kind}")
    assert_near(lines(Path("found.jsonl")), lines(Path(f"{kind}.jsonl")))


def test_exported_judgements_go_into_a_new_store(folders, job):
    job("label", "import", "judgements.jsonl", "--db=sqlite:///new.db")
    job("label", "export", "found.jsonl", "--db=sqlite:///new.db")
    sides = [(line["winner"], line["loser"]) for line in lines(Path("labels.jsonl"))]
    assert [(line["winner"], line["loser"]) for line in lines(Path("found.jsonl"))] == sides


def test_labels_teach_a_new_reward(folders, job):
    flags = ("--preset=tiny", "--epochs=1", "--resolution=16", "--device=cpu", "--run-dir=new")
    job("reward", "train", "--labels=labels.jsonl", "--network=network.safetensors", *flags)
    assert Path("new/reward.safetensors").is_file()


def test_a_study_is_reported(folders, job):
    job("study", "report", "--outdir=study", "--images=0")
    found = json.loads(Path("study/report.json").read_text())
    expected = json.loads(Path("expected/study.json").read_text())
    del expected["reported"]  # the time
    expected.pop("conclusions")  # sentences
    expected["images"] = expected.pop("pictures")  # keys that were renamed since
    assert_near(found, expected)


def test_assets_answers_and_stages_of_a_folder_are_never_made_again(folders, job):
    before = contents(WORK)
    shutil.copy(WORK / "labels.db", "before.db")
    job("flow", "sample", WORK, "--device=cpu")
    tune = ("--steps=2", "--batch=4", "--set=held_out_every=1", "--set=lora_rank=1", "--set=warmup=0")
    job("flow", "tune", WORK, "--device=cpu", "--stage=structure", *tune)
    # a database of an earlier version gets new columns when it is opened, and keeps its rows
    assert rows(WORK / "labels.db", Path("before.db")) == rows(Path("before.db"), Path("before.db"))
    left_out = {"report.json", "report.md", "labels.db"}
    after = contents(WORK)
    assert {name: after.get(name) for name in before if Path(name).name not in left_out} == {
        name: value for name, value in before.items() if Path(name).name not in left_out
    }
    assert not list(WORK.glob("tune-01"))
    tuned, expected = (json.loads(files["WORK/tune-00/report.json"]) for files in (after, before))
    expected = version_0_1.settings(expected)
    expected["evaluators"] = expected.pop("judges")  # keys that were renamed since
    expected["settings"] = version_0_1.options(expected["settings"])
    for stage in expected["stages"].values():
        for old, new in (("learnt", "learnable_signal"), ("runs_away", "likelihood_displacement")):
            stage[new] = stage.pop(old)
        del stage["why"]  # a sentence
    assert_near(tuned, expected)


def test_embeddings_are_found_under_their_old_name(folders):
    assert Work.open(WORK).conditions_file == WORK / "conditions.safetensors"
    (WORK / "conditions.safetensors").rename(WORK / "conditioning.safetensors")
    assert Work.open(WORK).conditions_file == WORK / "conditioning.safetensors"


def test_settings_of_a_reward_are_read_under_their_present_names(folders, job):
    recorded = json.loads(Path("reward/training_options.json").read_text())
    shown = json.loads(job("reward", "train", "--resume=reward", "--dry-run"))
    assert shown["train"]["reference_samples"] == recorded["train"]["anchors"]
    assert {**shown["train"], "anchors": None, "reference_samples": None} == {
        **recorded["train"],
        "anchors": None,
        "reference_samples": None,
    }


def test_settings_of_a_run_are_read_under_their_present_names(folders):
    recorded = json.loads((STOPPED / "training_options.json").read_text())
    shown = json.loads(tiny_runs.run(f"--resume={STOPPED}", "--dry-run").stdout)
    for old, now in (
        ("anchor_gate", "consistency_gate"),
        ("anchor_psi", "consistency_psi"),
        ("anchor_resolution", "consistency_resolution"),
        ("reward_watch", "heldout_reward"),
    ):
        assert shown[now] == recorded[old] and old not in shown


def test_a_tuned_stage_is_found_by_its_hash_and_exported(folders, job):
    (artefact,) = Path("stages/artefacts").glob("structure-human-*")
    before = contents(artefact)
    flags = (
        "--stage=structure",
        "--steps=2",
        "--batch=4",
        "--lora-rank=1",
        "--table-noises=2",
        "--device=cpu",
        "--no-control",
    )
    result = tiny_runs.run("--mode=circular-dpo", *flags, "--outdir=stages")
    assert result.exit_code == 0, result.output
    assert contents(artefact) == before
    assert list(Path("stages/artefacts").glob("structure-human-*")) == [artefact]
    job("flow", "export", "stages/00000-circular-dpo-toy-stage-structure", "--outdir=TUNED")
    assert Path("TUNED/structure.safetensors").is_file()
