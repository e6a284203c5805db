"""Validate the meshes of a folder: find each generator's share of valid meshes, and the worst meshes.

Several worker processes measure the files (eg3d_rlhf/measures/meshes). Each worker gets one file at a time,
so the memory does not grow with the size of the folder. If a file cannot be measured, its row of the table
holds the reason instead of measures. docs/guides/check-assets.md is the manual.
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
# reason of a file whose worker process was ended
ENDED = "measuring the mesh exceeds the limit of memory or time, so its process was ended"
_ROOT = Path(__file__).resolve().parents[2]
HIDDEN = 0.01  # requirement "nothing hidden": largest share of the area that is hidden
WALL = 0.01  # requirement "thick walls": smallest thickness, as a share of the bounding box's longest edge
# Requirements of a valid solid: name -> function that returns True if the row of a mesh meets it.
REQUIREMENTS: dict[str, Callable[[dict], bool]] = {
    "closed": lambda row: row["closed"],
    "manifold": lambda row: row["manifold"],
    "wound one way": lambda row: row["oriented"] and not row["inverted_bodies"],
    "one body": lambda row: row["bodies"] == 1,
    "nothing hidden": lambda row: row["hidden"] <= HIDDEN,
    "thick walls": lambda row: row["thick_p01"] is not None and row["thick_p01"] >= WALL,
    "stands": lambda row: row["stands"] == "stands",
    "no crossing": lambda row: row["crossing"] == 0,
}
# measures of which the median over the meshes of a generator is reported
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


def find_mesh_files(folder: Path) -> list[Path]:
    """Return the mesh files of a folder and its subfolders, sorted.

    Raises: ValueError if there is no mesh file.
    """
    mesh_paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not mesh_paths:
        raise ValueError(
            f"{folder} and its subfolders contain no mesh file ({', '.join(SUFFIXES)}). Pass a folder with"
            " meshes."
        )
    return mesh_paths


def generator_name(mesh_path: Path, folder: Path, name_pattern: str | None) -> str:
    """Return the name of the generator that made a file.

    Args:
        mesh_path: path of the file.
        folder: the folder that is validated.
        name_pattern: regular expression that is searched in the path below `folder`. The name is the text of
            its first group. If it has no group, the name is the text of the whole match; if it does not
            match, the name is ''. If `name_pattern` is None, the name is that of the first folder below
            `folder`.
    """
    inner_path = mesh_path.relative_to(folder)  # the path that `name_pattern` is searched in
    if name_pattern is None:
        # A file directly in `folder` has no subfolder that could name its generator.
        return inner_path.parts[0] if len(inner_path.parts) > 1 else folder.resolve().name
    # The first group is None if it is optional and does not take part in the match.
    name_match = re.search(name_pattern, inner_path.as_posix())
    return (
        ""
        if name_match is None
        else name_match.group(1) or ""
        if name_match.re.groups
        else name_match.group()
    )


class _WorkerClient:
    """Client of a worker process that answers one request at a time.

    The process is started at the first request, and again at the next request after it has died.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict) -> dict:
        """Send one request, and return its answer, which is {"reason": ENDED} if the process dies."""
        if self.process is None:
            # One thread per worker, since there is one worker per core. More threads would compete.
            thread_variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "IGL_NUM_THREADS")
            environment = {**os.environ, "PYTHONPATH": str(_ROOT), **dict.fromkeys(thread_variables, "1")}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eg3d_rlhf.evaluation.mesh_validation_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Libraries print warnings about defective files, which would disturb the progress bar.
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            # One JSON document per line in both directions.
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer_line = self.process.stdout.readline()  # waits until the file is measured
        except BrokenPipeError:
            # The process died while the request was being written; this is handled like an empty answer.
            answer_line = ""
        # An empty line is the end of the stream, which means that the worker was killed, usually by its limit
        # of memory or time.
        if not answer_line:
            self.end()
            return {"reason": ENDED}
        return json.loads(answer_line)

    def stop(self) -> None:
        """Kill the process. Any thread may call this; a thread that waits in `ask` then returns from it."""
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> None:
        """Kill the process, wait for its end, and close its pipes. Only the thread that calls `ask` may call
        this.
        """
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.__exit__(None, None, None)  # closes its pipes and waits
            self.process = None


def answer_requests(requests: Sequence[dict], process_count: int) -> Iterator[tuple[int, dict]]:
    """Answer requests in several worker processes, and yield (index of the request, its answer).

    The answers come in the order in which they are finished.
    Args: process_count: number of worker processes.
    """
    pending_requests = queue.SimpleQueue[tuple[int, dict]]()  # requests with their index
    answers = queue.SimpleQueue[tuple[int, dict] | BaseException]()  # answers, or the exception of a thread
    for numbered_request in enumerate(requests):
        pending_requests.put(numbered_request)
    workers = [_WorkerClient() for _ in range(min(process_count, len(requests)))]  # at most one for each file

    def work(worker: _WorkerClient) -> None:
        """Answer requests until the queue is empty. An exception is put into the queue of answers."""
        try:
            while True:
                request_index, request = pending_requests.get_nowait()
                answers.put((request_index, worker.ask(request)))
        except queue.Empty:  # all requests are answered, or another thread answers the last ones
            pass
        # Without this, an exception in a thread would be lost, and the generator would wait forever for the
        # answer.
        except BaseException as error:
            answers.put(error)
        finally:
            worker.end()

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in requests:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        # This also runs if the consumer stops early. Emptying the queue keeps the workers from starting
        # another file, and killing the processes ends the current measurements.
        with contextlib.suppress(queue.Empty):
            while True:
                pending_requests.get_nowait()
        for worker, thread in zip(workers, threads, strict=True):
            worker.stop()
            thread.join()


