"""Known signs that preference training of a flow goes wrong, read off the lines of stats.jsonl.

Where the signs come from: threads of users of Diffusion-DPO, flow_grpo (#47, #190), diffusers (#6565) and OPA-DPO (#10). A loss near log 2
is none of them: it may look flat while the win rate rises.
"""

from collections.abc import Sequence
from statistics import mean, median

PAIRS = 64  # that the latest figures are taken over
SEPARATED = 0.95  # implicit accuracy above which pairs are told apart too well to teach more
NOTHING = 0.02  # changes of a win rate that are within its noise
DROP = 0.1  # of a win rate, measured twice
HISTORY = 10  # lines before spikes can be told from usual ones

ANCHOR = "Anchor the loss (loser_weight=0.5 or sft_weight=0.5), raise beta, or train fewer updates."
CALM = "Raise beta or lower lr."


def signs(lines: Sequence[dict], preference: bool = True) -> dict[str, str]:
    """Warnings by name, as of the last line; the caller says each once.

    Args:
        lines: of stats.jsonl so far: step, pairs, loss, implicit_accuracy, margin, w_diff, l_diff, grad_norm, and win_rate where measured.
        preference: False for plain fine-tuning on the preferred ones, where telling pairs apart means nothing.
    """
    trained = [line for line in lines if line.get("pairs")]
    rates = [(line["step"], line["win_rate"]) for line in lines if line.get("win_rate") is not None]
    found = {**_win_rates(rates), **_spikes(trained)}
    if preference and trained:
        found |= _margins(trained, rates)
    return found


def recent(lines: Sequence[dict], name: str) -> float | None:
    """Mean of a figure over the last lines that hold PAIRS pairs; None before there are as many."""
    values, pairs = 0.0, 0
    for line in reversed(lines):
        values, pairs = values + line[name] * line["pairs"], pairs + line["pairs"]
        if pairs >= PAIRS:
            return values / pairs
    return None


def _margins(lines: Sequence[dict], rates: Sequence[tuple[int, float]]) -> dict[str, str]:
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


def _win_rates(rates: Sequence[tuple[int, float]]) -> dict[str, str]:
    """A large fall counts at once, a smaller one when it is measured twice in a row: win rates of a few dozen assets are noisy."""
    if len(rates) < 2:
        return {}
    found, (step, last), (_, start) = {}, rates[-1], rates[0]
    twice = max(rate for _, rate in rates[-2:])  # the better of the last two
    level = min(0.5, start)
    if last < level - DROP or twice < level - NOTHING:
        found["collapse"] = f"step {step}: the held-out win rate is {last:.3f}, worse than what it is compared with. {ANCHOR}"
    best_step, best = max(rates, key=lambda entry: (entry[1], -entry[0]))
    if last < best - 2 * DROP or twice < best - DROP:
        found["past-best"] = f"step {step}: the held-out win rate fell to {last:.3f} from {best:.3f} at step {best_step}. {ANCHOR}"
    return found


def _spikes(lines: Sequence[dict]) -> dict[str, str]:
    if len(lines) <= HISTORY:
        return {}
    last, before = lines[-1], lines[:-1]
    for name, times in (("loss", 4), ("grad_norm", 10)):
        usual = median(line[name] for line in before)
        if last[name] > times * usual > 0:
            return {"spikes": f"step {last['step']}: {name} {last[name]:.3g} is over {times} times its median {usual:.3g}. {CALM}"}
    return {}
