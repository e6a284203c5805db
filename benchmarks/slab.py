"""The slab rows of `python -m benchmarks` for one or both plane layouts, as one record.

    python benchmarks/slab.py --json

The separable density slab against point-wise sampling, which decodes every grid point as EG3D does: bilinear samples of the three planes,
their mean, a hidden layer, and all outputs (density and colour features). Both start from the same random planes, so one synthesis pass is
shared and not counted. About a minute per layout on two CPU cores.
"""

import json
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a plain checkout, installed or not

import benchmarks  # noqa: E402, F401 (before torch: says how threads wait)

# isort: split
import torch  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.rows_field import LAYOUTS, ROWS, SLAB  # noqa: E402
from benchmarks.session import Options, run_row  # noqa: E402
from eg3d_rlhf.core.cli import choose_device, user_errors  # noqa: E402

PHASES = {"forward": "slab forward, from planes", "train": "slab forward + backward to planes and decoder"}


def measure_layout(layout: str, size: str, options: Options) -> dict:
    """Times, memory and agreement of one plane layout."""
    found = {}
    for phase, name in PHASES.items():
        (row,) = (row for row in ROWS if (row.name, row.size) == (name + LAYOUTS[layout], size))
        click.echo(f"{row.name} ({size})", err=True)
        found[phase] = run_row(row, options)
    train = found["train"]
    extra = {"fast": train["extra_memory_mb"], "reference": train["reference_extra_memory_mb"]}
    spread = {"median_s": "_s", "min_s": "_min_s", "max_s": "_max_s"}
    times = {
        phase: {path: {name: record[path + key] for name, key in spread.items()} for path in extra} for phase, record in found.items()
    }
    return {
        "forward_ratio": found["forward"]["ratio"], "train_ratio": train["ratio"], "memory_ratio": extra["fast"] / extra["reference"],
        "max_abs_error": found["forward"]["max_abs_error"], "grad_rel_error": train["gradient_error"], **times, "train_extra_mb": extra,
    }


def table(record: dict) -> str:
    """The record in lines."""
    lines = [f"slab {record['shape']} (z, y, x), {record['size']} size, {record['threads']} threads"]
    for layout, result in record["layouts"].items():
        lines.append(f"{layout}: max |error| {result['max_abs_error']:.1e}, gradients {result['grad_rel_error']:.1e} of the largest")
        for phase in PHASES:
            fast, slow = (f"{t['median_s']:.3f} s ({t['min_s']:.3f}..{t['max_s']:.3f})" for t in result[phase].values())
            lines.append(f"  {phase:8s} {fast}   point-wise {slow}   {result[f'{phase}_ratio']:5.1f} times faster")
        fast, slow = result["train_extra_mb"].values()
        lines.append(f"  memory   {fast:.0f} MB   point-wise {slow:.0f} MB   ratio {result['memory_ratio']:.3f}")
    return "\n".join(lines)


@click.command(help=__doc__.splitlines()[0])
@click.option("--layout", type=click.Choice([*LAYOUTS, "both"]), default="eg3d", show_default=True, help="Plane projections.")
@click.option("--size", type=click.Choice(list(SLAB)), default="full", show_default=True, help="Planes, decoder and grid.")
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True, metavar="ROUNDS", help="Timed rounds of each path.")
@click.option("--threads", type=click.IntRange(1, 256), default=None, metavar="N", help="CPU threads; torch's choice when left out.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where both paths run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record and nothing else on stdout.")
def main(layout: str, size: str, repeats: int, threads: int | None, device: str, as_json: bool) -> None:
    with user_errors():
        choose_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    options = Options(device=device, repeats=repeats)
    results = {name: measure_layout(name, size, options) for name in (LAYOUTS if layout == "both" else (layout,))}
    worst = {key: min(result[key] for result in results.values()) for key in ("forward_ratio", "train_ratio")}
    worst |= {key: max(result[key] for result in results.values()) for key in ("memory_ratio", "max_abs_error", "grad_rel_error")}
    about = {"size": size, "shape": list(SLAB[size].spec.shape), "repeats": repeats, "device": device, "threads": torch.get_num_threads()}
    record = {**worst, "layouts": results, **about, "versions": report.versions(device)}
    click.echo(json.dumps(record, indent=1) if as_json else table(record))


if __name__ == "__main__":
    main()
