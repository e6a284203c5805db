"""Feature map, main axis, separability and the renders of the points, on planted features and tiny
networks.
"""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import embedding
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.measures.feature_sets import neighbours, paired_separability
from eg3d_rlhf.modes import reports
from eg3d_rlhf.rewards.ensembles import RewardEnsemble
from tests.rejections import rejected

RNG = np.random.default_rng(0)
N = 16


def planted(c, found):
    """The comparison with these (features, rewards) by role, as if they had been computed."""
    memory = {
        ("global feature", c.reward_hash, c.generators()[role].hash, tuple(c.seeds()), c.psi): values
        for role, values in found.items()
    }
    return Comparison(**{**vars(c), "memory": memory})


@pytest.fixture
def quick_umap(monkeypatch):
    """The first two features instead of UMAP, whose first layout compiles for half a minute."""
    monkeypatch.setattr(
        embedding, "umap_layout", lambda points, seed: np.asarray(points)[:, :2].astype(float)
    )
    monkeypatch.setattr(embedding, "umap_version", lambda: "stand-in")


def test_principal_axes_are_those_of_the_covariance():
    x = RNG.normal(size=(50, 6)) * np.array([5, 3, 1, 1, 0.5, 0.1]) + 7
    mean, axes, shares = embedding.principal_axes(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    for i in range(2):
        assert abs(axes[i] @ vectors[:, -1 - i]) == pytest.approx(1) and axes[i][np.abs(axes[i]).argmax()] > 0
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    np.testing.assert_allclose(mean, x.mean(axis=0))


def test_reward_along_a_planted_axis(tiny_comparison, quick_umap):
    reward = RNG.normal(size=N)
    before = np.stack([-4 * reward, *RNG.normal(size=(3, N)) * 0.1], axis=1)
    result = embedding.feature_map(
        planted(tiny_comparison, {"before": (before, reward), "after": (before + 9, reward + 1)}), None
    )
    row = result.data["ranks"][0]
    assert row["spearman"] == pytest.approx(-1, abs=0.02) and result.data["shares"][0] > 0.95
    points = result.data["points"]
    assert (
        len(points) == 2 * N
        and points[0]["seed"] == 200_000
        and {p["role"] for p in points} == {"before", "after"}
    )
    moved = [points[N + i]["principal_x"] - points[i]["principal_x"] for i in range(N)]
    np.testing.assert_allclose(moved, moved[0])
    assert f"{row['spearman']:.2f}" in result.says[0]


def test_a_constant_reward_has_no_rank(tiny_comparison, quick_umap):
    before = RNG.normal(size=(N, 4))
    result = embedding.feature_map(
        planted(tiny_comparison, {"before": (before, np.ones(N)), "after": (before, np.ones(N))}), None
    )
    assert result.data["ranks"][0]["spearman"] is None and "constant" in result.says[0]


def test_without_umap_the_rest_is_there(tiny_comparison, monkeypatch):
    monkeypatch.setattr(embedding, "umap_version", lambda: None)
    c = planted(
        tiny_comparison, {role: (RNG.normal(size=(N, 4)), RNG.normal(size=N)) for role in ("before", "after")}
    )
    job = embedding.jobs(c)[0]
    result = job.compute(None)
    assert (
        "umap" not in job.plots
        and result.data["layouts"] == ["principal"]
        and embedding.NO_UMAP in result.says
    )


def test_features_are_what_the_reward_pools(tiny_comparison):
    c = tiny_comparison
    values, rewards = embedding.global_features(c, c.before, c.seeds())
    network = c.reward.network
    seen = torch.cat(list(c.observed(c.before, c.seeds())))
    with torch.no_grad():
        np.testing.assert_allclose(
            network.score_embedding(network.MLP(torch.tensor(values).float())), rewards, rtol=1e-4, atol=1e-5
        )
        two = RewardEnsemble([network, network]).features(seen)
    np.testing.assert_allclose(two, np.concatenate([values, values], axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rewards, c.scores(c.before, c.seeds()), rtol=1e-4, atol=1e-5)


def test_clouds_apart_are_reported_and_equal_ones_are_not(tiny_comparison):
    base = RNG.normal(size=(N, 4))
    reward = RNG.normal(size=N)
    c = planted(
        tiny_comparison,
        {"before": (base, reward), "after": (base + 50, reward), "control": (base + 1e-9, reward)},
    )
    result = embedding.separability(c, None)
    assert (
        result.data["after"]["share"] == 1
        and result.data["after"]["p"] < 0.001
        and result.data["control"]["p"] > 0.05
    )
    for role, line in zip(("after", "control"), result.says, strict=False):
        assert role in line and f"{result.data[role]['share']:.1%}" in line
    # one verdict denies what the other states
    assert ["not" in line.rpartition(":")[2].split() for line in result.says[:2]] == [False, True]


def test_separability_is_the_share_written_out():
    a = RNG.normal(size=(8, 3))
    b = RNG.normal(size=(8, 3)) + 0.5
    near = neighbours(np.concatenate([a, b]), 3)
    share = np.mean([(i < 8) == (j < 8) for i in range(16) for j in near[i]])
    result = paired_separability(a, b, k=3, permutations=199, seed=1)
    assert (
        result.share == pytest.approx(share)
        and result.p == (1 + (result.chance >= share - 1e-12).sum()) / 200
    )
    assert result.chance.mean() == pytest.approx(0.5, abs=0.05)


def test_images_lie_where_the_page_looks_for_them(tiny_comparison, tmp_path, monkeypatch):
    c = tiny_comparison
    monkeypatch.setattr(embedding, "PIXELS", 48)
    sheet = embedding.render_sheet(c, tmp_path).data
    picture = np.asarray(PIL.Image.open(tmp_path / sheet["file"])).astype(float) / 255
    size = sheet["pixels"]
    assert picture.shape == (sheet["rows"] * size, sheet["columns"] * size)
    spec = SlabSpec.from_bounds(c.before.generator.bounds, embedding.RESOLUTION)
    for seed, role in ((200_000, "after"), (200_011, "before")):
        generator = c.generators()[role]
        with torch.no_grad():
            sigma = generator.generator.field(c.ws(generator, [seed])).density_grid(spec)
        expected = shade(sigma, embedding.YAW, resolution=size)[0, 0].numpy()
        place = 2 * (seed - 200_000) + ("before", "after").index(role)
        row, column = divmod(place, sheet["columns"])
        result = picture[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert np.abs(result - expected).mean() < 0.03  # JPEG


def test_the_tool_from_files_to_page(
    tiny_networks, tiny_reward, tiny_pair, tmp_path, quick_umap, monkeypatch
):
    flags = [
        f"--before={tiny_networks}",
        f"--reward-ckpt={tiny_reward}",
        f"--after={tiny_pair[0]}",
        f"--control={tiny_pair[1]}",
        "--n=16",
        "--device=cpu",
        f"--outdir={tmp_path / 'out'}",
    ]
    done = CliRunner().invoke(reports.embed, flags)
    assert done.exit_code == 0, done.output
    assert "control" in done.output and str(tmp_path / "out") in done.output
    text = (tmp_path / "out/index.html").read_text()
    assert (
        'id="points-data"' in text
        and text.count("data:image/jpeg") == 1
        and "http://www.w3.org/2000/svg" in text
    )
    written = (tmp_path / "out/data/feature-map.json").stat().st_mtime_ns
    monkeypatch.setattr(pages, "draw", lambda job, out: [])
    assert CliRunner().invoke(reports.embed, flags).exit_code == 0
    # nothing was computed again
    assert (tmp_path / "out/data/feature-map.json").stat().st_mtime_ns == written
    resolved = json.loads(CliRunner().invoke(reports.embed, [*flags, "--dry-run"]).output)
    assert resolved["n"] == 16 and len(resolved["after"]["hash"]) == 64
    wrong = CliRunner().invoke(reports.embed, [*flags[:2], f"--after={tmp_path / 'nothing'}"])
    rejected(wrong, "--after", str(tmp_path / "nothing"))


def test_neighbours_skip_the_partner_and_match_loops():
    a = RNG.normal(size=(9, 3))
    pooled = np.concatenate([a, a + 1e-6])
    result = neighbours(pooled, 4)
    for i, row in enumerate(result):
        allowed = [j for j in range(18) if j not in (i, (i + 9) % 18)]
        gaps = {j: np.linalg.norm(pooled[i] - pooled[j]) for j in allowed}
        assert set(row) <= set(allowed) and sorted(gaps[j] for j in row) == pytest.approx(
            sorted(gaps.values())[:4], abs=1e-6
        )
