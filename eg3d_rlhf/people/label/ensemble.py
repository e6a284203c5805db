"""The rewards whose disagreement chooses pairs: read from their files, on the shapes of one generator."""

from collections.abc import Sequence
from pathlib import Path

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.people.label.pairing import Ensemble, Judged, PairingOptions


def reward_ensemble(pairing: PairingOptions, generator: LoadedGenerator) -> Ensemble:
    """The ensemble of the reward files that are named, each holding one reward or several; none named: the bundled two.

    Raises: ValueError, OSError for files that are no rewards, and for fewer than two rewards, which cannot disagree.
    """
    import torch

    from eg3d_rlhf.rewards.cache import observe_seeds
    from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward

    members: list[Reward] = []
    described = []
    for path in map(Path, pairing.rewards or (bundled.REWARD, bundled.WATCH)):  # those two were trained apart on the same labels
        reward = load_reward(path)
        check_reward(reward, generator.generator, f"active selection: {path.name}")
        parts = reward.members()
        members += parts
        described.append({"file": path.name, "sha256": file_hash(path), "members": len(parts)})
    sources = {one.observation: observe_seeds(generator.generator, one.observation, psi=pairing.psi) for one in members}

    @torch.no_grad()
    def judge(seeds: Sequence[int]) -> Judged:
        observed = {observation: draw(seeds) for observation, draw in sources.items()}
        seen = [one.network.embed(observed[one.observation]) for one in members]
        scores = [one.network.score_embedding(e) / one.temperature for one, e in zip(members, seen, strict=True)]
        return Judged(torch.stack(scores).double().numpy(), torch.cat(seen, dim=1).double().numpy())

    return Ensemble(judge, len(members), described)
