"""`python train.py`: trains an EG3D generator as a GAN, or fine-tunes it with a reward on its density field.

The settings of each preset are in eg3d_rlhf/tuning/gan/presets.py; `HEADS` there lists every setting of the
run `python train.py --reward=sigma --lambda-r=10`. The objects of a run are built in
eg3d_rlhf/tuning/gan/reward_run.py.
"""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, prefix_errors
from eg3d_rlhf.core.input_paths import check_network, check_reward_file, find_network
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.experiments.mode import flag as _flag
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.weak_reward import weak_reward_option
from eg3d_rlhf.rewards.observation_kinds import OBSERVATIONS
from eg3d_rlhf.tuning.gan.presets import BUNDLED_STUDY, OBSERVED, PRESETS
from eg3d_rlhf.tuning.gan.settings import (
    REWARD,
    REWARDED,
    SCRATCH,
    SYNTHETIC,
    TUNING,
    DataConfig,
    RewardSettings,
    RoundConfig,
    RunConfig,
    Settings,
)
from training.config import (
    DATA,
    RUN,
    GanConfig,
    LoopConfig,
    NetworkConfig,
    number_text,
    settings_to_values,
)
from training.input_paths import check_checkpoint, check_dataset

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.gan.reward_run import Objects
    from training.distributed import Ranks

EG3D = "Accepted for compatibility with EG3D"
# Dataclasses whose fields are the flags, in the order in which --help lists them.
GROUPS = (RunConfig, DataConfig, NetworkConfig, GanConfig, LoopConfig, RewardSettings, RoundConfig)


def check_init(init: str) -> None:
    """Check that --init is one of its two words, or names a network. Raises: as `check_network`."""
    if init not in ("bundled", "scratch"):
        check_network(init)


def check_kind(reward_name: str) -> None:
    """Raise ValueError, which lists the kinds, if --reward names no kind of reward, and is not none."""
    if reward_name != "none":
        OBSERVATIONS.check(reward_name)


def check_control(control_path: str) -> None:
    """Raise ValueError if --control names nothing that exists."""
    if not Path(control_path).exists():
        raise ValueError(
            f"{control_path} does not exist. Name the folder of a run with --lambda-r=0, or its summary.json."
        )


def select_task(init: str, reward_name: str) -> str:
    """Return the task of a run: SCRATCH, TUNING (fine-tuning without a reward) or REWARDED.

    Args:
        init: value of --init, "scratch" for untrained networks.
        reward_name: value of --reward, "none" without a reward.
    """
    return SCRATCH if init == "scratch" else TUNING if reward_name == "none" else REWARDED


def add_bundled_files(flags: Mapping) -> dict:
    """Return the flags that were given, with the bundled files as defaults of --init and the reward files.

    Args:
        flags: values of the command line by name; None: the flag was not given. 0 and False are values.
    """
    given_flags = {name: value for name, value in flags.items() if value is not None}
    cfg = given_flags.setdefault("cfg", "heads64")
    given_flags.setdefault("init", "bundled" if cfg == "heads64" else "scratch")
    # The bundled held-out reward suits the bundled reward and rewards that rounds train. With another reward
    # file of the user, no held-out reward is assumed.
    if (cfg, given_flags.get("reward")) == ("heads64", "sigma"):
        bundled_reward_path = str(bundled.REWARD)
        if (
            given_flags.get("rounds")
            or given_flags.setdefault("reward_ckpt", bundled_reward_path) == bundled_reward_path
        ):
            given_flags.setdefault("heldout_reward", str(bundled.HELDOUT_REWARD))
    return given_flags


