"""Parsing of a judge's answers, and the verdict on a pair from the answers in both orders.

An answer is JSON: {"winner": "first" | "second" | "tie", "confidence": 0..1, "reason": "..."}. Only the
field `winner` decides. A number or an ordinal in the prose around it never does: "Of the 2 images, I prefer
number 1." holds two numbers, and none of them is a field.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eg3d_rlhf.preferences.asset_votes import FIRST, SECOND, TIE, plurality

# Values of the field `winner` in lower case -> outcome.
_WINNERS = {
    **dict.fromkeys(("first", "left", "1", "a", "the first", "asset 1", "first asset"), FIRST),
    **dict.fromkeys(("second", "right", "2", "b", "the second", "asset 2", "second asset"), SECOND),
    **dict.fromkeys(("tie", "draw", "equal", "both", "neither", "cannot decide"), TIE),
}
# Outcome of the same pair in the exchanged order.
_OTHER_SIDE = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)  # reasoning that some models print before
_TRAILING_COMMA = re.compile(r",\s*([}\]])")
# A complete field `winner` of an answer that was cut off later.
_WINNER_FIELD = re.compile(r'["\']winner["\']\s*:\s*(?:"([^"\n]*)"|\'([^\'\n]*)\'|(\d+)(?=\s*[,}]))', re.I)
_REASON_LENGTH = 500  # characters of a reason that are kept


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of a model, with the winner as an asset of the pair and not as a position."""

    shown: str | None  # position that the answer names: first, second, tie; None: unreadable
    winner: str | None  # the same in terms of the pair, so exchanged where the pair was shown swapped
    is_swapped: bool  # True: the second asset of the pair was shown first
    repeat: int  # number of the repeat, from 0
    confidence: float | None  # 0..1, as the model states it; None: not stated
    reason: str  # first characters of the model's reason
    p_first: float | None  # P(first of the pair) from log-probabilities; None: not given
    model: str  # name of the model that the server reported
    hash: str  # key of the answer in the file of answers; "" if the question was not answered


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict of a judge on one pair by one criterion."""

    pair: str  # key of the pair
    criterion: str
    outcome: str | None  # first, second or tie; None: no readable answer, or not asked
    is_asked: bool  # False: the limit was reached, or the server stopped, before both orders were answered
    answers: tuple[Answer, ...]  # all repeats in the pair's order, then those in the swapped order

    @property
    def is_unreadable(self) -> bool:
        """Return True if the pair was asked, and an order has no readable answer."""
        return self.is_asked and self.outcome is None

    @property
    def is_order_flip(self) -> bool:
        """Return True if both orders are readable and give different answers. The outcome is then a tie."""
        first_order, swapped_order = self._orders()
        return None not in (first_order, swapped_order) and first_order != swapped_order

    @property
    def first_share(self) -> float | None:
        """Return the share of the position "first" among answers that name a position; None without any.

        The share is 0.5 for a pair whose verdict does not depend on the order.
        """
        # Ties name no position.
        positions = [answer.shown for answer in self.answers if answer.shown in (FIRST, SECOND)]
        return positions.count(FIRST) / len(positions) if positions else None

    @property
    def probability(self) -> float | None:
        """Return P(the first of the pair is better), the mean over orders; None if unreadable.

        It comes from the log-probabilities where all answers have them. Otherwise it is the mean over the
        answers of 1 for the first, 0.5 for a tie, and 0 for the second.
        """
        # Half of an answer is no probability.
        if self.outcome is None:
            return None
        readable = [answer for answer in self.answers if answer.winner is not None]
        if all(answer.p_first is not None for answer in readable):
            values = {answer: answer.p_first or 0.0 for answer in readable}
        else:
            values = {answer: {FIRST: 1.0, SECOND: 0.0}.get(str(answer.winner), 0.5) for answer in readable}
        # Each order has the same weight, also if it has fewer readable repeats.
        order_means = [
            sum(order_values) / len(order_values)
            for is_swapped in (False, True)
            if (
                order_values := [value for answer, value in values.items() if answer.is_swapped == is_swapped]
            )
        ]
        return sum(order_means) / len(order_means)

    @property
    def confidence(self) -> float | None:
        """Return the mean of the stated confidences; None if no answer states one."""
        stated = [answer.confidence for answer in self.answers if answer.confidence is not None]
        return sum(stated) / len(stated) if stated else None

    @property
    def reason(self) -> str:
        """Return the reason of the first answer that agrees with the verdict, else of the first answer."""
        # The reason should fit the verdict; after an order flip there is no such answer.
        agreeing = [answer for answer in self.answers if answer.winner == self.outcome]
        return (agreeing or list(self.answers))[0].reason if self.answers else ""

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of models that the server reported, sorted."""
        return tuple(sorted({answer.model for answer in self.answers if answer.model}))

    @property
    def hashes(self) -> tuple[str, ...]:
        """Return the keys of the answers in the file of answers."""
        return tuple(answer.hash for answer in self.answers if answer.hash)

    def _orders(self) -> tuple[str | None, str | None]:
        """Return the majority of each order's answers: the pair's order, and the swapped one."""
        return majority_of(self.answers, False), majority_of(self.answers, True)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict with its answers in JSON types."""
        return {
            "pair": self.pair,
            "criterion": self.criterion,
            "outcome": self.outcome,
            "asked": self.is_asked,
            "order_flip": self.is_order_flip,
            "probability": self.probability,
            "confidence": self.confidence,
            "reason": self.reason,
            "models": list(self.models),
            "answers": [dict(vars(answer)) for answer in self.answers],
        }


def majority_of(answers: Sequence[Answer], is_swapped: bool) -> str | None:
    """Return the most frequent winner among the readable answers in one order.

    Returns: the outcome; a tie if two outcomes are equally frequent; None without a readable answer.
    """
    return plurality(
        [answer.winner for answer in answers if answer.is_swapped == is_swapped and answer.winner is not None]
    )


def verdict_from(pair: str, criterion: str, answers: Sequence[Answer], is_asked: bool = True) -> Verdict:
    """Combine the answers in both orders: agreement is the outcome, disagreement is a tie.

    Args:
        pair: key of the pair.
        criterion: name of the question.
        answers: answers in both orders, with their repeats.
        is_asked: False if some of the questions were not asked.
    """
    # First the pair in its own order, then the swapped one.
    orders = [majority_of(answers, is_swapped) for is_swapped in (False, True)]
    outcome = None
    if is_asked and None not in orders:
        outcome = orders[0] if orders[0] == orders[1] else TIE
    return Verdict(pair=pair, criterion=criterion, outcome=outcome, is_asked=is_asked, answers=tuple(answers))


def parse_answer(text: str) -> dict[str, Any] | None:
    """Return the fields of an answer: winner, confidence and reason; None if no winner can be read.

    The JSON may stand in a fence or between sentences, and may have trailing commas. An answer that was cut
    off after a complete field `winner` is read. Several objects with different winners are unreadable.

    >>> parse_answer('```json\\n{"winner": "Left", "confidence": 0.7,}\\n```')
    {'winner': 'first', 'confidence': 0.7, 'reason': ''}
    >>> parse_answer("Of the 2 images, I prefer number 1.")
    """
    # Reasoning may weigh both answers, and is no answer.
    text = _THOUGHTS.sub("", text)
    # Models sometimes print an empty object or their plan first.
    records = [record for record in _objects(text) if "winner" in record]
    if not records:
        # "winner" stands in no complete object, as in an answer that reached the limit of tokens
        fields = {"".join(groups) for groups in _WINNER_FIELD.findall(text)}
        records = [{"winner": value} for value in fields]
    winners = {_winner(record["winner"]) for record in records}
    # Two different winners are no answer, whichever comes last.
    if len(winners) != 1 or None in winners:
        return None
    # They agree on the winner; the last one is the final answer.
    record = records[-1]
    reason = record.get("reason")
    return {
        "winner": winners.pop(),
        "confidence": _confidence(record.get("confidence")),
        "reason": reason[:_REASON_LENGTH] if isinstance(reason, str) else "",
    }


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects of a text that are in no other object."""
    decoder = json.JSONDecoder()
    # a comma before a closing bracket is the fault that models make most often
    text = _TRAILING_COMMA.sub(r"\1", text)
    objects = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
            objects.append(value)
        except (ValueError, RecursionError):
            end = position + 1
        # Continues after the object, or one character after a bracket that begins none.
        position = text.find("{", end)
    return [value for value in objects if isinstance(value, dict)]


