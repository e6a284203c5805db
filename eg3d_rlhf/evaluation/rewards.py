"""Analyse the rewards of the same latents: before and after tuning, over truncation, and over snapshots.

The last part tests for over-optimisation (Gao et al. 2022, arXiv 2210.10760): the tuned reward rises while
the quality that it represents falls. The test compares the tuned reward with a held-out reward and, for
synthetic data, with the oracle, which is the utility of the simulated annotator without noise.

The parameter ψ is the truncation of StyleGAN: ws = ws_mean + ψ (ws - ws_mean).

Two intervals of a trajectory's slope are reported, since they answer different questions. The *spread* is the
range of the middle 95 % of the single latents' least-squares slopes. It contains zero unless nearly all
latents move in the same direction. The interval of the *mean* slope is a bootstrap over latents. With many
latents it detects a drift that is too small to see on a single one. Neither interval covers the variation
between training runs, since there is one run of each kind.
Shapes: N latents, T snapshots or networks in order of training.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from eg3d_rlhf.core import statistics
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.evaluation.paired import (
    BOOTSTRAP,
    NO_CONTROL,
    compute_column_means,
    compute_paired_changes,
    contains_zero,
    make_seed_rows,
    span,
)
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding, Job
from eg3d_rlhf.generators import KEPT, LoadedGenerator
from eg3d_rlhf.tuning.gan.heldout_metrics import ORACLE_RESOLUTION, utilities
from eg3d_rlhf.tuning.gan.phase import density_l1
from training.config import number_text

PSIS = (0.25, 0.5, 0.7, 1.0)  # truncations over which the mean reward is plotted
ROLES = ("before", "after", "reward")
RANK_PSIS = (0.7, 0.25)  # truncations between which ranks are compared
MIN_NETWORKS = 3  # smallest number of networks for a slope, including the network before tuning


def jobs(comparison: Comparison) -> list[Job]:
    """List the jobs on rewards: reward shift, reward over psi, rank consistency, and trajectories."""
    shift_plots = {"histograms": plot_histograms, "deltas": plot_deltas, "final-against-initial": plot_lines}
    return [
        comparison.job(
            "reward-shift", "Reward of the same latents before and after", shift, shift_plots, n=comparison.n
        ),
        comparison.job(
            "reward-psi",
            "Reward over truncation",
            over_psi,
            {"means": plot_psi},
            ROLES,
            n=comparison.n,
            psis=PSIS,
        ),
        comparison.job(
            "rank-consistency",
            "Do latents keep their rank under truncation?",
            ranks,
            {"scatter": plot_ranks},
            ROLES,
            n=comparison.n,
            psis=RANK_PSIS,
        ),
        trajectories_job(comparison),
    ]


def trajectories_job(comparison: Comparison) -> Job:
    """Return the job that computes the trajectories: the rewards of the same latents over training.

    If the tuned run has too few snapshots, the returned job only explains what is missing.
    """
    snapshots_by_role = {role: comparison.snapshots(role) for role in ("after", "control")}
    job_key = "trajectories"
    job_title = "Reward of fixed latents over training"
    # + 1: the network before tuning is the first point of the trajectory
    if len(snapshots_by_role["after"]) + 1 < MIN_NETWORKS:
        searched_folder = (
            f" in {comparison.run.name}" if comparison.run is not None else " (no run folder was named)"
        )
        return comparison.absent(
            job_key,
            job_title,
            f"A trajectory needs {MIN_NETWORKS - 1} snapshots of the tuned run;"
            f" {len(snapshots_by_role['after'])} were found{searched_folder}. Train with --snap=1, which"
            " keeps a snapshot per tick, and pass the run's folder to --run.",
        )
    # hashes of the snapshots are inputs: a run that has new ones is measured again
    hashes_by_role = {
        role: {number_text(kimg): file_hash(snapshot_path) for kimg, snapshot_path in snapshots}
        for role, snapshots in snapshots_by_role.items()
    }
    plot_by_name = {"trajectories": plot_trajectories, "slopes": plot_slopes}
    return comparison.job(
        job_key,
        job_title,
        trajectories,
        plot_by_name,
        ("before", "reward"),
        n=comparison.n,
        files=hashes_by_role,
    )


def shift(comparison: Comparison, _folder: Path) -> Finding:
    """Compute the paired changes of the reward, and fit a line of the reward after tuning against the reward
    before.
    """
    seeds = comparison.seeds()  # of the held-out latents
    # float64, so that the statistics add no rounding of their own
    scores_by_role = {
        role: comparison.scores(generator, seeds).double().numpy()
        for role, generator in comparison.generators().items()
    }
    change_by_role = compute_paired_changes(scores_by_role)  # change from "before" to each other role
    line_by_role = {
        role: statistics.fit_line(scores_by_role["before"], scores_by_role[role])._asdict()
        for role in change_by_role
    }
    table_rows = make_seed_rows(
        seeds,
        {
            **scores_by_role,
            **{f"delta_{role}": scores_by_role[role] - scores_by_role["before"] for role in change_by_role},
        },
    )
    # everything that the plots read; they see no tensors
    finding_data = {
        "scores": {role: role_scores.tolist() for role, role_scores in scores_by_role.items()},
        "paired": change_by_role,
        "lines": line_by_role,
    }
    facts = comparison.facts(
        seeds,
        ("before", "after", "control", "reward"),
        f"mean: {BOOTSTRAP}; share: Wilson; {statistics.LINE_INTERVAL}",
    )
    return Finding(
        facts=facts, data=finding_data, rows=table_rows, says=_describe_shift(change_by_role, line_by_role)
    )


def _describe_shift(change_by_role: dict, line_by_role: dict) -> list[str]:
    """Describe the change of the reward in sentences.

    Args:
        change_by_role: paired change of the reward since before tuning, by role.
        line_by_role: fitted line of the reward after over the reward before, by role.
    """
    tuned_change = change_by_role["after"]
    fitted_line = line_by_role["after"]
    change_text = span(tuned_change["mean"], tuned_change["mean_lo"], tuned_change["mean_hi"])
    rising_share_text = span(
        tuned_change["positive_rate"], tuned_change["positive_lo"], tuned_change["positive_hi"], ".3f"
    )
    sentences = [
        (
            f"The reward changes by {change_text} on average; it rises for {tuned_change['positive']} of"
            f" {tuned_change['n']} latents (share {rising_share_text})."
        ),
        (
            "The run optimised this reward. Its rise shows that the optimisation worked; it does not show"
            " that the shapes are better."
        ),
    ]
    # A slope of 1 means that all latents shift alike, and that their order is kept. With a slope of 0 the
    # initial reward predicts nothing.
    if fitted_line["lo"] > 0:
        order_result = (
            "latents keep part of their initial order"
            if fitted_line["hi"] < 1
            else "the differences between latents are kept"
        )
    else:
        order_result = (
            "no dependence of the final on the initial reward is shown"
            if fitted_line["hi"] > 0
            else "the initial order is reversed"
        )
    sentences.append(
        "Final against initial reward has slope"
        f" {span(fitted_line['slope'], fitted_line['lo'], fitted_line['hi'])}: {order_result}."
    )
    if "control" not in change_by_role:
        return [*sentences, NO_CONTROL]
    control_change = change_by_role["control"]
    # 1e-12 avoids a division by zero for a run whose mean change is exactly zero
    relative_change = abs(control_change["mean"]) / max(abs(tuned_change["mean"]), 1e-12)
    small_shift_result = (
        "no shift is shown"
        if contains_zero(control_change["mean_lo"], control_change["mean_hi"])
        else "a small shift, which training without the reward causes in this run"
    )
    large_shift_result = (
        "training without the reward also moves it much, so the shift is not due to the reward alone"
    )
    return [
        *sentences,
        (
            "In the control the mean change is"
            f" {span(control_change['mean'], control_change['mean_lo'], control_change['mean_hi'])},"
            f" {relative_change:.1%} of the tuned one:"
            f" {small_shift_result if relative_change < 0.1 else large_shift_result}."
        ),
    ]


def over_psi(comparison: Comparison, _folder: Path) -> Finding:
    """Compute the mean reward at each truncation, before and after tuning."""
    seeds = comparison.seeds()  # N held-out latents
    psi_rows = []
    for role in ("before", "after"):
        for psi in PSIS:
            psi_scores = comparison.scores(comparison.generators()[role], seeds, psi).double().numpy()
            mean_score, mean_low, mean_high = bootstrap_mean_interval(psi_scores)  # over latents
            psi_rows.append(
                {
                    "role": role,
                    "psi": psi,
                    "mean": mean_score,
                    "lo": mean_low,
                    "hi": mean_high,
                    "std": float(psi_scores.std(ddof=1)),
                }
            )
    # role -> row of the truncation with the highest mean reward
    best_row_by_role = {}
    for role in ("before", "after"):
        best_row_by_role[role] = max(
            (psi_row for psi_row in psi_rows if psi_row["role"] == role), key=lambda psi_row: psi_row["mean"]
        )
    sentences = [
        (
            f"Highest mean reward: before at ψ = {best_row_by_role['before']['psi']:g}"
            f" ({best_row_by_role['before']['mean']:.2f}), after at ψ = {best_row_by_role['after']['psi']:g}"
            f" ({best_row_by_role['after']['mean']:.2f}). Only the listed truncations were tried."
        ),
        (
            "Truncation pulls shapes towards the mean shape, so a reward that rises as ψ falls prefers"
            " typical shapes."
        ),
    ]
    return Finding(
        # psi=None: several truncations are compared, so the facts state none
        facts=comparison.facts(seeds, ROLES, BOOTSTRAP, psi=None),
        data={"rows": psi_rows},
        rows=psi_rows,
        says=sentences,
    )


def ranks(comparison: Comparison, _folder: Path) -> Finding:
    """Compute Spearman's rank correlation rho between the rewards of the same latents at two truncations."""
    seeds = comparison.seeds()  # N held-out latents
    correlation_by_role = {}  # by role
    scores_by_role = {}  # by role: rewards at the two truncations
    for role in ("before", "after"):
        high_scores, low_scores = (
            comparison.scores(comparison.generators()[role], seeds, psi).double().numpy() for psi in RANK_PSIS
        )
        scores_by_role[role] = [high_scores.tolist(), low_scores.tolist()]
        correlation_by_role[role] = statistics.spearman(high_scores, low_scores)._asdict()
    high_psi, low_psi = RANK_PSIS
    table_rows = [
        {"role": role, "spearman": correlation["mean"], "lo": correlation["lo"], "hi": correlation["hi"]}
        for role, correlation in correlation_by_role.items()
    ]
    text_before, text_after = (
        span(correlation["mean"], correlation["lo"], correlation["hi"], ".3f")
        for correlation in (correlation_by_role["before"], correlation_by_role["after"])
    )
    sentences = [
        f"Spearman's rho between the rewards at ψ = {high_psi:g} and {low_psi:g}: before {text_before}, after"
        f" {text_after}.",
        (
            "Both rewards belong to the same latent, so agreement is expected. A rho below 1 means that"
            " truncation changes the order."
        ),
    ]
    finding_data = {"scores": scores_by_role, "rho": correlation_by_role, "psis": RANK_PSIS}
    return Finding(
        facts=comparison.facts(seeds, ROLES, statistics.RANK_INTERVAL, psi=None),
        data=finding_data,
        rows=table_rows,
        says=sentences,
    )


