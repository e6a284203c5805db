"""Networks of Hunyuan3D-2.1: the flow model that generates the latents of shapes, and the shape autoencoder.

The flow model is a transformer over a set of latent tokens. Skip connections join its two halves, and its
last blocks use mixtures of experts. The encoder maps points on a surface to the set of latents. The decoder
is a transformer over the set, followed by cross-attention from query points to the set. Its output is
positive for points inside the shape.

Time t is 0 at noise and 1 at data. The code follows the published architecture (technical report
arXiv:2506.15442), and the names of parameters and settings are those of its checkpoints and config.yaml. With
the same random weights the outputs equal those of the original's classes (tests/compat).

Shapes: N samples, T latent tokens, S = T + 1 tokens (the token of the time is added), C channels of a latent,
W width (channels of a token inside the network), L conditioning tokens, E channels of a conditioning token, H
attention heads, D channels of an attention head, X experts, k experts per token, P points, M points that the
encoder attends to, f features of a point besides its position, R grid points per axis, F frequencies of a
coordinate.
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

EPS = 1e-6  # constant of all norms of the flow model
# torch warns if inputs are bfloat16 and weights float32. The norms of queries and keys then run unfused.
# Their result is computed in float32 and rounded to bfloat16, as intended.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Settings of the flow model: the section `model.params` of config.yaml.

    The defaults are those of the original's class HunYuanDiTPlain. That class ignores the setting
    `mlp_ratio`, which config.yaml contains.

    Raises: ValueError for settings that Hunyuan3D-2.1 does not use, or that do not fit together.
    """

    input_size: int = 1024  # T, number of latent tokens
    in_channels: int = 4  # C, channels of a latent
    hidden_size: int = 1024  # W, even and a multiple of num_heads
    context_dim: int = 1024  # E, channels of a conditioning token
    depth: int = 24  # number of blocks
    num_heads: int = 16  # H
    text_len: int = 257  # L, number of conditioning tokens
    qk_norm: bool = False  # True: queries and keys of each head are normalised
    qkv_bias: bool = True  # True: the layers of queries, keys and values have a bias
    num_moe_layers: int = 6  # number of blocks, counted from the last one, that have a mixture of experts
    num_experts: int = 8  # X
    moe_top_k: int = 2  # k, number of experts per token
    # The settings below exist in the original's class. Only the
    # values that Hunyuan3D-2.1 uses are implemented.
    norm_type: str = "layer"
    qk_norm_type: str = "rms"
    use_pos_emb: bool = False
    use_attention_pooling: bool = True
    with_decoupled_ca: bool = False
    guidance_cond_proj_dim: int | None = None

    def __post_init__(self):
        # Any other value would build another network, so it is rejected with an error. The default of
        # use_attention_pooling is not supported either: config.yaml must set it to false.
        supported_values = {
            "norm_type": "layer",
            "qk_norm_type": "rms",
            "use_pos_emb": False,
            "use_attention_pooling": False,
            "with_decoupled_ca": False,
            "guidance_cond_proj_dim": None,
        }
        unsupported_settings = [
            f"{setting_name}={getattr(self, setting_name)!r}"
            for setting_name, supported_value in supported_values.items()
            if getattr(self, setting_name) != supported_value
        ]
        if unsupported_settings:
            raise ValueError(
                f"config.yaml, model: these settings are not supported, because Hunyuan3D-2.1 does not use"
                f" them: {', '.join(unsupported_settings)}. Use the files of Hunyuan3D-2.1."
            )
        size_settings = (
            self.input_size,
            self.in_channels,
            self.context_dim,
            self.depth,
            self.num_heads,
            self.text_len,
        )
        if (
            min(size_settings) < 1
            or self.hidden_size % self.num_heads
            # Even, because the embedding of the time consists of pairs of sine and cosine
            or self.hidden_size % 2
            or not 1 <= self.moe_top_k <= self.num_experts
        ):
            raise ValueError(
                "config.yaml, model: all sizes must be >= 1, hidden_size must be even and a multiple of"
                f" num_heads, and moe_top_k must be at most num_experts. Some of the values are not:"
                f" input_size={self.input_size}, in_channels={self.in_channels},"
                f" context_dim={self.context_dim}, depth={self.depth}, text_len={self.text_len},"
                f" hidden_size={self.hidden_size}, num_heads={self.num_heads}, moe_top_k={self.moe_top_k},"
                f" num_experts={self.num_experts}. Download the file again."
            )


