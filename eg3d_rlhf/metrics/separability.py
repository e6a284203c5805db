"""Do two networks' items lie apart? Nearest neighbours of pooled features, with a permutation test that keeps pairs.

Letters: N pairs, F features, K neighbours, B permutations.
"""

from dataclasses import asdict, dataclass

import numpy as np

NEIGHBOURS = 10
PERMUTATIONS = 2000
TEST = "permutation test that swaps the two networks within each latent"
_BLOCK_CELLS = 8_000_000  # compared labels held at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Separability:
    """Share of neighbours from the own set, and how often chance gives as much."""

    share: float  # 0..1; 0.5 expected where the sets are alike
    p: float  # (1 + permutations with at least this share) / (1 + permutations)
    chance: np.ndarray  # [B] shares under permutations
    k: int
    n: int  # pairs

    def to_dict(self) -> dict:
        """JSON types."""
        return {**asdict(self), "chance": self.chance.tolist()}


def neighbours(pooled: np.ndarray, k: int) -> np.ndarray:
    """Indices [2N, K] of each item's nearest others; items i and i + N are partners and never count as each other's neighbours.

    Args: pooled [2N, F]. Partners share a latent: with them, nearness would tell of the latent and the share expected by chance would not
    be one half.
    """
    n = len(pooled) // 2
    centred = pooled - pooled.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * centred @ centred.T
    rows = np.arange(2 * n)
    distance[rows, rows] = distance[rows, (rows + n) % (2 * n)] = np.inf
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def paired_separability(
    first: np.ndarray, second: np.ndarray, k: int = NEIGHBOURS, permutations: int = PERMUTATIONS, seed: int = 0
) -> Separability:
    """Mean share of an item's K nearest neighbours (Euclidean, both sets pooled) that are of its own set (Schilling 1986).

    Under no difference the two items of a latent can be swapped, so the null distribution swaps at random within pairs; the p-value is
    exact at any N (Phipson and Smyth 2010).
    Args: first, second [N, F]: item i of both belongs to the same latent; N > K.
    Raises: ValueError on shapes, values that are not finite, or too few pairs.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"paired_separability: expected two finite sets [N, F] of the same latents, got {a.shape}, {b.shape}. Pair them.")
    n = len(a)
    if not 1 <= k < n or permutations < 99:
        raise ValueError(
            f"paired_separability: expected 1 <= k < N and 99 permutations or more, got k = {k}, N = {n}, {permutations}. Add latents."
        )
    near = neighbours(np.concatenate([a, b]), k)
    swaps = np.random.default_rng(seed).integers(0, 2, size=(permutations + 1, n), dtype=np.int8)
    swaps[0] = 0  # as observed
    labels = np.concatenate([swaps, 1 - swaps], axis=1)  # [B + 1, 2N]
    step = max(1, _BLOCK_CELLS // near.size)
    shares = np.concatenate([
        (part[:, near] == part[:, :, None]).mean(axis=(1, 2)) for part in np.array_split(labels, -(-len(labels) // step))
    ])
    share, chance = float(shares[0]), shares[1:]
    p = (1 + int((chance >= share - 1e-12).sum())) / (1 + permutations)
    return Separability(share=share, p=p, chance=chance, k=k, n=n)
