"""Several reward networks as one: how the scores of members that were trained apart become a reward, and the
average of their weights.

A generator that is tuned on one reward finds that reward's mistakes. Members with other initialisations and
other draws of the labels make other mistakes, and an aggregate that distrusts what they disagree on leaves
less to find. Members that share their labels or their start share mistakes, too: ensembles lessen
over-optimisation, they do not end it (Eisenstein et al. 2023, arXiv 2312.09244).

Letters: N samples, E members, P pairs, M entries of an embedding; [N, ...] is what the networks' observation
gives.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.rewards.aggregates import AVERAGE, Aggregate, check_joining
from eg3d_rlhf.rewards.networks import RewardNetwork, builder_of

MEAN = Aggregate()


@dataclass(frozen=True)
class Standard:
    """What puts members on one scale: mean and standard deviation of each one's scores of the same samples,
    [E] each.

    Raises: ValueError for lengths that differ, and deviations that are not above 0.
    """

    offsets: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            len(self.offsets) != len(self.scales)
            or not all(map(math.isfinite, (*self.offsets, *self.scales)))
            or min(self.scales) <= 0
        ):
            raise ValueError(
                f"ensemble: expected an offset and a scale above 0 per member, got {list(self.offsets)} and"
                f" {list(self.scales)}. A member that scores all samples alike says nothing: leave it out."
            )

    @classmethod
    @torch.no_grad()
    def of(cls, members: Sequence[RewardNetwork], observed: Iterable[torch.Tensor]) -> "Standard":
        """Of each member's scores of batches [N, ...] of untuned samples, with the population's deviation."""
        batches = [torch.stack([member.score(part) for member in members]) for part in observed]
        scores = torch.cat(batches, dim=1).double()  # [E, N]
        return cls(tuple(scores.mean(dim=1).tolist()), tuple(scores.std(dim=1, correction=0).tolist()))


class RewardEnsemble(nn.Module):
    """One score from networks that were trained apart. Used like a RewardNetwork, for as many times the cost;
    not trained itself.

    With a `standard`, r = mean(scales) * aggregate((r_e - offset_e) / scale_e) + mean(offsets): members count
    alike, and the result keeps the members' unit, so that weights and clips of one reward suit it. Without,
    raw scores are aggregated.

    Raises: ValueError for a standard of another number of members.
    """

    def __init__(
        self,
        members: Sequence[RewardNetwork],
        aggregate: Aggregate = MEAN,
        standard: Standard | None = None,
    ):
        super().__init__()
        # it holds nothing else
        self.members: Sequence[RewardNetwork] = nn.ModuleList(members)  # type: ignore[assignment]
        self.aggregate = aggregate
        self.standard = standard
        if standard is not None and len(standard.scales) != len(members):
            raise ValueError(
                f"ensemble: expected {len(members)} offsets and scales, got {len(standard.scales)}. Copy the"
                " file again."
            )

    @classmethod
    def of(
        cls,
        networks: Sequence[RewardNetwork],
        aggregate: Aggregate = MEAN,
        observed: Iterable[torch.Tensor] | None = None,
    ) -> "RewardEnsemble":
        """Join copies of trained networks.

        Args: observed: batches [N, ...] of untuned samples to standardise on; None keeps raw scores.
        """
        members = [copy.deepcopy(network) for network in networks]
        standard = None if observed is None else Standard.of(members, observed)
        return cls(members, aggregate, standard).eval().requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        each = [member.describe() for member in self.members]
        same = all(member == each[0] for member in each)
        described: dict[str, Any] = {**each[0], "members": len(each)} if same else {"members": each}
        if self.aggregate == MEAN and self.standard is None:
            return described  # as files have been from the first
        return {
            **described,
            "ensemble": {
                **asdict(self.aggregate),
                **({} if self.standard is None else asdict(self.standard)),
            },
        }

    def check(self, shape: Sequence[int]) -> None:
        for member in self.members:
            member.check(shape)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Feature vectors of all members side by side."""
        return torch.cat([member.features(observed) for member in self.members], dim=1)

    def embed(self, observed: torch.Tensor) -> torch.Tensor:
        """Embeddings of all members side by side: [N, ...] -> [N, E * M]."""
        return torch.cat([member.embed(observed) for member in self.members], dim=1)

    def _parts(self, embedding: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each member's own part of embeddings [N, E * M]."""
        return embedding.split([member.MLP.output_layer.out_features for member in self.members], dim=1)

    def joined(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """The members' scores, [N] each -> [N]."""
        stacked = torch.stack(list(scores))  # [E, N]
        if self.standard is None:
            return self.aggregate(stacked)
        offsets, scales = (
            stacked.new_tensor(values)[:, None] for values in (self.standard.offsets, self.standard.scales)
        )
        return self.aggregate((stacked - offsets) / scales) * scales.mean() + offsets.mean()

    def score(self, observed: torch.Tensor) -> torch.Tensor:
        return self.joined([member.score(observed) for member in self.members])

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """The reward of embeddings [N, E * M] -> [N]."""
        parts = zip(self.members, self._parts(embedding), strict=True)
        return self.joined([member.score_embedding(part) for member, part in parts])

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Logit that `first` is better, from embeddings [P, E * M] each -> [P]: the aggregate of the members'
        order-free logits.

        These are log odds and need no standard. Swapping the pair negates the mean; the others are
        pessimistic about the first.
        """
        parts = zip(self.members, self._parts(first), self._parts(second), strict=True)
        return self.aggregate(torch.stack([member.pair_margin(a, b) for member, a, b in parts]))


def average_weights(networks: Sequence[RewardNetwork]) -> RewardNetwork:
    """One network with the mean of all weights, for one network's cost (WARM: Ramé et al. 2024, arXiv
    2401.12187).

    It needs linear connectivity: weights between two members must be good weights, too. Networks that went on
    from one trained start have it as a rule; networks of one architecture with other initialisations do not,
    and their average is worth nothing.

    Raises: ValueError where architectures differ.
    """
    first, *others = (network.describe() for network in networks)
    if any(other != first for other in others):
        raise ValueError(
            f"--aggregate={AVERAGE}: expected members of one architecture, got several. Use mean, min or"
            " softmin."
        )
    average = copy.deepcopy(networks[0])
    states = [network.state_dict() for network in networks]
    with torch.no_grad():
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name].double() for state in states]).mean(dim=0))
    return average.eval().requires_grad_(False)


def combine(
    networks: Sequence[RewardNetwork],
    kind: str | None,
    strength: float | None,
    observed: Iterable[torch.Tensor],
) -> RewardNetwork | RewardEnsemble:
    """Trained networks as one reward.

    Args: kind: one of CHOICES, or None for the mean of raw scores; observed: batches [N, ...] of untuned
        samples, read for ensembles of standardised members alone.
    Raises: ValueError, see `Aggregate`, `Standard` and `average_weights`.
    """
    check_joining(kind, strength)
    if kind == AVERAGE:
        return average_weights(networks)
    return (
        RewardEnsemble.of(networks)
        if kind is None
        else RewardEnsemble.of(networks, Aggregate(kind, strength), observed)
    )


def build_network(kind: str, description: Mapping[str, Any]) -> RewardNetwork | RewardEnsemble:
    """An untrained network, or several, as described.

    Raises: ValueError for other fields than the network's.
    """
    build = builder_of(kind)
    values = dict(description)
    members = values.pop("members", 1)
    joined = values.pop("ensemble", None)
    if joined is None and members == 1:
        return build(values)
    networks = (
        [build(member) for member in members]
        if isinstance(members, list)
        else [build(values) for _ in range(members)]
    )
    if joined is None:
        return RewardEnsemble(networks)
    try:
        standard = Standard(tuple(joined["offsets"]), tuple(joined["scales"])) if "scales" in joined else None
        return RewardEnsemble(networks, Aggregate(joined["kind"], joined["strength"]), standard)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"ensemble: expected kind, strength, offsets and scales, got no such {error}. Copy the file"
            " again."
        ) from error
