"""Joining of reward files: the file that is written, rejected inputs, and use in the reward phase."""

import re

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.reward_files import join as main
from eg3d_rlhf.rewards.cache import observe_untuned
from eg3d_rlhf.rewards.ensembles import RewardEnsemble
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.reward import join as join_rewards
from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_accuracy
from eg3d_rlhf.tuning.gan.phase import RewardConfig, RewardTerms
from tests import tiny_runs
from tests.rejections import check_message, raising, rejected


def moved(reward: Reward, seed: int, **provenance) -> Reward:
    """Return a reward of the same architecture with noise on its weights."""
    network = type(reward.network)(reward.network.arch)
    random = torch.Generator().manual_seed(seed)
    network.load_state_dict(
        {k: v + 0.2 * torch.randn(v.shape, generator=random) for k, v in reward.network.state_dict().items()}
    )
    return Reward(reward.observation, network.eval().requires_grad_(False), provenance)


@pytest.fixture(scope="module")
def generator(tiny_networks):
    return load_generator(tiny_networks)


@pytest.fixture(scope="module")
def files(tiny_reward, generator, tmp_path_factory):
    """Write three rewards of the tiny generator that share a start and have different labels, and rewards
    that do not fit.
    """
    folder = tmp_path_factory.mktemp("members")
    tiny = load_reward(tiny_reward)
    known = {"generator": generator.hash, "psi": 0.7, "temperature": 2.0, "start": "s" * 64}
    rewards = {name: moved(tiny, i, labels=name * 64, **known) for i, name in enumerate("abc")}
    rewards["elsewhere"] = moved(tiny, 5, **{**known, "generator": "f" * 64})
    rewards["other psi"] = moved(tiny, 6, **{**known, "psi": 1.0})
    rewards["startless"] = moved(tiny, 7, generator=generator.hash)
    rewards["finer"] = Reward(SigmaSlab(SlabSpec(resolution=32)), rewards["a"].network, known)
    return {
        name: reward.save(folder / f"{name.replace(' ', '-')}.safetensors")
        for name, reward in rewards.items()
    }


@pytest.fixture
def join(files, tiny_networks, tmp_path):
    """Return a function that runs the command on named files. A command that fails must write nothing."""

    def go(*names: str, aggregate="softmin", flags=(), network=tiny_networks):
        out = tmp_path / "joined.safetensors"
        arguments = [
            *(files[name] for name in names),
            f"--out={out}",
            f"--aggregate={aggregate}",
            f"--network={network}",
            *flags,
        ]
        done = CliRunner().invoke(main, [str(a) for a in (*arguments, "--device=cpu", "--batch=64")])
        assert out.exists() == (done.exit_code == 0 and "-n" not in flags), done.output
        return done, out

    return go


def error_of(done) -> str:
    """Return the error line of a command that may have printed progress before it."""
    assert done.exit_code == 2 and "Traceback" not in done.output
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return error


