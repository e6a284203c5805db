"""`train.py --mode=distill`: text to 3D by score distillation, with one method or all arms of a
comparison.
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

# Default settings of a run, a column per kind of prior. None: the method's default, or a required flag.
KINDS = ("bundled", "bundled-unet", "heads", "files")
DEFAULTS: dict[str, tuple] = {
    "compare": (
        "sds,dreamdpo,psd",
        "sds,dreamdpo,psd",
        "sds,sds+geometry,sds+geometry-inverted,sds+geometry-random",
        None,
    ),
    "method": ("dreamdpo", "dreamdpo", "sds", "dreamdpo"),  # method of a run without a comparison
    "prompts": ("all 22", "all 22", "head 0 to head 7", None),  # resolved by the scene's `check
    "assets": (
        "5; 1 of a prompt",
        "5; 1 of a prompt",
        "2; 1 of a prompt",
        1,
    ),  # per arm; resolved by the scene's `check`, too
    "reward": ("one-face", "one-face", None, None),
    "geometry_reward": ("none", "none", "sigma", "none"),  # for arms with +geometry
    "steps": (100, 100, 40, 10_000),
    "batch": (55, 55, 8, 1),
    "lr": (0.05, 0.05, 0.1, 0.01),
    "lr_end": (0.05, 0.05, 0.05, 1.0),  # learning rate at the end, as a share of lr
    "t_min": ("0.02", "0.02", "0.02", "0,0.98,0.02,8000"),
    # ramp s0,v0,v1,s1 over 60 % of the steps; the rest of the run adds detail
    "t_max": ("0,0.98,0.15,60", "0,0.98,0.15,60", "0.5", "0,0.98,0.5,8000"),
    "tick": (20, 20, 20, 50),
    "tau_mode": ("quantile", "quantile", None, None),
    "tau": (
        0.5,
        0.5,
        None,
        None,
    ),  # at half of the steps the loser is not pushed away, which keeps the optimisation stable
    "guidance_scale": (
        None,
        1.5,
        1.0,
        None,
    ),  # the U-Net's unconditional prediction covers the modes of all prompts
}
BY_SCENE = {
    "compare",
    "method",
    "prompts",
    "assets",
}  # settings that `arms_of` and the scene's `check` resolve
CONTROLS = ("inverted", "random")  # arms that a comparison adds for its first method with a reward

OF_METHODS = (*(method.settings for method in METHODS.values()), GeometrySettings)
SETTINGS = (SceneConfig, *OF_METHODS, LoopConfig)

flags = together(
    whole_option(
        "--show", group="Run", default=4, help="Number of assets in the images, the video and the meshes."
    ),
    option(
        "--prompt",
        "prompts",
        group=ASSETS,
        metavar="TEXT|FILE",
        multiple=True,
        show_default="none",
        help="Prompt of an asset, or a file with one prompt per line. May be repeated.",
    ),
    options_of(SceneConfig),
    option(
        "--method",
        group=METHOD,
        type=click.Choice(list(METHODS)),
        show_default="that of --preset, or the arms of --compare",
        help="Distillation method.",
    ),
    option(
        "--compare",
        group=METHOD,
        metavar="ARM,...",
        show_default="none",
        help=(
            "Compare arms with sds on the same seeds: methods, +geometry adds the gradient of"
            " --geometry-reward."
            " The first method with a reward also runs with the reward inverted and with random numbers"
            " in its place, as controls. none: a single method."
        ),
    ),
    option(
        "--preset",
        group=METHOD,
        type=click.Choice(sorted(PRESETS)),
        show_default="none",
        help="Named settings of a method, among them those of public code. Selects the method, too.",
    ),
    options_of(*OF_METHODS),
    rare_option(
        "--tau",
        type=float,
        help="Reward gap above which the loser is pushed away (see tau_mode); inf: never.",
    ),
    rare_option(
        "--weight",
        metavar="RAMP",
        help="Weight of DreamReward's gradient: a number, or a ramp s0,v0,v1,s1 over the steps.",
    ),
    options_of(LoopConfig),
)


@dataclass(frozen=True, kw_only=True)
class DistillRun:
    """Settings of a run, as the run's folder records them."""

    settings: DistillSettings
    show: int = 4  # number of assets in the images, the video and the meshes


