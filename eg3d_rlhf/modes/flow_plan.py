"""The jobs `flow plan`, which estimates what the steps in a WORK folder cost, and `flow status`, which says
what is done in it and what comes next.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.modes.circular_dpo import default_settings
from eg3d_rlhf.modes.flow_check import entry_lines
from eg3d_rlhf.modes.flow_next import (
    answered_campaigns,
    command_after_plan,
    is_partly_answered,
    judged_pairs,
    next_line,
    study_progress,
    tune_command,
)
from eg3d_rlhf.modes.flow_sample import device_flag, work_argument
from eg3d_rlhf.modes.shared_flags import print_json
from eg3d_rlhf.people.label.launch import QUESTION_SECONDS, SECONDS, format_duration
from eg3d_rlhf.tuning.flow.base.family import Encodes, question_of, sized_stages
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, TEST, Work, describe_splits

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.workspace.plan import LabelGoal, Plan, Times

# Names of the cards of `plan.CARDS`; written here because --help must not load that module.
CARD_NAMES = ("rtx-3090", "rtx-4090", "rtx-a6000", "l4", "l40s", "a100", "h100", "h200")


@click.command("plan", cls=GroupedCommand, job="flow plan")
@work_argument
@option(
    "--card",
    type=click.Choice(CARD_NAMES),
    show_default="the device of this machine, which is measured",
    help="GPU for which times are estimated, from its peak rate in bfloat16.",
)
@option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    show_default=f"{SECONDS}, and {QUESTION_SECONDS} for each further question",
    help="Time in which a person answers all questions about one pair.",
)
@device_flag
@option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan_command(folder: Path, card: str | None, seconds: float | None, device: str, as_json: bool) -> None:
    """Estimate what the steps in WORK cost: assets to sample, minutes on a GPU, disk space, pairs to label,
    and hours of people. Nothing is sampled.

    \b
    Example:
        eg3d-rlhf flow plan WORK --card=rtx-4090
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.tuning.flow.workspace.plan import bytes_per_asset, generator_bytes, make_plan

    work = Work.open(folder)
    plan = make_plan(work)
    seconds_per_pair = seconds or answer_seconds(work)
    times = estimate_work_times(work, plan, card, device)
    asset_bytes = bytes_per_asset(work)
    if as_json:
        print_json(
            {
                **asdict(plan),
                "seconds_per_pair": seconds_per_pair,
                "card": card or "this machine",
                "times": None if times is None else asdict(times),
                "bytes_per_asset": asset_bytes,
                "generator_bytes": generator_bytes(work),
                "next": command_after_plan(work, plan),
            }
        )
        return
    entries = [
        ("inputs", f"{len(work.names())} {work.kind_word}: {describe_splits(work.splits)}"),
        ("to sample", f"{plan.assets} assets now, {plan.study_assets} for the study of 3 generators"),
        ("time", time_text(plan, times, card)),
        ("disk", disk_text(plan, asset_bytes, generator_bytes(work))),
        *(("to label", goal_text(goal, plan, seconds_per_pair)) for goal in plan.goals),
    ]
    for title, text in entries:
        for line in entry_lines(title, [text]):
            click.echo(line)
    click.echo(f"next: {command_after_plan(work, plan)}")


def answer_seconds(work: Work) -> float:
    """Return the assumed time in seconds in which a person answers the default questions about one pair."""
    from eg3d_rlhf.modes.flow_label import choose_questions

    return SECONDS + QUESTION_SECONDS * len(choose_questions(work, None))


def estimate_work_times(work: Work, plan: "Plan", card: str | None, device: str) -> "Times | None":
    """Estimate the times of the steps, or return None if the generator's operations cannot be counted.

    Args:
        work: the opened folder WORK.
        plan: numbers of samples.
        card: name of a card; None for the device of this machine.
        device: value of --device.
    """
    # imported here because it imports all families
    from eg3d_rlhf.tuning.flow.workspace.estimate import estimate
    from eg3d_rlhf.tuning.flow.workspace.plan import estimate_times

    family = work.check_pipeline()
    if family.bundled or not isinstance(family, Encodes):
        return None
    target_device = None if card else str(choose_device(device))
    rows = estimate(
        sized_stages(family, Path(work.pipeline)),
        # cards compute in bfloat16
        precision="bfloat16" if card else work.precision,
        device=target_device,
        name="operations",
    )
    # the settings with which `flow tune` trains by default
    training = default_settings(work.pipeline).human
    return estimate_times(
        plan, rows, card=card, steps=training.steps, batch=training.batch, stages=work.stages
    )


