"""The seeds syntax."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eg3d_rlhf.experiments.media.rendering import MAX_SEEDS, parse_seeds
from tests.rejections import raising


def test_numbers_and_ranges_in_the_order_given():
    assert parse_seeds("0,2-5") == [0, 2, 3, 4, 5]
    assert parse_seeds(" 7 , 1 - 3,7") == [7, 1, 2, 3, 7]
    assert parse_seeds("4-4") == [4]
    assert parse_seeds(str(2**32 - 1)) == [2**32 - 1]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 30)), min_size=1, max_size=8))
def test_any_list_of_ranges_reads_back(ranges):
    text = ",".join(f"{start}-{start + extra}" if extra else str(start) for start, extra in ranges)
    assert parse_seeds(text) == [s for start, extra in ranges for s in range(start, start + extra + 1)]


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "-3", "1-", "1-2-3", "1.5", "5-2", "4294967296", f"0-{MAX_SEEDS}", "0,"]
)
def test_anything_else_is_one_line(text):
    with raising("seeds", repr(text)):
        parse_seeds(text)
