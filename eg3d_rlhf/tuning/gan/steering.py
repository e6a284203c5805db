"""Steering: find a direction of latents from labels, and move samples along it without any training.

A person compares tens of pairs. A linear reward is fitted to the answers, and distilled into a direction of
the latents; see `steering_directions` for the candidates. Samples whose coordinate along the direction is
below a threshold, the strength, are moved to it (`training.steering`). The weights stay as they are.

Only labels and rewards decide here. No module that this one imports knows the ground truth of a sample; a
test on imports checks it.

    from eg3d_rlhf import load_generator, load_labels, steer

    result = steer(load_generator(), load_labels("labels.jsonl"))
    if result.steering is not None:
        result.write("steered.safetensors")

Shapes: N held-out samples, S samples of the fit, Z = z_dim, W = w_dim.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import STEERING
from eg3d_rlhf.core.statistics import binomial_test
from eg3d_rlhf.generators import (
    Generator,
    LoadedGenerator,
    camera,
    device_of,
    latents,
    shape_count,
    ws_of_seeds,
)
from eg3d_rlhf.preferences.dataset import fold_labels
from eg3d_rlhf.preferences.labels import Preference, labels_hash
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import rate
from eg3d_rlhf.rewards.observations import Observation
from eg3d_rlhf.rewards.reward import Reward, check_reward
from eg3d_rlhf.rewards.stated_accuracy import accuracy_of
from eg3d_rlhf.tuning.gan.steering_directions import (
    CANDIDATES,
    Fitter,
    HalfCosines,
    Samples,
    half_cosines,
    invert,
    randomise,
)
from eg3d_rlhf.tuning.gan.steering_settings import AUTO_LABELS, GRID, SteerOptions
from torch_utils.ops.implementations import implementation
from training import networks, storage
from training.steering import Steering, attach, detach, steering_of

CUTOFF = 14  # layers that truncation affects, as in labels
BATCH = 16  # shapes that are observed at once
SIGNIFICANT = 0.05  # level of the sign test by which one candidate replaces another
MARGIN = 0.03  # accuracy by which it must be better at least
HARM = 0.25  # standard deviations by which a good sample must fall to count as harmed
MOST_HARMED = 0.02  # largest share of harmed samples at an automatic strength
DIRECTION = "direction"
NO_DIRECTION = "no direction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """Direction of latents that labels prefer, and the evidence for it."""

    candidate: str  # name of the candidate, see `steering_directions`
    vector: np.ndarray  # unit vector, [Z] or [W]
    mean: np.ndarray  # space w: mean style vector, [W]; space z: zeros
    std: float  # space w: standard deviation of style vectors along the direction; space z: 1
    accuracy: Mapping[str, Any]  # accuracy of the coordinate on held-out labels, see `evaluation.rate`
    accuracies: Mapping[str, float]  # accuracy of each candidate, by name
    # Agreement of halves of the labels; None where a trained reward alone decides the direction
    cosines: HalfCosines | None
    # True if the reward was trained on other labels, or states an accuracy above chance on held-out ones
    is_reward_trusted: bool = True

    @property
    def space(self) -> str:
        """Space of the direction, "z" or "w"."""
        return CANDIDATES[self.candidate]

    @property
    def is_found(self) -> bool:
        """True if the labels determine a direction better than randomised labels do."""
        # Three conditions: the order of held-out labels, the
        # agreement of halves, and a reward with evidence of its own.
        is_above_chance = self.accuracy["interval_95"][0] > 0.5
        agrees = self.cosines is None or self.cosines.is_above_randomised
        return is_above_chance and agrees and self.is_reward_trusted

    def to_steering(self, strength: float = 1.0, layers: int | None = None) -> Steering:
        """Return the move along this direction.

        Args:
            strength: threshold in standard deviations.
            layers: space w: number of first layers that are moved; None: all.
        """
        return Steering(self.space, len(self.vector), strength, layers).set_direction(
            torch.from_numpy(self.vector), torch.from_numpy(self.mean).float(), self.std
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeringResult:
    """Steering of a generator by labels, with its report."""

    generator: LoadedGenerator
    direction: Direction
    steering: Steering | None  # None: the labels determine no direction
    report: Mapping[str, Any]  # contents of the .json file

    def write(self, path: str | Path) -> Path:
        """Write the steered network as a network file, and the report beside it. Return the path.

        Raises: ValueError if there is no direction, or for a name that does not end in .safetensors.
        """
        if self.steering is None:
            raise ValueError(
                "steer: the labels determine no direction, so there is no steered network. Label more pairs."
            )
        path = check_path(path)
        write_steered(self.generator, self.steering, path)
        self.write_report(path)
        return path

    def write_report(self, path: str | Path) -> Path:
        """Write the report beside a network file. Return its path."""
        report_path = Path(path).with_suffix(".json")
        report_path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(report_path, (json.dumps(self.report, indent=1) + "\n").encode())
        return report_path


def check_path(path: str | Path) -> Path:
    """Return the path of a network file to write. Raise ValueError for another ending than .safetensors."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"--out: expected a file name with the ending .safetensors, got {path.name}. Use"
            f" {path.stem}.safetensors."
        )
    return path


