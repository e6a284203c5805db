"""From a folder of assets to what the browser gets: planning, preparation, prompts, films in parts; and what
is rejected before.
"""

import contextlib
import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from eg3d_rlhf.core.bundled import GENERATOR
from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.assets.collection import (
    Asset,
    Collection,
    plan_assets,
    prompts_json,
    read_collection,
)
from eg3d_rlhf.people.label.entities import Kind
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.preparation import AssetPreparer, prepare, prepare_prompts
from eg3d_rlhf.people.label.shape_files import ShapeCache
from tests.people.label import asset_files as files
from tests.people.label import serving
from tests.rejections import raising, rejected

SECRET = files.SECRET.encode()
CHAIR = "a red chair"


def folder_of(root: Path, generators=("alpha-net", "beta-net"), films: bool = True) -> Path:
    """A folder GENERATOR/PROMPT.* with every format, and prompts."""
    for number, generator in enumerate(generators):
        (root / generator).mkdir(parents=True)
        (root / generator / "chair.glb").write_bytes(files.glb(300 + 3000 * number, seed=number))
        (root / generator / "cat.ply").write_bytes(files.splats(200 + number, seed=number))
        (root / generator / "mug.ply").write_bytes(files.ply(seed=number))
        files.write_obj(root / generator / "dog.obj", seed=number)
        if films:
            files.write_film(root / generator / "turn.mp4", frames=6 + 20 * number, seed=number)
    (root / "asked").mkdir()
    (root / "asked" / "chair.jpg").write_bytes(files.image_bytes(1400, "JPEG"))
    asked = [
        {"prompt": "chair", "text": CHAIR, "image": "asked/chair.jpg"},
        {"prompt": "cat", "text": "a cat"},
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return root


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    return read_collection(folder_of(tmp_path_factory.mktemp("assets")))


def test_a_folder_is_read_as_it_is_laid_out(collection):
    assert (
        collection.generators == ["alpha-net", "beta-net"]
        and len({asset.hash for asset in collection.assets}) == 10
    )
    kinds = {asset.prompt: asset.kind for asset in collection.assets}
    assert kinds == {"chair": "glb", "cat": "splats", "mug": "ply", "dog": "obj", "turn": "film"}
    asked = prompts_json(collection)
    assert (
        asked["chair"]["text"] == CHAIR
        and asked["chair"]["image"].endswith("asked/chair.jpg")
        and asked["mug"]["text"] is None
    )


def test_a_list_names_assets_seeds_and_prompts(tmp_path):
    root = folder_of(tmp_path, films=False)
    lines = [
        {
            "asset": "alpha-net/chair.glb",
            "generator": "a",
            "prompt": "chair",
            "text": "a red chair",
            "image": "asked/chair.jpg",
            "seed": 7,
        },
        {"asset": "alpha-net/mug.ply", "generator": "a", "prompt": "chair"},
        {"asset": "beta-net/chair.glb", "prompt": "a cup"},
    ]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    collection = read_collection(root / "list.jsonl")
    assert [(a.generator, a.prompt, a.seed) for a in collection.assets] == [
        ("a", "chair", 7),
        ("a", "chair", 1),
        ("list", "a cup", 0),
    ]
    assert collection.prompts["chair"].text == CHAIR and collection.prompts["a cup"].text is None
    (root / "list.jsonl").write_text(
        "\n".join(map(json.dumps, [lines[0], {**lines[1], "text": "a blue chair"}]))
    )
    with raising("list.jsonl, line 2", "'chair'"):
        read_collection(root / "list.jsonl")


def made_up(generators: int, prompts: int, seeds: int = 1) -> Collection:
    """Assets of which nothing is read."""
    return Collection(
        [
            Asset(
                path=Path(f"/{g}/{p}-{s}.glb"),
                generator=f"g{g}",
                prompt=f"p{p:03d}",
                seed=s,
                kind="glb",
                hash=f"{g}-{p}-{s}",
            )
            for g in range(generators)
            for p in range(prompts)
            for s in range(seeds)
        ]
    )


def test_the_first_pairs_are_balanced_over_generators_and_prompts():
    planned = plan_assets(PairingOptions(pairs=60, gold=0, training=0), made_up(4, 30, 2)).pairs
    meetings = Counter(frozenset((pair.first.generator, pair.second.generator)) for pair in planned)
    assert len(meetings) == 6 and set(meetings.values()) == {10}
    for met in meetings:
        assert (
            max(
                Counter(
                    p.first.condition for p in planned if {p.first.generator, p.second.generator} == met
                ).values()
            )
            == 1
        )
    sides = sum(pair.first.generator < pair.second.generator for pair in planned)
    assert 15 < sides < 45 and all(pair.first.condition == pair.second.condition for pair in planned)
    again = plan_assets(PairingOptions(pairs=60, gold=0, training=0), made_up(4, 30, 2)).pairs
    other = plan_assets(PairingOptions(pairs=60, gold=0, training=0, seed=1), made_up(4, 30, 2)).pairs
    assert planned == again != other


def test_pairs_end_where_there_are_no_more_and_equal_files_do_not_meet():
    notes = []
    collection = made_up(2, 5)
    same = replace(collection.assets[5], hash=collection.assets[0].hash)
    planned = plan_assets(
        PairingOptions(pairs=50),
        Collection([*collection.assets[:5], same, *collection.assets[6:]]),
        notes.append,
    )
    kinds = Counter(pair.kind for pair in planned.pairs)
    assert kinds == {Kind.PAIR: 4, Kind.GOLD: 4, Kind.TRAINING: 3} and len(notes) == 1 and "4" in notes[0]
    for pair in planned.pairs:
        worse = pair.second if pair.expected == "first" else pair.first
        assert (pair.kind is Kind.PAIR) == (pair.expected is None) == (
            not worse.degradation
        ) and pair.first.file
        if pair.expected:
            assert pair.first.file == pair.second.file and pair.first.condition == pair.second.condition
    films = Collection([replace(asset, kind="film") for asset in collection.assets])
    assert {pair.kind for pair in plan_assets(PairingOptions(pairs=50), films, notes.append).pairs} == {
        Kind.PAIR
    }
    assert len(notes) == 3 and not re.search(r"\d", notes[-1]), "no checks of films, besides the 4 pairs"
    with raising("assets", "prompt", "generator"):
        plan_assets(PairingOptions(pairs=3), made_up(1, 5))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([f"--network={GENERATOR}"], ("--network", "--assets")),
        (["--set=psi=0.7", "--set=level=3"], ("--set level=VALUE", "--set psi=VALUE", "--assets")),
    ],
)
def test_flags_of_generators_are_rejected(tmp_path, flags, names):
    done = CliRunner().invoke(
        main, [f"--assets={tmp_path}", f"--db=sqlite:///{tmp_path}/x.db", *flags, "--dry-run"]
    )
    rejected(done, *names)


