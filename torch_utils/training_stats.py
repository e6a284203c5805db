"""Collect values during training under names, and compute statistics of them over all processes.

The statistics are the number, the mean and the standard deviation of the values.
"""

import math
from collections.abc import Callable

import torch

# Function that sums a tensor over all processes, in place or not, and returns the sum
SumOverProcesses = Callable[[torch.Tensor], torch.Tensor]


class Collector:
    """Collector of the number, mean and standard deviation of the values that were reported under each name.

    The statistics cover the values since the last `flush`.

    >>> stats = Collector()
    >>> stats.report("Loss/G/loss", torch.tensor([1.0, 3.0]))
    >>> stats.flush()["Loss/G/loss"]
    {'num': 2, 'mean': 2.0, 'std': 1.0}
    """

    def __init__(self):
        self._moments: dict[str, torch.Tensor] = {}  # by name: [count, sum, sum of squares], float64

    def report(self, name: str, reported_values: torch.Tensor | float) -> None:
        """Add a number, or all elements of a tensor, to the statistics of a name.

        Args:
            name: name of the statistic.
            reported_values: number or tensor.
        """
        # A sum of squares of many values would be too inaccurate in float32.
        x = torch.as_tensor(reported_values, dtype=torch.float64).detach().flatten().cpu()
        # Sums can be added over calls and over processes, means cannot.
        moments = torch.stack(
            [torch.tensor(float(x.numel()), dtype=torch.float64), x.sum(), x.square().sum()]
        )
        self._moments[name] = self._moments.get(name, torch.zeros(3, dtype=torch.float64)) + moments

    def mean(self, name: str, sum_over_processes: SumOverProcesses | None = None) -> float | None:
        """Return the mean of the values of a name since the last `flush`, or None if nothing was reported.

        Args:
            name: name of the statistic.
            sum_over_processes: function that sums a tensor over all processes; None: this process alone.
        """
        if name not in self._moments:
            return None
        moments = self._moments[name].clone()  # a copy, since `sum_over_processes` may work in place
        value_count, value_sum, _ = (
            moments if sum_over_processes is None else sum_over_processes(moments)
        ).tolist()
        return value_sum / value_count

    def flush(self, sum_over_processes: SumOverProcesses | None = None) -> dict[str, dict[str, float]]:
        """Return the statistics by name, in alphabetical order, and empty the collector.

        Args:
            sum_over_processes: function that sums a tensor over all processes, all of which must have
                reported the same names; None: this process alone.

        Returns: by name, 'num' (number of values), 'mean' and 'std' (standard deviation).
        """
        statistics_by_name = {}
        # Sorted, so that row i of the tensor [names, 3] belongs to the same name in all processes.
        names = sorted(self._moments)
        moments = (
            torch.stack([self._moments[name] for name in names])
            if names
            else torch.zeros(0, 3, dtype=torch.float64)
        )
        if sum_over_processes is not None and names:
            moments = sum_over_processes(moments)
        for name, (value_count, value_sum, square_sum) in zip(names, moments.tolist(), strict=True):
            mean = value_sum / max(value_count, 1)
            statistics_by_name[name] = {
                "num": int(value_count),
                "mean": mean,
                # Rounding can make the variance of nearly equal values slightly negative.
                "std": math.sqrt(max(square_sum / max(value_count, 1) - mean**2, 0.0)),
            }
        self._moments.clear()
        return statistics_by_name

    def state(self) -> dict[str, list[float]]:
        """Return the sums since the last `flush` as JSON values, for a checkpoint.

        Returns: by name, [number of values, sum, sum of squares].
        """
        return {name: moments.tolist() for name, moments in self._moments.items()}

    def restore(self, saved_sums: dict[str, list[float]]) -> None:
        """Replace the sums by those that `state` returned, which are passed as `saved_sums`."""
        self._moments = {
            name: torch.tensor(moments, dtype=torch.float64) for name, moments in saved_sums.items()
        }
