"""Estimate the memory and the time of sampling and of training a flow generator, from its settings without
its weights.

The memory is that of tensors (core/memory.py). Libraries need additional memory, and so do the decoders,
which decode one asset at a time after the flow networks. The time is the number of multiplications and
additions, divided by the speed that is measured on the device for a transformer block.

Shapes: v voxels of a sample.
"""

import functools
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eg3d_rlhf.core.cli import aligned
from eg3d_rlhf.core.memory import GIB, MemoryTrace
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import Latent, SparseSample, separate
from eg3d_rlhf.models.trellis.blocks import DenseLayout, ModulatedBlock
from eg3d_rlhf.tuning.flow.base.family import SizedStage
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.sampling import guides, sample, times
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, SparseVoxels, Voxels
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.memory_estimate import SHARE, Cost, cost_of_update, fake_stage
from eg3d_rlhf.tuning.flow.training.pair_training import Updates
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE
from training.progress import tqdm


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of sampling a stage, or of one update of its network, for one asset or one pair.

    Costs are traced with float32 weights in one process, and without the weights of other stages. `rows_of`
    converts them to other data types and to several processes.
    """

    stage: str  # name of the stage
    what: str  # "sample", or the kind of the update: "lora" or "full"
    precision: str  # data type of forward and backward passes
    recompute: bool  # True: blocks are computed again in the backward pass, which saves memory
    weights: int  # number of weights of the stage's network
    bytes: int  # peak memory in bytes for one asset or pair
    flops: int  # number of multiplications and additions for one asset or pair
    # bytes of each further asset or pair that is computed together with the first one; None: not traced
    more_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Memory and time of sampling a stage, or of one update of its network."""

    stage: str  # name of the stage
    what: str  # "sample", or the kind of the update: "lora" or "full"
    batch: int  # number of assets that are sampled together, or of pairs in one pass
    precision: str  # data type of forward and backward passes
    dtype: str  # data type of the networks' weights
    recompute: bool  # True: blocks are computed again in the backward pass, which saves memory
    # Peak memory in bytes of one process. Sampling holds the weights of all stages, and an update those of
    # its own stage only.
    bytes: int
    flops: int  # number of multiplications and additions of the whole batch, or of the update
    seconds: float | None = None  # time on the device in seconds; None if the speed was not measured


class ZeroConditioning:
    """Source of conditioning tensors that have the shapes a stage needs and are filled with zeros.

    Args:
        sized_stage: stage with the shape of its conditioning.
    """

    def __init__(self, sized_stage: SizedStage):
        self.token_shape = sized_stage.conditioning

    def conditioning(self, names: Sequence[str], stage: str) -> Any:
        """Return zeros as the conditioning of N prompts, see `Pipeline.conditioning`."""
        return self.null_conditioning(len(names), stage)

    def null_conditioning(self, n: int, stage: str) -> Any:
        """Return zeros as the empty conditioning of n samples, see `Pipeline.null_conditioning`."""
        if isinstance(self.token_shape, dict):
            return {name: torch.zeros(n, *shape) for name, shape in self.token_shape.items()}
        return torch.zeros(n, *self.token_shape)


def voxels_of(cells: int) -> int:
    """Estimate the number of voxels on the surface of a typical asset, for a grid of `cells`^3 cells.

    For 64 cells along each axis, it is 8,192.
    """
    # The number grows with the area of the surface, hence the square. A tiny grid has fewer cells than that.
    return min(2 * cells**2, cells**3)


def shell(voxel_count: int, grid: int, generator: torch.Generator) -> torch.Tensor:
    """Return the cells that are nearest to the surface of a random ellipsoid: indices [voxel_count, 3] int32.

    Together the cells are a shell that is about one voxel thick.

    Args:
        voxel_count: number of cells to return.
        grid: number of cells of the grid along each axis.
        generator: random generator of the ellipsoid's axes.
    """
    # Radius of a sphere with one voxel per unit of area: voxels = 4 pi r^2. The sphere has to fit into the
    # grid.
    radius = min((voxel_count / (4 * math.pi)) ** 0.5, 0.45 * grid)
    # Three different axes of 0.85 to 1.15 times the radius.
    radii = radius * (0.85 + 0.3 * torch.rand(3, generator=generator))
    cells = torch.cartesian_prod(*[torch.arange(grid)] * 3)  # [grid^3, 3]
    # Division by the radii maps the ellipsoid to the unit sphere. Distance of the cells' centres from it,
    # [grid^3].
    distance = (((cells + 0.5 - grid / 2) / radii).norm(dim=1) - 1).abs()
    # sort() restores the order of the grid among the nearest cells.
    return cells[distance.argsort()[:voxel_count].sort().values].int()


