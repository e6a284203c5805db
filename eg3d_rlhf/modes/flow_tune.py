"""The job `flow tune`: tunes a flow generator's stages on people's answers, with a shuffled-label control."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_of, rarely, together
from eg3d_rlhf.experiments.mode import Flags, flags_of, running
from eg3d_rlhf.modes.circular_dpo import default_settings
from eg3d_rlhf.modes.flow_flags import check_tuning, circular_settings, loop_flags, of_circular, tuning_flags
from eg3d_rlhf.modes.flow_sample import AGAIN, device_flag, timeout_flag, work_argument
from eg3d_rlhf.modes.shared_flags import PATH
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows, check_stages
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, Tuning, Work

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import Strip
    from training.distributed import Ranks

LOOP_HELP = (
    "Tune with the Circular-DPO loop. On the toy, it does as well as plain DPO"
    " (docs/understand/circular-dpo.md)."
)
LOOP_ONLY = (
    "rounds",
    "loop_beta",
    "loop_loser_weight",
    "loop_sft_weight",
    "loop_lr",
    "loop_steps",
    "loop_pairs",
    "roles",
)
# Default of --loser-weight. At 1, as in the papers, likelihood displacement occurs (docs/results/flows.md).
LOSER_WEIGHT = 0.5
RARE = (
    "lora_rank",
    "batch_gpu",
    "loss",
    "beta",
    "rounds",
)  # flags of a training that this command lists as rare settings
_what_is_tuned_option = functools.partial(option, group="What is tuned")
what_flags = together(
    _what_is_tuned_option("--loop", is_flag=True, help=LOOP_HELP),
    _what_is_tuned_option(
        "--stage",
        "stages",
        metavar="NAME",
        multiple=True,
        show_default="all",
        help="Stage to tune. May be repeated.",
    ),
    _what_is_tuned_option(
        "--labels",
        metavar="FILE|DIR",
        type=PATH,
        show_default=False,
        help="File of labels of WORK's assets, or a folder of other assets with rankings.",
    ),
    _what_is_tuned_option("--pairs-only", is_flag=True, help="Write WORK/pairs, for train.py, and stop."),
    _what_is_tuned_option(
        "--no-control",
        is_flag=True,
        help="Skip the control on shuffled labels. Halves the time.",
    ),
    _what_is_tuned_option(
        "--seed",
        metavar="INT",
        type=click.IntRange(0),
        show_default="WORK's",
        help="Random seed of the training.",
    ),
    _what_is_tuned_option(
        "-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop."
    ),
    timeout_flag,
)


@click.command("tune", cls=GroupedCommand, job="flow tune")
@work_argument
@together(
    what_flags,
    device_flag,
    options_of(EncodingSource),
    rarely(RARE, together(tuning_flags, options_of(TrainConfig), loop_flags)),
)
@click.pass_context
def tune_command(context: click.Context, folder: Path, device: str, **given) -> None:
    """Tune the generator's stages on people's answers, and test each stage against a shuffled-label control.
    A stage that does not pass the test is not kept. The same command resumes a training that was stopped.

    \b
    Example:
        eg3d-rlhf flow tune WORK
    """
    # `circular_settings` expects the flag, which this command does not have
    flags = Flags({**given, "choose_noises": None}, flags_of(context).written)
    flags.belong(LOOP_ONLY, flags["loop"], "--loop")
    check_tuning(flags)
    if flags["loop"] and flags["stages"]:
        raise ValueError(
            "--stage cannot be combined with --loop, which tunes all stages. Remove one of them."
        )
    work = Work.open(folder)
    check_stages("--stage", work.check_pipeline(), flags["stages"])
    asked = asked_of(flags, work)
    # settings only; the labels are not read
    if flags["dry_run"]:
        click.echo(json.dumps(asdict(asked), indent=2, sort_keys=True))
        return
    with running(device, flags["timeout"], AGAIN) as ranks:
        run(work, asked, flags, device, ranks)


def shown_by_help(context: click.Context) -> list[object]:
    """Return what --help takes defaults from. Raises: ValueError without WORK, whose generator decides the
    defaults.
    """
    if context.params["folder"] is None:
        raise ValueError("WORK: name the folder to see the defaults, which depend on its generator.")
    work = Work.open(context.params["folder"])
    # as in `tune_command`
    asked = asked_of(Flags({**context.params, "choose_noises": None}), work)
    return [{"seed": work.seed}, *of_circular(asked.circular)]


tune_command.resolved = shown_by_help


def asked_of(flags: Flags, work: Work) -> Tuning:
    """Apply the flags to the default settings of WORK's generator."""
    # 0 is a valid seed, so `or` would be wrong
    flags["seed"] = work.seed if flags["seed"] is None else flags["seed"]
    # checkpoints are chosen by held-out pairs here, never by a win rate of generated assets
    circular = replace(circular_settings(flags, default_settings(work.pipeline)), choosing=None)
    dpo = circular.human.dpo
    if dpo.kind == "sigmoid" and flags.get("loser_weight") is None and not flags["loop"]:
        circular = replace(
            circular, human=replace(circular.human, dpo=replace(dpo, loser_weight=LOSER_WEIGHT))
        )
    if (
        flags.get("batch_gpu") is None
    ):  # the largest divisor of the batch that is at most the size that `flow new` chose
        fits = max(
            size
            for size in range(1, circular.human.batch + 1)
            if circular.human.batch % size == 0 and size <= work.batch
        )
        circular = replace(circular, human=replace(circular.human, batch_gpu=fits))
    return Tuning(
        circular=circular, stages=tuple(flags["stages"]), loop=flags["loop"], control=not flags["no_control"]
    )


