"""Network of a linear reward: a linear function of principal components of observations of any kind.

`eg3d_rlhf.rewards.linear` fits it to labels and describes the model.

Shapes: N samples, D entries of an observation, K components, P pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from eg3d_rlhf.rewards.networks import RewardNetwork

LINEAR = "linear"  # value of the entry "network" in the description of such a network


class LinearReward(RewardNetwork):
    """Linear function of the principal components of observations of any kind.

    Args:
        shape: shape of one sample's observation.
        components: number K of components.
    """

    mean: torch.Tensor  # mean observation m, [D]
    components: torch.Tensor  # principal components C, unit vectors, [K, D]
    scale: torch.Tensor  # standard deviation s along the first component, a scalar
    weights: torch.Tensor  # weights b of the features, [K]
    covariance: torch.Tensor  # covariance of b, [K, K]

    def __init__(self, shape: Sequence[int], components: int):
        # RewardNetwork.__init__ is skipped, because it would create a trunk and output heads.
        nn.Module.__init__(self)
        self.shape = tuple(int(size) for size in shape)
        # D, the number of entries of one flattened observation
        entry_count = int(np.prod(self.shape))
        # Buffers are saved in the state dict and move with the device, but are no parameters.
        self.register_buffer("mean", torch.zeros(entry_count))
        self.register_buffer("components", torch.zeros(components, entry_count))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("weights", torch.zeros(components))
        self.register_buffer("covariance", torch.zeros(components, components))

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, from which `build` creates it again."""
        return {"network": LINEAR, "shape": list(self.shape), "components": len(self.weights)}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if the network cannot read observations of this shape."""
        if tuple(shape) != self.shape:
            raise ValueError(
                f"linear reward: expected observations of the shape {self.shape}, got {tuple(shape)}. Use the"
                " observation that the reward was fitted on."
            )

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the features: [N, ...] -> [N, K]. Differentiable in the observations."""
        # [N, D] @ [D, K] -> [N, K]
        return (observations.flatten(1) - self.mean) @ self.components.T / self.scale

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the features: [N, ...] -> [N, K]."""
        return self.features(observations)

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Compute the reward from features: [N, K] -> [N]."""
        # No bias: only differences of scores have a meaning in a Bradley-Terry model.
        return embedding @ self.weights

    def score_variance(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the posterior variance [N] of the reward of each observation."""
        features = self.features(observations)
        # The quadratic form f^T S f of each row, without the [N, N] matrix of all products.
        return ((features @ self.covariance) * features).sum(dim=1)

    def pair_margin(self, first_embeddings: torch.Tensor, second_embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the logit [P] that the first sample of each pair is better, from features [P, K]."""
        # The reward is linear, so the margin is the reward of the difference.
        return self.score_embedding(first_embeddings - second_embeddings)

    def pair_variance(self, first_embeddings: torch.Tensor, second_embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the posterior variance [P] of the logit of each pair, from features [P, K]."""
        # The variance of a difference is not the sum of both variances: the errors of similar samples cancel.
        differences = first_embeddings - second_embeddings
        return ((differences @ self.covariance) * differences).sum(dim=1)


def build(description: Mapping[str, Any]) -> LinearReward:
    """Create a linear reward with weights 0 from its description.

    Raises: ValueError if the description has unknown or missing entries.
    """
    try:
        return LinearReward(
            **{name: json_value for name, json_value in description.items() if name != "network"}
        )
    except TypeError as error:
        raise ValueError(
            f"linear reward: the reward's file has unknown or missing fields: {error}. If a later version of"
            " the package wrote the file, use that version to open it."
        ) from error
