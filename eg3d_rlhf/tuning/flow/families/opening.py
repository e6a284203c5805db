"""Opening of problems: the only module that reads a generator's folder together with preference pairs.

A folder with a generator's networks becomes a `Problem`, together with

    PAIRS/<stage>                     pairs of a stage; some stages may be missing
    PAIRS/conditioning.safetensors    embeddings of the pairs' prompts
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
from eg3d_rlhf.tuning.flow.families import check_source, family_of, reject_unread, unread_options


def open_problem(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open the problem of a bundled generator, or of a folder of any family.

    Raises: ValueError or OSError for files that are missing or do not fit, and for options that the family
        does not read.
    """
    check_source(source)
    family = family_of(Path(source.pipeline))
    # The second check of options: the family of the folder is known now.
    reject_unread(
        source,
        (*family.common, *family.options),
        f"only applies to other generators and has no effect on {family.name}",
    )
    if source.pairs is None and not source.needs_pairs and not family.bundled:
        # Only a reward from elsewhere is used, for example by online tuning.
        problem = open_embeddings(family, source, device)
    else:
        problem = (
            family.open(source, device) if isinstance(family, Opens) else open_folder(family, source, device)
        )
    precision = chosen_precision(source.precision, device)
    for stage in problem.pipeline.stages:
        stage.precision = precision
    # Results differ between precisions, so the precision is part of the problem's identity.
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

    Prompts are divided by a hash of their names. A share is held out; if it has two or more prompts, half of
    it serves to choose checkpoints. If the family fits rewards to pairs of the last stage, three are fitted
    to pairs
    of different prompts: to one half of the training prompts (w1 and w2), to the other half (held-out win
    rate), and to the held-out prompts (final table). If a stage has no pairs, only the first reward is
    fitted.

    Args:
        stages: see `FlowFamily.load`.
        rewards: False leaves the rewards out.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """
    folders = pairs_in(family, source)
    fit = family.fit_reward if rewards and isinstance(family, FitsRewards) else None
    place = embeddings_beside(folders, None if source.conditions is None else Path(source.conditions))
    # Read before the networks, so that a missing file is reported within seconds.
    tokens = read_conditions(place, zero_null=family.zero_null)
    # Raises early for missing networks that only the rewards would need.
    files = family.files(Path(source.pipeline), tuple(folders))
    pipeline = family.load(
        Path(source.pipeline), tokens, stages=stages, dtype=getattr(torch, source.dtype), device=device
    )
    # Hashes of all inputs; artefacts made from this problem are named by them.
    identity = _identity(family, source, place, files)
    read = read_stages(folders, pipeline, functools.partial(family.check_pairs, pipeline))
    prompts = sorted({pair.condition for pairs in read.values() for pair in pairs})
    tokens.select(prompts)  # raises for prompts without an embedding
    trained, choosing, held = map(list, source.splits or divided(prompts, source.seed, source.held_out))
    last = pipeline.stages[-1].name

    def pairs_under(names: Sequence[str]) -> PairsByStage:
        return PairsByStage(folders, lambda stage: pairs_of_conditions(read[stage], names))

    def fitted(title: str, names: Sequence[str]) -> AssetReward | None:
        if fit is None:
            return None
        return fit(pipeline, pairs_of_conditions(read.get(last, ()), names), title)

    # The last two rewards evaluate whole assets, for which every stage must be trained.
    evaluated = fit is not None and set(folders) == {stage.name for stage in pipeline.stages} and bool(held)
    # Different prompts, so that the reward that trains and the one that chooses share no pair.
    halves = (trained[0::2], trained[1::2]) if len(trained) > 1 else (trained, [])
    return Problem(
        pipeline=pipeline,
        train_conditions=trained,
        held_out_conditions=held,
        choosing_conditions=choosing,
        # Computed on access: pairs of a stage are filtered when the stage is trained
        train_pairs=pairs_under(trained),
        unseen_pairs=pairs_under([*choosing, *held]),
        reward=fitted("reward", halves[0]),
        chooser=fitted("chooser", halves[1]) if evaluated and halves[1] else None,
        final=fitted("final evaluator", held) if evaluated else None,
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


def open_embeddings(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open a folder and embeddings as a problem without pairs, for a reward from elsewhere.

    The empty conditioning is the embedding of '' if the file has it, else zeros.

    Raises: ValueError for missing embeddings, or for options that have no effect without pairs.
    """
    extra = unread_options(source, COMMON)
    if extra:
        raise ValueError(
            f"{extra}: has no effect with --pipeline=DIR and --conditioning without --pairs. Leave it out."
        )
    if source.conditions is None:
        raise ValueError(
            "--conditioning: required with --pipeline=DIR if --pairs is not given. Name the embeddings' file."
        )
    root = Path(source.pipeline)
    place = Path(source.conditions)
    tokens = read_conditions(place, zero_null=family.zero_null)
    # The file's embedding of '' is preferred to zeros.
    tokens = replace(tokens, zero_null=tokens.zero_null and NULL not in tokens.tokens)
    pipeline = family.load(root, tokens, dtype=getattr(torch, source.dtype), device=device)
    identity = _identity(family, source, place, family.files(root))
    trained, choosing, held = divided(tokens.names, source.seed, source.held_out)
    return Problem(
        pipeline=pipeline,
        train_conditions=trained,
        held_out_conditions=held,
        choosing_conditions=choosing,
        # Every stage exists, without pairs
        train_pairs={stage.name: [] for stage in pipeline.stages},
        identity={**identity, "seed": source.seed, "held_out": source.held_out},
    )


