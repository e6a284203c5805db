"""Jobs on image sets: `data convert` and `data metrics`.

`data convert` writes images in the format that train.py reads. `data metrics` measures the distance between
the images of a generator and the images of a dataset (FID, KID).
"""

import functools
import json
import os
import re
from dataclasses import asdict

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, prefix_errors
from eg3d_rlhf.core.input_paths import check_torchscript_file
from eg3d_rlhf.modes.shared_flags import PATH, count_option, print_json, shared
from training.convert_settings import TRANSFORMS, ConvertOptions, parse_cures
from training.input_paths import check_dataset
from training.progress import tqdm

_images_option = functools.partial(option, group="Images")


@click.command("convert", cls=GroupedCommand)
@option(
    "--source",
    metavar="PATH|NAME",
    check=functools.partial(check_dataset, flag="--source"),
    required=True,
    help=(
        "Images to convert: a folder (with its subfolders), a zip file, or synthetic:people<R>@n=<N> for N"
        " synthetic heads of R x R pixels."
    ),
)
@option(
    "--dest",
    metavar="PATH",
    type=PATH,
    required=True,
    help="Zip file to write, or a new or empty folder.",
)
@_images_option(
    # Options that change the images. The labels are adapted to a crop and to mirroring.
    "--max-images",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="all",
    help="Number of images to convert; the first images in the order of their names are used.",
)
@_images_option(
    "--transform",
    type=click.Choice(TRANSFORMS),
    show_default="none",
    help=(
        "Part of the image that is kept before resizing to --resolution: the largest centred square"
        " (center-crop), or the largest centred part of the shape WxH on a black square (center-crop-wide)."
    ),
)
@_images_option(
    "--resolution",
    metavar="WxH",
    show_default="the size of the source images",
    help="Width and height of the written images in pixels.",
)
@_images_option(
    "--mirror",
    is_flag=True,
    help="Write a mirrored copy after every image, with the mirrored camera label.",
)
@option(
    "--labels",
    type=click.Choice(["check", "drop"]),
    default="check",
    group="Labels",
    help=(
        "Treatment of the labels. check: if one image has a label, every image must have one, and the cameras"
        " are checked; drop: write no labels."
    ),
)
@option(
    "--fix-cameras",
    metavar="LIST",
    show_default="the labels are kept as they are",
    group="Labels",
    help=(
        "Corrections of the camera labels, separated by commas and applied in this order. pixels: divide the"
        " intrinsics by the image size; transpose: transpose column-major matrices, or else the rotations;"
        " world2cam: invert the poses; opengl: negate the y and z axes of the cameras; zup: rotate the world"
        " so that its z axis becomes y."
    ),
)
@option(
    "--camera-scale",
    metavar="FACTOR",
    type=float,
    default=1.0,
    group="Labels",
    help="Factor on the positions of the cameras, for example 0.001 if they are in millimetres.",
)
@option(
    "--strict-cameras",
    is_flag=True,
    group="Labels",
    help=(
        "Reject the set if its cameras look wrong: cameras that look away from the scene, a distance that"
        " suits no preset of EG3D, one pose for all images. Without this flag they cause a warning."
    ),
)
@count_option(
    "--jobs",
    "--workers",
    "jobs",
    show_default="one per core",
    help="Number of processes that convert images. It does not change the result.",
)
@option("--overwrite", is_flag=True, help="Replace an existing zip file.")
@shared("dry-run")
def convert(
    source,
    dest,
    max_images,
    transform,
    resolution,
    mirror,
    labels,
    fix_cameras,
    camera_scale,
    strict_cameras,
    jobs,
    overwrite,
    dry_run,
) -> None:
    """Convert a folder or a zip file of images to the dataset format that train.py reads. Camera labels are
    checked and copied.

    The result holds uncompressed square PNGs of one size under consecutive names
    (00000/img00000000.png, ...), and dataset.json. The source's labels are read from its own dataset.json,
    {"labels": [[image name, label], ...]}; a set without that file gets "labels": null. The last line
    describes the cameras: their distance, focal length, and the angle between the optical axis and the
    centre.

    \b
    Transforms, both with --resolution=WxH:
        center-crop        the largest centred square
        center-crop-wide   the largest centred part of W:H, on a black square of side W
    Without a transform the whole image is resized.

    \b
    Example:
        eg3d-rlhf data convert --source=synthetic:people64@n=64 --dest=people.zip --resolution=32x32 --mirror
        eg3d-rlhf data convert --source=blender/ --dest=objects.zip --fix-cameras=pixels,opengl,zup
    """
    # EG3D's dataset_tool accepts a comma as well as an x.
    size_match = None if resolution is None else re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", resolution)
    if resolution is not None and size_match is None:
        raise ValueError(
            f"--resolution: {resolution!r} is not of the form WxH. Write the width and the height in pixels,"
            " such as 512x512."
        )
    # None stays None: the size of the source images
    target_size = size_match and (int(size_match[1]), int(size_match[2]))
    convert_options = ConvertOptions(
        transform=transform,
        resolution=target_size,
        max_images=max_images,
        mirror=mirror,
        labels=labels,
        fix_cameras=parse_cures(fix_cameras),
        camera_scale=camera_scale,
        strict_cameras=strict_cameras,
    )

    # Imported here, so that --help and errors are printed without loading these modules.
    from training.dataset import ImageFiles
    from training.dataset_convert import convert_dataset, read_labels
    from training.synthetic_heads import resolve_dataset

    # an error in this block begins with the name --source
    with prefix_errors("--source"):
        # synthetic heads are rendered into a folder at their first use
        source_path = resolve_dataset(source)
        image_files = ImageFiles(source_path, "--source")
        # Before the labels are read, so that an image and its label have the same index.
        image_files.leave_out_unusable()
    # The labels are checked before the first image is converted.
    source_labels = read_labels(image_files, convert_options)
    image_count = len(image_files.images)
    # None: all images
    image_count = min(image_count, max_images or image_count)
    # the affinity mask counts the cores this process may use; not all systems have it
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(
            {
                "source": str(source_path),
                "dest": str(dest),
                "images": image_count,
                "workers": jobs,
                **asdict(convert_options),
            }
        )
        return
    with tqdm(total=image_count, desc=f"writing {dest.name}", unit="image") as progress_bar:
        conversion_summary = convert_dataset(
            image_files, source_labels, dest, convert_options, jobs, progress_bar.update, overwrite
        )
    # A label of one number is a class; a label of 25 numbers is a camera.
    label_text = {0: "without labels", 1: "with class labels"}.get(
        conversion_summary.labels, f"with labels of {conversion_summary.labels} numbers"
    )
    for warning in conversion_summary.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(
        # shape: [channels, height, width]
        f"{dest}: {conversion_summary.images} images of"
        f" {conversion_summary.shape[1]}x{conversion_summary.shape[2]},"
        f" {'RGB' if conversion_summary.shape[0] == 3 else 'greyscale'}, {label_text}"
    )
    # Enlarging adds no detail, so the user should know of it.
    if conversion_summary.enlarged:
        click.echo(
            f"{conversion_summary.enlarged} images were smaller than {resolution} and have been enlarged."
        )
    if conversion_summary.cropped_labels:
        click.echo(
            f"The intrinsics of {conversion_summary.cropped_labels} camera labels were adapted to the crop."
        )
    if conversion_summary.inferred_sizes:
        click.echo(
            f"The intrinsics of {conversion_summary.inferred_sizes} camera labels do not belong to the size"
            " of their image. They were divided by twice the principal point."
        )
    if conversion_summary.cameras is not None:
        click.echo(conversion_summary.cameras)
    else:
        click.echo(
            "train.py needs a camera label of 25 numbers for each image, and will reject this set."
            " docs/guides/cameras.md shows how to write them to dataset.json."
        )


