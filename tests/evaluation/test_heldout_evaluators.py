"""Held-out evaluators of a run: outcomes, error reduction; a network against itself and intact heads."""

from pathlib import Path

import numpy as np
import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import HeldOut
from eg3d_rlhf.evaluation import filters, heads, heldout_evaluators
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.heldout_evaluators import metric_entry
from eg3d_rlhf.generators import latents
from eg3d_rlhf.measures.measure import Measure
from tests.evaluation.comparisons import replaced
from training.heads.people_mesh import grid_points, ground_truth_grids

N = 32
UNCLEAR = "no clear change"  # the outcome of an interval that includes 0


@pytest.mark.parametrize(
    ("ends", "way", "expected"),
    [
        ((0.1, 0.2), "lower", "worse"),
        ((0.1, 0.2), "higher", "better"),
        ((-0.2, -0.1), "lower", "better"),
        ((-0.2, -0.1), "higher", "worse"),
        ((-0.1, 0.2), "lower", None),
        ((0.0, 0.2), "higher", None),
        ((0.0, 0.0), "lower", None),
    ],
)
def test_outcomes_follow_the_interval_and_the_direction(ends, way, expected):
    change = {"mean": sum(ends) / 2, "mean_lo": ends[0], "mean_hi": ends[1]}
    row = metric_entry(Measure("x", None, way, "1"), 1.0, 1.0 + sum(ends) / 2, change)
    assert row["outcome"] == (expected or UNCLEAR)
    assert row["better"] is ((sum(ends) >= 0) if way == "higher" else (sum(ends) <= 0))


def ground_truth(seeds) -> np.ndarray:
    return ground_truth_grids(latents(seeds, 64), N)


def cut(shapes: np.ndarray) -> np.ndarray:
    """Every other shape without what lies behind z = -.05."""
    back = np.where(np.arange(len(shapes)) % 2, -1.0, -0.05)
    return np.maximum(shapes, back[:, None, None, None] - grid_points(N)[..., 2])


@pytest.fixture
def healed(unchanged, monkeypatch):
    """Make a comparison in which every second head lacks its back before tuning, and none after."""
    after = replaced(unchanged.after)
    monkeypatch.setattr(heldout_evaluators, "HEADS", 4)
    monkeypatch.setattr(heldout_evaluators, "CHOOSING", 2)
    few = dict(list(filters.FILTERS.items())[:3])
    for module in (filters, heldout_evaluators):
        monkeypatch.setattr(module, "FILTERS", few)
    monkeypatch.setattr(Comparison, "synthetic", True)
    monkeypatch.setattr(heads, "ground_truth_heads", lambda generator, seeds: ground_truth(seeds))
    monkeypatch.setattr(
        heads,
        "sample_shapes",
        lambda generator, seeds: (
            ground_truth(seeds) if generator is after.generator else cut(ground_truth(seeds))
        ),
    )
    return Comparison(**{**vars(unchanged), "after": after, "n": 4, "batch": 4, "memory": {}})


def test_a_generator_of_intact_heads_removes_all_error(healed):
    record = heldout_evaluators.against_ground_truth(healed) | heldout_evaluators.blind_pairs(healed)
    assert (
        record["error_reduction"] == 1
        and record["error_reduction_by_post_processing"] < 0.3
        and record["defective_n"] == 2
        and record["heads_n"] == 4
    )
    assert (record["intact_degraded"], record["identity_kept"], record["face_moved_voxels"]) == (0, 1, 0)
    assert (
        record["fscore_back_of_head"]["before"]
        < record["fscore_back_of_head"]["after"]
        == record["fscore_back_of_head"]["intact"]
        == 1
    )
    # two ties
    assert record["variety_after"] == pytest.approx(record["variety_before"]) and record["win_rate"] == 0.75
    columns = {"before", "after", "post_processing", "strongest_post_processing"}
    assert set(record["heads"]) == columns and record["utility_after"] == pytest.approx(1)


def test_without_features_of_shapes_the_summary_says_so(unchanged, monkeypatch, tmp_path):
    monkeypatch.setattr(heldout_evaluators, "DEFAULT_ASSET", tmp_path / "none.safetensors")
    result = heldout_evaluators.shapes(unchanged)
    assert result["geometry"] == [] and "none.safetensors" in result["shapes_missing"]


def test_a_network_against_itself_changes_nothing_clearly(unchanged, monkeypatch):
    monkeypatch.setattr(heldout_evaluators, "GEOMETRY", HeldOut("geometry", 220_000, 4, ""))
    monkeypatch.setattr(heldout_evaluators, "FAKES", 80)
    result = heldout_evaluators.geometry(Comparison(**{**vars(unchanged), "memory": {}}))["geometry"]
    assert len(result) == 3 and {row["outcome"] for row in result} == {UNCLEAR}
    assert all(row["before"] == row["after"] for row in result)


def test_what_depends_on_bundled_files_alone_is_kept_on_the_disk(unchanged, monkeypatch, tmp_path):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(heldout_evaluators, "GEOMETRY", HeldOut("geometry", 220_000, 3, ""))
    monkeypatch.setattr(heldout_evaluators, "resolve_dataset", lambda name: Path(__file__))
    made = []
    views = heldout_evaluators.PARTS["views"]
    monkeypatch.setitem(heldout_evaluators.PARTS, "views", lambda *what: made.append(what) or views(*what))

    def measure_part(role="before", **change):
        values = {"data": bundled.DATA, "memory": {}, **change}
        return heldout_evaluators.measure_part(Comparison(**{**vars(unchanged), **values}), "views", role)[
            "depth disagreement"
        ].tolist()

    first = measure_part()
    assert not list(tmp_path.rglob("*.safetensors"))  # another network than the bundled one
    monkeypatch.setattr(heldout_evaluators, "_bundled_hash", lambda: unchanged.before.hash)
    assert measure_part() == measure_part() == first and len(made) == 2
    (path,) = tmp_path.rglob("views-*/*.safetensors")
    path.write_bytes(b"damaged")
    assert measure_part() == first and len(made) == 3
    assert measure_part("after") == first and measure_part(psi=0.5) != first and len(made) == 5
