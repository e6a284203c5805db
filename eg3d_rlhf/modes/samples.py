"""Jobs that sample a generator: `samples images`, `videos`, `mesh` and `sheet`."""

import functools
import re
import sys
from dataclasses import asdict, replace

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option, together
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.experiments.media.settings import CAMERAS, FFHQ_FOV, MODES
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.modes.shared_flags import count_option, file_option, print_json, rare_option, shared
from training.config import NOISE_MODES
from training.progress import tqdm
from training.storage import write_atomic

# yaws and pitch of the three views, in radians
YAWS = (0.4, 0.0, -0.4)
PITCH = -0.2
SURFACE = MeshOptions()
_PSI = {"default": 1.0, "type": click.FloatRange(min=0)}
_sampling = together(
    shared(
        "outdir network latents psi",
        "cutoff",
        outdir={"required": True},
        latents={"required": True},
        psi=_PSI,
    ),
    rare_option(
        "--noise-mode",
        type=click.Choice(NOISE_MODES),
        default="const",
        help="Noise inputs of the synthesis; random noise depends on the (first) seed.",
    ),
)
_shapes_option = functools.partial(option, group="Shapes")
_film_option = functools.partial(option, group="Film")
_surface_option = functools.partial(option, group="Surface")
_samples_option = functools.partial(option, group="Samples")


def _shapes(rare: bool = False):
    """Return the flags of exported shapes. Args: rare: whether all but --shapes are rare settings."""
    return together(
        _shapes_option(
            "--shapes",
            metavar="BOOL",
            type=bool,
            default=False,
            help="Also write shapes; for a video, that of the first cell in every frame.",
        ),
        _shapes_option(
            "--shape-res",
            rare=rare,
            metavar="POINTS",
            type=click.IntRange(16, 1024),
            default=512,
            help="Grid points per axis for the shapes.",
        ),
        _shapes_option(
            "--shape-format",
            rare=rare,
            metavar="NAME",
            default=".mrc",
            help="File format: .mrc (density), .ply, .obj or .glb (surface).",
        ),
    )


@click.command("images", cls=GroupedCommand)
@_sampling
@_samples_option(
    "--fov-deg",
    metavar="DEGREES",
    type=click.FloatRange(0, 180, min_open=True, max_open=True),
    default=FFHQ_FOV,
    group="Samples",
    help="Field of view along the image's diagonal, in degrees; EG3D's tool uses 18.",
)
@_shapes()
@rare_option(
    "--shape-level", type=float, help="Raw density at the surface; by default that of the generator."
)
@rare_option(
    "--shape-border",
    type=click.FloatRange(0, 0.5, max_open=True),
    help="Share of the cube to clear along each face; by default that of the generator, 30/256 for EG3D's.",
)
@shared("device dry-run")
def images(outdir, network, latents, psi, cutoff, shape_format, device, dry_run, **look) -> None:
    """Render samples of a generator: three views per seed side by side, and their shapes on request.

    Writes seedXXXX.png into the output folder, seen from yaw +0.4, 0 and -0.4 at pitch -0.2; --shapes adds
    seedXXXX.ply (.obj, .glb, .mrc).

    \b
    Example:
        python tools/gen_samples.py --seeds=0,2-5 --trunc=0.7 --outdir=out
    """
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators import check_seeds, load_generator
    from eg3d_rlhf.geometry.mesh_export import save_shape, shape_suffix

    # the flag is called --seeds in EG3D's tool, --latents elsewhere; both spellings are accepted
    with naming("--seeds"):
        seeds = rendering.parse_seeds(latents)
    with naming("--shape-format"):
        suffix = shape_suffix(shape_format)
    if dry_run:
        settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "seeds": seeds,
            "trunc": psi,
            "trunc_cutoff": cutoff,
            **look,
            "shape_format": suffix,
            "device": device,
        }
        print_json(settings)
        return
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    # 0 is a valid border, so only None means the default
    border = generator.bounds.border if look["shape_border"] is None else look["shape_border"]
    surface = MeshOptions(
        resolution=look["shape_res"], level=look["shape_level"], border=border, component="all"
    )
    check_seeds(generator, max(seeds), "--seeds")
    cameras = rendering.cameras_of(generator, look["fov_deg"])
    # one camera label per view
    labels = [rendering.camera(cameras, yaw, PITCH) for yaw in YAWS]
    for seed in tqdm(seeds, unit="seed", desc="samples"):
        ws = rendering.conditioned_ws(generator, [seed], cameras, psi, cutoff)
        renders = rendering.render(generator, ws, labels, seed, look["noise_mode"])
        write_atomic(outdir / f"seed{seed:04d}.png", rendering.png(rendering.tile(renders, len(labels))))
        if look["shapes"]:
            with rendering.StageBar(f"seed {seed} ") as bar:
                field = generator.field(ws, look["noise_mode"])
                save_shape(outdir / f"seed{seed:04d}{suffix}", field, surface, bar)
    click.echo(f"{outdir}: {len(seeds)} images{f' and {suffix} shapes' if look['shapes'] else ''}")


