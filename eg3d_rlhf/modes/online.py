"""`train.py --mode=online`: tunes a stage online with rewards. `--mode=grpo` is the same with GRPO as
default.
"""

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    EARLY,
    TOY,
    WHAT,
    arms_shown,
    arms_table_flags,
    check_arms,
    fields_of,
    mode_of_arms,
    names_of,
    source_of,
    stage_flag,
    tuned_as,
    tuning_flags,
)
from eg3d_rlhf.tuning.flow.base.settings import TABLE, Choosing, Evaluation
from eg3d_rlhf.tuning.flow.training.online.settings import (
    ARMS,
    KINDS,
    ON_LATENTS,
    Losses,
    OnlineConfig,
    OnlineRun,
    divided,
    weighed,
)
from eg3d_rlhf.tuning.flow.training.online.settings import OWN as OWN_REWARD
from eg3d_rlhf.tuning.flow.training.settings import ArmsSource, DpoConfig, StageTraining, TrainConfig

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened

# Default settings for the bundled toy: 1,024 samples per run. Learning rate and length were chosen with its
# second evaluator
# on CHOOSING, with training seed 20, which no table uses.

LORA = LoraConfig(rank=16, alpha=32)
_TOY = OnlineConfig(
    lora=LORA,
    steps=16,  # updates
    batch=8,  # prompts per update
    group=8,  # samples per prompt
    lr=2e-3,  # of AdamW
    warmup=2,  # updates until the full learning rate
    kl=0.1,  # weight of the distance from the untuned network
    draws=1,  # times and noises per sample
    sampler_steps=4,  # steps per sample in training
    held_out_every=8,  # updates between evaluations
    log_every=2,  # updates per line of stats.jsonl
    checkpoint_every=8,  # updates between resumable states
    max_drop=1.0,  # of the win rate; 1: never stops early
)
_STEPS = replace(_TOY, passes=2, window=2, window_end=3, sde_step="cps", noise=0.5)
TOY_LOSSES = Losses(
    nft=_TOY,
    grpo=replace(_STEPS, loss="grpo"),
    grpo_plain=replace(
        _TOY, loss="grpo", advantage="group", sampler_steps=8, trained_steps=3, clip_range=1e-3
    ),
    grpo_guard=replace(_STEPS, loss="grpo-guard"),
    dppo=replace(_STEPS, loss="dppo"),
    dgpo=replace(_TOY, loss="dgpo", advantage="ranks", group_beta=10.0, decay="copy"),
)
TOY_RUN = OnlineRun(
    losses=TOY_LOSSES,
    dpo=TrainConfig(
        dpo=DpoConfig(beta=60.0),
        lora=LORA,
        steps=50,  # updates
        batch=16,  # pairs per update
        lr=1e-3,  # of AdamW
        warmup=5,  # updates until the full learning rate
        held_out_every=20,  # updates between evaluations
        log_every=5,  # updates per line of stats.jsonl
        checkpoint_every=20,  # updates between resumable states
        max_drop=1.0,  # of the win rate; 1: never stops early
    ),
    evaluation=Evaluation(per_condition=4),
)

# --mode=grpo on the toy: 3,200 samples. Chosen with the second evaluator on CHOOSING, with a training seed
# that its
# table does not use.

_EVERY_STEP = OnlineConfig(
    loss="grpo",
    lora=LORA,
    steps=50,  # updates
    batch=8,  # prompts per update
    group=8,  # samples per prompt
    lr=1e-3,  # of AdamW
    warmup=5,  # updates until the full learning rate
    kl=0.1,  # weight of the distance from the untuned network
    advantage="group",  # normalised within the group
    trained_steps=3,  # steps that are trained on, chosen at random
    clip_range=1e-3,  # of density ratios, about 1
    max_drift=None,  # no limit on the policy drift
    held_out_every=25,  # updates between evaluations
    log_every=5,  # updates per line of stats.jsonl
    checkpoint_every=10,  # updates between resumable states
    max_drop=1.0,  # of the win rate; 1: never stops early
)
TOY_GRPO = replace(
    TOY_RUN,
    losses=replace(TOY_LOSSES, grpo=_EVERY_STEP, grpo_plain=_EVERY_STEP),
    choosing=Choosing(per_condition=4),
    arms=("grpo",),
    dpo=replace(TOY_RUN.dpo, steps=100, warmup=10, held_out_every=25, checkpoint_every=50),
)

