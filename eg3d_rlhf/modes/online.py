"""`train.py --mode=online` and `--mode=grpo`: tune a stage of a flow generator online with rewards.

In every update, the generator samples a group of assets for each prompt, the rewards score them, and the
network is trained towards the assets with higher scores in their group. Both modes have the same losses;
--mode=grpo has GRPO (Flow-GRPO, arXiv:2505.05470) as its default loss.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    EARLY,
    TOY,
    WHAT,
    adapter_settings,
    arms_help_values,
    arms_table_flags,
    check_arms_flags,
    control_flag,
    make_arms_mode,
    make_shared_fields,
    make_source,
    parse_arm_names,
    stage_flag,
    tuning_flags,
    with_control,
)
from eg3d_rlhf.modes.weak_reward import weak_reward_option
from eg3d_rlhf.tuning.flow.base.settings import TABLE, Choosing, Evaluation
from eg3d_rlhf.tuning.flow.training.online.settings import (
    ARMS,
    KINDS,
    ON_LATENTS,
    Losses,
    OnlineConfig,
    OnlineRun,
    ServedConfig,
    parse_weights,
    split_arm,
)
from eg3d_rlhf.tuning.flow.training.online.settings import PROBLEM_REWARD as OWN_REWARD
from eg3d_rlhf.tuning.flow.training.settings import (
    RANDOMISED,
    ArmsSource,
    DpoConfig,
    StageTraining,
    TrainConfig,
)

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened

# Default settings for the bundled toy generator: 16 updates x 8 prompts x 8 samples = 1,024 samples per run.
# The learning rate and the length were chosen by the scores of its second evaluator on the prompts CHOOSING,
# with training seed 20, which no table uses.

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

# Default settings of --mode=grpo for the toy: 50 updates x 8 prompts x 8 samples = 3,200 samples. They were
# chosen in the same way, with a training seed that the table does not use.

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
    """Return the default settings of a run.

    Args:
        pipeline: folder of the generator, or the name of the toy.
        preset: name of the default loss, "nft" for --mode=online or "grpo" for --mode=grpo.
    """
    if pipeline == TOY:
        return TOY_GRPO if preset == GRPO else TOY_RUN
    # In --mode=grpo, the name grpo means plain GRPO, which trains on every step of the sampler.
    losses = replace(LARGE_LOSSES, grpo=LARGE_LOSSES.grpo_plain) if preset == GRPO else LARGE_LOSSES
    return OnlineRun(losses=losses, dpo=TrainConfig(), evaluation=Evaluation(batch=4))


what_flags = combine_decorators(
    options_from_settings(ArmsSource),
    stage_flag,
    option(
        "--reward",
        group=WHAT,
        metavar="A,B:WEIGHT",
        default=OWN_REWARD,
        help=(
            "Rewards that score the samples, separated by commas: names of built-in rewards of the"
            " generator, reward files that `reward latent` wrote, names of plugins, http://HOST/score for"
            " a reward server, or judge:URL for a vision-language model that compares samples with"
            " untuned assets. Several rewards are normalised within the group of samples of a prompt,"
            " multiplied by their weights (1 without :WEIGHT), and added."
        ),
    ),
    weak_reward_option(group=WHAT),
    option(
        "--reward-required",
        is_flag=True,
        group=WHAT,
        help=(
            "End the run if a reward from an address gives no score for a sample. By default, such a sample"
            " gets a neutral score."
        ),
    ),
    options_from_settings(ServedConfig),
    option(
        "--gate",
        group=WHAT,
        metavar="LIST",
        help=(
            "Names of held-out rewards for GARDO's gate, separated by commas. With it, the penalty on the"
            " distance from the untuned network applies only to samples that --reward ranks higher than these"
            " rewards do."
        ),
    ),
)
train_flags = combine_decorators(tuning_flags, options_from_settings(OnlineConfig))
arms_flag = option(
    "--arms",
    group=TABLE,
    metavar="LIST",
    show_default="the value of --loss, and its control with randomised rewards",
    help=(
        f"Arms to train and compare, separated by commas: {', '.join(KINDS)}. The ending -randomised or"
        " -inverted makes a control with randomised or inverted rewards. all selects all arms"
        " except dppo and its controls."
    ),
)


def select_arms(flags: Flags, preset: str) -> tuple[str, ...]:
    """Return the names of the arms that the flags select.

    Args:
        flags: values of the command line.
        preset: name of the loss if neither --arms nor --loss was given.

    Raises: ValueError if both --loss and --arms were given.
    """
    if flags["arms"] is None:
        loss_name = flags["loss"] or preset
        return with_control(flags, loss_name, f"{loss_name}-{RANDOMISED}")
    # False: with --arms, whose names contain the losses, --loss never has an effect.
    flags.check_applies(("loss",), False, "the names of --arms contain the losses")
    if flags["arms"] == "all":
        # all losses with their controls, except dppo, which must be named
        return tuple(arm for arm in ARMS if split_arm(arm)[0] != "dppo")
    return parse_arm_names(flags)


def check(flags: Flags, arms: tuple[str, ...]) -> None:
    """Raise ValueError, naming the flags, if flags were given that have no effect on any of the arms."""
    # False: the source of pairs has this flag, but it never has an effect in this mode.
    flags.check_applies(("labelled",), False, "this mode optimises a reward and uses no labelled assets")
    check_arms_flags(flags, len(arms) > 1)
    flags.check_applies(EARLY, flags["choose_noises"] != 0, "--choose-noises=0 switches early stopping off")
    # names of the losses of all arms, without endings such as -randomised
    loss_names = {split_arm(arm)[0] for arm in arms}
    flags.check_applies(
        ("window", "window_end", "window_moves", "window_updates", "trained_steps", "sde_step", "sde_noise"),
        bool(loss_names - {*ON_LATENTS, "dpo"}),
        "no arm has a loss on the sampler's steps",
    )
    # Flags of a single loss are rejected if no arm has this loss.
    flags.check_applies(
        ("curvature", "unweighted"), "nft" in loss_names, "no arm has the loss nft (--loss=nft)"
    )
    flags.check_applies(("group_beta",), "dgpo" in loss_names, "no arm has the loss dgpo (--loss=dgpo)")
    flags.check_applies(
        ("noise_samples", "decay", "guided"),
        bool(loss_names & {*ON_LATENTS}),
        "no arm has a loss on finished samples",
    )
    flags.check_applies(
        ("advantage",),
        len(parse_weights(flags["reward"])) == 1,
        "several rewards are given, and each of them is normalised within its group",
    )


def resolve(flags: Flags, preset: str) -> OnlineRun:
    """Build the settings of the run from the flags. A flag that is None gets the default of the generator.

    Args:
        flags: values of the command line.
        preset: name of the default loss.

    Raises: ValueError that names a flag without an effect, or a value that is not allowed.
    """
    arms = select_arms(flags, preset)
    check(flags, arms)
    defaults = default_run(flags["pipeline"] or TOY, preset)
    adapter_fields = adapter_settings(flags, defaults.losses.nft.lora)
    # The flags apply to the settings of every loss, so that the arms differ in nothing but the loss.
    changed_fields = {
        name: value for name, value in flags.values_for(OnlineConfig).items() if name != "loss"
    } | adapter_fields
    losses = Losses(
        **{
            field.name: apply_flags(getattr(defaults.losses, field.name), changed_fields)
            for field in fields(Losses)
        }
    )
    # --steps does not apply to the DPO arm, whose default length passes over as many samples.
    dpo_changes = {name: value for name, value in flags.values_for(StageTraining).items() if name != "steps"}
    return OnlineRun(
        losses=losses,
        dpo=replace(defaults.dpo, **dpo_changes, lora=adapter_fields["lora"]),
        source=make_source(ArmsSource, flags),
        reward=flags["reward"],
        gate=flags["gate"],
        served=ServedConfig(reward_required=bool(flags["reward_required"]), **flags.values_for(ServedConfig)),
        **make_shared_fields(flags, defaults, arms),
    )


def shown_by_help(run: OnlineRun) -> list[object]:
    """Return the objects from which --help reads defaults: the settings of the first arm's loss."""
    # The DPO arm has other settings than the flags; --help shows the settings of plain GRPO for it.
    loss_name, _ = split_arm(run.arms[0])
    loss_settings = run.losses.grpo_plain if loss_name == "dpo" else run.losses.for_arm(loss_name)
    return [arms_help_values(run, loss_settings.lora), loss_settings, run.served, run]


