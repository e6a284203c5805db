"""Hunyuan3D-2.1's networks: the flow of shapes, a transformer over a set of latent vectors with skips between
its halves and mixtures of experts in its last blocks; and the autoencoder: points of a surface become a set
of latents, and a transformer over the set, then cross-attention from points to it, says what is inside.

Data lie at t = 1. Written from the architecture as it is published (technical report arXiv:2506.15442; names
of parameters and settings as its checkpoints and config.yaml have them), and equal to the original's own
classes with random weights (tests/compat).

Shape letters: N samples, T latent tokens, S = T + 1 with the token of the time, C channels of a latent, W
width, L tokens of a condition, E their size, H heads, D width of a head, X experts, k of them per token, P
points, M of them kept, R points per axis of a grid, F frequencies of a coordinate.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.attention import Mlp, attend

EPS = 1e-6
# Of bfloat16 passes with float32 weights: the norms of q and k then run unfused, with the exact result
# rounded to bfloat16.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """What config.yaml calls model.params, with the defaults of HunYuanDiTPlain, which passes over other
    names, mlp_ratio among them.
    """

    input_size: int = 1024  # T
    in_channels: int = 4  # C
    hidden_size: int = 1024  # W
    context_dim: int = 1024  # E
    depth: int = 24
    num_heads: int = 16
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
            "norm_type": "layer",
            "qk_norm_type": "rms",
            "use_pos_emb": False,
            "use_attention_pooling": False,
            "with_decoupled_ca": False,
            "guidance_cond_proj_dim": None,
        }
        odd = [
            f"{name}={getattr(self, name)!r}" for name, value in read.items() if getattr(self, name) != value
        ]
        if odd:
            raise ValueError(
                f"config.yaml, model: expected Hunyuan3D-2.1's form, got {', '.join(odd)}. Others are not"
                " read."
            )
        sizes = (
            self.input_size,
            self.in_channels,
            self.context_dim,
            self.depth,
            self.num_heads,
            self.text_len,
        )
        if (
            min(sizes) < 1
            or self.hidden_size % self.num_heads
            or self.hidden_size % 2
            or not 1 <= self.moe_top_k <= self.num_experts
        ):
            raise ValueError(
                f"config.yaml, model: expected sizes >= 1 and heads that divide an even width, got {self}."
                " Restore the file."
            )


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
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1).to(next(self.mlp.parameters()).dtype))[
            :, None
        ]


def interleaved(heads: int, *projected: torch.Tensor) -> list[torch.Tensor]:
    """Projections [N, S, W] each, side by side, dealt to the heads in turn -> [N, S, H, D] each.

    Head h takes channels h m D to (h + 1) m D of the m projections in a row, so that its keys may come from
    what is called to_v.
    """
    return list(torch.cat(projected, -1).unflatten(-1, (heads, -1)).chunk(len(projected), -1))


class Attention(nn.Module):
    """Over the tokens themselves, or over those of a condition."""

    def __init__(self, config: DenoiserConfig, context: int | None = None):
        super().__init__()
        width = config.hidden_size
        bias = config.qkv_bias
        self.heads = config.num_heads
        self.cross = context is not None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=bias) for _ in range(2))
        size = width // self.heads
        self.q_norm, self.k_norm = (
            nn.RMSNorm(size, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [N, S, W]; y: x again, or a condition [N, L, E] -> [N, S, W]."""
        if self.cross:
            (q,) = interleaved(self.heads, self.to_q(x))
            k, v = interleaved(self.heads, self.to_k(y), self.to_v(y))
        else:
            q, k, v = interleaved(self.heads, self.to_q(x), self.to_k(y), self.to_v(y))
        return self.out_proj(attend(self.q_norm(q), self.k_norm(k), v).flatten(2))


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
        self.weight = nn.Parameter(torch.randn(experts, width) / math.sqrt(width))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, W] -> weights [R, k], which need not sum to 1, and numbers [R, k]. Differentiable in: the
        weights.
        """
        weights, numbers = F.linear(x, self.weight).softmax(-1).topk(self.top_k, -1)
        return weights, numbers


class Mixture(nn.Module):
    """k of X experts for each token, and one for all."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width = config.hidden_size
        inner = 4 * config.hidden_size
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
        self.attn1 = Attention(config)
        self.attn2 = Attention(config, config.context_dim)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)
            self.skip_norm = nn.LayerNorm(width, eps=EPS)
        if mixture:
            self.moe = Mixture(config)
        else:
            self.mlp = Mlp(width, 4 * width)
        self.skip = skip
        self.mixture = mixture

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
        self.norm_final = nn.LayerNorm(width, eps=EPS)
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm_final(x)[:, 1:])


