"""What is summed over the samples of an update: gradients by one of the losses, and figures.

An objective draws the samples that its loss needs, and adds the gradients of some of them; `sums` are the
names of what it returns, mass and loss first.

Shape letters as in sparse.py; G groups, K samples of a group, n samples of a pass.
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

EARLIEST = 0.02  # time to train on: below it errors of finished samples teach next to nothing
Totals = dict[str, torch.Tensor]  # sums over samples, and over their moves or draws; "mass" is how many


class OnSteps:
    """GRPO, GRPO-Guard and Flow-DPPO: densities of the sampler's steps. The explorer's policy is the one in
    training.
    """

    sums: Sequence[str] = ("mass", "loss", "high", "low", "stopped", "ratio", "ratio_square")

    def __init__(self, config: OnlineConfig, explorer: Explorer):
        self.config = config
        self.explorer = explorer
        self.path = explorer.task.stage.path

    def steps_of(self, step: int) -> tuple[Sequence[int], Sequence[int]]:
        """Numbers of the sampler's steps that draw noise in an update, and of those that it trains on."""
        config = self.config
        most = len(self.explorer.steps) - 1
        if config.window is not None:
            end = config.last_window(len(self.explorer.steps))
            if config.window_moves == "random":
                draw = random.Random(derive_seed("window", config.seed, step)).randint
                window = random_window(config.window, 0, end, draw)
            else:
                window = progressive_window(
                    step, config.window, 0, end, stride=1, rounds=config.window_updates, again=True
                )
            return window, window
        if config.trained_steps is None:
            return range(most), range(most)
        generator = torch.Generator().manual_seed(derive_seed("trained steps", config.seed, step))
        return range(most), sorted(torch.randperm(most, generator=generator)[: config.trained_steps].tolist())

    def draw(self, conditions: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        return self.explorer.draw(conditions, seeds, *self.steps_of(step))

    def totals_of(self, drawn: Sequence[Drawn]) -> Totals:
        """Sum figures of the samples themselves, by name; "moves" is how many."""
        rows = []
        for samples in drawn:
            for move in samples.moves:
                at = feats_of(move.x).new_full([count(move.x)], move.step.t)
                # leads from x to where the sample ended
                target = self.path.velocity_to(move.x, at, samples.x_0)
                drift = self.path.apart(move.v, move.v_ref)
                left = self.path.apart(target, move.v_ref)
                rows.append(torch.stack([torch.ones_like(drift), move.far, drift, left]).sum(1))
        moves, kl, drift, left = torch.stack(rows).sum(0)
        return {"moves": moves, "kl": kl, "drift": drift, "missing": left}

    def add(
        self, drawn: Drawn, advantage: torch.Tensor, held: torch.Tensor, step: int, number: int
    ) -> Totals:
        """Add the gradients of some samples.

        Args: held: [n], times the weight of the distance; number: of the pass over the update.
        """
        config = self.config
        totals = torch.zeros(len(self.sums), device=advantage.device)
        for move in drawn.moves:
            at = move.step
            mean = at.mean(move.x, self.explorer.velocity(move.x, at.t, drawn.cond, drawn.no_cond))
            log_p = log_density(move.to, mean, at.std)
            limit = config.clip_of(feats_of(move.x).numel() / count(move.x), at.std)
            ratio = torch.exp(log_p - move.log_p)
            if config.loss == "grpo":
                loss = clipped_ratio_loss(ratio, advantage, limit)
            else:
                moved = divergence(mean, move.mean, at.std)
            if config.loss == "grpo-guard":
                ratio = guarded_ratio(log_p, move.log_p, moved, at.std)
                loss = guard_loss(ratio, advantage, limit, at.length)
            out = outside_clip(ratio, advantage, limit)
            stopped = out.stopped
            if config.loss == "dppo":
                stopped = dppo_dropped(ratio, moved, advantage, limit)
                loss = dppo_loss(ratio, advantage, stopped)
            if config.kl:
                loss = loss + config.kl * held * divergence(mean, move.reference, at.std)
            loss.sum().backward()
            off = ratio.detach() - 1
            parts = (torch.ones_like(off), loss.detach(), out.high, out.low, stopped, off, off.square())
            totals += torch.stack([part.float().sum() for part in parts])
        return dict(zip(self.sums, totals, strict=True))


class OnLatents:
    """DiffusionNFT and DGPO: errors on finished samples at times of the stage's own schedule; methods as
    those of OnSteps.

    Args: old: the network that draws, which follows the policy.
    """

    sums: Sequence[str] = ("mass", "loss", "kl", "moved", "lag", "old_missing", "missing", "stopped")

    def __init__(self, config: OnlineConfig, explorer: Explorer, old: Snapshot):
        self.config = config
        self.explorer = explorer
        self.old = old
        self.stage = explorer.task.stage

    def draw(self, conditions: Sequence[str], seeds: Sequence[int], step: int) -> list[Drawn]:
        with self.old.active():
            return self.explorer.draw(conditions, seeds)

    def totals_of(self, drawn: Sequence[Drawn]) -> Totals:
        return {}

    def add(
        self, drawn: Drawn, advantage: torch.Tensor, held: torch.Tensor, step: int, number: int
    ) -> Totals:
        totals = torch.zeros(len(self.sums), device=advantage.device)
        for k in range(self.config.draws):
            totals += self._drawn_once(drawn, advantage, held, *self._noised(drawn, step, number, k))
        return dict(zip(self.sums, totals, strict=True))

    def _noised(self, drawn: Drawn, step: int, number: int, k: int) -> tuple[torch.Tensor, Batch]:
        """Times [n] and noises; of DGPO one time for the update, and one noise for a group."""
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
        config = self.config
        stage = self.stage
        policy = self.explorer.policy
        path = self.stage.path
        x_t = path.mix(drawn.x_0, t, eps)
        u = path.velocity(drawn.x_0, eps)
        old = single(self.old.velocity(stage, x_t, t, drawn.cond))
        ref = single(self.explorer.reference.velocity(stage, x_t, t, drawn.cond))
        with evaluating(policy):
            v = single(stage.velocity(x_t, t, drawn.cond, policy))
        drift = path.apart(v, ref)
        old_missing = path.apart(u, old)
        missing = path.apart(u, ref)
        stopped = torch.zeros_like(advantage, dtype=torch.bool)
        if config.loss == "nft":
            errors = nft_errors(v, old, u, path.sigma(t), config.curvature, not config.plain, path.per_sample)
            loss = nft_loss(errors, goodness(advantage, config.adv_clip), config.adv_clip, config.curvature)
        else:
            error = path.apart(v, u)
            stopped = dgpo_stopped(error, old_missing, advantage, config.clip_of(1))
            error, ref_error, of_group = (
                values.view(-1, config.group)
                for values in (torch.where(stopped, error.detach(), error), missing, advantage)
            )
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
