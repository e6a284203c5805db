"""A reward: what it reads of a field, the network that scores it, and where both come from; and its files.

A reward is stored as `<name>.safetensors` (the state dict; of networks that read slabs with the names and
order of published checkpoints) beside `<name>.json` (observation, network, provenance). Published `.pt` state
dicts of the full-size network load as well.
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

_FORMAT = "eg3d-rlhf reward 2"


class Reward(nn.Module):
    """Observation, network (or ensemble of networks) and provenance: everything that a score depends on.

    Args: provenance: JSON values; tools/train_reward.py writes generator (SHA-256 of its state),
    architecture, psi, truncation_cutoff, labels (SHA-256; several with + between them), preset, seed,
    temperature, test_accuracy and test_accuracy_clean, score_mean and score_std, and start (SHA-256) where
    members went on from one network.
    Raises: ValueError where the network cannot read the observation.

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
        network.check(observation.shape)
        self.observation = observation
        self.network = network
        self.provenance = dict(provenance or {})

    def score(self, field: Field) -> torch.Tensor:
        """The reward of each shape, [N], higher is better. Differentiable in the field and the parameters."""
        return self.network.score(self.observation.observe(field))

    def score_observed(self, observed: torch.Tensor) -> torch.Tensor:
        """The reward of what the observation gave, [N, ...] -> [N]."""
        return self.network.score(observed)

    @property
    def temperature(self) -> float:
        """Divisor of differences of scores that makes them log odds; 1 where training did not fit one."""
        return float(self.provenance.get("temperature") or 1.0)

    @property
    def labels(self) -> frozenset[str]:
        """SHA-256 of the label sets that it learnt from; empty where that is not recorded."""
        return frozenset((self.provenance.get("labels") or "").split("+")) - {""}

    def members(self) -> list["Reward"]:
        """The rewards of an ensemble one by one; itself where it is a single one."""
        if not isinstance(self.network, RewardEnsemble):
            return [self]
        return [Reward(self.observation, member, self.provenance) for member in self.network.members]

    def is_member_of(self, other: "Reward") -> bool:
        """Whether it is, or shares, a member of an ensemble."""
        if not isinstance(other.network, RewardEnsemble):
            return False
        mine, theirs = (
            {state_hash(member.network) for member in reward.members()} for reward in (self, other)
        )
        return bool(mine & theirs)

    def arranged(self) -> "Reward":
        """Itself, with the weights of 3-D convolutions as they run fastest:
        a tenth faster, the same values.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return self

    def describe(self) -> dict[str, Any]:
        """What the file says beside the weights."""
        return {
            "observation": self.observation.to_dict(),
            "network": self.network.describe(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write `path` (.safetensors) and its `.json`, each atomically; returns the path.

        Raises: ValueError.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"Reward.save: expected a name ending in .safetensors, got {path.name}. Rename it."
            )
        try:
            text = json.dumps({"format": _FORMAT, **self.describe()}, indent=2)
        except TypeError as error:
            raise ValueError(
                f"Reward.save: expected plain JSON values, got: {error}. Convert tensors and paths first."
            ) from error
        state = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        write_atomic(path, safetensors.torch.save(state, metadata={"format": _FORMAT}))
        write_atomic(path.with_suffix(".json"), (text + "\n").encode())
        return path


def load_reward(path: str | Path | None = None, device: str | torch.device = "cpu") -> Reward:
    """Read a reward, in eval mode and without gradients to its parameters; None: the bundled one.

    `.safetensors` needs its `.json`; `.pt`, `.pth` and `.ckpt` are read as a published state dict of the
    full-size network (or a {'state_dict': ...} of one) with the paper's slab and no provenance. Nothing in
    the file is executed.

    Raises: FileNotFoundError; ValueError on truncated or foreign files, on entries that do not fit the
    network, on an unknown observation, and on a file of a later version.

    >>> load_reward().observation.shape  # slabs of raw density [1, D, H, W]
    (1, 39, 45, 36)
    """
    path = bundled.REWARD if path is None else Path(path)
    if path.suffix == ".safetensors":
        observation, description, provenance = _read_description(path.with_suffix(".json"))
    else:
        observation = SigmaSlab()
        description = PAPER.to_dict()
        provenance = {}
    who = f"load_reward({path.name})"
    state = read(path, "load_reward")
    try:
        reward = Reward(observation, build_network(observation.kind, description), provenance)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    fill_published(reward.network, state, who)
    return reward.to(device).eval().requires_grad_(False)


def untaught(kind: str, generator: Generator) -> Reward:
    """The reward of a kind whose networks have nothing to learn, such as solid.

    Raises: ValueError for another kind.
    """
    if presets_of(kind):
        raise ValueError(
            f"reward {kind}: expected a kind that learns nothing, got one that does. Name the file of a"
            " trained one."
        )
    return Reward(observation_of(kind, generator), builder_of(kind)({})).eval().requires_grad_(False)


def check_reward(reward: Reward, generator: Generator, who: str = "reward") -> None:
    """Refuse a reward that cannot see what this generator makes, and say on stderr where it was trained on
    the shapes of another one.

    Another generator in the same bounds may be a descendant of the reward's own, whose shapes it knows well
    enough.

    Args: who: begins the message, such as a flag.
    Raises: ValueError with what differs.
    """
    misfits = reward.observation.misfits(generator)
    if misfits:
        raise ValueError(
            f"{who}: expected a generator with {'; with '.join(misfits)}. Name a reward of this generator;"
            " tools/train_reward.py makes one."
        )
    made_for = reward.provenance.get("generator")
    if made_for is not None and (digest := state_hash(generator.module)) not in reward.provenance.get(
        "generators", [made_for]
    ):
        kind = reward.provenance.get("architecture", generator.architecture)
        print(
            f"Warning: {who}: it was trained on shapes of the {kind} generator {made_for[:12]}..., not of"
            f" {generator.architecture} {digest[:12]}...; unless that one descends from it, its scores may"
            " say little.",
            file=sys.stderr,
        )


def fill_published(model: Module, state: Mapping[str, torch.Tensor], who: str) -> Module:
    """A network with the weights of a file, strictly; returns it.

    Raises: ValueError for entries that do not fit.
    """
    old = next((name for name in state if name.endswith("upsampling.upsample.weight")), None)
    if old is not None:
        raise ValueError(
            f"{who}: expected '...upsample.conv_transposed.weight', got '{old}'. These weights were trained"
            " with pytorch-3dunet 1.8.1 or older, whose upsampling computes other numbers; renaming the key"
            " would change the scores. Use weights trained with 1.8.2 or later."
        )
    return fill(model, state, who)


def _read_description(path: Path) -> tuple[Observation, dict[str, Any], dict[str, Any]]:
    """Observation, network and provenance of a file's description."""
    who = f"load_reward({path.name})"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_reward: expected the description {path} beside the weights, got none. Copy both files"
            " together."
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{who}: expected JSON, got: {error}. Was the file cut short? Copy it again."
        ) from error
    stated = values.get("format") if isinstance(values, dict) else None
    if stated != _FORMAT:
        got = repr(stated) if str(stated).startswith(_FORMAT[:-1]) else "another file"
        raise ValueError(
            f"{who}: expected format {_FORMAT!r}, got {got}. Use a reward of this version of the package."
        )
    try:
        return (
            observations.from_dict(values["observation"]),
            dict(values["network"]),
            dict(values["provenance"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{who}: expected observation, network and provenance, got no such {error}. Copy the file again."
        ) from error


# Rewards joined into one ensemble, or into the average of their weights.

# where no reward states them
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
    """One reward of all members of the rewards; an ensemble among them gives its members, not its aggregate.

    Members are standardised on untuned samples of the generator under the truncation that the rewards state.

    Args: rewards: by name, such as the file's; aggregate: one of aggregates.CHOICES; on_batch: hears how many
        samples were drawn.
    Raises: ValueError for fewer than two members, the same one twice, and members with different
    observations, generators or truncations, or of another generator; and for `warm` where members do not
    share a start.
    """
    check_joining(aggregate, strength)
    members = {
        name if len(parts) == 1 else f"{name}[{i}]": member
        for name, parts in ((name, reward.members()) for name, reward in rewards.items())
        for i, member in enumerate(parts)
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
    psi = _common(rewards, "psi") or PSI
    cutoff = _common(rewards, "truncation_cutoff") or CUTOFF
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
        "temperature": sum(temperatures) / len(temperatures),
        "start": _common(rewards, "start"),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "joined": [{"name": name, "network": state_hash(member.network)} for name, member in members.items()],
    }
    return Reward(first.observation, network, provenance).eval().requires_grad_(False)


def _check(rewards: Mapping[str, Reward], members: Mapping[str, Reward], generator: LoadedGenerator) -> None:
    if len(members) < 2:
        raise ValueError(f"rewards: expected two members or more, got {len(members)}. Name another reward.")
    first, observation = next((name, reward.observation) for name, reward in rewards.items())
    for name, reward in rewards.items():
        if reward.observation != observation:
            raise ValueError(
                f"rewards: expected one observation, got {observation.to_dict()} in {first},"
                f" {reward.observation.to_dict()} in {name}. Join rewards that were trained with the same"
                " --observation, --resolution and --crop."
            )
    known: dict[str, str] = {}
    for name, member in members.items():
        other = known.setdefault(state_hash(member.network), name)
        if other != name:
            raise ValueError(
                f"rewards: expected different members, got the weights of {other} in {name} again. Leave one"
                " out."
            )
    made_for = _common(rewards, "generator")
    if made_for not in (None, generator.hash):
        raise ValueError(
            f"--network: expected the generator of the rewards, {made_for[:12]}..., got"
            f" {generator.hash[:12]}... in {generator.path.name}. Name the network that their labels were"
            " drawn from."
        )
    misfits = observation.misfits(generator.generator)
    if misfits:
        raise ValueError(
            f"--network: expected a generator with {'; with '.join(misfits)}. Name the rewards' own."
        )


def _common(rewards: Mapping[str, Reward], name: str):
    """The one value of a record over all rewards that state it, or None.

    Raises: ValueError where they disagree.
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
        raise ValueError(f"rewards: expected one {name}, got {listed}. Join rewards of one {name}.")
    return next(iter(stated.values()), None)


def _labels(rewards: Mapping[str, Reward]) -> str | None:
    """Hashes of all label sets, with + between them; None where one is not recorded."""
    sets: Sequence[frozenset[str]] = [reward.labels for reward in rewards.values()]
    return "+".join(sorted(frozenset[str]().union(*sets))) if all(sets) else None
