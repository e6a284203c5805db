"""Film a generator: the camera swings about each sample while the latent walks through the seeds.

Writes interpolation.mp4, or with --interpolate=False one SEED.mp4 per seed in which the latent stands still. The frames are
keyframes x --w-frames; a keyframe is a seed of one cell of the grid.

\b
Example:
    python tools/gen_videos.py --seeds=0-3 --grid=2x2 --trunc=0.7 --w-frames=60 --outdir=out
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eg3d_rlhf.cli import GroupedCommand, choose_device, naming, option  # noqa: E402
from eg3d_rlhf.field import RenderOptions  # noqa: E402
from eg3d_rlhf.generators import load_generator  # noqa: E402
from eg3d_rlhf.media.rendering import CAMERAS, MODES, cameras_of  # noqa: E402
from eg3d_rlhf.media.sampling import StageBar, parse_seeds, sampling_flags  # noqa: E402
from eg3d_rlhf.media.video import Film, FilmOptions, check_mp4, write_mp4  # noqa: E402
from eg3d_rlhf.sigma.mesh_export import BORDER, MeshOptions, save_shape, shape_suffix  # noqa: E402


def parse_grid(text: str) -> tuple[int, int]:
    """'4x3' -> (4, 3): cells across and down.

    Raises: ValueError for anything else.
    """
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"expected WxH such as 4x3, got {text!r}. Give cells across and down.")
    return int(width), int(height)


def write_shapes(folder: Path, film: Film, suffix: str, surface: MeshOptions) -> None:
    """The shape of every frame, of the grid's first cell."""
    for index in tqdm(range(film.count), unit="shape", desc=f"{folder.name}/"):
        with StageBar(f"frame {index} ") as bar:
            field = film.generator.field(film.ws(index)[0], film.options.noise_mode)
            save_shape(folder / f"{index:04d}_shape{suffix}", field, surface, bar)


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
        options = FilmOptions(grid=parse_grid(grid), **film)
    with naming("--shape-format"):
        suffix = shape_suffix(shape_format)
    if reload_modules is not None:
        click.echo("Warning: --reload_modules has no effect here, as in EG3D.", err=True)
    groups = {"interpolation": numbers} if interpolate else {str(seed): [seed] for seed in numbers}
    if not interpolate and options.keyframes is None:
        options = FilmOptions(**{**asdict(options), "keyframes": 1})
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
    cameras, look = cameras_of(generator, **CAMERAS.get(cfg, {})), RenderOptions(resolution=nrr, sample_mult=sample_mult)
    for name, group in groups.items():
        frames = Film(generator, group, cameras, options, look)
        path = write_mp4(outdir / f"{name}.mp4", tqdm(frames, total=frames.count, unit="frame", desc=f"{name}.mp4"), fps, bitrate)
        click.echo(f"{path}: {frames.count} frames")
        if shapes:
            write_shapes(outdir / f"{name}_shapes", frames, suffix, MeshOptions(resolution=shape_res, border=BORDER, component="all"))


if __name__ == "__main__":
    main()
