"""Measure how long training waits for images.

The images are read by the training process, or in advance by worker processes (train.py --workers).

    python -m benchmarks.data_loading    512 pixels, batches of 32, iterations of one second; takes a minute
    python -m benchmarks.data_loading --seconds=0.5 --workers=3

The reader of the training loop reads a zip file of PNG images. Between two batches, an iteration of the given
length is simulated in two ways. In the case "elsewhere" the process sleeps, as if a GPU computed. In the case
"here" it computes matrix products on all of its threads, which compete with the workers. Without workers, the
products take the given length. The goal is that the process waits for the next batch less than 2 % of an
iteration. The time in which it converts the batch to floats, which happens on the CPU, is printed separately.
The files are in the system's cache, so the speed of the disk is not measured.
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


def write_images(path: Path, resolution: int, image_count: int) -> int:
    """Write a zip file of images that are as hard to decode as photographs.

    The images have smooth colours with a noise of 3 %.
    Returns: the number of bytes per image.
    """
    rng = np.random.RandomState(0)  # a fixed seed, so that every call writes the same images
    with zipfile.ZipFile(path, "w") as archive:
        for image_index in range(image_count):
            # resized below, which gives smooth colours
            coarse_colours = PIL.Image.fromarray(rng.randint(0, 256, (16, 16, 3), np.uint8))
            smooth_colours = np.asarray(
                coarse_colours.resize((resolution, resolution), PIL.Image.Resampling.BICUBIC), np.int16
            )
            pixels = (smooth_colours + rng.randint(-4, 5, smooth_colours.shape)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels).save(buffer, format="png")
            archive.writestr(f"{image_index}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    return path.stat().st_size // image_count


def make_computation(seconds: float) -> Callable[[], None]:
    """Return a function that computes matrix products for about this number of seconds."""
    matrix = torch.rand(1024, 1024)  # large enough to use all threads
    product_count = 0
    start_time = time.monotonic()
    while time.monotonic() < start_time + 2 * seconds:
        matrix @ matrix
        product_count += 1

    def multiply_matrices() -> None:
        for _ in range(product_count // 2):
            matrix @ matrix

    return multiply_matrices


class Seconds(NamedTuple):
    """Times of one case, in seconds."""

    first: float  # time until the first batch is available
    waited: float  # mean time of waiting for a later batch
    floats: float  # mean time of converting a batch to floats
    iteration: float  # mean time of an iteration


def measure(
    dataset: ImageFolderDataset,
    batch_size: int,
    worker_count: int,
    iteration_count: int,
    run_iteration: Callable[[], None],
) -> Seconds:
    """Measure the times of reading batches between iterations of computation.

    Args:
        dataset: images.
        batch_size: images per batch.
        worker_count: number of worker processes; 0: this process reads the images.
        iteration_count: number of iterations after the first batch.
        run_iteration: function that takes the time of an iteration.
    """
    with contextlib.closing(
        read_batches(dataset, iter(InfiniteSampler(dataset)), batch_size, worker_count)
    ) as batches:
        start_time = time.monotonic()
        next(batches)
        loop_start = time.monotonic()
        waited_seconds = 0.0
        float_seconds = 0.0
        for _ in range(iteration_count):
            run_iteration()
            wait_start = time.monotonic()
            images, _ = next(batches)
            batch_time = time.monotonic()
            torch.from_numpy(images).to(torch.float32).div_(127.5).sub_(
                1
            )  # the conversion of training/gan.py
            waited_seconds += batch_time - wait_start
            float_seconds += time.monotonic() - batch_time
        return Seconds(
            loop_start - start_time,
            *(
                seconds_sum / iteration_count
                for seconds_sum in (waited_seconds, float_seconds, time.monotonic() - loop_start)
            ),
        )


@click.command(cls=GroupedCommand, help=__doc__.split("\n\n")[0])
@option(
    "--workers",
    metavar="INT",
    type=COUNT,
    default=max(1, min(3, (os.cpu_count() or 1) - 1)),
    show_default="number of cores - 1, at most 3",
    help="Number of worker processes that read images in advance.",
)
@option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=0.01),
    default=1.0,
    help="Duration of an iteration without the reading of images.",
)
@option(
    "--iterations",
    metavar="INT",
    type=COUNT,
    default=8,
    help="Number of iterations that are timed in each case.",
)
@option("--batch", metavar="INT", type=COUNT, default=32, help="Number of images per iteration.")
@option(
    "--resolution", metavar="PIXELS", type=click.IntRange(min=16), default=512, help="Edge of the images."
)
@option("--images", metavar="INT", type=COUNT, default=128, help="Number of images in the zip file.")
def main(workers: int, seconds: float, iterations: int, batch: int, resolution: int, images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        zip_path = Path(folder) / "images.zip"
        bytes_per_image = write_images(zip_path, resolution, images)
        dataset = ImageFolderDataset(zip_path, use_labels=False).without_memory()
        thread_count = torch.get_num_threads()  # printed, since the matrix products use all of them
        click.echo(
            f"{batch} images of {resolution} pixels ({bytes_per_image / 1e3:.0f} kB) an iteration of"
            f" {seconds:g} s, {thread_count} threads"
        )
        for case_name, run_iteration in (
            ("elsewhere", lambda: time.sleep(seconds)),
            ("here", make_computation(seconds)),
        ):
            # 0: the training process reads the images itself
            for worker_count in (0, workers):
                measured_seconds = measure(dataset, batch, worker_count, iterations, run_iteration)
                waiting_text = (
                    f"waits {1e3 * measured_seconds.waited:7.2f} ms of {measured_seconds.iteration:6.3f} s:"
                    f" {measured_seconds.waited / measured_seconds.iteration:7.3%}"
                )
                click.echo(
                    f"{case_name:10s} {worker_count} workers  {waiting_text}; floats"
                    f" {1e3 * measured_seconds.floats:.0f} ms; first batch after"
                    f" {measured_seconds.first:.2f} s"
                )


if __name__ == "__main__":
    main()
