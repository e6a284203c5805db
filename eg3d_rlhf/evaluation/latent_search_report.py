"""Measure what a search on latents (`generator improve`) does to synthetic heads, by number of steps.

Every latent is optimised for the largest number of steps without a gate. The scores and offsets of all steps
are stored, and smaller numbers of steps, `auto` and the gate are read from them: they give the shapes that a
search with these settings gives. The shapes are compared with the ground-truth heads of their latents; no
part of the search depends on these.

Files in the folder of the report:

    latent-search.json     table and settings
    latents.safetensors    errors, scores and further values of each latent, from which the table follows
    latent-search.png      figure
    work/                  finished batches, from which an interrupted report resumes
    timing.jsonl           seconds of each batch on this machine

Shapes: N latents, n latents of a batch, T steps, W = w_dim.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import figure_table
from eg3d_rlhf.generators import LoadedGenerator, device_of, ws_of_seeds
from eg3d_rlhf.measures.people import shape_grids
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.latent_search import Ascent, Guidance, ascend, best_step
from eg3d_rlhf.tuning.gan.search_settings import AUTO, SearchConfig
from training.networks import state_hash
from training.progress import tqdm
from training.storage import write_atomic

BEFORE = "before"
GATE = ", gate"  # end of the names of rows with the gate
VERSION = 1  # of the stored batches; it is increased when the search or the measures change
TABLE = {  # metric -> (heading, format)
    "error_reduction": ("error reduction, defective heads", ".1%"),
    "intact_degraded": ("intact heads degraded", ".1%"),
    "identity_kept": ("identity kept", ".0%"),
    "face_moved_changed": ("face moved, voxels, changed heads", ".3f"),
    "variety": ("variety, voxels", ".3f"),
    "reward": ("reward", ".3f"),
    "heldout": ("held-out reward", ".3f"),
    "steps_used": ("steps", ".1f"),
    "seconds_a_sample": ("seconds a sample", ".1f"),
}


@dataclass(frozen=True, kw_only=True)
class SearchStudy:
    """Inputs of the report, loaded and checked (see `latent_search.check_search`)."""

    loaded: LoadedGenerator
    reward: Reward
    heldout_reward: Reward
    seeds: Sequence[int]  # held-out latents, psi 1
    steps: tuple[int, ...]  # numbers of steps in the table, rising
    config: SearchConfig
    batch: int = 8
    folder: Path

    @property
    def search_config(self) -> SearchConfig:
        """Return the settings with which every latent is optimised: all steps, without a gate."""
        # One long search without a gate contains all rows of the table:
        # fewer steps, the gate and `auto` are applied afterwards.
        step_count = max(*self.steps, self.config.max_steps)
        return SearchConfig(
            **{**asdict(self.config), "steps": step_count, "gate": False, "max_steps": step_count}
        )

    def inputs(self) -> dict[str, Any]:
        """Return the values on which every stored batch depends, besides its seeds, in JSON types."""
        return {
            "version": VERSION,
            "generator": self.loaded.hash,
            # Hashes of the weights, so that a copy of a reward's file finds the stored batches.
            "reward": state_hash(self.reward.network),
            "heldout": state_hash(self.heldout_reward.network),
            "search": asdict(self.search_config),
        }


def run(study: SearchStudy) -> dict[str, Any]:
    """Run the searches and measurements that the folder lacks, write the table, and return it as JSON."""
    guidance = Guidance(study.loaded.generator, study.reward)
    # Channels-last is safe here, because this reward gets no gradient (see `Guidance`).
    heldout_reward = study.heldout_reward.eval().requires_grad_(False).channels_last()
    store = Store(study.folder / "work", renew=True)
    batches = []
    seeds = list(study.seeds)
    with tqdm(total=len(seeds), desc="latents", unit="latent") as progress:
        # Each batch is stored at once, so an interrupted report loses at most one.
        for start in range(0, len(seeds), study.batch):
            batch_seeds = seeds[start : start + study.batch]
            batches.append(
                store.arrays(
                    "batch",
                    # The numbers of steps belong to the key, because
                    # the measurements are made for each of them.
                    {**study.inputs(), "seeds": batch_seeds, "steps": list(study.steps)},
                    # A default argument, because a closure would see the value of the last iteration.
                    lambda batch_seeds=batch_seeds: _compute_batch(  # type: ignore[misc]
                        study, guidance, heldout_reward, batch_seeds
                    ),
                )
            )
            progress.update(len(batch_seeds))
    # Joined along the axis of the latents: [n, ...] -> [N, ...]
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    report = summarise(study, arrays, guidance.quantile(study.config.gate_quantile))
    write(study.folder, report, arrays)
    return report


def _compute_batch(
    study: SearchStudy, guidance: Guidance, heldout_reward: Reward, seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """Optimise and measure a batch of latents.

    Returns: scores by step, and the measurements of `heads.measure_heads` under the names "VARIANT/MEASURE".
    """
    generator = study.loaded.generator
    # [n, L, W], psi 1 as in the other reports
    ws = ws_of_seeds(generator, seeds)
    ascent = ascend(generator, ws, guidance, heldout_reward, study.search_config)
    _note_time(study, seeds, ascent)
    assert ascent.heldout is not None
    ground_truth = heads.ground_truth_heads(generator, seeds)
    # The stop by the held-out reward is applied to the stored
    # scores, which gives the same step as a search that stops there.
    auto_steps, stop_steps = _auto_steps(ascent.heldout, study.config)
    steps_by_variant = {BEFORE: np.zeros(len(ws), dtype=int)}
    steps_by_variant |= {str(step_count): np.full(len(ws), step_count) for step_count in study.steps}
    steps_by_variant[AUTO] = auto_steps
    arrays = {
        "seeds": np.array(seeds),
        "rewards": ascent.rewards,
        "heldout": ascent.heldout,
        "path": ascent.path.numpy(),
        "auto_steps": auto_steps,
        "stop_steps": stop_steps,
    }
    for variant, steps in steps_by_variant.items():
        # The ground truth is that of the latents before the search, also for improved ones.
        shapes = _shapes_of_ws(study, ascent.ws_at(steps))
        measurements = heads.measure_heads(shapes, ground_truth)
        arrays |= {f"{variant}/{name}": np.asarray(values) for name, values in measurements.items()}
    return arrays


@torch.no_grad()
def _shapes_of_ws(study: SearchStudy, ws: torch.Tensor) -> np.ndarray:
    """Generate the shapes of style vectors: values [n, 64, 64, 64], negative inside."""
    generator = study.loaded.generator
    return np.asarray(shape_grids(generator.field(ws.to(device_of(generator))), heads.POINTS))


def _auto_steps(heldout: np.ndarray, config: SearchConfig) -> tuple[np.ndarray, np.ndarray]:
    """Apply `steps="auto"` to the held-out rewards [n, T + 1] of an ungated search.

    Returns: the steps of the results [n], and the numbers of steps that the search makes until it stops [n].
    """
    # The table may have more steps than `auto` is allowed to make.
    scores = heldout[:, : config.max_steps + 1]
    results = np.array([best_step(sample_scores, config.patience)[0] for sample_scores in scores])
    # The search makes `patience` further steps after its best one. These cost time, although the result
    # does not use them.
    return results, np.minimum(results + config.patience, config.max_steps)


def _note_time(study: SearchStudy, seeds: Sequence[int], ascent: Ascent) -> None:
    """Append the time of a batch to timing.jsonl. Times are no part of the stored arrays."""
    study.folder.mkdir(parents=True, exist_ok=True)
    record = {
        "seeds": [seeds[0], seeds[-1]],
        "seconds": ascent.seconds,
        "sample_steps": len(seeds) * study.search_config.step_count,
        "threads": torch.get_num_threads(),
        # The load of the machine explains outliers of the times.
        "load": os.getloadavg()[0],
        "time": time.time(),
    }
    with open(study.folder / "timing.jsonl", "a") as timing_file:
        timing_file.write(json.dumps(record) + "\n")


def seconds_a_step(folder: Path) -> float | None:
    """Return the median time of one step of one sample, from timing.jsonl; None if there is no such file."""
    timing_path = folder / "timing.jsonl"
    if not timing_path.is_file():
        return None
    records = [json.loads(line) for line in timing_path.read_text().splitlines()]
    # The median, because other work on the machine makes single batches slow.
    return float(np.median([record["seconds"] / record["sample_steps"] for record in records]))


def summarise(study: SearchStudy, arrays: dict[str, np.ndarray], threshold: float) -> dict[str, Any]:
    """Compute the table from the arrays of all latents.

    Args:
        study: inputs of the report.
        arrays: arrays of all batches, whose first axis is the latent.
        threshold: raw reward above which the gate leaves a sample unchanged.
    """
    # [N, T + 1] -> [N]: the gate reads the score before the search.
    is_gated = arrays["rewards"][:, 0] > threshold
    step_seconds = seconds_a_step(study.folder)
    measurements_before = _measurements(arrays, BEFORE)
    rows: dict[str, Any] = {}
    for name in (BEFORE, *map(str, study.steps), AUTO):
        # Without a search, the gate makes no difference.
        for gate in (False,) if name == BEFORE else (True, False):
            unchanged = is_gated if gate else np.zeros_like(is_gated)
            # [N] -> [N, 1, ...]: the rows of samples that the gate
            # leaves unchanged come from the measurements before.
            measurements = {
                measure_name: np.where(
                    unchanged.reshape(-1, *[1] * (values.ndim - 1)), measurements_before[measure_name], values
                )
                for measure_name, values in _measurements(arrays, name).items()
            }
            # The product with False is 0, the step before the search.
            result_steps = _steps_of(arrays, name, "auto_steps") * ~unchanged
            made_steps = _steps_of(arrays, name, "stop_steps") * ~unchanged
            row_name = name if name == BEFORE else f"{name} steps" if name != AUTO else AUTO
            # One step for each latent: [N, T + 1] -> [N].
            latent_indices = np.arange(len(is_gated))
            rows[row_name + (GATE if gate else "")] = {
                **heads.compute_metrics(measurements_before, measurements),
                "face_moved_changed": _median_moved(measurements_before, measurements, ~unchanged),
                "reward": float(arrays["rewards"][latent_indices, result_steps].mean()),
                "heldout": float(arrays["heldout"][latent_indices, result_steps].mean()),
                "steps_result": float(result_steps.mean()),
                "steps_used": float(made_steps.mean()),
                "seconds_a_sample": None if step_seconds is None else float(step_seconds * made_steps.mean()),
            }
    return {
        "seeds": [int(arrays["seeds"][0]), int(arrays["seeds"][-1])],
        "latents": len(is_gated),
        "defective": int(heads.find_defective(measurements_before).sum()),
        "gated": int(is_gated.sum()),
        "gated_defective": int((is_gated & heads.find_defective(measurements_before)).sum()),
        "gate": {"quantile": study.config.gate_quantile, "threshold": threshold},
        "inputs": study.inputs(),
        "auto": {"patience": study.config.patience, "max_steps": study.config.max_steps},
        "seconds_a_step": step_seconds,
        "rows": rows,
        # Of the search without a gate, over all latents. The gap between both curves shows over-optimisation.
        "mean_by_step": {
            "reward": arrays["rewards"].mean(axis=0).tolist(),
            "heldout": arrays["heldout"].mean(axis=0).tolist(),
        },
    }


def _median_moved(
    measurements_before: heads.Measured, measurements_after: heads.Measured, is_changed: np.ndarray
) -> float | None:
    """Return the median distance in voxels by which the faces of the changed heads moved.

    Heads that the gate left unchanged would make the median 0. Return None if no face was measured.
    Args: is_changed: mask of the heads that were optimised, [N].
    """
    distances = heads.face_distance_moved(measurements_before, measurements_after)[is_changed]
    distances = distances[np.isfinite(distances)]
    return float(np.median(distances)) if distances.size else None


def _measurements(arrays: dict[str, np.ndarray], variant: str) -> dict[str, np.ndarray]:
    """Return the measurements of one variant by the names of `heads.measure_heads`."""
    prefix = f"{variant}/"
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _steps_of(arrays: dict[str, np.ndarray], variant: str, auto_name: str) -> np.ndarray:
    """Return the number of steps of each latent in a variant, [N]; for auto the array `auto_name`."""
    if variant == AUTO:
        return arrays[auto_name]
    return np.full(len(arrays["seeds"]), 0 if variant == BEFORE else int(variant))


def write(folder: Path, report: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the table as JSON, the values of each latent, and the figure."""
    write_atomic(folder / "latent-search.json", (json.dumps(report, indent=1) + "\n").encode())
    # Values of which there is one for each latent, or one for each latent and step. Depth maps and grids stay
    # in the folder work/.
    per_latent = {
        name: np.ascontiguousarray(values)
        for name, values in arrays.items()
        # The path is [N, T + 1, W], and can be computed again from the seeds.
        if name != "path" and (values.ndim == 1 or name in ("rewards", "heldout"))
    }
    write_atomic(folder / "latents.safetensors", safetensors.numpy.save(per_latent))
    # The figure is drawn from the file and not from memory, so that it can be made again later.
    figure = plot(json.loads((folder / "latent-search.json").read_text()))
    style.save(figure, folder / "latent-search.png")


