"""Settings of the GAN mode: one tree from flags to JSON, presets as a table, and what decides whether two runs compare."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.generators import classes_of, find_network, pickles
from eg3d_rlhf.generators.pickles.rebuild import neural_rendering_resolution
from eg3d_rlhf.rewards import observations
from eg3d_rlhf.tuning.gan.early_stop import EarlyStopConfig
from eg3d_rlhf.tuning.gan.phase import REWARD, RewardConfig
from eg3d_rlhf.tuning.gan.rounds import SYNTHETIC, RoundConfig
from training import storage
from training.config import DATA, RUN, GanConfig, LoopConfig, NetworkConfig, built, check_knobs, knob, values_of
from training.networks import EG3D


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What does not change what is trained."""

    desc: str | None = knob(None, "Added to the run folder's name.", RUN, metavar="TEXT")
    device: str = knob("auto", "Where to run.", RUN, choices=("auto", "cpu", "cuda"))
    workers: int | None = knob(
        None, "Processes of one thread that read images ahead; 0: the training process. No result depends on it.", DATA, low=0, high=64,
        shown="one for each further core, at most 3; 0 for sets under 512 MB, which are kept in memory",
    )
    no_summary: bool = knob(False, "Skip the before/after evaluation that ends a reward run.", RUN, flag=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The real images."""

    data: str = knob("synthetic:heads64", "Images in EG3D's format.", DATA, metavar="ZIP|DIR|synthetic:heads64")
    cond: bool = knob(True, "Use the camera labels (required by this generator).", DATA)
    mirror: bool = knob(False, "Add mirrored images, with mirrored poses.", DATA)

    def __post_init__(self):
        if not self.cond:
            raise ValueError("--cond: expected True, got False. Cameras come from the labels; a run without them is not possible.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Which reward tunes, what watches it, and how."""

    reward: str = knob("none", "What scores the generator: a reward that reads sigma, or another observation.", REWARD, metavar="none|KIND")
    reward_ckpt: str | None = knob(None, "Trained reward.", REWARD, metavar="FILE", shown="bundled")
    reward_watch: str | None = knob(
        None, "Second reward, never trained on, that must not fall while the first rises.", REWARD, metavar="FILE", shown="bundled"
    )
    reference: str | None = knob(
        None, "Network that the tuned one is held to and compared with.", REWARD, flag=False, shown="the initial one"
    )
    terms: RewardConfig = RewardConfig()
    keeping: EarlyStopConfig = EarlyStopConfig()
    rlr: float = knob(0.0025, "Reward optimiser's learning rate.", REWARD, above=0, shown="glr; heads64: 0.0005")
    control: str | None = knob(
        None, "Summary of the lambda_r = 0 run to quote.", REWARD, metavar="RUN|FILE", shown="recorded in assets, where it is one"
    )

    def __post_init__(self):
        check_knobs(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run of the GAN mode; JSON and flags are flat, since no name comes twice."""

    task: str  # of PRESETS: what decided the defaults
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    net: NetworkConfig = NetworkConfig()
    gan: GanConfig = GanConfig()
    loop: LoopConfig = LoopConfig()
    reward: RewardSettings = RewardSettings()
    rounds: RoundConfig = RoundConfig()

    def to_dict(self) -> dict:
        """Every knob by name, as JSON."""
        return {"task": self.task, **values_of(self)}

    @classmethod
    def of(cls, values: Mapping) -> "Settings":
        """From values by name; what is missing has its default, what is no setting is left out."""
        return built(cls, values)

    @classmethod
    def recorded(cls, values: Mapping) -> "Settings":
        """From the record of a run, of this version or an earlier one: names that it lacks get what its preset says.

        Earlier versions wrote --mbstd-group without giving it to networks that --init named.
        """
        values = dict(values)
        if "task" not in values:
            values["task"] = task_of(values["init"], values["reward"])
            if values["init"] != "scratch":
                values["mbstd_group"] = None
        return cls.of({**PRESETS[values["cfg"], values["task"]], **values})

    def changed(self, **values) -> "Settings":
        """A copy with other values, by name."""
        return Settings.recorded({**self.to_dict(), **values})

    @property
    def name(self) -> str:
        """EG3D's naming: cfg-dataset-batchB-gammaX, with the reward's weight and --desc."""
        dataset = Path(self.data.data.replace(":", "-").split("@")[0]).stem
        name = f"{self.net.cfg}-{dataset}-batch{self.loop.batch}-gamma{self.gan.gamma:g}"
        if self.reward.reward != "none":
            name += f"-{self.reward.reward}-lambda{self.reward.terms.lambda_r:g}"
        if self.rounds.rounds:
            name += f"-rounds{self.rounds.rounds}"
        return name + (f"-{self.run.desc}" if self.run.desc else "")


GROUPS = (RunConfig, DataConfig, NetworkConfig, GanConfig, LoopConfig, RewardSettings, RoundConfig)  # in the order of --help


# Presets: what differs from the fields' own defaults, a row for each (family, task). None: the flag is required, or follows another.

SCRATCH, TUNING, REWARDED = "scratch", "tuning", "reward"
_START = {"ema_rampup": 0.05, "ada_kimg": 500.0, "ema_kimg": None, "rlr": None, "gen_pose_cond": False}
_LOADED = {**_START, "ema_rampup": None, "ada_kimg": 100.0, "blur_fade_kimg": 0.0, "gpc_reg_fade_kimg": 0.0, "kimg": 2500.0, "batch": 32}
_PAPER = {**_LOADED, "kimg": 20.0, "batch": 16, "tick": 1.0, "snap": 5}
_HEADS = {"cbase": 2048, "cmax": 64, "plane_layout": "fixed", "anchor_resolution": 32, "nrr_initial": 64}
_HEADS_TUNING = {
    **_LOADED, **_HEADS, "gamma": 0.3, "kimg": 0.72, "batch": 8, "glr": 2e-5, "dlr": 1e-4, "rlr": 5e-4, "start": "G_ema", "tick": 0.12,
    "snap": 0, "ema_kimg": 0.1,
}
PRESETS: dict[tuple[str, str], dict] = {
    ("ffhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("afhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("shapenet", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("heads64", SCRATCH): {
        **_START, **_HEADS, "gamma": 0.2, "gpc_reg_fade_kimg": 5.0, "blur_fade_kimg": 0.0, "kimg": 50.0, "batch": 4, "tick": 1.0, "snap": 4,
        "ema_kimg": 1.0, "field_kimg": 48.0, "glr": 5e-4,
    },
    ("ffhq", TUNING): {**_LOADED, "gamma": 1.0},
    ("afhq", TUNING): {**_LOADED, "gamma": 5.0, "aug": "ada"},
    ("shapenet", TUNING): {**_LOADED, "gamma": 0.3},
    ("heads64", TUNING): _HEADS_TUNING,
    ("ffhq", REWARDED): {**_PAPER, "gamma": 20.0},
    ("afhq", REWARDED): {**_PAPER, "gamma": 5.0, "aug": "ada"},
    ("shapenet", REWARDED): {**_PAPER, "gamma": 0.3},
    ("heads64", REWARDED): _HEADS_TUNING,
}
OBSERVED: dict[str, dict] = {  # what suits another observation than sigma, as published
    "depth": {"lambda_r": 1.0, "lambda_sigma": 0.0, "lambda_nose": 1.0, "reward_shaping": "standardised"},
}
BY_PRESET = {name: "by preset" for row in PRESETS.values() for name in row}  # what --help adds


def task_of(init: str, reward: str) -> str:
    """Which row applies."""
    return SCRATCH if init == "scratch" else TUNING if reward == "none" else REWARDED


def resolve(flags: Mapping) -> Settings:
    """The settings that flags (None: not given), the preset's row and the file that --init names decide.

    Raises: ValueError, one line per mistake, naming the flag.
    """
    given = {k: v for k, v in flags.items() if v is not None}
    cfg, reward = given.setdefault("cfg", "heads64"), given.get("reward", "none")
    if cfg != "heads64" and "data" not in given:
        raise ValueError(f"--data: expected a dataset for --cfg={cfg}, got nothing. Name a zip or folder in EG3D's format.")
    init = given.setdefault("init", "bundled" if cfg == "heads64" else "scratch")
    task = task_of(init, reward)
    if reward != "none":
        with naming("--reward"):
            observations.OBSERVATIONS[reward]
        if init == "scratch":
            raise ValueError(f"--reward={reward}: expected pretrained networks, got --init=scratch. Name a file or use --init=bundled.")
        if (cfg, reward) == ("heads64", "sigma") and given.get("rounds"):
            given.setdefault("reward_watch", str(bundled.WATCH))
        elif (cfg, reward) == ("heads64", "sigma") and given.setdefault("reward_ckpt", str(bundled.REWARD)) == str(bundled.REWARD):
            given.setdefault("reward_watch", str(bundled.WATCH))
    check_rounds(given, reward)
    if given.get("early_stop") is not None and given.get("reward_watch") is None:
        lacking = "--reward" if reward == "none" else "--reward-watch"
        raise ValueError(f"--early-stop: expected {lacking}, whose scores choose the snapshot, got none. Add it, or leave this out.")
    if Path(init).is_dir():  # its newest network now, which a resume will look for
        with naming("--init"):
            init = given["init"] = str(find_network(init))
    found = {} if init == "scratch" else network_facts(None if init == "bundled" else init)
    values = {"task": task, **PRESETS[cfg, task], **OBSERVED.get(reward, {}), **found, **given}
    for name in ("gamma", "batch"):
        if values[name] is None:
            raise ValueError(f"--{name}: expected a value for --cfg={cfg}, got nothing. Published runs used --gamma=1 --batch=32.")
    if values["ema_kimg"] is None:
        values["ema_kimg"] = values["batch"] * 10 / 32
    if cfg != "heads64":  # as EG3D scales its flag
        values["blur_fade_kimg"] = values.get("blur_fade_kimg", GanConfig.blur_fade_kimg) * values["batch"] / 32
    values["rlr"] = values["rlr"] or values.get("glr", GanConfig.glr)
    control = given.get("control")
    if control is not None and not Path(control).exists():
        raise ValueError(f"--control: expected a run folder or its summary.json, got nothing at {control}. Check the path.")
    return Settings.of(values)


def check_rounds(given: Mapping, reward: str) -> None:
    """Raise ValueError for flags that do not go together with --rounds, or without it."""
    own, without = [f"--{name.replace('_', '-')}" for name in given if name.startswith("round_")], not given.get("rounds")
    if without and own:
        raise ValueError(f"{own[0]}: expected --rounds with it, got none. Add it, or leave {own[0]} out.")
    if without:
        return
    if reward == "none":
        raise ValueError("--rounds: expected --reward, the kind of reward that is trained in each round, got none. Add --reward=sigma.")
    if "reward_ckpt" in given:
        raise ValueError(f"--reward-ckpt={given['reward_ckpt']}: expected none with --rounds, which train their own. Leave it out.")
    if given.get("round_labels", SYNTHETIC) == SYNTHETIC and not given.get("data", DataConfig.data).startswith("synthetic:"):
        raise ValueError(
            f"--round-labels: expected people for --data={given['data']}, got {SYNTHETIC}: the annotator of heads judges synthetic ones "
            "alone. Add --round-labels=people."
        )


def network_facts(source: str | None) -> dict:
    """Settings that a network file brings: rendered resolution, conditioning on the camera, minibatch-std group. None: the bundled one.

    Raises: ValueError naming --init.
    """
    with naming("--init"):
        path = find_network(source)
        if path.suffix.lower() == ".pkl":
            snapshot = pickles.read(path)
            plans = pickles.plan(snapshot)
            G, D = plans["G_ema"].kwargs, plans["D"].kwargs if "D" in plans else None
            rendered: int | None = neural_rendering_resolution(snapshot.networks["G_ema"])
        else:
            meta = storage.read_meta(path, "network")
            classes_of(meta.get("architecture", EG3D))
            G, D, rendered = meta["G_kwargs"], meta["D_kwargs"], meta.get("neural_rendering_resolution")
    group = (D or {}).get("epilogue_kwargs", {}).get("mbstd_group_size", NetworkConfig.mbstd_group)
    conditioned = not G.get("rendering_kwargs", {}).get("c_gen_conditioning_zero", False)
    return {"gen_pose_cond": conditioned, "mbstd_group": group, **({} if rendered is None else {"nrr_initial": rendered})}


FRESH = (  # what only fresh networks can follow
    "cbase", "cmax", "plane_layout", "map_depth", "sr_module", "sr_num_fp16_res", "g_num_fp16_res", "d_num_fp16_res", "c_scale",
    "disc_c_noise", "sr_noise_mode", "decoder_lr_mul", "sphere_init",
)


def input_files(s: Settings) -> dict[str, Path]:
    """The files that a run starts from, by what they are; runs record and compare their hashes."""
    files = {} if s.net.init == "scratch" else {"init": find_network(None if s.net.init == "bundled" else s.net.init)}
    if s.reward.reward != "none":
        named = {"reward": s.reward.reward_ckpt, "watch": s.reward.reward_watch, "reference": s.reward.reference}
        files |= {name: Path(path) for name, path in named.items() if path is not None}
    return files


# What the run with lambda_r = 0 does not depend on: the reward's own settings, names of files (their hashes count), and how a run is shown.
_NOT_THE_CONTROLS = {
    "lambda_r", "lambda_sigma", "lambda_front", "lambda_nose", "nose_floor", "reward_clip", "reward_shaping", "reward_ckpt", "reward_watch",
    "rlr", "anchor_resolution",
    "early_stop", "early_stop_distance", "reference",
    "control", "desc", "device", "launch", "no_summary", "processes", "versions", "init", "tick", "snap", "checkpoint_ticks", "batch_gpu",
    "hashes", "task", "workers",
}


def control_differs(settings: dict, record: dict) -> list[str]:
    """What keeps a run with lambda_r = 0 from being the control of another: 'name got instead of expected', [] where nothing does.

    Args:
        settings: of the tuned run, as its folder records them, with the `hashes` of its inputs.
        record: of the control, likewise; settings that only one of the two knows are not compared.
    """
    names = sorted((settings.keys() & record.keys()) - _NOT_THE_CONTROLS)
    pairs = {name: (record[name], settings[name]) for name in names}
    pairs["lambda_r"] = record.get("lambda_r", 0), 0
    of_control, own = record.get("hashes", {}), settings.get("hashes", {})
    pairs |= {f"{name} (bytes)": (of_control[name][:8], own[name][:8]) for name in ("init", "reward") if name in own and name in of_control}
    return [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
