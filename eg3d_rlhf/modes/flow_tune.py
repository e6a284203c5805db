"""The job `flow tune`: tunes the stages of a flow generator on people's answers, and trains a control.

The control is trained in the same way on the same pairs with shuffled labels. If a stage is not better than
its control, the answers carried no learnable signal, and the weights of the stage are not used.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    choose_device,
    combine_decorators,
    mark_rare,
    option,
    options_from_settings,
)
from eg3d_rlhf.experiments.mode import Flags, flags_of, process_count, rehearse_option, running
from eg3d_rlhf.modes.circular_dpo import default_settings
from eg3d_rlhf.modes.flow_flags import (
    check_adapter_flags,
    circular_help_values,
    circular_settings,
    loop_flags,
    tuning_flags,
)
from eg3d_rlhf.modes.flow_next import FLAGS, flow_command, given_flags, next_line
from eg3d_rlhf.modes.flow_sample import AGAIN, device_flag, timeout_flag, work_argument
from eg3d_rlhf.modes.label_origin import ORIGIN_FLAGS, choice_from_flags, learning_options
from eg3d_rlhf.modes.shared_flags import PATH
from eg3d_rlhf.tuning.flow.base.family import FitsRewards, FlowFamily, Shows, check_stages
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, WeightsSource
from eg3d_rlhf.tuning.flow.training.settings import PassConfig, TrainConfig
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, Tuning, Work

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import LoadNetwork, Strip
    from training.distributed import Ranks

Training = TypeVar("Training", bound=PassConfig)

LOOP_HELP = "Tune with the Circular-DPO loop instead of plain DPO."
# Flags that have an effect only with --loop, under the names of their parameters.
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
# Default weight of the rejected sample's error in the loss (--loser-weight). With 1, the value of the papers,
# likelihood displacement occurs: the errors of both samples of a pair rise (docs/results/flows.md).
LOSER_WEIGHT = 0.5
# Flags of a training that this command lists as settings of --set.
RARE = (
    "lora_rank",
    "batch_gpu",
    "loss",
    "beta",
    "rounds",
)
_what_is_tuned_option = functools.partial(option, group="What is tuned")
what_flags = combine_decorators(
    _what_is_tuned_option("--loop", is_flag=True, help=LOOP_HELP),
    _what_is_tuned_option(
        "--stage",
        "stages",
        metavar="NAME",
        multiple=True,
        show_default="all stages that have pairs",
        help="Name of a stage to tune. May be repeated.",
    ),
    _what_is_tuned_option(
        "--labels",
        metavar="FILE|DIR",
        type=PATH,
        show_default="the answers of `flow label`",
        help="File of labels for the assets of WORK, or a folder of other assets with rankings.",
    ),
    _what_is_tuned_option(
        "--campaigns",
        rare=True,
        metavar="LIST",
        show_default="the project of WORK",
        help=(
            "Names of labelling projects (campaigns) of `flow label` whose answers are used, separated by"
            " commas."
        ),
    ),
    learning_options("What is tuned"),
    _what_is_tuned_option(
        "--pairs-only",
        is_flag=True,
        help="Write only the pairs, to WORK/pairs for train.py --pairs.",
    ),
    _what_is_tuned_option(
        "--no-control",
        is_flag=True,
        help=(
            "Train no control on shuffled labels. This halves the time, but nothing then tests for a"
            " learnable signal."
        ),
    ),
    _what_is_tuned_option(
        "--seed",
        metavar="INT",
        type=click.IntRange(0),
        show_default="the seed of WORK",
        help="Random seed of the training.",
    ),
    _what_is_tuned_option(
        "-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop."
    ),
    timeout_flag,
    rehearse_option("What is tuned", rare=True),
)


@click.command("tune", cls=GroupedCommand, job="flow tune")
@work_argument
@combine_decorators(
    what_flags,
    device_flag,
    options_from_settings(WeightsSource, EncodingSource),
    mark_rare(RARE, combine_decorators(tuning_flags, options_from_settings(TrainConfig), loop_flags)),
)
@click.pass_context
def tune_command(context: click.Context, folder: Path, device: str, **flag_values) -> None:
    """Tune the stages of the generator on people's answers, and compare each stage with a control that was
    trained on shuffled labels. The weights of a stage that is not better than its control are not used. The
    same command resumes a training that was stopped.

    \b
    Example:
        eg3d-rlhf flow tune WORK
    """
    # `circular_settings` reads the flag choose_noises, which this command does not have.
    flags = Flags({**flag_values, "choose_noises": None}, flags_of(context).written)
    flags.check_applies(LOOP_ONLY, flags["loop"], "--loop is not given")
    check_adapter_flags(flags)
    check_weights_flag(flags)
    # rejects flags that contradict each other before any file of WORK is read
    choice_from_flags(*(flags[name] for name in ORIGIN_FLAGS))
    if flags["loop"] and flags["stages"]:
        raise ValueError(
            "--stage cannot be combined with --loop, which tunes all stages. Remove one of them."
        )
    flags.check_applies(("campaigns",), flags["labels"] is None, "--labels names the labels")
    # Mistakes in the flags are reported before any file of the generator is read.
    work = Work.open(folder)
    family = work.check_pipeline()
    check_stages("--stage", work.stages, flags["stages"])
    if flags["loop"]:
        check_loop(family, work)
    tuning = tuning_settings(flags, work)
    if flags["batch"] is None and tuning.circular.human.batch != default_settings(work.pipeline).human.batch:
        click.echo(
            f"Each update has {tuning.circular.human.batch} pairs, a multiple of {process_count()} processes."
            " --batch sets another number.",
            err=True,
        )
    if flags["dry_run"]:
        click.echo(json.dumps(asdict(tuning), indent=2, sort_keys=True))
        return
    if not flags["rehearse"]:
        with running(device, flags["timeout"], AGAIN) as ranks:
            run(work, tuning, flags, device, ranks, given_flags(context))
        return
    if flags["pairs_only"]:
        raise ValueError(
            "--pairs-only trains nothing, so there is no time to rehearse. Remove --set rehearse."
        )
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments.rehearsal_report import temporary_folder, time_lines
    from training import rehearsal

    with running(device, flags["timeout"], None) as ranks:
        with temporary_folder(work.folder, ranks) as temporary, rehearsal.rehearsing() as measured:
            run(work, tuning, flags, device, ranks, rehearsal_folder=temporary / "run")
        if ranks.is_main:
            click.echo("\n".join(time_lines(measured)))


def shown_by_help(context: click.Context) -> list[object]:
    """Return the objects from which --help reads the defaults of the flags.

    Raises: ValueError if WORK is missing, because its generator decides the defaults.
    """
    if context.params["folder"] is None:
        raise ValueError("WORK is missing. Name the folder WORK: the defaults depend on its generator.")
    work = Work.open(context.params["folder"])
    # choose_noises: as in `tune_command`
    tuning = tuning_settings(Flags({**context.params, "choose_noises": None}), work)
    return [{"seed": work.seed}, *circular_help_values(tuning.circular), WeightsSource()]


tune_command.resolved = shown_by_help


def tuning_settings(flags: Flags, work: Work) -> Tuning:
    """Apply the flags to the default settings for the generator of WORK.

    Args:
        flags: values of the command line. The seed is replaced by the seed of WORK if it is None.
        work: the opened folder WORK.
    """
    # `or` would be wrong: 0 is a valid seed.
    flags["seed"] = work.seed if flags["seed"] is None else flags["seed"]
    # Checkpoints are chosen by the loss on held-out pairs, never by a win rate of generated assets.
    circular = replace(circular_settings(flags, default_settings(work.pipeline)), choosing=None)
    dpo = circular.human.dpo
    # Plain DPO gets the smaller weight of the rejected sample. The other losses do not have this weight, and
    # the loop has settings of its own.
    if dpo.kind == "sigmoid" and flags.get("loser_weight") is None and not flags["loop"]:
        circular = replace(
            circular, human=replace(circular.human, dpo=replace(dpo, loser_weight=LOSER_WEIGHT))
        )
    if flags.get("batch") is None:
        circular = replace(
            circular,
            human=with_divisible_batch(circular.human),
            loop=with_divisible_batch(circular.loop),
            sft=with_divisible_batch(circular.sft),
        )
    if flags.get("batch_gpu") is None:
        # Pairs per forward pass of a process: the largest divisor of its part of the batch that is at most
        # the number of assets that `flow new` found to fit into memory.
        process_batch = max(circular.human.batch // process_count(), 1)
        pairs_per_pass = max(
            pass_size
            for pass_size in range(1, process_batch + 1)
            if process_batch % pass_size == 0 and pass_size <= work.batch
        )
        circular = replace(circular, human=replace(circular.human, batch_gpu=pairs_per_pass))
    return Tuning(
        circular=circular, stages=tuple(flags["stages"]), loop=flags["loop"], control=not flags["no_control"]
    )


def with_divisible_batch(config: Training) -> Training:
    """Return settings whose batch is the smallest multiple of the number of processes that is not smaller."""
    return replace(config, batch=-(-config.batch // process_count()) * process_count())


def check_weights_flag(flags: Flags) -> None:
    """Raise ValueError if --dtype was given, although full tuning holds all weights in float32."""
    # The loop holds the networks of the other stages in the data type of --dtype.
    if flags["dtype"] not in (None, "float32") and flags["tune"] == "full" and not flags["loop"]:
        raise ValueError(
            f"--dtype={flags['dtype']} would have no effect, because --tune=full trains float32 weights."
            " Remove --dtype, or train adapters with --tune=lora."
        )


def run(
    work: Work,
    tuning: Tuning,
    flags: Flags,
    device: str,
    ranks: "Ranks",
    command_flags: Sequence[str] = (),
    rehearsal_folder: Path | None = None,
) -> None:
    """Run one training, or resume it, and print its report.

    Args:
        work: the opened folder WORK.
        tuning: settings of the training.
        flags: values of the command line.
        device: value of --device.
        ranks: the processes of torchrun.
        command_flags: flags that the command of the next step repeats, see `flow_next.given_flags`.
        rehearsal_folder: folder of a training that is rehearsed; None: a real training.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments.run import Run, recorded
    from eg3d_rlhf.tuning.flow.workspace.answers import (
        imported_of,
        network_loader,
        problem_of,
        write_pairs,
    )
    from eg3d_rlhf.tuning.flow.workspace.attempts import find_earlier_attempts, write_held_out
    from eg3d_rlhf.tuning.flow.workspace.tune import REPORT, check_labels, tune
    from training.storage import write_atomic

    family = work.check_pipeline()
    target_device = choose_device(device) if ranks.world == 1 else ranks.device
    encoding_values = flags.values_for(EncodingSource)
    # pairs of each stage, from the answers in WORK or from the labels of --labels
    campaigns = [name.strip() for name in (flags["campaigns"] or "").split(",") if name.strip()]
    imported_labels = imported_of(
        work,
        family,
        flags["labels"],
        target_device,
        encoding_values,
        flags["stages"],
        campaigns,
        choice_from_flags(*(flags[name] for name in ORIGIN_FLAGS)),
    )
    if ranks.is_main:
        write_pairs(work, family, imported_labels)
        for report_line in label_report(
            imported_labels.report, {stage: len(pairs) for stage, pairs in imported_labels.pairs.items()}
        ):
            click.echo(report_line)
    # the pairs were written above
    if flags["pairs_only"]:
        if ranks.is_main:
            click.echo(f"next: {flow_command('tune', work.folder, *command_flags)}")
        return
    ranks.barrier()  # the other processes read the pairs that the first process wrote
    # Opens the generator, the pairs in WORK, and the embeddings of their prompts. Without --loop, stages are
    # trained one after the other, and each network is loaded when it is trained.
    problem = problem_of(
        work,
        family,
        imported_labels,
        target_device,
        encoding_values,
        dtype=flags["dtype"],
        loads_networks=flags["loop"],
    )
    # Before the folder of the training is made, so that labels that do not suffice leave no folder.
    labels_by_stage = check_labels(problem, tuning)
    load = (
        None
        if flags["loop"]
        else network_loader(work, family, imported_labels, target_device, flags["dtype"])
    )
    # Converted to JSON and back: tuples become lists, so that the record equals a stored record of the same
    # settings.
    new_record = json.loads(
        json.dumps({"mode": "flow tune", "tuning": asdict(tuning), "problem": dict(problem.identity)})
    )
    # The first process chooses the folder, so that all processes use the same folder.
    folder = rehearsal_folder or Path(
        ranks.broadcast(str(choose_folder(work, new_record)) if ranks.is_main else None)
    )
    # A folder with a record was begun by an earlier call.
    is_resumed = ranks.broadcast(bool(recorded(folder)) if ranks.is_main else None)
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    # The block holds the lock of the folder, so that two processes cannot train in it at once.
    with Run(folder, new_record, ranks=ranks, device=str(target_device)) as training_run:
        if not is_resumed:
            training_run.begin()
        if ranks.is_main and rehearsal_folder is None:
            write_atomic(folder / FLAGS, (json.dumps(list(command_flags)) + "\n").encode())
            write_held_out(folder, labels_by_stage)
        earlier_attempts = find_earlier_attempts(work, folder, labels_by_stage)
        tune(
            problem,
            tuning,
            folder,
            labels=imported_labels.report,
            earlier_attempts=earlier_attempts,
            ranks=ranks,
            samples=make_strip(work, family, problem, tuning, load),
            load=load,
        )
        if rehearsal_folder is None:
            training_run.done()
    if ranks.is_main and rehearsal_folder is None:
        # the report as Markdown
        click.echo((folder / f"{REPORT}.md").read_text())
        if flags["labels"] is not None and not work.tuned(folder):
            click.echo(f"Add labels of more {work.kind_word} to {flags['labels']} before the next training.")
        click.echo(next_line(work))