def slope_summary(training_lengths: np.ndarray, reward_scores: np.ndarray) -> dict:
    """Fit the slope of each latent's reward over training, and summarise the slopes.

    Args:
        training_lengths: length of training at each network, [T], in thousands of images (kimg).
        reward_scores: rewards, [N, T].

    Returns: a dictionary with the slopes per kimg, their mean with its bootstrap interval, and the range of
        the middle 95 % of the slopes.
    """
    slopes = statistics.slopes(training_lengths, reward_scores)  # [N]
    mean_slope, mean_low, mean_high = bootstrap_mean_interval(slopes)  # over latents
    spread_low, spread_high = np.quantile(slopes, [0.025, 0.975])  # of single latents
    return {
        "slopes": slopes.tolist(),
        "mean": mean_slope,
        "mean_lo": mean_low,
        "mean_hi": mean_high,
        "spread_lo": float(spread_low),  # of single latents, not of the mean
        "spread_hi": float(spread_high),
    }


def trajectories(comparison: Comparison, _folder: Path) -> Finding:
    """Score the same latents under every snapshot of the tuned run and of the control."""
    trajectory_by_role: dict[str, dict] = {}
    seeds = comparison.seeds()  # N held-out latents
    table_rows = []
    # [N]; the first point of both trajectories
    scores_before = comparison.scores(comparison.before, seeds).double().numpy()
    for role in ("after", "control"):
        snapshots = [(kimg, snapshot_path) for kimg, snapshot_path in comparison.snapshots(role) if kimg > 0]
        # a control without enough snapshots is left out
        if len(snapshots) + 1 < MIN_NETWORKS:
            continue
        # [T]; both runs start from the same network
        training_lengths = np.array([0.0, *(kimg for kimg, _ in snapshots)])
        # [N, T]
        scores_by_snapshot = np.stack(
            [
                scores_before,
                *(
                    comparison.scores(comparison.load(snapshot_path), seeds).double().numpy()
                    for _, snapshot_path in snapshots
                ),
            ],
            axis=1,
        )
        mean_by_time = compute_column_means(scores_by_snapshot)
        trajectory_by_role[role] = {
            "kimg": training_lengths.tolist(),
            "values": scores_by_snapshot.tolist(),
            "means": mean_by_time,
            **slope_summary(training_lengths, scores_by_snapshot),
        }
        table_rows += [
            {"role": role, "kimg": float(kimg_of_step), **mean_interval}
            for kimg_of_step, mean_interval in zip(training_lengths, mean_by_time, strict=True)
        ]
    interval = f"range of the middle 95 % of latents' least-squares slopes; mean slope: {BOOTSTRAP}"
    facts = comparison.facts(seeds, ("before", "after", "control", "reward"), interval)
    return Finding(
        facts=facts,
        data={"roles": trajectory_by_role},
        rows=table_rows,
        says=_describe_trajectories(trajectory_by_role),
    )


