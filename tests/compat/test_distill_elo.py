"""Elo ratings against the reference values of GPTEval3D's fit, for every case in the fixtures."""

import json

import numpy as np
import pytest

from eg3d_rlhf.preferences.elo import Judgement, elo
from tests.compat.reference import ROOT

FILE = ROOT / "distill" / "gpteval3d_elo"
CASES = json.loads(FILE.with_suffix(".json").read_text())["cases"] if FILE.with_suffix(".json").is_file() else {}
pytestmark = pytest.mark.skipif(not CASES, reason=f"no reference values at {FILE}; set EG3D_RLHF_FIXTURES to their folder")
RESULT = {-1: "a", 1: "b", 0: "tie"}


def rated(name: str, **options) -> tuple[np.ndarray, dict, bool]:
    with np.load(FILE.with_suffix(".npz")) as arrays:
        reference = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
    held = {str(k): float(v) for k, v in enumerate(reference["init"][:3])} if "init" in reference else None
    judgements = [Judgement(str(i), str(j), RESULT[int(result)]) for i, j, result in reference["comparisons"]]
    found = elo(judgements, held=held, resamples=0, **options)
    return np.array([found.ratings[str(k)].elo for k in range(len(found.ratings))]), reference, found.regularised


@pytest.mark.parametrize("name", CASES)
def test_ratings(name):
    got, reference, regularised = rated(name)
    assert regularised == (CASES[name].get("finite_maximum") is False)
    if regularised:  # no maximum: what is stored is where the source's 10,000 steps stopped, the order alone can be compared
        assert list(np.argsort(got)) == list(np.argsort(reference["elo"])) and np.isfinite(got).all()
        return
    shift = 0.0 if "init" in reference else reference["elo"].mean() - got.mean()
    np.testing.assert_allclose(got + shift, reference["elo"], rtol=0, atol=0.1)
    if "exact_elo" in reference:
        np.testing.assert_allclose(got - got.mean(), reference["exact_elo"] - reference["exact_elo"].mean(), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", [name for name in CASES if name != "wide"])
def test_davidsons_ties_keep_the_order_of_methods_far_apart(name):
    both, *_ = rated(name)
    davidson, *_ = rated(name, draws="davidson")
    far = np.abs(np.subtract.outer(both, both)) > 60
    assert (np.sign(np.subtract.outer(both, both)) == np.sign(np.subtract.outer(davidson, davidson)))[far].all()
