"""Bias, activation, gain and clamp in one call.

Shapes: x is any shape, B = x.shape[dim] is the length of the bias.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import COMPILED_DTYPES, choose, define, dense, like_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """Entry of `activation_funcs`."""

    func: Callable[[torch.Tensor, float], torch.Tensor]  # func(x, alpha), any shape, not in place
    def_alpha: float = 0.0  # default slope; only lrelu uses it
    # Default factor after the activation. sqrt(2) keeps unit variance through a rectifier.
    def_gain: float = 1.0
    # In-place function with g f(x) = f(g x) for g > 0, if the activation has this property.
    homogeneous_: Callable[[torch.Tensor, float], torch.Tensor] | None = None


_SQRT2 = math.sqrt(2)
activation_funcs: dict[str, Activation] = {
    "linear": Activation(func=lambda x, alpha: x, homogeneous_=lambda x, alpha: x),
    "relu": Activation(
        func=lambda x, alpha: F.relu(x), def_gain=_SQRT2, homogeneous_=lambda x, alpha: F.relu_(x)
    ),
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
_NAMES = list(activation_funcs)  # the index is the argument `act` of the compiled ops
_PIECEWISE = ("linear", "relu", "lrelu")  # slope * (x + b); the slope follows from the sign of the result


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
        dim: axis of `x` along which the bias runs, 0 <= dim < x.ndim; ignored without a bias.
        act: a key of `activation_funcs`.
        alpha: slope of lrelu below zero; None = 0.2. Other activations ignore it.
        gain: factor after the activation; None = that of the activation (sqrt 2 for relu, lrelu, swish, else
            1).
        clamp: largest magnitude of the result, >= 0; None does not clamp.
        impl: see `torch_utils.ops.implementations`. "compiled" needs float32 or float64, gain > 0 and alpha
            >= 0.
    Returns: shape of `x`. It is `x` itself if there is nothing to do. `x` is never written to.
    Differentiable in x and b, to any order if the activation is.
    Raises: ValueError for an unknown `impl`.
    """
    assert act in activation_funcs and (clamp is None or clamp >= 0)
    assert b is None or (0 <= dim < x.ndim and b.shape == (x.shape[dim],))
    spec = activation_funcs[act]
    alpha = spec.def_alpha if alpha is None else float(alpha)
    gain = spec.def_gain if gain is None else float(gain)
    # A gain of 0 or below, and a negative slope, would hide the sign from which the gradient reads its slope.
    applies = (
        x.dtype in COMPILED_DTYPES[x.device.type == "cuda"]
        and gain > 0
        and alpha >= 0
        and x.numel() > 0
        and x.ndim > 0
    )
    # Before the early return, so that an unknown `impl` is an error in every case.
    chosen = choose("bias_act", impl, "bias_act", x.device.type, applies)
    if b is None and act == "linear" and gain == 1 and clamp is None:
        return x
    if chosen != "compiled":
        return (bias_act_ref if chosen == "ref" else _bias_act_torch)(x, b, dim, spec, alpha, gain, clamp)
    dim = dim if b is not None else min(1, x.ndim - 1)  # the op needs a valid axis even without a bias
    b = None if b is None else b.to(x.dtype).contiguous()
    return torch.ops.eg3d_rlhf.bias_act(
        dense(x), b, dim, _NAMES.index(act), alpha, gain, -1.0 if clamp is None else float(clamp)
    )


def bias_act_ref(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    spec: Activation,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    """Compute the definition, one operation after the other."""
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, alpha)
    x = x * gain if gain != 1 else x
    return x if clamp is None else x.clamp(-clamp, clamp)


def _bias_act_torch(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    spec: Activation,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    """Compute bias_act in plain torch, with as few passes over memory as the activation allows.

    Rectifiers commute with a positive gain. Bias and gain then take one pass (gain*b + gain*x), and the
    activation follows in place on that new tensor. The result agrees with the literal formula up to rounding.
    """
    if b is not None:
        b = b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])  # [1, .., B, .., 1]
    if spec.homogeneous_ is not None and gain > 0 and (b is not None or gain != 1):
        # A new tensor, on which the activation may work in place; x itself is never written to.
        fresh = x * gain if b is None else torch.add(b * gain, x, alpha=gain) if gain != 1 else x + b
        y = spec.homogeneous_(fresh, alpha)
    else:
        y = spec.func(x if b is None else x + b, alpha)
        y = y if gain == 1 else y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def _save(ctx, inputs, output) -> None:
    """Save what the backward pass needs: the input for smooth activations, the output for rectifiers."""
    x, b, *ctx.rest = inputs
    ctx.has_bias = b is not None
    dim, act, _, _, clamp = ctx.rest
    if _NAMES[act] not in _PIECEWISE:
        ctx.save_for_backward(x, b)
    elif act or clamp >= 0:  # linear without clamp is a scaled copy, whose gradient needs nothing
        ctx.save_for_backward(output)


