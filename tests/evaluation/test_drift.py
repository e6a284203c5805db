"""Drift of images at the same latent: nothing against itself, and what the user's networks add."""

import pytest
import torch

from eg3d_rlhf.evaluation import drift
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.metrics.image_similarity import PSNR_CAP
from eg3d_rlhf.reports import jobs
from tests.metrics.test_image_similarity import Embed, Pair


@pytest.fixture()
def with_networks(tiny_comparison, tmp_path):
    torch.jit.script(Pair()).save(str(tmp_path / "pair.pt"))
    torch.jit.script(Embed()).save(str(tmp_path / "embed.pt"))
    return Comparison(**{**vars(tiny_comparison), "lpips": tmp_path / "pair.pt", "identity": tmp_path / "embed.pt"})


def test_a_generator_against_itself(unchanged, tmp_path):
    found = drift.appearance_drift(unchanged, tmp_path)
    mean = {(row["measure"], row["against"]): row["mean"] for row in found.rows}
    assert mean["PSNR, dB", "after"] == PSNR_CAP and mean["SSIM", "after"] == 1
    assert mean["PSNR, dB", "other latent"] < 60 and mean["SSIM", "other latent"] < 1
    assert drift.NO_LPIPS in found.says and any("--control" in text for text in found.says)


def test_control_moves_less(tiny_comparison, tmp_path):
    rows = drift.appearance_drift(tiny_comparison, tmp_path).rows
    mean = {(row["measure"], row["against"]): row["mean"] for row in rows}
    assert all(mean[name, "control"] > mean[name, "after"] for name in ("PSNR, dB", "SSIM"))


def test_the_users_networks(with_networks, tmp_path):
    parts = drift.jobs(with_networks)
    found = jobs.run(parts, tmp_path / "out", quiet=True)
    assert list(found["appearance-drift"].data["measures"]) == ["PSNR, dB", "SSIM", "LPIPS"]
    c, seeds = with_networks, with_networks.seeds()
    before, after = (drift.renderings(c, g, seeds, drift.YAW) for g in (c.before, c.after))
    expected = (before - after).abs().mean(dim=(1, 2, 3)).tolist()
    assert found["appearance-drift"].data["measures"]["LPIPS"]["after"] == pytest.approx(expected, rel=1e-5)
    cosine = found["identity-drift"].data["measures"]["cosine similarity"]["after"]
    assert len(cosine) == 16 and all(-1.0001 <= value <= 1.0001 for value in cosine)
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) == 2


def test_without_a_network_identity_says_how(unchanged, tmp_path):
    part = drift.jobs(unchanged)[1]
    assert part.compute(tmp_path).says == [drift.NO_IDENTITY] and not part.plots


def test_the_file_is_part_of_the_identity(with_networks, tiny_comparison):
    assert drift.jobs(with_networks)[0].identity() != drift.jobs(tiny_comparison)[0].identity()
