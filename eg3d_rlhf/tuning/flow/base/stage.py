"""Interface of a multi-stage flow generator, such as TRELLIS.

Each stage is a flow-matching model over latents of one kind. The output of a stage is converted to the input
of the next stage, which is not differentiable.

The path of a flow is straight. This package uses one convention: x_0 is data, and t = 1 is noise (as in
TRELLIS, Flux and SD3).

    x_t = (1 - t) x_0 + (s + (1 - s) t) eps        v = (1 - s) eps - x_0

x_t is the noised latent at the time t in 0..1, eps is standard normal noise, v is the velocity that the
network predicts, and s = sigma_min is the noise that remains at t = 0.

Some papers have data at t = 1 (Circular-DPO, equations 1-4; Lipman et al. 2023). Their times and velocities
are t' = 1 - t and v' = -v, and the squared errors are the same. `opposite` converts between the conventions.
A stage whose network was trained in the other convention has the field `data_at_one`.

Shapes: N samples of a batch; v voxels of a sample; C channels; G given features of a voxel; R grid points per
axis; T tokens of a latent or of a conditioning input; E entries of a conditioning token.
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
    """Error for a decoded structure that contains no voxel."""


# A context variable, so that one thread can reject empty structures while another thread accepts them.
_EMPTY_REJECTED = contextvars.ContextVar("empty_rejected", default=False)


@contextlib.contextmanager
def rejecting_empty() -> Iterator[None]:
    """Reject empty structures with an error within this context.

    Outside the context an empty structure is replaced by its most probable voxel, so that tuning can
    continue.
    """
    context_token = _EMPTY_REJECTED.set(True)
    try:
        yield
    finally:
        _EMPTY_REJECTED.reset(context_token)


def reject_empty(who: str, remedy: str) -> None:
    """Raise EmptyStructure within the context `rejecting_empty`, and do nothing outside it.

    Args:
        who: beginning of the message.
        remedy: end of the message, a full sentence.
    """
    if _EMPTY_REJECTED.get():
        raise EmptyStructure(f"{who}: the decoded structure is empty, but needs at least one voxel. {remedy}")


# Kinds of latents. A kind defines the noise of a stage and checks its latents.

# Output of the previous stage for one sample. It is a tensor of voxel indices [v, 3] int32; or a
# `SparseSample`, whose features the flow reads as given features; or None for the first stage.
Voxels = torch.Tensor | SparseSample | None


class LatentKind(Protocol):
    """Interface of a kind of latents."""

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise on the CPU, one sample for each seed.

        The noise of a seed does not depend on its position in the batch or on the other seeds.

        Args:
            who: beginning of error messages.
            seeds: N seeds.
            given: N outputs of the previous stage, which for some kinds determine the shape of the noise.
        """

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        """Raise ValueError for a latent of another kind or shape.

        Args:
            who: beginning of the message.
            latent: latent of one sample.
            remedy: end of the message, a full sentence.
        """


