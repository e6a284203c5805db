"""Files in and out of the layouts of flow generators: pairs of ranked assets, tuned networks in their own layout.

What a family does of it, and how, its `FlowFamily` says.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.models.policies import META
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS, NULL, read_array, read_conditions
from eg3d_rlhf.tuning.flow.families import FlowFamily, check_stages, family_of
from eg3d_rlhf.tuning.flow.problem import ProblemSource
from eg3d_rlhf.tuning.flow.ranking import (
    RANKING,
    Imported,
    Judged,
    judged_option,
    read_ranking,
    write_import,
)
from training.progress import tqdm

FOLDER, ANY = click.Path(path_type=Path, file_okay=False), click.Path(path_type=Path)
PICTURES = (".png", ".webp")
OTHERS, TRELLIS = "Assets that others made (TRELLIS)", "trellis"  # the family of `calibrate` and `dso`
_model = option("--pipeline", "root", required=True, metavar="DIR", type=FOLDER, help="Folder of the generator.")
_out = option("--out", required=True, metavar="DIR", type=FOLDER, help="Folder to write.")
_device = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run.")
_tuned = together(
    option("--run", metavar="DIR", type=FOLDER, default=None, help="A finished run of train.py, for all stages that it tuned."),
    option("--weights", metavar="STAGE=PATH", multiple=True, help="Tuned weights of a stage: a run, a folder or a file."),
)


@click.group()
def main() -> None:
    """Files in and out of the layouts of flow generators.

    \b
    Example:
        eg3d-rlhf flow files --help
    """


@main.command("ranking", cls=GroupedCommand)
@option("--list", "path", required=True, metavar="DIR", type=ANY,
        help="WORK/drawn/base, or its list, with ranks; or of most families a list of your own assets.")
@together(_model, _out)
@judged_option
@option("--conditions", "tokens", metavar="FILE", type=ANY, default=None, show_default="beside the list, or WORK's", help="Embeddings.")
@option("--share", metavar="X", type=click.FloatRange(0, min_open=True), default=ProblemSource.voxel_share, group=OTHERS,
        help="Of the mean opacity, above which a voxel of an asset is filled.")
@option("--views", metavar="N", type=click.IntRange(1), default=ProblemSource.views, group=OTHERS,
        help="Images per asset that the second stage's features come from.")
@_device
def ranking(
    path: Path, root: Path, out: Path, judged: Path | None, tokens: Path | None, share: float, views: int, device: str
) -> None:
    """Pairs of every stage from a ranked list, and the embeddings of their conditions, for train.py."""
    path = path / RANKING if path.is_dir() else path
    votes, family = None if judged is None else Judged(judged), family_of(root)
    encoding = {"share": share, "views": views} if "views" in family.options else {}
    if not encoding and (share, views) != (ProblemSource.voxel_share, ProblemSource.views):
        raise ValueError(f"--share, --views: belong to families that encode assets so, not to {family.name}. Leave them out.")
    if family.encoder is not None:
        pipeline = family.encoder(root, device=choose_device(device), **encoding)
    else:
        pipeline = family.load(root, None, dtype=torch.float32, device="cpu")
    with tqdm(desc="assets", unit="asset", disable=None) as bar:
        imported = read_ranking(path, pipeline, bar.update, votes, family.candidate)
    beside = (path.parent / CONDITIONS, path.parent.parent.parent / CONDITIONS)  # the latter of assets in WORK/drawn
    tokens = tokens or next((place for place in beside if place.is_file()), beside[0])
    if tokens.exists() or family.encoder is None:  # assets that others made may have none yet
        read = read_conditions(tokens, zero_null=family.zero_null)
        named = sorted({pair.condition for pairs in imported.pairs.values() for pair in pairs})
        read.of(named)  # raises for those that are missing
        kept = {name: read.tokens[name] for name in (*named, NULL) if name in read.tokens}
        imported = replace(imported, conditions=replace(read, tokens=kept))
    _write(out, imported, family, pipeline)


@main.command("dso", cls=GroupedCommand)
@option("--samples", required=True, metavar="DIR", type=FOLDER, help="Folder of samples as the DSO project writes it.")
@together(_model, _out)
def dso(samples: Path, root: Path, out: Path) -> None:
    """Pairs of TRELLIS's first stage, and embeddings, from the samples of the DSO project."""
    from eg3d_rlhf.tuning.flow.families.trellis.pair_import import read_dso

    family, pipeline = _trellis(root)
    _write(out, read_dso(samples, pipeline), family, pipeline)


