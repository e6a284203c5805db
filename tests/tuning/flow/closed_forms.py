"""Stand-in networks whose flows are known in closed form, and small latents,
pairs and stages to try them on.
"""

import torch

from eg3d_rlhf.models.sparse import Batch, SparseSample, feats_of, spread, with_feats
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels

CHANNELS = 2
RESOLUTION = 4
PLAIN = Sampling(steps=8, cfg_strength=0.0, rescale_t=1.0)


class Field(torch.nn.Module):
    """v = function(x_t numbers, t spread over them, cond), with a note of every call."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.calls = []

    def forward(self, x_t: Batch, t: torch.Tensor, cond: torch.Tensor) -> Batch:
        self.calls.append((t.clone(), cond.clone(), self.training))
        return with_feats(x_t, self.function(feats_of(x_t), spread(t, x_t), cond))


class PerChannel(torch.nn.Module):
    """A trainable v: a linear layer over the channels of every voxel, of x_t, t and the mean of the
    condition's tokens.
    """

    def __init__(self, channels: int = CHANNELS, tokens: int = 3, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = torch.nn.Linear(channels + 1 + tokens, 16)
        self.outer = torch.nn.Linear(16, channels)

    def forward(self, x_t: Batch, t: torch.Tensor, cond: torch.Tensor) -> Batch:
        dense = isinstance(x_t, torch.Tensor)
        rows = x_t.movedim(1, -1) if dense else x_t.feats  # [..., C]
        one = rows.new_ones(*rows.shape[:-1], 1)
        sample = None if dense else x_t.sample
        said = (
            cond.mean(1)[:, None, None, None].expand(*rows.shape[:-1], -1) if dense else cond.mean(1)[sample]
        )
        time = t.view(-1, 1, 1, 1, 1) if dense else t[sample].unsqueeze(1)
        v = self.outer(torch.tanh(self.inner(torch.cat([rows, time * one, said], -1))))
        return v.movedim(-1, 1) if dense else x_t.with_feats(v)


def stage_of(
    model: torch.nn.Module,
    sparse: bool = False,
    path: FlowPath | None = None,
    sampling: Sampling = PLAIN,
    data_at_one: bool = False,
) -> FlowStage:
    """A small stage around a model."""
    name = "voxels" if sparse else "structure"
    path = path or FlowPath(sigma_min=0.0)
    kind = (SparseVoxels if sparse else DenseGrid)(channels=CHANNELS, resolution=RESOLUTION)
    return FlowStage(
        name=name, model=model, latents=kind, path=path, sampling=sampling, data_at_one=data_at_one
    )


def dense(seed: int) -> torch.Tensor:
    """A latent [C, R, R, R]."""
    return torch.randn(CHANNELS, *[RESOLUTION] * 3, generator=torch.Generator().manual_seed(seed))


def voxels(seed: int, v: int = 9) -> SparseSample:
    """A latent on v voxels."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randperm(RESOLUTION**3, generator=g)[:v].sort().values
    coords = torch.stack(
        [place // RESOLUTION**2, place // RESOLUTION % RESOLUTION, place % RESOLUTION], 1
    ).int()
    return SparseSample(coords, torch.randn(v, CHANNELS, generator=g))


def pair_of(number: int, sparse: bool = False, same: bool = False, **columns) -> PreferencePair:
    """A pair of random latents, or twice the same one."""
    preferred = voxels(2 * number, 5 + number) if sparse else dense(2 * number)
    rejected = preferred if same else voxels(2 * number + 1, 7 + number) if sparse else dense(2 * number + 1)
    stage = "voxels" if sparse else "structure"
    known = {
        "id": f"pair-{number}",
        "condition": f"shape-{number % 3}",
        "stage": stage,
        "preferred": preferred,
        "rejected": rejected,
    }
    return PreferencePair(**{**known, **columns})


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    """Conditions [n, 2, 3]."""
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(100 + seed))
