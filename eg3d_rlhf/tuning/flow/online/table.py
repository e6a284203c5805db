"""The table that ends a run of online tuning: arms and their controls against the untuned network, by judges and measures.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from eg3d_rlhf.experiments.table import INTERVAL, Table, markdown_rows, of_seeds, with_interval
from eg3d_rlhf.tuning.flow.arms import pair_by_pair
from eg3d_rlhf.tuning.flow.problem import JUDGES


def table(
    results: Mapping[str, Mapping], arms: Sequence[str], seeds: Sequence[int], facts: Mapping, controls: Sequence[str] = ()
) -> dict:
    """The whole table as JSON.

    Args: results: by task, "<arm>-<seed>" or "base"; facts: what a reader of the file needs besides; controls: of the arms, those that are
        not compared with each other.
    """
    base = {name: np.array([values]) for name, values in results["base"]["scores"].items()}  # [1, C, S]
    arrays = {
        arm: {name: np.array([results[f"{arm}-{seed}"]["scores"][name] for seed in seeds]) for name in base} for arm in arms
    }  # [K, C, S]
    rates, rows = Table(scores=arrays, base=base, seeds=seeds), {}
    for arm, scores in arrays.items():
        trainings, judged = [results[f"{arm}-{seed}"] for seed in seeds], rates.against_base(arm)
        up = (scores["reward"].mean(2) > base["reward"].mean(2)).mean(1)  # [K], share of conditions
        rows[arm] = {
            "samples": [training["samples"] for training in trainings], "kept_step": [training["kept_step"] for training in trainings],
            "reward": {
                "up": float(up.mean()), "up_seeds": up.tolist(), "mean": float(scores["reward"].mean()),
                "mean_seeds": scores["reward"].mean((1, 2)).tolist(), "base": float(base["reward"].mean()),
            },
            "judges": {name: judged[name] for name in JUDGES if name in judged},
            "measures": {name: rate for name, rate in judged.items() if name not in JUDGES},
            "kl": [training["kl"] for training in trainings], "warnings": [training["warnings"] for training in trainings],
        }
    judge = next(name for name in JUDGES if name in base)
    return {
        "arms": rows, "pairwise": rates.pairwise(judge, [arm for arm in arms if arm not in controls]), "judge": judge, **rates.sizes,
        "training_seeds": list(seeds), "interval": INTERVAL, **facts,
    }  # fmt: skip


def markdown(data: Mapping) -> str:
    judge, seeds = data["judge"], data["training_seeds"]
    by_seed = [f"seed {seed}" for seed in seeds]
    head = ["arm", "samples", "reward up on", "mean reward", f"{judge} judge, wins against base", *by_seed, "KL", "kept"]
    rows, measured = [], []
    for name, arm in data["arms"].items():
        reward, won = arm["reward"], arm["judges"][judge]
        far = [value for value in arm["kl"] if value is not None]
        rows.append([
            name, np.mean(arm["samples"]).round().astype(int), f"{reward['up']:.0%} of conditions",
            f"{reward['mean']:+.3f} ({reward['base']:+.3f})", with_interval(won), *of_seeds(won), f"{np.mean(far):.2g}" if far else "",
            ", ".join(map(str, arm["kept_step"])),
        ])  # fmt: skip
        measured.append([name, *(with_interval(rate) for rate in arm["measures"].values())])
    facts = (
        f"Stage {data['stage']}; {data['conditions']} held-out conditions x {data['noises']} noises x {len(seeds)} training seeds; ties "
        f"count half. Brackets: {data['interval']}. In brackets behind a mean reward the untuned network's. Samples: drawn by a training. "
        "KL: of the steps of one sampler from the untuned network's, mean over numbers, steps and samples."
    )
    lines = ["# Online tuning against its base", "", facts, "", *markdown_rows(head, rows)]
    names = list(next(iter(data["arms"].values()))["measures"])
    if names:
        lines += ["", "## What nobody trained on, wins against base", "", *markdown_rows(["arm", *names], measured)]
    return "\n".join([*lines, *pair_by_pair(data)]) + "\n"
