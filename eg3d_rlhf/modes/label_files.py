"""Jobs on label files: `label synthetic` writes labels of the simulated annotator, and `label elo` computes
Elo ratings from pairwise judgements.
"""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    argument,
    choose_device,
    option,
    options_from_settings,
    prefix_errors,
)
from eg3d_rlhf.modes.label_origin import labels_from_option
from eg3d_rlhf.modes.shared_flags import FILE, file_option, print_json, shared
from eg3d_rlhf.preferences.labels import write_labels
from eg3d_rlhf.preferences.provenance import LabelChoice, LabelUse
from eg3d_rlhf.preferences.settings import DRAWS, AnnotationOptions
from training.input_paths import existing_file
from training.progress import tqdm
from training.storage import write_atomic


@click.command("synthetic", cls=GroupedCommand, job="label synthetic")
@file_option("--out", required=True, help="File of labels to write (.jsonl or .csv).")
@shared(
    "network",
    network={
        "type": click.Path(path_type=Path, exists=True),
        "help": "Generator whose samples are labelled: a network file or a run folder.",
    },
)
# Settings of the simulated annotator, and of the samples that it labels.
@options_from_settings(AnnotationOptions)
@option(
    "--randomised",
    is_flag=True,
    group="Judgement",
    help=(
        "Assign the labels to the shapes in random order, as a control; only with --kind=thumbs or"
        " --kind=scores."
    ),
)
@shared("device dry-run")
def synthetic(
    out: Path, network: Path | None, randomised: bool, device: str, dry_run: bool, **settings
) -> None:
    """Label samples of a generator of synthetic heads with the simulated annotator, in pairs or one by one.

    The simulated annotator compares the geometry of each sample with the ground-truth head of its latent.
    The labels are written as JSON lines, or as CSV for pairs. A .meta.json beside them holds the settings
    and the temperature of the annotator's noise.

    \b
    Example:
        eg3d-rlhf label synthetic --pairs=100 --resolution=32 --out=runs/example/labels.jsonl
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.preferences.annotator import Utility
    from eg3d_rlhf.preferences.synthetic import annotate
    from eg3d_rlhf.preferences.unpaired import write_unpaired

    # None: not given, so the default of the setting applies
    annotation_options = AnnotationOptions(
        **{name: value for name, value in settings.items() if value is not None}
    )
    if randomised and annotation_options.kind == "pairs":
        raise ValueError(
            "--randomised cannot be combined with --kind=pairs. Use --kind=thumbs or --kind=scores, or remove"
            " --randomised."
        )
    if annotation_options.kind != "pairs" and out.suffix != ".jsonl":
        raise ValueError(
            f"--out: labels of --kind={annotation_options.kind} are written as JSON lines, but the name"
            f" {out.name} does not end in .jsonl. Choose a name that ends in .jsonl."
        )
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        resolved_settings = {
            "out": str(out),
            "network": str(network or "bundled"),
            "randomised": randomised,
            "device": device,
        }
        print_json({**resolved_settings, **asdict(annotation_options)})
        return
    # None: the bundled generator
    generator = load_generator(network, choose_device(device))
    with tqdm(total=len(annotation_options.seeds), unit="seed", desc="labelling") as progress_bar:

        def on_seed(utility: Utility) -> None:
            """Advance the progress bar by one labelled seed."""
            progress_bar.update()
            # refresh=False: the text is shown with the next update of the bar
            progress_bar.set_postfix(utility=f"{utility.total:.3f}", refresh=False)

        # All labels, also labels of pairs, come from one pass over the seeds.
        annotation = annotate(generator.generator, annotation_options, on_seed)
    # The hash of the generator is stored, because the same seeds give other shapes with another generator.
    metadata = {"generator": generator.hash, **annotation.summary()}
    if annotation_options.kind == "pairs":
        write_labels(out, annotation.preferences(generator.hash))
        label_count = annotation_options.pairs
    else:
        labels = annotation.unpaired(generator.hash, randomised)
        write_unpaired(out, labels)
        # `clean` is the label without the annotator's noise. `preferred` is None for a scored shape.
        flipped_count = sum(
            label.preferred is not None and label.preferred != label.clean for label in labels
        )
        label_count = len(labels)
        metadata = {**metadata, "flipped": flipped_count, "randomised": randomised}
    out.with_suffix(".meta.json").write_text(json.dumps(metadata, indent=1) + "\n")
    click.echo(
        f"{out}: {label_count} labels, {metadata['flipped']} contradict the noise-free order, temperature"
        f" {annotation.temperature:.4g}"
    )


def read_fixed_ratings(path: Path | None) -> dict[str, dict[str, float]]:
    """Read fixed ratings from a file that `label elo --out` wrote.

    Args:
        path: the file; None: no rating is fixed, and the result is empty.

    Returns: Elo ratings by criterion and method.

    Raises: ValueError for a file with another content.
    """
    if path is None:
        return {}
    # an error in this block begins with the name --held
    with prefix_errors("--held"):
        try:
            table_by_criterion = json.loads(path.read_text())
            return {
                criterion: {
                    method: float(rating_row["elo"]) for method, rating_row in table["ratings"].items()
                }
                for criterion, table in table_by_criterion.items()
            }
        # JSON of another structure causes one of these errors
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a file of ratings ({error!r}). Name a file that `label elo --out` wrote."
            ) from None


def check_judgements(path: Path) -> None:
    """Raise FileNotFoundError if there is no file of judgements at a path."""
    existing_file(path, "file of judgements (.jsonl)")


def check_ratings(path: Path) -> None:
    """Raise FileNotFoundError if there is no file of ratings at a path."""
    existing_file(path, "file of ratings that `label elo --out` wrote")


@click.command("elo", cls=GroupedCommand, job="label elo")
@argument("files", check_judgements, metavar="FILE...", nargs=-1, required=True, type=FILE)
@option(
    "--ties",
    type=click.Choice(DRAWS),
    default="both",
    help=(
        "Treatment of ties: both counts a tie as a win of both methods, as GPTEval3D does; davidson fits the"
        " model of Davidson (1970), which has a parameter for ties."
    ),
)
@file_option(
    "--held",
    check=check_ratings,
    help=(
        "File of ratings that an earlier call wrote with --out. These ratings stay fixed, and only methods"
        " without a rating are rated."
    ),
)
@labels_from_option()
@file_option("--out", help="JSON file to which the ratings are also written.")
def elo(files, ties, held, labels_from, out) -> None:
    """Compute Elo ratings of methods from pairwise judgements of their assets, as GPTEval3D
    (arXiv:2401.04092) does. Judgements of a vision-language model, whose lines have a field provenance
    "model: NAME", are used only with --labels-from=judges or all.

    Each line of FILE is one judgement as JSON: {"a": "sds", "b": "dreamdpo", "winner": "b", "prompt":
    "a bust", "criterion": "overall"}. The winner is a, b or tie. The prompt and the criterion are optional.
    Runs of train.py --mode=distill --compare=... write such a file, judgements.jsonl.

    \b
    Example:
        eg3d-rlhf label elo runs/00000-distill/judgements.jsonl
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.preferences.bradley_terry import elo as ratings
    from eg3d_rlhf.preferences.bradley_terry import markdown, read_counted_judgements

    # Each criterion has its own table of ratings.
    judgements_by_criterion = defaultdict(list)
    # Judgements of several files are pooled.
    use = LabelUse(labels_from=labels_from)
    for judgement_file in files:
        judgements, file_use = read_counted_judgements(judgement_file, LabelChoice(labels_from=labels_from))
        use += file_use
        for judgement in judgements:
            judgements_by_criterion[judgement.criterion].append(judgement)
    # criterion -> method -> fixed rating
    fixed_ratings_by_criterion = read_fixed_ratings(held)
    table_by_criterion = {}
    for criterion, judgements in sorted(judgements_by_criterion.items()):
        fixed_ratings = fixed_ratings_by_criterion.get(criterion, {})
        # If every method of this criterion has a fixed rating, no rating is left to fit.
        if {
            method for judgement in judgements for method in (judgement.a, judgement.b)
        } <= fixed_ratings.keys():
            click.echo(
                f"{criterion}: skipped, because --held fixes the ratings of all its methods.", err=True
            )
            continue
        # The fixed ratings decide the scale of the new ratings.
        table_by_criterion[criterion] = ratings(judgements, tie_rule=ties, given_ratings=fixed_ratings)
    if out is not None:
        write_atomic(
            out,
            (
                json.dumps(
                    {criterion: table.to_dict() for criterion, table in table_by_criterion.items()}, indent=1
                )
                + "\n"
            ).encode(),
        )
    click.echo(markdown(table_by_criterion))
    click.echo(use.text("judgements"))
