"""Load a published reward of images from its file, and check its inputs and scores.

Supported are ImageReward (arXiv 2304.05977), Reward3D (arXiv 2403.14613), HPSv2 (arXiv 2306.09341) and CLIP
score (arXiv 2104.08718).

Shapes: B images; K noises per image. A training step scores the images of all K noises, and uses the noise
whose image has the best score.
"""

import json
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.interfaces import RewardModel, check_finite, check_images, check_views
from eg3d_rlhf.core.memory import Costs, MemoryTrace, weight_row
from eg3d_rlhf.models.clip import FLAG, hpsv2_network, load_clip_score, load_hpsv2
from eg3d_rlhf.models.weights import empty, only_file, read, require_extra
from eg3d_rlhf.rewards.images.reward3d import Reward3dNetwork, load_blip_reward
from training.input_paths import existing_path

WEIGHTS = (".pt", ".pth", ".safetensors")


class CheckedReward:
    """Reward of images that checks the inputs and the scores of another reward.

    Args: reward: the reward to check.
    """

    def __init__(self, reward: RewardModel):
        self.reward = reward
        self.modality = reward.modality
        self.views = reward.views
        self.differentiable = reward.differentiable
        # `view_prompts` is an optional attribute of `RewardModel`.
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, 3, h, w] in 0..1.

        Args:
            pixels: images.
            prompts: prompt of each image.
        Raises: ValueError if the number of prompts is wrong, or if images or scores are not valid.
        """
        if len(prompts) != len(pixels):
            raise ValueError(
                f"{FLAG}: expected one prompt per image, got {len(prompts)} prompts for {len(pixels)} images."
                " Repeat the prompt of an asset for each of its views."
            )
        # The views of an asset must be adjacent and complete.
        check_views(len(pixels), self.views, FLAG)
        check_images(pixels, FLAG)
        scores = self.reward.score(pixels, prompts)
        check_finite(scores, FLAG, "Use another file, or check the images.")
        return scores


def load_reward(path: str | Path, device: str | torch.device = "cpu") -> CheckedReward:
    """Load ImageReward, Reward3D, HPSv2 or CLIP score, in eval mode. No code from a file is executed.

    Args:
        path: path of the reward. ImageReward, Reward3D and HPSv2 are a file, or a folder that contains this
            file. CLIP score is a folder of the library transformers.
        device: device of the network.
    Raises: FileNotFoundError if the path does not exist; ValueError for a file of any other network.
    """
    path = existing_path(path, FLAG)
    if (path / "config.json").is_file():
        return CheckedReward(load_clip_score(_clip_folder(path), device))
    weights_file = weights_of(path)
    # The network is recognised by the names of its tensors, since file names differ between downloads.
    state_dict = read(weights_file, FLAG)
    # Both loaders check the state dict strictly.
    load_network: Any = load_blip_reward if _is_blip(state_dict, weights_file) else load_hpsv2
    reward: RewardModel = load_network(weights_file, state_dict, device)
    return CheckedReward(reward)


def weights_of(path: Path) -> Path:
    """Return the file of weights: the path itself, or the only file of weights in the folder `path`.

    Raises: ValueError if the folder contains no file of weights, or several files.
    """
    return only_file(path, WEIGHTS, FLAG, "config.json (CLIP) or one file of weights")


def reward_costs(path: str | Path, image_count: int, noises_per_image: int = 1) -> Costs:
    """Estimate the memory that a reward needs for a training step, from the shapes in its file.

    A step scores K B images, and back-propagates through B of them. No weights are loaded.

    Args:
        path: path of the reward, see `load_reward`.
        image_count: number of images, B.
        noises_per_image: number of noises per image, K.
    """
    path = existing_path(path, FLAG)
    if (path / "config.json").is_file():
        require_extra(FLAG, "transformers")
        # transformers is an optional dependency, so it is imported only here.
        from transformers import CLIPConfig, CLIPModel

        # The configuration states all shapes.
        clip_config = CLIPConfig(**json.loads((_clip_folder(path) / "config.json").read_text()))
        return _clip_costs(empty(lambda: CLIPModel(clip_config)), image_count, noises_per_image)
    weights_file = weights_of(path)
    state_dict = read(weights_file, FLAG)
    if _is_blip(state_dict, weights_file):
        blip_network = Reward3dNetwork.from_state_dict(state_dict, f"{FLAG}: {weights_file.name}")
        return _costs(
            blip_network,
            blip_network.blip.encode_images,
            image_count,
            noises_per_image,
            blip_network.blip.side,
        )
    return _clip_costs(
        hpsv2_network(state_dict, f"{FLAG}: {weights_file.name}"), image_count, noises_per_image
    )


def _clip_costs(clip: Any, image_count: int, noises_per_image: int) -> Costs:
    """Estimate the memory of a CLIP model's weights, and of its image encoder in a training step.

    Args:
        clip: CLIP model on the meta device.
        image_count: number of images, B.
        noises_per_image: number of noises per image, K.
    """

    def encode_images(image_batch: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of a batch of images [N, 3, side, side]."""
        return clip.get_image_features(pixel_values=image_batch)

    return _costs(clip, encode_images, image_count, noises_per_image, clip.config.vision_config.image_size)


