"""Image rewards that are the cosine similarity of an image and a prompt: the CLIP score and HPSv2.

CLIP (Radford et al. 2021) embeds images and texts as vectors of the same space. HPSv2 (Wu et al. 2023) is a
CLIP that was fine-tuned on human preferences. The CLIP score is read from a folder of the library
transformers, and HPSv2 from its published file. The network of HPSv2 is the ViT-H/14 of the library
open_clip. Its entries are renamed, so that transformers' CLIPModel can compute it.

Shapes: B images, h rows and w columns of pixels, D channels of the joint embedding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import Modality
from eg3d_rlhf.models.clip_inputs import Tokenize, clip_preprocess, clip_tokenizer, pad_preprocess
from eg3d_rlhf.models.ldm_names import to_transformers_clip
from eg3d_rlhf.models.weights import adopt, count, empty, freeze, from_folder, require_extra, shape_of

FLAG = "--reward"  # option that error messages begin with


def hpsv2_network(state_dict: Mapping[str, torch.Tensor], who: str) -> Any:
    """Build transformers' CLIPModel with the sizes of an open_clip state dict, without values (meta device).

    Args:
        state_dict: state dict with open_clip's names.
        who: name that error messages begin with.

    Raises: ValueError if the state dict is that of another network.
    """
    require_extra(FLAG, "transformers")
    from transformers import CLIPConfig, CLIPModel

    # Shapes: [vision_width, 3, patch_side, patch_side], [vocabulary_size, text_width] and, below,
    # [1 + number of patches, vision_width].
    vision_width, _, patch_side, _ = shape_of(state_dict, "visual.conv1.weight", who, 4)
    vocabulary_size, text_width = shape_of(state_dict, "token_embedding.weight", who, 2)
    vision_settings = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": count(state_dict, "visual.transformer.resblocks."),
        # No entry states the number of attention heads. ViT-H/14 has heads of 80 channels, smaller networks
        # of 64.
        "num_attention_heads": max(vision_width // (80 if vision_width % 80 == 0 else 64), 1),
        # One position belongs to the class token. The others form a square grid of patches.
        "image_size": round((shape_of(state_dict, "visual.positional_embedding", who, 2)[0] - 1) ** 0.5)
        * patch_side,
        "patch_size": patch_side,
        "hidden_act": "gelu",
    }
    text_settings = {
        "vocab_size": vocabulary_size,
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": count(state_dict, "transformer.resblocks."),
        "num_attention_heads": max(text_width // 64, 1),
        "hidden_act": "gelu",
        # The last two entries of CLIP's vocabulary are the start token and the end token.
        "bos_token_id": vocabulary_size - 2,
        "eos_token_id": vocabulary_size - 1,
    }
    # The projection is stored as [text_width, D].
    clip_config = CLIPConfig(
        text_config=text_settings,
        vision_config=vision_settings,
        projection_dim=shape_of(state_dict, "text_projection", who, 2)[1],
    )
    return empty(lambda: CLIPModel(clip_config))


class CosineReward:
    """Cosine similarity of image and prompt in the joint embedding space. Differentiable in the images.

    Args:
        network: CLIPModel of the library transformers.
        prepare: function that converts images of values 0..1 to the network's input of a given size in
            pixels.
        tokenize: function that converts prompts to token ids and masks.
        device: device that computes the scores.
    """

    modality: Modality = "image"
    views = 1
    differentiable = True

    def __init__(
        self,
        network: Any,
        prepare: Callable[[torch.Tensor, int], torch.Tensor],
        tokenize: Tokenize,
        device: str | torch.device = "cpu",
    ):
        self.network = freeze(network, device)
        self.prepare = prepare
        self.tokenize = tokenize
        self.device = torch.device(device)
        self._embedded: dict[str, torch.Tensor] = {}  # cache: prompt -> unit embedding [D]

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Compute the cosine similarities [B], -1..1, of images and prompts. They are not multiplied by 100.

        Args:
            pixels: images [B, 3, h, w] of values 0..1.
            prompts: prompts, one for each image.
        """
        for prompt in prompts:
            if prompt not in self._embedded:
                with torch.no_grad():
                    # One prompt at a time: the result then does not depend on which prompts share a batch.
                    # The mask, which `tokenize` returns second, is not needed.
                    tokens = self.tokenize([prompt])[0].to(self.device)
                    self._embedded[prompt] = F.normalize(
                        self.network.get_text_features(input_ids=tokens)[0], dim=-1
                    )
        text_embeddings = torch.stack([self._embedded[prompt] for prompt in prompts])
        network_inputs = self.prepare(
            pixels.to(self.device).float(), self.network.config.vision_config.image_size
        )
        image_embeddings = F.normalize(self.network.get_image_features(pixel_values=network_inputs), dim=-1)
        # Both embeddings have length 1, so their dot product is the cosine. [B, D] -> [B]
        return (image_embeddings * text_embeddings).sum(-1)


def load_hpsv2(
    path: Path, state_dict: Mapping[str, torch.Tensor], device: str | torch.device = "cpu"
) -> CosineReward:
    """Build the HPSv2 reward from the tensors of its published file HPS_v2*.pt.

    CLIP's tokenizer must lie in the folder tokenizer/ beside the file.

    Args:
        path: published file.
        state_dict: entry 'state_dict' of the file, the state dict of open_clip's ViT-H/14.
        device: device that computes the scores.

    Raises: ValueError if the library transformers or the tokenizer is missing, or if the state dict is that
        of another network.
    """
    who = f"{FLAG}: {path.name}"
    network = hpsv2_network(state_dict, who)
    adopt(network, to_transformers_clip(state_dict), who)
    # open_clip pads short prompts with the token id 0, whereas OpenAI's CLIP pads with the end token.
    tokenize = clip_tokenizer(
        path.parent / "tokenizer", FLAG, network.config.text_config.vocab_size, padding_token=0
    )
    return CosineReward(network, pad_preprocess, tokenize, device)


def load_clip_score(folder: Path, device: str | torch.device = "cpu") -> CosineReward:
    """Build the CLIP score from a folder with transformers' CLIPModel and its tokenizer.

    The score is the cosine, as the literature reports it. Matching images and prompts give 0.22 to 0.29.

    Args:
        folder: folder with the weights, config.json and the tokenizer's files.
        device: device that computes the scores.

    Raises: FileNotFoundError if a file of the network is missing; ValueError if a file cannot be used, or if
        the tokenizer or the library transformers is missing.
    """
    require_extra(FLAG, "transformers")
    from transformers import CLIPModel

    # Images are preprocessed as by OpenAI's CLIP. The default pad=None fills short prompts with the end
    # token, as OpenAI's tokenizer does.
    network = from_folder(CLIPModel, folder, FLAG)
    return CosineReward(
        network, clip_preprocess, clip_tokenizer(folder, FLAG, network.config.text_config.vocab_size), device
    )