@pytest.fixture(scope="module")
def served(collection, tmp_path_factory):
    """A server of a campaign of most of the collection, prepared."""
    folder = tmp_path_factory.mktemp("campaign")
    quick = [asset for asset in collection.assets if asset.kind in ("glb", "splats", "film")]
    some = Collection(quick, collection.prompts)
    planned = plan_assets(PairingOptions(pairs=50, gold=2, training=1), some).pairs
    campaign = {"extra": {"conditions": prompts_json(some)}}
    cache = ShapeCache(folder / "cache")
    progress = {}
    prepare_prompts(prompts_json(some).values(), cache)
    prepare(
        [shape for pair in planned for shape in (pair.first, pair.second)],
        cache,
        AssetPreparer(),
        on_progress=progress.update,
    )
    assert progress["finished"] and progress["failed"] == 0, progress
    with serving.running(
        folder, planned=planned, prepared=False, campaign=campaign, limits=serving.GENEROUS
    ) as running:
        yield running


def sent(client, asset: str) -> bytes:
    response = client.get(f"/api/shapes/{asset}")
    assert response.status_code == 200
    return response.content


def test_the_browser_gets_every_kind_with_its_prompt(served):
    with contextlib.closing(served.browser()) as client:
        pairs = client.get("/api/assignments?count=10").json()["assignments"]
        shapes = dict(served.store.shapes(served.campaign))
        assert {shape.generator for shape in shapes.values()} == {"alpha-net", "beta-net"}
        assert all(math.isnan(shape.psi) and len(shape.file) == 64 for shape in shapes.values())
        marks = {"chair": b"glTF", "cat": b"GSP1"}
        for asset, shape in shapes.items():
            data = sent(client, asset)
            assert SECRET not in data and (
                data[4:8] == b"ftyp" if shape.condition == "turn" else data[:4] == marks[shape.condition]
            )
        assert len({sent(client, a) for a in shapes}) == len(shapes) > 7  # damaged ones differ
        for pair in pairs:
            condition = shapes[served.asset(pair["left"])].condition
            expected = {"chair": ("a red chair", True), "cat": ("a cat", False)}.get(condition)
            assert (pair["prompt"] and (pair["prompt"]["text"], bool(pair["prompt"]["image"]))) == expected
        pair = next(pair for pair in pairs if pair["prompt"] and not pair["training"])
        serving.answer(client, pair["assignment"], "seen-again")
        (again,) = client.get("/api/answers").json()["answers"]
        assert {name: again[name] for name in ("left", "right", "prompt")} == {
            name: pair[name] for name in ("left", "right", "prompt")
        }
        chair = next(asset for asset, shape in shapes.items() if shape.condition == "chair")
        response = client.get(f"/api/prompts/{chair}")
        shown = Image.open(io.BytesIO(response.content))
        assert (
            response.headers["content-type"] == "image/webp"
            and max(shown.size) == 1024
            and SECRET not in response.content
        )
        assert (
            client.get(
                f"/api/prompts/{next(a for a, s in shapes.items() if s.condition == 'cat')}"
            ).status_code
            == 404
        )


