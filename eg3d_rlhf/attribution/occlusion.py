"""Two cheap attributions beside the Shapley values: occlusion, and a noise baseline that has the change's size but not its shape."""

import numpy as np
import torch

from eg3d_rlhf.attribution.coalitions import Value


def occlusion(value: Value, regions: int) -> np.ndarray:
    """What the tuned slab loses when one region is set back to the original, [R]: v(all) - v(all but i) (Zeiler and Fergus 2014)."""
    everything = torch.ones(regions + 1, regions, dtype=torch.bool)
    everything[torch.arange(regions), torch.arange(regions)] = False
    values = value(everything).numpy()
    return values[-1] - values[:-1]


def shuffled_change(original: torch.Tensor, tuned: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """The original slab [1, D, H, W] with the change tuned - original shuffled among the voxels of each region [D, H, W].

    Same regions, same amount of change in each, no shape: whatever is attributed to it is the reward's response to noise of that energy.
    """
    change = (tuned - original).flatten().cpu()
    flat, out = labels.flatten().cpu(), torch.empty_like(change)
    generator = torch.Generator().manual_seed(seed)
    for region in range(int(flat.max()) + 1):
        voxels = torch.nonzero(flat == region).squeeze(1)
        out[voxels] = change[voxels[torch.randperm(len(voxels), generator=generator)]]
    return original + out.reshape(original.shape).to(original)
