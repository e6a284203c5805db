"""The job `generator invert`: reconstructs a shape from one image, once for each weight of a reward.

Inversion follows EG3D's projectors: it first optimises a latent w so that the generator renders the image,
and then fine-tunes a copy of the generator at this latent (pivotal tuning, arXiv:2106.05744). A reward on
geometry is added to the loss of the second stage with a weight. This module reads the flags, opens the files,
runs the inversions, and writes images and a page.
"""

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, parse_numbers, prefix_errors
from eg3d_rlhf.core.input_paths import check_torchscript_file
from eg3d_rlhf.core.seeds import parse_seeds
from eg3d_rlhf.evaluation.inversion.settings import PUBLISHED, InversionConfig
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.modes.shared_flags import FILE, rare_option, shared
from eg3d_rlhf.modes.weak_reward import weak_reward_option

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Inversions, Setup
    from eg3d_rlhf.evaluation.inversion.photograph import TargetPhoto
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.generators import Generator

PRESETS = {"small": {}, "published": PUBLISHED}
WEIGHTS = "0,0.01,0.03,0.1,0.3,1"  # default weights of the reward; each is one column of the image strip
_target_option = functools.partial(option, group="Target")


def parse_weights(weights_text: str) -> list[float]:
    """Parse the value of --weights, and return the weights of the reward in rising order.

    Raises: ValueError unless they are distinct finite numbers >= 0, and for an empty list.
    """
    weights = sorted(parse_numbers("--weights", weights_text))
    # Files are named by the text of a weight, so weights with equal texts would overwrite each other's files.
    distinct_count = len({f"{weight:g}" for weight in weights})
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or distinct_count < max(
        1, len(weights)
    ):
        raise ValueError(
            f"--weights: {weights_text!r} is not a list of distinct finite numbers >= 0. Write the weights"
            f" separated by commas, such as {WEIGHTS}, each weight once."
        )
    return weights


@dataclass(frozen=True, kw_only=True)
class InversionRun:
    """Settings of an inversion run: targets, networks, optimisation and outputs. Files are given by path."""

    image: str | None = None  # target: an image file, or `latents`
    mask: str | None = None  # grey image whose brightness weights the pixels; None: all pixels count
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
        if self.image is None and self.latents is None:
            raise ValueError(
                "generator invert: the target is missing. Add --image=FILE, or --latents=LIST for samples of"
                " the generator."
            )
        if self.image is not None and self.latents is not None:
            raise ValueError("--image cannot be combined with --latents. Remove one of them.")
        if self.latents is not None and self.mask is not None:
            raise ValueError("--mask cannot be combined with --latents, which have no image. Remove --mask.")
        if self.image is not None and self.start == "truth":
            raise ValueError(
                "--start=truth cannot be combined with --image, whose true latent is unknown. Use"
                " --start=mean."
            )
        # 0 means no meshes; `MeshOptions` needs at least 16 points
        if 0 < self.shape_res < 16:
            raise ValueError(
                f"--shape-res={self.shape_res} is too small. Use 16 or more points, or 0 for no meshes."
            )
        # 0 means no orbit; one view would be no video
        if self.turns == 1:
            raise ValueError("--turns=1 is no orbit. Use 2 or more views, or 0 for no orbit.")


def resolve(flags: Flags) -> InversionRun:
    """Build the settings of the run from the flags.

    Raises: ValueError that names a flag with a wrong value, or two flags that exclude each other.
    """
    weights = tuple(parse_weights(flags["weights"]))
    # A flag that was given overrides the preset.
    inversion_config = InversionConfig(**{**PRESETS[flags["preset"]], **flags.values_for(InversionConfig)})
    # The other fields have the names of their flags.
    field_names = [
        field_name
        for field_name in InversionRun.__dataclass_fields__
        if field_name not in ("weights", "config")
    ]
    # Paths become texts, because the settings are recorded as JSON.
    flag_values: dict[str, Any] = {
        field_name: str(flags[field_name]) if isinstance(flags[field_name], Path) else flags[field_name]
        for field_name in field_names
    }
    return InversionRun(**flag_values, weights=weights, config=inversion_config)


