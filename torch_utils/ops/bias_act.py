"""Compute bias, activation function, gain and clamp of a layer in one call.

Shapes: x has any shape; B = x.shape[dim] is the length of the bias.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import COMPILED_DTYPES, choose, define, dense, like_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """Activation function with its default settings, an entry of `activation_funcs`."""

    func: Callable[[torch.Tensor, float], torch.Tensor]  # func(x, alpha) for x of any shape, not in place
    def_alpha: float = 0.0  # default slope for negative values; only lrelu uses it
    # Default factor after the activation. A rectifier with the
    # factor sqrt(2) does not change a variance of 1.
    def_gain: float = 1.0
    # The same function in place, if it has the property g f(x) = f(g x) for all g > 0; otherwise None
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
# Activations of the form slope * (x + b), where the slope follows from the sign of the result
_PIECEWISE = ("linear", "relu", "lrelu")


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
    """Compute clip(gain * act(x + b), -clamp, clamp), the last operations of a layer.

    Args:
        x: tensor of any shape. It is not changed.
        b: bias [B], added along the axis `dim`; None adds no bias.
        dim: axis of x that belongs to the bias, 0 <= dim < x.ndim; ignored without a bias.
        act: name of the activation function, a key of `activation_funcs`.
        alpha: slope of lrelu for negative values; None: 0.2. Other activations ignore it.
        gain: factor after the activation; None: sqrt(2) for relu, lrelu and swish, and 1 for others.
        clamp: largest magnitude of the result, >= 0; None does not clamp.
        impl: see `torch_utils.ops.implementations`. "compiled" needs float32 or float64, on CUDA also float16
            or bfloat16, and gain > 0 and alpha >= 0.

    Returns: a tensor of the shape of x. It is x itself if no operation is needed.
    Differentiable in x and b, as often as the activation function is.
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
    """
    assert act in activation_funcs and (clamp is None or clamp >= 0)
    assert b is None or (0 <= dim < x.ndim and b.shape == (x.shape[dim],))
    spec = activation_funcs[act]
    alpha = spec.def_alpha if alpha is None else float(alpha)
    gain = spec.def_gain if gain is None else float(gain)
    # The compiled gradient computes the slope from the sign of the result. With gain <= 0 or a negative
    # slope, the sign of the result is not that of x + b.
    is_supported = (
        x.dtype in COMPILED_DTYPES[x.device.type == "cuda"]
        and gain > 0
        and alpha >= 0
        and x.numel() > 0
        and x.ndim > 0
    )
    # This comes before the early return, so that an unknown `impl` is an error in every case.
    implementation_name = choose("bias_act", impl, "bias_act", x.device.type, is_supported)
    if b is None and act == "linear" and gain == 1 and clamp is None:
        return x
    if implementation_name != "compiled":
        return (bias_act_ref if implementation_name == "ref" else _bias_act_torch)(
            x, b, dim, spec, alpha, gain, clamp
        )
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
    """Compute the definition of `bias_act`, one operation after the other.

    The arguments are those of `bias_act`, without defaults. `spec` is the entry of `activation_funcs` for the
    name `act`.
    """
    if b is not None:
        # [1, .., B, .., 1], which broadcasts along all other axes
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
    """Compute `bias_act` in plain torch, with as few passes over memory as the activation allows.

    For a rectifier f and a positive gain, gain f(x + b) = f(gain b + gain x). The argument of f takes one
    pass, and f is then computed in place. The result agrees with the definition up to rounding.
    """
    if b is not None:
        b = b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])  # [1, .., B, .., 1]
    if spec.homogeneous_ is not None and gain > 0 and (b is not None or gain != 1):
        # A new tensor, so that the activation can be computed in place without a change of x
        if b is None:
            activation_input = x * gain
        else:
            activation_input = torch.add(b * gain, x, alpha=gain) if gain != 1 else x + b
        y = spec.homogeneous_(activation_input, alpha)
    else:
        y = spec.func(x if b is None else x + b, alpha)
        y = y if gain == 1 else y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def _save(ctx, inputs, output) -> None:
    """Store the tensors for the backward pass: the input of smooth activations, the output of rectifiers."""
    x, b, *ctx.rest = inputs
    ctx.has_bias = b is not None
    dim, act, _, _, clamp = ctx.rest
    if _NAMES[act] not in _PIECEWISE:
        ctx.save_for_backward(x, b)
    elif act or clamp >= 0:  # act 0 is linear: without a clamp, its gradient needs no tensor
        ctx.save_for_backward(output)


def _gradients(ctx, grad):
    """Return the gradients of x and b, and None for the five other arguments of the op."""
    dim, act, alpha, gain, clamp = ctx.rest
    need_x, need_b = ctx.needs_input_grad[:2]
    if _NAMES[act] not in _PIECEWISE:
        # Computed by torch, so that the gradient can be differentiated again.
        x, b = ctx.saved_tensors
        activation_value, slope = _SLOPES[_NAMES[act]](
            x if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
        )
        grad = grad * gain * slope
        if clamp >= 0:
            # The gradient of clamped results is 0.
            grad = grad * (activation_value * gain).detach().abs().le(clamp)
        return grad, None if b is None else grad.sum([i for i in range(x.ndim) if i != dim]), *[None] * 5
    # torch's checkpoint allows only one access to saved_tensors.
    saved_tensors = ctx.saved_tensors
    # The kernel uses the same index for the two tensors, so their memory layouts must be equal.
    grad = like_layout(grad, saved_tensors[0]) if saved_tensors else dense(grad)
    activation_output = saved_tensors[0] if saved_tensors else grad.detach()
    grad_x, grad_b = torch.ops.eg3d_rlhf.bias_act_backward(
        grad, activation_output, *ctx.rest, ctx.has_bias and need_b
    )
    return grad_x if need_x else None, grad_b if ctx.has_bias and need_b else None, *[None] * 5


def _elu(z: torch.Tensor, scale: float, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value and the derivative of scale * elu(z), where elu(z) = alpha (exp(z) - 1) for z <= 0."""
    # For z > 0 the exponential is not used. The clamp keeps it
    # finite, since an infinity would make gradients NaN.
    scaled_exponential = alpha * z.clamp(max=0).exp()
    activation_value = scale * torch.where(z > 0, z, scaled_exponential - alpha)
    return activation_value, scale * torch.where(z > 0, torch.ones_like(z), scaled_exponential)


