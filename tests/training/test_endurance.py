"""Failures during a run: each ends with one clear line and exit code 2, or as asked, and nothing is
lost.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import train
from eg3d_rlhf.experiments.process import LOCK, StopRequest, run_lock
from tests.rejections import check_message, raising, rejected
from tests.tiny_runs import (
    assert_same,
    batch,
    build_loop,
    build_networks,
    only_run,
    run,
    state,
    train_flags,
    whole_run,
)
from training import checkpoint, storage
from training.gan_phases import GanConfig, GanPhases

RUN = ("--kimg=0.048", "--tick=0.016", "--snap=0")  # 12 iterations, three checkpoints


def failed_after_resuming(result, *names: str) -> None:
    """Assert exit code 2, and on standard error the checkpoint that the run resumed from, then one error."""
    note, _, error = result.stderr.partition("\n")
    assert result.exit_code == 2, (result.output, result.exception)
    assert "checkpoint-000000032.safetensors" in note and error.startswith("Error: "), result.stderr
    check_message(error, names)


@pytest.fixture(scope="module")
def straight(tiny_data, tiny_networks, tmp_path_factory) -> Path:
    """Folder of a whole run."""
    return whole_run(tiny_data, tiny_networks, tmp_path_factory.mktemp("straight"), *RUN)


@pytest.fixture
def copy(straight, tmp_path) -> Path:
    """A copy of the run without its last checkpoint."""
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    checkpoint.available(folder)[-1].unlink()
    return folder


def assert_equal_end(first: Path, second: Path) -> None:
    a, b = (storage.read_tensors(checkpoint.available(folder)[-1])[0] for folder in (first, second))
    assert_same(a, b)
    assert (first / "stats.jsonl").read_text() == (second / "stats.jsonl").read_text()


# Signals.

SIGNALLED = """
import os, signal, sys, train
from training.loop import TrainingLoop
step = TrainingLoop.step
def signalled_step(self):
    step(self)
    if self.batch_idx == 6:
        os.kill(os.getpid(), signal.{0})
        {1}