def _normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Sample standard normal numbers of a shape on the CPU, so that all devices get the same numbers."""
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(seed))


def _describe_kind(latent: object) -> str:
    """Return the kind of a latent in words, for error messages."""
    if isinstance(latent, SparseSample):
        return "voxels"
    if isinstance(latent, NamedSample):
        return "tensors by name"
    return "a dense grid" if getattr(latent, "ndim", 0) == 4 else "one tensor"


def _check_type(who: str, latent: Latent, required_kind: str, latent_class: type, remedy: str) -> None:
    """Raise ValueError for a latent of another type.

    Args:
        who: beginning of the message.
        latent: latent to check.
        required_kind: required kind of latents, in words.
        latent_class: class of the required kind.
        remedy: end of the message, a full sentence.
    """
    if not isinstance(latent, latent_class):
        raise ValueError(f"{who}: expected {required_kind}, got {_describe_kind(latent)}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class _OneTensor(ABC):
    """Kind of latents that are one tensor of a fixed shape."""

    FORM: ClassVar[str]  # name of the kind in error messages
    channels: int

    @property
    @abstractmethod
    def shape(self) -> list[int]:
        """Return the shape of the latent of one sample."""

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        # `given` is not used; strict=True checks that it has one entry for each seed.
        return collate([_normal(self.shape, seed) for seed, _ in zip(seeds, given, strict=True)])

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_type(who, latent, self.FORM, torch.Tensor, remedy)
        assert isinstance(latent, torch.Tensor)
        check_shape(who, latent, self.shape, remedy)


@dataclass(frozen=True, kw_only=True)
class DenseGrid(_OneTensor):
    """Kind of latents that are one volume [C, R, R, R]."""

    FORM: ClassVar[str] = "a dense grid"
    resolution: int

    @property
    def shape(self) -> list[int]:
        return [self.channels, *[self.resolution] * 3]


@dataclass(frozen=True, kw_only=True)
class TokenSet(_OneTensor):
    """Kind of latents that are a set of tokens [T, C] without positions on a grid."""

    FORM: ClassVar[str] = "a set of tokens"
    tokens: int

    @property
    def shape(self) -> list[int]:
        return [self.tokens, self.channels]


@dataclass(frozen=True, kw_only=True)
class SparseVoxels:
    """Kind of latents that are features [v, C] on the voxels that the previous stage selects.

    The noise of a seed is one dense volume [C, R, R, R], which is read at the voxels. Two samples with the
    same seed therefore have the same noise at the voxels that they have in common.
    """

    channels: int
    resolution: int
    given: int = 0  # G, number of features per voxel that the previous stage gives; 0: it gives voxels only

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise at the voxels, see `LatentKind.noise`.

        If the previous stage gives features, they become the given features of the batch.

        Raises: ValueError for a sample without voxels, or with voxels outside the grid.
        """
        # Samples with the same seed read the same volume.
        volumes = {seed: _normal([self.channels, *[self.resolution] * 3], seed) for seed in set(seeds)}
        samples: list[Latent] = []
        for seed, previous_output in zip(seeds, given, strict=True):
            given_features = None
            cells = None
            if isinstance(previous_output, SparseSample):
                coords = self._check_coords(who, previous_output.coords)
                given_features = previous_output.feats.cpu() if self.given else None
                cells = previous_output.cells
            else:
                coords = self._check_coords(who, previous_output)
            x, y, z = coords.cpu().long().unbind(1)  # [v] each
            # The volume [C, R, R, R] at v voxels is [C, v]; transposed, it is [v, C].
            noise = volumes[seed][:, x, y, z].T.contiguous()
            samples.append(SparseSample(coords.cpu().int(), noise, given_features, cells))
        return collate(samples)

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_type(who, latent, "voxels", SparseSample, remedy)
        assert isinstance(latent, SparseSample)
        check_shape(f"{who}, features", latent.feats, ["v", self.channels], remedy)
        given_count = 0 if latent.given is None else latent.given.shape[1]
        if given_count != self.given:
            raise ValueError(
                f"{who}: expected {self.given} given features per voxel, got {given_count}. {remedy}"
            )
        self._check_coords(who, latent.coords)

    def _check_coords(self, who: str, coords: torch.Tensor | None) -> torch.Tensor:
        """Return the voxel indices [v, 3] if there are any and all of them lie in the grid.

        Raises: ValueError otherwise.
        """
        if coords is None or len(coords) == 0:
            raise ValueError(
                f"{who}: a sample has none of the voxels that it needs, because the previous stage produced"
                " an empty structure. Drop the sample."
            )
        min_index = int(coords.min())
        max_index = int(coords.max())
        if min_index < 0 or max_index >= self.resolution:
            raise ValueError(
                f"{who}: expected voxel indices from 0 to {self.resolution - 1}, got {min_index} to"
                f" {max_index}. Use latents of a grid with {self.resolution} cells per axis."
            )
        return coords


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Kind of latents that consist of several tensors by name, each with its own shape.

    Every tensor has the same weight in the error, large or small, unless `FlowPath.weights` gives others.
    """

    shapes: Mapping[str, Sequence[int]]  # name of a tensor -> its shape in one sample

    def noise(self, who: str, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise for each tensor, see `LatentKind.noise`.

        The noise of a tensor depends on the sample's seed and on the tensor's name.
        """
        samples: list[Latent] = []
        for seed, _ in zip(seeds, given, strict=True):  # `given` is not used
            tensors = {
                name: _normal(shape, derive_seed("part", name, seed)) for name, shape in self.shapes.items()
            }
            samples.append(NamedSample(tensors))
        return collate(samples)

    def check(self, who: str, latent: Latent, remedy: str) -> None:
        _check_type(who, latent, "tensors by name", NamedSample, remedy)
        assert isinstance(latent, NamedSample)
        # The names are checked before the shapes, because a message about a missing tensor is clearer.
        if set(latent.tensors) != set(self.shapes):
            raise ValueError(
                f"{who}: expected tensors {', '.join(sorted(self.shapes))}, got {', '.join(latent.tensors)}."
                f" {remedy}"
            )
        for name, shape in self.shapes.items():
            check_shape(f"{who}, {name}", latent[name], list(shape), remedy)


