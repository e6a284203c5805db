"""Pairs as people would have judged them: drafts in twos, made into assets, the better one called by a noisy annotator."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.flow.pairs import PreferencePair
from eg3d_rlhf.flow.sparse import SparseBatch
from eg3d_rlhf.flow.toy.defects import Defects, Drafts, draw_drafts
from eg3d_rlhf.flow.toy.oracles import LabelOracle
from eg3d_rlhf.flow.toy.pipeline import ToyAsset, make_assets

TEMPERATURE = 0.2  # of the annotator, in units of LabelOracle's score


@dataclass(frozen=True)
class Judged:
    """P pairs of one condition each, the better draft first."""

    conditions: tuple[str, ...]
    preferred: Drafts
    rejected: Drafts
    assets: tuple[list[ToyAsset], list[ToyAsset]]  # preferred, rejected
    agrees: torch.Tensor  # [P] bool: whether the annotator said what the oracle thinks


def judge_drafts(conditions: Sequence[str], generator: torch.Generator, defects: Defects | None = None) -> Judged:
    """One pair per condition.

    P(first is called better) = sigmoid((s_first - s_second) / TEMPERATURE), s LabelOracle's (Bradley and Terry 1952).
    """
    drafts = [draw_drafts(conditions, generator, defects) for _ in range(2)]
    assets = [make_assets(one) for one in drafts]
    oracle = LabelOracle()
    gap = oracle(assets[0], conditions) - oracle(assets[1], conditions)
    first = torch.rand(len(gap), generator=generator) < torch.sigmoid(gap / TEMPERATURE)  # [P]

    def chosen(take: torch.Tensor) -> tuple[Drafts, list[ToyAsset]]:
        grids = take.view(-1, 1, 1, 1)
        a, b = drafts
        picked = Drafts(torch.where(grids, a.structure, b.structure), torch.where(grids[..., None], a.features, b.features))
        return picked, [x if one else y for one, x, y in zip(take.tolist(), *assets, strict=True)]

    (preferred, better), (rejected, worse) = chosen(first), chosen(~first)
    return Judged(tuple(conditions), preferred, rejected, (better, worse), (gap > 0) == first)


def human_pairs(stage: str, conditions: Sequence[str], per_condition: int, seed: int) -> list[PreferencePair]:
    """Pairs of a stage's latents; the same assets at every stage, whatever else is asked for."""
    pairs = []
    for condition in conditions:
        own = zlib.crc32(f"{seed} {condition}".encode())
        judged = judge_drafts([condition] * per_condition, torch.Generator().manual_seed(own))
        both = [judged.preferred.latents(stage), judged.rejected.latents(stage)]
        both = [batch.samples() if isinstance(batch, SparseBatch) else list(batch) for batch in both]
        for i, (preferred, rejected) in enumerate(zip(*both, strict=True)):
            name = f"{condition.replace(' ', '-')}-{seed}-{i:03d}"
            origin = {"seed": seed, "number": i}
            pairs.append(PreferencePair(
                id=name, condition=condition, stage=stage, preferred=preferred, rejected=rejected, provenance=origin,
            ))  # fmt: skip
    return pairs
