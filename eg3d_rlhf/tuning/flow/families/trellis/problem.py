"""TRELLIS as a problem of Circular-DPO: its files, the people's pairs, and judges that are learned from them.

    pairs/structure, pairs/latent    pairs of a stage, as pair_import.py writes them; one of the two may be missing
    pairs/conditions.safetensors    embeddings of their conditions

The judges see where an asset is filled and which colours it has there. They know nothing of conditions: they compare assets of one
condition, as w1, w2 and win rates do.

Shape letters: N assets, P pairs, F features, K cells per axis.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.preferences.losses import preference_loss
from eg3d_rlhf.tuning.flow.conditions import read_conditions
from eg3d_rlhf.tuning.flow.families.trellis import files
from eg3d_rlhf.tuning.flow.families.trellis.assets import SplatAsset
from eg3d_rlhf.tuning.flow.families.trellis.pair_import import normalization
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import Encoding, TrellisPipeline, load_pipeline
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.problem import Problem, conditions_beside, folder_problem, hash_of, pair_folders
from training.progress import tqdm


def trellis_problem(
    root: Path, pairs: Path | Sequence[Path] = (), *, conditions: Path | None = None, dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu", seed: int = 0, held_out: float = 0.2, encoding: Encoding | None = None,
    splits: Sequence[Sequence[str]] | None = None,
) -> Problem:
    """A problem from TRELLIS's files and people's pairs.

    Conditions are divided by a hash of their names: a share is held out. Three judges of `LinearReward` are fitted to people's pairs of
    different conditions: one half of the trained (w1 and w2), the other half (held-out win rate), the held-out (the final table).
    The same assets must be paired at both stages, where both are there.

    Args:
        root: folder with pipeline.json; pairs: a folder as above, or one for each stage; by default <root>/pairs.
        conditions: embeddings, by default those beside the pairs; dtype: see models.load_model; held_out: share of the conditions.
    Raises: FileNotFoundError or ValueError for files that are missing, damaged or do not fit each other.
    """
    root = Path(root)
    given = [pairs] if isinstance(pairs, Path) else list(pairs)
    folders = pair_folders(given or [root / "pairs"], tuple(files.FLOWS))
    tokens_file = conditions_beside(folders, conditions)
    tokens = read_conditions(tokens_file, zero_null=files.read_pipeline(root).kind == "image")
    both = set(folders) == set(files.FLOWS)
    pipeline = load_pipeline(root, tokens, dtype=dtype, device=device, encoding=encoding, whole=both)
    for stage in pipeline.stages:
        stage.model.recompute = True  # type: ignore[assignment]  # blocks again in the backward pass: a third more time, much less memory
    return folder_problem(
        pipeline, folders, tokens, seed=seed, held_out=held_out, splits=splits, judge=RewardOfPairs, check=partial(_check_origin, pipeline),
        identity={
            "problem": "trellis", "dtype": str(dtype), "encoding": vars(pipeline.encoding), "conditions": hash_of(tokens_file),
            "files": file_hashes(pipeline.file, both),
        },
    )


def _check_origin(pipeline: TrellisPipeline, folder: Path, stage: str, meta: Mapping) -> None:
    if meta.get("normalization") != normalization(pipeline.file, stage):
        raise ValueError(
            f"{folder}: expected latents normalised as {pipeline.file.root.name}/pipeline.json says, got those of another model. Import "
            "the assets again for this one."
        )


def file_hashes(file: files.PipelineFile, whole: bool) -> dict[str, str]:
    """SHA-256 of pipeline.json and of every model's files, by name."""
    names = files.FLOWS | {name: name for name in files.NEEDED if whole}
    models = {name: files.find_model(file, model) for name, model in names.items()}
    paths: dict[str, Path] = {"pipeline.json": file.root / "pipeline.json"}
    for name, stem in models.items():
        paths |= {f"{name}.json": files.with_ending(stem, ".json"), name: files.find_weights(stem) or stem}
    return {name: file_hash(path) for name, path in tqdm(paths.items(), desc="reading weights", unit="file", leave=False, disable=None)}


CELLS = 8  # per axis of the cube
FITTING_STEPS = 200


def features(asset: SplatAsset, cells: int = CELLS) -> torch.Tensor:
    """[F] float32, F = 4 K^3: per cell the logarithm of 1 + its opacity, and its mean colour less grey."""
    asset = asset.to("cpu")  # sums there do not depend on the order of threads
    places = ((asset.means + 0.5) * cells).floor().long()
    inside = ((places >= 0) & (places < cells)).all(1)
    x, y, z = places[inside].unbind(1)
    cell, opacity = (x * cells + y) * cells + z, asset.opacities[inside].float()
    mass = opacity.new_zeros(cells**3).index_add(0, cell, opacity)
    colour = opacity.new_zeros(cells**3, 3).index_add(0, cell, opacity[:, None] * (asset.colours[inside].float() - 0.5))
    return torch.cat([mass.log1p(), (colour / mass.clamp_min(1e-6)[:, None]).flatten()])


class LinearReward:
    """score = w . (features - mean) / std; an AssetReward."""

    def __init__(self, preferred: torch.Tensor, rejected: torch.Tensor, ridge: float = 1.0):
        """Fit by Bradley-Terry to the features of pairs [P, F] each, with ridge / 2 |w|^2 / P added to the mean loss."""
        both = torch.cat([preferred, rejected]).double()
        self.mean, self.std = both.mean(0), both.std(0).clamp_min(1e-6) * both.shape[1] ** 0.5
        gaps = (preferred - rejected).double() / self.std  # [P, F]
        self.weight = torch.zeros(gaps.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = preference_loss(gaps @ self.weight).mean() + ridge / 2 * self.weight.square().sum() / len(gaps)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(step)
        self.weight.requires_grad_(False)

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        found = torch.stack([features(asset) for asset in assets]).double()
        return (((found - self.mean) / self.std) @ self.weight).float()


class RewardOfPairs:
    """A LinearReward that is fitted when it is first asked; an AssetReward."""

    def __init__(self, pipeline: TrellisPipeline, pairs: Callable[[], Sequence[PreferencePair]], title: str, ridge: float = 1.0):
        """Args: pairs: of the last stage, whose latents are decoded; title: for the progress bar."""
        self._pipeline, self._pairs, self._title, self._ridge = pipeline, pairs, title, ridge
        self._reward: LinearReward | None = None

    def __call__(self, assets: Sequence[SplatAsset], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32. Raises: ValueError where there is no pair to learn from."""
        if self._reward is None:
            pairs = self._pairs()
            if not pairs:
                got = "expected pairs of finished assets to learn from, got none"
                raise ValueError(f"{self._title}: {got}. Import pairs of the last stage.")
            known: dict[int, torch.Tensor] = {}
            latents = {id(latent): latent for p in pairs for latent in (p.preferred, p.rejected)}
            for key, latent in tqdm(latents.items(), desc=self._title, unit="asset", leave=False, disable=None):
                known[key] = features(self._pipeline.decode(SparseBatch.join([latent]))[0])
            preferred, rejected = (torch.stack([known[id(getattr(p, side))] for p in pairs]) for side in ("preferred", "rejected"))
            self._reward = LinearReward(preferred, rejected, self._ridge)
        return self._reward(assets, conditions)
