"""`train.py --mode=online`: online tuning of a stage by a reward; `--mode=grpo` is its preset."""

from dataclasses import replace
from pathlib import Path

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import RUN, Flags, Mode, refuse_torchrun
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.circular_dpo import (
    COUNT,
    EARLY,
    OWN,
    TOY,
    WHAT,
    WHOLE,
    check_tuning,
    kept,
    problems_own,
    source_of,
    tuned_as,
    tuning_flags,
)
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.families import open_problem
from eg3d_rlhf.tuning.flow.online.arms import ARMS, GrpoRun, OnlineSource, bench_of, work
from eg3d_rlhf.tuning.flow.online.arms import OWN as OWN_REWARD
from eg3d_rlhf.tuning.flow.online.groups import GrpoConfig
from eg3d_rlhf.tuning.flow.problem import TABLE, Choosing, Judging, Problem
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig

# The default run, of the bundled toy; chosen with its chooser on CHOOSING, by a training seed that the table does not use.

LORA = LoraConfig(rank=16, alpha=32)
TOY_RUN = GrpoRun(
    grpo=GrpoConfig(
        lora=LORA, steps=50, batch=8, group=8, lr=1e-3, warmup=5, passes=1, trained_steps=3, kl=0.1, held_out_every=25, log_every=5,
        checkpoint_every=10, max_drop=1.0,
    ),
    dpo=TrainConfig(
        dpo=DpoConfig(beta=60.0), lora=LORA, steps=100, batch=16, lr=1e-3, warmup=10, held_out_every=25, log_every=5,
        checkpoint_every=50, max_drop=1.0,
    ),
    choosing=Choosing(per_condition=4), judging=Judging(per_condition=4),
)  # fmt: skip


def default_run(pipeline: str) -> GrpoRun:
    return TOY_RUN if pipeline == TOY else GrpoRun(grpo=GrpoConfig(), dpo=TrainConfig(), judging=Judging(batch=4))


what_flags = together(
    options_of(OnlineSource),
    option("--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Which stage is tuned."),
    option("--reward", group=WHAT, metavar="NAME", default=OWN_REWARD, help="Of finished assets: the problem's own, or a plugin's."),
)
train_flags = together(tuning_flags, options_of(GrpoConfig, everywhere=OWN))
table_flags = together(
    option("--arms", group=TABLE, metavar="LIST", default="grpo", help=f"What is trained and compared, with commas: {', '.join(ARMS)}."),
    problems_own("--seeds", TABLE, "INT", COUNT, "Trainings of each arm, from --seed on.", "1; 3 with several arms"),
    problems_own("--choose-noises", TABLE, "INT", WHOLE,
        "Assets per condition behind a win rate in training, which chooses the network that is kept; 0: the last is.", rare=True),
    option("--no-summary", group=RUN, rare=True, is_flag=True, help="Skip the table that ends a run."),
    options_of(Judging, everywhere=OWN),
)


def check(flags: Flags) -> None:
    """Refuse what would have no effect. Raises: ValueError naming it."""
    flags.belong(("labelled",), False, "--mode=circular-dpo")
    flags.belong(("jobs",), "," in flags["arms"] or (flags["seeds"] or 1) > 1, "several trainings (--arms, --seeds)")
    flags.belong(("table_noises", "judge_batch"), not flags["no_summary"], "the table, which --no-summary leaves out")
    flags.belong(EARLY, flags["choose_noises"] != 0, "early stopping, which --choose-noises=0 leaves out")
    check_tuning(flags)


def resolve(flags: Flags) -> GrpoRun:
    """The run that the flags describe. Raises: ValueError naming what does not fit."""
    check(flags)
    defaults, seed = default_run(flags["pipeline"] or TOY), flags["seed"]
    arms = tuple(name.strip() for name in flags["arms"].split(","))
    tuned = tuned_as(flags, defaults.grpo.lora)
    choosing = defaults.choosing
    if flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), per_condition=flags["choose_noises"]) if flags["choose_noises"] else None
    count = flags["seeds"] or (3 if len(arms) > 1 else 1)
    return GrpoRun(
        grpo=replace(defaults.grpo, **flags.of(GrpoConfig), **tuned), dpo=replace(defaults.dpo, lora=tuned["lora"]),
        source=source_of(OnlineSource, flags), stage=flags["stage"],
        reward=flags["reward"], arms=arms, training_seeds=tuple(range(seed, seed + count)), choosing=choosing,
        judging=replace(defaults.judging, **flags.of(Judging)), summary=not flags["no_summary"],
    )


def open_grpo(settings: GrpoRun, run: Run) -> Problem:
    """The problem of a run. Raises: ValueError where it has not what the run needs."""
    refuse_torchrun(len(settings.arms) * len(settings.training_seeds) > 1, "--arms, --seeds")
    problem = open_problem(settings.source, run.device)
    bench = bench_of(settings, problem, settings.training_seeds[0])
    bench.grpo.sampling(bench.task.stage)
    return problem


def title(settings: GrpoRun, problem: Problem) -> str:
    return f"grpo-{Path(settings.source.pipeline).name}-{settings.stage or problem.pipeline.stages[-1].name}"


def mode_named(name: str) -> Mode:
    """The mode under one of its two names."""
    return Mode(
        name=name, settings=GrpoRun, open=open_grpo, work=work, title=title, flags=together(what_flags, train_flags, table_flags),
        resolve=resolve, **kept(GrpoRun, name), jobs="several trainings",
        help=f"""Online tuning of one stage of a flow generator by a reward (GRPO), by default of the bundled toy: for where a reward is at
    hand, and pairs are not. A run that was stopped goes on with --resume=RUN.

    \b
    Examples:
        python train.py --mode={name}
        python train.py --mode={name} --arms=grpo,dpo,shuffled,inverted
        python train.py --mode={name} --stage=structure --kl=0.3
    """,
    )  # fmt: skip


for _name in ("online", "grpo"):
    MODES.add(_name, mode_named(_name))
