"""Registry of the families of flow generators.

A family is a module of this package that FAMILIES names, or a plugin's file (docs/extending.md). It registers
a `FlowFamily` (base/family.py). `train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow` then
recognise its folders by their content.
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
_noticed: set[str] = set()  # names of families whose notice this process has printed


def print_notice(text: str) -> None:
    """Print a notice to stderr, so that it does not mix with results on stdout."""
    print(text, file=sys.stderr, flush=True)


def register(family: Family) -> Family:
    """Add a family to the registry under its name, and return it."""
    FAMILIES.add(family.name, family)
    return family


def bundled_family(name: str) -> FlowFamily | None:
    """Return the bundled generator's family of this name, or None."""
    family = FAMILIES[name] if name in FAMILIES else None
    return family if family is not None and family.bundled else None


def family_of(root: Path, say: Callable[[str], None] = print_notice) -> FlowFamily:
    """Return the family of a folder, or the bundled family of that name. Its notice is printed once per
    process.

    Args: say: prints the notice.
    Raises: FileNotFoundError for a missing folder, or a folder of no known family.
    """
    root, bundled = Path(root), bundled_family(str(root))
    if bundled is not None:
        return bundled
    # A plugin's family may recognise the folder, so plugins must be loaded before the search.
    load_plugins()
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _noticed:
                _noticed.add(family.name)
                say(family.notice)
            return family
    if not root.is_dir() or not any(root.iterdir()):
        got = "an empty folder" if root.is_dir() else "no such folder" if not root.exists() else "a file"
        addresses = [family.address for family in FAMILIES.values() if family.address]
        # Someone who wrote the name of a published generator gets the address of just that one.
        same = [address for address in addresses if address.rpartition("/")[2].lower() == root.name.lower()]
        fetch = " or ".join(same or addresses)
        raise FileNotFoundError(
            f"pipeline: expected a generator's folder, got {got}: {root}. Name the folder, or download one:"
            f" {fetch}"
        )
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(
        f"pipeline: {root} is not the folder of a known generator. Known are {layouts}. Name such a folder."
    )


def released_sizes() -> dict[str, Callable[[], list[SizedStage]]]:
    """Return functions that build the stages of all published generators without weights, by generator
    name.
    """
    return {name: make for family in FAMILIES.values() for name, make in family.released().items()}


def check_source(source: ProblemSource) -> None:
    """Raise ValueError for options that have no effect on a problem, or for a folder without pairs."""
    family = bundled_family(source.pipeline)
    if family is not None:
        reject_unread(
            source,
            (*family.common, *family.options),
            f"only applies with --pipeline=DIR and has no effect on the bundled generator {family.name}",
        )
        return
    # The family of a folder is not known yet, so options of any other family pass here and are checked later.
    bundled_only = {name for family in FAMILIES.values() if family.bundled for name in family.options}
    read = [f.name for f in fields(source) if f.name not in bundled_only]
    reject_unread(source, read, "only applies to a bundled generator and has no effect with --pipeline=DIR")
    if source.pairs is None and source.needs_pairs:
        raise ValueError(
            "--pairs: expected a folder of preference pairs with --pipeline=DIR, got none. Name the"
            " folder; only the bundled toy has pairs of its own."
        )


def unread_options(source: ProblemSource, read: Sequence[str]) -> str:
    """List the flags of options that differ from their default but are not among those that are read."""
    return ", ".join(
        f"--{(f.metadata['knob'].name or f.name if 'knob' in f.metadata else f.name).replace('_', '-')}"
        for f in fields(source)
        # An option at its default counts as not given.
        if f.name not in read and getattr(source, f.name) != f.default
    )


def reject_unread(source: ProblemSource, read: Sequence[str], why: str) -> None:
    """Raise ValueError, with the reason `why`, for options that are given but not read."""
    extra = unread_options(source, read)
    if extra:
        raise ValueError(f"{extra}: {why}. Leave it out.")
