"""What a measure is. A part of a report is a table of them; `evaluation.paired.compare` does the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Measure:
    """One figure of each item, such as a latent's shape.

    >>> relief = Measure("face relief", None, "higher", "world units")
    >>> relief.values({"face relief": [0.1, 0.2]}), relief.outcome(0.01, 0.03), relief.outcome(-0.01, 0.03)
    (array([0.1, 0.2]), 'better', 'no clear change')
    """

    name: str  # in tables and JSON
    # what was seen of N items -> values [N], NaN where an item has none; None: the entry of that name
    of: Callable[..., Any] | None
    better: str  # "higher", "lower", or "" where neither is
    unit: str
    meaning: str = ""  # what it does not say by itself

    def values(self, *seen: Any) -> np.ndarray:
        """[N] of what was seen of N items, for a pairwise measure in both of two networks."""
        values = seen[0][self.name] if self.of is None else self.of(*seen)
        return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)

    def outcome(self, lo: float, hi: float) -> str:
        """Return 'better', 'worse', or 'no clear change' where the interval lo..hi of a change contains 0."""
        if lo <= 0 <= hi:
            return "no clear change"
        return "better" if (lo > 0) == (self.better == "higher") else "worse"
