"""Checks of the paths of input files, without an import of torch.

Commands call them before they import the modules that read the files, which takes seconds. The readers call
them, too, so that a wrong path has one message.
"""

from pathlib import Path

SYNTHETIC_PREFIX = "synthetic:"  # start of the name of a dataset that is rendered when it is first used


def existing_file(path: str | Path, kind: str) -> Path:
    """Return the path of a file as a Path object.

    Args:
        path: path of the file.
        kind: kind of the file, for the message, such as "network file".
    Raises: FileNotFoundError if there is no file with this path.
    """
    path = Path(path)
    # A folder is rejected as well, because the readers open a single file.
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Pass the path of a {kind}.")
    return path


def existing_path(path: str | Path, who: str) -> Path:
    """Return the path of a file or folder of weights as a Path object.

    Args:
        path: path of the file or folder.
        who: text that the error message begins with.
    Raises: FileNotFoundError if there is no file or folder with this path.
    """
    path = Path(path)
    # Weights may be a folder of shards, so any existing path is accepted.
    if not path.exists():
        raise FileNotFoundError(
            f"{who}: the file or folder {path} does not exist. Check the path; nothing is downloaded."
        )
    return path


def check_dataset(name: str | Path, flag: str = "--data") -> None:
    """Check that the folder or the archive of a dataset exists.

    Args:
        name: path of the dataset, or the name synthetic:... of a synthetic set, which is not checked.
        flag: flag of the command line that names the path, for the message.
    Raises: ValueError if there is neither a folder nor a file with this path.
    """
    # Synthetic sets are rendered when they are first used, so no path exists yet.
    if str(name).startswith(SYNTHETIC_PREFIX):
        return
    path = Path(name)
    if not (path.is_dir() or path.is_file()):
        raise ValueError(
            f"dataset {path}: the path does not exist. Pass the path of a folder or a .zip file with {flag}."
        )


def check_checkpoint(run_or_file: Path) -> None:
    """Check that a run folder, or a checkpoint file, exists.

    Raises: FileNotFoundError that names --resume.
    """
    if not run_or_file.exists():
        raise FileNotFoundError(
            f"--resume: the path {run_or_file} does not exist. Name a run folder or a checkpoint file."
        )


def check_label_lines(path: str | Path) -> None:
    """Raise FileNotFoundError if there is no file of JSON lines with labels at a path."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: this file does not exist. Pass the path of a .jsonl file.")
