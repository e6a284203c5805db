"""Compare generators by the `solid` reward: its terms, fidelity, the reward, and the share of closed shapes.

Networks of fields are compared on held-out latents, tuned stages of flows on held-out prompts. Every shape is
compared with the untuned shape of the same latent, or of the same prompt and noise. The controls need no
training: post-processing of the untuned shapes, a ball of the same volume, and the best of n untuned shapes
by the reward. They show how far a shape can score high without being a better shape.

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

CUTOFF = 14  # synthesis layers that truncation affects
AT_ONCE = 8  # shapes per batch; bounds memory
UNTUNED = "untuned"

Grids = Sequence[np.ndarray]  # N of bool [X, Y, Z], True inside


def ball(solid: np.ndarray) -> np.ndarray:
    """Return a ball [X, Y, Z] of the same volume about the same centre."""
    if not solid.any():
        return solid  # an empty shape has no centre
    centre = np.argwhere(solid).mean(axis=0)
    squared = sum((axis - middle) ** 2 for axis, middle in zip(np.indices(solid.shape), centre, strict=True))
    # V = 4/3 π r³, so r² = (3 V / 4 π)^(2/3)
    return squared < (3 * solid.sum() / (4 * np.pi)) ** (2 / 3)


def filtered(make: filters.Filter) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a post-processing method of values, negative inside, into one of bool grids."""
    # -1 inside and +1 outside stand in for signed distances
    return lambda solid: make(np.where(solid, -1.0, 1.0)) < 0


