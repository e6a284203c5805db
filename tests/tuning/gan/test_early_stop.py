"""Early stop: the second reward and the distance choose the snapshot, training stays as it was, and a resume
keeps the same one.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import summary
from eg3d_rlhf.generators import KEPT, as_generator, find_network, ws_of_seeds
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.tuning.gan.early_stop import EarlyStop, EarlyStopConfig, consistency, replaces
from eg3d_rlhf.tuning.gan.heldout_metrics import PSI
from tests import tiny_runs
from tests.rejections import rejected
from training import networks, storage

GAINS = {
    "clear": np.array([1.0, 1.1, 0.9, 1.0]),
    "faint": np.array([1.0, -0.5, 0.6, -0.7]),
    "none": np.zeros(4),
    "loss": -np.ones(4),
}


@pytest.mark.parametrize(
    ("errors", "limit", "distance", "kept", "gain", "expected"),
    [
        (0, None, 2.0, 1.0, "clear", True),
        (0, None, 2.0, 1.0, "faint", True),
        (0, None, 2.0, 1.0, "none", False),
        (2, None, 2.0, 1.0, "clear", True),
        (2, None, 2.0, 1.0, "faint", False),
        (0, None, 2.0, 1.0, "loss", False),
        (2, None, 1.0, 2.0, "none", True),
        (2, None, 1.0, 2.0, "faint", True),
        (2, None, 1.0, 2.0, "loss", False),
        (0, 1.5, 2.0, 1.0, "clear", False),
        (0, 1.5, 1.0, 2.0, "loss", True),
        (0, 0.5, 1.0, 2.0, "loss", True),
    ],
)
def test_the_rule(errors, limit, distance, kept, gain, expected):
    config = EarlyStopConfig(early_stop=float(errors), early_stop_distance=limit)
    assert replaces(config, distance, kept, GAINS[gain]) is expected


def test_the_distance_is_the_mean_difference_of_densities():
    tuned, untuned = (tiny_runs.build_networks(seed=seed).G_ema for seed in (0, 1))
    assert consistency(tuned, tuned, 6, seeds=range(3)).tolist() == [0.0, 0.0, 0.0]
    spec = SlabSpec.from_bounds(as_generator(tuned).bounds, 6)
    for seed, measured in zip(range(3), consistency(tuned, untuned, 6, seeds=range(3), batch=2), strict=True):
        with torch.no_grad():
            a, b = (
                as_generator(g)
                .field(ws_of_seeds(g, [seed], truncation_psi=PSI))
                .density_grid(spec)[0]
                .double()
                for g in (tuned, untuned)
            )
        assert measured == pytest.approx(float((a - b).abs().sum() / 6**3), rel=1e-4) and measured > 0


def scripted(nets, values, distances, monkeypatch, tmp_path, **config):
    """The images that are kept after each tick of a script: second rewards [N] and distances."""
    early = EarlyStop(nets, nets.G_ema, EarlyStopConfig(**config), 4, latent_count=4)
    kept = []
    for tick, (second, distance) in enumerate(zip(values, distances, strict=True), 1):
        monkeypatch.setattr(
            "eg3d_rlhf.tuning.gan.early_stop.consistency", lambda *_, d=distance: np.full(4, d)
        )
        subject = type("", (), {"nets": nets})()
        files = type("", (), {"folder": tmp_path})()
        stats = {"Monitored/heldout": {"num": 4, "mean": float(np.mean(second)), "std": 0.0}}
        early.tick(
            type("", (), {"trained_object": subject, "files": files, "cur_nimg": 10 * tick})(),
            stats,
            np.asarray(second, float),
        )
        kept.append(int(early.at))
    return kept, early


def test_the_highest_is_kept_and_where_that_is_the_last_nothing_changes(tmp_path, monkeypatch):
    nets = tiny_runs.build_networks()
    rises = [[1, 2, 3, 4], [2, 3, 4, 5], [2.1, 3, 4, 5]]
    assert scripted(nets, rises, [1, 2, 3], monkeypatch, tmp_path, early_stop=0.0)[0] == [10, 20, 30]
    assert scripted(nets, rises, [1, 2, 3], monkeypatch, tmp_path, early_stop=2.0)[0] == [
        10,
        20,
        20,
    ], "a gain of 0.1 on one latent is not significant"
    kept, early = scripted(nets, [*rises, [0, 0, 0, 0]], [1, 2, 3, 4], monkeypatch, tmp_path, early_stop=0.0)
    assert kept == [10, 20, 30, 30]
    record = json.loads(json.dumps(early.record()))
    assert (record["images"], record["of"], record["distance"], record["rule"]["early_stop"]) == (
        30,
        40,
        3.0,
        0.0,
    )
    assert [tick["kept"] for tick in record["ticks"]] == kept and record["ticks"][3][
        "gain_over_kept"
    ] == pytest.approx(-3.525)
    assert scripted(nets, rises, [1, 2, 3], monkeypatch, tmp_path, early_stop=0.0, early_stop_distance=2.5)[
        0
    ] == [10, 20, 20]


@pytest.fixture(scope="module")
def flags(tiny_reward, tmp_path_factory):
    """Settings of a reward run with a held-out reward."""
    first = load_reward(tiny_reward)
    torch.manual_seed(5)
    second = Reward(first.observation, RewardModel(first.network.arch)).save(
        tmp_path_factory.mktemp("second") / "second.safetensors"
    )
    lengths = (
        "--kimg=0.024",
        "--tick=0.008",
        "--snap=1",
        "--set=rlr=0.02",
        "--lambda-sigma=0.01",
        "--consistency-gate=1",
    )
    return ("--reward=sigma", f"--reward-ckpt={tiny_reward}", f"--heldout-reward={second}", *lengths)


@pytest.fixture(scope="module")
def stopped(tiny_data, tiny_networks, flags, tmp_path_factory):
    """A run of three ticks that may not go far from the reference."""
    folder = tmp_path_factory.mktemp("stopped")
    flags += ("--no-summary", "--early-stop=0", "--set=early_stop_distance=0.0001")
    return tiny_runs.whole_run(tiny_data, tiny_networks, folder, *flags)


def lines(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_a_run_keeps_a_snapshot_and_trains_as_without(stopped, tiny_data, tiny_networks, flags, tmp_path):
    straight = tiny_runs.whole_run(tiny_data, tiny_networks, tmp_path, *flags, "--no-summary")
    ours = ("Monitored/distance", "EarlyStop/")
    assert [{k: v for k, v in line.items() if not k.startswith(ours)} for line in lines(stopped)] == lines(
        straight
    )
    distances = [line["Monitored/distance"]["mean"] for line in lines(stopped)]
    assert 0.0001 < distances[0] < distances[-1], "all are beyond the limit, so the nearest is kept"
    assert [line["EarlyStop/images"]["mean"] for line in lines(stopped)] == [8, 8, 8]
    kept = networks.load(find_network(stopped))
    snapshots = sorted(stopped.glob("network-snapshot-*"))
    assert find_network(stopped).name == KEPT and kept.cur_nimg == 8 and len(snapshots) == 3
    for name in ("G", "D", "G_ema"):
        tiny_runs.assert_same(
            getattr(kept, name).state_dict(), getattr(networks.load(snapshots[0]), name).state_dict()
        )
    last = [
        storage.read_tensors(f / "checkpoint-000000024.safetensors", "checkpoint")[0]
        for f in (stopped, straight)
    ]
    tiny_runs.assert_same({k: v for k, v in last[0].items() if not k.startswith("early_stop.")}, last[1])


def test_resumed_equals_straight(stopped, tiny_data, tiny_networks, flags, tmp_path):
    more = ("--no-summary", "--early-stop=0", "--set=early_stop_distance=0.0001", "--kimg=0.016")
    folder = tiny_runs.whole_run(tiny_data, tiny_networks, tmp_path, *flags, *more)
    (folder / KEPT).unlink()
    assert tiny_runs.run(f"--resume={folder}", "--kimg=0.024").exit_code == 0
    assert (folder / "stats.jsonl").read_text() == (stopped / "stats.jsonl").read_text()
    for name in (KEPT, "checkpoint-000000024.safetensors"):
        (a, meta_a), (b, meta_b) = (storage.read_tensors(where / name) for where in (stopped, folder))
        tiny_runs.assert_same(a, b)
        assert meta_a == meta_b


def test_the_summary_judges_what_was_kept(tiny_data, tiny_networks, flags, tmp_path, monkeypatch):
    seen = {}

    def shift(c):
        seen.update(after=c.after.hash)
        return {
            "reward_before": {"mean": 0.0, "std": 1.0},
            "reward_after": {"mean": 0.0, "std": 1.0},
            "reward_delta_positive": 1,
            "reward_delta_n": 2,
            "tuned_delta_mean": 0.1,
            "reward_deltas": [0.0, 0.2],
        }

    monkeypatch.setattr(summary, "reward_shift", shift)
    monkeypatch.setattr(summary, "geometry", lambda c: {"geometry": []})
    monkeypatch.setattr(summary, "work_alone", lambda c: None)
    monkeypatch.setattr(summary, "write_images", lambda c, folder: [])
    more = (*flags, "--early-stop=0", "--set=early_stop_distance=1e-4")
    result = tiny_runs.run(*tiny_runs.train_flags(tiny_data, tiny_networks, tmp_path, *more))
    assert result.exit_code == 0, result.output
    folder = tiny_runs.only_run(tmp_path)
    record = json.loads((folder / "summary.json").read_text())
    assert record["early_stop"]["images"] == 8 and record["early_stop"]["of"] == record["images"] == 24
    assert len(record["early_stop"]["ticks"]) == 3 and re.search(r"\b8\b.*\b24\b", result.output)
    assert seen["after"] == networks.state_hash(networks.load(folder / KEPT).G_ema)


def test_rendered_resolution_stays_with_the_kept_network(tmp_path, monkeypatch):
    nets = tiny_runs.build_networks()
    nets.G.neural_rendering_resolution = nets.G_ema.neural_rendering_resolution = 12
    _, early = scripted(nets, [[1, 2, 3, 4]], [1], monkeypatch, tmp_path, early_stop=0.0)
    nets.G.neural_rendering_resolution = nets.G_ema.neural_rendering_resolution = 16
    assert (
        early.networks(nets).G_ema.neural_rendering_resolution == 12
        and networks.load(tmp_path / KEPT).cur_nimg == 10
    )
    untuned = EarlyStop(
        tiny_runs.build_networks(), nets.G_ema, EarlyStopConfig(early_stop=0.0), 4, latent_count=4
    )
    untuned.load_state_dict(early.state_dict())
    assert dataclasses.replace(untuned.networks(nets)).G_ema.neural_rendering_resolution == 12


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--early-stop=1"], ("--early-stop", "--reward")),
        (
            ["--set=early_stop_distance=1"],
            ("--set early_stop_distance=1", "--early-stop"),
        ),
    ],
)
def test_bad_input_is_one_line(more, names, tmp_path):
    result = tiny_runs.run(*more, f"--outdir={tmp_path / 'runs'}")
    rejected(result, *names)
    assert not (tmp_path / "runs").exists()


def test_without_a_second_reward_it_is_rejected(tiny_data, tiny_networks, tiny_reward, tmp_path):
    more = ("--reward=sigma", f"--reward-ckpt={tiny_reward}", "--early-stop=1")
    result = tiny_runs.run(*tiny_runs.train_flags(tiny_data, tiny_networks, tmp_path / "runs", *more))
    rejected(result, "--early-stop", "--heldout-reward")
    assert not (tmp_path / "runs").exists()


def test_the_control_keeps_its_last_and_says_so():
    result = tiny_runs.run("-n", "--reward=sigma", "--lambda-r=0", "--early-stop=1")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 0 and line.startswith("Warning: ")
    assert "--early-stop" in line and "--lambda-r=0" in line
