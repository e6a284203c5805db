"""Jobs that sample a generator: `samples images`, `samples videos`, `samples mesh` and `samples sheet`.

`samples images` and `samples videos` accept the flags of EG3D's gen_samples.py and gen_videos.py.
"""

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, combine_decorators, option, prefix_errors
from eg3d_rlhf.core.input_paths import check_latents
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.experiments.media.settings import CAMERAS, FFHQ_FOV, MODES
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.modes.shared_flags import (
    count_option,
    file_option,
    is_latents_file,
    open_samples,
    print_json,
    rare_option,
    shared,
)
from training.config import NOISE_MODES
from training.progress import tqdm
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

# Angles of the three views of `samples images` in radians, relative to the frontal view.
YAWS = (0.4, 0.0, -0.4)
PITCH = -0.2
SURFACE = MeshOptions()
_PSI = {"default": 1.0, "type": click.FloatRange(min=0)}
_LATENTS = {
    "metavar": "LIST|FILE",
    "check": check_latents,
    "help": (
        "Seeds of the latents, as a list with ranges: 0,2-5; or a file of latents (.safetensors), whose"
        " latents are numbered from 0 on."
    ),
}
_sampling = combine_decorators(
    shared(
        "outdir network latents psi",
        "cutoff level",
        outdir={"required": True},
        latents={"required": True, **_LATENTS},
        psi=_PSI,
    ),
    rare_option(
        "--noise-mode",
        type=click.Choice(NOISE_MODES),
        default="const",
        help=(
            "Noise inputs of the synthesis network: none, const (the noise stored in the network), or random,"
            " which depends on the seed (in a video on the first seed)."
        ),
    ),
)
_shapes_option = functools.partial(option, group="Shapes")
_film_option = functools.partial(option, group="Film")
_surface_option = functools.partial(option, group="Surface")
_samples_option = functools.partial(option, group="Samples")


def _shapes(rare: bool = False):
    """Return a decorator that adds the flags of exported shapes.

    Args:
        rare: True to make all flags except --shapes settings that only --help-all shows and --set sets.
    """
    # The defaults equal the defaults of EG3D's scripts.
    return combine_decorators(
        _shapes_option(
            "--shapes",
            metavar="BOOL",
            type=bool,
            default=False,
            help="Also write shapes: one per seed, or for a video one per frame of the first cell.",
        ),
        _shapes_option(
            "--shape-res",
            rare=rare,
            metavar="POINTS",
            type=click.IntRange(16, 1024),
            default=512,
            help="Number of grid points per axis at which the density of a shape is evaluated.",
        ),
        _shapes_option(
            "--shape-format",
            rare=rare,
            metavar="NAME",
            default=".mrc",
            help="File format of the shapes: .mrc for the density grid, or .ply, .obj, .glb for the surface.",
        ),
    )


def _warn_without_surface(generator: "Generator", seeds: Sequence[int], psi: float) -> None:
    """Print a warning on stderr if some samples have no surface.

    Raises: ValueError if no sample has a surface, so that shapes would be empty.
    """
    from eg3d_rlhf.generators.density_samples import SAMPLES, check_density, require_surface

    warning = require_surface(check_density(generator, None, seeds[:SAMPLES], psi))
    if warning is not None:
        click.echo(f"Warning: --network: {warning}", err=True)


