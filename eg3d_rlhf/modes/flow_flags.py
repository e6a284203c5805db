"""Flags that several commands of flow tuning share, and the settings that are built from them.

Used by circular_dpo.py, online.py, offline.py, flow_tune.py and latent_reward.py.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from eg3d_rlhf.core.cli import option, options_of, seeds_of, together
from eg3d_rlhf.experiments.mode import RUN, Flags, Mode, flag, refuse_torchrun
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes.shared_flags import COUNT, rare_option
from eg3d_rlhf.tuning.flow.base.settings import TABLE, Choosing, Evaluation, ProblemSource
from eg3d_rlhf.tuning.flow.families import check_source
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings, LoopPairsConfig, Weighing
from eg3d_rlhf.tuning.flow.training.settings import ArmsRun, DpoConfig, TrainConfig
from training.config import from_dict

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened

Source = TypeVar("Source", bound=ProblemSource)
WHAT = "What is trained"
TRAIN = "Training"
PROBLEM_DEFAULT = "the problem's own"
TOY = ProblemSource.pipeline  # the bundled generator, used where no --pipeline is given
NON_NEGATIVE = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


def unset_option(
    name: str, group: str, metavar: str, kind, help: str, shown: str = PROBLEM_DEFAULT, rare: bool = False
):
    """Make an option that is None unless given, so that the generator's default settings apply."""
    return option(
        name, group=group, rare=rare, metavar=metavar, type=kind, default=None, show_default=shown, help=help
    )


tuning_flags = together(
    unset_option(
        "--tune",
        TRAIN,
        "lora|full",
        click.Choice(["lora", "full"]),
        "Tune LoRA adapters, or every parameter.",
    ),
    unset_option(
        "--lora-targets",
        TRAIN,
        "LIST",
        str,
        "Layers that get adapters: the last parts of their names, comma-separated.",
        "the stage's own",
        rare=True,
    ),
)


def source_of(kind: type[Source], flags: Flags) -> Source:
    """Read the source of a problem from flags. Raises: ValueError for a flag that is missing or has no
    effect.
    """
    source = kind(**flags.of(kind), seed=flags["seed"])
    check_source(source)
    return source


def reader_of(kind: type, mode: str) -> Callable[[Path, Flags, Any], Any]:
    """Make the `recorded` function of a Mode, which reads settings of class `kind` from a run folder."""

    def recorded(folder: Path, flags: Flags, ranks: Any) -> Any:
        from eg3d_rlhf.experiments.run import OPTIONS, recorded_by

        return from_dict(kind, recorded_by(folder, mode)["run"], str(folder / OPTIONS))

    return recorded


# flags of early stopping, which needs held-out pairs or an evaluator
EARLY = ("held_out_every", "patience", "max_drop")


def check_tuning(flags: Flags) -> None:
    """Raise ValueError naming the adapter flags that were given with --tune=full."""
    flags.belong(
        # the flags of adapters have no effect when every parameter is tuned
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
        flags["tune"] != "full",
        "--tune=lora",
    )


