"""How fast the network that draws follows the policy: after a round, old <- d old + (1 - d) new, by the
number n of optimiser steps.
"""

DECAYS = {  # by name, as DiffusionNFT has them
    "copy": lambda n: 0.0,
    "slow": lambda n: min(0.001 * n, 0.5),
    "late": lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999),
    "dgpo": lambda n: min(0.001 * n, 0.3),
    "frozen": lambda n: 1.0,  # offline: samples stay those of the network that drew them
}


def decay(name: str, steps: int) -> float:
    """d after so many optimiser steps, in 0..1.

    >>> decay("slow", 100), decay("copy", 100), decay("late", 100)
    (0.1, 0.0, 0.1875)
    """
    return DECAYS[name](steps)
