"""A folder of the family of point_family.py, of random weights, and conditions for it."""

from pathlib import Path

import torch

from eg3d_rlhf.models.weights import write
from eg3d_rlhf.tuning.flow.conditions import Conditions, random_conditions
from tests.tuning.flow.point_family import CLASSES, CONFIG, WEIGHTS, PointNetwork


def write_folder(root: Path) -> Path:
    torch.manual_seed(0)
    root.mkdir()
    (root / CONFIG).write_text('{"width": 8}\n')
    write(root / WEIGHTS, PointNetwork().state_dict())
    return root


def conditions() -> Conditions:
    return random_conditions("abcd", {"kind": [1, CLASSES], "size": [1]})
