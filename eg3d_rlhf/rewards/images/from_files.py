"""Load a reward of images from a file of one of the published networks, with checks of its inputs and scores.

Shape letters: B images, K noises.
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
    """Reward of images with checks of its inputs and outputs.

    Errors are one line that names flag and remedy.
    """

    def __init__(self, reward: RewardModel):
        self.reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        # An optional attribute of `RewardModel`.
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, 3, h, w] in 0..1, one prompt each.

        Raises: ValueError if the number of prompts is wrong, or images or scores are not valid.
        """
        if len(prompts) != len(pixels):
            raise ValueError(
                f"{FLAG}: expected one prompt per image, got {len(prompts)} prompts for {len(pixels)} images."
                " Repeat each prompt for all views."
            )
        # Views of an asset are adjacent, so a batch contains complete assets only.
        check_views(len(pixels), self.views, FLAG)
        check_pictures(pixels, FLAG)
        scores = self.reward.score(pixels, prompts)
        check_finite(scores, FLAG, "Use another file, or check the images.")
        return scores


def load_reward(path: str | Path, device: str | torch.device = "cpu") -> CheckedReward:
    """Load ImageReward, Reward3D or HPSv2 (a file, or a folder with one), or CLIP score (a transformers
    folder).

    The network is in eval mode. No code from a file is executed.
    Raises: FileNotFoundError; ValueError for files of other networks, in one line with flag and remedy.
    """
    path = existing(path, FLAG)
    if (path / "config.json").is_file():
        return CheckedReward(load_clip_score(_clip_folder(path), device))
    file = weights_of(path)
    # The names of the tensors decide which network it is, since file names differ between downloads.
    state = read(file, FLAG)
    # Both loaders check the state dict strictly.
    loaded: RewardModel = (load_blip_reward if _is_blip(state, file) else load_hpsv2)(file, state, device)
    return CheckedReward(loaded)


def weights_of(path: Path) -> Path:
    """Return the file itself, or the only file of weights in a folder.

    Raises: ValueError if there are several.
    """
    return only_file(path, WEIGHTS, FLAG, "config.json (CLIP) or one file of weights")


def reward_costs(path: str | Path, images: int, noises: int = 1) -> Costs:
    """Estimate the memory of a reward for a step of B images from the shapes in its file.

    K B images are scored, and B of them are back-propagated. No weights are loaded.
    """
    path = existing(path, FLAG)
    if (path / "config.json").is_file():
        require_extra(FLAG, "transformers")
        # Imported here, because transformers is an optional dependency.
        from transformers import CLIPConfig, CLIPModel

        # The configuration is enough: no weights are read.
        config = CLIPConfig(**json.loads((_clip_folder(path) / "config.json").read_text()))
        return _costs_of_clip(empty(lambda: CLIPModel(config)), images, noises)
    file = weights_of(path)
    state = read(file, FLAG)
    if _is_blip(state, file):
        blip = Reward3dNetwork.of(state, f"{FLAG}: {file.name}")
        return _costs(blip, blip.blip.seen, images, noises, blip.blip.side)
    return _costs_of_clip(hpsv2_network(state, f"{FLAG}: {file.name}"), images, noises)


def _costs_of_clip(clip: Any, images: int, noises: int) -> Costs:
    """Estimate the memory of a CLIP model. Only its image encoder grows with the number of images."""
    run = lambda x: clip.get_image_features(pixel_values=x)  # noqa: E731
    return _costs(clip, run, images, noises, clip.config.vision_config.image_size)


def _costs(network: torch.nn.Module, run: Any, images: int, noises: int, side: int) -> Costs:
    """Trace the network with tensors without storage, and return its weights and peaks of memory."""
    trace = MemoryTrace()
    trace.fill(network).eval().requires_grad_(False)

    def back():
        # Contents do not matter, because only shapes are traced.
        x = torch.empty(images, 3, side, side, requires_grad=True)
        out = run(x)
        return torch.autograd.grad(out, x, torch.empty_like(out))

    # Ranking noises needs scores without a gradient, for all K noises.
    def scored():
        with torch.no_grad():
            return run(torch.empty(noises * images, 3, side, side))

    stages = {
        f"score {noises * images} images of {side}^2": scored,
        f"score {images} of them, and back": back,
    }
    return Costs(
        weights={"reward, float32": weight_row(network)},
        stages={name: trace.peak_of(stage) for name, stage in stages.items()},
    )


def _clip_folder(path: Path) -> Path:
    """Return the path if it is a folder of a CLIP model. Raises: ValueError for other models."""
    # transformers writes the model's type into every configuration.
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise ValueError(
            f"{FLAG}: expected a folder of transformers' CLIPModel, got model_type {kind!r} in {path}. Pass a"
            " folder of a CLIP model."
        )
    return path


def _is_blip(state: dict[str, torch.Tensor], file: Path) -> bool:
    """Return True for a file of ImageReward or Reward3D, False for HPSv2.

    Raises: ValueError for other files.
    """
    # ImageReward and Reward3D prefix their trunk with blip.; HPSv2 has open_clip's names.
    blip = any(name.startswith("blip.") for name in state)
    clip = "visual.conv1.weight" in state
    if not blip and not clip:
        known = "ImageReward (blip.*), Reward3D (blip.*) or HPSv2 (visual.*)"
        raise ValueError(
            f"{FLAG}: expected {known} in {file.name}, got a file with {', '.join(sorted(state)[:3])}. Pass"
            " the file of one of these networks."
        )
    return blip