def recorded(folder: Path, *_: object) -> InversionRun:
    """Read the settings of a run from its folder, for --resume.

    Raises: FileNotFoundError if the folder has no record; ValueError if another mode wrote it.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.experiments.run_record import recorded_by

    # JSON has no tuples and no dataclasses, so both are restored.
    settings = recorded_by(folder, "inversion")["settings"]
    return InversionRun(
        **{**settings, "weights": tuple(settings["weights"]), "config": InversionConfig(**settings["config"])}
    )


def open_setup(settings: InversionRun, run: "Run") -> "Setup":
    """Load and check the files that the settings name, and record them as inputs of the run.

    Args:
        settings: settings of the run.
        run: the run, on whose device the networks are loaded.

    Raises: ValueError that names the flag of a file that is missing or does not fit.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.evaluation.comparison import annotator_can_score
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Setup
    from eg3d_rlhf.evaluation.inversion.projector import estimate_prior, load_perceptual
    from eg3d_rlhf.evaluation.inversion.targets import (
        Evaluators,
        annotator_evaluator,
        case_from_file,
        case_from_seed,
        parse_camera,
        reward_evaluator,
    )
    from eg3d_rlhf.experiments.media.video import check_mp4
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import check_reward, load_reward
    from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_reward
    from eg3d_rlhf.tuning.gan.latent_search import Guidance

    # Fails at once if the video encoder for the orbit is missing.
    if settings.turns:
        check_mp4("orbit.mp4")
    # an error in this block begins with the name --network
    with prefix_errors("--network"):
        loaded_network = load_generator(settings.network, run.device)
    generator = loaded_network.generator
    # an error in this block begins with the name --camera
    with prefix_errors("--camera"):
        camera_label = parse_camera(generator, settings.camera)
    # an error in this block begins with the name --perceptual
    with prefix_errors("--perceptual"):
        perceptual_network = load_perceptual(
            None if settings.perceptual is None else Path(settings.perceptual),
            generator.img_resolution,
            run.device,
        )
    # If all weights are 0, a reward is loaded only when the user named one; then it is only measured.
    needs_reward = settings.reward_ckpt is not None or max(settings.weights) > 0
    input_files = {
        "reward-ckpt": (settings.reward_ckpt or bundled.REWARD) if needs_reward else None,
        "heldout-reward": settings.heldout_reward,
    }
    rewards = {}
    for flag_name, file_path in input_files.items():
        if file_path is not None:
            # an error names the flag of the file that caused it
            with prefix_errors(f"--{flag_name}"):
                rewards[flag_name] = load_reward(file_path, run.device)
            check_reward(rewards[flag_name], generator, f"--{flag_name}")
    reward = rewards.get("reward-ckpt")
    heldout_reward = rewards.get("heldout-reward")
    # The evaluator is the held-out reward if it was given. Otherwise it is the simulated annotator, if the
    # latents of the generator describe synthetic heads.
    evaluators = Evaluators(reward=reward)
    if heldout_reward is not None and reward is not None and heldout_reward.shares_network_with(reward):
        raise ValueError(
            f"--heldout-reward={settings.heldout_reward} is the reward of --reward-ckpt itself, or shares a"
            " network with it, so it is no independent evaluator. Pass a reward that was trained on other"
            " labels, or remove --heldout-reward."
        )
    if heldout_reward is not None:
        evaluators = Evaluators(
            reward=reward,
            evaluator=reward_evaluator(heldout_reward),
            name=f"reward {Path(settings.heldout_reward or '').stem}",
        )
    elif annotator_can_score(loaded_network, settings.data):
        evaluators = Evaluators(
            reward=reward, evaluator=annotator_evaluator, name="the simulated annotator without noise"
        )
    target_photo = None
    if settings.image is not None:
        if settings.camera is None:
            # an error in this block begins with the name --image
            with prefix_errors("--image"):
                target_photo = estimate_target(generator, Path(settings.image), run)
        target_cases = [
            case_from_file(
                generator,
                Path(settings.image),
                None if settings.mask is None else Path(settings.mask),
                camera_label if target_photo is None else target_photo.camera(generator),
                None if target_photo is None else target_photo.frame,
            )
        ]
    else:
        # an error in this block begins with the name --latents
        with prefix_errors("--latents"):
            # a seed that is listed twice is used once
            seeds = dict.fromkeys(parse_seeds(settings.latents or ""))
        target_cases = [case_from_seed(generator, seed, camera_label, settings.psi) for seed in seeds]
    input_files |= {
        "network": loaded_network.path,
        "image": settings.image,
        "mask": settings.mask,
        "perceptual": settings.perceptual,
    }
    run.inputs |= {name: file_path for name, file_path in input_files.items() if file_path is not None}
    # The last check, so that another mistake is reported in one line.
    for flag_name, used_reward in rewards.items():
        use = RewardUse(
            tunes=flag_name == "reward-ckpt" and max(settings.weights) > 0,
            # The reward of a resumed run was accepted when the run began.
            allows_weak=run.resumed is not None or bool(run.flags.get("weak_reward")),
        )
        announce_reward(used_reward, f"--{flag_name}", use)
    return Setup(
        loaded=loaded_network,
        perceptual=perceptual_network,
        # distribution of w, which keeps the latent near the latents of samples
        prior=estimate_prior(generator),
        guidance=None if reward is None else Guidance(generator, reward, is_channels_last=True),
        evaluators=evaluators,
        cases=target_cases,
        weights=settings.weights,
        config=settings.config,
        from_truth=settings.start == "truth",
        shown=min(settings.shown, len(target_cases)),
        photo=target_photo,
    )


