"""Everything that has to be seen on a machine with a GPU, by one command, on one page: what compiles, what is right, what it gains.

    python -m benchmarks.gpu                                    writes runs/gpu/gpu.md
    python -m benchmarks.gpu --device=cpu --quick               a rehearsal without one

Each part is a process of its own, so that one that crashes leaves the others: the compilation of all ops, the tests that a GPU makes whole,
a short run of training, and the benchmark with torch.compile beside it. The page is written anew after every part.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import report
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, user_errors
from training.storage import write_atomic

ROOT = Path(__file__).parents[1]
TESTS = ("tests/torch_utils/cuda", "tests/torch_utils/test_cuda_check.py", "tests/training/test_batches.py")
_SHOWN = 30  # last lines of a part


class Part(NamedTuple):
    """What a part did."""

    name: str
    passed: bool
    seconds: float
    said: str  # in Markdown


def commands(device: str, quick: bool, out: Path) -> dict[str, list[str]]:
    """The parts by name, in order."""
    python = [sys.executable]
    bench = ["-m", "benchmarks", f"--device={device}", f"--out={out}", *(["--quick"] if quick else ["--torch-compile"])]
    train = ["train.py", "--reward=sigma", "--lambda-r=10", f"--device={device}", f"--outdir={out / 'training'}", "--no-summary"]
    return {
        "compilation": [*python, "-m", "torch_utils.build"],
        "tests": [*python, "-m", "pytest", "-q", "-rs", *TESTS],
        "training": [*python, *train, "--kimg=0.032" if quick else "--kimg=0.4"],
        "benchmark": [*python, *bench],
    }


def run(name: str, command: list[str], out: Path, quick: bool) -> Part:
    """One part; what it printed is kept in OUT/<name>.log."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds, text = time.monotonic() - started, done.stdout.decode(errors="replace").replace("\r", "\n")
    write_atomic(out / f"{name}.log", text.encode())
    if name == "benchmark" and not done.returncode:
        said = (out / ("quick.md" if quick else "latest.md")).read_text()
    else:
        said = "\n".join(["```", *[line for line in text.splitlines() if line.strip()][-_SHOWN:], "```"])
    return Part(name, done.returncode == 0, seconds, said)


def page(parts: list[Part], device: str) -> str:
    """The page."""
    about = ", ".join(f"{name} {value}" for name, value in {**report.machine(device), **report.versions(device)}.items())
    rows = [f"| {p.name} | {'passed' if p.passed else '**failed**'} | {p.seconds:.0f} |" for p in parts]
    head = [f"# What this machine shows: {device}", "", about, "", "| part | | seconds |", "| --- | --- | --- |", *rows]
    return "\n".join([*head, *(f"\n## {p.name}\n\n{p.said}" for p in parts)]) + "\n"


@click.command(cls=GroupedCommand, help=__doc__.split("\n\n")[0])
@option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", help="cpu: a rehearsal.")
@option("--quick", is_flag=True, help="Tiny inputs in the benchmark, a few images in training.")
@option("--part", "names", type=click.Choice(list(commands("", False, Path()))), multiple=True, show_default="all", help="These alone.")
@option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/gpu"),
        help="Folder of gpu.md and the logs.")
def main(device: str, quick: bool, names: tuple[str, ...], out: Path) -> None:
    with user_errors():
        choose_device(device)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    for name, command in commands(device, quick, out).items():
        if names and name not in names:
            continue
        click.echo(f"{name} ...", err=True)
        parts.append(run(name, command, out, quick))
        write_atomic(out / "gpu.md", page(parts, device).encode())
        click.echo(f"{name}: {'passed' if parts[-1].passed else 'failed'}, {parts[-1].seconds:.0f} s", err=True)
    click.echo(f"{out / 'gpu.md'}")
    if not all(part.passed for part in parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
