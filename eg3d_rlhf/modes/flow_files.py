"""Command line for the files of any family of flow generators: conditions, assets to rank, pairs, tuned networks in its own layout.

TRELLIS has a tool of its own, which also encodes assets that others made.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, option, together
from eg3d_rlhf.models.policies import META, tuned_model
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS, NULL, Conditions, read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, family_of
from eg3d_rlhf.tuning.flow.pairs import write_pairs
from eg3d_rlhf.tuning.flow.problem import hash_of
from eg3d_rlhf.tuning.flow.ranking import (
    RANKING,
    SCHEMES,
    draw,
    draw_each,
    judged_option,
    pair_up,
    read_candidates,
    votes_of,
    write_latents,
)
from eg3d_rlhf.tuning.flow.stage import CONVENTION
from training.progress import tqdm

FOLDER, ANY = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path)
PICTURES = (".png", ".webp")
_model = option("--pipeline", "root", required=True, metavar="DIR", type=FOLDER, help="Folder of the generator.")
_out = option("--out", required=True, metavar="DIR", type=FOLDER, help="Folder to write.")
_device = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run.")
_tuned = together(
    option("--run", metavar="DIR", type=FOLDER, default=None, help="A finished run of train.py, for all stages that it tuned."),
    option("--weights", metavar="STAGE=PATH", multiple=True, help="Tuned weights of a stage: a folder or a file."),
)


@click.group()
def main() -> None:
    """Files in and out of the layouts of flow generators.

    \b
    Example:
        eg3d-rlhf flow files --help
    """


@main.command("conditions", cls=GroupedCommand)
@together(_model, _out)
@option("--images", required=True, metavar="DIR", type=FOLDER, help="Pictures with transparent backgrounds, named as they are.")
@_device
def conditions(root: Path, out: Path, images: Path, device: str) -> None:
    """Embed pictures by the generator's own encoder, into conditions.safetensors."""
    family = family_of(root)
    embed = _hook(family, "embed", family.embed)
    paths = {path.stem: path for path in sorted(images.glob("*")) if path.suffix.lower() in PICTURES}
    if not paths:
        raise FileNotFoundError(f"--images: expected pictures ({', '.join(PICTURES)}), got none in {images}. Name their folder.")
    found = embed(root, paths, choose_device(device))
    write_conditions(out / CONDITIONS, found)
    click.echo(f"{len(found.names)} conditions in {out / CONDITIONS}")


@main.command("draw", cls=GroupedCommand)
@together(_model, _out, _tuned)
@option("--conditions", "tokens", metavar="FILE", type=ANY, default=None, show_default=f"{CONDITIONS} in --out",
        help="Embeddings; each condition in it is drawn.")
@option("--each", metavar="N", type=click.IntRange(1), default=4, help="Assets per condition, of seeds 0, 1, ...")
@option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", help="In which the flows are held.")
@_device
def draw_command(
    root: Path, out: Path, run: Path | None, weights: Sequence[str], tokens: Path | None, each: int, dtype: str, device: str
) -> None:
    """Assets to look at, their latents, and a list to write ranks into, for `ranking`."""
    family = family_of(root)
    show = _hook(family, "draw", family.show)
    tokens, tuned = tokens or out / CONDITIONS, tuned_weights(family, run, weights)
    if not tokens.exists():
        raise FileNotFoundError(f"--conditions: expected embeddings, got none at {tokens}. Write them by `conditions --out={out}`.")
    read = read_conditions(tokens, zero_null=family.zero_null)
    pipeline = family.load(root, read, dtype=getattr(torch, dtype), device=choose_device(device))
    for stage in pipeline.stages:
        if stage.name in tuned:
            stage.model = tuned_model(stage.model, tuned[stage.name])
    identity = {
        "files": {name: file_hash(path) for name, path in family.files(root).items()}, "conditions": hash_of(tokens),
        "tuned": {stage: hash_of(path) for stage, path in tuned.items()}, "dtype": dtype,
    }

    def one(stem: str, condition: str, seed: int) -> dict[str, str]:
        there = [path for path in out.glob(f"{stem}.*") if path.suffix != ".safetensors"]  # written last
        if not there:
            latents, asset = draw(pipeline, condition, seed)
            write_latents(out / f"{stem}.safetensors", latents)
            there = [show(asset, out / stem)]
        return {"latents": f"{stem}.safetensors", "look_at": there[0].name}

    with tqdm(total=each * len(read.names), desc="assets", unit="asset", disable=None) as bar:
        draw_each(out, read.names, range(each), identity, one, bar.update)
    if tokens != out / CONDITIONS:
        write_conditions(out / CONDITIONS, read)
    click.echo(f"{each * len(read.names)} assets; write ranks into {out / RANKING}, 1 for the best of a condition")


