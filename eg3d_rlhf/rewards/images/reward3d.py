"""ImageReward (arXiv 2304.05977) and Reward3D (arXiv 2403.14613), loaded from their published files.

Both networks compute a score from BLIP features (arXiv 2201.12086) of an image and its prompt. The MLP has no
activation between its layers, because the published weights were trained without one. Both networks are
always used in eval mode, without dropout. The released guidance code switches dropout on by accident
(Lightning's train()), which makes the gradients noisy.

Shapes: B images, V = 4 views of an asset (adjacent in a batch), D width of the features, T tokens. A is the
number of assets.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from eg3d_rlhf.core.interfaces import Modality
from eg3d_rlhf.models.blip import Blip, BlipSizes, from_published
from eg3d_rlhf.models.clip_inputs import Tokenize, bert_tokenizer, clip_preprocess
from eg3d_rlhf.models.weights import adopt, empty, freeze, read

# Mean and standard deviation of raw scores, with which the published code standardises scores. For
# CrossViewFusion the published standard deviation is 5.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
FUSION_STD = 5.0
VIEWS = 4
# Largest length of a prompt in tokens, including the special tokens. Longer prompts are cut.
TOKENS = {"ImageReward": 35, "Scorer": 100, "CrossViewFusion": 100}
Kind = Literal["ImageReward", "Scorer", "CrossViewFusion"]


class RewardMlp(nn.Module):
    """Linear layers of the sizes D - 1024 - 128 - 64 - 16 - 1, with dropout after the first three layers.

    Args: width: width D of the input features.
    """

    def __init__(self, width: int):
        super().__init__()
        # Dropout layers are inactive in eval mode, but the names of published state dicts count them.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute raw scores [B, 1] from features [B, D]."""
        return self.layers(features)

    def hidden(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the output [B, 128] of the second linear layer from features [B, D]."""
        # layers[:3] are Linear, Dropout, Linear.
        return self.layers[:3](features)


class ViewScorer(nn.Module):
    """Output head that maps the hidden layers of four views to one raw score per asset."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(VIEWS * 128, 256)
        self.fc2 = nn.Linear(256, 64)
        self.fc3 = nn.Linear(64, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute raw scores [A, 1] from the concatenated hidden layers [A, 4 * 128] of four views."""
        return self.fc3(self.fc2(self.fc1(hidden)))


class CrossViewAdapter(nn.Module):
    """Attention between the four views of an asset, followed by a gate and the mean over views.

    Args: width: width D of the features, a multiple of 12.
    """

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads=12, batch_first=True)
        self.fusion_gate = nn.Sequential(nn.Linear(2 * width, width), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Fuse the features of the views of each asset: [A, V, D] -> [A, D].

        The result is the mean over views of gate * attended + (1 - gate) * feature, where attended is the
        result of the attention, and gate = sigmoid(Linear [feature, attended]).
        """
        # Each view attends to all four views of its asset, [A, V, D].
        attended_features, _ = self.self_attn(features, features, features, need_weights=False)
        gate = self.fusion_gate(torch.cat([features, attended_features], -1))
        return (gate * attended_features + (1 - gate) * features).mean(1)


class Reward3dNetwork(nn.Module):
    """Network of ImageReward or Reward3D: BLIP and an output head.

    The names of its modules are those of the published state dicts.

    Args:
        kind: name of the network. "ImageReward" scores each image separately. "Scorer" and "CrossViewFusion"
            are the two networks of Reward3D, which score four views together.
        sizes: sizes of BLIP.
    """

    def __init__(self, kind: Kind, sizes: BlipSizes):
        super().__init__()
        self.kind = kind
        self.blip = Blip(sizes)
        self.mlp = RewardMlp(sizes.text_width)
        if kind == "Scorer":
            # The published state dict writes this name with a capital letter.
            self.Scorer = ViewScorer()
        elif kind == "CrossViewFusion":
            self.cross_view_adapter = CrossViewAdapter(sizes.text_width)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Compute scores from BLIP features [B, D]: (raw score - mean) / standard deviation. Differentiable.

        The result is [B] for ImageReward, and [A] for Reward3D, one score per asset.
        """
        if self.kind == "ImageReward":
            return (self.mlp(features)[:, 0] - MEAN) / STD
        # The views of an asset are adjacent, so the batch is divided into assets: [B, ...] -> [A, V, ...].
        if self.kind == "Scorer":
            hidden = self.mlp.hidden(features).unflatten(0, (-1, VIEWS)).flatten(1)  # [A, 4 * 128]
            return (self.Scorer(hidden)[:, 0] - MEAN) / STD
        fused_features = self.cross_view_adapter(features.unflatten(0, (-1, VIEWS)))  # [A, D]
        return (self.mlp(fused_features)[:, 0] - MEAN) / FUSION_STD

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], message_prefix: str
    ) -> "Reward3dNetwork":
        """Create the network that matches the names and shapes of a state dict, on the meta device.

        Args:
            state_dict: state dict of a published file.
            message_prefix: start of the messages, which names flag and file.
        Raises: ValueError for a state dict of any other network.
        """
        sizes = BlipSizes.from_state(state_dict, message_prefix)
        # All three networks contain BLIP, so the names of the output heads decide which network it is.
        network_kind: Kind = "Scorer" if "Scorer.fc1.weight" in state_dict else "ImageReward"
        if any(name.startswith("cross_view_adapter.") for name in state_dict):
            network_kind = "CrossViewFusion"
            # The published adapter has 12 attention heads.
            if sizes.text_width % 12:
                raise ValueError(
                    f"{message_prefix}: expected a text width that is a multiple of the 12 attention heads,"
                    f" got {sizes.text_width}. Pass the published file of Reward3D."
                )
        return empty(lambda: cls(network_kind, sizes))


class BlipReward:
    """ImageReward or Reward3D as a reward of images, in eval mode.

    Args:
        network: network of the reward.
        tokenize: function from prompts to token indices [B, T] and a mask [B, T].
        device: device of the network.
    """

    differentiable = True

    def __init__(self, network: Reward3dNetwork, tokenize: Tokenize, device: str | torch.device = "cpu"):
        # Sets eval mode and switches off gradients of parameters, in place.
        freeze(network, device)
        self.network = network
        self.tokenize = tokenize
        self.device = torch.device(device)
        self.views = 1 if network.kind == "ImageReward" else VIEWS
        self.modality: Modality = "image" if self.views == 1 else "multiview"
        # Reward3D was trained with prompts that name the side of each view.
        self.view_prompts = self.views > 1

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, 3, h, w] in 0..1.

        Args:
            pixels: images; for Reward3D, the four views of an asset are adjacent and get the same score.
            prompts: prompt of each image; for Reward3D, it names the side of the view (see
                `RewardModel.view_prompts`).
        """
        token_indices, token_mask = (tensor.to(self.device) for tensor in self.tokenize(prompts))
        images = clip_preprocess(pixels.to(self.device).float(), self.network.blip.side)
        features = self.network.blip(images, token_indices, token_mask)
        # The score of an asset is repeated for each of its views.
        return self.network.head(features).repeat_interleave(self.views)


def load_blip_reward(
    path: Path, state_dict: Mapping[str, torch.Tensor] | None = None, device: str | torch.device = "cpu"
) -> BlipReward:
    """Load ImageReward.pt, Reward3D_Scorer.pt or Reward3D_CrossViewFusion.pt.

    BERT's tokenizer must be in the folder tokenizer/ beside the file.

    Args:
        path: published file.
        state_dict: state dict of the file; None reads the file.
        device: device of the network.
    Raises: ValueError if the file contains any other network.
    """
    message_prefix = f"--reward: {path.name}"
    state_dict = read(path, "--reward") if state_dict is None else state_dict
    network = Reward3dNetwork.from_state_dict(state_dict, message_prefix)
    # The network on the meta device uses the tensors of the file themselves, without a copy.
    adopt(network, from_published(state_dict), message_prefix)
    # A tokenizer with a larger vocabulary would give indices beyond the embedding table.
    vocabulary_size = network.blip.text_encoder.config.vocab_size
    tokenize = bert_tokenizer(path.parent / "tokenizer", "--reward", TOKENS[network.kind], vocabulary_size)
    return BlipReward(network, tokenize, device)
