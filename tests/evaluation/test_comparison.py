"""Loading of comparisons: defaults, hashes, and rejected inputs."""

import json
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, _reward_path, load_comparison, newest_control
from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, load_reward
from tests.evaluation import comparisons
from tests.rejections import raising


def test_roles_and_hashes(tiny_comparison, tiny_reward):
    c = tiny_comparison
    assert (
        list(c.generators()) == ["before", "after", "control"]
        and len({g.hash for g in c.generators().values()}) == 3
    )
    assert c.networks()["reward"] == file_hash(tiny_reward) and "held-out" not in c.networks()
    assert c.networks("after", "held-out") == {"after": c.after.hash} and not c.synthetic


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_latents_are_held_out(tiny_comparison, seed):
    c = Comparison(**{**vars(tiny_comparison), "seed": seed, "memory": {}})
    assert c.seeds(10_000) == range(200_000 + seed * 1_000_000, 210_000 + seed * 1_000_000)
    with raising("10,000", "10,001"):
        c.seeds(10_001)


def test_scores_are_the_rewards_and_are_kept(tiny_comparison, monkeypatch):
    c = Comparison(**{**vars(tiny_comparison), "memory": {}})
    seeds = c.seeds(9)
    expected = c.reward.score(c.after.generator.field(c.ws(c.after, seeds)))
    result = c.scores(c.after, seeds)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(Comparison, "fields", None)
    assert c.scores(c.after, seeds) is result
    with raising("--heldout-reward"):
        c.scores(c.after, seeds, held_out=True)


def test_rewards_share_what_both_observe(monkeypatch):
    c = load_comparison(Sources(after=bundled.GENERATOR, n=3, images=16))
    seeds = c.seeds(3)
    drawn = []
    observe = SigmaSlab.observe
    monkeypatch.setattr(SigmaSlab, "observe", lambda *a: drawn.append(1) or observe(*a))
    first = c.scores(c.before, seeds)
    second = c.scores(c.before, seeds, held_out=True)
    assert drawn == [1] and c.synthetic and not torch.equal(first, second)
    torch.testing.assert_close(second, c.held_out.score(next(c.fields(c.before, seeds))).cpu())


def test_the_bundled_reward_is_no_silent_default(tiny_networks, tiny_reward, tmp_path, capsys):
    with raising("--reward-ckpt", tiny_networks.name):
        load_comparison(Sources(before=tiny_networks, after=tiny_networks))
    load_comparison(Sources(after=bundled.GENERATOR))
    assert "--reward-ckpt" not in capsys.readouterr().err
    load_comparison(
        Sources(
            before=tiny_networks, after=tiny_networks, reward_ckpt=bundled.REWARD, heldout_reward=tiny_reward
        )
    )
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "--reward-ckpt" in line)
    assert warning.startswith("Warning: ")
    other = load_reward(tiny_reward)
    moved = Reward(SigmaSlab(replace(other.observation.spec, box_warp=2.0)), other.network).save(
        tmp_path / "moved.safetensors"
    )
    with raising("--reward-ckpt", "box_warp", "2.0", "1.0"):
        load_comparison(Sources(before=tiny_networks, after=tiny_networks, reward_ckpt=moved))


def test_newest_run_and_its_control_are_found(tiny_networks, tiny_reward, tmp_path):
    init = {"hashes": {"init": file_hash(tiny_networks)}, "seed": 0}
    comparisons.write_run(tmp_path / "runs/00000-elsewhere", {64: 0.1}, 10.0, hashes={"init": "0"})
    tuned = comparisons.write_run(tmp_path / "runs/00001-tuned", {64: 0.1}, 10.0, **init)
    control = comparisons.write_run(tmp_path / "runs/00002-control", {64: 0.01}, 0.0, **init)
    comparisons.write_run(tmp_path / "runs/00003-other-seed", {64: 0.02}, 0.0, **{**init, "seed": 1})
    c = comparisons.load(tiny_networks, tiny_reward, runs_folder=tmp_path / "runs")
    assert (c.run, c.control_run) == (tuned, control)
    assert (
        newest_control(tmp_path / "runs", tmp_path / "runs/00003-other-seed")
        == tmp_path / "runs/00003-other-seed"
    )


