"""Conversion of what version 0.1 (commit 52ebe99) wrote, where the present code writes it differently.

No other module contains code for an earlier version. Run folders, rewards, label stores and their exports,
studies, folders WORK, artefact stores and networks of version 0.1 have the present form except for what the
functions below convert; `tests/compat/test_version_0_1.py` opens one of each. A change of a form that is
written to disk adds its conversion here. Folders of versions before 0.1 are not supported.

Names that were renamed since, of flags and settings (`eg3d_rlhf.core.renamed`) and of keys of JSON files
(docs/start/migrating.md), follow two rules:

    reading     `settings`, `options` and their like give what version 0.1 recorded its present names
    hashing     `stored`, `words`, `file_names` and `former` give the inputs of an artefact the names that
                version 0.1 hashed, so that whatever it made is found by its hash and is not made again
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core import renamed

if TYPE_CHECKING:
    import torch

# Settings of training_options.json and of the states of a run: old name -> present name.
SETTINGS = {
    "reward_watch": "heldout_reward",  # --mode=gan, inversions
    "reward-watch": "heldout-reward",  # name of that file among the hashes of inversions
    "anchor_gate": "consistency_gate",  # --mode=gan
    "anchor_psi": "consistency_psi",
    "anchor_resolution": "consistency_resolution",
    "anchors": "reference_samples",  # --mode=reward, below "train"
    "shuffled": "randomised",  # --mode=mesh-reward
    "question": "criterion",  # --mode=reward, below "filters"
}
HASHED_ROLES = {"tuned": "op"}  # values of `roles`, which decides the preferred sample of a pair of the loop
CONDITIONING = ("conditioning.safetensors", "conditions.safetensors")  # present and old name
FOLDERS = {"runs/controlled-study": "runs/proof", "runs/rewards": "runs/zoo"}  # default of --outdir
JOBS_OF_SCRIPTS = {"train.py": "train --mode=gan", "tools/train_reward.py": "train --mode=reward"}
HELDOUT = ("reward-heldout.safetensors", "reward-watch.safetensors")  # bundled: present and old name


def drop_comparison_counter(state: "MutableMapping[str, torch.Tensor]", prefix: str) -> None:
    """Remove the tensor `offset` that checkpoints of runs with --reward-shaping=reference hold.

    It counted comparisons with reference samples, and nothing read it.
    """
    state.pop(f"{prefix}offset", None)


def settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings under their present names.

    Args: record: training_options.json or the options in a checkpoint, of version 0.1 or of the present one;
        nested mappings are converted, too.
    """
    made: dict[str, Any] = {}
    for name, value in record.items():
        if name == "roles" and isinstance(value, str):
            value = next((now for now, old in HASHED_ROLES.items() if old == value), value)
        if name == "table_seeds" and isinstance(value, int):
            value = list(range(value))  # of --mode=mesh-reward: a number of trainings
        if isinstance(value, str) and value.endswith(f"/{HELDOUT[1]}") and not Path(value).exists():
            beside = Path(value).with_name(HELDOUT[0])  # the bundled file, which was renamed
            value = str(beside) if beside.exists() else value
        made[SETTINGS.get(name, name)] = settings(value) if isinstance(value, Mapping) else value
    return made


