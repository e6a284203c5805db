"""What the families' opened folders share: embeddings by stage, normalised latents, and networks that are loaded when they are needed."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from eg3d_rlhf.tuning.flow.conditions import Conditions


class OpenedFolder:
    """Of networks in a published layout.

    Args: conditions: None where nothing is sampled; parts: reads a network, such as a decoder, by its name.
    """

    def __init__(self, conditions: Conditions | None, parts: Callable[[str], nn.Module], device: str | torch.device):
        self.tokens, self.device = conditions, device
        self._parts, self._loaded = parts, dict[str, nn.Module]()

    def part(self, name: str) -> nn.Module:
        """A decoder or encoder."""
        if name not in self._loaded:
            self._loaded[name] = self._parts(name).eval().requires_grad_(False).to(self.device)
        return self._loaded[name]

    def embedded(self, of: Sequence[str] | int, name: str | None = None) -> torch.Tensor:
        """Embeddings [N, L, E] of names, or so many empty ones. Args: name: of the tensor, where a condition has several.

        Raises: ValueError without embeddings, or for names without one.
        """
        if self.tokens is None:
            raise ValueError("conditions: expected embeddings, got none. Open the pipeline with some.")
        found = self.tokens.null(of) if isinstance(of, int) else self.tokens.of(of)
        tensor = found if name is None else found[name]  # type: ignore[index]  # the form was looked at when the folder was opened
        assert isinstance(tensor, torch.Tensor)
        return tensor.to(self.device)


def normalised(feats: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Latents [v, C] as decoders read them -> as flows see them."""
    return (feats - feats.new_tensor(mean)) / feats.new_tensor(std)


def unnormalised(feats: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Inverse of `normalised`."""
    return feats * feats.new_tensor(std) + feats.new_tensor(mean)