@click.command("images", cls=GroupedCommand, job="samples images")
@_sampling
@_samples_option(
    # Camera and shapes of `samples images`.
    "--fov-deg",
    metavar="DEGREES",
    type=click.FloatRange(0, 180, min_open=True, max_open=True),
    default=FFHQ_FOV,
    group="Samples",
    help=(
        "Field of view of the camera along the diagonal of the image, in degrees, as in EG3D's"
        " gen_samples.py."
    ),
)
@_shapes()
@rare_option(
    "--shape-border",
    type=click.FloatRange(0, 0.5, max_open=True),
    show_default="by generator; 30/256 for EG3D's",
    help=(
        "Width of a margin inside the faces of the cube, as a share of its edge. The density there is set to"
        " empty space."
    ),
)
@shared("device dry-run")
def images(
    outdir, network, latents, psi, cutoff, level, shape_format, device, dry_run, **view_options
) -> None:
    """Render samples of a generator. For each seed, three views are written side by side, and with --shapes
    also the shape.

    The images are named seedXXXX.png. Their views have the yaws +0.4, 0 and -0.4 and the pitch -0.2, in
    radians. The shapes have the same names with the ending of --shape-format.

    \b
    Example:
        python tools/gen_samples.py --seeds=0,2-5 --trunc=0.7 --outdir=out
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators import check_seeds
    from eg3d_rlhf.geometry.mesh_export import save_shape, shape_suffix

    # EG3D's tool calls this flag --seeds, other jobs of this project --latents; both spellings are accepted.
    load_samples, seeds = open_samples(network, latents, choose_device(device), "--seeds", level)
    # an error in this block begins with the name --shape-format
    with prefix_errors("--shape-format"):
        shape_ending = shape_suffix(shape_format)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "seeds": seeds,
            "trunc": psi,
            "trunc_cutoff": cutoff,
            "level": level,
            **view_options,
            "shape_format": shape_ending,
            "device": device,
        }
        print_json(resolved_settings)
        return
    generator = load_samples().generator
    # `or` would be wrong: 0 is a valid border.
    border_share = (
        generator.bounds.border if view_options["shape_border"] is None else view_options["shape_border"]
    )
    # A density grid (.mrc) needs no surface.
    if view_options["shapes"] and shape_ending != ".mrc":
        with prefix_errors("--network"):
            _warn_without_surface(generator, seeds, psi)
    mesh_options = MeshOptions(
        resolution=view_options["shape_res"],
        level=generator.level,
        border=border_share,
        component="all",
    )
    # A network with a fixed set of shapes has one seed for each shape.
    check_seeds(generator, max(seeds), "--seeds")
    cameras = rendering.cameras_of(generator, view_options["fov_deg"])
    # one camera label [1, 25] per view
    camera_labels = [rendering.camera(cameras, yaw, PITCH) for yaw in YAWS]
    for seed in tqdm(seeds, unit="seed", desc="samples"):
        # The mapping network gets the frontal camera, as in EG3D's script.
        ws = rendering.conditioned_ws(generator, [seed], cameras, psi, cutoff)
        view_images = rendering.render(generator, ws, camera_labels, seed, view_options["noise_mode"])
        write_atomic(
            outdir / f"seed{seed:04d}.png", rendering.png(rendering.tile(view_images, len(camera_labels)))
        )
        if view_options["shapes"]:
            with rendering.StageBar(f"seed {seed} ") as stage_bar:
                radiance_field = generator.field(ws, view_options["noise_mode"])
                save_shape(outdir / f"seed{seed:04d}{shape_ending}", radiance_field, mesh_options, stage_bar)
    click.echo(
        f"{outdir}: {len(seeds)} images{f' and {shape_ending} shapes' if view_options['shapes'] else ''}"
    )


@click.command("videos", cls=GroupedCommand)
@_sampling
@_film_option(
    # What the video shows: samples, grid and keyframes.
    "--interpolate",
    metavar="BOOL",
    type=bool,
    default=True,
    help="Write one video that interpolates between the seeds; False writes one video per seed.",
)
@_film_option(
    "--grid",
    metavar="WxH",
    default="1x1",
    help="Number of samples that the video shows beside each other (W) and below each other (H).",
)
@rare_option(
    "--num-keyframes",
    "keyframes",
    type=click.IntRange(min=1),
    show_default="number of seeds / number of cells",
    help="Number of latents between which each cell of the video interpolates.",
)
@count_option(
    "--w-frames", "frames", default=120, help="Number of frames between two keyframes.", group="Film"
)
@rare_option(
    "--shuffle-seed",
    type=click.IntRange(0, 2**32 - 1),
    show_default="none; the seeds keep their order",
    help="Random seed by which the order of --seeds is shuffled.",
)
@_film_option(
    "--image_mode",
    "--image-mode",
    "mode",
    metavar="NAME",
    type=click.Choice(MODES),
    default="image",
    help=(
        "Output of the generator that the video shows: image, image_depth (depth map) or image_raw (before"
        " super-resolution)."
    ),
)
@_film_option(
    # Camera, resolution and format of the video.
    "--cfg",
    metavar="NAME",
    type=click.Choice(list(CAMERAS), case_sensitive=False),
    default=None,
    group="Film",
    show_default="the camera of the network",
    help="Name of the dataset whose camera pivot and field of view are used: FFHQ, AFHQ or Shapenet.",
)
@rare_option(
    "--sample_mult",
    "--sample-mult",
    "sample_mult",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    help=(
        "Factor by which the number of density samples per ray is multiplied. A larger factor gives smoother"
        " videos and takes longer."
    ),
)
@rare_option(
    "--nrr",
    type=click.IntRange(min=1),
    show_default="the resolution of the network",
    help="Neural rendering resolution, the edge of the image before super-resolution in pixels.",
)
@rare_option(
    "--fps", type=click.FloatRange(1, 240), default=60.0, help="Number of frames per second of the video."
)
@rare_option(
    "--bitrate",
    default="10M",
    help="Bitrate of the mp4 file in ffmpeg's notation, such as 10M for 10 Mbit/s.",
)
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
    level,
    **film,
) -> None:
    """Render videos of a generator: the camera swings around the samples while the latents are interpolated
    between seeds.

    The command writes interpolation.mp4, or with --interpolate=False one file SEED.mp4 per seed with a fixed
    latent. The number of frames is the number of keyframes times --w-frames. A keyframe is one seed of each
    cell of the grid.

    \b
    Example:
        python tools/gen_videos.py --seeds=0-3 --grid=2x2 --trunc=0.7 --w-frames=60 --outdir=out
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.core.field import RenderOptions
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.experiments.media.video import Film, FilmOptions, check_mp4, write_mp4
    from eg3d_rlhf.geometry.mesh_export import save_shape, shape_suffix

    load_samples, seeds = open_samples(network, latents, choose_device(device), "--seeds", level)
    # an error in this block begins with the name --grid
    with prefix_errors("--grid"):
        # Two positive integers; leading zeros are allowed.
        grid_match = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", grid.lower())
        if grid_match is None:
            raise ValueError(
                f"{grid!r} is not of the form WxH. Write the numbers of columns and rows, such as 4x3."
            )
        # `film` holds the flags that have the names of fields
        film_options = FilmOptions(grid=(int(grid_match[1]), int(grid_match[2])), **film)
    # an error in this block begins with the name --shape-format
    with prefix_errors("--shape-format"):
        shape_ending = shape_suffix(shape_format)
    # name of the video -> its seeds
    seeds_by_video = {"interpolation": seeds} if interpolate else {str(seed): [seed] for seed in seeds}
    # Without interpolation, the latent is fixed, so one keyframe per seed is enough.
    if not interpolate and film_options.keyframes is None:
        film_options = replace(film_options, keyframes=1)
    # an error in this block begins with the name --seeds
    with prefix_errors("--seeds"):
        # number of frames of each video
        frame_counts = {
            video_name: len(film_options.cells(video_seeds)[0]) * film_options.frames
            for video_name, video_seeds in seeds_by_video.items()
        }
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "films": {f"{video_name}.mp4": frame_count for video_name, frame_count in frame_counts.items()},
            "interpolate": interpolate,
            **asdict(film_options),
            "level": level,
            "cfg": cfg,
            "sample_mult": sample_mult,
            "nrr": nrr,
            "fps": fps,
            "bitrate": bitrate,
            "shapes": shapes,
            "shape_res": shape_res,
            "shape_format": shape_ending,
            "device": device,
        }
        print_json(resolved_settings)
        return
    # Fails before the generator is loaded if the video encoder is missing.
    check_mp4(outdir / "interpolation.mp4")
    generator = load_samples().generator
    if shapes and shape_ending != ".mrc":
        with prefix_errors("--network"):
            _warn_without_surface(generator, seeds, film_options.psi)
    mesh_options = MeshOptions(resolution=shape_res, border=generator.bounds.border, component="all")
    cameras = rendering.cameras_of(generator, **CAMERAS.get(cfg, {}))
    # None: the network's resolution
    render_options = RenderOptions(resolution=nrr, sample_mult=sample_mult)
    for video_name, video_seeds in seeds_by_video.items():
        # Frames are rendered one by one, when the encoder needs them.
        film_frames = Film(generator, video_seeds, cameras, film_options, render_options)
        video_path = write_mp4(
            outdir / f"{video_name}.mp4",
            tqdm(film_frames, total=film_frames.count, unit="frame", desc=f"{video_name}.mp4"),
            fps,
            bitrate,
        )
        click.echo(f"{video_path}: {film_frames.count} frames")
        # `ws(index)[0]`: the latent of the first cell in this frame
        for frame_index in tqdm(
            # an empty range: no shapes
            range(film_frames.count if shapes else 0),
            unit="shape",
            desc=f"{video_name}_shapes/",
            disable=not shapes,
        ):
            with rendering.StageBar(f"frame {frame_index} ") as stage_bar:
                shape_field = generator.field(film_frames.ws(frame_index)[0], film_options.noise_mode)
                save_shape(
                    outdir / f"{video_name}_shapes" / f"{frame_index:04d}_shape{shape_ending}",
                    shape_field,
                    mesh_options,
                    stage_bar,
                )


