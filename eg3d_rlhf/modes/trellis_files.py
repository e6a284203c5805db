"""Command line of TRELLIS's files: pairs from what people have, embeddings of conditions, tuned flows in the stock layout."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
from PIL import Image
from safetensors.torch import save

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.models.lora import merge_rounding, merged_state
from eg3d_rlhf.models.policies import META, link, tuned_model
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS, NULL, read_array, read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.families.trellis.assets import calibrated, read_ply
from eg3d_rlhf.tuning.flow.families.trellis.conditions import ImageEncoder, TextEncoder
from eg3d_rlhf.tuning.flow.families.trellis.files import (
    FLOWS,
    LATENT,
    USUAL_STEMS,
    base_state,
    find_model,
    find_weights,
    load_model,
    read_pipeline,
    with_ending,
)
from eg3d_rlhf.tuning.flow.families.trellis.pair_import import STANDS, Imported, draw_to, read_dso, read_ranking, write_import
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import Encoding, TrellisPipeline, load_pipeline
from eg3d_rlhf.tuning.flow.families.trellis.problem import file_hashes, hash_of
from eg3d_rlhf.tuning.flow.ranking import RANKING, SCHEMES, judged_option, votes_of
from training.progress import tqdm
from training.storage import write_atomic


def export(root: Path, out: Path, tuned: Mapping[str, Path], also: Sequence[Path] = ()) -> dict:
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
    unknown = sorted(set(tuned) - set(FLOWS))
    if unknown or not tuned:
        raise ValueError(f"export: expected weights of stages among {', '.join(FLOWS)}, got {', '.join(unknown) or 'none'}. Name a stage.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"export: expected a new folder, got {out} with files in it. Name another.")
    models, done, kept, elsewhere = dict(file.models), {}, [], []
    sources: dict[str, Path] = {}  # by stem
    stages = {FLOWS[stage]: stage for stage in tuned}
    names = [*file.models, *(name for name in USUAL_STEMS if name not in file.models)]
    for name in tqdm(names, desc="export", unit="model", leave=False, disable=None):
        try:
            stem = find_model(file, name, also)
        except FileNotFoundError:
            if name in stages or (name in file.models and (file.root / file.models[name]).parent.is_dir()):
                raise
            elsewhere.append(name)
            continue
        if sources.setdefault(stem.name, stem) != stem:
            raise ValueError(f"export: expected models of different names, got {stem} and {sources[stem.name]}. Rename one.")
        target = out / "ckpts" / stem.name
        link(with_ending(stem, ".json"), with_ending(target, ".json"))
        if name in stages:
            weights, merged = tuned[stages[name]], with_ending(target, ".safetensors")  # in the base's types
            types = {name: tensor.dtype for name, tensor in base_state(find_weights(stem)).items()}
            state = merged_state(tuned_model(load_model(stem, dtype=torch.float32), weights))
            state = {name: tensor.detach().cpu().to(types[name]).contiguous().clone() for name, tensor in state.items()}
            write_atomic(merged, save(state, metadata={"format": "pt"}))
            done[stages[name]] = {"file": merged.name, "rounding": merge_rounding(tuned_model(load_model(stem), weights))}
        else:
            weights = find_weights(stem)
            link(weights, with_ending(target, weights.suffix))
            kept.append(name)
        if name in models:
            models[name] = f"ckpts/{stem.name}"
    content = {**file.content, "args": {**file.content["args"], "models": models}}
    write_atomic(out / "pipeline.json", (json.dumps(content, indent=4) + "\n").encode())
    return {"tuned": done, "kept": kept, "elsewhere": elsewhere}


FOLDER = click.Path(path_type=Path, file_okay=False)
ANY = click.Path(path_type=Path)
_model = together(
    option("--pipeline", required=True, metavar="DIR", type=FOLDER, help="Folder with pipeline.json."),
    option("--also", multiple=True, metavar="DIR", type=FOLDER, help="Further folders to look for models in."),
)
_device = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run.")
_limit = option("--limit", metavar="PAIRS", type=click.IntRange(1), default=None, help="Most pairs per condition, drawn with --seed.")
_seed = option("--seed", metavar="INT", type=int, default=0, help="Of the pairs that --limit keeps.")
_tuned = together(
    option("--run", metavar="DIR", type=FOLDER, default=None, help="A finished run of train.py, for all stages that it tuned."),
    option("--structure", metavar="PATH", type=ANY, default=None, help="Tuned weights of the first stage: a run, a folder, or a file."),
    option("--latent", metavar="PATH", type=ANY, default=None, help="Likewise of the second stage."),
)
_conditions = "Embeddings, such as the command conditions writes."
_out = option("--out", required=True, metavar="DIR", type=FOLDER, help="Folder to write.")


@click.group()
def main() -> None:
    """Files in and out of TRELLIS's layout.

    \b
    Example:
        eg3d-rlhf flow trellis --help
    """


@main.command("ranking", cls=GroupedCommand)
@option("--list", "path", required=True, metavar="FILE", type=ANY,
        help="Ranked assets as JSON lines, see flow/trellis/pair_import.py; or the folder that draw wrote.")
@together(_model, _out)
@option("--scheme", type=click.Choice(SCHEMES), default="all", help="Which ranks of a condition are paired.")
@judged_option
@option("--share", metavar="X", type=float, default=Encoding.share, help="Of the mean opacity, above which a voxel of an asset is filled.")
@option("--views", metavar="N", type=int, default=Encoding.views, help="Images per asset that the second stage's features come from.")
@option("--conditions", "tokens", metavar="FILE", type=ANY, default=None, show_default="beside the list", help=_conditions)
@together(_limit, _seed, _device)
def ranking(
    path: Path, pipeline: Path, also: tuple[Path, ...], out: Path, scheme: str, judged: Path | None, share: float, views: int,
    tokens: Path | None, limit: int | None, seed: int, device: str,
) -> None:
    """Pairs of both stages from a ranked list of assets, and the embeddings of their conditions where these are found, for train.py."""
    path = path / RANKING if path.is_dir() else path
    votes, opened = votes_of(judged, scheme), _encoder(pipeline, also, device, Encoding(share=share, views=views))
    with tqdm(desc="assets", unit="asset", disable=None) as bar:
        imported = read_ranking(path, opened, scheme, limit, seed, bar.update, votes)
    if tokens is not None or (path.parent / CONDITIONS).is_file():
        found = read_conditions(tokens or path.parent / CONDITIONS, zero_null=opened.file.kind == "image")
        named = sorted({pair.condition for pairs in imported.pairs.values() for pair in pairs})
        found.of(named)  # raises for those that are missing
        kept = {name: found.tokens[name] for name in (*named, NULL) if name in found.tokens}
        imported = replace(imported, conditions=replace(found, tokens=kept))
    _write(out, imported, opened)


@main.command("dso", cls=GroupedCommand)
@option("--samples", required=True, metavar="DIR", type=FOLDER, help="Folder of samples as the DSO project writes it.")
@together(_model, _out)
@option("--stands", metavar="DEGREES", type=float, default=STANDS, help="Tilt below which an asset is preferred.")
@together(_limit, _seed)
def dso(samples: Path, pipeline: Path, also: tuple[Path, ...], out: Path, stands: float, limit: int | None, seed: int) -> None:
    """Pairs of the first stage, and embeddings, from the samples of the DSO project."""
    opened = _encoder(pipeline, also, "cpu", Encoding())
    _write(out, read_dso(samples, opened, stands, limit, seed), opened)


@main.command("conditions", cls=GroupedCommand)
@together(_model, _out)
@option("--texts", metavar="FILE", type=ANY, default=None, help="Texts, one per line.")
@option("--images", metavar="DIR", type=FOLDER, default=None, help="Images with transparent backgrounds, named as they are.")
@_device
def conditions(pipeline: Path, also: tuple[Path, ...], out: Path, texts: Path | None, images: Path | None, device: str) -> None:
    """Embed texts by CLIP or images by DINOv2, with weights on this machine, into conditions.safetensors."""
    file = read_pipeline(pipeline)
    given = {"text": texts, "image": images}
    if given[file.kind] is None or sum(v is not None for v in given.values()) != 1:
        raise ValueError(f"conditions: expected --{file.kind}s for a pipeline of {file.kind}s, and nothing else. Correct the call.")
    if file.kind == "text":
        lines = [line.strip() for line in texts.read_text().splitlines() if line.strip()]
        found = TextEncoder(file.encoder, choose_device(device)).conditions(lines)
    else:
        paths = sorted(p for p in images.iterdir() if p.suffix.lower() in (".png", ".webp"))
        found = ImageEncoder(file.encoder, choose_device(device)).conditions({p.stem: Image.open(p) for p in paths})
    write_conditions(out / CONDITIONS, found)
    click.echo(f"{len(found.names)} conditions in {out / CONDITIONS}")


@main.command("draw", cls=GroupedCommand)
@together(_model, _out, _tuned)
@option("--conditions", "tokens", metavar="FILE", type=ANY, default=None, show_default=f"{CONDITIONS} in --out",
        help=_conditions + " Each condition in it is drawn.")
@option("--each", metavar="N", type=click.IntRange(1), default=4, help="Assets per condition, of seeds 0, 1, ...")
@_device
def draw_command(
    pipeline: Path, also: tuple[Path, ...], out: Path, run: Path | None, tokens: Path | None, each: int, device: str, **tuned: Path | None
) -> None:
    """Assets to look at, their latents, and a list to write ranks into, for `ranking`."""
    tokens, weights = tokens or out / CONDITIONS, _weights(run, tuned)
    if not tokens.exists():
        raise FileNotFoundError(f"--conditions: expected embeddings, got none at {tokens}. Write them by `conditions --out={out}`.")
    read = read_conditions(tokens, zero_null=read_pipeline(pipeline).kind == "image")
    opened = load_pipeline(pipeline, read, also=also, device=choose_device(device), whole=False)
    for stage in opened.stages:
        if stage.name in weights:
            stage.model = tuned_model(stage.model, weights[stage.name])
    identity = {
        "files": file_hashes(opened.file, also, {}, False), "conditions": hash_of(tokens),
        "tuned": {stage: hash_of(path) for stage, path in weights.items()},
    }
    names = read.names
    with tqdm(total=each * len(names), desc="assets", unit="asset", disable=None) as bar:
        draw_to(out, opened, names, range(each), identity, bar.update)
    if tokens != out / CONDITIONS:
        write_conditions(out / CONDITIONS, read)
    click.echo(f"{each * len(names)} assets; write ranks into {out / RANKING}, 1 for the best of a condition")


@main.command("calibrate", cls=GroupedCommand)
@option("--list", "folder", required=True, metavar="DIR", type=FOLDER, help="The folder that draw wrote.")
@_model
def calibrate(folder: Path, pipeline: Path, also: tuple[Path, ...]) -> None:
    """The share of opacity, for --share and --voxel-share, at which drawn assets fill the voxels that they were made on."""
    list_file = folder / RANKING
    if not list_file.is_file():
        raise FileNotFoundError(f"--list: expected the folder that draw wrote, got no {RANKING} in {folder}. Check the path.")
    rows = [json.loads(line) for line in list_file.read_text().splitlines()]
    opened = _encoder(pipeline, also, "cpu", Encoding())
    assets = [read_ply(folder / row["look_at"]) for row in tqdm(rows, desc="assets", unit="asset", disable=None)]
    voxels = [read_array(folder / row[LATENT], "coords") for row in rows]
    click.echo(json.dumps(calibrated(assets, voxels, opened.resolution), indent=1))


@main.command("export", cls=GroupedCommand)
@together(_model, _out, _tuned)
def export_command(pipeline: Path, also: tuple[Path, ...], out: Path, run: Path | None, **tuned: Path | None) -> None:
    """A folder that stock TRELLIS loads, with tuned flows merged."""
    report = export(pipeline, out, _weights(run, tuned), also)
    click.echo(json.dumps(report, indent=1))


def _weights(run: Path | None, tuned: Mapping[str, Path | None]) -> dict[str, Path]:
    """Tuned weights by stage: a run's, and in their place those that are named; a run that is named for a stage stands for that stage's."""
    found = {} if run is None else {stage: run / stage for stage in FLOWS if (run / stage / META).is_file()}
    if run is not None and not found:
        raise FileNotFoundError(
            f"--run: expected a finished run of train.py on TRELLIS, got no tuned {' or '.join(FLOWS)} in {run}. Finish it by --resume, or "
            "name the weights."
        )
    for stage, path in tuned.items():
        if path is not None:
            found[stage] = path / stage if (path / stage / META).is_file() else path
    return found


def _encoder(root: Path, also: tuple[Path, ...], device: str, encoding: Encoding) -> TrellisPipeline:
    """To encode with: without the flows' weights, and with what is there of the others."""
    return load_pipeline(root, None, also=also, device=choose_device(device), encoding=encoding, whole=False, sampled=False)


def _write(out: Path, imported: Imported, pipeline: TrellisPipeline) -> None:
    hashes = write_import(out, imported, pipeline.file)
    click.echo(json.dumps({**imported.report, "hashes": hashes}, indent=1))
