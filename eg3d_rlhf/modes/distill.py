"""`train.py --mode=distill`: text to 3D by score distillation, of prompts with one method, or of all arms of
a comparison.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import Flags, Mode, flag
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.shared_flags import rare_option, whole_option
from eg3d_rlhf.tuning.distill.config import (
    ASSETS,
    METHOD,
    METHODS,
    REAL,
    Arm,
    DistillSettings,
    LoopConfig,
    SceneConfig,
)
from eg3d_rlhf.tuning.distill.guidance.settings import GeometrySettings
from eg3d_rlhf.tuning.distill.methods import PRESETS, flat, owners, settings_of
from eg3d_rlhf.tuning.distill.scene_kinds import SCENES
from training.config import built, knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.distill.scene import Scene

# The whole default run of each kind of prior. None: the method's own, or what must be said.
KINDS = ("bundled", "bundled-unet", "heads", "files")
DEFAULTS: dict[str, tuple] = {
    "compare": (
        "sds,dreamdpo,psd",
        "sds,dreamdpo,psd",
        "sds,sds+geometry,sds+geometry-inverted,sds+geometry-random",
        None,
    ),
    "method": ("dreamdpo", "dreamdpo", "sds", "dreamdpo"),  # where nothing is compared
    "prompts": ("all 22", "all 22", "head 0 to head 7", None),  # by the scene's own check
    "assets": ("5; 1 of a prompt", "5; 1 of a prompt", "2; 1 of a prompt", 1),  # of each prompt; likewise
    "reward": ("one-face", "one-face", None, None),
    "geometry_reward": ("none", "none", "sigma", "none"),  # for arms with +geometry
    "steps": (100, 100, 40, 10_000),
    "batch": (55, 55, 8, 1),
    "lr": (0.05, 0.05, 0.1, 0.01),
    "lr_end": (0.05, 0.05, 0.05, 1.0),  # share of lr
    "t_min": ("0.02", "0.02", "0.02", "0,0.98,0.02,8000"),
    # of boxes over 60 % of the steps: the end is for detail
    "t_max": ("0,0.98,0.15,60", "0,0.98,0.15,60", "0.5", "0,0.98,0.5,8000"),
    "tick": (20, 20, 20, 50),
    "tau_mode": ("quantile", "quantile", None, None),
    "tau": (0.5, 0.5, None, None),  # half of the steps only pull: the push away has a weak anchor
    "guidance_scale": (None, 1.5, 1.0, None),  # the U-Net's null prediction knows all prompts' modes
}
BY_SCENE = {"compare", "method", "prompts", "assets"}  # decided by `arms_of` and the scene's check
CONTROLS = ("inverted", "random")  # arms that a comparison adds for its first method with a reward

OF_METHODS = (*(method.settings for method in METHODS.values()), GeometrySettings)
SETTINGS = (SceneConfig, *OF_METHODS, LoopConfig)

flags = together(
    whole_option("--show", group="Run", default=4, help="Assets in pictures, film and meshes."),
    option(
        "--prompt",
        "prompts",
        group=ASSETS,
        metavar="TEXT|FILE",
        multiple=True,
        show_default="none",
        help="What is made; a file holds one prompt a line. May be repeated.",
    ),
    options_of(SceneConfig),
    option(
        "--method",
        group=METHOD,
        type=click.Choice(list(METHODS)),
        show_default="that of --preset, or the arms of --compare",
        help="How assets are made.",
    ),
    option(
        "--compare",
        group=METHOD,
        metavar="ARM,...",
        show_default="none",
        help=(
            "Arms on the same seeds and one table against sds: methods, with +geometry for --geometry-reward"
            " beside it. Its first method with a reward also runs with that inverted, and with random numbers"
            " in its place. none: a single method."
        ),
    ),
    option(
        "--preset",
        group=METHOD,
        type=click.Choice(sorted(PRESETS)),
        show_default="none",
        help="Settings of a method by name; those of public code among them. Brings its method.",
    ),
    options_of(*OF_METHODS),
    rare_option(
        "--tau",
        type=float,
        help="Gap of rewards from which the loser is pushed away, see tau_mode; inf: never.",
    ),
    rare_option(
        "--weight",
        metavar="RAMP",
        help="Weight of DreamReward's gradient: a number, or a ramp over steps s0,v0,v1,s1.",
    ),
    options_of(LoopConfig),
)


@dataclass(frozen=True, kw_only=True)
class DistillRun:
    """A run as it is recorded."""

    settings: DistillSettings
    show: int = 4  # assets in pictures, film and meshes


def kind_of(prior: str | None) -> str:
    """The column of DEFAULTS; a plugin's prior without files has none."""
    prior = prior or KINDS[0]
    return prior if prior in SCENES else "files"


