"""ImageReward (2304.05977) and Reward3D (2403.14613) from their published files: heads on BLIP features.

The MLP has no activation between its layers: so were they trained. Both are always evaluated in eval mode,
without dropout: the released guidance lets Lightning's train() turn it on, which makes their gradients noisy.

Shape letters: B pictures, A assets, V = 4 views of one (adjacent), D feature width.
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

# of raw scores; CrossViewFusion is published with 5 for the deviation
MEAN = 0.16717362830052426
STD = 1.0333394966054072
FUSION_STD = 5.0
VIEWS = 4
# of a prompt, marks included; more are cut
TOKENS = {"ImageReward": 35, "Scorer": 100, "CrossViewFusion": 100}
Kind = Literal["ImageReward", "Scorer", "CrossViewFusion"]


class RewardMlp(nn.Module):
    """D - 1024 - 128 - 64 - 16 - 1, linear throughout; dropout .2, .2, .1 after the first three."""

    def __init__(self, width: int):
        super().__init__()
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
        return self.layers(features)

    def wide(self, features: torch.Tensor) -> torch.Tensor:
        """The 128 numbers [B, 128] after the second linear layer."""
        return self.layers[:3](features)


class ViewScorer(nn.Module):
    """Four views' 128 numbers side by side -> one raw score."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(VIEWS * 128, 256)
        self.fc2 = nn.Linear(256, 64)
        self.fc3 = nn.Linear(64, 1)

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.fc2(self.fc1(wide)))


class CrossViewAdapter(nn.Module):
    """Four views look at one another; a gate mixes what each sees with what it is; their mean."""

    def __init__(self, width: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads=12, batch_first=True)
        self.fusion_gate = nn.Sequential(nn.Linear(2 * width, width), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[A, V, D] -> [A, D]: gate * attended + (1 - gate) * feature, gate = sigmoid(Linear
        [feature, attended]); mean over the views.
        """
        attended, _ = self.self_attn(features, features, features, need_weights=False)
        gate = self.fusion_gate(torch.cat([features, attended], -1))
        return (gate * attended + (1 - gate) * features).mean(1)


class Reward3dNetwork(nn.Module):
    """Trunk and heads under their published names.

    Args: kind: "ImageReward" scores every picture; "Scorer" and "CrossViewFusion" are Reward3D's two, of four
        views together.
    """

    def __init__(self, kind: Kind, sizes: BlipSizes):
        super().__init__()
        self.kind = kind
        self.blip = Blip(sizes)
        self.mlp = RewardMlp(sizes.text_width)
        if kind == "Scorer":
            self.Scorer = ViewScorer()
        elif kind == "CrossViewFusion":
            self.cross_view_adapter = CrossViewAdapter(sizes.text_width)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Scores of BLIP features [B, D]: [B] (ImageReward) or [A], (raw - mean) / deviation.
        Differentiable.
        """
        if self.kind == "ImageReward":
            return (self.mlp(features)[:, 0] - MEAN) / STD
        if self.kind == "Scorer":
            return (
                self.Scorer(self.mlp.wide(features).unflatten(0, (-1, VIEWS)).flatten(1))[:, 0] - MEAN
            ) / STD
        return (
            self.mlp(self.cross_view_adapter(features.unflatten(0, (-1, VIEWS))))[:, 0] - MEAN
        ) / FUSION_STD

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], who: str) -> "Reward3dNetwork":
        """The network that a file's names and shapes tell, on the meta device.

        Raises: ValueError for another network's file.
        """
        sizes = BlipSizes.of(state, who)
        kind: Kind = "Scorer" if "Scorer.fc1.weight" in state else "ImageReward"
        if any(name.startswith("cross_view_adapter.") for name in state):
            kind = "CrossViewFusion"
            if sizes.text_width % 12:
                raise ValueError(
                    f"{who}: expected a text width that is a multiple of 12, got {sizes.text_width}. Use the"
                    " published file."
                )
        return empty(lambda: cls(kind, sizes))


class BlipReward:
    """ImageReward or Reward3D as a reward, in eval mode.

    Args: tokenize: prompts -> token numbers [B, T] and mask [B, T].
    """

    differentiable = True

    def __init__(self, network: Reward3dNetwork, tokenize: Tokenize, device: str | torch.device = "cpu"):
        frozen(network, device)
        self.network = network
        self.tokenize = tokenize
        self.device = torch.device(device)
        self.views = 1 if network.kind == "ImageReward" else VIEWS
        self.modality: Modality = "image" if self.views == 1 else "multiview"
        self.view_prompts = self.views > 1  # Reward3D was trained with the side in the prompt

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores [B] of pictures [B, 3, h, w] in 0..1, a prompt each; see `denoiser.told`."""
        tokens, mask = (x.to(self.device) for x in self.tokenize(prompts))
        pictures = clip_preprocess(pixels.to(self.device).float(), self.network.blip.side)
        features = self.network.blip(pictures, tokens, mask)
        return self.network.head(features).repeat_interleave(self.views)


def load_blip_reward(
    path: Path, state: Mapping[str, torch.Tensor] | None = None, device: str | torch.device = "cpu"
) -> BlipReward:
    """ImageReward.pt, Reward3D_Scorer.pt or _CrossViewFusion.pt, with BERT's tokenizer in the folder
    tokenizer/ beside it.
    """
    who = f"--reward: {path.name}"
    state = read(path, "--reward") if state is None else state
    network = Reward3dNetwork.of(state, who)
    adopt(network, from_published(state), who)
    words = network.blip.text_encoder.config.vocab_size
    return BlipReward(
        network, bert_tokenizer(path.parent / "tokenizer", "--reward", TOKENS[network.kind], words), device
    )
