"""Interface of a multi-stage flow generator. Decoding between stages is not differentiable.

A flow's path is straight, in the one convention of this package: x_0 is data, t = 1 is noise (TRELLIS, Flux,
SD3).

    x_t = (1 - t) x_0 + (s + (1 - s) t) eps        v = (1 - s) eps - x_0,   s = sigma_min

Papers that put data at t = 1 (Circular-DPO, equations 1-4; Lipman et al. 2023) map by t' = 1 - t, v' = -v;
the squared errors are the same. `opposite` converts; a stage whose model uses the other convention sets
`data_at_one`.

Shape letters as in sparse.py; T tokens of a conditioning input, E their size.
"""

import contextlib
import contextvars
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.sparse import (
    Batch,
    Latent,
    NamedBatch,
    NamedSample,
    SparseSample,
    collate,
    coords_of,
    count,
    feats_of,
    mean_per_sample,
    separate,
    single,
    spread,
    with_feats,
)
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, tensor_of
from training.phases import derive_seed
from training.storage import checksum


class EmptyStructure(ValueError):
    """A decoded structure without a voxel."""


# a context variable: one thread can reject empty structures while another does not
_EMPTY_REJECTED = contextvars.ContextVar("empty_rejected", default=False)


@contextlib.contextmanager
def refusing_empty() -> Iterator[None]:
    """Make an empty structure an error within the context.

    Elsewhere the likeliest voxel is used in place of an empty structure, so that tuning continues.
    """
    token = _EMPTY_REJECTED.set(True)
    try:
        yield
    finally:
        _EMPTY_REJECTED.reset(token)


def refuse_empty(who: str, remedy: str) -> None:
    """Raise EmptyStructure within `refusing_empty`, and do nothing elsewhere."""
    if _EMPTY_REJECTED.get():
        raise EmptyStructure(f"{who}: expected a structure with voxels, got an empty one. {remedy}")


# Kinds of latents: how noise is drawn for a stage, and which latents belong to it.

# output of the previous stage for one sample: voxel indices [v, 3] int32; or a sample with voxels and
# features, which the flow reads as `given`; None at the first stage
Voxels = torch.Tensor | SparseSample | None


class LatentKind(Protocol):
    """Interface of a kind of latents. Messages begin with `who` and end with `remedy`."""

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise on the CPU, one sample per seed.

        The noise of a seed does not depend on its place in the batch or on the other seeds.
        """

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """Raise ValueError for a latent of another kind or shape."""


def _normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Sample standard normal numbers on the CPU, so that every device gets the same noise."""
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(seed))


def _form(latent: object) -> str:
    """Name the kind of a latent for a message."""
    if isinstance(latent, SparseSample):
        return "voxels"
    return (
        "tensors by name"
        if isinstance(latent, NamedSample)
        else "a dense grid"
        if getattr(latent, "ndim", 0) == 4
        else "one tensor"
    )


