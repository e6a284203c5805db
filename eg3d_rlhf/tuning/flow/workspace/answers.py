"""Conversion of people's answers in a work folder (WORK) to pairs of latents of every stage, and to a tuning
problem.

    WORK/pairs/STAGE                       pairs of a stage, which are made again from the answers at each
                                           call
    WORK/pairs/conditioning.safetensors    embeddings of the pairs' prompts, if these are not the prompts of
                                           WORK

One third of the prompts to choose on is used to choose checkpoints during training. The other two thirds are
used to test whether the labels carried a learnable signal. Test prompts are not used.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.statistics import wilson_interval
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.people.label.assets.collection import Collection
from eg3d_rlhf.preferences.label_scores import read_counted_label_lines, read_goodness
from eg3d_rlhf.preferences.pair_strategies import Ensemble, Scored
from eg3d_rlhf.preferences.provenance import JUDGES, PEOPLE, PEOPLE_ONLY, LabelChoice, LabelUse
from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONING_FILE, NULL, read_conditioning
from eg3d_rlhf.tuning.flow.base.family import (
    GEOMETRY,
    Encodes,
    FlowFamily,
    ImportsSamples,
    Opens,
    question_of,
)
from eg3d_rlhf.tuning.flow.base.problem import Problem, chosen_precision
from eg3d_rlhf.tuning.flow.base.ranking import (
    RANKING,
    Candidate,
    Imported,
    Votes,
    pair_up,
    read_candidates,
    read_ranking,
    write_import,
)
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
from eg3d_rlhf.tuning.flow.base.single_labels import known_of
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families import bundled_family
from eg3d_rlhf.tuning.flow.families.opening import open_folder, open_problem, split_prompts
from eg3d_rlhf.tuning.flow.training.latent_reward import KIND, load
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import open_pipeline
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, REWARD, SHOWN, TRAIN, Labels, Work
from training.progress import tqdm
from training.storage import read_tensors

PAIRS = "pairs"  # name of the folder of pairs in a work folder
LEFT_OUT = "stages_without_labels"  # key of the report: stages about whose question there are no labels
Encoding = Mapping[str, Any]  # name of a field of EncodingSource -> value that the user has set
NOTHING: Encoding = MappingProxyType({})
CHOOSING = (
    1 / 3
)  # share of the prompts to choose on by which checkpoints are chosen; all others are for the test


def imported_of(
    work: Work,
    family: FlowFamily,
    labels: Path | None = None,
    device: str | torch.device = "cpu",
    encoding: Encoding = NOTHING,
    stages: Sequence[str] = (),
    campaigns: Sequence[str] = (),
    choice: LabelChoice = PEOPLE_ONLY,
) -> Imported:
    """Make pairs of every stage from labels of people, or of judges if `choice` selects them.

    Each stage learns from the answers to its own question, see `question_of`. Labels of a file or a folder
    name no question. They are used for the stages that `stages` names, and otherwise for the stages that
    learn from the question about the geometry.

    Args:
        work: work folder.
        family: family of the generator.
        labels: None: people's answers in the work folder. Path of a file: its lines are thumbs, scores, ranks
            or pairs of the work folder's assets (preferences/label_scores.py). Path of a folder: it contains
            ranked assets with ranking.jsonl, and maybe embeddings of other prompts; or samples of DSO.
        device: device on which assets are encoded.
        encoding: settings of the encoding that the user has set, see EncodingSource.
        stages: names of the stages to tune; () for all stages that have labels.
        campaigns: names of labelling projects, see `Work.labels`.
        choice: selection of the labels by their origin.
    Raises: FileNotFoundError or ValueError if there are no assets or labels yet, if the labels belong to
        other assets, or if a named stage has no labels.
    """
    if labels is None:
        imported = _read_answers(work, family, work.labels(campaigns, choice), device, encoding)
    else:
        imported = _read_labels(work, family, labels, device, encoding, choice)
        kept_stages = stages or [stage for stage in imported.pairs if question_of(family, stage) == GEOMETRY]
        left_out = [stage for stage in imported.pairs if stage not in kept_stages]
        if left_out and not stages:
            note = f"{', '.join(left_out)} (add --stage={left_out[0]} if {labels.name} is about its textures)"
            imported = replace(imported, report={**imported.report, LEFT_OUT: note})
        imported = replace(
            imported,
            pairs={stage: pairs for stage, pairs in imported.pairs.items() if stage in kept_stages},
        )
    if missing_stages := [stage for stage in stages if stage not in imported.pairs]:
        question = question_of(family, missing_stages[0])
        raise ValueError(
            f"--stage={missing_stages[0]}: this stage learns from the question about the {question}, to which"
            " there are no answers with a majority. Ask it in a further labelling project: eg3d-rlhf flow"
            f" label {work.folder} --criteria={','.join(dict.fromkeys((GEOMETRY, question)))} --set"
            " campaign=NAME"
        )
    return imported


def _read_answers(
    work: Work, family: FlowFamily, answers: Labels, device: str | torch.device, encoding: Encoding
) -> Imported:
    """Make pairs of every stage from people's answers to the question of the stage.

    Args:
        work: work folder.
        family: family of the generator.
        answers: people's answers.
        device: device on which assets are encoded.
        encoding: settings of the encoding that the user has set, see EncodingSource.
    """
    stages_by_question: dict[str, list[str]] = {}
    for stage in work.stages:
        stages_by_question.setdefault(question_of(family, stage), []).append(stage)
    report: dict[str, Any] = {
        "answers": len(answers.answers),
        "pairs": answers.pairs,
        **use_facts(answers.use),
    }
    votes_by_stage: dict[str, Votes] = {}
    for question, stages in stages_by_question.items():
        question_answers = answers.answers_to(question)
        if not question_answers.answers:
            report[LEFT_OUT] = (
                f"{', '.join(stages)} (the question about the {question} was not asked; ask it with eg3d-rlhf"
                f" flow label {work.folder} --criteria={GEOMETRY},{question} --set campaign=NAME)"
            )
            continue
        # The facts about the only question have no prefix.
        prefix = "" if len(stages_by_question) == 1 else f"{question}_"
        report[f"{prefix}ties"] = question_answers.ties
        report[f"{prefix}repeats_answered_alike"] = repeats_text(question_answers)
        votes_by_stage |= dict.fromkeys(stages, _votes_on_candidates(question_answers))
    if len(stages_by_question) > 1:
        report["questions"] = ", ".join(
            f"{question} for {' and '.join(stages)}" for question, stages in stages_by_question.items()
        )
    candidates = _candidates_of(work, family, device, encoding)
    return Imported(pairs=pair_up(candidates, votes_by_stage), report=report)


def use_facts(use: LabelUse | None) -> dict[str, Any]:
    """Return the facts about the origin of labels for the report of a training.

    Args:
        use: numbers of labels of people and of judges; None: not known, and the result is empty.
    """
    if use is None:
        return {}
    used = use.used
    facts: dict[str, Any] = {"of_people": used[PEOPLE], "of_judges": used[JUDGES]}
    left_out = use.to_dict()["left_out"]
    if sum(left_out.values()):
        facts["left_out"] = ", ".join(f"{count} of {origin}" for origin, count in left_out.items() if count)
    if used[JUDGES]:
        facts["judges"] = ", ".join(sorted(use.models))
    if use.to_dict()["uncalibrated"]:
        facts["uncalibrated"] = "no calibration of the judges against people has passed"
    return facts


def _votes_on_candidates(answers: Labels) -> Votes:
    """Return the function that counts the votes of answers on two candidates."""
    return lambda a, b: answers.votes(a.file, b.file)


def repeats_text(answers: Labels) -> str:
    """Format how many repeated answers equal the first answer, and how many would by chance.

    For example "37 of 72 (51 %, 95 % interval 40 to 63 %; answers at random: 50 %; not above chance)".
    """
    equal_count, repeated_count = answers.repeats
    if not repeated_count:
        return "0 of 0"
    low, high = wilson_interval(equal_count, repeated_count)
    comparison = "above chance" if low > answers.random_repeats else "not above chance"
    return (
        f"{equal_count} of {repeated_count} ({100 * equal_count / repeated_count:.0f} %, 95 % interval"
        f" {100 * low:.0f} to {100 * high:.0f} %; answers at random: {100 * answers.random_repeats:.0f} %;"
        f" {comparison})"
    )


def _candidates_of(
    work: Work, family: FlowFamily, device: str | torch.device, encoding: Encoding
) -> list[Candidate]:
    """Read the sampled assets of a work folder with their latents; see `imported_of` for the arguments."""
    work.lines()  # raises an error if no assets were sampled yet
    return read_candidates(
        work.asset_folder() / RANKING,
        _open_for_reading(work, family, device, encoding),
        False,  # the lines need no ranks
        make_candidate=family.candidate,
    )


def _read_labels(
    work: Work,
    family: FlowFamily,
    labels: Path,
    device: str | torch.device,
    encoding: Encoding,
    choice: LabelChoice,
) -> Imported:
    """Make pairs of every stage from a file or a folder of labels; see `imported_of` for the arguments."""
    if labels.is_dir():
        return _read_folder(family, labels, _open_for_reading(work, family, device, encoding))
    candidates = _candidates_of(work, family, device, encoding)
    asset_names = known_of(candidates)
    label_lines, use = read_counted_label_lines(labels, asset_names, choice)
    # All lines of a file have the same kind.
    if label_lines[0].kind == "pair":
        wins = Counter((line.asset, line.other) for line in label_lines if not line.tie)
        pairs = pair_up(candidates, lambda a, b: (wins[a.name, b.name], wins[b.name, a.name]))
        return Imported(
            pairs=pairs, report={"labels": labels.name, "judgements": len(label_lines), **use_facts(use)}
        )
    goodness = read_goodness(labels, asset_names, choice)
    # Minus, because a smaller rank is better, and a larger goodness is better.
    ranked_assets = [replace(c, rank=-goodness[c.name]) for c in candidates if c.name in goodness]
    return Imported(
        pairs=pair_up(ranked_assets),
        report={"labels": labels.name, "assets": len(ranked_assets), **use_facts(use)},
    )


def _open_for_reading(
    work: Work, family: FlowFamily, device: str | torch.device = "cpu", encoding: Encoding = NOTHING
) -> Any:
    """Open the generator of a work folder in order to read and encode latents.

    The weights of the flow networks are not loaded if the family allows this.

    Args:
        work: work folder.
        family: family of the generator.
        device: device on which assets are encoded.
        encoding: settings of the encoding that the user has set, see EncodingSource.
    Raises: ValueError for a setting of the encoding that the family does not use.
    """
    unused_settings = [name for name in encoding if name not in family.options]
    if unused_settings:
        raise ValueError(
            f"--set {unused_settings[0]}=VALUE has no effect on generators of the family {family.name}."
            " Remove it."
        )
    # Only encoding assets needs the device.
    encoding_device = device if isinstance(family, Encodes) else "cpu"
    configured_family = family.configured(EncodingSource(**encoding))
    return configured_family.load(Path(work.pipeline), None, stages=(), device=encoding_device)


def _read_folder(family: FlowFamily, folder: Path, pipeline: Any) -> Imported:
    """Read pairs from a folder of ranked assets or of DSO's samples.

    Args:
        family: family of the generator.
        folder: folder that the user named.
        pipeline: generator that reads and encodes latents.
    Raises: FileNotFoundError or ValueError if the folder contains neither, or if a file in it is damaged.
    """
    if not (folder / RANKING).is_file():
        if not isinstance(family, ImportsSamples):
            raise ValueError(
                f"--labels: the folder {folder} contains no {RANKING}. Name a folder with ranked assets in"
                f" {RANKING}, or a file of labels."
            )
        return family.read_samples(folder, pipeline)
    with tqdm(desc="assets", unit="asset") as bar:
        imported = read_ranking(folder / RANKING, pipeline, bar.update, family.candidate)
    # Without embeddings beside the list, the prompts are those of the work folder.
    if not version_0_1.conditioning_file(folder).is_file():
        return imported
    all_embeddings = read_conditioning(version_0_1.conditioning_file(folder), zero_null=family.zero_null)
    prompts = _prompts_in(imported)
    all_embeddings.select(prompts)  # raises an error for a prompt without an embedding
    tokens = {name: all_embeddings.tokens[name] for name in (*prompts, NULL) if name in all_embeddings.tokens}
    return replace(imported, conditioning=replace(all_embeddings, tokens=tokens))


def _prompts_in(imported: Imported) -> list[str]:
    """Return the prompts of all imported pairs, each once and sorted by name."""
    return sorted({pair.condition for pairs in imported.pairs.values() for pair in pairs})


def splits_of(work: Work, prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Split the prompts that have pairs into prompts to train on, to choose on and to test on.

    The split is that of the work folder, with its prompts to choose on divided again (see the module). If no
    prompt is in the work folder, the prompts are split by a hash of their names.

    Args:
        work: work folder.
        prompts: prompts that have pairs.
    Returns: prompts to train on, prompts to choose on, and prompts to test on.
    Raises: ValueError if there is no prompt to train on.
    """
    if not set(work.names()) & set(prompts):
        return tuple(map(tuple, split_prompts(sorted(prompts), work.seed, 0.4)))
    train_prompts = tuple(name for name in work.names(TRAIN) if name in set(prompts))
    if not train_prompts:
        raise ValueError(
            f"labels: the answers are about {len(prompts)} prompts to choose on, and none of them is about a"
            " prompt to train on. Label more pairs."
        )
    other_prompts = [name for name in work.names(CHOOSE) if name in set(prompts)]
    # A random order. The first word is part of what is hashed, so it cannot change.
    other_prompts.sort(key=lambda name: hashlib.sha256(f"tell {work.seed} {name}".encode()).digest())
    choose_count = choosing_count(len(other_prompts))
    return train_prompts, tuple(other_prompts[:choose_count]), tuple(other_prompts[choose_count:])


