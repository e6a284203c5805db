"""Improve many samples of a generator as one job, which can be resumed, and write what it found.

Files in the run folder:

    improved.safetensors    latents after the search (eg3d_rlhf.generators.stored_latents)
    before.safetensors      the same latents before it, in the same order
    improve.json            scores by step, steps used, gate and time of each sample
    before-after-00.png     front and back of 32 samples before and after, further samples in -01 and so on

The checkpoint of the run holds the results of the finished batches.
Shapes: N samples, T steps, L style vectors of a sample, W w_dim.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eg3d_rlhf.experiments.media.rendering import png, render
from eg3d_rlhf.experiments.media.sheet import SUPERSAMPLE, Row, look, paint, sheet, shrink, to_uint8
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import Generator, LoadedGenerator, camera
from eg3d_rlhf.generators.stored_latents import LatentsFile
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.tuning.gan.latent_search import Ascent, Guidance, ascend, join
from eg3d_rlhf.tuning.gan.search_settings import AUTO, SearchConfig
from training import checkpoint
from training.progress import tqdm
from training.storage import write_atomic

STATUS_SECONDS = 20.0  # longest time between two status lines
SHEET_SAMPLES = 32  # samples on one sheet
CELL = 128  # pixels per edge of a cell of a sheet
FRONT_VIEW = (0.45, -0.08)  # yaw and pitch, radians
BACK_VIEW = (math.pi - 0.4, -0.2)
SURFACE_POINTS = 96  # grid points per edge of the surfaces on a sheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs of the job, loaded and checked."""

    loaded: LoadedGenerator
    ws: torch.Tensor  # style vectors before the search, [N, L, W]
    seeds: tuple[int, ...]  # seeds of the latents; () if they came from elsewhere
    psi: float  # truncation of the seeds
    reward: Reward
    heldout_reward: Reward | None
    config: SearchConfig
    batch: int
    sheets: bool = True  # True writes the sheets of images

    @property
    def names(self) -> list[str]:
        """Return a name of each sample for images: its seed, or its number in the file of latents."""
        if self.seeds:
            return [f"seed {seed}" for seed in self.seeds]
        return [f"latent {index}" for index in range(len(self.ws))]


def run_batches(run: Run, setup: Setup) -> tuple[Ascent, float]:
    """Run the batches that the run lacks.

    Returns: the result of all samples; and the raw reward above which the gate leaves samples unchanged.

    Raises: StoppedError if the run is asked to stop. The batch that was interrupted is repeated later.
    """
    done_ascents: list[Ascent] = []
    # Before the clock of the status lines starts, because it takes longer than a sample.
    guidance = Guidance(setup.loaded.generator, setup.reward)
    # A run that is resumed restores the results of its finished batches as one `Ascent`.
    if checkpoint.available(run.folder):
        tensors, meta = run.read()
        done_ascents = [_from_tensors(tensors, meta)]
        run.continue_from(len(done_ascents[0].steps), meta["lines"])
    else:
        run.continue_from(0)
    heldout_reward = setup.heldout_reward
    if heldout_reward is not None:
        # Channels-last is faster, and safe without a gradient.
        heldout_reward = heldout_reward.eval().requires_grad_(False).channels_last()
    # A checkpoint is written after a complete batch only, so this is a multiple of the batch, or all samples.
    done_count = sum(len(ascent.steps) for ascent in done_ascents)
    sample_count = len(setup.ws)
    with run.stoppable(), run.writing():
        for start in range(done_count, sample_count, setup.batch):
            # [n, L, W]; the last batch may be smaller.
            ws_batch = setup.ws[start : start + setup.batch]
            reporter = _StepReporter(run, start, len(ws_batch), sample_count, setup.config.step_count)
            ascent = ascend(
                setup.loaded.generator, ws_batch, guidance, heldout_reward, setup.config, reporter
            )
            # Joined after every batch, since the checkpoint holds one result and not a list.
            done_ascents = [join([*done_ascents, ascent])]
            for index in range(len(ascent.steps)):
                run.stats(
                    {
                        "step": start + index,
                        "name": setup.names[start + index],
                        **sample_scores(ascent, index),
                    }
                )
            tensors, meta = _to_tensors(done_ascents[0])
            # The number of lines of the statistics is saved, too, so
            # that lines after the checkpoint are removed on resuming.
            run.checkpoint(start + len(ws_batch), tensors, {**meta, "lines": run.lines})
            reporter.finish(done_ascents[0])
    return done_ascents[0], guidance.quantile(setup.config.gate_quantile)


