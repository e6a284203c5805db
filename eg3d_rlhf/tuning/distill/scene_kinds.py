"""Registers the scenes that need no files, under their values of `--prior`.

This file does not import PyTorch, so that `--help` is fast.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.rewards import box_prompts

if TYPE_CHECKING:
    import torch

    from eg3d_rlhf.tuning.distill.config import DistillSettings
    from eg3d_rlhf.tuning.distill.scene import Scene


@dataclass(frozen=True, kw_only=True)
class SceneKind:
    """Functions that check the settings of a scene and open the scene, for a scene that needs no files.

    They are registered in SCENES, under the scene's value of --prior.
    """

    # Function that opens the scene on a device.
    open: "Callable[[DistillSettings, torch.device], Scene]"
    # Function that checks the prompts and fills in the defaults. Its arguments are the prompts, () for the
    # default; the number of assets of each prompt, None for the default; and True for a comparison of arms.
    # It returns the prompts and the number of assets of each prompt, and raises ValueError for a prompt that
    # the scene does not contain.
    check: Callable[[tuple[str, ...], int | None, bool], tuple[tuple[str, ...], int]]


HEADS = 8  # default number of heads
HEAD_SEEDS = 2  # default number of assets of each head in a comparison


def head_numbers(prompts: Sequence[str]) -> list[int]:
    """Return the number N of each prompt 'head N'. Raises: ValueError for a prompt of another form."""
    prompt_numbers = []
    for prompt in prompts:
        match = re.fullmatch(r"head (\d{1,4})", prompt)
        if match is None:
            raise ValueError(
                f"--prompt={prompt!r} is not a prompt of --prior=heads. Write 'head N' with a number N from 0"
                " to 9999."
            )
        prompt_numbers.append(int(match[1]))
    return prompt_numbers


# The bundled problem in closed form, and a U-Net that was trained on its samples.
PRIORS = (
    "bundled",
    "bundled-unet",
)


SCENES: Registry[SceneKind] = Registry("--prior", {})


def check_boxes(
    prompts: tuple[str, ...], asset_count: int | None, is_comparison: bool
) -> tuple[tuple[str, ...], int]:
    """Check the prompts of the bundled problem and fill in its defaults.

    Args:
        prompts: prompts; () for all prompts of the problem.
        asset_count: number of assets of each prompt; None for the default number, which is 5 in a
            comparison of all prompts, else 1.
        is_comparison: True for a comparison of arms.
    Returns: two results. The first is the prompts, and the second is the number of assets of each prompt.
    Raises: ValueError for a prompt that the problem does not contain.
    """
    for prompt in prompts:
        box_prompts.prompt_of(prompt)  # raises ValueError for an unknown prompt
    # `pairs` alternates between the two kinds of prompts; dict.fromkeys removes repeated prompts and keeps
    # the order.
    used_prompts = prompts or tuple(dict.fromkeys(prompt for prompt, _ in box_prompts.pairs(1)))
    default_asset_count = box_prompts.SEEDS if is_comparison and not prompts else 1
    return used_prompts, asset_count or default_asset_count


def check_heads(
    prompts: tuple[str, ...], asset_count: int | None, is_comparison: bool
) -> tuple[tuple[str, ...], int]:
    """Check the prompts of the scene of synthetic heads and fill in its defaults.

    Args:
        prompts: prompts of the form 'head N'; () for 'head 0' to 'head 7'.
        asset_count: number of assets of each prompt; None for the default number, which is 2 in a comparison
            of the default prompts, else 1.
        is_comparison: True for a comparison of arms.
    Returns: two results. The first is the prompts, and the second is the number of assets of each prompt.
    Raises: ValueError for a prompt of another form.
    """
    head_numbers(prompts)  # raises ValueError for a prompt of another form
    default_asset_count = HEAD_SEEDS if is_comparison and not prompts else 1
    return prompts or tuple(f"head {i}" for i in range(HEADS)), asset_count or default_asset_count


def open_boxes(settings: "DistillSettings", device: "torch.device") -> "Scene":
    """Open the scene of the bundled problem. Raises: ValueError if the settings do not fit the problem."""
    # Imported here and not above, because the module imports PyTorch, which would slow down --help.
    from eg3d_rlhf.tuning.distill.scene_boxes import bundled_scene

    return bundled_scene(settings, device)


def open_heads(settings: "DistillSettings", device: "torch.device") -> "Scene":
    """Open the scene of synthetic heads. Raises: ValueError if the settings do not fit the scene."""
    from eg3d_rlhf.tuning.distill.scene_heads import heads_scene

    return heads_scene(settings, device)


for _prior in PRIORS:
    SCENES.add(_prior, SceneKind(open=open_boxes, check=check_boxes))
SCENES.add("heads", SceneKind(open=open_heads, check=check_heads))
