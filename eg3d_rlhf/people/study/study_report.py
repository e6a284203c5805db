"""Report of a study: its results and the conclusions that they allow, as JSON and as an HTML page.

The page is made from the JSON file alone.
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
from eg3d_rlhf.core.statistics import decimals_apart
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import data_uri
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.people.label.entities import JudgementRow
from eg3d_rlhf.people.study.analysis import analyse
from eg3d_rlhf.people.study.design import Contender, StudyDesign
from eg3d_rlhf.people.study.judge_panels import judge_panels, panel_sentences
from eg3d_rlhf.preferences.provenance import JUDGES, PEOPLE, select_labels
from training.storage import write_atomic

STATIC = Path(__file__).parent / "static"
# number of bins in the histogram of the latents' win rates; it is odd, so that one half is inside a bin
BINS = 11
FEW_ANNOTATORS = 5  # number of annotators below which a sentence warns that their variance is hardly known
WIDE = 0.15  # half of the width above which an interval is called wide
IMAGE_SIDE = 192  # width and height of an image in pixels
# horizontal angle of the camera in radians, from which the face and one side of a head are visible
YAW = 0.35


def compute(
    design: StudyDesign,
    judgement_rows: Iterable[JudgementRow],
    allow_interim: bool = False,
    image_pair_count: int = 6,
    device: str = "cpu",
    now: datetime | None = None,
    labels_from: str = PEOPLE,
) -> dict:
    """Compute the content of a report.

    The result is that of people. Judges (vision-language models) have panels of their own.

    Args:
        design: design of the study.
        judgement_rows: judgements of the study, of people and of judges.
        allow_interim: True allows a report before the stopping rule is met.
        image_pair_count: largest number of latents with images, for each generator: those at which it wins
            most clearly. 0: no images, and no generator is loaded.
        device: device on which shapes are computed.
        now: time of the report; None: the current time.
        labels_from: answers that the report contains: "people", "judges" or "all".

    Returns:
        Result of `analysis.analyse`, in JSON types, with "label_use" (see `LabelUse`), "panels" (see
        `judge_panels`), "conclusions" (sentences) and "images": the latents
        with the best and the worst win rate of b, with renders of both generators. "images" is None if there
        are no such latents.

    Raises:
        ValueError: the stopping rule is not met and `allow_interim` is False, or a judgement belongs to
            another study.
    """
    all_rows = list(judgement_rows)
    use = select_labels(all_rows, lambda judgement: judgement.provenance, labels_from)[1]
    people_rows = [judgement for judgement in all_rows if judgement.judge is None]
    judge_rows = [judgement for judgement in all_rows if judgement.judge is not None]
    panels = judge_panels(design, judge_rows, people_rows) if labels_from != PEOPLE else []
    # A study that judges alone have answered has no result of people that could be interim.
    is_judged_only = bool(panels) and (labels_from == JUDGES or not people_rows)
    if is_judged_only:
        analysis = analyse(design, [], True, now) | {"interim": False}
        first_sentences = ["The report contains no answer of people: the panels are of judges."]
    else:
        analysis = analyse(design, people_rows, allow_interim, now)
        first_sentences = conclusions(analysis)
    analysis |= {
        "panels": panels,
        "label_use": {**use.to_dict(), "text": use.text("answers")},
        "conclusions": [
            *first_sentences,
            *panel_sentences(panels, analysis["design"]["a"]["label"], analysis["design"]["b"]["label"]),
        ],
    }
    # analysis["pairs"] is sorted from the highest to the lowest win rate of b
    best_latents = [latent for latent in analysis["pairs"] if latent["win_rate"] > 0.5][:image_pair_count]
    worst_latents = [latent for latent in reversed(analysis["pairs"]) if latent["win_rate"] < 0.5][
        :image_pair_count
    ]
    if not best_latents and not worst_latents:
        return {**analysis, "images": None}
    seeds = sorted({latent["seed"] for latent in best_latents + worst_latents})
    a_images = shape_images(design, design.a, seeds, device)
    b_images = shape_images(design, design.b, seeds, device)

    def with_images(latent_records: list[dict]) -> list[dict]:
        """Add the images of both generators to the records of latents."""
        return [
            {**latent_record, "a": a_images[latent_record["seed"]], "b": b_images[latent_record["seed"]]}
            for latent_record in latent_records
        ]

    return {
        **analysis,
        "images": {"best": with_images(best_latents), "worst": with_images(worst_latents)},
    }


def load_contender(contender: Contender, device: str = "cpu") -> LoadedGenerator:
    """Load one of the two generators of a study.

    Raises:
        FileNotFoundError: the network file does not exist.
        ValueError: the file does not contain the weights that the design names.
    """
    loaded_generator = load_generator(contender.source or None, device)
    if loaded_generator.hash != contender.generator:
        raise ValueError(
            f"{contender.label}: the weights in {loaded_generator.path} have the SHA-256"
            f" {loaded_generator.hash[:12]}..., but the study was designed with {contender.generator[:12]}..."
            " Use the original network file."
        )
    return loaded_generator


def shape_images(
    design: StudyDesign, contender: Contender, seeds: Sequence[int], device: str = "cpu"
) -> dict[int, str]:
    """Render the shapes of latents with shading.

    Camera, light, level and crop are the same for every generator, so that the images can be compared.

    Args:
        design: design of the study.
        contender: generator.
        seeds: seeds of the latents.
        device: device on which the shapes are computed.

    Returns:
        Seed of a latent -> PNG image as a data: URL.
    """
    generator = load_contender(contender, device).generator
    image_by_seed = {}
    # the same number of grid points for every generator, over its own cube
    grid_spec = SlabSpec.from_bounds(generator.bounds, design.resolution)
    for seed in seeds:
        with torch.no_grad():
            density = generator.field(ws_of_seeds(generator, [seed], design.psi)).density_grid(grid_spec)
        # sigma is [1, D, H, W]; index 0, 0 takes the only image and its only channel: [H, W] in 0..1
        grey_image = shade(density, YAW, IMAGE_SIDE, design.level)[0, 0].numpy()
        png_buffer = io.BytesIO()
        PIL.Image.fromarray((grey_image.clip(0, 1) * 255).round().astype("uint8")).save(
            png_buffer, format="png", optimize=True
        )
        image_by_seed[seed] = data_uri(png_buffer.getvalue(), "image/png")
    return image_by_seed


def page(report_content: dict) -> str:
    """Return the page of a report as one HTML text.

    Args:
        report_content: result of `compute`. The template is static/report.html.
    """
    # With autoescape, names of annotators and labels, which come from users, cannot contain HTML.
    jinja_environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True)
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda share: "none" if share is None else percent(share),
        "p_value": p_value,
        "interval": lambda ends: "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}",
        # horizontal position of a share 0..1 in the figures, in pixels; the template uses the name `more`
        "x": lambda share, more=0: f"{210 + 390 * share + more:.1f}",
    }
    jinja_environment.filters |= filters
    # The plan and the hash are in other sections of the page, and there are too many seeds for a table.
    shown_settings = {
        name: value
        for name, value in report_content["design"].items()
        if name not in ("plan", "latent_seeds", "hash")
    }
    for side in ("a", "b"):
        # A report may be published, so the folders of files are left out. The bundled generator has no path.
        shown_settings[side] = {
            **shown_settings[side],
            "source": Path(shown_settings[side]["source"]).name or "bundled",
        }
    shown_settings = {
        name: json.dumps(value) if isinstance(value, (dict, list)) else value
        for name, value in shown_settings.items()
    }
    # min: a win rate of 1 belongs to the last bin
    bin_counts = Counter(min(BINS - 1, int(pair["win_rate"] * BINS)) for pair in report_content["pairs"])
    stylesheet = (STATIC / "report.css").read_text()
    return jinja_environment.get_template("report.html").render(
        report_content,
        settings=shown_settings,
        style=stylesheet,
        histogram_counts=[bin_counts[bin_index] for bin_index in range(BINS)],
    )


def write(report_content: dict, folder: Path) -> tuple[Path, Path]:
    """Write a report into a folder, as JSON and as an HTML page.

    Args:
        report_content: result of `compute`.
        folder: folder of the files report.json and report.html; the names of an interim report begin with
            "interim-".

    Returns:
        Path of the JSON file, and path of the HTML page.
    """
    file_stem = "interim-report" if report_content["interim"] else "report"
    # allow_nan=False raises an error for NaN, which is not allowed in JSON and which browsers reject
    report_text = json.dumps(report_content, indent=1, allow_nan=False)
    paths = folder / f"{file_stem}.json", folder / f"{file_stem}.html"
    write_atomic(paths[0], (report_text + "\n").encode())
    # The page is made from the parsed JSON, so that it can be made again from the JSON file alone.
    write_atomic(paths[1], page(json.loads(report_text)).encode())
    return paths


def conclusions(analysis: dict) -> list[str]:
    """Return sentences about the result of a study, with the most important sentences first.

    Args:
        analysis: result of eg3d_rlhf.people.study.analysis.analyse.
    """
    primary_result = analysis["result"]
    design = analysis["design"]
    sentences = []
    if analysis["interim"]:
        sentences.append(
            f"INTERIM: {analysis['answered']} of {design['trials']} trials were answered when this report"
            " was made. The stopping rule is not met. Decisions from interim reports increase the rate of"
            " false alarms above the level of the interval."
        )
    if primary_result["win_rate"] is None:
        return [
            *sentences,
            " ".join(
                [
                    "No trial counts, so nothing can be concluded about the two generators.",
                    *_exclusion_sentences(analysis),
                ]
            ),
        ]
    return [*sentences, *_main(primary_result, design), *_doubts(analysis)]


def _exclusion_sentences(analysis: dict) -> list[str]:
    """Return a sentence for each exclusion, and one with the win rate that all trials together would give."""
    if not analysis["exclusions"]:
        return ["No answer to a trial was stored, or all of them were skipped. Collect answers first."]
    sentences = [
        f"Left out: {exclusion['what']} ({exclusion['trials']} trials), because of {exclusion['reason']}."
        for exclusion in analysis["exclusions"]
    ]
    all_trials = analysis["sensitivity"]["without exclusions"]
    if all_trials["win_rate"] is not None:
        lo, hi = all_trials["interval"]
        sentences.append(
            f"Without exclusions the win rate would be {percent(all_trials['win_rate'])} ({percent(lo)} to"
            f" {percent(hi)}). This is no result of the study, whose rules were fixed in advance."
        )
    return sentences


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal: 0.5 -> "50.0 %"."""
    return f"{100 * share:.1f} %"


