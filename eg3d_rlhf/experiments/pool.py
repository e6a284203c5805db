"""Execution of named tasks on worker processes, in the order of their dependencies.

A task returns simple values, and writes large results into files. The worker processes are spawned, so they
inherit no open files and no CUDA state. Each worker makes one handler, a function that runs a task, and uses
it for all its tasks. Workers end when this process ends or is killed. A task must therefore tolerate being
stopped at any point.

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

Handler = Callable[[str], Any]  # (name of a task) -> its result
# (*arguments) -> handler of a worker. It is pickled by name, so it must be defined at the top level of a
# module.
Setup = Callable[..., Handler]
# state of a worker process: "setup" and "arguments" from its start, and "handler" from its first task
_worker: dict[str, Any] = {}


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
    """Run every task after the tasks that it needs, and return the results by the names of the tasks.

    Of the tasks that are ready, the one that is listed first in `needs` is started first.

    Args:
        needs: maps the name of each task to the names of the tasks that must be done before it.
        setup: function that makes a handler, called as setup(*arguments). A handler is a function that runs
            the task of a name; each worker makes its own.
        arguments: arguments of `setup`, which must be picklable.
        workers: number of worker processes; with 1, the tasks run in this process.
        logs: folder for the files worker-<number>.log, which receive the output of the workers.
        on_done: function that is called in this process with the name and the result of each finished task.
        expected: types of errors that a user can cause. Of worker processes, they are raised again as a
            ValueError with their message, and any other error as a RuntimeError with the worker's traceback.
        stop: None, or a function that makes running tasks end. If it is passed, the tasks run on threads of
            this process, which share one handler, and no process is started. This is for tasks that wait for
            child processes, or that share loaded data. The function is called when a task has failed or the
            work is interrupted.

    Raises:
        ValueError: a task failed with an expected error, or its process ended. It is raised for the first
            failed task, after the other running tasks have ended.
        RuntimeError: a task of a worker process failed with another error.
        Exception: any error of a task that ran in this process with workers=1, and any error on a thread that
            is not of an expected type. These errors are raised unchanged.
    """
    task_order = _Order(needs)
    # one handler for all threads, which share its loaded data
    if stop is not None:
        return _on_threads(task_order, setup(*arguments), workers, on_done, expected, stop)
    # One worker needs no process of its own. In this process, errors keep their traceback and a debugger
    # works.
    if workers == 1:
        handler = setup(*arguments)
        result_by_task = {}
        for task_name in task_order:
            result_by_task[task_name] = handler(task_name)
            task_order.done(task_name)
            on_done(task_name, result_by_task[task_name])
        return result_by_task
    logs.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: a forked process would inherit CUDA's state and locks of other threads
    spawn_context = multiprocessing.get_context("spawn")
    parent_end, worker_end = spawn_context.Pipe()
    # "i": a C int in shared memory; each worker takes its number from it
    worker_count = spawn_context.Value("i", 0)
    initial_arguments = (setup, tuple(arguments), logs, worker_count, worker_end)
    # more processes than tasks would have no work
    pool = ProcessPoolExecutor(min(workers, len(needs)), spawn_context, _begin, initial_arguments)
    try:
        result_by_task = _dispatch(
            task_order, lambda name: pool.submit(_work, name), workers, logs, on_done, expected
        )
        pool.shutdown()
        return result_by_task
    finally:
        parent_end.close()  # workers wait for this end of the pipe to close, and then stop
        pool.shutdown(cancel_futures=True)


def _on_threads(
    task_order: "_Order",
    handler: Handler,
    workers: int,
    on_done: Callable[[str, Any], None],
    expected_errors: tuple[type[Exception], ...],
    stop: Callable[[], None],
) -> dict[str, Any]:
    """Run the tasks on threads of this process.

    If a task fails, the waiting tasks are cancelled, and `stop` is called to end the running tasks.
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            return _dispatch(
                task_order, lambda name: pool.submit(handler, name), workers, None, on_done, expected_errors
            )
        # KeyboardInterrupt as well: leaving the `with` waits for the running tasks, so they must be ended
        # first
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


