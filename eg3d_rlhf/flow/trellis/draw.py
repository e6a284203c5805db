"""Assets to look at and to rank: per condition and seed a .ply, the latents of both stages, and a line for the ranked list.

The latents are the sampler's own: pairs made of them are what the networks themselves would draw, and need no encoding.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from eg3d_rlhf.flow.generate import stage_noise
from eg3d_rlhf.flow.sampler import sample
from eg3d_rlhf.flow.sparse import Latent, separate
from eg3d_rlhf.flow.trellis.assets import SplatAsset, write_ply
from eg3d_rlhf.flow.trellis.files import LATENT, STRUCTURE
from eg3d_rlhf.flow.trellis.pipeline import TrellisPipeline
from training.storage import write_atomic

RANKING, IDENTITY = "ranking.jsonl", "drawn_from.json"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One asset with the latents that it came from."""

    latents: dict[str, Latent]  # by stage, as the flows see them
    asset: SplatAsset


def draw(pipeline: TrellisPipeline, condition: str, seed: int) -> Drawn:
    """The asset of a condition and a seed, as flow.generate draws it. Raises: ValueError for a structure without a voxel."""
    given, latents, x_0 = [None], {}, None
    for stage in pipeline.stages:
        cond, no_cond = pipeline.conditions([condition], stage.name), pipeline.no_condition(1, stage.name)
        x_0 = sample(stage, stage_noise(stage, [seed], given).to(pipeline.device), cond, no_cond)
        (latents[stage.name],) = separate(x_0)
        given = pipeline.advance(stage.name, x_0) if stage is not pipeline.stages[-1] else given
    return Drawn(latents=latents, asset=pipeline.decode(x_0)[0])


def draw_to(
    folder: Path, pipeline: TrellisPipeline, conditions: Sequence[str], seeds: Sequence[int], identity: Mapping,
    on_asset: Callable[[], None] | None = None,
) -> Path:
    """Draw every condition with every seed; returns the list, whose ranks are left to fill in.

    Assets that an interrupted call left are kept. Args: identity: JSON, hashes of all files that they come from.
    Raises: ValueError for a folder of assets of other files, or one that is finished, whose ranks would be lost.
    """
    _claim(folder, identity)
    lines = []
    for c, condition in enumerate(conditions):
        for seed in seeds:
            stem = f"{c:05d}-{seed}"
            if not (folder / f"{stem}.ply").exists():  # written last
                _write(folder, stem, pipeline, draw(pipeline, condition, seed))
            files = {stage: f"{stem}-{stage}.safetensors" for stage in (STRUCTURE, LATENT)}
            lines.append(json.dumps({"condition": condition, "rank": None, **files, "seed": seed, "look_at": f"{stem}.ply"}))
            if on_asset:
                on_asset()
    write_atomic(folder / RANKING, "".join(line + "\n" for line in lines).encode())
    return folder / RANKING


def _claim(folder: Path, identity: Mapping) -> None:
    path, text = folder / IDENTITY, json.dumps(identity, indent=1, sort_keys=True) + "\n"
    other = path.is_file() and path.read_text() != text
    if other or (folder / RANKING).exists():
        got = "assets of other networks or conditions" if other else f"{RANKING}, maybe with ranks"
        raise ValueError(f"draw: expected a new folder or an interrupted one, got {folder} with {got}. Name another.")
    write_atomic(path, text.encode())


def _write(folder: Path, stem: str, pipeline: TrellisPipeline, drawn: Drawn) -> None:
    structure, latent = drawn.latents[STRUCTURE], drawn.latents[LATENT]
    tensors = {"coords": latent.coords, "feats": pipeline.unnormalised(latent.feats)}
    write_atomic(folder / f"{stem}-structure.safetensors", save({"mean": structure.cpu().contiguous()}))
    write_atomic(folder / f"{stem}-latent.safetensors", save({name: t.cpu().contiguous() for name, t in tensors.items()}))
    write_ply(folder / f"{stem}.ply", drawn.asset)