def plot(report: dict[str, Any]) -> Any:
    """Plot error reduction, harm and identity over the number of steps; a cross marks `auto`.

    Args: report: content of latent-search.json.
    """
    figure, axes = style.figure(column_count=3, size=(9.4, 3.2))
    panels: tuple[tuple[str, str], ...] = (
        ("error_reduction", "error reduction, defective heads (%)"),
        ("intact_degraded", "intact heads degraded (%)"),
        ("identity_kept", "identity kept (%)"),
    )
    rows = report["rows"]
    # Rows with the gate end in GATE and not in " steps", so each count appears once.
    step_counts = [int(name.split()[0]) for name in rows if name.endswith(" steps")]
    for axis, (metric, title) in zip(axes, panels, strict=True):
        for colour, suffix, label in (
            (style.CYCLE[0], GATE, "with the gate"),
            (style.CYCLE[1], "", "no gate"),
        ):
            percents = [100 * _number(rows[f"{count} steps{suffix}"][metric]) for count in step_counts]
            axis.plot(step_counts, percents, "o-", color=colour, markersize=4, label=label)
            auto_row = rows[AUTO + suffix]
            axis.plot(
                [auto_row["steps_result"]], [100 * _number(auto_row[metric])], "x", color=colour, markersize=8
            )
        axis.set(xlabel="steps (mean over latents)", title=title)
    axes[0].legend()
    return figure


def _number(value: float | None) -> float:
    """Return a value, or NaN, which leaves a gap in the plot, if it is None."""
    return float("nan") if value is None else value


def lines(report: dict[str, Any]) -> list[str]:
    """Return the printed table, and a sentence on its latents."""
    return [
        *figure_table("search", report["rows"], TABLE, intervals=("error_reduction",)),
        "",
        f"{report['latents']} latents from {report['seeds'][0]}, psi 1; {report['defective']} heads defective"
        f" before. The gate leaves {report['gated']} unchanged, {report['gated_defective']} of them"
        " defective. Brackets: 95 % bootstrap intervals over defective heads.",
    ]