def merge_preset(given_flags: Mapping, network_settings: Mapping) -> dict:
    """Merge the preset, the settings of the network file, and the given flags, in rising priority.

    Args:
        given_flags: values of the flags that were given.
        network_settings: settings that the network file fixes (`read_network_settings`).

    Returns: settings by name. A required flag that is missing has the value None. A setting that is absent
        gets the default of its dataclass.
    """
    cfg = given_flags["cfg"]
    reward_name = given_flags.get("reward", "none")
    task = select_task(given_flags["init"], reward_name)
    # Later dictionaries override earlier dictionaries.
    settings_by_name = {
        "task": task,
        **PRESETS[cfg, task],
        **OBSERVED.get(reward_name, {}),
        **(BUNDLED_STUDY if given_flags.get("preset") else {}),
        **network_settings,
        **given_flags,
    }
    batch_size = settings_by_name["batch"]
    if settings_by_name["ema_kimg"] is None and batch_size is not None:
        # the half-life of the moving average grows with the batch size, as in EG3D's train.py
        settings_by_name["ema_kimg"] = batch_size * 10 / 32
    if cfg != "heads64" and batch_size is not None:  # EG3D scales this flag with the batch size
        settings_by_name["blur_fade_kimg"] = (
            settings_by_name.get("blur_fade_kimg", GanConfig.blur_fade_kimg) * batch_size / 32
        )
    # without --rlr the reward's optimiser uses the learning rate of G
    if settings_by_name["rlr"] is None:
        settings_by_name["rlr"] = settings_by_name.get("glr", GanConfig.glr)
    # The preset's gate weights the consistency term by the clip of the reward, so it needs both of them.
    if given_flags.get("lambda_sigma") == 0 or given_flags.get("reward_clip") == "none":
        settings_by_name["consistency_gate"] = given_flags.get("consistency_gate", 1.0)
    return settings_by_name


def shown_by_help(flags: Mapping) -> list[dict]:
    """Return the values that --help shows as defaults. The only file that is read is the file of --init."""
    given_flags = add_bundled_files(flags)
    # Only the configuration heads64 has a default dataset. None is shown as a required flag.
    missing_data = {"data": None} if given_flags["cfg"] != "heads64" else {}
    network_settings = (
        {} if given_flags["init"] in ("scratch", "bundled") else read_network_settings(given_flags["init"])
    )
    return [{**missing_data, **merge_preset(given_flags, network_settings)}]


def resolve(flags: Mapping) -> Settings:
    """Build the settings of the run from the flags, the preset and the file of --init.

    Args:
        flags: values of the command line by name; None: the flag was not given.

    Raises: ValueError that names the flag of the first mistake.
    """
    given_flags = add_bundled_files(flags)
    cfg = given_flags["cfg"]
    reward_name = given_flags.get("reward", "none")
    if cfg != "heads64" and "data" not in given_flags:
        raise ValueError(
            f"--data: the dataset is missing, and --cfg={cfg} has no default dataset. Name a zip file or a"
            " folder in EG3D's format."
        )
    init = given_flags["init"]
    if reward_name != "none":
        # an error in this block begins with the name --reward
        with prefix_errors("--reward"):
            check_kind(reward_name)
        # A reward scores shapes, which an untrained generator does not produce.
        if init == "scratch":
            raise ValueError(
                f"--reward={reward_name} cannot be combined with --init=scratch, because a reward needs"
                " trained networks. Name a network file with --init, or use --init=bundled."
            )
    check_preset(given_flags, reward_name)
    check_rounds(given_flags, reward_name)
    if given_flags.get("early_stop") is not None and given_flags.get("heldout_reward") is None:
        # with --reward=sigma, the bundled held-out reward is the default
        missing_flag = "--reward=sigma" if reward_name == "none" else "--heldout-reward"
        raise ValueError(
            f"--early-stop needs a held-out reward, whose scores choose the snapshot. Add {missing_flag}, or"
            " remove --early-stop."
        )
    # EG3D has no defaults for these two flags, because they depend on the dataset.
    values_without_file = merge_preset(given_flags, {})
    for name in ("gamma", "batch"):
        if values_without_file[name] is None:
            raise ValueError(
                f"--{name}: the value is missing, and --cfg={cfg} has no default for it. Add it: published"
                " runs of EG3D used --gamma=1 --batch=32."
            )
    # --dry-run shows the settings of a run whose dataset may be on another machine.
    if "data" in given_flags and not given_flags.get("dry_run"):
        with prefix_errors("--data"):
            check_dataset(given_flags["data"])
    # A run folder is replaced by its newest network. The file is recorded, so that a resume uses the same
    # file.
    if Path(init).is_dir():
        # an error in this block begins with the name --init
        with prefix_errors("--init"):
            init = given_flags["init"] = str(find_network(init))
    file_settings = {} if init == "scratch" else read_network_settings(None if init == "bundled" else init)
    settings_by_name = merge_preset(given_flags, file_settings)
    control_path = given_flags.get("control")
    if control_path is not None:
        with prefix_errors("--control"):
            check_control(control_path)
    return Settings.from_values(settings_by_name)


