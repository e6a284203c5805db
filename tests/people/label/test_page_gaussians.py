"""Gaussians in the label page, as a slow renderer draws them. Letters: N Gaussians, H x W pixels."""

import dataclasses

import numpy as np
import pytest

from eg3d_rlhf.geometry.files.ply import Splats, read_splats, splat_parts
from eg3d_rlhf.people.label.shape_files import compress
from tests.people.label import asset_files
from tests.people.label.browser import Page, needs_chromium, plan

pytestmark = needs_chromium
# of 255: differences between the page and the oracle; rounding to an image alone is 0.25 and 0.5
MEAN = 0.5
LARGEST = 3.0

# the page takes a renderer that hides its name for a graphics card
NAMELESS = """
const found = WebGL2RenderingContext.prototype.getExtension;
WebGL2RenderingContext.prototype.getExtension = function (name) {
  return /debug_renderer/.test(name) ? null : found.call(this, name);
};
"""
WHOLE_PIXELS = """() => {
  document.querySelector('header').style.height = '60px';
  document.querySelector('main').style.gridTemplateRows = '220px auto auto';
}"""


def draw(
    splats: Splats, view: np.ndarray, projection: np.ndarray, size: tuple[int, int], background: np.ndarray
) -> np.ndarray:
    """An image [H, W, 3] in 0..255, by a direct implementation: numpy, float64, one after the other
    (Kerbl et al. 2023; EWA, Zwicker et al. 2001).

    Args: view [4, 4] from the Gaussians' coordinates to the camera's, which looks along -z; projection [4, 4]
        as OpenGL's; size (W, H) pixels; background [3] in 0..255.
    """
    width, height = size
    focal = np.array([projection[0, 0] * width, projection[1, 1] * height]) / 2
    centres = splats.centres.astype(float) @ view[:3, :3].T + view[:3, 3]
    colours = _colours(splats, view)
    spreads = np.einsum("ij,njk,lk->nil", view[:3, :3], _covariances(splats), view[:3, :3])
    # pixels from the middle, y up
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - np.arange(height) - 0.5)
    image = np.broadcast_to(np.asarray(background, float) / 255, (height, width, 3)).copy()
    for i in np.argsort(centres[:, 2], kind="stable"):  # the furthest first
        depth = -centres[i, 2]
        if depth <= 0:
            continue
        slope = centres[i, :2] / depth
        edge = 1.3 / np.array([projection[0, 0], projection[1, 1]])
        bounded = slope.clip(-edge, edge)
        jacobian = np.array(
            [
                [focal[0] / depth, 0, focal[0] * bounded[0] / depth],
                [0, focal[1] / depth, focal[1] * bounded[1] / depth],
            ]
        )
        inverse = np.linalg.inv(jacobian @ spreads[i] @ jacobian.T + 0.3 * np.eye(2))
        dx = x - focal[0] * slope[0]
        dy = y - focal[1] * slope[1]
        power = inverse[0, 0] * dx * dx + 2 * inverse[0, 1] * dx * dy + inverse[1, 1] * dy * dy
        alpha = np.minimum(0.99, splats.opacities[i] / 255 * np.exp(-power / 2))
        alpha = np.where(alpha < 1 / 255, 0, alpha)[..., None]
        image = alpha * colours[i] + (1 - alpha) * image
    return 255 * image.clip(0, 1)


def _covariances(splats: Splats) -> np.ndarray:
    """[N, 3, 3]"""
    w, x, y, z = (splats.rotations / np.linalg.norm(splats.rotations.astype(float), axis=1, keepdims=True)).T
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)  # [N, 3, 3]
    scaled = turn * np.exp(splats.scales.astype(float))[:, None, :]
    return scaled @ scaled.transpose(0, 2, 1)


