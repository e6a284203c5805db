"""Compute the gradients of an update by one of the losses, and the figures that are summed over its samples.

An objective generates the samples that its loss needs, and computes and adds the gradients of some of them.
`sums` are the names of the figures that it returns, with mass and loss first.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; G groups, K samples of a group, n samples
of a pass.
"""

import random
from collections.abc import Sequence

import torch

from eg3d_rlhf.models.sparse import Batch, count, feats_of, single
from eg3d_rlhf.tuning.flow.base.sampling import evaluating, stage_noise
from eg3d_rlhf.tuning.flow.training.losses import (
    clipped_ratio_loss,
    dgpo_loss,
    dgpo_stopped,
    dppo_dropped,
    dppo_loss,
    goodness,
    guard_loss,
    guarded_ratio,
    nft_errors,
    nft_loss,
    outside_clip,
)
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Drawn, Explorer
from eg3d_rlhf.tuning.flow.training.online.settings import OnlineConfig, progressive_window, random_window
from eg3d_rlhf.tuning.flow.training.online.snapshot import Snapshot
from eg3d_rlhf.tuning.flow.training.online.steps import divergence, log_density
from training.phases import derive_seed

EARLIEST = 0.02  # least time to train on: below it errors of finished samples hardly depend on the sample
Totals = dict[str, torch.Tensor]  # sums over samples, and over their moves or noises; "mass" is their number