def check_preset(given_flags: Mapping, reward_name: str) -> None:
    """Raise ValueError if --preset is given for a run that its settings do not suit.

    Args:
        given_flags: values of the flags that were given.
        reward_name: value of --reward, "none" without a reward.
    """
    preset_name = given_flags.get("preset")
    if preset_name is None:
        return
    if reward_name == "none":
        raise ValueError(
            f"--preset={preset_name} selects the settings of tuning with a reward. Add --reward=sigma, or"
            " remove --preset."
        )
    if reward_name in OBSERVED:
        raise ValueError(
            f"--preset={preset_name} cannot be combined with --reward={reward_name}, which has published"
            " settings of its own. Remove --preset, or set single values with their flags."
        )


def check_rounds(given_flags: Mapping, reward_name: str) -> None:
    """Raise ValueError for flags that cannot be combined with --rounds, or that need --rounds.

    A round labels samples, trains a reward on all labels, and tunes the generator with this reward.

    Args:
        given_flags: values of the flags that were given.
        reward_name: value of --reward, "none" without a reward.
    """
    # The other settings of rounds have no flag; they are set with --set.
    flag_names = {"round_pairs": "--round-pairs", "round_labels": "--round-labels"}
    round_flags = [flag_names.get(name, f"--set {name}") for name in given_flags if name.startswith("round_")]
    # --rounds=0 has the same meaning as no --rounds
    if not given_flags.get("rounds"):
        if round_flags:
            raise ValueError(
                f"{round_flags[0]} has an effect only with --rounds. Add --rounds=N, or remove"
                f" {round_flags[0]}."
            )
        return
    if reward_name == "none":
        raise ValueError(
            "--rounds needs --reward, which selects the kind of reward that each round trains. Add"
            " --reward=sigma."
        )
    if "reward_ckpt" in given_flags:
        raise ValueError(
            f"--reward-ckpt={given_flags['reward_ckpt']} cannot be combined with --rounds, because every"
            " round trains a reward. Remove --reward-ckpt."
        )
    # The simulated annotator needs the ground truth of every sample, which exists only for synthetic heads.
    if given_flags.get("round_labels", SYNTHETIC) == SYNTHETIC and not given_flags.get(
        "data", DataConfig.data
    ).startswith("synthetic:"):
        raise ValueError(
            f"--round-labels={SYNTHETIC} cannot be used with --data={given_flags['data']}: the simulated"
            " annotator labels synthetic heads only. Add --round-labels=people."
        )