def _colours(splats: Splats, view: np.ndarray) -> np.ndarray:
    """[N, 3], seen from the camera: real spherical harmonics with the usual signs, degree by degree."""
    eye = np.linalg.inv(view)[:3, 3]
    from_eye = splats.centres - eye
    x, y, z = (from_eye / np.linalg.norm(from_eye, axis=1, keepdims=True)).T
    basis = [-y, z, -x]
    basis = [np.sqrt(3 / (4 * np.pi)) * b for b in basis]
    basis += [
        np.sqrt(15 / (4 * np.pi)) * b
        for b in (x * y, -y * z, (3 * z * z - 1) / (2 * np.sqrt(3)), -x * z, (x * x - y * y) / 2)
    ]
    five = np.sqrt(35 / (32 * np.pi))
    seven = np.sqrt(7 / (16 * np.pi))
    basis += [
        -five * y * (3 * x * x - y * y),
        np.sqrt(105 / (4 * np.pi)) * x * y * z,
        -np.sqrt(21 / (32 * np.pi)) * y * (5 * z * z - 1),
        seven * (5 * z**3 - 3 * z),
        -np.sqrt(21 / (32 * np.pi)) * x * (5 * z * z - 1),
        np.sqrt(105 / (16 * np.pi)) * z * (x * x - y * y),
        -five * x * (x * x - 3 * y * y),
    ]
    count = (splats.degree + 1) ** 2 - 1
    rest = splats.rest.astype(float).reshape(len(x), 3, count)
    summed = (
        0.5 + splats.colours / np.sqrt(4 * np.pi) + np.einsum("nck,kn->nc", rest, np.array(basis)[:count])
    )
    return np.maximum(summed, 0)


def cloud(count: int, degree: int, seed: int) -> Splats:
    """Long and flat, faint and solid Gaussians in a ball, as a file holds them."""
    rng = np.random.default_rng(seed)
    made = read_splats(memoryview(asset_files.splats(count, degree, seed)))
    return dataclasses.replace(
        made,
        centres=rng.uniform(-0.5, 0.5, (count, 3)).astype("<f4"),
        scales=rng.uniform(-5, -2, (count, 3)).astype("<f2"),
        opacities=rng.integers(0, 256, count).astype("u1"),
    )


def gsp1(splats: Splats) -> bytes:
    return compress(b"".join(bytes(part) for part in splat_parts(splats)))


def settled(label: Page) -> None:
    """Wait until the image has its final quality."""
    label.page.wait_for_function("() => window.labelState.settled", timeout=60_000)
    label.drawn()


@pytest.mark.parametrize(
    "card", [False, pytest.param(True, marks=pytest.mark.long)], ids=["workers", "webgl"]
)
@pytest.mark.parametrize("degree", [3, *(pytest.param(d, marks=pytest.mark.long) for d in range(3))])
def test_as_a_slow_renderer_draws_them(serve, page, degree, card):
    planned = plan(1)
    clouds = {planned[0].first.seed: cloud(300, degree, 1), planned[0].second.seed: cloud(300, degree, 2)}
    served = serve(planned, lambda shape: gsp1(clouds[shape.seed]))
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
        print(
            f"{'webgl' if card else 'workers'}, degree {degree}, {side}, {len(keys)} keys: mean {mean:.3f},"
            f" largest {largest:.2f} of 255"
        )
        assert mean < MEAN and largest < LARGEST


def _difference(served, label: Page, clouds: dict, side: str) -> tuple[float, float]:
    box = label.page.locator(f"#{side}").bounding_box()
    size = (round(box["width"]), round(box["height"]))
    camera = label.state("cameras")[side]
    place = label.state("places")[side]
    view = np.reshape(camera["view"], (4, 4)).T @ np.reshape(place, (4, 4)).T
    seed = dict(served.store.shapes(served.campaign))[served.asset(label.state("pair")[side])].seed
    image = label.side_image(side)
    drawn = draw(
        clouds[seed], view, np.reshape(camera["projection"], (4, 4)).T, size, np.array([0xE9, 0xE6, 0xE0])
    )
    inner = drawn[48 : 48 + image.shape[0], 12 : 12 + image.shape[1]]
    gap = np.abs(image - inner)
    return gap.mean(), gap.max()
