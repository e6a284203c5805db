"""Assets in the label page: textured meshes, videos and prompts, and the page's memory over many of them."""

import functools
import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.people.label.assets.glb import read_glb
from eg3d_rlhf.people.label.assets.model import glb_parts
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress
from tests.people.label import asset_files
from tests.people.label.browser import Page, needs_chromium, plan, rows

pytestmark = needs_chromium
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@functools.cache
def textured(seed: int, side: int = 64) -> bytes:
    """A textured GLB as it lies in the cache."""
    return compress(b"".join(bytes(part) for part in glb_parts(read_glb(memoryview(asset_files.glb(2000, side, seed=seed))))))


def mesh(one: Shape) -> bytes:
    """One of six."""
    return textured(one.seed % 6)


def width(picture: np.ndarray) -> int:
    """Columns that show more than the background."""
    return int((np.abs(picture - picture[2, 2]).max(-1) > 24).any(0).sum())


@pytest.mark.long
def test_assets_whose_z_is_up_are_turned(serve, page):
    """What a file has along z stands up, what it has along y lies behind; sizes are as ever."""
    planned, turned = plan(1), {"up": "z"}
    served = serve(planned, mesh, campaign={"extra": turned})
    label = page(served.url).open()
    x, y, z = np.asarray(label.state("places.left")).reshape(4, 4)[:3, :3]  # where the file's axes go
    scale = x[0]
    assert scale > 0
    np.testing.assert_allclose([x, y, z], [[scale, 0, 0], [0, 0, -scale], [0, scale, 0]], atol=1e-9)


@pytest.mark.long
def test_a_textured_pair(serve, page):
    larger = functools.partial(asset_files.glb, 2000, 64)
    document, binary = asset_files.unpack_glb(larger(seed=1))
    document["nodes"][0]["scale"] = [50, 50, 50]
    document["nodes"][0]["translation"] = [7, 0, 0]
    far = compress(b"".join(bytes(p) for p in glb_parts(read_glb(memoryview(asset_files.pack_glb(document, binary))))))
    planned = plan(2)
    served = serve(planned, lambda one: far if one.seed % 2 else textured(1))
    label = page(served.url).open()
    left, right = label.picture("left"), label.picture("right")
    assert np.ptp(left, axis=-1).max() > 80, "in colour"
    assert np.abs(left - right).mean() < 0.5, "one shape in two sizes and places looks the same"
    assert label.state("cameras.left") == label.state("cameras.right")
    assert 0.8 * left.shape[0] < width(left) < left.shape[1]
    label.page.keyboard.press("m")
    label.drawn()
    assert np.ptp(label.picture("left"), axis=-1).max() < 24, "the shape alone is grey"
    label.page.keyboard.press("n")
    label.drawn()
    assert np.ptp(label.picture("left"), axis=-1).max() > 80, "normals as colours"
    label.press("ArrowLeft")
    label.sent()
    assert {"clay", "normals"} <= set(rows(served)[0].views)


@pytest.mark.long
def test_a_damaged_texture_is_said(serve, page):
    served = serve(plan(1), lambda one: _broken() if one.seed % 2 else textured(1))
    label = page(served.url)
    label.page.goto(served.url)
    label.ready("failed")
    assert "texture" in label.page.inner_text("#notice")
    label.errors = [text for text in label.errors if "load texture" not in text]  # three.js' note of it


def _broken() -> bytes:
    whole = gzip.decompress(textured(1))
    at = whole.index(b"IDAT") + 4
    return compress(whole[:at] + bytes(64) + whole[at + 64 :])


@pytest.mark.long
def test_videos_in_step(tmp_path, serve, page):
    films = [asset_files.write_film(tmp_path / f"{i}.mp4", frames=24, seed=i).read_bytes() for i in range(2)]
    served = serve(plan(2), lambda one: compress(films[one.seed % 2]))
    label = page(served.url, reduced_motion="reduce").open()
    assert label.page.get_by_role("button", name="Play").is_visible() and not label.page.locator("#wireframe").is_visible()
    times = "[...document.querySelectorAll('video')].map(video => video.currentTime / video.duration)"
    label.drag("left", 120, 0)
    moved = "() => [...document.querySelectorAll('video')].every(video => video.currentTime > 0 && !video.seeking && video.paused)"
    label.page.wait_for_function(moved)
    one, other = label.page.evaluate(times)
    assert one == pytest.approx(other, abs=0.01) and 0.05 < one < 0.95
    label.page.keyboard.press("p")
    label.page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => !v.paused && v.muted && !v.controls)")
    label.page.wait_for_timeout(400)
    one, other = label.page.evaluate(times)
    assert min(abs(one - other), 1 - abs(one - other)) < 0.06
    label.press("ArrowLeft")
    label.sent()
    assert {"orbit", "play"} <= set(rows(served)[0].views)


@pytest.mark.long
@pytest.mark.parametrize("context", [{}, PHONE], ids=["desktop", "phone"])
def test_the_prompt_is_beside_the_pair(tmp_path, serve, page, context):
    text = "A teapot in the shape of an elephant, glazed in blue, with a trunk for a spout and two round ears for handles"
    png = io.BytesIO()
    Image.new("RGB", (320, 240), (30, 90, 200)).save(png, "WEBP")
    cache = ShapeCache(tmp_path / "cache")
    cache.put_prompt("a" * 64, png.getvalue())
    planned = [replace(pair, first=replace(pair.first, condition="pot"), second=replace(pair.second, condition="pot")) for pair in plan(2)]
    extra = {"conditions": {"pot": {"text": text, "image": "pot.png", "hash": "a" * 64}}}
    served = serve(planned, mesh, campaign={"extra": extra})
    label = page(served.url, **context).open()
    shown, left = label.page.locator("#promptText"), label.page.locator("#left").bounding_box()
    assert shown.inner_text() == text
    line = shown.bounding_box()
    if context:
        assert line["height"] < 40 and line["y"] + line["height"] <= left["y"] + 1
        label.page.locator("#promptMore").tap()
        assert shown.bounding_box()["height"] > 60
    else:
        assert line["x"] + line["width"] <= left["x"]
    label.page.locator("#promptPicture").click()
    assert label.page.locator("#promptLarge").evaluate("image => image.naturalWidth") == 320
    label.page.keyboard.press("Escape")
    assert not label.page.locator("#promptLarge").is_visible()
    assert label.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.long
def test_memory_is_steady_over_fifty_pairs(serve, page):
    served = serve(plan(56), lambda one: textured(one.seed % 6, 512))
    stays_over_fifty_pairs(page(served.url).open())


def stays_over_fifty_pairs(label: Page) -> None:
    """What the page holds, after each ten of fifty pairs."""
    seen = []
    for place in range(50):
        label.ready(ahead=1)
        label.drawn()  # an answer counts once the pair is on the screen
        label.page.wait_for_timeout(150)
        label.press("ArrowLeft")
        if place % 10 == 9:
            seen.append(_memory(label))
    print(*seen, sep="\n")
    for name in ("geometries", "textures", "shapes", "heap", "nodes"):
        assert seen[-1][name] < 1.25 * seen[1][name] + 2, (name, seen)


def _memory(label: Page) -> dict:
    """Figures of the page after a collection of garbage."""
    wire = label.context.new_cdp_session(label.page)
    wire.send("HeapProfiler.collectGarbage")
    wire.send("Performance.enable")
    found = {m["name"]: m["value"] for m in wire.send("Performance.getMetrics")["metrics"]}
    return {**label.state("memory"), "heap": found["JSHeapUsedSize"] / 1e6, "nodes": found["Nodes"]}
