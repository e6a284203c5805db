"""The jobs `judge calibrate`, which measures a judge against people, and `judge audit`, which measures how
often its verdict on two samples of one generator depends on their order.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import GroupedCommand, aligned, check_extra, option, prefix_errors
from eg3d_rlhf.modes.judge_flags import judge_options, judge_settings
from eg3d_rlhf.modes.shared_flags import COUNT, FILE, FOLDER, print_json, shared
from eg3d_rlhf.people.judge.settings import (
    OVERALL,
    QUESTIONS,
    JudgeSettings,
    Question,
    parse_questions,
)
from training.input_paths import existing_file, existing_path
from training.progress import tqdm
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.people.judge.calibration import Calibration
    from eg3d_rlhf.people.judge.client import Counts
    from eg3d_rlhf.people.judge.labelled_pairs import LabelledPairs
    from eg3d_rlhf.people.label.assets.collection import Asset

EXTRA = "judge"  # optional dependencies of the client
ANSWERS = "answers.jsonl"  # name of the file of answers in --outdir
CALIBRATION = "calibration.json"  # the calibration, equal in a run and its replay
COST = "cost.json"  # what a run has cost, which differs between a run and its replay
AUDIT = "audit.json"  # the result of an audit
RENDERS = "renders"  # folder of the cache below --outdir
# Flags of the judge that --help lists, and those that --help-all lists.
_JUDGE_FLAGS = "judge judge-model judge-limit judge-budget answers replay"
_RARE_FLAGS = "judge-family judge-repeats judge-parallel judge-timeout logprobs"


def check_labels(text: str) -> None:
    """Raise FileNotFoundError unless a text is the URL of a label store or the path of a file."""
    # A store is opened later, because that imports SQLAlchemy.
    if "://" not in text:
        existing_file(text, "file of votes (pairs.jsonl or scores.jsonl)")


def check_criteria(path: Path) -> None:
    """Raise FileNotFoundError if there is no file of questions at a path."""
    existing_file(path, "JSON file that maps criteria to questions")


def check_assets(path: Path) -> None:
    """Raise FileNotFoundError if there is neither a file nor a folder at a path."""
    existing_path(path, "--assets")


_UP = option(
    "--up",
    type=click.Choice(("y", "z")),
    default="y",
    group="Assets",
    help="Axis of asset files that points up: y in glTF, z in TRELLIS's splats.",
)


@click.command("calibrate", cls=GroupedCommand, job="judge calibrate")
@option(
    "--labels",
    metavar="STORE|FILE",
    check=check_labels,
    group="Labels",
    help=(
        "Votes of people: the address of a label store (sqlite:///...), a pairs.jsonl, or a scores.jsonl with"
        " --margin."
    ),
)
@option(
    "--assets",
    metavar="FOLDER",
    type=FOLDER,
    check=check_assets,
    group="Labels",
    show_default="the folder of --labels",
    help="Folder to which the paths in a pairs.jsonl or scores.jsonl are relative.",
)
@option(
    "--criteria",
    metavar="MAP.json",
    type=FILE,
    check=check_criteria,
    group="Labels",
    help=(
        "JSON object with the question of each criterion of the labels: a text, the name of one of the six"
        ' criteria, or {"question": TEXT, "views": ["shaded", ...]}. Criteria without a question are skipped.'
    ),
)
@option(
    "--margin",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    group="Labels",
    help="Smallest difference of two scores that decides a pair; smaller ones are ties.",
)
@option(
    "--campaign",
    metavar="NAME",
    group="Labels",
    show_default="all campaigns of the store that collect preferences",
    help="Campaign of the label store.",
)
@option(
    "--pairs",
    metavar="INT",
    type=COUNT,
    group="Labels",
    show_default="all",
    help="Greatest number of labelled pairs that the judge is asked about.",
)
@_UP
@option(
    "--damage",
    is_flag=True,
    group="Assets",
    help="Also ask about damaged copies of the assets, whose order is known. Works without --labels.",
)
@option(
    "--damage-assets",
    metavar="INT",
    type=COUNT,
    default=8,
    group="Assets",
    help="Number of assets of which damaged copies are made; 15 pairs each.",
)
@judge_options(_JUDGE_FLAGS, _RARE_FLAGS, answers={"show_default": f"{ANSWERS} in --outdir"})
@judge_options("least-kappa")
@shared("outdir dry-run", outdir={"default": Path("runs/judge"), "help": "Folder to write into."})
def calibrate(
    labels: str | None,
    assets: Path | None,
    criteria: Path | None,
    margin: float | None,
    campaign: str | None,
    pairs: int | None,
    up: str,
    damage: bool,
    damage_assets: int,
    least_kappa: float,
    outdir: Path,
    dry_run: bool,
    **judge_flags,
) -> None:
    """Measure a judge, a vision-language model behind a chat-completions server, against people.

    The judge answers the labelled pairs in both orders. By criterion, the job computes accuracy, Cohen's
    kappa with its interval, position bias, order flips and ties, and writes them to calibration.json. Labels
    of a judge may train something only with a calibration whose kappa is high enough.

    \b
    Example:
        eg3d-rlhf judge calibrate --labels=votes/pairs.jsonl --assets=votes --judge=http://127.0.0.1:8000/v1
            --judge-model=Qwen/Qwen2.5-VL-7B-Instruct --damage --outdir=runs/judge
    """
    # Without labels only the damaged copies are asked about; the gate then stays closed.
    if labels is None and not damage:
        raise ValueError("--labels is missing. Pass votes of people, or --damage with --assets.")
    if labels is None and assets is None:
        raise ValueError("--assets is missing. Pass the folder whose assets are damaged.")
    # Read before anything is rendered, so that a wrong file costs no time.
    given_questions = _read_criteria(criteria)
    # Wrong flags of the judge are rejected before anything is read; its questions follow from the labels.
    settings = judge_settings(_with_answers(judge_flags, outdir), (QUESTIONS[OVERALL],))
    if settings is None:
        raise ValueError("--judge is missing. Pass the address of a chat-completions server, or --replay.")
    if dry_run:
        print_json(
            {
                "labels": labels,
                "assets": None if assets is None else str(assets),
                "margin": margin,
                "damage": damage,
                "least_kappa": least_kappa,
                "outdir": str(outdir),
                **_settings_json(settings),
            }
        )
        return
    check_extra(EXTRA)
    # Imported here, so that --help is printed without loading these modules.
    # Imported with the others, since nothing else needs it.
    from dataclasses import replace

    from eg3d_rlhf.people.judge.calibration_run import DAMAGE, people_alpha_by_criterion, run_calibration
    from eg3d_rlhf.people.judge.labelled_pairs import LabelledPairs, questions_of
    from eg3d_rlhf.people.judge.renders import RenderCache

    if labels is None:
        labelled = LabelledPairs(votes=[])
        questions: dict[str, Question] = {}
    else:
        labelled = _read_labels(labels, assets, margin, campaign)
        # Only a label store has questions of the page, whose meaning is known.
        is_store = "://" in labels
        questions, skipped = questions_of(labelled.criteria(), given_questions, page_questions=is_store)
        # A criterion without a question is named, and does not end the job.
        for name in skipped:
            click.echo(
                f"skipped: the criterion {name} has no question. Add a line for it to --criteria=MAP.json."
            )
        if not questions:
            raise ValueError(
                f"--labels: none of the criteria {', '.join(skipped)} has a question. Pass"
                ' --criteria=MAP.json, for example {"'
                + (skipped or ["geometry"])[0]
                + '": "geometry_details"}.'
            )
        # From here on, votes have the names of the questions.
        labelled.select(questions, pairs)
        _echo_labels(labelled)
    settings = replace(
        settings,
        # Two criteria may share a question; settings need at least one.
        questions=tuple(dict.fromkeys(questions.values())) or (DAMAGE,),
    )
    # Files are listed before the rendering, which takes minutes.
    files = _damaged_files(labelled, assets, damage_assets) if damage else []
    calibration, counts, units = run_calibration(
        settings,
        labelled,
        RenderCache(outdir / RENDERS),
        up=up,
        damage_assets=files,
        least_kappa=least_kappa,
        echo=click.echo,
    )
    outdir.mkdir(parents=True, exist_ok=True)
    calibration.write(outdir / CALIBRATION)
    # The number of verdicts: one for each pair and criterion, and one for each pair of copies.
    _write_cost(outdir / COST, counts, len(units) + sum(row["n"] for row in calibration.damage.values()))
    _echo_calibration(calibration, people_alpha_by_criterion(units), least_kappa)
    _echo_counts(counts)
    click.echo(f"{outdir / CALIBRATION}: {calibration.gate}")


def _with_answers(flags: Mapping[str, Any], outdir: Path) -> dict[str, Any]:
    """Return the values of a judge's flags, with the default of --answers."""
    # Without a judge, --answers would be an option without effect.
    has_judge = flags.get("judge") is not None or flags.get("replay")
    return {**flags, "answers": flags.get("answers") or (outdir / ANSWERS if has_judge else None)}


