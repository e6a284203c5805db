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
from eg3d_rlhf.experiments.network_before import network_before
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


def ball(bool_grid: np.ndarray) -> np.ndarray:
    """Return a ball that has the same volume and centre as a shape.

    Args: bool_grid: shape, bool [X, Y, Z], True inside.
    Returns: the ball on the same grid, bool [X, Y, Z].
    """
    if not bool_grid.any():
        return bool_grid  # an empty shape has no centre, and its ball is empty
    centre = np.argwhere(bool_grid).mean(axis=0)  # voxel indices
    squared_distance = sum(
        (indices - centre_index) ** 2
        for indices, centre_index in zip(np.indices(bool_grid.shape), centre, strict=True)
    )
    # V = 4/3 π r³, so r² = (3 V / 4 π)^(2/3)
    return squared_distance < (3 * bool_grid.sum() / (4 * np.pi)) ** (2 / 3)


def on_bool_grids(apply_filter: filters.Filter) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a post-processing method of values into a method of bool grids.

    Args: apply_filter: method that takes values which are negative inside, see filters.py.
    """
    # The values -1 inside and +1 outside replace signed distances.
    return lambda bool_grid: apply_filter(np.where(bool_grid, -1.0, 1.0)) < 0


def with_grid_radius(
    apply_filter: Callable[[np.ndarray, float], np.ndarray], radius: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a post-processing method with a radius into a method of bool grids with a fixed radius.

    Args:
        apply_filter: method that takes values, negative inside, and a radius.
        radius: radius in voxels of a 64^3 grid. On a coarser grid it is at least one voxel of that grid,
            since a smaller radius would change nothing.
    """
    return lambda bool_grid: on_bool_grids(
        lambda shape_values: apply_filter(shape_values, max(radius, 64 / len(shape_values)))
    )(bool_grid)


# Name -> change of the untuned shapes that needs no training. Numbers are radii in voxels of a 64^3 grid.
CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "closing 4": with_grid_radius(filters.morphological_closing, 4),
    "convex hull": on_bool_grids(filters.hull),
    "blur 2": with_grid_radius(filters.blur, 2),
    "ball of its volume": ball,
}


def measure_shapes(grids: Grids, untuned_grids: Grids, rules: solids.Rules) -> dict[str, np.ndarray]:
    """Score shapes by the reward `solid` and its terms, in comparison with the untuned shapes.

    Args:
        grids: shapes to measure.
        untuned_grids: untuned shapes of the same latents, or of the same prompts and noises.
        rules: rules of the score.

    Returns: dict from names to values [N]: each term of the score, "solid", "fidelity", "reward", and
        "closed", which is 1 for a shape of one part without a cavity, else 0.
    """
    shape_rows = []
    for grid, untuned_grid in zip(grids, untuned_grids, strict=True):
        # Fidelity compares with the untuned shape without its defects, so that removing a defect does not
        # reduce the fidelity.
        shape_score = solids.score_against(grid, [solids.without_defects(untuned_grid, rules)], rules)
        # label(...)[1] is the number of connected parts; `inner` is 1 if there is no cavity.
        is_closed = ndimage.label(grid)[1] == 1 and shape_score.score.inner == 1
        shape_rows.append({**shape_score.to_dict(), "closed": float(is_closed)})
    return {
        measure_name: np.array([shape_row[measure_name] for shape_row in shape_rows])
        for measure_name in shape_rows[0]
    }


def best_of_groups(rewards: np.ndarray, group_count: int) -> np.ndarray:
    """Return the index of the shape with the highest reward in each group of consecutive shapes.

    Args:
        rewards: rewards of the shapes, [N].
        group_count: number of groups, which divides N.

    Returns: indices of the chosen shapes, [groups].
    """
    group_size = len(rewards) // group_count
    # argmax is an index within the group; the index of the group's first shape is added.
    return rewards.reshape(group_count, group_size).argmax(axis=1) + group_size * np.arange(group_count)


