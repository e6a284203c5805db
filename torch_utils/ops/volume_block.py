"""Parts of a residual squeeze-and-excitation block on volumes, and their gradients, on a CPU.

    conv     y = conv3x3x3(scale * x + shift, zeros outside), optionally plus a residual and followed by a
             ReLU
    up       y = skip + the transposed convolution (3x3x3, stride 2, padding 1) of x, resampled to
             the size of `skip` by nearest neighbour: voxel i reads voxel int(i * in / out)
    gate     y = h * max(channel gate, sigmoid(w . h + b)) for h >= 0
    profile  largest value in each depth slice of a 1x1x1 convolution after `gate`

`conv` and `up` also return the sum and the sum of squares of each channel. From these sums, the next group
normalisation is a scale and a shift for each channel, so that it needs no separate pass over the volume. The
gradient of the normalisation is a linear combination of the incoming gradient, the volume and a constant. Its
factors follow from sums that the convolution of the gradient computes, and the next function applies them
(`volume_conv_gradient`).

The convolution is computed directly along z and x, and by Winograd's F(4, 3) along y (Lavin and Gray 2016),
which takes half of the multiplications. The largest difference from torch's convolution, relative to the
largest value, is 1e-6 (8 and 16 channels).

Shapes: N samples, C input and O output channels, D x H x W voxels, R channels of the final convolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import choose, define

_LANES = 8  # number of output channels that are computed together
# Smallest W for which "auto" uses the compiled op; narrower volumes do not fill vector registers
_MIN_WIDTH = 4
# The compiled ops write their main result y into memory that the caller supplies (Tensor(a!) y).
define(
    "volume_conv(Tensor x, Tensor scale, Tensor shift, Tensor u, Tensor? residual, Tensor? mix, bool relu,"
    " Tensor(a!) y) -> Tensor"
)
define("volume_up(Tensor skip, Tensor x, Tensor w, Tensor(a!) y) -> Tensor")
define("volume_gate(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor(a!) y, bool pool) -> Tensor")
define(
    "volume_profile(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor final_w, Tensor final_b) -> (Tensor,"
    " Tensor)"
)
define(
    "volume_conv_gradient(Tensor g, Tensor h, Tensor factors, Tensor u, Tensor other, Tensor? mix, Tensor(a!)"
    " y) -> Tensor"
)
define(
    "volume_gate_gradient(Tensor h, Tensor channel, Tensor w, Tensor b, Tensor? whole, Tensor? pooled,"
    " Tensor(a!) y) -> Tensor"
)
define(
    "volume_join(Tensor g, Tensor h, Tensor inner, Tensor r, Tensor factors, Tensor? mix, Tensor(a!) y) -> ()"
)
define(
    "volume_conv_weight(Tensor g, Tensor h, Tensor factors, Tensor x, Tensor scale, Tensor shift) -> Tensor"
)
define("volume_up_gradient(Tensor grad, Tensor u, Tensor(a!) y) -> ()")
# Matrix G of Winograd's F(4, 3), which transforms the three taps of a kernel along y into six
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def _compiled(impl: str, *tensors: torch.Tensor | None) -> bool:
    """Return True if the compiled op is used.

    It has no autograd formula, so no tensor may need a gradient.
    """
    present_tensors = [t for t in tensors if t is not None]
    are_float32_on_cpu = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in present_tensors)
    is_supported = are_float32_on_cpu and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in present_tensors)
    )
    device_type = present_tensors[0].device.type
    return choose("volume_block", impl, "volume_block", device_type, is_supported) == "compiled"


def transformed_kernel(w: torch.Tensor) -> torch.Tensor:
    """Transform kernels for `volume_conv`.

    Args:
        w: kernels [O, C, 3, 3, 3], or [N, O, C, 3, 3, 3] with kernels for each sample.

    Returns: transformed kernels [N or 1, O/8, 6, 3, C, 3, 8]. The axes after O/8 are the taps along y, the
        taps along z, the input channels, the taps along x, and 8 output channels.
    """
    w = w[None] if w.ndim == 5 else w  # [N or 1, O, C, 3, 3, 3]
    taps = torch.tensor(_TAPS, dtype=torch.float64)
    # Computed in float64 and rounded once
    u = torch.einsum("ky,noczyx->nokzcx", taps, w.detach().double().cpu()).float()  # [N, O, 6, 3, C, 3]
    # [N, O/8, 8, 6, 3, C, 3] -> [N, O/8, 6, 3, C, 3, 8]
    return u.unflatten(1, (-1, _LANES)).permute(0, 1, 3, 4, 5, 6, 2).contiguous()


def transposed_kernel(w: torch.Tensor) -> torch.Tensor:
    """Reorder kernels w [C, O, 3, 3, 3] for `volume_up`, [O/8, C, 27, 8]."""
    # [C, O, 27] -> [C, O/8, 8, 27] -> [O/8, C, 27, 8]: the values
    # of 8 output channels are adjacent in memory.
    return w.detach().flatten(2).unflatten(1, (-1, _LANES)).permute(1, 0, 3, 2).contiguous()


def _memory(out: torch.Tensor | None, template: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return memory for a result.

    Args:
        out: memory of the caller, which is checked and returned; None allocates new memory.
        template: tensor whose dtype and device the new memory has.
        shape: shape of the result.
    """
    if out is None:
        return template.new_empty(shape)
    assert out.shape == torch.Size(shape) and out.is_contiguous() and out.dtype == template.dtype
    return out


