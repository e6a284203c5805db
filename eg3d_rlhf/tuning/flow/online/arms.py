"""A run of online tuning: arms trained with one seed or several, and judged on the same noises of held-out conditions.

    nft, grpo, grpo-guard, dppo, dgpo      by that loss, as the run's settings have it
    grpo-plain      GRPO with noise at every step of the sampler, and deviations of groups
    dpo             DPO on pairs of as many samples of the untuned network, ordered by the same reward
    <arm>-shuffled  with the rewards of every group shuffled: must do nothing
    <arm>-inverted  with every reward turned over: must do harm

Each is trained from the same network and ends in a folder of weights. Where a problem has a chooser, arms keep the network of their best
win rate on the conditions to choose on, which are not the table's; the controls keep their last one, as it is what they are there to show.

What a run writes: see arms.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.models.policies import shared_copy, tuned_model
from eg3d_rlhf.models.sparse import separate, to_cpu
from eg3d_rlhf.tuning.flow.arms import finish_arms, train_arms
from eg3d_rlhf.tuning.flow.families import open_problem
from eg3d_rlhf.tuning.flow.generate import generate, stage_latents, voxels_for
from eg3d_rlhf.tuning.flow.latent_reward import LatentReward, load, taught_by
from eg3d_rlhf.tuning.flow.online.advantages import as_used
from eg3d_rlhf.tuning.flow.online.config import OnlineConfig
from eg3d_rlhf.tuning.flow.online.draws import Explorer, Task
from eg3d_rlhf.tuning.flow.online.solid import solid_reward
from eg3d_rlhf.tuning.flow.online.table import markdown, table
from eg3d_rlhf.tuning.flow.online.updates import train_online
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.problem import Choosing, Judging, Problem, ProblemSource, judged
from eg3d_rlhf.tuning.flow.reference import FrozenModel
from eg3d_rlhf.tuning.flow.stage import AssetReward, FlowStage, Voxels, stage_of
from eg3d_rlhf.tuning.flow.train import POLICY, StageResult
from eg3d_rlhf.tuning.flow.train_pairs import Order, TrainConfig, train_stage
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

DPO = "dpo"
CONTROLS = ("shuffled", "inverted")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of each arm that draws samples."""

    nft: OnlineConfig
    grpo: OnlineConfig
    grpo_plain: OnlineConfig
    grpo_guard: OnlineConfig
    dppo: OnlineConfig
    dgpo: OnlineConfig

    def of(self, arm: str) -> OnlineConfig:
        return getattr(self, arm.replace("-", "_"))


KINDS = (*(field.name.replace("_", "-") for field in fields(Losses)), DPO)
ARMS = tuple(name for kind in KINDS for name in (kind, *(f"{kind}-{use}" for use in CONTROLS)))


def divided(arm: str) -> tuple[str, str]:
    """Kind and use of the rewards of an arm.

    >>> divided("grpo-guard-shuffled"), divided("dpo")
    (('grpo-guard', 'shuffled'), ('dpo', 'reward'))
    """
    kind, _, use = arm.rpartition("-")
    return (kind, use) if use in CONTROLS else (arm, "reward")


@dataclass(frozen=True, kw_only=True)
class Bench:
    problem: Problem
    task: Task
    losses: Losses
    dpo: TrainConfig
    choosing: Choosing | None  # None: the last network is kept
    known: Mapping  # JSON that names the problem and the rewards

    def config(self, arm: str) -> OnlineConfig:
        """Of an arm; of DPO those that say how many samples it may have."""
        kind, use = divided(arm)
        return replace(self.losses.grpo_plain if kind == DPO else self.losses.of(kind), use=use)

    def check_gate(self) -> None:
        """Raises: ValueError for a name of --gate that is not watched."""
        known = self.watched()
        for name in self.task.gate:
            if name not in known:
                raise ValueError(f"--gate: expected some of {', '.join(known) or 'none here'}, got {name!r}. Name what is not trained on.")

    def watched(self) -> list[str]:
        """Names of the rewards that are watched: of one asset of the untuned network."""
        if self.task.watched is None or not self.task.gate:
            return []
        condition = self.task.conditions[0]
        assets = generate(self.problem.pipeline, [condition], [0], self.task.others)
        return list(self.task.watched(assets, [condition]))

    def train(self, arm: str, out: Path, ranks: Ranks = SINGLE, say: Callable[[str], None] = print) -> StageResult:
        """Train an arm in a folder, or go on with it there."""
        task, chooser, (kind, use) = self.task, None, divided(arm)
        if self.choosing is not None and use == "reward":
            chooser = self.choosing.held_out(self.problem, task.stage.name, task.others, task.others, ranks)
        if kind == DPO:
            pairs = ranked_pairs(task, self.config(arm), self.dpo.seed)
            return train_stage(task.pipeline, task.stage.name, pairs, self.dpo, out, held_out=chooser, ranks=ranks, resume=True, say=say)
        known = {"problem": dict(self.known)}
        return train_online(task, self.config(arm), out, known, held_out=chooser, ranks=ranks, resume=True, say=say)


