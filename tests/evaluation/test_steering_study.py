"""Study of steering: labels until a target is kept, active against random pairs, and the labels of a draw."""

from types import SimpleNamespace

import pytest

from eg3d_rlhf.core.statistics import t_mean_interval
from eg3d_rlhf.evaluation import steering_study
from eg3d_rlhf.evaluation.steering_study import (
    DRAW_SEEDS,
    FIRST_SEED,
    Plan,
    active_differences,
    active_draw,
    label_draw,
    labels_to_target,
)
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.rewards import linear
from tests.rejections import raising


def row(arm: str, draw: int, labels: int, reduction: float, is_found: bool = True) -> dict:
    return {
        "arm": arm,
        "draw": draw,
        "labels": labels,
        "is_found": is_found,
        "sets": {"s": {"error_reduction": reduction}},
    }


def rows_of(arm: str, draw: int, reductions: dict[int, float]) -> list[dict]:
    return [row(arm, draw, labels, reduction) for labels, reduction in reductions.items()]


def test_the_target_must_be_kept_at_every_larger_number_of_labels():
    rows = [
        *rows_of("labels", 0, {25: 0.75, 33: 0.5, 41: 0.7, 49: 0.9}),
        *rows_of("labels", 1, {49: 0.8, 25: 0.1, 41: 0.2, 33: 0.1}),
        *rows_of("active", 0, {25: 0.75, 33: 0.8, 41: 0.9, 49: 0.9}),
        *rows_of("active", 1, {25: 0.1, 33: 0.7, 41: 0.9, 49: 0.9}),
    ]
    result = labels_to_target(rows, "s", 0.7)
    assert result["labels"]["values"] == [41, 49] and result["active"]["values"] == [25, 33]
    assert result["difference"]["values"] == [-16, -16]
    mean, low, high = t_mean_interval([41.0, 49.0])
    assert (result["labels"]["mean"], result["labels"]["interval_95"]) == (mean, [low, high])


def test_a_draw_that_never_keeps_the_target_leaves_no_mean():
    rows = [*rows_of("labels", 0, {25: 0.9, 33: 0.6}), *rows_of("labels", 1, {25: 0.8, 33: 0.8})]
    entry = labels_to_target(rows, "s", 0.7)["labels"]
    assert entry["values"] == [None, 25] and entry["reached"] == 1
    assert entry["mean"] is None and entry["interval_95"] is None
    # a draw without a direction is not steered
    without = labels_to_target([row("labels", 0, 25, 0.9, is_found=False)], "s", 0.7)
    assert without["labels"]["values"] == [None] and "difference" not in without


def test_active_is_compared_with_the_random_pairs_of_the_same_draw():
    rows = [
        row("labels", 0, 33, 0.5),
        row("labels", 1, 33, 0.6),
        row("active", 0, 33, 0.8),
        row("active", 1, 33, 0.7, is_found=False),
        row("randomised", 0, 33, 0.9),
        row("active", 0, 41, 0.9),
    ]
    (entry,) = active_differences(rows, "s")
    assert entry["labels"] == 33 and entry["values"] == pytest.approx([0.3, -0.6])


def test_too_many_active_labels_are_rejected(tmp_path):
    Plan(outdir=tmp_path, labels=(2000,))
    with raising("--labels", "--arms=active", "2000"):
        Plan(outdir=tmp_path, labels=(25, 2000), arms=("labels", "active"))


def test_active_labels_begin_with_the_random_ones_and_resume(tiny_networks, tmp_path, monkeypatch):
    generator = load_generator(tiny_networks)
    annotated = []

    def annotate(_generator, options, *, pairs, temperature):
        """Label pairs by the rest of a division, in place of ground-truth heads."""
        annotated.append((options.seed, list(pairs)))
        labels = [
            Preference(winner=max(pair, key=key), loser=min(pair, key=key), generator=generator.hash, psi=1.0)
            for pair in pairs
        ]
        return SimpleNamespace(preferences=lambda _hash: labels)

    def key(seed: int) -> int:
        return seed * 7919 % 101

    monkeypatch.setattr(steering_study, "annotate", annotate)
    monkeypatch.setattr(steering_study, "SteerOptions", lambda: SimpleNamespace(resolution=12))
    observation = linear.slab_of(generator.generator, 12)
    observations = linear.observe_samples(generator, observation, [], psi=1.0)
    store = Store(tmp_path / "store", renew=True)
    random_labels = label_draw(generator, 1, 41, store, lambda _: None)
    labels = active_draw(generator, 1, 41, store, observations)
    assert len(labels) == 41 and labels[:25] == random_labels[:25]
    first = FIRST_SEED + DRAW_SEEDS
    pairs = [tuple(sorted((label.winner, label.loser))) for label in labels]
    assert len({seed for pair in pairs for seed in pair}) == 82
    # every fifth pair is one of the random arm, in its order
    random_positions = [index for index, pair in enumerate(pairs) if pair[0] < first + DRAW_SEEDS // 2]
    assert random_positions == [*range(25), 29, 34, 39]
    assert [pairs[index] for index in random_positions] == [
        (first + 2 * n, first + 2 * n + 1) for n in range(28)
    ]
    # chunks of 25 random labels and batches of 8 have noise of their own
    assert len({seed for seed, _ in annotated}) == len(annotated) == 4
    assert active_draw(generator, 1, 33, store, observations) == labels[:33]
    assert len(annotated) == 4, "the store has them"
