"""Takes the pictures of the reports for docs/images from the pages of `make reports`:

    make reports && .venv/bin/python -m tests.experiments.reports.page_pictures

Needs Chromium.
"""

import io
from pathlib import Path

import click
from PIL import Image

from tests.experiments.reports.browsing import Reader
from tests.people.label.browser import chromium

LIMIT = 300_000  # bytes of a picture
SIZE = {"viewport": {"width": 1060, "height": 900}, "device_scale_factor": 2}
SHOTS = {  # file -> report, anchor that is scrolled to, colour scheme, key that is pressed on the map
    "report-evaluate": ("evaluate", None, "light", None),
    "report-evaluate-trajectories": ("evaluate", "trajectories", "light", None),
    "report-attribute": ("attribute", "shapley", "light", None),
    "report-embed": ("embed", "shapes-of-the-points", "light", "End"),
    "report-sweep": ("sweep", "front", "light", None),
}


def keep(reader: Reader, path: Path) -> None:
    """A screenshot taken at twice the size, so that edges are smooth; fewer colours where it would be too
    large.
    """
    large = Image.open(io.BytesIO(reader.page.screenshot())).convert("RGB")
    picture = large.resize((large.width // 2, large.height // 2), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for colours in (None, 255, 96, 32):
        (picture if colours is None else picture.quantize(colours)).save(path, optimize=True)
        if path.stat().st_size <= LIMIT:
            break
    click.echo(f"{path}: {path.stat().st_size} bytes")


def take(browser, reports: Path, name: str, out: Path) -> None:
    """One picture of SHOTS."""
    report, anchor, scheme, key = SHOTS[name]
    page = reports / report / "index.html"
    if not page.is_file():
        raise click.ClickException(f"--reports: expected {page}, got nothing. Run `make reports` first.")
    reader = Reader(browser, page, color_scheme=scheme, **SIZE)
    if anchor is not None:
        reader.page.evaluate("id => document.getElementById(id).scrollIntoView()", anchor)
    if key is not None:
        reader.page.locator("#points svg").press(key)
    reader.settle()
    keep(reader, out / f"{name}.png")
    reader.close()


@click.command()
@click.option(
    "--reports",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/reports"),
    show_default=True,
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/images"), show_default=True
)
@click.option(
    "--only", default=",".join(SHOTS), show_default="all", help="Pictures, with commas between them."
)
def main(reports: Path, out: Path, only: str) -> None:
    """Take pictures of the reports' pages."""
    with chromium() as browser:
        for name in only.split(","):
            take(browser, reports, name, out)


if __name__ == "__main__":
    main()
