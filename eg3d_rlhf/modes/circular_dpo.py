"""`train.py --mode=circular-dpo`: preference training of a multi-stage flow generator (Circular-DPO).

A run trains all stages in the loop, one stage alone (--stage), or the groups of an ablation (--ablate).
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
    NON_NEGATIVE,
    TOY,
    WHAT,
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


def check_evaluation_flags(flags: Flags, problem: "Problem") -> None:
    """Reject flags of the evaluation and of early stopping that have no effect for a problem.

    Raises: ValueError naming them.
    """
    noises = (
        ("choose_noises",) if flags.get("choose_noises") else ()
    )  # 0 switches the win rate off, so it is always allowed
    without = "generators that have an evaluator, and pairs of all stages to fit it to"
    # `chooser` evaluates during training, `final` fills the table; each exists only for some generators
    flags.belong(noises, problem.chooser is not None, without)
    flags.belong(("table_noises",), problem.final is not None, without)
    # a checkpoint can be chosen by held-out pairs or by a win rate
    chosen = problem.unseen_pairs is not None and problem.choosing or problem.chooser is not None
    flags.belong(EARLY, bool(chosen), "early stopping, which needs held-out pairs or an evaluator")


# Default settings for the bundled toy. They were chosen with ChooserOracle on CHOOSING, training seeds 11 and
# 12, never
# with FinalOracle.

_HUMAN = TrainConfig(
    dpo=DpoConfig(beta=20.0),
    lora=LoraConfig(rank=16, alpha=32),
    steps=100,  # updates
    batch=16,  # pairs per update
    lr=1e-3,  # of AdamW
    warmup=10,  # updates until the full learning rate
    held_out_every=25,  # updates between evaluations
    log_every=5,  # updates per line of stats.jsonl
    checkpoint_every=50,  # updates between resumable states
)
TOY_RUN = CircularSettings(
    human=_HUMAN,  # the last stage, which trains on people's pairs
    # the earlier stages, which train on the loop's pairs
    loop=replace(_HUMAN, dpo=DpoConfig(beta=200.0, sft_weight=1.0), steps=150, batch=32, lr=3e-4),
    sft=supervised(_HUMAN),  # supervised fine-tuning, an arm of the ablation
    loop_pairs=LoopPairsConfig(per_pair=2, batch=64, chunk=256),
    choosing=Choosing(per_condition=4),
)


def default_settings(pipeline: str) -> CircularSettings:
    """Return the default settings of a run: for the toy those tuned on it, for other generators those of
    public code.
    """
    # the toy's latents are small, so its settings suit nothing else
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
        help="Cache of finished steps, keyed by a hash of their inputs. Runs can share it.",
    ),
    rare_option(
        "--no-summary",
        group=RUN,
        is_flag=True,
        help="Skip the table at the end of a run of the loop or of one stage.",
    ),
)
what_flags = together(
    options_of(ProblemSource),
    option(
        "--stage",
        group=WHAT,
        metavar="NAME",
        help="Train this stage alone, on people's pairs; without it, all stages in the loop.",
    ),
    option(
        "--ablate",
        group=WHAT,
        metavar="a..i",
        help=(
            "Train and compare groups of the paper's table 2: a..i, or comma-separated letters; and controls:"
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
        NON_NEGATIVE,
        "Assets per held-out prompt for the win rate in training; 0: no win rate and no early stopping.",
        rare=True,
    ),
    options_of(Evaluation),
    unset_option(
        "--seeds",
        TABLE,
        "LIST",
        str,
        "With --ablate: training seeds of every group, as a list with ranges: 0,1,2.",
        "--seed and the next two",
    ),
)


def check(flags: Flags) -> None:
    """Reject flags that would have no effect. Raises: ValueError naming them."""
    flags.belong(("seeds", "jobs"), flags["ablate"] is not None, "--ablate")
    flags.belong(("no_summary",), flags["ablate"] is None, "a run without --ablate")
    flags.belong(("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    # the flags of the loop are found by their group in --help, so that a new one is covered, too
    command: Any = CIRCULAR_DPO.command
    settings = [*command.params, *command.rare.values()]
    loop_only = [setting.name for setting in settings if setting.group == LOOP]
    flags.belong(loop_only, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError(
            "--stage cannot be combined with --ablate, which trains all stages. Remove one of them."
        )
    if flags["ablate"] is not None:
        flags.belong(("rounds",), False, "a run without --ablate, whose groups decide the rounds")
    check_tuning(flags)


def resolve(flags: Flags) -> CircularRun:
    """Build the settings of the run from the flags; those that are None get the problem's defaults.

    Raises: ValueError naming what does not fit.
    """
    check(flags)
    # an ablation compares groups over three training seeds by default
    defaults = default_settings(flags["pipeline"] or TOY)
    # None: no ablation
    groups = None if flags["ablate"] is None else tuple(letters(flags["ablate"]))
    # only the flags that were given
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
    # the arm `regulariser` trains on the regulariser alone, so its weight must not be 0
    if "regulariser" in (groups or ()) and not run.circular.loop.dpo.sft_weight:
        raise ValueError(
            "--ablate=regulariser trains on the regulariser alone, got --loop-sft-weight=0. Raise it,"
            " or remove the arm."
        )
    return run


def shown_by_help(flags: Flags) -> list[object]:
    """Return what --help takes defaults from: the settings of the run that the flags describe."""
    run = resolve(flags)
    return [{"artefacts": run.artefacts}, *of_circular(run.circular), run]


def open_circular(settings: CircularRun, run: "Run") -> "Problem":
    """Open the problem of a run. Raises: ValueError if it lacks something that the run needs."""
    from eg3d_rlhf.tuning.flow.base.stage import stage_of
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.circular import circular_loop as loop

    # an ablation distributes its trainings with --jobs instead
    refuse_torchrun(settings.groups is not None, "--ablate")
    problem = open_problem(settings.source, run.device)
    # flags are absent where a run resumes from its record
    if isinstance(run.flags, Flags):
        check_evaluation_flags(run.flags, problem)
    # one stage needs that stage alone; the loop needs all of them and a reward
    if settings.stage is not None:
        stage_of(problem.pipeline, settings.stage)  # raises ValueError for an unknown stage
    else:
        loop.check(problem)
    if settings.groups is not None and problem.final is None:
        raise ValueError(
            "--ablate needs a problem with an evaluator for the table. The toy has one: remove --pipeline."
        )
    return problem


def work(settings: CircularRun, problem: "Problem", run: "Run") -> None:
    """Run, or resume, the training."""
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.circular import ablation

    ablation.work(settings, problem, run, open_problem)


def title(settings: CircularRun, problem: "Problem") -> str:
    """Name the run's folder by the generator and by what is trained."""
    # groups of the table are letters, controls are words
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
    help="""Preference training of a multi-stage flow generator (Circular-DPO), by default the bundled toy.
    The last stage trains on people's pairs. Every earlier stage trains on pairs of samples that the tuned and
    the untuned next stage produce. --resume=RUN, or the same command, resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """,
)
MODES.add("circular-dpo", CIRCULAR_DPO)
