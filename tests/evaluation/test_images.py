"""Images: a generator against itself, against a collapsed one, and what is missing; drift, and what the
user's networks add.
"""

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation import images
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.measures.image_similarity import PSNR_CAP
from tests.evaluation.comparisons import StandIn, replaced
from tests.measures.test_image_similarity import Embed, Pair
from tests.rejections import raising

OTHER = "other latent"  # a key of `against`


class Means:
    """A feature network with few features, so that few images carry a covariance."""

    name = "means"
    dim = 3

    def __call__(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture()
def few_features(monkeypatch):
    monkeypatch.setattr(images, "load_features", lambda *_: Means())


def test_a_generator_against_itself(unchanged, few_features, tmp_path):
    result = images.distances(unchanged, tmp_path)
    by = {(row["distance"], row["role"]): row for row in result.data["distances"]}
    assert set(by) == {(d, r) for d in ("Fréchet", "kernel") for r in ("before", "after")}
    assert by["Fréchet", "before"]["measured"] == by["Fréchet", "after"]["measured"] > 0
    for change in result.data["changes"]:
        assert change["measured"] == 0 and change["lo"] <= 0 <= change["hi"]
    # the intervals hold 0, and are shown
    sentences = [
        line for change in result.data["changes"] for line in result.says if f"{change['lo']:+.4g}" in line
    ]
    assert len(sentences) >= 2 and all(
        "nearer" in line and "farther" in line for line in sentences
    )  # neither


def test_images_moved_farther_are_reported(unchanged, few_features, tmp_path):
    def brighter(ws):
        field = unchanged.after.generator.field(ws)
        return StandIn(field, render=lambda *a: (out := field.render(*a))._replace(image=out.image + 3.0))

    c = Comparison(**{**vars(unchanged), "after": replaced(unchanged.after, field=brighter)})
    result = images.distances(c, tmp_path)
    for change in result.data["changes"]:
        assert change["lo"] > 0
        sentences = [line for line in result.says if f"{change['lo']:+.4g}" in line]
        assert sentences and all("farther" in line and "nearer" not in line for line in sentences)
    shown = {(row["measure"], row["role"]): row["value"] for row in result.data["precision_recall"]}
    assert shown["precision", "after"] == shown["recall", "after"] == 0


def test_too_few_images_leave_the_frechet_distance_out(tiny_comparison, tmp_path):
    first, second = images.jobs(tiny_comparison)[:2]
    result = pages.run([first, second], tmp_path, quiet=True)
    assert {row["distance"] for row in result["image-distances"].data["distances"]} == {"kernel"}
    assert any(
        "No Fréchet distance" in text and "--images" in text for text in result["image-distances"].says
    )
    assert {row["role"] for row in result["diversity"].rows} == {"before", "after", "control"}
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "image-distances-distances.png",
        "image-distances-precision-recall.png",
        "diversity-pairwise.png",
    }


def test_without_data_the_part_says_so(unchanged, tmp_path):
    first = images.jobs(Comparison(**{**vars(unchanged), "data": ""}))[0]
    assert "--data" in first.compute(tmp_path).says[0] and not first.plots


def test_other_resolution_is_rejected(unchanged, tmp_path):
    c = Comparison(**{**vars(unchanged), "before": replaced(unchanged.before, img_resolution=64)})
    with raising("--data", "64", "32"):
        images.real_features(c, Means())


def test_collapse_shows(unchanged, tmp_path):
    def mapping(z, c, **truncation):
        return unchanged.after.generator.mapping(torch.zeros_like(z), c, **truncation)

    c = Comparison(**{**vars(unchanged), "after": replaced(unchanged.after, mapping=mapping)})
    result = images.diversity(c, tmp_path)
    # ray jitter, which differs within a batch, keeps equal shapes' images apart
    ratios = {row["of"]: row["ratio"] for row in result.rows if row["role"] == "after"}
    slabs = ratios.pop("σ slabs")
    (features,) = ratios.values()
    assert slabs < 0.01 and features < 0.5
    for ratio in (slabs, features):
        sentences = [line for line in result.says if f"{ratio:.3f} [" in line]
        assert sentences and all("less" in line and "more" not in line for line in sentences)
    same = [row for row in images.diversity(unchanged, tmp_path).rows if row["role"] == "after"]
    np.testing.assert_allclose(
        [[row["ratio"], row["ratio_lo"], row["ratio_hi"]] for row in same], 1.0, rtol=1e-6
    )


@pytest.fixture()
def with_networks(tiny_comparison, tmp_path):
    torch.jit.script(Pair()).save(str(tmp_path / "pair.pt"))
    torch.jit.script(Embed()).save(str(tmp_path / "embed.pt"))
    return Comparison(
        **{**vars(tiny_comparison), "lpips": tmp_path / "pair.pt", "identity": tmp_path / "embed.pt"}
    )


def test_no_drift_against_itself(unchanged, tmp_path):
    result = images.appearance_drift(unchanged, tmp_path)
    mean = {(row["measure"], row["against"]): row["mean"] for row in result.rows}
    assert mean["PSNR, dB", "after"] == PSNR_CAP and mean["SSIM", "after"] == 1
    assert mean["PSNR, dB", OTHER] < 60 and mean["SSIM", OTHER] < 1
    assert images.NO_LPIPS in result.says and any("--control" in text for text in result.says)


def test_the_users_networks(with_networks, tmp_path):
    parts = images.jobs(with_networks)[2:]
    result = pages.run(parts, tmp_path / "out", quiet=True)
    assert list(result["appearance-drift"].data["measures"]) == ["PSNR, dB", "SSIM", "LPIPS"]
    c = with_networks
    seeds = with_networks.seeds()
    before, after = (images.renderings(c, g, seeds, images.YAW) for g in (c.before, c.after))
    expected = (before - after).abs().mean(dim=(1, 2, 3)).tolist()
    assert result["appearance-drift"].data["measures"]["LPIPS"]["after"] == pytest.approx(expected, rel=1e-5)
    cosine = result["identity-drift"].data["measures"]["cosine similarity"]["after"]
    assert len(cosine) == 16 and all(-1.0001 <= value <= 1.0001 for value in cosine)
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) == 2
