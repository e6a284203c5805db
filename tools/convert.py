"""Convert a network file (a pickle of EG3D, of which nothing is run, a file of ours or a run folder) to .safetensors or a plain state dict.

--out=X.safetensors is our format. --out=X.pt is a plain state dict for a checkout of EG3D; docs/checkpoints.md has the lines that load it.
--tri-grid makes a generator of EG3D one of PanoHead's kind with the same shapes; docs/zoo.md says when.

\b
Example:
    python tools/convert.py assets/generator.safetensors --out=runs/example/generator.pt
"""

import inspect
import io
from pathlib import Path
from typing import Any

import _repository  # noqa: F401
import click
import torch

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.generators import find_network, load_networks
from eg3d_rlhf.generators.conversion import to_tri_grid
from training import networks, storage
from training.superresolution import SuperresolutionHybrid, module_by_name
from training.triplane import TriPlaneGenerator

OURS = ("plane_resolution", "plane_channels", "plane_layout", "decoder_hidden_dim", "decoder_features", "neural_rendering_resolution")
SUFFIXES = (".safetensors", ".pt", ".pth")


def foreign_sizes(nets: networks.Networks) -> list[str]:
    """What of a generator EG3D hard-wires differently, as 'name = value'; empty where a checkout of EG3D can build it."""
    defaults = {k: p.default for k, p in inspect.signature(TriPlaneGenerator).parameters.items()}
    sizes = ("plane_resolution", "plane_channels", "decoder_hidden_dim", "decoder_features")
    found = [] if nets.architecture == networks.EG3D else [f"architecture = {nets.architecture}"]
    found += [f"{k} = {nets.G_kwargs[k]}" for k in sizes if nets.G_kwargs.get(k, defaults[k]) != defaults[k]]
    sr, module = nets.G_kwargs.get("sr_kwargs") or {}, module_by_name(nets.G_kwargs["rendering_kwargs"]["superresolution_module"])
    if not issubclass(module, SuperresolutionHybrid):
        found.append(f"superresolution_module = {module.__name__}")
    else:
        built_in = {"input_resolution": module.default_input_resolution, "block_channels": list(module.default_block_channels)}
        found += [f"sr_kwargs.{k} = {sr[k]}" for k, v in built_in.items() if k in sr and sr[k] not in (None, v)]
    if nets.G_kwargs["w_dim"] != 512:
        found.append(f"w_dim = {nets.G_kwargs['w_dim']}")
    return found


def stock_content(nets: networks.Networks, only_ema: bool = False) -> dict:
    """Plain containers and tensors: 'G', 'D', 'G_ema' (state dicts), 'G_kwargs', 'D_kwargs' (EG3D's constructor arguments), 'plane_axes'
    [3, 3, 3], 'neural_rendering_resolution', 'training_set' (JSON-able)."""
    sr = {k: v for k, v in (nets.G_kwargs.get("sr_kwargs") or {}).items() if k not in ("input_resolution", "block_channels")}
    G_ema: Any = nets.G_ema
    content: dict = {
        "G_kwargs": {**{k: v for k, v in nets.G_kwargs.items() if k not in OURS}, "sr_kwargs": sr}, "D_kwargs": nets.D_kwargs,
        "plane_axes": G_ema.renderer.plane_axes.detach().cpu().clone(), "training_set": nets.training_set,
        "neural_rendering_resolution": G_ema.neural_rendering_resolution,
    }
    std = nets.training_set.get("label_std")
    for name in ("G_ema",) if only_ema else ("G", "D", "G_ema"):
        module = getattr(nets, name)
        if module is None:
            continue
        state = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        if name != "D" and std is not None:  # training adds it to G
            state["dataset_label_std"] = torch.tensor(std, dtype=torch.float32)
        content[name] = state
    return content


def check_suffix(out: Path) -> None:
    """Raise ValueError for a file of another kind."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out: expected a file ending in {' or '.join(SUFFIXES)}, got {out.name}. Choose one.")


def convert(nets: networks.Networks, out: Path, only_ema: bool = False) -> dict[str, int]:
    """Write networks in the format of out's suffix: our .safetensors, or .pt (`stock_content`), and read them back to compare.

    Returns: network -> number of tensors.
    Raises: ValueError for another suffix; OSError.
    """
    check_suffix(out)
    names = [n for n in (("G_ema",) if only_ema else ("G", "D", "G_ema")) if getattr(nets, n) is not None]
    if out.suffix == ".safetensors":
        networks.save(out, nets, only_ema)
        again = load_networks(out)
        states = {n: getattr(again, n).state_dict() for n in names}
    else:
        buffer = io.BytesIO()
        torch.save(stock_content(nets, only_ema), buffer)
        storage.write_atomic(out, buffer.getvalue())
        again = torch.load(out, weights_only=True)
        states = {n: again[n] for n in names}
    for name in names:
        for key, tensor in getattr(nets, name).state_dict().items():
            if not torch.equal(states[name][key], tensor.cpu()):
                raise OSError(f"{out}: expected {name}.{key} as it was written, got other numbers. Check the disk.")
    return {n: len(states[n]) for n in names}


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("file", type=click.Path(path_type=Path))
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where to: .safetensors or .pt.")
@option("--only-ema", is_flag=True, help="Write G_ema alone.")
@option("--overwrite", is_flag=True, help="Replace an existing file.")
@option(
    "--tri-grid", metavar="NUM", type=click.FloatRange(min=1, max=100),
    help="Convert to PanoHead's kind, its slices along so many sides of the box: from 1.5 on the density is the same, 1 is PanoHead's own.",
)
def main(file: Path, out: Path, only_ema: bool, overwrite: bool, tri_grid: float | None) -> None:
    check_suffix(out)
    if out.exists() and not overwrite:
        raise ValueError(f"--out: expected a new file, got {out}, which exists. Choose another or add --overwrite.")
    source = find_network(file)
    click.echo(f"Reading {source}.")
    nets = load_networks(source)
    if tri_grid is not None:
        nets, residual = to_tri_grid(nets, tri_grid)
        click.echo(f"Tri-grid of 3 slices along {tri_grid:g} sides of the box: features within {residual:.2g} of the planes', relative.")
    sizes = foreign_sizes(nets)
    if out.suffix != ".safetensors" and sizes:
        click.echo(f"Warning: a checkout of EG3D cannot build this generator, whose sizes it hard-wires: {', '.join(sizes)}.", err=True)
    counts = convert(nets, out, only_ema)
    click.echo(f"{out}: " + ", ".join(f"{name} {count} tensors" for name, count in counts.items()) + ", read back and equal.")


if __name__ == "__main__":
    main()
