"""Pictures for published scorers against torchvision's values, and the properties that they leave open."""

import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.preprocess import CLIP_MEAN, CLIP_STD, clip_preprocess, normalise, pad_preprocess
from tests.compat.reference import ROOT

FILE = ROOT / "distill" / "preprocess.npz"
CASES = json.loads(FILE.with_suffix(".json").read_text())["cases"] if FILE.exists() else {}
needs_values = pytest.mark.skipif(not CASES, reason=f"no reference values at {FILE}; set EG3D_RLHF_FIXTURES to their folder")


@needs_values
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_bit_for_bit_and_leaves_its_argument(name):
    values = {k.removeprefix(f"{name}/"): torch.from_numpy(v) for k, v in np.load(FILE).items() if k.startswith(f"{name}/")}
    image = values["image"].clone().requires_grad_()
    out = clip_preprocess(image, CASES[name]["size"])
    assert torch.equal(out, values["out"])
    (out * values["weight"]).sum().backward()
    torch.testing.assert_close(image.grad, values["dsum_dimage"], rtol=1e-5, atol=1e-6)
    assert torch.equal(image.detach(), values["image"])


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (16, 16), (9, 7), (1, 40)])
def test_padding_keeps_the_whole_picture(height, width):
    grey = torch.full((1, 3, height, width), 0.5, requires_grad=True)
    before = grey.detach().clone()
    out = pad_preprocess(grey, 16)
    assert out.shape == (1, 3, 16, 16) and torch.equal(grey.detach(), before)
    shown = out.detach() * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)  # back in 0..1
    long = max(height, width)
    expected = max(round(height * 16 / long), 1) * max(round(width * 16 / long), 1) / 256
    torch.testing.assert_close(shown.mean(), torch.tensor(0.5 * expected), rtol=1e-4, atol=1e-5)
    assert ((shown - 0.5).abs().lt(1e-4) | shown.abs().lt(1e-4)).all()  # the picture, or black
    out.sum().backward()
    assert grey.grad is not None and grey.grad.abs().min() > 0  # every pixel counts


def test_a_picture_of_the_right_size_is_only_normalised():
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pad_preprocess(image, 16), normalise(image)) and torch.equal(clip_preprocess(image, 16), normalise(image))
    assert pad_preprocess(image, 16).data_ptr() != image.data_ptr()
