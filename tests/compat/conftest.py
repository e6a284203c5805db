"""Use the exponentials of the machine that computed the references; let no test skip for want of a value that
tests/references holds.
"""

import re

import pytest

from eg3d_rlhf.models.trellis import blocks
from tests.compat.family_reference import plain_rates
from tests.compat.reference import OURS, ROOT

OPTIONAL = re.compile(r"not installed|extra solid|could not import")  # reasons about libraries


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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """Turn a skip on tests/references into a failure, unless an optional library is missing.

    Another set may leave values out. This one is complete, so that a test that skips has lost its values.
    """
    outcome = yield
    report = outcome.get_result()
    if ROOT == OURS and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not OPTIONAL.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, though tests/references is complete: {reason}"
