"""`train.py --mode=circular-dpo`: preference training of a generator in stages, as a loop, of one stage, or as an ablation."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, options_of, together
from eg3d_rlhf.modes.flow_flags import (
    COMMAND,
    COUNT,
    FOLDER,
    OWN,
    POSITIVE,
    RUN,
    WHAT,
    WHOLE,
    belongs,
    check_tuning,
    flag,
    given_of,
    own,
    refuse_torchrun,
    resumed,
    run_flags,
    running,
    some,
    trellis_flags,
    tuned_as,
    tuning_flags,
    written,
)
from eg3d_rlhf.tuning.flow.circular.loop_pairs import LoopPairsConfig, Weighing
from eg3d_rlhf.tuning.flow.circular.run import read_run, resume, start
from eg3d_rlhf.tuning.flow.circular.settings import CircularRun, CircularSettings, default_settings
from eg3d_rlhf.tuning.flow.circular.table import ARMS, letters
from eg3d_rlhf.tuning.flow.dpo import PRESETS, DpoConfig
from eg3d_rlhf.tuning.flow.problem import TABLE, TOY, Choosing, Judging, ProblemSource
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig

LOSS, LOOP = "Preference loss", "The loop"
WEIGHT = click.FloatRange(min=0)
AS_STEP = "that of people's pairs where it is given, else the problem's own"

artefact_flags = together(
    option("--artefacts", group=RUN, metavar="DIR", type=FOLDER, default=None, show_default="artefacts in --outdir",
           help="Finished steps, by the hash of all that they depend on; runs share them."),
    option("--no-summary", group=RUN, is_flag=True, help="Skip the table that ends a run of the loop or of one stage."),
)
what_flags = together(
    options_of(ProblemSource),
    trellis_flags,
    option("--stage", group=WHAT, metavar="NAME", help="Train this stage alone, on people's pairs."),
    option("--ablate", group=WHAT, metavar="a..i",
           help=f"Train and compare groups of the paper's table 2: a..i, or letters with commas; and controls: {', '.join(ARMS)}."),
)
train_flags = together(
    option("--preset", group=LOSS, type=click.Choice(list(PRESETS)), default=None, show_default=OWN, help="Loss of public code."),
    option("--beta-t", group=LOSS, metavar="T", type=POSITIVE, help="Multiply --beta by this, for papers that give beta and T."),
    tuning_flags,
    options_of(TrainConfig, everywhere=OWN),
)
loop_flags = together(
    option("--rounds", group=LOOP, metavar="INT", type=COUNT, default=None, show_default="1",
           help="Of the whole loop, each from the networks of the last, which are then the reference."),
    own("--loop-beta", LOOP, "FLOAT", POSITIVE, "Beta on the loop's pairs.", "in the problem's own ratio to --beta"),
    own("--loop-loser-weight", LOOP, "FLOAT", WEIGHT, "The rejected's weight on the loop's pairs."),
    own("--loop-sft-weight", LOOP, "FLOAT", WEIGHT, "The preferred's own error on the loop's pairs."),
    own("--loop-lr", LOOP, "FLOAT", POSITIVE, "Learning rate on the loop's pairs.", AS_STEP),
    own("--loop-steps", LOOP, "UPDATES", COUNT, "Length of training on the loop's pairs.", AS_STEP),
    options_of(LoopPairsConfig, Weighing, everywhere=OWN),
)
table_flags = together(
    own("--choose-noises", TABLE, "INT", WHOLE, "Assets per held-out condition behind a win rate in training; 0: none, no early stop."),
    options_of(Judging),
    own("--seeds", TABLE, "INT", COUNT, "With --ablate: trainings of each group, from --seed on.", "3"),
)


def check(flags: Mapping, given: set[str]) -> None:
    """Refuse what would have no effect.

    Args: given: names of the flags that were written. Raises: ValueError naming them.
    """
    if resumed(flags, given):
        return
    belongs(given, ("seeds", "workers"), flags["ablate"] is not None, "--ablate")
    belongs(given, ("no_summary",), flags["ablate"] is None, "a run without --ablate")
    belongs(given, ("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    loop_only = [parameter.name for parameter in circular_dpo.params if getattr(parameter, "group", None) == LOOP]
    belongs(given, loop_only, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError("--stage: expected a run of one stage or an --ablate of all, got both. Leave one out.")
    if flags["ablate"] is not None:
        for name in {"rounds", "w1", "w2"} & given:
            raise ValueError(f"{flag(name)}: expected the groups of --ablate to decide, got {flags[name]}. Leave it out.")
    check_tuning(flags, given)
    if flags["beta_t"] is not None and flags["beta"] is None:
        raise ValueError("--beta-t: expected --beta beside it, got none. Both are multiplied.")


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
    pairs = replace(defaults.loop_pairs, **given_of(LoopPairsConfig, flags), **some(flags, {"judge_batch": "batch"}))
    own = defaults.loop.dpo  # the loop's loss is people's with the loop's own anchors
    beta = human.dpo.beta * own.beta / defaults.human.dpo.beta  # in this order, so that the defaults' own is exact
    anchors: dict[str, Any] = {"loser_weight": own.loser_weight, "sft_weight": own.sft_weight, "beta": beta}
    anchors |= some(flags, {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"})
    loop = replace(loop, dpo=replace(human.dpo if human.dpo.needs_reference else own, **anchors),
                   **some(flags, {"loop_lr": "lr", "loop_steps": "steps"}))
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


def _training(flags: Mapping, config: TrainConfig) -> TrainConfig:
    """All but the loss."""
    return replace(config, **given_of(TrainConfig, flags), **tuned_as(flags, config.lora))


@click.command("train.py --mode=circular-dpo", cls=GroupedCommand, context_settings=COMMAND)
@run_flags(("gan", "circular-dpo"), "--ablate")
@artefact_flags
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
    check(given, written(context))
    run = None if given["resume"] is not None else resolve(given, default_settings(given["pipeline"] or TOY))
    if given["dry_run"]:
        run = run or read_run(given["resume"])[0]
        tasks = {"tasks": run.plan.tasks()} if run.groups is not None else {}
        click.echo(json.dumps({**asdict(run), **tasks}, indent=2, sort_keys=True))
        return
    refuse_torchrun(given["ablate"] is not None, "--ablate")
    with running(given, "The same command, or --resume=RUN,") as (device, ranks):
        if run is None:
            resume(given["resume"], device, given["workers"], ranks)
        else:
            start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
