"""Hunyuan3D-2.1's networks: the flow of shapes and the autoencoder of shapes.

The flow is a transformer over a set of latent vectors. Skips connect its two halves, and its last blocks use
mixtures of experts. The encoder maps points on a surface to the set of latents. The decoder is a transformer
over the set, followed by cross-attention from query points to it, which predicts whether a point is inside.

Data lie at t = 1. Written from the published architecture (technical report arXiv:2506.15442); names of
parameters and settings are those of its checkpoints and config.yaml. With random weights the results equal
those of the original's own classes (tests/compat).

Shape letters: N samples, T latent tokens, S = T + 1 tokens including that of the time, C channels of a
latent, W width, L conditioning tokens, E channels of a conditioning token, H heads, D width of a head, X
experts, k experts per token, P points, M points that are kept, R points per axis of a grid, F frequencies of
a coordinate.
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

EPS = 1e-6  # of all layer norms of the flow
# torch warns in bfloat16 passes with float32 weights. The norms of q and k then run unfused, with the exact
# result rounded to bfloat16, as intended.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Settings of the flow's network: `model.params` of config.yaml.

    The defaults are those of the original's HunYuanDiTPlain. That class ignores unknown names, `mlp_ratio`
    among them.
    """

    input_size: int = 1024  # T, latent tokens
    in_channels: int = 4  # C, channels of a latent
    hidden_size: int = 1024  # W
    context_dim: int = 1024  # E, channels of a conditioning token
    depth: int = 24  # number of blocks
    num_heads: int = 16
    text_len: int = 257  # L, conditioning tokens
    qk_norm: bool = False  # normalise queries and keys of each head
    qkv_bias: bool = True  # whether the layers of queries, keys and values have a bias
    num_moe_layers: int = 6  # number of last blocks that have a mixture of experts
    num_experts: int = 8  # X
    moe_top_k: int = 2  # k, experts per token
    # The settings below exist in the original's class, but only the values that Hunyuan3D-2.1 uses are
    # implemented here.
    norm_type: str = "layer"
    qk_norm_type: str = "rms"
    use_pos_emb: bool = False
    use_attention_pooling: bool = True
    with_decoupled_ca: bool = False
    guidance_cond_proj_dim: int | None = None

    def __post_init__(self):
        # Any other value would build another network, so it is rejected with an error.
        supported = {
            "norm_type": "layer",
            "qk_norm_type": "rms",
            "use_pos_emb": False,
            "use_attention_pooling": False,
            "with_decoupled_ca": False,
            "guidance_cond_proj_dim": None,
        }
        unsupported = [
            f"{name}={getattr(self, name)!r}"
            for name, value in supported.items()
            if getattr(self, name) != value
        ]
        if unsupported:
            raise ValueError(
                f"config.yaml, model: Hunyuan3D-2.1 does not use {', '.join(unsupported)}, and other variants"
                " are not supported. Name the files of Hunyuan3D-2.1."
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
            # Even, because the embedding of the time consists of pairs of sine and cosine
            or self.hidden_size % 2
            or not 1 <= self.moe_top_k <= self.num_experts
        ):
            raise ValueError(
                f"config.yaml, model: expected sizes >= 1 and heads that divide an even width, got {self}."
                " Restore the file."
            )


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of t and two linear layers: [N] -> one token [N, 1, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # t itself is embedded, in 0..1, not 1000 t as in TRELLIS and SAM 3D.
        half = self.width // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        # In float32 also when the network runs in half precision; only the result is rounded.
        angles = t.float()[:, None] * rates  # [N, W / 2]
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1).to(next(self.mlp.parameters()).dtype))[
            :, None
        ]


def interleaved(heads: int, *projected: torch.Tensor) -> list[torch.Tensor]:
    """Concatenate projections [N, S, W] and split them among the heads in turn.

    Of m projections side by side, head h takes the channels h m D to (h + 1) m D. A head's keys may therefore
    come from the layer called to_v. Released weights were trained this way.

    Returns: one tensor [N, S, H, D] per projection.
    """
    # [N, S, m W] -> [N, S, H, m D] -> m times [N, S, H, D]
    return list(torch.cat(projected, -1).unflatten(-1, (heads, -1)).chunk(len(projected), -1))


