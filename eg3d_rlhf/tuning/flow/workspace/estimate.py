"""Estimate memory and time of sampling and of training a generator of any family, from its settings alone.

Memory is the memory of tensors (core/memory.py). Libraries, and decoders, which decode one asset at a time
after the flows, need additional memory. Time is the number of multiplications and additions, divided by the
speed that is measured on the device for a transformer block.
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
class Row:
    """Memory and time of sampling a stage, or of one update of it."""

    stage: str
    what: str  # "sample", or the kind of update: "lora" or "full"
    batch: int  # assets sampled at once, or pairs per pass
    precision: str  # of forward and backward passes
    dtype: str  # of the flows' weights
    recompute: bool  # blocks are computed again in the backward pass, which saves memory
    bytes: int  # peak memory, with the weights of all stages
    flops: int  # multiplications and additions for all assets, or for the update
    seconds: float | None = None  # at the device's speed; None: not measured


class ZeroConditioning:
    """Conditioning in the shape that a stage expects, all zeros."""

    def __init__(self, sized: SizedStage):
        self.conditioning = sized.conditioning

    def conditions(self, names: Sequence[str], stage: str) -> Any:
        return self.no_condition(len(names), stage)

    def no_condition(self, n: int, stage: str) -> Any:
        if isinstance(self.conditioning, dict):
            return {name: torch.zeros(n, *shape) for name, shape in self.conditioning.items()}
        return torch.zeros(n, *self.conditioning)


def voxels_of(cells: int) -> int:
    """Estimate how many voxels a surface fills in a grid: 8,192 for 64 cells along each axis."""
    # an area, hence the square; a tiny grid has fewer cells than that
    return min(2 * cells**2, cells**3)


def shell(voxels: int, grid: int, generator: torch.Generator) -> torch.Tensor:
    """Select the cells of a grid that are nearest to the surface of a random ellipsoid: [voxels, 3] int32.

    The shell is about one voxel thick, if it fits into the grid.
    """
    # radius of a sphere with about one voxel per unit of area: voxels = 4 pi r^2
    radius = min((voxels / (4 * math.pi)) ** 0.5, 0.45 * grid)
    # three different axes of 0.85 to 1.15 times the radius
    radii = radius * (0.85 + 0.3 * torch.rand(3, generator=generator))
    cells = torch.cartesian_prod(*[torch.arange(grid)] * 3)
    # distance of the cells' centres from the unit sphere, after division by the radii: [grid^3]
    distance = (((cells + 0.5 - grid / 2) / radii).norm(dim=1) - 1).abs()
    # the nearest cells, in the order of the grid
    return cells[distance.argsort()[:voxels].sort().values].int()


def given_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[Voxels]:
    """Make plausible outputs of the previous stage, one per sample: thin shells of voxels, like surfaces.

    Args: voxels: number for each sample; None: `voxels_of`.
    """
    kind = stage.latents
    generator = torch.Generator().manual_seed(0)
    if not isinstance(kind, SparseVoxels):
        return [None] * count
    places = [shell(voxels or voxels_of(kind.resolution), kind.resolution, generator) for _ in range(count)]
    return [SparseSample(p, torch.zeros(len(p), kind.given)) if kind.given else p for p in places]


def latents_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[Latent]:
    """Make random latents of a stage."""
    return separate(stage.noise(range(count), given_of(stage, count, voxels)))


def pairs_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[PreferencePair]:
    """Make random preference pairs of a stage's latents."""
    latents = latents_of(stage, 2 * count, voxels)
    return [
        PreferencePair(
            id=f"{i}", condition="", stage=stage.name, preferred=latents[2 * i], rejected=latents[2 * i + 1]
        )
        for i in range(count)
    ]


def update(
    sized: SizedStage,
    batch: int,
    recompute: bool,
    *,
    lora: LoraConfig | None = LoraConfig(),  # noqa: B008
    device: str = "cpu",
    voxels: int | None = None,
) -> Cost:
    """Estimate the cost of one update of a stage alone, by DPO on `batch` pairs in one pass."""
    # no warmup, so that the one update is a full one
    config = TrainConfig(batch=batch, warmup=0, lora=lora).at(sized.stage, 0)
    pairs = pairs_of(sized.stage, batch, voxels)

    def start(stage: FlowStage, policy: torch.nn.Module, reference: Any) -> Updates:
        conditioned = ConditionedStage(stage, ZeroConditioning(sized))
        return Updates(conditioned, pairs, config, policy, reference, SINGLE)

    return cost_of_update(sized.stage, config, start, recompute, device)


