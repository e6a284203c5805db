"""Opening of problems: the one place that reads a generator's folder together with preference pairs.

A folder of a generator's networks becomes a `Problem` with

    PAIRS/<stage>                     pairs of a stage; some stages may be missing
    PAIRS/conditioning.safetensors    embeddings of their conditions
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, read_conditions
from eg3d_rlhf.tuning.flow.base.family import COMMON, FitsRewards, FlowFamily, Opens
from eg3d_rlhf.tuning.flow.base.pairs import (
    PairsByStage,
    PreferencePair,
    pairs_hash,
    pairs_of_conditions,
    read_pairs,
)
from eg3d_rlhf.tuning.flow.base.problem import Problem, chosen_precision
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, AssetReward, Pipeline, stage_of
from eg3d_rlhf.tuning.flow.families import beyond, check_source, family_of, refuse


def open_problem(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open the problem of a bundled generator, or of a folder of any family.

    Raises: ValueError or OSError for what is missing or does not fit, and for options that its family does
        not read.
    """
    check_source(source)
    family = family_of(Path(source.pipeline))
    refuse(
        source,
        (*family.common, *family.options),
        f"belongs to other generators, and would have no effect on {family.name}",
    )
    if source.pairs is None and not source.needs_pairs and not family.bundled:
        problem = open_conditions(family, source, device)
    else:
        problem = (
            family.open(source, device) if isinstance(family, Opens) else open_folder(family, source, device)
        )
    precision = chosen_precision(source.precision, device)
    for stage in problem.pipeline.stages:
        stage.precision = precision
    identity = {**problem.identity, "precision": precision}
    return replace(problem, identity=identity)


def pairs_in(family: FlowFamily, source: ProblemSource) -> dict[str, Path]:
    """Return the folders of pairs by stage. Raises: see `pair_folders`."""
    return pair_folders(Path(source.pairs or Path(source.pipeline) / "pairs"), family.stages)


def open_folder(
    family: FlowFamily,
    source: ProblemSource,
    device: str | torch.device = "cpu",
    stages: Sequence[str] | None = None,
    rewards: bool = True,
) -> Problem:
    """Open a folder and the pairs of its stages as a problem.

    Conditions are divided by a hash of their names: a share is held out, half of it to choose checkpoints on
    where there are two or more. Where the family fits rewards to pairs of the last stage, three are fitted to
    pairs of different conditions: one half of the trained (w1 and w2), the other half (held-out win rate),
    the held-out (the final table). Where pairs of a stage are missing, there is the first alone.

    Args: stages: see `FlowFamily.load`; rewards: False leaves the rewards out.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """
    folders = pairs_in(family, source)
    fit = family.fit_reward if rewards and isinstance(family, FitsRewards) else None
    place = conditions_beside(folders, None if source.conditions is None else Path(source.conditions))
    tokens = read_conditions(place, zero_null=family.zero_null)
    files = family.files(Path(source.pipeline), tuple(folders))  # raises for what the rewards would lack
    pipeline = family.load(
        Path(source.pipeline), tokens, stages=stages, dtype=getattr(torch, source.dtype), device=device
    )
    identity = _identity(family, source, place, files)
    read = read_stages(folders, pipeline, functools.partial(family.check_pairs, pipeline))
    named = sorted({pair.condition for pairs in read.values() for pair in pairs})
    tokens.select(named)  # raises for those that are missing
    trained, choosing, held = map(list, source.splits or divided(named, source.seed, source.held_out))
    last = pipeline.stages[-1].name

    def pairs_under(names: Sequence[str]) -> PairsByStage:
        return PairsByStage(folders, lambda stage: pairs_of_conditions(read[stage], names))

    def fitted(title: str, names: Sequence[str]) -> AssetReward | None:
        if fit is None:
            return None
        return fit(pipeline, pairs_of_conditions(read.get(last, ()), names), title)

    judged = fit is not None and set(folders) == {stage.name for stage in pipeline.stages} and bool(held)
    halves = (trained[0::2], trained[1::2]) if len(trained) > 1 else (trained, [])
    return Problem(
        pipeline=pipeline,
        train_conditions=trained,
        held_out_conditions=held,
        choosing_conditions=choosing,
        train_pairs=pairs_under(trained),
        unseen_pairs=pairs_under([*choosing, *held]),
        reward=fitted("reward", halves[0]),
        chooser=fitted("chooser", halves[1]) if judged and halves[1] else None,
        final=fitted("final evaluator", held) if judged else None,
        fitted_to={"reward": halves[0], "chooser": halves[1], "final": held},
        fit_reward=(
            None if fit is None or last not in folders else lambda pairs, seed: fit(pipeline, pairs, "reward")
        ),
        identity={
            **identity,
            "pairs": {stage: pairs_hash(folder) for stage, folder in folders.items()},
            "seed": source.seed,
            **(
                {"held_out": source.held_out}
                if source.splits is None
                else {"splits": list(map(list, source.splits))}
            ),
        },
    )


