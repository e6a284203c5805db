"""Scores of WORK's samples by an ensemble of networks that read their stored latents, for strategies of pairs
that read scores; nothing is decoded.

    WORK/latent-reward.safetensors      the ensemble, as `eg3d-rlhf reward latent` writes it
"""

from collections.abc import Sequence

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.people.label.assets.collection import Collection
from eg3d_rlhf.preferences.pair_strategies import Ensemble, Scored
from eg3d_rlhf.tuning.flow.base.ranking import RANKING, read_candidates
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families import bundled_family
from eg3d_rlhf.tuning.flow.training.latent_reward import KIND, load
from eg3d_rlhf.tuning.flow.workspace.answers import PAIRS
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import open_pipeline
from eg3d_rlhf.tuning.flow.workspace.work_folder import REWARD, SHOWN, Work
from training.storage import read_tensors


def check_trained(work: Work, strategy: str) -> None:
    """Raise FileNotFoundError, which names the command that trains the ensemble, if WORK has none. People's
    answers train it; a bundled generator brings simulated ones.
    """
    path = work.folder / REWARD
    if path.is_file():
        return
    train = f"eg3d-rlhf reward latent --pipeline={work.pipeline} --out={path}"
    if bundled_family(work.pipeline) is None:
        read = f"--pairs={work.folder / PAIRS} --conditioning={work.conditions_file}"
        train = f"eg3d-rlhf flow tune {work.folder} --pairs-only && {train} {read}"
    raise FileNotFoundError(
        f"--strategy={strategy}: expected rewards that score WORK's samples, got no {path}. Train them:"
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
        shown = [by_name[collection.assets[number].path.name] for number in numbers]
        latents = collate([candidate.latents[stage.name] for candidate in shown])
        scores, embeddings = reward.of_members(latents, [candidate.condition for candidate in shown])
        return Scored(scores.double().numpy(), embeddings.double().numpy())

    size = len(reward.network.members)
    return Ensemble(score, size, [{"file": path.name, "sha256": file_hash(path), "members": size}])
