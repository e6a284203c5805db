"""Tasks that need one another, here and on worker processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from eg3d_rlhf.experiments.pool import run_tasks
from tests.rejections import raising

NEEDS = {"c": ["a", "b"], "a": [], "b": ["a"], "d": []}


def recording(folder):
    """A handler that writes when a task began and ended, and by whom it was done."""

    def handle(name):
        (folder / f"{name}.begun").write_text(str(time.monotonic()))
        if name == "wrong":
            raise ValueError("--task: must be right, got 'wrong'")
        if name == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "bug":
            raise KeyError("bug")
        print(f"doing {name}")
        return {"task": name, "process": os.getpid()}

    return handle


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_runs_after_its_needs(tmp_path, workers):
    order = []
    logs = tmp_path / "logs"
    results = run_tasks(NEEDS, recording, [tmp_path], workers, logs, lambda name, result: order.append(name))
    assert {name: result["task"] for name, result in results.items()} == {name: name for name in NEEDS}
    assert order.index("a") < order.index("b") < order.index("c")
    processes = {result["process"] for result in results.values()}
    assert (processes == {os.getpid()}) == (workers == 1) and os.getpid() in processes or workers == 2
    if workers == 2:
        assert "doing a" in "".join(path.read_text() for path in (tmp_path / "logs").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_comes_back_as_one(tmp_path, workers):
    with raising("--task", "'wrong'"):
        run_tasks(
            {"a": [], "wrong": ["a"], "later": ["wrong"]}, recording, [tmp_path], workers, tmp_path / "logs"
        )
    assert not (tmp_path / "later.begun").exists()


def test_a_bug_brings_its_traceback(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        run_tasks({"bug": [], "a": []}, recording, [tmp_path], 2, tmp_path / "logs")
    assert all(text in str(caught.value) for text in ("bug", "Traceback", "KeyError"))


def test_a_worker_that_dies_is_no_bug(tmp_path):
    with raising("death", str(tmp_path / "logs")):
        run_tasks({"death": []}, recording, [tmp_path], 2, tmp_path / "logs")


def test_on_threads_a_failure_stops_those_that_are_busy(tmp_path):
    stop = threading.Event()
    ended = []

    def handle(name):
        if name == "wrong":
            raise ValueError("expected --flag. Add it.")
        stop.wait(30)
        ended.append(name)

    needs = {"slow": [], "wrong": [], "after": ["slow"]}
    with raising("wrong", "--flag"):
        run_tasks(needs, lambda: handle, (), 2, tmp_path, stop=stop.set)
    assert ended == ["slow"]
    done = run_tasks({"b": ["a"], "a": []}, lambda: str.upper, (), 2, tmp_path, stop=stop.set)
    assert list(done.items()) == [("a", "A"), ("b", "B")]


SCRIPT = """
import sys, time
from pathlib import Path
from eg3d_rlhf.experiments.pool import run_tasks

def slow(folder):
    import os
    def handle(name):
        (Path(folder) / f"{name}.pid").write_text(str(os.getpid()))
        time.sleep(60)
    return handle

if __name__ == "__main__":
    run_tasks({"a": [], "b": []}, slow, [sys.argv[1]], 2, Path(sys.argv[1]) / "logs")
"""


def test_workers_end_with_a_killed_parent(tmp_path, repo):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(repo)}
    )
    try:
        _wait_for(
            lambda: all(
                (tmp_path / f"{name}.pid").exists() and (tmp_path / f"{name}.pid").read_text()
                for name in "ab"
            )
        )
    finally:
        parent.kill()
        parent.wait()
    pids = [int((tmp_path / f"{name}.pid").read_text()) for name in "ab"]
    _wait_for(lambda: not any(_alive(pid) for pid in pids))


def _wait_for(condition, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
