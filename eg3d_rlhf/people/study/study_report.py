"""Makes a study's report: computes the figures and the sentences that they allow, writes them as JSON, and
renders the page from the JSON alone.

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
BINS = 11  # bins of the latents' win rates; the middle one contains one half
FEW_ANNOTATORS = 5  # with fewer annotators, a sentence warns that their variance is hardly known
WIDE = 0.15  # an interval of more than twice this width is called wide
IMAGE_SIDE = 192  # pixels
YAW = 0.35  # radians; shows the face and one side


def compute(
    design: StudyDesign,
    rows: Iterable[JudgementRow],
    interim: bool = False,
    pictures: int = 6,
    device: str = "cpu",
    now: datetime | None = None,
) -> dict:
    """Compute everything that a report contains, as JSON values.

    Args:
        design: of the study.
        rows: its judgements.
        interim: allow a report before the stopping rule is met.
        pictures: number of pairs that are shown for either generator; with 0 no generator is loaded.
        device: on which shapes are computed.
        now: time of the report.
    """
    analysis = analyse(design, rows, interim, now)
    # The pairs with the highest win rates of b, and those with the highest of a.
    best = analysis["pairs"]
    worst = analysis["pairs"][::-1]
    shown = {
        "best": [p for p in best if p["win_rate"] > 0.5][:pictures],
        "worst": [p for p in worst if p["win_rate"] < 0.5][:pictures],
    }
    if any(shown.values()):
        # Each latent is rendered once per generator.
        seeds = sorted({p["seed"] for pairs in shown.values() for p in pairs})
        images = {side: shape_images(design, getattr(design, side), seeds, device) for side in ("a", "b")}
        shown = {
            end: [{**p, **{side: images[side][p["seed"]] for side in images}} for p in pairs]
            for end, pairs in shown.items()
        }
    return {
        **analysis,
        "conclusions": conclusions(analysis),
        "images": shown if any(shown.values()) else None,
    }


def load_contender(side: Contender, device: str = "cpu") -> LoadedGenerator:
    """Load the generator of a contender.

    Raises: FileNotFoundError; ValueError if the file contains other weights than the design.
    """
    loaded = load_generator(side.source or None, device)
    if loaded.hash != side.generator:
        expected = side.generator[:12]
        actual = loaded.hash[:12]
        raise ValueError(
            f"{side.label}: expected the design's weights {expected}... in {loaded.path}, got {actual}..."
            " Restore the file."
        )
    return loaded


def shape_images(
    design: StudyDesign, side: Contender, seeds: Sequence[int], device: str = "cpu"
) -> dict[int, str]:
    """Render the shapes of latents with shading. Camera, light, level and crop are the same for every
    generator.

    Returns: seed -> PNG as a data URL.
    """
    generator = load_contender(side, device).generator
    images = {}
    grid = SlabSpec.of(generator.bounds, design.resolution)
    for seed in seeds:
        with torch.no_grad():
            # [1, D, H, W]
            sigma = generator.field(ws_of_seeds(generator, [seed], design.psi)).density_grid(grid)
        grey = shade(sigma, YAW, IMAGE_SIDE, design.level)[0, 0].numpy()  # [H, W] in 0..1
        # The PNG is embedded in the page, so no file is written.
        buffer = io.BytesIO()
        PIL.Image.fromarray((grey.clip(0, 1) * 255).round().astype("uint8")).save(
            buffer, format="png", optimize=True
        )
        images[seed] = data_uri(buffer.getvalue(), "image/png")
    return images


def page(report: dict) -> str:
    """Render the report as one HTML file from the result of `compute`. static/report.html is the template."""
    # autoescape: names of annotators and labels come from users.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True)
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda share: "none" if share is None else percent(share),
        "p_value": p_value,
        "interval": lambda ends: "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}",
        # Position of a share 0..1 on the common horizontal axis of the figures, in pixels.
        "x": lambda share, more=0: f"{210 + 390 * share + more:.1f}",
    }
    environment.filters |= filters
    # The plan has a section of its own, and the seeds are too many for a page.
    settings = {k: v for k, v in report["design"].items() if k not in ("plan", "latent_seeds", "hash")}
    for side in ("a", "b"):
        # Paths are shortened, because a report may be published.
        settings[side] = {**settings[side], "source": Path(settings[side]["source"]).name or "bundled"}
    settings = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in settings.items()}
    # A win rate of 1 belongs to the last bin.
    bins = Counter(min(BINS - 1, int(pair["win_rate"] * BINS)) for pair in report["pairs"])
    style = (STATIC / "report.css").read_text()
    return environment.get_template("report.html").render(
        report, settings=settings, style=style, histogram_counts=[bins[i] for i in range(BINS)]
    )


def write(report: dict, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html to a folder, or interim-report.*. Returns both paths."""
    name = "interim-report" if report["interim"] else "report"
    # allow_nan=False: NaN is no valid JSON, and browsers reject it.
    text = json.dumps(report, indent=1, allow_nan=False)
    paths = folder / f"{name}.json", folder / f"{name}.html"
    write_atomic(paths[0], (text + "\n").encode())
    # The page is made from the parsed JSON, which proves that it needs nothing else.
    write_atomic(paths[1], page(json.loads(text)).encode())
    return paths


