"""What a busy machine costs, and what threads that hardly spin cost on a quiet one: seconds of `make demo`, or of a command.

    python -m benchmarks.busy                                  three demos, one of them beside as many busy processes as there are cores
    python -m benchmarks.busy -- python train.py --kimg=0.1    another command

Threads spin briefly unless the user sets OMP_WAIT_POLICY (torch_utils/__init__.py); the second line is without that. Beside busy processes
it is not measured: a demo would take half an hour.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option

DEMO = (str(Path(__file__).parents[1] / "train.py"), "--reward=sigma", "--lambda-r=10")
CASES = (("quiet", None, False), ("quiet, OMP_WAIT_POLICY=active", "active", False), ("busy", None, True))


def measure(command: Sequence[str], policy: str | None, beside: int) -> float:
    """Seconds that a command takes beside so many busy processes. Raises: ValueError where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        started = time.monotonic()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - started
    finally:
        for process in others:
            process.kill()
            process.wait()
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        got = f"exit code {done.returncode}: {''.join(last)}"
        raise ValueError(f"benchmarks.busy: expected the command to end well, got {got}. Try it alone.")
    return seconds


@click.command(cls=GroupedCommand, help=__doc__.split("\n\n")[0])
@option("--processes", metavar="INT", type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default="cores", help="Busy ones.")
@click.argument("command", nargs=-1)
def main(processes: int, command: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = command or (sys.executable, *DEMO, f"--outdir={folder}")
        first = None
        for name, policy, is_busy in CASES:
            click.echo(f"{name} ...", err=True)
            seconds = measure(command, policy, processes if is_busy else 0)
            first = first or seconds
            click.echo(f"{name:32s} {seconds:8.1f} s  {seconds / first:5.2f} times the first")


if __name__ == "__main__":
    main()
