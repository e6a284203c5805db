"""The command that inverts: from flags to a setup, a run of inversions, pictures and a page."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option, options_of
from eg3d_rlhf.evaluation.comparison import judged_by_annotator
from eg3d_rlhf.evaluation.flags import shared
from eg3d_rlhf.evaluation.inversion import report
from eg3d_rlhf.evaluation.inversion.projector import PUBLISHED, Guidance, InversionConfig, load_perceptual, prior_of
from eg3d_rlhf.evaluation.inversion.report import draw
from eg3d_rlhf.evaluation.inversion.run import Inversions, Setup, write_json
from eg3d_rlhf.evaluation.inversion.targets import Judges, annotator_judge, of_file, of_seed, parse_camera, reward_judge
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.media.video import check_mp4
from eg3d_rlhf.experiments.pages import write_page
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import OPTIONS, Run, claim, next_free
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.rewards.reward import check_reward, load_reward

FILE = click.Path(path_type=Path, dir_okay=False)
PRESETS = {"small": {}, "published": PUBLISHED}
WEIGHTS = "0,0.01,0.03,0.1,0.3,1"  # of the strip


def parse_weights(text: str) -> list[float]:
    """Weights of the reward in rising order. Raises: ValueError for anything but different finite numbers >= 0."""
    try:
        weights = sorted(float(part) for part in text.split(","))
    except ValueError:
        weights = [math.nan]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or len({f"{w:g}" for w in weights}) < len(weights):
        raise ValueError(f"expected different numbers >= 0 such as {WEIGHTS}, got {text!r}. Correct the list.")
    return weights


def resolve(image, mask, camera, seeds, psi, start, network, reward_ckpt, reward_watch, data, perceptual, weights, shown, preset, device,
            **flags) -> tuple[Setup, dict[str, Path]]:  # fmt: skip
    """Load and check what the flags name; files by the names under which a run records them. Raises: ValueError naming the flag."""
    if (image is None) == (seeds is None):
        got = "none. Name a target." if image is None else "both. Leave one out."
        raise ValueError(f"--image, --seeds: expected one of them, got {got}")
    if seeds is not None and mask is not None:
        raise ValueError("--mask: expected none with --seeds, got one. Leave it out.")
    if image is not None and start == "truth":
        raise ValueError("--start: expected mean with --image, whose truth is not known, got truth. Leave it out.")
    config = InversionConfig(**{**PRESETS[preset], **{name: value for name, value in flags.items() if value is not None}})
    with naming("--weights"):
        lambdas = parse_weights(weights)
    where = choose_device(device)
    with naming("--network"):
        loaded = load_generator(network, where)
    generator, inputs = loaded.generator, {"network": loaded.path}
    with naming("--camera"):
        label = parse_camera(generator, camera)
    with naming("--perceptual"):
        features = load_perceptual(perceptual, generator.img_resolution, where)
    found = {}
    guided = reward_ckpt is not None or max(lambdas) > 0
    for flag, path in (("--reward-ckpt", (reward_ckpt or bundled.REWARD) if guided else None), ("--reward-watch", reward_watch)):
        if path is not None:
            with naming(flag):
                found[flag] = load_reward(path, where)
            check_reward(found[flag], generator, flag)
            inputs[flag.removeprefix("--")] = path
    reward, watch = found.get("--reward-ckpt"), found.get("--reward-watch")
    judges = Judges(reward=reward)
    if watch is not None:
        judges = Judges(reward=reward, judge=reward_judge(watch), name=f"reward {reward_watch.stem}")
    elif judged_by_annotator(loaded, data):
        judges = Judges(reward=reward, judge=annotator_judge(), name="the annotator without noise")
    if image is not None:
        cases = [of_file(generator, image, mask, label)]
        inputs |= {"image": image, **({} if mask is None else {"mask": mask})}
    else:
        with naming("--seeds"):
            numbers = list(dict.fromkeys(parse_seeds(seeds)))
        cases = [of_seed(generator, seed, label, psi) for seed in numbers]
    if perceptual is not None:
        inputs["perceptual"] = perceptual
    setup = Setup(
        loaded=loaded, perceptual=features, prior=prior_of(generator), guidance=None if reward is None else Guidance(generator, reward),
        judges=judges, cases=cases, weights=lambdas, config=config, from_truth=start == "truth", shown=min(shown, len(cases)),
    )
    return setup, inputs


def open_run(out: Path | None, resume: bool, settings: dict, inputs: dict[str, Path]) -> Run:
    """The run of --out, new or to go on. Raises: ValueError, OSError."""
    if resume and (out is None or not (out / OPTIONS).is_file()):
        raise ValueError(f"--resume: expected a run in --out, got {'no --out' if out is None else f'none in {out}'}. Name its folder.")
    if not resume and out is not None and (out / OPTIONS).exists():
        raise ValueError(f"--out: expected a folder without a run, got {out}. Add --resume to go on with it, or name another.")
    if out is not None and resume:
        return Run(out, settings, inputs)
    return Run(claim(out or next_free(Path("runs"), "invert")), settings, inputs)


@click.command(cls=GroupedCommand)
@option("--image", group="Target", metavar="FILE", type=FILE, default=None, help="Image of the generator's size.")
@option("--mask", group="Target", metavar="FILE", type=FILE, default=None, show_default="all counts", help="Grey image: white counts.")
@option("--camera", group="Target", metavar="YAW,PITCH|25 NUMBERS|JSON", default=None, show_default="frontal",
        help="Radians from frontal, or 16 numbers of cam2world and 9 of the intrinsics.")
@option("--seeds", group="Target", metavar="LIST", default=None, help="Samples of the generator as targets, such as 0,2-5.")
@option("--psi", group="Target", metavar="FLOAT", type=click.FloatRange(min=0), default=1.0, help="Their truncation.")
@option("--start", group="Target", metavar="mean|truth", type=click.Choice(["mean", "truth"]), default="mean", help="First latent.")
@option("--network", group="What", metavar="FILE|RUN", type=click.Path(path_type=Path), default=None, show_default="the bundled generator",
        help="Generator.")
@shared("reward-ckpt reward-watch data",
        reward_ckpt={"show_default": "bundled, where a weight is above 0", "help": "Reward that guides."},
        reward_watch={"show_default": "the annotator, for synthetic heads", "help": "Second reward as the judge."},
        data={"show_default": "the run's own", "help": "What the generator was trained on."})
@option("--perceptual", group="What", metavar="FILE", type=FILE, default=None, show_default="the bundled head-factor network",
        help="TorchScript network (the projectors' VGG16) or .safetensors of ours.")
@option("--weights", group="What", metavar="LIST", default=WEIGHTS, help="Weights of the reward.")
@option("--preset", group="Stages", metavar="NAME", type=click.Choice(list(PRESETS)), default="small",
        help="small, or published: the projectors' own; flags below go before it.")
@options_of(InversionConfig)
@option("--shown", group="Pictures", metavar="TARGETS", type=click.IntRange(min=0), default=1,
        help="Targets with strip, orbit, meshes and kept generators.")
@option("--shape-res", group="Pictures", metavar="POINTS", type=click.IntRange(0, 1024), default=128, help="Of meshes, per axis; 0: none.")
@option("--turns", group="Pictures", metavar="VIEWS", type=click.IntRange(min=0), default=12, help="Of the orbit; 0: none.")
@option("--out", group="Run", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=None,
        show_default="runs/NNNNN-invert", help="Folder to write.")
@option("--resume", group="Run", is_flag=True, help="Go on with the run in --out, with the same flags.")
@shared("device dry-run")
def main(out, resume, shape_res, turns, dry_run, **flags) -> None:
    """From one image to a shape, with a reward on geometry: a latent for the image, then the generator tuned around it, once per weight.

    Give an image with its camera, or --seeds: samples of the generator itself, of which the truth is known and all errors can be measured.
    Writes a run folder: per target a strip, an orbit, a mesh and a generator for each weight; index.html with curves; inversion.json.

    \b
    Example:
        eg3d-rlhf generator invert --seeds=3 --weights=0,0.1 --w-steps=8 --pivot-steps=4 --turns=0 --shape-res=32 --out=runs/inversion
    """
    if 0 < shape_res < 16 or turns == 1:
        raise ValueError("--shape-res, --turns: expected 0, or at least 16 points and 2 views. Correct them.")
    if turns:
        check_mp4("orbit.mp4")
    setup, inputs = resolve(**flags)
    case = setup.cases[0]
    settings = {
        "targets": [one.name for one in setup.cases], "weights": list(setup.weights), "camera": case.target.camera[0].tolist(),
        "psi": flags["psi"], "start": flags["start"], "shown": setup.shown, "perceptual": setup.perceptual.name,
        "judge": setup.judges.name, **asdict(setup.config),
    }
    if dry_run:
        click.echo(json.dumps({**settings, "steps": setup.steps, "inputs": {k: str(v) for k, v in inputs.items()}}, indent=1))
        return
    with open_run(out, resume, settings, inputs) as run:
        if resume:
            run.resume()
        inversions = Inversions(run, setup)
        click.echo(f"{len(setup.cases)} target(s), weights {flags['weights']}, perceptual features {setup.perceptual.name}: {run.folder}")
        try:
            inversions.go()
        except StoppedError as stopped:
            click.echo(f"{str(stopped).capitalize()}. Go on with the same flags, --out={run.folder} and --resume.")
            return
        finish(inversions, shape_res, turns)


def finish(inversions: Inversions, shape_res: int, turns: int) -> None:
    """Pictures, inversion.json and the page of a run that is done."""
    setup, folder = inversions.setup, inversions.run.folder
    for case in setup.cases[: setup.shown]:
        draw(inversions, case, shape_res, turns)
    records = inversions.records()
    summary = report.summarise(records, setup.weights)
    said = {"perceptual": setup.perceptual.name, "judge": setup.judges.name, "targets": len(setup.cases)}
    write_json(folder / "inversion.json", {**said, **summary, "records": records})
    parts = report.jobs(inversions)
    findings = pages.run(parts, folder, quiet=True)
    count = "One target" if len(setup.cases) == 1 else f"{len(setup.cases)} targets"
    says = report.verdict_sentences(summary, setup.judges.name, setup.perceptual.name)
    introduction = (
        f"{count} under {setup.loaded.path.name}: {setup.config.w_steps} steps on a latent, then "
        f"{setup.config.pivot_steps} on a copy of the generator for every weight of the reward. At weight 0 it is the plain projector."
    )
    page = write_page(folder / "index.html", report.TITLE, introduction, parts, findings, says)
    click.echo("\n".join(says))
    click.echo(f"\nWritten to {folder}: {page.name} (open it in a browser), inversion.json, targets/")

