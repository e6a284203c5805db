"""Turn one sample of a generator into a closed triangle mesh, and check it.

Writes FILE (.ply, .obj or .glb) and, beside it, a report FILE.json. Exit code 1 where the mesh is not watertight.

\b
Example:
    python tools/export_mesh.py --seed=1 --trunc=0.7 --resolution=128 --out=out/head.glb
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.experiments.media.rendering import StageBar
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.geometry.mesh_export import MeshOptions, check_mesh_suffix, export_mesh

DEFAULTS = MeshOptions()


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Mesh to write (.ply, .obj, .glb).")
@option("--network", metavar="PATH", type=click.Path(path_type=Path), default=None, show_default="the bundled generator",
        help="Generator file or run folder to sample.", group="Sample")
@option("--seed", metavar="INT", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of the latent.", group="Sample")
@option("--trunc", "--psi", "psi", metavar="FLOAT", type=click.FloatRange(min=0), default=1.0, help="Truncation psi.", group="Sample")
@option("--trunc-cutoff", "--cutoff", "cutoff", metavar="INT", type=click.IntRange(min=0), default=14, group="Sample",
        help="ws that truncation reaches.")
@option("--noise-mode", metavar="NAME", type=click.Choice(["const", "random", "none"]), default="const", group="Sample",
        help="Noise of the synthesis.")
@option("--resolution", "--shape-res", "resolution", metavar="POINTS", type=click.IntRange(16, 1024), default=DEFAULTS.resolution,
        help="Grid points per axis.", group="Surface")
@option("--level", metavar="FLOAT", type=float, default=None, show_default="the generator's own", help="Raw density of the surface.",
        group="Surface")
@option("--border", metavar="0..0.5", type=click.FloatRange(0, 0.5, max_open=True), default=DEFAULTS.border, group="Surface",
        help="Share of the cube to trim from each face.")
@option("--component", metavar="NAME", type=click.Choice(["largest", "all"]), default=DEFAULTS.component, group="Surface",
        help="Parts to keep: the one of largest volume, or all.")
@option("--faces", metavar="INT", type=click.IntRange(min=4), default=None, help="Decimate to about so many faces.", group="Surface",
        show_default="all")
@option("--colors/--no-colors", default=DEFAULTS.colors, help="Vertex colours from the radiance field.", group="Surface")
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(out: Path, network: Path | None, seed: int, psi: float, cutoff: int, noise_mode: str, device: str, dry_run: bool, **settings):
    options = MeshOptions(**settings)
    with naming("--out"):
        check_mesh_suffix(out, "export_mesh")
    latent = {"seed": seed, "trunc": psi, "trunc_cutoff": cutoff, "noise_mode": noise_mode}
    if dry_run:
        given = {"out": str(out), "network": str(network or "bundled"), **latent, "device": device, **asdict(options)}
        click.echo(json.dumps(given, indent=1))
        return
    with naming("--network"):
        generator = load_generator(network, choose_device(device))
    with StageBar() as bar:
        bar("planes", 0, 1)
        field = generator.generator.field(ws_of_seeds(generator.generator, [seed], psi, cutoff), noise_mode)
        bar("planes", 1, 1)
        options = options if options.level is not None else replace(options, level=field.level)
        mesh, report = export_mesh(field, options, bar)
        bar("writing", 0, 1)
        mesh.save(out)
        bar("writing", 1, 1)
    report.write(out.with_name(out.name + ".json"), network=generator.hash, **latent, options=asdict(options))
    parts = f"{report.components} of {report.components_extracted} parts"
    tight = "watertight" if report.watertight else f"NOT watertight ({report.open_edges} open, {report.shared_edges} shared half-edges)"
    normals = "normals outward" if report.outward else "normals NOT outward"
    click.echo(f"{out}: {report.vertices} vertices, {report.faces} faces, {parts}, {tight}, {normals}, volume {report.volume:.4g}")
    if not report.watertight:
        sys.exit(1)


if __name__ == "__main__":
    main()
