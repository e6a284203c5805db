"""A programmatic annotator: says which of two heads has the better geometry from the raw density cube alone.

utility(sigma) = sum_f w_f * p_f with p_f = s((median_f - x_f) / scale_f) / s(median_f / scale_f), s(t) = 1 / (1 + exp(-t)), for every
feature x_f of sigma_features.py (0 is ideal, larger is worse), so each part lies in (0, 1], is 1 without the defect, about 1/2 at the
calibration's median (where that is a few scales from 0), and falls strictly with the defect.
Labels follow Bradley and Terry (1952): P(a preferred over b) = 1 / (1 + exp(-(u_a - u_b) / T)).

Shape letters: S = samples, P = pairs; a cube is [D=z, H=y, W=x].
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit

from eg3d_rlhf.preferences.sigma_features import FEATURES, sigma_features

ANNOTATOR = "sigma-geometry-3"  # name written into labels; changes whenever features, weights or calibration do
MIN_SCALE = {  # smallest spread of a feature; keeps a feature that is constant over the calibration set from becoming a step function
    "floater_volume": 0.005, "floater_count": 1.0, "roughness_front": 0.2, "roughness_side": 0.2, "holes": 0.005, "dents": 5e-5,
    "asymmetry_depth": 5e-4, "asymmetry_occupancy": 0.005, "depth_order": 0.02, "hollowness": 0.02, "face": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What matters to this annotator; the weights sum to 1, so the utility lies in [0, 1]."""

    floater_volume: float = 0.12  # detached material
    floater_count: float = 0.02
    roughness_front: float = 0.12  # skin should be smooth
    roughness_side: float = 0.05
    holes: float = 0.06
    dents: float = 0.20
    asymmetry_depth: float = 0.10
    asymmetry_occupancy: float = 0.04
    depth_order: float = 0.02  # nose ahead of cheeks ahead of eye sockets
    hollowness: float = 0.02
    face: float = 0.25  # eyes, nose and lips: what a person looks for first

    def __post_init__(self) -> None:
        values = [getattr(self, item.name) for item in fields(self)]
        if min(values) < 0 or abs(sum(values) - 1.0) > 1e-6:
            raise ValueError(f"Weights: expected non-negative weights that sum to 1, got {values}. Divide by their sum.")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Median and robust spread per feature, which put the features of one generator on a common scale."""

    median: Mapping[str, float]
    scale: Mapping[str, float]  # interquartile range / 1.349 (the deviation of a normal), at least MIN_SCALE
    samples: int = 0  # cubes behind the figures

    def __post_init__(self) -> None:
        if set(self.median) != set(FEATURES) or set(self.scale) != set(FEATURES):
            raise ValueError(f"Calibration: expected exactly the features {list(FEATURES)}. Calibrate again with this version.")
        if not all(np.isfinite(self.median[name]) and self.scale[name] > 0 for name in FEATURES):
            raise ValueError("Calibration: expected finite medians and positive scales. Calibrate again on cubes that hold a surface.")

    def to_dict(self) -> dict:
        """The same as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping) -> "Calibration":
        """Inverse of to_dict."""
        return cls(median=dict(record["median"]), scale=dict(record["scale"]), samples=int(record["samples"]))


DEFAULT_CALIBRATION = Calibration(  # a tri-plane generator of middling quality; heads of the true family lie well above 1/2 throughout
    median={
        "floater_volume": 0.002, "floater_count": 1.0, "roughness_front": 8.0, "roughness_side": 5.0, "holes": 0.002, "dents": 6e-4,
        "asymmetry_depth": 0.006, "asymmetry_occupancy": 0.05, "depth_order": 0.2, "hollowness": 0.05, "face": 0.2,
    },
    scale={
        "floater_volume": 0.005, "floater_count": 2.0, "roughness_front": 1.5, "roughness_side": 1.0, "holes": 0.005, "dents": 3e-4,
        "asymmetry_depth": 0.003, "asymmetry_occupancy": 0.03, "depth_order": 0.15, "hollowness": 0.05, "face": 0.15,
    },
)


@dataclass(frozen=True, kw_only=True)
class UtilityResult:
    """Noise-free judgement of one cube."""

    total: float  # 0 (no surface) to 1
    parts: dict[str, float] = field(default_factory=dict)  # per feature, unweighted, 0..1, 1 is best
    features: dict[str, float] = field(default_factory=dict)  # raw defects; empty where there is no surface


