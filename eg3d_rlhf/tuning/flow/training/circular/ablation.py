"""Run Circular-DPO: the loop, one stage alone, or the ablation of the paper's table 2 with its nine groups.
The module also writes the table that ends a run.

A group of the ablation is one combination of trainings, see circular/settings.py. The groups are trained with
several seeds and evaluated on the same noises. Groups of one seed share the steps that they have in common:
(a), (b), (d), (g) and (h) share the training of the last stage; (a), (g) and (h) the loop's pairs; (b) and
(c) the training of the first stage. Here "first" is the position of a stage: the paper's "step 1" in (c) is
the first stage, while the first step of the method trains the last stage. With more than two stages, "first"
means all stages before the last.

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
    plot_rates,
    win_rates_by_seed,
    with_interval,
    write,
)
from eg3d_rlhf.models.policies import link_folder
from eg3d_rlhf.tuning.flow.base.export import NO_TABLE, export_command
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS, ProblemSource
from eg3d_rlhf.tuning.flow.training.arm_runs import pooled
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import (
    CircularLoop,
    Lineage,
    network_weights,
    randomised,
    run_loop,
)
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import NoPairsError
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    ALL,
    BASE,
    CONTROL,
    LOOP,
    PEOPLE,
    RANDOMISED,
    SUPERVISED,
    AblationPlan,
    CircularRun,
    Group,
)
from training import rehearsal
from training.distributed import SINGLE, Ranks, leave
from training.progress import tqdm

# The table.


def table(
    scores: Mapping[str, Sequence[Mapping]],
    seeds: Sequence[int],
    training_records: Mapping[str, Sequence[Mapping]],
    loop_statistics: Mapping,
    facts: Mapping,
) -> dict:
    """Make the table, as JSON.

    Args:
        scores: results of `evaluate` by group, one for each training seed.
        seeds: training seeds, [K].
        training_records: records of the trainings by group, one mapping for each training seed.
        loop_statistics: statistics of the loop's pairs, by training seed and stage.
        facts: further entries, which describe the run.
    """
    scores_by_group = {}  # scores by group and evaluator, [K, C, S] each
    spreads = {}  # mean distance of assets of one prompt, averaged over seeds, by group and stage
    for letter, seed_results in scores.items():
        # all seeds have the same evaluators and stages, so the names are taken from the first one
        scores_by_group[letter] = {
            name: np.array([seed_result["scores"][name] for seed_result in seed_results])
            for name in seed_results[0]["scores"]
        }
        spreads[letter] = {
            stage: float(np.mean([seed_result["spread"][stage] for seed_result in seed_results]))
            for stage in seed_results[0]["spread"]
        }
    # "i" is the base; its scores are repeated for every seed, so that they can be compared with each group's
    rates = Table(scores=scores_by_group, base=scores_by_group["i"], seeds=seeds)
    groups = {}
    for letter, group_scores in scores_by_group.items():
        base_spreads = spreads["i"]  # spread of the base, by stage
        tuned_spreads = spreads[letter]  # spread after the group's trainings, by stage
        win_rates = rates.against_base(letter)
        groups[letter] = {
            "title": ALL[letter].title,
            **win_rates["final"],  # win rate, its interval and its seeds
            "score_mean": float(group_scores["final"].mean()),
            "evaluators": {name: win_rates[name] for name in EVALUATORS if name in win_rates},
            # criteria that the final evaluator consists of
            "parts": {name: win_rates[name] for name in group_scores if name not in EVALUATORS},
            "spread": {  # of_base is the share of the base's spread; it is near 0 for a collapsed generator
                stage: {
                    "mean": mean,
                    "of_base": mean / base_spreads[stage] if base_spreads[stage] > 0 else None,
                }
                for stage, mean in tuned_spreads.items()
            },
            "trainings": list(training_records[letter]),  # one mapping for each seed
        }
    # in the order of ALL, so that the first of two groups is the same in every table
    pairwise = rates.pairwise("final", [name for name in ALL if name in scores_by_group])
    # the first axis has the training seeds
    C, S = scores_by_group["i"]["final"].shape[1:]
    return {
        "groups": groups,
        "pairwise": pairwise,
        "loop": dict(loop_statistics),
        **rates.sizes,  # numbers of prompts, noises and seeds
        # smallest win rate that a table of this size detects in 80 % of cases
        "detectable": detectable(C, S, len(seeds)),
        "interval": INTERVAL,
        **facts,
    }


def markdown(table_data: Mapping) -> str:
    """Format the table as Markdown."""
    # all groups have the same parts and stages
    part_names = list(next(iter(table_data["groups"].values()))["parts"])
    stages = list(table_data["groups"]["i"]["spread"])
    header = [
        "group",
        "what is trained",
        "win rate against base",
        *[f"seed {seed}" for seed in table_data["training_seeds"]],
    ]
    header += (
        [f"{name} alone" for name in part_names]
        + ["chooser", "reward"]
        + [f"spread, {stage}" for stage in stages]
    )
    table_rows = []
    for letter, group in table_data["groups"].items():
        # the order of the cells is that of `header`
        cells = [f"({letter})", group["title"], with_interval(group), *win_rates_by_seed(group)]
        cells += [f"{group['parts'][name]['win_rate']:.3f}" for name in part_names]
        cells += [
            f"{group['evaluators'][name]['win_rate']:.3f}" if name in group["evaluators"] else ""
            for name in ("chooser", "reward")
        ]
        # None if the base has no spread, for example with a single noise for each prompt
        spread_shares = [group["spread"][stage]["of_base"] for stage in stages]
        cells += ["" if share is None else f"{share:.2f}" for share in spread_shares]
        table_rows.append(cells)
    facts = (
        f"{table_data['conditions']} held-out prompts x {table_data['noises']} noises x"
        f" {len(table_data['training_seeds'])} training seeds; ties count half. Brackets:"
        f" {table_data['interval']}. The final evaluator was not used to label, to train or"
        ' to choose; "chooser" chose '
        'checkpoints, "reward" scored the loop\'s pairs. Spread: mean difference between assets of a prompt,'
        " as a share of the base's."
    )
    # False only for a run without --ablate and with --no-control
    if table_data.get("control") is False:
        facts += (
            " No control on randomised answers was trained, so nothing here tests whether a gain is due to"
            " people's answers."
        )
    markdown_lines = [
        "# Circular-DPO against its base",
        "",
        facts,
        "",
        *markdown_rows(header, table_rows),
        "",
        "## Groups against each other",
        "",
    ]
    markdown_lines += [
        "Share of the first group's assets that the final evaluator prefers to those of the second group from"
        " the same noises.",
        "",
    ]
    header = ["comparison", "win rate", *[f"seed {seed}" for seed in table_data["training_seeds"]]]
    table_rows = []
    for name, comparison in table_data["pairwise"].items():
        group_letter, rival_letter = name.split("_vs_")  # keys are "a_vs_b"
        table_rows.append(
            [
                f"({group_letter}) against ({rival_letter})",
                with_interval(comparison),
                *win_rates_by_seed(comparison),
            ]
        )
    markdown_lines += markdown_rows(header, table_rows)
    # absent for runs without the loop
    if table_data["loop"]:
        table_rows = []
        for seed, stages in table_data["loop"].items():
            for stage, pair_statistics in stages.items():
                tuned_better_share = pair_statistics.get("tuned_rewarded_where_changed")
                table_rows.append(
                    [
                        seed,
                        stage,
                        pair_statistics["pairs"],
                        f"{pair_statistics['changed_structure']:.2f}",
                        # None: no pair has a changed structure
                        "" if tuned_better_share is None else f"{tuned_better_share:.2f}",
                        f"{pair_statistics['reward_gap_mean']:.3g}",
                    ]
                )
        header = [
            "seed",
            "stage",
            "pairs",
            "structure changed",
            "of these, tuned sample rewarded more",
            "mean reward gap",
        ]
        markdown_lines += ["", "## The loop's pairs", "", *markdown_rows(header, table_rows)]
    return "\n".join(markdown_lines) + "\n"


def plot(table_data: Mapping):
    """Plot the win rates of all groups against the base, and of group (a) against the other groups.

    Args: table_data: the table, as JSON.
    """
    # panel 1: every group against the base
    groups_by_title = {
        f"({letter}) {group['title']}": group for letter, group in table_data["groups"].items()
    }
    # panel 2: the full loop against every other group; absent if (a) was not trained
    rivals = {
        f"({name.removeprefix('a_vs_')})": comparison
        for name, comparison in table_data["pairwise"].items()
        if name.startswith("a_vs_")
    }
    panels = [("win rate against base, final evaluator", groups_by_title)]
    panels += [("win rate of (a) against, final evaluator", rivals)] if rivals else []
    return plot_rates(
        panels,
        f"{table_data['conditions']} prompts x {table_data['noises']} noises, training seeds"
        f" {', '.join(map(str, table_data['training_seeds']))}; bars: 95 % over prompts, ticks: seeds",
    )


# The run.

RESULT = "result.json"


def loop_of(
    run: CircularRun, problem: Problem, seed: int, ranks: Ranks = SINGLE, bars: bool = False
) -> CircularLoop:
    """Create the Circular-DPO loop of one training seed, with the settings of a run.

    Args:
        run: settings of the run.
        problem: the problem, opened in this process.
        seed: training seed.
        ranks: processes that work together.
        bars: whether progress bars are printed.
    """
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


# function that opens a problem on a device in a worker process; it is pickled by name
Open = Callable[[ProblemSource, str], Problem]


def work(settings: CircularRun, problem: Problem, run: Run, open_problem: Open) -> None:
    """Do the remaining steps of a run, and write its results.

    Args:
        settings: settings of the run.
        problem: the problem, opened in this process.
        run: folder, ranks and device of the run.
        open_problem: function that opens the problem in a worker process.
    """
    # runs share the folder of artefacts, which is not in the folder of the run
    if run.ranks.is_main:
        print(f"Artefacts are stored in {settings.artefacts}.", flush=True)
    if settings.groups is not None:
        ablate(settings, problem, run.folder, run.device, run.jobs, open_problem)
    else:
        _loop(settings, problem, run)
    run.done()
    # The stages of an ablation's groups are compared, and not exported.
    if settings.groups is None and run.ranks.is_main and not rehearsal.active():
        print(f"next: {export_command(run.folder)}")


def _loop(settings: CircularRun, problem: Problem, run: Run) -> None:
    """Run the loop, or train `settings.stage` alone, and write the weights and the table.

    Args:
        settings: settings of the run.
        problem: the problem, opened in this process.
        run: folder and ranks of the run.
    """
    folder = run.folder
    ranks = run.ranks
    loop = loop_of(settings, problem, settings.circular.seed, ranks, bars=ranks.is_main)
    lineage, steps = _trained(loop, settings.stage)
    control_loop = control_of(loop)
    control_lineage: Lineage = {}
    control_steps: list[dict] = []
    if settings.control:
        if ranks.is_main:
            tqdm.write(
                "Control: the same training on randomised answers of people, for as long. Leave it out with"
                " --no-control."
            )
        control_lineage, control_steps = _trained(control_loop, settings.stage)
    # the distributed group ends here, so that the other ranks need not wait for the table of rank 0
    ranks.barrier()
    leave()
    if not ranks.is_main:
        return
    # stage -> name of its folder of weights in the run
    weights_folder_names = {
        stage: keep(loop, stage, trainings, folder) for stage, trainings in lineage.items()
    }
    for stage, trainings in control_lineage.items():
        keep(control_loop, stage, trainings, folder / CONTROL)
    run_result = {
        "steps": steps,
        "control_steps": control_steps,
        "weights": weights_folder_names,
        "warnings": [warning for step in steps for warning in step.get("warnings", [])],
    }
    run.write(RESULT, run_result)
    print(f"The weights are in {', '.join(str(folder / name) for name in weights_folder_names.values())}.")
    if settings.summary and problem.final is None:
        print(NO_TABLE)
    if settings.summary and problem.final is not None:
        # A table of one training seed: the tuned generator, and the generator of which only the last stage is
        # tuned, against the base. The letters are those of the ablation's groups.
        seed = settings.circular.seed
        loop = loop_of(settings, problem, seed, bars=True)  # for rank 0 alone
        last_stage = loop.names[-1]
        compared_networks: dict[str, Lineage] = {}
        if last_stage in lineage:
            compared_networks["d"] = {last_stage: lineage[last_stage]}
        # several tuned stages are group (a); a single tuned stage before the last is group (c)
        if len(lineage) > 1:
            compared_networks["a"] = lineage
        elif last_stage not in lineage:
            compared_networks["c"] = lineage
        if control_lineage:
            compared_networks[CONTROL] = control_lineage
        scores = {
            letter: [loop.evaluate(networks, settings.evaluation).record]
            for letter, networks in {**compared_networks, "i": {}}.items()
        }
        # the scores of a rehearsal are those of the first batch, which fill no table
        if rehearsal.active():
            return
        # after several rounds, the statistics of the last round remain in the mapping
        pair_steps = {step["stage"]: step for step in steps if step["step"] == "pairs"}
        facts = {"training_seeds": [seed], "control": settings.control, **settings.facts(problem)}
        table_data = table(
            scores,
            [seed],
            {letter: [{}] for letter in scores},
            {str(seed): pair_steps} if pair_steps else {},
            facts,
        )
        write(table_data, folder, "summary", markdown, plot)
        print(markdown(table_data))


def control_of(loop: CircularLoop) -> CircularLoop:
    """Return the loop of the control: half of each prompt's answers and of the loop's pairs are inverted."""
    return replace(loop, problem=randomised(loop.problem, loop.settings.seed), use=RANDOMISED)


def _trained(loop: CircularLoop, stage: str | None) -> tuple[Lineage, list[dict]]:
    """Run a loop, or train one stage alone, and return the lineage and the descriptions of all steps.

    Args:
        loop: steps of the run.
        stage: name of the stage to train alone; None for the loop.
    """
    if stage is None:
        return run_loop(loop, lambda step: tqdm.write(describe(step)) if loop.ranks.is_main else None)
    # one stage alone has no loop and needs no reward
    training = loop.from_people(stage)
    step = {"round": 1, "step": "people", "stage": stage, "artefact": training.folder.name, **training.record}
    return {stage: (training,)}, [step]


def describe(step: Mapping) -> str:
    """Describe a finished step (an entry of run_loop's second result) in one line."""
    position = f"round {step['round']}, stage {step['stage']}"
    if step["step"] == "pairs":
        tuned_better_share = step.get("tuned_rewarded_where_changed")
        # None: decoding and encoding gave the same latents on both sides of all pairs
        reward_remark = (
            ""
            if tuned_better_share is None
            else f"; in {tuned_better_share:.0%} of these the tuned sample has the higher reward"
        )
        return (
            f"{position}: {step['pairs']} pairs, {step['changed_structure']:.0%} of them with a changed"
            f" structure{reward_remark}"
        )
    # the rate at the kept update, if it was measured there
    rate_remarks = ""
    for name, rate_name in (
        ("win_rates", "held-out win rate"),
        ("held_out_accuracies", "accuracy on held-out pairs"),
    ):
        rate_by_step = dict(step[name])
        rate_remarks += (
            f", {rate_name} {rate_by_step[step['kept_step']]:.3f}"
            if step["kept_step"] in rate_by_step
            else ""
        )
    return (
        f"{position}: trained on {step['pairs']} pairs ({step['step']}), kept update"
        f" {step['kept_step']}{rate_remarks}"
    )


def keep(loop: CircularLoop, stage: str, trainings: tuple[Artefact, ...], folder: Path) -> str:
    """Link the weights of a stage into the folder of the run, and return the name of their folder there.

    After one round, the weights are those of the stage's training. After several rounds, they are all
    parameters of the network.

    Args:
        loop: steps of the run.
        stage: name of the stage.
        trainings: trainings of the stage, the oldest first.
        folder: folder of the run.
    """
    # links to the artefacts, so that weights are not stored twice
    link_folder(network_weights(loop, stage, trainings, folder / stage), folder / stage)
    return stage


@dataclass(kw_only=True)
class Ablation:
    """Worker of an ablation, a callable that does the tasks of a plan (AblationPlan.tasks).

    Args:
        plan: plan of the ablation.
        loop_of: function that creates the loop of a training seed.
    """

    plan: AblationPlan
    loop_of: Callable[[int], CircularLoop]

    def __call__(self, task: str) -> dict:
        """Do one task, and return its result as JSON.

        The result of a group's task has the group's scores and the records of its trainings. The result of a
        task that groups share has the records of the artefacts by stage.
        """
        # names of AblationPlan.tasks: "<seed>/pairs", "<seed>/<group>" or "<seed>/<data>/<stages>"
        seed, subject, *stages = task.split("/")
        loop = self.loop_of(int(seed))
        if subject == "pairs":
            _, pairs = self._looped(loop, None)
            return {
                stage: {**artefact.record, "reused": artefact.reused} for stage, artefact in pairs.items()
            }
        if stages:
            lineage = self._trained(loop, subject, stages[0])
            return {stage: _training(trainings[-1]) for stage, trainings in lineage.items()}
        group = ALL[subject]
        # steps that an earlier task has done are read from the store
        networks: Lineage
        if group.first == LOOP:
            networks, _ = self._looped(loop, group)
        else:
            networks = self._trained(loop, group.last, "last") if group.last != BASE else {}
            networks |= self._trained(loop, group.first, "first") if group.first != BASE else {}
        scores = loop.evaluate(networks, self.plan.evaluation)
        training_records = {stage: _training(trainings[-1]) for stage, trainings in networks.items()}
        return {"scores": scores.record, "trainings": training_records, "reused": scores.reused}

    def _trained(
        self, loop: CircularLoop, training_kind: str, stage_position: str
    ) -> dict[str, tuple[Artefact, ...]]:
        """Train the last stage, or each of the stages before it, from the untuned networks.

        Args:
            loop: loop of the training seed.
            training_kind: PEOPLE for DPO on people's pairs, SUPERVISED for fine-tuning.
            stage_position: "last" for the last stage, "first" for all stages before it.
        Returns: the lineage of the trained stages: name of a stage -> its training.
        """
        # with two stages, "first" means one stage
        stage_names = loop.names[-1:] if stage_position == "last" else loop.names[:-1]
        return {
            name: (loop.from_people(name, supervised=training_kind == SUPERVISED),) for name in stage_names
        }

    def _looped(self, loop: CircularLoop, group: Group | None) -> tuple[dict, dict[str, Artefact]]:
        """Run the loop of a group, and return its lineage and the artefacts of its pairs, both by stage.

        If `group` is None, stop after the pairs of the last stage but one, which all groups share.
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
            # the group then has no training of this stage, and its row of the table has no record of one
            except NoPairsError as error:
                loop.say(f"Warning: {error}")
        return lineage, pairs


def _training(artefact: Artefact) -> dict:
    """Return the record of a training, with its artefact's name and whether this artefact existed before."""
    return {**artefact.record, "artefact": artefact.folder.name, "reused": artefact.reused}


def handler_of(run: CircularRun, device: str, open_problem: Open, single_process: bool) -> Ablation:
    """Create the worker of a process, which does the tasks of an ablation there.

    Args:
        run: settings of the run.
        device: device of the process.
        open_problem: function that opens the problem.
        single_process: whether this is the only process; otherwise it computes with one thread.
    """
    # more threads than cores would slow all processes down
    if not single_process:
        torch.set_num_threads(1)
    return Ablation(plan=run.plan, loop_of=partial(loop_of, run, open_problem(run.source, device)))


def ablate(
    run: CircularRun, problem: Problem, folder: Path, device: str, jobs: int, open_problem: Open
) -> None:
    """Train and evaluate all groups on worker processes, and write the table.

    Args:
        run: settings of the run.
        problem: the problem, opened in this process.
        folder: folder of the run.
        device: device of the worker processes.
        jobs: number of worker processes.
        open_problem: function that opens the problem in a worker process.
    """
    plan = run.plan
    tasks = run.plan.tasks()
    print(f"{len(tasks)} tasks run on {jobs} processes. Their output is in {folder / 'logs'}.", flush=True)
    detectable_rate = detectable(
        len(problem.held_out_prompts), plan.evaluation.per_condition, len(plan.seeds)
    )
    print(
        f"Power: the table detects win rates of {detectable_rate:.3f} or more with a probability of 80 %, if"
        " all comparisons are independent.",
        flush=True,
    )
    results = pooled("ablation", tasks, handler_of, (run, device, open_problem), jobs, folder)
    table_data = tabled(results, plan, run.facts(problem))
    for path in write(table_data, folder, "ablation", markdown, plot):
        print(f"The table was written to {path}.")
    print(markdown(table_data))


def tabled(results: Mapping[str, Mapping], plan: AblationPlan, facts: Mapping) -> dict:
    """Make the table of an ablation, as JSON.

    Args:
        results: results of all tasks, by name of the task.
        plan: plan of the ablation.
        facts: further entries of the table, which describe the run.
    """
    seeds = plan.seeds
    scores = {}  # group -> result of `evaluate` for each seed
    training_records: dict[str, list] = {}  # group -> records of the trainings for each seed
    for letter in plan.groups:
        if letter == "i":
            # the base has one result and no trainings; the result is repeated for every seed
            scores[letter] = [results[f"{seeds[0]}/i"]["scores"] for _ in seeds]
            training_records[letter] = [{} for _ in seeds]
            continue
        group_results = [results[f"{seed}/{letter}"] for seed in seeds]
        scores[letter] = [task_result["scores"] for task_result in group_results]
        training_records[letter] = [task_result["trainings"] for task_result in group_results]
    # the keys of a JSON object are texts
    loop_statistics = {str(seed): results[f"{seed}/pairs"] for seed in seeds if f"{seed}/pairs" in results}
    return table(scores, seeds, training_records, loop_statistics, {"training_seeds": list(seeds), **facts})
