"""One update by the fast implementation and by the reference: the same losses and gradients for every
objective.
"""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks import rows_tuning
from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.trellis import flows
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import Updates
from eg3d_rlhf.tuning.flow.training.reference import AdapterOff, FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from eg3d_rlhf.tuning.flow.workspace.estimate import pairs_of
from torch_utils.ops import linear, transformer
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE

SIZE = rows_tuning.Size(stage="latent", voxels=90, blocks=3, width=128, grid=12)
LORA = LoraConfig(rank=4, targets=("to_qkv", "to_q", "to_kv", "to_out", "mlp.2"))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """Make a small network use the implementations of a large one."""
    for module, limit in ((linear, 1 << 10), (transformer, 2), (flows, 2)):
        monkeypatch.setattr(module, "LARGE", limit)
    monkeypatch.setattr(transformer, "LARGE_HIDDEN", 0)
    monkeypatch.setattr(flows, "LONG", 2)


def updates(stage_name, lora, dpo):
    size = replace(SIZE, stage=stage_name, grid=6 if stage_name == "structure" else 12)
    torch.manual_seed(1)
    stage = rows_tuning.build_stage(size)
    if lora is None:
        reference = FrozenModel(copy.deepcopy(stage.model).requires_grad_(False))
        parameters = list(stage.model.parameters())
    else:
        add_lora(stage.model, lora, 0)
        reference = AdapterOff(stage.model)
        parameters = lora_parameters(stage.model)
    with torch.no_grad():  # as in the midst of a training
        for parameter in parameters:
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    config = TrainConfig(lora=lora, steps=1, batch=2, warmup=0, dpo=dpo)
    needed = reference if config.needs_reference else None
    pairs = pairs_of(stage, 2, size.voxels)
    conditioned = ConditionedStage(stage, rows_tuning.RandomConditions())
    return Updates(conditioned, pairs, config, stage.model, needed, SINGLE), parameters


def outcome(work, parameters, impl):
    """Return losses and all gradients."""
    items = work.order.items(0)
    pairs = [pair for _, pair in items]
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(2)  # of dropout
    with implementation(impl):
        totals = work._pass(work._draw(pairs, 0))
    return totals[:4], [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


VARIANTS = {
    "adapters": (LORA, DpoConfig(beta=2.0)),
    "all parameters": (None, DpoConfig(beta=2.0, sft_weight=0.5)),
    "sft": (LORA, DpoConfig(kind="sft")),
    "dro": (LORA, DpoConfig(kind="dro", loser_weight=0.5)),
    "outputs alone": (replace(LORA, targets=("to_out",)), DpoConfig(beta=2.0)),
}
# Both stages with the defaults, and every other variant with one of them. The rest is for the slow tests.
QUICK = {
    ("adapters", "structure"),
    ("adapters", "latent"),
    ("all parameters", "structure"),
    ("sft", "latent"),
    ("dro", "structure"),
    ("outputs alone", "latent"),
}


@pytest.mark.parametrize(
    ("variant", "stage_name"),
    [
        pytest.param(variant, stage, marks=() if (variant, stage) in QUICK else pytest.mark.long)
        for variant in VARIANTS
        for stage in ("structure", "latent")
    ],
)
def test_fast_and_reference_agree(stage_name, variant):
    lora, dpo = VARIANTS[variant]
    work, parameters = updates(stage_name, lora, dpo)
    (got, gradients), (want, wanted) = (outcome(work, parameters, impl) for impl in ("auto", "ref"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in wanted)
    assert largest > 0
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)
