"""Encoders of prompts and of images for conditioning: CLIP for texts, DINOv2 for images.

Weights are read from this machine; nothing is downloaded. CLIP needs the package transformers.

Shapes: N number of prompts or images, L number of tokens, E channels of a token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.dino import read_dino
from eg3d_rlhf.models.image_preprocessing import on_black, read_cut_out
from eg3d_rlhf.models.weights import require_extra
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditioning
from eg3d_rlhf.tuning.flow.families.folder import embedding_progress

TEXT_TOKENS = 77  # length of CLIP's text input


def pretrained(class_name: str, name: str):
    """Load a model or a tokenizer of the package transformers from the local cache.

    Args:
        class_name: name of a class of transformers, such as "CLIPTextModel".
        name: name of the model on huggingface.co, or a local folder.
    Raises: ValueError if its files are not on this machine.
    """
    require_extra(name, "transformers")
    import transformers

    try:
        # local_files_only: transformers would otherwise download what is missing.
        return getattr(transformers, class_name).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        # At most 100 characters of the first line, because messages of transformers are long.
        error_summary = (str(error).splitlines() or [""])[0][:100]
        raise ValueError(
            f"{name}: the weights are not on this machine ({error_summary}). Download them with `hf download"
            f" {name}` from https://huggingface.co/{name}."
        ) from None


class TextEncoder:
    """CLIP text encoder, as TRELLIS uses it.

    Its tokens are the last hidden states. Texts are padded or cut to 77 tokens.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.tokenizer = pretrained("AutoTokenizer", name)
        self.model = pretrained("CLIPTextModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts as tokens [N, 77, E] float32 on the CPU."""
        # No attention mask is passed, as in TRELLIS: the padding is encoded, too.
        token_ids = self.tokenizer(
            list(texts), max_length=TEXT_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.model(input_ids=token_ids.to(self.model.device)).last_hidden_state.float().cpu()

    def embed(self, texts: Sequence[str]) -> Conditioning:
        """Embed texts, and the empty text for guidance. The name of an embedding is its text."""
        # dict.fromkeys removes duplicates and keeps the order. NULL is the empty text.
        unique_texts = list(dict.fromkeys([*texts, NULL]))
        return Conditioning(
            tokens={name: self([name])[0] for name in embedding_progress(unique_texts, "text")},
            encoder=self.name,
        )


class ImageEncoder:
    """DINOv2 image encoder, as TRELLIS uses it.

    The tokens of an image are 1 class token, 4 register tokens and 37 x 37 patch tokens, taken before the
    last layer norm of the network.
    """

    def __init__(self, name: str = "dinov2_vitl14_reg", device: str | torch.device = "cpu"):
        self.name = name
        self.model = read_dino(name, device)
        self.size = self.model.config.image_size  # pixels per side

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as tokens [N, L, E] float32, before the last norm."""
        return self.model(images.to(self.model.layernorm.weight.device), normed=False)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as maps of patch tokens, [N, E, 37, 37]."""
        config = self.model.config
        patches_per_side = config.image_size // config.patch_size
        return (
            # Without class token and registers: [N, 37^2, E] -> [N, E, 37, 37]
            self.tokens(images)[:, 1 + config.num_register_tokens :]
            .transpose(1, 2)
            .unflatten(2, (patches_per_side, patches_per_side))
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as conditioning tokens [N, L, E] on the CPU.

        A layer norm without learnt parameters replaces the last norm of the network, as in TRELLIS.
        """
        tokens = self.tokens(images)
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()

    def embed(self, images: Mapping[str, Path]) -> Conditioning:
        """Embed images with transparent backgrounds. Embeddings have the names of the images."""
        # A generator: only one image is in memory at a time.
        prepared_images = (
            (name, read_cut_out(path, lambda image: on_black(image, self.size)))
            for name, path in embedding_progress(images.items(), "image")
        )
        tokens = {name: self(image[None])[0] for name, image in prepared_images}
        return Conditioning(tokens=tokens, encoder=self.name, zero_null=True)
