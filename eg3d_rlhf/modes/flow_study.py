"""The job `flow study`: blind comparison of the tuned generator with the untuned one and with its control, on
test prompts that neither training nor checkpoint selection used.

    drawn/test-base             assets of the untuned generator, for the test prompts
    drawn/tuned-00, control-00  assets of tune-00, and of the same training on shuffled labels, from the same
                                noises
    study-00/pictures.png       the same few test assets of each, rendered with the report
    study-00/base               the blind study of tuned against base: its design, answers and report;
                                likewise study-00/control

Studies are numbered by themselves; study.json records which training a study is about.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, choose_device, option
from eg3d_rlhf.experiments.mode import running
from eg3d_rlhf.modes import study as study_job
from eg3d_rlhf.modes.flow_sample import (
    AGAIN,
    device_flag,
    lines_of,
    sample_with_bar,
    sampling_flags,
    work_argument,
)
from eg3d_rlhf.modes.shared_flags import count_option, name_option
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA
from eg3d_rlhf.people.study import planning as studies
from eg3d_rlhf.people.study.design import read_sides, stopped
from eg3d_rlhf.tuning.flow.workspace.work_folder import TEST, Work
from training.storage import write_atomic

FILE = "study.json"
RENDERS = "pictures.png"
# number of assets in pictures.png, and the side of each in pixels
SHOWN = 8
SIDE = 160
# what the tuned generator is compared with, in this order
BASE = "base"
CONTROL = "control"


@dataclass(frozen=True)
class Study:
    """Folder of a study, such as WORK/study-00."""

    folder: Path
    tune: str  # name of the training's folder

    @classmethod
    def open(cls, folder: Path) -> "Study":
        """Open the folder of an existing study. Raises: FileNotFoundError for another folder."""
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: no {FILE} in the folder, so it is no study of `flow study`. Remove the folder, or"
                " restore the file."
            )
        return cls(folder, json.loads(path.read_text())["tune"])

    @classmethod
    def of(cls, work: Work, tune: Path, again: bool) -> "Study":
        """Return the latest study of a training; a new one if there is none or with `again`."""
        there = [study for study in map(cls.open, work.numbered("study")) if study.tune == tune.name]
        if there and not again:
            return there[-1]
        made = cls(work.next("study"), tune.name)
        write_atomic(made.folder / FILE, (json.dumps({"tune": made.tune}) + "\n").encode())
        return made

    def contest(self, against: str) -> studies.Folder:
        """Return the folder of the comparison with `base` or `control`."""
        return studies.Folder(self.folder / against)

    def answered(self, against: str) -> tuple[int, int] | None:
        """Count the trials of one comparison that were answered, and all trials; None before it is designed.

        The comparison is over when both are equal.
        """
        from eg3d_rlhf.people.study.analysis import sort_rows

        if not self.contest(against).design.is_file():
            return None
        design, rows = studies.study_rows(self.contest(against))
        count = len(sort_rows(design, rows).trials)
        # stopped early by the design's rule: it counts as complete
        return (design.trials if stopped(design, count) else count), design.trials


@click.command("study", cls=GroupedCommand)
@work_argument
@option(
    "--report", is_flag=True, help="Report the results, as the design states, instead of serving the study."
)
@option(
    "--against",
    type=click.Choice([BASE, CONTROL]),
    show_default="base first, then control",
    help="Model that the tuned generator is compared with.",
)
@count_option("--n", show_default="all test assets", help="Number of pairs after which the study ends.")
@count_option("--annotators", default=1, help="Number of people who answer.")
@option("--again", is_flag=True, help="Begin a new study of the same training.")
@option(
    "--interim",
    is_flag=True,
    help="With --report: report before the study is over; the report is marked as interim.",
)
@name_option("--tune", rare=True, show_default="the latest", help="Training to study, such as tune-00.")
@device_flag
@sampling_flags
@launch.server_options("access.jsonl in the study's folder")
@click.pass_context
def study(
    ctx: click.Context,
    folder: Path,
    report: bool,
    against: str | None,
    n: int | None,
    annotators: int,
    again: bool,
    interim: bool,
    tune: str | None,
    device: str,
    cells: int | None,
    few_steps: int | None,
    timeout: float,
    **server,
) -> None:
    """Compare the tuned generator in the browser with the untuned one and with its control, blind, on test
    prompts.

    \b
    Example:
        eg3d-rlhf flow study WORK
        eg3d-rlhf flow study WORK --report
    """
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import drawing_of

    check_extra(EXTRA)
    work = Work.open(folder)
    # the latest one unless --tune names another
    training = work.training(tune)
    if interim and not report:
        raise ValueError("--interim needs --report. Add --report, or remove --interim.")
    # reports read the stored answers; they need no generator
    if report:
        write_reports(work, Study.of(work, training, False), against, interim)
        return
    family = work.check_pipeline()
    # arm -> tuned weights; None: the generator as it is
    arms = {"test-base": None, numbered("tuned", training): work.tuned(training)}
    if against != BASE and (control := work.tuned(training, control=True)):
        arms[numbered("control", training)] = control
    elif against == CONTROL:
        raise ValueError(f"--against=control: {training} has no control. Tune again without --no-control.")
    # assets that exist are not generated again
    with running(device, timeout, AGAIN) as ranks:
        for name, weights in arms.items():
            where = choose_device(device) if ranks.world == 1 else ranks.device
            sampling = drawing_of(
                work, family, name, [TEST], where, ranks, tuned=weights, cells=cells, few_steps=few_steps
            )
            drawn = sample_with_bar(sampling)
            for line in lines_of(sampling, drawn) if ranks.main else ():
                click.echo(line)
        if not ranks.main:
            return
    # only flags that were given are passed on; the others keep `study`'s defaults
    given = {name: server[name] for name in launch.given_flags(ctx) & server.keys()}
    serve(work, Study.of(work, training, again), list(arms), against, n, annotators, given)


def numbered(what: str, tune: Path) -> str:
    """Number an arm as its training: `tuned` of tune-03 is tuned-03."""
    return f"{what}-{tune.name.rpartition('-')[2]}"


def serve(
    work: Work,
    study: Study,
    arms: list[str],
    against: str | None,
    n: int | None,
    annotators: int,
    server: Mapping[str, object],
) -> None:
    """Serve the comparison that is named, or else the first that is not over."""
    # arms: test-base, tuned-NN and, if there is one, control-NN
    contests = dict(zip((BASE, CONTROL), (arms[0], *arms[2:]), strict=False))
    states = {name: study.answered(name) for name in contests}
    # not designed yet, or not all trials answered
    still = [name for name, state in states.items() if state is None or state[0] < state[1]]
    if not still or (against is not None and against not in still):
        raise ValueError(
            f"{study.folder}: the study is over. See its results with --report, or begin another with"
            " --again."
        )
    chosen = against or still[0]
    place = study.contest(chosen)
    # a new comparison is designed from the assets; an existing one resumes from its folder
    new = states[chosen] is None
    rare = study_job.main.rare  # of a GroupedCommand
    flags = [f"--outdir={place.path}"]
    flags += [
        f"--set={name}={value}" if name in rare else f"--{name}={value}" for name, value in server.items()
    ]
    if new:
        sides = work.drawn(contests[chosen]), work.drawn(arms[1])
        _, pairs, _ = read_sides(*sides, lambda text: None)
        # with two or more annotators, a pair may be judged twice; so there are at most twice as many trials
        most = len(pairs) * min(annotators, 2)
        flags += [
            f"--a={sides[0]}",
            f"--b={sides[1]}",
            f"--n={min(n or most, most)}",
            f"--up={work.up}",
            f"--annotators={annotators}",
            f"--seed={work.seed}",
            f"--set=name={study.folder.name}-{chosen}",
        ]
    click.echo(
        f"{study.folder.name}: {study.tune} against"
        f" {'the untuned generator' if chosen == BASE else 'its control'}"
    )
    study_job.main.main(flags, standalone_mode=False)


def write_reports(work: Work, study: Study, against: str | None, interim: bool) -> None:
    """Report the comparison that is named, or both."""
    there = [
        name for name in ((against,) if against else (BASE, CONTROL)) if study.answered(name) is not None
    ]
    if not there:
        raise ValueError(
            f"{study.folder}: there are no answers yet. Collect some with eg3d-rlhf flow study {work.folder}"
        )
    for name in there:
        click.echo(f"{study.tune} against {name}: {' of '.join(map(str, study.answered(name) or ()))} pairs")
        flags = [
            "report",
            f"--outdir={study.contest(name).path}",
            "--images=0",
            *(["--interim"] if interim else []),
        ]
        study_job.main.main(flags, standalone_mode=False)
    click.echo(
        f"{write_renders(work, study)}: the same test assets before tuning, after tuning and of the control"
    )


def write_renders(work: Work, study: Study) -> Path:
    """Render assets of evenly spaced test prompts, one column per noise, one row per arm. Returns: the
    file.
    """
    from eg3d_rlhf.experiments.media.rendering import png
    from eg3d_rlhf.experiments.media.sheet import Row, sheet
    from eg3d_rlhf.tuning.flow.base.ranking import RANKING
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import image_of

    number = study.tune.rpartition("-")[2]
    arms = {"before": "test-base", "tuned": f"tuned-{number}", "control": f"control-{number}"}
    # by arm: (condition, noise seed) -> the file to render
    files = {
        arm: {
            (line["condition"], line["seed"]): work.drawn(name) / line["look_at"] for line in work.lines(name)
        }
        for arm, name in arms.items()
        if (work.drawn(name) / RANKING).is_file()
    }
    first = dict(
        sorted(files["tuned"], reverse=True)
    )  # reversed, so that the smallest seed of each prompt is kept
    chosen = [(name, first[name]) for name in work.names(TEST) if name in first]
    # every k-th prompt, at most SHOWN in all
    chosen = chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]
    rows = [
        Row(name=arm, cells=[image_of(arm_files.get(key), work.up, SIDE) for key in chosen])
        for arm, arm_files in files.items()
    ]
    rows[-1] = replace(rows[-1], captions=[condition[: SIDE // 8] for condition, _ in chosen])
    write_atomic(path := study.folder / RENDERS, png(sheet("", rows, names=110)))
    return path
