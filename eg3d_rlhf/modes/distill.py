"""`train.py --mode=distill`: generation of 3D assets from texts by score distillation.

Score distillation (SDS, DreamFusion, arXiv:2209.14988) optimises a 3D asset so that a diffusion model of
images, the prior, finds its renders likely. A run uses one method, or compares several methods, the arms, on
the same prompts and seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, prefix_errors
from eg3d_rlhf.experiments.mode import Flags, Mode, flag
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.shared_flags import rare_option, whole_option
from eg3d_rlhf.modes.weak_reward import weak_reward_option
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
from eg3d_rlhf.tuning.distill.methods import PRESETS, flatten_settings, make_settings, methods_by_setting
from eg3d_rlhf.tuning.distill.scene_kinds import SCENES
from training.config import knobs_of, number_text, settings_from_values
from training.input_paths import existing_file
from training.text_files import read_text

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.distill.scene import Scene

# Default settings of a run. A tuple holds one value for each kind of prior, in the order of KINDS. None: the
# default of the method's settings applies, or the flag is required.
KINDS = ("bundled", "bundled-unet", "heads", "files")
DEFAULTS: dict[str, tuple] = {
    "compare": (
        "sds,dreamdpo,psd",
        "sds,dreamdpo,psd",
        "sds,sds+geometry,sds+geometry-inverted,sds+geometry-random",
        None,
    ),
    "method": ("dreamdpo", "dreamdpo", "sds", "dreamdpo"),  # method of a run without a comparison
    # texts for --help; the function `check` of the scene chooses the prompts themselves
    "prompts": ("all 22", "all 22", "head 0 to head 7", None),
    # Assets per prompt, in each arm. The texts are for --help: `check` of the scene chooses the number.
    "assets": (
        "5 in a comparison of all prompts, else 1",
        "5 in a comparison of all prompts, else 1",
        "2 in a comparison of all prompts, else 1",
        1,
    ),
    "reward": ("one-face", "one-face", None, None),
    "geometry_reward": ("none", "none", "sigma", "none"),  # for arms with +geometry
    "steps": (100, 100, 40, 10_000),  # optimisation steps per asset
    "batch": (55, 55, 8, 1),
    "lr": (0.05, 0.05, 0.1, 0.01),
    "lr_end": (0.05, 0.05, 0.05, 1.0),  # learning rate at the end, as a share of lr
    "t_min": ("0.02", "0.02", "0.02", "0,0.98,0.02,8000"),
    # A ramp s0,v0,v1,s1 over 60 % of the steps: later steps use small times only, which add detail.
    "t_max": ("0,0.98,0.15,60", "0,0.98,0.15,60", "0.5", "0,0.98,0.5,8000"),
    "tick": (20, 20, 20, 50),
    "tau_mode": ("quantile", "quantile", None, None),
    # DreamDPO's tau: in half of the steps the gap of the rewards is too small to push the loser away, which
    # keeps the optimisation stable
    "tau": (0.5, 0.5, None, None),
    # the U-Net's unconditional prediction covers the modes of all prompts, so little guidance is enough
    "guidance_scale": (None, 1.5, 1.0, None),
}
BY_SCENE = {
    "compare",
    "method",
    "prompts",
    "assets",
}  # settings that `select_arms` and the function `check` of the scene resolve
CONTROLS = ("inverted", "random")  # arms that a comparison adds for its first method with a reward

OF_METHODS = (*(method.settings for method in METHODS.values()), GeometrySettings)
SETTINGS = (SceneConfig, *OF_METHODS, LoopConfig)


def check_questions(path: str) -> None:
    """Raise FileNotFoundError if there is no file of questions at a path."""
    existing_file(path, "text file with one yes/no question per line")


flags = combine_decorators(
    whole_option(
        "--show",
        group="Run",
        default=4,
        help="Number of assets of which images, a video and meshes are written at the end of the run.",
    ),
    option(
        "--prompt",
        "prompts",
        group=ASSETS,
        metavar="TEXT|FILE",
        multiple=True,
        show_default="none",
        help="Text that describes an asset, or a file with one such text per line. May be repeated.",
    ),
    options_from_settings(SceneConfig, checks={"questions": check_questions}),
    weak_reward_option(group=ASSETS),
    option(
        "--method",
        group=METHOD,
        type=click.Choice(list(METHODS)),
        show_default="the method of --preset, or the arms of --compare",
        help="Distillation method of a run without a comparison.",
    ),
    option(
        "--compare",
        group=METHOD,
        metavar="ARM,...",
        show_default="none",
        help=(
            "Comma-separated list of arms that are compared with the baseline sds on the same prompts and"
            " seeds; sds is always added. An arm is the name of a method;"
            " +geometry at its end adds the gradient of --geometry-reward. As controls, the first method with"
            " a reward also runs with the reward inverted, and with random numbers instead of the reward."
            " Pass --compare=none to run a single method."
        ),
    ),
    option(
        "--preset",
        group=METHOD,
        type=click.Choice(sorted(PRESETS)),
        show_default="none",
        help=(
            "Name of stored settings of a method, for example the settings of the authors' code. The preset"
            " also selects the method."
        ),
    ),
    options_from_settings(*OF_METHODS),
    rare_option(
        "--tau",
        type=float,
        help=(
            "Difference of the rewards of the two compared images above which DreamDPO pushes the asset away"
            " from the image with the lower reward; tau_mode decides its unit. inf: never."
        ),
    ),
    rare_option(
        "--weight",
        metavar="RAMP",
        help=(
            "Weight of the reward's gradient in DreamReward: a number, or a ramp s0,v0,v1,s1, which changes"
            " linearly from v0 at step s0 to v1 at step s1."
        ),
    ),
    options_from_settings(LoopConfig),
)


@dataclass(frozen=True, kw_only=True)
class DistillRun:
    """Settings of a run, as the run's folder records them."""

    settings: DistillSettings
    show: int = 4  # number of assets in the images, the video and the meshes


