"""One page of a run: the table of its arms with intervals, what the lines of training show, pictures and the film; one file, no network."""

import json
from collections.abc import Mapping
from pathlib import Path

from eg3d_rlhf.experiments import jobs as report_jobs
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Facts, Finding, Job
from eg3d_rlhf.experiments.page import data_uri, write_page
from eg3d_rlhf.experiments.run import STATS
from eg3d_rlhf.tuning.distill.compare import BASE, INTERVAL
from eg3d_rlhf.tuning.distill.config import DistillSettings
from eg3d_rlhf.tuning.distill.methods import of_arm

CURVES = ("reward", "gap_50", "first_wins", "one_sided", "cosine", "log_prob", "prior_error", "opacity")


def write(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> Path:
    """<folder>/report/index.html; returns the path."""
    out = folder / "report"
    made = jobs(settings, folder, table, shown)
    findings = report_jobs.run(made, out, quiet=True)
    what = f"{len(settings.pairs())} assets: {len(settings.prompts)} prompts x {settings.scene.assets} seeds"
    introduction = (
        f"Text to 3D by score distillation, {what}, {settings.loop.steps} steps each, prior {Path(settings.scene.prior).name}, seed "
        f"{settings.seed}. All arms share starts, views, times and noises. {notes(settings)}"
    )
    film = folder / "turntable.mp4"
    extra = ""
    if shown and film.exists():
        video = data_uri(film.read_bytes(), "video/mp4")
        extra = f'<section><h2>Turntable</h2><video controls loop muted style="max-width:100%" src="{video}"></video></section>'
    return write_page(out / "index.html", "Text to 3D: " + ", ".join(settings.arms), introduction, made, findings, extra=extra)


def notes(settings: DistillSettings) -> str:
    """What arms cost that do more work than a method's own; empty where none does."""
    starts = {arm: of_arm(settings, arm)[1] for arm in settings.arms}
    return " ".join(f"{arm} optimises {n} starts of each asset and keeps one: {n} times the steps." for arm, n in starts.items() if n > 1)


def jobs(settings: DistillSettings, folder: Path, table: Mapping | None, shown: int) -> list[Job]:
    """The page's parts."""
    facts = Facts(n=len(settings.pairs()), unit="pairs of prompt and seed", seeds=str(settings.seed), interval=INTERVAL if table else "")
    lines = [json.loads(line) for line in (folder / STATS).read_text().splitlines()]

    def compared(where: Path) -> Finding:
        del where
        arms = (table or {})["arms"]
        rows = [
            {"arm": arm, "win rate": one["win_rate"], "low": one["ci95"][0], "high": one["ci95"][1], "n": one["n"]}
            | {name: value["mean"] for name, value in one["measures"].items()} | ({"Elo": one["elo"]["mean"]} if "elo" in one else {})
            for arm, one in arms.items()
        ]  # fmt: skip
        says = [f"Judge: {(table or {})['judge']}."]
        says += [f"{arm} beats {BASE} in {one['win_rate']:.1%} of pairs [{one['ci95'][0]:.1%}, {one['ci95'][1]:.1%}]."
                 for arm, one in arms.items() if arm != BASE]
        return Finding(facts=facts, data={"arms": arms}, rows=rows, says=says)

    def drawn(where: Path) -> Finding:
        (where / "grid.png").write_bytes((folder / "grid.png").read_bytes())
        caption = f"The first {shown} assets, an arm a row; prompt and seed below"
        return Finding(facts=facts, data={}, pictures={caption: "grid.png"})

    def stepped(where: Path) -> Finding:
        del where
        return Finding(facts=facts, data={"curves": curves(lines)}, rows=lines)

    identity = {"settings": settings.to_dict(), "lines": lines}
    found = [Job(key="arms", title=f"Arms against {BASE}", compute=compared, plots={"wins": plot_wins},
                 inputs={"table": table})] if table else []
    found += [Job(key="pictures", title="Pictures", compute=drawn, inputs=identity)] if shown else []
    return [*found, Job(key="steps", title="While training", compute=stepped, plots={"curves": plot_curves}, inputs=identity)]


def curves(lines: list[dict]) -> dict:
    """Means over batches by figure and arm: {'reward': {'dreamdpo': [[step, mean], ...]}}."""
    sums: dict[str, dict[str, dict[int, list[float]]]] = {}
    for line in lines:
        for name in CURVES:
            if name in line:
                sums.setdefault(name, {}).setdefault(line["arm"], {}).setdefault(line["step"], []).append(line[name])
    return {
        name: {arm: [[step, sum(values) / len(values)] for step, values in sorted(steps.items())] for arm, steps in arms.items()}
        for name, arms in sums.items()
    }


def plot_wins(data: Mapping):
    """Win rates with their intervals."""
    drawn, axis = style.figure(size=(5.6, 2.6))
    arms = [(arm, one) for arm, one in data["arms"].items() if arm != BASE]
    for place, (_, one) in enumerate(arms):
        low, high = one["win_rate"] - one["ci95"][0], one["ci95"][1] - one["win_rate"]
        axis.errorbar(one["win_rate"], place, xerr=[[max(0, low)], [max(0, high)]], fmt="o", color=style.colour("after"), capsize=3)
    axis.axvline(0.5, color=style.colour("noise"), linewidth=1)
    axis.set_yticks(range(len(arms)), [arm for arm, _ in arms], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=f"win rate against {BASE}, 95 %", xlim=(0, 1))
    return drawn


def plot_curves(data: Mapping):
    """What every tick measured, an arm a line."""
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