class _StepReporter:
    """Status lines inside a batch, and the reaction to a stop signal.

    Args:
        run: run whose status is printed.
        start: number of samples that are done.
        batch_count: number of samples of the batch.
        sample_count: number of all samples.
        step_count: largest number of steps.
    """

    _last_time = -math.inf  # of the last status line of this process

    def __init__(self, run: Run, start: int, batch_count: int, sample_count: int, step_count: int):
        self.run = run
        self.start = start
        self.batch_count = batch_count
        self.sample_count = sample_count
        self.step_count = step_count

    def __call__(self, step: int, running_count: int) -> None:
        """Print a status line if the last one is old, and raise StoppedError if a signal was received."""
        # Between two steps of the search and not only between batches, because a batch may take long.
        if self.run.stop_requested:
            raise StoppedError(
                f"stopped by {self.run.stop_requested} after {self.start} of {self.sample_count} samples"
            )
        if time.monotonic() - _StepReporter._last_time < STATUS_SECONDS:
            return
        # Samples that have stopped are done, the others are done in part.
        # The estimate ignores that samples with `auto` may
        # stop early, so the remaining time is an upper limit.
        done_samples = self.batch_count - running_count + running_count * step / (self.step_count + 1)
        self._print(self.start + done_samples, step)

    def finish(self, ascent: Ascent) -> None:
        """Print a status line after the last batch of the run."""
        if self.start + self.batch_count == self.sample_count:
            self._print(self.sample_count, int(ascent.steps.max()))

    def _print(self, done_samples: float, step: int) -> None:
        _StepReporter._last_time = time.monotonic()
        sample_text = f"{int(done_samples)}/{self.sample_count}"
        self.run.status({"samples": sample_text, "at": step}, done_samples, self.sample_count, "sample")