def write_steered(generator: LoadedGenerator, steering: Steering, path: Path) -> None:
    """Write the networks of a generator with a steering. The generator itself stays as it is."""
    # A copy, because attaching replaces the class of a network in place.
    nets = copy.deepcopy(generator.nets)
    # G and G_ema alike, so that training from this file starts from the steered generator
    for network in (nets.G, nets.G_ema):
        if network is not None:
            attach(network, copy.deepcopy(steering))
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the discriminator where there is one, also without G: the file can then be tuned.
    networks.save(path, nets)


def write_plain(generator: LoadedGenerator, path: Path) -> None:
    """Write the networks of a generator without any steering: the undo of `write_steered`.

    A network file without steering is copied byte by byte.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writing the networks again would change the bytes of the file, and with them its hash.
    if steering_of(generator.nets.G_ema) is None and generator.path.suffix == ".safetensors":
        storage.write_atomic(path, generator.path.read_bytes())
        return
    nets = copy.deepcopy(generator.nets)
    for network in (nets.G, nets.G_ema):
        if network is not None:
            detach(network)
    networks.save(path, nets)


def check_generator(generator: LoadedGenerator) -> None:
    """Raise ValueError if the latents of a generator cannot be moved, or are moved already."""
    # Files of finished shapes have a latent for each shape, but nothing between two latents.
    if shape_count(generator.generator) is not None:
        raise ValueError(
            f"--network: {generator.path} has a finite number of shapes and no latents between them. Choose"
            " among its shapes by a reward instead (eg3d-rlhf reward best-of-n)."
        )
    if steering_of(generator.nets.G_ema) is not None:
        raise ValueError(
            f"--network: {generator.path} is steered already. Steer the network from which it was made, or"
            " remove its steering with --strength=0 first."
        )


def check_inputs(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    options: SteerOptions,
    reward: Reward | None = None,
) -> list[Preference]:
    """Check everything that `steer` needs before it observes samples. Return the labels without ties.

    Raises: ValueError, see `steer`.
    """
    check_generator(generator)
    linear.check_labels(generator, labels)
    decided_labels = linear.usable_labels(labels)
    if reward is not None:
        check_reward(reward, generator.generator, "--reward")
    strength = options.threshold
    if strength == 0:
        raise ValueError("steer: the strength 0 moves nothing. Use `write_plain`, or a strength above 0.")
    if strength is None and len(decided_labels) < AUTO_LABELS:
        raise ValueError(
            f"--strength=auto needs at least {AUTO_LABELS} labels without ties, got {len(decided_labels)}."
            " Use --strength=1, or label more pairs."
        )
    # A latent has the length sqrt(Z). A coordinate cannot be larger than the length of the vector.
    if strength is not None and strength**2 >= generator.generator.z_dim:
        raise ValueError(
            f"--strength: expected a strength below {math.sqrt(generator.generator.z_dim):.3g}, the length of"
            f" a latent, got {options.strength}. Use --strength=1."
        )
    return decided_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """Observed samples of a fit: labelled ones and unlabelled ones."""

    samples: Samples
    labels: Sequence[Preference]  # labels without ties
    store: ObservationCache
    observation: Observation  # observation of the linear reward
    pca: linear.PrincipalComponents
    psi: float

    def fit_reward(self, labels: Sequence[Preference], seed: int = 0) -> linear.LinearFit:
        """Fit a linear reward to some of the labels."""
        features = self.samples.features
        assert features is not None
        feature_of_seed = dict(zip(self.samples.seeds, features, strict=True))
        return linear.fit_linear(self.pca, feature_of_seed, labels, self.observation.shape, seed)


def collect_samples(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    options: SteerOptions,
    reward: Reward | None = None,
    cache: Path | None = None,
    store: ObservationCache | None = None,
    on_observed: Callable[[int], None] | None = None,
) -> Collected:
    """Observe the labelled samples and the unlabelled ones, and compute their latents and features.

    Args:
        generator: generator of the labelled samples.
        labels: labels of pairs; ties are ignored.
        options: settings.
        reward: trained reward that scores the samples; None: a linear reward is fitted to the labels.
        cache: folder in which observations are stored; None: memory only.
        store: observations that several fits share; None: new ones.
        on_observed: function that is called with the number of samples after each batch.
    Raises: ValueError for labels of another generator, and for too few labels.
    """
    psi = linear.check_labels(generator, labels)
    decided_labels = linear.usable_labels(labels)
    seeds = [
        *linear.labelled_seeds(decided_labels),
        *linear.unlabelled_seeds(options.unlabelled, decided_labels),
    ]
    observation = linear.slab_of(generator.generator, options.resolution)
    if store is None:
        # All samples have the truncation of the labelled ones, because the answers were given for those.
        store = linear.observe_samples(
            generator, observation, seeds, psi=psi, cutoff=CUTOFF, cache=cache, on_observed=on_observed
        )
    else:
        store.fill(seeds, on_drawn=on_observed)
    # The unlabelled samples determine the components, so that tens of labels suffice for their weights.
    pca = linear.principal_components(store, seeds)
    scores = None
    if reward is not None:
        reward_store = linear.observe_samples(
            generator, reward.observation, seeds, psi=psi, cutoff=CUTOFF, cache=cache
        )
        scores = score(reward, reward_store.take(seeds))
    # [S, Z]. The mapping normalises z, so a regression on vectors
    # of different lengths would see noise that has no effect.
    z = latents(seeds, generator.generator.z_dim).double()
    samples = Samples(
        seeds=seeds,
        z=(z * (math.sqrt(z.shape[1]) / z.norm(dim=1, keepdim=True))).numpy(),
        # [S, L, W] -> [S, W]: the first layer, which always is truncated.
        w=ws_of_seeds(generator.generator, seeds, psi, CUTOFF)[:, 0].double().cpu().numpy(),
        features=pca.project(store, seeds),
        scores=scores,
    )
    collected = Collected(
        samples=samples, labels=decided_labels, store=store, observation=observation, pca=pca, psi=psi
    )
    if reward is None:
        # The ridge is chosen once with all labels. Choosing it
        # for each half of the labels would add noise to the test.
        ridge = collected.fit_reward(decided_labels, options.seed).ridge
        collected = dataclasses.replace(collected, samples=dataclasses.replace(samples, reward_ridge=ridge))
    return collected


@torch.no_grad()
def score(reward: Reward, observations: torch.Tensor) -> np.ndarray:
    """Compute the scores [N], float64, of observations [N, ...]."""
    scores = [reward.score_observed(batch.float()) for batch in observations.split(BATCH)]
    return torch.cat(scores).double().cpu().numpy()


def direction_of(
    samples: Samples,
    labels: Sequence[Preference],
    space: str = "auto",
    seed: int = 0,
    is_reward_trusted: bool = True,
) -> Direction:
    """Choose a candidate direction by its accuracy on held-out labels, and test whether it is one.

    The first candidate is kept unless a later one orders clearly more held-out labels correctly (see
    `choose_candidate`). A choice by the largest accuracy alone often takes w for a difference by chance, and
    moves in w harm more: see docs/lab-book/2026-11-steering.md.

    Args:
        samples: all samples.
        labels: labels without ties.
        space: "z", "w", or "auto" for both.
        seed: random seed of folds and splits.
        is_reward_trusted: False if a trained reward states no accuracy above chance.
    """
    winners, losers = samples.pairs(labels)
    # All labels of a pair share a fold.
    folds = fold_labels(labels, linear.FOLDS, seed)
    # The folds are the same for all candidates, so that their accuracies can be compared.
    is_correct: dict[str, np.ndarray] = {}
    fitters = {}
    for candidate, candidate_space in CANDIDATES.items():
        if space not in ("auto", candidate_space):
            continue
        fitters[candidate] = Fitter(samples, candidate)
        # [P]: how much farther the winner lies along a direction that was fitted without its pair
        margins = fitters[candidate].held_out_margins(winners, losers, folds)
        is_correct[candidate] = margins > 0
    chosen = choose_candidate(is_correct)
    rates = {candidate: rate(is_correct[candidate], labels) for candidate in is_correct}
    fitter = fitters[chosen]
    # After the choice, the direction is fitted to all labels.
    vector, mean, std = fitter.to_latent(fitter.fit(winners, losers))
    return Direction(
        candidate=chosen,
        vector=vector,
        mean=mean,
        std=std,
        accuracy=rates[chosen],
        accuracies={candidate: rates[candidate]["accuracy"] for candidate in rates},
        cosines=half_cosines(fitter, labels, seed) if fitter.uses_labels else None,
        is_reward_trusted=is_reward_trusted or fitter.uses_labels,
    )


def choose_candidate(is_correct: Mapping[str, np.ndarray]) -> str:
    """Return the name of the first candidate that no later one exceeds clearly.

    A later candidate must be better by a paired sign test, and by MARGIN: with thousands of labels a sign
    test also finds differences that do not matter.

    Args: is_correct: True for each held-out label that a candidate orders correctly, [P], by its name.
    """
    chosen, *later_candidates = is_correct
    for candidate in later_candidates:
        # Only labels on which both candidates disagree carry
        # information about their difference (McNemar's test).
        gained = int((is_correct[candidate] & ~is_correct[chosen]).sum())
        lost = int((is_correct[chosen] & ~is_correct[candidate]).sum())
        is_relevant = gained - lost >= MARGIN * len(is_correct[chosen])
        if gained > lost and is_relevant and binomial_test(gained, gained + lost) < SIGNIFICANT:
            chosen = candidate
    return chosen


def find_direction(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    *,
    reward: Reward | None = None,
    space: str = "auto",
    options: SteerOptions | None = None,
    cache: Path | None = None,
    on_observed: Callable[[int], None] | None = None,
) -> Direction:
    """Find the direction of latents that labels prefer.

    Args:
        generator: generator of the labelled samples.
        labels: labels of pairs; ties are ignored.
        reward: trained reward, which scores the samples; None: a linear reward is fitted to the labels.
        space: "z", "w", or "auto" for the more accurate one.
        options: other settings; None: the defaults.
        cache: folder in which observations are stored; None: memory only.
        on_observed: function that is called with the number of samples after each batch.
    Raises: ValueError for labels of another generator, too few labels, or a generator without latents.
    """
    options = options or SteerOptions()
    check_generator(generator)
    collected = collect_samples(generator, labels, options, reward, cache, on_observed=on_observed)
    is_trusted = reward is None or is_above_chance(reward, labels)
    return direction_of(collected.samples, collected.labels, space, options.seed, is_trusted)


def is_above_chance(reward: Reward, labels: Sequence[Preference]) -> bool:
    """Return False if a reward was trained on these labels and states no accuracy above chance on others."""
    # The held-out accuracy of the reward is needed only where
    # its training labels are the labels of this steering.
    if labels_hash(labels) not in reward.labels:
        return True
    accuracy = accuracy_of(reward.provenance)
    return accuracy is not None and not accuracy.is_weak


class HeldOutSamples:
    """Held-out samples before and after a steering, as the rewards observe them.

    Args:
        generator: generator of the samples.
        observations: observations that the rewards read, without repetitions.
        count: number N of samples.
        psi: truncation psi of the samples.
        on_observed: function that is called with N after each measurement.
    """

    def __init__(
        self,
        generator: Generator,
        observations: Sequence[Observation],
        count: int,
        psi: float,
        on_observed: Callable[[int], None],
    ):
        self.generator = generator
        self.observations = observations
        self.psi = psi
        self.z = latents(STEERING.take(count), generator.z_dim).to(device_of(generator))  # [N, Z]
        # Kept, so that samples which a steering does not move can be recognised.
        self.ws = self._map(self.z)  # [N, L, W]
        self._on_observed = on_observed
        self.before = self._observe(self.ws)
        on_observed(count)

    @torch.no_grad()
    def _map(self, z: torch.Tensor) -> torch.Tensor:
        """Map latents [N, Z] to style vectors [N, L, W], with the frontal camera."""
        return self.generator.mapping(
            z, camera(self.generator, n=len(z)), truncation_psi=self.psi, truncation_cutoff=CUTOFF
        )

    @torch.no_grad()
    def _observe(self, ws: torch.Tensor) -> list[torch.Tensor]:
        """Observe style vectors [N, L, W]: one tensor [N, ...] in half precision for each observation."""
        batches = []
        # The fastest operators of this machine. Before and after
        # are observed with the same ones, so rounding cancels.
        with implementation("auto"):
            for ws_batch in ws.split(BATCH):
                field = self.generator.field(ws_batch)
                batches.append([observation.observe(field).half() for observation in self.observations])
        # One list for each batch is turned into one tensor for each observation.
        return [torch.cat(tensors) for tensors in zip(*batches, strict=True)]

    def after(self, steering: Steering) -> list[torch.Tensor]:
        """Observe all samples after a steering. Samples that it does not move are not computed again."""
        steering = copy.deepcopy(steering).to(self.z.device)
        # exactly one of the two moves changes something, by the space of the steering
        moved_z = steering.move_z(self.z)
        moved_ws = steering.move_ws(self._map(moved_z) if steering.space == "z" else self.ws)
        # [N, L, W] -> [N]: a sample is moved if any of its layers is.
        is_moved = (moved_ws != self.ws).flatten(1).any(dim=1)
        observed = [tensor.clone() for tensor in self.before]
        if is_moved.any():
            for tensor, moved in zip(observed, self._observe(moved_ws[is_moved]), strict=True):
                tensor[is_moved] = moved
        self._on_observed(len(self.z))
        return observed


def harmed_share(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of the samples above the median that fall by .25 standard deviations.

    Args: before, after: scores [N] of the same samples by a held-out reward.
    """
    # Samples below the median are those that steering should change.
    # The same samples are compared, so the fall is paired.
    is_good = before > np.median(before)
    # HARM standard deviations of the scores, so that the limit does not depend on the scale of the reward.
    return float((after < before - HARM * before.std())[is_good].mean())


