"""Scores that are cosines of a picture's and a prompt's embedding: CLIP score from a transformers folder, HPSv2 from its published file.

HPSv2's network is open_clip's ViT-H/14, written here under the published names (params/hpsv2_*.tsv), so that open_clip is not needed.

Shape letters: B pictures, P patches + 1, T tokens, E width of a tower, D of the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Modality
from eg3d_rlhf.models.attention import Mlp
from eg3d_rlhf.models.clip_inputs import CLIP_TOKENS, Tokenize, clip_preprocess, clip_tokenizer, pad_preprocess
from eg3d_rlhf.models.weights import adopt, count, empty, from_folder, frozen, read, require_extra, shape_of

FLAG = "--reward"


@dataclass(frozen=True, kw_only=True)
class ClipSizes:
    """Sizes of both towers; the defaults are ViT-H/14."""

    image: int = 224  # pixels per side
    patch: int = 14  # pixels per side
    vision_width: int = 1280
    vision_layers: int = 32
    text_width: int = 1024
    text_layers: int = 24
    vocabulary: int = 49408
    embedding: int = 1024

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], who: str) -> "ClipSizes":
        """The sizes that a file's shapes tell. Raises: ValueError for another network's file."""
        width, _, patch, _ = shape_of(state, "visual.conv1.weight", who, 4)
        vocabulary, text_width = shape_of(state, "token_embedding.weight", who, 2)
        return cls(
            image=round((shape_of(state, "visual.positional_embedding", who, 2)[0] - 1) ** 0.5) * patch, patch=patch, vision_width=width,
            vision_layers=count(state, "visual.transformer.resblocks."), text_width=text_width, vocabulary=vocabulary,
            text_layers=count(state, "transformer.resblocks."), embedding=shape_of(state, "text_projection", who, 2)[1],
        )


class ClipBlock(nn.Module):
    """One pre-norm layer; exact GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width, 4 * width, ("c_fc", "c_proj"))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, E] -> [B, T, E]; mask [T, T] is added to the attention's logits."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Layers in turn."""

    def __init__(self, width: int, layers: int, head_width: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, max(width // head_width, 1)) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, E] -> [B, T, E]."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTower(nn.Module):
    """Pictures to embeddings."""

    def __init__(self, sizes: ClipSizes):
        super().__init__()
        width = sizes.vision_width
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((sizes.image // sizes.patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, sizes.embedding))
        self.conv1 = nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, 80 if width % 80 == 0 else 64)  # ViT-H's heads have 80 numbers

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] normalised -> [B, D]."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """Both towers under open_clip's names."""

    def __init__(self, sizes: ClipSizes):
        super().__init__()
        width = sizes.text_width
        self.sizes = sizes
        self.positional_embedding = nn.Parameter(torch.zeros(CLIP_TOKENS, width))
        self.text_projection = nn.Parameter(torch.zeros(width, sizes.embedding))
        self.logit_scale = nn.Parameter(torch.zeros(()))  # in the file; a cosine does not use it
        self.visual = VisionTower(sizes)
        self.transformer = Transformer(width, sizes.text_layers, 64)
        self.token_embedding, self.ln_final = nn.Embedding(sizes.vocabulary, width), nn.LayerNorm(width)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, D] of tokens [B, 77]: the feature at the end mark, the largest number. A token sees those before it."""
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf, device=tokens.device).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(1)] @ self.text_projection


class CosineReward:
    """Cosine of picture and prompt. Differentiable in the pictures.

    Args:
        pictures, texts: networks' methods: normalised pictures [B, 3, S, S] -> [B, D]; tokens [B, 77] -> [B, D].
        prepare: pictures in 0..1 -> what the network sees.
    """

    modality: Modality = "image"
    views = 1
    differentiable = True

    def __init__(self, pictures: Any, texts: Any, prepare: Any, tokenize: Tokenize, device: str | torch.device = "cpu"):
        self.pictures, self.texts, self.prepare, self.tokenize, self.device = pictures, texts, prepare, tokenize, torch.device(device)
        self._embedded: dict[str, torch.Tensor] = {}  # by prompt

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosines [B] (not times 100) of pictures [B, 3, h, w] in 0..1, a prompt each."""
        for prompt in prompts:
            if prompt not in self._embedded:
                with torch.no_grad():
                    self._embedded[prompt] = F.normalize(self.texts(self.tokenize([prompt])[0].to(self.device))[0], dim=-1)
        texts = torch.stack([self._embedded[prompt] for prompt in prompts])
        return (F.normalize(self.pictures(self.prepare(pixels.to(self.device).float())), dim=-1) * texts).sum(-1)


def load_hpsv2(path: Path, state: Mapping[str, torch.Tensor] | None = None, device: str | torch.device = "cpu") -> CosineReward:
    """HPS_v2*.pt ({"state_dict": open_clip's ViT-H/14}), with CLIP's tokenizer in the folder tokenizer/ beside it.

    Args: state: the file's tensors, where they have been read.
    Raises: FileNotFoundError, ValueError.
    """
    who = f"{FLAG}: {path.name}"
    state = read(path, FLAG) if state is None else state
    sizes = ClipSizes.of(state, who)
    network = frozen(adopt(empty(lambda: Clip(sizes)), state, who), device)
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, sizes.vocabulary, pad=0)
    return CosineReward(network.visual, network.encode_text, lambda x: pad_preprocess(x, sizes.image), tokenize, device)


def load_clip_score(folder: Path, device: str | torch.device = "cpu") -> CosineReward:
    """CLIP score from a folder of transformers' CLIPModel with its tokenizer: the cosine, as the literature reports it (.22-.29).

    Raises: FileNotFoundError, ValueError.
    """
    require_extra(FLAG, "transformers")
    from transformers import CLIPModel

    model = from_folder(CLIPModel, folder, FLAG).to(device)
    size, end = model.config.vision_config.image_size, model.config.text_config.vocab_size
    tokenize = clip_tokenizer(folder, FLAG, end)

    def pictures(pixels: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels)

    def texts(tokens: torch.Tensor) -> torch.Tensor:
        return model.get_text_features(input_ids=tokens)

    return CosineReward(pictures, texts, lambda x: clip_preprocess(x, size), tokenize, device)
