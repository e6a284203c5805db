"""Separable density slab against point-wise sampling: seconds, extra memory and agreement, forward and forward + backward.

    python benchmarks/slab.py --json

The slab rows of `python -m benchmarks` in more detail: both plane layouts, and in the point-wise path pieces that suit a CPU's caches. The
reference decodes every grid point as EG3D does: bilinear samples of the three planes, their mean, a hidden layer, and all outputs (density
and colour features). Both paths start from the same planes, so one synthesis pass is shared and not counted. They alternate in one process;
the memory of each is measured in a process of its own. Planes and decoder are random; no checkpoint is needed.
About a minute per layout on two CPU cores.
"""

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a plain checkout, installed or not

import torch_utils  # noqa: E402, F401 (before torch: sets OMP_WAIT_POLICY)

# isort: split
import torch  # noqa: E402

from benchmarks.memory import PeakMeter  # noqa: E402
from benchmarks.planes import PlaneField, PlaneSize, sizes  # noqa: E402
from benchmarks.timing import clock, summary  # noqa: E402
from eg3d_rlhf.sigma import SlabSpec  # noqa: E402

_POINT_CHUNK = 1 << 17  # points decoded at once by the reference without gradients; faster on a CPU than EG3D's own 10**6
_LAYOUTS = ("eg3d", "fixed")
_PATHS = ("separable", "pointwise")
SIZES = sizes(SlabSpec(), SlabSpec(resolution=64))


def alternate(work: Callable[[str], object], repeats: int, device: str) -> tuple[dict[str, dict], dict[str, object]]:
    """Seconds of both paths, taken in turns so that a busy spell of the machine meets both; and what each returned."""
    times: dict[str, list[float]] = {path: [] for path in _PATHS}
    results: dict[str, object] = {}
    for _ in range(repeats):
        for path, values in times.items():
            results.pop(path, None)  # freed before the clock starts
            values.append(clock(lambda path=path: results.update({path: work(path)}), device).wall)
    return {path: summary(values) for path, values in times.items()}, results


def warm_up(size: PlaneSize, layout: str, device: str) -> None:
    """Both paths on a tiny case, so that libraries and thread pools are up."""
    tiny = dataclasses.replace(size, plane=8, spec=SlabSpec.cube(8))
    for path in _PATHS:
        PlaneField(tiny, layout, device, _POINT_CHUNK).train(path)


def measure_layout(size_name: str, layout: str, device: str, repeats: int) -> dict:
    """Everything about one plane layout."""
    field = PlaneField(SIZES[size_name], layout, device, _POINT_CHUNK)
    warm_up(SIZES[size_name], layout, device)
    click.echo(f"{layout}: {repeats} rounds forward", err=True)
    forward, sigma = alternate(field.forward, repeats, device)
    click.echo(f"{layout}: {repeats} rounds forward + backward", err=True)
    whole = PlaneField(SIZES[size_name], layout, device, 10**9)  # with gradients all points at once
    train, trained = alternate(whole.train, repeats, device)
    click.echo(f"{layout}: memory", err=True)
    memory = {path: extra_memory_in_subprocess(size_name, layout, device, path) for path in _PATHS}
    gradients = {path: result[1] for path, result in trained.items()}
    relative = [((a - b).norm() / b.norm()).item() for a, b in zip(*(gradients[path].values() for path in _PATHS), strict=True)]
    return {
        "forward_ratio": forward["pointwise"]["median_s"] / forward["separable"]["median_s"],
        "train_ratio": train["pointwise"]["median_s"] / train["separable"]["median_s"],
        "memory_ratio": memory["separable"] / memory["pointwise"],
        "max_abs_error": (sigma["separable"] - sigma["pointwise"]).abs().max().item(),
        "max_abs_sigma": sigma["pointwise"].abs().max().item(),
        "grad_rel_error": max(relative),
        "forward": forward,
        "train": train,
        "train_extra_bytes": memory,
    }


