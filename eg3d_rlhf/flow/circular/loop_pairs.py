"""Pairs that the loop makes for a stage out of the stage behind it: how a preference crosses the gap that no gradient crosses.

For each human pair (Circular-DPO, section 4.2 and appendix C.3), with i the stage to be trained:
    1. the gap behind stage i is crossed with the preferred asset's own latent, for both sides alike;
    2. stage i + 1 is sampled on it twice from the same noise: `op` from the tuned network, `un-op` from its reference; stages further
       behind, where there are any, are the same for both;
    3. both are decoded to assets, scored, and encoded back: their latents of stage i are the new pair, op preferred.
They differ at stage i only where decoding changed what encoding sees; pairs that do not are marked in `provenance`, since with shared noise
they have loss log 2 and no gradient.

Deviates: one sentence of appendix C.3 pairs generated assets with the original ones; here, as in algorithm 1 and equation 11, un-op is the
reference's sample.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.flow.generate import Models, generate
from eg3d_rlhf.flow.pairs import PreferencePair, read_pairs, write_pairs
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.sparse import collate, to_cpu
from eg3d_rlhf.flow.stage import FlowStage, Voxels, stage_of
from eg3d_rlhf.flow.weights import same_structure
from training.config import check_knobs, knob
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed

SAME = "same_structure"  # in a pair's provenance


@dataclass(frozen=True, kw_only=True)
class LoopPairsConfig:
    """How many pairs are made."""

    per_pair: int = knob(1, "New pairs, so noises, for each human pair.", "The loop", name="loop_pairs", low=1)
    batch: int = 16  # assets at once; bounds memory, and does not change the result beyond rounding
    chunk: int = 64  # human pairs between what is kept of an interrupted making

    def __post_init__(self):
        check_knobs(self)


def stage_behind(problem: Problem, stage: str) -> FlowStage:
    """The stage whose samples pairs of `stage` are made from.

    Raises: ValueError for the last stage.
    """
    stages = list(problem.pipeline.stages)
    place = stages.index(stage_of(problem.pipeline, stage))
    if place + 1 == len(stages):
        raise ValueError(f"loop pairs: expected a stage with one behind it, got {stage!r}, the last. It learns from the human pairs.")
    return stages[place + 1]


def make_loop_pairs(
    problem: Problem, models_op: Models, config: LoopPairsConfig, seed: int, *, stage: str | None = None, models_unop: Models | None = None,
    pairs: Sequence[PreferencePair] | None = None, on_pair: Callable[[int], None] | None = None,
) -> list[PreferencePair]:
    """New pairs of `stage`, by default the first.

    Args:
        models_op: tuned networks by stage name, that of the stage behind among them; models_unop: their references, by default the
            pipeline's own. Only the stage behind differs between the sides: further ones are models_op's for both.
        seed: of the noises, with the human pair's id: a part of the pairs gives the same part of the result.
        pairs: human pairs of `stage`; None: all of the problem. on_pair: called with the number of human pairs done.
    Raises: ValueError for a stage that has none behind it, or without a tuned network for that one.
    """
    stage = stage or problem.pipeline.stages[0].name
    behind = stage_behind(problem, stage).name
    if behind not in models_op:
        raise ValueError(f"loop pairs: expected a tuned network of stage {behind!r}, got {', '.join(models_op) or 'none'}. Tune it first.")
    un_op = {k: v for k, v in models_op.items() if k != behind} | {k: v for k, v in (models_unop or {}).items() if k == behind}
    pairs = problem.human_pairs(stage) if pairs is None else pairs
    per_batch, found = max(1, config.batch // config.per_pair), []
    for i in range(0, len(pairs), per_batch):
        part = pairs[i : i + per_batch]
        found += _batch(problem, stage, behind, (models_op, un_op), part, config, seed)
        if on_pair:
            on_pair(len(part))
    return found


@torch.no_grad()
def _batch(problem: Problem, stage: str, behind: str, sides: Sequence[Models], pairs, config: LoopPairsConfig, seed: int) -> list:
    given = _gap(problem, stage, pairs)
    rows = [(pair, places, k) for pair, places in zip(pairs, given, strict=True) for k in range(config.per_pair)]
    conditions = [pair.condition for pair, _, _ in rows]
    seeds = [derive_seed("loop", seed, stage, pair.id, k) % 2**31 for pair, _, k in rows]
    stages_given = {behind: [places for _, places, _ in rows]}
    latents, rewards = [], []
    for models in sides:
        assets = generate(problem.pipeline, conditions, seeds, models, config.batch, stages_given)
        rewards.append(problem.reward(assets, conditions).detach().float().cpu())
        latents.append([to_cpu(encoded[stage]) for encoded in problem.pipeline.encode(assets)])
    _check_rewards(rewards)
    return [
        _marked(PreferencePair(
            id=f"{pair.id}/{k}", condition=pair.condition, stage=stage, preferred=op, rejected=un_op, source="loop",
            reward_preferred=float(rewards[0][n]), reward_rejected=float(rewards[1][n]),
            provenance={"human_pair": pair.id, "noise_seed": seeds[n], "sampled_stage": behind},
        ))
        for n, ((pair, _, k), op, un_op) in enumerate(zip(rows, *latents, strict=True))
    ]


def _gap(problem: Problem, stage: str, pairs: Sequence[PreferencePair]) -> list[Voxels]:
    """What the preferred assets' own latents leave to the stage behind."""
    device = next(stage_of(problem.pipeline, stage).model.parameters()).device
    return problem.pipeline.advance(stage, collate([pair.preferred for pair in pairs]).to(device))