def tuned_as(flags: Flags, lora: LoraConfig | None) -> dict:
    """Build the field `lora` of a training. Args: lora: that of the default settings."""
    # rank, alpha and dropout, where given
    adapters = flags.of(LoraConfig)
    if flags["lora_targets"] is not None:
        adapters["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    # without --tune, as in the default settings
    full = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    if full and adapters:
        raise ValueError(
            f"{', '.join(flag('lora_' + name) for name in adapters)}: needs --tune=lora. Add that, or remove"
            " the flag."
        )
    return {"lora": None if full else replace(lora or LoraConfig(), **adapters)}


def adapters_shown(lora: LoraConfig | None) -> dict[str, Any]:
    """Return the values of --tune and its flags that --help shows as defaults."""
    targets = {} if lora is None or lora.targets is None else {"lora_targets": ",".join(lora.targets)}
    return {"tune": "full" if lora is None else "lora", **targets}


# The loop: circular_dpo.py, flow_tune.py.

LOOP = "The loop"
WEIGHT = click.FloatRange(min=0)
AS_STEP = "that of people's pairs where it is given, else the problem's own"
loop_flags = together(
    option(
        "--rounds",
        group=LOOP,
        metavar="INT",
        type=COUNT,
        default=None,
        show_default="1",
        help=(
            "Rounds of the whole loop. Each starts from the networks of the last round, which become its"
            " reference."
        ),
    ),
    unset_option(
        "--loop-beta",
        LOOP,
        "FLOAT",
        POSITIVE,
        "DPO beta on the loop's pairs.",
        "in the problem's own ratio to --beta",
        rare=True,
    ),
    unset_option(
        "--loop-loser-weight",
        LOOP,
        "FLOAT",
        WEIGHT,
        "Weight of the rejected sample's error on the loop's pairs.",
        rare=True,
    ),
    unset_option(
        "--loop-sft-weight",
        LOOP,
        "FLOAT",
        WEIGHT,
        "Weight of the preferred sample's flow-matching error (SFT term) on the loop's pairs.",
        rare=True,
    ),
    unset_option(
        "--loop-lr", LOOP, "FLOAT", POSITIVE, "Learning rate on the loop's pairs.", AS_STEP, rare=True
    ),
    unset_option(
        "--loop-steps", LOOP, "UPDATES", COUNT, "Number of updates on the loop's pairs.", AS_STEP, rare=True
    ),
    options_of(LoopPairsConfig, Weighing),
)


def circular_settings(flags: Flags, defaults: CircularSettings) -> CircularSettings:
    """Apply the flags to the default settings of the loop."""
    human, loop, sft = (_training(flags, config) for config in (defaults.human, defaults.loop, defaults.sft))
    human = replace(human, dpo=replace(human.dpo, **flags.of(DpoConfig)))
    # supervised fine-tuning has no preference loss, but the same condition dropout
    sft = replace(sft, dpo=replace(sft.dpo, condition_dropout=human.dpo.condition_dropout))
    pairs = replace(
        defaults.loop_pairs, **flags.of(LoopPairsConfig), **flags.some({"evaluation_batch": "batch"})
    )
    defaults_loop = (
        defaults.loop.dpo
    )  # the loss on the loop's pairs: that on people's pairs, with three weights of its own
    # Multiply before dividing: with the default beta, the quotient is then exactly the default loop beta.
    beta = human.dpo.beta * defaults_loop.beta / defaults.human.dpo.beta
    loss_weights: dict[str, Any] = {
        "loser_weight": defaults_loop.loser_weight,
        "sft_weight": defaults_loop.sft_weight,
        "beta": beta,
    }
    loss_weights |= flags.some(
        {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"}
    )
    loop = replace(
        loop,
        # a loss without a reference cannot be used on the loop's pairs, so the default one is kept there
        dpo=replace(human.dpo if human.dpo.needs_reference else defaults_loop, **loss_weights),
        **flags.some({"loop_lr": "lr", "loop_steps": "steps"}),
    )
    choosing = defaults.choosing
    # 0 switches the choice of a checkpoint off; a number switches it on where the default has none
    if flags["choose_noises"] == 0:
        choosing = None
    elif choosing is not None or flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), **flags.of(Choosing))
    return replace(
        defaults,
        human=human,
        loop=loop,
        sft=sft,
        loop_pairs=pairs,
        weighing=replace(defaults.weighing, **flags.of(Weighing)),
        choosing=choosing,
        rounds=flags["rounds"] or defaults.rounds,
        seed=flags["seed"],
    )


def of_circular(settings: CircularSettings) -> list[object]:
    """Return the values of a loop that --help shows; --lr and others are those of training on people's
    pairs.
    """
    loop = settings.loop
    choosing = settings.choosing
    return [
        {
            **adapters_shown(settings.human.lora),
            "rounds": settings.rounds,
            "loop_beta": loop.dpo.beta,
            "loop_loser_weight": loop.dpo.loser_weight,
            "loop_sft_weight": loop.dpo.sft_weight,
            "loop_lr": loop.lr,
            "loop_steps": loop.steps,
            "choose_noises": 0 if choosing is None else choosing.per_condition,
        },
        settings,
    ]


def _training(flags: Flags, config: TrainConfig) -> TrainConfig:
    """Apply the flags to the settings of a training, except those of its loss."""
    return replace(config, **flags.of(TrainConfig), **tuned_as(flags, config.lora))


# Runs of arms: online.py, offline.py.

stage_flag = option(
    "--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Stage to tune."
)
arms_table_flags = together(
    unset_option(
        "--seeds",
        TABLE,
        "LIST",
        str,
        "Training seeds of every arm, as a list with ranges: 0,1,2.",
        "--seed; with several arms also the next two",
    ),
    unset_option(
        "--choose-noises",
        TABLE,
        "INT",
        NON_NEGATIVE,
        "Assets per held-out prompt for the win rate in training, which selects the checkpoint; 0 keeps the"
        " last one.",
        rare=True,
    ),
    rare_option("--no-summary", group=RUN, is_flag=True, help="Skip the table at the end of a run."),
    options_of(Evaluation),
)


