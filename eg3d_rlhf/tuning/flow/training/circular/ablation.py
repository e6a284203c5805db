"""Run Circular-DPO: the loop, one stage alone, or the ablation of the paper's table 2 with its nine groups.
The module also writes the table that ends a run.

The groups are trained with several seeds and evaluated on the same noises. Groups of a seed share the steps
that they have in common: (a), (b), (d), (g) and (h) the last stage; (a), (g) and (h) the loop's pairs;
(b) and (c) the first stage. Here "first" names a stage: the paper's "step 1" in (c) is the first stage,
while the method's first step trains the last one. With more than two stages, "first" stands for all stages
before the last.

Shapes: K training seeds, C prompts, S noises per prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Artefact, Store
from eg3d_rlhf.experiments.table import (
    INTERVAL,
    Table,
    detectable,
    markdown_rows,
    of_seeds,
    plot_rates,
    with_interval,
    write,
)
from eg3d_rlhf.models.policies import link_folder
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS, ProblemSource
from eg3d_rlhf.tuning.flow.training.arm_runs import pooled
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import (
    CircularLoop,
    Lineage,
    run_loop,
    whole_weights,
)
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import NoPairsError
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    ALL,
    BASE,
    LOOP,
    PEOPLE,
    SUPERVISED,
    AblationPlan,
    CircularRun,
    Group,
)
from training.distributed import SINGLE, Ranks, leave
from training.progress import tqdm

# The table.


def table(
    scores: Mapping[str, Sequence[Mapping]],
    seeds: Sequence[int],
    trained: Mapping[str, Sequence[Mapping]],
    loop: Mapping,
    facts: Mapping,
) -> dict:
    """Make the table as JSON.

    Args:
        scores: by group, the scores of `evaluate` for each training seed; trained: by group and seed, the
            records of its trainings.
        loop: figures of the loop's pairs by training seed; facts: entries that describe the run.
    """
    arrays = {  # each [K, C, S]
        letter: {name: np.array([row["scores"][name] for row in rows]) for name in rows[0]["scores"]}
        for letter, rows in scores.items()
    }
    # mean distance of assets of one prompt, averaged over seeds, by group and stage
    spreads = {
        letter: {stage: float(np.mean([row["spread"][stage] for row in rows])) for stage in rows[0]["spread"]}
        for letter, rows in scores.items()
    }
    # the base's scores are repeated for every seed, so that they pair with each group's
    rates = Table(scores=arrays, base=arrays["i"], seeds=seeds)
    groups = {}
    for letter, of_group in arrays.items():
        start = spreads["i"]  # of the base, by stage
        ends = spreads[letter]  # after the group's trainings
        won = rates.against_base(letter)
        groups[letter] = {
            "title": ALL[letter].title,
            **won["final"],  # win rate, its interval and its seeds
            "score_mean": float(of_group["final"].mean()),
            "evaluators": {name: won[name] for name in EVALUATORS if name in won},
            # criteria that the final evaluator consists of
            "parts": {name: won[name] for name in of_group if name not in EVALUATORS},
            "spread": {  # as a share of the base's, too: a collapsed generator is near 0
                stage: {"mean": mean, "of_base": mean / start[stage] if start[stage] > 0 else None}
                for stage, mean in ends.items()
            },
            "trainings": list(trained[letter]),
        }
    # in the order of ALL, so that the first of two groups is the same in every table
    pairwise = rates.pairwise("final", [name for name in ALL if name in arrays])
    # [K, C, S]
    C, S = arrays["i"]["final"].shape[1:]
    return {
        "groups": groups,
        "pairwise": pairwise,
        "loop": dict(loop),
        **rates.sizes,  # numbers of prompts, noises and seeds
        # smallest win rate that a table of this size detects in 80 % of cases
        "detectable": detectable(C, S, len(seeds)),
        "interval": INTERVAL,
        **facts,
    }


def markdown(data: Mapping) -> str:
    """Format the table as Markdown."""
    # all groups have the same parts and stages
    parts = list(next(iter(data["groups"].values()))["parts"])
    stages = list(data["groups"]["i"]["spread"])
    head = [
        "group",
        "what is trained",
        "win rate against base",
        *[f"seed {s}" for s in data["training_seeds"]],
    ]
    head += (
        [f"{name} alone" for name in parts] + ["chooser", "reward"] + [f"spread, {stage}" for stage in stages]
    )
    rows = []
    for letter, group in data["groups"].items():
        # the order of the cells is that of `head`
        cells = [f"({letter})", group["title"], with_interval(group), *of_seeds(group)]
        cells += [f"{group['parts'][name]['win_rate']:.3f}" for name in parts]
        cells += [
            f"{group['evaluators'][name]['win_rate']:.3f}" if name in group["evaluators"] else ""
            for name in ("chooser", "reward")
        ]
        # absent where the base has no spread, as with a single noise
        shares = [group["spread"][stage]["of_base"] for stage in stages]
        cells += ["" if share is None else f"{share:.2f}" for share in shares]
        rows.append(cells)
    facts = (
        f"{data['conditions']} held-out prompts x {data['noises']} noises x {len(data['training_seeds'])}"
        " training seeds; ties count "
        f"half. Brackets: {data['interval']}. The final evaluator was not used to label, to train or"
        ' to choose; "chooser" chose '
        'checkpoints, "reward" scored the loop\'s pairs. Spread: mean difference between assets of a prompt,'
        " as a share of the base's."
    )
    lines = [
        "# Circular-DPO against its base",
        "",
        facts,
        "",
        *markdown_rows(head, rows),
        "",
        "## Groups against each other",
        "",
    ]
    lines += [
        "Share of the first group's assets that the final evaluator prefers to those of the second group from"
        " the same noises.",
        "",
    ]
    head = ["comparison", "win rate", *[f"seed {s}" for s in data["training_seeds"]]]
    rows = []
    for name, rated in data["pairwise"].items():
        x, y = name.split("_vs_")  # keys are "a_vs_b"
        rows.append([f"({x}) against ({y})", with_interval(rated), *of_seeds(rated)])
    lines += markdown_rows(head, rows)
    # absent for runs without the loop
    if data["loop"]:
        rows = []
        for seed, stages in data["loop"].items():
            for stage, pairs in stages.items():
                better = (
                    ""
                    if pairs.get("tuned_rewarded_where_changed") is None
                    else f"{pairs['tuned_rewarded_where_changed']:.2f}"
                )
                rows.append(
                    [
                        seed,
                        stage,
                        pairs["pairs"],
                        f"{pairs['changed_structure']:.2f}",
                        better,
                        f"{pairs['reward_gap_mean']:.3g}",
                    ]
                )
        head = [
            "seed",
            "stage",
            "pairs",
            "structure changed",
            "of these, tuned sample rewarded more",
            "mean reward gap",
        ]
        lines += ["", "## The loop's pairs", "", *markdown_rows(head, rows)]
    return "\n".join(lines) + "\n"


def plot(data: Mapping):
    """Plot the win rates of all groups against the base, and of (a) against the others."""
    # panel 1: every group against the base
    titled = {f"({letter}) {group['title']}": group for letter, group in data["groups"].items()}
    # panel 2: the full loop against every other group; absent if (a) was not trained
    rivals = {
        f"({name.removeprefix('a_vs_')})": rated
        for name, rated in data["pairwise"].items()
        if name.startswith("a_vs_")
    }
    panels = [("win rate against base, final evaluator", titled)]
    panels += [("win rate of (a) against, final evaluator", rivals)] if rivals else []
    return plot_rates(
        panels,
        f"{data['conditions']} prompts x {data['noises']} noises, training seeds"
        f" {', '.join(map(str, data['training_seeds']))}; bars: 95 % over prompts, ticks: seeds",
    )


# The run.

RESULT = "result.json"


def loop_of(
    run: CircularRun, problem: Problem, seed: int, ranks: Ranks = SINGLE, bars: bool = False
) -> CircularLoop:
    """Create the steps of a run for a training seed."""
    # tqdm.write prints above progress bars
    store = Store(Path(run.artefacts), ranks, tqdm.write)
    return CircularLoop(
        problem=problem,
        settings=replace(run.circular, seed=seed),  # one seed for noises, orders and adapters
        store=store,
        ranks=ranks,
        say=tqdm.write,
        bars=bars,
    )


# opens a problem in worker processes; pickled by name
Open = Callable[[ProblemSource, str], Problem]


def work(settings: CircularRun, problem: Problem, run: Run, open: Open) -> None:
    """Do the remaining steps of a run, and write its results."""
    # folders of artefacts are shared by runs, so the run's own folder does not show them
    if run.ranks.main:
        print(f"Artefacts in {settings.artefacts}.", flush=True)
    if settings.groups is not None:
        ablate(settings, problem, run.folder, run.device, run.jobs, open)
    else:
        _loop(settings, problem, run)
    run.done()


def _loop(settings: CircularRun, problem: Problem, run: Run) -> None:
    """Run the loop, or the training of one stage, and write the weights and the summary."""
    folder = run.folder
    ranks = run.ranks
    loop = loop_of(settings, problem, settings.circular.seed, ranks, bars=ranks.main)
    if settings.stage is not None:
        # one stage alone has no loop and needs no reward
        tuned = loop.from_people(settings.stage)
        lineage: Lineage = {settings.stage: (tuned,)}
        steps = [
            {
                "round": 1,
                "step": "people",
                "stage": settings.stage,
                "artefact": tuned.folder.name,
                **tuned.record,
            }
        ]
    else:
        lineage, steps = run_loop(loop, lambda step: tqdm.write(describe(step)) if ranks.main else None)
    # the group of ranks ends here: the others need not wait for rank 0's table
    ranks.barrier()
    leave()
    if not ranks.main:
        return
    # stage -> name of its folder of weights in the run
    weights = {stage: keep(loop, stage, line, folder) for stage, line in lineage.items()}
    result = {
        "steps": steps,
        "weights": weights,
        "warnings": [w for step in steps for w in step.get("warnings", [])],
    }
    run.write(RESULT, result)
    print(f"Weights in {', '.join(str(folder / name) for name in weights.values())}.")
    if settings.summary and problem.final is not None:
        # A table of one training seed: the finished generator, and the one with the last stage alone tuned,
        # against the base. The letters are those of the ablation's groups.
        seed = settings.circular.seed
        loop = loop_of(settings, problem, seed, bars=True)  # for rank 0 alone
        last = loop.names[-1]
        compared: dict[str, Lineage] = {"d": {last: lineage[last]}} if last in lineage else {}
        # with several stages the whole is (a); a single stage before the last is (c)
        compared |= {"a": lineage} if len(lineage) > 1 else {"c": lineage} if last not in lineage else {}
        scores = {
            letter: [loop.evaluate(networks, settings.evaluation).record]
            for letter, networks in {**compared, "i": {}}.items()
        }
        # of several rounds the last round's figures stay
        pairs = {step["stage"]: step for step in steps if step["step"] == "pairs"}
        known = {"training_seeds": [seed], **settings.facts(problem)}
        data = table(
            scores, [seed], {letter: [{}] for letter in scores}, {str(seed): pairs} if pairs else {}, known
        )
        write(data, folder, "summary", markdown, plot)
        print(markdown(data))


def describe(step: Mapping) -> str:
    """Describe a finished step in one line."""
    where = f"round {step['round']}, stage {step['stage']}"
    if step["step"] == "pairs":
        better = step.get("tuned_rewarded_where_changed")
        # None: decoding and encoding gave the same latents on both sides of all pairs
        more = "" if better is None else f"; in {better:.0%} of these the tuned sample has the higher reward"
        return (
            f"{where}: {step['pairs']} pairs, {step['changed_structure']:.0%} of them with a changed"
            f" structure{more}"
        )
    # the figure of the kept update, if it was measured there
    shown = ""
    for name, what in (
        ("win_rates", "held-out win rate"),
        ("held_out_accuracies", "accuracy on held-out pairs"),
    ):
        values = dict(step[name])
        shown += f", {what} {values[step['kept_step']]:.3f}" if step["kept_step"] in values else ""
    return (
        f"{where}: trained on {step['pairs']} pairs ({step['step']}), kept update {step['kept_step']}{shown}"
    )


def keep(loop: CircularLoop, stage: str, line: tuple[Artefact, ...], folder: Path) -> str:
    """Put a stage's weights into the run folder, and return their name.

    They are the weights of its training, or after several rounds the whole network.
    """
    # links to the artefacts, so that weights are not stored twice
    link_folder(whole_weights(loop, stage, line, folder / stage), folder / stage)
    return stage


@dataclass(kw_only=True)
class Ablation:
    """Worker of an ablation: does the tasks of a plan with the steps of a loop.

    Args: loop_of: creates the loop of a training seed.
    """

    plan: AblationPlan
    loop_of: Callable[[int], CircularLoop]

    def __call__(self, task: str) -> dict:
        """Do one task, and return its result as JSON: the scores of a group, or the records of a step."""
        # names as AblationPlan.tasks gives them
        seed, what, *part = task.split("/")  # "<seed>/pairs", "<seed>/<letter>" or "<seed>/<kind>/<part>"
        loop = self.loop_of(int(seed))
        if what == "pairs":
            _, pairs = self._looped(loop, None)
            return {
                stage: {**artefact.record, "reused": artefact.reused} for stage, artefact in pairs.items()
            }
        if part:
            lineage = self._trained(loop, what, part[0])
            return {stage: _training(line[-1]) for stage, line in lineage.items()}
        group = ALL[what]
        # steps that a task before this one has done are found in the store
        networks: Lineage
        if group.first == LOOP:
            networks = self._looped(loop, group)[0]
        else:
            networks = self._trained(loop, group.last, "last") if group.last != BASE else {}
            networks |= self._trained(loop, group.first, "first") if group.first != BASE else {}
        scored = loop.evaluate(networks, self.plan.evaluation)
        trained = {stage: _training(line[-1]) for stage, line in networks.items()}
        return {"scores": scored.record, "trainings": trained, "reused": scored.reused}

    def _trained(self, loop: CircularLoop, kind: str, part: str) -> dict[str, tuple[Artefact, ...]]:
        """Train the last stage, or each of the stages before it, from the base."""
        # with two stages each part is one stage
        chosen = loop.names[-1:] if part == "last" else loop.names[:-1]
        return {name: (loop.from_people(name, supervised=kind == SUPERVISED),) for name in chosen}

    def _looped(self, loop: CircularLoop, group: Group | None) -> tuple[dict, dict[str, Artefact]]:
        """Run the loop of a group, and return its networks and pairs.

        Without a group, stop at the first pairs, which all groups share.
        """
        lineage = self._trained(loop, PEOPLE, "last")
        pairs: dict[str, Artefact] = {}
        # from the last stage but one to the first: the pairs of a stage need the tuned stage after it
        for name in reversed(loop.names[:-1]):
            pairs[name] = loop.pairs(name, lineage)
            if group is None:
                break
            weighing = replace(loop.settings.weighing, use_w1=group.use_w1, use_w2=group.use_w2)
            try:
                lineage[name] = (loop.from_loop(name, pairs[name], lineage, weighing, group.use),)
            # the group then stays without this training, and its row of the table has no record of it
            except NoPairsError as error:
                loop.say(f"Warning: {error}")
        return lineage, pairs


def _training(artefact: Artefact) -> dict:
    """Return the record of a training, with its artefact."""
    return {**artefact.record, "artefact": artefact.folder.name, "reused": artefact.reused}


def handler_of(run: CircularRun, device: str, open: Open, alone: bool) -> Ablation:
    """Create the worker of a process; one of several processes uses a single thread."""
    # more threads than cores would slow all processes down
    if not alone:
        torch.set_num_threads(1)
    return Ablation(plan=run.plan, loop_of=partial(loop_of, run, open(run.source, device)))


def ablate(run: CircularRun, problem: Problem, folder: Path, device: str, jobs: int, open: Open) -> None:
    """Train and evaluate all groups on worker processes, and write the table."""
    plan = run.plan
    tasks = run.plan.tasks()
    print(f"{len(tasks)} tasks on {jobs} processes; what they print is in {folder / 'logs'}.", flush=True)
    detectable_rate = detectable(
        len(problem.held_out_conditions), plan.evaluation.per_condition, len(plan.seeds)
    )
    print(
        f"Power: the table detects win rates of {detectable_rate:.3f} or more with a probability of 80 %, if"
        " all comparisons are independent.",
        flush=True,
    )
    results = pooled("ablation", tasks, handler_of, (run, device, open), jobs, folder)
    data = tabled(results, plan, run.facts(problem))
    for path in write(data, folder, "ablation", markdown, plot):
        print(f"Written: {path}")
    print(markdown(data))


def tabled(results: Mapping[str, Mapping], plan: AblationPlan, facts: Mapping) -> dict:
    """Make the table from the results of all tasks."""
    # the base has one result, which is repeated for every seed
    seeds = plan.seeds
    scores = {
        x: [results[f"{seed if x != 'i' else seeds[0]}/{x}"]["scores"] for seed in seeds] for x in plan.groups
    }
    trained = {
        x: [results[f"{seed}/{x}"]["trainings"] if x != "i" else {} for seed in seeds] for x in plan.groups
    }
    # keys are texts, as JSON has no others
    loop = {str(seed): results[f"{seed}/pairs"] for seed in seeds if f"{seed}/pairs" in results}
    return table(scores, seeds, trained, loop, {"training_seeds": list(seeds), **facts})