def _check_form(who: str, latent: Latent, form: str, kind: type, remedy: str) -> None:
    """Raise ValueError for a latent of another type."""
    if not isinstance(latent, kind):
        raise ValueError(f"{who}: expected {form}, got {_form(latent)}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class _OneTensor(ABC):
    """Latents that are one tensor of a fixed shape; FORM names them in messages."""

    FORM: ClassVar[str]
    channels: int

    @property
    @abstractmethod
    def shape(self) -> list[int]:
        """Return the shape of one sample, without the batch axis."""

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        return collate([_normal(self.shape, seed) for seed, _ in zip(seeds, given, strict=True)])

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_form(who, latent, self.FORM, torch.Tensor, remedy)
        assert isinstance(latent, torch.Tensor)
        check_shape(who, latent, self.shape, remedy)


@dataclass(frozen=True, kw_only=True)
class DenseGrid(_OneTensor):
    """A volume [C, R, R, R]."""

    FORM: ClassVar[str] = "a dense grid"
    resolution: int

    @property
    def shape(self) -> list[int]:
        return [self.channels, *[self.resolution] * 3]


@dataclass(frozen=True, kw_only=True)
class TokenSet(_OneTensor):
    """A set of tokens [T, C], which lie on no grid."""

    FORM: ClassVar[str] = "a set of tokens"
    tokens: int

    @property
    def shape(self) -> list[int]:
        return [self.tokens, self.channels]


@dataclass(frozen=True, kw_only=True)
class SparseVoxels:
    """Features [v, C] on the voxels that the previous stage selects.

    The noise of a seed is one dense volume [C, R, R, R], which is read at the voxels. Samples of one seed
    thus have the same noise wherever they share voxels.
    """

    channels: int
    resolution: int
    given: int = 0  # G, features per voxel that come with the voxels

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample noise at the voxels; features that come with the voxels become the batch's `given`."""
        # one volume per distinct seed, which all samples of that seed read
        volumes = {seed: _normal([self.channels, *[self.resolution] * 3], seed) for seed in set(seeds)}
        samples: list[Latent] = []
        for seed, left in zip(seeds, given, strict=True):
            places, more, cells = (
                (left.coords, left.feats.cpu(), left.cells)
                if isinstance(left, SparseSample)
                else (left, None, None)
            )
            places = self._checked(who, places)
            x, y, z = places.cpu().long().unbind(1)  # [v] each
            more = more if self.given else None
            # volume [C, R, R, R] at [v] places -> [C, v] -> [v, C]
            samples.append(
                SparseSample(places.cpu().int(), volumes[seed][:, x, y, z].T.contiguous(), more, cells)
            )
        return collate(samples)

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_form(who, latent, "voxels", SparseSample, remedy)
        assert isinstance(latent, SparseSample)
        check_shape(f"{who}, features", latent.feats, ["v", self.channels], remedy)
        size = 0 if latent.given is None else latent.given.shape[1]
        if size != self.given:
            raise ValueError(f"{who}: expected {self.given} given features per voxel, got {size}. {remedy}")
        self._checked(who, latent.coords)

    def _checked(self, who: str, places: torch.Tensor | None) -> torch.Tensor:
        """Return voxel indices [v, 3], after checking that there are any and that all lie in the grid."""
        if places is None or len(places) == 0:
            remedy = "The previous stage produced an empty structure. Drop the sample."
            raise ValueError(f"{who}: expected at least one voxel per sample, got none. {remedy}")
        low = int(places.min())
        high = int(places.max())
        if low < 0 or high >= self.resolution:
            raise ValueError(
                f"{who}: expected voxel indices from 0 to {self.resolution - 1}, got {low} to {high}. Check"
                " the grid."
            )
        return places


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Latents of several tensors by name, each with its own shape.

    Every tensor has the same weight in the error, however many numbers it has.
    """

    shapes: Mapping[str, Sequence[int]]  # by name, of a sample

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample noise for each tensor, from the sample's seed and the tensor's name."""
        return collate(
            [
                NamedSample(
                    {
                        name: _normal(shape, derive_seed("part", name, seed))
                        for name, shape in self.shapes.items()
                    }
                )
                for seed, _ in zip(seeds, given, strict=True)
            ]
        )

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_form(who, latent, "tensors by name", NamedSample, remedy)
        assert isinstance(latent, NamedSample)
        # names first: a missing tensor is clearer than a wrong shape
        if set(latent.tensors) != set(self.shapes):
            raise ValueError(
                f"{who}: expected tensors {', '.join(sorted(self.shapes))}, got {', '.join(latent.tensors)}."
                f" {remedy}"
            )
        for name, shape in self.shapes.items():
            check_shape(f"{who}, {name}", latent[name], list(shape), remedy)


# The path.

CONVENTION = "x_0 is data, t = 1 is noise"  # as files of latents state it
SCHEDULES = ("logit-normal", "uniform")


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """Straight path between data and noise, and the distribution of training times."""

    sigma_min: float = 1e-5  # noise left at t = 0
    schedule: str = "logit-normal"  # of the times: sigmoid of a normal, or uniform on 0..1
    mean: float = 1.0  # of that normal
    std: float = 1.0
    # of the errors of several tensors, by name; None: they count alike, 1 in all
    weights: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES or not (math.isfinite(self.mean) and self.std > 0):
            got = f"{self.schedule!r}, {self.mean}, {self.std}"
            raise ValueError(
                f"FlowPath: expected schedule {' or '.join(SCHEDULES)}, a finite mean and std > 0, got {got}."
                " Correct these values."
            )
        if not 0 <= self.sigma_min < 1:
            raise ValueError(
                f"FlowPath.sigma_min: expected 0 <= sigma_min < 1, got {self.sigma_min}. Correct it."
            )

    def sigma(self, t: Any) -> Any:
        """Return the noise in x_t, s + (1 - s) t, of one time or of a tensor of them."""
        return self.sigma_min + (1 - self.sigma_min) * t

    def times(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Sample times to train on, [n], on the generator's device."""
        if self.schedule == "uniform":
            return torch.rand(n, generator=generator, device=generator.device)
        # logit-normal: a positive mean moves the times towards the noise at t = 1
        return torch.sigmoid(
            self.mean + self.std * torch.randn(n, generator=generator, device=generator.device)
        )

    def mix(self, x_0: Batch, t: torch.Tensor, eps: Batch) -> Batch:
        """Compute x_t = (1 - t) x_0 + (s + (1 - s) t) eps at times t [N] in 0..1.

        Raises: ValueError for other times, such as those of a schedule from 0 to 1000.
        """
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(
                f"FlowPath.mix(t): expected times from 0 (data) to 1 (noise), got {t.min():g} to {t.max():g}."
                " Rescale them."
            )
        time = spread(t, x_0)  # [N] repeated for every number of a sample
        return with_feats(x_0, (1 - time) * feats_of(x_0) + self.sigma(time) * feats_of(eps))

    def velocity(self, x_0: Batch, eps: Batch) -> Batch:
        """Return v = (1 - s) eps - x_0, which is the same at all times since the path is straight."""
        return with_feats(x_0, (1 - self.sigma_min) * feats_of(eps) - feats_of(x_0))

    def data(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """Return the x_0 that follows from x_t and v: (1 - s) x_t - (s + (1 - s) t) v."""
        time = spread(t, x_t)
        return with_feats(x_t, (1 - self.sigma_min) * feats_of(x_t) - self.sigma(time) * feats_of(v))

    def velocity_to(self, x_t: Batch, t: torch.Tensor, x_0: Batch) -> Batch:
        """Return the v that leads to x_0 at x_t: inverse of `data`, at times above 0."""
        # sigma(t) is near 0 at the data end, where no velocity can change x_0
        time = spread(t, x_t)
        return with_feats(x_t, ((1 - self.sigma_min) * feats_of(x_t) - feats_of(x_0)) / self.sigma(time))

    def noise(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """Return the eps that follows from x_t and v: x_t + (1 - t) v."""
        return with_feats(x_t, feats_of(x_t) + (1 - spread(t, x_t)) * feats_of(v))

    def errors(self, v: Batch, x_0: Batch, eps: Batch) -> torch.Tensor:
        """Compute the flow-matching error of predicted velocities, mean over everything of a sample -> [N].
        Differentiable in: v.
        """
        return self.apart(v, self.velocity(x_0, eps))

    def apart(self, a: Batch, b: Batch) -> torch.Tensor:
        """Compute the squared distance, mean over everything of a sample -> [N]. Differentiable in: a, b."""
        return self.per_sample((feats_of(a) - feats_of(b)).square(), a)

    def per_sample(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Average over everything of a sample [N] `values` like `feats_of(batch)`, by the weights.
        Differentiable in: values.
        """
        if self.weights is None:
            return mean_per_sample(values, batch)
        assert isinstance(batch, NamedBatch)
        # [N] per tensor: each is averaged over its own numbers first, then weighted
        means = {name: part.flatten(1).mean(1) for name, part in batch.with_feats(values).tensors.items()}
        return torch.stack([weight * means[name] for name, weight in self.weights.items()]).sum(0)


def opposite(t: torch.Tensor, v: Batch) -> tuple[torch.Tensor, Batch]:
    """Convert times and velocities to the convention that has its data at t = 1, or back."""
    return 1 - t, with_feats(v, -feats_of(v))


Asset = Any  # decoded output of the last stage, which rewards score; each pipeline defines its type
Call = Callable[..., Any]  # (module, x_t, t [N] in 0..1, condition) -> v
CallStep = Callable[..., Any]  # (module, x_t, t [N], condition, length of the step [N]) -> v


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the Euler sampler."""

    steps: int = 25
    cfg_strength: float = 5.0  # w of (1 + w) v_cond - w v_null
    cfg_interval: tuple[float, float] = (0.5, 1.0)  # times, both included, at which guidance acts
    rescale_t: float = 3.0  # r of t -> r t / (1 + (r - 1) t): larger spends more steps on noisy times
    # 0..1: 1 rescales a guided x_0 to the standard deviation of the unguided one, 0 leaves it
    cfg_rescale: float = 0.0
    shortcut: bool = False  # the network reads the length of a step, 1 / steps, and needs few steps
    # the ends of the interval are compared as float32 of time_scale (1 - t), as in some original programs;
    # None: compared as they are
    time_scale: float | None = None
    single: bool = False  # times are computed in float32 from 1 - t, as in some original programs

    def __post_init__(self):
        low, high = self.cfg_interval
        # NaN fails each of these comparisons
        fits = self.steps >= 1 and self.rescale_t > 0 and 0 <= low <= high <= 1 and self.cfg_strength >= 0
        if not (
            fits
            and math.isfinite(self.rescale_t)
            and math.isfinite(self.cfg_strength)
            and 0 <= self.cfg_rescale <= 1
        ):
            raise ValueError(
                "Sampling: expected steps >= 1, finite rescale_t > 0 and cfg_strength >= 0, and an interval"
                f" and cfg_rescale within 0..1, got {self}. Correct them."
            )
        if self.time_scale is not None and not 0 < self.time_scale < math.inf:
            raise ValueError(
                f"Sampling.time_scale: expected a finite number above 0, got {self.time_scale}. Correct it."
            )


def as_is(module: torch.nn.Module, x_t: Batch, t: torch.Tensor, cond: Condition) -> Batch:
    """Call a module that takes x_t, times and conditioning in the order in which a stage passes them."""
    return module(x_t, t, cond)


@dataclass(kw_only=True)
class FlowStage:
    """One stage of a generator: a flow over latents of one kind, and how its module is called.

    The module keeps the names of its parameters.
    """

    name: str  # by which users choose the stage
    model: torch.nn.Module
    latents: LatentKind
    call: Call = as_is  # of the module; times and sign as the module has them
    call_step: CallStep | None = None  # for a module that reads the length of a step; None: it does not
    data_at_one: bool = False  # the module has its data at t = 1 and its noise at t = 0
    path: FlowPath = field(default_factory=FlowPath)
    sampling: Sampling = field(default_factory=Sampling)
    # last parts of the names of linear layers that adapters sit on
    lora_targets: tuple[str, ...] = ("to_qkv", "to_q", "to_kv", "to_out")
    precision: str = "float32"  # of forward passes, in training and in sampling: float32 or bfloat16

    def velocity(
        self,
        x_t: Batch,
        t: torch.Tensor,
        cond: Condition,
        model: torch.nn.Module | None = None,
        step: float | None = None,
    ) -> Batch:
        """Predict v in this package's convention, with the stage's module or with `model` in its place.

        Args: t: [N] in 0..1, 1 is noise; step: length of the sampler's step, for a module that reads it;
            None: the instantaneous velocity, as in training.
        Raises: ValueError for a step where the module does not read it. Differentiable in: x_t, the module's
            parameters.
        """
        model = self.model if model is None else model
        # t' = 1 - t for a module of the other convention; the sign of v is changed at the end
        at = 1 - t if self.data_at_one else t
        # autocast keeps the weights as they are; only the products inside run in bfloat16
        half = self.precision == "bfloat16"
        with torch.autocast(feats_of(x_t).device.type, torch.bfloat16, enabled=half):
            if step is None:
                v = self.call(model, x_t, at, cond)
            elif self.call_step is None:
                raise ValueError(
                    f"stage {self.name!r}: expected shortcut=False, got True, but the network does not read"
                    " the length of a step. Set shortcut=False."
                )
            else:
                v = self.call_step(model, x_t, at, cond, torch.full_like(t, step))
        v = single(v) if half else v  # back to float32
        return opposite(at, v)[1] if self.data_at_one else v

    def noise(self, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise on the CPU, one sample per seed, as the kind of latents defines."""
        return self.latents.noise(f"FlowStage.noise of {self.name!r}", seeds, given)

    @property
    def hash(self) -> str:
        """Return a hash of the network's weights and of its class's name."""
        return checksum(self.model.state_dict(), type(self.model).__name__)

    def check(self, who: str, latent: Latent) -> None:
        """Raise ValueError, whose message begins with `who`, for a latent of another stage."""
        self.latents.check(
            who, latent, f"It is no latent of stage {self.name!r}. Name the stage that it came from."
        )


class Pipeline(Protocol):
    """Ordered generator of one or more stages. `advance` is called between two stages only."""

    @property
    def stages(self) -> Sequence[FlowStage]:
        """Return the stages in the order in which they are sampled."""

    def conditions(self, names: Sequence[str], stage: str) -> Condition:
        """Return a stage's conditioning of N prompts: tokens [N, T, E], or tensors by name, [N, ...] each."""

    def no_condition(self, n: int, stage: str) -> Condition:
        """Return the empty conditioning n times, in the same form."""

    def advance(self, stage: str, x_0: Any) -> list[Voxels]:
        """Convert a stage's latents x_0, a Batch, to the input of the next stage, one per sample.

        Not differentiable.
        """

    def decode(self, x_0: Any) -> list[Asset]:
        """Decode the last stage's latents, a Batch, to finished assets. Not differentiable."""

    def encode(self, assets: Sequence[Asset]) -> Sequence[Mapping[str, Latent]]:
        """Encode each asset as the latents of all stages, by the stage's name. Not differentiable."""


class AssetReward(Protocol):
    """Scores finished assets; larger is better."""

    def __call__(self, assets: Sequence[Asset], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, given their prompts: [N] float32."""


def stage_of(pipeline: Pipeline, name: str) -> FlowStage:
    """Return the stage with a name.

    Raises: ValueError that lists the stages there are.
    """
    for stage in pipeline.stages:
        if stage.name == name:
            return stage
    names = ", ".join(s.name for s in pipeline.stages)
    raise ValueError(f"stage: expected one of {names}, got {name!r}. Name a stage of this pipeline.")


@torch.no_grad()
def check_convention(stage: FlowStage, x_0: Batch, cond: Condition) -> None:
    """Reject a model that was trained with the opposite time convention (data at the other end).

    Raises: ValueError where the flow-matching error on data x_0 in the opposite convention is below half of
        the error in the stage's convention.
    """
    device = tensor_of(cond).device
    x_0 = x_0.to(device)
    # noise on the same voxels as the data
    latents = separate(x_0)
    eps = stage.noise(range(len(latents)), coords_of(latents))
    eps = eps.to(device)
    t = torch.linspace(0.1, 0.9, count(x_0), device=device)
    x_t = stage.path.mix(x_0, t, eps)
    error = stage.path.errors(stage.velocity(x_t, t, cond), x_0, eps).mean()
    # the same network, read in the other convention: time 1 - t, velocity with the other sign
    mapped = stage.path.errors(opposite(t, stage.velocity(x_t, 1 - t, cond))[1], x_0, eps).mean()
    if mapped < 0.5 * error:
        here, there = ("data", "noise") if stage.data_at_one else ("noise", "data")
        raise ValueError(
            f"stage {stage.name!r}: expected velocities of the convention with {here} at t = 1, got a model"
            f" with error {error:.3g} in it and {mapped:.3g} in the convention with {there} at t = 1. Set"
            f" data_at_one={not stage.data_at_one} in this stage."
        )