def _finished(y: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y, copied to `out` if that is given, and the sums of y and y^2 over each channel, [N, C, 2].

    The returned volume is contiguous: with weights in the layout channels-last, torch's convolution returns
    volumes in that layout, which the ops for the gradients would misread.
    """
    y = y.contiguous() if out is None else out.copy_(y)
    flat_y = y.flatten(2)  # [N, C, D H W]
    # In float64, because a variance is computed as a small difference of large sums.
    return y, torch.stack(
        [flat_y.sum(dim=2, dtype=torch.float64), flat_y.double().square().sum(dim=2)], dim=2
    )


def volume_conv(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    relu: bool = False,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a 3x3x3 convolution of a volume that is scaled and shifted first.

    Args:
        x: volumes [N, C, D, H, W], or [N, 1, D, H, W] for the same volume in all C input channels.
        scale: factors [N, C] of the input channels.
        shift: offsets [N, C] of the input channels.
        w: kernels [O, C, 3, 3, 3], or [N, O, C, 3, 3, 3] with kernels for each sample.
        u: `transformed_kernel(w)`; None computes it if it is needed.
        residual: volume that is added to the result, [N, O, D, H, W]; with `mix` [N, 1, D, H, W]; None adds
            nothing.
        mix: factor and offset [O, 2] that make each output channel of the residual from its single channel;
            None: the residual has O channels.
        relu: True applies a ReLU at the end.
        out: contiguous memory for y, which may be that of the residual; None allocates memory.
        impl: see `torch_utils.ops.implementations`. "auto" uses the compiled op only if O is a multiple of 8
            and W is at least 4.

    Returns: y [N, O, D, H, W], and the sums of y and y^2 over each channel, [N, O, 2] float64.
    """
    sample_count, input_count = scale.shape
    assert (
        x.ndim == 5
        and w.shape[-4:] == (input_count, 3, 3, 3)
        and x.shape[1] in (1, input_count)
        and (w.ndim == 5 or len(w) == sample_count)
    )
    has_full_lanes = w.shape[-5] % _LANES == 0 and (impl == "compiled" or x.shape[4] >= _MIN_WIDTH)
    if has_full_lanes and _compiled(impl, x, scale, shift, residual, mix):
        u = transformed_kernel(w) if u is None else u
        residual, mix = (None if t is None else t.contiguous() for t in (residual, mix))
        # The caller may supply memory, so that several layers can use the same memory.
        y = _memory(out, x, (sample_count, w.shape[-5], *x.shape[2:]))
        return y, torch.ops.eg3d_rlhf.volume_conv(
            x.contiguous(), scale.contiguous(), shift.contiguous(), u, residual, mix, relu, y
        )
    # Scale before the convolution pads, because the scaled volume is
    # 0 outside. A single channel broadcasts to C.
    x = x * scale[:, :, None, None, None] + shift[:, :, None, None, None]
    y = (
        F.conv3d(x, w, padding=1)
        if w.ndim == 5
        # torch's convolution has the same kernels for all samples, so samples are convolved one by one.
        else torch.cat(
            [
                F.conv3d(sample[None], sample_kernels, padding=1)
                for sample, sample_kernels in zip(x, w, strict=True)
            ]
        )
    )
    if mix is not None and residual is not None:
        # [N, 1, D, H, W] -> [N, O, D, H, W]
        residual = residual * mix[None, :, 0, None, None, None] + mix[None, :, 1, None, None, None]
    y = y if residual is None else y + residual
    return _finished(F.relu(y) if relu else y, out)


def volume_up(
    skip: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the transposed convolution of x, resampled to the size of `skip`, to the volumes `skip`.

    Args:
        skip: volumes [N, O, D, H, W].
        x: volumes of about half the size, [N, C, depth, height, width].
        w: kernels [C, O, 3, 3, 3].
        u: `transposed_kernel(w)`; None computes it if it is needed.
        out: contiguous memory for the result, which may be that of `skip`; None allocates memory.
        impl: see `torch_utils.ops.implementations`.

    Returns: y [N, O, D, H, W], and the sums of y and y^2 over each channel, [N, O, 2] float64.
    """
    if skip.shape[1] % _LANES == 0 and _compiled(impl, skip, x):
        y = _memory(out, skip, skip.shape)
        return y, torch.ops.eg3d_rlhf.volume_up(
            skip.contiguous(), x.contiguous(), transposed_kernel(w) if u is None else u, y
        )
    y = skip + F.interpolate(
        F.conv_transpose3d(x, w, stride=2, padding=1), size=tuple(skip.shape[2:]), mode="nearest"
    )
    return _finished(y, out)


def volume_gate(
    h: torch.Tensor,
    channel_gate: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
    pool: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply volumes by the larger one of a channel gate and a spatial gate.

    Args:
        h: volumes [N, C, D, H, W] >= 0.
        channel_gate: channel gate [N, C].
        w: weights [C] of the spatial gate, which is sigmoid(w . h + b) at each voxel.
        b: bias [1] of the spatial gate.
        out: contiguous memory for the result, which may be that of h; None allocates memory.
        pool: True also returns the maxima over blocks of 2^3 voxels.
        impl: see `torch_utils.ops.implementations`.

    Returns: the result [N, C, D, H, W], and its maxima over blocks, or None if `pool` is False.
    """
    if _compiled(impl, h, channel_gate, w, b):
        y = _memory(out, h, h.shape)
        pooled = torch.ops.eg3d_rlhf.volume_gate(
            h.contiguous(), channel_gate.contiguous(), w.contiguous(), b, y, pool
        )
        return y, pooled if pool else None
    # The channel gate [N, C] is broadcast over voxels, the spatial gate [N, D, H, W] over channels.
    y = h * torch.maximum(
        channel_gate[:, :, None, None, None], torch.sigmoid(torch.einsum("ncdhw,c->ndhw", h, w) + b)[:, None]
    )
    y = y if out is None else out.copy_(y)
    return y, F.max_pool3d(y, 2) if pool else None


def volume_profile(
    h: torch.Tensor,
    channel_gate: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    final_w: torch.Tensor,
    final_b: torch.Tensor,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the largest response in each depth slice.

    The responses at a voxel are final_w . y + final_b, where y is the result of `volume_gate`. The maximum is
    over the R responses, the rows and the columns.

    Args:
        h: volumes [N, C, D, H, W] >= 0.
        channel_gate: channel gate [N, C].
        w: weights [C] of the spatial gate.
        b: bias [1] of the spatial gate.
        final_w: weights [R, C] of the responses.
        final_b: biases [R] of the responses.
        impl: see `torch_utils.ops.implementations`.

    Returns: the maxima [N, D], and their positions row * W + column, [N, D].
    """
    if _compiled(impl, h, channel_gate, w, b, final_w, final_b):
        tensors = (h, channel_gate, w, b, final_w, final_b)
        return torch.ops.eg3d_rlhf.volume_profile(*(t.contiguous() for t in tensors))
    # [N, R, D, H, W] -> [N, D, H, W] -> [N, D, H W] -> [N, D]
    response = (
        torch.einsum("ncdhw,rc->nrdhw", volume_gate(h, channel_gate, w, b, impl=impl)[0], final_w)
        + final_b[:, None, None, None]
    )
    return response.amax(dim=1).flatten(2).max(dim=2)


def volume_conv_gradient(
    g: torch.Tensor,
    h: torch.Tensor,
    factors: torch.Tensor,
    u: torch.Tensor,
    conv_input: torch.Tensor,
    mix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of `volume_conv` with respect to its scaled and shifted input.

    The gradient of the result h is f0 g + f1 h + f2 where h > 0, and 0 elsewhere, with the factors f of each
    channel.

    Args:
        g: gradient [N, O, D, H, W] of the normalised result.
        h: result of the convolution after its ReLU, [N, O, D, H, W].
        factors: factors f0, f1 and f2, [N, O, 3].
        u: `transformed_kernel(adjoint_kernel(w))` for the kernels w of the convolution.
        conv_input: input of the convolution [N, C, D, H, W]; with `mix` [N, 1, D, H, W].
        mix: factor and offset [C, 2] that make each input channel from the single channel of
            `conv_input`; None: it has C channels.

    Returns: the gradient y [N, C, D, H, W], and the sums of y and of y * conv_input over each channel, [N, C,
        2] float64. With `mix`, conv_input stands here for the C channels that `mix` makes.
    """
    # u has the form of `transformed_kernel`, [1, C/8, ...], for C outputs of this convolution.
    y = g.new_empty([len(g), u.shape[1] * _LANES, *g.shape[2:]])
    g, h, factors, conv_input = (t.contiguous() for t in (g, h, factors, conv_input))
    return y, torch.ops.eg3d_rlhf.volume_conv_gradient(g, h, factors, u, conv_input, mix, y)


def volume_conv_weight(
    g: torch.Tensor,
    h: torch.Tensor,
    factors: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Compute the gradient of `volume_conv` with respect to its kernels, [O, C, 3, 3, 3].

    The result is bitwise identical for any number of threads.

    Args:
        g: gradient [N, O, D, H, W] of the normalised result, see `volume_conv_gradient`.
        h: result of the convolution after its ReLU, [N, O, D, H, W].
        factors: factors [N, O, 3] of the gradient.
        x: input of the convolution, see `volume_conv`.
        scale: factors [N, C] of the input channels.
        shift: offsets [N, C] of the input channels.
    """
    tensors = (g, h, factors, x, scale, shift)
    return torch.ops.eg3d_rlhf.volume_conv_weight(*(t.contiguous() for t in tensors))[0].float()


def volume_gate_gradient(
    h: torch.Tensor,
    channel_gate: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    result_grad: torch.Tensor | None,
    pooled_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of `volume_gate` with respect to h, channel_gate, w and b.

    The gradient of a maximum belongs to the first voxel with the maximal value. Where h is 0, the gradient
    with respect to h is not defined; the ReLU that computes h does not use it.

    Args:
        h: volumes [N, C, D, H, W] >= 0.
        channel_gate: channel gate [N, C].
        w: weights [C] of the spatial gate.
        b: bias [1] of the spatial gate.
        result_grad: gradient of the result [N, C, D, H, W]; None: it is 0.
        pooled_grad: gradient [N, C, D/2, H/2, W/2] of the maxima over blocks; None: it is 0.

    Returns: the gradient of h [N, C, D, H, W]; and the gradients of channel_gate, w and b in one float64
        tensor [N, 2 C + 1].
    """
    result_grad, pooled_grad = (None if t is None else t.contiguous() for t in (result_grad, pooled_grad))
    h = h.contiguous()
    y = torch.empty_like(h)  # gradient of h; the other gradients are the op's result
    return y, torch.ops.eg3d_rlhf.volume_gate_gradient(
        h, channel_gate.contiguous(), w.contiguous(), b, result_grad, pooled_grad, y
    )


def volume_join(
    g: torch.Tensor,
    h: torch.Tensor,
    inner_grad: torch.Tensor,
    residual: torch.Tensor,
    factors: torch.Tensor,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradient of a block with respect to its residual r.

    It is g + f0 where h > 0 (elsewhere 0), plus f1 inner_grad + f2 r + f3.

    Args:
        g: incoming gradient [N, C, D, H, W]. Without `mix`, it is overwritten if it is
            contiguous.
        h: volume whose sign is the mask of the ReLU, [N, C, D, H, W].
        inner_grad: gradient from the convolutions of the block, [N, C, D, H, W].
        residual: residual [N, C, D, H, W]; with `mix` [N, 1, D, H, W].
        factors: factors f0 to f3 of each channel, [N, C, 4].
        mix: factor and offset [C, 2] that make each channel of the residual from the single channel of
            r; None: the residual has C channels.

    Returns: the gradient, in the memory of g; with `mix` the gradient of the single channel, in new memory.
    """
    # Without `mix` the shapes are equal, and the incoming gradient is not needed afterwards.
    g, h, inner_grad, residual, factors = (t.contiguous() for t in (g, h, inner_grad, residual, factors))
    y = g if mix is None else torch.empty_like(residual)
    torch.ops.eg3d_rlhf.volume_join(g, h, inner_grad, residual, factors, mix, y)
    return y


def volume_up_gradient(grad: torch.Tensor, u: torch.Tensor, input_size: Sequence[int]) -> torch.Tensor:
    """Compute the gradient of `volume_up` with respect to x.

    Args:
        grad: gradient of the result, [N, O, D, H, W].
        u: `transposed_kernel(w.transpose(0, 1))` for the kernels w.
        input_size: depth, height and width of x.

    Returns: the gradient [N, C, *input_size].
    """
    y = grad.new_empty([len(grad), u.shape[0] * _LANES, *input_size])  # u is [C/8, O, 27, 8]
    torch.ops.eg3d_rlhf.volume_up_gradient(grad.contiguous(), u, y)
    return y


def adjoint_kernel(w: torch.Tensor) -> torch.Tensor:
    """Return the kernels [C, O, 3, 3, 3] of the gradient of a convolution.

    Args:
        w: kernels [O, C, 3, 3, 3] of the convolution.
    """
    # The adjoint of a convolution exchanges input and output channels and reverses the taps.
    return w.transpose(0, 1).flip(2, 3, 4)


def differentiable() -> bool:
    """Return True if the compiled ops for the gradients can be used. They have no implementation in torch."""
    return all(
        choose("volume_block", "auto", op, "cpu") == "compiled"
        for op in ("volume_block", "volume_block_gradients")
    )
