"""Implements the progressive geometry reward of DreamCS (arXiv 2506.09814; reconstructed, because its
constants are not published). In addition to the distillation of images, a reward of the shape is increased:

    g <- g - alpha(step) (|g| / |g_r|) g_r,   g_r = gradient of r(shape | prompt),

for each asset separately. alpha increases linearly from the share `geometry_start` of the run to its end. The
norms are means over 50 steps.

Letters: A assets.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.interfaces import MeshReward
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.models.weights import below
from eg3d_rlhf.rewards.meshes.model import KIND, load_mesh_reward
from eg3d_rlhf.rewards.meshes.patches import MeshReader
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.solid import Solid
from eg3d_rlhf.tuning.distill.gradients import Balance
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from training.storage import read_meta


@runtime_checkable
class GeometryReward(Protocol):
    """Reward of the density or surface of shapes. Differentiable in the parameters of the field."""

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Score a field of A shapes at a step of the run, [A]."""


@dataclass(frozen=True)
class MeshGeometry:
    """Mesh reward of a field. The surface is extracted every few steps, and its vertices carry the
    gradient to the field.
    """

    reader: MeshReader
    reward: MeshReward

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Score the current surfaces, [A]."""
        # The reader decides from the step if the surface must be extracted again.
        return self.reward.score(self.reader(field, step), list(prompts))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the surfaces that were extracted last."""
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the surfaces that were extracted last."""
        self.reader.load_state_dict(state)


@dataclass(frozen=True)
class ObservedGeometry:
    """Reward of density, depth or points from `tools/train_reward.py`. It does not depend on the prompt."""

    reward: Reward

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Score the field, [A]."""
        del prompts, step
        return self.reward.score(field)


class SolidGeometry:
    """Minus `solid_loss` on the entire cube, which penalises floaters and leaks; 0 for a physically valid
    solid. It does not depend on the prompt.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Score the field, [A]."""
        del prompts, step
        # The observation [A, 1] is minus the loss, so a higher score is better.
        return Solid(SlabSpec.of(field.bounds, Solid.spec.resolution)).observe(field)[:, 0]


@torch.no_grad()
def shuffle_weights(geometry: GeometryReward, seed: int) -> GeometryReward:
    """Make a control: a learned reward whose numbers are shuffled within each tensor of its weights.

    Raises: ValueError for a reward without learned weights.
    """
    # A reward in closed form has no weights, and shuffling nothing would be no control.
    if not isinstance(geometry, (MeshGeometry, ObservedGeometry)) or not isinstance(
        geometry.reward, torch.nn.Module
    ):
        raise ValueError(
            "+geometry-random: this control needs a learned --geometry-reward, got one in closed form."
            " Remove that arm."
        )
    # A copy: the other arms use the same reward object.
    shuffled = copy.deepcopy(geometry.reward)
    # Generated on the CPU, so that the permutation does not depend on the device.
    rng = torch.Generator().manual_seed(seed)
    for weight in shuffled.parameters():
        weight.copy_(
            weight.flatten()[torch.randperm(weight.numel(), generator=rng).to(weight.device)].view_as(weight)
        )
    return dataclasses.replace(geometry, reward=shuffled)


