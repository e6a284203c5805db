"""Estimate the memory and the FLOPs of one update of a stage with fake tensors, and choose passes that fit
into the memory of a device.

A pass is one forward and backward computation on some examples of an update. Fake tensors have shapes but no
data, so the estimate takes neither the memory nor the time of an update.
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
from eg3d_rlhf.tuning.flow.training.trainer import Descent, policy_and_reference, set_recompute
from torch_utils.ops.implementations import implementation
from training.distributed import Ranks

SHARE = 0.9  # share of the free memory that may be planned with: allocators and libraries need the rest
# function from a stage, the network to train and its reference to a Descent
Start = Callable[[FlowStage, nn.Module, FrozenModel | None], Descent]


@dataclass(frozen=True)
class Cost:
    """Cost of one update, or of sampling."""

    bytes: int  # peak memory of all tensors, weights included
    flops: int  # multiplications and additions


def fake_stage(trace: MemoryTrace, stage: FlowStage, dtype: torch.dtype | None = None) -> FlowStage:
    """Copy a stage, with fake tensors in the network of the copy.

    Args:
        trace: trace in which the copy is used.
        stage: stage to copy.
        dtype: type of the copied parameters; None: the type that they have in the network.
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

    Args:
        stage: stage that is trained.
        config: settings of the training.
        start: function that makes the Descent, whose batch decides the cost.
        recompute: whether blocks are recomputed in the backward pass.
        device: type of the device; "cuda" includes the temporary memory that AdamW takes there.
    """
    # reference implementations: custom kernels cannot run on fake tensors; the global seed stays untouched
    with implementation("ref"), torch.random.fork_rng(devices=[]):
        trace = MemoryTrace()
        fake_copy = fake_stage(trace, stage, None if config.lora else torch.float32)
        with trace, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations on tensors without data warn
            # the same functions as in a training, on fake tensors
            policy, reference = policy_and_reference(fake_copy, config)
            set_recompute(policy, recompute)
            descent = start(fake_copy, policy, reference)
            for param_group in descent.optimizer.param_groups:
                # AdamW's default on CUDA: one update of all parameters, with temporary copies of them
                param_group["foreach"] = device == "cuda"
            # The moments are allocated in the first update, so the second one has the true peak. The moments
            # of adapters are small enough to measure the first.
            for step in range(1 if config.lora else 2):
                trace.mark()
                descent.run(step)
        return Cost(trace.peak, trace.flops)


def free_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device in bytes; for a CPU, that of the machine."""
    if torch.device(device).type == "cuda":
        # Memory that torch's allocator holds from an earlier training, and does not use, is free, too.
        cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # mem_get_info returns (free, total) bytes
        return torch.cuda.mem_get_info(torch.device(device))[0] + cached_bytes
    # lines such as "MemAvailable:   16000000 kB"
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    # "MemAvailable" includes caches that the kernel would give up; the number is in KiB
    return int(meminfo["MemAvailable"].split()[0]) * 1024


# number of parameters below which memory is no concern, and the estimate would take longer than updates
LARGE = 10**8


