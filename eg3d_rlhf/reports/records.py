"""What a report consists of: findings, computed once, kept as JSON, from which every figure and table is drawn.

compute -> JSON -> plot: a job's `compute` gives a finding, which is written to <out>/data/<key>.json; plots read that file alone.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eg3d_rlhf.cli import file_hash


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
        parts = [f"n = {self.n:,} {self.unit}"]
        parts += [f"seeds {self.seeds}"] if self.seeds else []
        parts += [f"ψ = {self.psi:g}"] if self.psi is not None else []
        parts += [f"{role} {digest[:12]}" for role, digest in self.networks.items()]
        parts += [self.interval] if self.interval else []
        return " · ".join(parts)


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

    @classmethod
    def from_dict(cls, values: Mapping) -> "Finding":
        """The inverse of `to_dict`; further entries are ignored."""
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        return cls(**{**known, "facts": Facts(**known["facts"])})


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


def csv_text(rows: Sequence[Mapping]) -> str:
    """A table as CSV with a header: all columns of all lines, in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
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
