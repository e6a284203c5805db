"""Named tasks that need one another, on worker processes. Results travel as files; a task returns JSON.

Workers are processes of their own (spawned, so that they share no threads or handles), each with one handler for all its tasks. They end
with this process, however it ends: tasks must bear being stopped at any point.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

Handler = Callable[[str], object]  # task's name -> JSON
Report = Callable[[float], None]  # called by a handler with the units of work that it has done since the last call
Setup = Callable[..., Handler]  # (*arguments, report) -> a worker's handler; pickled by name, so it belongs at a module's top level
_JOIN_SECONDS = 30


def run_tasks(
    needs: Mapping[str, Sequence[str]], setup: Setup, arguments: Sequence, workers: int, logs: Path,
    on_done: Callable[[str, object], None] = lambda name, result: None,
    on_progress: Callable[[str, float], None] = lambda name, units: None, expected: tuple[type[Exception], ...] = (ValueError, OSError),
) -> dict[str, object]:
    """Run every task after those that it needs, the first listed first; returns their results by name.

    Args:
        needs: by task; setup, arguments: what makes a handler; workers: processes; 1 runs the tasks in this one.
        logs: folder for what the workers print; on_done: called here as tasks end; on_progress: as they report.
        expected: errors that are no bugs, and come back as a ValueError with their message.
    Raises: ValueError for a need that is no task, or in a circle; the first failed task's message, after the others have ended.
    """
    _check(needs)
    if workers == 1:
        results: dict[str, object] = {}
        handler = setup(*arguments, lambda units: on_progress(_ready(needs, results, set())[0], units))
        while len(results) < len(needs):
            name = _ready(needs, results, set())[0]
            results[name] = handler(name)
            on_done(name, results[name])
        return results
    logs.mkdir(parents=True, exist_ok=True)
    pool = [_Worker(setup, arguments, logs / f"worker-{n}.log", expected) for n in range(min(workers, len(needs)))]
    try:
        return _dispatch(needs, pool, on_done, on_progress)
    finally:
        for worker in pool:
            worker.end()


def _dispatch(needs: Mapping[str, Sequence[str]], pool: list["_Worker"], on_done, on_progress) -> dict[str, object]:
    results: dict[str, object] = {}
    while len(results) < len(needs):
        running = {worker.task for worker in pool if worker.task}
        idle = [worker for worker in pool if worker.task is None]
        for worker, name in zip(idle, _ready(needs, results, running), strict=False):
            worker.start(name)
        busy = {worker.connection: worker for worker in pool if worker.task}
        for connection in wait(list(busy)):
            worker = busy[connection]
            name, answer = worker.task, worker.answer()
            if "progress" in answer:
                on_progress(name, answer["progress"])
                continue
            results[name] = answer["result"]
            on_done(name, results[name])
    return results


def _ready(needs: Mapping[str, Sequence[str]], done: Mapping, running: set[str]) -> list[str]:
    return [name for name, before in needs.items() if name not in done and name not in running and all(b in done for b in before)]


def _check(needs: Mapping[str, Sequence[str]]) -> None:
    missing = sorted({before for names in needs.values() for before in names} - set(needs))
    if missing:
        raise ValueError(f"run_tasks: expected tasks that need each other, got needs without a task: {', '.join(missing)}. Add them.")
    done: set[str] = set()
    while len(done) < len(needs):
        ready = _ready(needs, dict.fromkeys(done), set())
        if not ready:
            raise ValueError(f"run_tasks: expected an order, got a circle among {', '.join(sorted(set(needs) - done))}. Break it.")
        done.update(ready)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, setup: Setup, arguments: Sequence, log: Path, expected: tuple[type[Exception], ...]):
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.task: str | None = None
        self.log = log
        self._process = spawn.Process(target=_serve, args=(theirs, setup, tuple(arguments), str(log), expected), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, name: str) -> None:
        """Begin a task."""
        self.connection.send_bytes(name.encode())
        self.task = name

    def answer(self) -> dict:
        """What came through the pipe: the progress of a task, or the result that ends it.

        Raises: ValueError with its message, RuntimeError with its traceback.
        """
        name = self.task
        try:
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.task = None
            raise ValueError(f"{name}: expected a result, got the end of its process (see {self.log}). Run the same again.") from None
        if "progress" not in answer:
            self.task = None
        if "error" in answer:
            raise (ValueError if answer["user"] else RuntimeError)(f"{name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Close the pipe, which ends an idle worker; one that is busy is asked to stop."""
        self.connection.close()
        if self.task is not None:
            self._process.terminate()
        self._process.join(_JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, setup: Setup, arguments: tuple, log: str, expected: tuple[type[Exception], ...]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a", buffering=1) as out:
        sys.stdout = sys.stderr = out
        handler = None
        while (name := _next(connection)) is not None:
            try:
                handler = handler or setup(*arguments, lambda units: connection.send_bytes(json.dumps({"progress": units}).encode()))
                answer = {"result": handler(name)}
            except expected as error:
                answer = {"error": str(error).strip(), "user": True}
            except Exception:
                answer = {"error": traceback.format_exc(), "user": False}
            try:
                connection.send_bytes(json.dumps(answer).encode())
            except OSError:  # nobody waits for it any more
                return


def _next(connection: Connection) -> str | None:
    try:
        return connection.recv_bytes().decode()
    except (EOFError, OSError):
        return None


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # inside a training: a checkpoint first