def prior_kind(prior: str | None) -> str:
    """Return the kind of a prior, one of KINDS.

    Args:
        prior: value of --prior; None: the bundled prior. A value that is not the name of a bundled scene is
            a path and has the kind "files".
    """
    prior = prior or KINDS[0]
    return prior if prior in SCENES else "files"


def default_value(name: str, kind_of_prior: str) -> Any:
    """Look up the default of a setting for a kind of prior. Return None for a kind that is not in KINDS.

    A plugin can register further scenes, whose kinds have no column in DEFAULTS.
    """
    return DEFAULTS[name][KINDS.index(kind_of_prior)] if kind_of_prior in KINDS else None


def default_values(kind_of_prior: str, steps: int | None) -> dict[str, Any]:
    """Return the default settings of a run by name.

    Args:
        kind_of_prior: kind of the prior, one of KINDS.
        steps: number of optimisation steps; None: the default number.

    Returns: the entries of DEFAULTS that are not None, without those that depend on the scene (BY_SCENE).
    """
    default_by_name = {name: default_value(name, kind_of_prior) for name in DEFAULTS.keys() - BY_SCENE}
    if kind_of_prior.startswith("bundled"):
        # the ramp of t_max follows the length of the run: its last number is 60 % of the steps
        default_by_name["t_max"] = f"0,0.98,0.15,{number_text(0.6 * (steps or default_by_name['steps']))}"
    return {name: value for name, value in default_by_name.items() if value is not None}