def default(name: str, kind: str) -> Any:
    """A cell of DEFAULTS."""
    return DEFAULTS[name][KINDS.index(kind)] if kind in KINDS else None


def defaults_of(kind: str, steps: int | None) -> dict[str, Any]:
    """Settings by name. Args: steps: of the run, where they are given."""
    values = {name: default(name, kind) for name in DEFAULTS.keys() - BY_SCENE}
    if kind.startswith("bundled"):
        values["t_max"] = f"0,0.98,0.15,{0.6 * (steps or values['steps']):g}"
    return {name: value for name, value in values.items() if value is not None}


def arms_of(given: Mapping) -> tuple[str, ...]:
    """Names of the arms. Raises: ValueError."""
    method = given.get("method")
    preset = given.get("preset")
    listed = given.get("compare")
    kind = kind_of(given.get("prior"))
    shaped = given.get("geometry_reward", "none") != "none"
    if method is not None and listed not in (None, "none"):
        raise ValueError(f"--method={method}: expected a method or --compare, got both. Leave one out.")
    if listed is None and not (given.get("prompts") or method or preset):
        listed = default("compare", kind)
        if listed is not None and shaped and "+geometry" not in listed:
            listed += ",sds+geometry"
    if listed in (None, "none"):
        name = method or (method_of(preset) if preset else default("method", kind) or "dreamdpo")
        return (Arm(name, geometry=shaped).name,)
    try:
        arms = [Arm.parse(part) for part in listed.split(",")]
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from None
    arms = [Arm("sds"), *(arm for arm in arms if arm != Arm("sds"))]
    rewarded = next((arm for arm in arms if METHODS[arm.method].rewarded and arm.twist is None), None)
    arms += (
        [Arm(rewarded.method, twist) for twist in CONTROLS if Arm(rewarded.method, twist) not in arms]
        if rewarded
        else []
    )
    return tuple(dict.fromkeys(arm.name for arm in arms))


def method_of(preset: str) -> str:
    return next(name for name, method in METHODS.items() if type(PRESETS[preset]) is method.settings)


def read_prompts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts, those of files among them. Raises: ValueError for an empty file."""
    prompts: list[str] = []
    for text in texts:
        path = Path(text)
        if not (len(text) < 255 and path.is_file()):
            prompts.append(text)
            continue
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(
                f"--prompt: expected a prompt in every line of {path}, got an empty file. Write some."
            )
        prompts += lines
    if any(not text.strip() for text in prompts):
        raise ValueError("--prompt: expected a text, got an empty one. Say what is to be made.")
    return tuple(prompts)


def resolve(flags: Flags) -> DistillRun:
    """The run that flags (None: not given), preset and prior decide.

    Raises: ValueError naming what does not fit.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    names = arms_of(given)
    prompts = read_prompts(flags["prompts"])
    kind = kind_of(given.get("prior"))
    arms = [Arm.parse(name) for name in names]
    methods = {arm.method for arm in arms}
    shaped = any(arm.geometry for arm in arms)
    refuse(given, methods, shaped, kind)
    values = {**defaults_of(kind, given.get("steps")), **given}
    if not shaped:
        values["geometry_reward"] = "none"
    if kind == "files" and not prompts:
        raise ValueError(
            "--prompt: expected what is to be made, got nothing. Add --prompt='a bust of a man'."
        )
    if kind != "files":
        prompts, values["assets"] = SCENES[kind].check(prompts, given.get("assets"), len(names) > 1)
    of_methods = values if flags["preset"] is None else given
    known = {
        *(name for name, users in owners().items() if methods & set(users)),
        *(field.name for field, *_ in knobs_of(GeometrySettings)),
    }
    settings = DistillSettings(
        prompts=prompts,
        arms=names,
        scene=built(SceneConfig, values),
        loop=built(LoopConfig, values),
        preset=flags["preset"],
        guidance={name: of_methods[name] for name in sorted(known & of_methods.keys())},
        seed=flags["seed"],
    )
    return DistillRun(settings=settings, show=flags["show"])


def shown_by_help(flags: Flags) -> list[object]:
    """Return what --help takes defaults from: the settings of the run that the flags describe."""
    kind = kind_of(flags["prior"])
    prompts = flags["prompts"] or (("...",) if kind == "files" else ())
    run = resolve(Flags({**flags, "prompts": prompts}, flags.written))
    arms = run.settings.arms
    what = {
        "prompts": flags["prompts"] or default("prompts", kind),
        "compare": ",".join(arms) if len(arms) > 1 else "none",
        "method": Arm.parse(arms[0]).method if len(arms) == 1 else None,
    }
    return [
        what,
        *shown(run)["methods"].values(),
        run.settings.guidance,
        run.settings.scene,
        run.settings.loop,
    ]


