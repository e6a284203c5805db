"""AugmentPipe against the reference values: draw k is replaced by RandomState(50000 + k) numbers of the
listed kind and shape.
"""

import re

import numpy as np
import pytest
import torch

from tests.compat.absent import some
from tests.compat.reference import ROOT, Draws, array_names, arrays, of_set, read_json
from training.augment import AugmentPipe

RELATIVE_ERROR = 1e-4
MISC = ROOT / "eg3d" / "misc"
RECIPE = read_json(MISC.with_suffix(".json"))
CASES = [name for name in RECIPE if name.startswith("aug/")]
PERCENTILES = [  # (case, percentile) of the arrays aug/<n>/debug_percentile_<p>
    (match[1], match[2])
    for name in array_names(MISC.with_suffix(".npz"))
    if (match := re.fullmatch(r"(aug/.+)/debug_percentile_(.+)", name)) and match[1] in RECIPE
]
NONE = "eg3d/misc.json of this set has no aug/..."


@pytest.fixture(scope="module")
def values(fixtures_dir):
    return dict(arrays(fixtures_dir / "eg3d" / "misc.npz"))


def build(case: dict) -> tuple[AugmentPipe, torch.Tensor]:
    seed, shape = re.fullmatch(
        r"RandomState\((\d+)\)\.random_sample\(\((.*)\)\)\*2-1", case["input"]
    ).groups()
    images = np.random.RandomState(int(seed)).random_sample([int(s) for s in shape.split(",")]) * 2 - 1
    pipe = AugmentPipe(**case["kwargs"])
    pipe.p.fill_(case["p"])
    return pipe, torch.from_numpy(images.astype(np.float32))


def assert_close(actual: torch.Tensor, expected: np.ndarray):
    assert tuple(actual.shape) == expected.shape
    assert np.abs(actual.numpy() - expected).max() <= RELATIVE_ERROR * np.abs(expected).max()


@pytest.mark.parametrize("name", some(CASES, NONE))
def test_same_draws_give_the_same_images(name, values):
    case = RECIPE[name]
    (expected,) = of_set(values, f"{name}/out")
    pipe, images = build(case)
    with Draws(case["draw_base"]).injected() as draws:
        out = pipe(images)
    if "draws" in case:
        assert draws.log == [draw[:2] for draw in case["draws"]]
    assert_close(out, expected)


@pytest.mark.parametrize(
    ("name", "percentile"), some(PERCENTILES, "this set has no aug/.../debug_percentile_...", width=2)
)
def test_debug_percentile(name, percentile, values):
    pipe, images = build(RECIPE[name])
    with Draws(RECIPE[name]["draw_base"]).injected():
        assert_close(
            pipe(images, debug_percentile=float(percentile)), values[f"{name}/debug_percentile_{percentile}"]
        )


@pytest.mark.parametrize("buffer", ["Hz_geom", "Hz_fbank"])
def test_filters(buffer, values):
    (expected,) = of_set(values, f"aug/{buffer}")
    assert_close(AugmentPipe().get_buffer(buffer), expected)
