"""The table of an ablation: win rates with intervals over conditions, as JSON; from that alone, Markdown and a figure.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.flow.circular.ablation import GROUPS
from eg3d_rlhf.flow.generate import wins
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval
from eg3d_rlhf.reports import style
from training.storage import write_atomic

JUDGES = ("final", "chooser", "reward")
INTERVAL = "95 % percentile bootstrap over conditions, each the mean over training seeds and noises"


def rate(a: np.ndarray, b: np.ndarray, seeds: Sequence[int]) -> dict:
    """How often scores a [K, C, S] beat b [K, C, S] on the same noises: win rate, interval over conditions, every seed's own."""
    won = wins(torch.as_tensor(a), torch.as_tensor(b)).double().numpy()
    mean, lo, hi = bootstrap_mean_interval(won.mean(axis=(0, 2)))
    each = [bootstrap_mean_interval(one.mean(axis=1)) for one in won]
    own = [{"seed": seed, "win_rate": one.mean, "ci95": [one.lo, one.hi]} for seed, one in zip(seeds, each, strict=True)]
    return {"win_rate": mean, "ci95": [lo, hi], "seeds": own}


def table(
    scores: Mapping[str, Sequence[Mapping]], seeds: Sequence[int], trained: Mapping[str, Sequence[Mapping]], loop: Mapping, facts: Mapping
) -> dict:
    """The whole table as JSON.

    Args:
        scores: by group, a `judging.judge` for each training seed; trained: by group and seed, what is known of its trainings.
        loop: figures of the loop's pairs by training seed; facts: what a reader of the file needs besides.
    """
    arrays = {letter: _arrays(rows) for letter, rows in scores.items()}
    base = arrays["i"]
    groups = {}
    for letter, own in arrays.items():
        judged = {name: rate(own[name], base[name], seeds) for name in own}
        groups[letter] = {
            "title": GROUPS[letter].title, **judged["final"], "score_mean": float(own["final"].mean()),
            "judges": {name: judged[name] for name in JUDGES if name in judged},
            "parts": {name: judged[name] for name in own if name not in JUDGES},
            "spread": _spread(scores[letter], scores["i"]), "trainings": list(trained[letter]),
        }
    pairwise = {f"{x}_vs_{y}": rate(arrays[x]["final"], arrays[y]["final"], seeds) for x, y in combinations(sorted(arrays), 2)}
    C, S = base["final"].shape[1:]
    return {"groups": groups, "pairwise": pairwise, "loop": dict(loop), "conditions": C, "noises": S, "interval": INTERVAL, **facts}