class Denoiser(nn.Module):
    """model(x [N, T, C], t [N] in 0..1 with data at 1, {"main": tokens [N, L, E]}) -> velocity towards the
    data, like x.

    Differentiable in: everything but t and the choice of experts.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # blocks again in the backward pass, for less memory
        self.x_embedder = nn.Linear(config.in_channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.hidden_size)
        depth = config.depth
        self.blocks = nn.ModuleList(
            Block(config, i > depth // 2, depth - i <= config.num_moe_layers) for i in range(depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.in_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.config
        cond = contexts["main"]
        check_shape("Denoiser.x", x, ["N", "T", config.in_channels], "Give latents of this model's size.")
        check_shape(
            "Denoiser.contexts['main']",
            cond,
            [len(x), "L", config.context_dim],
            "Use the encoder it was trained with.",
        )
        dtype = self.x_embedder.weight.dtype
        half = config.depth // 2
        h = torch.cat([self.t_embedder(t), self.x_embedder(x.to(dtype))], 1)
        cond = cond.to(dtype)
        kept: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            args = (h, cond, kept.pop() if number > half else None)
            h = (
                checkpoint(block, *args, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(*args)
            )
            if number < half:
                kept.append(h)
        return self.final_layer(h).to(x.dtype)


BOUND = 1.01  # half the edge of the cube that shapes lie in
CHUNK = 8192  # points at once
_MLP = ("c_fc", "c_proj")  # names of its layers


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What config.yaml calls vae.params, with the defaults of ShapeVAE."""

    num_latents: int  # T
    embed_dim: int  # C
    width: int
    heads: int
    num_decoder_layers: int
    num_freqs: int = 8
    include_pi: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    geo_decoder_mlp_expand_ratio: int = 4
    geo_decoder_downsample_ratio: int = 1
    geo_decoder_ln_post: bool = True
    scale_factor: float = 1.0  # latents are multiplied by it before the flow sees them
    num_encoder_layers: int = 8
    use_ln_post: bool = True  # of the encoder
    pc_size: int = 5120  # points that are drawn on a surface
    pc_sharpedge_size: int = 5120  # and on its sharp edges
    # numbers of a point besides its place: the normal, and with 4 whether it lies on a sharp edge
    point_feats: int = 3
    downsample_ratio: float = 20  # points are kept, so many for each latent
    label_type: str = "binary"  # of training, as the next two are
    drop_path_rate: float = 0.0
    ckpt_path: str | None = None

    def __post_init__(self):
        if self.geo_decoder_downsample_ratio != 1 or not self.geo_decoder_ln_post:
            raise ValueError(
                "config.yaml, vae: expected geo_decoder_downsample_ratio 1 and geo_decoder_ln_post, got"
                " others. Not read."
            )
        points = min(self.pc_size, self.pc_sharpedge_size + 1, self.downsample_ratio)
        if self.point_feats not in (3, 4) or not self.use_ln_post or points < 1:
            raise ValueError(
                f"config.yaml, vae: expected point_feats 3 or 4, use_ln_post and points, got {self}. Others"
                " are not read."
            )
        least = min(self.num_latents, self.embed_dim, self.heads, self.num_decoder_layers)
        if least < 1 or self.width % self.heads or self.scale_factor <= 0:
            raise ValueError(
                f"config.yaml, vae: expected sizes >= 1 and heads that divide the width, got {self}. Restore"
                " the file."
            )


class Heads(nn.Module):
    """Norms of queries and keys, head by head."""

    def __init__(self, size: int, norm: bool):
        super().__init__()
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps=1e-6) if norm else nn.Identity() for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[N, S, H, D] each -> [N, S, W]."""
        return attend(self.q_norm(q), self.k_norm(k), v).flatten(2)


class SelfAttention(nn.Module):
    """One layer makes queries, keys and values, head by head."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.c_qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.attention(*self.c_qkv(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)))