def refuse(given: Mapping, methods: set[str], shaped: bool, kind: str) -> None:
    """Raise ValueError for a flag that would have no effect."""
    belongs = {
        name: f"--method={' or '.join(users)}" for name, users in owners().items() if not methods & set(users)
    }
    if not shaped:
        belongs |= {field.name: "a --geometry-reward" for field, *_ in knobs_of(GeometrySettings)}
    if kind != "files":
        belongs |= {
            field.name: "a --prior from files"
            for field, _, knob in knobs_of(SceneConfig)
            if knob.group == REAL
        }
    if not any(METHODS[name].rewarded for name in methods):
        belongs["reward"] = "a method with a reward"
    if not any(METHODS[name].judged for name in methods):
        belongs["judge"] = "--method=dreamdpo or psd"
    for name in sorted(belongs.keys() & given.keys()):
        raise ValueError(
            f"{flag(name)}: belongs to {belongs[name]}, and would have no effect here. Leave it out."
        )
    if given.get("geometry_reward", "none") != "none" and not shaped:
        raise ValueError(
            "--geometry-reward: expected an arm with +geometry in --compare, got none. Add one, such as"
            " sds+geometry."
        )


def open_run(run_settings: DistillRun, run: "Run") -> "Scene":
    """What a run works on. Raises: ValueError, OSError."""
    import torch

    from eg3d_rlhf.tuning.distill.scene import open_scene

    scene = open_scene(run_settings.settings, torch.device(run.device))
    run.inputs = dict(scene.inputs)
    return scene


def title(run_settings: DistillRun, scene: "Scene") -> str:
    """Of the run's folder."""
    settings = run_settings.settings
    arms = "compare" if len(settings.arms) > 1 else settings.arms[0]
    return f"distill-{Path(settings.scene.prior).stem}-{arms}"


def work(run_settings: DistillRun, scene: "Scene", run: "Run") -> None:
    from eg3d_rlhf.tuning.distill import outputs
    from eg3d_rlhf.tuning.distill.distill_run import distil_all, gather_stats
    from training.distributed import leave

    settings = run_settings.settings
    if run.ranks.main:
        pairs = len(settings.pairs())
        arms = len(settings.arms)
        print(f"{pairs} assets x {arms} arm{'s' * (arms > 1)}, {settings.loop.steps} steps each.", flush=True)
    distil_all(settings, scene, run)
    leave()  # the other processes need not wait for pictures
    if run.ranks.main:
        gather_stats(settings, run)
        outputs.write(settings, scene, run, run_settings.show)
        print(f"Done: {run.folder}", flush=True)


def recorded(folder: Path, flags: Flags, ranks: object) -> DistillRun:
    """The run of a folder. Raises: FileNotFoundError, ValueError for another folder."""
    from eg3d_rlhf.experiments.run import recorded_by

    record = recorded_by(folder, "distill")
    return DistillRun(settings=DistillSettings.of(record["settings"]), show=record["show"])


def shown(run_settings: DistillRun) -> dict:
    """What --dry-run prints: the settings, those of every arm's method written out."""
    s = run_settings.settings
    methods = {name: flat(settings_of(Arm.parse(name).method, s.guidance, s.preset)) for name in s.arms}
    ramps = {
        name: {key: getattr(value, "spec", value) for key, value in values.items()}
        for name, values in methods.items()
    }
    return {**s.to_dict(), "methods": ramps}


DISTILL = Mode(
    name="distill",
    settings=DistillRun,
    open=open_run,
    work=work,
    title=title,
    flags=flags,
    resolve=resolve,
    record=lambda run, scene: {"mode": "distill", "settings": run.settings.to_dict(), "show": run.show},
    recorded=recorded,
    shown=shown,
    defaults=shown_by_help,
    on_cpu=lambda run: run.settings.scene.prior in SCENES,  # the problems without files are for CPUs
    jobs="several parts",
    help="""Text to 3D by score distillation, with preferences in the gradient. Without flags: the bundled
    problem, all arms on the same seeds, and a table of win rates against plain score distillation. A run that
    was stopped goes on with --resume=RUN.

    \b
    Examples:
        python train.py --mode=distill
        python train.py --mode=distill --method=dreamdpo --prompt="a white head with a red nose"
    """,
)
MODES.add("distill", DISTILL)
