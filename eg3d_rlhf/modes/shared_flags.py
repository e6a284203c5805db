"""Command-line options that several jobs share, so that each option has one name and one meaning.

Options that EG3D has under another name accept that name as a second spelling (--trunc for --psi).
"""

import functools
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import combine_decorators, option, prefix_errors
from eg3d_rlhf.core.device_option import DEVICE
from eg3d_rlhf.core.input_paths import LATENTS_SUFFIX, check_network, check_reward_file, check_run_folder
from eg3d_rlhf.core.seeds import parse_seeds
from eg3d_rlhf.evaluation.comparison_sources import Sources
from training.input_paths import check_dataset

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator

_COMMAND_LINE = ParameterSource.COMMANDLINE
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(min=1)
# Short forms of `option`: one that only --help-all shows and --set NAME=VALUE sets (rare_option), a number
# >= 1 (count_option), a number >= 0 (whole_option), a path of a file, and a name.
rare_option = functools.partial(option, rare=True)
count_option = functools.partial(option, metavar="INT", type=COUNT)
whole_option = functools.partial(option, metavar="INT", type=click.IntRange(min=0))
file_option = functools.partial(option, metavar="FILE", type=FILE)
name_option = functools.partial(option, metavar="NAME")


def is_latents_file(latents_text: str) -> bool:
    """Return True for a value of --latents that is the path of a file, and False for a list of seeds."""
    return latents_text.endswith(LATENTS_SUFFIX)


def reject_truncation(written_names: Collection[str], latents_text: str) -> None:
    """Raise ValueError if the user passed a truncation beside a file of latents, where it has no effect.

    Args:
        written_names: names of the flags that the user passed.
        latents_text: value of --latents.
    """
    for name in ("psi", "cutoff"):
        if name in written_names:
            raise ValueError(
                f"--{name} cannot be combined with --latents={latents_text}: the latents in the file are"
                f" truncated already. Remove --{name}."
            )


def open_samples(
    network: Path | None,
    latents_text: str,
    device: Any,
    flag: str = "--latents",
    level: float | None = None,
) -> "tuple[Callable[[], LoadedGenerator], list[int]]":
    """Read the value of --latents: a list of seeds, or a file of latents.

    Args:
        network: value of --network.
        latents_text: value of --latents.
        device: device of the generator.
        flag: name of the flag in messages.
        level: value of --set level.
    Returns: a function that loads the generator of the samples; and the seeds of the samples. The seeds of a
        file are 0, 1, 2, ..., its latents in order.
    Raises: ValueError or FileNotFoundError that names the flag. Without a file, the generator is not checked
        before the function is called.
    """
    from eg3d_rlhf.experiments.media.rendering import parse_seeds
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.generators.stored_latents import LatentsFile, load_stored_generator

    with prefix_errors(flag):
        if not is_latents_file(latents_text):
            seeds = parse_seeds(latents_text)
        else:
            context = click.get_current_context()
            reject_truncation(
                {name for name in context.params if context.get_parameter_source(name) == _COMMAND_LINE},
                latents_text,
            )
            seeds = list(range(len(LatentsFile.load(latents_text).ws)))

    def load() -> "LoadedGenerator":
        if is_latents_file(latents_text):
            with prefix_errors(flag):
                return load_stored_generator(latents_text, network, device, level)
        with prefix_errors("--network"):
            return load_generator(network, device, level)

    return load, seeds


def print_json(values: Any) -> None:
    """Print values that the json module can convert as indented JSON on stdout, for --dry-run and --json."""
    click.echo(json.dumps(values, indent=1))


def _flag(
    group: str, metavar: str | None, kind: Any, help_text: str, default: Any = None, **other_arguments: Any
) -> dict:
    """Return the keyword arguments of `eg3d_rlhf.core.cli.option` for one option.

    Args:
        group: title under which --help lists the option.
        metavar: placeholder of the value in --help; None for a switch or a choice.
        kind: click type of the value; None for text or a switch.
        help_text: description in --help; the empty text if each job passes its own to `shared`.
        default: value if the option is absent.
        other_arguments: other arguments of click.option.
    """
    return {
        "group": group,
        "metavar": metavar,
        "type": kind,
        "help": help_text,
        "default": default,
        **other_arguments,
    }


def _network(help_text: str, default_text: str) -> dict:
    """Return the arguments of an option that takes a generator file; `default_text` describes its default."""
    return _flag("What", "FILE|RUN", PATH, help_text, show_default=default_text, check=check_network)


def _reward(help_text: str) -> dict:
    """Return the arguments of an option that takes a reward file."""
    return _flag(
        "What",
        "FILE",
        PATH,
        help_text,
        show_default="the reward of the run, else the bundled reward",
        check=check_reward_file,
    )


