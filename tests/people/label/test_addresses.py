"""A shape has another address in each assignment, which only the server can read."""

import secrets

import pytest

from eg3d_rlhf.people.label.server.addresses import LETTERS, Addresses
from tests.people.label import serving
from tests.people.label.serving import GENEROUS, answer

ASSETS = [secrets.token_urlsafe(16) for _ in range(300)]


def test_addresses_lead_back_and_tell_nothing():
    made = Addresses(b"k" * 32, ASSETS)
    found = {(assignment, asset): made.of(assignment, asset) for assignment in ("one", "two") for asset in ASSETS}
    assert len(set(found.values())) == 600 and all(len(address) == LETTERS for address in found.values())
    assert all(made.asset(address) == asset for (_, asset), address in found.items())
    assert Addresses(b"k" * 32, ASSETS).of("one", ASSETS[7]) == found["one", ASSETS[7]]  # after a restart
    numbers = [address[16:21] for address in found.values()]  # where the hidden number is
    assert len(set(numbers)) > 590


@pytest.mark.parametrize("place", [0, 15, 16, 20, 22, 31])
def test_addresses_cannot_be_made_up(place):
    made = Addresses(b"k" * 32, ASSETS)
    address = made.of("one", ASSETS[3])
    other = "A" if address[place] != "A" else "B"
    assert made.asset(address[:place] + other + address[place + 1 :]) is None
    assert Addresses(b"x" * 32, ASSETS).asset(address) is None
    assert made.asset("A" * LETTERS) is made.asset("A" * 22) is made.asset("A" * 33) is None


def test_a_repeat_has_addresses_of_its_own(tmp_path):
    """As an annotator sees it: no address, of a shape or its ETag, comes in two assignments; what is shown is the same."""
    campaign = {"repeat_share": 0.3, "swap_share": 0.2, "repeat_gap": 2, "gold_every": 4}
    with serving.running(tmp_path, pairs=10, limits=GENEROUS, campaign=campaign) as served:
        page, seen, bodies = served.browser(), {}, {}
        for number in range(60):
            pairs = page.get("/api/assignments?count=1").json()["assignments"]
            if not pairs:
                break
            pair = pairs[0]
            for side in ("left", "right"):
                assert seen.setdefault(pair[side], pair["assignment"]) == pair["assignment"]
                response = page.get(f"/api/shapes/{pair[side]}")
                assert response.headers["etag"] == f'"{pair[side]}"'
                bodies.setdefault(response.content, set()).add(pair[side])
            answer(page, pair["assignment"], f"key-{number}")
        assert max(map(len, bodies.values())) > 1  # there were repeats
        listed = page.get("/api/answers?count=50").json()["answers"]
        assert listed and all(seen[one[side]] == one["assignment"] for one in listed for side in ("left", "right"))
        told = {asset for asset, _ in served.store.shapes(served.campaign)}
        assert not told & set(seen)
