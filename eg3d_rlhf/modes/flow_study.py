"""The job `flow study`: blind comparisons of the tuned generator with two other generators.

The other generators are the untuned generator (base) and the control, which was trained in the same way on
shuffled labels. The assets belong to the test prompts, which neither the training nor the checkpoint
selection used. Files in WORK:

    drawn/test-base         assets of the untuned generator
    drawn/tuned-00          assets of the generator of training tune-00, sampled from the same noises
    drawn/control-00        assets of the control of training tune-00, sampled from the same noises
    study-00/images.png     renders of a few test assets of all three generators, written with the report
    study-00/base           comparison of tuned and untuned generator: design, answers and report
    study-00/control        comparison of tuned generator and control: design, answers and report

The number of a study is independent of the number of its training: study.json records the training.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, choose_device, file_hash, option
from eg3d_rlhf.experiments.mode import running
from eg3d_rlhf.modes import study as study_job
from eg3d_rlhf.modes.flow_sample import (
    AGAIN,
    device_flag,
    sample_with_bar,
    sampling_flags,
    sampling_report,
    work_argument,
)
from eg3d_rlhf.modes.judge_labelling import (
    judge_labelling_options,
    judge_request,
    read_calibration,
)
from eg3d_rlhf.modes.label_origin import labels_from_option
from eg3d_rlhf.modes.shared_flags import count_option, name_option
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store
from eg3d_rlhf.people.study import planning as studies
from eg3d_rlhf.people.study.design import read_sides, stopped
from eg3d_rlhf.preferences.provenance import JUDGES, PEOPLE
from eg3d_rlhf.tuning.flow.workspace.work_folder import TEST, Work
from training.storage import write_atomic

FILE = "study.json"
RENDERS = "images.png"
SHOWN = 8  # largest number of assets of each generator in images.png
SIDE = 160  # width and height of a render in pixels
# Names of the generators that the tuned generator is compared with, in the order of the comparisons.
BASE = "base"
CONTROL = "control"


@dataclass(frozen=True)
class Study:
    """Folder of a study, such as WORK/study-00, with the training that the study is about."""

    folder: Path
    tune: str  # name of the training's folder

    @classmethod
    def open(cls, folder: Path) -> "Study":
        """Open the folder of an existing study. Raises: FileNotFoundError for another folder."""
        study_file = folder / FILE
        if not study_file.is_file():
            raise FileNotFoundError(
                f"{folder}: the file {FILE} is missing, so this is no folder of `flow study`. Remove the"
                " folder, or restore the file from a backup."
            )
        # the file names the training only; the other data lies in the comparisons
        return cls(folder, json.loads(study_file.read_text())["tune"])

    @classmethod
    def of(cls, work: Work, training_folder: Path, makes_new: bool) -> "Study":
        """Return the latest study of a training, or make a new study if there is none.

        Args:
            work: the opened folder WORK.
            training_folder: folder of the training, such as WORK/tune-00.
            makes_new: True to make a new study although there is one already.
        """
        # in the order of their numbers, so the last study is the latest
        studies_of_training = [
            study for study in map(cls.open, work.numbered("study")) if study.tune == training_folder.name
        ]
        if studies_of_training and not makes_new:
            return studies_of_training[-1]
        new_study = cls(work.next("study"), training_folder.name)
        write_atomic(new_study.folder / FILE, (json.dumps({"tune": new_study.tune}) + "\n").encode())
        return new_study

    def contest(self, baseline: str) -> studies.Folder:
        """Return the folder of one comparison of this study.

        Args:
            baseline: BASE or CONTROL, the generator that the tuned generator is compared with.
        """
        return studies.Folder(self.folder / baseline)

    def answered(self, baseline: str) -> tuple[int, int] | None:
        """Count the trials of one comparison: (answered trials, all trials). A trial is one shown pair.

        The comparison is over if both numbers are equal. Return None if the comparison has no design yet.

        Args:
            baseline: BASE or CONTROL, the generator that the tuned generator is compared with.
        """
        # imported here, because --help must not load this module
        from eg3d_rlhf.people.study.analysis import sort_rows

        if not self.contest(baseline).design.is_file():
            return None
        # the stored design, and all answers in the database
        design, answer_rows = studies.study_rows(self.contest(baseline))
        answered_count = len(sort_rows(design, answer_rows).trials)
        # A comparison that was stopped by the rule of its design counts as complete.
        return (design.trials if stopped(design, answered_count) else answered_count), design.trials


@click.command("study", cls=GroupedCommand)
@work_argument
@option(
    "--report",
    is_flag=True,
    help="Write the report of the results, as the design of the study states, instead of collecting answers.",
)
@option(
    "--against",
    type=click.Choice([BASE, CONTROL]),
    show_default="base first, then control",
    help=(
        "Generator that the tuned generator is compared with: the untuned generator (base), or the control"
        " that was trained on shuffled labels."
    ),
)
@count_option(
    "--n",
    show_default="all pairs of the study's assets",
    help="Number of trials (answered pairs) after which the comparison ends.",
)
@count_option(
    "--annotators",
    default=1,
    help="Number of people who answer. With two or more, each pair is shown to two of them.",
)
@option(
    "--gold-every",
    metavar="TRIALS",
    type=click.IntRange(min=0),
    show_default="10",
    help=(
        "Show one gold check per so many trials: an asset beside a damaged copy of it. People who prefer the"
        " damaged copies are left out of the result. 0: no gold checks."
    ),
)
@option(
    "--again",
    is_flag=True,
    help="Begin a new study of the same training, and keep the results of the old study.",
)
@option(
    "--interim",
    is_flag=True,
    help="Write the report of --report before the study is over; the report is marked as interim.",
)
@name_option(
    "--tune",
    rare=True,
    show_default="the latest training",
    help="Name of the training in WORK that is studied, such as tune-00.",
)
@device_flag
@sampling_flags
@labels_from_option()
@judge_labelling_options()
@option(
    "--same-judge",
    is_flag=True,
    group="Judge",
    help=(
        "Accept a judge of the family that made the labels of the training. Its panel is then no independent"
        " evaluation, and the report repeats this."
    ),
)
@launch.server_options("access.jsonl in the study's folder")
@click.pass_context
def study(
    ctx: click.Context,
    folder: Path,
    report: bool,
    against: str | None,
    n: int | None,
    annotators: int,
    gold_every: int | None,
    again: bool,
    interim: bool,
    tune: str | None,
    device: str,
    cells: int | None,
    few_steps: int | None,
    timeout: float,
    labels_from: str,
    **server_values,
) -> None:
    """Compare the tuned generator with the untuned generator, and with its control, in the browser. The study
    is blind: people do not see which generator made an asset. It uses the prompts that were kept for it. With
    --judge, a vision-language model answers the same pairs as a second panel.

    \b
    Example:
        eg3d-rlhf flow study WORK
        eg3d-rlhf flow study WORK --report
    """
    check_extra(EXTRA)
    work = Work.open(folder)
    # raises an error if there is no finished training
    training = work.training(tune)
    if interim and not report:
        raise ValueError("--interim needs --report. Add --report, or remove --interim.")
    if "labels_from" in launch.given_flags(ctx) and not report:
        raise ValueError("--labels-from applies to --report. Add --report, or remove --labels-from.")
    judge = judge_request(ctx, server_values, "sqlite:///study.db")
    if judge is not None:
        read_calibration(judge)  # raises ValueError for a file that is no calibration of this judge
        check_family(work, training, judge.settings.family, server_values["same_judge"])
    elif server_values["same_judge"]:
        raise ValueError("--same-judge applies to the panel of a judge. Pass --judge=URL, or remove it.")

    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.modes.flow_next import next_line
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import make_sampling

    # A report reads the stored answers, so the generator need not be loaded.
    if report:
        write_reports(work, Study.of(work, training, False), against, interim, labels_from)
        click.echo(next_line(work))
        return
    family = work.check_pipeline()
    # name of a folder below drawn/ -> tuned weights by stage; None: the untuned generator
    weights_by_arm = {"test-base": None, arm_name("tuned", training): work.tuned(training)}
    if against != BASE and (control_weights := work.tuned(training, control=True)):
        weights_by_arm[arm_name("control", training)] = control_weights
    elif against == CONTROL:
        raise ValueError(
            f"--against=control: {training} has no control. Run `flow tune` again without --no-control."
        )
    has_design = not again and is_designed(work, training, against, with_control=len(weights_by_arm) > 2)
    # Assets that exist already are not generated again.
    with running(device, timeout, AGAIN) as ranks:
        target_device = choose_device(device) if ranks.world == 1 else ranks.device
        # A designed comparison has its pairs; a limited one needs a part of the assets.
        all_stems = stems_by_use(work)
        # with two or more annotators, each pair is shown to two of them
        needed_pairs = len(all_stems) if n is None else -(-n // min(annotators, 2))
        stem_count = 0 if has_design else min(needed_pairs, len(all_stems))
        while stem_count:
            for arm, weights in weights_by_arm.items():
                sampling = make_sampling(
                    work,
                    family,
                    arm,
                    [TEST],
                    target_device,
                    ranks,
                    tuned_weights=weights,
                    cells=cells,
                    few_steps=few_steps,
                    stems=None if stem_count == len(all_stems) else frozenset(all_stems[:stem_count]),
                )
                sampling_summary = sample_with_bar(sampling)
                for report_line in sampling_report(sampling, sampling_summary) if ranks.is_main else ():
                    click.echo(report_line)
            # Samples without a surface, and assets that the tuning did not change, form no pair.
            if stem_count == len(all_stems) or count_pairs(work, list(weights_by_arm)) >= needed_pairs:
                break
            stem_count = min(2 * stem_count, len(all_stems))
        if not ranks.is_main:
            return
    # Only flags that were given are passed to the job `study`, so that its defaults apply to the others.
    given_server_flags = {
        name: server_values[name] for name in launch.given_flags(ctx) & server_values.keys()
    }
    serve(
        work,
        Study.of(work, training, again),
        list(weights_by_arm),
        against,
        n,
        annotators,
        gold_every,
        given_server_flags,
        is_judged=judge is not None,
    )


def judge_note(training_folder: Path) -> str:
    """Return a line on labels of judges from which a training learnt, or "" if it used none."""
    report_path = training_folder / "report.json"
    label_facts = json.loads(report_path.read_text()).get("labels", {}) if report_path.is_file() else {}
    if not label_facts.get("of_judges"):
        return ""
    uncalibrated_text = (
        "; UNCALIBRATED: no calibration against people has passed" if "uncalibrated" in label_facts else ""
    )
    return (
        f"{training_folder.name} learnt from {label_facts['of_judges']} labels of judges"
        f" ({label_facts.get('judges', 'unknown')}) and {label_facts.get('of_people', 0)} of"
        f" people{uncalibrated_text}"
    )


def check_family(work: Work, training_folder: Path, family: str, is_accepted: bool) -> None:
    """Raise ValueError if a judge of this family made labels of the training, unless the user accepts it.

    A model that labelled rates a generator that was tuned towards its own taste too well.

    Args:
        work: the opened folder WORK.
        training_folder: folder of the training.
        family: family of the judge of the study.
        is_accepted: value of --same-judge.
    """
    report_path = training_folder / "report.json"
    label_facts = json.loads(report_path.read_text()).get("labels", {}) if report_path.is_file() else {}
    if is_accepted or not label_facts.get("of_judges"):
        return
    families: set[str] = set()
    if (work.folder / "labels.db").is_file():
        with open_store(work.database, create=False) as store:
            families = {
                str((judgement.judge or {}).get("family", ""))
                for judgement in store.judgements(labels_from=JUDGES)
            }
    # Labels of a file state no family, so no family can be ruled out.
    is_unknown = "labels" in label_facts or not families
    if is_unknown or family.casefold() in {name.casefold() for name in families}:
        labelled_by = "judges of an unknown family" if is_unknown else f"a judge of the family {family}"
        raise ValueError(
            f"--judge-family={family}: {labelled_by} made labels of {training_folder.name}, so its panel"
            " would be no independent evaluation. Use a judge of another family, or pass --same-judge,"
            " which the report repeats."
        )


def is_designed(work: Work, training_folder: Path, baseline: str | None, with_control: bool) -> bool:
    """Return True if the comparison that `serve` would choose has a design, so that its assets exist.

    Args:
        work: the opened folder WORK.
        training_folder: folder of the training.
        baseline: BASE or CONTROL; None: the first comparison that is not over.
        with_control: True if there is a comparison with the control.
    """
    studies_of_training = [
        study for study in map(Study.open, work.numbered("study")) if study.tune == training_folder.name
    ]
    if not studies_of_training:
        return False
    contests = (BASE, CONTROL) if with_control else (BASE,)
    progress = {name: studies_of_training[-1].answered(name) for name in contests}
    unfinished = [name for name, counts in progress.items() if counts is None or counts[0] < counts[1]]
    chosen = baseline or next(iter(unfinished), BASE)
    return progress.get(chosen) is not None


def stems_by_use(work: Work) -> list[str]:
    """Return the stems of the study's assets in the order in which a limited study uses them.

    One asset of every prompt comes first, then a second one of every prompt, and so on. The order of the
    prompts is random.
    """
    # imported here, because --help must not load this module
    import numpy as np

    numbers = np.random.default_rng(work.seed).permutation(len(work.names(TEST))).tolist()
    # the names of the files, see `sampled_assets`
    return [f"{number:05d}-{seed}" for seed in range(work.each) for number in numbers]


def count_pairs(work: Work, arm_folders: list[str]) -> int:
    """Count the prompts and seeds of which all arms have an asset, and the tuned one is another file."""
    files_by_arm = [
        {
            (line["condition"], line["seed"]): work.asset_folder(arm) / line["look_at"]
            for line in work.lines(arm)
        }
        for arm in arm_folders
    ]
    untuned, tuned, *_ = files_by_arm
    common = set.intersection(*(set(files) for files in files_by_arm))
    return sum(file_hash(untuned[key]) != file_hash(tuned[key]) for key in common)


def arm_name(role: str, training_folder: Path) -> str:
    """Return the name of the folder of an arm's assets, with the number of the training.

    >>> arm_name("tuned", Path("WORK/tune-03"))
    'tuned-03'
    """
    return f"{role}-{training_folder.name.rpartition('-')[2]}"


def serve(
    work: Work,
    study: Study,
    arm_folders: list[str],
    baseline: str | None,
    trial_limit: int | None,
    annotator_count: int,
    gold_every: int | None,
    server_values: Mapping[str, object],
    is_judged: bool = False,
) -> None:
    """Serve one comparison in the browser until it is interrupted; design the comparison first if it is new.

    Args:
        work: the opened folder WORK.
        study: the study.
        arm_folders: names of the folders of assets: test-base, tuned-NN and, if there is a control,
            control-NN.
        baseline: BASE or CONTROL; None: the first comparison that is not over.
        trial_limit: number of answered pairs after which the comparison ends; None: all pairs.
        annotator_count: number of people who answer.
        gold_every: number of trials per gold check, 0 for no gold checks; None: the default of `study`.
        server_values: flags of the server, and of the judge, that were given, by name.
        is_judged: True if a judge answers, which may also answer a comparison that people have finished.

    Raises: ValueError if the comparison is over.
    """
    # imported here, because the module imports this one
    from eg3d_rlhf.modes.flow_next import next_line

    # By generator that the tuned one is compared with: its folder. arms[1] is the tuned generator; without a
    # control, `zip` stops after BASE.
    asset_folder_by_contest = dict(zip((BASE, CONTROL), (arm_folders[0], *arm_folders[2:]), strict=False))
    progress_by_contest = {name: study.answered(name) for name in asset_folder_by_contest}
    # comparisons without a design, or with trials that are not answered
    unfinished_contests = [
        name
        for name, progress in progress_by_contest.items()
        if progress is None or progress[0] < progress[1]
    ]
    if not is_judged and (
        not unfinished_contests or (baseline is not None and baseline not in unfinished_contests)
    ):
        finished_part = "the study" if baseline is None else f"its comparison with {baseline}"
        raise ValueError(
            f"{study.folder}: {finished_part} is over. Add --report to see the results, or --again to begin"
            " another study."
        )
    # A judge answers the comparison with the untuned generator by default.
    chosen_contest = baseline or (BASE if is_judged else unfinished_contests[0])
    contest_folder = study.contest(chosen_contest)
    # The comparison is served by the job `study`, whose command line is built here. Settings without a flag
    # are passed as --set=NAME=VALUE.
    settings_without_flag = study_job.main.rare
    command_line = [f"--outdir={contest_folder.path}"]
    command_line += [
        f"--set={name}={value}" if name in settings_without_flag else f"--{name.replace('_', '-')}={value}"
        for name, value in server_values.items()
    ]
    # An existing comparison rejects another value than that of its design.
    if gold_every is not None:
        command_line.append(f"--gold-every={gold_every}")
    # A new comparison is designed from the assets; an existing one resumes from its folder.
    if progress_by_contest[chosen_contest] is None:
        asset_folders = (
            work.asset_folder(asset_folder_by_contest[chosen_contest]),
            work.asset_folder(arm_folders[1]),
        )
        # the function receives remarks about the assets, which are not printed here
        _, pairs, _ = read_sides(*asset_folders, lambda text: None)
        # A pair is shown to at most two people, which limits the number of answers.
        max_trials = len(pairs) * min(annotator_count, 2)
        command_line += [
            f"--a={asset_folders[0]}",
            f"--b={asset_folders[1]}",
            f"--n={min(trial_limit or max_trials, max_trials)}",
            f"--up={work.up}",
            f"--annotators={annotator_count}",
            f"--seed={work.seed}",
            f"--set=name={study.folder.name}-{chosen_contest}",
        ]
    click.echo(
        f"{study.folder.name}: {study.tune} against"
        f" {'the untuned generator' if chosen_contest == BASE else 'its control'}"
    )
    # standalone_mode=False: click returns to this function instead of ending the program
    study_job.main.main(command_line, standalone_mode=False)
    # reached when the server has been stopped
    click.echo(next_line(work))


def write_reports(
    work: Work, study: Study, baseline: str | None, is_interim: bool, labels_from: str = PEOPLE
) -> None:
    """Write the reports of a study, and renders of some test assets.

    Args:
        work: the opened folder WORK.
        study: the study.
        baseline: BASE or CONTROL; None: both comparisons, as far as they have a design.
        is_interim: True to report a comparison that is not over.
        labels_from: answers that the reports contain: "people", "judges" or "all".

    Raises: ValueError if no comparison has a design.
    """
    # A comparison without a design has no answers.
    designed_contests = [
        contest_name
        for contest_name in ((baseline,) if baseline else (BASE, CONTROL))
        if study.answered(contest_name) is not None
    ]
    if not designed_contests:
        raise ValueError(
            f"{study.folder}: people have not answered yet. Collect answers with eg3d-rlhf flow study"
            f" {work.folder}"
        )
    if note := judge_note(work.folder / study.tune):
        click.echo(note)
    for contest_name in designed_contests:
        click.echo(
            f"{study.tune} against {contest_name}:"
            f" {' of '.join(map(str, study.answered(contest_name) or ()))} pairs"
        )
        command_line = [
            "report",
            f"--outdir={study.contest(contest_name).path}",
            # `write_renders` makes one image for both comparisons instead
            "--images=0",
            f"--labels-from={labels_from}",
            *(["--interim"] if is_interim else []),
        ]
        study_job.main.main(command_line, standalone_mode=False)
    click.echo(
        f"{write_renders(work, study)}: the same test assets before tuning, after tuning and of the control"
    )


def write_renders(work: Work, study: Study) -> Path:
    """Render assets of evenly spaced test prompts, one column per prompt and one row per generator.

    All assets of a column have the same prompt and the same noise seed.

    Returns: the written PNG file.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments.media.rendering import png
    from eg3d_rlhf.experiments.media.sheet import Row, sheet
    from eg3d_rlhf.tuning.flow.base.ranking import RANKING
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import image_of

    # tune-00 -> 00, the number of the training in the names of its folders
    training_number = study.tune.rpartition("-")[2]
    folder_by_arm = {
        "before": "test-base",
        "tuned": f"tuned-{training_number}",
        "control": f"control-{training_number}",
    }
    # by arm: (prompt, noise seed) -> the file to render. A training without a control has no such folder.
    files_by_arm = {
        arm: {
            (asset_line["condition"], asset_line["seed"]): work.asset_folder(folder_name)
            / asset_line["look_at"]
            for asset_line in work.lines(folder_name)
        }
        for arm, folder_name in folder_by_arm.items()
        if (work.asset_folder(folder_name) / RANKING).is_file()
    }
    # prompt -> smallest noise seed: in reversed order, the smallest seed of a prompt comes last and
    # overwrites the others
    smallest_seeds = dict(sorted(files_by_arm["tuned"], reverse=True))
    column_keys = [
        (prompt, smallest_seeds[prompt]) for prompt in work.names(TEST) if prompt in smallest_seeds
    ]
    # every k-th prompt, at most SHOWN prompts
    column_keys = column_keys[:: max(1, len(column_keys) // SHOWN)][:SHOWN]
    sheet_rows = [
        # `get` returns None for an asset that could not be sampled; its cell says so
        Row(name=arm, cells=[image_of(arm_files.get(column), work.up, SIDE) for column in column_keys])
        for arm, arm_files in files_by_arm.items()
    ]
    # The captions are written below the last row. A letter is about 8 pixels wide.
    sheet_rows[-1] = replace(sheet_rows[-1], captions=[prompt[: SIDE // 8] for prompt, _ in column_keys])
    # 110: width in pixels of the column of the rows' names
    write_atomic(renders_path := study.folder / RENDERS, png(sheet("", sheet_rows, name_width=110)))
    return renders_path
