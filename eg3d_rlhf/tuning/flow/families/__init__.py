"""The registry of families of flow generators.

A family is a module of this package that FAMILIES names, or a plugin's file (docs/extending.md): it registers
a `FlowFamily` (base/family.py), and `train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow` then
recognise its folders by what lies in them.
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
_noticed: set[str] = set()  # families whose notice was printed in this process


def print_notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def register(family: Family) -> Family:
    FAMILIES.add(family.name, family)
    return family


def bundled_family(name: str) -> FlowFamily | None:
    """Return the family that comes with this package under a name, if there is one."""
    family = FAMILIES[name] if name in FAMILIES else None
    return family if family is not None and family.bundled else None


def family_of(root: Path, say: Callable[[str], None] = print_notice) -> FlowFamily:
    """Return the family of a folder, or the bundled one of that name; its notice is printed once.

    Raises: FileNotFoundError for no folder, or one of no known family.
    """
    root, bundled = Path(root), bundled_family(str(root))
    if bundled is not None:
        return bundled
    load_plugins()  # any of theirs may know the folder
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _noticed:
                _noticed.add(family.name)
                say(family.notice)
            return family
    if not root.is_dir() or not any(root.iterdir()):
        got = "an empty folder" if root.is_dir() else "no such folder" if not root.exists() else "a file"
        addresses = [family.address for family in FAMILIES.values() if family.address]
        same = [address for address in addresses if address.rpartition("/")[2].lower() == root.name.lower()]
        fetch = " or ".join(same or addresses)
        raise FileNotFoundError(
            f"pipeline: expected a generator's folder, got {got}: {root}. Name it, or fetch one: {fetch}"
        )
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(
        f"pipeline: expected the folder of a known generator ({layouts}), got {root}. Name such a folder."
    )


def released_sizes() -> dict[str, Callable[[], list[SizedStage]]]:
    """Return the sizes of all published generators by name, in the order of FAMILIES."""
    return {name: make for family in FAMILIES.values() for name, make in family.released().items()}


def check_source(source: ProblemSource) -> None:
    """Reject options that have no effect on a problem, and a folder without pairs, by names alone.

    Raises: ValueError naming it.
    """
    family = bundled_family(source.pipeline)
    if family is not None:
        refuse(
            source,
            (*family.common, *family.options),
            f"belongs to --pipeline=DIR, and would have no effect on the {family.name}",
        )
        return
    alone = {name for family in FAMILIES.values() if family.bundled for name in family.options}
    read = [f.name for f in fields(source) if f.name not in alone]
    refuse(source, read, "belongs to a bundled generator, and would have no effect on --pipeline=DIR")
    if source.pairs is None and source.needs_pairs:
        raise ValueError(
            "--pairs: expected a folder of people's pairs beside --pipeline=DIR, got none. The toy alone"
            " brings its own."
        )


def beyond(source: ProblemSource, read: Sequence[str]) -> str:
    """List options that are given though they are not read."""
    return ", ".join(
        f"--{(f.metadata['knob'].name or f.name if 'knob' in f.metadata else f.name).replace('_', '-')}"
        for f in fields(source)
        if f.name not in read and getattr(source, f.name) != f.default
    )


def refuse(source: ProblemSource, read: Sequence[str], why: str) -> None:
    """Raise ValueError for options that are given though they are not read."""
    extra = beyond(source, read)
    if extra:
        raise ValueError(f"{extra}: {why}. Leave it out.")