def shares(file_rows: Iterable[dict]) -> list[dict]:
    """Count, for every generator and every requirement, the meshes that meet the requirement.

    Args: file_rows: rows of all files; files that were not measured are left out.
    Returns: a row for each generator and requirement, with the count, the number of measured meshes, the
        share and its 95 % Wilson interval.
    """
    table_rows = []
    for generator, measured_rows in _by_generator(file_rows):
        for requirement, is_met in REQUIREMENTS.items():
            # A row has the measures of a mesh; the function returns True if it meets the requirement.
            met_count = sum(bool(is_met(file_row)) for file_row in measured_rows)
            interval = wilson_interval(met_count, len(measured_rows))  # 95 %
            table_rows.append(
                {
                    "generator": generator,
                    "demand": requirement,
                    "of": len(measured_rows),
                    "count": met_count,
                    "share": met_count / len(measured_rows),
                    "lo": interval.lo,
                    "hi": interval.hi,
                }
            )
    return table_rows


# `two_way_interval` calls a statistic with indices of resampled rows and columns; here is only one column.
def _median(measure_values: np.ndarray, sampled_indices: np.ndarray, _columns: np.ndarray) -> float:
    """Return the median of resampled values.

    Args:
        measure_values: values of a measure, [N].
        sampled_indices: indices of the resampled values, [N].
        _columns: not used; `two_way_interval` passes it.
    """
    return float(np.median(measure_values[sampled_indices]))


def medians(file_rows: Iterable[dict], seed: int = 0) -> list[dict]:
    """Compute for every generator and measure the median over the meshes that have this measure.

    Args:
        file_rows: rows of all files; files that were not measured are left out.
        seed: seed of the bootstrap.

    Returns: a row for each generator and measure, with a 95 % percentile bootstrap interval over files.
    """
    table_rows = []
    for generator, measured_rows in _by_generator(file_rows):
        for measure_name in MEDIANS:
            # A measure that is undefined for a mesh is None.
            measure_values = np.array(
                [file_row[measure_name] for file_row in measured_rows if file_row[measure_name] is not None],
                dtype=np.float64,
            )
            if len(measure_values):
                interval = two_way_interval(
                    partial(_median, measure_values), len(measure_values), 1, seed=seed
                )
                table_rows.append(
                    {
                        "generator": generator,
                        "measure": measure_name,
                        "of": len(measure_values),
                        "median": float(np.median(measure_values)),
                        "lo": interval.lo,
                        "hi": interval.hi,
                    }
                )
    return table_rows


def paired(file_rows: Iterable[dict]) -> list[dict]:
    """Compare generators that have files of the same names.

    Args: file_rows: rows of all files; files that were not measured are left out.
    Returns: a row for each pair of generators and each requirement: the number of names for which only one of
        the two meshes meets the requirement, and the p-value of McNemar's exact test.
    """
    rows_by_generator = dict(_by_generator(file_rows))
    table_rows = []
    # generator -> row by the file's stem, so that suffixes may differ
    rows_by_name = {
        generator: {Path(file_row["file"]).stem: file_row for file_row in measured_rows}
        for generator, measured_rows in rows_by_generator.items()
    }
    for first_generator, second_generator in itertools.combinations(sorted(rows_by_name), 2):
        # names that both have
        shared_names = sorted(rows_by_name[first_generator].keys() & rows_by_name[second_generator].keys())
        # A single shared name is not a sample, so such a pair of generators gets no rows.
        for requirement, is_met in REQUIREMENTS.items() if len(shared_names) > 1 else ():
            # bool [shared names]: whether the mesh of each generator meets the requirement
            is_first_met, is_second_met = (
                np.array([bool(is_met(rows_by_name[generator][stem])) for stem in shared_names])
                for generator in (first_generator, second_generator)
            )
            # McNemar's test uses only the pairs of which exactly one mesh meets the requirement.
            only_first_count = int((is_first_met & ~is_second_met).sum())
            only_second_count = int((is_second_met & ~is_first_met).sum())
            table_rows.append(
                {
                    "first": first_generator,
                    "second": second_generator,
                    "demand": requirement,
                    "pairs": len(shared_names),
                    "only the first": only_first_count,
                    "only the second": only_second_count,
                    "p": binomial_test(only_first_count, only_first_count + only_second_count),
                }
            )
    return table_rows


def _by_generator(file_rows: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Return a list of (generator, its measured rows), sorted by the generator's name.

    Rows with a reason were not measured, and are left out.
    """
    rows_by_generator: dict[str, list[dict]] = {}
    for file_row in file_rows:
        if not file_row["reason"]:
            rows_by_generator.setdefault(file_row["generator"], []).append(file_row)
    return sorted(rows_by_generator.items())


def badness(mesh_row: dict) -> float:
    """Return a score for sorting meshes. The higher the score, the worse is the mesh.

    The integer part is the number of requirements that the mesh does not meet. The fractional part sorts
    meshes with the same number, by the length of open edges, the hidden area and the share of crossing faces.
    """
    # Each of the three terms is at most 1, so their sum divided by 4 is less than 1.
    return (
        sum(not is_met(mesh_row) for is_met in REQUIREMENTS.values())
        + (min(mesh_row["open_length"] / 8, 1) + mesh_row["hidden"] + mesh_row["crossing"]) / 4
    )