def _to_tensors(ascent: Ascent) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and JSON values from which `_from_tensors` restores a result."""
    tensors = {
        "ws_before": ascent.ws_before.cpu(),
        # The path is already on the CPU. [N, T + 1, W]
        "path": ascent.path,
        "rewards": torch.from_numpy(ascent.rewards),
        "steps": torch.from_numpy(ascent.steps),
        "gated": torch.from_numpy(ascent.gated),
    }
    if ascent.heldout is not None:
        tensors["heldout"] = torch.from_numpy(ascent.heldout)
    return tensors, {"seconds": ascent.seconds}


def _from_tensors(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> Ascent:
    """Restore the result that `_to_tensors` converted."""
    return Ascent(
        ws_before=tensors["ws_before"],
        path=tensors["path"],
        rewards=tensors["rewards"].numpy(),
        heldout=tensors["heldout"].numpy() if "heldout" in tensors else None,
        steps=tensors["steps"].numpy(),
        gated=tensors["gated"].numpy(),
        seconds=meta["seconds"],
    )


def sample_scores(ascent: Ascent, index: int) -> dict[str, Any]:
    """Return the scores of one sample by step, its number of steps, and its gate, as JSON values."""
    scores: dict[str, Any] = {
        "steps": int(ascent.steps[index]),
        "gated": bool(ascent.gated[index]),
        "reward": _without_nan(ascent.rewards[index]),
    }
    if ascent.heldout is not None:
        scores["heldout"] = _without_nan(ascent.heldout[index])
    return scores


def _without_nan(scores: np.ndarray) -> list[float]:
    """Return the scores of the steps that a sample made. Those after its end are NaN."""
    # JSON has no NaN, so these values must not be written.
    return [float(score) for score in scores[np.isfinite(scores)]]


def summarise(setup: Setup, ascent: Ascent, threshold: float) -> dict[str, Any]:
    """Return the content of improve.json.

    Args:
        setup: inputs of the job.
        ascent: result of all samples.
        threshold: raw reward above which the gate leaves samples unchanged.
    """
    # null in the file if the gate is off
    gate = {"quantile": setup.config.gate_quantile, "threshold": threshold} if setup.config.gate else None
    summary: dict[str, Any] = {
        "generator": setup.loaded.hash,
        "seeds": list(setup.seeds),
        "psi": setup.psi,
        "search": dataclasses.asdict(setup.config),
        "gate": gate,
        "gated": int(ascent.gated.sum()),
        "mean_steps": float(ascent.steps.mean()),
        "reward": _change(ascent.rewards, ascent.steps),
        "heldout": None if ascent.heldout is None else _change(ascent.heldout, ascent.steps),
        "seconds_a_sample": ascent.seconds / len(ascent.steps),
        "samples": [
            {"name": sample_name, **sample_scores(ascent, index)}
            for index, sample_name in enumerate(setup.names)
        ],
    }
    return summary


def _change(scores: np.ndarray, steps: np.ndarray) -> dict[str, float]:
    """Return the mean score before and after, and the share of samples whose score fell.

    Args: scores: scores by step, [N, T + 1]; steps: numbers of steps of the results, [N].
    """
    # [N, T + 1] -> [N]: the score of the step that is the result.
    after = scores[np.arange(len(steps)), steps]
    return {
        "before": float(scores[:, 0].mean()),
        "after": float(after.mean()),
        # A sample without steps has equal scores and does not count as fallen.
        "fell": float((after < scores[:, 0]).mean()),
    }


def summary_sentences(summary: dict[str, Any]) -> list[str]:
    """Return sentences on the result for the terminal.

    Args: summary: content of improve.json.
    """
    sample_count = len(summary["samples"])
    reward = summary["reward"]
    sentences = [
        f"{sample_count} samples, {summary['mean_steps']:.1f} steps and"
        f" {summary['seconds_a_sample']:.1f} seconds a sample; reward {reward['before']:.3f} to"
        f" {reward['after']:.3f}."
    ]
    if summary["gate"] is not None:
        sentences.append(
            f"The gate left {summary['gated']} samples unchanged, whose reward was above"
            f" {summary['gate']['threshold']:.3f} (quantile {summary['gate']['quantile']:g} of the scores of"
            " the generator's samples)."
        )
    heldout = summary["heldout"]
    if heldout is None:
        sentences.append(
            "No held-out reward was given, so over-optimisation would not be noticed. Compare the images."
        )
    else:
        sentences.append(
            f"Held-out reward {heldout['before']:.3f} to {heldout['after']:.3f}; it fell for"
            f" {heldout['fell']:.0%} of the samples."
        )
        # With `auto`, the best step is kept, whose held-out reward cannot be below that of step 0.
        if summary["search"]["steps"] != AUTO and heldout["fell"] > 0.1:
            sentences.append("That is over-optimisation: use fewer steps, or --steps=auto.")
    return sentences


def write_latents(folder: Path, setup: Setup, ascent: Ascent) -> None:
    """Write the latents before and after the search, in the same order."""
    facts = {"search": dataclasses.asdict(setup.config)}
    for file_name, ws, file_facts in (
        # Both files have the same order, so that a blind comparison can pair their latents by index.
        ("before.safetensors", setup.ws, {}),
        ("improved.safetensors", ascent.ws, facts),
    ):
        LatentsFile.of(setup.loaded, ws, setup.seeds, psi=setup.psi, facts=file_facts).save(
            folder / file_name
        )


def write_sheets(folder: Path, setup: Setup, ascent: Ascent) -> list[str]:
    """Render each sample before and after the search, and write the sheets. Return the names of the files.

    A sample that did not change is rendered once.
    """
    generator = setup.loaded.generator
    ws_after = ascent.ws
    names = setup.names
    file_names: list[str] = []
    rows: list[Row] = []
    for index in tqdm(range(len(names)), desc="images", unit="sample"):
        step_count = int(ascent.steps[index])
        # [1, L, W]: one sample at a time, because full renders of a batch may not fit into GPU memory.
        before_cells = sample_images(generator, setup.ws[index : index + 1])
        after_cells = sample_images(generator, ws_after[index : index + 1]) if step_count else before_cells
        reward_before = ascent.rewards[index, 0]
        reward_after = ascent.rewards[index, step_count]
        change_text = "gate" if ascent.gated[index] else f"{step_count} steps"
        rows.append(
            Row(
                cells=[before_cells[0], after_cells[0], before_cells[1], after_cells[1]],
                name=names[index],
                more=f"{change_text}; reward {reward_before:.2f} to {reward_after:.2f}",
                captions=["before", "after", "before", "after"],
            )
        )
        # A sheet is written as soon as it is full, so memory does not grow with the number of samples.
        if len(rows) == SHEET_SAMPLES or index + 1 == len(names):
            file_names.append(f"before-after-{len(file_names):02d}.png")
            sheet_image = sheet("", rows, name_width=230, note="Image and shape from the back.")
            write_atomic(folder / file_names[-1], png(sheet_image))
            rows = []
    return file_names


@torch.no_grad()
def sample_images(generator: Generator, ws: torch.Tensor) -> list[np.ndarray]:
    """Return the image of a sample and its shape from the back, uint8 [CELL, CELL, 3] each.

    Args: ws: style vectors [1, L, W].
    """
    front_image = render(generator, ws, [camera(generator, *FRONT_VIEW)])[0]
    # The surface without colours shows geometric errors that the renderer's texture hides.
    surface = LevelSet.from_field(generator.field(ws), SURFACE_POINTS)
    # Rendered larger and then reduced, which smooths the edges.
    back_view = look(surface, camera(generator, *BACK_VIEW), CELL * SUPERSAMPLE)
    return [
        np.asarray(Image.fromarray(front_image).resize((CELL, CELL), Image.Resampling.LANCZOS)),
        to_uint8(shrink(paint(back_view)).cpu()),
    ]
