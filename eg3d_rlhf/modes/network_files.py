"""Jobs on network files: `generator inspect` describes one, `generator convert` writes another format."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import GroupedCommand, file_hash, option

if TYPE_CHECKING:
    import torch

    from training import networks


def describe_file(source: str | Path | None) -> dict[str, Any]:
    """Describe the file itself: path, size in bytes, SHA-256; for a pickle also its protocol and globals.

    Raises: FileNotFoundError; ValueError for a pickle that is rejected, naming the globals that it imports.
    """
    from eg3d_rlhf.generators import find_network, pickles

    path = find_network(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such network file. Check the path.")
    facts: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "sha256": file_hash(path)}
    if path.suffix.lower() == ".pkl":
        # parsed without running any of its code
        snapshot = pickles.read(path)
        facts |= {"protocol": snapshot.protocol, "globals": dict(sorted(snapshot.name_counts.items()))}
    return facts


def describe_networks(source: str | Path | None, seeds: int = 256) -> dict[str, Any]:
    """Describe the networks in the file, with statistics of w over `seeds` latents. Raises: see
    `load_networks`.
    """
    from eg3d_rlhf.generators import find_network, load_networks, of

    nets = load_networks(find_network(source))
    G = nets.G_ema
    general = {
        "networks": {
            n: describe_module(m) for n in ("G", "D", "G_ema") if (m := getattr(nets, n)) is not None
        },
        "constructor": {"G": nets.G_kwargs, "D": nets.D_kwargs},
        "training_set": nets.training_set,
        "cur_nimg": nets.cur_nimg,
    }
    if not hasattr(G, "plane_layout"):  # a family without planes
        return general | {
            "generator": {
                name: getattr(of(G), name) for name in ("z_dim", "w_dim", "num_ws", "img_resolution", "level")
            }
        }
    planes = {"layout": G.plane_layout, "resolution": G.plane_resolution, "channels": G.plane_channels}
    return general | {
        "generator": {
            **{
                name: getattr(G, name)
                for name in (
                    "z_dim",
                    "c_dim",
                    "w_dim",
                    "num_ws",
                    "img_resolution",
                    "neural_rendering_resolution",
                )
            },
            "planes": planes,
            "superresolution": type(G.superresolution).__name__,
            "rendering_kwargs": G.rendering_kwargs,
        },
        "psi": psi_statistics(nets, seeds),
    }


def describe_module(module: "torch.nn.Module") -> dict[str, Any]:
    """Describe a module: class, numbers of tensors, parameters, buffer elements and non-finite elements, and
    the hash of its state.
    """
    import torch

    from training import networks

    # parameters and buffers
    state = module.state_dict()
    parameters = dict(module.named_parameters())
    return {
        "class": type(module).__name__,
        "tensors": len(state),
        "parameters": sum(p.numel() for p in parameters.values()),
        "buffers": sum(v.numel() for k, v in state.items() if k not in parameters),
        "not_finite": sum(int((~torch.isfinite(v)).sum()) for v in state.values()),
        "hash": networks.state_hash(module),
    }


def psi_statistics(nets: "networks.Networks", seeds: int) -> dict[str, float]:
    """Measure how far latents lie from the centre of truncation, w(psi) = w_avg + psi (w - w_avg).

    The mapping network is conditioned on the frontal camera.

    Returns: w_avg_norm; w_norm_mean, distance_mean, distance_std of |w| and |w - w_avg| over the seeds;
        centre_error = |mean w - w_avg|, small against distance_mean where w_avg is the mean for this camera;
        component_std, the standard deviation of a component of w, averaged over components.
    """
    from eg3d_rlhf.generators import ws_of_seeds

    G_ema: Any = nets.G_ema
    w_avg = G_ema.backbone.mapping.w_avg
    # psi is 1: the mapping network repeats w for every layer, so the first is enough
    w = ws_of_seeds(G_ema, range(seeds))[:, 0]  # [N, W]
    distance = (w - w_avg).norm(dim=1)
    return {
        "seeds": seeds,
        "w_avg_norm": float(w_avg.norm()),
        "w_norm_mean": float(w.norm(dim=1).mean()),
        "distance_mean": float(distance.mean()),
        "distance_std": float(distance.std(unbiased=False)),
        "centre_error": float((w.mean(dim=0) - w_avg).norm()),
        "component_std": float(w.std(dim=0, unbiased=False).mean()),
    }


def lines(description: dict[str, Any], indent: int = 0) -> list[str]:
    """Format a nested description, two spaces of indentation per level."""
    out = []
    # an empty dictionary is printed as a value
    for key, value in description.items():
        nested = isinstance(value, dict) and value
        out.append(
            f"{'  ' * indent}{key}:"
            + ("" if nested else f" {value:.6g}" if isinstance(value, float) else f" {value}")
        )
        out += lines(value, indent + 1) if nested else []
    return out


@click.command("inspect", cls=GroupedCommand)
@click.argument("file", type=click.Path(path_type=Path), required=False)
@option(
    "--n",
    metavar="LATENTS",
    type=click.IntRange(2, 100_000),
    default=256,
    help="Number of latents for the statistics of w.",
)
@option("--json", "as_json", is_flag=True, help="Print the description as JSON.")
def inspect_network(file: Path | None, n: int, as_json: bool) -> None:
    """Describe a network file: architecture, sizes, plane layout, truncation statistics, SHA-256, and
    every global that a pickle imports.

    FILE is a network file of ours, a pickle of EG3D (.pkl; its code is not run) or a run folder; without it,
    the bundled generator is described.

    \b
    Example:
        eg3d-rlhf generator inspect assets/generator.safetensors
    """
    # the file first: a rejected pickle raises an error here
    description = describe_file(file)
    description.update(describe_networks(file, n))
    click.echo(json.dumps(description, indent=1) if as_json else "\n".join(lines(description)))


@click.command("convert", cls=GroupedCommand)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write, .safetensors or .pt.",
)
@option("--only-ema", is_flag=True, help="Write only G_ema.")
@option("--overwrite", is_flag=True, help="Replace an existing file.")
@option(
    "--tri-grid",
    metavar="NUM",
    type=click.FloatRange(min=1, max=100),
    help=(
        "Convert to PanoHead's tri-grid, with slices along this many sides of the box. From 1.5 on the"
        " density is"
        " unchanged; 1 is PanoHead's value."
    ),
)
def convert(file: Path, out: Path, only_ema: bool, overwrite: bool, tri_grid: float | None) -> None:
    """Convert a network file (a pickle of EG3D, whose code is not run, a file of ours or a run folder) to
    .safetensors or a plain state dict.

    --out=X.safetensors is our format. --out=X.pt is a plain state dict for a checkout of EG3D;
    docs/reference/checkpoints.md has the lines that load it, and explains when to use --tri-grid: it turns a
    generator of EG3D into one of PanoHead's kind with the same shapes.

    \b
    Example:
        eg3d-rlhf generator convert assets/generator.safetensors --out=runs/example/generator.pt
    """
    from eg3d_rlhf.generators import find_network, load_networks
    from eg3d_rlhf.generators.conversion import check_suffix, foreign_sizes, to_tri_grid, write

    # fail before the network is read
    check_suffix(out)
    if out.exists() and not overwrite:
        raise ValueError(f"--out: {out} exists. Choose another file, or add --overwrite.")
    source = find_network(file)
    click.echo(f"Reading {source}.")
    nets = load_networks(source)
    if tri_grid is not None:
        nets, residual = to_tri_grid(nets, tri_grid)
        click.echo(
            f"Tri-grid of 3 slices along {tri_grid:g} sides of the box: relative difference to the"
            " features of the"
            f" planes: {residual:.2g}."
        )
    # sizes that differ from those in EG3D's code
    sizes = foreign_sizes(nets)
    if out.suffix != ".safetensors" and sizes:
        click.echo(
            "Warning: a checkout of EG3D cannot build this generator, because it hard-codes these sizes:"
            f" {', '.join(sizes)}.",
            err=True,
        )
    # number of tensors per network
    counts = write(nets, out, only_ema)
    click.echo(
        f"{out}: "
        + ", ".join(f"{name} {count} tensors" for name, count in counts.items())
        + "; the file was read back and compared equal."
    )
