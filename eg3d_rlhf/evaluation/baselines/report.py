"""Report of the baselines of a generator with latents: measure all rungs, choose points, and write the files.

The report trains nothing. A rung whose run is not given is listed with the command that makes it. All work is
stored by the hash of its inputs, so an interrupted report resumes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.baselines import rungs, samples
from eg3d_rlhf.evaluation.baselines.directions import BACK_COUNT, PRINCIPAL_COUNT
from eg3d_rlhf.evaluation.baselines.frontier import advise, choose_point
from eg3d_rlhf.evaluation.baselines.measurements import Measured, compute_metrics
from eg3d_rlhf.evaluation.baselines.output import write_report
from eg3d_rlhf.evaluation.baselines.rungs import CollateralBound, Inputs, Rung
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.run import STATS
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import find_network
from eg3d_rlhf.measures.image_similarity import ssim
from eg3d_rlhf.measures.resampling import kernel_change_interval
from eg3d_rlhf.tuning.gan.steering_settings import SteerOptions
from training.progress import tqdm

KIND = "baselines"  # kind of the artefacts in the store
VERSION = 1  # of the measurements; it is increased when their code changes
RESAMPLES = 100  # bootstrap resamples of the interval of an image distance
TRUTH = "ground truth"  # names of what measures the gain
HELDOUT = "held-out reward"


def plan_tasks(inputs: Inputs, rung_list: Sequence[Rung]) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """Return the tasks that measure all points: the tasks that each one needs, and the inputs of each.

    Args:
        inputs: files and settings of the report.
        rung_list: rungs and controls.
    """
    # The needs form a graph without cycles: preparations first, then the points that use their results.
    kinds = {rung.kind for rung in rung_list}
    needs: dict[str, list[str]] = {}
    # The tasks that take longest are the first ones.
    # One task measures all filters, because they share the generation of the samples.
    if rungs.FILTER in kinds:
        needs |= {samples.FIND_FILTERS: [], samples.FILTERS: []}
    if rungs.SEARCH in kinds:
        needs[samples.FIND_SEARCH] = []
    if rungs.BEST_OF in kinds:
        needs[samples.FIND_CANDIDATES] = []
    # All steerings share one finder: the samples of many labels contain those of few.
    finders = {
        rung.key: samples.finder_of(rung)
        for rung in rung_list
        if rung.kind in (rungs.PRINCIPAL, rungs.EIGENVECTOR, rungs.STEERING)
    }
    needs |= {finder: [] for finder in finders.values()}
    if inputs.data:
        needs[samples.DATA] = []
    needed_by_kind = {rungs.BEST_OF: samples.FIND_CANDIDATES, rungs.SEARCH: samples.FIND_SEARCH}
    for rung in rung_list:
        if rung.kind == rungs.FILTER:
            continue
        needed = finders.get(rung.key) or needed_by_kind.get(rung.kind)
        for task in _tasks_of(rung):
            needs[task] = [needed] if needed else []
    shared_inputs = _shared_inputs(inputs)
    # The hash of the network's file, so that a new run in the same folder is measured again.
    network_hash = {
        task: file_hash(find_network(network))
        for rung in rung_list
        for strength in rung.strengths
        for task, network in zip(_tasks_at(rung, strength), rung.networks, strict=False)
    }
    inputs_by_task = {
        task: {
            **shared_inputs,
            "task": task,
            # Keys are added only where they matter. Another dataset
            # therefore does not invalidate the measured shapes.
            **({"network": network_hash[task]} if task in network_hash else {}),
            **({"data": inputs.data} if task == samples.DATA else {}),
            **(_label_inputs(inputs) if rungs.STEERING in task else {}),
        }
        for task in needs
    }
    return needs, inputs_by_task


def _tasks_at(rung: Rung, strength: float) -> list[str]:
    """List the tasks that measure a point of a rung, one for each training seed."""
    return [samples.point(rung, strength, index) for index in range(max(1, len(rung.networks)))]


def _tasks_of(rung: Rung) -> list[str]:
    """List the tasks that measure all points of a rung."""
    return [task for strength in rung.strengths for task in _tasks_at(rung, strength)]


def _shared_inputs(inputs: Inputs) -> dict[str, Any]:
    """Return the inputs on which every result depends."""
    return {
        "version": VERSION,
        "generator": file_hash(inputs.network or bundled.GENERATOR),
        "reward": file_hash(inputs.reward),
        "heldout": file_hash(inputs.heldout_reward) if inputs.heldout_reward else "",
        "latents": inputs.latents,
        "validation": inputs.validation,
        "psi": inputs.psi,
        "seed": inputs.seed,
        "ground_truth": inputs.has_ground_truth,
        # CPU and GPU round differently, so their results are stored under different keys.
        "device": torch.device(inputs.device).type,
    }


def _label_inputs(inputs: Inputs) -> dict[str, str]:
    """Return the inputs on which a direction from labels depends besides the shared ones."""
    return {"labels": file_hash(inputs.labels) if inputs.labels else ""}


def run_missing(
    needs: Mapping[str, Sequence[str]],
    inputs_by_task: Mapping[str, Mapping],
    inputs: Inputs,
    rung_list: Sequence[Rung],
    folder: Path,
    process_count: int,
    description: str,
) -> None:
    """Run the tasks whose results are not stored yet.

    Args:
        needs: the tasks that each task needs.
        inputs_by_task: inputs of each task, also of tasks that are done.
        inputs: files and settings of the report.
        rung_list: rungs and controls.
        folder: folder of the report.
        process_count: number of worker processes.
        description: text of the progress bar.
    """
    store = Store(folder / "work", renew=True)
    # With `renew=True`, a damaged artefact counts as unfinished, and its task runs again.
    missing = [task for task in needs if store.find(KIND, inputs_by_task[task]) is None]
    weight_by_task = {task: task_weight(task, inputs) for task in needs}
    total_weight = sum(weight_by_task.values())
    missing_weight = sum(weight_by_task[task] for task in missing)
    with tqdm(
        total=total_weight, initial=total_weight - missing_weight, desc=description, unit="sample"
    ) as bar:
        if missing:
            run_tasks(
                # A need whose result is stored already is dropped, since the pool only runs missing tasks.
                {task: [needed for needed in needs[task] if needed in missing] for task in missing},
                samples.prepare_worker,
                (store.root, inputs, dict(inputs_by_task), list(rung_list)),
                # Each process loads the networks, so more processes than tasks would only cost memory.
                min(process_count, len(missing)),
                folder / "logs",
                lambda task, _: bar.update(weight_by_task[task]) and None,  # a callback must return None
            )


# Costs of a sample relative to a measurement of its shape, measured on the bundled generator with one thread.
FILTER_COST = 0.4  # one filter, with the measurement of the filtered shape
SCORE_COST = 0.2  # generation and reward
STEP_COST = 0.5  # one step of the search
IMAGE_COST = 0.8


def task_weight(task: str, inputs: Inputs) -> int:
    """Return the cost of a task in measured samples, for the progress bar.

    Args:
        task: name of the task.
        inputs: files and settings of the report.
    """
    # One of the filters is the closing, which counts once for each radius.
    filter_cost = FILTER_COST * (len(rungs.CLOSING_RADII) + len(rungs.BACK_FILTERS) - 1)
    cost_by_task = {
        samples.FIND_FILTERS: inputs.validation * (2 + filter_cost),
        samples.FILTERS: inputs.latents * (1 + filter_cost) + inputs.validation,
        samples.FIND_SEARCH: inputs.latents * max(rungs.STEPS) * STEP_COST,
        samples.FIND_CANDIDATES: inputs.latents * max(rungs.BEST_OF_COUNTS) * SCORE_COST,
        samples.FIND_PRINCIPAL: inputs.validation * 2 * PRINCIPAL_COUNT * SCORE_COST,
        samples.FIND_EIGENVECTOR: inputs.validation * 2 * BACK_COUNT * SCORE_COST,
        samples.FIND_STEERING: SteerOptions.unlabelled * SCORE_COST,
        samples.DATA: samples.MAX_REALS * 0.01,
    }
    point_cost = inputs.latents * (IMAGE_COST if task.startswith(samples.IMAGES_OF) else 1)
    return max(1, round(cost_by_task.get(task, point_cost)))


class Results:
    """Stored results of a report, and the points of its rungs.

    Args:
        store: store of the results.
        inputs_by_task: inputs of each task.
        inputs: files and settings of the report.
    """

    def __init__(self, store: Store, inputs_by_task: Mapping[str, Mapping], inputs: Inputs):
        self._store = store
        self._inputs_by_task = inputs_by_task
        self._memory: dict[str, Measured] = {}
        self.inputs = inputs

    def load(self, task: str) -> Measured:
        """Return the arrays of a task."""
        if task not in self._memory:
            self._memory[task] = self._store.load_arrays(KIND, self._inputs_by_task[task])
        return self._memory[task]

    @property
    def before(self) -> Measured:
        """Return the measurements of the untuned samples."""
        return self.load(samples.point(Rung(key=rungs.NOTHING, title="", kind=rungs.NOTHING), 0.0))

    def direction(self, rung: Rung) -> dict[str, np.ndarray]:
        """Return the direction of a rung, see `directions.to_arrays`."""
        return samples.rung_direction(rung, self.load(samples.finder_of(rung)))

    def measured(self, rung: Rung, strength: float, filter_name: str = "") -> list[Measured]:
        """Return the measurements of a point, one for each training seed.

        Args:
            rung: the rung.
            strength: strength of the point.
            filter_name: chosen filter, for a rung of filters.
        """
        # A filter has no task of its own for each share. Its points are
        # combined from the filtered and the unfiltered measurements.
        if rung.kind != rungs.FILTER:
            return [self.load(task) for task in _tasks_at(rung, strength)]
        filtered = samples.filter_arrays(self.load(samples.FILTERS), filter_name)
        before = self.before
        # [N] is reshaped to [N, 1, ...], so that it selects whole rows of arrays with any number of axes.
        is_filtered = filtered["changed"] > strength
        weighed = {
            name: np.where(is_filtered.reshape(-1, *[1] * (array.ndim - 1)), array, before[name])
            for name, array in filtered.items()
            if name in before and name != "seconds"
        }
        return [{**weighed, "seconds": filtered["seconds"]}]

    def gains(self, measured: Sequence[Measured], evaluator: str) -> np.ndarray:
        """Return the gain [N] of each latent against the untuned samples, averaged over training seeds."""
        before = self.before
        # The sign is chosen so that higher is better for both evaluators: an error falls, a reward rises.
        if evaluator == TRUTH:
            return np.mean(
                [heads.back_of_head_error(before) - heads.back_of_head_error(seed) for seed in measured],
                axis=0,
            )
        # [S, N] -> [N]: averaged over training seeds, so that the bootstrap resamples latents alone.
        return np.mean([seed["heldout"] - before["heldout"] for seed in measured], axis=0)


def mean_metrics(metrics_by_seed: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Average metrics over training seeds. A metric that is None for a seed is left out of its mean."""
    means: dict[str, float | None] = {}
    for name in metrics_by_seed[0]:
        # The mean of a None would be an error, and replacing it by 0 would be wrong.
        defined = [value for metrics in metrics_by_seed if (value := metrics[name]) is not None]
        means[name] = float(np.mean(defined)) if defined else None
    return means


