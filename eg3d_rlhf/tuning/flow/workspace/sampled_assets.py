"""Sampling of a generator's assets for people to look at, with their latents: the folders below WORK/drawn.

    drawn_from.json     everything that determines the assets; other assets in the folder are an error
    00007-2.ply         the asset of prompt 7 (counted from 0) and seed 2, in its family's format; a .txt with
                        the reason where it has no surface
    00007-2*            its latents, of all stages, as the flows read them
    ranking.jsonl       a line per asset that can be shown, written last
    prompts.jsonl       the prompts: a text, or an image in inputs/, which the labelling page shows beside a
                        pair

Assets are sampled in batches, which several ranks take in turn. The files depend neither on the number of
ranks nor on interruptions. The latents come from the sampler, so that pairs made of them need no encoding.
"""

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.models.sparse import Latent, separate
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import PROMPTS
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows, StatesFacts, WritesLatents
from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
from eg3d_rlhf.tuning.flow.base.ranking import RANKING, read_latents, write_latents
from eg3d_rlhf.tuning.flow.base.sampling import Models, stage_latents, stages_with
from eg3d_rlhf.tuning.flow.base.stage import Asset, EmptyStructure, Pipeline, Voxels, refusing_empty
from eg3d_rlhf.tuning.flow.families.opening import hash_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from training.distributed import SINGLE, Ranks
from training.storage import write_atomic

IDENTITY = "drawn_from.json"
NOTHING = ".txt"  # suffix of a note in place of an asset without a surface
Shown = tuple[dict[str, Latent], Asset] | EmptyStructure


