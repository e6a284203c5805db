"""`eg3d-rlhf flow study`: the tuned generator against what it was, and against its control, on conditions
that nothing has seen before.

    drawn/test-base             the generator as it is, on test conditions
    drawn/tuned-00, control-00  what tune-00 made of it, and what the same training made of shuffled labels:
                                the same noises
    study-00/pictures.png       the same few test assets of each, drawn with the report
    study-00/base               the blind study of tuned against base: its design, answers and report;
                                likewise study-00/control

The number of a study's folder is its own; study.json says which training it is of.
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
    drawing_flags,
    drawn_with_bar,
    lines_of,
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
PICTURES = "pictures.png"
# assets of pictures.png, and pixels of each
SHOWN = 8
SIDE = 160
# what the tuned generator is compared with, in this order
BASE = "base"
CONTROL = "control"


@dataclass(frozen=True)
class Study:
    """A folder such as WORK/study-00."""

    folder: Path
    tune: str  # name of the training's folder

    @classmethod
    def open(cls, folder: Path) -> "Study":
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: expected a study that `flow study` made, got no {FILE}. Remove the folder, or"
                " restore it."
            )
        return cls(folder, json.loads(path.read_text())["tune"])

    @classmethod
    def of(cls, work: Work, tune: Path, again: bool) -> "Study":
        """The latest of a training, or a new one."""
        there = [study for study in map(cls.open, work.numbered("study")) if study.tune == tune.name]
        if there and not again:
            return there[-1]
        made = cls(work.next("study"), tune.name)
        write_atomic(made.folder / FILE, (json.dumps({"tune": made.tune}) + "\n").encode())
        return made

    def contest(self, against: str) -> studies.Folder:
        return studies.Folder(self.folder / against)

    def answered(self, against: str) -> tuple[int, int] | None:
        """Of one contest: trials that were answered, and that there are; None before it is designed. Over
        where both are equal.
        """
        from eg3d_rlhf.people.study.analysis import sort_rows

        if not self.contest(against).design.is_file():
            return None
        design, rows = studies.study_rows(self.contest(against))
        count = len(sort_rows(design, rows).trials)
        return (design.trials if stopped(design, count) else count), design.trials


@click.command("study", cls=GroupedCommand)
@work_argument
@option("--report", is_flag=True, help="What the answers say, as designed, in place of asking.")
@option(
    "--against",
    type=click.Choice([BASE, CONTROL]),
    show_default="base, then control",
    help="What the tuned generator is compared with.",
)
@count_option("--n", show_default="all test assets", help="Pairs after which it is over.")
@count_option("--annotators", default=1, help="People who are asked.")
@option("--again", is_flag=True, help="A new study of the same training.")
@option("--interim", is_flag=True, help="With --report: before the study is over, and marked so.")
@name_option("--tune", rare=True, show_default="the latest", help="Training, such as tune-00.")
@device_flag
@drawing_flags
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
    """Compare the tuned generator with what it was and with its control, blind, on test conditions, in the
    browser.

    \b
    Example:
        eg3d-rlhf flow study WORK
        eg3d-rlhf flow study WORK --report
    """
    from eg3d_rlhf.tuning.flow.workspace.sampled_assets import drawing_of

    check_extra(EXTRA)
    work = Work.open(folder)
    training = work.training(tune)
    if interim and not report:
        raise ValueError("--interim: belongs to --report. Add that, or leave it out.")
    if report:
        tell_report(work, Study.of(work, training, False), against, interim)
        return
    family = work.check_pipeline()
    arms = {"test-base": None, numbered("tuned", training): work.tuned(training)}
    if against != BASE and (control := work.tuned(training, control=True)):
        arms[numbered("control", training)] = control
    elif against == CONTROL:
        raise ValueError(
            f"--against=control: expected a control in {training}, got none. Tune without --no-control."
        )
    with running(device, timeout, AGAIN) as ranks:
        for name, weights in arms.items():
            where = choose_device(device) if ranks.world == 1 else ranks.device
            drawing = drawing_of(
                work, family, name, [TEST], where, ranks, tuned=weights, cells=cells, few_steps=few_steps
            )
            drawn = drawn_with_bar(drawing)
            for line in lines_of(drawing, drawn) if ranks.main else ():
                click.echo(line)
        if not ranks.main:
            return
    given = {name: server[name] for name in launch.given_flags(ctx) & server.keys()}
    serve(work, Study.of(work, training, again), list(arms), against, n, annotators, given)


def numbered(what: str, tune: Path) -> str:
    """tune-03 -> tuned-03."""
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
    """Serve the contest that is named, or the first that is not over."""
    contests = dict(zip((BASE, CONTROL), (arms[0], *arms[2:]), strict=False))
    states = {name: study.answered(name) for name in contests}
    still = [name for name, state in states.items() if state is None or state[0] < state[1]]
    if not still or (against is not None and against not in still):
        raise ValueError(
            f"{study.folder}: expected an open study, got one that is over. See --report, or begin another:"
            " --again"
        )
    chosen = against or still[0]
    place = study.contest(chosen)
    new = states[chosen] is None
    rare = study_job.main.rare  # of a GroupedCommand
    flags = [f"--outdir={place.path}"]
    flags += [
        f"--set={name}={value}" if name in rare else f"--{name}={value}" for name, value in server.items()
    ]
    if new:
        sides = work.drawn(contests[chosen]), work.drawn(arms[1])
        _, pairs, _ = read_sides(*sides, lambda text: None)
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
        f" {'the generator as it was' if chosen == BASE else 'its control'}"
    )
    study_job.main.main(flags, standalone_mode=False)


def tell_report(work: Work, study: Study, against: str | None, interim: bool) -> None:
    """Reports of the contests that were asked about."""
    there = [
        name for name in ((against,) if against else (BASE, CONTROL)) if study.answered(name) is not None
    ]
    if not there:
        raise ValueError(
            f"{study.folder}: expected answers, got none. Ask: eg3d-rlhf flow study {work.folder}"
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
    click.echo(f"{draw_pictures(work, study)}: the same test assets before tuning, tuned, and of the control")


def draw_pictures(work: Work, study: Study) -> Path:
    """Assets of evenly spaced test conditions, one noise for a column. Returns: the file."""
    from eg3d_rlhf.experiments.media.rendering import png
    from eg3d_rlhf.experiments.media.sheet import Row, sheet
    from eg3d_rlhf.tuning.flow.base.ranking import RANKING
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import picture

    number = study.tune.rpartition("-")[2]
    arms = {"before": "test-base", "tuned": f"tuned-{number}", "control": f"control-{number}"}
    files = {
        arm: {
            (line["condition"], line["seed"]): work.drawn(name) / line["look_at"] for line in work.lines(name)
        }
        for arm, name in arms.items()
        if (work.drawn(name) / RANKING).is_file()
    }
    first = dict(sorted(files["tuned"], reverse=True))  # the least seed of each condition
    chosen = [(name, first[name]) for name in work.names(TEST) if name in first]
    chosen = chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]
    rows = [
        Row(name=arm, cells=[picture(found.get(key), work.up, SIDE) for key in chosen])
        for arm, found in files.items()
    ]
    rows[-1] = replace(rows[-1], captions=[condition[: SIDE // 8] for condition, _ in chosen])
    write_atomic(path := study.folder / PICTURES, png(sheet("", rows, names=110)))
    return path
