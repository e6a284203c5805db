"""Make the loop's pairs of a stage from samples of the next stage, select them (w1), and weight them (w2).

No gradient passes from one stage to the one before, so that preferences are passed on by pairs instead. For
each human pair (Circular-DPO, section 4.2 and appendix C.3), with i the stage to be trained:
    1. the preferred asset's own latent of stage i is handed to stage i + 1, for both sides alike;
    2. stage i + 1 is sampled with it twice from the same noise: the tuned sample (the paper's "op") from the
       tuned network, and the reference sample from its reference; later stages, if there are any, are the
       same for both;
    3. both are decoded to assets, scored, and encoded back: their latents of stage i are the new pair, with
       the tuned sample preferred.
The two latents differ only where decoding changed what encoding sees. Pairs whose latents are equal are
marked in `provenance`, since with shared noise they have the loss log 2 and no gradient. Of the others, w1
selects and w2 weights (equations 10-14):

    w1 = G_preferred - G_rejected,  G = 2^P - 1,  P_i = 2 C_i / (n (n - 1)),
         C_i the comparisons that candidate i of n wins by reward
    w2 = sigmoid(r_preferred - r_rejected) / its mean over the pairs that are kept

With one reward and the paper's threshold of 0, w1 keeps a pair exactly if its reward gap is positive,
independent of the other candidates.
Deviates: one sentence of appendix C.3 pairs generated assets with the original ones; here, as in algorithm 1
and equation 11, the rejected sample is the reference's.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.models.sparse import SparseSample, collate, feats_of, to_cpu
from eg3d_rlhf.tuning.flow.base.pairs import (
    PreferencePair,
    by_condition,
    check_unique,
    read_pairs,
    write_pairs,
)
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import Models, generate
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, Pipeline
from eg3d_rlhf.tuning.flow.training.circular.settings import (
    INVERTED,
    PEOPLES,
    RANDOMISED,
    REWARD,
    LoopPairsConfig,
    Weighing,
)
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed

SAME = "same_structure"  # key in a pair's provenance


def next_stage(stages: Sequence[str], stage: str) -> str:
    """Return the stage whose samples pairs of `stage`, any but the last, are made from."""
    return stages[stages.index(stage) + 1]


@dataclass(frozen=True, kw_only=True)
class LoopPairMaker:
    """Maker of new pairs of a stage from pairs of people."""

    pipeline: Pipeline
    reward: AssetReward  # of finished assets
    stage: str  # name of the stage to be trained
    tuned_models: Models  # tuned networks by stage; that of the next stage is among them
    # references by stage; only that of the next stage is used: later stages are tuned_models' on both sides
    reference_models: Models
    config: LoopPairsConfig
    seed: int  # of the noises, together with the human pair's id, so that chunks do not change the result

    @classmethod
    def from_problem(
        cls,
        problem: Problem,
        tuned_models: Models,
        config: LoopPairsConfig,
        seed: int,
        *,
        stage: str,
        reference_models: Models | None = None,
    ) -> "LoopPairMaker":
        """Take the pipeline and the reward of a problem.

        Args: reference_models: None for the pipeline's own networks.
        """
        # `check` has rejected problems without a reward
        assert problem.reward is not None
        return cls(
            pipeline=problem.pipeline,
            reward=problem.reward,
            stage=stage,
            tuned_models=tuned_models,
            reference_models=reference_models or {},
            config=config,
            seed=seed,
        )

    def __call__(
        self, pairs: Sequence[PreferencePair], on_pair: Callable[[int], None] | None = None
    ) -> list[PreferencePair]:
        """Make pairs. Args: pairs: human pairs of the stage; on_pair: receives the number done."""
        sampled_stage = next_stage([stage.name for stage in self.pipeline.stages], self.stage)
        assert sampled_stage in self.tuned_models
        # both sides differ in the network of the next stage alone
        references = {k: v for k, v in self.tuned_models.items() if k != sampled_stage} | {
            k: v for k, v in self.reference_models.items() if k == sampled_stage
        }
        # batch counts assets; each human pair gives per_pair of them on each side
        per_batch = max(1, self.config.batch // self.config.per_pair)
        made = []
        for i in range(0, len(pairs), per_batch):
            part = pairs[i : i + per_batch]
            made += self._batch(part, (self.tuned_models, references), sampled_stage)
            if on_pair:
                on_pair(len(part))
        return made

    @torch.no_grad()
    def _batch(
        self, pairs: Sequence[PreferencePair], sides: Sequence[Models], sampled_stage: str
    ) -> list[PreferencePair]:
        """Make the pairs of a batch. Args: sides: networks of the tuned and of the reference samples."""
        config = self.config
        stage = self.stage
        device = next(self.pipeline.stages[0].model.parameters()).device
        # step 1: what the preferred latents hand to the next stage
        given = self.pipeline.advance(stage, collate([pair.preferred for pair in pairs]).to(device))
        rows = [
            (pair, places, k)
            for pair, places in zip(pairs, given, strict=True)
            for k in range(config.per_pair)
        ]
        prompts = [pair.condition for pair, _, _ in rows]
        # one seed for both sides
        seeds = [derive_seed("loop", self.seed, stage, pair.id, k) % 2**31 for pair, _, k in rows]
        stages_given = {sampled_stage: [places for _, places, _ in rows]}
        latents = []  # of the stage, one list for each side
        rewards = []  # [n] for each side
        for models in sides:
            # steps 2 and 3
            assets = generate(self.pipeline, prompts, seeds, models, config.batch, stages_given)
            rewards.append(self.reward(assets, prompts).detach().float().cpu())
            latents.append([to_cpu(encoded[stage]) for encoded in self.pipeline.encode(assets)])
        # w1 compares rewards, and a comparison with NaN is always false
        if not all(bool(values.isfinite().all()) for values in rewards):
            raise ValueError(
                f"loop pairs: expected finite rewards, got {rewards[0].tolist()} and {rewards[1].tolist()}."
                " Correct the reward."
            )
        made = [
            PreferencePair(
                id=f"{pair.id}/{k}",
                condition=pair.condition,
                stage=stage,
                preferred=tuned,
                rejected=reference,
                source="loop",
                reward_preferred=float(rewards[0][n]),
                reward_rejected=float(rewards[1][n]),
                provenance={"human_pair": pair.id, "noise_seed": seeds[n], "sampled_stage": sampled_stage},
            )
            for n, ((pair, _, k), tuned, reference) in enumerate(zip(rows, *latents, strict=True))
        ]
        # recorded here, so that it is measured once: latents are compared element by element
        return [replace(pair, provenance={**pair.provenance, SAME: same_structure(pair)}) for pair in made]


def with_roles(pairs: Sequence[PreferencePair], roles: str) -> list[PreferencePair]:
    """Return pairs whose preferred sample is the tuned network's ("tuned", as in the paper), or the one with
    the higher reward ("reward").
    """
    return [inverted(pair) if roles == REWARD and pair.reward_gap < 0 else pair for pair in pairs]


def inverted(pair: PreferencePair) -> PreferencePair:
    """Exchange the preferred and the rejected sample, and record it in the provenance."""
    return replace(
        pair,
        preferred=pair.rejected,
        rejected=pair.preferred,
        provenance={**pair.provenance, "inverted": True},
        reward_preferred=pair.reward_rejected,
        reward_rejected=pair.reward_preferred,
    )


def make_in_chunks(
    folder: Path,
    make: LoopPairMaker,
    human: Sequence[PreferencePair],
    *,
    ranks: Ranks = SINGLE,
    on_pair: Callable[[int], None] | None = None,
) -> tuple[Path, Mapping]:
    """Make pairs from all human pairs into folder/pairs.

    Ranks make chunks in turn. A finished chunk stays on the disk, so that an interrupted call can be resumed.

    Returns: that folder, and figures of the pairs.
    """
    starts = range(0, len(human), make.config.chunk)
    chunks = folder / "chunks"
    for number, start in list(enumerate(starts))[ranks.rank :: ranks.world]:
        part = human[start : start + make.config.chunk]
        place = chunks / f"{number:05d}"
        # finished before an interruption; the progress bar counts it all the same
        if place.exists():
            if on_pair:
                on_pair(len(part))
            continue
        made = make(part, on_pair)
        # what an interrupted call has left of this chunk
        unfinished = place.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_pairs(unfinished, made, {"seed": make.seed, "chunk": number})
        # atomic: a folder of the final name is always complete
        os.replace(unfinished, place)
    ranks.barrier()
    # rank 0 alone joins the chunks
    if not ranks.main:
        return folder / "pairs", {}
    pairs = [
        pair for number in range(len(starts)) for pair in read_pairs(chunks / f"{number:05d}", make.stage)[0]
    ]
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    meta = {"seed": make.seed, "stage": make.stage, "source": "loop", "config": asdict(make.config)}
    write_pairs(folder / "pairs", pairs, meta)
    shutil.rmtree(chunks)
    return folder / "pairs", figures(pairs)


def figures(pairs: Sequence[PreferencePair]) -> Mapping:
    """Summarise the pairs, before any of them is dropped."""
    if not pairs:
        return {"pairs": 0}
    # reward of the preferred sample minus that of the rejected one, before any roles are exchanged
    gaps = torch.tensor([pair.reward_gap for pair in pairs], dtype=torch.float64)
    changed = torch.tensor([not pair.provenance[SAME] for pair in pairs])
    return {
        "pairs": len(pairs),
        "changed_structure": float(changed.double().mean()),
        "tuned_rewarded": float((gaps > 0).double().mean()),
        "tuned_rewarded_where_changed": (
            float((gaps[changed] > 0).double().mean()) if bool(changed.any()) else None
        ),
        "reward_gap_mean": float(gaps.mean()),
        "reward_gap_std": float(gaps.std(correction=0)),
    }


EQUAL = 1e-5  # of the largest value; latents that differ by less are one structure that was encoded twice


def win_shares(rewards: torch.Tensor) -> torch.Tensor:
    """Compute P of each candidate, rewards [n] -> [n] float64 that sum to 1 (Circular-DPO, equations 10-14).

    An equal reward is half a win for both.

    >>> win_shares(torch.tensor([3.0, 1.0, 2.0]))
    tensor([0.6667, 0.0000, 0.3333], dtype=torch.float64)
    """
    n = len(rewards)
    assert n > 1 and bool(torch.isfinite(rewards).all())
    # [n, n]: row i holds the wins of candidate i
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards).double()
    return 2 * (wins.sum(1) - 0.5) / (n * (n - 1))  # less the half win against itself


def w1(rewards: torch.Tensor, preferred: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Compute w1 of pairs among candidates, [P] float64.

    Args: rewards [n] of all candidates of one condition; preferred, rejected [P] int64 indices into them.
    """
    # G = 2^P - 1 of every candidate, [n]
    gains = torch.exp2(win_shares(rewards)) - 1
    return gains[preferred] - gains[rejected]


