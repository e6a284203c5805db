"""The frame of every report: findings are kept as JSON, drawn from JSON, and computed again only when what
they depend on changes.
"""

import json
import re
from html.parser import HTMLParser

import pytest

from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import Facts, Finding, Job


def plot(data):
    drawn, axes = style.figure()
    axes.plot(data["x"], data["y"])
    axes.set_xlabel("reward <r>")
    return drawn


class Counting:
    """A computation that counts its calls."""

    def __init__(self, value=1.0):
        self.calls = 0
        self.value = value

    def __call__(self, folder):
        self.calls += 1
        rows = [{"seed": i, "delta": self.value * i} for i in range(3)]
        facts = Facts(n=3, seeds="0..2", psi=0.7, networks={"before": "ab" * 32}, interval="none")
        return Finding(
            facts=facts, data={"x": [0, 1, 2], "y": [r["delta"] for r in rows]}, rows=rows, says=["a <b> & c"]
        )


def job(compute, inputs=None, version=1):
    inputs = inputs or {"seeds": [0, 2]}
    return Job(
        key="shift",
        title="Reward shift",
        compute=compute,
        plots={"line": plot},
        inputs=inputs,
        version=version,
    )


def test_a_second_call_computes_nothing(tmp_path):
    compute = Counting()
    first = pages.run([job(compute)], tmp_path, quiet=True)
    again = pages.run([job(compute)], tmp_path, quiet=True)
    assert compute.calls == 1 and first["shift"].to_dict() == again["shift"].to_dict()


@pytest.mark.parametrize("change", [{"inputs": {"seeds": [0, 3]}}, {"version": 2}])
def test_changed_inputs_compute_again(tmp_path, change):
    compute = Counting()
    pages.run([job(compute)], tmp_path, quiet=True)
    pages.run([job(compute, **change)], tmp_path, quiet=True)
    assert compute.calls == 2


def test_half_a_file_computes_again(tmp_path):
    compute = Counting()
    pages.run([job(compute)], tmp_path, quiet=True)
    file = pages.data_file(tmp_path, "shift")
    file.write_text(file.read_text()[:-20])
    pages.run([job(compute)], tmp_path, quiet=True)
    assert compute.calls == 2


def test_plots_read_the_json_alone(tmp_path):
    pages.run([job(Counting())], tmp_path, quiet=True)
    drawn = (tmp_path / "figures" / "shift-line.svg").read_bytes()
    file = pages.data_file(tmp_path, "shift")
    values = json.loads(file.read_text())
    values["data"]["y"] = [0, 5, 1]
    file.write_text(json.dumps(values))
    pages.draw(job(None), tmp_path)
    assert (tmp_path / "figures" / "shift-line.svg").read_bytes() != drawn


def test_figures_are_the_same_bytes_again(tmp_path):
    pages.run([job(Counting())], tmp_path / "a", quiet=True)
    pages.run([job(Counting())], tmp_path / "b", quiet=True)
    for name in ("shift-line.svg", "shift-line-dark.svg", "shift-line.png"):
        assert (tmp_path / "a" / "figures" / name).read_bytes() == (
            tmp_path / "b" / "figures" / name
        ).read_bytes()


class Structure(HTMLParser):
    """Ids and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.ids = []
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href"):
                self.addresses.append(value)


def test_page_needs_nothing_from_elsewhere(tmp_path):
    one = job(Counting())
    findings = pages.run([one], tmp_path, quiet=True)
    text = pages.write_page(
        tmp_path / "index.html", "Evidence <1>", "What changed.", [one], findings, ["first & foremost"]
    ).read_text()
    structure = Structure()
    structure.feed(text)
    assert all(address.startswith(("data:", "#")) for address in structure.addresses)
    assert len(structure.ids) == len(set(structure.ids))
    assert {address[1:] for address in structure.addresses if address.startswith("#")} <= set(structure.ids)
    assert (
        "<b>" not in text
        and "a &lt;b&gt; &amp; c" in text
        and "n = 3 latents" in text
        and "abababababab" in text
    )
    assert not re.search(r"url\((?!#)", text) and "<script" not in text
