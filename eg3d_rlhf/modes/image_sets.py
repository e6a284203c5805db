"""Jobs on image sets: `data convert` writes the training format, `data metrics` measures the distance between
a dataset and a generator's images.
"""

import functools
import json
import os
import re
from dataclasses import asdict

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.modes.shared_flags import PATH, count_option, print_json, shared
from training.convert_settings import TRANSFORMS, ConvertOptions
from training.progress import tqdm

_images_option = functools.partial(option, group="Images")


@click.command("convert", cls=GroupedCommand)
@option(
    "--source",
    metavar="PATH|NAME",
    required=True,
    help="Images to convert: a folder (searched recursively), a zip file, or synthetic:people<R>@n=...",
)
@option(
    "--dest",
    metavar="PATH",
    type=PATH,
    required=True,
    help="Zip file to write, or a new or empty folder.",
)
@_images_option(
    "--max-images",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="all",
    help="Use only the first images, in the order of their names.",
)
@_images_option(
    "--transform", type=click.Choice(TRANSFORMS), show_default="none", help="Crop before resizing; see above."
)
@_images_option(
    "--resolution",
    metavar="WxH",
    show_default="that of the source",
    help="Size of the written images in pixels.",
)
@_images_option(
    "--mirror",
    is_flag=True,
    help="Write after every image its mirrored copy, with the pose mirrored.",
)
@option(
    "--labels",
    type=click.Choice(["check", "drop"]),
    default="check",
    group="Labels",
    help="check: require a label for every image if one has a label; drop: write no labels.",
)
@count_option(
    "--jobs",
    "--workers",
    "jobs",
    show_default="cores",
    help="Number of processes. Does not change the result.",
)
@option("--overwrite", is_flag=True, help="Replace an existing zip file.")
@shared("dry-run")
def convert(
    source, dest, max_images, transform, resolution, mirror, labels, jobs, overwrite, dry_run
) -> None:
    """Convert a folder or zip of images to the dataset format that train.py reads, with camera labels checked
    and kept.

    The result holds square PNGs of one size under running names (00000/img00000000.png, ...), without
    compression, and dataset.json. The source's labels stand in its own dataset.json,
    {"labels": [[image name, label], ...]}; a set without that file gets "labels": null.

    \b
    Transforms, both with --resolution=WxH:
        center-crop        the largest centred square
        center-crop-wide   the largest centred part of W:H, on a black square of side W
    Without a transform the whole image is resized.

    \b
    Example:
        eg3d-rlhf data convert --source=synthetic:people64@n=64 --dest=people.zip --resolution=32x32 --mirror
    """
    from training.dataset import ImageFiles
    from training.dataset_convert import convert_dataset
    from training.synthetic_heads import resolve_dataset

    # a comma is accepted as well as an x, as in EG3D's dataset_tool
    sides = None if resolution is None else re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", resolution)
    if resolution is not None and sides is None:
        raise ValueError(f"--resolution: expected WxH, such as 512x512, got {resolution!r}. Correct it.")
    size = sides and (int(sides[1]), int(sides[2]))
    options = ConvertOptions(
        transform=transform, resolution=size, max_images=max_images, mirror=mirror, labels=labels
    )
    # errors inside are attributed to this flag
    with naming("--source"):
        path = resolve_dataset(source)
        count = len(ImageFiles(path).images)
    count = min(count, max_images or count)
    # the affinity mask counts the cores this process may use; not all systems have it
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if dry_run:
        print_json(
            {"source": str(path), "dest": str(dest), "images": count, "workers": jobs, **asdict(options)}
        )
        return
    with tqdm(total=count, desc=f"writing {dest.name}", unit="image") as bar:
        done = convert_dataset(path, dest, options, jobs, bar.update, overwrite)
    # one number is a class label, 25 are a camera
    kind = {0: "without labels", 1: "with class labels"}.get(
        done.labels, f"with labels of {done.labels} numbers"
    )
    click.echo(
        f"{dest}: {done.images} images of {done.shape[1]}x{done.shape[2]},"
        f" {'RGB' if done.shape[0] == 3 else 'greyscale'}, {kind}"
    )
    # enlarging adds no detail, so it is reported
    if done.enlarged:
        click.echo(f"{done.enlarged} images were smaller than {resolution} and have been enlarged.")
    if done.cropped_labels:
        click.echo(f"The intrinsics of {done.cropped_labels} camera labels were adapted to the crop.")


