"""Many annotators at once and a server killed in the middle of it: what was acknowledged is kept, once, and
answers come fast.
"""

import asyncio
import json
import socket
from collections import Counter

import numpy as np
import pytest

from eg3d_rlhf.people.label.shape_files import ShapeCache
from eg3d_rlhf.people.label.store import Store
from tests.people.label import serving
from tests.people.label.load import Annotator, ServerProcess, Work, labour


def free_port() -> int:
    """Return a free port; the server comes back on it after every kill."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(folder, url: str, annotators: int, each: int, kills: int, look: float) -> Work:
    """Annotators on a fresh campaign; checks that nothing acknowledged is lost or kept twice. Returns what
    they saw.
    """
    total = annotators * each
    settings = serving.settings()
    with Store.open(url) as store:
        campaign = store.create_campaign(settings, serving.plan(total, training=2, gold=4))
        tokens = {f"annotator{i:02d}": store.add_annotator(f"annotator{i:02d}") for i in range(annotators)}
        few = [shape for _, shape in store.shapes(campaign)[:1]]
        cache = ShapeCache(folder / "cache")
        serving.fill(cache, few)
        original = cache.mesh(few[0])
        for _, shape in store.shapes(campaign)[1:]:  # thousands: links are enough, as no test looks at them
            link = cache._path(shape, ".shp.gz")
            link.parent.mkdir(exist_ok=True)
            link.hardlink_to(original)
    server = ServerProcess(url, settings.name, folder / "cache", serving.static(folder), free_port())
    server.start()
    work = Work()
    try:
        crowd = [Annotator(name, token, server.base, work, each, look) for name, token in tokens.items()]
        asyncio.run(labour(crowd, server, kills, total))
    finally:
        server.kill()
    check(url, work, total)
    return work


def check(url: str, work: Work, total: int) -> None:
    """The store holds every acknowledged judgement once, as it was sent, and no others."""
    assert work.rejected == {} and len(work.acknowledged) == total
    with Store.open(url, create=False) as store:
        rows = list(store.judgements(include_undone=True))
    assert len(rows) == total
    assert max(Counter(row.assignment for row in rows).values()) == 1
    kept = Counter((row.annotator, row.choice.value) for row in rows)
    assert kept == Counter((annotator, choice) for (annotator, _), choice in work.acknowledged.items())


def figures(work: Work, **more) -> dict:
    ms = 1000 * np.array(work.seconds)
    resent = sum(n > 1 for n in work.sent.values())
    p50, p95, p99 = (round(float(np.percentile(ms, q)), 1) for q in (50, 95, 99))
    counts = {"judgements": len(work.acknowledged), "sent_again": resent, "found_kept": work.duplicates}
    return {**more, **counts, "p50": p50, "p95": p95, "p99": p99}


def test_nothing_is_lost_where_the_server_is_killed(tmp_path):
    work = run(tmp_path, f"sqlite:///{tmp_path / 'labels.db'}", annotators=8, each=6, kills=1, look=0.05)
    assert len(work.acknowledged) == 48


@pytest.mark.long
def test_fifty_annotators_at_work_while_the_server_is_killed_five_times(tmp_path, database_url, capsys):
    annotators = 50
    each = 200
    kills = 5
    look = 1.0  # seconds; people look for several
    latencies = figures(
        run(tmp_path, database_url, annotators, each, kills, look), database=database_url.split(":")[0]
    )
    with capsys.disabled():
        print(json.dumps(latencies))
    assert latencies["p95"] < 80
    lines = [json.loads(line) for line in (tmp_path / "cache" / "access.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "start" for line in lines) == 1 + kills
    assert (
        sum(line.get("route") == "/api/judgements" and line["status"] == 201 for line in lines)
        >= 0.95 * annotators * each
    )
