"""Test that the reference stays bitwise identical while the policy is trained, and that a reference that
would be trained is rejected.
"""

import copy
import math

import pytest
import torch

from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, draw_pairs, pair_loss
from eg3d_rlhf.tuning.flow.training.reference import AdapterOff, FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.models.adaptable_flow import AdaptableFlow, inputs, pairs, stage

KINDS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "voxels"])


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}


def drawn(of, seed=0, epoch=0, n=4):
    found, cond = pairs(of, n)
    return draw_pairs(of, found, cond, None, DpoConfig(), seed, epoch)


def frozen_copy(model):
    return FrozenModel(copy.deepcopy(model).requires_grad_(False))


def train(policy, reference, of, parameters, steps=4):
    """Do some DPO updates with weight decay, at a learning rate that changes every trained parameter."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    losses = []
    for step in range(steps):
        draw = drawn(of, epoch=step)
        errors = of.path.errors(policy(draw.x_t, draw.t, draw.cond), draw.x_0, draw.eps)
        loss = pair_loss(
            PairErrors.split(errors, reference.errors(of, draw)), DpoConfig(beta=50), None
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@KINDS
def test_adapters_off_is_the_base_through_training(sparse):
    of = stage(sparse)
    policy = of.model
    before = bits(policy)
    want = feats_of(AdaptableFlow()(*inputs(sparse))).detach()
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
    policy = of.model
    want = feats_of(AdaptableFlow()(*inputs(sparse))).detach()
    reference = frozen_copy(policy)
    losses = train(policy, reference, of, list(policy.parameters()))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] != losses[0]
    assert torch.equal(feats_of(reference.velocity(of, *inputs(sparse))), want)
    assert not torch.equal(feats_of(policy(*inputs(sparse))), want)


@KINDS
def test_the_base_itself_serves_a_policy_that_shares_its_memory(sparse):
    of = stage(sparse)
    base = of.model.requires_grad_(False)
    before = bits(base)
    policy = shared_copy(base)
    add_lora(policy, LoraConfig(rank=2), 0)
    train(policy, FrozenModel(base, policy), of, lora_parameters(policy))
    assert all(torch.equal(before[name], value) for name, value in bits(base).items())


def test_a_reference_that_would_train_is_rejected():
    model = AdaptableFlow()
    with pytest.raises(AssertionError, match="input_layer.weight"):
        FrozenModel(model)
    add_lora(model, LoraConfig(), 0)
    reference = AdapterOff(model)
    model.out_layer.bias.requires_grad_(True)
    with pytest.raises(AssertionError, match="out_layer.bias"):  # also when it is thawed later
        reference.velocity(stage(), *inputs(False))


def test_memory_shared_with_what_is_trained_is_rejected():
    base = AdaptableFlow().requires_grad_(False)
    policy = shared_copy(base).requires_grad_(True)  # the same memory, other parameters
    with pytest.raises(AssertionError, match="input_layer.weight"):
        FrozenModel(base, policy)
    FrozenModel(base, copy.deepcopy(policy))