def compute_row(results: Results, rung: Rung, bound: CollateralBound, evaluator: str) -> dict[str, Any]:
    """Compute the points of a rung, and choose the one that is shown.

    Returns: JSON values: "points" from weak to strong, and "shown", the index of the shown point.
    """
    filter_name = ""
    strongest = None
    rung_name = rung.key.removeprefix(f"{rungs.FILTER} ")
    if rung.kind == rungs.FILTER:
        # The reward on validation latents limits the strength, and the collateral bound may lower it further.
        filter_name, strongest = samples.choose_filter(rung_name, results.load(samples.FIND_FILTERS))
    points: list[dict[str, Any]] = []
    for strength in rung.strengths:
        measured = results.measured(rung, strength, filter_name)
        # Metrics are computed for each training seed and then averaged. Metrics
        # of averaged shapes would describe shapes that no network generates.
        metrics = mean_metrics(
            [compute_metrics(results.before, seed, is_same_sample=rung.is_same_sample) for seed in measured]
        )
        if evaluator:
            interval = bootstrap_mean_interval(results.gains(measured, evaluator))
            metrics["gain"] = interval.mean
        points.append(
            {
                # JSON has no infinity; a filter above an infinite share is never applied
                "strength": strength if math.isfinite(strength) else None,
                "text": rung.strength_text(strength),
                "metrics": metrics,
                "gain_ci95": [interval.lo, interval.hi] if evaluator else None,
                "exceeds": bound.exceeded_by(metrics),
                "seconds_a_sample": float(np.mean([seed["seconds"].item() for seed in measured])),
            }
        )
    # A direction without evidence is listed as such, and not as a move that failed.
    is_found = rung.kind != rungs.STEERING or bool(results.direction(rung)["is_found"].item())
    return {
        "key": rung.key,
        "is_found": is_found,
        "title": rung.title + (f" ({filter_name})" if filter_name not in ("", rung_name) else ""),
        "labels": rung.labels,
        "seconds_once": seconds_once(results, rung),
        "filter": filter_name,
        "points": points,
        "shown": choose_point([point["exceeds"] for point in points], strongest),
    }


