"""Estimate memory and computing of one update of a stage with fake tensors, and find what fits a device."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.core.memory import GIB, MemoryTrace
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import StageTraining
from eg3d_rlhf.tuning.flow.training.trainer import Descent, policy_and_reference, recomputing
from torch_utils.ops.implementations import implementation
from training.distributed import Ranks

SHARE = 0.9  # of a device's free memory that is planned with: allocators and libraries keep some
# of a stage, the network to train, its reference
Start = Callable[[FlowStage, nn.Module, FrozenModel | None], Descent]


@dataclass(frozen=True)
class Cost:
    """Costs of one update, or of sampling."""

    bytes: int  # most that tensors hold at a time, weights among them
    flops: int  # multiplications and additions


def fake_stage(trace: MemoryTrace, stage: FlowStage, dtype: torch.dtype | None = None) -> FlowStage:
    """Copy a stage, with fake numbers in its network.

    Args: trace: in which the copy is used; dtype: of the numbers, None for the network's own.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta", dtype), requires_grad=False)
        for p in stage.model.parameters()
    }
    memo |= {id(b): b.detach().to("meta", dtype) for b in stage.model.buffers()}
    return replace(stage, model=trace.fill(copy.deepcopy(stage.model, memo)))


def cost_of_update(
    stage: FlowStage, config: StageTraining, start: Start, recompute: bool, device: str = "cpu"
) -> Cost:
    """Estimate one update once the optimiser has its state. The stage's network may be on any device, or on
    none ("meta").

    Args: start: makes the Descent, whose batch decides; device: "cuda" counts what AdamW holds there besides.
    """
    with implementation("ref"), torch.random.fork_rng(devices=[]):
        trace = MemoryTrace()
        twin = fake_stage(trace, stage, None if config.lora else torch.float32)
        with trace, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that have no place in memory
            policy, reference = policy_and_reference(twin, config)
            recomputing(policy, recompute)
            updates = start(twin, policy, reference)
            for group in updates.optimizer.param_groups:
                group["foreach"] = device == "cuda"
            for step in range(1 if config.lora else 2):  # of adapters the state is small
                trace.mark()
                updates.run(step)
        return Cost(trace.peak, trace.flops)


def free_bytes(device: torch.device | str) -> int:
    """Return the bytes of memory that a process may still take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


LARGE = 10**8  # parameters below which memory is no concern, and the estimate would take longer than updates


def fit_passes(
    stage: FlowStage,
    config: StageTraining,
    batch: int,
    start: Callable[[int], Start],
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[int | None, bool]:
    """Choose what a training leaves open: the examples of a pass, on CUDA (None: all of a process), and
    whether blocks are computed again in the backward pass.

    Args: config: decides on blocks where its `recompute` is not auto; batch: examples of a process; start: of
        a number of examples, see `cost_of_update`.
    Raises: ValueError where not even one example fits, with the figures.
    """
    weights = [p for p in stage.model.parameters()]
    device = next(stage.model.parameters()).device
    again = {"on": True, "off": False}.get(config.recompute)
    cuda = device.type == "cuda"
    if sum(p.numel() for p in weights) < LARGE or (again is not None and not cuda):
        return None, again is True
    known = functools.cache(lambda n, on: cost_of_update(stage, config, start(n), on, device.type))
    elsewhere = 0.0 if config.lora else 1 - 1 / ranks.world
    # float32 weights, gradients and moments that other ranks hold
    others = int(16 * elsewhere * sum(p.numel() for p in weights))

    def costs(n: int, on: bool) -> Cost:
        cost = known(n if cuda else batch, on)
        return replace(cost, bytes=cost.bytes - others)

    space = int(SHARE * (free_bytes(device) + sum(p.nbytes for p in weights)))
    best = ranks.broadcast(cheapest(costs, batch if cuda else 1, space, again) if ranks.main else None)
    if best is None:
        least = ranks.broadcast(costs(1, again is not False).bytes if ranks.main else None) / GIB
        raise ValueError(
            f"train_stage({stage.name}): expected {least:.1f} GiB of memory for one update, got"
            f" {space / GIB:.1f} free. Hold the flows in bfloat16 (--set dtype=bfloat16), or take a larger"
            " device."
        )
    size, on = best
    how = "computed again" if on else "kept"
    say(f"Stage {stage.name}: passes of {size if cuda else batch}, blocks {how}; {space / GIB:.1f} GiB free.")
    return size if cuda else None, on


def cheapest(
    costs: Callable[[int, bool], Cost], batch: int, space: int, recompute: bool | None = None
) -> tuple[int, bool] | None:
    """Return (examples per pass, whether blocks are computed again) of the fastest update that fits, None
    where none does.

    Passes may be any divisor of a batch. Recomputation takes a third more time, and smaller passes little
    more: so all passes are tried without it first.
    Args: costs: of a pass, called for 1 and 2 examples: memory is taken to be linear in their number; space:
        bytes.
    """
    for again in (False, True) if recompute is None else (recompute,):
        one = costs(1, again).bytes
        more = costs(2, again).bytes - one if batch > 1 else 0
        sizes = [n for n in range(batch, 0, -1) if batch % n == 0 and one + (n - 1) * more <= space]
        if sizes:
            return sizes[0], again
    return None