def _settings_json(settings: JudgeSettings) -> dict[str, Any]:
    """Return the settings of a judge as --dry-run prints them."""
    return {
        "judge": settings.url,
        "judge_model": settings.model,
        "judge_limit": settings.limit,
        "judge_budget": settings.budget,
        "repeats": settings.repeats,
        "parallel": settings.parallel,
        "answers_file": None if settings.answers is None else str(settings.answers),
        "replay": settings.replay,
    }


def _read_criteria(path: Path | None) -> dict[str, object]:
    """Read --criteria=MAP.json; {} without a file.

    Raises: ValueError if the file is no JSON object.
    """
    if path is None:
        return {}
    try:
        # Names of criteria may hold any letters, so the encoding is fixed.
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--criteria: {path} is not valid JSON ({error}). Correct it.") from None
    if not isinstance(record, dict):
        raise ValueError(
            f'--criteria: {path} must hold a JSON object such as {{"geometry": "geometry_details"}}, got'
            f" {type(record).__name__}. Correct it."
        )
    return record


def _read_labels(
    labels: str, assets: Path | None, margin: float | None, campaign: str | None
) -> "LabelledPairs":
    """Read the votes of people from a label store or a file.

    Raises: ValueError for flags that do not apply to the source, or if no vote can be used.
    """
    from eg3d_rlhf.people.judge.labelled_pairs import pairs_of_file, pairs_of_store

    if "://" in labels:
        from eg3d_rlhf.people.label.db_flag import open_store

        # A store knows the paths of its assets, and holds no scores of pairs.
        for flag, value in (("--margin", margin), ("--assets", assets)):
            if value is not None:
                raise ValueError(f"{flag} cannot be combined with a label store. Remove {flag}.")
        with prefix_errors("--labels"), open_store(labels, create=False) as store:
            labelled = pairs_of_store(store, campaign)
    else:
        if campaign is not None:
            raise ValueError("--campaign names a campaign of a label store. Remove --campaign.")
        path = Path(labels)
        # Imported sets lie beside their assets, as `data import` writes them.
        labelled = pairs_of_file(path, assets or path.parent, margin)
    # The message counts the reasons, since a wrong folder and labels of models look alike.
    if not labelled.votes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in labelled.left_out.items()) or "no votes"
        raise ValueError(
            f"--labels: no vote of people on two assets with files is left ({reasons}). Pass other labels, or"
            " the folder of the assets with --assets."
        )
    return labelled


