"""Convert a folder or zip of images to the dataset form that train.py reads, with camera labels checked and kept.

The result holds square PNGs of one size under running names (00000/img00000000.png, ...), without compression, and dataset.json. The
source's labels stand in its own dataset.json, {"labels": [[image name, label], ...]}; a set without that file gets "labels": null.

\b
Transforms, both with --resolution=WxH:
    center-crop        the largest centred square
    center-crop-wide   the largest centred part of W:H, on a black square of side W
Without a transform the whole image is resized.

\b
Example:
    python tools/dataset_tool.py --source=synthetic:heads64@n=64 --dest=runs/example/heads32.zip --resolution=32x32 --mirror
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, naming, option
from training.dataset_convert import TRANSFORMS, ConvertOptions, convert_dataset
from training.dataset_files import ImageFiles
from training.synthetic_heads import resolve_dataset


@click.command(cls=GroupedCommand, help=__doc__)
@option("--source", metavar="PATH|NAME", required=True, help="Folder (searched recursively), zip, or synthetic:heads<R>@n=...")
@option("--dest", metavar="PATH", type=click.Path(path_type=Path), required=True, help="Zip to write, or a new or empty folder.")
@option("--max-images", metavar="INT", type=click.IntRange(min=1), default=None, show_default="all", group="Images",
        help="Take the first so many, in the order of their names.")
@option("--transform", type=click.Choice(TRANSFORMS), default=None, show_default="none", group="Images", help="See above.")
@option("--resolution", metavar="WxH", default=None, show_default="as they are", group="Images", help="Size of the result, pixels.")
@option("--mirror", is_flag=True, group="Images", help="Write every image mirrored as well, right after itself, with its pose mirrored.")
@option("--labels", type=click.Choice(["check", "drop"]), default="check", group="Labels",
        help="Check them, and refuse a set in which only some images have one; or write none.")
@option("--workers", metavar="INT", type=click.IntRange(min=1), default=None, show_default="cores",
        help="Processes; no effect on the result.")
@option("--overwrite", is_flag=True, help="Replace a zip that exists.")
@option("--dry-run", is_flag=True, help="Check the source's list and the settings, print them as JSON and stop.")
def main(source, dest, max_images, transform, resolution, mirror, labels, workers, overwrite, dry_run) -> None:
    sides = None if resolution is None else re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", resolution)
    if resolution is not None and sides is None:
        raise ValueError(f"--resolution: expected WxH such as 512x512, got {resolution!r}. Correct it.")
    size = sides and (int(sides[1]), int(sides[2]))
    options = ConvertOptions(transform=transform, resolution=size, max_images=max_images, mirror=mirror, labels=labels)
    with naming("--source"):
        path = resolve_dataset(source)
        count = len(ImageFiles(path).images)
    count = min(count, max_images or count)
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if dry_run:
        click.echo(json.dumps({"source": str(path), "dest": str(dest), "images": count, "workers": workers, **asdict(options)}, indent=1))
        return
    with tqdm(total=count, desc=f"writing {dest.name}", unit="image") as bar:
        done = convert_dataset(path, dest, options, workers, bar.update, overwrite)
    kind = {0: "without labels", 1: "with class labels"}.get(done.labels, f"with labels of {done.labels} numbers")
    click.echo(f"{dest}: {done.images} images of {done.shape[1]}x{done.shape[2]}, {'RGB' if done.shape[0] == 3 else 'greyscale'}, {kind}")
    if done.enlarged:
        click.echo(f"{done.enlarged} images were smaller than {resolution} and have been enlarged.")
    if done.cropped_labels:
        click.echo(f"Intrinsics of {done.cropped_labels} camera labels follow the crop.")


if __name__ == "__main__":
    main()
