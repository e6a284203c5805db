"""Judgements of pairs of assets, as the labelling tool exports them: which of two files people preferred.

JSON lines, paths relative to the file: {"preferred": "a.ply", "rejected": "b.ply"}, with "tie": true where neither was; other fields are
passed over. Several judgements of two assets are counted, and the majority decides.
"""

from collections import Counter
from pathlib import Path

import click

from eg3d_rlhf.core.cli import option
from eg3d_rlhf.preferences.labels import jsonl_records

EXAMPLE = '{"preferred": "a.ply", "rejected": "b.ply"}'
judged_option = option("--judged", metavar="FILE", type=click.Path(path_type=Path), default=None, show_default="the list's ranks",
                       help="Judgements of pairs, such as `label.py export --kind=asset-pairs` writes, in place of ranks and --scheme.")


class Judged:
    """Votes on pairs of assets."""

    def __init__(self, path: Path):
        """Raises: FileNotFoundError; ValueError naming the line."""
        if not path.is_file():
            raise FileNotFoundError(f"--judged: expected a .jsonl file of judgements, got nothing at {path}. Check the path.")
        self.wins: Counter[tuple[Path, Path]] = Counter()  # how often the first was preferred to the second
        for line, record in jsonl_records(path, EXAMPLE):
            better, worse = (str(record.get(key) or "") for key in ("preferred", "rejected"))
            if not better or not worse or better == worse:
                raise ValueError(f"--judged: {path.name}, line {line}: expected two assets, got {record!r:.120}. Write {EXAMPLE}.")
            if not record.get("tie", False):
                self.wins[_place(path.parent, better), _place(path.parent, worse)] += 1

    def votes(self, a: Path, b: Path) -> tuple[int, int]:
        """How often each of two assets was preferred."""
        return self.wins[a.resolve(), b.resolve()], self.wins[b.resolve(), a.resolve()]


def votes_of(path: Path | None, scheme: str) -> Judged | None:
    """What --judged names. Raises: as `Judged`; ValueError beside a scheme, which is of ranks."""
    if path is not None and scheme != "all":
        raise ValueError(f"--scheme: expected none beside --judged, which needs no ranks, got {scheme}. Leave one of them out.")
    return Judged(path) if path is not None else None


def _place(folder: Path, name: str) -> Path:
    return (folder / name).resolve()
