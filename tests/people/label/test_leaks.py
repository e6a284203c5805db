"""A blind study reveals no generator to annotators: not in texts, headers, addresses, orders, sides or
times.
"""

import itertools
import random
import re
import time
from secrets import token_urlsafe

import pytest
from scipy import stats

from eg3d_rlhf.people.label.entities import Mode
from eg3d_rlhf.people.label.server.served_shapes import LETTERS, Addresses
from eg3d_rlhf.people.label.shape_files import shape_key
from tests.people.label import serving
from tests.people.label.serving import FIRST_SEED, GENEROUS, NAMES, answer

PAIRS = 24
ANNOTATORS = 3
CHANCE = 1e-4  # a rank test below it is a leak
GENERATORS = {serving.shape(name, 0).generator: name for name in "ab"}


def vertices(shape) -> int:
    return 60 if GENERATORS[shape.generator] == "a" else 120


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """An exposed study, prepared, and all responses that its annotators got while they
    answered everything.
    """
    folder = tmp_path_factory.mktemp("study")
    campaign = {
        "annotators_per_pair": ANNOTATORS,
        "repeat_share": 0.1,
        "swap_share": 0.1,
        "gold_every": 10,
        "repeat_gap": 3,
    }
    options = {
        "mode": Mode.STUDY,
        "exposed": True,
        "limits": GENEROUS,
        "campaign": campaign,
        "access_log": folder / "access.jsonl",
    }
    with serving.running(folder, pairs=PAIRS, prepared=False, **options) as served:
        serving.fill(served.options.cache, (s for _, s in served.store.shapes(served.campaign)), vertices)
        served.seen = []
        served.assigned = []
        served.times = []
        for number in range(ANNOTATORS):
            work(served, served.browser(served.store.add_annotator(f"ann{number}")), number)
        yield served


def work(served, page, number: int) -> None:
    """Answer everything, undoing now and then, and provoke errors; keeps all responses."""
    rng = random.Random(number)
    keep = served.seen.append
    for path in ("", "login", "static/app.js", "admin", "openapi.json", "nothing"):
        keep(page.get(f"/{path}"))
    for path in ("session", "admin/quality", "admin/export?format=csv", "renders/x", "shapes/unknown"):
        keep(page.get(f"/api/{path}"))
    fetched = set()
    keys = itertools.count()
    while pairs := page.get("/api/assignments?count=2").json()["assignments"]:
        keep(page.get("/api/assignments?count=3"))
        pair = pairs[0]
        served.assigned.append(pair)
        for asset in (pair["left"], pair["right"]):
            if asset not in fetched and len(fetched) < 12:
                fetched.add(asset)
                keep(page.get(f"/api/shapes/{asset}"))
                keep(page.get(f"/api/shapes/{asset}", headers={"If-None-Match": f'"{asset}"'}))
        choice = rng.choice(["left", "right"])
        began = time.perf_counter()
        keep(answer(page, pair["assignment"], f"key-{next(keys)}", choice))
        served.times.append((pair[choice], time.perf_counter() - began))
        if next(keys) % 20 == 0:
            keep(page.post("/api/undo", json={"key": f"undo-{next(keys)}"}))
    for body in ({"key": "x"}, {"key": "key-0", "assignment": pair["assignment"], "choice": "tie"}, [1]):
        keep(page.post("/api/judgements", json=body))
    keep(page.get("/api/answers?count=50"))
    keep(answer(page, pair["assignment"], "late"))
    keep(page.post("/logout"))


def secrets(served) -> list[str]:
    """Return all values that would reveal the generator of a shape, or the kind of a pair."""
    words = [*NAMES.values(), "baseline", "finetuned", "0.7125", "10.25", "safetensors", "/secret", ".shp"]
    words.append(str(served.options.cache.folder))
    for asset, shape in served.store.shapes(served.campaign):
        words += [shape.generator[:10], str(shape.seed), f"{shape.seed:x}", shape_key(shape)[:10]]
        assert asset not in words
    return [
        *set(words),
        "gold",
        "repeat",
        "swap",
        "first_is_left",
        *(f'"{word}"' for word in ("first", "second", "expected", "kind")),
    ]


def holds(text: str, word: str) -> bool:
    """Return True if a text holds a word. Random addresses may hold short words, which must stand alone."""
    if word not in ("gold", "repeat", "swap"):
        return word in text
    return re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", text) is not None


