"""Two small networks of Google's MediaPipe: the short-range face detector and the face mesh.

Both are stacks of residual blocks with depthwise convolutions. `builders/face.py` converts the published
TensorFlow Lite files to one file of weights, `assets/face.safetensors`. The published files store the weights
in half precision, so the conversion changes no value. The networks compute in float32. Their outputs differ
from those of LiteRT by less than 0.001 pixels and logits, because sums have another order
(tests/models/test_face_networks.py).

Sources: Bazarevsky et al. 2019, "BlazeFace", arXiv 1907.05047 (detector); Kartynnik et al. 2019, "Real-time
Facial Surface Geometry from Monocular Video on Mobile GPUs", arXiv 1907.06724 (face mesh).

Shapes: N number of images, C channels, H x W pixels. Images are RGB, with the first row at the top.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from training.storage import ASSETS, load_strict, read_tensors

ASSET = ASSETS / "face.safetensors"
FILE_KIND = "face-networks"
DETECTOR_EDGE = 128  # pixels of the detector's square input
LANDMARK_EDGE = 192  # pixels of the face mesh's square input
LANDMARKS = 468
KEYPOINTS = 6  # points that the detector predicts for each face
# Stride of the detector's feature maps in pixels, and number of predictions per cell of each map.
MAPS = ((8, 2), (16, 6))


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding "SAME", for inputs whose size the stride divides.

    [N, C, H, W] -> [N, outputs, H / stride, W / stride].
    """

    def __init__(self, inputs: int, outputs: int, edge: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, edge, stride, groups=groups)
        # TensorFlow adds edge - stride pixels in all. If the number is odd, the right and the lower border
        # get one more, which the symmetric padding of torch cannot express.
        total_padding = edge - stride
        before = total_padding // 2
        # Left, right, top and bottom, the order of F.pad.
        self.borders = (before, total_padding - before, before, total_padding - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Equal borders are padded inside the convolution, without a padded copy of the input.
        if self.borders[0] == self.borders[1]:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.borders[0], groups=self.groups)
        return super().forward(F.pad(x, self.borders))


