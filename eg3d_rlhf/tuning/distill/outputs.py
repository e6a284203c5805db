"""Writes the results of a finished run.

The folder of the run then contains:

    assets-<arm>.safetensors             all assets of an arm, in the order of `DistillSettings.pairs`
    meshes/<arm>/<number>.glb, .ply      meshes of the first --show assets of an arm
    grid.png, turntable.mp4              images and a video of the first --show assets, with one row per arm
    compare.json, judgements.jsonl       table and single judgements of a comparison of arms
    report/index.html                    page with table, curves, images and video, in one file
"""

import json
import os
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
from training import rehearsal
from training.progress import tqdm
from training.storage import write_atomic

CELL = 176  # smallest edge of an image in grid.png and turntable.mp4, in pixels
FRAMES = 24  # number of frames of the turntable, for a full turn
FPS = 8  # frames per second of the turntable
MESH = 64  # grid points per edge of the cube from which meshes are extracted


def write(settings: DistillSettings, scene: Scene, run: Run, shown_limit: int) -> None:
    """Write all results of a run.

    Args:
        settings: settings of the run.
        scene: scene of the run, with its measures and its evaluator.
        run: the run, with its folder.
        shown_limit: number of assets that images, video and meshes show.
    """
    pairs = settings.pairs()
    assets_by_arm = {}
    for arm in settings.arms:
        # Read from files, because other processes may have computed these parts.
        batches = [
            load_assets(run.folder / PARTS / Part(arm, batch_index).name / ASSETS)
            for batch_index in range(len(settings.batches()))
        ]
        assets_by_arm[arm] = join_assets(batches)
        assets_by_arm[arm].save(run.folder / f"assets-{arm}.safetensors", pairs)
    prompts = [prompt for prompt, _ in pairs]
    table = None
    if len(assets_by_arm) > 1 and scene.evaluator is not None:
        print("Comparing the arms.", flush=True)
        measured_by_arm = {
            arm: scene.measures(arm_assets, prompts) for arm, arm_assets in assets_by_arm.items()
        }
        table, judgements = compare(assets_by_arm, pairs, scene.evaluator, measured_by_arm)
        # compare.json contains the settings, so that it is complete without the other files of the run.
        table |= {"evaluator": scene.evaluator_description, "settings": settings.to_dict()}
        run.write("compare.json", table)
        write_atomic(
            run.folder / "judgements.jsonl",
            "".join(json.dumps(judgement._asdict()) + "\n" for judgement in judgements).encode(),
        )
    write_images(assets_by_arm, pairs, run.folder, shown_limit)
    page = write_run_page(settings, run.folder, table, min(shown_limit, len(pairs)))
    if table is not None:
        print(markdown(table), notes(settings), sep="\n")
    print(f"The page with the results is {page}.", flush=True)


def rehearse(settings: DistillSettings, scene: Scene, run: Run, shown_limit: int) -> None:
    """Compare and show the assets of the first batch alone, so that a rehearsal measures the time.

    Args:
        settings: settings of the run.
        scene: scene of the run.
        run: the run, with its folder.
        shown_limit: number of assets that images, video and meshes show.
    """
    all_pairs = settings.pairs()
    pairs = settings.batches()[0]
    prompts = [prompt for prompt, _ in pairs]
    assets_by_arm = {
        arm: load_assets(run.folder / PARTS / Part(arm, 0).name / ASSETS) for arm in settings.arms
    }
    if len(assets_by_arm) > 1 and scene.evaluator is not None:
        with rehearsal.timed(rehearsal.SUMMARY, "comparison of the arms"):
            rehearsal.first(all_pairs, len(pairs))  # the share of the assets
            measured_by_arm = {
                arm: scene.measures(arm_assets, prompts) for arm, arm_assets in assets_by_arm.items()
            }
            compare(assets_by_arm, pairs, scene.evaluator, measured_by_arm)
    with rehearsal.timed(rehearsal.SUMMARY, "images, video and meshes"):
        rehearsal.first(all_pairs[:shown_limit], len(pairs))
        write_images(assets_by_arm, pairs, run.folder, shown_limit)


def join_assets(batches: Sequence[Asset]) -> Asset:
    """Concatenate batches of assets, which have the same type and settings, to one batch."""
    first_batch = batches[0]
    joined_assets = type(first_batch)(sum(map(len, batches)), **first_batch.settings)
    states = [batch.state_dict() for batch in batches]
    # The first dimension of every parameter is the asset.
    joined_assets.load_state_dict(
        {
            parameter_name: torch.cat([state[parameter_name] for state in states])
            for parameter_name in first_batch.state_dict()
        }
    )
    return joined_assets.requires_grad_(False)