def given_of(stage: FlowStage, sample_count: int, voxel_count: int | None = None) -> list[Voxels]:
    """Make plausible outputs of the previous stage for N samples: thin shells of voxels, like surfaces.

    Args:
        stage: stage that reads these outputs.
        sample_count: number of samples.
        voxel_count: number of voxels of each sample; None for `voxels_of`.
    Returns: an output for each sample; None for each sample if the stage's latents are not voxels.
    """
    latent_kind = stage.latents
    generator = torch.Generator().manual_seed(0)
    if not isinstance(latent_kind, SparseVoxels):
        return [None] * sample_count
    shells = [
        shell(voxel_count or voxels_of(latent_kind.resolution), latent_kind.resolution, generator)
        for _ in range(sample_count)
    ]
    if not latent_kind.given:
        return [*shells]
    return [SparseSample(coords, torch.zeros(len(coords), latent_kind.given)) for coords in shells]


def latents_of(stage: FlowStage, sample_count: int, voxel_count: int | None = None) -> list[Latent]:
    """Make `sample_count` random latents of a stage. The arguments are those of `given_of`."""
    return separate(stage.noise(range(sample_count), given_of(stage, sample_count, voxel_count)))


def pairs_of(stage: FlowStage, pair_count: int, voxel_count: int | None = None) -> list[PreferencePair]:
    """Make preference pairs of random latents of a stage.

    Args:
        stage: stage of the latents.
        pair_count: number of pairs.
        voxel_count: number of voxels of each latent; None for `voxels_of`.
    """
    latents = latents_of(stage, 2 * pair_count, voxel_count)
    return [
        PreferencePair(
            id=f"{i}", condition="", stage=stage.name, preferred=latents[2 * i], rejected=latents[2 * i + 1]
        )
        for i in range(pair_count)
    ]


def update(
    sized_stage: SizedStage,
    batch: int,
    recompute: bool,
    *,
    lora: LoraConfig | None = LoraConfig(),  # noqa: B008
    device: str = "cpu",
    voxel_count: int | None = None,
) -> Cost:
    """Estimate the memory and the operations of one update of a stage, by DPO on pairs in one pass.

    Args:
        sized_stage: stage with the shape of its conditioning.
        batch: number of pairs.
        recompute: True to compute blocks again in the backward pass.
        lora: settings of the LoRA adapters; None to tune all weights.
        device: type of the device, "cpu" or "cuda".
        voxel_count: number of voxels of each sample; None for `voxels_of`.
    """
    # Without warmup, so that the single update is not skipped or smaller.
    config = TrainConfig(batch=batch, warmup=0, lora=lora).for_stage(sized_stage.stage, 0)
    pairs = pairs_of(sized_stage.stage, batch, voxel_count)

    def start(stage: FlowStage, policy: torch.nn.Module, reference: Any) -> Updates:
        conditioned_stage = ConditionedStage(stage, ZeroConditioning(sized_stage))
        return Updates(conditioned_stage, pairs, config, policy, reference, SINGLE)

    return cost_of_update(sized_stage.stage, config, start, recompute, device)


