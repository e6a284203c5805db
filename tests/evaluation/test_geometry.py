"""Geometry before and after: known bodies and faces in place of the networks', a network against itself, what
has no surface.
"""

import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import geometry
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.geometry import DepthMaps, measure_depth
from eg3d_rlhf.experiments import pages
from tests.evaluation.comparisons import Bodies, replaced

# Keys of the measures.
RELIEF = "face relief"
NOSE = "nose prominence"
VALID = "valid pixels"
LOOSE = "loose volume"
OPEN = "not watertight"
RANGE = "depth range of the face"


def ball(spec, radius=0.3, centre=(0.0, 0.0, 0.0)):
    """Raw density [D, H, W], 10 on the surface of a ball."""
    z, y, x = torch.meshgrid(*(axis.double() for axis in spec.axes()[::-1]), indexing="ij")
    distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
    return (10 + 100 * (radius - distance)).float()


def with_bodies(monkeypatch, c, bodies):
    """The comparison in which each network, by role, gives `bodies[role](spec)` for every latent."""
    monkeypatch.setattr(geometry, "RESOLUTION", 32)
    networks = {
        role: replaced(generator, field=lambda ws, role=role: Bodies(bodies[role], len(ws)))
        for role, generator in c.generators().items()
    }
    return Comparison(**{**vars(c), **networks})


def body_with_a_floater(spec):
    return torch.maximum(ball(spec, 0.25, (-0.1, 0, 0)), ball(spec, 0.08, (0.35, 0, 0)))


def test_known_bodies(tiny_comparison, monkeypatch, tmp_path):
    c = with_bodies(
        monkeypatch,
        tiny_comparison,
        {"before": body_with_a_floater, "after": ball, "control": body_with_a_floater},
    )
    finding = geometry.surfaces(c, tmp_path)
    means = {
        name: {role: m["mean"] for role, m in entry["means"].items()}
        for name, entry in finding.data["measures"].items()
    }
    assert means["components"] == {"before": 2, "after": 1, "control": 2}
    assert means["mean |curvature|"]["before"] == pytest.approx(1 / 0.25, rel=0.03)
    assert means["mean |curvature|"]["after"] == pytest.approx(1 / 0.3, rel=0.03)
    # coarse grids lose volume
    assert means[LOOSE]["before"] == pytest.approx(0.08**3 / (0.25**3 + 0.08**3), rel=0.1)
    assert set(means["holes"].values()) == set(means[OPEN].values()) == {0}
    # each line names its measure; a change is told by its means and the interval of the difference
    (line,) = (line for line in finding.says if line.startswith("components"))
    assert re.findall(r"-?\d+", line)[:2] == ["2", "1"] and "-1 [-1, -1]" in line and "better" in line
    (line,) = (line for line in finding.says if line.startswith("holes"))
    assert re.findall(r"\d+", line)[:2] == ["0", "0"] and "+0 [+0, +0]" in line


def test_latents_without_a_surface_are_named(tiny_comparison, monkeypatch, tmp_path):
    c = with_bodies(
        monkeypatch,
        tiny_comparison,
        {"before": ball, "after": lambda spec: torch.zeros(spec.shape), "control": ball},
    )
    finding = geometry.surfaces(c, tmp_path)
    assert "absent" in finding.data and "--n" in finding.says[0]
    assert str(tiny_comparison.seeds()[0]) in finding.says[-1]
    job = next(j for j in geometry.jobs(c) if j.key == "surfaces")
    # its figures are drawn too
    assert pages.run([job], tmp_path, quiet=True)["surfaces"].data["measures"] == {}


def test_the_cut_at_the_border_is_no_curvature():
    spec = SlabSpec.cube(40)
    x = spec.axes()[0]
    slab = (10 + 100 * (0.2 - x.abs())).expand(*spec.shape)  # flat sides, cut by four faces of the cube
    values = geometry.mesh_values(*geometry.extract_mesh(slab, spec), spec)
    assert values["mean |curvature|"] < 1e-3 and values["components"] == 1 and values[OPEN] == 0


def test_a_generator_against_itself(unchanged, tmp_path):
    finding = geometry.view_consistency(unchanged, tmp_path)
    for entry in finding.data["measures"].values():
        p = entry["paired"]["after"]
        assert p["mean"] == p["mean_lo"] == p["mean_hi"] == 0 and np.isfinite(entry["values"]["before"]).all()
    assert sum("+0 [+0, +0]" in line for line in finding.says) == 3
    assert any("--control" in line for line in finding.says)
    assert finding.facts.n == geometry.slow_latent_count(unchanged) == len(finding.rows)


