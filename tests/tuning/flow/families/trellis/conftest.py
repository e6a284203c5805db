"""Fixtures with the tiny TRELLIS, which is written once per session."""

import pytest

from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from tests.tuning.flow.families.trellis import tiny_trellis


@pytest.fixture(scope="session")
def trellis_root(tmp_path_factory):
    """Return the folder of its files, which tests must not change."""
    return tiny_trellis.write_trellis(tmp_path_factory.mktemp("trellis") / "TRELLIS-text-tiny")


@pytest.fixture
def pipeline(trellis_root):
    """Open the folder as a new pipeline."""
    return FAMILY.load(trellis_root, tiny_trellis.tokens())