def run(work: Work, asked: Tuning, flags: Flags, device: str, ranks: "Ranks") -> None:
    """Run one training, or resume it."""
    from eg3d_rlhf.experiments.run import Run, recorded
    from eg3d_rlhf.tuning.flow.workspace.answers import imported_of, problem_of, write_pairs
    from eg3d_rlhf.tuning.flow.workspace.tune import REPORT, tune

    family = work.check_pipeline()
    where = choose_device(device) if ranks.world == 1 else ranks.device
    encoding = flags.of(EncodingSource)
    # WORK's own answers, or those of --labels, as pairs per stage
    imported = imported_of(work, family, flags["labels"], where, encoding)
    if ranks.main:
        write_pairs(work, family, imported)
        for line in lines_of(imported.report, {stage: len(pairs) for stage, pairs in imported.pairs.items()}):
            click.echo(line)
    if flags["pairs_only"]:
        return
    ranks.barrier()  # the other processes read what the first one wrote
    problem = problem_of(work, family, imported, where, encoding)
    # through JSON and back, so that tuples become lists and the record compares equal to a stored one
    record = json.loads(
        json.dumps({"mode": "flow tune", "tuning": asdict(asked), "problem": dict(problem.identity)})
    )
    # one process chooses the folder, so that all use the same
    folder = Path(ranks.broadcast(str(folder_of(work, record)) if ranks.main else None))
    begun = ranks.broadcast(bool(recorded(folder)) if ranks.main else None)
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
    with Run(folder, record, ranks=ranks, device=str(where)) as held:
        if not begun:
            held.begin()
        tune(
            problem,
            asked,
            folder,
            labels=imported.report,
            ranks=ranks,
            samples=strip_of(work, family, problem, asked),
        )
        held.done()
    if ranks.main:
        click.echo((folder / f"{REPORT}.md").read_text())


def strip_of(work: Work, family: FlowFamily, problem: "Problem", asked: Tuning) -> "Strip | None":
    """Make the renderer of training samples for the first selection prompts; None if there is nothing to
    show.
    """
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import Strip

    # prompts of the selection split: training samples must not come from the test split
    names = [name for name in work.names(CHOOSE) if name in problem.choosing_conditions][
        : asked.circular.human.samples
    ]
    size = (
        () if family.cells is None else (family.cells // 2,)
    )  # half the family's grid: coarse, but fast enough to repeat during training
    return (
        Strip(pipeline=problem.pipeline, family=family, conditions=names, size=size)
        if names and isinstance(family, Shows)
        else None
    )


def folder_of(work: Work, record: dict) -> Path:
    """Return the folder of WORK's last training if it has the same settings, so that it resumes; else a new
    one.

    Settings that do not affect the result may differ.
    """
    from eg3d_rlhf.experiments.run import recorded

    # in order of their numbers, so the last one is the newest
    there = work.numbered("tune")
    asked = decided(record)
    if there and asked.items() <= decided(recorded(there[-1])).items():
        return there[-1]
    return work.next("tune")


def decided(record: Mapping) -> dict:
    """Drop the entries of a record that do not affect the result of the training."""
    from eg3d_rlhf.tuning.flow.training.trainer import FREE

    return {
        name: decided(value) if isinstance(value, Mapping) else value
        for name, value in record.items()
        if name not in FREE
    }


def lines_of(report: Mapping, pairs: Mapping[str, int]) -> Sequence[str]:
    """Summarise the labels and the number of pairs that they make."""
    # keys of the report become words
    facts = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in report.items())
    return [
        facts,
        "pairs with a majority: " + ", ".join(f"{count} for stage {stage}" for stage, count in pairs.items()),
    ]
