"""Reports: findings that are computed once and kept as JSON, and their figures, tables and pages.

compute -> JSON -> plot: a job's `compute` returns a finding, which is written to <out>/data/<key>.json; plots
read that file only. Jobs are cached by their inputs, so that a second call, or a call after a crash, resumes.
Pages need neither network nor libraries, and work from disk with mouse, touch and keyboard. The report has a
light and a dark theme, and can be printed.
Letters: V vertices, F faces.
"""

import base64
import csv
import dataclasses
import io
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments import style, version_0_1
from eg3d_rlhf.experiments.store import Store
from training.progress import tqdm
from training.storage import write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that a figure states, so that a reader can assess and reproduce it."""

    n: int  # number of items
    unit: str = "latents"  # plural noun for the items
    seeds: str = ""  # such as '200000..200099'
    psi: float | None = None  # truncation
    # role ('before', 'after', 'reward') -> SHA-256, shown to 12 digits
    networks: Mapping[str, str] = field(default_factory=dict)
    interval: str = ""  # method, such as '95 % percentile bootstrap over latents, 10,000 resamples'

    def line(self) -> str:
        """Format the facts as one line for the foot of a figure."""
        parts = [
            f"n = {self.n:,} {self.unit}",
            self.seeds and f"seeds {self.seeds}",
            "" if self.psi is None else f"ψ = {self.psi:g}",
        ]
        return " · ".join(
            filter(
                None,
                [*parts, *(f"{role} {digest[:12]}" for role, digest in self.networks.items()), self.interval],
            )
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one computation, in JSON types."""

    facts: Facts
    data: dict[str, Any]  # read by the plots
    rows: Sequence[Mapping[str, Any]] = ()  # table of the figures' numbers, one mapping per line; CSV
    says: Sequence[str] = ()  # sentences that state what the numbers show, and what they do not
    images: Mapping[str, str] = field(default_factory=dict)  # caption -> PNG file beside the JSON

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        # through JSON, so that a fresh finding equals one that was read from its file
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values


@dataclass(frozen=True, kw_only=True)
class Job:
    """One part of a report.

    `compute(folder)` returns the finding, and may write images into `folder`. `inputs` lists everything that
    the result depends on besides the code, in JSON types (hashes of files, seeds, options). The finding is
    computed again when they or `version` change.
    """

    key: str  # file name of the finding, and HTML id of its section
    title: str
    compute: Callable[[Path], Finding]
    # name -> function of Finding.data that returns a matplotlib figure
    plots: Mapping[str, style.Plot] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1  # raised when the computation changes


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the columns of all lines of a table, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def identity_of_file(path: str | Path | None) -> str | None:
    """Hash a file that a job reads with SHA-256; None for no file."""
    return None if path is None else file_hash(path)


def seed_range(seeds: Sequence[int]) -> str:
    """Describe seeds: '200000..200099' if they are consecutive, else their number and their range."""
    first = seeds[0]
    last = seeds[-1]
    return (
        f"{first}..{last}"
        if list(seeds) == list(range(first, last + 1))
        else f"{len(seeds)} from {min(seeds)} to {max(seeds)}"
    )


def data_file(out: Path, key: str) -> Path:
    """Return the JSON file of a finding."""
    return out / "data" / f"{key}.json"


def _finding(out: Path, key: str) -> Finding:
    """Read a finding from <out>/data; findings of version 0.1 get the names of this version."""
    values = version_0_1.finding(key, json.loads(data_file(out, key).read_text()))
    known = {f.name: values[f.name] for f in dataclasses.fields(Finding)}
    return Finding(**{**known, "facts": Facts(**known["facts"])})


