"""TRELLIS among the families of flow generators; its files have a tool of their own, eg3d-rlhf flow files."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.models.policies import link
from eg3d_rlhf.models.weights import in_types_of, write
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, Network, check_stages, register
from eg3d_rlhf.tuning.flow.families.folder import merged
from eg3d_rlhf.tuning.flow.families.trellis.assets import SplatAsset, write_ply
from eg3d_rlhf.tuning.flow.families.trellis.encoders import ImageEncoder, TextEncoder
from eg3d_rlhf.tuning.flow.families.trellis.files import (
    FLOWS,
    KINDS,
    LATENT_ENCODER,
    NEEDED,
    USUAL_STEMS,
    PipelineFile,
    base_state,
    find_model,
    find_weights,
    load_model,
    network_of,
    read_pipeline,
    with_ending,
)
from eg3d_rlhf.tuning.flow.families.trellis.pair_import import candidate, normalization, write_latent
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import Encoding, TrellisPipeline, load_pipeline
from eg3d_rlhf.tuning.flow.families.trellis.problem import RewardOfPairs, trellis_problem
from eg3d_rlhf.tuning.flow.problem import Problem, ProblemSource
from training.progress import tqdm
from training.storage import write_atomic


def recognises(root: Path) -> bool:
    """Whether pipeline.json is TRELLIS's; a file that is none is left to the reader, which says what is wrong."""
    path = root / "pipeline.json"
    if not path.is_file():
        return False
    try:
        name = json.loads(path.read_text()).get("name", "")
    except (ValueError, AttributeError):
        return True
    return any(str(name).lower() == f"trellis{kind}to3dpipeline" for kind in KINDS)


def open_problem(source: ProblemSource, device: str | torch.device) -> Problem:
    return trellis_problem(
        Path(source.pipeline), Path(source.pairs or Path(source.pipeline) / "pairs"), dtype=getattr(torch, source.dtype), device=device,
        conditions=None if source.conditions is None else Path(source.conditions), seed=source.seed, held_out=source.held_out,
        encoding=Encoding(share=source.voxel_share, views=source.views),
    )


def load(root: Path, conditions: Conditions | None, **options: Any) -> TrellisPipeline:
    """Without its encoders, which sampling does not need."""
    return load_pipeline(root, conditions, whole=False, **options)


def encoder(root: Path, share: float, views: int, **options: Any) -> TrellisPipeline:
    """To encode with: without the flows' weights, and with what is there of the others."""
    return load_pipeline(root, None, encoding=Encoding(share=share, views=views), whole=False, sampled=False, **options)


def model_files(root: Path) -> dict[str, Path]:
    """Of the flows, and of what else is there."""
    file = read_pipeline(root)
    paths = {"pipeline.json": root / "pipeline.json"}
    for name in (*FLOWS.values(), *NEEDED):
        stem = find_model(file, name)
        paths |= {f"{name}.json": with_ending(stem, ".json"), name: find_weights(stem) or stem}
    return paths


def networks(root: Path) -> list[Network]:
    """All that the loop asks for; the second stage's encoder may be missing."""
    file, lost = read_pipeline(root), "assets of your own, no loop"
    there = [network_of(name, find_model(file, name)) for name in (*FLOWS.values(), *NEEDED)]
    try:
        return [*there, network_of(LATENT_ENCODER, find_model(file, LATENT_ENCODER), without=lost)]
    except FileNotFoundError:
        return [*there, Network(name=LATENT_ENCODER, file=root / USUAL_STEMS[LATENT_ENCODER], expected={}, found={}, without=lost)]


def embed(root: Path, pictures: Mapping[str, Path], device: torch.device) -> Conditions:
    file = _of_kind(root, "image")
    return ImageEncoder(file.encoder, device).conditions(pictures)


def embed_texts(root: Path, texts: Sequence[str], device: torch.device) -> Conditions:
    return TextEncoder(_of_kind(root, "text").encoder, device).conditions(texts)


def _of_kind(root: Path, kind: str) -> PipelineFile:
    file = read_pipeline(root)
    if file.kind != kind:
        raise ValueError(f"conditions: expected --{file.kind}s for a pipeline of {file.kind}s, got --{kind}s. Correct the call.")
    return file


def show(asset: SplatAsset, path: Path) -> Path:
    write_ply(path.with_suffix(".ply"), asset)
    return path.with_suffix(".ply")


def export(root: Path, out: Path, tuned: Mapping[str, Path]) -> dict:
    """Write pipeline.json and all models that are on this machine to a new folder, with tuned flows in place of those of `root`.

    Tuned weights are merged and rounded to the types of the file that they replace. Models that nothing changed are linked, or copied where
    the file system cannot; those that are elsewhere ("owner/repo/path") and not found stay references. The encoders, which pipeline.json
    does not name but the loop needs, come along where they are found.

    Args: tuned: by stage, a folder or file of weights in any layout that policies.tuned_model reads.
    Returns: {"tuned": {stage: {"file", "rounding"}}, "kept": [...], "elsewhere": [...]}, names of models;
        rounding: share of the update that merging loses.
    Raises: FileNotFoundError or ValueError for stages, files or a folder that do not fit.
    """
    file, out = read_pipeline(root), Path(out)
    check_stages("export", FAMILY, list(tuned))
    models, done, kept, elsewhere = dict(file.models), {}, [], []
    sources: dict[str, Path] = {}  # by stem
    stages = {FLOWS[stage]: stage for stage in tuned}
    names = [*file.models, *(name for name in USUAL_STEMS if name not in file.models)]
    for name in tqdm(names, desc="export", unit="model", leave=False, disable=None):
        try:
            stem = find_model(file, name)
        except FileNotFoundError:
            if name in stages or (name in file.models and (file.root / file.models[name]).parent.is_dir()):
                raise
            elsewhere.append(name)
            continue
        if sources.setdefault(stem.name, stem) != stem:
            raise ValueError(f"export: expected models of different names, got {stem} and {sources[stem.name]}. Rename one.")
        target = out / "ckpts" / stem.name
        link(with_ending(stem, ".json"), with_ending(target, ".json"))
        base = find_weights(stem)
        assert base is not None  # or there were no such model
        if name in stages:
            state, rounding = merged(partial(load_model, stem), tuned[stages[name]])
            write(with_ending(target, ".safetensors"), in_types_of(base_state(base), state))
            done[stages[name]] = {"file": f"{stem.name}.safetensors", "rounding": rounding}
        else:
            link(base, with_ending(target, base.suffix))
            kept.append(name)
        if name in models:
            models[name] = f"ckpts/{stem.name}"
    content = {**file.content, "args": {**file.content["args"], "models": models}}
    write_atomic(out / "pipeline.json", (json.dumps(content, indent=4) + "\n").encode())
    return {"tuned": done, "kept": kept, "elsewhere": elsewhere}


FAMILY = register(FlowFamily(
    name="trellis", layout="pipeline.json of TrellisTextTo3DPipeline or TrellisImageTo3DPipeline", recognises=recognises,
    stages=tuple(FLOWS), load=load, files=model_files, judge=RewardOfPairs, open=open_problem, embed=embed, embed_texts=embed_texts,
    show=show, export=export, encoder=encoder, candidate=candidate, write_latent=write_latent,
    pair_meta=lambda pipeline, stage, report: {"normalization": normalization(pipeline.file, stage), "report": report},
    options=("voxel_share", "views"), networks=networks, version="TRELLIS, of texts or images",
))