def summarise_arm(
    values_by_name: Mapping[str, np.ndarray], untuned_values: Mapping[str, np.ndarray] | None
) -> dict:
    """Compute the metrics of an arm as JSON values: means, change of the reward, and share of closed shapes.

    Args:
        values_by_name: values [N] of the arm, as `measure_shapes` returns them.
        untuned_values: values [N] of the untuned shapes. If they are None, no change is computed.
    """
    closed_interval = wilson_interval(float(values_by_name["closed"].sum()), len(values_by_name["closed"]))
    reward_interval = bootstrap_mean_interval(values_by_name["reward"])  # over shapes
    arm_metrics: dict[str, Any] = {
        measure_name: float(measure_values.mean()) for measure_name, measure_values in values_by_name.items()
    }
    arm_metrics |= {
        "reward_ci95": [reward_interval.lo, reward_interval.hi],  # bootstrap over shapes
        "closed_ci95": [closed_interval.lo, closed_interval.hi],  # Wilson
        "n": len(values_by_name["closed"]),
    }
    # The change is paired, so it needs one shape for each untuned shape.
    if untuned_values is not None and len(untuned_values["reward"]) == len(values_by_name["reward"]):
        paired_change = paired_summary(untuned_values["reward"], values_by_name["reward"])
        arm_metrics |= {
            "change": paired_change.mean,
            "change_ci95": [paired_change.mean_lo, paired_change.mean_hi],
        }
    return arm_metrics


def table(
    grids_by_arm: Mapping[str, Grids],
    untuned_grids: Grids,
    group_count: int,
    rules: solids.Rules,
    on_arm: Callable[[], object],
) -> dict[str, dict]:
    """Compute the metrics of the untuned shapes, the arms, the best of n, and the controls, by name.

    Args:
        grids_by_arm: shapes of each tuned network.
        untuned_grids: shapes of the untuned network.
        group_count: number of groups of consecutive untuned shapes, of which the best of n are selected.
        rules: rules of the score: the weights of its terms, and its limits.
        on_arm: function that is called after each arm, to advance a progress bar.
    """
    untuned_values = measure_shapes(untuned_grids, untuned_grids, rules)
    metrics_by_arm = {UNTUNED: summarise_arm(untuned_values, None)}
    for arm_name, grids in grids_by_arm.items():
        metrics_by_arm[arm_name] = summarise_arm(measure_shapes(grids, untuned_grids, rules), untuned_values)
        on_arm()
    # The best of n are selected by the same reward that the table shows.
    chosen_indices = best_of_groups(untuned_values["reward"], group_count)
    metrics_by_arm[f"best of {len(untuned_grids) // group_count}"] = summarise_arm(
        {name: measure_values[chosen_indices] for name, measure_values in untuned_values.items()},
        None,
    )
    for arm_name, apply_change in CONTROLS.items():
        metrics_by_arm[arm_name] = summarise_arm(
            measure_shapes([apply_change(grid) for grid in untuned_grids], untuned_grids, rules),
            untuned_values,
        )
        on_arm()
    return metrics_by_arm


def markdown(metrics_by_arm: Mapping[str, dict], rules: solids.Rules) -> list[str]:
    """Format the table of the metrics that `table` returns."""
    # Terms with weight 0 do not enter the score.
    weighted_terms = [
        term_name for term_name, term_weight in zip(solids.TERMS, rules.weights, strict=True) if term_weight
    ]
    format_by_metric = {term_name: (term_name, ".3f") for term_name in (*weighted_terms, "solid")}
    format_by_metric |= {"fidelity": ("F", ".3f"), "reward": ("R", ".3f")}  # the symbols of the documentation
    format_by_metric |= {"change": ("change of R", "+.3f"), "closed": ("closed", ".0%")}
    return figure_table("", metrics_by_arm, format_by_metric, intervals=("change", "closed"))