def w2(gaps: torch.Tensor) -> torch.Tensor:
    """Compute w2 from the reward gaps of the kept pairs, [P] -> [P] float64: sigmoid divided by its mean."""
    weights = torch.sigmoid(gaps.double())
    # mean 1, so that weighting does not change the size of the loss
    return weights / weights.mean()


def same_structure(pair: PreferencePair) -> bool:
    """Return whether both latents are equal up to rounding, so that the pair has no gradient.

    An entry "same_structure" in `provenance` is returned as it is.
    """
    if pair.provenance.get(SAME) is not None:
        return bool(pair.provenance[SAME])
    # both latents are of one form
    a = pair.preferred
    b = pair.rejected
    if isinstance(a, SparseSample) and isinstance(b, SparseSample):
        if len(a.coords) != len(b.coords):
            return False
        # the order of voxels has no meaning, so both are sorted by place
        a_order = torch.argsort(a.places)
        b_order = torch.argsort(b.places)
        if not torch.equal(a.coords[a_order], b.coords[b_order]):
            return False
        x = a.feats[a_order]
        y = b.feats[b_order]
    else:
        x = feats_of(a)
        y = feats_of(b)
    return bool((x - y).abs().max() <= EQUAL * x.abs().max())


def weigh(
    pairs: Sequence[PreferencePair], use_w1: bool = True, use_w2: bool = True
) -> tuple[list[PreferencePair], dict]:
    """Select pairs and fill in their w1 and w2; also report how many were dropped and why.

    Pairs of one structure are dropped first, then, with `use_w1`, those with w1 <= 0. The candidates of a
    prompt are both samples of all its pairs. Without `use_w1`, w1 is filled in but drops nothing; without
    `use_w2`, w2 stays empty and all pairs count alike.
    Raises: ValueError for pairs without finite rewards if these are needed.
    """
    check_unique("weigh", pairs)
    differing = [p for p in pairs if not same_structure(p)]
    # first pair without rewards, for the message
    unscored = next((p for p in pairs if not p.scored), None)
    scored = bool(pairs) and unscored is None
    if (use_w1 or use_w2) and unscored is not None:
        raise ValueError(
            f"weigh: expected both rewards on every pair, but {unscored.id} has none. Score the assets first."
        )
    values: dict[str, float] = {}  # id -> w1
    # of all pairs, those of one structure included: they are candidates, too
    for group in by_condition(pairs).values() if scored else ():
        rewards = torch.tensor(
            [p.rewards[0] for p in group] + [p.rewards[1] for p in group], dtype=torch.float64
        )
        # the preferred samples come first, then the rejected ones
        first, second = torch.arange(len(rewards)).chunk(2)
        values |= zip((p.id for p in group), w1(rewards, first, second).tolist(), strict=True)
    kept = [p for p in differing if not use_w1 or values[p.id] > 0]
    weights: list[float | None] = [None] * len(kept)
    # after the selection: the mean of w2 is taken over the kept pairs
    if use_w2 and kept:
        weights = w2(torch.tensor([p.reward_gap for p in kept], dtype=torch.float64)).tolist()
    columns = [replace(p, w1=values.get(p.id), w2=w) for p, w in zip(kept, weights, strict=True)]
    report = {
        "pairs": len(pairs),
        "kept": len(kept),
        "dropped": {"same_structure": len(pairs) - len(differing), "w1": len(differing) - len(kept)},
        "w1": _summary([values[p.id] for p in differing] if scored else []),
        "w2": _summary([w for w in weights if w is not None]),
        "reward_gap": _summary([p.reward_gap for p in kept] if scored else []),
    }
    return columns, report


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None


