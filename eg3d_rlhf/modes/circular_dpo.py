"""`train.py --mode=circular-dpo`: preference training of a generator in stages, as a loop, of one stage, or
as an ablation.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import FOLDER, RUN, Flags, Mode, refuse_torchrun
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    EARLY,
    LOOP,
    TOY,
    WHAT,
    WHOLE,
    check_tuning,
    circular_settings,
    loop_flags,
    of_circular,
    reader_of,
    source_of,
    training_seeds,
    tuning_flags,
    unset_option,
)
from eg3d_rlhf.modes.shared_flags import rare_option
from eg3d_rlhf.tuning.flow.base.settings import TABLE, Choosing, Evaluation, ProblemSource
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    ARMS,
    GROUPS,
    CircularRun,
    CircularSettings,
    LoopPairsConfig,
    letters,
    supervised,
)
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.base.problem import Problem


def check_judges(flags: Flags, problem: "Problem") -> None:
    """Refuse flags of the evaluation and of early stopping that a problem has no use for.

    Raises: ValueError naming them.
    """
    noises = ("choose_noises",) if flags.get("choose_noises") else ()  # 0 is none
    without = "generators that have a judge, and pairs of all stages to fit it to"
    flags.belong(noises, problem.chooser is not None, without)
    flags.belong(("table_noises",), problem.final is not None, without)
    chosen = problem.unseen_pairs is not None and problem.choosing or problem.chooser is not None
    flags.belong(EARLY, bool(chosen), "early stopping, for which there are no held-out pairs and no judge")


# The default run, of the bundled toy; chosen with ChooserOracle on CHOOSING, training seeds 11 and 12, never
# with FinalOracle.

_HUMAN = TrainConfig(
    dpo=DpoConfig(beta=20.0),
    lora=LoraConfig(rank=16, alpha=32),
    steps=100,
    batch=16,
    lr=1e-3,
    warmup=10,
    held_out_every=25,
    log_every=5,
    checkpoint_every=50,
)
TOY_RUN = CircularSettings(
    human=_HUMAN,  # the last stage, on people's pairs
    # those before, on the loop's
    loop=replace(_HUMAN, dpo=DpoConfig(beta=200.0, sft_weight=1.0), steps=150, batch=32, lr=3e-4),
    sft=supervised(_HUMAN),  # the ablation's fine-tuning
    loop_pairs=LoopPairsConfig(per_pair=2, batch=64, chunk=256),
    choosing=Choosing(per_condition=4),
)


def default_settings(pipeline: str) -> CircularSettings:
    """What a run does where it is not told otherwise: settings that suit the toy, or for other generators
    those of public code.
    """
    if pipeline == TOY:
        return TOY_RUN
    return CircularSettings(
        loop_pairs=LoopPairsConfig(batch=4, chunk=16), choosing=Choosing(per_condition=1, batch=4)
    )


artefact_flags = together(
    rare_option(
        "--artefacts",
        group=RUN,
        metavar="DIR",
        type=FOLDER,
        show_default="artefacts in --outdir",
        help="Finished steps, by the hash of all that they depend on; runs share them.",
    ),
    rare_option(
        "--no-summary",
        group=RUN,
        is_flag=True,
        help="Skip the table that ends a run of the loop or of one stage.",
    ),
)
what_flags = together(
    options_of(ProblemSource),
    option("--stage", group=WHAT, metavar="NAME", help="Train this stage alone, on people's pairs."),
    option(
        "--ablate",
        group=WHAT,
        metavar="a..i",
        help=(
            "Train and compare groups of the paper's table 2: a..i, or letters with commas; and controls:"
            f" {', '.join(ARMS)}."
        ),
    ),
)
train_flags = together(tuning_flags, options_of(TrainConfig))
table_flags = together(
    unset_option(
        "--choose-noises",
        TABLE,
        "INT",
        WHOLE,
        "Assets per held-out condition behind a win rate in training; 0: none, no early stop.",
        rare=True,
    ),
    options_of(Evaluation),
    unset_option(
        "--seeds",
        TABLE,
        "LIST",
        str,
        "With --ablate: training seeds of every group, such as 0,1,2.",
        "--seed and the next two",
    ),
)


def check(flags: Flags) -> None:
    """Refuse what would have no effect. Raises: ValueError naming it."""
    flags.belong(("seeds", "jobs"), flags["ablate"] is not None, "--ablate")
    flags.belong(("no_summary",), flags["ablate"] is None, "a run without --ablate")
    flags.belong(("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    command: Any = CIRCULAR_DPO.command
    settings = [*command.params, *command.rare.values()]
    loop_only = [setting.name for setting in settings if setting.group == LOOP]
    flags.belong(loop_only, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError(
            "--stage: expected a run of one stage or an --ablate of all, got both. Leave one out."
        )
    if flags["ablate"] is not None:
        flags.belong(("rounds",), False, "a run without --ablate, whose groups decide")
    check_tuning(flags)


def resolve(flags: Flags) -> CircularRun:
    """The run that the flags describe, with the problem's defaults for those that are None.

    Raises: ValueError naming what does not fit.
    """
    check(flags)
    defaults = default_settings(flags["pipeline"] or TOY)
    groups = None if flags["ablate"] is None else tuple(letters(flags["ablate"]))
    evaluation = flags.of(Evaluation)
    run = CircularRun(
        circular=circular_settings(flags, defaults),
        source=source_of(ProblemSource, flags),
        stage=flags["stage"],
        groups=groups,
        training_seeds=training_seeds(flags, 3) if groups else (),
        evaluation=Evaluation(**{"batch": (defaults.choosing or Choosing()).batch, **evaluation}),
        summary=not flags["no_summary"],
        artefacts=str(flags["artefacts"] or flags["outdir"] / "artefacts"),
    )
    if "regulariser" in (groups or ()) and not run.circular.loop.dpo.sft_weight:
        raise ValueError(
            "--ablate=regulariser: expected a regulariser to train on, got --loop-sft-weight=0. Raise it,"
            " or leave the arm out."
        )
    return run


def shown_by_help(flags: Flags) -> list[object]:
    """Return what --help takes defaults from: the settings of the run that the flags describe."""
    run = resolve(flags)
    return [{"artefacts": run.artefacts}, *of_circular(run.circular), run]


def open_circular(settings: CircularRun, run: "Run") -> "Problem":
    """The problem of a run. Raises: ValueError where it has not what the run needs."""
    from eg3d_rlhf.tuning.flow.base.stage import stage_of
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.circular import circular_loop as loop

    refuse_torchrun(settings.groups is not None, "--ablate")
    problem = open_problem(settings.source, run.device)
    if isinstance(run.flags, Flags):
        check_judges(run.flags, problem)
    if settings.stage is not None:
        stage_of(problem.pipeline, settings.stage)
    else:
        loop.check(problem)
    if settings.groups is not None and problem.final is None:
        raise ValueError(
            "--ablate: expected a problem with a judge for the table, got one without. The toy has one."
        )
    return problem


def work(settings: CircularRun, problem: "Problem", run: "Run") -> None:
    """Do what is left to do of a run."""
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.circular import ablation

    ablation.work(settings, problem, run, open_problem)


def title(settings: CircularRun, problem: "Problem") -> str:
    named = "".join(name if name in GROUPS else f"-{name}" for name in settings.groups or ())
    what = f"ablation-{named}" if settings.groups else f"stage-{settings.stage}" if settings.stage else "loop"
    return f"circular-dpo-{Path(settings.source.pipeline).name}-{what}"


CIRCULAR_DPO = Mode(
    name="circular-dpo",
    settings=CircularRun,
    open=open_circular,
    work=work,
    title=title,
    flags=together(artefact_flags, what_flags, train_flags, loop_flags, table_flags),
    resolve=resolve,
    record=lambda settings, problem: {
        "mode": "circular-dpo",
        "run": asdict(settings),
        "problem": dict(problem.identity),
    },
    recorded=reader_of(CircularRun, "circular-dpo"),
    defaults=shown_by_help,
    shown=lambda settings: {
        **asdict(settings),
        **({} if settings.groups is None else {"tasks": settings.plan.tasks()}),
    },
    jobs="--ablate",
    again="The same command, or --resume=RUN,",
    help="""Preference training of a generator in stages (Circular-DPO), by default of the bundled toy: the
    last stage learns from people's pairs, and every stage before it from what the one behind it then makes
    better. A run that was stopped goes on with --resume=RUN, or with the same flags.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """,
)
MODES.add("circular-dpo", CIRCULAR_DPO)