@click.command("videos", cls=GroupedCommand)
@_sampling
@_film_option(
    "--interpolate",
    metavar="BOOL",
    type=bool,
    default=True,
    help="Interpolate between the seeds; with False, one video per seed.",
)
@_film_option("--grid", metavar="WxH", default="1x1", help="Cells of the video, horizontally x vertically.")
@rare_option(
    "--num-keyframes",
    "keyframes",
    type=click.IntRange(min=1),
    help="Latents that a cell interpolates between; by default seeds / cells.",
)
@count_option(
    "--w-frames", "frames", default=120, help="Number of frames between two keyframes.", group="Film"
)
@rare_option(
    "--shuffle-seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Random seed that shuffles the seeds; by default they keep their order.",
)
@_film_option(
    "--image_mode",
    "--image-mode",
    "mode",
    metavar="NAME",
    type=click.Choice(MODES),
    default="image",
    help="Output to show: image, image_depth or image_raw.",
)
@_film_option(
    "--cfg",
    metavar="NAME",
    type=click.Choice(list(CAMERAS), case_sensitive=False),
    default=None,
    group="Film",
    show_default="the network's own camera",
    help="Camera pivot and field of view of FFHQ, AFHQ or Shapenet.",
)
@rare_option(
    "--sample_mult",
    "--sample-mult",
    "sample_mult",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    help="Factor on the number of samples per ray.",
)
@rare_option(
    "--nrr",
    type=click.IntRange(min=1),
    help="Neural rendering resolution in pixels; by default that of the network.",
)
@rare_option("--fps", type=click.FloatRange(1, 240), default=60.0, help="Frames per second.")
@rare_option("--bitrate", default="10M", help="Bitrate of the mp4, in ffmpeg's notation.")
@_shapes(rare=True)
@shared("device dry-run")
def videos(
    outdir,
    network,
    latents,
    interpolate,
    grid,
    cfg,
    sample_mult,
    nrr,
    fps,
    bitrate,
    shapes,
    shape_res,
    shape_format,
    device,
    dry_run,
    **film,
) -> None:
    """Render videos of a generator: the camera swings around the samples while the latent moves between
    seeds.

    Writes interpolation.mp4, or with --interpolate=False one SEED.mp4 per seed with a fixed
    latent. The frames are keyframes x --w-frames; a keyframe is a seed of one cell of the grid.

    \b
    Example:
        python tools/gen_videos.py --seeds=0-3 --grid=2x2 --trunc=0.7 --w-frames=60 --outdir=out
    """
    from eg3d_rlhf.core.field import RenderOptions
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.experiments.media.video import Film, FilmOptions, check_mp4, write_mp4
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.geometry.mesh_export import save_shape, shape_suffix

    with naming("--seeds"):
        seeds = rendering.parse_seeds(latents)
    with naming("--grid"):
        # positive numbers, leading zeros allowed
        cells = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", grid.lower())
        if cells is None:
            raise ValueError(
                f"expected WxH, such as 4x3, got {grid!r}. Give the cells horizontally and vertically."
            )
        options = FilmOptions(grid=(int(cells[1]), int(cells[2])), **film)
    with naming("--shape-format"):
        suffix = shape_suffix(shape_format)
    # name of the video -> its seeds
    groups = {"interpolation": seeds} if interpolate else {str(seed): [seed] for seed in seeds}
    # the latent is fixed, so one keyframe a seed is enough
    if not interpolate and options.keyframes is None:
        options = replace(options, keyframes=1)
    with naming("--seeds"):
        counts = {name: len(options.cells(group)[0]) * options.frames for name, group in groups.items()}
    if dry_run:
        settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "films": {f"{name}.mp4": n for name, n in counts.items()},
            "interpolate": interpolate,
            **asdict(options),
            "cfg": cfg,
            "sample_mult": sample_mult,
            "nrr": nrr,
            "fps": fps,
            "bitrate": bitrate,
            "shapes": shapes,
            "shape_res": shape_res,
            "shape_format": suffix,
            "device": device,
        }
        print_json(settings)
        return
    # fails before the generator is loaded if the video encoder is missing
    check_mp4(outdir / "interpolation.mp4")
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    surface = MeshOptions(resolution=shape_res, border=generator.bounds.border, component="all")
    cameras = rendering.cameras_of(generator, **CAMERAS.get(cfg, {}))
    # None: the network's resolution
    look = RenderOptions(resolution=nrr, sample_mult=sample_mult)
    for name, group in groups.items():
        frames = Film(generator, group, cameras, options, look)
        path = write_mp4(
            outdir / f"{name}.mp4",
            tqdm(frames, total=frames.count, unit="frame", desc=f"{name}.mp4"),
            fps,
            bitrate,
        )
        click.echo(f"{path}: {frames.count} frames")
        # shapes are those of the first cell
        for index in tqdm(
            range(frames.count if shapes else 0), unit="shape", desc=f"{name}_shapes/", disable=not shapes
        ):
            with rendering.StageBar(f"frame {index} ") as bar:
                shape = generator.field(frames.ws(index)[0], options.noise_mode)
                save_shape(outdir / f"{name}_shapes" / f"{index:04d}_shape{suffix}", shape, surface, bar)


