"""Checks of a problem's source by option names, before any file is read.

This module imports no torch, so that `--help` is quick.
"""

from collections.abc import Sequence
from dataclasses import fields

from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families import FAMILIES, bundled_family


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
        f"--{f.name.replace('_', '-')}"
        for f in fields(source)
        # An option at its default counts as not given.
        if f.name not in read and getattr(source, f.name) != f.default
    )


def reject_unread(source: ProblemSource, read: Sequence[str], why: str) -> None:
    """Raise ValueError, with the reason `why`, for options that are given but not read."""
    extra = unread_options(source, read)
    if extra:
        raise ValueError(f"{extra}: {why}. Leave it out.")
