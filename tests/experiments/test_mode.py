"""A mode: one file gives train.py a job with a folder, its record, --resume, --dry-run and clean ends."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.core import registry
from eg3d_rlhf.experiments.mode import Mode
from eg3d_rlhf.modes import MODES
from tests.rejections import raising, rejected
from training.config import knob

REPO = Path(__file__).parents[2]


@pytest.fixture
def count(tmp_path, monkeypatch):
    """The mode of docs/extending.md as a plugin; returns a function that runs it."""
    text = (REPO / "docs" / "extending.md").read_text().partition("## A new mode\n")[2].partition("\n## ")[0]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    (tmp_path / "count_mode.py").write_text(code)
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "count_mode.py"))
    monkeypatch.setitem(MODES._entries, "count", None)  # so that it is forgotten in the end
    del MODES._entries["count"]
    monkeypatch.setattr(registry, "_loaded", set())
    yield lambda *flags: CliRunner().invoke(train.main, ["--mode=count", *map(str, flags)])
    sys.modules.pop("count_mode", None)


def test_the_page_is_a_whole_mode(count, tmp_path):
    result = count("--steps=3", "--set=desc=far", f"--outdir={tmp_path / 'runs'}")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "00000-count-far"
    assert json.loads((folder / "training_options.json").read_text())["settings"] == {"steps": 3}
    assert len((folder / "stats.jsonl").read_text().splitlines()) == 3
    assert str(folder) in result.stdout
    assert (
        count("--steps=3", f"--outdir={tmp_path / 'runs'}").exit_code == 0
        and (tmp_path / "runs" / "00001-count").is_dir()
    )
    before = (folder / "stats.jsonl").read_bytes()
    assert count(f"--resume={folder}").exit_code == 0 and (folder / "stats.jsonl").read_bytes() == before
    # the flags of the first command may be typed again
    same_flags = ("--steps=3", "--set=desc=far", f"--outdir={tmp_path / 'runs'}")
    assert count(f"--resume={folder}", *same_flags).exit_code == 0
    rejected(count(f"--resume={folder}", "--set=desc=near"), "desc=near", "--resume")
    rejected(count(f"--resume={folder}", f"--outdir={tmp_path}"), "--outdir", "--resume")


def test_what_is_shown_and_what_is_refused(count, tmp_path):
    result = count("-n", "--steps=4", f"--outdir={tmp_path / 'runs'}")
    assert json.loads(result.stdout) == {"steps": 4} and not (tmp_path / "runs").exists()
    assert (
        "Counting:" in count("--help").stdout
        and "count" in CliRunner().invoke(train.main, ["--mode=other"]).stderr
    )
    assert count("--steps=0").exit_code == 2
    rejected(count("--gamma=1"), "--gamma", "--mode=gan")
    rejected(CliRunner().invoke(train.main, ["--steps=2"]), "--steps")
    rejected(count(f"--resume={tmp_path}"), "--resume", "training_options.json")
    count("--steps=1", f"--outdir={tmp_path / 'runs'}")
    rejected(count(f"--resume={tmp_path / 'runs' / '00000-count'}", "--steps=5"), "--steps", "--resume")
    rejected(
        CliRunner().invoke(train.main, ["--mode=grpo", f"--resume={tmp_path / 'runs' / '00000-count'}"]),
        "--mode=count",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = knob(3, "Of what is inside.", "Inside", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a",)


def test_nested_settings_are_read_as_they_were_written(tmp_path):
    seen = []

    def work(settings, opened, run):
        seen.append(settings)

    mode = Mode(name="nested", help="", settings=Outer, open=lambda settings, run: None, work=work)
    settings = Outer(inner=Inner(size=5), names=("b", "c"))
    folder = mode.start(settings, tmp_path)
    assert (
        mode.read(folder) == settings
        and mode.resume(mode.read(folder), folder) == folder
        and seen == [settings, settings]
    )
    with raising("inner.size"):
        mode.resume(Outer(), folder)


@pytest.mark.parametrize("how", ["noted", "raised"])
def test_a_signal_ends_it_with_what_goes_on(how, count, tmp_path, monkeypatch):
    count("-n")  # loads the plugin
    from eg3d_rlhf.experiments.process import StoppedError

    def stopped(settings, opened, run):
        if how == "noted":
            raise StoppedError("SIGTERM after step 1")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(MODES._entries, "count", dataclasses.replace(MODES["count"], work=stopped))
    result = count(f"--outdir={tmp_path / 'runs'}")
    assert result.exit_code == 130 and "--resume=RUN" in result.stderr
    assert not (tmp_path / "runs" / "00000-count" / "run.lock").exists()


def test_a_mistake_leaves_no_folder(count, tmp_path, monkeypatch):
    count("-n")

    def mistaken(settings, run):
        raise ValueError("--steps must be even, got 3")

    monkeypatch.setitem(MODES._entries, "count", dataclasses.replace(MODES["count"], open=mistaken))
    rejected(count("--steps=3", f"--outdir={tmp_path / 'runs'}"), "--steps", "got 3")
    assert not (tmp_path / "runs").exists()
