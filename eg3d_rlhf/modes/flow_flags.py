"""What the flow modes' command lines share: flags of the run and of the tuning, what refuses them, and the run's beginning and end."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import click

from eg3d_rlhf.core.cli import choose_device, option, together
from eg3d_rlhf.experiments.process import sigterm_interrupts
from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.tuning.flow.train import StoppedError
from training.distributed import Ranks, process_group

RUN, WHAT, TRAIN = "Run", "What is trained", "Training"
OWN = "the problem's own"
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)
FOLDER = click.Path(path_type=Path, file_okay=False)
COMMAND = {"help_option_names": ["-h", "--help"], "max_content_width": 140}
FREE = {"resume", "device", "workers", "timeout", "dry_run"}  # what may stand beside --resume


def own(name: str, group: str, metavar: str, kind, help: str, shown: str = OWN):
    """An option that leaves the problem's default alone where it is not given."""
    return option(name, group=group, metavar=metavar, type=kind, default=None, show_default=shown, help=help)


def run_flags(modes: tuple[str, ...], several: str):
    """A decorator: the flags of a run. Args: modes: of train.py, the last is this one; several: when --workers counts."""
    return together(
        option("--mode", group=RUN, type=click.Choice(modes), default=modes[-1], expose_value=False,
               help="What train.py trains" + ("; see train.py --help for gan." if "gan" in modes else ".")),
        option("--outdir", group=RUN, metavar="DIR", type=FOLDER, default=Path("runs"), help="Runs are numbered inside it."),
        option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name."),
        option("--seed", group=RUN, type=WHOLE, default=0, help="Of everything that is drawn."),
        option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
        option("--resume", group=RUN, metavar="RUN", type=FOLDER, help="Go on with a run where it was, with its own flags."),
        option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."),
        option("--timeout", group=RUN, metavar="MINUTES", type=POSITIVE, default=30,
               help="With torchrun: longest wait for another process."),
        option("--workers", group=RUN, metavar="INT", type=COUNT, default=2, help=f"With {several}: processes, of one thread each."),
    )


trellis_flags = together(
    option("--also", group=WHAT, metavar="DIR", multiple=True, help="Further folders to look for TRELLIS's models in."),
    option("--flow-weights", group=WHAT, metavar="STAGE=FILE", multiple=True,
           help="Other weights of a TRELLIS flow, such as a training .pt."),
)
tuning_flags = together(
    own("--tune", TRAIN, "lora|full", click.Choice(["lora", "full"]), "Adapters, or every parameter."),
    own("--lora-targets", TRAIN, "LIST", str, "Last parts of layers' names, with commas.", "the stage's own"),
    own("--amp", TRAIN, "off|bf16", click.Choice(["off", "bf16"]), "Passes in bfloat16 (autocast)."),
)


def flag(name: str) -> str:
    """As users write it."""
    return "--" + name.replace("_", "-")


def written(context: click.Context) -> set[str]:
    """Names of the flags that are on the command line."""
    return {name for name in context.params if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}


def resumed(flags: Mapping, given: set[str]) -> bool:
    """Whether a run goes on. Raises: ValueError naming the flags that would have no effect then."""
    extra = sorted(given - FREE) if flags["resume"] is not None else []
    if extra:
        raise ValueError(f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave out.")
    return flags["resume"] is not None


def belongs(given: set[str], names: Iterable[str], applies: bool, where: str) -> None:
    """Refuse those of `names` that were given where they do not apply. Raises: ValueError naming them, and `where` they do."""
    extra = [flag(name) for name in names if name in given]
    if extra and not applies:
        raise ValueError(f"{', '.join(extra)}: belongs to {where}, and would have no effect here. Leave it out.")


def check_tuning(flags: Mapping, given: set[str]) -> None:
    """Refuse adapters' flags without adapters, and early stopping's without what stops. Raises: ValueError naming them."""
    belongs(given, ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), flags["tune"] != "full", "--tune=lora")
    early = "early stopping, which --choose-noises=0 leaves out"
    belongs(given, ("held_out_every", "patience", "max_drop"), flags["choose_noises"] != 0, early)


def some(flags: Mapping, names: Mapping[str, str]) -> dict:
    """The flags that are given, under the names of fields."""
    return {field: flags[name] for name, field in names.items() if flags[name] is not None}


def given_of(kind: type, flags: Mapping) -> dict:
    """What flags say of the fields of a settings dataclass."""
    return some(flags, {field.metadata["knob"].name or field.name: field.name for field in fields(kind) if "knob" in field.metadata})


def tuned_as(flags: Mapping, lora: LoraConfig | None) -> dict:
    """The fields `lora`, and `bf16` where it is given, of a stage's training. Args: lora: the problem's own."""
    found, adapters = {}, given_of(LoraConfig, flags)
    if flags["amp"] is not None:
        found["bf16"] = flags["amp"] == "bf16"
    if flags["lora_targets"] is not None:
        adapters["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    full = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    if full and adapters:
        raise ValueError(f"{', '.join(flag('lora_' + name) for name in adapters)}: belongs to --tune=lora. Add that, or leave it out.")
    return {**found, "lora": None if full else replace(lora or LoraConfig(), **adapters)}


def refuse_torchrun(several: bool, flags: str) -> None:
    """Raises: ValueError where several trainings meet torchrun's several processes. Args: flags: that ask for several."""
    if several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{flags}: expected one process for several trainings, got torchrun's several. Use --workers.")


@contextlib.contextmanager
def running(flags: Mapping, again: str) -> Iterator[tuple[str, Ranks]]:
    """Device and ranks of a run. One that was stopped says what goes on with it (`again`), and ends with status 130."""
    try:
        with sigterm_interrupts(), process_group(choose_device(flags["device"]), flags["timeout"]) as ranks:
            yield str(ranks.device) if ranks.world > 1 else str(choose_device(flags["device"])), ranks
    except (StoppedError, KeyboardInterrupt) as stopped:
        click.echo(f"Stopped{f': {stopped}' if str(stopped) else '.'} {again} goes on from there.", err=True)
        sys.exit(130)
