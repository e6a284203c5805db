"""Combine several reward networks into one: aggregate the scores of members, or average their weights.

A generator that is tuned on one reward exploits that reward's errors. Members that differ in their
initialisation and in their resampled labels make different errors. An aggregate that is pessimistic where
members disagree therefore leaves fewer errors to exploit. Members that share labels or an initialisation also
share errors: ensembles reduce over-optimisation, but they do not remove it (Eisenstein et al. 2023, arXiv
2312.09244).

Shapes: N samples, E members, P pairs, M entries of an embedding; [N, ...] is a batch of observations, which
are the inputs of the networks.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.rewards import linear_network
from eg3d_rlhf.rewards.aggregates import AVERAGE, Aggregate, check_joining
from eg3d_rlhf.rewards.networks import RewardNetwork, builder_of

MEAN = Aggregate()


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation of each member's scores of the same samples.

    With these values, the scores of all members are standardised to one scale.

    Raises: ValueError if the numbers of means and standard deviations differ, a value is not finite, or a
        standard deviation is not above 0.
    """

    offsets: tuple[float, ...]  # mean score of each member, length E
    scales: tuple[float, ...]  # standard deviation of the scores of each member, length E, > 0

    def __post_init__(self) -> None:
        if (
            len(self.offsets) != len(self.scales)
            or not all(map(math.isfinite, (*self.offsets, *self.scales)))
            or min(self.scales) <= 0
        ):
            raise ValueError(
                "ensemble: expected a finite mean and a standard deviation above 0 of each member's scores,"
                f" got the means {list(self.offsets)} and the standard deviations {list(self.scales)}. If a"
                " member gives all samples the same score, leave this member out. If the reward's file was"
                " changed, copy it again."
            )

    @classmethod
    @torch.no_grad()
    def from_observations(
        cls, members: Sequence[RewardNetwork], observations: Iterable[torch.Tensor]
    ) -> "Standard":
        """Compute mean and standard deviation of each member's scores of the same samples.

        Args:
            members: networks of the ensemble.
            observations: batches [N, ...] of observations of untuned samples.
        """
        # Batch by batch, because observations of all samples may not fit into memory.
        batches = [torch.stack([member.score(batch) for member in members]) for batch in observations]
        # Float64, since small standard deviations are computed from differences of similar numbers.
        scores = torch.cat(batches, dim=1).double()  # [E, N]
        return cls(tuple(scores.mean(dim=1).tolist()), tuple(scores.std(dim=1, correction=0).tolist()))


