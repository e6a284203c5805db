"""A folder of the family of point_family.py, of random weights, and conditions for it."""

from pathlib import Path

import torch

from eg3d_rlhf.tuning.flow.conditions import Conditions, random_conditions
from eg3d_rlhf.tuning.flow.families.folder import write_network
from tests.tuning.flow.point_family import CLASSES, FILES, PointNetwork


def write_folder(root: Path) -> Path:
    torch.manual_seed(0)
    return write_network(root, FILES, {"width": 8}, PointNetwork().state_dict())


def conditions() -> Conditions:
    return random_conditions("abcd", {"kind": [1, CLASSES], "size": [1]})
