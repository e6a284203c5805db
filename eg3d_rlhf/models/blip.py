"""BLIP trunk of ImageReward and Reward3D (arXiv 2201.12086), built from transformers' networks.

An image goes through a ViT. A prompt goes through a BERT in which every layer also cross-attends to the image
features. The text encoder's parameters have the published names (params/Reward3D_*.tsv). Those of the image
encoder are renamed to transformers' names. transformers is imported only when a trunk is built (extra
`vision`).

Shape letters: B images, T tokens of a prompt, D text width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eg3d_rlhf.models.weights import State, below, count, require_extra, shape_of, to_transformers

HEAD = 64  # channels of a head, in both encoders
VISION = "blip.visual_encoder."
VISION_NAMES = (  # published -> transformers, in turn
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)


def from_published(state: Mapping[str, torch.Tensor]) -> State:
    """Return a published state dict with the entries of its image encoder renamed to transformers' names."""
    vision = to_transformers(below(state, VISION), VISION_NAMES)
    # The text encoder is transformers' own BERT already, so its names stay.
    others = {name: tensor for name, tensor in state.items() if not name.startswith(VISION)}
    return others | {VISION + name: tensor for name, tensor in vision.items()}


@dataclass(frozen=True, kw_only=True)
class BlipSizes:
    """Sizes of a trunk. The defaults are those of BLIP-large."""

    image: int = 224  # pixels per side
    patch: int = 16  # pixels per side
    vision_width: int = 1024  # channels of an image token
    vision_layers: int = 24
    text_width: int = 768
    text_layers: int = 12
    text_hidden: int = 3072  # channels inside the feed-forward layers
    vocabulary: int = 30524  # BERT's 30522 words and two special tokens
    positions: int = 512  # largest number of tokens of a prompt
    projection: int = 256  # of a contrastive head that scoring does not use

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], who: str) -> "BlipSizes":
        """Derive the sizes from the shapes in a published state dict.

        Args: who: name that error messages begin with.
        Raises: ValueError for the file of another network.
        """
        text = "blip.text_encoder."
        # A convolution with the patch as kernel: [width, 3, patch, patch]
        width, _, patch, _ = shape_of(state, f"{VISION}patch_embed.proj.weight", who, 4)
        # [1, tokens, width]
        _, tokens, _ = shape_of(state, f"{VISION}pos_embed", who, 3)
        vocabulary, text_width = shape_of(state, f"{text}embeddings.word_embeddings.weight", who, 2)
        return cls(
            # One position is the class token's; the others form a square grid of patches.
            image=round((tokens - 1) ** 0.5) * patch,
            patch=patch,
            vision_width=width,
            # One more than the largest number of a block
            vision_layers=count(state, f"{VISION}blocks."),
            text_width=text_width,
            text_layers=count(state, f"{text}encoder.layer."),
            vocabulary=vocabulary,
            text_hidden=shape_of(state, f"{text}encoder.layer.0.intermediate.dense.weight", who, 2)[0],
            positions=shape_of(state, f"{text}embeddings.position_embeddings.weight", who, 2)[0],
            projection=shape_of(state, "blip.text_proj.weight", who, 2)[0],
        )


class Blip(nn.Module):
    """Image encoder and text encoder. There is no dropout, because rewards only evaluate this network."""

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        require_extra("--reward", "transformers")
        from transformers import BlipTextConfig, BlipTextModel, ViTConfig, ViTModel

        # transformers' BlipVisionModel computes the same, but without fused attention.
        vision = ViTConfig(
            hidden_size=sizes.vision_width,
            # The published file's ViT has this usual ratio; it is not among the sizes.
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=max(sizes.vision_width // HEAD, 1),
            image_size=sizes.image,
            patch_size=sizes.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=sizes.text_hidden,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=max(sizes.text_width // HEAD, 1),
            max_position_embeddings=sizes.positions,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
        )
        self.visual_encoder = ViTModel(vision, add_pooling_layer=False)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        # Scoring does not use these two heads. They exist so that the files load strictly.
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.projection)
        self.text_proj = nn.Linear(sizes.text_width, sizes.projection)

    @property
    def side(self) -> int:
        """Number of pixels per side of the images."""
        return self.visual_encoder.config.image_size

    def seen(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised images [B, 3, side, side] as features [B, patches + 1, width], the class token
        first.

        Differentiable in: pixels.
        """
        return self.visual_encoder(pixel_values=pixels).last_hidden_state

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the text feature [B, D] of each prompt's class token, which has attended to the prompt's
        image.

        Args:
            pixels: normalised images [B, 3, side, side].
            tokens: token ids [B, T].
            mask: [B, T] bool, True for tokens of the prompt and False for padding.
        """
        # Every layer of BERT cross-attends to the features of the prompt's image.
        text = self.text_encoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=self.seen(pixels)
        )
        # The class token is the first one. [B, T, D] -> [B, D]
        return text.last_hidden_state[:, 0]
