"""Named tasks that need one another, on worker processes, or on threads that each run a script of ours.

Results travel as files; a task returns plain values. Workers are processes of their own (spawned, so that they share no handles), each with
one handler for all its tasks. They end with this process, however it ends: tasks must bear being stopped at any point.

    run_tasks({"base": [], "seed0": ["base"], "seed1": ["base"]}, handler_of, (settings,), workers=2, logs=folder / "logs")

calls `handler_of(settings)` once in every worker and the handler that it returns with each task's name.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from graphlib import CycleError, TopologicalSorter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Handler = Callable[[str], Any]  # task's name -> result
Setup = Callable[..., Handler]  # (*arguments) -> a worker's handler; pickled by name, so it belongs at a module's top level
_worker: dict = {}  # of this process: setup and arguments, then the handler


def run_tasks(
    needs: Mapping[str, Sequence[str]], setup: Setup, arguments: Sequence, workers: int, logs: Path,
    on_done: Callable[[str, Any], None] = lambda name, result: None, expected: tuple[type[Exception], ...] = (ValueError, OSError),
    threads: bool = False,
) -> dict[str, Any]:
    """Run every task after those that it needs, the first listed first; returns their results by name.

    Args:
        needs: by task; setup, arguments: what makes a handler; workers: processes; 1 runs the tasks in this one.
        logs: folder for what the workers print; on_done: called here as tasks end.
        expected: errors that are no bugs, and come back as a ValueError with their message.
        threads: of this process in place of processes, for tasks that wait for `run_script`; they share one handler.
    Raises: ValueError for a need that is no task, or in a circle; the first failed task's message, after the others have ended.
    """
    order = _Order(needs)
    if workers == 1:
        handler, results = setup(*arguments), {}
        for name in order:
            results[name] = handler(name)
            order.done(name)
            on_done(name, results[name])
        return results
    if threads:
        with ThreadPoolExecutor(workers) as pool:
            try:
                return _dispatch(order, pool, setup(*arguments), workers, logs, on_done, expected)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stop_scripts()
                raise
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    started = (setup, tuple(arguments), logs, spawn.Value("i", 0), theirs)
    processes = ProcessPoolExecutor(min(workers, len(needs)), spawn, _begin, started)
    try:
        results = _dispatch(order, processes, _work, workers, logs, on_done, expected)
        processes.shutdown()
        return results
    finally:
        ours.close()  # stops those that are busy
        processes.shutdown(cancel_futures=True)


class _Order:
    """Tasks that are ready, the first listed first."""

    def __init__(self, needs: Mapping[str, Sequence[str]]):
        missing = sorted({before for names in needs.values() for before in names} - set(needs))
        if missing:
            raise ValueError(f"run_tasks: expected tasks that need each other, got needs without a task: {', '.join(missing)}. Add them.")
        self._graph, self._places = TopologicalSorter(needs), list(needs)
        self._ready: list[str] = []
        try:
            self._graph.prepare()
        except CycleError as error:
            circle = ", ".join(sorted(set(error.args[1])))
            raise ValueError(f"run_tasks: expected an order, got a circle among {circle}. Break it.") from None
        self.done = self._graph.done

    def __iter__(self) -> Iterator[str]:
        """Ready tasks, until all that are done have freed no more."""
        while self._ready or self._graph.is_active():
            self._ready = sorted([*self._ready, *self._graph.get_ready()], key=self._places.index)
            if not self._ready:
                return
            yield self._ready.pop(0)


def _dispatch(order: _Order, pool: Executor, work: Handler, workers: int, logs: Path, on_done, expected) -> dict[str, Any]:
    results: dict[str, Any] = {}
    running: dict[Future, str] = {}
    while True:
        for name in order if len(running) < workers else ():
            running[pool.submit(work, name)] = name
            if len(running) == workers:
                break
        if not running:
            return results
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                results[name] = future.result()
            except BrokenProcessPool:
                raise ValueError(f"{name}: expected a result, got the end of its process (see {logs}). Run the same again.") from None
            except expected as error:
                raise ValueError(f"{name}: {str(error).strip()}") from None
            except Exception as error:
                if error.__cause__ is None:  # of a thread: its traceback is here
                    raise
                over_there = str(error.__cause__).strip('"\n')  # the traceback
                raise RuntimeError(f"{name}: {over_there}") from None
            order.done(name)
            on_done(name, results[name])


def _begin(setup: Setup, arguments: tuple, logs: Path, count, parent: Connection) -> None:
    """A worker's start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides

    def end_with_parent() -> None:
        parent.poll(None)  # the other end is closed, or its process is gone
        os.kill(os.getpid(), signal.SIGTERM)  # inside a training: a checkpoint first

    threading.Thread(target=end_with_parent, daemon=True).start()
    with count.get_lock():
        number = count.value
        count.value += 1
    sys.stdout = sys.stderr = open(logs / f"worker-{number}.log", "a", buffering=1)
    _worker.update(setup=setup, arguments=arguments)


def _work(name: str) -> Any:
    if "handler" not in _worker:
        _worker["handler"] = _worker["setup"](*_worker["arguments"])
    return _worker["handler"](name)


_scripts: set[subprocess.Popen] = set()  # that run now


def run_script(command: Sequence[str], log: Path, threads: int | None = None) -> dict[str, float]:
    """Run a script of ours, such as ["train.py", "--seed=1"], in a process of its own; its output is added to a file.

    An interrupt of this process, or `stop_scripts`, asks it to stop: it writes a checkpoint first.
    Args: command: the script's path and flags; threads: of the process; None: as this one's.
    Returns: what it cost, "seconds" and the most "megabytes"; these are never below those of this process, from which it is forked.
    Raises: ValueError where it failed, with the last line that it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, started = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}, time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment)
    _scripts.add(process)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        _scripts.discard(process)
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        stopped = process.returncode in (-signal.SIGTERM, -signal.SIGINT)
        how = "was stopped" if stopped else f"ended with status {process.returncode}"
        raise ValueError(f"{Path(command[0]).name}: expected it to finish, but it {how}: {last} See {log}; the same command goes on.")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
    return {"seconds": time.monotonic() - started, "megabytes": usage.ru_maxrss * unit / 1e6}


def stop_scripts() -> None:
    """Ask all that `run_script` runs now to stop. Whoever waits for them sees them end."""
    for process in list(_scripts):
        process.terminate()