class TimeEmbedder(nn.Module):
    """Embedding of the time [N] as one token [N, 1, W]: sines and cosines of t, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # t itself is embedded, 0..1, and not 1000 t as in TRELLIS and SAM 3D.
        half_width = self.width // 2
        frequency_indices = torch.arange(half_width, dtype=torch.float32, device=t.device)
        rates = torch.exp(-math.log(10000) / half_width * frequency_indices)  # from 1 to about 1 / 10000
        # The angles are float32 even if the network is half
        # precision. Only the sines and cosines are rounded.
        angles = t.float()[:, None] * rates  # [N, W / 2]
        embedding = torch.cat([angles.sin(), angles.cos()], 1).to(next(self.mlp.parameters()).dtype)
        return self.mlp(embedding)[:, None]  # [N, W] -> [N, 1, W]


def interleaved(num_heads: int, *projections: torch.Tensor) -> list[torch.Tensor]:
    """Concatenate projections along the channels, and split the result among the attention heads.

    Of m concatenated projections, attention head h takes the channels h m D to (h + 1) m D and divides them
    again into m tensors. The keys of an attention head may therefore come from the layer called to_v.
    Released weights were trained this way.

    Args:
        num_heads: number of heads H.
        projections: outputs [N, S, W] of m linear layers.

    Returns: m tensors [N, S, H, D].
    """
    # [N, S, m W] -> [N, S, H, m D] -> m times [N, S, H, D]
    return list(torch.cat(projections, -1).unflatten(-1, (num_heads, -1)).chunk(len(projections), -1))


class Attention(nn.Module):
    """Self-attention over the latent tokens, or cross-attention from them to the conditioning tokens.

    Args:
        config: settings of the flow model.
        context_channels: channels E of a conditioning token for cross-attention; None for self-attention.
    """

    def __init__(self, config: DenoiserConfig, context_channels: int | None = None):
        super().__init__()
        width = config.hidden_size
        bias = config.qkv_bias
        self.heads = config.num_heads
        self.cross = context_channels is not None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context_channels or width, width, bias=bias) for _ in range(2))
        head_width = width // self.heads  # D
        self.q_norm, self.k_norm = (
            nn.RMSNorm(head_width, eps=EPS) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        # As in the original, the output layer has a bias even if qkv_bias is False.
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context_tokens: torch.Tensor) -> torch.Tensor:
        """Apply the attention.

        Args:
            x: tokens [N, S, W] that give the queries.
            context_tokens: tokens that give the keys and values: x for self-attention, or conditioning tokens
                [N, L, E].

        Returns: tokens [N, S, W].
        """
        if self.cross:
            # A single projection is split among the heads as usual. Keys and values are interleaved.
            (q,) = interleaved(self.heads, self.to_q(x))
            k, v = interleaved(self.heads, self.to_k(context_tokens), self.to_v(context_tokens))
        else:
            q, k, v = interleaved(
                self.heads, self.to_q(x), self.to_k(context_tokens), self.to_v(context_tokens)
            )
        return self.out_proj(attend(self.q_norm(q), self.k_norm(k), v).flatten(2))


class Projected(nn.Module):
    """A linear layer followed by GELU."""

    def __init__(self, width: int, hidden_channels: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


class Expert(nn.Module):
    """Perceptron with the parameter names that experts have in the checkpoint: [..., W] -> [..., W].

    Args:
        width: number of channels W.
        hidden_channels: number of channels between the two linear layers.
    """

    def __init__(self, width: int, hidden_channels: int):
        super().__init__()
        # The identity replaces the original's dropout, so that the second linear layer has the name net.2.
        self.net = nn.Sequential(
            Projected(width, hidden_channels), nn.Identity(), nn.Linear(hidden_channels, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Gate(nn.Module):
    """Router of a mixture of experts, which chooses the experts of each token and weights them.

    Args:
        width: channels W of a token.
        n_experts: number of experts X.
        top_k: number of experts per token, k.
    """

    def __init__(self, width: int, n_experts: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_experts, width) / math.sqrt(width))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of tokens x [N S, W].

        Returns: weights [N S, k] of the chosen experts, which need not sum to 1, and the indices [N S, k] of
            these experts. The weights are differentiable in x.
        """
        # The softmax is over all experts, and the k largest weights are not normalised again.
        weights, expert_indices = F.linear(x, self.weight).softmax(-1).topk(self.top_k, -1)
        return weights, expert_indices


