"""Hunyuan3D-2.1's flow of shapes: a transformer over a set of latent vectors, with skips between its halves, and mixtures of experts in its
last blocks. Its data lie at t = 1.

Written from the architecture as it is published (technical report arXiv:2506.15442; names of parameters and settings as its checkpoints and
config.yaml have them); nothing here was checked against a released file.

Shape letters: N samples, T latent tokens, S = T + 1 with the token of the time, C channels of a latent, W width, L tokens of a condition,
E their size, H heads, D width of a head, X experts, k of them per token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.shapes import check_shape

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """What config.yaml calls model.params, with the defaults of HunYuanDiTPlain."""

    input_size: int = 1024  # T
    in_channels: int = 4  # C
    hidden_size: int = 1024  # W
    context_dim: int = 1024  # E
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_len: int = 257  # L
    qk_norm: bool = False
    qkv_bias: bool = True
    num_moe_layers: int = 6  # of the last blocks
    num_experts: int = 8
    moe_top_k: int = 2
    norm_type: str = "layer"
    qk_norm_type: str = "rms"
    use_pos_emb: bool = False
    use_attention_pooling: bool = True
    with_decoupled_ca: bool = False
    guidance_cond_proj_dim: int | None = None

    def __post_init__(self):
        read = {
            "norm_type": "layer", "qk_norm_type": "rms", "use_pos_emb": False, "use_attention_pooling": False, "with_decoupled_ca": False,
            "guidance_cond_proj_dim": None,
        }  # fmt: skip
        odd = [f"{name}={getattr(self, name)!r}" for name, value in read.items() if getattr(self, name) != value]
        if odd:
            raise ValueError(f"config.yaml, model: expected Hunyuan3D-2.1's form, got {', '.join(odd)}. Others are not read.")
        sizes = (self.input_size, self.in_channels, self.context_dim, self.depth, self.num_heads, self.text_len)
        if min(sizes) < 1 or self.hidden_size % self.num_heads or self.hidden_size % 2 or not 1 <= self.moe_top_k <= self.num_experts:
            raise ValueError(f"config.yaml, model: expected sizes >= 1 and heads that divide an even width, got {self}. Restore the file.")


class TimeEmbedder(nn.Module):
    """Sines and cosines of t, then two linear layers -> a token [N, 1, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * rates  # [N, W / 2]
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1).to(next(self.mlp.parameters()).dtype))[:, None]


def interleaved(heads: int, *projected: torch.Tensor) -> list[torch.Tensor]:
    """Projections [N, S, W] each, side by side, dealt to the heads in turn -> [N, H, S, D] each.

    Head h takes channels h m D to (h + 1) m D of the m projections in a row, so that its keys may come from what is called to_v.
    """
    rows = torch.cat(projected, -1)  # [N, S, m W]
    return [part.transpose(1, 2) for part in rows.unflatten(-1, (heads, -1)).chunk(len(projected), -1)]


class Attention(nn.Module):
    """Over the tokens themselves, or over those of a condition."""

    def __init__(self, config: DenoiserConfig, context: int | None = None):
        super().__init__()
        width, bias, self.heads = config.hidden_size, config.qkv_bias, config.num_heads
        self.cross = context is not None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=bias) for _ in range(2))
        size = width // self.heads
        self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(2))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [N, S, W]; y: x again, or a condition [N, L, E] -> [N, S, W]."""
        if self.cross:
            (q,), (k, v) = interleaved(self.heads, self.to_q(x)), interleaved(self.heads, self.to_k(y), self.to_v(y))
        else:
            q, k, v = interleaved(self.heads, self.to_q(x), self.to_k(y), self.to_v(y))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Projected(nn.Module):
    """A linear layer and GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


class Expert(nn.Module):
    """Two layers, under other names."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.net = nn.Sequential(Projected(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Gate(nn.Module):
    """Which experts a token goes to, and with what weight."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(experts, width) / math.sqrt(width)), top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, W] -> weights [R, k], which need not sum to 1, and numbers [R, k]. Differentiable in: the weights."""
        weights, numbers = F.linear(x, self.weight).softmax(-1).topk(self.top_k, -1)
        return weights, numbers


class Mixture(nn.Module):
    """k of X experts for each token, and one for all."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(config.num_experts))
        self.gate = Gate(width, config.num_experts, config.moe_top_k)
        self.shared_experts = Expert(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)  # [R, W]
        weights, numbers = self.gate(rows)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (numbers == number).nonzero(as_tuple=True)
            total = total.index_add(0, row, (expert(rows[row]) * weights[row, place, None]).to(total.dtype))
        return total.view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    """Skip, self-attention, cross-attention, mlp or mixture; the time is a token among the others."""

    def __init__(self, config: DenoiserConfig, skip: bool, mixture: bool):
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.attn1, self.attn2 = Attention(config), Attention(config, config.context_dim)
        if skip:
            self.skip_linear, self.skip_norm = nn.Linear(2 * width, width), nn.LayerNorm(width, eps=EPS)
        if mixture:
            self.moe = Mixture(config)
        else:
            self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.skip, self.mixture = skip, mixture

    def forward(self, x: torch.Tensor, cond: torch.Tensor, skipped: torch.Tensor | None) -> torch.Tensor:
        """[N, S, W], [N, L, E], what an earlier block made -> [N, S, W]."""
        if self.skip:
            assert skipped is not None
            x = self.skip_norm(self.skip_linear(torch.cat([skipped, x], -1)))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), cond)
        h = self.norm3(x)
        return x + (self.moe(h) if self.mixture else self.mlp(h))


class FinalLayer(nn.Module):
    """Norm, then the latent's channels; the token of the time goes."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(width, eps=EPS), nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm_final(x)[:, 1:])


class Denoiser(nn.Module):
    """model(x [N, T, C], t [N] in 0..1 with data at 1, {"main": tokens [N, L, E]}) -> velocity towards the data, like x.

    Differentiable in: everything but t and the choice of experts.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # blocks again in the backward pass, for less memory
        self.x_embedder = nn.Linear(config.in_channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.hidden_size)
        depth = config.depth
        self.blocks = nn.ModuleList(Block(config, i > depth // 2, depth - i <= config.num_moe_layers) for i in range(depth))
        self.final_layer = FinalLayer(config.hidden_size, config.in_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts: dict[str, torch.Tensor]) -> torch.Tensor:
        config, cond = self.config, contexts["main"]
        check_shape("Denoiser.x", x, ["N", "T", config.in_channels], "Give latents of this model's size.")
        check_shape("Denoiser.contexts['main']", cond, [len(x), "L", config.context_dim], "Use the encoder it was trained with.")
        dtype, half = self.x_embedder.weight.dtype, config.depth // 2
        h, cond = torch.cat([self.t_embedder(t), self.x_embedder(x.to(dtype))], 1), cond.to(dtype)
        kept: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            args = (h, cond, kept.pop() if number > half else None)
            h = checkpoint(block, *args, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(*args)
            if number < half:
                kept.append(h)
        return self.final_layer(h).to(x.dtype)
