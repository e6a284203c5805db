"""Jobs on label files: `label synthetic` writes labels of the simulated annotator, `label elo` rates
methods.
"""

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
@file_option("--out", required=True, help="File of labels to write (.jsonl or .csv).")
@shared(
    "network",
    network={"type": click.Path(path_type=Path, exists=True), "help": "Generator to sample and label."},
)
@options_of(AnnotationOptions)
@option(
    "--randomised",
    is_flag=True,
    group="Judgement",
    help="Assign the thumbs or scores to the shapes at random, as a control.",
)
@shared("device dry-run")
def synthetic(
    out: Path, network: Path | None, randomised: bool, device: str, dry_run: bool, **settings
) -> None:
    """Label seeds of a generator of synthetic heads, in pairs or one by one, with the simulated annotator.

    The simulated annotator compares each shape with the ground-truth head of its latent, by geometry alone.
    Writes labels (JSON lines; for pairs also CSV) and, beside them, a .meta.json with settings and
    temperature.

    \b
    Example:
        eg3d-rlhf label synthetic --pairs=100 --resolution=32 --out=runs/example/labels.jsonl
    """
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.preferences.annotator import Utility
    from eg3d_rlhf.preferences.synthetic import annotate
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    # None: not given, so the default of the setting applies
    options = AnnotationOptions(**{name: value for name, value in settings.items() if value is not None})
    if randomised and options.kind == "pairs":
        raise ValueError(
            "--randomised needs --kind=thumbs or scores, got pairs. Change the kind, or remove --randomised."
        )
    if options.kind != "pairs" and out.suffix != ".jsonl":
        raise ValueError(
            f"--out: --kind={options.kind} needs a name ending in .jsonl, got {out.name}. Rename it."
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
    # the bundled one without --network
    generator = load_generator(network, choose_device(device))
    with tqdm(total=len(options.seeds), unit="seed", desc="labelling") as bar:

        def on_seed(result: Utility) -> None:
            """Advance the progress bar by one labelled seed."""
            bar.update()
            bar.set_postfix(utility=f"{result.total:.3f}", refresh=False)

        annotation = annotate(generator.generator, options, on_seed)
    # labels belong to one generator: seeds of another one give other shapes
    meta = {"generator": generator.hash, **annotation.summary()}
    if options.kind == "pairs":
        write_labels(out, annotation.preferences(generator.hash))
        count = options.pairs
    else:
        labels = annotation.unpaired(generator.hash, randomised)
        write_unpaired(out, labels)
        # `clean` is the label without the simulated annotator's noise
        flipped = sum(label.preferred is not None and label.preferred != label.clean for label in labels)
        count = len(labels)
        meta = {**meta, "flipped": flipped, "randomised": randomised}
    out.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    click.echo(
        f"{out}: {count} labels, {meta['flipped']} contradict the noise-free order, temperature"
        f" {annotation.temperature:.4g}"
    )


def read_held(path: Path | None) -> dict[str, dict[str, float]]:
    """Read the ratings by criterion from a file that --out wrote. Raises: ValueError for another file."""
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
                f"{path} is not a file that --out wrote ({error!r}). Name such a file."
            ) from None


@click.command("elo", cls=GroupedCommand, job="label elo")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@option(
    "--ties",
    type=click.Choice(DRAWS),
    default="both",
    help="Treatment of ties: both, a win for both methods as in GPTEval3D, or Davidson's model.",
)
@file_option("--held", help="Ratings that stay fixed, a file written with --out; only new methods are rated.")
@file_option("--out", help="Also write the ratings as JSON.")
def elo(files, ties, held, out) -> None:
    """Compute Elo ratings of methods from pairwise judgements of their assets, as in GPTEval3D's tournament.
    The judgements may come from people or from a vision-language model.

    A judgement is a line of JSON: {"a": "sds", "b": "dreamdpo", "winner": "b", "prompt": "a bust",
    "criterion": "overall"}; winner is a, b or tie; prompt and criterion are optional. Runs of train.py
    --mode=distill --compare=... write judgements.jsonl.

    \b
    Example:
        eg3d-rlhf label elo runs/00000-distill/judgements.jsonl
    """
    from eg3d_rlhf.preferences.bradley_terry import elo as ratings
    from eg3d_rlhf.preferences.bradley_terry import markdown, read_judgements

    # each criterion has its own table of ratings
    by_criterion = defaultdict(list)
    for file in files:
        for judgement in read_judgements(file):
            by_criterion[judgement.criterion].append(judgement)
    # criterion -> method -> fixed rating
    known = read_held(held)
    tables = {}
    for criterion, judgements in sorted(by_criterion.items()):
        stay = known.get(criterion, {})
        # nothing to fit: every method of this criterion has a fixed rating
        if {name for j in judgements for name in (j.a, j.b)} <= stay.keys():
            click.echo(
                f"{criterion}: skipped, because --held fixes the ratings of all its methods.", err=True
            )
            continue
        tables[criterion] = ratings(judgements, draws=ties, held=stay)
    if out is not None:
        write_atomic(
            out, (json.dumps({c: table.to_dict() for c, table in tables.items()}, indent=1) + "\n").encode()
        )
    click.echo(markdown(tables))
