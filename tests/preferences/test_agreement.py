"""Kappa and alpha against published examples, and the properties that define them."""

import numpy as np
import pytest

from eg3d_rlhf.preferences.agreement import LEAST_UNITS, cohen_kappa, krippendorff_alpha
from tests.preferences.coverage import agreement_coverage, agreement_grid


def answers(table):
    """Two lists of answers with the given table of counts."""
    pairs = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def units_of(*rows: str):
    """One string per annotator, a character per unit, '.' where she gave none."""
    return [{k: row[u] for k, row in enumerate(rows) if row[u] != "."} for u in range(len(rows[0]))]


def test_kappa_of_a_two_by_two_table():
    kappa = cohen_kappa(*answers([[20, 5], [10, 15]]))  # p_o = 0.7, p_e = 0.5
    assert kappa.value == pytest.approx(0.4) and kappa.n == 50


def test_kappa_and_its_error_in_the_example_of_fleiss_cohen_and_everitt():
    # 1969, n = 200: kappa 0.429, variance 0.002885
    kappa = cohen_kappa(*answers([[106, 10, 4], [22, 28, 10], [2, 12, 6]]))
    assert kappa.value == pytest.approx(0.429, abs=5e-4)
    assert ((kappa.hi - kappa.lo) / (2 * 1.959964)) ** 2 == pytest.approx(0.002885, rel=0.06)


def test_kappa_is_one_for_equal_and_zero_for_independent_answers():
    assert cohen_kappa("abcab", "abcab").value == 1
    independent = cohen_kappa(*answers([[24, 36], [16, 24]]))
    assert independent.value == pytest.approx(0, abs=1e-12) and independent.lo < 0 < independent.hi


def test_agreement_is_undefined_for_constant_answers_or_without_shared_units():
    assert cohen_kappa("aaa", "aaa").value is None and cohen_kappa("", "").to_dict() == {
        "value": None,
        "ci95": None,
        "n": 0,
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [  # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), sections A, B and C
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_alpha_of_published_examples(rows, expected):
    alpha = krippendorff_alpha(units_of(*rows))
    assert alpha.value == pytest.approx(expected, abs=6e-4)
    assert alpha.lo <= alpha.value <= alpha.hi


@pytest.mark.parametrize("n", [2, 9])
def test_few_units_have_no_interval(n):
    same = "ab" + "a" * (n - 2)
    for agreement in (cohen_kappa(same, same), krippendorff_alpha(units_of(same, same))):
        assert (agreement.value, agreement.lo, agreement.hi, agreement.n) == (1, None, None, n)


def test_full_agreement_on_ten_units_has_a_wide_interval():
    answers_ = "ab" * 5
    for agreement in (cohen_kappa(answers_, answers_), krippendorff_alpha(units_of(answers_, answers_))):
        assert agreement.value == agreement.hi == 1 and 0.3 < agreement.lo < 0.75


def test_alpha_agrees_with_a_loop_over_the_definition():
    rng = np.random.default_rng(1)
    units = [{k: int(rng.integers(0, 3)) for k in range(5) if rng.random() < 0.6} for _ in range(40)]
    pairable = [list(u.values()) for u in units if len(u) > 1]
    everything = [v for u in pairable for v in u]
    n = len(everything)
    observed = (
        sum(
            (a != b) / (len(u) - 1)
            for u in pairable
            for x, a in enumerate(u)
            for y, b in enumerate(u)
            if x != y
        )
        / n
    )
    expected = sum(a != b for x, a in enumerate(everything) for y, b in enumerate(everything) if x != y) / (
        n * (n - 1)
    )
    assert krippendorff_alpha(units).value == pytest.approx(1 - observed / expected, rel=1e-12)


def test_alpha_is_undefined_without_variation():
    assert krippendorff_alpha([{0: "a", 1: "a"}] * 5).value is None
    assert krippendorff_alpha([{0: "a"}]).to_dict() == {"value": None, "ci95": None, "n": 0}
    assert krippendorff_alpha([{0: "a", 1: "b"}]).n == 1


def check_coverage(units: int, studies: int, full: bool, least: float) -> None:
    coverages = [agreement_coverage(kind, studies, seed=1) for kind in agreement_grid(units, full)]
    assert 0.93 <= np.mean(coverages) <= 0.97 and min(coverages) >= least, list(
        zip(coverages, agreement_grid(units, full), strict=True)
    )


def test_intervals_hold_the_truth_at_the_fewest_units_that_are_shown():
    check_coverage(LEAST_UNITS, 40, full=False, least=0.8)


@pytest.mark.long
@pytest.mark.parametrize("units", [LEAST_UNITS, 2 * LEAST_UNITS])
def test_intervals_hold_the_truth_over_the_whole_grid(units):
    check_coverage(units, 300, full=True, least=0.85)
