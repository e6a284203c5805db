"""A study from design to report: simulated people answer through the store,
and the page shows what they did.
"""

import html
import json
import re
from dataclasses import replace

import pytest

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.study import study_report as reports
from eg3d_rlhf.people.study.analysis import analyse
from eg3d_rlhf.people.study.design import contender
from tests import tiny_runs
from tests.people.study.people import Person, create, small_design
from tests.rejections import raising
from training import networks


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('store') / 'study.db'}") as opened:
        yield opened


def run(store, design, people: list[Person]) -> dict:
    """Everybody answers, a few pairs at a time, in turn."""
    campaign = create(store, design)
    while sum(person.answer(store, campaign, design, limit=5) for person in people):
        pass
    return analyse(design, store.judgements(campaign=design.name))


def test_the_known_preference_comes_back_despite_a_strong_side_bias(store):
    design = small_design(name="truth", trials=160, annotators=4)
    people = [Person(f"n{i}", preference=0.7, shift=0.25) for i in range(4)]
    analysis = run(store, design, people)
    lo, hi = analysis["result"]["interval"]
    assert lo <= 0.7 <= hi and analysis["result"]["n"] == 160
    # the bias is strong
    assert analysis["sides"]["win_rate_b_left"] > 0.85 and analysis["sides"]["win_rate_b_right"] < 0.6
    assert analysis["sides"]["p_random"] > 0.001 and abs(analysis["sides"]["left_share"] - 0.75) < 0.08
    assert all(p["gold_n"] >= 4 and p["gold_right"] == p["gold_n"] for p in analysis["annotators"])
    counts = [p["n"] for p in analysis["pairs"]]
    assert len(counts) == design.latent_count and set(counts) == {2}


def test_a_careless_and_a_hasty_person_are_left_out(store):
    design = small_design(name="mixed", trials=120, annotators=4)
    people = [
        Person("good", 0.9),
        Person("fine", 0.9, ties=0.2),
        Person("blind", 0.5, gold=0.0),
        Person("quick", 0.1, milliseconds=90),
    ]
    result = run(store, design, people)
    assert {e["what"].split()[-1] for e in result["exclusions"]} == {"blind", "quick"}
    everybody = next(iter(result["sensitivity"].values()))
    assert everybody["annotators"] == 4
    with_all = everybody["win_rate"]
    assert result["result"]["annotators"] == 2 and result["result"]["win_rate"] > with_all + 0.1


@pytest.fixture(scope="module")
def pictured(tmp_path_factory, tiny_networks):
    folder = tmp_path_factory.mktemp("pictured")
    nets = tiny_runs.build_networks()
    for parameter in nets.G_ema.parameters():
        parameter.data.mul_(1.2)
    networks.save(folder / "after.safetensors", nets)
    a = contender("before", load_generator(tiny_networks))
    b = contender("<after>", load_generator(folder / "after.safetensors"))
    design = small_design(name="pictured", a=a, b=b, resolution=32, level=1.1)
    with Store.open(f"sqlite:///{folder / 'study.db'}") as store:
        campaign = create(store, design)
        for person in (Person("<b>Eve</b>", 0.8), Person("Bob", 0.8, ties=0.1)):
            person.answer(store, campaign, design)
        return design, list(store.judgements())


@pytest.fixture(scope="module")
def report(pictured):
    design, rows = pictured
    return reports.compute(design, rows, image_pair_count=1)


def test_the_report_shows_the_pairs_at_both_ends(report):
    ends = report["images"]
    assert all(p["win_rate"] > 0.5 for p in ends["best"]) and all(p["win_rate"] < 0.5 for p in ends["worst"])
    assert len(ends["best"]) == 1 and ends["best"][0]["win_rate"] == max(
        p["win_rate"] for p in report["pairs"]
    )
    for pair in ends["best"]:
        assert pair["a"].startswith("data:image/png;base64,") and pair["a"] != pair["b"]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(report, tmp_path):
    data, page = reports.write(report, tmp_path)
    text = page.read_text()
    assert json.loads(data.read_text()) == json.loads(json.dumps(report))
    assert page.name == "report.html" and 'class="interim"' not in text
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address.startswith("data:")
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "<after>" not in text and "<b>Eve" not in text and "&lt;b&gt;Eve&lt;/b&gt;" in text
    assert re.search(r"@media \(prefers-color-scheme: ?dark\)", text) and re.search(r"@media\s+print", text)
    assert "<svg" in text and report["design"]["hash"] in text
    assert text.count("<img") == 2 * sum(len(pairs) for pairs in report["images"].values())


def test_interim_reports_are_named_so_and_one_on_nothing_that_counts_is_still_a_page(pictured, tmp_path):
    design, rows = pictured
    analysis = reports.compute(design, rows[: len(rows) // 2], allow_interim=True, image_pair_count=0)
    _, page = reports.write(analysis, tmp_path)
    assert (
        page.name == "interim-report.html"
        and 'class="interim"' in page.read_text()
        and analysis["images"] is None
    )
    analysis = reports.compute(design, [replace(r, milliseconds=1) for r in rows], image_pair_count=2)
    _, page = reports.write(analysis, tmp_path)
    assert analysis["result"]["win_rate"] is None and _conclusions(page) == 1
    text = page.read_text()
    assert len(analysis["exclusions"]) == 2
    assert all(html.escape(left_out["reason"]) in text for left_out in analysis["exclusions"])
    empty = reports.compute(design, [], allow_interim=True, image_pair_count=2)
    assert _conclusions(reports.write(empty, tmp_path)[1]) == 2, "that it is an interim look as well"


def _conclusions(page) -> int:
    """Sentences of a page that shows no figure."""
    text = page.read_text()
    assert 'class="fill"' not in text and text.count('<ul class="says">') == 1
    return text.split('<ul class="says">')[1].split("</ul>")[0].count("<li>")


def test_both_generators_are_shaded_alike_and_other_weights_rejected(pictured):
    design, _ = pictured
    changed = replace(design, b=replace(design.b, generator="0" * 64))
    with raising("<after>", "0" * 12, "after.safetensors"):
        reports.shape_images(changed, changed.b, [1])
    same = reports.shape_images(design, design.a, [5]) == reports.shape_images(
        design, replace(design.a, label="other"), [5]
    )
    assert (
        same
        and reports.shape_images(design, design.a, [5])[5] != reports.shape_images(design, design.a, [6])[6]
    )
