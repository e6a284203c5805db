"""Rewards of the toy's assets (three oracles and a learned one), and its simulated annotators.

    LabelOracle    intersection over union, and root mean square error of the colour: the labelling rule of
                   the simulated preference pairs
    ChooserOracle  symmetric Chamfer distance (from the asset to the shape, and from the shape to the asset),
                   and the share of voxels of the right colour: held-out win rate and early stopping
    FinalOracle    Dice overlap, the number of connected parts, symmetry, and the mean absolute error of the
                   colour: the final table only

All are `AssetReward`s. A score is the sum of a score of the geometry and a score of the colour, and a larger
score is better. Each prompt has several correct target shapes (variants), and the geometry is compared with
the variant that fits best. A noisy simulated annotator chooses between two decoded drafts. The learned reward
is fitted to these choices only, so it has errors.

Shapes: P = R^3 cells of the grid, or P pairs; other letters as in the package's docstring.
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
from eg3d_rlhf.preferences.label_scores import goodness_from_ranks, goodness_from_votes
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.ranking import Candidate
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.toy import toy_pipeline as toy

RIGHT_COLOUR = 0.15  # largest error of a channel, in 0..1, at which ChooserOracle counts a colour as correct


@dataclass(frozen=True)
class _FlatAssets:
    """Assets and the targets of their prompts, as flat arrays over the P = R^3 cells of the grid."""

    occupancy: torch.Tensor  # [N, P] float, 0 or 1
    target_occupancy: torch.Tensor  # [N, K, P] float, 0 or 1
    colour_error: torch.Tensor  # [N, P, 3], asset minus target, 0 at empty cells

    @classmethod
    def from_assets(cls, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> "_FlatAssets":
        """Make the arrays from N assets and their N prompts."""
        assert len(assets) == len(prompts) > 0
        target_shapes, target_colours = toy.targets(prompts)
        occupancy = torch.stack([asset.occupancy for asset in assets]).flatten(1).float()
        asset_colours = torch.stack([asset.colours for asset in assets])
        colour_error = (asset_colours - target_colours).flatten(1, 3) * occupancy[..., None]
        return cls(occupancy, target_shapes.flatten(2).float(), colour_error)

    @property
    def overlap(self) -> torch.Tensor:
        """Number of voxels that an asset and a variant have in common, [N, K]."""
        return torch.einsum("np,nkp->nk", self.occupancy, self.target_occupancy)

    @property
    def sizes(self) -> torch.Tensor:
        """Number of voxels of an asset plus the number of voxels of a variant, [N, K]."""
        return self.occupancy.sum(1, keepdim=True) + self.target_occupancy.sum(2)

    def mean(self, cell_values: torch.Tensor) -> torch.Tensor:
        """Average values [N, P] over the occupied cells of each asset, [N]."""
        return (cell_values * self.occupancy).sum(1) / self.occupancy.sum(1)


class _Oracle(ABC):
    """Oracle whose score is a score of the geometry plus a score of the colour."""

    @abstractmethod
    def parts(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Return the scores "geometry" and "colour" of N assets with N prompts, [N] float32 each."""

    def __call__(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> torch.Tensor:
        """Return the sum of the two scores of N assets with N prompts, [N] float32."""
        score_by_part = self.parts(assets, prompts)
        return score_by_part["geometry"] + score_by_part["colour"]


class LabelOracle(_Oracle):
    """Labelling rule of the simulated annotators.

    Geometry: 4 times the intersection over union (IoU). Colour: -4 times the root mean square error.
    """

    def parts(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        flat_assets = _FlatAssets.from_assets(assets, prompts)
        # Intersection divided by union, for the variant for which it is largest.
        iou = (flat_assets.overlap / (flat_assets.sizes - flat_assets.overlap)).amax(1)
        return {
            "geometry": 4 * iou,
            "colour": -4 * flat_assets.mean(flat_assets.colour_error.square().mean(2)).sqrt(),
        }


class ChooserOracle(_Oracle):
    """Oracle that chooses checkpoints and settings, and measures held-out win rates.

    Geometry: -2 times the sum of the mean distances, in voxels, from asset to shape and from shape to asset.
    Colour: the share of voxels whose error is within RIGHT_COLOUR in every channel.
    """

    def parts(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        flat_assets = _FlatAssets.from_assets(assets, prompts)
        distance_to_shape = _distances_to_shapes()[toy.classes(prompts)[0]]  # [N, K, P]
        distance_to_asset = torch.stack([_distance(asset.occupancy) for asset in assets])  # [N, P]
        # Mean distance [N, K] of the asset's voxels from a variant, which measures additional parts.
        asset_to_shape = torch.einsum("np,nkp->nk", flat_assets.occupancy, distance_to_shape)
        asset_to_shape = asset_to_shape / flat_assets.occupancy.sum(1, keepdim=True)
        # Mean distance [N, K] of a variant's voxels from the asset, which measures missing parts.
        shape_to_asset = torch.einsum("np,nkp->nk", distance_to_asset, flat_assets.target_occupancy)
        shape_to_asset = shape_to_asset / flat_assets.target_occupancy.sum(2)
        has_right_colour = (flat_assets.colour_error.abs().amax(2) <= RIGHT_COLOUR).float()
        return {
            "geometry": -2 * (asset_to_shape + shape_to_asset).amin(1),
            "colour": flat_assets.mean(has_right_colour),
        }


class FinalOracle(_Oracle):
    """Held-out evaluator of the results table.

    Geometry: Dice overlap, plus the share of voxels whose mirror image in x is occupied, minus 0.03 for each
    connected part beyond the first. Colour: -3 times the mean absolute error.
    """

    def measures(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the terms of the score of N assets with N prompts: name of a term -> [N]; larger is better.

        The terms are "overlap", "symmetry", "pieces" (0 or less, for parts beyond the first) and "colour".
        """
        flat_assets = _FlatAssets.from_assets(assets, prompts)
        # Every target is symmetric in x, so the symmetry is measured without the target.
        mirrored_occupancy = torch.stack([asset.occupancy.flip(0) for asset in assets]).flatten(1)
        # The second result of scipy's label is the number of parts that are connected by faces.
        additional_parts = torch.tensor([ndimage.label(asset.occupancy.numpy())[1] - 1 for asset in assets])
        return {
            "overlap": (2 * flat_assets.overlap / flat_assets.sizes).amax(1),
            "symmetry": flat_assets.mean(mirrored_occupancy.float()),
            "pieces": -0.03 * additional_parts,
            "colour": -3 * flat_assets.mean(flat_assets.colour_error.abs().mean(2)),
        }

    def parts(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        term_by_name = self.measures(assets, prompts)
        return {
            "geometry": term_by_name["overlap"] + term_by_name["symmetry"] + term_by_name["pieces"],
            "colour": term_by_name["colour"],
        }


@functools.cache
def _distances_to_shapes() -> torch.Tensor:
    """Return the distance of every cell from every shape, [shapes, K, R^3] in voxels; 0 inside the shape."""
    shapes = toy.canonical_shapes()
    return torch.stack([_distance(shape) for shape in shapes.flatten(0, 1)]).unflatten(0, shapes.shape[:2])


def _distance(occupancy: torch.Tensor) -> torch.Tensor:
    """Return every cell's distance from the nearest cell of `occupancy` [R, R, R] bool, [R^3] in voxels."""
    return torch.from_numpy(ndimage.distance_transform_edt(~occupancy.numpy())).float().view(toy.R**3)


TEMPERATURE = 0.1  # temperature of the simulated annotator's noise, in units of LabelOracle's score


@dataclass(frozen=True)
class Judged:
    """P pairs of drafts with simulated labels. The drafts of a pair have the same prompt."""

    prompts: tuple[str, ...]  # P prompts
    preferred: toy.Drafts
    rejected: toy.Drafts
    assets: tuple[list[toy.ToyAsset], list[toy.ToyAsset]]  # decoded preferred and rejected drafts
    agrees: torch.Tensor  # [P] bool, True if the label agrees with the order of LabelOracle's scores


def judge_drafts(
    prompts: Sequence[str], generator: torch.Generator, defects: toy.Defects | None = None
) -> Judged:
    """Sample one pair of drafts for each of P prompts, and label it by the simulated annotator.

    P(first is preferred) = sigmoid((s_first - s_second) / TEMPERATURE), where s is LabelOracle's score
    (Bradley and Terry 1952).

    Args:
        prompts: P prompts.
        generator: random generator of drafts and labels.
        defects: largest strengths of the defects; None uses the defaults of `Defects`.
    """
    drafts = [toy.draw_drafts(prompts, generator, defects) for _ in range(2)]
    assets = [toy.make_assets(draft) for draft in drafts]
    oracle = LabelOracle()
    score_gap = oracle(assets[0], prompts) - oracle(assets[1], prompts)
    # [P]
    prefers_first = torch.rand(len(score_gap), generator=generator) < torch.sigmoid(score_gap / TEMPERATURE)

    def select(takes_first: torch.Tensor) -> tuple[toy.Drafts, list[toy.ToyAsset]]:
        """Return one draft and asset of each pair: the first if takes_first [P] is True, else the second."""
        mask = takes_first.view(-1, 1, 1, 1)
        first_drafts, second_drafts = drafts
        selected_drafts = toy.Drafts(
            torch.where(mask, first_drafts.structure, second_drafts.structure),
            torch.where(mask[..., None], first_drafts.features, second_drafts.features),
        )
        selected_assets = [
            first_asset if is_first else second_asset
            for is_first, first_asset, second_asset in zip(takes_first.tolist(), *assets, strict=True)
        ]
        return selected_drafts, selected_assets

    preferred, better_assets = select(prefers_first)
    rejected, worse_assets = select(~prefers_first)
    agrees = (score_gap > 0) == prefers_first
    return Judged(tuple(prompts), preferred, rejected, (better_assets, worse_assets), agrees)


def simulated_pairs(
    stage: str, prompts: Sequence[str], per_condition: int, seed: int, defects: toy.Defects | None = None
) -> list[PreferencePair]:
    """Make simulated preference pairs of a stage's latents.

    Pairs with the same id in different stages are made of the same two drafts.

    Args:
        stage: name of the stage.
        prompts: prompts.
        per_condition: number of pairs of each prompt.
        seed: seed of the pairs.
        defects: largest strengths of the defects; None uses the defaults of `Defects`.
    """
    pairs = []
    for condition in prompts:
        # The seed depends on the prompt, so that the pairs of a prompt do not depend on the other prompts.
        prompt_seed = zlib.crc32(f"{seed} {condition}".encode())
        labelled_pairs = judge_drafts(
            [condition] * per_condition, torch.Generator().manual_seed(prompt_seed), defects
        )
        latents_by_label = [
            separate(drafts.latents(stage)) for drafts in (labelled_pairs.preferred, labelled_pairs.rejected)
        ]
        for pair_number, (preferred, rejected) in enumerate(zip(*latents_by_label, strict=True)):
            pairs.append(
                PreferencePair(
                    id=f"{condition.replace(' ', '-')}-{seed}-{pair_number:03d}",
                    condition=condition,
                    stage=stage,
                    preferred=preferred,
                    rejected=rejected,
                    provenance={"seed": seed, "number": pair_number},
                )
            )
    return pairs


def simulated_singles(
    label_kind: str, prompts: Sequence[str], per_condition: int, seed: int, defects: toy.Defects | None = None
) -> Labelled:
    """Make assets with one simulated label each, and convert the labels to a goodness of each asset.

    For the same seed, the assets are the same for both kinds of labels.

    Args:
        label_kind: kind of the labels. "thumbs": P(up) = sigmoid((s - s_median) / TEMPERATURE), where s is
            LabelOracle's score and s_median its median over the assets of the prompt. "ranks": the order of s
            + TEMPERATURE g, where g has a Gumbel distribution (Luce 1959). For two assets, this order has the
            probability of `judge_drafts`.
        prompts: prompts.
        per_condition: number of assets of each prompt.
        seed: seed of the assets and labels.
        defects: largest strengths of the defects; None uses the defaults of `Defects`.
    """
    assets = list[Candidate]()
    goodness_by_asset = dict[str, float]()
    for condition in prompts:
        # "alone": another random stream than in simulated_pairs, so that the drafts differ from its pairs
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {condition} alone".encode()))
        drafts = toy.draw_drafts([condition] * per_condition, generator, defects)
        scores = LabelOracle()(toy.make_assets(drafts), [condition] * per_condition)
        is_thumb_up = torch.rand(per_condition, generator=generator) < torch.sigmoid(
            (scores - scores.median()) / TEMPERATURE
        )
        # Minus the logarithm of an exponential random number has a Gumbel distribution.
        noisy_scores = (
            scores - TEMPERATURE * torch.empty(per_condition).exponential_(generator=generator).log()
        )
        asset_names = [f"{condition.replace(' ', '-')}-{seed}-{i:03d}" for i in range(per_condition)]
        # Minus, because smaller ranks are better.
        rank_by_asset = dict(zip(asset_names, (-noisy_scores).tolist(), strict=True))
        goodness_by_asset |= (
            goodness_from_ranks(rank_by_asset)
            if label_kind == "ranks"
            else goodness_from_votes(zip(asset_names, is_thumb_up.tolist(), strict=True))
        )
        latents = {stage: separate(drafts.latents(stage)) for stage in (toy.STRUCTURE, toy.VOXELS)}
        for i, name in enumerate(asset_names):
            asset_latents = {stage: stage_latents[i] for stage, stage_latents in latents.items()}
            assets.append(
                Candidate(name=name, condition=condition, rank=rank_by_asset[name], latents=asset_latents)
            )
    return Labelled(assets=assets, goodness=goodness_by_asset)


FEATURES = 15  # number of features that `_features` returns


class LearnedReward(nn.Module):
    """Learned reward of an asset: a small network on the features of its voxels and its colour errors.

    The colour errors are measured against a learned colour for each colour name and height.
    """

    mean: torch.Tensor  # [FEATURES], mean of the features in the training data
    std: torch.Tensor  # [FEATURES], their standard deviation

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.colour = nn.Embedding(len(toy.COLOURS), toy.R * 3)  # colour of every class, by height
        nn.init.constant_(self.colour.weight, 0.5)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        layer_sizes = [FEATURES + 2 + len(toy.SHAPES), hidden, hidden]
        layers = [
            layer
            for n_in, n_out in zip(layer_sizes, layer_sizes[1:], strict=False)
            for layer in (nn.Linear(n_in, n_out), nn.GELU())
        ]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def score(self, volumes: torch.Tensor, shapes: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        """Return the scores [N] of assets, which are not differentiable in the occupancy.

        Args:
            volumes: [N, 4, R, R, R], occupancy and colour of the assets, see `volumes_of`.
            shapes: [N], class numbers of the shapes of the prompts.
            colours: [N], class numbers of the colours of the prompts.
        """
        occupancy = volumes[:, :1]
        asset_colours = volumes[:, 1:]
        learned_colours = self.colour(colours).view(-1, 3, 1, 1, toy.R)
        # Mean squared error of each channel over the occupied cells, [N, 3].
        mean_squared_error = ((asset_colours - learned_colours).square() * occupancy).flatten(2).sum(
            2
        ) / occupancy.flatten(1).sum(1, keepdim=True)
        colour_errors = (
            torch.stack([mean_squared_error.mean(1), mean_squared_error.mean(1).sqrt()], dim=1) * 4
        )
        features = (_features(volumes) - self.mean) / self.std
        return self.head(
            torch.cat([features, colour_errors, F.one_hot(shapes, len(toy.SHAPES)).float()], dim=1)
        ).squeeze(1)

    @torch.no_grad()
    def forward(self, assets: Sequence[toy.ToyAsset], prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of N assets with N prompts, [N] float32 on the CPU."""
        device = self.mean.device
        return self.score(
            volumes_of(assets).to(device),
            *(class_numbers.to(device) for class_numbers in toy.classes(prompts)),
        ).cpu()


def _features(volumes: torch.Tensor) -> torch.Tensor:
    """Return the features [N, 15] of volumes [N, 4, R, R, R].

    The features of a volume, in this order:
        1 value    number of voxels
        7 values   shares of the voxels with 0 to 6 filled neighbours
        5 values   numbers of empty cells with 2 to 6 filled neighbours, divided by the number of voxels
        1 value    share of the voxels whose mirror image in x is empty
        1 value    mean colour difference of voxels that are vertical neighbours
    """
    occupancy = volumes[:, 0]
    neighbour_counts = toy.neighbours(occupancy)  # number of filled face neighbours, 0 to 6
    voxel_counts = occupancy.sum((1, 2, 3))
    filled_shares = [((neighbour_counts == k) * occupancy).sum((1, 2, 3)) / voxel_counts for k in range(7)]
    empty_shares = [
        ((neighbour_counts == k) * (1 - occupancy)).sum((1, 2, 3)) / voxel_counts for k in range(2, 7)
    ]
    # the mirror image in x, as all targets are symmetric
    unmirrored_share = ((1 - occupancy.flip(1)) * occupancy).sum((1, 2, 3)) / voxel_counts
    # 1 where a voxel and the voxel above it are both occupied, else 0
    vertical_pair_mask = occupancy[..., 1:] * occupancy[..., :-1]
    # mean difference of colours between vertical neighbours; the clamp is for assets without such pairs
    colour_roughness = (volumes[:, 1:].diff(dim=-1).abs().mean(1) * vertical_pair_mask).sum(
        (1, 2, 3)
    ) / vertical_pair_mask.sum((1, 2, 3)).clamp(min=1)
    return torch.stack(
        [voxel_counts, *filled_shares, *empty_shares, unmirrored_share, colour_roughness], dim=1
    )


def volumes_of(assets: Sequence[toy.ToyAsset]) -> torch.Tensor:
    """Return the occupancy (channel 0) and the colour (channels 1 to 3) of N assets, [N, 4, R, R, R]."""
    return torch.stack(
        [torch.cat([asset.occupancy[None].float(), asset.colours.permute(3, 0, 1, 2)]) for asset in assets]
    )


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """Settings of the training of the learned reward."""

    pairs: int = 4000  # number of pairs to train on
    held_out: int = 800  # number of additional pairs, for the test only
    epochs: int = 16
    batch: int = 64  # number of pairs in an update
    lr: float = 3e-3  # initial learning rate of AdamW, which decreases to 0 along a cosine
    seed: int = 0  # seed of the initial weights


def fit(
    better_assets: Sequence[toy.ToyAsset],
    worse_assets: Sequence[toy.ToyAsset],
    prompts: Sequence[str],
    training_settings: RewardTraining,
    generator: torch.Generator,
    on_step: Callable[[int, int, float], None] | None = None,
) -> LearnedReward:
    """Fit the learned reward to pairs of assets by the preference loss (Bradley and Terry 1952).

    Args:
        better_assets: P preferred assets.
        worse_assets: P rejected assets.
        prompts: P prompts.
        training_settings: settings of the training.
        generator: random generator that shuffles the pairs.
        on_step: function that is called with the step, the number of steps and the loss; None for no call.
    """
    # The initial weights depend on the seed only, and the random state of the caller is restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training_settings.seed)
        network = LearnedReward()
    optimizer = torch.optim.AdamW(network.parameters(), lr=training_settings.lr, weight_decay=0.05)
    preferred_volumes = volumes_of(better_assets)
    rejected_volumes = volumes_of(worse_assets)
    features = _features(torch.cat([preferred_volumes, rejected_volumes]))
    # clamp avoids a division by 0 for a feature that is constant.
    network.mean = features.mean(0)
    network.std = features.std(0).clamp(min=1e-3)
    shapes, colours = toy.classes(prompts)
    step = 0
    n_steps = training_settings.epochs * (-(-len(prompts) // training_settings.batch))
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(training_settings.epochs):
        for batch_indices in torch.randperm(len(prompts), generator=generator).split(training_settings.batch):
            # [2 B]: preferred, then rejected
            scores = network.score(
                torch.cat([preferred_volumes[batch_indices], rejected_volumes[batch_indices]]),
                shapes[batch_indices].repeat(2),
                colours[batch_indices].repeat(2),
            )
            loss = preference_loss(scores[: len(batch_indices)] - scores[len(batch_indices) :]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
            step += 1
            if on_step is not None:
                on_step(step, n_steps, float(loss.detach()))
    return network.eval()
