"""The progressive geometry reward of DreamCS (2506.09814; reconstructed, its constants are not published):
beside the distillation of pictures, the shape itself climbs a reward,

    g <- g - alpha(step) (|g| / |g_r|) g_r,   g_r = gradient of r(shape | prompt),

for each asset apart, alpha rising linearly from `geometry_start` of the run to its end. The norms are means
over 50 steps.

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
    """Scores shapes by their density or surface. Differentiable in what made the field."""

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Scores [A] of a field of A shapes at a step of the run."""


@dataclass(frozen=True)
class MeshGeometry:
    """A mesh reward on a field: the surface is rebuilt every few steps, and its vertices carry the gradient
    to the field.
    """

    reader: MeshReader
    reward: MeshReward

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        return self.reward.score(self.reader(field, step), list(prompts))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.reader.load_state_dict(state)


@dataclass(frozen=True)
class ObservedGeometry:
    """A reward of density, depth or points as `tools/train_reward.py` makes it, as it stands. It knows no
    prompts.
    """

    reward: Reward

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        del prompts, step
        return self.reward.score(field)


class SolidGeometry:
    """Minus `solid_loss` on the whole cube: floaters to go, leaks to close; 0 where there is nothing to mend.
    It knows no prompts.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        del prompts, step
        return Solid(SlabSpec.of(field.bounds, Solid.spec.resolution)).observe(field)[:, 0]


@torch.no_grad()
def dealt_anew(geometry: GeometryReward, seed: int) -> GeometryReward:
    """A control: a learned reward whose numbers are dealt anew within each tensor of its weights.

    Raises: ValueError where nothing was learned that could be dealt.
    """
    if not isinstance(geometry, (MeshGeometry, ObservedGeometry)) or not isinstance(
        geometry.reward, torch.nn.Module
    ):
        raise ValueError(
            "+geometry-random: expected a learned --geometry-reward, got one in closed form. Leave that arm"
            " out."
        )
    dealt = copy.deepcopy(geometry.reward)
    rng = torch.Generator().manual_seed(seed)
    for weight in dealt.parameters():
        weight.copy_(
            weight.flatten()[torch.randperm(weight.numel(), generator=rng).to(weight.device)].view_as(weight)
        )
    return dataclasses.replace(geometry, reward=dealt)


class ProgressiveGeometry:
    """A geometry reward with its ramp and balance, for a run of `steps`.

    Args: sign: -1 for the control whose reward is inverted.
    """

    def __init__(self, reward: GeometryReward, settings: GeometrySettings, steps: int, sign: int = 1):
        self.reward = reward
        self.sign = sign
        self.balance = Balance()
        self.every = settings.geometry_every
        self.first = int(settings.geometry_start * steps)
        if self.first >= steps:
            raise ValueError(
                f"--set geometry_start={settings.geometry_start:g}: expected less than the whole run."
                " Lower it."
            )
        self.alpha = Ramp((self.first, settings.geometry_weight_from, settings.geometry_weight, steps))
        self.scores: torch.Tensor | None = None  # [A] rewards of the last look, and
        self.slopes: dict[int, torch.Tensor] = {}  # their gradients [A, ...], by the number of the parameter

    def add(
        self, field: Field, parameters: Sequence[torch.nn.Parameter], prompts: Sequence[str], step: int
    ) -> dict[str, torch.Tensor]:
        """Add its gradient to what the distillation left in `.grad` of parameters [A, ...], and say what it
        did.

        Without weight or before its time nothing is computed and nothing changes.
        Returns: 'geometry' rewards [A] of the last look, 'geometry_cosine' between both gradients [A],
        'geometry_alpha' [1]; empty where it rests.
        """
        alpha = self.alpha(step) if step >= self.first else 0.0
        if alpha == 0:
            return {}
        if self.scores is None or step % self.every == 0:
            scores = self.sign * self.reward(field, prompts, step)
            gradients = torch.autograd.grad(scores.sum(), list(parameters), allow_unused=True)
            self.scores = scores.detach()
            self.slopes = {i: g.nan_to_num() for i, g in enumerate(gradients) if g is not None}
        device = parameters[0].device
        scores = self.scores
        slopes = {i: slope.to(device) for i, slope in self.slopes.items()}
        distilled = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        first = _norm(distilled)
        second = _norm(list(slopes.values())) if slopes else torch.zeros(len(scores), device=device)
        scale = alpha * self.balance(first, second)  # [A]
        dot = torch.zeros_like(second)
        for i, slope in slopes.items():
            dot = dot + (distilled[i] * slope).flatten(1).sum(dim=1)
            parameters[i].grad = distilled[i] - scale.view(-1, *[1] * (slope.ndim - 1)).to(slope) * slope
        cosine = -dot / (first * second).clamp_min(1e-30)  # of both descents
        return {
            "geometry": scores.to(device),
            "geometry_cosine": cosine,
            "geometry_alpha": torch.tensor([alpha]),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        of_reward: dict[str, torch.Tensor] = getattr(self.reward, "state_dict", dict)()
        seen = (
            {}
            if self.scores is None
            else {"scores": self.scores, **{f"slope.{i}": slope for i, slope in self.slopes.items()}}
        )
        return {
            **self.balance.state_dict(),
            **seen,
            **{f"reward.{name}": value for name, value in of_reward.items()},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.balance.load_state_dict(state)
        self.scores = state.get("scores")
        self.slopes = {int(i): value.clone() for i, value in below(state, "slope.").items()}
        if hasattr(self.reward, "load_state_dict"):
            self.reward.load_state_dict(below(state, "reward."))


def _norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()


# Geometry rewards from files: a mesh reward (RewardCS), or a reward on density, depth or points as
# tools/train_reward.py makes it.


class NamedGeometry(NamedTuple):
    """A reward that --geometry-reward names, and the priors that it goes with; () for all."""

    make: Callable[[], GeometryReward]  # a fresh one, since some have a state
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
    """A maker of the reward that --geometry-reward names: none, sigma (the bundled reward of densities), a
    known name, or a file.

    Raises: FileNotFoundError, ValueError: one line that names the flag.
    """
    if name == "none":
        return None
    if name in GEOMETRY_REWARDS:
        known = GEOMETRY_REWARDS[name]
        if known.priors and prior not in known.priors:
            raise ValueError(
                f"--geometry-reward: {name} belongs to --prior={' or '.join(known.priors)}, got {prior}. Name"
                " another one."
            )
        return known.make
    path = bundled.REWARD if name == "sigma" else Path(name)
    with naming("--geometry-reward"):
        if not path.is_file():
            known_names = ", ".join(["none", "sigma", *GEOMETRY_REWARDS])
            raise FileNotFoundError(
                f"expected {known_names} or the file of a reward, got nothing at {path}. Check the path."
            )
        if _is_mesh_reward(path):
            mesh = load_mesh_reward(path, device)
            return lambda: MeshGeometry(MeshReader(cube(mesh.resolution), mesh.patches), mesh)
        observed = ObservedGeometry(load_reward(path, device))
    return lambda: observed


def _is_mesh_reward(path: Path) -> bool:
    try:
        read_meta(path, KIND)
    except ValueError:
        return False
    return True
