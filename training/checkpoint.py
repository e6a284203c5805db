"""Resumable state: everything that a run needs to continue exactly, in one atomic file, the last two kept."""

import re
from pathlib import Path

import torch

from training import storage

KEEP = 2
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's moments and step counts under '<prefix>.<index>.<name>'."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Inverse of `optimizer_tensors`; hyper-parameters stay those of `optimizer`."""
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name.removeprefix(f"{prefix}.").split(".")
            state.setdefault(int(index), {})[key] = value
    full = optimizer.state_dict()
    count = sum(len(group["params"]) for group in full["param_groups"])
    if any(i >= count for i in state):
        raise ValueError(
            f"checkpoint: expected moments of {count} parameters ({prefix}), got {max(state)}. Resume with"
            " the run's flags."
        )
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def write(folder: Path, cur_nimg: int, tensors: dict[str, torch.Tensor], meta: dict) -> Path:
    """Write checkpoint-<nimg>.safetensors and delete all but the newest two."""
    path = path_of(folder, cur_nimg)
    storage.write_tensors(path, "checkpoint", tensors, meta)
    for old in available(folder)[:-KEEP]:
        old.unlink()
    return path


def path_of(folder: Path, cur_nimg: int) -> Path:
    """Name of the checkpoint after `cur_nimg` images."""
    return folder / f"checkpoint-{cur_nimg:09d}.safetensors"


def available(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name))


def read(source: Path, fall_back: bool = False) -> tuple[dict[str, torch.Tensor], dict, Path]:
    """Newest checkpoint of a run folder, or the named file.

    Args:
        source: run folder or checkpoint file; fall_back: use the previous checkpoint of the folder where the
            newest is damaged.
    Returns: tensors, description, path.
    Raises: FileNotFoundError, ValueError naming the damaged file and the flag that accepts the previous one.
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
                f"--resume: expected a run folder or checkpoint file, got nothing at {source}. Check the"
                " path."
            )
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
