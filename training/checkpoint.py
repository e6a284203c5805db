"""Checkpoints, which contain everything that a run needs to continue exactly, in one file.

A checkpoint is written atomically. The last two checkpoints of a run are kept, so that after damage to the
newest file, only the training since the one before is lost.
"""

import re
from pathlib import Path

import torch

from training import storage
from training.input_paths import check_checkpoint

KEEP = 2  # number of checkpoints that are kept in a run folder
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return Adam's moments and step counts under the names '<prefix>.<index>.<name>'.

    Args:
        prefix: name of the optimiser in the checkpoint, such as 'optim_G'.
        optimizer: Adam optimiser.
    Returns: tensors by name. The index in a name is the position of the parameter in the optimiser, as in
        torch's state_dict.
    """
    tensors = {}
    for parameter_index, parameter_state in optimizer.state_dict()["state"].items():
        for moment_name, moment in parameter_state.items():
            tensors[f"{prefix}.{parameter_index}.{moment_name}"] = torch.as_tensor(moment)
    return tensors


def restore_optimizer(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Restore the moments and step counts that `optimizer_tensors` returned.

    The learning rates and other settings of the optimiser are not changed, because they come from the flags.

    Args:
        prefix: name of the optimiser in the checkpoint, with which the names of its tensors begin.
        optimizer: optimiser to restore.
        tensors: all tensors of a checkpoint.
    Raises: ValueError if the checkpoint contains moments of more parameters than the optimiser has.
    """
    state_by_parameter: dict[int, dict] = {}
    for tensor_name, moment in tensors.items():
        # With the dot, the prefix "optim_G" does not match the names of "optim_Greward".
        if tensor_name.startswith(f"{prefix}."):
            parameter_index, moment_name = tensor_name.removeprefix(f"{prefix}.").split(".")
            state_by_parameter.setdefault(int(parameter_index), {})[moment_name] = moment
    parameter_groups = optimizer.state_dict()["param_groups"]  # learning rates and parameters of this run
    parameter_count = sum(len(parameter_group["params"]) for parameter_group in parameter_groups)
    # Fewer moments are no error, because Adam has none for parameters that never had a gradient.
    if any(parameter_index >= parameter_count for parameter_index in state_by_parameter):
        raise ValueError(
            f"checkpoint: the optimiser {prefix} has {parameter_count} parameters, but the checkpoint has"
            f" moments of the parameter with index {max(state_by_parameter)}. Resume with the flags of the"
            " original run."
        )
    optimizer.load_state_dict({"state": state_by_parameter, "param_groups": parameter_groups})


def write(folder: Path, cur_nimg: int, tensors: dict[str, torch.Tensor], meta: dict) -> Path:
    """Write checkpoint-<number of images>.safetensors, and delete all checkpoints except the newest two.

    Args:
        folder: run folder.
        cur_nimg: number of images that the run has used.
        tensors: tensors by name.
        meta: description of the checkpoint, JSON values.
    Returns: the path of the file.
    """
    checkpoint_path = path_of(folder, cur_nimg)
    storage.write_tensors(checkpoint_path, "checkpoint", tensors, meta)
    # Older checkpoints are deleted only when the new file is complete, because the disk may be full.
    for old_path in available(folder)[:-KEEP]:
        old_path.unlink()
    return checkpoint_path


def path_of(folder: Path, cur_nimg: int) -> Path:
    """Return the path of the checkpoint that a run writes after `cur_nimg` images."""
    return folder / f"checkpoint-{cur_nimg:09d}.safetensors"


def available(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints of a run folder, oldest first."""
    # The pattern excludes temporary and renamed files. With nine digits, the order of names is that
    # of numbers.
    return sorted(path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name))


def read(run_or_file: Path, fall_back: bool = False) -> tuple[dict[str, torch.Tensor], dict, Path]:
    """Read the newest checkpoint of a run folder, or a checkpoint file.

    Args:
        run_or_file: path of a run folder, or of a checkpoint file.
        fall_back: True: if the file is damaged, read an older checkpoint of the same folder.
    Returns: the tensors, the description and the path of the checkpoint.
    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, and `fall_back` is False or there is no intact older one.
    """
    if run_or_file.is_dir():
        candidate_paths = available(run_or_file)[::-1]
        if not candidate_paths and (run_or_file / "training_options.json").is_file():
            raise FileNotFoundError(
                f"--resume: the run in {run_or_file} was stopped before its first checkpoint, so there is"
                " nothing to resume. Start it again with the command that started it, without --resume."
            )
        if not candidate_paths:
            raise FileNotFoundError(
                f"--resume: the folder {run_or_file} contains no checkpoint-*.safetensors. Name the folder of"
                " a run that has written a checkpoint."
            )
    else:
        check_checkpoint(run_or_file)
        # Older checkpoints of the same folder may replace the named one, newer checkpoints may not.
        older_paths = [
            candidate_path
            for candidate_path in available(run_or_file.parent)[::-1]
            if candidate_path.name < run_or_file.name
        ]
        candidate_paths = [run_or_file, *older_paths]
    # Pairs of a checkpoint and the next older one, None for the oldest.
    for candidate_path, older_path in zip(candidate_paths, [*candidate_paths[1:], None], strict=True):
        try:
            return *storage.read_tensors(candidate_path, "checkpoint"), candidate_path
        except ValueError as error:
            if not fall_back or older_path is None:
                hint_text = ""
                if older_path is not None and not fall_back:
                    hint_text = f" Add --resume-previous to continue from {older_path.name}."
                raise ValueError(f"--resume: {error}{hint_text}") from None
    raise AssertionError("unreachable")
