"""Time and memory of a judge's calls: python benchmarks/judge_calls.py [--pairs=1000] [--delay=0.5].

A fake server in a process of its own takes DELAY seconds for each answer. Pairs are formed of assets whose
montages have their full size, so a call carries two images. The script prints the time of all calls in both
orders beside the ideal time, and the greatest memory of the client's process.
"""

import resource
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import click
import numpy as np

from eg3d_rlhf.people.judge.judge import Judge, JudgedPair
from eg3d_rlhf.people.judge.renders import RenderCache, StoredRenders
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.people.judge.view_maps import ViewMaps
from training.progress import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def noisy_maps(seed: int) -> ViewMaps:
    """Return maps of a disc with a fine pattern, whose montage is as large as that of a textured asset."""
    resolution = Rig().resolution
    y, x = np.mgrid[-1 : 1 : resolution * 1j, -1 : 1 : resolution * 1j]
    opacity = np.repeat(((x**2 + y**2) < 0.6)[None].astype(np.float32), 9, axis=0)
    rng = np.random.default_rng(seed)
    pattern = np.kron(rng.uniform(0, 1, (9, resolution // 4, resolution // 4, 3)), np.ones((1, 4, 4, 1)))
    normals = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (*opacity.shape, 3))
    return ViewMaps(pattern * opacity[..., None], normals * opacity[..., None], opacity)


@click.command()
@click.option("--pairs", "pair_count", default=1000, help="Number of pairs.")
@click.option("--delay", default=0.5, help="Seconds of the server for an answer.")
@click.option("--parallel", default=8, help="Calls at a time.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder of the renders; only renders them.")
def main(pair_count: int, delay: float, parallel: int, folder: Path | None) -> None:
    """Measure the time of a judge's calls against the ideal time."""
    from tests.people.judge.fake_server import FakeServer

    # the smallest number of assets with enough pairs
    asset_count = next(n for n in range(2, 1000) if n * (n - 1) // 2 >= pair_count)
    is_renderer = folder is not None
    folder = folder or Path(tempfile.mkdtemp())
    if not is_renderer:
        # In a process of its own, so that its memory is not that of the calls, whose renders are cached.
        subprocess.run([sys.executable, __file__, f"--pairs={pair_count}", f"--folder={folder}"], check=True)
    cache = RenderCache(folder)
    renders: list[StoredRenders] = [
        cache.of_maps({"asset": str(seed)}, lambda seed=seed: noisy_maps(seed))
        for seed in tqdm(range(asset_count), desc="rendering", unit="asset")
    ]
    if is_renderer:
        return
    pairs = [
        JudgedPair(key=str(number), first=renders[first], second=renders[second])
        for number, (first, second) in enumerate(list(combinations(range(asset_count), 2))[:pair_count])
    ]
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with FakeServer(answer="first", delay=delay) as server:
        settings = JudgeSettings(
            url=server.url, model="fake", parallel=parallel, answers=folder / "answers.jsonl"
        )
        with (
            Judge(settings, click.echo) as judge,
            tqdm(total=pair_count, desc="judging", unit="pair") as progress_bar,
        ):
            start = time.monotonic()
            processor_start = time.process_time()
            judge.compare(pairs, lambda verdict: progress_bar.update() and None)
            seconds = time.monotonic() - start
            processor_seconds = time.process_time() - processor_start
    ideal = 2 * pair_count * delay / parallel
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(
        f"{judge.counts.calls} calls of {judge.counts.image_bytes / judge.counts.calls / 1e6:.2f} MB in"
        f" {seconds:.1f} s, {seconds / ideal:.3f} times the ideal {ideal:g} s; {processor_seconds:.1f} s of"
        f" the processor; {memory:.0f} MB ({memory_before:.0f} MB before the first call)"
    )


if __name__ == "__main__":
    main()
