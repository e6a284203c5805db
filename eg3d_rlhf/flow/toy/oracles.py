"""Three judges of finished assets that know what was asked for, and look at it in different ways.

    LabelOracle    overlap over union, and root mean square of the colour's error: labels the people's pairs
    ChooserOracle  distances to the shape and back, and the share of voxels in the right colour: held-out win rate and early stop
    FinalOracle    Dice overlap, the number of connected parts, symmetry, and the colour's mean absolute error: the final table alone

All are AssetRewards: geometry + colour, larger is better. Any variant of the shape will do; the one that an asset fits best counts.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import ndimage

from eg3d_rlhf.flow.toy.pipeline import ToyAsset
from eg3d_rlhf.flow.toy.shapes import R, canonical_shapes, classes, targets

RIGHT_COLOUR = 0.15  # largest error of a channel that ChooserOracle lets pass


@dataclass(frozen=True)
class _Views:
    """Assets beside what was asked for; P = R^3 places."""

    filled: torch.Tensor  # [N, P] float, 0 or 1
    wanted: torch.Tensor  # [N, K, P] float, 0 or 1
    colour_error: torch.Tensor  # [N, P, 3], 0 where nothing is filled

    @classmethod
    def of(cls, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> "_Views":
        if len(assets) != len(conditions) or not assets:
            raise ValueError(f"oracle: expected as many conditions as assets, got {len(conditions)} and {len(assets)}. Give one each.")
        shapes, colours = targets(conditions)
        filled = torch.stack([asset.occupancy for asset in assets]).flatten(1).float()
        painted = torch.stack([asset.colours for asset in assets])
        return cls(filled, shapes.flatten(2).float(), (painted - colours).flatten(1, 3) * filled[..., None])

    @property
    def overlap(self) -> torch.Tensor:
        """[N, K]: voxels in common with every variant."""
        return torch.einsum("np,nkp->nk", self.filled, self.wanted)

    @property
    def sizes(self) -> torch.Tensor:
        """[N, K]: voxels of the asset plus those of every variant."""
        return self.filled.sum(1, keepdim=True) + self.wanted.sum(2)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[N, P] -> [N]: mean over the filled places."""
        return (values * self.filled).sum(1) / self.filled.sum(1)


class _Oracle(ABC):
    """Geometry plus colour."""

    @abstractmethod
    def parts(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The scores "geometry" and "colour", each [N] float32."""

    def __call__(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32: the sum of both."""
        found = self.parts(assets, conditions)
        return found["geometry"] + found["colour"]


class LabelOracle(_Oracle):
    """Geometry 4 IoU, colour -4 RMSE."""

    def parts(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """See _Oracle."""
        views = _Views.of(assets, conditions)
        iou = (views.overlap / (views.sizes - views.overlap)).amax(1)
        return {"geometry": 4 * iou, "colour": -4 * views.mean(views.colour_error.square().mean(2)).sqrt()}


class ChooserOracle(_Oracle):
    """Geometry -2 mean distance in voxels, there and back; colour the share of voxels within RIGHT_COLOUR in every channel."""

    def parts(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """See _Oracle."""
        views = _Views.of(assets, conditions)
        to_shape = _distances_to_shapes()[classes(conditions)[0]]  # [N, K, P]
        to_asset = torch.stack([_distance(asset.occupancy) for asset in assets])  # [N, P]
        there = torch.einsum("np,nkp->nk", views.filled, to_shape) / views.filled.sum(1, keepdim=True)
        back = torch.einsum("np,nkp->nk", to_asset, views.wanted) / views.wanted.sum(2)
        right = (views.colour_error.abs().amax(2) <= RIGHT_COLOUR).float()
        return {"geometry": -2 * (there + back).amin(1), "colour": views.mean(right)}


class FinalOracle(_Oracle):
    """Geometry Dice + symmetry - 0.03 for every part beyond the first; colour -3 mean absolute error."""

    def parts(self, assets: Sequence[ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """See _Oracle."""
        views = _Views.of(assets, conditions)
        dice = (2 * views.overlap / views.sizes).amax(1)
        mirrored = torch.stack([asset.occupancy.flip(0) for asset in assets]).flatten(1)
        more = torch.tensor([_parts(asset.occupancy) - 1 for asset in assets])
        colour = -3 * views.mean(views.colour_error.abs().mean(2))
        return {"geometry": dice + views.mean(mirrored.float()) - 0.03 * more, "colour": colour}


def parts(assets: Sequence[ToyAsset], conditions: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """Sub-scores of the final oracle: "geometry" and "colour", each [N]."""
    return FinalOracle().parts(assets, conditions)


@functools.cache
def _distances_to_shapes() -> torch.Tensor:
    """Distance of every place to every shape, [shapes, K, R^3], in voxels; 0 inside."""
    shapes = canonical_shapes()
    return torch.stack([_distance(shape) for shape in shapes.flatten(0, 1)]).unflatten(0, shapes.shape[:2])


def _distance(filled: torch.Tensor) -> torch.Tensor:
    """[R^3]: from every place to the nearest filled one."""
    return torch.from_numpy(ndimage.distance_transform_edt(~filled.numpy())).float().view(R**3)


def _parts(filled: torch.Tensor) -> int:
    """Number of parts that hang together by faces."""
    return ndimage.label(filled.numpy())[1]
