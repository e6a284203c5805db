"""`python -m benchmarks.busy`: every case runs, the policy reaches the command, busy processes are gone afterwards."""

import sys

from click.testing import CliRunner

from benchmarks import busy

WRITE = "import os, sys; print(os.environ.get('OMP_WAIT_POLICY'), file=open(sys.argv[1], 'a'))"


def test_three_lines_and_the_policy_of_each(tmp_path):
    result = CliRunner().invoke(busy.main, ["--processes=1", "--", sys.executable, "-c", WRITE, str(tmp_path / "seen")])
    assert result.exit_code == 0, result.output
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == [name for name, _, _ in busy.CASES]
    assert (tmp_path / "seen").read_text().split() == ["None", "active", "None"]


def test_a_command_that_fails_is_one_line(tmp_path):
    result = CliRunner().invoke(busy.main, ["--", sys.executable, "-c", "import sys; sys.exit('no such data')"])
    assert result.exit_code == 2 and "expected the command to end well, got exit code 1: no such data" in result.stderr
