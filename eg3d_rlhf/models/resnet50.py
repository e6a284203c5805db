"""ResNet-50 (He et al. 2016, arXiv 1512.03385), version 1.5, as a frozen backbone.

In version 1.5 the 3x3 convolution of a block has the stride, and not the first 1x1 convolution. The weights
are read from a local file in torchvision's format. torchvision is not needed, and nothing is downloaded.

Shapes: N samples, C channels, H rows and W columns.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from eg3d_rlhf.models.weights import fill, read
from training.networks import state_hash

FEATURES = 2048  # channels of the last stage
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # number of blocks and inner channels of each stage
_CLASSIFIER = ("fc.weight", "fc.bias")  # entries of the ImageNet classifier, which is not used


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution, each with batch normalisation.

    [N, C, H, W] -> [N, 4 * inner_channels, H / stride, W / stride].

    Args:
        channels: channels C of the input.
        inner_channels: channels of the first two convolutions.
        stride: stride of the 3x3 convolution.
    """

    def __init__(self, channels: int, inner_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = nn.Conv2d(inner_channels, inner_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner_channels)
        self.conv3 = nn.Conv2d(inner_channels, 4 * inner_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inner_channels)
        self.downsample: nn.Module | None = None
        # The shortcut needs a projection where the block changes the size or the number of channels.
        if stride != 1 or channels != 4 * inner_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * inner_channels, 1, stride, bias=False),
                nn.BatchNorm2d(4 * inner_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # [N, inner_channels, H, W]
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 without its classifier: images [N, 3, H, W] -> features [N, 2048].

    The features are the mean of the last stage over all positions. Parameters have torchvision's names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage_number, (n_blocks, inner_channels) in enumerate(_STAGES, 1):
            # The first stage keeps the resolution, because max pooling has halved it already.
            strides = [1 if stage_number == 1 else 2] + [1] * (n_blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(Bottleneck(channels, inner_channels, stride))
                channels = 4 * inner_channels
            setattr(self, f"layer{stage_number}", stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The first convolution and the pooling halve rows and columns once each.
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage_number in range(1, len(_STAGES) + 1):
            x = getattr(self, f"layer{stage_number}")(x)
        # Global average pooling: [N, 2048, H / 32, W / 32] -> [N, 2048]
        return x.mean(dim=(2, 3))


def load_backbone(path: str | Path, sha256: str | None = None) -> ResNet50:
    """Load a ResNet-50 from a .pth or .safetensors state dict. No code from the file is executed.

    Args:
        path: file of the weights.
        sha256: `state_hash` of the backbone with which a reward was trained; None accepts any backbone.

    Returns: the network in evaluation mode, without gradients of its parameters.
    Raises: FileNotFoundError if the file is missing; ValueError for the weights of another network, and for a
        backbone whose hash differs from `sha256`.
    """
    path = Path(path)
    # torchvision's files include the classifier, which this network does not have.
    state_dict = {
        name: tensor for name, tensor in read(path, "--backbone").items() if name not in _CLASSIFIER
    }
    network = fill(ResNet50(), state_dict, f"--backbone={path}")
    # A reward depends on its backbone's features, so another backbone gives other scores without an error.
    if sha256 is not None and (digest := state_hash(network)) != sha256:
        raise ValueError(
            f"--backbone={path}: the reward was trained with a backbone of the SHA-256 {sha256[:12]}..., but"
            f" this file has {digest[:12]}..., so scores would be wrong. Pass the backbone of the training."
        )
    return network.eval().requires_grad_(False)