@main.command("ranking", cls=GroupedCommand)
@option("--list", "path", required=True, metavar="DIR", type=ANY, help="The folder that draw wrote, or its list, with ranks.")
@together(_model, _out)
@option("--scheme", type=click.Choice(SCHEMES), default="all", help="Which ranks of a condition are paired.")
@judged_option
@option("--limit", metavar="PAIRS", type=click.IntRange(1), default=None, help="Most pairs per condition, drawn with --seed.")
@option("--seed", metavar="INT", type=int, default=0, help="Of the pairs that --limit keeps.")
def ranking(path: Path, root: Path, out: Path, scheme: str, judged: Path | None, limit: int | None, seed: int) -> None:
    """Pairs of every stage from a ranked list, and the embeddings of their conditions, for train.py."""
    path = path / RANKING if path.is_dir() else path
    votes, family = votes_of(judged, scheme), family_of(root)
    read = read_conditions(path.parent / CONDITIONS, zero_null=family.zero_null)
    candidates = read_candidates(path, family.load(root, None, dtype=torch.float32, device="cpu"), ranked=judged is None)
    pairs = pair_up(candidates, scheme, limit, seed, votes)
    named = sorted({pair.condition for own in pairs.values() for pair in own})
    read.of(named)  # raises for those that are missing
    hashes = {stage: write_pairs(out / stage, own, {"convention": CONVENTION, "family": family.name}) for stage, own in pairs.items()}
    kept = {name: read.tokens[name] for name in (*named, NULL) if name in read.tokens}
    write_conditions(out / CONDITIONS, Conditions(tokens=kept, encoder=read.encoder, zero_null=read.zero_null))
    counts = {stage: len(own) for stage, own in pairs.items()}
    report = {"assets": len(candidates), "scheme": "judged" if votes else scheme, "pairs": counts, "hashes": hashes}
    click.echo(json.dumps(report, indent=1))


@main.command("export", cls=GroupedCommand)
@together(_model, _out, _tuned)
def export(root: Path, out: Path, run: Path | None, weights: Sequence[str]) -> None:
    """A folder in the generator's own layout, with tuned networks merged."""
    family = family_of(root)
    write, tuned = _hook(family, "export", family.export), tuned_weights(family, run, weights)
    if not tuned:
        raise ValueError("export: expected --run or --weights, got neither. Name what is tuned.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"export: expected a new folder, got {out} with files in it. Name another.")
    click.echo(json.dumps(write(root, out, tuned), indent=1))


def tuned_weights(family: FlowFamily, run: Path | None, weights: Sequence[str]) -> dict[str, Path]:
    """Tuned weights by stage: a run's, and in their place those that are named.

    Raises: FileNotFoundError for a run without any; ValueError for what is no STAGE=PATH of the family.
    """
    found = {} if run is None else {stage: run / stage for stage in family.stages if (run / stage / META).is_file()}
    if run is not None and not found:
        stages = " or ".join(family.stages)
        raise FileNotFoundError(f"--run: expected a finished run of train.py, got no tuned {stages} in {run}. Finish it by --resume.")
    parted = [text.partition("=") for text in weights]
    odd = [name + sign + path for name, sign, path in parted if not (name and path)]
    if odd:
        raise ValueError(f"--weights: expected STAGE=PATH, got {odd[0]!r}. Name the stage.")
    check_stages("--weights", family, [name for name, _, _ in parted])
    return found | {name: Path(path) for name, _, path in parted}


def _hook(family: FlowFamily, what: str, given: Callable | None) -> Callable:
    if given is None:
        raise ValueError(f"{what}: expected a family that does so here, got {family.name}. See docs/flow-families.md for its own tools.")
    return given
