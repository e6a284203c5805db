"""Make the loop's pairs of a stage from samples of the next stage, select them (w1), and weight them (w2).

No gradient passes from a stage to the previous one, so preferences are passed on by new pairs instead. They
are made from each human pair in three steps (Circular-DPO, section 4.2 and appendix C.3), with i the stage to
be trained:
    1. The latent of stage i of the preferred asset is handed to stage i + 1.
    2. Stage i + 1 is sampled with it twice from the same noise: the tuned sample (the paper's "op") from the
       tuned network, and the reference sample from the reference network. Later stages, if there are any, are
       the same for both samples.
    3. The tuned and the reference sample are decoded to assets, scored, and encoded back. Their latents of
       stage i are the new pair, with the tuned sample preferred.
The two latents of a pair differ only if decoding gave assets that are encoded differently. Pairs whose
latents are equal are marked in `provenance`, since with shared noise they have the loss log 2 and no
gradient. The remaining pairs are selected by w1 and weighted by w2 (equations 10-14):

    w1 = G_preferred - G_rejected,  G = 2^P - 1,  P_i = 2 C_i / (n (n - 1)),
         C_i the comparisons that candidate i of n wins by reward
    w2 = sigmoid(r_preferred - r_rejected) / its mean over the selected pairs,  r the reward

The candidates are the preferred and the rejected samples of all pairs of a prompt. With one reward and the
paper's threshold of 0, w1 selects a pair exactly if its reward gap r_preferred - r_rejected is positive. The
other candidates then have no influence.

Deviates: one sentence of appendix C.3 pairs generated assets with the original ones; here, as in
algorithm 1 and equation 11, the rejected sample is the reference's.
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
    """Return the name of the stage after `stage`, from whose samples the pairs of `stage` are made.

    Args: stages: names of all stages, in order; stage: any of them except the last.
    """
    return stages[stages.index(stage) + 1]


@dataclass(frozen=True, kw_only=True)
class LoopPairMaker:
    """Callable that makes new pairs of a stage from human pairs."""

    pipeline: Pipeline
    reward: AssetReward  # reward of finished assets
    stage: str  # name of the stage to be trained
    tuned_models: Models  # tuned networks by stage; the next stage is among them
    # reference networks by stage; only the one of the next stage is used, since both samples of a pair have
    # the same later stages, those of tuned_models
    reference_models: Models
    config: LoopPairsConfig
    # seed of the noises, which also depend on the id of the human pair, so that chunks do not change the
    # result
    seed: int

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
        """Create the maker with the pipeline and the reward of a problem.

        Args:
            problem: problem with the pipeline and the reward.
            tuned_models: tuned networks by stage.
            config: settings of how pairs are made.
            seed: seed of the noises.
            stage: name of the stage to be trained.
            reference_models: reference networks by stage; None: the pipeline's own networks.
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
        """Make new pairs of the stage, `config.per_pair` from each human pair.

        Args:
            pairs: human pairs of the stage.
            on_pair: function that is called with the number of human pairs that were just done.
        """
        sampled_stage = next_stage([stage.name for stage in self.pipeline.stages], self.stage)
        assert sampled_stage in self.tuned_models
        # tuned and reference samples differ in the network of the next stage alone
        reference_networks = {
            name: model for name, model in self.tuned_models.items() if name != sampled_stage
        }
        if sampled_stage in self.reference_models:
            reference_networks[sampled_stage] = self.reference_models[sampled_stage]
        # `batch` is a number of assets; each human pair gives per_pair tuned and per_pair reference samples
        pairs_per_batch = max(1, self.config.batch // self.config.per_pair)
        new_pairs = []
        for i in range(0, len(pairs), pairs_per_batch):
            batch_pairs = pairs[i : i + pairs_per_batch]
            new_pairs += self._batch(batch_pairs, (self.tuned_models, reference_networks), sampled_stage)
            if on_pair:
                on_pair(len(batch_pairs))
        return new_pairs

    @torch.no_grad()
    def _batch(
        self, pairs: Sequence[PreferencePair], networks_of_samples: Sequence[Models], sampled_stage: str
    ) -> list[PreferencePair]:
        """Make the new pairs of a batch of human pairs.

        Args:
            pairs: human pairs of the batch.
            networks_of_samples: networks by stage, first those of the tuned samples and then those of the
                reference samples.
            sampled_stage: name of the next stage, which is sampled.
        """
        config = self.config
        stage = self.stage
        device = next(self.pipeline.stages[0].model.parameters()).device
        # step 1: the preferred latents give the voxels of the next stage
        pair_voxels = self.pipeline.advance(stage, collate([pair.preferred for pair in pairs]).to(device))
        sample_inputs = [
            (pair, voxels, k)
            for pair, voxels in zip(pairs, pair_voxels, strict=True)
            for k in range(config.per_pair)
        ]
        prompts = [pair.condition for pair, _, _ in sample_inputs]
        # the tuned and the reference sample of a new pair have the same seed, which is below 2**31
        seeds = [derive_seed("loop", self.seed, stage, pair.id, k) % 2**31 for pair, _, k in sample_inputs]
        voxels_by_stage = {sampled_stage: [voxels for _, voxels, _ in sample_inputs]}
        # latents of the stage: a list for the tuned and one for the reference samples
        latents_by_network = []
        rewards_by_network = []  # rewards [n] of the tuned and of the reference samples
        for models in networks_of_samples:
            # steps 2 and 3
            assets = generate(self.pipeline, prompts, seeds, models, config.batch, voxels_by_stage)
            rewards_by_network.append(self.reward(assets, prompts).detach().float().cpu())
            latents_by_network.append(
                [to_cpu(latents_by_stage[stage]) for latents_by_stage in self.pipeline.encode(assets)]
            )
        # w1 compares rewards, and a comparison with NaN would always be false
        if not all(bool(sample_rewards.isfinite().all()) for sample_rewards in rewards_by_network):
            all_rewards = torch.cat(rewards_by_network)
            raise ValueError(
                f"loop pairs: {int((~all_rewards.isfinite()).sum())} of {len(all_rewards)} rewards are NaN or"
                " infinite. Correct the reward, so that all its results are finite."
            )
        new_pairs = [
            PreferencePair(
                id=f"{pair.id}/{k}",
                condition=pair.condition,
                stage=stage,
                preferred=tuned_latent,
                rejected=reference_latent,
                source="loop",
                reward_preferred=float(rewards_by_network[0][sample_index]),
                reward_rejected=float(rewards_by_network[1][sample_index]),
                provenance={
                    "human_pair": pair.id,
                    "noise_seed": seeds[sample_index],
                    "sampled_stage": sampled_stage,
                },
            )
            for sample_index, ((pair, _, k), tuned_latent, reference_latent) in enumerate(
                zip(sample_inputs, *latents_by_network, strict=True)
            )
        ]
        # the comparison of latents, element by element, is recorded in the pair, so that it is done only once
        return [
            replace(pair, provenance={**pair.provenance, SAME: same_structure(pair)}) for pair in new_pairs
        ]


def with_roles(pairs: Sequence[PreferencePair], roles: str) -> list[PreferencePair]:
    """Return the pairs, inverted if `roles` requires it.

    With "tuned", as in the paper, the tuned network's sample is preferred, and pairs are returned unchanged.
    With "reward", pairs whose rejected sample has the higher reward are inverted.
    """
    return [invert_pair(pair) if roles == REWARD and pair.reward_gap < 0 else pair for pair in pairs]


def invert_pair(pair: PreferencePair) -> PreferencePair:
    """Return the pair with preferred and rejected sample exchanged, which is recorded in its provenance."""
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
    pair_maker: LoopPairMaker,
    human_pairs: Sequence[PreferencePair],
    *,
    ranks: Ranks = SINGLE,
    on_pair: Callable[[int], None] | None = None,
) -> tuple[Path, Mapping]:
    """Make new pairs from all human pairs, and write the new pairs to folder/pairs.

    The chunks of pairs are distributed over the ranks. A finished chunk stays on the disk until all chunks
    are finished, so that an interrupted call can be resumed.

    Args:
        folder: folder for the result and the chunks.
        pair_maker: maker of the pairs.
        human_pairs: all human pairs of the stage.
        ranks: this process among the processes that work together.
        on_pair: function that is called with the number of human pairs that were just done.

    Returns: the path folder/pairs; and statistics of the pairs (see summarise_pairs), which are empty on all
        ranks but 0.
    """
    chunk_starts = range(0, len(human_pairs), pair_maker.config.chunk)
    chunks_folder = folder / "chunks"
    # this rank makes every world-th chunk
    for chunk_number, chunk_start in list(enumerate(chunk_starts))[ranks.rank :: ranks.world]:
        chunk_pairs = human_pairs[chunk_start : chunk_start + pair_maker.config.chunk]
        chunk_folder = chunks_folder / f"{chunk_number:05d}"
        # finished before an interruption; the progress bar counts its pairs, too
        if chunk_folder.exists():
            if on_pair:
                on_pair(len(chunk_pairs))
            continue
        new_pairs = pair_maker(chunk_pairs, on_pair)
        # an interrupted call may have left an incomplete folder of this chunk
        unfinished_folder = chunk_folder.with_suffix(".part")
        shutil.rmtree(unfinished_folder, ignore_errors=True)
        write_pairs(unfinished_folder, new_pairs, {"seed": pair_maker.seed, "chunk": chunk_number})
        # renaming is atomic, so a folder of the final name is always complete
        os.replace(unfinished_folder, chunk_folder)
    ranks.barrier()
    # rank 0 alone joins the chunks
    if not ranks.is_main:
        return folder / "pairs", {}
    pairs: list[PreferencePair] = []
    for chunk_number in range(len(chunk_starts)):
        # read_pairs returns (pairs, description)
        pairs += read_pairs(chunks_folder / f"{chunk_number:05d}", pair_maker.stage)[0]
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    pairs_meta = {
        "seed": pair_maker.seed,
        "stage": pair_maker.stage,
        "source": "loop",
        "config": asdict(pair_maker.config),
    }
    write_pairs(folder / "pairs", pairs, pairs_meta)
    shutil.rmtree(chunks_folder)
    return folder / "pairs", summarise_pairs(pairs)


