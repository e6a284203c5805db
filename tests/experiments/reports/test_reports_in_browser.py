"""Every report's page opens in a browser: no console message, no request, in dark and light; the map obeys
mouse, keyboard and touch.
"""

import contextlib
import re

import numpy as np
import pytest

from eg3d_rlhf.evaluation import comparison_page, embedding, sweep
from eg3d_rlhf.evaluation.sweep import Cell
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import write_page
from tests.evaluation.conftest import tiny_comparison, tiny_pair  # noqa: F401 (fixtures)
from tests.experiments.reports.browsing import Reader
from tests.experiments.reports.small_attribution import attribution_page
from tests.people.label.browser import chromium, needs_chromium

pytestmark = [needs_chromium, pytest.mark.long]
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
PARTS = "reward-shift,same-latents"  # plots, tables and pictures


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def no_png():
    """Figures without their PNG files, which no page shows: a third of the time."""
    save = style.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", lambda drawn, path: None if path.suffix == ".png" else save(drawn, path))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_comparison, tiny_pair, no_png):  # noqa: F811
    """Folder with a page for each report, from tiny networks."""
    root = tmp_path_factory.mktemp("reports")
    c = tiny_comparison
    parts = comparison_page.select_jobs(c, PARTS)
    findings = pages.run(parts, root / "evaluate", quiet=True)
    write_page(
        root / "evaluate/index.html",
        comparison_page.TITLE,
        comparison_page.introduction(c),
        parts,
        findings,
        comparison_page.list_conclusions(c, findings),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "umap_layout", lambda points, seed: np.asarray(points)[:, :2].astype(float))
        patch.setattr(embedding, "umap_version", lambda: "stand-in")
        patch.setattr(embedding, "PIXELS", 32)
        embedding.write(c, root / "embed", quiet=True)
    cells = [
        Cell(lambda_r=0, lambda_sigma=0, seed=0),
        Cell(lambda_r=10, lambda_sigma=0, seed=0),
        Cell(lambda_r=10, lambda_sigma=1, seed=0),
    ]
    networks = dict(zip(cells, sorted(tiny_pair[0].glob("network-snapshot-*")), strict=True))
    sweep.write(c, networks, root / "sweep", quiet=True)
    attribution_page(c, root / "attribute")
    return root


@contextlib.contextmanager
def reading(browser, path, **context):
    """A reader whose page made no mistake until it is closed."""
    reader = Reader(browser, path, **context)
    try:
        yield reader
        assert reader.errors == [] and reader.requests == []
    finally:
        reader.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["evaluate", "attribute", "embed", "sweep"])
def test_pages_open_without_errors_or_requests(browser, written, name, scheme):
    with reading(browser, written / name / "index.html", color_scheme=scheme) as reader:
        page = reader.page
        assert (sum(reader.background()) < 150) is (scheme == "dark")
        other = "light" if scheme == "dark" else "dark"
        assert page.locator(f"main .{scheme} svg").count() == page.locator(f"main .{other} svg").count() > 0
        assert (
            page.locator(f"main .{scheme} svg").first.is_visible()
            and not page.locator(f"main .{other} svg").first.is_visible()
        )
        for link in page.locator("nav a").all():
            link.click()
            assert page.locator(link.get_attribute("href")).first.is_visible()
        for summary in page.locator("summary").all():
            summary.click()
        assert page.locator("details table").first.is_visible()
        # nothing sticks out
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_pages_fit_a_phone_and_print(browser, written):
    for name in ("evaluate", "embed", "sweep"):
        with reading(browser, written / name / "index.html", **PHONE) as reader:
            assert reader.page.evaluate(
                "document.documentElement.scrollWidth <= document.documentElement.clientWidth + 1"
            ), name
        with reading(browser, written / name / "index.html", color_scheme="dark") as reader:
            assert len(reader.page.pdf()) > 10_000
            reader.page.emulate_media(media="print", color_scheme="dark")
            assert reader.page.locator("main .light svg").first.is_visible()


def test_the_map_obeys_the_keyboard(browser, written):
    with reading(browser, written / "embed/index.html") as reader:
        page = reader.page
        plot = reader.page.locator("#points svg")
        lowest = reader.chosen()
        plot.press("End")
        highest = reader.chosen()
        said = page.locator("#points-said").inner_text()
        assert highest != lowest and "32 of 32" in said
        plot.press("Enter")
        assert reader.chosen().split()[1] == highest.split()[1] and reader.chosen() != highest
        plot.press("Home")
        assert reader.chosen() == lowest
        seen = {lowest}
        for _ in range(31):
            plot.press("PageUp")
            seen.add(reader.chosen())
        assert len(seen) == 32 and reader.chosen() == highest  # every point is reached
        seen = set()
        for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown") * 2:
            plot.press(key)
            seen.add(reader.chosen())
        assert len(seen) > 2
        before = plot.locator(".chosen").get_attribute("cx")
        page.locator("input[value=principal]").check()
        assert plot.locator(".chosen").get_attribute("cx") != before or plot.locator(".chosen").get_attribute(
            "cy"
        )


def test_the_map_obeys_mouse_and_touch(browser, written):
    with reading(browser, written / "embed/index.html") as reader:
        dots = reader.page.locator("#points .dot")
        dots.first.scroll_into_view_if_needed()
        for i in (3, 7):
            dots.nth(i).hover(force=True)
            place = reader.page.evaluate(
                "i => document.querySelectorAll('#points .dot')[i].getAttribute('transform')", i
            )
            x, y = re.findall(r"[\d.]+", place)
            ring = reader.page.locator("#points .chosen")
            assert (float(ring.get_attribute("cx")), float(ring.get_attribute("cy"))) == pytest.approx(
                (float(x), float(y)), abs=8
            )
    with reading(browser, written / "embed/index.html", **PHONE) as reader:
        crosses = reader.page.locator("#points .cross")
        seen = {reader.chosen()}
        for i in (2, 9):
            crosses.nth(i).tap(force=True)
            seen.add(reader.chosen())
        reader.page.locator("#points button[data-key=Enter]").tap()
        seen.add(reader.chosen())
        assert len(seen) >= 3
        assert all(
            box["height"] >= 44
            for box in (b.bounding_box() for b in reader.page.locator("#points button").all())
        )


def test_the_map_shows_each_shape_where_it_lies_on_the_sheet(browser, written):
    with reading(browser, written / "embed/index.html") as reader:
        place = reader.page.evaluate("""() => {
            const shape = document.querySelector('#points [data-role="after"] .shape');
            const style = getComputedStyle(shape);
            return [style.backgroundPosition, style.backgroundSize, shape.getAttribute("aria-label")];
        }""")
        seed = int(re.search(r"seed (\d+)", place[2]).group(1))
        x, y = (float(part.rstrip("%")) for part in place[0].split())
        number = 2 * (seed - 200_000) + 1
        assert (x, y) == pytest.approx((100 * (number % 20) / 19, 100 * (number // 20)), abs=0.1) and place[
            1
        ] == "2000% 200%"
