"""Compute the gradients of an update by one of the losses, and the metrics that are summed over its samples.

An objective generates the samples that its loss needs (`draw`). For some of these samples at a time, it
computes the gradients and adds them to those of the parameters (`add`). The attribute `sums` has the names of
the metrics that `add` returns, with the number of samples ("mass") and the loss first. losses.py has the
equations.

A move is one step of the sampler with noise, as it was sampled.

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

# smallest time to train on; at smaller times the errors of finished samples hardly depend on the sample
MIN_TIME = 0.02
# sums over samples and over their moves or noises, by name of the metric; "mass" is the number of summands
Totals = dict[str, torch.Tensor]


class OnSteps:
    """Objective of GRPO, GRPO-Guard and Flow-DPPO, on the densities of the sampler's steps.

    The samples come from the policy in training.

    Args:
        config: settings of the training.
        explorer: sampler of the policy and of the reference.
    """

    sums: Sequence[str] = ("mass", "loss", "high", "low", "stopped", "ratio", "ratio_square")

    def __init__(self, config: OnlineConfig, explorer: Explorer):
        self.config = config
        self.explorer = explorer
        self.path = explorer.task.stage.path

    def steps_of(self, step: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the indices of the sampler's steps of an update: those with noise, and those trained on."""
        config = self.config
        # the last step has no noise, and so no density
        noisy_count = len(self.explorer.steps) - 1
        if config.window is not None:
            window_end = config.find_window_end(len(self.explorer.steps))
            # seeded by the update: all ranks, and a resumed run, have the same window
            if config.window_moves == "random":
                random_integer = random.Random(derive_seed("window", config.seed, step)).randint
                window = random_window(config.window, 0, window_end, random_integer)
            else:
                window = progressive_window(
                    step, config.window, 0, window_end, stride=1, rounds=config.window_updates, repeat=True
                )
            return window, window
        if config.trained_steps is None:
            return range(noisy_count), range(noisy_count)
        generator = torch.Generator().manual_seed(derive_seed("trained steps", config.seed, step))
        return range(noisy_count), sorted(
            torch.randperm(noisy_count, generator=generator)[: config.trained_steps].tolist()
        )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        """Generate the groups of an update, in passes.

        Args: prompts: prompt of each group, [G]; seeds: seed of each group, [G]; step: number of the update.
        """
        return self.explorer.draw(prompts, seeds, *self.steps_of(step))

    def totals_of(self, sampled_passes: Sequence[Drawn]) -> Totals:
        """Sum metrics over the moves of all samples, by name.

        moves: number of moves; kl: divergence from the reference; drift: m((v - v_ref)^2); missing:
        m((u - v_ref)^2), with m the mean over the elements of a sample, and u the velocity that leads
        straight to the finished sample.
        """
        move_sums = []
        for samples in sampled_passes:
            for move in samples.moves:
                sample_times = feats_of(move.x).new_full([count(move.x)], move.step.t)
                # the velocity that leads from x straight to the finished sample
                target = self.path.velocity_to(move.x, sample_times, samples.x_0)
                drift = self.path.apart(move.v, move.v_ref)
                ref_error = self.path.apart(target, move.v_ref)
                # [4, n] -> [4]
                move_sums.append(
                    torch.stack([torch.ones_like(drift), move.ref_divergence, drift, ref_error]).sum(1)
                )
        move_count, kl, drift, ref_error = torch.stack(move_sums).sum(0)
        return {"moves": move_count, "kl": kl, "drift": drift, "missing": ref_error}

    def add(
        self,
        samples: Drawn,
        advantage: torch.Tensor,
        distance_factor: torch.Tensor,
        step: int,
        optimizer_step: int,
    ) -> Totals:
        """Compute and add the gradients of the n samples of a pass, and return the sums of their metrics.

        Args:
            samples: the samples.
            advantage: advantage of each sample, [n].
            distance_factor: factor of each sample's weight `kl` of the distance from the reference, [n].
            step: number of the update.
            optimizer_step: number of the optimiser's step on the samples of the update, counted from 0.
        """
        config = self.config
        totals = torch.zeros(len(self.sums), device=advantage.device)  # in the order of `sums`
        # one backward pass a move: the graph of a single step is in memory at a time
        for move in samples.moves:
            sampler_step = move.step
            mean = sampler_step.mean(
                move.x, self.explorer.velocity(move.x, sampler_step.t, samples.cond, samples.no_cond)
            )
            log_p = log_density(move.next_x, mean, sampler_step.std)
            # elements of one sample: all samples of a batch are counted together
            clip_range = config.choose_clip(feats_of(move.x).numel() / count(move.x), sampler_step.std)
            ratio = torch.exp(log_p - move.log_p)  # 1 in the first pass, up to rounding
            # GRPO-Guard and Flow-DPPO also need the divergence of the step from the step of the sampling
            # policy
            if config.loss == "grpo":
                loss = clipped_ratio_loss(ratio, advantage, clip_range)
            else:
                step_divergence = divergence(mean, move.mean, sampler_step.std)
            if config.loss == "grpo-guard":
                ratio = guarded_ratio(log_p, move.log_p, step_divergence, sampler_step.std)
                loss = guard_loss(ratio, advantage, clip_range, sampler_step.length)
            # computed for Flow-DPPO, too, so that its metrics can be compared with those of GRPO
            clip_masks = outside_clip(ratio, advantage, clip_range)
            is_stopped = clip_masks.stopped
            if config.loss == "dppo":
                is_stopped = dppo_dropped(ratio, step_divergence, advantage, clip_range)
                loss = dppo_loss(ratio, advantage, is_stopped)
            # the distance from the untuned network, weighted by the gate where there is one
            if config.kl:
                loss = loss + config.kl * distance_factor * divergence(mean, move.reference, sampler_step.std)
            loss.sum().backward()
            ratio_change = ratio.detach() - 1  # near 0: a sum of ratios near 1 would lose digits
            summands = (
                torch.ones_like(ratio_change),
                loss.detach(),
                clip_masks.high,
                clip_masks.low,
                is_stopped,
                ratio_change,
                ratio_change.square(),
            )
            totals += torch.stack([summand.float().sum() for summand in summands])
        return dict(zip(self.sums, totals, strict=True))


