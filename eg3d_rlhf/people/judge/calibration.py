"""Calibration of a judge against people, and the gate that labels of a judge must pass.

The file calibration.json has the keys

    judge        {"reported": names of models that the server reported, "identities": {criterion: hash}};
                 the hash is `JudgeSettings.identity`: of model, question, views and settings
    model        name of the model that was asked
    pairs        number of pairs that people labelled and the judge was asked about
    criteria     {name: {n, accuracy, kappa, kappa_interval, first_share, order_flips, ties, unreadable}}
    people_alpha Krippendorff's alpha of people among themselves, the ceiling; null without two votes a pair
    damage       {kind: {n, right}}, pairs of which one asset is more damaged than the other
    gate         "passed" if every criterion passes, else "refused"

`n` counts pairs with a readable verdict, `unreadable` pairs without one. Shares are of the n pairs, in 0..1.
kappa and accuracy compare three outcomes (first, second, tie) with the majority of people. Everything in the
file follows from labels and answers, so a replay writes the same bytes; what a run has cost is in cost.json.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eg3d_rlhf.people.judge.settings import LEAST_KAPPA, LEAST_PAIRS
from eg3d_rlhf.people.judge.verdicts import Verdict
from eg3d_rlhf.preferences.agreement import cohen_kappa, krippendorff_alpha
from eg3d_rlhf.preferences.asset_votes import TIE, plurality
from training.storage import write_atomic

# Values of the key `gate`.
PASSED = "passed"
REFUSED = "refused"
# Keys of the file and of a criterion. Other commands and programs read exactly these.
_KEYS = ("judge", "model", "pairs", "criteria", "people_alpha", "damage", "gate")
_CRITERION_KEYS = (
    "n",
    "accuracy",
    "kappa",
    "kappa_interval",
    "first_share",
    "order_flips",
    "ties",
    "unreadable",
)


class Unit(NamedTuple):
    """One pair by one criterion: the votes of people, and the verdict of the judge."""

    criterion: str
    votes: Mapping[str, str]  # annotator -> first, second or tie
    verdict: Verdict | None  # None: not asked

    @property
    def majority(self) -> str | None:
        """Return the verdict of people: the most frequent vote, a tie if two are equally frequent."""
        # People who disagree evenly give a tie, as an undecided person does.
        return plurality(list(self.votes.values()))


class GoldResult(NamedTuple):
    """A pair with a known answer: which kind of damage, and whether the judge chose the less damaged copy."""

    kind: str
    is_right: bool


@dataclass(frozen=True, kw_only=True)
class CriterionCalibration:
    """Agreement of a judge with people by one criterion, see the docstring of the module."""

    n: int
    accuracy: float | None
    kappa: float | None
    kappa_interval: tuple[float, float] | None
    first_share: float | None
    order_flips: float | None
    ties: float | None
    unreadable: int

    def refusal(self, least_kappa: float = LEAST_KAPPA) -> str | None:
        """Return why labels by this criterion are refused, or None if they may be used.

        Args:
            least_kappa: value that the lower end of kappa's interval must exceed.
        """
        # With fewer pairs, the interval of kappa is wider than the difference that matters.
        if self.n < LEAST_PAIRS:
            return f"it was calibrated on {self.n} pairs, and at least {LEAST_PAIRS} are needed"
        # Undefined agreement is no agreement.
        if self.kappa is None or self.kappa_interval is None:
            return "kappa is undefined, because judge and people gave one answer alone"
        # The lower end, so that a lucky sample of pairs does not open the gate.
        if not self.kappa_interval[0] > least_kappa:
            return (
                f"kappa with people is {self.kappa:.2f} [{self.kappa_interval[0]:.2f},"
                f" {self.kappa_interval[1]:.2f}], and its lower end must exceed {least_kappa:g}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the values in JSON types."""
        return {
            **vars(self),
            "kappa_interval": None if self.kappa_interval is None else list(self.kappa_interval),
        }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Result of `eg3d-rlhf judge calibrate`, see the docstring of the module."""

    model: str
    identities: Mapping[str, str]  # criterion -> hash of model, question, views and settings
    reported: tuple[str, ...] = ()  # names of models that the server reported
    pairs: int = 0
    criteria: Mapping[str, CriterionCalibration] = field(default_factory=dict)
    people_alpha: float | None = None
    damage: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    gate: str = REFUSED

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the file, which is stored with each label of the judge."""
        # The hash of the bytes: a user can check it with sha256sum.
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def refusal(
        self, criterion: str, identity: str | None = None, least_kappa: float = LEAST_KAPPA
    ) -> str | None:
        """Return why labels by a criterion are refused, or None if they may be used.

        Args:
            criterion: criterion of the labels.
            identity: hash of model, question, views and settings with which they were made; None: not
                compared, for a report on this calibration itself.
            least_kappa: value that the lower end of kappa's interval must exceed.
        """
        if criterion not in self.criteria:
            # The message lists what was calibrated, since names of criteria are easily confused.
            known = ", ".join(self.criteria) or "none"
            return f"the criterion {criterion} was not calibrated; the calibrated criteria are {known}"
        # Another model, question or rig is another judge, whose agreement is not known.
        if identity is not None and self.identities.get(criterion) != identity:
            return (
                f"the calibration of {criterion} belongs to another model, question, views or settings of"
                " the judge"
            )
        return self.criteria[criterion].refusal(least_kappa)

    def to_json(self) -> dict[str, Any]:
        """Return the calibration in JSON types, with the keys of the file."""
        return {
            # The address of the server is left out: it may be local, and does not matter.
            "judge": {"reported": list(self.reported), "identities": dict(self.identities)},
            "model": self.model,
            "pairs": self.pairs,
            "criteria": {name: criterion.to_json() for name, criterion in self.criteria.items()},
            "people_alpha": self.people_alpha,
            "damage": {kind: dict(result) for kind, result in self.damage.items()},
            "gate": self.gate,
        }

    def to_bytes(self) -> bytes:
        """Return the bytes of the file."""
        # Keys keep their order and floats their shortest form, so equal values give equal bytes.
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write the calibration atomically."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Read a calibration.

        Raises: FileNotFoundError for a missing file; ValueError for a file of another kind.
        """
        check_calibration_file(path)
        try:
            record = json.loads(path.read_text())
            # An unknown key may belong to a later version, whose gate has other rules.
            if set(record) != set(_KEYS):
                raise ValueError("the keys differ")
            criteria = {}
            for name, values in record["criteria"].items():
                # null where kappa is undefined, or where there are fewer than ten pairs
                interval = values["kappa_interval"]
                criteria[name] = CriterionCalibration(
                    **{key: values[key] for key in _CRITERION_KEYS if key != "kappa_interval"},
                    kappa_interval=None if interval is None else (float(interval[0]), float(interval[1])),
                )
            return cls(
                # Wrong types raise errors that are caught below.
                model=str(record["model"]),
                identities=dict(record["judge"]["identities"]),
                reported=tuple(record["judge"]["reported"]),
                pairs=int(record["pairs"]),
                criteria=criteria,
                people_alpha=record["people_alpha"],
                damage=record["damage"],
                gate=str(record["gate"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} is no calibration of a judge ({error!r}). Name a calibration.json that"
                " `eg3d-rlhf judge calibrate` wrote."
            ) from None


def check_calibration_file(path: Path) -> None:
    """Raise FileNotFoundError if there is no file of a calibration at a path."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--calibration: the file {path} does not exist. Correct the path, or run `eg3d-rlhf judge"
            " calibrate` first."
        )


