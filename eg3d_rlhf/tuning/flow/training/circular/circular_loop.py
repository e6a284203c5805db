"""Circular-DPO: train every stage of a generator from preferences on finished assets, from the last stage to
the first.

    1. The last stage is trained on people's pairs (DPO; Circular-DPO, equation 8).
    2. Samples of the tuned stage and of its reference are decoded and encoded again. They give new pairs
       of the previous stage (loop_pairs.py).
    3. The previous stage is trained on these pairs (equation 9), which are selected by w1 and weighted by w2.
       Steps 2 and 3 are repeated down to the first stage.
Every step is an artefact (experiments/store.py): an interrupted run resumes after the last finished step, and
runs share the steps that they have in common. A further round repeats all steps from the networks of the
previous round, which are then also the reference, and with new noises.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.store import Artefact, Store
from eg3d_rlhf.models.policies import save_policy, tuned_model
from eg3d_rlhf.tuning.flow.base.evaluation import evaluate
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair, read_pairs
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.settings import Evaluation
from eg3d_rlhf.tuning.flow.training.accuracy import invert_half
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import (
    LoopPairMaker,
    NoPairsError,
    make_in_chunks,
    next_stage,
    select_and_weigh,
    used,
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
from eg3d_rlhf.tuning.flow.training.trainer import ACCURACY, CHANGEABLE_SETTINGS
from training import rehearsal
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

# name of a stage -> trainings that led to its network, the oldest first; a missing stage has the untuned
# network
Lineage = Mapping[str, tuple[Artefact, ...]]


# value of beta with which the gradient of the preference term is negligible against the regulariser's
NO_BETA = 1e-6


@dataclass(kw_only=True)
class CircularLoop:
    """Steps of a run of Circular-DPO. Each step makes an artefact, or returns it if it exists."""

    problem: Problem  # pipeline, people's pairs, reward and evaluators
    settings: CircularSettings
    store: Store  # folder of artefacts, which runs share
    ranks: Ranks = SINGLE
    use: str = PAIRS  # use of the loop's pairs, one of USES
    bars: bool = False  # whether progress bars are printed
    say: Callable[[str], None] = print  # function that prints status lines and warnings
    _models: dict = field(default_factory=dict, repr=False)  # networks by their stage and trainings

    def of_round(self, round_number: int) -> "CircularLoop":
        """Return the loop with the random seed of a round. Rounds are counted from 1."""
        # the first round has the seed of the run, so that its steps are the same in runs of one or more
        # rounds
        if round_number == 1:
            return self
        # later rounds have other noises, orders and adapters; the seed is below 2**31
        seed = derive_seed("round", self.settings.seed, round_number) % 2**31
        return replace(self, settings=replace(self.settings, seed=seed))

    # Parts of the problem.

    @property
    def names(self) -> list[str]:
        """Return the names of the stages, in order."""
        return [stage.name for stage in self.problem.pipeline.stages]

    def stage(self, name: str) -> ConditionedStage:
        """Return the stage of this name, with the source of its conditioning."""
        return ConditionedStage.from_pipeline(self.problem.pipeline, name)

    def people(self, stage: str) -> Sequence[PreferencePair]:
        """Return the people's preference pairs of a stage for the training prompts."""
        return self.problem.train_pairs[stage]

    # Networks.

    def models(self, lineage: Lineage) -> dict[str, torch.nn.Module]:
        """Return the tuned networks of a lineage, by name of the stage."""
        return {stage: self._model(stage, trainings) for stage, trainings in lineage.items() if trainings}

    def _model(self, stage: str, trainings: tuple[Artefact, ...]) -> torch.nn.Module:
        """Return the network of a stage after its trainings, which are given oldest first."""
        cache_key = (stage, *(training.content for training in trainings))
        # the weights of a training apply to the network of the previous training
        if cache_key not in self._models:
            if len(trainings) > 1:
                base_model = self._model(stage, trainings[:-1])
            else:
                base_model = self.stage(stage).stage.model
            self._models[cache_key] = tuned_model(base_model, weights_of(trainings[-1]), merge=True)
        return self._models[cache_key]

    def _named(self, lineage: Lineage) -> dict[str, list[str]]:
        """Return the hashes of a lineage's trainings, by stage, as a part of the hashes of later steps."""
        # sorted, so that equal lineages have equal hashes
        return {
            stage: [training.content for training in trainings]
            for stage, trainings in sorted(lineage.items())
            if trainings
        }

    # Steps.

    def from_people(self, stage: str, lineage: Lineage | None = None, supervised: bool = False) -> Artefact:
        """Train a stage on people's pairs.

        Args:
            stage: name of the stage.
            lineage: lineage whose network of the stage training starts from; None: the untuned network.
            supervised: whether the stage is fine-tuned on the preferred samples, in place of DPO.
        """
        config = self.settings.sft if supervised else self.settings.human
        lineage = lineage or {}
        # used for messages only; the hash of the artefact contains the config
        description = "fine-tuning on the preferred" if supervised else "DPO on people's pairs"
        return self._train(
            stage, lineage, config, {"source": "human"}, lambda: (self.people(stage), {}), description
        )

    def pairs(self, stage: str, lineage: Lineage, reference_lineage: Lineage | None = None) -> Artefact:
        """Make the loop's pairs of a stage by the tuned networks of the stages after it.

        Args:
            stage: name of the stage, any except the last.
            lineage: lineage of the tuned networks.
            reference_lineage: lineage whose network of the next stage is the reference; None: the untuned
                network.
        """
        reference_lineage = reference_lineage or {}
        seed = self.settings.seed
        sampled_stage = next_stage(self.names, stage)
        reference_trainings = (
            {sampled_stage: reference_lineage[sampled_stage]} if reference_lineage.get(sampled_stage) else {}
        )
        inputs = {
            "step": "loop pairs",
            "problem": self.problem.identity,
            "stage": stage,
            "seed": seed,
            # the fields batch and chunk do not change the pairs, so they are not hashed
            "config": {"per_pair": self.settings.loop_pairs.per_pair},
            # the next two keys have the spelling of version 0.1, since they are part of the hash
            "op": self._named({name: trainings for name, trainings in lineage.items() if name != stage}),
            "un_op": self._named(reference_trainings),
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            # read only if the artefact has to be made
            human_pairs = self.people(stage)
            pair_maker = LoopPairMaker.from_problem(
                self.problem,
                self.models(lineage),
                self.settings.loop_pairs,
                seed,
                stage=stage,
                reference_models=self.models(reference_trainings),
            )
            with (
                rehearsal.timed(rehearsal.TRAINING, "pairs of the loop"),
                # the bar counts the pairs of this rank; -(-a // b) divides and rounds up
                self._bar(f"pairs for {stage}", -(-len(human_pairs) // self.ranks.world)) as bar,
            ):
                # a rehearsal makes about one batch on each rank
                human_pairs = rehearsal.first(human_pairs, self.settings.loop_pairs.batch * self.ranks.world)
                pairs_folder, statistics = make_in_chunks(
                    folder, pair_maker, human_pairs, ranks=self.ranks, on_pair=bar.update
                )
            return [pairs_folder], statistics

        title = f"pairs for stage {stage!r} from samples of stage {sampled_stage!r}"
        # `make` returns an existing artefact of the same inputs
        artefact = self.store.make("pairs", inputs, maker, title)
        return replace(artefact, record=version_0_1.loop_pairs(artefact.record))

    def from_loop(
        self,
        stage: str,
        pairs: Artefact,
        lineage: Lineage,
        weighing: Weighing | None = None,
        use: str | None = None,
    ) -> Artefact:
        """Train a stage on the loop's pairs.

        Args:
            stage: name of the stage.
            pairs: artefact of the loop's pairs.
            lineage: lineage whose network of the stage training starts from.
            weighing: selection and weights of the pairs; None: those of the loop's settings.
            use: use of the pairs, one of USES; None: the use of the loop.
        """
        # selection and weights are applied after reading, so that groups of other weights share the pairs'
        # artefact
        weighing = weighing or self.settings.weighing
        config = self.settings.loop
        use = use or self.use
        # entries of the hash that identify the pairs of this training
        pair_source = {"source": "loop", "pairs": pairs.content, "weighing": asdict(weighing)}
        # the first two uses change the loss, which is part of the hash by the config; the other uses change
        # the pairs
        if use == REGULARISER:
            config = replace(config, dpo=replace(config.dpo, kind="sigmoid", beta=NO_BETA))
        elif use == WINNERS:
            config = replace(config, dpo=self.settings.sft.dpo)
        elif use != PAIRS:
            pair_source["use"] = version_0_1.former_use(use)

        # called only if the artefact does not exist yet
        def load_pairs() -> tuple[list[PreferencePair], dict]:
            # The few pairs of a rehearsal may all be dropped. People's pairs have latents of the same size.
            if rehearsal.active():
                return list(self.people(stage)), {}
            # read_pairs returns (pairs, description)
            selected_pairs, report = select_and_weigh(read_pairs(pairs.folder / "pairs", stage)[0], weighing)
            return used(selected_pairs, use, self.settings.seed, self.people(stage)), report

        return self._train(
            stage,
            lineage,
            config,
            pair_source,
            load_pairs,
            "DPO on the loop's pairs" if use == PAIRS else f"the loop's pairs: {use}",
        )

    def _train(
        self,
        stage: str,
        lineage: Lineage,
        config: TrainConfig,
        pair_source: Mapping,
        load_pairs: Callable[[], tuple[Sequence[PreferencePair], Mapping]],
        description: str,
    ) -> Artefact:
        """Train a stage, or return the artefact of the same training if it exists.

        Args:
            stage: name of the stage.
            lineage: lineage whose network of the stage training starts from.
            config: settings of the training.
            pair_source: entries of the hash that identify the pairs.
            load_pairs: function that returns the pairs and a report of their selection.
            description: description of the training for messages.
        """
        conditioned_stage = self.stage(stage)
        config = config.for_stage(conditioned_stage.stage, self.settings.seed)
        # without a chooser there is no win rate, and the last update is kept
        choosing = self.settings.choosing if self.problem.chooser is not None else None
        inputs = {
            "step": "train",
            "problem": self.problem.identity,
            "stage": stage,
            "networks": self._named(lineage),
            "pairs": pair_source,
            # settings that do not change the result are not hashed
            "config": {
                setting_name: setting_value
                for setting_name, setting_value in asdict(config).items()
                if setting_name not in CHANGEABLE_SETTINGS
            },
            "choosing": None if choosing is None else asdict(choosing),
            "unseen": self.problem.unseen_pairs is not None,
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            pairs, report = load_pairs()
            models = self.models(lineage)
            # a win rate compares this stage with the network that it starts from; other stages are the same
            other_models = {stage_name: model for stage_name, model in models.items() if stage_name != stage}
            held_out = None
            if choosing is not None:
                held_out = choosing.held_out(self.problem, stage, other_models, dict(models), self.ranks)
            stage_result = train_stage(
                conditioned_stage.with_model(models.get(stage)),
                pairs,
                config,
                folder / "training",
                held_out=held_out,
                unseen=self.problem.choosing_pairs(stage),
                ranks=self.ranks,
                resume=True,  # an interrupted training is in the unfinished folder of the artefact
                say=self.say,
            )
            # last line with metrics of updates, since lines of evaluations have none
            last_stats_line = next((line for line in reversed(stage_result.stats) if line.get("pairs")), None)
            return [stage_result.weights], {
                "weights": stage_result.weights.relative_to(folder).as_posix(),
                **stage_result.record(),
                "held_out_accuracies": stage_result.values_of(ACCURACY),
                "last": last_stats_line,  # shows the margins at the end of the training
                "pairs": len(pairs),
                "weighing": report,
            }

        return self.store.make(
            f"{stage}-{pair_source['source']}", inputs, maker, f"stage {stage!r}, {description}"
        )

    def _bar(self, title: str, item_count: int) -> tqdm:
        """Create a progress bar of `item_count` items, which prints nothing unless `bars` is set."""
        return tqdm(total=item_count, desc=title, dynamic_ncols=True, disable=not self.bars)

    def evaluate(self, lineage: Lineage, evaluation_settings: Evaluation) -> Artefact:
        """Score samples of the held-out prompts by every evaluator, and return an artefact with the scores.

        Args:
            lineage: lineage of the networks.
            evaluation_settings: number and noises of the samples.
        """
        # the keys and values have the spelling of version 0.1, since they are part of the hash
        inputs = {
            "step": "judge",
            "problem": self.problem.identity,
            "networks": self._named(lineage),
            "judging": asdict(evaluation_settings),
        }

        def maker(folder: Path) -> tuple[list[Path], Mapping]:
            del folder  # not used: the scores are in the record, and no files are written
            with self._bar(
                "evaluation", evaluation_settings.per_condition * len(self.problem.held_out_prompts)
            ) as bar:
                return [], evaluate(
                    self.problem, self.models(lineage), evaluation_settings, bar.update, measures_spread=True
                )

        tuned_stages = ", ".join(stage for stage, trainings in lineage.items() if trainings) or "none"
        return self.store.make(
            "scores", inputs, maker, f"scores of the generator with tuned stages: {tuned_stages}"
        )


def check(problem: Problem) -> None:
    """Raise ValueError if the loop cannot be run on a problem.

    The loop needs a pipeline of at least two stages and a reward of finished assets.
    """
    stages = [stage.name for stage in problem.pipeline.stages]
    # the loop passes preferences from a stage to the previous one
    if len(stages) < 2:
        remedy = f"Train the single stage without the loop by --stage={stages[0]}."
        raise ValueError(
            f"circular: the loop needs at least two stages, but this generator has only {', '.join(stages)}."
            f" {remedy}"
        )
    if problem.reward is None:
        raise ValueError(
            "circular: the loop needs a reward of finished assets, but this generator has none. Train one"
            " stage without the loop by --stage=NAME."
        )


def randomised(problem: Problem, seed: int) -> Problem:
    """Return a copy of a problem for the control: half of each prompt's training pairs are inverted."""
    pairs = PairsByStage(problem.train_pairs, lambda stage: invert_half(problem.train_pairs[stage], seed))
    # The identity is hashed into the names of artefacts, so its key keeps the name that version 0.1 gave it.
    return replace(problem, train_pairs=pairs, identity={**problem.identity, "shuffled": seed})


def run_loop(
    loop: CircularLoop, on_step: Callable[[dict], None] = lambda step: None
) -> tuple[Lineage, list[dict]]:
    """Run the loop `settings.rounds` times, see `_run_rounds`. A rehearsal runs the first round alone.

    Args:
        loop: steps of the run.
        on_step: function that is called with the description of each finished step, as JSON.
    Returns: the lineage with the trainings of every tuned stage; and the descriptions of all steps.
    """
    with rehearsal.section(times=loop.settings.rounds):
        return _run_rounds(loop, on_step)


def _run_rounds(loop: CircularLoop, on_step: Callable[[dict], None]) -> tuple[Lineage, list[dict]]:
    """Run the rounds of a loop.

    If all pairs of a stage are dropped, the loop ends. In the first round, the stages tuned so far are then
    the result. In a later round, the networks of the previous round are the result.

    Args:
        loop: steps of the run.
        on_step: function that is called with the description of each finished step, as JSON.
    Returns: the lineage with the trainings of every tuned stage; and the descriptions of all steps.
    """
    stages = loop.names
    lineage: dict[str, tuple[Artefact, ...]] = {}
    steps: list[dict] = []

    def done(round_number: int, step_name: str, stage: str, artefact: Artefact) -> Artefact:
        """Record a step of a round, and return its artefact.

        Args:
            round_number: number of the round, counted from 1.
            step_name: name of the step: "people", "pairs" or "loop".
            stage: name of the stage.
            artefact: artefact that the step made.
        """
        steps.append(
            {
                "round": round_number,
                "step": step_name,
                "stage": stage,
                "artefact": artefact.folder.name,
                **artefact.record,
            }
        )
        on_step(steps[-1])
        return artefact

    # the section in `run_loop` multiplies the times of a rehearsal by the number of rounds
    for round_number in rehearsal.first(range(1, loop.settings.rounds + 1)):
        previous_lineage = dict(lineage)  # networks that this round starts from, and its reference
        round_loop = loop.of_round(round_number)
        training = done(
            round_number, "people", stages[-1], round_loop.from_people(stages[-1], previous_lineage)
        )
        lineage[stages[-1]] = (*previous_lineage.get(stages[-1], ()), training)
        try:
            for stage in reversed(stages[:-1]):
                pairs = done(round_number, "pairs", stage, round_loop.pairs(stage, lineage, previous_lineage))
                training = done(round_number, "loop", stage, round_loop.from_loop(stage, pairs, lineage))
                lineage[stage] = (*previous_lineage.get(stage, ()), training)
        except NoPairsError as error:
            if round_number == 1:
                loop.say(
                    "Warning: the loop has no pairs for the earlier stages. The stages tuned so far are kept:"
                    f" {', '.join(lineage)}. {error}"
                )
                return lineage, steps
            # the trainings of an incomplete round are not part of the result
            loop.say(
                f"Warning: round {round_number} has no pairs to train on, so the networks of round"
                f" {round_number - 1} are the result. {error}"
            )
            return previous_lineage, steps
    return lineage, steps


def weights_of(training: Artefact) -> Path:
    """Return the folder of the weights of a training."""
    return training.folder / training.record["weights"]


def network_weights(
    loop: CircularLoop, stage: str, trainings: Sequence[Artefact], network_folder: Path
) -> Path:
    """Return the folder of a stage's weights, which apply to the untuned network.

    After one round, the folder of the training is returned. After several rounds, all parameters of the
    network are written to `network_folder`, which is returned. The weights of the last training would not be
    enough, since they apply to the network of the previous round.

    Args:
        loop: steps of the run.
        stage: name of the stage.
        trainings: trainings of the stage, the oldest first.
        network_folder: folder for the network after several rounds.
    """
    if len(trainings) == 1:
        return weights_of(trainings[0])
    save_policy(
        loop.models({stage: tuple(trainings)})[stage],
        network_folder,
        {"trainings": [training.folder.name for training in trainings]},
    )
    return network_folder