def coarse(
    make: Callable[[np.ndarray, float], np.ndarray], radius: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a post-processing method with a radius in voxels of 64^3.

    On a coarser grid the radius is at least one voxel of that grid, else the method would change nothing.
    """
    return lambda solid: filtered(lambda values: make(values, max(radius, 64 / len(values))))(solid)


# changes of the untuned shapes that need no training; the radius is in voxels of 64^3
CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "closing 4": coarse(filters.closing, 4),
    "convex hull": filtered(filters.hull),
    "blur 2": coarse(filters.blur, 2),
    "ball of its volume": ball,
}


def seen(grids: Grids, untuned: Grids, rules: solids.Rules) -> dict[str, np.ndarray]:
    """Measure shapes against the untuned ones; return values [N] by name.

    They are the terms of the score, solid, fidelity, reward, and `closed`, which is 1 for a shape of one part
    without a cavity.
    """
    rows = []
    for grid, before in zip(grids, untuned, strict=True):
        # fidelity compares with the corrected untuned shape: a correct change of a defect costs nothing
        result = solids.beside(grid, [solids.repaired(before, rules)], rules)
        closed = ndimage.label(grid)[1] == 1 and result.score.inner == 1
        rows.append({**result.to_dict(), "closed": float(closed)})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def best_of(rewards: np.ndarray, groups: int) -> np.ndarray:
    """Return the index of the best shape of each group of neighbours: rewards [N] -> [groups]."""
    per = len(rewards) // groups
    # [groups, per] -> index within the group, then plus the group's start
    return rewards.reshape(groups, per).argmax(axis=1) + per * np.arange(groups)


def line(arm: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None) -> dict:
    """Compute an arm's figures as JSON values: means, change of the reward, and share of closed shapes.

    Args: arm, before: values [N] by name, as `seen` returns them; before: None for no change.
    """
    share = wilson_interval(float(arm["closed"].sum()), len(arm["closed"]))
    reward = bootstrap_mean_interval(arm["reward"])
    row: dict[str, Any] = {name: float(values.mean()) for name, values in arm.items()}
    row |= {
        "reward_ci95": [reward.lo, reward.hi],  # bootstrap over shapes
        "closed_ci95": [share.lo, share.hi],  # Wilson
        "n": len(arm["closed"]),
    }
    # the change is paired, so it needs one shape for each untuned shape
    if before is not None and len(before["reward"]) == len(arm["reward"]):
        change = paired_summary(before["reward"], arm["reward"])
        row |= {"change": change.mean, "change_ci95": [change.mean_lo, change.mean_hi]}
    return row


def table(
    arms: Mapping[str, Grids], untuned: Grids, groups: int, rules: solids.Rules, on_arm: Callable[[], object]
) -> dict[str, dict]:
    """Compute the lines by name: untuned shapes, the arms, the best of each group, and the controls.

    Args: groups: number of groups of neighbouring untuned shapes, for best of n; on_arm: called after each
        arm.
    """
    before = seen(untuned, untuned, rules)
    lines = {UNTUNED: line(before, None)}
    for name, grids in arms.items():
        lines[name] = line(seen(grids, untuned, rules), before)
        on_arm()
    chosen = best_of(before["reward"], groups)  # selected by the same reward that the table shows
    lines[f"best of {len(untuned) // groups}"] = line(
        {name: values[chosen] for name, values in before.items()}, None
    )
    for name, change in CONTROLS.items():
        lines[name] = line(seen([change(grid) for grid in untuned], untuned, rules), before)
        on_arm()
    return lines


def markdown(lines: Mapping[str, dict], rules: solids.Rules) -> list[str]:
    """Format the table of lines."""
    # terms without weight do not enter the score
    terms = [name for name, weight in zip(solids.TERMS, rules.weights, strict=True) if weight]
    columns = {name: (name, ".3f") for name in (*terms, "solid")}
    columns |= {"fidelity": ("F", ".3f"), "reward": ("R", ".3f")}  # the symbols of the documentation
    columns |= {"change": ("change of R", "+.3f"), "closed": ("closed", ".0%")}
    return figure_table("", lines, columns, intervals=("change", "closed"))


@torch.no_grad()
def shapes_of_latents(generator: Generator, seeds: Sequence[int], psi: float) -> Grids:
    """Return the shapes of latents, bool [EDGE, EDGE, EDGE] over the whole cube."""
    spec = SlabSpec.of(generator.bounds, solids.EDGE)
    grids = []  # of bool, so that all shapes fit in memory
    for start in range(0, len(seeds), AT_ONCE):
        ws = ws_of_seeds(
            generator, seeds[start : start + AT_ONCE], truncation_psi=psi, truncation_cutoff=CUTOFF
        )
        grids += occupancy(generator.field(ws), spec)
    return grids


def shapes_of_prompts(
    problem: Problem, weights: Path | None, stage: str, prompts: Sequence[str], seeds: Sequence[int]
) -> Grids:
    """Generate the shapes of prompts and noise seeds, with a stage's tuned weights, or untuned if None."""
    models = {}
    if weights is not None:
        # a run's folder holds one folder for each stage; the folder of a stage itself is accepted as well
        folder = weights / stage if (weights / stage).is_dir() else weights
        models = {stage: tuned_model(stage_of(problem.pipeline, stage).model, folder)}
    return [grid_of(problem.pipeline, asset) for asset in generate(problem.pipeline, prompts, seeds, models)]


def source_of(pipeline: str, conditioning: Path | None, runs: Sequence[Path]) -> ArmsSource:
    """Return the source from which a generator is opened.

    For a generator in a folder it is the source of its runs, so that the prompts that they held out are held
    out here as well.
    Args: conditioning: embeddings that replace those of the runs.
    Raises: ValueError for runs that held out different prompts, or may have done so.
    """
    sources: list[ArmsSource] = []
    # the bundled generators have one fixed division of their prompts
    if not family_of(Path(pipeline)).bundled:
        for run in runs:
            values = recorded(run).get("run", {}).get("source")
            source = ArmsSource() if values is None else from_dict(ArmsSource, values, str(run / OPTIONS))
            sources += [source] if source not in sources else []
    if len(sources) > 1:
        raise ValueError(
            "runs: expected runs with the same division into training and held-out prompts, got several"
            " divisions. Name only runs with the same --seed."
        )
    source = replace(sources[0] if sources else ArmsSource(), pipeline=pipeline)
    return source if conditioning is None else replace(source, conditions=str(conditioning))


def compare_networks(
    networks: Mapping[str, Path], before: Path | None, n: int, psi: float, seed: int, device: torch.device
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare generators of fields on held-out latents.

    Args: networks: tuned networks by name; before: the untuned one, None for the bundled one; n: latents.
    Returns: the lines of the table; how they were made: "what" (the sample, in words), the "rules" and the
        "edge" of the grids in voxels.
    """
    groups = n // CHOOSE
    # a multiple of CHOOSE, so that every group of best of n is full
    seeds = LATENTS.take(groups * CHOOSE, seed)
    with naming("--before"):  # an error of loading names this flag
        first = load_generator(before, device).generator

    def shapes(path: Path | None) -> Grids:
        return shapes_of_latents(
            first if path is None else load_generator(path, device).generator, seeds, psi
        )

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
    """Compare tuned stages of a flow generator on held-out prompts; see `compare_networks`.

    Args: stage: name of the tuned stage, None for the first; n: shapes of each arm, at most.
    Raises: ValueError if no prompt is held out.
    """
    problem = open_problem(source, device)
    stage = stage_of(problem.pipeline, stage or problem.pipeline.stages[0].name).name
    kept = list(problem.held_out_conditions)[: n // CHOOSE]
    if not kept:
        raise ValueError(
            "--conditioning: no prompt is held out. Embed two or more prompts, so that one can be held out."
        )
    # the same number of noises for each prompt, a multiple of CHOOSE
    each = CHOOSE * (n // CHOOSE // len(kept))
    prompts, noises = crossed(kept, each, seed)
    what = f"{len(kept)} held-out prompts x {each} noises, seed {seed}; stage {stage}"
    return _compared(
        networks,
        lambda path: shapes_of_prompts(problem, path, stage, prompts, noises),
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
    """Generate and measure all shapes under one progress bar; None as a path stands for the untuned ones."""
    # each network is generated and then measured; the untuned shapes count once
    total = 2 * len(networks) + 1 + len(CONTROLS)
    with tqdm(total=total, desc="shapes", unit="arm", leave=False, dynamic_ncols=True) as bar:
        untuned = shapes(None)
        bar.update()
        rules = rules_of(untuned)  # the same for every arm
        arms = {}
        for name, path in networks.items():
            arms[name] = shapes(path)
            bar.update()
        lines = table(arms, untuned, groups, rules, bar.update)
    return lines, {"what": what, "rules": rules, "edge": max(untuned[0].shape)}
