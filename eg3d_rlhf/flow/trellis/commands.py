"""Command line of TRELLIS's files: pairs from what people have, embeddings of conditions, tuned flows back in the stock layout."""

import json
from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.flow.policies import tuned_model
from eg3d_rlhf.flow.trellis.conditions import ImageEncoder, TextEncoder, read_conditions, write_conditions
from eg3d_rlhf.flow.trellis.export import export
from eg3d_rlhf.flow.trellis.files import read_pipeline
from eg3d_rlhf.flow.trellis.pair_import import CONDITIONS, RANKING, SCHEMES, STANDS, Imported, draw_to, read_dso, read_ranking, write_import
from eg3d_rlhf.flow.trellis.pipeline import Encoding, TrellisPipeline, load_pipeline
from eg3d_rlhf.flow.trellis.problem import file_hashes, hash_of

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
    option("--structure", metavar="PATH", type=ANY, default=None, help="Tuned weights of the first stage: a folder of a run, or a file."),
    option("--latent", metavar="PATH", type=ANY, default=None, help="Tuned weights of the second stage."),
)
_out = option("--out", required=True, metavar="DIR", type=FOLDER, help="Folder to write.")


@click.group()
def main() -> None:
    """Files in and out of TRELLIS's layout.

    \b
    Example:
        python tools/trellis_files.py --help
    """


@main.command("ranking", cls=GroupedCommand)
@option("--list", "path", required=True, metavar="FILE", type=ANY, help="Ranked assets as JSON lines; see flow/trellis/pair_import.py.")
@together(_model, _out)
@option("--scheme", type=click.Choice(SCHEMES), default="all", help="Which ranks of a condition are paired.")
@option("--share", metavar="X", type=float, default=Encoding.share, help="Of the mean opacity, above which a voxel of an asset is filled.")
@option("--views", metavar="N", type=int, default=Encoding.views, help="Images per asset that the second stage's features come from.")
@together(_limit, _seed, _device)
def ranking(
    path: Path, pipeline: Path, also: tuple[Path, ...], out: Path, scheme: str, share: float, views: int, limit: int | None, seed: int,
    device: str,
) -> None:
    """Pairs of both stages from a ranked list of assets."""
    opened = _encoder(pipeline, also, device, Encoding(share=share, views=views))
    with tqdm(desc="assets", unit="asset", disable=None) as bar:
        imported = read_ranking(path, opened, scheme, limit, seed, bar.update)
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
@option("--conditions", "tokens", required=True, metavar="FILE", type=ANY, help="Embeddings; every condition in it is drawn.")
@option("--each", metavar="N", type=click.IntRange(1), default=4, help="Assets per condition, of seeds 0, 1, ...")
@_device
def draw_command(pipeline: Path, also: tuple[Path, ...], out: Path, tokens: Path, each: int, device: str, **tuned: Path | None) -> None:
    """Assets to look at, their latents, and a list to write ranks into, for `ranking`."""
    read = read_conditions(tokens, zero_null=read_pipeline(pipeline).kind == "image")
    opened = load_pipeline(pipeline, read, also=also, device=choose_device(device), whole=False)
    for stage in opened.stages:
        if tuned[stage.name] is not None:
            stage.model = tuned_model(stage.model, tuned[stage.name])
    identity = {
        "files": file_hashes(opened.file, also, {}, False), "conditions": hash_of(tokens),
        "tuned": {stage: hash_of(path) for stage, path in tuned.items() if path is not None},
    }
    names = read.names
    with tqdm(total=each * len(names), desc="assets", unit="asset", disable=None) as bar:
        draw_to(out, opened, names, range(each), identity, bar.update)
    write_conditions(out / CONDITIONS, read)
    click.echo(f"{each * len(names)} assets; write ranks into {out / RANKING}, 1 for the best of a condition")


@main.command("export", cls=GroupedCommand)
@together(_model, _out, _tuned)
def export_command(pipeline: Path, also: tuple[Path, ...], out: Path, **tuned: Path | None) -> None:
    """A folder that stock TRELLIS loads, with tuned flows merged."""
    report = export(pipeline, out, {stage: path for stage, path in tuned.items() if path is not None}, also)
    click.echo(json.dumps(report, indent=1))


def _encoder(root: Path, also: tuple[Path, ...], device: str, encoding: Encoding) -> TrellisPipeline:
    """To encode with: without the flows' weights, and with what is there of the others."""
    return load_pipeline(root, None, also=also, device=choose_device(device), encoding=encoding, whole=False, sampled=False)


def _write(out: Path, imported: Imported, pipeline: TrellisPipeline) -> None:
    hashes = write_import(out, imported, pipeline.file)
    click.echo(json.dumps({**imported.report, "hashes": hashes}, indent=1))
