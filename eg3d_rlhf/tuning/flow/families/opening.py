"""Functions that open a generator's folder and its preference pairs as a `Problem` (base/problem.py).

The networks are read from the generator's folder. The pairs are read from a second folder, PAIRS:

    PAIRS/<stage>                     preference pairs of a stage; some stages may have none
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
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, read_conditioning
from eg3d_rlhf.tuning.flow.base.family import (
    COMMON,
    GEOMETRY,
    FitsRewards,
    FlowFamily,
    Opens,
    question_of,
)
from eg3d_rlhf.tuning.flow.base.pairs import (
    PairsByStage,
    PreferencePair,
    pairs_hash,
    pairs_of_prompts,
    read_pairs,
)
from eg3d_rlhf.tuning.flow.base.problem import Problem, chosen_precision
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, AssetReward, Pipeline, stage_of
from eg3d_rlhf.tuning.flow.families import check_source, family_of, reject_unread, unread_options


def open_problem(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open the problem of a bundled generator, or of the folder of a generator.

    Args:
        source: settings that name the generator, the pairs and the conditioning.
        device: device of the networks.
    Raises: ValueError for files that do not fit each other, and for options that have no effect on this
        generator; OSError for missing files.
    """
    check_source(source)
    family = family_of(Path(source.pipeline))
    # The second check of options: the family of the folder is known now.
    reject_unread(
        source,
        (*family.common, *family.options),
        f"a generator of the family {family.name}, only with other generators",
    )
    if source.pairs is None and not source.needs_pairs and not family.bundled:
        # Without pairs, a separate reward must be used, as in online tuning.
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
    return replace(problem, identity=identity, family=family)


def open_stage(source: ProblemSource, stage_name: str | None, device: str | torch.device = "cpu") -> Problem:
    """Open the problem of a run that tunes one stage, with the network of this stage alone in memory.

    The networks of the other stages are loaded while samples are made, for example for win rates, and dropped
    afterwards. The small networks of a bundled generator are all loaded.

    Args:
        source: settings that name the generator, the pairs and the conditioning.
        stage_name: name of the stage; None: the last stage of the problem.
        device: device of the networks.
    Raises: ValueError if the generator has no such stage; otherwise as `open_problem`.
    """
    family = family_of(Path(source.pipeline))
    if family.bundled:
        problem = open_problem(source, device)
        if stage_name is not None:
            stage_of(problem.pipeline, stage_name)
        return problem
    problem = open_problem(source.stagewise(), device)

    def load(name: str) -> torch.nn.Module:
        """Load the flow network of one stage, and of no other stage."""
        one_stage_pipeline = family.load(
            Path(source.pipeline), None, stages=(name,), dtype=getattr(torch, source.dtype), device=device
        )
        return stage_of(one_stage_pipeline, name).model

    stages = problem.pipeline.stages
    tuned_stage = stages[-1] if stage_name is None else stage_of(problem.pipeline, stage_name)
    for stage in stages:
        if stage is tuned_stage:
            stage.model = load(stage.name)
        else:
            stage.load = functools.partial(load, stage.name)
    return problem


def geometry_stage(pipeline: str) -> str | None:
    """Return the name of the stage that answers about the geometry tune by default, or None for the last one.

    It is the last stage that is no stage of textures: `flow label` asks about the geometry by default, and a
    stage of textures leaves the geometry as it is.

    Args: pipeline: value of --pipeline.
    """
    family = family_of(Path(pipeline))
    if not family.textures or family.bundled:
        return None
    return [name for name in family.stages_in(Path(pipeline)) if question_of(family, name) == GEOMETRY][-1]


def pairs_in(family: FlowFamily, source: ProblemSource) -> dict[str, Path]:
    """Return the folders of preference pairs by stage, which are in --pairs or beside the networks.

    Without --pairs, they are in the subfolder pairs of the generator's folder.

    Raises: FileNotFoundError or ValueError; see `pair_folders`.
    """
    return pair_folders(Path(source.pairs or Path(source.pipeline) / "pairs"), family.stages)


