"""What is asked at every judgement reads through an index: its time must not grow with the campaign."""

import re

import pytest
from sqlalchemy.dialects import sqlite

from eg3d_rlhf.people.label import assignments
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import plan

HOT = {
    "answered": assignments.ANSWERED, "free": assignments.FREE, "had": assignments.FREE_BUT_HAD, "hers": assignments.FREE_TO_HER,
    "open": assignments.OPEN_ONES, "past": assignments.PAST, "stamp": assignments.STAMP,
    "window": assignments.PAGE, "expired": assignments.EXPIRED,
}


@pytest.mark.parametrize("name", HOT)
def test_no_table_is_read_whole(tmp_path, name):
    with Store.open(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        store.create_campaign(CampaignSettings(name="c"), plan(6))
        text = str(HOT[name].compile(dialect=sqlite.dialect(paramstyle="named")))
        values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
        with store.database.read() as c:
            steps = [row[3] for row in c.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]
    scans = [step for step in steps if re.match(r"SCAN (pairs|assignments|judgements|shapes|annotators|a|j)\b", step)]
    assert steps and scans == []