class OnLatents:
    """Objective of DiffusionNFT and DGPO, on errors of finished samples at times of the stage's own schedule.

    The methods correspond to those of OnSteps.

    Args:
        config: settings of the training.
        explorer: sampler of the policy and of the reference.
        sampling_network: network that generates the samples, a snapshot that follows the policy.
    """

    sums: Sequence[str] = ("mass", "loss", "kl", "moved", "lag", "old_missing", "missing", "stopped")

    def __init__(self, config: OnlineConfig, explorer: Explorer, sampling_network: Snapshot):
        self.config = config
        self.explorer = explorer
        self.sampling_network = sampling_network
        self.stage = explorer.task.stage

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        """Generate the groups of an update by the sampling network, in passes; see OnSteps.draw."""
        # the explorer samples from the policy's module, which has the snapshot's parameters here
        with self.sampling_network.active():
            return self.explorer.draw(prompts, seeds)

    def totals_of(self, sampled_passes: Sequence[Drawn]) -> Totals:
        """Return an empty mapping, since finished samples have no moves."""
        return {}

    def add(
        self,
        samples: Drawn,
        advantage: torch.Tensor,
        distance_factor: torch.Tensor,
        step: int,
        optimizer_step: int,
    ) -> Totals:
        """Compute and add the gradients of the n samples of a pass, see OnSteps.add."""
        totals = torch.zeros(len(self.sums), device=advantage.device)
        # several times and noises for each sample, since the error at a single one is noisy
        for k in range(self.config.draws):
            totals += self._drawn_once(
                samples, advantage, distance_factor, *self._noised(samples, step, optimizer_step, k)
            )
        return dict(zip(self.sums, totals, strict=True))

    def _noised(
        self, samples: Drawn, step: int, optimizer_step: int, draw_number: int
    ) -> tuple[torch.Tensor, Batch]:
        """Sample a time and a noise for each sample; return the times [n] and the n noises.

        For DGPO all samples of an update have the same time, and all samples of a group the same noise, since
        its loss compares the errors of a group at the same time and noise.

        Args:
            samples: the samples.
            step: number of the update.
            optimizer_step: number of the optimiser's step on the samples, counted from 0.
            draw_number: number of the time and noise of a sample, counted from 0.
        """
        if self.config.loss == "dgpo":
            noise_keys: list[tuple] = [("group", seed) for seed in samples.seeds]
            time_keys: list[tuple] = [("update", self.config.seed, step)] * len(noise_keys)
        else:
            groups_and_members = zip(samples.seeds, samples.members, strict=True)
            noise_keys = [("sample", seed, member_index) for seed, member_index in groups_and_members]
            time_keys = list(noise_keys)
        generators = [
            torch.Generator().manual_seed(derive_seed("time", *seed_key, optimizer_step, draw_number))
            for seed_key in time_keys
        ]
        t = torch.cat([self.stage.path.times(1, generator) for generator in generators])
        t = t.clamp(min=MIN_TIME).to(self.explorer.device)
        # seeds of noises are below 2**31
        noise_seeds = [
            derive_seed("train", *seed_key, optimizer_step, draw_number) % 2**31 for seed_key in noise_keys
        ]
        eps = stage_noise(self.stage, noise_seeds, samples.voxels)
        return t, eps.to(self.explorer.device)

    def _drawn_once(
        self,
        samples: Drawn,
        advantage: torch.Tensor,
        distance_factor: torch.Tensor,
        t: torch.Tensor,
        eps: Batch,
    ) -> torch.Tensor:
        """Compute and add the gradients at one time and one noise for each sample; return the metrics' sums.

        Args:
            samples: the n samples.
            advantage: advantage of each sample, [n].
            distance_factor: factor of each sample's weight `kl` of the distance from the reference, [n].
            t: times [n] in 0..1.
            eps: n noises.
        """
        config = self.config
        stage = self.stage
        policy = self.explorer.policy
        path = self.stage.path
        x_t = path.mix(samples.x_0, t, eps)
        u = path.velocity(samples.x_0, eps)  # target of flow matching
        # both frozen networks are computed first, while no activations of the policy take memory
        old_v = single(self.sampling_network.velocity(stage, x_t, t, samples.cond))
        ref_v = single(self.explorer.reference.velocity(stage, x_t, t, samples.cond))
        with evaluating(policy):
            v = single(stage.velocity(x_t, t, samples.cond, policy))
        drift = path.apart(v, ref_v)  # [n], the distance that kl weights
        old_error = path.apart(u, old_v)
        ref_error = path.apart(u, ref_v)
        is_stopped = torch.zeros_like(advantage, dtype=torch.bool)
        # goodness and the loss must use the same C
        if config.loss == "nft":
            errors = nft_errors(
                v, old_v, u, path.sigma(t), config.curvature, not config.plain, path.per_sample
            )
            loss = nft_loss(errors, goodness(advantage, config.adv_clip), config.adv_clip, config.curvature)
        else:
            policy_error = path.apart(v, u)
            is_stopped = dgpo_stopped(policy_error, old_error, advantage, config.choose_clip(1))
            policy_error, group_ref_errors, group_advantage = (
                quantity.view(-1, config.group)
                for quantity in (
                    torch.where(is_stopped, policy_error.detach(), policy_error),
                    ref_error,
                    advantage,
                )
            )
            # [n] -> [G, K] -> [G] -> [n]: each sample has its group's loss, and the sum K times the group's
            loss = dgpo_loss(
                policy_error, group_ref_errors, group_advantage, config.group_beta
            ).repeat_interleave(config.group)
        if config.kl:
            loss = loss + config.kl * distance_factor * drift
        loss.sum().backward()
        summands = (
            torch.ones_like(drift),
            loss,
            drift,
            path.apart(v, old_v),
            path.apart(old_v, ref_v),
            old_error,
            ref_error,
            is_stopped,
        )
        return torch.stack([summand.detach().float().sum() for summand in summands])
