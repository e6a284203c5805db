"""What a finished run gives: assets and meshes, a grid of pictures, a turntable, the comparison's table, and one page.

    assets-<arm>.safetensors             all assets of an arm, in the order of the pairs
    meshes/<arm>/<number>.glb, .ply      of the first --show assets
    grid.png, turntable.mp4              the same assets, an arm a row
    compare.json, judgements.jsonl       of a comparison
    report/index.html                    one file: table, curves, pictures, film
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eg3d_rlhf.core.field import RenderOptions, render_each
from eg3d_rlhf.experiments.media.rendering import png, tile, to_uint8
from eg3d_rlhf.experiments.media.sheet import Row, sheet
from eg3d_rlhf.experiments.media.video import write_mp4
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators.assets.asset import Asset, load_assets
from eg3d_rlhf.generators.assets.views import FINISHED, evenly_around
from eg3d_rlhf.geometry.mesh_export import MeshOptions, export_mesh
from eg3d_rlhf.tuning.distill import report
from eg3d_rlhf.tuning.distill.compare import compare, markdown
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.run import ASSETS, PARTS, Part
from eg3d_rlhf.tuning.distill.scene import Scene
from training.storage import write_atomic

CELL, FRAMES, FPS = 176, 24, 8  # least pixels per cell, frames of a turn, frames per second
MESH = 64  # grid points per edge


def write(settings: DistillSettings, scene: Scene, run: Run, show: int) -> None:
    """Everything of the module's list, into the run's folder."""
    pairs, arms = settings.pairs(), {}
    for arm in settings.arms:
        batches = [load_assets(run.folder / PARTS / Part(arm, k).name / ASSETS) for k in range(len(settings.batches()))]
        arms[arm] = joined(batches)
        arms[arm].save(run.folder / f"assets-{arm}.safetensors", pairs)
    prompts = [prompt for prompt, _ in pairs]
    table = None
    if len(arms) > 1 and scene.final is not None:
        print("Judging.", flush=True)
        measured = {arm: scene.measures(asset, prompts) for arm, asset in arms.items()}
        table, judgements = compare(arms, pairs, scene.final, measured)
        table |= {"judge": scene.judge, "settings": settings.to_dict()}
        run.write("compare.json", table)
        write_atomic(run.folder / "judgements.jsonl", "".join(json.dumps(j._asdict()) + "\n" for j in judgements).encode())
    pictures(arms, pairs, run.folder, show)
    page = report.write(settings, run.folder, table, min(show, len(pairs)))
    if table is not None:
        print(markdown(table), report.notes(settings), sep="\n")
    print(f"Page: {page}", flush=True)


def joined(assets: Sequence[Asset]) -> Asset:
    """Batches of assets as one."""
    first = assets[0]
    whole = type(first)(sum(len(one) for one in assets), **first.settings)
    whole.load_state_dict({name: torch.cat([one.state_dict()[name] for one in assets]) for name in first.state_dict()})
    return whole.requires_grad_(False)


def pictures(arms: Mapping[str, Asset], pairs: Sequence[tuple[str, int]], folder: Path, show: int) -> None:
    """Grid, film and meshes of the first assets of every arm."""
    count = min(show, len(pairs))
    if not count:
        return
    chosen = {arm: asset.pick(list(range(count))) for arm, asset in arms.items()}
    drawn = {arm: next(turns(asset, 1)) for arm, asset in chosen.items()}
    rows = [Row(cells=cells, name=arm) for arm, cells in drawn.items()]
    captions = [f"{prompt[:19]}..., {seed}" for prompt, seed in pairs[:count]]  # as wide as a cell
    rows[-1] = Row(cells=rows[-1].cells, name=rows[-1].name, captions=captions)
    write_atomic(folder / "grid.png", png(sheet("", rows, names=30 + 15 * max(map(len, drawn)))))
    films = [turns(asset, FRAMES) for asset in chosen.values()]
    frames = (tile([cell for cells in step for cell in cells], count) for step in zip(*films, strict=True))
    write_mp4(folder / "turntable.mp4", tqdm(frames, total=FRAMES, desc="turntable", unit="frame", dynamic_ncols=True), fps=FPS)
    for arm, asset in tqdm(chosen.items(), desc="meshes", unit="arm", dynamic_ncols=True):
        for k in range(count):
            try:
                mesh, found = export_mesh(asset.pick([k]), MeshOptions(resolution=MESH, component="all"))
            except ValueError as error:
                print(f"Warning: no mesh of {arm}, asset {k}: {error}", flush=True)
                continue
            for suffix in (".glb", ".ply"):
                mesh.save(folder / "meshes" / arm / f"{k:03d}{suffix}")
            found.write(folder / "meshes" / arm / f"{k:03d}.json", prompt=pairs[k][0], seed=pairs[k][1])


@torch.no_grad()
def turns(asset: Asset, frames: int) -> Iterator[list[np.ndarray]]:
    """Frames of a full turn, each the pictures uint8 [R, R, 3] of all assets; a single one from a little to the right of the front."""
    pixels = min(128, 3 * asset.samples // 2)  # more would show nothing but interpolation
    views = evenly_around(1, frames, **FINISHED)
    device = next(asset.parameters()).device
    turned = evenly_around(1, max(frames, 12), **FINISHED).cameras[1:2] if frames == 1 else views.cameras
    for camera in turned.to(device):
        seen = render_each(asset, [camera[None]], RenderOptions(resolution=pixels))[0]
        white = (seen.raw + (1 - seen.opacity) * 2).clamp(-1, 1)
        white = white.repeat_interleave(-(-CELL // pixels), dim=2).repeat_interleave(-(-CELL // pixels), dim=3)
        yield [to_uint8(picture.cpu()) for picture in white]
