"""A folder of the family of point_family.py, of random weights, and conditions for it."""

from pathlib import Path

import torch

from eg3d_rlhf.models.weights import write
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from tests.tuning.flow.point_family import CLASSES, CONFIG, WEIGHTS, PointNetwork


def write_folder(root: Path) -> Path:
    torch.manual_seed(0)
    root.mkdir()
    (root / CONFIG).write_text('{"width": 8}\n')
    write(root / WEIGHTS, PointNetwork().state_dict())
    return root


def conditions() -> Conditioning:
    g = torch.Generator().manual_seed(0)
    tokens = {
        name: {"kind": torch.randn(1, CLASSES, generator=g), "size": torch.randn(1, generator=g)}
        for name in "abcd"
    }
    return Conditioning(tokens=tokens, zero_null=True)
