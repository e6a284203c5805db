"""Flags of `train.py --mode=distill`, and the settings that they describe."""

from collections.abc import Mapping
from pathlib import Path

import click

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.tuning.distill.config import ASSETS, BOXES, METHOD, METHODS, REAL, Arm, DistillSettings, LoopConfig, SceneConfig
from eg3d_rlhf.tuning.distill.guidance.geometry import GeometrySettings
from eg3d_rlhf.tuning.distill.methods import PRESETS, TABLE, owners
from training.config import built, knobs_of

RUN = "Run"
FOLDER = click.Path(path_type=Path, file_okay=False)
DEFAULT_METHOD = "dreamdpo"
BUNDLED = (*BOXES, "heads")  # priors that need no files
CONTROLS = ("inverted", "random")  # arms that a comparison adds for its first method with a reward

DEFAULTS: dict[str, dict] = {  # by prior: what differs from the fields' own
    "bundled": {"tau_mode": "quantile", "tau": 0.5},  # half of the steps only pull: the push away has a weak anchor
    "bundled-unet": {"tau_mode": "quantile", "tau": 0.5, "guidance_scale": 1.5},  # its null prediction knows all prompts' modes
    "heads": {"steps": 40, "batch": 8, "lr": 0.1, "t_max": "0.5", "guidance_scale": 1.0},
    "real": {"steps": 10000, "batch": 1, "lr": 0.01, "lr_end": 1.0, "t_min": "0,0.98,0.02,8000", "t_max": "0,0.98,0.5,8000", "tick": 50},
}

run_flags = together(
    option("--mode", group=RUN, type=click.Choice(["distill"]), default="distill", expose_value=False,
           help="What train.py trains."),
    option("--outdir", group=RUN, metavar="DIR", type=FOLDER, default=Path("runs"), help="Runs are numbered inside it."),
    option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name."),
    option("--seed", group=RUN, metavar="INT", type=click.IntRange(min=0), default=0, help="Of everything that is drawn."),
    option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
    option("--workers", group=RUN, metavar="INT", type=click.IntRange(min=1), default=2, help="Processes of one thread for several parts."),
    option("--resume", group=RUN, metavar="RUN", type=FOLDER, help="Go on with a run where it was, with its own flags."),
    option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."),
    option("--timeout", group=RUN, metavar="MINUTES", type=click.FloatRange(min=0, min_open=True), default=30,
           help="With torchrun: longest wait for another process."),
    option("--show", group=RUN, metavar="INT", type=click.IntRange(min=0), default=4, help="Assets in pictures, film and meshes."),
)  # fmt: skip
what_flags = together(
    option("--prompt", "prompts", group=ASSETS, metavar="TEXT|FILE", multiple=True, show_default="the bundled problem's",
           help="What is made; a file holds one prompt a line. May be repeated."),
    options_of(SceneConfig),
)  # fmt: skip
method_flags = together(
    option("--method", group=METHOD, type=click.Choice(METHODS), default=None, show_default=DEFAULT_METHOD,
           help="How assets are made."),
    option("--compare", group=METHOD, metavar="ARM,...", default=None, show_default="all, where nothing else is said of what is made",
           help="Arms on the same seeds and one table against sds: methods, with +geometry for --geometry-reward beside it. Its first "
                "method with a reward also runs with that inverted, and with random numbers in its place. none: a single method."),
    option("--preset", group=METHOD, type=click.Choice(sorted(PRESETS)), default=None, show_default="the method's own",
           help="Settings of a method by name; those of public code among them. Brings its method."),
    options_of(*(method.settings for method in TABLE.values()), GeometrySettings, everywhere="by method"),
    option("--tau", group="DreamDPO", metavar="GAP", type=float, default=None, show_default="by method",
           help="Gap of rewards from which the loser is pushed away; inf: never. With --tau-mode=quantile a share of the gaps."),
    option("--reward-weight", "weight", group="DreamReward", metavar="RAMP", default=None, show_default="by method",
           help="Of the reward's gradient, in norms of the distillation's; a number, or a ramp s0,v0,v1,s1."),
    options_of(LoopConfig),
)  # fmt: skip


def flag(name: str) -> str:
    """As users write it."""
    return "--" + name.replace("_", "-")