def _check_rewards(rewards: Sequence[torch.Tensor]) -> None:
    if not all(bool(values.isfinite().all()) for values in rewards):
        raise ValueError(f"loop pairs: expected finite rewards, got {rewards[0].tolist()} and {rewards[1].tolist()}. Correct the reward.")


def _marked(pair: PreferencePair) -> PreferencePair:
    return replace(pair, provenance={**pair.provenance, SAME: same_structure(pair)})


def with_roles(pairs: Sequence[PreferencePair], roles: str) -> list[PreferencePair]:
    """Pairs with op preferred ("op", the paper's), or whichever of the two the reward prefers ("reward")."""
    if roles not in ("op", "reward"):
        raise ValueError(f"roles: expected op or reward, got {roles!r}. Choose one.")
    return [_turned(pair) if roles == "reward" and pair.reward_rejected > pair.reward_preferred else pair for pair in pairs]


def _turned(pair: PreferencePair) -> PreferencePair:
    return replace(
        pair, preferred=pair.rejected, rejected=pair.preferred, provenance={**pair.provenance, "turned": True},
        reward_preferred=pair.reward_rejected, reward_rejected=pair.reward_preferred,
    )


def make_in_chunks(
    folder: Path, problem: Problem, models_op: Models, config: LoopPairsConfig, seed: int, *, stage: str, models_unop: Models,
    ranks: Ranks = SINGLE, on_pair: Callable[[int], None] | None = None,
) -> tuple[Path, Mapping]:
    """`make_loop_pairs` of all human pairs into folder/pairs, resumable: ranks make chunks in turn and keep each as it is done.

    Returns: that folder and figures of the pairs.
    """
    human = problem.human_pairs(stage)
    starts, chunks = range(0, len(human), config.chunk), folder / "chunks"
    for number, start in list(enumerate(starts))[ranks.rank :: ranks.world]:
        part, place = human[start : start + config.chunk], chunks / f"{number:05d}"
        if place.exists():
            if on_pair:
                on_pair(len(part))
            continue
        made = make_loop_pairs(
            problem, models_op, config, seed, stage=stage, models_unop=models_unop, pairs=part, on_pair=on_pair
        )
        unfinished = place.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_pairs(unfinished, made, {"seed": seed, "chunk": number})
        os.replace(unfinished, place)
    ranks.barrier()
    if not ranks.main:
        return folder / "pairs", {}
    pairs = [pair for number in range(len(starts)) for pair in read_pairs(chunks / f"{number:05d}", stage)[0]]
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    write_pairs(folder / "pairs", pairs, {"seed": seed, "stage": stage, "source": "loop", "config": asdict(config)})
    shutil.rmtree(chunks)
    return folder / "pairs", figures(pairs)


def figures(pairs: Sequence[PreferencePair]) -> Mapping:
    """What the pairs are like, before any of them is dropped."""
    if not pairs:
        return {"pairs": 0}
    gaps = torch.tensor([pair.reward_preferred - pair.reward_rejected for pair in pairs], dtype=torch.float64)
    changed = torch.tensor([not pair.provenance[SAME] for pair in pairs])
    return {
        "pairs": len(pairs), "changed_structure": float(changed.double().mean()), "op_rewarded": float((gaps > 0).double().mean()),
        "op_rewarded_where_changed": float((gaps[changed] > 0).double().mean()) if bool(changed.any()) else None,
        "reward_gap_mean": float(gaps.mean()), "reward_gap_std": float(gaps.std(correction=0)),
    }
