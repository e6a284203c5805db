"""Named tasks that need one another, on worker processes.

Results travel as files; a task returns plain values. Workers are processes of their own (spawned, so that
they share no handles), each with one handler for all its tasks. They end with this process, however it ends:
tasks must bear being stopped at any point.

    run_tasks(
        {"base": [], "seed0": ["base"], "seed1": ["base"]},
        handler_of,
        (settings,),
        workers=2,
        logs=folder / "logs",
    )

calls `handler_of(settings)` once in every worker and the handler that it returns with each task's name.
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
_worker: dict[str, Any] = {}  # of this process: setup and arguments, then the handler


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
    """Run every task after those that it needs, the first listed first; returns their results by name.

    Args:
        needs: by task; setup, arguments: what makes a handler; workers: processes; 1 runs the tasks in this
            one.
        logs: folder for what the workers print; on_done: called here as tasks end.
        expected: errors that are no bugs, and come back as a ValueError with their message.
        stop: runs the tasks on threads of this process, with one handler, for those that wait for child
            processes or share what is loaded; called to end those that are busy when one has failed or the
            work is interrupted.
    Raises: ValueError with the first failed task's message, after the others have ended.
    """
    order = _Order(needs)
    if stop is not None:
        return _on_threads(order, setup(*arguments), workers, on_done, expected, stop)
    if workers == 1:
        handler = setup(*arguments)
        results = {}
        for name in order:
            results[name] = handler(name)
            order.done(name)
            on_done(name, results[name])
        return results
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    started = (setup, tuple(arguments), logs, spawn.Value("i", 0), theirs)
    pool = ProcessPoolExecutor(min(workers, len(needs)), spawn, _begin, started)
    try:
        results = _dispatch(order, lambda name: pool.submit(_work, name), workers, logs, on_done, expected)
        pool.shutdown()
        return results
    finally:
        ours.close()  # stops those that are busy
        pool.shutdown(cancel_futures=True)


def _on_threads(
    order: "_Order",
    handler: Handler,
    workers: int,
    on_done: Callable[[str, Any], None],
    expected: tuple[type[Exception], ...],
    stop: Callable[[], None],
) -> dict[str, Any]:
    with ThreadPoolExecutor(workers) as pool:
        try:
            return _dispatch(order, lambda name: pool.submit(handler, name), workers, None, on_done, expected)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


class _Order:
    """Tasks that are ready, the first listed first."""

    def __init__(self, needs: Mapping[str, Sequence[str]]):
        assert {before for names in needs.values() for before in names} <= set(needs)
        self._graph = TopologicalSorter(needs)
        self._places = list(needs)
        self._ready: list[str] = []
        self._graph.prepare()  # raises for a circle
        self.done = self._graph.done

    def __iter__(self) -> Iterator[str]:
        """Ready tasks, until all that are done have freed no more."""
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
    results: dict[str, Any] = {}
    running: dict[Future[Any], str] = {}
    while True:
        for name in order if len(running) < workers else ():
            running[submit(name)] = name
            if len(running) == workers:
                break
        if not running:
            return results
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                results[name] = future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"{name}: expected a result, got the end of its process (see {logs}). Run the same again."
                ) from None
            except expected as error:
                raise ValueError(f"{name}: {str(error).strip()}") from None
            except Exception as error:
                if logs is None:  # it was raised in this process
                    raise
                over_there = str(error.__cause__).strip('"\n')  # the traceback
                raise RuntimeError(f"{name}: {over_there}") from None
            order.done(name)
            on_done(name, results[name])


def _begin(
    setup: Setup, arguments: tuple[object, ...], logs: Path, count: "Synchronized[int]", parent: Connection
) -> None:
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
