"""Euler sampler of a stage's flow, from noise at t = 1 to data at t = 0, with guidance on an interval of times.

    x <- x - (t - t') v,   v = (1 + w) v_cond - w v_null where lo <= t <= hi, v_cond elsewhere

Times are 1 ... 0 in equal steps, mapped by t -> r t / (1 + (r - 1) t).
Sources: TRELLIS (Xiang et al. 2024) for the interval and the mapping; Kynkaanniemi et al. 2024 for guidance on an interval;
Esser et al. 2024, equation 23, for the mapping.

Shape letters as in sparse.py and stage.py.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from eg3d_rlhf.flow.sparse import Batch, count, feats_of, with_feats
from eg3d_rlhf.flow.stage import FlowStage, Sampling


def times(sampling: Sampling) -> list[float]:
    """The steps + 1 times from 1 down to 0.

    >>> times(Sampling(steps=2, rescale_t=3.0))
    [1.0, 0.75, 0.0]
    """
    r = sampling.rescale_t
    return [r * t / (1 + (r - 1) * t) for t in np.linspace(1, 0, sampling.steps + 1).tolist()]


def sample(
    stage: FlowStage, noise: Batch, cond: torch.Tensor, no_cond: torch.Tensor | None, sampling: Sampling | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Batch:
    """Latents x_0 from noise, without gradient; the model runs in eval mode and gets its modes back.

    Args:
        noise: N samples, moved to the device of `cond`; cond: [N, T, E]; no_cond: [N, T, E] or [1, T, E], or None where guidance is off.
        sampling: None takes the stage's own; on_step: called with 1 after every step, as a progress bar's update.
    Raises: ValueError for conditions that do not fit, or latents that are not finite.
    """
    x = noise
    for x, _ in trajectory(stage, noise, cond, no_cond, sampling):  # noqa: B007 (the last one is the result)
        if on_step is not None:
            on_step(1)
    if not torch.isfinite(feats_of(x)).all():
        raise ValueError(
            f"sample: expected finite latents of stage {stage.name!r}, got NaN or infinite ones. Check its weights and the conditions."
        )
    return x


def trajectory(
    stage: FlowStage, noise: Batch, cond: torch.Tensor, no_cond: torch.Tensor | None, sampling: Sampling | None = None
) -> Iterator[tuple[Batch, Batch]]:
    """After each step of `sample`: x at the step's end, and the x_0 that its velocity spoke of."""
    sampling = sampling or stage.sampling
    _check(noise, cond, no_cond, sampling)
    x, points = noise.to(cond.device), times(sampling)
    no_cond = no_cond.expand_as(cond) if no_cond is not None and len(no_cond) == 1 else no_cond
    for t, until in zip(points[:-1], points[1:], strict=True):
        with torch.no_grad(), evaluating(stage.model):
            at = torch.full([count(x)], t, device=cond.device)
            v = _guided(stage.model, x, at, t, cond, no_cond, sampling)
            estimate = stage.path.data(x, at, v)
            x = with_feats(x, feats_of(x) - (t - until) * feats_of(v))
        yield x, estimate


def _guided(
    model: torch.nn.Module, x: Batch, at: torch.Tensor, t: float, cond: torch.Tensor, no_cond: torch.Tensor | None, sampling: Sampling
) -> Batch:
    v, w = model(x, at, cond), sampling.cfg_strength
    low, high = sampling.cfg_interval
    if not w or not low <= t <= high:
        return v
    return with_feats(v, (1 + w) * feats_of(v) - w * feats_of(model(x, at, no_cond)))


def _check(noise: Batch, cond: torch.Tensor, no_cond: torch.Tensor | None, sampling: Sampling) -> None:
    if len(cond) != count(noise):
        raise ValueError(f"sample(cond): expected tokens for each of {count(noise)} samples, got {len(cond)}. Give one row per sample.")
    if sampling.cfg_strength and (no_cond is None or len(no_cond) not in (1, len(cond))):
        got = "None" if no_cond is None else len(no_cond)
        raise ValueError(
            f"sample(no_cond): expected the empty condition's tokens, once or {len(cond)} times, got {got}. Give them, or no cfg_strength."
        )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, then every module's own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
