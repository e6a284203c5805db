"""The accuracy that a reward's file states is announced before the reward is used, and decides whether it may
tune a generator.
"""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.__main__ import main as package
from eg3d_rlhf.modes.gan import GAN
from eg3d_rlhf.modes.online import announce_rewards
from eg3d_rlhf.preferences.dataset import Splits, describe_repeats
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards.evaluation import rate, too_few
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.stated_accuracy import RewardUse, accuracy_of, announce_accuracy, announce_reward
from eg3d_rlhf.tuning.distill.guidance.geometry import announce_geometry
from eg3d_rlhf.tuning.flow.training.latent_reward import KIND
from tests.rejections import raising, rejected
from training.storage import write_tensors

WEAK = {"correct": 3, "n": 6, "accuracy": 0.5, "interval_95": [0.188, 0.812]}
STRONG = {"correct": 160, "n": 200, "pairs": 200, "accuracy": 0.8, "interval_95": [0.739, 0.85]}
TUNES = RewardUse(tunes=True)


def write_reward(folder, name, **provenance):
    """Write the bundled reward with other facts about its training, and return the path."""
    reward = load_reward()
    reward.provenance = {**reward.provenance, "test_accuracy_clean": None, **provenance}
    return reward.save(folder / f"{name}.safetensors")


@pytest.fixture
def weak(tmp_path):
    return write_reward(tmp_path, "weak", test_accuracy=WEAK)


def test_a_strong_reward_is_announced_with_its_interval(capsys):
    announce_accuracy({"test_accuracy": STRONG, "pairs": {"train": 300}}, "--reward-ckpt", TUNES)
    printed = capsys.readouterr()
    assert {"0.800", "0.739", "0.850"} <= set(re.findall(r"\d\.\d+", printed.out)) and printed.err == ""
    assert "200" in printed.out and "--reward-ckpt" in printed.out


def test_few_labels_cause_a_warning(capsys):
    announce_accuracy({"test_accuracy": {**STRONG, "pairs": 53}}, "--reward-ckpt", TUNES)
    assert "Warning: --reward-ckpt" in capsys.readouterr().err
    for training_count in (69, 0):
        provenance = {"test_accuracy": STRONG, "pairs": {"train": training_count}}
        announce_accuracy(provenance, "--reward-ckpt", TUNES)
        assert str(training_count) in capsys.readouterr().err


@pytest.mark.parametrize(
    "provenance",
    [
        {"test_accuracy": WEAK},
        {"test_accuracy": {**STRONG, "accuracy": 0.3, "interval_95": [0.2, 0.4]}},
        {"held_out": {"auc": 0.55, "n": [10, 10]}},
        {"evaluation": {"pairs": 40, "latent": {"accuracy": [0.5, 0.35, 0.65]}}},
    ],
    ids=["weak", "inverted", "meshes", "latents"],
)
def test_a_weak_reward_is_rejected_where_it_tunes_and_warned_of_where_it_ranks(provenance, capsys):
    assert accuracy_of(provenance).is_weak
    with raising("--reward", "--weak-reward"):
        announce_accuracy(provenance, "--reward", TUNES)
    capsys.readouterr()
    for use in (RewardUse(), RewardUse(tunes=True, allows_weak=True)):
        announce_accuracy(provenance, "--reward", use)
        assert "Warning: --reward" in capsys.readouterr().err
    announce_accuracy(provenance, "--reward", RewardUse(is_main=False))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "declaration", [{"control": "inverted labels"}, {"wrong_faces": True}, {"permuted": 0}], ids=str
)
def test_declared_controls_are_exempt(declaration, capsys):
    announce_accuracy({"test_accuracy": WEAK, **declaration}, "--reward-ckpt", TUNES)
    assert "Warning" not in capsys.readouterr().err


def test_mesh_controls_are_exempt(capsys):
    weak_meshes = {"held_out": {"auc": 0.5, "n": [9, 9]}}
    announce_accuracy({**weak_meshes, "training": {"randomised": True}}, "--geometry-reward", TUNES)
    assert "Warning" not in capsys.readouterr().err


def test_without_an_accuracy_there_is_a_warning(capsys):
    announce_accuracy({}, "--reward-ckpt", TUNES)
    assert "Warning: --reward-ckpt" in capsys.readouterr().err


def test_rewards_without_labels_are_exempt(capsys):
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import untrained_reward

    announce_reward(untrained_reward("solid", load_generator().generator), "--reward", TUNES)
    assert capsys.readouterr() == ("", "")


def test_train_rejects_a_weak_reward_before_the_first_tick(weak, tmp_path):
    flags = ["--reward=sigma", "--kimg=0.004", "--no-summary", f"--outdir={tmp_path / 'runs'}"]
    result = CliRunner().invoke(GAN.command, [*flags, f"--reward-ckpt={weak}"])
    rejected(result, "--reward-ckpt", "0.188", "--weak-reward")
    assert not (tmp_path / "runs").exists()
    # a flag that does nothing is rejected
    rejected(CliRunner().invoke(GAN.command, ["--weak-reward", "--dry-run"]), "--weak-reward")


