"""Bias, activation, gain and clamp in one call.

Shapes: x is any shape, B = x.shape[dim] is the length of the bias.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import check_impl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """One entry of `activation_funcs`."""

    func: Callable[[torch.Tensor, float], torch.Tensor]  # func(x, alpha), any shape, out of place
    def_alpha: float = 0.0  # default slope; read by lrelu only
    def_gain: float = 1.0  # default factor after the activation; sqrt(2) keeps unit variance through a rectifier
    homogeneous_: Callable[[torch.Tensor, float], torch.Tensor] | None = None  # in-place func with g f(x) = f(g x) for g > 0


_SQRT2 = math.sqrt(2)
activation_funcs: dict[str, Activation] = {
    "linear": Activation(func=lambda x, alpha: x, homogeneous_=lambda x, alpha: x),
    "relu": Activation(func=lambda x, alpha: F.relu(x), def_gain=_SQRT2, homogeneous_=lambda x, alpha: F.relu_(x)),
    "lrelu": Activation(
        func=lambda x, alpha: F.leaky_relu(x, alpha),
        def_alpha=0.2,
        def_gain=_SQRT2,
        homogeneous_=lambda x, alpha: F.leaky_relu_(x, alpha) if alpha >= 0 else F.leaky_relu(x, alpha),
    ),
    "tanh": Activation(func=lambda x, alpha: torch.tanh(x)),
    "sigmoid": Activation(func=lambda x, alpha: torch.sigmoid(x)),
    "elu": Activation(func=lambda x, alpha: F.elu(x)),
    "selu": Activation(func=lambda x, alpha: F.selu(x)),
    "softplus": Activation(func=lambda x, alpha: F.softplus(x)),
    "swish": Activation(func=lambda x, alpha: F.silu(x), def_gain=_SQRT2),
}


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Finish a layer: clip(gain * act(x + b), -clamp, clamp).

    Args:
        x: any shape.
        b: [x.shape[dim]], added along `dim`; None adds nothing.
        dim: axis of `x` the bias runs along, 0 <= dim < x.ndim; ignored without a bias.
        act: a key of `activation_funcs`.
        alpha: slope of lrelu below zero; None = 0.2; other activations ignore it.
        gain: factor after the activation; None = the activation's own (sqrt 2 for relu, lrelu, swish, else 1).
        clamp: largest magnitude of the result, >= 0; None does not clamp.
        impl: "auto" or "ref".
    Returns: like `x`. It is `x` itself when there is nothing to do. `x` is never written to.
    Differentiable in x and b, to any order where the activation is.
    Raises: ValueError for a bias that does not fit, an unknown activation, a negative clamp or an unknown `impl`.
    """
    check_impl("bias_act", impl)
    if act not in activation_funcs:
        raise ValueError(f"bias_act: expected act to be one of {sorted(activation_funcs)}, got {act!r}. Choose one of these.")
    if b is not None and not (0 <= dim < x.ndim and b.shape == (x.shape[dim],)):
        raise ValueError(f"bias_act: expected b of shape [x.shape[{dim}]] for x {list(x.shape)}, got {list(b.shape)}. Check dim and b.")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"bias_act: expected clamp >= 0 or None, got {clamp}. Pass None to leave values unclamped.")
    spec = activation_funcs[act]
    alpha = spec.def_alpha if alpha is None else float(alpha)
    gain = spec.def_gain if gain is None else float(gain)
    return _bias_act_ref(x, b, dim, spec, alpha, gain, clamp)


def _bias_act_ref(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, spec: Activation, alpha: float, gain: float, clamp: float | None
) -> torch.Tensor:
    """bias_act in plain torch, in as few passes over memory as the activation allows.

    Rectifiers commute with a positive gain, so bias and gain become one pass (gain*b + gain*x) and the activation
    follows in place on that fresh tensor. Agrees with the literal formula to rounding.
    """
    if b is not None:
        b = b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])  # [1, .., B, .., 1]
    if spec.homogeneous_ is not None and gain > 0 and (b is not None or gain != 1):
        fresh = x * gain if b is None else torch.add(b * gain, x, alpha=gain) if gain != 1 else x + b
        y = spec.homogeneous_(fresh, alpha)
    else:
        y = spec.func(x if b is None else x + b, alpha)
        y = y if gain == 1 else y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)
