"""Controlled study of the bundled heads: tuning by labels against all cheaper arms, with several seeds.

The study tests whether tuning by labels reduces the errors of heads more than arms without useful labels do.
An arm is one treatment of the generator, see `ARMS` in evaluation/settings.py. Run the study with `make
controlled-study`. Its steps are: label pairs, train rewards, tune the generator, measure the shapes of
held-out latents, and write controlled-study.json, .md and .png.

The primary endpoints were pre-registered on 24 November 2026, before any run: docs/lab-book/2026-11-heads.md.
Shapes: S training seeds, N latents, Q features, n grid points per edge.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.registry import load_plugins
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION, HeldOut
from eg3d_rlhf.core.statistics import t_mean_interval, two_way_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.filters import FILTERS, best_post_processing, evaluate_filters
from eg3d_rlhf.evaluation.settings import ARMS, INVERTED, LABELS, POST_PROCESSING, RANDOMISED
from eg3d_rlhf.evaluation.trainings import PACKAGE, TRAIN_REWARD, Part, make_with_progress_bar
from eg3d_rlhf.experiments import style, version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import figure_table, write
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, ShapeFeatures
from eg3d_rlhf.preferences.labels import Preference, declare_control, load_labels, write_labels
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.rewards.smoothness import IdentityReward, Smoothness
from training.progress import tqdm

# arms that train a reward for each label set and each reward seed
ARMS_WITH_LABELS = (LABELS, RANDOMISED, INVERTED)
PRIMARY_ENDPOINTS = ("error_defective", "shape_frechet")  # pre-registered metrics; lower is better
ALLOWED_HARM = 0.02  # share of intact heads that an arm may degrade and still count as harmless
PSIS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # candidates of the truncation arm
CHOOSING = 64  # validation latents on which the post-processing method is chosen
FIRST_SEED = 40_000  # further label sets use latents from this seed on
TUNING_FLAGS = ("--reward=sigma",)  # flags of train.py; all others are those of the demo


# Rewards of the arms.


def randomise(labels: Sequence[Preference], seed: int) -> list[Preference]:
    """Return the same pairs, each with a random winner.

    Args: seed: seed of the random winners.
    """
    # The constant 5 separates this random stream from others of the same seed. Each label is inverted with
    # probability one half.
    is_inverted = np.random.default_rng([seed, 5]).random(len(labels)) < 0.5
    return [
        invert(label) if must_invert else label
        for label, must_invert in zip(labels, is_inverted, strict=True)
    ]


def invert(label: Preference) -> Preference:
    """Return the label with winner and loser exchanged."""
    return replace(label, winner=label.loser, loser=label.winner)


def permute_weights(reward: Reward, seed: int) -> Reward:
    """Put the entries of each weight tensor of a reward's network into a random order, in place.

    The resulting control has the same distribution of weights, but has lost what the reward has learnt.

    Args: seed: seed of the random order.
    Returns: the reward with the permuted network.
    """
    generator = torch.Generator().manual_seed(seed)  # does not change the global random state
    tensor_by_name = reward.network.state_dict()  # shares memory with the network
    for weight_tensor in tensor_by_name.values():
        weight_tensor.copy_(
            weight_tensor.flatten()[torch.randperm(weight_tensor.numel(), generator=generator)].view_as(
                weight_tensor
            )
        )
    return Reward(reward.observation, reward.network, {**reward.provenance, "permuted": seed})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All arms, seeds and label sets of a study. Its methods return the commands (`Part`) that make the
    study's files.
    """

    out: Path  # folder of the study
    arms: Sequence[str]  # arms to run, names in ARMS
    seeds: Sequence[int]  # training seeds of tuning
    rewards: int  # number of training seeds of rewards, for each label set
    draws: int  # number of label sets
    latents: int  # number of held-out latents that are measured
    network: Path | None  # generator before tuning; None: the bundled generator
    labels: Path  # file of the first label set
    train: tuple[str, ...]  # further flags of tools/train_reward.py
    tune: tuple[str, ...]  # further flags of train.py

    def draw(self, label_set_index: int) -> Path:
        """Return the file of one label set.

        Args: label_set_index: index of the label set. Index 0 is the set that the user passed.
        """
        return (
            self.labels
            if label_set_index == 0
            else self.out / "labels" / f"draw{label_set_index}" / "labels.jsonl"
        )

    def labels_of(self, arm_name: str, label_set_index: int) -> Path:
        """Return the file of an arm's labels, which is a label set or a randomised or inverted copy of one.

        Args:
            arm_name: name of the arm in ARMS.
            label_set_index: index of the label set.
        """
        return (
            self.draw(label_set_index)
            if arm_name == LABELS
            else self.out / "labels" / f"{self.in_paths(arm_name)}{label_set_index}.jsonl"
        )

    def in_paths(self, arm_name: str) -> str:
        """Return the text that represents an arm in the names of files and folders. It is the arm's name,
        except in a folder that version 0.1 began.
        """
        # folders that version 0.1 began keep its names
        return version_0_1.arm_in_paths(self.out, arm_name)

    def label_parts(self) -> list[Part]:
        """List the commands that make the label sets after the first one, which the user passed."""
        # Each further set has as many pairs as the first set.
        pair_count = len(load_labels(self.labels)) if self.draws > 1 else 0
        network_flags = [f"--network={self.network}"] if self.network else []
        return [
            Part(
                f"labels, draw {label_set_index}",
                self.draw(label_set_index).parent,
                PACKAGE,
                (
                    "label",
                    "synthetic",
                    f"--pairs={pair_count}",
                    f"--seed={label_set_index}",
                    # Each set begins 20,000 latents after the previous one, so that sets share no latent.
                    f"--first-seed={FIRST_SEED + 20_000 * label_set_index}",
                    *network_flags,
                    f"--out={self.draw(label_set_index)}",
                ),
            )
            for label_set_index in range(1, self.draws)
        ]

    def bundled(self, arm_name: str, label_set_index: int, seed: int) -> bool:
        """Return True if a reward equals the bundled reward, so that it need not be trained.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward.
        """
        return (
            (arm_name, label_set_index, seed) == (LABELS, 0, 0)
            and self.labels == BUNDLED_LABELS
            and not self.train
        )

    def reward_part(self, arm_name: str, label_set_index: int, seed: int) -> Part:
        """Return the command that trains a reward on an arm's labels.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward, and seed of the split into training, validation and test pairs.
        """
        network_flags = [f"--network={self.network}"] if self.network else []
        flags = [
            f"--labels={self.labels_of(arm_name, label_set_index)}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",  # each seed also has its own training, validation and test pairs
            *network_flags,
            *self.train,
        ]
        folder = self.out / "rewards" / f"{self.in_paths(arm_name)}-d{label_set_index}-r{seed}"
        return Part(
            f"reward: {arm_name}, draw {label_set_index}, seed {seed}",
            folder,
            TRAIN_REWARD,
            (*flags, f"--run-dir={folder}"),
        )

    def reward_parts(self) -> list[Part]:
        """List the commands that train all rewards, except the reward that equals the bundled one."""
        arm_names = [arm_name for arm_name in ARMS_WITH_LABELS if arm_name in self.arms]
        return [
            self.reward_part(arm_name, label_set_index, reward_seed)
            for arm_name in arm_names
            for label_set_index in range(self.draws)
            for reward_seed in range(self.rewards)
            if not self.bundled(arm_name, label_set_index, reward_seed)
        ]

    def reward(self, arm_name: str, label_set_index: int = 0, seed: int = 0) -> Path:
        """Return the file of an arm's reward; `reward_parts` or `write_rewards` make this file.

        Args:
            arm_name: name of the arm.
            label_set_index: index of the label set.
            seed: training seed of the reward.
        """
        if arm_name in ARMS_WITH_LABELS:
            return (
                bundled.REWARD
                if self.bundled(arm_name, label_set_index, seed)
                else self.reward_part(arm_name, label_set_index, seed).folder / "reward.safetensors"
            )
        # The smoothness reward has no weights, so its file has no seed in its name.
        return self.out / "rewards" / f"{arm_name}{seed if arm_name == 'permuted' else ''}.safetensors"

    def tunings(self) -> dict[tuple[str, int, int, int], Part]:
        """Return the commands that tune the generator, by (arm, training seed, index of the label set, reward
        seed).
        """
        part_by_case = {}  # run by case
        for arm_name in self.arms:
            for tuning_case in self._cases(arm_name):
                seed, label_set_index, reward_seed = tuning_case
                # With λ_r = 0 the reward does not change the generator, so any reward can be passed.
                reward_path = (
                    self.reward(LABELS)
                    if arm_name == "no-reward"
                    else self.reward(arm_name, label_set_index, reward_seed)
                )
                flags = [
                    "--reward=smoothness" if arm_name == "smoothness" else TUNING_FLAGS[0],
                    f"--reward-ckpt={reward_path}",
                ]
                flags += ["--lambda-r=0"] if arm_name == "no-reward" else []
                flags += [f"--init={self.network}"] if self.network else []
                # The name of a folder states the training seed, the label set and the reward seed.
                part_by_case[arm_name, *tuning_case] = Part.keyed(
                    f"{self.in_paths(arm_name)}-s{seed}-d{label_set_index}-r{reward_seed}",
                    self.out / "runs",
                    # A pre-registered study runs all of its arms, also those with a weak reward.
                    [*flags, f"--seed={seed}", "--no-summary", "--weak-reward", *self.tune],
                )
        return part_by_case

    def _cases(self, arm_name: str) -> Iterator[tuple[int, int, int]]:
        """Yield (training seed, index of the label set, reward seed) of each tuning run of an arm."""
        # These two arms change the untuned network's shapes or latents, without tuning the network.
        if arm_name in (POST_PROCESSING, "truncation"):
            return
        label_set_count = self.draws if arm_name in ARMS_WITH_LABELS else 1
        reward_count = self.rewards if arm_name in (*ARMS_WITH_LABELS, "permuted") else 1
        yield from (
            (seed, label_set_index, reward_seed)
            for seed in self.seeds
            for label_set_index in range(label_set_count)
            for reward_seed in range(reward_count)
        )


