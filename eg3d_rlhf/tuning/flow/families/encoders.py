"""Conditions computed by CLIP, where transformers is, or by DINOv2; of weights that are on this machine.
Nothing is downloaded.

Shape letters: N conditions, L tokens, E their size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.dino import read_dino
from eg3d_rlhf.models.image_preprocessing import on_black, read_cut_out
from eg3d_rlhf.models.weights import require_extra
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditions
from eg3d_rlhf.tuning.flow.families.folder import embedding

TEXT_TOKENS = 77


def pretrained(kind: str, name: str):
    """Class and weights from the local cache."""
    require_extra(name, "transformers")
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0][:100]
        raise ValueError(
            f"{name}: expected its weights on this machine, got none ({first}). Fetch them: hf download"
            f" {name}, https://huggingface.co/{name}"
        ) from None


class TextEncoder:
    """CLIP's last hidden states of texts, padded to 77 tokens, with no attention mask."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.tokenizer = pretrained("AutoTokenizer", name)
        self.model = pretrained("CLIPTextModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, 77, E] float32 on the CPU."""
        ids = self.tokenizer(
            list(texts), max_length=TEXT_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state.float().cpu()

    def conditions(self, texts: Sequence[str]) -> Conditions:
        """Of texts by themselves, and of the empty one."""
        names = list(dict.fromkeys([*texts, NULL]))
        return Conditions(
            tokens={name: self([name])[0] for name in embedding(names, "text")}, encoder=self.name
        )


class ImageEncoder:
    """DINOv2's tokens of images before its last norm: 1 for the whole, 4 registers, 37 x 37 patches."""

    def __init__(self, name: str = "dinov2_vitl14_reg", device: str | torch.device = "cpu"):
        self.name = name
        self.model = read_dino(name, device)
        self.size = self.model.config.image_size  # pixels per side

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, 518, 518] of 0..1 -> [N, L, E] float32, before the last norm."""
        return self.model(images.to(self.model.layernorm.weight.device), normed=False)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """[N, E, 37, 37] of the patches alone."""
        config = self.model.config
        grid = config.image_size // config.patch_size
        return (
            self.tokens(images)[:, 1 + config.num_register_tokens :]
            .transpose(1, 2)
            .unflatten(2, (grid, grid))
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Condition tokens [N, L, E] on the CPU: normalised without parameters."""
        tokens = self.tokens(images)
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()

    def conditions(self, images: Mapping[str, Path]) -> Conditions:
        """Of images with transparent backgrounds by name."""
        seen = (
            (name, read_cut_out(path, lambda image: on_black(image, self.size)))
            for name, path in embedding(images.items(), "picture")
        )
        tokens = {name: self(picture[None])[0] for name, picture in seen}
        return Conditions(tokens=tokens, encoder=self.name, zero_null=True)
