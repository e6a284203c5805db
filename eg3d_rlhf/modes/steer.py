"""The job `steer`: moves latents of a generator along a direction that labels prefer, without training."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_from_settings, prefix_errors
from eg3d_rlhf.core.input_paths import check_latent_network, check_reward_file
from eg3d_rlhf.modes.label_origin import choice_from_flags, learning_options
from eg3d_rlhf.modes.reward_linear import cache_option, criterion_option
from eg3d_rlhf.modes.reward_training import labels_option
from eg3d_rlhf.modes.shared_flags import PATH, file_option, shared
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source
from eg3d_rlhf.tuning.gan.steering_settings import SteerOptions

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.gan.steering import SteeringResult


@click.command(cls=GroupedCommand, job="steer")
@shared(
    "network",
    network={
        "help": "Generator whose samples were labelled: a network file or a run folder.",
        "check": check_latent_network,
    },
)
@labels_option(group="What", show_default="required, except with --strength=0")
@option(
    "--reward",
    metavar="FILE",
    type=PATH,
    check=check_reward_file,
    group="What",
    show_default="a linear reward, fitted to the labels",
    help="Reward file that scores the samples from which the direction is computed.",
)
@criterion_option
@learning_options("What")
@options_from_settings(SteerOptions)
@file_option(
    "--out",
    required=True,
    group="Run",
    help="Network file to write (.safetensors). The report is written beside it as .json and .html.",
)
@cache_option
@shared("device")
def main(
    network: Path | None,
    labels: str | Path | None,
    reward: Path | None,
    criterion: str | None,
    labels_from: str,
    calibrations: tuple[str, ...],
    uncalibrated: bool,
    out: Path,
    cache: Path | None,
    device: str,
    **settings,
) -> None:
    """Steer a generator by labels: find the direction of latents that the labels prefer, and write a network
    whose mapping moves samples along it. Nothing is trained; about 50 labels and a minute suffice.

    Samples whose coordinate along the direction is below the strength are moved to it; all others stay
    bitwise as they are. Every command that reads a network reads the written file. The report compares
    rewards on held-out latents before and after, and states whether the labels carry any signal. If they do
    not, only the report is written.

    \b
    Example:
        eg3d-rlhf steer --labels=assets/labels.jsonl --out=runs/example/steered.safetensors
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.linear import labelled_seeds
    from eg3d_rlhf.rewards.reward import load_reward
    from eg3d_rlhf.tuning.gan import steering
    from eg3d_rlhf.tuning.gan.steering_page import LATENTS, write_page
    from training.progress import tqdm

    # None: the flag was not given, so the default of the setting applies
    options = SteerOptions(**{name: value for name, value in settings.items() if value is not None})
    # The path is checked first: a wrong ending must not be reported after a minute of work.
    steering.check_path(out)
    with prefix_errors("--network"):
        generator = load_generator(network, choose_device(device))
    if options.threshold == 0:
        # This is the undo of a steering, so it needs no labels.
        steering.write_plain(generator, out)
        click.echo(f"{out}: the network without steering, because of --strength=0")
        return
    if labels is None:
        raise ValueError("--labels is missing. Name a file or a database of labelled pairs.")
    choice = choice_from_flags(labels_from, calibrations, uncalibrated)
    source = label_source(labels, LabelFilters(criterion=criterion), choice)
    with prefix_errors("--labels"):
        preferences, use = source.read_counted()
    click.echo(use.text())
    # Without a reward file, a linear reward is fitted to the labels.
    loaded_reward = None
    if reward is not None:
        with prefix_errors("--reward"):
            loaded_reward = load_reward(reward, choose_device(device))
    # before the progress bar, so that an error is the only line
    decided_labels = steering.check_inputs(generator, preferences, options, loaded_reward)
    shape_count = (
        # An upper limit, since observations in the cache are not generated again.
        options.unlabelled + len(labelled_seeds(decided_labels)) + steering.step_count() * options.latents
    )
    with tqdm(total=shape_count, desc="samples", unit="shape", dynamic_ncols=True) as progress_bar:
        result = steering.steer(
            generator,
            preferences,
            reward=loaded_reward,
            options=options,
            cache=cache,
            on_observed=progress_bar.update,
        )
    result = replace(result, report={**result.report, "label_use": use.to_dict()})
    # The report is written in any case. It is the only result if the labels determine no direction.
    report_path = result.write_report(out)
    click.echo("\n".join(summary_lines(result)))
    if result.steering is None:
        click.echo(f"\nWritten: {report_path} (no network, because the labels determine no direction)")
        return
    result.write(out)
    page_path = out.with_suffix(".html")
    with tqdm(total=LATENTS, desc="page", unit="latent", dynamic_ncols=True) as progress_bar:
        write_page(
            generator.generator,
            result.direction,
            result.report,
            page_path,
            options.layers,
            progress_bar.update,
        )
    click.echo(f"\nWritten: {out}, {report_path}, {page_path} (open it in a browser)")


def summary_lines(result: "SteeringResult") -> list[str]:
    """Return the lines that summarise a steering for the terminal."""
    report = result.report
    # The interval counts pairs and not labels, see `rewards.evaluation.rate`.
    low, high = report["accuracy_interval"]
    lines = [
        f"labels: {report['labels']} without ties",
        f"direction: {report['candidate']}, in the space {report['space']}; accuracy on held-out labels"
        f" {report['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}",
    ]
    # A trained reward that alone decides the direction does
    # not depend on the labels, so halves cannot be compared.
    if report["half_cosine"] is not None:
        lines.append(
            f"agreement of halves of the labels: cosine {report['half_cosine']:.2f}; 95 % of randomised"
            f" labels are below {report['half_cosine_randomised']:.2f}"
        )
    # --strength=auto found no strength at which the held-out reward rises without harm.
    if report["verdict"] == "no direction" and report["strength"] == 0:
        lines.append(
            "result: the labels agree on a direction, but no strength raises the held-out reward without"
            " harming good samples. Label more pairs, or compare strengths with --strength=1."
        )
        return lines
    if report["verdict"] == "no direction":
        lines.append(
            "result: no direction. The labels do not agree on one better than randomised labels do. Label"
            " more pairs, or check whether the labelled property varies between samples."
        )
        return lines
    lines += [
        "result: the labels determine a direction",
        f"strength: {report['strength']:g} standard deviations",
        f"reward of {result.report['latents']} held-out latents: {report['reward_before']:.3f} before,"
        f" {report['reward_after']:.3f} after",
    ]
    if report["heldout_before"] is None:
        lines.append("held-out reward: none, because it needs at least 25 labels")
    else:
        lines.append(
            f"held-out reward (60 % of the labels move, 40 % evaluate): {report['heldout_before']:.3f}"
            f" before, {report['heldout_after']:.3f} after; {report['harmed']:.1%} of the good samples are"
            " harmed"
        )
    # Randomised labels should change the reward little, and inverted ones should lower it.
    for name, control in report["control"].items():
        lines.append(
            f"control with {name} labels, same strength: reward {control['reward_after']:.3f},"
            f" {control['verdict']}"
        )
    return lines
