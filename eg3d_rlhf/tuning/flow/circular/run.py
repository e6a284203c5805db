"""A run of Circular-DPO from its settings to its folder: the loop, one stage alone, or the nine groups of the paper's table 2, trained with
several seeds and judged on the same noises.

Groups of a seed share what they have in common: (a), (b), (d), (g) and (h) the last stage, (a), (g) and (h) the loop's pairs, (b) and (c)
the first stage. Names go by stage: the paper's "step 1" in (c) is the first stage, while the method's first step trains the last.
With more than two stages, "first" stands for all stages before the last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Artefact
from eg3d_rlhf.experiments.table import detectable, write
from eg3d_rlhf.models.policies import link, save_policy
from eg3d_rlhf.tuning.flow.circular import loop as circular_loop
from eg3d_rlhf.tuning.flow.circular import table
from eg3d_rlhf.tuning.flow.circular.loop import CircularLoop, Lineage, NoPairsError, loop_of, weights_of
from eg3d_rlhf.tuning.flow.circular.settings import CircularRun
from eg3d_rlhf.tuning.flow.circular.table import ALL, BASE, LOOP, PEOPLE, SUPERVISED, AblationPlan, Group
from eg3d_rlhf.tuning.flow.problem import Problem, open_problem
from training.distributed import leave
from training.progress import tqdm

RESULT = "result.json"


def work(settings: CircularRun, problem: Problem, run: Run) -> None:
    """Do what is left to do of a run, and write its results."""
    if run.ranks.main:
        print(f"Artefacts in {settings.artefacts}.", flush=True)
    if settings.groups is not None:
        ablate(settings, problem, run.folder, run.device, run.jobs)
    else:
        _loop(settings, problem, run)
    run.done()


# The loop, or one stage of it.


def _loop(settings: CircularRun, problem: Problem, run: Run) -> None:
    folder, ranks = run.folder, run.ranks
    loop = loop_of(settings, problem, settings.circular.seed, ranks, bars=ranks.main)
    if settings.stage is not None:
        tuned = loop.from_people(settings.stage)
        lineage: Lineage = {settings.stage: (tuned,)}
        steps = [{"round": 1, "step": "people", "stage": settings.stage, "artefact": tuned.folder.name, **tuned.record}]
    else:
        lineage, steps = circular_loop.run(loop, lambda step: tqdm.write(describe(step)) if ranks.main else None)
    ranks.barrier()
    leave()  # the others need not wait for the table
    if not ranks.main:
        return
    weights = {stage: keep(loop, stage, line, folder) for stage, line in lineage.items()}
    result = {"steps": steps, "weights": weights, "warnings": [w for step in steps for w in step.get("warnings", [])]}
    run.write(RESULT, result)
    print(f"Weights in {', '.join(str(folder / name) for name in weights.values())}.")
    if settings.summary and problem.final is not None:
        # The finished generator, and that with the last stage alone tuned, against the base: a table of one training seed.
        seed, last = settings.circular.seed, problem.pipeline.stages[-1].name
        loop = loop_of(settings, problem, seed, bars=True)
        compared: dict[str, Lineage] = {"d": {last: lineage[last]}} if last in lineage else {}
        compared |= {"a": lineage} if len(lineage) > 1 else {"c": lineage} if last not in lineage else {}
        scores = {letter: [loop.judged(own, settings.judging).record] for letter, own in {**compared, "i": {}}.items()}
        pairs = {step["stage"]: step for step in steps if step["step"] == "pairs"}
        known = {"training_seeds": [seed], **settings.facts(problem)}
        data = table.table(scores, [seed], {letter: [{}] for letter in scores}, {str(seed): pairs} if pairs else {}, known)
        write(data, folder, "summary", table.markdown, table.plot)
        print(table.markdown(data))


def describe(step: Mapping) -> str:
    """One line of a finished step."""
    where = f"round {step['round']}, stage {step['stage']}"
    if step["step"] == "pairs":
        better = step.get("op_rewarded_where_changed")
        more = "" if better is None else f"; of these the reward prefers the tuned one in {better:.0%}"
        return f"{where}: {step['pairs']} pairs, {step['changed_structure']:.0%} of them with another structure{more}"
    rates = {n: rate for n, rate in step["win_rates"]}
    shown = f", held-out win rate {rates[step['kept_step']]:.3f}" if step["kept_step"] in rates else ""
    return f"{where}: trained on {step['pairs']} pairs ({step['step']}), kept step {step['kept_step']}{shown}"


def keep(loop: CircularLoop, stage: str, line: tuple[Artefact, ...], folder: Path) -> str:
    """Put a stage's weights into the run folder: those of its training, or, after several rounds, the whole network. Returns the name."""
    target = folder / stage
    if len(line) > 1:
        save_policy(loop.models({stage: line})[stage], target, {"trainings": [one.folder.name for one in line]})
        return stage
    source = weights_of(line[0])
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        link(file, target / file.relative_to(source))
    return stage


