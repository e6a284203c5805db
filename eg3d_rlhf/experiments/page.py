"""Self-contained HTML files: a report, coloured meshes that a reader can turn, and a map of samples that shows their shapes.

They need neither network nor libraries, and work from disk with mouse, touch and keyboard; the report is dark or light and prints well.
Letters: V vertices, F faces.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Finding, Job, columns, csv_text, data_file
from training.storage import write_atomic

STATIC = Path(__file__).parent / "static"


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a data: address of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fill(name: str, **values) -> str:
    """The template static/<name>.html with its style sheet, its script and these values, escaped but for what `safe` has marked."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True, keep_trailing_newline=True)
    files = {key: STATIC / f"{name}.{kind}" for key, kind in (("css", "css"), ("script", "js"))}
    own = {key: safe(path.read_text()) for key, path in files.items() if path.is_file()}
    return environment.get_template(f"{name}.html").render(**own, **values)


def safe(text: str):
    """Text that is HTML, or CSS or JavaScript of ours, already."""
    import markupsafe

    return markupsafe.Markup(text)


def write_page(
    path: Path, title: str, introduction: str, jobs: Sequence[Job], findings: Mapping[str, Finding], summary: Sequence[str] = (),
    extra: str = "",
) -> Path:
    """Assemble the report's page from the files that `jobs.run` wrote beside it.

    Args:
        path: <out>/index.html; introduction: one paragraph of plain text; summary: sentences that stand first.
        extra: HTML of the caller's, after the sections (an interactive view).
    Returns: path.
    """
    out = path.parent

    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        return "" if value is None else text

    def svg(name: str):
        """A figure as an element of the page; its ids are made its own, since several figures share the page."""
        drawn = (out / "figures" / f"{name}.svg").read_text()
        drawn = re.sub(r'\bid="', f'id="{name}-', drawn[drawn.index("<svg") :])
        return safe(re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawn.replace('xlink:href="#', 'href="#')))

    text = fill(
        "page", title=title, introduction=introduction, summary=summary, extra=safe(extra),
        shown=[(job, findings[job.key]) for job in jobs if job.key in findings], columns=columns, cell=cell, svg=svg,
        lines=40,  # of a table shown on the page; the whole is in the CSV
        picture=lambda name: data_uri((out / "data" / name).read_bytes(), "image/png"),
        json_uri=lambda job: data_uri(data_file(out, job.key).read_bytes(), "application/json"),
        csv_uri=lambda finding: data_uri(csv_text(finding.rows).encode(), "text/csv"),
    )
    write_atomic(path, text.encode())
    return path


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One colouring of a mesh."""

    name: str
    colours: np.ndarray  # [V, 3] uint8
    legend: Sequence[tuple[str, tuple[int, int, int]]]  # (text, colour)


@dataclass(frozen=True, kw_only=True)
class ColouredMesh:
    """A mesh with its colourings."""

    name: str
    vertices: np.ndarray  # [V, 3] world coordinates
    faces: np.ndarray  # [F, 3]
    layers: Sequence[Layer]


def mesh_page(meshes: Sequence[ColouredMesh], title: str, reach: float = 0.5) -> str:
    """A page of its own as text. Args: reach: half the side of the scene, world units; vertices are kept to 1/32767 of it."""

    def text(values: np.ndarray, kind: str) -> str:
        return base64.b64encode(values.astype(kind).tobytes()).decode()

    found = [
        {
            "name": mesh.name, "positions": text(np.round(np.clip(mesh.vertices / reach, -1, 1) * 32767), "<i2"),
            "faces": text(mesh.faces, "<u4"),
            "layers": [{"name": layer.name, "colours": text(layer.colours, "u1"),
                        "legend": [[key, "rgb({}, {}, {})".format(*colour)] for key, colour in layer.legend]} for layer in mesh.layers],
        }
        for mesh in meshes
    ]
    return fill("mesh", title=title, meshes=_script_json(found))


def _script_json(values, **how):
    """JSON that may stand inside a script element."""
    return safe(json.dumps(values, **how).replace("<", "\\u003c"))


def points_section(points: Sequence[dict], layouts: Sequence[tuple[str, str]], sprite: dict) -> str:
    """The map as HTML for `write_page`'s `extra`.

    Args:
        points: {"role": "before" or "after", "seed", "reward", "<layout>_x", "<layout>_y"}; every seed with both roles.
        layouts: (name in the points, title), the first is shown first.
        sprite: {"uri": data: address of the sheet of pictures, "columns", "rows", "seeds", "roles"}; pictures row by row, the roles of the
            first seed, of the second, ...
    """
    low, high = (limit(p["reward"] for p in points if p["role"] == "before") for limit in (min, max))
    seeds = {seed: i for i, seed in enumerate(sprite["seeds"])}
    shown: list[dict] = [
        {
            "role": p["role"], "seed": p["seed"], "reward": p["reward"],
            "colour": shade_of((p["reward"] - low) / max(high - low, 1e-12)) if p["role"] == "before" else style.colour("after"),
            "picture": seeds[p["seed"]] * len(sprite["roles"]) + sprite["roles"].index(p["role"]),
            "at": {},
        }
        for p in points
    ]
    for name, _ in layouts:
        for axis in "xy":
            values = [p[f"{name}_{axis}"] for p in points]
            least, span = min(values), max(max(values) - min(values), 1e-12)
            for one, value in zip(shown, values, strict=True):
                one["at"].setdefault(name, []).append(round((value - least) / span, 5))
    data = {"points": shown, "layouts": [{"name": n, "title": t} for n, t in layouts], "columns": sprite["columns"], "rows": sprite["rows"]}
    return fill(
        "points", sprite=sprite, layouts=layouts, low=f"{low:.2f}", high=f"{high:.2f}",
        scale=", ".join(shade_of(i / 8) for i in range(9)), data=_script_json(data, separators=(",", ":")),
    )


def shade_of(share: float) -> str:
    """Colour '#rrggbb' of a value in 0..1 on the reports' scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](share))
