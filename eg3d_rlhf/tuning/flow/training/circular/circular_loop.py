"""Circular-DPO: preferences on finished assets reach every stage of a generator, from the last to the first.

    1. the last stage learns from people's pairs (DPO; Circular-DPO, equation 8);
    2. what it then samples and what its reference samples, decoded and encoded again, are pairs of the stage
       before (loop_pairs.py);
    3. that stage learns from them (equation 9), filtered by w1 and weighed by w2; and so on to the first
       stage.
Every step is an artefact (experiments/store.py): a run that was killed goes on where it was, and runs share
what they have in common. A further round does the same again, with the networks of the round before as start
and as reference, and with noises of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.store import Artefact, Store
from eg3d_rlhf.models.policies import save_policy, tuned_model
from eg3d_rlhf.tuning.flow.base.evaluation import evaluate
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, read_pairs
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import Evaluation
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import (
    LoopPairMaker,
    NoPairsError,
    make_in_chunks,
    stage_behind,
    used,
    weighed,
)
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    PAIRS,
    REGULARISER,
    WINNERS,
    CircularSettings,
    Weighing,
)
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import ACCURACY, FREE
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

# per stage the trainings behind its network, oldest first; a missing stage is the base's
Lineage = Mapping[str, tuple[Artefact, ...]]


NO_BETA = 1e-6  # the preference term of a loss with a gradient of nothing beside its anchor's


@dataclass(kw_only=True)
class CircularLoop:
    """The steps of a run. Each makes an artefact, or finds it."""

    problem: Problem
    settings: CircularSettings
    store: Store
    ranks: Ranks = SINGLE
    use: str = PAIRS  # what stages learn of the loop's pairs, one of USES
    bars: bool = False  # show progress bars
    say: Callable[[str], None] = print  # status lineage and warnings of trainings
    _models: dict = field(default_factory=dict, repr=False)  # networks by what they were made from

    def of_round(self, number: int) -> "CircularLoop":
        """The same steps with the noises, orders and adapters of a round; the first round's are those of the
        run's seed itself.
        """
        if number == 1:
            return self
        seed = derive_seed("round", self.settings.seed, number) % 2**31
        return replace(self, settings=replace(self.settings, seed=seed))

    # What the problem has of a stage.

    @property
    def names(self) -> list[str]:
        """Names of the stages, in order."""
        return [stage.name for stage in self.problem.pipeline.stages]

    def stage(self, name: str) -> ConditionedStage:
        """Return the stage of a name."""
        return ConditionedStage.from_pipeline(self.problem.pipeline, name)

    def people(self, stage: str) -> Sequence[PreferencePair]:
        """Return people's pairs of a stage."""
        return self.problem.train_pairs[stage]

    # Networks.

    def models(self, lineage: Lineage) -> dict[str, torch.nn.Module]:
        return {stage: self._model(stage, line) for stage, line in lineage.items() if line}

    def _model(self, stage: str, line: tuple[Artefact, ...]) -> torch.nn.Module:
        key = (stage, *(one.content for one in line))
        if key not in self._models:
            base = self._model(stage, line[:-1]) if len(line) > 1 else self.stage(stage).stage.model
            self._models[key] = tuned_model(base, weights_of(line[-1]), merge=True)
        return self._models[key]

    def _named(self, lineage: Lineage) -> dict[str, list[str]]:
        return {stage: [one.content for one in line] for stage, line in sorted(lineage.items()) if line}

    # Steps.

    def from_people(self, stage: str, lineage: Lineage | None = None, supervised: bool = False) -> Artefact:
        """Train a stage on people's pairs, from the networks of `lineage`."""
        config = self.settings.sft if supervised else self.settings.human
        lineage = lineage or {}
        what = "fine-tuning on the preferred" if supervised else "DPO on people's pairs"
        return self._train(
            stage, lineage, config, {"source": "human"}, lambda: (self.people(stage), {}), what
        )

    def pairs(self, stage: str, lineage: Lineage, before: Lineage | None = None) -> Artefact:
        """Pairs of a stage from what `lineage` made of the stage behind it; `before`: its reference."""
        before = before or {}
        seed = self.settings.seed
        behind = stage_behind(self.names, stage)
        references = {behind: before[behind]} if before.get(behind) else {}
        inputs = {
            "step": "loop pairs",
            "problem": self.problem.identity,
            "stage": stage,
            "seed": seed,
            "config": {"per_pair": self.settings.loop_pairs.per_pair},
            # "op" and "un_op" stand in the hash, as in version 0.1
            "op": self._named({k: v for k, v in lineage.items() if k != stage}),
            "un_op": self._named(references),
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            human = self.people(stage)
            make = LoopPairMaker.from_problem(
                self.problem,
                self.models(lineage),
                self.settings.loop_pairs,
                seed,
                stage=stage,
                reference_models=self.models(references),
            )
            with self._bar(f"pairs for {stage}", -(-len(human) // self.ranks.world)) as bar:
                place, figures = make_in_chunks(folder, make, human, ranks=self.ranks, on_pair=bar.update)
            return [place], figures

        title = f"pairs for stage {stage!r} out of stage {behind!r}"
        made = self.store.make("pairs", inputs, maker, title)
        return replace(made, record=version_0_1.loop_pairs(made.record))

    def from_loop(
        self,
        stage: str,
        pairs: Artefact,
        lineage: Lineage,
        weighing: Weighing | None = None,
        use: str | None = None,
    ) -> Artefact:
        """Train a stage on the loop's pairs, from the networks of `lineage`; use: what of them, in place of
        the loop's own.
        """
        weighing = weighing or self.settings.weighing
        config = self.settings.loop
        use = use or self.use
        source = {"source": "loop", "pairs": pairs.content, "weighing": asdict(weighing)}
        if use == REGULARISER:
            config = replace(config, dpo=replace(config.dpo, kind="sigmoid", beta=NO_BETA))
        elif use == WINNERS:
            config = replace(config, dpo=self.settings.sft.dpo)
        elif use != PAIRS:
            source["use"] = version_0_1.former_use(use)

        def read() -> tuple[list[PreferencePair], dict]:
            kept, report = weighed(read_pairs(pairs.folder / "pairs", stage)[0], weighing)
            return used(kept, use, self.settings.seed, self.people(stage)), report

        return self._train(
            stage,
            lineage,
            config,
            source,
            read,
            "DPO on the loop's pairs" if use == PAIRS else f"the loop's pairs: {use}",
        )

    def _train(
        self,
        stage: str,
        lineage: Lineage,
        config: TrainConfig,
        source: Mapping,
        read: Callable[[], tuple[Sequence[PreferencePair], Mapping]],
        what: str,
    ) -> Artefact:
        conditioned = self.stage(stage)
        config = config.at(conditioned.stage, self.settings.seed)
        choosing = self.settings.choosing if self.problem.chooser is not None else None
        inputs = {
            "step": "train",
            "problem": self.problem.identity,
            "stage": stage,
            "networks": self._named(lineage),
            "pairs": source,
            "config": {k: v for k, v in asdict(config).items() if k not in FREE},
            "choosing": None if choosing is None else asdict(choosing),
            "unseen": self.problem.unseen_pairs is not None,
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            pairs, report = read()
            models = self.models(lineage)
            # the networks that this starts from, all other stages alike
            others = {k: v for k, v in models.items() if k != stage}
            held_out = (
                None
                if choosing is None
                else choosing.held_out(self.problem, stage, others, dict(models), self.ranks)
            )
            result = train_stage(
                conditioned.with_model(models.get(stage)),
                pairs,
                config,
                folder / "training",
                held_out=held_out,
                unseen=self.problem.choosing_pairs(stage),
                ranks=self.ranks,
                resume=True,
                say=self.say,
            )
            last = next((line for line in reversed(result.stats) if line.get("pairs")), None)
            return [result.weights], {
                "weights": result.weights.relative_to(folder).as_posix(),
                **result.record(),
                "held_out_accuracies": result.measured(ACCURACY),
                "last": last,
                "pairs": len(pairs),
                "weighing": report,
            }

        return self.store.make(f"{stage}-{source['source']}", inputs, maker, f"stage {stage!r}, {what}")

    def _bar(self, title: str, total: int) -> tqdm:
        return tqdm(total=total, desc=title, dynamic_ncols=True, disable=not self.bars)

    def evaluate(self, lineage: Lineage, evaluation: Evaluation) -> Artefact:
        """Score the held-out conditions' assets by every evaluator; the record holds the scores."""
        inputs = {
            "step": "judge",
            "problem": self.problem.identity,
            "networks": self._named(lineage),
            "judging": asdict(evaluation),
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            del folder
            with self._bar(
                "evaluation", evaluation.per_condition * len(self.problem.held_out_conditions)
            ) as bar:
                return [], evaluate(self.problem, self.models(lineage), evaluation, bar.update, spreads=True)

        names = ", ".join(k for k, v in lineage.items() if v) or "none"
        return self.store.make("scores", inputs, maker, f"scores of the generator with tuned stages: {names}")


def check(problem: Problem) -> None:
    """Raise ValueError for a problem that no loop can be run on."""
    stages = [stage.name for stage in problem.pipeline.stages]
    if len(stages) < 2:
        remedy = f"One stage needs no loop: --stage={stages[0]}."
        raise ValueError(
            f"circular: expected a pipeline of two stages or more, got {', '.join(stages)}. {remedy}"
        )
    if problem.reward is None:
        raise ValueError(
            "circular: expected a reward for the loop's assets, got none of this generator. Train its stages"
            " alone: --stage."
        )


def run_loop(
    loop: CircularLoop, on_step: Callable[[dict], None] = lambda step: None
) -> tuple[Lineage, list[dict]]:
    """The whole loop, `settings.rounds` times. Returns the networks behind every stage, and a description of
    each step.

    A round in which nothing crosses a gap ends the loop: the first with the stages that it has tuned, a later
    one with the networks of the one before.
    """
    stages = loop.names
    lineage: dict[str, tuple[Artefact, ...]] = {}
    steps: list[dict] = []

    def done(number: int, kind: str, stage: str, artefact: Artefact) -> Artefact:
        steps.append(
            {
                "round": number,
                "step": kind,
                "stage": stage,
                "artefact": artefact.folder.name,
                **artefact.record,
            }
        )
        on_step(steps[-1])
        return artefact

    for number in range(1, loop.settings.rounds + 1):
        before = dict(lineage)
        own = loop.of_round(number)
        tuned = done(number, "people", stages[-1], own.from_people(stages[-1], before))
        lineage[stages[-1]] = (*before.get(stages[-1], ()), tuned)
        try:
            for stage in reversed(stages[:-1]):
                pairs = done(number, "pairs", stage, own.pairs(stage, lineage, before))
                tuned = done(number, "loop", stage, own.from_loop(stage, pairs, lineage))
                lineage[stage] = (*before.get(stage, ()), tuned)
        except NoPairsError as error:
            if number == 1:
                loop.say(
                    "Warning: the loop has nothing to teach the stages before; what is tuned is kept:"
                    f" {', '.join(lineage)}. {error}"
                )
                return lineage, steps
            loop.say(
                f"Warning: round {number} has nothing to learn from, so the networks of round {number - 1}"
                f" are the result. {error}"
            )
            return before, steps
    return lineage, steps


def weights_of(training: Artefact) -> Path:
    return training.folder / training.record["weights"]


def whole_weights(loop: CircularLoop, stage: str, line: Sequence[Artefact], place: Path) -> Path:
    """Folder of the weights behind a stage: its training's own, or of several rounds the whole network,
    written to `place`.
    """
    if len(line) == 1:
        return weights_of(line[0])
    save_policy(
        loop.models({stage: tuple(line)})[stage], place, {"trainings": [one.folder.name for one in line]}
    )
    return place
