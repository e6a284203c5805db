"""Reward that reads the latents of one stage, so that nothing is decoded while a flow is tuned by it.

The features of a place (a grid's cell, a voxel, a token) are: its latent; the difference between the latent
and the x_0 that the stage's untuned network predicts at TIMES, each time from a noise of its own and with the
prompt's conditioning; its position and its neighbourhood; for a voxel also whether its mirror images are
occupied, since most assets are symmetric. The differences show what the untuned network would not have
generated. Most of TIMES lie close to 1, almost pure noise, where the prediction is decided by the prompt.
Small networks read each place together with the conditioning, average over places, and return a score. The
scores of several networks are averaged.

The networks are trained on pairs of the same latents (Bradley-Terry). If a reward of finished assets can be
fitted to the same people's pairs, its scores of the labelled assets are the target instead (distillation:
Hinton et al. 2015, of pairwise probabilities). Its scores are less noisy than single answers, and compare all
assets of a prompt, not only those of a pair.

A .safetensors file holds the weights, and as JSON the stage, the form of its latents, the hash of the stage's
network, and the record of the training.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; P places of all samples, D features of a
place, E size of a pooled conditioning, W width.
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

TIMES = (0.2, 0.5, 0.9, 0.9, 0.9)  # of the untuned network's predictions, in 0..1; 1 is pure noise
KIND = "latent-reward"  # kind of the file
MEMBERS = 3  # networks, each from its own random start
BATCH = 64  # latents at once
TOGETHER = 4  # labels of one prompt in a batch, so that distillation can compare their assets


@dataclass(frozen=True, kw_only=True)
class LatentForm:
    """Description of the latents that a network reads."""

    stage: str  # name of the stage
    kind: str  # of latents: DenseGrid, SparseVoxels or TokenSet
    channels: int  # of a place
    resolution: int  # of the grid; 0 for tokens
    base: str  # hash of the stage's network

    @classmethod
    def of(cls, stage: FlowStage) -> "LatentForm":
        """Describe the latents of a stage. Raises: ValueError for a stage of several tensors."""
        latents = stage.latents
        if not isinstance(latents, (DenseGrid, SparseVoxels, TokenSet)):
            got = type(latents).__name__
            raise ValueError(
                f"latent reward: expected a stage of a grid, voxels or tokens, got {got} of {stage.name!r}."
                " Use a reward of finished assets for this stage."
            )
        return cls(
            stage=stage.name,
            kind=type(latents).__name__,
            channels=latents.channels,
            resolution=getattr(latents, "resolution", 0),
            base=stage.hash,
        )

    @property
    def numbers(self) -> int:
        """Return D, the number of features of a place."""
        # voxels: neighbours (one of seven), mirror images, position, size; grids: position, mean around
        around = {"SparseVoxels": 7 + 3 + 3 + 1, "DenseGrid": 3 + self.channels, "TokenSet": 0}[self.kind]
        return self.channels * (1 + len(TIMES)) + around


def pooled(condition: Condition) -> torch.Tensor:
    """Pool the conditioning to one row a sample, [N, E]: the mean of its tokens.

    The rows of several tensors are concatenated in the order of their names.
    """
    tensors = (
        [condition]
        if isinstance(condition, torch.Tensor)
        else [condition[name] for name in sorted(condition)]
    )
    return torch.cat([x.float().flatten(1, -2).mean(1) if x.ndim > 2 else x.float() for x in tensors], 1)


class PlaceNetwork(nn.Module):
    """Network from the features of places and a pooled conditioning to scores."""

    mean: torch.Tensor  # [D], of the training's places
    std: torch.Tensor  # [D], likewise

    def __init__(self, numbers: int, condition: int, width: int = 32, conditioning: int = 16):
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))
        # the attribute's name is the key in the state dicts of files
        self.told = nn.Sequential(
            nn.Linear(condition, 2 * conditioning), nn.GELU(), nn.Linear(2 * conditioning, conditioning)
        )
        self.place = nn.Sequential(
            nn.Linear(numbers + conditioning, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU()
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Compute scores [N] from the places of N samples, [p, D] each, and conditioning [N, E].

        Differentiable in: rows, parameters.
        """
        return self.head(self.embed(rows, condition)).squeeze(1)

    def embed(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Embed each place and average over each sample, [N, W]. Differentiable in: rows, parameters."""
        # samples may have different numbers of places: all rows are concatenated, [P, D]
        lengths = torch.tensor([len(x) for x in rows], device=condition.device)
        sample = torch.arange(len(rows), device=condition.device).repeat_interleave(lengths)  # [P]
        conditioning = self.told(condition)
        # [P, W]
        places = self.place(
            torch.cat([(torch.cat(list(rows)) - self.mean) / self.std, conditioning[sample]], 1)
        )
        return places.new_zeros(len(rows), places.shape[1]).index_add(0, sample, places) / lengths[:, None]


class PlaceNetworks(nn.Module):
    """Ensemble of several networks, whose scores are averaged."""

    def __init__(self, numbers: int, condition: int):
        super().__init__()
        self.members = nn.ModuleList(PlaceNetwork(numbers, condition) for _ in range(MEMBERS))

    def forward(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Compute the mean score of the members, [N]. Differentiable in: rows, parameters."""
        return torch.stack([member(rows, condition) for member in self.members]).mean(0)


class LatentReward:
    """Reward of the latents of a stage. It keeps the stage's network of the moment as the untuned one."""

    def __init__(self, pipeline: Pipeline, stage: FlowStage, network: PlaceNetworks, record: Mapping):
        self.pipeline = pipeline
        self.stage = stage
        self.network = network
        self.record = dict(record)  # of its training, JSON
        self.form = LatentForm.of(stage)
        # shares its memory with the stage; tuning trains a copy, so this network stays untuned
        self.base = FrozenModel(shared_copy(stage.model))
        self.device = next(stage.model.parameters()).device

    def conditioning(self, names: Sequence[str]) -> Condition:
        """Return the conditioning tensors of prompts, on the device."""
        return to_device(self.pipeline.conditions(list(names), self.stage.name), self.device)

    @torch.no_grad()
    def places(self, x_0: Batch, condition: Condition) -> list[torch.Tensor]:
        """Compute the features of the places of each sample, [p, D] each. Not differentiable."""
        x_0, path, n = x_0.to(self.device), self.stage.path, count(x_0)
        given = coords_of(separate(x_0))  # noises of sparse samples lie on the same voxels
        parts = [feats_of(x_0)]
        for number, time in enumerate(TIMES):
            t = torch.full([n], time, device=self.device)
            # the same seed for all samples: scores then differ by latents and prompts alone
            eps = self.stage.noise([number] * n, given).to(self.device)
            x_t = path.mix(x_0, t, eps)
            # x_0 minus the untuned network's prediction of it
            parts.append(
                feats_of(x_0) - feats_of(path.data(x_t, t, self.base.velocity(self.stage, x_t, t, condition)))
            )
        if isinstance(x_0, SparseBatch):
            rows = torch.cat([*(part.float() for part in parts), _around(x_0, self.form.resolution)], 1)
            return list(rows.split(x_0.lengths.tolist()))
        assert isinstance(x_0, torch.Tensor)
        # tokens [N, L, C] have no position
        if not self.form.resolution:
            return list(torch.cat(parts, 2).float())
        side = self.form.resolution
        cells = (
            torch.cartesian_prod(*[torch.arange(side, device=self.device)] * 3)
            .T.view(1, 3, side, side, side)
            .expand(n, -1, -1, -1, -1)
        )
        # grids [N, C, X, Y, Z]: position in -1..1, and the mean over 3 x 3 x 3 cells with zeros outside
        parts += [(2 * cells + 1) / side - 1, F.avg_pool3d(F.pad(x_0, (1,) * 6), 3, 1)]
        # [N, D, X, Y, Z] -> [N, cells, D]
        return list(torch.cat([part.float() for part in parts], 1).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def of_latents(self, x_0: Batch, prompts: Sequence[str]) -> torch.Tensor:
        """Score latents of the stage, [N] float32 on the CPU; larger is better. Not differentiable."""
        condition = self.conditioning(prompts)
        return self.network(self.places(x_0, condition), pooled(condition)).float().cpu()

    @torch.no_grad()
    def of_members(self, x_0: Batch, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every member's scores [K, N] of latents of the stage, and all members' embeddings
        [N, K * W], float32 on the CPU.
        """
        condition = self.conditioning(prompts)
        # places are the same for all members, and the untuned network's predictions take most of the time
        rows = self.places(x_0, condition)
        members: list[Any] = [*self.network.members]
        embeddings = [member.embed(rows, pooled(condition)) for member in members]
        scores = [m.head(e).squeeze(1) for m, e in zip(members, embeddings, strict=True)]
        return torch.stack(scores).float().cpu(), torch.cat(embeddings, 1).float().cpu()

    def __call__(self, assets: Sequence[Any], conditions: Sequence[str]) -> torch.Tensor:
        """Score finished assets as an AssetReward: encode them, and score the latents of the stage.

        Tables use it. Tuning calls `of_latents` with the latents themselves.
        """
        return self.of_latents(
            collate([latents[self.stage.name] for latents in self.pipeline.encode(assets)]), conditions
        )


def _around(x: SparseBatch, resolution: int) -> torch.Tensor:
    """Compute the features of a voxel's neighbourhood, [V, 14].

    They are the number of its six neighbours that are occupied (one-hot, 0 to 6), whether its three mirror
    images across the middle planes of the grid are occupied, its position in -1..1, and the number of voxels
    of its sample in hundreds.
    """
    sample = x.sample
    places = x.coords[:, 1:].long()
    # cells per edge of each sample's grid; samples without their own use the stage's resolution
    grid_sizes = [size or resolution for size in x.cells or [None] * x.size]
    cells = torch.tensor(grid_sizes, device=places.device)[sample][:, None]  # [V, 1]

    def key(at: torch.Tensor) -> torch.Tensor:
        """Number each cell of each sample uniquely."""
        # + 1: neighbours may lie outside the grid by one cell, on either side
        a, b, c = (at + 1).unbind(1)
        return ((sample * (resolution + 2) + a) * (resolution + 2) + b) * (resolution + 2) + c

    def there(at: torch.Tensor) -> torch.Tensor:
        """Return whether cells are occupied, [V] bool."""
        return torch.isin(key(at), key(places), assume_unique=True)

    axes = torch.eye(3, dtype=torch.long, device=places.device)
    beside = torch.stack([there(places + step) for step in (*axes, *-axes)]).sum(0)  # [V]
    # [V, 3]
    mirrored = torch.stack([there(torch.where(axis.bool(), cells - 1 - places, places)) for axis in axes], 1)
    size = (x.lengths.float() / 100)[sample][:, None]
    return torch.cat([F.one_hot(beside, 7).float(), mirrored.float(), (2 * places + 1) / cells - 1, size], 1)


# Training.


@dataclass(frozen=True, kw_only=True)
class LatentTraining:
    """Settings of the training of a latent reward."""

    epochs: int = 12  # over the pairs; twice as many in distillation, whose targets are not noisy
    batch: int = 32  # pairs per update
    lr: float = 3e-3  # of AdamW; falls to 0 along a cosine
    weight_decay: float = 0.05  # of AdamW
    seed: int = 0  # of the networks' starts and the order of the pairs


def from_problem(
    problem: Problem, stage: str, training: LatentTraining | None = None, decoded: AssetReward | None = None
) -> LatentReward:
    """Train a reward of a stage's latents on a problem's pairs.

    If the problem can fit a reward of finished assets, that reward is distilled.

    Args: decoded: the reward of finished assets; None fits one.
    """
    training = training or LatentTraining()
    pairs = problem.train_pairs[stage]
    if problem.fit_reward is None or not pairs:
        return train_on_pairs(problem.pipeline, stage, pairs, training)
    finished = problem.train_pairs[problem.pipeline.stages[-1].name]
    decoded = decoded or problem.fit_reward(finished, training.seed)
    return train_on_pairs(
        problem.pipeline,
        stage,
        pairs,
        training,
        scores_of_assets(problem, [decoded], in_order(finished, pairs))[:, 0],
    )


def in_order(pairs: Sequence[PreferencePair], of: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return the pairs of the same assets at another stage, in the order of `of`."""
    # ids alone may occur once for every prompt
    by_id = {(pair.condition, pair.id): pair for pair in pairs}
    return [by_id[pair.condition, pair.id] for pair in of]


@torch.no_grad()
def scores_of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> torch.Tensor:
    """Decode both assets of P pairs of the last stage, and score them by S rewards, [P, S, 2] float64."""
    device = next(problem.pipeline.stages[-1].model.parameters()).device
    rows = []
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        names = [pair.condition for pair in pairs[i : i + BATCH]]
        sides = []
        for side in ("preferred", "rejected"):
            # decoded once for all rewards, since decoding takes longer than scoring
            assets = problem.pipeline.decode(collate([getattr(pair, side) for pair in part]).to(device))
            # [p, S]
            sides.append(torch.stack([reward(assets, names).double().cpu() for reward in rewards], 1))
        rows.append(torch.stack(sides, 2))
    return torch.cat(rows)


def train_on_pairs(
    pipeline: Pipeline,
    stage_name: str,
    pairs: Sequence[PreferencePair],
    training: LatentTraining | None = None,
    decoded: torch.Tensor | None = None,
) -> LatentReward:
    """Train a reward of a stage's latents on pairs.

    Args: decoded: [n, 2], another reward's scores of the pairs' finished assets, preferred first; they are
        the target instead of the labels.
    Raises: ValueError for no pairs, latents that are not of the stage, or of an unsupported kind.
    """
    training = training or LatentTraining()
    stage = stage_of(pipeline, stage_name)
    if not pairs:
        raise ValueError(
            f"latent reward of stage {stage_name!r}: expected labelled pairs, got none. Label some assets."
        )
    reward = LatentReward(
        pipeline, stage, _new(pipeline, LatentForm.of(stage), pairs[0].condition, training.seed), {}
    )
    reward.record = {
        "labels": len(pairs),
        "of": "pairs",
        "decoded": decoded is not None,
        "training": asdict(training),
    }
    # features are computed once for all epochs, as neither the latents nor the untuned network change
    rows, conditioning = _read(reward, pairs)
    # mean and standard deviation of the features, from at most 256 pairs
    every = torch.cat([x for sides in rows[:256] for x in sides])
    mean = every.mean(0)
    std = every.std(0).clamp(min=0.05)  # a feature that is almost constant must not be amplified
    names = sorted({pair.condition for pair in pairs})
    group = torch.tensor([names.index(pair.condition) for pair in pairs])
    generator = torch.Generator().manual_seed(training.seed)
    epochs = training.epochs * (1 if decoded is None else 2)
    for network in reward.network.members:
        network.mean = mean
        network.std = std
        order = [chosen for _ in range(epochs) for chosen in _batches(group, training.batch, generator)]
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=training.lr, weight_decay=training.weight_decay
        )
        # one step of the cosine per batch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
        for chosen in order:
            preferred, rejected = (
                network([rows[i][side] for i in chosen.tolist()], conditioning[chosen]) for side in (0, 1)
            )
            if decoded is None:
                loss = preference_loss(preferred - rejected).mean()
            else:
                loss = _agreement(
                    torch.stack([preferred, rejected], 1), decoded[chosen].to(preferred), group[chosen]
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reward


def _batches(group: torch.Tensor, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Divide the indices of labels into random batches, with up to TOGETHER of one prompt side by side.

    Args: group: [n], the prompt's number of each label.
    """
    shuffled = torch.randperm(len(group), generator=generator)
    parts = [
        part for number in group.unique() for part in shuffled[group[shuffled] == number].split(TOGETHER)
    ]
    return list(
        torch.cat([parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]).split(size)
    )


def _agreement(scores: torch.Tensor, goals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the outcomes of all pairs of assets of one prompt, a scalar.

    The target probability of a pair is sigmoid of the difference of the goals.
    Args: scores, goals: [n, 2]; group: [n], the prompt's number of each label.
    """
    # [n, 2] -> [2n]
    scores = scores.flatten()
    goals = goals.flatten()
    group = group.repeat_interleave(2)
    i, j = torch.triu_indices(len(scores), len(scores), 1)
    i, j = (side[group[i] == group[j]] for side in (i, j))
    return F.binary_cross_entropy_with_logits(scores[i] - scores[j], (goals[i] - goals[j]).sigmoid())


def _new(pipeline: Pipeline, form: LatentForm, condition: str, seed: int) -> PlaceNetworks:
    """Create networks for a form of latents, with the conditioning's size taken from one prompt."""
    size = pooled(pipeline.conditions([condition], form.stage)).shape[1]
    device = next(stage_of(pipeline, form.stage).model.parameters()).device
    # created on the CPU: the start is the same on every device, and the caller's generator is unchanged
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlaceNetworks(form.numbers, size).to(device)


def _read(
    reward: LatentReward, pairs: Sequence[PreferencePair]
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Compute the places of both latents of each pair, and the pooled conditioning of all pairs [n, E]."""
    rows = list[list[torch.Tensor]]()
    pooled_rows = []
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        condition = reward.conditioning([pair.condition for pair in part])
        sides = [[getattr(pair, side) for pair in part] for side in ("preferred", "rejected")]
        # before the network runs: its own error would not name the stage
        for latent in (*sides[0], *sides[1]):
            reward.stage.check(f"latent reward of stage {reward.stage.name!r}", latent)
        rows += [
            list(places)
            for places in zip(*(reward.places(collate(side), condition) for side in sides), strict=True)
        ]
        pooled_rows.append(pooled(condition))
    return rows, torch.cat(pooled_rows)


# Files.


def save(path: Path, reward: LatentReward) -> Path:
    """Write the weights, with the form of the latents and the record of the training as JSON."""
    meta = {"form": asdict(reward.form), "record": reward.record}
    write_tensors(path, KIND, {name: x.cpu() for name, x in reward.network.state_dict().items()}, meta)
    return path


def load(path: Path, pipeline: Pipeline, stage: FlowStage, condition: str) -> LatentReward:
    """Read the file of a reward, for a stage. Args: condition: any prompt of the pipeline.

    Raises: FileNotFoundError; ValueError for a damaged or foreign file, one of another stage, of latents of
        another form or of another network, and weights that do not fit by name and shape.
    """
    tensors, meta = read_tensors(path, KIND)
    meta = version_0_1.latent_reward(meta)
    try:
        got = LatentForm(**meta["form"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the description of the latent reward is incomplete or has unknown entries: {error}."
            " Train the reward again."
        ) from None
    # another network of the stage would make other predictions, and so other features: its hash must match
    expected = LatentForm.of(stage)
    for name, value in asdict(expected).items():
        if getattr(got, name) != value:
            raise ValueError(
                f"{path}: expected a reward of {name} {value!r}, got one of {getattr(got, name)!r}. Train a"
                " reward of this stage."
            )
    network = _new(pipeline, expected, condition, 0)
    load_strict(network, tensors, str(path))
    return LatentReward(pipeline, stage, network, meta["record"])
