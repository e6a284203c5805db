"""The table that ends a run: what generators' assets are worth to every judge, and win rates with intervals over conditions, as JSON; from
that alone, Markdown and a figure.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.experiments import style
from eg3d_rlhf.models.sparse import Latent, SparseSample, feats_of
from eg3d_rlhf.tuning.flow.generate import Models, generate, wins
from eg3d_rlhf.tuning.flow.problem import Problem
from training.config import check_knobs, knob
from training.phases import derive_seed
from training.storage import write_atomic

TABLE = "Judging and ablation"  # title of its flags
JUDGES = ("final", "chooser", "reward")
INTERVAL = "95 % percentile bootstrap over conditions, each the mean over training seeds and noises"
BASE, PEOPLE, LOOP, SUPERVISED = "base", "people", "loop", "supervised"
# What a stage learns of the loop's pairs: all; the anchor of their loss alone; the pairs with some or all turned over; their preferred by
# fine-tuning; and in their place the people's pairs that they were made from.
PAIRS, ANCHOR, SHUFFLED, TURNED, WINNERS, PEOPLES = USES = ("pairs", "anchor", "shuffled", "turned", "winners", "people")


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one row of the table trains."""

    title: str
    first: str = BASE  # what the stages before the last learn from
    last: str = BASE  # what the last stage learns from
    use_w1: bool = True
    use_w2: bool = True
    use: str = PAIRS  # what of the loop's pairs


GROUPS = {
    "a": Group(title="full loop", first=LOOP, last=PEOPLE),
    "b": Group(title="both stages on people's pairs, no loop", first=PEOPLE, last=PEOPLE),
    "c": Group(title="first stage alone, people's pairs", first=PEOPLE),
    "d": Group(title="last stage alone, people's pairs", last=PEOPLE),
    "e": Group(title="first stage fine-tuned on the preferred", first=SUPERVISED),
    "f": Group(title="last stage fine-tuned on the preferred", last=SUPERVISED),
    "g": Group(title="full loop without the filter w1", first=LOOP, last=PEOPLE, use_w1=False),
    "h": Group(title="full loop without the weight w2", first=LOOP, last=PEOPLE, use_w2=False),
    "i": Group(title="base"),
}
ARMS = {  # (a), but for what the stages before the last learn: controls of what the loop's preferences are worth
    "anchor": Group(title="full loop, the anchor without the preference term", first=LOOP, last=PEOPLE, use=ANCHOR),
    "shuffled": Group(title="full loop, each pair turned over by the toss of a coin", first=LOOP, last=PEOPLE, use=SHUFFLED),
    "turned": Group(title="full loop, each pair turned over", first=LOOP, last=PEOPLE, use=TURNED),
    "fed_winners": Group(title="full loop, fine-tuning on the preferred of its pairs", first=LOOP, last=PEOPLE, use=WINNERS),
    "people_first": Group(title="full loop, on the people's pairs that its pairs come from", first=LOOP, last=PEOPLE, use=PEOPLES),
}
ALL = GROUPS | ARMS


