"""Conversion of people's answers in WORK to pairs of every stage's latents and to a tuning problem.

    WORK/pairs/STAGE                        pairs of a stage; rebuilt from the answers whenever they are read
    WORK/pairs/conditioning.safetensors     embeddings of the pairs' prompts, where these are not WORK's

A third of the prompts to choose on chooses checkpoints during training. The other two thirds test whether the
labels carried a learnable signal. Test prompts are not used here.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.people.label.assets.collection import Collection
from eg3d_rlhf.preferences.label_scores import read_goodness, read_said
from eg3d_rlhf.preferences.pair_strategies import Ensemble, Scored
from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONS, NULL, read_conditions
from eg3d_rlhf.tuning.flow.base.family import Encodes, FlowFamily, ImportsSamples, Opens
from eg3d_rlhf.tuning.flow.base.problem import Problem, chosen_precision
from eg3d_rlhf.tuning.flow.base.ranking import (
    RANKING,
    Imported,
    pair_up,
    read_candidates,
    read_ranking,
    write_import,
)
from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
from eg3d_rlhf.tuning.flow.base.single_labels import known_of
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families import bundled_family
from eg3d_rlhf.tuning.flow.families.opening import divided, open_folder, open_problem
from eg3d_rlhf.tuning.flow.training.latent_reward import KIND, load
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import open_pipeline
from eg3d_rlhf.tuning.flow.workspace.work_folder import CHOOSE, REWARD, SHOWN, TRAIN, Work
from training.progress import tqdm
from training.storage import read_tensors

PAIRS = "pairs"
Encoding = Mapping[str, Any]  # the fields of EncodingSource that the user set, by name
NOTHING: Encoding = MappingProxyType({})
CHOOSING = 1 / 3  # share of the prompts to choose on that chooses checkpoints; the rest is for the test


def imported_of(
    work: Work,
    family: FlowFamily,
    labels: Path | None = None,
    device: str | torch.device = "cpu",
    encoding: Encoding = NOTHING,
) -> Imported:
    """Make pairs of every stage from the answers in WORK, from a file of labels, or from a folder.

    Args:
        labels: None: people's answers in WORK. A file: thumbs, scores, ranks or pairs of WORK's assets
            (preferences/label_scores.py). A folder: ranked assets with ranking.jsonl, and embeddings of other
            prompts beside it; or samples of DSO.
        device: on which assets are encoded.
    Raises: FileNotFoundError or ValueError for no answers or assets yet, or labels of other assets.
    """
    if labels is not None and labels.is_dir():
        return _of_folder(family, labels, _reader(work, family, device, encoding))
    people = None if labels is not None else work.labels()
    work.lines()  # raises where no assets were sampled yet
    candidates = read_candidates(
        work.drawn() / RANKING, _reader(work, family, device, encoding), False, candidate=family.candidate
    )
    if labels is None:
        assert people is not None
        answers = people  # a name that is never None, for the lambda below
        same, asked = people.repeats
        facts = {
            "answers": len(people.answers),
            "pairs": people.pairs,
            "ties": people.ties,
            "repeats_answered_alike": f"{same} of {asked}",
        }
        return Imported(pairs=pair_up(candidates, lambda a, b: answers.votes(a.file, b.file)), report=facts)
    known = known_of(candidates)
    lines = read_said(labels, known)
    if lines[0].kind == "pair":
        wins = Counter((line.asset, line.other) for line in lines if not line.tie)
        voted = pair_up(candidates, lambda a, b: (wins[a.name, b.name], wins[b.name, a.name]))
        return Imported(pairs=voted, report={"labels": labels.name, "judgements": len(lines)})
    goodness = read_goodness(labels, known)
    # a smaller rank is better and a larger goodness is better, hence the sign
    judged = [replace(c, rank=-goodness[c.name]) for c in candidates if c.name in goodness]
    return Imported(pairs=pair_up(judged), report={"labels": labels.name, "assets": len(judged)})


def _reader(
    work: Work, family: FlowFamily, device: str | torch.device = "cpu", encoding: Encoding = NOTHING
) -> Any:
    """Open the pipeline for the shapes of latents, without the flows' weights where the family allows it."""
    extra = [name for name in encoding if name not in family.options]
    if extra:
        raise ValueError(
            f"--set {extra[0]}=VALUE: {family.name} does not read this setting of the encoding of assets."
            " Remove it."
        )
    # only encoding needs the device; reading shapes does not
    where = device if isinstance(family, Encodes) else "cpu"
    configured = family.configured(EncodingSource(**encoding))
    return configured.load(Path(work.pipeline), None, stages=(), device=where)


def _of_folder(family: FlowFamily, folder: Path, pipeline: Any) -> Imported:
    """Read pairs of ranked assets or of DSO's samples. Raises: FileNotFoundError, ValueError."""
    if not (folder / RANKING).is_file():
        if not isinstance(family, ImportsSamples):
            raise ValueError(
                f"--labels: expected a file of labels or a folder with {RANKING}, got {folder}. Name one of"
                " these."
            )
        return family.read_samples(folder, pipeline)
    with tqdm(desc="assets", unit="asset", disable=None) as bar:
        imported = read_ranking(folder / RANKING, pipeline, bar.update, family.candidate)
    if not version_0_1.conditioning_file(folder).is_file():
        return imported  # no embeddings beside the list: the prompts are WORK's
    read = read_conditions(version_0_1.conditioning_file(folder), zero_null=family.zero_null)
    named = _prompts_in(imported)
    read.select(named)  # raises for prompts without an embedding
    return replace(
        imported,
        conditions=replace(
            read, tokens={name: read.tokens[name] for name in (*named, NULL) if name in read.tokens}
        ),
    )


