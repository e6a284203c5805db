"""Jobs on labels: those of the programmatic annotator, and ratings of methods from judgements."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option, options_of
from eg3d_rlhf.modes.shared_flags import FILE, file_option, print_json, shared
from eg3d_rlhf.preferences.labels import write_labels
from eg3d_rlhf.preferences.settings import DRAWS, AnnotationOptions
from training.progress import tqdm
from training.storage import write_atomic


@click.command("synthetic", cls=GroupedCommand, job="label synthetic")
@file_option("--out", required=True, help="Labels to write (.jsonl or .csv).")
@shared("network", network={"type": click.Path(path_type=Path, exists=True), "help": "Generator to sample."})
@options_of(AnnotationOptions)
@option(
    "--randomised",
    is_flag=True,
    group="Judgement",
    help="Assign the thumbs or scores to the shapes at random: a control.",
)
@shared("device dry-run")
def synthetic(
    out: Path, network: Path | None, randomised: bool, device: str, dry_run: bool, **settings
) -> None:
    """Label seeds of a generator of heads of people, in pairs or one by one, with the programmatic annotator.

    It looks at geometry alone, and knows the whole head that each latent names. Writes labels (JSON lines; of
    pairs, CSV as well) and, beside them, a .meta.json with settings and temperature.

    \b
    Example:
        eg3d-rlhf label synthetic --pairs=100 --resolution=32 --out=runs/example/labels.jsonl
    """
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.preferences.annotator import Utility
    from eg3d_rlhf.preferences.synthetic import annotate
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    options = AnnotationOptions(**{name: value for name, value in settings.items() if value is not None})
    if randomised and options.kind == "pairs":
        raise ValueError(
            "--randomised: expected --kind=thumbs or scores, got pairs. Name one, or leave it out."
        )
    if options.kind != "pairs" and out.suffix != ".jsonl":
        raise ValueError(
            f"--out: expected a name ending in .jsonl for --kind={options.kind}, got {out.name}. Rename it."
        )
    if dry_run:
        resolved = {
            "out": str(out),
            "network": str(network or "bundled"),
            "randomised": randomised,
            "device": device,
        }
        print_json({**resolved, **asdict(options)})
        return
    generator = load_generator(network, choose_device(device))
    with tqdm(total=len(options.seeds), unit="seed", desc="judging") as bar:

        def on_seed(result: Utility) -> None:
            bar.update()
            bar.set_postfix(utility=f"{result.total:.3f}", refresh=False)

        annotation = annotate(generator.generator, options, on_seed)
    meta = {"generator": generator.hash, **annotation.summary()}
    if options.kind == "pairs":
        write_labels(out, annotation.preferences(generator.hash))
        count = options.pairs
    else:
        labels = annotation.unpaired(generator.hash, randomised)
        write_unpaired(out, labels)
        flipped = sum(label.preferred is not None and label.preferred != label.clean for label in labels)
        count = len(labels)
        meta = {**meta, "flipped": flipped, "randomised": randomised}
    out.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    click.echo(
        f"{out}: {count} labels, {meta['flipped']} against the noise-free order, temperature"
        f" {annotation.temperature:.4g}"
    )


def read_held(path: Path | None) -> dict[str, dict[str, float]]:
    """Ratings by criterion of a file that --out wrote."""
    if path is None:
        return {}
    with naming("--held"):
        try:
            tables = json.loads(path.read_text())
            return {
                c: {name: float(row["elo"]) for name, row in table["ratings"].items()}
                for c, table in tables.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected what --out writes, got: {error!r}. Name such a file."
            ) from None


@click.command("elo", cls=GroupedCommand, job="label elo")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@option(
    "--ties",
    type=click.Choice(DRAWS),
    default="both",
    help="How a tie counts: as a win for both, as GPTEval3D has it, or in Davidson's model of ties.",
)
@file_option("--held", help="Ratings that stay (an --out file): only new methods move.")
@file_option("--out", help="Write the ratings as JSON, too.")
def elo(files, ties, held, out) -> None:
    """Rate methods by Elo from pairwise judgements of their assets: GPTEval3D's tournament, people's or a
    judge's.

    A judgement is a line of JSON: {"a": "sds", "b": "dreamdpo", "winner": "b", "prompt": "a bust",
    "criterion": "overall"}; winner is a, b or tie, prompt and criterion may be left out. Runs of train.py
    --mode=distill --compare=... write judgements.jsonl.

    \b
    Example:
        eg3d-rlhf label elo runs/00000-distill/judgements.jsonl
    """
    from eg3d_rlhf.preferences.bradley_terry import elo as ratings
    from eg3d_rlhf.preferences.bradley_terry import markdown, read_judgements

    by_criterion = defaultdict(list)
    for file in files:
        for judgement in read_judgements(file):
            by_criterion[judgement.criterion].append(judgement)
    known = read_held(held)
    tables = {}
    for criterion, judgements in sorted(by_criterion.items()):
        stay = known.get(criterion, {})
        if {name for j in judgements for name in (j.a, j.b)} <= stay.keys():
            click.echo(f"{criterion}: left out, all its methods are held.", err=True)
            continue
        tables[criterion] = ratings(judgements, draws=ties, held=stay)
    if out is not None:
        write_atomic(
            out, (json.dumps({c: table.to_dict() for c, table in tables.items()}, indent=1) + "\n").encode()
        )
    click.echo(markdown(tables))
