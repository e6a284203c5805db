"""Base class of reward networks, and the registry of the networks that read each kind of observation.

An observation is the input that a network reads from a shape, for example a depth map. A network consists of
a feature extractor, a trunk, and three output heads. A network for a new kind of observation is a subclass of
`RewardNetwork` with the methods `features` and `describe`, and `register` registers it.

Shapes: N samples, P pairs, M entries of an embedding; [N, ...] is a batch of observations, whose other axes
depend on the kind.
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

        r = input_layer(v)                                 without an activation
        x = r
        x = hidden_layers[j](x) for all j except the last
        x = x + r
        out = output_layer(hidden_layers[-1](x))           without an activation on the output

    With two hidden sizes there is only the last hidden layer, so x + r is 2 input_layer(v). This doubling is
    not removed, because the published weights were trained with it.

    Args:
        size_in: length of the input vectors.
        hidden: hidden sizes, at least two; all except the last must be equal, because of the residual
            connection.
        size_out: length of the output vectors.
    Raises: ValueError for hidden sizes that are not allowed.
    """

    def __init__(self, size_in: int, hidden: Sequence[int], size_out: int):
        super().__init__()
        hidden = list(hidden)
        if len(hidden) < 2 or len(set(hidden[:-1])) > 1:
            raise ValueError(
                "MLP: expected two or more hidden sizes, of which all except the last are equal, got"
                f" {hidden}. Change the sizes of the trunk or of the output heads in the architecture."
            )
        self.input_layer = nn.Linear(size_in, hidden[0])
        layer_sizes = zip(hidden[:-1], hidden[1:], strict=True)
        self.hidden_layers = nn.ModuleList(
            # The published network has a dropout layer, which is switched off, instead of the identity.
            nn.Sequential(nn.Linear(inputs, outputs), nn.Softplus(), nn.Identity())
            for inputs, outputs in layer_sizes
        )
        self.output_layer = nn.Linear(hidden[-1], size_out)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Compute the output [N, size_out] from vectors v [N, size_in]. Differentiable."""
        x = residual = self.input_layer(v)
        for layer in self.hidden_layers[:-1]:
            x = layer(x)
        # The last hidden layer follows the residual sum and has no residual of its own.
        return self.output_layer(self.hidden_layers[-1](x + residual))


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Output of a reward network for a batch, as the training losses read it."""

    embedding: torch.Tensor  # [N, M], output of the trunk
    scalar: torch.Tensor  # [N], the reward
    log_strength: torch.Tensor  # [N], logarithm of the Bradley-Terry strength
    reconstruction: torch.Tensor | None  # [N, ...], reconstructed input; None if it was not requested

    def rows(self, start: int, stop: int) -> "RewardOutput":
        """Return the output of the samples with the indices start to stop - 1."""
        sample_slice = slice(start, stop)
        reconstruction = self.reconstruction
        return RewardOutput(
            embedding=self.embedding[sample_slice],
            scalar=self.scalar[sample_slice],
            log_strength=self.log_strength[sample_slice],
            reconstruction=None if reconstruction is None else reconstruction[sample_slice],
        )


