"""What the watch and the judge measure on a generator: rewards, and the annotator's noise-free utility.

Letters: N latents, L num_ws, W w_dim.
"""

import json
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf import bundled
from eg3d_rlhf.generators import of
from eg3d_rlhf.preferences.annotator import DEFAULT_CALIBRATION, Calibration, utility
from eg3d_rlhf.reward.reward import Reward
from eg3d_rlhf.rlhf.watch import Measure, Watch
from eg3d_rlhf.sigma.spec import SlabSpec

JUDGE_RESOLUTION = 64  # grid points per edge of the cubes that the annotator judges


def annotator_calibration(path: Path = bundled.ANNOTATION) -> Calibration:
    """The calibration under which the bundled labels were made; the default one where that record is missing."""
    if not path.exists():
        return DEFAULT_CALIBRATION
    return Calibration.from_dict(json.loads(path.read_text())["calibration"])


@torch.no_grad()
def rewards(G: torch.nn.Module, ws: torch.Tensor, reward: Reward, batch: int = 16) -> np.ndarray:
    """Scores [N] of latents ws [N, L, W]."""
    generator = of(G)
    return torch.cat([reward.score(generator.field(part)) for part in ws.split(batch)]).cpu().numpy()


@torch.no_grad()
def utilities(G: torch.nn.Module, ws: torch.Tensor, calibration: Calibration, batch: int = 8) -> np.ndarray:
    """The annotator's noise-free utility [N] of latents ws [N, L, W], from geometry alone."""
    generator = of(G)
    spec = SlabSpec.of(generator.bounds, JUDGE_RESOLUTION)
    cubes = (cube for part in ws.split(batch) for cube in generator.field(part).density_grid(spec).cpu().numpy())
    return np.array([utility(cube, calibration=calibration, box_warp=spec.box_warp).total for cube in cubes])


def make_watch(settings: dict, reward: Reward, G_ref: torch.nn.Module, second: Reward | None) -> Watch:
    """Watch of a run: the reward itself, the second reward if any, and the utility for synthetic heads."""
    measures: dict[str, Measure] = {"reward": lambda G, ws: rewards(G, ws, reward)}
    if second is not None:
        measures["second"] = lambda G, ws: rewards(G, ws, second)
    if settings["data"].startswith("synthetic:"):
        calibration = annotator_calibration()
        measures["utility"] = lambda G, ws: utilities(G, ws, calibration)
    return Watch(measures, G_ref)
