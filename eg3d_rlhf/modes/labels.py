"""Jobs on labels: those of the programmatic annotator."""

import json
from dataclasses import asdict
from pathlib import Path

import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_of
from eg3d_rlhf.evaluation.flags import shared
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.preferences.annotator import UtilityResult
from eg3d_rlhf.preferences.labels import write_labels
from eg3d_rlhf.preferences.synthetic import AnnotationOptions, annotate
from eg3d_rlhf.preferences.unpaired import write_unpaired


@click.command("synthetic", cls=GroupedCommand)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Labels to write (.jsonl or .csv).")
@shared("network", network={"type": click.Path(path_type=Path, exists=True), "help": "Generator to sample."})
@options_of(AnnotationOptions)
@option("--shuffled", is_flag=True, group="Judgement", help="Thumbs or scores dealt to the shapes at random: a control.")
@shared("device dry-run")
def synthetic(out: Path, network: Path | None, shuffled: bool, device: str, dry_run: bool, **settings) -> None:
    """Label a generator's seeds, in pairs or one by one, with the programmatic annotator, which looks at geometry alone.

    Writes labels (JSON lines; of pairs, CSV as well) and, beside them, a .meta.json with settings, calibration and temperature.

    \b
    Example:
        eg3d-rlhf label synthetic --pairs=40 --resolution=32 --out=runs/example/labels.jsonl
    """
    options = AnnotationOptions(**{name: value for name, value in settings.items() if value is not None})
    if shuffled and options.kind == "pairs":
        raise ValueError("--shuffled: expected --kind=thumbs or scores, got pairs. Name one, or leave it out.")
    if options.kind != "pairs" and out.suffix != ".jsonl":
        raise ValueError(f"--out: expected a name ending in .jsonl for --kind={options.kind}, got {out.name}. Rename it.")
    if dry_run:
        resolved = {"out": str(out), "network": str(network or "bundled"), "shuffled": shuffled, "device": device}
        click.echo(json.dumps({**resolved, **asdict(options)}, indent=1))
        return
    generator = load_generator(network, choose_device(device))
    with tqdm(total=2 * options.pairs, unit="seed", desc="judging") as bar:

        def on_seed(result: UtilityResult) -> None:
            bar.update()
            bar.set_postfix(utility=f"{result.total:.3f}", refresh=False)

        annotation = annotate(generator.generator, options, on_seed)
    meta = {"generator": generator.hash, **annotation.summary()}
    if options.kind == "pairs":
        write_labels(out, annotation.preferences(generator.hash))
        count = options.pairs
    else:
        labels = annotation.unpaired(generator.hash, shuffled)
        write_unpaired(out, labels)
        flipped = sum(label.preferred is not None and label.preferred != label.clean for label in labels)
        count, meta = len(labels), {**meta, "flipped": flipped, "shuffled": shuffled}
    out.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    click.echo(f"{out}: {count} labels, {meta['flipped']} against the noise-free order, temperature {annotation.temperature:.4g}")
