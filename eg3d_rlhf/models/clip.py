"""Scores that are cosines of a picture's and a prompt's embedding: CLIP score from a transformers folder,
HPSv2 from its published file.

HPSv2's network is open_clip's ViT-H/14. It is run by transformers' CLIPModel, under whose names its entries
are put.
Shape letters: B pictures, D of the embedding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.interfaces import Modality
from eg3d_rlhf.models.clip_inputs import Tokenize, clip_preprocess, clip_tokenizer, pad_preprocess
from eg3d_rlhf.models.ldm_names import to_transformers_clip
from eg3d_rlhf.models.weights import adopt, count, empty, from_folder, frozen, require_extra, shape_of

FLAG = "--reward"


def hpsv2_network(state: Mapping[str, torch.Tensor], who: str) -> Any:
    """transformers' CLIPModel of the sizes that an open_clip file's shapes tell, on the meta device.

    Raises: ValueError.
    """
    require_extra(FLAG, "transformers")
    from transformers import CLIPConfig, CLIPModel

    width, _, patch, _ = shape_of(state, "visual.conv1.weight", who, 4)
    vocabulary, text_width = shape_of(state, "token_embedding.weight", who, 2)
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": count(state, "visual.transformer.resblocks."),
        # ViT-H's heads have 80 numbers
        "num_attention_heads": max(width // (80 if width % 80 == 0 else 64), 1),
        "image_size": round((shape_of(state, "visual.positional_embedding", who, 2)[0] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": count(state, "transformer.resblocks."),
        "num_attention_heads": max(text_width // 64, 1),
        "hidden_act": "gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=shape_of(state, "text_projection", who, 2)[1]
    )
    return empty(lambda: CLIPModel(config))


class CosineReward:
    """Cosine of picture and prompt. Differentiable in the pictures.

    Args: network: transformers' CLIPModel; prepare: pictures in 0..1 and a size -> what the network sees.
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
        self.network = frozen(network, device)
        self.prepare = prepare
        self.tokenize = tokenize
        self.device = torch.device(device)
        self._embedded: dict[str, torch.Tensor] = {}  # by prompt

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosines [B] (not times 100) of pictures [B, 3, h, w] in 0..1, a prompt each."""
        for prompt in prompts:
            if prompt not in self._embedded:
                with torch.no_grad():
                    tokens = self.tokenize([prompt])[0].to(self.device)
                    self._embedded[prompt] = F.normalize(
                        self.network.get_text_features(input_ids=tokens)[0], dim=-1
                    )
        texts = torch.stack([self._embedded[prompt] for prompt in prompts])
        seen = self.prepare(pixels.to(self.device).float(), self.network.config.vision_config.image_size)
        return (F.normalize(self.network.get_image_features(pixel_values=seen), dim=-1) * texts).sum(-1)


def load_hpsv2(
    path: Path, state: Mapping[str, torch.Tensor], device: str | torch.device = "cpu"
) -> CosineReward:
    """HPS_v2*.pt ({"state_dict": open_clip's ViT-H/14}), with CLIP's tokenizer in the folder tokenizer/
    beside it.

    Args: state: the file's tensors. Raises: FileNotFoundError, ValueError.
    """
    who = f"{FLAG}: {path.name}"
    network = hpsv2_network(state, who)
    adopt(network, to_transformers_clip(state), who)
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, network.config.text_config.vocab_size, pad=0)
    return CosineReward(network, pad_preprocess, tokenize, device)


def load_clip_score(folder: Path, device: str | torch.device = "cpu") -> CosineReward:
    """CLIP score from a folder of transformers' CLIPModel with its tokenizer: the cosine, as the literature
    reports it (.22-.29).

    Raises: FileNotFoundError, ValueError.
    """
    require_extra(FLAG, "transformers")
    from transformers import CLIPModel

    network = from_folder(CLIPModel, folder, FLAG)
    return CosineReward(
        network, clip_preprocess, clip_tokenizer(folder, FLAG, network.config.text_config.vocab_size), device
    )
