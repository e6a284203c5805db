"""Reward training end to end on toy slabs, in which the larger ball is preferred, and the command line
around it.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.reward_training import train as main
from eg3d_rlhf.people.study.power import decided_trials
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import (
    MIN_TEST,
    auc,
    auc_interval,
    calibration_error,
    evaluate,
    fit_temperature,
    log_loss,
    margins,
    too_few,
    too_few_shapes,
)
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.settings import TrainOptions, default_options, with_changes
from tests.rejections import raising, rejected

SHAPE = (12, 14, 12)


def radius(seed):
    return np.random.RandomState(seed).uniform(0.15, 0.4)


def blobs(seeds):
    """Return a soft ball per seed in noise, whose position and radius the seed determines: [N, 1, D, H,
    W] in [0, 100].
    """
    z, y, x = np.meshgrid(*[np.linspace(0, 1, n) for n in SHAPE], indexing="ij")
    volumes = []
    for seed in seeds:
        rng = np.random.RandomState(seed)
        r = rng.uniform(0.15, 0.4)
        cz, cy, cx = rng.uniform(0.4, 0.6, 3)
        v = 1 / (
            1 + np.exp((np.sqrt((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) - r) * 20)
        ) + 0.05 * rng.randn(*SHAPE)
        volumes.append((v - v.min()) / np.ptp(v) * 100)
    return torch.tensor(np.stack(volumes)[:, None], dtype=torch.float32)


def toy_labels(count, start=0, noise=0.0):
    labels = []
    rng = np.random.RandomState(start + 1)
    for a in range(start, start + 2 * count, 2):
        best, worst = sorted((a, a + 1), key=radius, reverse=True)
        winner, loser = (worst, best) if rng.rand() < noise else (best, worst)
        labels.append(Preference(winner=winner, loser=loser, clean=best))
    return labels


def filled(*parts, cache=ObservationCache):
    store = cache(blobs)
    store.fill(s for labels in parts for label in labels for s in (label.winner, label.loser))
    return store


OPTIONS = TrainOptions(preset="tiny", epochs=6, lr=4e-3, batch=8)


def test_learns_which_blob_is_larger_in_seconds():
    train = toy_labels(160, noise=0.05)
    val = toy_labels(40, 1000)
    test = toy_labels(100, 2000, noise=0.1)
    store = filled(train, val, test)
    train_state = train_reward(TrainData(train=train, val=val, store=store), OPTIONS)
    report = evaluate(train_state.model, store, test)
    assert report["clean"]["accuracy"] > 0.9, report
    low, high = report["clean"]["interval_95"]
    assert low < report["clean"]["accuracy"] < high
    assert report["labels"]["accuracy"] == pytest.approx(
        report["clean"]["accuracy"] - report["label_noise"], abs=0.08
    )
    assert train_state.history[train_state.best_epoch]["val_accuracy"] == max(
        r["val_accuracy"] for r in train_state.history
    )
    swapped = [Preference(winner=p.loser, loser=p.winner) for p in test]
    scores = {s: float(train_state.model.score(store.take([s]))) for p in test for s in (p.winner, p.loser)}
    np.testing.assert_array_equal(margins(scores, test), -margins(scores, swapped))


@pytest.mark.parametrize("references", [pytest.param(0, marks=pytest.mark.long), 6])
def test_resume_and_repetition_equal_the_straight_run(tmp_path, references):
    train = toy_labels(20)
    val = toy_labels(8, 100)
    store = filled(train, val)
    seeds = tuple(range(500, 500 + references))
    reference_store = filled(toy_labels(references // 2, 500)) if references else None
    train_data = TrainData(
        train=train, val=val, store=store, references=seeds, reference_store=reference_store
    )
    options = with_changes(OPTIONS, epochs=5, patience=5, reference_samples=references, reconstruction=0.01)
    straight = train_reward(train_data, options)

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 2:
            raise Stop

    path = tmp_path / "state.pt"
    with pytest.raises(Stop):
        train_reward(train_data, options, state_file=path, on_epoch=stop)
    resumed = train_reward(train_data, options, state_file=path)
    drop = [[{k: v for k, v in r.items() if k != "seconds"} for r in s.history] for s in (straight, resumed)]
    assert drop[0] == drop[1] and len(drop[0]) == 5
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = train_reward(train_data, with_changes(options, seed=1))
    assert not torch.equal(other.model.MLP.input_layer.weight, straight.model.MLP.input_layer.weight)
    with raising("state.pt", " lr."):
        train_reward(train_data, with_changes(options, lr=1e-4), state_file=path)
    path.write_bytes(b"cut")
    with raising("state.pt"):
        train_reward(train_data, options, state_file=path)


def test_training_leaves_the_global_generator_alone():
    train = toy_labels(8)
    val = toy_labels(4, 100)
    torch.manual_seed(1)
    random_state_before = torch.get_rng_state()
    train_reward(TrainData(train=train, val=val, store=filled(train, val)), with_changes(OPTIONS, epochs=1))
    assert torch.equal(random_state_before, torch.get_rng_state())


def test_paper_preset_has_the_papers_settings():
    o = default_options("paper")
    assert (o.lr, o.weight_decay, o.batch, o.epochs, o.reference_samples, o.mirror) == (
        1e-5,
        1e-4,
        1,
        10,
        1000,
        False,
    )
    w = o.weights
    assert (w.pairs, w.scalar, w.bradley_terry, w.strength, w.reconstruction, w.drawn_from_epoch) == (
        1,
        1e-3,
        1e-3,
        1e-8,
        1e-2,
        3,
    )
    with raising("heads", "paper", "small", "'huge'"):
        default_options("huge")


def test_calibration_error_and_temperature_recover_known_odds():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    # The sign is random with the odds that the logit states.
    margin = np.where(rng.random(logit.size) < 1 / (1 + np.exp(-logit)), logit, -logit)
    assert calibration_error(margin) < 0.01
    assert calibration_error(margin * 4) > 0.08
    assert fit_temperature(margin * 4) == pytest.approx(4, rel=0.1)
    assert calibration_error(np.array([50.0, 50.0])) == pytest.approx(0, abs=1e-9)
    assert log_loss(np.zeros(3)) == pytest.approx(math.log(2))


def test_the_cache_computes_each_seed_once_and_is_kept_in_a_file(tmp_path):
    drawn = []

    def source(seeds):
        drawn.extend(seeds)
        return blobs(seeds)

    path = tmp_path / "slabs.safetensors"
    store = ObservationCache(source, path)
    assert store.fill([1, 2, 3, 2], batch=2) == 3 and store.fill([3, 4]) == 1
    store.save()
    again = ObservationCache(source, path)
    assert again.fill([4, 3, 2, 1]) == 0 and drawn == [1, 2, 3, 4]
    torch.testing.assert_close(again.take([4, 1]), blobs([4, 1]), rtol=1e-3, atol=1e-3)
    path.write_bytes(b"cut")
    with raising("slabs.safetensors"):
        ObservationCache(source, path)


def test_places_in_a_batch_do_not_correlate_with_labels():
    """Labels name the winner first. Values that depend on the place in a batch, such as a ray's jitter, must
    not reveal the winner.
    """
    rng = np.random.default_rng(0)
    pairs = rng.permutation(512).reshape(256, 2)  # winner, loser; both equally good
    store = ObservationCache(
        lambda seeds: torch.arange(len(seeds), dtype=torch.float32).reshape(-1, 1, 1, 1) % 2
    )
    store.fill(pairs.flatten().tolist(), batch=16)
    won, lost = (store.take(pairs[:, side].tolist()).flatten() for side in (0, 1))
    assert abs(won.mean() - lost.mean()) < 0.2
    reversed_pairs = ObservationCache(
        lambda seeds: torch.arange(len(seeds), dtype=torch.float32).reshape(-1, 1, 1, 1) % 2
    )
    reversed_pairs.fill(pairs[:, ::-1].flatten().tolist(), batch=16)
    assert torch.equal(reversed_pairs.take(range(512)), store.take(range(512)))


@pytest.fixture(scope="module")
def network(tiny_networks):
    """Return the file of a tiny untrained generator, and its hash."""
    return tiny_networks, load_generator(tiny_networks).hash


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_trains_and_writes_everything(network, tmp_path):
    path, generator = network
    pairs = [Preference(winner=2 * i, loser=2 * i + 1, generator=generator, psi=0.7) for i in range(24)]
    labels = write_labels(tmp_path / "labels.jsonl", pairs)
    run = [
        "--network",
        path,
        "--labels",
        labels,
        "--run-dir",
        tmp_path / "run",
        "--preset",
        "tiny",
        "--epochs",
        2,
        "--resolution",
        32,
    ]
    result = invoke(*run, "--reference-samples", 10, "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert any("360" in line for line in result.stderr.splitlines() if line.startswith("Warning: "))
    assert "360" in result.stdout.splitlines()[-2]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "reward.safetensors",
        "reward.json",
        "report.json",
        "curves.json",
        "curves.png",
        "crop.json",
        "crop.png",
        "stats.jsonl",
        "training_options.json",
        "state.pt",
    }
    reward = load_reward(tmp_path / "run" / "reward.safetensors")
    known = reward.provenance
    assert reward.observation.spec.resolution == 32
    assert (known["psi"], known["generator"], known["architecture"]) == (0.7, generator, "eg3d")
    assert reward.score_observed(torch.rand(1, *reward.observation.shape) * 100).shape == (1,)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert sum(report["splits"].values()) == 24 and report["splits"]["train"] in (16, 17)
    tested = report["test"]["labels"]
    assert tested["n"] == report["splits"]["test"]
    assert f"{tested['correct']}/{tested['n']}" in result.stdout
    assert all(f"{end:.3f}" in result.stdout for end in tested["interval_95"])
    assert len((tmp_path / "run" / "stats.jsonl").read_text().splitlines()) == 2
    again = invoke(*run, "--reference-samples", 10)
    rejected(again, "--resume")
    reward_bytes_before = (tmp_path / "run" / "reward.safetensors").read_bytes()
    assert invoke("--resume", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "reward.safetensors").read_bytes() == reward_bytes_before
    numbered = invoke(
        *run[:4],
        "--preset=tiny",
        "--epochs=1",
        "--resolution=32",
        "--outdir",
        tmp_path / "runs",
        "--set=desc=again",
    )
    assert numbered.exit_code == 0 and [p.name for p in (tmp_path / "runs").iterdir()] == [
        "00000-reward-labels-tiny-s0-again"
    ]


@pytest.mark.parametrize(
    ("label", "extra", "names"),
    [
        (Preference(winner=1, loser=2, generator="f" * 64), [], ("any_generator",)),
        (Preference(winner=1, loser=2, psi=0.7), ["--set", "psi=1"], ("--set psi",)),
        (Preference(winner=1, loser=2), ["--set", "fractions=0.5 0.5"], ("fractions", "3")),
    ],
)
def test_user_errors_are_one_line_and_exit_code_two(network, tmp_path, label, extra, names):
    common = {"generator": label.generator, "psi": label.psi}
    labels = write_labels(
        tmp_path / "labels.csv", [Preference(winner=2 * i, loser=2 * i + 1, **common) for i in range(20)]
    )
    result = invoke("--network", network[0], "--labels", labels, "--run-dir", tmp_path / "run", *extra)
    rejected(result, *names)


def test_dry_run_prints_the_resolved_settings_and_writes_nothing(tmp_path):
    result = invoke(
        "--dry-run", "--preset", "paper", "--lr", "0.5", "--set=scalar=2", "--run-dir", tmp_path / "run"
    )
    settings = json.loads(result.stdout)
    assert (
        settings["train"]["lr"] == 0.5
        and settings["train"]["weights"]["scalar"] == 2
        and settings["resolution"] == 256
    )
    assert settings["train"]["reference_samples"] == 1000 and not (tmp_path / "run").exists()


# Warnings about too few labels, and intervals of an AUC


FRACTIONS = (0.7, 0.15, 0.15)


def test_the_warning_about_too_few_pairs_states_the_needed_number():
    warning = too_few({"train": 17, "val": 4, "test": 3}, FRACTIONS)
    assert all(re.search(rf"\b{count}\b", warning) for count in (17, 4, 3, 100, 360))
    # 100 labels are enough to learn from, and too few to measure
    warning = too_few({"train": 70, "val": 15, "test": 15}, FRACTIONS)
    assert "360" in warning and not re.search(r"\b(70|100) (pairs|labels)\b", warning)
    # with a large training share, enough pairs to measure may leave too few to learn from
    warning = too_few({"train": 69, "val": 54, "test": 54}, (0.4, 0.3, 0.3))
    assert "69" in warning and "175" in warning and "54" not in warning
    assert too_few({"train": 252, "val": 54, "test": 54}, FRACTIONS) == ""
    assert "53" in too_few({"train": 252, "val": 54, "test": 53}, FRACTIONS)
    assert "26" in too_few_shapes(26, 60)
    assert too_few_shapes(27, 27) == ""


def test_the_least_number_of_test_pairs_separates_seventy_percent_from_chance():
    assert decided_trials(0.7) == MIN_TEST


def test_an_auc_of_one_has_an_interval_below_one():
    low, high = auc_interval(1.0, 5, 5)
    assert 0.4 < low < 0.8 and high == 1 and auc_interval(0.0, 5, 5) == pytest.approx((0, 1 - low))
    assert auc_interval(0.7, 50, 50) == pytest.approx((0.59, 0.79), abs=0.02)


@pytest.mark.parametrize(
    ("good", "others", "apart"), [(10, 10, 0.0), (10, 10, 1.5), (25, 25, 0.8), (8, 30, 1.0)]
)
def test_the_interval_of_an_auc_covers_the_truth(good, others, apart):
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(apart / 2))
    held = []
    for _ in range(600):
        low, high = auc_interval(auc(rng.normal(apart, 1, good), rng.normal(0, 1, others)), good, others)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.98