def _describe_trajectories(slopes_by_role: dict) -> list[str]:
    """Describe in sentences the slopes of the reward over training, for the tuned run and the control.

    Args: slopes_by_role: the result of `slope_summary` for "after" and, if there is one, "control".
    """
    sentences = []
    for role, role_slopes in slopes_by_role.items():
        run_name = "tuned run" if role == "after" else role
        contains_text = (
            "contains"
            if contains_zero(role_slopes["spread_lo"], role_slopes["spread_hi"])
            else "does not contain"
        )
        sentences.append(
            f"Slope of the {run_name}, reward per kimg: the middle 95 % of latents lie in"
            f" [{role_slopes['spread_lo']:+.2f}, {role_slopes['spread_hi']:+.2f}], which {contains_text}"
            " zero; mean"
            f" {span(role_slopes['mean'], role_slopes['mean_lo'], role_slopes['mean_hi'], '+.2f')}."
        )
    if "control" not in slopes_by_role:
        return [*sentences, NO_CONTROL + " The control needs snapshots, too: add --snap=1."]
    tuned_slopes = slopes_by_role["after"]
    control_slopes = slopes_by_role["control"]
    # The interval of the mean decides, since it detects smaller drifts than the spread does.
    if contains_zero(control_slopes["mean_lo"], control_slopes["mean_hi"]):
        return [*sentences, "The mean slope of the control does not differ from zero: no drift is shown."]
    return [
        *sentences,
        (
            "On average the control does drift: its mean slope differs from zero, at"
            f" {abs(control_slopes['mean'] / tuned_slopes['mean']):.1%} of the tuned run's. Further GAN"
            " training moves more latents in one direction than in the other, and a mean over many latents"
            " resolves that. One run cannot show if other training seeds drift in the same direction."
        ),
    ]


