"""One run of any kind of job: its record, what a resume checks, its lines and states."""

import errno
import json
import os

import pytest
import torch

from eg3d_rlhf.experiments.run import OPTIONS, Run, begun_by_this_launch, claim, next_free, recorded
from tests.rejections import raising
from training.distributed import Ranks


@pytest.fixture
def begun(tmp_path):
    """Folder, settings and inputs of a run that was begun."""
    network = tmp_path / "network.bin"
    network.write_bytes(b"weights")
    settings = {"kind": "toy", "loop": {"lr": 0.1, "steps": 4}}
    inputs = {"init": network}
    folder = claim(next_free(tmp_path / "runs", "toy"))
    with Run(folder, settings, inputs) as run:
        run.begin()
    return folder, settings, inputs


def test_a_run_records_what_it_starts_from(begun):
    folder, settings, _ = begun
    record = recorded(folder)
    assert {k: record[k] for k in settings} == settings and len(record["hashes"]["init"]) == 64
    assert record["processes"] == 1 and "torch" in record["versions"] and folder.name == "00000-toy"
    assert [p.name for p in folder.iterdir()] == [OPTIONS], "the lock is gone"


def test_another_input_is_refused_by_name_on_resume(begun):
    folder, settings, inputs = begun
    with Run(folder, settings, inputs) as run:
        run.resume()
    inputs["init"].write_bytes(b"others")
    with (
        Run(folder, settings, inputs) as run,
        raising("--resume", f"init {inputs['init']}"),
    ):
        run.resume()


def test_other_settings_are_refused_by_name_unless_they_may_change(begun):
    folder, settings, inputs = begun
    other = {"kind": "toy", "loop": {"lr": 0.1, "steps": 8}, "new": 1}
    with (
        Run(folder, other, inputs) as run,
        raising(str(folder), "loop.steps 8 ", " 4;", "new 1 ", " None"),
    ):
        run.resume()
    with Run(folder, other, inputs) as run:
        run.resume(free_settings=("steps", "new"))
        run.resume(free_settings=None)


def test_a_run_that_was_begun_before_a_setting_was_there_goes_on(begun):
    folder, settings, inputs = begun
    with Run(folder, {"kind": "toy", "loop": {**settings["loop"], "later": 3}}, inputs) as run:
        run.resume()
    with (
        Run(folder, {**settings, "kind": {"name": "toy"}}, inputs) as run,
        raising(str(folder), "kind.name toy"),
    ):
        run.resume()


def test_two_runs_in_one_folder_are_refused(begun):
    folder, settings, inputs = begun
    with (
        Run(folder, settings, inputs),
        raising(str(folder), str(os.getpid())),
    ):
        with Run(folder, settings, inputs):
            pass


def test_lines_and_states_go_on_where_the_state_was_written(begun, capsys):
    folder, settings, inputs = begun
    with Run(folder, settings, inputs) as run:
        for step in (1, 2, 3):
            run.stats({"step": step})
            run.checkpoint(step, {"w": torch.full([2], float(step))}, {"lines": run.lines})
        run.status({"step": "3   "}, 3, 6, "step", {"loss": "0.5"})
        run.stats({"step": "lost"})
    assert [p.name for p in sorted(folder.glob("checkpoint*"))] == [
        "checkpoint-000000002.safetensors",
        "checkpoint-000000003.safetensors",
    ]
    line = capsys.readouterr().out
    assert line.startswith("step 3    time 00:00 ") and line.rstrip().endswith("loss 0.5")
    assert "sec/step 0.0" in line and "eta 00:00" in line
    assert json.loads((folder / "timing.jsonl").read_text())["step"] == 3
    with Run(folder, settings, inputs) as run:
        tensors, meta = run.read()
        run.continue_from(3, meta["lines"])
        run.stats({"step": 4})
    assert tensors["w"].tolist() == [3, 3] and run.last_checkpoint.name == "checkpoint-000000003.safetensors"
    assert [json.loads(line)["step"] for line in (folder / "stats.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]


def test_a_folder_that_cannot_be_written_names_the_last_state(begun):
    folder, settings, inputs = begun
    with (
        Run(folder, settings, inputs) as run,
        raising(str(folder), os.strerror(errno.ENOSPC), "No checkpoint", kind=OSError),
    ):
        with run.writing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_ranks_write_nothing(begun):
    folder, settings, inputs = begun
    with Run(folder, settings, inputs, ranks=Ranks(rank=1, world=2)) as run:
        run.begin()
        run.stats({"step": 1})
        run.status({}, 1, 2, "step")
    assert [p.name for p in folder.iterdir()] == [OPTIONS] and run.lines == 0


def test_runs_that_start_together_take_different_folders(tmp_path):
    wanted = next_free(tmp_path, "a")
    assert [claim(wanted).name for _ in range(3)] == ["00000-a", "00001-a", "00002-a"]
    assert begun_by_this_launch(tmp_path) is None
