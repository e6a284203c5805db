"""The table that ends a run: which groups are trained, and their win rates with intervals over conditions, as JSON, Markdown and a figure.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.experiments.table import INTERVAL, Table, detectable, markdown_rows, of_seeds, plot_rates, with_interval
from eg3d_rlhf.tuning.flow.problem import JUDGES, Judging

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


def table(
    scores: Mapping[str, Sequence[Mapping]], seeds: Sequence[int], trained: Mapping[str, Sequence[Mapping]], loop: Mapping, facts: Mapping
) -> dict:
    """The whole table as JSON.

    Args:
        scores: by group, a `problem.judged` for each training seed; trained: by group and seed, what is known of its trainings.
        loop: figures of the loop's pairs by training seed; facts: what a reader of the file needs besides.
    """
    arrays = {  # each [K, C, S]
        letter: {name: np.array([row["scores"][name] for row in rows]) for name in rows[0]["scores"]} for letter, rows in scores.items()
    }
    spreads = {
        letter: {stage: float(np.mean([row["spread"][stage] for row in rows])) for stage in rows[0]["spread"]}
        for letter, rows in scores.items()
    }
    rates, groups = Table(scores=arrays, base=arrays["i"], seeds=seeds), {}
    for letter, of_group in arrays.items():
        start, ends = spreads["i"], spreads[letter]
        judged = rates.against_base(letter)
        groups[letter] = {
            "title": ALL[letter].title, **judged["final"], "score_mean": float(of_group["final"].mean()),
            "judges": {name: judged[name] for name in JUDGES if name in judged},
            "parts": {name: judged[name] for name in of_group if name not in JUDGES},
            "spread": {  # as a share of the base's, too: a collapsed generator is near 0
                stage: {"mean": mean, "of_base": mean / start[stage] if start[stage] > 0 else None} for stage, mean in ends.items()
            },
            "trainings": list(trained[letter]),
        }
    pairwise = rates.pairwise("final", [name for name in ALL if name in arrays])
    sizes = {**rates.sizes, "detectable": detectable(*rates.sizes.values(), len(seeds))}
    return {"groups": groups, "pairwise": pairwise, "loop": dict(loop), **sizes, "interval": INTERVAL, **facts}


def markdown(data: Mapping) -> str:
    """The table for people."""
    parts = list(next(iter(data["groups"].values()))["parts"])
    stages = list(data["groups"]["i"]["spread"])
    head = ["group", "what is trained", "win rate against base", *[f"seed {s}" for s in data["training_seeds"]]]
    head += [f"{name} alone" for name in parts] + ["chooser", "reward"] + [f"spread, {stage}" for stage in stages]
    rows = []
    for letter, group in data["groups"].items():
        cells = [f"({letter})", group["title"], with_interval(group), *of_seeds(group)]
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
    lines = ["# Circular-DPO against its base", "", facts, "", *markdown_rows(head, rows), "", "## Pair by pair", ""]
    lines += ["Share of assets of the first that the final judge prefers to the second's, same noises.", ""]
    head, rows = ["comparison", "win rate", *[f"seed {s}" for s in data["training_seeds"]]], []
    for name, rated in data["pairwise"].items():
        x, y = name.split("_vs_")
        rows.append([f"({x}) against ({y})", with_interval(rated), *of_seeds(rated)])
    lines += markdown_rows(head, rows)
    if data["loop"]:
        rows = []
        for seed, stages in data["loop"].items():
            for stage, pairs in stages.items():
                better = "" if pairs.get("op_rewarded_where_changed") is None else f"{pairs['op_rewarded_where_changed']:.2f}"
                rows.append([seed, stage, pairs["pairs"], f"{pairs['changed_structure']:.2f}", better, f"{pairs['reward_gap_mean']:.3g}"])
        head = ["seed", "stage", "pairs", "structure changed", "of these, op rewarded more", "mean reward gap"]
        lines += ["", "## The loop's pairs", "", *markdown_rows(head, rows)]
    return "\n".join(lines) + "\n"


def plot(data: Mapping):
    """Win rates of all groups against the base, and of (a) against the others."""
    titled = {f"({letter}) {group['title']}": group for letter, group in data["groups"].items()}
    rivals = {f"({name.removeprefix('a_vs_')})": rated for name, rated in data["pairwise"].items() if name.startswith("a_vs_")}
    panels = [("win rate against base, final judge", titled)]
    panels += [("win rate of (a) against, final judge", rivals)] if rivals else []
    return plot_rates(panels, (
        f"{data['conditions']} conditions x {data['noises']} noises, training seeds {', '.join(map(str, data['training_seeds']))}; "
        "bars: 95 % over conditions, ticks: seeds"
    ))  # fmt: skip