def measure_criterion(units: Sequence[Unit]) -> CriterionCalibration:
    """Compare the verdicts of a judge with the majorities of people, by one criterion.

    The interval of kappa is over pairs: a Bayesian bootstrap with a weak prior, as `cohen_kappa` describes.

    Deviates: a plain bootstrap has zero width where judge and people agree on every pair.

    Args:
        units: pairs of one criterion. Pairs that were not asked, and pairs without votes, are left out.
    """
    # A pair that a limit left out is no failure of the judge.
    asked = [unit for unit in units if unit.verdict is not None and unit.verdict.is_asked and unit.votes]
    readable = [
        (unit.majority, unit.verdict)
        for unit in asked
        if unit.verdict is not None and unit.verdict.outcome is not None
    ]
    count = len(readable)
    # The judge, and then people, in the same order of pairs.
    outcomes = [verdict.outcome for _, verdict in readable]
    majorities = [majority for majority, _ in readable]
    # Pairs without a named position, such as ties in both orders, have no share.
    first_shares = [verdict.first_share for _, verdict in readable if verdict.first_share is not None]
    # Three outcomes: a judge that calls clear pairs ties disagrees with people.
    agreement = cohen_kappa(majorities, outcomes)
    interval = None
    if agreement.lo is not None and agreement.hi is not None:
        interval = (agreement.lo, agreement.hi)

    def share(number: int) -> float | None:
        """Return a number of pairs as a share of the readable ones, or None without any."""
        return number / count if count else None

    return CriterionCalibration(
        n=count,
        accuracy=share(
            sum(majority == outcome for majority, outcome in zip(majorities, outcomes, strict=True))
        ),
        kappa=agreement.value,
        kappa_interval=interval,
        # fsum is exact, so the order of the pairs does not change the last digit.
        first_share=math.fsum(first_shares) / len(first_shares) if first_shares else None,
        order_flips=share(sum(verdict.is_order_flip for _, verdict in readable)),
        ties=share(outcomes.count(TIE)),
        # A count and not a share, because these pairs are in no other figure.
        unreadable=len(asked) - count,
    )


