"""Reports: findings that are computed once and stored as JSON, and their figures, tables and HTML pages.

A report consists of jobs, which are its sections. The function `compute` of a job returns a finding, which is
written into <out>/data/<key>.json, where <out> is the folder of the report. The plots read this file only.
Findings are cached by their inputs, so a second call, or a call after a crash, computes only the missing
findings. The HTML pages load nothing from the network, and work from disk with mouse, touch and keyboard. The
page of a report has a light and a dark theme, and can be printed.

Shapes: V vertices, F faces.
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
    """Facts that the foot of a figure states, so that a reader can assess and reproduce the figure."""

    n: int  # number of items
    unit: str = "latents"  # plural noun for the items
    seeds: str = ""  # seeds of the items, such as '200000..200099'
    psi: float | None = None  # truncation psi of the samples; None: not stated
    # role ('before', 'after', 'reward') -> SHA-256 of the network, of which the first 12 digits are shown
    networks: Mapping[str, str] = field(default_factory=dict)
    # method of the intervals, such as '95 % percentile bootstrap over latents, 10,000 resamples'
    interval: str = ""

    def line(self) -> str:
        """Format the facts as one line for the foot of a figure. Facts that are not set are left out."""
        statements = [
            f"n = {self.n:,} {self.unit}",
            self.seeds and f"seeds {self.seeds}",
            "" if self.psi is None else f"ψ = {self.psi:g}",
        ]
        statements += [f"{role} {digest[:12]}" for role, digest in self.networks.items()]
        statements.append(self.interval)
        return " · ".join(statement for statement in statements if statement)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Numbers, table, sentences and images that the job of one section has computed, in JSON types."""

    facts: Facts
    data: dict[str, Any]  # numbers that the plots read
    # table of the numbers of the figures, one mapping (column -> value) per row; it is also written as CSV
    rows: Sequence[Mapping[str, Any]] = ()
    says: Sequence[str] = ()  # sentences that state what the numbers show, and what they do not show
    # caption -> name of an image file in the folder of the JSON file
    images: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert the finding to JSON types."""
        # Passing through JSON turns tuples into lists. A new finding then equals one that was read from its
        # file.
        json_values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return json_values


@dataclass(frozen=True, kw_only=True)
class Job:
    """One section of a report.

    `compute(folder)` returns the finding, and may write images into `folder`. `inputs` contains all values on
    which the result depends besides the code, in JSON types (hashes of files, seeds, options). The finding is
    computed again when `inputs` or `version` changes.
    """

    key: str  # file name of the finding, and HTML id of its section
    title: str
    compute: Callable[[Path], Finding]
    # name -> function of Finding.data that returns a matplotlib figure
    plots: Mapping[str, style.Plot] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1  # version of the computation; it is increased when the code of `compute` changes


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns of a table, in the order in which the rows first use them."""
    # a dictionary, because it keeps the order of its keys, which a set does not
    return list(dict.fromkeys(name for row in rows for name in row))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table as CSV, with a first line of column names. A column that a row lacks is empty there."""
    text_buffer = io.StringIO()
    # the default line terminator of the csv module is "\r\n"
    writer = csv.DictWriter(text_buffer, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text_buffer.getvalue()


def identity_of_file(path: str | Path | None) -> str | None:
    """Return the SHA-256 of a file that a job reads, or None if `path` is None."""
    return None if path is None else file_hash(path)


def seed_range(seeds: Sequence[int]) -> str:
    """Describe a list of seeds, which must not be empty.

    Returns '200000..200099' if the seeds are consecutive and ascending, and otherwise a text such as
    '20 from 3 to 950': their count and their range.
    """
    first_seed = seeds[0]
    last_seed = seeds[-1]
    # The range is compared only if it is as short as the list, since noise seeds may lie far apart.
    if last_seed - first_seed + 1 == len(seeds) and list(seeds) == list(range(first_seed, last_seed + 1)):
        return f"{first_seed}..{last_seed}"
    return f"{len(seeds)} from {min(seeds)} to {max(seeds)}"


def data_file(report_folder: Path, key: str) -> Path:
    """Return the path of the JSON file of a finding.

    Args:
        report_folder: folder of the report.
        key: key of the finding's job.
    """
    return report_folder / "data" / f"{key}.json"


def _finding(report_folder: Path, key: str) -> Finding:
    """Read a finding from <out>/data, and rename keys that version 0.1 wrote to their present names."""
    finding_json = version_0_1.finding(key, json.loads(data_file(report_folder, key).read_text()))
    # the file has one more key, the job's title
    finding_fields = {field.name: finding_json[field.name] for field in dataclasses.fields(Finding)}
    return Finding(**{**finding_fields, "facts": Facts(**finding_fields["facts"])})


def _compute(job: Job, report_folder: Path, _folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """Compute a finding, and write it into <out>/data, the folder that also receives its images.

    Args:
        job: job that computes the finding.
        report_folder: folder of the report.
        _folder: folder of the artefact, which the store passes; it is not used, since findings have their
            own.

    Returns:
        Written files, and an empty record (see store.Maker).
    """
    path = data_file(report_folder, job.key)
    finding = job.compute(path.parent)
    finding_json = {"title": job.title, **finding.to_dict()}
    write_atomic(path, json.dumps(finding_json, indent=1).encode())
    return [path, *(path.parent / name for name in finding.images.values())], {}


def run(
    jobs: Sequence[Job], report_folder: Path, recompute: bool = False, quiet: bool = False
) -> dict[str, Finding]:
    """Compute the missing findings, plot all figures, and write the tables.

    Args:
        jobs: sections of the report.
        report_folder: folder of the report, which is made if it does not exist.
        recompute: True computes all findings again, also the stored ones.
        quiet: True shows no progress bar.

    Returns:
        Findings by the key of their job, in the order of the jobs.
    """
    # hashed=False: a report has one finding per key, so an outdated finding is replaced by the new one
    store = Store(report_folder / "data" / "store", hashed=False, renew=True)
    findings = {}
    with tqdm(total=len(jobs), unit="part", disable=quiet, dynamic_ncols=True) as progress_bar:
        for job in jobs:
            progress_bar.set_description(job.title)
            store_inputs = {"version": job.version, "inputs": dict(job.inputs)}
            # without the record in the store, the finding counts as missing
            if recompute:
                shutil.rmtree(store.folder(job.key, store_inputs), ignore_errors=True)
            store.make(job.key, store_inputs, partial(_compute, job, report_folder))
            # the finding is read back from its file, so that figures depend on the JSON alone
            finding = findings[job.key] = _finding(report_folder, job.key)
            if finding.rows:
                write_atomic(report_folder / "data" / f"{job.key}.csv", csv_text(finding.rows).encode())
            draw(job, report_folder)
            progress_bar.update()
    return findings


def draw(job: Job, report_folder: Path) -> None:
    """Plot the figures of a job from the JSON file of its finding.

    The files are <out>/figures/<key>-<name>.svg, <key>-<name>-dark.svg and <key>-<name>.png. If nothing could
    be measured, the data of the finding hold the reason under the key "absent", and each figure shows it.
    """
    finding_data = _finding(report_folder, job.key).data
    for name, plot in job.plots.items():
        path_stem = report_folder / "figures" / f"{job.key}-{name}"
        # the page shows the SVG file of the reader's theme, and does not use the PNG file
        for theme, endings in (("light", (".svg", ".png")), ("dark", ("-dark.svg",))):
            with style.theme(theme):
                plotted_figure = (style.plot_absent if "absent" in finding_data else plot)(finding_data)
                for ending in endings:
                    style.save(plotted_figure, path_stem.with_name(path_stem.name + ending))


def first_sentences(jobs: Sequence[Job], findings: Mapping[str, Finding]) -> list[str]:
    """Format lines for a terminal: the key of each job, and the first sentence of its finding, wrapped."""
    key_width = max(len(job.key) for job in jobs) + 2
    terminal_lines = []
    for job in jobs:
        first_sentence = next(iter(findings[job.key].says), "")
        # wrap returns no line for an empty text, but the key of the job shall be printed then, too
        for index, wrapped_line in enumerate(textwrap.wrap(first_sentence, 110) or [""]):
            key = job.key if index == 0 else ""
            terminal_lines.append(f"{key:<{key_width}}{wrapped_line}")
    return terminal_lines


# Self-contained HTML files: a report, coloured meshes that a reader can rotate, and a map of samples that
# shows their images.


STATIC = Path(__file__).parent / "static"


def data_uri(file_bytes: bytes, media_type: str) -> str:
    """Encode bytes as a data: URI.

    Args:
        file_bytes: content of the file.
        media_type: media type, such as "image/png".
    """
    return f"data:{media_type};base64,{base64.b64encode(file_bytes).decode()}"


def fill(template_name: str, **values: object) -> str:
    """Fill the template static/<name>.html with its style sheet, its script and values.

    Values are escaped, except those that `safe` has marked.

    Args:
        template_name: name of the template. The files <name>.css and <name>.js beside it are inserted if they
            exist.
        values: further values, by the name that the template uses.
    """
    import jinja2

    # autoescape: values such as titles and labels must not be interpreted as HTML
    jinja_environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(STATIC), autoescape=True, keep_trailing_newline=True
    )
    # the templates use the names `css` and `script`
    path_by_variable = {"css": STATIC / f"{template_name}.css", "script": STATIC / f"{template_name}.js"}
    text_by_variable = {
        variable_name: safe(path.read_text())
        for variable_name, path in path_by_variable.items()
        if path.is_file()
    }
    return jinja_environment.get_template(f"{template_name}.html").render(**text_by_variable, **values)


def safe(html_text: str) -> "Markup":
    """Mark a text that the template must not escape, such as HTML or this package's CSS and JavaScript."""
    import markupsafe

    return markupsafe.Markup(html_text)