def _echo_labels(labelled: "LabelledPairs") -> None:
    """Print what was read: pairs, people, and votes that are left out."""
    annotators = sorted({name for vote in labelled.votes for name in vote.votes})
    click.echo(
        f"{len(labelled.pair_keys)} pairs, {len(annotators)} annotators"
        + "".join(f"; left out: {count} votes, {reason}" for reason, count in labelled.left_out.items())
    )
    # Simulated labels are called simulated, also where they calibrate a judge.
    if any("simulated" in name for name in annotators):
        click.echo("the labels are those of a simulated annotator, and not of people")


def _damaged_files(labelled: "LabelledPairs", assets: Path | None, count: int) -> list[Path]:
    """Return the asset files of which damaged copies are made: of the labels, else of the folder.

    Raises: ValueError if there is no mesh and no splats.
    """
    from eg3d_rlhf.people.label.assets.reading import MESH_KINDS

    # Splats end in .ply, as meshes may.
    suffixes = tuple(f".{kind}" for kind in MESH_KINDS)
    # Assets that people labelled come first: the judge is measured on the same kind.
    files = list(dict.fromkeys(labelled.paths.values()))
    if not files and assets is not None:
        # Sorted, so that every run damages the same files.
        files = sorted(path for path in assets.rglob("*") if path.is_file())
    files = [path for path in files if path.suffix.lower() in suffixes]
    if not files:
        raise ValueError(
            f"--damage needs asset files ({', '.join(suffixes)}), and there are none. Pass their folder with"
            " --assets."
        )
    return files[:count]