def choose_strength(frontier: Sequence[Mapping[str, Any]], heldout_before: float) -> float:
    """Return the largest strength at which the held-out reward still rises and hardly a sample is harmed.

    Args:
        frontier: entries with strength, heldout and harmed, by ascending strength.
        heldout_before: mean held-out reward without steering.
    Returns: the strength; 0 if the smallest one already lowers the held-out reward or harms too many samples.
    """
    chosen = 0.0
    previous = heldout_before
    for entry in frontier:
        # The first strength that fails ends the search. A later rise would be a jump over a harmful region.
        if not entry["heldout"] > previous or entry["harmed"] > MOST_HARMED:
            break
        chosen = entry["strength"]
        previous = entry["heldout"]
    return chosen


def step_count() -> int:
    """Return the number of measurements of the held-out samples in `steer`, for a progress bar."""
    # before, the strengths of the frontier, the final direction, and the two controls
    return 1 + len(GRID) + 3


def steer(
    generator: LoadedGenerator | str | Path | None,
    labels: Sequence[Preference],
    *,
    reward: Reward | None = None,
    options: SteerOptions | None = None,
    cache: Path | None = None,
    on_observed: Callable[[int], None] = lambda count: None,
) -> SteeringResult:
    """Find a direction of latents from labels, choose its strength, and compare rewards before and after.

    Args:
        generator: generator of the labelled samples, its file or run folder, or None for the bundled one.
        labels: labels of pairs; ties are ignored.
        reward: trained reward, which scores the samples; None: a linear reward is fitted to the labels.
        options: settings; None: the defaults.
        cache: folder in which observations are stored; None: memory only.
        on_observed: function that is called with the number of samples after each batch.
    Raises: ValueError for labels of another generator, too few labels, a generator without latents, or a
        strength that is not allowed.

    >>> from eg3d_rlhf import load_labels  # doctest: +SKIP
    >>> steer(None, load_labels("assets/labels.jsonl")).report["verdict"]  # doctest: +SKIP
    'direction'
    """
    start_time = time.monotonic()
    options = options or SteerOptions()
    if not isinstance(generator, LoadedGenerator):
        from eg3d_rlhf.generators import load_generator

        generator = load_generator(generator)
    # All errors of a user are raised here, before the first sample is observed.
    decided_labels = check_inputs(generator, labels, options, reward)
    collected = collect_samples(generator, labels, options, reward, cache, on_observed=on_observed)
    # A reward that was trained on these labels would confirm its own errors.
    is_trusted = reward is None or is_above_chance(reward, labels)
    direction = direction_of(collected.samples, collected.labels, options.space, options.seed, is_trusted)
    ridge = None if reward is not None else collected.samples.reward_ridge
    report: dict[str, Any] = {
        "labels": len(decided_labels),
        "space": direction.space,
        "candidate": direction.candidate,
        # Facts of the linear fit have no meaning for a trained reward, and are null in the file.
        "components": None if reward is not None else len(collected.pca.components),
        "ridge": ridge,
        "accuracy": direction.accuracy["accuracy"],
        "accuracy_interval": list(direction.accuracy["interval_95"]),
        "accuracies": dict(direction.accuracies),
        "half_cosine": None if direction.cosines is None else direction.cosines.labels,
        "half_cosine_randomised": None if direction.cosines is None else direction.cosines.bound,
        "strength": None,
        "verdict": DIRECTION if direction.is_found else NO_DIRECTION,
        **dict.fromkeys(("reward_before", "reward_after", "heldout_before", "heldout_after", "harmed")),
        "control": None,
        "frontier": [],
        "generator": generator.hash,
        "latents": options.latents,
        "psi": collected.psi,
        "seed": options.seed,
    }
    steering = None
    # Without a direction nothing is compared, which saves most of the time.
    if direction.is_found:
        comparison = _compare(generator, collected, direction, reward, options, on_observed)
        report |= comparison
        if comparison["strength"] > 0:
            steering = direction.to_steering(comparison["strength"], options.layers)
        else:
            report["verdict"] = NO_DIRECTION
    report["seconds"] = round(time.monotonic() - start_time, 2)
    return SteeringResult(generator=generator, direction=direction, steering=steering, report=report)