class Mixture(nn.Module):
    """Mixture of experts: each token uses k of X experts, and all tokens use one shared expert.

    [N, S, W] -> [N, S, W].
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        width = config.hidden_size
        # The factor is always 4, because mlp_ratio has no effect in the original.
        hidden_channels = 4 * config.hidden_size
        self.experts = nn.ModuleList(Expert(width, hidden_channels) for _ in range(config.num_experts))
        self.gate = Gate(width, config.num_experts, config.moe_top_k)
        self.shared_experts = Expert(width, hidden_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)  # [N S, W]
        weights, expert_indices = self.gate(tokens)  # [N S, k] each
        # One expert after the other, each on the tokens that chose it. Gradients flow
        # through the experts. The original blocks them in eval mode; it also has a loss
        # that balances the experts, which is not needed here.
        expert_sums = torch.zeros_like(tokens)
        for expert_index, expert in enumerate(self.experts):
            # Indices of the tokens that chose this expert, and its rank
            # 0..k-1 among the choices of each token
            token_indices, choice_ranks = (expert_indices == expert_index).nonzero(as_tuple=True)
            weighted_outputs = expert(tokens[token_indices]) * weights[token_indices, choice_ranks, None]
            expert_sums = expert_sums.index_add(0, token_indices, weighted_outputs.to(expert_sums.dtype))
        return expert_sums.view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention, then a perceptron or a mixture of experts.

    The time does not modulate the block, because it is one of the tokens.

    Args:
        config: settings of the flow model.
        has_skip: True if the block also takes the output of an earlier block.
        has_mixture: True for a mixture of experts, False for a perceptron.
    """

    def __init__(self, config: DenoiserConfig, has_skip: bool, has_mixture: bool):
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        # attn1 is self-attention, attn2 cross-attention to the conditioning.
        self.attn1 = Attention(config)
        self.attn2 = Attention(config, config.context_dim)
        # The skip's input is the earlier output and the current tokens side by side: 2 W channels.
        if has_skip:
            self.skip_linear = nn.Linear(2 * width, width)
            self.skip_norm = nn.LayerNorm(width, eps=EPS)
        if has_mixture:
            self.moe = Mixture(config)
        else:
            self.mlp = Mlp(width, 4 * width)
        self.skip = has_skip
        self.mixture = has_mixture

    def forward(
        self, x: torch.Tensor, cond: torch.Tensor, earlier_output: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: tokens [N, S, W].
            cond: conditioning tokens [N, L, E].
            earlier_output: output [N, S, W] of an earlier block; None for a block without a skip connection.

        Returns: tokens [N, S, W].
        """
        if self.skip:
            assert earlier_output is not None
            # The order of the trained weights: the earlier output comes
            # first, and the norm after the linear layer.
            x = self.skip_norm(self.skip_linear(torch.cat([earlier_output, x], -1)))
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), cond)
        h = self.norm3(x)
        return x + (self.moe(h) if self.mixture else self.mlp(h))


class FinalLayer(nn.Module):
    """Norm, then a linear layer to the channels of a latent, [N, S, W] -> [N, T, C].

    The token of the time is dropped.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS)
        self.linear = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Token 0 belongs to the time.
        return self.linear(self.norm_final(x)[:, 1:])


