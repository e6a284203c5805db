"""Compare generators by the `solid` reward: its terms, fidelity, the reward, and the share of closed shapes.

GANs are compared on held-out latents, tuned stages of flow generators on held-out prompts. Every shape is
compared with the untuned shape of the same latent, or of the same prompt and noise. The controls need no
training: post-processing of the untuned shapes, a ball of the same volume, and the best of n untuned shapes
by the reward. A control that scores high although its shapes are not better shows a weakness of the reward.

Shapes: N shapes; X, Y, Z voxels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from eg3d_rlhf.core.cli import prefix_errors
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

Grids = Sequence[np.ndarray]  # N grids, each bool [X, Y, Z], True inside


def ball(solid: np.ndarray) -> np.ndarray:
    """Return a ball that has the same volume and centre as a shape, both bool [X, Y, Z]."""
    if not solid.any():
        return solid  # an empty shape has no centre, and its ball is empty
    centre = np.argwhere(solid).mean(axis=0)  # voxel indices
    squared_distance = sum(
        (indices - middle) ** 2 for indices, middle in zip(np.indices(solid.shape), centre, strict=True)
    )
    # V = 4/3 π r³, so r² = (3 V / 4 π)^(2/3)
    return squared_distance < (3 * solid.sum() / (4 * np.pi)) ** (2 / 3)


def on_bool_grids(apply_filter: filters.Filter) -> Callable[[np.ndarray], np.ndarray]:
    """Return a post-processing method of bool grids.

    Args: apply_filter: method of values that are negative inside, see filters.py.
    """
    # The values -1 inside and +1 outside replace signed distances.
    return lambda solid: apply_filter(np.where(solid, -1.0, 1.0)) < 0


def with_grid_radius(
    apply_filter: Callable[[np.ndarray, float], np.ndarray], radius: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a post-processing method of bool grids with a fixed radius.

    Args:
        apply_filter: method of values and a radius.
        radius: radius in voxels of a 64^3 grid. On a coarser grid it is at least one voxel of that grid,
            since a smaller radius would change nothing.
    """
    return lambda solid: on_bool_grids(lambda values: apply_filter(values, max(radius, 64 / len(values))))(
        solid
    )


# Name -> change of the untuned shapes that needs no training. Numbers are radii in voxels of a 64^3 grid.
CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "closing 4": with_grid_radius(filters.morphological_closing, 4),
    "convex hull": on_bool_grids(filters.hull),
    "blur 2": with_grid_radius(filters.blur, 2),
    "ball of its volume": ball,
}


def measure_shapes(grids: Grids, untuned: Grids, rules: solids.Rules) -> dict[str, np.ndarray]:
    """Measure shapes against the untuned shapes.

    Returns: values [N] by name: each term of the score, "solid", "fidelity", "reward", and "closed", which is
        1 for a shape of one part without a cavity, else 0.
    """
    rows = []
    for grid, untuned_grid in zip(grids, untuned, strict=True):
        # Fidelity compares with the untuned shape without its defects, so that removing a defect does not
        # reduce the fidelity.
        result = solids.score_against(grid, [solids.without_defects(untuned_grid, rules)], rules)
        # label(...)[1] is the number of connected parts; `inner` is 1 if there is no cavity.
        is_closed = ndimage.label(grid)[1] == 1 and result.score.inner == 1
        rows.append({**result.to_dict(), "closed": float(is_closed)})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def best_of_groups(rewards: np.ndarray, groups: int) -> np.ndarray:
    """Return the index of the shape with the highest reward in each group of consecutive shapes.

    Args:
        rewards: rewards of the shapes, [N].
        groups: number of groups, which divides N.

    Returns: [groups].
    """
    group_size = len(rewards) // groups
    # argmax is an index within the group; the index of the group's first shape is added.
    return rewards.reshape(groups, group_size).argmax(axis=1) + group_size * np.arange(groups)