def apply_flags(config: OnlineConfig, changed_fields: dict) -> OnlineConfig:
    """Return settings of a loss with changed fields.

    A loss trains either on a window of consecutive sampler steps (`window`) or on random steps
    (`trained_steps`). If one of the two fields is changed, the other field becomes None.

    Args:
        config: settings of the loss.
        changed_fields: new values by field.
    """
    if "window" in changed_fields:
        config = replace(config, trained_steps=None)
    elif "trained_steps" in changed_fields:
        config = replace(config, window=None)
    return replace(config, **changed_fields)


def open_online(settings: OnlineRun, device: str) -> "Opened":
    """Open the generator of a run with its evaluators (the problem). There are no labelled assets: None.

    Args:
        settings: settings of the run.
        device: device on which the networks are loaded.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.families.opening import open_problem

    return open_problem(settings.source, device), None


def check_opened(settings: OnlineRun, problem_and_labels: "Opened", run: "Run") -> None:
    """Raise ValueError if a problem lacks something that the arms of the run need.

    Args:
        settings: settings of the run.
        problem_and_labels: the problem, and None instead of labelled assets.
        run: the run.
    """
    if "solid" in parse_weights(settings.reward):
        check_voxels(problem_and_labels[0].pipeline)
    bench = settings.bench(problem_and_labels, settings.training_seeds[0])
    for arm in settings.arms:
        bench.config(arm).sampling(bench.stage)  # raises ValueError if the sampler does not suit the stage
    bench.check_gate()
    announce_rewards(settings.reward, run)


def check_voxels(pipeline: Any) -> None:
    """Raise ValueError if the assets of a pipeline are known to have no voxels, before any asset is sampled.

    The assets of released generators are meshes or Gaussians. The method `voxels` of a pipeline states their
    voxels, and TRELLIS has it. The toy's assets, and those of a plugin, have their voxels in themselves.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.families.folder import OpenedFolder

    if isinstance(pipeline, OpenedFolder) and not hasattr(pipeline, "voxels"):
        raise ValueError(
            f"--reward=solid: the assets of {type(pipeline).__name__} have no voxels, which this reward"
            " scores. Use --reward=latent, or a file that `eg3d-rlhf reward latent` wrote."
        )


