"""Fixtures of the labelling application's tests."""

import pytest

from tests.people.label.browser import browser, page, serve
from tests.people.label.postgres import postgres_server, postgres_url

__all__ = ["browser", "page", "postgres_server", "postgres_url", "serve"]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """URL of an empty database of either kind."""
    return f"sqlite:///{tmp_path / 'labels.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
