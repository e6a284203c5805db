"""Writes the results of a finished run: assets and meshes, a grid of images, a turntable, the table of a
comparison, and a page.

    assets-<arm>.safetensors             all assets of an arm, in the order of the pairs
    meshes/<arm>/<number>.glb, .ply      of the first --show assets
    grid.png, turntable.mp4              the same assets, one row per arm
    compare.json, judgements.jsonl       of a comparison
    report/index.html                    one file: table, curves, images, video
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
from eg3d_rlhf.tuning.distill.methods import arm_settings
from eg3d_rlhf.tuning.distill.scene import Scene
from training.progress import tqdm
from training.storage import write_atomic

# Least number of pixels per cell, frames of a turn, frames per second.
CELL = 176
FRAMES = 24
FPS = 8
MESH = 64  # grid points per edge for meshes


def write(settings: DistillSettings, scene: Scene, run: Run, show: int) -> None:
    """Write all results of a run. `show` is the number of assets in images and meshes."""
    pairs = settings.pairs()
    arms = {}
    for arm in settings.arms:
        # Read from the disk: with several processes, other processes have made most of them.
        batches = [
            load_assets(run.folder / PARTS / Part(arm, k).name / ASSETS)
            for k in range(len(settings.batches()))
        ]
        arms[arm] = join_assets(batches)
        arms[arm].save(run.folder / f"assets-{arm}.safetensors", pairs)
    prompts = [prompt for prompt, _ in pairs]
    table = None
    if len(arms) > 1 and scene.evaluator is not None:
        print("Comparing the arms.", flush=True)
        measured = {arm: scene.measures(asset, prompts) for arm, asset in arms.items()}
        table, judgements = compare(arms, pairs, scene.evaluator, measured)
        # The settings are part of the table, so that it can be understood without the run.
        table |= {"evaluator": scene.evaluator_description, "settings": settings.to_dict()}
        run.write("compare.json", table)
        write_atomic(
            run.folder / "judgements.jsonl",
            "".join(json.dumps(j._asdict()) + "\n" for j in judgements).encode(),
        )
    write_images(arms, pairs, run.folder, show)
    page = write_run_page(settings, run.folder, table, min(show, len(pairs)))
    if table is not None:
        print(markdown(table), notes(settings), sep="\n")
    print(f"Page: {page}", flush=True)


def join_assets(assets: Sequence[Asset]) -> Asset:
    """Concatenate batches of assets of the same type and settings."""
    first = assets[0]
    # Parameters have the asset as their first dimension, so batches are concatenated along it.
    joined = type(first)(sum(map(len, assets)), **first.settings)
    states = [batch.state_dict() for batch in assets]
    joined.load_state_dict(
        {name: torch.cat([state[name] for state in states]) for name in first.state_dict()}
    )
    return joined.requires_grad_(False)


def write_images(
    arms: Mapping[str, Asset], pairs: Sequence[tuple[str, int]], folder: Path, show: int
) -> None:
    """Write grid.png, turntable.mp4 and the meshes of the first `show` assets of all arms."""
    count = min(show, len(pairs))
    if not count:
        return
    chosen = {arm: asset.pick(list(range(count))) for arm, asset in arms.items()}
    renders = {arm: next(turns(asset, 1)) for arm, asset in chosen.items()}
    rows = [Row(cells=cells, name=arm) for arm, cells in renders.items()]
    # longer texts would not fit a cell
    captions = [f"{prompt[:19]}..., {seed}" for prompt, seed in pairs[:count]]
    # All rows show the same assets, so captions below the last row are enough.
    rows[-1] = Row(cells=rows[-1].cells, name=rows[-1].name, captions=captions)
    write_atomic(folder / "grid.png", png(sheet("", rows, names=30 + 15 * max(map(len, renders)))))
    # Generators: nothing is rendered yet.
    turntables = [turns(asset, FRAMES) for asset in chosen.values()]
    # Frames are rendered one by one while the video is written, so that they need not all be in memory.
    frames = (
        tile([cell for cells in step for cell in cells], count) for step in zip(*turntables, strict=True)
    )
    write_mp4(
        folder / "turntable.mp4",
        tqdm(frames, total=FRAMES, desc="turntable", unit="frame", dynamic_ncols=True),
        fps=FPS,
    )
    for arm, asset in tqdm(chosen.items(), desc="meshes", unit="arm", dynamic_ncols=True):
        for k in range(count):
            try:
                mesh, report = export_mesh(asset.pick([k]), MeshOptions(resolution=MESH, component="all"))
            # An asset without a surface has no mesh; the others are still written.
            except ValueError as error:
                print(f"Warning: no mesh of {arm}, asset {k}: {error}", flush=True)
                continue
            for suffix in (".glb", ".ply"):
                mesh.save(folder / "meshes" / arm / f"{k:03d}{suffix}")
            report.write(folder / "meshes" / arm / f"{k:03d}.json", prompt=pairs[k][0], seed=pairs[k][1])


@torch.no_grad()
def turns(asset: Asset, frames: int) -> Iterator[list[np.ndarray]]:
    """Yield the frames of a full turn, each as uint8 images [R, R, 3] of all assets. A single frame is a view
    from a little to the right of the front.
    """
    pixels = min(128, 3 * asset.samples // 2)  # more pixels would only show interpolation
    views = evenly_around(1, frames, **FINISHED)
    device = next(asset.parameters()).device
    # A single frame is the second of twelve views: 30 degrees from the front.
    cameras = evenly_around(1, max(frames, 12), **FINISHED).cameras[1:2] if frames == 1 else views.cameras
    # One camera for all assets at a time.
    for camera in cameras.to(device):
        rendered = render_each(asset, [camera[None]], RenderOptions(resolution=pixels))[0]
        # White behind the asset: `raw` is in -1..1, so white is 1, and (1 - opacity) * 2 covers the range.
        white = (rendered.raw + (1 - rendered.opacity) * 2).clamp(-1, 1)
        # Small renders are enlarged by a whole factor, so that a cell is at least CELL pixels wide.
        white = white.repeat_interleave(-(-CELL // pixels), dim=2).repeat_interleave(
            -(-CELL // pixels), dim=3
        )
        yield [to_uint8(image.cpu()) for image in white]


# --- page of a run: table of the arms with intervals, curves of the figures, images and the video; one file
# that loads nothing from a network

# figures of stats.jsonl that are plotted
CURVES = ("reward", "gap_50", "first_wins", "one_sided", "cosine", "log_prob", "prior_error", "opacity")


def write_run_page(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> Path:
    """Write the page of a run. Returns its path."""
    out = folder / "report"
    page_jobs = jobs(settings, folder, table, shown)
    # Sections whose inputs have not changed come from the cache.
    findings = pages.run(page_jobs, out, quiet=True)
    amount = (
        f"{len(settings.pairs())} assets: {len(settings.prompts)} prompts x {settings.scene.assets} seeds"
    )
    introduction = (
        f"Text to 3D by score distillation, {amount}, {settings.loop.steps} steps each, prior"
        f" {Path(settings.scene.prior).name}, seed {settings.seed}. All arms have the same starts, views,"
        f" times and noises. {notes(settings)}"
    )
    video_file = folder / "turntable.mp4"
    extra = ""
    if shown and video_file.exists():
        # Embedded, so that the page is one file.
        video = data_uri(video_file.read_bytes(), "video/mp4")
        extra = (
            '<section><h2>Turntable</h2><video controls loop muted style="max-width:100%"'
            f' src="{video}"></video></section>'
        )
    return write_page(
        out / "index.html",
        "Text to 3D: " + ", ".join(settings.arms),
        introduction,
        page_jobs,
        findings,
        extra=extra,
    )


def notes(settings: DistillSettings) -> str:
    """Return sentences about arms that do more work than others; empty if there are none."""
    starts = {arm: arm_settings(settings, arm)[1] for arm in settings.arms}
    return " ".join(
        f"{arm} optimises {n} starts of each asset and keeps one, which takes {n} times the steps."
        for arm, n in starts.items()
        if n > 1
    )


def jobs(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> list[Job]:
    """Return the sections of the page: table, images, curves."""
    facts = Facts(
        n=len(settings.pairs()),
        unit="pairs of prompt and seed",
        seeds=str(settings.seed),
        interval=INTERVAL if table else "",
    )
    # The lines of all parts, gathered by `gather_stats`.
    lines = [json.loads(line) for line in (folder / STATS).read_text().splitlines()]

    def comparison(where: Path) -> Finding:
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
        sentences = [f"Held-out evaluator: {(table or {})['evaluator']}."]
        sentences += [
            f"{arm} beats {BASE} in {row['win_rate']:.1%} of pairs [{row['ci95'][0]:.1%},"
            f" {row['ci95'][1]:.1%}]."
            for arm, row in arms.items()
            if arm != BASE
        ]
        return Finding(facts=facts, data={"arms": arms}, rows=rows, says=sentences)

    def images(where: Path) -> Finding:
        (where / "grid.png").write_bytes((folder / "grid.png").read_bytes())
        caption = f"The first {shown} assets, one row per arm; prompt and seed are below them"
        return Finding(facts=facts, data={}, images={caption: "grid.png"})

    def training_curves(where: Path) -> Finding:
        del where
        return Finding(facts=facts, data={"curves": curves(lines)}, rows=lines)

    # The cache of the page depends on these values.
    identity = {"settings": settings.to_dict(), "lines": lines}
    sections = (
        [
            Job(
                key="arms",
                title=f"Arms against {BASE}",
                compute=comparison,
                plots={"wins": plot_wins},
                inputs={"table": table},
            )
        ]
        if table
        else []
    )
    sections += [Job(key="pictures", title="Images", compute=images, inputs=identity)] if shown else []
    return [
        *sections,
        Job(
            key="steps",
            title="Figures during training",
            compute=training_curves,
            plots={"curves": plot_curves},
            inputs=identity,
        ),
    ]


def curves(lines: list[dict]) -> dict:
    """Average figures over batches, by figure and arm: {'reward': {'dreamdpo': [[step, mean], ...]}}."""
    sums: dict[str, dict[str, dict[int, list[float]]]] = {}
    for line in lines:
        for name in CURVES:
            if name in line:
                # figure -> arm -> step -> values of the batches
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
    """Plot the win rates with their intervals."""
    # The base has no win rate against itself.
    rates = {arm: row for arm, row in data["arms"].items() if arm != BASE}
    return plot_rates([(f"win rate against {BASE}, 95 %", rates)], "")


def plot_curves(data: Mapping):
    """Plot each figure over the steps, one panel per figure."""
    names = list(data["curves"])
    # Two panels per row, rounded up.
    rows = -(-len(names) // 2)
    figure, axes = style.figure(columns=2, rows=rows, size=(9.4, 2.4 * rows))
    # A single panel is no array.
    panels = axes.ravel() if hasattr(axes, "ravel") else [axes]
    for axis, name in zip(panels, names, strict=False):
        for arm, points in data["curves"][name].items():
            axis.plot(*zip(*points, strict=True), label=arm, linewidth=1)
        axis.set(xlabel="step", ylabel=name)
    # An odd number of figures leaves an empty panel.
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    panels[0].legend(fontsize=6)
    return figure
