"""PostgreSQL goes away under a server and comes back: annotators are told to wait, and nothing else has to be done."""

import time

import pytest

from tests.people.label import serving
from tests.people.label.postgres import REMEDY, find_binaries, run_postgres

pytestmark = pytest.mark.long


@pytest.mark.skipif(find_binaries() is None, reason=f"PostgreSQL not found; {REMEDY}")
def test_postgresql_goes_away_and_comes_back(tmp_path, caplog):
    pytest.importorskip("psycopg", reason="psycopg not found; pip install 'eg3d-rlhf[postgres]'")
    with run_postgres() as server, serving.running(tmp_path, exposed=True, url=server.new_database()) as served:
        token = served.store.add_annotator("ann")
        page, script = served.browser(token), served.client(token)
        pair = page.get("/api/assignments").json()["assignments"][0]["assignment"]
        server.stop()
        caplog.clear()
        for _ in range(40):
            answers = [page.get("/api/session"), script.get("/api/assignments"), serving.answer(page, pair, "k"), page.get("/")]
            assert [r.status_code for r in answers] == [503] * 4 and all(r.headers["retry-after"] == "2" for r in answers)
        assert len(caplog.messages) <= 20 and all(m.startswith("database: ") and "\n" not in m for m in caplog.messages)
        assert served.client().get("/health").status_code == 200
        server.start()
        end = time.monotonic() + 5
        while (response := serving.answer(page, pair, "k")).status_code == 503 and time.monotonic() < end:
            time.sleep(0.1)
        assert response.status_code in (200, 201) and script.get("/api/assignments").status_code == 200
