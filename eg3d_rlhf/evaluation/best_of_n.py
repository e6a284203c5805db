"""Measure before any tuning how far a reward can be trusted: select the best of n latents by the reward, and
value it by an evaluator.

The more samples a reward selects from, the more it selects by its errors: the evaluator's mean rises,
flattens, and falls (Gao et al. 2022, arXiv 2210.10760). Selecting the best of n moves the samples by KL = log
n - (n - 1) / n nats. With d = sqrt(KL) the gain by the other measure follows d (alpha - beta d), which peaks
at d* = alpha / (2 beta).

Letters: N latents, T values of n, B resamples, A arms: single rewards, an ensemble's members, and its
aggregates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import choose_device, file_hash, naming
from eg3d_rlhf.core.seeds import BEST_OF_N
from eg3d_rlhf.evaluation.comparison import judged_by_annotator
from eg3d_rlhf.evaluation.paired import span
from eg3d_rlhf.experiments import pages, style, version_0_1
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range, write_page
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.rewards.aggregates import AVERAGE, KINDS, Aggregate
from eg3d_rlhf.rewards.cache import untuned
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, Standard, average_weights
from eg3d_rlhf.rewards.observations import OBSERVATIONS, Observation
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward, untaught
from eg3d_rlhf.tuning.gan.heldout_metrics import utilities
from eg3d_rlhf.tuning.gan.phase import CUTOFF
from training.progress import tqdm

# Exact expectations of the best of n by one measure, valued by another; their intervals; and the law that
# they follow.


def chances(total: int, n: int) -> np.ndarray:
    """Compute the probability of the i-th of `total` in ascending order to be the best of n, drawn without
    replacement: C(i - 1, n - 1) / C(N, n), [N].
    """
    # Ratios of neighbours, multiplied from the top down: the binomials themselves would overflow.
    i = np.arange(total, 1, -1)
    falling = np.cumprod(np.clip((i - n) / (i - 1), 0, None))  # ratio of the (i - 1)-th to the largest
    # The largest of all is the best with probability n / N; reversed into ascending order
    return n / total * np.concatenate([[1.0], falling])[::-1]


def best_of(reward: np.ndarray, evaluator: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Compute the evaluator's expected value of the best of n by the reward, for every n: exact over all
    subsets of the latents.

    Args: reward, evaluator: [N]; numbers: each 1 to N.
    Returns: [T]; n = 1 gives the evaluator's mean, n = N the value of the top latent.
    """
    ranked = by_rank(reward, evaluator)[1]
    return np.array([chances(len(ranked), n) @ ranked for n in numbers])


