"""Rewards and their files: observation, network and provenance.

A reward consists of an observation (the function that computes the input of the network from a shape), a
network or an ensemble of networks, and the provenance (facts about its training). It is stored in two files:
`<name>.safetensors` contains the state dict of the network, and `<name>.json` contains the observation, the
description of the network, and the provenance. The state dicts of networks that read σ slabs have the names
and the order of published checkpoints. Published `.pt` state dicts of the full-size network can be loaded as
well.
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
from eg3d_rlhf.core.input_paths import check_reward_file
from eg3d_rlhf.generators import Generator, LoadedGenerator
from eg3d_rlhf.models.weights import Module, fill, read
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.rewards.aggregates import AVERAGE, check_joining
from eg3d_rlhf.rewards.cache import observe_untuned
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, build_network, combine
from eg3d_rlhf.rewards.networks import RewardNetwork, builder_of
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab, observation_of
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.slab_presets import PAPER
from training.networks import state_hash
from training.storage import write_atomic

_FORMAT = "eg3d-rlhf reward 2"  # stated in both files; a file that states any other format is rejected


class Reward(nn.Module):
    """Reward of 3D shapes: the network that scores them, its observation, and facts about its training.

    The observation computes the input of the network from a shape, and the network computes the score.

    Args:
        observation: function that computes the input of the network from a shape.
        network: network or ensemble of networks.
        provenance: facts about the training, JSON values. tools/train_reward.py writes generator (SHA-256 of
            its state), architecture, psi, truncation_cutoff, labels (SHA-256; several hashes are joined by
            +), preset, seed, temperature, test_accuracy and test_accuracy_clean, score_mean and score_std,
            and, if all members were trained from one network, start (the SHA-256 of that network).
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
        # A mismatch is reported here, and not by a layer of the network when it is used.
        network.check(observation.shape)
        self.observation = observation
        self.network = network
        # A copy, so that later changes by the caller do not reach the file.
        self.provenance = dict(provenance or {})

    def score(self, field: Field) -> torch.Tensor:
        """Compute the reward [N] of the N shapes of a field. A higher reward is better.

        Differentiable in the parameters, and in the field if the observation is differentiable.
        """
        return self.network.score(self.observation.observe(field))

    def score_observed(self, observations: torch.Tensor) -> torch.Tensor:
        """Compute the reward from observations: [N, ...] -> [N]. Differentiable in the observations."""
        return self.network.score(observations)

    @property
    def temperature(self) -> float:
        """Divisor that converts a difference of scores to log odds; 1 if the provenance does not state it."""
        # `or` covers both a missing entry and an entry that is None.
        return float(self.provenance.get("temperature") or 1.0)

    @property
    def labels(self) -> frozenset[str]:
        """SHA-256 hashes of the label sets of the training; empty if the provenance does not state them."""
        # Splitting an empty string gives [""], which is not a hash.
        return frozenset((self.provenance.get("labels") or "").split("+")) - {""}

    def members(self) -> list["Reward"]:
        """Return the members of an ensemble as separate rewards.

        For a reward with a single network, return a list that contains only the reward itself.
        """
        if not isinstance(self.network, RewardEnsemble):
            return [self]
        return [Reward(self.observation, member, self.provenance) for member in self.network.members]

    def shares_network_with(self, other: "Reward") -> bool:
        """Return True if a network of this reward scores shapes in the other reward as well.

        This holds for a copy of the same file, for a member of an ensemble, and for two ensembles with a
        common member. A reward that shares a network with the reward of a tuning is no held-out reward.
        """

        # Compared by their weights, since files can be copied and renamed. Networks without weights are
        # compared by the observation that they read.
        def identities(reward: "Reward") -> set[str]:
            return {
                state_hash(member.network)
                if member.network.state_dict()
                else json.dumps(member.observation.to_dict(), sort_keys=True)
                for member in reward.members()
            }

        return bool(identities(self) & identities(other))

    def channels_last(self) -> "Reward":
        """Convert the weights of 3-D convolutions to the layout channels-last, in place.

        Scores then take a tenth less time and are bitwise identical.

        Returns: the reward itself.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                # torch.nn.Module.to has no type for this argument.
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return self

    def describe(self) -> dict[str, Any]:
        """Return the contents of the reward's JSON file: observation, network and provenance."""
        return {
            "observation": self.observation.to_dict(),
            "network": self.network.describe(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write the weights to `path` and the description to a `.json` file beside it, each atomically.

        Args: path: file name with the ending .safetensors.
        Returns: the path of the weights.
        Raises: ValueError for a file name with any other ending, or a provenance that is not JSON.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"Reward.save: expected a file name with the ending .safetensors, got {path.name}. Use, for"
                f" example, {path.stem}.safetensors."
            )
        try:
            # Converted before anything is written, so that an error leaves no file.
            json_text = json.dumps({"format": _FORMAT, **self.describe()}, indent=2)
        except TypeError as error:
            raise ValueError(
                f"Reward.save: the provenance cannot be written as JSON ({error}). Convert its tensors to"
                " numbers and its paths to strings."
            ) from error
        # Tensors must be contiguous, since safetensors stores no memory layouts.
        state_dict = {
            name: state_tensor.detach().cpu().contiguous()
            for name, state_tensor in self.network.state_dict().items()
        }
        write_atomic(path, safetensors.torch.save(state_dict, metadata={"format": _FORMAT}))
        # The description is written last. If writing is interrupted, `load_reward` reports that it is
        # missing.
        write_atomic(path.with_suffix(".json"), (json_text + "\n").encode())
        return path


def load_reward(path: str | Path | None = None, device: str | torch.device = "cpu") -> Reward:
    """Read a reward from its files, in eval mode and without gradients of its parameters.

    A `.safetensors` file needs its `.json` file in the same folder. A `.pt`, `.pth` or `.ckpt` file is read
    as a published state dict of the full-size network (or as a dict that contains it under 'state_dict');
    such a reward reads the paper's slab and has no provenance. No code from the file is executed.

    Args:
        path: file with the weights; None reads the bundled reward.
        device: device of the network.
    Raises: FileNotFoundError if a file is missing; ValueError if a file is damaged or is no reward, if its
        entries do not match the network, if its observation is unknown, or if a later version wrote it.

    >>> load_reward().observation.shape  # slabs of raw density [1, D, H, W]
    (1, 39, 45, 36)
    """
    path = bundled.REWARD if path is None else Path(path)
    check_reward_file(path)
    if path.suffix == ".safetensors":
        observation, description, provenance = _read_description(path.with_suffix(".json"))
    else:
        # A published state dict does not state the observation and the architecture. The defaults of
        # SigmaSlab are the paper's slab.
        observation = SigmaSlab()
        description = PAPER.to_dict()
        provenance = {}
    message_prefix = f"load_reward({path.name})"
    state_dict = read(path, "load_reward")
    try:
        reward = Reward(observation, build_network(observation.kind, description), provenance)
    except ValueError as error:
        raise ValueError(f"{message_prefix}: {error}") from error
    # Strict loading ensures that no part of the network has random weights.
    fill_published(reward.network, state_dict, message_prefix)
    return reward.to(device).eval().requires_grad_(False)


def read_provenance(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of the observation and the provenance of a reward's file, without reading its weights.

    A published state dict has no provenance, and `load_reward` reads the paper's slab for it.

    Raises: as `load_reward`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return SigmaSlab.kind, {}
    observation, _, provenance = _read_description(path.with_suffix(".json"))
    return observation.kind, provenance


def untrained_reward(kind: str, generator: Generator) -> Reward:
    """Create a reward that needs no training, for example "solid".

    Args:
        kind: kind of the observation.
        generator: generator whose shapes are scored.
    Raises: ValueError for an unknown kind, and for a kind whose networks must be trained.
    """
    if presets_of(kind):
        raise ValueError(
            f"reward {kind}: rewards of this kind must be trained on labels. Pass the file of a trained"
            " reward instead of the name."
        )
    # A network that needs no training has no sizes, so its description is empty.
    return Reward(observation_of(kind, generator), builder_of(kind)({})).eval().requires_grad_(False)


def check_reward(reward: Reward, generator: Generator, source: str = "reward") -> None:
    """Raise ValueError if a reward cannot read the shapes of a generator.

    If the reward can read these shapes but was trained on shapes of a different generator, print a warning on
    stderr. This is no error, because the generator may have been tuned from the generator of the training,
    and then the scores are meaningful.

    Args:
        reward: reward to check.
        generator: generator whose shapes shall be scored.
        source: start of the messages, for example a flag.
    Raises: ValueError that lists the differences between the reward's observation and the generator.
    """
    misfits = reward.observation.misfits(generator)
    if misfits:
        raise ValueError(
            f"{source}: this reward expects a generator with {'; with '.join(misfits)}. Use a reward that was"
            " trained on this generator; tools/train_reward.py trains one."
        )
    training_hash = reward.provenance.get("generator")
    if training_hash is None:
        return
    # Rewards that were trained on several generators list all of them.
    training_hashes = reward.provenance.get("generators", [training_hash])
    # A file of latents has the shapes of another generator, on which the reward may have been trained.
    generator_hash = state_hash(getattr(generator, "synthesis_module", generator.module))
    if generator_hash not in training_hashes:
        architecture = reward.provenance.get("architecture", generator.architecture)
        print(
            f"Warning: {source}: this reward was trained on shapes of the {architecture} generator"
            f" {training_hash[:12]}..., but it scores shapes of the {generator.architecture} generator"
            f" {generator_hash[:12]}.... The scores may not be meaningful, unless the second generator was"
            " tuned from the first one.",
            file=sys.stderr,
        )


def fill_published(model: Module, state_dict: Mapping[str, torch.Tensor], source: str) -> Module:
    """Load a state dict into a network, strictly.

    Args:
        model: network to fill.
        state_dict: state dict, as read from a file.
        source: start of the messages, which names the file.
    Returns: the network.
    Raises: ValueError if an entry is missing, unknown, or of a wrong shape.
    """
    # Version 1.8.2 of pytorch-3dunet renamed this entry and changed the computation. Files of older versions
    # are recognised by the old name.
    old_name = next((name for name in state_dict if name.endswith("upsampling.upsample.weight")), None)
    if old_name is not None:
        raise ValueError(
            f"{source}: the entry '{old_name}' shows that these weights were trained with pytorch-3dunet"
            " 1.8.1 or older, whose upsampling computes different values. The scores would be wrong even"
            " with a renamed entry. Use weights that were trained with pytorch-3dunet 1.8.2 or later."
        )
    return fill(model, state_dict, source)


def _read_description(path: Path) -> tuple[Observation, dict[str, Any], dict[str, Any]]:
    """Read the JSON file of a reward: its observation, its network's description, and its provenance.

    Raises: FileNotFoundError if the file is missing; ValueError if it is damaged, or if it is no reward of
        this version.
    """
    message_prefix = f"load_reward({path.name})"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_reward: the weights of the reward are there, but its description {path} is missing. Copy"
            " this file, too, into the folder of the weights."
        )
    try:
        description_values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{message_prefix}: the file is not valid JSON ({error}). It may be incomplete: copy it again."
        ) from error
    # The top level of a JSON file may also be a list or a number.
    stated_format = description_values.get("format") if isinstance(description_values, dict) else None
    if stated_format != _FORMAT:
        # The last character of _FORMAT is the number of the version.
        if str(stated_format).startswith(_FORMAT[:-1]):
            raise ValueError(
                f"{message_prefix}: expected a reward of the format {_FORMAT!r}, got {stated_format!r}. Open"
                " it with the version of the package that wrote it, or train the reward again."
            )
        raise ValueError(
            f"{message_prefix}: this file does not describe a reward, because its format is not {_FORMAT!r}."
            " Pass a file that Reward.save wrote."
        )
    try:
        return (
            observations.from_dict(description_values["observation"]),
            dict(description_values["network"]),
            dict(description_values["provenance"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{message_prefix}: expected the entries observation, network and provenance, but {error} is"
            " missing or has a wrong type. The file is damaged: copy it again."
        ) from error


# Joining of several rewards into one ensemble, or into one network with the average of their weights.

# Truncation psi and cutoff that are used if no reward states them
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

    If a reward is an ensemble, its members are used, and its aggregate is ignored. The scores of members are
    standardised on samples of the generator, with the truncation that the rewards state. With the aggregate
    "warm", the weights of the members are averaged instead.

    Args:
        rewards: rewards by name, for example by file name.
        generator: generator on which the rewards were trained.
        aggregate: one of aggregates.CHOICES.
        strength: strength of the aggregate, or None for its default.
        batch: number of samples that are observed at once.
        on_batch: function that is called with the number of samples of each batch; None calls nothing.
    Returns: the joint reward, in eval mode and without gradients of its parameters.
    Raises: ValueError for fewer than two members, for two equal members, for members with different
        observations, generators or truncations, and for a generator that is not the generator of the rewards;
        with the aggregate "warm", also if the members were not trained from one network.
    """
    check_joining(aggregate, strength)
    members: dict[str, Reward] = {}
    for name, reward in rewards.items():
        reward_members = reward.members()
        for i, member in enumerate(reward_members):
            # Members of an ensemble get the ensemble's name with an index.
            members[name if len(reward_members) == 1 else f"{name}[{i}]"] = member
    _check_members(rewards, members, generator)
    # All rewards have the same observation, as checked above.
    observation = next(iter(rewards.values())).observation
    # Averaged weights are only useful if the members were trained from one network, see `average_weights`.
    if aggregate == AVERAGE:
        start_hashes = {reward.provenance.get("start") for reward in rewards.values()}
        if len(start_hashes) > 1 or None in start_hashes:
            raise ValueError(
                f"--aggregate={AVERAGE} averages weights, but these rewards were not all trained from the"
                " same network. Train them with tools/train_reward.py --members=5 --shared-start, or use"
                " --aggregate=softmin."
            )
    stated_psi = _common_value(rewards, "psi")
    psi = PSI if stated_psi is None else stated_psi
    # 0 is a value: no layer is truncated
    stated_cutoff = _common_value(rewards, "truncation_cutoff")
    cutoff = CUTOFF if stated_cutoff is None else stated_cutoff
    # The observations are stored, because they are read twice: for the standardisation, and for mean and
    # standard deviation of the joint score.
    observation_batches: list[torch.Tensor] = []
    for observations_batch in observe_untuned(generator.generator, observation, psi, cutoff, batch):
        observation_batches.append(observations_batch)
        if on_batch is not None:
            on_batch(len(observations_batch))
    network = combine(
        [cast(RewardNetwork, member.network) for member in members.values()],
        aggregate,
        strength,
        observation_batches,
    )
    with torch.no_grad():
        scores = torch.cat(
            [network.score(observations_batch) for observations_batch in observation_batches]
        ).double()
    temperatures = [member.temperature for member in members.values()]
    provenance = {
        "generator": generator.hash,
        "architecture": generator.generator.architecture,
        "psi": psi,
        "truncation_cutoff": cutoff,
        "labels": _join_labels(rewards),
        # An approximation: the joint score has the unit of the members' scores, but there are no pairs on
        # which its temperature could be fitted.
        "temperature": sum(temperatures) / len(temperatures),
        "start": _common_value(rewards, "start"),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        # The accuracy of the ensemble is not measured, so the file states what is known of its members.
        "inputs": stated_inputs(rewards),
        "joined": [{"name": name, "network": state_hash(member.network)} for name, member in members.items()],
    }
    return Reward(observation, network, provenance).eval().requires_grad_(False)


def _check_members(
    rewards: Mapping[str, Reward], members: Mapping[str, Reward], generator: LoadedGenerator
) -> None:
    """Raise ValueError if the rewards cannot be joined, or were trained on another generator.

    Args:
        rewards: rewards by name.
        members: members of all rewards, by a name that messages use.
        generator: generator on which the rewards were trained.
    """
    if len(members) < 2:
        raise ValueError(
            f"rewards: expected at least two members, got {len(members)}. Pass the file of another reward."
        )
    first_name, observation = next((name, reward.observation) for name, reward in rewards.items())
    for name, reward in rewards.items():
        if reward.observation != observation:
            first_settings = observation.to_dict()
            settings = reward.observation.to_dict()
            differing_names = [
                setting
                for setting in dict.fromkeys([*first_settings, *settings])
                if first_settings.get(setting) != settings.get(setting)
            ]
            raise ValueError(
                f"rewards: the observations of {first_name} and {name} differ in"
                f" {', '.join(differing_names)}. Join rewards that were trained with the same --observation,"
                " --resolution and --crop."
            )
    name_by_hash: dict[str, str] = {}
    for name, member in members.items():
        # setdefault returns the name of the first member with these weights.
        first_member_name = name_by_hash.setdefault(state_hash(member.network), name)
        if first_member_name != name:
            raise ValueError(
                f"rewards: {first_member_name} and {name} have the same weights. Remove one of them."
            )
    training_hash = _common_value(rewards, "generator")
    if training_hash not in (None, generator.hash):
        raise ValueError(
            f"--network: the rewards were trained on the generator {training_hash[:12]}..., but"
            f" {generator.path.name} is the generator {generator.hash[:12]}.... Pass the file of the"
            " generator whose shapes were labelled."
        )
    misfits = observation.misfits(generator.generator)
    if misfits:
        raise ValueError(
            f"--network: the rewards expect a generator with {'; with '.join(misfits)}. Pass the file of the"
            " generator whose shapes were labelled."
        )


STATED = ("test_accuracy", "pairs", "control", "wrong_faces", "permuted", "training")


def stated_inputs(rewards: Mapping[str, Reward]) -> list[dict[str, Any]]:
    """Return what the provenances of rewards that are joined state about their accuracy and their labels.

    The inputs of a reward that was joined itself take its place.

    Args: rewards: rewards by name.
    Returns: a dict per reward with "name" and the entries STATED that its provenance has.
    """
    inputs: list[dict[str, Any]] = []
    for name, reward in rewards.items():
        stated_entries = {key: reward.provenance[key] for key in STATED if key in reward.provenance}
        inputs += reward.provenance.get("inputs") or [{"name": name, **stated_entries}]
    return inputs


def _common_value(rewards: Mapping[str, Reward], name: str):
    """Return the value of the provenance entry `name` that all rewards share.

    Rewards that do not state the entry are ignored. Return None if no reward states it.

    Raises: ValueError if rewards state different values.
    """
    stated_values = {
        reward_name: reward.provenance[name]
        for reward_name, reward in rewards.items()
        if reward.provenance.get(name) is not None
    }
    if len(set(stated_values.values())) > 1:
        # Hashes are shortened to 12 characters.
        shortened_values = {
            reward_name: value[:12] if isinstance(value, str) else value
            for reward_name, value in stated_values.items()
        }
        list_of_values = ", ".join(f"{value} in {reward}" for reward, value in shortened_values.items())
        raise ValueError(
            f"rewards: their provenances state different values of {name}: {list_of_values}. Use rewards"
            f" with the same {name}."
        )
    return next(iter(stated_values.values()), None)


def _join_labels(rewards: Mapping[str, Reward]) -> str | None:
    """Return the hashes of the labels of all rewards, joined with "+".

    The result is None if any reward does not state its labels.
    """
    label_sets: Sequence[frozenset[str]] = [reward.labels for reward in rewards.values()]
    # Sorted, so that the result does not depend on the order of the rewards. `all` is False if any set is
    # empty.
    return "+".join(sorted(frozenset[str]().union(*label_sets))) if all(label_sets) else None