def alpha_of_people(units: Sequence[Unit]) -> float | None:
    """Return Krippendorff's alpha of the votes of people on pairs; None if it is undefined."""
    return krippendorff_alpha([unit.votes for unit in units]).value


def damage_table(results: Sequence[GoldResult]) -> dict[str, dict[str, int]]:
    """Return the number of pairs of each kind of damage, and of how many the judge was right."""
    table: dict[str, dict[str, int]] = {}
    for result in results:
        row = table.setdefault(result.kind, {"n": 0, "right": 0})
        # Every pair that was asked counts, also one without a readable verdict.
        row["n"] += 1
        row["right"] += int(result.is_right)
    return table


def calibrate(
    model: str,
    identities: Mapping[str, str],
    units: Sequence[Unit],
    pairs: int,
    gold_results: Sequence[GoldResult] = (),
    least_kappa: float = LEAST_KAPPA,
) -> Calibration:
    """Compute the calibration of a judge from its verdicts and the votes of people.

    Args:
        model: name of the model that was asked.
        identities: criterion -> `JudgeSettings.identity` of its question.
        units: pairs by criterion.
        pairs: number of different pairs.
        gold_results: results on pairs with damaged copies.
        least_kappa: value that the lower end of kappa's interval must exceed.
    """
    criteria = {
        name: measure_criterion([unit for unit in units if unit.criterion == name]) for name in identities
    }
    # Names that the server reported, which may state a version.
    reported = {model for unit in units if unit.verdict is not None for model in unit.verdict.models}
    # Damaged copies alone never open the gate.
    # `all` is True without criteria, so an empty calibration is excluded.
    has_passed = bool(criteria) and all(
        criterion.refusal(least_kappa) is None for criterion in criteria.values()
    )
    return Calibration(
        model=model,
        identities=dict(identities),
        reported=tuple(sorted(reported)),
        pairs=pairs,
        criteria=criteria,
        people_alpha=alpha_of_people(units),
        damage=damage_table(gold_results),
        gate=PASSED if has_passed else REFUSED,
    )
