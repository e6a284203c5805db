"""Running moments of named training statistics."""

import math

import torch


class Collector:
    """Number, mean and standard deviation of everything reported under a name since the last `flush`.

    >>> stats = Collector()
    >>> stats.report("Loss/G/loss", torch.tensor([1.0, 3.0]))
    >>> stats.flush()["Loss/G/loss"]
    {'num': 2, 'mean': 2.0, 'std': 1.0}
    """

    def __init__(self):
        self._moments: dict[str, torch.Tensor] = {}  # name -> [count, sum, sum of squares], float64

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add all elements of `value`."""
        x = torch.as_tensor(value, dtype=torch.float64).detach().flatten().cpu()
        moments = torch.stack([torch.tensor(float(x.numel()), dtype=torch.float64), x.sum(), x.square().sum()])
        self._moments[name] = self._moments.get(name, torch.zeros(3, dtype=torch.float64)) + moments

    def mean(self, name: str) -> float | None:
        """Mean so far, or None where nothing was reported."""
        if name not in self._moments:
            return None
        count, total, _ = self._moments[name].tolist()
        return total / count

    def flush(self) -> dict[str, dict[str, float]]:
        """Statistics by name, in alphabetical order; the collector is empty afterwards."""
        out = {}
        for name in sorted(self._moments):
            count, total, squares = self._moments[name].tolist()
            mean = total / max(count, 1)
            out[name] = {"num": int(count), "mean": mean, "std": math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))}
        self._moments.clear()
        return out

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint needs."""
        return {name: moments.tolist() for name, moments in self._moments.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Continue from `state`."""
        self._moments = {name: torch.tensor(moments, dtype=torch.float64) for name, moments in state.items()}