def letters(text: str) -> list[str]:
    """"a..i", "a,d,i" or "a..d,anchor" as groups in order, the base always among them since all are compared with it.

    Raises: ValueError for other text.
    """
    found: set[str] = {"i"}
    for part in text.replace(" ", "").split(","):
        low, dots, high = part.partition("..")
        ends = [low, high if dots else low]
        if part in ARMS:
            found.add(part)
            continue
        if not all(end in GROUPS for end in ends) or ends[0] > ends[1]:
            arms = ", ".join(ARMS)
            raise ValueError(f"groups: expected letters of a..i such as a,b,d or a..i, and arms among {arms}, got {text!r}. Correct it.")
        found.update(letter for letter in GROUPS if ends[0] <= letter <= ends[1])
    return [name for name in ALL if name in found]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What is generated for the table: the same noises whatever is judged, so that generators are compared pair by pair."""

    per_condition: int = knob(8, "Assets per held-out condition and training behind the table.", TABLE, name="table_noises", low=2)
    batch: int = knob(64, "Assets at once; bounds memory.", TABLE, name="judge_batch", low=1, shown="the problem's own")
    seed: int = 0  # of the noises, apart from those that are trained or chosen on

    def __post_init__(self):
        check_knobs(self)


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Which groups are trained, how often, and how they are judged."""

    groups: tuple[str, ...] = tuple(GROUPS)
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; assets are judged on the same noises whatever the seed
    judging: Judging = Judging()

    def __post_init__(self):
        unknown = [letter for letter in self.groups if letter not in ALL]
        if unknown or "i" not in self.groups or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"AblationPlan: expected groups of a..i with i, and different seeds, got {self.groups} and {self.seeds}.")

    def tasks(self) -> dict[str, list[str]]:
        """What is to be done, and what each waits for, in an order that lets what others wait for start early.

        Names: "<seed>/<what is trained>/<stages>", "<seed>/pairs", "<seed>/<letter>" for a group's own training and scores.
        """
        wanted = [ALL[letter] for letter in self.groups]
        shared = [(kind, part) for part in ("last", "first") for kind in (PEOPLE, SUPERVISED)]
        shared = [(kind, part) for kind, part in shared if any(getattr(group, part) == kind for group in wanted)]
        looping = any(group.first == LOOP for group in wanted)
        tasks: dict[str, list[str]] = {}
        for kind, part in shared:  # PEOPLE/last comes first: the loop waits for it
            tasks |= {f"{seed}/{kind}/{part}": [] for seed in self.seeds}
            if (kind, part) == (PEOPLE, "last") and looping:
                tasks |= {f"{seed}/pairs": [f"{seed}/{PEOPLE}/last"] for seed in self.seeds}
        for letter in self.groups:
            for seed in self.seeds if letter != "i" else self.seeds[:1]:
                group, first = ALL[letter], ALL[letter].first
                needs = [f"{seed}/{group.last}/last"] if group.last != BASE else []
                needs += [f"{seed}/pairs" if first == LOOP else f"{seed}/{first}/first"] if first != BASE else []
                tasks[f"{seed}/{letter}"] = needs
        return tasks


def judge(problem: Problem, models: Models, judging: Judging, on_asset: Callable[[int], None] | None = None) -> dict:
    """Scores of the held-out conditions' assets, as JSON: {"conditions": [C], "scores": {judge or part: [C][S]}, "spread": {stage: [C]}}.

    Judges: "final", "chooser" and "reward", those that the problem has, and the parts of its table.
    Spread: of the stages before the last, see `spread`; and of the final score, its standard deviation over a condition's assets.
    Raises: ValueError for a problem without a final judge, or a score that is not finite.
    """
    if problem.final is None:
        raise ValueError("judge: expected a problem with a final judge, got none. A table needs one that nothing was trained or chosen on.")
    judges = {"final": problem.final, "chooser": problem.chooser, "reward": problem.reward}
    found: dict[str, list] = {}
    spreads: dict[str, list[float]] = {stage.name: [] for stage in problem.pipeline.stages[:-1]}
    names, S = list(problem.held_out_conditions), judging.per_condition
    block = max(1, judging.batch // S)
    for i in range(0, len(names), block):
        part = names[i : i + block]
        conditions = [name for name in part for _ in range(S)]
        seeds = [derive_seed("table", judging.seed, name, k) % 2**31 for name in part for k in range(S)]
        assets = generate(problem.pipeline, conditions, seeds, models, judging.batch)
        values = {name: one(assets, conditions) for name, one in judges.items() if one is not None}
        if problem.parts is not None:
            values |= problem.parts(assets, conditions)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"judge: expected finite scores of {name}, got {value.tolist()}. Correct that judge.")
            found.setdefault(name, []).extend(value.detach().double().cpu().view(-1, S).tolist())
        encoded = problem.pipeline.encode(assets)
        for stage, out in spreads.items():  # encoded latents of the last stage may be dear, and are not needed
            out += [spread([one[stage] for one in encoded[k * S : (k + 1) * S]]) for k in range(len(part))]
        if on_asset:
            on_asset(len(assets))
    spreads["score"] = torch.tensor(found["final"], dtype=torch.float64).std(1).tolist()
    return {"conditions": names, "scores": found, "spread": spreads}


