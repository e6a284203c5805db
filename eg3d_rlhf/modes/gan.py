"""`python train.py`: the GAN, alone or tuned by a reward on its density field. Defaults, flags, settings, and
what they compose.

`HEADS` is the run of `python train.py --reward=sigma --lambda-r=10`, every number of it; other rows say what
differs from the knobs' own defaults (training/config.py, eg3d_rlhf/tuning/gan/settings.py). What a run
consists of is built in eg3d_rlhf/tuning/gan/reward_run.py.
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
from training.config import RUN, GanConfig, LoopConfig, NetworkConfig, knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.gan.reward_run import Objects
    from training.distributed import Ranks

EG3D = "Accepted for EG3D's sake"
# in the order of --help
GROUPS = (RunConfig, DataConfig, NetworkConfig, GanConfig, LoopConfig, RewardSettings, RoundConfig)

# `python train.py --reward=sigma --lambda-r=10`, but for --reward and the bundled rewards that come with it
HEADS = {
    # Length and pace, in thousands of images: 150 iterations.
    "kimg": DEMO_KIMG,
    "batch": 4,
    "batch_gpu": None,
    "tick": 0.12,
    "snap": 0,
    "checkpoint_ticks": 1,
    "workers": None,
    # Data and networks: the bundled generator goes on from its moving average. What fresh networks alone
    # follow is in the file.
    "data": bundled.DATA,
    "cond": True,
    "mirror": False,
    "start": "G_ema",
    "mbstd_group": 4,
    "freezed": 0,
    "cbase": 2048,
    "cmax": 64,
    "map_depth": 2,
    "plane_layout": "fixed",
    "sr_module": None,
    "sr_noise_mode": "none",
    "sr_num_fp16_res": 4,
    "g_num_fp16_res": 0,
    "d_num_fp16_res": 4,
    "c_scale": 1.0,
    "disc_c_noise": 0.0,
    "decoder_lr_mul": 1.0,
    # The GAN's game: nothing fades any more, no augmentation, no camera in the mapping.
    "gamma": 0.3,
    "aug": "noaug",
    "p": 0.2,
    "target": 0.6,
    "ada_kimg": 100.0,
    "style_mixing_prob": 0.0,
    "gen_pose_cond": False,
    "gpc_reg_prob": 0.5,
    "gpc_reg_fade_kimg": 0.0,
    "blur_fade_kimg": 0.0,
    "nrr_initial": 64,
    "nrr_final": None,
    "nrr_fade_kimg": 1000.0,
    "density_reg": 0.25,
    "density_reg_every": 4,
    "density_reg_p_dist": 0.004,
    "reg_type": "l1",
    # Optimisers: Adam on G, on D, and on G once more for the reward.
    "glr": 2e-5,
    "dlr": 1e-4,
    "rlr": 1.2e-3,
    "ema_kimg": 0.1,
    "ema_rampup": None,
    "amp": "off",
    # The reward: its weight, what holds the density to the untuned generator's, and the trust region. Adam
    # sees the weights' ratio alone. Broken shapes are pushed up to the clip and free to move; whole ones
    # score above it, get no push, and are held with full weight.
    "lambda_r": 10.0,
    "lambda_sigma": 5.0,
    "lambda_front": 0.0,
    "lambda_nose": 0.0,
    "nose_floor": "window",
    "reward_clip": "-10,q0.55",
    "reward_shaping": "standardised",
    "consistency_gate": 0.01,
    "consistency_psi": 1.0,
    "consistency_resolution": 32,
    "reference": None,
    "early_stop": None,
    "early_stop_distance": None,
    "control": None,
    # Rounds of labels, rewards and tuning: none.
    "rounds": 0,
    "round_pairs": 400,
    "round_labels": SYNTHETIC,
    "round_doubtful": 0.5,
    "round_members": 5,
    "round_preset": None,
    "round_aggregate": None,
    "round_start": "pretrained",
}
# None: follows another, or the flag is required
_START = {"ema_kimg": None, "rlr": None, "gen_pose_cond": False}
_LOADED = {**_START, "blur_fade_kimg": 0.0, "gpc_reg_fade_kimg": 0.0, "kimg": 2500.0, "batch": 32}
_PAPER = {**_LOADED, "kimg": 20.0, "batch": 16, "tick": 1.0, "snap": 5}
PRESETS: dict[tuple[str, str], dict] = {  # by --cfg and task: what differs from the knobs' own defaults
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
OBSERVED: dict[str, dict] = {  # what suits another observation than sigma, as published
    "depth": {
        "lambda_r": 1.0,
        "lambda_sigma": 0.0,
        "lambda_nose": 1.0,
        "reward_shaping": "standardised",
        "reward_clip": "-10,10",
        "consistency_gate": 1.0,
    },
    # what is sound gets no push
    "solid": {"lambda_sigma": 0.02, "reward_shaping": "none", "reward_clip": "none", "consistency_gate": 1.0},
}


def task_of(init: str, reward: str) -> str:
    return SCRATCH if init == "scratch" else TUNING if reward == "none" else REWARDED


def with_bundled(flags: Mapping) -> dict:
    """Return the flags that are given (not None), and names of bundled files where they go with these."""
    given = {k: v for k, v in flags.items() if v is not None}
    cfg = given.setdefault("cfg", "heads64")
    given.setdefault("init", "bundled" if cfg == "heads64" else "scratch")
    if (cfg, given.get("reward")) == ("heads64", "sigma"):
        reward = str(bundled.REWARD)
        if given.get("rounds") or given.setdefault("reward_ckpt", reward) == reward:
            given.setdefault("heldout_reward", str(bundled.WATCH))
    return given


def with_preset(given: Mapping, network: Mapping) -> dict:
    """Return the flags, what the network file says, and for the rest the preset's row.

    Values that are required and lacking are None; settings that are missing have their fields' defaults.
    """
    cfg = given["cfg"]
    reward = given.get("reward", "none")
    task = task_of(given["init"], reward)
    values = {"task": task, **PRESETS[cfg, task], **OBSERVED.get(reward, {}), **network, **given}
    batch = values["batch"]
    if values["ema_kimg"] is None and batch is not None:
        values["ema_kimg"] = batch * 10 / 32
    if cfg != "heads64" and batch is not None:  # as EG3D scales its flag
        values["blur_fade_kimg"] = values.get("blur_fade_kimg", GanConfig.blur_fade_kimg) * batch / 32
    values["rlr"] = values["rlr"] or values.get("glr", GanConfig.glr)
    if given.get("lambda_sigma") == 0 or given.get("reward_clip") == "none":
        values["consistency_gate"] = given.get(
            "consistency_gate", 1.0
        )  # a preset's gate needs an anchor and a clip
    return values


def shown_by_help(flags: Mapping) -> list[dict]:
    """Return the values that --help shows as defaults, with no file read but that of --init."""
    given = with_bundled(flags)
    lacking = {"data": None} if given["cfg"] != "heads64" else {}
    network = {} if given["init"] in ("scratch", "bundled") else network_facts(given["init"])
    return [{**lacking, **with_preset(given, network)}]


def resolve(flags: Mapping) -> Settings:
    """The settings that flags (None: not given), the preset's row and the file that --init names decide.

    Raises: ValueError, one line per mistake, naming the flag.
    """
    given = with_bundled(flags)
    cfg = given["cfg"]
    reward = given.get("reward", "none")
    if cfg != "heads64" and "data" not in given:
        raise ValueError(
            f"--data: expected a dataset for --cfg={cfg}, got nothing. Name a zip or folder in EG3D's format."
        )
    init = given["init"]
    if reward != "none":
        from eg3d_rlhf.rewards.observations import OBSERVATIONS

        with naming("--reward"):
            OBSERVATIONS[reward]
        if init == "scratch":
            raise ValueError(
                f"--reward={reward}: expected pretrained networks, got --init=scratch. Name a file or use"
                " --init=bundled."
            )
    check_rounds(given, reward)
    if given.get("early_stop") is not None and given.get("heldout_reward") is None:
        lacking = "--reward" if reward == "none" else "--heldout-reward"
        raise ValueError(
            f"--early-stop: expected {lacking}, whose scores choose the snapshot, got none. Add it, or leave"
            " this out."
        )
    if Path(init).is_dir():  # its newest network now, which a resume will look for
        from eg3d_rlhf.generators import find_network

        with naming("--init"):
            init = given["init"] = str(find_network(init))
    found = {} if init == "scratch" else network_facts(None if init == "bundled" else init)
    values = with_preset(given, found)
    for name in ("gamma", "batch"):
        if values[name] is None:
            raise ValueError(
                f"--{name}: expected a value for --cfg={cfg}, got nothing. Published runs used --gamma=1"
                " --batch=32."
            )
    control = given.get("control")
    if control is not None and not Path(control).exists():
        raise ValueError(
            f"--control: expected a run folder or its summary.json, got nothing at {control}. Check the path."
        )
    return Settings.of(values)


def check_rounds(given: Mapping, reward: str) -> None:
    """Raise ValueError for flags that do not go together with --rounds, or without it."""
    flags = {"round_pairs": "--round-pairs", "round_labels": "--round-labels"}
    own = [flags.get(name, f"--set {name}") for name in given if name.startswith("round_")]
    without = not given.get("rounds")
    if without and own:
        raise ValueError(f"{own[0]}: expected --rounds with it, got none. Add it, or leave {own[0]} out.")
    if without:
        return
    if reward == "none":
        raise ValueError(
            "--rounds: expected --reward, the kind of reward that is trained in each round, got none. Add"
            " --reward=sigma."
        )
    if "reward_ckpt" in given:
        raise ValueError(
            f"--reward-ckpt={given['reward_ckpt']}: expected none with --rounds, which train their own. Leave"
            " it out."
        )
    if given.get("round_labels", SYNTHETIC) == SYNTHETIC and not given.get(
        "data", DataConfig.data
    ).startswith("synthetic:"):
        raise ValueError(
            f"--round-labels: expected people for --data={given['data']}, got {SYNTHETIC}: the annotator of"
            " heads judges synthetic ones alone. Add --round-labels=people."
        )


def network_facts(source: str | None) -> dict:
    """Settings that a network file brings: rendered resolution, conditioning on the camera, minibatch-std
    group. None: the bundled one.

    Raises: ValueError naming --init.
    """
    from eg3d_rlhf.generators import classes_of, find_network, pickles
    from eg3d_rlhf.generators.pickles.rebuild import neural_rendering_resolution
    from training import storage
    from training.networks import EG3D

    with naming("--init"):
        path = find_network(source)
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
    group = (D or {}).get("epilogue_kwargs", {}).get("mbstd_group_size", NetworkConfig.mbstd_group)
    conditioned = not G.get("rendering_kwargs", {}).get("c_gen_conditioning_zero", False)
    return {
        "gen_pose_cond": conditioned,
        "mbstd_group": group,
        **({} if rendered is None else {"nrr_initial": rendered}),
    }


FRESH = (  # what only fresh networks can follow
    "cbase",
    "cmax",
    "plane_layout",
    "map_depth",
    "sr_module",
    "sr_num_fp16_res",
    "g_num_fp16_res",
    "d_num_fp16_res",
    "c_scale",
    "disc_c_noise",
    "sr_noise_mode",
    "decoder_lr_mul",
)

# The mode.

_OWN = {knob.name or field.name: field.default for kind in GROUPS for field, _, knob in knobs_of(kind)}
_IGNORED = (  # EG3D's flags that have no effect here: name, type, why
    ("--metrics", str, "Not computed while training: see tools/calc_metrics.py."),
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
        help="With --resume: use the previous checkpoint where the newest is damaged.",
    ),
    _run_option(
        "--no-summary", is_flag=True, help="Skip the before/after evaluation that ends a reward run."
    ),
    options_of(*GROUPS),
    option(
        "--gpus",
        group=EG3D,
        metavar="INT",
        type=click.IntRange(min=1),
        help="Must agree with torchrun --nproc-per-node.",
    ),
    *(option(name, group=EG3D, type=kind, help=why) for name, kind, why in _IGNORED),
)


def check_eg3d(flags: Mapping) -> None:
    """Name EG3D's flags that have no effect here on stderr. Raises: ValueError for --gpus that is not so."""
    gpus = flags.get("gpus")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if gpus is not None and gpus != world:
        remedy = f"Start with torchrun --nproc-per-node={gpus} train.py."
        raise ValueError(f"--gpus: expected {world}, the number of processes, got {gpus}. {remedy}")
    given = [
        name
        for name in _OF_EG3D[1:]
        if flags.get(name) is not None and (name, flags[name]) != ("metrics", "none")
    ]
    if given:
        print(
            f"Warning: {', '.join('--' + name.replace('_', '-') for name in given)} ignored; see train.py"
            " --help.",
            file=sys.stderr,
        )