def open_folder(
    family: FlowFamily,
    source: ProblemSource,
    device: str | torch.device = "cpu",
    stages: Sequence[str] | None = None,
    fits_rewards: bool = True,
) -> Problem:
    """Open a generator's folder and the preference pairs of its stages as a problem.

    A hash of the prompts' names divides the prompts into training prompts and held-out prompts. If there are
    two or more held-out prompts, half of them are used to choose checkpoints.

    If the family can fit rewards to pairs of the last stage, up to three rewards are fitted to pairs of
    different prompts. The first uses half of the training prompts. The tuning loop selects and weights pairs
    with it; see training/circular/loop_pairs.py. The second uses the other half of the training prompts. It
    computes the held-out win rate, by which checkpoints are chosen. The third uses the held-out prompts, and
    evaluates the final table. If a stage has no pairs, only the first reward is fitted.

    Args:
        family: family of the generator.
        source: settings that name the generator, the pairs and the conditioning.
        device: device of the networks.
        stages: names of the stages whose flows are needed, or None for all; see `FlowFamily.load`.
        fits_rewards: if False, no reward is fitted.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """
    folders = pairs_in(family, source)
    fit_reward = family.fit_reward if fits_rewards and isinstance(family, FitsRewards) else None
    embeddings_path = embeddings_beside(
        folders, None if source.conditions is None else Path(source.conditions)
    )
    # Read before the networks, so that a missing file is reported within seconds.
    embeddings = read_conditioning(embeddings_path, zero_null=family.zero_null)
    # An error for missing networks that only the rewards need is raised here, before the flows are read.
    file_by_name = family.files(Path(source.pipeline), tuple(folders))
    pipeline = family.load(
        Path(source.pipeline),
        embeddings,
        # () builds all flow networks without weights.
        stages=stages if source.loads_networks else (),
        dtype=getattr(torch, source.dtype),
        device=device,
    )
    # Hashes of all inputs. They name the artefacts that are made from this problem.
    identity = _identity(family, source, embeddings_path, file_by_name)
    pairs_by_stage = read_stages(folders, pipeline, functools.partial(family.check_pairs, pipeline))
    prompts = sorted({pair.condition for pairs in pairs_by_stage.values() for pair in pairs})
    embeddings.select(prompts)  # raises an error for prompts without an embedding
    training_prompts, choosing_prompts, table_prompts = map(
        list, source.splits or split_prompts(prompts, source.seed, source.held_out)
    )
    last_stage = pipeline.stages[-1].name

    def select_pairs(names: Sequence[str]) -> PairsByStage:
        """Return the pairs of some prompts, by stage."""
        # Computed on access: pairs of a stage are selected when the stage is trained.
        return PairsByStage(folders, lambda stage: pairs_of_prompts(pairs_by_stage[stage], names))

    def fit_to_prompts(title: str, names: Sequence[str]) -> AssetReward | None:
        """Fit a reward to the last stage's pairs of some prompts; None if the family fits no rewards."""
        if fit_reward is None:
            return None
        return fit_reward(pipeline, pairs_of_prompts(pairs_by_stage.get(last_stage, ()), names), title)

    # The second and the third reward evaluate assets that went through all stages, so all must have pairs.
    has_evaluators = (
        fit_reward is not None
        and set(folders) == {stage.name for stage in pipeline.stages}
        and bool(table_prompts)
    )
    # Every second prompt, so that the reward for training and the reward for choosing share no pair.
    if len(training_prompts) > 1:
        reward_prompts = training_prompts[0::2]
        chooser_prompts = training_prompts[1::2]
    else:
        # A single prompt cannot be divided, so there is no reward for choosing.
        reward_prompts = training_prompts
        chooser_prompts = []
    return Problem(
        pipeline=pipeline,
        train_prompts=training_prompts,
        held_out_prompts=table_prompts,
        choosing_prompts=choosing_prompts,
        train_pairs=select_pairs(training_prompts),
        unseen_pairs=select_pairs([*choosing_prompts, *table_prompts]),
        reward=fit_to_prompts("reward", reward_prompts),
        chooser=fit_to_prompts("chooser", chooser_prompts) if has_evaluators and chooser_prompts else None,
        final=fit_to_prompts("final evaluator", table_prompts) if has_evaluators else None,
        fitted_to={"reward": reward_prompts, "chooser": chooser_prompts, "final": table_prompts},
        # The fit of a linear reward has no randomness, so the seed is ignored.
        fit_reward=(
            None
            if fit_reward is None or last_stage not in folders
            else lambda pairs, seed: fit_reward(pipeline, pairs, "reward")
        ),
        identity={
            **identity,
            "pairs": {stage: pairs_hash(folder) for stage, folder in folders.items()},
            "seed": source.seed,
            # Explicit splits replace the share of held-out prompts.
            **(
                {"held_out": source.held_out}
                if source.splits is None
                else {"splits": list(map(list, source.splits))}
            ),
        },
    )


