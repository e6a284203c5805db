"""Baselines by cost for a flow generator's folder WORK, on the same test prompts and noises.

The rungs are: the base; guidance and steps of the sampler on a small grid, chosen on other prompts by the
latent reward; best of n by the latent reward; filters of the finished meshes; the tuned generator; and the
tuned generator with best of n. Flow generators have no latents that a direction could move, so best of n is
the corresponding cheap way. Gains are measured by the problem's held-out evaluator, if there is one.

Shapes: A assets (prompts in order, several noises each), n samples of one choice, D numbers of a latent.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.baselines.frontier import advise, choose_point
from eg3d_rlhf.evaluation.baselines.output import write_report
from eg3d_rlhf.evaluation.baselines.rungs import CollateralBound
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.geometry.files.triangles import read_triangles
from eg3d_rlhf.geometry.mesh import count_edges, find_parts, largest_part
from eg3d_rlhf.geometry.mesh_holes import fill_rims
from eg3d_rlhf.measures.meshes.clean import clean_mesh
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.tuning.flow.base.evaluation import latent_vector
from eg3d_rlhf.tuning.flow.base.family import Opens, Shows
from eg3d_rlhf.tuning.flow.base.sampling import crossed
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import EmptyStructure, stage_of
from eg3d_rlhf.tuning.flow.families.opening import hash_of
from eg3d_rlhf.tuning.flow.training.latent_reward import KIND as REWARD_KIND
from eg3d_rlhf.tuning.flow.training.latent_reward import load as load_latent_reward
from eg3d_rlhf.tuning.flow.workspace.answers import trained_reward_command
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw_or_empty, open_pipeline
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, REWARD, TEST, Work
from training.progress import tqdm
from training.storage import read_tensors

KIND = "flow-baselines"  # kind of the artefacts in the store
VERSION = 1  # of the measurements; it is increased when their code changes
EVALUATOR = "held-out evaluator"
BASE = "base"
GRID = "guidance and steps"
CANDIDATES = "candidates"
TUNED = "tuned"
TUNED_CANDIDATES = "tuned candidates"
# Each count uses a prefix of the same samples, so a larger count never chooses a lower reward.
BEST_OF_COUNTS = (2, 4, 8)
TUNED_COUNT = 4  # number of samples among which the reward chooses, of the tuned generator
FACTORS = (0.5, 1.0, 2.0)  # factors on the strength of guidance and on the number of steps
MESH_FILTERS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "largest part": lambda vertices, faces: largest_part(vertices, faces)[:2],
    "filled holes": lambda vertices, faces: fill_rims(vertices, faces)[:2],
}
HARMED = 0.25  # standard deviations of the base's scores by which a good asset falls if it is degraded

Measured = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FlowInputs:
    """Settings of a report. It is passed to worker processes, so it holds no networks."""

    work: Path  # the folder WORK
    tuned: Path | None = None  # folder of the training, such as WORK/tune-00; None: no training
    assets: int = 64  # number of assets of a rung, A
    seed: int = 0  # seed of the noises
    device: str = "cpu"

    def prompts_and_seeds(self, work: Work, split: str, share: float = 1.0) -> tuple[list[str], list[int]]:
        """Return the prompts and the noise seeds of the assets. Each prompt has two noises or more.

        Args:
            work: the opened folder.
            split: split of the prompts.
            share: share of the number of assets.
        """
        # At least two prompts with two noises each, because the spread within a prompt needs two samples.
        asset_count = max(4, round(self.assets * share))
        prompts = work.names(split)[: max(1, asset_count // 2)]
        # Each prompt gets the same number of noises, so rounding may give fewer assets than were asked for.
        return crossed(prompts, max(2, asset_count // len(prompts)), self.seed)


def grid_task(factors: tuple[float, float], split: str) -> str:
    """Return the name of the task that samples with factors on guidance and steps."""
    return f"{GRID} {factors[0]:g} {factors[1]:g} {split}"


class FlowBench:
    """Generator, reward and evaluator of a folder WORK, and the functions that sample and measure.

    Args: inputs: settings of the report.
    """

    def __init__(self, inputs: FlowInputs):
        self.inputs = inputs
        self.work = Work.open(inputs.work)
        self.family = self.work.check_pipeline()
        device = torch.device(inputs.device)
        self.pipeline = open_pipeline(self.work, self.family, device, CHOOSE, TEST)
        # The original settings are kept, because `measure`
        # replaces them in the stages for each pair of factors.
        self.samplings = {stage.name: stage.sampling for stage in self.pipeline.stages}
        reward_file = self.work.folder / REWARD
        self.reward = None
        if reward_file.is_file():
            # The reward scores the latents of one stage, whose name is written in its file.
            stage = stage_of(self.pipeline, read_tensors(reward_file, REWARD_KIND)[1]["form"]["stage"])
            self.reward = load_latent_reward(reward_file, self.pipeline, stage, self.work.names(TEST)[0])
        # Only bundled generators have an evaluator that no tuning uses.
        self.evaluator = (
            self.family.open(ProblemSource(), device).final if isinstance(self.family, Opens) else None
        )

    def tuned_networks(self) -> dict[str, torch.nn.Module]:
        """Return the tuned networks by stage."""
        assert self.inputs.tuned is not None
        return {
            stage: tuned_model(stage_of(self.pipeline, stage).model, weights)
            for stage, weights in self.work.tuned(self.inputs.tuned).items()
        }

    def measure(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        networks: Mapping[str, torch.nn.Module] | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> Measured:
        """Sample and measure assets.

        Args:
            prompts: prompt of each asset, [A].
            seeds: noise seed of each asset, [A].
            networks: networks in place of those of the stages; None: none.
            factors: factors on the strength of guidance and on the number of steps.
        Returns: arrays [A]: "reward", "heldout" and the measures of meshes, as far as they are defined;
            "vector" [A, D], latents of the first stage; and "seconds" of sampling one asset. Values of assets
            without a surface are NaN.
        """
        for stage in self.pipeline.stages:
            sampling = self.samplings[stage.name]
            # The factors multiply the original settings and not those
            # of the last call, so calls do not depend on their order.
            stage.sampling = replace(
                sampling,
                cfg_strength=sampling.cfg_strength * factors[0],
                # More steps reduce the error of the solver. They do
                # not change the distribution that the flow has learnt.
                steps=max(1, round(sampling.steps * factors[1])),
            )
        rows: list[dict[str, Any]] = []
        sampling_seconds = 0.0
        # The batch is that of WORK, because another batch size may change the rounding of the samples.
        batch = max(1, self.work.batch)
        for start in range(0, len(prompts), batch):
            # Only sampling is timed. Scoring and meshing are costs of this report and not of the rung.
            batch_prompts = list(prompts[start : start + batch])
            start_time = time.monotonic()
            sampled = draw_or_empty(self.pipeline, batch_prompts, seeds[start : start + batch], networks)
            sampling_seconds += time.monotonic() - start_time
            rows += [
                # An empty sparse structure cannot be decoded. Its
                # row stays empty, and its values become NaN below.
                {} if isinstance(asset, EmptyStructure) else self._measure_asset(prompt, *asset)
                for prompt, asset in zip(batch_prompts, sampled, strict=True)
            ]
        # A dict keeps the order in which the names first appear; a set would not.
        names = dict.fromkeys(name for row in rows for name in row)
        # If all assets were empty, there would be no size. A
        # generator without any surface cannot be measured.
        vector_size = next(len(row["vector"]) for row in rows if row)
        measured = {
            name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)
            for name in names
            if name != "vector"
        }
        empty_vector = np.full(vector_size, np.nan)
        measured["vector"] = np.stack([row.get("vector", empty_vector) for row in rows]).astype(np.float32)
        return {**measured, "seconds": np.full(len(rows), sampling_seconds / len(rows))}

    @torch.no_grad()
    def _measure_asset(self, prompt: str, latents: Mapping, asset: Any) -> dict[str, Any]:
        """Measure one asset, see `measure`."""
        values: dict[str, Any] = {
            "vector": latent_vector(latents[self.pipeline.stages[0].name]).cpu().numpy()
        }
        if self.reward is not None:
            # A batch of one asset, because the numbers of active voxels differ between assets.
            scored = collate([latents[self.reward.stage.name]])
            values["reward"] = float(self.reward.score_latents(scored, [prompt])[0])
        if self.evaluator is not None:
            values["heldout"] = float(self.evaluator([asset], [prompt])[0])
        if isinstance(self.family, Shows):
            with tempfile.TemporaryDirectory() as folder:
                # `show` writes a file. Reading it again measures what a
                # user would export, with duplicated corners at seams.
                vertices, faces = read_triangles(self.family.show(asset, Path(folder) / "asset"))
            # Welded, so that seams of the texture do not count as open edges.
            mesh = clean_mesh(vertices, faces, up=self.work.up)
            values |= measure_mesh("", mesh.vertices, mesh.faces)
            for filter_name, apply_filter in MESH_FILTERS.items():
                start_time = time.monotonic()
                filtered = apply_filter(mesh.vertices, mesh.faces)
                filter_seconds = time.monotonic() - start_time
                values |= measure_mesh(f"{filter_name}: ", *filtered)
                values[f"{filter_name}: seconds"] = filter_seconds
        return values

    def run(self, task: str) -> Measured:
        """Compute the arrays of a task."""
        prompts, seeds = self.inputs.prompts_and_seeds(self.work, TEST)
        if task == BASE:
            return self.measure(prompts, seeds)
        if task == TUNED:
            return self.measure(prompts, seeds, self.tuned_networks())
        if task in (CANDIDATES, TUNED_CANDIDATES):
            is_tuned = task == TUNED_CANDIDATES
            count = TUNED_COUNT if is_tuned else max(BEST_OF_COUNTS)
            # The first sample of a choice is that of the base. Further ones have noises of their own.
            further = [
                # Noise seeds are hashes (see `crossed`), so multiples of a prime as offsets give noises that
                # no other asset has, except by chance.
                (prompt, seed + 7919 * number)
                for prompt, seed in zip(prompts, seeds, strict=True)
                for number in range(count)
            ]
            measured = self.measure(
                [prompt for prompt, _ in further],
                # Below 2^31, so that the seed fits into a signed 32-bit integer.
                [seed % 2**31 for _, seed in further],
                self.tuned_networks() if is_tuned else None,
            )
            # `further` lists all samples of an asset one after the other, so the reshape gives [A, n, ...].
            return {
                name: array.reshape(len(prompts), count, *array.shape[1:]) for name, array in measured.items()
            }
        for split, factors in product((TEST, CHOOSE), product(FACTORS, FACTORS)):
            if task == grid_task(factors, split):
                share = 1.0 if split == TEST else 0.5
                return self.measure(*self.inputs.prompts_and_seeds(self.work, split, share), factors=factors)
        raise AssertionError(task)


def measure_mesh(prefix: str, vertices: np.ndarray, faces: np.ndarray) -> dict[str, float]:
    """Count the parts of a welded mesh, and the share of its half-edges without a partner.

    Args:
        prefix: start of the names of the values.
        vertices: coordinates [V, 3].
        faces: triangles [F, 3].
    """
    return {
        f"{prefix}parts": float(find_parts(faces, len(vertices))[0]) if len(faces) else 0.0,
        # Each triangle has three half-edges. A closed mesh has the share 0.
        f"{prefix}open_share": count_edges(faces).open / max(1, 3 * len(faces)),
    }


def prepare_worker(
    folder: Path, inputs: FlowInputs, inputs_by_task: Mapping[str, Mapping]
) -> Callable[[str], None]:
    """Load the networks, and return the function that runs and stores a task. See `run_tasks`."""
    store = Store(folder, renew=True)
    bench = FlowBench(inputs)

    def run_and_store(task: str) -> None:
        store.arrays(KIND, inputs_by_task[task], partial(bench.run, task))

    return run_and_store


def choose(candidates: Measured, count: int) -> Measured:
    """Choose, for each asset, the best of some samples by the latent reward.

    Args:
        candidates: arrays with one row for each asset and one column for each sample, [A, n, ...].
        count: number of samples among which the reward chooses.
    Returns: arrays of the chosen samples, [A, ...], with the seconds of all samples.
    """
    # A sample without a surface has no reward, and is chosen last.
    rewards = np.nan_to_num(candidates["reward"][:, :count], nan=-np.inf)
    best = rewards.argmax(axis=1)
    # One index for each asset: [A, n, ...] -> [A, ...].
    chosen = {name: array[np.arange(len(best)), best] for name, array in candidates.items()}
    # All samples must be generated before one is chosen, so their times are added.
    chosen["seconds"] = candidates["seconds"][:, :count].sum(axis=1)
    return chosen


def apply_mesh_filter(measured: Measured, filter_name: str) -> Measured:
    """Return the measurements after a filter of meshes. Rewards read no meshes, so they have no value."""
    prefix = f"{filter_name}: "
    filtered = {
        name.removeprefix(prefix): array for name, array in measured.items() if name.startswith(prefix)
    }
    return {**filtered, "vector": measured["vector"]}


def fill_empty(measured: Measured, base: Measured) -> Measured:
    """Give assets without a surface the lowest score that an asset of the base has."""
    if "heldout" not in measured:
        return measured
    return {
        **measured,
        "heldout": np.where(np.isnan(measured["heldout"]), np.nanmin(base["heldout"]), measured["heldout"]),
    }


def mean_spread(vectors: np.ndarray, prompts: Sequence[str]) -> float:
    """Return the standard deviation of latents [A, D] within a prompt, averaged over prompts and numbers."""
    # The spread is measured within a prompt. Differences between prompts would hide the collapse of the
    # variety that over-optimisation of a reward causes.
    prompt_array = np.array(prompts)
    return float(
        np.mean(
            [np.nanstd(vectors[prompt_array == prompt], axis=0).mean() for prompt in dict.fromkeys(prompts)]
        )
    )


def compute_metrics(base: Measured, measured: Measured, prompts: Sequence[str]) -> dict[str, float | None]:
    """Compute the metrics of a point, by the keys of the table."""
    metrics: dict[str, float | None] = {
        name: float(np.nanmean(measured[name]))
        for name in ("reward", "heldout", "parts", "open_share")
        if name in measured
    }
    base_spread = mean_spread(base["vector"], prompts)
    metrics["variety"] = mean_spread(measured["vector"], prompts) / base_spread if base_spread else None
    if "heldout" in measured:
        # Without this, a rung could raise its mean by producing empty assets, which the mean would leave out.
        scores_before = fill_empty(base, base)["heldout"]
        scores_after = fill_empty(measured, base)["heldout"]
        # Flows have no ground truth that could define intact
        # samples, so the upper half of the base stands for them.
        is_good = scores_before >= np.median(scores_before)
        is_degraded = scores_after < scores_before - HARMED * scores_before.std()
        metrics["intact_degraded"] = float(is_degraded[is_good].mean())
        metrics["intact"] = float(is_good.sum())  # number of assets
        metrics["gain"] = float((scores_after - scores_before).mean())
    return metrics


def measure_work(
    inputs: FlowInputs, bound: CollateralBound, folder: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Measure all rungs of a folder WORK, and write the report.

    Args:
        inputs: settings of the report.
        bound: collateral bound; identity and front are not defined for flows.
        folder: folder of the report.
    Returns: the content of baselines.json, and the paths of the written files.
    """
    work = Work.open(inputs.work)
    reward_file = work.folder / REWARD
    has_reward = reward_file.is_file()
    tuned_weights = work.tuned(inputs.tuned) if inputs.tuned is not None else {}
    # The factors (1, 1) on the test prompts are the base itself, which is measured anyway.
    grid = [factors for factors in product(FACTORS, FACTORS) if factors != (1.0, 1.0)]
    tasks = [BASE, *(grid_task(factors, TEST) for factors in grid)]
    if has_reward:
        # The grid is chosen on other prompts (CHOOSE). A choice on the test prompts would be optimistic.
        tasks += [CANDIDATES, *(grid_task(factors, CHOOSE) for factors in [(1.0, 1.0), *grid])]
    if tuned_weights:
        tasks += [TUNED, *([TUNED_CANDIDATES] if has_reward else [])]
    shared_inputs = {
        "version": VERSION,
        # Hashes and not paths, so that a moved folder keeps its results.
        "files": {file: digest for file, (digest, *_) in work.files.items()},
        "conditioning": hash_of(work.conditions_file),
        "reward": file_hash(reward_file) if has_reward else "",
        "tuned": {stage: hash_of(path) for stage, path in tuned_weights.items()},
        "assets": inputs.assets,
        "seed": inputs.seed,
        "precision": work.precision,
        # The batch size and the device change the rounding, so they are part of the key.
        "batch": work.batch,
        "device": torch.device(inputs.device).type,
    }
    inputs_by_task = {task: {**shared_inputs, "task": task} for task in tasks}
    store = Store(folder / "work", renew=True)
    missing = [task for task in tasks if store.find(KIND, inputs_by_task[task]) is None]
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc="assets of all rungs", unit="point"
    ) as bar:
        if missing:
            run_tasks(
                {task: [] for task in missing},
                prepare_worker,
                (store.root, inputs, inputs_by_task),
                1,  # the networks of a flow generator are large, so one process holds them
                folder / "logs",
                lambda *_: bar.update() and None,  # a callback must return None
            )
    arrays = {task: store.load_arrays(KIND, inputs_by_task[task]) for task in tasks}
    rungs = _list_rungs(arrays, grid, has_reward)
    prompts, seeds = inputs.prompts_and_seeds(work, TEST)
    base = arrays[BASE]
    evaluator = EVALUATOR if "heldout" in base else ""
    rows = []
    shown_arrays = {}
    for rung in rungs:
        points = []
        for text, measured in rung["points"]:
            metrics = compute_metrics(base, measured, prompts)
            gains = _gains(base, measured)
            points.append(
                {
                    "strength": None,
                    "text": text,
                    "metrics": metrics,
                    "gain_ci95": None if gains is None else list(bootstrap_mean_interval(gains)[1:]),
                    "exceeds": bound.exceeded_by(metrics),
                    "seconds_a_sample": float(measured["seconds"].mean()),
                }
            )
        # The grid is chosen by the reward, not by the bound.
        shown = (
            rung["chosen"]
            if rung["chosen"] is not None
            else choose_point([point["exceeds"] for point in points])
        )
        rows.append(
            {
                "key": rung["key"],
                "title": rung["title"],
                "labels": rung["labels"],
                "seconds_once": 0.0
                if rung["key"] not in (TUNED, TUNED_CANDIDATES)
                else _tuning_seconds(inputs.tuned),
                "points": points,
                "shown": shown,
            }
        )
        shown_arrays[rung["key"]] = rung["points"][shown][1]
    # The gains are paired: the same prompts and noises before and after, so their common variation cancels.
    gains_by_rung = {
        key: gains for key, measured in shown_arrays.items() if (gains := _gains(base, measured)) is not None
    }
    data = {
        "inputs": {"work": work.folder.name, **shared_inputs},
        "unit": "assets",
        "seeds": seeds,
        "prompts": len(set(prompts)),
        "defective": None,
        "evaluator": evaluator,
        "bound": vars(bound),
        "rows": rows,
        "advice": advise(
            gains_by_rung, {row["key"]: not row["points"][row["shown"]]["exceeds"] for row in rows}
        )
        if evaluator
        else None,
        "missing": missing_commands(work, has_reward, bool(tuned_weights)),
    }
    latents = {
        f"{key}: {name}": array
        for key, measured in shown_arrays.items()
        for name, array in measured.items()
        if array.ndim == 1
    }
    return data, write_report(data, latents, folder)