@click.command("mesh", cls=GroupedCommand)
@file_option("--out", required=True, help="Mesh file to write (.ply, .obj, .glb).")
@shared(
    "network seed psi",
    "cutoff",
    seed={"type": click.IntRange(0, 2**32 - 1), "help": "Seed of the latent."},
    psi=_PSI,
)
@_surface_option(
    "--resolution",
    "--shape-res",
    "resolution",
    metavar="POINTS",
    type=click.IntRange(16, 1024),
    default=SURFACE.resolution,
    help="Grid points per axis on which the surface is extracted.",
)
@rare_option("--level", type=float, help="Raw density at the surface; by default that of the generator.")
@rare_option(
    "--border",
    type=click.FloatRange(0, 0.5, max_open=True),
    default=SURFACE.border,
    help="Share of the cube to clear along each face.",
)
@rare_option(
    "--component",
    type=click.Choice(["largest", "all"]),
    default=SURFACE.component,
    help="Connected parts to keep: the one with the largest volume, or all.",
)
@_surface_option(
    "--faces",
    metavar="INT",
    type=click.IntRange(min=4),
    help="Decimate the mesh to about this number of faces.",
    show_default="all",
)
@rare_option(
    "--colors", type=bool, default=SURFACE.colors, help="Write vertex colours from the radiance field."
)
@shared("device dry-run")
def mesh(out, network, seed, psi, cutoff, device, dry_run, **settings) -> None:
    """Convert one sample of a generator to a closed triangle mesh, and validate it.

    Writes FILE (.ply, .obj or .glb) and, beside it, a report FILE.json. The exit code is 1 if the mesh is not
    watertight.

    \b
    Example:
        eg3d-rlhf samples mesh --seed=1 --trunc=0.7 --resolution=128 --out=out/head.glb
    """
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators import load_generator, ws_of_seeds
    from eg3d_rlhf.geometry.mesh_export import check_mesh_suffix, export_mesh

    options = MeshOptions(**settings)
    with naming("--out"):
        check_mesh_suffix(out, "samples mesh")
    latent = {"seed": seed, "trunc": psi, "trunc_cutoff": cutoff, "noise_mode": "const"}
    if dry_run:
        resolved = {
            "out": str(out),
            "network": str(network or "bundled"),
            **latent,
            "device": device,
            **asdict(options),
        }
        print_json(resolved)
        return
    with naming("--network"):
        loaded = load_generator(network, choose_device(device))
    with rendering.StageBar() as bar:
        bar("planes", 0, 1)
        field = loaded.generator.field(ws_of_seeds(loaded.generator, [seed], psi, cutoff), "const")
        bar("planes", 1, 1)
        # the level of this generator, unless one was given
        options = options if options.level is not None else replace(options, level=field.level)
        surface, report = export_mesh(field, options, bar)
        bar("writing", 0, 1)
        surface.save(out)
        bar("writing", 1, 1)
    # head.glb.json, so that meshes of two formats keep their reports
    report.write(out.with_name(out.name + ".json"), network=loaded.hash, **latent, options=asdict(options))
    parts = f"{report.components} of {report.components_extracted} parts"
    tight = (
        "watertight"
        if report.watertight
        else f"NOT watertight ({report.open_edges} open, {report.shared_edges} shared half-edges)"
    )
    normals = "normals outward" if report.outward else "normals NOT outward"
    click.echo(
        f"{out}: {report.vertices} vertices, {report.faces} faces, {parts}, {tight}, {normals}, volume"
        f" {report.volume:.4g}"
    )
    # the mesh is written all the same, for inspection
    if not report.watertight:
        sys.exit(1)


