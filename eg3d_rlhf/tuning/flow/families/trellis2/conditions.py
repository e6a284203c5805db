"""What TRELLIS.2 is told: DINOv3's tokens of a picture at two sizes. Weights are those on this machine; nothing is downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from eg3d_rlhf.models.dinov2 import MEAN, STD
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families.trellis.conditions import cut_out, pretrained

SIZES = ("512", "1024")  # names of a condition's tensors: edges in pixels of the picture that they are of
MARGIN = 1.0  # side of the square cut out, in sides of what the picture shows


class PictureEncoder:
    """DINOv3's tokens before its last norm, normalised without parameters: 1 for the whole, 4 registers, then the patches."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        """Args: name: of the weights, or a folder of them. Raises: ValueError where they are not on this machine."""
        self.name = name
        self.model = pretrained("AutoModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture [3, S, S] of 0..1 -> [L, E] float32 on the CPU."""
        mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) for v in (MEAN, STD))
        first = next(self.model.parameters())
        tokens = self.model(pixel_values=((picture - mean) / std)[None].to(first), output_hidden_states=True).hidden_states[-1][0].float()
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()


def embedded(pictures: Mapping[str, Path], encoder: PictureEncoder, sizes: Sequence[str] = SIZES) -> Conditions:
    """Pictures with transparent backgrounds by name, at every size."""
    found = {}
    for name, path in pictures.items():
        image = Image.open(path)
        found[name] = {size: encoder(cut_out(image, int(size), MARGIN)) for size in sizes}
    return Conditions(tokens=found, encoder=encoder.name, zero_null=True)
