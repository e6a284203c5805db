"""A run of Circular-DPO from its settings to its folder: the loop, one stage alone, or the ablation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from eg3d_rlhf.flow.circular import loop as circular_loop
from eg3d_rlhf.flow.circular import table
from eg3d_rlhf.flow.circular.ablation import ablate
from eg3d_rlhf.flow.circular.artefacts import Artefact
from eg3d_rlhf.flow.circular.loop import CircularLoop, Lineage, loop_of, say, weights_of
from eg3d_rlhf.flow.circular.settings import CircularRun, from_dict
from eg3d_rlhf.flow.policies import link, save_policy
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.stage import stage_of
from eg3d_rlhf.run.run import OPTIONS, Run, claim, next_free, recorded
from training.distributed import SINGLE, Ranks, leave

MODE = "circular-dpo"
RESULT = "result.json"


def read_run(folder: Path) -> tuple[CircularRun, dict]:
    """Settings of a run folder, as objects and as they were recorded. Raises: FileNotFoundError, ValueError for another folder."""
    record = recorded(folder)
    if not record:
        raise FileNotFoundError(f"--resume: expected a run folder with {OPTIONS}, got {folder}. Check the path.")
    if record.get("mode") != MODE:
        raise ValueError(f"--resume: expected a run of --mode={MODE}, got one of --mode=gan in {folder}. Leave --mode out.")
    return from_dict(CircularRun, record["run"], str(folder / OPTIONS)), record["run"]


def start(settings: CircularRun, outdir: Path, desc: str | None, device: str, workers: int, ranks: Ranks = SINGLE) -> Path:
    """A new run in `outdir`; returns its folder. Its problem is opened first, so that a mistake leaves no folder behind."""
    problem = settings.problem(device)
    if settings.stage is not None:
        stage_of(problem.pipeline, settings.stage)
    if settings.groups is not None and problem.final is None:
        raise ValueError("--ablate: expected a problem with a judge for the table, got one without. The toy has one.")
    folder = claim(next_free(outdir, settings.name + (f"-{desc}" if desc else "")), ranks)
    with Run(folder, {"mode": MODE, "run": asdict(settings), "problem": dict(problem.identity)}, ranks=ranks) as run:
        run.begin()
        return work(settings, problem, run, device, workers)


def resume(folder: Path, device: str, workers: int, ranks: Ranks = SINGLE) -> Path:
    """Go on with a run where it was; one that is finished is only written anew.

    Raises: ValueError for a folder of another kind, or where networks or pairs that it started from have changed.
    """
    settings, written = read_run(folder)
    problem = settings.problem(device)
    with Run(folder, {"mode": MODE, "run": written, "problem": dict(problem.identity)}, ranks=ranks) as run:
        run.resume()
        return work(settings, problem, run, device, workers)


def work(settings: CircularRun, problem: Problem, run: Run, device: str, workers: int) -> Path:
    """Do what is left to do of a run, and write its results."""
    started, folder = time.time(), run.folder
    if run.ranks.main:
        print(f"Run folder {folder}. Artefacts in {settings.artefacts}.", flush=True)
    if settings.groups is not None:
        ablate(settings, problem, folder, device, workers)
    else:
        _loop(settings, problem, run)
    if run.ranks.main:
        print(f"Done in {tqdm.format_interval(time.time() - started)}: {folder}", flush=True)
    return folder


# The loop, or one stage of it.


def _loop(settings: CircularRun, problem: Problem, run: Run) -> None:
    folder, ranks = run.folder, run.ranks
    loop = loop_of(settings, problem, settings.circular.seed, ranks, bars=ranks.main)
    if settings.stage is not None:
        tuned = loop.from_people(settings.stage)
        lineage: Lineage = {settings.stage: (tuned,)}
        steps = [{"round": 1, "step": "people", "stage": settings.stage, "artefact": tuned.folder.name, **tuned.record}]
    else:
        lineage, steps = circular_loop.run(loop, lambda step: say(describe(step)) if ranks.main else None)
    ranks.barrier()
    leave()  # the others need not wait for the table
    if not ranks.main:
        return
    weights = {stage: keep(loop, stage, line, folder) for stage, line in lineage.items()}
    result = {"steps": steps, "weights": weights, "warnings": [w for step in steps for w in step.get("warnings", [])]}
    run.write(RESULT, result)
    print(f"Weights in {', '.join(str(folder / name) for name in weights.values())}.")
    if settings.summary and problem.final is not None:
        _summarise(loop_of(settings, problem, settings.circular.seed, bars=True), lineage, steps, settings, folder)


def _summarise(loop: CircularLoop, lineage: Lineage, steps: Sequence[Mapping], run: CircularRun, folder: Path) -> None:
    """The finished generator, and that with the last stage alone tuned, against the base: a table of one training seed."""
    last = loop.problem.pipeline.stages[-1].name
    compared: dict[str, Lineage] = {"d": {last: lineage[last]}} if last in lineage else {}
    compared |= {"a": lineage} if len(lineage) > 1 else {"c": lineage} if last not in lineage else {}
    scores = {letter: [loop.judged(own, run.judging).record] for letter, own in {**compared, "i": {}}.items()}
    trained: dict[str, list[dict]] = {letter: [{}] for letter in scores}
    pairs = {step["stage"]: step for step in steps if step["step"] == "pairs"}
    known = {"training_seeds": [run.circular.seed], **run.facts(loop.problem)}
    data = table.table(scores, [run.circular.seed], trained, {str(run.circular.seed): pairs} if pairs else {}, known)
    table.write(data, folder, "summary")
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
