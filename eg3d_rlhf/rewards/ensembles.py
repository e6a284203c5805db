"""Combine several reward networks into one: aggregate the scores of members, or average their weights.

A generator that is tuned on one reward exploits that reward's errors. Members with other initialisations and
other samples of the labels make other errors, and an aggregate that is pessimistic where members disagree
leaves fewer errors to exploit. Members that share labels or their initialisation share errors, too: ensembles
reduce over-optimisation and do not remove it (Eisenstein et al. 2023, arXiv 2312.09244).

Letters: N samples, E members, P pairs, M entries of an embedding; [N, ...] is the shape of the networks'
observation.
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
    """Mean and standard deviation of each member's scores of the same samples, [E] each.

    They bring members to one scale.
    Raises: ValueError if their numbers differ, or a standard deviation is not above 0.
    """

    offsets: tuple[float, ...]  # means
    scales: tuple[float, ...]  # standard deviations, > 0

    def __post_init__(self) -> None:
        if (
            len(self.offsets) != len(self.scales)
            or not all(map(math.isfinite, (*self.offsets, *self.scales)))
            or min(self.scales) <= 0
        ):
            raise ValueError(
                f"ensemble: expected an offset and a scale above 0 per member, got {list(self.offsets)} and"
                f" {list(self.scales)}. A member that gives all samples the same score is not informative."
                " Remove it."
            )

    @classmethod
    @torch.no_grad()
    def of(cls, members: Sequence[RewardNetwork], observed: Iterable[torch.Tensor]) -> "Standard":
        """Compute the statistics of each member's scores of batches [N, ...] of untuned samples."""
        # Batch by batch, because observations of all samples may not fit into memory.
        batches = [torch.stack([member.score(part) for member in members]) for part in observed]
        # Float64, since small standard deviations are differences of similar numbers.
        scores = torch.cat(batches, dim=1).double()  # [E, N]
        return cls(tuple(scores.mean(dim=1).tolist()), tuple(scores.std(dim=1, correction=0).tolist()))