class Block(nn.Module):
    """Residual block: a depthwise 3x3 convolution and a 1x1 convolution beside a shortcut.

    [N, C, H, W] -> [N, outputs, H / stride, W / stride]. With stride 2, the shortcut is a maximum over 2x2
    pixels. Missing channels of the shortcut are zeros.

    Args:
        inputs: channels C of the input.
        outputs: channels of the output.
        stride: 1 or 2.
        slopes: True: PReLU with one slope per channel; False: ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, slopes: bool):
        super().__init__()
        self.depthwise = SameConv(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.activation = nn.PReLU(outputs) if slopes else nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = F.max_pool2d(x, 2) if self.stride == 2 else x
        y = self.pointwise(self.depthwise(x))
        # Added in place, the missing channels of the shortcut need no copy, which took a quarter of the time.
        y[:, : shortcut.shape[1]] += shortcut
        return self.activation(y)


def _blocks(channels: list[int], strided: tuple[int, ...], slopes: bool) -> nn.Sequential:
    """Return successive blocks.

    Args:
        channels: channels of the first input and of each block's output.
        strided: indices of the blocks with stride 2.
        slopes: as in `Block`.
    """
    return nn.Sequential(
        *(
            Block(inputs, outputs, 2 if index in strided else 1, slopes)
            for index, (inputs, outputs) in enumerate(zip(channels[:-1], channels[1:], strict=True))
        )
    )


class FaceDetector(nn.Module):
    """Short-range face detector: images [N, 3, 128, 128] in [-1, 1] -> scores [N, 896], boxes [N, 896, 16].

    A prediction belongs to a cell of a feature map, see `cell_centres`. A score is a logit. The 16 numbers
    are the box's centre x and y, its width and height, and x and y of six points: both eyes (the left one in
    the image first), the tip of the nose, the centre of the mouth, and both ears. They are in pixels of the
    input; centres and points are relative to the centre of the cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv(3, 24, 5, 2), nn.ReLU(inplace=True))
        # The first number belongs to the stem, and each of the others to one block.
        fine_channels = [24, 24, 28, 32, 36, 42, 48, 56, 64, 72, 80, 88]
        self.fine = _blocks(fine_channels, strided=(2, 5), slopes=False)  # [N, 88, 16, 16]
        self.coarse = _blocks([88, 96, 96, 96, 96, 96], strided=(0,), slopes=False)  # [N, 96, 8, 8]
        self.fine_scores = nn.Conv2d(88, 2, 1)  # 2 predictions in each of 16 x 16 cells: 512
        self.coarse_scores = nn.Conv2d(96, 6, 1)  # 6 predictions in each of 8 x 8 cells: 384
        self.fine_boxes = nn.Conv2d(88, 2 * 16, 1)  # 16 numbers of each prediction, see the class
        self.coarse_boxes = nn.Conv2d(96, 6 * 16, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = self.fine(self.stem(images))
        coarse = self.coarse(fine)
        # Predictions of a cell follow each other: [N, P * K, H, W] -> [N, H * W * P, K] for P predictions.
        scores, boxes = (
            torch.cat([m.permute(0, 2, 3, 1).reshape(len(images), -1, numbers) for m in maps], dim=1)
            for numbers, maps in (
                (1, (self.fine_scores(fine), self.coarse_scores(coarse))),
                (16, (self.fine_boxes(fine), self.coarse_boxes(coarse))),
            )
        )
        return scores[..., 0], boxes


class FaceMesh(nn.Module):
    """Face mesh: images [N, 3, 192, 192] in [0, 1] -> landmarks [N, 468, 3], logit of a face's presence [N].

    Landmarks are in pixels of the input: x to the right, y downwards, and depth z in the same scale, which
    is smaller for points nearer to the camera.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv(3, 16, 3, 2), nn.PReLU(16))
        # The stem and four of the blocks halve the size: 192 -> 96 -> 48 -> 24 -> 12 -> 6 pixels.
        trunk_channels = [16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
        self.trunk = _blocks(trunk_channels, strided=(2, 5, 8, 11), slopes=True)  # [N, 128, 6, 6]
        self.landmark_branch = self._branch(blocks=3, outputs=3 * LANDMARKS)
        self.presence_branch = self._branch(blocks=1, outputs=1)

    @staticmethod
    def _branch(blocks: int, outputs: int) -> nn.Sequential:
        """Return a branch [N, 128, 6, 6] -> [N, outputs, 1, 1], of which the first block has stride 2."""
        return nn.Sequential(
            _blocks([128] * (blocks + 1), strided=(0,), slopes=True),  # [N, 128, 3, 3]
            nn.Sequential(nn.Conv2d(128, 32, 1), nn.PReLU(32)),
            Block(32, 32, 1, slopes=True),
            nn.Conv2d(32, outputs, 3),  # one output cell, [N, outputs, 1, 1]
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(self.stem(images))
        landmarks = self.landmark_branch(features).reshape(len(images), LANDMARKS, 3)
        return landmarks, self.presence_branch(features).reshape(len(images))


@cache
def cell_centres() -> torch.Tensor:
    """Return the centres (x, y) of the predictions' cells in pixels of the detector's input, [896, 2]."""
    centres = []
    for stride, predictions_per_cell in MAPS:
        positions = (torch.arange(DETECTOR_EDGE // stride) + 0.5) * stride
        y, x = torch.meshgrid(positions, positions, indexing="ij")
        map_centres = torch.stack([x, y], dim=-1).reshape(-1, 2)
        # The predictions of one cell follow each other, as in the forward pass of the detector.
        centres.append(map_centres.repeat_interleave(predictions_per_cell, dim=0))
    return torch.cat(centres)


def load_networks(path: str | Path = ASSET) -> tuple[FaceDetector, FaceMesh, torch.Tensor]:
    """Read both networks and the canonical face from a file of `builders/face.py`.

    Returns: detector and face mesh in evaluation mode, without gradients of their parameters; and the
        canonical face, float64 [468, 3] in centimetres.
    Raises: FileNotFoundError if the file is missing; ValueError for another file.
    """
    tensors, _ = read_tensors(path, FILE_KIND)
    detector = FaceDetector()
    mesh = FaceMesh()
    parts: dict[str, nn.Module] = {"detector": detector, "mesh": mesh}
    for part, network in parts.items():
        weights = {
            name.removeprefix(f"{part}."): tensor.float()  # the networks compute in float32
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }
        load_strict(network, weights, f"{Path(path).name}: {part}")
        network.eval().requires_grad_(False)
    return detector, mesh, tensors["canonical_face"].double()
