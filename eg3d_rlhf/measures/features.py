"""Feature networks of the image distances: a bundled one that needs no download, and a user's Inception file.

HeadFactorFeatures was trained to regress the factors with which synthetic heads were rendered (identity,
hair, colours, camera) and the kind of damage to an image. The output of its penultimate layer, standardised
over undamaged heads, is the feature vector. builders/features.py trains the network. Distances computed with
different networks are not comparable; the attribute `name` identifies the network. Images are float
[N, 3, H, W] in [-1, 1], with a white background (1).

Shapes: N images, H x W pixels, F features, T targets (28 factors and 6 kinds of damage).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.measures.image_similarity import scripted

RESOLUTION = 64  # pixels per edge that the network reads
DIM = 64  # F
FORMAT = "eg3d-rlhf head-factor features 2"  # written into the file; a file with another value is rejected
# Number of leading principal components of a head's shape that are regressed. Images of 64 pixels show little
# of the other components.
IDENTITY = 16
FACTOR_NAMES = (
    *(f"component {i}" for i in range(IDENTITY)),
    "volume",
    "top",
    "long",
    "bun",
    "skin",
    "hair",
    "iris",
    "shirt",
    "lips",
    "brows",
    "yaw",
    "pitch",
)
DAMAGE_NAMES = ("blur", "noise", "colour", "shift", "squeeze", "ghost")
TARGET_NAMES = (*FACTOR_NAMES, *DAMAGE_NAMES)
DEFAULT_ASSET = ASSETS / "features.safetensors"


class HeadFactorNet(nn.Module):
    """Convolutional network with 0.3 M parameters that regresses the factors of a rendered head.

    The network has four strided convolutions, a hidden layer of 64 units whose output is the feature vector,
    and a linear output layer.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        # [N, 3, 64, 64] -> 32 -> 16 -> 8 -> 4 pixels per edge
        layers = []
        for i in range(4):
            # Only the first convolution has a 5 x 5 kernel. Each one halves the resolution.
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)  # [N, 3, 64, 64] -> [N, 128, 4, 4]
        self.hidden = nn.Linear(widths[-1] * (RESOLUTION // 16) ** 2, DIM)
        self.head = nn.Linear(DIM, len(TARGET_NAMES))
        self.feature_mean: Tensor
        self.feature_std: Tensor
        # Mean and standard deviation [F] of raw features over undamaged heads. builders/features.py sets them
        # after the training. Buffers are part of the state dict and so of the file.
        self.register_buffer("feature_mean", torch.zeros(DIM))
        self.register_buffer("feature_std", torch.ones(DIM))

    def penultimate(self, images: Tensor) -> Tensor:
        """Compute raw features [N, F], before standardisation, of images [N, 3, 64, 64] in [-1, 1].

        Differentiable in the images.
        """
        return functional.silu(self.hidden(self.trunk(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Predict standardised factors and kinds of damage [N, T] of images [N, 3, 64, 64] in [-1, 1].

        Differentiable in the images.
        """
        return self.head(self.penultimate(images))


def to_resolution(images: Tensor, resolution: int) -> Tensor:
    """Resize images [N, 3, H, W] to resolution x resolution pixels, bilinearly with antialiasing.

    Images that have this size already are returned unchanged.

    Args:
        images: images to resize.
        resolution: pixels per side of the result.

    Raises: ValueError if the images do not have the shape [N, 3, H, W].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"features: images have the shape {list(images.shape)}, but must have [N, 3, H, W]. Convert them"
            " to RGB first."
        )
    if images.shape[-2:] == (resolution, resolution):
        return images
    return functional.interpolate(
        images, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True
    )


class HeadFactorFeatures:
    """Bundled feature network, which implements the protocol FeatureNetwork of distances.py.

    Args:
        net: trained network.
        training_record: training settings and validation results, as JSON values; 'hash' becomes a part of
            the name.
        device: device that computes the features.
    """

    dim = DIM

    def __init__(self, net: HeadFactorNet, training_record: dict, device: torch.device | str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.record = training_record  # training settings and validation results
        self.name = f"head-factors-{training_record.get('hash', 'unsaved')}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute standardised features [N, 64] of images [N, 3, H, W] in [-1, 1].

        Images are resized to 64 x 64 pixels first. The result is on the network's device.
        """
        # .to(tensor) moves images to the device and the type of that tensor, here those of the network.
        images = to_resolution(images.to(self.net.feature_mean), RESOLUTION)
        return (self.net.penultimate(images) - self.net.feature_mean) / self.net.feature_std

    def save(self, path: Path) -> None:
        """Write the network as a safetensors file.

        The record is written twice: into the metadata of this file, and as JSON into a file beside it with
        the suffix .json. Missing parent folders are created.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        state_dict = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()
        }
        save_file(
            state_dict, path, metadata={"format": FORMAT, "record": json.dumps(self.record, sort_keys=True)}
        )
        path.chmod(0o644)  # safetensors creates files that only their owner can read
        path.with_suffix(".json").write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path | str | None = None, device: torch.device | str = "cpu") -> "HeadFactorFeatures":
        """Read a network that `save` wrote. No code from the file is executed.

        Args:
            path: safetensors file; None reads the bundled network.
            device: device that will compute the features.

        Raises: ValueError if the file is missing, is damaged, or has another format.
        """
        path = Path(path) if path is not None else DEFAULT_ASSET
        if not path.is_file():
            raise ValueError(
                f"HeadFactorFeatures: the file {path} does not exist. Create it with python -m"
                " builders.features."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # The file object is not a mapping, so it can only be iterated by keys().
                tensor_names = file.keys()
                state_dict = {name: file.get_tensor(name) for name in tensor_names}
        except SafetensorError as error:
            raise ValueError(
                f"HeadFactorFeatures: {path} is not a readable safetensors file ({error}). Copy or download"
                " it again; it may be incomplete."
            ) from error
        net = HeadFactorNet()
        if metadata.get("format") != FORMAT or set(state_dict) != set(net.state_dict()):
            raise ValueError(
                f"HeadFactorFeatures: {path} does not have the format '{FORMAT}'; its metadata say"
                f" '{metadata.get('format')}'. Create the file with python -m builders.features."
            )
        # load_state_dict would report other names too, but in a message of many lines.
        net.load_state_dict(state_dict)
        return cls(net, json.loads(metadata["record"]), device)


class InceptionFeatures:
    """Inception network of a user's TorchScript file, with the interface that common FID pipelines use.

    The network is called as net(images, return_features=True) on uint8 images [N, 3, H, W]. It resizes the
    images and returns features [N, F], F = 2048 for the published network. Nothing is downloaded. A
    TorchScript file cannot contain Python code; torch interprets it.

    Args:
        path: TorchScript file.
        device: device that computes the features.

    Raises: ValueError if the file is not TorchScript, or if the network has another interface.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.net = scripted(
            Path(path),
            "InceptionFeatures",
            "f(uint8 images, return_features=True), as FID pipelines do",
            device,
        )
        self.device = torch.device(device)
        # The name of the file identifies the network in records. Its contents are not hashed.
        self.name = f"torchscript-{Path(path).stem}"
        # The file does not declare F. Two blank images are evaluated to measure it.
        output_shape = list(self(torch.zeros(2, 3, 64, 64)).shape)
        if len(output_shape) != 2 or output_shape[0] != 2:
            raise ValueError(
                f"InceptionFeatures: {path} returned features of the shape {output_shape} for 2 images, but"
                " must return [2, F]. Use a network that returns one feature vector per image."
            )
        self.dim = output_shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features [N, F] of images [N, 3, H, W] in [-1, 1].

        Images are rounded to 8 bits first.
        """
        # Real images are stored with 8 bits, so generated images must have the same rounding errors.
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).to(self.device)
        return self.net(pixels, return_features=True).float()


def load_features(
    path: Path | str | None = None, device: torch.device | str = "cpu"
) -> HeadFactorFeatures | InceptionFeatures:
    """Load a feature network.

    Args:
        path: file of the network. A .safetensors file is read by HeadFactorFeatures, a file with any other
            suffix by InceptionFeatures. None loads the bundled network.
        device: device that will compute the features.

    Raises: ValueError if the file cannot be used.
    """
    if path is None or Path(path).suffix == ".safetensors":
        return HeadFactorFeatures.load(path, device)
    return InceptionFeatures(path, device)
