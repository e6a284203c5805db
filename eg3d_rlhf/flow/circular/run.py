"""A run of Circular-DPO from its settings to its folder: the loop, one stage alone, or the ablation."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from eg3d_rlhf import run_folder
from eg3d_rlhf.cli import versions
from eg3d_rlhf.flow.circular import loop as circular_loop
from eg3d_rlhf.flow.circular import table
from eg3d_rlhf.flow.circular.ablation import ablate
from eg3d_rlhf.flow.circular.artefacts import Artefact, fingerprint
from eg3d_rlhf.flow.circular.loop import CircularLoop, Lineage, loop_of, say, weights_of
from eg3d_rlhf.flow.circular.settings import CircularRun, from_dict
from eg3d_rlhf.flow.policies import save_policy
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.stage import stage_of
from training.distributed import SINGLE, Ranks, launch_identity, leave
from training.run_lock import RunLock
from training.storage import write_atomic


def read_run(folder: Path) -> tuple[CircularRun, dict]:
    """Settings and problem's identity of a run folder."""
    path = folder / run_folder.OPTIONS
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"--resume: expected a run folder with {run_folder.OPTIONS}, got {folder}. Check the path.") from None
    except ValueError:
        raise ValueError(f"--resume: expected {path} as it was written, got damaged JSON. Restore it.") from None
    if record.get("mode") != "circular-dpo":
        raise ValueError(f"--resume: expected a run of --mode=circular-dpo, got one of --mode=gan in {folder}. Leave --mode out.")
    return from_dict(CircularRun, record["run"], str(path)), record["problem"]


def check(run: CircularRun, problem: Problem) -> None:
    """What only the problem can judge. Raises: ValueError naming the flag."""
    if run.stage is not None:
        stage_of(problem.pipeline, run.stage)
    if run.groups is not None and problem.final is None:
        raise ValueError("--ablate: expected a problem with a judge for the table, got one without. The toy has one.")


def planned(run: CircularRun) -> dict:
    """What `--dry-run` prints."""
    values = asdict(run)
    return {**values, "tasks": run.plan.tasks()} if run.groups is not None else values


RESULT = "result.json"


def start(run: CircularRun, outdir: Path, desc: str | None, device: str, workers: int, ranks: Ranks = SINGLE) -> Path:
    """A new run in `outdir`; returns its folder. Its problem is opened first, so that a mistake leaves no folder behind."""
    problem = run.problem(device)
    check(run, problem)
    folder = run_folder.next_free(outdir, run.name + (f"-{desc}" if desc else ""))
    folder = Path(ranks.broadcast(str(run_folder.claim(folder, launch_identity())) if ranks.main else None))
    if ranks.main:
        record = {"mode": "circular-dpo", "run": asdict(run), "problem": dict(problem.identity), "versions": versions()}
        record["launch"] = launch_identity()
        write_atomic(folder / run_folder.OPTIONS, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return work(run, problem, folder, device, workers, ranks)


def resume(folder: Path, device: str, workers: int, ranks: Ranks = SINGLE) -> Path:
    """Go on with a run where it was; one that is finished is only written anew.

    Raises: ValueError for a folder of another kind, or where files that it started from have changed.
    """
    run, identity = read_run(folder)
    problem = run.problem(device)
    if fingerprint(problem.identity) != fingerprint(identity):
        raise ValueError(
            f"--resume: expected the networks and pairs that {folder} started from, got others. Restore them, or start a new run: what "
            "does not depend on them is found again."
        )
    return work(run, problem, folder, device, workers, ranks)


def work(run: CircularRun, problem: Problem, folder: Path, device: str, workers: int, ranks: Ranks) -> Path:
    """Do what is left to do of a run, and write its results."""
    started = time.time()
    with RunLock(folder, enabled=ranks.main):
        if ranks.main:
            print(f"Run folder {folder}. Artefacts in {run.artefacts}.", flush=True)
        if run.groups is not None:
            ablate(run, problem, folder, device, workers)
        else:
            _loop(run, problem, folder, ranks)
    if ranks.main:
        print(f"Done in {(time.time() - started) / 60:.1f} minutes: {folder}", flush=True)
    return folder


# The loop, or one stage of it.


def _loop(run: CircularRun, problem: Problem, folder: Path, ranks: Ranks) -> None:
    with Bars(enabled=ranks.main) as bars:
        loop = loop_of(run, problem, run.circular.seed, ranks, progress=bars)
        if run.stage is not None:
            tuned = loop.from_people(run.stage)
            lineage = {run.stage: (tuned,)}
            steps = [{"round": 1, "step": "people", "stage": run.stage, "artefact": tuned.folder.name, **tuned.record}]
        else:
            lineage, steps = circular_loop.run(loop, lambda step: say(describe(step)) if ranks.main else None)
    ranks.barrier()
    leave()  # the others need not wait for the table
    if not ranks.main:
        return
    weights = {stage: keep(loop, stage, line, folder) for stage, line in lineage.items()}
    result = {"steps": steps, "weights": weights, "warnings": [w for step in steps for w in step.get("warnings", [])]}
    write_atomic(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"Weights in {', '.join(str(folder / name) for name in weights.values())}.")
    if run.summary and problem.final is not None:
        with Bars(enabled=True) as bars:
            _summarise(loop_of(run, problem, run.circular.seed, progress=bars), lineage, steps, run, folder)


def _summarise(loop: CircularLoop, lineage: Lineage, steps: Sequence[Mapping], run: CircularRun, folder: Path) -> None:
    """The finished generator, and that with the last stage alone tuned, against the base: a table of one training seed."""
    last = loop.problem.pipeline.stages[-1].name
    compared = {"d": {last: lineage[last]}} if last in lineage else {}
    compared |= {"a": lineage} if len(lineage) > 1 else {"c": lineage} if last not in lineage else {}
    scores = {letter: [loop.judged(own, run.judging).record] for letter, own in {**compared, "i": {}}.items()}
    trained = {letter: [{}] for letter in scores}
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
        _link(file, target / file.relative_to(source))
    return stage


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


class Bars:
    """Progress bars by title; called as CircularLoop.progress."""

    def __init__(self, enabled: bool):
        self._enabled, self._open = enabled, None

    def __call__(self, title: str, total: int) -> Callable[[int], None]:
        """A new bar in place of the last."""
        self.close()
        self._open = tqdm(total=total, desc=title, dynamic_ncols=True, disable=not self._enabled)
        return self._open.update

    def close(self) -> None:
        """End the last bar."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
