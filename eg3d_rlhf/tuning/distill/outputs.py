"""What a finished run gives: assets and meshes, a grid of pictures, a turntable, the comparison's table, and
one page.

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

from eg3d_rlhf.core.field import RenderOptions, render_each
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.media.rendering import png, tile, to_uint8
from eg3d_rlhf.experiments.media.sheet import Row, sheet
from eg3d_rlhf.experiments.media.video import write_mp4
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, data_uri, write_page
from eg3d_rlhf.experiments.run import STATS, Run
from eg3d_rlhf.experiments.table import plot_rates
from eg3d_rlhf.generators.assets.asset import Asset, load_assets
from eg3d_rlhf.generators.assets.views import FINISHED, evenly_around
from eg3d_rlhf.geometry.mesh_export import export_mesh
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.tuning.distill.compare import BASE, INTERVAL, compare, markdown
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.distill_run import ASSETS, PARTS, Part
from eg3d_rlhf.tuning.distill.methods import of_arm
from eg3d_rlhf.tuning.distill.scene import Scene
from training.progress import tqdm
from training.storage import write_atomic

# least pixels per cell, frames of a turn, frames per second
CELL = 176
FRAMES = 24
FPS = 8
MESH = 64  # grid points per edge


def write(settings: DistillSettings, scene: Scene, run: Run, show: int) -> None:
    pairs = settings.pairs()
    arms = {}
    for arm in settings.arms:
        batches = [
            load_assets(run.folder / PARTS / Part(arm, k).name / ASSETS)
            for k in range(len(settings.batches()))
        ]
        arms[arm] = joined(batches)
        arms[arm].save(run.folder / f"assets-{arm}.safetensors", pairs)
    prompts = [prompt for prompt, _ in pairs]
    table = None
    if len(arms) > 1 and scene.final is not None:
        print("Evaluating.", flush=True)
        measured = {arm: scene.measures(asset, prompts) for arm, asset in arms.items()}
        table, judgements = compare(arms, pairs, scene.final, measured)
        table |= {"evaluator": scene.evaluator, "settings": settings.to_dict()}
        run.write("compare.json", table)
        write_atomic(
            run.folder / "judgements.jsonl",
            "".join(json.dumps(j._asdict()) + "\n" for j in judgements).encode(),
        )
    pictures(arms, pairs, run.folder, show)
    page = write_page_of(settings, run.folder, table, min(show, len(pairs)))
    if table is not None:
        print(markdown(table), notes(settings), sep="\n")
    print(f"Page: {page}", flush=True)


def joined(assets: Sequence[Asset]) -> Asset:
    first = assets[0]
    whole = type(first)(sum(map(len, assets)), **first.settings)
    states = [batch.state_dict() for batch in assets]
    whole.load_state_dict({name: torch.cat([state[name] for state in states]) for name in first.state_dict()})
    return whole.requires_grad_(False)


def pictures(arms: Mapping[str, Asset], pairs: Sequence[tuple[str, int]], folder: Path, show: int) -> None:
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
    write_mp4(
        folder / "turntable.mp4",
        tqdm(frames, total=FRAMES, desc="turntable", unit="frame", dynamic_ncols=True),
        fps=FPS,
    )
    for arm, asset in tqdm(chosen.items(), desc="meshes", unit="arm", dynamic_ncols=True):
        for k in range(count):
            try:
                mesh, report = export_mesh(asset.pick([k]), MeshOptions(resolution=MESH, component="all"))
            except ValueError as error:
                print(f"Warning: no mesh of {arm}, asset {k}: {error}", flush=True)
                continue
            for suffix in (".glb", ".ply"):
                mesh.save(folder / "meshes" / arm / f"{k:03d}{suffix}")
            report.write(folder / "meshes" / arm / f"{k:03d}.json", prompt=pairs[k][0], seed=pairs[k][1])


@torch.no_grad()
def turns(asset: Asset, frames: int) -> Iterator[list[np.ndarray]]:
    """Frames of a full turn, each the pictures uint8 [R, R, 3] of all assets; a single one from a little to
    the right of the front.
    """
    pixels = min(128, 3 * asset.samples // 2)  # more would show nothing but interpolation
    views = evenly_around(1, frames, **FINISHED)
    device = next(asset.parameters()).device
    turned = evenly_around(1, max(frames, 12), **FINISHED).cameras[1:2] if frames == 1 else views.cameras
    for camera in turned.to(device):
        seen = render_each(asset, [camera[None]], RenderOptions(resolution=pixels))[0]
        white = (seen.raw + (1 - seen.opacity) * 2).clamp(-1, 1)
        white = white.repeat_interleave(-(-CELL // pixels), dim=2).repeat_interleave(
            -(-CELL // pixels), dim=3
        )
        yield [to_uint8(picture.cpu()) for picture in white]


# One page of a run: the table of its arms with intervals, what the lines of training show, pictures and the
# film; one file, no network.

CURVES = ("reward", "gap_50", "first_wins", "one_sided", "cosine", "log_prob", "prior_error", "opacity")


def write_page_of(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> Path:
    out = folder / "report"
    made = jobs(settings, folder, table, shown)
    findings = pages.run(made, out, quiet=True)
    what = f"{len(settings.pairs())} assets: {len(settings.prompts)} prompts x {settings.scene.assets} seeds"
    introduction = (
        f"Text to 3D by score distillation, {what}, {settings.loop.steps} steps each, prior"
        f" {Path(settings.scene.prior).name}, seed {settings.seed}. All arms share starts, views, times and"
        f" noises. {notes(settings)}"
    )
    film = folder / "turntable.mp4"
    extra = ""
    if shown and film.exists():
        video = data_uri(film.read_bytes(), "video/mp4")
        extra = (
            '<section><h2>Turntable</h2><video controls loop muted style="max-width:100%"'
            f' src="{video}"></video></section>'
        )
    return write_page(
        out / "index.html",
        "Text to 3D: " + ", ".join(settings.arms),
        introduction,
        made,
        findings,
        extra=extra,
    )


def notes(settings: DistillSettings) -> str:
    """What arms cost that do more work than a method's own; empty where none does."""
    starts = {arm: of_arm(settings, arm)[1] for arm in settings.arms}
    return " ".join(
        f"{arm} optimises {n} starts of each asset and keeps one: {n} times the steps."
        for arm, n in starts.items()
        if n > 1
    )