def write_labels_of_arms(plan: Plan) -> None:
    """Write the randomised and the inverted copy of every label set."""
    for label_set_index in range(plan.draws):
        labels = load_labels(plan.draw(label_set_index))
        for arm_name, arm_labels in (
            (RANDOMISED, randomise(labels, label_set_index)),
            (INVERTED, [invert(label) for label in labels]),
        ):
            if arm_name in plan.arms:
                labels_path = plan.labels_of(arm_name, label_set_index)
                labels_path.parent.mkdir(parents=True, exist_ok=True)
                write_labels(labels_path, arm_labels)
                # A reward that is trained on these labels states that it is a control.
                declare_control(labels_path, f"{arm_name} labels")


def write_rewards(plan: Plan) -> None:
    """Write the rewards that need no training: smoothness, and copies of rewards with permuted weights."""
    if "smoothness" in plan.arms:
        Reward(Smoothness.from_generator(load_generator(plan.network).generator), IdentityReward()).save(
            plan.reward("smoothness")
        )
    # The rewards of the labels arm must exist; each of them has a permuted copy.
    for seed in range(plan.rewards if "permuted" in plan.arms else 0):
        permute_weights(load_reward(plan.reward(LABELS, 0, seed)), seed).save(
            plan.reward("permuted", 0, seed)
        )


