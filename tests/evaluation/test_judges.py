"""The judges of a run's end: verdicts, the way to true heads, relief; a network against itself and true heads in a network's place."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.seeds import HeldOut
from eg3d_rlhf.evaluation import judges
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.judges import gap_closed, measured
from eg3d_rlhf.measures import shape_critic
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.measures.shape_critic import FEATURES, MapNet, ShapeCritic, true_maps
from eg3d_rlhf.measures.true_heads import head_distances, ramped, true_shapes
from tests.evaluation.comparisons import Bodies, replaced
from training.heads.family import SHAPE_COUNT


@pytest.mark.parametrize(
    ("ends", "way", "expected"),
    [
        ((0.1, 0.2), "lower", "worse"), ((0.1, 0.2), "higher", "better"), ((-0.2, -0.1), "lower", "better"),
        ((-0.2, -0.1), "higher", "worse"), ((-0.1, 0.2), "lower", "no clear change"), ((0.0, 0.2), "higher", "no clear change"),
        ((0.0, 0.0), "lower", "no clear change"),
    ],
)
def test_verdicts_follow_the_interval_and_the_direction(ends, way, expected):
    change = {"mean": sum(ends) / 2, "mean_lo": ends[0], "mean_hi": ends[1]}
    row = measured(Measure("x", None, way, "1"), 1.0, 1.0 + sum(ends) / 2, change)
    assert row["verdict"] == expected and row["better"] is ((sum(ends) >= 0) if way == "higher" else (sum(ends) <= 0))


def test_the_way_to_true_heads():
    rng = np.random.default_rng(0)
    before, true = rng.normal(0.5, 0.05, 200), rng.normal(0.9, 0.01, 32)
    closed, (low, high) = gap_closed(before, np.full(200, true.mean()), true)
    assert closed == pytest.approx(1) and low < 1 < high and high - low < 0.05
    assert gap_closed(before, before, true) == (0.0, [0.0, 0.0])
    half, (low, high) = gap_closed(before, before + 0.2 + rng.normal(0, 0.02, 200), true)
    assert low < 0.2 / (true.mean() - before.mean()) < high and low < half < high
    assert gap_closed(before, before, before - 0.1) == (None, None)


def true_heads(ws):
    """A field of true heads in the place of latents, the same for every call."""
    return Bodies(lambda grid: ramped(head_distances(true_shapes(len(ws), first=1000), grid)), len(ws))


@pytest.fixture
def healed(unchanged, monkeypatch):
    """A comparison whose generator gives true heads after tuning."""
    monkeypatch.setattr(judges, "JUDGE", HeldOut("judge", 210_000, 6, ""))
    monkeypatch.setattr(judges, "TRUE_HEADS", 4)
    monkeypatch.setattr(Comparison, "synthetic", True)
    after = replaced(unchanged.after, field=true_heads)
    return Comparison(**{**vars(unchanged), "after": after, "n": 4, "batch": 4, "memory": {}})


def test_a_generator_of_true_heads_closes_the_gap(healed):
    record = judges.blind_pairs(healed)
    assert record["gap_closed"] == pytest.approx(1, abs=0.05) and record["win_rate"] == 1
    assert record["utility_after"] == pytest.approx(record["utility_true"], abs=0.03) and record["utility_true_n"] == 4


@pytest.mark.long
def test_a_generator_of_true_heads_has_their_relief(healed):
    record = judges.relief_shares(healed)
    assert (record["relief_share_before"], record["relief_share"], record["relief_detail_share_after"]) == (0, 1, 1)
    assert record["relief_mean_after"] > 0.98 and record["relief_n"] == 4


@pytest.fixture
def trained_critic(tmp_path, monkeypatch):
    """A critic that was not trained, in the asset's place: what it says is arbitrary, and the same for equal shapes."""
    torch.manual_seed(0)
    scale = torch.stack([torch.zeros(FEATURES), torch.full((FEATURES,), 0.01)])
    critic = ShapeCritic(MapNet(1), MapNet(SHAPE_COUNT), torch.zeros(0), scale, {"fakes": [{"hash": "early"}]})
    critic.true = critic.features(true_maps(true_shapes(36, first=1000), Bounds()).float())
    critic.save(tmp_path / "critic.safetensors")
    monkeypatch.setattr(shape_critic, "DEFAULT_ASSET", tmp_path / "critic.safetensors")
    monkeypatch.setattr(judges, "SHAPES", HeldOut("shapes", 221_000, 36, ""))


def test_a_generator_of_the_same_heads_has_shape_distance_0(healed, trained_critic):
    record = judges.shapes(Comparison(**{**vars(healed), "batch": 36}))
    critic, distance = record["geometry"]
    assert (critic["name"], distance["name"], critic["higher_is_better"]) == ("shape critic", "shape Fréchet", True)
    assert distance["after"] < 0.02 * distance["before"] and distance["verdict"] == "better"
    assert record["critic"] == ["early"] and not record["critic_knew_before"]
    assert critic["paired"]["n"] == distance["paired"]["n"] == record["shapes_n"] == 36


def test_without_a_critic_the_summary_says_so(unchanged, monkeypatch, tmp_path):
    monkeypatch.setattr(shape_critic, "DEFAULT_ASSET", tmp_path / "critic.safetensors")
    found = judges.shapes(unchanged)
    assert found == {"critic": None, "critic_missing": "no critic.safetensors; run eg3d-rlhf assets critic", "geometry": []}


def test_a_network_against_itself_changes_nothing_clearly(unchanged, monkeypatch):
    monkeypatch.setattr(judges, "GEOMETRY", HeldOut("geometry", 220_000, 4, ""))
    monkeypatch.setattr(judges, "FAKES", 80)
    found = judges.geometry(Comparison(**{**vars(unchanged), "memory": {}}))["geometry"]
    assert len(found) == 3 and {row["verdict"] for row in found} == {"no clear change"}
    assert all(row["before"] == row["after"] for row in found)


def test_what_depends_on_bundled_files_alone_is_kept_on_the_disk(unchanged, monkeypatch, tmp_path):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(judges, "GEOMETRY", HeldOut("geometry", 220_000, 3, ""))
    monkeypatch.setattr(judges, "resolve_dataset", lambda name: Path(__file__))
    made, views = [], judges.PARTS["views"]
    monkeypatch.setitem(judges.PARTS, "views", lambda *what: made.append(what) or views(*what))

    def seen(role="before", **change):
        bundled = {"data": "synthetic:heads64", "memory": {}, **change}
        return judges.seen(Comparison(**{**vars(unchanged), **bundled}), "views", role)["depth disagreement"].tolist()

    first = seen()
    assert not list(tmp_path.rglob("*.safetensors"))  # another network than the bundled one
    monkeypatch.setattr(judges, "_bundled_hash", lambda: unchanged.before.hash)
    assert seen() == seen() == first and len(made) == 2
    (path,) = tmp_path.rglob("views-*.safetensors")
    path.write_bytes(b"damaged")
    assert seen() == first and len(made) == 3
    assert seen("after") == first and seen(psi=0.5) != first and len(made) == 5