def read_network_settings(init_path: str | None) -> dict:
    """Read the settings that a network file fixes.

    They are the neural rendering resolution, camera conditioning, and the group size of D's minibatch
    standard deviation (StyleGAN2).

    Args:
        init_path: network file or run folder; None: the bundled generator.

    Returns: settings by name, for `merge_preset`.

    Raises: ValueError that names --init, for a file that cannot be read or tuned.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import check_trainable, read_description
    from training.networks import RENDERED

    # an error in this block begins with the name --init
    with prefix_errors("--init"):
        network_path = find_network(init_path)
        description = read_description(network_path)
        # Checked before the data are read. Most released files of full-head generators end here.
        check_trainable(network_path, description)
    generator_kwargs = description["G_kwargs"]
    resolution = description.get(RENDERED)
    mbstd_group = (
        description["D_kwargs"].get("epilogue_kwargs", {}).get("mbstd_group_size", NetworkConfig.mbstd_group)
    )
    # EG3D replaces the camera label in the mapping network by zeros if conditioning is off.
    is_conditioned = not generator_kwargs.get("rendering_kwargs", {}).get("c_gen_conditioning_zero", False)
    return {
        "gen_pose_cond": is_conditioned,
        "mbstd_group": mbstd_group,
        # A file may lack the neural rendering resolution; then the preset decides.
        **({} if resolution is None else {"nrr_initial": resolution}),
    }


# Settings that only new networks use. With --init=FILE they are ignored.
FRESH = (
    "cbase",  # channel multiplier
    "cmax",  # largest number of feature maps
    "plane_layout",  # axes of the third plane
    "map_depth",  # layers of G's mapping network
    "sr_module",  # super-resolution module
    "sr_num_fp16_res",  # half precision in super-resolution
    "g_num_fp16_res",  # half-precision resolutions of the backbone
    "d_num_fp16_res",  # half-precision resolutions of D
    "c_scale",  # scale of the camera label
    "disc_c_noise",  # noise on D's camera label
    "sr_noise_mode",  # noise in super-resolution
    "decoder_lr_mul",  # learning-rate multiplier of the decoder
)

# The mode: its flags, and the functions that the loop of experiments/mode.py calls.

# Flags of EG3D that have no effect here: (flag, type, help text).
_IGNORED = (
    (
        "--metrics",
        str,
        "This flag is ignored: metrics are not computed during training. Use tools/calc_metrics.py.",
    ),
    ("--nobench", bool, "This flag is ignored: benchmarking of convolutions is always off."),
    (
        "--c-noise",
        float,
        "This flag is ignored, as in EG3D. --disc-c-noise sets the noise on D's camera label.",
    ),
    (
        "--resume-blur",
        bool,
        "This flag is ignored: --resume continues every fade, and runs with --init start without blur.",
    ),
    ("--sr-first-cutoff", int, "This flag is ignored, as in EG3D."),
    ("--sr-first-stopband", float, "This flag is ignored, as in EG3D."),
)
_OF_EG3D = ("gpus", *(name.removeprefix("--").replace("-", "_") for name, _, _ in _IGNORED))
_run_option = functools.partial(option, group=RUN)

gan_flags = combine_decorators(
    _run_option(
        "--resume-previous",
        is_flag=True,
        help="Resume the run of --resume from its previous checkpoint if the newest checkpoint is damaged.",
    ),
    _run_option(
        "--no-summary",
        is_flag=True,
        help=(
            "Skip the evaluation at the end of a run with a reward, which compares the generator before and"
            " after tuning."
        ),
    ),
    option(
        "--strict-cameras",
        is_flag=True,
        group=DATA,
        help=(
            "Reject training images whose cameras look wrong for the generator: cameras that look away from"
            " its pivot, a distance that does not suit its cube, one pose for all images. Without this flag"
            " they cause a warning."
        ),
    ),
    options_from_settings(
        *GROUPS,
        checks={
            "init": check_init,
            "reward": check_kind,
            "reward_ckpt": check_reward_file,
            "heldout_reward": check_reward_file,
            "control": check_control,
        },
    ),
    weak_reward_option(group=REWARD),
    option(
        "--gpus",
        group=EG3D,
        metavar="INT",
        type=click.IntRange(min=1),
        help="Number of GPUs. It must equal the number of processes that torchrun starts (--nproc-per-node).",
    ),
    *(option(name, group=EG3D, type=kind, help=help_text) for name, kind, help_text in _IGNORED),
)


def check_eg3d(flags: Mapping) -> None:
    """Print a warning on stderr if flags of EG3D were given that have no effect here.

    Raises: ValueError if --gpus differs from the number of processes.
    """
    gpu_count = flags.get("gpus")
    # torchrun sets this variable; without torchrun, there is one process
    process_count = int(os.environ.get("WORLD_SIZE", "1"))
    if gpu_count is not None and gpu_count != process_count:
        remedy = f"Start with torchrun --nproc-per-node={gpu_count} train.py."
        raise ValueError(
            f"--gpus={gpu_count} differs from the number of processes, which is {process_count}. {remedy}"
        )
    ignored_flags = [
        name
        for name in _OF_EG3D[1:]
        # --metrics=none requests what happens anyway, so it causes no warning
        if flags.get(name) is not None and (name, flags[name]) != ("metrics", "none")
    ]
    if ignored_flags:
        print(
            f"Warning: {', '.join(map(_flag, ignored_flags))} ignored; see train.py --help.",
            file=sys.stderr,
        )


def resolve_flags(flags: Flags) -> Settings:
    """Build the settings of a new run as `resolve` does, and print warnings for flags that have no effect.

    Raises: ValueError that names a flag that does not fit.
    """
    check_eg3d(flags)
    # This function is called for new runs only, for which --resume-previous never has an effect.
    flags.check_applies(("resume_previous",), False, "--resume is not given")
    settings = resolve(flags)
    # Without a reward, its file and the weights of its loss terms would be ignored, and the run would look
    # like tuning by a reward. --level describes the shapes of every run.
    reward_flags = [name for name in settings_to_values(settings.reward) if name not in ("reward", "level")]
    flags.check_applies(
        ("weak_reward", *reward_flags), settings.reward.reward != "none", "--reward is not given"
    )
    # settings that only new networks use
    ignored_flags = ["--" + name.replace("_", "-") for name in FRESH if flags[name] is not None]
    if ignored_flags and settings.net.init != "scratch":
        print(
            f"Warning: {', '.join(ignored_flags)} ignored: --init={settings.net.init} fixes the networks'"
            " architecture.",
            file=sys.stderr,
        )
    # A control that stops early would be shorter than the run that it is compared with.
    if settings.reward.keeping.early_stop is not None and settings.reward.terms.lambda_r == 0:
        print(
            "Warning: --early-stop ignored: a run with --lambda-r=0 is a control and has to be complete.",
            file=sys.stderr,
        )
    return settings


def check_resume(resume_path: Path) -> None:
    """Check that --resume names a run folder or a checkpoint file that exists.

    Raises: ValueError for a network file; FileNotFoundError for a path that does not exist.
    """
    # A network file has no optimiser states, so it can start a run but not resume one.
    is_network_file = resume_path.suffix.lower() in (".pkl", ".pt", ".pth")
    if is_network_file or resume_path.name.startswith("network-snapshot"):
        remedy = f"Use --init={resume_path} to start from its weights."
        raise ValueError(
            f"--resume: {resume_path} is a network file, which has no optimiser states. Name a run folder or"
            f" a checkpoint. {remedy}"
        )
    check_checkpoint(resume_path)


def recorded(resume_path: Path, flags: Flags, ranks: "Ranks") -> Settings:
    """Read the settings of a run for --resume, and apply the flags that may change at a resume.

    Args:
        resume_path: folder of the run, whose newest checkpoint is read, or a checkpoint file.
        flags: values of the command line; --kimg, --workers and --device may change the recorded values.
        ranks: the processes of torchrun.

    Raises: ValueError for a network file, for the folder of another mode, and for --kimg with rounds.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments import version_0_1
    from eg3d_rlhf.experiments.run_record import OPTIONS, recorded_by
    from eg3d_rlhf.experiments.run_record import recorded as options_of_run
    from training import checkpoint

    check_eg3d(flags)
    check_resume(resume_path)
    changed_settings = {name: flags[name] for name in ("kimg", "workers") if flags.get(name) is not None}
    # --device has a default value, so it changes the recorded device only if the user typed it.
    changed_settings |= {"device": flags["device"]} if "device" in flags.written else {}
    # A run of rounds has no checkpoint itself. Each of its trainings has checkpoints in a subfolder.
    if resume_path.is_dir() and (round_options := options_of_run(resume_path)).get("rounds"):
        if "kimg" in changed_settings:
            raise ValueError(
                f"--kimg={number_text(changed_settings['kimg'])} cannot be combined with --resume for a run"
                " of rounds, whose length is fixed. Remove --kimg, or start a new run."
            )
        return Settings.from_values({**round_options, **changed_settings})
    if (resume_path / OPTIONS).is_file() and not checkpoint.available(resume_path):
        recorded_by(resume_path, "gan")  # raises ValueError if the folder belongs to another mode
    # The first process reads the checkpoint and sends the settings to the other processes.
    recorded_options = ranks.broadcast(
        checkpoint.read(resume_source(resume_path, ranks), may_use_previous(flags, ranks))[1]["options"]
        if ranks.is_main
        else None
    )
    return Settings.from_values({**version_0_1.settings(recorded_options), **changed_settings})


