"""Logging of a run's measurements to TensorBoard, Weights & Biases and Trackio, in addition to stats.jsonl.

    log = Log("tensorboard,wandb", folder, settings)
    log.line({"step": 10, "loss": 0.6, "time_bins": {"margin": [0.1, None]}})    loss, time_bins/margin/0
    log.image("samples", path, 10)

stats.jsonl is the authoritative record: when a run resumes, TensorBoard's files are rebuilt from it.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"
NAMES = (TENSORBOARD, "wandb", "trackio")  # names of the packages, of the extras, and values of --log
PROJECT = "eg3d-rlhf"


def named(text: str) -> list[str]:
    """Parse the value of --log into names of packages.

    Raises: ValueError for an unknown package, or for one that is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"--log: expected {', '.join(NAMES)}, separated by commas, got {name!r}. Correct it."
            )
        # looked up, not imported: packages are imported at the first line
        if importlib.util.find_spec(name) is None:
            install = f"Install it: pip install 'eg3d-rlhf[{name}]'"
            raise ValueError(f"--log={name}: expected the package {name}, got no installation. {install}")
    return names


def numbers(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line by name; nested ones and items of lists are named by their path.

    >>> dict(numbers({"loss": 0.5, "bins": {"n": [3, None]}}))
    {'loss': 0.5, 'bins/n/0': 3.0}
    """
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{name}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from numbers({str(place): item for place, item in enumerate(value)}, f"{before}{name}/")
        # texts and None are left out: the trackers plot numbers only
        elif isinstance(value, (int, float)):
            yield f"{before}{name}", float(value)


class Log:
    """Writers of a run's lines and images. No file or connection is opened before the first line.

    Args: names: value of --log, see `named`; folder: of the run; settings: shown with the run.
    Raises: ValueError as `named` does.
    """

    def __init__(self, names: str, folder: Path, settings: Mapping[str, Any]):
        self.writers = [
            Board(folder) if name == TENSORBOARD else Tracker(name, folder, settings) for name in named(names)
        ]

    def line(self, record: Mapping[str, Any]) -> None:
        """Log a line of stats.jsonl, which must have a step."""
        # the step is the axis of the plots, not a curve
        values = {name: value for name, value in numbers(record) if name != "step"}
        for writer in self.writers:
            writer.line(values, record["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        for writer in self.writers:
            writer.image(name, path, step)

    def resume(self, lines: Iterable[str]) -> None:
        """Rebuild TensorBoard's files from these lines of stats.jsonl, after which the run continues."""
        # the trackers resume on their own servers, by the id of the run
        for board in (writer for writer in self.writers if isinstance(writer, Board)):
            for line in lines:
                record = json.loads(line)
                board.line({name: value for name, value in numbers(record) if name != "step"}, record["step"])

    def close(self) -> None:
        """Close all writers."""
        for writer in self.writers:
            writer.close()


class Board:
    """Writer of TensorBoard's files, in folder/tensorboard."""

    def __init__(self, folder: Path):
        self.folder = folder / TENSORBOARD

    @functools.cached_property
    def file(self) -> Any:
        """Open the files, at the first use."""
        from torch.utils.tensorboard import SummaryWriter  # the import takes two seconds

        # earlier files may hold steps after the state from which the run resumes
        shutil.rmtree(self.folder, ignore_errors=True)
        return SummaryWriter(str(self.folder))

    def line(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        for name, value in values.items():
            self.file.add_scalar(name, value, step)
        self.file.flush()  # so that TensorBoard shows the line while the run continues

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file at a step."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.file.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files, if any were opened."""
        # a cached property is in vars() once it was computed; asking for self.file would open it
        if "file" in vars(self):
            self.file.close()


class Tracker:
    """Writer of a run of Weights & Biases or of Trackio, whose interfaces are alike.

    The same folder is the same run, so a resumed run continues its curves.
    """

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any]):
        self.name = package
        self.folder = folder.resolve()
        self.settings = settings

    @functools.cached_property
    def package(self) -> Any:
        """Import the package and start or resume the run, at the first use."""
        package = importlib.import_module(self.name)
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        more = {"dir": str(self.folder), "id": digest} if self.name == "wandb" else {}
        # the last parts of the path for people, the hash so that two folders never share a run
        run = f"{'-'.join(self.folder.parts[-4:])}-{digest}"
        package.init(project=PROJECT, name=run, config=dict(self.settings), resume="allow", **more)
        return package

    def line(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        self.package.log(dict(values), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file at a step."""
        self.package.log({name: self.package.Image(str(path))}, step=step)

    def close(self) -> None:
        """End the run, if it was started."""
        if "package" in vars(self):
            self.package.finish()
