"""Images read ahead by worker processes: the same bits for any number of them; they end with the run, however
it ends, in one line.
"""

import errno
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.rejections import raising, rejected
from tests.tiny_runs import GAN, LOOP, build_networks, only_run, run, train_flags, whole_run
from tests.training.test_endurance import RUN, assert_equal_end
from training import checkpoint, dataset
from training import dataset as reading
from training.config import GanConfig, LoopConfig
from training.dataset import AHEAD, ImageFolderDataset, InfiniteSampler, default_workers, read_batches
from training.distributed import Ranks
from training.gan import Gan
from training.loop import TrainingLoop


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def session(pid: int) -> list[int]:
    """Processes of the session that `pid` began, zombies among them."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        processes += [int(path.parent.name)] if int(fields[3]) == pid else []
    return processes


def taken(data: ImageFolderDataset, n: int, workers: int, count: int, start: int = 0):
    """Copies of the first batches, the set itself read between them."""
    reader = read_batches(data, iter(InfiniteSampler(data, seed=3, start_index=start)), n, workers)
    batches = []
    for images, labels in itertools.islice(reader, count):
        batches.append((images.copy(), labels.copy()))
        assert data[5][0].any()  # over the handle of this process
    reader.close()
    assert multiprocessing.active_children() == []
    return batches


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_order_and_bits_are_the_same_for_any_number_of_workers(tiny_data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(dataset, "CACHE_LIMIT", 0)
    with zipfile.ZipFile(tiny_data) as archive:
        archive.extractall(tmp_path)
    data = ImageFolderDataset(tiny_data if kind == "zip" else tmp_path, xflip=True, c_dim=25)
    places = list(itertools.islice(InfiniteSampler(data, seed=3), 60))
    for workers in (0, 1, 3):
        batches = taken(data, 6, workers, 10)
        for k, (images, labels) in enumerate(batches):
            items = [data[i] for i in places[6 * k : 6 * k + 6]]
            assert np.array_equal(images, np.stack([image for image, _ in items]))
            assert np.array_equal(labels, np.stack([label for _, label in items]))
    later = taken(data, 6, 2, 4, start=36)
    assert all(
        np.array_equal(a, b)
        for first, second in zip(batches[6:], later, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def test_workers_read_a_bounded_number_of_batches_ahead_into_memory_claimed_once(tiny_data):
    data = ImageFolderDataset(tiny_data)
    drawn = itertools.count()
    reader = read_batches(data, (next(drawn) % len(data) for _ in itertools.count()), 4, 2)
    memory = set()
    for k in range(12):
        memory.add(next(reader)[0].ctypes.data)
        time.sleep(0.01)
        seen = next(drawn)
        drawn = itertools.count(seen)
        assert seen == 4 * (k + 1 + 2 * AHEAD)
    assert len(memory) == 2 * AHEAD + 1
    reader.close()


def test_workers_have_one_thread_that_works_and_leave_interrupts_to_the_parent(tiny_data):
    data = ImageFolderDataset(tiny_data)
    reader = read_batches(data, iter(InfiniteSampler(data)), 4, 2)
    next(reader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        assert (
            len(list(Path(f"/proc/{worker.pid}/task").iterdir())) <= 2
        )  # and the thread that waits for the parent
    next(reader)
    assert all(worker.is_alive() for worker in workers)
    reader.close()


def test_default_number_of_workers(tiny_data, monkeypatch):
    small = ImageFolderDataset(tiny_data)
    monkeypatch.setattr(dataset, "CACHE_LIMIT", 0)
    large = ImageFolderDataset(tiny_data)
    for cores, neighbours, expected in ((1, 1, 0), (2, 1, 1), (3, 1, 2), (16, 1, 3), (16, 8, 1), (8, 8, 0)):
        monkeypatch.setattr(reading.os, "sched_getaffinity", lambda process, n=cores: range(n))
        ranks = Ranks(world=neighbours, neighbours=neighbours)
        assert (default_workers(small, ranks), default_workers(large, ranks)) == (0, expected)


def test_a_users_mistake_comes_back_in_one_line(tiny_data, tmp_path):
    with zipfile.ZipFile(tiny_data) as archive:
        archive.extractall(tmp_path)
    data = ImageFolderDataset(tmp_path)
    victim = data._files.images[7]
    (tmp_path / victim).write_bytes(b"no image")
    reader = read_batches(data, itertools.cycle(range(len(data))), 4, 2)
    next(reader)
    with raising(f"'{victim}'", "8 bytes"):
        next(reader)
    assert multiprocessing.active_children() == []


def test_workers_that_cannot_all_be_started_are_ended(tiny_data, monkeypatch):
    fork = os.fork
    forks = []

    def limited():
        forks.append(1)
        if len(forks) == 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    reader = read_batches(ImageFolderDataset(tiny_data), itertools.cycle(range(8)), 4, 3)
    with raising("--workers", "3 processes", os.strerror(errno.EAGAIN), kind=OSError):
        next(reader)
    wait_until(lambda: multiprocessing.active_children() == [])


# Whole runs.


@pytest.fixture(scope="module")
def straight(tiny_data, tiny_networks, tmp_path_factory) -> Path:
    """Folder of a run that reads its own images."""
    return whole_run(tiny_data, tiny_networks, tmp_path_factory.mktemp("straight"), *RUN, "--workers=0")


def test_a_run_and_one_resumed_with_another_number_give_the_same_bits(
    straight, tiny_data, tiny_networks, tmp_path
):
    folder = whole_run(tiny_data, tiny_networks, tmp_path, *RUN, "--workers=2")
    assert_equal_end(straight, folder)
    assert multiprocessing.active_children() == []
    checkpoint.available(folder)[-1].unlink()
    result = run(f"--resume={folder}", "--workers=1")
    assert result.exit_code == 0 and " waited " in result.stdout, result.output
    assert_equal_end(straight, folder)


def at_iteration(monkeypatch, number: int, do) -> None:
    """Do something after an iteration of the loop."""
    step = TrainingLoop.step

    def stepped(self):
        step(self)
        if self.batch_idx == number:
            do()

    monkeypatch.setattr(TrainingLoop, "step", stepped)


def test_a_killed_worker_ends_the_run_with_a_checkpoint(
    straight, tiny_data, tiny_networks, tmp_path, monkeypatch
):
    at_iteration(monkeypatch, 6, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    result = run(*train_flags(tiny_data, tiny_networks, tmp_path, *RUN, "--workers=2"))
    folder = only_run(tmp_path)
    last = checkpoint.available(folder)[-1].name
    rejected(result, "--workers", f"--resume={folder}", last)
    assert multiprocessing.active_children() == []
    monkeypatch.undo()
    assert run(f"--resume={folder}", "--workers=1").exit_code == 0
    assert_equal_end(straight, folder)


@pytest.mark.parametrize("kind", ["folder", pytest.param("zip", marks=pytest.mark.long)])
def test_data_that_vanish_in_mid_run_end_it_with_a_checkpoint(
    straight, tiny_data, tiny_networks, tmp_path, monkeypatch, kind
):
    data = tmp_path / ("data" if kind == "folder" else "data.zip")
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(tiny_data) as archive:
        archive.extractall(data) if kind == "folder" else shutil.copy(tiny_data, data)

    def vanish():
        shutil.copytree(data, elsewhere) if kind == "folder" else shutil.copy(data, elsewhere)
        if kind == "folder":
            shutil.rmtree(data)
        else:
            os.truncate(data, 5000)  # an open file that is merely unlinked can still be read

    at_iteration(monkeypatch, 6, vanish)
    result = run(*train_flags(data, tiny_networks, tmp_path / "runs", *RUN, "--workers=1"))
    folder = only_run(tmp_path / "runs")
    line = rejected(result, str(data), ".png", f"--resume={folder}", checkpoint.available(folder)[-1].name)
    assert 24 <= int(re.search(r"(\d+) images", line).group(1)) <= 24 + 4 * (AHEAD + 1)
    assert multiprocessing.active_children() == []
    rejected(run(f"--resume={folder}"), str(data))
    monkeypatch.undo()
    if kind == "zip":
        data.unlink()
    elsewhere.rename(data)
    assert run(f"--resume={folder}").exit_code == 0
    assert_equal_end(straight, folder)


SIGNALLED = """
import os, signal, sys, train
from training.loop import TrainingLoop
step = TrainingLoop.step
def signalled_step(self):
    step(self)
    if self.batch_idx == 6:
        {0}
