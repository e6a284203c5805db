"""Sampling of a generator's assets for people to look at, with their latents.

Each folder below drawn/ of a work folder contains:

    drawn_from.json     everything that determines the assets
    00007-2.ply         asset of prompt 7 (counted from 0) and seed 2, in its family's format; for an asset
                        without a surface, 00007-2.txt with the reason
    00007-2*            latents of the asset for all stages
    examined.jsonl      files that were examined for the labelling page, see label/assets/examinations.py
    ranking.jsonl       list with one line for each asset that can be shown; written last
    prompts.jsonl       prompts, which the labelling page shows beside a pair: texts, or images in inputs/

Assets are sampled in batches, which distributed ranks take in turn. The files depend neither on the number of
ranks nor on interruptions, except for the times in examined.jsonl. The
latents are those of the sampler, so assets need not be encoded to make pairs
of latents.
"""

import contextlib
import errno
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.models.sparse import Batch, Latent, separate
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import PROMPTS
from eg3d_rlhf.people.label.assets.examinations import examine_and_record
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows, StatesFacts, WritesLatents
from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
from eg3d_rlhf.tuning.flow.base.ranking import RANKING, read_latents, write_latents
from eg3d_rlhf.tuning.flow.base.sampling import Models, stage_latents, stages_with
from eg3d_rlhf.tuning.flow.base.stage import Asset, EmptyStructure, Pipeline, Voxels, rejecting_empty
from eg3d_rlhf.tuning.flow.families.opening import hash_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import BASE, Work
from training.distributed import SINGLE, Ranks
from training.progress import tqdm
from training.storage import write_atomic

IDENTITY = "drawn_from.json"
# Name of the file of an asset that people look at, or of the note why there is none; see the module.
_SHOWN_NAME = re.compile(r"\d{5,}-\d+\.(?!safetensors)[a-z]+")
NOTHING = ".txt"  # suffix of the note that is written for an asset without a surface
# Result of sampling one asset: its latents by stage and the asset, or the error for an empty structure.
Shown = tuple[dict[str, Latent], Asset] | EmptyStructure


