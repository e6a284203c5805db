"""Rows: one DPO update of TRELLIS's flows on a pair, of the width and tokens of its text-large models and a twelfth of their depth."""

import functools
from dataclasses import replace

import torch

from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.models.lora import LoraConfig, add_lora, lora_parameters
from eg3d_rlhf.tuning.flow.families.trellis.files import return_freed_memory
from eg3d_rlhf.tuning.flow.families.trellis.random_flows import RandomConditions, Size, build_stage, make_pairs
from eg3d_rlhf.tuning.flow.reference import AdapterOff
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig, Updates
from training.distributed import SINGLE

BLOCKS = 2  # of 24


def dpo_update(device: str, tiny: bool, stage_name: str) -> Case:
    """Errors of a pair by policy and reference, and gradients of the adapters. The reference is what published training code does: both
    networks one after the other, every block computed again in the backward pass, attention and products by torch."""
    return_freed_memory()
    size = Size(stage=stage_name, blocks=BLOCKS, device=device)
    if tiny:
        size = replace(size, width=64, grid=8, voxels=60)
    torch.manual_seed(0)
    stage = build_stage(size)
    add_lora(stage.model, LoraConfig(), 0)
    adapters = lora_parameters(stage.model)
    with torch.no_grad():
        for parameter in adapters:  # as in the midst of a training
            parameter += 0.01 * torch.randn_like(parameter)
    config, pairs = TrainConfig(batch=1), make_pairs(size, stage)
    work = Updates(RandomConditions(), stage, pairs, config, stage.model, adapters, AdapterOff(stage.model), SINGLE)  # type: ignore[arg-type]
    items = work.order.items(0)
    draw = work._draw(pairs, 0, items)

    def prepare() -> None:
        for parameter in adapters:
            parameter.grad = None

    def run() -> Outcome:
        _, loss, preferred, rejected = work._pass(draw, pairs, 0)[:4].unbind()
        margin = -loss.expm1().log() / config.dpo.beta  # the loss has it times beta, and its rounding
        found = {"preferred error": preferred, "rejected error": rejected, "margin": margin}
        return Outcome(found, {f"adapter {i}": p.grad for i, p in enumerate(adapters) if p.grad is not None})

    return Case(fast=run, prepare=prepare)


ROWS = [
    Row(
        name=f"TRELLIS {stage} flow, one DPO update", size="full", make=functools.partial(dpo_update, stage_name=stage), seconds=seconds,
        meter_in_round=True, target=Target(at_least=1.5, aim=2.5),
    ) for stage, seconds in (("structure", 25), ("latent", 20))
]  # fmt: skip