def time_text(plan: "Plan", times: "Times | None", card: str | None) -> str:
    """Describe the estimated times and the formula from which they follow.

    Args:
        plan: numbers of samples.
        times: estimated times, or None.
        card: name of the card, or None.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.workspace.plan import CARDS, SHARE_OF_PEAK

    if times is None:
        return (
            "not estimated, because the operations of this generator are not counted. The bundled toy takes"
            " minutes on a CPU; of another generator, time flow sample on a few inputs"
        )
    rate = (
        f"{times.rate / 1e12:.3g} TFLOP/s, measured on this machine"
        if card is None
        else f"{SHARE_OF_PEAK:.0%} (assumed) of {CARDS[card].peak:g} TFLOP/s"
    )
    return (
        f"estimated for {card or 'this machine'}: sampling {format_duration(times.sample)}; tuning with its"
        f" control {format_duration(times.tune)}; sampling of the study {format_duration(times.study)}. The"
        f" formula is {plan.assets} assets x {times.asset_operations / 1e12:.3g} TFLOP / ({rate}); an update"
        f" of all stages has {times.update_operations / 1e12:.3g} TFLOP. Decoders and files come on top"
    )


def disk_text(plan: "Plan", asset_bytes: float | None, generator_bytes: int) -> str:
    """Describe the disk space of the assets and of an export.

    Args:
        plan: numbers of samples.
        asset_bytes: mean size of a sampled asset in bytes, or None before the first asset.
        generator_bytes: size of the generator's files in bytes.
    """
    asset_count = plan.assets + plan.study_assets
    assets_text = "assets: not known before the first ones are sampled; run this command again then"
    if asset_bytes is not None:
        assets_text = (
            f"{asset_count * asset_bytes / 1e9:.3g} GB for {asset_count} assets of {asset_bytes / 1e6:.3g} MB"
            " (mean of those sampled so far)"
        )
    return f"{assets_text}; {generator_bytes / 1e9:.3g} GB for an export of full networks"


def goal_text(goal: "LabelGoal", plan: "Plan", seconds_per_pair: float) -> str:
    """Describe how many pairs and hours of people show an accuracy.

    Args:
        goal: the accuracy and the numbers of pairs.
        plan: numbers of samples.
        seconds_per_pair: time in which a person answers the questions about one pair.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.workspace.plan import POWER, PROMPT_CORRELATION, TIES

    aim = f"to show an accuracy of {goal.accuracy:g} with {POWER:.0%} power"
    assumptions = (
        f"assumed: {TIES:.0%} ties, correlation {PROMPT_CORRELATION:g} between pairs of the same input"
    )
    if goal.pairs is None:
        return (
            f"{aim}: no number of pairs is enough, because only {goal.prompts} inputs are held out. Make a"
            f" folder with at least {goal.least_inputs} inputs ({assumptions})"
        )
    text = (
        f"{aim}: {goal.pairs} pairs, of which {goal.held_out} without a tie on {goal.prompts} held-out"
        f" inputs ({assumptions}); people need about"
        f" {format_duration(goal.pairs * seconds_per_pair / 0.9)} at {seconds_per_pair:g} s a pair, with 10 %"
        " repeats"
    )
    if goal.pairs > plan.most_pairs:
        text += f". The assets give only {plan.most_pairs} pairs: add inputs, or raise --each of flow new"
    return text


@click.command("status", cls=GroupedCommand, job="flow status")
@work_argument
def status_command(folder: Path) -> None:
    """Show which steps in WORK are done, and the command of the next step.

    \b
    Example:
        eg3d-rlhf flow status WORK
    """
    work = Work.open(folder)
    for title, text in status_entries(work):
        for line in entry_lines(title, [text]):
            click.echo(line)
    # Not wrapped, so that the command can be copied. `next:` names one command only.
    if is_partly_answered(work):
        click.echo(f"to tune before all pairs are answered: {tune_command(work)}")
    click.echo(next_line(work))


def status_entries(work: Work) -> Iterator[tuple[str, str]]:
    """Yield a title and a text for each step: the folder, its assets, answers, trainings and studies."""
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import count_assets, count_empty

    yield (
        "generator",
        f"{work.family}, stages {' '.join(work.stages)}; {len(work.names())} {work.kind_word},"
        f" {len(work.names(TEST))} of them kept for the study",
    )
    sampled_count = count_assets(work)
    empty_count = count_empty(work)
    yield (
        "sampled",
        f"{sampled_count} of {work.each * len(work.names(*SHOWN))} assets"
        + (f", {empty_count} of them without a surface, which are left out" if empty_count else ""),
    )
    for name, (answered, pair_count, questions) in answered_campaigns(work).items():
        stages = [stage for stage in work.stages if question_of(work.check_pipeline(), stage) in questions]
        yield (
            "labelled",
            f"{name}: {answered} of {pair_count} pairs; {' and '.join(questions)}, for stage"
            f" {' and '.join(stages) or 'none'}",
        )
    for name, judge, answer_count in judged_pairs(work):
        yield "judged", f"{name}: {answer_count} answers of {judge}, apart from those of people"
    for training_folder in work.numbered("tune"):
        yield "tuned", f"{training_folder.name}: {training_state(work, training_folder)}"
    for contest, answered, trial_count, tune in study_progress(work):
        yield "studied", f"{contest} of {tune}: {answered} of {trial_count} trials"


def training_state(work: Work, training_folder: Path) -> str:
    """Describe a training in WORK by its report.

    Args:
        work: the opened folder WORK.
        training_folder: folder of the training.
    """
    report_path = training_folder / "report.json"
    if not report_path.is_file():
        return "not finished; the same flow tune resumes it"
    stages = json.loads(report_path.read_text())["stages"]
    texts = []
    for stage, stage_report in stages.items():
        text = "learnable signal" if stage_report["learnable_signal"] else "no learnable signal"
        # reports of earlier versions state no attempts
        if earlier := stage_report.get("earlier_attempts"):
            text += f" (attempt {len(earlier) + 1} on the same held-out pairs)"
        texts.append(f"{stage} {text}")
    return ", ".join(texts)