def sampling_cost(sized_stage: SizedStage, batch: int, voxel_count: int | None = None) -> Cost:
    """Estimate the memory and the operations of sampling `batch` latents of a stage together.

    Args:
        sized_stage: stage with the shape of its conditioning, and with the settings of its sampler.
        batch: number of latents.
        voxel_count: number of voxels of each sample; None for `voxels_of`.
    """
    sampling = sized_stage.stage.sampling
    trace = MemoryTrace()
    with implementation("ref"):
        stage = fake_stage(trace, sized_stage.stage)
        stage_voxels = given_of(stage, batch, voxel_count)
        with trace:
            cond = ZeroConditioning(sized_stage).null_conditioning(batch, stage.name)
            trace.mark()
            # All steps are alike, so only one step with guidance is traced. Its operations are multiplied
            # below.
            sample(
                stage,
                stage.noise([0] * batch, stage_voxels),
                cond,
                cond,
                replace(sampling, steps=1, cfg_interval=(0.0, 1.0)),
            )
    # A step with guidance calls the network twice, with and without the conditioning. [:-1]: no step begins
    # at the last time.
    pass_count = sum(2 if sampling.cfg_strength and guides(sampling, t) else 1 for t in times(sampling)[:-1])
    traced_pass_count = 2 if sampling.cfg_strength else 1
    return Cost(trace.peak, trace.flops * pass_count // traced_pass_count)


@functools.cache
def speed(device: str, precision: str, width: int = 1024, tokens: int = 1024) -> float:
    """Measure the speed of a transformer block, in multiplications and additions per second.

    Args:
        device: device to measure, such as "cpu" or "cuda".
        precision: data type of the passes, "float32" or "bfloat16".
        width: number of channels of the block.
        tokens: number of tokens of its input.
    """
    block = ModulatedBlock(width, width, width // 64).to(device)
    input_shapes = ([tokens, width], [width], [256, width])  # input, embedding of the time, conditioning
    block_input, time_embedding, cond = (torch.randn(1, *shape, device=device) for shape in input_shapes)

    def step() -> None:
        """Compute a forward and a backward pass of the block, and wait until both are finished."""
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            block_output = block(block_input, time_embedding, cond, DenseLayout())
        block_output.float().sum().backward()
        # CUDA computes asynchronously, so the time would otherwise be taken before the work is finished.
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    # The fastest of three calls is used, because the first call includes initialisation.
    durations = []
    for _ in range(3):
        start_time = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start_time)
    with MemoryTrace() as trace, implementation("ref"):
        # The same passes on fake tensors, which counts their operations.
        block = ModulatedBlock(width, width, width // 64)
        block(*(torch.zeros(1, *shape) for shape in input_shapes), DenseLayout()).sum().backward()
    return trace.flops / min(durations)


def trace_costs(
    stages: Sequence[SizedStage],
    *,
    precision: str = "float32",
    updates: Sequence[str] = ("lora",),
    several: bool = False,
    device: str = "cpu",
    voxel_count: int | None = None,
    name: str = "estimate",
) -> list[StageCost]:
    """Trace sampling, and an update with and without recomputation, for every stage.

    A stage of published size takes seconds to a minute; `published_memory` has those of the published
    generators.

    Args:
        stages: stages with the shapes of their conditioning.
        precision: data type of forward and backward passes.
        updates: kinds of updates to trace: "lora", "full" or both.
        several: True to trace a second asset or pair, too, see `StageCost.more_bytes`.
        device: type of the device, "cpu" or "cuda".
        voxel_count: number of voxels of each sample; None for `voxels_of`.
        name: title of the progress bar.
    """
    # (kind of cost, whether blocks are recomputed)
    variants = [("sample", False), *((kind, recompute) for kind in updates for recompute in (False, True))]
    jobs = tqdm(list(itertools.product(stages, variants)), desc=name, unit="estimate", leave=False)
    costs = []
    for sized_stage, (kind, recompute) in jobs:
        traced_stage = replace(sized_stage, stage=replace(sized_stage.stage, precision=precision))

        # The default values are the loop's variables of this iteration.
        def cost(
            batch: int, kind: str = kind, recompute: bool = recompute, traced_stage: SizedStage = traced_stage
        ) -> Cost:
            if kind == "sample":
                return sampling_cost(traced_stage, batch, voxel_count)
            lora = LoraConfig() if kind == "lora" else None
            return update(traced_stage, batch, recompute, lora=lora, device=device, voxel_count=voxel_count)

        cost_of_one = cost(1)
        costs.append(
            StageCost(
                stage=sized_stage.stage.name,
                what=kind,
                precision=precision,
                recompute=recompute,
                weights=weight_count(sized_stage),
                bytes=cost_of_one.bytes,
                flops=cost_of_one.flops,
                more_bytes=cost(2).bytes - cost_of_one.bytes if several else None,
            )
        )
    return costs


def weight_count(sized_stage: SizedStage) -> int:
    """Return the number of weights of a stage's network."""
    return sum(p.numel() for p in sized_stage.stage.model.parameters())


# Bytes of a weight of each data type.
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bytes of a weight in full tuning that FSDP2 divides over processes: the weight, its gradient and AdamW's two
# moments, all float32. The frozen reference is on every process.
SHARDED_BYTES = 16


def rows_of(
    costs: Sequence[StageCost],
    *,
    dtype: str = "float32",
    gpus: int = 1,
    batches: Iterable[int] = (1,),
    operations_per_second: float | None = None,
) -> list[Row]:
    """Compute the memory and the time of one process from traced costs.

    The memory of larger batches is extrapolated linearly.

    Args:
        costs: costs of all stages of a generator.
        dtype: data type of the weights.
        gpus: number of processes of torchrun. They divide the training state of full tuning among them.
            Adapters and samples take the same memory on every process.
        batches: numbers of assets that are sampled together, or of pairs in one pass of a process.
        operations_per_second: speed of the device; None: no times are estimated.
    """
    weights_by_stage = {cost.stage: cost.weights for cost in costs}
    rows = []
    for cost in costs:
        # All stages are sampled one after the other, so their weights are in memory together.
        other_weights = sum(weights_by_stage.values()) - cost.weights if cost.what == "sample" else 0
        fixed_bytes = BYTES[dtype] * other_weights
        # Full tuning has float32 weights in any case. Otherwise a smaller data type saves memory.
        fixed_bytes -= 0 if cost.what == "full" else (4 - BYTES[dtype]) * cost.weights
        if cost.what == "full":
            fixed_bytes -= int(SHARDED_BYTES * (1 - 1 / gpus) * cost.weights)
        for batch in batches:
            assert batch == 1 or cost.more_bytes is not None
            flops = cost.flops * batch
            rows.append(
                Row(
                    stage=cost.stage,
                    what=cost.what,
                    batch=batch,
                    precision=cost.precision,
                    dtype="float32" if cost.what == "full" else dtype,
                    recompute=cost.recompute,
                    bytes=cost.bytes + fixed_bytes + (batch - 1) * (cost.more_bytes or 0),
                    flops=flops,
                    seconds=None if operations_per_second is None else flops / operations_per_second,
                )
            )
    return rows


def estimate(
    stages: Sequence[SizedStage],
    *,
    precision: str = "float32",
    dtype: str = "float32",
    tune: str = "lora",
    gpus: int = 1,
    batches: Iterable[int] = (1,),
    device: str | None = None,
    device_type: str | None = None,
    voxel_count: int | None = None,
    name: str = "estimate",
) -> list[Row]:
    """Estimate sampling, and an update with and without recomputation, for every stage and batch size.

    Args:
        stages: stages with the shapes of their conditioning.
        precision: data type of forward and backward passes.
        dtype: data type of the weights.
        tune: "lora" for adapters, "full" for all weights.
        gpus: number of processes; see `rows_of`.
        batches: batch sizes, in samples that are generated together or in pairs of an update.
        device: device on which the speed is measured; None: no times are estimated.
        device_type: type of the device whose memory is estimated; None: that of `device`, or "cpu".
        voxel_count: number of voxels of each sample; None for `voxels_of`.
        name: title of the progress bar.
    Returns: a row for each stage, each of sampling and the two kinds of updates, and each batch size.
    """
    batch_sizes = list(batches)
    costs = trace_costs(
        stages,
        # Networks with weights in half precision compute in bfloat16.
        precision="bfloat16" if dtype != "float32" else precision,
        updates=(tune,),
        several=max(batch_sizes) > 1,
        device=device_type or torch.device(device or "cpu").type,
        voxel_count=voxel_count,
        name=name,
    )
    return rows_of(
        costs,
        dtype=dtype,
        gpus=gpus,
        batches=batch_sizes,
        operations_per_second=None if device is None else speed(device, precision),
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table. The column of times is left out if no time was measured."""
    header = ["stage", "what", "batch", "passes", "weights", "recompute", "GiB", "TFLOP", "time"]
    cells = [
        [
            r.stage,
            r.what,
            str(r.batch),
            r.precision,
            r.dtype,
            "yes" if r.recompute else "no",
            f"{r.bytes / GIB:.1f}",
            f"{r.flops / 1e12:.3g}",
            (
                ""
                if r.seconds is None
                else tqdm.format_interval(r.seconds)
                if r.seconds >= 60
                else f"{r.seconds:.3g} s"
            ),
        ]
        for r in rows
    ]
    # -1 cuts the last column, the time.
    column_count = len(header) if any(row[-1] for row in cells) else -1
    return aligned([line[:column_count] for line in (header, *cells)])


def check_fits(rows: Sequence[Row], available_bytes: int, caller: str) -> None:
    """Raise ValueError if a device has too little memory to sample or to tune a stage.

    Args:
        rows: estimates for all stages.
        available_bytes: free memory of the device in bytes.
        caller: name of the command, with which the message begins.
    """
    for stage in dict.fromkeys(row.stage for row in rows):
        for cost_kind in dict.fromkeys(row.what for row in rows):
            # If the variant with the smallest memory does not fit, no variant does.
            variants = [row for row in rows if (row.stage, row.what) == (stage, cost_kind)]
            smallest_row = min(variants, key=lambda row: row.bytes)
            # Only the share SHARE of the free memory is used.
            if smallest_row.bytes > SHARE * available_bytes:
                remedy = "Use a device with more memory"
                if smallest_row.precision == "float32":
                    remedy += ", or the precision bfloat16 (--set precision=bfloat16)"
                recompute_remark = ", with recomputed blocks" if smallest_row.recompute else ""
                raise ValueError(
                    f"{caller}: stage {stage!r} needs {smallest_row.bytes / SHARE / GIB:.1f} GiB of free"
                    f" memory ({cost_kind}, batch {smallest_row.batch}{recompute_remark}), but the device has"
                    f" {available_bytes / GIB:.1f} GiB. {remedy}."
                )