class RewardEnsemble(nn.Module):
    """Ensemble of networks that were trained separately.

    The ensemble has the interface of a RewardNetwork, except that it is not trained itself.

    With a `standard`, the score is r = mean(scales) * aggregate((r_e - offset_e) / scale_e) + mean(offsets),
    where r_e is the score of member e. Members then have equal influence, and r has the unit of the members'
    scores, so that reward weights and clipping limits that suit one reward also suit the ensemble. Without a
    `standard`, raw scores are aggregated. Time and memory are the sum over all members.

    Args:
        members: trained networks [E].
        aggregate: function that joins the members' scores.
        standard: statistics of the members' scores; None aggregates raw scores.
    Raises: ValueError if the number of members in `standard` is not E.
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
                f"ensemble: expected offsets and scales of {len(members)} members, got"
                f" {len(standard.scales)}. The reward's file is damaged: copy it again."
            )

    @classmethod
    def from_networks(
        cls,
        networks: Sequence[RewardNetwork],
        aggregate: Aggregate = MEAN,
        observations: Iterable[torch.Tensor] | None = None,
    ) -> "RewardEnsemble":
        """Create an ensemble from copies of trained networks, in eval mode and without gradients of weights.

        Args:
            networks: trained networks, which are copied.
            aggregate: function that joins the members' scores.
            observations: batches [N, ...] of observations of untuned samples, on which the scores are
                standardised; they are read once. None aggregates raw scores.
        """
        # Copies, since the ensemble's parameters are frozen below.
        members = [copy.deepcopy(network) for network in networks]
        standard = None if observations is None else Standard.from_observations(members, observations)
        return cls(members, aggregate, standard).eval().requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """Return the description from which `build_network` creates the ensemble."""
        descriptions = [member.describe() for member in self.members]
        description: dict[str, Any]
        if all(member_description == descriptions[0] for member_description in descriptions):
            # Members of one architecture are described once, with their number.
            description = {**descriptions[0], "members": len(descriptions)}
        else:
            description = {"members": descriptions}
        if self.aggregate == MEAN and self.standard is None:
            # The first version of the package wrote this form, without an entry "ensemble".
            return description
        ensemble_settings = asdict(self.aggregate)
        if self.standard is not None:
            ensemble_settings.update(asdict(self.standard))
        return {**description, "ensemble": ensemble_settings}

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError if a member cannot read observations of this shape (without the batch axis N)."""
        for member in self.members:
            member.check(shape)

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Concatenate the feature vectors of all members along axis 1: [N, ...] -> [N, sum of lengths]."""
        return torch.cat([member.features(observations) for member in self.members], dim=1)

    def embed(self, observations: torch.Tensor) -> torch.Tensor:
        """Concatenate the embeddings of all members: [N, ...] -> [N, E * M]."""
        return torch.cat([member.embed(observations) for member in self.members], dim=1)

    def _split_embedding(self, embedding: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split embeddings [N, E * M] into the embeddings of the members, [N, M] each."""
        return embedding.split([member.MLP.output_layer.out_features for member in self.members], dim=1)

    def joined(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Aggregate the scores of the members, [N] each, into the reward [N]."""
        member_scores = torch.stack(list(scores))  # [E, N]
        if self.standard is None:
            return self.aggregate(member_scores)
        # [E, 1] each, so that they broadcast over samples
        offsets, scales = (
            member_scores.new_tensor(moments)[:, None]
            for moments in (self.standard.offsets, self.standard.scales)
        )
        # The last two factors restore the unit of the members' scores, see the formula of the class.
        return self.aggregate((member_scores - offsets) / scales) * scales.mean() + offsets.mean()

    def score(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the reward [N] of observations [N, ...]. Differentiable in the observations."""
        return self.joined([member.score(observations) for member in self.members])

    def score_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the reward [N] of concatenated embeddings [N, E * M], the result of `embed`."""
        embeddings = zip(self.members, self._split_embedding(embedding), strict=True)
        return self.joined(
            [member.score_embedding(member_embedding) for member, member_embedding in embeddings]
        )

    def pair_margin(self, first_embeddings: torch.Tensor, second_embeddings: torch.Tensor) -> torch.Tensor:
        """Compute the logit [P] that the first sample of each pair is better than the second one.

        The result is the aggregate of the members' logits. Logits are log odds and need no standardisation.
        With the aggregate `mean`, swapping both samples only negates the result. The other aggregates are
        pessimistic about the first sample, so swapping also changes the absolute value.

        Args:
            first_embeddings: embeddings [P, E * M] of the first samples.
            second_embeddings: embeddings [P, E * M] of the second samples.
        """
        embeddings = zip(
            self.members,
            self._split_embedding(first_embeddings),
            self._split_embedding(second_embeddings),
            strict=True,
        )
        return self.aggregate(
            torch.stack(
                [
                    member.pair_margin(first_embedding, second_embedding)
                    for member, first_embedding, second_embedding in embeddings
                ]
            )
        )


def average_weights(networks: Sequence[RewardNetwork]) -> RewardNetwork:
    """Create one network whose weights are the mean of the weights of several networks.

    This is WARM (Ramé et al. 2024, arXiv 2401.12187). Its cost is that of a single network. Averaging
    requires linear mode connectivity: the weights on the line between two members must give good networks,
    too. This usually holds for networks that were fine-tuned from the same trained network. It does not hold
    for networks with different initialisations, and their average is useless.

    Args: networks: trained networks, which are not changed; at least one.
    Returns: a new network in eval mode, whose parameters need no gradient.
    Raises: ValueError if the networks have different architectures.
    """
    first_description, *other_descriptions = (network.describe() for network in networks)
    # Descriptions are compared because different architectures can have the same names and shapes of weights.
    if any(description != first_description for description in other_descriptions):
        raise ValueError(
            f"--aggregate={AVERAGE} averages weights, but the members have different architectures. Use"
            " --aggregate=mean, min or softmin."
        )
    # A copy, so that the first network keeps its own weights.
    average_network = copy.deepcopy(networks[0])
    state_dicts = [network.state_dict() for network in networks]
    with torch.no_grad():
        for name, average_tensor in average_network.state_dict().items():
            # state_dict returns the network's own tensors, so that copying into them changes the network.
            # Integer entries, for example counters, are not averaged.
            if average_tensor.is_floating_point():
                # Float64 for the sum; copy_ rounds to the parameter's type.
                average_tensor.copy_(
                    torch.stack([state_dict[name].double() for state_dict in state_dicts]).mean(dim=0)
                )
    return average_network.eval().requires_grad_(False)


def combine(
    networks: Sequence[RewardNetwork],
    kind: str | None,
    strength: float | None,
    observations: Iterable[torch.Tensor],
) -> RewardNetwork | RewardEnsemble:
    """Combine trained networks into one reward.

    Args:
        networks: trained networks.
        kind: one of `aggregates.CHOICES`, or None for the mean of raw scores.
        strength: strength of the aggregate, or None for the kind's default.
        observations: batches [N, ...] of observations of untuned samples; they are read only if the scores
            are standardised, that is for all kinds except None and "warm".
    Returns: one network if `kind` is "warm", otherwise an ensemble.
    Raises: ValueError for a wrong kind or strength, for a member with constant scores, or for "warm" with
        different architectures.
    """
    check_joining(kind, strength)
    if kind == AVERAGE:
        return average_weights(networks)
    return (
        RewardEnsemble.from_networks(networks)
        if kind is None
        else RewardEnsemble.from_networks(networks, Aggregate(kind, strength), observations)
    )


def build_network(kind: str, description: Mapping[str, Any]) -> RewardNetwork | RewardEnsemble:
    """Create an untrained network or ensemble from its description.

    Args:
        kind: kind of the observation that the network reads, for example "sigma".
        description: result of `describe` of a network or an ensemble.
    Raises: ValueError for an unknown kind, if the description has fields that the network does not have, or
        if fields of the ensemble are missing or invalid.
    """
    build_of_kind = builder_of(kind)

    def build(description: Mapping[str, Any]) -> RewardNetwork:
        """Create one network; a linear reward reads observations of any kind."""
        is_linear = description.get("network") == linear_network.LINEAR
        return linear_network.build(description) if is_linear else build_of_kind(description)

    network_description = dict(description)
    # A number of members with one architecture, or a list of the members' descriptions.
    members_description = network_description.pop("members", 1)
    ensemble_settings = network_description.pop("ensemble", None)
    # The description of a single network has neither entry.
    if ensemble_settings is None and members_description == 1:
        return build(network_description)
    networks = (
        [build(member_description) for member_description in members_description]
        if isinstance(members_description, list)
        else [build(network_description) for _ in range(members_description)]
    )
    if ensemble_settings is None:
        return RewardEnsemble(networks)
    try:
        standard = (
            Standard(tuple(ensemble_settings["offsets"]), tuple(ensemble_settings["scales"]))
            if "scales" in ensemble_settings
            else None
        )
        return RewardEnsemble(
            networks, Aggregate(ensemble_settings["kind"], ensemble_settings["strength"]), standard
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"ensemble: expected kind, strength, offsets and scales, but {error} is missing or has a wrong"
            " type. The reward's file is damaged: copy it again."
        ) from error
