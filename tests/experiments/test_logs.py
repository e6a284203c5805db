"""What is logged beside stats.jsonl: the same numbers, whatever happens to the run."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.experiments import logs
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import STATS
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import tiny_config
from tests.tuning.flow.tiny_trainings import at, interrupt, run


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def written(folder) -> dict[str, list[tuple[int, float]]]:
    lines = [json.loads(line) for line in (folder / STATS).read_text().splitlines()]
    values: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in logs.numbers(line):
            if name != "step":
                values.setdefault(name, []).append((line["step"], value))
    return values


def test_tensorboard_has_the_numbers_of_stats_of_a_run_that_was_stopped_and_resumed_too(tmp_path):
    config = tiny_config(log="tensorboard", steps=12, log_every=2, checkpoint_every=5)
    with pytest.raises((KeyboardInterrupt, StoppedError)):
        # the last state is of update 5
        run(tmp_path / "run", config=config, say=at("step      8/", interrupt))
    run(tmp_path / "run", config=config, resume=True)
    expected = written(tmp_path / "run")
    got = scalars(tmp_path / "run" / "tensorboard")
    assert {"loss", "margin", "lr", "time_bins/margin/3"} <= expected.keys() == got.keys()
    for name, values in expected.items():
        assert [step for step, _ in got[name]] == [step for step, _ in values], name
        np.testing.assert_allclose(
            [value for _, value in got[name]], [value for _, value in values], rtol=1e-6, err_msg=name
        )
    plain = run(tmp_path / "plain", config=tiny_config(steps=12, log_every=2, checkpoint_every=5))
    assert (plain.weights.parent / STATS).read_bytes() == (tmp_path / "run" / STATS).read_bytes()


def test_another_name_and_a_missing_package_are_one_line_with_what_to_install(monkeypatch):
    with raising("--log", "tensorboard", "wandb", "trackio", "'tensorbord'"):
        tiny_config(log="tensorbord")
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with raising("--log=trackio", "'eg3d-rlhf[trackio]'"):
        tiny_config(log="trackio")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_told_the_same_once_there_is_a_line(tmp_path, monkeypatch, name):
    told = []
    package = types.ModuleType(name)
    package.init = lambda **settings: told.append(
        ("init", settings["project"], settings["config"], settings["resume"])
    )
    package.log = lambda values, step: told.append(("log", values, step))
    package.finish = lambda: told.append("finish")
    package.Image = lambda path: f"picture {path}"
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    for lines in (0, 1):
        log = logs.Log(name, tmp_path, {"lr": 0.1})
        for step in range(lines):
            log.line({"step": step, "loss": 0.5, "bins": {"n": [1, None]}})
            log.image("samples", tmp_path / "a.png", step)
        log.close()
    assert told == [
        ("init", "eg3d-rlhf", {"lr": 0.1}, "allow"),
        ("log", {"loss": 0.5, "bins/n/0": 1.0}, 0),
        ("log", {"samples": f"picture {tmp_path}/a.png"}, 0),
        "finish",
    ]
