"""Check of where a problem is read from, by names alone. This file imports no torch, so that `--help` is
quick.
"""

from collections.abc import Sequence
from dataclasses import fields

from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families import FAMILIES, bundled_family


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
