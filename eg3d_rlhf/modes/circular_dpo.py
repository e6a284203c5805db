"""`train.py --mode=circular-dpo`: preference training of a multi-stage flow generator (Circular-DPO).

The last stage of the generator is trained with DPO on pairs that people labelled. In the circular loop, every
earlier stage is trained on the loop's pairs, which need no people: the tuned and the untuned next stage each
make an asset, both assets are encoded back to latents of the earlier stage, and the latent of the tuned
stage's asset is preferred. A run trains all stages in the loop, one stage alone (--stage), or all groups of
an ablation (--ablate), which are the rows of the paper's table 2. docs/understand/circular-dpo.md describes
the method.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings
from eg3d_rlhf.experiments.mode import FOLDER, RUN, Flags, Mode, reject_torchrun
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    EARLY,
    LOOP,
    NON_NEGATIVE,
    TOY,
    WHAT,
    check_adapter_flags,
    circular_help_values,
    circular_settings,
    control_flag,
    loop_flags,
    make_record_reader,
    make_source,
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
    parse_groups,
    with_fine_tuning_loss,
)
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.base.problem import Problem


def check_evaluation_flags(flags: Flags, problem: "Problem") -> None:
    """Reject flags of the evaluation and of early stopping that have no effect for this problem.

    Args:
        flags: values of the command line.
        problem: the opened generator, its pairs, and its evaluators.

    Raises: ValueError that names the flags without an effect.
    """
    # --choose-noises=0 switches the win rate off, so it is allowed for every problem.
    win_rate_flags = ("choose_noises",) if flags.get("choose_noises") else ()
    no_evaluator = (
        "there is no evaluator: this needs a family of generators that fits rewards, pairs of all stages, and"
        " held-out prompts"
    )
    # `chooser` computes the win rate during training, `final` fills the table. Not every problem has them.
    flags.check_applies(win_rate_flags, problem.chooser is not None, no_evaluator)
    flags.check_applies(("table_noises",), problem.final is not None, no_evaluator)
    # A checkpoint is chosen by the loss on held-out pairs, or by a win rate.
    has_criterion = problem.unseen_pairs is not None and problem.choosing or problem.chooser is not None
    flags.check_applies(
        EARLY, bool(has_criterion), "there are neither held-out pairs nor an evaluator for early stopping"
    )


# Default settings for the bundled toy generator. They were chosen by the scores of ChooserOracle on the
# prompts CHOOSING with the training seeds 11 and 12. FinalOracle, which evaluates the table, was not used.

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
    # The earlier stages train on the loop's pairs. beta and the SFT weight limit likelihood displacement.
    loop=replace(_HUMAN, dpo=DpoConfig(beta=200.0, sft_weight=1.0), steps=150, batch=32, lr=3e-4),
    sft=with_fine_tuning_loss(_HUMAN),  # supervised fine-tuning, an arm of the ablation
    loop_pairs=LoopPairsConfig(per_pair=2, batch=64, chunk=256),
    choosing=Choosing(per_condition=4),
)


def default_settings(pipeline: str) -> CircularSettings:
    """Return the default settings of a run.

    The bundled toy has settings that were tuned on it. Every other generator gets the settings of published
    code, which are the defaults of the dataclasses, with small batches.

    Args:
        pipeline: value of --pipeline, the folder of a generator or the name of the toy.
    """
    # The latents of the toy are small, so its batch sizes and learning rates suit no other generator.
    if pipeline == TOY:
        return TOY_RUN
    return CircularSettings(
        loop_pairs=LoopPairsConfig(batch=4, chunk=16), choosing=Choosing(per_condition=1, batch=4)
    )


artefact_flags = combine_decorators(
    rare_option(
        "--artefacts",
        group=RUN,
        metavar="DIR",
        type=FOLDER,
        show_default="the folder artefacts in --outdir",
        help=(
            "Folder in which finished steps of the training are stored by a hash of their inputs. Several"
            " runs can share it."
        ),
    ),
    rare_option(
        "--no-summary",
        group=RUN,
        is_flag=True,
        help="Do not write the table of win rates at the end of the run. Cannot be combined with --ablate.",
    ),
)
what_flags = combine_decorators(
    options_from_settings(ProblemSource),
    option(
        "--stage",
        group=WHAT,
        metavar="NAME",
        show_default="all stages, in the loop",
        help="Name of the only stage to train; it is trained on people's pairs.",
    ),
    option(
        "--ablate",
        group=WHAT,
        metavar="a..i",
        help=(
            "Run an ablation instead of one training. Name the groups to compare by their letters in table 2"
            " of the Circular-DPO paper, such as a..i or a,d, and controls by their names:"
            f" {', '.join(ARMS)}. Separate them by commas."
        ),
    ),
)
train_flags = combine_decorators(tuning_flags, options_from_settings(TrainConfig))
table_flags = combine_decorators(
    unset_option(
        "--choose-noises",
        TABLE,
        "INT",
        NON_NEGATIVE,
        "Number of assets per held-out prompt from which the win rate is computed during training. 0 switches"
        " the win rate and early stopping off.",
        rare=True,
    ),
    options_from_settings(Evaluation),
    unset_option(
        "--seeds",
        TABLE,
        "LIST",
        str,
        "Training seeds with which every group of --ablate is trained, separated by commas, such as 0,1,2.",
        "the value of --seed and the next two integers",
    ),
)


def check(flags: Flags) -> None:
    """Raise ValueError, naming the flags, if flags were given that would have no effect in this run."""
    flags.check_applies(("seeds", "jobs"), flags["ablate"] is not None, "--ablate is not given")
    flags.check_applies(("no_summary",), flags["ablate"] is None, "--ablate always writes its table")
    flags.check_applies(("table_noises",), not flags["no_summary"], "--no-summary leaves out the table")
    # The flags of the loop are found by their group in --help, so that a new flag is covered, too.
    command: Any = CIRCULAR_DPO.command
    command_options = [*command.params, *command.rare.values()]
    loop_flag_names = [
        command_option.name for command_option in command_options if command_option.group == LOOP
    ]
    flags.check_applies(
        loop_flag_names, flags["stage"] is None, "--stage trains a single stage without the loop"
    )
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError(
            "--stage cannot be combined with --ablate, which trains all stages. Remove one of them."
        )
    # False: with --ablate, the number of rounds follows from the groups, so --rounds never has an effect.
    flags.check_applies(("no_control",), flags["ablate"] is None, "--ablate names the controls")
    if flags["ablate"] is not None:
        flags.check_applies(("rounds",), False, "the groups of --ablate decide the number of rounds")
    check_adapter_flags(flags)


def resolve(flags: Flags) -> CircularRun:
    """Build the settings of the run from the flags. A flag that is None gets the default of the generator.

    Raises: ValueError that names a flag without an effect, or a value that is not allowed.
    """
    check(flags)
    defaults = default_settings(flags["pipeline"] or TOY)
    # None: no ablation
    group_names = None if flags["ablate"] is None else tuple(parse_groups(flags["ablate"]))
    # holds only the flags that were given
    evaluation_values = flags.values_for(Evaluation)
    run = CircularRun(
        circular=circular_settings(flags, defaults),
        source=make_source(ProblemSource, flags),
        stage=flags["stage"],
        groups=group_names,
        # an ablation trains every group with three seeds by default; other runs use --seed alone
        training_seeds=training_seeds(flags, 3) if group_names else (),
        # by default, the table is computed with the batch size of the win rate; --evaluation-batch wins
        evaluation=Evaluation(**{"batch": (defaults.choosing or Choosing()).batch, **evaluation_values}),
        # an ablation has the controls that --ablate names
        control=group_names is None and not flags["no_control"],
        summary=not flags["no_summary"],
        artefacts=str(flags["artefacts"] or flags["outdir"] / "artefacts"),
    )
    # the arm `regulariser` trains on the regulariser alone, so its weight must not be 0
    if "regulariser" in (group_names or ()) and not run.circular.loop.dpo.sft_weight:
        raise ValueError(
            "--ablate=regulariser cannot be combined with --loop-sft-weight=0: this control trains on the SFT"
            " term alone. Set --loop-sft-weight to a number above 0, or remove regulariser from --ablate."
        )
    return run


def shown_by_help(flags: Flags) -> list[object]:
    """Return the objects from which --help reads the defaults of the flags: the settings of this run."""
    run = resolve(flags)
    return [{"artefacts": run.artefacts}, *circular_help_values(run.circular), run]


def open_circular(settings: CircularRun, run: "Run") -> "Problem":
    """Open the problem of a run: the generator, its pairs and conditioning, and the rewards.

    Args:
        settings: settings of the run.
        run: the run, whose device the networks are loaded on.

    Raises: ValueError if the problem lacks something that the run needs.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.families.opening import open_problem, open_stage
    from eg3d_rlhf.tuning.flow.training.circular import circular_loop as loop

    # The trainings of an ablation are distributed by --jobs, not by torchrun.
    reject_torchrun(settings.groups is not None, "--ablate")
    if settings.stage is None:
        problem = open_problem(settings.source, run.device)
    else:
        problem = open_stage(settings.source, settings.stage, run.device)
    # Flags were checked when the run began. A run that is resumed in a worker process has a plain mapping.
    if isinstance(run.flags, Flags):
        check_evaluation_flags(run.flags, problem)
    # The loop needs pairs of all stages and a reward of finished assets.
    if settings.stage is None:
        loop.check(problem)
    if settings.groups is not None and problem.final is None:
        raise ValueError(
            "--ablate needs an evaluator for its table, which this generator does not have. Remove --pipeline"
            " to use the toy generator, or remove --ablate."
        )
    return problem