def announce_rewards(reward_text: str, run: "Run") -> None:
    """Print the accuracy on held-out pairs that the reward files of a run state.

    Args:
        reward_text: value of --reward.
        run: the run, whose flag --weak-reward accepts a reward that is not above chance.

    Raises: ValueError for a reward that is not above chance, unless the user accepted it.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments import version_0_1
    from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_accuracy
    from eg3d_rlhf.tuning.flow.training.latent_reward import KIND
    from training.storage import read_meta

    use = RewardUse(
        tunes=True,
        # The reward of a resumed run was accepted when the run began.
        allows_weak=run.resumed is not None or bool(run.flags.get("weak_reward")),
        is_main=run.ranks.is_main,
    )
    # The other names are rewards in closed form, or rewards that are trained at the start of the run.
    for name in parse_weights(reward_text):
        if name.endswith(".safetensors"):
            file_meta = version_0_1.latent_reward(read_meta(Path(name), KIND))
            announce_accuracy(file_meta["record"], "--reward", use)


def make_online_mode(name: str, preset: str) -> Mode:
    """Build the mode of online tuning under one of its two names, which differ in the default loss.

    Args:
        name: name of the mode, "online" or "grpo".
        preset: name of the default loss.
    """
    return make_arms_mode(
        name,
        OnlineRun,
        # middle part of the run folder's name; the names of several arms would be too long
        lambda settings: (
            "arms" if len(settings.arms) > 1 and not settings.is_controlled else settings.arms[0]
        ),
        open_online,
        check_opened,
        flags=combine_decorators(what_flags, control_flag, train_flags, arms_flag, arms_table_flags),
        resolve=lambda flags: resolve(flags, preset),
        defaults=lambda flags: shown_by_help(resolve(flags, preset)),
        help=f"""Tune one stage of a flow generator online with rewards, by default the bundled toy. This mode
        needs a reward, but no labelled pairs. A control on randomised rewards is trained, too.
        --resume=RUN resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode={name}
        python train.py --mode={name} --arms={preset},{preset}-randomised,{preset}-inverted,dpo
        python train.py --mode={name} --stage=structure --kl=0.3
    """,
    )


MODES.add("online", make_online_mode("online", "nft"))
MODES.add(GRPO, make_online_mode(GRPO, GRPO))
