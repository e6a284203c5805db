"""Registers the problems that need no files, under the names that `--prior` has. This file imports no
PyTorch, so that `--help` is fast.
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
    """A problem that needs no files. Its module adds one to SCENES, under its name for --prior."""

    open: "Callable[[DistillSettings, torch.device], Scene]"
    check: Callable[[tuple[str, ...], int | None, bool], tuple[tuple[str, ...], int]]
    """Takes prompts, number of assets per prompt (or None) and True for a comparison of arms. Returns prompts
    and number, with the problem's defaults if none are given. Raises: ValueError.
    """


# Defaults of a comparison on heads.
HEADS = 8
HEAD_SEEDS = 2  # number of assets of each head


def head_numbers(prompts: Sequence[str]) -> list[int]:
    """Return the numbers of prompts 'head N'. Raises: ValueError for another prompt."""
    matches = [re.fullmatch(r"head (\d{1,4})", prompt) for prompt in prompts]
    for prompt, match in zip(prompts, matches, strict=True):
        if match is None:
            raise ValueError(
                f"--prompt: expected 'head N' with a number up to 9999 for --prior=heads, got {prompt!r}."
                " Correct it."
            )
    return [int(match[1]) for match in matches if match is not None]


PRIORS = ("bundled", "bundled-unet")  # in closed form; trained on samples of it


SCENES: Registry[SceneKind] = Registry("--prior", {})


def check_boxes(
    prompts: tuple[str, ...], assets: int | None, comparison: bool
) -> tuple[tuple[str, ...], int]:
    """Return prompts and number of assets per prompt, with the bundled problem's defaults if none are given.

    Raises: ValueError for an unknown prompt.
    """
    for text in prompts:
        box_prompts.prompt_of(text)
    # Both kinds of prompts in turn, in the order of the default problem.
    chosen = prompts or tuple(dict.fromkeys(text for text, _ in box_prompts.pairs(1)))
    return chosen, assets or (box_prompts.SEEDS if comparison and not prompts else 1)


def check_heads(
    prompts: tuple[str, ...], assets: int | None, comparison: bool
) -> tuple[tuple[str, ...], int]:
    """Return prompts and number of assets per prompt; 'head 0' and following by default.

    Raises: ValueError for another prompt.
    """
    head_numbers(prompts)
    return prompts or tuple(f"head {i}" for i in range(HEADS)), assets or (
        HEAD_SEEDS if comparison and not prompts else 1
    )


def open_boxes(settings: "DistillSettings", device: "torch.device") -> "Scene":
    """Open the bundled problem; its module imports PyTorch."""
    # Checks of flags and --help run without PyTorch, so it is imported here.
    from eg3d_rlhf.tuning.distill.scene_boxes import bundled_scene

    return bundled_scene(settings, device)


def open_heads(settings: "DistillSettings", device: "torch.device") -> "Scene":
    """Open the problem on heads of people; its module imports PyTorch."""
    from eg3d_rlhf.tuning.distill.scene_heads import heads_scene

    return heads_scene(settings, device)


for _prior in PRIORS:
    SCENES.add(_prior, SceneKind(open=open_boxes, check=check_boxes))
SCENES.add("heads", SceneKind(open=open_heads, check=check_heads))
