"""Separable density slab against point-wise sampling: seconds, extra memory and agreement, forward and forward + backward.

    python benchmarks/slab.py --json

The reference decodes every grid point as EG3D does: bilinear samples of the three planes, their mean, a hidden layer, and all outputs
(density and colour features). Both paths start from the same planes, so one synthesis pass is shared and not counted. They alternate in one
process; the memory of each is measured in a process of its own. Planes and decoder are random; no checkpoint is needed.
About a minute per layout on two CPU cores.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a plain checkout, installed or not

from eg3d_rlhf.sigma import DecoderWeights, SlabSpec, sigma_from_planes  # noqa: E402
from eg3d_rlhf.sigma.slab import plane_features  # noqa: E402
from training.rendering.renderer import generate_planes  # noqa: E402

_POINT_CHUNK = 1 << 17  # points decoded at once by the reference without gradients; faster on a CPU than EG3D's own 10**6
_LAYOUTS = ("eg3d", "fixed")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is sampled: the planes, the decoder and the grid."""

    plane: int  # texels per side
    channels: int
    hidden: int
    outputs: int  # density and colour features
    spec: SlabSpec


SIZES = {
    "full": Size(plane=256, channels=32, hidden=64, outputs=33, spec=SlabSpec()),
    "bundled": Size(plane=64, channels=16, hidden=64, outputs=17, spec=SlabSpec(resolution=64)),
}


class Case:
    """Leaves (planes and the decoder's four tensors), and the two paths from them to sigma_raw [1, D, H, W]."""

    def __init__(self, size: Size, layout: str, device: str):
        rng = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=rng) * scale).to(device).requires_grad_()

        self.spec, self.axes = size.spec, generate_planes(layout).to(device)
        self.planes = normal(1, 3, size.channels, size.plane, size.plane)
        self.w0, self.b0 = normal(size.hidden, size.channels, scale=size.channels**-0.5), normal(size.hidden, scale=0.1)
        self.w1, self.b1 = normal(size.outputs, size.hidden, scale=size.hidden**-0.5), normal(size.outputs, scale=0.1)
        self.cotangent = torch.randn((1, *size.spec.shape), generator=rng).to(device)

    def separable(self) -> torch.Tensor:
        weights = DecoderWeights(self.w0, self.b0, self.w1[0], self.b1[0])
        return sigma_from_planes(self.planes, self.axes, weights, self.spec, impl="separable")

    def pointwise(self) -> torch.Tensor:
        x, y, z = (axis.to(self.planes) for axis in self.spec.axes())
        points = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 3)
        chunk = len(points) if torch.is_grad_enabled() else _POINT_CHUNK
        return torch.cat([self._decode(part)[0] for part in points.split(chunk)], dim=1).view(1, *self.spec.shape)

    def _decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma_raw [1, P] and colour features [1, P, outputs - 1], as EG3D's decoder gives them."""
        features = plane_features(self.planes, self.axes, points, 1.0).transpose(1, 2)
        out = F.linear(F.softplus(F.linear(features, self.w0, self.b0)), self.w1, self.b1)
        return out[..., 0], torch.sigmoid(out[..., 1:]) * 1.002 - 0.001

    def forward(self, path: str) -> torch.Tensor:
        with torch.no_grad():
            return getattr(self, path)()

    def train(self, path: str) -> list[torch.Tensor]:
        """Gradients of planes, hidden layer and density row."""
        gradients = torch.autograd.grad(getattr(self, path)(), [self.planes, self.w0, self.b0, self.w1, self.b1], self.cotangent)
        return [*gradients[:3], gradients[3][0], gradients[4][:1]]


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float | list[float]]:
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "all_s": values}


def alternate(work: Callable[[str], object], repeats: int, device: str) -> tuple[dict[str, dict], dict[str, object]]:
    """Seconds of both paths, taken in turns so that a busy spell of the machine meets both; and what each returned."""
    times: dict[str, list[float]] = {"separable": [], "pointwise": []}
    results: dict[str, object] = {}
    for _ in range(repeats):
        for path, values in times.items():
            results.pop(path, None)  # freed before the clock starts
            values.append(seconds(lambda path=path: results.update({path: work(path)}), device))
    return {path: summary(values) for path, values in times.items()}, results


def warm_up(size: Size, layout: str, device: str) -> None:
    """Both paths on a tiny case, so that libraries and thread pools are up."""
    tiny = Size(plane=8, channels=size.channels, hidden=size.hidden, outputs=size.outputs, spec=SlabSpec.cube(8))
    for path in ("separable", "pointwise"):
        Case(tiny, layout, device).train(path)


def measure_layout(size_name: str, layout: str, device: str, repeats: int) -> dict:
    """Everything about one plane layout."""
    case = Case(SIZES[size_name], layout, device)
    warm_up(SIZES[size_name], layout, device)
    click.echo(f"{layout}: {repeats} rounds forward", err=True)
    forward, sigma = alternate(case.forward, repeats, device)
    click.echo(f"{layout}: {repeats} rounds forward + backward", err=True)
    train, gradients = alternate(case.train, repeats, device)
    click.echo(f"{layout}: memory", err=True)
    memory = {path: extra_memory_in_subprocess(size_name, layout, device, path) for path in ("separable", "pointwise")}
    relative = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients["separable"], gradients["pointwise"], strict=True)]
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
    case = Case(SIZES[size_name], layout, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.train(path)
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark at the present size
    except OSError:
        before = resident_bytes("VmHWM")  # not allowed here: count from the old mark, which the import and the inputs have set
    case.train(path)
    return max(resident_bytes("VmHWM") - before, 1)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from /proc (Linux), else the peak that getrusage knows."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
