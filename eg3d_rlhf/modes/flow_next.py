"""The command of the next step in a WORK folder, which every flow command prints in its last line, "next:".

The steps are sampling, labelling, tuning, the study and the export. A training stores the flags of its
command in tune-NN/flags.json, so that the printed command repeats those that matter, such as --labels.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.experiments.mode import flags_of
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.tuning.flow.base.family import GEOMETRY, EmbedsText
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.workspace.plan import Plan

FLAGS = "flags.json"  # file of a training with the flags of its command
# Parameters of `flow tune` that a repeated command does not need.
_PASSING = ("folder", "device", "timeout", "dry_run", "pairs_only", "rehearse")


def flow_command(step: str, folder: Path, *flags: str) -> str:
    """Return a flow command for a shell."""
    return " ".join(["eg3d-rlhf", "flow", step, shlex.quote(str(folder)), *flags])


def given_flags(context: click.Context) -> list[str]:
    """Return the flags of a `flow tune` command that a further command in the same folder must repeat."""
    flags = flags_of(context)
    # Settings of --set are in the attribute `rare` of the command, see core.cli.
    rare = getattr(context.command, "rare", {})
    words = []
    for parameter in (*context.command.params, *rare.values()):
        # Only written flags are repeated. Defaults may change between versions, and would make the line long.
        if parameter.name not in flags.written or parameter.name in _PASSING:
            continue
        value = flags[parameter.name]
        # A setting of --set has no flag of its own, so it is written as NAME=VALUE.
        setting_name = next((name for name, setting in rare.items() if setting is parameter), None)
        if setting_name is not None:
            words.append(f"--set {shlex.quote(f'{setting_name}={value}')}")
        elif getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0])
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [shlex.quote(f"{parameter.opts[0]}={one_value}") for one_value in values]
    return words


def read_flags(training_folder: Path) -> list[str]:
    """Return the flags of a training's command; trainings of earlier versions have no such file."""
    path = training_folder / FLAGS
    return json.loads(path.read_text()) if path.is_file() else []


def answered_campaigns(work: Work) -> dict[str, tuple[int, int, Sequence[str]]]:
    """Return the labelling projects of WORK: name -> answered pairs, all pairs, questions."""
    from eg3d_rlhf.people.label.entities import LOCAL, Kind, Mode, parse_questions

    # Opening the database would create it, although there are no answers yet.
    if not (work.folder / "labels.db").is_file():
        return {}
    campaigns: dict[str, tuple[int, int, Sequence[str]]] = {}
    with open_store(work.database, create=False) as store:
        for campaign in store.campaigns():
            if campaign.settings.mode is not Mode.LABEL:
                continue
            name = campaign.settings.name
            # A set, because several annotators may answer the same pair.
            answered = {row.pair for row in store.judgements(name) if row.kind is Kind.PAIR}
            asked = [question.name for question in parse_questions(campaign.settings.questions)]
            # The question about geometry is always asked, also where the settings list only further ones.
            questions = asked if GEOMETRY in asked else [GEOMETRY, *asked]
            campaigns[name] = (len(answered), store.size(campaign.id, LOCAL)[0], questions)
    return campaigns


def judged_pairs(work: Work) -> list[tuple[str, str, int]]:
    """Return (labelling project, judge, answers) for each judge that answered a project of WORK."""
    from eg3d_rlhf.people.label.entities import JUDGE

    if not (work.folder / "labels.db").is_file():
        return []
    with open_store(work.database, create=False) as store:
        names = {campaign.id: campaign.settings.name for campaign in store.campaigns()}
        return [
            (names[tally.campaign_id], tally.name, tally.judgements)
            for tally in store.tally()
            if tally.role == JUDGE
        ]


def study_progress(work: Work) -> list[tuple[str, int, int, str]]:
    """Return (comparison, answered trials, all trials, training) for each comparison that has a design."""
    from eg3d_rlhf.modes.flow_study import BASE, CONTROL, Study

    progress = []
    for study in map(Study.open, work.numbered("study")):
        for baseline in (BASE, CONTROL):
            counts = study.answered(baseline)
            if counts is not None:
                progress.append((f"{study.folder.name} against {baseline}", *counts, study.tune))
    return progress


def next_line(work: Work) -> str:
    """Return the last line of a flow command, with the command of the next step in WORK."""
    return f"next: {next_command(work)}"


