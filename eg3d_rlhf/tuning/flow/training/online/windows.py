"""Which steps of the sampler draw noise and are trained on: a window, the same for all samples of an update
(MixGRPO; Flow-GRPO-Fast).

Outside it the sampler takes the flow's own steps: noise there would reach the reward as defects of the asset.

Deviates: published windows that move past the last step shrink, and then stand empty while the run goes on.
These stay whole: a window begins at `steps - size` at the latest, and, there, stays or starts again.
"""

from collections.abc import Callable


def check_window(size: int, low: int, high: int, steps: int) -> None:
    """Args: steps: of the sampler that may draw noise.

    Raises: ValueError for a window of `size` steps that low..high cannot hold.
    """
    if not 0 <= low < high <= steps or not 1 <= size <= high - low:
        got = f"{size} of steps {low} to {high}"
        raise ValueError(
            f"window: expected 1 or more of the sampler's steps 0 to {steps}, got {got}. The last step draws"
            " nothing."
        )


def random_window(size: int, low: int, high: int, draw: Callable[[int, int], int]) -> range:
    """Args: high: the end of what it may cover; draw: an integer of low..high, both included."""
    check_window(size, low, high, high)
    begin = draw(low, high - size)
    return range(begin, begin + size)


def progressive_window(
    round_number: int, size: int, low: int, high: int, *, stride: int, rounds: int, again: bool
) -> range:
    """From noisy steps to quiet ones: it moves by `stride` every so many `rounds`; at the end it stays, or
    begins again.
    """
    check_window(size, low, high, high)
    begins = list(dict.fromkeys(min(begin, high - size) for begin in range(low, high, stride)))
    place = round_number // rounds
    begin = begins[place % len(begins) if again else min(place, len(begins) - 1)]
    return range(begin, begin + size)
