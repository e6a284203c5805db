"""Watch for over-optimisation: measures that the reward phase never sees, on fixed held-out latents, once per tick.

What it measures on a generator: rewards, and the annotator's noise-free utility.

Letters: N latents, L num_ws, W w_dim.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import WATCH
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import of, ws_of_seeds
from eg3d_rlhf.preferences.annotator import DEFAULT_CALIBRATION, Calibration, utility
from eg3d_rlhf.rewards.reward import Reward

PSI = 0.7
JUDGE_RESOLUTION = 64  # grid points per edge of the cubes that the annotator judges

Measure = Callable[[torch.nn.Module, torch.Tensor], np.ndarray]  # (G, ws [N, L, W]) -> [N], higher is better


class Watch:
    """Deltas of several measures against the untuned generator.

    Args:
        measures: name -> measure; the first is the reward that is optimised, the others are what it must not fall out with.
        G_ref: the untuned generator.
    """

    def __init__(self, measures: dict[str, Measure], G_ref: torch.nn.Module, seeds: Sequence[int] = WATCH.all):
        self.measures, self.seeds = measures, seeds
        self.initial = self._values(G_ref)
        self.latest: dict[str, np.ndarray] = {}  # changes [N] at the last tick
        self.alarms: list[dict] = []

    def _values(self, G: torch.nn.Module) -> dict[str, np.ndarray]:
        ws = ws_of_seeds(G, self.seeds, truncation_psi=PSI)
        return {name: measure(G, ws) for name, measure in self.measures.items()}

    def __call__(self, loop, stats: dict) -> dict[str, str]:
        """Tick callback of the loop: adds 'Watch/<name>' deltas to the statistics, returns fields for the status line."""
        fields = {}
        for name, values in self._values(loop.subject.nets.G_ema).items():
            delta = self.latest[name] = values - self.initial[name]
            stats[f"Watch/{name}"] = {"num": len(delta), "mean": float(delta.mean()), "std": float(delta.std())}
            fields[name] = f"{delta.mean():+.3f}"
        fallen = self._alarm(loop.cur_nimg, stats)
        if fallen:
            fields["WARNING"] = f"over-optimised({','.join(fallen)})"
        return fields

    def _alarm(self, nimg: int, stats: dict) -> list[str]:
        """Note an alarm where measures fell by more than two standard errors while the first one rose; returns what has fallen."""
        (_, reward), *others = ((name, stats[f"Watch/{name}"]) for name in self.measures)
        errors = {name: m["std"] / np.sqrt(max(m["num"] - 1, 1)) for name, m in others}
        fallen = [name for name, m in others if reward["mean"] > 0 > m["mean"] and m["mean"] < -2 * errors[name]]
        if fallen:
            self.alarms.append({"nimg": nimg, "fallen": fallen})
        return fallen

    def restore(self, stats_file: Path) -> None:
        self.alarms = []
        for line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = json.loads(line)
            self._alarm(stats["nimg"], stats)


def annotator_calibration(path: Path = bundled.ANNOTATION) -> Calibration:
    """The calibration under which the bundled labels were made; the default one where that record is missing."""
    if not path.exists():
        return DEFAULT_CALIBRATION
    return Calibration.from_dict(json.loads(path.read_text())["calibration"])


@torch.no_grad()
def rewards(G: torch.nn.Module, ws: torch.Tensor, reward: Reward, batch: int = 16) -> np.ndarray:
    generator = of(G)
    return torch.cat([reward.score(generator.field(part)) for part in ws.split(batch)]).cpu().numpy()


@torch.no_grad()
def utilities(G: Any, ws: torch.Tensor, calibration: Calibration, batch: int = 8) -> np.ndarray:
    """The annotator's noise-free utility [N] of a generator's latents ws [N, L, W], from geometry alone."""
    generator = of(G)
    spec = SlabSpec.of(generator.bounds, JUDGE_RESOLUTION)
    cubes = (cube for part in ws.split(batch) for cube in generator.field(part).density_grid(spec).cpu().numpy())
    return np.array([utility(cube, calibration=calibration, box_warp=spec.box_warp).total for cube in cubes])


def make_watch(settings: dict, reward: Reward, G_ref: torch.nn.Module, second: Reward | None) -> Watch:
    """Watch of a run: the reward itself, the second reward if any, and the utility for synthetic heads."""
    named = {"reward": reward, "second": second}
    measures: dict[str, Measure] = {name: partial(rewards, reward=scorer) for name, scorer in named.items() if scorer is not None}
    if settings["data"].startswith("synthetic:"):
        measures["utility"] = partial(utilities, calibration=annotator_calibration())
    return Watch(measures, G_ref)
