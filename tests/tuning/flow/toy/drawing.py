"""Assets of the toy with chosen defects, for tests."""

import torch

from eg3d_rlhf.tuning.flow.toy.names import PROMPTS
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import Defects, ToyAsset, draw_drafts, make_assets, targets

PERFECT = Defects(floaters=0, holes=0, unrepaired=0, wrong=0, tint=0, noise=0)


def perfect(prompts, variant=0) -> list[ToyAsset]:
    """Just what was asked for."""
    shapes, colours = targets(prompts)
    return [
        ToyAsset(shape, colour * shape[..., None])
        for shape, colour in zip(shapes[:, variant], colours, strict=True)
    ]


def drawn(n=64, seed=0, defects=None) -> tuple[list[ToyAsset], list[str]]:
    """Assets of drafts and their conditions."""
    names = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    return make_assets(draw_drafts(names, torch.Generator().manual_seed(seed), defects)), names