def resolve_flags(flags: Flags) -> Settings:
    """`resolve`, and warnings for what has no effect."""
    check_eg3d(flags)
    flags.belong(("resume_previous",), False, "--resume")
    settings = resolve(flags)
    ignored = ["--" + name.replace("_", "-") for name in FRESH if flags[name] is not None]
    if ignored and settings.net.init != "scratch":
        print(
            f"Warning: {', '.join(ignored)} ignored: the networks of --init={settings.net.init} are as they"
            " are.",
            file=sys.stderr,
        )
    if settings.reward.keeping.early_stop is not None and settings.reward.terms.lambda_r == 0:
        print(
            "Warning: --early-stop ignored: with --lambda-r=0 the whole run is the control.", file=sys.stderr
        )
    return settings


def recorded(source: Path, flags: Flags, ranks: "Ranks") -> Settings:
    """The settings of a run folder's newest state, or of the state that is named, but for what may change at
    a resume.
    """
    from eg3d_rlhf.experiments import version_0_1
    from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
    from eg3d_rlhf.experiments.run import recorded as options_of_run
    from training import checkpoint

    check_eg3d(flags)
    if source.suffix.lower() == ".pkl" or source.name.startswith("network-snapshot"):
        remedy = f"Use --init={source} to start from its weights."
        raise ValueError(f"--resume: expected a run folder or checkpoint, got the network {source}. {remedy}")
    changes = {name: flags[name] for name in ("kimg", "workers") if flags.get(name) is not None}
    changes |= {"device": flags["device"]} if "device" in flags.written else {}
    if source.is_dir() and (options := options_of_run(source)).get("rounds"):
        if "kimg" in changes:
            raise ValueError(
                f"--kimg: expected none with --resume of rounds, got {changes['kimg']:g}. Start a new run."
            )
        return Settings.of({**options, **changes})
    if (source / OPTIONS).is_file() and not checkpoint.available(source):
        recorded_by(source, "gan")  # another mode's run has checkpoints of its own
    state = ranks.broadcast(
        checkpoint.read(newest(source, ranks), previous(flags, ranks))[1]["options"] if ranks.main else None
    )
    return Settings.of({**version_0_1.settings(state), **changes})


