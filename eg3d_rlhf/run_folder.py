"""Run folders: numbered inside the output folder, claimed once, found again after a restart."""

import json
import re
from pathlib import Path

OPTIONS = "training_options.json"
_NUMBERED = re.compile(r"(\d{5})-(.*)")


def next_free(outdir: Path, name: str) -> Path:
    """outdir/NNNNN-name with the next free number."""
    taken = [int(m.group(1)) for p in outdir.glob("*") if (m := _NUMBERED.match(p.name))]
    return outdir / f"{max(taken, default=-1) + 1:05d}-{name}"


def claim(folder: Path, launch: str | None) -> Path:
    """Make a run folder; where another run has taken its number meanwhile, the next one. That of an earlier attempt of `launch` stays.

    Raises: OSError naming the folder that cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            found = _NUMBERED.fullmatch(folder.name)
            if found is None or launch is not None and _options(folder).get("launch") == launch:
                return folder
            folder = next_free(folder.parent, found.group(2))
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"--outdir: expected to make {folder}, got: {reason}. Choose a folder that can be written.") from error


def clear(folder: Path) -> None:
    """Delete the records of an attempt that ended before its first checkpoint."""
    for name in ("stats.jsonl", "timing.jsonl"):
        (folder / name).unlink(missing_ok=True)


def of_launch(outdir: Path, launch: str | None) -> Path | None:
    """The newest run that this launch (see training.distributed.launch_identity) has begun in `outdir`."""
    for folder in sorted(outdir.glob("*"), reverse=True):
        if launch is not None and _NUMBERED.fullmatch(folder.name) and _options(folder).get("launch") == launch:
            return folder
    return None


def _options(folder: Path) -> dict:
    try:
        return json.loads((folder / OPTIONS).read_text())
    except (OSError, ValueError):
        return {}