def test_films_are_sent_in_parts(served):
    asset = next(asset for asset, shape in served.store.shapes(served.campaign) if shape.condition == "turn")
    with contextlib.closing(served.browser()) as client:
        full = client.get(f"/api/shapes/{asset}")
        assert full.headers["content-type"] == "video/mp4" and full.headers["accept-ranges"] == "bytes"
        assert "content-encoding" not in full.headers and int(full.headers["content-length"]) == len(
            full.content
        )
        size = len(full.content)
        for asked, first, stop in (
            ("0-99", 0, 100),
            ("100-", 100, size),
            ("-50", size - 50, size),
            (f"10-{size + 99}", 10, size),
        ):
            part = client.get(f"/api/shapes/{asset}", headers={"Range": f"bytes={asked}"})
            assert part.status_code == 206 and part.content == full.content[first:stop]
            assert part.headers["content-range"] == f"bytes {first}-{stop - 1}/{size}"
        assert client.get(f"/api/shapes/{asset}", headers={"Range": f"bytes={size}-"}).status_code == 416
        for ignored in ("bytes=5-2,8-9", "bytes=-", "lines=1-2", "bytes=9999999999999999999-"):
            assert client.get(f"/api/shapes/{asset}", headers={"Range": ignored}).status_code == 200
        assert (
            client.get(f"/api/shapes/{asset}", headers={"Range": "bytes=0-9", "If-Range": '"x"'}).status_code
            == 200
        )


def test_a_file_that_changed_since_planning_is_not_shown_until_it_is_restored(tmp_path):
    root = folder_of(tmp_path / "assets", films=False)
    planned = plan_assets(PairingOptions(single="thumbs", gold=0, training=0), read_collection(root)).pairs
    shapes = [pair.first for pair in planned if pair.first.condition == "chair"]
    path = root / "alpha-net" / "chair.glb"
    cache = ShapeCache(tmp_path / "cache")
    progress = {}
    before = path.read_bytes()
    for content, failed in ((files.glb(seed=9), 1), (None, 1), (before, 0)):
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        cache.forget_temporary_failures(shapes)
        prepare(shapes, cache, AssetPreparer(), on_progress=progress.update)
        assert progress["finished"] and progress["failed"] == failed
        if content != before:
            wrong = (
                "the file has changed since the campaign was planned"
                if content
                else "the file cannot be opened: No such file"
            )
            assert f"chair.glb: {wrong}" in progress["reason"]
