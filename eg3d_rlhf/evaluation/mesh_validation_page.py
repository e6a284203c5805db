"""Write the page of a mesh validation: shares and medians of each generator, paired files, and worst meshes.

The page also offers the rows of all files as CSV and JSON.
"""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import Facts, Finding, Job

_TILE = "display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px"
REASONS = 12  # largest number of unmeasured files that the page lists with their reason


def describe_thresholds(threshold_by_name: Mapping) -> str:
    """Return the text at the top of the page, which describes the tolerances and thresholds.

    Args: threshold_by_name: tolerance and thresholds, as the page's data hold them; a dict from names to
        values.
    """
    # the body whose centre of mass decides if the mesh stands
    mass_text = "its convex hull" if threshold_by_name["hull_mass"] else "the body itself"
    return (
        "Lengths are shares of the longest edge of the bounding box. Vertices within"
        f" {threshold_by_name['weld']:g} are merged; {threshold_by_name['up']} is up;"
        f" {threshold_by_name['samples']:,} points per mesh with {threshold_by_name['rays']} rays each, seed"
        f" {threshold_by_name['seed']}. A part of the surface is hidden if no ray from either of its sides"
        f" leaves the mesh; 'nothing hidden' allows {threshold_by_name['hidden']:.0%} of the area. 'Thick"
        f" walls': 99 % of the area is at least {threshold_by_name['wall']:g} thick; walls below"
        f" {threshold_by_name['thin']:g} are thin. A hollow counts as inner if it opens only through holes"
        f" of radius {threshold_by_name['leak']:g} or less. 'Stands': the mesh can be tilted by 3 degrees or"
        f" more and does not fall, by the mass of {mass_text}. 'No crossing': no edge passes through a face"
        " that it does not touch."
    )


def _given(finding: Finding, _comparison: object) -> Finding:
    """Return a finding that is already computed, since `pages.run` needs a function that computes it."""
    return finding


def write_validation_page(
    page_folder: Path,
    folder: Path,
    threshold_by_name: Mapping,
    file_rows: Sequence[dict],
    tables: Mapping[str, list[dict]],
    worst_rows: Sequence[dict],
    render_by_file: Mapping[str, Mapping[str, str]],
) -> Path:
    """Write index.html, and its data as JSON and CSV files in the folder data, into `page_folder`.

    Args:
        page_folder: folder of the page.
        folder: folder of the meshes.
        threshold_by_name: tolerance and thresholds by name, see `describe_thresholds`.
        file_rows: rows of all files.
        tables: tables by name: 'shares', 'medians' and 'paired'.
        worst_rows: rows of the worst meshes, the worst first.
        render_by_file: answers of the workers by file name: {"render": PNG in base64}, or {"reason": text}.

    Returns: the path of the page.
    """
    measured_count = sum(not file_row["reason"] for file_row in file_rows)  # number of files
    unmeasured_rows = [file_row for file_row in file_rows if file_row["reason"]]
    # All sections state the same number of measured meshes.
    facts: dict[str, Any] = {"n": measured_count, "unit": "meshes"}
    # generators of which at least one file was measured
    generators = sorted({file_row["generator"] for file_row in file_rows if not file_row["reason"]})
    finding_by_key = {
        "shares": Finding(
            facts=Facts(**facts, interval="95 % Wilson intervals"),
            data={"rows": tables["shares"]},
            rows=tables["shares"],
            says=[
                f"{generator}:"
                f" {_sentence([row for row in tables['shares'] if row['generator'] == generator])}"
                for generator in generators
            ],
        ),
        "medians": Finding(
            facts=Facts(**facts, interval="95 % percentile bootstrap over files"),
            data={},
            rows=tables["medians"],
        ),
        "paired": Finding(
            facts=Facts(
                # The table has a row for each pair of generators and each of the eight requirements, so every
                # eighth row belongs to another pair of generators.
                n=sum(table_row["pairs"] for table_row in tables["paired"][::8]),
                unit="pairs of files of one name",
                interval="McNemar, exact",
            ),
            data={},
            rows=tables["paired"],
        ),
        "files": Finding(
            facts=Facts(**facts),
            data={"header": dict(threshold_by_name)},
            rows=file_rows,
            says=[
                (
                    f"{len(unmeasured_rows)} of {len(file_rows)} files were not measured."
                    if unmeasured_rows
                    else "All files were measured."
                ),
                *(f"{file_row['file']}: {file_row['reason']}" for file_row in unmeasured_rows[:REASONS]),
                *(
                    [f"{len(unmeasured_rows) - REASONS} more; the files below hold the reasons of all."]
                    if len(unmeasured_rows) > REASONS
                    else []
                ),
            ],
        ),
    }
    title_by_key = {
        "shares": "Shares of meshes that meet each requirement",
        "medians": "Medians",
        "paired": "Pairs of files of the same name",
        "files": "Files",
    }
    jobs = [
        Job(
            key=key,
            title=title_by_key[key],
            compute=partial(_given, finding),
            plots={"shares": plot_shares} if key == "shares" else {},
        )
        for key, finding in finding_by_key.items()
        # Tables without rows are left out, for example the pairs if there is only one generator.
        if finding.rows
    ]
    pages.run(jobs, page_folder, recompute=True, quiet=True)
    page_title = f"Mesh validation of {folder.resolve().name}: {measured_count} meshes"
    return pages.write_page(
        page_folder / "index.html",
        page_title,
        describe_thresholds(threshold_by_name),
        jobs,
        finding_by_key,
        extra_html=_tiles(worst_rows, render_by_file),
    )


