"""`train.py --mode=circular-dpo`: preference training of a generator in stages, as a loop, of one stage, or as an ablation."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, options_of, together
from eg3d_rlhf.flow.circular.loop_pairs import LoopPairsConfig
from eg3d_rlhf.flow.circular.run import read_run, resume, start
from eg3d_rlhf.flow.circular.settings import Choosing, CircularRun, CircularSettings, Weighing, default_settings
from eg3d_rlhf.flow.circular.table import ARMS, TABLE, Judging, letters
from eg3d_rlhf.flow.dpo import PRESETS, DpoConfig
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.problem import TOY, ProblemSource
from eg3d_rlhf.flow.tuning.train import StoppedError
from eg3d_rlhf.flow.tuning.update import TrainConfig
from eg3d_rlhf.run.process import sigterm_interrupts
from training.distributed import process_group

RUN, WHAT, LOSS, TRAIN, LOOP = "Run", "What is trained", "Preference loss", "Training", "The loop"
OWN = "the problem's own"
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)
POSITIVE, WEIGHT = click.FloatRange(min=0, min_open=True), click.FloatRange(min=0)
FOLDER = click.Path(path_type=Path, file_okay=False)
AS_STEP = "that of people's pairs where it is given, else the problem's own"


def _own(name: str, group: str, metavar: str, kind, help: str, shown: str = OWN):
    """An option that leaves the problem's default alone where it is not given."""
    return option(name, group=group, metavar=metavar, type=kind, default=None, show_default=shown, help=help)


run_flags = together(
    option("--mode", group=RUN, type=click.Choice(["gan", "circular-dpo"]), default="circular-dpo", expose_value=False,
           help="What train.py trains; see train.py --help for gan."),
    option("--outdir", group=RUN, metavar="DIR", type=FOLDER, default=Path("runs"), help="Runs are numbered inside it."),
    option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name."),
    option("--seed", group=RUN, type=WHOLE, default=0, help="Of everything that is drawn."),
    option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
    option("--resume", group=RUN, metavar="RUN", type=FOLDER, help="Go on with a run where it was, with its own flags."),
    option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."),
    option("--timeout", group=RUN, metavar="MINUTES", type=POSITIVE, default=30, help="With torchrun: longest wait for another process."),
    option("--artefacts", group=RUN, metavar="DIR", type=FOLDER, default=None, show_default="artefacts in --outdir",
           help="Finished steps, by the hash of all that they depend on; runs share them."),
    option("--no-summary", group=RUN, is_flag=True, help="Skip the table that ends a run of the loop or of one stage."),
    option("--workers", group=RUN, metavar="INT", type=COUNT, default=2, help="With --ablate: processes, of one thread each."),
)
what_flags = together(
    options_of(ProblemSource),
    option("--also", group=WHAT, metavar="DIR", multiple=True, help="Further folders to look for TRELLIS's models in."),
    option("--flow-weights", group=WHAT, metavar="STAGE=FILE", multiple=True,
           help="Other weights of a TRELLIS flow, such as a training .pt."),
    option("--stage", group=WHAT, metavar="NAME", help="Train this stage alone, on people's pairs."),
    option("--ablate", group=WHAT, metavar="a..i",
           help=f"Train and compare groups of the paper's table 2: a..i, or letters with commas; and controls: {', '.join(ARMS)}."),
)
train_flags = together(
    option("--preset", group=LOSS, type=click.Choice(list(PRESETS)), default=None, show_default=OWN, help="Loss of public code."),
    option("--beta-t", group=LOSS, metavar="T", type=POSITIVE, help="Multiply --beta by this, for papers that give beta and T."),
    _own("--tune", TRAIN, "lora|full", click.Choice(["lora", "full"]), "Adapters, or every parameter."),
    _own("--lora-targets", TRAIN, "LIST", str, "Last parts of layers' names, with commas.", "the stage's own"),
    _own("--amp", TRAIN, "off|bf16", click.Choice(["off", "bf16"]), "Passes in bfloat16 (autocast)."),
    options_of(TrainConfig, everywhere=OWN),
)
loop_flags = together(
    option("--rounds", group=LOOP, metavar="INT", type=COUNT, default=None, show_default="1",
           help="Of the whole loop, each from the networks of the last, which are then the reference."),
    _own("--loop-beta", LOOP, "FLOAT", POSITIVE, "Beta on the loop's pairs.", "in the problem's own ratio to --beta"),
    _own("--loop-loser-weight", LOOP, "FLOAT", WEIGHT, "The rejected's weight on the loop's pairs."),
    _own("--loop-sft-weight", LOOP, "FLOAT", WEIGHT, "The preferred's own error on the loop's pairs."),
    _own("--loop-lr", LOOP, "FLOAT", POSITIVE, "Learning rate on the loop's pairs.", AS_STEP),
    _own("--loop-steps", LOOP, "UPDATES", COUNT, "Length of training on the loop's pairs.", AS_STEP),
    options_of(LoopPairsConfig, Weighing, everywhere=OWN),
)
table_flags = together(
    _own("--choose-noises", TABLE, "INT", WHOLE, "Assets per held-out condition behind a win rate in training; 0: none, no early stop."),
    options_of(Judging),
    _own("--seeds", TABLE, "INT", COUNT, "With --ablate: trainings of each group, from --seed on.", "3"),
)


