"""Rewards by name: what a stage can be tuned for. A plugin (docs/extending.md) adds its own to `REWARDS`."""

from collections.abc import Callable

from eg3d_rlhf.tuning.flow.problem import Problem
from eg3d_rlhf.tuning.flow.stage import AssetReward

OWN = "own"
REWARDS: dict[str, Callable[[Problem], AssetReward]] = {}  # by name: makes it for a problem, once in every process


def reward_of(name: str, problem: Problem) -> AssetReward:
    """The reward of that name for a problem; "own" is the problem's. Raises: ValueError naming those there are, or where it has none."""
    if name == OWN:
        if problem.reward is None:
            raise ValueError("--reward: expected the name of one, got none, and this generator brings none. Name the plugin's.")
        return problem.reward
    if name not in REWARDS:
        known = ", ".join((OWN, *REWARDS))
        raise ValueError(f"--reward: expected one of {known}, got {name!r}. Choose one, or name the plugin that brings it.")
    return REWARDS[name](problem)
