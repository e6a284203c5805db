"""Gaussians in the label page: as a slow renderer draws them, and steady with half a million."""

import dataclasses

import numpy as np
import pytest

from eg3d_rlhf.people.label.assets.ply import Splats, read_splats, splat_parts
from eg3d_rlhf.people.label.shape_files import compress
from tests.people.label import asset_files
from tests.people.label.browser import Page, needs_chromium, plan
from tests.people.label.gaussian_oracle import draw

pytestmark = needs_chromium
MEAN, LARGEST = 0.5, 3.0  # of 255: differences between the page and the oracle; rounding to a picture alone is 0.25 and 0.5

# the page takes a renderer that hides its name for a graphics card
NAMELESS = """
const found = WebGL2RenderingContext.prototype.getExtension;
WebGL2RenderingContext.prototype.getExtension = function (name) { return /debug_renderer/.test(name) ? null : found.call(this, name) };
"""
WHOLE_PIXELS = """() => {
  document.querySelector('header').style.height = '60px';
  document.querySelector('main').style.gridTemplateRows = '220px auto auto';
}"""


def cloud(count: int, degree: int, seed: int) -> Splats:
    """Long and flat, faint and solid Gaussians in a ball, as a file holds them."""
    rng = np.random.default_rng(seed)
    made = read_splats(memoryview(asset_files.splats(count, degree, seed)))
    return dataclasses.replace(
        made, centres=rng.uniform(-0.5, 0.5, (count, 3)).astype("<f4"), scales=rng.uniform(-5, -2, (count, 3)).astype("<f2"),
        opacities=rng.integers(0, 256, count).astype("u1"),
    )  # fmt: skip


def gsp1(splats: Splats) -> bytes:
    """As it lies in the cache."""
    return compress(b"".join(bytes(part) for part in splat_parts(splats)))


def settled(label: Page) -> None:
    """Wait until the picture is as good as it gets."""
    label.page.wait_for_function("() => window.labelState.settled", timeout=60_000)
    label.drawn()


@pytest.mark.parametrize("card", [False, pytest.param(True, marks=pytest.mark.long)], ids=["workers", "webgl"])
@pytest.mark.parametrize("degree", [3, *(pytest.param(d, marks=pytest.mark.long) for d in range(3))])
def test_as_a_slow_renderer_draws_them(serve, page, degree, card):
    planned = plan(1)
    clouds = {planned[0].first.seed: cloud(300, degree, 1), planned[0].second.seed: cloud(300, degree, 2)}
    served = serve(planned, lambda one: gsp1(clouds[one.seed]))
    label = page(served.url, viewport={"width": 760, "height": 560})
    if card:
        label.page.add_init_script(NAMELESS)
    label.open()
    label.page.evaluate(WHOLE_PIXELS)
    for side, keys in (("left", []), ("right", ["Shift+ArrowRight"] * 5 + ["Shift+ArrowUp"] * 2 + ["+"] * 6)):
        for key in keys:
            label.page.keyboard.press(key)
        settled(label)
        mean, largest = _difference(served, label, clouds, side)
        print(f"{'webgl' if card else 'workers'}, degree {degree}, {side}, {len(keys)} keys: mean {mean:.3f}, largest {largest:.2f} of 255")
        assert mean < MEAN and largest < LARGEST


def _difference(served, label: Page, clouds: dict, side: str) -> tuple[float, float]:
    box = label.page.locator(f"#{side}").bounding_box()
    size = (round(box["width"]), round(box["height"]))
    camera, place = label.state("cameras")[side], label.state("places")[side]
    view = np.reshape(camera["view"], (4, 4)).T @ np.reshape(place, (4, 4)).T
    seed = dict(served.store.shapes(served.campaign))[served.asset(label.state("pair")[side])].seed
    found = label.picture(side)
    drawn = draw(clouds[seed], view, np.reshape(camera["projection"], (4, 4)).T, size, np.array([0xE9, 0xE6, 0xE0]))
    inner = drawn[48 : 48 + found.shape[0], 12 : 12 + found.shape[1]]
    gap = np.abs(found - inner)
    return gap.mean(), gap.max()
