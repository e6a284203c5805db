"""Questions that a campaign of pairs asks besides which one is better: their names, the votes on them, and figures for each.

A question is written as its name alone where it is one of KNOWN, whose texts the page has in its languages, else as NAME=TEXT.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from eg3d_rlhf.people.label.entities import Choice, JudgementRow

KNOWN = ("geometry", "texture", "prompt")
VOTES = tuple(choice.value for choice in (Choice.LEFT, Choice.RIGHT, Choice.TIE))
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
MOST, MAX_TEXT = 6, 120  # questions; characters


@dataclass(frozen=True)
class Question:
    """Something that is asked of a pair."""

    name: str
    text: str | None  # None: the page knows it


def parse_questions(written: Iterable[str]) -> tuple[Question, ...]:
    """Questions as a campaign's settings hold them. Raises: ValueError for unknown ones, for texts that do not fit, and for one twice."""
    found = []
    for one in written:
        name, equals, text = (part.strip() for part in str(one).partition("="))
        if not NAME.fullmatch(name) or (not equals and name not in KNOWN):
            known = ", ".join(KNOWN)
            raise ValueError(f"--questions: expected {known} or NAME=TEXT, the name in a to z, 0 to 9, _ and -, got {one!r}. Correct it.")
        if equals and (not 1 <= len(text) <= MAX_TEXT or not text.isprintable()):
            got = repr(text[:40])
            raise ValueError(f"--questions: expected {name}= a text of 1 to {MAX_TEXT} printable characters, got {got}. Correct it.")
        found.append(Question(name, text if equals else None))
    names = [question.name for question in found]
    if len(set(names)) < len(names) or len(names) > MOST:
        raise ValueError(f"--questions: expected at most {MOST}, each once, got {', '.join(names)}. Leave some out.")
    return tuple(found)


def check_votes(asked: Iterable[str], votes: Mapping[str, str], choice: Choice) -> None:
    """Raises: ValueError unless every question, and no other, has a vote; of what is skipped there is none.

    Args: asked: as a campaign's settings hold them.
    """
    names = {question.name for question in parse_questions(asked)} if choice is not Choice.SKIP else set()
    if set(votes) != names or not set(votes.values()) <= set(VOTES):
        wanted = f"a vote of {', '.join(VOTES)} on each of {', '.join(sorted(names))}" if names else "no votes"
        raise ValueError(f"answer: expected {wanted}, got {dict(list(votes.items())[:MOST])}. Reload the page.")


def check_stored(votes: str) -> None:
    """Raises: ValueError for what cannot be read as votes again."""
    try:
        found = json.loads(votes)
        fits = isinstance(found, dict) and all(NAME.fullmatch(name) and vote in VOTES for name, vote in found.items())
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"expected votes as JSON, question to one of {', '.join(VOTES)}, got {votes[:60]!r}. Export again.")


def answers_to(question: str, rows: Iterable[JudgementRow]) -> list[JudgementRow]:
    """The judgements that have a vote on a question, with the vote as their choice."""
    return [replace(row, choice=Choice(row.votes[question])) for row in rows if question in row.votes]


def figures(question: str, rows: Iterable[JudgementRow]) -> dict:
    """Counts of a question's votes, and how many chose the same side in all; JSON types."""
    voted = [row for row in rows if question in row.votes]
    counts = Counter(row.votes[question] for row in voted)
    decided = [row for row in voted if row.choice in (Choice.LEFT, Choice.RIGHT) and row.votes[question] != Choice.TIE]
    return {
        "name": question, "n": len(voted), **{vote: counts[vote] for vote in VOTES},
        "decided": len(decided), "as_overall": sum(row.votes[question] == row.choice for row in decided),
    }  # fmt: skip