@style.plot(xlabel="reward", ylabel="latents", title="Reward of held-out latents")
def plot_histograms(axes, finding_data: dict):
    """Plot histograms of the reward before tuning, after tuning, and of the control.

    Args: finding_data: data of the finding of `shift`.
    """
    # the same bins for all roles
    bin_edges = np.histogram_bin_edges(
        np.concatenate([np.asarray(role_scores) for role_scores in finding_data["scores"].values()]), bins=30
    )
    for role, latent_scores in finding_data["scores"].items():
        axes.hist(
            latent_scores,
            bins=bin_edges,
            histtype="step" if role == "control" else "stepfilled",  # an outline, so that it hides nothing
            alpha=1 if role == "control" else 0.6,
            color=style.colour(role),
            label=role,
            linewidth=1.4,
        )


@style.plot(
    xlabel="latents, in order of the change", ylabel="change of the reward", title="Change per latent"
)
def plot_deltas(axes, finding_data: dict):
    """Plot the change of every latent's reward, in ascending order.

    Args: finding_data: data of the finding of `shift`.
    """
    scores_before = np.asarray(finding_data["scores"]["before"])
    for role, paired_change in finding_data["paired"].items():
        sorted_deltas = np.sort(np.asarray(finding_data["scores"][role]) - scores_before)  # ascending
        axes.plot(
            np.arange(1, len(sorted_deltas) + 1),
            sorted_deltas,
            ".",
            markersize=3,
            color=style.colour(role),
            label=f"{role}: {paired_change['positive']}/{paired_change['n']} rise",  # number of latents
        )
    axes.axhline(0, color=style.colour("noise"), linewidth=1)


