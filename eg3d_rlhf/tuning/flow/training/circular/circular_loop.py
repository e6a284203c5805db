"""Circular-DPO: train every stage of a generator from preferences on finished assets, from the last to the
first.

    1. The last stage is trained on people's pairs (DPO; Circular-DPO, equation 8).
    2. Its samples and its reference's samples are decoded and encoded again; they are the pairs of the stage
       before (loop_pairs.py).
    3. That stage is trained on them (equation 9), selected by w1 and weighted by w2; and so on to the first
       stage.
Every step is an artefact (experiments/store.py): an interrupted run resumes where it was, and runs share the
steps that they have in common. A further round repeats the steps with the networks of the round before as
start and as reference, and with noises of its own.
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
    next_stage,
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

# stage -> the trainings that led to its network, oldest first; a missing stage has the base's network
Lineage = Mapping[str, tuple[Artefact, ...]]


NO_BETA = 1e-6  # so small that the preference term has no gradient beside the regulariser's


@dataclass(kw_only=True)
class CircularLoop:
    """Steps of a run. Each step makes an artefact, or returns it if it exists."""

    problem: Problem  # pipeline, people's pairs, reward and evaluators
    settings: CircularSettings
    store: Store  # folder of artefacts, which runs share
    ranks: Ranks = SINGLE
    use: str = PAIRS  # use of the loop's pairs, one of USES
    bars: bool = False  # show progress bars
    say: Callable[[str], None] = print  # prints status lines and warnings
    _models: dict = field(default_factory=dict, repr=False)  # networks by what they were made from

    def of_round(self, number: int) -> "CircularLoop":
        """Return the same steps with the noises, orders and adapters of a round."""
        # the first round has the run's own seed, so that a run of one round is part of a longer one
        if number == 1:
            return self
        # later rounds have noises of their own
        seed = derive_seed("round", self.settings.seed, number) % 2**31
        return replace(self, settings=replace(self.settings, seed=seed))

    # Parts of the problem.

    @property
    def names(self) -> list[str]:
        """Names of the stages, in order."""
        return [stage.name for stage in self.problem.pipeline.stages]

    def stage(self, name: str) -> ConditionedStage:
        """Return the stage of a name."""
        return ConditionedStage.from_pipeline(self.problem.pipeline, name)

    def people(self, stage: str) -> Sequence[PreferencePair]:
        """Return people's pairs of a stage."""
        # of the training prompts alone
        return self.problem.train_pairs[stage]

    # Networks.

    def models(self, lineage: Lineage) -> dict[str, torch.nn.Module]:
        """Return the tuned networks of a lineage, by stage."""
        return {stage: self._model(stage, line) for stage, line in lineage.items() if line}

    def _model(self, stage: str, line: tuple[Artefact, ...]) -> torch.nn.Module:
        """Load the network of a stage after its trainings."""
        key = (stage, *(training.content for training in line))
        # each training's weights apply to the network of the one before
        if key not in self._models:
            base = self._model(stage, line[:-1]) if len(line) > 1 else self.stage(stage).stage.model
            self._models[key] = tuned_model(base, weights_of(line[-1]), merge=True)
        return self._models[key]

    def _named(self, lineage: Lineage) -> dict[str, list[str]]:
        """Return the contents of a lineage's trainings, as they go into hashes."""
        # sorted, so that equal lineages have equal hashes
        return {
            stage: [training.content for training in line] for stage, line in sorted(lineage.items()) if line
        }

    # Steps.

    def from_people(self, stage: str, lineage: Lineage | None = None, supervised: bool = False) -> Artefact:
        """Train a stage on people's pairs, from the networks of `lineage`."""
        config = self.settings.sft if supervised else self.settings.human
        lineage = lineage or {}
        # only for messages; the hash has the config
        what = "fine-tuning on the preferred" if supervised else "DPO on people's pairs"
        return self._train(
            stage, lineage, config, {"source": "human"}, lambda: (self.people(stage), {}), what
        )

    def pairs(self, stage: str, lineage: Lineage, before: Lineage | None = None) -> Artefact:
        """Make the pairs of a stage by the networks of `lineage`.

        Args: before: lineage whose network of the next stage is the reference; None: the base.
        """
        before = before or {}
        seed = self.settings.seed
        sampled_stage = next_stage(self.names, stage)
        references = {sampled_stage: before[sampled_stage]} if before.get(sampled_stage) else {}
        inputs = {
            "step": "loop pairs",
            "problem": self.problem.identity,
            "stage": stage,
            "seed": seed,
            # batch and chunk do not change the pairs
            "config": {"per_pair": self.settings.loop_pairs.per_pair},
            # the two keys are part of the hash, as in version 0.1
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
            # the bar counts the pairs of this rank, rounded up
            with self._bar(f"pairs for {stage}", -(-len(human) // self.ranks.world)) as bar:
                place, figures = make_in_chunks(folder, make, human, ranks=self.ranks, on_pair=bar.update)
            return [place], figures

        title = f"pairs for stage {stage!r} from samples of stage {sampled_stage!r}"
        # `make` returns an existing artefact of the same inputs
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
        """Train a stage on the loop's pairs, from the networks of `lineage`.

        Args: weighing, use: None for those of the loop.
        """
        # views of one set of pairs: groups with other weights share the artefact of the pairs
        weighing = weighing or self.settings.weighing
        config = self.settings.loop
        use = use or self.use
        source = {"source": "loop", "pairs": pairs.content, "weighing": asdict(weighing)}
        # the first two uses change the loss, which is in the hash already; the others change the pairs
        if use == REGULARISER:
            config = replace(config, dpo=replace(config.dpo, kind="sigmoid", beta=NO_BETA))
        elif use == WINNERS:
            config = replace(config, dpo=self.settings.sft.dpo)
        elif use != PAIRS:
            source["use"] = version_0_1.former_use(use)

        # called only if the artefact does not exist yet
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
        """Train a stage, or return the artefact of the same training.

        Args: source: entries of the hash that identify the pairs; read: returns the pairs and a report of
            their selection; what: description of the training for messages.
        """
        conditioned = self.stage(stage)
        config = config.at(conditioned.stage, self.settings.seed)
        # without a chooser there is no win rate, and the last update is kept
        choosing = self.settings.choosing if self.problem.chooser is not None else None
        inputs = {
            "step": "train",
            "problem": self.problem.identity,
            "stage": stage,
            "networks": self._named(lineage),
            "pairs": source,
            # settings that do not change the result are not hashed
            "config": {k: v for k, v in asdict(config).items() if k not in FREE},
            "choosing": None if choosing is None else asdict(choosing),
            "unseen": self.problem.unseen_pairs is not None,
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            pairs, report = read()
            models = self.models(lineage)
            # a win rate compares this stage with the network that it starts from; other stages are the same
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
                resume=True,  # a training that was interrupted is in the artefact's unfinished folder
                say=self.say,
            )
            # last line with figures of updates: a line of an evaluation alone has none
            last = next((line for line in reversed(result.stats) if line.get("pairs")), None)
            return [result.weights], {
                "weights": result.weights.relative_to(folder).as_posix(),
                **result.record(),
                "held_out_accuracies": result.values_of(ACCURACY),
                "last": last,  # shows the margins at the end of the training
                "pairs": len(pairs),
                "weighing": report,
            }

        return self.store.make(f"{stage}-{source['source']}", inputs, maker, f"stage {stage!r}, {what}")

    def _bar(self, title: str, total: int) -> tqdm:
        """Create a progress bar, which is hidden if the loop shows none."""
        return tqdm(total=total, desc=title, dynamic_ncols=True, disable=not self.bars)

    def evaluate(self, lineage: Lineage, evaluation: Evaluation) -> Artefact:
        """Score assets of the held-out prompts by every evaluator; the record holds the scores."""
        # the spelling of keys and values is part of the hash, as in version 0.1
        inputs = {
            "step": "judge",
            "problem": self.problem.identity,
            "networks": self._named(lineage),
            "judging": asdict(evaluation),
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            del folder  # scores are in the record; there are no files
            with self._bar(
                "evaluation", evaluation.per_condition * len(self.problem.held_out_conditions)
            ) as bar:
                return [], evaluate(self.problem, self.models(lineage), evaluation, bar.update, spreads=True)

        names = ", ".join(k for k, v in lineage.items() if v) or "none"
        return self.store.make("scores", inputs, maker, f"scores of the generator with tuned stages: {names}")


def check(problem: Problem) -> None:
    """Raise ValueError for a problem that no loop can be run on."""
    stages = [stage.name for stage in problem.pipeline.stages]
    # the loop passes preferences from one stage to the one before
    if len(stages) < 2:
        remedy = f"One stage needs no loop: --stage={stages[0]}."
        raise ValueError(
            f"circular: the loop needs a pipeline of two stages or more, got {', '.join(stages)}. {remedy}"
        )
    if problem.reward is None:
        raise ValueError(
            "circular: the loop needs a reward of finished assets, and this generator has none. Train its"
            " stages by themselves: --stage."
        )


def run_loop(
    loop: CircularLoop, on_step: Callable[[dict], None] = lambda step: None
) -> tuple[Lineage, list[dict]]:
    """Run the whole loop, `settings.rounds` times.

    Returns the trainings of every stage, and a description of each step. A round in which no pairs are left
    for a stage ends the loop. If it is the first round, the stages tuned so far are the result; otherwise the
    networks of the round before are.
    """
    stages = loop.names
    lineage: dict[str, tuple[Artefact, ...]] = {}
    steps: list[dict] = []

    def done(number: int, kind: str, stage: str, artefact: Artefact) -> Artefact:
        """Record a step of a round, and return its artefact."""
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
        before = dict(lineage)  # start and reference of this round
        this_round = loop.of_round(number)
        tuned = done(number, "people", stages[-1], this_round.from_people(stages[-1], before))
        lineage[stages[-1]] = (*before.get(stages[-1], ()), tuned)
        try:
            for stage in reversed(stages[:-1]):
                pairs = done(number, "pairs", stage, this_round.pairs(stage, lineage, before))
                tuned = done(number, "loop", stage, this_round.from_loop(stage, pairs, lineage))
                lineage[stage] = (*before.get(stage, ()), tuned)
        except NoPairsError as error:
            if number == 1:
                loop.say(
                    "Warning: the loop has no pairs for the earlier stages. The stages tuned so far are kept:"
                    f" {', '.join(lineage)}. {error}"
                )
                return lineage, steps
            # a round that is incomplete is dropped as a whole
            loop.say(
                f"Warning: round {number} has no pairs to train on, so the networks of round {number - 1} are"
                f" the result. {error}"
            )
            return before, steps
    return lineage, steps


def weights_of(training: Artefact) -> Path:
    """Return the folder of a training's weights."""
    return training.folder / training.record["weights"]


def whole_weights(loop: CircularLoop, stage: str, line: Sequence[Artefact], place: Path) -> Path:
    """Return the folder of a stage's weights: its training's, or after several rounds `place`.

    After several rounds the whole network is written to `place`, since the weights of the last training alone
    apply to the network of the round before.
    """
    if len(line) == 1:
        return weights_of(line[0])
    save_policy(
        loop.models({stage: tuple(line)})[stage],
        place,
        {"trainings": [training.folder.name for training in line]},
    )
    return place
