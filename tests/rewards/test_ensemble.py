"""Properties of combined reward networks: aggregates of scores, and averages of weights."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.reward_training import train as main
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.rewards.aggregates import KINDS, Aggregate
from eg3d_rlhf.rewards.ensembles import RewardEnsemble, Standard, average_weights
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.settings import with_changes
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import HEADS
from tests.rejections import raising, rejected
from tests.rewards.test_network_training import OPTIONS, filled, toy_labels

SPEC = SlabSpec(resolution=32)
SHAPE = SPEC.shape
EACH = pytest.mark.parametrize("kind", KINDS)
# Aggregates in which no member has a negative weight
NON_NEGATIVE = pytest.mark.parametrize("kind", ["mean", "min", "softmin"])


@pytest.fixture(scope="module")
def members():
    torch.manual_seed(0)
    return [RewardModel(replace(HEADS, slab_shape=SHAPE)).eval() for _ in range(3)]


def slabs(n, seed=0):
    return torch.rand(n, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 100


def scores(members=5, n=40, seed=0):
    return torch.randn(members, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@EACH
def test_a_shift_of_all_scores_shifts_the_result_and_order_does_not_matter(kind):
    r = scores()
    join = Aggregate(kind)
    torch.testing.assert_close(join(r + 3.5), join(r) + 3.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(join(r[[3, 0, 4, 1, 2]]), join(r), rtol=0, atol=1e-12)


@EACH
def test_equal_members_give_their_score_with_finite_gradients(kind):
    alone = scores(1)
    r = alone.repeat(5, 1).requires_grad_(True)
    joined = Aggregate(kind)(r)
    torch.testing.assert_close(joined, alone[0], rtol=0, atol=1e-12)
    joined.sum().backward()
    torch.testing.assert_close(r.grad, torch.full_like(r, 0.2), rtol=0, atol=1e-12)


@EACH
def test_the_weights_of_members_sum_to_one(kind):
    r = scores(members=3, n=100).requires_grad_(True)
    Aggregate(kind)(r).sum().backward()
    torch.testing.assert_close(r.grad.sum(dim=0), torch.ones(100, dtype=torch.float64))
    # These aggregates push the most optimistic member down.
    assert bool((r.grad < -1e-9).any()) == (kind in ("lcb", "uwo"))


def test_softmin_lies_between_mean_and_minimum_and_has_both_limits():
    r = scores()
    mean = r.mean(dim=0)
    low = r.amin(dim=0)
    soft = Aggregate("softmin")(r)
    assert (mean >= soft).all() and (soft >= low).all()
    assert (soft >= Aggregate("softmin", 0.1)(r)).all()
    torch.testing.assert_close(Aggregate("softmin", 1e-4)(r), low, rtol=0, atol=1e-3)
    close = 0.01 * r
    # lambda = 1 / (2 beta)
    torch.testing.assert_close(
        Aggregate("softmin", 1.0)(close), Aggregate("uwo", 0.5)(close), rtol=0, atol=1e-5
    )
    assert (Aggregate("softmin", 0.5)(1e4 * r).isfinite()).all()


@EACH
def test_an_ensemble_of_one_member_is_bitwise_identical_to_it(members, kind):
    x = slabs(3)
    alone = RewardEnsemble.from_networks(members[:1], Aggregate(kind))
    assert torch.equal(alone.score(x), members[0].score(x)) and torch.equal(
        alone.score_embedding(alone.embed(x)), members[0].score(x)
    )


def test_the_scale_of_a_member_does_not_matter(members):
    class Loud(RewardModel):
        def score_embedding(self, embedding):
            return 1000 * super().score_embedding(embedding) - 7

    samples = [slabs(16, 9)]
    x = slabs(5)
    loud = Loud(members[2].arch).eval()
    loud.load_state_dict(members[2].state_dict())
    first, other = (
        RewardEnsemble.from_networks([*members[:2], third], Aggregate("softmin"), samples)
        for third in (members[2], loud)
    )
    torch.testing.assert_close(*(standardised(e, e.score(x)) for e in (first, other)), rtol=1e-3, atol=1e-3)


def standardised(ensemble, score):
    offsets, scales = (torch.tensor(v).mean() for v in (ensemble.standard.offsets, ensemble.standard.scales))
    return (score - offsets) / scales


def test_standardisation_of_known_scores(members):
    standard = Standard.from_observations(members[:2], [slabs(3, 1), slabs(5, 2)])
    r = torch.stack([m.score(torch.cat([slabs(3, 1), slabs(5, 2)])) for m in members[:2]]).double()
    torch.testing.assert_close(
        torch.tensor(standard.offsets, dtype=torch.float64), r.mean(dim=1), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        torch.tensor(standard.scales, dtype=torch.float64), r.std(dim=1, correction=0), rtol=0, atol=1e-6
    )
    with raising("[0.0, 0.0, 0.0]"):
        Standard.from_observations(members, [slabs(1)])
    with raising("ensemble", " 3 ", " 2."):
        RewardEnsemble(members, standard=standard)


def test_pair_margin_is_the_mean_and_swapping_negates_it(members):
    a = slabs(2)
    b = slabs(2, 1)
    ensemble = RewardEnsemble.from_networks(members)
    margin = ensemble.pair_margin(ensemble.embed(a), ensemble.embed(b))
    torch.testing.assert_close(margin, sum(m.pair_margin(m.embed(a), m.embed(b)) for m in members) / 3)
    torch.testing.assert_close(margin, -ensemble.pair_margin(ensemble.embed(b), ensemble.embed(a)))


@pytest.mark.parametrize(
    ("aggregate", "samples"),
    [(Aggregate(), None), (Aggregate("uwo", 0.25), None), (Aggregate("lcb"), [slabs(6, 4)])],
)
def test_saved_and_loaded_ensemble_scores_the_same(members, tmp_path, aggregate, samples):
    ensemble = RewardEnsemble.from_networks(members, aggregate, samples)
    loaded = load_reward(Reward(SigmaSlab(SPEC), ensemble).save(tmp_path / "r.safetensors"))
    assert isinstance(loaded.network, RewardEnsemble) and len(loaded.members()) == 3
    assert (loaded.network.aggregate, loaded.network.standard) == (aggregate, ensemble.standard)
    assert torch.equal(loaded.score_observed(slabs(2)), ensemble.score(slabs(2)))
    assert torch.equal(loaded.members()[1].score_observed(slabs(2)), members[1].score(slabs(2)))


def test_a_mean_of_raw_scores_has_its_first_description(members):
    assert RewardEnsemble.from_networks(members).describe() == {**members[0].describe(), "members": 3}


def test_members_may_differ_in_architecture(members, tmp_path):
    other = RewardModel(replace(HEADS, slab_shape=SHAPE, embedding=24)).eval()
    ensemble = RewardEnsemble.from_networks([members[0], other], Aggregate("min"))
    loaded = load_reward(Reward(SigmaSlab(SPEC), ensemble).save(tmp_path / "r.safetensors"))
    x = slabs(3)
    assert torch.equal(loaded.score_observed(x), torch.minimum(members[0].score(x), other.score(x)))
    torch.testing.assert_close(
        loaded.network.score_embedding(loaded.network.embed(x)), loaded.score_observed(x)
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"scales": [1.0]}, ("[1.0]",)),
        ({"kind": "most"}, ("--aggregate", "'most'")),
        ({"offsets": None}, ("offsets", "scales")),
    ],
)
def test_damaged_descriptions_are_named(members, tmp_path, change, names):
    path = Reward(SigmaSlab(SPEC), RewardEnsemble.from_networks(members, Aggregate("lcb"), [slabs(6)])).save(
        tmp_path / "r.safetensors"
    )
    description = json.loads(path.with_suffix(".json").read_text())
    description["network"]["ensemble"] |= change
    path.with_suffix(".json").write_text(json.dumps(description))
    with raising("r.safetensors", *names):
        load_reward(path)


@NON_NEGATIVE
def test_score_is_differentiable_in_the_slab_and_not_in_weights(members, kind):
    x = slabs(2).requires_grad_(True)
    ensemble = RewardEnsemble.from_networks(members, Aggregate(kind), [slabs(6, 4)])
    ensemble.score(x).sum().backward()
    assert x.grad.abs().sum() > 0 and x.grad.isfinite().all()
    assert all(p.grad is None for p in ensemble.parameters()) and all(
        p.grad is None for m in members for p in m.parameters()
    )


def test_the_average_of_weights(members):
    average = average_weights(members)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(
            value, torch.stack([m.state_dict()[name] for m in members]).mean(dim=0), msg=name
        )
    assert torch.equal(average_weights([members[1]] * 2).score(slabs(2)), members[1].score(slabs(2)))
    assert type(average) is RewardModel and not any(p.requires_grad for p in average.parameters())
    with raising("architecture"):
        average_weights([members[0], RewardModel(replace(HEADS, slab_shape=SHAPE, embedding=24))])


# Training of several members: what differs between them, what they share on request, and the file that is
# written.


@pytest.fixture
def train(tiny_networks, tmp_path):
    """Run the command on 24 pairs of the tiny generator."""
    pairs = [
        Preference(winner=2 * i, loser=2 * i + 1, generator=load_generator(tiny_networks).hash, psi=0.7)
        for i in range(24)
    ]
    labels = write_labels(tmp_path / "labels.jsonl", pairs)
    common = [
        f"--network={tiny_networks}",
        f"--labels={labels}",
        "--preset=tiny",
        "--epochs=2",
        "--resolution=32",
        "--device=cpu",
    ]

    def go(name: str, *flags: str):
        done = CliRunner().invoke(
            main, [*common, f"--run-dir={tmp_path / name}", f"--cache={tmp_path / 'cache'}", *flags]
        )
        return done, tmp_path / name

    return go


def weights(path, key="best"):
    return torch.load(path, weights_only=True)[key]


@pytest.mark.long
def test_members_differ_and_repeat(train):
    done, out = train("run", "--members=2", "--aggregate=min")
    assert done.exit_code == 0, done.output
    reward = load_reward(out / "reward.safetensors")
    assert (
        reward.network.aggregate.kind == "min"
        and reward.network.standard is not None
        and "start" not in reward.provenance
    )
    first, second = (member.network.state_dict() for member in reward.members())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    reward_bytes_before = (out / "reward.safetensors").read_bytes()
    done = CliRunner().invoke(main, [f"--resume={out}"])
    assert done.exit_code == 0 and (out / "reward.safetensors").read_bytes() == reward_bytes_before
    _, again = train("again", "--members=2", "--aggregate=min")
    assert (again / "reward.safetensors").read_bytes() == reward_bytes_before
    done = CliRunner().invoke(main, [f"--resume={out}", "--set=bootstrap=false"])
    rejected(done, "bootstrap", "--resume")


def test_warm_averages_members_that_were_trained_from_one_network(train):
    done, out = train("run", "--members=2", "--aggregate=warm")
    assert done.exit_code == 0, done.output
    reward = load_reward(out / "reward.safetensors")
    states = [weights(out / name) for name in ("state.pt", "state-2.pt")]
    assert reward.members() == [reward] and len(reward.provenance["start"]) == 64
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, value in reward.network.state_dict().items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, msg=name)
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == [0, 0, 1, 1, 2, 2] and len(
        json.loads((out / "report.json").read_text())["members"]
    ) == 2


def test_training_begins_at_the_weights_of_the_start():
    labels = toy_labels(16), toy_labels(8, 100)
    train_data = TrainData(train=labels[0], val=labels[1], store=filled(*labels))
    start = train_reward(train_data, with_changes(OPTIONS, epochs=1)).model
    still = with_changes(OPTIONS, epochs=1, lr=1e-12, weight_decay=0.0, seed=9)
    for name, value in train_reward(train_data, still, start=start).model.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], msg=name)


def test_bootstrap_takes_as_many_pairs_and_depends_on_the_seed():
    labels = toy_labels(40), toy_labels(8, 100)
    store = filled(*labels)
    drawn = []
    taken = store.take
    train_data = TrainData(train=labels[0], val=labels[1], store=store)

    def listed(seed):
        drawn.clear()
        store.take = lambda seeds, device="cpu": (drawn.append(tuple(seeds)), taken(seeds, device))[1]
        train_reward(train_data, with_changes(OPTIONS, epochs=1, bootstrap=True, seed=seed))
        return sorted(seed for batch in drawn[:-1] for seed in batch[: len(batch) // 2] if seed < 100)

    first = listed(0)
    again = listed(0)
    other = listed(1)
    assert first == again != other and len(set(first)) < 40


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--aggregate=min"], ("--members", "--aggregate=min", "1")),
        (["--shared-start"], ("--members", "--shared-start", "1")),
        (["--members=2", "--strength=1"], ("--strength", "--aggregate=lcb", "not given")),
        (["--members=2", "--aggregate=min", "--strength=1"], ("--strength", "--aggregate=min")),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(train, flags, names):
    done, out = train("run", *flags)
    rejected(done, *names)
    assert not out.exists()
