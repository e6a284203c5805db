"""Fixtures with the tiny TRELLIS.2, which is written once per session."""

import shutil

import pytest

from eg3d_rlhf.tuning.flow.families.trellis2 import FAMILY
from tests.tuning.flow.families.trellis2 import tiny_trellis2


@pytest.fixture(scope="session")
def trellis2_root(tmp_path_factory):
    """Return the folder of its files, which tests must not change."""
    return tiny_trellis2.write_trellis2(tmp_path_factory.mktemp("trellis2") / "TRELLIS.2-tiny")


@pytest.fixture
def pipeline(trellis2_root):
    """Open the folder as a new pipeline."""
    return FAMILY.load(trellis2_root, tiny_trellis2.tokens())


@pytest.fixture
def copied(trellis2_root, tmp_path):
    """Return a copy of the folder that a test may change."""
    shutil.copytree(trellis2_root.parent / "trellis", tmp_path / "trellis")
    return shutil.copytree(trellis2_root, tmp_path / "root")