def test_the_network_before_tuning_is_the_one_from_which_the_run_began(tiny_networks, tiny_reward, tmp_path):
    """It is not the bundled generator, whichever flag names the run, and without any flag."""
    began = {"init": str(tiny_networks), "hashes": {"init": file_hash(tiny_networks)}}
    runs = tmp_path / "runs"
    run = comparisons.write_run(runs / "00000-other", {64: 0.1}, 10.0, **began)
    snapshot = next(run.glob("network-snapshot-*"))
    for flags in ({"after": run}, {"run": run}, {"after": snapshot}, {"runs_folder": runs}):
        c = comparisons.load(None, tiny_reward, **flags)
        assert (c.before.path, c.run) == (tiny_networks, run)
    control = comparisons.write_run(runs / "00001-control", {64: 0.1}, 0.0, **began)
    after = tmp_path / "tuned.safetensors"
    after.write_bytes(snapshot.read_bytes())
    assert comparisons.load(None, tiny_reward, after=after, control=control).before.path == tiny_networks


def test_without_a_run_the_message_says_what_to_do(tiny_networks, tiny_reward, tmp_path):
    with raising("--after", "--run", str(tmp_path), tiny_networks.name):
        comparisons.load(tiny_networks, tiny_reward, runs_folder=tmp_path)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ({"after": bundled.GENERATOR}, ("--after", bundled.GENERATOR.name, "z_dim")),
        ({"control": bundled.GENERATOR}, ("--control", bundled.GENERATOR.name, "z_dim")),
        ({"reward_ckpt": "none.safetensors"}, ("--reward-ckpt", "none.safetensors")),
        ({"lpips": "none.pt"}, ("--lpips", "none.pt")),
        ({"identity": "none.pt"}, ("--identity", "none.pt")),
        ({"n": 10_001}, ("--n", "10,000", "10,001")),
    ],
)
def test_mistakes_name_the_flag(tiny_networks, tiny_reward, sources, names):
    with raising(*names, kind=(ValueError, OSError)):
        load_comparison(
            Sources(
                **{"before": tiny_networks, "after": tiny_networks, "reward_ckpt": tiny_reward, **sources}
            )
        )


def test_a_damaged_record_is_named(tiny_networks, tiny_reward, tmp_path):
    run = comparisons.write_run(tmp_path / "run", {64: 0.1}, 10.0)
    (run / OPTIONS).write_text(json.dumps({})[:-1])
    with raising(OPTIONS, "JSON"):
        comparisons.load(tiny_networks, tiny_reward, after=run)


def test_the_tuned_reward_is_no_held_out_one(tiny_networks, tiny_reward):
    with raising("--heldout-reward", str(tiny_reward)):
        comparisons.load(tiny_networks, tiny_reward, after=tiny_networks, heldout_reward=tiny_reward)


@pytest.mark.parametrize("kept", [False, True], ids=["gone", "replaced"])
def test_a_run_is_compared_by_the_reward_that_it_used_alone(kept, tiny_networks, tiny_reward, tmp_path):
    used = tmp_path / "reward.safetensors"
    digest = file_hash(tiny_reward)
    record = {"mode": "gan", "reward_ckpt": str(used), "hashes": {"reward": digest}}
    (tmp_path / OPTIONS).write_text(json.dumps(record))
    if kept:
        used.write_bytes(tiny_networks.read_bytes())
    sources = Sources(before=tiny_networks, after=tmp_path)
    with raising("--reward-ckpt", digest[:12], str(used)):
        _reward_path(sources, tmp_path, load_generator(tiny_networks))
    used.write_bytes(tiny_reward.read_bytes())
    assert _reward_path(sources, tmp_path, load_generator(tiny_networks)) == used
