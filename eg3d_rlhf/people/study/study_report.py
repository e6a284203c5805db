"""A study's report: compute, then JSON, then the page, which reads only the JSON; and the sentences that its
figures allow.

Letters: N latents.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import PIL.Image
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import data_uri
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.people.label.entities import JudgementRow
from eg3d_rlhf.people.study.analysis import analyse
from eg3d_rlhf.people.study.design import Contender, StudyDesign
from training.storage import write_atomic

STATIC = Path(__file__).parent / "static"
BINS = 11  # of the latents' win rates, the middle one about one half
FEW_ANNOTATORS = 5  # below, the interval rests on very little
WIDE = 0.15  # half a width beyond which a study says little
PICTURE = 192  # pixels
YAW = 0.35  # radians: the face and one side


def compute(
    design: StudyDesign,
    rows: Iterable[JudgementRow],
    interim: bool = False,
    pictures: int = 6,
    device: str = "cpu",
    now: datetime | None = None,
) -> dict:
    """All that a report holds, JSON types only.

    Args: pictures: pairs shown of either end; 0 needs no generator.
    """
    analysis = analyse(design, rows, interim, now)
    # shown are those that went most for b and for a
    best = analysis["pairs"]
    worst = analysis["pairs"][::-1]
    shown = {
        "best": [p for p in best if p["win_rate"] > 0.5][:pictures],
        "worst": [p for p in worst if p["win_rate"] < 0.5][:pictures],
    }
    if any(shown.values()):
        seeds = sorted({p["seed"] for pairs in shown.values() for p in pairs})
        drawn = {side: draw(design, getattr(design, side), seeds, device) for side in ("a", "b")}
        shown = {
            end: [{**p, **{side: drawn[side][p["seed"]] for side in drawn}} for p in pairs]
            for end, pairs in shown.items()
        }
    return {
        **analysis,
        "conclusions": conclusions(analysis),
        "images": shown if any(shown.values()) else None,
    }


def load_contender(of: Contender, device: str = "cpu") -> LoadedGenerator:
    """The generator of a design.

    Raises: FileNotFoundError; ValueError where the file holds other weights than were designed.
    """
    loaded = load_generator(of.source or None, device)
    if loaded.hash != of.generator:
        wanted = of.generator[:12]
        got = loaded.hash[:12]
        raise ValueError(
            f"{of.label}: expected the design's weights {wanted}... in {loaded.path}, got {got}... Restore"
            " the file."
        )
    return loaded


def draw(design: StudyDesign, of: Contender, seeds: Sequence[int], device: str = "cpu") -> dict[int, str]:
    """Shaded pictures of latents, PNG data addresses by seed; camera, light, level and crop are the same for
    every generator.
    """

    generator = load_contender(of, device).generator
    out = {}
    grid = SlabSpec.of(generator.bounds, design.resolution)
    for seed in seeds:
        with torch.no_grad():
            # [1, D, H, W]
            sigma = generator.field(ws_of_seeds(generator, [seed], design.psi)).density_grid(grid)
        grey = shade(sigma, YAW, PICTURE, design.level)[0, 0].numpy()  # [H, W] in 0..1
        buffer = io.BytesIO()
        PIL.Image.fromarray((grey.clip(0, 1) * 255).round().astype("uint8")).save(
            buffer, format="png", optimize=True
        )
        out[seed] = data_uri(buffer.getvalue(), "image/png")
    return out


def page(report: dict) -> str:
    """The report as one HTML file, from what `compute` gives alone; static/report.html says how it looks."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True)
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda share: "none" if share is None else percent(share),
        "p_value": p_value,
        "interval": lambda ends: "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}",
        # where a share 0..1 lies on the figures' common axis
        "x": lambda share, more=0: f"{210 + 390 * share + more:.1f}",
    }
    environment.filters |= filters
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