class _Order:
    """Iterator over the tasks whose needed tasks are done, in the order in which `needs` lists them."""

    def __init__(self, needs: Mapping[str, Sequence[str]]):
        needed_names = set().union(*needs.values())
        assert needed_names <= set(needs)
        self._graph = TopologicalSorter(needs)
        self._listed_names = list(needs)
        self._ready: list[str] = []
        self._graph.prepare()  # raises CycleError for tasks that need each other
        self.done = self._graph.done  # method done(name), which makes the tasks that need `name` ready

    def __iter__(self) -> Iterator[str]:
        """Yield the names of ready tasks. Stop if no task is ready; iterate again after a call of `done`."""
        while self._ready or self._graph.is_active():
            # get_ready returns every task once, so tasks that were not yielded yet are kept in the list
            self._ready = sorted([*self._ready, *self._graph.get_ready()], key=self._listed_names.index)
            if not self._ready:
                return
            yield self._ready.pop(0)


def _dispatch(
    task_order: _Order,
    submit: Callable[[str], Future[Any]],
    workers: int,
    log_folder: Path | None,
    on_done: Callable[[str, Any], None],
    expected_errors: tuple[type[Exception], ...],
) -> dict[str, Any]:
    """Submit ready tasks while workers are free, and collect the results as tasks finish.

    Args:
        task_order: iterator over the ready tasks.
        submit: function that starts the task of a name, and returns its future.
        workers: largest number of tasks that run at the same time.
        log_folder: folder of the workers' log files, for messages; None: the tasks run in this process.
        on_done: function that is called with the name and the result of each finished task.
        expected_errors: types of errors that are raised again as a ValueError.

    Returns:
        Result of each task, by its name.
    """
    result_by_task: dict[str, Any] = {}
    task_by_future: dict[Future[Any], str] = {}
    while True:
        # no ready task is taken from `task_order` while all workers are busy
        for task_name in task_order if len(task_by_future) < workers else ():
            task_by_future[submit(task_name)] = task_name
            if len(task_by_future) == workers:
                break
        # nothing runs and nothing is ready: all tasks are done
        if not task_by_future:
            return result_by_task
        for finished_future in wait(task_by_future, return_when=FIRST_COMPLETED).done:
            task_name = task_by_future.pop(finished_future)
            try:
                result_by_task[task_name] = finished_future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"{task_name}: the worker process ended before the task returned a result. Its log is in"
                    f" {log_folder}. Run the same command again."
                ) from None
            # `from None`: the traceback of an expected error does not help a user
            except expected_errors as error:
                raise ValueError(f"{task_name}: {str(error).strip()}") from None
            except Exception as error:
                # on a thread of this process, the error has its traceback already
                if log_folder is None:
                    raise
                # concurrent.futures puts the worker's traceback into the cause
                worker_traceback = str(error.__cause__).strip('"\n')
                raise RuntimeError(f"{task_name}: {worker_traceback}") from None
            task_order.done(task_name)
            on_done(task_name, result_by_task[task_name])


def _begin(
    setup: Setup,
    arguments: tuple[object, ...],
    log_folder: Path,
    started_count: "Synchronized[int]",
    parent_pipe: Connection,
) -> None:
    """Initialise a worker process.

    The worker ignores SIGINT, ends when its parent ends, and writes its output into a log file.

    Args:
        setup: function that makes the handler at the first task.
        arguments: arguments of `setup`.
        log_folder: folder of the log files.
        started_count: number of workers that have started, in shared memory.
        parent_pipe: end of a pipe whose other end the parent process holds open.
    """
    # Ctrl-C in a terminal sends SIGINT to all its processes. The parent alone decides how the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        # blocks without a time limit; it returns when the parent closes its end of the pipe or is killed
        parent_pipe.poll(None)
        os.kill(os.getpid(), signal.SIGTERM)  # not SIGKILL: a training writes a checkpoint first

    # a daemon thread does not keep the worker process alive after its work has ended
    threading.Thread(target=end_with_parent, daemon=True).start()
    # workers number themselves, because the executor does not
    with started_count.get_lock():
        worker_number = started_count.value
        started_count.value += 1
    # buffering=1 writes each line immediately, so that the log is complete if the process is killed
    sys.stdout = sys.stderr = open(log_folder / f"worker-{worker_number}.log", "a", buffering=1)
    _worker.update(setup=setup, arguments=arguments)


def _work(task_name: str) -> Any:
    """Run one task in a worker process. The first task of a worker also makes its handler."""
    if "handler" not in _worker:
        _worker["handler"] = _worker["setup"](*_worker["arguments"])
    return _worker["handler"](task_name)
