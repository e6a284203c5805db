"""Hostile and damaged files: nothing runs, nothing hangs, nothing fills the memory, and one line says why."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eg3d_rlhf.generators import pickles
from tests.generators.pickles import hostile
from tests.generators.pickles.writer import SnapshotWriter, dumps, stock_networks
from tests.rejections import check_message, raising

SECONDS = 10
MEBIBYTES = 2048
MARKER = Path("executed")
# the cheap ones; all are judged below
NAMES = [name for source in hostile.SOURCES[:3] for name, _ in source(str(MARKER))]


@pytest.fixture(
    scope="module", params=["0.02", pytest.param("1", marks=pytest.mark.long)], ids="{} of the opcodes".format
)
def report(request, repo, tmp_path_factory) -> dict:
    """All hostile files, read by one process of their own, and whether any of them wrote the marker."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [
        sys.executable,
        "-m",
        "tests.generators.pickles.hostile",
        str(folder / "marker"),
        request.param,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    result = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    outcome["executed"] = sorted(p.name for p in folder.iterdir())
    return outcome


def problem(text: str, who: str) -> str | None:
    """Return what is wrong with an error message, or an empty text."""
    if "\n" in text or not text.isprintable():
        return "not one printable line"
    if not text.startswith(f"{who}:") and not text.startswith(f"{who} ") or not text.endswith("."):
        return "not a sentence about the file"
    return "too long" if len(text) > 1000 else None


def test_every_hostile_file_is_rejected_in_one_line(report):
    wrong = {
        n: (why, text)
        for n, (text, _) in report["outcomes"].items()
        if (why := problem(text, "FILE")) is not None
    }
    assert wrong == {}
    assert len(report["outcomes"]) > 150 and set(NAMES) <= set(report["outcomes"])


def test_nothing_was_executed(report):
    assert report["executed"] == []


def test_nothing_hangs_and_memory_stays_small(report):
    assert {n: s for n, (_, s) in report["outcomes"].items() if s > SECONDS} == {}
    assert report["peak"] < MEBIBYTES


def test_the_attempts_are_real(tmp_path):
    """The ordinary unpickler does run such files."""
    import pickle

    marker = tmp_path / "marker"
    files = dict(hostile.calls(str(marker)))
    pickle.loads(files["os.system, protocol 4"])
    assert marker.exists()


def test_the_message_contains_the_rejected_name(report):
    for case, name in (
        ("os.system, protocol 4", "os.system"),
        ("stream: a storage that is os.system", "os.system"),
        ("eval, protocol 2", "eval"),
    ):
        check_message(report["outcomes"][case][0], (name,))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Honest files to damage."""
    nets = stock_networks()
    small = SnapshotWriter().snapshot(
        nets, ("G_ema",), training_set_kwargs={"path": "a.zip", "resolution": 128}
    )
    return {"protocol 4": small, "protocol 2": SnapshotWriter(2).snapshot(nets, ("D",))}


def survives(data: bytes) -> str:
    """Outcome of a damaged file, within the time."""
    started = time.process_time()
    try:
        pickles.plan(pickles.parse(memoryview(data), "FILE"))
        outcome = "loaded"
    except ValueError as error:
        outcome = str(error)
        assert problem(outcome, "FILE") is None, outcome
    assert time.process_time() - started < SECONDS
    return outcome


@pytest.mark.parametrize("name", ["protocol 4", "protocol 2"])
@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.long)])
def test_a_truncated_file_is_rejected(files, name, step):
    data = files[name]
    for percent in range(0, 100, step):
        assert survives(data[: len(data) * percent // 100]) != "loaded"


def test_an_empty_and_a_missing_file(tmp_path):
    (tmp_path / "empty.pkl").write_bytes(b"")
    with raising("empty.pkl", "empty"):
        pickles.read(tmp_path / "empty.pkl")
    with raising("none.pkl", kind=FileNotFoundError):
        pickles.read(tmp_path / "none.pkl")


def structure(data: bytes) -> list[int]:
    """Positions outside long runs of payload: where a flipped bit changes what the file says."""
    import pickletools

    offsets = []
    steps = list(pickletools.genops(data))
    for (_, arg, start), (_, _, end) in zip(steps, [*steps[1:], (None, None, len(data))], strict=True):
        head = 300 if isinstance(arg, (bytes, str)) else 100
        offsets += range(start, min(end, start + head))
    return offsets


def flip_bytes(data: bytes, seed: int, count: int) -> dict[str, int]:
    """Flip bits of single bytes, half of them anywhere and half in the structure; how many loaded, how many
    were rejected.
    """
    rng = random.Random(seed)
    spots = structure(data)
    outcomes = {"loaded": 0, "rejected": 0}
    for i in range(count):
        damaged = bytearray(data)
        position = rng.choice(spots) if i % 2 else rng.randrange(len(data))
        damaged[position] ^= rng.randrange(1, 256)
        outcomes["loaded" if survives(bytes(damaged)) == "loaded" else "rejected"] += 1
    return outcomes


@pytest.fixture(scope="module")
def small_file() -> bytes:
    """A discriminator-sized module tree under G_ema's name: small, so that many copies can be damaged;
    rejected in the end because of its class.
    """
    nets = stock_networks()
    return dumps({"G_ema": SnapshotWriter().discriminator(nets.D, nets.D_kwargs)})


def test_a_sample_of_flipped_bytes(files, small_file):
    assert flip_bytes(small_file, 1, 60)["rejected"] == 60
    outcomes = flip_bytes(files["protocol 4"], 2, 20)
    assert outcomes["rejected"] > 3 and outcomes["loaded"] > 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_ten_thousand_flipped_bytes(files, seed):
    outcomes = flip_bytes(files["protocol 4"], seed, 1000)
    assert sum(outcomes.values()) == 1000 and min(outcomes.values()) > 100


@pytest.mark.long
def test_the_official_file_truncated_at_every_percent(fixtures_dir):
    snapshots = sorted((fixtures_dir / "eg3d_pickle").glob("snapshot_*.pkl"))
    if not snapshots:
        pytest.skip("this set has no eg3d_pickle/snapshot_*.pkl, an official EG3D snapshot")
    for path in snapshots:
        data = path.read_bytes()
        for percent in range(100):
            assert survives(data[: len(data) * percent // 100]) != "loaded"