@pytest.mark.parametrize(
    "flag", ["--reward-ckpt=assets/reward.safetensors", "--lambda-r=5", "--reward-clip=none", "--set=rlr=.1"]
)
def test_settings_of_a_reward_need_a_reward(flag):
    rejected(CliRunner().invoke(GAN.command, [flag, "--dry-run"]), "--reward")
    assert CliRunner().invoke(GAN.command, ["--reward=sigma", flag, "--dry-run"]).exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize("accepted", [["--weak-reward"], ["--lambda-r=0"]])
def test_train_accepts_a_weak_reward_on_request_and_without_weight(weak, tmp_path, accepted):
    flags = ["--reward=sigma", "--kimg=0.004", "--no-summary", f"--outdir={tmp_path / 'runs'}"]
    result = CliRunner().invoke(GAN.command, [*flags, f"--reward-ckpt={weak}", *accepted])
    assert result.exit_code == 0 and "0.188" in result.stdout + result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    # the run resumes without the flag, since its reward was accepted when it began
    resumed = CliRunner().invoke(GAN.command, [f"--resume={run}", "--kimg=0.008"])
    assert resumed.exit_code == 0, resumed.stderr


def test_other_jobs_reject_a_weak_reward_before_they_work(weak, tmp_path):
    sweep = ["report", "sweep", "--lambda-r=10", "--lambda-sigma=0", f"--outdir={tmp_path / 'sweep'}"]
    rejected(
        CliRunner().invoke(package, [*sweep, f"--reward-ckpt={weak}"]),
        "--reward-ckpt",
        "train_flags=--weak-reward",
    )
    invert = ["generator", "invert", "--latents=3", "--weights=0,0.1", f"--outdir={tmp_path / 'invert'}"]
    rejected(
        CliRunner().invoke(package, [*invert, f"--reward-ckpt={weak}"]), "--reward-ckpt", "--weak-reward"
    )
    with raising("--geometry-reward", "--weak-reward"):
        announce_geometry(str(weak), TUNES)
    assert not list(tmp_path.glob("sweep/*")) and not list(tmp_path.glob("invert/*"))


class _Run:
    """Stand-in for a run, with what the check of rewards reads."""

    resumed = None

    def __init__(self, **flags):
        from training.distributed import SINGLE

        self.flags = flags
        self.ranks = SINGLE


def test_online_tuning_rejects_a_weak_reward_of_latents(tmp_path):
    path = tmp_path / "latent.safetensors"
    record = {"evaluation": {"pairs": 40, "latent": {"accuracy": [0.5, 0.35, 0.65]}}}
    write_tensors(path, KIND, {"x": torch.zeros(1)}, {"form": {}, "record": record})
    with raising("--reward", "--weak-reward", "0.350"):
        announce_rewards(f"own,{path}:2", _Run())
    announce_rewards(f"own,{path}:2", _Run(weak_reward=True))
    announce_rewards("own", _Run())


LABELS = [Preference(winner=2 * k, loser=2 * k + 1, annotator="ann") for k in range(45)]
CORRECT = np.arange(45) % 5 > 0


@pytest.mark.parametrize(
    "repeated",
    [
        LABELS * 5,
        LABELS + [Preference(winner=label.winner, loser=label.loser, annotator="bob") for label in LABELS],
    ],
    ids=["five times", "two annotators"],
)
def test_repeated_labels_give_the_interval_and_the_warning_of_the_pairs(repeated):
    once = rate(CORRECT, LABELS)
    several = rate(np.tile(CORRECT, len(repeated) // 45), repeated)
    assert several["interval_95"] == pytest.approx(once["interval_95"], abs=1e-12)
    assert (several["n"], several["pairs"], several["accuracy"]) == (len(repeated), 45, once["accuracy"])

    def splits(labels):
        return Splits(train=tuple(labels), val=tuple(labels), test=tuple(labels), dropped=0, ties=0)

    assert (
        splits(repeated).pair_counts()
        == splits(LABELS).pair_counts()
        == dict.fromkeys(("train", "val", "test"), 45)
    )
    assert too_few(splits(repeated).pair_counts(), (0.7, 0.15, 0.15)) != ""
    assert str(len(repeated) - 45) in describe_repeats(repeated) and describe_repeats(LABELS) == ""


def test_a_pair_in_the_other_order_is_the_same_pair():
    inverted = [Preference(winner=label.loser, loser=label.winner, annotator="bob") for label in LABELS]
    both = rate(np.concatenate([CORRECT, ~CORRECT]), LABELS + inverted)
    assert both["pairs"] == 45 and both["accuracy"] == 0.5
    # always one of two answers to a pair is met, which says nothing: as wide as 45 tosses of a coin
    low, high = both["interval_95"]
    assert low < 0.37 and high > 0.63
