"""Report of the gold checks of a study to its organiser, while the study runs.

The design of a study leaves out annotators who answer too many gold checks wrongly. The organiser must learn
this early, because some people prefer the damaged shapes. Therefore the result of each annotator is printed
in the terminal after the fifth gold check, and the organiser's page shows it beside the annotator's name.
"""

import threading
from collections.abc import Iterable

import click

from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Kind, Mode, StoredCampaign
from eg3d_rlhf.people.label.quality import QualityLimits
from eg3d_rlhf.people.label.store import Store

REPORTED_AFTER = 5  # number of answered gold checks of an annotator after which the result is reported
RULE = "gold_rule"  # key of a study's campaign: [smallest share of correct checks, smallest number of checks]


def limits_of(campaign: StoredCampaign) -> QualityLimits | None:
    """Return the limits of the organiser's page: a study's rule for gold checks. None: the default limits."""
    rule = campaign.settings.extra.get(RULE)
    if campaign.settings.mode is not Mode.STUDY or rule is None:
        return None
    return QualityLimits(gold_accuracy=rule[0], gold_least=rule[1])


def gold_results(judgement_rows: Iterable[JudgementRow], annotator: str) -> list[bool]:
    """Return True or False for each gold check of an annotator: the answer was correct, or it was not.

    Skipped gold checks are left out.
    """
    return [
        judgement.choice.meets(judgement.expected)
        for judgement in judgement_rows
        if judgement.kind is Kind.GOLD
        and judgement.annotator == annotator
        and judgement.choice is not Choice.SKIP
        and not judgement.undone
    ]


class GoldReporter:
    """Prints the result of each annotator's gold checks once, after the fifth one.

    Args:
        store: label store.
        campaign: campaign that is served. Nothing is printed unless it is a study with gold checks.
    """

    def __init__(self, store: Store, campaign: StoredCampaign):
        self.store = store
        self.campaign = campaign
        self._reported: set[str] = set()  # names of the annotators whose result was printed
        self._lock = threading.Lock()  # answers arrive in several threads

    def after_answer(self, annotator: str) -> None:
        """Print the result of an annotator if this annotator has answered enough gold checks.

        Args: annotator: name of the annotator whose answer was stored.
        """
        limits = limits_of(self.campaign)
        if limits is None or not self.campaign.settings.gold_every or annotator in self._reported:
            return
        results = gold_results(self.store.judgements(self.campaign.settings.name, [annotator]), annotator)
        if len(results) < REPORTED_AFTER:
            return
        with self._lock:
            if annotator in self._reported:
                return
            self._reported.add(annotator)
        click.echo(describe_result(annotator, sum(results), len(results), limits.gold_accuracy))


def describe_result(annotator: str, correct_count: int, check_count: int, least_share: float) -> str:
    """Return the sentence on the gold checks of an annotator.

    Args:
        annotator: name of the annotator.
        correct_count: number of correct answers.
        check_count: number of answered gold checks.
        least_share: share of correct answers below which the design leaves out the annotator, 0..1.
    """
    sentence = f"gold checks of {annotator}: {correct_count} of {check_count} correct"
    if correct_count >= least_share * check_count:
        return f"{sentence}, at least {least_share:.0%} are required"
    return (
        f"{sentence}, below {least_share:.0%}: as it stands, the report will leave out all answers of"
        f" {annotator}. If this person has understood the question and prefers the damaged shapes, stop, and"
        " begin a new study without gold checks (--gold-every=0)."
    )