def open_conditions(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open a folder and embeddings alone as a problem, for a reward from elsewhere; the empty condition is ''
    where the file has it.

    Raises: ValueError for no embeddings, or for options that are then not read.
    """
    extra = beyond(source, COMMON)
    if source.conditions is None or extra:
        got = f"{extra} beside none" if extra else "none"
        raise ValueError(
            f"--conditioning: expected embeddings alone with --pipeline=DIR without --pairs, got {got}. Name"
            " the file."
        )
    root = Path(source.pipeline)
    place = Path(source.conditions)
    tokens = read_conditions(place, zero_null=family.zero_null)
    tokens = replace(tokens, zero_null=tokens.zero_null and NULL not in tokens.tokens)
    pipeline = family.load(root, tokens, dtype=getattr(torch, source.dtype), device=device)
    identity = _identity(family, source, place, family.files(root))
    trained, choosing, held = divided(tokens.names, source.seed, source.held_out)
    return Problem(
        pipeline=pipeline,
        train_conditions=trained,
        held_out_conditions=held,
        choosing_conditions=choosing,
        train_pairs={stage.name: [] for stage in pipeline.stages},
        identity={**identity, "seed": source.seed, "held_out": source.held_out},
    )


def _identity(family: FlowFamily, source: ProblemSource, conditions: Path, files: Mapping[str, Path]) -> dict:
    hashes = {name: file_hash(path) for name, path in files.items()}
    return {"problem": family.name, "dtype": source.dtype, "conditions": hash_of(conditions), "files": hashes}


def read_stages(
    folders: Mapping[str, Path], pipeline: Pipeline, check: Callable[[Path, str, Mapping], None]
) -> dict[str, list[PreferencePair]]:
    """Read the pairs of every stage from a folder for each; returns them by stage.

    Args: check: raises ValueError for pairs of another pipeline, given the folder, the stage and meta.json.
    Raises: ValueError where the pairs are not of the same assets: the loop samples on what a stage's
        preferred one leaves to the next.
    """
    read: dict[str, list[PreferencePair]] = {}
    for stage, folder in folders.items():
        read[stage], meta = read_pairs(folder, stage_of(pipeline, stage))
        if (got := meta.get("convention")) != CONVENTION:
            raise ValueError(
                f"{folder}: expected the convention {CONVENTION!r}, got {got!r}. Make the pairs again with"
                " this program."
            )
        check(folder, stage, meta)
    (first, pairs), *others = read.items()
    expected = {(pair.id, pair.condition) for pair in pairs}
    for stage, pairs_there in others:
        odd = sorted({(pair.id, pair.condition) for pair in pairs_there} ^ expected)
        if odd:
            got = f"{len(odd)} that one of them lacks, {odd[0][0]!r} first. Make both from the same assets"
            raise ValueError(f"pairs: expected the same pairs at stages {first!r} and {stage!r}, got {got}.")
    return read


def divided(names: Sequence[str], seed: int, held_out: float) -> tuple[list[str], list[str], list[str]]:
    """Divide conditions by a hash of their names: one or more to train on; and of a share that is held out
    those to choose on and those of the table.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    return order[count:], order[: count // 2], order[count // 2 : count]  # one alone is the table's


def pair_folders(path: Path, stages: Sequence[str]) -> dict[str, Path]:
    """Return pair folders by stage, in a folder that holds one for each, or of one such.

    Raises: FileNotFoundError, ValueError.
    """
    if (path / "meta.json").is_file():
        folders = {_stage_in(path / "meta.json"): path}
    else:
        folders = {stage: path / stage for stage in stages if (path / stage).is_dir()}
    if not folders:
        what = f"a folder of pairs, or {' or '.join(stages)} in it"
        raise FileNotFoundError(
            f"pairs: expected {what}, got none at {path}. Make some: eg3d-rlhf flow tune WORK --pairs-only."
        )
    unknown = sorted(set(folders) - set(stages))
    if unknown:
        raise ValueError(
            f"pairs: expected stages {' and '.join(stages)}, got {', '.join(unknown)}. They are of another"
            " pipeline."
        )
    return folders


def _stage_in(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a stage, got {error}. Restore the file.") from None


def conditions_beside(folders: Mapping[str, Path], given: Path | None = None) -> Path:
    """Return the file of embeddings: the one that is given, else that beside the pairs.

    Raises: FileNotFoundError.
    """
    # or WORK's
    places = [
        version_0_1.conditioning_file(place)
        for folder in folders.values()
        for place in folder.absolute().parents[:2]
    ]
    path = Path(given or next((path for path in places if path.is_file()), places[0]))
    if given is None and not path.is_file():
        raise FileNotFoundError(
            f"conditions: expected embeddings of the pairs' conditions at {places[0]}, got none. Name"
            " --conditioning."
        )
    return path


def hash_of(path: Path) -> str:
    """Hash a file, or a folder's names and bytes."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()
