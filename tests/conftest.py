"""Shared fixtures: where the reference values live, tiny runs,
and one thread per worker so that runs repeat.
"""

import os
from pathlib import Path

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.rewards.slab_network import RewardArch, RewardModel
from tests import tiny_runs
from training import networks

REPO = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def _fixtures_root() -> Path:
    return Path(os.environ.get("EG3D_RLHF_FIXTURES", REPO.parent / "shared" / "fixtures"))


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of reference values; the tests that need it are skipped, with the reason, where it does not
    exist.
    """
    root = _fixtures_root()
    if not root.is_dir():
        pytest.skip(f"reference values not found at {root}; set EG3D_RLHF_FIXTURES to their folder")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Zip of 24 images of 32 pixels with camera labels."""
    return tiny_runs.write_dataset(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture(scope="session")
def tiny_networks(tmp_path_factory) -> Path:
    """Network file of the tiny generator and discriminator."""
    path = tmp_path_factory.mktemp("networks") / "tiny.safetensors"
    networks.save(path, tiny_runs.build_networks())
    return path


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory) -> Path:
    """File of a tiny untrained reward that reads slabs of 12 x 14 x 12 points."""
    arch = RewardArch(
        feature_maps=(8, 16),
        patch=2,
        input_scale=0.02,
        pooling="grid",
        trunk=(16, 16),
        embedding=16,
        heads=(8, 8),
        groups=4,
        final_cells=(2, 2, 2),
        bottleneck_cells=(1, 1, 1),
    )
    torch.manual_seed(3)
    return Reward(SigmaSlab(SlabSpec(resolution=24)), RewardModel(arch)).save(
        tmp_path_factory.mktemp("reward") / "tiny.safetensors"
    )
