"""Run many inversions as one job: for every target the latent once, then the generator once per weight of the
reward. The job can be resumed at every step.

    targets/<name>/w.safetensors             the first stage's result, which the weights share
    targets/<name>/<weight>.json             measures at a weight ('0', '0.01', ...), at 'w'
                                             (before the second stage) and of the ground truth
    targets/<name>/<weight>.safetensors      the tuned generator, for targets that are rendered; its
                                             latent is in <weight>-ws

The run's checkpoint holds the current stage. Letters: L layers of ws, W w_dim.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eg3d_rlhf.evaluation.inversion import projector
from eg3d_rlhf.evaluation.inversion.targets import Case, Evaluators, measure, measure_truth
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import LoadedGenerator
from training import checkpoint, networks, storage

EVERY = 32  # steps between two checkpoints, and between two status lines
KIND = "inversion"  # type of the files that hold a latent
Stage = projector.LatentStage | projector.PivotalStage


class Leg(NamedTuple):
    """Part of a target's inversion: steps first..last-1 of a stage."""

    stage: str  # 'w' or 'pivot'
    weight: float | None  # of the reward; None for the part that all weights share
    first: int
    last: int


def legs(config: projector.InversionConfig, weights: Sequence[float]) -> list[Leg]:
    """List the parts of one target's inversion in order."""
    # The reward acts in the second half of the first stage at most, so the first half is shared by all
    # weights.
    shared = config.w_steps // 2 if config.reward_in_w else config.w_steps
    parts = [Leg("w", None, 0, shared)]
    for weight in weights:
        parts += [Leg("w", weight, shared, config.w_steps)] if shared < config.w_steps else []
        parts.append(Leg("pivot", weight, 0, config.pivot_steps))
    return parts


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs of an inversion, loaded and checked."""

    loaded: LoadedGenerator
    perceptual: projector.Perceptual
    prior: projector.Prior
    guidance: projector.Guidance | None
    evaluators: Evaluators
    cases: Sequence[Case]
    weights: Sequence[float]
    config: projector.InversionConfig
    from_truth: bool = False  # start from the ground-truth latents
    shown: int = 1  # number of targets whose generators are kept for rendering

    @property
    def steps(self) -> int:
        """Return the number of steps of all targets."""
        return len(self.cases) * sum(leg.last - leg.first for leg in legs(self.config, self.weights))


class Inversions:
    """Loop over targets and their parts. Args: run: entered; setup: the inputs."""

    def __init__(self, run: Run, setup: Setup):
        self.run = run
        self.setup = setup
        self.done = 0  # steps
        self.legs = legs(setup.config, setup.weights)

    def folder(self, case: Case) -> Path:
        """Return the folder of a target's results."""
        return self.run.folder / "targets" / case.name

    def go(self) -> None:
        """Run everything that is not done yet. Raises: StoppedError."""
        position: tuple[int, ...] = (0, 0, 0)  # target, part, step
        state: dict[str, Tensor] = {}
        if checkpoint.available(self.run.folder):
            # The checkpoint says where the last run stopped; files of finished parts are on disk.
            state, meta = self.run.read()
            position = tuple(meta["at"])
            self.done = meta["done"]
            self.run.go_on(self.done, meta["lines"])
        else:
            self.run.begin()
            self.run.go_on(0)
        with self.run.stoppable(), self.run.writing():
            for i, case in enumerate(self.setup.cases):
                # Finished targets are skipped; only the first one left uses the stored state.
                if i < position[0]:
                    continue
                self._target(
                    i, case, position[1:] if i == position[0] else (0, 0), state if i == position[0] else {}
                )

    def _target(self, i: int, case: Case, at: tuple[int, ...], state: dict[str, Tensor]) -> None:
        """Run the parts of target i, starting at part at[0], step at[1], whose state is given."""
        setup = self.setup
        folder = self.folder(case)
        # At the target's very start
        if at == (0, 0):
            write_json(folder / "truth.json", measure_truth(setup.loaded.generator, case, setup.evaluators))
        objective = projector.Objective(setup.config, case.target, setup.perceptual, setup.guidance)
        for j, leg in enumerate(self.legs):
            if j < at[0]:
                continue
            stage = self._stage(leg, case, objective)
            # Only the part that was interrupted has a state.
            if j == at[0] and at[1]:
                stage.restore(state)
            self._steps(stage, leg, (i, j), at[1] if j == at[0] else leg.first, case)
            self._finish(stage, leg, i, objective)
            # The next position is stored without a state: that part starts from files.
            self._checkpoint((i, j + 1, 0) if j + 1 < len(self.legs) else (i + 1, 0, 0), {})

    def _stage(self, leg: Leg, case: Case, objective: projector.Objective) -> Stage:
        """Create a part's stage, from the files of the parts before it."""
        generator = self.setup.loaded.generator
        weight = leg.weight or 0.0
        if leg.stage == "pivot":
            weight_file = self.folder(case) / f"{weight:g}-w.safetensors"
            # The latent of this weight if the reward acted on it, else the shared one
            source = weight_file if self.setup.config.reward_in_w else self.folder(case) / "w.safetensors"
            return projector.PivotalStage(
                generator,
                objective,
                # to the target's device and dtype
                storage.read_tensors(source, KIND)[0]["ws"].to(case.target.image),
                weight,
            )
        # A control of the method: start at the solution.
        start = case.truth.ws if self.setup.from_truth and case.truth is not None else None
        stage = projector.LatentStage(generator, objective, self.setup.prior, start, weight)
        # The second half continues the optimiser's state of the shared first half.
        if leg.first:
            stage.restore(storage.read_tensors(self.folder(case) / "w.safetensors", KIND)[0])
        return stage

    def _steps(self, stage: Stage, leg: Leg, place: tuple[int, int], first: int, case: Case) -> None:
        """Make the steps of a part, with logs, checkpoints and stops."""
        name = leg.stage if leg.weight is None else f"{leg.stage} {leg.weight:g}"
        for step in range(max(first, leg.first), leg.last):
            values = stage.step(step)
            self.run.stats(
                {"target": case.name, "stage": leg.stage, "weight": leg.weight, "step": step, **values}
            )
            self.done += 1
            # A stop request is obeyed after a complete step.
            if self.run.stop_requested:
                self._checkpoint((*place, step + 1), stage.state())
                raise StoppedError(
                    f"stopped by {self.run.stop_requested} at {case.name}, {name}, step {step + 1}"
                )
            # The last step of a part needs no state: `_target` stores the position after it.
            if (step + 1) % EVERY == 0 or step + 1 == leg.last:
                at = {
                    "target": f"{place[0] + 1}/{len(self.setup.cases)} {case.name}",
                    "stage": f"{name:<10}",
                    "at": f"{step + 1:<4}",
                }
                self.run.status(at, self.done, self.setup.steps, "step", {"mse": f"{values['mse']:.2e}"})
                if step + 1 < leg.last:
                    self._checkpoint((*place, step + 1), stage.state())

    def _finish(self, stage: Stage, leg: Leg, i: int, objective: projector.Objective) -> None:
        """Write the results of a part: the latent or the generator, and the measures."""
        setup = self.setup
        case = self.setup.cases[i]
        generator = self.setup.loaded.generator
        folder = self.folder(case)
        if isinstance(stage, projector.LatentStage):
            name = "w" if leg.weight is None else f"{leg.weight:g}-w"
            storage.write_tensors(folder / f"{name}.safetensors", KIND, stage.state(), {})
            # Only the shared first half: the measures follow after the second half.
            if leg.last < setup.config.w_steps:
                return
            with torch.no_grad():
                # The density before the second stage is its own reference, so `moved` is 0 here.
                pivot = generator.field(stage.ws).density_grid(projector.cube_of(generator))
            write_json(
                folder / f"{name}.json",
                measure(generator, case, stage.ws.detach(), pivot, objective, setup.evaluators),
            )
            return
        name = f"{leg.weight:g}"
        write_json(
            folder / f"{name}.json",
            measure(stage.generator, case, stage.ws, stage.pivot, objective, setup.evaluators),
        )
        # Generators are large; only those that are rendered are kept.
        if i < setup.shown:
            tuned = replace(setup.loaded.nets, G=None, D=None, G_ema=stage.generator.module)
            networks.save(folder / f"{name}.safetensors", tuned, only_ema=True)
            storage.write_tensors(folder / f"{name}-ws.safetensors", KIND, {"ws": stage.ws}, {})

    def _checkpoint(self, at: tuple[int, ...], state: dict[str, Tensor]) -> None:
        """Write the state of the current part, and the position of the next step."""
        # `at` is where the next run continues.
        self.run.checkpoint(self.done, state, {"at": list(at), "done": self.done, "lines": self.run.lines})

    def records(self) -> list[dict]:
        """Return one record per target and arm: the measures, with 'target' and 'arm' ('truth', 'w', or a
        weight).
        """
        weight_names = [f"{weight:g}" for weight in self.setup.weights]
        arms = [
            "truth",
            *([f"{name}-w" for name in weight_names] if self.setup.config.reward_in_w else ["w"]),
            *weight_names,
        ]
        return [
            {
                "target": case.name,
                "arm": arm,
                # Measures that version 0.1 wrote are read under their new names.
                **version_0_1.inversion(json.loads((self.folder(case) / f"{arm}.json").read_text())),
            }
            for case in self.setup.cases
            for arm in arms
        ]


def write_json(path: Path, record: dict) -> None:
    """Write a record as JSON, atomically and with sorted keys."""
    storage.write_atomic(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