class RewardNetwork(nn.Module, ABC):
    """Reward network: trunk and three output heads on the features that a subclass computes.

    The output heads give the reward (`score`), the logarithm of the Bradley-Terry strength, and the logits of
    a pair.

    Args:
        feature_size: length of the feature vector that `features` computes.
        trunk: hidden sizes of the trunk.
        embedding: length of the trunk's output, the embedding.
        heads: hidden sizes of each of the three output heads.
    """

    def __init__(
        self,
        feature_size: int,
        trunk: Sequence[int] = (64, 64),
        embedding: int = 64,
        heads: Sequence[int] = (32, 16),
    ):
        super().__init__()
        # The names of the modules are those of published state dicts.
        self.MLP = MLP(feature_size, trunk, embedding)
        # Logarithm of the Bradley-Terry strength
        self.scalar_rwd_head_BT = MLP(embedding, heads, 1)
        # The reward
        self.scalar_rwd_head = MLP(embedding, heads, 1)
        # Two logits for the concatenated embeddings of a pair
        self.scalar_rwd_head_pairs = MLP(2 * embedding, heads, 2)

    @abstractmethod
    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the global feature vector, which the trunk reads: [N, ...] -> [N, feature_size]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the description of the network: JSON values from which it can be created again."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if the network cannot read observations of this shape (without the batch axis N).

        This base class accepts every shape.
        """

    def calibrate(self, take: Callable[[], torch.Tensor]) -> None:
        """Set statistics of the training data, with which the network standardises its input.

        This base class has no such statistics and does nothing.

        Args: take: function that returns the observations of all training samples, [N, ...].
        """

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the embedding, which all output heads read: [N, ...] -> [N, M]."""
        return self.MLP(self.features(observations))

    def score(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the reward: [N, ...] -> [N]. A higher reward is better.

        Differentiable in the observations and the parameters.
        """
        return self.score_embedding(self.embed(observations))

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Compute the reward from embeddings: [N, M] -> [N]."""
        return self.scalar_rwd_head(embedding).squeeze(1)

    def pair_logits(self, first_embeddings: torch.Tensor, second_embeddings: torch.Tensor) -> torch.Tensor:
        """Compute two logits for each pair of samples, [P, 2].

        Column 0 is the logit that the first sample is better, and column 1 the logit that the second sample
        is better. The logits depend on the order of the two samples.

        Args:
            first_embeddings: embeddings [P, M] of the first samples.
            second_embeddings: embeddings [P, M] of the second samples.
        """
        return self.scalar_rwd_head_pairs(torch.cat([first_embeddings, second_embeddings], dim=1))

    def pair_margin(self, first_embeddings: torch.Tensor, second_embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the logit [P] that the first sample of each pair is better than the second one.

        The logits of both presentation orders are averaged, so swapping the two samples negates the result.

        Args:
            first_embeddings: embeddings [P, M] of the first samples.
            second_embeddings: embeddings [P, M] of the second samples.
        """
        # The mean over both orders removes the bias of the pair head towards the first or the second input.
        logits = self.pair_logits(first_embeddings, second_embeddings)
        swapped_logits = self.pair_logits(second_embeddings, first_embeddings)
        return 0.5 * ((logits[:, 0] - logits[:, 1]) - (swapped_logits[:, 0] - swapped_logits[:, 1]))

    def reconstruct(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the features of observations, and reconstruct the observations.

        Returns: the features [N, feature_size], and the reconstruction [N, ...].
        Raises: ValueError if the network has no decoder.
        """
        raise ValueError(
            f"--set reconstruction: {type(self).__name__} has no decoder and cannot reconstruct its input."
            " Use --set reconstruction=0, or a preset with a U-Net."
        )

    def forward(self, observations: torch.Tensor, reconstruct: bool = False) -> RewardOutput:
        """Compute all values that the training losses read from observations [N, ...].

        Args:
            observations: input of the network.
            reconstruct: True to reconstruct the input as well.
        Raises: ValueError if `reconstruct` is True and the network has no decoder.
        """
        # Features and reconstruction share most of their computation, so one call returns both.
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

# Functions that create the networks, by kind of observation. The module of an observation also registers its
# networks. The networks of sigma slabs have a separate module, which is named here, since many modules read
# slabs without using a network.
READERS: Registry[Build] = Registry("network of an observation", {"sigma": "eg3d_rlhf.rewards.slab_network"})


def register(kind: str, build: Build, presets: Mapping[str, Preset]) -> None:
    """Register the networks that read a kind of observation.

    Args:
        kind: kind of the observation.
        build: function that creates an untrained network from its description.
        presets: presets of these networks by name, the default first; empty if they need no training.
    """
    READERS.add(kind, build)
    PRESETS.add(kind, presets)


def builder_of(kind: str) -> Build:
    """Return the function that creates the networks which read a kind of observation.

    Raises: ValueError for an unknown kind, and for a kind that no network reads.
    """
    # The look-up is needed for its effects: it imports the module of the kind, which registers its networks,
    # and raises ValueError for an unknown kind.
    observations.OBSERVATIONS[kind]
    return READERS[kind]