class OnSteps:
    """Objective of GRPO, GRPO-Guard and Flow-DPPO, on the densities of the sampler's steps.

    The samples come from the policy in training.
    """

    sums: Sequence[str] = ("mass", "loss", "high", "low", "stopped", "ratio", "ratio_square")

    def __init__(self, config: OnlineConfig, explorer: Explorer):
        self.config = config
        self.explorer = explorer
        self.path = explorer.task.stage.path

    def steps_of(self, step: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the indices of the sampler's steps with noise in an update, and of those trained on."""
        config = self.config
        # the last step is taken by its mean, and has no density
        most = len(self.explorer.steps) - 1
        if config.window is not None:
            end = config.find_window_end(len(self.explorer.steps))
            # seeded by the update: all ranks, and a resumed run, have the same window
            if config.window_moves == "random":
                draw = random.Random(derive_seed("window", config.seed, step)).randint
                window = random_window(config.window, 0, end, draw)
            else:
                window = progressive_window(
                    step, config.window, 0, end, stride=1, rounds=config.window_updates, repeat=True
                )
            return window, window
        if config.trained_steps is None:
            return range(most), range(most)
        generator = torch.Generator().manual_seed(derive_seed("trained steps", config.seed, step))
        return range(most), sorted(torch.randperm(most, generator=generator)[: config.trained_steps].tolist())

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        """Generate the groups of an update, in passes."""
        return self.explorer.draw(prompts, seeds, *self.steps_of(step))

    def totals_of(self, drawn: Sequence[Drawn]) -> Totals:
        """Sum the figures of the samples' moves, by name; "moves" is their number."""
        rows = []
        for samples in drawn:
            for move in samples.moves:
                at = feats_of(move.x).new_full([count(move.x)], move.step.t)
                # the velocity that leads from x straight to the finished sample
                target = self.path.velocity_to(move.x, at, samples.x_0)
                drift = self.path.apart(move.v, move.v_ref)
                left = self.path.apart(target, move.v_ref)
                # [4, n] -> [4]
                rows.append(torch.stack([torch.ones_like(drift), move.far, drift, left]).sum(1))
        moves, kl, drift, left = torch.stack(rows).sum(0)
        return {"moves": moves, "kl": kl, "drift": drift, "missing": left}

    def add(
        self, drawn: Drawn, advantage: torch.Tensor, held: torch.Tensor, step: int, number: int
    ) -> Totals:
        """Compute and add the gradients of some samples, and return their figures.

        Args: held: [n], factor of the weight of the distance; number: of the pass over the update's samples.
        """
        config = self.config
        totals = torch.zeros(len(self.sums), device=advantage.device)  # in the order of `sums`
        # one backward pass a move: the graph of a single step is in memory at a time
        for move in drawn.moves:
            at = move.step
            mean = at.mean(move.x, self.explorer.velocity(move.x, at.t, drawn.cond, drawn.no_cond))
            log_p = log_density(move.to, mean, at.std)
            limit = config.choose_clip(feats_of(move.x).numel() / count(move.x), at.std)
            ratio = torch.exp(log_p - move.log_p)  # 1 in the first pass, up to rounding
            # each branch sets the loss; the guard and Flow-DPPO also need the divergence from the old step
            if config.loss == "grpo":
                loss = clipped_ratio_loss(ratio, advantage, limit)
            else:
                moved = divergence(mean, move.mean, at.std)
            if config.loss == "grpo-guard":
                ratio = guarded_ratio(log_p, move.log_p, moved, at.std)
                loss = guard_loss(ratio, advantage, limit, at.length)
            # of Flow-DPPO, too, so that its figures can be compared with those of GRPO
            out = outside_clip(ratio, advantage, limit)
            stopped = out.stopped
            if config.loss == "dppo":
                stopped = dppo_dropped(ratio, moved, advantage, limit)
                loss = dppo_loss(ratio, advantage, stopped)
            # the distance from the untuned network, weighted by the gate where there is one
            if config.kl:
                loss = loss + config.kl * held * divergence(mean, move.reference, at.std)
            loss.sum().backward()
            off = ratio.detach() - 1  # near 0, which keeps digits that a sum of ratios near 1 would lose
            parts = (torch.ones_like(off), loss.detach(), out.high, out.low, stopped, off, off.square())
            totals += torch.stack([part.float().sum() for part in parts])
        return dict(zip(self.sums, totals, strict=True))


class OnLatents:
    """Objective of DiffusionNFT and DGPO, on errors of finished samples at times of the stage's own schedule.

    The methods correspond to those of OnSteps.

    Args: old: the sampling network, which follows the policy.
    """

    sums: Sequence[str] = ("mass", "loss", "kl", "moved", "lag", "old_missing", "missing", "stopped")

    def __init__(self, config: OnlineConfig, explorer: Explorer, old: Snapshot):
        self.config = config
        self.explorer = explorer
        self.old = old
        self.stage = explorer.task.stage

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        """Generate the groups of an update by the sampling network, in passes."""
        # the explorer samples from the policy's module, which has the snapshot's parameters here
        with self.old.active():
            return self.explorer.draw(prompts, seeds)

    def totals_of(self, drawn: Sequence[Drawn]) -> Totals:
        """Return nothing: finished samples have no moves."""
        return {}

    def add(
        self, drawn: Drawn, advantage: torch.Tensor, held: torch.Tensor, step: int, number: int
    ) -> Totals:
        """Compute and add the gradients of some samples, see OnSteps.add."""
        totals = torch.zeros(len(self.sums), device=advantage.device)
        # several times and noises a sample: the error at a single one is noisy
        for k in range(self.config.draws):
            totals += self._drawn_once(drawn, advantage, held, *self._noised(drawn, step, number, k))
        return dict(zip(self.sums, totals, strict=True))

    def _noised(self, drawn: Drawn, step: int, number: int, k: int) -> tuple[torch.Tensor, Batch]:
        """Sample times [n] and noises of samples.

        DGPO has one time for the whole update, and one noise for each group, as its loss compares the errors
        of a group at the same time and noise.
        """
        if self.config.loss == "dgpo":
            names = [("group", seed) for seed in drawn.seeds]
            clocks: list[tuple] = [("update", self.config.seed, step)] * len(names)
        else:
            members = zip(drawn.seeds, drawn.members, strict=True)
            names = [("sample", seed, member) for seed, member in members]  # type: ignore[misc]
            clocks = list(names)
        generators = [
            torch.Generator().manual_seed(derive_seed("time", *clock, number, k)) for clock in clocks
        ]
        t = (
            torch.cat([self.stage.path.times(1, generator) for generator in generators])
            .clamp(min=EARLIEST)
            .to(self.explorer.device)
        )
        eps = stage_noise(
            self.stage, [derive_seed("train", *name, number, k) % 2**31 for name in names], drawn.given
        )
        return t, eps.to(self.explorer.device)

    def _drawn_once(
        self, drawn: Drawn, advantage: torch.Tensor, held: torch.Tensor, t: torch.Tensor, eps: Batch
    ) -> torch.Tensor:
        """Compute and add the gradients at one time and noise a sample, and return their figures."""
        config = self.config
        stage = self.stage
        policy = self.explorer.policy
        path = self.stage.path
        x_t = path.mix(drawn.x_0, t, eps)
        u = path.velocity(drawn.x_0, eps)  # target of flow matching
        # both frozen networks first, since their activations are not kept
        old = single(self.old.velocity(stage, x_t, t, drawn.cond))
        ref = single(self.explorer.reference.velocity(stage, x_t, t, drawn.cond))
        with evaluating(policy):
            v = single(stage.velocity(x_t, t, drawn.cond, policy))
        drift = path.apart(v, ref)  # [n], the distance that kl weights
        old_missing = path.apart(u, old)
        missing = path.apart(u, ref)
        stopped = torch.zeros_like(advantage, dtype=torch.bool)
        # goodness and the loss must use the same C
        if config.loss == "nft":
            errors = nft_errors(v, old, u, path.sigma(t), config.curvature, not config.plain, path.per_sample)
            loss = nft_loss(errors, goodness(advantage, config.adv_clip), config.adv_clip, config.curvature)
        else:
            error = path.apart(v, u)
            stopped = dgpo_stopped(error, old_missing, advantage, config.choose_clip(1))
            error, ref_error, of_group = (
                values.view(-1, config.group)
                for values in (torch.where(stopped, error.detach(), error), missing, advantage)
            )
            # [n] -> [G, K] -> [G] -> [n]: each sample has its group's loss, and the sum K times the group's
            loss = dgpo_loss(error, ref_error, of_group, config.group_beta).repeat_interleave(config.group)
        if config.kl:
            loss = loss + config.kl * held * drift
        loss.sum().backward()
        parts = (
            torch.ones_like(drift),
            loss,
            drift,
            path.apart(v, old),
            path.apart(old, ref),
            old_missing,
            missing,
            stopped,
        )
        return torch.stack([part.detach().float().sum() for part in parts])
