"""One self-contained HTML file for a report: no network, works from disk, dark and light, prints well."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.reports.jobs import Finding, Job, columns, csv_text, data_file
from training.storage import write_atomic

STATIC = Path(__file__).parent / "static"
_TABLE_LINES = 40  # of a table shown on the page; the whole is in the CSV


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a data: address of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fill(template: str, **values) -> str:
    """A template of static/ with these values, escaped but for what `safe` has marked."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True, keep_trailing_newline=True)
    return environment.get_template(template).render(**values)


def safe(text: str):
    """Text that is HTML, or CSS or JavaScript of ours, already."""
    import markupsafe

    return markupsafe.Markup(text)


def static(name: str):
    """A file of static/ to put into a template."""
    return safe((STATIC / name).read_text())


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
    text = fill(
        "page.html", title=title, introduction=introduction, summary=summary, css=static("page.css"), extra=safe(extra),
        shown=[(job, findings[job.key]) for job in jobs if job.key in findings], lines=_TABLE_LINES, columns=columns, cell=_cell,
        svg=lambda name: _inline(out / "figures" / f"{name}.svg"),
        picture=lambda name: data_uri((out / "data" / name).read_bytes(), "image/png"),
        json_uri=lambda job: data_uri(data_file(out, job.key).read_bytes(), "application/json"),
        csv_uri=lambda finding: data_uri(csv_text(finding.rows).encode(), "text/csv"),
    )
    write_atomic(path, text.encode())
    return path


def _inline(path: Path):
    """An SVG file as an element of the page; its ids are made its own, since several figures share the page."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    mark = f"{path.stem}-"
    text = re.sub(r'\bid="', f'id="{mark}', text)
    return safe(re.sub(r'(href="#|url\(#)', lambda found: found.group(1) + mark, text.replace('xlink:href="#', 'href="#')))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
