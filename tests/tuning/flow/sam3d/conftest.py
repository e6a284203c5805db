"""The tiny SAM 3D, written once."""

import pytest

from eg3d_rlhf.tuning.flow.families.sam3d.pipeline import load_pipeline
from tests.tuning.flow.sam3d import tiny_sam3d


@pytest.fixture(scope="session")
def sam3d_root(tmp_path_factory):
    """Folder of its files; not to be changed."""
    return tiny_sam3d.write_sam3d(tmp_path_factory.mktemp("sam3d") / "SAM3D-tiny")


@pytest.fixture
def pipeline(sam3d_root):
    """Opened anew."""
    return load_pipeline(sam3d_root, tiny_sam3d.tokens())
