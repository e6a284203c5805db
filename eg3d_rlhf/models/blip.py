"""The BLIP trunk of ImageReward and Reward3D: a ViT for the picture, and a BERT whose every layer also
attends to the picture.

Modules carry the published names (params/Reward3D_*.tsv), so that published files load as they are. Written
from BLIP's description (2201.12086): pre-norm ViT with one class token; post-norm BERT, each layer
self-attention, cross-attention, feed-forward; no token types.

Shape letters: B pictures, T tokens of a prompt, P patches + 1, D text width, E picture width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.models.attention import attend, tree
from eg3d_rlhf.models.vit import HEAD, VisionTransformer
from eg3d_rlhf.models.weights import count, shape_of


@dataclass(frozen=True, kw_only=True)
class BlipSizes:
    """Sizes of a trunk; the defaults are BLIP-large."""

    image: int = 224  # pixels per side
    patch: int = 16  # pixels per side
    vision_width: int = 1024
    vision_layers: int = 24
    text_width: int = 768
    text_layers: int = 12
    text_hidden: int = 3072
    vocabulary: int = 30524  # BERT's and two marks
    positions: int = 512
    projection: int = 256  # of a contrastive head that scoring does not use

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], who: str) -> "BlipSizes":
        """The sizes that a file's shapes tell. Raises: ValueError for another network's file."""
        vision = "blip.visual_encoder."
        text = "blip.text_encoder."
        width, _, patch, _ = shape_of(state, f"{vision}patch_embed.proj.weight", who, 4)
        _, tokens, _ = shape_of(state, f"{vision}pos_embed", who, 3)
        vocabulary, text_width = shape_of(state, f"{text}embeddings.word_embeddings.weight", who, 2)
        return cls(
            image=round((tokens - 1) ** 0.5) * patch,
            patch=patch,
            vision_width=width,
            vision_layers=count(state, f"{vision}blocks."),
            text_width=text_width,
            text_layers=count(state, f"{text}encoder.layer."),
            vocabulary=vocabulary,
            text_hidden=shape_of(state, f"{text}encoder.layer.0.intermediate.dense.weight", who, 2)[0],
            positions=shape_of(state, f"{text}embeddings.position_embeddings.weight", who, 2)[0],
            projection=shape_of(state, "blip.text_proj.weight", who, 2)[0],
        )


class VisionEncoder(VisionTransformer):
    """The ViT: normalised pictures [B, 3, S, S] -> features [B, P, E]; the class token comes first."""

    def __init__(self, sizes: BlipSizes):
        width = sizes.vision_width
        heads = max(width // HEAD, 1)
        super().__init__(
            width, sizes.vision_layers, heads, 4 * width, sizes.patch, sizes.image // sizes.patch
        )
        self.side = sizes.image


class TextAttention(nn.Module):
    """Attention of tokens to what `key_width` wide vectors tell, added and normalised."""

    def __init__(self, width: int, key_width: int):
        super().__init__()
        self.add_module(
            "self",
            tree(
                query=nn.Linear(width, width),
                key=nn.Linear(key_width, width),
                value=nn.Linear(key_width, width),
            ),
        )
        self.output = tree(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, T, D], seen [B, P, key width], mask [B, P] -> [B, T, D]."""
        layers: Any = self.get_submodule("self")
        heads = max(x.shape[-1] // HEAD, 1)
        q, k, v = (
            y.unflatten(-1, (heads, -1)) for y in (layers.query(x), layers.key(seen), layers.value(seen))
        )
        attended = attend(q, k, v, None if mask is None else mask[:, None, None]).flatten(2)
        return self.output.LayerNorm(self.output.dense(attended) + x)


class TextLayer(nn.Module):
    """One layer of the BERT."""

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        width = sizes.text_width
        self.attention = TextAttention(width, width)
        self.crossattention = TextAttention(width, sizes.vision_width)
        self.intermediate = tree(dense=nn.Linear(width, sizes.text_hidden))
        self.output = tree(
            dense=nn.Linear(sizes.text_hidden, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], mask [B, T], picture [B, P, E] -> [B, T, D]."""
        x = self.crossattention(self.attention(x, x, mask), picture)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class TextEncoder(nn.Module):
    """The BERT."""

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        self.vocabulary = sizes.vocabulary
        width = sizes.text_width
        self.embeddings = tree(
            word_embeddings=nn.Embedding(sizes.vocabulary, width),
            position_embeddings=nn.Embedding(sizes.positions, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.encoder = tree(layer=nn.ModuleList(TextLayer(sizes) for _ in range(sizes.text_layers)))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """Features [B, T, D] of tokens [B, T] (mask [B, T] bool: True where there is one) that look at
        picture [B, P, E].
        """
        place = self.embeddings.position_embeddings.weight[: tokens.shape[1]]
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(tokens) + place)
        for layer in self.encoder.layer:
            x = layer(x, mask, picture)
        return x


class Blip(nn.Module):
    """The trunk. It holds no dropout: the rewards that stand on it are only ever evaluated."""

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        self.visual_encoder = VisionEncoder(sizes)
        self.text_encoder = TextEncoder(sizes)
        # in the files; scoring does not use the two
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.projection)
        self.text_proj = nn.Linear(sizes.text_width, sizes.projection)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Feature [B, D] of each prompt's class token that has looked at its picture."""
        return self.text_encoder(tokens, mask, self.visual_encoder(pixels))[:, 0]
