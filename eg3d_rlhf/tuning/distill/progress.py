"""What a run of score distillation says of itself: the figures of a tick, and the signs of known failures.

Letters: A assets, K noises. A tick is a number of steps; its figures are means over them.
"""

from collections.abc import Mapping, Sequence

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill.target import History

WINDOW = 200  # last scores whose range new ones are held against
_SHARES = (0.1, 0.5, 0.9)  # quantiles of the gap
_DIFFER = 0.02  # share of a line's value that counts as a change


class Tick:
    """Sums the figures of the steps since the last line."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.scores = History(WINDOW)

    def add(self, output: GuidanceOutput, figures: Mapping[str, float], images: torch.Tensor) -> None:
        """Note one step. Args: images: rendered pictures, which should lie in 0..1."""
        for name, value in figures.items():
            self._note(name, float(value))
        for name, values in output.terms.items():
            self._note(name, *values.detach().flatten().tolist())
        self._note("image_low", float(images.detach().min()))
        self._note("image_high", float(images.detach().max()))
        if output.scores is not None:
            scores = output.scores.detach().float().cpu()  # [K, A]
            if self.scores.rows.numel():
                low, high = self.scores.rows.min(), self.scores.rows.max()
                self._note("scores_out_of_range", *((scores < low) | (scores > high)).float().flatten().tolist())
            self.scores.add(scores)
            self._note("reward", *scores.flatten().tolist())
            self._note("gap", *(scores.amax(0) - scores.amin(0)).tolist())
        if output.winner is not None:
            decided = output.winner[output.winner >= 0]
            self._note("first_wins", *(decided == 0).float().tolist())
            self._note("unanswered", *(output.winner < 0).float().tolist())
        if output.one_sided is not None:
            self._note("one_sided", *output.one_sided.float().tolist())

    def _note(self, name: str, *values: float) -> None:
        self.values.setdefault(name, []).extend(values)

    def line(self, step: int, drift: Mapping[str, float]) -> dict[str, float]:
        """The record of the tick that ends after `step` steps; the next one begins."""
        record: dict[str, float] = {"step": step, **drift}
        for name, values in sorted(self.values.items()):
            if not values:
                continue
            tensor = torch.tensor(values, dtype=torch.float64)
            if name == "gap":
                record |= {f"gap_{int(100 * share)}": float(tensor.quantile(share)) for share in _SHARES}
            else:
                record[name] = float({"image_low": tensor.min, "image_high": tensor.max}.get(name, tensor.mean)())
        self.values = {}
        return record

    def state(self) -> dict:
        """JSON; the scores' window is a tensor of its own."""
        return {"values": self.values}

    def load(self, state: Mapping) -> None:
        """Inverse of `state`."""
        self.values = {name: list(values) for name, values in state["values"].items()}


def signs(lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Signs of known failures in the newest line, by name, each with its remedy."""
    last, found = lines[-1], {}
    if last.get("one_sided") == 1:
        found["gaps"] = "every gap lies below --tau: losers push nothing away. Lower --tau, or use --tau-mode=quantile."
    if last.get("gap_90") == 0:
        found["flat"] = "all noises got the same reward: there is no preference to follow. Check the reward, or give it larger pictures."
    if last.get("first_wins") in (0, 1):
        found["winner"] = f"the first noise won {last['first_wins']:.0%} of the pairs: a judge that looks at places. Shuffle its order."
    if last.get("unanswered", 0) > 0.5:
        found["unanswered"] = f"{last['unanswered']:.0%} of the pairs had no answer: those steps only pull. Check the judge."
    if last.get("image_low", 0) < -0.01 or last.get("image_high", 1) > 1.01:
        reach = f"{last['image_low']:.2f} to {last['image_high']:.2f}"
        found["range"] = f"pictures reach {reach}, expected 0 to 1: priors and rewards misread them."
    if len(lines) >= 4 and "reward" in last:
        then = lines[-4]
        away = [then[n] - last[n] if n == "log_prob" else last[n] - then[n] for n in ("log_prob", "prior_error") if n in last]
        size = max((abs(then[n]) for n in ("log_prob", "prior_error") if n in last), default=1.0)
        if away and away[0] > _DIFFER * max(size, 1e-9) and last["reward"] > then["reward"]:
            found["drift"] = "the reward rises while the prior knows the pictures less: the reward is being exploited. Lower its weight."
    return found


def shown(record: Mapping[str, float], steps: int) -> dict[str, str]:
    """The figures of a line that the terminal shows, in columns."""
    columns = {"first_wins": "5.2f", "gap_50": "8.2g", "one_sided": "4.2f", "cosine": "5.2f", "reward": "8.3g", "log_prob": "8.3g",
               "prior_error": "6.3f", "opacity": "4.2f"}  # fmt: skip
    return {"step": f"{int(record['step']):>{len(str(steps))}}/{steps}"} | {
        name: f"{record[name]:<{width}}" for name, width in columns.items() if name in record
    }