def _write_cost(path: Path, counts: "Counts", verdict_count: int) -> None:
    """Write what a run has cost. This differs between a run and its replay, unlike the calibration."""
    record = counts.to_json()
    # A user plans the cost of a labelling by these rates.
    for name in ("calls", "tokens", "image_bytes"):
        record[f"{name}_per_pair"] = record[name] / verdict_count if verdict_count else None
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def _echo_counts(counts: "Counts") -> None:
    """Print what a run has cost, and whether something was not answered."""
    click.echo(counts.line())
    # Unreadable answers are stored, so they are not asked again.
    if counts.failed or counts.limit_reached:
        click.echo("Some questions have no answer yet. The same command asks what is missing.")


def _number(value: float | None, digits: int = 2) -> str:
    """Format a share or a coefficient; "-" if it is undefined."""
    return "-" if value is None else f"{value:.{digits}f}"


def _echo_calibration(
    calibration: "Calibration", alpha_by_criterion: Mapping[str, float | None], least_kappa: float
) -> None:
    """Print the calibration as tables, and why criteria are refused."""
    # One row for each criterion, in the order of the labels.
    rows: list[Sequence[str]] = [
        (
            "criterion",
            "pairs",
            "accuracy",
            "kappa with people",
            "first",
            "order flips",
            "ties",
            "unreadable",
            "alpha of people",
        )
    ]
    for name, result in calibration.criteria.items():
        interval = result.kappa_interval
        # Without an interval (fewer than ten pairs) only the value is printed.
        interval_text = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
        rows.append(
            (
                name,
                str(result.n),
                _number(result.accuracy),
                _number(result.kappa) + interval_text,
                _number(result.first_share),
                _number(result.order_flips),
                _number(result.ties),
                str(result.unreadable),
                _number(alpha_by_criterion.get(name)),
            )
        )
    # A calibration by damaged copies alone has no criteria.
    if calibration.criteria:
        click.echo(aligned(rows))
    if calibration.damage:
        # Shares of few pairs are read with their numbers, which stand before them.
        damage_rows = [
            (kind, f"{row['right']} of {row['n']}", f"{row['right'] / row['n']:.0%}")
            for kind, row in calibration.damage.items()
        ]
        click.echo(aligned([("damaged copies", "right order", "share"), *damage_rows]))
    for name in calibration.criteria:
        # The identity is not compared: the calibration is reported on itself.
        reason = calibration.refusal(name, least_kappa=least_kappa)
        click.echo(f"{name}: {'passed' if reason is None else f'refused: {reason}'}")
    if not calibration.criteria:
        click.echo("refused: no pairs that people labelled were passed with --labels")


