"""Labels of several generators in one training: each shape comes from its own generator, no latent is in two
splits, and labels of unknown generators are rejected.
"""

import json
from pathlib import Path

import pytest
import torch

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.dataset import SPLITS, number_shapes, split_by_seed
from eg3d_rlhf.preferences.labels import LabelSource, Preference, write_labels
from eg3d_rlhf.preferences.provenance import LabelUse
from eg3d_rlhf.rewards.cache import observe_seeds
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.settings import RewardRun, default_options, with_changes
from eg3d_rlhf.rewards.training_run import (
    REPORT,
    TRAINING,
    Opened,
    collect_observations,
    create_observation,
    open_generators,
)
from tests import tiny_runs
from tests.rejections import raising
from training import networks


def labels_of(generator: str, count: int, first: int = 0) -> list[Preference]:
    return [
        Preference(winner=first + 2 * i, loser=first + 2 * i + 1, generator=generator, psi=1.0)
        for i in range(count)
    ]


def seeds_of(part) -> set[int]:
    return {seed for label in part for seed in (label.winner, label.loser)}


def test_no_latent_is_in_two_splits_and_every_split_has_its_share_of_every_generator():
    labels = [*labels_of("a", 100), *labels_of("b", 100, first=100)]  # seeds 100..199 are labelled under both
    splits = split_by_seed(labels, seed=3)
    parts = [seeds_of(part) for part in (splits.train, splits.val, splits.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and splits.dropped == 0
    apart = split_by_seed([*labels_of("a", 100), *labels_of("b", 40, first=1000)], seed=3)
    for part, share in ((apart.train, 0.7), (apart.val, 0.15), (apart.test, 0.15)):
        counts = [sum(label.generator == name for label in part) for name in "ab"]
        assert counts == [pytest.approx(100 * share, abs=1), pytest.approx(40 * share, abs=1)]


def test_numbers_identify_a_seed_of_a_generator():
    labels = [*labels_of("a", 20), *labels_of("b", 20)]
    labels[3] = Preference(winner=6, loser=7, clean=7, generator="a", psi=1.0)
    splits = split_by_seed(labels)
    numbered_splits, shapes = number_shapes(splits)
    assert len(shapes) == len(set(shapes)) == 80
    for part in ("train", "val", "test"):
        for was, now in zip(getattr(splits, part), getattr(numbered_splits, part), strict=True):
            assert shapes[now.winner] == (was.generator, was.winner) and shapes[now.loser] == (
                was.generator,
                was.loser,
            )
            assert now.clean == (now.loser if was.clean == 7 and was.generator == "a" else None)


@pytest.fixture(scope="module")
def two(tiny_networks, tmp_path_factory) -> list[Path]:
    """Write the files of two generators."""
    path = tmp_path_factory.mktemp("second") / "second.safetensors"
    networks.save(path, tiny_runs.build_networks(seed=1), only_ema=True)
    return [tiny_networks, path]


def run_of(two: list[Path], labels: list[Preference], folder: Path, **more) -> RewardRun:
    label_source = LabelSource.from_file(write_labels(folder / "labels.jsonl", labels))
    options = with_changes(default_options("tiny"), epochs=1)
    run_values = {
        "network": two[0],
        "more_networks": tuple(two[1:]),
        "labels": label_source,
        "resolution": 24,
        "train": options,
        **more,
    }
    return RewardRun(**run_values)


def train(settings: RewardRun, folder: Path) -> dict:
    TRAINING.begin(settings, folder / "reward")
    return json.loads((folder / "reward" / REPORT).read_text())


def test_every_shape_comes_from_its_own_generator(two, tmp_path):
    hashes = [load_generator(path).hash for path in two]
    labels = [*labels_of(hashes[0], 10), *labels_of(hashes[1], 10, first=10)]
    run = run_of(two, labels, tmp_path, cache=tmp_path / "cache")
    generators = open_generators(run, labels)
    splits, shapes = number_shapes(split_by_seed(labels))
    observation = create_observation(run, generators)
    opened = Opened(
        labels=labels,
        unpaired=[],
        splits=splits,
        generators=generators,
        observation=observation,
        psi=1.0,
        use=LabelUse(people=len(labels)),
    )
    train_data = collect_observations(run, opened, splits, dict.fromkeys(SPLITS, ()), shapes)
    by_hash = {g.hash: observe_seeds(g.generator, observation) for g in generators}
    for number, (name, seed) in enumerate(shapes):
        torch.testing.assert_close(
            train_data.store.take([number]), by_hash[name]([seed]).half().float(), rtol=0, atol=0.1
        )
    same = [number for number, (_, seed) in enumerate(shapes) if seed == 12]
    assert len(same) == 2 and not torch.equal(
        train_data.store.take(same[:1]), train_data.store.take(same[1:])
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_training_on_both_and_its_provenance(two, tmp_path):
    hashes = [load_generator(path).hash for path in two]
    report = train(run_of(two, [*labels_of(hashes[0], 12), *labels_of(hashes[1], 12)], tmp_path), tmp_path)
    assert sum(report["splits"].values()) == 24 and report["generator"] == hashes[0]
    known = load_reward(tmp_path / "reward" / "reward.safetensors").provenance
    assert known["generators"] == hashes and known["generator"] == hashes[0]
    options = json.loads((tmp_path / "reward" / "training_options.json").read_text())
    assert set(options["hashes"]) == {"network", "network 2", "labels"} and options["more_networks"] == [
        str(two[1])
    ]


def test_labels_of_unknown_or_unnamed_generators_are_rejected(two, tmp_path):
    first, second = (load_generator(path).hash for path in two)
    for networks_, other, names, more in (
        (two, "f" * 64, ("12", "f" * 12), {}),
        (two, None, ("generator", "12"), {}),
        (two[:1], second, ("12", second[:12]), {}),
        (two, second, ("any_generator", "--network"), {"any_generator": True}),
    ):
        with raising(*names):
            train(
                run_of(networks_, [*labels_of(first, 12), *labels_of(other, 12, first=50)], tmp_path, **more),
                tmp_path,
            )
    assert not (tmp_path / "reward").exists()