def summarise_pairs(pairs: Sequence[PreferencePair]) -> Mapping:
    """Summarise all new pairs, before any of them is dropped, as JSON.

    The summary has the number of pairs, the share of pairs whose two latents differ (changed_structure), the
    share of pairs whose tuned sample has the higher reward, and mean and standard deviation of the reward
    gap.
    """
    if not pairs:
        return {"pairs": 0}
    # reward of the tuned sample minus that of the reference sample, since roles are not exchanged yet
    gaps = torch.tensor([pair.reward_gap for pair in pairs], dtype=torch.float64)
    has_changed = torch.tensor([not pair.provenance[SAME] for pair in pairs])
    return {
        "pairs": len(pairs),
        "changed_structure": float(has_changed.double().mean()),
        "tuned_rewarded": float((gaps > 0).double().mean()),
        "tuned_rewarded_where_changed": (
            float((gaps[has_changed] > 0).double().mean()) if bool(has_changed.any()) else None
        ),
        "reward_gap_mean": float(gaps.mean()),
        "reward_gap_std": float(gaps.std(correction=0)),
    }


# largest difference, as a share of the largest value, of latents that count as one structure encoded twice
EQUAL = 1e-5


def win_shares(rewards: torch.Tensor) -> torch.Tensor:
    """Compute the share of all comparisons that each of n candidates wins by its reward, [n] -> [n] float64.

    The shares sum to 1 (P in Circular-DPO, equations 10-14). If two candidates have equal rewards, each wins
    half a comparison.

    >>> win_shares(torch.tensor([3.0, 1.0, 2.0]))
    tensor([0.6667, 0.0000, 0.3333], dtype=torch.float64)
    """
    n = len(rewards)
    assert n > 1 and bool(torch.isfinite(rewards).all())
    # [n, n]: row i holds the wins of candidate i
    wins = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards).double()
    return 2 * (wins.sum(1) - 0.5) / (n * (n - 1))  # - 0.5: without the half win against itself