@click.command("metrics", cls=GroupedCommand)
@shared(
    "network data",
    data={
        "help": (
            "Dataset to compare with: a folder, a zip file, or synthetic:people<R>@n=<N> for N synthetic"
            " heads of R x R pixels."
        )
    },
)
@option(
    "--mirror",
    rare=True,
    type=bool,
    show_default="as in the training of the generator",
    help="Also use a mirrored copy of every image of the dataset, with the mirrored camera label.",
)
@option(
    # The feature network decides what the distances mean, so it is recorded with them.
    "--inception",
    metavar="FILE",
    type=PATH,
    check=check_torchscript_file,
    show_default="the bundled feature network of synthetic heads",
    group="What",
    help=(
        "TorchScript file of the Inception network from which FID and KID are computed; it is called as"
        " net(uint8 images, return_features=True)."
    ),
)
@option(
    "--metrics",
    metavar="LIST",
    default="fid,kid",
    group="What",
    help="Metrics to compute, separated by commas: fid, kid, fid50k_full, kid50k_full, faces.",
)
@shared(
    "n",
    "seed",
    n={
        "type": click.IntRange(min=2),
        "default": None,
        "show_default": "50000",
        "help": "Number of generated images from which fid and kid are computed.",
    },
    seed="Random seed of the latents, cameras and noise, and of the subsets of images in KID.",
)
@shared(
    "outdir",
    "batch",
    outdir={
        "show_default": "the run folder of the network",
        "help": "Folder with the files metric-<name>.jsonl, to which the results are appended.",
    },
    batch={"default": 8},
)
@shared("device dry-run")
def metrics(network, data, mirror, inception, metrics, n, seed, batch, outdir, device, dry_run) -> None:
    """Compute distances between a generator's images and a dataset's, and print them as JSON lines.

    With --inception=FILE, the distances are FID and KID. FILE is the TorchScript version of the Inception
    network that published FIDs use. Without this flag, the bundled feature network of synthetic heads is
    used, and the distances are called frechet_offline and kernel_offline. They can be compared between
    generators of synthetic heads, but not with published FIDs. Nothing is downloaded.

    \b
    Metrics:
        fid, kid                  compare --n generated images with all images of the dataset
        fid50k_full, kid50k_full  compare 50,000 generated images, as EG3D does under these names
        faces                     share of --n generated images, and of the dataset's images, in which the
                                  face detector of scikit-image finds a face

    \b
    Example:
        python tools/calc_metrics.py --data=synthetic:people64@n=64 --metrics=fid,kid --n=64
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.experiments.image_set_warnings import warn_about_images
    from eg3d_rlhf.experiments.run_record import OPTIONS
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.measures.features import load_features
    from eg3d_rlhf.measures.image_metrics import MetricOptions, append_records, evaluate, training_options
    from training.dataset import ImageFolderDataset
    from training.synthetic_heads import resolve_dataset

    metric_options = MetricOptions(
        metrics=tuple(name.strip() for name in metrics.split(",")), n=n, seed=seed, batch=batch
    )
    # Loaded before the dataset, because the network's run names its dataset.
    target_device = choose_device(device)
    # an error in this block begins with the name --network
    with prefix_errors("--network"):
        generator = load_generator(network, target_device)
    run_options = training_options(generator.path)
    # --data, else the dataset of the network's run, else the dataset of the bundled generator
    data = data or run_options.get("data") or (bundled.DATA if generator.path == bundled.GENERATOR else None)
    if data is None:
        raise ValueError(
            f"--data: the dataset is missing, and no {OPTIONS} lies beside {generator.path.name} that would"
            " name the dataset of its training. Add --data=PATH."
        )
    data = str(data)
    # By default, the dataset is mirrored if it was mirrored in the training of the generator.
    mirror = bool(run_options.get("mirror", False)) if mirror is None else mirror
    # By default, the results are stored only if the network lies in a run folder.
    outdir = outdir or (generator.path.parent if (generator.path.parent / OPTIONS).is_file() else None)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "network": generator.path.name,
            "data": data,
            "mirror": mirror,
            "inception": inception and str(inception),
        }
        resolved_settings |= {
            "outdir": outdir and str(outdir),
            "metrics": metric_options.metrics,
            "n": metric_options.images,
            "seed": seed,
            "batch": batch,
        }
        click.echo(json.dumps(resolved_settings))
        return
    # an error in this block begins with the name --inception
    with prefix_errors("--inception"):
        feature_network = load_features(inception, target_device)
    # an error in this block begins with the name --data
    with prefix_errors("--data"):
        # c_dim: a camera label has 16 numbers of cam2world and 9 intrinsics
        dataset = ImageFolderDataset(resolve_dataset(data), c_dim=25, xflip=mirror)
        warn_about_images(dataset, generator.generator, f"--network={generator.path.name}")

    def make_bar(image_count: int, bar_title: str):
        """Make the progress bar of one metric over `image_count` images, and return its update function."""
        return tqdm(total=image_count, desc=bar_title, unit="image").update

    # one record per metric
    metric_records = evaluate(generator, dataset, feature_network, metric_options, make_bar)
    for metric_record in metric_records:
        click.echo(json.dumps(metric_record))
    if outdir is not None:
        # Earlier results of the same network stay in the files.
        append_records(outdir, metric_records)