def sampling_cost(sized: SizedStage, batch: int, voxels: int | None = None) -> Cost:
    """Estimate the cost of sampling `batch` latents of a stage at once, with all steps of its sampler."""
    sampling = sized.stage.sampling
    trace = MemoryTrace()
    with implementation("ref"):
        stage = fake_stage(trace, sized.stage)
        given = given_of(stage, batch, voxels)
        with trace:
            cond = ZeroConditioning(sized).no_condition(batch, stage.name)
            trace.mark()
            # one guided step is traced, and its cost is multiplied below, since all steps are alike
            sample(
                stage,
                stage.noise([0] * batch, given),
                cond,
                cond,
                replace(sampling, steps=1, cfg_interval=(0.0, 1.0)),
            )
    # a guided step evaluates the network twice: with the conditioning and without
    passes = sum(2 if sampling.cfg_strength and guides(sampling, t) else 1 for t in times(sampling)[:-1])
    return Cost(trace.peak, trace.flops * passes // (2 if sampling.cfg_strength else 1))


@functools.cache
def speed(device: str, precision: str, width: int = 1024, tokens: int = 1024) -> float:
    """Measure the multiplications and additions per second of a transformer block, forward and backward."""
    block = ModulatedBlock(width, width, width // 64).to(device)
    x, time_of, cond = (
        torch.randn(1, *shape, device=device) for shape in ([tokens, width], [width], [256, width])
    )

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            y = block(x, time_of, cond, DenseLayout())
        y.float().sum().backward()
        # CUDA runs asynchronously: without this the clock would stop before the work ends
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    # the fastest of three calls: the first one includes warm-up
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    with MemoryTrace() as trace, implementation("ref"):
        block = ModulatedBlock(width, width, width // 64)
        block(
            *(torch.zeros(1, *shape) for shape in ([tokens, width], [width], [256, width])), DenseLayout()
        ).sum().backward()
    return trace.flops / min(seconds)


def estimate(
    stages: Sequence[SizedStage],
    *,
    precision: str = "float32",
    dtype: str = "float32",
    lora: LoraConfig | None = LoraConfig(),  # noqa: B008
    batches: Iterable[int] = (1,),
    device: str | None = None,
    voxels: int | None = None,
    name: str = "estimate",
) -> list[Row]:
    """Estimate sampling, and an update with and without recomputation, for every stage and batch size.

    The memory of larger batches is extrapolated linearly from batches of one and two. A stage takes a few
    seconds at published sizes.
    Args: lora: None: full tuning; device: on which the speed is measured, None: no times; dtype: of the
        weights of all stages; name: of the progress bar.
    """
    kinds = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes per number
    rows = list[Row]()
    sizes = [sum(p.numel() for p in sized.stage.model.parameters()) for sized in stages]
    numbers = list(batches)
    rate = None if device is None else speed(device, precision)
    saved = 4 - kinds[dtype]  # bytes per weight, against the float32 weights that are traced
    asked = [("sample", False), ("lora" if lora else "full", False), ("lora" if lora else "full", True)]
    jobs = tqdm(
        list(itertools.product(enumerate(stages), asked)),
        desc=name,
        unit="estimate",
        leave=False,
        disable=None,
    )
    for (place, sized), (what, recompute) in jobs:
        # the weights of the other stages stay in memory while one is sampled or tuned
        others = kinds[dtype] * (sum(sizes) - sizes[place])
        twin = replace(
            sized, stage=replace(sized.stage, precision="bfloat16" if dtype != "float32" else precision)
        )

        def cost(batch: int, what: str = what, recompute: bool = recompute, twin: SizedStage = twin) -> Cost:
            if what == "sample":
                return sampling_cost(twin, batch, voxels)
            return update(
                twin, batch, recompute, lora=lora, device=torch.device(device or "cpu").type, voxels=voxels
            )

        cost_of_one = cost(1)
        cost_of_two = cost(2) if max(numbers) > 1 else cost_of_one
        for batch in numbers:
            held = cost_of_one.bytes + (batch - 1) * (cost_of_two.bytes - cost_of_one.bytes) + others
            held -= saved * sizes[place] if what != "full" else 0  # full tuning keeps float32 weights
            rows.append(
                Row(
                    stage=sized.stage.name,
                    what=what,
                    batch=batch,
                    precision=precision,
                    dtype=dtype,
                    recompute=recompute,
                    bytes=held,
                    flops=cost_of_one.flops * batch,
                    seconds=None if rate is None else cost_of_one.flops * batch / rate,
                )
            )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Format rows as lines of text, without the column of times if none was measured."""
    head = ["stage", "what", "batch", "passes", "weights", "recompute", "GiB", "TFLOP", "time"]
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
    shown = len(head) if any(row[-1] for row in cells) else -1
    return aligned([line[:shown] for line in (head, *cells)])


def check_fits(rows: Sequence[Row], space: int, who: str) -> None:
    """Raise ValueError, with the memory needed and a remedy, where no variant of a stage fits.

    Args: space: free bytes of the device.
    """
    for stage in dict.fromkeys(row.stage for row in rows):
        for what in dict.fromkeys(row.what for row in rows):
            # the variant with the smallest memory: if it does not fit, none does
            least = min(
                (row for row in rows if (row.stage, row.what) == (stage, what)), key=lambda row: row.bytes
            )
            if least.bytes > SHARE * space:
                smaller = (
                    "" if least.dtype != "float32" else ", or hold weights in bfloat16 (--set dtype=bfloat16)"
                )
                raise ValueError(
                    f"{who}: expected {least.bytes / SHARE / GIB:.1f} GiB free for stage {stage!r} ({what},"
                    f" batch {least.batch}{', with recomputed blocks' if least.recompute else ''}), got"
                    f" {space / GIB:.1f} GiB. Use a device with more memory{smaller}."
                )
