"""tools/attribute.py from end to end: a network against itself, and settings that are refused."""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf import bundled
from tools.attribute import main

pytest.importorskip("captum")
SAME = [f"--after={bundled.GENERATOR}", "--device=cpu"]


def call(*arguments):
    return CliRunner().invoke(main, [*SAME, *arguments])


def test_dry_run_is_json(tmp_path):
    found = json.loads(call("--dry-run", "--n=3", f"--out={tmp_path}").stdout)
    assert found["regions"] == "landmarks" and found["n"] == 3 and found["method"] == "exact"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--method=antithetic", "--permutations=5"], "--permutations"), (["--regions=none.npy"], "--regions"),
     (["--steps=99999"], "--steps"),
     (["--landmarks=none.json"], "--landmarks"),
     (["--landmarks=x.json", "--regions=boxes"], "--regions=landmarks")],
)  # fmt: skip
def test_wrong_settings(tmp_path, arguments, text):
    result = call(*arguments, "--n=2", f"--out={tmp_path}")
    assert result.exit_code == 2 and text in result.output and "Traceback" not in result.output


def test_no_change_attributes_nothing(tmp_path):
    arguments = ["--regions=boxes", "--n=2", "--draws=2", "--checked=1", f"--out={tmp_path}"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "data" / "shapley.json").read_text())["data"]
    assert {v for latent in data["values"] for v in latent} == {0.0} and data["largest_relative_gap"] == 0
    page = (tmp_path / "index.html").read_text()
    assert "no ranks to compare" in page and "srcdoc=" in page and (tmp_path / "data" / "regions.png").is_file()
    before = (tmp_path / "data" / "shapley.json").stat().st_mtime_ns
    assert call(*arguments).exit_code == 0
    assert (tmp_path / "data" / "shapley.json").stat().st_mtime_ns == before  # nothing is computed again
