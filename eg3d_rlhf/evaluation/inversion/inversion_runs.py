"""Run many inversions as one job, which can be resumed at every step.

For every target, the first stage optimises the latent once. Then the second stage tunes the generator once
for each weight of the reward. The results are written to:

    targets/<name>/w.safetensors             the first stage's result, which the weights share
    targets/<name>/<weight>.json             measures at a weight ('0', '0.01', ...), at 'w'
                                             (before the second stage) and of the ground truth
    targets/<name>/<weight>.safetensors      the tuned generator, for targets that are rendered; its
                                             latent is in <weight>-ws

The run's checkpoint holds the state of the current stage.
Shapes: L layers of ws, W w_dim.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eg3d_rlhf.evaluation.inversion import projector
from eg3d_rlhf.evaluation.inversion.photograph import TargetPhoto
from eg3d_rlhf.evaluation.inversion.targets import Case, Evaluators, measure, measure_truth
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.tuning.gan.latent_search import Guidance
from training import checkpoint, networks, storage
from training.progress import log_bar

EVERY = 32  # number of steps between two checkpoints, and between two status lines
KIND = "inversion"  # type that the files with a latent record
Stage = projector.LatentStage | projector.PivotalStage


class Leg(NamedTuple):
    """Section of a target's inversion: the steps `first` to `last` - 1 of one stage."""

    stage: str  # 'w' (first stage) or 'pivot' (second stage)
    weight: float | None  # weight of the reward; None for the section that all weights share
    first: int  # number of the first step
    last: int  # number of the last step + 1


