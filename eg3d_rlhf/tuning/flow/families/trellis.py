"""TRELLIS among the families of flow generators; what tells its folder, and what is done with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.tuning.flow.base.conditioning import Conditions, read_array
from eg3d_rlhf.tuning.flow.base.export import Release
from eg3d_rlhf.tuning.flow.base.problem import Problem, ProblemSource
from eg3d_rlhf.tuning.flow.families import FlowFamily, Network, register
from eg3d_rlhf.tuning.flow.families.encoders import ImageEncoder, TextEncoder
from eg3d_rlhf.tuning.flow.families.learned_evaluators import RewardOfPairs
from eg3d_rlhf.tuning.flow.families.opening import open_folder, pairs_in
from eg3d_rlhf.tuning.flow.families.trellis_assets import calibrated, read_ply, show
from eg3d_rlhf.tuning.flow.families.trellis_files import (
    FLOWS,
    KINDS,
    LATENT,
    LATENT_ENCODER,
    NEEDED,
    TOKENS,
    PipelineFile,
    load_model,
    networks_of,
    paths_of,
    read_pipeline,
    release_of,
)
from eg3d_rlhf.tuning.flow.families.trellis_pair_import import candidate, normalization, write_latent
from eg3d_rlhf.tuning.flow.families.trellis_pipeline import Encoding, TrellisPipeline, load_pipeline

LOOKED_AT = 32  # assets that the share of opacity is found on


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS's; a file that is none is left to the reader, which says what is
    wrong.
    """
    path = root / "pipeline.json"
    if not path.is_file():
        return False
    try:
        name = json.loads(path.read_text()).get("name", "")
    except (ValueError, AttributeError):
        return True
    return any(str(name).lower() == f"trellis{kind}to3dpipeline" for kind in KINDS)


def open_problem(source: ProblemSource, device: str | torch.device) -> Problem:
    """As any folder's; where there are pairs of both stages, with all that the loop needs."""
    root = Path(source.pipeline)
    encoding = Encoding(share=source.voxel_share, views=source.views)
    both = len(pairs_in(FAMILY, source)) == len(FLOWS)
    family = replace(
        FAMILY,
        load=partial(load_pipeline, encoding=encoding, whole=both),
        files=partial(model_files, whole=both),
        zero_null=read_pipeline(root).kind == "image",
    )
    problem = open_folder(family, source, device, check_origin)
    for stage in problem.pipeline.stages:
        # blocks again in the backward pass, for less memory
        stage.model.recompute = True  # type: ignore[assignment]
    return replace(problem, identity={**problem.identity, "encoding": vars(encoding)})


def check_origin(pipeline: TrellisPipeline, folder: Path, stage: str, meta: Mapping) -> None:
    """Refuse latents that are normalised in another way. Raises: ValueError."""
    if meta.get("normalization") != normalization(pipeline.file, stage):
        raise ValueError(
            f"{folder}: expected latents normalised as {pipeline.file.root.name}/pipeline.json says, got"
            " those of another model. Make the pairs again for this one."
        )


def load(root: Path, conditions: Conditions | None, **options: Any) -> TrellisPipeline:
    """Without its encoders, which sampling does not need."""
    return load_pipeline(root, conditions, whole=False, **options)


def encoder(root: Path, share: float, views: int, **options: Any) -> TrellisPipeline:
    """To encode with: without the flows' weights, and with what is there of the others."""
    return load_pipeline(
        root, None, encoding=Encoding(share=share, views=views), whole=False, sampled=False, **options
    )


def model_files(root: Path, whole: bool = True) -> dict[str, Path]:
    """Of the flows, by stage, and of what else the loop needs."""
    file = read_pipeline(root)
    models = FLOWS | {name: name for name in NEEDED if whole}
    return {"pipeline.json": root / "pipeline.json", **paths_of(file, models)}


def networks(root: Path) -> list[Network]:
    """All that the loop asks for; the second stage's encoder may be missing."""
    models = (*FLOWS.values(), *NEEDED, LATENT_ENCODER)
    return networks_of(read_pipeline(root), models, {LATENT_ENCODER: "assets of your own, no loop"})


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    file = _of_kind(root, "image")
    return ImageEncoder(file.encoder, device).conditions(pictures)


def embed_texts(root: Path, texts: Sequence[str], device: torch.device) -> Conditions:
    return TextEncoder(_of_kind(root, "text").encoder, device).conditions(texts)


def _of_kind(root: Path, kind: str) -> PipelineFile:
    file = read_pipeline(root)
    if file.kind != kind:
        wanted, got = ({"image": "pictures", "text": "prompts"}[each] for each in (file.kind, kind))
        raise ValueError(
            f"conditions: expected --{wanted} for a pipeline of {wanted}, got --{got}. Correct the call."
        )
    return file


def remark(folder: Path, lines: Sequence[Mapping], pipeline: TrellisPipeline) -> str:
    """The share of opacity at which the first assets fill the voxels that they were made on."""
    assets = [read_ply(folder / line["look_at"]) for line in lines[:LOOKED_AT]]
    found = calibrated(
        assets,
        [read_array(folder / line[LATENT], "coords") for line in lines[:LOOKED_AT]],
        pipeline.resolution,
    )
    how = (
        f"a share of opacity of {found['share']:g} (intersection over union {found['iou']:.2f}, of"
        f" {len(assets)})"
    )
    return (
        f"assets fill the voxels that they were made on best at {how}: flow tune --loop --set"
        f" voxel_share={found['share']:g}"
    )


def release(root: Path, stages: Sequence[str]) -> Release:
    """See `release_of`. What pipeline.json names in a folder that is there must be there."""
    file = read_pipeline(root)
    needed = {name for name, value in file.models.items() if (file.root / value).parent.is_dir()}
    return release_of(file, stages, FLOWS, load_model, needed)


FAMILY = register(
    FlowFamily(
        name="trellis",
        layout="pipeline.json of TrellisTextTo3DPipeline or TrellisImageTo3DPipeline",
        recognises=recognises,
        stages=tuple(FLOWS),
        load=load,
        files=model_files,
        judge=RewardOfPairs,
        open=open_problem,
        embed=embed,
        embed_texts=embed_texts,
        show=show,
        release=release,
        loaded_by='TrellisImageTo3DPipeline or TrellisTextTo3DPipeline.from_pretrained("{out}")',
        encoder=encoder,
        candidate=candidate,
        write_latent=write_latent,
        pair_meta=lambda pipeline, stage, report: {
            "normalization": normalization(pipeline.file, stage),
            "report": report,
        },
        told=lambda pipeline, stage: [TOKENS[pipeline.file.kind], pipeline.width(stage)],
        options=("voxel_share", "views"),
        networks=networks,
        address="https://huggingface.co/microsoft/TRELLIS-image-large",
        up="z",
        remark=remark,
        version="TRELLIS, of texts or images",
    )
)
