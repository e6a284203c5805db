"""The gate between labels of a judge and a training: a calibration of the same judge by the same criterion.

A label of a judge states the hash of its judge, which covers model, question, views and settings. It may
train something only if a calibration was measured for this hash against people, on enough pairs and with an
agreement whose lower bound suffices, or if the user passes --uncalibrated, which reports repeat.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.preferences.provenance import MODEL_PREFIX, Gate

if TYPE_CHECKING:
    from eg3d_rlhf.people.judge.calibration import Calibration


def training_gate(calibrations: Sequence[str], uncalibrated: bool) -> Gate:
    """Return the function that tests labels of judges before a training, see `LabelChoice.gate`.

    Args:
        calibrations: paths of calibration files.
        uncalibrated: True lets all labels pass.

    Raises: FileNotFoundError or ValueError for a file that is no calibration.
    """
    # imported here: only this function needs the files
    from eg3d_rlhf.people.judge.calibration import Calibration

    # Read once, before any label, so that a wrong file is an error at once.
    read_calibrations = [Calibration.read(Path(path)) for path in calibrations]

    def check(records: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for the first judge and criterion without a calibration that passed."""
        # The choice of the user; reports repeat it.
        if uncalibrated:
            return
        # Labels are grouped, so that a million of them are tested as quickly as one.
        for (provenance, criterion, judge), count in Counter(
            (str(record["provenance"]), str(record.get("criterion", "")), str(record.get("judge", "")))
            for record in records
        ).items():
            model = provenance.removeprefix(MODEL_PREFIX)
            reason = rejection_of(read_calibrations, model, criterion, judge)
            if reason is not None:
                raise ValueError(
                    f"{count} labels of the judge {model} by the criterion {criterion or 'none'} are"
                    f" rejected: {reason}. Run `eg3d-rlhf judge calibrate` and pass --calibration=FILE, or"
                    " pass --uncalibrated, which all reports then repeat."
                )

    return check


def rejection_of(calibrations: "Sequence[Calibration]", model: str, criterion: str, judge: str) -> str | None:
    """Return why labels of a judge are rejected, or None if one of the calibrations lets them pass.

    Args:
        calibrations: calibrations that the user passed.
        model: name of the judge's model.
        criterion: criterion of the labels; "" if the labels state none.
        judge: hash of the judge; "" if the labels state none.
    """
    if not calibrations:
        return "no calibration was passed"
    # Imported labels of models state neither, and cannot be compared.
    if not criterion or not judge:
        return "they do not state their criterion and their judge, so no calibration can be compared"
    matching = [calibration for calibration in calibrations if calibration.model == model]
    if not matching:
        names = ", ".join(sorted({calibration.model for calibration in calibrations}))
        return f"the calibrations that were passed are of {names}"
    reasons = [calibration_refusal(calibration, criterion, judge) for calibration in matching]
    return None if None in reasons else reasons[0]


def calibration_refusal(calibration: "Calibration", criterion: str, identity: str) -> str | None:
    """Return why labels of a judge are rejected by a calibration, or None if they may be used.

    The criterion may have another name in the calibration, if its question, views and settings are the same.

    Args:
        calibration: calibration of a judge.
        criterion: criterion of the labels.
        identity: hash of the judge for the question of the criterion.
    """
    names = [name for name, known in calibration.identities.items() if known == identity]
    return calibration.refusal(names[0] if names else criterion, identity)
