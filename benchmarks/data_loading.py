"""Measure how long training waits for images.

The training process reads them, or workers that read ahead do (train.py --workers).

    python -m benchmarks.data_loading    512 pixels, batches of 32, iterations of one second; a minute
    python -m benchmarks.data_loading --seconds=0.5 --workers=3

A zip of PNGs is read by the loop's reader, against iterations of a stated length: elsewhere, where this
process sleeps as beside a GPU that computes, and here, where as many matrix products on all of this process's
threads as take that length alone compete with the workers. What counts is how long the next batch is waited
for, under 2 % of an iteration; on a CPU the training process then makes floats of it, which is stated apart.
The files are in the system's cache: disks are not measured.
"""

import contextlib
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.cli import GroupedCommand, option
from training.dataset import ImageFolderDataset, InfiniteSampler, read_batches

COUNT = click.IntRange(min=1)


def write_images(path: Path, resolution: int, count: int) -> int:
    """Smooth colours with a grain of 3 % into a zip, as hard to decode as photographs. Returns the bytes per
    image.
    """
    random = np.random.RandomState(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = PIL.Image.fromarray(random.randint(0, 256, (16, 16, 3), np.uint8))
            smooth = np.asarray(
                coarse.resize((resolution, resolution), PIL.Image.Resampling.BICUBIC), np.int16
            )
            pixels = (smooth + random.randint(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels).save(buffer, format="png")
            archive.writestr(f"{i}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    return path.stat().st_size // count


def computing(seconds: float) -> Callable[[], None]:
    """As many matrix products as take so long."""
    x = torch.rand(1024, 1024)
    count = 0
    started = time.monotonic()
    while time.monotonic() < started + 2 * seconds:
        x @ x
        count += 1

    def work() -> None:
        for _ in range(count // 2):
            x @ x

    return work


class Seconds(NamedTuple):
    """Times of one case, in seconds."""

    first: float  # to the first batch
    waited: float  # for a later batch, in each iteration
    floats: float  # to make floats of it
    iteration: float  # the whole of one


def measure(
    dataset: ImageFolderDataset, batch: int, workers: int, iterations: int, work: Callable[[], None]
) -> Seconds:
    """Run so many iterations after a first batch."""
    with contextlib.closing(read_batches(dataset, iter(InfiniteSampler(dataset)), batch, workers)) as batches:
        started = time.monotonic()
        next(batches)
        began = time.monotonic()
        waited = 0.0
        floats = 0.0
        for _ in range(iterations):
            work()
            since = time.monotonic()
            images, _ = next(batches)
            there = time.monotonic()
            torch.from_numpy(images).to(torch.float32).div_(127.5).sub_(1)  # as training.gan has it
            waited += there - since
            floats += time.monotonic() - there
        return Seconds(
            began - started, *(total / iterations for total in (waited, floats, time.monotonic() - began))
        )


@click.command(cls=GroupedCommand, help=__doc__.split("\n\n")[0])
@option(
    "--workers",
    metavar="INT",
    type=COUNT,
    default=max(1, min(3, (os.cpu_count() or 1) - 1)),
    show_default="a core less, at most 3",
)
@option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=0.01),
    default=1.0,
    help="Of an iteration without images.",
)
@option("--iterations", metavar="INT", type=COUNT, default=8, help="That are timed, in each case.")
@option("--batch", metavar="INT", type=COUNT, default=32, help="Images per iteration.")
@option("--resolution", metavar="PIXELS", type=click.IntRange(min=16), default=512, help="Of the images.")
@option("--images", metavar="INT", type=COUNT, default=128, help="In the zip.")
def main(workers: int, seconds: float, iterations: int, batch: int, resolution: int, images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zip"
        size = write_images(path, resolution, images)
        dataset = ImageFolderDataset(path, use_labels=False).without_memory()
        threads = torch.get_num_threads()
        click.echo(
            f"{batch} images of {resolution} pixels ({size / 1e3:.0f} kB) an iteration of {seconds:g} s,"
            f" {threads} threads"
        )
        for name, work in (("elsewhere", lambda: time.sleep(seconds)), ("here", computing(seconds))):
            for count in (0, workers):
                s = measure(dataset, batch, count, iterations, work)
                share = (
                    f"waits {1e3 * s.waited:7.2f} ms of {s.iteration:6.3f} s: {s.waited / s.iteration:7.3%}"
                )
                click.echo(
                    f"{name:10s} {count} workers  {share}; floats {1e3 * s.floats:.0f} ms; first batch after"
                    f" {s.first:.2f} s"
                )


if __name__ == "__main__":
    main()
