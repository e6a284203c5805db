"""What a reward's head reads of a U-Net's maps: the paper's profile of slices, or means and maxima over cells.

Letters: N samples, C channels, D, H, W = z, y, x.
"""

import torch
import torch.nn.functional as F


def slice_windows(slices: int, bins: int) -> torch.Tensor:
    """Index table [bins, K] int64 of the slices that each bin of an adaptive pool covers, the last one repeated to fill K.

    Bin i covers floor(i * D / bins) ... ceil((i + 1) * D / bins) - 1.
    """
    i = torch.arange(bins)
    first = i * slices // bins
    last = ((i + 1) * slices + bins - 1) // bins - 1
    width = int((last - first).max()) + 1
    return torch.minimum(first[:, None] + torch.arange(width), last[:, None])


def slice_max_feature(x: torch.Tensor, bins: int) -> torch.Tensor:
    """The paper's global feature: the profile of slices along z, stretched to `bins` values, [N, C, D, H, W] -> [N, bins].

    Equals AdaptiveMaxPool3d((bins, 1, 1)) of the channel maximum, gradients included: an entry that straddles two slices takes the
    larger and passes its gradient there. At 129 slices it holds at most 129 distinct values, so no pool of 8192 cells is run.
    """
    profile = x.max(dim=1).values.flatten(2).max(dim=2).values  # [N, D], the largest response per depth slice
    windows = slice_windows(profile.shape[1], bins).to(x.device)  # [bins, K]
    return profile[:, windows].max(dim=2).values


def grid_feature(x: torch.Tensor, cells: tuple[int, int, int]) -> torch.Tensor:
    """Mean and maximum of every channel in every cell of a coarse z, y, x grid: [N, C, D, H, W] -> [N, 2 * C * cells].

    Differentiable in: x. Keeps where along y and x a response lies, which the slice profile forgets.
    """
    means = F.adaptive_avg_pool3d(x, cells)
    return torch.cat([means.flatten(1), F.adaptive_max_pool3d(x, cells).flatten(1)], dim=1)
