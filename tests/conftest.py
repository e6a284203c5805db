"""Shared fixtures: where the reference values live, and one thread per worker so that runs repeat."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def _fixtures_root() -> Path:
    return Path(os.environ.get("EG3D_RLHF_FIXTURES", REPO.parent / "shared" / "fixtures"))


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of reference values; the tests that need it are skipped, with the reason, where it does not exist."""
    root = _fixtures_root()
    if not root.is_dir():
        pytest.skip(f"reference values not found at {root}; set EG3D_RLHF_FIXTURES to their folder")
    return root
