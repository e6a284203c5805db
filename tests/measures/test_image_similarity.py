"""PSNR and SSIM equal those of scikit-image, and networks are read from TorchScript files."""

import numpy as np
import pytest
import torch

from eg3d_rlhf.measures.image_similarity import PSNR_CAP, load_identity, load_lpips, psnr, ssim


def images(seed=0, n=3, size=(24, 31)):
    coarse = torch.rand([n, 3, 6, 6], generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)


def test_ssim_equals_that_of_scikit_image():
    from skimage.metrics import structural_similarity

    first = images(0)
    second = (images(0) + 0.4 * images(1)).clamp(-1, 1)
    expected = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(ssim(first, second), expected, rtol=1e-9)
    assert 0.1 < np.mean(expected) < 0.95


def test_psnr_equals_that_of_scikit_image_and_is_capped():
    from skimage.metrics import peak_signal_noise_ratio

    first = images(0)
    second = images(1)
    expected = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=2)
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(psnr(first, second), expected, rtol=1e-10)
    assert psnr(first, first).tolist() == [PSNR_CAP] * 3


class Pair(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=[1, 2, 3], keepdim=True)


class Embed(torch.nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a.mean(dim=[2, 3])


@pytest.fixture()
def scripts(tmp_path):
    paths = {"pair": tmp_path / "pair.pt", "embed": tmp_path / "embed.pt", "text": tmp_path / "text.pt"}
    torch.jit.script(Pair()).save(str(paths["pair"]))
    torch.jit.script(Embed()).save(str(paths["embed"]))
    paths["text"].write_text("nothing")
    return paths


def test_networks_of_the_user(scripts):
    first = images(0)
    second = images(1)
    torch.testing.assert_close(
        load_lpips(scripts["pair"])(first, second), (first - second).abs().mean(dim=(1, 2, 3))
    )
    torch.testing.assert_close(load_identity(scripts["embed"])(first).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: load_lpips(s["text"]), "--lpips: .* TorchScript"),
        (lambda s: load_identity(s["text"]), "--identity: .* TorchScript"),
        (lambda s: load_lpips(s["embed"])(images(), images()), "--lpips: the network in .*embed.pt"),
        (lambda s: load_identity(s["pair"])(images()), "--identity: the network in .*pair.pt"),
    ],
)
def test_other_files_are_rejected(scripts, call, text):
    with pytest.raises(ValueError, match=text):
        call(scripts)