def select_arms(given_flags: Mapping) -> tuple[str, ...]:
    """Return the names of the arms that the flags select; one name if the run is no comparison.

    Args:
        given_flags: values of the flags that were given, by name.

    Raises: ValueError that names the flag, for an unknown arm or for flags that exclude each other.
    """
    method = given_flags.get("method")
    preset = given_flags.get("preset")
    compared_arms = given_flags.get("compare")
    kind_of_prior = prior_kind(given_flags.get("prior"))
    has_geometry_reward = given_flags.get("geometry_reward", "none") != "none"
    if method is not None and compared_arms not in (None, "none"):
        raise ValueError(f"--method={method} cannot be combined with --compare. Remove one of them.")
    # without any of these flags, the prior's default comparison runs
    if compared_arms is None and not (given_flags.get("prompts") or method or preset):
        compared_arms = default_value("compare", kind_of_prior)
        if compared_arms is not None and has_geometry_reward and "+geometry" not in compared_arms:
            compared_arms += ",sds+geometry"
    # A single method: from --method, else from the preset, else the default of the prior.
    if compared_arms in (None, "none"):
        method_name = method or (
            preset_method(preset) if preset else default_value("method", kind_of_prior) or "dreamdpo"
        )
        return (Arm(method_name, geometry=has_geometry_reward).name,)
    try:
        arms = [Arm.parse(arm_text) for arm_text in compared_arms.split(",")]
    except ValueError as error:
        raise ValueError(f"--compare: {error}") from None
    # The table compares all arms with sds, so sds is always the first arm.
    arms = [Arm("sds"), *(arm for arm in arms if arm != Arm("sds"))]
    # Controls show whether an advantage comes from the reward: its sign is inverted, or random numbers
    # replace it. They belong to the first arm that uses a reward unchanged.
    rewarded_arm = next(
        (arm for arm in arms if METHODS[arm.method].accepts_reward and arm.twist is None), None
    )
    if rewarded_arm is not None:
        control_arms = [Arm(rewarded_arm.method, twist) for twist in CONTROLS]
        arms += [arm for arm in control_arms if arm not in arms]
    # drops arms that are listed twice, keeping the order
    return tuple(dict.fromkeys(arm.name for arm in arms))


def preset_method(preset: str) -> str:
    """Return the name of the method that a preset belongs to."""
    # Exact type, not isinstance: the settings of best-of-n are a subclass of the settings of sds.
    return next(name for name, method in METHODS.items() if type(PRESETS[preset]) is method.settings)


def read_prompts(flag_values: tuple[str, ...]) -> tuple[str, ...]:
    """Return all prompts of the flags --prompt, in order.

    Args:
        flag_values: values of --prompt. A value that is the path of a file is replaced by the lines of the
            file that are not empty; every other value is a prompt.

    Raises: ValueError for a file without a prompt, and for an empty prompt.
    """
    prompts: list[str] = []
    for flag_value in flag_values:
        path = Path(flag_value)
        # file names have at most 255 bytes on common systems; a longer text would be an OSError
        if not (len(flag_value) < 255 and path.is_file()):
            prompts.append(flag_value)
            continue
        with prefix_errors("--prompt"):
            file_text = read_text(path)
        file_prompts = [prompt.strip() for prompt in file_text.splitlines() if prompt.strip()]
        if not file_prompts:
            raise ValueError(f"--prompt: the file {path} has no prompt. Write one prompt per line into it.")
        prompts += file_prompts
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("--prompt: the text is empty. Pass a text that describes the asset.")
    return tuple(prompts)


def resolve(flags: Flags) -> DistillRun:
    """Build the settings of the run from the flags, the preset, and the defaults for the prior.

    Args:
        flags: values of the command line by name; None: the flag was not given.

    Raises: ValueError that names a flag without an effect, or a value that is not allowed.
    """
    given_flags = {name: value for name, value in flags.items() if value is not None}
    # names such as "dreamdpo-random"; `Arm` separates the method from the control
    arm_names = select_arms(given_flags)
    prompts = read_prompts(flags["prompts"])
    kind_of_prior = prior_kind(given_flags.get("prior"))
    arms = [Arm.parse(name) for name in arm_names]
    methods = {arm.method for arm in arms}
    has_geometry_arm = any(arm.geometry for arm in arms)
    reject_unused(given_flags, methods, has_geometry_arm, kind_of_prior)
    # later entries override earlier ones
    values_by_name = {**default_values(kind_of_prior, given_flags.get("steps")), **given_flags}
    if not has_geometry_arm:
        # without an arm that uses it, the reward need not be loaded
        values_by_name["geometry_reward"] = "none"
    if kind_of_prior == "files" and not prompts:
        raise ValueError(
            "--prompt is missing: a prior from files has no built-in prompts. Add a text, such as"
            " --prompt='a bust of a man'."
        )
    if kind_of_prior != "files":
        # chooses the default prompts of the bundled scene, and how many assets of each prompt are optimised
        prompts, values_by_name["assets"] = SCENES[kind_of_prior].check(
            prompts, given_flags.get("assets"), len(arm_names) > 1
        )
    # Only flags that were given override a preset. Without a preset, the defaults for the prior apply, too.
    guidance_values = values_by_name if flags["preset"] is None else given_flags
    # names of the settings that the selected methods use; `guidance_values` may hold further settings
    setting_names = {
        *(
            name
            for name, methods_of_setting in methods_by_setting().items()
            if methods & set(methods_of_setting)
        ),
        *(field.name for field, *_ in knobs_of(GeometrySettings)),
    }
    settings = DistillSettings(
        prompts=prompts,
        arms=arm_names,
        # `settings_from_values` takes the fields of its class and ignores other names
        scene=settings_from_values(SceneConfig, values_by_name),
        loop=settings_from_values(LoopConfig, values_by_name),
        preset=flags["preset"],
        guidance={name: guidance_values[name] for name in sorted(setting_names & guidance_values.keys())},
        seed=flags["seed"],
    )
    return DistillRun(settings=settings, show=flags["show"])