def _prompts_in(imported: Imported) -> list[str]:
    """List the prompts of all pairs, sorted."""
    return sorted({pair.condition for pairs in imported.pairs.values() for pair in pairs})


def splits_of(work: Work, conditions: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Split prompts that have pairs into those to train on, to choose on and to test on.

    Prompts that are not WORK's are split by a hash of their names.
    Args: conditions: the prompts.
    Raises: ValueError where there is none to train on.
    """
    known = set(work.names())
    if not known & set(conditions):
        return tuple(map(tuple, divided(sorted(conditions), work.seed, 0.4)))
    train = tuple(name for name in work.names(TRAIN) if name in set(conditions))
    if not train:
        raise ValueError(
            f"labels: expected answers for prompts to train on, got answers for {len(conditions)} prompts to"
            " choose on. Label more pairs."
        )
    held = [name for name in work.names(CHOOSE) if name in set(conditions)]
    # the string seeds the split, so it keeps its spelling
    held.sort(key=lambda name: hashlib.sha256(f"tell {work.seed} {name}".encode()).digest())
    count = max(round(CHOOSING * len(held)), 1)
    return train, tuple(held[:count]), tuple(held[count:])


def write_pairs(work: Work, family: FlowFamily, imported: Imported) -> None:
    """Write the pairs into WORK, in place of earlier ones."""
    # earlier pairs may be of other stages, whose folders would stay
    shutil.rmtree(work.folder / PAIRS, ignore_errors=True)
    report = dict(imported.report)
    pipeline = _reader(work, family)
    write_import(work.folder / PAIRS, imported, lambda stage: family.pair_meta(pipeline, stage, report))


def problem_of(
    work: Work, family: FlowFamily, imported: Imported, device: torch.device, encoding: Encoding = NOTHING
) -> Problem:
    """Open the tuning problem of the pairs in WORK, which must be those of `imported`.

    Raises: see `open_problem`.
    """
    place = work.folder / PAIRS
    beside = work.conditions_file if imported.conditions is None else place / CONDITIONS
    source = ProblemSource(
        pipeline=work.pipeline,
        pairs=str(place),
        conditions=str(beside),
        seed=work.seed,
        precision=work.precision,
        splits=splits_of(work, _prompts_in(imported)),
        **encoding,
    )
    if not family.bundled:
        return open_problem(source, device)
    problem = open_folder(family, source, device)
    # a bundled generator has rewards, which a folder of pairs does not bring
    bundled = family.open(ProblemSource(), device) if isinstance(family, Opens) else None
    for stage in problem.pipeline.stages:
        stage.precision = chosen_precision(work.precision, device)
    if bundled is None:
        return problem
    return replace(problem, reward=bundled.reward, fitted_to=bundled.fitted_to)


# Scores of WORK's samples by an ensemble of networks that read their stored latents, for strategies of pairs
# that read scores; nothing is decoded. WORK/latent-reward.safetensors is the ensemble, as `eg3d-rlhf reward
# latent` writes it.


def check_trained(work: Work, strategy: str) -> None:
    """Raise FileNotFoundError, which names the command that trains the ensemble, if WORK has none.

    The ensemble is trained on people's answers; a bundled generator brings simulated ones.
    """
    path = work.folder / REWARD
    if path.is_file():
        return
    train = f"eg3d-rlhf reward latent --pipeline={work.pipeline} --out={path}"
    if bundled_family(work.pipeline) is None:
        read = f"--pairs={work.folder / PAIRS} --conditioning={work.conditions_file}"
        train = f"eg3d-rlhf flow tune {work.folder} --pairs-only && {train} {read}"
    raise FileNotFoundError(
        f"--strategy={strategy}: expected an ensemble that scores WORK's samples, got no {path}. Train it:"
        f" {train}"
    )


def latent_ensemble(work: Work, device: torch.device, collection: Collection) -> Ensemble:
    """Open WORK's ensemble, which scores the assets of a collection by their numbers.

    Raises: ValueError for a damaged file, or an ensemble of other networks.
    """
    family = work.check_pipeline()
    path = work.folder / REWARD
    pipeline = open_pipeline(work, family, device, *SHOWN)
    stage = stage_of(pipeline, read_tensors(path, KIND)[1]["form"]["stage"])
    reward = load(path, pipeline, stage, work.names(*SHOWN)[0])
    samples = read_candidates(work.drawn() / RANKING, pipeline, False, candidate=family.candidate)
    by_name = {sample.file.name: sample for sample in samples if sample.file is not None}

    def score(numbers: Sequence[int]) -> Scored:
        # the campaign numbers assets in its own order; files connect them to the list's latents
        shown = [by_name[collection.assets[number].path.name] for number in numbers]
        latents = collate([candidate.latents[stage.name] for candidate in shown])
        scores, embeddings = reward.of_members(latents, [candidate.condition for candidate in shown])
        return Scored(scores.double().numpy(), embeddings.double().numpy())

    size = len(reward.network.members)
    return Ensemble(score, size, [{"file": path.name, "sha256": file_hash(path), "members": size}])