def fit_passes(
    stage: FlowStage,
    config: StageTraining,
    batch: int,
    start: Callable[[int], Start],
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[int | None, bool]:
    """Choose the number of examples in a pass, and whether blocks are recomputed in the backward pass.

    Returns:
        The number of examples in a pass, or None for all examples of the process; on the CPU it is always
        None. And True if blocks are recomputed.

    Args:
        stage: stage that is trained.
        config: settings of the training; they decide on recomputation if their `recompute` is not "auto".
        batch: number of examples of an update that this process computes.
        start: function from a number of examples to the argument `start` of `cost_of_update`.
        ranks: processes that train together.
        say: function that prints a line.

    Raises: ValueError with the required and the free memory if not even one example fits.
    """
    parameters = [p for p in stage.model.parameters()]
    device = next(stage.model.parameters()).device
    # "auto" gives None: recomputation is then chosen here
    fixed_recompute = {"on": True, "off": False}.get(config.recompute)
    # only on CUDA is a batch divided into passes to fit into the memory
    is_cuda = device.type == "cuda"
    if sum(p.numel() for p in parameters) < LARGE or (fixed_recompute is not None and not is_cuda):
        return None, fixed_recompute is True
    cached_cost = functools.cache(
        lambda examples, recompute: cost_of_update(stage, config, start(examples), recompute, device.type)
    )
    # full tuning over several ranks is sharded: this share of the training state is on the other ranks
    remote_share = 0.0 if config.lora else 1 - 1 / ranks.world
    # 16 bytes a parameter: weight, gradient and AdamW's two moments in float32
    remote_bytes = int(16 * remote_share * sum(p.numel() for p in parameters))

    def estimate_cost(examples: int, recompute: bool) -> Cost:
        # on the CPU the batch is never divided into passes, so only the whole batch is estimated
        cost = cached_cost(examples if is_cuda else batch, recompute)
        return replace(cost, bytes=cost.bytes - remote_bytes)

    # the estimate includes the weights, which are on the device already and so are not free
    usable_bytes = int(SHARE * (free_bytes(device) + sum(p.nbytes for p in parameters)))
    # rank 0 decides for all: ranks with different passes would wait for each other
    pass_choice = ranks.broadcast(
        choose_pass(estimate_cost, batch if is_cuda else 1, usable_bytes, fixed_recompute)
        if ranks.is_main
        else None
    )
    if pass_choice is None:
        required_gib = (
            ranks.broadcast(estimate_cost(1, fixed_recompute is not False).bytes if ranks.is_main else None)
            / GIB
        )
        # Only advice that is not followed already: weights in half precision, adapters, more processes.
        if config.lora is None:
            remedy = "Train adapters (--tune=lora), or use a larger device or more processes of torchrun."
        elif any(p.dtype == torch.float32 and p.numel() > LARGE // 1000 for p in parameters):
            remedy = "Hold the weights in bfloat16 (--dtype=bfloat16), or use a larger device."
        else:
            remedy = "Use a larger device."
        raise ValueError(
            f"train_stage({stage.name}): one update needs {required_gib:.1f} GiB of memory, but only"
            f" {usable_bytes / GIB:.1f} GiB are free. {remedy}"
        )
    pass_size, recompute = pass_choice
    activations_state = "recomputed" if recompute else "kept"
    say(
        f"Stage {stage.name}: {pass_size if is_cuda else batch} examples per pass, activations are"
        f" {activations_state}; {usable_bytes / GIB:.1f} GiB of memory are free."
    )
    return pass_size if is_cuda else None, recompute


def choose_pass(
    estimate_cost: Callable[[int, bool], Cost],
    batch: int,
    available_bytes: int,
    recompute: bool | None = None,
) -> tuple[int, bool] | None:
    """Choose the fastest update that fits into the memory.

    Returns (number of examples in a pass, whether blocks are recomputed), or None if no pass fits.

    The number of examples in a pass may be any divisor of the batch. Recomputation takes a third more time,
    while smaller passes take little more, so all sizes are tried without recomputation first.

    Args:
        estimate_cost: function from the number of examples in a pass, and whether blocks are recomputed, to
            the cost. It is called for 1 and 2 examples only, since the memory is assumed to be linear in
            their number.
        batch: number of examples of the process in an update.
        available_bytes: bytes of memory that the update may take.
        recompute: whether blocks are recomputed; None tries passes without recomputation first, and then
            passes with it.
    """
    for recompute_blocks in (False, True) if recompute is None else (recompute,):
        single_bytes = estimate_cost(1, recompute_blocks).bytes
        # bytes of each further example
        extra_bytes = estimate_cost(2, recompute_blocks).bytes - single_bytes if batch > 1 else 0
        divisors = [
            pass_size for pass_size in range(batch, 0, -1) if batch % pass_size == 0
        ]  # the largest first
        fitting_sizes = [
            pass_size
            for pass_size in divisors
            if single_bytes + (pass_size - 1) * extra_bytes <= available_bytes
        ]
        if fitting_sizes:
            return fitting_sizes[0], recompute_blocks
    return None
