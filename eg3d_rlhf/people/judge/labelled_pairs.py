"""Pairs of assets that people labelled, from which a judge is calibrated: of files and of label stores.

A source lists pairs with the votes on them by criterion, and renders their assets. Labels of judges are never
used as those of people: they are left out and counted.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eg3d_rlhf.people.judge.calibration import Unit
from eg3d_rlhf.people.judge.judge import JudgedPair, Renders
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.settings import (
    GEOMETRY,
    QUESTIONS,
    Question,
    as_question,
    main_criterion,
)
from eg3d_rlhf.people.judge.verdicts import Verdict, swap_outcome
from eg3d_rlhf.preferences.asset_votes import (
    FIRST,
    SECOND,
    TIE,
    Asset,
    AssetPair,
    VotedPair,
    has_scores,
    joined_votes,
    pairs_from_scores,
    read_asset_pairs,
    read_asset_scores,
    votes_by_pair,
)
from eg3d_rlhf.preferences.provenance import PEOPLE, origin_of

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.entities import Shape
    from eg3d_rlhf.people.label.store import Store

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # endings of prompts that are paths of images
_PROMPT_SIDE = 768  # pixels; a larger image of a prompt is reduced, because its tokens cost money
# question of the label page without a text of its own -> criterion with the same meaning
PAGE_QUESTIONS = {
    "geometry": GEOMETRY,
    "texture": "texture_details",
    "prompt": "text_asset_alignment",
}


class PairKey(NamedTuple):
    """A pair of assets of the same prompt, for all criteria."""

    first: str
    second: str
    prompt: str


def _key(vote: VotedPair) -> PairKey:
    """Return the pair on which there are votes."""
    return PairKey(str(vote.first), str(vote.second), vote.prompt)


@dataclass(kw_only=True)
class LabelledPairs:
    """Pairs with the votes of people, and what is needed to show them."""

    votes: list[VotedPair]  # by pair and criterion; assets are keys of `paths` or `shapes`
    paths: dict[str, Path] = field(default_factory=dict)  # asset -> its file
    shapes: dict[str, "Shape"] = field(default_factory=dict)  # asset -> isosurface of a generator
    images: dict[str, Path] = field(default_factory=dict)  # prompt -> image of the prompt
    texts: dict[str, str] = field(default_factory=dict)  # prompt -> its text, where it is not the prompt
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> number of votes

    @property
    def pair_keys(self) -> list[PairKey]:
        """Return the different pairs in the order of their first vote."""
        return list(dict.fromkeys(map(_key, self.votes)))

    def criteria(self) -> list[str]:
        """Return the criteria of the votes in the order of their first vote."""
        return list(dict.fromkeys(vote.criterion for vote in self.votes))

    def select(self, questions: Mapping[str, Question], max_pairs: int | None = None) -> None:
        """Keep the votes whose criterion has a question, under the name of the question.

        Args:
            questions: criterion -> question.
            max_pairs: greatest number of pairs; None: all. The first ones in the source are kept.
        """
        self.votes = [
            vote._replace(criterion=questions[vote.criterion].name)
            for vote in self.votes
            if vote.criterion in questions
        ]
        # A slice up to None keeps all pairs.
        kept_keys = set(self.pair_keys[:max_pairs])
        self.votes = [vote for vote in self.votes if _key(vote) in kept_keys]

    def renders(self, cache: RenderCache, up: str, keys: Sequence[PairKey]) -> dict[str, Renders]:
        """Render the assets of pairs, with a bar that shows the progress.

        Raises: ValueError or OSError, which name the file, if an asset cannot be shown.
        """
        # Each asset once, in the order of the pairs.
        assets = list(dict.fromkeys(asset for key in keys for asset in (key.first, key.second)))
        # Two assets may be the same file, whose renders they share.
        by_path = cache.views_of_all((self.paths[asset] for asset in assets if asset in self.paths), up)
        renders: dict[str, Renders] = {
            asset: by_path[self.paths[asset]] for asset in assets if asset in self.paths
        }
        if any(asset in self.shapes for asset in assets):
            # imported here, because it loads generators
            from eg3d_rlhf.people.judge.labelling import CampaignRenders

            # It loads a generator for the first isosurface, and keeps it.
            campaign_renders = CampaignRenders(cache, up)
            for asset in assets:
                if asset in self.shapes:
                    renders[asset] = campaign_renders.views_of(self.shapes[asset])
        return renders

    def judged(self, keys: Sequence[PairKey], renders: Mapping[str, Renders]) -> list[JudgedPair]:
        """Return pairs as a judge is shown them, each with the criteria that people have voted on.

        Args:
            keys: the pairs.
            renders: asset -> its renders.
        """
        criteria_by_key: dict[PairKey, list[str]] = defaultdict(list)
        for vote in self.votes:
            criteria_by_key[_key(vote)].append(vote.criterion)
        judged_pairs = []
        for key in keys:
            image_path = self.images.get(key.prompt)
            judged_pairs.append(
                JudgedPair(
                    key=json.dumps(key),
                    first=renders[key.first],
                    second=renders[key.second],
                    # a prompt whose image is sent needs no text, unless it has one
                    prompt=self.texts.get(key.prompt, "" if image_path is not None else key.prompt),
                    image=None if image_path is None else prompt_image(image_path),
                    criteria=tuple(criteria_by_key[key]),
                )
            )
        return judged_pairs

    def units(self, verdicts: Sequence[Verdict]) -> list[Unit]:
        """Join the votes of people with the verdicts of a judge on the same pair and criterion."""
        # A verdict is missing where a pair was not asked by a criterion.
        by_pair = {(verdict.pair, verdict.criterion): verdict for verdict in verdicts}
        return [
            Unit(
                criterion=vote.criterion,
                votes=vote.votes,
                verdict=by_pair.get((json.dumps(_key(vote)), vote.criterion)),
            )
            for vote in self.votes
        ]


def prompt_image(path: Path) -> bytes:
    """Return the image of a prompt as PNG of at most 768 pixels a side, without metadata."""
    # imported here: most prompts are texts
    import io

    from PIL import Image

    with Image.open(path) as image:
        # Palettes and transparency are not read by all servers.
        converted = image.convert("RGB")
    # The ratio of the sides is kept, and a small image is not enlarged.
    converted.thumbnail((_PROMPT_SIDE, _PROMPT_SIDE))
    buffer = io.BytesIO()
    converted.save(buffer, "PNG")
    return buffer.getvalue()


def pairs_of_file(
    path: Path, assets: Path, margin: float | None = None, max_pairs: int = 1000
) -> LabelledPairs:
    """Read the votes of a pairs.jsonl or scores.jsonl whose assets lie in a folder.

    Votes on assets without a file in the folder, and votes of judges or of unknown origin, are left out and
    counted.

    Args:
        path: file of votes.
        assets: folder of the assets.
        margin: smallest difference of scores that decides a pair; needed for scores.jsonl.
        max_pairs: greatest number of pairs of a criterion that are made from scores.

    Raises: ValueError for a wrong line, for scores without a margin, and for a margin without scores.
    """
    if has_scores(path):
        if margin is None:
            raise ValueError(
                f"--margin is missing: {path.name} holds scores of single assets. Pass the smallest"
                " difference of two scores that decides a pair."
            )
        # A margin in the unit of the scores; there is no sensible default.
        scores = read_asset_scores(path)
        people_scores = [score for score in scores if origin_of({"provenance": score.provenance}) == PEOPLE]
        # Counted for the user, who may have passed the labels of a model by mistake.
        left_out = Counter({"not by people": len(scores) - len(people_scores)})
        pairs = pairs_from_scores(people_scores, margin, max_pairs)
    else:
        if margin is not None:
            raise ValueError(f"--margin applies to scores, but {path.name} holds pairs. Remove --margin.")
        votes = read_asset_pairs(path)
        pairs = [vote for vote in votes if origin_of({"provenance": vote.provenance}) == PEOPLE]
        left_out = Counter({"not by people": len(votes) - len(pairs)})
    # Links are followed before the check that a path stays in the folder.
    root = assets.resolve()
    # Looked up once for each asset, since large sets repeat them thousands of times.
    path_by_asset: dict[Asset, Path | None] = {}
    kept: list[AssetPair] = []
    for pair in pairs:
        for asset in (pair.winner, pair.loser):
            if asset not in path_by_asset:
                path_by_asset[asset] = _file_of(asset, root)
        if path_by_asset[pair.winner] is None or path_by_asset[pair.loser] is None:
            left_out["no file of an asset"] += 1
        else:
            kept.append(pair)
    # The unary plus drops reasons with a count of 0.
    labelled = LabelledPairs(votes=votes_by_pair(kept), left_out=+left_out)
    labelled.paths = {str(asset): file for asset, file in path_by_asset.items() if file is not None}
    for prompt in {pair.prompt for pair in kept}:
        # Sets from images name the file of the image as their prompt.
        if prompt.lower().endswith(_IMAGE_SUFFIXES) and (image := _file_of(prompt, root)) is not None:
            labelled.images[prompt] = image
    return labelled


def _file_of(asset: Asset, root: Path) -> Path | None:
    """Return the file of an asset, or None if there is none in the folder.

    Raises: ValueError for a path that leaves the folder.
    """
    if not isinstance(asset, str):
        return None
    file = (root / asset).resolve()
    # A downloaded list must not make this program read, render and send other files.
    if not file.is_relative_to(root):
        raise ValueError(
            f"--assets: the path {asset} of a vote leads out of {root}. Pass the folder to which the paths"
            " are relative."
        )
    return file if file.is_file() else None


def pairs_of_store(store: "Store", campaign: str | None = None) -> LabelledPairs:
    """Return the votes of people in a label store, by the main question and all further ones.

    The main question is the criterion `overall` for asset files with further questions, and
    `geometry_details` otherwise, see `main_criterion`. The page's own questions have the names geometry,
    texture and prompt.

    Args:
        store: label store.
        campaign: name of a campaign; None: all campaigns that collect preferences.

    Raises: ValueError for an unknown campaign.
    """
    from eg3d_rlhf.people.label.entities import Choice, Mode
    from eg3d_rlhf.people.label.shape_files import shape_key
    from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements

    # The default filters select people; gold checks, practice and skips are left out.
    rows = kept_judgements(store, LabelFilters(campaign=campaign), Mode.LABEL)
    everyone = kept_judgements(store, LabelFilters(campaign=campaign, labels_from="all"), Mode.LABEL)
    labelled = LabelledPairs(votes=[], left_out=+Counter({"not by people": len(everyone) - len(rows)}))
    prompts_by_campaign = {
        stored.settings.name: stored.settings.extra.get("conditions", {}) for stored in store.campaigns()
    }
    asked = {stored.settings.name: bool(stored.settings.questions) for stored in store.campaigns()}
    # (first, second, prompt, criterion) -> annotator -> votes
    groups: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        first, second = (row.left, row.right) if row.first_is_left else (row.right, row.left)
        keys = []
        for shape in (first, second):
            key = shape_key(shape)
            # The key of a shape is a hash of its content and parameters.
            keys.append(key)
            if shape.file:
                labelled.paths[key] = Path(shape.source)
            else:
                labelled.shapes[key] = shape
        condition = prompts_by_campaign.get(row.campaign, {}).get(row.left.condition, {})
        prompt = row.left.condition
        labelled.texts[prompt] = str(condition.get("text") or "")
        if condition.get("image") and Path(str(condition["image"])).is_file():
            labelled.images[prompt] = Path(str(condition["image"]))
        criterion = main_criterion(bool(first.file), asked[row.campaign])
        choices = {criterion: row.choice.value, **row.votes}
        for criterion, choice in choices.items():
            outcome = TIE
            if choice in (Choice.LEFT.value, Choice.RIGHT.value):
                outcome = FIRST if (choice == Choice.LEFT.value) == row.first_is_left else SECOND
            # Two campaigns may have planned the same pair in another order.
            is_exchanged = (keys[1], keys[0], prompt, criterion) in groups
            slot = (keys[1], keys[0]) if is_exchanged else (keys[0], keys[1])
            votes = groups.setdefault((*slot, prompt, criterion), defaultdict(list))
            votes[row.annotator].append(str(swap_outcome(outcome) if is_exchanged else outcome))
    labelled.votes = [VotedPair(*slot, joined_votes(votes)) for slot, votes in groups.items()]
    return labelled


def questions_of(
    criteria: Sequence[str], given: Mapping[str, object], page_questions: bool = False
) -> tuple[dict[str, Question], list[str]]:
    """Return the question of each criterion of labels, and the criteria that have none.

    Args:
        criteria: criteria of the labels.
        given: lines of --criteria=MAP.json.
        page_questions: True if the labels come from a store, whose page has questions of known meaning.

    Raises: ValueError for a line that is no question, or that no label has as its criterion.
    """
    # A misspelt name would otherwise leave its criterion without a question.
    unknown = sorted(set(given) - set(criteria))
    if unknown:
        raise ValueError(
            f"--criteria: no label has the criterion {', '.join(unknown)}; the labels have"
            f" {', '.join(criteria) or 'none'}. Correct the names."
        )
    questions = {}
    skipped = []
    for criterion in criteria:
        # Names of questions on the page may have dashes.
        name = criterion.replace("-", "_")
        if criterion in given:
            questions[criterion] = as_question(name, given[criterion])
        elif criterion in QUESTIONS:
            questions[criterion] = QUESTIONS[criterion]
        elif page_questions and criterion in PAGE_QUESTIONS:
            questions[criterion] = dataclasses.replace(QUESTIONS[PAGE_QUESTIONS[criterion]], name=name)
        else:
            skipped.append(criterion)
    return questions, skipped