def resume_source(resume_path: Path, ranks: "Ranks") -> Path:
    """Return the checkpoint or the run folder from which a run is resumed.

    After torchrun has restarted the processes, this is the run folder, whose newest checkpoint is used: this
    launch has trained beyond the checkpoint that the user named.

    Args:
        resume_path: value of --resume.
        ranks: the processes of torchrun.
    """
    # imported here, because --help must not load this module
    from training import checkpoint

    # A checkpoint is a file in the folder of its run.
    run_folder = resume_path if resume_path.is_dir() else resume_path.parent
    return run_folder if ranks.restarts and checkpoint.available(run_folder) else resume_path


def may_use_previous(flags: Mapping, ranks: "Ranks") -> bool:
    """Return True if the previous checkpoint may be used when the newest checkpoint is damaged.

    The user allows this with --resume-previous. After a restart by torchrun it is always allowed.
    """
    return bool(flags.get("resume_previous") or ranks.restarts)


def open_gan(settings: Settings, run: "Run") -> "Objects | None":
    """Build or load the networks, the dataset, the rewards and the other objects of a run.

    Args:
        settings: settings of the run.
        run: the run, whose inputs are set to the files that it reads.

    Returns: the objects; None for a run of rounds, whose trainings open their objects one after the other.

    Raises: ValueError for settings that do not suit the files.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    run.inputs = dict(gan.input_files(settings))
    if settings.rounds.rounds:
        rounds.check(settings, run.ranks)
        return None
    if run.resumed is None:
        return gan.build(settings, run)
    # Compares the hashes of the input files with the record before any file is loaded. None: all settings may
    # differ, because the checkpoint's settings are used.
    run.resume(free_settings=None)
    return gan.resume(
        settings, run, resume_source(run.resumed, run.ranks), may_use_previous(run.flags, run.ranks)
    )


def work(settings: Settings, objects: "Objects | None", run: "Run") -> None:
    """Train, and compare the generator before and after the training unless --no-summary was given.

    For a run of rounds, run all rounds that are not finished.

    Args:
        settings: settings of the run.
        objects: objects of the run; None for a run of rounds.
        run: the run.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    if objects is None:
        return rounds.work(
            settings, run, lambda round_settings, folder: tune_in_rounds(round_settings, folder, run.flags)
        )
    if run.ranks.is_main and run.resumed is None:
        device_text = f"{objects.loop.device}" + (
            f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
        )
        print(f"Training for {number_text(settings.loop.kimg)} thousand images on {device_text}.", flush=True)
        gan.print_surfaces(settings, objects)
    # `train` returns False if a signal stopped the run. Only rank 0 of a run
    # with a reward holds the untuned generator, `before`.
    if (
        gan.train(objects, run)
        and objects.before is not None
        and objects.reward is not None
        and not settings.run.no_summary
    ):
        from eg3d_rlhf.evaluation.summary import Evaluation, finish, rehearse
        from eg3d_rlhf.generators import as_generator
        from training import rehearsal

        settings_and_hashes = {**settings.to_dict(), "hashes": run.hashes()}
        evaluation = Evaluation(
            settings_and_hashes,
            as_generator(objects.before),
            objects.reward,
            objects.monitor,
            objects.early_stop,
        )
        if rehearsal.active():
            rehearse(evaluation, objects.loop)
        else:
            finish(evaluation, objects.loop, run.began)
    return None


