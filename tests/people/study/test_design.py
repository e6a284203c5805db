"""The design is written once, cannot be altered unseen, and becomes a campaign in which nothing but the
shapes differs.
"""

import json
from collections import Counter
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pytest

from eg3d_rlhf.people.label.entities import Kind
from eg3d_rlhf.people.study.design import ExclusionRules, read_design, stopped, study_pairs, write_design
from tests.people.study.people import A, B, small_design
from tests.rejections import raising


def test_a_design_survives_the_disk_with_its_hash(tmp_path):
    design = small_design(
        until="2030-01-31T18:00:00+02:00", exclusions=ExclusionRules(gold_least=5), power={"trials": 40}
    )
    path = write_design(tmp_path / "deep" / "design.json", design)
    # it says which side is which
    assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o077 == 0
    assert read_design(path) == design and read_design(path, design.hash).hash == design.hash
    content = json.loads(path.read_text())
    needed = {
        "a",
        "b",
        "latent_seeds",
        "trials",
        "annotators",
        "gold_every",
        "exclusions",
        "until",
        "plan",
        "power",
        "hash",
        "created",
    }
    assert needed <= set(content)
    assert len(set(content["latent_seeds"])) == design.latent_count == 20
    with raising(str(path), kind=FileExistsError):
        write_design(path, design)
    assert read_design(path) == design


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ("JSON",)),
        ("{}", ("JSON", "'hash'")),
        ("[]", ("JSON",)),
        ('{"hash": "x", "format": 9001}', ("9001",)),
    ],
)
def test_what_is_no_design_is_rejected(tmp_path, text, names):
    path = tmp_path / "design.json"
    path.write_text(text)
    with raising(str(path), *names):
        read_design(path)
    with raising(str(tmp_path / "none.json"), kind=FileNotFoundError):
        read_design(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"b": A}, (A.generator[:12], "network", "b")),
        ({"trials": 0}, ("trials", "0")),
        ({"annotators_per_pair": 3}, ("annotators_per_pair", "3")),
        ({"ties": "coin"}, ("ties", "'coin'")),
        ({"gold_every": 1}, ("gold_every", "1")),
        ({"confidence": 95}, ("confidence", "95")),
        ({"until": "2030-01-31T18:00:00"}, ("until", "ISO 8601", "UTC", "'2030-01-31T18:00:00'")),
        ({"until": "tomorrow"}, ("until", "ISO 8601", "'tomorrow'")),
    ],
)
def test_impossible_designs_are_rejected(wrong, names):
    with raising(*names):
        small_design(**wrong)
    with raising("fast_share", "2"):
        ExclusionRules(fast_share=2)


def test_the_study_stops_at_its_number_or_its_time():
    design = small_design(until="2030-01-31T18:00:00+00:00")
    before, after = (datetime(2030, 1, 31, 18, tzinfo=UTC) + timedelta(seconds=s) for s in (-1, 1))
    assert [stopped(design, n, before) for n in (39, 40, 41)] == [False, True, True] and stopped(
        design, 0, after
    )
    assert not stopped(small_design(), 39, after)


def test_both_generators_draw_the_same_latents_alike():
    design = small_design()
    pairs = [p for p in study_pairs(design) if p.kind == Kind.PAIR]
    assert [p.first.seed for p in pairs] == design.seeds()[0] and len(pairs) == 20
    for pair in pairs:
        assert (pair.first.generator, pair.second.generator) == (A.generator, B.generator)
        differing = {
            f.name for f in fields(pair.first) if getattr(pair.first, f.name) != getattr(pair.second, f.name)
        }
        assert differing == {"generator", "source"}
        assert pair.expected is None and not pair.first.degradation


def test_gold_and_training_pairs_show_damage_and_do_not_tell_by_generator_or_order():
    pairs = study_pairs(small_design(trials=400))
    known = [p for p in pairs if p.kind != Kind.PAIR]
    for pair in known:
        damaged = pair.second if pair.expected == "first" else pair.first
        assert damaged.degradation and replace(damaged, degradation="") == (
            pair.first if damaged is pair.second else pair.second
        )
    gold = [p for p in known if p.kind == Kind.GOLD]
    assert set(Counter(p.first.generator for p in gold).values()) == {len(gold) // 2}
    assert {p.expected for p in gold} == {"first", "second"} and all(
        p.explanation for p in known if p.kind == Kind.TRAINING
    )
    seeds = [p.first.seed for p in pairs]
    assert len(set(seeds)) == len(seeds)