def choosing_count(prompt_count: int) -> int:
    """Return how many of the labelled prompts to choose on choose checkpoints; the others are held out."""
    return max(round(CHOOSING * prompt_count), 1)


def write_pairs(work: Work, family: FlowFamily, imported: Imported) -> None:
    """Write pairs into the work folder, in place of all earlier pairs.

    Args:
        work: work folder.
        family: family of the generator.
        imported: pairs of every stage, and the report of the import.
    """
    # Earlier pairs may belong to other stages, whose folders would otherwise remain.
    shutil.rmtree(work.folder / PAIRS, ignore_errors=True)
    report = dict(imported.report)
    pipeline = _open_for_reading(work, family)
    write_import(work.folder / PAIRS, imported, lambda stage: family.pair_meta(pipeline, stage, report))


def problem_of(
    work: Work,
    family: FlowFamily,
    imported: Imported,
    device: torch.device,
    encoding: Encoding = NOTHING,
    dtype: str | None = None,
    loads_networks: bool = True,
) -> Problem:
    """Open the tuning problem of the pairs in a work folder.

    Args:
        work: work folder, into which `write_pairs` has written the pairs.
        family: family of the generator.
        imported: the same pairs.
        device: device of the generator.
        encoding: settings of the encoding that the user has set, see EncodingSource.
        dtype: name of the data type of the weights; None for the default.
        loads_networks: False to open the flow networks without weights. `network_loader` then loads them one
            at a time. The networks of a bundled generator, which are small, are always loaded.
    Raises: ValueError or FileNotFoundError, see open_problem.
    """
    if dtype is not None and "dtype" not in (*family.common, *family.options):
        raise ValueError(
            f"--dtype has no effect on generators of the family {family.name}, whose weights are always"
            " float32. Remove --dtype."
        )
    pairs_folder = work.folder / PAIRS
    source = ProblemSource(
        pipeline=work.pipeline,
        pairs=str(pairs_folder),
        conditions=str(embeddings_file(work, imported)),
        seed=work.seed,
        precision=work.precision,
        splits=splits_of(work, _prompts_in(imported)),
        dtype=dtype or ProblemSource.dtype,
        **encoding,
    )
    if not family.bundled:
        return open_problem(source if loads_networks else source.stagewise(), device)
    problem = open_folder(family, source, device)
    # The rewards of a bundled generator come from its own problem, since a folder of pairs contains no
    # rewards.
    bundled_problem = family.open(ProblemSource(), device) if isinstance(family, Opens) else None
    for stage in problem.pipeline.stages:
        stage.precision = chosen_precision(work.precision, device)
    if bundled_problem is None:
        return problem
    return replace(problem, reward=bundled_problem.reward, fitted_to=bundled_problem.fitted_to)


