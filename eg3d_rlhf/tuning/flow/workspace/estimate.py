"""Estimate memory and time of sampling and of training a generator of any family, from its settings alone.

Memory is what tensors hold (core/memory.py). Decoders, which decode one asset at a time after the flows, and
libraries come on top. Time is the number of multiplications and additions at the speed that the device shows
on a block of a transformer.
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
    """What one thing takes."""

    stage: str
    what: str  # draw, or of an update lora or full
    batch: int  # assets at once, or pairs of a pass
    precision: str  # of passes
    dtype: str  # of the flows' weights
    recompute: bool  # blocks again in the backward pass
    bytes: int  # most memory, with the weights of all stages
    flops: int  # of all assets, or of the update
    seconds: float | None = None  # at the device's speed; None: not measured


class ZeroConditioning:
    """Conditioning of a stage's shape, all zeros."""

    def __init__(self, sized: SizedStage):
        self.conditioning = sized.conditioning

    def conditions(self, names: Sequence[str], stage: str) -> Any:
        return self.no_condition(len(names), stage)

    def no_condition(self, n: int, stage: str) -> Any:
        if isinstance(self.conditioning, dict):
            return {name: torch.zeros(n, *shape) for name, shape in self.conditioning.items()}
        return torch.zeros(n, *self.conditioning)


def voxels_of(cells: int) -> int:
    """How many voxels of a grid a surface fills about: 8,192 of 64 cells along an axis."""
    return min(2 * cells**2, cells**3)


def shell(voxels: int, grid: int, generator: torch.Generator) -> torch.Tensor:
    """The [voxels, 3] int32 cells of a grid that are nearest to the surface of an ellipsoid drawn in it, one
    voxel thick if it fits.
    """
    # of a sphere with about one voxel per unit of area
    radius = min((voxels / (4 * math.pi)) ** 0.5, 0.45 * grid)
    radii = radius * (0.85 + 0.3 * torch.rand(3, generator=generator))
    cells = torch.cartesian_prod(*[torch.arange(grid)] * 3)
    distance = (((cells + 0.5 - grid / 2) / radii).norm(dim=1) - 1).abs()
    return cells[distance.argsort()[:voxels].sort().values].int()


def given_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[Voxels]:
    """What stages before could leave to samples: thin shells of voxels, as surfaces are.

    Args: voxels: of each; None: `voxels_of`.
    """
    kind = stage.latents
    draw = torch.Generator().manual_seed(0)
    if not isinstance(kind, SparseVoxels):
        return [None] * count
    places = [shell(voxels or voxels_of(kind.resolution), kind.resolution, draw) for _ in range(count)]
    return [SparseSample(p, torch.zeros(len(p), kind.given)) if kind.given else p for p in places]


def latents_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[Latent]:
    """Random latents of a stage."""
    return separate(stage.noise(range(count), given_of(stage, count, voxels)))


def pairs_of(stage: FlowStage, count: int, voxels: int | None = None) -> list[PreferencePair]:
    """Random pairs of a stage."""
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
    """Of one update of a stage by itself, by DPO on `batch` pairs in one pass."""
    config = TrainConfig(batch=batch, warmup=0, lora=lora).at(sized.stage, 0)
    pairs = pairs_of(sized.stage, batch, voxels)

    def start(stage: FlowStage, policy: torch.nn.Module, reference: Any) -> Updates:
        conditioned = ConditionedStage(stage, ZeroConditioning(sized))
        return Updates(conditioned, pairs, config, policy, reference, SINGLE)

    return cost_of_update(sized.stage, config, start, recompute, device)