@dataclass(kw_only=True)
class Ablation:
    """The tasks of a plan, done with the steps of a loop; `loop_of` makes it for a training seed."""

    plan: AblationPlan
    loop_of: Callable[[int], CircularLoop]

    def __call__(self, task: str) -> dict:
        """Do one task; returns JSON: the scores of a group, what is known of a step."""
        seed, what, *part = task.split("/")
        loop = self.loop_of(int(seed))
        if what == "pairs":
            _, pairs = self._looped(loop, None)
            return {stage: {**artefact.record, "reused": artefact.reused} for stage, artefact in pairs.items()}
        if part:
            lineage = self._trained(loop, what, part[0])
            return {stage: _training(line[-1]) for stage, line in lineage.items()}
        group = ALL[what]
        networks: Lineage
        if group.first == LOOP:
            networks = self._looped(loop, group)[0]
        else:
            networks = self._trained(loop, group.last, "last") if group.last != BASE else {}
            networks |= self._trained(loop, group.first, "first") if group.first != BASE else {}
        judged = loop.judged(networks, self.plan.judging)
        trained = {stage: _training(line[-1]) for stage, line in networks.items()}
        return {"scores": judged.record, "trainings": trained, "reused": judged.reused}

    def _trained(self, loop: CircularLoop, kind: str, part: str) -> dict[str, tuple[Artefact, ...]]:
        """The last stage, or those before it, each trained from the base."""
        names = [stage.name for stage in loop.problem.pipeline.stages]
        chosen = names[-1:] if part == "last" else names[:-1]
        return {name: (loop.from_people(name, supervised=kind == SUPERVISED),) for name in chosen}

    def _looped(self, loop: CircularLoop, group: Group | None) -> tuple[dict, dict[str, Artefact]]:
        """The loop's networks and pairs; without a group, up to the pairs that all groups share."""
        lineage = self._trained(loop, PEOPLE, "last")
        pairs: dict[str, Artefact] = {}
        for name in reversed([stage.name for stage in loop.problem.pipeline.stages][:-1]):
            pairs[name] = loop.pairs(name, lineage)
            if group is None:
                break
            weighing = replace(loop.settings.weighing, use_w1=group.use_w1, use_w2=group.use_w2)
            try:
                lineage[name] = (loop.from_loop(name, pairs[name], lineage, weighing, group.use),)
            except NoPairsError as error:  # the group is then what it is without this training; its table says so
                loop.say(f"Warning: {error}")
        return lineage, pairs


def _training(artefact: Artefact) -> dict:
    return {**artefact.record, "artefact": artefact.folder.name, "reused": artefact.reused}


def cost(task: str, plan: AblationPlan, steps: Mapping[str, int], conditions: int, pairs: int) -> float:
    """Rough work of a task, in training updates, for the bar's time left.

    Args: steps: updates by PEOPLE, LOOP and SUPERVISED; conditions: held-out ones; pairs: human ones.
    """
    _, what, *part = task.split("/")
    assets = plan.judging.per_condition * conditions / 4  # an asset costs about as much as a quarter of an update
    if part:
        return steps[what]
    if what == "pairs":
        return pairs / 2
    return assets + (steps[LOOP] if ALL[what].first == LOOP else 0)


def handler_of(run: CircularRun, device: str, alone: bool) -> Ablation:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Ablation(plan=run.plan, loop_of=partial(loop_of, run, open_problem(run.source, device)))


def ablate(run: CircularRun, problem: Problem, folder: Path, device: str, jobs: int) -> None:
    """Train and judge all groups on worker processes, and write the table."""
    plan, tasks = run.plan, run.plan.tasks()
    steps = {PEOPLE: run.circular.human.steps, LOOP: run.circular.loop.steps, SUPERVISED: run.circular.sft.steps}
    pairs = len(problem.human_pairs(problem.pipeline.stages[-1].name))
    units = {task: round(cost(task, plan, steps, len(problem.held_out_conditions), pairs)) for task in tasks}
    print(f"{len(tasks)} tasks on {jobs} processes; what they print is in {folder / 'logs'}.", flush=True)
    sees = detectable(len(problem.held_out_conditions), plan.judging.per_condition, len(plan.seeds))
    print(f"What the table can see: win rates from {sees:.3f} on, in 80 % of such tables, were all comparisons independent.", flush=True)
    with tqdm(total=sum(units.values()), unit="update", desc="ablation", dynamic_ncols=True, smoothing=0.05) as bar:

        def done(name: str, result: Mapping) -> None:
            bar.set_description(f"ablation, done {name}", refresh=False)
            reused = result["reused"] if "reused" in result else all(one["reused"] for one in result.values())
            if reused:  # which says nothing of the time that others take
                bar.total -= units[name]
                bar.refresh()
            else:
                bar.update(units[name])

        expected = (ValueError, OSError, StoppedError)
        results = run_tasks(tasks, handler_of, (run, device, jobs == 1), jobs, folder / "logs", done, expected)
    data = tabled(results, plan, run.facts(problem))
    for path in write(data, folder, "ablation", table.markdown, table.plot):
        print(f"Written: {path}")
    print(table.markdown(data))


def tabled(results: Mapping[str, Mapping], plan: AblationPlan, facts: Mapping) -> dict:
    """The table of all tasks' results; the base's scores are the same for all training seeds."""
    seeds = plan.seeds
    scores = {x: [results[f"{seed if x != 'i' else seeds[0]}/{x}"]["scores"] for seed in seeds] for x in plan.groups}
    trained = {x: [results[f"{seed}/{x}"]["trainings"] if x != "i" else {} for seed in seeds] for x in plan.groups}
    loop = {str(seed): results[f"{seed}/pairs"] for seed in seeds if f"{seed}/pairs" in results}
    return table.table(scores, seeds, trained, loop, {"training_seeds": list(seeds), **facts})
