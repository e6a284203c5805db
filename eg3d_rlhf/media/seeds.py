"""The seeds syntax of EG3D's tools: '0,2-5'."""

MOST_SEEDS = 100_000
_LARGEST = 2**32 - 1  # of numpy's RandomState


def parse_seeds(text: str) -> list[int]:
    """Seeds of a comma-separated list of numbers and inclusive ranges, in the order given: '0,2-5' -> [0, 2, 3, 4, 5].

    Raises: ValueError for anything else, an empty list, a range that runs backwards, a seed above 2^32 - 1, over 100,000 seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds: expected numbers and ranges such as 0,2-5, got {text!r}. Correct {part.strip()!r}.")
        start, end = int(first), int(last or first)
        if start > end or end > _LARGEST:
            raise ValueError(f"seeds: expected ranges that rise, up to {_LARGEST}, got {part.strip()!r}. Correct it.")
        if len(seeds) + end - start >= MOST_SEEDS:
            raise ValueError(f"seeds: expected at most {MOST_SEEDS} seeds, got more in {text!r}. Run in parts.")
        seeds += range(start, end + 1)
    return seeds