def drawing(sized: SizedStage, batch: int, voxels: int | None = None) -> Cost:
    """Of drawing a stage's latents, all steps of its sampler, `batch` at once."""
    sampling = sized.stage.sampling
    trace = MemoryTrace()
    with implementation("ref"):
        stage = fake_stage(trace, sized.stage)
        given = given_of(stage, batch, voxels)
        with trace:
            cond = ZeroConditioning(sized).no_condition(batch, stage.name)
            trace.mark()
            sample(
                stage,
                stage.noise([0] * batch, given),
                cond,
                cond,
                replace(sampling, steps=1, cfg_interval=(0.0, 1.0)),
            )
    passes = sum(2 if sampling.cfg_strength and guides(sampling, t) else 1 for t in times(sampling)[:-1])
    return Cost(trace.peak, trace.flops * passes // (2 if sampling.cfg_strength else 1))


@functools.cache
def speed(device: str, precision: str, width: int = 1024, tokens: int = 1024) -> float:
    """Multiplications and additions per second of a transformer's block, forward and backward."""
    block = ModulatedBlock(width, width, width // 64).to(device)
    x, time_of, cond = (
        torch.randn(1, *shape, device=device) for shape in ([tokens, width], [width], [256, width])
    )

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            y = block(x, time_of, cond, DenseLayout())
        y.float().sum().backward()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

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
    """Rows of drawing and of an update with and without recomputation, for every stage and batch.

    Memory of larger batches is taken to lie on the line through those of one and two. A stage takes some
    seconds at published sizes.
    Args: lora: None: full tuning; device: whose speed is measured; None: no times. dtype: of the weights of
        all stages. name: of the bar.
    """
    kinds = {"float32": 4, "float16": 2, "bfloat16": 2}
    rows = list[Row]()
    sizes = [sum(p.numel() for p in sized.stage.model.parameters()) for sized in stages]
    numbers = list(batches)
    rate = None if device is None else speed(device, precision)
    saved = 4 - kinds[dtype]
    asked = [("sample", False), ("lora" if lora else "full", False), ("lora" if lora else "full", True)]
    jobs = tqdm(
        list(itertools.product(enumerate(stages), asked)),
        desc=name,
        unit="estimate",
        leave=False,
        disable=None,
    )
    for (place, sized), (what, recompute) in jobs:
        others = kinds[dtype] * (sum(sizes) - sizes[place])
        twin = replace(
            sized, stage=replace(sized.stage, precision="bfloat16" if dtype != "float32" else precision)
        )

        def cost(batch: int, what: str = what, recompute: bool = recompute, twin: SizedStage = twin) -> Cost:
            if what == "sample":
                return drawing(twin, batch, voxels)
            return update(
                twin, batch, recompute, lora=lora, device=torch.device(device or "cpu").type, voxels=voxels
            )

        one = cost(1)
        two = cost(2) if max(numbers) > 1 else one
        for batch in numbers:
            held = one.bytes + (batch - 1) * (two.bytes - one.bytes) + others
            held -= saved * sizes[place] if what != "full" else 0  # full tuning holds float32 besides
            rows.append(
                Row(
                    stage=sized.stage.name,
                    what=what,
                    batch=batch,
                    precision=precision,
                    dtype=dtype,
                    recompute=recompute,
                    bytes=held,
                    flops=one.flops * batch,
                    seconds=None if rate is None else one.flops * batch / rate,
                )
            )
    return rows


def table(rows: Sequence[Row]) -> str:
    """As lines of text; without a column of times where none was measured."""
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
    """Raise ValueError where a stage fits in no way, with the figure and what would.

    Args: space: free bytes of the device.
    """
    for stage in dict.fromkeys(row.stage for row in rows):
        for what in dict.fromkeys(row.what for row in rows):
            least = min(
                (row for row in rows if (row.stage, row.what) == (stage, what)), key=lambda row: row.bytes
            )
            if least.bytes > SHARE * space:
                smaller = (
                    "" if least.dtype != "float32" else ", or hold weights in bfloat16 (--set dtype=bfloat16)"
                )
                raise ValueError(
                    f"{who}: expected {least.bytes / SHARE / GIB:.1f} GiB free for stage {stage!r} ({what},"
                    f" {least.batch} at once{', blocks computed again' if least.recompute else ''}), got"
                    f" {space / GIB:.1f}. Take a larger device{smaller}."
                )
