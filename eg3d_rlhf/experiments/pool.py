"""Execution of named tasks with dependencies on worker processes.

Large results are passed as files; a task returns simple values. Workers are spawned processes, which share no
handles, each with one handler for all its tasks. They end when this process ends or dies, so
that a task must tolerate being stopped at any point.

    run_tasks(
        {"base": [], "seed0": ["base"], "seed1": ["base"]},
        handler_of,
        (settings,),
        workers=2,
        logs=folder / "logs",
    )

calls `handler_of(settings)` once in every worker, and then the returned handler with the name of each task.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from graphlib import TopologicalSorter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

Handler = Callable[[str], Any]  # task's name -> result
# (*arguments) -> a worker's handler; pickled by name, so it belongs at a module's top level
Setup = Callable[..., Handler]
_worker: dict[str, Any] = {}  # state of a worker process: setup and arguments, then also the handler


def run_tasks(
    needs: Mapping[str, Sequence[str]],
    setup: Setup,
    arguments: Sequence[object],
    workers: int,
    logs: Path,
    on_done: Callable[[str, Any], None] = lambda name, result: None,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
    stop: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run every task after the tasks that it needs, in the listed order, and return the results by name.

    Args:
        needs: names of the needed tasks, by task; setup, arguments: setup(*arguments) makes a handler.
        workers: number of processes; 1 runs the tasks in this process.
        logs: folder for the output of the workers; on_done: called in this process when a task ends.
        expected: errors that are not bugs, which are raised again as a ValueError with their message.
        stop: if given, the tasks run on threads of this process with one handler. This is for tasks that wait
            for child processes, or that share loaded data. It is called to end the running tasks when one has
            failed or the work is interrupted.
    Raises: ValueError with the message of the first failed task, after the others have ended.
    """
    order = _Order(needs)
    if stop is not None:
        return _on_threads(order, setup(*arguments), workers, on_done, expected, stop)
    # no processes for one worker: errors keep their traceback, and a debugger works
    if workers == 1:
        handler = setup(*arguments)
        results = {}
        for name in order:
            results[name] = handler(name)
            order.done(name)
            on_done(name, results[name])
        return results
    logs.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: a forked process would inherit CUDA's state and locks of other threads
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    started = (setup, tuple(arguments), logs, spawn.Value("i", 0), theirs)
    pool = ProcessPoolExecutor(min(workers, len(needs)), spawn, _begin, started)
    try:
        results = _dispatch(order, lambda name: pool.submit(_work, name), workers, logs, on_done, expected)
        pool.shutdown()
        return results
    finally:
        ours.close()  # workers wait for this end of the pipe to close, and then stop
        pool.shutdown(cancel_futures=True)


def _on_threads(
    order: "_Order",
    handler: Handler,
    workers: int,
    on_done: Callable[[str, Any], None],
    expected: tuple[type[Exception], ...],
    stop: Callable[[], None],
) -> dict[str, Any]:
    """Run the tasks on threads; at a failure, cancel waiting tasks and stop running ones."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return _dispatch(order, lambda name: pool.submit(handler, name), workers, None, on_done, expected)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


class _Order:
    """Iterator over the tasks that are ready, in the listed order."""

    def __init__(self, needs: Mapping[str, Sequence[str]]):
        assert {before for names in needs.values() for before in names} <= set(needs)
        self._graph = TopologicalSorter(needs)
        self._places = list(needs)
        self._ready: list[str] = []
        self._graph.prepare()  # raises CycleError for tasks that need each other
        self.done = self._graph.done

    def __iter__(self) -> Iterator[str]:
        """Yield ready tasks; stop when none is ready until another task is done."""
        while self._ready or self._graph.is_active():
            self._ready = sorted([*self._ready, *self._graph.get_ready()], key=self._places.index)
            if not self._ready:
                return
            yield self._ready.pop(0)


def _dispatch(
    order: _Order,
    submit: Callable[[str], Future[Any]],
    workers: int,
    logs: Path | None,
    on_done: Callable[[str, Any], None],
    expected: tuple[type[Exception], ...],
) -> dict[str, Any]:
    """Submit ready tasks while workers are free, and collect results as they come."""
    results: dict[str, Any] = {}
    running: dict[Future[Any], str] = {}
    while True:
        for name in order if len(running) < workers else ():
            running[submit(name)] = name
            if len(running) == workers:
                break
        # nothing runs and nothing is ready: all tasks are done
        if not running:
            return results
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                results[name] = future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"{name}: expected a result, but its process ended (see {logs}). Run the same command"
                    " again."
                ) from None
            except expected as error:
                raise ValueError(f"{name}: {str(error).strip()}") from None
            except Exception as error:
                if logs is None:  # it was raised in this process
                    raise
                # concurrent.futures puts the worker's traceback into the cause
                traceback = str(error.__cause__).strip('"\n')
                raise RuntimeError(f"{name}: {traceback}") from None
            order.done(name)
            on_done(name, results[name])


def _begin(
    setup: Setup, arguments: tuple[object, ...], logs: Path, count: "Synchronized[int]", parent: Connection
) -> None:
    """Initialise a worker process: signals, end with the parent, log file, setup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides

    def end_with_parent() -> None:
        parent.poll(None)  # returns when the other end is closed, by the parent or by its death
        os.kill(os.getpid(), signal.SIGTERM)  # not SIGKILL: a training writes a checkpoint first

    # a daemon thread, which does not keep the worker alive at its end
    threading.Thread(target=end_with_parent, daemon=True).start()
    # workers number themselves, because the executor does not
    with count.get_lock():
        number = count.value
        count.value += 1
    sys.stdout = sys.stderr = open(logs / f"worker-{number}.log", "a", buffering=1)
    _worker.update(setup=setup, arguments=arguments)


def _work(name: str) -> Any:
    """Run one task in a worker, after making the handler for the first one."""
    if "handler" not in _worker:
        _worker["handler"] = _worker["setup"](*_worker["arguments"])
    return _worker["handler"](name)
