"""Statistics of the raw density: counts against direct ones, and a scaled density that shows."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation import sigma_statistics as module
from eg3d_rlhf.reports import jobs
from eg3d_rlhf.sigma.slab import sigma_grid
from eg3d_rlhf.sigma.spec import SlabSpec


@pytest.fixture()
def coarse(monkeypatch):
    monkeypatch.setattr(module, "RESOLUTION", 12)


def test_equal_to_direct_counts(tiny_comparison, coarse):
    c, seeds = tiny_comparison, tiny_comparison.seeds()
    counts, values = module.densities(c, c.before, seeds)
    with torch.no_grad():
        sigma = sigma_grid(c.before.G, c.ws(c.before, seeds), SlabSpec.cube(12, float(c.before.G.rendering_kwargs["box_warp"]))).numpy()
    assert counts.sum() == (sigma > 0).sum()
    assert counts[0] == ((sigma > 0) & (sigma < 0.1)).sum()
    assert np.allclose(values["largest"], sigma.max(axis=(1, 2, 3)))
    assert np.allclose(values["positive_share"], (sigma > 0).mean(axis=(1, 2, 3)))


def test_scale_shows_and_values_beyond_the_last_edge_count(unchanged, coarse, monkeypatch, tmp_path):
    calls = iter(range(10_000))
    kept = {}

    def scaled(G, ws, spec):  # before: up to 100, after: up to 1e6
        generator = kept.setdefault(next(calls) < -(-unchanged.n // unchanged.batch), torch.linspace(-1, 1, 12**3).reshape(1, 12, 12, 12))
        return generator.expand(len(ws), 12, 12, 12) * (100 if len(kept) == 1 else 1e6)

    monkeypatch.setattr(module, "sigma_grid", scaled)
    finding = module.sigma_statistics(unchanged, tmp_path)
    assert finding.data["means"]["before"]["largest"]["mean"] == pytest.approx(100)
    assert finding.data["means"]["after"]["largest"]["mean"] == pytest.approx(1e6)
    assert sum(finding.data["counts"]["after"]) == sum(finding.data["counts"]["before"]) and finding.data["counts"]["after"][-1] > 0
    assert finding.says[0].startswith("largest σ: 100 before, 1e+06 after; paired +1e+06")


def test_a_generator_against_itself_and_figures(unchanged, coarse, tmp_path):
    finding = jobs.run(module.jobs(unchanged), tmp_path, quiet=True)["sigma-statistics"]
    assert finding.data["paired"]["after"]["largest"]["mean"] == 0 and "no change is shown" in finding.says[0]
    assert len(finding.rows) == unchanged.n and (tmp_path / "figures" / "sigma-statistics-largest.png").is_file()
    assert any("--control" in line for line in finding.says)