def _list_rungs(
    arrays: Mapping[str, Measured], grid: Sequence[tuple[float, float]], has_reward: bool
) -> list[dict[str, Any]]:
    """List the rungs from cheap to dear: key, title, and the points with their measurements.

    Args:
        arrays: arrays of all tasks.
        grid: factors on guidance and steps.
        has_reward: True if there is a latent reward.
    """
    base = arrays[BASE]
    settings = [(1.0, 1.0), *grid]
    measured_by_setting = [
        base if factors == (1.0, 1.0) else arrays[grid_task(factors, TEST)] for factors in settings
    ]
    chosen = 0
    if has_reward:
        chosen = int(
            np.argmax([np.nanmean(arrays[grid_task(factors, CHOOSE)]["reward"]) for factors in settings])
        )

    def rung(key: str, title: str, points: list, chosen_index: int | None = None) -> dict[str, Any]:
        return {"key": key, "title": title, "points": points, "chosen": chosen_index, "labels": None}

    rung_list = [
        rung(BASE, "base", [("", base)]),
        rung(
            GRID,
            f"{GRID}, chosen by the reward" if has_reward else GRID,
            [
                (f"guidance x{factors[0]:g}, steps x{factors[1]:g}", measured)
                for factors, measured in zip(settings, measured_by_setting, strict=True)
            ],
            chosen,
        ),
    ]
    if has_reward:
        rung_list += [
            rung(
                f"best-of-{count}",
                f"best of {count} by the latent reward",
                [("", choose(arrays[CANDIDATES], count))],
            )
            for count in BEST_OF_COUNTS
        ]
    if "parts" in base:
        rung_list += [
            rung(f"mesh {name}", f"mesh filter: {name}", [("", apply_mesh_filter(base, name))])
            for name in MESH_FILTERS
        ]
    if TUNED in arrays:
        rung_list.append(rung(TUNED, "tuned", [("", arrays[TUNED])]))
    if TUNED_CANDIDATES in arrays:
        rung_list.append(
            rung(
                TUNED_CANDIDATES,
                f"tuned, best of {TUNED_COUNT} by the latent reward",
                [("", choose(arrays[TUNED_CANDIDATES], TUNED_COUNT))],
            )
        )
    return rung_list


def _gains(base: Measured, measured: Measured) -> np.ndarray | None:
    """Return the gain [A] of each asset by the evaluator, or None if it has no value."""
    if "heldout" not in measured:
        return None
    return fill_empty(measured, base)["heldout"] - fill_empty(base, base)["heldout"]


def _tuning_seconds(tuned: Path | None) -> float | None:
    """Return the computing time of a training as it was recorded; None if it was not."""
    if tuned is None:
        return None
    seconds = [
        json.loads(line).get("seconds")
        for stats_file in sorted(tuned.glob("training/*/stats.jsonl"))
        for line in stats_file.read_text().splitlines()[-1:]
    ]
    return float(sum(seconds)) if seconds and all(second is not None for second in seconds) else None


def missing_commands(work: Work, has_reward: bool, is_tuned: bool) -> dict[str, str]:
    """Return the commands that make what the report lacks, by what it is."""
    commands = {}
    if not has_reward:
        commands["latent reward, for best of n"] = trained_reward_command(work)
    if not is_tuned:
        commands["tuning"] = f"eg3d-rlhf flow tune {work.folder}"
    return commands