def work(settings: CircularRun, problem: "Problem", run: "Run") -> None:
    """Train all networks of a new run, or the networks that a resumed run lacks, and write the table."""
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.circular import ablation

    # `open_problem` is passed on, because each worker process opens the problem itself.
    ablation.work(settings, problem, run, open_problem)


def title(settings: CircularRun, problem: "Problem") -> str:
    """Return the name of the run's folder, such as circular-dpo-toy-ablation-abc-inverted.

    The name contains the name of the generator, and the groups, the stage or the word loop.
    """
    if settings.groups:
        # Groups of the paper's table have one letter; controls are words, so a dash separates them.
        trained_part = "ablation-" + "".join(
            group_name if group_name in GROUPS else f"-{group_name}" for group_name in settings.groups
        )
    elif settings.stage:
        trained_part = f"stage-{settings.stage}"
    else:
        trained_part = "loop"
    return f"circular-dpo-{Path(settings.source.pipeline).name}-{trained_part}"


def check_rehearsal(settings: CircularRun, flags: Flags) -> None:
    """Raise ValueError for an ablation, whose trainings wait for each other on several processes."""
    if settings.groups is not None:
        raise ValueError(
            "--rehearse cannot be combined with --ablate. Rehearse the loop: the same command without"
            " --ablate and its flags. --dry-run lists the trainings of an ablation."
        )


