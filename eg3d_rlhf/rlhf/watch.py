"""Watch for over-optimisation: measures that the reward phase never sees, on fixed held-out latents, once per tick.

Letters: N watched latents.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from eg3d_rlhf.generators import ws_of_seeds

WATCH_SEEDS = range(300_000, 300_032)
PSI = 0.7

Measure = Callable[[torch.nn.Module, torch.Tensor], np.ndarray]  # (G, ws [N, L, W]) -> [N], higher is better


class Watch:
    """Deltas of several measures against the untuned generator.

    Args:
        measures: name -> measure; the first is the reward that is optimised, the others are what it must not fall out with.
        G_ref: the untuned generator.
    """

    def __init__(self, measures: dict[str, Measure], G_ref: torch.nn.Module, seeds: Sequence[int] = WATCH_SEEDS):
        self.measures, self.seeds = measures, seeds
        self.initial = self._values(G_ref)
        self.alarms: list[dict] = []

    def _values(self, G: torch.nn.Module) -> dict[str, np.ndarray]:
        ws = ws_of_seeds(G, self.seeds, truncation_psi=PSI)
        return {name: measure(G, ws) for name, measure in self.measures.items()}

    def __call__(self, loop, stats: dict) -> dict[str, str]:
        """Tick callback of the loop: adds 'Watch/<name>' deltas to the statistics, returns fields for the status line."""
        fields, deltas = {}, {}
        for name, values in self._values(loop.nets.G_ema).items():
            delta = values - self.initial[name]
            mean, error = float(delta.mean()), float(delta.std(ddof=1) / np.sqrt(len(delta)))
            deltas[name] = (mean, error)
            stats[f"Watch/{name}"] = {"num": len(delta), "mean": mean, "std": float(delta.std())}
            fields[name] = f"{mean:+.3f}"
        fallen = over_optimised(deltas)
        if fallen:
            self.alarms.append({"nimg": loop.cur_nimg, "fallen": fallen})
            fields["WARNING"] = f"over-optimised({','.join(fallen)})"
        return fields


def over_optimised(deltas: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the measures that fell by more than two standard errors while the first one rose.

    Args:
        deltas: name -> (mean change, standard error); the first entry is the optimised reward.
    """
    (reward, _), *others = deltas.values()
    names = list(deltas)[1:]
    if reward <= 0:
        return []
    return [name for name, (mean, error) in zip(names, others, strict=True) if mean < -2 * error and mean < 0]
