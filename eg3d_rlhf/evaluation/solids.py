"""`solid` of generators, a line each: its terms, fidelity, the reward, and the share that is closed; and of
shapes that only look sound.

Networks of fields are compared on held-out latents, tuned stages of flows on held-out conditions; every shape
is read beside the untuned one of the same latent, or of the same condition and noise. Controls are what costs
no training: filters of the untuned shapes, a ball of the same volume, and the best of n untuned ones by the
reward.

Letters: N shapes; X, Y, Z voxels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval, paired_summary, wilson_interval
from eg3d_rlhf.evaluation import filters
from eg3d_rlhf.evaluation.settings import CHOOSE
from eg3d_rlhf.experiments.run import OPTIONS, recorded
from eg3d_rlhf.experiments.table import figure_table
from eg3d_rlhf.generators import Generator, load_generator, ws_of_seeds
from eg3d_rlhf.geometry import solids
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.rewards.solid import occupancy
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import crossed, generate
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.training.online.solid import grid_of, rules_for
from eg3d_rlhf.tuning.flow.training.settings import ArmsSource
from training.config import from_dict
from training.progress import tqdm

CUTOFF = 14
AT_ONCE = 8
UNTUNED = "untuned"

Grids = Sequence[np.ndarray]  # N of bool [X, Y, Z]


def ball(solid: np.ndarray) -> np.ndarray:
    """A ball of the same volume about the same centre."""
    if not solid.any():
        return solid
    centre = np.argwhere(solid).mean(axis=0)
    distance = sum((axis - middle) ** 2 for axis, middle in zip(np.indices(solid.shape), centre, strict=True))
    return distance < (3 * solid.sum() / (4 * np.pi)) ** (2 / 3)


def filtered(make: filters.Filter) -> Callable[[np.ndarray], np.ndarray]:
    return lambda solid: make(np.where(solid, -1.0, 1.0)) < 0


def coarse(
    make: Callable[[np.ndarray, float], np.ndarray], radius: float
) -> Callable[[np.ndarray], np.ndarray]:
    """A filter of `radius` voxels of 64^3, which on coarser grids is at least one of theirs."""
    return lambda solid: filtered(lambda values: make(values, max(radius, 64 / len(values))))(solid)


CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "closing 4": coarse(filters.closing, 4),
    "convex hull": filtered(filters.hull),
    "blur 2": coarse(filters.blur, 2),
    "ball of its volume": ball,
}


def seen(grids: Grids, untuned: Grids, rules: solids.Rules) -> dict[str, np.ndarray]:
    """By name [N]: terms of the score, solid, fidelity, reward, and whether a shape is closed: in one part,
    and nothing hollow.
    """
    rows = []
    for grid, before in zip(grids, untuned, strict=True):
        judged = solids.beside(grid, [solids.repaired(before, rules)], rules)
        closed = ndimage.label(grid)[1] == 1 and judged.score.inner == 1
        rows.append({**judged.to_dict(), "closed": float(closed)})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def best_of(rewards: np.ndarray, groups: int) -> np.ndarray:
    """Numbers of the best of each group: rewards [N], groups of neighbours -> [groups]."""
    per = len(rewards) // groups
    return rewards.reshape(groups, per).argmax(axis=1) + per * np.arange(groups)


def line(arm: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None) -> dict:
    """Figures of an arm as JSON: means, the reward's change against what it is compared with, and the share
    that is closed.
    """
    share = wilson_interval(float(arm["closed"].sum()), len(arm["closed"]))
    reward = bootstrap_mean_interval(arm["reward"])
    row: dict[str, Any] = {name: float(values.mean()) for name, values in arm.items()}
    row |= {
        "reward_ci95": [reward.lo, reward.hi],
        "closed_ci95": [share.lo, share.hi],
        "n": len(arm["closed"]),
    }
    if before is not None and len(before["reward"]) == len(arm["reward"]):
        change = paired_summary(before["reward"], arm["reward"])
        row |= {"change": change.mean, "change_ci95": [change.mean_lo, change.mean_hi]}
    return row


def table(
    arms: Mapping[str, Grids], untuned: Grids, groups: int, rules: solids.Rules, on_arm: Callable[[], object]
) -> dict[str, dict]:
    """Lines by name: untuned, the arms, the best of each group of untuned shapes, and controls.

    Args: groups: into which neighbouring shapes fall, for the best of n.
    """
    before = seen(untuned, untuned, rules)
    lines = {UNTUNED: line(before, None)}
    for name, grids in arms.items():
        lines[name] = line(seen(grids, untuned, rules), before)
        on_arm()
    chosen = best_of(before["reward"], groups)
    lines[f"best of {len(untuned) // groups}"] = line(
        {name: values[chosen] for name, values in before.items()}, None
    )
    for name, change in CONTROLS.items():
        lines[name] = line(seen([change(grid) for grid in untuned], untuned, rules), before)
        on_arm()
    return lines


def markdown(lines: Mapping[str, dict], rules: solids.Rules) -> list[str]:
    terms = [name for name, weight in zip(solids.TERMS, rules.weights, strict=True) if weight]
    columns = {name: (name, ".3f") for name in (*terms, "solid")}
    columns |= {"fidelity": ("F", ".3f"), "reward": ("R", ".3f")}
    columns |= {"change": ("change of R", "+.3f"), "closed": ("closed", ".0%")}
    return figure_table("", lines, columns, intervals=("change", "closed"))


@torch.no_grad()
def of_latents(generator: Generator, seeds: Sequence[int], psi: float) -> Grids:
    """The shapes of latents at EDGE^3 of the whole cube."""
    spec = SlabSpec.of(generator.bounds, solids.EDGE)
    grids = []
    for start in range(0, len(seeds), AT_ONCE):
        ws = ws_of_seeds(
            generator, seeds[start : start + AT_ONCE], truncation_psi=psi, truncation_cutoff=CUTOFF
        )
        grids += occupancy(generator.field(ws), spec)
    return grids


def of_conditions(
    problem: Problem, weights: Path | None, stage: str, conditions: Sequence[str], seeds: Sequence[int]
) -> Grids:
    """The shapes of conditions and noises, with a stage's tuned weights or without."""
    models = {}
    if weights is not None:
        folder = weights / stage if (weights / stage).is_dir() else weights
        models = {stage: tuned_model(stage_of(problem.pipeline, stage).model, folder)}
    return [
        grid_of(problem.pipeline, asset) for asset in generate(problem.pipeline, conditions, seeds, models)
    ]