def shown_by_help(flags: Flags) -> list[object]:
    """Return the objects from which --help reads the defaults of the flags: the settings of this run."""
    kind_of_prior = prior_kind(flags["prior"])
    # a prior from files has no default prompt; the placeholder lets the other settings resolve
    prompts = flags["prompts"] or (("...",) if kind_of_prior == "files" else ())
    shown_run = resolve(Flags({**flags, "prompts": prompts}, flags.written))
    arm_names = shown_run.settings.arms
    # values that are no fields of the settings
    selected_defaults = {
        "prompts": flags["prompts"] or default_value("prompts", kind_of_prior),
        "compare": ",".join(arm_names) if len(arm_names) > 1 else "none",
        "method": Arm.parse(arm_names[0]).method if len(arm_names) == 1 else None,
    }
    return [
        selected_defaults,
        *dry_run_values(shown_run)["methods"].values(),
        shown_run.settings.guidance,
        shown_run.settings.scene,
        shown_run.settings.loop,
    ]


def reject_unused(
    given_flags: Mapping, methods: set[str], has_geometry_arm: bool, kind_of_prior: str
) -> None:
    """Raise ValueError, naming the flag, if a given flag has no effect in this run.

    Args:
        given_flags: values of the flags that were given, by name.
        methods: names of the methods of all arms.
        has_geometry_arm: True if an arm uses the geometry reward.
        kind_of_prior: kind of the prior, one of KINDS.
    """
    # setting -> flag without which the setting has no effect, as the object of "only with"
    required_flag_by_setting = {
        name: f"--method={' or '.join(methods_of_setting)}"
        for name, methods_of_setting in methods_by_setting().items()
        if not methods & set(methods_of_setting)
    }
    if not has_geometry_arm:
        required_flag_by_setting |= {
            field.name: "a --geometry-reward other than none" for field, *_ in knobs_of(GeometrySettings)
        }
    if kind_of_prior != "files":
        required_flag_by_setting |= {
            field.name: "a --prior that is the path of a model"
            for field, _, knob in knobs_of(SceneConfig)
            if knob.group == REAL
        }
    if not any(METHODS[name].accepts_reward for name in methods):
        required_flag_by_setting["reward"] = "a --method that uses a reward"
    if not any(METHODS[name].accepts_judge for name in methods):
        required_flag_by_setting["judge"] = "--method=dreamdpo or psd"
    for name in sorted(required_flag_by_setting.keys() & given_flags.keys()):
        raise ValueError(
            f"{flag(name)} has an effect only with {required_flag_by_setting[name]}. Add this flag, or remove"
            f" {flag(name)}."
        )
    if given_flags.get("geometry_reward", "none") != "none" and not has_geometry_arm:
        raise ValueError(
            "--geometry-reward has no effect, because no arm of --compare ends in +geometry. Add an arm such"
            " as sds+geometry to --compare."
        )


