"""`python -m benchmarks.gpu`: every part is on the page, a failed one with what it printed."""

import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu


def test_a_part_that_fails_is_shown_and_leaves_the_others(tmp_path, monkeypatch):
    found = {"compilation": [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"],
             "training": [sys.executable, "-c", "print('tick 1')"]}
    monkeypatch.setattr(gpu, "commands", lambda device, quick, out: found)
    result = CliRunner().invoke(gpu.main, ["--device=cpu", f"--out={tmp_path}"])
    assert result.exit_code == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "| compilation | **failed** |" in text and "what went wrong" in text
    assert "| training | passed |" in text and "tick 1" in text
    assert (tmp_path / "compilation.log").read_text() == "what went wrong\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path):
    result = CliRunner().invoke(gpu.main, [f"--out={tmp_path}"])
    assert result.exit_code != 0 and "Traceback" not in result.output and not (tmp_path / "gpu.md").exists()


@pytest.mark.long
def test_a_rehearsal(tmp_path):
    result = CliRunner().invoke(gpu.main, ["--device=cpu", "--quick", f"--out={tmp_path}"])
    text = (tmp_path / "gpu.md").read_text()
    assert result.exit_code == 0, text
    assert all(f"| {name} | passed |" in text for name in gpu.commands("cpu", True, tmp_path))
    assert "G forward" in text and "skipped" in text