def _compare(
    generator: LoadedGenerator,
    collected: Collected,
    direction: Direction,
    reward: Reward | None,
    options: SteerOptions,
    on_observed: Callable[[int], None],
) -> dict[str, Any]:
    """Choose the strength, and measure rewards before and after it on held-out samples.

    The labels are split 60 to 40. The larger part gives a direction, whose frontier over strengths a reward
    of the smaller part evaluates. The final direction uses all labels.

    Returns: entries of the report.
    """
    labels = collected.labels
    folds = fold_labels(labels, linear.FOLDS, options.seed)
    # The folds are the same as in `direction_of`, so
    # that labels which share a sample stay in one part
    # where possible. two of five folds
    heldout_labels = [label for label, fold in zip(labels, folds, strict=True) if fold < 2]
    fit_labels = [label for label, fold in zip(labels, folds, strict=True) if fold >= 2]
    # Both parts must be large enough for a fit of their own.
    if min(len(heldout_labels), len(fit_labels)) < linear.MIN_LABELS:
        # With fewer than 25 labels there is no held-out reward.
        heldout_labels = []
    slab = collected.observation

    def linear_reward(some_labels: Sequence[Preference]) -> Reward:
        """Fit a linear reward to some of the labels."""
        return Reward(slab, collected.fit_reward(some_labels, options.seed).network)

    scoring_reward = linear_reward(labels) if reward is None else reward
    observations = [slab] if scoring_reward.observation == slab else [slab, scoring_reward.observation]
    held_out = HeldOutSamples(generator.generator, observations, options.latents, collected.psi, on_observed)

    def reward_of(observed: Sequence[torch.Tensor]) -> np.ndarray:
        """Score observed samples with the reward of all labels, or the trained one."""
        return score(scoring_reward, observed[-1])

    entries: dict[str, Any] = {"frontier": []}
    strength = options.threshold
    if heldout_labels:
        heldout_reward = linear_reward(heldout_labels)
        # [N]: scores of the same latents before any move, with which every strength is compared.
        heldout_before = score(heldout_reward, held_out.before[0])
        # in the space of the final direction, so that the frontier describes the same kind of move
        part_direction = direction_of(collected.samples, fit_labels, direction.space, options.seed)
        z_dim = generator.generator.z_dim
        strengths = {grid_strength for grid_strength in GRID if grid_strength**2 < z_dim}
        # A strength that was given is measured as well.
        strengths |= set() if strength is None else {strength}
        for frontier_strength in sorted(strengths):
            observed = held_out.after(part_direction.to_steering(frontier_strength, options.layers))
            heldout_after = score(heldout_reward, observed[0])
            entries["frontier"].append(
                {
                    "strength": frontier_strength,
                    "reward": float(reward_of(observed).mean()),
                    "heldout": float(heldout_after.mean()),
                    "harmed": harmed_share(heldout_before, heldout_after),
                }
            )
        # The frontier that chooses the strength uses 60 % of the
        # labels, so its direction differs slightly from the final one.
        if strength is None:
            strength = choose_strength(entries["frontier"], float(heldout_before.mean()))
        at_strength = next(
            (entry for entry in entries["frontier"] if entry["strength"] == strength),
            {"heldout": float(heldout_before.mean()), "harmed": 0.0},
        )
        entries |= {
            "heldout_before": float(heldout_before.mean()),
            "heldout_after": at_strength["heldout"],
            "harmed": at_strength["harmed"],
        }
    assert strength is not None
    # From here on, the direction of all labels is measured.
    reward_before = reward_of(held_out.before)
    entries |= {"strength": strength, "reward_before": float(reward_before.mean())}
    if strength == 0:
        return entries | {"reward_after": float(reward_before.mean())}
    reward_after = reward_of(held_out.after(direction.to_steering(strength, options.layers)))
    # The number 11 separates this stream from those of the folds and the splits.
    rng = np.random.default_rng([options.seed, 11])
    # A trained reward would ignore the labels, so the control fits a linear one.
    randomised_direction = direction_of(
        dataclasses.replace(collected.samples, scores=None),
        randomise(labels, rng),
        direction.space,
        options.seed,
    )
    # A trained reward would ignore the labels, so its scores are inverted as well.
    scores = collected.samples.scores
    inverted_direction = direction_of(
        dataclasses.replace(collected.samples, scores=None if scores is None else -scores),
        [invert(label) for label in labels],
        direction.space,
        options.seed,
    )
    control = {}
    for name, control_direction in (("randomised", randomised_direction), ("inverted", inverted_direction)):
        control_after = reward_of(held_out.after(control_direction.to_steering(strength, options.layers)))
        control[name] = {
            "verdict": DIRECTION if control_direction.is_found else NO_DIRECTION,
            "accuracy": control_direction.accuracy["accuracy"],
            "reward_after": float(control_after.mean()),
            "harmed": harmed_share(reward_before, control_after),
        }
    return entries | {"reward_after": float(reward_after.mean()), "control": control}