def test_no_response_holds_a_name_seed_kind_or_side(study):
    rows = list(study.store.judgements())
    assert {"pair", "gold", "training", "repeat", "swap"} <= {row.kind.value for row in rows} and len(
        rows
    ) >= ANNOTATORS * PAIRS
    assert (
        len({(r.request.method, str(r.request.url.path.split("/")[2:3]), r.status_code) for r in study.seen})
        > 12
    )
    assert all(r.status_code < 500 for r in study.seen)
    words = [word.lower() for word in secrets(study)]
    row = next(study.store.judgements())
    assert all(
        any(word in text for word in words) for text in (row.left.generator, str(FIRST_SEED + 7), NAMES["b"])
    ), "would be found"
    public = {"repeat"}  # a word of CSS and of the page's own texts
    for response in study.seen:
        texts = [
            str(response.url),
            str(response.request.headers),
            str(response.headers.multi_items()),
            response.content.decode("latin-1"),
        ]
        static = response.request.url.path.startswith(("/static", "/login"))
        for text in texts:
            assert [w for w in words if holds(text.lower(), w) and not (static and w in public)] == [], (
                response.url
            )


def test_an_assignment_says_nothing_but_tokens_and_training(study):
    assert {tuple(pair) for pair in study.assigned} == {("assignment", "left", "right", "prompt", "training")}
    assert {pair["prompt"] for pair in study.assigned} == {None}
    named = [p[k] for p in study.assigned for k in ("assignment", "left", "right")]
    assert all(len(token) >= 16 and token.isascii() for token in named)
    shown = {(p[side], p["assignment"]) for p in study.assigned for side in ("left", "right")}
    # nothing comes again under its address, repeats included
    assert len({address for address, _ in shown}) == len(shown)


def test_only_admins_of_a_study_see_results_and_only_others_answer(study, tmp_path):
    responses = [r for r in study.seen if "admin" in r.request.url.path]
    assert responses and all(r.status_code == 403 for r in responses)
    boss = study.client(study.store.add_annotator("boss", "admin"))
    assert boss.get("/api/admin/quality").status_code == 200
    assert boss.get("/api/assignments").status_code == answer(boss, "x", "x").status_code == 403
    assert boss.post("/api/undo", json={"key": "x"}).status_code == 403
    with serving.running(tmp_path, pairs=1, mode=Mode.STUDY) as served:
        local = served.browser()
        assert local.get("/api/session").json()["role"] == "annotator"
        assert (
            local.get("/api/admin/quality").status_code == 403
            and local.get("/api/assignments").json()["assignments"]
        )


# ---- ranks: orders, sides, times


def of_generators(study) -> dict[str, list[str]]:
    """Asset tokens of each generator, in order of the plan."""
    by = {"a": [], "b": []}
    for asset, shape in study.store.shapes(study.campaign):
        by[GENERATORS[shape.generator]].append(asset)
    return by


def separation(first, second) -> float:
    """p of a two-sided Mann-Whitney test that both come from one distribution."""
    return float(stats.mannwhitneyu(list(first), list(second)).pvalue)


def test_tokens_have_no_order(study):
    by = of_generators(study)
    rank = {asset: i for i, asset in enumerate(sorted(by["a"] + by["b"]))}
    assert separation((rank[t] for t in by["a"]), (rank[t] for t in by["b"])) > CHANCE
    letters = [separation((ord(t[i]) for t in by["a"]), (ord(t[i]) for t in by["b"])) for i in range(16)]
    assert min(letters) > CHANCE / 16


def test_sides_are_even_and_the_order_is_not_the_plans(study):
    name = {t: g for g, tokens in of_generators(study).items() for t in tokens}
    mixed = {
        p["assignment"]: p
        for p in study.assigned
        if name[study.asset(p["left"])] != name[study.asset(p["right"])]
    }.values()
    lefts = sum(name[study.asset(p["left"])] == "a" for p in mixed)
    assert len(mixed) >= ANNOTATORS * PAIRS and stats.binomtest(lefts, len(mixed)).pvalue > CHANCE
    sides = [name[study.asset(p["left"])] for p in mixed]
    changes = sum(x != y for x, y in itertools.pairwise(sides))
    assert stats.binomtest(changes, len(sides) - 1).pvalue > CHANCE
    place = {asset: i for i, asset in enumerate(t for t, _ in study.store.shapes(study.campaign))}
    shown = [place[study.asset(p["left"])] for p in study.assigned[:PAIRS] if not p["training"]]
    assert abs(stats.spearmanr(shown, range(len(shown))).statistic) < 0.9


