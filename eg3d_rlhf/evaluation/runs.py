"""Training runs as the reports see them: their recorded settings, their snapshots over training, the newest of a kind."""

import json
import re
from pathlib import Path

from eg3d_rlhf.run.run import OPTIONS
from training.storage import read_meta

_KIMG = re.compile(r"network-snapshot-(\d{6})")
# Settings that do not change what is trained.
_IDLE = {
    "lambda_r", "control", "desc", "device", "launch", "no_summary", "processes", "snap", "tick", "checkpoint_ticks", "versions",
    "reward_ckpt", "reward_watch", "hashes", "task",
}


def settings(run: Path | None) -> dict:
    """The settings that train.py recorded in a run folder; {} where there are none.

    Raises: ValueError for a damaged record.
    """
    path = None if run is None else run / OPTIONS
    if path is None or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}. Restore the file, or name the network file itself.") from error
    return values if isinstance(values, dict) else {}


def kimg_of(path: Path) -> float:
    """Thousands of images after which a snapshot was written: from the file's description, or from the name of a pickle.

    Raises: ValueError for a damaged file, or a pickle with another name.
    """
    if path.suffix != ".pkl":
        return read_meta(path, "network")["cur_nimg"] / 1000
    found = _KIMG.match(path.name)
    if found is None:
        raise ValueError(f"{path}: expected network-snapshot-<kimg>.pkl, got another name. Rename it.")
    return float(found.group(1))


def snapshots(run: Path | None) -> list[tuple[float, Path]]:
    """(kimg, file) of a run's network snapshots in order of training; [] for no run."""
    if run is None or not run.is_dir():
        return []
    files = sorted(run.glob("network-snapshot-*.safetensors")) or sorted(run.glob("network-snapshot-*.pkl"))
    return sorted((kimg_of(path), path) for path in files)


def differences(first: Path | None, second: Path | None) -> list[str]:
    """Names of the settings, other than the reward's weight, in which two recorded runs differ; 'hashes.<name>' for their inputs."""
    one, two = settings(first), settings(second)
    if not one or not two:
        return []
    names = sorted((set(one) | set(two)) - _IDLE)
    found = [name for name in names if one.get(name) != two.get(name)]
    hashes = one.get("hashes", {}), two.get("hashes", {})
    return found + [f"hashes.{name}" for name in sorted(set(hashes[0]) | set(hashes[1])) if hashes[0].get(name) != hashes[1].get(name)]


def _runs(folder: Path) -> list[Path]:
    """Run folders with a snapshot and a recorded reward, newest first."""
    if not folder.is_dir():
        return []
    found = [run for run in folder.iterdir() if settings(run).get("reward", "none") != "none" and any(run.glob("network-snapshot-*"))]
    return sorted(found, key=lambda run: (run / OPTIONS).stat().st_mtime, reverse=True)


def newest_tuned(folder: Path, init_hash: str) -> Path | None:
    """The newest run with a snapshot in `folder` with lambda_r > 0 that began from the file with this SHA-256."""
    for run in _runs(folder):
        if settings(run)["lambda_r"] > 0 and settings(run).get("hashes", {}).get("init") == init_hash:
            return run
    return None


def newest_control(folder: Path, tuned: Path | None) -> Path | None:
    """The newest run in `folder` with lambda_r = 0 that otherwise has the settings of `tuned`."""
    for run in _runs(folder):
        if tuned is not None and settings(run)["lambda_r"] == 0 and not differences(tuned, run):
            return run
    return None
