"""The command `check-assets`: how many meshes of a folder are solids."""

import functools
import os
import re
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, aligned, naming, option
from eg3d_rlhf.measures.meshes.settings import MOST_TOLERANCE, TOLERANCE, UPS, MeasureOptions
from eg3d_rlhf.modes.shared_flags import FOLDER, count_option
from training.progress import tqdm

_measures_option = functools.partial(option, group="Measures")


@click.command("check-assets", cls=GroupedCommand, job="check-assets")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, exists=True, file_okay=False))
@option(
    "--by",
    metavar="REGEX",
    show_default="first folder below FOLDER",
    help="Whose a file is: what this finds in its path below FOLDER, its first group if it has one.",
)
@_measures_option(
    "--weld",
    metavar="FLOAT",
    type=click.FloatRange(0, MOST_TOLERANCE, min_open=True),
    default=TOLERANCE,
    help="Corners nearer than this share of the longest edge are one.",
)
@_measures_option(
    "--up", type=click.Choice(UPS), default="y", help="Axis that points up: y in glTF, z in most STL."
)
@_measures_option(
    "--samples",
    metavar="INT",
    type=click.IntRange(100),
    default=MeasureOptions.samples,
    help="Points on each surface that see what is hidden, buried and thin.",
)
@_measures_option(
    "--thin",
    metavar="FLOAT",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=MeasureOptions.thin,
    help="Walls below this share of the longest edge are thin.",
)
@_measures_option(
    "--leak",
    metavar="FLOAT",
    type=click.FloatRange(0, 0.25),
    default=MeasureOptions.leak,
    help="Hollows behind holes that a ball of this radius does not pass are inner ones, in longest edges.",
)
@_measures_option("--hull-mass", is_flag=True, help="Stand by the convex hull's centre of mass, as DSO does.")
@_measures_option("--seed", metavar="INT", type=click.IntRange(0), default=0, help="Of the samples.")
@count_option("--jobs", default=None, show_default="cores", help="Processes.")
@option(
    "--outdir",
    metavar="FOLDER",
    type=FOLDER,
    default=Path("mesh-validation"),
    help="Folder for index.html and data/*.csv, *.json.",
)
def main(
    folder: Path, by: str | None, weld: float, up: str, jobs: int | None, outdir: Path, **options
) -> None:
    """How many meshes (GLB, OBJ, PLY, STL) of each generator in FOLDER are solids: closed, manifold, one
    body, with walls, standing.

    \b
    Example:
        eg3d-rlhf check-assets assets --outdir=runs/mesh-validation
    """
    from eg3d_rlhf.evaluation.mesh_validation import (
        HIDDEN,
        WALL,
        WORST,
        answers,
        badness,
        found_files,
        generator_of,
        medians,
        paired,
        shares,
    )
    from eg3d_rlhf.evaluation.mesh_validation_page import write_census
    from eg3d_rlhf.measures.meshes.space import solid_library

    solid_library("igl"), solid_library("manifold3d")
    try:
        re.compile(by or "")
    except re.error as error:
        raise ValueError(f"--by: expected a regular expression, got {by!r}: {error}. Correct it.") from None
    if outdir.exists() and any(outdir.iterdir()) and not (outdir / "index.html").is_file():
        raise ValueError(
            f"--outdir: expected a new folder, or one of an earlier validation, got {outdir}. Choose another."
        )
    settings = MeasureOptions(**options)
    with naming("FOLDER"):
        files = found_files(folder)
    request = {"weld": weld, "up": up, "options": asdict(settings)}
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    rows: list[dict] = [{} for _ in files]
    with tqdm(total=len(files), desc="measured", unit="file", dynamic_ncols=True) as bar:
        for number, answer in answers(
            [{**request, "do": "measure", "path": str(path)} for path in files], jobs
        ):
            path = files[number]
            name = {"file": path.relative_to(folder).as_posix(), "generator": generator_of(path, folder, by)}
            rows[number] = {**name, "reason": answer.pop("reason", ""), **answer}
            bar.update()
    measured = [row for row in rows if not row["reason"]]
    if not measured:
        raise ValueError(
            f"FOLDER: expected a mesh that can be read, got {len(rows)} others; the first: {rows[0]['file']}:"
            f" {rows[0]['reason']}. Export GLB, OBJ, PLY or STL."
        )
    worst = sorted(measured, key=lambda row: (-badness(row), row["file"]))[:WORST]
    asked = [{**request, "do": "picture", "path": str(folder / row["file"])} for row in worst]
    pictures = {worst[number]["file"]: answer.get("picture", "") for number, answer in answers(asked, jobs)}
    header = {"weld": weld, "up": up, **asdict(settings), "hidden": HIDDEN, "wall": WALL}
    found = shares(rows)
    page = write_census(
        outdir,
        folder,
        header,
        rows,
        {"shares": found, "medians": medians(rows), "paired": paired(rows)},
        worst,
        pictures,
    )
    click.echo(
        aligned(
            [
                ("generator", "demand", "share", "95 %"),
                *(
                    (
                        row["generator"],
                        row["demand"],
                        f"{row['count']} of {row['of']}",
                        f"{row['lo']:.0%} to {row['hi']:.0%}",
                    )
                    for row in found
                ),
            ]
        )
    )
    refused = [row for row in rows if row["reason"]]
    for row in refused[:5]:
        click.echo(f"not measured: {row['file']}: {row['reason']}")
    click.echo(f"{len(measured)} measured, {len(refused)} not; {page}")
