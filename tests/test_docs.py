"""What the documentation promises: links that lead somewhere, files that exist, pages of a length that a
person reads, a site.
"""

import os
import pkgutil
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
MANUALS = [page for page in PAGES[1:] if "lab-book" not in page.parts]  # the lab book is dated notes
# words of all that teach, of a page, of a paragraph; of a table
ALL = 20_000
PAGE = 1500
PARAGRAPH = 80
ROWS = 8
COLUMNS = 6
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PATH = re.compile(
    r"(?<![\w/.<*-])((?:tools|tests|docs|benchmarks|assets|training|torch_utils|eg3d_rlhf)/[\w/.-]*\w"
    r"\.(?:py|md|json|jsonl|png|cu|cpp|h|safetensors))\b"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []
    assert [path for path in PATH.findall(text) if not (REPO / path).exists()] == []


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    kept = [path for path in (REPO / "docs" / "images").iterdir() if path.suffix in (".png", ".webp")]
    assert [path.name for path in kept if path.resolve() not in shown] == []


def blocks_of(text: str) -> list[str]:
    """Paragraphs, items of lists and tables of a page, without its code."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1$", "", text, flags=re.M | re.S)
    return [
        block
        for block in re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", text)
        if block.strip() and not block.startswith("    ")
    ]


def limits_broken(text: str, room: str) -> list[str]:
    broken = []
    if (words := len(text.split())) > PAGE and room != "reference":
        broken.append(f"page of {words} words")
    for block in blocks_of(text):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        if rows and room not in ("results", "reference"):
            sizes = (len(rows) - 2, rows[0].replace("\\|", "").count("|") - 1)
            if sizes[0] > ROWS or sizes[1] > COLUMNS:
                broken.append(f"table of {sizes[0]} rows and {sizes[1]} columns: {rows[0][:40]}")
        elif not rows and (words := len(block.split())) > PARAGRAPH:
            broken.append(f"paragraph of {words} words: {block.strip()[:40]}")
    return broken


@pytest.mark.parametrize("page", MANUALS, ids=lambda page: str(page.relative_to(REPO)))
def test_a_page_is_of_a_length_that_a_person_reads(page):
    place = page.relative_to(REPO / "docs")
    broken = limits_broken(page.read_text(), place.parts[0])
    assert broken == []


def test_the_limits_see_what_is_too_long():
    table = "| a | b |\n| - | - |\n" + "| 1 | 2 |\n" * 9
    page = "word " * 81 + "\n\n- " + "word " * 80 + "\n\n" + table + "```\n" + "word " * 100 + "\n```\n"
    assert [broken.split(":")[0] for broken in limits_broken(page, "guides")] == [
        "paragraph of 81 words",
        "paragraph of 81 words",
        "table of 9 rows and 2 columns",
    ]
    assert (
        len(limits_broken(page, "results")) == 2
        and limits_broken("word " * 1501, "guides")[0] == "page of 1501 words"
    )


def test_the_manuals_are_read_in_an_afternoon():
    taught = [
        page for page in MANUALS if page.relative_to(REPO / "docs").parts[0] not in ("results", "reference")
    ]
    assert sum(len(page.read_text().split()) for page in taught) <= ALL


# asked of the network by a page
FOREIGN = re.compile(r"<(?:script|img|link|source|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//")


def build_site(out: Path, *options: str) -> None:
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-E",
        "-W",
        "--keep-going",
        *options,
        str(REPO / "docs"),
        str(out),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr


def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(tmp_path):
    build_site(tmp_path, "-D", "nb_execution_mode=off")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30 and [page.name for page in pages if FOREIGN.search(page.read_text())] == []


@pytest.mark.long
def test_the_site_with_its_notebooks_run_takes_two_minutes_of_one_core(tmp_path):
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    build_site(tmp_path)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 120


def test_functions_of_the_papers_exist():
    names = re.findall(r"`(eg3d_rlhf(?:\.\w+)+)`", (REPO / "docs" / "reference" / "papers.md").read_text())
    assert len(names) > 40 and [pkgutil.resolve_name(name) for name in names]


def test_the_walks_name_what_is_there():
    walks = (REPO / "docs" / "extending.md").read_text().split("## Three walks\n")[1].split("\n**")
    steps = [re.findall(r"^\d\. .*(?:\n   .*)*", walk, re.M) for walk in walks if walk.strip()]
    assert [len(walk) for walk in steps] == [5, 5, 6]
    for step in sum(steps, []):
        path = REPO / re.search(r"`([\w/]+\.py)`", step)[1]
        for name in re.findall(r"`([A-Za-z_.]+)`", step):
            if name.endswith(".py") or name.startswith("reward."):
                continue
            last = name.split(".")[-1]
            assert re.search(rf"\b{last}\b", path.read_text()), (name, path)
