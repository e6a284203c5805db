"""Mesh validation of a folder: the share of physically valid meshes of each generator, and the worst meshes.

Several worker processes measure the files (eg3d_rlhf/measures/meshes). Each worker gets one file at a time,
so the memory does not grow with the size of the folder. A file that cannot be measured is a row with the
reason. docs/guides/check-assets.md is the manual.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from eg3d_rlhf.core.statistics import binomial_test, two_way_interval, wilson_interval
from eg3d_rlhf.geometry.files.triangles import SUFFIXES

WORST = 24  # worst meshes that are rendered for the page
ENDED = "expected a mesh that can be measured with bounded memory and time, got one that takes more"
_ROOT = Path(__file__).resolve().parents[2]
# "nothing hidden": largest hidden share of the area; "thick walls": least thickness, as a share of the
# longest edge of the bounding box
HIDDEN = 0.01
WALL = 0.01
DEMANDS: dict[
    str, Callable[[dict], bool]
] = {  # requirements of a valid solid; the share that meets each is reported
    "closed": lambda row: row["closed"],
    "manifold": lambda row: row["manifold"],
    "wound one way": lambda row: row["oriented"] and not row["inverted_bodies"],
    "one body": lambda row: row["bodies"] == 1,
    "nothing hidden": lambda row: row["hidden"] <= HIDDEN,
    "thick walls": lambda row: row["thick_p01"] is not None and row["thick_p01"] >= WALL,
    "stands": lambda row: row["stands"] == "stands",
    "no crossing": lambda row: row["crossing"] == 0,
}
MEDIANS = (
    "faces",
    "parts",
    "open_length",
    "hidden",
    "buried",
    "thick_p01",
    "thick_median",
    "crossing",
    "tip",
    "bend",
    "solidity",
)


def found_files(folder: Path) -> list[Path]:
    """Return the mesh files of a folder and its subfolders, sorted.

    Raises: ValueError when there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(
            f"{folder}: expected {', '.join(SUFFIXES)} files in it or below, got none. Check the path."
        )
    return files


def generator_of(path: Path, folder: Path, by: str | None) -> str:
    """Return the name of the generator that made a file.

    Without `by` this is the first folder below `folder`. With `by`, a regular expression, it is what the
    expression matches in the path below `folder` (its first group, if it has one).
    """
    inner = path.relative_to(folder)  # the path that `by` is searched in
    if by is None:
        # A file directly in `folder` has no subfolder that could name its generator.
        return inner.parts[0] if len(inner.parts) > 1 else folder.resolve().name
    match = re.search(by, inner.as_posix())
    return "" if match is None else match.group(1) or "" if match.re.groups else match.group()


