"""What the flow modes' command lines share: flags of the problem and of the tuning, and what refuses them."""

from dataclasses import asdict, replace
from typing import Any, TypeVar

import click

from eg3d_rlhf.core.cli import option, together
from eg3d_rlhf.experiments.mode import Flags, flag
from eg3d_rlhf.experiments.run import OPTIONS, recorded_by
from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.tuning.flow.families import check_source
from eg3d_rlhf.tuning.flow.problem import ProblemSource
from training.config import from_dict

Source = TypeVar("Source", bound=ProblemSource)
WHAT, TRAIN = "What is trained", "Training"
OWN = "the problem's own"
TOY = ProblemSource.pipeline  # the bundled generator, which a run is of where no folder is named
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


def problems_own(name: str, group: str, metavar: str, kind, help: str, shown: str = OWN, rare: bool = False):
    """An option that leaves the problem's default alone where it is not given."""
    return option(name, group=group, rare=rare, metavar=metavar, type=kind, default=None, show_default=shown, help=help)


trellis_flags = together(
    option("--also", group=WHAT, rare=True, metavar="DIR", multiple=True, help="Further folders to look for TRELLIS's models in."),
    option("--flow-weights", group=WHAT, rare=True, metavar="STAGE=FILE", multiple=True,
           help="Other weights of a TRELLIS flow, such as a training .pt."),
)
tuning_flags = together(
    problems_own("--tune", TRAIN, "lora|full", click.Choice(["lora", "full"]), "Adapters, or every parameter."),
    problems_own("--lora-targets", TRAIN, "LIST", str, "Last parts of layers' names, with commas.", "the stage's own", rare=True),
    problems_own("--amp", TRAIN, "off|bf16", click.Choice(["off", "bf16"]), "Passes in bfloat16 (autocast)."),
)


def source_of(kind: type[Source], flags: Flags) -> Source:
    """What the problem is read from. Raises: ValueError for what has no effect on it, or lacks."""
    source = kind(**flags.of(kind), also=flags["also"], flow_weights=flags["flow_weights"], seed=flags["seed"])
    check_source(source)
    return source


def kept(kind: type, mode: str) -> dict[str, Any]:
    """Of a Mode: how a run folder keeps its settings of a kind, beside what its problem came from."""
    return {
        "record": lambda settings, problem: {"mode": mode, "run": asdict(settings), "problem": dict(problem.identity)},
        "recorded": lambda folder, flags, ranks: from_dict(kind, recorded_by(folder, mode)["run"], str(folder / OPTIONS)),
    }


def check_tuning(flags: Flags) -> None:
    """Refuse adapters' flags without adapters, and early stopping's without what stops. Raises: ValueError naming them."""
    flags.belong(("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), flags["tune"] != "full", "--tune=lora")
    early = "early stopping, which --choose-noises=0 leaves out"
    flags.belong(("held_out_every", "patience", "max_drop"), flags["choose_noises"] != 0, early)


def tuned_as(flags: Flags, lora: LoraConfig | None) -> dict:
    """The fields `lora`, and `bf16` where it is given, of a stage's training. Args: lora: the problem's own."""
    changes, adapters = {}, flags.of(LoraConfig)
    if flags["amp"] is not None:
        changes["bf16"] = flags["amp"] == "bf16"
    if flags["lora_targets"] is not None:
        adapters["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    full = (flags["tune"] or ("full" if lora is None else "lora")) == "full"
    if full and adapters:
        raise ValueError(f"{', '.join(flag('lora_' + name) for name in adapters)}: belongs to --tune=lora. Add that, or leave it out.")
    return {**changes, "lora": None if full else replace(lora or LoraConfig(), **adapters)}
