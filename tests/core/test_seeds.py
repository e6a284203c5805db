"""Held-out seeds: one register, no overlaps, and every training rejects them."""

import ast
import itertools

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core import seeds
from eg3d_rlhf.core.seeds import HELD_OUT, STRIDE, reject_held_out_seeds
from eg3d_rlhf.modes.label_files import synthetic
from eg3d_rlhf.preferences.dataset import reference_seeds
from eg3d_rlhf.preferences.labels import LabelSource, Preference, load_labels, write_labels
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS, RewardRun
from eg3d_rlhf.rewards.training_run import TRAINING
from tests.rejections import raising, rejected
from tests.source_trees import without_collections


def test_ranges_do_not_overlap():
    for first, other in itertools.combinations(HELD_OUT, 2):
        assert not set(first.seeds) & set(other.seeds)
    assert all(seeds.REFERENCE_SAMPLES + 1000 <= held.first and held.seeds[-1] < STRIDE for held in HELD_OUT)
    assert len({held.name for held in HELD_OUT}) == len(HELD_OUT)


def test_the_package_writes_no_held_out_seed_elsewhere(repo):
    for path in sorted((repo / "eg3d_rlhf").rglob("*.py")):
        if path.name != "seeds.py":
            with without_collections():
                every = list(ast.walk(ast.parse(path.read_text())))
            numbers = [node.value for node in every if isinstance(node, ast.Constant)]
            integers = [n for n in numbers if type(n) is int]
            assert not [n for n in integers for held in HELD_OUT if n in held.seeds], (
                f"{path}: draw from eg3d_rlhf/core/seeds.py instead"
            )


@pytest.mark.parametrize(
    ("drawn", "names"),
    [
        ([5, 210_003, 300_000], ("210003", "evaluation", "210000 to 210199")),
        (range(199_990, 200_010), ("200000", "latents", "200000 to 209999")),
        ([3_210_003], ("3210003", "evaluation", "--seed=3", "3210000 to 3210199")),
        ([300_031], ("300031", "monitor", "300000 to 300031")),
        ([500_127], ("500127", "calibration", "500000 to 500127")),
        ([220_000], ("220000", "geometry", "220000 to 220039")),
    ],
)
def test_a_held_out_seed_is_rejected_with_the_name_of_its_range(drawn, names):
    with raising("labels", *names):
        reject_held_out_seeds(drawn, "labels")


def test_other_seeds_pass():
    reject_held_out_seeds(
        [0, 9_999, 100_000, 199_999, 210_200, 300_032, 1_300_000, 1_500_000, 2**32 - 1], "labels"
    )
    reject_held_out_seeds([seed for part in reference_seeds().values() for seed in part], "anchors")
    reject_held_out_seeds(
        [seed for label in load_labels(BUNDLED_LABELS) for seed in (label.winner, label.loser)],
        "bundled labels",
    )


def test_reward_training_rejects_labels_of_held_out_seeds(tmp_path):
    path = tmp_path / "labels.jsonl"
    write_labels(
        path,
        [
            Preference(winner=1, loser=2),
            Preference(winner=3, loser=300_007),
            Preference(winner=210_000, loser=5),
        ],
    )
    with raising(str(path), "300007", "monitor", "300000 to 300031"):
        TRAINING.begin(RewardRun(labels=LabelSource.from_file(path)), tmp_path / "out")


def test_synthetic_labels_reject_held_out_seeds(tmp_path):
    with raising("--first-seed", "200000", "200000 to 209999"):
        AnnotationOptions(first_seed=199_995)
    flags = ["--pairs=4", "--first-seed=210000", f"--out={tmp_path / 'labels.jsonl'}"]
    rejected(CliRunner().invoke(synthetic, flags), "--first-seed", "210000", "210000 to 210199")