@style.plot(7, xlabel="reward before", ylabel="reward after", title="Final against initial reward")
def plot_lines(axes, finding_data: dict):
    """Plot the reward after tuning over the reward before, with the fitted line of each role.

    Args: finding_data: data of the finding of `shift`.
    """
    scores_before = np.asarray(finding_data["scores"]["before"])
    reward_range = np.array([scores_before.min(), scores_before.max()])
    for role, fitted_line in finding_data["lines"].items():
        axes.plot(
            scores_before,
            finding_data["scores"][role],
            ".",
            markersize=4,
            alpha=0.6,
            color=style.colour(role),
        )
        axes.plot(
            reward_range,
            fitted_line["intercept"] + fitted_line["slope"] * reward_range,
            color=style.colour(role),
            label=f"{role}: slope {span(fitted_line['slope'], fitted_line['lo'], fitted_line['hi'], '.2f')}",
        )
    # points on the diagonal have not changed
    axes.plot(reward_range, reward_range, "--", color=style.colour("noise"), linewidth=1, label="no change")


@style.plot(xlabel="truncation ψ", ylabel="mean reward", title="Reward over truncation")
def plot_psi(axes, finding_data: dict):
    """Plot the mean reward with its interval over the truncation ψ.

    Args: finding_data: data of the finding of `over_psi`.
    """
    # dict.fromkeys removes repeated roles and keeps their order
    for role in dict.fromkeys(psi_row["role"] for psi_row in finding_data["rows"]):
        role_rows = [psi_row for psi_row in finding_data["rows"] if psi_row["role"] == role]
        style.band(
            axes, [psi_row["psi"] for psi_row in role_rows], role_rows, style.colour(role), role, markersize=3
        )


def plot_ranks(finding_data: dict):
    """Plot the ranks of latents at one truncation against those at the other.

    Args: finding_data: data of the finding of `ranks`.
    """
    figure, axes = style.figure(column_count=2)
    high_psi, low_psi = finding_data["psis"]
    for axis, role in zip(axes, ("before", "after"), strict=True):
        # ties share their mean rank
        high_psi_ranks, low_psi_ranks = (rankdata(psi_scores) for psi_scores in finding_data["scores"][role])
        correlation = finding_data["rho"][role]
        axis.plot(high_psi_ranks, low_psi_ranks, ".", markersize=4, color=style.colour(role))
        axis.set(
            xlabel=f"rank at ψ = {high_psi:g}",
            ylabel=f"rank at ψ = {low_psi:g}",
            title=f"{role}: rho {correlation['mean']:.2f} [{correlation['lo']:.2f}, {correlation['hi']:.2f}]",
        )
    return figure


def plot_trajectories(finding_data: dict):
    """Plot the reward of every latent over training, with the mean on top.

    Args: finding_data: data of the finding of `trajectories`.
    """
    figure, axes = style.figure(column_count=len(finding_data["roles"]))
    for axis, (role, trajectory) in zip(np.atleast_1d(axes), finding_data["roles"].items(), strict=True):
        axis.plot(
            trajectory["kimg"],
            np.asarray(trajectory["values"]).T,
            color=style.colour(role),
            alpha=0.15,
            linewidth=0.6,
        )
        axis.plot(
            trajectory["kimg"],
            [mean_interval["mean"] for mean_interval in trajectory["means"]],
            "o-",
            color=style.colour(role),
            linewidth=2,
            markersize=4,
            label="mean",
        )
        axis.set(
            xlabel="training, thousand images",
            ylabel="reward",
            title=f"{role}, {len(trajectory['values'])} latents",
        )
        axis.legend()
    # the same limits in all panels, so that control and tuned run can be compared
    all_rewards = np.concatenate(
        [np.ravel(trajectory["values"]) for trajectory in finding_data["roles"].values()]
    )
    for axis in np.atleast_1d(axes):
        axis.set_ylim(all_rewards.min() - 0.5, all_rewards.max() + 0.5)  # margin in units of the reward
    return figure


