"""Define the class of a measure. `evaluation.paired.compare` evaluates tables of measures for a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Measure:
    """Description of a number that is computed for each item, for example for the shape of each latent.

    >>> relief = Measure("face relief", None, "higher", "world units")
    >>> relief.values({"face relief": [0.1, 0.2]}), relief.outcome(0.01, 0.03), relief.outcome(-0.01, 0.03)
    (array([0.1, 0.2]), 'better', 'no clear change')
    """

    name: str  # name in tables and JSON
    # Function that computes the values [N] from the measurements of N items. An item without a value has NaN.
    # None: the measurements are a dictionary, and its entry with this measure's name holds the values.
    from_seen: Callable[..., Any] | None
    better: str  # "higher", "lower", or "" if neither direction is better
    unit: str
    meaning: str = ""  # explanation that a table prints beside the name

    def values(self, *measurements: Any) -> np.ndarray:
        """Return the values [N] of this measure for N items.

        Args:
            measurements: measurements of the items, in the form that the function of this measure takes. A
                measure that compares two networks takes two arguments, the measurements under each network.
        """
        measure_values = (
            measurements[0][self.name] if self.from_seen is None else self.from_seen(*measurements)
        )
        return (
            measure_values.cpu().numpy()
            if isinstance(measure_values, torch.Tensor)
            else np.asarray(measure_values)
        )

    def outcome(self, lo: float, hi: float) -> str:
        """Classify a change by its confidence interval.

        Args:
            lo: lower end of the interval of the change, in the unit of the measure.
            hi: upper end of the interval.

        Returns: 'no clear change' if the interval contains 0, else 'better' or 'worse', or 'changed' if
            neither direction of this measure is better.
        """
        if lo <= 0 <= hi:
            return "no clear change"
        if not self.better:
            return "changed"
        return "better" if (lo > 0) == (self.better == "higher") else "worse"
