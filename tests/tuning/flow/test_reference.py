"""The reference stays what it was, to the last bit, whatever the policy goes through; one that would train is refused."""

import copy
import math

import pytest
import torch

from eg3d_rlhf.models.lora import LoraConfig, add_lora, lora_parameters
from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.tuning.flow.dpo import DpoConfig, PairErrors, draw_pairs, pair_loss
from eg3d_rlhf.tuning.flow.reference import AdapterOff, CachedErrors, FrozenCopy, FrozenModel
from tests.tuning.flow.adaptable_flow import AdaptableFlow, inputs, pairs, shake, stage
from training.distributed import Ranks

KINDS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "voxels"])


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}


def drawn(of, seed=0, epoch=0, n=4):
    found, cond = pairs(of, n)
    return draw_pairs(of, found, cond, None, DpoConfig(), seed, epoch), [(p.id, epoch) for p in found]


def train(policy, reference, of, parameters, steps=4):
    """Some DPO updates, with weight decay and at a rate that moves every bit that can move."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    losses = []
    for step in range(steps):
        draw, keys = drawn(of, epoch=step)
        errors = of.path.errors(policy(draw.x_t, draw.t, draw.cond), draw.x_0, draw.eps)
        loss = pair_loss(PairErrors.split(errors, reference.errors(of, draw, keys)), DpoConfig(beta=50), None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@KINDS
def test_adapters_off_is_the_base_through_training(sparse):
    of = stage(sparse)
    policy = of.model
    before, want = bits(policy), feats_of(AdaptableFlow()(*inputs(sparse))).detach()
    add_lora(policy, LoraConfig(rank=2), 0)
    reference = AdapterOff(policy)
    losses = train(policy, reference, of, lora_parameters(policy))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] != losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in bits(policy).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    v = feats_of(reference.velocity(of, *inputs(sparse)))
    assert torch.equal(v, want) and not v.requires_grad and v.grad_fn is None
    assert not torch.equal(feats_of(policy(*inputs(sparse))), want)


@KINDS
def test_a_frozen_copy_stays_through_training_of_every_parameter(sparse):
    of = stage(sparse)
    policy, want = of.model, feats_of(AdaptableFlow()(*inputs(sparse))).detach()
    reference = FrozenCopy(policy)
    losses = train(policy, reference, of, list(policy.parameters()))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] != losses[0]
    assert torch.equal(feats_of(reference.velocity(of, *inputs(sparse))), want)
    assert not torch.equal(feats_of(policy(*inputs(sparse))), want)


@KINDS
def test_the_base_itself_serves_a_policy_that_shares_its_memory(sparse):
    of = stage(sparse)
    base = of.model.requires_grad_(False)
    before, policy = bits(base), shared_copy(base)
    add_lora(policy, LoraConfig(rank=2), 0)
    train(policy, FrozenModel(base, policy), of, lora_parameters(policy))
    assert all(torch.equal(before[name], value) for name, value in bits(base).items())


def test_all_three_give_the_same_errors():
    of = stage()
    draw, keys = drawn(of)
    want = of.path.errors(of.model(draw.x_t, draw.t, draw.cond), draw.x_0, draw.eps).detach()
    policy = copy.deepcopy(of.model)
    add_lora(policy, LoraConfig(), 0)
    shake(policy)
    for reference in (AdapterOff(policy), FrozenCopy(of.model), FrozenModel(of.model.requires_grad_(False))):
        got = reference.errors(of, draw, keys)
        assert torch.equal(got, want) and not got.requires_grad and len(got) == 8


def test_the_modes_of_its_parts_come_back():
    model = AdaptableFlow().requires_grad_(False).train()
    model.blocks[1].eval()
    seen = []
    model.blocks[0].register_forward_hook(lambda m, *_: seen.append(m.training))
    FrozenModel(model).velocity(stage(), *inputs(False))
    assert seen == [False] and model.training and model.blocks[0].to_q.training
    assert not model.blocks[1].training and not model.blocks[1].to_q.training


def test_a_reference_that_would_train_is_refused():
    model = AdaptableFlow()
    with pytest.raises(ValueError, match="FrozenModel: expected frozen parameters, got a reference that would train .input_layer.weight, "):
        FrozenModel(model)
    with pytest.raises(ValueError, match="AdapterOff: expected a network with adapters, got one without"):
        AdapterOff(model)
    add_lora(model, LoraConfig(), 0)
    reference = AdapterOff(model)
    model.out_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"AdapterOff: .* a reference that would train \(out_layer.bias\)"):
        AdapterOff(model)
    with pytest.raises(ValueError, match="a reference that would train"):  # also when it is thawed later
        reference.velocity(stage(), *inputs(False))


def test_memory_shared_with_what_is_trained_is_refused():
    base = AdaptableFlow().requires_grad_(False)
    policy = shared_copy(base).requires_grad_(True)  # the same memory, other parameters
    with pytest.raises(ValueError, match="a reference that would train with the policy .input_layer.weight, .*Use FrozenCopy"):
        FrozenModel(base, policy)
    FrozenModel(base, copy.deepcopy(policy))


class Counting(FrozenCopy):
    calls = 0

    def errors(self, stage, draw, keys):
        self.calls += 1
        return super().errors(stage, draw, keys)


@KINDS
def test_kept_errors_are_the_computed_ones_to_the_last_bit(sparse, tmp_path):
    of = stage(sparse)
    reference, identity = Counting(of.model), {"base": "abc", "seed": 0}
    cache = CachedErrors(reference, identity, tmp_path)
    draws = [drawn(of, epoch=e) for e in (0, 1)]
    want = [reference.errors(of, draw, keys) for draw, keys in draws]
    reference.calls = 0
    for _ in range(2):
        assert all(torch.equal(cache.errors(of, *draw), w) for draw, w in zip(draws, want, strict=True))
    assert reference.calls == 2
    cache.save()
    kept = CachedErrors(None, identity, tmp_path)  # without the network
    assert all(torch.equal(kept.errors(of, *draw), w) for draw, w in zip(draws, want, strict=True))
    draw, keys = drawn(of, epoch=1, n=2)  # another batch of the same draws
    assert torch.equal(kept.errors(of, draw, keys), want[1].view(2, 4)[:, :2].flatten())


def test_a_batch_may_hold_draws_of_several_epochs(tmp_path):
    of, identity = stage(), {"seed": 0}
    (first, keys), (second, other) = drawn(of, epoch=0), drawn(of, epoch=3)
    reference = FrozenCopy(of.model)
    want = [reference.errors(of, *d).view(2, 4) for d in ((first, keys), (second, other))]
    cache = CachedErrors(reference, identity, tmp_path)
    half = torch.arange(8).view(2, 4)
    pick = [half[:, :2].flatten(), half[:, 2:].flatten()]

    def mixed(name):
        a, b = (getattr(d, name)[i].unflatten(0, (2, 2)) for d, i in zip((first, second), pick, strict=True))
        return torch.cat([a, b], 1).flatten(0, 1)

    draw = type(first)(**{name: mixed(name) for name in ("x_0", "eps", "x_t", "t", "cond")}, weight=None)
    got = cache.errors(of, draw, keys[:2] + other[2:])
    torch.testing.assert_close(got.view(2, 4), torch.cat([want[0][:, :2], want[1][:, 2:]], 1))
    cache.save()
    assert torch.equal(CachedErrors(None, identity, tmp_path).errors(of, draw, keys[:2] + other[2:]), got)


def test_ranks_write_a_file_each_and_read_all(tmp_path):
    of = stage()
    draw, keys = drawn(of)
    reference = FrozenCopy(of.model)
    for rank in range(2):
        part = [i for i in range(8) if i % 2 == rank]
        own = type(draw)(**{name: getattr(draw, name)[part] for name in ("x_0", "eps", "x_t", "t", "cond")}, weight=None)
        cache = CachedErrors(reference, {}, tmp_path, Ranks(rank=rank, world=2))
        cache.errors(of, own, keys[rank::2])
        cache.save()
    got = CachedErrors(None, {}, tmp_path).errors(of, draw, keys)
    torch.testing.assert_close(got, reference.errors(of, draw, keys))


def test_kept_errors_of_other_draws_are_never_used(tmp_path):
    of = stage()
    draw, keys = drawn(of)
    cache = CachedErrors(FrozenCopy(of.model), {"seed": 0}, tmp_path)
    cache.errors(of, draw, keys)
    cache.save()
    with pytest.raises(ValueError, match=r"expected pair p0 at t = 0\.\d+ in epoch 0, got 0\.\d+\. Other seeds or schedules"):
        cache.errors(of, drawn(of, seed=1)[0], keys)
    with pytest.raises(ValueError, match="CachedErrors: expected those of pair p0 in epoch 0, got none. Give the reference"):
        CachedErrors(None, {"seed": 1}, tmp_path).errors(of, draw, keys)


def test_damaged_and_not_finite_errors_are_refused(tmp_path):
    of = stage()
    draw, keys = drawn(of)
    cache = CachedErrors(FrozenCopy(of.model), {}, tmp_path)
    cache.errors(of, draw, keys)
    cache.save()
    file = next(tmp_path.rglob("epoch-000000-0.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="with its checksum, got other bytes"):
        CachedErrors(None, {}, tmp_path).errors(of, draw, keys)
    with torch.no_grad():
        of.model.out_layer.bias.fill_(math.inf)
    with pytest.raises(ValueError, match=r"CachedErrors: expected finite errors of the reference, got \[inf, inf\] at p0. Check"):
        CachedErrors(FrozenCopy(of.model), {}).errors(of, draw, keys)
