"""The server never fails: with requests made from the API's own description, and with bytes outside it."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.people.label import serving
from tests.people.label.serving import GENEROUS

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis not found; pip install 'eg3d-rlhf[dev]'"
)

BOUNDED = hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving.running(tmp_path_factory.mktemp("fuzz"), pairs=40, limits=GENEROUS) as served:
        yield served


@pytest.fixture(scope="module")
def admin(served):
    """A client that may do everything, without the browser's precautions."""
    return served.client(served.store.add_annotator("fuzz", "admin"))


@pytest.fixture(scope="module")
def description(served, admin):
    """The API as it describes itself to admins, ready for schemathesis."""
    text = admin.get("/api/admin/openapi.json").json()
    loaded = schemathesis.openapi.from_dict(text)
    loaded.config.update(base_url=served.url)
    return loaded


def test_requests_from_the_description(description, admin):
    statuses = {}
    for result in description.get_all_operations():
        operation = result.ok()
        statuses[operation.label] = send_generated(
            operation, {"Authorization": admin.headers["Authorization"]}
        )
    assert len(statuses) >= 10 and all(statuses.values())
    accepted = [label for label, seen in statuses.items() if any(s < 400 for s in seen)]
    assert len(accepted) >= 6, statuses  # it does reach what it should


def send_generated(operation, headers: dict) -> list[int]:
    """Send requests that fit an operation's description; returns the statuses."""
    statuses = []

    @BOUNDED
    @hypothesis.given(case=operation.as_strategy())
    def sent(case):
        response = case.call(headers=headers)
        statuses.append(response.status_code)
        assert response.status_code < 500, (
            operation.label,
            case.path_parameters,
            case.query,
            case.body,
            response.text,
        )
        assert response.status_code < 400 or set(response.json()) == {"error", "remedy"}

    sent()
    return statuses


@BOUNDED
@hypothesis.given(
    body=st.binary(max_size=200),
    path=st.sampled_from(["judgements", "undo", "admin/annotators", "admin/annotators/revoke"]),
)
def test_bytes(admin, body, path):
    response = admin.post(f"/api/{path}", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500


FIELDS = ("key", "assignment", "choice", "reason", "milliseconds", "views", "answered_at", "page_version")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    max_leaves=4,
    extend=lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@hypothesis.settings(BOUNDED, max_examples=30)
@hypothesis.given(field=st.sampled_from(FIELDS), value=ANYTHING)
def test_one_field_of_a_good_judgement_replaced(served, admin, field, value):
    token = admin.get("/api/assignments?count=1").json()["assignments"][0]["assignment"]
    good = {
        "key": "good",
        "assignment": token,
        "choice": "tie",
        "reason": None,
        "milliseconds": 5,
        "views": [],
        "answered_at": 1.0,
    }
    body = json.dumps({**good, "page_version": "t", field: value}).encode("utf-8", "surrogatepass")
    response = admin.post("/api/judgements", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 201, 400, 404, 409, 413, 422), response.text