def source_of(pipeline: str, conditions: Path | None, runs: Sequence[Path]) -> ArmsSource:
    """What a generator is opened from: a folder's is what its runs were begun with, so that what they held
    out is held out here.

    Args: conditions: in the place of the runs' own. Raises: ValueError for runs that held out different
        conditions, or may have.
    """
    sources: list[ArmsSource] = []
    if not family_of(Path(pipeline)).bundled:
        for run in runs:
            values = recorded(run).get("run", {}).get("source")
            source = ArmsSource() if values is None else from_dict(ArmsSource, values, str(run / OPTIONS))
            sources += [source] if source not in sources else []
    if len(sources) > 1:
        raise ValueError(
            "runs: expected one division into trained and held-out conditions, got several (by --seed). Name"
            " fewer."
        )
    source = replace(sources[0] if sources else ArmsSource(), pipeline=pipeline)
    return source if conditions is None else replace(source, conditions=str(conditions))


def compare_networks(
    networks: Mapping[str, Path], before: Path | None, n: int, psi: float, seed: int, device: torch.device
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare generators of fields on held-out latents.

    Args: networks: tuned ones by name; before: the untuned one; n: latents.
    Returns: lines of the table; how they were made: "what" in words, the "rules" and the "edge" of the grids.
    """
    groups = n // CHOOSE
    seeds = LATENTS.take(groups * CHOOSE, seed)
    with naming("--before"):
        first = load_generator(before, device).generator

    def shapes(path: Path | None) -> Grids:
        return of_latents(first if path is None else load_generator(path, device).generator, seeds, psi)

    what = f"latents {seeds[0]} to {seeds[-1]}, psi {psi:g}"
    return _compared(networks, shapes, groups, lambda grids: solids.HEADS, what)


def compare_stages(
    networks: Mapping[str, Path],
    source: ArmsSource,
    stage: str | None,
    n: int,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare tuned stages of a flow generator on held-out conditions; see `compare_networks`.

    Args: stage: None: the first.
    Raises: ValueError where no condition is held out.
    """
    problem = open_problem(source, device)
    stage = stage_of(problem.pipeline, stage or problem.pipeline.stages[0].name).name
    kept = list(problem.held_out_conditions)[: n // CHOOSE]
    if not kept:
        raise ValueError(
            "--conditioning: expected two or more, one of which is held out, got one. Embed more."
        )
    each = CHOOSE * (n // CHOOSE // len(kept))
    conditions, noises = crossed(kept, each, seed)
    what = f"{len(kept)} held-out conditions x {each} noises, seed {seed}; stage {stage}"
    return _compared(
        networks,
        lambda path: of_conditions(problem, path, stage, conditions, noises),
        len(kept) * each // CHOOSE,
        lambda grids: rules_for(grids[0]),
        what,
    )


def _compared(
    networks: Mapping[str, Path],
    shapes: Callable[[Path | None], Grids],
    groups: int,
    rules_of: Callable[[Grids], solids.Rules],
    what: str,
) -> tuple[dict[str, dict], dict[str, Any]]:
    total = 2 * len(networks) + 1 + len(CONTROLS)
    with tqdm(total=total, desc="shapes", unit="arm", leave=False, dynamic_ncols=True) as bar:
        untuned = shapes(None)
        bar.update()
        rules = rules_of(untuned)
        arms = {}
        for name, path in networks.items():
            arms[name] = shapes(path)
            bar.update()
        lines = table(arms, untuned, groups, rules, bar.update)
    return lines, {"what": what, "rules": rules, "edge": max(untuned[0].shape)}
