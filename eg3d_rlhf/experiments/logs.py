"""What a run measures, shown elsewhere besides stats.jsonl: TensorBoard's files in its folder, Weights &
Biases, Trackio.

    log = Log("tensorboard,wandb", folder, settings)
    log.line({"step": 10, "loss": 0.6, "time_bins": {"margin": [0.1, None]}})    loss, time_bins/margin/0
    log.picture("samples", path, 10)

stats.jsonl is what counts: where a run goes on, TensorBoard's files are made of it anew.
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
NAMES = (TENSORBOARD, "wandb", "trackio")  # of packages, of extras, and as --log names them
PROJECT = "eg3d-rlhf"


def named(text: str) -> list[str]:
    """The packages that --log names. Raises: ValueError for others, and for one that is not installed."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"--log: expected {', '.join(NAMES)} with commas between them, got {name!r}. Correct it."
            )
        if importlib.util.find_spec(name) is None:
            install = f"Run pip install 'eg3d-rlhf[{name}]'"
            raise ValueError(
                f"--log={name}: expected the package {name}, of the extra [{name}], got none. {install}."
            )
    return names


def numbers(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """A line's numbers by name; of nested ones and lists the names of their places.

    >>> dict(numbers({"loss": 0.5, "bins": {"n": [3, None]}}))
    {'loss': 0.5, 'bins/n/0': 3.0}
    """
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{name}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from numbers({str(place): item for place, item in enumerate(value)}, f"{before}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{before}{name}", float(value)


class Log:
    """Where the lines of a run in `folder` go besides; nothing is opened before there is one.

    Args: names: see `named`, which it raises.
    """

    def __init__(self, names: str, folder: Path, settings: Mapping[str, Any]):
        self.writers = [
            Board(folder) if name == TENSORBOARD else Tracker(name, folder, settings) for name in named(names)
        ]

    def line(self, record: Mapping[str, Any]) -> None:
        """A line of stats.jsonl, which has a step."""
        values = {name: value for name, value in numbers(record) if name != "step"}
        for writer in self.writers:
            writer.line(values, record["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        for writer in self.writers:
            writer.picture(name, path, step)

    def go_on(self, lines: Iterable[str]) -> None:
        """Go on behind these lines of stats.jsonl."""
        for board in (writer for writer in self.writers if isinstance(writer, Board)):
            for line in lines:
                record = json.loads(line)
                board.line({name: value for name, value in numbers(record) if name != "step"}, record["step"])

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class Board:
    """TensorBoard's files, in folder/tensorboard."""

    def __init__(self, folder: Path):
        self.folder = folder / TENSORBOARD

    @functools.cached_property
    def file(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # two seconds

        shutil.rmtree(self.folder, ignore_errors=True)
        return SummaryWriter(str(self.folder))

    def line(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.file.add_scalar(name, value, step)
        self.file.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.file.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if "file" in vars(self):
            self.file.close()


class Tracker:
    """A run of Weights & Biases or of Trackio, which are called alike; the same folder is the same run."""

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any]):
        self.name = package
        self.folder = folder.resolve()
        self.settings = settings

    @functools.cached_property
    def package(self) -> Any:
        package = importlib.import_module(self.name)
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        more = {"dir": str(self.folder), "id": digest} if self.name == "wandb" else {}
        run = f"{'-'.join(self.folder.parts[-4:])}-{digest}"
        package.init(project=PROJECT, name=run, config=dict(self.settings), resume="allow", **more)
        return package

    def line(self, values: Mapping[str, float], step: int) -> None:
        self.package.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self.package.log({name: self.package.Image(str(path))}, step=step)

    def close(self) -> None:
        if "package" in vars(self):
            self.package.finish()
