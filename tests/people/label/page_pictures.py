"""Takes the pictures of the pages for docs/images: `python -m tests.people.label.page_pictures`, about two minutes, needs Chromium."""

import io
import itertools
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from PIL import Image

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label.drawing import ShapeDrawer
from eg3d_rlhf.people.label.entities import Answer, Choice, PlannedPair, Shape
from eg3d_rlhf.people.label.pairing import PairingOptions, shape_of
from eg3d_rlhf.people.label.preparation import prepare
from eg3d_rlhf.people.label.shape_files import ShapeCache
from tests.people.label.asset_pictures import asset_pictures
from tests.people.label.browser import Page, chromium, serving_page
from tests.people.label.serving import Served

SEEDS = (10_003, 10_012, 10_021, 10_030, 10_044, 10_051, 10_060, 10_075)
LIMIT = 300_000  # bytes of a picture
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SIDE = {**PHONE, "viewport": {"width": 844, "height": 390}, "locale": "de"}
PEOPLE = {"ada": 2.0, "bea": 1.4, "cem": 0.25}  # how sharply they tell shapes apart


def keep(page: Page, path: Path) -> None:
    """A screenshot taken at twice the size, so that edges are smooth."""
    large = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    picture = large.resize((large.width // 2, large.height // 2), Image.Resampling.LANCZOS)
    picture.save(path, optimize=True)
    if path.stat().st_size > LIMIT:
        picture.quantize(255).save(path, optimize=True)
    click.echo(f"{path}: {path.stat().st_size} bytes")


def judge(served: Served) -> None:
    """Simulated answers of some evenings; the shapes' worth is made up."""
    rng, store = random.Random(1), served.store
    worth = {seed: place / 2 for place, seed in enumerate(SEEDS)}
    now = [store.clock() - 9000.0]
    store.clock = lambda: now[0]
    shapes = dict(store.shapes(served.campaign))
    for name, sharpness in PEOPLE.items():
        who = store.annotator_without_token(name)
        while pairs := store.assignments(served.campaign, who.id, 1):
            now[0] += rng.expovariate(1 / 18) + 2
            gap = sharpness * (worth[shapes[pairs[0].right].seed] - worth[shapes[pairs[0].left].seed])
            choice = Choice.TIE if rng.random() < 0.08 else Choice.RIGHT if rng.random() < 1 / (1 + math.exp(-gap)) else Choice.LEFT
            key, spent = f"{name}-{now[0]}", int(1000 * rng.uniform(2, 15))
            store.submit(served.campaign, who.id, Answer(key=key, assignment=pairs[0].token, choice=choice, milliseconds=spent))


def pictures(served: Served, browser, folder: Path) -> None:
    """All of them."""

    def page(**context) -> Page:
        return Page(browser, served.url, **{"viewport": {"width": 1280, "height": 780}, "device_scale_factor": 2, **context})

    for name, context, keys in [
        ("label-page", {}, ["Shift+ArrowRight"] * 3), ("label-page-dark", {"color_scheme": "dark"}, ["w", "Shift+ArrowLeft"]),
        ("label-phone", PHONE, []), ("label-phone-side", SIDE, []),
    ]:  # fmt: skip
        one = page(**context).open()
        for choice in random.Random(name).choices(["ArrowLeft", "ArrowRight", "ArrowDown"], k=4):
            one.page.wait_for_timeout(4000)
            one.press(choice)
        one.sent()
        for key in keys:
            one.page.keyboard.press(key)
        one.page.wait_for_timeout(400)
        keep(one, folder / f"{name}.png")
        one.context.close()
    judge(served)
    admin = page(viewport={"width": 1280, "height": 1610})
    admin.page.goto(served.url + "/admin")
    admin.page.wait_for_selector("#strengths svg")
    keep(admin, folder / "label-admin.png")


def _drawn(planned: list[PlannedPair]) -> Callable[[Shape], bytes]:
    """Draws the shapes in the default cache, where a later run finds them."""
    cache = ShapeCache()
    prepare((s for pair in planned for s in (pair.first, pair.second)), cache, ShapeDrawer(), tell=lambda fields: click.echo(str(fields)))
    return lambda one: cache.mesh(one).read_bytes()


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/images"), show_default=True)
def main(out: Path) -> None:
    """Draw shapes of the bundled generator, label them and take pictures."""
    shape = shape_of(PairingOptions(), load_generator())
    rng = random.Random(0)
    sides = [rng.sample(pair, 2) for pair in itertools.combinations(SEEDS, 2)]
    planned = [PlannedPair(first=shape(a), second=shape(b)) for a, b in rng.sample(sides, len(sides))]
    campaign = {"annotators_per_pair": 3, "gold_every": 0, "repeat_share": 0.1, "swap_share": 0.1, "repeat_gap": 5}
    with tempfile.TemporaryDirectory() as folder, serving_page(Path(folder), planned, _drawn(planned), campaign=campaign) as served:
        with chromium() as browser:
            pictures(served, browser, out)
            asset_pictures(browser, out, keep)


if __name__ == "__main__":
    main()
