"""A judge that answers the pairs of a labelling campaign or of a blind study, under its own name.

Every question of the campaign is asked in both orders. The verdicts of a pair are stored as soon as all of
them are complete, so a run that is killed loses no answer: stored pairs are not asked again, and received
answers to the others are in the file of answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.people.judge.calibration import Calibration
from eg3d_rlhf.people.judge.gate import calibration_refusal
from eg3d_rlhf.people.judge.judge import Judge, JudgedPair, Renders
from eg3d_rlhf.people.judge.labelled_pairs import PAGE_QUESTIONS, prompt_image
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.settings import (
    QUESTIONS,
    JudgeSettings,
    Question,
    as_question,
    main_criterion,
)
from eg3d_rlhf.people.judge.verdicts import Verdict
from eg3d_rlhf.people.judge.view_maps import ColouredMesh, mesh_maps
from eg3d_rlhf.people.label.entities import (
    MAIN_QUESTION,
    CampaignSettings,
    Mode,
    Shape,
    parse_questions,
)
from eg3d_rlhf.people.label.shape_files import shape_key
from training.progress import tqdm

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.campaigns import StoredPair
    from eg3d_rlhf.people.label.store import Store


def questions_for(settings: CampaignSettings, has_files: bool) -> dict[str, Question]:
    """Return the questions that a judge is asked about each pair of a campaign.

    Args:
        settings: settings of the campaign.
        has_files: True if the campaign compares asset files, and False for isosurfaces of a generator.

    Returns:
        Name of a question of the campaign, MAIN_QUESTION for the main one -> question of the judge.

    Raises:
        ValueError: the campaign shows shapes one by one.
    """
    if settings.mode is Mode.SINGLE:
        raise ValueError(
            f"--judge: a judge compares pairs, but the campaign {settings.name!r} shows shapes one by one."
            " Use a campaign of pairs."
        )
    questions = {MAIN_QUESTION: QUESTIONS[main_criterion(has_files, bool(settings.questions))]}
    for question in parse_questions(settings.questions):
        criterion = PAGE_QUESTIONS.get(question.name)
        if question.text is not None:
            questions[question.name] = as_question(question.name.replace("-", "_"), question.text)
        elif criterion is not None:
            questions[question.name] = QUESTIONS[criterion]
    return questions


class CampaignRenders:
    """Renders of the shapes of a campaign: of asset files, or of isosurfaces of a generator.

    Args:
        cache: cache of the renders.
        up: axis of the asset files that points up, "y" or "z".
    """

    def __init__(self, cache: RenderCache, up: str = "y"):
        self.cache = cache
        self._up = up
        self._renderer: Any = None  # loaded for the first isosurface

    def views_of(self, shape: Shape) -> Renders:
        """Return the renders of a shape.

        Raises:
            ValueError or OSError: the file cannot be read, or has changed since the campaign was planned.
        """
        if shape.file:
            return self.cache.views_of(Path(shape.source), self._up)
        return self.cache.of_maps(
            {"shape": shape_key(shape)}, lambda: mesh_maps(self._mesh(shape), self.cache.rig)
        )

    def _mesh(self, shape: Shape) -> ColouredMesh:
        """Compute the isosurface of a shape."""
        # imported here, because the module imports torch and loads generators
        from eg3d_rlhf.people.label.shape_rendering import ShapeRenderer, surface

        self._renderer = self._renderer or ShapeRenderer()
        vertices, faces = surface(self._renderer.generator(shape).generator, shape)
        return ColouredMesh(vertices=vertices, faces=faces)


@dataclass(kw_only=True)
class JudgedCampaign:
    """Numbers of one run of a judge over a campaign."""

    name: str  # name of the judge as an annotator
    asked: int = 0  # pairs that were answered in this run
    unreadable: int = 0  # of them, without a readable verdict on the main question
    ties: int = 0  # of them, with a tie
    order_flips: int = 0  # of them, whose verdict changed with the order
    left: int = 0  # pairs that remain open, because of a limit
    notes: list[str] = field(default_factory=list)  # lines on calibration and cost

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        left_text = f"; {self.left} pairs are left (the same command resumes)" if self.left else ""
        return [
            f"{self.name}: {self.asked} pairs answered, {self.ties} ties ({self.order_flips} of them because"
            f" the order changed the verdict), {self.unreadable} without a readable verdict{left_text}",
            *self.notes,
        ]


def label_with_judge(
    store: "Store",
    campaign_name: str,
    judge_settings: JudgeSettings,
    *,
    cache: RenderCache,
    calibration: Calibration | None = None,
    origin: Mapping[str, Any] | None = None,
    max_pairs: int | None = None,
    echo: Callable[[str], None] = print,
) -> JudgedCampaign:
    """Let a judge answer the pairs of a campaign that it has not answered yet.

    Args:
        store: label store.
        campaign_name: name of the campaign.
        judge_settings: server and limits; the questions are those of the campaign.
        cache: cache of the renders.
        calibration: calibration of the judge, whose hash is stored with each answer; None: none.
        origin: further fields of the origin of each answer, in JSON types.
        max_pairs: largest number of pairs that are answered in this run; None: all.
        echo: function that is called with each line for the user.

    Raises:
        ValueError: the campaign is unknown, a shape cannot be rendered, or the server rejects the requests.
        ConnectionError: the server has never answered.
    """
    from eg3d_rlhf.people.label.judge_answers import judge_annotator, open_pairs, record_answer

    campaign = store.campaign(campaign_name)
    if campaign is None:
        raise ValueError(f"--campaign: the store has no campaign {campaign_name!r}. Plan it first.")
    has_files = bool(next(iter(store.plan(campaign.id).shapes.values())).file)
    questions = questions_for(campaign.settings, has_files)
    # Two questions of a campaign may be the same question to a judge, which is then asked once.
    unique_questions = tuple({question.name: question for question in questions.values()}.values())
    judge_settings = replace(judge_settings, questions=unique_questions)
    # The judge has a name of its own in the store, and takes no pair away from people.
    annotator = judge_annotator(store, judge_settings.model)
    all_open_pairs = open_pairs(store, campaign.id, annotator.id)
    pairs = all_open_pairs[:max_pairs]
    if judge_settings.limit is not None:
        # Pairs beyond the limit are not asked, so their assets need not be rendered: a mesh takes seconds.
        calls_per_pair = 2 * len(unique_questions) * judge_settings.repeats
        pairs = pairs[: -(-judge_settings.limit // calls_per_pair)]
    result = JudgedCampaign(name=annotator.name, left=len(all_open_pairs) - len(pairs))
    question_text = ", ".join(
        f"{name or 'which is better'} ({question.name})" for name, question in questions.items()
    )
    echo(f"judge {judge_settings.model}: {len(pairs)} pairs to answer; questions: {question_text}")
    if not pairs:
        return result
    # Rendered before the first call, so that no server waits for renders.
    judged_pairs = _judged_pairs(store, campaign.id, campaign.settings, pairs, cache)
    identities = {
        question.name: judge_settings.identity(question, cache.rig.to_json()) for question in unique_questions
    }
    # Verdicts name their pair by its number in the store.
    pair_by_key = {str(pair.id): pair for pair in pairs}
    verdicts_by_key: dict[str, dict[str, Verdict]] = {}
    with Judge(judge_settings, echo) as judge, tqdm(total=len(pairs), desc="judging", unit="pair") as bar:

        def store_verdict(verdict: Verdict) -> None:
            """Store the answer to a pair when its last verdict has arrived."""
            verdicts = verdicts_by_key.setdefault(verdict.pair, {})
            verdicts[verdict.criterion] = verdict
            if len(verdicts) < len(unique_questions):
                return
            del verdicts_by_key[verdict.pair]
            bar.update()
            # A pair with a question that was not asked stays open.
            if not all(given.is_asked for given in verdicts.values()):
                result.left += 1
                return
            answer = answer_of(
                {name: verdicts[question.name] for name, question in questions.items()},
                judge_settings,
                identities,
                calibration,
                origin or {},
            )
            record_answer(store, campaign.id, annotator.id, pair_by_key[verdict.pair], answer)
            main_verdict = verdicts[questions[MAIN_QUESTION].name]
            # Counted after it is stored.
            result.asked += 1
            result.unreadable += main_verdict.outcome is None
            result.ties += main_verdict.outcome == "tie"
            result.order_flips += main_verdict.is_order_flip

        judge.compare(judged_pairs, store_verdict)
        result.notes.append(judge.counts.line())
    result.notes.append(calibration_line(calibration, questions, identities))
    return result


def _judged_pairs(
    store: "Store",
    campaign_id: int,
    settings: CampaignSettings,
    pairs: "Sequence[StoredPair]",
    cache: RenderCache,
) -> list[JudgedPair]:
    """Render the shapes of pairs, and return the pairs as a judge is shown them."""
    shapes = store.plan(campaign_id).shapes
    # Isosurfaces and asset files may not occur in one campaign, but both are rendered here.
    renders = CampaignRenders(cache, str(settings.extra.get("up", "y")))
    tokens = list(dict.fromkeys(token for pair in pairs for token in (pair.first, pair.second)))
    views = {}
    with tqdm(total=len(tokens), desc="rendering", unit="shape") as bar:
        for token in tokens:
            views[token] = renders.views_of(shapes[token])
            bar.update()
    conditions: Mapping[str, Mapping[str, Any]] = settings.extra.get("conditions", {})
    judged_pairs = []
    for pair in pairs:
        condition = conditions.get(shapes[pair.first].condition, {})
        judged_pairs.append(
            JudgedPair(
                key=str(pair.id),
                first=views[pair.first],
                second=views[pair.second],
                prompt=str(condition.get("text") or ""),
                image=_condition_image(condition),
            )
        )
    return judged_pairs


def _condition_image(condition: Mapping[str, Any]) -> bytes | None:
    """Return the image of a prompt as an image file, or None if the prompt has no image that exists."""
    path = condition.get("image")
    return prompt_image(Path(str(path))) if path and Path(str(path)).is_file() else None


def answer_of(
    verdicts: Mapping[str, Verdict],
    judge_settings: JudgeSettings,
    identities: Mapping[str, str],
    calibration: Calibration | None,
    origin: Mapping[str, Any],
) -> Any:
    """Make the stored answer of a pair from the verdicts on its questions.

    Args:
        verdicts: name of a question of the campaign -> verdict.
        judge_settings: settings of the judge.
        identities: criterion -> hash of the judge for its question.
        calibration: calibration of the judge; None: none.
        origin: further fields of the origin.

    Returns:
        `label.judge_answers.JudgeAnswer`.
    """
    from eg3d_rlhf.people.label.judge_answers import JudgeAnswer

    models = sorted({model for verdict in verdicts.values() for model in verdict.models})
    asked = {
        name: {
            "criterion": verdict.criterion,
            "judge": identities[verdict.criterion],
            "answer": json_hash(list(verdict.hashes)),
            "order_flip": verdict.is_order_flip,
            "probability": verdict.probability,
        }
        for name, verdict in verdicts.items()
    }
    return JudgeAnswer(
        verdict=verdicts[MAIN_QUESTION].outcome,
        # An unreadable answer to a further question is no preference.
        votes={name: verdict.outcome or "tie" for name, verdict in verdicts.items() if name != MAIN_QUESTION},
        origin={
            "model": judge_settings.model,
            "family": judge_settings.family,
            "reported": models,
            "calibration": None if calibration is None else calibration.hash,
            "calibrated": calibration is not None
            and all(
                calibration_refusal(calibration, verdict.criterion, identities[verdict.criterion]) is None
                for verdict in verdicts.values()
            ),
            "questions": asked,
            "reason": verdicts[MAIN_QUESTION].reason,
            **origin,
        },
    )


def calibration_line(
    calibration: Calibration | None, questions: Mapping[str, Question], identities: Mapping[str, str]
) -> str:
    """Return a line on whether labels of a judge may train something."""
    if calibration is None:
        return (
            "no calibration was passed: commands that learn need --calibration=FILE of this judge, or"
            " --uncalibrated"
        )
    reasons = {
        question.name: reason
        for question in questions.values()
        if (reason := calibration_refusal(calibration, question.name, identities[question.name])) is not None
    }
    if not reasons:
        return "the calibration lets the labels of all questions pass"
    return "the calibration rejects labels by " + "; ".join(
        f"{name}: {reason}" for name, reason in reasons.items()
    )