def _compute(job: Job, out: Path, _folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """Compute a finding, and write it into <out>/data, where its images are as well."""
    path = data_file(out, job.key)
    finding = job.compute(path.parent)
    values = {"title": job.title, **finding.to_dict()}
    write_atomic(path, json.dumps(values, indent=1).encode())
    return [path, *(path.parent / name for name in finding.images.values())], {}


def run(jobs: Sequence[Job], out: Path, fresh: bool = False, quiet: bool = False) -> dict[str, Finding]:
    """Compute the missing findings, draw all figures, and write the tables.

    Args: out: the report's folder, made if missing; fresh: compute everything again; quiet: no progress bar.
    Returns: findings by key, in order of the jobs.
    """
    store = Store(out / "data" / "store", hashed=False, renew=True)
    findings = {}
    with tqdm(total=len(jobs), unit="part", disable=quiet, dynamic_ncols=True) as bar:
        for job in jobs:
            bar.set_description(job.title)
            inputs = {"version": job.version, "inputs": dict(job.inputs)}
            if fresh:
                shutil.rmtree(store.folder(job.key, inputs), ignore_errors=True)
            store.make(job.key, inputs, partial(_compute, job, out))
            # read back from the file, so that figures depend on the JSON alone
            finding = findings[job.key] = _finding(out, job.key)
            if finding.rows:
                write_atomic(out / "data" / f"{job.key}.csv", csv_text(finding.rows).encode())
            draw(job, out)
            bar.update()
    return findings


def draw(job: Job, out: Path) -> None:
    """Draw the figures of a job from its JSON file: <out>/figures/<key>-<name>.svg, -dark.svg and .png."""
    values = _finding(out, job.key).data
    for name, plot in job.plots.items():
        stem = out / "figures" / f"{job.key}-{name}"
        for theme, endings in (("light", (".svg", ".png")), ("dark", ("-dark.svg",))):
            with style.theme(theme):
                drawn = (style.plot_absent if "absent" in values else plot)(values)
                for ending in endings:
                    style.save(drawn, stem.with_name(stem.name + ending))


def first_sentences(jobs: Sequence[Job], findings: Mapping[str, Finding]) -> list[str]:
    """Format lines for a terminal: each job's name and the first sentence of its finding, wrapped."""
    width = max(len(job.key) for job in jobs) + 2
    says = [(job.key, textwrap.wrap(next(iter(findings[job.key].says), ""), 110) or [""]) for job in jobs]
    return [f"{'' if i else key:<{width}}{line}" for key, lines in says for i, line in enumerate(lines)]


# Self-contained HTML files: a report, coloured meshes that a reader can turn, and a map of samples that shows
# their shapes.


STATIC = Path(__file__).parent / "static"


def data_uri(data: bytes, kind: str) -> str:
    """Encode bytes as a data: address of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fill(name: str, **values: object) -> str:
    """Fill the template static/<name>.html with its style sheet, its script and these values.

    Values are escaped, except those that `safe` has marked.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(STATIC), autoescape=True, keep_trailing_newline=True
    )
    files = {key: STATIC / f"{name}.{kind}" for key, kind in (("css", "css"), ("script", "js"))}
    parts = {key: safe(path.read_text()) for key, path in files.items() if path.is_file()}
    return environment.get_template(f"{name}.html").render(**parts, **values)


def safe(text: str) -> "Markup":
    """Mark text that must not be escaped: HTML, or this package's CSS or JavaScript."""
    import markupsafe

    return markupsafe.Markup(text)


