"""A generator of two stages small enough for a test: exact flows of normal data, plus one linear layer that
training moves.

Stage "structure" is dense, [1, 2, 2, 2]; voxels are where it is above 0. Stage "voxels" has two channels. An
asset is a SparseSample.
"""

import torch

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import SparseBatch, SparseSample, feats_of, spread, with_feats
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig

R = 2
NAMES = ("a", "b", "c")
TARGET = 0.7  # mean of the features that judges like best


class LinearFlow(torch.nn.Module):
    """v of standard normal data, which is known, plus a linear function of x_t, t x_t, the condition, and
    both by time.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_out = torch.nn.Linear(2 * channels + 4, channels, bias=False)
        torch.nn.init.zeros_(self.to_out.weight)

    def forward(self, x_t, t, cond):
        rows = feats_of(x_t) if isinstance(x_t, SparseBatch) else feats_of(x_t).movedim(1, -1)  # [..., C]
        time = spread(t, x_t).expand(*rows.shape[:-1], 1)
        # [..., 2]
        c = torch.cat([spread(one, x_t).expand(*rows.shape[:-1], 1) for one in cond.mean(1).T], -1)
        exact = rows * (2 * time - 1) / ((1 - time) ** 2 + time**2)
        v = exact + self.to_out(torch.cat([rows, time * rows, c, time * c], -1))
        return with_feats(x_t, v if isinstance(x_t, SparseBatch) else v.movedim(-1, 1))


class TinyPipeline:
    """See the module."""

    def __init__(self):
        common = {"path": FlowPath(schedule="uniform"), "sampling": Sampling(steps=4, cfg_strength=0.0)}
        self.stages = [
            FlowStage(
                name="structure",
                model=LinearFlow(1),
                latents=DenseGrid(channels=1, resolution=R),
                lora_targets=("to_out",),
                **common,
            ),
            FlowStage(
                name="voxels",
                model=LinearFlow(2),
                latents=SparseVoxels(channels=2, resolution=R),
                lora_targets=("to_out",),
                **common,
            ),
        ]

    def conditioning(self, names, stage):
        return torch.tensor([[[1.0, NAMES.index(name) / len(NAMES)]] for name in names])  # [N, 1, 2]

    def null_conditioning(self, n, stage):
        return torch.zeros(n, 1, 2)

    def advance(self, stage, x_0):
        assert stage == "structure"
        filled = (x_0 > 0) | (x_0 == x_0.flatten(1).amax(1).view(-1, 1, 1, 1, 1))
        return [one[0].nonzero().int() for one in filled]

    def decode(self, x_0):
        return x_0.samples()


def likes_target(assets, prompts):
    """Reward: the mean feature is near TARGET."""
    return torch.tensor([-abs(float(asset.feats.mean()) - TARGET) for asset in assets])


def voxel_pairs(n: int, gap: float = 0.5, seed: int = 0, w2: bool = False) -> list[PreferencePair]:
    """Preferred features are normal about +gap, rejected ones about -gap, on voxels of their own."""
    generator = torch.Generator().manual_seed(seed)

    def latent(mean):
        places = (
            torch.randperm(R**3, generator=generator)[: 1 + int(torch.randint(R**3, [], generator=generator))]
            .sort()
            .values
        )
        coords = torch.stack([places // 4, places // 2 % 2, places % 2], 1).int()
        return SparseSample(coords, mean + torch.randn(len(places), 2, generator=generator))

    weights = 0.5 + torch.rand(n, generator=generator)
    return [
        PreferencePair(
            id=f"pair-{i}",
            condition=NAMES[i % 3],
            stage="voxels",
            preferred=latent(gap),
            rejected=latent(-gap),
            w2=float(weights[i]) if w2 else None,
        )
        for i in range(n)
    ]


def structure_pairs(n: int, gap: float = 0.5, seed: int = 0) -> list[PreferencePair]:
    """The same of the first stage."""
    generator = torch.Generator().manual_seed(seed)
    latents = [
        (
            torch.randn(1, R, R, R, generator=generator) + gap,
            torch.randn(1, R, R, R, generator=generator) - gap,
        )
        for _ in range(n)
    ]
    return [
        PreferencePair(id=f"pair-{i}", condition=NAMES[i % 3], stage="structure", preferred=a, rejected=b)
        for i, (a, b) in enumerate(latents)
    ]


def tiny_config(**changes) -> TrainConfig:
    """Settings that learn in a second."""
    settings = {
        "dpo": DpoConfig(beta=20.0),
        "lora": LoraConfig(rank=2, alpha=4.0, targets=("to_out",)),
        "steps": 40,
        "batch": 8,
        "lr": 0.01,
        "warmup": 5,
        "held_out_every": 10,
        "checkpoint_every": 15,
        "log_every": 5,
        "seed": 3,
    }
    return TrainConfig(**{**settings, **changes})
