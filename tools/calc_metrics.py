"""Distances between a generator's images and a dataset's, printed as JSON lines.

With --inception=FILE (a TorchScript detector of yours, as FID pipelines use it) they are FID and KID. Without it the bundled feature
network of synthetic heads stands in, and the figures are called frechet_offline and kernel_offline: they compare generators of such heads
with each other, never with published FIDs. Nothing is downloaded.

\b
Metrics:
    fid, kid                  on --n generated images against the whole set
    fid50k_full, kid50k_full  the same on 50,000, under EG3D's names

\b
Example:
    python tools/calc_metrics.py --data=synthetic:heads64@n=64 --metrics=fid,kid --n=64
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.evaluation import MetricOptions, append_records, evaluate, training_options
from eg3d_rlhf.measures.features import load_features
from training.dataset import ImageFolderDataset
from training.synthetic_heads import resolve_dataset

BUNDLED_DATA = "synthetic:heads64"


@click.command(cls=GroupedCommand, help=__doc__)
@option("--network", metavar="PATH", type=click.Path(path_type=Path), default=None, show_default="the bundled generator", group="What",
        help="Generator file or run folder.")
@option("--data", metavar="PATH|NAME", default=None, show_default="the run's own", group="What",
        help="Folder, zip or synthetic:heads<R>@n=...")
@option("--mirror", metavar="BOOL", type=bool, default=None, show_default="the run's own", group="What",
        help="Count every real image mirrored as well, with mirrored poses.")
@option("--inception", metavar="FILE", type=click.Path(path_type=Path), default=None, show_default="the bundled features", group="What",
        help="TorchScript detector: net(uint8 images, return_features=True).")
@option("--metrics", metavar="LIST", default="fid,kid", group="What", help="Comma-separated; see above.")
@option("--n", metavar="IMAGES", type=click.IntRange(min=2), default=None, show_default="50000", group="What",
        help="Generated images for fid and kid.")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of latents, cameras, noise and subsets.")
@option("--batch", metavar="IMAGES", type=click.IntRange(min=1), default=8, help="Images at once.")
@option("--outdir", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=None,
        show_default="the network's run folder", help="Append the lines to metric-<name>.jsonl there.")
@option("--verbose", metavar="BOOL", type=bool, default=True, help="Show progress.")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where generator and features run.")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(network, data, mirror, inception, metrics, n, seed, batch, outdir, verbose, device, dry_run) -> None:
    options = MetricOptions(metrics=tuple(name.strip() for name in metrics.split(",")), n=n, seed=seed, batch=batch)
    target = choose_device(device)
    with naming("--network"):
        generator = load_generator(network, target)
    trained = training_options(generator.path)
    data = data or trained.get("data") or (BUNDLED_DATA if generator.path == bundled.GENERATOR else None)
    if data is None:
        raise ValueError(f"--data: expected a dataset, got none, and {generator.path.name} has no {OPTIONS} beside it. Name the set.")
    data, mirror = str(data), bool(trained.get("mirror", False)) if mirror is None else mirror
    outdir = outdir or (generator.path.parent if (generator.path.parent / OPTIONS).is_file() else None)
    if dry_run:
        settings = {"network": generator.path.name, "data": data, "mirror": mirror, "inception": inception and str(inception)}
        settings |= {"outdir": outdir and str(outdir), "metrics": options.metrics, "n": options.images, "seed": seed, "batch": batch}
        click.echo(json.dumps(settings))
        return
    with naming("--inception"):
        features = load_features(inception, target)
    with naming("--data"):
        dataset = ImageFolderDataset(resolve_dataset(data, progress=verbose), c_dim=25, xflip=mirror)

    def bar(total: int, title: str):
        return tqdm(total=total, desc=title, unit="image", disable=not verbose).update

    records = evaluate(generator, dataset, features, options, bar)
    for record in records:
        click.echo(json.dumps(record))
    if outdir is not None:
        append_records(outdir, records)


if __name__ == "__main__":
    main()
