"""Which pairs teach most: those over which a small ensemble of rewards disagrees, spread over the shapes there are.

The disagreement over a pair is the standard deviation, over the members, of the probability that the first shape is better (Christiano et
al. 2017, arXiv 1706.03741, 2.2.4: queries by the variance across an ensemble), P = sigmoid((r_a - r_b) / T), T the member's temperature.
By itself that picks the same doubt over and over, so pairs are chosen one by one, by disagreement and by their distance to the nearest pair
already chosen in the space of the rewards' embeddings (greedy max-min).

Letters: S seeds, K members, M entries of all embeddings, C candidate pairs, P chosen pairs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from eg3d_rlhf import bundled
from eg3d_rlhf.cli import file_hash
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.reward.ensemble import RewardEnsemble
from eg3d_rlhf.reward.files import load_reward
from eg3d_rlhf.reward.model import RewardModel
from eg3d_rlhf.reward.slabs import generator_slabs
from eg3d_rlhf.sigma.spec import SlabSpec

BUNDLED = (bundled.REWARD, bundled.WATCH)  # trained apart on the same labels
_BATCH = 16  # seeds drawn at once
_MATCHINGS = 4  # random pairings of all seeds that candidates come from

Tell = Callable[[int, int], None]  # (seeds judged, seeds in all)


@dataclass(frozen=True)
class Member:
    """One reward of the ensemble."""

    model: RewardModel
    spec: SlabSpec
    temperature: float  # margins are divided by it


@dataclass(frozen=True)
class Judged:
    """What an ensemble makes of seeds."""

    scores: np.ndarray  # [K, S], in units of each member's temperature
    embeddings: np.ndarray  # [S, M]


@dataclass(frozen=True)
class Selection:
    """Pairs in the order in which they were chosen, and why."""

    pairs: np.ndarray  # [P, 2], indices of seeds
    disagreement: np.ndarray  # [P]
    distance: np.ndarray  # [P] to the nearest pair chosen before; infinite for the first


def load_members(paths: Sequence[str | Path], generator: str) -> tuple[list[Member], list[dict]]:
    """The ensemble in reward files, each holding one reward or several, and a description of every file.

    Args: paths: none for the bundled two; generator: hash of the one whose shapes are judged.
    Raises: ValueError for fewer than two members, which cannot disagree.
    """
    members, described = [], []
    for path in map(Path, paths or BUNDLED):
        model, spec, meta = load_reward(path)
        parts = list(model.members) if isinstance(model, RewardEnsemble) else [model]
        members += [Member(part, spec, float(meta.get("temperature", 1.0))) for part in parts]
        described.append({"file": path.name, "sha256": file_hash(path), "members": len(parts)})
        if meta.get("generator") not in (None, generator):
            warnings.warn(f"active selection: {path.name} knows the shapes of another generator; its doubts may say little.", stacklevel=2)
    if len(members) < 2:
        raise ValueError(f"active selection: expected at least 2 rewards, got {len(members)}. Name another file as well.")
    return members, described


@torch.no_grad()
def judge(generator: LoadedGenerator, seeds: Sequence[int], psi: float, members: Sequence[Member], tell: Tell | None = None) -> Judged:
    """Scores and embeddings of seeds; the slabs are drawn in batches and not kept."""
    sources = {member.spec: generator_slabs(generator.G, member.spec, psi=psi) for member in members}
    scores, embeddings = [], []
    for start in range(0, len(seeds), _BATCH):
        part = seeds[start : start + _BATCH]
        slabs = {spec: draw(part) for spec, draw in sources.items()}
        seen = [member.model.embed(slabs[member.spec]) for member in members]
        score = [member.model.score_embedding(e) / member.temperature for member, e in zip(members, seen, strict=True)]
        scores.append(torch.stack(score).double().numpy())
        embeddings.append(torch.cat(seen, dim=1).double().numpy())
        if tell is not None:
            tell(start + len(part), len(seeds))
    return Judged(np.concatenate(scores, axis=1), np.concatenate(embeddings))


def disagreement(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Standard deviation [C] over the members of P(first better) for pairs [C, 2], from scores [K, S]. Swapping a pair changes nothing."""
    return expit(scores[:, pairs[:, 0]] - scores[:, pairs[:, 1]]).std(axis=0)


def pair_features(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Where pairs [C, 2] lie, whichever shape comes first: middle and distance of the standardised embeddings, [C, 2 M]."""
    spread = embeddings.std(axis=0)
    standard = np.divide(embeddings - embeddings.mean(axis=0), spread, out=np.zeros_like(embeddings), where=spread > 0)
    a, b = standard[pairs[:, 0]], standard[pairs[:, 1]]
    return np.concatenate([(a + b) / 2, np.abs(a - b) / 2], axis=1) / np.sqrt(2 * embeddings.shape[1])


def candidates(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Candidate pairs [C, 2] of 0..S-1, ordered within the pair: several random pairings of all seeds, without repeats."""
    rows = [rng.permutation(seeds)[: seeds - seeds % 2].reshape(-1, 2) for _ in range(_MATCHINGS)]
    return np.unique(np.sort(np.concatenate(rows), axis=1), axis=0)


def select(judged: Judged, pairs: np.ndarray, count: int, diversity: float) -> Selection:
    """`count` of the candidate pairs [C, 2], no seed in two of them.

    Each step takes the pair with the greatest (1 - diversity) * disagreement + diversity * distance, both in shares of the greatest among
    the candidates left; distance is that to the nearest pair chosen so far, and counts from the second step on.
    Args: diversity 0 (disagreement alone) .. 1 (after the first pair, distance alone).
    Raises: ValueError where the candidates do not hold so many disjoint pairs.
    """
    doubt, features = disagreement(judged.scores, pairs), pair_features(judged.embeddings, pairs)
    nearest, free = np.full(len(pairs), np.inf), np.ones(len(pairs), dtype=bool)
    chosen, distances = [], []
    for _ in range(count):
        if not free.any():
            raise ValueError(f"active selection: expected {count} disjoint pairs, found {len(chosen)} among {len(pairs)}. Raise the pool.")
        worth = (1 - diversity) * _share(doubt, free)
        if chosen:
            worth += diversity * _share(nearest, free)
        best = int(np.where(free, worth, -np.inf).argmax())
        chosen.append(best)
        distances.append(nearest[best])
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
        free &= ~np.isin(pairs, pairs[best]).any(axis=1)
    return Selection(pairs[chosen], doubt[chosen], np.array(distances))


def _share(values: np.ndarray, free: np.ndarray) -> np.ndarray:
    greatest = values[free].max()
    return values / greatest if greatest > 0 else np.zeros_like(values)
