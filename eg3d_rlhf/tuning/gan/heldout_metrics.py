"""Held-out metrics of a reward run, which detect over-optimisation.

Once per tick several metrics are measured on the same held-out latents, and compared with their values of the
untuned generator. The metrics are the reward that tunes the generator, a held-out reward and, for synthetic
heads, the simulated annotator's noise-free utility. The generator is over-optimised if its reward rises while
another metric falls.

Shapes: N latents, L ws per sample, W entries of a w.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import MONITOR
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.generators import as_generator, ws_of_seeds
from eg3d_rlhf.preferences.settings import RESOLUTION
from eg3d_rlhf.preferences.synthetic import evaluate_seeds, has_ground_truth_heads
from eg3d_rlhf.rewards.reward import Reward

PREFIX = "Monitored/"  # prefix of the metrics' names in stats.jsonl
HELDOUT = "heldout"  # name of the held-out reward among the metrics
PSI = 0.7  # truncation of the samples that the rewards score
ORACLE_RESOLUTION = RESOLUTION  # grid points per edge of the cube in which the simulated annotator compares
MONITOR_RESOLUTION = 48  # the same number for the metric at every tick, which has to be computed fast

# Function of a generator and N seeds that returns a metric of each seed, [N]. Higher is better.
Measure = Callable[[torch.nn.Module, Sequence[int]], np.ndarray]


class Monitor:
    """Changes of several metrics between the untuned generator and the present one.

    Args:
        measures: name -> function that computes the metric. The first metric is the reward that tunes the
            generator. None of the other metrics should fall while it rises.
        G_ref: the untuned generator.
        seeds: seeds of the N held-out latents.
    """

    def __init__(
        self, measures: dict[str, Measure], G_ref: torch.nn.Module, seeds: Sequence[int] = MONITOR.seeds
    ):
        self.measures = measures
        self.seeds = seeds  # the same at every tick, so that changes are paired by latent
        self.initial = self._values(G_ref)  # name -> metric of the untuned generator, [N]
        self.latest: dict[str, np.ndarray] = {}  # name -> change of the metric at the last tick, [N]
        self.alarms: list[dict] = []  # one entry for each tick at which metrics fell, see `_alarm`

    def _values(self, G: torch.nn.Module) -> dict[str, np.ndarray]:
        """Return the metrics of a generator: name -> values of all seeds, [N]."""
        return {name: measure(G, self.seeds) for name, measure in self.measures.items()}

    def __call__(self, loop, stats: dict) -> dict[str, str]:
        """Measure the present generator. The training loop calls this method at every tick.

        Args:
            loop: training loop.
            stats: statistics of the tick. The change of each metric is added as 'Monitored/<name>'.
        Returns: dictionary from the name of a column of the status line to its text. Each metric has a column
        with its mean change. If metrics fell, the column WARNING names them.
        """
        status_fields = {}
        for metric, metric_values in self._values(loop.trained_object.nets.G_ema).items():
            changes = self.latest[metric] = metric_values - self.initial[metric]  # paired by latent
            stats[f"{PREFIX}{metric}"] = {
                "num": len(changes),
                "mean": float(changes.mean()),
                "std": float(changes.std()),
            }
            status_fields[metric] = f"{changes.mean():+.3f}"
        fallen_metrics = self._alarm(loop.cur_nimg, stats)
        if fallen_metrics:
            status_fields["WARNING"] = f"over-optimised({','.join(fallen_metrics)})"
        return status_fields

    def _alarm(self, nimg: int, stats: dict) -> list[str]:
        """Record an alarm if metrics fell by more than two standard errors while the optimised reward rose.

        Args:
            nimg: number of training images up to the tick.
            stats: statistics of the tick.
        Returns: names of the metrics that fell; [] if none did.
        """
        # The first metric is the optimised reward; dictionaries keep their order.
        reward_name, *heldout_names = self.measures
        reward_rose = stats[f"{PREFIX}{reward_name}"]["mean"] > 0
        fallen_metrics = []
        for metric in heldout_names:
            change_stats = stats[f"{PREFIX}{metric}"]
            # The stored std divides by n. With s = std sqrt(n / (n - 1)), the standard error s / sqrt(n) is
            # std / sqrt(n - 1).
            standard_error = change_stats["std"] / np.sqrt(max(change_stats["num"] - 1, 1))
            if reward_rose and change_stats["mean"] < -2 * standard_error:
                fallen_metrics.append(metric)
        if fallen_metrics:
            self.alarms.append({"nimg": nimg, "fallen": fallen_metrics})
        return fallen_metrics

    def restore(self, stats_file: Path) -> None:
        """Rebuild the alarms from the file of statistics of a resumed run.

        Args:
            stats_file: path of the run's stats.jsonl. There are no alarms if there is no such file.
        """
        self.alarms = []
        for stats_line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(stats_line))
            self._alarm(stats["nimg"], stats)


@torch.no_grad()
def rewards(G: torch.nn.Module, seeds: Sequence[int], reward: Reward, batch: int = 16) -> np.ndarray:
    """Return a reward's scores of a generator's samples at the truncation PSI, [N].

    Args:
        G: generator.
        seeds: N seeds of the samples.
        reward: reward that scores the samples.
        batch: number of samples that are scored together, which bounds the memory.
    """
    generator = as_generator(G)
    ws = ws_of_seeds(generator, seeds, truncation_psi=PSI)  # [N, L, W]
    return torch.cat([reward.score(generator.field(ws_part)) for ws_part in ws.split(batch)]).cpu().numpy()


def utilities(
    G: Any, seeds: Sequence[int], psi: float = 1.0, resolution: int = ORACLE_RESOLUTION
) -> np.ndarray:
    """Return the simulated annotator's noise-free utility [N] of a generator's samples.

    Each sample is compared with the ground-truth head of its latent.

    Args:
        G: generator of synthetic heads.
        seeds: N seeds of the samples.
        psi: truncation of the samples.
        resolution: number of grid points per edge of the cube on which a sample and its ground truth are
            compared.
    """
    evaluations = evaluate_seeds(as_generator(G), seeds, psi=psi, resolution=resolution, batch_size=8)
    return np.array([evaluation.total for evaluation in evaluations])


def make_monitor(settings: dict, reward: Reward, G_ref: torch.nn.Module, heldout: Reward | None) -> Monitor:
    """Return the monitor of a run.

    The monitored metrics are the reward, the held-out reward if there is one, and for synthetic heads the
    simulated annotator's utility.

    Args:
        settings: settings of the run by name.
        reward: reward that tunes the generator.
        G_ref: untuned generator.
        heldout: held-out reward; None if there is none.
    """
    measures: dict[str, Measure] = {"reward": partial(rewards, reward=reward)}
    if heldout is not None:
        measures[HELDOUT] = partial(rewards, reward=heldout)
    # Only synthetic heads have a ground truth, from which the simulated annotator computes its utility.
    if settings["data"].startswith("synthetic:") and has_ground_truth_heads(as_generator(G_ref)):
        measures["utility"] = partial(utilities, resolution=MONITOR_RESOLUTION)
    return Monitor(measures, G_ref)
