"""A problem whose every part is tiny: untrained flows of a few hundred parameters on a grid of 4; rewards
count what is filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample, feats_of, spread, with_feats
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import Choosing
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    CircularSettings,
    LoopPairsConfig,
    with_fine_tuning_loss,
    with_regulariser,
)
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig

R = 4
CHANNELS = 3
TOKENS = 2
EMBEDDING = 5
TRAINED = ("red", "green", "blue")
HELD_OUT = ("grey", "pink")


@dataclass(frozen=True)
class TinyAsset:
    filled: torch.Tensor  # [R, R, R] bool
    value: float


class PointFlow(torch.nn.Module):
    """model(x_t, t, cond) -> velocity, point by point; `to_q` and `to_out` are there for adapters."""

    def __init__(self, seed: int, width: int = 8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.to_q = torch.nn.Linear(CHANNELS + 1 + EMBEDDING, width)
            self.to_out = torch.nn.Linear(width, CHANNELS)

    def forward(self, x_t, t, cond):
        rows = feats_of(x_t) if isinstance(x_t, SparseBatch) else feats_of(x_t).movedim(1, -1)  # [..., C]
        given = [
            (
                spread(one, x_t).expand(*rows.shape[:-1], 1)
                if isinstance(x_t, SparseBatch)
                else one.view(-1, 1, 1, 1, 1).expand(*rows.shape[:-1], 1)
            )
            for one in (t, *cond.mean(1).T)
        ]
        v = self.to_out(self.to_q(torch.cat([rows, *given], -1)).tanh())
        return with_feats(x_t, v if isinstance(x_t, SparseBatch) else v.movedim(-1, 1).contiguous())


class TinyPipeline:
    """Stages "structure", "voxels" and, of three, "detail": voxels below a size are carved away at each gap
    and at the end.
    """

    def __init__(self, stages: int = 2, seed: int = 0):
        names = ("structure", "voxels", "detail")[:stages]
        sampling = Sampling(steps=2, cfg_strength=0.0)
        self.stages = [
            FlowStage(
                name=name,
                model=PointFlow(seed + i).eval(),
                latents=(SparseVoxels if i else DenseGrid)(channels=CHANNELS, resolution=R),
                sampling=sampling,
                lora_targets=("to_q", "to_out"),
            )
            for i, name in enumerate(names)
        ]

    def conditioning(self, names: Sequence[str], stage: str) -> torch.Tensor:
        rows = [
            torch.randn(TOKENS, EMBEDDING, generator=torch.Generator().manual_seed(len(name)))
            for name in names
        ]
        return torch.stack(rows)

    def null_conditioning(self, n: int, stage: str) -> torch.Tensor:
        return torch.zeros(n, TOKENS, EMBEDDING)

    def advance(self, stage: str, x_0):
        if isinstance(x_0, SparseBatch):
            return [sample.coords[_kept(sample)] for sample in x_0.samples()]
        sizes = x_0[:, 0]
        filled = (sizes > 0) | (sizes == sizes.amax((1, 2, 3), keepdim=True))
        return [one.nonzero().int() for one in filled]

    def decode(self, x_0: SparseBatch) -> list[TinyAsset]:
        return [asset_of(sample) for sample in x_0.samples()]

    def encode(self, assets: Sequence[TinyAsset]):
        return [latents_of(asset, [stage.name for stage in self.stages]) for asset in assets]


def _kept(sample: SparseSample) -> torch.Tensor:
    size = sample.feats[:, 0]
    return (size > -0.5) | (size == size.max())


def asset_of(sample: SparseSample) -> TinyAsset:
    kept = _kept(sample)
    filled = torch.zeros(R, R, R, dtype=torch.bool)
    filled[tuple(sample.coords[kept].long().T)] = True
    return TinyAsset(filled, float(sample.feats[kept, 1].mean()))


def latents_of(asset: TinyAsset, names: Sequence[str]) -> dict:
    coords = asset.filled.nonzero().int()
    feats = torch.tensor([1.0, asset.value, 0.0]).repeat(len(coords), 1)
    dense = (asset.filled.float() * 2 - 1).expand(CHANNELS, R, R, R).clone()
    return {name: dense if name == "structure" else SparseSample(coords, feats) for name in names}


def full(assets: Sequence[TinyAsset], prompts: Sequence[str]) -> torch.Tensor:
    """Share of the grid that is filled."""
    return torch.tensor([float(a.filled.float().mean()) for a in assets])


def fullest(assets: Sequence[TinyAsset], prompts: Sequence[str]) -> torch.Tensor:
    return 2 * full(assets, prompts)


def fuller(assets: Sequence[TinyAsset], prompts: Sequence[str]) -> torch.Tensor:
    return 3 * full(assets, prompts)


def by_part(assets: Sequence[TinyAsset], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    return {"filled": full(assets, prompts), "value": torch.tensor([a.value for a in assets])}


def human_pairs(stage: str, per_condition: int = 4) -> list[PreferencePair]:
    """Drafts in twos: the preferred one has a fuller structure, and larger voxels, of which fewer are carved
    away.
    """
    pairs = []
    g = torch.Generator().manual_seed(5)
    for condition in TRAINED:
        for k in range(per_condition):
            drafts = []
            for fill, size in ((0.7, 1.0), (0.4, -0.6)):
                filled = torch.rand(R, R, R, generator=g) < fill
                feats = torch.randn(int(filled.sum()), CHANNELS, generator=g) * 0.3 + torch.tensor(
                    [size, 0.0, 0.0]
                )
                dense = (filled.float() * 2 - 1).expand(CHANNELS, R, R, R).clone()
                drafts.append(dense if stage == "structure" else SparseSample(filled.nonzero().int(), feats))
            preferred, rejected = drafts
            pairs.append(
                PreferencePair(
                    id=f"{condition}-{k}",
                    condition=condition,
                    stage=stage,
                    preferred=preferred,
                    rejected=rejected,
                )
            )
    return pairs


def tiny_problem(stages: int = 2, **changes) -> Problem:
    pipeline = TinyPipeline(stages)
    problem = Problem(
        pipeline=pipeline,
        train_pairs=PairsByStage([stage.name for stage in pipeline.stages], human_pairs),
        reward=full,
        chooser=fuller,
        final=fullest,
        train_prompts=TRAINED,
        held_out_prompts=HELD_OUT,
        identity={"problem": "tiny", "stages": stages},
        parts=by_part,
    )
    return replace(problem, **changes)


HUMAN = TrainConfig(
    dpo=DpoConfig(beta=20.0),
    lora=LoraConfig(rank=2, alpha=4),
    steps=6,
    batch=4,
    lr=0.05,
    warmup=1,
    held_out_every=2,
    log_every=2,
    checkpoint_every=2,
    max_drop=1.0,
)
SETTINGS = CircularSettings(
    human=HUMAN,
    loop=with_regulariser(HUMAN),
    sft=with_fine_tuning_loss(HUMAN),
    loop_pairs=LoopPairsConfig(per_pair=2, batch=8, chunk=5),
    choosing=Choosing(per_condition=2, batch=8),
)
