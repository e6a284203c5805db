"""Record training_options.json of a run folder. This module does not import torch."""

import json
from pathlib import Path
from typing import Any

from eg3d_rlhf.experiments import version_0_1

OPTIONS = "training_options.json"


def recorded_by(folder: Path, mode: str) -> dict[str, Any]:
    """Read training_options.json from a run folder, and check that the run belongs to a mode.

    Args:
        folder: run folder.
        mode: name of the mode that the run must have.

    Raises:
        FileNotFoundError: the folder has no training_options.json.
        ValueError: the run belongs to another mode, or the file is damaged.
    """
    recorded_options = recorded(folder)
    if not recorded_options:
        raise FileNotFoundError(
            f"--resume: {folder} is not a run folder, because it has no {OPTIONS}. Pass the path of a run"
            " folder."
        )
    # the record of --mode=gan has no key "mode"
    recorded_mode = recorded_options.get("mode", "gan")
    if recorded_mode != mode:
        raise ValueError(
            f"--resume: the run in {folder} belongs to --mode={recorded_mode}, not to --mode={mode}. Pass"
            f" --mode={recorded_mode}."
        )
    return recorded_options


def recorded(folder: Path) -> dict[str, Any]:
    """Read training_options.json of a run folder, and rename settings that version 0.1 wrote.

    Returns an empty dictionary if the folder has no such file.

    Raises:
        ValueError: the file is not JSON.
    """
    options_path = folder / OPTIONS
    if not options_path.is_file():
        return {}
    try:
        json_values = json.loads(options_path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{options_path} is not a JSON file: {error}. Restore the file from a copy, or start a new run."
        ) from error
    return version_0_1.options(json_values) if isinstance(json_values, dict) else {}
