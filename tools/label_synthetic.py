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

from eg3d_rlhf.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.annotator import UtilityResult
from eg3d_rlhf.preferences.labels import write_labels
from eg3d_rlhf.preferences.synthetic import AnnotationOptions, annotate

DEFAULTS = AnnotationOptions()


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Labels to write (.jsonl or .csv).")
@option("--network", metavar="PATH", type=click.Path(path_type=Path, exists=True), default=None, show_default="the bundled generator",
        help="Generator file or run folder to sample.", group="Samples")
@option("--pairs", metavar="INT", type=click.IntRange(min=1), default=DEFAULTS.pairs, help="Pairs; a seed is used once.", group="Samples")
@option("--first-seed", metavar="INT", type=click.IntRange(min=0), default=DEFAULTS.first_seed, group="Samples",
        help="First of the 2 * pairs seeds.")
@option("--psi", metavar="FLOAT", type=click.FloatRange(min=0), default=DEFAULTS.psi, help="Truncation.", group="Samples")
@option("--cutoff", metavar="INT", type=click.IntRange(min=0), default=DEFAULTS.cutoff, help="ws that truncation reaches.", group="Samples")
@option("--resolution", metavar="VOXELS", type=click.IntRange(16, 256), default=DEFAULTS.resolution, group="Judgement",
        help="Edge of the judged cube.")
@option("--flip-rate", metavar="0..0.5", type=click.FloatRange(0, 0.5, max_open=True), default=DEFAULTS.flip_rate, group="Judgement",
        help="Expected share of labels against the noise-free order.")
@option("--calibrate", metavar="CUBES", type=click.IntRange(min=0), default=DEFAULTS.calibrate, group="Judgement",
        help="Calibrate the annotator on so many of the seeds; 0 keeps its fixed calibration.")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=DEFAULTS.seed, help="Seed of pairing and noise.", group="Judgement")
@option("--batch", metavar="INT", type=click.IntRange(min=1), default=DEFAULTS.batch, help="Latents synthesised at once.")
@option("--device", metavar="NAME", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the generator runs.")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(out: Path, network: Path | None, device: str, dry_run: bool, **settings) -> None:
    options = AnnotationOptions(**settings)
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