def summarise_arm(
    values_by_name: Mapping[str, np.ndarray], untuned_values: Mapping[str, np.ndarray] | None
) -> dict:
    """Compute the metrics of an arm as JSON values: means, change of the reward, and share of closed shapes.

    Args:
        values_by_name: values [N] of the arm, as `measure_shapes` returns them.
        untuned_values: values of the untuned shapes; None: no change is computed.
    """
    closed_interval = wilson_interval(float(values_by_name["closed"].sum()), len(values_by_name["closed"]))
    reward_interval = bootstrap_mean_interval(values_by_name["reward"])  # over shapes
    row: dict[str, Any] = {name: float(values.mean()) for name, values in values_by_name.items()}
    row |= {
        "reward_ci95": [reward_interval.lo, reward_interval.hi],  # bootstrap over shapes
        "closed_ci95": [closed_interval.lo, closed_interval.hi],  # Wilson
        "n": len(values_by_name["closed"]),
    }
    # The change is paired, so it needs one shape for each untuned shape.
    if untuned_values is not None and len(untuned_values["reward"]) == len(values_by_name["reward"]):
        change = paired_summary(untuned_values["reward"], values_by_name["reward"])
        row |= {"change": change.mean, "change_ci95": [change.mean_lo, change.mean_hi]}
    return row


def table(
    arms: Mapping[str, Grids], untuned: Grids, groups: int, rules: solids.Rules, on_arm: Callable[[], object]
) -> dict[str, dict]:
    """Compute the metrics of the untuned shapes, the arms, the best of n, and the controls, by name.

    Args:
        arms: shapes of each tuned network.
        untuned: shapes of the untuned network.
        groups: number of groups of consecutive untuned shapes, of which the best of n are selected.
        rules: weights of the score's terms.
        on_arm: function that is called after each arm, to advance a progress bar.
    """
    untuned_values = measure_shapes(untuned, untuned, rules)
    summary_by_arm = {UNTUNED: summarise_arm(untuned_values, None)}
    for name, grids in arms.items():
        summary_by_arm[name] = summarise_arm(measure_shapes(grids, untuned, rules), untuned_values)
        on_arm()
    # The best of n are selected by the same reward that the table shows.
    chosen_indices = best_of_groups(untuned_values["reward"], groups)
    summary_by_arm[f"best of {len(untuned) // groups}"] = summarise_arm(
        {name: values[chosen_indices] for name, values in untuned_values.items()}, None
    )
    for name, apply_change in CONTROLS.items():
        summary_by_arm[name] = summarise_arm(
            measure_shapes([apply_change(grid) for grid in untuned], untuned, rules), untuned_values
        )
        on_arm()
    return summary_by_arm


def markdown(summary_by_arm: Mapping[str, dict], rules: solids.Rules) -> list[str]:
    """Format the table of the metrics that `table` returns."""
    # Terms with weight 0 do not enter the score.
    terms = [name for name, weight in zip(solids.TERMS, rules.weights, strict=True) if weight]
    columns = {name: (name, ".3f") for name in (*terms, "solid")}
    columns |= {"fidelity": ("F", ".3f"), "reward": ("R", ".3f")}  # the symbols of the documentation
    columns |= {"change": ("change of R", "+.3f"), "closed": ("closed", ".0%")}
    return figure_table("", summary_by_arm, columns, intervals=("change", "closed"))


@torch.no_grad()
def shapes_of_latents(generator: Generator, seeds: Sequence[int], psi: float) -> Grids:
    """Return the shapes that a generator makes of seeds, each bool [EDGE, EDGE, EDGE] over the whole cube."""
    spec = SlabSpec.from_bounds(generator.bounds, solids.EDGE)
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
    """Generate one shape for each pair of a prompt and a noise seed.

    Args:
        weights: folder of a stage's tuned weights, or of a run; None: the untuned weights.
        stage: name of the tuned stage.
    """
    models = {}
    if weights is not None:
        # A run's folder holds one folder for each stage. The folder of a stage itself is accepted as well.
        folder = weights / stage if (weights / stage).is_dir() else weights
        models = {stage: tuned_model(stage_of(problem.pipeline, stage).model, folder)}
    return [grid_of(problem.pipeline, asset) for asset in generate(problem.pipeline, prompts, seeds, models)]


def source_of(pipeline: str, conditioning: Path | None, runs: Sequence[Path]) -> ArmsSource:
    """Return the source from which a flow generator is opened.

    For a generator in the user's folder, this is the source that its runs recorded. Prompts that were held
    out in these runs are thus held out here as well.

    Args:
        pipeline: folder or name of the generator.
        conditioning: embeddings of the prompts; None: those of the runs.
        runs: folders of the runs that are compared.

    Raises: ValueError if the runs recorded different sources, since their held-out prompts may differ.
    """
    sources: list[ArmsSource] = []
    # the bundled generators have one fixed division of their prompts
    if not family_of(Path(pipeline)).bundled:
        for run in runs:
            recorded_source = recorded(run).get("run", {}).get("source")  # None in runs without such a record
            source = (
                ArmsSource()
                if recorded_source is None
                else from_dict(ArmsSource, recorded_source, str(run / OPTIONS))
            )
            sources += [source] if source not in sources else []
    if len(sources) > 1:
        raise ValueError(
            "The runs divide the prompts into training and held-out prompts in different ways. Compare only"
            " runs that were started with the same --seed and the same prompts."
        )
    source = replace(sources[0] if sources else ArmsSource(), pipeline=pipeline)
    return source if conditioning is None else replace(source, conditions=str(conditioning))


