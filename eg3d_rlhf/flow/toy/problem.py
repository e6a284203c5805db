"""The toy as a problem of Circular-DPO: base networks, people's pairs, three judges, and the settings that suit it."""

from dataclasses import replace

import torch

from eg3d_rlhf.flow.circular.loop_pairs import LoopPairsConfig
from eg3d_rlhf.flow.circular.settings import Choosing, CircularSettings, supervised
from eg3d_rlhf.flow.dpo import DpoConfig
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.toy.base import bundled_hashes, load_network, load_toy
from eg3d_rlhf.flow.toy.oracles import ChooserOracle, FinalOracle, parts
from eg3d_rlhf.flow.toy.people import human_pairs
from eg3d_rlhf.flow.toy.shapes import HELD_OUT, TRAINED
from eg3d_rlhf.flow.tuning.config import TrainConfig

PAIRS_PER_CONDITION = 20
_HUMAN = TrainConfig(
    dpo=DpoConfig(beta=60.0), lora=LoraConfig(rank=16, alpha=32), steps=100, batch=16, lr=1e-3, warmup=10, held_out_every=25, log_every=5,
    checkpoint_every=50,
)  # fmt: skip
_LOOP = replace(_HUMAN, dpo=DpoConfig(beta=500.0, loser_weight=0.5, sft_weight=100.0))
TOY_DEFAULTS = CircularSettings(  # chosen with ChooserOracle, never with FinalOracle
    human=_HUMAN, loop=_LOOP, sft=supervised(_HUMAN), loop_pairs=LoopPairsConfig(batch=64, chunk=256), choosing=Choosing(per_condition=8),
)


def toy_problem(seed: int = 0, device: str | torch.device = "cpu", pairs_per_condition: int = PAIRS_PER_CONDITION) -> Problem:
    """The bundled toy with the people's pairs of a seed.

    Forty conditions are for training, the other twenty-four for judging: colours that a shape has not been tuned on.
    """
    if pairs_per_condition < 1:
        raise ValueError(f"toy_problem: expected pairs_per_condition >= 1, got {pairs_per_condition}. Ask for one at least.")
    return Problem(
        pipeline=load_toy(device),
        human_pairs=lambda stage: human_pairs(stage, TRAINED, pairs_per_condition, seed),
        reward=load_network("reward"),
        chooser=ChooserOracle(),
        final=FinalOracle(),
        parts=parts,
        train_conditions=TRAINED,
        held_out_conditions=HELD_OUT,
        identity={"problem": "toy", "seed": seed, "pairs_per_condition": pairs_per_condition, **bundled_hashes()},
    )