def embeddings_file(work: Work, imported: Imported) -> Path:
    """Return the file with the embeddings of the prompts that have pairs."""
    return work.conditions_file if imported.conditioning is None else work.folder / PAIRS / CONDITIONING_FILE


def network_loader(
    work: Work, family: FlowFamily, imported: Imported, device: torch.device, dtype: str | None = None
) -> Callable[[str], nn.Module] | None:
    """Return a function that loads the flow network of one stage, and of no other stage.

    The result is None for a bundled generator, whose networks `problem_of` loads.

    Args:
        work: work folder, into which `write_pairs` has written the pairs.
        family: family of the generator.
        imported: the same pairs.
        device: device of the network.
        dtype: name of the data type of the weights; None for the default.
    """
    if family.bundled:
        return None
    weights_dtype = getattr(torch, dtype or ProblemSource.dtype)
    # The embeddings are checked against the network that is loaded.
    embeddings = read_conditioning(embeddings_file(work, imported), zero_null=family.zero_null)

    def load(stage: str) -> nn.Module:
        pipeline = family.load(
            Path(work.pipeline), embeddings, stages=(stage,), dtype=weights_dtype, device=device
        )
        return stage_of(pipeline, stage).model

    return load


# Some strategies choose the pairs to label by scores of the samples. The scores are those of an ensemble of
# networks that read the stored latents, so assets are not decoded. `eg3d-rlhf reward latent` writes the
# ensemble to the file latent-reward.safetensors of the work folder.