def estimate_target(generator: "Generator", image_path: Path, run: "Run") -> "TargetPhoto | None":
    """Estimate the crop and the camera of the target, or read those with which a resumed run began.

    Returns: None if the image is the target as it is, with the frontal camera.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.evaluation.inversion.photograph import TargetPhoto, find_target
    from eg3d_rlhf.experiments.run_record import recorded

    if run.resumed is not None:
        # A run of an earlier version has no such record; its camera is the frontal one.
        record = recorded(run.folder).get("photograph")
        return None if record is None else TargetPhoto.from_record(record)
    target_photo, notes = find_target(generator, image_path)
    for note in notes:
        click.echo(note, err=note.startswith("Warning:"))
    return target_photo


def record_of(settings: InversionRun, setup: "Setup") -> dict[str, Any]:
    """Return the content of training_options.json, with an estimated camera if there is one."""
    record: dict[str, Any] = {"mode": "inversion", "settings": asdict(settings)}
    if setup.photo is not None:
        record["photograph"] = setup.photo.record()
    return record


def work(settings: InversionRun, setup: "Setup", run: "Run") -> None:
    """Run all inversions of a new run, or the inversions that a resumed run lacks, and write the outputs."""
    # imported here, because --help must not load these modules
    from eg3d_rlhf.evaluation.inversion.inversion_runs import Inversions
    from eg3d_rlhf.evaluation.inversion.photograph import write_target

    if setup.photo is not None and run.ranks.is_main:
        # [1, 3, R, R] in -1..1 -> uint8 [R, R, 3]
        target_pixels = ((setup.cases[0].target.image[0].permute(1, 2, 0) + 1) * 127.5).round()
        write_target(run.folder, setup.photo, target_pixels.byte().cpu().numpy())
    inversions = Inversions(run, setup)
    weight_text = ",".join(f"{weight:g}" for weight in settings.weights)
    click.echo(
        f"{len(setup.cases)} target(s), weights {weight_text}, perceptual features {setup.perceptual.name}"
    )
    # Inversions that an earlier call has finished are read from the folder.
    inversions.run_missing()
    finish(inversions, settings.shape_res, settings.turns)


def finish(inversions: "Inversions", shape_res: int, turns: int) -> None:
    """Render the first targets, write inversion.json and the page, and print the conclusions.

    Args:
        inversions: the finished inversions.
        shape_res: grid points per axis of the meshes; 0: no meshes.
        turns: number of views of the orbit; 0: no orbit.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.evaluation.inversion import inversion_report as report
    from eg3d_rlhf.evaluation.inversion.inversion_runs import write_json
    from eg3d_rlhf.experiments import pages

    setup = inversions.setup
    folder = inversions.run.folder
    for case in setup.cases[: setup.shown]:
        report.draw(inversions, case, shape_res, turns)
    # one record for each target and weight
    case_records = inversions.records()
    inversion_summary = report.summarise(case_records, setup.weights)
    run_facts = {
        "perceptual": setup.perceptual.name,
        "evaluator": setup.evaluators.name,
        "targets": len(setup.cases),
    }
    write_json(folder / "inversion.json", {**run_facts, **inversion_summary, "records": case_records})
    page_parts = report.jobs(inversions)
    # quiet: the conclusions are printed below instead
    findings = pages.run(page_parts, folder, quiet=True)
    target_text = "One target" if len(setup.cases) == 1 else f"{len(setup.cases)} targets"
    sentences = report.summary_sentences(inversion_summary, setup.evaluators.name, setup.perceptual.name)
    introduction = (
        f"{target_text} under {setup.loaded.path.name}: {setup.config.w_steps} steps on a latent, then"
        f" {setup.config.pivot_steps} on a copy of the generator for every weight of the reward. Weight 0"
        " is the projector without a reward."
    )
    page_path = pages.write_page(
        folder / "index.html", report.TITLE, introduction, page_parts, findings, sentences
    )
    click.echo("\n".join(sentences))
    click.echo(f"\nWritten to {folder}: {page_path.name} (open it in a browser), inversion.json, targets/")


