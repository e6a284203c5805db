"""Shared fixtures: reference values, tiny runs, and one thread per worker so that runs repeat."""

import gc
import math
from pathlib import Path

import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import RewardArch
from tests import tiny_runs
from tests.compat.reference import ROOT
from training import networks, progress

REPO = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_lines_after_seconds():
    """Let progress bars write no line because a second has passed.

    A run of 0.5 s takes several seconds on a loaded machine. Then a bar writes a line into standard error, on
    which a test may expect one line alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "FIRST_LINE", math.inf)
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Return the folder of the reference values: tests/references, or what EG3D_RLHF_FIXTURES names."""
    if not ROOT.is_dir():
        pytest.skip(f"EG3D_RLHF_FIXTURES: there is no folder {ROOT}")
    return ROOT


@pytest.fixture(scope="session")
def published_labels() -> Path:
    """Return the file of the 4,346 pairs that were published with the method."""
    path = ROOT.parent / "data" / "ranked_seeds.csv"
    if not path.is_file():
        pytest.skip(
            "the published ranked_seeds.csv may not be redistributed; put it into data/ beside the folder"
            " that EG3D_RLHF_FIXTURES names"
        )
    return path


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


@pytest.fixture(scope="session")
def other_reward(tiny_reward, tmp_path_factory) -> Path:
    """File of a reward like `tiny_reward` with other weights, which can be its held-out reward."""
    first = load_reward(tiny_reward)
    torch.manual_seed(5)
    return Reward(first.observation, RewardModel(first.network.arch)).save(
        tmp_path_factory.mktemp("other") / "other.safetensors"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Put off garbage collections while tests are collected, and leave what was made out of later ones.

    A full collection visits every object of the 1,000 modules and 7,600 tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
