"""A reward that reads the latents of one stage: nothing is decoded while a flow is tuned by it.

What is said of a place (a grid's cell, a voxel, a token): its numbers; how they differ from the x_0 that the
stage's own untuned network makes of them at TIMES, each from a noise of its own, under what was asked for,
since what such a network would not have made stands out (almost from noise alone: what the condition asks
for, which most looks are spent on); where it lies and what lies around it; of a voxel whether its mirror
images are there, since most assets are symmetric. Small networks read each place with the condition, and the
mean over places is scored; their scores are averaged.

They are learnt from pairs of the same latents (Bradley-Terry). Where the same people's pairs teach a reward
of finished assets, what it says of the labelled assets is learnt instead (distillation: Hinton et al. 2015,
of pairwise probabilities): it has seen through the noise of single answers, and compares all assets of a
condition, not only those of a pair.

A file is .safetensors with the weights, and as JSON the stage, the form of its latents, the network behind,
and what it was taught.

Shape letters as in sparse.py; P places of all samples, D numbers of a place, E size of a condition, W width.
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

TIMES = (0.2, 0.5, 0.9, 0.9, 0.9)
KIND = "latent-reward"
MEMBERS = 3  # networks, each from its own start
BATCH = 64  # latents at once
TOGETHER = 4  # labels of one condition in a batch


@dataclass(frozen=True, kw_only=True)
class LatentForm:
    """What a network reads."""

    stage: str
    kind: str  # of latents: DenseGrid, SparseVoxels or TokenSet
    channels: int
    resolution: int  # of the grid; 0 for tokens
    base: str  # hash of the stage's network

    @classmethod
    def of(cls, stage: FlowStage) -> "LatentForm":
        """Raises: ValueError for a stage of several tensors."""
        latents = stage.latents
        if not isinstance(latents, (DenseGrid, SparseVoxels, TokenSet)):
            got = type(latents).__name__
            raise ValueError(
                f"latent reward: expected a stage of a grid, voxels or tokens, got {got} of {stage.name!r}."
                " Judge it decoded."
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
        """D."""
        around = {"SparseVoxels": 7 + 3 + 3 + 1, "DenseGrid": 3 + self.channels, "TokenSet": 0}[self.kind]
        return self.channels * (1 + len(TIMES)) + around


def pooled(condition: Condition) -> torch.Tensor:
    """What was asked for as one row a sample, [N, E]: the mean of its tokens, of several tensors one after
    the other.
    """
    tensors = (
        [condition]
        if isinstance(condition, torch.Tensor)
        else [condition[name] for name in sorted(condition)]
    )
    return torch.cat([x.float().flatten(1, -2).mean(1) if x.ndim > 2 else x.float() for x in tensors], 1)


class PlaceNetwork(nn.Module):
    """Places and conditions -> scores."""

    mean: torch.Tensor  # [D], of the places it was taught
    std: torch.Tensor

    def __init__(self, numbers: int, condition: int, width: int = 32, conditioning: int = 16):
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))
        # the name in state dicts of files
        self.told = nn.Sequential(
            nn.Linear(condition, 2 * conditioning), nn.GELU(), nn.Linear(2 * conditioning, conditioning)
        )
        self.place = nn.Sequential(
            nn.Linear(numbers + conditioning, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU()
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """[N] of the places of N samples, [p, D] each, and conditions [N, E]. Differentiable in: rows,
        parameters.
        """
        return self.head(self.embed(rows, condition)).squeeze(1)

    def embed(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """Average what is read of the places of each sample, [N, W]. Differentiable in: rows, parameters."""
        lengths = torch.tensor([len(x) for x in rows], device=condition.device)
        sample = torch.arange(len(rows), device=condition.device).repeat_interleave(lengths)
        conditioning = self.told(condition)
        # [P, W]
        places = self.place(
            torch.cat([(torch.cat(list(rows)) - self.mean) / self.std, conditioning[sample]], 1)
        )
        return places.new_zeros(len(rows), places.shape[1]).index_add(0, sample, places) / lengths[:, None]


class PlaceNetworks(nn.Module):
    """Several, whose scores are averaged."""

    def __init__(self, numbers: int, condition: int):
        super().__init__()
        self.members = nn.ModuleList(PlaceNetwork(numbers, condition) for _ in range(MEMBERS))

    def forward(self, rows: Sequence[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """[N], as a member's. Differentiable in: rows, parameters."""
        return torch.stack([member(rows, condition) for member in self.members]).mean(0)


