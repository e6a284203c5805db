"""Adapters: off they are exactly the base, on they are the formula, merged they are the same network."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.models import lora
from eg3d_rlhf.models.lora import LoraLinear, adapters_off, add_lora, lora_parameters, merged_state
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import feats_of
from tests.models.adaptable_flow import AdaptableFlow, inputs, shake
from tests.rejections import raising

SMALL = LoraConfig(rank=2, alpha=8)
KINDS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "voxels"])


def run(model, sparse=False):
    with torch.no_grad():
        return feats_of(model(*inputs(sparse)))


def tuned(config=SMALL, base=None):
    model = base or AdaptableFlow()
    add_lora(model, config, seed=3)
    shake(model)
    return model


@KINDS
def test_off_is_bitwise_the_base(sparse):
    want = run(AdaptableFlow(), sparse)
    model = tuned()
    assert not torch.equal(run(model, sparse), want)
    with adapters_off(model):
        assert torch.equal(run(model, sparse), want)
    assert not torch.equal(run(model, sparse), want)


@KINDS
def test_an_untrained_adapter_changes_nothing(sparse):
    model = AdaptableFlow()
    want = run(AdaptableFlow(), sparse)
    add_lora(model, SMALL, seed=0)
    assert torch.equal(run(model, sparse), want)


@KINDS
def test_merged_is_the_same_network_under_the_base_s_names(sparse):
    model = tuned()
    base_network = AdaptableFlow(seed=9)
    state = merged_state(model)
    assert list(state) == list(base_network.state_dict())
    base_network.load_state_dict(state)
    torch.testing.assert_close(run(base_network, sparse), run(model, sparse), rtol=0, atol=5e-7)


def test_the_formula():
    layer = LoraLinear(nn.Linear(5, 4), rank=3, alpha=7.5)
    shake(layer)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    W, b, A, B, X = (
        t.detach().double().numpy()
        for t in (layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.weight, layer.lora_B.weight, x)
    )
    np.testing.assert_allclose(layer(x).detach().numpy(), X @ W.T + b + 7.5 / 3 * X @ A.T @ B.T, atol=2e-6)


def test_only_adapters_are_trained():
    model = AdaptableFlow()
    names = add_lora(model, SMALL, seed=0)
    assert names == [f"blocks.{i}.{n}" for i in range(2) for n in ("to_qkv", "to_q", "to_kv", "to_out")]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        trained
        == {f"{n}.lora_{part}.weight" for n in names for part in "AB"}
        == set(lora.adapter_state(model))
    )
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in lora_parameters(model)) == 2 * 2 * ((8 + 24) + (8 + 8) + (5 + 16) + (8 + 8))
    feats_of(model(*inputs(False))).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_start_depends_on_the_seed_alone_and_leaves_the_global_generator():
    models = [AdaptableFlow() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LoraConfig(rank=16), seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, same, other = (
        [layer.lora_A.weight.detach() for layer in lora.adapted_layers(m).values()] for m in models
    )
    assert all(map(torch.equal, a, same)) and not any(map(torch.equal, a, other))
    assert all(not layer.lora_B.weight.any() for layer in lora.adapted_layers(models[0]).values())
    flat = torch.cat([w.flatten() * math.sqrt(w.shape[1]) for w in a])  # uniform on -1..1
    assert flat.abs().max() <= 1 and abs(float(flat.std()) - 1 / math.sqrt(3)) < 0.03


def test_off_nests_and_comes_back_after_an_error():
    model = tuned()
    base = run(AdaptableFlow())
    on = run(model)
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(run(model), base)
        assert torch.equal(run(model), base)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(run(model), on)


def test_a_pass_without_adapters_between_forward_and_backward_changes_no_gradient():
    """Checkpointing computes a block again in the backward pass, when its adapters must be on."""
    gradients = []
    for recompute in (False, True):
        model = tuned()
        x, t, cond = inputs(False)
        y = checkpoint(model, x, t, cond, use_reentrant=False) if recompute else model(x, t, cond)
        with torch.no_grad(), adapters_off(model):
            model(x, t, cond)
        y.square().mean().backward()
        gradients.append([p.grad for p in lora_parameters(model)])
    assert all(map(torch.equal, *gradients))


def test_dropout_acts_on_the_adapter_in_training_alone():
    model = tuned(LoraConfig(rank=2, alpha=8, dropout=0.5))
    base_network = tuned()
    base = run(AdaptableFlow())
    assert torch.equal(run(model.eval()), run(base_network))
    model.train()
    assert not torch.equal(run(model), run(model))
    with adapters_off(model):
        assert torch.equal(run(model), base)


def test_half_precision_base_keeps_float32_adapters():
    half = AdaptableFlow().half()
    want = run(half)
    model = tuned(LoraConfig(rank=2, alpha=0.01), AdaptableFlow().half())
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    with adapters_off(model):
        assert torch.equal(run(model), want)
    assert {v.dtype for v in merged_state(model).values()} == {torch.float16}
    assert lora.merge_rounding(model) > 0.01 > 1e-4 > lora.merge_rounding(tuned())
    assert lora.merge_rounding(AdaptableFlow()) == 0


def test_works_under_autocast():
    model = tuned()
    with torch.autocast("cpu", torch.bfloat16):
        v = model(*inputs(False))
        v.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))
    torch.testing.assert_close(v.detach().float(), run(model), rtol=0.1, atol=0.1)


def test_targets_are_whole_parts_of_names():
    a = nn.ModuleDict({"to_q": nn.Linear(2, 2), "into_q": nn.Linear(2, 2)})
    b = nn.ModuleDict({"to_q": nn.Linear(2, 2)})
    net = nn.ModuleDict({"a": a, "b": b})
    assert add_lora(copy.deepcopy(net), LoraConfig(targets=("to_q",)), 0) == ["a.to_q", "b.to_q"]
    assert add_lora(copy.deepcopy(net), LoraConfig(targets=["a.to_q"]), 0) == ["a.to_q"]


def test_a_layer_of_two_names_keeps_one_adapter():
    net = nn.Sequential()
    net.first = nn.Linear(2, 2)
    net.second = net.first
    assert add_lora(net, LoraConfig(targets=("first", "second"), rank=1), 0) == ["first", "second"]
    assert net.first is net.second and len(lora_parameters(net)) == 2
    shake(net)
    base_network = nn.Sequential()
    base_network.first = nn.Linear(2, 2)
    base_network.second = base_network.first
    base_network.load_state_dict(merged_state(net))
    x = torch.eye(2)
    torch.testing.assert_close(base_network(x), net(x), rtol=0, atol=1e-6)


class VoxelLinear(nn.Linear):
    """A linear layer whose input is not a tensor."""

    def forward(self, x):
        return x.with_feats(super().forward(x.feats))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda m: add_lora(m, LoraConfig(targets=("to_q", "to_v")), 0),
            ("to_v", "input_layer, out_layer, to_kv, to_out, to_q, to_qkv"),
        ),
        (
            lambda m: add_lora(m, LoraConfig(targets=("blocks",)), 0),
            ("blocks (ModuleList)",),
        ),
        (
            lambda m: (add_lora(m, SMALL, 0), add_lora(m, SMALL, 0)),
            ("8", "merged_state"),
        ),
        (lambda m: adapters_off(m).__enter__(), ("add_lora",)),
        (lambda m: LoraConfig(rank=0), ("rank", ">= 1")),
        (lambda m: LoraConfig(alpha=float("nan")), ("alpha", "nan")),
        (lambda m: LoraConfig(dropout=1), ("dropout", "< 1")),
        (lambda m: LoraConfig(targets=()), ("targets", "[]")),
    ],
)
def test_unsuitable_targets_are_rejected(change, names):
    with raising(*names):
        change(AdaptableFlow())


def test_layers_on_voxels_are_rejected_before_anything_changes():
    net = nn.ModuleDict({"to_q": nn.Linear(2, 2), "mlp": VoxelLinear(2, 2)})
    with raising("mlp (VoxelLinear)"):
        add_lora(net, LoraConfig(targets=("to_q", "mlp")), 0)
    assert type(net["to_q"]) is nn.Linear and net["to_q"].weight.requires_grad
