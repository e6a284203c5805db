"""`train.py --mode=grpo`: online tuning of a stage by a reward."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, options_of, together
from eg3d_rlhf.modes.flow_flags import (
    COMMAND,
    COUNT,
    OWN,
    RUN,
    WHAT,
    WHOLE,
    belongs,
    check_tuning,
    given_of,
    own,
    refuse_torchrun,
    resumed,
    run_flags,
    running,
    trellis_flags,
    tuned_as,
    tuning_flags,
    written,
)
from eg3d_rlhf.tuning.flow.grpo.arms import ARMS
from eg3d_rlhf.tuning.flow.grpo.arms import OWN as OWN_REWARD
from eg3d_rlhf.tuning.flow.grpo.groups import GrpoConfig
from eg3d_rlhf.tuning.flow.grpo.run import read_run, resume, start
from eg3d_rlhf.tuning.flow.grpo.settings import GrpoRun, OnlineSource, default_run
from eg3d_rlhf.tuning.flow.problem import TABLE, TOY, Choosing, Judging

what_flags = together(
    options_of(OnlineSource),
    trellis_flags,
    option("--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Which stage is tuned."),
    option("--reward", group=WHAT, metavar="NAME", default=OWN_REWARD, help="Of finished assets: the problem's own, or a plugin's."),
)
train_flags = together(tuning_flags, options_of(GrpoConfig, everywhere=OWN))
table_flags = together(
    option("--arms", group=TABLE, metavar="LIST", default="grpo", help=f"What is trained and compared, with commas: {', '.join(ARMS)}."),
    own("--seeds", TABLE, "INT", COUNT, "Trainings of each arm, from --seed on.", "1; 3 with several arms"),
    own("--choose-noises", TABLE, "INT", WHOLE,
        "Assets per condition behind a win rate in training, which chooses the network that is kept; 0: the last is."),
    option("--no-summary", group=RUN, is_flag=True, help="Skip the table that ends a run."),
    options_of(Judging, everywhere=OWN),
)


def check(flags: Mapping, given: set[str]) -> None:
    """Refuse what would have no effect. Args: given: names of the flags that were written. Raises: ValueError naming them."""
    if resumed(flags, given):
        return
    people = "people" in flags["arms"]
    belongs(given, ("labelled",), people, "--arms=people")
    belongs(given, ("pairs",), people or (flags["pipeline"] or TOY) != TOY, "--arms=people")
    belongs(given, ("workers",), "," in flags["arms"] or (flags["seeds"] or 1) > 1, "several trainings (--arms, --seeds)")
    belongs(given, ("table_noises", "judge_batch"), not flags["no_summary"], "the table, which --no-summary leaves out")
    check_tuning(flags, given)


def resolve(flags: Mapping) -> GrpoRun:
    """The run that the flags describe. Raises: ValueError naming what does not fit."""
    defaults, seed = default_run(flags["pipeline"] or TOY), flags["seed"]
    arms = tuple(name.strip() for name in flags["arms"].split(","))
    tuned = tuned_as(flags, defaults.grpo.lora)
    source = {**given_of(OnlineSource, flags), "also": flags["also"], "flow_weights": flags["flow_weights"]}
    choosing = defaults.choosing
    if flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), per_condition=flags["choose_noises"]) if flags["choose_noises"] else None
    count = flags["seeds"] or (3 if len(arms) > 1 else 1)
    return GrpoRun(
        grpo=replace(defaults.grpo, **given_of(GrpoConfig, flags), **tuned), dpo=replace(defaults.dpo, lora=tuned["lora"]),
        source=OnlineSource(**source, seed=seed),
        stage=flags["stage"], reward=flags["reward"], arms=arms, training_seeds=tuple(range(seed, seed + count)), choosing=choosing,
        judging=replace(defaults.judging, **given_of(Judging, flags)), summary=not flags["no_summary"],
    )


@click.command("train.py --mode=grpo", cls=GroupedCommand, context_settings=COMMAND)
@run_flags(("grpo",), "several trainings")
@what_flags
@train_flags
@table_flags
@click.pass_context
def grpo(context: click.Context, **given) -> None:
    """Online tuning of one stage of a flow generator by a reward (GRPO), by default of the bundled toy: for where a reward is at hand, and
    pairs are not. A run that was stopped goes on with --resume=RUN.

    \b
    Examples:
        python train.py --mode=grpo
        python train.py --mode=grpo --arms=grpo,dpo,shuffled,inverted
        python train.py --mode=grpo --stage=structure --kl=0.3
    """
    check(given, written(context))
    run = resolve(given) if given["resume"] is None else read_run(given["resume"])[0]
    if given["dry_run"]:
        click.echo(json.dumps(asdict(run), indent=2, sort_keys=True))
        return
    refuse_torchrun(len(run.arms) * len(run.training_seeds) > 1, "--arms, --seeds")
    with running(given, "--resume=RUN") as (device, ranks):
        if given["resume"] is not None:
            resume(given["resume"], device, given["workers"], ranks)
        else:
            start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
