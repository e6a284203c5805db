"""Convert a network file (a pickle of EG3D, of which nothing is run, a file of ours or a run folder) to .safetensors or a plain state dict.

--out=X.safetensors is our format. --out=X.pt is a plain state dict for a checkout of EG3D; docs/checkpoints.md has the lines that load it.

\b
Example:
    python tools/convert.py assets/generator.safetensors --out=runs/example/generator.pt
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eg3d_rlhf.cli import GroupedCommand, option  # noqa: E402
from eg3d_rlhf.generators import find_network, load_networks  # noqa: E402
from eg3d_rlhf.pickles.stock import SUFFIXES, convert, foreign_sizes  # noqa: E402


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("file", type=click.Path(path_type=Path))
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Where to: .safetensors or .pt.")
@option("--only-ema", is_flag=True, help="Write G_ema alone.")
@option("--overwrite", is_flag=True, help="Replace an existing file.")
def main(file: Path, out: Path, only_ema: bool, overwrite: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out: expected a file ending in {' or '.join(SUFFIXES)}, got {out.name}. Choose one.")
    if out.exists() and not overwrite:
        raise ValueError(f"--out: expected a new file, got {out}, which exists. Choose another or add --overwrite.")
    source = find_network(file)
    click.echo(f"Reading {source}.")
    nets = load_networks(source)
    sizes = foreign_sizes(nets)
    if out.suffix != ".safetensors" and sizes:
        click.echo(f"Warning: a checkout of EG3D cannot build this generator, whose sizes it hard-wires: {', '.join(sizes)}.", err=True)
    counts = convert(nets, out, only_ema)
    click.echo(f"{out}: " + ", ".join(f"{name} {count} tensors" for name, count in counts.items()) + ", read back and equal.")


if __name__ == "__main__":
    main()