def flag(name: str) -> str:
    """As users write it."""
    return "--" + name.replace("_", "-")


def check(flags: Mapping, given: set[str]) -> None:
    """Refuse what would have no effect.

    Args: given: names of the flags that were written. Raises: ValueError naming them.
    """
    if flags["resume"] is not None:
        extra = sorted(given - {"resume", "device", "workers", "timeout", "dry_run"})
        if extra:
            raise ValueError(f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave out.")
        return
    _belongs(given, ("seeds", "workers"), flags["ablate"] is not None, "--ablate")
    _belongs(given, ("no_summary",), flags["ablate"] is None, "a run without --ablate")
    _belongs(given, ("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    loop_only = [parameter.name for parameter in circular_dpo.params if getattr(parameter, "group", None) == LOOP]
    _belongs(given, loop_only, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError("--stage: expected a run of one stage or an --ablate of all, got both. Leave one out.")
    if flags["ablate"] is not None:
        for name in {"rounds", "w1", "w2"} & given:
            raise ValueError(f"{flag(name)}: expected the groups of --ablate to decide, got {flags[name]}. Leave it out.")
    if flags["tune"] == "full":
        _belongs(given, ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), False, "--tune=lora")
    if flags["beta_t"] is not None and flags["beta"] is None:
        raise ValueError("--beta-t: expected --beta beside it, got none. Both are multiplied.")
    if flags["choose_noises"] == 0:
        _belongs(given, ("held_out_every", "patience", "max_drop"), False, "early stopping, which --choose-noises=0 leaves out")


def _belongs(given: set[str], names, applies: bool, where: str) -> None:
    extra = [flag(name) for name in names if name in given]
    if extra and not applies:
        raise ValueError(f"{', '.join(extra)}: belongs to {where}, and would have no effect here. Leave it out.")


def resolve(flags: Mapping, defaults: CircularSettings) -> CircularRun:
    """The run that the flags describe, with a problem's `defaults` for those that are None.

    Raises: ValueError naming what does not fit.
    """
    groups = None if flags["ablate"] is None else tuple(letters(flags["ablate"]))
    seed, judging = flags["seed"], given_of(Judging, flags)
    source = {**given_of(ProblemSource, flags), "also": flags["also"], "flow_weights": flags["flow_weights"]}
    run = CircularRun(
        circular=settings(flags, defaults), source=ProblemSource(**source, seed=seed),
        stage=flags["stage"], groups=groups, training_seeds=tuple(range(seed, seed + (flags["seeds"] or 3))) if groups else (),
        judging=Judging(**{"batch": (defaults.choosing or Choosing()).batch, **judging}),
        summary=not flags["no_summary"], artefacts=str(flags["artefacts"] or flags["outdir"] / "artefacts"),
    )
    if groups is not None:
        run.plan.tasks()  # validates
        if "anchor" in groups and not run.circular.loop.dpo.sft_weight:
            raise ValueError("--ablate=anchor: expected an anchor to train on, got --loop-sft-weight=0. Raise it, or leave the arm out.")
    return run


def settings(flags: Mapping, defaults: CircularSettings) -> CircularSettings:
    """The defaults with what the flags change."""
    human, loop, sft = (_training(flags, config) for config in (defaults.human, defaults.loop, defaults.sft))
    loss = given_of(DpoConfig, flags)
    if flags["beta"] is not None:
        loss["beta"] *= flags["beta_t"] or 1.0
    human = replace(human, dpo=replace(PRESETS[flags["preset"]] if flags["preset"] is not None else human.dpo, **loss))
    sft = replace(sft, dpo=replace(sft.dpo, noise=human.dpo.noise, condition_dropout=human.dpo.condition_dropout))
    pairs = replace(defaults.loop_pairs, **given_of(LoopPairsConfig, flags), **_some(flags, {"judge_batch": "batch"}))
    own = defaults.loop.dpo  # the loop's loss is people's with the loop's own anchors
    beta = human.dpo.beta * own.beta / defaults.human.dpo.beta  # in this order, so that the defaults' own is exact
    anchors: dict[str, Any] = {"loser_weight": own.loser_weight, "sft_weight": own.sft_weight, "beta": beta}
    anchors |= _some(flags, {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"})
    loop = replace(loop, dpo=replace(human.dpo if human.dpo.needs_reference else own, **anchors),
                   **_some(flags, {"loop_lr": "lr", "loop_steps": "steps"}))
    choosing = defaults.choosing
    if flags["choose_noises"] == 0:
        choosing = None
    elif choosing is not None or flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), **given_of(Choosing, flags))
    return replace(
        defaults, human=human, loop=loop, sft=sft, loop_pairs=pairs,
        weighing=replace(defaults.weighing, **given_of(Weighing, flags)), choosing=choosing,
        rounds=flags["rounds"] or defaults.rounds, seed=flags["seed"],
    )


def given_of(kind: type, flags: Mapping) -> dict:
    """What flags say of the fields of a settings dataclass."""
    return _some(flags, {field.metadata["knob"].name or field.name: field.name for field in fields(kind) if "knob" in field.metadata})


def _some(flags: Mapping, names: Mapping[str, str]) -> dict:
    return {field: flags[name] for name, field in names.items() if flags[name] is not None}


def _training(flags: Mapping, config: TrainConfig) -> TrainConfig:
    """All but the loss."""
    given, adapters, lora = given_of(TrainConfig, flags), given_of(LoraConfig, flags), config.lora
    if flags["amp"] is not None:
        given["bf16"] = flags["amp"] == "bf16"
    if flags["lora_targets"] is not None:
        adapters["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    full = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    if full and adapters:
        raise ValueError(f"{', '.join(flag('lora_' + name) for name in adapters)}: belongs to --tune=lora. Add that, or leave it out.")
    return replace(config, lora=None if full else replace(lora or LoraConfig(), **adapters), **given)


@click.command("train.py --mode=circular-dpo", cls=GroupedCommand, context_settings={
    "help_option_names": ["-h", "--help"], "max_content_width": 140,
})
@run_flags
@what_flags
@train_flags
@loop_flags
@table_flags
@click.pass_context
def circular_dpo(context: click.Context, **given) -> None:
    """Preference training of a generator in stages (Circular-DPO), by default of the bundled toy: the last stage learns from people's
    pairs, and every stage before it from what the one behind it then makes better. A run that was stopped goes on with --resume=RUN,
    or with the same flags.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """
    written = {name for name in given if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    check(given, written)
    run = None if given["resume"] is not None else resolve(given, default_settings(given["pipeline"] or TOY))
    if given["dry_run"]:
        run = run or read_run(given["resume"])[0]
        tasks = {"tasks": run.plan.tasks()} if run.groups is not None else {}
        click.echo(json.dumps({**asdict(run), **tasks}, indent=2, sort_keys=True))
        return
    if given["ablate"] is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--ablate: expected one process, got torchrun's several. Use --workers.")
    try:
        with sigterm_interrupts(), process_group(choose_device(given["device"]), given["timeout"]) as ranks:
            device = str(ranks.device) if ranks.world > 1 else str(choose_device(given["device"]))
            if run is None:
                resume(given["resume"], device, given["workers"], ranks)
            else:
                start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
    except (StoppedError, KeyboardInterrupt) as stopped:
        why = f": {stopped}" if str(stopped) else "."
        click.echo(f"Stopped{why} The same command, or --resume=RUN, goes on from there.", err=True)
        sys.exit(130)
