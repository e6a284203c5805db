"""ImageReward (arXiv 2304.05977) and Reward3D (arXiv 2403.14613) from their published files: heads on BLIP
features.

The MLP has no activation between its layers, because the published weights were trained without one. Both
networks are always evaluated in eval mode, without dropout. In the released guidance, Lightning's train()
turns dropout on, which makes the gradients noisy.

Shape letters: B images, A assets, V = 4 views of one asset (adjacent in a batch), D feature width, T tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from eg3d_rlhf.core.interfaces import Modality
from eg3d_rlhf.models.blip import Blip, BlipSizes, from_published
from eg3d_rlhf.models.clip_inputs import Tokenize, bert_tokenizer, clip_preprocess
from eg3d_rlhf.models.weights import adopt, empty, frozen, read

# Mean and standard deviation of raw scores. CrossViewFusion is published with a standard deviation of 5.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
FUSION_STD = 5.0
VIEWS = 4
# Length of a prompt in tokens, including the special ones. Longer prompts are cut.
TOKENS = {"ImageReward": 35, "Scorer": 100, "CrossViewFusion": 100}
Kind = Literal["ImageReward", "Scorer", "CrossViewFusion"]


class RewardMlp(nn.Module):
    """Linear layers D - 1024 - 128 - 64 - 16 - 1, with dropout .2, .2 and .1 after the first three."""

    def __init__(self, width: int):
        super().__init__()
        # Dropout layers are inactive in eval mode, but they count in the names of the state dict.
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
        """Return raw scores [B, 1] of features [B, D]."""
        return self.layers(features)

    def wide(self, features: torch.Tensor) -> torch.Tensor:
        """Return the hidden layer of 128 units, [B, 128], after the second linear layer."""
        # layers[:3] are Linear, Dropout, Linear.
        return self.layers[:3](features)


class ViewScorer(nn.Module):
    """Head that maps the hidden layers of four views to one raw score per asset."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(VIEWS * 128, 256)
        self.fc2 = nn.Linear(256, 64)
        self.fc3 = nn.Linear(64, 1)

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        """Return raw scores [A, 1] of the concatenated hidden layers [A, 4 * 128]."""
        return self.fc3(self.fc2(self.fc1(wide)))


class CrossViewAdapter(nn.Module):
    """Attention between the four views of an asset, followed by a gate and the mean over views."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads=12, batch_first=True)
        self.fusion_gate = nn.Sequential(nn.Linear(2 * width, width), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Fuse features [A, V, D] -> [A, D].

        The result is the mean over views of gate * attended + (1 - gate) * feature, with gate =
        sigmoid(Linear [feature, attended]).
        """
        # Each view attends to all four views of its asset, [A, V, D].
        attended, _ = self.self_attn(features, features, features, need_weights=False)
        gate = self.fusion_gate(torch.cat([features, attended], -1))
        return (gate * attended + (1 - gate) * features).mean(1)


class Reward3dNetwork(nn.Module):
    """BLIP trunk and reward heads under their published names.

    Args: kind: "ImageReward" scores each image separately; "Scorer" and "CrossViewFusion" are the two
        networks of Reward3D, which score four views together.
    """

    def __init__(self, kind: Kind, sizes: BlipSizes):
        super().__init__()
        self.kind = kind
        self.blip = Blip(sizes)
        self.mlp = RewardMlp(sizes.text_width)
        if kind == "Scorer":
            # The capital letter is that of the published state dict.
            self.Scorer = ViewScorer()
        elif kind == "CrossViewFusion":
            self.cross_view_adapter = CrossViewAdapter(sizes.text_width)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Return scores of BLIP features [B, D]: (raw - mean) / standard deviation. Differentiable.

        The shape is [B] for ImageReward and [A] otherwise.
        """
        if self.kind == "ImageReward":
            return (self.mlp(features)[:, 0] - MEAN) / STD
        # [B, D] -> [A, V, ...], since the views of an asset are adjacent
        if self.kind == "Scorer":
            return (
                self.Scorer(self.mlp.wide(features).unflatten(0, (-1, VIEWS)).flatten(1))[:, 0] - MEAN
            ) / STD
        return (
            self.mlp(self.cross_view_adapter(features.unflatten(0, (-1, VIEWS))))[:, 0] - MEAN
        ) / FUSION_STD

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], source: str) -> "Reward3dNetwork":
        """Create the network that the names and shapes of a state dict describe, on the meta device.

        Args: source: flag and file that messages name.
        Raises: ValueError for a file of another network.
        """
        sizes = BlipSizes.of(state, source)
        # The heads decide the kind, since all three share the BLIP trunk.
        kind: Kind = "Scorer" if "Scorer.fc1.weight" in state else "ImageReward"
        if any(name.startswith("cross_view_adapter.") for name in state):
            kind = "CrossViewFusion"
            # The published adapter has 12 attention heads.
            if sizes.text_width % 12:
                raise ValueError(
                    f"{source}: expected a text width that is a multiple of 12, got {sizes.text_width}. Use"
                    " the published file."
                )
        return empty(lambda: cls(kind, sizes))


class BlipReward:
    """ImageReward or Reward3D as a reward of images, in eval mode.

    Args: tokenize: prompts -> token numbers [B, T] and mask [B, T].
    """

    differentiable = True

    def __init__(self, network: Reward3dNetwork, tokenize: Tokenize, device: str | torch.device = "cpu"):
        # Eval mode and no gradients of parameters, in place.
        frozen(network, device)
        self.network = network
        self.tokenize = tokenize
        self.device = torch.device(device)
        self.views = 1 if network.kind == "ImageReward" else VIEWS
        self.modality: Modality = "image" if self.views == 1 else "multiview"
        # Reward3D was trained with the side of each view in its prompt.
        self.view_prompts = self.views > 1

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return scores [B] of images [B, 3, h, w] in 0..1, one prompt each.

        The prompts of Reward3D name the side of each view (see `RewardModel.view_prompts`).
        """
        tokens, mask = (x.to(self.device) for x in self.tokenize(prompts))
        images = clip_preprocess(pixels.to(self.device).float(), self.network.blip.side)
        features = self.network.blip(images, tokens, mask)
        # The score of an asset is repeated for each of its views.
        return self.network.head(features).repeat_interleave(self.views)


def load_blip_reward(
    path: Path, state: Mapping[str, torch.Tensor] | None = None, device: str | torch.device = "cpu"
) -> BlipReward:
    """Load ImageReward.pt, Reward3D_Scorer.pt or Reward3D_CrossViewFusion.pt.

    BERT's tokenizer must be in the folder tokenizer/ beside the file.
    """
    source = f"--reward: {path.name}"
    state = read(path, "--reward") if state is None else state
    network = Reward3dNetwork.of(state, source)
    # The network on the meta device takes over the tensors of the file, without a copy.
    adopt(network, from_published(state), source)
    # A tokenizer with more words would index beyond the embedding table.
    words = network.blip.text_encoder.config.vocab_size
    return BlipReward(
        network, bert_tokenizer(path.parent / "tokenizer", "--reward", TOKENS[network.kind], words), device
    )