class Denoiser(nn.Module):
    """Flow model, which predicts the velocity from noise (t = 0) to data (t = 1).

    Usage: velocity = model(x, t, {"main": conditioning}), with latents x [N, T, C], times t [N] in 0..1, and
    conditioning tokens [N, L, E]. The velocity has the shape of x.

    Differentiable in: x and the conditioning. The choice of experts has no gradient.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # True: the backward pass computes blocks again, which needs less memory
        self.x_embedder = nn.Linear(config.in_channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.hidden_size)
        depth = config.depth
        self.blocks = nn.ModuleList(
            # Blocks of the second half have skip connections. The last num_moe_layers blocks have experts.
            Block(config, i > depth // 2, depth - i <= config.num_moe_layers)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.in_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.config
        cond = contexts["main"]
        # The number of tokens is free here: latents are a set, without positions.
        check_shape("Denoiser.x", x, ["N", "T", config.in_channels], "Use latents of this model.")
        check_shape(
            "Denoiser.contexts['main']",
            cond,
            [len(x), "L", config.context_dim],
            "Use the image encoder that the model was trained with.",
        )
        dtype = self.x_embedder.weight.dtype
        # The outputs of blocks before the middle block are inputs of the blocks after it.
        middle_index = config.depth // 2
        # The time is the first token: [N, 1 + T, W]
        tokens = torch.cat([self.t_embedder(t), self.x_embedder(x.to(dtype))], 1)
        cond = cond.to(dtype)
        skip_outputs: list[torch.Tensor] = []
        for block_index, block in enumerate(self.blocks):
            # Last in, first out: the first block after the middle takes
            # the output of the last block before it.
            block_args = (tokens, cond, skip_outputs.pop() if block_index > middle_index else None)
            tokens = (
                checkpoint(block, *block_args, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(*block_args)
            )
            if block_index < middle_index:
                skip_outputs.append(tokens)
        # The sampler integrates in the dtype of the latents.
        return self.final_layer(tokens).to(x.dtype)


BOUND = 1.01  # half the side of the cube in which shapes are evaluated
CHUNK = 8192  # number of points that are decoded at a time, which limits the memory
_MLP = ("c_fc", "c_proj")  # names of the two linear layers of a perceptron in the checkpoint


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Settings of the autoencoder: the section `vae.params` of config.yaml.

    The defaults are those of the original's class ShapeVAE.

    Raises: ValueError for settings that are not supported or do not fit together.
    """

    num_latents: int  # T, number of latent tokens
    embed_dim: int  # C, channels of a latent
    width: int  # W of the autoencoder, a multiple of `heads`
    heads: int  # H, number of attention heads
    num_decoder_layers: int  # number of self-attention blocks of the decoder
    num_freqs: int = 8  # F
    include_pi: bool = True  # True: the frequencies are multiplied by pi
    qkv_bias: bool = True  # True: the layers of queries, keys and values have a bias
    qk_norm: bool = False  # True: queries and keys of each head are normalised
    # Channels inside the point decoder's perceptron, as a multiple of W
    geo_decoder_mlp_expand_ratio: int = 4
    geo_decoder_downsample_ratio: int = 1  # only 1 is supported
    geo_decoder_ln_post: bool = True  # only True is supported
    scale_factor: float = 1.0  # factor from the autoencoder's latents to the latents of the flow model
    num_encoder_layers: int = 8  # number of self-attention blocks of the encoder
    use_ln_post: bool = True  # True: the encoder ends with a norm; only True is supported
    pc_size: int = 5120  # number of points that are sampled uniformly on a surface
    pc_sharpedge_size: int = 5120  # number of points that are sampled on its sharp edges
    # f, features of a point besides its position: 3 for the normal; 4 with a flag for sharp edges
    point_feats: int = 3
    downsample_ratio: float = 20  # number of points per latent token that the encoder attends to
    label_type: str = "binary"  # used in the original's training only, as the next two settings
    drop_path_rate: float = 0.0
    ckpt_path: str | None = None

    def __post_init__(self):
        if self.geo_decoder_downsample_ratio != 1 or not self.geo_decoder_ln_post:
            # Other values of these settings would add or remove layers. No release uses them.
            raise ValueError(
                "config.yaml, vae: only geo_decoder_downsample_ratio 1 and geo_decoder_ln_post true are"
                f" supported, got {self.geo_decoder_downsample_ratio} and {self.geo_decoder_ln_post}. Use the"
                " files of Hunyuan3D-2.1."
            )
        if self.point_feats not in (3, 4) or not self.use_ln_post:
            raise ValueError(
                "config.yaml, vae: only point_feats 3 or 4 and use_ln_post true are supported, got"
                f" {self.point_feats} and {self.use_ln_post}. Use the files of Hunyuan3D-2.1."
            )
        # pc_sharpedge_size may be 0, as in the release, hence the 1.
        if min(self.pc_size, self.pc_sharpedge_size + 1, self.downsample_ratio) < 1:
            raise ValueError(
                "config.yaml, vae: pc_size and downsample_ratio must be >= 1 and pc_sharpedge_size >= 0, got"
                f" {self.pc_size}, {self.downsample_ratio} and {self.pc_sharpedge_size}. Download the file"
                " again."
            )
        smallest_size = min(self.num_latents, self.embed_dim, self.heads, self.num_decoder_layers)
        if smallest_size < 1 or self.width % self.heads or self.scale_factor <= 0:
            raise ValueError(
                "config.yaml, vae: sizes must be >= 1, width must be a multiple of heads, and scale_factor"
                f" must be > 0, got num_latents={self.num_latents}, embed_dim={self.embed_dim},"
                f" num_decoder_layers={self.num_decoder_layers}, width={self.width}, heads={self.heads} and"
                f" scale_factor={self.scale_factor}. Download the file again."
            )


