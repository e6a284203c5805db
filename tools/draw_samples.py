"""Draw contact sheets of a generator: images.png (beside as many of the data, under their cameras) and shapes.png (from two views).

\b
Example:
    python tools/draw_samples.py --data=synthetic:heads64@n=64 --seeds=0-7 --shapes=4 --outdir=out
"""

import json

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.core.seeds import JUDGE
from eg3d_rlhf.evaluation.contact_sheet import image_sheet, shape_sheet
from eg3d_rlhf.experiments.media.rendering import parse_seeds, png
from eg3d_rlhf.generators import load_generator
from training.dataset import ImageFolderDataset
from training.storage import write_atomic
from training.synthetic_heads import resolve_dataset


@click.command(cls=GroupedCommand, help=__doc__)
@option("--outdir", metavar="DIR", type=click.Path(file_okay=False), required=True, help="Folder to write into.")
@option("--network", metavar="PATH", type=click.Path(), default=None, show_default="the bundled generator", help="Network or run folder.")
@option("--data", metavar="ZIP|DIR|synthetic:heads64", default="synthetic:heads64", help="Images to show beside.")
@option("--seeds", metavar="LIST", default=f"{JUDGE.first}-{JUDGE.first + 31}", help="Seeds of the images, such as 0,2-5.")
@option("--shapes", metavar="INT", type=click.IntRange(0), default=16, help="How many of the seeds to show as shapes.")
@option("--trunc", "--psi", "psi", metavar="FLOAT", type=click.FloatRange(min=0), default=0.7, help="Truncation psi.")
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(outdir, network, data, seeds, shapes, psi, device, dry_run) -> None:
    with naming("--seeds"):
        numbers = parse_seeds(seeds)
    if dry_run:
        settings = {"outdir": str(outdir), "network": str(network or "bundled"), "data": data, "seeds": numbers, "shapes": shapes,
                    "psi": psi, "device": device}
        click.echo(json.dumps(settings, indent=1))
        return
    with naming("--network"):
        generator = load_generator(network, choose_device(device)).generator
    with naming("--data"):
        dataset = ImageFolderDataset(resolve_dataset(data), use_labels=True, c_dim=25)
        if len(dataset) < len(numbers):
            raise ValueError(f"expected at least {len(numbers)} images, got {len(dataset)}. Name fewer --seeds.")
    sheets = {"images.png": image_sheet(generator, dataset, numbers, psi)}
    if shapes:
        sheets["shapes.png"] = shape_sheet(generator, numbers[:shapes], psi)
    for name, picture in sheets.items():
        write_atomic(f"{outdir}/{name}", png(picture))
    click.echo(f"{outdir}: {', '.join(sheets)}")


if __name__ == "__main__":
    main()