@torch.no_grad()
def shapes_of_latents(generator: Generator, seeds: Sequence[int], psi: float) -> Grids:
    """Generate the shapes of seeds, each bool [EDGE, EDGE, EDGE] over the whole cube."""
    spec = SlabSpec.from_bounds(generator.bounds, solids.EDGE)
    grids = []  # of bool, so that all shapes fit in memory
    for start in range(0, len(seeds), AT_ONCE):
        ws = ws_of_seeds(
            generator, seeds[start : start + AT_ONCE], truncation_psi=psi, truncation_cutoff=CUTOFF
        )
        grids += occupancy(generator.field(ws), spec)
    return grids


def shapes_of_prompts(
    problem: Problem, weights_folder: Path | None, stage: str, prompts: Sequence[str], seeds: Sequence[int]
) -> Grids:
    """Generate one shape for each pair of a prompt and a noise seed.

    Args:
        problem: opened flow generator.
        weights_folder: folder of a stage's tuned weights, or of a run; None selects the untuned weights.
        stage: name of the tuned stage.
        prompts: prompts of the N shapes.
        seeds: noise seeds of the N shapes.
    """
    model_by_stage = {}
    if weights_folder is not None:
        # A run's folder holds one folder for each stage. The folder of a stage itself is accepted as well.
        stage_folder = weights_folder / stage if (weights_folder / stage).is_dir() else weights_folder
        model_by_stage = {stage: tuned_model(stage_of(problem.pipeline, stage).model, stage_folder)}
    return [
        grid_of(problem.pipeline, asset_token)
        for asset_token in generate(problem.pipeline, prompts, seeds, model_by_stage)
    ]


def source_of(pipeline: str, conditioning: Path | None, run_folders: Sequence[Path]) -> ArmsSource:
    """Return the source from which a flow generator is opened.

    For a generator in the user's folder, this is the source that its runs recorded. Prompts that were held
    out in these runs are thus held out here as well.

    Args:
        pipeline: folder or name of the generator.
        conditioning: file of the prompts' embeddings; None selects the embeddings that the runs recorded.
        run_folders: folders of the runs that are compared.

    Raises: ValueError if the runs recorded different sources, since their held-out prompts may differ.
    """
    recorded_sources: list[ArmsSource] = []
    # the bundled generators have one fixed division of their prompts
    if not family_of(Path(pipeline)).bundled:
        for run_folder in run_folders:
            # None in runs without such a record
            recorded_source = recorded(run_folder).get("run", {}).get("source")
            arms_source = (
                ArmsSource()
                if recorded_source is None
                else from_dict(ArmsSource, recorded_source, str(run_folder / OPTIONS))
            )
            recorded_sources += [arms_source] if arms_source not in recorded_sources else []
    if len(recorded_sources) > 1:
        raise ValueError(
            "The runs divide the prompts into training and held-out prompts in different ways. Compare only"
            " runs that were started with the same --seed and the same prompts."
        )
    arms_source = replace(recorded_sources[0] if recorded_sources else ArmsSource(), pipeline=pipeline)
    return arms_source if conditioning is None else replace(arms_source, conditions=str(conditioning))


