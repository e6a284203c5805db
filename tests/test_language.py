"""Tests of the language lint: each finder finds its own kind alone, and the code meets the figures."""

import tomllib
from pathlib import Path

import pytest

from tests import language
from tests.source_trees import without_collections

# Rows of the table of terms that no word of a text betrays: an entry of these gives its reason instead.
BY_READING = {"slab"}
SAMPLES = tomllib.loads((Path(__file__).parent / "language_samples.toml").read_text())["sample"]


def source(text: str) -> language.Source:
    return language.Source(Path("module.py"), text)


def messages(places) -> list[str]:
    return [place.message for place in places]


@pytest.mark.parametrize("word", ["What", "Of", "Whether", "Which", "Its", "Where", "How", "Who"])
def test_a_docstring_that_opens_with_a_question_word_is_found(word):
    assert len(messages(language.openers(source(f'def f():\n    """{word} it computes."""\n')))) == 1


def test_a_docstring_that_opens_with_a_verb_passes():
    text = '"""Compute depths."""\n\n\nclass Depths:\n    """Depths of rays."""\n'
    assert not list(language.openers(source(text)))


@pytest.mark.parametrize(
    "code", ["found = 1", "for own in []:\n    pass", "def f(told):\n    pass", "[one for one in ()]"]
)
def test_variables_of_the_stop_list_are_found(code):
    assert len(list(language.stop_names(source(code)))) == 1


def test_reading_a_name_of_the_stop_list_is_no_assignment():
    assert not list(language.stop_names(source("print(found)\n")))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["code"].strip())
def test_terms_of_our_own_are_found_in_texts_names_and_keys(sample):
    places = set(language.private_terms(source(sample["code"]), language.read_terms()))
    assert len(places) == sample["findings"]


def test_a_phrase_over_a_line_end_is_found_at_its_line():
    text = '"""Compare.\n\nThe interval holds\none half.\n"""\n'
    (place,) = set(language.private_terms(source(text), language.read_terms()))
    assert place.line == 3


def test_every_entry_can_find_something_or_says_why_not():
    for term in language.read_terms():
        assert term.pattern or term.names or term.here in BY_READING
        assert term.pattern or term.names or term.why


def test_every_exempt_file_exists_and_needs_its_exemption():
    terms = language.read_terms()
    for kept in language.read_kept():
        path = language.REPO / kept.file
        assert path.exists(), kept.file
        places = language.private_terms(language.Source(path, path.read_text()), terms)
        assert any(kept.words.search(place.message) for place in places), kept.file


def test_an_entry_without_pattern_and_reason_is_an_error(tmp_path):
    path = tmp_path / "terms.toml"
    path.write_text('[[term]]\nhere = "a"\nwrite = "b"\n')
    with pytest.raises(ValueError, match="a: "):
        language.read_terms(path)


def test_a_comment_that_repeats_its_line_is_found():
    restating = "def f(planes):\n    # the planes\n    return planes\n"
    telling = "def f(planes):\n    # [N, 3, C, H, W]; EG3D's order\n    return planes\n"
    assert len(list(language.restating(source(restating)))) == 1
    assert not list(language.restating(source(telling)))


def test_counts_of_a_module_counted_by_hand():
    text = '"""Whose."""\n\n\ndef f(own):  # [N]\n    """Add one."""\n    # why\n    return own\n'
    counts = language.counts([source(text)])
    assert counts["docstrings"] == 2
    assert counts["stop_word_percent"] == 50
    assert counts["stop_names"] == 1
    assert counts["comments_per_100"] == pytest.approx(200 / 7)
    assert counts["full_line_per_100"] == pytest.approx(100 / 7)


def test_the_code_meets_the_figures_of_contributing():
    with without_collections():
        counts = language.counts(
            [language.Source(path, path.read_text()) for path in language.files(language.COUNTED)]
        )
    assert counts["stop_word_percent"] <= 2
    assert counts["stop_names"] == 0
    assert counts["comments_per_100"] >= 9
    assert counts["full_line_per_100"] >= 3


def test_the_lint_exits_with_1_and_names_the_line(tmp_path, capsys):
    path = tmp_path / "module.py"
    path.write_text('"""Of everything."""\n')
    assert language.main([str(path)]) == 1
    assert "module.py:1:" in capsys.readouterr().out
