"""What all reward networks share: a trunk and three preference heads on a feature vector; and which networks
read what.

A network that reads another observation is a subclass of `RewardNetwork` with `features` and `describe`, made
known by `register`.

Letters: N samples, P pairs, M entries of a vector; [N, ...] is what the network's observation gives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.presets import PRESETS, Preset


class MLP(nn.Module):
    """Linear layers with softplus between hidden layers and one residual connection, exactly as published
    checkpoints use it.

        x = input_layer(v); r = x                          no activation here
        x = hidden_layers[j](x) for all j but the last
        x = x + r                                          with two hidden sizes the loop is empty:
                                                           x = 2 * input_layer(v)
        out = output_layer(hidden_layers[-1](x))           no activation on the output

    Args:
        size_in, size_out: lengths of input and output vectors.
        hidden: hidden sizes, at least two; the residual needs all but the last to be equal.

    Deviates: nothing; the doubling with two hidden sizes is kept because the published weights were trained
    with it.
    """

    def __init__(self, size_in: int, hidden: Sequence[int], size_out: int):
        super().__init__()
        hidden = list(hidden)
        if len(hidden) < 2 or len(set(hidden[:-1])) > 1:
            raise ValueError(
                f"MLP(hidden): expected two or more sizes, equal but for the last, got {hidden}. Change the"
                " head's sizes."
            )
        self.input_layer = nn.Linear(size_in, hidden[0])
        pairs = zip(hidden[:-1], hidden[1:], strict=True)
        self.hidden_layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Softplus(), nn.Identity()) for a, b in pairs
        )
        self.output_layer = nn.Linear(hidden[-1], size_out)

    def forward(self, v: torch.Tensor) -> torch.Tensor:  # [N, M_in] -> [N, M_out]
        x = residual = self.input_layer(v)
        for layer in self.hidden_layers[:-1]:
            x = layer(x)
        return self.output_layer(self.hidden_layers[-1](x + residual))


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """All that the training losses read, for one batch."""

    embedding: torch.Tensor  # [N, M] the trunk's output
    scalar: torch.Tensor  # [N] the reward
    log_strength: torch.Tensor  # [N] logarithm of the Bradley-Terry strength
    reconstruction: torch.Tensor | None  # of the network's input, None when not asked for

    def rows(self, first: int, last: int) -> "RewardOutput":
        """That of samples first .. last - 1."""
        some = slice(first, last)
        read = self.reconstruction
        return RewardOutput(
            embedding=self.embedding[some],
            scalar=self.scalar[some],
            log_strength=self.log_strength[some],
            reconstruction=None if read is None else read[some],
        )


class RewardNetwork(nn.Module, ABC):
    """Trunk and heads on the features of a subclass; `score` is the reward used downstream.

    Args: feature_size: length of `features`; trunk: hidden sizes of the trunk; embedding: length of its
    output; heads: hidden sizes of each of the three heads.
    """

    def __init__(
        self,
        feature_size: int,
        trunk: Sequence[int] = (64, 64),
        embedding: int = 64,
        heads: Sequence[int] = (32, 16),
    ):
        super().__init__()
        self.MLP = MLP(feature_size, trunk, embedding)
        self.scalar_rwd_head_BT = MLP(embedding, heads, 1)
        self.scalar_rwd_head = MLP(embedding, heads, 1)
        self.scalar_rwd_head_pairs = MLP(2 * embedding, heads, 2)

    @abstractmethod
    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Global feature vector before the trunk: [N, ...] -> [N, feature_size]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain JSON values from which the network can be built again."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError where observations of this shape cannot be read."""

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Before training: set what depends on the training data; `take` gives all of them, [N, ...]."""

    def embed(self, observed: torch.Tensor) -> torch.Tensor:
        """Trunk output, which all heads read: [N, ...] -> [N, M]."""
        return self.MLP(self.features(observed))

    def score(self, observed: torch.Tensor) -> torch.Tensor:
        """The reward: [N, ...] -> [N], higher is better. Differentiable in the input and the parameters."""
        return self.score_embedding(self.embed(observed))

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """The reward of embeddings [N, M] -> [N]."""
        return self.scalar_rwd_head(embedding).squeeze(1)

    def pair_logits(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Pair head on embeddings [P, M] and [P, M] -> [P, 2]; index 0 says "the first is better". The order
        matters.
        """
        return self.scalar_rwd_head_pairs(torch.cat([first, second], dim=1))

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Order-free logit that `first` is better, [P]: half the difference of both orders' logits. Swapping
        the pair negates it.
        """
        forward = self.pair_logits(first, second)
        backward = self.pair_logits(second, first)
        return 0.5 * ((forward[:, 0] - forward[:, 1]) - (backward[:, 0] - backward[:, 1]))

    def reconstruct(self, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` and what is read, as a decoder makes it of them.

        Raises: ValueError where there is none.
        """
        raise ValueError(
            "reward network: expected a U-Net to reconstruct, got one that has no decoder. Use --set"
            " reconstruction=0."
        )

    def forward(self, observed: torch.Tensor, reconstruct: bool = False) -> RewardOutput:
        """Everything the training losses read: [N, ...] -> RewardOutput.

        Raises: ValueError where it cannot reconstruct.
        """
        features, reconstruction = (
            self.reconstruct(observed) if reconstruct else (self.features(observed), None)
        )
        embedding = self.MLP(features)
        return RewardOutput(
            embedding=embedding,
            scalar=self.score_embedding(embedding),
            log_strength=self.scalar_rwd_head_BT(embedding).squeeze(1),
            reconstruction=reconstruction,
        )


Build = Callable[[Mapping[str, Any]], RewardNetwork]  # a network from its description

# an observation's file registers its networks, too; the slab's class stands elsewhere, since much reads it
# that trains nothing
READERS: Registry[Build] = Registry("network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_network"})


def register(kind: str, build: Build, presets: Mapping[str, Preset]) -> None:
    """Make the networks known that read an observation, and their presets."""
    READERS.add(kind, build)
    PRESETS.add(kind, presets)


def builder_of(kind: str) -> Build:
    """Return what builds the networks that read a kind.

    Raises: ValueError for an unknown kind, and one that no network reads.
    """
    # imports its file; says which are known, where there is none of this name
    observations.OBSERVATIONS[kind]
    return READERS[kind]
