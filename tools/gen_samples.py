"""Render samples of a generator: three views per seed side by side, and their shapes on request.

Writes seedXXXX.png into the output folder, seen from yaw +0.4, 0 and -0.4 at pitch -0.2; --shapes adds seedXXXX.ply (.obj, .glb, .mrc).

\b
Example:
    python tools/gen_samples.py --seeds=0,2-5 --trunc=0.7 --outdir=out
"""

import json

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.experiments.media.rendering import (
    FFHQ_FOV,
    StageBar,
    camera,
    cameras_of,
    conditioned_ws,
    parse_seeds,
    png,
    render,
    sampling_flags,
    tile,
)
from eg3d_rlhf.generators import check_seeds, load_generator
from eg3d_rlhf.geometry.mesh_export import MeshOptions, save_shape, shape_suffix
from training.storage import write_atomic

YAWS, PITCH = (0.4, 0.0, -0.4), -0.2  # radians


@click.command(cls=GroupedCommand, help=__doc__)
@sampling_flags
@option("--fov-deg", metavar="DEGREES", type=click.FloatRange(0, 180, min_open=True, max_open=True), default=FFHQ_FOV, group="Samples",
        help="Field of view over the image's diagonal; the default of EG3D's tool is 18.")
@option("--shapes", metavar="BOOL", type=bool, default=False, help="Write shapes too.", group="Shapes")
@option("--shape-res", metavar="POINTS", type=click.IntRange(16, 1024), default=512, help="Grid points per axis.", group="Shapes")
@option("--shape-format", metavar="NAME", default=".mrc", help=".mrc (density), .ply, .obj or .glb (surface).", group="Shapes")
@option("--shape-level", metavar="FLOAT", type=float, default=None, show_default="the generator's own", group="Shapes",
        help="Raw density of the surface.")
@option("--shape-border", metavar="0..0.5", type=click.FloatRange(0, 0.5, max_open=True), default=None, group="Shapes",
        show_default="the generator's, 30/256 of EG3D's", help="Share of the cube to clear along each face.")
@option("--class", "class_idx", metavar="INT", type=int, default=None, show_default=False, help="Accepted, without effect.")
@option("--reload_modules", "reload_modules", metavar="BOOL", type=bool, default=None, show_default=False, help="Accepted, without effect.")
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(outdir, network, seeds, psi, cutoff, noise_mode, fov_deg, shapes, shape_res, shape_format, shape_level, shape_border, class_idx,
         reload_modules, device, dry_run):
    with naming("--seeds"):
        numbers = parse_seeds(seeds)
    with naming("--shape-format"):
        suffix = shape_suffix(shape_format)
    for flag, value in (("class", class_idx), ("reload_modules", reload_modules)):
        if value is not None:
            click.echo(f"Warning: --{flag} has no effect here, as in EG3D for these networks.", err=True)
    if dry_run:
        settings = {
            "outdir": str(outdir), "network": str(network or "bundled"), "seeds": numbers, "trunc": psi, "trunc_cutoff": cutoff,
            "noise_mode": noise_mode, "fov_deg": fov_deg, "shapes": shapes, "shape_res": shape_res, "shape_format": suffix,
            "shape_level": shape_level, "shape_border": shape_border, "device": device,
        }
        click.echo(json.dumps(settings, indent=1))
        return
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    border = generator.bounds.border if shape_border is None else shape_border
    surface = MeshOptions(resolution=shape_res, level=shape_level, border=border, component="all")
    check_seeds(generator, max(numbers), "--seeds")
    cameras = cameras_of(generator, fov_deg)
    labels = [camera(cameras, yaw, PITCH) for yaw in YAWS]
    for seed in tqdm(numbers, unit="seed", desc="samples"):
        ws = conditioned_ws(generator, [seed], cameras, psi, cutoff)
        write_atomic(outdir / f"seed{seed:04d}.png", png(tile(render(generator, ws, labels, seed, noise_mode), len(labels))))
        if shapes:
            with StageBar(f"seed {seed} ") as bar:
                save_shape(outdir / f"seed{seed:04d}{suffix}", generator.field(ws, noise_mode), surface, bar)
    click.echo(f"{outdir}: {len(numbers)} images{f' and {suffix} shapes' if shapes else ''}")


if __name__ == "__main__":
    main()
