"""A reward of pictures from a path: which of the published files it is, with checks at its edge.

Shape letters: B pictures.
"""

import json
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.interfaces import RewardModel, check_finite, check_pictures, check_views
from eg3d_rlhf.core.memory import Costs, MemoryTrace, weight_row
from eg3d_rlhf.models.clip import FLAG, hpsv2_network, load_clip_score, load_hpsv2
from eg3d_rlhf.models.weights import empty, existing, only_file, read, require_extra
from eg3d_rlhf.rewards.images.reward3d import Reward3dNetwork, load_blip_reward

WEIGHTS = (".pt", ".pth", ".safetensors")


class CheckedReward:
    """Any reward of pictures, with checks at its edge: one line that names flag and remedy."""

    def __init__(self, reward: RewardModel):
        self.reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores [B] of pictures [B, 3, h, w] in 0..1. Raises: ValueError."""
        if len(prompts) != len(pixels):
            raise ValueError(
                f"{FLAG}: expected one prompt per picture, got {len(prompts)} for {len(pixels)}. Repeat them"
                " per view."
            )
        check_views(len(pixels), self.views, FLAG)
        check_pictures(pixels, FLAG)
        scores = self.reward.score(pixels, prompts)
        check_finite(scores, FLAG, "Use another file, or look at the pictures.")
        return scores


def load_reward(path: str | Path, device: str | torch.device = "cpu") -> CheckedReward:
    """ImageReward, Reward3D or HPSv2 (a file, or a folder with one), or CLIP score (a transformers folder).
    In eval mode, with checks.

    Raises: FileNotFoundError; ValueError for foreign files: one line with flag and remedy. Nothing in a file
        is run.
    """
    path = existing(path, FLAG)
    if (path / "config.json").is_file():
        return CheckedReward(load_clip_score(_clip_folder(path), device))
    file = weights_of(path)
    state = read(file, FLAG)
    loaded: RewardModel = (load_blip_reward if _is_blip(state, file) else load_hpsv2)(file, state, device)
    return CheckedReward(loaded)


def weights_of(path: Path) -> Path:
    """A file, or the only one of a folder. Raises: ValueError."""
    return only_file(path, WEIGHTS, FLAG, "config.json (CLIP) or one file of weights")


def reward_costs(path: str | Path, pictures: int, noises: int = 1) -> Costs:
    """What a reward will hold in memory for a step of B pictures, from its file's shapes alone: K B of them
    scored, B back-propagated.
    """
    path = existing(path, FLAG)
    if (path / "config.json").is_file():
        require_extra(FLAG, "transformers")
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig(**json.loads((_clip_folder(path) / "config.json").read_text()))
        return _costs_of_clip(empty(lambda: CLIPModel(config)), pictures, noises)
    file = weights_of(path)
    state = read(file, FLAG)
    if _is_blip(state, file):
        blip = Reward3dNetwork.of(state, f"{FLAG}: {file.name}")
        return _costs(blip, blip.blip.seen, pictures, noises, blip.blip.side)
    return _costs_of_clip(hpsv2_network(state, f"{FLAG}: {file.name}"), pictures, noises)


def _costs_of_clip(clip: Any, pictures: int, noises: int) -> Costs:
    run = lambda x: clip.get_image_features(pixel_values=x)  # noqa: E731
    return _costs(clip, run, pictures, noises, clip.config.vision_config.image_size)


def _costs(network: torch.nn.Module, run: Any, pictures: int, noises: int, side: int) -> Costs:
    trace = MemoryTrace()
    trace.fill(network).eval().requires_grad_(False)

    def back():
        x = torch.empty(pictures, 3, side, side, requires_grad=True)
        out = run(x)
        return torch.autograd.grad(out, x, torch.empty_like(out))

    def scored():
        with torch.no_grad():
            return run(torch.empty(noises * pictures, 3, side, side))

    stages = {
        f"score {noises * pictures} pictures of {side}^2": scored,
        f"score {pictures} of them, and back": back,
    }
    return Costs(
        weights={"reward, float32": weight_row(network)},
        stages={name: trace.peak_of(stage) for name, stage in stages.items()},
    )


def _clip_folder(path: Path) -> Path:
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise ValueError(
            f"{FLAG}: expected a folder of transformers' CLIPModel, got model_type {kind!r} in {path}. Use a"
            " CLIP folder."
        )
    return path


def _is_blip(state: dict[str, torch.Tensor], file: Path) -> bool:
    """Whether the file is ImageReward's or Reward3D's, not HPSv2's. Raises: ValueError for neither."""
    blip = any(name.startswith("blip.") for name in state)
    clip = "visual.conv1.weight" in state
    if not blip and not clip:
        known = "ImageReward (blip.*), Reward3D (blip.*) or HPSv2 (visual.*)"
        raise ValueError(
            f"{FLAG}: expected {known} in {file.name}, got {', '.join(sorted(state)[:3])}. Is it another"
            " network's file?"
        )
    return blip
