"""Estimate the memory and the FLOPs of one update of a stage with fake tensors, and choose passes that fit a
device.

Fake tensors have shapes but no data, so the estimate takes neither the memory nor the time of an update.
"""

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

SHARE = 0.9  # share of the free memory that may be planned with: allocators and libraries need the rest
# makes a Descent from a stage, the network to train, and its reference
Start = Callable[[FlowStage, nn.Module, FrozenModel | None], Descent]


@dataclass(frozen=True)
class Cost:
    """Cost of one update, or of sampling."""

    bytes: int  # peak memory of all tensors, weights included
    flops: int  # multiplications and additions


def fake_stage(trace: MemoryTrace, stage: FlowStage, dtype: torch.dtype | None = None) -> FlowStage:
    """Copy a stage, with fake tensors in its network.

    Args: trace: the trace in which the copy is used; dtype: of the parameters, None for the network's own.
    """
    # The memo makes deepcopy replace each parameter and buffer by one on "meta", without copying any data.
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to("meta", dtype), requires_grad=False)
        for p in stage.model.parameters()
    }
    memo |= {id(b): b.detach().to("meta", dtype) for b in stage.model.buffers()}
    return replace(stage, model=trace.fill(copy.deepcopy(stage.model, memo)))


def cost_of_update(
    stage: FlowStage, config: StageTraining, start: Start, recompute: bool, device: str = "cpu"
) -> Cost:
    """Estimate the cost of one update after the optimiser has allocated its state.

    The stage's network may be on any device, or on none ("meta").

    Args: start: makes the Descent, whose batch decides the cost; device: "cuda" includes the temporary memory
        that AdamW takes there.
    """
    # reference implementations: custom kernels cannot run on fake tensors; the global seed stays untouched
    with implementation("ref"), torch.random.fork_rng(devices=[]):
        trace = MemoryTrace()
        twin = fake_stage(trace, stage, None if config.lora else torch.float32)
        with trace, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without data warn
            # the same functions as in a training, on fake tensors
            policy, reference = policy_and_reference(twin, config)
            recomputing(policy, recompute)
            updates = start(twin, policy, reference)
            for group in updates.optimizer.param_groups:
                # AdamW's default on CUDA: one update of all parameters, with temporary copies of them
                group["foreach"] = device == "cuda"
            # The moments are allocated in the first update, so the second one has the true peak. The moments
            # of adapters are small enough to measure the first.
            for step in range(1 if config.lora else 2):
                trace.mark()
                updates.run(step)
        return Cost(trace.peak, trace.flops)


def free_bytes(device: torch.device | str) -> int:
    """Return the bytes of memory that a process may still take."""
    # on the CPU "MemAvailable" includes caches that the kernel would give up
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
    """Choose the settings that the user left open.

    Returns the examples of a pass on CUDA (None: all examples of the process), and whether blocks are
    recomputed in the backward pass.

    Args: config: decides on recomputation if its `recompute` is not auto; batch: examples of a process;
        start: returns the `start` of `cost_of_update` for a number of examples.
    Raises: ValueError with the figures if not even one example fits.
    """
    weights = [p for p in stage.model.parameters()]
    device = next(stage.model.parameters()).device
    # None: chosen here
    again = {"on": True, "off": False}.get(config.recompute)
    cuda = device.type == "cuda"
    if sum(p.numel() for p in weights) < LARGE or (again is not None and not cuda):
        return None, again is True
    estimate = functools.cache(lambda n, on: cost_of_update(stage, config, start(n), on, device.type))
    # full tuning over several ranks is sharded: this share of the state is on other ranks
    elsewhere = 0.0 if config.lora else 1 - 1 / ranks.world
    # 16 bytes a parameter: weight, gradient and AdamW's two moments in float32
    others = int(16 * elsewhere * sum(p.numel() for p in weights))

    def costs(n: int, on: bool) -> Cost:
        # on the CPU the batch is never divided, so only the whole batch is estimated
        cost = estimate(n if cuda else batch, on)
        return replace(cost, bytes=cost.bytes - others)

    # the estimate includes the weights, which are on the device already and so are not free
    space = int(SHARE * (free_bytes(device) + sum(p.nbytes for p in weights)))
    # rank 0 decides for all: ranks with different passes would wait for each other
    best = ranks.broadcast(cheapest(costs, batch if cuda else 1, space, again) if ranks.main else None)
    if best is None:
        least = ranks.broadcast(costs(1, again is not False).bytes if ranks.main else None) / GIB
        raise ValueError(
            f"train_stage({stage.name}): one update needs {least:.1f} GiB of memory, but only"
            f" {space / GIB:.1f} GiB are free. Load the flows in bfloat16 (--set dtype=bfloat16), or use a"
            " larger device."
        )
    size, on = best
    how = "recomputed" if on else "kept"
    say(
        f"Stage {stage.name}: passes of {size if cuda else batch}, activations are {how};"
        f" {space / GIB:.1f} GiB free."
    )
    return size if cuda else None, on


def cheapest(
    costs: Callable[[int, bool], Cost], batch: int, space: int, recompute: bool | None = None
) -> tuple[int, bool] | None:
    """Choose the fastest update that fits: (examples per pass, whether blocks are recomputed), or None.

    A pass may have any divisor of the batch. Recomputation takes a third more time, while smaller passes take
    little more, so all sizes are tried without recomputation first.
    Args: costs: cost of a pass; called for 1 and 2 examples, since memory is assumed to be linear in their
        number; space: bytes.
    """
    for again in (False, True) if recompute is None else (recompute,):
        first = costs(1, again).bytes
        more = costs(2, again).bytes - first if batch > 1 else 0  # bytes of each further example
        # largest first
        sizes = [n for n in range(batch, 0, -1) if batch % n == 0 and first + (n - 1) * more <= space]
        if sizes:
            return sizes[0], again
    return None
