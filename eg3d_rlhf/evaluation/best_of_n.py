"""Measure before any tuning how far a reward can be trusted, by selecting the best of n samples.

The reward selects the best of n latents, and an evaluator scores the selected one. With larger n, the reward
selects more by its own errors: the evaluator's mean rises, flattens, and falls (Gao et al. 2022, "Scaling
laws for reward model overoptimization", arXiv 2210.10760). The distribution of the best of n has the KL
divergence KL = log n - (n - 1) / n nats from the distribution of single samples. With d = sqrt(KL), the
evaluator's gain follows d (alpha - beta d), where alpha and beta are fitted. It peaks at
d* = alpha / (2 beta).

An arm is a scoring rule that is tested: a single reward, a member of an ensemble, or an aggregate of its
members. The evaluator is another reward, or the simulated annotator's utility without noise.
Shapes: N latents, T values of n, B resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import choose_device, file_hash, prefix_errors
from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.seeds import BEST_OF_N
from eg3d_rlhf.evaluation.comparison import annotator_can_score
from eg3d_rlhf.evaluation.paired import span, span_apart
from eg3d_rlhf.experiments import pages, style, version_0_1
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range, write_page
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.rewards.aggregates import AVERAGE, KINDS, Aggregate
from eg3d_rlhf.rewards.cache import observe_untuned
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, Standard, average_weights
from eg3d_rlhf.rewards.observations import OBSERVATIONS, Observation
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward, untrained_reward
from eg3d_rlhf.rewards.stated_accuracy import announce_reward
from eg3d_rlhf.tuning.gan.heldout_metrics import utilities
from eg3d_rlhf.tuning.gan.phase import CUTOFF
from training.progress import tqdm

# The expected score by the evaluator of the best of n by a reward: its exact value, its interval, and the
# curve d (alpha - beta d) fitted to it.


def best_of_n_chances(latent_count: int, n: int) -> np.ndarray:
    """Return the probability [N] that the latent of each rank is the best of n.

    The n latents are selected at random without replacement. The probability of the i-th of N latents in
    ascending order is C(i - 1, n - 1) / C(N, n).

    Args:
        latent_count: number of latents, N.
        n: number of latents from which the best is selected.
    """
    # The binomials themselves would overflow. The probabilities of ranks i - 1 and i have the ratio
    # (i - n) / (i - 1); the product of these ratios from the top down is relative to the highest rank.
    ranks = np.arange(latent_count, 1, -1)
    relative_chances = np.cumprod(np.clip((ranks - n) / (ranks - 1), 0, None))  # [N - 1]
    # The latent of the highest rank is the best with probability n / N. [::-1] sorts by ascending rank.
    return n / latent_count * np.concatenate([[1.0], relative_chances])[::-1]


def expected_best(
    reward_scores: np.ndarray, evaluator_scores: np.ndarray, n_values: Sequence[int]
) -> np.ndarray:
    """Compute the evaluator's expected score for the latent that the reward ranks best among n, for several
    n.

    The expectation is exact: it is over all subsets of n of the N latents.

    Args:
        reward_scores: scores by the reward, [N].
        evaluator_scores: scores by the evaluator, [N].
        n_values: values of n, each 1 to N.

    Returns: expected scores by the evaluator, [T]. For n = 1 the expectation is the evaluator's mean score.
        For n = N it is the evaluator's score of the latent that the reward ranks first.
    """
    ranked_evaluator_scores = sort_by_reward(reward_scores, evaluator_scores)[1]
    return np.array(
        [best_of_n_chances(len(ranked_evaluator_scores), n) @ ranked_evaluator_scores for n in n_values]
    )


def sort_by_reward(reward_scores: np.ndarray, evaluator_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the latents by their scores by the reward.

    Args:
        reward_scores: scores by the reward, [N].
        evaluator_scores: scores by the evaluator, [N].

    Returns: two arrays. The first holds the indices of the latents in ascending order of reward, [N]. The
        second holds the evaluator's scores in this order, [N]; scores of latents with equal reward are
        averaged.
    """
    # Latents of equal reward form a group, and get the mean of the group, as if ties were resolved at random.
    # `group_indices` holds the index of each latent's group, [N].
    _, group_indices, group_sizes = np.unique(reward_scores, return_inverse=True, return_counts=True)
    # The groups are in ascending order of reward; each mean is repeated for every latent of its group.
    group_means = np.bincount(group_indices, evaluator_scores) / group_sizes
    return np.argsort(reward_scores, kind="stable"), np.repeat(group_means, group_sizes)