def compare_networks(
    path_by_network: Mapping[str, Path],
    before_path: Path | None,
    max_latent_count: int,
    psi: float,
    seed: int,
    device: torch.device,
    level: float | None = None,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare tuned GANs on held-out latents.

    Args:
        path_by_network: files of the tuned networks, by name.
        before_path: file of the untuned network; None selects the network from which the runs began.
        max_latent_count: number of latents; it is rounded down to a multiple of CHOOSE.
        psi: truncation.
        seed: number that shifts the range of the held-out latents.
        device: device of the networks.
        level: raw density at the surface of the shapes; None: the level of each network.

    Returns: the metrics of each arm by its name; and a dict that states how they were measured: "what" (the
        sample, in words), "rules" (the rules of the score), and "edge" (voxels per edge of the grids).
    """
    group_count = max_latent_count // CHOOSE
    # A multiple of CHOOSE, so that every group for the best of n has CHOOSE shapes.
    seeds = LATENTS.take(group_count * CHOOSE, seed)
    before_path = before_path or network_before(path_by_network.values())
    with prefix_errors("--before"):  # an error of loading names this flag
        untuned_generator = load_generator(before_path, device, level).generator

    def make_shapes(network_path: Path | None) -> Grids:
        return shapes_of_latents(
            untuned_generator
            if network_path is None
            else load_generator(network_path, device, level).generator,
            seeds,
            psi,
        )

    sample_text = f"latents {seeds[0]} to {seeds[-1]}, psi {psi:g}"
    return _measure_networks(
        path_by_network, make_shapes, group_count, lambda grids: solids.HEADS, sample_text
    )


def compare_stages(
    folder_by_network: Mapping[str, Path],
    arms_source: ArmsSource,
    stage: str | None,
    max_shape_count: int,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Compare tuned stages of a flow generator on held-out prompts.

    Args:
        folder_by_network: folders of the tuned weights, by name.
        arms_source: source from which the generator is opened.
        stage: name of the tuned stage; None selects the first stage.
        max_shape_count: largest number of shapes of each arm.
        seed: seed of the noises.
        device: device of the generator.

    Returns: the metrics of each arm and a dict that states how they were measured, as `compare_networks`
        returns them.
    Raises: ValueError if no prompt is held out.
    """
    problem = open_problem(arms_source, device)
    stage = stage_of(problem.pipeline, stage or problem.pipeline.stages[0].name).name
    used_prompts = list(problem.held_out_prompts)[: max_shape_count // CHOOSE]
    if not used_prompts:
        raise ValueError(
            "--conditioning: no prompt is held out, since there are too few prompts. Embed at least two"
            " prompts, so that one of them can be held out."
        )
    # Each prompt has the same number of noises, a multiple of CHOOSE.
    noise_count = CHOOSE * (max_shape_count // CHOOSE // len(used_prompts))
    prompts, noise_seeds = crossed(used_prompts, noise_count, seed)
    sample_text = f"{len(used_prompts)} held-out prompts x {noise_count} noises, seed {seed}; stage {stage}"
    return _measure_networks(
        folder_by_network,
        lambda weights_path: shapes_of_prompts(problem, weights_path, stage, prompts, noise_seeds),
        len(used_prompts) * noise_count // CHOOSE,
        lambda grids: rules_for(grids[0]),
        sample_text,
    )


def _measure_networks(
    path_by_network: Mapping[str, Path],
    make_shapes: Callable[[Path | None], Grids],
    group_count: int,
    make_rules: Callable[[Grids], solids.Rules],
    sample_text: str,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Generate and measure the shapes of the untuned network and of all tuned networks, with a progress bar.

    Args:
        path_by_network: file of each tuned network, or folder of its tuned weights, by the network's name.
        make_shapes: function that takes the path of a tuned network and returns its shapes. If it gets None,
            it returns the shapes of the untuned network.
        group_count: number of groups of consecutive untuned shapes. The best of n selects one shape of each
            group.
        make_rules: function that takes the untuned shapes and returns the rules of the score, which are the
            same for all networks.
        sample_text: description of the sample, for example "latents 0 to 63, psi 0.7".

    Returns: the metrics of each arm by its name; and a dict that states how they were measured: "what"
        (`sample_text`), "rules" (the rules of the score), and "edge" (voxels per edge of the grids).
    """
    # Each tuned network counts twice, for its generation and its measurement; the untuned one counts once.
    step_count = 2 * len(path_by_network) + 1 + len(CONTROLS)
    with tqdm(total=step_count, desc="shapes", unit="arm", leave=False, dynamic_ncols=True) as bar:
        untuned_grids = make_shapes(None)
        bar.update()
        rules = make_rules(untuned_grids)  # the same for every arm
        grids_by_network = {}  # shapes of each tuned network
        for network_name, network_path in path_by_network.items():
            grids_by_network[network_name] = make_shapes(network_path)
            bar.update()
        metrics_by_arm = table(grids_by_network, untuned_grids, group_count, rules, bar.update)
    return metrics_by_arm, {"what": sample_text, "rules": rules, "edge": max(untuned_grids[0].shape)}