@pytest.fixture()
def coarse(monkeypatch):
    monkeypatch.setattr(geometry, "SIGMA_RESOLUTION", 12)


def test_densities_equal_direct_counts(tiny_comparison, coarse):
    c = tiny_comparison
    seeds = tiny_comparison.seeds()
    counts, values = geometry.sigma_values(c, c.before, seeds)
    with torch.no_grad():
        sigma = (
            c.before.generator.field(c.ws(c.before, seeds))
            .density_grid(SlabSpec.from_bounds(c.before.generator.bounds, 12))
            .numpy()
        )
    assert counts.sum() == (sigma > 0).sum()
    assert counts[0] == ((sigma > 0) & (sigma < 0.1)).sum()
    assert np.allclose(values[geometry.LARGEST], sigma.max(axis=(1, 2, 3)))
    assert np.allclose(values[geometry.POSITIVE], (sigma > 0).mean(axis=(1, 2, 3)))


def test_densities_of_a_generator_against_itself_and_figures(unchanged, coarse, tmp_path):
    job = next(j for j in geometry.jobs(unchanged) if j.key == "sigma-statistics")
    finding = pages.run([job], tmp_path, quiet=True)["sigma-statistics"]
    assert finding.data["measures"][geometry.LARGEST]["paired"]["after"]["mean"] == 0
    assert "+0 [+0, +0]" in finding.says[0]
    assert (
        len(finding.rows) == unchanged.n and (tmp_path / "figures" / "sigma-statistics-largest.png").is_file()
    )
    assert any("--control" in line for line in finding.says)


def face(nose=0.0, bend=0.0, tilt=0.0, valid=None, side=80):
    """Maps of one face z(x, y) on a regular grid of the cube's front."""
    y, x = np.meshgrid(np.linspace(0.5, -0.5, side), np.linspace(-0.5, 0.5, side), indexing="ij")
    z = 0.1 + tilt * x - bend * (x**2 + y**2) + nose * np.exp(-((x / 0.015) ** 2) - ((y + 0.04) / 0.03) ** 2)
    return DepthMaps(
        np.stack([x, y, z], -1)[None], np.ones((1, side, side), bool) if valid is None else valid[None]
    )


def test_a_plane_has_no_relief_and_no_nose():
    result = measure_depth(face(tilt=0.3), Bounds())
    assert result[RELIEF][0] == pytest.approx(0, abs=1e-12) and result[VALID][0] == 1
    assert result[RANGE][0] == pytest.approx(0.9 * 0.3 * 0.2, rel=0.1)


def test_a_nose_stands_out_by_its_length():
    small, large = (measure_depth(face(nose=length), Bounds()) for length in (0.02, 0.04))
    assert large[NOSE][0] == pytest.approx(2 * small[NOSE][0], rel=1e-6)
    assert 0.03 < large[NOSE][0] <= 0.04
    assert large[RELIEF][0] == pytest.approx(2 * small[RELIEF][0], rel=1e-6) and small[RELIEF][0] > 0


def test_a_missing_face_is_missing():
    result = measure_depth(face(valid=np.zeros((80, 80), bool)), Bounds())
    assert result[VALID][0] == 0 and all(np.isnan(result[name][0]) for name in list(result)[1:])


def test_change_leaves_pixels_out_that_few_latents_hit():
    before = face()
    after = face(nose=0.03)
    valid = np.ones((1, 80, 80), bool)
    valid[0, :40] = False
    mean = np.array(geometry._change(before, DepthMaps(after.points, valid))["mean"], dtype=float)
    assert np.isnan(mean[:40]).all() and np.nanmax(mean) == pytest.approx(
        (after.points - before.points)[0, 40:, :, 2].max(), abs=1e-6
    )


def test_depth_of_a_generator_against_itself(unchanged, tmp_path):
    (job,) = geometry.depth_jobs(unchanged)
    finding = pages.run([job], tmp_path, quiet=True)["canonical-depth"]
    change = finding.data["measures"][VALID]["paired"]["after"]
    assert change["mean"] == 0 and any("--control" in line for line in finding.says)
    assert all(v in (None, 0.0) for row in finding.data["change"]["after"]["mean"] for v in row)
    assert (tmp_path / "data" / "canonical-depth.png").is_file() and finding.facts.n == len(finding.rows)