def spread(latents: Sequence[Latent]) -> float:
    """How far assets of one condition differ: standard deviation over them, of every number, in the mean; 0 where all are alike.

    On voxels, of the mean features, since they lie in different places.
    """
    rows = [x.feats.mean(0) if isinstance(x, SparseSample) else feats_of(x).flatten() for x in latents]
    return float(torch.stack(rows).double().std(0).mean())


def rate(a: np.ndarray, b: np.ndarray, seeds: Sequence[int]) -> dict:
    """How often scores a [K, C, S] beat b [K, C, S] on the same noises: win rate, interval over conditions, every seed's own."""
    won = wins(torch.as_tensor(a), torch.as_tensor(b)).double().numpy()
    mean, lo, hi = bootstrap_mean_interval(won.mean(axis=(0, 2)))
    each = [bootstrap_mean_interval(one.mean(axis=1)) for one in won]
    own = [{"seed": seed, "win_rate": one.mean, "ci95": [one.lo, one.hi]} for seed, one in zip(seeds, each, strict=True)]
    return {"win_rate": mean, "ci95": [lo, hi], "seeds": own}


def detectable(conditions: int, noises: int, seeds: int) -> float:
    """Smallest true win rate that the interval sets apart from one half in 80 % of tables: 1/2 + (1.96 + 0.84) / 2 sqrt(C S K).

    Comparisons count as independent and ties as none; where conditions differ it takes more.
    """
    return 0.5 + (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (2 * math.sqrt(conditions * noises * seeds))


def table(
    scores: Mapping[str, Sequence[Mapping]], seeds: Sequence[int], trained: Mapping[str, Sequence[Mapping]], loop: Mapping, facts: Mapping
) -> dict:
    """The whole table as JSON.

    Args:
        scores: by group, a `judging.judge` for each training seed; trained: by group and seed, what is known of its trainings.
        loop: figures of the loop's pairs by training seed; facts: what a reader of the file needs besides.
    """
    arrays = {  # each [K, C, S]
        letter: {name: np.array([row["scores"][name] for row in rows]) for name in rows[0]["scores"]} for letter, rows in scores.items()
    }
    spreads = {
        letter: {stage: float(np.mean([row["spread"][stage] for row in rows])) for stage in rows[0]["spread"]}
        for letter, rows in scores.items()
    }
    base, groups = arrays["i"], {}
    for letter, own in arrays.items():
        start, ends = spreads["i"], spreads[letter]
        judged = {name: rate(own[name], base[name], seeds) for name in own}
        groups[letter] = {
            "title": ALL[letter].title, **judged["final"], "score_mean": float(own["final"].mean()),
            "judges": {name: judged[name] for name in JUDGES if name in judged},
            "parts": {name: judged[name] for name in own if name not in JUDGES},
            "spread": {  # as a share of the base's, too: a collapsed generator is near 0
                stage: {"mean": mean, "of_base": mean / start[stage] if start[stage] > 0 else None} for stage, mean in ends.items()
            },
            "trainings": list(trained[letter]),
        }
    ordered = [name for name in ALL if name in arrays]
    pairwise = {f"{x}_vs_{y}": rate(arrays[x]["final"], arrays[y]["final"], seeds) for x, y in combinations(ordered, 2)}
    C, S = base["final"].shape[1:]
    sizes = {"conditions": C, "noises": S, "detectable": detectable(C, S, len(seeds))}
    return {"groups": groups, "pairwise": pairwise, "loop": dict(loop), **sizes, "interval": INTERVAL, **facts}


def markdown(data: Mapping) -> str:
    """The table for people."""
    parts = list(next(iter(data["groups"].values()))["parts"])
    stages = list(data["groups"]["i"]["spread"])
    head = ["group", "what is trained", "win rate against base", *[f"seed {s}" for s in data["training_seeds"]]]
    head += [f"{name} alone" for name in parts] + ["chooser", "reward"] + [f"spread, {stage}" for stage in stages]
    rows = []
    for letter, group in data["groups"].items():
        cells = [f"({letter})", group["title"], shown(group), *[f"{one['win_rate']:.3f}" for one in group["seeds"]]]
        cells += [f"{group['parts'][name]['win_rate']:.3f}" for name in parts]
        cells += [f"{group['judges'][name]['win_rate']:.3f}" if name in group["judges"] else "" for name in ("chooser", "reward")]
        shares = [group["spread"][stage]["of_base"] for stage in stages]
        cells += ["" if share is None else f"{share:.2f}" for share in shares]
        rows.append(cells)
    facts = (
        f"{data['conditions']} held-out conditions x {data['noises']} noises x {len(data['training_seeds'])} training seeds; ties count "
        f"half. Brackets: {data['interval']}. The final judge labelled nothing, trained nothing and chose nothing; \"chooser\" chose "
        "checkpoints, \"reward\" scored the loop's pairs. Spread: how far assets of one condition differ, as a share of the base's."
    )
    lines = ["# Circular-DPO against its base", "", facts, "", *_table(head, rows), "", "## Pair by pair", ""]
    lines += ["Share of assets of the first that the final judge prefers to the second's, same noises.", ""]
    head, rows = ["comparison", "win rate", *[f"seed {s}" for s in data["training_seeds"]]], []
    for name, one in data["pairwise"].items():
        x, y = name.split("_vs_")
        rows.append([f"({x}) against ({y})", shown(one), *[f"{s['win_rate']:.3f}" for s in one["seeds"]]])
    lines += _table(head, rows)
    if data["loop"]:
        rows = []
        for seed, stages in data["loop"].items():
            for stage, one in stages.items():
                better = "" if one.get("op_rewarded_where_changed") is None else f"{one['op_rewarded_where_changed']:.2f}"
                rows.append([seed, stage, one["pairs"], f"{one['changed_structure']:.2f}", better, f"{one['reward_gap_mean']:.3g}"])
        head = ["seed", "stage", "pairs", "structure changed", "of these, op rewarded more", "mean reward gap"]
        lines += ["", "## The loop's pairs", "", *_table(head, rows)]
    return "\n".join(lines) + "\n"


def shown(one: Mapping) -> str:
    """A rate with its interval."""
    return f"{one['win_rate']:.3f} [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]"


def _table(head: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def plot(data: Mapping):
    """Win rates of all groups against the base, and of (a) against the others."""
    rivals = {name.removeprefix("a_vs_"): one for name, one in data["pairwise"].items() if name.startswith("a_vs_")}
    height = 1.4 + 0.26 * len(data["groups"])
    drawn, axes = style.figure(columns=2 if rivals else 1, size=(9.4 if rivals else 5.6, height))
    panels = [(axes[0] if rivals else axes, data["groups"], "against base")]
    panels += [(axes[1], rivals, "of (a) against")] if rivals else []
    rates = [rate for _, rows, _ in panels for one in rows.values() for rate in (*one["ci95"], *(s["win_rate"] for s in one["seeds"]))]
    for axis, rows, title in panels:
        for place, one in enumerate(rows.values()):
            low, high = one["win_rate"] - one["ci95"][0], one["ci95"][1] - one["win_rate"]
            axis.errorbar(
                one["win_rate"], place, xerr=[[max(0, low)], [max(0, high)]], fmt="o", markersize=4, color=style.colour("after"), capsize=2
            )
            axis.plot([s["win_rate"] for s in one["seeds"]], [place] * len(one["seeds"]), "|", color=style.colour("before"), markersize=7)
        axis.axvline(0.5, color=style.colour("noise"), linewidth=1)
        named = [f"({letter}) {data['groups'][letter]['title']}" if rows is data["groups"] else f"({letter})" for letter in rows]
        axis.set_yticks(range(len(rows)), named, fontsize=7)
        axis.invert_yaxis()
        axis.set(xlim=(min(rates) - 0.02, max(rates) + 0.02))
        axis.set_xlabel(f"win rate {title}, final judge", fontsize=8)
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