def arms_of(flags: Mapping) -> tuple[str, ...]:
    """Names of the arms. Raises: ValueError."""
    plain = not flags["prompts"] and flags["method"] is None and flags["preset"] is None and flags["prior"] in (None, *BUNDLED)
    listed = flags["compare"]
    if flags["method"] is not None and listed not in (None, "none"):
        raise ValueError(f"--method={flags['method']}: expected a method or --compare, got both. Leave one out.")
    shaped = flags["geometry_reward"] not in (None, "none")
    of_heads = flags["prior"] == "heads"
    if listed == "none" or listed is None and not plain:
        usual = "sds" if of_heads else DEFAULT_METHOD
        return (Arm(flags["method"] or (method_of(flags["preset"]) if flags["preset"] else usual), geometry=shaped).name,)
    if listed is None and of_heads:
        listed = "sds,sds+geometry,sds+geometry-inverted,sds+geometry-random"
    if listed is None:
        listed = "sds,dreamdpo,psd"
        listed += ",sds+geometry" if shaped else ""
    try:
        arms = [Arm.parse(part) for part in listed.split(",")]
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from None
    arms = [Arm("sds"), *(arm for arm in arms if arm != Arm("sds"))]
    rewarded = next((arm for arm in arms if TABLE[arm.method].rewarded and arm.twist is None), None)
    arms += [Arm(rewarded.method, twist) for twist in CONTROLS if Arm(rewarded.method, twist) not in arms] if rewarded else []
    return tuple(dict.fromkeys(arm.name for arm in arms))


def method_of(preset: str) -> str:
    """The method that a preset is of."""
    return next(name for name, method in TABLE.items() if type(PRESETS[preset]) is method.settings)


def read_prompts(given: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts, those of files among them. Raises: ValueError for an empty file."""
    found: list[str] = []
    for text in given:
        path = Path(text)
        if not (len(text) < 255 and path.is_file()):
            found.append(text)
            continue
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompt: expected a prompt in every line of {path}, got an empty file. Write some.")
        found += lines
    if any(not text.strip() for text in found):
        raise ValueError("--prompt: expected a text, got an empty one. Say what is to be made.")
    return tuple(found)


def resolve(flags: Mapping) -> DistillSettings:
    """The settings that flags (None: not given), preset and prior decide. Raises: ValueError naming what does not fit."""
    given = {name: value for name, value in flags.items() if value is not None}
    arms, prompts = arms_of(flags), read_prompts(flags["prompts"])
    prior = given.get("prior", "bundled")
    own, kind = owners(), prior if prior in BUNDLED else "real"
    parsed = [Arm.parse(name) for name in arms]
    methods = {arm.method for arm in parsed}
    refuse(given, methods, any(arm.geometry for arm in parsed), kind)
    values = {**DEFAULTS[kind], **given}
    if kind in BOXES:
        from eg3d_rlhf.tuning.distill import scene_boxes as bundled

        values.setdefault("t_max", f"0,0.98,0.15,{0.6 * values.get('steps', LoopConfig.steps):g}")  # the end is for detail alone
        prompts, values["assets"] = bundled.check(prompts, given.get("assets"), comparison=len(arms) > 1)
        values.setdefault("reward", bundled.REWARD)
    elif kind == "heads":
        from eg3d_rlhf.tuning.distill import scene_heads as heads

        prompts, values["assets"] = heads.check(prompts, given.get("assets"), comparison=len(arms) > 1)
        if any(arm.geometry for arm in parsed):
            values.setdefault("geometry_reward", "sigma")
    elif not prompts:
        raise ValueError("--prompt: expected what is to be made, got nothing. Add --prompt='a bust of a man'.")
    of_methods = values if flags["preset"] is None else given
    names = {*(name for name, users in own.items() if methods & set(users)), *(one.name for one, _, _ in knobs_of(GeometrySettings))}
    return DistillSettings(
        prompts=prompts, arms=arms, scene=built(SceneConfig, values), loop=built(LoopConfig, values),
        guidance={name: of_methods[name] for name in sorted(names & of_methods.keys())}, preset=flags["preset"], seed=flags["seed"],
    )  # fmt: skip


def refuse(given: Mapping, methods: set[str], shaped: bool, kind: str) -> None:
    """Raise ValueError for a flag that would have no effect."""
    belongs = {name: f"--method={' or '.join(users)}" for name, users in owners().items() if not methods & set(users)}
    if not shaped:
        belongs |= {one.name: "a --geometry-reward" for one, _, _ in knobs_of(GeometrySettings)}
    if kind in BUNDLED:
        belongs |= {one.name: "a --prior from files" for one, _, knob in knobs_of(SceneConfig) if knob.group == REAL}
    if not any(TABLE[name].rewarded for name in methods):
        belongs["reward"] = "a method with a reward"
    if not any(TABLE[name].judged for name in methods):
        belongs["judge"] = "--method=dreamdpo or psd"
    for name in sorted(belongs.keys() & given.keys()):
        raise ValueError(f"{flag('reward_weight' if name == 'weight' else name)}: belongs to {belongs[name]}, and would have no effect "
                         "here. Leave it out.")
    if given.get("geometry_reward", "none") != "none" and not shaped:
        raise ValueError("--geometry-reward: expected an arm with +geometry in --compare, got none. Add one, such as sds+geometry.")