# Functions of z that return the value and the derivative of an activation
_SLOPES: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "tanh": lambda z: ((t := z.tanh()), 1 - t.square()),
    "sigmoid": lambda z: ((s := z.sigmoid()), s * (1 - s)),
    "elu": lambda z: _elu(z, 1.0, 1.0),
    "selu": lambda z: _elu(z, 1.0507009873554805, 1.6732632423543772),
    "softplus": lambda z: (F.softplus(z), z.sigmoid()),
    "swish": lambda z: (z * (s := z.sigmoid()), s * (1 + z * (1 - s))),
}


def _save_backward(ctx, inputs, output) -> None:
    """Store the tensors for the backward pass of `bias_act_backward`.

    That op is linear in its first argument.
    """
    _, activation_output, *ctx.rest, ctx.with_bias = inputs
    ctx.save_for_backward(activation_output)


def _gradients_backward(ctx, grad_x, grad_b):
    """Compute the gradient of `bias_act_backward`, whose adjoint is `bias_act_slope`.

    Only the first of the eight arguments has a gradient.
    """
    (activation_output,) = ctx.saved_tensors
    grad_b = grad_b.contiguous() if ctx.with_bias else None
    return torch.ops.eg3d_rlhf.bias_act_slope(
        like_layout(grad_x, activation_output), grad_b, activation_output, *ctx.rest
    ), *[None] * 7


def _save_slope(ctx, inputs, output) -> None:
    """Store the tensors for the backward pass of `bias_act_slope`, which is linear in x and b."""
    _, b, activation_output, *ctx.rest = inputs
    ctx.has_bias = b is not None
    ctx.save_for_backward(activation_output)


def _gradients_slope(ctx, grad):
    """Compute the gradients of `bias_act_slope`, whose adjoint is `bias_act_backward`.

    Only x and b of the eight arguments have gradients.
    """
    (activation_output,) = ctx.saved_tensors
    grad_x, grad_b = torch.ops.eg3d_rlhf.bias_act_backward(
        like_layout(grad, activation_output), activation_output, *ctx.rest, ctx.has_bias
    )
    return grad_x, grad_b if ctx.has_bias else None, *[None] * 6


# The compiled ops
#
# x is contiguous or channels-last, and so is the result. act is the index in activation_funcs (0 linear, 1
# relu, 2 lrelu, 3 tanh, 4 sigmoid, 5 elu, 6 selu, 7 softplus, 8 swish). gain must be > 0. clamp < 0 means no
# clamp. dim is a valid axis even without a bias. bias_act_backward and bias_act_slope exist only for act 0, 1
# and 2; each is the adjoint of the other. Both use slope(out), which is gain where out > 0. Where out <= 0 it
# is gain for act 0, 0 for act 1, and gain * alpha for act 2. It is 0 where |out| >= clamp.
define(
    "bias_act(Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float clamp) -> Tensor",
    lambda x, *rest: torch.empty_like(x),
    _gradients,
    _save,
)
# returns slope(out) * grad, and its sum over all axes but dim ([B], or an empty tensor if with_bias is False)
define(
    "bias_act_backward(Tensor grad, Tensor out, int dim, int act, float alpha, float gain, float clamp, bool"
    " with_bias) -> (Tensor, Tensor)",
    lambda grad, out, dim, *rest: (
        torch.empty_like(grad),
        grad.new_empty(grad.shape[dim] if rest[-1] else 0),
    ),
    _gradients_backward,
    _save_backward,
)
define(  # returns slope(out) * (x + b)
    "bias_act_slope(Tensor x, Tensor? b, Tensor out, int dim, int act, float alpha, float gain, float clamp)"
    " -> Tensor",
    lambda x, *rest: torch.empty_like(x),
    _gradients_slope,
    _save_slope,
)
