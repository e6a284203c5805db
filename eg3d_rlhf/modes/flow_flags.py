"""Flags that several commands for flow generators share, and the settings that are built from them.

The modules circular_dpo.py, online.py, offline.py, flow_tune.py and latent_reward.py use these flags. A flag
that was not given is None; then the default settings of the generator apply.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from eg3d_rlhf.core.cli import Decorator, combine_decorators, option, options_from_settings, seeds_of
from eg3d_rlhf.experiments.mode import RUN, Flags, Mode, flag, reject_torchrun
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
PROBLEM_DEFAULT = "by generator"  # text of --help where the default depends on the generator
TOY = ProblemSource.pipeline  # the bundled generator, used where no --pipeline is given
NON_NEGATIVE = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


def unset_option(
    flag_name: str,
    group: str,
    metavar: str,
    value_type,
    help: str,
    default_text: str = PROBLEM_DEFAULT,
    rare: bool = False,
):
    """Make an option whose value is None if it is absent, so that the generator's default settings apply.

    Args:
        flag_name: flag, such as "--loop-beta".
        group: title under which --help lists the flag.
        metavar: placeholder of the value in --help, mostly its unit.
        value_type: click type of the value.
        help: description in --help.
        default_text: text that --help shows as the default if the default cannot be computed.
        rare: True for an option that only --help-all shows and --set NAME=VALUE sets.
    """
    return option(
        flag_name,
        group=group,
        rare=rare,
        metavar=metavar,
        type=value_type,
        default=None,
        show_default=default_text,
        help=help,
    )


tuning_flags = combine_decorators(
    unset_option(
        # Training of adapters needs less memory than training of all parameters.
        "--tune",
        TRAIN,
        "lora|full",
        click.Choice(["lora", "full"]),
        "Parameters to tune: only LoRA adapters (lora), or all parameters of the networks (full).",
    ),
    unset_option(
        "--lora-targets",
        TRAIN,
        "LIST",
        str,
        "Layers that get LoRA adapters: the last parts of the layers' names, separated by commas.",
        "the default layers of the stage",
        rare=True,
    ),
)


def make_source(source_class: type[Source], flags: Flags) -> Source:
    """Build the settings that name the generator, its pairs and its conditioning, from the flags.

    Args:
        source_class: class of the settings, ProblemSource or a subclass.
        flags: values of the command line.

    Raises: ValueError for a flag that is missing or has no effect.
    """
    # `flags.values_for` returns the flags that were given, by field.
    source = source_class(**flags.values_for(source_class), seed=flags["seed"])
    check_source(source)
    return source


def make_record_reader(settings_class: type, mode: str) -> Callable[[Path, Flags, Any], Any]:
    """Make the function `recorded` of a Mode, which reads the settings of a run from its folder.

    Args:
        settings_class: class of the settings.
        mode: name of the mode; the folder of another mode is rejected.
    """

    def recorded(folder: Path, flags: Flags, ranks: Any) -> Any:
        # imported here, because --help must not load this module
        from eg3d_rlhf.experiments.run_record import OPTIONS, recorded_by

        # the message of an error names this path
        return from_dict(settings_class, recorded_by(folder, mode)["run"], str(folder / OPTIONS))

    return recorded


# Flags of the evaluation during training and of early stopping, which need held-out pairs or an evaluator.
EARLY = ("held_out_every", "patience", "max_drop")


def check_adapter_flags(flags: Flags) -> None:
    """Raise ValueError, naming the flags, if flags of LoRA adapters were given with --tune=full."""
    flags.check_applies(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
        flags["tune"] != "full",
        "--tune=full trains all parameters, and only --tune=lora adds adapters",
    )


def adapter_settings(flags: Flags, lora: LoraConfig | None) -> dict:
    """Build the settings of the LoRA adapters of a training.

    Args:
        flags: values of the command line.
        lora: adapters of the default settings; None: the default is to tune all parameters.

    Returns: {"lora": settings}, the field `lora` of a training; the settings are None with --tune=full.

    Raises: ValueError if adapter flags were given and all parameters are tuned.
    """
    # rank, alpha and dropout, as far as they were given
    adapter_values = flags.values_for(LoraConfig)
    if flags["lora_targets"] is not None:
        adapter_values["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    # Without --tune, the default settings decide.
    tunes_all = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    if tunes_all and adapter_values:
        raise ValueError(
            f"{', '.join(flag('lora_' + name) for name in adapter_values)} cannot be used, because the run"
            " has no LoRA adapters: it tunes all parameters. Add --tune=lora, or remove the flag."
        )
    return {"lora": None if tunes_all else replace(lora or LoraConfig(), **adapter_values)}


def adapter_help_values(lora: LoraConfig | None) -> dict[str, Any]:
    """Return the values of --tune and --lora-targets that --help shows as defaults.

    Args:
        lora: adapters of the resolved settings; None: all parameters are tuned.
    """
    # None as targets: each stage has default targets of its own, which --help describes by a text
    target_flag = {} if lora is None or lora.targets is None else {"lora_targets": ",".join(lora.targets)}
    # "full" has no adapters, so there are no values of their flags
    return {"tune": "full" if lora is None else "lora", **target_flag}


# Flags of the circular loop (Circular-DPO), for circular_dpo.py and flow_tune.py. The loop's pairs are pairs
# of latents of an earlier stage, encoded from assets of the tuned (preferred) and the untuned next stage.

LOOP = "The loop"
WEIGHT = click.FloatRange(min=0)

loop_flags = combine_decorators(
    option(
        "--rounds",
        group=LOOP,
        metavar="INT",
        type=COUNT,
        default=None,
        show_default="1",
        help=(
            "Number of rounds of the loop over all stages. Each round starts from the networks of the"
            " previous round, and uses them as the reference networks of the DPO loss."
        ),
    ),
    unset_option(
        # Weights of the loss on the loop's pairs. The flags without "loop" apply to people's pairs.
        "--loop-beta",
        LOOP,
        "FLOAT",
        POSITIVE,
        "beta of the DPO loss on the loop's pairs.",
        "--beta times a factor that depends on the generator",
        rare=True,
    ),
    unset_option(
        "--loop-loser-weight",
        LOOP,
        "FLOAT",
        WEIGHT,
        "Weight of the rejected sample's flow-matching error in the DPO loss on the loop's pairs.",
        rare=True,
    ),
    unset_option(
        "--loop-sft-weight",
        LOOP,
        "FLOAT",
        WEIGHT,
        "Weight of the preferred sample's flow-matching error (SFT term), which is added to the loss on the"
        " loop's pairs.",
        rare=True,
    ),
    unset_option(
        # Length and learning rate of the training on the loop's pairs.
        "--loop-lr",
        LOOP,
        "FLOAT",
        POSITIVE,
        "Learning rate of the training on the loop's pairs.",
        "the value of --lr if it is given, else by generator",
        rare=True,
    ),
    unset_option(
        "--loop-steps",
        LOOP,
        "UPDATES",
        COUNT,
        "Number of updates on the loop's pairs.",
        "the value of --steps if it is given, else by generator",
        rare=True,
    ),
    options_from_settings(LoopPairsConfig, Weighing),
)


def circular_settings(flags: Flags, defaults: CircularSettings) -> CircularSettings:
    """Apply the flags to the default settings of the circular loop.

    Args:
        flags: values of the command line; None: the flag was not given.
        defaults: default settings for the generator.
    """
    # Three trainings: on people's pairs, on the loop's pairs, and supervised fine-tuning for the ablation.
    human_training, loop_training, sft_training = (
        _training(flags, config) for config in (defaults.human, defaults.loop, defaults.sft)
    )
    human_training = replace(human_training, dpo=replace(human_training.dpo, **flags.values_for(DpoConfig)))
    # supervised fine-tuning has no preference loss, but the same condition dropout
    sft_training = replace(
        sft_training, dpo=replace(sft_training.dpo, condition_dropout=human_training.dpo.condition_dropout)
    )
    loop_pair_settings = replace(
        defaults.loop_pairs,
        **flags.values_for(LoopPairsConfig),
        **flags.select({"evaluation_batch": "batch"}),
    )
    # The loss on the loop's pairs has the settings of the loss on people's pairs, except for three weights.
    default_loop_dpo = defaults.loop.dpo
    # Keeps the ratio of the two default betas. The product comes first: with the default --beta, the quotient
    # is then exactly the default beta of the loop.
    beta = human_training.dpo.beta * default_loop_dpo.beta / defaults.human.dpo.beta
    loss_weights: dict[str, Any] = {
        "loser_weight": default_loop_dpo.loser_weight,
        "sft_weight": default_loop_dpo.sft_weight,
        "beta": beta,
    }
    loss_weights |= flags.select(
        {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"}
    )
    loop_training = replace(
        loop_training,
        # The loop's pairs need a loss with a reference network. If --loss selects a loss without a reference,
        # it applies to people's pairs only.
        dpo=replace(
            human_training.dpo if human_training.dpo.needs_reference else default_loop_dpo, **loss_weights
        ),
        **flags.select({"loop_lr": "lr", "loop_steps": "steps"}),
    )
    choosing_settings = defaults.choosing
    # 0 switches the choice of a checkpoint off; a number switches it on where the default has none
    if flags["choose_noises"] == 0:
        choosing_settings = None
    elif choosing_settings is not None or flags["choose_noises"] is not None:
        choosing_settings = replace(choosing_settings or Choosing(), **flags.values_for(Choosing))
    return replace(
        defaults,
        human=human_training,
        loop=loop_training,
        sft=sft_training,
        loop_pairs=loop_pair_settings,
        weighing=replace(defaults.weighing, **flags.values_for(Weighing)),
        choosing=choosing_settings,
        rounds=flags["rounds"] or defaults.rounds,
        seed=flags["seed"],
    )


def circular_help_values(settings: CircularSettings) -> list[object]:
    """Return the objects from which --help reads the defaults of the loop's flags.

    Flags of a training without the prefix --loop-, such as --lr, show the values for people's pairs.
    """
    loop_training = settings.loop
    choosing_settings = settings.choosing
    return [
        {
            **adapter_help_values(settings.human.lora),
            # The keys are names of flags, not of fields.
            "rounds": settings.rounds,
            "loop_beta": loop_training.dpo.beta,
            "loop_loser_weight": loop_training.dpo.loser_weight,
            "loop_sft_weight": loop_training.dpo.sft_weight,
            "loop_lr": loop_training.lr,
            "loop_steps": loop_training.steps,
            "choose_noises": 0 if choosing_settings is None else choosing_settings.per_condition,
        },
        settings,
    ]


def _training(flags: Flags, config: TrainConfig) -> TrainConfig:
    """Apply the flags to the settings of one training. The flags of the loss are not applied."""
    # Flags that were given replace the defaults of the generator.
    return replace(config, **flags.values_for(TrainConfig), **adapter_settings(flags, config.lora))


# Runs of arms (online.py, offline.py): several trainings that differ in their loss or in their labels, and a
# table that compares them.


def _stage_option(shown_default: str) -> Decorator:
    """Return the decorator that adds --stage, whose default help describes as `shown_default`."""
    return option(
        "--stage",
        group=WHAT,
        metavar="NAME",
        default=None,
        show_default=shown_default,
        help="Name of the stage of the generator to tune.",
    )


stage_flag = _stage_option("the last stage")
# of runs on people's labels, which are about the geometry unless --stage names a stage of textures
geometry_stage_flag = _stage_option("the last stage that decides the geometry")
arms_table_flags = combine_decorators(
    unset_option(
        "--seeds",
        TABLE,
        "LIST",
        str,
        "Training seeds with which every arm is trained, separated by commas, such as 0,1,2.",
        "the value of --seed; with several arms also the next two integers",
    ),
    unset_option(
        "--choose-noises",
        TABLE,
        "INT",
        NON_NEGATIVE,
        "Number of assets per held-out prompt from which the win rate is computed during training. The"
        " checkpoint with the highest win rate is used; with 0, the last checkpoint is used.",
        rare=True,
    ),
    rare_option(
        "--no-summary", group=RUN, is_flag=True, help="Write no table of win rates at the end of a run."
    ),
    options_from_settings(Evaluation),
)


control_flag = option(
    "--no-control",
    group=WHAT,
    is_flag=True,
    help=(
        "Train no control on randomised labels or rewards. This halves the time, but nothing then tests"
        " whether a gain is due to the labels or rewards."
    ),
)


def with_control(flags: Flags, arm: str, control_arm: str) -> tuple[str, ...]:
    """Return the arms of a run without --arms: the arm and, without --no-control, its control.

    Args:
        flags: values of the command line.
        arm: name of the arm.
        control_arm: name of the arm with randomised labels or rewards.
    """
    return (arm,) if flags["no_control"] else (arm, control_arm)


def check_arms_flags(flags: Flags, has_several_arms: bool) -> None:
    """Raise ValueError, naming the flags, if flags were given that have no effect in this run.

    Args:
        flags: values of the command line.
        has_several_arms: True if the run has several arms.
    """
    flags.check_applies(("no_control",), flags["arms"] is None, "--arms names the controls")
    flags.check_applies(
        ("jobs",),
        # several arms, or several training seeds; an arm and its control are trained one after the other
        (has_several_arms and flags["arms"] is not None) or len(training_seeds(flags, 1)) > 1,
        "there is only one training; several values of --arms or --seeds give several",
    )
    flags.check_applies(
        ("table_noises", "evaluation_batch"),
        not flags["no_summary"],
        "--no-summary leaves out the table",
    )
    check_adapter_flags(flags)


def make_shared_fields(flags: Flags, defaults: ArmsRun, arms: tuple[str, ...]) -> dict[str, Any]:
    """Build the fields that online and offline runs have in common: stage, arms, seeds and evaluation.

    Args:
        flags: values of the command line.
        defaults: default settings for the generator.
        arms: names of the arms.

    Returns: keyword arguments of an ArmsRun, by field.
    """
    choosing_settings = defaults.choosing
    if flags["choose_noises"] == 0:
        # 0: no win rate, so the last checkpoint is used
        choosing_settings = None
    elif flags["choose_noises"] is not None:
        choosing_settings = replace(choosing_settings or Choosing(), per_condition=flags["choose_noises"])
    # the arms of --arms are compared over three seeds; one arm and its control are trained once
    seeds = training_seeds(flags, 3 if flags["arms"] is not None and len(arms) > 1 else 1)
    return {
        "stage": flags["stage"],
        "arms": arms,
        "training_seeds": seeds,
        "is_controlled": flags["arms"] is None and not flags["no_control"] and len(seeds) == 1,
        "choosing": choosing_settings,
        "evaluation": replace(defaults.evaluation, **flags.values_for(Evaluation)),
        "summary": not flags["no_summary"],
    }


def arms_help_values(run: ArmsRun, lora: LoraConfig | None) -> dict[str, Any]:
    """Return the default values in --help of those flags that are not fields of the settings.

    Args:
        run: resolved settings of the run.
        lora: adapters of the first arm; None: all parameters are tuned.
    """
    return {
        **adapter_help_values(lora),
        "arms": ",".join(run.arms),
        "seeds": ",".join(map(str, run.training_seeds)),
        "choose_noises": 0 if run.choosing is None else run.choosing.per_condition,
    }


def training_seeds(flags: Flags, default_count: int) -> tuple[int, ...]:
    """Return the training seeds of the flag --seeds.

    Args:
        flags: values of the command line.
        default_count: number of seeds if --seeds was not given. They are the value of --seed and the integers
            that follow it.

    Raises: ValueError that names --seeds, if its value is not a list of integers >= 0.
    """
    if flags["seeds"] is None:
        # consecutive seeds, so that --seed alone makes the run reproducible
        return tuple(range(flags["seed"], flags["seed"] + default_count))
    return seeds_of("--seeds", flags["seeds"])


def parse_arm_names(flags: Flags) -> tuple[str, ...]:
    """Return the names in the value of --arms, without the spaces around the commas."""
    return tuple(name.strip() for name in flags["arms"].split(","))


def record(mode: str, settings: ArmsRun, problem_and_labels: "Opened") -> dict:
    """Build the record of a run folder as JSON: the settings, and the hashes of the problem and the labels.

    Args:
        mode: name of the mode.
        settings: settings of the run.
        problem_and_labels: the problem, and the labelled assets or None.
    """
    problem, labelled_assets = problem_and_labels
    # Online runs score their own samples, so they have no labels.
    label_record = {} if labelled_assets is None else {"labels": labelled_assets.identity}
    return {"mode": mode, "run": asdict(settings), "problem": dict(problem.identity), **label_record}


def make_arms_mode(
    name: str,
    settings_class: type[ArmsRun],
    title: Callable[[Any], str],
    open: "Callable[[Any, str], Opened]",
    check: "Callable[[Any, Opened, Run], None]",
    **mode_arguments: Any,
) -> Mode:
    """Build a mode of train.py that trains several arms and compares them.

    Args:
        name: name of the mode.
        settings_class: class of its settings.
        title: function of the settings that returns the middle part of the run folder's name, between the
            mode and the generator.
        open: function of the settings and the device that returns the problem and the labelled assets. It
            must be at a module's top level, because worker processes call it, too.
        check: function of the settings, the result of `open` and the run. It raises ValueError if the run
            needs something that was not opened.
        mode_arguments: other arguments of Mode.
    """

    def open_checked(settings: ArmsRun, run: "Run") -> "Opened":
        # Several trainings are distributed by --jobs. torchrun would start every training in every process.
        training_count = len(settings.arms) * len(settings.training_seeds)
        reject_torchrun(training_count > 1 and not settings.is_controlled, "--arms, --seeds")
        problem_and_labels = open(settings, run.device)
        check(settings, problem_and_labels, run)
        return problem_and_labels

    def work(settings: ArmsRun, problem_and_labels: "Opened", run: "Run") -> None:
        # imported here, because --help must not load this module
        from eg3d_rlhf.tuning.flow.training import arm_runs

        # `open` is passed on, because each worker process opens the problem itself.
        arm_runs.work(settings, problem_and_labels, run, open)

    def run_title(settings: ArmsRun, problem_and_labels: "Opened") -> str:
        # the last part of the path of the generator's folder
        generator_name = Path(settings.source.pipeline).name
        stage_name = settings.stage_in(problem_and_labels[0]).name
        return f"{settings.NAME}-{title(settings)}-{generator_name}-{stage_name}"

    return Mode(
        name=name,
        settings=settings_class,
        open=open_checked,
        work=work,
        title=run_title,
        record=lambda settings, problem_and_labels: record(name, settings, problem_and_labels),
        recorded=make_record_reader(settings_class, name),
        # --help says that --jobs divides several trainings among processes
        jobs="several trainings",
        check_rehearsal=lambda settings, flags: None,  # every run can be rehearsed
        **mode_arguments,
    )
