"""`train.py --mode=grpo`: online tuning of a stage by a reward."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, options_of, together
from eg3d_rlhf.flow.circular.commands import COUNT, FOLDER, OWN, POSITIVE, WHOLE, flag, given_of
from eg3d_rlhf.flow.circular.settings import Choosing
from eg3d_rlhf.flow.circular.table import TABLE, Judging
from eg3d_rlhf.flow.grpo.arms import ARMS
from eg3d_rlhf.flow.grpo.groups import GrpoConfig
from eg3d_rlhf.flow.grpo.rewards import OWN as OWN_REWARD
from eg3d_rlhf.flow.grpo.run import read_run, resume, start
from eg3d_rlhf.flow.grpo.settings import GrpoRun, OnlineSource, default_run
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.problem import TOY
from eg3d_rlhf.flow.tuning.train import StoppedError
from eg3d_rlhf.run.process import sigterm_interrupts
from training.distributed import process_group

RUN, WHAT, TRAIN = "Run", "What is trained", "Training"
FREE = {"resume", "device", "workers", "timeout", "dry_run"}  # what may stand beside --resume

run_flags = together(
    option("--mode", group=RUN, type=click.Choice(["grpo"]), default="grpo", expose_value=False, help="What train.py trains."),
    option("--outdir", group=RUN, metavar="DIR", type=FOLDER, default=Path("runs"), help="Runs are numbered inside it."),
    option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name."),
    option("--seed", group=RUN, type=WHOLE, default=0, help="Of everything that is drawn."),
    option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
    option("--resume", group=RUN, metavar="RUN", type=FOLDER, help="Go on with a run where it was, with its own flags."),
    option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."),
    option("--timeout", group=RUN, metavar="MINUTES", type=POSITIVE, default=30, help="With torchrun: longest wait for another process."),
    option("--no-summary", group=RUN, is_flag=True, help="Skip the table that ends a run."),
    option("--workers", group=RUN, metavar="INT", type=COUNT, default=2, help="With several trainings: processes, of one thread each."),
)
what_flags = together(
    options_of(OnlineSource),
    option("--also", group=WHAT, metavar="DIR", multiple=True, help="Further folders to look for TRELLIS's models in."),
    option("--flow-weights", group=WHAT, metavar="STAGE=FILE", multiple=True,
           help="Other weights of a TRELLIS flow, such as a training .pt."),
    option("--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Which stage is tuned."),
    option("--reward", group=WHAT, metavar="NAME", default=OWN_REWARD, help="Of finished assets: the problem's own, or a plugin's."),
)
train_flags = together(
    option("--tune", group=TRAIN, type=click.Choice(["lora", "full"]), default=None, show_default=OWN,
           help="Adapters, or every parameter."),
    option("--lora-targets", group=TRAIN, metavar="LIST", default=None, show_default="the stage's own",
           help="Last parts of layers' names, with commas."),
    option("--amp", group=TRAIN, type=click.Choice(["off", "bf16"]), default=None, show_default=OWN, help="Passes in bfloat16 (autocast)."),
    options_of(GrpoConfig, everywhere=OWN),
)
table_flags = together(
    option("--arms", group=TABLE, metavar="LIST", default="grpo", help=f"What is trained and compared, with commas: {', '.join(ARMS)}."),
    option("--seeds", group=TABLE, metavar="INT", type=COUNT, default=None, show_default="1; 3 with several arms",
           help="Trainings of each arm, from --seed on."),
    option("--choose-noises", group=TABLE, metavar="INT", type=WHOLE, default=None, show_default=OWN,
           help="Assets per condition behind a win rate in training, which chooses the network that is kept; 0: the last is."),
    options_of(Judging, everywhere=OWN),
)


def check(flags: Mapping, written: set[str]) -> None:
    """Refuse what would have no effect. Args: written: names of the flags that were given. Raises: ValueError naming them."""
    if flags["resume"] is not None:
        extra = sorted(written - FREE)
        if extra:
            raise ValueError(f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave out.")
        return
    several = "," in flags["arms"] or (flags["seeds"] or 1) > 1
    people = "people" in flags["arms"]
    unused = {
        "labelled": None if people else "--arms=people",
        "pairs": None if people or (flags["pipeline"] or TOY) != TOY else "--arms=people",
        "workers": None if several else "several trainings (--arms, --seeds)",
        "table_noises": "the table, which --no-summary leaves out" if flags["no_summary"] else None,
        "judge_batch": "the table, which --no-summary leaves out" if flags["no_summary"] else None,
        **dict.fromkeys(("held_out_every", "patience", "max_drop"), "a win rate in training, which --choose-noises=0 leaves out"
                        if flags["choose_noises"] == 0 else None),
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), "--tune=lora" if flags["tune"] == "full" else None),
    }  # fmt: skip
    for name in sorted(written):
        if unused.get(name):
            raise ValueError(f"{flag(name)}: belongs to {unused[name]}, and would have no effect here. Leave it out.")


def resolve(flags: Mapping) -> GrpoRun:
    """The run that the flags describe. Raises: ValueError naming what does not fit."""
    defaults, seed = default_run(flags["pipeline"] or TOY), flags["seed"]
    arms = tuple(name.strip() for name in flags["arms"].split(","))
    grpo, lora, adapters = given_of(GrpoConfig, flags), defaults.grpo.lora, given_of(LoraConfig, flags)
    if flags["amp"] is not None:
        grpo["bf16"] = flags["amp"] == "bf16"
    if flags["lora_targets"] is not None:
        adapters["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    full = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    lora = None if full else replace(lora or LoraConfig(), **adapters)
    source = {**given_of(OnlineSource, flags), "also": flags["also"], "flow_weights": flags["flow_weights"]}
    choosing = defaults.choosing
    if flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), per_condition=flags["choose_noises"]) if flags["choose_noises"] else None
    count = flags["seeds"] or (3 if len(arms) > 1 else 1)
    return GrpoRun(
        grpo=replace(defaults.grpo, **grpo, lora=lora), dpo=replace(defaults.dpo, lora=lora), source=OnlineSource(**source, seed=seed),
        stage=flags["stage"], reward=flags["reward"], arms=arms, training_seeds=tuple(range(seed, seed + count)), choosing=choosing,
        judging=replace(defaults.judging, **given_of(Judging, flags)), summary=not flags["no_summary"],
    )


@click.command("train.py --mode=grpo", cls=GroupedCommand, context_settings={
    "help_option_names": ["-h", "--help"], "max_content_width": 140,
})
@run_flags
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
    written = {name for name in given if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    check(given, written)
    run = resolve(given) if given["resume"] is None else read_run(given["resume"])[0]
    if given["dry_run"]:
        click.echo(json.dumps(asdict(run), indent=2, sort_keys=True))
        return
    if len(run.arms) * len(run.training_seeds) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--arms, --seeds: expected one training with torchrun's several processes, got more. Use --workers.")
    try:
        with sigterm_interrupts(), process_group(choose_device(given["device"]), given["timeout"]) as ranks:
            device = str(ranks.device) if ranks.world > 1 else str(choose_device(given["device"]))
            if given["resume"] is not None:
                resume(given["resume"], device, given["workers"], ranks)
            else:
                start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
    except (StoppedError, KeyboardInterrupt) as stopped:
        why = f": {stopped}" if str(stopped) else "."
        click.echo(f"Stopped{why} --resume=RUN goes on from there.", err=True)
        sys.exit(130)
