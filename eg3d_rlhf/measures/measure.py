"""Define a measure; `evaluation.paired.compare` evaluates tables of them for a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Measure:
    """One figure per item, for example a property of each latent's shape.

    >>> relief = Measure("face relief", None, "higher", "world units")
    >>> relief.values({"face relief": [0.1, 0.2]}), relief.outcome(0.01, 0.03), relief.outcome(-0.01, 0.03)
    (array([0.1, 0.2]), 'better', 'no clear change')
    """

    name: str  # in tables and JSON
    # Function of what was measured on N items that returns values [N], NaN where an item has none.
    # None: the entry of the measured values with this name.
    of: Callable[..., Any] | None
    better: str  # "higher", "lower", or "" if neither direction is better
    unit: str
    meaning: str = ""  # explanation that a table prints beside the name

    def values(self, *seen: Any) -> np.ndarray:
        """Return the values [N] of N items.

        Args: seen: what was measured on the items; for a pairwise measure two of them, one per network.
        """
        values = seen[0][self.name] if self.of is None else self.of(*seen)
        return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)

    def outcome(self, lo: float, hi: float) -> str:
        """Return 'better' or 'worse', or 'no clear change' if the interval lo..hi of a change contains 0."""
        if lo <= 0 <= hi:
            return "no clear change"
        return "better" if (lo > 0) == (self.better == "higher") else "worse"
