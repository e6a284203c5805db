"""Small plans and answers for tests of the store."""

from eg3d_rlhf.people.label.entities import Answer, Choice, Kind, PlannedPair, Shape

HASH = "a1" * 32


def shape(seed: int, **changes) -> Shape:
    """A shape of one generator; nothing is drawn."""
    values = {"generator": HASH, "source": "", "seed": seed, "psi": 0.7, "level": 10.0, "resolution": 128, "triangles": 30_000}
    return Shape(**{**values, **changes})


def plan(pairs: int, gold: int = 0, training: int = 0, start: int = 0) -> list[PlannedPair]:
    """Disjoint pairs of consecutive seeds: training, then pairs, then gold; the first shape is right where an answer is expected."""
    kinds = [Kind.TRAINING] * training + [Kind.PAIR] * pairs + [Kind.GOLD] * gold
    return [
        PlannedPair(
            first=shape(start + 2 * i), second=shape(start + 2 * i + 1), kind=kind, expected=None if kind is Kind.PAIR else "first",
            explanation=f"because {i}" if kind is Kind.TRAINING else "",
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


def answer(assignment, key: str, choice: Choice = Choice.LEFT, **changes) -> Answer:
    """An answer to an assigned pair, or to a token."""
    token = assignment if isinstance(assignment, str) else assignment.token
    return Answer(**{"key": key, "assignment": token, "choice": choice, "milliseconds": 1500, **changes})


class Clock:
    """A clock that tests set."""

    def __init__(self, now: float = 1_750_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now
