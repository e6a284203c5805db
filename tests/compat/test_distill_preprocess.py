"""Pictures for published scorers against torchvision's values, and the properties that they leave open."""

import pytest
import torch

from eg3d_rlhf.models.clip_inputs import CLIP_MEAN, CLIP_STD, clip_preprocess, pad_preprocess
from tests.compat.distill_reference import each, entry_of, needs, under

NAME = "preprocess"


@needs(NAME)
@each(NAME)
def test_equals_the_reference_bit_for_bit_and_leaves_its_argument(case):
    v = under(NAME, case)
    image = v["image"].clone().requires_grad_()
    out = clip_preprocess(image, entry_of(NAME, case)["size"])
    assert torch.equal(out, v["out"])
    (out * v["weight"]).sum().backward()
    torch.testing.assert_close(image.grad, v["dsum_dimage"], rtol=1e-5, atol=1e-6)
    assert torch.equal(image.detach(), v["image"])


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (16, 16), (9, 7), (1, 40)])
def test_padding_keeps_the_whole_picture(height, width):
    grey = torch.full((1, 3, height, width), 0.5, requires_grad=True)
    before = grey.detach().clone()
    out = pad_preprocess(grey, 16)
    assert out.shape == (1, 3, 16, 16) and torch.equal(grey.detach(), before)
    # back in 0..1
    shown = out.detach() * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    long = max(height, width)
    expected = max(round(height * 16 / long), 1) * max(round(width * 16 / long), 1) / 256
    torch.testing.assert_close(shown.mean(), torch.tensor(0.5 * expected), rtol=1e-4, atol=1e-5)
    assert ((shown - 0.5).abs().lt(1e-4) | shown.abs().lt(1e-4)).all()  # the picture, or black
    out.sum().backward()
    assert grey.grad is not None and grey.grad.abs().min() > 0  # every pixel counts
