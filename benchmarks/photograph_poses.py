"""Measure the speed and the memory of `data poses`.

    python -m benchmarks.photograph_poses               1,000 photographs of 1 megapixel, one process
    python -m benchmarks.photograph_poses --photographs=50 --jobs=2

Rendered heads are pasted on backgrounds, at several sizes and turns, and written as JPEG files. The command
then runs in a process of its own. Printed are the photographs per second, and per second of processor time,
which does not depend on other jobs of the machine, and the largest memory. The processor time of the start,
which imports PyTorch and loads the networks, is measured with one photograph and subtracted.
"""

import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.cli import GroupedCommand, option
from training.heads import people
from training.progress import tqdm
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, look_at

COUNT = click.IntRange(min=1)
SIZE = (1200, 900)  # width and height of a photograph, pixels
_HEADS = 4  # number of rendered heads
_YAWS = (-30, 0, 30)  # degrees, views of each head
_RENDERED_SIZE = 384  # pixels per edge of a rendered head


class Usage(NamedTuple):
    """Time and memory of a process."""

    seconds: float
    processor_seconds: float  # of all threads and worker processes
    peak_gib: float  # largest sum of the memory of all processes, sampled


def render_heads() -> list[PIL.Image.Image]:
    """Render views of a few heads on white."""
    latents = np.random.default_rng(0).standard_normal((_HEADS, people.LATENT))
    images = []
    for head in people.heads_from_latents(people.normalise_latents(latents)):
        for yaw in _YAWS:
            horizontal = torch.tensor([[math.pi / 2 + math.radians(yaw)]], dtype=torch.float64)
            position = camera_position(horizontal, torch.full_like(horizontal, math.pi / 2), FFHQ_RADIUS)
            pose = look_at(position, torch.zeros(3, dtype=torch.float64))[0].numpy()
            pixels, _ = people.render_head(head, pose, FFHQ_FOCAL, _RENDERED_SIZE)
            images.append(PIL.Image.fromarray((pixels * 255).round().astype(np.uint8)))
    return images


def write_photographs(folder: Path, photograph_count: int) -> None:
    """Write photographs of one head each, at a random place, size and small turn, as JPEG files."""
    heads = render_heads()
    for index in tqdm(range(photograph_count), desc="writing photographs", unit="photograph"):
        rng = np.random.default_rng(index)
        blocks = PIL.Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        photograph = blocks.resize(SIZE, PIL.Image.Resampling.BICUBIC)
        side = int(rng.integers(400, 800))
        head = heads[index % len(heads)].resize((side, side)).rotate(rng.uniform(-15, 15), fillcolor="white")
        place = (int(rng.integers(0, SIZE[0] - side)), int(rng.integers(0, SIZE[1] - side)))
        photograph.paste(head, place)
        photograph.save(folder / f"{index:05}.jpg", quality=92)


def memory_of(process_id: int) -> int:
    """Return the bytes of memory that a process and its children use now."""
    total = 0
    try:
        with open(f"/proc/{process_id}/statm") as file:
            total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except OSError:  # the process has ended
        return total
    return total + sum(memory_of(int(child)) for child in children)


def measure(photographs: list[Path] | Path, outdir: Path, jobs: int) -> Usage:
    """Run `data poses` on a folder or on files, and measure it.

    Raises: RuntimeError if the command fails.
    """
    sources = [photographs] if isinstance(photographs, Path) else photographs
    words = ["data", "poses", *map(str, sources), f"--outdir={outdir}", f"--jobs={jobs}"]
    before = os.times()
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "eg3d_rlhf", *words], stdout=subprocess.DEVNULL)
    peak = 0
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(0.1):
            peak = max(peak, memory_of(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    exit_code = process.wait()
    finished.set()
    sampler.join()
    seconds = time.monotonic() - start
    after = os.times()
    if exit_code:
        raise RuntimeError(f"data poses ended with exit code {exit_code}")
    # the processor time of children that the command itself has waited for is included
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return Usage(seconds, processor, peak / 2**30)


@click.command("photograph-poses", cls=GroupedCommand, help=__doc__)
@option("--photographs", metavar="INT", type=COUNT, default=1000, help="Number of photographs.")
@option("--jobs", metavar="INT", type=COUNT, default=1, help="Number of processes of the command.")
def main(photographs: int, jobs: int) -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "photos").mkdir()
        write_photographs(folder / "photos", photographs)
        start_usage = measure([folder / "photos" / "00000.jpg"], folder / "start", 1)
        usage = measure(folder / "photos", folder / "set", jobs)
        work_seconds = max(usage.processor_seconds - start_usage.processor_seconds, 1e-9)
        kept = len(list((folder / "set").glob("*.png")))
        click.echo(
            f"{photographs} photographs of {SIZE[0]} x {SIZE[1]} pixels, {kept} kept, {jobs} processes:"
            f" {photographs / usage.seconds:.2f} a second, {(photographs - 1) / work_seconds:.2f} a second of"
            f" processor time; at most {usage.peak_gib:.2f} GiB (one photograph: {start_usage.peak_gib:.2f})"
        )


if __name__ == "__main__":
    main()
