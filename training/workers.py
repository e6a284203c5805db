"""Work done ahead by worker processes, its results in the order of the tasks."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence

import torch

AHEAD = 2  # tasks for each worker that are under way or done before they are asked for

_work: Callable | None = None  # in a worker process: handed over once, not with every task


def _start_worker(work: Callable) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no process behind where the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(task: object) -> object:
    assert _work is not None
    return _work(task)


def ahead(work: Callable, tasks: Iterable, workers: int, killed: str) -> Generator:
    """work(task) of every task in order, without end where the tasks have none; AHEAD * workers of them are done ahead.

    Workers are forked at the first result that is asked for: they import nothing, and have no thread but one that ends them with their
    parent. Closing the generator ends them.

    Args: workers: processes; 0, and where processes cannot fork, works in this one, a task at a time, when its result is asked for.
    Raises: what `work` raises; ValueError saying `killed` where a worker died; OSError where none can be started.
    """
    if workers == 0 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (work,)) as pool:
        pending: deque[concurrent.futures.Future] = deque()
        try:
            for task in tasks:
                try:
                    pending.append(pool.submit(_run_task, task))
                except OSError as error:  # of fork
                    raise OSError(f"--workers: expected to start {workers} processes, got: {error.strerror}. Use fewer.") from error
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(killed) from error
        finally:
            started = list(pool._processes.values())
            pool.shutdown(wait=True, cancel_futures=True)
            for process in started:  # where not all could be, shutdown reaches none
                process.terminate()


def in_order(work: Callable, tasks: Sequence, workers: int, killed: str) -> Generator:
    """`ahead` with no more workers than tasks; one alone works in this process."""
    workers = min(workers, len(tasks))
    return ahead(work, tasks, workers if workers > 1 else 0, killed)
