"""Rewards of the toy's assets (three oracles and a learned one), and its simulated annotators.

    LabelOracle    intersection over union, and root mean square error of the colour: the labelling rule of
                   the simulated preference pairs
    ChooserOracle  distances to the shape and back, and the share of voxels of the right colour: held-out win
                   rate and early stopping
    FinalOracle    Dice overlap, the number of connected parts, symmetry, and the mean absolute error of the
                   colour: the final table only

All are AssetRewards: geometry + colour, larger is better. Any variant of the shape is correct; the score is
that of the best-fitting variant. A noisy simulated annotator chooses between two decoded drafts. The learned
reward is fitted to these choices alone, and has errors.

Letters as in the package; P pairs.
"""

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from eg3d_rlhf.models.sparse import separate
from eg3d_rlhf.preferences.label_scores import of_ranks, of_votes
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.ranking import Candidate
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.toy import toy_pipeline as toy

RIGHT_COLOUR = 0.15  # largest error of a channel, in 0..1, for a colour that ChooserOracle counts as right


@dataclass(frozen=True)
class _Views:
    """Assets and the targets of their prompts; P = R^3 places."""

    filled: torch.Tensor  # [N, P] float, 0 or 1
    wanted: torch.Tensor  # [N, K, P] float, 0 or 1
    colour_error: torch.Tensor  # [N, P, 3], 0 where nothing is filled

    @classmethod
    def from_assets(cls, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> "_Views":
        assert len(assets) == len(conditions) > 0
        shapes, colours = toy.targets(conditions)
        # flattened over the grid: [N, P], [N, K, P] and [N, P, 3]
        filled = torch.stack([asset.occupancy for asset in assets]).flatten(1).float()
        painted = torch.stack([asset.colours for asset in assets])
        return cls(filled, shapes.flatten(2).float(), (painted - colours).flatten(1, 3) * filled[..., None])

    @property
    def overlap(self) -> torch.Tensor:
        """Count the voxels in common with every variant, [N, K]."""
        return torch.einsum("np,nkp->nk", self.filled, self.wanted)

    @property
    def sizes(self) -> torch.Tensor:
        """Add the number of voxels of the asset and of every variant, [N, K]."""
        return self.filled.sum(1, keepdim=True) + self.wanted.sum(2)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average over the filled places: [N, P] -> [N]."""
        return (values * self.filled).sum(1) / self.filled.sum(1)


class _Oracle(ABC):
    """Oracle whose score is geometry plus colour."""

    @abstractmethod
    def parts(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Compute the scores "geometry" and "colour", [N] float32 each."""

    def __call__(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, given their prompts: [N] float32, the sum of both parts."""
        parts = self.parts(assets, conditions)
        return parts["geometry"] + parts["colour"]


class LabelOracle(_Oracle):
    """Labelling rule: geometry 4 IoU, colour -4 RMSE."""

    def parts(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        views = _Views.from_assets(assets, conditions)
        # |A and B| / |A or B|, of the best variant
        iou = (views.overlap / (views.sizes - views.overlap)).amax(1)
        return {"geometry": 4 * iou, "colour": -4 * views.mean(views.colour_error.square().mean(2)).sqrt()}


class ChooserOracle(_Oracle):
    """Oracle that chooses checkpoints.

    Geometry: -2 times the sum of the mean distances, in voxels, from asset to shape and from shape to asset.
    Colour: the share of voxels whose error is within RIGHT_COLOUR in every channel.
    """

    def parts(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        views = _Views.from_assets(assets, conditions)
        to_shape = _distances_to_shapes()[toy.classes(conditions)[0]]  # [N, K, P]
        to_asset = torch.stack([_distance(asset.occupancy) for asset in assets])  # [N, P]
        # asset to shape measures extra parts, shape to asset measures missing parts
        there = torch.einsum("np,nkp->nk", views.filled, to_shape) / views.filled.sum(1, keepdim=True)
        back = torch.einsum("np,nkp->nk", to_asset, views.wanted) / views.wanted.sum(2)
        right = (views.colour_error.abs().amax(2) <= RIGHT_COLOUR).float()
        return {"geometry": -2 * (there + back).amin(1), "colour": views.mean(right)}


class FinalOracle(_Oracle):
    """Oracle of the final table.

    Geometry: Dice + symmetry - 0.03 for every connected part beyond the first. Colour: -3 times the mean
    absolute error.
    """

    def measures(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Compute the summands of the score, [N] each, larger is better.

        These are "overlap", "symmetry", "pieces" (parts beyond the first, negative) and "colour".
        """
        views = _Views.from_assets(assets, conditions)
        # every target is symmetric in x, so the share of voxels with a mirror image needs no target
        mirrored = torch.stack([asset.occupancy.flip(0) for asset in assets]).flatten(1)
        # connected parts by face neighbours, which is the default of scipy's label
        more = torch.tensor([ndimage.label(asset.occupancy.numpy())[1] - 1 for asset in assets])
        return {
            "overlap": (2 * views.overlap / views.sizes).amax(1),
            "symmetry": views.mean(mirrored.float()),
            "pieces": -0.03 * more,
            "colour": -3 * views.mean(views.colour_error.abs().mean(2)),
        }

    def parts(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        parts = self.measures(assets, conditions)
        return {"geometry": parts["overlap"] + parts["symmetry"] + parts["pieces"], "colour": parts["colour"]}


@functools.cache
def _distances_to_shapes() -> torch.Tensor:
    """Compute the distance of every place to every shape, [shapes, K, R^3], in voxels; 0 inside."""
    shapes = toy.canonical_shapes()
    return torch.stack([_distance(shape) for shape in shapes.flatten(0, 1)]).unflatten(0, shapes.shape[:2])


def _distance(filled: torch.Tensor) -> torch.Tensor:
    """Compute the Euclidean distance from every place to the nearest filled one, [R^3], in voxels."""
    return torch.from_numpy(ndimage.distance_transform_edt(~filled.numpy())).float().view(toy.R**3)


TEMPERATURE = 0.1  # of the simulated annotator, in units of LabelOracle's score


@dataclass(frozen=True)
class Judged:
    """P labelled pairs of drafts, each for one prompt."""

    conditions: tuple[str, ...]
    preferred: toy.Drafts
    rejected: toy.Drafts
    assets: tuple[list[toy.ToyAsset], list[toy.ToyAsset]]  # preferred, rejected
    agrees: torch.Tensor  # [P] bool: the annotator's label is the order of LabelOracle's scores


def judge_drafts(
    conditions: Sequence[str], generator: torch.Generator, defects: toy.Defects | None = None
) -> Judged:
    """Sample one pair of drafts per prompt, and label it by the simulated annotator.

    P(first is preferred) = sigmoid((s_first - s_second) / TEMPERATURE), where s is LabelOracle's score
    (Bradley and Terry 1952).
    """
    drafts = [toy.draw_drafts(conditions, generator, defects) for _ in range(2)]
    assets = [toy.make_assets(draft) for draft in drafts]
    oracle = LabelOracle()
    gap = oracle(assets[0], conditions) - oracle(assets[1], conditions)
    first = torch.rand(len(gap), generator=generator) < torch.sigmoid(gap / TEMPERATURE)  # [P]

    def chosen(take: torch.Tensor) -> tuple[toy.Drafts, list[toy.ToyAsset]]:
        # the first draft where `take` is true, the second elsewhere
        grids = take.view(-1, 1, 1, 1)
        a, b = drafts
        picked = toy.Drafts(
            torch.where(grids, a.structure, b.structure),
            torch.where(grids[..., None], a.features, b.features),
        )
        return picked, [
            x if first_taken else y for first_taken, x, y in zip(take.tolist(), *assets, strict=True)
        ]

    preferred, better = chosen(first)
    rejected, worse = chosen(~first)
    return Judged(tuple(conditions), preferred, rejected, (better, worse), (gap > 0) == first)


def human_pairs(
    stage: str, conditions: Sequence[str], per_condition: int, seed: int, defects: toy.Defects | None = None
) -> list[PreferencePair]:
    """Make simulated preference pairs of a stage's latents. All stages have pairs of the same assets."""
    pairs = []
    for condition in conditions:
        # seeded by prompt: the pairs of a prompt do not depend on which other prompts are requested
        draw_seed = zlib.crc32(f"{seed} {condition}".encode())
        judged = judge_drafts([condition] * per_condition, torch.Generator().manual_seed(draw_seed), defects)
        both = [separate(drafts.latents(stage)) for drafts in (judged.preferred, judged.rejected)]
        for i, (preferred, rejected) in enumerate(zip(*both, strict=True)):
            pairs.append(
                PreferencePair(
                    id=f"{condition.replace(' ', '-')}-{seed}-{i:03d}",
                    condition=condition,
                    stage=stage,
                    preferred=preferred,
                    rejected=rejected,
                    provenance={"seed": seed, "number": i},
                )
            )
    return pairs


def human_singles(
    kind: str, conditions: Sequence[str], per_condition: int, seed: int, defects: toy.Defects | None = None
) -> Labelled:
    """Make assets of every prompt, with a simulated label for each asset. Both kinds label the same assets.

    thumbs: P(up) = sigmoid((s - s_median) / TEMPERATURE), where s is LabelOracle's score and s_median its
    median over the prompt's assets. ranks: the order of s + TEMPERATURE g, with g from a Gumbel distribution
    (Luce 1959); for two assets this is the probability of `judge_drafts`.
    """
    assets = list[Candidate]()
    goodness = dict[str, float]()
    for condition in conditions:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {condition} alone".encode()))
        drafts = toy.draw_drafts([condition] * per_condition, generator, defects)
        scores = LabelOracle()(toy.make_assets(drafts), [condition] * per_condition)
        up = torch.rand(per_condition, generator=generator) < torch.sigmoid(
            (scores - scores.median()) / TEMPERATURE
        )
        # -log of an exponential variable has a Gumbel distribution
        noisy = scores - TEMPERATURE * torch.empty(per_condition).exponential_(generator=generator).log()
        names = [f"{condition.replace(' ', '-')}-{seed}-{i:03d}" for i in range(per_condition)]
        # smaller ranks are better, hence the sign
        ranks = dict(zip(names, (-noisy).tolist(), strict=True))
        goodness |= of_ranks(ranks) if kind == "ranks" else of_votes(zip(names, up.tolist(), strict=True))
        latents = {stage: separate(drafts.latents(stage)) for stage in (toy.STRUCTURE, toy.VOXELS)}
        for i, name in enumerate(names):
            of_asset = {stage: of_stage[i] for stage, of_stage in latents.items()}
            assets.append(Candidate(name=name, condition=condition, rank=ranks[name], latents=of_asset))
    return Labelled(assets=assets, goodness=goodness)


FEATURES = 15  # see _features


class LearnedReward(nn.Module):
    """Learned AssetReward: a small network over counts of voxels and distances to learned colours."""

    mean: torch.Tensor  # [F], of the features it was trained on
    std: torch.Tensor

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.colour = nn.Embedding(len(toy.COLOURS), toy.R * 3)  # colour of every class, by height
        nn.init.constant_(self.colour.weight, 0.5)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        sizes = [FEATURES + 2 + len(toy.SHAPES), hidden, hidden]
        layers = [
            part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.GELU())
        ]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def score(self, volumes: torch.Tensor, shapes: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Score volumes [N, 4, R, R, R] of shape and colour classes [N] -> [N].

        Not differentiable in the volumes' occupancy.
        """
        filled = volumes[:, :1]
        painted = volumes[:, 1:]
        learned = self.colour(colours).view(-1, 3, 1, 1, toy.R)
        # mean squared error of each channel over the filled places, [N, 3]
        error = ((painted - learned).square() * filled).flatten(2).sum(2) / filled.flatten(1).sum(
            1, keepdim=True
        )
        off = torch.stack([error.mean(1), error.mean(1).sqrt()], dim=1) * 4
        features = (_features(volumes) - self.mean) / self.std
        return self.head(
            torch.cat([features, off, F.one_hot(shapes, len(toy.SHAPES)).float()], dim=1)
        ).squeeze(1)

    @torch.no_grad()
    def forward(self, assets: Sequence[toy.ToyAsset], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, given their prompts: [N] float32 on the CPU; see AssetReward."""
        device = self.mean.device
        return self.score(
            volumes_of(assets).to(device), *(numbers.to(device) for numbers in toy.classes(conditions))
        ).cpu()


def _features(volumes: torch.Tensor) -> torch.Tensor:
    """Compute features of volumes: [N, 4, R, R, R] -> [N, 15].

    The features are the number of voxels; the shares of voxels with 0 to 6 filled neighbours; the numbers of
    empty places with 2 to 6 filled neighbours, per voxel; the share of voxels without a mirror image; and the
    roughness of the colour.
    """
    filled = volumes[:, 0]
    beside = toy.neighbours(filled)  # number of filled face neighbours, 0 to 6
    n = filled.sum((1, 2, 3))
    full = [((beside == k) * filled).sum((1, 2, 3)) / n for k in range(7)]
    empty = [((beside == k) * (1 - filled)).sum((1, 2, 3)) / n for k in range(2, 7)]
    # the mirror image in x, as all targets are symmetric
    alone = ((1 - filled.flip(1)) * filled).sum((1, 2, 3)) / n
    both = filled[..., 1:] * filled[..., :-1]
    # mean difference of colours between vertical neighbours; the clamp is for assets without such pairs
    rough = (volumes[:, 1:].diff(dim=-1).abs().mean(1) * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp(
        min=1
    )
    return torch.stack([n, *full, *empty, alone, rough], dim=1)


def volumes_of(assets: Sequence[toy.ToyAsset]) -> torch.Tensor:
    """Stack assets as the network reads them: occupancy and colour, [N, 4, R, R, R]."""
    return torch.stack(
        [torch.cat([a.occupancy[None].float(), a.colours.permute(3, 0, 1, 2)]) for a in assets]
    )


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """Settings of the training of the learned reward."""

    pairs: int = 4000
    held_out: int = 800  # further pairs, for the test only
    epochs: int = 16
    batch: int = 64  # pairs per update
    lr: float = 3e-3  # of AdamW, falls to 0 along a cosine
    seed: int = 0


def fit(
    better: Sequence[toy.ToyAsset],
    worse: Sequence[toy.ToyAsset],
    conditions: Sequence[str],
    training: RewardTraining,
    generator: torch.Generator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> LearnedReward:
    """Fit the learned reward to pairs of assets with preference_loss.

    Args: generator: shuffles the pairs; on_step: called with (step, steps, loss).
    """
    # the initial weights depend on the seed alone, and the caller's random state is restored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = LearnedReward()
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=0.05)
    preferred = volumes_of(better)
    rejected = volumes_of(worse)
    features = _features(torch.cat([preferred, rejected]))
    # features are standardised; the clamp is for a feature that is constant
    network.mean = features.mean(0)
    network.std = features.std(0).clamp(min=1e-3)
    shapes, colours = toy.classes(conditions)
    step = 0
    steps = training.epochs * (-(-len(conditions) // training.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(conditions), generator=generator).split(training.batch):
            # [2 B]: preferred, then rejected
            scores = network.score(
                torch.cat([preferred[rows], rejected[rows]]), shapes[rows].repeat(2), colours[rows].repeat(2)
            )
            loss = preference_loss(scores[: len(rows)] - scores[len(rows) :]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if on_step is not None:
                on_step(step, steps, float(loss.detach()))
    return network.eval()
