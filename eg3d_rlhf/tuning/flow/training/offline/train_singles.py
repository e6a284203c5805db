"""Train a stage on latents of single assets, each with r in 0..1, how good it is: DiffusionNFT of each, or
DGPO of all of a condition.

The network that training begins with is the reference, and stands for the one that drew the assets; it is
never refreshed, which on a finite set of them runs away (losses.py). Times are the stage's own,
but none below LEAST_TIME, where an error says nothing. Guidance is off. Folder, lines, states and resume are
those of train.py.

Shape letters as in sparse.py; K assets of a group.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.sparse import Batch, collate, coords_of, feats_of, single
from eg3d_rlhf.preferences.label_scores import normal_scores
from eg3d_rlhf.tuning.flow.base.conditioning import Condition, to_device
from eg3d_rlhf.tuning.flow.base.pairs import by_condition, check_unique
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled, Single
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, check_convention
from eg3d_rlhf.tuning.flow.training.arm_runs import Bench
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import used
from eg3d_rlhf.tuning.flow.training.circular.settings import INVERTED, RANDOMISED
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.losses import dgpo_loss, nft_errors, nft_loss
from eg3d_rlhf.tuning.flow.training.offline.settings import DGPO, DPO, NFT, SinglesConfig
from eg3d_rlhf.tuning.flow.training.pair_training import Example, Passes, latents_checksum, train_stage
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.trainer import StageResult, train, win_rate_signs, win_rates
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed

LEAST_TIME = 0.02
EVEN = 1e-9  # of r from 1/2, which teaches nothing
FAR = 0.9  # of the reference's own error, as far as its velocities may be left behind
CALM = "Raise --trust or --kl, lower --lr, or train fewer updates."


@dataclass(frozen=True, kw_only=True)
class SingleDraw:
    """Latents at a time and a noise."""

    x_t: Batch  # N samples
    t: torch.Tensor  # [N]
    target: Batch  # u
    cond: Condition


def draw_singles(
    conditioned: ConditionedStage,
    singles: Sequence[Single],
    names: Sequence[str],
    seed: int,
    epoch: int,
    device: torch.device,
) -> SingleDraw:
    """Time and noise of each from (seed, its name, epoch) alone and on the CPU: in any batch, on any device.
    Args: names: [N]; assets of one name share both.
    """
    stage = conditioned.stage
    latents = [one.latent for one in singles]
    x_0 = collate(latents).to(device)
    seeds = [derive_seed(seed, name, epoch, "noise") for name in names]
    eps = stage.noise(seeds, coords_of(latents)).to(device)
    drawn = [
        stage.path.times(1, torch.Generator().manual_seed(derive_seed(seed, name, epoch, "time")))
        for name in names
    ]
    t = torch.cat(drawn).clamp(min=LEAST_TIME).to(device)
    cond = to_device(conditioned.conditions([one.condition for one in singles]), device)
    return SingleDraw(x_t=stage.path.mix(x_0, t, eps), t=t, target=stage.path.velocity(x_0, eps), cond=cond)


class Velocities:
    """v of the policy and of the reference at a draw, in float32."""

    def __init__(self, stage: FlowStage, draw: SingleDraw, policy: torch.nn.Module, reference: FrozenModel):
        self.draw = draw
        self.path = stage.path
        self.v = single(stage.velocity(draw.x_t, draw.t, draw.cond, policy))
        self.ref = single(reference.velocity(stage, draw.x_t, draw.t, draw.cond))

    @property
    def errors(self) -> torch.Tensor:
        """[N]. Differentiable in: the policy's parameters."""
        return self.path.apart(self.v, self.draw.target)

    @property
    def ref_errors(self) -> torch.Tensor:
        """[N]."""
        return self.path.apart(self.ref, self.draw.target)

    @property
    def distance(self) -> torch.Tensor:
        """m((v - v_ref)^2), [N]. Differentiable in: the policy's parameters."""
        return self.path.apart(self.v, self.ref)

    def nft(self, r: torch.Tensor, trust: float) -> torch.Tensor:
        """[N], C 1 and b the trust. Differentiable in: the policy's parameters."""
        errors = nft_errors(
            self.v, self.ref, self.draw.target, self.path.sigma(self.draw.t), trust, mean=self.path.per_sample
        )
        return nft_loss(errors, r, 1.0, trust)

    def totals(self, r: torch.Tensor) -> torch.Tensor:
        """Sum over samples, [5]: how many; distance; the reference's error; how many are not even; and of
        these how many the policy knows for better or worse than the reference does, ties half. Without
        gradient.
        """
        errors = self.errors.detach()
        ref = self.ref_errors
        uneven = (r - 0.5).abs() > EVEN
        right = 0.5 * (1 + ((ref - errors) * (r - 0.5)).sign())
        n = r.new_tensor(float(len(r)))
        return torch.stack(
            [n, self.distance.detach().sum(), ref.sum(), uneven.float().sum(), (right * uneven).sum()]
        )


