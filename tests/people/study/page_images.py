"""Walks through a running blind study as an annotator does, answers "equal" throughout, and tiles what both
sides of each trial showed:

    python tools/study.py --b=RUN --n=40 --annotators-per-pair=1 --set view=back --set psi=1 &
    python -m tests.people.study.page_images

Needs Chromium. The study is used up by it; delete its folder afterwards.
"""

import contextlib
import sqlite3
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw

from tests.people.label.browser import Page, chromium

# trials beside each other; pixels of one side
COLUMNS = 5
HEAD = (104, 128)
CROP = (0.27, 0.07, 0.73, 0.83)  # of a side's image: the head
QUERY = """select a.token, a.first_is_left, f.generator, s.generator
           from assignments a join pairs p on a.pair_id = p.id
           join shapes f on f.id = p.first_id join shapes s on s.id = p.second_id
           where f.generator != s.generator"""


def trials(page: Page) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Answer all trials; return the images of both sides by assignment, training and checks included."""
    seen = {}
    while page.state("state") == "label":
        page.drawn()
        page.page.wait_for_timeout(250)  # shading settles
        shown = page.state("pair.assignment")
        seen[shown] = (page.side_image("left"), page.side_image("right"))
        page.answer("ArrowDown")
        while page.state("state") != "finished" and (
            page.state("state") != "label" or page.state("pair.assignment") == shown
        ):
            if page.state("state") == "explained":
                page.page.keyboard.press("Enter")
            page.page.wait_for_timeout(200)
    page.sent()
    return seen


def after_is_left(study: Path) -> dict[str, bool]:
    """Return, by assignment, whether --b was on the left, for trials between the two networks only."""
    with contextlib.closing(sqlite3.connect(f"file:{study / 'study.db'}?mode=ro", uri=True)) as store:
        rows = store.execute(QUERY).fetchall()
        # checks are of --a
        (before,) = store.execute("select generator from shapes where degradation != '' limit 1").fetchone()
    return {
        token: (first if first_is_left else second) != before for token, first_is_left, first, second in rows
    }


def tiled(seen: dict[str, tuple[np.ndarray, np.ndarray]], key: dict[str, bool]) -> Image.Image:
    """All trials, numbered; a bar below the side that showed --b."""
    shown = [(sides, key[token]) for token, sides in seen.items() if token in key]
    wide = 2 * HEAD[0] + 10
    high = HEAD[1] + 26
    sheet = Image.new("RGB", (COLUMNS * wide, -(-len(shown) // COLUMNS) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (sides, left) in enumerate(shown):
        x = i % COLUMNS * wide + 5
        y = i // COLUMNS * high
        draw.text((x, y + 2), f"{i + 1}", (110, 110, 110))
        for side, image in enumerate(sides):
            full_image = Image.fromarray(image.astype(np.uint8))
            box = tuple(round(share * edge) for share, edge in zip(CROP, 2 * full_image.size, strict=True))
            sheet.paste(
                full_image.crop(box).resize(HEAD, Image.Resampling.LANCZOS), (x + side * HEAD[0], y + 15)
            )
        at = x + (0 if left else HEAD[0])
        draw.rectangle((at + 4, y + HEAD[1] + 17, at + HEAD[0] - 5, y + HEAD[1] + 19), fill="black")
    return sheet


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option(
    "--study", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/study"), show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/images"), show_default=True
)
def main(url: str, study: Path, out: Path) -> None:
    """Write study-pairs.png."""
    with chromium() as browser:
        page = Page(browser, url, viewport={"width": 1000, "height": 640}).open()
        seen = trials(page)
    tiled(seen, after_is_left(study)).convert("L").quantize(24).save(out / "study-pairs.png", optimize=True)
    click.echo(f"{len(seen)} trials; written to {out}/study-pairs.png")


if __name__ == "__main__":
    main()
