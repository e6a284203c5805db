"""Check a CUDA op on the device before its first use, by comparing it with plain torch on small fixed inputs.

The tests of this project emulate the CUDA kernels on a CPU. A real driver, device or compiler may still give
other results. If the results of an op differ from plain torch, or if the op ends with a CUDA error, a warning
is printed, and plain torch is used on that device.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

# torch.compile asks for the result of a check while it runs everything on fake tensors.
from torch.utils._python_dispatch import _disable_current_modes

from torch_utils.ops.bias_act import activation_funcs, bias_act_ref
from torch_utils.ops.ray_march import interval_weights, invert_density, ray_march_ref, smooth_weights
from torch_utils.ops.slab_density import slab_density_ref
from torch_utils.ops.triplane_decode import _decode_torch
from torch_utils.ops.upfirdn2d import upfirdn2d_ref

Pair = tuple[torch.Tensor, torch.Tensor]  # results of the op and of plain torch
Check = Callable[[torch.device], Iterable[Pair]]

# Largest difference relative to the largest value. It is a hundred times the rounding error of the ops, and
# far below the effect of a wrong index.
TOLERANCE = 1e-3
_ops = torch.ops.eg3d_rlhf
_results: dict[tuple[str, torch.device], bool] = {}  # True if the op passed its check on the device
_lock = threading.RLock()


def passes(op: str, device: torch.device) -> bool:
    """Return True if a CUDA op passes its check on a device. The check runs once per process.

    While torch.compile traces or a CUDA graph is captured, no check can run, and the result is False unless
    the check ran before. A failing op causes a warning but no error. Random generators and the state of
    autograd do not change.

    Args:
        op: name of the library, a key of `CHECKS`. The library must be loaded.
        device: device; without an index, the current device.

    Raises: KeyError for an op that has no check.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    check_key = op, device
    # During tracing and capture, results of ops cannot be read. Nothing is
    # stored here, so that a later call can run the check.
    if check_key not in _results and (
        torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return False
    if check_key not in _results:
        with _lock:
            # Another thread may have run the check while this thread waited.
            if check_key not in _results:
                _results[check_key] = _try(op, CHECKS[op], device)
    return _results[check_key]


def _try(op: str, check: Check, device: torch.device) -> bool:
    """Run the check of an op. Return True if the op passes; otherwise print a warning and return False.

    Args:
        op: name of the op, for the warning.
        check: function that yields pairs of results of the op and of plain torch.
        device: device of the check.
    """
    try:
        # The modes of the caller must not apply to the check: inference
        # mode and no_grad would switch off gradients.
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            largest_difference = max(
                _difference(actual_output, expected_output)
                for actual_output, expected_output in check(device)
            )
    # NotImplementedError means that no kernel is registered for the device.
    except (RuntimeError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0] if str(error) else "no message"
        reason = f"it ended with {type(error).__name__}: {first_line}"
    else:
        if largest_difference <= TOLERANCE:
            return True
        reason = f"its results differ from plain torch by {largest_difference:.2g} of the largest value"
    warnings.warn(
        f"op {op} on {device}: the compiled op is turned off, because {reason}. Plain torch is used, which"
        " is slower. Please report this.",
        stacklevel=4,  # the line that called the op
    )
    return False


def _difference(actual_output: torch.Tensor, expected_output: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected value.

    It is infinite if the shapes differ or a value is NaN.

    Args:
        actual_output: result of the op.
        expected_output: result of plain torch.
    """
    if actual_output.shape != expected_output.shape:
        return float("inf")
    expected_output = expected_output.double()
    difference = (
        actual_output.double() - expected_output
    ).abs().max() / expected_output.abs().max().clamp_min(1e-12)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def _numbers(device: torch.device, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Return fixed float32 values between -scale and scale that look random.

    Args:
        device: device of the result.
        shape: shape of the result.
        scale: largest magnitude.
        seed: number that selects the values.
    """
    # The sine of a growing phase is the same on every machine, and does not use torch's random generators.
    indices = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    wave_values = scale * torch.sin(indices**1.5 * 12.9898 + 78.233 * (seed + 1))
    return wave_values.float().reshape(shape).to(device)


def _with_gradients(
    run_compiled: Callable,
    run_backward: Callable,
    run_reference: Callable,
    inputs: Sequence[torch.Tensor],
    differentiable_indices: Sequence[int],
    device: torch.device,
) -> Iterator[Pair]:
    """Yield each output and each gradient of an op together with the value of plain torch in float64.

    Args:
        run_compiled: function of the inputs that calls the compiled op and returns its outputs.
        run_backward: function of the cotangents and the inputs that calls the compiled backward pass. It
            returns the gradients of the inputs that `differentiable_indices` names. A cotangent is the
            gradient of a loss with respect to an output.
        run_reference: function of the inputs that computes the same outputs in plain torch.
        inputs: float32 tensors.
        differentiable_indices: indices of the inputs that have gradients.
        device: device of the cotangents.
    """
    actual_outputs = run_compiled(*inputs)
    # The reference is computed in float64 on the same device, so its rounding error is negligible.
    double_inputs = [t.double().requires_grad_(i in differentiable_indices) for i, t in enumerate(inputs)]
    expected_outputs = run_reference(*double_inputs)
    # With cotangents of 1, an op that permutes the entries of a gradient could pass.
    cotangents = [_numbers(device, *t.shape, seed=50 + i) for i, t in enumerate(actual_outputs)]
    expected_grads = torch.autograd.grad(
        expected_outputs, [double_inputs[i] for i in differentiable_indices], [c.double() for c in cotangents]
    )
    yield from zip(actual_outputs, (t.detach() for t in expected_outputs), strict=True)
    yield from zip(run_backward(*cotangents, *inputs), expected_grads, strict=True)


def _slab_density(device: torch.device) -> Iterator[Pair]:
    """Yield each result and gradient of the compiled slab_density together with that of its definition."""
    # The sizes are no multiples of the kernel's tiles, so that incomplete tiles occur.
    shape = (9, 35, 34)
    unit_count = 5  # J
    input_shapes = (
        (shape[0], unit_count, shape[1]),  # xy
        (shape[0], unit_count, shape[2]),  # xz
        (unit_count, shape[1], shape[2]),  # yz
        (unit_count,),  # w
        (),  # b
    )
    inputs = [_numbers(device, *input_shape, scale=3.0, seed=i) for i, input_shape in enumerate(input_shapes)]

    def run_backward(cotangent, xy, xz, yz, w, b):
        grad_w, *maps = _ops.slab_density_backward(cotangent, xy, xz, yz, w)
        return [*maps, grad_w]

    def run_reference(xy, xz, yz, w, b):
        return (slab_density_ref([xy[:, :, :, None], xz[:, :, None], yz[None]], w, b, shape),)

    yield from _with_gradients(
        lambda *t: (_ops.slab_density(*t, list(shape)),),
        run_backward,
        run_reference,
        inputs,
        range(4),
        device,
    )


def _triplane_decode(device: torch.device) -> Iterator[Pair]:
    """Yield each result and gradient of the compiled triplane_decode together with that of plain torch."""
    axis_pairs = ((0, 1), (0, 2), (2, 1))  # axes of three different planes
    unit_count = 18  # J, no multiple of the 32 threads of a warp
    # With colours and without colours, which the kernel computes in different branches
    for channel_count, colour_count in ((32, 32), (16, 0)):
        input_shapes = (
            (2, 3, 7, 9, channel_count),  # planes, neither square nor of a power of two
            (2, 150, 3),  # points, some of them outside the box
            (unit_count, channel_count),  # w0
            (unit_count,),  # b0
            (1 + colour_count, unit_count),  # w1
            (1 + colour_count,),  # b1
        )
        inputs = [
            _numbers(device, *input_shape, scale=1.1, seed=i) for i, input_shape in enumerate(input_shapes)
        ]
        axes = [axis for axis_pair in axis_pairs for axis in axis_pair]

        def run_compiled(planes, *other_inputs):
            # Without colours the first output is empty, and there is nothing to compare.
            return _ops.triplane_decode(planes, axes, *other_inputs)[0 if colour_count else 1 :]  # noqa: B023

        def run_backward(*tensors):
            *cotangents, planes, points, w0, b0, w1, b1 = tensors
            grad_features = cotangents[0] if colour_count else points.new_empty(2, 150, 0)  # noqa: B023
            op_arguments = (planes, axes, points, w0, b0, w1, b1)  # noqa: B023
            return _ops.triplane_decode_backward(grad_features, cotangents[-1], *op_arguments)

        def run_reference(planes, points, *weights):
            # None: planes without slices, which are what the op decodes
            decoded = _decode_torch(planes, axis_pairs, None, points, *weights)
            return decoded[0 if colour_count else 1 :]  # noqa: B023

        yield from _with_gradients(run_compiled, run_backward, run_reference, inputs, (0, 2, 3, 4, 5), device)


def _ray_march(device: torch.device) -> Iterator[Pair]:
    """Yield each result of the compiled ray_march and importance_depths with that of its definition.

    The gradient of ray_march with respect to densities is a further pair.
    """
    ray_count = 9
    sample_count = 45
    fine_count = 37
    densities = _numbers(device, ray_count, sample_count, scale=4.0)
    depths = 2.5 + _numbers(device, ray_count, sample_count, scale=0.5, seed=1)
    yield from _with_gradients(
        _ops.ray_march,
        lambda *t: (_ops.ray_march_backward(*t),),
        ray_march_ref,
        [densities, depths],
        (0,),
        device,
    )
    # `ray_march` takes depths in any order, `importance_depths` only in ascending order.
    ascending_depths = depths.sort(dim=1).values
    # Random numbers in 0.01..0.99, because rounding matters at the ends of the distribution
    u = 0.5 + _numbers(device, ray_count, fine_count, scale=0.49, seed=2)
    coarse_weights, centre_depths = interval_weights(densities.double(), ascending_depths.double())
    yield (
        _ops.importance_depths(densities, ascending_depths, u),
        invert_density(centre_depths, smooth_weights(coarse_weights), u.double()),
    )


def _bias_act(device: torch.device) -> Iterator[Pair]:
    """Yield each result and gradient of the compiled bias_act together with the value of its formula."""
    x = _numbers(device, 3, 5, 7, 11, scale=3.0)
    cotangent = _numbers(device, 3, 5, 7, 11, seed=1)
    b = _numbers(device, 5, seed=2)
    # The kernel computes indices differently for the two memory layouts.
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        cotangent = cotangent.contiguous(memory_format=layout)
        for act, activation_name in enumerate(activation_funcs):
            op_settings = (1, act, 0.3, 1.5, 2.0)  # dim, act, alpha, gain, clamp
            activation_output = _ops.bias_act(x, b, *op_settings)
            yield (
                activation_output,
                bias_act_ref(x.double(), b.double(), 1, activation_funcs[activation_name], *op_settings[2:]),
            )
            # Only these three activations have compiled gradients. The other gradients are computed by torch.
            if activation_name in ("linear", "relu", "lrelu"):
                negative_slope = {"linear": 1.0, "relu": 0.0, "lrelu": 0.3}[activation_name]
                # gain * slope of the activation, and 0 for clamped outputs
                slope = (
                    1.5
                    * torch.where(activation_output > 0, 1.0, negative_slope).double()
                    * (activation_output.abs() < 2.0)
                )
                yield from zip(
                    _ops.bias_act_backward(cotangent, activation_output, *op_settings, True),
                    (slope * cotangent, (slope * cotangent).sum((0, 2, 3))),
                    strict=True,
                )
                yield (
                    _ops.bias_act_slope(cotangent, b, activation_output, *op_settings),
                    slope * (cotangent + b[:, None, None]),
                )


def _upfirdn2d(device: torch.device) -> Iterator[Pair]:
    """Yield each result of the compiled upfirdn2d together with that of its definition."""
    x = _numbers(device, 2, 3, 37, 41)
    taps_2d = _numbers(device, 4, 3, seed=1)  # not symmetric
    taps_1d = _numbers(device, 7, seed=2)  # applied along rows and columns
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for f in (taps_2d, taps_1d):
            for up, down, pad in (
                (1, 1, (1, 2, 1, 2)),  # filter
                (2, 1, (2, 5, 2, 1)),  # upsample
                (1, 2, (3, 1, 1, 1)),  # downsample
                (3, 2, (4, -1, 0, 6)),  # upsample and downsample, with a border that is cropped
            ):
                resample_settings = ((up, up), (down, down), pad)
                actual_output = _ops.upfirdn2d(
                    image, f, *(list(factors) for factors in resample_settings), False, 1.5
                )
                yield actual_output, upfirdn2d_ref(image.double(), f.double(), *resample_settings, False, 1.5)


CHECKS: dict[str, Check] = {
    "bias_act": _bias_act,
    "ray_march": _ray_march,
    "slab_density": _slab_density,
    "triplane_decode": _triplane_decode,
    "upfirdn2d": _upfirdn2d,
}