class Attention(nn.Module):
    """Self-attention over the latent tokens, or cross-attention to the conditioning tokens."""

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
        # The output layer always has a bias, even without qkv_bias.
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Attend from x [N, S, W] to y, which is x or conditioning tokens [N, L, E]; returns [N, S, W]."""
        if self.cross:
            # Queries alone are split among the heads as usual; keys and values are interleaved in pairs.
            (q,) = interleaved(self.heads, self.to_q(x))
            k, v = interleaved(self.heads, self.to_k(y), self.to_v(y))
        else:
            q, k, v = interleaved(self.heads, self.to_q(x), self.to_k(y), self.to_v(y))
        return self.out_proj(attend(self.q_norm(q), self.k_norm(k), v).flatten(2))


class Projected(nn.Module):
    """A linear layer followed by GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


class Expert(nn.Module):
    """Linear layer, GELU, linear layer, with the parameter names that experts have in the checkpoint."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        # The identity stands where the original has dropout, so that the last layer is net.2.
        self.net = nn.Sequential(Projected(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Gate(nn.Module):
    """Router of a mixture of experts: the experts of each token, and their weights."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width) / math.sqrt(width))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens [R, W] to experts.

        Returns: weights [R, k], which need not sum to 1, and the numbers [R, k] of the chosen experts.
        Differentiable in: the weights.
        """
        # The softmax is over all experts, and the k largest are not normalised again.
        weights, numbers = F.linear(x, self.weight).softmax(-1).topk(self.top_k, -1)
        return weights, numbers


class Mixture(nn.Module):
    """Mixture of experts: k of X routed experts for each token, plus one shared expert for all tokens."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width = config.hidden_size
        # Fixed at 4: mlp_ratio has no effect in the original.
        inner = 4 * config.hidden_size
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(config.num_experts))
        self.gate = Gate(width, config.num_experts, config.moe_top_k)
        self.shared_experts = Expert(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)  # [R, W]
        weights, numbers = self.gate(rows)  # [R, k] each
        # One expert after the other, each on the tokens that chose it. Gradients flow through routed experts,
        # whereas the original blocks them in eval mode; it also has a balancing term, which is left out here.
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            # row: tokens that chose this expert; place: 0..k-1, whether as their first choice or a later one
            row, place = (numbers == number).nonzero(as_tuple=True)
            total = total.index_add(0, row, (expert(rows[row]) * weights[row, place, None]).to(total.dtype))
        return total.view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    """Transformer block: optional skip, self-attention, cross-attention, then a perceptron or a mixture of
    experts.

    The time is not modulated in: it is one of the tokens.
    """

    def __init__(self, config: DenoiserConfig, skip: bool, mixture: bool):
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        # attn1 is self-attention, attn2 cross-attention to the conditioning.
        self.attn1 = Attention(config)
        self.attn2 = Attention(config, config.context_dim)
        # The skip's input is the earlier output and the current tokens side by side: 2 W channels.
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
        """Apply the block.

        Args:
            x: tokens [N, S, W].
            cond: conditioning tokens [N, L, E].
            skipped: output [N, S, W] of an earlier block, for blocks with a skip.
        Returns: [N, S, W].
        """
        if self.skip:
            assert skipped is not None
            # Order as trained: the earlier output comes first, and the norm after the linear layer.
            x = self.skip_norm(self.skip_linear(torch.cat([skipped, x], -1)))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), cond)
        h = self.norm3(x)
        return x + (self.moe(h) if self.mixture else self.mlp(h))