def p_value(p: float) -> str:
    """Format a p-value with three decimals; a value below 0.001 as "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 annotator" or "2 annotators"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _main(primary_result: dict, design: dict) -> list[str]:
    """Return the sentences about the win rate, the interval and the test."""
    lo, hi = primary_result["interval"]
    label_a = design["a"]["label"]
    label_b = design["b"]["label"]
    ties = "ties count half" if design["ties"] == "half" else "ties are excluded"
    win_rate_sentence = (
        f"{label_b} won over {label_a} in {percent(primary_result['win_rate'])} of {primary_result['n']}"
        f" trials ({ties}); the {primary_result['confidence']:.0%} interval is {percent(lo)} to"
        f" {percent(hi)}. It accounts for {_counted(primary_result['annotators'], 'annotator')} and"
        f" {_counted(primary_result['latents'], 'latent')}."
    )
    if lo > 0.5 or hi < 0.5:  # the interval excludes one half
        preferred_label, other_label, min_share = (
            (label_b, label_a, lo) if lo > 0.5 else (label_a, label_b, 1 - hi)
        )
        # The interval excludes one half, which one decimal may hide.
        digits = decimals_apart([100 * min_share], 50, 1)
        conclusion_sentence = (
            f"The shapes of {preferred_label} are preferred to those of {other_label}, in at least"
            f" {100 * min_share:.{digits}f} % of such trials according to this interval."
        )
    else:
        conclusion_sentence = (
            "The interval contains one half: this study does not show that either generator is preferred. It"
            f" excludes that {label_b} is preferred in more than {percent(hi)} or in less than {percent(lo)}"
            " of such trials. It does not show that the two are equal."
        )
    if primary_result["p_exact"] is None:
        return [win_rate_sentence, conclusion_sentence, "Every trial was a tie, so no test is possible."]
    test_sentence = (
        f"Exact binomial test of the {primary_result['a_wins'] + primary_result['b_wins']} decided trials"
        f" against one half: {p_value(primary_result['p_exact'])}"
    )
    design_effect = primary_result["design_effect"]
    # A smaller design effect hardly changes the result, so it is not explained.
    if design_effect > 1.2:
        test_sentence += (
            f". This test treats trials as independent. Here they are worth only {1 / design_effect:.0%} of"
            f" as many independent trials (design effect {design_effect:.1f}). The test that accounts for"
            f" this gives {p_value(primary_result['p_clustered'])}."
        )
    else:
        test_sentence += (
            ". The test that accounts for annotators and latents gives"
            f" {p_value(primary_result['p_clustered'])}."
        )
    return [win_rate_sentence, conclusion_sentence, test_sentence]


def _doubts(analysis: dict) -> list[str]:
    """Return the sentences about limitations of the result."""
    primary_result = analysis["result"]
    side_metrics = analysis["sides"]
    sentences = []
    lo, hi = primary_result["interval"]
    if primary_result["annotators"] == 1:
        sentences.append(
            "Only one annotator answered: the result is valid for this annotator and cannot be generalised."
        )
    elif primary_result["annotators"] < FEW_ANNOTATORS:
        sentences.append(
            f"With {primary_result['annotators']} annotators, the differences between people are hardly"
            " known. Therefore the interval is wide."
        )
    if hi - lo > 2 * WIDE:
        sentences.append(
            f"The interval is {percent(hi - lo)} wide: the study is too small to give more than a first"
            " impression."
        )
    wide_lo, wide_hi = primary_result["wilson"]
    # By chance, the clustered variance can be smaller than the variance of independent trials.
    if hi - lo < wide_hi - wide_lo:
        sentences.append(
            "The interval is narrower than Wilson's for independent trials, because the annotators agreed"
            f" more than chance makes likely. A cautious reader uses Wilson's interval, {percent(wide_lo)}"
            f" to {percent(wide_hi)}."
        )
    without_exclusions = analysis["sensitivity"]["without exclusions"]
    if analysis["exclusions"] and without_exclusions["win_rate"] is not None:
        lo_without_exclusions, hi_without_exclusions = without_exclusions["interval"]
        sentences.append(
            f"Without exclusions the win rate is {percent(without_exclusions['win_rate'])}"
            f" ({percent(lo_without_exclusions)} to {percent(hi_without_exclusions)})."
        )
        # the conclusion of an interval: 1 if b is preferred, -1 if a is preferred, 0 if neither is shown
        if (lo_without_exclusions > 0.5) - (hi_without_exclusions < 0.5) != (lo > 0.5) - (hi < 0.5):
            sentences.append("This leads to another conclusion: the result depends on the exclusions.")
    if side_metrics["p_random"] < 0.001:
        sentences.append(
            f"b was on the left in {side_metrics['b_left']} of {side_metrics['n']} trials, which is very"
            " unlikely with random sides. Find out why."
        )
    if (
        side_metrics["left_share"] is not None
        and not side_metrics["left_ci"][0] <= 0.5 <= side_metrics["left_ci"][1]
    ):
        sentences.append(
            f"The annotators chose the left side in {percent(side_metrics['left_share'])} of the decided"
            " trials. Because sides are random, this favours neither generator; it moves the win rate towards"
            " one half."
        )
    return sentences
