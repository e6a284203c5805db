"""Defines the bundled problem as a scene: box heads and emblems in four views. The prior is a mixture of
Gaussians in closed form, or a U-Net that was trained on its samples. Rewards are analytic, and the evaluator
uses other information than they do.

Letters: A assets.
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
from eg3d_rlhf.rewards.images.pairwise_evaluators import AssetJudge, YesNoJudge, emblem_sides, plausibility
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.guidance.geometry import GEOMETRY_REWARDS, NamedGeometry, load_geometry
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.priors.tiny_unet import load_view_prior
from eg3d_rlhf.tuning.distill.scene import Scene
from eg3d_rlhf.tuning.distill.scene_kinds import PRIORS

REWARD = "one-face"
REWARDS: dict[str, Callable] = {
    "one-face": analytic.OneFace,
    "mode-distance": analytic.ModeDistance,
    "mean-pixel": analytic.MeanPixel,
}
# Standard deviations of the components about a mode, in latents of -1..1.
_NARROW = 0.1
_BROAD = 1.0
_NEVER = -60.0  # logit of a component that a prompt does not have: its probability is practically 0


def mixture() -> GmmPrior:
    """Make the mixture: every mode is a narrow and a broad component. A prompt consists of its two narrow
    components with equal weights, the null prompt of all broad ones.

    With the broad null prompt, e(text) - e(null) points to the modes. DreamDPO's push away from the loser has
    no other term that keeps images near them.
    """
    modes = problem.modes()
    # Logits of the 2 k components: the first k are narrow, the others broad.
    k = len(modes)
    # Null prompt: no narrow component, all broad ones with equal weight.
    embeddings = {"": torch.cat([torch.full((k,), _NEVER), torch.zeros(k)])}
    for i, prompt in enumerate(box_prompts.PROMPTS):
        embeddings[prompt.text] = torch.full((2 * k,), _NEVER)
        # Modes 2 i and 2 i + 1 are the two solutions of prompt i.
        embeddings[prompt.text][2 * i : 2 * i + 2] = 0
    # Modes [2 k, C, H, W] in the order of the logits.
    return GmmPrior(modes.repeat(2, 1, 1, 1), torch.tensor([_NARROW] * k + [_BROAD] * k), embeddings)


def bundled_scene(settings: DistillSettings, device: torch.device) -> Scene:
    """Open the bundled problem. Raises: ValueError for another device, reward or judge."""
    if device.type != "cpu":
        raise ValueError(
            f"--device: the bundled prior runs on cpu only, got {device}. Its problem is too small for a"
            " GPU. Use --device=cpu."
        )
    exact = mixture()
    name = settings.scene.reward
    judge = settings.scene.judge
    # The exact mixture is made in both cases: it gives the log density for the drift.
    learned = settings.scene.prior == "bundled-unet"
    if name is not None and name not in REWARDS:
        raise ValueError(
            f"--reward: expected one of {', '.join(REWARDS)} with the bundled prior, got {name}. Choose one"
            " of them."
        )
    if judge not in (None, "questions"):
        raise ValueError(
            f"--judge: expected questions with the bundled prior, got {judge}. Use that, or remove --judge."
        )
    return Scene(
        prior=load_view_prior() if learned else exact,
        renderer=FourViews(),
        views=problem.SIDES,
        start=problem.start,
        reward=None if name is None else cast(RewardModel, REWARDS[name]()),
        judge=None if judge is None else YesNoJudge(),
        geometry=load_geometry(settings.scene.geometry_reward, settings.scene.prior, device),
        measures=measures,
        evaluator=AssetJudge(),
        evaluator_description=(
            "it counts the noses on the surface, and the number closer to one wins; for boxes, the number"
            " of sides with the preferred emblem; then the distance to the prior's modes. It trains nothing"
        ),
        background=torch.zeros(3),
        log_prob=lambda x, prompts: exact.log_prob(x, exact.embed(prompts)),
        inputs={"prior": VIEW_PRIOR} if learned else {},
    )


@torch.no_grad()
def measures(asset: Asset, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Measure finished assets: noses of heads, preferred sides of boxes, RMS difference of images to the
    nearest modes of the prior. Returns: name -> [A].
    """
    heads = torch.tensor([box_prompts.prompt_of(text).kind == "janus" for text in prompts])
    # [A] noses on the surface, for all assets; only those of heads are used.
    counts = noses(asset).cpu()
    shares = {
        name: hit.double()
        for name, hit in (("no nose", counts == 0), ("one nose", counts == 1), ("more", counts > 1))
    }
    # Shares over assets become rates in a table: each asset contributes 0 or 1, and NaN for the other kind.
    return {
        **{name: torch.where(heads, share, torch.nan) for name, share in shares.items()},
        "preferred sides": torch.where(heads, torch.nan, emblem_sides(asset, prompts) / problem.SIDES),
        "rms": -plausibility(asset)(prompts).double(),  # plausibility is minus the difference
    }


GEOMETRY_REWARDS.add("one-nose", NamedGeometry(analytic.OneNose, PRIORS))
GEOMETRY_REWARDS.add("floaters", NamedGeometry(analytic.Floaters, PRIORS))