def plot_slopes(finding_data: dict):
    """Plot the distribution of the latents' slopes for each run, with the range of the middle 95 % of latents
    and the interval of the mean slope.

    Args: finding_data: data of the finding of `trajectories`.
    """
    figure, axes = style.figure(column_count=len(finding_data["roles"]))
    for axis, (role, role_slopes) in zip(np.atleast_1d(axes), finding_data["roles"].items(), strict=True):
        axis.hist(role_slopes["slopes"], bins=25, color=style.colour(role), alpha=0.6)
        # the wide band is the spread of latents, the narrow one the interval of the mean
        axis.axvspan(
            role_slopes["spread_lo"],
            role_slopes["spread_hi"],
            color=style.colour(role),
            alpha=0.12,
            label="middle 95 % of latents",
        )
        axis.axvspan(
            role_slopes["mean_lo"],
            role_slopes["mean_hi"],
            color=style.colour(role),
            alpha=0.8,
            label="mean, 95 % interval",
        )
        axis.axvline(0, color=style.colour("noise"), linewidth=1.2)
        axis.set(xlabel="slope, reward per kimg", ylabel="latents", title=role)
        axis.legend(fontsize=7)
    return figure


# Over-optimisation: the tuned reward is a proxy, which may rise while the quality that it represents falls.
# The curves show the tuned reward, a held-out reward, and for synthetic data the oracle (the rule of the
# simulated annotator), over the distance from the generator before tuning. The T networks are in order of
# training; the first one is the network before tuning.

DISTANCE = "mean |σ - σ before| over the whole cube (density-consistency distance)"
CURVE_ROLES = ("before", "after", "reward", "held-out")  # files whose hashes the facts list
PROXY = "tuned reward"  # the reward that the run optimised
SECOND = "held-out reward"  # trained on other labels; measured only if such a reward is given
ORACLE = "oracle"  # utility of the simulated annotator without noise
NO_SECOND = (
    "No held-out reward was given. Train one on other labels with another seed (tools/train_reward.py), and"
    " pass its file to --heldout-reward."
)
NO_SNAPSHOTS = (
    "Only the networks before and after are shown, since the run kept no snapshot between them. A peak within"
    " the run would be missed. Train with --snap=1."
)


def curve_jobs(comparison: Comparison) -> list[Job]:
    """Return a list with the job on over-optimisation.

    The job uses the snapshots of the tuned run, the held-out reward and the oracle if they are available.
    """
    # hashes of the snapshots are inputs: a run that has new ones is measured again
    hash_by_kimg = {
        number_text(kimg): file_hash(snapshot_path) for kimg, snapshot_path in comparison.snapshots("after")
    }
    return [
        comparison.job(
            "over-optimisation",
            "Over-optimisation: tuned reward against held-out reward and oracle",
            overoptimisation,
            {"curves": plot_curves},
            CURVE_ROLES,
            n=comparison.n,
            files=hash_by_kimg,
            data=comparison.data,
        )
    ]


def divergence(proxy_scores: np.ndarray, other_scores: np.ndarray, seed: int = 0) -> int | None:
    """Return the index of the network after which the proxy rises while another measure falls.

    The candidate is the network p at which the mean of the other measure peaks. Index p is returned if, for
    a later network, the interval of the paired difference to p is above zero for the proxy and below zero for
    the other measure. Otherwise None is returned. The intervals are bootstraps over latents. Together they
    have 95 % confidence over all T (T - 1) / 2 pairs of a peak and a later network, since even pure noise
    falls after its peak.

    Args:
        proxy_scores: scores by the tuned reward, [N, T].
        other_scores: scores by the other measure of the same latents and networks, [N, T].
        seed: seed of the bootstraps.
    """
    peak_index = int(other_scores.mean(axis=0).argmax())  # index of the network
    network_count = other_scores.shape[1]  # T
    # Bonferroni correction over the pairs; max(1, ...) since a single network has no pair
    confidence = 1 - 0.05 / max(1, network_count * (network_count - 1) / 2)
    # If the peak is at the last network, there is no later one, hence no divergence.
    for later_index in range(peak_index + 1, network_count):
        proxy_change = bootstrap_mean_interval(
            proxy_scores[:, later_index] - proxy_scores[:, peak_index], confidence, seed=seed
        )
        other_change = bootstrap_mean_interval(
            other_scores[:, later_index] - other_scores[:, peak_index], confidence, seed=seed
        )
        if proxy_change.lo > 0 and other_change.hi < 0:
            return peak_index
    return None


@torch.no_grad()
def densities(comparison: Comparison, generator: LoadedGenerator, seeds: range) -> torch.Tensor:
    """Return the raw densities [N, D, H, W] of seeds over the generator's whole cube, on the CPU.

    The grid is the one of the density-consistency term, so that distances are comparable with that term.
    """
    spec = SlabSpec.from_bounds(generator.generator.bounds, ORACLE_RESOLUTION)
    return torch.cat([field.density_grid(spec).cpu() for field in comparison.fields(generator, seeds)])


