"""Texts of the pages in three languages: complete tables, and no page with words of another language."""

import json
import re

import pytest

from eg3d_rlhf.people.label.assets.damage import DAMAGES as ASSET_DAMAGES
from eg3d_rlhf.people.label.entities import DAMAGES, SKIP_REASONS, Mode
from eg3d_rlhf.people.label.pairing import EXPLANATION, SINGLE_EXPLANATION
from eg3d_rlhf.people.label.server.app import TEXTS, language_of
from tests.people.label.browser import needs_chromium
from tests.people.label.plans import singles
from tests.people.label.test_page_files import STATIC, WEB, Tags

SOURCES = WEB / "src"
TABLES = {path.name.split(".")[1]: json.loads(path.read_text()) for path in SOURCES.glob("texts.*.json")}
ENGLISH = TABLES["en"]


def placeholders(entry) -> list[set[str]]:
    """The names in braces of a text, or of each plural form."""
    return [
        set(re.findall(r"\{(\w+)\}", text))
        for text in (entry.values() if isinstance(entry, dict) else [entry])
    ]


@pytest.mark.parametrize("tables", [TABLES, TEXTS], ids=["page", "login"])
def test_every_language_has_the_same_texts_with_the_same_placeholders(tables):
    assert sorted(tables) == ["de", "en", "es"]
    for language, table in tables.items():
        assert list(table) == list(tables["en"]), language
        for key, entry in table.items():
            assert placeholders(entry) == placeholders(tables["en"][key]), (language, key)
            if isinstance(entry, dict):
                assert {"one", "other"} == set(entry)


def test_pages_name_texts_that_exist_and_no_text_is_left_over():
    tags = Tags((STATIC / "index.html").read_text()).elements
    named = {
        attributes[key]
        for _, attributes in tags
        for key in ("data-text", "data-label", "data-alt")
        if key in attributes
    }
    scripts = "".join(path.read_text() for path in sorted(SOURCES.glob("*.js")))
    named |= set(re.findall(r"'([a-z]+(?:\.[a-zA-Z]+)+|[a-zA-Z]+)'", scripts)) & set(ENGLISH) | set(
        re.findall(r"\bt\('([^']+)'", scripts)
    )
    # as t(`skip.${reason}`)
    families = {family for family in re.findall(r"`([a-z.]+)\.\$\{", scripts)} | {"known"}
    assert named <= set(ENGLISH), named - set(ENGLISH)
    unused = [
        key
        for key in ENGLISH
        if key not in named and key.rpartition(".")[0] not in families and not key.startswith("known.")
    ]
    assert unused == []


def test_what_the_server_says_to_annotators_is_in_the_table():
    damages = set(DAMAGES.values()) | set(ASSET_DAMAGES.values())
    lessons = [known.format(seen) for known in (EXPLANATION, SINGLE_EXPLANATION) for seen in damages]
    assert sorted(lessons) == sorted(text for key, text in ENGLISH.items() if key.startswith("known."))
    assert all(f"skip.{reason}" in ENGLISH for reason in SKIP_REASONS)


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("de", "de"),
        ("DE-AT,de;q=0.9,en;q=0.5", "de"),
        ("fr,es-MX;q=0.4,en;q=0.3", "es"),
        ("en;q=0.1, es;q=0.7", "es"),
        ("*", "en"),
        ("fr", "en"),
        ("de;q=0", "en"),
        ("de;q=nan,es;q=0.2", "es"),
        ("de;q=" + "9" * 5000, "de"),
        (";,;q,=", "en"),
    ],
)
def test_the_login_page_speaks_the_browsers_language(accepted, language):
    assert language_of(accepted) == language


@needs_chromium
def test_a_chosen_language_is_kept(serve, page):
    served = serve(
        singles(4), mode=Mode.SINGLE, campaign={"scale": "thumbs", "swap_share": 0, "gold_every": 0}
    )
    label = page(served.url, locale="fr").open()
    assert label.page.inner_text("h1") == ENGLISH["title.single"], "no table for French"
    with label.page.expect_navigation():
        label.page.get_by_label("Language").select_option("es")
    label.ready()
    label.page.reload()
    label.ready()
    assert label.page.inner_text("h1") == label.page.title() == TABLES["es"]["title.single"]
    assert label.page.get_by_role("button", name=TABLES["es"]["answer.up"], exact=True).is_visible()
    assert label.page.get_by_role("progressbar", name=TABLES["es"]["progress.single"]).count() == 1
