"""Linear rewards of finished assets that are fitted to preference pairs.

The cube around an asset is divided into cells. The features of an asset are the opacity and the mean colour
in each cell. The rewards do not read the prompts, because they only compare assets of the same prompt.

Shapes: N number of assets, P number of pairs, F number of features, K cells per axis, G Gaussians of an
    asset.
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
    """Compute the features [F] float32 of an asset, F = 4 K^3.

    The first K^3 features are log(1 + m) with m the sum of opacities in a cell. The other 3 K^3 features are
    the opacity-weighted mean of colour - 0.5 in each cell, and 0 in an empty cell.

    Args:
        asset: Gaussians of the asset.
        cells: K, cells per axis of the cube -0.5..0.5.
    """
    # On the CPU, index_add sums in a fixed order; on a GPU the order of threads varies.
    asset = asset.to("cpu")
    cell_coordinates = ((asset.means + 0.5) * cells).floor().long()  # [G, 3], cell of each Gaussian
    is_inside = ((cell_coordinates >= 0) & (cell_coordinates < cells)).all(1)
    x, y, z = cell_coordinates[is_inside].unbind(1)
    cell_index = (x * cells + y) * cells + z  # flat index of the cell, 0..K^3 - 1
    opacity = asset.opacities[is_inside].float()
    # Sum of opacities per cell, [K^3].
    opacity_sum = opacity.new_zeros(cells**3).index_add(0, cell_index, opacity)
    colour_sum = opacity.new_zeros(cells**3, 3).index_add(
        0, cell_index, opacity[:, None] * (asset.colours[is_inside].float() - 0.5)
    )
    # In an empty cell both sums are 0. The divisor 1e-6 makes its mean colour 0 instead of NaN.
    return torch.cat([opacity_sum.log1p(), (colour_sum / opacity_sum.clamp_min(1e-6)[:, None]).flatten()])


class LinearReward:
    """Linear reward, score = w . (features - mean) / (sqrt(F) std). Implements AssetReward."""

    def __init__(self, preferred_features: torch.Tensor, rejected_features: torch.Tensor, ridge: float = 1.0):
        """Fit w by the Bradley-Terry model, P(preferred) = sigmoid(score difference).

        The minimised loss is the mean over pairs of -log P(preferred), plus ridge / 2 |w|^2 / P.

        Args:
            preferred_features: features of the preferred assets, [P, F].
            rejected_features: features of the rejected assets, [P, F].
            ridge: strength of the regulariser, >= 0.
        """
        all_features = torch.cat([preferred_features, rejected_features]).double()
        self.mean = all_features.mean(0)
        # The factor sqrt(F) keeps the score's size independent of the number of features.
        # Features that are constant, such as cells outside all assets, have std 0, hence the bound 1e-6.
        self.std = all_features.std(0).clamp_min(1e-6) * all_features.shape[1] ** 0.5
        # The mean cancels in differences.
        feature_differences = (preferred_features - rejected_features).double() / self.std  # [P, F]
        # In float64, so that the line search is not limited by rounding.
        self.weight = torch.zeros(feature_differences.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

        # L-BFGS evaluates the loss several times per iteration, so it needs a function.
        def compute_loss() -> torch.Tensor:
            """Compute the regularised loss and its gradient."""
            optimizer.zero_grad()
            loss = preference_loss(
                feature_differences @ self.weight
            ).mean() + ridge / 2 * self.weight.square().sum() / len(feature_differences)
            loss.backward()
            return loss

        # Callers may have switched gradients off, for example while sampling.
        with torch.enable_grad():
            optimizer.step(compute_loss)
        # Scoring assets needs no gradient of the weights.
        self.weight.requires_grad_(False)

    def __call__(self, assets: Sequence[SplatAsset], prompts: Sequence[str]) -> torch.Tensor:
        """Score assets, [N] float32. The prompts are not used."""
        asset_features = torch.stack([features(asset) for asset in assets]).double()  # [N, F]
        return (((asset_features - self.mean) / self.std) @ self.weight).float()


class RewardOfPairs:
    """`LinearReward` that is fitted to preference pairs when it is first called. Implements AssetReward."""

    def __init__(
        self,
        pipeline: Pipeline,
        pairs: Sequence[PreferencePair],
        title: str,
        ridge: float = 1.0,
    ):
        """Store the pairs. Their latents are read and decoded at the first call.

        Args:
            pipeline: pipeline that decodes the latents.
            pairs: preference pairs of the last stage.
            title: text of the progress bar, and beginning of error messages.
            ridge: strength of the regulariser; see `LinearReward`.
        """
        self._pipeline = pipeline
        self._pairs = pairs
        self._title = title
        self._ridge = ridge
        # Fitted at the first call, because decoding all pairs takes long.
        self._reward: LinearReward | None = None

    def __call__(self, assets: Sequence[SplatAsset], prompts: Sequence[str]) -> torch.Tensor:
        """Score assets, [N] float32. The prompts are not used.

        Raises: ValueError if there are no pairs to fit the reward to.
        """
        if self._reward is None:
            pairs = self._pairs
            if not pairs:
                raise ValueError(
                    f"{self._title}: a reward cannot be fitted, because there are no preference pairs of"
                    " the last stage. Import such pairs with `eg3d-rlhf flow tune`, or pass another"
                    " --pairs folder."
                )
            # An asset may be in several pairs. It is decoded once, so latents are listed by object identity.
            latents = {}
            for pair in pairs:
                latents[id(pair.preferred)] = pair.preferred
                latents[id(pair.rejected)] = pair.rejected
            features_by_id: dict[int, torch.Tensor] = {}
            # One latent at a time: a decoded asset is large, its features are not.
            for latent_id, latent in tqdm(latents.items(), desc=self._title, unit="asset", leave=False):
                features_by_id[latent_id] = features(self._pipeline.decode(SparseBatch.join([latent]))[0])
            preferred_features = torch.stack([features_by_id[id(pair.preferred)] for pair in pairs])  # [P, F]
            rejected_features = torch.stack([features_by_id[id(pair.rejected)] for pair in pairs])  # [P, F]
            self._reward = LinearReward(preferred_features, rejected_features, self._ridge)
        return self._reward(assets, prompts)
