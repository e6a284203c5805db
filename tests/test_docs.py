"""What the documentation promises: links that lead somewhere, files and test files that exist, tools that are all named."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
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


def test_every_page_and_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    kept = [*(REPO / "docs").rglob("*.md"), *(p for p in (REPO / "docs").rglob("*") if p.suffix in (".png", ".svg", ".jpg", ".gif"))]
    assert [p.name for p in kept if p.resolve() not in shown] == []


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
