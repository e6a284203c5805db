"""Page of a mesh validation: shares and medians of each generator, paired files, renders of the worst meshes,
and all rows as CSV and JSON.
"""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import Facts, Finding, Job

_TILE = "display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px"
REASONS = 12  # unmeasured files that the page lists with their reason


def words(header: Mapping) -> str:
    """Describe the tolerances and thresholds, in the text at the top of the page."""
    # the body whose centre of mass decides
    mass = "its convex hull" if header["hull_mass"] else "the body itself"
    return (
        f"Lengths are shares of the longest edge of the bounding box. Corners within {header['weld']:g} are"
        f" welded; {header['up']} is up; {header['samples']:,} points per mesh, {header['rays']} rays each,"
        f" seed {header['seed']}. Hidden: no ray leaves, on no side; 'nothing hidden' allows"
        f" {header['hidden']:.0%} of the area. 'Thick walls': 99 % of it is at least {header['wall']:g}"
        f" thick; thin is below {header['thin']:g}; hollows that open only through holes of radius"
        f" {header['leak']:g} count as inner ones. 'Stands': can be tilted by 3 degrees or more, by the mass"
        f" of {mass}. 'No crossing': no edge passes through a face that it does not touch."
    )


def _given(finding: Finding, _comparison: object) -> Finding:
    """Return a finding that is computed already; `pages.run` expects a function that computes it."""
    return finding


def write_census(
    out: Path,
    folder: Path,
    header: Mapping,
    rows: Sequence[dict],
    tables: Mapping[str, list[dict]],
    worst: Sequence[dict],
    images: Mapping[str, str],
) -> Path:
    """Write <out>/index.html and <out>/data/*.json, *.csv.

    Args:
        header: tolerance and thresholds.
        rows: the rows of all files.
        tables: the tables 'shares', 'medians' and 'paired'.
        worst: the rows of the worst meshes, the worst first.
        images: PNG in base64 by file name.
    Returns: the path of the page.
    """
    measured = sum(not row["reason"] for row in rows)  # number of files
    unmeasured = [row for row in rows if row["reason"]]
    facts: dict[str, Any] = {"n": measured, "unit": "meshes"}
    generators = sorted({row["generator"] for row in rows if not row["reason"]})  # of measured files alone
    findings = {
        "shares": Finding(
            facts=Facts(**facts, interval="95 % Wilson intervals"),
            data={"rows": tables["shares"]},
            rows=tables["shares"],
            says=[
                f"{name}: {_sentence([row for row in tables['shares'] if row['generator'] == name])}"
                for name in generators
            ],
        ),
        "medians": Finding(
            facts=Facts(**facts, interval="95 % percentile bootstrap over files"),
            data={},
            rows=tables["medians"],
        ),
        "paired": Finding(
            facts=Facts(
                # The table has one row per pair of generators and demand. There are eight demands, so every
                # eighth row belongs to another pair of generators.
                n=sum(row["pairs"] for row in tables["paired"][::8]),
                unit="pairs of files of one name",
                interval="McNemar, exact",
            ),
            data={},
            rows=tables["paired"],
        ),
        "files": Finding(
            facts=Facts(**facts),
            data={"header": dict(header)},
            rows=rows,
            says=[
                (
                    f"{len(unmeasured)} of {len(rows)} files were not measured."
                    if unmeasured
                    else "All files were measured."
                ),
                *(f"{row['file']}: {row['reason']}" for row in unmeasured[:REASONS]),
            ],
        ),
    }
    titles = {
        "shares": "Shares of solids",
        "medians": "Medians",
        "paired": "Same names, side by side",
        "files": "Files",
    }
    jobs = [
        Job(
            key=key,
            title=titles[key],
            compute=partial(_given, finding),
            plots={"shares": plot_shares} if key == "shares" else {},
        )
        for key, finding in findings.items()
        # Tables without rows, such as pairs of a single generator, are left out.
        if finding.rows
    ]
    pages.run(jobs, out, fresh=True, quiet=True)
    title = f"Mesh validation of {folder.resolve().name}: {measured} meshes"
    return pages.write_page(
        out / "index.html", title, words(header), jobs, findings, extra=_tiles(worst, images)
    )


# `rows` are those of one generator.
def _sentence(rows: Sequence[dict]) -> str:
    """List the share of each demand with its interval."""
    return "; ".join(
        f"{row['demand']} {row['share']:.0%} ({row['lo']:.0%} to {row['hi']:.0%})" for row in rows
    )


def plot_shares(data: Mapping):
    """Plot the shares with their intervals: one line for every demand, one colour for every generator."""
    rows = data["rows"]
    # in the order of the rows
    demands, generators = (list(dict.fromkeys(row[key] for row in rows)) for key in ("demand", "generator"))
    figure, axes = style.figure(size=(9.4, 0.9 + len(demands) * (0.16 + 0.14 * len(generators))))
    for i, generator in enumerate(generators):
        generator_rows = [row for row in rows if row["generator"] == generator]
        y_positions = [
            # The generators of one demand are spread over 0.7 of the line, centred on its tick.
            demands.index(row["demand"]) + (i - (len(generators) - 1) / 2) * 0.7 / len(generators)
            for row in generator_rows
        ]
        # [2][points]: lower and upper error of each share
        ends = list(zip(*(style.errors(row, "share") for row in generator_rows), strict=True))
        axes.errorbar(
            [row["share"] for row in generator_rows],
            y_positions,
            xerr=[[end[0] for end in side] for side in ends],
            fmt="o",
            capsize=3,
            markersize=4,
            color=style.CYCLE[i % len(style.CYCLE)],
            label=f"{generator or '-'} ({generator_rows[0]['of']})",
        )
    axes.set(
        xlim=(-0.02, 1.02),
        xlabel="share of meshes, 95 % Wilson interval",
        yticks=range(len(demands)),
        yticklabels=demands,
    )
    axes.invert_yaxis()
    # Outside the axes, since shares may lie anywhere in them.
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _tiles(worst: Sequence[dict], images: Mapping[str, str]) -> str:
    """Return the section of the worst meshes as HTML, with the renders embedded."""
    tiles = []  # figures of the grid
    for row in worst:
        shown = html.escape(f"{row['generator']}: {row['file']}")
        # Without an image (the render failed) the tile stays, with an empty image.
        uri = f"data:image/png;base64,{images.get(row['file'], '')}"  # embedded: the page needs no other file
        facts = [f"{row['faces']:,} triangles", f"{row['parts']} parts"]
        facts += [f"{row['open_edges']:,} open edges"] if row["open_edges"] else []
        facts += [f"{row['nonmanifold_edges']:,} shared edges"] if row["nonmanifold_edges"] else []
        facts += [
            f"{row[name]:.1%} {word}"
            for name, word in (("hidden", "hidden"), ("crossing", "of faces cross"))
            if row[name] > 0.0005
            # Smaller shares would be printed as 0.0 %.
        ]
        facts += [f"{row['stands']} ({row['tip']:.0f}°)"]
        tiles.append(
            f'<figure style="margin:0"><img alt="{shown}" src="{uri}"'
            ' style="width:100%;max-width:192px"><figcaption class="soft" '
            f'style="overflow-wrap:anywhere"><b>{shown}</b><br>'
            f"{html.escape(', '.join(facts))}</figcaption></figure>"
        )
    intro = "The meshes that fail the most demands come first. Outsides are grey, insides are orange."
    return (
        f'<section id="worst"><h2>The worst</h2><p class="soft">{intro}</p><div'
        f' style="{_TILE}">{"".join(tiles)}</div></section>'
    )
