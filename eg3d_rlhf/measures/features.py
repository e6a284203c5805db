"""Networks behind the image distances: one of our own that needs no download, and any Inception file that the
user names.

HeadFactorFeatures regresses what the renderer of heads of people knew (identity, hair, colours, camera) and
how an image was damaged; its penultimate layer, standardised over clean heads, is the feature. Distances
under different networks never compare: `name` tells them apart. Its training and the check of it stand below.
Images are float [N, 3, H, W] in [-1, 1], background white (1).
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
FORMAT = "eg3d-rlhf head-factor features 2"
IDENTITY = 16  # leading components of a head's shape: 64 pixels show little of the others
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
    """Four strided convolutions, a 64-d hidden layer that serves as the feature, and a linear regression; 0.3
    M parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers = []
        for i in range(4):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)  # [N, 3, 64, 64] -> [N, 128, 4, 4]
        self.hidden = nn.Linear(widths[-1] * (RESOLUTION // 16) ** 2, DIM)
        self.head = nn.Linear(DIM, len(TARGET_NAMES))
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(DIM))  # of clean heads
        self.register_buffer("feature_std", torch.ones(DIM))

    def penultimate(self, images: Tensor) -> Tensor:
        """Raw features [N, F] of images [N, 3, 64, 64] in [-1, 1]. Differentiable in the images."""
        return functional.silu(self.hidden(self.trunk(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Standardised targets [N, T]. Differentiable in the images."""
        return self.head(self.penultimate(images))


def to_resolution(images: Tensor, resolution: int) -> Tensor:
    """Bilinear resize with antialiasing of images [N, 3, H, W]; unchanged where the size fits."""
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
    """The bundled feature network; see FeatureNetwork in distances.py for the protocol."""

    dim = DIM

    def __init__(self, net: HeadFactorNet, record: dict, device: torch.device | str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.record = record  # how it was trained and how well it does
        self.name = f"head-factors-{record.get('hash', 'unsaved')}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Standardised features [N, 64] of images [N, 3, H, W] in [-1, 1], resized to 64 x 64."""
        images = to_resolution(images.to(self.net.feature_mean), RESOLUTION)
        return (self.net.penultimate(images) - self.net.feature_mean) / self.net.feature_std

    def save(self, path: Path) -> None:
        """Write safetensors at `path` and the record as JSON beside it (also inside the file's metadata)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}
        save_file(state, path, metadata={"format": FORMAT, "record": json.dumps(self.record, sort_keys=True)})
        path.chmod(0o644)  # the library creates private files
        path.with_suffix(".json").write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path | str | None = None, device: torch.device | str = "cpu") -> "HeadFactorFeatures":
        """Read a saved network; None: the bundled one. Runs no code from the file.

        Raises: ValueError for another file.
        """
        path = Path(path) if path is not None else DEFAULT_ASSET
        if not path.is_file():
            raise ValueError(
                f"HeadFactorFeatures: expected a file at {path}, found none. Make it by python -m"
                " builders.features."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(
                f"HeadFactorFeatures: expected a safetensors file, got {path} ({error}). Was it cut short?"
            ) from error
        net = HeadFactorNet()
        if metadata.get("format") != FORMAT or set(state) != set(net.state_dict()):
            raise ValueError(
                f"HeadFactorFeatures: expected '{FORMAT}', got another file at {path}. Make it by python -m"
                " builders.features."
            )
        net.load_state_dict(state)
        return cls(net, json.loads(metadata["record"]), device)


class InceptionFeatures:
    """A TorchScript Inception of the user's, as the usual FID pipelines take: uint8 images in, 2048 features
    out.

    The file is called as net(images uint8 [N, 3, H, W], return_features=True) and resizes by itself. Only a
    file that the user names is read, nothing is downloaded; TorchScript is interpreted by torch and can hold
    no Python.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.net = scripted(
            Path(path),
            "InceptionFeatures",
            "(uint8 images, return_features=True), as FID pipelines use",
            device,
        )
        self.device = torch.device(device)
        self.name = f"torchscript-{Path(path).stem}"
        shape = list(self(torch.zeros(2, 3, 64, 64)).shape)
        if len(shape) != 2 or shape[0] != 2:
            raise ValueError(
                f"InceptionFeatures: expected features [2, F] for 2 images, got {shape} from {path}. Name"
                " another detector."
            )
        self.dim = shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, F] of images [N, 3, H, W] in [-1, 1], rounded to 8 bits as stored images are."""
        pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).to(self.device)
        return self.net(pixels, return_features=True).float()


def load_features(
    path: Path | str | None = None, device: torch.device | str = "cpu"
) -> HeadFactorFeatures | InceptionFeatures:
    """The network of a file: None for the bundled one, .safetensors for our own, anything else as
    TorchScript.
    """
    if path is None or Path(path).suffix == ".safetensors":
        return HeadFactorFeatures.load(path, device)
    return InceptionFeatures(path, device)