class _Worker:
    def __init__(self) -> None:
        """Worker process that answers one request at a time; a process that died is replaced at the next
        request.
        """
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict) -> dict:
        """Send one request and wait for its answer, which is {"reason": ENDED} if the process died."""
        if self.process is None:
            # One thread per worker: the parallelism comes from the number of processes, and numeric libraries
            # that each start a thread per core would slow one another down.
            names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "IGL_NUM_THREADS")
            environment = {**os.environ, "PYTHONPATH": str(_ROOT), **dict.fromkeys(names, "1")}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eg3d_rlhf.evaluation.mesh_validation_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Libraries print warnings about defective files; they would garble the progress bar.
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            # One JSON document per line in both directions.
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()  # waits until the file is measured
        except BrokenPipeError:
            # The process died while the request was being written; this is handled like an empty answer.
            line = ""
        # An empty line is the end of the stream: the worker was killed, mostly by its limit of memory or
        # time.
        if not line:
            self.end()
            return {"reason": ENDED}
        return json.loads(line)

    def stop(self) -> None:
        """Kill the process, from any thread; the thread that waits in `ask` then reads the end of the
        stream.
        """
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> None:
        """Kill the process and release its pipes; call it from the thread that calls `ask`."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.__exit__(None, None, None)  # closes its pipes and waits
            self.process = None


def answers(requests: Sequence[dict], jobs: int) -> Iterator[tuple[int, dict]]:
    """Yield (index of a request, its answer) in the order of completion, from `jobs` processes."""
    waiting = queue.SimpleQueue[tuple[int, dict]]()  # requests with their index
    done = queue.SimpleQueue[tuple[int, dict] | BaseException]()  # answers, or the exception of a thread
    for item in enumerate(requests):
        waiting.put(item)
    workers = [_Worker() for _ in range(min(jobs, len(requests)))]

    def work(worker: _Worker) -> None:
        """Answer requests until the queue is empty; an exception is passed on to the consumer."""
        try:
            while True:
                number, request = waiting.get_nowait()
                done.put((number, worker.ask(request)))
        except queue.Empty:
            pass
        # An exception in a thread would be lost, and the consumer would wait forever for this answer.
        except BaseException as error:
            done.put(error)
        finally:
            worker.end()

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in requests:
            answer = done.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        # Runs also when the consumer stops early: emptying the queue keeps the workers from starting
        # another file, and killing the processes ends the files that they are measuring.
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for worker, thread in zip(workers, threads, strict=True):
            worker.stop()
            thread.join()


def shares(rows: Iterable[dict]) -> list[dict]:
    """Count for every generator and demand the meshes that meet it.

    Returns: one row each, with the count, the number of measured meshes, the share and Wilson's 95 %
        interval.
    """
    result = []
    for generator, group in _by_generator(rows):
        for name, meets in DEMANDS.items():
            count = sum(bool(meets(row)) for row in group)
            interval = wilson_interval(count, len(group))
            result.append(
                {
                    "generator": generator,
                    "demand": name,
                    "of": len(group),
                    "count": count,
                    "share": count / len(group),
                    "lo": interval.lo,
                    "hi": interval.hi,
                }
            )
    return result


# The signature is that of a statistic of `two_way_interval`: resampled rows and columns. There is one column.
def _median(values: np.ndarray, drawn: np.ndarray, _columns: np.ndarray) -> float:
    """Compute the median of resampled values."""
    return float(np.median(values[drawn]))


def medians(rows: Iterable[dict], seed: int = 0) -> list[dict]:
    """Compute for every generator and measure the median of the meshes that have this measure.

    Returns: one row each, with a 95 % percentile bootstrap interval over files.
    """
    result = []
    for generator, group in _by_generator(rows):
        for name in MEDIANS:
            # A measure that is undefined for a mesh is None.
            values = np.array([row[name] for row in group if row[name] is not None], dtype=np.float64)
            if len(values):
                interval = two_way_interval(partial(_median, values), len(values), 1, seed=seed)
                result.append(
                    {
                        "generator": generator,
                        "measure": name,
                        "of": len(values),
                        "median": float(np.median(values)),
                        "lo": interval.lo,
                        "hi": interval.hi,
                    }
                )
    return result


def paired(rows: Iterable[dict]) -> list[dict]:
    """Compare generators that have files of the same names.

    Returns: for each pair of generators and each demand, the number of files in which only one of the two
        meets the demand, and the p-value of McNemar's exact test.
    """
    groups = dict(_by_generator(rows))
    result = []
    # rows by stem, so that suffixes may differ
    named = {generator: {Path(row["file"]).stem: row for row in group} for generator, group in groups.items()}
    for a, b in itertools.combinations(sorted(named), 2):
        both = sorted(named[a].keys() & named[b].keys())  # names that both have
        # A single shared name is no sample: such a pair of generators gets no row.
        for name, meets in DEMANDS.items() if len(both) > 1 else ():
            # bool [pairs]
            first, second = (np.array([bool(meets(named[side][stem])) for stem in both]) for side in (a, b))
            # McNemar's test uses the discordant pairs alone.
            more = int((first & ~second).sum())  # only `a` meets the demand
            fewer = int((second & ~first).sum())  # only `b` meets it
            result.append(
                {
                    "first": a,
                    "second": b,
                    "demand": name,
                    "pairs": len(both),
                    "only the first": more,
                    "only the second": fewer,
                    "p": binomial_test(more, more + fewer),
                }
            )
    return result


def _by_generator(rows: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Group the measured rows by generator, sorted by its name; rows with a reason were not measured."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if not row["reason"]:
            groups.setdefault(row["generator"], []).append(row)
    return sorted(groups.items())


def badness(row: dict) -> float:
    """Return a score for sorting: the higher, the worse the mesh.

    The integer part is the number of unmet demands. The rest orders meshes with the same number by the
    length of open edges, the hidden area and the share of crossing faces.
    """
    # Each of the three terms is at most 1, so their part stays below one unmet demand.
    return (
        sum(not meets(row) for meets in DEMANDS.values())
        + (min(row["open_length"] / 8, 1) + row["hidden"] + row["crossing"]) / 4
    )
