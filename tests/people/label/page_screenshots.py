"""Take the screenshots of the pages for docs/images: `python -m tests.people.label.page_screenshots`.

It takes about two minutes and needs Chromium.
"""

import io
import itertools
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
from PIL import Image

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.geometry.files.model import ImageFile, glb_parts, model_from_primitives, triangle_primitive
from eg3d_rlhf.geometry.files.ply import Splats, splat_parts
from eg3d_rlhf.people.label.entities import Choice, PlannedPair, Shape
from eg3d_rlhf.people.label.pairing import PairingOptions, shape_factory
from eg3d_rlhf.people.label.preparation import prepare
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress
from eg3d_rlhf.people.label.shape_rendering import ShapeRenderer
from tests.people.label.asset_files import sphere
from tests.people.label.browser import Page, chromium, plan, serving_page
from tests.people.label.plans import Clock, answer_all
from tests.people.label.serving import Served

SEEDS = (10_003, 10_012, 10_021, 10_030, 10_044, 10_051, 10_060, 10_075)
LIMIT = 300_000  # bytes of an image
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TEXT = "A small green planet with snow on its mountains and a deep blue sea"
SIZE = (512, 1024)  # pixels of a planet's map
PEOPLE = {"ada": 2.0, "bea": 1.4, "cem": 0.25}  # slope of each annotator's choice probability


