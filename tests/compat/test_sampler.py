"""The sampler's order against EG3D's (misc.npz), and its exact continuation."""

import itertools
import re

import numpy as np
import pytest

from tests.compat.absent import some
from tests.compat.reference import ROOT, array_names, read_json
from tests.rejections import raising
from training.dataset import InfiniteSampler


def _first(count, n=17, **options):
    return list(itertools.islice(InfiniteSampler(range(n), **options), count))


ORDERS = [name for name in array_names(ROOT / "eg3d" / "misc.npz") if name.startswith("sampler/")]


@pytest.mark.parametrize("key", some(ORDERS, "this set has no sampler/... in eg3d/misc.npz"))
def test_order_matches_reference(key):
    replicas, rank = map(int, re.fullmatch(r"sampler/replicas(\d+)_rank(\d+)", key).groups())
    recipe = read_json(ROOT / "eg3d" / "misc.json").get("sampler", {})
    with np.load(ROOT / "eg3d" / "misc.npz") as data:
        expected = data[key]
    drawn = _first(
        len(expected), recipe.get("n", 17), seed=recipe.get("seed", 5), num_replicas=replicas, rank=rank
    )
    assert drawn == expected.tolist()


@pytest.mark.parametrize("start", [0, 1, 16, 17, 90, 70_000])
def test_start_index_continues_exactly(start):
    straight = _first(start + 40, seed=3)
    assert _first(40, seed=3, start_index=start) == straight[start:]


def test_ranks_interleave_to_the_single_rank_order():
    whole = _first(60, seed=1)
    parts = [_first(30, seed=1, num_replicas=2, rank=rank, start_index=0) for rank in (0, 1)]
    assert [value for pair in zip(*parts, strict=True) for value in pair] == whole
    resumed = [_first(10, seed=1, num_replicas=2, rank=rank, start_index=40) for rank in (0, 1)]
    assert [value for pair in zip(*resumed, strict=True) for value in pair] == whole[40:]


def test_unshuffled_and_single_image():
    assert _first(7, n=3, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]
    assert _first(3, n=1) == [0, 0, 0]


def test_an_empty_dataset_is_named():
    with raising("no images"):
        InfiniteSampler([])
