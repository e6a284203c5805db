"""Train a tri-plane GAN, or fine-tune one with a reward on its density field; or train a flow in stages on preferences.

    python train.py                                  fine-tune nothing: the GAN alone, continuing the bundled generator
    python train.py --reward=sigma --lambda-r=10     the main job: reward fine-tuning of the bundled generator on synthetic heads
    python train.py --reward=sigma --rounds=3        the same in rounds: label, train rewards, tune, and again
    python train.py --init=scratch --kimg=20         train the bundled generator anew
    python train.py --mode=circular-dpo              preference training of a generator in stages; has flags of its own
    python train.py --mode=grpo                      online tuning of one of its stages by a reward; has flags of its own

Composition root: flags -> settings -> objects -> loop. No mathematics here.
"""

import json
import os
import sys
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_of, user_errors
from eg3d_rlhf.core.plugins import load_plugins
from eg3d_rlhf.experiments.mode import Mode
from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes import gan as experiment
from eg3d_rlhf.modes import gan_rounds as experiment_rounds
from eg3d_rlhf.tuning.gan import settings
from eg3d_rlhf.tuning.gan.phase import REWARD
from eg3d_rlhf.tuning.gan.rounds import ROUNDS
from training import checkpoint
from training.config import DATA, GAN, NET, OPT, RUN
from training.distributed import process_group

EG3D = "Accepted for EG3D's sake"
TITLES = (RUN, DATA, NET, GAN, OPT, REWARD, ROUNDS, EG3D)


class ModeCommand(GroupedCommand):
    """Hands over to the command that --mode names; a flag of another mode is refused by name."""

    def make_context(self, info_name, args, parent=None, **extra) -> click.Context:
        """Parse for the mode that the arguments name."""
        with user_errors():
            load_plugins()
            mode, args = mode_of(list(args))
            command = self.command_of(mode)
        try:
            if command is self:
                return super().make_context(info_name, args, parent, **extra)
            return command.make_context(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            name = error.option_name.replace("_", "-")
            others = [other for other in MODES if other != mode and name in flags_of(self.command_of(other))]
            if not others:
                raise
            with user_errors():
                raise ValueError(
                    f"{name}: belongs to --mode={others[0]}. Leave it out, or see train.py --mode={others[0]} --help."
                ) from None

    def command_of(self, mode: str) -> click.Command:
        """The command of a mode. Raises: ValueError naming those that are known."""
        if mode == "gan":
            return self
        return command.command if isinstance(command := MODES[mode], Mode) else command

    def invoke(self, ctx: click.Context):
        """Run the command that parsed the arguments."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def flags_of(command: click.Command) -> set[str]:
    """All spellings of a command's settings, rare ones as if they were flags."""
    return {name for option in [*command.params, *getattr(command, "rare", {}).values()] for name in option.opts + option.secondary_opts}


def mode_of(args: list[str]) -> tuple[str, list[str]]:
    """Value of the last --mode, 'gan' where there is none, and the other arguments."""
    mode, rest, i = "gan", [], 0
    while i < len(args) and args[i] != "--":
        if args[i] == "--mode" and i + 1 < len(args):
            i, mode = i + 1, args[i + 1]
        elif args[i].startswith("--mode="):
            mode = args[i].removeprefix("--mode=")
        else:
            rest.append(args[i])
        i += 1
    return mode.replace("_", "-"), rest + args[i:]


@click.command(cls=ModeCommand)
@option("--mode", group=RUN, metavar="NAME", default="gan", expose_value=False,
        help=f"What is trained: {', '.join(MODES)}. Each has flags of its own: train.py --mode=NAME --help.")
@option("--outdir", group=RUN, metavar="DIR", type=click.Path(path_type=Path), default=Path("runs"), help="Runs are numbered inside it.")
@option("--resume", group=RUN, metavar="RUN|FILE", type=click.Path(path_type=Path),
        help="Continue a run exactly, with its own flags; --kimg changes its length, --workers how images are read.")
@option("--resume-previous", group=RUN, is_flag=True, help="With --resume: use the previous checkpoint where the newest is damaged.")
@option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop.")
@option("--no-summary", group=RUN, is_flag=True, help="Skip the before/after evaluation that ends a reward run.")
@option("--timeout", group=RUN, metavar="MINUTES", type=click.FloatRange(min=0, min_open=True), default=30,
        help="With torchrun: how long processes wait for each other before the run ends with an error.")
@options_of(*settings.GROUPS, **settings.BY_PRESET)
@option("--gpus", group=EG3D, metavar="INT", type=click.IntRange(min=1), help="Must agree with torchrun --nproc-per-node.")
@option("--metrics", group=EG3D, metavar="LIST", help="Not computed while training: see tools/calc_metrics.py.")
@option("--nobench", group=EG3D, type=bool, help="Ignored: convolution benchmarking is off.")
@option("--c-noise", group=EG3D, type=float, help="Ignored, as in EG3D; see --disc-c-noise.")
@option("--resume-blur", group=EG3D, type=bool, help="Ignored: --resume continues every fade; with --init there is none by default.")
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
    resolved = None
    if flags["resume"] is None:
        resolved = settings.resolve(flags)
        ignored = ["--" + name.replace("_", "-") for name in settings.FRESH if flags[name] is not None]
        if ignored and resolved.net.init != "scratch":
            print(f"Warning: {', '.join(ignored)} ignored: the networks of --init={resolved.net.init} are as they are.", file=sys.stderr)
        if resolved.reward.keeping.early_stop is not None and resolved.reward.terms.lambda_r == 0:
            print("Warning: --early-stop ignored: with --lambda-r=0 the whole run is the control.", file=sys.stderr)
        if flags["dry_run"]:
            click.echo(json.dumps(resolved.to_dict(), indent=2, sort_keys=True))
            return
    with process_group(choose_device(flags["device"] or "auto"), flags["timeout"]) as ranks:
        if resolved is None and experiment_rounds.begun(flags["resume"]):
            if flags["kimg"] is not None:
                raise ValueError(f"--kimg: expected none with --resume of rounds, got {flags['kimg']:g}. Start a new run.")
            experiment_rounds.resume(flags["resume"], flags["resume_previous"], ranks, flags["workers"])
        elif resolved is None:
            experiment.resume(flags["resume"], flags["resume_previous"], flags["kimg"], ranks, flags["workers"])
        else:
            begin = experiment_rounds.start if resolved.rounds.rounds else experiment.start_or_continue
            begin(resolved, flags["outdir"], ranks)


def check_eg3d_flags(flags: dict) -> dict:
    """Take out the flags that only EG3D's script gives a meaning; those without effect here are named on stderr.

    Raises: ValueError where a flag means something else here.
    """
    names = ("gpus", "metrics", "nobench", "c_noise", "resume_blur", "sr_first_cutoff", "sr_first_stopband")
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
    if source is not None and (source / OPTIONS).is_file() and not checkpoint.available(source):
        recorded_by(source, "gan")  # another mode's run has checkpoints of its own
    return {name: value for name, value in flags.items() if name not in names}


if __name__ == "__main__":
    main()
