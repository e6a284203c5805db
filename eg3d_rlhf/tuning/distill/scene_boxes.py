"""Defines the scene of the bundled toy problem: heads made of boxes, and boxes with emblems, in four views.

The prior is a mixture of Gaussians in closed form, or a U-Net that was trained on its samples. The rewards
are in closed form. The held-out evaluator uses other information than the rewards.

Shapes: A = number of assets; B images; C, H, W channels, rows and columns of images; k modes of all prompts.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch

from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.core.interfaces import RewardModel
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.boxes import noses
from eg3d_rlhf.rewards.images import analytic
from eg3d_rlhf.rewards.images.pairwise_evaluators import (
    AssetEvaluator,
    YesNoEvaluator,
    emblem_sides,
    plausibility,
    problem_questions,
)
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.guidance.geometry import GEOMETRY_REWARDS, NamedGeometry, load_geometry
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.priors.tiny_unet import load_view_prior
from eg3d_rlhf.tuning.distill.scene import Scene
from eg3d_rlhf.tuning.distill.scene_kinds import PRIORS
from eg3d_rlhf.tuning.distill.served_judge import served_judge

REWARD = "one-face"  # default value of --reward
REWARDS: dict[str, Callable] = {  # value of --reward -> class of the reward
    "one-face": analytic.OneFace,
    "mode-distance": analytic.ModeDistance,
    "mean-pixel": analytic.MeanPixel,
}
# Standard deviations of the narrow and the broad component about a mode, in latents of -1..1.
_NARROW = 0.1
_BROAD = 1.0
_NEVER = -60.0  # logit of a component that a prompt does not contain; its probability is practically 0


def mixture() -> GmmPrior:
    """Make the prior, a mixture of Gaussians in closed form.

    About every mode there is a narrow and a broad component of the mixture. The distribution of a prompt
    consists of the narrow components of its two modes, with equal weights. The distribution of the null
    prompt consists of all broad components.

    Because the null prompt is broad, the difference e(text) - e(null) of the noises that classifier-free
    guidance combines points to the modes of the prompt. DreamDPO needs this: without guidance, no term of its
    gradient keeps images near the modes.
    """
    modes = problem.modes()  # [k, C, H, W]
    mode_count = len(modes)
    # An embedding contains the logits of 2 k components: first k narrow components, then k broad components.
    # "" is the null prompt.
    embeddings = {"": torch.cat([torch.full((mode_count,), _NEVER), torch.zeros(mode_count)])}
    for i, prompt in enumerate(box_prompts.PROMPTS):
        embeddings[prompt.text] = torch.full((2 * mode_count,), _NEVER)
        # Modes 2 i and 2 i + 1 belong to prompt i.
        embeddings[prompt.text][2 * i : 2 * i + 2] = 0
    # The modes are repeated for the narrow and the broad components, [2 k, C, H, W].
    return GmmPrior(
        modes.repeat(2, 1, 1, 1), torch.tensor([_NARROW] * mode_count + [_BROAD] * mode_count), embeddings
    )


def bundled_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the scene of the bundled problem.

    Args:
        settings: settings of the run.
        device: device of the run, which has to be the CPU.
    Raises: ValueError for another device, or for a reward or judge that the problem does not have.
    """
    if device.type != "cpu":
        raise ValueError(
            f"--device={device} cannot be used with the bundled prior, which is too small for a GPU. Use"
            " --device=cpu."
        )
    # With bundled-unet the exact mixture is needed, too: it gives the log density by which the drift is
    # measured.
    exact_prior = mixture()
    reward_name = settings.scene.reward
    judge = settings.scene.judge
    uses_unet = settings.scene.prior == "bundled-unet"
    if reward_name is not None and reward_name not in REWARDS:
        raise ValueError(
            f"--reward={reward_name} cannot be used with the bundled prior. Use one of {', '.join(REWARDS)}."
        )
    if judge not in (None, "questions") and not settings.scene.has_served_judge:
        raise ValueError(
            f"--judge={judge} is neither questions nor the address of a server. Use --judge=questions, or an"
            " address such as http://127.0.0.1:8000/v1."
        )
    return Scene(
        prior=load_view_prior() if uses_unet else exact_prior,
        renderer=FourViews(),
        views=problem.SIDES,
        start=problem.start,
        reward=None if reward_name is None else cast(RewardModel, REWARDS[reward_name]()),
        judge=YesNoEvaluator() if judge == "questions" else served_judge(settings.scene, problem_questions),
        geometry=load_geometry(settings.scene.geometry_reward, settings.scene.prior, device),
        measures=measures,
        evaluator=AssetEvaluator(),
        evaluator_description=(
            "it counts the noses on the surface of a head, and prefers the number closer to one; for boxes it"
            " counts the sides with the preferred emblem; assets with equal counts are compared by their"
            " distance to the prior's modes. It is not used in training"
        ),
        background=torch.zeros(3),
        log_prob=lambda x, prompts: exact_prior.log_prob(x, exact_prior.embed(prompts)),
        inputs={"prior": VIEW_PRIOR} if uses_unet else {},
    )


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Measure finished assets.

    The measures are:

    - "no nose", "one nose" and "more": 1 if a synthetic head has this number of noses, else 0; NaN for boxes.
    - "preferred sides": share of the sides of a box with the preferred emblem; NaN for heads.
    - "rms": root mean square difference between the images and the prior's nearest modes.

    Args:
        asset: the assets, [A].
        prompts: one prompt for each asset.
    Returns: dictionary from the name of a measure to a tensor with one value for each asset, [A].
    """
    is_head = torch.tensor([box_prompts.prompt_of(prompt).kind == "janus" for prompt in prompts])
    nose_counts = noses(asset).cpu()  # [A], also of boxes, for which they are not used
    mask_by_measure = {"no nose": nose_counts == 0, "one nose": nose_counts == 1, "more": nose_counts > 1}
    return {
        **{
            measure_name: torch.where(is_head, has_nose_count.double(), torch.nan)
            for measure_name, has_nose_count in mask_by_measure.items()
        },
        "preferred sides": torch.where(is_head, torch.nan, emblem_sides(asset, prompts) / problem.SIDES),
        "rms": -plausibility(asset)(prompts).double(),  # plausibility is minus this difference
    }


GEOMETRY_REWARDS.add("one-nose", NamedGeometry(analytic.OneNose, PRIORS))
GEOMETRY_REWARDS.add("floaters", NamedGeometry(analytic.Floaters, PRIORS))
