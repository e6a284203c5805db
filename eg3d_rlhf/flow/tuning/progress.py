"""How far a stage's training is, and the lines made of what its updates tell."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eg3d_rlhf.flow.dpo import TIME_BINS
from eg3d_rlhf.flow.tuning.update import BINNED, TrainConfig


@dataclass
class Progress:
    """What changes besides tensors; JSON."""

    step: int = 0  # updates done
    kept_step: int = 0  # with the best win rate; the last where there is no judge
    best: float | None = None  # that win rate
    since_best: int = 0  # win rates since
    ended: bool = False  # by the win rate
    sums: dict = field(default_factory=dict)  # of the line under way

    def add(self, figures: dict) -> None:
        """Count an update's figures into the line under way."""
        self.sums = _added(self.sums, {"updates": 1, **figures})

    def judged(self, rate: float, config: TrainConfig) -> bool:
        """Note a win rate; whether it is the best so far. A tie goes to the earlier."""
        best = self.best is None or rate > self.best
        if best:
            self.best, self.kept_step, self.since_best = rate, self.step, 0
        else:
            self.since_best += 1
        self.ended = self.since_best >= config.patience or rate < self.best - config.max_drop
        return best

    def line(self, lr: float, rate: float | None) -> dict:
        """The record of the line under way, which ends with it."""
        sums, self.sums = self.sums, {}
        record = {"step": self.step, "pairs": sums.get("pairs", 0)}
        if sums:
            record |= {name: sums[name] / sums["updates"] for name in ("loss", "grad_norm")} | _binned(sums["bins"]) | {"lr": lr}
        return record if rate is None else {**record, "win_rate": rate}


def _added(a: Mapping, b: dict) -> dict:
    """Sums of numbers, and of lists of them, in nested values."""
    if not a:
        return b
    plus: dict[type, Callable] = {dict: _added, list: lambda x, y: [p + q for p, q in zip(x, y, strict=True)]}
    return {k: plus[type(v)](a[k], v) if type(v) in plus else a[k] + v for k, v in b.items()}


def _binned(bins: Mapping[str, list[float]]) -> dict:
    """Means over all pairs, and per bin of times, from sums; a bin without pairs has none."""
    if not bins:
        return {}
    pairs, total = bins["pairs"], math.fsum(bins["pairs"])
    names = [name for name in BINNED if name != "pairs"]
    means = {name: math.fsum(bins[name]) / total for name in names}
    per_bin = {name: [bins[name][i] / pairs[i] if pairs[i] else None for i in range(TIME_BINS)] for name in names}
    return {**means, "time_bins": {"pairs": pairs, **per_bin}}


def read_lines(path: Path) -> list[dict]:
    """The lines of a stats.jsonl; none where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(record: Mapping, steps: int) -> dict[str, str]:
    """A line's figures in fixed widths, for the status line."""
    fields = {"step": f"{record['step']:>6d}/{steps:<6d}"}
    for name, short, form in (
        ("loss", "loss", "<8.4f"), ("implicit_accuracy", "accuracy", "<5.3f"), ("margin", "margin", "<+9.2e"),
        ("w_diff", "w_diff", "<+9.2e"), ("l_diff", "l_diff", "<+9.2e"), ("grad_norm", "grad", "<8.2e"), ("win_rate", "win_rate", "<6.3f"),
    ):  # fmt: skip
        value = record.get(name)
        text = "" if value is None else format(value, form)
        fields[short] = text.ljust(int(form.lstrip("<+").split(".")[0]))
    return fields
