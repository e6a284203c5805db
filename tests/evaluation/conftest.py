"""A tiny tuned run with its control, shared by the tests of the evaluation."""

import types

import pytest

from eg3d_rlhf.evaluation import trainings
from tests.evaluation import comparisons

FAKE = """
import pathlib, sys
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
here = pathlib.Path(__file__)
with here.with_name("calls.txt").open("a") as file: file.write(" ".join(sys.argv[1:]) + "\\n")
run = pathlib.Path(flags["resume"]) if "resume" in flags else pathlib.Path(flags["outdir"]) / "00000-run"
run.mkdir(parents=True, exist_ok=True)
(run / "training_options.json").write_text('{"kimg": 0}')
(run / "checkpoint-000000004.safetensors").write_bytes(b"")
mode = here.with_name("mode.txt").read_text()
if mode == "stop": sys.exit(0)
if mode == "fail": sys.exit("ValueError: --batch: too many")
(run / "network-snapshot-000000.pkl").write_bytes(b"")
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """A stand-in for train.py that notes its calls; its snapshots are pickles of 0 kimg, and so long are its
    runs.
    """
    script, calls, mode = (tmp_path / name for name in ("train.py", "calls.txt", "mode.txt"))
    script.write_text(FAKE)
    mode.write_text("train")
    monkeypatch.setattr(trainings, "TRAIN", str(script))
    return types.SimpleNamespace(calls=lambda: calls.read_text().splitlines(), mode=mode.write_text)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders (tuned, control) of two tiny runs."""
    root = tmp_path_factory.mktemp("pair")
    tuned = comparisons.write_run(root / "00000-tuned", {64: 0.02, 128: 0.05, 192: 0.1}, 10.0)
    return tuned, comparisons.write_run(
        root / "00001-control", {64: 0.001, 128: 0.002, 192: 0.002}, 0.0, noise=2
    )


@pytest.fixture(scope="session")
def tiny_comparison(tiny_networks, tiny_reward, tiny_pair, tiny_data):
    """Before, after and control with snapshots, and a dataset."""
    tuned, control = tiny_pair
    return comparisons.load(tiny_networks, tiny_reward, after=tuned, control=control, data=str(tiny_data))


@pytest.fixture(scope="session")
def unchanged(tiny_networks, tiny_reward, tiny_data):
    """A comparison of a generator with itself."""
    return comparisons.load(tiny_networks, tiny_reward, after=tiny_networks, data=str(tiny_data))