CIRCULAR_DPO = Mode(
    name="circular-dpo",
    settings=CircularRun,
    open=open_circular,
    work=work,
    title=title,
    flags=combine_decorators(artefact_flags, what_flags, control_flag, train_flags, loop_flags, table_flags),
    resolve=resolve,
    record=lambda settings, problem: {
        "mode": "circular-dpo",
        "run": asdict(settings),
        "problem": dict(problem.identity),
    },
    recorded=make_record_reader(CircularRun, "circular-dpo"),
    defaults=shown_by_help,
    shown=lambda settings: {
        **asdict(settings),
        # --dry-run also lists the trainings of an ablation
        **({} if settings.groups is None else {"tasks": settings.plan.tasks()}),
    },
    jobs="--ablate",
    check_rehearsal=check_rehearsal,
    # artefacts of the rehearsal must not get into the folder that runs share
    rehearsed=lambda settings, folder: replace(settings, artefacts=str(folder / "artefacts")),
    again="The same command, or --resume=RUN,",
    help="""Train a multi-stage flow generator on preference pairs (Circular-DPO), by default the bundled toy.
    The last stage is trained on pairs that people labelled. Every earlier stage is trained on pairs of
    samples that the tuned and the untuned next stage produce. A control on randomised pairs is trained, too.
    --resume=RUN, or the same command, resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """,
)
MODES.add("circular-dpo", CIRCULAR_DPO)