TrainingLoop.step = signalled_step
train.main(sys.argv[1:])
"""


def signalled(name: str, then: str, *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SIGNALLED.format(name, then), *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_a_signal_ends_the_run_after_the_iteration_and_it_resumes_exactly(
    name, straight, tiny_data, tiny_networks, tmp_path
):
    done = signalled(name, "pass", *train_flags(tiny_data, tiny_networks, tmp_path, *RUN))
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    last = done.stdout.splitlines()[-1]
    assert all(text in last for text in (name, "24 images", f"--resume={folder}")), done.stdout
    assert (
        checkpoint.available(folder)[-1].name == "checkpoint-000000024.safetensors"
        and not (folder / LOCK).exists()
    )
    result = run(f"--resume={folder}")
    assert result.exit_code == 0, result.output
    assert_equal_end(straight, folder)


@pytest.mark.long
def test_a_second_interrupt_ends_at_once(tiny_data, tiny_networks, tmp_path):
    done = signalled(
        "SIGINT",
        "os.kill(os.getpid(), signal.SIGINT)",
        *train_flags(tiny_data, tiny_networks, tmp_path, *RUN),
    )
    assert done.returncode == -signal.SIGINT
    assert [p.name for p in checkpoint.available(only_run(tmp_path))] == ["checkpoint-000000016.safetensors"]


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == "SIGTERM"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


# Locks.


def test_two_runs_on_one_folder(copy):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with run_lock(copy):
        rejected(run(f"--resume={copy}"), str(copy), str(os.getpid()))
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert run(f"--resume={copy}").exit_code == 0


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = "import os, signal\nfrom eg3d_rlhf.experiments.process import run_lock\nfrom pathlib import Path\n"
    code += f"with run_lock(Path({str(tmp_path)!r})):\n"
    code += "    os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(train.__file__).parent), "PATH": os.environ["PATH"]},
    )
    assert killed.returncode == -signal.SIGKILL and (tmp_path / LOCK).exists()
    with run_lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


# Disks.


def test_a_full_disk_while_statistics_are_written(copy):
    (copy / "timing.jsonl").unlink()
    (copy / "timing.jsonl").symlink_to("/dev/full")  # every write fails as on a full disk
    result = run(f"--resume={copy}")
    failed_after_resuming(
        result, str(copy), os.strerror(errno.ENOSPC), "checkpoint-000000032.safetensors", "--resume"
    )


def test_a_full_disk_while_a_checkpoint_is_written(straight, copy, monkeypatch):
    kept = checkpoint.available(copy)[-1].read_bytes()
    fsync = os.fsync

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".tmp") and "checkpoint" in os.readlink(
            f"/proc/self/fd/{file}"
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(storage.os, "fsync", full)
    result = run(f"--resume={copy}")
    failed_after_resuming(
        result,
        "checkpoint-000000048.safetensors",
        os.strerror(errno.ENOSPC),
        "checkpoint-000000032.safetensors",
    )
    assert checkpoint.available(copy)[-1].read_bytes() == kept and not list(copy.glob(".*"))
    monkeypatch.undo()
    assert run(f"--resume={copy}").exit_code == 0
    assert_equal_end(straight, copy)


def test_a_folder_that_cannot_be_made(tiny_data, tiny_networks, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(*train_flags(tiny_data, tiny_networks, tmp_path / "file" / "runs", *RUN))
    rejected(result, "--outdir", str(tmp_path / "file"), os.strerror(errno.ENOTDIR))


# Damage.


@pytest.fixture
def small_file(tmp_path) -> Path:
    path = tmp_path / "small.safetensors"
    tensors = {"a": torch.arange(40.0).reshape(5, 8), "b": torch.tensor([True, False]), "c": torch.tensor(3)}
    storage.write_tensors(path, "checkpoint", tensors, {"step": 7, "name": "x", "weights": {1: 0.5}})
    return path


def test_every_flipped_byte_is_noticed_or_harmless(small_file):
    intact_bytes = small_file.read_bytes()
    tensors, meta = storage.read_tensors(small_file, "checkpoint")
    noticed = 0
    for position in range(len(intact_bytes)):
        for mask in (0x01, 0x20):
            damaged = bytearray(intact_bytes)
            damaged[position] ^= mask
            small_file.write_bytes(damaged)
            try:
                stored, described = storage.read_tensors(small_file, "checkpoint")
            except ValueError as error:
                noticed += 1
                check_message(str(error), ("small.safetensors",))
            else:
                assert_same(tensors, stored)
                assert described == meta
    assert noticed > 1.9 * len(intact_bytes)


def test_files_of_the_first_format_keep_their_checksum_and_later_formats_are_rejected(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(2)}
    content = {"kind": "checkpoint", "meta": {"x": 1}}
    path = tmp_path / "a.safetensors"
    # as it was before there was a number
    described = json.dumps({**content, storage.CHECKSUM_KEY: storage.checksum(tensors, content)})
    path.write_bytes(save(tensors, metadata={storage.HEADER_KEY: described}))
    assert storage.read_tensors(path, "checkpoint")[1] == {"x": 1}
    with monkeypatch.context() as later:
        later.setattr(storage, "FORMAT", storage.FORMAT + 1)
        storage.write_tensors(path, "checkpoint", tensors, {"x": 1})
        assert storage.read_tensors(path, "checkpoint")[1] == {"x": 1}
    for read in (storage.read_tensors, storage.read_meta):
        with raising("a.safetensors", f"format {storage.FORMAT + 1}"):
            read(path, "checkpoint")


# Reduced precision.


def test_bf16_trains_with_fp32_weights_and_stays_finite(tiny_data, tmp_path):
    loops = [
        build_loop(tiny_data, tmp_path / str(amp), gan={"amp": amp}, nets=build_networks())
        for amp in ("off", "bf16")
    ]
    for loop in loops:
        loop.run()
    full, reduced = (state(loop.trained_object.nets.G) for loop in loops)
    assert all(v.dtype == full[k].dtype and torch.isfinite(v).all() for k, v in reduced.items())
    assert any(not torch.equal(full[k], reduced[k]) for k in full)


def test_bf16_leaves_r1_and_density_in_fp32_and_all_losses(tiny_data):
    runs = []
    for amp in ("off", "bf16"):
        nets = build_networks()
        phases = GanPhases(nets.G, nets.D, GanConfig(gamma=1.0, gen_pose_cond=False, nrr_initial=8, amp=amp))
        values = {}
        for name in ("g_main", "g_reg", "d_reg"):
            nets.D.requires_grad_(name == "d_reg")
            torch.manual_seed(0)
            values[name] = next(iter(getattr(phases, name)(batch(tiny_data)))).value.detach()
        runs.append(values)
    full_precision, mixed = runs
    assert all(v.dtype == torch.float32 for v in mixed.values())
    assert torch.equal(full_precision["g_reg"], mixed["g_reg"]) and torch.equal(
        full_precision["d_reg"], mixed["d_reg"]
    )
    assert not torch.equal(full_precision["g_main"], mixed["g_main"])
    torch.testing.assert_close(full_precision["g_main"], mixed["g_main"], rtol=0.05, atol=0.05)