def kl_divergence(n_values: Sequence[int]) -> np.ndarray:
    """Compute the KL divergence, in nats, of the distribution of the best of n from that of single samples.

    Args: n_values: T values of n, each >= 1.
    Returns: KL divergences, [T].
    """
    n = np.asarray(n_values, dtype=np.float64)  # [T]
    return np.log(n) - (n - 1) / n


def fit(distances: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Fit gain = d (alpha - beta d) by least squares.

    Args:
        distances: values of d, the square root of the KL divergence, [T].
        gains: gains by the evaluator, [..., T].

    Returns: array [..., 2], whose last axis holds alpha and beta.
    """
    return gains @ np.linalg.pinv(np.stack([distances, -(distances**2)], axis=1)).T


def peak(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return the position d* = alpha / (2 beta) of the peak of a fitted curve d (alpha - beta d).

    The position is 0 if the curve only falls, and infinite if it never falls (beta <= 0).
    Args: alpha, beta: results of `fit`, of equal shapes.
    """
    # The inner `where` avoids a division by zero in the branch that is not used.
    return np.where(beta > 0, np.maximum(alpha, 0) / np.where(beta > 0, 2 * beta, 1), np.inf)


def number_at(distance: float) -> float:
    """Return the n for which the best of n has the distance d = sqrt(KL) from a single sample.

    Args: distance: d, >= 0.
    Returns: n, which need not be an integer.
    """
    # KL = d^2 is solved for log n by a root search. KL increases with n from 0 at n = 1, and exceeds d^2
    # where log n is d^2 + 2.
    log_n = (
        brentq(lambda log_n: log_n - 1 + np.exp(-log_n) - distance**2, 0, distance**2 + 2)
        if distance > 0
        else 0.0
    )
    return float(np.exp(log_n))


def resample_best(
    reward_scores: np.ndarray,
    evaluator_scores: np.ndarray,
    n_values: Sequence[int],
    latent_counts_by_resample: np.ndarray,
) -> np.ndarray:
    """Compute the evaluator's expected score for the best of n, as `expected_best` does, for resamples of the
    latents.

    Args:
        reward_scores: scores by the reward, [N].
        evaluator_scores: scores by the evaluator, [N].
        n_values: T values of n.
        latent_counts_by_resample: how often each resample contains each latent, [B, N].

    Returns: expected scores by the evaluator, [B, T].
    """
    latent_order, ranked_evaluator_scores = sort_by_reward(reward_scores, evaluator_scores)
    # Row t holds the weights of the sorted evaluator's scores for the t-th value of n.
    chances_by_n = np.stack([best_of_n_chances(len(ranked_evaluator_scores), n) for n in n_values])  # [T, N]
    # A resample keeps the order of the latents, so it needs no sorting.
    return np.stack(
        [
            chances_by_n @ np.repeat(ranked_evaluator_scores, latent_counts[latent_order])
            for latent_counts in latent_counts_by_resample
        ]
    )


SCORES = "scores"  # key of the job that scores the latents
CURVES = "best-of-n"  # key of the job that computes the curves
TITLE = "How far can a reward be trusted?"
RESAMPLES = 1000
INTERVAL = f"95 % percentile bootstrap over latents, {RESAMPLES:,} resamples, the same for all arms"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Rewards to test, with the generator and the evaluator."""

    generator: LoadedGenerator
    rewards: Mapping[str, tuple[Reward, str]]  # name -> the reward and its file's SHA-256
    evaluator: tuple[Reward, str] | None  # None: the simulated annotator's noise-free utility
    n: int = 4096  # number of latents
    most: int = 512  # largest n of the best of n
    psi: float = 1.0  # truncation
    seed: int = 0  # shifts the held-out latents
    batch: int = 16  # shapes at once

    def __post_init__(self) -> None:
        # The best of n can only be selected from at least n latents.
        if self.most > self.n:
            raise ValueError(
                f"--most={self.most} exceeds the number of latents, --n={self.n}. Lower --most or raise --n."
            )

    @property
    def numbers(self) -> list[int]:
        """Return the values of n: `most`, and from 1 to `most` the rounded powers of sqrt(2)."""
        return sorted(
            {
                *(
                    round(2 ** (half_octave / 2))
                    for half_octave in range(64)
                    if 2 ** (half_octave / 2) <= self.most
                ),
                self.most,
            }
        )

    @property
    def seeds(self) -> range:
        """Return the seeds of the latents.

        No other report uses their range, so a reward may be selected by the results of this one.
        """
        return BEST_OF_N.take(self.n, self.seed)

    def networks(self) -> dict[str, str]:
        """Return the SHA-256 of the generator, the rewards and the evaluator, by "generator", the reward's
        name and "evaluator".
        """
        # the simulated annotator has no file
        evaluator_hash = {} if self.evaluator is None else {"evaluator": self.evaluator[1]}
        return {
            "generator": self.generator.hash,
            **{reward_name: digest for reward_name, (_, digest) in self.rewards.items()},
            **evaluator_hash,
        }

    def facts(self) -> Facts:
        """Return the facts that the page states: latents, truncation, hashes and interval."""
        return Facts(
            n=self.n, seeds=seed_range(self.seeds), psi=self.psi, networks=self.networks(), interval=INTERVAL
        )


# members' scores by name -> scores of an arm [N]
JoinFunction = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def arms(trial: Trial) -> tuple[dict[str, Reward], dict[str, JoinFunction]]:
    """Return the arms that a network scores, and the arms that are computed from other scores.

    Returns: two dicts. The first maps the name of an arm to its reward: a single reward, a member of an
        ensemble, or the average of the members' weights. The second maps the name of each aggregate of an
        ensemble to a function that computes the scores of this arm from the members' scores.
    """
    rewards_by_arm: dict[str, Reward] = {}  # arms that a network scores
    join_by_arm: dict[str, JoinFunction] = {}  # arms that aggregate members' scores
    for reward_name, (reward, _) in trial.rewards.items():
        # If there are several rewards, the names of members begin with the name of their ensemble.
        name_prefix = f"{reward_name}: " if len(trial.rewards) > 1 else ""
        reward_network = reward.network  # one network, or an ensemble of them
        if not isinstance(reward_network, RewardEnsemble):
            rewards_by_arm[reward_name] = reward
            continue
        # names of the arms, under which `JoinFunction` finds the members' scores
        member_names = [f"{name_prefix}member {i + 1}" for i in range(len(reward_network.members))]
        rewards_by_arm.update(zip(member_names, reward.members(), strict=True))
        # Weights can be averaged only if the members began from the same weights, which "start" records.
        if reward.provenance.get("start"):
            rewards_by_arm[f"{name_prefix}{AVERAGE}"] = Reward(
                reward.observation, average_weights(reward_network.members), reward.provenance
            )
        member_statistics = reward_network.standard
        # An ensemble of raw scores has no statistics of its members; compute them on untuned samples.
        if member_statistics is None:
            observed_samples = observe_untuned(
                trial.generator.generator, reward.observation, trial.psi, CUTOFF, trial.batch
            )
            member_statistics = Standard.from_observations(reward_network.members, observed_samples)
        for aggregate_kind in KINDS:
            # The ensemble's own aggregate keeps its strength; the other kinds use their default strength.
            aggregate = (
                reward_network.aggregate
                if aggregate_kind == reward_network.aggregate.kind
                else Aggregate(aggregate_kind)
            )
            ensemble = RewardEnsemble(reward_network.members, aggregate, member_statistics)
            strength_text = "" if aggregate.strength is None else f" {aggregate.strength:g}"
            join_by_arm[f"{name_prefix}{aggregate_kind}{strength_text}"] = partial(
                _join, ensemble, member_names
            )
    return rewards_by_arm, join_by_arm


def _join(
    ensemble: RewardEnsemble, member_names: Sequence[str], scores_by_member: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Aggregate the scores of an ensemble's members into the scores [N] of an arm.

    Args:
        ensemble: ensemble with the aggregate to apply.
        member_names: names of the ensemble's members, in their order.
        scores_by_member: scores [N] of single arms by name, of which the members' scores are read.
    """
    return ensemble.joined(
        [torch.from_numpy(scores_by_member[member_name]) for member_name in member_names]
    ).numpy()


@torch.no_grad()
def score(trial: Trial, _folder: Path, quiet: bool = False) -> Finding:
    """Compute the scores of every latent by the arms that are networks, and by the evaluator, in one pass.

    An arm is a scoring rule that is tested. The arms that are computed from other scores follow in `curves`.

    Args: quiet: True hides the progress bar.
    """
    generator = trial.generator.generator
    rewards_by_arm, _ = arms(trial)  # aggregates follow from the members' scores
    scores_by_arm: dict[str, list[float]] = {arm_name: [] for arm_name in rewards_by_arm}
    evaluator_scores: list[float] = []  # the evaluator's values, [N]
    ws = ws_of_seeds(generator, trial.seeds, truncation_psi=trial.psi, truncation_cutoff=CUTOFF)
    with tqdm(
        total=trial.n, desc="latents", unit="latent", disable=quiet, leave=False, dynamic_ncols=True
    ) as bar:
        for start, ws_batch in zip(range(0, trial.n, trial.batch), ws.split(trial.batch), strict=True):
            field = generator.field(ws_batch)
            # Rewards that read the same input share it.
            observed_by_kind = dict[Observation, torch.Tensor]()
            # If the evaluator is a reward, it is scored in the same loop, under the name "".
            for arm_name, reward in (
                *rewards_by_arm.items(),
                *([("", trial.evaluator[0])] if trial.evaluator else []),
            ):
                observation = reward.observation  # rewards of the same kind read the same input
                if observation not in observed_by_kind:
                    observed_by_kind[observation] = observation.observe(field)
                arm_scores = scores_by_arm[arm_name] if arm_name else evaluator_scores
                arm_scores.extend(reward.score_observed(observed_by_kind[observation]).tolist())
            if trial.evaluator is None:
                evaluator_scores += utilities(
                    generator, trial.seeds[start : start + len(ws_batch)], trial.psi
                ).tolist()
            bar.update(len(ws_batch))
    scores_by_column = {**scores_by_arm, "evaluator": evaluator_scores}  # one column per arm
    table_rows = [
        {"seed": seed, **{arm_name: column_scores[i] for arm_name, column_scores in scores_by_column.items()}}
        for i, seed in enumerate(trial.seeds)
    ]
    return Finding(
        facts=trial.facts(), data={"scores": scores_by_arm, "evaluator": evaluator_scores}, rows=table_rows
    )


def curves(trial: Trial, scores_finding: Finding, _folder: Path) -> Finding:
    """Compute, for every arm, how the evaluator's gain depends on n (the curve), with its interval, fit and
    peak.

    The aggregates of an ensemble are also compared with its members.

    Args: scores_finding: finding of `score`.
    """
    rewards_by_arm, join_by_arm = arms(trial)
    # name -> [N]
    scores_by_reward = {
        arm_name: np.asarray(arm_scores) for arm_name, arm_scores in scores_finding.data["scores"].items()
    }
    scores_by_arm = {
        **scores_by_reward,
        **{arm_name: join(scores_by_reward) for arm_name, join in join_by_arm.items()},
    }
    evaluator_scores = np.asarray(scores_finding.data["evaluator"])  # scores by the evaluator, [N]
    n_values = trial.numbers  # [T]
    # Gains are in the evaluator's standard deviations; a constant evaluator has scale 1.
    evaluator_scale = float(evaluator_scores.std()) or 1.0
    distances = np.sqrt(kl_divergence(n_values))  # [T]
    rng = np.random.default_rng(0)  # a fixed seed: the page is reproducible
    # [B, N]; the same resamples for all arms, so that arms can be compared in pairs
    latent_counts_by_resample = np.stack(
        [np.bincount(rng.integers(trial.n, size=trial.n), minlength=trial.n) for _ in range(RESAMPLES)]
    )
    curve_by_arm = {}
    last_gain_by_arm = {}
    table_rows = []  # one row for each arm and n
    for arm_name, arm_scores in scores_by_arm.items():
        evaluator_means = expected_best(arm_scores, evaluator_scores, n_values)  # [T]
        # [B, T]
        resampled_means = resample_best(arm_scores, evaluator_scores, n_values, latent_counts_by_resample)
        # Gains are relative to n = 1, in each resample as well.
        gains = (evaluator_means - evaluator_means[0]) / evaluator_scale
        resampled_gains = (resampled_means - resampled_means[:, :1]) / evaluator_scale
        alpha, beta = fit(distances, gains)  # of all latents
        resampled_fits = fit(distances, resampled_gains)  # [B, 2], one fit per resample
        reward_gains = (expected_best(arm_scores, arm_scores, n_values) - arm_scores.mean()) / (
            float(arm_scores.std()) or 1.0
        )
        gain_lows, gain_highs = np.quantile(resampled_gains, [0.025, 0.975], axis=0)  # [T] each
        gain_steps = [
            dict(zip(("mean", "lo", "hi"), map(float, gain_with_bounds), strict=True))
            for gain_with_bounds in zip(gains, gain_lows, gain_highs, strict=True)
        ]
        curve_by_arm[arm_name] = {
            "steps": gain_steps,
            "reward": reward_gains.tolist(),
            "fit": [float(alpha), float(beta)],
            "joined": arm_name in join_by_arm,
            "peak": [
                _finite(peak_value)
                for peak_value in (
                    # "nearest", since an interpolation between infinite peaks is not defined
                    peak(alpha, beta),
                    *np.quantile(peak(*resampled_fits.T), [0.025, 0.975], method="nearest"),
                )
            ],
        }
        # the gain at the largest n, and its resamples
        last_gain_by_arm[arm_name] = (
            gains[-1],
            resampled_gains[:, -1],
        )
        table_rows += [
            {
                "arm": arm_name,
                "n": n,
                "evaluator": float(evaluator_means[number_index]),
                **gain_steps[number_index],
                "reward": float(reward_gains[number_index]),
            }
            for number_index, n in enumerate(n_values)
        ]
    finding_data = {
        "numbers": n_values,
        "kl": kl_divergence(n_values).tolist(),
        "arms": curve_by_arm,
        "against": _compare_to_members(last_gain_by_arm, rewards_by_arm, join_by_arm),
    }
    return Finding(
        facts=trial.facts(), data=finding_data, rows=table_rows, says=_describe_curves(trial, finding_data)
    )


def _finite(number: float) -> float | None:
    """Return the value as a float, or None if it is not finite, since JSON has no infinity."""
    return float(number) if np.isfinite(number) else None


def _compare_to_members(
    last_gain_by_arm: Mapping[str, tuple[float, np.ndarray]], rewards_by_arm: Mapping, join_by_arm: Mapping
) -> list[dict]:
    """Compare the gain of each aggregate at the largest n with the best member's gain and the mean gain.

    The best member is selected by the evaluator itself, so the comparison favours this member.

    Args:
        last_gain_by_arm: for each arm its gain at the largest n, and the same gain in each resample, [B].
        rewards_by_arm: arms that a network scores.
        join_by_arm: aggregates by name; only the names are used.
    """
    comparison_rows = []
    for aggregate_name in join_by_arm if rewards_by_arm else ():
        # The text before ": " names the ensemble, so these are the members of the same ensemble.
        name_prefix = aggregate_name.rpartition(": ")[0]
        ensemble_members = [
            member
            for member in rewards_by_arm
            if member.rpartition(": ")[0] == name_prefix and "member" in member
        ]
        best_member = max(
            ensemble_members, key=lambda member: last_gain_by_arm[member][0]
        )  # by the evaluator
        for reference_name, compared_members in (
            ("best member", [best_member]),
            ("mean member", ensemble_members),
        ):
            gain_difference = last_gain_by_arm[aggregate_name][0] - np.mean(
                [last_gain_by_arm[member][0] for member in compared_members]
            )
            # Paired: both gains come from the same resamples.
            difference_low, difference_high = np.quantile(
                last_gain_by_arm[aggregate_name][1]
                - np.mean([last_gain_by_arm[member][1] for member in compared_members], axis=0),
                [0.025, 0.975],
            )
            comparison_rows.append(
                {
                    "arm": aggregate_name,
                    "against": reference_name,
                    "mean": float(gain_difference),
                    "lo": float(difference_low),
                    "hi": float(difference_high),
                }
            )
    return comparison_rows


def _describe_curves(trial: Trial, finding_data: Mapping) -> list[str]:
    """Describe each arm's gain and peak, and the evaluator, in sentences.

    Args: finding_data: data of the finding of `curves`.
    """
    largest_n = finding_data["numbers"][-1]
    sentences = []
    largest_distance = np.sqrt(finding_data["kl"][-1])  # d at the largest n
    for arm_name, arm_curve in finding_data["arms"].items():
        last_step = arm_curve["steps"][-1]
        peak_distance, peak_low, peak_high = arm_curve["peak"]
        # A peak beyond the largest n is extrapolated, so it is not reported.
        if peak_distance is None or peak_distance > largest_distance:
            peak_text = f"no peak up to n = {largest_n}"
        else:
            bound_texts = [f"{bound:.2f}" if bound is not None else "none" for bound in (peak_low, peak_high)]
            peak_text = (
                f"peak of the fit at d = {peak_distance:.2f} [{bound_texts[0]}, {bound_texts[1]}],"
                f" n = {number_at(peak_distance):.0f}"
            )
        gain_text = span(last_step["mean"], last_step["lo"], last_step["hi"], "+.2f")
        sentences.append(
            f"{arm_name}: the best of {largest_n} is {gain_text} of the evaluator's standard deviations"
            f" better than a mean latent; {peak_text}."
        )
    for comparison_row in finding_data["against"]:
        if (
            comparison_row["against"] == "best member"
            and not comparison_row["lo"] <= 0 <= comparison_row["hi"]
        ):
            gain_text = span_apart(
                comparison_row["mean"], comparison_row["lo"], comparison_row["hi"], 0, sign="+"
            )
            sentences.append(
                f"{comparison_row['arm']} is {gain_text} above the member that the evaluator ranks first."
            )
    evaluator_text = (
        "the formula from which the labels were sampled with noise"
        if trial.evaluator is None
        else "another reward, which has errors, too"
    )
    return [
        *sentences,
        (
            f"The evaluator is {evaluator_text}. Selection is a weaker optimisation than tuning: a reward"
            " that fails here will fail there, but not the other way round."
        ),
    ]


def jobs(trial: Trial, quiet: bool = False) -> tuple[Job, Callable[[Finding], Job]]:
    """Return the job that scores the latents, and a function that takes its finding and returns the job of
    the curves.

    The first job takes almost all of the time, so its result is stored separately.

    Args: quiet: True hides the progress bar of the first job.
    """
    evaluator_kind = "annotator" if trial.evaluator is None else "reward"
    network_inputs = {"networks": trial.networks(), "evaluator": evaluator_kind}
    # The cache's key has the names of version 0.1, so that its scores stay valid.
    scores_inputs = {
        **version_0_1.former_trial(network_inputs),
        "psi": trial.psi,
        "seed": trial.seed,
        "n": trial.n,
        # left out for the usual level, so that earlier scores are found
        **({} if trial.generator.generator.level == LEVEL else {"level": trial.generator.generator.level}),
    }
    scores_job = Job(
        key=SCORES,
        title="Scores of single latents",
        compute=partial(score, trial, quiet=quiet),
        inputs=scores_inputs,
    )

    def make_curves_job(scores_finding: Finding) -> Job:
        """Return the job of the curves, computed from the scores."""
        return Job(
            key=CURVES,
            title="Best of n: the evaluator's value of the selected latents",
            compute=partial(curves, trial, scores_finding),
            plots={"evaluator": plot_evaluator, "reward": plot_reward, "peaks": plot_peaks},
            inputs={**scores_inputs, "most": trial.most},
        )

    return scores_job, make_curves_job


def _colours(finding_data: Mapping) -> dict[str, str]:
    """Return the colour of each arm: grey for members of ensembles, a colour of the cycle for other arms.

    Args: finding_data: data of the finding of `curves`.
    """
    coloured_arms = [arm_name for arm_name, arm in finding_data["arms"].items() if "member" not in arm_name]
    return {
        arm_name: style.CYCLE[coloured_arms.index(arm_name) % len(style.CYCLE)]
        if arm_name in coloured_arms
        else style.colour("noise")
        for arm_name in finding_data["arms"]
    }


KL = "KL = log n - (n - 1)/n (nats)"


@style.plot(
    "small",
    size=(9.4, 4.4),  # inches
    xlabel=KL,
    ylabel="evaluator's gain (standard deviations)",
    title="Gain by the evaluator",
)
def plot_evaluator(axes, finding_data: dict):
    """Plot the evaluator's gain over KL: points and fitted curves, with the interval if there is one arm.

    Args: finding_data: data of the finding of `curves`.
    """
    is_single_arm = len(finding_data["arms"]) == 1  # one arm: its band can be shown
    kl_values = np.asarray(finding_data["kl"])  # [T], nats
    colour_by_arm = _colours(finding_data)
    fine_kl_values = np.linspace(0, kl_values[-1], 200)  # KL of the fitted curve
    for arm_name, arm_curve in finding_data["arms"].items():
        # Members are thin lines without a fit.
        mean_gains = [gain_step["mean"] for gain_step in arm_curve["steps"]]
        if "member" in arm_name:
            axes.plot(
                kl_values, mean_gains, "-", color=colour_by_arm[arm_name], linewidth=0.8, label=arm_name
            )
            continue
        if is_single_arm:
            style.band(
                axes,
                finding_data["kl"],
                arm_curve["steps"],
                colour_by_arm[arm_name],
                arm_name,
                markersize=3,
                linewidth=0,
            )
        else:  # bands would hide each other; plot_peaks shows the intervals at the largest n
            axes.plot(kl_values, mean_gains, "o", color=colour_by_arm[arm_name], label=arm_name, markersize=3)
        axes.plot(
            fine_kl_values,
            np.sqrt(fine_kl_values) * (arm_curve["fit"][0] - arm_curve["fit"][1] * np.sqrt(fine_kl_values)),
            color=colour_by_arm[arm_name],
            linewidth=1,
        )


@style.plot(
    "small",
    size=(9.4, 3.4),  # inches
    xlabel=KL,
    ylabel="reward's gain (standard deviations)",
    title="Gain by the reward itself",
)
def plot_reward(axes, finding_data: dict):
    """Plot the gain of every arm by its own reward over KL.

    Args: finding_data: data of the finding of `curves`.
    """
    for arm_name, colour in _colours(finding_data).items():
        axes.plot(
            finding_data["kl"],
            finding_data["arms"][arm_name]["reward"],
            color=colour,
            label=arm_name,
            linewidth=0.8 if "member" in arm_name else 1.5,
        )


def plot_peaks(finding_data: dict):
    """Plot the position of each fit's peak, and the evaluator's gain at the largest n.

    Args: finding_data: data of the finding of `curves`.
    """
    arm_names = list(finding_data["arms"])
    colour_by_arm = _colours(finding_data)
    figure, (peak_axis, gain_axis) = style.figure(column_count=2, size=(9.4, 0.32 * len(arm_names) + 1.2))
    largest_distance = float(np.sqrt(finding_data["kl"][-1]))  # d at the largest n
    for arm_index, arm_name in enumerate(arm_names):
        arm_curve = finding_data["arms"][arm_name]
        # Peaks beyond the axis, and those that do not exist, are drawn at its right edge.
        peak_distance, peak_low, peak_high = (
            2 * largest_distance if peak_value is None else min(peak_value, 2 * largest_distance)
            for peak_value in arm_curve["peak"]
        )
        peak_axis.errorbar(
            [peak_distance],
            [arm_index],
            xerr=[[max(peak_distance - peak_low, 0)], [max(peak_high - peak_distance, 0)]],
            fmt="o",
            capsize=3,
            markersize=4,
            color=colour_by_arm[arm_name],
        )
        last_step = arm_curve["steps"][-1]
        gain_axis.errorbar(
            [last_step["mean"]],
            [arm_index],
            xerr=style.errors(last_step),
            fmt="o",
            capsize=3,
            markersize=4,
            color=colour_by_arm[arm_name],
        )
    peak_axis.axvline(largest_distance, color=style.colour("noise"), linestyle="--", linewidth=1)
    peak_axis.set(
        title=f"Peak of the fit (dashed: n = {finding_data['numbers'][-1]})",
        xlabel="d = sqrt(KL); right edge: none",
        xlim=(0, 2.05 * largest_distance),
    )
    gain_axis.set(
        title=f"Evaluator's gain at n = {finding_data['numbers'][-1]}", xlabel="standard deviations"
    )
    for axis, tick_labels in ((peak_axis, arm_names), (gain_axis, [""] * len(arm_names))):
        axis.set_yticks(range(len(arm_names)), tick_labels)
        axis.invert_yaxis()
    return figure


def load_trial(
    before_path, rewards, heldout_path, dataset, device, level: float | None = None, **trial_fields
) -> Trial:
    """Load the networks that the flags name.

    Args:
        before_path: file or run folder of the generator; None selects the bundled generator.
        rewards: files of rewards, or names of observations. A name of an observation selects an untrained
            reward of this observation. If the sequence is empty, the bundled reward is tested.
        heldout_path: file of the reward that is the evaluator. If it is None, the simulated annotator is
            the evaluator.
        dataset: dataset of the generator; None selects the dataset that the generator's run recorded.
        device: name of the device, on which the networks are loaded.
        level: raw density at the surface of the shapes; None: the level of the generator.
        trial_fields: further fields of `Trial`.

    Raises: ValueError or FileNotFoundError, with the name of the flag.
    """
    torch_device = choose_device(device)  # the networks' device
    with prefix_errors("--before"):
        generator = load_generator(before_path, torch_device, level)
    # A reward that is named twice is tested once.
    reward_paths = dict.fromkeys(rewards or [bundled.REWARD])
    name_by_path = {
        path: path.parent.name if path.stem == "reward" and len(reward_paths) > 1 else path.stem
        for path in reward_paths
    }
    # If the names are not unique, the paths are the names.
    if len(set(name_by_path.values())) < len(name_by_path):
        name_by_path = {path: str(path) for path in reward_paths}

    def load(reward_path: Path, flag: str):
        """Load a reward, and return it with the SHA-256 of its file.

        If `reward_path` is the name of an observation and no such file exists, the reward is an untrained one
        of this observation, and the second value is a description such as "untrained sigma".
        Args:
            reward_path: file of the reward, or name of an observation.
            flag: flag that named the path, for messages.
        """
        if (observation_kind := str(reward_path)) in OBSERVATIONS and not reward_path.exists():
            with prefix_errors(flag):
                return untrained_reward(
                    observation_kind, generator.generator
                ), f"untrained {observation_kind}"
        with prefix_errors(flag):
            reward = load_reward(reward_path, torch_device)
        check_reward(reward, generator.generator, flag)
        return reward, file_hash(reward_path)

    if heldout_path is None and not annotator_can_score(generator, dataset):
        raise ValueError(
            "--heldout-reward is missing. Without it the simulated annotator is the evaluator, which can"
            " score synthetic heads only. Pass the file of a reward as the evaluator with --heldout-reward."
        )
    loaded_evaluator = None if heldout_path is None else load(heldout_path, "--heldout-reward")
    loaded_rewards = {name_by_path[path]: load(path, "--reward-ckpt") for path in reward_paths}
    # An evaluator that is among the tested rewards would agree with itself.
    if loaded_evaluator is not None and any(
        digest == loaded_evaluator[1] or loaded_evaluator[0].shares_network_with(tested_reward)
        for tested_reward, digest in loaded_rewards.values()
    ):
        raise ValueError(
            f"--heldout-reward={heldout_path} is one of the tested rewards, or a member of one, so its"
            " errors would not be independent of theirs. Pass a reward that was trained on other labels."
        )
    # Checks the settings, so that another mistake is reported in one line.
    trial = Trial(generator=generator, rewards=loaded_rewards, evaluator=loaded_evaluator, **trial_fields)
    for tested_reward, _ in loaded_rewards.values():
        announce_reward(tested_reward, "--reward-ckpt")
    return trial


def write(trial: Trial, page_folder: Path) -> Finding:
    """Score the latents, compute the curves, and write index.html into `page_folder`. Return the finding of
    the curves.
    """
    scores_job, make_curves_job = jobs(trial)
    curves_job = make_curves_job(pages.run([scores_job], page_folder)[SCORES])
    finding_by_key = pages.run([curves_job], page_folder, quiet=True)
    introduction = (
        f"{trial.n:,} latents of {trial.generator.path.name}, untuned; nothing was trained on them. Each"
        " point is the exact mean, over all ways to draw n of them, of the evaluator's value of the latent"
        " with the highest reward."
    )
    write_page(
        page_folder / "index.html",
        TITLE,
        introduction,
        [curves_job],
        finding_by_key,
        finding_by_key[CURVES].says,
    )
    return finding_by_key[CURVES]
