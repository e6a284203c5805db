"""Implements the progressive geometry reward of DreamCS (arXiv 2506.09814).

A reward of the shape is increased in addition to the distillation of images:

    g <- g - alpha(step) (|g| / |g_r|) g_r,   g_r = gradient of r(shape | prompt),

where g is the gradient of the distillation with respect to the parameters of an asset, and r is the geometry
reward. Each asset is treated separately. The norms |g| and |g_r| are means over 50 steps. alpha changes
linearly from `geometry_weight_from` to `geometry_weight`, from the share `geometry_start` of the run to its
end. The method is reconstructed, because the constants of the paper are not published.

Shapes: A = number of assets.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.interfaces import MeshReward
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.models.weights import entries_below
from eg3d_rlhf.rewards.meshes.model import KIND, load_mesh_reward
from eg3d_rlhf.rewards.meshes.patches import MeshReader
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.solid import Solid
from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_accuracy, announce_file
from eg3d_rlhf.tuning.distill.gradients import Balance
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from training.storage import read_meta


@runtime_checkable
class GeometryReward(Protocol):
    """Interface of a reward that scores the geometry of shapes, from their density or their surface.

    The score is differentiable in the parameters of the shapes.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the shapes.

        Args:
            field: density and colour of the shapes.
            prompts: one prompt for each asset.
            step: number of the step in the run. Rewards with a state use it to decide when to update the
                state.
        """


@dataclass(frozen=True)
class MeshGeometry:
    """Reward of the surface mesh of shapes.

    The mesh is extracted from the field again after every few steps. In the steps in between its vertices
    follow the field, so that the gradient of the reward reaches the field.
    """

    reader: MeshReader  # extracts meshes from a field, and converts them to patches of faces
    reward: MeshReward  # scores patches

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the surfaces of the shapes at a step."""
        # The reader extracts the surfaces again if the step requires it.
        return self.reward.score(self.reader(field, step), list(prompts))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the surfaces that were extracted last."""
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the surfaces that were extracted last."""
        self.reader.load_state_dict(state)


