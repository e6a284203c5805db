"""Reward that reads the latents of one stage, so that nothing is decoded while a flow is tuned by it.

A latent has a vector at each of its positions: the cells of a grid, the voxels, or the tokens. The features
of a position are:
    - its latent vector;
    - the difference between this vector and the x_0 that the stage's untuned network predicts, at each of
      TIMES, each time with another noise and with the prompt's conditioning; it shows what the untuned
      network would not have generated, and most of TIMES lie close to 1 (almost pure noise), where the prompt
      decides the prediction;
    - its coordinates and its neighbourhood;
    - for a voxel also whether its mirror images are occupied, since most assets are symmetric.
Small networks read the features of each position together with the conditioning, average over positions, and
return a score. The scores of several networks are averaged.

The networks are trained on preference pairs of latents with the loss of Bradley and Terry, -log sigmoid of
the difference of the scores. If the problem can fit a reward of finished assets to the same people's pairs,
the networks are trained to reproduce its scores instead (distillation: Hinton et al. 2015, here of pairwise
probabilities). The scores of this reward are less noisy than single answers, and they compare all assets of a
prompt, not only the two assets of a pair.

A .safetensors file holds the weights. The JSON description in the file holds the stage, the form of its
latents, the hash of the stage's network, and the record of the training.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; P positions of all samples,
p positions of one sample, D features of a position, E size of a pooled conditioning, W width of a network,
K networks of the ensemble.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import Batch, SparseBatch, collate, coords_of, count, feats_of, separate
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, to_device
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.stage import (
    AssetReward,
    DenseGrid,
    FlowStage,
    Pipeline,
    SparseVoxels,
    TokenSet,
    stage_of,
)
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from training.storage import load_strict, read_tensors, write_tensors

TIMES = (0.2, 0.5, 0.9, 0.9, 0.9)  # times of the untuned network's predictions, in 0..1; 1 is pure noise
KIND = "latent-reward"  # kind of the file
MEMBERS = 3  # number of networks, each with its own random initialisation
BATCH = 64  # number of latents that are processed at once
# number of labels of one prompt that stay together in a batch, so that distillation can compare their assets
TOGETHER = 4


@dataclass(frozen=True, kw_only=True)
class LatentForm:
    """Description of a stage's latents, on which the networks of a reward depend."""

    stage: str  # name of the stage
    kind: str  # class of the latents: DenseGrid, SparseVoxels or TokenSet
    channels: int  # channels of a position
    resolution: int  # cells per axis of the grid; 0 for tokens
    base: str  # hash of the stage's network

    @classmethod
    def of(cls, stage: FlowStage) -> "LatentForm":
        """Describe the latents of a stage.

        Raises: ValueError if the latents are neither a grid, voxels nor tokens.
        """
        latents = stage.latents
        if not isinstance(latents, (DenseGrid, SparseVoxels, TokenSet)):
            raise ValueError(
                f"latent reward: the latents of stage {stage.name!r} have the form {type(latents).__name__},"
                " which is neither a grid, voxels nor tokens. Use a reward of finished assets for this stage."
            )
        return cls(
            stage=stage.name,
            kind=type(latents).__name__,
            channels=latents.channels,
            resolution=getattr(latents, "resolution", 0),
            base=stage.hash,
        )

    @property
    def feature_count(self) -> int:
        """Return D, the number of features of a position."""
        # voxels: number of neighbours (one-hot, 7), mirror images (3), coordinates (3), size (1), see
        # _around; grids: coordinates (3), mean over the neighbourhood (one for each channel)
        location_features = {
            "SparseVoxels": 7 + 3 + 3 + 1,
            "DenseGrid": 3 + self.channels,
            "TokenSet": 0,
        }[self.kind]
        return self.channels * (1 + len(TIMES)) + location_features


def pooled(condition: Condition) -> torch.Tensor:
    """Pool the conditioning of N samples to one row each, [N, E], by the mean over its tokens.

    If the conditioning has several tensors, their rows are concatenated in the order of their names.
    """
    if isinstance(condition, torch.Tensor):
        tensors = [condition]
    else:
        tensors = [condition[name] for name in sorted(condition)]
    # [N, ..., C] -> [N, C]; a tensor [N, C] has no tokens to average over
    pooled_rows = [x.float().flatten(1, -2).mean(1) if x.ndim > 2 else x.float() for x in tensors]
    return torch.cat(pooled_rows, 1)