def jobs(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> list[Job]:
    facts = Facts(
        n=len(settings.pairs()),
        unit="pairs of prompt and seed",
        seeds=str(settings.seed),
        interval=INTERVAL if table else "",
    )
    lines = [json.loads(line) for line in (folder / STATS).read_text().splitlines()]

    def compared(where: Path) -> Finding:
        del where
        arms = (table or {})["arms"]
        rows = [
            {
                "arm": arm,
                "win rate": row["win_rate"],
                "low": row["ci95"][0],
                "high": row["ci95"][1],
                "n": row["n"],
            }
            | {name: value["mean"] for name, value in row["measures"].items()}
            | {"Elo": row["elo"]["mean"]}
            for arm, row in arms.items()
        ]
        says = [f"Evaluator: {(table or {})['evaluator']}."]
        says += [
            f"{arm} beats {BASE} in {row['win_rate']:.1%} of pairs [{row['ci95'][0]:.1%},"
            f" {row['ci95'][1]:.1%}]."
            for arm, row in arms.items()
            if arm != BASE
        ]
        return Finding(facts=facts, data={"arms": arms}, rows=rows, says=says)

    def drawn(where: Path) -> Finding:
        (where / "grid.png").write_bytes((folder / "grid.png").read_bytes())
        caption = f"The first {shown} assets, an arm a row; prompt and seed below"
        return Finding(facts=facts, data={}, images={caption: "grid.png"})

    def stepped(where: Path) -> Finding:
        del where
        return Finding(facts=facts, data={"curves": curves(lines)}, rows=lines)

    identity = {"settings": settings.to_dict(), "lines": lines}
    made = (
        [
            Job(
                key="arms",
                title=f"Arms against {BASE}",
                compute=compared,
                plots={"wins": plot_wins},
                inputs={"table": table},
            )
        ]
        if table
        else []
    )
    made += [Job(key="pictures", title="Pictures", compute=drawn, inputs=identity)] if shown else []
    return [
        *made,
        Job(
            key="steps",
            title="While training",
            compute=stepped,
            plots={"curves": plot_curves},
            inputs=identity,
        ),
    ]


def curves(lines: list[dict]) -> dict:
    """Means over batches by figure and arm: {'reward': {'dreamdpo': [[step, mean], ...]}}."""
    sums: dict[str, dict[str, dict[int, list[float]]]] = {}
    for line in lines:
        for name in CURVES:
            if name in line:
                sums.setdefault(name, {}).setdefault(line["arm"], {}).setdefault(line["step"], []).append(
                    line[name]
                )
    return {
        name: {
            arm: [[step, sum(values) / len(values)] for step, values in sorted(steps.items())]
            for arm, steps in arms.items()
        }
        for name, arms in sums.items()
    }


def plot_wins(data: Mapping):
    rates = {arm: row for arm, row in data["arms"].items() if arm != BASE}
    return plot_rates([(f"win rate against {BASE}, 95 %", rates)], "")


def plot_curves(data: Mapping):
    names = list(data["curves"])
    rows = -(-len(names) // 2)
    drawn, axes = style.figure(columns=2, rows=rows, size=(9.4, 2.4 * rows))
    panels = axes.ravel() if hasattr(axes, "ravel") else [axes]
    for axis, name in zip(panels, names, strict=False):
        for arm, points in data["curves"][name].items():
            axis.plot(*zip(*points, strict=True), label=arm, linewidth=1)
        axis.set(xlabel="step", ylabel=name)
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    panels[0].legend(fontsize=6)
    return drawn
