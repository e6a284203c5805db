"""A run of GRPO: arms trained with one seed or several, and judged on the same noises of held-out conditions.

    grpo       as the settings say
    dpo        DPO on pairs of as many samples of the untuned network, ordered by the same reward
    shuffled   GRPO with the rewards of every group shuffled: must do nothing
    inverted   GRPO with every reward turned over: must do harm

Each is trained from the same network and ends in a folder of weights. Where a problem has a chooser, arms keep the network of their best
win rate on the conditions to choose on, which are not the table's; the controls keep their last one, as it is what they are there to show.

    <arm>-<seed>/          a training, see train.py; its policy/, and done.json with its scores once it is judged
    <stage>/               the weights of GRPO's first seed
    grpo.json, grpo.md     the table

Shape letters: K training seeds, C conditions, S noises per condition.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import INTERVAL, Table, markdown_rows, of_seeds, with_interval, write
from eg3d_rlhf.models.policies import link, shared_copy, tuned_model
from eg3d_rlhf.models.sparse import separate, to_cpu
from eg3d_rlhf.tuning.flow.families import open_problem
from eg3d_rlhf.tuning.flow.generate import stage_latents
from eg3d_rlhf.tuning.flow.online.groups import Explorer, GrpoConfig, Task, train_online
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.problem import JUDGES, Choosing, Judging, Problem, ProblemSource, judged
from eg3d_rlhf.tuning.flow.reference import FrozenModel
from eg3d_rlhf.tuning.flow.stage import AssetReward, stage_of
from eg3d_rlhf.tuning.flow.train import POLICY, StageResult
from eg3d_rlhf.tuning.flow.train_pairs import Order, TrainConfig, train_stage
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

ARMS = {
    "grpo": "GRPO",
    "dpo": "DPO on as many samples, ordered by the reward",
    "shuffled": "GRPO, rewards shuffled within groups",
    "inverted": "GRPO, rewards inverted",
}
CONTROLS = ("shuffled", "inverted")


@dataclass(frozen=True, kw_only=True)
class Bench:
    problem: Problem
    task: Task
    grpo: GrpoConfig
    dpo: TrainConfig
    choosing: Choosing | None  # None: the last network is kept
    known: Mapping  # JSON that names the problem and the reward

    def train(self, arm: str, out: Path, ranks: Ranks = SINGLE, say: Callable[[str], None] = print) -> StageResult:
        """Train an arm in a folder, or go on with it there."""
        task, chooser = self.task, None
        if self.choosing is not None and arm not in CONTROLS:
            chooser = self.choosing.held_out(self.problem, task.stage.name, task.others, task.others, ranks)
        if arm == "dpo":
            pairs = ranked_pairs(task, self.grpo, self.dpo.seed)
            return train_stage(task.pipeline, task.stage.name, pairs, self.dpo, out, held_out=chooser, ranks=ranks, resume=True, say=say)
        config = self.grpo if arm == "grpo" else replace(self.grpo, use=arm)
        return train_online(task, config, out, {"problem": dict(self.known)}, held_out=chooser, ranks=ranks, resume=True, say=say)


def ranked_pairs(task: Task, config: GrpoConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """As many samples as GRPO draws, in groups of the same sizes, from the untuned network by its own sampler; in each group the best is
    paired with the worst, the second with the last but one, and so on. Pairs of equal rewards are left out.

    Args: batch: samples at once.
    """
    order, K = Order(task.conditions, config.batch, seed), config.group
    groups = [(condition, derive_seed("pairs", seed, step, number) % 2**31)
              for step in range(config.steps) for number, (_, condition) in enumerate(order.items(step))]
    several, pairs = max(1, batch // K), []
    for i in tqdm(range(0, len(groups), several), desc="samples for pairs", unit="batch", leave=False, disable=None):
        names, seeds = map(list, zip(*groups[i : i + several], strict=True))
        given = [places for places in task.given(names, seeds, batch) for _ in range(K)]
        wide = ([name for name in names for _ in range(K)], [seed for seed in seeds for _ in range(K)])
        draws = [derive_seed("sample", seed, k) for seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, wide[0], draws, given)
        rewards, kept = task.rewards(latents, *wide).view(-1, K), [to_cpu(latent) for latent in separate(latents)]
        for number, (name, scores) in enumerate(zip(names, rewards, strict=True)):
            best = scores.argsort(descending=True, stable=True).tolist()
            for k in range(K // 2):
                high, low = best[k], best[-1 - k]
                if scores[high] > scores[low]:
                    pairs.append(PreferencePair(
                        id=f"{i + number}-{k}", condition=name, stage=task.stage.name, preferred=kept[number * K + high],
                        rejected=kept[number * K + low], source="loop", reward_preferred=float(scores[high]),
                        reward_rejected=float(scores[low]),
                    ))  # fmt: skip
    return pairs


def drift(task: Task, model: torch.nn.Module, config: GrpoConfig, conditions: Sequence[str], seed: int) -> float:
    """Divergence of a tuned network's steps from the untuned one's, as `kl` in training, on two new samples of every condition."""
    explorer = Explorer(task=task, config=replace(config, group=2), policy=model, reference=FrozenModel(shared_copy(task.stage.model)))
    seeds = [derive_seed("drift", seed, condition) % 2**31 for condition in conditions]
    drawn, _ = explorer.draw(conditions, seeds, range(len(explorer.steps) - 1))
    return float(torch.cat([move.far for samples in drawn for move in samples.moves]).mean())


# Rewards by name: what a stage can be tuned for. A plugin (docs/extending.md) adds its own to `REWARDS`.

OWN = "own"
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {}  # by name: makes it for a problem, once in every process


def reward_of(name: str, problem: Problem) -> AssetReward:
    """The reward of that name for a problem; "own" is the problem's. Raises: ValueError naming those there are, or where it has none."""
    if name == OWN:
        if problem.reward is None:
            raise ValueError("--reward: expected the name of one, got none, and this generator brings none. Name the plugin's.")
        return problem.reward
    if name not in REWARDS:
        known = ", ".join((OWN, *REWARDS))
        raise ValueError(f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that brings it.")
    return REWARDS[name](problem)


# Settings of a run.

@dataclass(frozen=True, kw_only=True)
class OnlineSource(ProblemSource):
    """What a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class GrpoRun:
    grpo: GrpoConfig
    dpo: TrainConfig  # of the arms that train on pairs
    source: OnlineSource = OnlineSource()
    stage: str | None = None  # None: the last
    reward: str = OWN
    arms: tuple[str, ...] = ("grpo",)
    training_seeds: tuple[int, ...] = (0,)
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    judging: Judging = Judging()  # of the table that ends a run
    summary: bool = True  # end with it

    def __post_init__(self):
        odd = [arm for arm in self.arms if arm not in ARMS]
        if odd or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms: expected some of {', '.join(ARMS)}, each once, got {', '.join(self.arms) or 'none'}. Name them.")


# The table that ends it.


def table(results: Mapping[str, Mapping], arms: Sequence[str], seeds: Sequence[int], facts: Mapping) -> dict:
    """The whole table as JSON. Args: results: by task, see run.py; facts: what a reader of the file needs besides."""
    base = {name: np.array([values]) for name, values in results["base"]["scores"].items()}  # [1, C, S]
    arrays = {
        arm: {name: np.array([results[f"{arm}-{seed}"]["scores"][name] for seed in seeds]) for name in base} for arm in arms
    }  # [K, C, S]
    rates, rows = Table(scores=arrays, base=base, seeds=seeds), {}
    for arm, scores in arrays.items():
        trainings, judged = [results[f"{arm}-{seed}"] for seed in seeds], rates.against_base(arm)
        up = (scores["reward"].mean(2) > base["reward"].mean(2)).mean(1)  # [K], share of conditions
        rows[arm] = {
            "title": ARMS[arm], "samples": [training["samples"] for training in trainings],
            "kept_step": [training["kept_step"] for training in trainings],
            "reward": {
                "up": float(up.mean()), "up_seeds": up.tolist(), "mean": float(scores["reward"].mean()),
                "mean_seeds": scores["reward"].mean((1, 2)).tolist(), "base": float(base["reward"].mean()),
            },
            "judges": {name: judged[name] for name in JUDGES if name in judged},
            "kl": [training["kl"] for training in trainings], "warnings": [training["warnings"] for training in trainings],
        }
    judge = next(name for name in JUDGES if name in base)
    return {
        "arms": rows, "pairwise": rates.pairwise(judge), "judge": judge, **rates.sizes, "training_seeds": list(seeds),
        "interval": INTERVAL, **facts,
    }


def markdown(data: Mapping) -> str:
    judge, seeds = data["judge"], data["training_seeds"]
    by_seed = [f"seed {seed}" for seed in seeds]
    head = ["arm", "samples", "reward up on", "mean reward", f"{judge} judge, wins against base", *by_seed, "KL", "kept"]
    rows = []
    for arm in data["arms"].values():
        reward, won = arm["reward"], arm["judges"][judge]
        far = [value for value in arm["kl"] if value is not None]
        rows.append([
            arm["title"], arm["samples"][0] or "", f"{reward['up']:.0%} of conditions", f"{reward['mean']:+.3f} ({reward['base']:+.3f})",
            with_interval(won), *of_seeds(won), f"{np.mean(far):.2g}" if far else "",
            ", ".join(map(str, arm["kept_step"])),
        ])  # fmt: skip
    facts = (
        f"Stage {data['stage']}; {data['conditions']} held-out conditions x {data['noises']} noises x {len(seeds)} training seeds; ties "
        f"count half. Brackets: {data['interval']}. In brackets behind a mean reward the untuned network's. KL: of the steps from the "
        "untuned network's, mean over numbers, steps and samples."
    )
    lines = ["# GRPO against its base", "", facts, "", *markdown_rows(head, rows)]
    if data["pairwise"]:
        rows = []
        for name, rated in data["pairwise"].items():
            rows.append([*name.split("_vs_"), with_interval(rated), *of_seeds(rated)])
        lines += ["", f"## Pair by pair, {judge} judge", "", *markdown_rows(["arm", "against", "wins", *by_seed], rows)]
    return "\n".join(lines) + "\n"


# The run.

BASE = "base"


def bench_of(settings: GrpoRun, problem: Problem, seed: int) -> Bench:
    stage = stage_of(problem.pipeline, settings.stage or problem.pipeline.stages[-1].name)
    reward = reward_of(settings.reward, problem)
    task = Task(pipeline=problem.pipeline, stage=stage, reward=reward, conditions=problem.train_conditions)
    return Bench(
        problem=replace(problem, reward=reward), task=task, grpo=settings.grpo.at(stage, seed), dpo=settings.dpo.at(stage, seed),
        choosing=settings.choosing, known={**problem.identity, "reward": settings.reward},
    )


def work(settings: GrpoRun, problem: Problem, run: Run) -> None:
    """Do what is left to do of a run, and write its results."""
    folder, ranks = run.folder, run.ranks
    settings = replace(settings, summary=settings.summary and bool(problem.held_out_conditions))
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if len(tasks) == 1:
        results = {tasks[0]: Worker(settings, folder, problem, ranks)(tasks[0])}
        if ranks.main and settings.summary:
            results[BASE] = Worker(settings, folder, problem)(BASE)
    else:
        needs: Mapping[str, list[str]] = {name: [] for name in ([BASE] if settings.summary else []) + tasks}
        print(f"{len(needs)} tasks on {run.jobs} processes; what several print is in {folder / 'logs'}.", flush=True)
        with tqdm(total=len(needs), desc="arms", unit="task", dynamic_ncols=True) as bar:
            arguments = (settings, folder, run.device, run.jobs == 1)
            expected = (ValueError, OSError, StoppedError)
            results = run_tasks(needs, worker_of, arguments, run.jobs, folder / "logs", lambda name, result: bar.update(), expected)
    if not ranks.main:
        return
    stage = bench_of(settings, problem, settings.training_seeds[0]).task.stage.name
    if "grpo" in settings.arms:
        source = folder / f"grpo-{settings.training_seeds[0]}" / POLICY
        for file in sorted(source.iterdir()):
            link(file, folder / stage / file.name)
        print(f"Weights in {folder / stage}.")
    if settings.summary:
        facts = {"stage": stage, "problem": dict(problem.identity), "run": asdict(settings), "versions": versions()}
        data = table(results, settings.arms, settings.training_seeds, facts)
        for path in write(data, folder, "grpo", markdown):
            print(f"Written: {path}")
        print(markdown(data))
    run.done()


@dataclass
class Worker:
    """Does tasks, "<arm>-<seed>" or "base", and returns their results as JSON; what is done already is read."""

    settings: GrpoRun
    folder: Path
    problem: Problem
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write

    def __call__(self, task: str) -> dict:
        settings, (arm, _, seed) = self.settings, task.rpartition("-")
        bench = bench_of(settings, self.problem, int(seed) if arm else settings.training_seeds[0])
        inputs = {
            "task": task, "problem": bench.known, "grpo": asdict(bench.grpo), "dpo": asdict(bench.dpo),
            "choosing": None if bench.choosing is None else asdict(bench.choosing), "judging": asdict(settings.judging),
            "summary": settings.summary,
        }  # fmt: skip

        def maker(folder: Path) -> tuple[list[Path], dict]:
            result = self._trained(arm, bench, folder) if arm else {"models": {}}
            models = result.pop("models")
            if self.ranks.main and settings.summary:
                result["scores"] = judged(bench.problem, models, settings.judging)["scores"]
            return [folder / POLICY] if arm else [], result

        return dict(Store(self.folder, self.ranks, hashed=False).make(task, inputs, maker).record)

    def _trained(self, arm: str, bench: Bench, folder: Path) -> dict:
        stage = bench.task.stage
        done = bench.train(arm, folder, self.ranks, self.say)
        model = tuned_model(stage.model, done.weights)
        planned = bench.grpo.steps * bench.grpo.batch * bench.grpo.group
        drawn = planned if arm == "dpo" else sum(line.get("samples", 0) for line in done.stats)
        held = list(bench.problem.held_out_conditions)
        far = drift(bench.task, model, bench.grpo, held, self.settings.judging.seed) if held and self.ranks.main else None
        return {
            "models": {stage.name: model}, "kept_step": done.kept_step, "warnings": done.warnings, "samples": drawn, "kl": far,
            "win_rates": [[line["step"], line["win_rate"]] for line in done.stats if "win_rate" in line],
        }


def worker_of(settings: GrpoRun, folder: Path, device: str, alone: bool) -> Worker:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open_problem(settings.source, device))
