"""Scores of finished assets by mesh rewards, for strategies of pairs that read scores."""

from collections.abc import Sequence
from pathlib import Path

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.assets.collection import Collection
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Scored, check_rewards

_MESHES = ("glb", "obj", "ply")  # kinds of files that a mesh reward reads


def mesh_ensemble(strategy: str, rewards: Sequence[str], collection: Collection) -> Ensemble:
    """Open mesh rewards (`eg3d-rlhf reward mesh`) that score the assets of a collection by number.

    Raises: ValueError for too few rewards, for other kinds of rewards, and for assets that are no meshes.
    """
    if not rewards:
        least = STRATEGIES[strategy].least_rewards
        raise ValueError(
            f"--strategy={strategy}: expected {least} or more mesh rewards for finished assets, got none."
            " Train them with `eg3d-rlhf reward mesh` and name each by --reward=FILE; assets that a flow"
            f" sampled have `eg3d-rlhf flow label WORK --strategy={strategy}`."
        )
    check_rewards(strategy, len(rewards))
    other = next((asset for asset in collection.assets if asset.kind not in _MESHES), None)
    if other is not None:
        raise ValueError(
            f"--strategy={strategy}: expected meshes, which mesh rewards read, got {other.path.name}, which"
            f" is {other.kind}. Use --strategy=random."
        )
    import torch

    from eg3d_rlhf.rewards.meshes.dataset import load_mesh
    from eg3d_rlhf.rewards.meshes.model import load_mesh_reward
    from eg3d_rlhf.rewards.meshes.patches import patches_of

    members = [load_mesh_reward(path) for path in rewards]

    @torch.no_grad()
    def score(numbers: Sequence[int]) -> Scored:
        assets = [collection.assets[number] for number in numbers]
        meshes = [load_mesh(asset.path) for asset in assets]
        prompts = [collection.prompts[asset.prompt].text or asset.prompt for asset in assets]
        seen = [m.embed(patches_of(meshes, m.patches), prompts) for m in members]
        scores = [m.head(e)[:, 0] for m, e in zip(members, seen, strict=True)]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(seen, dim=1).double().numpy())

    described = [{"file": Path(path).name, "sha256": file_hash(path), "members": 1} for path in rewards]
    return Ensemble(score, len(members), described)