def overoptimisation(comparison: Comparison, _folder: Path) -> Finding:
    """Compute how every measure changes over the distance from the network before tuning, and where it
    diverges.

    The curve of a measure is the change of its mean since before tuning, in standard deviations between
    latents before tuning. The distance is the mean |σ - σ before| over the cube. `divergence` defines the
    point of divergence.
    """
    seeds = comparison.seeds()  # N held-out latents
    snapshots = [(kimg, snapshot_path) for kimg, snapshot_path in comparison.snapshots("after") if kimg > 0]
    # The file name KEPT marks the network that an early stop kept. It lies within the run, so it is sorted in
    # among the snapshots, not added at the end.
    early_stop_kimg = comparison.after.nets.cur_nimg / 1000 if comparison.after.path.name == KEPT else None
    if early_stop_kimg is not None and early_stop_kimg not in dict(snapshots):
        snapshots = sorted([*snapshots, (early_stop_kimg, comparison.after.path)])
    # The last snapshot is often the final network, which must not be shown twice.
    last_hash = comparison.load(snapshots[-1][1]).hash if snapshots else None
    final_network: list[tuple[None, LoadedGenerator]] = (
        []
        if last_hash == comparison.after.hash or early_stop_kimg is not None
        else [(None, comparison.after)]
    )
    # (training length in kimg, network or its file); None: the final network, whose length is not recorded
    networks_in_order: list[tuple[float | None, LoadedGenerator | Path]] = [
        (0.0, comparison.before),
        *snapshots,
        *final_network,
    ]
    available_by_measure = {
        PROXY: True,
        SECOND: comparison.held_out is not None,
        ORACLE: comparison.synthetic,
    }
    scores_by_measure = {
        measure_name: list[np.ndarray]()
        for measure_name, is_available in available_by_measure.items()
        if is_available
    }
    density_before = None  # densities before tuning
    distances = []  # [N] for each network
    for _, network_or_path in networks_in_order:
        # a snapshot is in memory only while it is measured
        generator = comparison.load(network_or_path) if isinstance(network_or_path, Path) else network_or_path
        sigma = densities(comparison, generator, seeds)
        density_before = sigma if density_before is None else density_before
        distances.append(density_l1(sigma, density_before).double().numpy())  # [N]
        for measure_name, scores in scores_by_measure.items():
            scores.append(
                utilities(generator.generator, seeds)
                if measure_name == ORACLE
                else comparison.scores(generator, seeds, held_out=measure_name == SECOND).double().numpy()
            )
    # [N, T]
    columns_by_measure = {
        measure_name: np.stack(scores, axis=1) for measure_name, scores in scores_by_measure.items()
    }
    curve_by_measure = {}  # curve by measure
    table_rows = []  # one row for each measure and network
    for measure_name, measure_scores in columns_by_measure.items():
        std_before = float(measure_scores[:, 0].std(ddof=1)) or 1.0  # a constant measure keeps its unit
        mean_by_network = compute_column_means((measure_scores - measure_scores[:, :1]) / std_before)
        # index into `networks_in_order`; the proxy cannot diverge from itself
        divergence_index = (
            None if measure_name == PROXY else divergence(columns_by_measure[PROXY], measure_scores)
        )
        curve_by_measure[measure_name] = {
            "steps": mean_by_network,
            "standard_deviation": std_before,
            "divergence": divergence_index,
        }
        table_rows += [
            {
                "measure": measure_name,
                "kimg": kimg,
                "distance": float(distances[network_index].mean()),  # raw density
                "raw_mean": float(measure_scores[:, network_index].mean()),  # in the measure's own unit
                **mean_by_network[network_index],
            }
            for network_index, (kimg, _) in enumerate(networks_in_order)
        ]
    finding_data = {
        "distance": [float(network_distances.mean()) for network_distances in distances],
        "kimg": [kimg for kimg, _ in networks_in_order],  # None: the final network, which is not a snapshot
        "curves": curve_by_measure,
    }
    sentences = [
        *_describe_curves(comparison, finding_data),
        *([NO_SNAPSHOTS] if len(networks_in_order) < 3 else []),
    ]
    return Finding(
        facts=comparison.facts(seeds, CURVE_ROLES, BOOTSTRAP),
        data=finding_data,
        rows=table_rows,
        says=sentences,
    )


