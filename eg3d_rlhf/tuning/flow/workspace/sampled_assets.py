"""Assets of a generator for people to look at, with the latents that they came from: the folders below
WORK/drawn.

    drawn_from.json     all that the assets come from: a folder of others is refused
    00007-2.ply         an asset, of the seventh condition and seed 2, as its family shows it; .txt where it
                        has no surface, and why
    00007-2*            its latents, of all stages, as the flows see them
    ranking.jsonl       a line per asset that can be shown, written last
    prompts.jsonl       what was asked for: a text, or a picture in inputs/, as the labelling page shows it
                        beside a pair

Assets are drawn batch by batch, and over several ranks batch by turns: files do not depend on how many there
are, nor on interruptions. The latents are the sampler's own: pairs made of them are what the networks
themselves would draw, and need no encoding.
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

# ending of a note in place of an asset without a surface
IDENTITY = "drawn_from.json"
NOTHING = ".txt"
Shown = tuple[dict[str, Latent], Asset] | EmptyStructure


def draw(
    pipeline: Pipeline, conditions: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[tuple[dict[str, Latent], Asset]]:
    """Assets of conditions and seeds, [N] each, as generate.generate draws them, with the latents that they
    came from, by stage.

    Raises: EmptyStructure where one of the structures has no voxel.
    """
    given: Sequence[Voxels] = [None] * len(seeds)
    latents: list[dict[str, Latent]] = [{} for _ in seeds]
    for number, stage in enumerate(stages_with(pipeline, models), 1):
        x_0 = stage_latents(pipeline, stage, conditions, seeds, given)
        for of_asset, latent in zip(latents, separate(x_0), strict=True):
            of_asset[stage.name] = latent
        if number < len(pipeline.stages):
            with refusing_empty():
                given = pipeline.advance(stage.name, x_0)
    return list(zip(latents, pipeline.decode(x_0), strict=True))


def draw_or_empty(
    pipeline: Pipeline, conditions: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[Shown]:
    """Sample as `draw` does; a structure without a voxel leaves its error in the asset's place."""
    try:
        return list(draw(pipeline, conditions, seeds, models))
    except EmptyStructure as error:
        if len(seeds) == 1:
            return [error]
    return [
        shown
        for name, seed in zip(conditions, seeds, strict=True)
        for shown in draw_or_empty(pipeline, [name], [seed], models)
    ]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn into a folder. Call `run` on every rank."""

    folder: Path
    pipeline: Any
    family: FlowFamily
    conditions: Sequence[str]
    identity: Mapping  # JSON: all that the assets come from
    each: int = 4
    batch: int = 1
    size: Sequence[int] = ()  # what the family's `show` takes besides, such as cells of a grid
    # lines of prompts.jsonl; an image is the path of a file to put into inputs/
    prompts: Sequence[Mapping] = ()
    ranks: Ranks = field(default_factory=lambda: SINGLE)

    @property
    def jobs(self) -> list[tuple[str, str, int]]:
        """Stem, condition and seed of every asset."""
        return [
            (f"{c:05d}-{seed}", name, seed)
            for c, name in enumerate(self.conditions)
            for seed in range(self.each)
        ]

    def shown(self) -> dict[str, Path]:
        """What there is to look at so far, by stem: files that are written last."""
        there = (
            sorted(path for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else []
        )
        stems = {stem for stem, _, _ in self.jobs}
        return {path.stem: path for path in there if path.stem in stems and path.suffix != ".safetensors"}

    def run(self, on_asset: Callable[[int], object] = lambda n: None) -> "Drawn":
        """Draw what is missing; the list is written by the first rank.

        Raises: ValueError for a folder of other assets, where nothing can be shown, or for a full disk.
        """
        path = self.folder / IDENTITY
        text = json.dumps(self.identity, indent=1, sort_keys=True) + "\n"
        if path.is_file() and path.read_text() != text:
            raise ValueError(
                f"draw: expected {self.folder} as these settings draw it, got assets of others. Move it away,"
                " or a new WORK."
            )
        done = self.shown()
        on_asset(len(done))
        with self._room():
            if self.ranks.main:
                write_atomic(path, text.encode())
            for batch in self._batches(done):
                self._draw(batch, done, on_asset)
            self.ranks.barrier()
            if self.ranks.main and not (self.folder / RANKING).is_file():
                self._list()
            self.ranks.barrier()
        lines = [json.loads(line) for line in (self.folder / RANKING).read_text().splitlines()]
        left = [path.read_text().strip() for path in self.shown().values() if path.suffix == NOTHING]
        return Drawn(count=len(lines), left_out=left)

    def _batches(self, done: Mapping[str, Path]) -> Iterator[list[tuple[str, str, int]]]:
        """Of this rank, those where something is missing; always whole ones, in which numbers come out as
        they would have.
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
        stems, names, seeds = zip(*batch, strict=True)
        for stem, shown in zip(stems, draw_or_empty(self.pipeline, names, seeds), strict=True):
            if stem in done:
                continue
            if isinstance(shown, EmptyStructure):
                write_atomic(self.folder / (stem + NOTHING), f"{shown}\n".encode())
            else:
                latents, asset = shown
                self._write_latents(stem, latents)
                assert isinstance(self.family, Shows)  # asked for where this is made
                self.family.show(asset, self.folder / stem, *self.size)
            on_asset(1)

    def _files(self, stem: str) -> dict[str, str]:
        """Names of the files of an asset's latents, as the list has them."""
        if not isinstance(self.family, WritesLatents):
            return {"latents": f"{stem}.safetensors"}
        return {stage: f"{stem}-{stage}.safetensors" for stage in self.family.stages}

    def _write_latents(self, stem: str, latents: Mapping[str, Latent]) -> None:
        files = self._files(stem)
        if not isinstance(self.family, WritesLatents):
            write_latents(self.folder / files["latents"], latents)
            return
        for stage, latent in latents.items():
            self.family.write_latent(self.folder / files[stage], self.pipeline, stage, latent)

    def _list(self) -> None:
        """Write ranking.jsonl and prompts.jsonl, without what cannot be shown, which gets a note."""
        shown = self.shown()
        for path, why in unfit([path for path in shown.values() if path.suffix in reading.SUFFIXES]).items():
            path.rename(path.with_suffix(path.suffix + ".unfit"))
            write_atomic(path.with_suffix(NOTHING), f"{why}\n".encode())
        shown = self.shown()
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
                f"draw: expected assets with a surface, got none of {len(shown)}: {why} Check the generator's"
                " folder."
            )
        prompts = []
        for prompt in self.prompts:
            if "image" in prompt:
                link(Path(prompt["image"]), self.folder / "inputs" / Path(prompt["image"]).name)
                prompt = {**prompt, "image": f"inputs/{Path(prompt['image']).name}"}
            prompts.append(json.dumps(prompt, ensure_ascii=False) + "\n")
        write_atomic(self.folder / PROMPTS, "".join(prompts).encode())
        write_atomic(self.folder / RANKING, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Says what to do on a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = f"a full disk after {len(self.shown())} of {len(self.jobs)} assets"
            raise ValueError(
                f"draw: expected room in {self.folder}, got {done}. Free some: the same command goes on."
            ) from None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What lies in a folder once all is drawn."""

    count: int  # assets that can be shown
    left_out: Sequence[str] = ()  # why others cannot


def unfit(paths: Sequence[Path]) -> dict[Path, str]:
    """Files that the labelling page cannot show, and why."""
    return {
        path: seen
        for path, seen in zip(paths, reading.looked_at(paths), strict=True)
        if isinstance(seen, str)
    }


def open_pipeline(
    work: Work,
    family: FlowFamily,
    device: torch.device,
    *splits: str,
    tuned: Mapping[str, Path] | None = None,
) -> Any:
    """The generator with the embeddings of some splits alone, in WORK's precision, some of its networks
    tuned.

    Args: tuned: weights by stage, folders or files.
    """
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
    """What WORK draws under a name, of the conditions of some splits.

    Args: cells, few_steps: see the command.
    Raises: ValueError for a family that cannot draw, or what it does not read.
    """
    if not isinstance(family, Shows):
        raise ValueError(
            f"draw: expected a family that shows assets, got {family.name}. See docs/extending.md for a"
            " `show` of its own."
        )
    if cells is not None and family.cells is None:
        raise ValueError(
            f"--cells: belongs to families that read meshes on a grid, not to {family.name}. Leave it out."
        )
    pipeline = open_pipeline(work, family, device, *splits, tuned=tuned)
    shortened = [stage for stage in pipeline.stages if stage.call_step is not None]
    if few_steps and not shortened:
        raise ValueError(
            f"--few-steps: expected a network that reads how long a step is, got none of {family.name}. Leave"
            " it out."
        )
    for stage in shortened if few_steps else ():
        stage.sampling = replace(stage.sampling, steps=few_steps, cfg_strength=0.0, shortcut=True)
    names = work.names(*splits)
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
    pictures = {name: work.folder / "inputs" / file for name, file in work.inputs.items()}
    prompts = [
        {"prompt": name, **({"image": str(pictures[name])} if name in pictures else {"text": name})}
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
