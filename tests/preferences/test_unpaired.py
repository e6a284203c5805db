"""Labels of single shapes: files, thresholds, import from pairs, splits that share no shape, and what the
annotator writes.
"""

import json

import numpy as np
import pytest

from eg3d_rlhf.preferences.annotator import Utility
from eg3d_rlhf.preferences.dataset import split_by_seed
from eg3d_rlhf.preferences.labels import Preference, write_labels
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.preferences.synthetic import Annotation
from eg3d_rlhf.preferences.unpaired import (
    UnpairedPreference,
    endless_batches,
    from_pairs,
    load_unpaired,
    split_unpaired,
    to_pairs,
    write_unpaired,
)
from tests.rejections import raising


def thumbs(count, start=0):
    return [UnpairedPreference(seed=start + i, label=i % 2 == 0) for i in range(count)]


def test_files_keep_everything(tmp_path):
    labels = [
        UnpairedPreference(
            seed=3,
            label=True,
            generator="ab" * 32,
            psi=0.7,
            annotator="ann",
            time=12.5,
            clean=False,
            extra={"view": "x"},
        ),
        UnpairedPreference(seed=4, score=2.5),
        UnpairedPreference(seed=4, label=False),
    ]
    path = write_unpaired(tmp_path / "labels.jsonl", labels)
    assert load_unpaired(path) == labels
    assert json.loads(path.read_text().splitlines()[1]) == {"seed": 4, "score": 2.5}


def test_thresholds_and_targets():
    kinds = [UnpairedPreference(seed=0, score=score) for score in (0, 3.5, 3.6, 3.9, 4.0, 5)]
    assert [label.preferred for label in kinds] == [False, False, None, None, True, True]
    assert [label.target for label in kinds] == pytest.approx([0, 0.7, 0.72, 0.78, 0.8, 1])
    assert [label.target for label in thumbs(2)] == [1, 0]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('{"seed": 1, "score": 5.5}', ("0 to 5", "5.5")),
        ('{"seed": 1, "score": NaN}', ("0 to 5", "nan")),
        ('{"seed": 1, "label": 3}', ("label", "3")),
        ('{"seed": 1}', ("label", "score")),
        ('{"seed": 1, "label": 1, "score": 2}', ("label", "score", "both")),
        ('{"label": 1}', ("seed",)),
        ('{"seed": -1, "label": 1}', ("seed", "-1")),
        ('{"seed": 1, "label": 1, "psi": 7}', ("psi", "7")),
        ("[1]", ("list",)),
    ],
)
def test_bad_lines_are_named(tmp_path, line, names):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"seed": 0, "label": 1}\n' + line + "\n")
    with raising("labels.jsonl", "line 2", *names):
        load_unpaired(path)


def test_pairs_become_roles_and_both_roles_become_strengths(tmp_path):
    pairs = [Preference(winner=2 * i, loser=2 * i + 1, generator="g", psi=0.7) for i in range(10)]
    simple = from_pairs([*pairs, Preference(winner=50, loser=51, tie=True)])
    assert {label.seed: label.label for label in simple} == {s: s % 2 == 0 for s in range(20)}
    assert (simple[0].generator, simple[0].psi) == ("g", 0.7)
    for name in ("pairs.jsonl", "pairs.csv"):
        assert load_unpaired(write_labels(tmp_path / name, pairs)) == simple
    # 0 beats all, 10 none; 1..9 have both roles
    chain = [Preference(winner=a, loser=b) for a in range(11) for b in range(a + 1, 11)]
    thumbs = {label.seed: label.label for label in from_pairs(chain)}
    assert thumbs == {
        **dict.fromkeys(range(5), True),
        **dict.fromkeys(range(6, 11), False),
    }, "the middle one of nine is left out"


def test_splits_follow_the_pairs_and_share_no_shape():
    pairs = split_by_seed([Preference(winner=2 * i, loser=2 * i + 1) for i in range(100)])
    labels = thumbs(200) + [
        UnpairedPreference(seed=1000 + i, score=4.5 if i < 120 else 1) for i in range(160)
    ]
    labels += [UnpairedPreference(seed=5000, score=3.7)]
    parts = split_unpaired(labels, pairs, (0.7, 0.15, 0.15))
    seeds = {name: {label.seed for label in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 360 and len(set.union(*seeds.values())) == 360
    for name in seeds:
        assert {s for s in seeds[name] if s < 200} == {
            s for pair in getattr(pairs, name) for s in (pair.winner, pair.loser)
        }
    free = [
        [sum(s >= 1120 for s in seeds[name]), sum(1000 <= s < 1120 for s in seeds[name])]
        for name in ("train", "val", "test")
    ]
    assert free == [[28, 84], [6, 18], [6, 18]]
    assert (
        parts
        == split_unpaired(labels, pairs, (0.7, 0.15, 0.15))
        != split_unpaired(labels, pairs, (0.7, 0.15, 0.15), 1)
    )


def test_pairs_for_validation_are_disjoint_and_of_both_kinds():
    labels = [*thumbs(30), UnpairedPreference(seed=0, label=False)]  # 0 has both, so it cannot be used
    pairs = to_pairs(labels)
    assert len(pairs) == 14 and len({s for p in pairs for s in (p.winner, p.loser)}) == 28
    assert all(p.winner % 2 == 0 and p.loser % 2 == 1 and p.winner for p in pairs)
    with raising("unpaired", " 1 ", " 0 "):
        to_pairs(thumbs(1))


def test_batches_hold_half_of_each_kind_and_use_every_label():
    labels = [UnpairedPreference(seed=i, label=i < 5) for i in range(25)]
    draws = endless_batches(labels, 10, np.random.default_rng(0))
    batches = [next(draws) for _ in range(4)]
    assert all([label.label for label in batch] == [True] * 5 + [False] * 5 for batch in batches)
    assert {label.seed for batch in batches for label in batch} == set(range(25))


@pytest.fixture
def annotation():
    rng = np.random.default_rng(0)
    options = AnnotationOptions(pairs=500, block=2, kind="scores")
    judged = {
        seed: Utility(total=float(value), parts={}, defects={})
        for seed, value in enumerate(rng.normal(size=1000))
    }
    return Annotation(options=options, labels=[], evaluations=judged, temperature=0.1)


def test_scores_follow_the_utility_and_shuffled_ones_do_not(annotation):
    from dataclasses import replace

    for shuffled, expected in ((False, 0.95), (True, 0.0)):
        labels = annotation.unpaired("g", shuffled)
        scores = np.array([label.score for label in labels])
        assert (
            abs(
                np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(annotation.utilities)))[
                    0, 1
                ]
                - expected
            )
            < 0.08
        )
        assert (
            sum(label.preferred is True for label in labels)
            == sum(label.preferred is False for label in labels)
            == 470
        )
    same = replace(annotation, options=replace(annotation.options, kind="thumbs"))
    assert [(label.seed, label.label) for label in same.unpaired("g")] == [
        (label.seed, label.preferred) for label in annotation.unpaired("g") if label.preferred is not None
    ]
    exact = replace(same, temperature=0.0).unpaired("g")
    assert len(exact) == 940 and all(label.label == label.clean for label in exact)