def independence(comparison: Comparison) -> str:
    """Describe how independent the held-out reward is of the tuned reward.

    The text follows from the recorded provenance of both rewards: their files, labels and seeds.
    """
    if comparison.held_out is None:
        return NO_SECOND
    tuned_provenance = comparison.reward.provenance
    heldout_provenance = comparison.held_out.provenance
    heldout_text = "The held-out reward took no part in tuning this generator's weights"
    # a user may name the tuned reward by mistake, which would look like perfect agreement
    if settings_of(comparison.run).get("hashes", {}).get("reward") == comparison.held_out_hash:
        return (
            "The run optimised the reward that was given as held-out reward, so this reward is not held out."
            " Pass another reward's file to --heldout-reward."
        )
    if not (comparison.reward.labels and comparison.held_out.labels):
        # The list of labels is an optional part of a reward's provenance.
        return (
            f"{heldout_text}. The files do not record whether it was trained on other labels than the tuned"
            " reward."
        )
    seed_text = (
        "another seed" if tuned_provenance.get("seed") != heldout_provenance.get("seed") else "the same seed"
    )
    # one common label is enough, since both rewards then share its error
    if comparison.reward.labels & comparison.held_out.labels:
        return (
            f"{heldout_text}, but it was trained on the same labels with {seed_text}. It shares the errors of"
            " these labels, so a rise of both rewards is weaker evidence. Train a reward on other labels, and"
            " pass its file to --heldout-reward."
        )
    return f"{heldout_text}. It was trained on other labels with {seed_text}."


def _describe_curves(comparison: Comparison, finding_data: dict) -> list[str]:
    """Describe the curves, the divergences and the limits of the comparison in sentences.

    Args: finding_data: data of the finding of `overoptimisation`.
    """
    # the last network of the curve against the one before tuning
    last_step_by_name = {
        measure_name: curve["steps"][-1] for measure_name, curve in finding_data["curves"].items()
    }
    sentences = [
        f"The {measure_name} changes by {span(last_step['mean'], last_step['lo'], last_step['hi'], '+.2f')}"
        " of its standard deviations before tuning."
        for measure_name, last_step in last_step_by_name.items()
    ]
    for measure_name, curve in finding_data["curves"].items():
        if measure_name != PROXY and curve["divergence"] is None:
            sentences.append(
                f"No divergence: the {measure_name} is not shown to fall after its peak while the tuned"
                " reward rises."
            )
        elif measure_name != PROXY:
            divergence_kimg = finding_data["kimg"][curve["divergence"]]  # None: the final network
            start_text = "the end" if divergence_kimg is None else f"{number_text(divergence_kimg)} kimg"
            sentences.append(
                f"Divergence: the {measure_name} falls from {start_text} on (distance"
                f" {finding_data['distance'][curve['divergence']]:.3g}) while the tuned reward rises. Stop"
                " there, or raise --lambda-sigma."
            )
    sentences += [
        independence(comparison),
        (
            "The distance is not a KL divergence, since a GAN has no explicit likelihood. It only orders the"
            " networks."
        ),
    ]
    return [
        *sentences,
        (
            "The labels are noisy answers of the oracle, which is a formula. The oracle therefore shows if"
            " tuning reached what the labels ask for. It is not independent evidence; the geometry measures"
            " are, since no label used them."
            if comparison.synthetic
            else "There is no oracle, since it applies only to synthetic data. Ask people which shapes are"
            " better."
        ),
    ]


@style.plot(
    size=(9.4, 3.4),  # inches
    xlabel=DISTANCE,
    ylabel="mean change, standard deviations before",
    title="Over-optimisation",
)
def plot_curves(axes, finding_data: dict):
    """Plot every measure over the distance from the network before tuning.

    A dashed line marks each divergence.

    Args: finding_data: data of the finding of `overoptimisation`.
    """
    colour_by_measure = {
        PROXY: style.colour("reward"),
        SECOND: style.colour("held-out"),
        ORACLE: style.CYCLE[4],
    }
    distances = finding_data["distance"]
    for measure_name, curve in finding_data["curves"].items():
        style.band(
            axes, distances, curve["steps"], colour_by_measure[measure_name], measure_name, markersize=4
        )
        if curve["divergence"] is not None:
            axes.axvline(
                distances[curve["divergence"]],
                color=colour_by_measure[measure_name],
                linestyle="--",
                linewidth=1.2,
                label=f"{measure_name}: divergence",
            )
    axes.axhline(0, color=style.colour("noise"), linewidth=1)