def draw(
    pipeline: Pipeline, conditions: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[tuple[dict[str, Latent], Asset]]:
    """Sample assets of N prompts and N seeds as sampling.generate does, and keep their latents by stage.

    Raises: EmptyStructure where one of the structures has no voxel.
    """
    # the first stage has no input of an earlier stage
    given: Sequence[Voxels] = [None] * len(seeds)
    latents: list[dict[str, Latent]] = [{} for _ in seeds]
    for number, stage in enumerate(stages_with(pipeline, models), 1):
        x_0 = stage_latents(pipeline, stage, conditions, seeds, given)
        for of_asset, latent in zip(latents, separate(x_0), strict=True):
            of_asset[stage.name] = latent
        # the last stage's latents are decoded instead
        if number < len(pipeline.stages):
            # people should not compare an asset that was made from a substitute voxel
            with refusing_empty():
                given = pipeline.advance(stage.name, x_0)
    return list(zip(latents, pipeline.decode(x_0), strict=True))


def draw_or_empty(
    pipeline: Pipeline, conditions: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[Shown]:
    """Sample as `draw` does, with an EmptyStructure error in the place of an asset without a voxel."""
    try:
        return list(draw(pipeline, conditions, seeds, models))
    except EmptyStructure as error:
        if len(seeds) == 1:
            return [error]
    # the error does not name the sample, so the batch is sampled again one by one
    return [
        shown
        for name, seed in zip(conditions, seeds, strict=True)
        for shown in draw_or_empty(pipeline, [name], [seed], models)
    ]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Assets to sample into a folder. Call `run` on every rank."""

    folder: Path
    pipeline: Any
    family: FlowFamily
    conditions: Sequence[str]
    identity: Mapping  # JSON: everything that determines the assets
    each: int = 4  # assets per prompt, with the seeds 0 to each - 1
    batch: int = 1  # assets sampled at once
    size: Sequence[int] = ()  # further arguments of the family's `show`, such as cells of a grid
    # lines of prompts.jsonl; an image is the path of a file to put into inputs/
    prompts: Sequence[Mapping] = ()
    ranks: Ranks = field(default_factory=lambda: SINGLE)

    @property
    def jobs(self) -> list[tuple[str, str, int]]:
        """List (stem of the files, prompt, seed) of every asset."""
        return [
            (f"{c:05d}-{seed}", name, seed)
            for c, name in enumerate(self.conditions)
            for seed in range(self.each)
        ]

    def shown(self) -> dict[str, Path]:
        """Return the files to look at that exist so far, by stem."""
        # latents are written before the file to look at, so an asset that has one is complete
        there = (
            sorted(path for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else []
        )
        stems = {stem for stem, _, _ in self.jobs}
        return {path.stem: path for path in there if path.stem in stems and path.suffix != ".safetensors"}

    def run(self, on_asset: Callable[[int], object] = lambda n: None) -> "Drawn":
        """Sample the missing assets; the first rank then writes the list.

        Raises: ValueError for a folder of other assets, for assets of which none can be shown, or for a full
            disk.
        """
        path = self.folder / IDENTITY
        text = json.dumps(self.identity, indent=1, sort_keys=True) + "\n"
        # compared as text: keys are sorted, so equal identities have equal texts
        if path.is_file() and path.read_text() != text:
            raise ValueError(
                f"sample: expected {self.folder} to hold assets of these settings, got assets of others. Move"
                " the folder, or make a new WORK."
            )
        done = self.shown()
        on_asset(len(done))
        with self._disk_errors():
            # written before any asset, so that an interrupted folder is recognised
            if self.ranks.main:
                write_atomic(path, text.encode())
            for batch in self._batches(done):
                self._draw(batch, done, on_asset)
            # all assets must exist before the first rank lists them
            self.ranks.barrier()
            if self.ranks.main and not (self.folder / RANKING).is_file():
                self._list()
            self.ranks.barrier()
        lines = [json.loads(line) for line in (self.folder / RANKING).read_text().splitlines()]
        left = [path.read_text().strip() for path in self.shown().values() if path.suffix == NOTHING]
        return Drawn(count=len(lines), left_out=left)

    def _batches(self, done: Mapping[str, Path]) -> Iterator[list[tuple[str, str, int]]]:
        """Yield the batches of this rank in which an asset is missing.

        Batches are always complete: a network's results may depend on the size of the batch.
        """
        jobs = self.jobs
        batches = [jobs[i : i + self.batch] for i in range(0, len(jobs), self.batch)]
        for batch in batches[self.ranks.rank :: self.ranks.world]:
            if any(stem not in done for stem, _, _ in batch):
                yield batch

    def _draw(
        self,
        batch: Sequence[tuple[str, str, int]],
        done: Mapping[str, Path],
        on_asset: Callable[[int], object],
    ) -> None:
        """Sample one batch, and write the assets that are missing."""
        stems, names, seeds = zip(*batch, strict=True)
        for stem, shown in zip(stems, draw_or_empty(self.pipeline, names, seeds), strict=True):
            # the batch was completed for its results; existing files stay as they are
            if stem in done:
                continue
            if isinstance(shown, EmptyStructure):
                write_atomic(self.folder / (stem + NOTHING), f"{shown}\n".encode())
            else:
                latents, asset = shown
                self._write_latents(stem, latents)
                assert isinstance(self.family, Shows)  # checked in `drawing_of`
                self.family.show(asset, self.folder / stem, *self.size)
            on_asset(1)

    def _files(self, stem: str) -> dict[str, str]:
        """Return the names of the files of an asset's latents, under the keys of the list's line."""
        if not isinstance(self.family, WritesLatents):
            return {"latents": f"{stem}.safetensors"}
        return {stage: f"{stem}-{stage}.safetensors" for stage in self.family.stages}

    def _write_latents(self, stem: str, latents: Mapping[str, Latent]) -> None:
        """Write an asset's latents, in the family's format if it has one."""
        files = self._files(stem)
        if not isinstance(self.family, WritesLatents):
            write_latents(self.folder / files["latents"], latents)
            return
        for stage, latent in latents.items():
            self.family.write_latent(self.folder / files[stage], self.pipeline, stage, latent)

    def _list(self) -> None:
        """Write ranking.jsonl and prompts.jsonl; an asset that cannot be shown gets a note, not a line."""
        shown = self.shown()
        for path, why in unfit([path for path in shown.values() if path.suffix in reading.SUFFIXES]).items():
            # kept under another suffix for inspection; the note takes its place
            path.rename(path.with_suffix(path.suffix + ".unfit"))
            write_atomic(path.with_suffix(NOTHING), f"{why}\n".encode())
        shown = self.shown()  # again: unfit files were replaced by notes
        lines = []
        for stem, condition, seed in self.jobs:
            if shown[stem].suffix != NOTHING:
                files = self._files(stem)
                facts = (
                    self.family.facts(self.pipeline, condition, read_latents(self.folder / files["latents"]))
                    if isinstance(self.family, StatesFacts)
                    else {}
                )
                lines.append(
                    {
                        "condition": condition,
                        "rank": None,
                        **files,
                        **facts,
                        "seed": seed,
                        "look_at": shown[stem].name,
                    }
                )
        if not lines:
            why = next(iter(shown.values())).read_text().strip()
            raise ValueError(
                f"sample: expected assets with a surface, got none of {len(shown)}: {why} Check the"
                " generator's folder."
            )
        prompts = []
        for prompt in self.prompts:
            if "image" in prompt:
                link(Path(prompt["image"]), self.folder / "inputs" / Path(prompt["image"]).name)
                prompt = {**prompt, "image": f"inputs/{Path(prompt['image']).name}"}
            prompts.append(json.dumps(prompt, ensure_ascii=False) + "\n")
        # the list is last: its existence means that the folder is complete
        write_atomic(self.folder / PROMPTS, "".join(prompts).encode())
        write_atomic(self.folder / RANKING, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full disk or quota into a ValueError that names the remedy."""
        try:
            yield
        except OSError as error:
            # other errors of the disk have other remedies
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = f"a full disk after {len(self.shown())} of {len(self.jobs)} assets"
            raise ValueError(
                f"sample: expected free space in {self.folder}, got {done}. Free some space, then run the"
                " same command again: it resumes."
            ) from None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Summary of a folder in which all assets were sampled."""

    count: int  # assets that can be shown
    left_out: Sequence[str] = ()  # a reason for each asset that cannot be shown


def unfit(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the files that the labelling page cannot show, with the reasons."""
    return {
        path: examined
        for path, examined in zip(paths, reading.looked_at(paths), strict=True)
        if isinstance(examined, str)  # a text is the reason, anything else the examined file
    }


def open_pipeline(
    work: Work,
    family: FlowFamily,
    device: torch.device,
    *splits: str,
    tuned: Mapping[str, Path] | None = None,
) -> Any:
    """Open the generator with the embeddings of some splits only, in WORK's precision.

    Args: tuned: tuned weights by stage, folders or files, in place of the generator's.
    """
    # weights are held in the precision of the passes
    dtype = torch.bfloat16 if work.precision == "bfloat16" else torch.float32
    pipeline = family.load(Path(work.pipeline), work.conditions(*splits), dtype=dtype, device=device)
    for stage in pipeline.stages:
        stage.precision = chosen_precision(work.precision, device)
        if stage.name in (tuned or {}):
            stage.model = tuned_model(stage.model, (tuned or {})[stage.name])
    return pipeline


def drawing_of(
    work: Work,
    family: FlowFamily,
    name: str,
    splits: Sequence[str],
    device: torch.device,
    ranks: Ranks = SINGLE,
    *,
    tuned: Mapping[str, Path] | None = None,
    cells: int | None = None,
    few_steps: int | None = None,
) -> Drawing:
    """Make the `Drawing` of WORK's folder drawn/NAME, for the prompts of some splits.

    Args: cells, few_steps: see the command.
    Raises: ValueError for a family that cannot show assets, or for a setting that it does not read.
    """
    if not isinstance(family, Shows):
        raise ValueError(
            f"sample: expected a family that shows assets, got {family.name}. Write its method `show`, see"
            " docs/extending.md."
        )
    if cells is not None and family.cells is None:
        raise ValueError(
            f"--cells applies to families that read meshes on a grid, not to {family.name}. Remove --cells."
        )
    pipeline = open_pipeline(work, family, device, *splits, tuned=tuned)
    shortened = [stage for stage in pipeline.stages if stage.call_step is not None]
    if few_steps and not shortened:
        raise ValueError(
            f"--few-steps: expected a network that reads the length of a step, got none in {family.name}."
            " Remove --few-steps."
        )
    # shortcut networks are sampled without guidance, in few long steps
    for stage in shortened if few_steps else ():
        stage.sampling = replace(stage.sampling, steps=few_steps, cfg_strength=0.0, shortcut=True)
    names = work.names(*splits)
    # drawn_from.json of earlier calls is compared with it, so the keys keep their spelling;
    # settings that are not given are left out
    more = {"cells": cells, "few_steps": few_steps}
    identity = {
        "files": {file: digest for file, (digest, *_) in work.files.items()},
        "conditions": hash_of(work.conditions_file),
        "names": names,
        "each": work.each,
        "precision": work.precision,
        "batch": work.batch,
        "tuned": {stage: hash_of(path) for stage, path in (tuned or {}).items()},
        **{k: v for k, v in more.items() if v},
    }
    images = {name: work.folder / "inputs" / file for name, file in work.inputs.items()}
    prompts = [
        {"prompt": name, **({"image": str(images[name])} if name in images else {"text": name})}
        for name in names
    ]
    return Drawing(
        folder=work.drawn(name),
        pipeline=pipeline,
        family=family,
        conditions=names,
        identity=identity,
        each=work.each,
        batch=work.batch,
        size=() if cells is None else (cells,),
        prompts=prompts,
        ranks=ranks,
    )
