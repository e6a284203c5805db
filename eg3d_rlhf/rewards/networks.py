"""Base class of reward networks, with a trunk and three heads, and the networks by kind.

A network that reads another observation is a subclass of `RewardNetwork` with `features` and `describe`,
which is registered by `register`.

Letters: N samples, P pairs, M entries of a vector; [N, ...] is the shape of the network's observation.
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
    """Linear layers with softplus and one residual connection, exactly as published checkpoints use them.

        x = input_layer(v); r = x                          no activation here
        x = hidden_layers[j](x) for all j but the last
        x = x + r                                          with two hidden sizes the loop is empty:
                                                           x = 2 * input_layer(v)
        out = output_layer(hidden_layers[-1](x))           no activation on the output

    Args:
        size_in, size_out: lengths of input and output vectors.
        hidden: hidden sizes, at least two; all but the last must be equal, because of the residual
        connection.

    Deviates: nothing. The doubling with two hidden sizes is kept, because the published weights were trained
    with it.
    """

    def __init__(self, size_in: int, hidden: Sequence[int], size_out: int):
        super().__init__()
        hidden = list(hidden)
        if len(hidden) < 2 or len(set(hidden[:-1])) > 1:
            raise ValueError(
                f"MLP(hidden): expected two or more sizes that are equal except for the last, got {hidden}."
                " Change the sizes of the trunk or the head."
            )
        self.input_layer = nn.Linear(size_in, hidden[0])
        pairs = zip(hidden[:-1], hidden[1:], strict=True)
        self.hidden_layers = nn.ModuleList(
            # The identity stands where the published network has its dropout, which is switched off.
            nn.Sequential(nn.Linear(a, b), nn.Softplus(), nn.Identity())
            for a, b in pairs
        )
        self.output_layer = nn.Linear(hidden[-1], size_out)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Return [N, size_out] of vectors [N, size_in]. Differentiable."""
        x = residual = self.input_layer(v)
        for layer in self.hidden_layers[:-1]:
            x = layer(x)
        # The last hidden layer follows the residual sum and has no residual of its own.
        return self.output_layer(self.hidden_layers[-1](x + residual))


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Values of a batch that the training losses read."""

    embedding: torch.Tensor  # [N, M], output of the trunk
    scalar: torch.Tensor  # [N], the reward
    log_strength: torch.Tensor  # [N], logarithm of the Bradley-Terry strength
    reconstruction: torch.Tensor | None  # of the network's input; None if it was not requested

    def rows(self, first: int, last: int) -> "RewardOutput":
        """Return the values of samples first .. last - 1."""
        rows = slice(first, last)
        reconstruction = self.reconstruction
        return RewardOutput(
            embedding=self.embedding[rows],
            scalar=self.scalar[rows],
            log_strength=self.log_strength[rows],
            reconstruction=None if reconstruction is None else reconstruction[rows],
        )


class RewardNetwork(nn.Module, ABC):
    """Trunk and heads on the features of a subclass. `score` is the reward that other modules use.

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
        # Names are those of published state dicts.
        self.MLP = MLP(feature_size, trunk, embedding)
        # Logarithm of the Bradley-Terry strength
        self.scalar_rwd_head_BT = MLP(embedding, heads, 1)
        # The reward
        self.scalar_rwd_head = MLP(embedding, heads, 1)
        # Two logits of a pair, whose embeddings are concatenated
        self.scalar_rwd_head_pairs = MLP(2 * embedding, heads, 2)

    @abstractmethod
    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the global feature vector before the trunk: [N, ...] -> [N, feature_size]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return JSON values from which the network can be created again."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if observations of this shape cannot be read."""

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set statistics of the training data; `take` returns all observations, [N, ...]."""

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the trunk's output, which all heads read: [N, ...] -> [N, M]."""
        return self.MLP(self.features(observations))

    def score(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the reward: [N, ...] -> [N], higher is better.

        Differentiable in the input and the parameters.
        """
        return self.score_embedding(self.embed(observations))

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the reward of embeddings [N, M] -> [N]."""
        return self.scalar_rwd_head(embedding).squeeze(1)

    def pair_logits(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Apply the pair head to embeddings [P, M] and [P, M] -> [P, 2].

        Logit 0 means that the first is better, and logit 1 that the second is. The result depends on the
        order.
        """
        return self.scalar_rwd_head_pairs(torch.cat([first, second], dim=1))

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Compute a logit [P] that `first` is better, independent of the order of presentation.

        It is half the difference of the logits of both orders, so swapping the pair negates it.
        """
        # Averaging over both orders removes the head's preference for a place.
        forward = self.pair_logits(first, second)
        backward = self.pair_logits(second, first)
        return 0.5 * ((forward[:, 0] - forward[:, 1]) - (backward[:, 0] - backward[:, 1]))

    def reconstruct(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `features`, and the input as a decoder reconstructs it.

        Raises: ValueError if the network has no decoder.
        """
        raise ValueError(
            "reward network: only networks with a decoder (the U-Net of a slab) can reconstruct their"
            " input. Use --set reconstruction=0."
        )

    def forward(self, observations: torch.Tensor, reconstruct: bool = False) -> RewardOutput:
        """Compute all values that the training losses read: [N, ...] -> RewardOutput.

        Raises: ValueError if `reconstruct` is true and the network cannot reconstruct.
        """
        # A decoder shares the encoder's pass, so both come from one call.
        features, reconstruction = (
            self.reconstruct(observations) if reconstruct else (self.features(observations), None)
        )
        embedding = self.MLP(features)
        return RewardOutput(
            embedding=embedding,
            scalar=self.score_embedding(embedding),
            log_strength=self.scalar_rwd_head_BT(embedding).squeeze(1),
            reconstruction=reconstruction,
        )


Build = Callable[[Mapping[str, Any]], RewardNetwork]  # creates a network from its description

# The module of an observation also registers its networks. Those of the slab are in a module of their own,
# since many modules read slabs without using a network.
READERS: Registry[Build] = Registry("network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_network"})


def register(kind: str, build: Build, presets: Mapping[str, Preset]) -> None:
    """Register the networks that read a kind of observation, and their presets."""
    READERS.add(kind, build)
    PRESETS.add(kind, presets)


def builder_of(kind: str) -> Build:
    """Return the function that creates the networks that read a kind of observation.

    Raises: ValueError for an unknown kind, and for a kind that no network reads.
    """
    # The look-up imports the kind's module, which registers its networks, and raises for an unknown kind.
    observations.OBSERVATIONS[kind]
    return READERS[kind]