def _winner(value: object) -> str | None:
    """Return the outcome that a value of the field `winner` names; None for another value."""
    # true is 1 in Python, but no answer.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return _WINNERS.get(str(value).strip().strip(".").lower())


def _confidence(value: object) -> float | None:
    """Return a stated confidence, or None unless it is a number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return None
    return float(value)


def probability_of_first(logprobs: Mapping[str, Any] | None) -> float | None:
    """Compute P(first) from the log-probabilities of the two answer tokens.

    At the position at which the value of `winner` begins, P = p(first) / (p(first) + p(second)), where p sums
    over the alternatives of which "first" or "second" is a continuation.

    Args:
        logprobs: the field `logprobs` of a choice: {"content": [{"token", "logprob", "top_logprobs"}]}.

    Returns: probability in 0..1; None if the server gave none, or neither token is among the alternatives.
    """
    # The form of the interface since 2024; older servers have other fields.
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return None
    text = ""
    for entry in content:
        # The token may begin with the quotation mark of the value, or with blanks.
        is_at_value = re.search(r'"winner"\s*:\s*"?\s*$', text) is not None
        # Tokens may split a word anywhere, so the position follows from their joined text.
        text += str(entry.get("token", ""))
        alternatives = entry.get("top_logprobs")
        if is_at_value and isinstance(alternatives, list) and str(entry.get("token", "")).strip(' "\n:'):
            masses = {FIRST: 0.0, SECOND: 0.0}
            for alternative in alternatives:
                token = str(alternative.get("token", "")).strip(' "\n').lower()
                logprob = alternative.get("logprob")
                for side in masses:
                    # Every word starts with the empty text, so an empty token is excluded.
                    if token and side.startswith(token) and isinstance(logprob, (int, float)):
                        masses[side] += math.exp(min(logprob, 0.0))
            # Other tokens, such as "tie", are left out of the comparison.
            total = sum(masses.values())
            return masses[FIRST] / total if total > 0 else None
    return None


def swap_outcome(outcome: str | None) -> str | None:
    """Return an outcome in terms of the exchanged pair."""
    return None if outcome is None else _OTHER_SIDE[outcome]
