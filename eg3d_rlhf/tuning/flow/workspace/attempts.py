"""Count of the trainings in a work folder that were tested on the same held-out pairs.

The test of `flow tune` lets random answers pass in at most 5 % of trainings. The best of several trainings
that are tested on the same pairs passes more often, so a report states which attempt it is.

    tune-NN/held-out-pairs.json    name of a stage -> keys of its held-out pairs
"""

import json
from collections.abc import Mapping
from pathlib import Path

from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.workspace.tune import REPORT, StageLabels
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from training.storage import write_atomic

HELD_OUT = "held-out-pairs.json"


def pair_key(pair: PreferencePair) -> str:
    """Return a name of a pair that does not depend on which of its assets is preferred."""
    # ids are CONDITION/PREFERRED>REJECTED, see `ranking.pair_up`
    assets = pair.id.removeprefix(f"{pair.condition}/").split(">")
    return f"{pair.condition}/{'>'.join(sorted(assets))}"


def write_held_out(training_folder: Path, labels_by_stage: Mapping[str, StageLabels]) -> None:
    """Write the held-out pairs of a training into its folder."""
    keys_by_stage = {
        stage: sorted(pair_key(pair) for pair in labels.held_out) for stage, labels in labels_by_stage.items()
    }
    write_atomic(training_folder / HELD_OUT, (json.dumps(keys_by_stage, ensure_ascii=False) + "\n").encode())


def find_earlier_attempts(
    work: Work, training_folder: Path, labels_by_stage: Mapping[str, StageLabels]
) -> dict[str, list[str]]:
    """Find earlier trainings that were tested on some of the same held-out pairs.

    Trainings without a report were not tested. A training of an earlier version does not state its pairs, and
    is counted if it tested the stage.

    Args:
        work: work folder.
        training_folder: folder of the present training.
        labels_by_stage: name of a stage -> its labels.
    Returns: name of a stage -> names of the folders of the earlier trainings, in order.
    """
    attempts: dict[str, list[str]] = {stage: [] for stage in labels_by_stage}
    for folder in work.numbered("tune"):
        # Folders are in the order of their numbers. A rehearsal lies elsewhere, and sees all trainings.
        if folder.resolve() == training_folder.resolve():
            break
        if not (folder / f"{REPORT}.json").is_file():
            continue
        tested_stages = json.loads((folder / f"{REPORT}.json").read_text())["stages"]
        path = folder / HELD_OUT
        keys_by_stage = json.loads(path.read_text()) if path.is_file() else {}
        for stage, labels in labels_by_stage.items():
            keys = {pair_key(pair) for pair in labels.held_out}
            if stage in tested_stages and (stage not in keys_by_stage or keys & set(keys_by_stage[stage])):
                attempts[stage].append(folder.name)
    return attempts