def stored(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of an artefact with the values that version 0.1 hashed."""
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "roles" and isinstance(value, str):
            value = HASHED_ROLES.get(value, value)
        made[name] = stored(value) if isinstance(value, Mapping) else value
    return made


def words(script: str, flags: Sequence[str]) -> list[str]:
    """Return the flags of one of our scripts as version 0.1 spelled them.

    Args: script: relative to the repository; the flags of others have the same names.

    >>> words("train.py", ["--heldout-reward=a.safetensors", "--set=consistency_psi=1"])
    ['--reward-watch=a.safetensors', '--set=anchor_psi=1']
    """
    names = renamed.FLAGS.get(JOBS_OF_SCRIPTS.get(script, ""), {})
    old = {now: before for before, now in names.items()}
    made = []
    for word in flags:
        setting = word.startswith("--set=")
        name, equals, value = (word.removeprefix("--set=") if setting else word).partition("=")
        known = old.get(f"--set {name}" if setting else name)
        if known is not None:
            name = known.removeprefix("--set ")
        if value.endswith(f"/{HELDOUT[0]}"):
            value = value.removesuffix(HELDOUT[0]) + HELDOUT[1]
        made.append(f"{'--set=' if setting else ''}{name}{equals}{value}")
    return made


def file_names(script: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return hashes of the files that a script reads under the names, and flags, of version 0.1."""
    old = {HELDOUT[0]: HELDOUT[1]}
    return {old.get(name, words(script, [name])[0]): digest for name, digest in files.items()}


def conditioning_file(folder: Path) -> Path:
    """Return the file of embeddings in a folder; under its old name where version 0.1 wrote it."""
    present, old = (folder / name for name in CONDITIONING)
    return old if old.is_file() and not present.is_file() else present


def outdir(folder: Path) -> Path:
    """Return the default folder of a report; under its old name where only that one exists."""
    old = FOLDERS.get(folder.as_posix())
    return folder if old is None or folder.exists() or not Path(old).is_dir() else Path(old)


# Old and new keys of files that are read again, by file.

_HEADS = {
    "repaired": "error_reduction",
    "repaired_ci95": "error_reduction_ci95",
    "whole_made_worse": "intact_degraded",
    "error_broken": "error_defective",
    "error_whole": "error_intact",
    "missing_broken": "missing_defective",
    "extra_broken": "extra_defective",
    "fscore_broken": "fscore_defective",
    "fscore_whole": "fscore_intact",
    "fine_broken": "fine_defective",
    "completeness_broken": "completeness_defective",
    "distance_broken": "distance_defective",
    "whole_share": "intact_share",
}
_SUMMARY = {
    **_HEADS,
    "repaired_by_filter": "error_reduction_by_post_processing",
    "broken_n": "defective_n",
    "fscore_behind": "fscore_back_of_head",
    "whole": "intact",
    "filter": "post_processing",
    "strongest_filter": "strongest_post_processing",
    "filters": "post_processing_methods",
    "filters_chosen_on": "post_processing_chosen_on",
    "frechet_verdict": "frechet_outcome",
    "verdict": "outcome",
    "judge": "evaluation",
    "second": "heldout",
    "watch": "monitored",
}


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    """Return JSON values with every key in `names` renamed, at any depth."""
    if isinstance(values, Mapping):
        return {names.get(key, key): _renamed(value, names) for key, value in values.items()}
    return [_renamed(value, names) for value in values] if isinstance(values, list) else values


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a run's summary.json."""
    renamed: dict[str, Any] = _renamed({**record, "settings": {}}, _SUMMARY)
    if "settings" in record:  # of the bundled control
        return {**renamed, "settings": options(record["settings"])}
    del renamed["settings"]
    return renamed


def figures_of_tuning(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of what `report rewards` stores of a tuned network."""
    renamed: dict[str, Any] = _renamed(record, _HEADS)
    return renamed


# Names that stand in hashed inputs, in seeds of random streams, and in names of folders and files.

_FORMER = {
    "randomised": "coin",
    "inverted": "turned",
    "post-processing": "filter",
    "ground-truth heads": "whole heads",
    **{new: old for old, new in _HEADS.items()},
}


def former(name: str) -> str:
    """Return the spelling of version 0.1, which hashed inputs keep."""
    return _FORMER.get(name, name)


def arm_in_paths(folder: Path, arm: str) -> str:
    """Return the name of an arm in file names of a controlled study: the former one in a folder of version
    0.1.
    """
    return former(arm) if (folder / "labels" / f"{former(arm)}0.jsonl").exists() else arm


# Run folders: the settings, and lines of stats.jsonl.

_GAN_STATS = {
    "Watch/second": "Monitored/heldout",
    "Watch/reward": "Monitored/reward",
    "Watch/utility": "Monitored/utility",
    "Watch/distance": "Monitored/distance",
    "RLHF/held": "RLHF/consistency_weight",
    "Loss/Grlhf/anchors": "Loss/Grlhf/consistency",
}


def gan_stats(line: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a line of a GAN run's stats.jsonl."""
    return {_GAN_STATS.get(key, key): value for key, value in line.items()}


def ledger_step(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a finished step of preference rounds."""
    step: dict[str, Any] = _renamed(record, {"watch": "monitored", "second": "heldout"})
    return step


# Settings of runs: names of fields.
_SETTINGS = {"judging": "evaluation", "max_away": "max_drift"}
# Names of groups of an ablation, and of what their stages learn.
_GROUPS = {"anchor": "regulariser", "shuffled": "randomised", "turned": "inverted"}


def options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a run's training_options.json, and the names of arms and controls in it."""
    known = {
        key: _renamed(value, {"watch": "heldout"} if key == "hashes" else _SETTINGS)
        for key, value in settings(values).items()
    }
    made: dict[str, Any] = _control_renamed(known)
    return made


def _control_renamed(values: Any, key: str = "") -> Any:
    """Rename the controls in the values of the keys `arms`, `groups` and `use`."""
    if isinstance(values, Mapping):
        return {name: _control_renamed(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [_control_renamed(value, key) for value in values]
    if isinstance(values, str) and key == "groups":
        return _GROUPS.get(values, values)
    if isinstance(values, str) and key in ("arms", "use"):
        return re.sub(r"\bshuffled$", "randomised", values)
    return values


def former_settings(values: Any, key: str = "") -> Any:
    """Return settings with the names of version 0.1, which hashed inputs and saved weights keep."""
    if isinstance(values, Mapping):
        names = {new: old for old, new in _SETTINGS.items()}
        return {names.get(name, name): former_settings(value, name) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [former_settings(value, key) for value in values]
    return "shuffled" if key == "use" and values == "randomised" else values


def former_task(task: str) -> str:
    """Return the former name of a task "<arm>-<seed>", which its folder and its hashed inputs keep."""
    return re.sub(r"\brandomised\b", "shuffled", task)


def former_use(use: str) -> str:
    """Return the former name of what a stage learns of the loop's pairs, which hashed inputs keep."""
    return next((old for old, new in _GROUPS.items() if new == use), use)


_LOOP_PAIRS = {
    "op_rewarded": "tuned_rewarded",
    "op_rewarded_where_changed": "tuned_rewarded_where_changed",
}


def loop_pairs(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the record of an artefact of loop pairs."""
    return {_LOOP_PAIRS.get(key, key): value for key, value in record.items()}


_FLOW_STATS = {"away": "drift", "left": "drift"}


def flow_stats(line: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a line of a flow training's stats.jsonl."""
    return {_FLOW_STATS.get(key, re.sub("^watched/", "heldout/", key)): value for key, value in line.items()}


def flow_warnings(values: Mapping[str, str]) -> dict[str, str]:
    """Rename the warnings in a state of a flow training."""
    return {"divergence" if name == "runaway" else name: text for name, text in values.items()}


def flow_progress(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the progress in a state of a flow training."""
    return {**values, "sums": flow_stats(values["sums"])}


# Cached parts of reports.

_CURVES = {"programmatic judge": "oracle"}
_RANDOMISATIONS = {"by_draw": "by_randomisation", "draws": "randomisations"}


def finding(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a cached part of a report.

    Args: key: of the part's job.
    """
    values = {"images" if name == "pictures" else name: value for name, value in values.items()}
    data = dict(values["data"])
    rows = list(values["rows"])
    if key in ("scores", "best-of-n"):
        data = {"evaluator" if name == "judge" else name: value for name, value in data.items()}
        rows = _renamed(rows, {"judge": "evaluator"})
    elif key == "over-optimisation":
        data = _renamed(data, {**_CURVES, "deviation": "standard_deviation"})
        rows = [{**row, "measure": _CURVES.get(row["measure"], row["measure"])} for row in rows]
    elif key == "front" or key.startswith("cell-"):
        data = _renamed(data, {"judge": "oracle"})
        rows = _renamed(rows, {"judge": "oracle"})
    elif key == "redrawn-reward":
        data = {_RANDOMISATIONS.get(name, name): value for name, value in data.items()}
        rows = _renamed(rows, {"draw": "randomisation"})
    elif key == "comparison" or key.startswith("network-"):
        data = _renamed(data, {"deviation": "standard_deviation", "own": "reference"})
        rows = _renamed(rows, {"deviation": "standard_deviation"})
    return {**values, "data": data, "rows": rows}


def former_trial(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a best-of-n report with the former key of the evaluator."""
    renamed: dict[str, Any] = _renamed(inputs, {"evaluator": "judge"})
    return renamed


def inversion(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the measures of a target of an inversion."""
    return {"evaluator" if key == "judge" else key: value for key, value in record.items()}


def latent_reward(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the description of a reward of latents."""
    renamed: dict[str, Any] = _renamed(meta, {"taught": "record", "told": "evaluation"})
    return renamed


def mesh_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the control in the table of RewardCS's arms."""
    rows = {re.sub("^shuffled/", "randomised/", name): row for name, row in table["rows"].items()}
    return {**table, "rows": rows}
