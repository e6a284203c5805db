"""Conversion of the files and names of version 0.1 (commit 52ebe99) that the present code writes differently.

No other module contains code for an earlier version. Run folders, rewards, label stores and their exports,
studies, folders WORK, artefact stores and networks of version 0.1 have the present form, except for the names
that the functions below convert. `tests/compat/test_version_0_1.py` opens one of each. A change of a file
format adds its conversion to this module. Files of versions before 0.1 are not supported.

Flags and settings (`eg3d_rlhf.core.renamed`) and keys of JSON files (docs/start/migrating.md) were renamed
since version 0.1. There are two kinds of functions:

    reading     `settings`, `options` and the other functions that rename keys turn old names into present
                ones.
    hashing     `stored`, `words`, `file_names` and the functions `former*` turn present names into old ones.
                Artefacts are found by a hash of their inputs (experiments.store). With the old names, the
                hash equals the one of version 0.1, so that its artefacts are found and are not made again.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core import renamed
from eg3d_rlhf.core.spec import SlabSpec

if TYPE_CHECKING:
    import torch

# Settings in training_options.json and in the checkpoints of a run: old name -> present name.
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
# Values of the setting `roles`, which decides the preferred sample of a pair of the loop: present -> old
# value.
HASHED_ROLES = {"tuned": "op"}
CONDITIONING = ("conditioning.safetensors", "conditions.safetensors")  # (present, old) name of the file
# Default folders of --outdir: present -> old name.
FOLDERS = {"runs/controlled-study": "runs/proof", "runs/rewards": "runs/zoo"}
# Script -> job under which `renamed.FLAGS` lists the flags of the script.
JOBS_OF_SCRIPTS = {"train.py": "train --mode=gan", "tools/train_reward.py": "train --mode=reward"}
# (present, old) name of the bundled held-out reward
HELDOUT = ("reward-heldout.safetensors", "reward-watch.safetensors")


def drop_comparison_counter(state: "MutableMapping[str, torch.Tensor]", prefix: str) -> None:
    """Remove the tensor `offset` from the state of a run with --reward-shaping=reference, in place.

    Version 0.1 counted comparisons with reference samples in this tensor, and no code read it.

    Args:
        state: state dictionary of a checkpoint.
        prefix: prefix of the names of the tensors of the submodule in `state`, with a dot at the end.
    """
    state.pop(f"{prefix}offset", None)


def settings(recorded_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with present names and values, at any depth of nesting.

    Args:
        recorded_settings: content of training_options.json, or the options in a checkpoint, of version 0.1 or
            of the present version.
    """
    present_heldout, old_heldout = HELDOUT
    present_roles = {old: present for present, old in HASHED_ROLES.items()}
    present_settings: dict[str, Any] = {}
    for name, value in recorded_settings.items():
        if name == "roles" and isinstance(value, str):
            value = present_roles.get(value, value)
        # --mode=mesh-reward recorded the number of trainings, and records the list of their seeds now
        if name == "table_seeds" and isinstance(value, int):
            value = list(range(value))
        # The bundled file of the held-out reward was renamed. A file of the user with the old name is kept.
        if isinstance(value, str) and value.endswith(f"/{old_heldout}") and not Path(value).exists():
            renamed_file = Path(value).with_name(present_heldout)
            value = str(renamed_file) if renamed_file.exists() else value
        present_settings[SETTINGS.get(name, name)] = settings(value) if isinstance(value, Mapping) else value
    return present_settings


