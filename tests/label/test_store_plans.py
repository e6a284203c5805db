"""What is asked at every judgement reads through an index: its time must not grow with the campaign."""

import re

import pytest
from sqlalchemy.dialects import sqlite

from eg3d_rlhf.label import issuing, progress
from eg3d_rlhf.label.records import CampaignSettings
from eg3d_rlhf.label.store import Store
from tests.label.plans import plan

HOT = {
    "answered": progress.ANSWERED, "free": progress.FREE, "left": progress.HAD_AND_RECENT, "open": issuing.OPEN_ONES,
    "past": issuing.PAST, "stamp": issuing.STAMP, "window": issuing.PAGE, "expired": issuing.EXPIRED,
}


@pytest.mark.parametrize("name", HOT)
def test_no_table_is_read_whole(tmp_path, name):
    with Store.open(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        store.create_campaign(CampaignSettings(name="c"), plan(6))
        text = str(HOT[name].compile(dialect=sqlite.dialect(paramstyle="named")))
        values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
        with store.reading() as c:
            steps = [row[3] for row in c.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]
    scans = [step for step in steps if re.match(r"SCAN (pairs|assignments|judgements|shapes|annotators|a|j)\b", step)]
    assert steps and scans == []
