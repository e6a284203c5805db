"""Properties of AugmentPipe."""

import pytest
import torch

from training.augment import AugmentPipe

GEOMETRY = dict(xflip=1, rotate90=1, xint=1, scale=1, rotate=1, aniso=1, xfrac=1)
COLOUR = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
EVERYTHING = dict(**GEOMETRY, **COLOUR, imgfilter=1, noise=1, cutout=1)


def images(n: int = 2, channels: int = 3, size: int = 24, dtype=torch.float32) -> torch.Tensor:
    return (
        torch.rand([n, channels, size, size], generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1
    )


def pipe(p: float = 1.0, **options) -> AugmentPipe:
    out = AugmentPipe(**options)
    out.p.fill_(p)
    return out


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_probability_zero_is_the_identity(channels):
    x = images(channels=channels)
    torch.testing.assert_close(pipe(0, **EVERYTHING)(x), x, rtol=1e-6, atol=1e-6)


def smooth_images(size: int = 32) -> torch.Tensor:
    """Slow waves without symmetry, slope up to 0.1 per pixel. With a flip between them the two wavelet
    filters no longer cancel exactly but shift the image by about a tenth of a pixel, which a second flip
    undoes.
    """
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    waves = torch.stack([(3 * x + y).sin(), (2 * y - x).cos(), (x + 3 * y + 1).sin()])
    return waves[None]


def inside(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, 6:-6, 6:-6]


def test_xflip_mirrors_and_twice_is_the_identity():
    x = smooth_images()
    flip = pipe(xflip=1)
    once = flip(x, debug_percentile=0.9)
    torch.testing.assert_close(inside(once), inside(x.flip(3)), rtol=0, atol=0.012)
    torch.testing.assert_close(inside(flip(once, debug_percentile=0.9)), inside(x), rtol=0, atol=1e-3)


def test_rotate90_turns_by_whole_quarters():
    x = smooth_images()
    for percentile, quarters in ((0.3, 1), (0.6, 2), (0.8, 3)):
        out = pipe(rotate90=1)(x, debug_percentile=percentile)
        torch.testing.assert_close(inside(out), inside(x.rot90(quarters, [2, 3])), rtol=0, atol=0.02)


def test_constant_images_survive_geometry():
    x = torch.full([2, 3, 24, 24], 0.3)
    torch.manual_seed(0)
    # mirrored borders cover all
    out = pipe(scale=1, rotate=1, aniso=1, xflip=1, rotate90=1, scale_std=0.05, aniso_std=0.05)(x)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-4)


def test_two_stacked_images_get_the_same_transform():
    x = images()
    torch.manual_seed(1)
    out = pipe(**GEOMETRY, **COLOUR, imgfilter=1, cutout=1)(torch.cat([x, x], dim=1))
    torch.testing.assert_close(out[:, :3], out[:, 3:])


def test_hue_and_saturation_keep_the_grey_part():
    x = images()
    torch.manual_seed(1)
    out = pipe(hue=1, saturation=1)(x)
    assert (out - x).abs().max() > 0.1
    torch.testing.assert_close(out.mean(1), x.mean(1), rtol=0, atol=1e-5)


def test_lumaflip_mirrors_the_grey_part():
    x = images()
    torch.testing.assert_close(
        pipe(lumaflip=1)(x, debug_percentile=0.9).mean(1), -x.mean(1), rtol=0, atol=1e-5
    )


def test_cutout_blanks_a_quarter():
    x = torch.ones([4, 3, 24, 24])
    out = pipe(cutout=1)(x, debug_percentile=0.5)
    assert out.mean().item() == 0.75


def test_second_derivatives_through_everything_are_exact_and_finite():
    """R1: a penalty on the gradient with respect to the images. Checked against central differences in
    float64.
    """
    x = images(n=1, size=24, dtype=torch.float64).requires_grad_()
    augment = pipe(**EVERYTHING)

    def penalty(x):
        torch.manual_seed(5)
        (grad,) = torch.autograd.grad(augment(x).pow(3).sum(), x, create_graph=True)
        return grad.square().sum()

    (grad,) = torch.autograd.grad(penalty(x), x)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    numeric = (penalty(x + h * v) - penalty(x - h * v)) / (2 * h)
    torch.testing.assert_close((grad * v).sum(), numeric, rtol=1e-5, atol=0)


def test_transform_rate_follows_p():
    torch.manual_seed(0)
    x = torch.ones([2000, 1, 2, 2])
    changed = (pipe(0.3, brightness=1)(x) != 1).flatten(1).any(1).float().mean().item()
    assert abs(changed - 0.3) < 0.04


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="21 pixels"):
        pipe(imgfilter=1)(torch.zeros(1, 3, 16, 16))