def conclusions(analysis: dict) -> list[str]:
    """Sentences in the order in which they matter."""
    result = analysis["result"]
    design = analysis["design"]
    out = []
    if analysis["interim"]:
        out.append(
            f"INTERIM: {analysis['answered']} of {design['trials']} trials were answered when this was made."
            " The stopping rule is not met; deciding on such a look makes false alarms more frequent than"
            " the interval says."
        )
    if result["win_rate"] is None:
        return [
            *out,
            "No trial counts, so nothing can be said about the two generators. The exclusions below say why.",
        ]
    return [*out, *_main(result, design), *_doubts(analysis)]


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    """A p-value as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _main(result: dict, design: dict) -> list[str]:
    lo, hi = result["interval"]
    a = design["a"]["label"]
    b = design["b"]["label"]
    ties = "ties count half" if design["ties"] == "half" else "ties left out"
    first = (
        f"{b} won over {a} in {percent(result['win_rate'])} of {result['n']} trials ({ties}); the"
        f" {result['confidence']:.0%} interval, which allows for {result['annotators']} annotators and"
        f" {result['latents']} latents, is {percent(lo)} to {percent(hi)}."
    )
    if lo > 0.5 or hi < 0.5:
        better, worse, least = (b, a, lo) if lo > 0.5 else (a, b, 1 - hi)
        second = (
            f"The shapes of {better} are preferred to those of {worse}, in {percent(least)} of such trials at"
            " least, by that interval."
        )
    else:
        second = (
            "The interval contains one half: this study does not show that either is preferred. It rules out"
            f" that {b} is preferred in more than {percent(hi)} or in less than {percent(lo)} of such trials;"
            " it does not show that the two are equal."
        )
    if result["p_exact"] is None:
        return [first, second, "Every trial was a tie, so there is nothing to test."]
    text = (
        f"Exact binomial test of the {result['a_wins'] + result['b_wins']} decided trials against one half:"
        f" {p_value(result['p_exact'])}"
    )
    effect = result["design_effect"]
    if effect > 1.2:
        text += (
            f". It takes trials as independent, but here they are worth {1 / effect:.0%} of as many"
            f" independent ones (design effect {effect:.1f}); allowing for that:"
            f" {p_value(result['p_clustered'])}."
        )
    else:
        text += f"; allowing for annotators and latents: {p_value(result['p_clustered'])}."
    return [first, second, text]


def _doubts(analysis: dict) -> list[str]:
    result = analysis["result"]
    sides = analysis["sides"]
    out = []
    lo, hi = result["interval"]
    if result["annotators"] == 1:
        out.append(
            "One annotator answered: the result speaks of that annotator's taste and of nobody else's."
        )
    elif result["annotators"] < FEW_ANNOTATORS:
        out.append(
            f"With {result['annotators']} annotators, how much people differ is barely known; that is why the"
            " interval is wide."
        )
    if hi - lo > 2 * WIDE:
        out.append(
            f"The interval is {percent(hi - lo)} wide: the study is too small for more than a first"
            " impression."
        )
    wide_lo, wide_hi = result["wilson"]
    if hi - lo < wide_hi - wide_lo:
        out.append(
            "The interval happens to be narrower than Wilson's for independent trials, because the"
            " annotators agreed more than chance makes likely; who prefers caution reads Wilson's,"
            f" {percent(wide_lo)} to {percent(wide_hi)}."
        )
    all_in = analysis["sensitivity"]["without exclusions"]
    if analysis["exclusions"] and all_in["win_rate"] is not None:
        lo, hi = all_in["interval"]
        out.append(
            f"With nobody excluded the win rate is {percent(all_in['win_rate'])} ({percent(lo)} to"
            f" {percent(hi)})."
        )
        if len({(low > 0.5) - (high < 0.5) for low, high in (all_in["interval"], result["interval"])}) > 1:
            out.append("That leads to another conclusion: the result rests on the exclusions.")
    if sides["p_random"] < 0.001:
        out.append(
            f"b was on the left in {sides['b_left']} of {sides['n']} trials, which random sides hardly give:"
            " look into it."
        )
    if sides["left_share"] is not None and not sides["left_ci"][0] <= 0.5 <= sides["left_ci"][1]:
        out.append(
            f"The annotators chose the left in {percent(sides['left_share'])} of the decided trials. Random"
            " sides keep this from favouring either generator; it moves the win rate towards one half."
        )
    return out