class LabelPasses(Passes[Example]):
    """What both losses have in common."""

    sums = 2 + 5
    columns = (
        ("agreement", "agreement", "<5.3f"),
        ("distance", "distance", "<8.2e"),
        ("drift", "drift", "<6.3f"),
    )

    def velocities(
        self, singles: Sequence[Single], names: Sequence[str], epoch: int, dropout: int
    ) -> Velocities:
        draw = draw_singles(self.conditioned, singles, names, self.config.seed, epoch, self.device)
        torch.manual_seed(dropout)
        assert self.reference is not None
        return Velocities(self.stage, draw, self.policy, self.reference)

    def back(self, losses: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        losses.sum().backward()
        return torch.cat(
            [torch.stack([losses.new_tensor(float(len(losses))), losses.detach().sum()]), totals]
        )

    def figures(self, step: int, totals: torch.Tensor, items: Sequence[tuple[int, Example]]) -> dict:
        """Samples; distance from the reference, and what share it is of the reference's own error (drift);
        agreement: the share of samples that are not even whose label says whether the policy knows them
        better than the reference.
        """
        _, loss, norm, n, distance, error, uneven, right = self.descend(
            step, totals, f"{len(items)} {self.what}"
        )
        return {
            "loss": loss,
            "grad_norm": norm,
            "samples": int(n),
            "distance": distance / n,
            "drift": distance / error if error else 0.0,
            "agreement": right / uneven if uneven else 0.5,
        }

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        signs = win_rate_signs(win_rates(lines), CALM)
        last = next((line for line in reversed(lines) if "drift" in line), None)
        if last is not None and last["drift"] > FAR:
            got = (
                f"step {last['step']}: velocities are {last['drift']:.2f} of the untuned network's error away"
                " from it"
            )
            signs["far"] = f"{got}; it leaves what it was trained on. {CALM}"
        return signs


class SingleUpdates(LabelPasses[Single]):
    """Updates by DiffusionNFT: every asset by itself."""

    what = "assets"

    def backward(self, examples: Sequence[Single], epoch: int, dropout: int) -> torch.Tensor:
        found = self.velocities(examples, [one.id for one in examples], epoch, dropout)
        r = torch.tensor([one.r for one in examples], device=self.device)
        return self.back(
            found.nft(r, self.config.trust) + self.config.distance * found.distance, found.totals(r)
        )


Ranked = Sequence[Single]  # all of one condition


class GroupUpdates(LabelPasses[Ranked]):
    """Updates by DGPO: up to `group` assets of a condition, at one time and one noise."""

    what = "groups"

    def members(self, group: Ranked, epoch: int) -> list[Single]:
        """Which of a condition meet in a pass over the data."""
        if len(group) <= self.config.group:
            return list(group)
        generator = torch.Generator().manual_seed(
            derive_seed(self.config.seed, group[0].condition, epoch, "members")
        )
        return [
            group[i]
            for i in sorted(torch.randperm(len(group), generator=generator)[: self.config.group].tolist())
        ]

    def backward(self, examples: Sequence[Ranked], epoch: int, dropout: int) -> torch.Tensor:
        groups = [self.members(group, epoch) for group in examples]
        singles = [one for group in groups for one in group]
        found = self.velocities(singles, [one.condition for one in singles], epoch, dropout)
        r = torch.tensor([one.r for one in singles], device=self.device)
        sizes = [len(group) for group in groups]
        losses = []
        parts = zip(
            *(x.split(sizes) for x in (found.errors, found.ref_errors, found.distance, r)), strict=True
        )
        for errors, ref_errors, distance, of_group in parts:
            advantage = torch.from_numpy(normal_scores(of_group.cpu().numpy())).to(errors)
            margin = dgpo_loss(errors[None], ref_errors[None], advantage[None], self.config.beta)[0]
            losses.append(margin + self.config.distance * distance.mean())
        return self.back(torch.stack(losses), found.totals(r))


# The training.


def train_singles(
    conditioned: ConditionedStage,
    singles: Sequence[Single],
    config: SinglesConfig,
    out: Path,
    *,
    ranks: Ranks = SINGLE,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on single assets; the stage's own is left as it is, and is the
    reference.

    Args: singles: of that stage; ranks, common: see trainer.train.
    Raises: ValueError, before anything is written, for assets that cannot be trained on; further as
        train_stage.
    """
    stage = conditioned.stage
    check_singles(conditioned, singles, config.loss)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> LabelPasses:
        common = (config, policy, reference, run.ranks)
        if config.loss == NFT:
            return SingleUpdates(conditioned, singles, *common)
        groups = [group for group in by_condition(singles).values() if len({one.r for one in group}) > 1]
        return GroupUpdates(conditioned, groups, *common)

    latents = {one.id: one.latent for one in singles}
    columns = [[one.id, one.condition, one.r] for one in singles]
    known = ranks.broadcast(
        {"base": stage.hash, "singles": latents_checksum(latents, columns)} if ranks.main else None
    )
    return train(stage, config, known, start, Path(out), ranks=ranks, shards=True, **common)


def check_singles(conditioned: ConditionedStage, singles: Sequence[Single], loss: str = NFT) -> None:
    """Raise ValueError for what cannot be trained on: see train_stage, and labels that teach nothing."""
    stage = conditioned.stage
    who = f"train_singles({stage.name})"
    if not singles:
        raise ValueError(f"{who}: expected labelled assets to learn from, got none. Label some.")
    check_unique(who, singles, "assets")
    for one in singles:
        if one.stage != stage.name:
            raise ValueError(
                f"{who}: expected assets of this stage, got {one.id!r} of {one.stage!r}. Train that stage"
                " on it."
            )
        if not (math.isfinite(one.r) and 0 <= one.r <= 1):
            raise ValueError(
                f"{who}: expected r from 0 to 1, got {one.r} of {one.id!r}. See preferences/goodness.py."
            )
        stage.check(f"{who}, asset {one.id!r}", one.latent)
        if not bool(torch.isfinite(feats_of(one.latent)).all()):
            raise ValueError(f"{who}: expected finite latents, got others of {one.id!r}. Drop the asset.")
    if all(abs(one.r - 0.5) <= EVEN for one in singles):
        raise ValueError(
            f"{who}: expected labels that tell assets apart, got {len(singles)} that are even. Label more, or"
            " in finer steps."
        )
    if loss == DGPO and all(len({one.r for one in group}) < 2 for group in by_condition(singles).values()):
        raise ValueError(
            f"{who}: expected assets of one condition that differ in rank, got ties everywhere. Label several"
            " of a condition."
        )
    device = next(stage.model.parameters()).device
    some = singles[:8]
    cond = to_device(conditioned.conditions([one.condition for one in some]), device)
    check_convention(stage, collate([one.latent for one in some]).to(device), cond)


@dataclass(frozen=True)
class OfflineBench(Bench):
    """Training data of the arms of an offline run.

    All arms are evaluated on the same noises of held-out prompts.

    labels                       the loss of single assets on what people said of them
    randomised, inverted         controls: r shuffled within prompts must have no effect, 1 - r must do harm
    dpo                          DPO on the problem's pairs
    dpo-randomised, dpo-inverted the same pairs, each inverted at random, or all inverted
    """

    labelled: Labelled
    singles: SinglesConfig

    @property
    def conditions(self) -> Collection[str] | None:
        """To train on; None: all, where no judge is there to hold some for."""
        judged = self.problem.final is not None or self.problem.chooser is not None
        return self.problem.train_conditions if judged else None

    def inputs(self) -> dict:
        return {"labels": self.labelled.identity, "singles": asdict(self.singles)}

    def answers(self, arm: str) -> list:
        """The pairs or single assets that an arm learns from."""
        if not arm.startswith(DPO):
            return self.labelled.singles(self.stage.name, self.conditions, arm, self.singles.seed)
        pairs = self.problem.train_pairs[self.stage.name]
        if arm == DPO:
            return list(pairs)
        return used(pairs, RANDOMISED if arm.endswith(RANDOMISED) else INVERTED, self.dpo.seed, pairs)

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        what = (ConditionedStage(self.stage, self.problem.pipeline), self.answers(arm))
        return (
            train_stage(*what, self.dpo, out, **options)
            if arm.startswith(DPO)
            else train_singles(*what, self.singles, out, **options)
        )

    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        return {"answers": len(self.answers(arm))}
