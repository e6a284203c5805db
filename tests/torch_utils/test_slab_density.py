"""The density op: its three implementations against each other and against finite differences."""

import itertools

import pytest
import torch

from tests.rejections import raising
from tests.torch_utils.compilers import needs_cpp
from torch_utils import build
from torch_utils.ops import slab_density as module
from torch_utils.ops.implementations import implementation
from torch_utils.ops.slab_density import slab_density, slab_density_ref

LAYOUTS = [kinds for count in (1, 2, 3) for kinds in itertools.combinations(("xy", "xz", "yz"), count)]


def random_inputs(kinds, shape, units, dtype=torch.float64, scale=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, y, z = shape
    sizes = {"xy": (x, units, y, 1), "xz": (x, units, 1, z), "yz": (1, units, y, z)}
    maps = [torch.randn(sizes[kind], generator=rng, dtype=torch.float64) * scale for kind in kinds]
    w = torch.randn(units, generator=rng, dtype=torch.float64)
    b = torch.randn((), generator=rng, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (*maps, w, b)]


def run(inputs, shape, impl):
    *maps, w, b = inputs
    sigma = slab_density(maps, w, b, shape, impl=impl)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(sigma)
    return sigma.detach(), torch.autograd.grad(sigma, inputs, cotangent)


@pytest.mark.parametrize("impl", ["torch", pytest.param("compiled", marks=needs_cpp)])
@pytest.mark.parametrize("kinds", LAYOUTS)
@pytest.mark.parametrize("shape,units", [((5, 7, 18), 3), ((2, 3, 2), 1), ((33, 4, 16), 8)])
def test_fast_paths_agree_with_the_definition(kinds, shape, units, impl):
    double = random_inputs(kinds, shape, units)
    expected, expected_grads = run(double, shape, "ref")
    sigma, grads = run([t.detach().float().requires_grad_() for t in double], shape, impl)
    torch.testing.assert_close(sigma.double(), expected, rtol=1e-6, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad.double(), wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max()))
        )


@pytest.mark.parametrize("impl", ["torch", pytest.param("compiled", marks=needs_cpp)])
@pytest.mark.parametrize("kinds", LAYOUTS)
def test_gradients_are_those_of_finite_differences(kinds, impl):
    inputs = random_inputs(kinds, (3, 2, 5), 2)
    assert torch.autograd.gradcheck(
        lambda *t: slab_density(t[:-2], t[-2], t[-1], (3, 2, 5), impl=impl), inputs
    )


@pytest.mark.parametrize("impl", ["torch", pytest.param("compiled", marks=needs_cpp)])
def test_a_second_derivative_is_an_error_and_the_definition_has_it(impl):
    *maps, w, b = random_inputs(("xy", "xz"), (3, 2, 5), 2)
    with raising("slab_density", "create_graph=True", '"ref"', kind=RuntimeError):
        torch.autograd.grad(slab_density(maps, w, b, (3, 2, 5), impl=impl).sum(), maps, create_graph=True)
    first = torch.autograd.grad(
        slab_density(maps, w, b, (3, 2, 5), impl="ref").sum(), maps, create_graph=True
    )
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(sum(g.square().sum() for g in first), maps))


@pytest.mark.parametrize("impl", ["torch", pytest.param("compiled", marks=needs_cpp)])
@pytest.mark.parametrize("scale", [40.0, 300.0])
def test_pre_activations_beyond_the_range_of_exp_stay_finite_and_right(scale, impl):
    shape = (4, 5, 17)
    double = random_inputs(("xy", "xz", "yz"), shape, 4, scale=scale)
    expected, expected_grads = run(double, shape, "ref")
    sigma, grads = run([t.detach().float().requires_grad_() for t in double], shape, impl)
    torch.testing.assert_close(sigma.double(), expected, rtol=1e-5, atol=1e-4)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad.double(), wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max()))
        )


@needs_cpp
def test_a_nan_in_a_map_reaches_the_density_and_nothing_else():
    *maps, w, b = (t.detach().float() for t in random_inputs(("xy", "xz"), (4, 5, 6), 3))
    maps[0][2, 1, 3, 0] = float("nan")
    actual = slab_density(maps, w, b, (4, 5, 6), impl="compiled").isnan()
    assert actual[2, 3].all() and actual.sum() == 6


@needs_cpp
def test_same_bits_every_time_and_non_contiguous_maps_are_fine():
    shape = (30, 20, 40)
    inputs = random_inputs(("xy", "xz", "yz"), (30, 20, 40), 16, torch.float32)
    first, first_grads = run(inputs, shape, "compiled")
    strided = [
        t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() if t.ndim == 4 else t
        for t in inputs
    ]
    second, second_grads = run(strided, shape, "compiled")
    assert torch.equal(first, second) and all(
        torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True)
    )


@needs_cpp
def test_torch_sees_a_proper_operator():
    assert build.available("slab_density", "cpu")
    *maps, w, b = random_inputs(("xy", "xz"), (3, 4, 5), 2)
    flat = [m.detach().reshape(m.shape[0], m.shape[1], -1).requires_grad_() for m in maps]
    torch.library.opcheck(torch.ops.eg3d_rlhf.slab_density.default, (*flat, None, w, b, [3, 4, 5]))
    compiled = torch.compile(
        lambda *t: slab_density(t[:-2], t[-2], t[-1], (3, 4, 5)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*maps, w, b), slab_density_ref(maps, w, b, (3, 4, 5)))


def test_a_block_decides_what_auto_means(monkeypatch):
    *maps, w, b = random_inputs(("xy", "xz"), (3, 4, 5), 2)
    calls = []
    monkeypatch.setattr(
        module, "slab_density_ref", lambda *args: calls.append("ref") or slab_density_ref(*args)
    )
    with implementation("ref"):
        slab_density(maps, w, b, (3, 4, 5))
    slab_density(maps, w, b, (3, 4, 5))
    assert calls == ["ref"]


def test_buffers_of_the_torch_path_have_the_size_of_a_chunk(monkeypatch):
    sizes = []
    original = module._Volume.blocks

    def spy(self, over):
        for x, y, block in original(self, over):
            sizes.append(block.numel())
            yield x, y, block

    monkeypatch.setattr(module._Volume, "blocks", spy)
    *maps, w, b = random_inputs(("xy", "xz"), (20, 20, 20), 8, torch.float32)
    slab_density(maps, w, b, (20, 20, 20), impl="torch", chunk=2000).sum().backward()
    assert sum(sizes) == 2 * 20**3 * 8  # every element once forward and once backward
    assert max(sizes) <= 2000


def test_maps_that_do_not_fit_are_rejected():
    *maps, w, b = random_inputs(("xy", "xz"), (3, 4, 5), 2)
    with raising("slab_density", "[3, 4, 5]", "[[2, 3, 4, 1], [3, 2, 1, 5]]"):
        slab_density([maps[0].transpose(0, 1), maps[1]], w, b, (3, 4, 5))
