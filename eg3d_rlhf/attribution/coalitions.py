"""The value of a coalition of regions: the reward of the original slab with those regions replaced by the tuned slab's.

Both slabs are normalised already, each on its own scale; the mixture is not normalised again, so that a voxel keeps its value.
Letters: M coalitions, R regions, B slabs at once, V voxels, D, H, W = z, y, x.
"""

from collections.abc import Callable, Sequence

import torch

Score = Callable[[torch.Tensor], torch.Tensor]  # slabs [B, 1, D, H, W] -> rewards [B]
Value = Callable[[torch.Tensor], torch.Tensor]  # coalitions, bool [M, R] -> values [M] float64


class CoalitionValues:
    """Values of coalitions of one latent; each is computed once, in batches.

    Args:
        score: the reward; slabs: original and tuned, [1, D, H, W] each; labels: [D, H, W] int64, the region of each voxel.
        regions: R; batch: slabs at once, which bounds memory: B slabs and what the reward makes of them.
    """

    def __init__(self, score: Score, original: torch.Tensor, tuned: torch.Tensor, labels: torch.Tensor, regions: int, batch: int = 16):
        if original.shape != tuned.shape or tuple(original.shape[1:]) != tuple(labels.shape):
            got = f"{list(original.shape)}, {list(tuned.shape)}, {list(labels.shape)}"
            raise ValueError(f"CoalitionValues: expected slabs [1, D, H, W] and labels [D, H, W] of one size, got {got}. Use one SlabSpec.")
        if batch < 1:
            raise ValueError(f"CoalitionValues: expected batch >= 1, got {batch}. Raise --batch.")
        self.score, self.regions, self.batch = score, regions, batch
        self.original, self.tuned = original, tuned
        flat = labels.flatten().to(original.device)
        self.voxels = [torch.nonzero(flat == region).squeeze(1) for region in range(regions)]  # [V of the region] each
        self.differs = [bool((original.flatten()[v] != tuned.flatten()[v]).any()) for v in self.voxels]
        self.known: dict[int, float] = {}
        self.evaluations = 0  # slabs that the reward has read

    def keys(self, coalitions: torch.Tensor) -> list[int]:
        """One integer per coalition; regions in which the slabs are equal do not count, since they change nothing."""
        weights = torch.tensor([1 << i if d else 0 for i, d in enumerate(self.differs)], dtype=torch.int64)
        return (coalitions.cpu().to(torch.int64) * weights).sum(dim=1).tolist()

    def mixed(self, keys: Sequence[int]) -> torch.Tensor:
        """Slabs [B, 1, D, H, W] of coalitions.

        Neighbours in the list mostly share regions, so each slab is a copy of the one before with the regions that differ written over.
        """
        slabs = self.original.new_empty(len(keys), self.original.numel())
        sources, before, last = (self.original.flatten(), self.tuned.flatten()), None, None
        for row, key in zip(slabs, keys, strict=True):
            changed = range(self.regions)
            if last is not None:
                row.copy_(before)
                changed = [i for i in changed if (last ^ key) >> i & 1]
            for i in changed:
                row[self.voxels[i]] = sources[key >> i & 1][self.voxels[i]]
            before, last = row, key
        return slabs.reshape(len(keys), *self.original.shape)

    @torch.no_grad()
    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Values [M] float64 of coalitions, bool [M, R]."""
        keys = self.keys(coalitions)
        todo = sorted({key for key in keys if key not in self.known}, key=_gray_rank)
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            values = self.score(self.mixed(part)).double().cpu().tolist()
            self.evaluations += len(part)
            self.known.update(zip(part, values, strict=True))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    @torch.no_grad()
    def difference(self) -> float:
        """Reward of the tuned slab less that of the original one, from the slabs themselves: no regions, masks or cache are involved."""
        tuned, original = (float(self.score(slab[None]).double()) for slab in (self.tuned, self.original))
        return tuned - original


def _gray_rank(key: int) -> int:
    """Place of a bit pattern in the reflected Gray code, in which neighbours differ in one bit."""
    rank = 0
    while key:
        rank ^= key
        key >>= 1
    return rank


def all_coalitions(regions: int) -> torch.Tensor:
    """Every coalition, bool [2^R, R]; row k holds the bits of k, the lowest first."""
    k = torch.arange(1 << regions)
    return (k[:, None] >> torch.arange(regions) & 1).bool()
