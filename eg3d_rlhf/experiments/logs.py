"""Logging of a run's measurements to TensorBoard, Weights & Biases and Trackio, in addition to stats.jsonl.

    log = Log("tensorboard,wandb", folder, settings)
    # adds a point at step 10 to the curves "loss" and "time_bins/margin/0"
    log.line({"step": 10, "loss": 0.6, "time_bins": {"margin": [0.1, None]}})
    log.image("samples", path, 10)

The file stats.jsonl is the authoritative record. When a run resumes, TensorBoard's files are rebuilt from it.
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
# values of --log, which are also the names of the Python packages and of this package's extras
NAMES = (TENSORBOARD, "wandb", "trackio")
PROJECT = "eg3d-rlhf"  # name of the project under which the trackers list a run


def named(log_value: str) -> list[str]:
    """Parse the value of --log into names of packages: "tensorboard, wandb" -> ["tensorboard", "wandb"].

    Raises:
        ValueError: a package is not in NAMES, or is not installed.
    """
    # "" and a comma at the end give no names
    tracker_names = [tracker_name.strip() for tracker_name in log_value.split(",") if tracker_name.strip()]
    for tracker_name in tracker_names:
        if tracker_name not in NAMES:
            raise ValueError(
                f"--log: {tracker_name!r} is not a known tracker. Pass one or more of {', '.join(NAMES)},"
                " separated by commas."
            )
        # The package is only looked up here. It is imported when the first line is logged.
        if importlib.util.find_spec(tracker_name) is None:
            raise ValueError(
                f"--log={tracker_name}: the package {tracker_name} is not installed. Install it with"
                f" pip install 'eg3d-rlhf[{tracker_name}]'."
            )
    return tracker_names


def numbers(stats_record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, number) for every number of a line of stats.jsonl.

    A number inside a mapping or a list is named by its path. Texts and None are left out.

    Args:
        stats_record: content of the line, in JSON types.
        prefix: path of `stats_record`, with "/" at the end; "" at the top.

    >>> dict(numbers({"loss": 0.5, "bins": {"n": [3, None]}}))
    {'loss': 0.5, 'bins/n/0': 3.0}
    """
    for name, value in stats_record.items():
        if isinstance(value, Mapping):
            # "a/b": TensorBoard groups curves by the part of their name before the slash
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from numbers(
                {str(index): entry_value for index, entry_value in enumerate(value)}, f"{prefix}{name}/"
            )
        # the trackers plot numbers only; True and False count as 1 and 0
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


class Log:
    """Trackers that receive the measurements and images of one run.

    No file and no connection is opened before the first line or image is logged.

    Args:
        log_value: value of --log, see `named`; "" for no tracker.
        folder: run folder.
        settings: settings of the run, which the trackers show beside its curves.

    Raises:
        ValueError: `log_value` contains an unknown package, or a package that is not installed.
    """

    def __init__(self, log_value: str, folder: Path, settings: Mapping[str, Any]):
        self.writers = [
            Board(folder) if name == TENSORBOARD else Tracker(name, folder, settings)
            for name in named(log_value)
        ]

    def line(self, stats_record: Mapping[str, Any]) -> None:
        """Send the numbers of one line of stats.jsonl to all trackers.

        Args:
            stats_record: content of the line; its key "step" is the position on the axis of the plots.
        """
        # the step is the axis of the plots, not a curve
        numbers_by_name = {name: value for name, value in numbers(stats_record) if name != "step"}
        for writer in self.writers:
            writer.line(numbers_by_name, stats_record["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file under a name, at a step of the run."""
        for writer in self.writers:
            writer.image(name, path, step)

    def resume(self, stats_lines: Iterable[str]) -> None:
        """Rebuild TensorBoard's files when a run is resumed.

        Args:
            stats_lines: lines of stats.jsonl that the run had written before the checkpoint from which it
                resumes.
        """
        # Weights & Biases and Trackio continue the run on their servers, where they find it by its id.
        for board in (writer for writer in self.writers if isinstance(writer, Board)):
            for stats_line in stats_lines:
                stats_record = json.loads(stats_line)
                board.line(
                    {name: value for name, value in numbers(stats_record) if name != "step"},
                    stats_record["step"],
                )

    def close(self) -> None:
        """Close all writers."""
        for writer in self.writers:
            writer.close()


class Board:
    """Writer of TensorBoard's files in the folder `tensorboard` of a run folder."""

    def __init__(self, folder: Path):
        self.folder = folder / TENSORBOARD

    @functools.cached_property
    def file(self) -> Any:
        """Return the writer of TensorBoard's files. The first access deletes earlier files of this folder."""
        from torch.utils.tensorboard import SummaryWriter  # the import takes two seconds

        # earlier files may hold steps after the checkpoint from which the run resumes
        shutil.rmtree(self.folder, ignore_errors=True)
        return SummaryWriter(str(self.folder))

    def line(self, number_by_name: Mapping[str, float], step: int) -> None:
        """Log numbers by name, at a step of the run."""
        for name, value in number_by_name.items():
            self.file.add_scalar(name, value, step)
        self.file.flush()  # so that TensorBoard shows the line while the run continues

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file under a name, at a step of the run."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.file.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files, if any were opened."""
        # cached_property stores its value in vars(self), so this test does not open the files
        if "file" in vars(self):
            self.file.close()


class Tracker:
    """Writer of measurements to Weights & Biases or to Trackio, whose Python interfaces are alike.

    The run at the tracker is identified by the path of the run folder, so a resumed run continues its curves.

    Args:
        package: "wandb" or "trackio".
        folder: run folder.
        settings: settings of the run, which the tracker shows.
    """

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any]):
        self.name = package
        # the absolute path, because it identifies the run at the tracker
        self.folder = folder.resolve()
        self.settings = settings

    @functools.cached_property
    def package(self) -> Any:
        """Return the imported package. The first access also starts or resumes the run at the tracker."""
        tracker_package = importlib.import_module(self.name)
        folder_hash = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        # wandb finds a run that it shall continue by `id`; trackio has no such argument, and uses `name`
        wandb_arguments = {"dir": str(self.folder), "id": folder_hash} if self.name == "wandb" else {}
        # The last four parts of the path are for readers. The hash keeps the runs of two folders apart.
        run_name = f"{'-'.join(self.folder.parts[-4:])}-{folder_hash}"
        tracker_package.init(
            project=PROJECT, name=run_name, config=dict(self.settings), resume="allow", **wandb_arguments
        )
        return tracker_package

    def line(self, number_by_name: Mapping[str, float], step: int) -> None:
        """Log numbers by name, at a step of the run."""
        self.package.log(dict(number_by_name), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file under a name, at a step of the run."""
        self.package.log({name: self.package.Image(str(path))}, step=step)

    def close(self) -> None:
        """End the run at the tracker if it was started."""
        # cached_property stores its value in vars(self), so this test does not start the run
        if "package" in vars(self):
            self.package.finish()