def keep(page: Page, path: Path) -> None:
    """A screenshot taken at twice the size, so that edges are smooth."""
    large = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    image = large.resize((large.width // 2, large.height // 2), Image.Resampling.LANCZOS)
    image.save(path, optimize=True)
    if path.stat().st_size > LIMIT:
        image.quantize(255).save(path, optimize=True)
    click.echo(f"{path}: {path.stat().st_size} bytes")


def submit_answers(served: Served) -> None:
    """Simulated answers of some evenings; the shapes' worth is made up."""
    rng = random.Random(1)
    store = served.store
    store.clock = Clock(store.clock() - 9000.0)

    def choose(sharpness: float, left: Shape, right: Shape) -> Choice:
        store.clock.now += rng.expovariate(1 / 18) + 2
        gap = sharpness * (SEEDS.index(right.seed) - SEEDS.index(left.seed)) / 2
        return (
            Choice.TIE
            if rng.random() < 0.08
            else Choice.RIGHT
            if rng.random() < 1 / (1 + math.exp(-gap))
            else Choice.LEFT
        )

    for name, sharpness in PEOPLE.items():
        who = store.annotator_without_token(name).id
        while answer_all(
            store,
            served.campaign,
            who,
            partial(choose, sharpness),
            1,
            1,
            milliseconds=int(1000 * rng.uniform(2, 15)),
        ):
            pass


def write_screenshots(served: Served, browser, folder: Path) -> None:
    """All of them."""

    def page(**context) -> Page:
        return Page(
            browser,
            served.url,
            **{"viewport": {"width": 1280, "height": 780}, "device_scale_factor": 2, **context},
        )

    for name, context in [
        ("label-page", {}),
        ("label-phone", PHONE),
    ]:
        label = page(**context).open()
        for choice in random.Random(name).choices(["ArrowLeft", "ArrowRight", "ArrowDown"], k=4):
            label.page.wait_for_timeout(4000)
            label.press(choice)
        label.sent()
        label.page.keyboard.press("4")
        label.page.wait_for_timeout(400)
        keep(label, folder / f"{name}.png")
        label.context.close()
    submit_answers(served)
    admin = page(viewport={"width": 1280, "height": 1610})
    admin.page.goto(served.url + "/admin")
    admin.page.wait_for_selector("#strengths svg")
    keep(admin, folder / "label-admin.png")


def relief(seed: int, roughness: float) -> np.ndarray:
    """Heights [H, W] in -1..1 of a made-up planet, seamless around."""
    v, u = np.meshgrid(np.linspace(0, np.pi, SIZE[0]), np.linspace(0, 2 * np.pi, SIZE[1]), indexing="ij")
    point = np.stack([np.sin(v) * np.sin(u), np.cos(v), np.sin(v) * np.cos(u)], -1)
    rng = np.random.default_rng(seed)
    height = np.zeros(SIZE)
    for octave in range(1, 7):
        for _ in range(8):
            wave = rng.normal(size=3) * 1.7**octave
            height += roughness**octave * np.sin(point @ wave + rng.uniform(0, 6))
    return height / np.abs(height).max()


def colours(height: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: sea, shore, grass, rock and snow."""
    levels = [-1, -0.05, 0.02, 0.3, 0.55, 1]
    tints = [(12, 40, 110), (40, 120, 180), (205, 190, 130), (70, 130, 60), (120, 110, 95), (250, 250, 250)]
    return np.stack([np.interp(height, levels, [tint[c] for tint in tints]) for c in range(3)], -1).astype(
        np.uint8
    )


def glb(seed: int) -> bytes:
    """A planet as a textured mesh; every other one's map is coarse."""
    height = relief(3, 0.62 if seed % 2 else 0.5)
    round_ball, faces, uv = sphere(2 * 180**2)
    normals = round_ball / np.linalg.norm(round_ball, axis=1, keepdims=True)
    column, row = (uv * (SIZE[1] - 1, SIZE[0] - 1)).astype(int).T
    positions = (1 + 0.12 * height[row, column].clip(0))[:, None] * normals
    out = io.BytesIO()
    image = Image.fromarray(colours(height))
    (image if seed % 2 else image.resize((96, 48))).save(out, "PNG")
    material = {
        "pbrMetallicRoughness": {
            "baseColorTexture": {"index": 0},
            "metallicFactor": 0,
            "roughnessFactor": 0.75,
        }
    }
    made = triangle_primitive(positions, faces, uv=uv, normals=normals, material=0)
    return compress(
        b"".join(
            bytes(p)
            for p in glb_parts(
                model_from_primitives([made], [material], [ImageFile(out.getvalue(), "image/png")])
            )
        )
    )


def gaussians(seed: int) -> bytes:
    """A planet as Gaussians; every other one's are fewer and larger."""
    height = relief(3, 0.6)
    count = 60_000 if seed % 2 else 4000
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    row = (np.arccos(directions[:, 1]) / np.pi * (SIZE[0] - 1)).astype(int)
    column = (
        np.arctan2(directions[:, 0], directions[:, 2]) % (2 * np.pi) / (2 * np.pi) * (SIZE[1] - 1)
    ).astype(int)
    tints = colours(height)[row, column] / 255 * (0.75 + 0.25 * (directions @ [0.4, 0.8, 0.45])[:, None])
    # the z axis to the surface's normal
    turns = np.stack([1 + directions[:, 2], -directions[:, 1], directions[:, 0], np.zeros(count)], 1)
    turns /= np.linalg.norm(turns, axis=1, keepdims=True).clip(1e-6)
    wide = math.log(3 / math.sqrt(count))
    made = Splats(
        ((1 + 0.12 * height[row, column].clip(0))[:, None] * directions).astype("<f4"),
        np.tile([wide, wide, wide - 2.5], (count, 1)).astype("<f2"),
        np.rint(turns * 32767).astype("<i2"),
        np.full(count, 245, "u1"),
        ((tints - 0.5) * math.sqrt(4 * math.pi)).astype("<f2"),
        np.zeros((count, 0), "<f2"),
        0,
    )
    return compress(b"".join(bytes(part) for part in splat_parts(made)))


def write_asset_screenshots(browser, folder: Path) -> None:
    """Made-up planets as textured meshes and as Gaussians."""
    key = "a" * 64
    image_file = io.BytesIO()
    Image.fromarray(colours(relief(3, 0.62))).resize((480, 240)).save(image_file, "WEBP")
    prompts = {"text": {"text": TEXT}, "both": {"text": TEXT, "image": "planet.png", "hash": key}}
    for name, made, condition in (("label-assets", glb, "both"), ("label-gaussians", gaussians, "text")):
        pairs = plan(2)
        planned = [
            replace(
                p, **{side: replace(getattr(p, side), condition=condition) for side in ("first", "second")}
            )
            for p in pairs
        ]
        with tempfile.TemporaryDirectory() as place:
            ShapeCache(Path(place) / "cache").put_prompt(key, image_file.getvalue())
            campaign = {"extra": {"conditions": prompts}}
            with serving_page(
                Path(place), planned, lambda planet, made=made: made(planet.seed), campaign=campaign
            ) as served:
                label = Page(
                    browser, served.url, viewport={"width": 1280, "height": 780}, device_scale_factor=2
                ).open()
                for press in ["Shift+ArrowRight"] * 3 + ["Shift+ArrowUp"]:
                    label.page.keyboard.press(press)
                label.page.wait_for_function("() => window.labelState.settled", timeout=60_000)
                label.page.wait_for_timeout(1500)
                keep(label, folder / f"{name}.png")
                label.context.close()


def _drawn(planned: list[PlannedPair]) -> Callable[[Shape], bytes]:
    """Prepare the shapes in the default cache, for later runs too."""
    cache = ShapeCache()
    prepare(
        (s for pair in planned for s in (pair.first, pair.second)),
        cache,
        ShapeRenderer(),
        on_progress=lambda fields: click.echo(str(fields)),
    )
    return lambda shape: cache.mesh(shape).read_bytes()


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/images"), show_default=True
)
def main(out: Path) -> None:
    """Prepare shapes of the bundled generator, label them and take screenshots."""
    shape = shape_factory(PairingOptions(), load_generator())
    rng = random.Random(0)
    sides = [rng.sample(pair, 2) for pair in itertools.combinations(SEEDS, 2)]
    planned = [PlannedPair(first=shape(a), second=shape(b)) for a, b in rng.sample(sides, len(sides))]
    campaign = {
        "annotators_per_pair": 3,
        "gold_every": 0,
        "repeat_share": 0.1,
        "swap_share": 0.1,
        "repeat_gap": 5,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        serving_page(Path(folder), planned, _drawn(planned), campaign=campaign) as served,
    ):
        with chromium() as browser:
            write_screenshots(served, browser, out)
            write_asset_screenshots(browser, out)


if __name__ == "__main__":
    main()