def write_page(
    path: Path,
    title: str,
    introduction: str,
    jobs: Sequence[Job],
    findings: Mapping[str, Finding],
    summary: Sequence[str] = (),
    extra_html: str = "",
) -> Path:
    """Write the page of a report from the files that `run` wrote into the same folder.

    Args:
        path: path of the page, which must be <out>/index.html.
        title: title of the page.
        introduction: one paragraph of plain text.
        jobs: sections in the order of the page; a job without a finding is left out.
        findings: findings by the key of their job.
        summary: sentences at the top of the page.
        extra_html: HTML that is appended after the sections, such as an interactive view.

    Returns:
        `path`.
    """
    report_folder = path.parent

    def cell(value: object) -> str:
        """Format a value of a table: a float with four digits, a missing value as an empty text."""
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.4g}"
        return value if isinstance(value, str) else json.dumps(value)

    def svg(name: str) -> "Markup":
        """Return a figure as an <svg> element of the page."""
        file_text = (report_folder / "figures" / f"{name}.svg").read_text()
        # the XML declaration and the document type before the element are not allowed inside HTML
        svg_element = file_text[file_text.index("<svg") :]
        # matplotlib uses the same ids in every figure. On one page they must be unique, so ids and references
        # to them get the name of the figure as a prefix.
        svg_element = re.sub(r'\bid="', f'id="{name}-', svg_element)
        svg_element = svg_element.replace('xlink:href="#', 'href="#')
        return safe(re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg_element))

    page_html = fill(
        "page",
        title=title,
        introduction=introduction,
        summary=summary,
        extra=safe(extra_html),
        shown=[(job, findings[job.key]) for job in jobs if job.key in findings],
        columns=columns,
        cell=cell,
        svg=svg,
        lines=40,  # number of rows of a table that the page shows; the CSV has all rows
        # function (name of an image file) -> data: URI
        picture=lambda name: data_uri((report_folder / "data" / name).read_bytes(), "image/png"),
        json_uri=lambda job: data_uri(data_file(report_folder, job.key).read_bytes(), "application/json"),
        csv_uri=lambda finding: data_uri(csv_text(finding.rows).encode(), "text/csv"),
    )
    write_atomic(path, page_html.encode())
    return path


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Colouring of a mesh, with its legend."""

    name: str
    colours: np.ndarray  # [V, 3] uint8, red, green and blue of each vertex
    legend: Sequence[tuple[str, tuple[int, int, int]]]  # (text, colour), with red, green and blue in 0..255


@dataclass(frozen=True, kw_only=True)
class ColouredMesh:
    """Mesh with one or more colourings, between which a reader can switch."""

    name: str
    vertices: np.ndarray  # [V, 3] world coordinates
    faces: np.ndarray  # [F, 3] indices of vertices
    layers: Sequence[Layer]


def mesh_page(meshes: Sequence[ColouredMesh], title: str, half_side: float = 0.5) -> str:
    """Make a self-contained HTML page that shows meshes.

    Args:
        meshes: meshes, between which a reader can switch.
        title: title of the page.
        half_side: half the side length of the scene cube in world units. Coordinates beyond it are clipped,
            and positions are stored in steps of half_side / 32767.

    Returns:
        HTML text.
    """

    def encode(array: np.ndarray, dtype: str) -> str:
        """Encode an array as base64, for a typed array in JavaScript."""
        return base64.b64encode(array.astype(dtype).tobytes()).decode()

    mesh_records = [
        {
            "name": mesh.name,
            # "<": little-endian, as in the typed arrays of all current browsers
            "positions": encode(np.round(np.clip(mesh.vertices / half_side, -1, 1) * 32767), "<i2"),
            "faces": encode(mesh.faces, "<u4"),
            "layers": [
                {
                    "name": layer.name,
                    "colours": encode(layer.colours, "u1"),
                    "legend": [[label, "rgb({}, {}, {})".format(*colour)] for label, colour in layer.legend],
                }
                for layer in mesh.layers
            ],
        }
        for mesh in meshes
    ]
    return fill("mesh", title=title, meshes=script_json(mesh_records))


def script_json(values: object, **json_options: Any) -> "Markup":
    """Format JSON for the inside of an HTML script element.

    Args:
        values: values in JSON types.
        json_options: further arguments of json.dumps.
    """
    # "</script>" inside a text would end the element, so "<" is escaped
    return safe(json.dumps(values, **json_options).replace("<", "\\u003c"))


def points_section(
    points: Sequence[dict[str, Any]], layouts: Sequence[tuple[str, str]], sprite: dict[str, Any]
) -> str:
    """Make an interactive map of samples as HTML, for the argument `extra_html` of `write_page`.

    Args:
        points: samples, each {"role": "before" or "after" (tuning), "seed", "reward", "<layout>_x",
            "<layout>_y"}. Every seed has a sample of both roles.
        layouts: (name in the keys of the points, title) of each arrangement in the map. The page starts
            with the first one.
        sprite: one image that contains the images of all samples in rows and columns: {"uri": its data: URI,
            "columns", "rows", "seeds", "roles"}. The images are arranged row by row: all roles of the first
            seed, then all roles of the second seed, and so on.

    Returns:
        HTML text.
    """
    # Samples before tuning are coloured by their reward, from the lowest to the highest such reward. All
    # samples after tuning have one colour.
    rewards_before = [point["reward"] for point in points if point["role"] == "before"]
    lowest_reward = min(rewards_before)
    highest_reward = max(rewards_before)
    reward_range = max(highest_reward - lowest_reward, 1e-12)  # not 0, if all rewards are equal
    seed_index = {seed: index for index, seed in enumerate(sprite["seeds"])}
    page_points: list[dict[str, Any]] = [
        {
            "role": point["role"],
            "seed": point["seed"],
            "reward": point["reward"],
            "colour": (
                shade_of((point["reward"] - lowest_reward) / reward_range)
                if point["role"] == "before"
                else style.colour("after")
            ),
            # number of the sample's image in the sprite
            "picture": seed_index[point["seed"]] * len(sprite["roles"])
            + sprite["roles"].index(point["role"]),
            "at": {},  # name of a layout -> [x, y] in 0..1, filled below
        }
        for point in points
    ]
    for layout_name, _ in layouts:
        for axis in "xy":
            coordinates = [point[f"{layout_name}_{axis}"] for point in points]
            min_coordinate = min(coordinates)
            # not 0, if all points have the same coordinate
            coordinate_range = max(max(coordinates) - min_coordinate, 1e-12)
            for page_point, coordinate in zip(page_points, coordinates, strict=True):
                page_point["at"].setdefault(layout_name, []).append(
                    round((coordinate - min_coordinate) / coordinate_range, 5)
                )
    points_data = {
        "points": page_points,
        "layouts": [{"name": layout_name, "title": title} for layout_name, title in layouts],
        "columns": sprite["columns"],
        "rows": sprite["rows"],
    }
    return fill(
        "points",
        sprite=sprite,
        layouts=layouts,
        low=f"{lowest_reward:.2f}",
        high=f"{highest_reward:.2f}",
        scale=", ".join(shade_of(i / 8) for i in range(9)),  # nine colours of a CSS gradient, the legend
        data=script_json(points_data, separators=(",", ":")),
    )


def shade_of(scale_position: float) -> str:
    """Return the colour '#rrggbb' of a value in 0..1 on the colour scale of all reports, viridis."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](scale_position))
