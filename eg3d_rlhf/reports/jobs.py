"""Run the jobs of a report: cached by what they depend on, so that a second call or one after a crash goes on where the first stopped."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.records import Finding, Job, csv_text
from training.storage import write_atomic


def data_file(out: Path, key: str) -> Path:
    """Where the finding of a job lies."""
    return out / "data" / f"{key}.json"


def stored(out: Path, job: Job) -> Finding | None:
    """The finding of an earlier call, if it depends on the same inputs."""
    try:
        values = json.loads(data_file(out, job.key).read_text())
    except (OSError, ValueError):
        return None
    if values.get("identity") != job.identity():
        return None
    finding = Finding.from_dict(values)
    return finding if all((out / "data" / name).is_file() for name in finding.pictures.values()) else None


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


def draw(job: Job, out: Path) -> list[Path]:
    """Draw the figures of a job from its JSON file: <out>/figures/<key>-<name>.svg, -dark.svg and .png. Returns the light SVGs."""
    values = json.loads(data_file(out, job.key).read_text())["data"]
    files = []
    for name, plot in job.plots.items():
        stem = out / "figures" / f"{job.key}-{name}"
        for theme, endings in (("light", (".svg", ".png")), ("dark", ("-dark.svg",))):
            with style.theme(theme):
                drawn = plot(values)
                for ending in endings:
                    style.save(drawn, stem.with_name(stem.name + ending))
        files.append(stem.with_name(stem.name + ".svg"))
    return files


def first_sentences(jobs: Sequence[Job], findings: Mapping[str, Finding]) -> list[str]:
    """Lines for a terminal: each job's name and the first thing that its finding says, wrapped."""
    width = max(len(job.key) for job in jobs) + 2
    shown = []
    for job in jobs:
        says = textwrap.wrap(next(iter(findings[job.key].says), ""), 110) or [""]
        shown += [f"{name:<{width}}{line}" for name, line in zip([job.key, *[""] * len(says)], says, strict=False)]
    return shown
