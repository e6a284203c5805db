"""The controlled study: its arms' labels and rewards, its criterion on made-up numbers, and all of it at tiny
size.
"""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import HeldOut
from eg3d_rlhf.evaluation import filters, heads, trainings
from eg3d_rlhf.evaluation.baselines import measurements as baseline_measurements
from eg3d_rlhf.evaluation.controlled_study import measurements
from eg3d_rlhf.evaluation.controlled_study.measurements import PSIS
from eg3d_rlhf.evaluation.controlled_study.plan import permute_weights, randomise
from eg3d_rlhf.evaluation.controlled_study.results import choose_psi, criterion
from eg3d_rlhf.evaluation.settings import (
    ARMS,
    ARMS_WITHOUT_RUNS,
    LABELS,
    PRE_REGISTERED_ARMS,
    STEERED_TUNED,
)
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes import report_studies
from eg3d_rlhf.modes.jobs import command_of
from eg3d_rlhf.preferences.labels import Preference, invert, write_labels
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan import phase
from tests import tiny_runs
from tests.evaluation.test_heads import shapes_seen
from training import networks


def reduction_interval(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Bootstrap the error reduction over training seeds and latents, independently of the study's code.

    Args:
        before: errors of the defective heads before tuning, [N].
        after: errors of the same latents with each training seed, [S, N].
    """
    rng = np.random.default_rng(20261126)
    seeds = rng.integers(len(after), size=(4000, len(after)))
    latents = rng.integers(len(before), size=(4000, len(before)))
    # [4000, S, N]: every resampled seed with every resampled latent
    errors = after[seeds[:, :, None], latents[:, None, :]].mean(axis=(1, 2))
    return list(np.quantile(1 - errors / before[latents].mean(axis=1), [0.025, 0.975]))


def test_randomised_and_inverted_labels():
    labels = [Preference(winner=2 * i, loser=2 * i + 1, clean=2 * i) for i in range(400)]
    over = [invert(label) for label in labels]
    assert all(
        (a.winner, a.loser, a.clean) == (b.loser, b.winner, b.clean)
        for a, b in zip(labels, over, strict=True)
    )
    tossed = randomise(labels, 0)
    swapped = np.mean([a.winner != b.winner for a, b in zip(labels, tossed, strict=True)])
    assert 0.4 < swapped < 0.6 and tossed == randomise(labels, 0) != randomise(labels, 1)
    assert all({a.winner, a.loser} == {b.winner, b.loser} for a, b in zip(labels, tossed, strict=True))


def test_permuted_weights_are_the_same_numbers_elsewhere(tiny_reward):
    first = load_reward(tiny_reward)
    other = permute_weights(load_reward(tiny_reward), 3)
    pairs = list(zip(first.network.state_dict().values(), other.network.state_dict().values(), strict=True))
    assert all(torch.equal(a.flatten().sort().values, b.flatten().sort().values) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in pairs) and other.provenance["permuted"] == 3
    again = permute_weights(load_reward(tiny_reward), 3).network.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(other.network.state_dict().values(), again, strict=True))


def arm_of(error, frechet, harm) -> dict:
    return {"error_defective": error, "shape_frechet": frechet, "intact_degraded": harm}


def test_the_criterion_asks_for_every_seed_and_both_primary_endpoints():
    labels = arm_of([0.1, 0.1], [1.0, 1.0], [0.02, 0.0])
    primary_endpoints = ["error_defective", "shape_frechet"]

    def beaten(**other) -> bool:
        return criterion({LABELS: labels, **other}, primary_endpoints)["labels_win"]

    weak = arm_of([0.5, 0.5], [2.0, 2.0], [0.0, 0.0])
    assert beaten(randomised=weak) and not beaten()  # without another arm nothing is shown
    assert not beaten(randomised=weak, post_processing=arm_of([0.5, 0.09], [2.0, 2.0], [0.5, 0.5]))
    assert not beaten(randomised=arm_of([0.5, 0.5], [2.0, 0.9], [0.0, 0.0]))
    worse = {**labels, "intact_degraded": [0.1, 0.0]}
    result = criterion({LABELS: worse, "randomised": weak}, primary_endpoints)
    assert not result["labels_win"] and result["against"]["randomised"]["no_more_harm"] == [False, True]
    near = {**weak, "shape_frechet": [0.0, 0.0]}
    assert criterion({LABELS: labels, "randomised": near}, ["error_defective"])["labels_win"]


def test_truncation_takes_the_largest_psi_that_reaches_the_share():
    seen = {
        0.9: shapes_seen([0.5, 0.5, 0.0]),
        0.5: shapes_seen([0.5, 0.0, 0.0]),
        0.2: shapes_seen([0.0, 0.0, 0.0]),
    }
    assert (
        choose_psi(seen, 0.6),
        choose_psi(seen, 0.7),
        choose_psi({0.9: seen[0.9], 0.5: seen[0.5]}, 0.9),
    ) == (
        0.5,
        0.2,
        0.5,
    )


def planned(*flags: str) -> dict:
    result = CliRunner().invoke(report_studies.controlled_study, ["-n", *flags])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands(tmp_path):
    plan = planned(f"--outdir={tmp_path}", "--seeds=0,4", "--rewards=2", "--label-sets=2", "--", "--kimg=0.1")
    kinds = {arm: sum(name.startswith(f"{arm}-s") for name in plan) for arm in ARMS}
    assert kinds == {
        **dict.fromkeys(ARMS_WITHOUT_RUNS, 0),
        LABELS: 8,
        STEERED_TUNED: 8,
        "no-reward": 2,
        "smoothness": 2,
        "permuted": 4,
        "randomised": 8,
        "inverted": 8,
    }
    steered = [command for name, command in plan.items() if name.startswith("steering, ")]
    assert [command[1] for command in steered] == ["steer"] * 2
    # each network of this arm begins from the network that the same labels steered
    begins = {flag for flag in plan[f"{STEERED_TUNED}-s4-d1-r0"] if flag.startswith("--init=")}
    assert begins == {f"--init={tmp_path / 'steered' / 'd1' / 'steered.safetensors'}"}
    assert sum(name.startswith("reward: ") for name in plan) == 3 * 4 - 1  # one is bundled
    tuned = [command for name, command in plan.items() if "-s4" in name]
    assert all({"--seed=4", "--no-summary", "--kimg=0.1"} <= set(command) for command in tuned)
    assert (
        "--lambda-r=0" in plan["no-reward-s4-d0-r0"] and "--reward=smoothness" in plan["smoothness-s0-d0-r0"]
    )
    reward, *tuned = planned("--only=randomised", "--seeds=0", "--rewards=1", "--label-sets=1")
    assert reward.startswith("reward: randomised") and tuned == ["labels-s0-d0-r0", "randomised-s0-d0-r0"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts run here, without a start of Python for each."""
    asked = []

    def run(_, part):
        asked.append(part.name)
        script, *flags = part.command()
        job = {trainings.TRAIN: "train", trainings.TRAIN_REWARD: "reward train"}[script]
        result = CliRunner().invoke(command_of(job), flags)
        assert result.exit_code == 0, result.output
        return part.products(), {"seconds": 1.0}

    def one_by_one(needs, setup, arguments, _workers, logs, on_done, stop):
        return run_tasks(needs, setup, arguments, 1, logs, on_done)

    monkeypatch.setattr(trainings._Children, "run", run)
    monkeypatch.setattr(trainings, "run_tasks", one_by_one)  # signals are noted in the main thread alone
    return asked


@pytest.mark.parametrize(
    "arms",
    [
        [LABELS, "post-processing", "truncation"],
        # so few labels determine no direction, so nothing is tuned from a steered network
        pytest.param(
            [name for name in ARMS if name not in ("inverted", STEERED_TUNED)], marks=pytest.mark.long
        ),
    ],
    ids=["few", "most"],
)
def test_all_of_it_at_tiny_size(arms, in_this_process, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "POINTS", 32)
    monkeypatch.setattr(baseline_measurements, "POINTS", 32)
    monkeypatch.setattr(measurements, "CHOOSING", 2)
    for name in ("CALIBRATION", "STANDARDISATION"):  # a few latents to find the reward's scale with
        monkeypatch.setattr(phase, name, HeldOut(name, 500_000, 8, ""))
    monkeypatch.setattr(measurements, "PSIS", PSIS[::4])
    few = dict(list(filters.FILTERS.items())[:2])
    for module in (filters, measurements):
        monkeypatch.setattr(module, "FILTERS", few)

    def occupied(_, shapes):
        return (shapes < 0).reshape(len(shapes), 8, -1).mean(axis=2).astype(float)

    monkeypatch.setattr(measurements.ShapeFeatures, "of_grids", occupied)
    monkeypatch.setattr(measurements, "DEFAULT_ASSET", tmp_path / "tiny.safetensors")
    networks.save(tmp_path / "tiny.safetensors", tiny_runs.build_networks(z_dim=64))
    generator = load_generator(tmp_path / "tiny.safetensors").hash
    pairs = [Preference(winner=2 * i, loser=2 * i + 1, generator=generator) for i in range(12)]
    labels = write_labels(tmp_path / "labels.jsonl", pairs)
    flags = [
        f"--network={tmp_path / 'tiny.safetensors'}",
        f"--labels={labels}",
        f"--outdir={tmp_path / 'study'}",
        "--seeds=0,1",
        "--rewards=1",
        "--label-sets=1",
        "--latents=3",
        "--jobs=1",
        f"--only={','.join(arms)}",
        "--train=--preset=tiny --epochs=1 --resolution=24",
        "--",
    ]
    tune = [
        flag
        for flag in tiny_runs.train_flags(tiny_data, "", "")
        if not flag.startswith(("--init", "--outdir"))
    ]
    result = CliRunner().invoke(report_studies.controlled_study, [*flags, *tune, "--kimg=0.008"])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "study" / "controlled-study.json").read_text())
    assert list(data["arms"]) == arms and data["primary_endpoints"] == ["error_defective", "shape_frechet"]
    assert all(
        len(figures["error_defective"]) == len(figures["shape_frechet"]) == 2
        for figures in data["arms"].values()
    )
    compared = (set(arms) & set(PRE_REGISTERED_ARMS)) - {LABELS}
    assert set(data["criterion"]["against"]) == compared and set(data["psi"]) == {"0", "1"}
    assert (tmp_path / "study" / "controlled-study.md").read_text().count("(primary)") == len(
        data["primary_endpoints"]
    )
    # each interval can be computed again from the arrays
    arrays = safetensors.numpy.load_file(tmp_path / "study" / "controlled-study.safetensors")
    defective = arrays["before/is_defective"]
    assert defective.sum() == data["defective"]
    for name, figures in data["arms"].items():
        errors = arrays[f"{name}/error"][:, defective]
        assert errors.mean(axis=1) == pytest.approx(figures["error_defective"])
        assert figures["error_reduction_ci95"] == pytest.approx(
            reduction_interval(arrays["before/error"][defective], errors), abs=0.02
        )
    done = len(in_this_process)
    assert (
        CliRunner().invoke(report_studies.controlled_study, [*flags, *tune, "--kimg=0.008"]).exit_code == 0
        and len(in_this_process) == done
    )