def w1(
    rewards: torch.Tensor, preferred_indices: torch.Tensor, rejected_indices: torch.Tensor
) -> torch.Tensor:
    """Compute w1 = G_preferred - G_rejected of P pairs of one prompt, [P] float64.

    Args:
        rewards: rewards of all n candidates of the prompt, [n].
        preferred_indices: index of the preferred candidate of each pair, [P] int64.
        rejected_indices: index of the rejected candidate of each pair, [P] int64.
    """
    # G = 2^P - 1 of every candidate, [n]
    gains = torch.exp2(win_shares(rewards)) - 1
    return gains[preferred_indices] - gains[rejected_indices]


def w2(gaps: torch.Tensor) -> torch.Tensor:
    """Compute w2 from the reward gaps of the selected pairs, [P] -> [P] float64.

    w2 is the sigmoid of the gap, divided by the mean of the sigmoids of all gaps.
    """
    weights = torch.sigmoid(gaps.double())
    # mean 1, so that weighting does not change the size of the loss
    return weights / weights.mean()


def same_structure(pair: PreferencePair) -> bool:
    """Return True if the two latents of a pair are equal up to rounding; such a pair has no gradient.

    If the pair's `provenance` has the key "same_structure", its value is returned without a comparison.
    """
    if pair.provenance.get(SAME) is not None:
        return bool(pair.provenance[SAME])
    # both latents have the same form
    preferred_latent = pair.preferred
    rejected_latent = pair.rejected
    if isinstance(preferred_latent, SparseSample) and isinstance(rejected_latent, SparseSample):
        if len(preferred_latent.coords) != len(rejected_latent.coords):
            return False
        # the order of voxels has no meaning, so the voxels of both are sorted by their index in the grid
        preferred_order = torch.argsort(preferred_latent.places)
        rejected_order = torch.argsort(rejected_latent.places)
        if not torch.equal(preferred_latent.coords[preferred_order], rejected_latent.coords[rejected_order]):
            return False
        preferred_feats = preferred_latent.feats[preferred_order]
        rejected_feats = rejected_latent.feats[rejected_order]
    else:
        preferred_feats = feats_of(preferred_latent)
        rejected_feats = feats_of(rejected_latent)
    return bool((preferred_feats - rejected_feats).abs().max() <= EQUAL * preferred_feats.abs().max())


