"""Which of the loop's pairs are kept and how much each counts: w1 filters, w2 weighs (Circular-DPO, equations 10-14).

    w1 = G_preferred - G_rejected,  G = 2^P - 1,  P_i = 2 C_i / (n (n - 1)),  C_i the comparisons that candidate i of n wins by reward
    w2 = sigmoid(r_preferred - r_rejected) / its mean over the pairs that are kept

With one reward and a threshold of 0, w1 keeps a pair exactly where its reward gap is positive, whatever the other candidates.
Deviates: the paper attributes w2 to Dr. DPO, whose weights come from the policy's own losses; that is preference_loss.aggregate.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from eg3d_rlhf.flow.pairs import PreferencePair, check_unique
from eg3d_rlhf.flow.sparse import SparseSample

W2_NORMS = ("dataset", "batch", "none")
SAME = 1e-5  # of the largest value: latents that differ by less are one structure, encoded twice


def win_shares(rewards: torch.Tensor) -> torch.Tensor:
    """P of each candidate, rewards [n] -> [n] float64 that sum to 1; an equal reward is half a win for both.

    >>> win_shares(torch.tensor([3.0, 1.0, 2.0]))
    tensor([0.6667, 0.0000, 0.3333], dtype=torch.float64)
    """
    n = len(rewards)
    if n < 2 or not torch.isfinite(rewards).all():
        raise ValueError(f"win_shares: expected finite rewards of two candidates or more, got {rewards.tolist()}. Check the reward.")
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards).double()
    return 2 * (wins.sum(1) - 0.5) / (n * (n - 1))  # less the half win against itself


def gain(shares: torch.Tensor) -> torch.Tensor:
    """2^P - 1."""
    return torch.exp2(shares) - 1


def w1(rewards: torch.Tensor, preferred: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """w1 of pairs among candidates, [P] float64.

    Args: rewards [n] of all candidates of one condition; preferred, rejected [P] int64 indices into them.
    """
    gains = gain(win_shares(rewards))
    return gains[preferred] - gains[rejected]


def w2(gaps: torch.Tensor, kept: torch.Tensor, norm: str = "dataset") -> torch.Tensor:
    """sigmoid of the reward gaps, [P] -> [P] float64; "dataset": over its mean where `kept` [P] bool, so that the mean there is 1.

    "none" and "batch" leave it as it is; draw_pairs divides the latter's by the mean of each batch.
    """
    if norm not in W2_NORMS:
        raise ValueError(f"w2: expected norm one of {', '.join(W2_NORMS)}, got {norm!r}. Choose one.")
    weights = torch.sigmoid(gaps.double())
    return weights / weights[kept].mean() if norm == "dataset" and kept.any() else weights


def same_structure(pair: PreferencePair) -> bool:
    """Whether both latents are one, so that there is nothing to learn; what `provenance` says under "same_structure" goes first."""
    marked = pair.provenance.get("same_structure")
    if marked is not None:
        return bool(marked)
    a, b = pair.preferred, pair.rejected
    if isinstance(a, SparseSample):
        if len(a.coords) != len(b.coords):
            return False
        (a_order, a_coords), (b_order, b_coords) = _sorted(a), _sorted(b)
        return torch.equal(a_coords, b_coords) and _close(a.feats[a_order], b.feats[b_order])
    return _close(a, b)


def _sorted(sample: SparseSample) -> tuple[torch.Tensor, torch.Tensor]:
    x, y, z = sample.coords.long().unbind(1)
    order = torch.argsort((x << 42) + (y << 21) + z)
    return order, sample.coords[order]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * a.abs().max())


def weigh(
    pairs: Sequence[PreferencePair], tau: float = 0.0, use_w1: bool = True, use_w2: bool = True, w2_norm: str = "dataset"
) -> tuple[list[PreferencePair], dict]:
    """The pairs that are kept, with w1 and w2 filled, and a report of how many were dropped and why.

    Pairs of one structure go first, then, with `use_w1`, those with w1 <= tau; both ends of all pairs of a condition are its candidates.
    Without `use_w1` the column w1 is filled and drops nothing; without `use_w2` the column w2 stays empty and all pairs count alike.
    Raises: ValueError for pairs without finite rewards where these are needed.
    """
    if not math.isfinite(tau):
        raise ValueError(f"weigh: expected a finite tau, got {tau}. 0 keeps what the reward prefers.")
    check_unique("weigh", pairs)
    differing = [p for p in pairs if not same_structure(p)]
    scored = bool(pairs) and all(p.reward_preferred is not None and p.reward_rejected is not None for p in pairs)
    if pairs and (use_w1 or use_w2) and not scored:
        unscored = next(p for p in pairs if p.reward_preferred is None or p.reward_rejected is None)
        raise ValueError(f"weigh: expected both rewards on every pair, got none on {unscored.id}. Score the assets first.")
    values = _w1_of(pairs) if scored else {}
    kept = [p for p in differing if not use_w1 or values[p.id] > tau]
    weights: list[float | None] = [None] * len(kept)
    if use_w2 and kept:
        gaps = torch.tensor([p.reward_preferred - p.reward_rejected for p in kept], dtype=torch.float64)
        weights = w2(gaps, torch.ones(len(kept), dtype=torch.bool), w2_norm).tolist()
    note = {"w2_norm": w2_norm} if use_w2 else {}
    columns = [replace(p, w1=values.get(p.id), w2=w, provenance={**p.provenance, **note}) for p, w in zip(kept, weights, strict=True)]
    report = {
        "pairs": len(pairs), "kept": len(kept),
        "dropped": {"same_structure": len(pairs) - len(differing), "w1": len(differing) - len(kept)},
        "tau": tau if use_w1 else None, "w2_norm": w2_norm if use_w2 else None,
        "w1": _summary([values[p.id] for p in differing] if scored else []),
        "w2": _summary([w for w in weights if w is not None]),
        "reward_gap": _summary([p.reward_preferred - p.reward_rejected for p in kept] if scored else []),
    }  # fmt: skip
    return columns, report


def _w1_of(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """w1 by pair id, among the candidates of each condition."""
    groups: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.condition].append(pair)
    found = {}
    for group in groups.values():
        m = len(group)
        rewards = torch.tensor([p.reward_preferred for p in group] + [p.reward_rejected for p in group], dtype=torch.float64)
        values = w1(rewards, torch.arange(m), torch.arange(m, 2 * m))
        found.update({p.id: float(v) for p, v in zip(group, values, strict=True)})
    return found


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None
