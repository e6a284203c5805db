"""The self-check of CUDA ops, with made-up ops on the CPU: a right one stays on, a wrong or failing one is
switched off once.
"""

import warnings

import pytest
import torch

from tests.torch_utils.compilers import needs_cpp
from torch_utils import build, cuda_check
from torch_utils.cuda_check import CHECKS, passes

CPU = torch.device("cpu")


@pytest.fixture
def made_up(monkeypatch):
    """Register a check under a name, and clear all results before and after."""
    monkeypatch.setattr(cuda_check, "_results", {})

    def register(name, pairs):
        calls = []

        def check(device):
            calls.append(device)
            yield from pairs() if callable(pairs) else pairs

        monkeypatch.setitem(CHECKS, name, check)
        return calls

    return register


def test_an_op_that_agrees_is_used_and_asked_once(made_up):
    calls = made_up("right", [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0001]))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert passes("right", CPU) and passes("right", CPU)
    assert calls == [CPU]


@pytest.mark.parametrize(
    "actual",
    [
        torch.tensor([1.0, 2.1]),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0]),
        torch.tensor([[1.0, 2.0]]),
    ],
    ids=str,
)
def test_an_op_that_disagrees_is_switched_off_with_one_warning(made_up, actual):
    right = torch.tensor([1.0, 2.0])
    calls = made_up("wrong", [(right, right), (actual, right)])
    with pytest.warns(UserWarning, match=r"\bwrong\b.*\bcpu\b") as caught:
        assert not passes("wrong", CPU)
        assert not passes("wrong", CPU)
    assert len(calls) == len(caught) == 1


def test_an_op_that_fails_is_switched_off(made_up):
    def fail():
        raise RuntimeError("CUDA error: 700\nmore")

    made_up("failing", fail)
    with pytest.warns(UserWarning, match=r"\bfailing\b.*RuntimeError: CUDA error: 700") as caught:
        assert not passes("failing", CPU)
    assert "\n" not in str(caught[0].message)


def test_autograd_and_the_generator_are_left_alone(made_up):
    def pairs():
        x = torch.ones(3, requires_grad=True)
        yield torch.autograd.grad((x * x).sum(), x)[0], torch.full((3,), 2.0)

    made_up("gradients", pairs)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert passes("gradients", CPU)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_every_cuda_source_has_a_check():
    assert set(build.ops("cuda")) <= set(CHECKS)


@needs_cpp
@pytest.mark.parametrize("op", build.ops("cuda"))
def test_the_checks_agree_with_the_ops_as_they_are_on_the_cpu(op, monkeypatch):
    """The same schemas on the CPU: inputs and formulas of a check fit together."""
    assert build.available(op, "cpu")
    monkeypatch.setattr(cuda_check, "_results", {})
    assert passes(op, CPU)


@needs_cpp
def test_a_check_notices_a_wrong_kernel(monkeypatch):
    assert build.available("ray_march", "cpu")
    right = CHECKS["ray_march"]
    for wrong in range(5):  # each of its results in turn
        monkeypatch.setattr(cuda_check, "_results", {})

        def spoiled(device, wrong=wrong):
            for i, (actual, expected) in enumerate(right(device)):
                actual = actual.clone()
                actual.view(-1)[actual.numel() // 2] += 0.01 * expected.abs().max() if i == wrong else 0
                yield actual, expected

        monkeypatch.setitem(CHECKS, "ray_march", spoiled)
        with pytest.warns(UserWarning, match="ray_march"):
            assert not passes("ray_march", CPU)