def utility(
    sigma: np.ndarray, *, calibration: Calibration = DEFAULT_CALIBRATION, weights: Weights | None = None, box_warp: float = 1.0
) -> UtilityResult:
    """Judge one raw density cube.

    Args: `sigma` [D, H, W] raw density over the whole cube of side `box_warp`, sides >= 16 (48 to 64 is the intended range).
    Returns the utility, larger is better. A cube without surface gets 0, below every cube that has one. Never NaN.
    """
    weights = weights or Weights()
    features = sigma_features(sigma, box_warp)
    if features is None:
        return UtilityResult(total=0.0, parts=dict.fromkeys(FEATURES, 0.0))
    median, scale = calibration.median, calibration.scale
    parts = {name: float(expit((median[name] - features[name]) / scale[name]) / expit(median[name] / scale[name])) for name in FEATURES}
    total = sum(getattr(weights, name) * parts[name] for name in FEATURES)
    return UtilityResult(total=float(total), parts=parts, features=features)


def calibrate(sigmas: Iterable[np.ndarray], box_warp: float = 1.0) -> Calibration:
    """Median and interquartile range of every feature over a set of cubes; cubes without surface are left out.

    Raises ValueError when fewer than 4 cubes hold a surface.
    """
    records = [record for record in (sigma_features(sigma, box_warp) for sigma in sigmas) if record is not None]
    if len(records) < 4:
        raise ValueError(f"calibrate: expected at least 4 cubes with a surface at raw sigma 10, got {len(records)}. Pass more samples.")
    low, median, high = np.quantile([[record[name] for name in FEATURES] for record in records], [0.25, 0.5, 0.75], axis=0)  # [F] each
    spread = (high - low) / 1.349
    scale = {name: max(float(width), MIN_SCALE[name]) for name, width in zip(FEATURES, spread, strict=True)}
    return Calibration(median=dict(zip(FEATURES, median.tolist(), strict=True)), scale=scale, samples=len(records))


class PairLabel(NamedTuple):
    """One noisy judgement; `winner` and `loser` index the utilities."""

    winner: int
    loser: int
    clean: bool  # the noise-free order agrees (a tie counts as agreeing)


def _gaps(utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as int64 [P, 2] and their utility differences u_a - u_b, float64 [P]."""
    index = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    values = np.asarray(utilities, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("label_pairs: expected finite utilities. Judge the cubes with annotator.utility, which never returns NaN.")
    return index, values[index[:, 0]] - values[index[:, 1]]


def label_pairs(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, temperature: float, rng: np.random.Generator
) -> list[PairLabel]:
    """Draw one Bradley-Terry judgement per pair.

    Args: `utilities` [S]; `pairs` [P, 2] of indices into them; `temperature` >= 0 in units of utility, 0 for noise-free labels;
    `rng` is advanced by exactly P uniform draws.
    Returns P labels in the order of `pairs`.
    """
    if temperature < 0:
        raise ValueError(f"label_pairs: expected temperature >= 0, got {temperature}. 0 gives noise-free labels.")
    index, gap = _gaps(utilities, pairs)
    draw = rng.random(len(index))
    chance = expit(gap / temperature) if temperature > 0 else np.where(gap == 0, 0.5, gap > 0)  # P(a preferred) [P]
    first = draw < chance
    return [
        PairLabel(int(a if won else b), int(b if won else a), bool((delta >= 0) if won else (delta <= 0)))
        for (a, b), won, delta in zip(index, first, gap, strict=True)
    ]


def solve_temperature(utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, flip_rate: float = 0.10) -> float:
    """Temperature at which the expected share of labels against the noise-free order is `flip_rate` over these pairs.

    E[flips] = mean over pairs of 1 / (1 + exp(|u_a - u_b| / T)) rises from 0 to 1/2 with T, so the root is unique. Ties are left out.
    Args: `flip_rate` in [0, 0.5). Returns T >= 0 in units of utility. Raises ValueError when all pairs tie.
    """
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(f"solve_temperature: expected flip_rate in [0, 0.5), got {flip_rate}. 0.5 is a coin toss.")
    _, gap = _gaps(utilities, pairs)
    gap = np.abs(gap[gap != 0])
    if gap.size == 0:
        raise ValueError("solve_temperature: expected at least one pair whose utilities differ, got only ties. Sample other pairs.")
    if flip_rate == 0.0:
        return 0.0
    scale = float(np.median(gap))
    return scale * float(np.exp(brentq(lambda log_t: expit(-gap / (scale * np.exp(log_t))).mean() - flip_rate, -60.0, 60.0)))


def disjoint_pairs(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random pairs [P, 2] of indices 0..2*count-1, each used once, so that a split by pair is also a split by sample."""
    return rng.permutation(2 * count).reshape(count, 2)