def _sentence(share_rows: Sequence[dict]) -> str:
    """Return a text with the share of each requirement and its interval.

    Args: share_rows: shares of one generator, rows of `mesh_validation.shares`.
    """
    return "; ".join(
        f"{share_row['demand']} {share_row['share']:.0%} ({share_row['lo']:.0%} to {share_row['hi']:.0%})"
        for share_row in share_rows
    )


def plot_shares(finding_data: Mapping):
    """Plot the shares with their intervals: a row for every requirement, a colour for every generator.

    Args: finding_data: dict whose entry "rows" is the result of `mesh_validation.shares`.
    """
    share_rows = finding_data["rows"]
    # in the order of the rows
    requirements, generators = (
        list(dict.fromkeys(share_row[column_key] for share_row in share_rows))
        for column_key in ("demand", "generator")
    )
    figure, axes = style.figure(size=(9.4, 0.9 + len(requirements) * (0.16 + 0.14 * len(generators))))
    for generator_index, generator in enumerate(generators):
        generator_rows = [share_row for share_row in share_rows if share_row["generator"] == generator]
        y_positions = [
            # The generators of one requirement are spread over 0.7 of the row, centred on its tick.
            requirements.index(share_row["demand"])
            + (generator_index - (len(generators) - 1) / 2) * 0.7 / len(generators)
            for share_row in generator_rows
        ]
        # style.errors returns [[lower error], [upper error]] of each share; zip sorts them by side.
        errors_by_side = list(
            zip(*(style.errors(share_row, "share") for share_row in generator_rows), strict=True)
        )
        axes.errorbar(
            [share_row["share"] for share_row in generator_rows],
            y_positions,
            xerr=[[point_errors[0] for point_errors in side_errors] for side_errors in errors_by_side],
            fmt="o",
            capsize=3,
            markersize=4,
            color=style.CYCLE[generator_index % len(style.CYCLE)],
            label=f"{generator or '-'} ({generator_rows[0]['of']})",
        )
    axes.set(
        xlim=(-0.02, 1.02),
        xlabel="share of meshes, 95 % Wilson interval",
        yticks=range(len(requirements)),
        yticklabels=requirements,
    )
    axes.invert_yaxis()
    # The legend is outside the axes, since points may lie anywhere in them.
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _tiles(worst_rows: Sequence[dict], render_by_file: Mapping[str, Mapping[str, str]]) -> str:
    """Return the HTML section of the worst meshes, with their renders embedded."""
    tile_htmls = []  # one figure for each mesh
    for mesh_row in worst_rows:
        tile_title = html.escape(f"{mesh_row['generator']}: {mesh_row['file']}")
        answer = render_by_file[mesh_row["file"]]
        # The image is embedded, so that the page needs no other file. A tile without one states the reason.
        image_html = (
            f'<img alt="{tile_title}" src="data:image/png;base64,{answer["render"]}"'
            ' style="width:100%;max-width:192px">'
            if "render" in answer
            else f"<p>not rendered: {html.escape(answer['reason'])}</p>"
        )
        property_texts = [f"{mesh_row['faces']:,} triangles", f"{mesh_row['parts']} parts"]
        property_texts += [f"{mesh_row['open_edges']:,} open edges"] if mesh_row["open_edges"] else []
        property_texts += (
            [f"{mesh_row['nonmanifold_edges']:,} shared edges"] if mesh_row["nonmanifold_edges"] else []
        )
        property_texts += [
            f"{mesh_row[measure_name]:.1%} {description}"
            for measure_name, description in (("hidden", "hidden"), ("crossing", "of faces cross"))
            if mesh_row[measure_name] > 0.0005  # smaller shares would be printed as 0.0 %
        ]
        property_texts += [f"{mesh_row['stands']} ({mesh_row['tip']:.0f}°)"]
        tile_htmls.append(
            f'<figure style="margin:0">{image_html}<figcaption class="soft" style="overflow-wrap:anywhere">'
            f"<b>{tile_title}</b><br>"
            f"{html.escape(', '.join(property_texts))}</figcaption></figure>"
        )
    introduction = (
        "The meshes that fail the most requirements come first. Outsides are grey, insides are orange."
    )
    return (
        f'<section id="worst"><h2>The worst meshes</h2><p class="soft">{introduction}</p><div'
        f' style="{_TILE}">{"".join(tile_htmls)}</div></section>'
    )
