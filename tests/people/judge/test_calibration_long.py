"""The whole calibration by its command, over HTTP: a judge that answers by the rule of the labels, but flips
15 % of the pairs alike in both orders, passes the gate.
"""

import json

import pytest

from tests.people.judge.fake_server import FakeServer
from tests.people.judge.test_calibration import (
    calibrate_arguments,
    images_of_world,
    make_world,
    run,
    small_rig,  # noqa: F401 (a fixture)
)


@pytest.mark.long
def test_a_judge_that_flips_15_percent_passes_the_gate(small_rig, tmp_path):  # noqa: F811
    utility = make_world(tmp_path / "votes", 120)
    images = images_of_world(utility, tmp_path / "out" / "renders")
    with FakeServer(utilities=images, flip=0.15, seed=1) as server:
        result = run(*calibrate_arguments(tmp_path / "votes", server, tmp_path / "out"))
        print(result.output)
        assert result.exit_code == 0, result.output
        assert len(server.requests()) == 240
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    measured = record["criteria"]["overall"]
    # two outcomes of equal frequency, of which 15 % are exchanged: kappa = 1 - 2 * 0.15
    low, high = measured["kappa_interval"]
    assert low < 0.7 < high and record["gate"] == "passed"
    assert measured["order_flips"] == 0 and measured["first_share"] == 0.5