@click.command("sheet", cls=GroupedCommand)
@shared(
    "outdir network data latents psi",
    outdir={"required": True},
    data={
        "default": bundled.DATA,
        "show_default": True,
        "help": "Dataset whose images are shown beside the samples.",
    },
    latents={"default": f"{EVALUATION.first}-{EVALUATION.first + 31}"},
    psi={"default": None, "show_default": f"{Sources.psi}; shapes of heads of people 1"},
)
@_samples_option(
    "--shapes",
    metavar="INT",
    type=click.IntRange(0),
    default=16,
    help="Number of seeds that are also shown as shapes.",
)
@shared("device dry-run")
def sheet(outdir, network, data, latents, shapes, psi, device, dry_run) -> None:
    """Render contact sheets of a generator: images.png (samples beside images of the dataset, with the same
    cameras) and shapes.png (front and back).

    \b
    Example:
        eg3d-rlhf samples sheet --data=synthetic:people64@n=64 --latents=0-7 --shapes=4 --outdir=out
    """
    from eg3d_rlhf.evaluation.run_images import image_sheet, shape_sheet
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators import load_generator
    from training.dataset import ImageFolderDataset
    from training.heads.people import LATENT
    from training.synthetic_heads import resolve_dataset

    with naming("--latents"):
        seeds = rendering.parse_seeds(latents)
    if dry_run:
        settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "data": data,
            "latents": seeds,
            "shapes": shapes,
            "psi": psi,
            "device": device,
        }
        print_json(settings)
        return
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    with naming("--data"):
        dataset = ImageFolderDataset(resolve_dataset(data), use_labels=True, c_dim=25)
        if len(dataset) < len(seeds):
            raise ValueError(
                f"the dataset has {len(dataset)} images, but {len(seeds)} are needed. Name fewer --latents."
            )
    named = (
        data.startswith("synthetic:") and generator.z_dim == LATENT
    )  # only untruncated latents have a ground-truth head
    sheets = {"images.png": image_sheet(generator, dataset, seeds, Sources.psi if psi is None else psi)}
    if shapes:
        sheets["shapes.png"] = shape_sheet(
            generator, seeds[:shapes], psi if psi is not None else 1.0 if named else Sources.psi
        )
    for name, image in sheets.items():
        write_atomic(outdir / name, rendering.png(image))
    click.echo(f"{outdir}: {', '.join(sheets)}")
