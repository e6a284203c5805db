"""Linear rewards of finished assets that are fitted to preference pairs.

Their features are where an asset is filled and which colours it has there. They do not read the prompts: they
compare assets of the same prompt, as w1, w2 and win rates do.

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

CELLS = 8  # K, cells per axis of the cube -0.5..0.5
FITTING_STEPS = 200  # largest number of L-BFGS iterations


def features(asset: SplatAsset, cells: int = CELLS) -> torch.Tensor:
    """Compute features [F] float32 of an asset, F = 4 K^3.

    Per cell they are log(1 + sum of opacities) and the mean colour minus 0.5, weighted by opacity.
    """
    # On the CPU, index_add sums in a fixed order; on a GPU the order of threads varies.
    asset = asset.to("cpu")
    places = ((asset.means + 0.5) * cells).floor().long()  # [G, 3], cell of each Gaussian
    inside = ((places >= 0) & (places < cells)).all(1)
    x, y, z = places[inside].unbind(1)
    cell = (x * cells + y) * cells + z  # flat index of the cell
    opacity = asset.opacities[inside].float()
    mass = opacity.new_zeros(cells**3).index_add(0, cell, opacity)  # [K^3], sum of opacities per cell
    colour = opacity.new_zeros(cells**3, 3).index_add(
        0, cell, opacity[:, None] * (asset.colours[inside].float() - 0.5)
    )
    # Empty cells have zero colour, too: their mass is replaced by 1e-6, not by 0.
    return torch.cat([mass.log1p(), (colour / mass.clamp_min(1e-6)[:, None]).flatten()])


class LinearReward:
    """Linear reward: score = w . (features - mean) / std. Implements AssetReward."""

    def __init__(self, preferred: torch.Tensor, rejected: torch.Tensor, ridge: float = 1.0):
        """Fit w by the Bradley-Terry model to the features of preferred and rejected assets, [P, F] each.

        The regulariser ridge / 2 |w|^2 / P is added to the mean loss.
        """
        both = torch.cat([preferred, rejected]).double()
        self.mean = both.mean(0)
        # The factor sqrt(F) keeps the score's size independent of the number of features.
        self.std = both.std(0).clamp_min(1e-6) * both.shape[1] ** 0.5
        # The mean cancels in differences.
        gaps = (preferred - rejected).double() / self.std  # [P, F]
        # In float64, so that the line search is not limited by rounding.
        self.weight = torch.zeros(gaps.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = preference_loss(gaps @ self.weight).mean() + ridge / 2 * self.weight.square().sum() / len(
                gaps
            )
            loss.backward()
            return loss

        # Callers may have switched gradients off, for example while sampling.
        with torch.enable_grad():
            optimizer.step(step)
        self.weight.requires_grad_(False)

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, [N] float32. The prompts are not used."""
        observed = torch.stack([features(asset) for asset in assets]).double()
        return (((observed - self.mean) / self.std) @ self.weight).float()


class RewardOfPairs:
    """LinearReward that is fitted to preference pairs at its first call. Implements AssetReward."""

    def __init__(
        self,
        pipeline: Pipeline,
        pairs: Sequence[PreferencePair],
        title: str,
        ridge: float = 1.0,
    ):
        """Store the pairs without reading them.

        Args:
            pairs: of the last stage, whose latents are decoded.
            title: text of the progress bar.
            ridge: see `LinearReward`.
        """
        self._pipeline = pipeline
        self._pairs = pairs
        self._title = title
        self._ridge = ridge
        # fitted at the first call, because decoding all pairs takes long
        self._reward: LinearReward | None = None

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, [N] float32. Raises: ValueError if there are no pairs."""
        if self._reward is None:
            pairs = self._pairs
            if not pairs:
                raise ValueError(
                    f"{self._title}: a reward cannot be fitted, because there are no preference pairs of"
                    " finished assets. Import pairs of the last stage."
                )
            known: dict[int, torch.Tensor] = {}
            # An asset may be in several pairs; it is decoded once.
            latents = {id(latent): latent for p in pairs for latent in (p.preferred, p.rejected)}
            # One by one: a decoded asset is large, its features are not.
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