def _identity(family: FlowFamily, source: ProblemSource, embeddings: Path, files: Mapping[str, Path]) -> dict:
    """Return the hashes that identify a problem's files, as JSON values. They name artefacts, so the keys
    must stay.
    """
    hashes = {name: file_hash(path) for name, path in files.items()}
    return {"problem": family.name, "dtype": source.dtype, "conditions": hash_of(embeddings), "files": hashes}


def read_stages(
    folders: Mapping[str, Path], pipeline: Pipeline, check: Callable[[Path, str, Mapping], None]
) -> dict[str, list[PreferencePair]]:
    """Read the pairs of every stage from its folder; returns them by stage.

    Args: check: raises ValueError for pairs of another pipeline, given the folder, the stage and meta.json.
    Raises: ValueError if the stages do not compare the same assets: the loop samples a stage on what the
        preferred asset of the previous stage leaves to it.
    """
    read: dict[str, list[PreferencePair]] = {}
    for stage, folder in folders.items():
        read[stage], meta = read_pairs(folder, stage_of(pipeline, stage))
        if (got := meta.get("convention")) != CONVENTION:
            # Another convention of the time would silently train towards the noise.
            raise ValueError(
                f"{folder}: expected the convention {CONVENTION!r}, got {got!r}. Make the pairs again with"
                " this program."
            )
        check(folder, stage, meta)
    # Ids and prompts are compared across stages, in any order.
    (first, pairs), *others = read.items()
    expected = {(pair.id, pair.condition) for pair in pairs}
    for stage, pairs_there in others:
        unmatched = sorted({(pair.id, pair.condition) for pair in pairs_there} ^ expected)
        if unmatched:
            raise ValueError(
                f"pairs: stages {first!r} and {stage!r} must have the same pairs, but {len(unmatched)} pairs"
                f" are missing from one of them, the first is {unmatched[0][0]!r}. Make both from the same"
                " assets."
            )
    return read


def divided(names: Sequence[str], seed: int, held_out: float) -> tuple[list[str], list[str], list[str]]:
    """Divide prompts by a hash of their names into those to train on, to choose on, and of the final table.

    The last two share `held_out` of the prompts. At least one prompt is trained on and, if there are two or
    more, at least one is held out.
    """
    # By hash, so that the order of the file does not matter.
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    # At least one is held out, and at least one is left to train on.
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    # A single held-out prompt goes to the table, because count // 2 is then 0.
    return order[count:], order[: count // 2], order[count // 2 : count]


def pair_folders(path: Path, stages: Sequence[str]) -> dict[str, Path]:
    """Return the folders of pairs by stage, from a folder that holds one for each stage, or from one such
    folder.

    Raises: FileNotFoundError, ValueError.
    """
    # The path is the folder of one stage itself.
    if (path / "meta.json").is_file():
        folders = {_stage_in(path / "meta.json"): path}
    else:
        folders = {stage: path / stage for stage in stages if (path / stage).is_dir()}
    if not folders:
        subfolders = " or ".join(stages)
        raise FileNotFoundError(
            f"pairs: {path} is no folder of pairs and has no subfolder {subfolders}. Make pairs: eg3d-rlhf"
            " flow tune WORK --pairs-only."
        )
    # meta.json may name a stage of another family.
    unknown = sorted(set(folders) - set(stages))
    if unknown:
        raise ValueError(
            f"pairs: expected the stages {' and '.join(stages)}, got {', '.join(unknown)}. The pairs belong"
            " to another pipeline: name the right folder."
        )
    return folders


def _stage_in(path: Path) -> str:
    try:
        # meta.json was written together with the pairs.
        return str(json.loads(path.read_text())["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected JSON with a key 'stage', got {error}. Restore the file."
        ) from None


def embeddings_beside(folders: Mapping[str, Path], given: Path | None = None) -> Path:
    """Return the file of embeddings: the given one, else the one beside the pairs.

    Raises: FileNotFoundError.
    """
    # Beside the folder of a stage, or one level higher, where a WORK folder has it.
    places = [
        version_0_1.conditioning_file(place)
        for folder in folders.values()
        for place in folder.absolute().parents[:2]
    ]
    path = Path(given or next((path for path in places if path.is_file()), places[0]))
    if given is None and not path.is_file():
        raise FileNotFoundError(
            f"conditioning: expected embeddings of the pairs' prompts at {places[0]}, got none. Name the file"
            " with --conditioning."
        )
    return path


def hash_of(path: Path) -> str:
    """Compute the hash of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    # Sorted by name, so that the hash does not depend on the file system.
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()
