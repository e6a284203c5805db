"""The exponentials of the machine that computed the references."""

import pytest

from eg3d_rlhf.models.trellis import blocks
from tests.compat.family_reference import plain_rates


@pytest.fixture(scope="session")
def rates_of_the_references():
    return plain_rates()


@pytest.fixture(autouse=True)
def as_the_references(request, monkeypatch):
    if request.module.__name__.rpartition(".")[2] in (
        "test_family_trellis2",
        "test_family_sam3d",
        "test_trellis",
    ):
        rates = request.getfixturevalue("rates_of_the_references")
        own = blocks.time_rates
        monkeypatch.setattr(blocks, "time_rates", lambda count: rates if count == len(rates) else own(count))