def check_loop(family: FlowFamily, work: Work) -> None:
    """Raise ValueError if --loop cannot be run on generators of a family, before any label is read."""
    if not family.bundled and not isinstance(family, FitsRewards):
        raise ValueError(
            "--loop: the loop needs a reward of finished assets, but there is none for generators of the"
            f" family {family.name}. Remove --loop, or tune single stages with"
            f" --stage={work.stages[0]}."
        )


def make_strip(
    work: Work, family: FlowFamily, problem: "Problem", tuning: Tuning, load: "LoadNetwork | None"
) -> "Strip | None":
    """Make the renderer of the images that show samples of the generator during training.

    It renders assets of the first prompts of the selection split.

    Args:
        work: the opened folder WORK.
        family: family of the generator.
        problem: the opened problem.
        tuning: settings of the training, which limit the number of prompts.
        load: function that loads the network of a stage; None if the problem holds all networks.

    Returns: the renderer. The result is None if there is no such prompt, or if the family cannot write assets
        that can be rendered.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.workspace.sample_strips import Strip

    # Prompts of the selection split: assets of the test split must not be seen before the study.
    prompts = [prompt for prompt in work.names(CHOOSE) if prompt in problem.choosing_prompts]
    prompts = prompts[: tuning.circular.human.samples]
    if not prompts or not isinstance(family, Shows):
        return None
    # Half of the family's grid is coarse, but fast enough to be repeated during training.
    strip_cells = () if family.cells is None else (family.cells // 2,)
    return Strip(pipeline=problem.pipeline, family=family, prompts=prompts, size=strip_cells, load=load)


def choose_folder(work: Work, new_record: dict) -> Path:
    """Return the folder of a training.

    It is the folder of WORK's latest training if this training can be resumed, and a new folder otherwise.
    The latest training is resumed if its record has the same settings. Settings that do not affect the result
    of a training may differ.

    Args:
        work: the opened folder WORK.
        new_record: record of the training, as JSON.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.experiments.run_record import recorded

    # in the order of their numbers, so the last folder is the newest
    folders = work.numbered("tune")
    new_settings = result_settings(new_record)
    # `<=`: the stored record has further entries, such as versions of libraries
    if folders and new_settings.items() <= result_settings(recorded(folders[-1])).items():
        return folders[-1]
    return work.next("tune")


def result_settings(training_record: Mapping) -> dict:
    """Return a copy of a record without the settings that do not affect the result of the training.

    Such settings are also removed from nested dictionaries.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.training.trainer import CHANGEABLE_SETTINGS

    return {
        name: result_settings(value) if isinstance(value, Mapping) else value
        for name, value in training_record.items()
        if name not in CHANGEABLE_SETTINGS
    }


def label_report(label_facts: Mapping, pair_counts: Mapping[str, int]) -> Sequence[str]:
    """Return two lines: a summary of the labels, and the numbers of pairs.

    Args:
        facts_text: facts about the labels by name, with underscores for spaces.
        pair_counts: number of pairs by stage.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.workspace.tune import fact_text

    facts_text = "; ".join(
        f"{name.replace('_', ' ')}: {fact_text(value)}" for name, value in label_facts.items()
    )
    return [
        facts_text,
        "pairs with a majority: "
        + ", ".join(f"{pair_count} for stage {stage}" for stage, pair_count in pair_counts.items()),
    ]