def weigh(
    pairs: Sequence[PreferencePair], use_w1: bool = True, use_w2: bool = True
) -> tuple[list[PreferencePair], dict]:
    """Select pairs and fill in their w1 and w2.

    Pairs whose latents have the same structure are dropped first, then, with `use_w1`, pairs with w1 <= 0.
    The candidates of a prompt are the preferred and the rejected samples of all its pairs. Without `use_w1`,
    w1 is filled in but drops nothing. Without `use_w2`, w2 stays empty and all pairs count alike.

    Returns: the selected pairs; and a report (JSON) with the number of dropped pairs by reason and statistics
        of w1, w2 and the reward gaps.

    Raises: ValueError for pairs without finite rewards if w1 or w2 is used.
    """
    check_unique("weigh", pairs)
    differing_pairs = [p for p in pairs if not same_structure(p)]
    # first pair without rewards, for the message
    unscored_pair = next((p for p in pairs if not p.scored), None)
    all_scored = bool(pairs) and unscored_pair is None
    if (use_w1 or use_w2) and unscored_pair is not None:
        raise ValueError(
            f"weigh: the pair {unscored_pair.id} has no finite rewards of its two samples, but w1 and w2 need"
            " them. Score the assets of all pairs, or pass use_w1=False and use_w2=False."
        )
    w1_by_id: dict[str, float] = {}  # id -> w1
    # all pairs are candidates, also pairs whose latents have the same structure
    for prompt_pairs in by_condition(pairs).values() if all_scored else ():
        rewards = torch.tensor(
            [p.rewards[0] for p in prompt_pairs] + [p.rewards[1] for p in prompt_pairs], dtype=torch.float64
        )
        # the preferred samples come first, then the rejected ones
        preferred_indices, rejected_indices = torch.arange(len(rewards)).chunk(2)
        # w1 is computed for all pairs of a prompt at once
        w1_by_id |= zip(
            (p.id for p in prompt_pairs),
            w1(rewards, preferred_indices, rejected_indices).tolist(),
            strict=True,
        )
    selected_pairs = [p for p in differing_pairs if not use_w1 or w1_by_id[p.id] > 0]
    weights: list[float | None] = [None] * len(selected_pairs)
    # computed after the selection, since the mean of w2 is taken over the selected pairs
    if use_w2 and selected_pairs:
        weights = w2(torch.tensor([p.reward_gap for p in selected_pairs], dtype=torch.float64)).tolist()
    weighted_pairs = [
        replace(p, w1=w1_by_id.get(p.id), w2=weight)
        for p, weight in zip(selected_pairs, weights, strict=True)
    ]
    report = {
        "pairs": len(pairs),
        "kept": len(selected_pairs),
        "dropped": {
            "same_structure": len(pairs) - len(differing_pairs),
            "w1": len(differing_pairs) - len(selected_pairs),
        },
        "w1": _summary([w1_by_id[p.id] for p in differing_pairs] if all_scored else []),
        "w2": _summary([weight for weight in weights if weight is not None]),
        "reward_gap": _summary([p.reward_gap for p in selected_pairs] if all_scored else []),
    }
    return weighted_pairs, report


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean, minimum and maximum of values, or None if there are no values."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None