def ranked_pairs(task: Task, config: OnlineConfig, seed: int, batch: int = 64) -> list[PreferencePair]:
    """As many samples as an online arm draws, in groups of the same sizes, from the untuned network by its own sampler; in each group the
    best is paired with the worst, the second with the last but one, and so on. Pairs of equal rewards are left out.

    Args: batch: samples at once.
    """
    order, K = Order(task.conditions, config.batch, seed), config.group
    groups = [(condition, derive_seed("pairs", seed, step, number) % 2**31)
              for step in range(config.steps) for number, (_, condition) in enumerate(order.items(step))]
    several, pairs, weights = max(1, batch // K), [], torch.tensor(task.weights)[:, None]
    for i in tqdm(range(0, len(groups), several), desc="samples for pairs", unit="batch", leave=False, disable=None):
        names, seeds = map(list, zip(*groups[i : i + several], strict=True))
        given = [places for places in task.given(names, seeds, batch) for _ in range(K)]
        wide = ([name for name in names for _ in range(K)], [seed for seed in seeds for _ in range(K)])
        draws = [derive_seed("sample", seed, k) for seed in seeds for k in range(K)]
        latents = stage_latents(task.pipeline, task.stage, wide[0], draws, given)
        total = (weights * task.scores(latents, *wide)[0]).sum(0).view(-1, K)
        rewards, kept = as_used(total, config.use, seeds), [to_cpu(latent) for latent in separate(latents)]
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


def drift(task: Task, model: torch.nn.Module, config: OnlineConfig, conditions: Sequence[str], seed: int) -> float:
    """Divergence of a tuned network's steps from the untuned one's on two new samples of every third condition: of one sampler for all
    losses, whose steps all draw noise in closed form."""
    same = replace(config, loss="grpo", group=2, window=None, trained_steps=None, sde_step="exact", noise=0.7)
    explorer = Explorer(task=task, config=same, policy=model, reference=FrozenModel(shared_copy(task.stage.model)))
    conditions = conditions[::3]
    seeds = [derive_seed("drift", seed, condition) % 2**31 for condition in conditions]
    every = range(len(explorer.steps) - 1)
    return float(torch.cat([move.far for samples in explorer.draw(conditions, seeds, every, every) for move in samples.moves]).mean())


# Rewards by name: what a stage can be tuned for. A plugin (docs/extending.md) adds its own to `REWARDS`.

OWN, CHOOSER = "own", "chooser"
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {"solid": solid_reward}  # by name: makes it, once in a process


LATENT = "latent"  # reads the stage's latents, and is taught by the problem's pairs of it; or the file of such a one


def reward_of(name: str, problem: Problem, stage: FlowStage | None = None) -> AssetReward:
    """The reward of that name for a problem; "own" is the problem's, "latent" that of a stage.

    Raises: ValueError naming those there are, or where it has none.
    """
    if name == OWN:
        if problem.reward is None:
            raise ValueError("--reward: expected the name of one, got none, and this generator brings none. Name the plugin's.")
        return problem.reward
    if stage is not None and name == LATENT:
        return taught_by(problem, stage.name)
    if stage is not None and name.endswith(".safetensors"):
        return load(Path(name), problem.pipeline, stage, problem.train_conditions[0])
    if name not in REWARDS:
        known = ", ".join((OWN, LATENT, *REWARDS))
        raise ValueError(f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that brings it.")
    return REWARDS[name](problem)


def weighed(text: str) -> dict[str, float]:
    """Weights by name. Raises: ValueError for what is none.

    >>> weighed("own,solid:0.5")
    {'own': 1.0, 'solid': 0.5}
    """
    found = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            found[name] = float(weight) if colon else 1.0
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise ValueError(f"--reward: expected names with commas, each with :WEIGHT above 0 or without, got {text!r}. Correct it.")
    return found


def watch_of(problem: Problem, trained: Sequence[str]) -> Callable[[Sequence, Sequence[str]], dict[str, torch.Tensor]]:
    """Scores of a problem that nothing is trained on, by name; its final judge is kept for the table."""

    def watch(assets: Sequence, conditions: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        if problem.reward is not None and OWN not in trained:
            found[OWN] = problem.reward(assets, conditions)
        if problem.chooser is not None:
            found[CHOOSER] = problem.chooser(assets, conditions)
        measures = problem.measures or problem.parts
        return found | dict(measures(assets, conditions) if measures is not None else {})

    return watch


# Settings of a run.


@dataclass(frozen=True, kw_only=True)
class OnlineSource(ProblemSource):
    """What a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class OnlineRun:
    losses: Losses
    dpo: TrainConfig  # of the arm that trains on pairs
    source: OnlineSource = OnlineSource()
    stage: str | None = None  # None: the last
    reward: str = OWN  # names, with weights
    gate: str | None = None  # names of watched rewards
    arms: tuple[str, ...] = ("nft",)
    training_seeds: tuple[int, ...] = (0,)
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    judging: Judging = Judging()  # of the table that ends a run
    summary: bool = True  # end with it

    def __post_init__(self):
        weighed(self.reward)
        if any(arm not in ARMS for arm in self.arms) or not self.arms or len(set(self.arms)) < len(self.arms):
            known = f"{', '.join(KINDS)}, or one with -{' or -'.join(CONTROLS)}"
            raise ValueError(f"--arms: expected some of {known}, each once, got {', '.join(self.arms) or 'none'}. Name them.")


# The run.


def bench_of(settings: OnlineRun, problem: Problem, seed: int) -> Bench:
    stage = stage_of(problem.pipeline, settings.stage or problem.pipeline.stages[-1].name)
    weights = weighed(settings.reward)
    rewards = {name: reward_of(name, problem, stage) for name in weights}
    latent = all(isinstance(reward, LatentReward) for reward in rewards.values()) and not settings.gate  # nothing is decoded
    gate = tuple(name.strip() for name in settings.gate.split(",")) if settings.gate else ()
    task = Task(
        pipeline=problem.pipeline, stage=stage, rewards=rewards, weights=tuple(weights.values()), conditions=problem.train_conditions,
        watched=None if latent else watch_of(problem, list(weights)), gate=gate,
    )  # fmt: skip

    def total(assets: Sequence, conditions: Sequence[str]) -> torch.Tensor:
        scores = [weights[name] * reward(assets, conditions) for name, reward in rewards.items()]
        return torch.stack(scores).sum(0)

    losses = replace(settings.losses, **{field.name: getattr(settings.losses, field.name).at(stage, seed) for field in fields(Losses)})
    return Bench(
        problem=replace(problem, reward=total, parts=problem.measures or problem.parts), task=task, losses=losses,
        dpo=settings.dpo.at(stage, seed), choosing=settings.choosing, known={**problem.identity, "reward": settings.reward},
    )  # fmt: skip


def work(settings: OnlineRun, problem: Problem, run: Run) -> None:
    """Do what is left to do of a run, and write its results."""
    settings = replace(settings, summary=settings.summary and bool(problem.held_out_conditions))
    results = train_arms(settings, run, lambda ranks: Worker(settings, run.folder, problem, ranks), worker_of)
    if run.ranks.main:
        stage = bench_of(settings, problem, settings.training_seeds[0]).task.stage.name
        controls = [arm for arm in settings.arms if divided(arm)[1] != "reward"]
        finish_arms(settings, run, stage, problem.identity, "online",
                    lambda facts: table(results, settings.arms, settings.training_seeds, facts, controls), markdown)


@dataclass
class Worker:
    """Does tasks, "<arm>-<seed>" or "base", and returns their results as JSON; what is done already is read."""

    settings: OnlineRun
    folder: Path
    problem: Problem
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write
    left: list[Voxels] | None = None

    def __call__(self, task: str) -> dict:
        settings, (arm, _, seed) = self.settings, task.rpartition("-")
        bench = bench_of(settings, self.problem, int(seed) if arm else settings.training_seeds[0])
        inputs = {
            "task": task, "problem": bench.known, "losses": asdict(bench.losses), "dpo": asdict(bench.dpo), "gate": list(bench.task.gate),
            "choosing": None if bench.choosing is None else asdict(bench.choosing), "judging": asdict(settings.judging),
            "summary": settings.summary,
        }  # fmt: skip

        def maker(folder: Path) -> tuple[list[Path], dict]:
            result = self._trained(arm, bench, folder) if arm else {"models": {}}
            models = result.pop("models")
            if self.ranks.main and settings.summary:
                result["scores"] = judged(bench.problem, models, settings.judging, given=self._given(bench))["scores"]
            return [folder / POLICY] if arm else [], result

        return dict(Store(self.folder, self.ranks, hashed=False).make(task, inputs, maker).record)

    def _given(self, bench: Bench) -> Mapping[str, Sequence[Voxels]]:
        """What the stages before leave to the stage that is tuned: the same for all arms, and drawn once in a process."""
        name = bench.task.stage.name
        if name == bench.problem.pipeline.stages[0].name:
            return {}
        if self.left is None:
            conditions, seeds = self.settings.judging.crossed(bench.problem)
            self.left = voxels_for(bench.problem.pipeline, name, conditions, seeds, None, self.settings.judging.batch)
        return {name: self.left}

    def _trained(self, arm: str, bench: Bench, folder: Path) -> dict:
        stage = bench.task.stage
        done = bench.train(arm, folder, self.ranks, self.say)
        model = tuned_model(stage.model, done.weights)
        config = bench.config(arm)
        planned = config.steps * config.batch * config.group
        drawn = planned if divided(arm)[0] == DPO else sum(line.get("samples", 0) for line in done.stats)
        held = list(bench.problem.held_out_conditions)
        far = drift(bench.task, model, config, held, self.settings.judging.seed) if held and self.ranks.main else None
        return {
            "models": {stage.name: model}, "kept_step": done.kept_step, "warnings": done.warnings, "samples": drawn, "kl": far,
            "win_rates": [[line["step"], line["win_rate"]] for line in done.stats if "win_rate" in line],
        }


def worker_of(settings: OnlineRun, folder: Path, device: str, alone: bool) -> Worker:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open_problem(settings.source, device))
