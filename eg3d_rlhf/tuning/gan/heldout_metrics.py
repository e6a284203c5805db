"""Held-out metrics of a reward run: measures that the reward phase never uses, on fixed latents, once per
tick.

They detect over-optimisation. The measures of a generator are rewards, among them a held-out one, and the
simulated annotator's noise-free utility.

Letters: N latents.
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
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.preferences.settings import RESOLUTION
from eg3d_rlhf.preferences.synthetic import judge_seeds, names_people
from eg3d_rlhf.rewards.reward import Reward

PREFIX = "Monitored/"  # of the names in stats.jsonl
HELDOUT = "heldout"  # name of the held-out reward among the measures
PSI = 0.7  # truncation of the latents that rewards score
ORACLE_RESOLUTION = RESOLUTION  # grid points per edge of the cubes that the simulated annotator evaluates
MONITOR_RESOLUTION = 48  # the same for the measure at every tick, which has to be fast

Measure = Callable[[torch.nn.Module, Sequence[int]], np.ndarray]  # (G, seeds) -> [N], higher is better


class Monitor:
    """Changes of several measures since the untuned generator.

    Args:
        measures: by name. The first is the reward that is optimised. The others must not fall while it rises.
        G_ref: the untuned generator.
        seeds: held-out latents.
    """

    def __init__(
        self, measures: dict[str, Measure], G_ref: torch.nn.Module, seeds: Sequence[int] = MONITOR.all
    ):
        self.measures = measures
        self.seeds = seeds  # the same at every tick, so that changes are paired
        self.initial = self._values(G_ref)  # by name, [N]
        self.latest: dict[str, np.ndarray] = {}  # changes [N] at the last tick
        self.alarms: list[dict] = []  # ticks at which measures fell

    def _values(self, G: torch.nn.Module) -> dict[str, np.ndarray]:
        """Return every measure [N] of a generator, by name."""
        return {name: measure(G, self.seeds) for name, measure in self.measures.items()}

    def __call__(self, loop, stats: dict) -> dict[str, str]:
        """Measure the present generator; the loop calls this at every tick.

        Adds the changes to the statistics, as 'Monitored/<name>', and returns fields for the status line.
        """
        fields = {}
        for name, values in self._values(loop.subject.nets.G_ema).items():
            delta = self.latest[name] = values - self.initial[name]  # paired by latent
            stats[f"{PREFIX}{name}"] = {
                "num": len(delta),
                "mean": float(delta.mean()),
                "std": float(delta.std()),
            }
            fields[name] = f"{delta.mean():+.3f}"  # in the status line
        fallen = self._alarm(loop.cur_nimg, stats)
        if fallen:
            fields["WARNING"] = f"over-optimised({','.join(fallen)})"
        return fields

    def _alarm(self, nimg: int, stats: dict) -> list[str]:
        """Record an alarm if measures fell by more than two standard errors while the optimised reward rose.

        Returns the names of the measures that fell.
        """
        # The first measure is the optimised reward; dictionaries keep their order.
        (_, reward), *others = ((name, stats[f"{PREFIX}{name}"]) for name in self.measures)
        # `std` is the biased one, hence the division by n - 1 for the standard error.
        errors = {name: m["std"] / np.sqrt(max(m["num"] - 1, 1)) for name, m in others}
        fallen = [
            name for name, m in others if reward["mean"] > 0 > m["mean"] and m["mean"] < -2 * errors[name]
        ]
        if fallen:
            self.alarms.append({"nimg": nimg, "fallen": fallen})
        return fallen

    def restore(self, stats_file: Path) -> None:
        """Rebuild the alarms from the run's statistics after a resume."""
        self.alarms = []
        for line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(line))
            self._alarm(stats["nimg"], stats)


@torch.no_grad()
def rewards(G: torch.nn.Module, seeds: Sequence[int], reward: Reward, batch: int = 16) -> np.ndarray:
    """Return the reward [N] of a generator's seeds."""
    generator = of(G)
    ws = ws_of_seeds(generator, seeds, truncation_psi=PSI)  # [N, L, W]
    return torch.cat([reward.score(generator.field(part)) for part in ws.split(batch)]).cpu().numpy()


def utilities(
    G: Any, seeds: Sequence[int], psi: float = 1.0, resolution: int = ORACLE_RESOLUTION
) -> np.ndarray:
    """Return the simulated annotator's noise-free utility [N] of a generator's seeds.

    Each sample is compared with the ground-truth head of its latent.
    """
    evaluations = judge_seeds(of(G), seeds, psi=psi, resolution=resolution, batch=8)
    return np.array([evaluation.total for evaluation in evaluations])


def make_monitor(settings: dict, reward: Reward, G_ref: torch.nn.Module, heldout: Reward | None) -> Monitor:
    """Return the monitor of a run: its reward, the held-out reward if any, the utility of synthetic heads."""
    named = {"reward": reward, HELDOUT: heldout}
    measures: dict[str, Measure] = {
        name: partial(rewards, reward=scorer) for name, scorer in named.items() if scorer is not None
    }
    # Only synthetic heads have a ground truth, from which the annotator computes its utility.
    if settings["data"].startswith("synthetic:") and names_people(of(G_ref)):
        measures["utility"] = partial(utilities, resolution=MONITOR_RESOLUTION)
    return Monitor(measures, G_ref)