class Heads(nn.Module):
    """Attention with optional layer norms of the queries and keys of each head.

    Args:
        head_channels: channels D of a head.
        has_norm: True if queries and keys are normalised.
    """

    def __init__(self, head_channels: int, has_norm: bool):
        super().__init__()
        self.q_norm, self.k_norm = (
            nn.LayerNorm(head_channels, eps=1e-6) if has_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend with queries, keys and values [N, S, H, D] each, and concatenate the heads to [N, S, W]."""
        return attend(self.q_norm(q), self.k_norm(k), v).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention over tokens [N, S, W] with one linear layer for queries, keys and values."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.c_qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Queries, keys and values are adjacent within each head: [N, S, 3 W] -> [N, S, H, 3 D] -> 3 x [.., D]
        q, k, v = self.c_qkv(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        return self.c_proj(self.attention(q, k, v))


class CrossAttention(nn.Module):
    """Cross-attention from tokens x [N, P, W] to tokens `context_tokens` [N, S, W]. It returns [N, P, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = Heads(width // config.heads, config.qk_norm)

    def forward(self, x: torch.Tensor, context_tokens: torch.Tensor) -> torch.Tensor:
        # Keys and values are adjacent within each head, keys first: q [N, P, H, D], kv [N, S, H, 2 D].
        q, kv = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in (self.c_q(x), self.c_kv(context_tokens))
        )
        k, v = kv.chunk(2, -1)
        return self.c_proj(self.attention(q, k, v))


class ResidualBlock(nn.Module):
    """Pre-norm transformer block over tokens [N, S, W]: self-attention, then a perceptron."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = Mlp(config.width, 4 * config.width, _MLP)
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Pre-norm transformer block: cross-attention from tokens x to context tokens, then a perceptron.

    Args:
        config: settings of the autoencoder.
        mlp_ratio: channels inside the perceptron, as a multiple of W.
    """

    def __init__(self, config: AutoencoderConfig, mlp_ratio: int):
        super().__init__()
        self.attn = CrossAttention(config)
        self.mlp = Mlp(config.width, mlp_ratio * config.width, _MLP)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, context_tokens: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), self.ln_2(context_tokens))
        return x + self.mlp(self.ln_3(x))


def embedded(points: torch.Tensor, config: AutoencoderConfig) -> torch.Tensor:
    """Embed positions as Fourier features.

    These are the coordinates, and the sines and cosines of 2^j times each coordinate for j = 0 .. F - 1. With
    the setting include_pi, the factors are 2^j pi.

    Args:
        points: positions [..., 3].
        config: settings of the autoencoder.

    Returns: features [..., 3 (2 F + 1)].
    """
    rates = 2.0 ** torch.arange(config.num_freqs, dtype=torch.float32, device=points.device) * (
        torch.pi if config.include_pi else 1
    )
    # The order of the trained weights: all F angles of x, then of y, then of z.
    angles = (points[..., None] * rates).flatten(-2)  # [..., 3 F]
    return torch.cat([points, angles.sin(), angles.cos()], -1)


