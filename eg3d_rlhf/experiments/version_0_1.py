"""Conversion of what version 0.1 (commit 52ebe99) wrote, where the present code writes it differently.

No other module contains code for an earlier version. Run folders, rewards, label stores and their exports,
studies, folders WORK, artefact stores and networks of version 0.1 have the present form except for what the
functions below convert; `tests/compat/test_version_0_1.py` opens one of each. A change of a form that is
written to disk adds its conversion here. Folders of versions before 0.1 are not supported.

Flags and settings that were renamed since are listed in `eg3d_rlhf.core.renamed`. Two rules follow from them:

    reading     `settings` gives the settings that version 0.1 recorded their present names
    hashing     `stored`, `words` and `file_names` give the inputs of an artefact the names that version 0.1
                hashed, so that whatever it made is found by its hash and is not made again
"""

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