class NoPairsError(ValueError):
    """Error of a loop in which all pairs of a stage were dropped, so that the stage cannot be trained."""


def select_and_weigh(
    pairs: Sequence[PreferencePair], weighing: Weighing
) -> tuple[list[PreferencePair], dict]:
    """Select and weight the loop's pairs for training, see `weigh`.

    Returns: the selected pairs; and the report of `weigh`.

    Raises: NoPairsError if all pairs are dropped.
    """
    selected_pairs, report = weigh(with_roles(pairs, weighing.roles), weighing.use_w1, weighing.use_w2)
    if not selected_pairs:
        dropped_counts = ", ".join(
            f"{reason} {dropped_count}" for reason, dropped_count in report["dropped"].items()
        )
        raise NoPairsError(
            f"loop: all {len(pairs)} pairs were dropped ({dropped_counts}), so there is nothing to train on."
            " Train the next stage further, or make more pairs (--set loop_pairs=N)."
        )
    return selected_pairs, report


def used(
    pairs: Sequence[PreferencePair], use: str, seed: int, human_pairs: Sequence[PreferencePair]
) -> list[PreferencePair]:
    """Return the pairs to train on: the loop's selected pairs, or those of a control that replaces them.

    For the uses that change only the loss, the selected pairs are returned unchanged.

    Args:
        pairs: selected pairs of the loop.
        use: use of the pairs, one of USES.
        seed: seed of the random inversions.
        human_pairs: all people's pairs of the stage.
    """
    # only the people's pairs from which the selected pairs were made, so that their number is similar
    if use == PEOPLES:
        human_ids = {pair.provenance["human_pair"] for pair in pairs}
        return [pair for pair in human_pairs if pair.id in human_ids]
    if use == INVERTED:
        return [invert_pair(pair) for pair in pairs]
    if use == RANDOMISED:
        # the name of the random stream is that of version 0.1, so that seeds give the same inversions as
        # there
        return [invert_pair(pair) if derive_seed("coin", seed, pair.id) % 2 else pair for pair in pairs]
    return list(pairs)
