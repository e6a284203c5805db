"""Feature networks of the image distances: a bundled one that needs no download, and a user's Inception file.

HeadFactorFeatures was trained to regress the factors with which heads of people were rendered (identity,
hair, colours, camera) and the kind of damage to an image. Its penultimate layer, standardised over undamaged
heads, is the feature. builders/features.py trains it. Distances under different networks are not comparable;
`name` identifies the network. Images are float [N, 3, H, W] in [-1, 1], background white (1).
Shape letters: N images, H x W pixels, F features, T targets, K factors.
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
IDENTITY = 16  # leading components of a head's shape that are regressed; 64 pixels show little of the others
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
    """Convolutional regressor of head factors with 0.3 M parameters.

    It has four strided convolutions, a hidden layer of 64 units, which serves as the feature, and a linear
    output.
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
        # Moments of the raw feature over undamaged heads. As buffers they are part of the file.
        self.register_buffer("feature_mean", torch.zeros(DIM))
        self.register_buffer("feature_std", torch.ones(DIM))

    def penultimate(self, images: Tensor) -> Tensor:
        """Return raw features [N, F] of images [N, 3, 64, 64] in [-1, 1]. Differentiable in the images."""
        return functional.silu(self.hidden(self.trunk(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return standardised targets [N, T] of images [N, 3, 64, 64]. Differentiable in the images."""
        return self.head(self.penultimate(images))


def to_resolution(images: Tensor, resolution: int) -> Tensor:
    """Resize images [N, 3, H, W] bilinearly with antialiasing.

    Images of the right size are returned unchanged.

    Raises: ValueError for other shapes.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"features: expected images [N, 3, H, W], got {list(images.shape)}. Convert to RGB first."
        )
    if images.shape[-2:] == (resolution, resolution):
        return images
    return functional.interpolate(
        images, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True
    )


class HeadFactorFeatures:
    """Bundled feature network. It follows the protocol FeatureNetwork of distances.py."""

    dim = DIM

    def __init__(self, net: HeadFactorNet, record: dict, device: torch.device | str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.record = record  # training settings and validation results
        self.name = f"head-factors-{record.get('hash', 'unsaved')}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return standardised features [N, 64] of images [N, 3, H, W] in [-1, 1], resized to 64 x 64."""
        # .to(buffer) moves images to the network's device and type.
        images = to_resolution(images.to(self.net.feature_mean), RESOLUTION)
        return (self.net.penultimate(images) - self.net.feature_mean) / self.net.feature_std

    def save(self, path: Path) -> None:
        """Write safetensors at `path`, and the record as JSON beside it and in the file's metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}
        save_file(state, path, metadata={"format": FORMAT, "record": json.dumps(self.record, sort_keys=True)})
        path.chmod(0o644)  # safetensors creates files that only their owner can read
        path.with_suffix(".json").write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path | str | None = None, device: torch.device | str = "cpu") -> "HeadFactorFeatures":
        """Read a saved network, or the bundled one if `path` is None. Executes no code from the file.

        Raises: ValueError if the file is missing, damaged, or of another format.
        """
        path = Path(path) if path is not None else DEFAULT_ASSET
        if not path.is_file():
            raise ValueError(
                f"HeadFactorFeatures: found no file at {path}. Create it with python -m builders.features."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(
                f"HeadFactorFeatures: expected a safetensors file, got {path} ({error}). Copy or download it"
                " again; it may be incomplete."
            ) from error
        net = HeadFactorNet()
        if metadata.get("format") != FORMAT or set(state) != set(net.state_dict()):
            raise ValueError(
                f"HeadFactorFeatures: expected a file of format '{FORMAT}', got another one at {path}."
                " Create it with python -m builders.features."
            )
        # Strict by default; the check above has already compared the names.
        net.load_state_dict(state)
        return cls(net, json.loads(metadata["record"]), device)


class InceptionFeatures:
    """Inception network in a TorchScript file of the user, with the interface that common FID pipelines use.

    The file is called as net(images uint8 [N, 3, H, W], return_features=True), returns 2048 features, and
    resizes images by itself. Nothing is downloaded. torch interprets TorchScript, which cannot contain
    Python.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.net = scripted(
            Path(path),
            "InceptionFeatures",
            "f(uint8 images, return_features=True), as FID pipelines do",
            device,
        )
        self.device = torch.device(device)
        # The file's name is all that identifies a user's network.
        self.name = f"torchscript-{Path(path).stem}"
        # The number of features is known only to the file, so two blank images are evaluated.
        shape = list(self(torch.zeros(2, 3, 64, 64)).shape)
        if len(shape) != 2 or shape[0] != 2:
            raise ValueError(
                f"InceptionFeatures: expected features [2, F] for 2 images, got {shape} from {path}. Use"
                " another network file."
            )
        self.dim = shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [N, F] of images [N, 3, H, W] in [-1, 1], which are first rounded to 8 bits."""
        # Real images are stored with 8 bits, so generated ones are rounded alike before they are compared.
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).to(self.device)
        return self.net(pixels, return_features=True).float()


def load_features(
    path: Path | str | None = None, device: torch.device | str = "cpu"
) -> HeadFactorFeatures | InceptionFeatures:
    """Load a feature network.

    Args: path: None for the bundled network, a .safetensors file for HeadFactorFeatures, any other file for
        TorchScript.
    """
    if path is None or Path(path).suffix == ".safetensors":
        return HeadFactorFeatures.load(path, device)
    return InceptionFeatures(path, device)