def test_the_joint_score_is_the_aggregate_of_the_members(join, files, generator):
    done, out = join("a", "b", "c", aggregate="min")
    assert done.exit_code == 0 and str(out) in done.stdout, done.output
    joined = load_reward(out)
    alone = [load_reward(files[name]) for name in "abc"]
    x = torch.cat(list(observe_untuned(generator.generator, joined.observation, 0.7, 14)))
    r = torch.stack([reward.score_observed(x) for reward in alone]).double()
    offsets = r.mean(dim=1)
    scales = r.std(dim=1, correction=0)
    expected = ((r - offsets[:, None]) / scales[:, None]).amin(dim=0) * scales.mean() + offsets.mean()
    torch.testing.assert_close(
        joined.score_observed(x).double(), expected, rtol=1e-4, atol=1e-4 * float(scales.mean())
    )
    assert (
        joined.labels == {"a" * 64, "b" * 64, "c" * 64}
        and joined.temperature == 2.0
        and joined.provenance["psi"] == 0.7
    )
    assert joined.provenance["score_mean"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert f"{joined.provenance['score_mean']:.3f}" in done.stdout
    assert [reward.shares_network_with(joined) for reward in (*alone, load_reward(files["startless"]))] == [
        True,
        True,
        True,
        False,
    ]


def test_rewards_of_psi_zero_are_joined_at_psi_zero(join, files, generator, tmp_path):
    """A value of 0 is stated: before, the scales were measured at the defaults, psi 1 and 14 layers."""
    known = {"generator": generator.hash, "psi": 0.0, "truncation_cutoff": 0}
    tiny = load_reward(files["a"])
    members = {f"m{i}": moved(tiny, i, **known) for i in range(2)}
    joined = join_rewards(members, generator, "min", batch=64)
    assert (joined.provenance["psi"], joined.provenance["truncation_cutoff"]) == (0.0, 0)
    # with no layer truncated, the samples are those of psi 1
    plain = join_rewards(
        {name: Reward(m.observation, m.network, {**known, "psi": 1.0}) for name, m in members.items()},
        generator,
        "min",
        batch=64,
    )
    assert joined.provenance["score_mean"] == pytest.approx(plain.provenance["score_mean"], rel=1e-6)
    # at psi 0 all samples are the mean shape, which has no spread of scores
    truncated = {
        name: Reward(m.observation, m.network, {**known, "truncation_cutoff": 14})
        for name, m in members.items()
    }
    with raising("ensemble", "0.0"):
        join_rewards(truncated, generator, "min", batch=64)


def test_the_ensemble_states_what_is_known_of_its_members(join, files, generator, tmp_path, capsys):
    strong = {"accuracy": 0.8, "n": 200, "interval_95": [0.739, 0.85]}
    weak = {"accuracy": 0.5, "n": 6, "interval_95": [0.188, 0.812]}
    tiny = load_reward(files["a"])

    def announce(*accuracies):
        members = {
            f"m{i}": moved(tiny, i, generator=generator.hash, psi=0.7, **({"test_accuracy": a} if a else {}))
            for i, a in enumerate(accuracies)
        }
        joined = join_rewards(members, generator, "min", batch=64)
        # a joined reward that is joined again states its own members
        nested = join_rewards({"j": joined, "b": load_reward(files["b"])}, generator, "min", batch=64)
        assert [entry["name"] for entry in nested.provenance["inputs"]] == ["m0", "m1", "b"]
        announce_accuracy(joined.provenance, "--reward-ckpt", RewardUse(tunes=True))
        return capsys.readouterr().err

    printed = announce(strong, weak)
    assert "Warning: --reward-ckpt" in printed and {"m0", "m1", "0.800", "0.500"} <= set(
        re.findall(r"m\d|0\.\d{3}", printed)
    )
    assert "m1" in announce(weak, None)
    with raising("--reward-ckpt", "--weak-reward", "m0", "m1"):
        announce(weak, weak)
    done, out = join("a", "b")
    assert load_reward(out).provenance["inputs"] and "a.safetensors" in done.stdout.splitlines()[-1]


def test_an_ensemble_is_joined_by_its_members(join, files, generator, tmp_path):
    _, out = join("a", "b")
    nested = load_reward(out).save(tmp_path / "nested.safetensors")
    done, _ = join("c", aggregate="lcb", flags=[nested, "--strength=2"])
    assert done.exit_code == 0, done.output
    network = load_reward(out).network
    assert (
        isinstance(network, RewardEnsemble) and len(network.members) == 3 and network.aggregate.strength == 2
    )


@pytest.mark.parametrize(
    ("members", "aggregate", "flags", "names"),
    [
        (["a"], "min", [], ("rewards", " 1.")),
        (["a", "b", "a"], "min", [], ("REWARD", "a.safetensors")),
        (["a", "finer"], "min", [], ("resolution", "finer.safetensors")),
        (["a", "elsewhere"], "min", [], ("f" * 12, "elsewhere.safetensors")),
        (["a", "other psi"], "min", [], ("psi", "0.7", "1.0", "other-psi.safetensors")),
        (["a", "startless"], "warm", [], ("--aggregate=warm", "--shared-start")),
        (["a", "b"], "min", ["--strength=1"], ("--strength", "--aggregate=min", "1.0")),
        (["a", "b"], "warm", ["--strength=1"], ("--strength", "--aggregate=lcb", "warm")),
    ],
)
def test_rewards_that_do_not_fit_are_rejected_in_one_line(join, members, aggregate, flags, names):
    done, _ = join(*members, aggregate=aggregate, flags=flags)
    check_message(error_of(done), names)


def test_another_generator_is_rejected(join, tmp_path):
    other = tmp_path / "other.safetensors"
    tiny_runs.networks.save(other, tiny_runs.build_networks(seed=4))
    done, _ = join("a", "b", network=other)
    check_message(error_of(done), ("--network", "other.safetensors"))


@pytest.mark.parametrize("shaping", ["none", "standardised", "reference"])
def test_the_reward_phase_accepts_the_joint_reward(join, tiny_networks, tiny_data, shaping):
    _, out = join("a", "b", "c", aggregate="lcb")
    nets = tiny_runs.networks.load(tiny_networks)
    reward = load_reward(out)
    nets.G.requires_grad_(True)
    terms = RewardTerms(
        nets.G,
        nets.G_ema,
        reward,
        RewardConfig(consistency_resolution=12, reward_shaping=shaping, reward_clip="iqr"),
    )
    low, high = terms.state.bounds.tolist()
    assert low < high and terms.initial_scores.isfinite().all()
    for loss in terms.losses(tiny_runs.batch(tiny_data)):
        loss.value.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in nets.G.parameters())
    assert all(p.grad is None for p in reward.parameters())


def test_a_member_cannot_be_the_held_out_reward(join, files, tiny_networks, tiny_data, tmp_path):
    _, out = join("a", "b")
    flags = [
        "--reward=sigma",
        f"--reward-ckpt={out}",
        f"--heldout-reward={files['b']}",
        "--no-summary",
        "--kimg=0.008",
    ]
    done = tiny_runs.run(*tiny_runs.train_flags(tiny_data, tiny_networks, tmp_path / "runs", *flags))
    rejected(done, "--heldout-reward", "--reward-ckpt")
    assert not (tmp_path / "runs").exists()
