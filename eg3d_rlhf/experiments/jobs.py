"""What a report consists of: findings, computed once, kept as JSON, from which every figure and table is drawn.

compute -> JSON -> plot: a job's `compute` gives a finding, which is written to <out>/data/<key>.json; plots read that file alone. Jobs are
cached by what they depend on, so that a second call or one after a crash goes on where the first stopped.
"""

import csv
import dataclasses
import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments import style
from training.storage import write_atomic


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a figure must state so that it can be judged and made again."""

    n: int  # items behind it
    unit: str = "latents"  # what an item is
    seeds: str = ""  # '200000..200099'
    psi: float | None = None  # truncation
    networks: Mapping[str, str] = field(default_factory=dict)  # role ('before', 'after', 'reward') -> SHA-256, shown to 12 digits
    interval: str = ""  # how intervals are made: '95 % percentile bootstrap over latents, 10,000 resamples'

    def line(self) -> str:
        """One line for below a figure."""
        parts = [f"n = {self.n:,} {self.unit}", self.seeds and f"seeds {self.seeds}", "" if self.psi is None else f"ψ = {self.psi:g}"]
        return " · ".join(filter(None, [*parts, *(f"{role} {digest[:12]}" for role, digest in self.networks.items()), self.interval]))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one computation, in JSON types."""

    facts: Facts
    data: dict  # what the plots read
    rows: Sequence[Mapping] = ()  # the table behind the figures, one mapping a line: written as CSV
    says: Sequence[str] = ()  # sentences: what the numbers show, and what they do not
    pictures: Mapping[str, str] = field(default_factory=dict)  # caption -> PNG file beside the JSON

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One part of a report.

    `compute(folder)` returns the finding and may write pictures into `folder`; `inputs` names all that the result depends on besides the
    code, in JSON types (hashes of files, seeds, options): the finding is computed again when they or `version` change.
    """

    key: str  # file name of the finding and anchor of its section
    title: str
    compute: Callable[[Path], Finding]
    plots: Mapping[str, Callable] = field(default_factory=dict)  # name -> function of Finding.data that returns a matplotlib figure
    inputs: Mapping = field(default_factory=dict)
    version: int = 1  # raised when the computation changes

    def identity(self) -> str:
        """SHA-256 over all that the finding depends on."""
        text = json.dumps({"key": self.key, "version": self.version, "inputs": dict(self.inputs)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def columns(rows: Sequence[Mapping]) -> list[str]:
    """All columns of all lines of a table, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def csv_text(rows: Sequence[Mapping]) -> str:
    """A table as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def identity_of_file(path: str | Path | None) -> str | None:
    """SHA-256 of a file that a job reads; None for none."""
    return None if path is None else file_hash(path)


def seed_range(seeds: Sequence[int]) -> str:
    """'200000..200099' where the seeds are consecutive, else their number and ends."""
    first, last = seeds[0], seeds[-1]
    return f"{first}..{last}" if list(seeds) == list(range(first, last + 1)) else f"{len(seeds)} from {min(seeds)} to {max(seeds)}"


def data_file(out: Path, key: str) -> Path:
    """Where the finding of a job lies."""
    return out / "data" / f"{key}.json"


def stored(out: Path, job: Job) -> Finding | None:
    """The finding of an earlier call, if it depends on the same inputs."""
    try:
        values = json.loads(data_file(out, job.key).read_text())
    except (OSError, ValueError):
        return None
    if values.get("identity") != job.identity() or not all((out / "data" / name).is_file() for name in values["pictures"].values()):
        return None
    known = {f.name: values[f.name] for f in dataclasses.fields(Finding)}
    return Finding(**{**known, "facts": Facts(**known["facts"])})


def run(jobs: Sequence[Job], out: Path, fresh: bool = False, quiet: bool = False) -> dict[str, Finding]:
    """Compute what is not there yet, draw all figures, write the tables.

    Args: out: the report's folder, made where missing; fresh: compute everything again; quiet: no progress bar.
    Returns: findings by key, in order of the jobs.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    findings = {}
    with tqdm(total=len(jobs), unit="part", disable=quiet, dynamic_ncols=True) as bar:
        for job in jobs:
            bar.set_description(job.title)
            finding = None if fresh else stored(out, job)
            if finding is None:
                finding = job.compute(out / "data")
                values = {"title": job.title, "identity": job.identity(), **finding.to_dict()}
                write_atomic(data_file(out, job.key), json.dumps(values, indent=1).encode())
            findings[job.key] = finding
            if finding.rows:
                write_atomic(out / "data" / f"{job.key}.csv", csv_text(finding.rows).encode())
            draw(job, out)
            bar.update()
    return findings


def draw(job: Job, out: Path) -> None:
    """Draw the figures of a job from its JSON file: <out>/figures/<key>-<name>.svg, -dark.svg and .png."""
    values = json.loads(data_file(out, job.key).read_text())["data"]
    for name, plot in job.plots.items():
        stem = out / "figures" / f"{job.key}-{name}"
        for theme, endings in (("light", (".svg", ".png")), ("dark", ("-dark.svg",))):
            with style.theme(theme):
                drawn = (style.plot_absent if "absent" in values else plot)(values)
                for ending in endings:
                    style.save(drawn, stem.with_name(stem.name + ending))


def first_sentences(jobs: Sequence[Job], findings: Mapping[str, Finding]) -> list[str]:
    """Lines for a terminal: each job's name and the first thing that its finding says, wrapped."""
    width = max(len(job.key) for job in jobs) + 2
    says = [(job.key, textwrap.wrap(next(iter(findings[job.key].says), ""), 110) or [""]) for job in jobs]
    return [f"{'' if i else key:<{width}}{line}" for key, lines in says for i, line in enumerate(lines)]