class RewardEnsemble(nn.Module):
    """Ensemble of networks that were trained separately.

    It is used like a RewardNetwork, and not trained itself.

    With a `standard`, r = mean(scales) * aggregate((r_e - offset_e) / scale_e) + mean(offsets). Members then
    have equal influence, and the result keeps the members' unit, so that weights and clips that suit one
    reward also suit the ensemble. Without a `standard`, raw scores are aggregated. The cost is that of all
    members.

    Raises: ValueError if the standard has another number of members.
    """

    def __init__(
        self,
        members: Sequence[RewardNetwork],
        aggregate: Aggregate = MEAN,
        standard: Standard | None = None,
    ):
        super().__init__()
        # The ModuleList holds only RewardNetworks, which torch's type does not express.
        self.members: Sequence[RewardNetwork] = nn.ModuleList(members)  # type: ignore[assignment]
        self.aggregate = aggregate
        self.standard = standard
        if standard is not None and len(standard.scales) != len(members):
            raise ValueError(
                f"ensemble: expected {len(members)} offsets and scales, got {len(standard.scales)}. Copy the"
                " file of the reward again."
            )

    @classmethod
    def of(
        cls,
        networks: Sequence[RewardNetwork],
        aggregate: Aggregate = MEAN,
        observed: Iterable[torch.Tensor] | None = None,
    ) -> "RewardEnsemble":
        """Join copies of trained networks.

        Args: observed: batches [N, ...] of untuned samples for standardisation; None keeps raw scores.
        """
        # Copies, since the ensemble's parameters are frozen below.
        members = [copy.deepcopy(network) for network in networks]
        standard = None if observed is None else Standard.of(members, observed)
        return cls(members, aggregate, standard).eval().requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """Return the description from which `build_network` creates the ensemble."""
        each = [member.describe() for member in self.members]
        # Members of one architecture are described once, with their number.
        same = all(member == each[0] for member in each)
        described: dict[str, Any] = {**each[0], "members": len(each)} if same else {"members": each}
        if self.aggregate == MEAN and self.standard is None:
            # Files of such ensembles have had this form from the first version on.
            return described
        return {
            **described,
            "ensemble": {
                **asdict(self.aggregate),
                **({} if self.standard is None else asdict(self.standard)),
            },
        }

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless every member can read observations of this shape."""
        for member in self.members:
            member.check(shape)

    def features(self, observed: torch.Tensor) -> torch.Tensor:
        """Concatenate the feature vectors of all members."""
        return torch.cat([member.features(observed) for member in self.members], dim=1)

    def embed(self, observed: torch.Tensor) -> torch.Tensor:
        """Concatenate the embeddings of all members: [N, ...] -> [N, E * M]."""
        return torch.cat([member.embed(observed) for member in self.members], dim=1)

    def _parts(self, embedding: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split embeddings [N, E * M] into those of the members."""
        return embedding.split([member.MLP.output_layer.out_features for member in self.members], dim=1)

    def joined(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Aggregate the members' scores, [N] each, into [N]."""
        stacked = torch.stack(list(scores))  # [E, N]
        if self.standard is None:
            return self.aggregate(stacked)
        # [E, 1] each, so that they broadcast over samples
        offsets, scales = (
            stacked.new_tensor(values)[:, None] for values in (self.standard.offsets, self.standard.scales)
        )
        # Back to the unit of the members, see the class.
        return self.aggregate((stacked - offsets) / scales) * scales.mean() + offsets.mean()

    def score(self, observed: torch.Tensor) -> torch.Tensor:
        """Return the reward [N] of observations [N, ...]. Differentiable in the observations."""
        return self.joined([member.score(observed) for member in self.members])

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the reward [N] of embeddings [N, E * M]."""
        parts = zip(self.members, self._parts(embedding), strict=True)
        return self.joined([member.score_embedding(part) for member, part in parts])

    def pair_margin(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Compute the logit that `first` is better, from embeddings [P, E * M] each -> [P].

        It is the aggregate of the members' logits, which do not depend on the order of the pair. Logits are
        log odds and need no standardisation. Swapping the pair negates the mean. The other aggregates are
        pessimistic about the first sample, so swapping changes more than the sign.
        """
        parts = zip(self.members, self._parts(first), self._parts(second), strict=True)
        return self.aggregate(torch.stack([member.pair_margin(a, b) for member, a, b in parts]))


def average_weights(networks: Sequence[RewardNetwork]) -> RewardNetwork:
    """Average the weights of networks into one, at the cost of one network (WARM: Ramé et al. 2024, arXiv
    2401.12187).

    Averaging requires linear connectivity: weights between those of two members must be good weights, too.
    Networks that were trained further from the same trained network usually have it. Networks with different
    initialisations do not, and their average is useless.

    Raises: ValueError if architectures differ.
    """
    first, *others = (network.describe() for network in networks)
    # Names and shapes can agree between architectures that compute different functions.
    if any(other != first for other in others):
        raise ValueError(
            f"--aggregate={AVERAGE}: expected members of one architecture, got several. Use"
            " --aggregate=mean, min or softmin."
        )
    # The first network keeps its weights.
    average = copy.deepcopy(networks[0])
    states = [network.state_dict() for network in networks]
    with torch.no_grad():
        for name, value in average.state_dict().items():
            # state_dict returns the tensors themselves, so copying into them changes the network. Integer
            # entries are not averaged.
            if value.is_floating_point():
                # Float64 for the sum; copy_ rounds to the parameter's type.
                value.copy_(torch.stack([state[name].double() for state in states]).mean(dim=0))
    return average.eval().requires_grad_(False)


def combine(
    networks: Sequence[RewardNetwork],
    kind: str | None,
    strength: float | None,
    observed: Iterable[torch.Tensor],
) -> RewardNetwork | RewardEnsemble:
    """Combine trained networks into one reward.

    Args: kind: one of CHOICES, or None for the mean of raw scores; observed: batches [N, ...] of untuned
        samples, which are read only if members are standardised.
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
    """Create an untrained network or ensemble from its description.

    Raises: ValueError if the description has fields that the network does not have.
    """
    build = builder_of(kind)
    values = dict(description)
    # A number of equal members, or a list of descriptions.
    members = values.pop("members", 1)
    joined = values.pop("ensemble", None)
    # Files of single networks mention neither.
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
            f"ensemble: expected kind, strength, offsets and scales, but {error} is missing. Copy the file"
            " of the reward again."
        ) from error