def stored(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of an artefact with renamed values as version 0.1 hashed them, at any depth.

    Args:
        inputs: inputs of an artefact (see experiments.store), with present values.
    """
    old_inputs: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "roles" and isinstance(value, str):
            value = HASHED_ROLES.get(value, value)
        old_inputs[name] = stored(value) if isinstance(value, Mapping) else value
    return old_inputs


def words(script: str, flags: Sequence[str]) -> list[str]:
    """Return the flags of a script of this repository in the spelling of version 0.1.

    Args:
        script: path of the script, relative to the repository. Flags of scripts that JOBS_OF_SCRIPTS does not
            contain were not renamed.
        flags: words of the command line, such as "--kimg=1" or "--set=consistency_psi=1".

    >>> words("train.py", ["--heldout-reward=a.safetensors", "--set=consistency_psi=1"])
    ['--reward-watch=a.safetensors', '--set=anchor_psi=1']
    """
    present_heldout, old_heldout = HELDOUT
    present_names = renamed.FLAGS.get(JOBS_OF_SCRIPTS.get(script, ""), {})
    old_names = {present: old for old, present in present_names.items()}
    old_words = []
    for word in flags:
        # This flag only accepts a run. It changes no result, so records of commands leave it out.
        if word == "--weak-reward":
            continue
        # "--set=NAME=VALUE" sets the setting NAME; the table of renamed flags lists it as "--set NAME"
        is_setting = word.startswith("--set=")
        flag_name, separator, flag_value = (
            word.removeprefix("--set=").partition("=") if is_setting else word.partition("=")
        )
        old_name = old_names.get(f"--set {flag_name}" if is_setting else flag_name)
        if old_name is not None:
            flag_name = old_name.removeprefix("--set ")
        if flag_value.endswith(f"/{present_heldout}"):
            flag_value = flag_value.removesuffix(present_heldout) + old_heldout
        old_words.append(f"{'--set=' if is_setting else ''}{flag_name}{separator}{flag_value}")
    return old_words


def file_names(script: str, hash_by_name: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of the files that a script reads, under the names of version 0.1.

    Args:
        script: path of the script, relative to the repository.
        hash_by_name: SHA-256 of each file, by the name of a bundled file or by the flag that names the file.
    """
    present_heldout, old_heldout = HELDOUT
    old_hashes = {}
    for name, digest in hash_by_name.items():
        # `words` converts a list of flags; a name that is no renamed flag stays as it is
        old_name = old_heldout if name == present_heldout else words(script, [name])[0]
        old_hashes[old_name] = digest
    return old_hashes


def conditioning_file(folder: Path) -> Path:
    """Return the path of the file of embeddings in a folder.

    The path has the old name if only a file of the old name exists, and the present name otherwise.
    """
    present_path, old_path = (folder / name for name in CONDITIONING)
    return old_path if old_path.is_file() and not present_path.is_file() else present_path


def outdir(folder: Path) -> Path:
    """Return the folder of --outdir, or the default folder of version 0.1 that is used in its place.

    The old folder is returned if it exists, and if `folder` is its renamed default and does not exist.
    """
    old_name = FOLDERS.get(folder.as_posix())
    if old_name is None or folder.exists() or not Path(old_name).is_dir():
        return folder
    return Path(old_name)


# Keys of JSON files that are read again: old key -> present key.

# Measurements of synthetic heads, in summary.json and in the cache of `report rewards`.
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
# Further keys of summary.json.
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


def _renamed(json_values: Any, new_name_by_old: Mapping[str, str]) -> Any:
    """Return JSON values in which every key that is in `new_name_by_old` is renamed, at any depth.

    Args:
        json_values: mapping, list or other value, in JSON types.
        new_name_by_old: maps the old name of a key to its new name.
    """
    if isinstance(json_values, Mapping):
        return {
            new_name_by_old.get(key, key): _renamed(value, new_name_by_old)
            for key, value in json_values.items()
        }
    # a list is converted item by item; any other value has no keys
    return (
        [_renamed(value, new_name_by_old) for value in json_values]
        if isinstance(json_values, list)
        else json_values
    )


def summary(old_summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a run's summary.json from the names of version 0.1 to the present names.

    The summary of the bundled control run also contains the settings of the run, which `options` converts.
    """
    # the settings have their own table of names, so they are empty in this step
    present_summary: dict[str, Any] = _renamed({**old_summary, "settings": {}}, _SUMMARY)
    if "settings" in old_summary:
        present_summary["settings"] = options(old_summary["settings"])
    else:
        del present_summary["settings"]
    return present_summary


def figures_of_tuning(old_metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the metrics that `report rewards` stores for a tuned network."""
    present_metrics: dict[str, Any] = _renamed(old_metrics, _HEADS)
    return present_metrics


# Names in hashed inputs, in seeds of random streams, and in names of folders and files: present -> old name.

_FORMER = {
    "randomised": "coin",
    "inverted": "turned",
    "post-processing": "filter",
    "ground-truth heads": "whole heads",
    **{new: old for old, new in _HEADS.items()},
}


def former(name: str) -> str:
    """Return the old name of an arm, a baseline or a metric, which hashed inputs use.

    A name that was not renamed is returned unchanged.
    """
    return _FORMER.get(name, name)


def arm_in_paths(folder: Path, arm: str) -> str:
    """Return the name of an arm in the file names of a controlled study.

    Args:
        folder: folder of the study. If version 0.1 wrote it, the old name of the arm is returned.
        arm: present name of the arm.
    """
    # version 0.1 wrote the labels of the arm's seed 0 under this name
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


def gan_stats(stats_line: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a line of stats.jsonl of a GAN run."""
    return {_GAN_STATS.get(key, key): value for key, value in stats_line.items()}


def ledger_step(step_record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the record of a finished step of preference rounds."""
    present_record: dict[str, Any] = _renamed(step_record, {"watch": "monitored", "second": "heldout"})
    return present_record


# Names of fields of settings: old -> present name.
_SETTINGS = {"judging": "evaluation", "max_away": "max_drift"}
# Names of the groups of an ablation, and of the labels from which their stages learn: old -> present name.
_GROUPS = {"anchor": "regulariser", "shuffled": "randomised", "turned": "inverted"}


def options(recorded_options: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a run's training_options.json, and the names of arms and controls in it."""
    options_with_present_keys = {
        # the keys below "hashes" are names of input files, not names of settings
        key: _renamed(value, {"watch": "heldout"} if key == "hashes" else _SETTINGS)
        for key, value in settings(recorded_options).items()
    }
    present_options: dict[str, Any] = _control_renamed(options_with_present_keys)
    # Without a crop, version 0.1 read the crop of arXiv 2606.27305 for every generator. The present version,
    # which records `level`, chooses the crop by the generator.
    is_reward_run = present_options.get("mode") == "reward" and present_options.get("observation") == "sigma"
    if is_reward_run and "level" not in present_options and present_options.get("crop") is None:
        present_options["crop"] = list(SlabSpec.crop)
    return present_options


def _control_renamed(settings_part: Any, key: str = "") -> Any:
    """Replace old names of arms, groups and controls in the values of `arms`, `groups` and `use`.

    Args:
        settings_part: settings, in JSON types.
        key: key whose value `settings_part` is; "" at the top.
    """
    if isinstance(settings_part, Mapping):
        return {name: _control_renamed(value, name) for name, value in settings_part.items()}
    if isinstance(settings_part, list):
        return [_control_renamed(value, key) for value in settings_part]
    # only values below these keys are names of controls; other texts stay as they are
    if isinstance(settings_part, str) and key == "groups":
        return _GROUPS.get(settings_part, settings_part)
    if isinstance(settings_part, str) and key in ("arms", "use"):
        # Here `use` is the setting of online tuning, in which only "shuffled" was renamed: version 0.1 wrote
        # "inverted" already. The control is the value itself, or the end of an arm's name ("dpo-shuffled").
        return re.sub(r"\bshuffled$", "randomised", settings_part)
    return settings_part


def former_settings(present_settings: Any, key: str = "") -> Any:
    """Return settings with the names of version 0.1, which hashed inputs and saved weights use.

    Args:
        present_settings: settings, in JSON types.
        key: key whose value `present_settings` is; "" at the top.
    """
    if isinstance(present_settings, Mapping):
        old_names = {present: old for old, present in _SETTINGS.items()}
        return {
            old_names.get(name, name): former_settings(value, name)
            for name, value in present_settings.items()
        }
    if isinstance(present_settings, (list, tuple)):
        return [former_settings(value, key) for value in present_settings]
    return "shuffled" if key == "use" and present_settings == "randomised" else present_settings


def former_task(task: str) -> str:
    """Return the old name of a task "<arm>-<seed>", which its folder and its hashed inputs use."""
    return re.sub(r"\brandomised\b", "shuffled", task)


def former_use(label_kind: str) -> str:
    """Return the old name of a kind of labels that a flow stage is trained on, which hashed inputs use.

    Args:
        label_kind: present name of the kind, such as "randomised" or "inverted".
    """
    old_names = {present: old for old, present in _GROUPS.items()}
    return old_names.get(label_kind, label_kind)


_LOOP_PAIRS = {
    "op_rewarded": "tuned_rewarded",
    "op_rewarded_where_changed": "tuned_rewarded_where_changed",
}


def loop_pairs(pairs_record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys in the record of an artefact that contains the pairs of the circular loop."""
    return {_LOOP_PAIRS.get(key, key): value for key, value in pairs_record.items()}


_FLOW_STATS = {"away": "drift", "left": "drift"}


def flow_stats(stats_line: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a line of stats.jsonl of a flow training."""
    return {
        _FLOW_STATS.get(key, re.sub("^watched/", "heldout/", key)): value for key, value in stats_line.items()
    }


def flow_warnings(warning_by_name: Mapping[str, str]) -> dict[str, str]:
    """Rename the warnings in a checkpoint of a flow training.

    Args:
        warning_by_name: text of each warning, by its name.
    """
    return {"divergence" if name == "runaway" else name: text for name, text in warning_by_name.items()}


def flow_progress(progress_record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the progress that a checkpoint of a flow training contains."""
    return {**progress_record, "sums": flow_stats(progress_record["sums"])}


# Cached findings of reports: old -> present name.

_CURVES = {"programmatic judge": "oracle"}
_RANDOMISATIONS = {"by_draw": "by_randomisation", "draws": "randomisations"}


def finding(key: str, finding_json: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a cached finding of a report.

    Args:
        key: key of the finding's job, see pages.Job.
        finding_json: content of the JSON file of the finding.
    """
    finding_json = {"images" if name == "pictures" else name: value for name, value in finding_json.items()}
    finding_data = dict(finding_json["data"])
    finding_rows = list(finding_json["rows"])
    if key in ("scores", "best-of-n"):
        finding_data = {
            "evaluator" if name == "judge" else name: value for name, value in finding_data.items()
        }
        finding_rows = _renamed(finding_rows, {"judge": "evaluator"})
    elif key == "over-optimisation":
        finding_data = _renamed(finding_data, {**_CURVES, "deviation": "standard_deviation"})
        finding_rows = [
            {**row, "measure": _CURVES.get(row["measure"], row["measure"])} for row in finding_rows
        ]
    elif key == "front" or key.startswith("cell-"):
        finding_data = _renamed(finding_data, {"judge": "oracle"})
        finding_rows = _renamed(finding_rows, {"judge": "oracle"})
    elif key == "redrawn-reward":
        finding_data = {_RANDOMISATIONS.get(name, name): value for name, value in finding_data.items()}
        finding_rows = _renamed(finding_rows, {"draw": "randomisation"})
    elif key == "comparison" or key.startswith("network-"):
        finding_data = _renamed(finding_data, {"deviation": "standard_deviation", "own": "reference"})
        finding_rows = _renamed(finding_rows, {"deviation": "standard_deviation"})
    return {**finding_json, "data": finding_data, "rows": finding_rows}


def former_trial(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hashed inputs of a best-of-n report with the old key of the evaluator."""
    old_inputs: dict[str, Any] = _renamed(inputs, {"evaluator": "judge"})
    return old_inputs


def inversion(target_metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the metrics that were measured for one target of an inversion."""
    return {"evaluator" if key == "judge" else key: value for key, value in target_metrics.items()}


def latent_reward(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the metadata in the file of a reward of latents."""
    present_meta: dict[str, Any] = _renamed(meta, {"taught": "record", "told": "evaluation"})
    return present_meta


def mesh_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the control in the table of the arms of RewardCS, the reward model of --mode=mesh-reward."""
    present_rows = {re.sub("^shuffled/", "randomised/", name): row for name, row in table["rows"].items()}
    return {**table, "rows": present_rows}
