"""Studies of finished assets: two folders of assets of the same prompts, in place of two generators."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import Collection, read_generator
from eg3d_rlhf.people.label.assets.planning import conditions
from eg3d_rlhf.people.study.design import Contender, StudyDesign


def read_sides(a: Path, b: Path, tell: Callable[[str], None]) -> tuple[dict[str, Contender], list[dict], dict]:
    """Both contenders by side, the pairs of assets that they have in common, and their prompts, as a design keeps them.

    Raises: ValueError, OSError naming the flag at fault.
    """
    found: dict[str, Collection] = {}
    for side, folder in (("a", a), ("b", b)):
        with naming(f"--{side}"):
            found[side] = read_generator(folder)
    by = {side: {(asset.prompt, asset.seed): asset for asset in one.assets} for side, one in found.items()}
    common = sorted(key for key in by["a"] if key in by["b"] and by["a"][key].hash != by["b"][key].hash)
    if not common:
        raise ValueError("--a, --b: expected assets of the same prompts that differ, got none. Name the files of both after their prompts.")
    left = sum(len(one) for one in by.values()) - 2 * len(common)
    if left:
        tell(f"{left} assets are left out: the other folder has none of their prompt and seed, or the same file")
    rows = [
        {"prompt": prompt, "seed": seed, **{
            side: {"file": str(by[side][prompt, seed].path), "hash": by[side][prompt, seed].hash, "kind": by[side][prompt, seed].kind}
            for side in by
        }}
        for prompt, seed in common
    ]  # fmt: skip
    contenders = {
        side: Contender(label=folder.resolve().name, source=str(folder.resolve()), generator=_digest(rows, side))
        for side, folder in (("a", a), ("b", b))
    }
    used = {prompt for prompt, _ in common}
    prompts = {name: kept for one in (found["b"], found["a"]) for name, kept in conditions(one).items() if name in used}
    return contenders, rows, prompts


def check_files(design: StudyDesign) -> None:
    """Raises: ValueError naming the files of a design that are not what they were when it was made."""
    files = [(Path(row[side]["file"]), row[side]["hash"]) for row in design.assets for side in ("a", "b")]
    for (path, expected), found in zip(files, reading.examine([path for path, _ in files]), strict=True):
        if found.hash != expected:
            raise ValueError(f"{path.name}: expected the file that the study was designed with, got a changed one. Restore it.")


def _digest(rows: list[dict], side: str) -> str:
    """A hash of one side's files, in place of a generator's."""
    return hashlib.sha256(json.dumps([[row["prompt"], row["seed"], row[side]["hash"]] for row in rows]).encode()).hexdigest()