def extra_memory_in_subprocess(size_name: str, layout: str, device: str, path: str) -> int:
    """Peak bytes above the warm state while one training step of the path runs in a fresh process."""
    command = [sys.executable, __file__, "--size", size_name, "--layout", layout, "--device", device]
    command += ["--threads", str(torch.get_num_threads()), "--memory-of", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"the memory measurement of the {path} path failed:\n{done.stderr}")
    return json.loads(done.stdout)


def extra_memory(size_name: str, layout: str, device: str, path: str) -> int:
    """As above, in this process: resident memory on a CPU, allocated memory on CUDA."""
    warm_up(SIZES[size_name], layout, device)
    field = PlaneField(SIZES[size_name], layout, device, 10**9)
    meter = PeakMeter(device)
    field.train(path)
    return meter.extra_bytes()


def measure(layouts: tuple[str, ...], size_name: str, device: str, repeats: int) -> dict:
    """The record that --json prints; the ratios and errors at the top are the worst of the layouts."""
    results = {layout: measure_layout(size_name, layout, device, repeats) for layout in layouts}
    size = SIZES[size_name]
    worst = {key: min(result[key] for result in results.values()) for key in ("forward_ratio", "train_ratio")}
    worst |= {key: max(result[key] for result in results.values()) for key in ("memory_ratio", "max_abs_error", "grad_rel_error")}
    return {
        **worst,
        "layouts": results,
        "size": size_name,
        "shape": list(size.spec.shape),
        "planes": [3, size.channels, size.plane, size.plane],
        "hidden": size.hidden,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
    }


def report(record: dict) -> str:
    depth, height, width = record["shape"]
    lines = [f"slab {width} x {height} x {depth} (x, y, z), {record['size']} size, {record['device']}, {record['threads']} threads"]
    for layout, result in record["layouts"].items():
        error, largest, gradients = (result[key] for key in ("max_abs_error", "max_abs_sigma", "grad_rel_error"))
        lines.append(f"{layout}: max |error| {error:.1e} of {largest:.2f}, gradients {gradients:.1e} relative")
        for phase in ("forward", "train"):
            fast, slow = result[phase]["separable"], result[phase]["pointwise"]
            lines.append(
                f"  {phase:8s} {fast['median_s']:7.3f} s ({fast['min_s']:.3f}..{fast['max_s']:.3f})   point-wise {slow['median_s']:7.3f} s "
                f"({slow['min_s']:.3f}..{slow['max_s']:.3f})   {result[f'{phase}_ratio']:5.1f} times faster"
            )
        extra = {path: count / 2**20 for path, count in result["train_extra_bytes"].items()}
        ratio = result["memory_ratio"]
        lines.append(f"  memory   {extra['separable']:.0f} MiB   point-wise {extra['pointwise']:.0f} MiB   ratio {ratio:.3f}")
    return "\n".join(lines)


@click.command(help=__doc__.splitlines()[0])
@click.option("--layout", type=click.Choice([*_LAYOUTS, "both"]), default="eg3d", show_default=True, help="Plane projections.")
@click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True, help="Planes, decoder and grid.")
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True, metavar="ROUNDS", help="Timed rounds of each path.")
@click.option("--threads", type=click.IntRange(1, 256), default=None, metavar="N", help="CPU threads; torch's choice when left out.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where both paths run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record and nothing else on stdout.")
@click.option("--memory-of", type=click.Choice(["separable", "pointwise"]), default=None, hidden=True)
def main(layout: str, size: str, repeats: int, threads: int | None, device: str, as_json: bool, memory_of: str | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device: expected a CUDA device, found none. Use --device cpu.")
    if threads:
        torch.set_num_threads(threads)
    if memory_of:
        click.echo(json.dumps(extra_memory(size, layout, device, memory_of)))
        return
    record = measure(_LAYOUTS if layout == "both" else (layout,), size, device, repeats)
    click.echo(json.dumps(record, indent=1) if as_json else report(record))


if __name__ == "__main__":
    main()