def test_all_shapes_are_sent_as_prepared_with_the_same_headers(study):
    client = study.client(study.store.add_annotator("ruler"))
    shapes = dict(study.store.shapes(study.campaign))
    heads = set()
    for asset in shapes:
        with client.stream("GET", f"/api/shapes/{asset}") as response:
            data = b"".join(response.iter_raw())
        assert data == study.options.cache.mesh(shapes[asset]).read_bytes()
        assert response.headers["etag"] == f'"{asset}"'
        varying = {"etag", "x-request-id", "date", "content-length"}
        heads.add(tuple((k, v) for k, v in response.headers.multi_items() if k not in varying))
    assert len(heads) == 1


def test_times_do_not_separate_the_generators(study):
    client = study.client(study.store.add_annotator("clock"))
    by = of_generators(study)
    rng = random.Random(0)
    taken = {"a": [], "b": []}
    for turn in range(4):
        for pair in zip(rng.sample(by["a"], PAIRS), rng.sample(by["b"], PAIRS), strict=True):
            for name, asset in rng.sample([("a", pair[0]), ("b", pair[1])], 2):
                began = time.perf_counter()
                client.get(f"/api/shapes/{asset}")
                taken[name].append((time.perf_counter() - began) if turn else None)
    assert separation((t for t in taken["a"] if t), (t for t in taken["b"] if t)) > CHANCE
    # nor does that of an answer reveal the choice
    name = {asset: generator for generator, assets in by.items() for asset in assets}
    assert (
        separation(*([s for asset, s in study.times if name[study.asset(asset)] == g] for g in "ab")) > CHANCE
    )


# ---- addresses: a shape has another one in each assignment, which only the server can read


ASSETS = [token_urlsafe(16) for _ in range(300)]


def test_addresses_lead_back_and_tell_nothing():
    made = Addresses(b"k" * 32, ASSETS)
    addresses = {
        (assignment, asset): made.address(assignment, asset)
        for assignment in ("one", "two")
        for asset in ASSETS
    }
    assert len(set(addresses.values())) == 600 and all(
        len(address) == LETTERS for address in addresses.values()
    )
    assert all(made.asset(address) == asset for (_, asset), address in addresses.items())
    assert (
        Addresses(b"k" * 32, ASSETS).address("one", ASSETS[7]) == addresses["one", ASSETS[7]]
    )  # after a restart
    numbers = [address[16:21] for address in addresses.values()]  # where the hidden number is
    assert len(set(numbers)) > 590


@pytest.mark.parametrize("place", [0, 15, 16, 20, 22, 31])
def test_addresses_cannot_be_made_up(place):
    made = Addresses(b"k" * 32, ASSETS)
    address = made.address("one", ASSETS[3])
    other = "A" if address[place] != "A" else "B"
    assert made.asset(address[:place] + other + address[place + 1 :]) is None
    assert Addresses(b"x" * 32, ASSETS).asset(address) is None
    assert made.asset("A" * LETTERS) is made.asset("A" * 22) is made.asset("A" * 33) is None


# ---- preparation


def test_nothing_is_shown_before_everything_is_prepared(tmp_path):
    with serving.running(tmp_path, pairs=6, mode=Mode.STUDY, prepared=False) as served:
        page = served.browser()
        shapes = served.store.shapes(served.campaign)
        serving.fill(served.options.cache, [s for _, s in shapes[:-1]])
        state = page.get("/api/assignments").json()
        assert state["waiting"] and state["assignments"] == []
        assert state["preparation"] == {
            "done": len(shapes) - 1,
            "failed": 0,
            "total": len(shapes),
            "seconds_left": None,
        }
        early = [page.get(f"/api/shapes/{asset}") for asset, _ in shapes]
        assert {r.status_code for r in early} == {503} and all("Retry-After" in r.headers for r in early)
        serving.fill(served.options.cache, [shapes[-1][1]])
        time.sleep(0.6)
        state = page.get("/api/assignments").json()
        assert not state["waiting"] and len(state["assignments"]) == 3
        assert {page.get(f"/api/shapes/{asset}").status_code for asset, _ in shapes} == {200}