@click.command("mesh", cls=GroupedCommand)
@file_option("--out", required=True, help="Mesh file to write; its ending (.ply, .obj, .glb) is the format.")
@shared(
    "network seed psi",
    "cutoff level",
    seed={"type": click.IntRange(0, 2**32 - 1), "help": "Seed of the latent."},
    psi=_PSI,
)
@_surface_option(
    # Extraction of the surface, and its simplification.
    "--resolution",
    "--shape-res",
    "resolution",
    metavar="POINTS",
    type=click.IntRange(16, 1024),
    default=SURFACE.resolution,
    help="Number of grid points per axis on which the density is evaluated and the surface is extracted.",
)
@rare_option(
    "--border",
    type=click.FloatRange(0, 0.5, max_open=True),
    default=SURFACE.border,
    help=(
        "Width of a margin inside the faces of the cube, as a share of its edge. The density there is set to"
        " empty space."
    ),
)
@rare_option(
    "--component",
    type=click.Choice(["largest", "all"]),
    default=SURFACE.component,
    help="Connected parts of the surface that are written: the part with the largest volume, or all parts.",
)
@_surface_option(
    "--faces",
    metavar="INT",
    type=click.IntRange(min=4),
    help="Number of faces to which the mesh is simplified, approximately.",
    show_default="no simplification",
)
@rare_option(
    "--colors",
    type=bool,
    default=SURFACE.colors,
    help="Write a colour for each vertex, evaluated from the radiance field.",
)
@shared("device dry-run")
def mesh(out, network, seed, psi, cutoff, level, device, dry_run, **settings) -> None:
    """Convert one sample of a generator to a closed triangle mesh, and validate it.

    The command writes the mesh FILE, and a report on its validity FILE.json. The exit code is 1 if the mesh
    is not watertight, and 0 otherwise.

    \b
    Example:
        eg3d-rlhf samples mesh --seed=1 --trunc=0.7 --resolution=128 --out=out/head.glb
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators import load_generator, ws_of_seeds
    from eg3d_rlhf.geometry.mesh_export import check_mesh_suffix, export_mesh

    # raises ValueError for a value outside its range
    mesh_options = MeshOptions(level=level, **settings)
    # an error in this block begins with the name --out
    with prefix_errors("--out"):
        check_mesh_suffix(out, "samples mesh")
    # settings of the sample, which the report of the mesh records
    sample_settings = {"seed": seed, "trunc": psi, "trunc_cutoff": cutoff, "noise_mode": "const"}
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "out": str(out),
            "network": str(network or "bundled"),
            **sample_settings,
            "device": device,
            **asdict(mesh_options),
        }
        print_json(resolved_settings)
        return
    # an error in this block begins with the name --network
    with prefix_errors("--network"):
        loaded_network = load_generator(network, choose_device(device), level)
        # Proposes a level if this sample has no surface.
        _warn_without_surface(loaded_network.generator, [seed], psi)
    with rendering.StageBar() as stage_bar:
        # stage, number of finished units, number of units
        stage_bar("planes", 0, 1)
        radiance_field = loaded_network.generator.field(
            ws_of_seeds(loaded_network.generator, [seed], psi, cutoff), "const"
        )
        stage_bar("planes", 1, 1)
        # None: the surface level of this generator
        mesh_options = (
            mesh_options
            if mesh_options.level is not None
            else replace(mesh_options, level=radiance_field.level)
        )
        exported_mesh, mesh_report = export_mesh(radiance_field, mesh_options, stage_bar)
        stage_bar("writing", 0, 1)
        exported_mesh.save(out)
        stage_bar("writing", 1, 1)
    # head.glb.json and not head.json: meshes of the same name in two formats have separate reports.
    mesh_report.write(
        out.with_name(out.name + ".json"),
        network=loaded_network.hash,
        **sample_settings,
        options=asdict(mesh_options),
    )
    component_text = f"{mesh_report.components} of {mesh_report.components_extracted} parts"
    # the numbers help to find the defect
    watertight_text = (
        "watertight"
        if mesh_report.watertight
        else f"NOT watertight ({mesh_report.open_edges} open, {mesh_report.shared_edges} shared half-edges)"
    )
    normals_text = "normals outward" if mesh_report.outward else "normals NOT outward"
    click.echo(
        f"{out}: {mesh_report.vertices} vertices, {mesh_report.faces} faces, {component_text},"
        f" {watertight_text}, {normals_text}, volume {mesh_report.volume:.4g}"
    )
    # The mesh was written anyway, so that the user can inspect it.
    if not mesh_report.watertight:
        sys.exit(1)


@click.command("sheet", cls=GroupedCommand)
@shared(
    "outdir network data latents psi",
    "level",
    outdir={"required": True},
    data={
        "default": bundled.DATA,
        "show_default": True,
        "help": "Dataset whose images are shown beside the samples.",
    },
    # 32 latents that no training uses
    latents={"default": f"{EVALUATION.first}-{EVALUATION.first + 31}", **_LATENTS},
    psi={"default": None, "show_default": f"{Sources.psi}; for shapes of synthetic heads 1"},
)
@_samples_option(
    "--shapes",
    metavar="INT",
    type=click.IntRange(0),
    default=16,
    help="Number of shapes in shapes.png, those of the first latents; 0: shapes.png is not written.",
)
@shared("device dry-run")
def sheet(outdir, network, data, latents, shapes, psi, level, device, dry_run) -> None:
    """Render two overview images of a generator. images.png shows samples beside images of the dataset with
    the same cameras; shapes.png shows shapes from the front and from the back.

    \b
    Example:
        eg3d-rlhf samples sheet --data=synthetic:people64@n=64 --latents=0-7 --shapes=4 --outdir=out
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.run_images import image_sheet, shape_sheet
    from eg3d_rlhf.experiments.image_set_warnings import warn_about_images
    from eg3d_rlhf.experiments.media import rendering
    from eg3d_rlhf.generators.stored_latents import LatentsFile
    from training.dataset import ImageFolderDataset
    from training.heads.people import LATENT
    from training.synthetic_heads import resolve_dataset

    load_samples, seeds = open_samples(network, latents, choose_device(device), level=level)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "outdir": str(outdir),
            "network": str(network or "bundled"),
            "data": data,
            "latents": seeds,
            "shapes": shapes,
            "psi": psi,
            "level": level,
            "device": device,
        }
        print_json(resolved_settings)
        return
    generator = load_samples().generator
    # an error in this block begins with the name --data
    with prefix_errors("--data"):
        # cameras of the dataset's images are the cameras of the samples beside them
        dataset = ImageFolderDataset(resolve_dataset(data), use_labels=True, c_dim=25)
        warn_about_images(dataset, generator, f"--network={network or 'bundled'}")
        if len(dataset) < len(seeds):
            raise ValueError(
                f"the dataset has {len(dataset)} images, but {len(seeds)} latents need an image each. Name"
                " fewer seeds with --latents."
            )
    # The latents of a file have the truncation that the file states.
    if is_latents_file(latents):
        psi = LatentsFile.load(latents).psi
    if shapes:
        with prefix_errors("--network"):
            _warn_without_surface(generator, seeds[:shapes], Sources.psi if psi is None else psi)
    # Latents of synthetic heads have a ground-truth head if they are not truncated, hence psi = 1 for shapes.
    has_ground_truth = data.startswith("synthetic:") and generator.z_dim == LATENT
    sheet_by_file = {
        "images.png": image_sheet(generator, dataset, seeds, Sources.psi if psi is None else psi)
    }
    if shapes:
        sheet_by_file["shapes.png"] = shape_sheet(
            generator, seeds[:shapes], psi if psi is not None else 1.0 if has_ground_truth else Sources.psi
        )
    # written last, so that an error leaves the old files unchanged
    for file_name, sheet_image in sheet_by_file.items():
        write_atomic(outdir / file_name, rendering.png(sheet_image))
    click.echo(f"{outdir}: {', '.join(sheet_by_file)}")