def kind_of(prior: str | None) -> str:
    """Return the kind of a prior, a column of DEFAULTS. All that are not scenes count as files."""
    # without --prior, the bundled problem
    prior = prior or KINDS[0]
    return prior if prior in SCENES else "files"


def default(name: str, kind: str) -> Any:
    """Look up the default of a setting for a kind of prior; None for a kind outside the table."""
    return DEFAULTS[name][KINDS.index(kind)] if kind in KINDS else None


def defaults_of(kind: str, steps: int | None) -> dict[str, Any]:
    """Return the default settings by name. Args: steps: length of the run, if given."""
    # None in the table leaves the default of the dataclass
    values = {name: default(name, kind) for name in DEFAULTS.keys() - BY_SCENE}
    if kind.startswith("bundled"):
        # the ramp of t_max follows the length of the run: its last number is 60 % of the steps
        values["t_max"] = f"0,0.98,0.15,{0.6 * (steps or values['steps']):g}"
    return {name: value for name, value in values.items() if value is not None}


def arms_of(given: Mapping) -> tuple[str, ...]:
    """Return the names of the arms that the flags select. Raises: ValueError."""
    method = given.get("method")
    preset = given.get("preset")
    listed = given.get("compare")
    kind = kind_of(given.get("prior"))
    # a geometry reward adds its gradient to the arm
    shaped = given.get("geometry_reward", "none") != "none"
    if method is not None and listed not in (None, "none"):
        raise ValueError(f"--method={method} cannot be combined with --compare. Remove one of them.")
    # without any of these flags, the prior's default comparison runs
    if listed is None and not (given.get("prompts") or method or preset):
        listed = default("compare", kind)
        if listed is not None and shaped and "+geometry" not in listed:
            listed += ",sds+geometry"
    # one method alone: named, or the preset's, or the default
    if listed in (None, "none"):
        name = method or (method_of(preset) if preset else default("method", kind) or "dreamdpo")
        return (Arm(name, geometry=shaped).name,)
    try:
        arms = [Arm.parse(part) for part in listed.split(",")]
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from None
    # sds is the reference of the table, so it is always the first arm
    arms = [Arm("sds"), *(arm for arm in arms if arm != Arm("sds"))]
    # Controls show whether an advantage comes from the reward: its sign inverted, or random numbers.
    # the first arm that uses the reward as it is, to which the controls belong
    rewarded = next((arm for arm in arms if METHODS[arm.method].rewarded and arm.twist is None), None)
    arms += (
        [Arm(rewarded.method, twist) for twist in CONTROLS if Arm(rewarded.method, twist) not in arms]
        if rewarded
        else []
    )
    # drops arms that are listed twice, keeping the order
    return tuple(dict.fromkeys(arm.name for arm in arms))


def method_of(preset: str) -> str:
    """Return the method that a preset belongs to."""
    return next(name for name, method in METHODS.items() if type(PRESETS[preset]) is method.settings)