class LatentReward:
    """Networks and the stage that it is of. The stage's network is taken as it is now."""

    def __init__(self, pipeline: Pipeline, stage: FlowStage, network: PlaceNetworks, record: Mapping):
        self.pipeline = pipeline
        self.stage = stage
        self.network = network
        self.record = dict(record)  # of its training, JSON
        self.form = LatentForm.of(stage)
        self.base = FrozenModel(shared_copy(stage.model))
        self.device = next(stage.model.parameters()).device

    def conditioning(self, names: Sequence[str]) -> Condition:
        """Return the conditioning tensors of names, on the device."""
        return to_device(self.pipeline.conditions(list(names), self.stage.name), self.device)

    @torch.no_grad()
    def places(self, x_0: Batch, condition: Condition) -> list[torch.Tensor]:
        """[p, D] of each sample. Not differentiable."""
        x_0, path, n = x_0.to(self.device), self.stage.path, count(x_0)
        given = coords_of(separate(x_0))
        parts = [feats_of(x_0)]
        for number, time in enumerate(TIMES):
            t = torch.full([n], time, device=self.device)
            eps = self.stage.noise([number] * n, given).to(self.device)
            x_t = path.mix(x_0, t, eps)
            parts.append(
                feats_of(x_0) - feats_of(path.data(x_t, t, self.base.velocity(self.stage, x_t, t, condition)))
            )
        if isinstance(x_0, SparseBatch):
            rows = torch.cat([*(part.float() for part in parts), _around(x_0, self.form.resolution)], 1)
            return list(rows.split(x_0.lengths.tolist()))
        assert isinstance(x_0, torch.Tensor)
        if not self.form.resolution:
            return list(torch.cat(parts, 2).float())
        side = self.form.resolution
        cells = (
            torch.cartesian_prod(*[torch.arange(side, device=self.device)] * 3)
            .T.view(1, 3, side, side, side)
            .expand(n, -1, -1, -1, -1)
        )
        parts += [(2 * cells + 1) / side - 1, F.avg_pool3d(F.pad(x_0, (1,) * 6), 3, 1)]
        return list(torch.cat([part.float() for part in parts], 1).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def of_latents(self, x_0: Batch, conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32 on the CPU: scores of latents of the stage; larger is better."""
        condition = self.conditioning(conditions)
        return self.network(self.places(x_0, condition), pooled(condition)).float().cpu()

    @torch.no_grad()
    def of_members(self, x_0: Batch, conditions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every member's scores [K, N] of latents of the stage, and all members' embeddings
        [N, K * W], float32 on the CPU.
        """
        condition = self.conditioning(conditions)
        rows = self.places(x_0, condition)
        members: list[Any] = [*self.network.members]
        embeddings = [member.embed(rows, pooled(condition)) for member in members]
        scores = [m.head(e).squeeze(1) for m, e in zip(members, embeddings, strict=True)]
        return torch.stack(scores).float().cpu(), torch.cat(embeddings, 1).float().cpu()

    def __call__(self, assets: Sequence[Any], conditions: Sequence[str]) -> torch.Tensor:
        """As an AssetReward, of what the pipeline encodes finished assets to: for tables; tuning reads the
        latents themselves.
        """
        return self.of_latents(
            collate([latents[self.stage.name] for latents in self.pipeline.encode(assets)]), conditions
        )


def _around(x: SparseBatch, resolution: int) -> torch.Tensor:
    """Of each voxel which number of its six neighbours is there (one of seven), whether its mirror images
    across the three middles of its sample's grid are, where it lies in -1..1, and hundreds of voxels in its
    sample, [V, 14].
    """
    sample = x.sample
    places = x.coords[:, 1:].long()
    # [V, 1]
    cells = torch.tensor([own or resolution for own in x.cells or [None] * x.size], device=places.device)[
        sample
    ][:, None]

    def key(at: torch.Tensor) -> torch.Tensor:
        a, b, c = (at + 1).unbind(1)
        return ((sample * (resolution + 2) + a) * (resolution + 2) + b) * (resolution + 2) + c

    def there(at: torch.Tensor) -> torch.Tensor:
        return torch.isin(key(at), key(places), assume_unique=True)

    axes = torch.eye(3, dtype=torch.long, device=places.device)
    beside = torch.stack([there(places + step) for step in (*axes, *-axes)]).sum(0)  # [V]
    # [V, 3]
    mirrored = torch.stack([there(torch.where(axis.bool(), cells - 1 - places, places)) for axis in axes], 1)
    size = (x.lengths.float() / 100)[sample][:, None]
    return torch.cat([F.one_hot(beside, 7).float(), mirrored.float(), (2 * places + 1) / cells - 1, size], 1)


# Teaching.


@dataclass(frozen=True, kw_only=True)
class LatentTraining:
    """How it is taught."""

    epochs: int = 12  # twice as many from a decoded reward's scores, which are not noisy
    batch: int = 32  # pairs
    lr: float = 3e-3  # of AdamW, falling to 0 along a cosine
    weight_decay: float = 0.05
    seed: int = 0


def taught_by(
    problem: Problem, stage: str, training: LatentTraining | None = None, decoded: AssetReward | None = None
) -> LatentReward:
    """A reward of a stage's latents from a problem's pairs, by way of a reward of finished assets where the
    same pairs teach one.

    Args: decoded: that reward, where it is known.
    """
    training = training or LatentTraining()
    pairs = problem.train_pairs[stage]
    if problem.fit_reward is None or not pairs:
        return teach(problem.pipeline, stage, pairs, training)
    finished = problem.train_pairs[problem.pipeline.stages[-1].name]
    decoded = decoded or problem.fit_reward(finished, training.seed)
    return teach(
        problem.pipeline,
        stage,
        pairs,
        training,
        scores_of_assets(problem, [decoded], in_order(finished, pairs))[:, 0],
    )


def in_order(pairs: Sequence[PreferencePair], of: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs of the same assets at another stage."""
    by_id = {(pair.condition, pair.id): pair for pair in pairs}
    return [by_id[pair.condition, pair.id] for pair in of]


@torch.no_grad()
def scores_of_assets(
    problem: Problem, rewards: Sequence[AssetReward], pairs: Sequence[PreferencePair]
) -> torch.Tensor:
    """Scores [P, S, 2] by S rewards of both finished assets of P pairs of the last stage, each decoded once;
    float64.
    """
    device = next(problem.pipeline.stages[-1].model.parameters()).device
    rows = []
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        names = [pair.condition for pair in pairs[i : i + BATCH]]
        sides = []
        for side in ("preferred", "rejected"):
            assets = problem.pipeline.decode(collate([getattr(pair, side) for pair in part]).to(device))
            # [p, S]
            sides.append(torch.stack([reward(assets, names).double().cpu() for reward in rewards], 1))
        rows.append(torch.stack(sides, 2))
    return torch.cat(rows)


def teach(
    pipeline: Pipeline,
    stage_name: str,
    pairs: Sequence[PreferencePair],
    training: LatentTraining | None = None,
    decoded: torch.Tensor | None = None,
) -> LatentReward:
    """A reward of a stage's latents from pairs.

    Args: decoded: [n, 2]: another reward's scores of their finished assets, learnt in the place of who was
        preferred.
    Raises: ValueError for no pairs, latents that are not of the stage, or of a kind that is not read.
    """
    training = training or LatentTraining()
    stage = stage_of(pipeline, stage_name)
    if not pairs:
        raise ValueError(
            f"latent reward of stage {stage_name!r}: expected labels to learn from, got none. Label some"
            " assets."
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
    rows, conditions = _read(reward, pairs)
    every = torch.cat([x for sides in rows[:256] for x in sides])
    mean = every.mean(0)
    std = every.std(0).clamp(min=0.05)
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
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
        for chosen in order:
            preferred, rejected = (
                network([rows[i][side] for i in chosen.tolist()], conditions[chosen]) for side in (0, 1)
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
    """Numbers of labels, each once, up to TOGETHER neighbours of one condition.

    Args: group: [n], numbers of conditions.
    """
    shuffled = torch.randperm(len(group), generator=generator)
    parts = [
        part for number in group.unique() for part in shuffled[group[shuffled] == number].split(TOGETHER)
    ]
    return list(
        torch.cat([parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]).split(size)
    )


def _agreement(scores: torch.Tensor, goals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of who wins of all two assets of one condition, by sigmoid of the goals' difference; []
    of scores and goals [n, 2].
    """
    scores = scores.flatten()
    goals = goals.flatten()
    group = group.repeat_interleave(2)
    i, j = torch.triu_indices(len(scores), len(scores), 1)
    i, j = (side[group[i] == group[j]] for side in (i, j))
    return F.binary_cross_entropy_with_logits(scores[i] - scores[j], (goals[i] - goals[j]).sigmoid())


def _new(pipeline: Pipeline, form: LatentForm, condition: str, seed: int) -> PlaceNetworks:
    size = pooled(pipeline.conditions([condition], form.stage)).shape[1]
    device = next(stage_of(pipeline, form.stage).model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlaceNetworks(form.numbers, size).to(device)


def _read(
    reward: LatentReward, pairs: Sequence[PreferencePair]
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Places of both latents of each pair, and all conditions [n, E]."""
    rows = list[list[torch.Tensor]]()
    conditions = []
    for i in range(0, len(pairs), BATCH):
        part = pairs[i : i + BATCH]
        condition = reward.conditioning([pair.condition for pair in part])
        sides = [[getattr(pair, side) for pair in part] for side in ("preferred", "rejected")]
        for latent in (*sides[0], *sides[1]):
            reward.stage.check(f"latent reward of stage {reward.stage.name!r}", latent)
        rows += [
            list(places)
            for places in zip(*(reward.places(collate(side), condition) for side in sides), strict=True)
        ]
        conditions.append(pooled(condition))
    return rows, torch.cat(conditions)


# Files.


def save(path: Path, reward: LatentReward) -> Path:
    """Write weights, and as JSON what they are of."""
    meta = {"form": asdict(reward.form), "record": reward.record}
    write_tensors(path, KIND, {name: x.cpu() for name, x in reward.network.state_dict().items()}, meta)
    return path


def load(path: Path, pipeline: Pipeline, stage: FlowStage, condition: str) -> LatentReward:
    """Read what `save` wrote, for a stage. Args: condition: any that the pipeline knows.

    Raises: FileNotFoundError; ValueError for a damaged or foreign file, one of another stage, of latents of
        another form or of another network, and weights that do not fit by name and shape.
    """
    tensors, meta = read_tensors(path, KIND)
    meta = version_0_1.latent_reward(meta)
    try:
        got = LatentForm(**meta["form"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a latent reward's description, got one that lacks or adds: {error}. Train it"
            " again."
        ) from None
    expected = LatentForm.of(stage)
    for name, value in asdict(expected).items():
        if getattr(got, name) != value:
            raise ValueError(
                f"{path}: expected a reward of {name} {value!r}, got one of {getattr(got, name)!r}. Train one"
                " of this stage."
            )
    network = _new(pipeline, expected, condition, 0)
    load_strict(network, tensors, str(path))
    return LatentReward(pipeline, stage, network, meta["record"])