# Default settings for other generators, whose latents have ten thousand numbers or more.

_LARGE = OnlineConfig()
_WINDOW = replace(_LARGE, window=2, sde_step="cps", kl=0.004)
LARGE_LOSSES = Losses(
    nft=_LARGE,
    grpo=replace(_WINDOW, loss="grpo"),
    grpo_plain=replace(_LARGE, loss="grpo", advantage="group", passes=2, clip_range=1e-3, kl=0.04),
    grpo_guard=replace(_WINDOW, loss="grpo-guard"),
    dppo=replace(_WINDOW, loss="dppo"),
    dgpo=replace(_LARGE, loss="dgpo", advantage="ranks", kl=0.01, decay="dgpo"),
)
GRPO = "grpo"  # name of the preset and of its loss: GRPO on every step of the sampler


def default_run(pipeline: str, preset: str = "nft") -> OnlineRun:
    """Return the default settings of a run. Args: preset: the loss that applies if none is named."""
    if pipeline == TOY:
        return TOY_GRPO if preset == GRPO else TOY_RUN
    losses = replace(LARGE_LOSSES, grpo=LARGE_LOSSES.grpo_plain) if preset == GRPO else LARGE_LOSSES
    return OnlineRun(losses=losses, dpo=TrainConfig(), evaluation=Evaluation(batch=4))


what_flags = together(
    options_of(ArmsSource),
    stage_flag,
    option(
        "--reward",
        group=WHAT,
        metavar="A,B:WEIGHT",
        default=OWN_REWARD,
        help=(
            "Rewards of finished assets: the problem's built-in one, or plugins. Each of several is"
            " normalised"
            " within its group before they are added."
        ),
    ),
    option(
        "--gate",
        group=WHAT,
        metavar="LIST",
        help=(
            "Rewards that must confirm --reward: a sample that only the trained reward scores high pays"
            " the gap."
        ),
    ),
)
train_flags = together(tuning_flags, options_of(OnlineConfig))
arms_flag = option(
    "--arms",
    group=TABLE,
    metavar="LIST",
    show_default="--loss alone",
    help=(
        f"Arms to train and compare, comma-separated: {', '.join(KINDS)}; each with -randomised or -inverted"
        " rewards; or all."
    ),
)


def arms_of(flags: Flags, preset: str) -> tuple[str, ...]:
    """Return the names of the arms. Raises: ValueError if --loss is given as well as --arms."""
    if flags["arms"] is None:
        return (flags["loss"] or preset,)
    flags.belong(("loss",), False, "a run without --arms, which name losses")
    if flags["arms"] == "all":
        return tuple(arm for arm in ARMS if divided(arm)[0] != "dppo")
    return names_of(flags)


def check(flags: Flags, arms: tuple[str, ...]) -> None:
    """Reject flags that would have no effect. Raises: ValueError naming them."""
    flags.belong(("labelled",), False, "--mode=circular-dpo")
    check_arms(flags, len(arms) > 1)
    flags.belong(EARLY, flags["choose_noises"] != 0, "early stopping, which --choose-noises=0 switches off")
    # the losses of all arms; a flag must have an effect on at least one of them
    kinds = {divided(arm)[0] for arm in arms}
    flags.belong(
        ("window", "window_end", "window_moves", "window_updates", "trained_steps", "sde_step", "sde_noise"),
        bool(kinds - {*ON_LATENTS, "dpo"}),
        "losses on the sampler's steps",
    )
    flags.belong(("curvature", "unweighted"), "nft" in kinds, "--loss=nft")
    flags.belong(("group_beta",), "dgpo" in kinds, "--loss=dgpo")
    flags.belong(
        ("noise_samples", "decay", "guided"), bool(kinds & {*ON_LATENTS}), "losses on finished samples"
    )
    flags.belong(
        ("advantage",),
        len(weighed(flags["reward"])) == 1,
        "a run with one reward; several are each normalised within their group",
    )