LONGEST_CAPTION = 90  # letters of a prompt below an image; longer prompts lose what they have in common


def captions_of(pairs: Sequence[tuple[str, int]]) -> list[str]:
    """Return the captions of assets: prompt and seed. The captions of different prompts differ.

    Long prompts are shortened: words with which all of them begin, and their end, are replaced by "...". If
    two prompts then have the same caption, all captions also have the number of the prompt.

    Args:
        pairs: (prompt, seed) of each asset.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    common_start = os.path.commonprefix(prompts) if len(prompts) > 1 else ""
    # cut after the last complete word
    common_start = common_start[: common_start.rfind(" ") + 1]
    short_texts = {}
    for prompt in prompts:
        text = prompt
        if len(text) > LONGEST_CAPTION and common_start:
            text = "..." + text.removeprefix(common_start)
        if len(text) > LONGEST_CAPTION:
            text = text[: LONGEST_CAPTION - 3] + "..."
        short_texts[prompt] = text
    if len(set(short_texts.values())) < len(prompts):
        short_texts = {prompt: f"{i + 1}: {short_texts[prompt]}" for i, prompt in enumerate(prompts)}
    return [f"{short_texts[prompt]}, {seed}" for prompt, seed in pairs]


def write_images(
    assets_by_arm: Mapping[str, Asset], pairs: Sequence[tuple[str, int]], folder: Path, shown_limit: int
) -> None:
    """Write grid.png, turntable.mp4 and the meshes of the first `shown_limit` assets of all arms.

    Args:
        assets_by_arm: name of an arm -> its assets.
        pairs: (prompt, seed) of each asset.
        folder: folder of the run.
        shown_limit: number of assets to show. With 0, nothing is written.
    """
    shown_count = min(shown_limit, len(pairs))
    if not shown_count:
        return
    shown_assets = {
        arm: arm_assets.select(list(range(shown_count))) for arm, arm_assets in assets_by_arm.items()
    }
    renders_by_arm = {arm: next(turns(arm_assets, 1)) for arm, arm_assets in shown_assets.items()}
    sheet_rows = [Row(cells=cells, name=arm) for arm, cells in renders_by_arm.items()]
    captions = captions_of(pairs[:shown_count])
    # All rows show the same prompts and seeds, so only the last row has captions.
    sheet_rows[-1] = Row(cells=sheet_rows[-1].cells, name=sheet_rows[-1].name, captions=captions)
    # The column of names gets 30 pixels and 15 pixels for each letter of the longest name.
    name_width = 30 + 15 * max(map(len, renders_by_arm))
    write_atomic(folder / "grid.png", png(sheet("", sheet_rows, name_width=name_width)))
    # `turns` and `tiled_frames` are generators: a frame is rendered when the video needs it, so that only one
    # frame is in memory.
    turntables = [turns(arm_assets, FRAMES) for arm_assets in shown_assets.values()]

    def tiled_frames() -> Iterator[np.ndarray]:
        """Yield the frames of the video, in which each arm is a row of images."""
        for arm_cells in zip(*turntables, strict=True):
            yield tile([cell for cells in arm_cells for cell in cells], shown_count)

    write_mp4(
        folder / "turntable.mp4",
        tqdm(tiled_frames(), total=FRAMES, desc="turntable", unit="frame", dynamic_ncols=True),
        fps=FPS,
    )
    for arm, arm_assets in tqdm(shown_assets.items(), desc="meshes", unit="arm", dynamic_ncols=True):
        for asset_index in range(shown_count):
            try:
                mesh, mesh_report = export_mesh(
                    arm_assets.select([asset_index]), MeshOptions(resolution=MESH, component="all")
                )
            # The density of an asset may have no surface. The meshes of all other assets are still written.
            except ValueError as error:
                print(f"Warning: asset {asset_index} of the arm {arm} has no mesh: {error}", flush=True)
                continue
            for suffix in (".glb", ".ply"):
                mesh.save(folder / "meshes" / arm / f"{asset_index:03d}{suffix}")
            mesh_report.write(
                folder / "meshes" / arm / f"{asset_index:03d}.json",
                prompt=pairs[asset_index][0],
                seed=pairs[asset_index][1],
            )


@torch.no_grad()
def turns(asset: Asset, frame_count: int) -> Iterator[list[np.ndarray]]:
    """Yield the frames of a full turn around assets, in front of a white background.

    Args:
        asset: assets to show.
        frame_count: number of frames. With 1, the only frame is a view 30 degrees from the front.
    Yields: list with one image for each asset, [R, R, 3] uint8. R is at least CELL.
    """
    render_size = min(128, 3 * asset.samples // 2)  # a higher resolution would only show interpolation
    device = next(asset.parameters()).device
    if frame_count == 1:
        # The second of twelve views around the asset is 30 degrees from the front.
        cameras = evenly_around(1, 12, **FINISHED).cameras[1:2]
    else:
        cameras = evenly_around(1, frame_count, **FINISHED).cameras
    enlargement = -(-CELL // render_size)  # CELL / pixels, rounded up
    for camera in cameras.to(device):
        # One camera for all assets.
        rendered_views = render_each(asset, [camera[None]], RenderOptions(resolution=render_size))[0]
        # `raw` is in -1..1, where -1 is black: adding 2 (1 - opacity) makes transparent pixels white.
        images_on_white = (rendered_views.raw + (1 - rendered_views.opacity) * 2).clamp(-1, 1)
        images_on_white = images_on_white.repeat_interleave(enlargement, dim=2).repeat_interleave(
            enlargement, dim=3
        )
        yield [to_uint8(image.cpu()) for image in images_on_white]


# --- page of a run, with the table of the arms, curves, images and video. It is one file, which loads nothing
# from a network.

# Metrics of stats.jsonl that are plotted.
CURVES = ("reward", "gap_50", "first_wins", "one_sided", "cosine", "log_prob", "prior_error", "opacity")


def write_run_page(settings: DistillSettings, folder: Path, table: Mapping | None, shown_count: int) -> Path:
    """Write the HTML page with the results of a run.

    Args:
        settings: settings of the run.
        folder: folder of the run.
        table: table of the comparison; None for a run with one arm.
        shown_count: number of assets in images and video; 0 for a page without them.
    Returns: path of the page.
    """
    report_folder = folder / "report"
    page_jobs = jobs(settings, folder, table, shown_count)
    # Sections whose inputs have not changed are read from a cache.
    findings = pages.run(page_jobs, report_folder, quiet=True)
    introduction = (
        f"Text to 3D by score distillation: {len(settings.pairs())} assets from {len(settings.prompts)}"
        f" prompts and {settings.scene.assets} seeds each, {settings.loop.steps} steps, prior"
        f" {Path(settings.scene.prior).name}, seed {settings.seed}. All arms have the same starting assets,"
        f" views, times and noises. {notes(settings)}"
    )
    video_file = folder / "turntable.mp4"
    video_section = ""
    if shown_count and video_file.exists():
        # The video is part of the page, so that the page is a single file.
        video = data_uri(video_file.read_bytes(), "video/mp4")
        video_section = (
            '<section><h2>Turntable</h2><video controls loop muted style="max-width:100%"'
            f' src="{video}"></video></section>'
        )
    return write_page(
        report_folder / "index.html",
        "Text to 3D: " + ", ".join(settings.arms),
        introduction,
        page_jobs,
        findings,
        extra_html=video_section,
    )


def notes(settings: DistillSettings) -> str:
    """Return sentences about the arms that optimise several starts of each asset; "" if there are none."""
    starts_by_arm = {arm: arm_settings(settings, arm)[1] for arm in settings.arms}
    return " ".join(
        f"{arm} optimises {start_count} starts of each asset and keeps one, which takes {start_count} times"
        " the computation."
        for arm, start_count in starts_by_arm.items()
        if start_count > 1
    )


def jobs(settings: DistillSettings, folder: Path, table: Mapping | None, shown_count: int) -> list[Job]:
    """Return the sections of the page: the table of a comparison, images, and curves of metrics.

    Args:
        settings: settings of the run.
        folder: folder of the run.
        table: table of the comparison; None for a page without it.
        shown_count: number of assets in the images; 0 for a page without images.
    """
    facts = Facts(
        n=len(settings.pairs()),
        unit="pairs of prompt and seed",
        seeds=str(settings.seed),
        interval=INTERVAL if table else "",
    )
    # Lines of all parts, which `distill_run.gather_stats` has written.
    stats_lines = [json.loads(stats_line) for stats_line in (folder / STATS).read_text().splitlines()]

    # The three functions below compute one section each. Their argument is the folder for the files of the
    # section.
    def comparison(section_folder: Path) -> Finding:
        del section_folder
        row_by_arm = (table or {})["arms"]
        table_rows = [
            {
                "arm": arm,
                "win rate": row["win_rate"],
                "low": row["ci95"][0],
                "high": row["ci95"][1],
                "n": row["n"],
            }
            | {name: measure_stats["mean"] for name, measure_stats in row["measures"].items()}
            | {"Elo": row["elo"]["mean"]}
            for arm, row in row_by_arm.items()
        ]
        sentences = [f"Held-out evaluator: {(table or {})['evaluator']}."]
        sentences += [
            f"{arm} beats {BASE} in {row['win_rate']:.1%} of pairs [{row['ci95'][0]:.1%},"
            f" {row['ci95'][1]:.1%}]."
            for arm, row in row_by_arm.items()
            if arm != BASE
        ]
        return Finding(facts=facts, data={"arms": row_by_arm}, rows=table_rows, says=sentences)

    def images(section_folder: Path) -> Finding:
        (section_folder / "grid.png").write_bytes((folder / "grid.png").read_bytes())
        caption = f"The first {shown_count} assets, one row per arm; prompt and seed are below the images"
        return Finding(facts=facts, data={}, images={caption: "grid.png"})

    def training_curves(section_folder: Path) -> Finding:
        del section_folder
        return Finding(facts=facts, data={"curves": curves(stats_lines)}, rows=stats_lines)

    # A section is read from the cache if these inputs are unchanged.
    run_inputs = {"settings": settings.to_dict(), "lines": stats_lines}
    sections = []
    if table:
        sections.append(
            Job(
                key="arms",
                title=f"Arms against {BASE}",
                compute=comparison,
                plots={"wins": plot_wins},
                inputs={"table": table},
            )
        )
    if shown_count:
        sections.append(Job(key="pictures", title="Images", compute=images, inputs=run_inputs))
    sections.append(
        Job(
            key="steps",
            title="Metrics during the optimisation",
            compute=training_curves,
            plots={"curves": plot_curves},
            inputs=run_inputs,
        )
    )
    return sections


def curves(stats_lines: list[dict]) -> dict:
    """Average each metric over the batches of an arm, for every step of stats.jsonl.

    Args:
        stats_lines: lines of stats.jsonl of all arms and batches.
    Returns: metric -> arm -> list of [step, mean], as in {'reward': {'dreamdpo': [[20, 0.1], [40, 0.3]]}}.
    """
    values_by_metric: dict[
        str, dict[str, dict[int, list[float]]]
    ] = {}  # metric -> arm -> step -> values of the batches
    for stats_line in stats_lines:
        for metric in CURVES:
            if metric in stats_line:
                steps_of_arm = values_by_metric.setdefault(metric, {}).setdefault(stats_line["arm"], {})
                steps_of_arm.setdefault(stats_line["step"], []).append(stats_line[metric])
    means_by_metric: dict[str, dict[str, list]] = {}
    for metric, steps_by_arm in values_by_metric.items():
        means_by_metric[metric] = {}
        for arm, values_by_step in steps_by_arm.items():
            means_by_metric[metric][arm] = [
                [step, sum(batch_values) / len(batch_values)]
                for step, batch_values in sorted(values_by_step.items())
            ]
    return means_by_metric


def plot_wins(table_data: Mapping):
    """Plot the win rates of the other arms against the arm `BASE`, with their intervals."""
    row_by_arm = {arm: row for arm, row in table_data["arms"].items() if arm != BASE}
    return plot_rates([(f"win rate against {BASE}, 95 %", row_by_arm)], "")


def plot_curves(curve_data: Mapping):
    """Plot each metric over the steps, in a panel of its own with one line per arm."""
    metrics = list(curve_data["curves"])
    panel_row_count = -(-len(metrics) // 2)  # two panels per row, rounded up
    figure, axes = style.figure(column_count=2, row_count=panel_row_count, size=(9.4, 2.4 * panel_row_count))
    # matplotlib returns an array of panels, but a single panel as itself.
    panels = axes.ravel() if hasattr(axes, "ravel") else [axes]
    # strict=False: with an odd number of metrics there is one panel more.
    for panel, metric in zip(panels, metrics, strict=False):
        for arm, points in curve_data["curves"][metric].items():
            panel.plot(*zip(*points, strict=True), label=arm, linewidth=1)  # from points (x, y) to lists x, y
        panel.set(xlabel="step", ylabel=metric)
    # With an odd number of metrics the last panel is empty.
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=6)
    return figure
