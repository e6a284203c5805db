"""Checkpoints: everything that a run needs to continue exactly, in one file that is written atomically.

The last two of a run are kept, so that a damaged file costs at most one interval.
"""

import re
from pathlib import Path

import torch

from training import storage

KEEP = 2  # checkpoints per run folder
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return Adam's moments and step counts under the names '<prefix>.<index>.<name>'."""
    # The index is the parameter's place in the optimiser, as in torch's own state_dict.
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned.

    Learning rates and other settings stay those of `optimizer`: they come from the flags, not from the file.

    Raises: ValueError if the file holds moments of more parameters than the optimiser has.
    """
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        # The dot in the prefix keeps "optim_G." apart from "optim_Greward.".
        if name.startswith(f"{prefix}."):
            index, key = name.removeprefix(f"{prefix}.").split(".")
            state.setdefault(int(index), {})[key] = value
    full = optimizer.state_dict()  # learning rates and groups of this run
    count = sum(len(group["params"]) for group in full["param_groups"])
    # Fewer moments are legitimate: Adam has none for parameters that never had a gradient.
    if any(i >= count for i in state):
        raise ValueError(
            f"checkpoint: expected moments of {count} parameters ({prefix}), got {max(state)}. Resume with"
            " the flags of the original run."
        )
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def write(folder: Path, cur_nimg: int, tensors: dict[str, torch.Tensor], meta: dict) -> Path:
    """Write checkpoint-<nimg>.safetensors and delete all but the newest two."""
    path = path_of(folder, cur_nimg)
    storage.write_tensors(path, "checkpoint", tensors, meta)
    # Only after the new file is complete: a full disk must not cost the old ones.
    for old in available(folder)[:-KEEP]:
        old.unlink()
    return path


def path_of(folder: Path, cur_nimg: int) -> Path:
    """Return the path of the checkpoint after `cur_nimg` images."""
    return folder / f"checkpoint-{cur_nimg:09d}.safetensors"


def available(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    # The pattern excludes temporary and renamed files. Nine digits make the order of names that of images.
    return sorted(p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name))


def read(source: Path, fall_back: bool = False) -> tuple[dict[str, torch.Tensor], dict, Path]:
    """Read the newest checkpoint of a run folder, or the named file.

    Args:
        source: run folder or checkpoint file.
        fall_back: if the newest is damaged, use the previous checkpoint of the folder.
    Returns: tensors, description, path.
    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is damaged. The message names it and the flag that accepts the previous one.
    """
    if source.is_dir():
        candidates = available(source)[::-1]
        if not candidates:
            raise FileNotFoundError(
                f"--resume: expected a run folder with checkpoint-*.safetensors, got {source}. Check the"
                " path."
            )
    else:
        if not source.exists():
            raise FileNotFoundError(
                f"--resume: expected a run folder or checkpoint file, but there is nothing at {source}."
                " Check the path."
            )
        # Older files of the same folder may stand in for the named one, newer ones may not.
        candidates = [source, *[p for p in available(source.parent)[::-1] if p.name < source.name]]
    for path, older in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            return *storage.read_tensors(path, "checkpoint"), path
        except ValueError as error:
            if not fall_back or older is None:
                hint = (
                    f" Add --resume-previous to continue from {older.name}."
                    if older and not fall_back
                    else ""
                )
                raise ValueError(f"--resume: {error}{hint}") from None
    raise AssertionError("unreachable")
