"""Every op against the reference values: results, first derivatives, and second derivatives along a given
direction.

A case <name> of ops.npz holds in_* (inputs), out, dy (cotangent of out), grad_* (= d<out, dy>/d in_*), v_*
(directions) and grad2_* (= d(sum <grad_*, v_*>) / d in_* or dy). All were computed in float64 from float32
inputs.
"""

import numpy as np
import pytest
import torch

from tests.compat.reference import ROOT, read_json
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d

RELATIVE_ERROR = 1e-6
CASES = read_json(ROOT / "eg3d" / "ops.json")
RESAMPLING = ("upfirdn2d", "upsample2d", "downsample2d", "filter2d")


@pytest.fixture(scope="module")
def values(fixtures_dir):
    with np.load(fixtures_dir / "eg3d" / "ops.npz") as archive:
        return {name: archive[name] for name in archive.files}


def taps(attributes: dict, key: str) -> torch.Tensor | None:
    return None if attributes[key] is None else upfirdn2d.setup_filter(attributes[key])


def run(attributes: dict, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The op of a case on float64 inputs."""
    a = dict(attributes)
    op = a.pop("op")
    x = inputs["x"]
    if op in RESAMPLING:
        f = taps(a, "setup_filter_input")
        a = {k: v for k, v in a.items() if k not in ("setup_filter_input", "prepared_filter")}
        return getattr(upfirdn2d, op)(x, f, **a)
    if op == "bias_act":
        a = {k: v for k, v in a.items() if k not in ("def_alpha", "def_gain")}
        return bias_act.bias_act(x, inputs.get("b"), **a)
    if op == "conv2d_resample":
        f = taps(a, "filter")
        a = {k: v for k, v in a.items() if k not in ("filter", "kernel")}
        return conv2d_resample.conv2d_resample(x, inputs["w"], f, **a)
    if op == "modulated_conv2d":
        from training.synthesis import modulated_conv2d

        f = taps(a, "filter")
        a.pop("filter")
        return modulated_conv2d(
            x, inputs["weight"], inputs["styles"], noise=inputs.get("noise"), resample_filter=f, **a
        )
    if op == "normalize_2nd_moment":
        from training.layers import normalize_2nd_moment

        return normalize_2nd_moment(x)
    if op == "minibatch_std":
        from training.discriminator import MinibatchStdLayer

        return MinibatchStdLayer(a["group_size"], a["num_channels"])(x)
    assert op.startswith("filtered_resizing"), op
    from training.discriminator import filtered_resizing

    return filtered_resizing(x, a["size"], "antialiased")


def assert_close(name: str, actual: torch.Tensor, expected: np.ndarray):
    assert tuple(actual.shape) == expected.shape, name
    error = np.abs(actual.detach().numpy() - expected).max(initial=0)
    assert error <= RELATIVE_ERROR * max(np.abs(expected).max(initial=0), 1e-12), f"{name}: {error}"


@pytest.mark.parametrize(
    "case",
    sorted(CASES) or [pytest.param("", marks=pytest.mark.skip(reason=f"no reference values at {ROOT}"))],
)
def test_result_and_derivatives(case, values):
    own = {
        k.removeprefix(f"{case}/"): torch.from_numpy(v) for k, v in values.items() if k.startswith(f"{case}/")
    }
    inputs = {
        k.removeprefix("in_"): v.double().requires_grad_() for k, v in own.items() if k.startswith("in_")
    }
    dy = own["dy"].double().requires_grad_()
    out = run(CASES[case], inputs)
    assert_close("out", out, own["out"].numpy())

    grads = dict(
        zip(inputs, torch.autograd.grad(out, list(inputs.values()), dy, create_graph=True), strict=True)
    )
    assert {k for k in own if k.startswith("grad_")} == {f"grad_{k}" for k in grads}
    for name, grad in grads.items():
        assert_close(f"grad_{name}", grad, own[f"grad_{name}"].numpy())

    along = sum((grad * own[f"v_{name}"].double()).sum() for name, grad in grads.items())
    wanted = {k.removeprefix("grad2_"): v.numpy() for k, v in own.items() if k.startswith("grad2_")}
    leaves = {**inputs, "dy": dy}
    second = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
    for name, grad in zip(leaves, second, strict=True):
        if name in wanted:
            assert_close(f"grad2_{name}", grad, wanted[name])
        elif grad is not None:  # the reference found no path from the gradients to this leaf
            assert_close(f"grad2_{name}", grad, np.zeros(tuple(grad.shape)))


@pytest.mark.parametrize("case", sorted(c for c, a in CASES.items() if a.get("prepared_filter")))
def test_setup_filter_prepares_the_same_taps(case):
    expected = torch.tensor(CASES[case]["prepared_filter"], dtype=torch.float32)
    torch.testing.assert_close(
        upfirdn2d.setup_filter(CASES[case]["setup_filter_input"]), expected, rtol=1e-6, atol=0
    )


def test_activation_defaults():
    for attributes in CASES.values():
        if "def_gain" in attributes:
            spec = bias_act.activation_funcs[attributes["act"]]
            assert (spec.def_alpha, spec.def_gain) == (attributes["def_alpha"], attributes["def_gain"])
