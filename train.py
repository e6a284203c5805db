"""Train a tri-plane GAN, or fine-tune one with a reward on its density field; or train a flow in stages on preferences.

    python train.py                                  fine-tune nothing: the GAN alone, continuing the bundled generator
    python train.py --reward=sigma --lambda-r=10     the main job: reward fine-tuning of the bundled generator on synthetic heads
    python train.py --init=scratch --kimg=20         train the bundled generator anew
    python train.py --mode=circular-dpo              preference training of a generator in stages; has flags of its own

Composition root: flags -> settings -> objects -> loop. No mathematics here.
"""

import json
import os
import sys
from pathlib import Path

import click

from eg3d_rlhf import experiment
from eg3d_rlhf.cli import GroupedCommand, choose_device, option, user_errors
from eg3d_rlhf.run_folder import next_free as next_run_dir  # noqa: F401 (also found here)
from training.distributed import process_group

RUN = "Run"
DATA = "Data"
NET = "Networks"
GAN = "GAN losses and schedule"
OPT = "Optimisation"
REWARD = "Reward fine-tuning"
EG3D = "Accepted for EG3D's sake"
CIRCULAR = "circular-dpo"


class ModeCommand(GroupedCommand):
    """Hands over to another command where --mode says so; a flag of the other mode is refused by name."""

    def make_context(self, info_name, args, parent=None, **extra) -> click.Context:
        """Parse for the mode that the arguments name."""
        args = list(args)
        gan = mode_of(args) != CIRCULAR
        make = super().make_context if gan else _circular_dpo().make_context
        try:
            return make(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            name, mode = error.option_name.replace("_", "-"), CIRCULAR if gan else "gan"
            other = _circular_dpo() if gan else self
            if name not in {n for p in other.params for n in p.opts + p.secondary_opts}:
                raise
            with user_errors():
                raise ValueError(f"{name}: belongs to --mode={mode}. Leave it out, or see train.py --mode={mode} --help.") from None

    def invoke(self, ctx: click.Context):
        """Run the command that parsed the arguments."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def _circular_dpo() -> click.Command:
    from eg3d_rlhf.flow.circular.commands import circular_dpo

    return circular_dpo


def mode_of(args: list[str]) -> str | None:
    """Value of the last --mode; None where there is none."""
    found = None
    for i, arg in enumerate(args):
        if arg == "--":
            break
        if arg == "--mode":
            found = args[i + 1] if i + 1 < len(args) else found
        elif arg.startswith("--mode="):
            found = arg.removeprefix("--mode=")
    return found and found.replace("_", "-")


@click.command(cls=ModeCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140})
@option("--mode", group=RUN, type=click.Choice(["gan", CIRCULAR]), default="gan", expose_value=False,
        help="What is trained. circular-dpo has flags of its own: train.py --mode=circular-dpo --help.")
@option("--outdir", group=RUN, metavar="DIR", type=click.Path(path_type=Path), default=Path("runs"), help="Runs are numbered inside it.")
@option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name.")
@option("--seed", group=RUN, type=click.IntRange(min=0), default=0, help="Of everything random.")
@option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run.")
@option("--resume", group=RUN, metavar="RUN|FILE", type=click.Path(path_type=Path),
        help="Continue a run exactly, with its own flags; --kimg changes its length.")
@option("--resume-previous", group=RUN, is_flag=True, help="With --resume: use the previous checkpoint where the newest is damaged.")
@option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop.")
@option("--no-summary", group=RUN, is_flag=True, help="Skip the before/after evaluation that ends a reward run.")
@option("--timeout", group=RUN, metavar="MINUTES", type=click.FloatRange(min=0, min_open=True), default=30,
        help="With torchrun: how long processes wait for each other before the run ends with an error.")
@option("--data", group=DATA, metavar="ZIP|DIR|synthetic:heads64", help="Images in EG3D's format.  [default: synthetic:heads64]")
@option("--cond", group=DATA, type=bool, default=True, help="Use the camera labels (required by this generator).")
@option("--mirror", group=DATA, type=bool, default=False, help="Add mirrored images, with mirrored poses.")
@option("--cfg", group=NET, type=click.Choice(["ffhq", "afhq", "shapenet", "heads64"]), default="heads64", help="Preset.")
@option("--init", group=NET, metavar="bundled|scratch|FILE|RUN", help="Initial networks.  [default: bundled for heads64, else scratch]")
@option("--start", group=NET, type=click.Choice(["G", "G_ema"]),
        help="With --init: weights that G starts from.  [default: G; heads64: G_ema]")
@option("--sphere-init", group=NET, metavar="RADIUS", type=click.FloatRange(min=0),
        help="From scratch, start from a solid sphere.  [default: 0 = off; heads64: 0.25]")
@option("--cbase", group=NET, type=click.IntRange(min=1), help="Channel multiplier.  [default: 32768; heads64: 2048]")
@option("--cmax", group=NET, type=click.IntRange(min=1), help="Largest number of feature maps.  [default: 512; heads64: 64]")
@option("--map-depth", group=NET, type=click.IntRange(min=1), default=2, help="Layers of G's mapping network.")
@option("--mbstd-group", group=NET, type=click.IntRange(min=1), default=4, help="Minibatch-std group size.")
@option("--freezed", group=NET, metavar="LAYERS", type=click.IntRange(min=0), default=0, help="Freeze the first layers of D.")
@option("--plane-layout", group=NET, type=click.Choice(["eg3d", "fixed"]), help="Third plane.  [default: eg3d; heads64: fixed]")
@option("--sr-module", group=NET, metavar="CLASS", help="Super-resolution module.  [default: by resolution]")
@option("--sr-noise-mode", group=NET, type=click.Choice(["random", "none"]), default="none", help="Noise in super-resolution.")
@option("--sr-num-fp16-res", group=NET, type=click.IntRange(min=0), default=4, help="Half precision in super-resolution (CUDA).")
@option("--g-num-fp16-res", group=NET, type=click.IntRange(min=0), default=0, help="Half-precision resolutions of the backbone (CUDA).")
@option("--d-num-fp16-res", group=NET, type=click.IntRange(min=0), default=4, help="Half-precision resolutions of D (CUDA).")
@option("--c-scale", group=NET, type=float, default=1.0, help="Scale of the conditioning label.")
@option("--disc-c-noise", group=NET, type=click.FloatRange(min=0), default=0.0, help="Label noise for D, in label standard deviations.")
@option("--decoder-lr-mul", group=NET, type=click.FloatRange(min=0, min_open=True), default=1.0, help="Learning-rate multiplier.")
@option("--gamma", group=GAN, type=click.FloatRange(min=0), help="R1 weight.  [default: required; heads64: 0.3]")
@option("--aug", group=GAN, type=click.Choice(["noaug", "ada", "fixed"]), default="noaug", help="Augmentation of D's inputs.")
@option("--p", group=GAN, type=click.FloatRange(0, 1), default=0.2, help="Probability for --aug=fixed.")
@option("--target", group=GAN, type=click.FloatRange(0, 1), default=0.6, help="Target of sign(D(real)) for --aug=ada.")
@option("--style-mixing-prob", group=GAN, type=click.FloatRange(0, 1), default=0.0, help="Probability of style mixing.")
@option("--gen-pose-cond", group=GAN, type=bool, help="Condition G on the camera.  [default: False]")
@option("--gpc-reg-prob", group=GAN, type=click.FloatRange(0, 1), default=0.5, help="Probability of swapping the conditioning camera.")
@option("--gpc-reg-fade-kimg", group=GAN, metavar="KIMG", type=click.FloatRange(min=0), help="Fade from 1.  [default: 1000; heads64: 5]")
@option("--blur-fade-kimg", group=GAN, metavar="KIMG", type=click.FloatRange(min=0), help="Blur fade.  [default: 200; heads64: 1]")
@option("--nrr-initial", "--neural-rendering-resolution-initial", "nrr_initial", group=GAN, metavar="PIXELS", type=click.IntRange(min=4),
        help="Rendered resolution.  [default: 64; heads64: 32]")
@option("--nrr-final", "--neural-rendering-resolution-final", "nrr_final", group=GAN, metavar="PIXELS", type=click.IntRange(min=4),
        help="Rendered resolution after the fade.")
@option("--nrr-fade-kimg", "--neural-rendering-resolution-fade-kimg", "nrr_fade_kimg", group=GAN, metavar="KIMG",
        type=click.FloatRange(min=0), default=1000, help="Its fade.")
@option("--density-reg", group=GAN, type=click.FloatRange(min=0), default=0.25, help="Density regularisation weight.")
@option("--density-reg-every", group=GAN, metavar="ITERATIONS", type=click.IntRange(min=1), default=4, help="Its interval.")
@option("--density-reg-p-dist", group=GAN, type=click.FloatRange(min=0), default=0.004, help="Its perturbation, world units.")
@option("--reg-type", group=GAN, type=click.Choice(["l1", "monotonic-detach", "monotonic-fixed"]), default="l1", help="Its kind.")
@option("--kimg", group=OPT, metavar="KIMG", type=click.FloatRange(min=0, min_open=True), help="Length.  [default: 25000; by preset]")
@option("--batch", group=OPT, type=click.IntRange(min=1), help="Images per iteration.  [default: required; heads64: 8]")
@option("--batch-gpu", group=OPT, type=click.IntRange(min=1), help="Images per forward pass.  [default: batch]")
@option("--glr", group=OPT, type=click.FloatRange(min=0, min_open=True), help="G learning rate.  [default: 0.0025; by preset]")
@option("--dlr", group=OPT, type=click.FloatRange(min=0, min_open=True), help="D learning rate.  [default: 0.002; by preset]")
@option("--ema-kimg", group=OPT, metavar="KIMG", type=click.FloatRange(min=0), help="Half-life of G_ema.  [default: batch*10/32]")
@option("--amp", group=OPT, type=click.Choice(["off", "bf16"]), default="off",
        help="Main phases in bfloat16 (autocast); weights, losses, R1 and rendering stay in float32.")
@option("--tick", group=OPT, metavar="KIMG", type=click.FloatRange(min=0, min_open=True), help="Status interval.  [default: 4; by preset]")
@option("--snap", group=OPT, metavar="TICKS", type=click.IntRange(min=0), help="Snapshot interval.  [default: 50; by preset]")
@option("--checkpoint-ticks", group=OPT, metavar="TICKS", type=click.IntRange(min=1), default=1, help="Resumable state interval.")
@option("--reward", group=REWARD, type=click.Choice(["none", "sigma"]), default="none", help="What scores the generator.")
@option("--reward-ckpt", group=REWARD, metavar="FILE", type=click.Path(path_type=Path), help="Trained reward.  [default: bundled]")
@option("--reward-watch", group=REWARD, metavar="FILE", type=click.Path(path_type=Path),
        help="Second reward, never trained on, that must not fall while the first rises.  [default: bundled]")
@option("--lambda-r", group=REWARD, type=click.FloatRange(min=0), default=10.0, help="Reward weight; 0 is the GAN run, bit for bit.")
@option("--lambda-sigma", group=REWARD, type=click.FloatRange(min=0), help="Density consistency weight.  [default: 0.01; by preset]")
@option("--lambda-front", group=REWARD, type=click.FloatRange(min=0), default=0.0, help="Front-growth penalty weight.")
@option("--reward-clip", group=REWARD, metavar="LOW,HIGH|iqr|none", default="-10,10", help="Trust region of the shaped reward.")
@option("--reward-shaping", group=REWARD, type=click.Choice(["none", "standardised", "softplus", "reference"]), default="none",
        help="How the score enters the loss.")
@option("--rlr", group=REWARD, type=click.FloatRange(min=0, min_open=True),
        help="Reward optimiser's learning rate.  [default: glr; heads64: 0.0002]")
@option("--control", group=REWARD, metavar="RUN|FILE", type=click.Path(path_type=Path),
        help="Summary of the lambda_r = 0 run to quote.  [default: recorded in assets]")
@option("--gpus", group=EG3D, metavar="INT", type=click.IntRange(min=1), help="Must agree with torchrun --nproc-per-node.")
@option("--metrics", group=EG3D, metavar="LIST", help="Not computed while training: see tools/calc_metrics.py.")
@option("--workers", group=EG3D, type=click.IntRange(min=0), help="Ignored: images are read by the training process.")
@option("--nobench", group=EG3D, type=bool, help="Ignored: convolution benchmarking is off.")
@option("--c-noise", group=EG3D, type=float, help="Ignored, as in EG3D; see --disc-c-noise.")
@option("--resume-blur", group=EG3D, type=bool, help="Ignored: --resume continues every fade, --init starts them anew.")
@option("--sr-first-cutoff", group=EG3D, type=int, help="Ignored, as in EG3D.")
@option("--sr-first-stopband", group=EG3D, type=float, help="Ignored, as in EG3D.")
def main(**flags) -> None:
    """Train a 3D-aware GAN, or fine-tune it with a reward on its density field (--reward=sigma). --mode=circular-dpo trains a generator in
    stages on preferences instead.

    \b
    Example:
        python train.py --reward=sigma --lambda-r=10 --kimg=0.016 --no-summary
    """
    flags = check_eg3d_flags(flags)
    settings = experiment.resolve(flags) if flags["resume"] is None else None
    if flags["dry_run"] and settings is not None:
        click.echo(json.dumps(settings, indent=2, sort_keys=True))
        return
    with process_group(choose_device(flags["device"]), flags["timeout"]) as ranks:
        if settings is None:
            experiment.resume(flags["resume"], flags["resume_previous"], flags["kimg"], ranks)
        else:
            experiment.start_or_continue(settings, flags["outdir"], ranks)


def check_eg3d_flags(flags: dict) -> dict:
    """Take out the flags that only EG3D's script gives a meaning; those without effect here are named on stderr.

    Raises: ValueError where a flag means something else here.
    """
    names = ("gpus", "metrics", "workers", "nobench", "c_noise", "resume_blur", "sr_first_cutoff", "sr_first_stopband")
    given = {name: flags[name] for name in names if flags[name] is not None}
    gpus, world = given.pop("gpus", None), int(os.environ.get("WORLD_SIZE", "1"))
    if gpus is not None and gpus != world:
        remedy = f"Start with torchrun --nproc-per-node={gpus} train.py."
        raise ValueError(f"--gpus: expected {world}, the number of processes, got {gpus}. {remedy}")
    if given.get("metrics", "none") == "none":
        given.pop("metrics", None)
    if given:
        flags_given = ", ".join("--" + name.replace("_", "-") for name in given)
        print(f"Warning: {flags_given} ignored; see train.py --help.", file=sys.stderr)
    source = flags["resume"]
    if source is not None and (source.suffix.lower() == ".pkl" or source.name.startswith("network-snapshot")):
        remedy = f"Use --init={source} to start from its weights."
        raise ValueError(f"--resume: expected a run folder or checkpoint, got the network {source}. {remedy}")
    return {name: value for name, value in flags.items() if name not in names}


if __name__ == "__main__":
    main()
