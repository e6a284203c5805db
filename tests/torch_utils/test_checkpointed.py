"""Every op's gradient may be taken under torch's checkpoint, which unpacks a saved tensor a single time."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.torch_utils import compilers
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv3x3 import conv3x3, conv3x3_down, conv3x3_up
from torch_utils.ops.grid_sample_gradfix import grid_sample
from torch_utils.ops.implementations import implementation
from torch_utils.ops.linear import linear
from torch_utils.ops.ray_march import ray_march
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.transformer import feed_forward, self_attention
from torch_utils.ops.triplane_decode import DecoderWeights, triplane_decode
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

noise = functools.partial(compilers.noise, dtype=torch.float32)
PAIRS = ((0, 1), (0, 2), (2, 0))
OPS = {  # of tensors that all take gradients; large enough for the ways of large tensors
    "bias_act": (lambda x, b: bias_act(x, b, act="lrelu"), (noise(2, 3, 4, 5), noise(3))),
    "bias_act, swish": (lambda x, b: bias_act(x, b, act="swish"), (noise(2, 3, 4, 5), noise(3))),
    "conv3x3": (conv3x3, (noise(1, 32, 32, 32), noise(32, 32, 3, 3))),
    "conv3x3_down": (
        conv3x3_down,
        (noise(1, 16, 65, 65).contiguous(memory_format=torch.channels_last), noise(16, 16, 3, 3)),
    ),
    "conv3x3_up": (
        conv3x3_up,
        (noise(1, 16, 32, 32).contiguous(memory_format=torch.channels_last), noise(16, 16, 3, 3)),
    ),
    "feed_forward": (
        feed_forward,
        (noise(600, 64), noise(2048, 64), noise(2048), noise(64, 2048), noise(64)),
    ),
    "grid_sample": (grid_sample, (noise(1, 3, 8, 8), noise(1, 4, 4, 2) / 2)),
    "linear": (linear, (noise(300, 128), noise(128, 128))),
    "ray_march": (lambda d: ray_march(d, noise(9, 7, seed=1))[0], (noise(9, 7),)),
    "self_attention": (self_attention, (noise(1, 520, 3, 1, 8),)),
    "slab_density": (
        lambda a, b, w: slab_density([a, b], w, torch.zeros(()), (4, 5, 6)),
        (noise(4, 3, 5, 1), noise(4, 3, 1, 6), noise(3)),
    ),
    "triplane_decode": (
        lambda p, *w: triplane_decode(p, PAIRS, noise(1, 50, 3), 1.6, DecoderWeights(*w))[0],
        (noise(1, 3, 5, 7, 7), noise(9, 5), noise(9), noise(4, 9), noise(4)),
    ),
    "upfirdn2d": (lambda x: upfirdn2d(x, setup_filter([1, 3, 3, 1]), up=2), (noise(1, 3, 8, 8),)),
}


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_without_a_checkpoint(op, impl):
    call, inputs = OPS[op]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with implementation(impl):
        expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
        again = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
