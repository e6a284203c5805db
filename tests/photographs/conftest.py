"""Rendered heads that several tests read."""

import PIL.Image
import pytest

from tests.photographs import heads


@pytest.fixture(scope="session")
def portraits() -> list[PIL.Image.Image]:
    """Two heads of 256 x 256 pixels: one from the front, one from 20 degrees at the right."""
    first, second = heads.heads(2)
    return [heads.render(first, 0), heads.render(second, 20)]