class NoPairsError(ValueError):
    """Error of a loop in which no pair is left to train on."""


def weighed(pairs: Sequence[PreferencePair], weighing: Weighing) -> tuple[list[PreferencePair], dict]:
    """Select and weight the loop's pairs for training, and report those that are dropped.

    Raises: NoPairsError if none is left.
    """
    kept, report = weigh(with_roles(pairs, weighing.roles), weighing.use_w1, weighing.use_w2)
    if not kept:
        dropped = ", ".join(f"{reason} {n}" for reason, n in report["dropped"].items())
        got = f"got none of {len(pairs)} ({dropped})"
        raise NoPairsError(
            f"loop: expected pairs to train on, {got}. Train the next stage further, or make more pairs"
            " (--set loop_pairs=N)."
        )
    return kept, report


def used(
    pairs: Sequence[PreferencePair], use: str, seed: int, human_pairs: Sequence[PreferencePair]
) -> list[PreferencePair]:
    """Return the pairs that a control trains on in place of the loop's kept pairs.

    Args: use: one of USES; seed: of the random inversions.
    """
    # the people's pairs from which the kept pairs were made, so that their number is similar
    if use == PEOPLES:
        origins = {pair.provenance["human_pair"] for pair in pairs}
        return [pair for pair in human_pairs if pair.id in origins]
    if use == INVERTED:
        return [inverted(pair) for pair in pairs]
    if use == RANDOMISED:
        # the random stream keeps its name, so that seeds give the same inversions as in version 0.1
        return [inverted(pair) if derive_seed("coin", seed, pair.id) % 2 else pair for pair in pairs]
    return list(pairs)
