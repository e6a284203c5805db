"""Problems whose labels can be learnt, and the same with answers given by the toss of a coin."""

from dataclasses import replace
from pathlib import Path

import torch

from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.modes.flow_tune import LOSER_WEIGHT
from eg3d_rlhf.tuning.flow.circular.loop import CircularSettings
from eg3d_rlhf.tuning.flow.circular.loop_pairs import turned
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.families import hunyuan3d
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.problem import Problem
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig
from eg3d_rlhf.tuning.flow.tune import Tuning
from tests.tuning.flow.hunyuan3d.tiny_hunyuan3d import LATENTS, C, tokens
from training.phases import derive_seed

FAST = TrainConfig(
    dpo=DpoConfig(beta=20.0, loser_weight=LOSER_WEIGHT), lora=LoraConfig(rank=16, alpha=32), steps=60, batch=16, lr=1e-3, warmup=5,
    held_out_every=20, log_every=20,
)


def by_coin(problem: Problem, seed: int) -> Problem:
    """Every answer given at random, those that choose and tell among them."""

    def tossed(pairs: list[PreferencePair]) -> list[PreferencePair]:
        return [turned(pair) if derive_seed("answer", seed, pair.id) % 2 else pair for pair in pairs]

    return replace(problem, human_pairs=lambda stage: tossed(problem.human_pairs(stage)),
                   unseen_pairs=lambda stage, names: tossed(problem.unseen_pairs(stage, names)))  # fmt: skip


def toy(seed: int, unseen: int = 2) -> Problem:
    """The toy with few pairs to tell by."""
    problem = toy_problem(seed)
    return replace(problem, unseen_pairs=lambda stage, names: _first(problem.unseen_pairs(stage, names), unseen))


def _first(pairs: list[PreferencePair], count: int) -> list[PreferencePair]:
    kept: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        kept.setdefault(pair.condition, []).append(pair)
    return [pair for of_condition in kept.values() for pair in of_condition[:count]]


def shapes(root: Path, seed: int, conditions: int = 30, per_condition: int = 6) -> Problem:
    """A tiny Hunyuan3D folder; people prefer latents whose mean is higher."""
    names = [f"c{i:02d}" for i in range(conditions)]
    pipeline = hunyuan3d.load(root, tokens(names))
    g, pairs = torch.Generator().manual_seed(seed), []
    for name in names:
        for k in range(per_condition):
            a, b = (torch.randn(LATENTS, C, generator=g) + 0.4 * torch.randn([], generator=g) for _ in range(2))
            if torch.rand([], generator=g) > torch.sigmoid(8 * (a.mean() - b.mean())):
                a, b = b, a
            pairs.append(PreferencePair(id=f"{name}-{k}", condition=name, stage="shape", preferred=a, rejected=b))
    train, choose, tell = names[: conditions // 2], names[conditions // 2 : -conditions // 3], names[-conditions // 3 :]

    def of(wanted):
        return [pair for pair in pairs if pair.condition in set(wanted)]

    return Problem(
        pipeline=pipeline, human_pairs=lambda stage: of(train), unseen_pairs=lambda stage, wanted: of(wanted),
        reward=None, chooser=None, final=None,
        train_conditions=train, choosing_conditions=choose, held_out_conditions=tell, identity={"problem": "tiny", "seed": seed},
    )


def tuning(seed: int, **changes) -> Tuning:
    return Tuning(circular=CircularSettings(human=replace(FAST, **changes), seed=seed))
