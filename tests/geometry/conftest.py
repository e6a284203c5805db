"""Fixtures of the sigma tests: both plane layouts, and a stand-in generator for each."""

import pytest

from tests.geometry.stand_in import StandIn


@pytest.fixture(params=["eg3d", "fixed"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def stand_in(layout) -> StandIn:
    return StandIn(layout)
