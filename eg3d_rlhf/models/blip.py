"""BLIP (Li et al. 2022, arXiv 2201.12086), the trunk of the rewards ImageReward and Reward3D.

The networks are those of the library transformers. An image goes through a vision transformer (ViT). A prompt
goes through a BERT in which every layer also attends to the image features. The parameters of the text
encoder have the published names. The published parameters of the image encoder are renamed to transformers'
names. The library is imported only when a trunk is built (extra `vision`).

Shapes: B images, T tokens of a prompt, D channels of a text token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from eg3d_rlhf.models.weights import State, count, entries_below, require_extra, shape_of, to_transformers

HEAD = 64  # channels of an attention head, in both encoders
VISION = "blip.visual_encoder."  # prefix of the image encoder's published names
# Pairs of a regular expression of published names and its
# replacement in transformers' names, applied in order
VISION_NAMES = (
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


def from_published(state_dict: Mapping[str, torch.Tensor]) -> State:
    """Rename the entries of a published state dict to the names that `Blip` uses.

    Only entries of the image encoder change their names.
    """
    image_entries = to_transformers(entries_below(state_dict, VISION), VISION_NAMES)
    # The text encoder has transformers' names in the published file already.
    text_entries = {name: tensor for name, tensor in state_dict.items() if not name.startswith(VISION)}
    return text_entries | {VISION + name: tensor for name, tensor in image_entries.items()}


@dataclass(frozen=True, kw_only=True)
class BlipSizes:
    """Sizes of BLIP's image encoder and text encoder. The defaults are those of BLIP-large."""

    image: int = 224  # pixels per side of an image
    patch: int = 16  # pixels per side of a patch, which becomes one image token
    vision_width: int = 1024  # channels of an image token
    vision_layers: int = 24  # number of blocks of the image encoder
    text_width: int = 768  # channels of a text token, D
    text_layers: int = 12  # number of blocks of the text encoder
    text_hidden: int = 3072  # channels inside the feed-forward layers of the text encoder
    vocabulary: int = 30524  # number of tokens in the vocabulary: BERT's 30522 words and two special tokens
    positions: int = 512  # largest number of tokens of a prompt
    projection: int = 256  # channels of the contrastive heads, which scoring does not use

    @classmethod
    def from_state(cls, state_dict: Mapping[str, torch.Tensor], who: str) -> "BlipSizes":
        """Derive the sizes from the shapes of the tensors in a published state dict.

        Args:
            state_dict: state dict with published names.
            who: name that error messages begin with.

        Raises: ValueError if the state dict is that of another network.
        """
        text_prefix = "blip.text_encoder."  # prefix of the text encoder's names
        # The layer that embeds patches is a convolution whose kernel has the size of a patch:
        # [vision_width, 3, patch_side, patch_side].
        vision_width, _, patch_side, _ = shape_of(state_dict, f"{VISION}patch_embed.proj.weight", who, 4)
        # The embedding of positions has the shape [1, token_count, vision_width].
        _, token_count, _ = shape_of(state_dict, f"{VISION}pos_embed", who, 3)
        vocabulary_size, text_width = shape_of(
            state_dict, f"{text_prefix}embeddings.word_embeddings.weight", who, 2
        )
        return cls(
            # One position belongs to the class token. The others form a square grid of patches.
            image=round((token_count - 1) ** 0.5) * patch_side,
            patch=patch_side,
            vision_width=vision_width,
            # `count` adds 1 to the largest number of a block, since blocks are counted from 0.
            vision_layers=count(state_dict, f"{VISION}blocks."),
            text_width=text_width,
            text_layers=count(state_dict, f"{text_prefix}encoder.layer."),
            vocabulary=vocabulary_size,
            text_hidden=shape_of(
                state_dict, f"{text_prefix}encoder.layer.0.intermediate.dense.weight", who, 2
            )[0],
            positions=shape_of(state_dict, f"{text_prefix}embeddings.position_embeddings.weight", who, 2)[0],
            projection=shape_of(state_dict, "blip.text_proj.weight", who, 2)[0],
        )


class Blip(nn.Module):
    """Image encoder and text encoder of BLIP, with random weights.

    The networks are built for evaluation only. Raises ValueError if the library transformers is missing.
    """

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        require_extra("--reward", "transformers")
        from transformers import BlipTextConfig, BlipTextModel, ViTConfig, ViTModel

        # transformers' BlipVisionModel computes the same values as its ViTModel, but without fused attention.
        vision_config = ViTConfig(
            hidden_size=sizes.vision_width,
            # The usual ratio of a ViT, which the published file also has.
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=max(sizes.vision_width // HEAD, 1),
            image_size=sizes.image,
            patch_size=sizes.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text_config = BlipTextConfig(
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
        self.visual_encoder = ViTModel(vision_config, add_pooling_layer=False)
        self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        # Scoring does not use these two heads. They exist because published files contain their weights, and
        # weights are loaded strictly.
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.projection)
        self.text_proj = nn.Linear(sizes.text_width, sizes.projection)

    @property
    def side(self) -> int:
        """Return the number of pixels per side of the images that the encoder takes."""
        return self.visual_encoder.config.image_size

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode normalised images [B, 3, side, side] as image tokens [B, 1 + patches, width].

        The first token is the class token. Differentiable in: pixels.
        """
        return self.visual_encoder(pixel_values=pixels).last_hidden_state

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode pairs of an image and a prompt.

        Args:
            pixels: normalised images [B, 3, side, side].
            tokens: token ids [B, T] of the prompts.
            mask: mask [B, T] bool, True for tokens of the prompt and False for padding.

        Returns: one feature vector [B, D] per pair, the encoded class token of the prompt.
        """
        # Every layer of BERT cross-attends to the features of the prompt's image.
        text_outputs = self.text_encoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=self.encode_images(pixels)
        )
        # The class token is the first token. [B, T, D] -> [B, D]
        return text_outputs.last_hidden_state[:, 0]
