"""How long large assets take in the page, from the disk cache over loopback: two textured meshes of 55 MB, and 500,000 Gaussians a side."""

import functools
import time

import pytest

from eg3d_rlhf.people.label.assets.glb import read_glb
from eg3d_rlhf.people.label.assets.model import glb_parts
from eg3d_rlhf.people.label.assets.ply import read_splats, splat_parts
from eg3d_rlhf.people.label.shape_files import compress
from tests.people.label import asset_files
from tests.people.label.browser import needs_chromium, plan
from tests.people.label.test_page_assets import stays_over_fifty_pairs

pytestmark = [needs_chromium, pytest.mark.long]
QUIET = {"gold_every": 0, "repeat_share": 0.0, "swap_share": 0.0}


@functools.cache
def mesh(seed: int) -> bytes:
    """600,000 points and a texture of 3072 x 3072 pixels, as in the cache."""
    parts = glb_parts(read_glb(memoryview(asset_files.glb(600_000, 3072, "JPEG", seed=seed, noise=True))))
    return compress(b"".join(bytes(part) for part in parts))


@functools.cache
def splats(seed: int) -> bytes:
    """Half a million of degree 0, as in the cache."""
    return compress(b"".join(bytes(part) for part in splat_parts(read_splats(memoryview(asset_files.splats(500_000, 0, seed))))))


@pytest.mark.parametrize("kind", [mesh, splats])
def test_the_first_pair_and_the_next(serve, page, kind):
    """Time to the first pair that can be judged, and from an answer to the next pair, prefetched; bounds are loose, as machines differ."""
    served = serve(plan(4), lambda one: kind(one.seed % 2), campaign=QUIET)
    label = page(served.url, viewport={"width": 1280, "height": 780})
    label.page.add_init_script("localStorage.setItem('eg3d-welcome:local', 'seen')")
    began = time.perf_counter()
    label.page.goto(served.url)
    label.page.wait_for_function("() => window.labelState?.state === 'label'", timeout=60_000)
    ready = time.perf_counter() - began
    for _ in range(3):
        label.page.wait_for_function("() => window.labelState.state === 'label' && window.labelState.ahead >= 1", timeout=60_000)
        label.page.wait_for_timeout(3000)
        label.press("ArrowLeft")
    label.page.wait_for_timeout(500)
    nexts = label.page.evaluate("performance.getEntriesByName('next-pair').map((mark) => mark.duration)")
    sizes = [round(len(kind(seed)) / 1e6, 1) for seed in (0, 1)]
    print(f"\n{kind.__name__}, {sizes} MB packed: ready {ready:.2f} s; next pair {', '.join(f'{one:.0f}' for one in nexts)} ms")
    assert ready < 20 and len(nexts) == 3 and sorted(nexts)[1] < 2000


def test_memory_is_steady_over_fifty_large_pairs(serve, page):
    served = serve(plan(56), lambda one: mesh(one.seed % 2), campaign=QUIET)
    stays_over_fifty_pairs(page(served.url).open())
