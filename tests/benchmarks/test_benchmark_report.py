"""Ratios with their intervals, the comparison of outcomes, and of two files of results."""

import pytest
import torch

from benchmarks import benchmark_report as report
from benchmarks.rows import DisagreementError, Outcome, compare
from tests.rejections import raising


def record(ratio: float, name: str = "slab", size: str = "full", device: str = "cpu") -> dict:
    return {"name": name, "size": size, "device": device, "ratio": ratio}


@pytest.mark.parametrize(("now", "flagged"), [(8.9, True), (9.1, False), (10, False), (25, False)])
def test_a_ratio_over_ten_per_cent_worse_is_a_regression(now, flagged):
    lines = report.regressions({"rows": [record(10)]}, {"rows": [record(now)]})
    assert bool(lines) is flagged
    if flagged:
        (line,) = lines
        assert all(word in line for word in ("slab", "full", "cpu", "10.00x", "8.90x"))


def test_only_rows_of_the_same_name_size_and_device_are_compared():
    new = {"rows": [record(1, "cube"), record(1, size="bundled"), record(1, device="cuda")]}
    assert report.regressions({"rows": [record(10)]}, new) == []


def test_other_files_are_refused(tmp_path):
    for text in ("[]", "{}", "no json", '{"rows": [{"name": 1}]}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        with raising("x.json", "python -m benchmarks"):
            report.read(path)


def test_deviations_are_relative_to_the_largest_value_and_gradient():
    reference = Outcome(
        {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.1])},
        {"w": torch.tensor([8.0]), "v": torch.tensor([0.01])},
    )
    fast = Outcome(
        {"a": torch.tensor([100.0, 1.5]), "b": torch.tensor([0.2])},
        {"w": torch.tensor([8.0]), "v": torch.tensor([0.05])},
    )
    found = compare(fast, reference)
    assert found.max_abs_error == pytest.approx(0.5) and found.relative_error == pytest.approx(0.1)
    assert found.gradient_error == pytest.approx(0.04 / 8)


def test_equal_infinities_agree_and_a_lone_nan_does_not():
    inf = float("inf")
    nan = float("nan")
    same = Outcome({"a": torch.tensor([inf, 1.0, nan])})
    assert compare(same, same).max_abs_error == 0
    for odd in ([nan, 1.0, nan], [inf, nan, nan], [-inf, 1.0, nan]):
        assert compare(Outcome({"a": torch.tensor(odd)}), same).relative_error == inf


def test_other_names_and_shapes_disagree():
    one = Outcome({"a": torch.zeros(2)})
    for other in (
        Outcome({"b": torch.zeros(2)}),
        Outcome({"a": torch.zeros(3)}),
        Outcome({"a": torch.zeros(2)}, {"w": torch.zeros(1)}),
    ):
        with pytest.raises(DisagreementError):
            compare(other, one)