def newest(source: Path, ranks: "Ranks") -> Path:
    """What --resume goes on from: after a restart by torchrun the run's folder, as this launch has come
    further than the named state.
    """
    from training import checkpoint

    folder = source if source.is_dir() else source.parent
    return folder if ranks.restarts and checkpoint.available(folder) else source


def previous(flags: Mapping, ranks: "Ranks") -> bool:
    """Whether the state before the newest will do where that is damaged: where the user says so, and after a
    restart by torchrun.
    """
    return bool(flags.get("resume_previous") or ranks.restarts)


def open_gan(s: Settings, run: "Run") -> "Objects | None":
    """What the run consists of; of rounds, None. Raises: ValueError for what does not fit."""
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    run.inputs = dict(gan.input_files(s))
    if s.rounds.rounds:
        rounds.check(s, run.ranks)
        return None
    if run.resumed is None:
        return gan.build(s, run)
    run.resume(free=None)  # before what has changed is loaded
    return gan.go_on(s, run, newest(run.resumed, run.ranks), previous(run.flags, run.ranks))


def work(s: Settings, objects: "Objects | None", run: "Run") -> None:
    from eg3d_rlhf.tuning.gan import reward_run as gan
    from eg3d_rlhf.tuning.gan import rounds

    if objects is None:
        return rounds.work(s, run, lambda own, folder: tune_in_rounds(own, folder, run.flags))
    if run.ranks.main and run.resumed is None:
        where = f"{objects.loop.device}" + (f", {run.ranks.world} processes" if run.ranks.world > 1 else "")
        print(f"Training for {s.loop.kimg:g} thousand images on {where}.", flush=True)
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
    """A tuning inside a run of rounds: begin it, or go on where it was."""
    from training import checkpoint

    if checkpoint.available(folder):
        again = Flags({"resume_previous": flags.get("resume_previous", False), "workers": s.run.workers})
        GAN.go_on(GAN.read(folder, again), folder, again)
    else:
        GAN.begin(s, folder)


def resumable(folder: Path) -> bool:
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
    things are trained with --mode={", ".join(name for name in MODES if name != "gan")}; each has flags of its
    own: train.py --mode=NAME --help.

    \b
    Example:
        python train.py --reward=sigma --lambda-r=10 --kimg=0.016 --no-summary
    """,
)
MODES.add("gan", GAN)


def tune(**flags: object) -> Path:
    """Train or tune a generator as `python train.py` does; returns the run's folder, which `load_generator`
    takes.

    Args: flags: train.py's, with underscores; True stands for a flag without a value.
    Raises: ValueError, with the message of the command line.

    >>> import contextlib, io, tempfile
    >>> from eg3d_rlhf import load_generator
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = tune(reward="sigma", lambda_r=10, kimg=0.004, no_summary=True, outdir=folder)
    ...     tuned = load_generator(run).generator
    >>> tuned.z_dim
    64
    """
    words = [
        name if value is True else f"{name}={value}"
        for name, value in ((_flag(name), value) for name, value in flags.items())
    ]
    try:
        return GAN.command.main(words, prog_name="tune", standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
