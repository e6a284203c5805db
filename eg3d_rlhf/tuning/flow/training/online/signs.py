"""What goes wrong in online tuning, as lines of stats.jsonl show it: warnings by name, and when to stop."""

from collections.abc import Mapping, Sequence

from eg3d_rlhf.tuning.flow.training.trainer import win_rate_signs, win_rates

ALIKE = 0.9  # share of groups without any spread that is said
STOPPED = 0.9  # share of gradients that the clip takes
ENDS = 0.5  # share of goodness at 0 or 1
CALM = "Raise --kl, lower --lr, or train fewer updates."
LINES = 3  # that say so in a row


def _lasting(lines: Sequence[Mapping], name: str, limit: float) -> Mapping | None:
    """The last line, where that many in a row have a figure above a limit."""
    last = [line for line in lines if name in line][-LINES:]
    return last[-1] if len(last) == LINES and min(line[name] for line in last) > limit else None


def online_signs(lines: Sequence[Mapping], on_steps: bool) -> dict[str, str]:
    """Warnings by name, as of the last line."""
    signs = win_rate_signs(win_rates(lines), CALM)
    if line := _lasting(lines, "alike", ALIKE):
        more = "--group or --sde-noise" if on_steps else "--group"
        signs["alike"] = (
            f"step {line['step']}: within {line['alike']:.0%} of the groups all rewards are alike, and teach"
            f" nothing. Raise {more}, or take a finer reward."
        )
    if line := _lasting(lines, "clipped", STOPPED):
        signs["clip"] = (
            f"step {line['step']}: the clip takes {line['clipped']:.0%} of the gradients. Raise clip_range,"
            " or take one pass."
        )
    if line := _lasting(lines, "r_ends", ENDS):
        signs["ends"] = (
            f"step {line['step']}: {line['r_ends']:.0%} of the samples are wholly good or bad. Raise"
            " adv_clip."
        )
    if fallen := unconfirmed(lines):
        signs["unconfirmed"] = fallen
    return signs


def unconfirmed(lines: Sequence[Mapping]) -> str | None:
    """Where the trained reward has risen, and every watched one has fallen by as much of its own rise and
    fall over the run: means of the first lines and the last.
    """
    rewarded = [line for line in lines if "reward" in line]
    names = [name for name in rewarded[0] if name.startswith("watched/")] if rewarded else []
    if len(rewarded) < 2 * LINES or not names:
        return None

    def risen(name: str) -> float:
        values = [line[name] for line in rewarded]
        start, end = (sum(part) / LINES for part in (values[:LINES], values[-LINES:]))
        return (end - start) / max(max(values) - min(values), 1e-12)

    if risen("reward") > 0.5 and all(risen(name) < -0.5 for name in names):
        shown = ", ".join(
            f"{name.removeprefix('watched/')} {rewarded[-1][name]:.3g} from {rewarded[0][name]:.3g}"
            for name in names
        )
        return (
            f"step {rewarded[-1]['step']}: the trained reward rises and those that are not trained on fall:"
            f" {shown}. {CALM}"
        )
    return None


def too_far(record: Mapping, limit: float | None) -> str | None:
    """Why to stop after a line; None: go on."""
    away = record.get("away")
    if limit is None or away is None or away <= limit:
        return None
    return f"the velocity has gone {away:.2f} of the way to its own samples, more than {limit:g}. {CALM}"
