"""The examples in the help of train.py and of the tools around labels, rewards and assets, run as a user would."""

import shlex
import subprocess
import sys

import pytest

import train
from tests.tools.examples import example_of, own_cache
from tools import build_assets, label_synthetic, train_critic, train_features, train_reward


def run_example(tool, repo, folder) -> str:
    """Run the example of a tool's help in `folder`; returns what it printed."""
    python, script, *flags = shlex.split(example_of(tool.main))
    assert python == "python"
    command = [sys.executable, str(repo / script), *flags]
    done = subprocess.run(command, cwd=folder, env=own_cache(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_labels_and_the_reward_that_is_trained_on_them(repo, tmp_path):
    run_example(label_synthetic, repo, tmp_path)
    assert len((tmp_path / "runs/example/labels.jsonl").read_text().splitlines()) == 40
    assert "ordered as labelled" in run_example(train_reward, repo, tmp_path)
    assert (tmp_path / "runs/example/reward/reward.safetensors").exists()


@pytest.mark.long
def test_the_shape_critic(repo, tmp_path):
    (tmp_path / "assets").symlink_to(repo / "assets")
    assert "held-out shapes" in run_example(train_critic, repo, tmp_path)
    assert (tmp_path / "runs/critic.safetensors").exists()


@pytest.mark.parametrize("tool", [build_assets, pytest.param(train_features, marks=pytest.mark.long)], ids=lambda tool: tool.__name__)
def test_examples_that_only_print(tool, repo, tmp_path):
    assert run_example(tool, repo, tmp_path).strip()


@pytest.mark.long
def test_the_example_of_train(repo, tmp_path):
    """Renders the 4,000 heads first."""
    run_example(train, repo, tmp_path)
    assert list(tmp_path.glob("runs/*/network-snapshot-*.safetensors"))
