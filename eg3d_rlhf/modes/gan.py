"""`python train.py`: trains the GAN, alone or fine-tuned with a reward on its density field.

`HEADS` lists every setting of the run `python train.py --reward=sigma --lambda-r=10`. Other rows of PRESETS
list what differs from the defaults of the settings (training/config.py, eg3d_rlhf/tuning/gan/settings.py).
The objects of a run are built in eg3d_rlhf/tuning/gan/reward_run.py.
"""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming, option, options_of, together
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.experiments.mode import flag as _flag
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.tuning.gan.settings import (
    DEMO_KIMG,
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
from training.config import RUN, GanConfig, LoopConfig, NetworkConfig

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.gan.reward_run import Objects
    from training.distributed import Ranks

EG3D = "Accepted for compatibility with EG3D"
# dataclasses of the settings, in the order of --help
GROUPS = (RunConfig, DataConfig, NetworkConfig, GanConfig, LoopConfig, RewardSettings, RoundConfig)

# Settings of `python train.py --reward=sigma --lambda-r=10`, except --reward and its bundled reward files.
HEADS = {
    # Length and intervals, in thousands of images. The run has 150 iterations.
    "kimg": DEMO_KIMG,  # length of the run
    "batch": 4,  # images per iteration
    "batch_gpu": None,  # images per forward pass; None: the whole batch
    "tick": 0.12,  # status line every 120 images
    "snap": 0,  # snapshot at the end only
    "checkpoint_ticks": 1,  # resumable state at every tick
    "workers": None,  # processes that read images ahead
    # Data and networks: training continues from the bundled generator's moving average. Settings that only
    # new networks use are taken from the file.
    "data": bundled.DATA,  # synthetic heads
    "cond": True,  # camera labels are used
    "mirror": False,  # no mirrored images
    "start": "G_ema",  # G starts from its moving average
    "mbstd_group": 4,  # images per minibatch-std group of D
    "freezed": 0,  # frozen layers of D
    "cbase": 2048,  # channel multiplier
    "cmax": 64,  # largest number of feature maps
    "map_depth": 2,  # layers of the mapping network
    "plane_layout": "fixed",
    "sr_module": None,  # chosen by the resolution
    "sr_noise_mode": "none",  # no noise in super-resolution
    "sr_num_fp16_res": 4,
    "g_num_fp16_res": 0,
    "d_num_fp16_res": 4,
    "c_scale": 1.0,  # scale of the camera label
    "disc_c_noise": 0.0,  # noise on D's camera label, in its standard deviations
    "decoder_lr_mul": 1.0,  # learning-rate multiplier
    # Adversarial training: no fades, no augmentation, no camera conditioning in the mapping network.
    "gamma": 0.3,  # weight of R1
    "aug": "noaug",  # no augmentation of D's inputs
    "p": 0.2,  # for --aug=fixed only
    "target": 0.6,  # of sign(D(real)), for --aug=ada only
    "ada_kimg": 100.0,
    "style_mixing_prob": 0.0,  # no style mixing
    "gen_pose_cond": False,  # no camera in the mapping network
    "gpc_reg_prob": 0.5,  # probability of a swapped camera; no effect without conditioning
    "gpc_reg_fade_kimg": 0.0,  # no fade
    "blur_fade_kimg": 0.0,  # no blur of D's inputs
    "nrr_initial": 64,  # neural rendering resolution, pixels
    "nrr_final": None,  # no change of the resolution
    "nrr_fade_kimg": 1000.0,  # no effect without nrr_final
    "density_reg": 0.25,  # weight
    "density_reg_every": 4,  # iterations
    "density_reg_p_dist": 0.004,  # perturbation of the points, world units
    "reg_type": "l1",  # type of the density regulariser
    # Optimisers: one Adam for G, one for D, and a separate one for the reward's gradient on G.
    "glr": 2e-5,  # of G's Adam
    "dlr": 1e-4,  # of D's Adam
    "rlr": 1.2e-3,  # of the reward's Adam on G
    "ema_kimg": 0.1,  # half-life of G_ema, thousands of images
    "ema_rampup": None,  # no ramp
    "amp": "off",  # single precision
    # The reward: its weight, density consistency with the untuned generator, and the trust region. Adam
    # normalises the scale, so only the ratio of the two weights matters. The reward is clipped: defective
    # shapes
    # score below the clip, are pushed up to it and may change; intact ones score above it, get no push, and
    # are held by the consistency term with full weight.
    "lambda_r": 10.0,  # weight of the reward
    "lambda_sigma": 5.0,  # weight of the density-consistency term
    "lambda_front": 0.0,  # front-growth penalty off
    "lambda_nose": 0.0,  # nose penalty off
    "nose_floor": "window",  # no effect while lambda_nose is 0
    "reward_clip": "-10,q0.55",  # upper bound: the 55 % quantile of untuned scores
    "reward_shaping": "standardised",
    "consistency_gate": 0.01,  # share of lambda_sigma for shapes below the clip
    "consistency_psi": 1.0,  # truncation of its samples
    "consistency_resolution": 32,  # grid points per axis of the consistency term
    "reference": None,  # the generator that tuning starts from
    "early_stop": None,  # off
    "early_stop_distance": None,
    "control": None,  # no control to quote
    # Rounds of labelling, reward training and tuning: none.
    "rounds": 0,  # tune once
    "round_pairs": 400,  # pairs to label per round
    "round_labels": SYNTHETIC,  # labels of the simulated annotator
    "round_doubtful": 0.5,  # share of pairs on which the last rewards disagree
    "round_members": 5,  # rewards per ensemble
    "round_preset": None,
    "round_aggregate": None,
    "round_start": "pretrained",
}
# None: computed from another setting in `with_preset`, or the flag is required.
_START = {"ema_kimg": None, "rlr": None, "gen_pose_cond": False}
_LOADED = {**_START, "blur_fade_kimg": 0.0, "gpc_reg_fade_kimg": 0.0, "kimg": 2500.0, "batch": 32}
_PAPER = {**_LOADED, "kimg": 20.0, "batch": 16, "tick": 1.0, "snap": 5}
PRESETS: dict[
    tuple[str, str], dict
] = {  # by (--cfg, task): settings that differ from the dataclasses' defaults
    ("ffhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("afhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("shapenet", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("heads64", SCRATCH): {
        **_START,
        "cbase": 2048,
        "cmax": 64,
        "plane_layout": "fixed",
        "consistency_resolution": 32,
        "nrr_initial": 64,
        "gamma": 0.2,
        "gpc_reg_fade_kimg": 5.0,
        "blur_fade_kimg": 0.0,
        "kimg": 50.0,
        "batch": 4,
        "tick": 1.0,
        "snap": 4,
        "ema_kimg": 1.0,
    },
    ("ffhq", TUNING): {**_LOADED, "gamma": 1.0},
    ("afhq", TUNING): {**_LOADED, "gamma": 5.0, "aug": "ada"},
    ("shapenet", TUNING): {**_LOADED, "gamma": 0.3},
    ("heads64", TUNING): HEADS,
    ("ffhq", REWARDED): {**_PAPER, "gamma": 20.0},
    ("afhq", REWARDED): {**_PAPER, "gamma": 5.0, "aug": "ada"},
    ("shapenet", REWARDED): {**_PAPER, "gamma": 0.3},
    ("heads64", REWARDED): HEADS,
}
OBSERVED: dict[str, dict] = {  # by observation: the published settings of rewards that do not read sigma
    "depth": {
        "lambda_r": 1.0,
        "lambda_sigma": 0.0,
        "lambda_nose": 1.0,
        "reward_shaping": "standardised",
        "reward_clip": "-10,10",
        "consistency_gate": 1.0,
    },
    # a valid solid has the highest score already, so there is no clip
    "solid": {"lambda_sigma": 0.02, "reward_shaping": "none", "reward_clip": "none", "consistency_gate": 1.0},
}


def task_of(init: str, reward: str) -> str:
    """Classify a run: from scratch, fine-tuning, or tuning with a reward."""
    return SCRATCH if init == "scratch" else TUNING if reward == "none" else REWARDED


def with_bundled(flags: Mapping) -> dict:
    """Return the given flags (not None), and the bundled files that are defaults beside them."""
    # None means that the flag was not given; 0 and False are values
    given = {k: v for k, v in flags.items() if v is not None}
    cfg = given.setdefault("cfg", "heads64")
    given.setdefault("init", "bundled" if cfg == "heads64" else "scratch")
    # the held-out reward belongs to the bundled one; with a reward of the user's own, none is assumed
    if (cfg, given.get("reward")) == ("heads64", "sigma"):
        reward = str(bundled.REWARD)
        if given.get("rounds") or given.setdefault("reward_ckpt", reward) == reward:
            given.setdefault("heldout_reward", str(bundled.WATCH))
    return given


def with_preset(given: Mapping, network: Mapping) -> dict:
    """Merge, in rising priority, the preset's row, the settings of the network file, and the given flags.

    A required flag that is missing is None; settings that are absent get their dataclass's default.
    """
    cfg = given["cfg"]
    reward = given.get("reward", "none")
    # the row of PRESETS depends on the configuration and on the task
    task = task_of(given["init"], reward)
    # later dictionaries override earlier ones
    values = {"task": task, **PRESETS[cfg, task], **OBSERVED.get(reward, {}), **network, **given}
    batch = values["batch"]
    if values["ema_kimg"] is None and batch is not None:
        # EG3D: ema_kimg = batch_size * 10 / 32
        values["ema_kimg"] = batch * 10 / 32
    if cfg != "heads64" and batch is not None:  # EG3D scales this flag with the batch size
        values["blur_fade_kimg"] = values.get("blur_fade_kimg", GanConfig.blur_fade_kimg) * batch / 32
    # without --rlr the reward's optimiser uses the learning rate of G
    values["rlr"] = values["rlr"] or values.get("glr", GanConfig.glr)
    if given.get("lambda_sigma") == 0 or given.get("reward_clip") == "none":
        values["consistency_gate"] = given.get(
            "consistency_gate", 1.0
        )  # the preset's gate needs the consistency term and a clip
    return values


def shown_by_help(flags: Mapping) -> list[dict]:
    """Return the values that --help shows as defaults; reads no file except that of --init."""
    given = with_bundled(flags)
    # other configurations have no default dataset, which --help shows as required
    lacking = {"data": None} if given["cfg"] != "heads64" else {}
    network = {} if given["init"] in ("scratch", "bundled") else network_facts(given["init"])
    return [{**lacking, **with_preset(given, network)}]


def resolve(flags: Mapping) -> Settings:
    """Build the settings from flags (None: not given), the preset's row and the file of --init.

    Raises: ValueError, one line per mistake, naming the flag.
    """
    given = with_bundled(flags)
    cfg = given["cfg"]
    reward = given.get("reward", "none")
    if cfg != "heads64" and "data" not in given:
        raise ValueError(f"--data: required with --cfg={cfg}. Name a zip file or folder in EG3D's format.")
    init = given["init"]
    # a reward needs a generator that produces shapes already
    if reward != "none":
        from eg3d_rlhf.rewards.observations import OBSERVATIONS

        with naming("--reward"):
            # a look-up for its error: unknown observations raise
            OBSERVATIONS[reward]
        # an untrained generator has no shapes to score
        if init == "scratch":
            raise ValueError(
                f"--reward={reward} needs pretrained networks, got --init=scratch. Name a file with"
                " --init or use"
                " --init=bundled."
            )
    check_rounds(given, reward)
    if given.get("early_stop") is not None and given.get("heldout_reward") is None:
        lacking = "--reward" if reward == "none" else "--heldout-reward"
        raise ValueError(
            f"--early-stop needs {lacking}, whose scores choose the snapshot. Add {lacking}, or remove"
            " --early-stop."
        )
    if Path(
        init
    ).is_dir():  # the newest network at this moment is recorded, so that a resume uses the same one
        from eg3d_rlhf.generators import find_network

        with naming("--init"):
            init = given["init"] = str(find_network(init))
    file_settings = {} if init == "scratch" else network_facts(None if init == "bundled" else init)
    values = with_preset(given, file_settings)
    # EG3D has no default for these two, because they depend on the dataset
    for name in ("gamma", "batch"):
        if values[name] is None:
            raise ValueError(
                f"--{name}: required with --cfg={cfg}. Published runs used --gamma=1 --batch=32."
            )
    control = given.get("control")
    if control is not None and not Path(control).exists():
        raise ValueError(
            f"--control: expected a run folder or its summary.json, but {control} does not exist. Check"
            " the path."
        )
    return Settings.of(values)


def check_rounds(given: Mapping, reward: str) -> None:
    """Raise ValueError for flags that cannot be combined with --rounds, or that need it."""
    flags = {"round_pairs": "--round-pairs", "round_labels": "--round-labels"}
    round_flags = [flags.get(name, f"--set {name}") for name in given if name.startswith("round_")]
    # 0 rounds is the same as no --rounds
    without = not given.get("rounds")
    if without and round_flags:
        raise ValueError(f"{round_flags[0]} needs --rounds. Add --rounds, or remove {round_flags[0]}.")
    if without:
        return
    if reward == "none":
        raise ValueError(
            "--rounds needs --reward, the kind of reward that is trained in each round. Add --reward=sigma."
        )
    if "reward_ckpt" in given:
        raise ValueError(
            f"--reward-ckpt={given['reward_ckpt']} cannot be combined with --rounds, which train rewards."
            " Remove"
            " --reward-ckpt."
        )
    # the simulated annotator needs the ground truth, which only synthetic heads have
    if given.get("round_labels", SYNTHETIC) == SYNTHETIC and not given.get(
        "data", DataConfig.data
    ).startswith("synthetic:"):
        raise ValueError(
            f"--round-labels={SYNTHETIC} does not suit --data={given['data']}: the simulated annotator labels"
            " synthetic heads only. Add --round-labels=people."
        )


def network_facts(source: str | None) -> dict:
    """Read the settings that a network file fixes: rendering resolution, camera conditioning and the size of
    a minibatch-std group. None: the bundled file.

    Raises: ValueError naming --init.
    """
    from eg3d_rlhf.generators import classes_of, find_network, pickles
    from eg3d_rlhf.generators.pickles.rebuild import neural_rendering_resolution
    from training import storage
    from training.networks import EG3D

    with naming("--init"):
        path = find_network(source)
        # a pickle is parsed without running its code
        if path.suffix.lower() == ".pkl":
            snapshot = pickles.read(path)
            plans = pickles.plan(snapshot)
            G = plans["G_ema"].kwargs
            D = plans["D"].kwargs if "D" in plans else None
            rendered: int | None = neural_rendering_resolution(snapshot.networks["G_ema"])
        else:
            meta = storage.read_meta(path, "network")
            classes_of(meta.get("architecture", EG3D))
            G = meta["G_kwargs"]
            D = meta["D_kwargs"]
            rendered = meta.get("neural_rendering_resolution")
    # a file may hold G alone; then D is new and gets the default group size
    group = (D or {}).get("epilogue_kwargs", {}).get("mbstd_group_size", NetworkConfig.mbstd_group)
    # EG3D zeroes the camera in the mapping network where conditioning is off
    conditioned = not G.get("rendering_kwargs", {}).get("c_gen_conditioning_zero", False)
    return {
        "gen_pose_cond": conditioned,
        "mbstd_group": group,
        # a file need not record the rendering resolution
        **({} if rendered is None else {"nrr_initial": rendered}),
    }


FRESH = (  # settings that only new networks use; with --init=FILE they are ignored
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

_IGNORED = (  # flags of EG3D without an effect here: (name, type, help)
    ("--metrics", str, "Ignored: metrics are not computed during training. Use tools/calc_metrics.py."),
    ("--nobench", bool, "Ignored: convolution benchmarking is off."),
    ("--c-noise", float, "Ignored, as in EG3D; see --disc-c-noise."),
    ("--resume-blur", bool, "Ignored: --resume continues every fade; with --init there is none by default."),
    ("--sr-first-cutoff", int, "Ignored, as in EG3D."),
    ("--sr-first-stopband", float, "Ignored, as in EG3D."),
)
_OF_EG3D = ("gpus", *(name.removeprefix("--").replace("-", "_") for name, _, _ in _IGNORED))
_run_option = functools.partial(option, group=RUN)

gan_flags = together(
    _run_option(
        "--resume-previous",
        is_flag=True,
        help="With --resume: use the previous checkpoint if the newest is damaged.",
    ),
    _run_option(
        "--no-summary", is_flag=True, help="Skip the before/after evaluation at the end of a reward run."
    ),
    options_of(*GROUPS),
    option(
        "--gpus",
        group=EG3D,
        metavar="INT",
        type=click.IntRange(min=1),
        help="Number of GPUs; must equal torchrun --nproc-per-node.",
    ),
    *(option(name, group=EG3D, type=kind, help=why) for name, kind, why in _IGNORED),
)


def check_eg3d(flags: Mapping) -> None:
    """Warn on stderr of EG3D's flags that have no effect. Raises: ValueError for a wrong --gpus."""
    gpus = flags.get("gpus")
    # torchrun sets WORLD_SIZE
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if gpus is not None and gpus != world:
        remedy = f"Start with torchrun --nproc-per-node={gpus} train.py."
        raise ValueError(f"--gpus={gpus} differs from the number of processes, {world}. {remedy}")
    given = [
        name
        for name in _OF_EG3D[1:]
        # --metrics=none asks for what happens anyway
        if flags.get(name) is not None and (name, flags[name]) != ("metrics", "none")
    ]
    if given:
        print(
            f"Warning: {', '.join('--' + name.replace('_', '-') for name in given)} ignored; see train.py"
            " --help.",
            file=sys.stderr,
        )


def resolve_flags(flags: Flags) -> Settings:
    """Build the settings as `resolve` does, with warnings for flags that have no effect."""
    check_eg3d(flags)
    # this function resolves new runs only, so --resume-previous never applies here
    flags.belong(("resume_previous",), False, "--resume")
    settings = resolve(flags)
    # settings that new networks alone use
    ignored = ["--" + name.replace("_", "-") for name in FRESH if flags[name] is not None]
    if ignored and settings.net.init != "scratch":
        print(
            f"Warning: {', '.join(ignored)} ignored: --init={settings.net.init} fixes the networks'"
            " architecture.",
            file=sys.stderr,
        )
    # stopping a control early would make it shorter than the run that it is compared with
    if settings.reward.keeping.early_stop is not None and settings.reward.terms.lambda_r == 0:
        print(
            "Warning: --early-stop ignored: a run with --lambda-r=0 is a control and has to be complete.",
            file=sys.stderr,
        )
    return settings


def recorded(source: Path, flags: Flags, ranks: "Ranks") -> Settings:
    """Read the settings of a run's newest checkpoint, or of the named one, with the flags that may change at
    a resume.
    """
    from eg3d_rlhf.experiments import version_0_1
    from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
    from eg3d_rlhf.experiments.run import recorded as options_of_run
    from training import checkpoint

    check_eg3d(flags)
    # a network file has no optimiser states, so it can start a run but not continue one
    if source.suffix.lower() == ".pkl" or source.name.startswith("network-snapshot"):
        remedy = f"Use --init={source} to start from its weights."
        raise ValueError(
            f"--resume: expected a run folder or a checkpoint, got the network file {source}. {remedy}"
        )
    changes = {name: flags[name] for name in ("kimg", "workers") if flags.get(name) is not None}
    # the device has a default, so only one that was written changes the recorded one
    changes |= {"device": flags["device"]} if "device" in flags.written else {}
    # a run of rounds has no checkpoint: each of its tunings has one in a folder below
    if source.is_dir() and (options := options_of_run(source)).get("rounds"):
        if "kimg" in changes:
            raise ValueError(
                f"--kimg: cannot be combined with --resume of rounds, got {changes['kimg']:g}. Start a"
                " new run."
            )
        return Settings.of({**options, **changes})
    if (source / OPTIONS).is_file() and not checkpoint.available(source):
        recorded_by(source, "gan")  # raises if the folder belongs to another mode
    # one process reads; the others receive the options
    state = ranks.broadcast(
        checkpoint.read(newest(source, ranks), previous(flags, ranks))[1]["options"] if ranks.main else None
    )
    return Settings.of({**version_0_1.settings(state), **changes})


def newest(source: Path, ranks: "Ranks") -> Path:
    """Return the checkpoint or folder to resume from.

    After a restart by torchrun it is the run's folder, because this launch has trained beyond the named
    state.
    """
    from training import checkpoint

    # a checkpoint is a file in the run's folder
    folder = source if source.is_dir() else source.parent
    return folder if ranks.restarts and checkpoint.available(folder) else source


def previous(flags: Mapping, ranks: "Ranks") -> bool:
    """Return True if the previous checkpoint may replace a damaged newest one.

    The user allows it with --resume-previous; after a restart by torchrun it is always allowed.
    """
    return bool(flags.get("resume_previous") or ranks.restarts)


def open_gan(s: Settings, run: "Run") -> "Objects | None":
    """Build the objects of the run; None for rounds. Raises: ValueError for settings that do not fit."""
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    run.inputs = dict(gan.input_files(s))
    # rounds open networks and rewards one after the other, round by round
    if s.rounds.rounds:
        rounds.check(s, run.ranks)
        return None
    if run.resumed is None:
        return gan.build(s, run)
    run.resume(free=None)  # checks the inputs' hashes before any of them is loaded
    return gan.go_on(s, run, newest(run.resumed, run.ranks), previous(run.flags, run.ranks))


def work(s: Settings, objects: "Objects | None", run: "Run") -> None:
    """Train, then evaluate before and after unless --no-summary; or run the rounds."""
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    # no objects: a run of rounds, each of which opens its own
    if objects is None:
        return rounds.work(s, run, lambda settings, folder: tune_in_rounds(settings, folder, run.flags))
    if run.ranks.main and run.resumed is None:
        where = f"{objects.loop.device}" + (f", {run.ranks.world} processes" if run.ranks.world > 1 else "")
        print(f"Training for {s.loop.kimg:g} thousand images on {where}.", flush=True)
    # `train` returns False where a signal stopped the run; it is then not evaluated
    if (
        gan.train(objects, run)
        and objects.before is not None
        and objects.reward is not None
        and not s.run.no_summary
    ):
        from eg3d_rlhf.evaluation.summary import Evaluation, finish
        from eg3d_rlhf.generators import of

        known = {**s.to_dict(), "hashes": run.hashes()}
        finish(
            Evaluation(known, of(objects.before), objects.reward, objects.monitor, objects.early_stop),
            objects.loop,
            run.began,
        )
    return None


def tune_in_rounds(s: Settings, folder: Path, flags: Mapping) -> None:
    """Begin or resume one tuning inside a run of rounds."""
    from training import checkpoint

    # the round was interrupted: its newest checkpoint continues
    if checkpoint.available(folder):
        again = Flags({"resume_previous": flags.get("resume_previous", False), "workers": s.run.workers})
        GAN.go_on(GAN.read(folder, again), folder, again)
    else:
        GAN.begin(s, folder)


def resumable(folder: Path) -> bool:
    """Return True if a folder has a checkpoint."""
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
    shown=Settings.to_dict,
    defaults=shown_by_help,
    changes=None,
    beside_resume=frozenset({"resume_previous", "kimg", "workers", *_OF_EG3D}),
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
    """Train or tune a generator as `python train.py` does. Returns the run's folder, which `load_generator`
    accepts.

    Args: flags: flags of train.py, with underscores; True for a flag without a value.
    Raises: ValueError, with the message of the command line.

    >>> import contextlib, io, tempfile
    >>> from eg3d_rlhf import load_generator
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = tune(reward="sigma", lambda_r=10, kimg=0.004, no_summary=True, outdir=folder)
    ...     tuned = load_generator(run).generator
    >>> tuned.z_dim
    64
    """
    # through the command line itself, so that both have the same defaults, checks and messages
    words = [
        name if value is True else f"{name}={value}"
        for name, value in ((_flag(name), value) for name, value in flags.items())
    ]
    try:
        return GAN.command.main(words, prog_name="tune", standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
