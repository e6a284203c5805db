"""The job `reward linear`: fits a linear reward to tens of labels, in a minute and without training."""

from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, prefix_errors
from eg3d_rlhf.modes.label_origin import choice_from_flags, learning_options
from eg3d_rlhf.modes.reward_training import labels_option
from eg3d_rlhf.modes.shared_flags import FOLDER, file_option, shared
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source
from eg3d_rlhf.preferences.provenance import JUDGES

# Options that `steer` has as well
criterion_option = option(
    "--criterion",
    metavar="NAME",
    group="What",
    show_default="which is better",
    help="Name of the question in the label database whose answers are the labels.",
)
cache_option = option(
    "--cache",
    metavar="FOLDER",
    type=FOLDER,
    group="Run",
    show_default="memory only",
    help="Folder in which observed samples are stored, so that further runs need not generate them.",
)


@click.command("linear", cls=GroupedCommand, job="reward linear")
@labels_option(required=True, group="What")
@shared("network", network="Generator whose samples were labelled: a network file or a run folder.")
@criterion_option
@learning_options("What")
@file_option(
    "--out",
    required=True,
    group="Run",
    help="Reward file to write (.safetensors). A .json file with its description is written beside it.",
)
@option(
    "--unlabelled",
    metavar="SEEDS",
    type=click.IntRange(16, 20_000),
    default=600,
    rare=True,
    help="Number of unlabelled samples from which principal components are computed.",
)
@option(
    "--resolution",
    metavar="INT",
    type=click.IntRange(8, 256),
    default=32,
    help="Number of grid points per axis of the density grid that the reward reads.",
)
@option(
    "--seed",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Random seed of the folds of the cross-validation.",
)
@cache_option
@shared("device")
def linear(
    labels: str | Path,
    network: Path | None,
    criterion: str | None,
    labels_from: str,
    calibrations: tuple[str, ...],
    uncalibrated: bool,
    out: Path,
    unlabelled: int,
    resolution: int,
    seed: int,
    cache: Path | None,
    device: str,
) -> None:
    """Fit a linear reward to labelled pairs, from about 25 labels on. The reward reads principal components
    of density grids, which unlabelled samples of the generator determine.

    The accuracy is measured by five-fold cross-validation, with a 95 % interval. The file is a reward file as
    `reward train` writes it, and states the variance of each score as well. From about 1,000 labels on,
    `reward train` is more accurate.

    \b
    Example:
        eg3d-rlhf reward linear --labels=assets/labels.jsonl --out=runs/example/linear.safetensors
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.preferences.labels import control_of
    from eg3d_rlhf.rewards.linear import check_labels, fit_linear_reward, labelled_seeds, usable_labels
    from training.progress import tqdm

    if out.suffix != ".safetensors":
        raise ValueError(
            f"--out: the name {out.name} does not end in .safetensors. Choose a name with this ending."
        )
    choice = choice_from_flags(labels_from, calibrations, uncalibrated)
    source = label_source(labels, LabelFilters(criterion=criterion), choice)
    with prefix_errors("--labels"):
        preferences, use = source.read_counted()
    click.echo(use.text())
    with prefix_errors("--network"):
        generator = load_generator(network, choose_device(device))
    # before the progress bar, so that an error is the only line
    check_labels(generator, preferences)
    sample_count = unlabelled + len(labelled_seeds(usable_labels(preferences)))
    with tqdm(total=sample_count, desc="samples", unit="shape", dynamic_ncols=True) as progress_bar:
        reward = fit_linear_reward(
            generator,
            preferences,
            unlabelled=unlabelled,
            resolution=resolution,
            seed=seed,
            cache=cache,
            control=control_of(source.file),
            on_observed=progress_bar.update,
        )
    if use.used[JUDGES]:
        # The file states labels of judges, so that users of the reward see it.
        reward.provenance["label_use"] = use.to_dict()
    out.parent.mkdir(parents=True, exist_ok=True)
    reward.save(out)
    accuracy = reward.provenance["test_accuracy"]
    low, high = accuracy["interval_95"]
    click.echo(
        f"{out}: linear reward of {accuracy['n']} labels; accuracy on held-out folds"
        f" {accuracy['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}; ridge"
        f" {reward.provenance['ridge']:.3g}"
    )