def seconds_once(results: Results, rung: Rung) -> float | None:
    """Return the computing time that a rung takes once, before its first sample; None if it is not recorded.

    The time of a run is the mean over its training seeds, as their machine recorded it.
    """
    if rung.kind in (rungs.PRINCIPAL, rungs.EIGENVECTOR, rungs.STEERING):
        return results.direction(rung)["seconds_once"].item()
    if rung.kind != rungs.NETWORK:
        return 0.0
    recorded = []
    for network in rung.networks:
        folder = network if network.is_dir() else network.parent
        stats_file = folder / STATS
        # The last line of the statistics holds the elapsed time of the run.
        lines = stats_file.read_text().splitlines() if stats_file.is_file() else []
        recorded += [seconds for line in lines[-1:] if (seconds := json.loads(line).get("seconds"))]
    # A mean over a part of the seeds would be compared with metrics over all of them, so it is None.
    return float(np.mean(recorded)) if len(recorded) == len(rung.networks) else None


def compare_images(
    results: Results, rung_by_key: Mapping[str, Rung], row: Mapping[str, Any], reference: Rung
) -> dict[str, Any]:
    """Compare the images of a shown point with those of its reference.

    Returns: JSON values: "image_change", 1 minus the mean structural similarity of the same latents, and
        "image_distance_change", the increase of the kernel distance to the data with its 95 % interval; None
        where they are not defined.
    """
    rung = rung_by_key[row["key"]]
    values: dict[str, Any] = {
        "image_reference": reference.key,
        "image_change": None,
        "image_distance_change": None,
        "image_distance_change_ci95": None,
    }
    if rung.kind == rungs.FILTER:  # a filter changes shapes and no images
        return values
    shown_strength = rung.strengths[row["shown"]]
    # One entry for each training seed. The reference is the
    # λ_r = 0 network of the same seed where there is one.
    shown = [results.load(samples.image_task(task)) for task in _tasks_at(rung, shown_strength)]
    references = [results.load(samples.image_task(task)) for task in _tasks_at(reference, 0.0)]
    # a reference with fewer training seeds is used again
    pairs = [(references[index % len(references)], seed) for index, seed in enumerate(shown)]
    if rung.is_same_sample:
        values["image_change"] = float(
            # SSIM is computed for each latent, [N], from images of the same camera.
            np.mean([1 - ssim(_signed(a["images"]), _signed(b["images"])).mean() for a, b in pairs])
        )
    if "features" in shown[0]:
        # The kernel distance is unbiased for small sets, where the Fréchet
        # distance is not (Bińkowski et al. 2018, arXiv 1801.01401).
        change = kernel_change_interval(
            np.concatenate([a["features"] for a, _ in pairs]),
            np.concatenate([b["features"] for _, b in pairs]),
            results.load(samples.DATA)["features"],
            RESAMPLES,
            results.inputs.seed,
        )
        values["image_distance_change"] = float(change.mean)
        values["image_distance_change_ci95"] = [float(change.lo), float(change.hi)]
    return values


