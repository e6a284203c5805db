"""Pairs of sampled assets that people have answered already, so that a further labelling project asks others.

A pair counts as answered if people have answered every question that the further project asks. The answer to
a project without further questions, which shape is better, is about the geometry; see `Work.labels`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.tuning.flow.base.family import GEOMETRY
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.entities import JudgementRow


def answered_judgements(work: Work, questions: Sequence[str]) -> "list[JudgementRow]":
    """Return the judgements of all labelling projects of WORK that answer all of some questions.

    Args:
        work: work folder.
        questions: names of the questions; () is the question about the geometry alone.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.people.label.entities import Mode
    from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements

    if not (work.folder / "labels.db").is_file():
        return []
    asked = set(questions) or {GEOMETRY}
    with open_store(work.database, create=False) as store:
        return [
            judgement
            for campaign in store.campaigns()
            if campaign.settings.mode is Mode.LABEL
            for judgement in kept_judgements(store, LabelFilters(campaign=campaign.settings.name), Mode.LABEL)
            if asked <= {GEOMETRY, *judgement.votes}
        ]


def count_open_pairs(work: Work, questions: Sequence[str]) -> int:
    """Count the pairs of sampled assets of the same prompt that have no answers to some questions.

    Args:
        work: work folder, whose assets are sampled.
        questions: names of the questions; () is the question about the geometry alone.
    """
    asset_counts = Counter(line["condition"] for line in work.lines())
    answered = {
        (judgement.left.condition, frozenset((judgement.left.seed, judgement.right.seed)))
        for judgement in answered_judgements(work, questions)
    }
    return sum(math.comb(count, 2) for count in asset_counts.values()) - len(answered)
