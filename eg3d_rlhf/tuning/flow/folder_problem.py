"""A generator's files and a folder of people's pairs as a problem: what every family has in common.

    PAIRS/<stage>                     pairs of a stage; some stages may be missing
    PAIRS/conditions.safetensors      embeddings of their conditions
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.tuning.flow.embeddings import CONDITIONS, Conditions
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, pairs_hash
from eg3d_rlhf.tuning.flow.path import CONVENTION
from eg3d_rlhf.tuning.flow.problem import Problem, read_stages
from eg3d_rlhf.tuning.flow.stage import AssetReward

Judge = Callable[[Any, Callable[[], Sequence[PreferencePair]], str], AssetReward]  # (pipeline, pairs of its last stage, title)


def folder_problem(
    pipeline: Any, folders: Mapping[str, Path], tokens: Conditions, *, identity: Mapping, seed: int = 0, held_out: float = 0.2,
    judge: Judge | None = None, check: Callable[[Path, str, Mapping], None] = lambda folder, stage, meta: None,
) -> Problem:
    """The problem of a pipeline and pairs of its stages.

    Conditions are divided by a hash of their names: a share is held out, half of it to choose checkpoints on where there are two or more.
    Where `judge` makes a reward of people's pairs of the last stage, three are fitted to pairs of different conditions: one half of the
    trained (w1 and w2), the other half (held-out win rate), the held-out (the final table). Where pairs of a stage are missing, there is
    the first alone.

    Args:
        folders: by stage; tokens: of all conditions; identity: JSON, hashes of all files; held_out: share of the conditions.
        check: refuses pairs of another pipeline, from the folder, the stage and what the writer had to say.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """

    def checked(folder: Path, stage: str, meta: Mapping) -> None:
        got = meta.get("convention")
        if got != CONVENTION:
            raise ValueError(f"{folder}: expected the convention {CONVENTION!r}, got {got!r}. Import the assets again with this program.")
        check(folder, stage, meta)

    read = read_stages(folders, pipeline, checked)
    named = sorted({pair.condition for stage in folders for pair in read(stage)})
    tokens.of(named)
    trained, choosing, held = divided(named, seed, held_out)

    def human_pairs(stage: str, names: Sequence[str] = trained) -> list[PreferencePair]:
        kept = set(names)
        return [pair for pair in read(stage) if pair.condition in kept]

    last = pipeline.stages[-1].name

    def fitted(title: str, names: Sequence[str]) -> AssetReward | None:
        return None if judge is None else judge(pipeline, lambda: human_pairs(last, names), title)

    judged = judge is not None and set(folders) == {stage.name for stage in pipeline.stages} and bool(held)
    halves = (trained[0::2], trained[1::2]) if len(trained) > 1 else (trained, [])
    return Problem(
        pipeline=pipeline, human_pairs=human_pairs, reward=fitted("reward", halves[0]),
        chooser=fitted("chooser", halves[1]) if judged and halves[1] else None, final=fitted("final judge", held) if judged else None,
        train_conditions=trained, held_out_conditions=held, choosing_conditions=choosing,
        identity={
            **identity, "pairs": {stage: pairs_hash(folder) for stage, folder in folders.items()}, "seed": seed, "held_out": held_out,
        },
    )


def divided(names: Sequence[str], seed: int, held_out: float) -> tuple[list[str], list[str], list[str]]:
    """Conditions to train on, one at least; and of a share that is held out, those to choose on and the table's, by a hash of names."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    return order[count:], order[: count // 2], order[count // 2 : count]  # one alone is the table's


def conditions_problem(pipeline: Any, tokens: Conditions, *, identity: Mapping, seed: int = 0, held_out: float = 0.2) -> Problem:
    """The problem of a pipeline and conditions alone, without people's pairs: a stage can be tuned by a reward from elsewhere.

    Args: see folder_problem.
    """

    def none(stage: str) -> list[PreferencePair]:
        raise ValueError(f"--pairs: expected people's pairs of stage {stage!r}, got none. Name their folder, or train by a reward alone.")

    trained, choosing, held = divided(tokens.names, seed, held_out)
    return Problem(
        pipeline=pipeline, human_pairs=none, reward=None, chooser=None, final=None, train_conditions=trained,
        choosing_conditions=choosing, held_out_conditions=held, identity={**identity, "seed": seed, "held_out": held_out},
    )


def pair_folders(given: Sequence[Path], stages: Sequence[str]) -> dict[str, Path]:
    """Pair folders by stage, from such folders themselves or what holds one for each stage. Raises: FileNotFoundError, ValueError."""
    found: dict[str, Path] = {}
    for path in given:
        single = (path / "meta.json").is_file()
        parts = [path] if single else [path / stage for stage in stages if (path / stage).is_dir()]
        if not parts:
            names = " or ".join(stages)
            raise FileNotFoundError(f"pairs: expected a folder of pairs, or {names} in it, got none at {path}. Import pairs first.")
        for part in parts:
            stage = _stage_in(part / "meta.json") if single else part.name
            if stage in found:
                raise ValueError(f"pairs: expected one folder for each stage, got {found[stage]} and {part} for {stage!r}. Drop one.")
            found[stage] = part
    unknown = sorted(set(found) - set(stages))
    if unknown:
        raise ValueError(f"pairs: expected stages {' and '.join(stages)}, got {', '.join(unknown)}. They are of another pipeline.")
    return found


def _stage_in(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
        return str(content["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a stage, got {error}. Restore the file.") from None


def conditions_beside(folders: Mapping[str, Path], given: Path | None = None) -> Path:
    """The file of embeddings: the one that is given, else that beside the pairs. Raises: FileNotFoundError."""
    places = [folder.parent / CONDITIONS for folder in folders.values()]
    path = Path(given or next((path for path in places if path.is_file()), places[0]))
    if given is None and not path.is_file():
        got = f"expected embeddings of the pairs' conditions at {places[0]}, got none"
        raise FileNotFoundError(f"conditions: {got}. Name a file by --conditions.")
    return path


def hash_of(path: Path) -> str:
    """Of a file, or of a folder's names and bytes."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()
