"""Rewards of finished assets that are fitted to preference pairs.

They read where an asset is filled and which colours it has there. They do not read conditions: they compare
assets of one condition, as w1, w2 and win rates do.

Shape letters: N assets, P pairs, F features, K cells per axis.
"""

from collections.abc import Sequence

import torch

from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.stage import Pipeline
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset
from training.progress import tqdm

CELLS = 8  # per axis of the cube
FITTING_STEPS = 200


def features(asset: SplatAsset, cells: int = CELLS) -> torch.Tensor:
    """[F] float32, F = 4 K^3: per cell the logarithm of 1 + its opacity, and its mean colour less grey."""
    asset = asset.to("cpu")  # sums there do not depend on the order of threads
    places = ((asset.means + 0.5) * cells).floor().long()
    inside = ((places >= 0) & (places < cells)).all(1)
    x, y, z = places[inside].unbind(1)
    cell = (x * cells + y) * cells + z
    opacity = asset.opacities[inside].float()
    mass = opacity.new_zeros(cells**3).index_add(0, cell, opacity)
    colour = opacity.new_zeros(cells**3, 3).index_add(
        0, cell, opacity[:, None] * (asset.colours[inside].float() - 0.5)
    )
    return torch.cat([mass.log1p(), (colour / mass.clamp_min(1e-6)[:, None]).flatten()])


class LinearReward:
    """score = w . (features - mean) / std; an AssetReward."""

    def __init__(self, preferred: torch.Tensor, rejected: torch.Tensor, ridge: float = 1.0):
        """Fit by Bradley-Terry to the features of pairs [P, F] each, with ridge / 2 |w|^2 / P added to the
        mean loss.
        """
        both = torch.cat([preferred, rejected]).double()
        self.mean = both.mean(0)
        self.std = both.std(0).clamp_min(1e-6) * both.shape[1] ** 0.5
        gaps = (preferred - rejected).double() / self.std  # [P, F]
        self.weight = torch.zeros(gaps.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = preference_loss(gaps @ self.weight).mean() + ridge / 2 * self.weight.square().sum() / len(
                gaps
            )
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(step)
        self.weight.requires_grad_(False)

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        observed = torch.stack([features(asset) for asset in assets]).double()
        return (((observed - self.mean) / self.std) @ self.weight).float()


class RewardOfPairs:
    """A LinearReward that is fitted when it is first asked; an AssetReward."""

    def __init__(
        self,
        pipeline: Pipeline,
        pairs: Sequence[PreferencePair],
        title: str,
        ridge: float = 1.0,
    ):
        """Args: pairs: of the last stage, whose latents are decoded; title: for the progress bar."""
        self._pipeline = pipeline
        self._pairs = pairs
        self._title = title
        self._ridge = ridge
        self._reward: LinearReward | None = None

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32. Raises: ValueError where there is no pair to learn from."""
        if self._reward is None:
            pairs = self._pairs
            if not pairs:
                got = "expected pairs of finished assets to learn from, got none"
                raise ValueError(f"{self._title}: {got}. Import pairs of the last stage.")
            known: dict[int, torch.Tensor] = {}
            latents = {id(latent): latent for p in pairs for latent in (p.preferred, p.rejected)}
            for key, latent in tqdm(
                latents.items(), desc=self._title, unit="asset", leave=False, disable=None
            ):
                known[key] = features(self._pipeline.decode(SparseBatch.join([latent]))[0])
            preferred, rejected = (
                torch.stack([known[id(getattr(p, side))] for p in pairs])
                for side in ("preferred", "rejected")
            )
            self._reward = LinearReward(preferred, rejected, self._ridge)
        return self._reward(assets, conditions)