class PointDecoder(nn.Module):
    """Decoder of query points: it computes a value per point that is positive inside the shape."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.query_proj = nn.Linear(3 * (2 * config.num_freqs + 1), config.width)  # input of `embedded`
        self.cross_attn_decoder = CrossBlock(config, config.geo_decoder_mlp_expand_ratio)
        # The original uses torch's default constant 1e-5 here, and 1e-6 in the blocks.
        self.ln_post = nn.LayerNorm(config.width)
        self.output_proj = nn.Linear(config.width, 1)

    def forward(self, points: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Compute the values of query points.

        Args:
            points: query points [N, P, 3].
            latents: decoded latents [N, T, W], the output of `ShapeDecoder.forward`.

        Returns: values [N, P], positive inside the shape.
        """
        queries = self.query_proj(embedded(points, self.config).to(latents.dtype))
        x = self.cross_attn_decoder(queries, latents)
        return self.output_proj(self.ln_post(x))[..., 0]  # [N, P, 1] -> [N, P]


class Transformer(nn.Module):
    """Sequence of residual blocks over tokens [N, S, W].

    Args:
        config: settings of the autoencoder.
        n_blocks: number of blocks.
    """

    def __init__(self, config: AutoencoderConfig, n_blocks: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(config) for _ in range(n_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ShapeDecoder(nn.Module):
    """Decoder of the autoencoder, from latents to shapes."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        # Linear layer from C to W channels, the counterpart of pre_kl in the encoder
        self.post_kl = nn.Linear(config.embed_dim, config.width)
        self.transformer = Transformer(config, config.num_decoder_layers)
        self.geo_decoder = PointDecoder(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Compute the features [N, T, W] that `geo_decoder` needs from latents [N, T, C].

        The latents have the scale of the flow model.
        """
        return self.transformer(self.post_kl(latents / self.config.scale_factor))

    @torch.no_grad()
    def slab(self, decoded_latents: torch.Tensor, axis: torch.Tensor, x_slice: slice) -> torch.Tensor:
        """Evaluate one shape on consecutive layers (grid points of the same x) of a regular grid.

        Args:
            decoded_latents: output of `forward` for the shape, [1, T, W].
            axis: coordinates [R] of the grid points, equal for all three axes.
            x_slice: slice of `axis` that selects the layers.

        Returns: float32 values [len(axis[x_slice]), R, R] on the CPU, positive inside the shape. Entry
            [i, j, k] belongs to the point (axis[x_slice][i], axis[j], axis[k]).
        """
        points_per_axis = len(axis)
        layer_count = len(axis[x_slice])
        value_chunks = []
        # Grid points are numbered with the last axis fastest. Moving
        # each chunk to the CPU limits the device's memory.
        for chunk_indices in torch.arange(layer_count * points_per_axis**2, device=axis.device).split(CHUNK):
            coordinates = (
                axis[x_slice][chunk_indices // points_per_axis**2],
                axis[chunk_indices // points_per_axis % points_per_axis],
                axis[chunk_indices % points_per_axis],
            )
            points = torch.stack(coordinates, 1)[None]  # [1, points of the chunk, 3]
            value_chunks.append(self.geo_decoder(points, decoded_latents)[0].float().cpu())
        return torch.cat(value_chunks).view(layer_count, points_per_axis, points_per_axis)


# The encoder maps points on a surface to latents.


class PointEncoder(nn.Module):
    """Encoder of query points that attend to other points of the surface. It returns features [N, T, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        # Inputs: the embedded position and the f features of a point, see `AutoencoderConfig.point_feats`
        self.input_proj = nn.Linear(3 * (2 * config.num_freqs + 1) + config.point_feats, config.width)
        self.cross_attn = CrossBlock(config, 4)
        self.self_attn = Transformer(config, config.num_encoder_layers)
        self.ln_post = nn.LayerNorm(config.width)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Encode a surface.

        The channels of a point are its position, its normal and, if point_feats is 4, the flag of a sharp
        edge.

        Args:
            queries: query points [N, T, 3 + f].
            points: points [N, M, 3 + f] to which the queries attend.

        Returns: features [N, T, W].
        """
        projected_points = []
        # Queries and points use the same input layer.
        for x in (queries, points):
            # The first three channels are the position, which is embedded. The features are not.
            features = torch.cat([embedded(x[..., :3], self.config), x[..., 3:]], -1)
            projected_points.append(self.input_proj(features.to(self.input_proj.weight)))
        return self.ln_post(self.self_attn(self.cross_attn(*projected_points)))


class ShapeEncoder(nn.Module):
    """Encoder of the autoencoder, from points on a surface to latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = PointEncoder(config)
        self.pre_kl = nn.Linear(config.width, 2 * config.embed_dim)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the mean and the log-variance of the latents, [N, T, C] each, in the autoencoder's scale.

        Args:
            queries: query points [N, T, 3 + f], see `PointEncoder.forward`.
            points: points [N, M, 3 + f].
        """
        # [N, T, 2 C] -> [N, T, C] each
        mean, logvar = self.pre_kl(self.encoder(queries, points)).chunk(2, -1)
        # The limits of the original; they keep exp(logvar) finite.
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def latents(self, surface: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Encode a surface as the mean [T, C] of its latents, in the scale of the flow model.

        Args:
            surface: points [P, 3 + f]: first pc_size uniform points, then pc_sharpedge_size points on edges.
            generator: random generator that chooses the points to encode.
        """
        # The points are chosen on the CPU, so that the choice does not depend on the device.
        device = self.pre_kl.weight.device
        queries, points = (x.to(device)[None] for x in choose_points(surface.cpu(), self.config, generator))
        # First index: the mean and not the log-variance. Second index: the only surface of the batch.
        return self(queries, points)[0][0] * self.config.scale_factor


def choose_points(
    surface: torch.Tensor, config: AutoencoderConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the query points and the points that they attend to, from the points of a surface.

    Uniform points and points on sharp edges are chosen separately, in proportion to their numbers.

    Args:
        surface: points [P, 3 + f]: first pc_size uniform points, then pc_sharpedge_size points on edges.
        config: settings of the autoencoder.
        generator: random generator on the CPU.

    Returns: query points [T, 3 + f], and points [M, 3 + f] to which they attend.
    """
    point_sets = surface.split([config.pc_size, config.pc_sharpedge_size])
    queries = []
    attended_points = []
    for points in point_sets:
        # Number of query points of this set, before it is rounded up
        query_count = len(points) / len(surface) * config.num_latents
        subset_size = int(query_count * config.downsample_ratio)
        point_subset = points[torch.randperm(len(points), generator=generator)[:subset_size]]
        # Without the 1e-6, an integer with a rounding error above it would be rounded up to the next integer.
        queries.append(point_subset[farthest(point_subset[:, :3], math.ceil(query_count - 1e-6), generator)])
        attended_points.append(point_subset)
    return torch.cat(queries), torch.cat(attended_points)


def farthest(points: torch.Tensor, point_count: int, generator: torch.Generator) -> torch.Tensor:
    """Choose points by farthest point sampling.

    The first point is random. Each further point is the one that is farthest from all points chosen before.

    Args:
        points: points [P, 3].
        point_count: number of points to choose.
        generator: random generator on the CPU.

    Returns: the indices [point_count] of the chosen points.
    """
    chosen_indices = torch.zeros(point_count, dtype=torch.int64)
    if point_count:
        chosen_indices[0] = torch.randint(len(points), (), generator=generator)
    # Squared distance of every point to the nearest chosen point, updated after each choice
    nearest_squared = torch.full([len(points)], torch.inf)
    for i in range(1, point_count):
        squared_distances = (points - points[chosen_indices[i - 1]]).square().sum(1)
        nearest_squared = torch.minimum(nearest_squared, squared_distances)
        chosen_indices[i] = nearest_squared.argmax()
    return chosen_indices