def resolve(flags: Flags, preset: str) -> OnlineRun:
    """Build the settings of the run from the flags. Raises: ValueError naming a flag that does not fit."""
    arms = arms_of(flags, preset)
    check(flags, arms)
    defaults = default_run(flags["pipeline"] or TOY, preset)
    tuned = tuned_as(flags, defaults.losses.nft.lora)
    # the flags apply to every loss, so that arms differ in nothing but the loss
    changes = {name: value for name, value in flags.of(OnlineConfig).items() if name != "loss"} | tuned
    losses = Losses(
        **{field.name: changed(getattr(defaults.losses, field.name), changes) for field in fields(Losses)}
    )
    # --steps does not apply to the DPO arm, whose default length passes over as many samples.
    common = {name: value for name, value in flags.of(StageTraining).items() if name != "steps"}
    return OnlineRun(
        losses=losses,
        dpo=replace(defaults.dpo, **common, lora=tuned["lora"]),
        source=source_of(ArmsSource, flags),
        reward=flags["reward"],
        gate=flags["gate"],
        **fields_of(flags, defaults, arms),
    )


def shown_by_help(run: OnlineRun) -> list[object]:
    """Return the settings that --help shows as defaults: those of the first arm's loss."""
    kind, _ = divided(run.arms[0])
    config = run.losses.grpo_plain if kind == "dpo" else run.losses.of(kind)
    return [arms_shown(run, config.lora), config, run]


def changed(config: OnlineConfig, changes: dict) -> OnlineConfig:
    """Apply the flags. A window of steps and single random steps exclude each other: the given one is
    kept.
    """
    if "window" in changes:
        config = replace(config, trained_steps=None)
    elif "trained_steps" in changes:
        config = replace(config, window=None)
    return replace(config, **changes)


def open_online(settings: OnlineRun, device: str) -> "Opened":
    """Open the problem of a run; see mode_of_arms."""
    from eg3d_rlhf.tuning.flow.families.opening import open_problem

    return open_problem(settings.source, device), None


def check_opened(settings: OnlineRun, opened: "Opened", run: "Run") -> None:
    """Raise ValueError if a problem lacks something that the run needs."""
    bench = settings.bench(opened, settings.training_seeds[0])
    for arm in settings.arms:
        bench.config(arm).sampling(bench.stage)  # raises ValueError if the sampler does not suit the stage
    bench.check_gate()


def mode_named(name: str, preset: str) -> Mode:
    """Build the mode under one of its two names. Args: preset: the loss that applies if none is named."""
    return mode_of_arms(
        name,
        OnlineRun,
        lambda settings: settings.arms[0] if len(settings.arms) == 1 else "arms",
        open_online,
        check_opened,
        flags=together(what_flags, train_flags, arms_flag, arms_table_flags),
        resolve=lambda flags: resolve(flags, preset),
        defaults=lambda flags: shown_by_help(resolve(flags, preset)),
        help=f"""Tune one stage of a flow generator online with rewards, by default of the bundled toy. Use
        it where a reward is available and pairs are not. --resume=RUN resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode={name}
        python train.py --mode={name} --arms={preset},{preset}-randomised,{preset}-inverted,dpo
        python train.py --mode={name} --stage=structure --kl=0.3
    """,
    )


MODES.add("online", mode_named("online", "nft"))
MODES.add(GRPO, mode_named(GRPO, GRPO))
