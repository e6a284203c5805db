"""Reward files joined into one ensemble, or into the average of their weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.rewards.cache import untuned
from eg3d_rlhf.rewards.ensembles import AVERAGE, check_joining, combine
from eg3d_rlhf.rewards.networks import RewardNetwork
from eg3d_rlhf.rewards.reward import Reward
from training.networks import state_hash

PSI, CUTOFF = 1.0, 14  # where no reward states them


def join(
    rewards: Mapping[str, Reward], generator: LoadedGenerator, aggregate: str, strength: float | None = None, batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Reward:
    """One reward of all members of the rewards; an ensemble among them gives its members, not its aggregate.

    Members are standardised on untuned samples of the generator under the truncation that the rewards state.

    Args: rewards: by name, such as the file's; aggregate: one of ensembles.CHOICES; on_batch: hears how many samples were drawn.
    Raises: ValueError for fewer than two members, the same one twice, and members with different observations, generators or truncations,
    or of another generator; and for `warm` where members do not share a start.
    """
    check_joining(aggregate, strength)
    members = {
        name if len(parts) == 1 else f"{name}[{i}]": one
        for name, parts in ((name, reward.members()) for name, reward in rewards.items()) for i, one in enumerate(parts)
    }
    first = next(iter(rewards.values()))
    _check(rewards, members, generator)
    if aggregate == AVERAGE:
        starts = {reward.provenance.get("start") for reward in rewards.values()}
        if len(starts) > 1 or None in starts:
            raise ValueError(
                f"--aggregate={AVERAGE}: expected members that went on from one trained start, got others. "
                "Train them with tools/train_reward.py --members=5 --shared-start, or use softmin."
            )
    psi, cutoff = _common(rewards, "psi") or PSI, _common(rewards, "truncation_cutoff") or CUTOFF
    seen: list[torch.Tensor] = []

    def observed():
        for part in untuned(generator.generator, first.observation, psi, cutoff, batch):
            seen.append(part)
            if on_batch is not None:
                on_batch(len(part))
            yield part

    network = combine([cast(RewardNetwork, one.network) for one in members.values()], aggregate, strength, observed())
    with torch.no_grad():
        scores = torch.cat([network.score(part) for part in (seen or observed())]).double()
    temperatures = [one.temperature for one in members.values()]
    provenance = {
        "generator": generator.hash, "architecture": generator.generator.architecture, "psi": psi, "truncation_cutoff": cutoff,
        "labels": _labels(rewards), "temperature": sum(temperatures) / len(temperatures), "start": _common(rewards, "start"),
        "score_mean": float(scores.mean()), "score_std": float(scores.std()),
        "joined": [{"name": name, "network": state_hash(one.network)} for name, one in members.items()],
    }  # fmt: skip
    return Reward(first.observation, network, provenance).eval().requires_grad_(False)


def _check(rewards: Mapping[str, Reward], members: Mapping[str, Reward], generator: LoadedGenerator) -> None:
    if len(members) < 2:
        raise ValueError(f"rewards: expected two members or more, got {len(members)}. Name another reward.")
    first, observation = next((name, reward.observation) for name, reward in rewards.items())
    for name, reward in rewards.items():
        if reward.observation != observation:
            raise ValueError(
                f"rewards: expected one observation, got {observation.to_dict()} in {first}, {reward.observation.to_dict()} in {name}. "
                "Join rewards that were trained with the same --observation, --resolution and --crop."
            )
    known: dict[str, str] = {}
    for name, one in members.items():
        other = known.setdefault(state_hash(one.network), name)
        if other != name:
            raise ValueError(f"rewards: expected different members, got the weights of {other} in {name} again. Leave one out.")
    made_for = _common(rewards, "generator")
    if made_for not in (None, generator.hash):
        raise ValueError(
            f"--network: expected the generator of the rewards, {made_for[:12]}..., got {generator.hash[:12]}... in {generator.path.name}. "
            "Name the network that their labels were drawn from."
        )
    misfits = observation.misfits(generator.generator)
    if misfits:
        raise ValueError(f"--network: expected a generator with {'; with '.join(misfits)}. Name the rewards' own.")


def _common(rewards: Mapping[str, Reward], name: str):
    """The one value of a record over all rewards that state it, or None. Raises: ValueError where they disagree."""
    stated = {label: reward.provenance[name] for label, reward in rewards.items() if reward.provenance.get(name) is not None}
    if len(set(stated.values())) > 1:
        listed = ", ".join(f"{value[:12] if isinstance(value, str) else value} in {label}" for label, value in stated.items())
        raise ValueError(f"rewards: expected one {name}, got {listed}. Join rewards of one {name}.")
    return next(iter(stated.values()), None)


def _labels(rewards: Mapping[str, Reward]) -> str | None:
    """Hashes of all label sets, with + between them; None where one is not recorded."""
    sets: Sequence[frozenset[str]] = [reward.labels for reward in rewards.values()]
    return "+".join(sorted(frozenset[str]().union(*sets))) if all(sets) else None
