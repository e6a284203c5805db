"""The table that ends a run of GRPO: what the reward and judges that it did not see say of every arm, as JSON; from that, Markdown.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from eg3d_rlhf.tuning.flow.circular.table import INTERVAL, rate, shown
from eg3d_rlhf.tuning.flow.grpo.arms import ARMS
from training.storage import write_atomic

JUDGES = ("final", "chooser", "reward")


def table(results: Mapping[str, Mapping], arms: Sequence[str], seeds: Sequence[int], facts: Mapping) -> dict:
    """The whole table as JSON. Args: results: by task, see run.py; facts: what a reader of the file needs besides."""
    base = {name: np.array([values]) for name, values in results["base"]["scores"].items()}  # [1, C, S]
    arrays = {
        arm: {name: np.array([results[f"{arm}-{seed}"]["scores"][name] for seed in seeds]) for name in base} for arm in arms
    }  # [K, C, S]
    found = {}
    for arm, scores in arrays.items():
        done = [results[f"{arm}-{seed}"] for seed in seeds]
        up = (scores["reward"].mean(2) > base["reward"].mean(2)).mean(1)  # [K], share of conditions
        found[arm] = {
            "title": ARMS[arm], "samples": [one["samples"] for one in done], "kept_step": [one["kept_step"] for one in done],
            "reward": {
                "up": float(up.mean()), "up_seeds": up.tolist(), "mean": float(scores["reward"].mean()),
                "mean_seeds": scores["reward"].mean((1, 2)).tolist(), "base": float(base["reward"].mean()),
            },
            "judges": {name: rate(scores[name], base[name].repeat(len(seeds), 0), seeds) for name in JUDGES if name in base},
            "kl": [one["kl"] for one in done], "warnings": [one["warnings"] for one in done],
        }
    judge = next(name for name in JUDGES if name in base)
    pairwise = {f"{x}_vs_{y}": rate(arrays[x][judge], arrays[y][judge], seeds) for x, y in combinations(arms, 2)}
    C, S = base["reward"].shape[1:]
    return {
        "arms": found, "pairwise": pairwise, "judge": judge, "conditions": C, "noises": S, "training_seeds": list(seeds),
        "interval": INTERVAL, **facts,
    }


def markdown(data: Mapping) -> str:
    """The table for people."""
    judge, seeds = data["judge"], data["training_seeds"]
    by_seed = [f"seed {seed}" for seed in seeds]
    head = ["arm", "samples", "reward up on", "mean reward", f"{judge} judge, wins against base", *by_seed, "KL", "kept"]
    rows = []
    for one in data["arms"].values():
        reward, won = one["reward"], one["judges"][judge]
        far = [value for value in one["kl"] if value is not None]
        rows.append([
            one["title"], one["samples"][0] or "", f"{reward['up']:.0%} of conditions", f"{reward['mean']:+.3f} ({reward['base']:+.3f})",
            shown(won), *[f"{s['win_rate']:.3f}" for s in won["seeds"]], f"{np.mean(far):.2g}" if far else "",
            ", ".join(map(str, one["kept_step"])),
        ])  # fmt: skip
    facts = (
        f"Stage {data['stage']}; {data['conditions']} held-out conditions x {data['noises']} noises x {len(seeds)} training seeds; ties "
        f"count half. Brackets: {data['interval']}. In brackets behind a mean reward the untuned network's. KL: of the steps from the "
        "untuned network's, mean over numbers, steps and samples."
    )
    lines = ["# GRPO against its base", "", facts, "", *_table(head, rows)]
    if data["pairwise"]:
        rows = []
        for name, one in data["pairwise"].items():
            rows.append([*name.split("_vs_"), shown(one), *[f"{s['win_rate']:.3f}" for s in one["seeds"]]])
        lines += ["", f"## Pair by pair, {judge} judge", "", *_table(["arm", "against", "wins", *by_seed], rows)]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def write(data: Mapping, folder: Path) -> list[Path]:
    """grpo.json and grpo.md, the second made of the first."""
    source, text = folder / "grpo.json", folder / "grpo.md"
    write_atomic(source, (json.dumps(data, indent=1) + "\n").encode())
    write_atomic(text, markdown(json.loads(source.read_text())).encode())
    return [source, text]