# Measurements of each arm's shapes. Each network is measured in one task; the task of a tuned network has the
# name of its run.


GROUND_TRUTH = "ground-truth heads"  # task that computes the ground-truth heads
BEFORE = "before"  # task that measures the network before tuning
METHOD = "filter"  # key of the chosen method's number; the name that version 0.1 wrote


def _task_of_psi(psi: float) -> str:
    """Return the name of the task that measures the untuned network at a truncation."""
    return f"psi {psi:g}"


def _prepare_worker(
    folder: Path,
    inputs_by_task: Mapping[str, Mapping],
    network_before_path: Path | None,
    network_by_task: Mapping[str, Path],
    latent_count: int,
    held_out_range: HeldOut = LATENTS,
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
    """
    store = Store(folder, renew=True)
    torch.set_num_threads(1)  # there is one process per core; more threads would compete
    load_plugins()
    generator_before = load_generator(network_before_path).generator
    seeds = held_out_range.take(latent_count)  # of the measured latents
    ground_truth = heads.ground_truth_heads(generator_before, seeds)  # [N, n, n, n]
    shape_features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None

    def measure_shapes(shapes: np.ndarray) -> dict:
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
                spares_intact=True,
            )
            filtered_shapes = np.stack(
                [
                    FILTERS[filter_name](shape_values)
                    for shape_values in heads.sample_shapes(generator_before, seeds)
                ]
            )
            return {**measure_shapes(filtered_shapes), METHOD: np.array([list(FILTERS).index(filter_name)])}
        if task.startswith("psi "):
            return measure_shapes(
                heads.sample_shapes(generator_before, seeds, float(task.removeprefix("psi ")))
            )
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
    tasks += [POST_PROCESSING] if POST_PROCESSING in plan.arms else []
    tasks += [_task_of_psi(psi) for psi in PSIS] if "truncation" in plan.arms else []
    shared_inputs = {
        "generator": file_hash(plan.network or bundled.GENERATOR),
        "features": file_hash(DEFAULT_ASSET) if DEFAULT_ASSET.is_file() else "",
        "latents": plan.latents,
    }
    # The hash contains the tasks' names of version 0.1, so that its stored results are found.
    inputs_by_task = {
        task: {
            "seen": file_hash(network_by_task[task]) if task in network_by_task else version_0_1.former(task),
            **shared_inputs,
        }
        for task in tasks
    }
    store = Store(plan.out / "seen", renew=True)
    missing_tasks = [task for task in tasks if store.find("shapes", inputs_by_task[task]) is None]
    # The ground-truth heads come first: the task writes them to the disk, where the other tasks find them.
    needed_tasks = {
        task: [GROUND_TRUTH] if GROUND_TRUTH in missing_tasks and task != GROUND_TRUTH else []
        for task in missing_tasks
    }
    bar_text = "shapes of held-out latents"
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing_tasks), desc=bar_text, unit="arm") as bar:
        if missing_tasks:
            run_tasks(
                needed_tasks,
                _prepare_worker,
                (store.root, inputs_by_task, plan.network, dict(network_by_task), plan.latents),
                min(process_count, len(missing_tasks)),
                plan.out / "logs",
                lambda *_: bar.update() and None,  # a callback must return None, but `update` returns a bool
            )
    return {task: store.load_arrays("shapes", inputs_by_task[task]) for task in tasks}


# The table, from the measurements.


def network_metrics(
    measurements: Mapping, measurements_before: Mapping, reference_features: np.ndarray | None
) -> dict:
    """Compute the metrics of one network.

    Args:
        measurements: measurements of the network.
        measurements_before: measurements of the network before tuning.
        reference_features: features [N, Q] of the ground-truth heads. If they are None, no shape Fréchet
            distance is computed.
    Returns: dict of JSON values by the name of the metric.
    """
    metrics = heads.compute_metrics(measurements_before, measurements)
    # This interval covers latents alone; `combine_seeds` computes the interval over seeds and latents.
    del metrics["error_reduction_ci95"]
    return metrics | (
        {}
        if reference_features is None
        else {"shape_frechet": heads.shape_frechet(measurements["features"], reference_features)}
    )


def combine_seeds(
    metrics_by_seed: Mapping[int, Sequence[dict]], errors: np.ndarray, measurements_before: Mapping
) -> dict:
    """Combine the metrics of an arm over its training seeds.

    Each metric becomes a list with one value per training seed, which is the mean over the arm's rewards.

    Args:
        metrics_by_seed: for each training seed a list with the metrics of each reward.
        errors: back-of-head volume errors after tuning, averaged over the rewards of each training seed, [S,
            N].
        measurements_before: measurements of the network before tuning.
    """
    # All rewards have the same metrics, so the names are those of the first one.
    metric_names = list(next(iter(metrics_by_seed.values()))[0])
    values_by_metric = {}  # metric -> values by training seed
    for metric_name in metric_names:
        values_by_metric[metric_name] = [
            _mean([metrics_by_name[metric_name] for metrics_by_name in reward_metrics])
            for reward_metrics in metrics_by_seed.values()
        ]
    return {
        **values_by_metric,
        "error_reduction_ci95": heads.error_reduction_interval(measurements_before, errors),
        "runs": {str(seed): list(reward_metrics) for seed, reward_metrics in metrics_by_seed.items()},
    }


def _mean(metric_values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if all values are None."""
    defined_values = [value for value in metric_values if value is not None]
    return float(np.mean(defined_values)) if defined_values else None


def choose_psi(measurements_by_psi: Mapping[float, Mapping], min_share: float) -> float:
    """Return the largest psi at which at least `min_share` of the heads are intact.

    If no psi reaches this share, return the psi with the largest share of intact heads. The truncation arm
    thus has as many intact heads as the labels arm, with as little truncation as possible.

    Args:
        measurements_by_psi: measurements of the untuned network at each psi.
        min_share: share of intact heads in the labels arm.
    """
    intact_share_by_psi = {}  # psi -> share of intact heads
    for psi, measurements in measurements_by_psi.items():
        intact_share_by_psi[psi] = float((heads.back_of_head_error(measurements) <= heads.DEFECTIVE).mean())
    sufficient_psis = [psi for psi, intact_share in intact_share_by_psi.items() if intact_share >= min_share]
    return (
        max(sufficient_psis)
        if sufficient_psis
        else max(intact_share_by_psi, key=lambda psi: (intact_share_by_psi[psi], psi))
    )


def criterion(metrics_by_arm: Mapping[str, Mapping], primary_endpoints: Sequence[str]) -> dict:
    """Evaluate the pre-registered criterion.

    The criterion is met if, with every training seed, the labels arm is lower than every other arm in each
    primary endpoint, and degrades no larger share of the intact heads. A share up to ALLOWED_HARM counts as
    zero.

    Args:
        metrics_by_arm: metrics of each arm, as `combine_seeds` returns them.
        primary_endpoints: names of the metrics that are compared.
    Returns: dict with "labels_win" (True if the criterion is met) and "against", which holds for each other
        arm the results by training seed ("lower", "no_more_harm"), and "beaten" (True if all of them are
        True).
    """
    result_by_arm = {}  # result against each other arm
    label_metrics = metrics_by_arm[LABELS]
    for arm_name, arm_metrics in metrics_by_arm.items():
        if arm_name == LABELS:
            continue
        is_lower = {
            endpoint: [
                label_value < arm_value
                for label_value, arm_value in zip(label_metrics[endpoint], arm_metrics[endpoint], strict=True)
            ]
            for endpoint in primary_endpoints
        }
        degraded_shares = zip(label_metrics["intact_degraded"], arm_metrics["intact_degraded"], strict=True)
        # The share is None if no head was intact before, so that none can be degraded.
        is_harmless = [
            label_share is None or label_share <= max(ALLOWED_HARM, arm_share or 0.0)
            for label_share, arm_share in degraded_shares
        ]
        result_by_arm[arm_name] = {
            "lower": is_lower,
            "no_more_harm": is_harmless,
            "beaten": all(map(all, is_lower.values())) and all(is_harmless),
        }
    return {
        # Without another arm the labels arm has won against nothing, so the criterion is not met.
        "labels_win": bool(result_by_arm)
        and all(comparison_result["beaten"] for comparison_result in result_by_arm.values()),
        "against": result_by_arm,
    }


def compare(
    plan: Plan,
    measurements_by_task: Mapping[str, Mapping],
    task_by_case: Mapping[tuple[str, int, int, int], str],
) -> dict:
    """Compute the content of controlled-study.json.

    Args:
        measurements_by_task: measurements by task.
        task_by_case: the task of each run, by (arm, training seed, index of the label set, reward seed).
    """
    measurements_before = measurements_by_task[BEFORE]
    # The file of the feature network may be missing; then there is no shape Fréchet distance.
    reference_features = (
        measurements_by_task[GROUND_TRUTH]["features"]
        if len(measurements_by_task[GROUND_TRUTH]["features"])
        else None
    )
    primary_endpoints = [
        endpoint
        for endpoint in PRIMARY_ENDPOINTS
        if endpoint != "shape_frechet" or reference_features is not None
    ]
    psi_by_seed = {}
    metrics_by_arm: dict[str, dict] = {}
    errors_by_arm: dict[str, np.ndarray] = {}
    for arm_name in plan.arms:
        # training seed -> tasks of all label sets and reward seeds; case[:2] is (arm, training seed)
        tasks_by_seed = {
            seed: [task_by_case[case] for case in task_by_case if case[:2] == (arm_name, seed)]
            for seed in plan.seeds
        }
        if arm_name == POST_PROCESSING:
            # Post-processing has no training, so every seed has the same result.
            tasks_by_seed = {seed: [POST_PROCESSING] for seed in plan.seeds}
        if arm_name == "truncation":
            # The truncation is chosen for each seed, so that there are as many intact heads as in the labels
            # arm with this seed. LABELS is the first arm, so metrics_by_arm[LABELS] exists. The slice
            # [i : i + 1] lets `_mean` turn a missing share into None.
            measurements_by_psi = {psi: measurements_by_task[_task_of_psi(psi)] for psi in PSIS}
            psi_by_seed = {
                seed: choose_psi(
                    measurements_by_psi,
                    _mean(metrics_by_arm[LABELS]["intact_share"][seed_index : seed_index + 1]) or 0.0,
                )
                for seed_index, seed in enumerate(plan.seeds)
            }
            tasks_by_seed = {seed: [_task_of_psi(psi)] for seed, psi in psi_by_seed.items()}
        metrics_by_seed = {
            seed: [
                network_metrics(measurements_by_task[task], measurements_before, reference_features)
                for task in tasks
            ]
            for seed, tasks in tasks_by_seed.items()
        }
        # [S, N], averaged over rewards
        errors_by_arm[arm_name] = np.stack(
            [
                np.mean([heads.back_of_head_error(measurements_by_task[task]) for task in tasks], axis=0)
                for tasks in tasks_by_seed.values()
            ]
        )
        metrics_by_arm[arm_name] = combine_seeds(
            metrics_by_seed, errors_by_arm[arm_name], measurements_before
        )
    untuned_metrics = network_metrics(measurements_before, measurements_before, reference_features)
    for arm_name in metrics_by_arm:
        # the arm's error reduction relative to the error reduction of the labels arm
        error_pairs = zip(
            metrics_by_arm[arm_name]["error_defective"],
            metrics_by_arm[LABELS]["error_defective"],
            strict=True,
        )
        metrics_by_arm[arm_name]["share_of_gain"] = [
            _share_of_gain(untuned_metrics["error_defective"], arm_error, label_error)
            for arm_error, label_error in error_pairs
        ]
        if arm_name != LABELS:
            metrics_by_arm[arm_name]["error_over_labels"] = _error_over_labels(
                errors_by_arm[arm_name] - errors_by_arm[LABELS], heads.find_defective(measurements_before)
            )
    return {
        "primary_endpoints": primary_endpoints,
        "pre_registered": "2026-11-24",
        "seeds": list(plan.seeds),
        "rewards": plan.rewards,  # for each label set
        "label_sets": plan.draws,
        "latents": plan.latents,
        "defective": int(heads.find_defective(measurements_before).sum()),  # latents, before tuning
        "before": untuned_metrics,
        "arms": metrics_by_arm,
        "post_processing": list(FILTERS)[int(measurements_by_task[POST_PROCESSING][METHOD][0])]
        if POST_PROCESSING in measurements_by_task
        else None,
        "psi": {
            str(seed): psi for seed, psi in psi_by_seed.items()
        },  # of the truncation arm; JSON keys are text
        "criterion": criterion(metrics_by_arm, primary_endpoints),
        "harm_allowed": ALLOWED_HARM,  # part of the criterion
        "flags": {"tune": [*TUNING_FLAGS, *plan.tune], "train": list(plan.train)},
    }


def _share_of_gain(
    error_before: float | None, error_after: float | None, labels_arm_error: float | None
) -> float | None:
    """Return the error reduction of an arm relative to the error reduction of the labels arm.

    Return None if an error is None, or if the labels arm does not change the error.

    Args:
        error_before: mean error of defective heads before tuning.
        error_after: the same in the arm.
        labels_arm_error: the same in the labels arm.
    """
    if (
        error_before is None
        or error_after is None
        or labels_arm_error is None
        or error_before == labels_arm_error
    ):
        return None
    return (error_before - error_after) / (error_before - labels_arm_error)


def _error_over_labels(error_differences: np.ndarray, is_defective: np.ndarray) -> dict | None:
    """Compute the mean of error differences over seeds and defective heads, with two intervals.

    Args:
        error_differences: errors of an arm minus errors of the labels arm, [S, N].
        is_defective: mask of the latents with defective heads before tuning, [N].

    Returns: dict with the mean and two 95 % intervals. "ci95" covers the variation between seeds and between
        heads, "ci95_over_seeds" covers the variation between seeds alone, and is None for a single seed. The
        result is None if no head is defective.
    """
    defective_differences = error_differences[:, is_defective]  # [S, defective]
    if not defective_differences.size:
        return None
    interval = two_way_interval(
        lambda seed_indices, head_indices: defective_differences[np.ix_(seed_indices, head_indices)].mean(),
        *defective_differences.shape,
    )
    seed_interval = (
        t_mean_interval(defective_differences.mean(axis=1)) if len(defective_differences) > 1 else None
    )
    return {
        "mean": float(defective_differences.mean()),
        "ci95": [interval.lo, interval.hi],
        "ci95_over_seeds": seed_interval and [seed_interval.lo, seed_interval.hi],
    }


TABLE_METRICS = {  # metric -> (heading of the table, format)
    "error_defective": ("back-of-head volume error", ".3f"),
    "shape_frechet": ("shape Fréchet", ".2f"),
    "error_reduction": ("error reduction", ".0%"),
    "intact_degraded": ("intact degraded", ".0%"),
    "intact_share": ("intact after", ".0%"),
    "fscore_defective": ("F-score", ".3f"),
    "missing_defective": ("missing", ".3f"),
    "extra_defective": ("extra", ".3f"),
    "variety": ("variety", ".3f"),
    "identity_kept": ("identity", ".0%"),
    "face_moved_voxels": ("face moved", ".2f"),
    "changed": ("changed", ".3f"),
}


def markdown(study_data: Mapping) -> str:
    """Format controlled-study.md: the result of the criterion, the table, and the meaning of its metrics.

    Args: study_data: content of controlled-study.json.
    """
    format_by_metric = {
        metric_name: (
            heading + (" (primary)" if metric_name in study_data["primary_endpoints"] else ""),
            number_format,
        )
        for metric_name, (heading, number_format) in TABLE_METRICS.items()
        if metric_name in study_data["before"]
    }
    metrics_by_label = {"before tuning": study_data["before"]}
    for arm_name, metrics in study_data["arms"].items():
        psi = ", ".join(f"{psi:g}" for psi in sorted(set(study_data["psi"].values())))
        arm_notes = {"truncation": f" (ψ {psi})", POST_PROCESSING: f" ({study_data['post_processing']})"}
        metrics_by_label[ARMS[arm_name] + arm_notes.get(arm_name, "")] = metrics
    table_lines = figure_table("arm", metrics_by_label, format_by_metric)
    criterion_result = study_data["criterion"]
    unbeaten_arms = [
        ARMS[arm_name]
        for arm_name, comparison_result in criterion_result["against"].items()
        if not comparison_result["beaten"]
    ]
    sentences = (
        "The pre-registered criterion is met: labels beat every other arm in each primary endpoint with every"
        " training seed, and degrade no more intact heads."
        if criterion_result["labels_win"]
        else (
            "The pre-registered criterion is not met. Labels do not beat these arms in each primary endpoint"
            " with every training seed, or they degrade more intact heads:"
            f" {', '.join(unbeaten_arms) or 'there was no other arm'}."
        )
    )
    explanation = (
        f"{study_data['latents']} held-out latents, ψ 1, {study_data['defective']} of them defective before"
        f" tuning; training seeds {', '.join(map(str, study_data['seeds']))}, {study_data['rewards']}"
        f" reward(s) for each of {study_data['label_sets']} set(s) of labels. Figures are means over"
        " training seeds; brackets hold the smallest and the largest. Volume error, missing and extra are"
        " shares of the ground-truth head's back-of-head volume, of defective heads. The F-score is"
        " measured at the back at one voxel, of defective heads. An intact head is degraded if its volume"
        f" error grows by more than {heads.WORSE}. Lengths are in voxels of 64³. Changed: share of the"
        " back-of-head volume that became solid or empty."
    )
    return "\n".join(
        ["# Controlled study of the bundled heads", "", sentences, "", *table_lines, "", explanation, ""]
    )


def plot(study_data: Mapping):
    """Plot each primary endpoint of every arm, one point for each training seed.

    Args: study_data: content of controlled-study.json.
    """
    arm_names = list(study_data["arms"])
    figure, axes = style.figure(
        column_count=len(study_data["primary_endpoints"]),
        size=(9.4, 1.4 + 0.3 * len(arm_names)),  # inches
    )
    # With a single endpoint `axes` is not an array; atleast_1d makes one.
    for axis, endpoint in zip(np.atleast_1d(axes), study_data["primary_endpoints"], strict=True):
        for arm_position, arm_name in enumerate(arm_names):
            seed_values = study_data["arms"][arm_name][endpoint]
            axis.plot(
                seed_values,
                [arm_position] * len(seed_values),
                "o",
                markersize=4,
                color=style.colour("after" if arm_name == LABELS else "control"),
            )
        axis.axvline(study_data["before"][endpoint], color=style.colour("before"), linewidth=1)
        axis.set_yticks(range(len(arm_names)), [ARMS[arm_name] for arm_name in arm_names], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"{TABLE_METRICS[endpoint][0]}, lower is better; line: before", fontsize=8)
    return figure


def commands(plan: Plan) -> dict[str, list[str]]:
    """Return the command line of every step that labels, trains or tunes, by the step's name."""
    command_parts = [*plan.label_parts(), *plan.reward_parts(), *plan.tunings().values()]
    return {part.name: part.command() for part in command_parts}


def work(plan: Plan, process_count: int) -> list[Path]:
    """Run the missing steps, measure all arms, and write controlled-study.json, .md and .png.

    Args: process_count: number of steps that run at the same time.
    Returns: the paths of the three files.
    """
    # The cores are divided among the processes that run at the same time.
    thread_count = max(1, (os.cpu_count() or 1) // process_count)
    for write_more, parts, bar_text in (
        (write_labels_of_arms, plan.label_parts(), "sets of labels"),
        (write_rewards, plan.reward_parts(), "rewards trained"),
    ):
        make_with_progress_bar([[part] for part in parts], process_count, thread_count, bar_text)
        write_more(plan)
    # The runs of train.py need the rewards, so they are the last step.
    tuning_by_case = plan.tunings()
    make_with_progress_bar(
        [[part] for part in tuning_by_case.values()], process_count, thread_count, "networks tuned"
    )
    network_by_task = {
        part.name: network_path
        for part in tuning_by_case.values()
        if (network_path := part.network()) is not None
    }
    study_data = compare(
        plan,
        measure_arms(plan, network_by_task, process_count),
        {case: part.name for case, part in tuning_by_case.items()},
    )
    return write(study_data, plan.out, "controlled-study", markdown, plot)
