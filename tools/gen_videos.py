"""Film a generator: the camera swings about each sample while the latent walks through the seeds.

Writes interpolation.mp4, or with --interpolate=False one SEED.mp4 per seed in which the latent stands still. The frames are
keyframes x --w-frames; a keyframe is a seed of one cell of the grid.

\b
Example:
    python tools/gen_videos.py --seeds=0-3 --grid=2x2 --trunc=0.7 --w-frames=60 --outdir=out
"""

import json
import re
from dataclasses import asdict, replace

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.experiments.media.rendering import CAMERAS, MODES, StageBar, cameras_of, parse_seeds, sampling_flags
from eg3d_rlhf.experiments.media.video import Film, FilmOptions, check_mp4, write_mp4
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.geometry.mesh_export import MeshOptions, save_shape, shape_suffix


@click.command(cls=GroupedCommand, help=__doc__)
@sampling_flags
@option("--interpolate", metavar="BOOL", type=bool, default=True, help="Walk through the seeds, or film each on its own.", group="Film")
@option("--grid", metavar="WxH", default="1x1", help="Cells across and down.", group="Film")
@option("--num-keyframes", "keyframes", metavar="INT", type=click.IntRange(min=1), default=None, show_default="seeds / cells",
        help="Latents that a cell walks through.", group="Film")
@option("--w-frames", "frames", metavar="INT", type=click.IntRange(min=1), default=120, help="Frames between two keyframes.", group="Film")
@option("--shuffle-seed", metavar="INT", type=click.IntRange(0, 2**32 - 1), default=None, show_default="as given", group="Film",
        help="Seed of the order of the seeds.")
@option("--image_mode", "--image-mode", "mode", metavar="NAME", type=click.Choice(MODES), default="image", group="Film",
        help="image, image_depth or image_raw.")
@option("--cfg", metavar="NAME", type=click.Choice(list(CAMERAS), case_sensitive=False), default=None, group="Film",
        show_default="the network's own camera", help="Pivot and field of view of FFHQ, AFHQ or Shapenet.")
@option("--sample_mult", "--sample-mult", "sample_mult", metavar="FLOAT", type=click.FloatRange(0, min_open=True), default=2.0,
        help="Times the samples per ray.", group="Film")
@option("--nrr", metavar="PIXELS", type=click.IntRange(min=1), default=None, show_default="the network's own", group="Film",
        help="Rendered pixels per edge.")
@option("--fps", metavar="FLOAT", type=click.FloatRange(1, 240), default=60.0, help="Frames per second.", group="Film")
@option("--bitrate", metavar="BITS", default="10M", help="Of the mp4, in ffmpeg's notation.", group="Film")
@option("--shapes", metavar="BOOL", type=bool, default=False, help="Write the shape of every frame too (first cell).", group="Shapes")
@option("--shape-res", metavar="POINTS", type=click.IntRange(16, 1024), default=512, help="Grid points per axis.", group="Shapes")
@option("--shape-format", metavar="NAME", default=".mrc", help=".mrc (density), .ply, .obj or .glb (surface).", group="Shapes")
@option("--reload_modules", "reload_modules", metavar="BOOL", type=bool, default=None, show_default=False, help="Accepted, without effect.")
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(outdir, network, seeds, interpolate, grid, cfg, sample_mult, nrr, fps, bitrate, shapes, shape_res, shape_format, reload_modules,
         device, dry_run, **film):
    with naming("--seeds"):
        numbers = parse_seeds(seeds)
    with naming("--grid"):
        cells = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", grid.lower())
        if cells is None:
            raise ValueError(f"expected WxH such as 4x3, got {grid!r}. Give cells across and down.")
        options = FilmOptions(grid=(int(cells[1]), int(cells[2])), **film)
    with naming("--shape-format"):
        suffix = shape_suffix(shape_format)
    if reload_modules is not None:
        click.echo("Warning: --reload_modules has no effect here, as in EG3D.", err=True)
    groups = {"interpolation": numbers} if interpolate else {str(seed): [seed] for seed in numbers}
    if not interpolate and options.keyframes is None:
        options = replace(options, keyframes=1)
    with naming("--seeds"):
        counts = {name: len(options.cells(group)[0]) * options.frames for name, group in groups.items()}
    if dry_run:
        settings = {
            "outdir": str(outdir), "network": str(network or "bundled"), "films": {f"{name}.mp4": n for name, n in counts.items()},
            "interpolate": interpolate, **asdict(options), "cfg": cfg, "sample_mult": sample_mult, "nrr": nrr, "fps": fps,
            "bitrate": bitrate, "shapes": shapes, "shape_res": shape_res, "shape_format": suffix, "device": device,
        }
        click.echo(json.dumps(settings, indent=1))
        return
    check_mp4(outdir / "interpolation.mp4")
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    surface = MeshOptions(resolution=shape_res, border=generator.bounds.border, component="all")
    cameras, look = cameras_of(generator, **CAMERAS.get(cfg, {})), RenderOptions(resolution=nrr, sample_mult=sample_mult)
    for name, group in groups.items():
        frames = Film(generator, group, cameras, options, look)
        path = write_mp4(outdir / f"{name}.mp4", tqdm(frames, total=frames.count, unit="frame", desc=f"{name}.mp4"), fps, bitrate)
        click.echo(f"{path}: {frames.count} frames")
        for index in tqdm(range(frames.count if shapes else 0), unit="shape", desc=f"{name}_shapes/", disable=not shapes):  # first cell
            with StageBar(f"frame {index} ") as bar:
                shape = generator.field(frames.ws(index)[0], options.noise_mode)
                save_shape(outdir / f"{name}_shapes" / f"{index:04d}_shape{suffix}", shape, surface, bar)


if __name__ == "__main__":
    main()
