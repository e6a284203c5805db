"""Training several members at once: what sets them apart, what they share where asked, and the file that they become."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.reward_training import train as main
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.train import TrainData, train_reward, with_changes
from tests.rewards.test_train import OPTIONS, filled, toy_labels


@pytest.fixture
def train(tiny_networks, tmp_path):
    """Run the command on 24 pairs of the tiny generator."""
    pairs = [Preference(winner=2 * i, loser=2 * i + 1, generator=load_generator(tiny_networks).hash, psi=0.7) for i in range(24)]
    labels = write_labels(tmp_path / "labels.jsonl", pairs)
    common = [f"--network={tiny_networks}", f"--labels={labels}", "--preset=tiny", "--epochs=2", "--resolution=32", "--device=cpu"]

    def go(name: str, *flags: str):
        done = CliRunner().invoke(main, [*common, f"--out={tmp_path / name}", f"--cache={tmp_path / 'cache'}", *flags])
        return done, tmp_path / name

    return go


def weights(path, key="best"):
    return torch.load(path, weights_only=True)[key]


@pytest.mark.long
def test_members_differ_and_repeat(train):
    done, out = train("run", "--members=2", "--aggregate=min")
    assert done.exit_code == 0, done.output
    reward = load_reward(out / "reward.safetensors")
    assert reward.network.aggregate.kind == "min" and reward.network.standard is not None and "start" not in reward.provenance
    first, second = (one.network.state_dict() for one in reward.members())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    before = (out / "reward.safetensors").read_bytes()
    done, _ = train("run", "--members=2", "--aggregate=min", "--resume")
    assert done.exit_code == 0 and (out / "reward.safetensors").read_bytes() == before
    _, again = train("again", "--members=2", "--aggregate=min")
    assert (again / "reward.safetensors").read_bytes() == before
    done, _ = train("run", "--members=2", "--aggregate=min", "--no-bootstrap", "--resume")
    assert done.exit_code == 2 and "expected the options it was begun with, got other bootstrap" in done.stderr


def test_warm_averages_members_that_went_on_from_one_network(train):
    done, out = train("run", "--members=2", "--aggregate=warm")
    assert done.exit_code == 0, done.output
    reward, states = load_reward(out / "reward.safetensors"), [weights(out / name) for name in ("state.pt", "state-2.pt")]
    assert reward.members() == [reward] and len(reward.provenance["start"]) == 64
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, value in reward.network.state_dict().items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, msg=name)
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == [0, 0, 1, 1, 2, 2] and len(json.loads((out / "report.json").read_text())["members"]) == 2


def test_a_start_is_where_training_begins():
    labels = toy_labels(16), toy_labels(8, 100)
    data = TrainData(train=labels[0], val=labels[1], store=filled(*labels))
    start = train_reward(data, with_changes(OPTIONS, epochs=1)).model
    still = with_changes(OPTIONS, epochs=1, lr=1e-12, weight_decay=0.0, seed=9)
    for name, value in train_reward(data, still, start=start).model.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], msg=name)


def test_bootstrap_draws_as_many_pairs_by_the_seed():
    labels = toy_labels(40), toy_labels(8, 100)
    store, drawn = filled(*labels), []
    taken = store.take
    data = TrainData(train=labels[0], val=labels[1], store=store)

    def listed(seed):
        drawn.clear()
        store.take = lambda seeds, device="cpu": (drawn.append(tuple(seeds)), taken(seeds, device))[1]
        train_reward(data, with_changes(OPTIONS, epochs=1, bootstrap=True, seed=seed))
        return sorted(seed for batch in drawn[:-1] for seed in batch[: len(batch) // 2] if seed < 100)

    first, again, other = listed(0), listed(0), listed(1)
    assert first == again != other and len(set(first)) < 40
    counts = [first.count(seed) for seed in set(first)]
    assert max(counts) > min(counts)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--aggregate=min"], "--members: expected 2 or more with --aggregate=min, got 1"), (["--shared-start"], "with --shared-start"),
        (["--members=2", "--strength=1"], "--strength"), (["--members=2", "--aggregate=min", "--strength=1"], "--strength: expected none"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(train, flags, text):
    done, out = train("run", *flags)
    assert done.exit_code == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1 and not out.exists()
