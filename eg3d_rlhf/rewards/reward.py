"""Rewards and their files: observation, network and provenance.

A reward is stored as `<name>.safetensors` (the state dict; networks that read slabs have the names and the
order of published checkpoints) beside `<name>.json` (observation, network, provenance). Published `.pt` state
dicts of the full-size network can be loaded as well.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.generators import Generator, LoadedGenerator
from eg3d_rlhf.models.weights import Module, fill, read
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.aggregates import AVERAGE, check_joining
from eg3d_rlhf.rewards.cache import untuned
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, build_network, combine
from eg3d_rlhf.rewards.networks import RewardNetwork, builder_of
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab, observation_of
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.slab_presets import PAPER
from training.networks import state_hash
from training.storage import write_atomic

_FORMAT = "eg3d-rlhf reward 2"  # in both files; a file with another value is rejected


class Reward(nn.Module):
    """Observation, network (or ensemble of networks) and provenance: everything that determines a score.

    Args: provenance: JSON values. tools/train_reward.py writes generator (SHA-256 of its state),
        architecture, psi, truncation_cutoff, labels (SHA-256; several are joined by +), preset, seed,
        temperature, test_accuracy and test_accuracy_clean, score_mean and score_std, and, if members were
        trained from one network, start (its SHA-256).
    Raises: ValueError if the network cannot read the observation.

    >>> from eg3d_rlhf import load_generator, load_reward, ws_of_seeds
    >>> generator = load_generator().generator
    >>> load_reward().score(generator.field(ws_of_seeds(generator, [1, 2]))).shape
    torch.Size([2])
    """

    def __init__(
        self,
        observation: Observation,
        network: RewardNetwork | RewardEnsemble,
        provenance: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        # Fails early, before a mismatch appears deep inside the network.
        network.check(observation.shape)
        self.observation = observation
        self.network = network
        # A copy, so that later changes by the caller do not reach the file.
        self.provenance = dict(provenance or {})

    def score(self, field: Field) -> torch.Tensor:
        """Return the reward of each shape, [N], higher is better.

        Differentiable in the field and the parameters.
        """
        return self.network.score(self.observation.observe(field))

    def score_observed(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the reward of observations, [N, ...] -> [N]. Differentiable in the observations."""
        return self.network.score(observations)

    @property
    def temperature(self) -> float:
        """Divisor that converts differences of scores to log odds; 1 if training did not fit one."""
        # Neither a missing value nor a stored null is a temperature.
        return float(self.provenance.get("temperature") or 1.0)

    @property
    def labels(self) -> frozenset[str]:
        """SHA-256 hashes of the label sets of the training; empty if not recorded."""
        # Splitting an empty string gives [""], which is not a hash.
        return frozenset((self.provenance.get("labels") or "").split("+")) - {""}

    def members(self) -> list["Reward"]:
        """Return the members of an ensemble as separate rewards, or a list with the reward itself."""
        if not isinstance(self.network, RewardEnsemble):
            return [self]
        return [Reward(self.observation, member, self.provenance) for member in self.network.members]

    def is_member_of(self, other: "Reward") -> bool:
        """Return True if the reward is, or shares, a member of the ensemble `other`."""
        if not isinstance(other.network, RewardEnsemble):
            return False
        # Members are compared by their weights, since files can be copied and renamed.
        hashes, other_hashes = (
            {state_hash(member.network) for member in reward.members()} for reward in (self, other)
        )
        return bool(hashes & other_hashes)

    def arranged(self) -> "Reward":
        """Convert the weights of 3-D convolutions, in place, to the memory layout in which they run fastest.

        Returns the reward itself. It is a tenth faster and gives the same values.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                # Only the order in memory changes, so scores stay bitwise identical.
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return self

    def describe(self) -> dict[str, Any]:
        """Return the values that the JSON file states beside the weights."""
        return {
            "observation": self.observation.to_dict(),
            "network": self.network.describe(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write `path` (.safetensors) and its `.json`, each atomically. Returns the path.

        Raises: ValueError for another file name, or a provenance that is not JSON.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"Reward.save: expected a file name with the ending .safetensors, got {path.name}. Rename it."
            )
        try:
            # Converted before anything is written, so that an error leaves no file.
            text = json.dumps({"format": _FORMAT, **self.describe()}, indent=2)
        except TypeError as error:
            raise ValueError(
                f"Reward.save: expected JSON values in the provenance, got: {error}. Convert tensors and"
                " paths first."
            ) from error
        # Contiguous, since safetensors stores no memory layouts.
        state = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        write_atomic(path, safetensors.torch.save(state, metadata={"format": _FORMAT}))
        # The description follows the weights: a reader without it reports a missing file.
        write_atomic(path.with_suffix(".json"), (text + "\n").encode())
        return path


def load_reward(path: str | Path | None = None, device: str | torch.device = "cpu") -> Reward:
    """Read a reward, in eval mode and without gradients of its parameters. None reads the bundled one.

    `.safetensors` files need their `.json`. `.pt`, `.pth` and `.ckpt` files are read as a published state
    dict of the full-size network (or as {'state_dict': ...} of one), with the paper's slab and without
    provenance. No code from the file is executed.

    Raises: FileNotFoundError; ValueError if a file is truncated or foreign, if its entries do not fit the
        network, if its observation is unknown, or if a later version wrote it.

    >>> load_reward().observation.shape  # slabs of raw density [1, D, H, W]
    (1, 39, 45, 36)
    """
    path = bundled.REWARD if path is None else Path(path)
    if path.suffix == ".safetensors":
        observation, description, provenance = _read_description(path.with_suffix(".json"))
    else:
        # A published state dict states neither; SigmaSlab's defaults are the paper's slab.
        observation = SigmaSlab()
        description = PAPER.to_dict()
        provenance = {}
    source = f"load_reward({path.name})"
    state = read(path, "load_reward")
    try:
        reward = Reward(observation, build_network(observation.kind, description), provenance)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    # Strict, so that no part of the network keeps its random initialisation.
    fill_published(reward.network, state, source)
    return reward.to(device).eval().requires_grad_(False)


def untaught(kind: str, generator: Generator) -> Reward:
    """Create the reward of a kind whose networks need no training, such as solid.

    Raises: ValueError for a kind that must be trained.
    """
    if presets_of(kind):
        raise ValueError(
            f"reward {kind}: this kind must be trained on labels. Pass the file of a trained reward of this"
            " kind instead."
        )
    # Such a network has no sizes, so its description is empty.
    return Reward(observation_of(kind, generator), builder_of(kind)({})).eval().requires_grad_(False)


def check_reward(reward: Reward, generator: Generator, source: str = "reward") -> None:
    """Reject a reward that cannot observe this generator; warn if it was trained on another.

    Another generator with the same bounds may have been tuned from the reward's generator, and then scores
    are meaningful. So this is only a warning on stderr.

    Args: source: start of the messages, such as a flag.
    Raises: ValueError that lists the differences.
    """
    misfits = reward.observation.misfits(generator)
    if misfits:
        raise ValueError(
            f"{source}: expected a generator with {'; with '.join(misfits)}. Use a reward of this generator;"
            " tools/train_reward.py trains one."
        )
    made_for = reward.provenance.get("generator")
    if made_for is not None and (digest := state_hash(generator.module)) not in reward.provenance.get(
        # Rewards that were trained on several generators list them; others state one.
        "generators",
        [made_for],
    ):
        kind = reward.provenance.get("architecture", generator.architecture)
        print(
            f"Warning: {source}: this reward was trained on shapes of the {kind} generator"
            f" {made_for[:12]}..., not of {generator.architecture} {digest[:12]}.... Unless that generator"
            " was tuned from the first one, the scores may not be meaningful.",
            file=sys.stderr,
        )


def fill_published(model: Module, state: Mapping[str, torch.Tensor], source: str) -> Module:
    """Load the weights of a file into a network, strictly, and return it.

    Raises: ValueError if an entry is missing, unknown, or of another shape.
    """
    # Version 1.8.2 of pytorch-3dunet renamed the key and changed the computation, so old files are recognised
    # by it.
    old = next((name for name in state if name.endswith("upsampling.upsample.weight")), None)
    if old is not None:
        raise ValueError(
            f"{source}: expected '...upsample.conv_transposed.weight', got '{old}'. These weights were"
            " trained with pytorch-3dunet 1.8.1 or older, whose upsampling computes other values, so the"
            " scores would be wrong even with a renamed key. Use weights that were trained with 1.8.2 or"
            " later."
        )
    return fill(model, state, source)


def _read_description(path: Path) -> tuple[Observation, dict[str, Any], dict[str, Any]]:
    """Read observation, network and provenance from the description of a reward."""
    source = f"load_reward({path.name})"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_reward: expected the description {path} beside the weights, found none. Copy both files"
            " together."
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{source}: expected JSON, got: {error}. Copy the file again; it may be incomplete."
        ) from error
    # JSON may hold a list or a number at the top level.
    stated = values.get("format") if isinstance(values, dict) else None
    # Another number after the name is another version; anything else is not a reward.
    if stated != _FORMAT:
        got = repr(stated) if str(stated).startswith(_FORMAT[:-1]) else "another file"
        raise ValueError(
            f"{source}: expected format {_FORMAT!r}, got {got}. Use a reward that this version of the"
            " package wrote."
        )
    try:
        return (
            observations.from_dict(values["observation"]),
            dict(values["network"]),
            dict(values["provenance"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source}: expected observation, network and provenance, but {error} is missing. Copy the file"
            " again."
        ) from error


# Joining of rewards into one ensemble, or into the average of their weights.

# Truncation if no reward states one
PSI = 1.0
CUTOFF = 14


def join(
    rewards: Mapping[str, Reward],
    generator: LoadedGenerator,
    aggregate: str,
    strength: float | None = None,
    batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Reward:
    """Join the members of several rewards into one reward.

    Of an ensemble, the members count, not its aggregate.

    Members are standardised on untuned samples of the generator, with the truncation that the rewards state.

    Args: rewards: by name, for example file names; aggregate: one of aggregates.CHOICES; on_batch: called
        with the number of samples of each batch.
    Raises: ValueError for fewer than two members, for the same member twice, for members with different
        observations, generators or truncations, or of another generator; and for `warm` if members were not
        trained from one network.
    """
    check_joining(aggregate, strength)
    # Members of an ensemble get the ensemble's name with an index.
    members = {
        name if len(parts) == 1 else f"{name}[{i}]": member
        for name, parts in ((name, reward.members()) for name, reward in rewards.items())
        for i, member in enumerate(parts)
    }
    # `_check` ensures that all rewards have the observation of the first one.
    first = next(iter(rewards.values()))
    _check(rewards, members, generator)
    # Averaged weights are only useful if the members were trained from one network, see `average_weights`.
    if aggregate == AVERAGE:
        starts = {reward.provenance.get("start") for reward in rewards.values()}
        if len(starts) > 1 or None in starts:
            raise ValueError(
                f"--aggregate={AVERAGE}: expected members that were trained from one network, got others."
                " Train them with tools/train_reward.py --members=5 --shared-start, or use"
                " --aggregate=softmin."
            )
    psi = _common(rewards, "psi") or PSI
    cutoff = _common(rewards, "truncation_cutoff") or CUTOFF
    # Kept, because they are read twice: for the standardisation, and for mean and scale of the joint score.
    seen: list[torch.Tensor] = []
    for part in untuned(generator.generator, first.observation, psi, cutoff, batch):
        seen.append(part)
        if on_batch is not None:
            on_batch(len(part))
    network = combine(
        [cast(RewardNetwork, member.network) for member in members.values()], aggregate, strength, seen
    )
    with torch.no_grad():
        scores = torch.cat([network.score(part) for part in seen]).double()
    temperatures = [member.temperature for member in members.values()]
    provenance = {
        "generator": generator.hash,
        "architecture": generator.generator.architecture,
        "psi": psi,
        "truncation_cutoff": cutoff,
        "labels": _labels(rewards),
        # Approximate: the joint score keeps the members' unit, but its own temperature is not fitted.
        "temperature": sum(temperatures) / len(temperatures),
        "start": _common(rewards, "start"),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "joined": [{"name": name, "network": state_hash(member.network)} for name, member in members.items()],
    }
    return Reward(first.observation, network, provenance).eval().requires_grad_(False)


def _check(rewards: Mapping[str, Reward], members: Mapping[str, Reward], generator: LoadedGenerator) -> None:
    """Raise ValueError if the rewards cannot be joined, or do not belong to the generator."""
    if len(members) < 2:
        raise ValueError(f"rewards: expected at least two members, got {len(members)}. Add another reward.")
    first, observation = next((name, reward.observation) for name, reward in rewards.items())
    for name, reward in rewards.items():
        if reward.observation != observation:
            raise ValueError(
                f"rewards: expected equal observations, got {observation.to_dict()} in {first},"
                f" {reward.observation.to_dict()} in {name}. Join rewards that were trained with the same"
                " --observation, --resolution and --crop."
            )
    known: dict[str, str] = {}
    for name, member in members.items():
        # setdefault returns the name under which these weights were seen first.
        other = known.setdefault(state_hash(member.network), name)
        if other != name:
            raise ValueError(
                f"rewards: expected different members, got the weights of {other} also in {name}. Remove"
                " one of them."
            )
    made_for = _common(rewards, "generator")
    if made_for not in (None, generator.hash):
        raise ValueError(
            f"--network: expected the generator of the rewards, {made_for[:12]}..., got"
            f" {generator.hash[:12]}... in {generator.path.name}. Pass the network with which their labels"
            " were made."
        )
    misfits = observation.misfits(generator.generator)
    if misfits:
        raise ValueError(
            f"--network: expected a generator with {'; with '.join(misfits)}. Pass the generator of the"
            " rewards."
        )


def _common(rewards: Mapping[str, Reward], name: str):
    """Return the value of a provenance entry that all rewards share, or None if no reward states it.

    Raises: ValueError if rewards state different values.
    """
    stated = {
        label: reward.provenance[name]
        for label, reward in rewards.items()
        if reward.provenance.get(name) is not None
    }
    if len(set(stated.values())) > 1:
        listed = ", ".join(
            f"{value[:12] if isinstance(value, str) else value} in {label}" for label, value in stated.items()
        )
        raise ValueError(f"rewards: expected equal {name}, got {listed}. Join rewards with the same {name}.")
    return next(iter(stated.values()), None)


def _labels(rewards: Mapping[str, Reward]) -> str | None:
    """Join the hashes of all label sets by +; None if a reward does not record its labels."""
    sets: Sequence[frozenset[str]] = [reward.labels for reward in rewards.values()]
    # Sorted, so that the same labels give the same text in any order of rewards.
    return "+".join(sorted(frozenset[str]().union(*sets))) if all(sets) else None
