"""Mode of inversion (`generator invert`): reconstructs a shape from an image, for each weight of a reward.

Reads the flags, opens what they name, runs the inversions and writes images and a page.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming, numbers_of, option, options_of, together
from eg3d_rlhf.evaluation.inversion.settings import PUBLISHED, InversionConfig
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.modes.shared_flags import FILE, rare_option, shared

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Inversions, Setup
    from eg3d_rlhf.experiments.run import Run

PRESETS = {"small": {}, "published": PUBLISHED}
WEIGHTS = "0,0.01,0.03,0.1,0.3,1"  # weights of the reward, one column of the strip each
_target_option = functools.partial(option, group="Target")


def parse_weights(text: str) -> list[float]:
    """Parse the weights of the reward, in rising order.

    Raises: ValueError unless they are distinct finite numbers >= 0.
    """
    weights = sorted(numbers_of("--weights", text))
    # weights that print alike would share a file name
    different = len({f"{weight:g}" for weight in weights})
    if not all(math.isfinite(w) and w >= 0 for w in weights) or different < max(1, len(weights)):
        raise ValueError(
            f"--weights: expected distinct numbers >= 0, such as {WEIGHTS}, got {text!r}. Correct the list."
        )
    return weights


@dataclass(frozen=True, kw_only=True)
class InversionRun:
    """Settings of an inversion run: targets, networks, optimisation and outputs. Files are given by path."""

    image: str | None = None  # target: an image file, or `latents`
    mask: str | None = None  # grey image; white pixels count
    camera: str | None = None  # in the notation of `parse_camera`; None: frontal
    latents: str | None = None  # seeds of samples that serve as targets
    psi: float = 1.0  # truncation of the samples
    start: str = "mean"  # first latent: "mean", or "truth" for samples
    network: str | None = None  # None: the bundled one
    reward_ckpt: str | None = None  # None: the bundled one, where a weight is above 0
    heldout_reward: str | None = None
    data: str | None = None
    perceptual: str | None = None
    weights: tuple[float, ...]  # of the reward, rising
    shown: int = 1  # number of targets with images and meshes
    shape_res: int = 128  # grid points per axis; 0: no meshes
    turns: int = 12  # views of the orbit; 0: no orbit
    config: InversionConfig

    def __post_init__(self) -> None:
        if (self.image is None) == (self.latents is None):
            got = "none. Give one." if self.image is None else "both. Remove one."
            raise ValueError(f"--image, --latents: exactly one of them is needed, got {got}")
        if self.latents is not None and self.mask is not None:
            raise ValueError("--mask cannot be combined with --latents. Remove --mask.")
        if self.image is not None and self.start == "truth":
            raise ValueError(
                "--start=truth needs --latents: the true latent of --image is unknown. Use --start=mean."
            )
        if 0 < self.shape_res < 16 or self.turns == 1:
            raise ValueError("--shape-res must be 0 or at least 16, --turns 0 or at least 2. Correct them.")


def resolve(flags: Flags) -> InversionRun:
    """Build the settings of the run from the flags. Raises: ValueError naming the flag."""
    weights = tuple(parse_weights(flags["weights"]))
    # a flag that was given overrides the preset
    config = InversionConfig(**{**PRESETS[flags["preset"]], **flags.of(InversionConfig)})
    names = [name for name in InversionRun.__dataclass_fields__ if name not in ("weights", "config")]
    # paths become text, because the settings are recorded as JSON
    given: dict[str, Any] = {
        name: str(flags[name]) if isinstance(flags[name], Path) else flags[name] for name in names
    }
    return InversionRun(**given, weights=weights, config=config)


def recorded(folder: Path, *_: object) -> InversionRun:
    """Read the settings of a run folder. Raises: FileNotFoundError, ValueError for another folder."""
    from eg3d_rlhf.experiments.run import recorded_by

    # JSON has no tuples and no dataclasses
    settings = recorded_by(folder, "inversion")["settings"]
    return InversionRun(
        **{**settings, "weights": tuple(settings["weights"]), "config": InversionConfig(**settings["config"])}
    )


def open_setup(s: InversionRun, run: "Run") -> "Setup":
    """Load and check the files that the settings name, and record them as inputs of the run.

    Raises: ValueError naming the flag.
    """
    from eg3d_rlhf.evaluation.comparison import judged_by_annotator
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Setup
    from eg3d_rlhf.evaluation.inversion.projector import Guidance, load_perceptual, prior_of
    from eg3d_rlhf.evaluation.inversion.targets import (
        Evaluators,
        annotator_evaluator,
        of_file,
        of_seed,
        parse_camera,
        reward_evaluator,
    )
    from eg3d_rlhf.experiments.media.rendering import parse_seeds
    from eg3d_rlhf.experiments.media.video import check_mp4
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import check_reward, load_reward

    # fails at once if the encoder for the orbit's video is missing
    if s.turns:
        check_mp4("orbit.mp4")
    with naming("--network"):
        loaded = load_generator(s.network, run.device)
    generator = loaded.generator
    with naming("--camera"):
        label = parse_camera(generator, s.camera)
    with naming("--perceptual"):
        features = load_perceptual(
            None if s.perceptual is None else Path(s.perceptual), generator.img_resolution, run.device
        )
    # weights of 0 alone need no reward
    guided = s.reward_ckpt is not None or max(s.weights) > 0
    files = {
        "reward-ckpt": (s.reward_ckpt or bundled.REWARD) if guided else None,
        "heldout-reward": s.heldout_reward,
    }
    rewards = {}
    for flag, path in files.items():
        if path is not None:
            with naming(f"--{flag}"):
                rewards[flag] = load_reward(path, run.device)
            check_reward(rewards[flag], generator, f"--{flag}")
    reward = rewards.get("reward-ckpt")
    heldout_reward = rewards.get("heldout-reward")
    # a held-out reward evaluates if one is given, else the simulated annotator where the latents allow it
    evaluators = Evaluators(reward=reward)
    if heldout_reward is not None:
        evaluators = Evaluators(
            reward=reward,
            evaluator=reward_evaluator(heldout_reward),
            name=f"reward {Path(s.heldout_reward or '').stem}",
        )
    elif judged_by_annotator(loaded, s.data):
        evaluators = Evaluators(
            reward=reward, evaluator=annotator_evaluator, name="the simulated annotator without noise"
        )
    if s.image is not None:
        # one target from a file
        cases = [of_file(generator, Path(s.image), None if s.mask is None else Path(s.mask), label)]
    else:
        with naming("--latents"):
            seeds = dict.fromkeys(parse_seeds(s.latents or ""))
        cases = [of_seed(generator, seed, label, s.psi) for seed in seeds]
    files |= {"network": loaded.path, "image": s.image, "mask": s.mask, "perceptual": s.perceptual}
    run.inputs |= {name: path for name, path in files.items() if path is not None}
    return Setup(
        loaded=loaded,
        perceptual=features,
        prior=prior_of(generator),
        guidance=None if reward is None else Guidance(generator, reward),
        evaluators=evaluators,
        cases=cases,
        weights=s.weights,
        config=s.config,
        from_truth=s.start == "truth",
        shown=min(s.shown, len(cases)),
    )


def work(s: InversionRun, setup: "Setup", run: "Run") -> None:
    """Run, or resume, all inversions and write the outputs."""
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Inversions

    inversions = Inversions(run, setup)
    weights = ",".join(f"{weight:g}" for weight in s.weights)
    click.echo(
        f"{len(setup.cases)} target(s), weights {weights}, perceptual features {setup.perceptual.name}"
    )
    # finished inversions of an interrupted run are kept
    inversions.go()
    finish(inversions, s.shape_res, s.turns)


def finish(inversions: "Inversions", shape_res: int, turns: int) -> None:
    """Render the shown targets, write inversion.json and the page, and print the conclusions."""
    from eg3d_rlhf.evaluation.inversion import inversion_report as report
    from eg3d_rlhf.evaluation.inversion.inversion_runs import write_json
    from eg3d_rlhf.experiments import pages

    setup = inversions.setup
    folder = inversions.run.folder
    for case in setup.cases[: setup.shown]:
        report.draw(inversions, case, shape_res, turns)
    # one per target and weight
    records = inversions.records()
    summary = report.summarise(records, setup.weights)
    facts = {
        "perceptual": setup.perceptual.name,
        "evaluator": setup.evaluators.name,
        "targets": len(setup.cases),
    }
    write_json(folder / "inversion.json", {**facts, **summary, "records": records})
    parts = report.jobs(inversions)
    findings = pages.run(parts, folder, quiet=True)
    count = "One target" if len(setup.cases) == 1 else f"{len(setup.cases)} targets"
    says = report.summary_sentences(summary, setup.evaluators.name, setup.perceptual.name)
    introduction = (
        f"{count} under {setup.loaded.path.name}: {setup.config.w_steps} steps on a latent, then"
        f" {setup.config.pivot_steps} on a copy of the generator for every weight of the reward. Weight 0"
        " is the projector without a reward."
    )
    page = pages.write_page(folder / "index.html", report.TITLE, introduction, parts, findings, says)
    click.echo("\n".join(says))
    click.echo(f"\nWritten to {folder}: {page.name} (open it in a browser), inversion.json, targets/")


_FLAGS = together(
    _target_option(
        "--image", metavar="FILE", type=FILE, help="Target image; it must have the generator's resolution."
    ),
    _target_option(
        "--mask",
        metavar="FILE",
        type=FILE,
        show_default="all pixels",
        help="Grey image; only white pixels enter the loss.",
    ),
    _target_option(
        "--camera",
        metavar="YAW,PITCH|25 NUMBERS|JSON",
        show_default="frontal",
        help=(
            "Camera of the image: yaw and pitch in radians, or 16 numbers of cam2world and 9 of the"
            " intrinsics."
        ),
    ),
    _target_option(
        "--latents",
        "latents",
        metavar="LIST",
        help="Seeds of generated samples that serve as targets, such as 0,2-5.",
    ),
    rare_option(
        "--psi", type=click.FloatRange(min=0), default=1.0, help="Truncation psi of the samples of --latents."
    ),
    rare_option(
        "--start",
        type=click.Choice(["mean", "truth"]),
        default="mean",
        help="First latent: the mean w, or the true one (with --latents).",
    ),
    shared(
        "network reward-ckpt heldout-reward",
        "data",
        network={"group": "What"},
        reward_ckpt={
            "show_default": "bundled, where a weight is above 0",
            "help": "Reward that guides the inversion.",
        },
        heldout_reward={
            "show_default": "the simulated annotator, for synthetic heads",
            "help": "Held-out reward that serves as the evaluator.",
        },
        data="Dataset that the generator was trained on; by default that of its run.",
    ),
    rare_option(
        "--perceptual",
        type=FILE,
        help="Perceptual network: TorchScript (the projectors' VGG16) or our .safetensors.",
    ),
    option(
        "--weights",
        group="What",
        metavar="LIST",
        default=WEIGHTS,
        help="Weights of the reward, comma-separated; each gives one generator.",
    ),
    option(
        "--preset",
        group="Stages",
        metavar="NAME",
        type=click.Choice(list(PRESETS)),
        default="small",
        help=(
            "Settings of both stages: small, or published (those of EG3D's projectors). Other flags"
            " override it."
        ),
    ),
    options_of(InversionConfig),
    rare_option(
        "--shown",
        type=click.IntRange(min=0),
        default=1,
        help="Number of targets for which strip, orbit, meshes and generators are written.",
    ),
    rare_option(
        "--shape-res",
        type=click.IntRange(0, 1024),
        default=128,
        help="Grid points per axis of the meshes; 0: no meshes.",
    ),
    rare_option(
        "--turns", type=click.IntRange(min=0), default=12, help="Number of views of the orbit; 0: no orbit."
    ),
)
HELP = """Reconstruct a shape from one image, with a reward on geometry: first find a latent for the image,
then fine-tune the generator around it, once for each weight of the reward.

Give an image with its camera, or --latents: samples of the generator, whose ground truth is known, so that
all errors can be measured. Writes a run folder: for each target a strip, an orbit, a mesh and a generator
per weight; index.html with curves; inversion.json.

\b
Example:
    eg3d-rlhf generator invert --latents=3 --weights=0,0.1 --set=w_steps=8 --set=pivot_steps=4 --set=turns=0
"""
INVERSION = Mode(
    name="inversion",
    settings=InversionRun,
    open=open_setup,
    work=work,
    flags=_FLAGS,
    resolve=resolve,
    recorded=recorded,
    help=HELP,
)
main = INVERSION.command
