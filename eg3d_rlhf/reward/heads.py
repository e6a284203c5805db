"""Softplus MLPs on feature vectors: the trunk and the three preference heads of the reward network.

Shape letters: N samples, M entries of a vector.
"""

from collections.abc import Sequence

import torch
from torch import nn


class MLP(nn.Module):
    """Linear layers with softplus between hidden layers and one residual connection, exactly as published checkpoints use it.

        x = input_layer(v); r = x                          no activation here
        x = hidden_layers[j](x) for all j but the last
        x = x + r                                          with two hidden sizes the loop is empty: x = 2 * input_layer(v)
        out = output_layer(hidden_layers[-1](x))           no activation on the output

    Args:
        size_in, size_out: lengths of input and output vectors.
        hidden: hidden sizes, at least two; the residual needs all but the last to be equal.

    Deviates: nothing; the doubling with two hidden sizes is kept because the published weights were trained with it.
    """

    def __init__(self, size_in: int, hidden: Sequence[int], size_out: int):
        super().__init__()
        hidden = list(hidden)
        if len(hidden) < 2 or len(set(hidden[:-1])) > 1:
            raise ValueError(f"MLP(hidden): expected two or more sizes, equal but for the last, got {hidden}. Change the head's sizes.")
        self.input_layer = nn.Linear(size_in, hidden[0])
        pairs = zip(hidden[:-1], hidden[1:], strict=True)
        self.hidden_layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Softplus(), nn.Identity()) for a, b in pairs)
        self.output_layer = nn.Linear(hidden[-1], size_out)

    def forward(self, v: torch.Tensor) -> torch.Tensor:  # [N, M_in] -> [N, M_out]
        x = residual = self.input_layer(v)
        for layer in self.hidden_layers[:-1]:
            x = layer(x)
        return self.output_layer(self.hidden_layers[-1](x + residual))
