"""Elo ratings against the reference values of GPTEval3D's fit, for every case in the fixtures."""

import numpy as np
import pytest

from eg3d_rlhf.preferences.bradley_terry import Judgement, elo
from tests.compat.absent import some
from tests.compat.distill_reference import needs, recipe, under

NAME = "gpteval3d_elo"
pytestmark = needs(NAME)
CASES = recipe(NAME)["cases"]
RESULT = {-1: "a", 1: "b", 0: "tie"}


def rated(name: str, **options) -> tuple[np.ndarray, dict, bool]:
    v = under(NAME, name)
    compared = v["comparisons"].numpy()
    reference = {key: array.numpy() for key, array in v.items()}
    starts = zip(reference.get("init", ()), reference["elo"], strict=False)
    # the others have moved
    held = {str(k): float(start) for k, (start, end) in enumerate(starts) if start == end} or None
    judgements = [Judgement(str(i), str(j), RESULT[int(result)]) for i, j, result in compared]
    rating = elo(judgements, given_ratings=held, resample_count=0, **options)
    return (
        np.array([rating.ratings[str(k)].elo for k in range(len(rating.ratings))]),
        reference,
        rating.regularised,
    )


@pytest.mark.parametrize("name", some(CASES, f"this set has no case in {NAME}.json"))
def test_ratings(name):
    got, reference, regularised = rated(name)
    assert regularised == (CASES[name].get("finite_maximum") is False)
    # no maximum: what is stored is where the source's 10,000 steps stopped, the order alone can be compared
    if regularised:
        assert list(np.argsort(got)) == list(np.argsort(reference["elo"])) and np.isfinite(got).all()
        return
    shift = 0.0 if "init" in reference else reference["elo"].mean() - got.mean()
    np.testing.assert_allclose(got + shift, reference["elo"], rtol=0, atol=0.1)
    if "exact_elo" in reference:
        np.testing.assert_allclose(
            got - got.mean(), reference["exact_elo"] - reference["exact_elo"].mean(), rtol=0, atol=0.05
        )


@pytest.mark.parametrize(
    "name",
    some(
        [name for name in CASES if CASES[name].get("finite_maximum") is not False],
        f"this set has no case with a finite maximum in {NAME}.json",
    ),
)
def test_davidsons_ties_keep_the_order_of_methods_far_apart(name):
    both, *_ = rated(name)
    davidson, *_ = rated(name, tie_rule="davidson")
    far = np.abs(np.subtract.outer(both, both)) > 60
    assert (np.sign(np.subtract.outer(both, both)) == np.sign(np.subtract.outer(davidson, davidson)))[
        far
    ].all()