@dataclass(frozen=True)
class ObservedGeometry:
    """Geometry reward that `tools/train_reward.py` has trained on densities, depth maps or points.

    Its scores do not depend on the prompt.
    """

    reward: Reward

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the shapes."""
        del prompts, step
        return self.reward.score(field)


class SolidGeometry:
    """Geometry reward in closed form, which penalises floaters and leaks of the density.

    Its score is minus `solid_loss` over the entire cube, which is 0 for a physically valid solid. The score
    does not depend on the prompt.
    """

    def __call__(self, field: Field, prompts: Sequence[str], step: int) -> torch.Tensor:
        """Return the scores [A] of the shapes."""
        del prompts, step
        # The observation of `Solid` is minus the loss, [A, 1].
        return Solid(SlabSpec.from_bounds(field.bounds, Solid.spec.resolution)).observe(field)[:, 0]


@torch.no_grad()
def shuffle_weights(geometry: GeometryReward, seed: int) -> GeometryReward:
    """Return a copy of a learned geometry reward with shuffled weights, for the control "random".

    The entries of each weight tensor are permuted randomly within the tensor.

    Args:
        geometry: learned geometry reward, which is not changed.
        seed: seed of the permutations.
    Raises: ValueError if the reward has no learned weights.
    """
    if not isinstance(geometry, (MeshGeometry, ObservedGeometry)) or not isinstance(
        geometry.reward, torch.nn.Module
    ):
        raise ValueError(
            "+geometry-random cannot be used with a --geometry-reward in closed form, which has no weights to"
            " shuffle. Use a learned reward, or remove that arm from --compare."
        )
    shuffled_reward = copy.deepcopy(geometry.reward)
    # The permutations are generated on the CPU, so that they do not depend on the device.
    rng = torch.Generator().manual_seed(seed)
    for weight in shuffled_reward.parameters():
        permutation = torch.randperm(weight.numel(), generator=rng).to(weight.device)
        weight.copy_(weight.flatten()[permutation].view_as(weight))
    return dataclasses.replace(geometry, reward=shuffled_reward)


class ProgressiveGeometry:
    """Geometry reward whose gradient is added to that of the distillation, see the module's docstring.

    Args:
        reward: geometry reward.
        settings: settings of the geometry reward.
        step_count: number of steps of the run.
        sign: 1; or -1 to decrease the reward, for the control "inverted".
    Raises: ValueError if the settings leave no step with the reward.
    """

    def __init__(self, reward: GeometryReward, settings: GeometrySettings, step_count: int, sign: int = 1):
        self.reward = reward
        self.sign = sign
        self.balance = Balance()
        self.every = settings.geometry_every  # number of steps between two evaluations of the reward
        self.first_step = int(settings.geometry_start * step_count)  # first step that uses the reward
        if self.first_step >= step_count:
            raise ValueError(
                f"--set geometry_start={settings.geometry_start:g} leaves none of the {step_count} steps for"
                " the geometry reward. Use a value below 1."
            )
        self.alpha = Ramp(
            (self.first_step, settings.geometry_weight_from, settings.geometry_weight, step_count)
        )
        # [A], scores of the last evaluation; None before the first one.
        self.scores: torch.Tensor | None = None
        # Gradients of the last evaluation: index of a parameter -> [A, ...].
        self.reward_grads: dict[int, torch.Tensor] = {}

    def add(
        self, field: Field, parameters: Sequence[torch.nn.Parameter], prompts: Sequence[str], step: int
    ) -> dict[str, torch.Tensor]:
        """Add the gradient of the reward to the gradient of the distillation in `.grad` of the parameters.

        Nothing is computed or changed before the first step with the reward, and in steps whose weight alpha
        is 0.

        Args:
            field: density and colour of the shapes.
            parameters: parameters of the assets, [A, ...] each, with the gradient of the distillation.
            prompts: one prompt for each asset.
            step: number of the step in the run.
        Returns: dictionary from the name of a metric to a tensor, for the log. 'geometry' is the scores of
        the last evaluation, [A]. 'geometry_cosine' is the cosine between the descent directions of
        distillation and reward, [A]. 'geometry_alpha' is the weight alpha, [1]. The dictionary is empty if
        nothing was added.
        """
        # A `Ramp` has its first value before its first step, too, so that case is treated here.
        alpha = self.alpha(step) if step >= self.first_step else 0.0
        if alpha == 0:
            return {}
        # The reward is expensive, so its gradient is reused for `every` steps.
        if self.scores is None or step % self.every == 0:
            scores = self.sign * self.reward(field, prompts, step)
            # One backward pass of the sum is enough, because the score of an asset depends on its own
            # parameters only. allow_unused: a reward of the density has no gradient for the parameters of the
            # colours.
            gradients = torch.autograd.grad(scores.sum(), list(parameters), allow_unused=True)
            self.scores = scores.detach()
            self.reward_grads = {
                parameter_index: g.nan_to_num()
                for parameter_index, g in enumerate(gradients)
                if g is not None
            }
        device = parameters[0].device
        scores = self.scores
        reward_grads = {
            parameter_index: grad.to(device) for parameter_index, grad in self.reward_grads.items()
        }
        # A parameter without a gradient of the distillation counts as one with the gradient 0.
        distillation_grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        distillation_grad_norm = _norm(distillation_grads)  # [A]
        reward_grad_norm = (
            _norm(list(reward_grads.values())) if reward_grads else torch.zeros(len(scores), device=device)
        )
        # The balance makes the effect of alpha independent of the scale of the reward.
        reward_factors = alpha * self.balance(distillation_grad_norm, reward_grad_norm)  # [A]
        # Inner product of both gradients over all parameters, [A].
        inner_product = torch.zeros_like(reward_grad_norm)
        for parameter_index, grad in reward_grads.items():
            inner_product = inner_product + (distillation_grads[parameter_index] * grad).flatten(1).sum(dim=1)
            # Minus, because the optimiser descends along `.grad`, and the reward is to increase.
            parameters[parameter_index].grad = (
                distillation_grads[parameter_index]
                - reward_factors.view(-1, *[1] * (grad.ndim - 1)).to(grad) * grad
            )
        # Minus, because the direction in which the optimiser follows the reward is -g_r.
        cosine = -inner_product / (distillation_grad_norm * reward_grad_norm).clamp_min(1e-30)
        return {
            "geometry": scores.to(device),
            "geometry_cosine": cosine,
            "geometry_alpha": torch.tensor([alpha]),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the norms of the last steps, the result of the last evaluation, and the reward's state."""
        # Rewards without a state have no such method; dict() then gives an empty state.
        reward_state: dict[str, torch.Tensor] = getattr(self.reward, "state_dict", dict)()
        state_tensors = self.balance.state_dict()
        if self.scores is not None:
            state_tensors |= {"scores": self.scores}
            state_tensors |= {
                f"slope.{parameter_index}": grad for parameter_index, grad in self.reward_grads.items()
            }
        return state_tensors | {f"reward.{name}": tensor for name, tensor in reward_state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.balance.load_state_dict(state)
        self.scores = state.get("scores")
        self.reward_grads = {int(i): value.clone() for i, value in entries_below(state, "slope.").items()}
        if hasattr(self.reward, "load_state_dict"):
            self.reward.load_state_dict(entries_below(state, "reward."))


def _norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients [A, ...] of each asset together, [A]."""
    squared_norms = [gradient.flatten(1).square().sum(dim=1) for gradient in gradients]
    return torch.stack(squared_norms).sum(dim=0).sqrt()


# --- geometry rewards from files: a mesh reward (RewardCS), or a reward of density, depth or points from
# tools/train_reward.py


class NamedGeometry(NamedTuple):
    """Geometry reward that the option --geometry-reward selects by a name."""

    # Function that makes a new reward for each run, since some have a state.
    make: Callable[[], GeometryReward]
    priors: tuple[str, ...] = ()  # values of --prior with which it can be used; () for all


GEOMETRY_REWARDS: Registry[NamedGeometry] = Registry(
    "--geometry-reward",
    {
        "one-nose": "eg3d_rlhf.tuning.distill.scene_boxes",
        "floaters": "eg3d_rlhf.tuning.distill.scene_boxes",
    },
)

GEOMETRY_REWARDS.add("solid", NamedGeometry(SolidGeometry))


def load_geometry(name_or_path: str, prior: str, device: torch.device) -> Callable[[], GeometryReward] | None:
    """Return a function that makes the reward named by --geometry-reward, or None for the value none.

    Args:
        name_or_path: value of --geometry-reward: none; sigma, the bundled reward of densities; a name in
            GEOMETRY_REWARDS; or the path of a file.
        prior: value of --prior.
        device: device on which the reward computes.
    Raises: FileNotFoundError if there is no such file; ValueError if the reward does not fit the prior, or if
    the file contains no reward.
    """
    if name_or_path == "none":
        return None
    if name_or_path in GEOMETRY_REWARDS:
        named_geometry = GEOMETRY_REWARDS[name_or_path]
        if named_geometry.priors and prior not in named_geometry.priors:
            raise ValueError(
                f"--geometry-reward={name_or_path} works with --prior={' or '.join(named_geometry.priors)}"
                f" only, and not with {prior}. Use another reward, e.g. --geometry-reward=solid."
            )
        return named_geometry.make
    # A name in the registry takes precedence: a file called "solid" needs a path such as ./solid.
    path = bundled.REWARD if name_or_path == "sigma" else Path(name_or_path)
    with prefix_errors("--geometry-reward"):
        if not path.is_file():
            allowed_names = ", ".join(["none", "sigma", *GEOMETRY_REWARDS])
            raise FileNotFoundError(
                f"{name_or_path} is neither one of {allowed_names} nor the path of a file. Write one of these"
                " names, or the path of the file of a reward."
            )
        if _is_mesh_reward(path):
            mesh_reward = load_mesh_reward(path, device)
            # Each run gets a reader of its own, because a reader contains the surfaces of the run's assets.
            return lambda: MeshGeometry(
                MeshReader(cube(mesh_reward.resolution), mesh_reward.patches), mesh_reward
            )
        observed_reward = ObservedGeometry(load_reward(path, device))
    return lambda: observed_reward


def announce_geometry(name_or_path: str, use: RewardUse) -> None:
    """Print the accuracy on held-out labels that the file of --geometry-reward states.

    Args:
        name_or_path: value of --geometry-reward, which `load_geometry` has accepted.
        use: use of the reward.
    Raises: ValueError for a reward that is not above chance, unless the user accepted it.
    """
    # Rewards with a name in the registry have no labels.
    if name_or_path == "none" or name_or_path in GEOMETRY_REWARDS:
        return
    path = bundled.REWARD if name_or_path == "sigma" else Path(name_or_path)
    if _is_mesh_reward(path):
        announce_accuracy(read_meta(path, KIND)["provenance"], "--geometry-reward", use)
    else:
        announce_file(path, "--geometry-reward", use)


def _is_mesh_reward(path: Path) -> bool:
    """Return True if a file contains a mesh reward."""
    try:
        read_meta(path, KIND)
    except ValueError:
        return False
    return True