def _arrays(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
    return {name: np.array([row["scores"][name] for row in rows]) for name in rows[0]["scores"]}  # [K, C, S]


def _spread(rows: Sequence[Mapping], base: Sequence[Mapping]) -> dict[str, dict[str, float | None]]:
    """Per stage, how far assets of one condition differ, and as a share of the base's: a collapsed generator is near 0."""
    found = {}
    for stage in rows[0]["spread"]:
        own, start = (float(np.mean([row["spread"][stage] for row in one])) for one in (rows, base))
        found[stage] = {"mean": own, "of_base": own / start if start > 0 else None}
    return found


def markdown(data: Mapping) -> str:
    """The table for people."""
    parts = list(next(iter(data["groups"].values()))["parts"])
    stages = list(data["groups"]["i"]["spread"])
    head = ["group", "what is trained", "win rate against base", *[f"seed {s}" for s in data["training_seeds"]]]
    head += [f"{name} alone" for name in parts] + ["chooser", "reward"] + [f"spread, {stage}" for stage in stages]
    lines = ["# Circular-DPO against its base", "", _facts(data), "", _row(head), _row(["---"] * len(head))]
    for letter, group in data["groups"].items():
        cells = [f"({letter})", group["title"], shown(group), *[f"{one['win_rate']:.3f}" for one in group["seeds"]]]
        cells += [f"{group['parts'][name]['win_rate']:.3f}" for name in parts]
        cells += [f"{group['judges'][name]['win_rate']:.3f}" if name in group["judges"] else "" for name in ("chooser", "reward")]
        shares = [group["spread"][stage]["of_base"] for stage in stages]
        cells += ["" if share is None else f"{share:.2f}" for share in shares]
        lines.append(_row(cells))
    lines += ["", "## Pair by pair", "", "Share of assets of the first that the final judge prefers to the second's, same noises.", ""]
    head = ["comparison", "win rate", *[f"seed {s}" for s in data["training_seeds"]]]
    lines += [_row(head), _row(["---"] * len(head))]
    for name, one in data["pairwise"].items():
        x, y = name.split("_vs_")
        lines.append(_row([f"({x}) against ({y})", shown(one), *[f"{s['win_rate']:.3f}" for s in one["seeds"]]]))
    return "\n".join(lines) + "\n" + _loop(data["loop"])


def shown(one: Mapping) -> str:
    """A rate with its interval."""
    return f"{one['win_rate']:.3f} [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]"


def _facts(data: Mapping) -> str:
    return (
        f"{data['conditions']} held-out conditions x {data['noises']} noises x {len(data['training_seeds'])} training seeds; ties count "
        f"half. Brackets: {data['interval']}. The final judge labelled nothing, trained nothing and chose nothing; \"chooser\" chose "
        "checkpoints, \"reward\" scored the loop's pairs. Spread: how far assets of one condition differ, as a share of the base's."
    )


def _loop(loop: Mapping) -> str:
    if not loop:
        return ""
    head = ["seed", "stage", "pairs", "structure changed", "of these, op rewarded more", "mean reward gap"]
    rows = ["", "## The loop's pairs", "", _row(head), _row(["---"] * len(head))]
    for seed, stages in loop.items():
        for stage, one in stages.items():
            better = one.get("op_rewarded_where_changed")
            rows.append(_row([
                seed, stage, one["pairs"], f"{one['changed_structure']:.2f}", "" if better is None else f"{better:.2f}",
                f"{one['reward_gap_mean']:.3g}",
            ]))
    return "\n".join(rows) + "\n"


def _row(cells: Sequence) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def plot(data: Mapping):
    """Win rates of all groups against the base, and of (a) against the others."""
    rivals = {name[-1]: one for name, one in data["pairwise"].items() if name.startswith("a_vs_")}
    drawn, axes = style.figure(columns=2 if rivals else 1, size=(9.4, 3.8) if rivals else (5.6, 3.8))
    panels = [(axes[0] if rivals else axes, data["groups"], "against base")]
    panels += [(axes[1], rivals, "of (a) against")] if rivals else []
    for axis, rows, title in panels:
        for place, one in enumerate(rows.values()):
            low, high = one["win_rate"] - one["ci95"][0], one["ci95"][1] - one["win_rate"]
            axis.errorbar(one["win_rate"], place, xerr=[[max(0, low)], [max(0, high)]], fmt="o", color=style.colour("after"), capsize=3)
            axis.plot([s["win_rate"] for s in one["seeds"]], [place] * len(one["seeds"]), "|", color=style.colour("before"), markersize=9)
        axis.axvline(0.5, color=style.colour("noise"), linewidth=1)
        axis.set_yticks(range(len(rows)), [f"({letter}) {data['groups'][letter]['title']}" for letter in rows], fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel=f"win rate {title}, final judge", xlim=(0, 1))
    drawn.suptitle(
        f"{data['conditions']} conditions x {data['noises']} noises, training seeds {', '.join(map(str, data['training_seeds']))}; "
        "bars: 95 % over conditions, ticks: seeds", fontsize=8,
    )
    return drawn


def write(data: Mapping, folder: Path, stem: str = "ablation") -> list[Path]:
    """<stem>.json, .md and .png; the latter two are made of the first."""
    source, text, figure = (folder / f"{stem}.{ending}" for ending in ("json", "md", "png"))
    write_atomic(source, (json.dumps(data, indent=1) + "\n").encode())
    read = json.loads(source.read_text())
    write_atomic(text, markdown(read).encode())
    with style.theme("light"):
        style.save(plot(read), figure)
    return [source, text, figure]
