"""Parts of a residual squeeze-and-excitation block on volumes, and their gradients, on a CPU.

    conv     y = [relu](conv3x3x3(scale * x + shift, zeros outside) [+ residual]), with the sum and the sum of
    squares of
             each channel
    up       y = skip + the transposed convolution (3x3x3, stride 2, padding 1) of x, resampled to the skip's
    size by its
             nearest neighbour, int(i * in / out), with the same sums
    gate     y = h * max(channel gate, sigmoid(w . h + b)) for h >= 0
    profile  largest response per depth slice of a 1x1x1 convolution after `gate`

From the sums, the next group normalisation becomes a scale and a shift per channel, which needs no pass of
its own over the volume. Its gradient is a linear combination of the incoming gradient, the volume and a
constant, once the sums of both products are known. These sums come out of the gradient's own convolution, and
the pass that reads them next applies them with the ReLU's mask (`volume_conv_gradient`).

The convolution is direct along z and x and uses Winograd's F(4, 3) along y (Lavin & Gray 2016), which takes
half of the definition's products. The largest difference from torch's convolution, relative to the largest
value, is 1e-6 (8 and 16 channels).

Shapes: N batch, C input and O output channels, D, H, W.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import choose, define

_LANES = 8  # output channels that are computed together
_LEAST_WIDTH = 4  # W; narrower volumes fill the vectors badly
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
# F(4, 3): rows that transform the three taps of the kernel along y into six.
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def _compiled(impl: str, *tensors: torch.Tensor | None) -> bool:
    """Return whether the compiled op is used. It has no autograd, so it needs tensors without gradients."""
    given = [t for t in tensors if t is not None]
    supported = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
    applies = supported and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    return choose("volume_block", impl, "volume_block", given[0].device.type, applies) == "compiled"


def transformed_kernel(w: torch.Tensor) -> torch.Tensor:
    """Return kernels w [(N,) O, C, 3, 3, 3] in the form of `volume_conv`, [N or 1, O/8, 6, 3, C, 3, 8].

    The axes after O/8 are: taps along y, z, input, x, output.
    """
    w = w[None] if w.ndim == 5 else w  # [N or 1, O, C, 3, 3, 3]
    taps = torch.tensor(_TAPS, dtype=torch.float64)
    # Transformed in float64 and rounded once.
    u = torch.einsum("ky,noczyx->nokzcx", taps, w.detach().double().cpu()).float()  # [N, O, 6, 3, C, 3]
    # [N, O/8, 8, 6, 3, C, 3] -> [N, O/8, 6, 3, C, 3, 8]
    return u.unflatten(1, (-1, _LANES)).permute(0, 1, 3, 4, 5, 6, 2).contiguous()


def transposed_kernel(w: torch.Tensor) -> torch.Tensor:
    """Return kernels w [C, O, 3, 3, 3] in the form of `volume_up`, [O/8, C, 27, 8]."""
    # [C, O, 27] -> [C, O/8, 8, 27] -> [O/8, C, 27, 8]: a vector of 8 outputs lies together in memory.
    return w.detach().flatten(2).unflatten(1, (-1, _LANES)).permute(1, 0, 3, 2).contiguous()


def _memory(out: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return `out`, after a check, or new memory."""
    if out is None:
        return like.new_empty(shape)
    assert out.shape == torch.Size(shape) and out.is_contiguous() and out.dtype == like.dtype
    return out


