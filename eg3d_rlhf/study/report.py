"""A study's report: compute, then JSON, then the page, which reads only the JSON.

Letters: N latents.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.label.entities import JudgementRow
from eg3d_rlhf.study.analysis import analyse
from eg3d_rlhf.study.conclusions import conclusions, p_value, percent
from eg3d_rlhf.study.design import Contender, StudyDesign
from training.storage import write_atomic

STATIC = Path(__file__).parent / "static"
BINS = 11  # of the latents' win rates, the middle one about one half
PICTURE = 192  # pixels
YAW = 0.35  # radians: the face and one side


def compute(
    design: StudyDesign, rows: Iterable[JudgementRow], interim: bool = False, pictures: int = 6, device: str = "cpu",
    now: datetime | None = None,
) -> dict:
    """All that a report holds, JSON types only.

    Args: pictures: pairs shown of either end; 0 needs no generator.
    Raises: as `analyse` and `load_contender`.
    """
    analysis = analyse(design, rows, interim, now)
    shown = end_pairs(analysis["pairs"], pictures)
    if any(shown.values()):
        seeds = sorted({p["seed"] for pairs in shown.values() for p in pairs})
        drawn = {side: draw(design, getattr(design, side), seeds, device) for side in ("a", "b")}
        shown = {end: [{**p, **{side: drawn[side][p["seed"]] for side in drawn}} for p in pairs] for end, pairs in shown.items()}
    return {**analysis, "conclusions": conclusions(analysis), "pictures": shown if any(shown.values()) else None}


def end_pairs(pairs: Sequence[dict], count: int) -> dict[str, list[dict]]:
    """The pairs that went most for b and most for a, at most `count` each; a pair is in neither if it went for neither."""
    best = [p for p in pairs if p["win_rate"] > 0.5][:count]
    worst = [p for p in reversed(pairs) if p["win_rate"] < 0.5][:count]
    return {"best": best, "worst": worst}


def load_contender(of: Contender, device: str = "cpu") -> LoadedGenerator:
    """The generator of a design. Raises: FileNotFoundError; ValueError where the file holds other weights than were designed."""
    loaded = load_generator(of.source or None, device)
    if loaded.hash != of.generator:
        raise ValueError(
            f"{of.label}: expected the weights {of.generator[:12]}... of the design in {loaded.path}, got {loaded.hash[:12]}... Restore "
            "the file."
        )
    return loaded


def draw(design: StudyDesign, of: Contender, seeds: Sequence[int], device: str = "cpu") -> dict[int, str]:
    """Shaded pictures of latents, PNG data addresses by seed; camera, light, level and crop are the same for every generator."""
    import torch

    from eg3d_rlhf.reports.shape_view import shade
    from eg3d_rlhf.sigma.spec import SlabSpec

    generator, out = load_contender(of, device).generator, {}
    grid = SlabSpec.of(generator.bounds, design.resolution)
    for seed in seeds:
        with torch.no_grad():
            sigma = generator.field(ws_of_seeds(generator, [seed], design.psi)).density_grid(grid)  # [1, D, H, W]
        out[seed] = png_uri(shade(sigma, YAW, PICTURE, design.level, generator.bounds.side)[0, 0].numpy())
    return out


def png_uri(values) -> str:
    """A grey picture [H, W] in 0..1 as a data: address."""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray((values.clip(0, 1) * 255).round().astype("uint8")).save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(report: dict) -> str:
    """The report as one HTML file, from what `compute` gives alone; static/report.html says how it looks."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True)
    environment.filters |= {
        "percent": lambda share: "none" if share is None else percent(share), "p_value": p_value,
        "interval": lambda ends: "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}",
        "x": lambda share, more=0: f"{210 + 390 * share + more:.1f}",  # pixels
    }  # fmt: skip
    settings = {k: v for k, v in report["design"].items() if k not in ("plan", "latent_seeds", "hash")}
    for side in ("a", "b"):
        settings[side] = {**settings[side], "source": Path(settings[side]["source"]).name or "bundled"}
    settings = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in settings.items()}
    places = Counter(min(BINS - 1, int(pair["win_rate"] * BINS)) for pair in report["pairs"])
    style = (STATIC / "report.css").read_text()
    return environment.get_template("report.html").render(
        report, settings=settings, style=style, histogram_counts=[places[i] for i in range(BINS)]
    )


def write(report: dict, folder: Path) -> tuple[Path, Path]:
    """report.json and report.html in a folder; interim ones are named so."""
    name = "interim-report" if report["interim"] else "report"
    text = json.dumps(report, indent=1, allow_nan=False)
    paths = folder / f"{name}.json", folder / f"{name}.html"
    write_atomic(paths[0], (text + "\n").encode())
    write_atomic(paths[1], page(json.loads(text)).encode())
    return paths