class FinalLayer(nn.Module):
    """Norm, then a linear layer to the latent's channels. The token of the time is dropped."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS)
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Token 0 is the time's: [N, S, W] -> [N, T, C]
        return self.linear(self.norm_final(x)[:, 1:])


class Denoiser(nn.Module):
    """Flow network: predict the velocity towards the data.

        model(x [N, T, C], t [N] in 0..1 with data at 1, {"main": tokens [N, L, E]}) -> [N, T, C]

    Differentiable in: everything except t and the choice of experts.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # recompute blocks in the backward pass, which needs less memory
        self.x_embedder = nn.Linear(config.in_channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.hidden_size)
        depth = config.depth
        self.blocks = nn.ModuleList(
            # The second half takes skips; the last num_moe_layers blocks have experts.
            Block(config, i > depth // 2, depth - i <= config.num_moe_layers)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.in_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.config
        cond = contexts["main"]
        # The number of tokens is free here: latents are a set, without positions.
        check_shape("Denoiser.x", x, ["N", "T", config.in_channels], "Give latents of this model's size.")
        check_shape(
            "Denoiser.contexts['main']",
            cond,
            [len(x), "L", config.context_dim],
            "Use the image encoder that the model was trained with.",
        )
        dtype = self.x_embedder.weight.dtype
        # Blocks before the middle keep their output, blocks after it take one.
        half = config.depth // 2
        # The time is the first token: [N, 1 + T, W]
        h = torch.cat([self.t_embedder(t), self.x_embedder(x.to(dtype))], 1)
        cond = cond.to(dtype)
        kept: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            # Last in, first out: the first block after the middle takes the output of the last one before it.
            args = (h, cond, kept.pop() if number > half else None)
            h = (
                checkpoint(block, *args, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(*args)
            )
            if number < half:
                kept.append(h)
        # Back to the dtype of the latents, in which the sampler integrates.
        return self.final_layer(h).to(x.dtype)


BOUND = 1.01  # half the edge length of the cube on which shapes are evaluated
CHUNK = 8192  # points that are decoded at a time; bounds the memory
_MLP = ("c_fc", "c_proj")  # the checkpoint's names of the two layers of a perceptron


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Settings of the autoencoder: `vae.params` of config.yaml, with the defaults of the class ShapeVAE."""

    num_latents: int  # T, latent tokens
    embed_dim: int  # C, channels of a latent
    width: int  # W of the autoencoder
    heads: int  # of every attention
    num_decoder_layers: int  # self-attention blocks of the decoder
    num_freqs: int = 8  # F
    include_pi: bool = True  # multiply the frequencies by pi
    qkv_bias: bool = True  # whether the layers of queries, keys and values have a bias
    qk_norm: bool = False  # normalise queries and keys of each head
    geo_decoder_mlp_expand_ratio: int = 4  # hidden width of the point decoder's perceptron, in widths
    geo_decoder_downsample_ratio: int = 1
    geo_decoder_ln_post: bool = True
    scale_factor: float = 1.0  # the flow's latents are the autoencoder's multiplied by this
    num_encoder_layers: int = 8  # self-attention blocks of the encoder
    use_ln_post: bool = True  # whether the encoder ends with a norm
    pc_size: int = 5120  # points sampled uniformly on a surface
    pc_sharpedge_size: int = 5120  # points sampled on its sharp edges
    # Channels of a point besides its position: 3 for the normal; 4 with a flag for sharp edges.
    point_feats: int = 3
    downsample_ratio: float = 20  # number of points that are kept per latent token
    label_type: str = "binary"  # concerns training only, as the next two settings do
    drop_path_rate: float = 0.0
    ckpt_path: str | None = None

    def __post_init__(self):
        if self.geo_decoder_downsample_ratio != 1 or not self.geo_decoder_ln_post:
            # Both would add or remove layers; no release uses them.
            raise ValueError(
                "config.yaml, vae: only geo_decoder_downsample_ratio 1 with geo_decoder_ln_post true is"
                " supported. Name the files of Hunyuan3D-2.1."
            )
        # pc_sharpedge_size may be 0, as in the release.
        points = min(self.pc_size, self.pc_sharpedge_size + 1, self.downsample_ratio)
        if self.point_feats not in (3, 4) or not self.use_ln_post or points < 1:
            raise ValueError(
                f"config.yaml, vae: expected point_feats 3 or 4, use_ln_post true and point counts >= 1, got"
                f" {self}. Other variants are not supported: restore the file."
            )
        least = min(self.num_latents, self.embed_dim, self.heads, self.num_decoder_layers)
        if least < 1 or self.width % self.heads or self.scale_factor <= 0:
            raise ValueError(
                f"config.yaml, vae: expected sizes >= 1 and heads that divide the width, got {self}. Restore"
                " the file."
            )


class Heads(nn.Module):
    """Attention with optional layer norms of queries and keys, head by head."""

    def __init__(self, size: int, norm: bool):
        super().__init__()
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps=1e-6) if norm else nn.Identity() for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with q, k, v of [N, S, H, D] each and join the heads: [N, S, W]."""
        return attend(self.q_norm(q), self.k_norm(k), v).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one linear layer, head by head."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        # [3 W, W]; split per head in `forward`
        self.c_qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [N, S, 3 W] -> [N, S, H, 3 D] -> q, k, v: the three are side by side within each head.
        return self.c_proj(self.attention(*self.c_qkv(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)))


class CrossAttention(nn.Module):
    """Cross-attention from points to latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        # [2 W, W]; keys and values of a head are adjacent
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        # q [N, P, H, D]; kv [N, S, H, 2 D], keys first
        q, kv = (y.unflatten(-1, (self.heads, -1)) for y in (self.c_q(x), self.c_kv(data)))
        return self.c_proj(self.attention(q, *kv.chunk(2, -1)))


class ResidualBlock(nn.Module):
    """Pre-norm block: self-attention, then a perceptron."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = Mlp(config.width, 4 * config.width, _MLP)
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Pre-norm block: cross-attention from points x to latents `data`, then a perceptron."""

    def __init__(self, config: AutoencoderConfig, expand: int):
        super().__init__()
        self.attn = CrossAttention(config)
        self.mlp = Mlp(config.width, expand * config.width, _MLP)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), self.ln_2(data))
        return x + self.mlp(self.ln_3(x))


def embedded(points: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """Embed positions [..., 3] by themselves and the sines and cosines of 2^j times each coordinate.

    Returns: [..., 3 (2 F + 1)]; with include_pi the frequencies are 2^j pi.
    """
    rates = 2.0 ** torch.arange(config.num_freqs, dtype=torch.float32, device=points.device) * (
        torch.pi if config.include_pi else 1
    )
    # Coordinate by coordinate: all F angles of x, then of y, then of z.
    angles = (points[..., None] * rates).flatten(-2)  # [..., 3 F]
    return torch.cat([points, angles.sin(), angles.cos()], -1)


class PointDecoder(nn.Module):
    """Decode points and latents to a scalar per point, positive inside the shape."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.query_proj = nn.Linear(3 * (2 * config.num_freqs + 1), config.width)  # input of `embedded`
        self.cross_attn_decoder = CrossBlock(config, config.geo_decoder_mlp_expand_ratio)
        # torch's default eps of 1e-5 here, unlike 1e-6 in the blocks.
        self.ln_post = nn.LayerNorm(config.width)
        self.output_proj = nn.Linear(config.width, 1)

    def forward(self, points: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Decode points [N, P, 3] with latents [N, T, W] to values [N, P]."""
        x = self.cross_attn_decoder(self.query_proj(embedded(points, self.config).to(latents.dtype)), latents)
        # [N, P, 1] -> [N, P]
        return self.output_proj(self.ln_post(x))[..., 0]


class Transformer(nn.Module):
    """A sequence of residual blocks."""

    def __init__(self, config: AutoencoderConfig, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(config) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ShapeDecoder(nn.Module):
    """The half of the autoencoder that decodes latents to shapes."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        # Counterpart of the encoder's pre_kl: from latent channels to the width.
        self.post_kl = nn.Linear(config.embed_dim, config.width)
        self.transformer = Transformer(config, config.num_decoder_layers)
        self.geo_decoder = PointDecoder(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Transform latents in the flow's scale [N, T, C] to the features [N, T, W] that the point decoder
        reads.
        """
        return self.transformer(self.post_kl(latents / self.config.scale_factor))

    @torch.no_grad()
    def slab(self, decoded: torch.Tensor, axis: torch.Tensor, x: slice) -> torch.Tensor:
        """Evaluate one shape on a slice of a regular grid.

        Args:
            decoded: what `forward` returned for the shape, [1, T, W].
            axis: coordinates of the grid along each axis, [R].
            x: the slice along the first axis.
        Returns: values at the product of axis[x], axis and axis, [len(axis[x]), R, R], on the CPU.
        """
        side = len(axis)
        planes = len(axis[x])
        numbers = []
        # Flat numbers of grid points, the last axis fastest; each chunk is decoded and moved to the CPU.
        for chunk in torch.arange(planes * side**2, device=axis.device).split(CHUNK):
            places = (axis[x][chunk // side**2], axis[chunk // side % side], axis[chunk % side])
            numbers.append(self.geo_decoder(torch.stack(places, 1)[None], decoded)[0].float().cpu())
        return torch.cat(numbers).view(planes, side, side)


# The encoder: points on a surface -> latents.


class PointEncoder(nn.Module):
    """Encode query points and data points to features [N, T, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        # Embedded position, normal, and perhaps the flag of a sharp edge.
        self.input_proj = nn.Linear(3 * (2 * config.num_freqs + 1) + config.point_feats, config.width)
        self.cross_attn = CrossBlock(config, 4)
        self.self_attn = Transformer(config, config.num_encoder_layers)
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Encode queries [N, T, 3 + f] that attend to points [N, M, 3 + f].

        The channels are the position, the normal and, where the config has it, the flag of a sharp edge.
        """
        # Positions are embedded; normals and the flag enter as they are.
        features = [torch.cat([embedded(x[..., :3], self.config), x[..., 3:]], -1) for x in (queries, points)]
        # One input layer serves queries and points alike.
        projected = [self.input_proj(x.to(self.input_proj.weight)) for x in features]
        return self.ln_post(self.self_attn(self.cross_attn(*projected)))


class ShapeEncoder(nn.Module):
    """The half of the autoencoder that encodes points on a surface to latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = PointEncoder(config)
        self.pre_kl = nn.Linear(config.width, 2 * config.embed_dim)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute mean and log-variance of the latents, [N, T, C] each, in the autoencoder's scale."""
        # [N, T, 2 C] -> [N, T, C] each
        mean, logvar = self.pre_kl(self.encoder(queries, points)).chunk(2, -1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def latents(self, surface: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Encode a surface to the mean latent [T, C] in the flow's scale.

        Args:
            surface: points [P, 3 + f], those on sharp edges last.
            draw: random generator that chooses the points that are kept.
        """
        # The choice is made on the CPU, so that it does not depend on the device.
        device = self.pre_kl.weight.device
        queries, points = (x.to(device)[None] for x in chosen(surface.cpu(), self.config, draw))
        # The mean of the first and only sample, scaled as the flow expects it.
        return self(queries, points)[0][0] * self.config.scale_factor


def chosen(
    surface: torch.Tensor, config: AutoencoderConfig, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose query points [T, 3 + f] and data points [M, 3 + f] of a surface.

    Uniform points and points on sharp edges each supply their share.
    """
    # points on sharp edges are the last ones
    parts = surface.split([config.pc_size, config.pc_sharpedge_size])
    queries = []
    kept = []
    for part in parts:
        share = len(part) / len(surface) * config.num_latents  # queries of this part, not yet whole
        subset = part[torch.randperm(len(part), generator=draw)[: int(share * config.downsample_ratio)]]
        # The 1e-6 keeps a share that is whole but for rounding from gaining a query.
        queries.append(subset[farthest(subset[:, :3], math.ceil(share - 1e-6), draw)])
        kept.append(subset)
    return torch.cat(queries), torch.cat(kept)


def farthest(points: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """Choose `count` of the points [P, 3] by farthest point sampling; the first one is random.

    Returns: their numbers [count], each point the farthest from all those before it.
    """
    numbers = torch.zeros(count, dtype=torch.int64)
    if count:
        numbers[0] = torch.randint(len(points), (), generator=draw)
    # Squared distance of every point to the nearest chosen one, updated after each choice.
    nearest = torch.full([len(points)], torch.inf)
    for i in range(1, count):
        nearest = torch.minimum(nearest, (points - points[numbers[i - 1]]).square().sum(1))
        numbers[i] = nearest.argmax()
    return numbers
