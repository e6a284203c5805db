"""Metrics of the arms of the controlled study, and its pre-registered criterion."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from eg3d_rlhf.core.statistics import t_mean_interval, two_way_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.controlled_study import measurements as measuring
from eg3d_rlhf.evaluation.controlled_study.plan import TUNING_FLAGS, Plan
from eg3d_rlhf.evaluation.filters import FILTERS
from eg3d_rlhf.evaluation.settings import (
    ARMS_WITHOUT_RUNS,
    LABELS,
    POST_PROCESSING,
    PRE_REGISTERED_ARMS,
    TRUNCATION,
    WEIGHED_ARMS,
)

PRIMARY_ENDPOINTS = ("error_defective", "shape_frechet")  # pre-registered metrics; lower is better
ALLOWED_HARM = 0.02  # share of intact heads that an arm may degrade and still count as harmless


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
    # Paired by latent: the same latents before and after.
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
            # First over label sets and rewards, then as a list over training
            # seeds, so seeds with many rewards have no larger weight.
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
        # Truncation moves latents towards the mean w, where heads
        # are intact but similar, so it trades variety for quality.
        intact_share_by_psi[psi] = float((heads.back_of_head_error(measurements) <= heads.DEFECTIVE).mean())
    sufficient_psis = [psi for psi, intact_share in intact_share_by_psi.items() if intact_share >= min_share]
    return (
        max(sufficient_psis)
        if sufficient_psis
        # Of several psis with the same share, the largest one keeps the most variety.
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
                # Paired by training seed, and strict: an equal value is no win.
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
            # All endpoints and all seeds must agree, which is stricter than a test of the mean.
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
) -> tuple[dict, dict[str, np.ndarray]]:
    """Compute the content of controlled-study.json, and the arrays by latent.

    Args:
        measurements_by_task: measurements by task.
        task_by_case: the task of each run, by (arm, training seed, index of the label set, reward seed).
    Returns: the JSON values, and back-of-head volume errors: "before/error" [N], and "ARM/error" [S, N] for
        each arm, averaged over the rewards and label sets of a training seed. "before/is_defective" [N]
        marks the latents whose heads were defective. The intervals of the study follow from these arrays.
    """
    measurements_before = measurements_by_task[measuring.BEFORE]
    # The file of the feature network may be missing; then there is no shape Fréchet distance.
    # A task without the feature network stores an array [0, 0], whose length is 0.
    reference_features = (
        measurements_by_task[measuring.GROUND_TRUTH]["features"]
        if len(measurements_by_task[measuring.GROUND_TRUTH]["features"])
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
        # Each case is (arm, training seed, label set, reward seed).
        tasks_by_seed = {
            seed: [task_by_case[case] for case in task_by_case if case[:2] == (arm_name, seed)]
            for seed in plan.seeds
        }
        if arm_name in ARMS_WITHOUT_RUNS:
            # Without a training, every seed has the same result.
            tasks_by_seed = {seed: measuring.tasks_of_arm(plan, arm_name) for seed in plan.seeds}
        if arm_name == TRUNCATION:
            # The truncation is chosen for each seed, so that there are as many intact heads as in the labels
            # arm with this seed. LABELS is the first arm, so metrics_by_arm[LABELS] exists. The slice
            # [i : i + 1] lets `_mean` turn a missing share into None.
            measurements_by_psi = {
                psi: measurements_by_task[measuring.task_of_psi(psi)] for psi in measuring.PSIS
            }
            psi_by_seed = {
                seed: choose_psi(
                    measurements_by_psi,
                    _mean(metrics_by_arm[LABELS]["intact_share"][seed_index : seed_index + 1]) or 0.0,
                )
                for seed_index, seed in enumerate(plan.seeds)
            }
            tasks_by_seed = {seed: [measuring.task_of_psi(psi)] for seed, psi in psi_by_seed.items()}
        # Arms without a training repeat their metrics for
        # each seed, so that all arms can be compared by seed.
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
    # The network against itself: its reductions are 0, and its errors are those before tuning.
    untuned_metrics = network_metrics(measurements_before, measurements_before, reference_features)
    for arm_name in metrics_by_arm:
        # the arm's error reduction relative to the error reduction of the labels arm
        error_pairs = zip(
            metrics_by_arm[arm_name]["error_defective"],
            metrics_by_arm[LABELS]["error_defective"],
            strict=True,
        )
        # 1 for the labels arm by definition, and 0 for an arm without any effect.
        metrics_by_arm[arm_name]["share_of_gain"] = [
            _share_of_gain(untuned_metrics["error_defective"], arm_error, label_error)
            for arm_error, label_error in error_pairs
        ]
        if arm_name != LABELS:
            metrics_by_arm[arm_name]["error_over_labels"] = _error_over_labels(
                errors_by_arm[arm_name] - errors_by_arm[LABELS], heads.find_defective(measurements_before)
            )
    arrays = {
        "before/error": heads.back_of_head_error(measurements_before),
        "before/is_defective": heads.find_defective(measurements_before),
        **{f"{arm_name}/error": errors for arm_name, errors in errors_by_arm.items()},
    }
    content = {
        "primary_endpoints": primary_endpoints,
        "pre_registered": "2026-11-24",
        "seeds": list(plan.seeds),
        "rewards": plan.rewards,  # for each label set
        "label_sets": plan.draws,
        "latents": plan.latents,
        "defective": int(heads.find_defective(measurements_before).sum()),  # latents, before tuning
        "before": untuned_metrics,
        "arms": metrics_by_arm,
        "post_processing": list(FILTERS)[int(measurements_by_task[POST_PROCESSING][measuring.METHOD][0])]
        if POST_PROCESSING in measurements_by_task
        else None,
        "psi": {
            str(seed): psi for seed, psi in psi_by_seed.items()
        },  # of the truncation arm; JSON keys are text
        # A weighed filter is applied above this share of changed volume; None: never (JSON has no infinity).
        "shares": {
            arm_name: share if math.isfinite(share) else None
            for arm_name in WEIGHED_ARMS
            if arm_name in measurements_by_task
            for share in [float(measurements_by_task[arm_name][measuring.SHARE][0])]
        },
        "seed": plan.seed,  # shift of the held-out latents
        "criterion": criterion(
            {
                arm_name: metrics
                for arm_name, metrics in metrics_by_arm.items()
                if arm_name in PRE_REGISTERED_ARMS
            },
            primary_endpoints,
        ),
        "harm_allowed": ALLOWED_HARM,  # part of the criterion
        "flags": {"tune": [*TUNING_FLAGS, *plan.tune], "train": list(plan.train)},
    }
    return content, arrays


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
    # The denominator is negative if the labels arm increases
    # the error. The sign of the share is then inverted.
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
    # Seeds and heads are resampled independently (a crossed
    # design), because all seeds are measured on the same heads.
    interval = two_way_interval(
        lambda seed_indices, head_indices: defective_differences[np.ix_(seed_indices, head_indices)].mean(),
        *defective_differences.shape,
    )
    seed_interval = (
        # The t interval covers few seeds better than a bootstrap,
        # which underestimates the variance of two or three values.
        t_mean_interval(defective_differences.mean(axis=1)) if len(defective_differences) > 1 else None
    )
    return {
        "mean": float(defective_differences.mean()),
        "ci95": [interval.lo, interval.hi],
        "ci95_over_seeds": seed_interval and [seed_interval.lo, seed_interval.hi],
    }