def check_rehearsal(settings: Settings, flags: Flags) -> None:
    """Raise ValueError for a run of rounds, whose single trainings can be rehearsed."""
    if settings.rounds.rounds:
        raise ValueError(
            "--rehearse cannot be combined with --rounds. Rehearse the tuning of one round: the same command"
            " without --rounds and the other flags of rounds."
        )


def tune_in_rounds(settings: Settings, folder: Path, flags: Mapping) -> None:
    """Begin one training inside a run of rounds, or resume it if its folder has a checkpoint.

    Args:
        settings: settings of this training.
        folder: folder of this training.
        flags: values of the command line of the run of rounds.
    """
    # imported here, because --help must not load this module
    from training import checkpoint

    if checkpoint.available(folder):
        resume_flags = Flags(
            {"resume_previous": flags.get("resume_previous", False), "workers": settings.run.workers}
        )
        GAN.resume(GAN.read(folder, resume_flags), folder, resume_flags)
    else:
        GAN.begin(settings, folder, Flags({"weak_reward": flags.get("weak_reward", False)}))


def resumable(folder: Path) -> bool:
    """Return True if a run folder has a checkpoint from which the run can be resumed."""
    # imported here, because --help must not load this module
    from training import checkpoint

    return bool(checkpoint.available(folder))