def compare_networks(
    networks: Mapping[str, Path],
    before_path: Path | None,
    n: int,
    psi: float,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare tuned GANs on held-out latents.

    Args:
        networks: files of the tuned networks, by name.
        before_path: file of the untuned network; None: the bundled one.
        n: number of latents; it is rounded down to a multiple of CHOOSE.
        psi: truncation.
        seed: shifts the held-out latents.

    Returns: the metrics of each arm by its name; and how they were measured: "what" (the sample, in words),
        the "rules" of the score, and the "edge" of the grids in voxels.
    """
    groups = n // CHOOSE
    # A multiple of CHOOSE, so that every group for the best of n has CHOOSE shapes.
    seeds = LATENTS.take(groups * CHOOSE, seed)
    with prefix_errors("--before"):  # an error of loading names this flag
        untuned_generator = load_generator(before_path, device).generator

    def make_shapes(path: Path | None) -> Grids:
        return shapes_of_latents(
            untuned_generator if path is None else load_generator(path, device).generator, seeds, psi
        )

    sample_text = f"latents {seeds[0]} to {seeds[-1]}, psi {psi:g}"
    return _measure_networks(networks, make_shapes, groups, lambda grids: solids.HEADS, sample_text)


def compare_stages(
    networks: Mapping[str, Path],
    source: ArmsSource,
    stage: str | None,
    n: int,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare tuned stages of a flow generator on held-out prompts.

    Args:
        networks: folders of the tuned weights, by name.
        source: source from which the generator is opened.
        stage: name of the tuned stage; None: the first stage.
        n: largest number of shapes of each arm.
        seed: seed of the noises.

    Returns: the same as `compare_networks`.
    Raises: ValueError if no prompt is held out.
    """
    problem = open_problem(source, device)
    stage = stage_of(problem.pipeline, stage or problem.pipeline.stages[0].name).name
    prompts_used = list(problem.held_out_prompts)[: n // CHOOSE]
    if not prompts_used:
        raise ValueError(
            "--conditioning: no prompt is held out, since there are too few prompts. Embed at least two"
            " prompts, so that one of them can be held out."
        )
    # Each prompt has the same number of noises, a multiple of CHOOSE.
    noise_count = CHOOSE * (n // CHOOSE // len(prompts_used))
    prompts, noises = crossed(prompts_used, noise_count, seed)
    sample_text = f"{len(prompts_used)} held-out prompts x {noise_count} noises, seed {seed}; stage {stage}"
    return _measure_networks(
        networks,
        lambda path: shapes_of_prompts(problem, path, stage, prompts, noises),
        len(prompts_used) * noise_count // CHOOSE,
        lambda grids: rules_for(grids[0]),
        sample_text,
    )


def _measure_networks(
    networks: Mapping[str, Path],
    make_shapes: Callable[[Path | None], Grids],
    groups: int,
    make_rules: Callable[[Grids], solids.Rules],
    sample_text: str,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Generate and measure all shapes, and show a progress bar.

    Args:
        networks: files or folders of the tuned networks, by name.
        make_shapes: function that generates the shapes of a network; of the untuned one for None.
        groups: number of groups for the best of n.
        make_rules: function from the untuned shapes to the rules of the score.
        sample_text: description of the sample.

    Returns: the same as `compare_networks`.
    """
    # Each tuned network counts twice, for its generation and its measurement; the untuned one counts once.
    total = 2 * len(networks) + 1 + len(CONTROLS)
    with tqdm(total=total, desc="shapes", unit="arm", leave=False, dynamic_ncols=True) as bar:
        untuned = make_shapes(None)
        bar.update()
        rules = make_rules(untuned)  # the same for every arm
        arms = {}  # shapes of each tuned network
        for name, path in networks.items():
            arms[name] = make_shapes(path)
            bar.update()
        summary_by_arm = table(arms, untuned, groups, rules, bar.update)
    return summary_by_arm, {"what": sample_text, "rules": rules, "edge": max(untuned[0].shape)}
