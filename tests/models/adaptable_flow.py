"""A flow of a few hundred parameters, on dense latents and on voxels, and preference pairs for it.

Its layers have the names that adapters look for.
"""

import torch
from torch import nn

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample, feats_of, with_feats
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, SparseVoxels

CHANNELS = 3
RESOLUTION = 4
TOKENS = 2
EMBEDDING = 5


class Block(nn.Module):
    """Layers within a token, and the mean of the conditioning tokens; no token attends to another."""

    def __init__(self, width: int):
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(EMBEDDING, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, cond):
        q, k, v = self.to_qkv(x).chunk(3, -1)
        x = x + q.sigmoid() * v + k.tanh()
        k, v = self.to_kv(cond).chunk(2, -1)
        return x + self.to_out((self.to_q(x) * k).sigmoid() * v)


class AdaptableFlow(nn.Module):
    """A small flow: model(x_t, t, cond) -> velocity."""

    def __init__(self, seed: int = 0, width: int = 8, blocks: int = 2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.input_layer = nn.Linear(CHANNELS + 1, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
            self.out_layer = nn.Linear(width, CHANNELS)
            self.register_buffer("pos_emb", 0.1 * torch.randn(width))

    def forward(self, x_t, t, cond):
        feats = feats_of(x_t)
        sparse = isinstance(x_t, SparseBatch)
        rows = feats if sparse else feats.permute(0, 2, 3, 4, 1).reshape(-1, CHANNELS)  # [V, C]
        sample = x_t.sample if sparse else torch.arange(len(feats)).repeat_interleave(RESOLUTION**3)
        dtype = self.pos_emb.dtype
        h = self.input_layer(torch.cat([rows, t[sample, None]], 1).to(dtype)) + self.pos_emb
        for block in self.blocks:
            h = block(h, cond.mean(1)[sample].to(dtype))
        v = self.out_layer(h).to(feats.dtype)
        return with_feats(
            x_t,
            (
                v
                if sparse
                else v.reshape(len(feats), *[RESOLUTION] * 3, CHANNELS).permute(0, 4, 1, 2, 3).contiguous()
            ),
        )


def inputs(sparse: bool, n: int = 3, seed: int = 0):
    """Return x_t, t and cond."""
    g = torch.Generator().manual_seed(seed)
    latents = [latent(sparse, g, i) for i in range(n)]
    x_t = SparseBatch.join(latents) if sparse else torch.stack(latents)
    return x_t, torch.rand(n, generator=g), torch.randn(n, TOKENS, EMBEDDING, generator=g)


def latent(sparse: bool, g: torch.Generator, i: int = 0):
    """Make a random latent; voxels differ between seeds in number and position."""
    if not sparse:
        return torch.randn(CHANNELS, *[RESOLUTION] * 3, generator=g)
    places = torch.randperm(RESOLUTION**3, generator=g)[: 5 + i]
    coords = torch.stack(
        [places // RESOLUTION**2, places // RESOLUTION % RESOLUTION, places % RESOLUTION], 1
    ).int()
    return SparseSample(coords, torch.randn(len(coords), CHANNELS, generator=g))


def stage(sparse: bool = False, seed: int = 0) -> FlowStage:
    """Make a stage with this flow."""
    name = "voxels" if sparse else "structure"
    kind = (SparseVoxels if sparse else DenseGrid)(channels=CHANNELS, resolution=RESOLUTION)
    return FlowStage(name=name, model=AdaptableFlow(seed), latents=kind)


def pairs(of: FlowStage, n: int = 4) -> tuple[list[PreferencePair], torch.Tensor]:
    """Make pairs of a stage and the conditioning tokens [n, T, E] of their prompts."""
    g = torch.Generator().manual_seed(1)
    both = [[latent(isinstance(of.latents, SparseVoxels), g, i + k) for k in range(2)] for i in range(n)]
    made = [
        PreferencePair(id=f"p{i}", condition=f"c{i}", stage=of.name, preferred=a, rejected=b)
        for i, (a, b) in enumerate(both)
    ]
    return made, torch.randn(n, TOKENS, EMBEDDING, generator=g)


def shake(model: nn.Module, seed: int = 5, size: float = 0.1) -> None:
    """Give every trainable parameter other numbers, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g).to(p))