# Keys: names of the options. Values: arguments of `option`. A job passes its own help text to `shared` where
# the help text is empty here.
_FLAGS: dict[str, dict[str, Any]] = {
    # Generators and rewards to compare, and the run that they come from.
    "before": _network(
        "Generator before tuning: a network file or a run folder.", "the generator from which the run began"
    ),
    "after": _network("Tuned generator: a network file or a run folder.", "newest snapshot of --run"),
    "run": _flag(
        "What",
        "RUN",
        PATH,
        "Folder of the tuning run.",
        show_default="the run of --after, else the newest run in runs/, that began from --before if given",
        check=check_run_folder,
    ),
    "control": _network(
        "Control, which was tuned with --lambda-r=0 and otherwise equal settings: a network file or a run"
        " folder.",
        "the matching run in runs/",
    ),
    "reward-ckpt": _reward("Reward file with which the run was tuned."),
    # A reward that took part in tuning is no independent evaluator, hence a held-out reward.
    "heldout-reward": _reward("Reward file of the evaluator, a reward that was not used in tuning."),
    "data": _flag(
        "What",
        "ZIP|DIR|synthetic:people64",
        None,
        "",
        show_default="the dataset of the run",
        check=check_dataset,
    ),
    # One generator, for jobs that do not compare two generators.
    "network": _network("Generator: a network file or a run folder.", "the bundled generator"),
    # Samples of the generator: latents, truncation, and their number.
    "latents": _flag(
        "Samples", "LIST", None, "Seeds of the latents, as a list with ranges: 0,2-5.", check=parse_seeds
    ),
    "psi": _flag(
        "Samples",
        "FLOAT",
        # psi = 0 would make all samples equal, so it is not allowed
        click.FloatRange(0, 2, min_open=True),
        "Truncation psi of the samples; 1 means no truncation.",
        Sources.psi,
    ),
    "level": _flag(
        "Samples",
        "FLOAT",
        float,
        "Raw density (output of the decoder) at the surface of the shapes.",
        show_default="the level in the network file; 10, as in EG3D's scripts, if it has none",
    ),
    "cutoff": _flag(
        "Samples",
        "INT",
        click.IntRange(min=0),
        "Number of layers of w, counted from the first layer, to which the truncation applies.",
        14,
    ),
    "n": _flag(
        "Samples", "LATENTS", click.IntRange(min=16), "Number of latents per reported value.", Sources.n
    ),
    "seed": _flag(
        "Samples", "INT", click.IntRange(min=0), "Random seed of the held-out latents.", Sources.seed
    ),
    "images": _flag(
        "Samples",
        "INT",
        click.IntRange(min=16),
        "Number of images per image distance (FID, KID).",
        Sources.images,
    ),
    # Output, device and parallel work.
    "out": _flag("Run", "FILE", FILE, "File to write."),
    "outdir": _flag("Run", "FOLDER", FOLDER, "Folder to write into."),
    "batch": _flag(
        "Run", "INT", COUNT, "Number of samples per batch; a smaller batch needs less memory.", Sources.batch
    ),
    "device": _flag(
        "Run",
        None,
        DEVICE,
        "Device to compute on; auto selects CUDA if it is available.",
        "auto",
    ),
    "jobs": _flag(
        "Run",
        "INT",
        COUNT,
        "Number of trainings that run in parallel.",
        # os.cpu_count() is None where the number of cores cannot be determined
        min(2, os.cpu_count() or 1),
        show_default="2, or 1 on a machine with one core",
    ),
    # is_flag: the option is a switch without a value
    "dry-run": _flag("Run", None, None, "Print the resolved settings as JSON and stop.", False, is_flag=True),
}
# Additional spellings for users of EG3D. The argument of the command's function has the name of the key.
_SPELLINGS = {
    "before": ("--network",),
    "latents": ("--seeds",),
    "psi": ("--trunc",),
    "cutoff": ("--trunc-cutoff",),
    "dry-run": ("-n",),
}


def shared(names: str, rare: str = "", **changes: str | dict):
    """Return a decorator that adds shared options to a command, in the order of their names.

    Args:
        names: names of options (keys of _FLAGS), separated by spaces.
        rare: names of further options, which only --help-all shows and --set NAME=VALUE sets.
        changes: changes for this job, by the name of the option with underscores. A text replaces the help
            text; a dictionary replaces any arguments of `option`.
    """
    decorators = []
    for option_name in (*names.split(), *rare.split()):
        parameter_name = option_name.replace("-", "_")
        option_change = changes.get(parameter_name, {})
        # the third element has no dashes: click names the argument of the function by it
        spellings = (f"--{option_name}", *_SPELLINGS.get(option_name, ()), parameter_name)
        option_arguments = {
            **_FLAGS[option_name],
            **({"help": option_change} if isinstance(option_change, str) else option_change),
        }
        # an option of `rare` has no flag of its own; --set NAME=VALUE sets it
        decorators.append(option(*spellings, rare=option_name in rare.split(), **option_arguments))
    return combine_decorators(*decorators)
