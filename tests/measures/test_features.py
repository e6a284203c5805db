"""A user's own detector gives features, and files are checked before use."""

import re

import pytest
import torch

from eg3d_rlhf.measures.features import HeadFactorFeatures, InceptionFeatures, load_features
from tests.rejections import raising


class _Detector(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images.float().mean(dim=[2, 3])


def test_a_users_torchscript_detector(tmp_path):
    path = tmp_path / "detector.pt"
    torch.jit.script(_Detector()).save(str(path))
    network = load_features(path)
    assert network.dim == 3
    torch.testing.assert_close(network(torch.zeros(2, 3, 8, 8)), torch.full((2, 3), 128.0))


def test_mistakes_are_named(tmp_path):
    with raising(str(tmp_path / "none.safetensors"), "features"):
        HeadFactorFeatures.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bad.safetensors"))):
        load_features(tmp_path / "bad.safetensors")
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bad.pt"))):
        InceptionFeatures(tmp_path / "bad.pt")