def _costs(
    network: torch.nn.Module, encode_images: Any, image_count: int, noises_per_image: int, side: int
) -> Costs:
    """Estimate the memory of a network's weights and the peak memory of a training step.

    The network is run with tensors that have shapes but no storage.

    Args:
        network: network on the meta device.
        encode_images: function from images [N, 3, side, side] to their embeddings.
        image_count: number of images, B.
        noises_per_image: number of noises per image, K.
        side: pixels per edge of the network's input.
    """
    trace = MemoryTrace()
    trace.fill(network).eval().requires_grad_(False)

    def score_with_gradient():
        """Score B images, and compute the gradient of the images."""
        # The values do not matter, because only shapes are traced.
        images_with_gradient = torch.empty(image_count, 3, side, side, requires_grad=True)
        embedding = encode_images(images_with_gradient)
        return torch.autograd.grad(embedding, images_with_gradient, torch.empty_like(embedding))

    def score_without_gradient():
        """Score the images of all K noises, to choose the best noise."""
        with torch.no_grad():
            return encode_images(torch.empty(noises_per_image * image_count, 3, side, side))

    # The keys are shown to the user.
    stage_functions = {
        f"score {noises_per_image * image_count} images of {side}^2 pixels": score_without_gradient,
        f"score {image_count} of these images with a gradient": score_with_gradient,
    }
    return Costs(
        weights={"reward, float32": weight_row(network)},
        stages={stage_name: trace.peak_of(run_stage) for stage_name, run_stage in stage_functions.items()},
    )


def _clip_folder(path: Path) -> Path:
    """Return the path unchanged if it is a folder of a CLIP model.

    Raises: ValueError for a folder of any other model.
    """
    # transformers writes the type of the model into every configuration.
    model_type = json.loads((path / "config.json").read_text()).get("model_type")
    if model_type != "clip":
        raise ValueError(
            f"{FLAG}: {path} contains a model of type {model_type!r}, which is not supported. Pass a folder"
            " of transformers' CLIPModel, whose config.json states model_type 'clip'."
        )
    return path


def _is_blip(state_dict: dict[str, torch.Tensor], weights_file: Path) -> bool:
    """Return True for a file of ImageReward or Reward3D, and False for a file of HPSv2.

    Args:
        state_dict: contents of the file.
        weights_file: path of the file, for the message.
    Raises: ValueError for a file of any other network.
    """
    # In files of ImageReward and Reward3D, the names of the trunk's tensors begin with "blip.". HPSv2 has the
    # names of open_clip.
    is_blip = any(name.startswith("blip.") for name in state_dict)
    is_hpsv2 = "visual.conv1.weight" in state_dict
    if not is_blip and not is_hpsv2:
        raise ValueError(
            f"{FLAG}: expected a file of ImageReward (tensors blip.*), Reward3D (blip.*) or HPSv2 (visual.*),"
            f" but {weights_file.name} has the tensors {', '.join(sorted(state_dict)[:3])}, ... Pass the file"
            " of one of these networks."
        )
    return is_blip
