"""A flow family from outside the package: clouds of six points, in one stage, by a network with its data at
t = 1.

Load it as a plugin: EG3D_RLHF_PLUGINS=tests/tuning/flow/point_family.py. Its folder holds points.json and
points.safetensors; conditions are two tensors by name, a token of a class and a size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.models.weights import write
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Release, Stored
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, FlowStage, Sampling, TokenSet
from eg3d_rlhf.tuning.flow.families import register
from eg3d_rlhf.tuning.flow.families.folder import read_network
from training.storage import write_atomic

POINTS = 6
CLASSES = 4
CONDITION = {"kind": [1, CLASSES], "size": [1]}  # shapes of its tensors
FILES = CONFIG, WEIGHTS = "points.json", "points.safetensors"


class PointNetwork(nn.Module):
    """Somebody else's module: it calls the time sigma, has data at sigma = 1, and wants the condition in two
    arguments.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        self.inner = nn.Linear(3 + 1 + CLASSES + 1, width)
        self.outer = nn.Linear(width, 3)

    def forward(
        self, points: torch.Tensor, sigma: torch.Tensor, kind: torch.Tensor, size: torch.Tensor
    ) -> torch.Tensor:
        """Points [N, T, 3], sigma [N], kind [N, 1, E], size [N, 1] -> d points / d sigma."""
        # [N, T, 1 + E + 1]
        prompt = torch.cat([sigma.view(-1, 1, 1), kind, size.unsqueeze(1)], 2).expand(-1, points.shape[1], -1)
        return self.outer(torch.tanh(self.inner(torch.cat([points, prompt], 2))))


class PointPipeline:
    """One stage; an asset is a cloud [T, 3]."""

    def __init__(self, module: nn.Module, conditioning: Conditioning | None):
        self.tokens = conditioning
        if conditioning is not None:
            conditioning.check("conditions", CONDITION, "the classes of points.json")
        self.stages = [
            FlowStage(
                name="points",
                model=module,
                latents=TokenSet(tokens=POINTS, channels=3),
                call=lambda module, x_t, t, cond: module(x_t, t, cond["kind"], cond["size"]),
                data_at_one=True,
                path=FlowPath(sigma_min=0.0, schedule="uniform"),
                sampling=Sampling(steps=4, cfg_strength=1.0, cfg_interval=(0.0, 1.0)),
                lora_targets=("inner", "outer"),
            )
        ]

    def conditioning(self, names: Sequence[str], stage: str):
        return self.tokens.select(names)

    def null_conditioning(self, n: int, stage: str):
        return self.tokens.null(n)

    def decode(self, x_0: torch.Tensor) -> list[torch.Tensor]:
        return [*x_0]


class PointFamily(FlowFamily):
    """Reads and writes folders of points.json and points.safetensors."""

    name = "points"
    layout = f"{CONFIG} and {WEIGHTS}"
    stages = ("points",)

    def recognises(self, root: Path) -> bool:
        return (root / CONFIG).is_file()

    def files(self, root: Path, stages=None) -> Mapping[str, Path]:
        return {name: root / name for name in FILES}

    def load(self, root: Path, conditioning, *, stages=None, dtype=torch.float32, device="cpu"):
        return PointPipeline(read_network(root, FILES, PointNetwork).to(device, dtype), conditioning)

    def condition(self, pipeline: PointPipeline, stage: str) -> Mapping[str, Sequence[int]]:
        return CONDITION

    def show(self, asset: torch.Tensor, path: Path) -> Path:
        """Write an .xyz file."""
        file = path.with_name(path.name + ".xyz")
        write_atomic(file, "".join(f"{x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in asset.tolist()).encode())
        return file

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the same folder with another network."""
        stored = Stored(file=WEIGHTS, load=lambda dtype: read_network(root, FILES, PointNetwork), write=write)
        return Release(files={CONFIG: root / CONFIG}, networks={"points": stored})


FAMILY = register(PointFamily())
