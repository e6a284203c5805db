"""Monitor of over-optimisation: measures that the reward phase does not use, on fixed held-out latents, once
per tick.

It measures rewards of a generator, and the simulated annotator's noise-free utility.

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
HELDOUT = "heldout"  # the measure of the held-out reward
PSI = 0.7  # of the latents that rewards score
ORACLE_RESOLUTION = RESOLUTION  # points along an edge of the cubes that the simulated annotator compares
MONITOR_RESOLUTION = 48  # the same, once per tick

Measure = Callable[[torch.nn.Module, Sequence[int]], np.ndarray]  # (G, seeds) -> [N], higher is better


class Monitor:
    """Deltas of several measures against the untuned generator.

    Args:
        measures: name -> measure; the first is the reward that is optimised, the others are what it must not
            fall out with.
        G_ref: the untuned generator.
    """

    def __init__(
        self, measures: dict[str, Measure], G_ref: torch.nn.Module, seeds: Sequence[int] = MONITOR.all
    ):
        self.measures = measures
        self.seeds = seeds
        self.initial = self._values(G_ref)
        self.latest: dict[str, np.ndarray] = {}  # changes [N] at the last tick
        self.alarms: list[dict] = []

    def _values(self, G: torch.nn.Module) -> dict[str, np.ndarray]:
        return {name: measure(G, self.seeds) for name, measure in self.measures.items()}

    def __call__(self, loop, stats: dict) -> dict[str, str]:
        """Tick callback of the loop: adds 'Monitored/<name>' deltas to the statistics, returns fields for the
        status line.
        """
        fields = {}
        for name, values in self._values(loop.subject.nets.G_ema).items():
            delta = self.latest[name] = values - self.initial[name]
            stats[f"{PREFIX}{name}"] = {
                "num": len(delta),
                "mean": float(delta.mean()),
                "std": float(delta.std()),
            }
            fields[name] = f"{delta.mean():+.3f}"
        fallen = self._alarm(loop.cur_nimg, stats)
        if fallen:
            fields["WARNING"] = f"over-optimised({','.join(fallen)})"
        return fields

    def _alarm(self, nimg: int, stats: dict) -> list[str]:
        """Note an alarm where measures fell by more than two standard errors while the first one rose;
        returns what has fallen.
        """
        (_, reward), *others = ((name, stats[f"{PREFIX}{name}"]) for name in self.measures)
        errors = {name: m["std"] / np.sqrt(max(m["num"] - 1, 1)) for name, m in others}
        fallen = [
            name for name, m in others if reward["mean"] > 0 > m["mean"] and m["mean"] < -2 * errors[name]
        ]
        if fallen:
            self.alarms.append({"nimg": nimg, "fallen": fallen})
        return fallen

    def restore(self, stats_file: Path) -> None:
        self.alarms = []
        for line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(line))
            self._alarm(stats["nimg"], stats)


@torch.no_grad()
def rewards(G: torch.nn.Module, seeds: Sequence[int], reward: Reward, batch: int = 16) -> np.ndarray:
    generator = of(G)
    ws = ws_of_seeds(generator, seeds, truncation_psi=PSI)
    return torch.cat([reward.score(generator.field(part)) for part in ws.split(batch)]).cpu().numpy()


def utilities(
    G: Any, seeds: Sequence[int], psi: float = 1.0, resolution: int = ORACLE_RESOLUTION
) -> np.ndarray:
    """The annotator's noise-free utility [N] of a generator's seeds, each by the whole head that its latent
    names.
    """
    return np.array(
        [found.total for found in judge_seeds(of(G), seeds, psi=psi, resolution=resolution, batch=8)]
    )


def make_monitor(settings: dict, reward: Reward, G_ref: torch.nn.Module, heldout: Reward | None) -> Monitor:
    """Return the monitor of a run: of the reward, of the held-out reward if any, and of the utility for
    synthetic heads.
    """
    named = {"reward": reward, HELDOUT: heldout}
    measures: dict[str, Measure] = {
        name: partial(rewards, reward=scorer) for name, scorer in named.items() if scorer is not None
    }
    if settings["data"].startswith("synthetic:") and names_people(of(G_ref)):
        measures["utility"] = partial(utilities, resolution=MONITOR_RESOLUTION)
    return Monitor(measures, G_ref)
