"""The job that says what one update of TRELLIS's flows takes, in memory and time, at full size."""

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, versions
from eg3d_rlhf.models.lora import LoraConfig, add_lora, lora_parameters
from eg3d_rlhf.tuning.flow.families.folder import return_freed_memory
from eg3d_rlhf.tuning.flow.families.trellis.random_flows import DTYPES, HEAD, STAGES, RandomConditions, Size, build_stage, make_pairs
from eg3d_rlhf.tuning.flow.reference import AdapterOff
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig, Updates
from training.distributed import SINGLE


def measure(size: Size) -> dict:
    """Run the updates in this process. Seconds, the peak, and the loss, which is log 2 before the first update."""
    started = time.perf_counter()
    return_freed_memory()
    torch.manual_seed(0)
    stage = build_stage(size)
    add_lora(stage.model, LoraConfig(rank=size.rank), seed=0)
    trained = lora_parameters(stage.model)
    config = TrainConfig(steps=size.steps, batch=size.pairs, warmup=0)
    pairs = make_pairs(size, stage)
    conditions: Any = RandomConditions()  # all that an update asks of a pipeline
    updates = Updates(conditions, stage, pairs, config, stage.model, trained, AdapterOff(stage.model), SINGLE)
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    built, rows, seconds, busy = time.perf_counter(), [], [], []
    for step in range(size.steps):
        before, busy_before = time.perf_counter(), time.process_time()
        rows.append(updates.run(step))
        seconds.append(time.perf_counter() - before)  # the update ends in numbers on the CPU, hence after everything on the device
        busy.append(time.process_time() - busy_before)
    return {
        **asdict(size), "grid": size.points, "parameters": sum(p.numel() for p in stage.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained), "seconds_to_build": built - started, "seconds_per_update": seconds,
        "processor_seconds_per_update": busy,
        "peak_bytes": peak_bytes("cpu"), "peak_bytes_of_gpu": peak_bytes("cuda") if size.device == "cuda" else None,
        "loss": [row["loss"] for row in rows], "grad_norm": [row["grad_norm"] for row in rows],
    }


def peak_bytes(device: str) -> int:
    """Most memory so far: of this process, from the kernel, or allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@click.command("step", cls=GroupedCommand)
@option("--stage", "stages", type=click.Choice(["all", *STAGES]), default="all", help="Which flow.")
@option("--pairs", metavar="INT,...", default="1", help="Pairs per update, in one pass; a list measures each.")
@option("--steps", rare=True, metavar="INT", type=click.IntRange(1), default=1, help="Updates; of several the first does not count.")
@option("--voxels", rare=True, metavar="INT", type=click.IntRange(1, 64**3), default=8000, help="Of each latent of the second stage.")
@option("--rank", rare=True, metavar="INT", type=click.IntRange(1), default=16, help="Of the adapters.")
@option("--dtype", rare=True, type=click.Choice(list(DTYPES)), default="float32", help="Of the blocks' weights and activations.")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where.")
@option("--blocks", rare=True, metavar="INT", type=click.IntRange(1), default=24, help="Fewer make a quick trial.", group="Smaller models")
@option("--width", rare=True, metavar="INT", type=click.IntRange(HEAD), default=1024, help="Likewise, by 64.", group="Smaller models")
def step(stages: str, pairs: str, device: str, **settings) -> None:
    """What one DPO update of each of TRELLIS's flows takes, in memory and time, at the full size of its text-large models, as JSON.

    The weights are random, the adapters, the reference (the same network with its adapters off), the pairs' noise and the update are those
    of training; every block is computed again in the backward pass. Each stage runs in a process of its own, so that peaks are its own.
    Latents of the second stage lie on thin shells of 8,000 voxels in the grid of 64^3, as surfaces do.

    \b
    Example:
        eg3d-rlhf flow step --stage=latent --set voxels=4000
    """
    given = {name: value for name, value in settings.items() if value is not None}
    numbers = [int(n) if n.strip().isdigit() else 0 for n in pairs.split(",")]
    if 0 in numbers:
        raise ValueError(f"--pairs: expected positive numbers with commas between them, got {pairs!r}. Use 1,2,4,8, say.")
    measured: list[dict] = []
    for stage in STAGES if stages == "all" else (stages,):
        for number in numbers:
            size = Size(stage=stage, pairs=number, device=choose_device(device).type, **given)
            click.echo(f"== {stage}, {number} pairs: build, then {size.steps} update(s); minutes each at full size on a CPU", err=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
                measured.append(apart.submit(measure, size).result())
    click.echo(json.dumps({"machine": versions(), "updates": measured}, indent=1))