def check_arms(flags: Flags, several: bool) -> None:
    """Raise ValueError naming the flags that would have no effect. Args: several: whether the run has
    several arms.
    """
    flags.belong(
        ("jobs",),
        several or len(training_seeds(flags, 1)) > 1,
        "a run of several trainings (--arms, --seeds)",
    )
    flags.belong(
        ("table_noises", "evaluation_batch"),
        not flags["no_summary"],
        "the table, which --no-summary leaves out",
    )
    check_tuning(flags)


def fields_of(flags: Flags, defaults: ArmsRun, arms: tuple[str, ...]) -> dict[str, Any]:
    """Build those fields of a run that are the same for all kinds of training data."""
    choosing = defaults.choosing
    if flags["choose_noises"] is not None:
        # 0 means: do not choose by a win rate
        choosing = (
            replace(choosing or Choosing(), per_condition=flags["choose_noises"])
            if flags["choose_noises"]
            else None
        )
    return {
        "stage": flags["stage"],
        "arms": arms,
        # several arms are compared over three seeds; one arm alone is trained once
        "training_seeds": training_seeds(flags, 3 if len(arms) > 1 else 1),
        "choosing": choosing,
        "evaluation": replace(defaults.evaluation, **flags.of(Evaluation)),
        "summary": not flags["no_summary"],
    }


def arms_shown(run: ArmsRun, lora: LoraConfig | None) -> dict[str, Any]:
    """Return the values of flags that --help shows and that are no fields of the settings."""
    return {
        **adapters_shown(lora),
        "arms": ",".join(run.arms),
        "seeds": ",".join(map(str, run.training_seeds)),
        "choose_noises": 0 if run.choosing is None else run.choosing.per_condition,
    }


def training_seeds(flags: Flags, count: int) -> tuple[int, ...]:
    """Return the training seeds of --seeds, by default `count` seeds from --seed on.

    Args: count: number of seeds where --seeds is not given. Raises: ValueError naming --seeds.
    """
    if flags["seeds"] is None:
        return tuple(range(flags["seed"], flags["seed"] + count))
    return seeds_of("--seeds", flags["seeds"])


def names_of(flags: Flags) -> tuple[str, ...]:
    """Return the names in --arms."""
    return tuple(name.strip() for name in flags["arms"].split(","))


def record(mode: str, settings: ArmsRun, opened: "Opened") -> dict:
    """Build the record of a run folder: its settings, problem and labels."""
    # online runs have no labels
    problem, labelled = opened
    labels = {} if labelled is None else {"labels": labelled.identity}
    return {"mode": mode, "run": asdict(settings), "problem": dict(problem.identity), **labels}


def mode_of_arms(
    name: str,
    kind: type[ArmsRun],
    title: Callable[[Any], str],
    open: "Callable[[Any, str], Opened]",
    check: "Callable[[Any, Opened, Run], None]",
    **more: Any,
) -> Mode:
    """Build a mode that trains and compares arms.

    Args:
        name: name of the mode.
        kind: class of its settings.
        title: (settings) -> the part of the folder's name between the mode and the generator.
        open: (settings, device) -> problem and labels. It must be at a module's top level, because worker
            processes call it, too.
        check: raises ValueError if what was opened lacks something that the run needs.
        more: other arguments of Mode.
    """

    def opened(settings: ArmsRun, run: "Run") -> "Opened":
        # several trainings are distributed by --jobs; torchrun would start each of them in every process
        refuse_torchrun(len(settings.arms) * len(settings.training_seeds) > 1, "--arms, --seeds")
        opened = open(settings, run.device)
        check(settings, opened, run)
        return opened

    def work(settings: ArmsRun, opened: "Opened", run: "Run") -> None:
        from eg3d_rlhf.tuning.flow.training import arm_runs

        arm_runs.work(settings, opened, run, open)

    def titled(settings: ArmsRun, opened: "Opened") -> str:
        # the folder's name, without its path
        generator = Path(settings.source.pipeline).name
        return f"{settings.NAME}-{title(settings)}-{generator}-{settings.stage_in(opened[0]).name}"

    return Mode(
        name=name,
        settings=kind,
        open=opened,
        work=work,
        title=titled,
        record=lambda settings, opened: record(name, settings, opened),
        recorded=reader_of(kind, name),
        jobs="several trainings",
        **more,
    )
