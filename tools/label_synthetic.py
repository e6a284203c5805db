"""Label pairs of a generator's seeds with the programmatic annotator, which looks at geometry alone.

Writes labels (JSON lines or CSV) and, beside them, a .meta.json with settings, calibration and temperature.

\b
Example:
    python tools/label_synthetic.py --pairs=40 --resolution=32 --out=runs/example/labels.jsonl
"""

import json
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, options_of
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.annotator import UtilityResult
from eg3d_rlhf.preferences.labels import write_labels
from eg3d_rlhf.preferences.synthetic import AnnotationOptions, annotate


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Labels to write (.jsonl or .csv).")
@option("--network", metavar="PATH", type=click.Path(path_type=Path, exists=True), default=None, show_default="the bundled generator",
        help="Generator file or run folder to sample.", group="Samples")
@options_of(AnnotationOptions)
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(out: Path, network: Path | None, device: str, dry_run: bool, **settings) -> None:
    options = AnnotationOptions(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"out": str(out), "network": str(network or "bundled"), "device": device, **asdict(options)}, indent=1))
        return
    generator = load_generator(network, choose_device(device))
    with tqdm(total=2 * options.pairs, unit="seed", desc="judging") as bar:

        def on_seed(result: UtilityResult) -> None:
            bar.update()
            bar.set_postfix(utility=f"{result.total:.3f}", refresh=False)

        annotation = annotate(generator.generator, options, on_seed)
    write_labels(out, annotation.preferences(generator.hash))
    meta = {"generator": generator.hash, **annotation.summary()}
    out.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    click.echo(f"{out}: {options.pairs} labels, {meta['flipped']} against the noise-free order, temperature {annotation.temperature:.4g}")


if __name__ == "__main__":
    main()
