"""Strips: the order is the reward's, the pictures hold what their captions say, and the orbit stops by itself."""

import PIL.Image
import pytest
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.evaluation import report
from eg3d_rlhf.experiments import pages
from tests.evaluation import comparisons


@pytest.fixture()
def small(monkeypatch):
    monkeypatch.setattr(report, "RESOLUTION", 12)
    monkeypatch.setattr(report, "PIXELS", 16)


def sizes(finding, folder):
    return {name: PIL.Image.open(folder / name).size for name in finding.pictures.values()}


def test_highest_and_lowest_are_the_rewards(tiny_comparison, small, tmp_path):
    c = tiny_comparison
    finding = report.reward_strips(c, tmp_path)
    k = finding.data["k"]
    assert k == min(report.K, c.n // 2)
    for role in ("before", "after"):
        scores = dict(zip(c.seeds(), c.scores(c.generators()[role], c.seeds()).tolist(), strict=True))
        order = sorted(scores, key=scores.get, reverse=True)
        picked = {w: [row["seed"] for row in finding.rows if (row["role"], row["which"]) == (role, w)] for w in ("highest", "lowest")}
        assert picked == {"highest": order[:k], "lowest": order[::-1][:k]}
    assert set(sizes(finding, tmp_path).values()) == {(16 * k, 32)}


def test_same_latents_have_a_row_per_network(tiny_comparison, small, tmp_path):
    job = next(j for j in report.strip_jobs(tiny_comparison) if j.key == "same-latents")
    finding = pages.run([job], tmp_path, quiet=True)["same-latents"]
    assert set(sizes(finding, tmp_path / "data").values()) == {(16 * report.SHOWN, 48)}
    assert all("before, after, control" in caption for caption in finding.pictures)
    assert {"reward_before", "reward_after", "reward_control"} < set(finding.rows[0])


def test_without_a_control_there_are_two_rows_and_a_note(unchanged, small, tmp_path):
    finding = report.same_latents(unchanged, tmp_path)
    assert set(sizes(finding, tmp_path).values()) == {(16 * report.SHOWN, 32)} and any("--control" in line for line in finding.says)


def test_orbit_stops_and_is_hidden_where_motion_is_unwelcome(tiny_comparison, small, monkeypatch, tmp_path):
    def turning(c, generator, seeds, yaws):  # a picture that differs in every frame
        return torch.linspace(0, 1, len(yaws)).reshape(1, -1, 1, 1, 1).expand(1, len(yaws), 1, 16, 16)

    monkeypatch.setattr(report, "shapes", turning)
    job = next(j for j in report.strip_jobs(tiny_comparison) if j.key == "orbit")
    findings = pages.run([job], tmp_path, quiet=True)
    moving = PIL.Image.open(tmp_path / "data" / "orbit.apng")
    assert (moving.format, moving.size, moving.info["loop"]) == ("PNG", (32, 16), report.SWINGS) and moving.is_animated
    assert report.ORBIT_FRAMES * report.FRAME_MS * report.SWINGS <= 5000
    text = pages.write_page(tmp_path / "index.html", "t", "i", [job], findings).read_text()
    assert text.count('<figure class="moving">') == 1 and text.count("<img ") == 2
    assert "@media (prefers-reduced-motion: reduce), print { .moving { display: none; } }" in text


def test_bundled_shapes_are_drawn(tiny_reward):
    c = comparisons.load(bundled.GENERATOR, tiny_reward, after=bundled.GENERATOR)
    picture = report.shapes(c, c.before, [210_000], (0.0,))
    assert picture.shape == (1, 1, 1, 128, 128) and 0.1 < (picture < 1).float().mean() < 0.9
