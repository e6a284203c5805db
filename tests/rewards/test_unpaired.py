"""Training on unpaired labels, alone and with pairs, on toy slabs in which the larger ball is preferred."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.bundled import GENERATOR
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, write_unpaired
from eg3d_rlhf.rewards.evaluation import auc, evaluate, evaluate_unpaired, silhouette
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.settings import with_changes
from tests.rejections import raising, rejected
from tests.rewards.test_network_training import (  # noqa: F401 (network is a fixture)
    OPTIONS,
    blobs,
    filled,
    invoke,
    network,
    radius,
    toy_labels,
)

ALONE = {
    "pairs": 0.0,
    "scalar": 0.0,
    "bradley_terry": 0.0,
    "regression": 1.0,
    "divergence": 1.0,
    "unpaired_batch": 32,
}


def toy_thumbs(count, start=0, scores=False, shuffled=False):
    seeds = range(start, start + count)
    order = np.random.RandomState(start).permutation(count) if shuffled else range(count)
    mark = [radius(start + i) for i in order]
    if scores:
        return [
            UnpairedPreference(seed=s, score=float(np.interp(r, [0.15, 0.4], [1, 5])))
            for s, r in zip(seeds, mark, strict=True)
        ]
    return [UnpairedPreference(seed=s, label=r > 0.275) for s, r in zip(seeds, mark, strict=True)]


def usable(labels):
    return [label for label in labels if label.preferred is not None]


@pytest.fixture(scope="module")
def data():
    train = toy_labels(160)
    val = toy_labels(60, 1000)
    single = toy_thumbs(320)
    apart = toy_thumbs(120, 1000)
    store = filled(train, val, toy_labels(100, 2000))
    return TrainData(train=train, val=val, store=store, unpaired=single, unpaired_val=apart)


MIXED = {"regression": 0.3, "divergence": 0.3, "epochs": 4}


@pytest.mark.parametrize(
    "changes",
    [
        ALONE,
        pytest.param({**ALONE, "divergence": 0.0}, marks=pytest.mark.long),
        pytest.param(MIXED, marks=pytest.mark.long),
    ],
    ids=["alone", "regression", "mixed"],
)
def test_learns_which_blob_is_larger(data, changes):
    train_state = train_reward(data, with_changes(OPTIONS, **changes))
    test = toy_labels(60, 2000)
    assert evaluate(train_state.model, data.store, test)["clean"]["accuracy"] > 0.75  # of 60 pairs
    assert train_state.history[train_state.best_epoch]["val_auc"] > 0.95
    single = toy_thumbs(200, 2000)
    figures = evaluate_unpaired(train_state.model, train_state.model, data.store, single)
    assert figures["auc"] > 0.95 and figures["silhouette"] > 0.3 and figures["divergence"] > 0.3
    assert train_state.bandwidth is not None and ("divergence" in train_state.history[0]["loss"]) == bool(
        changes["divergence"]
    )


@pytest.mark.long
def test_scores_carry_signal_and_randomised_ones_do_not(data):
    test = toy_labels(100, 2000)
    accuracies = [
        evaluate(
            train_reward(
                replace(data, unpaired=usable(toy_thumbs(320, 0, True, shuffled))),
                with_changes(OPTIONS, **ALONE),
            ).model,
            data.store,
            test,
        )["clean"]["accuracy"]
        for shuffled in (False, True)
    ]
    assert accuracies[0] > 0.9 > 0.75 > accuracies[1]


def test_resume_equals_the_straight_run(data, tmp_path):
    options = with_changes(OPTIONS, **{**ALONE, "epochs": 3}, patience=3)
    data = replace(data, unpaired=data.unpaired[:96], unpaired_val=data.unpaired_val[:40])
    straight = train_reward(data, options)

    class StoppedHereError(Exception):
        pass

    def stop(record):
        if record["epoch"] == 1:
            raise StoppedHereError

    with pytest.raises(StoppedHereError):
        train_reward(data, options, state_file=tmp_path / "state.pt", on_epoch=stop)
    resumed = train_reward(data, options, state_file=tmp_path / "state.pt")
    assert (
        resumed.bandwidth == straight.bandwidth and resumed.history[2]["loss"] == straight.history[2]["loss"]
    )
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_weights_and_labels_that_do_not_match_are_rejected(data):
    with raising("--divergence", "--regression"):
        LossWeights(pairs=0, scalar=0, bradley_terry=0, divergence=1)
    with raising("--reference-samples", "4"):
        with_changes(OPTIONS, **ALONE, reference_samples=4)
    with raising("--regression", "--divergence", "--unpaired", "not preferred") as one_kind:
        train_reward(
            replace(data, unpaired=[label for label in data.unpaired if label.label]),
            with_changes(OPTIONS, **ALONE),
        )
    with raising("--regression", "--divergence", "--unpaired") as none:
        train_reward(replace(data, unpaired=()), with_changes(OPTIONS, regression=1.0))
    assert str(one_kind.value) != str(none.value)


def test_auc_and_silhouette_of_known_scores():
    assert (
        auc([2, 3], [1, 0]) == 1
        and auc([0], [1]) == 0
        and auc([1, 1], [1]) == 0.5
        and auc([1, 3], [2]) == 0.5
    )
    is_first_set = np.array([True, True, False, False])
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert silhouette(points, is_first_set) == pytest.approx(
        np.mean([1 - 1 / 10.5, 1 - 1 / 9.5, 1 - 1 / 9.5, 1 - 1 / 10.5])
    )
    assert silhouette(points, is_first_set[[0, 2, 1, 3]]) < 0


def test_the_command_accepts_unpaired_labels_alone_and_with_pairs(network, tmp_path):  # noqa: F811
    path, generator = network
    labels = [
        UnpairedPreference(seed=i, score=4.5 if i % 2 else 1, generator=generator, psi=0.7) for i in range(60)
    ]
    single = write_unpaired(tmp_path / "single.jsonl", labels)
    common = [
        "--network",
        path,
        "--preset",
        "tiny",
        "--epochs",
        2,
        "--resolution",
        32,
        "--unpaired",
        single,
        "--set",
        "unpaired_batch=8",
    ]
    alone = invoke(*common, "--run-dir", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    assert "AUC" in alone.output
    report = json.loads((tmp_path / "alone" / "report.json").read_text())
    assert report["unpaired"]["splits"] == {"train": 42, "val": 10, "test": 8, "unused": 0} and report[
        "unpaired"
    ]["test"]["n"] == [4, 4]
    assert len(load_reward(tmp_path / "alone" / "reward.safetensors").labels) == 1
    losses = json.loads((tmp_path / "alone" / "stats.jsonl").read_text().splitlines()[0])["loss"]
    assert set(losses) == {"regression", "divergence"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"winner": 100 + 2 * i, "loser": 101 + 2 * i, "generator": generator}) + "\n"
            for i in range(24)
        )
    )
    both = invoke(*common, "--labels", pairs, "--run-dir", tmp_path / "both")
    assert both.exit_code == 0, both.output
    losses = json.loads((tmp_path / "both" / "stats.jsonl").read_text().splitlines()[0])["loss"]
    assert {"scalar", "regression", "divergence"} <= set(losses)
    assert len(load_reward(tmp_path / "both" / "reward.safetensors").labels) == 2


@pytest.mark.parametrize(
    ("line", "flags", "names"),
    [
        ('{"seed": 1, "score": 7}', [], ("labels.jsonl", "line 1")),
        ('{"seed": 200000, "score": 5}', [], ("1", " 0 ")),
        ('{"seed": 1, "label": 1}', ["--set", "unpaired_batch=7"], ("unpaired_batch", "7")),
        ('{"seed": 1, "label": 1}', ["--set", f"more_networks={GENERATOR}"], ("--unpaired",)),
        ('{"seed": 1, "label": 1}', ["--regression=0"], ("--divergence",)),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, line, flags, names):
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    result = invoke("--unpaired", tmp_path / "labels.jsonl", "--run-dir", tmp_path / "run", *flags)
    rejected(result, *names)
    assert not (tmp_path / "run").exists()
