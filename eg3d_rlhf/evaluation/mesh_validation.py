"""A census of assets: how many meshes of each generator are solids, and which are the worst.

Every file is measured (eg3d_rlhf/measures/meshes) by one of several processes, which get one file at a time:
memory does not grow with the folder. A file that cannot be measured is a row with the reason.
docs/guides/check-assets.md is the manual.
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

WORST = 24  # meshes that are drawn
ENDED = "expected a mesh that can be measured with bounded memory and time, got one that takes more"
_ROOT = Path(__file__).resolve().parents[2]
# at most so much of the area hidden; at least so thick a wall, in longest edges
HIDDEN = 0.01
WALL = 0.01
DEMANDS: dict[str, Callable[[dict], bool]] = {  # what a solid is asked for; a share of each is reported
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
    """Mesh files of a folder and those below it, sorted. Raises: ValueError where there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(
            f"{folder}: expected {', '.join(SUFFIXES)} files in it or below, got none. Check the path."
        )
    return files


def generator_of(path: Path, folder: Path, by: str | None) -> str:
    """Whose a file is: the first folder below `folder`, or what a regular expression finds in its path there
    (its first group, if any).
    """
    inner = path.relative_to(folder)
    if by is None:
        return inner.parts[0] if len(inner.parts) > 1 else folder.resolve().name
    match = re.search(by, inner.as_posix())
    return "" if match is None else match.group(1) or "" if match.re.groups else match.group()


class _Worker:
    """One process that answers one request at a time; another is begun where it has died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict) -> dict:
        if self.process is None:
            names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "IGL_NUM_THREADS")
            environment = {**os.environ, "PYTHONPATH": str(_ROOT), **dict.fromkeys(names, "1")}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eg3d_rlhf.evaluation.mesh_validation_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.end()
            return {"reason": ENDED}
        return json.loads(line)

    def stop(self) -> None:
        """From any thread: the one that asks then sees the end."""
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> None:
        """From the thread that asks."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.__exit__(None, None, None)  # closes its pipes and waits
            self.process = None


def answers(requests: Sequence[dict], jobs: int) -> Iterator[tuple[int, dict]]:
    """(place of a request, its answer) as they come, from `jobs` processes."""
    waiting = queue.SimpleQueue[tuple[int, dict]]()
    done = queue.SimpleQueue[tuple[int, dict] | BaseException]()
    for item in enumerate(requests):
        waiting.put(item)
    workers = [_Worker() for _ in range(min(jobs, len(requests)))]

    def work(worker: _Worker) -> None:
        try:
            while True:
                number, request = waiting.get_nowait()
                done.put((number, worker.ask(request)))
        except queue.Empty:
            pass
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
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for worker, thread in zip(workers, threads, strict=True):
            worker.stop()
            thread.join()


def shares(rows: Iterable[dict]) -> list[dict]:
    """For every generator and demand: how many meet it, of how many measured, with Wilson's 95 % interval."""
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


def _median(values: np.ndarray, drawn: np.ndarray, _columns: np.ndarray) -> float:
    return float(np.median(values[drawn]))


def medians(rows: Iterable[dict], seed: int = 0) -> list[dict]:
    """For every generator and measure: the median of those that have one, with a 95 % percentile bootstrap
    interval over files.
    """
    result = []
    for generator, group in _by_generator(rows):
        for name in MEDIANS:
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
    """Generators that have files of the same names: which meets a demand where the other does not, and
    McNemar's exact test.
    """
    groups = dict(_by_generator(rows))
    result = []
    named = {generator: {Path(row["file"]).stem: row for row in group} for generator, group in groups.items()}
    for a, b in itertools.combinations(sorted(named), 2):
        both = sorted(named[a].keys() & named[b].keys())
        for name, meets in DEMANDS.items() if len(both) > 1 else ():
            first, second = (np.array([bool(meets(named[side][stem])) for stem in both]) for side in (a, b))
            more = int((first & ~second).sum())
            fewer = int((second & ~first).sum())
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
    """Measured rows of each generator, sorted by its name."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if not row["reason"]:
            groups.setdefault(row["generator"], []).append(row)
    return sorted(groups.items())


def badness(row: dict) -> float:
    """By how much a mesh is none of a solid: demands that it does not meet, then how open, hidden and crossed
    it is.
    """
    return (
        sum(not meets(row) for meets in DEMANDS.values())
        + (min(row["open_length"] / 8, 1) + row["hidden"] + row["crossing"]) / 4
    )