def list_legs(config: projector.InversionConfig, reward_weights: Sequence[float]) -> list[Leg]:
    """List the sections of a target's inversion, in the order in which they run.

    Args: reward_weights: weights of the reward.
    """
    # In the first stage, the reward is applied only in the second half, if at all. So all weights share the
    # first half, or the entire stage.
    shared_steps = config.w_steps // 2 if config.reward_in_w else config.w_steps
    inversion_legs = [Leg("w", None, 0, shared_steps)]
    for reward_weight in reward_weights:
        inversion_legs += (
            [Leg("w", reward_weight, shared_steps, config.w_steps)] if shared_steps < config.w_steps else []
        )
        inversion_legs.append(Leg("pivot", reward_weight, 0, config.pivot_steps))
    return inversion_legs


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs of an inversion, loaded and checked."""

    loaded: LoadedGenerator  # the untuned generator
    perceptual: projector.Perceptual
    prior: projector.Prior
    guidance: Guidance | None  # None: no reward
    evaluators: Evaluators
    cases: Sequence[Case]  # targets
    weights: Sequence[float]  # weights of the reward
    config: projector.InversionConfig
    from_truth: bool = False  # True: the first stage starts from the ground-truth latents
    shown: int = 1  # number of targets whose tuned generators are written, for rendering
    photo: TargetPhoto | None = None  # estimated camera and crop of the target; None: the user's camera

    @property
    def steps(self) -> int:
        """Return the total number of optimisation steps of all targets."""
        return len(self.cases) * sum(leg.last - leg.first for leg in list_legs(self.config, self.weights))


class Inversions:
    """Loop over the targets and the sections of their inversions.

    Args:
        run: run, whose context must be entered.
        setup: loaded inputs of the inversions.
    """

    def __init__(self, run: Run, setup: Setup):
        self.run = run
        self.setup = setup
        self.done = 0  # number of steps of all targets that have been made
        self.log_lines = log_bar(0, 0, "inversion", "step", enabled=False)  # replaced by `run_missing`
        self.legs = list_legs(setup.config, setup.weights)

    def folder(self, case: Case) -> Path:
        """Return the folder of a target's results."""
        return self.run.folder / "targets" / case.name

    def run_missing(self) -> None:
        """Run all optimisation steps that have not been made.

        Raises: StoppedError if the run is asked to stop.
        """
        next_position: tuple[int, ...] = (0, 0, 0)  # index of the target, index of the section, step
        stage_state: dict[str, Tensor] = {}
        if checkpoint.available(self.run.folder):
            # The checkpoint holds the position of the next step. The results of finished sections are files.
            stage_state, checkpoint_record = self.run.read()
            next_position = tuple(checkpoint_record["at"])
            self.done = checkpoint_record["done"]
            self.run.continue_from(self.done, checkpoint_record["lines"])
        else:
            self.run.begin()
            self.run.continue_from(0)
        self.log_lines = log_bar(self.setup.steps, self.done, "inversion", "step")
        with self.run.stoppable(), self.run.writing(), self.log_lines:
            for target_index, case in enumerate(self.setup.cases):
                # Finished targets are skipped. Only the first target that is not finished uses the state.
                if target_index < next_position[0]:
                    continue
                self._run_target(
                    target_index,
                    case,
                    next_position[1:] if target_index == next_position[0] else (0, 0),
                    stage_state if target_index == next_position[0] else {},
                )

    def _run_target(
        self, target_index: int, case: Case, start_position: tuple[int, ...], stage_state: dict[str, Tensor]
    ) -> None:
        """Run the sections (`Leg`) of a target's inversion that are not finished.

        Args:
            target_index: index of the target.
            case: target.
            start_position: index of the first section to run, and its first step.
            stage_state: state of the stage before this step; {} if the section starts from its beginning.
        """
        setup = self.setup
        folder = self.folder(case)
        # at the first step of the target
        if start_position == (0, 0):
            write_json(folder / "truth.json", measure_truth(setup.loaded.generator, case, setup.evaluators))
        objective = projector.Objective(setup.config, case.target, setup.perceptual, setup.guidance)
        for leg_index, leg in enumerate(self.legs):
            if leg_index < start_position[0]:
                continue
            stage = self._make_stage(leg, case, objective)
            # Only the section that was interrupted has a state.
            if leg_index == start_position[0] and start_position[1]:
                stage.restore(stage_state)
            self._run_steps(
                stage,
                leg,
                (target_index, leg_index),
                start_position[1] if leg_index == start_position[0] else leg.first,
                case,
            )
            self._write_results(stage, leg, target_index, objective)
            # The next section starts from the files of this one, so no state is stored.
            self._checkpoint(
                (target_index, leg_index + 1, 0)
                if leg_index + 1 < len(self.legs)
                else (target_index + 1, 0, 0),
                {},
            )

    def _make_stage(self, leg: Leg, case: Case, objective: projector.Objective) -> Stage:
        """Create the stage that a section (`Leg`) runs, from the files that earlier sections have written."""
        generator = self.setup.loaded.generator
        reward_weight = leg.weight or 0.0
        if leg.stage == "pivot":
            # exists only if reward_in_w is set
            weight_file = self.folder(case) / f"{reward_weight:g}-w.safetensors"
            # If the reward was applied in the first stage, each weight has its own latent.
            latent_file = (
                weight_file if self.setup.config.reward_in_w else self.folder(case) / "w.safetensors"
            )
            return projector.PivotalStage(
                generator,
                objective,
                # to the target's device and dtype
                storage.read_tensors(latent_file, KIND)[0]["ws"].to(case.target.image),
                reward_weight,
            )
        # Starting from the ground truth is a control of the method.
        start_ws = case.truth.ws if self.setup.from_truth and case.truth is not None else None
        stage = projector.LatentStage(generator, objective, self.setup.prior, start_ws, reward_weight)
        # The second half of the first stage continues from the shared first half, with its optimiser's state.
        if leg.first:
            stage.restore(storage.read_tensors(self.folder(case) / "w.safetensors", KIND)[0])
        return stage

    def _run_steps(
        self, stage: Stage, leg: Leg, section_position: tuple[int, int], first_step: int, case: Case
    ) -> None:
        """Make the optimisation steps of a section (`Leg`), write logs and checkpoints, and stop if this is
        requested.

        Args:
            section_position: (index of the target, index of the section).
            first_step: first step to make.
        """
        section_name = leg.stage if leg.weight is None else f"{leg.stage} {leg.weight:g}"
        for step in range(max(first_step, leg.first), leg.last):
            step_values = stage.step(step)
            self.run.stats(
                {"target": case.name, "stage": leg.stage, "weight": leg.weight, "step": step, **step_values}
            )
            self.done += 1
            self.log_lines.update()
            # The run stops only after a complete step.
            if self.run.stop_requested:
                self._checkpoint((*section_position, step + 1), stage.state())
                raise StoppedError(
                    f"stopped by {self.run.stop_requested} at {case.name}, {section_name}, step {step + 1}"
                )
            # After the last step of a section no state is stored; `_run_target` stores the next position.
            if (step + 1) % EVERY == 0 or step + 1 == leg.last:
                status_fields = {
                    "target": f"{section_position[0] + 1}/{len(self.setup.cases)} {case.name}",
                    "stage": f"{section_name:<10}",
                    "at": f"{step + 1:<4}",
                }
                self.run.status(
                    status_fields, self.done, self.setup.steps, "step", {"mse": f"{step_values['mse']:.2e}"}
                )
                if step + 1 < leg.last:
                    self._checkpoint((*section_position, step + 1), stage.state())

    def _write_results(
        self, stage: Stage, leg: Leg, target_index: int, objective: projector.Objective
    ) -> None:
        """Write the results of a finished section (`Leg`): the latent or the tuned generator, and the
        measures.
        """
        setup = self.setup
        case = self.setup.cases[target_index]
        generator = self.setup.loaded.generator
        folder = self.folder(case)
        if isinstance(stage, projector.LatentStage):
            file_stem = "w" if leg.weight is None else f"{leg.weight:g}-w"
            storage.write_tensors(folder / f"{file_stem}.safetensors", KIND, stage.state(), {})
            # After the first half of the first stage there are no measures yet.
            if leg.last < setup.config.w_steps:
                return
            with torch.no_grad():
                # The measure "moved" is relative to the density before the second stage, so it is 0 here.
                pivot_density = generator.field(stage.ws).density_grid(projector.cube_grid(generator))
            write_json(
                folder / f"{file_stem}.json",
                measure(generator, case, stage.ws.detach(), pivot_density, objective, setup.evaluators),
            )
            return
        file_stem = f"{leg.weight:g}"
        write_json(
            folder / f"{file_stem}.json",
            measure(stage.generator, case, stage.ws, stage.pivot, objective, setup.evaluators),
        )
        # Generators are large, so only those that will be rendered are written.
        if target_index < setup.shown:
            tuned_networks = replace(setup.loaded.nets, G=None, D=None, G_ema=stage.generator.module)
            networks.save(folder / f"{file_stem}.safetensors", tuned_networks, only_ema=True)
            storage.write_tensors(folder / f"{file_stem}-ws.safetensors", KIND, {"ws": stage.ws}, {})

    def _checkpoint(self, next_position: tuple[int, ...], stage_state: dict[str, Tensor]) -> None:
        """Write a checkpoint: the state of the current section, and the position of the next step."""
        self.run.checkpoint(
            self.done, stage_state, {"at": list(next_position), "done": self.done, "lines": self.run.lines}
        )

    def records(self) -> list[dict]:
        """Return a record with the measures of each target and arm.

        The entry 'arm' is 'truth' (the ground truth), 'w' (before the second stage), or a weight.
        """
        weight_names = [f"{reward_weight:g}" for reward_weight in self.setup.weights]
        # If the first stage uses the reward, each weight has its own latent before the second stage.
        arm_names = [
            "truth",
            *(
                [f"{weight_name}-w" for weight_name in weight_names]
                if self.setup.config.reward_in_w
                else ["w"]
            ),
            *weight_names,
        ]
        return [
            {
                "target": case.name,
                "arm": arm_name,
                # Measures that version 0.1 wrote get their new names.
                **version_0_1.inversion(json.loads((self.folder(case) / f"{arm_name}.json").read_text())),
            }
            for case in self.setup.cases
            for arm_name in arm_names
        ]


def write_json(json_path: Path, json_record: dict) -> None:
    """Write a record as JSON, atomically and with sorted keys."""
    storage.write_atomic(json_path, (json.dumps(json_record, indent=1, sort_keys=True) + "\n").encode())
