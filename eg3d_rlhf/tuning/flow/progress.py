"""How far a stage's training is, the lines made of what its updates tell, and known signs in these that it goes wrong.

Where the signs come from: threads of users of Diffusion-DPO, flow_grpo (#47, #190), diffusers (#6565) and OPA-DPO (#10). A loss near log 2
is none of them: it may look flat while the win rate rises.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from eg3d_rlhf.tuning.flow.descent import StageTraining
from eg3d_rlhf.tuning.flow.dpo import BINNED, TIME_BINS

COUNTED = ("pairs", "samples")  # figures that a line has the sum of; of the others it has the mean over updates


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

    def judged(self, rate: float, config: StageTraining) -> bool:
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
        record = {"step": self.step, **{name: sums[name] for name in COUNTED if name in sums}}
        if sums:
            bins = sums.get("bins")  # sums; a bin without pairs has no mean
            record |= {name: value / sums["updates"] for name, value in sums.items() if name not in (*COUNTED, "updates", "bins")}
            if bins:
                pairs, total, names = bins["pairs"], math.fsum(bins["pairs"]), [name for name in BINNED if name != "pairs"]
                per_bin = {name: [bins[name][i] / pairs[i] if pairs[i] else None for i in range(TIME_BINS)] for name in names}
                record |= {name: math.fsum(bins[name]) / total for name in names} | {"time_bins": {"pairs": pairs, **per_bin}}
            record["lr"] = lr
        return record if rate is None else {**record, "win_rate": rate}


def _added(a: Mapping, b: dict) -> dict:
    """Sums of numbers, and of lists of them, in nested values."""
    if not a:
        return b
    plus: dict[type, Callable] = {dict: _added, list: lambda x, y: [p + q for p, q in zip(x, y, strict=True)]}
    return {k: plus[type(v)](a[k], v) if type(v) in plus else a[k] + v for k, v in b.items()}


def read_lines(path: Path) -> list[dict]:
    """The lines of a stats.jsonl; none where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(record: Mapping, steps: int, columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """A line's figures in fixed widths, for the status line; columns: as Descent's, between those that every training has."""
    fields = {"step": f"{record['step']:>6d}/{steps:<6d}"}
    for name, short, form in (("loss", "loss", "<8.4f"), *columns, ("grad_norm", "grad", "<8.2e"), ("win_rate", "win_rate", "<6.3f")):
        value = record.get(name)
        text = "" if value is None else format(value, form)
        fields[short] = text.ljust(int(form.lstrip("<+").split(".")[0]))
    return fields


PAIRS = 64  # that the latest figures are taken over
SEPARATED = 0.95  # implicit accuracy above which pairs are told apart too well to teach more
NOTHING = 0.02  # changes of a win rate that are within its noise
DROP = 0.1  # of a win rate, measured twice
RUNAWAY = 2  # times the rejected ones' error at the start, where no reference holds it
HISTORY = 10  # lines before spikes can be told from usual ones

ANCHOR = "Anchor the loss (loser_weight=0.5 or sft_weight=0.5), raise beta, or train fewer updates."
CALM = "Raise beta or lower lr."


def signs(lines: Sequence[Mapping], preference: bool = True) -> dict[str, str]:
    """Warnings by name, as of the last line; the caller says each once.

    Args:
        lines: of stats.jsonl so far: step, pairs, loss, implicit_accuracy, margin, w_diff, l_diff, grad_norm, and win_rate where measured.
        preference: False for plain fine-tuning on the preferred ones, where telling pairs apart means nothing.
    """
    trained = [line for line in lines if line.get("pairs")]
    rates = win_rates(lines)
    found = win_rate_signs(rates)
    last, before = trained[-1] if trained else {}, trained[:-1]
    for name, times in (("loss", 4), ("grad_norm", 10)) if len(before) >= HISTORY else ():
        usual = median(line[name] for line in before)
        if last[name] > times * usual > 0 and "spikes" not in found:
            found["spikes"] = f"step {last['step']}: {name} {last[name]:.3g} is over {times} times its median {usual:.3g}. {CALM}"
    if trained and last.get("l_error", 0) > RUNAWAY * trained[0].get("l_error", math.inf):
        found["runaway"] = (
            f"step {last['step']}: the rejected ones' error is {last['l_error']:.3g} after {trained[0]['l_error']:.3g}, and that of the "
            f"preferred {last['w_error']:.3g} after {trained[0]['w_error']:.3g}; this loss has no lower bound. Lower loser_weight or steps."
        )
    return found | (_margins(trained, rates) if preference and trained else {})


def recent(lines: Sequence[Mapping], name: str) -> float | None:
    """Mean of a figure over the last lines that hold PAIRS pairs; None before there are as many."""
    values, pairs = 0.0, 0
    for line in reversed(lines):
        values, pairs = values + line[name] * line["pairs"], pairs + line["pairs"]
        if pairs >= PAIRS:
            return values / pairs
    return None


def _margins(lines: Sequence[Mapping], rates: Sequence[tuple[int, float]]) -> dict[str, str]:
    accuracy, w_diff, l_diff = (recent(lines, name) for name in ("implicit_accuracy", "w_diff", "l_diff"))
    if accuracy is None:
        return {}
    found, step = {}, lines[-1]["step"]
    if accuracy > SEPARATED:
        found["separated"] = (
            f"step {step}: implicit accuracy {accuracy:.3f} is above {SEPARATED}; the pairs are told apart; more of it over-optimises. "
            + ANCHOR
        )
        if len(rates) > 1 and max(abs(rate - rates[0][1]) for _, rate in rates) <= NOTHING:
            found["no-effect"] = (
                f"step {step}: implicit accuracy {accuracy:.3f}, but the held-out win rate is {rates[-1][1]:.3f} after {rates[0][1]:.3f} "
                "at the start. The pairs are not what this generator makes (off-policy): sample pairs from it, or fine-tune on them first."
            )
    earlier = mean(line["margin"] for line in lines[: max(1, len(lines) // 2)])
    if w_diff > 0.1 * l_diff and w_diff > 0 and recent(lines, "margin") > max(0.0, earlier) and all(x["w_diff"] > 0 for x in lines[-3:]):
        found["preferred-worse"] = (
            f"step {step}: the margin grows while the error of the preferred ones is {w_diff:.3g} above the reference's; it runs from "
            f"the rejected ones instead of towards the preferred. {ANCHOR}"
        )
    return found


def win_rates(lines: Sequence[Mapping]) -> list[tuple[int, float]]:
    """(update, win rate) where one was measured."""
    return [(line["step"], line["win_rate"]) for line in lines if line.get("win_rate") is not None]


def win_rate_signs(rates: Sequence[tuple[int, float]], remedy: str = ANCHOR) -> dict[str, str]:
    """A large fall counts at once, a smaller one when it is measured twice in a row: win rates of a few dozen assets are noisy."""
    if len(rates) < 2:
        return {}
    found, (step, last), (_, start) = {}, rates[-1], rates[0]
    twice = max(rate for _, rate in rates[-2:])  # the better of the last two
    level = min(0.5, start)
    if last < level - DROP or twice < level - NOTHING:
        found["collapse"] = f"step {step}: the held-out win rate is {last:.3f}, worse than what it is compared with. {remedy}"
    best_step, best = max(rates, key=lambda entry: (entry[1], -entry[0]))
    if last < best - 2 * DROP or twice < best - DROP:
        found["past-best"] = f"step {step}: the held-out win rate fell to {last:.3f} from {best:.3f} at step {best_step}. {remedy}"
    return found
