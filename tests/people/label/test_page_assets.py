"""Assets in the label page: textured meshes, videos and prompts, and the page's memory over many of them."""

import functools
import gzip
import io
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.geometry.files.glb import read_glb
from eg3d_rlhf.geometry.files.model import glb_parts
from eg3d_rlhf.geometry.files.ply import read_splats, splat_parts
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress
from tests.people.label import asset_files
from tests.people.label.browser import ENGLISH, Page, needs_chromium, plan, rows
from tests.people.label.plans import QUIET

pytestmark = needs_chromium
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def packed(glb: bytes) -> bytes:
    """A GLB as it lies in the cache."""
    return compress(b"".join(bytes(part) for part in glb_parts(read_glb(memoryview(glb)))))


@functools.cache
def textured(seed: int, side: int = 64) -> bytes:
    """A textured GLB as it lies in the cache."""
    return packed(asset_files.glb(2000, side, seed=seed))


def mesh(shape: Shape) -> bytes:
    """One of six."""
    return textured(shape.seed % 6)


def width(image: np.ndarray) -> int:
    """Columns that show more than the background."""
    return int((np.abs(image - image[2, 2]).max(-1) > 24).any(0).sum())


@pytest.mark.long
def test_assets_whose_z_is_up_are_turned(serve, page):
    """The z axis of files points up, their y axis backwards; sizes do not change."""
    planned = plan(1)
    up_axis = {"up": "z"}
    served = serve(planned, mesh, campaign={"extra": up_axis})
    label = page(served.url).open()
    x, y, z = np.asarray(label.state("places.left")).reshape(4, 4)[:3, :3]  # where the file's axes go
    scale = x[0]
    assert scale > 0
    np.testing.assert_allclose([x, y, z], [[scale, 0, 0], [0, 0, -scale], [0, scale, 0]], atol=1e-9)


@pytest.mark.long
def test_a_textured_pair(serve, page):
    document, binary = asset_files.unpack_glb(asset_files.glb(2000, 64, seed=1))
    document["nodes"][0]["scale"] = [50, 50, 50]
    document["nodes"][0]["translation"] = [7, 0, 0]
    far = packed(asset_files.pack_glb(document, binary))
    served = serve(plan(2), lambda shape: far if shape.seed % 2 else textured(1))
    label = page(served.url).open()
    left = label.side_image("left")
    right = label.side_image("right")
    assert np.ptp(left, axis=-1).max() > 80, "in colour"
    assert np.abs(left - right).mean() < 0.5, "one shape in two sizes and places looks the same"
    assert label.state("cameras.left") == label.state("cameras.right")
    assert 0.8 * left.shape[0] < width(left) < left.shape[1]
    label.page.keyboard.press("m")
    label.drawn()
    assert np.ptp(label.side_image("left"), axis=-1).max() < 24, "the shape alone is grey"
    label.page.keyboard.press("n")
    label.drawn()
    assert np.ptp(label.side_image("left"), axis=-1).max() > 80, "normals as colours"
    label.press("ArrowLeft")
    label.sent()
    assert {"clay", "normals"} <= set(rows(served)[0].views)


@pytest.mark.long
@pytest.mark.parametrize("place", ["browser", "reader"])
def test_a_texture_that_cannot_be_shown_is_named_beside_its_shape(serve, page, place):
    """It is damaged in the file that the browser gets, or of a format that the reader leaves out."""
    document, binary = asset_files.unpack_glb(asset_files.glb(2000, 64, seed=1))
    document["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]
    left_out = packed(asset_files.pack_glb(document, binary))
    broken = _damaged_file() if place == "browser" else left_out
    served = serve(plan(2), lambda shape: broken if shape.seed == 1001 else textured(1), campaign=QUIET)
    label = page(served.url).open()
    sides = {side: label.page.locator(f"#{side}Note") for side in ("left", "right")}
    noted_counts = []
    for press in (True, False):  # the pairs come in any order
        noted_sides = [side for side, note in sides.items() if note.is_visible()]
        for side in sides:
            colour_range = np.ptp(label.side_image(side)[:-40], axis=-1).max()
            assert colour_range < 24 if side in noted_sides else colour_range > 80
        assert all(sides[side].inner_text() == ENGLISH["shown.untextured"] for side in noted_sides)
        noted_counts.append(len(noted_sides))
        if press:
            label.press("ArrowLeft")
            label.ready()
    assert sorted(noted_counts) == [0, 1]
    label.forgive("load texture")


def _damaged_file() -> bytes:
    content = gzip.decompress(textured(1))
    at = content.index(b"IDAT") + 4
    return compress(content[:at] + bytes(64) + content[at + 64 :])


@pytest.mark.long
def test_videos_in_step(tmp_path, serve, page):
    films = [asset_files.write_film(tmp_path / f"{i}.mp4", frames=24, seed=i).read_bytes() for i in range(2)]
    served = serve(plan(2), lambda a: compress(films[a.seed % 2]))
    label = page(served.url, reduced_motion="reduce").open()
    assert label.page.locator("#play").is_visible() and not label.page.locator("#wireframe").is_visible()
    times = "[...document.querySelectorAll('video')].map(video => video.currentTime / video.duration)"
    label.drag("left", 120, 0)
    moved = (
        "() => [...document.querySelectorAll('video')].every(video => video.currentTime > 0 && !video.seeking"
        " && video.paused)"
    )
    label.page.wait_for_function(moved)
    a, b = label.page.evaluate(times)
    assert a == pytest.approx(b, abs=0.01) and 0.05 < a < 0.95
    label.page.keyboard.press("p")
    label.page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => !v.paused && v.muted && !v.controls)"
    )
    label.page.wait_for_timeout(400)
    a, b = label.page.evaluate(times)
    assert min(abs(a - b), 1 - abs(a - b)) < 0.06
    label.press("ArrowLeft")
    label.sent()
    assert {"orbit", "play"} <= set(rows(served)[0].views)