def open_run(run_settings: DistillRun, run: "Run") -> "Scene":
    """Load the scene of a run: its prior, renderer and rewards, on the device of the run.

    Raises: ValueError or OSError for a file that is missing or cannot be used.
    """
    # imported here, because --help must not load these modules
    import torch

    from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_accuracy
    from eg3d_rlhf.tuning.distill.guidance.geometry import announce_geometry
    from eg3d_rlhf.tuning.distill.scene import open_scene

    scene_settings = run_settings.settings.scene
    scene = open_scene(run_settings.settings, torch.device(run.device))
    use = RewardUse(
        tunes=True,
        # The reward of a resumed run was accepted when the run began.
        allows_weak=run.resumed is not None or bool(run.flags.get("weak_reward")),
        is_main=run.ranks.is_main,
    )
    announce_geometry(scene_settings.geometry_reward, use)
    # Files of published rewards of images state no accuracy. Rewards of the bundled problems have no labels.
    if scene_settings.reward is not None and scene_settings.prior not in SCENES:
        announce_accuracy({}, "--reward", use)
    # The hashes of these files are stored with the run, so that a resume with changed files is rejected.
    run.inputs = dict(scene.inputs)
    return scene


def title(run_settings: DistillRun, scene: "Scene") -> str:
    """Return the name of the run's folder: distill, the name of the prior, and the arm."""
    settings = run_settings.settings
    # The names of several arms would be too long for the name of a folder.
    arm_part = "compare" if len(settings.arms) > 1 else settings.arms[0]
    return f"distill-{Path(settings.scene.prior).stem}-{arm_part}"


def work(run_settings: DistillRun, scene: "Scene", run: "Run") -> None:
    """Optimise all assets in all arms, then write images, a video, meshes and the table of win rates.

    Under torchrun, all processes optimise, and the first process writes the outputs.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.distill import outputs
    from eg3d_rlhf.tuning.distill.distill_run import distil_all, gather_stats
    from training import rehearsal
    from training.distributed import leave

    settings = run_settings.settings
    if run.ranks.is_main:
        asset_count = len(settings.pairs())
        arm_count = len(settings.arms)
        # "s" * False is the empty text: the singular
        print(
            f"{asset_count} assets x {arm_count} arm{'s' * (arm_count > 1)}, {settings.loop.steps} steps"
            " each.",
            flush=True,
        )
    distil_all(settings, scene, run)
    leave()  # closes the process group: the other processes end while the first process renders
    if rehearsal.active():
        if run.ranks.is_main:
            outputs.rehearse(settings, scene, run, run_settings.show)
    elif run.ranks.is_main:
        gather_stats(settings, run)
        outputs.write(settings, scene, run, run_settings.show)
        print(f"Done: {run.folder}", flush=True)


def recorded(folder: Path, flags: Flags, ranks: object) -> DistillRun:
    """Read the settings of a run from its folder, for --resume.

    Args:
        folder: folder of the run.
        flags: not used.
        ranks: not used.

    Raises: FileNotFoundError if the folder has no record; ValueError if another mode wrote it.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.experiments.run_record import recorded_by

    run_record = recorded_by(folder, "distill")
    return DistillRun(settings=DistillSettings.from_dict(run_record["settings"]), show=run_record["show"])


def dry_run_values(run_settings: DistillRun) -> dict:
    """Return the JSON of --dry-run: the settings of the run, and all settings of each arm's method."""
    settings = run_settings.settings
    settings_by_arm = {}
    for arm_name in settings.arms:
        method_settings = make_settings(Arm.parse(arm_name).method, settings.guidance, settings.preset)
        # A `Ramp` is printed as the text that its flag takes, which is its field `spec`.
        settings_by_arm[arm_name] = {
            name: getattr(setting_value, "spec", setting_value)
            for name, setting_value in flatten_settings(method_settings).items()
        }
    return {**settings.to_dict(), "methods": settings_by_arm}


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
    shown=dry_run_values,
    defaults=shown_by_help,
    on_cpu=lambda run: run.settings.scene.prior in SCENES,  # the bundled problems are small enough for a CPU
    jobs="all arms and assets",
    check_rehearsal=lambda settings, flags: None,  # every run can be rehearsed
    help="""Generate 3D assets from texts by score distillation, whose gradient can contain a reward. Without
    flags, the run optimises the prompts of the bundled problem with several methods on the same seeds, and
    writes a table of win rates against plain score distillation (sds).
    --resume=RUN resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode=distill
        python train.py --mode=distill --method=dreamdpo --prompt="a white head with a red nose"
    """,
)
MODES.add("distill", DISTILL)