def _finished(y: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y, in the memory of `out` if given, and the sums [N, C, 2] of y and y^2 per channel."""
    y = y if out is None else out.copy_(y)
    flat = y.flatten(2)  # [N, C, D H W]
    # float64: the variance is a small difference of large sums.
    return y, torch.stack([flat.sum(dim=2, dtype=torch.float64), flat.double().square().sum(dim=2)], dim=2)


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
    """Compute the normalised 3x3x3 convolution.

    Args:
        x: [N, C, D, H, W], or one channel from which all C inputs are made.
        scale, shift: [N, C].
        w: [O, C, 3, 3, 3], or [N, O, C, 3, 3, 3] with kernels for each sample.
        u: `transformed_kernel(w)`, computed if not given.
        residual: shape of the result; or [N, 1, D, H, W] with mix [O, 2], a factor and an offset per output.
        relu: apply a ReLU at the end.
        out: memory for y, contiguous; may be that of the residual.
        impl: see `torch_utils.ops.implementations`. "auto" takes the compiled op if O is a multiple of 8 and
            W is at least 4, since narrower volumes fill its vectors badly.
    Returns: y [N, O, D, H, W] and sums [N, O, 2] float64 of y and y^2.
    """
    samples, inputs = scale.shape
    assert (
        x.ndim == 5
        and w.shape[-4:] == (inputs, 3, 3, 3)
        and x.shape[1] in (1, inputs)
        and (w.ndim == 5 or len(w) == samples)
    )
    fits = w.shape[-5] % _LANES == 0 and (impl == "compiled" or x.shape[4] >= _LEAST_WIDTH)
    if fits and _compiled(impl, x, scale, shift, residual, mix):
        u = transformed_kernel(w) if u is None else u
        residual, mix = (None if t is None else t.contiguous() for t in (residual, mix))
        # The kernel writes into given memory, so that a caller can reuse one volume for several layers.
        y = _memory(out, x, (samples, w.shape[-5], *x.shape[2:]))
        return y, torch.ops.eg3d_rlhf.volume_conv(
            x.contiguous(), scale.contiguous(), shift.contiguous(), u, residual, mix, relu, y
        )
    # Normalise first, then pad: outside, the normalised volume is 0. One channel broadcasts to all C inputs.
    x = x * scale[:, :, None, None, None] + shift[:, :, None, None, None]
    y = (
        F.conv3d(x, w, padding=1)
        if w.ndim == 5
        # torch has no kernels per sample; the samples are convolved one by one.
        else torch.cat([F.conv3d(a[None], k, padding=1) for a, k in zip(x, w, strict=True)])
    )
    if mix is not None and residual is not None:
        # One channel becomes O of them: [N, 1, D, H, W] -> [N, O, D, H, W].
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
    """Compute skip + the transposed convolution of x, resampled to the size of skip.

    Args:
        skip: [N, O, D, H, W].
        x: [N, C, d, h, w].
        w: [C, O, 3, 3, 3].
        u: `transposed_kernel(w)`, computed if not given.
        out: memory for the result, contiguous; may be that of skip.
    Returns: y [N, O, D, H, W] and sums [N, O, 2] as in `volume_conv`.
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
    channel: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
    pool: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply h by the larger of the channel gate and the spatial gate.

    Args:
        h: [N, C, D, H, W] >= 0.
        channel: [N, C], gate per channel.
        w: [C]; b: [1]; the spatial gate is sigmoid(w . h + b).
        out: memory for the result, contiguous; may be that of h.
        pool: also return the maxima over 2^3 voxels.
    """
    if _compiled(impl, h, channel, w, b):
        y = _memory(out, h, h.shape)
        small = torch.ops.eg3d_rlhf.volume_gate(
            h.contiguous(), channel.contiguous(), w.contiguous(), b, y, pool
        )
        return y, small if pool else None
    # The channel gate [N, C] is broadcast over voxels, the spatial gate [N, D, H, W] over channels.
    y = h * torch.maximum(
        channel[:, :, None, None, None], torch.sigmoid(torch.einsum("ncdhw,c->ndhw", h, w) + b)[:, None]
    )
    y = y if out is None else out.copy_(y)
    return y, F.max_pool3d(y, 2) if pool else None


def volume_profile(
    h: torch.Tensor,
    channel: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    final_w: torch.Tensor,
    final_b: torch.Tensor,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest response of each depth slice.

    A response is final_w . y + final_b, with y = h after the gate. The maximum is over responses, rows and
    columns.

    Args:
        h, channel, w, b: see `volume_gate`.
        final_w: [R, C]; final_b: [R].
    Returns: values [N, D], and their places y W + x.
    """
    if _compiled(impl, h, channel, w, b, final_w, final_b):
        given = (h, channel, w, b, final_w, final_b)
        return torch.ops.eg3d_rlhf.volume_profile(*(t.contiguous() for t in given))
    # [N, R, D, H, W] -> [N, D, H, W] -> [N, D, H W] -> [N, D]
    response = (
        torch.einsum("ncdhw,rc->nrdhw", volume_gate(h, channel, w, b, impl=impl)[0], final_w)
        + final_b[:, None, None, None]
    )
    return response.amax(dim=1).flatten(2).max(dim=2)


def volume_conv_gradient(
    g: torch.Tensor,
    h: torch.Tensor,
    factors: torch.Tensor,
    u: torch.Tensor,
    other: torch.Tensor,
    mix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of a normalised convolution with respect to its input.

    The gradient of its result h is f0 g + f1 h + f2 where h > 0.

    Args:
        g, h: [N, O, D, H, W].
        factors: f, [N, O, 3].
        u: `transformed_kernel(turned(w))`.
        other: input [N, C, D, H, W]; or, with mix [C, 2], one channel of which each input is a factor and an
            offset.
    Returns: y [N, C, D, H, W] and the sums [N, C, 2] float64 of y and y * other.
    """
    # u has the form of `transformed_kernel`, [1, C/8, ...], for C outputs of this convolution.
    y = g.new_empty([len(g), u.shape[1] * _LANES, *g.shape[2:]])
    return y, torch.ops.eg3d_rlhf.volume_conv_gradient(g, h, factors.contiguous(), u, other, mix, y)


def volume_conv_weight(
    g: torch.Tensor,
    h: torch.Tensor,
    factors: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Compute the gradient of a normalised convolution with respect to its kernels, [O, C, 3, 3, 3].

    The result is bitwise identical for any number of threads.

    Args:
        g, h, factors: gradient of its result, see `volume_conv_gradient`.
        x, scale, shift: its input, see `volume_conv`.
    """
    return torch.ops.eg3d_rlhf.volume_conv_weight(
        g, h, factors.contiguous(), x, scale.contiguous(), shift.contiguous()
    )[0].float()


def volume_gate_gradient(
    h: torch.Tensor,
    channel: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    full: torch.Tensor | None,
    pooled: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of `volume_gate` with respect to h, and to channel, w and b.

    The gradient of a maximum goes to the first voxel that attains it. Where h is 0 the gradient is not
    defined: the ReLU before it drops it.

    Args:
        h, channel, w, b: see `volume_gate`.
        full, pooled: gradients of its two results; None for 0.
    Returns: [N, C, D, H, W], and [N, 2 C + 1] float64.
    """
    full, pooled = (None if t is None else t.contiguous() for t in (full, pooled))
    y = torch.empty_like(h)  # gradient of h; the other gradients are the op's result
    return y, torch.ops.eg3d_rlhf.volume_gate_gradient(
        h, channel.contiguous(), w.contiguous(), b, full, pooled, y
    )


def volume_join(
    g: torch.Tensor,
    h: torch.Tensor,
    inner: torch.Tensor,
    r: torch.Tensor,
    factors: torch.Tensor,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradient of a block's residual r: (g + f0 where h > 0) + f1 inner + f2 r + f3.

    Args:
        factors: f, [N, C, 4].
        mix: [C, 2]; the channels of r are then a factor and an offset of the one channel that is given.
    Returns: the gradient, in the memory of g; with mix that of the one channel, in new memory.
    """
    # In place where the shapes agree: the incoming gradient is not needed any more.
    y = g if mix is None else torch.empty_like(r)
    torch.ops.eg3d_rlhf.volume_join(g, h, inner, r, factors.contiguous(), mix, y)
    return y


def volume_up_gradient(grad: torch.Tensor, u: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Compute the gradient of `volume_up` with respect to x, [N, C, *size], from that of its result [N, O, D,
    H, W].

    Args: u: `transposed_kernel(w.transpose(0, 1))`.
    """
    y = grad.new_empty([len(grad), u.shape[0] * _LANES, *size])  # u is [C/8, O, 27, 8]
    torch.ops.eg3d_rlhf.volume_up_gradient(grad.contiguous(), u, y)
    return y


def turned(w: torch.Tensor) -> torch.Tensor:
    """Return the kernels [C, O, 3, 3, 3] of the gradient of a convolution by w [O, C, 3, 3, 3]."""
    # The adjoint of a convolution exchanges inputs and outputs and reverses the taps.
    return w.transpose(0, 1).flip(2, 3, 4)


def differentiable() -> bool:
    """Return whether the gradients are available here. There is no torch path for them."""
    return all(
        choose("volume_block", "auto", op, "cpu") == "compiled"
        for op in ("volume_block", "volume_block_gradients")
    )
