"""The leaderboard of a campaign's generators, from its judgements; of one of its questions, too."""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, Mode, Shape
from eg3d_rlhf.people.label.questions import answers_to
from eg3d_rlhf.preferences.leaderboard import Game, Leaderboard, Standing, leaderboard

COLUMNS = ("group", "name", "points", "lo", "hi", "n", "score", "wins", "losses", "ties", "both_bad", "prompts", "needs")


def leaderboard_of(rows: Iterable[JudgementRow], question: str | None = None) -> Leaderboard:
    """The leaderboard of judgements, or of the votes on a question.

    Each annotator's first answer to a pair counts: no repeats, gold checks, practice, skips or answers taken back. Pairs of one generator
    say nothing of it. A study's answers never count: they would give its result away. Games are clustered by the shapes' condition; where
    they have none, by their seed if it is one, else by the pair.
    """
    kept = sorted((r for r in rows if r.kind == Kind.PAIR and r.mode == Mode.LABEL and not r.undone), key=lambda r: r.id)
    kept = [r for r in kept if r.choice != Choice.SKIP and r.left.generator != r.right.generator]
    if question is not None:
        kept = answers_to(question, kept)
    names = generator_names(shape for r in kept for shape in (r.left, r.right))
    games = {(r.annotator, r.campaign, r.pair): _game(r, names) for r in reversed(kept)}
    return leaderboard(list(games.values())[::-1])


def _game(row: JudgementRow, names: dict[str, str]) -> Game:
    left, right = names[row.left.generator], names[row.right.generator]
    winner = {Choice.LEFT: left, Choice.RIGHT: right}.get(row.choice)
    seed = row.left.seed if row.left.seed == row.right.seed and not row.left.file else None
    prompt = row.left.condition or (("seed", seed) if seed is not None else ("pair", row.campaign, row.pair))
    return Game(left, right, winner, row.annotator, prompt, row.choice == Choice.BAD)


def generator_names(shapes: Iterable[Shape]) -> dict[str, str]:
    """What to call each generator: an asset's label; a network's file, with its folder or the hash's beginning where files share a name."""
    first = {shape.generator: shape for shape in shapes}
    paths = {key: Path(shape.source or "bundled generator") for key, shape in first.items() if not shape.file}
    found = {key: paths[key].name if key in paths else key for key in first}
    for parts in (2, 3):
        times = Counter(found.values())
        for key in [key for key in paths if times[found[key]] > 1]:
            found[key] = "/".join(paths[key].parts[-2:]) + (f" {key[:8]}" if parts == 3 else "")
    return found


def as_text(board: Leaderboard) -> str:
    """A table to read in a terminal."""
    if not board.groups and not board.few:
        return "No comparisons of two generators yet."
    width = max(len(s.name) for s in (*(s for group in board.groups for s in group), *board.few))
    lines = []
    for group in board.groups:
        lines += [f"{'':>3} {'generator':<{width}} points   95 %             n  score  won lost tied both bad"]
        lines += [f"{place:>2}. {_line(standing, width)}" for place, standing in enumerate(group, 1)] + [""]
    return "\n".join([*lines, *board.notes()])


def _line(s: Standing, width: int) -> str:
    ends = f"{_end(s.lo)} to {_end(s.hi)}"
    if s.lo is None or s.hi is None:
        ends = "any" if s.lo == s.hi else f"at most {_end(s.hi)}" if s.lo is None else f"at least {_end(s.lo)}"
    points = "–" if s.points is None else f"{s.points:.0f}"
    return f"{s.name:<{width}} {points:>6}   {ends:<14} {s.games:>4}  {s.score:>4.0%} {s.wins:>5} {s.losses:>4} {s.ties:>4} {s.both_bad:>8}"


def _end(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def as_csv(board: Leaderboard) -> str:
    """A line per generator: the group's number from 1, empty where there are no points; open ends are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for number, group in [*enumerate(board.groups, 1), ("", board.few)]:
        for s in group:
            row = s.to_dict()
            lo, hi = row.pop("ci95") or (None, None)
            writer.writerow({**row, "group": number, "lo": lo, "hi": hi})
    return out.getvalue()
