"""Measurements of each arm's shapes in the controlled study.

Each network is measured in one task; the task of a tuned network has the name of its run.
Shapes: N latents, V validation latents, n grid points per edge.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.registry import load_plugins
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION, HeldOut
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.baselines.directions import from_arrays
from eg3d_rlhf.evaluation.baselines.rungs import Inputs
from eg3d_rlhf.evaluation.baselines.samples import Workbench, select_direction
from eg3d_rlhf.evaluation.controlled_study.plan import Plan
from eg3d_rlhf.evaluation.filters import FILTERS, best_post_processing, evaluate_filters
from eg3d_rlhf.evaluation.settings import (
    LABELS,
    POST_PROCESSING,
    SEARCH,
    STEERING_ARMS,
    UNSUPERVISED,
    WEIGHED_ARMS,
)
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, ShapeFeatures
from eg3d_rlhf.tuning.gan.steering_settings import DEFAULT_STRENGTH
from training.progress import tqdm

PSIS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # candidates of the truncation arm
CHOOSING = 64  # validation latents on which the post-processing method is chosen
GROUND_TRUTH = "ground-truth heads"  # task that computes the ground-truth heads
BEFORE = "before"  # task that measures the network before tuning
FIND_STEERING = "directions of label set "  # start of a task that finds directions
STEERED_BY = ", label set "  # in the name of a task, between the arm and the index of the label set
SHARE = "share"  # key of the share above which a weighed filter is applied
SEARCH_STEPS = 10  # steps of the search in w
METHOD = "filter"  # key of the chosen method's number; the name that version 0.1 wrote


def task_of_psi(psi: float) -> str:
    """Return the name of the task that measures the untuned network at a truncation."""
    return f"psi {psi:g}"


def tasks_of_arm(plan: Plan, arm_name: str) -> list[str]:
    """List the tasks of an arm without runs, one for each label set if it depends on labels."""
    if arm_name not in STEERING_ARMS:
        return [arm_name]
    return [f"{arm_name}{STEERED_BY}{label_set_index}" for label_set_index in range(plan.draws)]


def _prepare_worker(
    folder: Path,
    inputs_by_task: Mapping[str, Mapping],
    network_before_path: Path | None,
    network_by_task: Mapping[str, Path],
    latent_count: int,
    held_out_range: HeldOut = LATENTS,
    seed: int = 0,
    label_set_paths: Sequence[Path] = (),
    reward_path: Path | None = None,
) -> Callable[[str], None]:
    """Prepare a worker process, and return the function that computes one task and stores the result.

    A task is the measurement of the shapes of one network or baseline, or of the ground-truth heads.

    Args:
        folder: folder of the store.
        inputs_by_task: inputs of each task, which are the key of its result in the store.
        network_before_path: file of the network before tuning; None selects the bundled generator.
        network_by_task: network file of each tuned network, by task.
        latent_count: number of latents that are measured.
        held_out_range: held-out range of the latents.
        seed: number of strides by which the range is shifted.
        label_set_paths: files of the label sets, for the arms that move latents.
        reward_path: reward of the first label set, for the arms that choose or search by it.
    """
    store = Store(folder, renew=True)
    torch.set_num_threads(1)  # there is one process per core; more threads would compete
    load_plugins()
    # The ground truth belongs to the latents of this network. Tuned networks see the same latents.
    generator_before = load_generator(network_before_path).generator
    # The seed shifts the range, so that a replication measures other latents.
    seeds = held_out_range.take(latent_count, seed)  # of the measured latents
    ground_truth = heads.ground_truth_heads(generator_before, seeds)  # [N, n, n, n]
    shape_features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None

    # The arms that use the reward come after its training, so it is loaded when the first one is measured.
    @functools.cache
    def workbench() -> Workbench:
        assert reward_path is not None
        inputs = Inputs(
            network=network_before_path,
            reward=reward_path,
            heldout_reward=None,
            labels=None,
            latents=latent_count,
            validation=CHOOSING,
            seed=seed,
            has_ground_truth=True,
        )
        return Workbench(inputs, store, {})

    def measure_shapes(shapes: np.ndarray) -> dict:
        # Features describe a complete shape for the Fréchet distance;
        # the other measures compare a head with its target.
        return heads.measure_heads(shapes, ground_truth) | (
            {"features": shape_features.of_grids(shapes)} if shape_features else {}
        )

    def measure_task(task: str) -> dict:
        if task == GROUND_TRUTH:
            return {"features": shape_features.of_grids(ground_truth) if shape_features else np.zeros((0, 0))}
        if task == POST_PROCESSING:
            # The method is chosen on validation latents, not on the latents that are measured.
            validation_seeds = VALIDATION.take(min(CHOOSING, max(latent_count, 1)))
            filter_name = best_post_processing(
                evaluate_filters(
                    heads.sample_shapes(generator_before, validation_seeds),
                    heads.ground_truth_heads(generator_before, validation_seeds),
                ),
                # A method that reduces the mean error by changing every head would be an unfair baseline.
                spares_intact=True,
            )
            filtered_shapes = np.stack(
                [
                    FILTERS[filter_name](shape_values)
                    for shape_values in heads.sample_shapes(generator_before, seeds)
                ]
            )
            return {**measure_shapes(filtered_shapes), METHOD: np.array([list(FILTERS).index(filter_name)])}
        if task.startswith(FIND_STEERING):
            # One task for each label set finds the directions of all numbers of labels.
            label_set_path = label_set_paths[int(task.removeprefix(FIND_STEERING))]
            return workbench().steering(label_set_path)
        arm_name, _, label_set = task.partition(STEERED_BY)
        if arm_name in STEERING_ARMS:
            # The finder has run before, because this task needs it (see `needed_tasks`).
            arrays = store.load_arrays("shapes", inputs_by_task[f"{FIND_STEERING}{label_set}"])
            # Names are "COUNT: NAME". The largest count stands for all labels of the set.
            all_count = max(int(name.partition(":")[0]) for name in arrays)
            # None stands for all labels. A set with fewer labels than the arm's number uses all of them.
            label_count = min(STEERING_ARMS[arm_name] or all_count, all_count)
            move = select_direction(arrays, label_count)
            # Labels that determine no direction move no sample.
            steering = from_arrays(move, DEFAULT_STRENGTH) if move["is_found"].item() else None
            return measure_shapes(workbench().shapes(workbench().ws(seeds, steering=steering)))
        if task == UNSUPERVISED:
            steering = from_arrays(workbench().principal_direction(), DEFAULT_STRENGTH)
            return measure_shapes(workbench().shapes(workbench().ws(seeds, steering=steering)))
        if task == SEARCH:
            # The search has the gate, so a head with a high reward keeps its style vectors bitwise.
            return measure_shapes(workbench().shapes(workbench().searched_ws([SEARCH_STEPS])[0]))
        if task in WEIGHED_ARMS:
            # The share is recorded, since it may be infinite: the filter is then never applied.
            shapes, share = workbench().weighed_shapes(WEIGHED_ARMS[task])
            return {**measure_shapes(shapes), SHARE: np.array([share])}
        if task.startswith("psi "):
            return measure_shapes(
                heads.sample_shapes(generator_before, seeds, float(task.removeprefix("psi ")))
            )
        # Shapes at psi 1, as in training: truncation would hide the errors that the reward should remove.
        return measure_shapes(
            heads.sample_shapes(
                generator_before if task == BEFORE else load_generator(network_by_task[task]).generator, seeds
            )
        )

    def measure_and_store(task: str) -> None:
        store.arrays("shapes", inputs_by_task[task], lambda: measure_task(task))

    return measure_and_store


def measure_arms(plan: Plan, network_by_task: Mapping[str, Path], process_count: int) -> dict[str, dict]:
    """Measure the ground-truth heads, the heads before tuning, and the heads of every arm.

    Args:
        network_by_task: network file of each tuned network, by task.
        process_count: number of processes.

    Returns: measurements by task. They are also stored in the folder "seen" of the study.
    """
    tasks = [GROUND_TRUTH, BEFORE, *network_by_task]
    tasks += [
        arm_name
        for arm_name in (POST_PROCESSING, SEARCH, UNSUPERVISED, *WEIGHED_ARMS)
        if arm_name in plan.arms
    ]
    steering_arms = [arm_name for arm_name in STEERING_ARMS if arm_name in plan.arms]
    # task of a steered arm -> task that finds its directions
    steering_tasks = {
        task: f"{FIND_STEERING}{label_set_index}"
        for arm_name in steering_arms
        for label_set_index, task in enumerate(tasks_of_arm(plan, arm_name))
    }
    # Several arms share the finder of a label set, so repetitions are removed.
    tasks += [*dict.fromkeys(steering_tasks.values()), *steering_tasks]
    tasks += [task_of_psi(psi) for psi in PSIS] if "truncation" in plan.arms else []
    shared_inputs = {
        "generator": file_hash(plan.network or bundled.GENERATOR),
        "features": file_hash(DEFAULT_ASSET) if DEFAULT_ASSET.is_file() else "",
        "latents": plan.latents,
    }
    # Without a shift, the hash is that of earlier versions, so that their stored results are found.
    shared_inputs |= {"seed": plan.seed} if plan.seed else {}
    label_set_paths = [plan.draw(label_set_index) for label_set_index in range(plan.draws)]
    reward_path = plan.reward(LABELS)
    # Only tasks that use a reward or labels depend on their files.
    # Other stored results stay valid after a change of the labels.
    chooser_inputs = {"reward": file_hash(reward_path) if reward_path.is_file() else ""}
    if steering_tasks:
        chooser_inputs["labels"] = "+".join(file_hash(path) for path in label_set_paths)
    uses_reward = (SEARCH, UNSUPERVISED, *WEIGHED_ARMS, *steering_tasks, *steering_tasks.values())
    # The hash contains the tasks' names of version 0.1, so that its stored results are found.
    inputs_by_task = {
        task: {
            "seen": file_hash(network_by_task[task]) if task in network_by_task else version_0_1.former(task),
            **shared_inputs,
            **(chooser_inputs if task in uses_reward else {}),
        }
        for task in tasks
    }
    store = Store(plan.out / "seen", renew=True)
    missing_tasks = [task for task in tasks if store.find("shapes", inputs_by_task[task]) is None]
    # The ground-truth heads come first: the task writes them to the disk, where the other tasks find them.
    needed_tasks = {
        task: [
            needed
            for needed in (GROUND_TRUTH, steering_tasks.get(task))
            if needed in missing_tasks and task != GROUND_TRUTH
        ]
        for task in missing_tasks
    }
    bar_text = "shapes of held-out latents"
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing_tasks), desc=bar_text, unit="arm") as bar:
        if missing_tasks:
            run_tasks(
                needed_tasks,
                _prepare_worker,
                (
                    store.root,
                    inputs_by_task,
                    plan.network,
                    dict(network_by_task),
                    plan.latents,
                    LATENTS,
                    plan.seed,
                    label_set_paths,
                    reward_path,
                ),
                min(process_count, len(missing_tasks)),
                plan.out / "logs",
                lambda *_: bar.update() and None,  # a callback must return None, but `update` returns a bool
            )
    return {task: store.load_arrays("shapes", inputs_by_task[task]) for task in tasks}
