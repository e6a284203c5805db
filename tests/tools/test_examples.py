"""The examples in the help of train.py and of the jobs around labels, rewards and assets, run as a user
would.
"""

import pytest

import train
from builders import build, features, shapes, toy_flow
from eg3d_rlhf.modes import image_sets, label_files, reward_files, reward_training
from tests.tools.examples import run_example
from training.dataset import ImageFolderDataset


@pytest.mark.long
def test_labels_and_the_reward_that_is_trained_on_them(tmp_path):
    run_example(label_files.synthetic, tmp_path)
    assert len((tmp_path / "runs/example/labels.jsonl").read_text().splitlines()) == 100
    run_example(reward_training.train, tmp_path)
    assert (tmp_path / "runs/reward/reward.safetensors").exists()


@pytest.mark.long
def test_the_shape_features(tmp_path):
    assert "Fréchet" in run_example(shapes.shapes, tmp_path)
    assert (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    [build.build, toy_flow.toy_flow, pytest.param(features.features, marks=pytest.mark.long)],
    ids=lambda command: command.name,
)
def test_examples_that_only_print(command, tmp_path):
    assert run_example(command, tmp_path).strip()


@pytest.mark.long
def test_examples_that_write(repo, tmp_path):
    (tmp_path / "assets").symlink_to(repo / "assets")
    run_example(image_sets.convert, tmp_path)
    assert len(ImageFolderDataset(tmp_path / "people.zip", resolution=32, c_dim=25)) == 128
    assert run_example(reward_files.join, tmp_path).strip()


@pytest.mark.long
def test_the_example_of_train(tmp_path):
    """Renders the 4,000 heads first."""
    run_example(train.main, tmp_path)
    assert list(tmp_path.glob("runs/*/network-snapshot-*.safetensors"))