def by_rank(reward: np.ndarray, evaluator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the latents by reward.

    Returns: the latents in ascending order of reward [N], and the evaluator's values in that order; values of
        equal rewards are averaged.
    """
    # Latents of equal reward get the mean of their group, as if ties were resolved at random.
    _, place, count = np.unique(reward, return_inverse=True, return_counts=True)
    return np.argsort(reward, kind="stable"), np.repeat(np.bincount(place, evaluator) / count, count)


def divergence_of(numbers: Sequence[int]) -> np.ndarray:
    """Compute the KL divergence of the best of n from one sample, in nats."""
    n = np.asarray(numbers, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def fit(distance: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Fit gain = d (alpha - beta d) by least squares: distance [T], gain [..., T] -> alpha and beta, [...,
    2].
    """
    return gain @ np.linalg.pinv(np.stack([distance, -(distance**2)], axis=1)).T


def peak(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Compute d* = alpha / (2 beta), at least 0; infinite if the fit never falls."""
    # The inner `where` avoids a division by zero in the branch that is not used.
    return np.where(beta > 0, np.maximum(alpha, 0) / np.where(beta > 0, 2 * beta, 1), np.inf)


def number_at(distance: float) -> float:
    """Return the n whose best of n lies at this distance sqrt(KL)."""
    # Solves log n - 1 + 1 / n = d^2 for log n; the left side is 0 at n = 1 and increases.
    x = (
        brentq(lambda log_n: log_n - 1 + np.exp(-log_n) - distance**2, 0, distance**2 + 2)
        if distance > 0
        else 0.0
    )
    return float(np.exp(x))


def resampled(
    reward: np.ndarray, evaluator: np.ndarray, numbers: Sequence[int], counts: np.ndarray
) -> np.ndarray:
    """Compute `best_of` over resamples of the latents: counts [B, N], the multiplicity of each latent -> [B,
    T].
    """
    order, ranked = by_rank(reward, evaluator)
    # Row t weights the sorted evaluator's values.
    table = np.stack([chances(len(ranked), n) for n in numbers])  # [T, N]
    # A resample keeps the order of the latents, so it needs no sorting.
    return np.stack([table @ np.repeat(ranked, latent_counts[order]) for latent_counts in counts])


SCORES = "scores"  # keys of the two parts
CURVES = "best-of-n"
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
    most: int = 512  # largest n to select from
    psi: float = 1.0  # truncation
    seed: int = 0  # shifts the held-out latents
    batch: int = 16  # shapes at once

    def __post_init__(self) -> None:
        if self.most > self.n:
            raise ValueError(
                f"--most: expected at most --n={self.n}, got {self.most}. Lower it, or raise --n."
            )

    @property
    def numbers(self) -> list[int]:
        """Return the values of n: 1 to `most`, two per octave."""
        return sorted({*(round(2 ** (k / 2)) for k in range(64) if 2 ** (k / 2) <= self.most), self.most})

    @property
    def seeds(self) -> range:
        """Return the latents.

        Their range is used by no other report, so rewards may be selected by this one.
        """
        return BEST_OF_N.take(self.n, self.seed)

    def networks(self) -> dict[str, str]:
        """Return the hashes of the generator, the rewards and the evaluator."""
        evaluator = {} if self.evaluator is None else {"evaluator": self.evaluator[1]}
        return {
            "generator": self.generator.hash,
            **{name: digest for name, (_, digest) in self.rewards.items()},
            **evaluator,
        }

    def facts(self) -> Facts:
        """Return the facts that the figures state."""
        return Facts(
            n=self.n, seeds=seed_range(self.seeds), psi=self.psi, networks=self.networks(), interval=INTERVAL
        )


Joined = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # members' scores by name -> scores of an arm [N]


def arms(trial: Trial) -> tuple[dict[str, Reward], dict[str, Joined]]:
    """Return the arms: rewards to evaluate (single ones, members, averages of weights), and aggregates, which
    follow from the members' scores.
    """
    single: dict[str, Reward] = {}  # arms that a network scores
    joined: dict[str, Joined] = {}  # arms that aggregate members' scores
    for name, (reward, _) in trial.rewards.items():
        # Names of members carry the ensemble's name if there are several rewards.
        before = f"{name}: " if len(trial.rewards) > 1 else ""
        network = reward.network  # one network, or an ensemble of them
        if not isinstance(network, RewardEnsemble):
            single[name] = reward
            continue
        # also the keys of the members' scores
        names = [f"{before}member {i + 1}" for i in range(len(network.members))]
        single.update(zip(names, reward.members(), strict=True))
        # Members that start from common weights can be averaged; `start` records that they do.
        if reward.provenance.get("start"):
            single[f"{before}{AVERAGE}"] = Reward(
                reward.observation, average_weights(network.members), reward.provenance
            )
        standard = network.standard
        # An ensemble of raw scores has no statistics of its members; compute them on untuned samples.
        if standard is None:
            seen = untuned(trial.generator.generator, reward.observation, trial.psi, CUTOFF, trial.batch)
            standard = Standard.of(network.members, seen)
        for kind in KINDS:
            # The ensemble's own aggregate keeps its strength; the others use their default.
            aggregate = network.aggregate if kind == network.aggregate.kind else Aggregate(kind)
            ensemble = RewardEnsemble(network.members, aggregate, standard)
            strength = "" if aggregate.strength is None else f" {aggregate.strength:g}"
            joined[f"{before}{kind}{strength}"] = partial(_join, ensemble, names)
    return single, joined


def _join(ensemble: RewardEnsemble, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Aggregate the members' scores into those of an arm, [N]."""
    return ensemble.joined([torch.from_numpy(scores[name]) for name in names]).numpy()


@torch.no_grad()
def score(trial: Trial, _folder: Path, quiet: bool = False) -> Finding:
    """Score every latent by all single arms and by the evaluator, in one pass."""
    generator = trial.generator.generator
    single, _ = arms(trial)  # aggregates follow from the members' scores
    scores: dict[str, list[float]] = {name: [] for name in single}
    evaluated: list[float] = []  # the evaluator's values, [N]
    ws = ws_of_seeds(generator, trial.seeds, truncation_psi=trial.psi, truncation_cutoff=CUTOFF)
    with tqdm(
        total=trial.n, desc="latents", unit="latent", disable=quiet, leave=False, dynamic_ncols=True
    ) as bar:
        for start, part in zip(range(0, trial.n, trial.batch), ws.split(trial.batch), strict=True):
            field = generator.field(part)
            # Rewards that read the same input share it.
            seen = dict[Observation, torch.Tensor]()
            # The evaluator, if it is a reward, is an entry without a name.
            for name, reward in (*single.items(), *([("", trial.evaluator[0])] if trial.evaluator else [])):
                kind = reward.observation  # rewards of the same kind read the same input
                if kind not in seen:
                    seen[kind] = kind.observe(field)
                (scores[name] if name else evaluated).extend(reward.score_observed(seen[kind]).tolist())
            if trial.evaluator is None:
                evaluated += utilities(generator, trial.seeds[start : start + len(part)], trial.psi).tolist()
            bar.update(len(part))
    columns = {**scores, "evaluator": evaluated}  # one column per arm
    rows = [
        {"seed": seed, **{name: column[i] for name, column in columns.items()}}
        for i, seed in enumerate(trial.seeds)
    ]
    return Finding(facts=trial.facts(), data={"scores": scores, "evaluator": evaluated}, rows=rows)


def curves(trial: Trial, scores: Finding, _folder: Path) -> Finding:
    """Compute every arm's curve with intervals, its fit and peak, and the aggregates against the members."""
    single, joined = arms(trial)
    known = {name: np.asarray(values) for name, values in scores.data["scores"].items()}  # name -> [N]
    values = {**known, **{name: join(known) for name, join in joined.items()}}
    evaluator = np.asarray(scores.data["evaluator"])
    numbers = trial.numbers  # [T]
    # Gains are in the evaluator's standard deviations; a constant evaluator has scale 1.
    scale = float(evaluator.std()) or 1.0
    distance = np.sqrt(divergence_of(numbers))  # [T]
    random = np.random.default_rng(0)  # a fixed seed: the page is reproducible
    # [B, N]; the same resamples for all arms, so that arms can be compared in pairs
    counts = np.stack(
        [np.bincount(random.integers(trial.n, size=trial.n), minlength=trial.n) for _ in range(RESAMPLES)]
    )
    curve_by_arm = {}
    last = {}
    rows = []
    for name, reward in values.items():
        exact = best_of(reward, evaluator, numbers)  # [T]
        draws = resampled(reward, evaluator, numbers, counts)  # [B, T]
        # Relative to n = 1, in each resample, too
        gain = (exact - exact[0]) / scale
        gains = (draws - draws[:, :1]) / scale
        alpha, beta = fit(distance, gain)  # of all latents
        fits = fit(distance, gains)  # [B, 2], one fit per resample
        reward_gain = (best_of(reward, reward, numbers) - reward.mean()) / (float(reward.std()) or 1.0)
        low, high = np.quantile(gains, [0.025, 0.975], axis=0)  # [T] each
        steps = [
            dict(zip(("mean", "lo", "hi"), map(float, step), strict=True))
            for step in zip(gain, low, high, strict=True)
        ]
        curve_by_arm[name] = {
            "steps": steps,
            "reward": reward_gain.tolist(),
            "fit": [float(alpha), float(beta)],
            "joined": name in joined,
            "peak": [
                _finite(v)
                for v in (
                    # "nearest", since an interpolation between infinite peaks is not defined
                    peak(alpha, beta),
                    *np.quantile(peak(*fits.T), [0.025, 0.975], method="nearest"),
                )
            ],
        }
        last[name] = gain[-1], gains[:, -1]  # the gain at the largest n, and its resamples
        rows += [
            {"arm": name, "n": n, "evaluator": float(exact[t]), **steps[t], "reward": float(reward_gain[t])}
            for t, n in enumerate(numbers)
        ]
    data = {
        "numbers": numbers,
        "kl": divergence_of(numbers).tolist(),
        "arms": curve_by_arm,
        "against": _against(last, single, joined),
    }
    return Finding(facts=trial.facts(), data=data, rows=rows, says=_says(trial, data))


def _finite(value: float) -> float | None:
    """Return None for a value that is not finite: JSON has no infinity."""
    return float(value) if np.isfinite(value) else None


def _against(last: Mapping[str, tuple[float, np.ndarray]], single: Mapping, joined: Mapping) -> list[dict]:
    """Compare each aggregate's last gain with that of the best member and of the mean member.

    The best member is selected by the evaluator itself, which favours it.
    """
    rows = []
    for name in joined if single else ():
        # Members of the same ensemble
        before = name.rpartition(": ")[0]
        members = [member for member in single if member.rpartition(": ")[0] == before and "member" in member]
        best = max(members, key=lambda member: last[member][0])  # by the evaluator
        for title, others in (("best member", [best]), ("mean member", members)):
            value = last[name][0] - np.mean([last[member][0] for member in others])
            # Paired: both gains come from the same resamples.
            low, high = np.quantile(
                last[name][1] - np.mean([last[member][1] for member in others], axis=0), [0.025, 0.975]
            )
            rows.append(
                {"arm": name, "against": title, "mean": float(value), "lo": float(low), "hi": float(high)}
            )
    return rows


def _says(trial: Trial, data: Mapping) -> list[str]:
    """Describe each arm's gain and peak, and the evaluator."""
    most = data["numbers"][-1]
    sentences = []
    reach = np.sqrt(data["kl"][-1])  # d at the largest n
    for name, arm in data["arms"].items():
        end = arm["steps"][-1]
        at, low, high = arm["peak"]
        # A peak beyond the largest n is extrapolated, so it is not reported.
        if at is None or at > reach:
            where = f"no peak up to n = {most}"
        else:
            ends = [f"{v:.2f}" if v is not None else "none" for v in (low, high)]
            where = f"peak of the fit at d = {at:.2f} [{ends[0]}, {ends[1]}], n = {number_at(at):.0f}"
        gain = span(end["mean"], end["lo"], end["hi"], "+.2f")
        sentences.append(
            f"{name}: the best of {most} is {gain} of the evaluator's standard deviations better than a"
            f" mean latent; {where}."
        )
    for row in data["against"]:
        if row["against"] == "best member" and not row["lo"] <= 0 <= row["hi"]:
            sentences.append(
                f"{row['arm']} is {span(row['mean'], row['lo'], row['hi'], '+.2f')} above the member that the"
                " evaluator ranks first."
            )
    evaluator = (
        "the formula from which the labels were sampled with noise"
        if trial.evaluator is None
        else "another reward, which has errors, too"
    )
    return [
        *sentences,
        (
            f"The evaluator is {evaluator}. Selection is a weaker optimisation than tuning: a reward that"
            " fails here will fail there, but not the other way round."
        ),
    ]


def jobs(trial: Trial, quiet: bool = False) -> tuple[Job, Callable[[Finding], Job]]:
    """Return the job of the scores, which takes the time, and a function from its finding to the job of the
    curves.
    """
    evaluator = "annotator" if trial.evaluator is None else "reward"
    known = {"networks": trial.networks(), "evaluator": evaluator}
    # The cache's key has the names of version 0.1, so that its scores stay valid.
    inputs = {**version_0_1.former_trial(known), "psi": trial.psi, "seed": trial.seed, "n": trial.n}
    first = Job(
        key=SCORES,
        title="Scores of single latents",
        compute=partial(score, trial, quiet=quiet),
        inputs=inputs,
    )

    def second(scores: Finding) -> Job:
        """Return the job of the curves, computed from the scores."""
        return Job(
            key=CURVES,
            title="Best of n: the evaluator's value of the selected latents",
            compute=partial(curves, trial, scores),
            plots={"evaluator": plot_evaluator, "reward": plot_reward, "peaks": plot_peaks},
            inputs={**inputs, "most": trial.most},
        )

    return first, second


def _colours(data: Mapping) -> dict[str, str]:
    """Return a colour per arm: grey for members, the cycle's for the others."""
    shown = [name for name, arm in data["arms"].items() if "member" not in name]
    return {
        name: style.CYCLE[shown.index(name) % len(style.CYCLE)] if name in shown else style.colour("noise")
        for name in data["arms"]
    }


KL = "KL = log n - (n - 1)/n (nats)"


@style.plot(
    "small",
    size=(9.4, 4.4),
    xlabel=KL,
    ylabel="evaluator's gain (standard deviations)",
    title="Gain by the evaluator",
)
def plot_evaluator(axes, data: dict):
    """Plot the evaluator's gain over KL: points, and the fits; also the interval if there is one arm."""
    alone = len(data["arms"]) == 1  # one arm: its band can be shown
    kl = np.asarray(data["kl"])
    colours = _colours(data)
    fine = np.linspace(0, kl[-1], 200)  # KL of the fitted curve
    for name, arm in data["arms"].items():
        # Members are thin lines without a fit.
        means = [step["mean"] for step in arm["steps"]]
        if "member" in name:
            axes.plot(kl, means, "-", color=colours[name], linewidth=0.8, label=name)
            continue
        if alone:
            style.band(axes, data["kl"], arm["steps"], colours[name], name, markersize=3, linewidth=0)
        else:  # bands would hide each other; the intervals at the largest n stand in plot_peaks
            axes.plot(kl, means, "o", color=colours[name], label=name, markersize=3)
        axes.plot(
            fine,
            np.sqrt(fine) * (arm["fit"][0] - arm["fit"][1] * np.sqrt(fine)),
            color=colours[name],
            linewidth=1,
        )


@style.plot(
    "small",
    size=(9.4, 3.4),
    xlabel=KL,
    ylabel="reward's gain (standard deviations)",
    title="Gain by the reward itself",
)
def plot_reward(axes, data: dict):
    """Plot every arm's gain by its own reward over KL."""
    for name, ink in _colours(data).items():
        axes.plot(
            data["kl"],
            data["arms"][name]["reward"],
            color=ink,
            label=name,
            linewidth=0.8 if "member" in name else 1.5,
        )


def plot_peaks(data: dict):
    """Plot the position of each fit's peak, and the evaluator's gain at the largest n."""
    names = list(data["arms"])
    colours = _colours(data)
    figure, (left, right) = style.figure(columns=2, size=(9.4, 0.32 * len(names) + 1.2))
    reach = float(np.sqrt(data["kl"][-1]))
    for i, name in enumerate(names):
        arm = data["arms"][name]
        # Peaks beyond the axis, and those that do not exist, are drawn at its right edge.
        at, low, high = (2 * reach if v is None else min(v, 2 * reach) for v in arm["peak"])
        left.errorbar(
            [at],
            [i],
            xerr=[[max(at - low, 0)], [max(high - at, 0)]],
            fmt="o",
            capsize=3,
            markersize=4,
            color=colours[name],
        )
        end = arm["steps"][-1]
        right.errorbar(
            [end["mean"]], [i], xerr=style.errors(end), fmt="o", capsize=3, markersize=4, color=colours[name]
        )
    left.axvline(reach, color=style.colour("noise"), linestyle="--", linewidth=1)
    left.set(
        title=f"Peak of the fit (dashed: n = {data['numbers'][-1]})",
        xlabel="d = sqrt(KL); right edge: none",
        xlim=(0, 2.05 * reach),
    )
    right.set(title=f"Evaluator's gain at n = {data['numbers'][-1]}", xlabel="standard deviations")
    for axis, shown in ((left, names), (right, [""] * len(names))):
        axis.set_yticks(range(len(names)), shown)
        axis.invert_yaxis()
    return figure


def trial_of(before, rewards, heldout_reward, data, device, **sampling) -> Trial:
    """Load the networks that the flags name. Raises: ValueError, FileNotFoundError naming the flag."""
    where = choose_device(device)  # the networks' device
    with naming("--before"):
        generator = load_generator(before, where)
    # A reward that is named twice is tested once.
    paths = dict.fromkeys(rewards or [bundled.REWARD])
    names = {
        path: path.parent.name if path.stem == "reward" and len(paths) > 1 else path.stem for path in paths
    }
    # Names that are not unique are replaced by the paths.
    if len(set(names.values())) < len(names):
        names = {path: str(path) for path in paths}

    def load(path: Path, flag: str):
        """Load a reward and its hash; the name of an observation stands for an untrained reward of that
        kind.
        """
        if (kind := str(path)) in OBSERVATIONS and not path.exists():
            with naming(flag):
                return untaught(kind, generator.generator), f"untaught {kind}"
        with naming(flag):
            reward = load_reward(path, where)
        check_reward(reward, generator.generator, flag)
        return reward, file_hash(path)

    if heldout_reward is None and not judged_by_annotator(generator, data):
        raise ValueError(
            "--heldout-reward: expected a reward as the evaluator, got none; the simulated annotator covers"
            " synthetic heads alone. Name one."
        )
    evaluator = None if heldout_reward is None else load(heldout_reward, "--heldout-reward")
    loaded = {names[path]: load(path, "--reward-ckpt") for path in paths}
    # An evaluator that is among the tested rewards would agree with itself.
    if evaluator is not None and any(
        digest == evaluator[1] or evaluator[0].is_member_of(tested) for tested, digest in loaded.values()
    ):
        raise ValueError(
            "--heldout-reward: expected a reward that is not among the tested ones, got one that is. Train"
            " one on other labels."
        )
    return Trial(generator=generator, rewards=loaded, evaluator=evaluator, **sampling)


def write(trial: Trial, out: Path) -> Finding:
    """Score the latents, compute the curves, and write the page <out>/index.html; return the curves."""
    first, second = jobs(trial)
    last = second(pages.run([first], out)[SCORES])
    findings = pages.run([last], out, quiet=True)
    introduction = (
        f"{trial.n:,} latents of {trial.generator.path.name}, untuned; nothing was trained on them. Each"
        " point is the exact mean, over all ways to draw n of them, of the evaluator's value of the latent"
        " with the highest reward."
    )
    write_page(out / "index.html", TITLE, introduction, [last], findings, findings[CURVES].says)
    return findings[CURVES]