@click.command("audit", cls=GroupedCommand, job="judge audit")
@option(
    "--assets",
    metavar="FOLDER|LIST",
    type=click.Path(path_type=Path),
    required=True,
    check=check_assets,
    group="Assets",
    help=(
        "Samples of one or several untuned generators, several for each prompt: a folder that `eg3d-rlhf flow"
        " sample` wrote, or a list as for `label --assets`."
    ),
)
@_UP
@option(
    "--pairs",
    metavar="INT",
    type=COUNT,
    default=100,
    group="Assets",
    help="Greatest number of pairs; no sample is in two of them.",
)
@option(
    "--seed",
    metavar="INT",
    type=click.IntRange(0),
    default=0,
    group="Assets",
    help="Random seed of the pairs.",
)
@option(
    "--questions",
    metavar="NAME=TEXT",
    multiple=True,
    group="Judge",
    help=(
        "Further question, asked besides --judge-criteria; may be repeated. A text for one of the six"
        " criteria replaces its question."
    ),
)
@judge_options(
    f"{_JUDGE_FLAGS} judge-criteria",
    _RARE_FLAGS,
    answers={"show_default": f"{ANSWERS} in --outdir"},
    judge_criteria={"default": "overall,geometry_details"},
)
@shared("outdir dry-run", outdir={"default": Path("runs/judge-audit"), "help": "Folder to write into."})
def audit(
    assets: Path,
    up: str,
    pairs: int,
    seed: int,
    questions: tuple[str, ...],
    judge_criteria: str,
    outdir: Path,
    dry_run: bool,
    **judge_flags,
) -> None:
    """Measure, before any tuning, how often a judge's verdict on two samples follows their order.

    Random answers flip half of the pairs. Unless the upper end of the interval of flips lies below one half,
    the pairs carry no preference that could be learnt.

    \b
    Example:
        eg3d-rlhf judge audit --assets=runs/samples --judge=http://127.0.0.1:8000/v1
            --judge-model=Qwen/Qwen2.5-VL-7B-Instruct
    """
    settings = judge_settings(_with_answers(judge_flags, outdir), parse_questions(judge_criteria, questions))
    if settings is None:
        raise ValueError("--judge is missing. Pass the address of a chat-completions server, or --replay.")
    if dry_run:
        print_json(
            {
                "assets": str(assets),
                "pairs": pairs,
                "seed": seed,
                "criteria": [question.name for question in settings.questions],
                "outdir": str(outdir),
                **_settings_json(settings),
            }
        )
        return
    check_extra(EXTRA)
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.people.judge.audit import REMEDY, disjoint_pairs
    from eg3d_rlhf.people.judge.audit import audit as audit_verdicts
    from eg3d_rlhf.people.judge.judge import Judge, JudgedPair
    from eg3d_rlhf.people.judge.labelled_pairs import prompt_image
    from eg3d_rlhf.people.judge.renders import RenderCache
    from eg3d_rlhf.people.label.assets.collection import read_collection

    with prefix_errors("--assets"):
        collection = read_collection(assets, click.echo)
    samples: dict[Hashable, list[Asset]] = defaultdict(list)
    for asset in collection.assets:
        # Samples of two generators, or of two prompts, differ for other reasons.
        samples[asset.generator, asset.prompt].append(asset)
    # No sample is in two pairs, so that the interval of the share is valid.
    sample_pairs = disjoint_pairs(samples, pairs, seed)
    if not sample_pairs:
        raise ValueError(
            f"--assets: no prompt of {assets} has two samples of one generator. Sample at least two for each"
            " prompt."
        )
    # Beside the answers, so that a replay finds the same images.
    cache = RenderCache(outdir / RENDERS)
    # Textures of OBJ files may lie anywhere below the folder of the samples.
    root = assets if assets.is_dir() else assets.parent
    renders = cache.views_of_all((asset.path for pair in sample_pairs for asset in pair), up, root.resolve())
    judged = []
    for number, (first, second) in enumerate(sample_pairs):
        prompt = collection.prompts.get(first.prompt)
        # Prompts of a list may have a text, an image, both, or a name alone.
        image = prompt.image if prompt is not None else None
        judged.append(
            JudgedPair(
                # A number, because names of files are of no use in the verdicts.
                key=str(number),
                first=renders[first.path],
                second=renders[second.path],
                prompt=(prompt.text if prompt is not None else None) or "",
                image=None if image is None else prompt_image(image),
            )
        )
    with (
        Judge(settings, click.echo) as judge,
        tqdm(total=len(judged) * len(settings.questions), desc="judging", unit="verdict") as progress_bar,
    ):
        verdicts = judge.compare(judged, lambda verdict: progress_bar.update() and None)
    criteria = audit_verdicts(verdicts)
    outdir.mkdir(parents=True, exist_ok=True)
    # No times and no paths, so that a replay writes the same bytes.
    record = {"model": settings.model, "pairs": len(judged), "criteria": criteria}
    write_atomic(outdir / AUDIT, (json.dumps(record, indent=1) + "\n").encode())
    _write_cost(outdir / COST, judge.counts, len(verdicts))
    # The table is printed from the record alone.
    rows = [("criterion", "pairs", "order flips", "95 % interval", "ties", "first", "unreadable")]
    for name, row in criteria.items():
        interval = row["order_flips_interval"]
        interval_text = "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
        rows.append(
            (
                name,
                str(row["n"]),
                _number(row["order_flips"]),
                interval_text,
                _number(row["ties"]),
                _number(row["first_share"]),
                str(row["unreadable"]),
            )
        )
    click.echo(aligned(rows))
    for name, row in criteria.items():
        if row["learnable"]:
            click.echo(f"{name}: fewer than half of the verdicts follow the order")
        else:
            click.echo(f"{name}: these pairs carry no learnable preference for this judge. {REMEDY}")
    _echo_counts(judge.counts)
    click.echo(str(outdir / AUDIT))