def conclusions(analysis: dict) -> list[str]:
    """Return sentences about the result, the most important ones first."""
    result = analysis["result"]
    design = analysis["design"]
    sentences = []
    if analysis["interim"]:
        sentences.append(
            f"INTERIM: {analysis['answered']} of {design['trials']} trials were answered when this report"
            " was made. The stopping rule is not met. Decisions from interim reports increase the rate of"
            " false alarms above the level of the interval."
        )
    if result["win_rate"] is None:
        return [
            *sentences,
            "No trial counts, so nothing can be concluded about the two generators. The exclusions below are"
            " the reason.",
        ]
    return [*sentences, *_main(result, design), *_doubts(analysis)]


def percent(value: float) -> str:
    """Format a share in per cent."""
    return f"{100 * value:.1f} %"


def p_value(p: float) -> str:
    """Format a p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _main(result: dict, design: dict) -> list[str]:
    """Return the sentences about the win rate, the interval and the test."""
    lo, hi = result["interval"]
    a = design["a"]["label"]
    b = design["b"]["label"]
    ties = "ties count half" if design["ties"] == "half" else "ties are excluded"
    first = (
        f"{b} won over {a} in {percent(result['win_rate'])} of {result['n']} trials ({ties}); the"
        f" {result['confidence']:.0%} interval is {percent(lo)} to {percent(hi)}. It accounts for"
        f" {result['annotators']} annotators and {result['latents']} latents."
    )
    # The interval excludes one half.
    if lo > 0.5 or hi < 0.5:
        better, worse, least = (b, a, lo) if lo > 0.5 else (a, b, 1 - hi)
        second = (
            f"The shapes of {better} are preferred to those of {worse}, in at least {percent(least)} of such"
            " trials according to this interval."
        )
    else:
        second = (
            "The interval contains one half: this study does not show that either generator is preferred."
            f" It excludes that {b} is preferred in more than {percent(hi)} or in less than {percent(lo)} of"
            " such trials. It does not show that the two are equal."
        )
    if result["p_exact"] is None:
        return [first, second, "Every trial was a tie, so no test is possible."]
    text = (
        f"Exact binomial test of the {result['a_wins'] + result['b_wins']} decided trials against one half:"
        f" {p_value(result['p_exact'])}"
    )
    effect = result["design_effect"]
    # Smaller effects do not change the conclusion, so the sentence stays short.
    if effect > 1.2:
        text += (
            f". This test treats trials as independent. Here they are worth only {1 / effect:.0%} of as many"
            f" independent trials (design effect {effect:.1f}). The test that accounts for this gives"
            f" {p_value(result['p_clustered'])}."
        )
    else:
        text += f". The test that accounts for annotators and latents gives {p_value(result['p_clustered'])}."
    return [first, second, text]


def _doubts(analysis: dict) -> list[str]:
    """Return the sentences about limitations of the result."""
    result = analysis["result"]
    sides = analysis["sides"]
    sentences = []
    lo, hi = result["interval"]
    if result["annotators"] == 1:
        sentences.append(
            "Only one annotator answered: the result is valid for this annotator and cannot be generalised."
        )
    elif result["annotators"] < FEW_ANNOTATORS:
        sentences.append(
            f"With {result['annotators']} annotators, the differences between people are hardly known."
            " Therefore the interval is wide."
        )
    if hi - lo > 2 * WIDE:
        sentences.append(
            f"The interval is {percent(hi - lo)} wide: the study is too small to give more than a first"
            " impression."
        )
    wide_lo, wide_hi = result["wilson"]
    # The clustered variance can be smaller than that of independent trials by chance.
    if hi - lo < wide_hi - wide_lo:
        sentences.append(
            "The interval is narrower than Wilson's for independent trials, because the annotators agreed"
            f" more than chance makes likely. A cautious reader uses Wilson's interval, {percent(wide_lo)}"
            f" to {percent(wide_hi)}."
        )
    all_in = analysis["sensitivity"]["without exclusions"]
    if analysis["exclusions"] and all_in["win_rate"] is not None:
        lo, hi = all_in["interval"]
        sentences.append(
            f"Without exclusions the win rate is {percent(all_in['win_rate'])} ({percent(lo)} to"
            f" {percent(hi)})."
        )
        # The signs of both conclusions: 1 for b, -1 for a, 0 for none.
        if len({(low > 0.5) - (high < 0.5) for low, high in (all_in["interval"], result["interval"])}) > 1:
            sentences.append("This leads to another conclusion: the result depends on the exclusions.")
    if sides["p_random"] < 0.001:
        sentences.append(
            f"b was on the left in {sides['b_left']} of {sides['n']} trials, which is very unlikely with"
            " random sides. Find out why."
        )
    if sides["left_share"] is not None and not sides["left_ci"][0] <= 0.5 <= sides["left_ci"][1]:
        sentences.append(
            f"The annotators chose the left side in {percent(sides['left_share'])} of the decided trials."
            " Because sides are random, this favours neither generator; it moves the win rate towards one"
            " half."
        )
    return sentences