def read_prompts(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts, reading those that name a file. Raises: ValueError for an empty file or prompt."""
    prompts: list[str] = []
    for text in texts:
        path = Path(text)
        # file names have at most 255 bytes on common systems; a longer text would be an OSError
        if not (len(text) < 255 and path.is_file()):
            prompts.append(text)
            continue
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompt: {path} is an empty file. Write one prompt per line.")
        prompts += lines
    if any(not text.strip() for text in prompts):
        raise ValueError("--prompt: got an empty text. Give a text that describes the asset.")
    return tuple(prompts)


def resolve(flags: Flags) -> DistillRun:
    """Build the settings of the run from the flags (None: not given), the preset and the prior.

    Raises: ValueError naming a flag that does not fit.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    names = arms_of(given)
    prompts = read_prompts(flags["prompts"])
    kind = kind_of(given.get("prior"))
    arms = [Arm.parse(name) for name in names]
    methods = {arm.method for arm in arms}
    shaped = any(arm.geometry for arm in arms)
    reject_unused(given, methods, shaped, kind)
    # later entries override earlier ones
    values = {**defaults_of(kind, given.get("steps")), **given}
    if not shaped:
        values["geometry_reward"] = "none"
    if kind == "files" and not prompts:
        raise ValueError(
            "--prompt: a prior from files needs a prompt. Add one, such as --prompt='a bust of a man'."
        )
    if kind != "files":
        prompts, values["assets"] = SCENES[kind].check(prompts, given.get("assets"), len(names) > 1)
    # with a preset, only flags that were given override it; without one, the prior's defaults apply, too
    of_methods = values if flags["preset"] is None else given
    # settings that the chosen methods read; others would have no effect
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
    """Return the settings of the run that the flags describe, from which --help takes its defaults."""
    kind = kind_of(flags["prior"])
    # a prior from files has no default prompt; the placeholder lets the other settings resolve
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


def reject_unused(given: Mapping, methods: set[str], shaped: bool, kind: str) -> None:
    """Raise ValueError for a flag that would have no effect."""
    # by setting: what it needs to have an effect
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
        raise ValueError(f"{flag(name)} has an effect only with {belongs[name]}. Remove it.")
    if given.get("geometry_reward", "none") != "none" and not shaped:
        raise ValueError(
            "--geometry-reward needs an arm with +geometry in --compare. Add one, such as sds+geometry."
        )


def open_run(run_settings: DistillRun, run: "Run") -> "Scene":
    """Open the scene of a run: prior, renderer and rewards. Raises: ValueError, OSError."""
    import torch

    from eg3d_rlhf.tuning.distill.scene import open_scene

    # loads the prior and the rewards onto the device
    scene = open_scene(run_settings.settings, torch.device(run.device))
    # hashed with the run, so that a resume finds changed files
    run.inputs = dict(scene.inputs)
    return scene


def title(run_settings: DistillRun, scene: "Scene") -> str:
    """Name the run's folder by the prior and the arms."""
    settings = run_settings.settings
    # the names of many arms would be too long for a folder
    arms = "compare" if len(settings.arms) > 1 else settings.arms[0]
    return f"distill-{Path(settings.scene.prior).stem}-{arms}"


def work(run_settings: DistillRun, scene: "Scene", run: "Run") -> None:
    """Distil all assets in all arms, then write images, video, meshes and the table."""
    from eg3d_rlhf.tuning.distill import outputs
    from eg3d_rlhf.tuning.distill.distill_run import distil_all, gather_stats
    from training.distributed import leave

    settings = run_settings.settings
    if run.ranks.main:
        pairs = len(settings.pairs())
        arms = len(settings.arms)
        print(f"{pairs} assets x {arms} arm{'s' * (arms > 1)}, {settings.loop.steps} steps each.", flush=True)
    distil_all(settings, scene, run)
    leave()  # the other processes need not wait while the first one renders
    if run.ranks.main:
        gather_stats(settings, run)
        outputs.write(settings, scene, run, run_settings.show)
        print(f"Done: {run.folder}", flush=True)


def recorded(folder: Path, flags: Flags, ranks: object) -> DistillRun:
    """Read the settings from a run's folder. Raises: FileNotFoundError, ValueError for another folder."""
    from eg3d_rlhf.experiments.run import recorded_by

    record = recorded_by(folder, "distill")
    return DistillRun(settings=DistillSettings.of(record["settings"]), show=record["show"])


def shown(run_settings: DistillRun) -> dict:
    """Return what --dry-run prints: the settings, with all settings of each arm's method."""
    s = run_settings.settings
    methods = {name: flat(settings_of(Arm.parse(name).method, s.guidance, s.preset)) for name in s.arms}
    # a ramp is printed as the text that the flag takes
    # by arm
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
    on_cpu=lambda run: run.settings.scene.prior in SCENES,  # the bundled problems are small enough for a CPU
    jobs="several parts",
    help="""Text to 3D by score distillation, with preferences in the gradient. Without flags, it
    runs the bundled problem with all arms on the same seeds and writes a table of win rates
    against plain score distillation.
    --resume=RUN resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode=distill
        python train.py --mode=distill --method=dreamdpo --prompt="a white head with a red nose"
    """,
)
MODES.add("distill", DISTILL)