TrainingLoop.step = signalled_step
train.main(sys.argv[1:])
"""
ENDS = {  # what happens after iteration 6: the exit code, what the last line names
    "SIGTERM": ("os.kill(0, signal.SIGTERM)", 0, ("SIGTERM", "24 images", "--resume=")),
    "SIGINT": ("os.kill(0, signal.SIGINT)", 0, ("SIGINT", "24 images", "--resume=")),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ()),
}


@pytest.mark.long
@pytest.mark.parametrize("how", ENDS)
def test_workers_end_with_the_process_after_a_signal_to_all(tiny_data, tiny_networks, tmp_path, how):
    code, expected, names = ENDS[how]
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        SIGNALLED.format(code),
        *train_flags(tiny_data, tiny_networks, tmp_path, *RUN, "--workers=2"),
    ]
    # no pipe, which those that are left would hold open
    with open(tmp_path.parent / f"{tmp_path.name}.txt", "w+") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        assert process.wait(timeout=120) == expected
        wait_until(lambda: session(process.pid) == [])
        log.seek(0)
        output = log.read()
    assert all(name in output.splitlines()[-1] for name in names) and "Traceback" not in output, output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_device_gets_the_images_of_the_cpu(tiny_data):
    for workers in (0, 2):
        fetched = []
        for device in ("cpu", "cuda"):
            nets = build_networks().to(device)
            gan = Gan(
                nets, ImageFolderDataset(tiny_data), GanConfig(**GAN), LoopConfig(**LOOP), workers=workers
            )
            gan.begin(0)
            for _ in range(8):
                gan.fetch()
            fetched.append([x.cpu() for x in gan._fetched])
            gan.end()
        torch.testing.assert_close(*fetched)