def check_image(path: Path) -> None:
    """Raise ValueError if there is no image file at a path."""
    if not path.is_file():
        raise ValueError(f"{path}: the file does not exist. Check the path.")


_FLAGS = combine_decorators(
    _target_option(
        "--image",
        metavar="FILE",
        type=FILE,
        check=check_image,
        help=(
            "Target image of the generator's size; or, without --camera, a photograph of any size, whose face"
            " is cropped as EG3D's images are."
        ),
    ),
    _target_option(
        "--mask",
        metavar="FILE",
        type=FILE,
        check=check_image,
        show_default="all pixels",
        help=(
            "Grey image of the same size as --image, whose brightness is the weight of each pixel in the"
            " loss: white pixels count fully, black pixels do not count."
        ),
    ),
    _target_option(
        "--camera",
        metavar="YAW,PITCH|25 NUMBERS|JSON",
        show_default="estimated from the face in --image, else frontal",
        help=(
            "Camera of the image: yaw and pitch in radians; or a camera label of 25 numbers (16 of cam2world,"
            " 9 of the intrinsics); or the path of a .json file with a list of these 2 or 25 numbers."
        ),
    ),
    _target_option(
        "--latents",
        "latents",
        metavar="LIST",
        check=parse_seeds,
        help="Seeds of samples of the generator whose images are the targets, such as 0,2-5.",
    ),
    rare_option(
        "--psi",
        type=click.FloatRange(min=0),
        default=1.0,
        help="Truncation psi of the samples that --latents names; 1 means no truncation.",
    ),
    rare_option(
        "--start",
        type=click.Choice(["mean", "truth"]),
        default="mean",
        help=(
            "Latent at which the optimisation starts: the mean of w (mean), or the latent of the sample"
            " (truth), which needs --latents."
        ),
    ),
    shared(
        "network reward-ckpt heldout-reward",
        "data",
        network={"group": "What"},
        reward_ckpt={
            "show_default": "the bundled reward, if a weight is above 0",
            "help": "Reward on the geometry that is added to the loss of the inversion.",
        },
        heldout_reward={
            "show_default": "the simulated annotator, for synthetic heads",
            "help": "Held-out reward file that evaluates the reconstructed shapes.",
        },
        data=(
            "Dataset that the generator was trained on; the simulated annotator evaluates only generators of"
            " synthetic heads."
        ),
    ),
    rare_option(
        "--perceptual",
        type=FILE,
        check=check_torchscript_file,
        show_default="the bundled network",
        help=(
            "Network of the perceptual loss: the TorchScript file of VGG16 that EG3D's projectors use, or"
            " a .safetensors file of this project."
        ),
    ),
    weak_reward_option(group="What"),
    option(
        "--weights",
        group="What",
        metavar="LIST",
        default=WEIGHTS,
        help="Weights of the reward in the loss, separated by commas. For each, one generator is tuned.",
    ),
    option(
        "--preset",
        group="Stages",
        metavar="NAME",
        type=click.Choice(list(PRESETS)),
        default="small",
        help=(
            "Default settings of both stages: small, or published, the settings of EG3D's projectors. Other"
            " flags override them."
        ),
    ),
    options_from_settings(InversionConfig),
    rare_option(
        "--shown",
        type=click.IntRange(min=0),
        default=1,
        help="Number of targets for which images, an orbit, meshes and generators are written.",
    ),
    rare_option(
        "--shape-res",
        type=click.IntRange(0, 1024),
        default=128,
        help="Grid points per axis of the meshes; 0: no meshes.",
    ),
    rare_option(
        "--turns",
        type=click.IntRange(min=0),
        default=12,
        help="Number of views of the camera orbit around the shape; 0: no orbit.",
    ),
)
HELP = """Reconstruct a shape from one image, with a reward on geometry: first find a latent for the image,
then fine-tune the generator around it, once for each weight of the reward.

The target is a photograph of a face, an image with its camera, or a sample of the generator (--latents). The
true shape of a sample is known, so that the error of the reconstruction can be measured. The command writes a
run folder with index.html, inversion.json, and for each target a strip of images, an orbit, and a mesh and a
generator for each weight.

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
    record=record_of,
    recorded=recorded,
    help=HELP,
)
main = INVERSION.command
