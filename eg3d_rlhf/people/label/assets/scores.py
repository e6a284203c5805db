"""Scores asset files by mesh rewards, for strategies that choose pairs by scores."""

from collections.abc import Sequence
from pathlib import Path

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.assets.collection import Collection
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Scored, check_rewards

_MESHES = ("glb", "obj", "ply")  # kinds of files that a mesh reward reads


def mesh_ensemble(strategy: str, rewards: Sequence[str], collection: Collection) -> Ensemble:
    """Load mesh rewards (`eg3d-rlhf reward mesh`) as an ensemble that scores the assets of a collection by
    index.

    Raises: ValueError for too few rewards, for other kinds of rewards, and for assets that are no meshes.
    """
    if not rewards:
        least = STRATEGIES[strategy].least_rewards
        raise ValueError(
            f"--strategy={strategy}: expected {least} or more mesh rewards for asset files, got none. Train"
            " them with `eg3d-rlhf reward mesh` and name each by --reward=FILE. For assets that a flow has"
            f" sampled, use `eg3d-rlhf flow label WORK --strategy={strategy}`."
        )
    check_rewards(strategy, len(rewards))
    other = next((asset for asset in collection.assets if asset.kind not in _MESHES), None)
    if other is not None:
        raise ValueError(
            f"--strategy={strategy}: mesh rewards read meshes only, but {other.path.name} is of kind"
            f" {other.kind}. Use --strategy=random."
        )
    import torch

    from eg3d_rlhf.rewards.meshes.dataset import load_mesh
    from eg3d_rlhf.rewards.meshes.model import load_mesh_reward
    from eg3d_rlhf.rewards.meshes.patches import patches_of

    members = [load_mesh_reward(path) for path in rewards]

    @torch.no_grad()
    def score(indices: Sequence[int]) -> Scored:
        """Score assets: scores [M members, N], and embeddings [N, sum of widths]."""
        assets = [collection.assets[index] for index in indices]
        meshes = [load_mesh(asset.path) for asset in assets]
        # A prompt without a text, such as one with an image only, is represented by its name.
        prompts = [collection.prompts[asset.prompt].text or asset.prompt for asset in assets]
        # One embedding [N, D] per member; the head maps it to a score [N, 1].
        embeddings = [m.embed(patches_of(meshes, m.patches), prompts) for m in members]
        scores = [m.head(e)[:, 0] for m, e in zip(members, embeddings, strict=True)]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(embeddings, dim=1).double().numpy())

    described = [{"file": Path(path).name, "sha256": file_hash(path), "members": 1} for path in rewards]
    return Ensemble(score, len(members), described)