@pytest.mark.long
@pytest.mark.parametrize("context", [{}, PHONE], ids=["desktop", "phone"])
def test_the_prompt_is_beside_the_pair(tmp_path, serve, page, context):
    text = (
        "A teapot in the shape of an elephant, glazed in blue, with a trunk for a spout and two round ears"
        " for handles"
    )
    png = io.BytesIO()
    Image.new("RGB", (320, 240), (30, 90, 200)).save(png, "WEBP")
    cache = ShapeCache(tmp_path / "cache")
    cache.put_prompt("a" * 64, png.getvalue())
    planned = [
        replace(
            pair, first=replace(pair.first, condition="pot"), second=replace(pair.second, condition="pot")
        )
        for pair in plan(2)
    ]
    extra = {"conditions": {"pot": {"text": text, "image": "pot.png", "hash": "a" * 64}}}
    served = serve(planned, mesh, campaign={"extra": extra})
    label = page(served.url, **context).open()
    shown = label.page.locator("#promptText")
    left = label.page.locator("#left").bounding_box()
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
@pytest.mark.parametrize(
    "made", [lambda shape: textured(shape.seed % 6, 512), lambda shape: heavy_mesh(shape.seed % 2)]
)
def test_memory_is_steady_over_fifty_pairs(serve, page, made):
    """Return the memory of the page after each ten of fifty pairs."""
    label = page(serve(plan(56), made, campaign=QUIET).url).open()
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
    wire = label.context.new_cdp_session(label.page)
    wire.send("HeapProfiler.collectGarbage")
    wire.send("Performance.enable")
    metrics = {m["name"]: m["value"] for m in wire.send("Performance.getMetrics")["metrics"]}
    return {**label.state("memory"), "heap": metrics["JSHeapUsedSize"] / 1e6, "nodes": metrics["Nodes"]}


# ---- how long large ones take, from the disk cache over loopback: two textured meshes of 55 MB, and 500,000
# Gaussians a side


@functools.cache
def heavy_mesh(seed: int) -> bytes:
    """600,000 points and a texture of 3072 x 3072 pixels, as in the cache."""
    return packed(asset_files.glb(600_000, 3072, "JPEG", seed=seed, noise=True))


@functools.cache
def heavy_splats(seed: int) -> bytes:
    """Half a million of degree 0, as in the cache."""
    return compress(
        b"".join(
            bytes(part) for part in splat_parts(read_splats(memoryview(asset_files.splats(500_000, 0, seed))))
        )
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", [heavy_mesh, heavy_splats])
def test_the_first_pair_and_the_next(serve, page, kind):
    """Time to the first pair that can be judged, and from an answer to the next pair, prefetched; bounds are
    loose, as machines differ.
    """
    served = serve(plan(4), lambda shape: kind(shape.seed % 2), campaign=QUIET)
    label = page(served.url, viewport={"width": 1280, "height": 780})
    label.page.add_init_script("localStorage.setItem('eg3d-welcome:local', 'seen')")
    began = time.perf_counter()
    label.page.goto(served.url)
    label.page.wait_for_function("() => window.labelState?.state === 'label'", timeout=60_000)
    ready = time.perf_counter() - began
    for _ in range(3):
        label.page.wait_for_function(
            "() => window.labelState.state === 'label' && window.labelState.ahead >= 1", timeout=60_000
        )
        label.page.wait_for_timeout(3000)
        label.press("ArrowLeft")
    label.page.wait_for_timeout(500)
    waits = label.page.evaluate("performance.getEntriesByName('next-pair').map((mark) => mark.duration)")
    sizes = [round(len(kind(seed)) / 1e6, 1) for seed in (0, 1)]
    print(
        f"\n{kind.__name__}, {sizes} MB packed: ready {ready:.2f} s; next pair"
        f" {', '.join(f'{wait:.0f}' for wait in waits)} ms"
    )
    assert ready < 20 and len(waits) == 3 and sorted(waits)[1] < 2000
