"""The job `check-assets`, which counts the meshes of a folder that are closed, manifold, standing solids."""

import functools
import os
import re
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, aligned, option, prefix_errors
from eg3d_rlhf.measures.meshes.settings import MAX_TOLERANCE, TOLERANCE, UPS, MeasureOptions
from eg3d_rlhf.modes.shared_flags import FOLDER, count_option
from training.progress import tqdm

_measures_option = functools.partial(option, group="Measures")


@click.command("check-assets", cls=GroupedCommand, job="check-assets")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, exists=True, file_okay=False))
@option(
    "--by",
    metavar="REGEX",
    show_default="the name of the first folder below FOLDER",
    help=(
        "Regular expression that finds the name of the generator in the path of a file below FOLDER; results"
        " are counted for each name. If the expression has a group, the text of the first group is the name."
    ),
)
@_measures_option(
    # Tolerances of the measures are relative to the bounding box, so that the scale does not matter.
    "--weld",
    metavar="FLOAT",
    type=click.FloatRange(0, MAX_TOLERANCE, min_open=True),
    default=TOLERANCE,
    help=(
        "Side of a grid cell, as a share of the bounding box's longest edge. All vertices in the same cell"
        " are merged into one. A larger value closes wider cracks."
    ),
)
@_measures_option(
    # STL files do not state which axis points up.
    "--up",
    type=click.Choice(UPS),
    default="y",
    help="Axis that points up: y in glTF, z in most STL files.",
)
@_measures_option(
    "--samples",
    metavar="INT",
    type=click.IntRange(100),
    default=MeasureOptions.samples,
    help="Number of random points on each mesh at which hidden, buried and thin parts are detected.",
)
@_measures_option(
    "--thin",
    metavar="FLOAT",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=MeasureOptions.thin,
    help="Thickness below which a wall counts as thin, as a share of the bounding box's longest edge.",
)
@_measures_option(
    "--leak",
    metavar="FLOAT",
    type=click.FloatRange(0, 0.25),
    default=MeasureOptions.leak,
    help=(
        "Radius of a ball, as a share of the bounding box's longest edge. A cavity counts as enclosed if the"
        " ball cannot pass through its openings."
    ),
)
@_measures_option(
    "--hull-mass",
    is_flag=True,
    help=(
        "Use the centre of mass of the convex hull to test whether a mesh stands, as the paper DSO does,"
        " instead of the centre of mass of the mesh itself."
    ),
)
@_measures_option(
    "--seed", metavar="INT", type=click.IntRange(0), default=0, help="Random seed of the surface points."
)
@count_option(
    "--jobs", default=None, show_default="one per core", help="Number of processes that measure meshes."
)
@option(
    "--outdir",
    metavar="FOLDER",
    type=FOLDER,
    default=Path("mesh-validation"),
    help="Folder to write into; it contains the page index.html, and its tables in data/ as CSV and JSON.",
)
def main(
    folder: Path, by: str | None, weld: float, up: str, jobs: int | None, outdir: Path, **options
) -> None:
    """Count the meshes (GLB, OBJ, PLY, STL) in FOLDER that are valid solids, for each generator that made
    them. A valid solid is closed, manifold and in one piece, has walls of printable thickness, and stands.

    \b
    Example:
        eg3d-rlhf check-assets assets --outdir=runs/mesh-validation
    """
    try:
        re.compile(by or "")
    except re.error as error:
        raise ValueError(
            f"--by: {by!r} is not a valid regular expression: {error}. Use the syntax of Python's module re."
        ) from None
    # index.html marks the folder of an earlier validation. A folder with other files is never overwritten.
    if outdir.exists() and any(outdir.iterdir()) and not (outdir / "index.html").is_file():
        raise ValueError(
            f"--outdir: {outdir} contains files that no mesh validation wrote. Name a new folder, or the"
            " folder of an earlier validation."
        )

    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.mesh_validation import (
        HIDDEN,
        WALL,
        WORST,
        answer_requests,
        badness,
        find_mesh_files,
        generator_name,
        medians,
        paired,
        shares,
    )
    from eg3d_rlhf.evaluation.mesh_validation_page import write_validation_page
    from eg3d_rlhf.measures.meshes.space import solid_library

    # Loaded here, so that the job fails before any mesh is read if an optional library is missing.
    solid_library("igl")
    solid_library("manifold3d")
    measure_settings = MeasureOptions(**options)
    # an error in this block begins with the name FOLDER
    with prefix_errors("FOLDER"):
        # also in subfolders, in a fixed order
        mesh_files = find_mesh_files(folder)
    # These settings are sent to the measuring processes with the path of each file.
    shared_request = {"weld": weld, "up": up, "options": asdict(measure_settings)}
    # the affinity mask counts the cores this process may use, also in a container; not all systems have it
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # answers come in the order in which processes finish, so rows are stored by number
    mesh_rows: list[dict] = [{} for _ in mesh_files]
    with tqdm(total=len(mesh_files), desc="measured", unit="file", dynamic_ncols=True) as progress_bar:
        for file_index, mesh_measures in answer_requests(
            # "do" selects the work of the process: measuring a file, or rendering it
            [{**shared_request, "do": "measure", "path": str(mesh_path)} for mesh_path in mesh_files],
            jobs,
        ):
            mesh_path = mesh_files[file_index]
            file_and_generator = {
                "file": mesh_path.relative_to(folder).as_posix(),
                "generator": generator_name(mesh_path, folder, by),
            }
            # a mesh that cannot be read has a reason instead of measures
            mesh_rows[file_index] = {
                **file_and_generator,
                "reason": mesh_measures.pop("reason", ""),
                **mesh_measures,
            }
            progress_bar.update()
    # A row with a reason could not be measured.
    measured_rows = [mesh_row for mesh_row in mesh_rows if not mesh_row["reason"]]
    if not measured_rows:
        raise ValueError(
            f"FOLDER: none of the {len(mesh_rows)} files can be read as a mesh. The first is"
            f" {mesh_rows[0]['file']}: {mesh_rows[0]['reason'].rstrip('.')}. Correct these files, or pass"
            " another FOLDER."
        )
    # the worst meshes are rendered for the page; the file's name breaks ties, so that the order is fixed
    worst_rows = sorted(measured_rows, key=lambda mesh_row: (-badness(mesh_row), mesh_row["file"]))[:WORST]
    render_requests = [
        {**shared_request, "do": "render", "path": str(folder / mesh_row["file"])} for mesh_row in worst_rows
    ]
    renders = {
        # a render, or the reason why there is none
        worst_rows[row_index]["file"]: render_answer
        for row_index, render_answer in answer_requests(render_requests, jobs)
    }
    # settings and thresholds that the page states beside the results
    page_settings = {"weld": weld, "up": up, **asdict(measure_settings), "hidden": HIDDEN, "wall": WALL}
    share_table = shares(mesh_rows)
    # the last three arguments are the tables of the page, the rows to show, and their renders
    page_path = write_validation_page(
        outdir,
        folder,
        page_settings,
        mesh_rows,
        {"shares": share_table, "medians": medians(mesh_rows), "paired": paired(mesh_rows)},
        worst_rows,
        renders,
    )
    click.echo(
        aligned(
            [
                ("generator", "criterion", "share", "95 % interval"),
                *(
                    (
                        share_row["generator"],
                        share_row["demand"],
                        f"{share_row['count']} of {share_row['of']}",
                        f"{share_row['lo']:.0%} to {share_row['hi']:.0%}",
                    )
                    for share_row in share_table
                ),
            ]
        )
    )
    unreadable_rows = [mesh_row for mesh_row in mesh_rows if mesh_row["reason"]]
    # five are enough to see the cause; the page lists more of them, and its data all
    for mesh_row in unreadable_rows[:5]:
        click.echo(f"not measured: {mesh_row['file']}: {mesh_row['reason']}")
    if len(unreadable_rows) > 5:
        click.echo(f"not measured: {len(unreadable_rows) - 5} more files, see the page")
    click.echo(f"{len(measured_rows)} meshes measured, {len(unreadable_rows)} not; {page_path}")
