"""What the documentation promises: links and anchors that lead somewhere, files that exist, notebooks that
run, a site.
"""

import functools
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?")  # file, anchor
PATH = re.compile(
    r"(?<![\w/.<*-])((?:tools|tests|docs|benchmarks|assets|builders|training|torch_utils|eg3d_rlhf)"
    r"/[\w/.-]*\w"
    r"\.(?:py|md|json|jsonl|png|cu|cpp|h|safetensors))\b"
)


def slugs(text: str) -> list[str]:
    """Return the anchors that GitHub gives to a page's headings: the words in lower case with hyphens for
    spaces, and a number from the second heading of the same words on.
    """
    text = re.sub(r"^ *(```|~~~).*?^ *\1", "", text, flags=re.M | re.S)
    found: list[str] = []
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's own words
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.append(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


@functools.cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page: those of its headings, and those that its HTML names."""
    text = page.read_text()
    return {*slugs(text), *re.findall(r"<\w+ [^>]*\b(?:id|name)=\"([^\"]+)\"", text)}


def test_slugs_are_githubs():
    text = (
        "# One, *two* & `three_x`\n\n```bash\n# a comment\n```\n\n## [A link](b.md#c)\n## Again\n### Again\n"
    )
    assert slugs(text) == ["one-two--three_x", "a-link", "again", "again-1"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    links = [(page.parent / link if link else page, anchor) for link, anchor in LINK.findall(text)]
    assert [path for path, _ in links if not path.exists()] == []
    anchored = [(path, anchor) for path, anchor in links if anchor and path.suffix == ".md"]
    assert [f"{path}#{anchor}" for path, anchor in anchored if anchor not in anchors_of(path)] == []
    assert [path for path in PATH.findall(text) if not (REPO / path).exists()] == []


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in PAGES for link, _ in LINK.findall(page.read_text())}
    kept = [path for path in (REPO / "docs" / "images").iterdir() if path.suffix in (".png", ".webp")]
    assert [path.name for path in kept if path.resolve() not in shown] == []


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
def test_the_site_builds_with_its_notebooks_run(tmp_path):
    build_site(tmp_path)


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