def _signed(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 images [N, 3, R, R] to values in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def missing_commands(inputs: Inputs, rung_list: Sequence[Rung]) -> dict[str, str]:
    """Return the commands that make what the report lacks, by what it is."""
    network = inputs.network or ""
    network_flag = f" --network={network}" if network else ""
    start_flags = f" --init={network}" if network else ""
    data_flag = f" --data={inputs.data}" if inputs.data and inputs.data != bundled.DATA else ""
    # The commands repeat only flags that differ from the defaults, so that they stay readable.
    reward_flag = "" if inputs.reward == bundled.REWARD else f" --reward-ckpt={inputs.reward}"
    train = f"eg3d-rlhf train --reward=sigma --lambda-r=10{reward_flag}{data_flag}"
    steer = f"eg3d-rlhf steer{network_flag} --labels={inputs.labels or 'LABELS'} --out=steered.safetensors"
    commands = {}
    if inputs.labels is None:
        commands["labels, for steering"] = f"eg3d-rlhf label{network_flag}"
    if inputs.heldout_reward is None:
        commands["held-out reward, for the advice"] = (
            f"eg3d-rlhf reward train{network_flag} --labels=OTHER-LABELS --run-dir=heldout"
        )
    if not inputs.runs:
        commands["tuning (--run)"] = f"{train}{start_flags}"
    if not inputs.controls:
        # Only the first =10 is replaced, since a path might contain the same text.
        commands["tuning without the reward (--control)"] = f"{train.replace('=10', '=0', 1)}{start_flags}"
    if not inputs.steered_runs:
        commands["steering, then tuning (--steered-run)"] = f"{steer} && {train} --init=steered.safetensors"
    if not inputs.steered_controls:
        commands["the same without the reward (--steered-control)"] = (
            f"{train.replace('=10', '=0', 1)} --init=steered.safetensors"
        )
    measured_kinds = {rung.kind for rung in rung_list}
    return commands if measured_kinds != {rungs.NOTHING} else {}


def work(
    inputs: Inputs,
    rung_list: Sequence[Rung],
    bound: CollateralBound,
    folder: Path,
    process_count: int,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure all rungs, and write the report.

    Args:
        inputs: files and settings of the report.
        rung_list: rungs from cheap to dear.
        bound: collateral bound at which rungs with a strength are shown.
        folder: folder of the report.
        process_count: number of worker processes.
    Returns: the content of baselines.json, and the paths of the written files.
    """
    all_rungs = [*rung_list, *rungs.control_rungs(inputs)]
    needs, inputs_by_task = plan_tasks(inputs, all_rungs)
    run = partial(run_missing, inputs=inputs, rung_list=all_rungs, folder=folder, process_count=process_count)
    # Shapes come first. Only the points that are shown get images, which saves most of the renders.
    run(needs, inputs_by_task, description="samples of all rungs")
    results = Results(Store(folder / "work", renew=True), inputs_by_task, inputs)
    evaluator = TRUTH if inputs.has_ground_truth else HELDOUT if inputs.heldout_reward else ""
    # The rungs stay in the order of their cost, which `advise` needs.
    rows = [compute_row(results, rung, bound, evaluator) for rung in rung_list]
    rung_by_key = {rung.key: rung for rung in all_rungs}
    shown_tasks = [
        task
        # Controls are measured at their only point, so that the images of trained networks have a reference.
        for rung, shown in [
            *((rung_by_key[row["key"]], row["shown"]) for row in rows),
            *((rung, 0) for rung in rungs.control_rungs(inputs)),
        ]
        if rung.kind != rungs.FILTER
        for task in _tasks_at(rung, rung.strengths[shown])
    ]
    image_inputs = {
        samples.image_task(task): {
            **inputs_by_task[task],
            "task": samples.image_task(task),
            "data": inputs.data,
        }
        for task in shown_tasks
    }
    inputs_by_task |= image_inputs
    run({task: [] for task in image_inputs}, inputs_by_task, description="images of the shown points")
    for row in rows:
        reference = rung_by_key[rungs.reference_of(rung_by_key[row["key"]], list(rung_by_key))]
        row |= compare_images(results, rung_by_key, row, reference)
    shown_measured = {
        row["key"]: results.measured(
            rung_by_key[row["key"]], rung_by_key[row["key"]].strengths[row["shown"]], row["filter"]
        )
        for row in rows
    }
    data = {
        "inputs": {**_shared_inputs(inputs), **_label_inputs(inputs), "data": inputs.data},
        "unit": "latents",
        "seeds": list(LATENTS.take(inputs.latents, inputs.seed)),
        # A latent whose depth map [R, C] is NaN everywhere shows no surface in front.
        "without_surface": int(np.isnan(results.before["depth"]).all(axis=(1, 2)).sum()),
        "defective": int(heads.find_defective(results.before).sum()) if inputs.has_ground_truth else None,
        "evaluator": evaluator,
        "bound": vars(bound),
        "rows": rows,
        "advice": advise(
            {key: results.gains(measured, evaluator) for key, measured in shown_measured.items()},
            {row["key"]: not row["points"][row["shown"]]["exceeds"] for row in rows},
        )
        if evaluator
        else None,
        "missing": missing_commands(inputs, rung_list),
    }
    arrays = {
        f"{key} #{index}: {name}": array
        for key, measured in shown_measured.items()
        for index, seed in enumerate(measured)
        for name, array in seed.items()
        # Depth maps [N, R, C] would make the file large; they stay in the store.
        if array.ndim == 1
    }
    return data, write_report(data, arrays, folder)