@main.command("calibrate", cls=GroupedCommand)
@option("--list", "folder", required=True, metavar="DIR", type=FOLDER, help="WORK/drawn/base.")
@_model
def calibrate(folder: Path, root: Path) -> None:
    """The share of opacity, for --share and voxel_share, at which TRELLIS's drawn assets fill the voxels that they were made on."""
    from eg3d_rlhf.tuning.flow.families.trellis.assets import calibrated, read_ply
    from eg3d_rlhf.tuning.flow.families.trellis.files import LATENT

    path = folder / RANKING
    if not path.is_file():
        raise FileNotFoundError(f"--list: expected WORK/drawn/base, got no {RANKING} in {folder}. Check the path.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    _, pipeline = _trellis(root)
    assets = [read_ply(folder / row["look_at"]) for row in tqdm(rows, desc="assets", unit="asset", disable=None)]
    voxels = [read_array(folder / row[LATENT], "coords") for row in rows]
    click.echo(json.dumps(calibrated(assets, voxels, pipeline.resolution), indent=1))


@main.command("export", cls=GroupedCommand)
@together(_model, _out, _tuned)
def export(root: Path, out: Path, run: Path | None, weights: Sequence[str]) -> None:
    """A folder in the generator's own layout, with tuned networks merged."""
    family = family_of(root)
    tuned = tuned_weights(family, run, weights)
    if family.export is None:
        raise ValueError(f"export: expected a family that does so here, got {family.name}. See docs/extending.md for one's own.")
    if not tuned:
        raise ValueError("export: expected --run or --weights, got neither. Name what is tuned.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"export: expected a new folder, got {out} with files in it. Name another.")
    click.echo(json.dumps(family.export(root, out, tuned), indent=1))


def tuned_weights(family: FlowFamily, run: Path | None, weights: Sequence[str]) -> dict[str, Path]:
    """Tuned weights by stage: a run's, and in their place those that are named; a run that is named for a stage stands for that stage's.

    Raises: FileNotFoundError for a run without any; ValueError for what is no STAGE=PATH of the family.
    """
    paths = {} if run is None else {stage: run / stage for stage in family.stages if (run / stage / META).is_file()}
    if run is not None and not paths:
        stages = " or ".join(family.stages)
        raise FileNotFoundError(f"--run: expected a finished run of train.py, got no tuned {stages} in {run}. Finish it by --resume.")
    parted = [text.partition("=") for text in weights]
    odd = [name + sign + path for name, sign, path in parted if not (name and path)]
    if odd:
        raise ValueError(f"--weights: expected STAGE=PATH, got {odd[0]!r}. Name the stage.")
    check_stages("--weights", family, [name for name, _, _ in parted])
    for name, _, text in parted:
        path = Path(text)
        paths[name] = path / name if (path / name / META).is_file() else path
    return paths


def _trellis(root: Path):
    """TRELLIS, and its pipeline to encode with."""
    family = family_of(root)
    if family.name != TRELLIS or family.encoder is None:
        raise ValueError(f"--pipeline: expected a folder of TRELLIS here, got one of {family.name}. Name another.")
    return family, family.encoder(root, device="cpu", share=ProblemSource.voxel_share, views=ProblemSource.views)


def _write(out: Path, imported: Imported, family: FlowFamily, pipeline) -> None:
    report = dict(imported.report)
    meta = family.pair_meta or (lambda pipeline, stage, report: {"family": family.name})
    hashes = write_import(out, imported, lambda stage: meta(pipeline, stage, report))
    click.echo(json.dumps({**report, "hashes": hashes}, indent=1))