@click.command("metrics", cls=GroupedCommand)
@shared(
    "network data",
    data={"help": "Dataset to compare with: a folder, a zip file or synthetic:people<R>@n=..."},
)
@option(
    "--mirror",
    rare=True,
    type=bool,
    help="Also use the mirrored copy of every real image, with mirrored pose; by default as in the run.",
)
@option(
    "--inception",
    metavar="FILE",
    type=PATH,
    show_default="the bundled features",
    group="What",
    help="TorchScript detector, called as net(uint8 images, return_features=True).",
)
@option(
    "--metrics", metavar="LIST", default="fid,kid", group="What", help="Metrics, comma-separated; see above."
)
@shared(
    "n",
    "seed",
    n={
        "type": click.IntRange(min=2),
        "default": None,
        "show_default": "50000",
        "help": "Number of generated images for fid and kid.",
    },
    seed="Random seed of latents, cameras, noise and subsets.",
)
@shared(
    "outdir",
    "batch",
    outdir={
        "show_default": "the network's run folder",
        "help": "Folder in which the lines are appended to metric-<name>.jsonl.",
    },
    batch={"default": 8},
)
@shared("device dry-run")
def metrics(network, data, mirror, inception, metrics, n, seed, batch, outdir, device, dry_run) -> None:
    """Compute distances between a generator's images and a dataset's, and print them as JSON lines.

    With --inception=FILE (a TorchScript detector, as FID pipelines use it) they are FID and KID.
    Without it the bundled feature network of synthetic heads is used, and the figures are called
    frechet_offline and kernel_offline: they compare generators of such heads with each other, never with
    published FIDs. Nothing is downloaded.

    \b
    Metrics:
        fid, kid                  on --n generated images against the whole set
        fid50k_full, kid50k_full  the same on 50,000, under EG3D's names
        faces                     share of --n images, and of the set's, in which scikit-image's detector
                                  finds a face

    \b
    Example:
        python tools/calc_metrics.py --data=synthetic:people64@n=64 --metrics=fid,kid --n=64
    """
    from eg3d_rlhf.experiments.run import OPTIONS
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.measures.features import load_features
    from eg3d_rlhf.measures.image_metrics import MetricOptions, append_records, evaluate, training_options
    from training.dataset import ImageFolderDataset
    from training.synthetic_heads import resolve_dataset

    options = MetricOptions(
        metrics=tuple(name.strip() for name in metrics.split(",")), n=n, seed=seed, batch=batch
    )
    target = choose_device(device)
    with naming("--network"):
        generator = load_generator(network, target)
    trained = training_options(generator.path)
    # --data, else the dataset of the network's run, else that of the bundled generator
    data = data or trained.get("data") or (bundled.DATA if generator.path == bundled.GENERATOR else None)
    if data is None:
        raise ValueError(
            f"--data: a dataset is required, because {generator.path.name} has no {OPTIONS} beside it."
            " Name the dataset."
        )
    data = str(data)
    # the real set should be the one that the run was trained on
    mirror = bool(trained.get("mirror", False)) if mirror is None else mirror
    # only a run folder receives the records by default
    outdir = outdir or (generator.path.parent if (generator.path.parent / OPTIONS).is_file() else None)
    if dry_run:
        settings = {
            "network": generator.path.name,
            "data": data,
            "mirror": mirror,
            "inception": inception and str(inception),
        }
        settings |= {
            "outdir": outdir and str(outdir),
            "metrics": options.metrics,
            "n": options.images,
            "seed": seed,
            "batch": batch,
        }
        click.echo(json.dumps(settings))
        return
    with naming("--inception"):
        features = load_features(inception, target)
    with naming("--data"):
        # c_dim 25: 16 numbers of cam2world and 9 intrinsics
        dataset = ImageFolderDataset(resolve_dataset(data), c_dim=25, xflip=mirror)

    def bar(total: int, title: str):
        """Make the progress bar of one metric and return its update function."""
        return tqdm(total=total, desc=title, unit="image").update

    records = evaluate(generator, dataset, features, options, bar)
    for record in records:
        click.echo(json.dumps(record))
    if outdir is not None:
        append_records(outdir, records)