def _gradients(ctx, grad):
    """Return the gradients for x and b."""
    dim, act, alpha, gain, clamp = ctx.rest
    need_x, need_b = ctx.needs_input_grad[:2]
    if _NAMES[act] not in _PIECEWISE:
        # Through torch: differentiable again, but with more passes over memory.
        x, b = ctx.saved_tensors
        value, slope = _SLOPES[_NAMES[act]](
            x if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
        )
        grad = grad * gain * slope
        if clamp >= 0:
            # Clamped results have no gradient. The comparison itself has none, either.
            grad = grad * (value * gain).detach().abs().le(clamp)
        return grad, None if b is None else grad.sum([i for i in range(x.ndim) if i != dim]), *[None] * 5
    # Read once: torch's checkpoint unpacks a saved tensor a single time.
    saved = ctx.saved_tensors
    # The kernel reads both tensors by one index, so their layouts must be equal.
    grad = like_layout(grad, saved[0]) if saved else dense(grad)
    out = saved[0] if saved else grad.detach()
    grad_x, grad_b = torch.ops.eg3d_rlhf.bias_act_backward(grad, out, *ctx.rest, ctx.has_bias and need_b)
    return grad_x if need_x else None, grad_b if ctx.has_bias and need_b else None, *[None] * 5


def _elu(z: torch.Tensor, scale: float, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value and derivative of scale * elu(z)."""
    # The clamp keeps exp finite in the branch that `where`
    # discards; an infinity there would make gradients NaN.
    below = alpha * z.clamp(max=0).exp()
    return scale * torch.where(z > 0, z, below - alpha), scale * torch.where(z > 0, torch.ones_like(z), below)


# Functions that return value and derivative at z.
_SLOPES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "tanh": lambda z: ((t := z.tanh()), 1 - t.square()),
    "sigmoid": lambda z: ((s := z.sigmoid()), s * (1 - s)),
    "elu": lambda z: _elu(z, 1.0, 1.0),
    "selu": lambda z: _elu(z, 1.0507009873554805, 1.6732632423543772),
    "softplus": lambda z: (F.softplus(z), z.sigmoid()),
    "swish": lambda z: (z * (s := z.sigmoid()), s * (1 + z * (1 - s))),
}


def _save_backward(ctx, inputs, output) -> None:
    # `grad` enters linearly, so its own gradient does not need it.
    _, out, *ctx.rest, ctx.with_bias = inputs
    ctx.save_for_backward(out)


def _gradients_backward(ctx, grad_x, grad_b):
    """Return the second derivative: the adjoint of `bias_act_backward` is `bias_act_slope`."""
    (out,) = ctx.saved_tensors
    grad_b = grad_b.contiguous() if ctx.with_bias else None
    return torch.ops.eg3d_rlhf.bias_act_slope(like_layout(grad_x, out), grad_b, out, *ctx.rest), *[None] * 7


def _save_slope(ctx, inputs, output) -> None:
    _, b, out, *ctx.rest = inputs
    ctx.has_bias = b is not None
    ctx.save_for_backward(out)


def _gradients_slope(ctx, grad):
    """Return the third derivative: the adjoint of `bias_act_slope` is `bias_act_backward`."""
    (out,) = ctx.saved_tensors
    grad_x, grad_b = torch.ops.eg3d_rlhf.bias_act_backward(
        like_layout(grad, out), out, *ctx.rest, ctx.has_bias
    )
    return grad_x, grad_b if ctx.has_bias else None, *[None] * 6


# The compiled ops. x is dense, contiguous or channels-last, and so is the result. act is the index in
# activation_funcs (0 linear, 1 relu, 2 lrelu, 3 tanh, 4 sigmoid, 5 elu, 6 selu, 7 softplus, 8 swish). gain >
# 0. clamp < 0 does not clamp. dim is B's axis, also without a bias. The last two ops exist for acts 0, 1, 2,
# and each is the adjoint of the other. slope(out) = gain * (act 1: 1 or 0, act 2: 1 or alpha, by the sign of
# out, where 0 counts as negative), and 0 where |out| >= clamp.
define(
    "bias_act(Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float clamp) -> Tensor",
    lambda x, *rest: torch.empty_like(x),
    _gradients,
    _save,
)
define(  # (slope(out) * grad, its sum over all axes but dim: [B], or [0] without with_bias)
    "bias_act_backward(Tensor grad, Tensor out, int dim, int act, float alpha, float gain, float clamp, bool"
    " with_bias) -> (Tensor, Tensor)",
    lambda grad, out, dim, *rest: (
        torch.empty_like(grad),
        grad.new_empty(grad.shape[dim] if rest[-1] else 0),
    ),
    _gradients_backward,
    _save_backward,
)
define(  # slope(out) * (x + b)
    "bias_act_slope(Tensor x, Tensor? b, Tensor out, int dim, int act, float alpha, float gain, float clamp)"
    " -> Tensor",
    lambda x, *rest: torch.empty_like(x),
    _gradients_slope,
    _save_slope,
)