class CrossAttention(nn.Module):
    """From points to latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        q, kv = (y.unflatten(-1, (self.heads, -1)) for y in (self.c_q(x), self.c_kv(data)))
        return self.c_proj(self.attention(q, *kv.chunk(2, -1)))


class ResidualBlock(nn.Module):
    """Attention, mlp."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = Mlp(config.width, 4 * config.width, _MLP)
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Cross-attention, mlp."""

    def __init__(self, config: AutoencoderConfig, expand: int):
        super().__init__()
        self.attn = CrossAttention(config)
        self.mlp = Mlp(config.width, expand * config.width, _MLP)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), self.ln_2(data))
        return x + self.mlp(self.ln_3(x))


def embedded(points: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """Places [..., 3] -> themselves, sines and cosines of 2^j times each coordinate, [..., 3 (2 F + 1)]."""
    rates = 2.0 ** torch.arange(config.num_freqs, dtype=torch.float32, device=points.device) * (
        torch.pi if config.include_pi else 1
    )
    angles = (points[..., None] * rates).flatten(-2)  # [..., 3 F]
    return torch.cat([points, angles.sin(), angles.cos()], -1)


class PointDecoder(nn.Module):
    """Points and latents -> a number, positive inside."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.query_proj = nn.Linear(3 * (2 * config.num_freqs + 1), config.width)
        self.cross_attn_decoder = CrossBlock(config, config.geo_decoder_mlp_expand_ratio)
        self.ln_post = nn.LayerNorm(config.width)
        self.output_proj = nn.Linear(config.width, 1)

    def forward(self, points: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[N, P, 3], [N, T, W] -> [N, P]."""
        x = self.cross_attn_decoder(self.query_proj(embedded(points, self.config).to(latents.dtype)), latents)
        return self.output_proj(self.ln_post(x))[..., 0]


class Transformer(nn.Module):
    """Blocks in turn."""

    def __init__(self, config: AutoencoderConfig, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(config) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ShapeDecoder(nn.Module):
    """The half of the autoencoder that makes shapes of latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.post_kl = nn.Linear(config.embed_dim, config.width)
        self.transformer = Transformer(config, config.num_decoder_layers)
        self.geo_decoder = PointDecoder(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the flow sees them, [N, T, C] -> what points are asked of, [N, T, W]."""
        return self.transformer(self.post_kl(latents / self.config.scale_factor))

    @torch.no_grad()
    def slab(self, decoded: torch.Tensor, axis: torch.Tensor, x: slice) -> torch.Tensor:
        """What `forward` made of one shape [1, T, W] -> numbers at the product of axis[x], axis and axis,
        [., R, R] on the CPU.
        """
        side = len(axis)
        planes = len(axis[x])
        numbers = []
        for some in torch.arange(planes * side**2, device=axis.device).split(CHUNK):
            places = (axis[x][some // side**2], axis[some // side % side], axis[some % side])
            numbers.append(self.geo_decoder(torch.stack(places, 1)[None], decoded)[0].float().cpu())
        return torch.cat(numbers).view(planes, side, side)


# The way back: a surface's points -> latents.


class PointEncoder(nn.Module):
    """Points that ask, and points that are asked -> [N, T, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(3 * (2 * config.num_freqs + 1) + config.point_feats, config.width)
        self.cross_attn = CrossBlock(config, 4)
        self.self_attn = Transformer(config, config.num_encoder_layers)
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """[N, T, 3 + f] and [N, M, 3 + f]: places, normals, perhaps the flag of a sharp edge."""
        seen = [torch.cat([embedded(x[..., :3], self.config), x[..., 3:]], -1) for x in (queries, points)]
        return self.ln_post(
            self.self_attn(self.cross_attn(*(self.input_proj(x.to(self.input_proj.weight)) for x in seen)))
        )


class ShapeEncoder(nn.Module):
    """The half of the autoencoder that makes latents of a surface's points."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = PointEncoder(config)
        self.pre_kl = nn.Linear(config.width, 2 * config.embed_dim)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> mean and logarithm of the variance, [N, T, C] each, not yet as the flow sees them."""
        mean, logvar = self.pre_kl(self.encoder(queries, points)).chunk(2, -1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def latents(self, surface: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Points of a surface [P, 3 + f], those on sharp edges last -> the mean [T, C] as the flow sees it;
        which are kept is drawn.
        """
        device = self.pre_kl.weight.device
        queries, points = (x.to(device)[None] for x in chosen(surface.cpu(), self.config, draw))
        return self(queries, points)[0][0] * self.config.scale_factor


def chosen(
    surface: torch.Tensor, config: AutoencoderConfig, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, .] and kept points [M, .] of a surface's: from even ones and from those on sharp edges, to
    each by their share.
    """
    parts = surface.split([config.pc_size, config.pc_sharpedge_size])
    queries = []
    kept = []
    for part in parts:
        wanted = len(part) / len(surface) * config.num_latents
        some = part[torch.randperm(len(part), generator=draw)[: int(wanted * config.downsample_ratio)]]
        queries.append(some[farthest(some[:, :3], math.ceil(wanted - 1e-6), draw)])
        kept.append(some)
    return torch.cat(queries), torch.cat(kept)


def farthest(points: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Numbers [count] of points [P, 3], each the farthest from those before it; the first one is drawn."""
    numbers = torch.zeros(count, dtype=torch.int64)
    if count:
        numbers[0] = torch.randint(len(points), (), generator=draw)
    nearest = torch.full([len(points)], torch.inf)
    for i in range(1, count):
        nearest = torch.minimum(nearest, (points - points[numbers[i - 1]]).square().sum(1))
        numbers[i] = nearest.argmax()
    return numbers