GAN: Mode[Settings] = Mode(
    name="gan",
    settings=Settings,
    open=open_gan,
    work=work,
    title=lambda s, objects: s.title,
    flags=gan_flags,
    resolve=resolve_flags,
    record=lambda s, objects: s.to_dict(),
    recorded=recorded,
    check_resume=check_resume,
    shown=Settings.to_dict,
    defaults=shown_by_help,
    changes=None,
    check_rehearsal=check_rehearsal,
    beside_resume=frozenset({"resume_previous", "weak_reward", "kimg", "workers", *_OF_EG3D}),
    resumable=resumable,
    help=f"""Train a 3D-aware GAN, or fine-tune it with a reward on its density field (--reward=sigma). Other
    models are trained with --mode={", ".join(name for name in MODES if name != "gan")}; each mode has its own
    flags: train.py --mode=NAME --help.

    \b
    Example:
        python train.py --reward=sigma --lambda-r=10 --kimg=0.016 --no-summary
    """,
)
MODES.add("gan", GAN)


def tune(**flags: object) -> Path:
    """Train or tune a generator as `python train.py` does.

    Args:
        flags: flags of train.py by name, with underscores in place of dashes. True: a flag without a
            value.

    Returns: the folder of the run, which `load_generator` accepts.

    Raises: ValueError with the message that the command line would print.

    >>> import contextlib, io, tempfile
    >>> from eg3d_rlhf import load_generator
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = tune(reward="sigma", lambda_r=10, kimg=0.004, no_summary=True, outdir=folder)
    ...     tuned = load_generator(run).generator
    >>> tuned.z_dim
    64
    """
    # The command line itself is used, so that both have the same defaults, checks and messages.
    arguments = [_flag(name) if value is True else f"{_flag(name)}={value}" for name, value in flags.items()]
    try:
        # standalone_mode=False: click returns the result and raises exceptions instead of ending the program
        return GAN.command.main(arguments, prog_name="tune", standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
