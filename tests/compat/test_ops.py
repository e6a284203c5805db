"""Every op against the reference values: results, first derivatives, and second derivatives along a given
direction.

A case <name> of ops.npz holds in_* (inputs), out, dy (cotangent of out), grad_* (= d<out, dy>/d in_*), v_*
(directions) and grad2_* (= d(sum <grad_*, v_*>) / d in_* or dy). All were computed in float64 from float32
inputs.
"""

import numpy as np
import pytest
import torch

from tests.compat.absent import some
from tests.compat.reference import ROOT, arrays, read_json
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d
from training.discriminator import MinibatchStdLayer, filtered_resizing
from training.layers import normalize_2nd_moment
from training.synthesis import modulated_conv2d

RELATIVE_ERROR = 1e-6
CASES = read_json(ROOT / "eg3d" / "ops.json")
NONE = "this set has no eg3d/ops.json"
RESAMPLING = ("upfirdn2d", "upsample2d", "downsample2d", "filter2d")
# of a case: what the recipe says beside the arguments of the op
ABOUT = {"setup_filter_input", "prepared_filter", "filter", "kernel", "def_alpha", "def_gain"}


@pytest.fixture(scope="module")
def values(fixtures_dir):
    return dict(arrays(fixtures_dir / "eg3d" / "ops.npz"))


def taps(attributes: dict) -> torch.Tensor | None:
    given = attributes.get("setup_filter_input", attributes.get("filter"))
    return None if given is None else upfirdn2d.setup_filter(given)


def run(attributes: dict, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The op of a case on float64 inputs."""
    op, *mode = attributes["op"].split()
    a = {key: value for key, value in attributes.items() if key not in ABOUT | {"op"}}
    x = inputs["x"]
    if op in RESAMPLING:
        return getattr(upfirdn2d, op)(x, taps(attributes), **a)
    if op == "bias_act":
        return bias_act.bias_act(x, inputs.get("b"), **a)
    if op == "conv2d_resample":
        return conv2d_resample.conv2d_resample(x, inputs["w"], taps(attributes), **a)
    if op == "modulated_conv2d":
        a |= {"noise": inputs.get("noise"), "resample_filter": taps(attributes)}
        return modulated_conv2d(x, inputs["weight"], inputs["styles"], **a)
    if op == "normalize_2nd_moment":
        return normalize_2nd_moment(x, **a)
    if op == "minibatch_std":
        return MinibatchStdLayer(**a)(x)
    if op == "filtered_resizing":
        return filtered_resizing(x, a["size"], *mode[:1])
    pytest.skip(f"this test knows no op {op}")


def derivatives(attributes: dict, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Compute the result, and its derivatives as far as the inputs go: see the top of this file."""
    inputs = {
        key.removeprefix("in_"): value.double().requires_grad_()
        for key, value in given.items()
        if key.startswith("in_")
    }
    out = run(attributes, inputs)
    computed: dict[str, torch.Tensor | None] = {"out": out}
    if "dy" not in given:
        return computed
    leaves = {**inputs, "dy": given["dy"].double().requires_grad_()}
    grads = torch.autograd.grad(out, list(inputs.values()), leaves["dy"], create_graph=True)
    computed |= {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    if all(f"v_{name}" in given for name in inputs):
        along = sum((computed[f"grad_{name}"] * given[f"v_{name}"].double()).sum() for name in inputs)
        second = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
        computed |= {f"grad2_{name}": grad for name, grad in zip(leaves, second, strict=True)}
    return computed


def assert_close(name: str, actual: torch.Tensor, expected: np.ndarray):
    assert tuple(actual.shape) == expected.shape, name
    error = np.abs(actual.detach().numpy() - expected).max(initial=0)
    assert error <= RELATIVE_ERROR * max(np.abs(expected).max(initial=0), 1e-12), f"{name}: {error}"


@pytest.mark.parametrize("case", some(sorted(CASES), NONE))
def test_result_and_derivatives(case, values):
    own = {
        k.removeprefix(f"{case}/"): torch.from_numpy(v) for k, v in values.items() if k.startswith(f"{case}/")
    }
    if not {"in_x", "out"} <= own.keys():
        pytest.skip(f"eg3d/ops.npz of this set has no {case}/in_x and {case}/out")
    computed = derivatives(CASES[case], own)
    firsts = {key for key in own if key.startswith("grad_")}
    assert not firsts or firsts == {key for key in computed if key.startswith("grad_")}
    seconds = {key for key in own if key.startswith("grad2_")}
    for key, value in computed.items():
        if key in own:
            assert_close(key, value, own[key].numpy())
        elif seconds and key.startswith("grad2_") and value is not None:
            # the reference found no path from the gradients to this leaf
            assert_close(key, value, np.zeros(tuple(value.shape)))


@pytest.mark.parametrize(
    "case", some(sorted(c for c, a in CASES.items() if a.get("prepared_filter")), f"{NONE} with filters")
)
def test_setup_filter_prepares_the_same_taps(case):
    expected = torch.tensor(CASES[case]["prepared_filter"], dtype=torch.float32)
    torch.testing.assert_close(
        upfirdn2d.setup_filter(CASES[case]["setup_filter_input"]), expected, rtol=1e-6, atol=0
    )


def test_activation_defaults():
    stated = [attributes for attributes in CASES.values() if "def_gain" in attributes]
    if not stated:
        pytest.skip(f"{NONE} with activations")
    for attributes in stated:
        spec = bias_act.activation_funcs[attributes["act"]]
        assert (spec.def_alpha, spec.def_gain) == (attributes["def_alpha"], attributes["def_gain"])