def write_page(
    path: Path,
    title: str,
    introduction: str,
    jobs: Sequence[Job],
    findings: Mapping[str, Finding],
    summary: Sequence[str] = (),
    extra: str = "",
) -> Path:
    """Assemble the report's page from the files that `run` wrote beside it.

    Args:
        path: <out>/index.html; introduction: one paragraph of plain text; summary: sentences at the top.
        extra: HTML that is appended after the sections, such as an interactive view.
    Returns: path.
    """
    out = path.parent

    def cell(value: object) -> str:
        """Format a value of a table."""
        text = (
            f"{value:.4g}"
            if isinstance(value, float)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        return "" if value is None else text

    def svg(name: str) -> "Markup":
        """Return a figure as an element of the page."""
        # matplotlib repeats ids between figures; on one page they must be unique, so the name is prefixed
        drawn = (out / "figures" / f"{name}.svg").read_text()
        drawn = re.sub(r'\bid="', f'id="{name}-', drawn[drawn.index("<svg") :])
        return safe(re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawn.replace('xlink:href="#', 'href="#')))

    text = fill(
        "page",
        title=title,
        introduction=introduction,
        summary=summary,
        extra=safe(extra),
        shown=[(job, findings[job.key]) for job in jobs if job.key in findings],
        columns=columns,
        cell=cell,
        svg=svg,
        lines=40,  # of a table that the page shows; all lines are in the CSV
        # the name that the template uses
        picture=lambda name: data_uri((out / "data" / name).read_bytes(), "image/png"),
        json_uri=lambda job: data_uri(data_file(out, job.key).read_bytes(), "application/json"),
        csv_uri=lambda finding: data_uri(csv_text(finding.rows).encode(), "text/csv"),
    )
    write_atomic(path, text.encode())
    return path


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Colouring of a mesh, with its legend."""

    name: str
    colours: np.ndarray  # [V, 3] uint8
    legend: Sequence[tuple[str, tuple[int, int, int]]]  # (text, colour)


@dataclass(frozen=True, kw_only=True)
class ColouredMesh:
    """Mesh with one or more colourings, between which a reader can switch."""

    name: str
    vertices: np.ndarray  # [V, 3] world coordinates
    faces: np.ndarray  # [F, 3]
    layers: Sequence[Layer]


def mesh_page(meshes: Sequence[ColouredMesh], title: str, reach: float = 0.5) -> str:
    """Make a self-contained HTML page that shows meshes.

    Args: reach: half the side of the scene in world units; positions are stored in steps of 1/32767 of it.
    """

    def text(values: np.ndarray, kind: str) -> str:
        return base64.b64encode(values.astype(kind).tobytes()).decode()

    content = [
        {
            "name": mesh.name,
            "positions": text(np.round(np.clip(mesh.vertices / reach, -1, 1) * 32767), "<i2"),
            "faces": text(mesh.faces, "<u4"),
            "layers": [
                {
                    "name": layer.name,
                    "colours": text(layer.colours, "u1"),
                    "legend": [[key, "rgb({}, {}, {})".format(*colour)] for key, colour in layer.legend],
                }
                for layer in mesh.layers
            ],
        }
        for mesh in meshes
    ]
    return fill("mesh", title=title, meshes=_script_json(content))


def _script_json(values: object, **how: Any) -> "Markup":
    """Format JSON for the inside of a script element."""
    # "</script>" inside a text would end the element, so "<" is escaped
    return safe(json.dumps(values, **how).replace("<", "\\u003c"))


def points_section(
    points: Sequence[dict[str, Any]], layouts: Sequence[tuple[str, str]], sprite: dict[str, Any]
) -> str:
    """Make an interactive map of samples as HTML, for `write_page`'s `extra`.

    Args:
        points: {"role": "before" or "after", "seed", "reward", "<layout>_x", "<layout>_y"}; every seed has
            both roles.
        layouts: (name in the points, title); the first one is shown first.
        sprite: {"uri": data: address of the sheet of images, "columns", "rows", "seeds", "roles"}; images are
            row by row, with all roles of the first seed, then of the second, ...
    """
    # the colour scale is that of the rewards before tuning
    low, high = (limit(p["reward"] for p in points if p["role"] == "before") for limit in (min, max))
    seeds = {seed: i for i, seed in enumerate(sprite["seeds"])}
    shown: list[dict[str, Any]] = [
        {
            "role": p["role"],
            "seed": p["seed"],
            "reward": p["reward"],
            "colour": (
                shade_of((p["reward"] - low) / max(high - low, 1e-12))
                if p["role"] == "before"
                else style.colour("after")
            ),
            "picture": seeds[p["seed"]] * len(sprite["roles"]) + sprite["roles"].index(p["role"]),
            "at": {},
        }
        for p in points
    ]
    for name, _ in layouts:
        for axis in "xy":
            values = [p[f"{name}_{axis}"] for p in points]
            least = min(values)
            span = max(max(values) - min(values), 1e-12)  # guard: all points may have one coordinate
            for entry, value in zip(shown, values, strict=True):
                entry["at"].setdefault(name, []).append(round((value - least) / span, 5))
    data = {
        "points": shown,
        "layouts": [{"name": n, "title": t} for n, t in layouts],
        "columns": sprite["columns"],
        "rows": sprite["rows"],
    }
    return fill(
        "points",
        sprite=sprite,
        layouts=layouts,
        low=f"{low:.2f}",
        high=f"{high:.2f}",
        scale=", ".join(shade_of(i / 8) for i in range(9)),
        data=_script_json(data, separators=(",", ":")),
    )


def shade_of(share: float) -> str:
    """Return the colour '#rrggbb' of a value in 0..1 on the reports' scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](share))