class PositionNetwork(nn.Module):
    """Network that scores samples from the features of their positions and a pooled conditioning.

    Args:
        feature_count: number D of features of a position.
        condition_size: size E of the pooled conditioning.
        width: number W of hidden channels.
        reduced_size: number of channels that the conditioning is reduced to.
    """

    mean: torch.Tensor  # [D], mean of the features in the training data
    std: torch.Tensor  # [D], standard deviation of the features in the training data

    def __init__(self, feature_count: int, condition_size: int, width: int = 32, reduced_size: int = 16):
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_count))
        self.register_buffer("std", torch.ones(feature_count))
        # the names of the attributes are keys in the state dicts of files
        self.told = nn.Sequential(
            nn.Linear(condition_size, 2 * reduced_size),
            nn.GELU(),
            nn.Linear(2 * reduced_size, reduced_size),
        )
        self.place = nn.Sequential(
            nn.Linear(feature_count + reduced_size, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.GELU(),
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, feature_rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Compute the scores [N] of N samples.

        Differentiable in: feature_rows, parameters.

        Args:
            feature_rows: features of the positions of each sample, [p, D] each.
            condition: pooled conditioning, [N, E].
        """
        return self.head(self.embed(feature_rows, condition)).squeeze(1)

    def embed(self, feature_rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Embed each position, and average over the positions of each sample, [N, W].

        The arguments are those of `forward`. Differentiable in: feature_rows, parameters.
        """
        # samples may have different numbers of positions: all rows are concatenated, [P, D]
        lengths = torch.tensor([len(x) for x in feature_rows], device=condition.device)
        # index of the sample of each position, [P]
        sample_index = torch.arange(len(feature_rows), device=condition.device).repeat_interleave(lengths)
        conditioning = self.told(condition)
        # [P, W]
        embeddings = self.place(
            torch.cat([(torch.cat(list(feature_rows)) - self.mean) / self.std, conditioning[sample_index]], 1)
        )
        return (
            embeddings.new_zeros(len(feature_rows), embeddings.shape[1]).index_add(
                0, sample_index, embeddings
            )
            / lengths[:, None]
        )


class PositionNetworks(nn.Module):
    """Ensemble of several networks, whose scores are averaged."""

    def __init__(self, feature_count: int, condition_size: int):
        super().__init__()
        self.members = nn.ModuleList(PositionNetwork(feature_count, condition_size) for _ in range(MEMBERS))

    def forward(self, feature_rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Compute the mean score of the ensemble, [N], see PositionNetwork.forward.

        Differentiable in: feature_rows, parameters.
        """
        return torch.stack([member(feature_rows, condition) for member in self.members]).mean(0)


class LatentReward:
    """Reward that scores the latents of a stage.

    The network that the stage has when this object is created is taken as the untuned network.

    Args:
        pipeline: pipeline of the stage.
        stage: stage whose latents are scored.
        network: networks that score the features.
        record: record of the training, JSON.
    """

    def __init__(self, pipeline: Pipeline, stage: FlowStage, network: PositionNetworks, record: Mapping):
        self.pipeline = pipeline
        self.stage = stage
        self.network = network
        self.record = dict(record)
        self.form = LatentForm.of(stage)
        # shares its memory with the stage; tuning trains a copy, so this network stays untuned
        self.base = FrozenModel(shared_copy(stage.model))
        self.device = next(stage.model.parameters()).device

    def conditioning(self, names: Sequence[str]) -> Condition:
        """Return the conditioning tensors of prompts, on the device."""
        return to_device(self.pipeline.conditioning(list(names), self.stage.name), self.device)

    @torch.no_grad()
    def position_features(self, x_0: Batch, condition: Condition) -> list[torch.Tensor]:
        """Compute the features of the positions of each of N samples, [p, D] each. Not differentiable."""
        x_0 = x_0.to(self.device)
        path = self.stage.path
        n = count(x_0)
        coords = coords_of(separate(x_0))  # the noise of a sparse sample lies on the voxels of the sample
        features = [feats_of(x_0)]
        for time_number, time in enumerate(TIMES):
            t = torch.full([n], time, device=self.device)
            # the same seed for all samples: scores then differ by latents and prompts alone
            eps = self.stage.noise([time_number] * n, coords).to(self.device)
            x_t = path.mix(x_0, t, eps)
            v = self.base.velocity(self.stage, x_t, t, condition)
            # x_0 minus the untuned network's prediction of it
            features.append(feats_of(x_0) - feats_of(path.data(x_t, t, v)))
        if isinstance(x_0, SparseBatch):
            feature_rows = torch.cat(
                [*(feature.float() for feature in features), _around(x_0, self.form.resolution)], 1
            )
            return list(feature_rows.split(x_0.lengths.tolist()))
        assert isinstance(x_0, torch.Tensor)
        # tokens [N, L, C] have no position
        if not self.form.resolution:
            return list(torch.cat(features, 2).float())
        resolution = self.form.resolution
        # indices of all cells of a grid [N, C, X, Y, Z], as [N, 3, X, Y, Z]
        cell_coordinates = torch.cartesian_prod(*[torch.arange(resolution, device=self.device)] * 3)
        cell_coordinates = cell_coordinates.T.view(1, 3, resolution, resolution, resolution).expand(
            n, -1, -1, -1, -1
        )
        # the centre of each cell in -1..1
        features.append((2 * cell_coordinates + 1) / resolution - 1)
        # mean over 3 x 3 x 3 cells, with zeros outside the grid
        features.append(F.avg_pool3d(F.pad(x_0, (1,) * 6), 3, 1))
        # [N, D, X, Y, Z] -> [N, cells, D]
        return list(torch.cat([feature.float() for feature in features], 1).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def score_latents(self, x_0: Batch, prompts: Sequence[str]) -> torch.Tensor:
        """Score latents of the stage, [N] float32 on the CPU; larger is better. Not differentiable."""
        condition = self.conditioning(prompts)
        return self.network(self.position_features(x_0, condition), pooled(condition)).float().cpu()

    @torch.no_grad()
    def score_members(self, x_0: Batch, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score latents of the stage by each network of the ensemble.

        Not differentiable.

        Returns: the scores [K, N]; and the embeddings of all networks side by side, [N, K * W]. Both are
            float32 on the CPU.
        """
        condition = self.conditioning(prompts)
        # the features are the same for all members, and the untuned network's predictions take most of the
        # time
        feature_rows = self.position_features(x_0, condition)
        members: list[Any] = [*self.network.members]
        embeddings = [member.embed(feature_rows, pooled(condition)) for member in members]
        scores = [
            member.head(embedding).squeeze(1) for member, embedding in zip(members, embeddings, strict=True)
        ]
        return torch.stack(scores).float().cpu(), torch.cat(embeddings, 1).float().cpu()

    def __call__(self, assets: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """Score finished assets, [N], by encoding them and scoring the latents of the stage.

        This makes the object an AssetReward, which tables use. Tuning calls `score_latents` with the
        latents themselves.
        """
        return self.score_latents(
            collate([latents[self.stage.name] for latents in self.pipeline.encode(assets)]), prompts
        )


def _around(sparse_batch: SparseBatch, resolution: int) -> torch.Tensor:
    """Compute the features of the location of each voxel, [V, 14].

    The features of a voxel, in this order:
        7 values   number of its six neighbours that are occupied, one-hot from 0 to 6
        3 values   whether its mirror images across the three middle planes of the grid are occupied
        3 values   its coordinates in -1..1
        1 value    number of voxels of its sample, in hundreds

    Args:
        sparse_batch: voxels of all samples.
        resolution: cells per axis of the grid, for samples that have no grid size of their own.
    """
    sample_index = sparse_batch.sample  # [V], index of the sample of each voxel
    # column 0 of coords is the sample; [V, 3]
    voxels = sparse_batch.coords[:, 1:].long()
    # cells per edge of each sample's grid; samples without their own use the stage's resolution
    grid_sizes = [grid_size or resolution for grid_size in sparse_batch.cells or [None] * sparse_batch.size]
    cells_per_axis = torch.tensor(grid_sizes, device=voxels.device)[sample_index][:, None]  # [V, 1]

    def cell_keys(cells: torch.Tensor) -> torch.Tensor:
        """Return an integer for each cell of [V, 3] that is unique over all samples, [V]."""
        # + 1: neighbours may lie outside the grid by one cell, on either side
        x, y, z = (cells + 1).unbind(1)
        return ((sample_index * (resolution + 2) + x) * (resolution + 2) + y) * (resolution + 2) + z

    def is_occupied(cells: torch.Tensor) -> torch.Tensor:
        """Return True for each cell of [V, 3] that is a voxel of the sample in this row, [V] bool."""
        return torch.isin(cell_keys(cells), cell_keys(voxels), assume_unique=True)

    axes = torch.eye(3, dtype=torch.long, device=voxels.device)
    neighbour_count = torch.stack([is_occupied(voxels + step) for step in (*axes, *-axes)]).sum(0)  # [V]
    # the coordinate i of one axis becomes cells - 1 - i; [V, 3]
    mirror_is_occupied = torch.stack(
        [is_occupied(torch.where(axis.bool(), cells_per_axis - 1 - voxels, voxels)) for axis in axes], 1
    )
    hundreds_of_voxels = (sparse_batch.lengths.float() / 100)[sample_index][:, None]  # [V, 1]
    return torch.cat(
        [
            F.one_hot(neighbour_count, 7).float(),
            mirror_is_occupied.float(),
            (2 * voxels + 1) / cells_per_axis - 1,
            hundreds_of_voxels,
        ],
        1,
    )


# Training.


@dataclass(frozen=True, kw_only=True)
class LatentTraining:
    """Settings of the training of a latent reward."""

    # number of epochs over the pairs; twice as many in distillation, whose targets are not noisy
    epochs: int = 12
    batch: int = 32  # number of pairs in an update
    lr: float = 3e-3  # learning rate of AdamW; it falls to 0 along a cosine
    weight_decay: float = 0.05  # weight decay of AdamW
    seed: int = 0  # seed of the initial parameters and of the order of the pairs


def from_problem(
    problem: Problem,
    stage: str,
    training_settings: LatentTraining | None = None,
    decoded_reward: AssetReward | None = None,
) -> LatentReward:
    """Train a reward of a stage's latents on a problem's pairs.

    If the problem can fit a reward of finished assets, that reward is distilled.

    Args:
        problem: problem with people's pairs.
        stage: name of the stage.
        training_settings: settings of the training; None: the defaults.
        decoded_reward: reward of finished assets to distil; None: one is fitted if the problem can do so.

    Raises: see train_on_pairs.
    """
    training_settings = training_settings or LatentTraining()
    pairs = problem.train_pairs[stage]
    if problem.fit_reward is None or not pairs:
        return train_on_pairs(problem.pipeline, stage, pairs, training_settings)
    last_stage_pairs = problem.train_pairs[problem.pipeline.stages[-1].name]
    decoded_reward = decoded_reward or problem.fit_reward(last_stage_pairs, training_settings.seed)
    # latents of the last stage are decoded to the finished assets of the pairs
    asset_scores = scores_of_assets(problem, [decoded_reward], in_order(last_stage_pairs, pairs))
    # one reward: [n, 1, 2] -> [n, 2]
    return train_on_pairs(problem.pipeline, stage, pairs, training_settings, asset_scores[:, 0])


def in_order(
    pairs: Sequence[PreferencePair], ordered_pairs: Sequence[PreferencePair]
) -> list[PreferencePair]:
    """Sort the pairs of one stage in the order of the pairs of the same assets at another stage.

    Args:
        pairs: pairs of one stage.
        ordered_pairs: pairs of the same assets at another stage, in the order that the result has.
    """
    # an id alone is not unique, since it may occur once for every prompt
    by_id = {(pair.condition, pair.id): pair for pair in pairs}
    return [by_id[pair.condition, pair.id] for pair in ordered_pairs]


@torch.no_grad()
def scores_of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> torch.Tensor:
    """Decode both assets of each pair of the last stage, and score them by several rewards.

    Args:
        problem: problem with the pipeline.
        rewards: rewards of finished assets, S.
        pairs: pairs of the last stage, n.
    Returns: the scores, float64 [n, S, 2] for n pairs and S rewards, the preferred asset first.
    """
    device = next(problem.pipeline.stages[-1].model.parameters()).device
    pair_scores = []
    for i in range(0, len(pairs), BATCH):
        batch_pairs = pairs[i : i + BATCH]
        prompts = [pair.condition for pair in batch_pairs]
        role_scores = []
        for role in ("preferred", "rejected"):
            # decoded once for all rewards, since decoding takes longer than scoring
            assets = problem.pipeline.decode(
                collate([getattr(pair, role) for pair in batch_pairs]).to(device)
            )
            # one column for each reward
            role_scores.append(torch.stack([reward(assets, prompts).double().cpu() for reward in rewards], 1))
        pair_scores.append(torch.stack(role_scores, 2))
    return torch.cat(pair_scores)


def train_on_pairs(
    pipeline: Pipeline,
    stage_name: str,
    pairs: Sequence[PreferencePair],
    training_settings: LatentTraining | None = None,
    decoded_scores: torch.Tensor | None = None,
) -> LatentReward:
    """Train a reward of a stage's latents on pairs.

    Args:
        pipeline: pipeline of the stage.
        stage_name: name of the stage.
        pairs: n preference pairs of the stage.
        training_settings: settings of the training; None: the defaults.
        decoded_scores: scores of the pairs' finished assets by another reward, [n, 2], preferred first; they
            are then the target in place of the labels.

    Raises: ValueError for an empty list of pairs, for latents that do not fit the stage, and for a stage
        whose kind of latents is not supported.
    """
    training_settings = training_settings or LatentTraining()
    stage = stage_of(pipeline, stage_name)
    if not pairs:
        raise ValueError(
            f"latent reward of stage {stage_name!r}: there are no labelled pairs of this stage, but at least"
            " one is needed. Label some assets."
        )
    reward = LatentReward(
        pipeline, stage, _new(pipeline, LatentForm.of(stage), pairs[0].condition, training_settings.seed), {}
    )
    reward.record = {
        "labels": len(pairs),
        "of": "pairs",
        "decoded": decoded_scores is not None,
        "training": asdict(training_settings),
    }
    # features are computed once for all epochs, as neither the latents nor the untuned network change
    features, conditioning = _read(reward, pairs)
    # mean and standard deviation of the features, from at most 256 pairs
    sample_features = torch.cat(
        [latent_features for pair_features in features[:256] for latent_features in pair_features]
    )
    mean = sample_features.mean(0)
    std = sample_features.std(0).clamp(min=0.05)  # a feature that is almost constant must not be amplified
    prompts = sorted({pair.condition for pair in pairs})
    # labels of one prompt have the same number
    prompt_numbers = torch.tensor([prompts.index(pair.condition) for pair in pairs])
    generator = torch.Generator().manual_seed(training_settings.seed)
    # the scores of another reward are less noisy than labels, so they are trained on twice as long
    epochs = training_settings.epochs * (1 if decoded_scores is None else 2)
    for network in reward.network.members:
        network.mean = mean
        network.std = std
        # the batches of all epochs, since the cosine below needs their number
        batches = [
            batch_indices
            for _ in range(epochs)
            for batch_indices in _batches(prompt_numbers, training_settings.batch, generator)
        ]
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=training_settings.lr, weight_decay=training_settings.weight_decay
        )
        # one step of the cosine per batch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for batch_indices in batches:
            preferred_scores, rejected_scores = (
                network([features[i][role] for i in batch_indices.tolist()], conditioning[batch_indices])
                for role in (0, 1)  # 0: preferred, 1: rejected
            )
            if decoded_scores is None:
                loss = preference_loss(preferred_scores - rejected_scores).mean()
            else:
                loss = _agreement(
                    torch.stack([preferred_scores, rejected_scores], 1),
                    decoded_scores[batch_indices].to(preferred_scores),
                    prompt_numbers[batch_indices],
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reward


def _batches(prompt_numbers: torch.Tensor, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Divide the indices of n labels into random batches.

    Up to TOGETHER labels of one prompt follow each other, so that most of them are in the same batch.

    Args:
        prompt_numbers: number of the prompt of each label, [n].
        batch_size: number of labels in a batch.
        generator: random generator.
    """
    shuffled_indices = torch.randperm(len(prompt_numbers), generator=generator)
    blocks: list[torch.Tensor] = []  # up to TOGETHER indices each, all of one prompt
    for prompt_number in prompt_numbers.unique():
        blocks += shuffled_indices[prompt_numbers[shuffled_indices] == prompt_number].split(TOGETHER)
    block_order = torch.randperm(len(blocks), generator=generator).tolist()
    return list(torch.cat([blocks[i] for i in block_order]).split(batch_size))


def _agreement(
    scores: torch.Tensor, target_scores: torch.Tensor, prompt_numbers: torch.Tensor
) -> torch.Tensor:
    """Compute the distillation loss, the mean cross-entropy of all comparisons of assets of one prompt.

    The probability that an asset wins against another one is the sigmoid of the difference of their scores.
    The target of this probability is the sigmoid of the difference of their target scores. The loss is a
    scalar.

    Args:
        scores: scores of both assets of n labels, [n, 2].
        target_scores: target scores, [n, 2].
        prompt_numbers: number of the prompt of each label, [n].
    """
    # [n, 2] -> [2n]
    scores = scores.flatten()
    target_scores = target_scores.flatten()
    prompt_numbers = prompt_numbers.repeat_interleave(2)
    # indices of both assets of every comparison, each comparison once
    i, j = torch.triu_indices(len(scores), len(scores), 1)
    same_prompt = prompt_numbers[i] == prompt_numbers[j]
    i = i[same_prompt]
    j = j[same_prompt]
    return F.binary_cross_entropy_with_logits(
        scores[i] - scores[j], (target_scores[i] - target_scores[j]).sigmoid()
    )


def _new(pipeline: Pipeline, form: LatentForm, prompt: str, seed: int) -> PositionNetworks:
    """Create untrained networks for a form of latents.

    Args:
        pipeline: pipeline of the stage.
        form: form of the stage's latents.
        prompt: any prompt, from which the size of the conditioning is taken.
        seed: seed of the initial parameters.
    """
    conditioning_size = pooled(pipeline.conditioning([prompt], form.stage)).shape[1]
    device = next(stage_of(pipeline, form.stage).model.parameters()).device
    # created on the CPU, so that the initial parameters are the same on every device; fork_rng leaves the
    # global generator of the caller unchanged
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PositionNetworks(form.feature_count, conditioning_size).to(device)


def _read(
    reward: LatentReward, pairs: Sequence[PreferencePair]
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Compute the features of both latents of each pair, and the pooled conditioning of the n pairs.

    Returns: the features, a list with two tensors [p, D] for each pair, the preferred latent first; and the
        conditioning [n, E].
    """
    features = list[list[torch.Tensor]]()
    pooled_rows = []
    for i in range(0, len(pairs), BATCH):
        batch_pairs = pairs[i : i + BATCH]
        condition = reward.conditioning([pair.condition for pair in batch_pairs])
        role_latents = [[getattr(pair, role) for pair in batch_pairs] for role in ("preferred", "rejected")]
        # checked before the network runs, whose own error would not name the stage
        for latent in (*role_latents[0], *role_latents[1]):
            reward.stage.check(f"latent reward of stage {reward.stage.name!r}", latent)
        # for each role, a list of features [p, D] of every latent
        role_features = [reward.position_features(collate(latents), condition) for latents in role_latents]
        features += [list(pair_features) for pair_features in zip(*role_features, strict=True)]
        pooled_rows.append(pooled(condition))
    return features, torch.cat(pooled_rows)


# Files.

# names of the fields of LatentForm in messages
FORM_TEXTS = {
    "stage": "stage",
    "kind": "class of latents",
    "channels": "number of channels",
    "resolution": "grid resolution",
    "base": "hash of the stage's network",
}


def save(path: Path, reward: LatentReward) -> Path:
    """Write the weights of a reward to a file, and return the path.

    The file also has the form of the latents and the record of the training, as JSON.
    """
    meta = {"form": asdict(reward.form), "record": reward.record}
    write_tensors(path, KIND, {name: x.cpu() for name, x in reward.network.state_dict().items()}, meta)
    return path


def load(path: Path, pipeline: Pipeline, stage: FlowStage, condition: str) -> LatentReward:
    """Read the reward of a stage from a file.

    Args:
        path: path of the file.
        pipeline: pipeline of the stage.
        stage: stage whose latents the reward scores.
        condition: any prompt of the pipeline, from which the size of the conditioning is taken.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or has other contents; if the reward was trained for another stage,
            for latents of another form or for another network of the stage; and if the weights do not fit by
            name and shape.
    """
    tensors, file_meta = read_tensors(path, KIND)
    file_meta = version_0_1.latent_reward(file_meta)
    try:
        file_form = LatentForm(**file_meta["form"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the description of the latent reward is incomplete or has unknown entries: {error}."
            " Train the reward again."
        ) from None
    # another network of the stage would make other predictions, and so other features: its hash must match
    stage_form = LatentForm.of(stage)
    for field_name, stage_value in asdict(stage_form).items():
        if getattr(file_form, field_name) != stage_value:
            raise ValueError(
                f"{path}: this reward does not fit the stage {stage.name!r}: its {FORM_TEXTS[field_name]} is"
                f" {getattr(file_form, field_name)!r}, but that of the stage is {stage_value!r}. Train a"
                " reward of this stage."
            )
    network = _new(pipeline, stage_form, condition, 0)
    load_strict(network, tensors, str(path))
    return LatentReward(pipeline, stage, network, file_meta["record"])