def draw(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[tuple[dict[str, Latent], Asset]]:
    """Sample N assets as `sampling.generate` does, and return each with its latents.

    Args:
        pipeline: generator.
        prompts: N prompts.
        seeds: N seeds of the noise.
        models: name of a stage -> network to use in place of the stage's own; None for no other networks.
    Returns: for each asset, its latents (name of a stage -> latent) and the asset.
    Raises: EmptyStructure if a structure between two stages has no voxel.
    """
    stage_voxels: Sequence[Voxels] = [None] * len(seeds)  # the first stage has no input
    latents: list[dict[str, Latent]] = [{} for _ in seeds]
    for stage_number, stage in enumerate(stages_with(pipeline, models), 1):
        x_0 = stage_latents(pipeline, stage, prompts, seeds, stage_voxels)
        for asset_latents, latent in zip(latents, separate(x_0), strict=True):
            asset_latents[stage.name] = latent
        # The latents of the last stage are decoded below.
        if stage_number < len(pipeline.stages):
            # Without this context an empty structure would be replaced by its most probable voxel. People
            # should not compare such assets.
            with rejecting_empty():
                stage_voxels = pipeline.advance(stage.name, x_0)
    return list(zip(latents, pipeline.decode(x_0), strict=True))


def draw_or_empty(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> list[Shown]:
    """Sample N assets as `draw` does, with the error EmptyStructure in place of an asset without voxels.

    The arguments are those of `draw`.
    """
    try:
        return list(draw(pipeline, prompts, seeds, models))
    except EmptyStructure as error:
        if len(seeds) == 1:
            return [error]
    # The error does not say which sample is empty, so the samples are computed again one by one.
    assets_or_errors: list[Shown] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        assets_or_errors += draw_or_empty(pipeline, [prompt], [seed], models)
    return assets_or_errors


def draw_each(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], models: Models | None = None
) -> Iterator[Shown]:
    """Sample N assets, each by itself, and yield them with their latents, or the error EmptyStructure.

    All assets go through a stage before the next stage begins, so that `models` may hold only the network of
    the present stage in memory. The arguments are those of `draw`.
    """
    voxels: list[Sequence[Voxels]] = [[None] for _ in seeds]  # the first stage has no input
    latents: list[dict[str, Latent]] = [{} for _ in seeds]
    last_latents: list[Batch | EmptyStructure | None] = [None for _ in seeds]
    for stage_number, stage in enumerate(stages_with(pipeline, models), 1):
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if isinstance(last_latents[i], EmptyStructure):
                continue
            x_0 = stage_latents(pipeline, stage, [prompt], [seed], voxels[i])
            last_latents[i] = x_0
            (latents[i][stage.name],) = separate(x_0)
            # The latents of the last stage are decoded below.
            if stage_number < len(pipeline.stages):
                try:
                    with rejecting_empty():
                        voxels[i] = pipeline.advance(stage.name, x_0)
                except EmptyStructure as error:
                    last_latents[i] = error
    for asset_latents, x_0_or_error in zip(latents, last_latents, strict=True):
        if isinstance(x_0_or_error, EmptyStructure):
            yield x_0_or_error
        else:
            yield asset_latents, pipeline.decode(x_0_or_error)[0]


@dataclass(frozen=True, kw_only=True)
class AssetSampling:
    """Set of assets to sample into a folder. `run` samples the assets, and is called on every rank."""

    folder: Path  # folder below drawn/
    pipeline: Any  # generator
    family: FlowFamily  # family of the generator
    prompt_names: Sequence[str]  # prompts
    identity: Mapping  # values for JSON that determine the assets
    each: int = 4  # number of assets of each prompt, with the seeds 0 to each - 1
    batch: int = 1  # number of assets that are sampled together
    size: Sequence[
        int
    ] = ()  # additional arguments of the family's `show`, such as the number of cells of a grid
    # Lines of prompts.jsonl. Their entry "image" is the path of a file, which is linked into inputs/.
    prompts: Sequence[Mapping] = ()
    # stems of the file names of the assets to sample; None: all. The others can be sampled later.
    stems: Collection[str] | None = None
    ranks: Ranks = field(default_factory=lambda: SINGLE)  # distributed ranks

    @property
    def jobs(self) -> list[tuple[str, str, int]]:
        """Triples (stem of the file names, prompt, seed) of all assets."""
        return [
            (f"{prompt_number:05d}-{seed}", name, seed)
            for prompt_number, name in enumerate(self.prompt_names)
            for seed in range(self.each)
        ]

    def shown(self) -> dict[str, Path]:
        """Return the assets that are sampled so far: stem -> file to look at, or note why there is none."""
        paths = []
        if self.folder.is_dir():
            paths = sorted(path for path in self.folder.iterdir() if path.is_file())
        stems = {stem for stem, _, _ in self.jobs}
        # The latents (.safetensors) of an asset are written before its file to look at, so an asset with such
        # a file is complete.
        return {path.stem: path for path in paths if path.stem in stems and path.suffix != ".safetensors"}

    def run(self, on_asset: Callable[[int], object] = lambda n: None) -> "SamplingSummary":
        """Sample the assets that are missing in the folder; rank 0 then writes ranking.jsonl.

        Args:
            on_asset: function that is called with the number of assets that were added since its last call.
        Raises: ValueError if the folder contains assets of other settings, if none of the assets can be
            shown, or if the disk is full.
        """
        path = self.folder / IDENTITY
        identity_json = json.dumps(self.identity, indent=1, sort_keys=True) + "\n"
        # Compared as text, which is possible because the keys are sorted.
        if path.is_file() and path.read_text() != identity_json:
            raise ValueError(
                f"sample: {self.folder} contains assets of other settings than the present ones. Move that"
                " folder away, or make a new work folder with `eg3d-rlhf flow new`."
            )
        existing_assets = self.shown()
        on_asset(len(existing_assets))
        with self._disk_errors():
            # Written before the first asset, so that the settings of an interrupted folder are known.
            if self.ranks.is_main:
                write_atomic(path, identity_json.encode())
            for batch in self._batches(existing_assets):
                self._draw(batch, existing_assets, on_asset)
            # Rank 0 lists the assets of all ranks, so it waits until they are written.
            self.ranks.barrier()
            if self.ranks.is_main and not self._is_listed():
                self._list()
            self.ranks.barrier()
        lines = [json.loads(line) for line in (self.folder / RANKING).read_text().splitlines()]
        reasons = [path.read_text().strip() for path in self.shown().values() if path.suffix == NOTHING]
        return SamplingSummary(count=len(lines), left_out=reasons)

    def _batches(self, existing_assets: Mapping[str, Path]) -> Iterator[list[tuple[str, str, int]]]:
        """Yield the batches of this rank in which at least one asset is missing.

        A batch also contains its existing assets, because the results of a network may depend on the size of
        the batch.
        """
        jobs = self.jobs
        batches = [jobs[i : i + self.batch] for i in range(0, len(jobs), self.batch)]
        # Ranks take the batches in turn.
        for batch in batches[self.ranks.rank :: self.ranks.world]:
            if any(
                stem not in existing_assets and (self.stems is None or stem in self.stems)
                for stem, _, _ in batch
            ):
                yield batch

    def _draw(
        self,
        batch: Sequence[tuple[str, str, int]],
        existing_assets: Mapping[str, Path],
        on_asset: Callable[[int], object],
    ) -> None:
        """Sample one batch of assets, and write the files of those assets that do not exist yet.

        Args:
            batch: (stem of the file names, prompt, seed) of each asset.
            existing_assets: files of the assets that exist: stem -> path.
            on_asset: function that is called with 1 after each new asset.
        """
        stems, prompts, seeds = zip(*batch, strict=True)
        assets_or_errors = draw_or_empty(self.pipeline, prompts, seeds)
        for stem, asset_or_error in zip(stems, assets_or_errors, strict=True):
            if stem in existing_assets:
                continue
            if isinstance(asset_or_error, EmptyStructure):
                write_atomic(self.folder / (stem + NOTHING), f"{asset_or_error}\n".encode())
            else:
                latents, asset = asset_or_error
                self._write_latents(stem, latents)
                assert isinstance(self.family, Shows)  # checked in `make_sampling`
                self.family.show(asset, self.folder / stem, *self.size)
            on_asset(1)

    def _files(self, stem: str) -> dict[str, str]:
        """Return the file names of an asset's latents: key in the line of ranking.jsonl -> file name."""
        if not isinstance(self.family, WritesLatents):
            return {"latents": f"{stem}.safetensors"}
        return {stage: f"{stem}-{stage}.safetensors" for stage in self.family.stages}

    def _write_latents(self, stem: str, latents: Mapping[str, Latent]) -> None:
        """Write the latents of an asset, in the family's own format if the family has one."""
        latent_files = self._files(stem)
        if not isinstance(self.family, WritesLatents):
            write_latents(self.folder / latent_files["latents"], latents)
            return
        for stage, latent in latents.items():
            self.family.write_latent(self.folder / latent_files[stage], self.pipeline, stage, latent)

    def _is_listed(self) -> bool:
        """Return True if ranking.jsonl exists, and lists all assets that are sampled so far."""
        path = self.folder / RANKING
        if not path.is_file():
            return False
        shown_files = self.shown()
        empty_count = sum(path.suffix == NOTHING for path in shown_files.values())
        return len(path.read_text().splitlines()) + empty_count >= len(shown_files)

    def _list(self) -> None:
        """Write ranking.jsonl and prompts.jsonl.

        An asset that the labelling page cannot show has no line in ranking.jsonl, but a note with the reason.
        """
        mesh_files = [path for path in self.shown().values() if path.suffix in reading.SUFFIXES]
        with tqdm(
            total=len(mesh_files), desc=f"examining {self.folder.name}", unit="file", leave=False
        ) as bar:
            reasons = unfit(mesh_files, lambda done: bar.update(done - bar.n))
        for path, reason in reasons.items():
            # The file is renamed and not deleted, so that users can inspect it.
            path.rename(path.with_suffix(path.suffix + ".unfit"))
            write_atomic(path.with_suffix(NOTHING), f"{reason}\n".encode())
        shown_files = self.shown()  # now with notes in place of the renamed files
        lines = []
        for stem, condition, seed in self.jobs:
            # a part of the assets may be sampled later
            if stem in shown_files and shown_files[stem].suffix != NOTHING:
                latent_files = self._files(stem)
                facts: Mapping = {}
                if isinstance(self.family, StatesFacts):
                    latents = read_latents(self.folder / latent_files["latents"])
                    facts = self.family.facts(self.pipeline, condition, latents)
                lines.append(
                    {
                        "condition": condition,
                        "rank": None,
                        **latent_files,
                        **facts,
                        "seed": seed,
                        "look_at": shown_files[stem].name,
                    }
                )
        if not lines:
            reason = next(iter(shown_files.values())).read_text().strip()
            raise ValueError(
                f"sample: none of the {len(shown_files)} assets can be shown. The first reason is: {reason}"
                " Use a generator whose files are complete; eg3d-rlhf flow check tests its folder."
            )
        prompt_lines = []
        for prompt in self.prompts:
            if "image" in prompt:
                link(Path(prompt["image"]), self.folder / "inputs" / Path(prompt["image"]).name)
                prompt = {**prompt, "image": f"inputs/{Path(prompt['image']).name}"}
            prompt_lines.append(json.dumps(prompt, ensure_ascii=False) + "\n")
        # The list is written last, because its existence shows that the folder is complete.
        write_atomic(self.folder / PROMPTS, "".join(prompt_lines).encode())
        write_atomic(self.folder / RANKING, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert the errors of a full disk or an exhausted quota to a ValueError that says what to do."""
        try:
            yield
        except OSError as error:
            # Other errors of the disk have other remedies.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"sample: the disk with {self.folder} is full after {len(self.shown())} of {len(self.jobs)}"
                " assets. Free some space, and run the same command again, which resumes the sampling."
            ) from None


def count_assets(work: Work, name: str = BASE) -> int:
    """Count the assets that are sampled so far in the folder drawn/NAME, also those without a surface."""
    return len(_sampled_files(work, name))


def count_empty(work: Work, name: str = BASE) -> int:
    """Count the sampled assets in the folder drawn/NAME that have a note instead of a surface."""
    return sum(NOTHING in suffixes for suffixes in _sampled_files(work, name).values())


def _sampled_files(work: Work, name: str) -> dict[str, set[str]]:
    """Return the files of the assets that people look at in drawn/NAME: stem -> suffixes."""
    folder = work.asset_folder(name)
    suffixes: dict[str, set[str]] = {}
    # Files of latents have other names in some families, so files are recognised as `shown` does it.
    for path in folder.iterdir() if folder.is_dir() else ():
        if _SHOWN_NAME.fullmatch(path.name):
            suffixes.setdefault(path.name.partition(".")[0], set()).add(path.suffix)
    return suffixes


@dataclass(frozen=True, kw_only=True)
class SamplingSummary:
    """Summary of a folder in which all assets are sampled."""

    count: int  # number of assets that can be shown
    left_out: Sequence[str] = ()  # reasons for which the other assets cannot be shown


def unfit(paths: Sequence[Path], on_progress: Callable[[int], None] = lambda done: None) -> dict[Path, str]:
    """Return the files that the labelling page cannot show: path -> reason.

    The examinations are recorded in the folder of the files, so that a stopped run resumes, and the labelling
    page need not examine the files again.

    Args:
        paths: paths of the files.
        on_progress: function that is called with the number of examined files.
    """
    paths_and_results = zip(paths, examine_and_record(paths, on_progress), strict=True)
    # The result for a file that can be shown is an object, and for any other file the reason as a text.
    return {path: examination for path, examination in paths_and_results if isinstance(examination, str)}


def open_pipeline(
    work: Work,
    family: FlowFamily,
    device: torch.device,
    *splits: str,
    tuned_weights: Mapping[str, Path] | None = None,
) -> Any:
    """Open the generator of a work folder, with the embeddings of the named splits only.

    Args:
        work: work folder, which determines the precision.
        family: family of the generator.
        device: device of the generator.
        splits: names of splits; without names, all splits.
        tuned_weights: name of a stage -> folder or file with tuned weights; stages without an entry, or all
            stages if None, have the generator's own weights.
    """
    # The weights have the data type of the forward passes.
    dtype = torch.bfloat16 if work.precision == "bfloat16" else torch.float32
    pipeline = family.load(Path(work.pipeline), work.conditioning(*splits), dtype=dtype, device=device)
    for stage in pipeline.stages:
        stage.precision = chosen_precision(work.precision, device)
        if stage.name in (tuned_weights or {}):
            stage.model = tuned_model(stage.model, (tuned_weights or {})[stage.name])
    return pipeline


def make_sampling(
    work: Work,
    family: FlowFamily,
    name: str,
    splits: Sequence[str],
    device: torch.device,
    ranks: Ranks = SINGLE,
    *,
    tuned_weights: Mapping[str, Path] | None = None,
    cells: int | None = None,
    few_steps: int | None = None,
    stems: Collection[str] | None = None,
) -> AssetSampling:
    """Open the generator, and return the set of assets to sample into the folder drawn/NAME of a work folder.

    Args:
        work: work folder.
        family: family of the generator.
        name: name of the folder below drawn/.
        splits: names of the splits whose prompts are sampled.
        device: device of the generator.
        ranks: distributed ranks.
        tuned_weights: name of a stage -> folder or file with tuned weights; None for the untuned generator.
        cells: number of cells per axis of the grid on which surfaces are extracted; None for the family's
            default.
        few_steps: number of steps with which shortcut networks (networks that read the length of a step) are
            sampled without guidance; None for the settings of the stages.
        stems: stems of the file names of the assets to sample; None for all.
    Raises: ValueError if the family cannot write assets to look at, or does not use `cells` or `few_steps`.
    """
    if not isinstance(family, Shows):
        raise ValueError(
            f"sample: the family {family.name} cannot write assets to look at. Add the method `show` to it,"
            " see docs/extending.md."
        )
    if cells is not None and family.cells is None:
        raise ValueError(
            f"--cells has no effect on generators of the family {family.name}, whose surfaces are not"
            " extracted on a grid. Remove --cells."
        )
    pipeline = open_pipeline(work, family, device, *splits, tuned_weights=tuned_weights)
    shortcut_stages = [stage for stage in pipeline.stages if stage.call_step is not None]
    if few_steps and not shortcut_stages:
        raise ValueError(
            f"--few-steps has no effect on generators of the family {family.name}, whose networks do not read"
            " the length of a step. Remove --few-steps."
        )
    # Shortcut networks are sampled without guidance, in few long steps.
    for stage in shortcut_stages if few_steps else ():
        stage.sampling = replace(stage.sampling, steps=few_steps, cfg_strength=0.0, shortcut=True)
    prompt_names = work.names(*splits)
    # drawn_from.json of earlier versions is compared with this dictionary, so its keys cannot change. Options
    # that are not given have no key.
    given_options = {"cells": cells, "few_steps": few_steps}
    identity = {
        # The first entry of a file's record is its hash.
        "files": {file: digest for file, (digest, *_) in work.files.items()},
        "conditions": hash_of(work.conditions_file),
        "names": prompt_names,
        "each": work.each,
        "precision": work.precision,
        "batch": work.batch,
        "tuned": {stage: hash_of(path) for stage, path in (tuned_weights or {}).items()},
        **{option: option_value for option, option_value in given_options.items() if option_value},
    }
    prompt_lines = []
    for prompt in prompt_names:
        if prompt in work.inputs:
            prompt_lines.append(
                {"prompt": prompt, "image": str(work.folder / "inputs" / work.inputs[prompt])}
            )
        else:
            prompt_lines.append({"prompt": prompt, "text": prompt})
    return AssetSampling(
        folder=work.asset_folder(name),
        pipeline=pipeline,
        family=family,
        prompt_names=prompt_names,
        identity=identity,
        each=work.each,
        batch=work.batch,
        size=() if cells is None else (cells,),
        prompts=prompt_lines,
        stems=stems,
        ranks=ranks,
    )