def next_command(work: Work) -> str:
    """Return the command of the next step in WORK.

    If the latest training found no learnable signal in its labels, the next step is to label more pairs, or
    to sample assets of more inputs if all pairs are answered.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.base.ranking import RANKING

    # The steps in their order: sample, label, tune, study, export. The first one that is missing is next.
    if not (work.asset_folder() / RANKING).is_file():
        return flow_command("sample", work.folder)
    trainings = work.numbered("tune")
    campaigns = answered_campaigns(work)
    # People may stop before they have answered everything; `status` then states both commands.
    open_campaigns = [name for name, (answered, pairs, _) in campaigns.items() if answered < pairs]
    if not trainings:
        if open_campaigns or not campaigns:
            return label_command(work, open_campaigns[0] if open_campaigns else work.campaign)
        return tune_command(work)
    training_flags = read_flags(trainings[-1])
    # A training without a report was interrupted. The same flags resume it.
    if not (trainings[-1] / "report.json").is_file():
        return flow_command("tune", work.folder, *training_flags)
    # Weights exist only if the labels carried a learnable signal.
    if work.tuned(trainings[-1]):
        return _study_command(work, trainings[-1].name)
    # labels of a file, to which the user adds further ones
    if any(word.startswith("--labels=") for word in training_flags):
        return flow_command("tune", work.folder, *training_flags)
    # further answers that the training did not use
    new_campaigns = [name for name in campaigns if name not in _trained_campaigns(work, training_flags)]
    if new_campaigns:
        if new_campaigns[-1] in open_campaigns:
            return label_command(work, new_campaigns[-1])
        # `tune_command` names all projects again, so the old list is dropped.
        other_flags = [word for word in training_flags if not word.startswith("--set campaigns=")]
        return " ".join([tune_command(work), *other_flags])
    return _further_labels_command(work, campaigns)


def _trained_campaigns(work: Work, training_flags: Sequence[str]) -> list[str]:
    """Return the names of the labelling projects whose answers a training used, by its flags."""
    for word in training_flags:
        if word.startswith("--set campaigns="):
            # The setting is a list with commas, as the user wrote it.
            return [name.strip() for name in word.partition("=")[2].split(",")]
    return [work.campaign]


def _further_labels_command(work: Work, campaigns: dict[str, tuple[int, int, Sequence[str]]]) -> str:
    """Return the command after a training without a learnable signal: more pairs, or more inputs."""
    from eg3d_rlhf.modes.flow_label import choose_questions, question_names
    from eg3d_rlhf.tuning.flow.workspace.answered import count_open_pairs

    if count_open_pairs(work, question_names(choose_questions(work, None))) <= 0:
        return new_folder_command(work)
    # The upper limit only makes the generator finite. It is never reached.
    further_name = next(name for number in range(2, 10**6) if (name := f"more-{number}") not in campaigns)
    return label_command(work, further_name)


def is_partly_answered(work: Work) -> bool:
    """Return True if there are answers to a part of the pairs, and no training yet."""
    campaigns = answered_campaigns(work).values()
    return (
        not work.numbered("tune")
        and any(answered for answered, _, _ in campaigns)
        and any(answered < pairs for answered, pairs, _ in campaigns)
    )


def label_command(work: Work, campaign: str) -> str:
    """Return the command that collects answers to a labelling project."""
    flags = [] if campaign == work.campaign else [f"--set campaign={shlex.quote(campaign)}"]
    return flow_command("label", work.folder, *flags)


def tune_command(work: Work, campaign: str = "") -> str:
    """Return the command that tunes on the answers of all labelling projects that have answers.

    `flow tune` reads the answers of WORK's default project by itself, so it is named only beside others.

    Args:
        work: the opened folder WORK.
        campaign: name of a project that is about to get its first answers, or "".
    """
    names = [name for name, (answered, _, _) in answered_campaigns(work).items() if answered]
    if campaign and campaign not in names:
        names.append(campaign)
    if not names or names == [work.campaign]:
        return flow_command("tune", work.folder)
    return flow_command("tune", work.folder, f"--set campaigns={shlex.quote(','.join(names))}")


def new_folder_command(work: Work) -> str:
    """Return the command that makes another work folder of the same generator with more inputs."""
    # WORK-2, WORK-3, ...: a folder that exists is never reused, because its inputs are fixed.
    number = next(n for n in range(2, 10**6) if not work.folder.with_name(f"{work.folder.name}-{n}").exists())
    family = family_of(Path(work.pipeline), print_line=lambda licence: None)
    if family.bundled:
        # `flow new` without --prompts uses all prompts of the bundled generator
        inputs = []
    elif work.kind != "prompts":
        inputs = ["--images=MORE_IMAGES"]
    elif isinstance(family, EmbedsText):
        inputs = ["--prompts=MORE_PROMPTS"]
    else:
        inputs = ["--conditioning=MORE_EMBEDDINGS"]
    folder = work.folder.with_name(f"{work.folder.name}-{number}")
    return flow_command("new", folder, f"--pipeline={shlex.quote(work.pipeline)}", *inputs)


def command_after_plan(work: Work, plan: "Plan") -> str:
    """Return the command after `flow plan`.

    If no number of pairs of these inputs can show anything, the next step is a folder with more inputs, and
    not more work in this one.
    """
    has_tuned = any(work.tuned(training_folder) for training_folder in work.numbered("tune"))
    if not plan.shows_something and not has_tuned:
        return new_folder_command(work)
    return next_command(work)


def _study_command(work: Work, tune: str) -> str:
    """Return the command that comes after a training with tuned weights: study, its report, or the export.

    Args:
        work: the opened folder WORK.
        tune: name of the training.
    """
    from eg3d_rlhf.modes.flow_study import BASE, CONTROL, RENDERS, Study

    study = next(
        (study for study in reversed([*map(Study.open, work.numbered("study"))]) if study.tune == tune), None
    )
    has_control = bool(work.tuned(work.folder / tune, control=True))
    # Against the base, and against the control of the same training if it has one.
    contests = (BASE, CONTROL) if has_control else (BASE,)
    counts = [None if study is None else study.answered(contest) for contest in contests]
    if study is None or any(count is None or count[0] < count[1] for count in counts):
        # The second comparison has as many trials as the first one, which may have had a limit.
        is_second = len(counts) > 1 and counts[0] is not None and counts[1] is None
        return flow_command(
            "study", work.folder, *([f"--n={counts[0][1]}"] if is_second and counts[0] else [])
        )
    # the renders are written with the report
    if not (study.folder / RENDERS).is_file():
        return flow_command("study", work.folder, "--report")
    return flow_command("export", work.folder, "--outdir=TUNED")