# The path between data and noise.

CONVENTION = "x_0 is data, t = 1 is noise"  # text that is stored in files of latents
SCHEDULES = ("logit-normal", "uniform")  # distributions of training times


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """Straight path between data and noise, with the distribution of training times."""

    sigma_min: float = 1e-5  # s of the module's docstring, the noise that remains at t = 0
    # Distribution of training times: sigmoid of a normal number, or uniform on 0..1.
    schedule: str = "logit-normal"
    mean: float = 1.0  # mean of the normal number of the schedule logit-normal
    std: float = 1.0  # standard deviation of the normal number
    # Name of a tensor of the latent -> weight of its error, for latents of several tensors. None: equal
    # weights, whose sum is 1.
    weights: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"FlowPath.schedule: {self.schedule!r} is not a schedule. Use {' or '.join(SCHEDULES)}."
            )
        if not (math.isfinite(self.mean) and self.std > 0):
            raise ValueError(
                f"FlowPath: mean={self.mean} and std={self.std} do not define a normal distribution. Use a"
                " finite mean and std > 0."
            )
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"FlowPath.sigma_min: {self.sigma_min} is not allowed. Use 0 <= sigma_min < 1.")

    def sigma(self, t: Any) -> Any:
        """Return the factor of the noise in x_t, s + (1 - s) t, for a time t or a tensor of times."""
        return self.sigma_min + (1 - self.sigma_min) * t

    def times(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Sample n training times, [n] in 0..1, on the device of the random generator."""
        if self.schedule == "uniform":
            return torch.rand(n, generator=generator, device=generator.device)
        # A positive mean makes times near 1 (noise) more frequent.
        return torch.sigmoid(
            self.mean + self.std * torch.randn(n, generator=generator, device=generator.device)
        )

    def mix(self, x_0: Batch, t: torch.Tensor, eps: Batch) -> Batch:
        """Compute the noised latents x_t = (1 - t) x_0 + (s + (1 - s) t) eps.

        Args:
            x_0: N latents, data.
            t: [N], times in 0..1.
            eps: N latents of the same shapes, noise.
        Raises: ValueError for times outside 0..1, such as those of a schedule from 0 to 1000.
        """
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(
                f"FlowPath.mix(t): expected times from 0 (data) to 1 (noise), got {t.min():g} to {t.max():g}."
                " Divide the times by their largest value."
            )
        time = spread(t, x_0)  # [N] repeated for every number of a sample
        return with_feats(x_0, (1 - time) * feats_of(x_0) + self.sigma(time) * feats_of(eps))

    def velocity(self, x_0: Batch, eps: Batch) -> Batch:
        """Return the velocity v = (1 - s) eps - x_0, which is constant, since the path is straight."""
        return with_feats(x_0, (1 - self.sigma_min) * feats_of(eps) - feats_of(x_0))

    def data(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """Return the data x_0 = (1 - s) x_t - (s + (1 - s) t) v that belong to x_t and v at times t [N]."""
        time = spread(t, x_t)
        return with_feats(x_t, (1 - self.sigma_min) * feats_of(x_t) - self.sigma(time) * feats_of(v))

    def velocity_to(self, x_t: Batch, t: torch.Tensor, x_0: Batch) -> Batch:
        """Return the velocity v for which `data(x_t, t, v)` is x_0, at times t [N] above 0."""
        # At t = 0 this would divide by sigma_min, which is nearly 0.
        time = spread(t, x_t)
        return with_feats(x_t, ((1 - self.sigma_min) * feats_of(x_t) - feats_of(x_0)) / self.sigma(time))

    def noise(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """Return the noise eps = x_t + (1 - t) v that belongs to x_t and v at times t [N]."""
        return with_feats(x_t, feats_of(x_t) + (1 - spread(t, x_t)) * feats_of(v))

    def errors(self, v: Batch, x_0: Batch, eps: Batch) -> torch.Tensor:
        """Compute the flow-matching error of predicted velocities for each sample, [N].

        Args:
            v: N predicted velocities.
            x_0: N latents, data.
            eps: N latents, noise.
        Returns: [N], squared error, averaged over the numbers of a sample. Differentiable in v.
        """
        return self.apart(v, self.velocity(x_0, eps))

    def apart(self, a: Batch, b: Batch) -> torch.Tensor:
        """Compute the squared difference of two batches, averaged over the numbers of each sample, [N].

        Differentiable in a and b.
        """
        return self.per_sample((feats_of(a) - feats_of(b)).square(), a)

    def per_sample(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean of the values of each sample, [N].

        For latents of several tensors this is the sum of the tensors' means, multiplied by
        `FlowPath.weights`, or the mean over all values of the sample if these are None.

        Args:
            values: values in the form of `feats_of(batch)`.
            batch: batch of N samples, which defines the number of values of each sample.
        Differentiable in values.
        """
        if self.weights is None:
            return mean_per_sample(values, batch)
        assert isinstance(batch, NamedBatch)
        # Each tensor is averaged over its own numbers first, [N], so that its weight does not depend on its
        # size.
        mean_by_tensor = {
            name: tensor.flatten(1).mean(1) for name, tensor in batch.with_feats(values).tensors.items()
        }
        return torch.stack([weight * mean_by_tensor[name] for name, weight in self.weights.items()]).sum(0)


def opposite(t: torch.Tensor, v: Batch) -> tuple[torch.Tensor, Batch]:
    """Convert times t [N] and velocities between the conventions with data at t = 0 and at t = 1."""
    return 1 - t, with_feats(v, -feats_of(v))


Asset = Any  # decoded output of the last stage, which rewards score; each pipeline defines its type
# Function that calls a network. Its arguments are the network, x_t, the times [N] in 0..1 and the
# conditioning, and its result is the velocity.
Call = Callable[..., Any]
CallStep = Callable[..., Any]  # the same with the length of the sampling step [N] as the last argument


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the Euler sampler."""

    steps: int = 25  # number of steps
    cfg_strength: float = 5.0  # w of classifier-free guidance, (1 + w) v_cond - w v_null; 0: no guidance
    # First and last time at which guidance is used; both are included.
    cfg_interval: tuple[float, float] = (0.5, 1.0)
    # r of the mapping t -> r t / (1 + (r - 1) t) of equally spaced times. A larger r gives more steps at
    # noisy times.
    rescale_t: float = 3.0
    # Strength, 0 to 1, with which the guided x_0 is rescaled to the standard deviation of the unguided x_0.
    cfg_rescale: float = 0.0
    # True: the network also reads the length of a step, 1 / steps, and needs few steps.
    shortcut: bool = False
    # Times are compared with the interval as float32 numbers time_scale (1 - t), as some original programs
    # do. None: as float64 numbers t.
    time_scale: float | None = None
    single: bool = False  # True: times are computed in float32 from 1 - t, as some original programs do

    def __post_init__(self):
        low, high = self.cfg_interval
        # Each condition is False for NaN.
        is_met_by_setting = {
            "steps": self.steps >= 1,
            "rescale_t": self.rescale_t > 0 and math.isfinite(self.rescale_t),
            "cfg_interval": 0 <= low <= high <= 1,
            "cfg_strength": self.cfg_strength >= 0 and math.isfinite(self.cfg_strength),
            "cfg_rescale": 0 <= self.cfg_rescale <= 1,
        }
        wrong_settings = [name for name, is_met in is_met_by_setting.items() if not is_met]
        if wrong_settings:
            wrong_values_text = ", ".join(f"{name}={getattr(self, name)}" for name in wrong_settings)
            raise ValueError(
                f"Sampling: {wrong_values_text} is not allowed. Use steps >= 1, a finite rescale_t > 0, a"
                " finite cfg_strength >= 0, a cfg_interval low <= high within 0..1, and a cfg_rescale within"
                " 0..1."
            )
        if self.time_scale is not None and not 0 < self.time_scale < math.inf:
            raise ValueError(
                f"Sampling.time_scale={self.time_scale} is not allowed. Use a finite number > 0, or None."
            )


def as_is(network: torch.nn.Module, x_t: Batch, t: torch.Tensor, cond: Condition) -> Batch:
    """Call a network whose arguments are x_t, times and conditioning in this order."""
    return network(x_t, t, cond)


@dataclass(kw_only=True)
class FlowStage:
    """One stage of a generator: a flow over latents of one kind, and how its network is called."""

    name: str  # name by which users choose the stage
    model: torch.nn.Module  # network that predicts velocities; its parameters keep their original names
    latents: LatentKind  # kind of the latents
    # Function that calls the network. The network's own convention of time and sign is converted by
    # `velocity`.
    call: Call = as_is
    # Function that calls a network which also reads the length of a step; None if the network does not read
    # it.
    call_step: CallStep | None = None
    data_at_one: bool = False  # True: the network was trained with data at t = 1 and noise at t = 0
    path: FlowPath = field(default_factory=FlowPath)  # path and distribution of training times
    sampling: Sampling = field(default_factory=Sampling)  # settings of the sampler
    # Last components of the names of the linear layers that get LoRA adapters.
    lora_targets: tuple[str, ...] = ("to_qkv", "to_q", "to_kv", "to_out")
    precision: str = "float32"  # data type of forward passes in training and sampling: float32 or bfloat16
    # Function that loads the network while samples are made; None: `model` has its weights.
    load: Callable[[], torch.nn.Module] | None = None

    def velocity(
        self,
        x_t: Batch,
        t: torch.Tensor,
        cond: Condition,
        model: torch.nn.Module | None = None,
        step: float | None = None,
    ) -> Batch:
        """Predict the velocity in the convention of this package.

        Args:
            x_t: N noised latents.
            t: [N], times in 0..1, where 1 is noise.
            cond: conditioning of N samples.
            model: network to call; None to call the network of the stage.
            step: length of the sampling step, for a network that reads it. None: the velocity at the time t,
                as in training.
        Returns: N velocities, in float32. Differentiable in x_t and in the parameters of the network.
        Raises: ValueError if `step` is given and the network does not read it.
        """
        model = self.model if model is None else model
        network_t = 1 - t if self.data_at_one else t  # time in the convention of the network
        # autocast computes matrix products in bfloat16 and leaves the weights in their own type.
        uses_bfloat16 = self.precision == "bfloat16"
        with torch.autocast(feats_of(x_t).device.type, torch.bfloat16, enabled=uses_bfloat16):
            if step is None:
                v = self.call(model, x_t, network_t, cond)
            elif self.call_step is None:
                raise ValueError(
                    f"stage {self.name!r}: shortcut=True needs a network that reads the length of a step, and"
                    " this network does not. Set shortcut=False."
                )
            else:
                v = self.call_step(model, x_t, network_t, cond, torch.full_like(t, step))
        v = single(v) if uses_bfloat16 else v  # back to float32
        return opposite(network_t, v)[1] if self.data_at_one else v

    def noise(self, seeds: Sequence[int], given: Sequence[Voxels]) -> Batch:
        """Sample standard normal noise on the CPU, one sample for each seed.

        Args:
            seeds: N seeds.
            given: N outputs of the previous stage; for the first stage, a list of N times None.
        Raises: ValueError if an output does not fit the kind of latents.
        """
        return self.latents.noise(f"FlowStage.noise of {self.name!r}", seeds, given)

    @property
    def hash(self) -> str:
        """Hash of the network's weights and of the name of its class."""
        return checksum(self.model.state_dict(), type(self.model).__name__)

    def check(self, who: str, latent: Latent) -> None:
        """Raise ValueError if a latent cannot belong to this stage. `who` is the beginning of the message."""
        self.latents.check(
            who,
            latent,
            f"It is not a latent of stage {self.name!r}. Name the stage to which the latent belongs.",
        )


class Pipeline(Protocol):
    """Interface of a generator with one or more stages in a fixed order."""

    @property
    def stages(self) -> Sequence[FlowStage]:
        """Stages in the order in which they are sampled."""

    def conditioning(self, names: Sequence[str], stage: str) -> Condition:
        """Return the conditioning of N prompts for a stage: tokens [N, T, E], or tensors [N, ...] by name."""

    def null_conditioning(self, n: int, stage: str) -> Condition:
        """Return n copies of the empty conditioning for a stage, in the form of `conditioning`."""

    def advance(self, stage: str, x_0: Any) -> list[Voxels]:
        """Convert the latents of a stage to the input of the next stage. It is not called for the last stage.

        The conversion is not differentiable.

        Args:
            stage: name of the stage.
            x_0: batch of N latents.
        Returns: N inputs of the next stage.
        """

    def decode(self, x_0: Any) -> list[Asset]:
        """Decode the last stage's latents, a batch of N, to N finished assets. It is not differentiable."""

    def encode(self, assets: Sequence[Asset]) -> Sequence[Mapping[str, Latent]]:
        """Encode assets as latents. It is not differentiable.

        Returns: for each asset, name of a stage -> latent.
        """


class AssetReward(Protocol):
    """Interface of a reward of finished assets. A larger score is better."""

    def __call__(self, assets: Sequence[Asset], prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of N assets with N prompts, [N] float32."""


def stage_of(pipeline: Pipeline, name: str) -> FlowStage:
    """Return the stage of a pipeline called `name`. Raises: ValueError if there is no such stage."""
    for stage in pipeline.stages:
        if stage.name == name:
            return stage
    stage_names = ", ".join(s.name for s in pipeline.stages)
    raise ValueError(f"stage: this pipeline has no stage {name!r}. Use one of {stage_names}.")


@torch.no_grad()
def check_convention(stage: FlowStage, x_0: Batch, cond: Condition) -> None:
    """Check that a stage's network was trained with the time convention of the field data_at_one.

    The network predicts velocities in both conventions. If its flow-matching error in the other convention is
    less than half of that in the declared convention, the field is wrong.

    Args:
        stage: stage to check.
        x_0: N latents, data.
        cond: conditioning of N samples.
    Raises: ValueError if the network was trained with the other convention.
    """
    device = tensor_of(cond).device
    x_0 = x_0.to(device)
    latents = separate(x_0)
    # The coordinates of the data give the noise the same voxels.
    eps = stage.noise(range(len(latents)), coords_of(latents))
    eps = eps.to(device)
    t = torch.linspace(0.1, 0.9, count(x_0), device=device)
    x_t = stage.path.mix(x_0, t, eps)
    declared_error = stage.path.errors(stage.velocity(x_t, t, cond), x_0, eps).mean()
    # In the other convention, the network gets the time 1 - t, and its velocity has the opposite sign.
    other_velocity = opposite(t, stage.velocity(x_t, 1 - t, cond))[1]
    other_error = stage.path.errors(other_velocity, x_0, eps).mean()
    if other_error < 0.5 * declared_error:
        declared_content = "data" if stage.data_at_one else "noise"
        other_content = "noise" if stage.data_at_one else "data"
        raise ValueError(
            f"stage {stage.name!r}: the network was probably trained with the other time convention. The"
            f" stage declares {declared_content} at t = 1, where the flow-matching error is"
            f" {declared_error:.3g}; with {other_content} at t = 1 it is only {other_error:.3g}. Set"
            f" data_at_one={not stage.data_at_one} in this stage."
        )
