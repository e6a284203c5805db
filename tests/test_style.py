"""Tests of tests/style.py and tests/wording.py on small examples and on the whole tree."""

import pytest

from tests import style, wording

INDEPENDENT = (
    "a, b = 1, 2",
    "self.a, self.b = x, y",
    "self.a, self.b = self.c.e, f(self.d)",
    "a[0], b = c(), d()",
    "(a, b), c = f(), g()",
)
KEPT = (
    "a, b = b, a",
    "a, b = b, a + b",
    "a, b = f()",
    "a, *b = 1, 2, 3",
    "self.a, self.b = x, self.f()",
    "self.a, self.b = x, f(self)",
    "self.a, b = x, other.a",
    "a[0], b = b, a[1]",
    "i, a[i] = 1, 2",
)


@pytest.mark.parametrize("line", INDEPENDENT)
def test_independent_pairs_are_seen(line):
    assert style.pairs(f"def f():\n    {line}\n") == ([2], 0)


@pytest.mark.parametrize("line", KEPT)
def test_dependent_pairs_and_unpacking_stay(line):
    assert style.pairs(line)[0] == []


COMPARED = """
ROWS = {"one": (["--a"], "got nothing at all"), "two": (["--b"], "--b")}

@pytest.mark.parametrize("case", ROWS)
def test_table(case):
    flags, text = ROWS[case]
    assert text in run(flags).stderr

@pytest.mark.parametrize(("value", "words"), [(1, "too small"), (2, "--c")])
def test_parameters(value, words):
    with pytest.raises(ValueError, match=words):
        check(value)

def test_direct():
    with raising("--d", "expected two rows"):
        check(3)
    assert "no such file" in text and f"got {n} of them" == line and "--e" in text
"""


def test_compared_sentences_are_counted():
    assert [line for line, _ in wording.sentences(COMPARED)] == [2, 9, 15, 17, 17]


def test_few_places_compare_a_sentence():
    places = wording.count()
    assert sum(map(len, places.values())) < 50, places