def open_embeddings(family: FlowFamily, source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Open a generator's folder and embeddings as a problem without preference pairs.

    The caller must provide a reward, as in online tuning. The empty conditioning is the embedding of the
    empty text '' if the file of embeddings has it, and zeros otherwise.

    Args:
        family: family of the generator.
        source: settings that name the generator and the conditioning.
        device: device of the networks.
    Raises: ValueError if --conditioning is missing, or for options that have no effect without pairs.
    """
    unread_flags = unread_options(source, COMMON)
    if unread_flags:
        raise ValueError(
            f"{unread_flags} cannot be used with --pipeline=DIR and --conditioning without --pairs. Remove"
            f" {unread_flags} from the command."
        )
    if source.conditions is None:
        raise ValueError(
            "--conditioning is missing. With --pipeline=DIR and without --pairs, pass the file of"
            " embeddings as --conditioning=FILE."
        )
    root = Path(source.pipeline)
    embeddings_path = Path(source.conditions)
    embeddings = read_conditioning(embeddings_path, zero_null=family.zero_null)
    # Zeros are used only if the file has no embedding of '' (NULL).
    embeddings = replace(embeddings, zero_null=embeddings.zero_null and NULL not in embeddings.tokens)
    pipeline = family.load(
        root,
        embeddings,
        # () builds all flow networks without weights.
        stages=None if source.loads_networks else (),
        dtype=getattr(torch, source.dtype),
        device=device,
    )
    identity = _identity(family, source, embeddings_path, family.files(root))
    training_prompts, choosing_prompts, table_prompts = split_prompts(
        embeddings.names, source.seed, source.held_out
    )
    return Problem(
        pipeline=pipeline,
        train_prompts=training_prompts,
        held_out_prompts=table_prompts,
        choosing_prompts=choosing_prompts,
        # Every stage is listed, with no pairs.
        train_pairs={stage.name: [] for stage in pipeline.stages},
        identity={**identity, "seed": source.seed, "held_out": source.held_out},
    )


def _identity(
    family: FlowFamily, source: ProblemSource, embeddings_path: Path, file_by_name: Mapping[str, Path]
) -> dict:
    """Return the hashes of a problem's files, in JSON types.

    Names of stored artefacts are computed from them, so the keys must not be renamed.

    Args:
        family: family of the generator.
        source: settings that name the data type.
        embeddings_path: file or folder of the prompts' embeddings.
        file_by_name: other files of the problem, by name.
    """
    hash_by_name = {name: file_hash(path) for name, path in file_by_name.items()}
    return {
        "problem": family.name,
        "dtype": source.dtype,
        "conditions": hash_of(embeddings_path),
        "files": hash_by_name,
    }


def read_stages(
    folders: Mapping[str, Path], pipeline: Pipeline, check: Callable[[Path, str, Mapping], None]
) -> dict[str, list[PreferencePair]]:
    """Read the preference pairs of every stage from its folder.

    Args:
        folders: folder of the pairs by stage.
        pipeline: pipeline to which the pairs must belong.
        check: function that raises ValueError for pairs of another pipeline. Its arguments are the folder,
            the stage and the content of meta.json.
    Returns: pairs by stage.
    Raises: ValueError if the stages do not compare the same assets. They must, because the tuning loop
        samples a stage with the output of the previous stage for the preferred asset.
    """
    pairs_by_stage: dict[str, list[PreferencePair]] = {}
    for stage, folder in folders.items():
        pairs_by_stage[stage], pairs_meta = read_pairs(folder, stage_of(pipeline, stage))
        convention = pairs_meta.get("convention")
        if convention != CONVENTION:
            # If time ran the other way, training would silently approach noise.
            raise ValueError(
                f"{folder}/meta.json: expected the convention {CONVENTION!r}, got {convention!r}. Make the"
                " pairs again with `eg3d-rlhf flow tune WORK --pairs-only`."
            )
        check(folder, stage, pairs_meta)
    # Every stage is compared with the first one. The order of pairs may differ between stages.
    (first_stage, first_pairs), *other_stages = pairs_by_stage.items()
    expected_pairs = {(pair.id, pair.condition) for pair in first_pairs}
    for stage, stage_pairs in other_stages:
        # Pairs (id, prompt) that only one of the two stages has.
        unmatched_pairs = sorted({(pair.id, pair.condition) for pair in stage_pairs} ^ expected_pairs)
        if unmatched_pairs:
            raise ValueError(
                f"--pairs: stages {first_stage!r} and {stage!r} must have the same pairs, but"
                f" {len(unmatched_pairs)} pairs are missing from one of them, for example"
                f" {unmatched_pairs[0][0]!r}. Make the pairs of both stages from the same assets."
            )
    return pairs_by_stage


def split_prompts(names: Sequence[str], seed: int, held_out: float) -> tuple[list[str], list[str], list[str]]:
    """Split prompts, by a hash of their names, into sets for training, checkpoint selection and the table.

    The set for training has at least one prompt. If there are two or more prompts, at least one is held out.

    Args:
        names: names of the prompts, in any order.
        seed: seed of the division.
        held_out: share of the prompts, 0..1, that is not for training. Half of it is for choosing
            checkpoints, the other half for the final table.
    Returns: names of the prompts for training, for choosing, and for the final table.
    """
    # Sorted by hash, so that the order of the names in the file does not matter.
    shuffled_prompts = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    # At least one prompt is held out, and at least one remains for training.
    held_out_count = min(max(1, round(held_out * len(shuffled_prompts))), len(shuffled_prompts) - 1)
    # A single held-out prompt is for the table, because choosing_count is then 0.
    choosing_count = held_out_count // 2
    return (
        shuffled_prompts[held_out_count:],
        shuffled_prompts[:choosing_count],
        shuffled_prompts[choosing_count:held_out_count],
    )


def pair_folders(path: Path, stages: Sequence[str]) -> dict[str, Path]:
    """Return the folders of preference pairs by stage.

    Args:
        path: folder with one subfolder per stage, or the folder of a single stage.
        stages: names of the generator's stages.
    Raises: FileNotFoundError if there is no folder of pairs; ValueError if the pairs belong to a stage that
        the generator does not have.
    """
    # A folder with meta.json is the folder of a single stage.
    if (path / "meta.json").is_file():
        folders = {_stage_in(path / "meta.json"): path}
    else:
        folders = {stage: path / stage for stage in stages if (path / stage).is_dir()}
    if not folders:
        subfolder_text = " or ".join(stages)
        raise FileNotFoundError(
            f"--pairs: {path} has neither a file meta.json nor a subfolder {subfolder_text}. Make pairs with"
            " `eg3d-rlhf flow tune WORK --pairs-only`."
        )
    # meta.json may name a stage of another family.
    unknown_stages = sorted(set(folders) - set(stages))
    if unknown_stages:
        raise ValueError(
            f"--pairs: the pairs in {path} are of stage {', '.join(unknown_stages)}, but this generator has"
            f" the stages {' and '.join(stages)}. Pass the pairs of this generator."
        )
    return folders


def _stage_in(path: Path) -> str:
    """Read the name of the stage from the meta.json of a folder of pairs."""
    try:
        return str(json.loads(path.read_text())["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the name of the stage cannot be read from the key 'stage' ({error}). Make the pairs"
            " again with `eg3d-rlhf flow tune WORK --pairs-only`."
        ) from None


def embeddings_beside(folders: Mapping[str, Path], requested_file: Path | None = None) -> Path:
    """Return the file of embeddings that the user named, or otherwise the file beside the pairs.

    Args:
        folders: folders of pairs by stage.
        requested_file: file that the user named, whose existence is not checked; None to search beside the
            pairs.
    Raises: FileNotFoundError if `requested_file` is None and there is no file beside the pairs.
    """
    if requested_file is not None:
        return Path(requested_file)
    candidate_files = []
    for folder in folders.values():
        # The parent of the folder of a stage, or the parent of that, which is the layout of a WORK folder.
        for parent in folder.absolute().parents[:2]:
            candidate_files.append(version_0_1.conditioning_file(parent))
    path = next((path for path in candidate_files if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"--conditioning: there is no file {candidate_files[0]} with embeddings of the pairs' prompts."
            " Pass the file of embeddings as --conditioning=FILE."
        )
    return path


def hash_of(path: Path) -> str:
    """Compute the hash of a file or of a folder.

    The hash of a file is that of its content. The hash of a folder is that of the names and contents of the
    files directly in it.
    """
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    # Sorted by name, so that the hash does not depend on the file system.
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()
