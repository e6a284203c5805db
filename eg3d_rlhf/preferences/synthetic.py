"""Preference labels without people: seeds of a generator, judged by the programmatic annotator.

Shape letters: S = seeds, P = pairs, N = samples in a batch; a cube is [D=z, H=y, W=x].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.preferences.annotator import (
    ANNOTATOR,
    DEFAULT_CALIBRATION,
    Calibration,
    PairLabel,
    UtilityResult,
    Weights,
    calibrate,
    disjoint_pairs,
    label_pairs,
    solve_temperature,
    utility,
)
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.sigma.slab import sigma_grid
from eg3d_rlhf.sigma.spec import SlabSpec
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, intrinsics_matrix, look_at, pack_label

Device = torch.device | str


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions:
    """What is sampled and how noisy the judgement is."""

    pairs: int = 2000  # P; 2 P seeds are used, each in one pair
    first_seed: int = 0  # seeds are first_seed .. first_seed + 2 P - 1
    psi: float = 1.0  # truncation
    cutoff: int = 14  # ws that truncation reaches
    resolution: int = 64  # samples per edge of the judged cube
    flip_rate: float = 0.10  # expected share of labels against the noise-free order, [0, 0.5)
    calibrate: int = 0  # cubes to calibrate the annotator on (the first seeds); 0 keeps its fixed calibration
    seed: int = 0  # of the pairing and the label noise
    batch: int = 16  # latents synthesised at once

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.first_seed < 0 or self.batch < 1 or self.resolution < 16:
            raise ValueError("AnnotationOptions: expected pairs >= 1, first_seed >= 0, batch >= 1 and resolution >= 16.")
        if not 0 <= self.flip_rate < 0.5:
            raise ValueError(f"AnnotationOptions: expected flip_rate in [0, 0.5), got {self.flip_rate}. 0.5 is a coin toss.")
        if self.calibrate and not 4 <= self.calibrate <= 2 * self.pairs:
            raise ValueError(f"AnnotationOptions: expected calibrate 0 or 4 .. {2 * self.pairs} cubes, got {self.calibrate}.")


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels with everything that is needed to repeat or audit them."""

    options: AnnotationOptions
    labels: list[PairLabel]  # winner and loser are seeds
    utilities: np.ndarray  # [2 P] by seed - first_seed
    temperature: float
    calibration: Calibration

    def preferences(self, generator: str) -> list[Preference]:
        """The labels in the open format; `generator` is the sampled network's hash. No time: equal options give equal bytes."""
        common = {"generator": generator, "psi": self.options.psi, "annotator": ANNOTATOR}
        return [
            Preference(winner=label.winner, loser=label.loser, clean=label.winner if label.clean else label.loser, **common)
            for label in self.labels
        ]

    def summary(self) -> dict:
        """Settings and outcome as JSON values."""
        quantiles = np.quantile(self.utilities, [0, 0.25, 0.5, 0.75, 1])
        return {
            **asdict(self.options),
            "temperature": self.temperature,
            "flipped": sum(not label.clean for label in self.labels),
            "utility_quantiles": [round(float(value), 6) for value in quantiles],
            "calibration": self.calibration.to_dict(),
            "weights": asdict(Weights()),
        }


def frontal_label(rendering_kwargs: dict) -> Tensor:
    """Conditioning camera [1, 25]: frontal, at the generator's average radius, looking at its pivot, with FFHQ's focal length."""
    angle = torch.full((1, 1), math.pi / 2)
    position = camera_position(angle, angle, rendering_kwargs.get("avg_camera_radius", FFHQ_RADIUS))
    pivot = torch.tensor(rendering_kwargs.get("avg_camera_pivot", [0.0, 0.0, 0.0]), dtype=torch.float32)
    return pack_label(look_at(position, pivot), intrinsics_matrix(FFHQ_FOCAL))


@torch.no_grad()
def seed_ws(G: torch.nn.Module, seeds: Sequence[int], psi: float, cutoff: int, device: Device = "cpu") -> Tensor:
    """ws [N, L, W] of seeds: z = numpy RandomState(seed).randn(z_dim), conditioned on the frontal camera."""
    z = np.stack([np.random.RandomState(seed).randn(G.z_dim) for seed in seeds])
    c = frontal_label(G.rendering_kwargs)[:, : G.c_dim].expand(len(seeds), -1).to(device)
    return G.mapping(torch.from_numpy(z).float().to(device), c, truncation_psi=psi, truncation_cutoff=cutoff)


def seed_cubes(G: torch.nn.Module, seeds: Sequence[int], options: AnnotationOptions, device: Device = "cpu") -> Iterator[np.ndarray]:
    """Raw density cubes [D, H, W] of seeds over the whole scene, one after the other."""
    spec = SlabSpec.cube(options.resolution, float(G.rendering_kwargs["box_warp"]))
    for start in range(0, len(seeds), options.batch):
        ws = seed_ws(G, seeds[start : start + options.batch], options.psi, options.cutoff, device)
        with torch.no_grad():
            sigma = sigma_grid(G, ws, spec)
        yield from sigma.cpu().numpy()


def annotate(
    G: torch.nn.Module, options: AnnotationOptions, device: Device = "cpu", on_seed: Callable[[UtilityResult], None] | None = None
) -> Annotation:
    """Judge 2 P seeds, pair them at random, and draw one noisy label per pair.

    Args: `G` a tri-plane generator; `on_seed` is told each judgement, for a progress bar.
    Deterministic in the options and the generator.
    Raises ValueError when every pair ties (for example a generator without any surface).
    """
    seeds = range(options.first_seed, options.first_seed + 2 * options.pairs)
    box_warp = float(G.rendering_kwargs["box_warp"])
    calibration = DEFAULT_CALIBRATION
    if options.calibrate:
        calibration = calibrate(seed_cubes(G, seeds[: options.calibrate], options, device), box_warp)
    utilities = np.empty(len(seeds))
    for i, cube in enumerate(seed_cubes(G, seeds, options, device)):
        result = utility(cube, calibration=calibration, box_warp=box_warp)
        utilities[i] = result.total
        if on_seed is not None:
            on_seed(result)
    rng = np.random.default_rng(options.seed)
    pairs = disjoint_pairs(options.pairs, rng)
    temperature = solve_temperature(utilities, pairs, options.flip_rate)
    labels = [
        PairLabel(seeds[label.winner], seeds[label.loser], label.clean) for label in label_pairs(utilities, pairs, temperature, rng)
    ]
    return Annotation(options=options, labels=labels, utilities=utilities, temperature=temperature, calibration=calibration)
