"""Registry of the families of flow generators.

A family supports one published generator, such as TRELLIS. Each family is a module of this package that
FAMILIES lists, or a plugin's file (docs/extending.md). The module registers a `FlowFamily` (base/family.py).
`train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow` then recognise the generator's folders by
their content.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from eg3d_rlhf.core.registry import Registry, load_plugins
from eg3d_rlhf.tuning.flow.base.family import Family, FlowFamily, SizedStage
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource

FAMILIES: Registry[FlowFamily] = Registry(
    "flow family",
    {
        "toy": "eg3d_rlhf.tuning.flow.toy.family",
        "trellis": "eg3d_rlhf.tuning.flow.families.trellis",
        "trellis2": "eg3d_rlhf.tuning.flow.families.trellis2",
        "hunyuan3d": "eg3d_rlhf.tuning.flow.families.hunyuan3d",
        "sam3d": "eg3d_rlhf.tuning.flow.families.sam3d",
    },
)
# Addresses at which the folders of these families' generators are published. They stand here, so that the
# message for a folder that does not exist imports no family.
ADDRESSES = {
    "trellis": "https://huggingface.co/microsoft/TRELLIS-image-large",
    "trellis2": "https://huggingface.co/microsoft/TRELLIS.2-4B",
    "hunyuan3d": "https://huggingface.co/tencent/Hunyuan3D-2.1",
    "sam3d": "https://huggingface.co/facebook/sam-3d-objects",
}
# Names of this package's bundled generators -> fields of ProblemSource that they use: fields that most
# families use, and additional fields.
BUNDLED = {"toy": (("pipeline", "seed", "precision"), ("labelled",))}
_noticed_families: set[str] = set()  # names of families whose notice this process has printed


def print_notice(text: str) -> None:
    """Print a notice to stderr, so that it does not mix with results on stdout."""
    print(text, file=sys.stderr, flush=True)


def register(family: Family) -> Family:
    """Add a family to the registry under its name, and return it."""
    FAMILIES.add(family.name, family)
    return family


def bundled_family(name: str) -> FlowFamily | None:
    """Return the family of the bundled generator with this name, or None if there is no such generator."""
    family = FAMILIES[name] if name in FAMILIES else None
    return family if family is not None and family.bundled else None


def family_of(root: Path, print_line: Callable[[str], None] = print_notice) -> FlowFamily:
    """Return the family of a generator's folder, or the bundled family if `root` is its name.

    If the family has a notice, for example about its licence, the notice is printed once per process.

    Args:
        root: folder of a generator, or the name of a bundled generator.
        print_line: function that prints the notice.
    Raises: FileNotFoundError if the folder is missing, or if no family recognises it.
    """
    bundled = bundled_family(str(root))
    root = Path(root)
    if bundled is not None:
        return bundled
    check_root(root)
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _noticed_families:
                _noticed_families.add(family.name)
                print_line(family.notice)
            return family
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(
        f"--pipeline: no generator was recognised in {root}. Pass a folder with the files of one of these"
        f" generators: {layouts}."
    )


def check_root(root: Path | str) -> None:
    """Check that the folder of a generator exists and contains a file, and load the plugins.

    The families of this package are not imported, which would take seconds.

    Args:
        root: folder of a generator, or the name of a bundled generator, which is not checked.
    Raises: FileNotFoundError that names --pipeline.
    """
    # A plugin's family may be named, or recognise the folder, so plugins must be loaded before the search.
    load_plugins()
    if str(root) in _bundled_fields():
        return
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        return
    if root.is_dir():
        problem_text = f"the folder {root} is empty"
    elif root.exists():
        problem_text = f"{root} is a file and not a folder"
    else:
        problem_text = f"the folder {root} does not exist"
    # all families that are not in the table were added by plugins, and are imported already
    plugin_families = [FAMILIES[name] for name in FAMILIES if not FAMILIES.is_listed(name)]
    addresses = [*ADDRESSES.values(), *(family.address for family in plugin_families if family.address)]
    # Someone who wrote the name of a published generator gets the address of just that one.
    # The last part of an address is the generator's name.
    same_name_addresses = [
        address for address in addresses if address.rpartition("/")[2].lower() == root.name.lower()
    ]
    download_text = " or ".join(same_name_addresses or addresses)
    raise FileNotFoundError(
        f"--pipeline: {problem_text}. Pass the folder of a generator. Generators can be downloaded from"
        f" {download_text}."
    )


def released_sizes() -> dict[str, Callable[[], list[SizedStage]]]:
    """Return one function per published generator, by the generator's name.

    Each function builds the stages of its generator without weights, for estimates of memory.
    """
    return {
        name: build_stages for family in FAMILIES.values() for name, build_stages in family.released().items()
    }


def _bundled_fields() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return `BUNDLED` together with the bundled generators of plugins. Imports no family of this package."""
    # all families that are not in the table were added by plugins, and are imported already
    plugin_families = [FAMILIES[name] for name in FAMILIES if not FAMILIES.is_listed(name)]
    return BUNDLED | {
        family.name: (family.common, family.options) for family in plugin_families if family.bundled
    }


def check_source(source: ProblemSource) -> None:
    """Raise ValueError for options that have no effect on a problem, or if preference pairs are missing."""
    load_plugins()
    bundled_fields = _bundled_fields()
    if source.pipeline in bundled_fields:
        common_fields, more_fields = bundled_fields[source.pipeline]
        reject_unread(
            source,
            (*common_fields, *more_fields),
            f"the bundled generator {source.pipeline}, only with --pipeline=DIR",
        )
        return
    if source.pairs is None and source.needs_pairs:
        raise ValueError(
            "--pairs is missing. With --pipeline=DIR, pass the folder of preference pairs as --pairs=DIR."
            " Only the bundled toy generator has its own pairs."
        )
    check_root(source.pipeline)
    # The family of a folder is not known yet, so options of any other family pass here and are checked later.
    bundled_only_fields = {name for _, more_fields in bundled_fields.values() for name in more_fields}
    read_options = [f.name for f in fields(source) if f.name not in bundled_only_fields]
    reject_unread(source, read_options, "--pipeline=DIR, only with a bundled generator")


def unread_options(source: ProblemSource, read_options: Sequence[str]) -> str:
    """Return the flags, separated by commas, that differ from their default but are not read.

    Args:
        source: options of a problem.
        read_options: names of the fields of ProblemSource that are read.
    """
    flags = []
    for f in fields(source):
        # An option at its default counts as not given.
        if f.name in read_options or getattr(source, f.name) == f.default:
            continue
        # A flag may have another name than its field; the field's metadata then state the name.
        flag_name = f.metadata["knob"].name or f.name if "knob" in f.metadata else f.name
        flags.append(f"--{flag_name.replace('_', '-')}")
    return ", ".join(flags)


def reject_unread(source: ProblemSource, read_options: Sequence[str], generator_text: str) -> None:
    """Raise ValueError for options that are given but not read.

    Args:
        source: options of a problem.
        read_options: names of the fields of ProblemSource that are read.
        generator_text: end of the sentence "... cannot be used with" in the message, such as "--pipeline=DIR,
            only with a bundled generator".
    """
    unread_flags = unread_options(source, read_options)
    if unread_flags:
        raise ValueError(
            f"{unread_flags} cannot be used with {generator_text}. Remove {unread_flags} from the command."
        )