def check_trained(work: Work, strategy: str) -> None:
    """Raise FileNotFoundError if a work folder has no ensemble that scores samples.

    The message contains the command that trains the ensemble, on people's answers or, for a bundled
    generator, on simulated pairs.

    Args:
        work: work folder.
        strategy: value of --strategy, which needs the ensemble.
    """
    path = work.folder / REWARD
    if path.is_file():
        return
    raise FileNotFoundError(
        f"--strategy={strategy} needs an ensemble of rewards that scores samples, but there is no {path}. To"
        f" train it, run: {trained_reward_command(work)}"
    )


def trained_reward_command(work: Work) -> str:
    """Return the command that trains the ensemble of a work folder.

    Args: work: work folder.
    """
    command = f"eg3d-rlhf reward latent --pipeline={work.pipeline} --out={work.folder / REWARD}"
    if bundled_family(work.pipeline) is None:
        input_flags = f"--pairs={work.folder / PAIRS} --conditioning={work.conditions_file}"
        command = f"eg3d-rlhf flow tune {work.folder} --pairs-only && {command} {input_flags}"
    return command


def latent_ensemble(work: Work, device: torch.device, collection: Collection) -> Ensemble:
    """Open the ensemble of rewards of a work folder, which scores assets by their stored latents.

    Args:
        work: work folder.
        device: device of the generator.
        collection: assets of the labelling project; the ensemble's function takes numbers of these assets.
    Raises: ValueError for a damaged file, or for an ensemble of other networks.
    """
    family = work.check_pipeline()
    path = work.folder / REWARD
    pipeline = open_pipeline(work, family, device, *SHOWN)
    stage = stage_of(pipeline, read_tensors(path, KIND)[1]["form"]["stage"])
    reward = load(path, pipeline, stage, work.names(*SHOWN)[0])
    samples = read_candidates(work.asset_folder() / RANKING, pipeline, False, make_candidate=family.candidate)
    samples_by_file = {sample.file.name: sample for sample in samples if sample.file is not None}

    def score(asset_numbers: Sequence[int]) -> Scored:
        # The labelling project numbers assets in an order of its own, so samples are found by their file
        # names.
        scored_samples = [
            samples_by_file[collection.assets[asset_number].path.name] for asset_number in asset_numbers
        ]
        latents = collate([sample.latents[stage.name] for sample in scored_samples])
        scores, embeddings = reward.score_members(latents, [sample.condition for sample in scored_samples])
        return Scored(scores.double().numpy(), embeddings.double().numpy())

    member_count = len(reward.network.members)
    return Ensemble(
        score, member_count, [{"file": path.name, "sha256": file_hash(path), "members": member_count}]
    )