class ProgressiveGeometry:
    """Geometry reward with its ramp and balance, for a run of `steps`.

    Args:
        reward: of the shape.
        settings: of the ramp.
        steps: of the run.
        sign: -1 for the control with an inverted reward.
    """

    def __init__(self, reward: GeometryReward, settings: GeometrySettings, steps: int, sign: int = 1):
        self.reward = reward
        self.sign = sign
        self.balance = Balance()
        self.every = settings.geometry_every
        # First step with the geometry reward.
        self.first = int(settings.geometry_start * steps)
        if self.first >= steps:
            raise ValueError(
                f"--set geometry_start={settings.geometry_start:g}: the reward would never be used. Use a"
                " value below 1."
            )
        self.alpha = Ramp((self.first, settings.geometry_weight_from, settings.geometry_weight, steps))
        self.scores: torch.Tensor | None = None  # [A], rewards when they were computed last
        self.reward_grads: dict[int, torch.Tensor] = {}  # index of a parameter -> gradient [A, ...]

    def add(
        self, field: Field, parameters: Sequence[torch.nn.Parameter], prompts: Sequence[str], step: int
    ) -> dict[str, torch.Tensor]:
        """Add the gradient of the reward to the gradient of distillation in `.grad` of parameters [A, ...].

        Before its start, and with weight 0, nothing is computed and nothing changes.

        Returns: 'geometry', the rewards [A] when they were computed last; 'geometry_cosine', the cosine
        between both gradients [A]; 'geometry_alpha' [1]. Empty if nothing was added.
        """
        # A `Ramp` is constant before its first step, so the start is checked here.
        alpha = self.alpha(step) if step >= self.first else 0.0
        if alpha == 0:
            return {}
        # The reward is slow, so its gradient is reused for `every` steps.
        if self.scores is None or step % self.every == 0:
            # One backward pass for all assets: the score of an asset depends on its own parameters only.
            scores = self.sign * self.reward(field, prompts, step)
            # allow_unused: a reward of the density has no gradient for the parameters of the colours.
            gradients = torch.autograd.grad(scores.sum(), list(parameters), allow_unused=True)
            self.scores = scores.detach()
            self.reward_grads = {i: g.nan_to_num() for i, g in enumerate(gradients) if g is not None}
        device = parameters[0].device
        scores = self.scores
        reward_grads = {i: grad.to(device) for i, grad in self.reward_grads.items()}
        # Parameters without a gradient of distillation still get that of the reward.
        distilled = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        first = _norm(distilled)
        second = (
            _norm(list(reward_grads.values())) if reward_grads else torch.zeros(len(scores), device=device)
        )
        # The balance makes alpha independent of the scale of the reward.
        scale = alpha * self.balance(first, second)  # [A]
        # Inner products over all parameters, [A].
        dot = torch.zeros_like(second)
        for i, grad in reward_grads.items():
            dot = dot + (distilled[i] * grad).flatten(1).sum(dim=1)
            # A minus sign: the optimiser descends, and the reward is to increase.
            parameters[i].grad = distilled[i] - scale.view(-1, *[1] * (grad.ndim - 1)).to(grad) * grad
        # of the two directions of descent: the reward is increased
        cosine = -dot / (first * second).clamp_min(1e-30)
        return {
            "geometry": scores.to(device),
            "geometry_cosine": cosine,
            "geometry_alpha": torch.tensor([alpha]),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of balance, reward and last gradients."""
        reward_state: dict[str, torch.Tensor] = getattr(self.reward, "state_dict", dict)()
        last = (
            {}
            if self.scores is None
            else {"scores": self.scores, **{f"slope.{i}": grad for i, grad in self.reward_grads.items()}}
        )
        return {
            **self.balance.state_dict(),
            **last,
            **{f"reward.{name}": value for name, value in reward_state.items()},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.balance.load_state_dict(state)
        self.scores = state.get("scores")
        self.reward_grads = {int(i): value.clone() for i, value in below(state, "slope.").items()}
        if hasattr(self.reward, "load_state_dict"):
            self.reward.load_state_dict(below(state, "reward."))


def _norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm over all parameters for each asset, [A]."""
    # Sum of squares over parameters and entries, per asset.
    return torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()


# --- geometry rewards from files: a mesh reward (RewardCS), or a reward of density, depth or points from
# tools/train_reward.py


class NamedGeometry(NamedTuple):
    """Reward with a name for --geometry-reward, and the priors with which it can be used; () for all."""

    make: Callable[[], GeometryReward]  # makes a new reward, because some have a state
    priors: tuple[str, ...] = ()


GEOMETRY_REWARDS: Registry[NamedGeometry] = Registry(
    "--geometry-reward",
    {
        "one-nose": "eg3d_rlhf.tuning.distill.scene_boxes",
        "floaters": "eg3d_rlhf.tuning.distill.scene_boxes",
    },
)

GEOMETRY_REWARDS.add("solid", NamedGeometry(SolidGeometry))


def load_geometry(name: str, prior: str, device: torch.device) -> Callable[[], GeometryReward] | None:
    """Return a function that makes the reward of --geometry-reward: none, sigma (the bundled reward of
    densities), a registered name, or a file.

    Raises: FileNotFoundError, ValueError with the name of the flag.
    """
    if name == "none":
        return None
    if name in GEOMETRY_REWARDS:
        named = GEOMETRY_REWARDS[name]
        if named.priors and prior not in named.priors:
            raise ValueError(
                f"--geometry-reward: {name} can be used with --prior={' or '.join(named.priors)} only, got"
                f" {prior}. Name another reward."
            )
        return named.make
    # Names are looked up before files, so a file called "solid" needs a path such as ./solid.
    path = bundled.REWARD if name == "sigma" else Path(name)
    with naming("--geometry-reward"):
        if not path.is_file():
            names = ", ".join(["none", "sigma", *GEOMETRY_REWARDS])
            raise FileNotFoundError(
                f"expected {names} or the file of a reward, found nothing at {path}. Check the path."
            )
        if _is_mesh_reward(path):
            mesh = load_mesh_reward(path, device)
            # A new reader for each run: it contains the surfaces of that run's assets.
            return lambda: MeshGeometry(MeshReader(cube(mesh.resolution), mesh.patches), mesh)
        observed = ObservedGeometry(load_reward(path, device))
    return lambda: observed


def _is_mesh_reward(path: Path) -> bool:
    """Return True if a file contains a mesh reward."""
    try:
        read_meta(path, KIND)
    except ValueError:
        return False
    return True
