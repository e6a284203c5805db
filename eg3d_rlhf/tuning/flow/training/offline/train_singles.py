"""Train a stage on latents of single assets, each with a goodness r in 0..1: by DiffusionNFT on each asset,
or by DGPO on the assets of a prompt.

The network that training begins with is the reference, and takes the place of the network that generated the
assets. It is never refreshed, since refreshing diverges on a finite set of assets (losses.py). Times are
sampled by the stage's own schedule, but not below LEAST_TIME, where errors hardly depend on the asset.
Guidance is off. Folder, lines, checkpoints and resume are those of trainer.py.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; K assets of a group.
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

LEAST_TIME = 0.02  # least time to train on, in 0..1
EVEN = 1e-9  # an r this close to 1/2 is neutral and gives no gradient
FAR = 0.9  # distance from the reference, as a share of its error, above which a warning is given
CALM = "Raise --trust or --kl, lower --lr, or train fewer updates."


@dataclass(frozen=True, kw_only=True)
class SingleDraw:
    """Latents of a batch, with a time and a noise for each."""

    x_t: Batch  # N samples
    t: torch.Tensor  # [N] in LEAST_TIME..1
    target: Batch  # u, the target velocity
    cond: Condition  # N rows


def draw_singles(
    conditioned: ConditionedStage,
    singles: Sequence[Single],
    names: Sequence[str],
    seed: int,
    epoch: int,
    device: torch.device,
) -> SingleDraw:
    """Sample a time and a noise for each asset.

    They depend on (seed, name, epoch) alone and are generated on the CPU, so that they are the same in every
    batch and on every device.
    Args: names: [N]; assets with the same name share their time and noise.
    """
    stage = conditioned.stage
    latents = [asset.latent for asset in singles]
    x_0 = collate(latents).to(device)
    seeds = [derive_seed(seed, name, epoch, "noise") for name in names]
    eps = stage.noise(seeds, coords_of(latents)).to(device)
    drawn = [
        stage.path.times(1, torch.Generator().manual_seed(derive_seed(seed, name, epoch, "time")))
        for name in names
    ]
    # [N]
    t = torch.cat(drawn).clamp(min=LEAST_TIME).to(device)
    cond = to_device(conditioned.conditions([asset.condition for asset in singles]), device)
    return SingleDraw(x_t=stage.path.mix(x_0, t, eps), t=t, target=stage.path.velocity(x_0, eps), cond=cond)


class Velocities:
    """Velocities of the policy and of the reference for a batch, in float32."""

    def __init__(self, stage: FlowStage, draw: SingleDraw, policy: torch.nn.Module, reference: FrozenModel):
        self.draw = draw
        self.path = stage.path
        self.v = single(stage.velocity(draw.x_t, draw.t, draw.cond, policy))
        # FrozenModel computes without gradient
        self.ref = single(reference.velocity(stage, draw.x_t, draw.t, draw.cond))

    @property
    def errors(self) -> torch.Tensor:
        """Compute the policy's errors m((v - u)^2), [N]. Differentiable in: the policy's parameters."""
        return self.path.apart(self.v, self.draw.target)

    @property
    def ref_errors(self) -> torch.Tensor:
        """Compute the reference's errors m((v_ref - u)^2), [N]. Not differentiable."""
        return self.path.apart(self.ref, self.draw.target)

    @property
    def distance(self) -> torch.Tensor:
        """Compute m((v - v_ref)^2), [N]. Differentiable in: the policy's parameters."""
        return self.path.apart(self.v, self.ref)

    def nft(self, r: torch.Tensor, trust: float) -> torch.Tensor:
        """Compute DiffusionNFT's loss, [N], with C = 1 and b the trust.

        Differentiable in: the policy's parameters.
        """
        # C = 1, since r comes from labels and not from a clipped advantage
        errors = nft_errors(
            self.v, self.ref, self.draw.target, self.path.sigma(self.draw.t), trust, mean=self.path.per_sample
        )
        return nft_loss(errors, r, 1.0, trust)

    def totals(self, r: torch.Tensor) -> torch.Tensor:
        """Sum figures over the samples, [5]. Not differentiable.

        They are: number of samples; distance; the reference's error; number of samples with a label that is
        not neutral; and how many of these the policy agrees with. It agrees with a label if its error is
        below the reference's for r above 1/2, or above it for r below 1/2. Ties count one half.
        """
        errors = self.errors.detach()  # figures must not keep the graph
        ref = self.ref_errors
        uneven = (r - 0.5).abs() > EVEN
        right = 0.5 * (1 + ((ref - errors) * (r - 0.5)).sign())
        n = r.new_tensor(float(len(r)))
        return torch.stack(
            [n, self.distance.detach().sum(), ref.sum(), uneven.float().sum(), (right * uneven).sum()]
        )


class LabelPasses(Passes[Example]):
    """Base of the updates by both losses."""

    sums = 2 + 5  # number and loss as in Passes, then the totals of Velocities
    columns = (
        ("agreement", "agreement", "<5.3f"),
        ("distance", "distance", "<8.2e"),
        ("drift", "drift", "<6.3f"),
    )

    def velocities(
        self, singles: Sequence[Single], names: Sequence[str], epoch: int, dropout: int
    ) -> Velocities:
        """Compute both networks' velocities for assets. Args: dropout: seed of torch's generator."""
        draw = draw_singles(self.conditioned, singles, names, self.config.seed, epoch, self.device)
        # after sampling, which must not depend on how many random numbers the dropout takes
        torch.manual_seed(dropout)
        assert self.reference is not None  # both losses need it
        return Velocities(self.stage, draw, self.policy, self.reference)

    def back(self, losses: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Compute and add the gradients of losses, and return the figures of the pass."""
        # the sum; `descend` divides by the number of the whole batch
        losses.sum().backward()
        return torch.cat(
            [torch.stack([losses.new_tensor(float(len(losses))), losses.detach().sum()]), totals]
        )

    def figures(self, step: int, totals: torch.Tensor, items: Sequence[tuple[int, Example]]) -> dict:
        """Do the step, and return its figures.

        distance: from the reference; drift: the distance relative to the reference's own error; agreement:
        share of the samples with a label that is not neutral on which the policy agrees with the label.
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
            # a batch of neutral labels occurs only by chance; it counts as no agreement and no disagreement
            "agreement": right / uneven if uneven else 0.5,
        }

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        signs = win_rate_signs(win_rates(lines), CALM)
        # evaluations write lines without the figures of updates
        last = next((line for line in reversed(lines) if "drift" in line), None)
        if last is not None and last["drift"] > FAR:
            got = (
                f"step {last['step']}: the distance from the untuned network's velocities is"
                f" {last['drift']:.2f} of that network's error"
            )
            signs["far"] = f"{got}; the network moves away from the labelled assets. {CALM}"
        return signs


class SingleUpdates(LabelPasses[Single]):
    """Descent by DiffusionNFT, on every asset by itself."""

    what = "assets"

    def backward(self, examples: Sequence[Single], epoch: int, dropout: int) -> torch.Tensor:
        # each asset has a time and a noise of its own, named by its id
        velocities = self.velocities(examples, [asset.id for asset in examples], epoch, dropout)
        r = torch.tensor([asset.r for asset in examples], device=self.device)  # [N]
        return self.back(
            velocities.nft(r, self.config.trust) + self.config.distance * velocities.distance,
            velocities.totals(r),
        )


Ranked = Sequence[Single]  # all assets of one prompt


class GroupUpdates(LabelPasses[Ranked]):
    """Descent by DGPO, on up to `group` assets of a prompt at one time and one noise."""

    what = "groups"

    def members(self, group: Ranked, epoch: int) -> list[Single]:
        """Choose the assets of a prompt that are compared in an epoch."""
        if len(group) <= self.config.group:
            return list(group)
        generator = torch.Generator().manual_seed(
            derive_seed(self.config.seed, group[0].condition, epoch, "members")
        )
        # sorted: the chosen assets stay in the order of the data
        return [
            group[i]
            for i in sorted(torch.randperm(len(group), generator=generator)[: self.config.group].tolist())
        ]

    def backward(self, examples: Sequence[Ranked], epoch: int, dropout: int) -> torch.Tensor:
        groups = [self.members(group, epoch) for group in examples]
        singles = [asset for group in groups for asset in group]
        # named by the prompt: all assets of a group share their time and noise, as DGPO's loss asks
        velocities = self.velocities(singles, [asset.condition for asset in singles], epoch, dropout)
        r = torch.tensor([asset.r for asset in singles], device=self.device)
        sizes = [len(group) for group in groups]
        losses = []
        parts = zip(
            *(x.split(sizes) for x in (velocities.errors, velocities.ref_errors, velocities.distance, r)),
            strict=True,
        )
        # groups may differ in size, so the loss is computed for one group, [1, K], at a time
        for errors, ref_errors, distance, of_group in parts:
            # advantages by rank alone: labels order the assets, their distances carry no meaning
            advantage = torch.from_numpy(normal_scores(of_group.cpu().numpy())).to(errors)
            margin = dgpo_loss(errors[None], ref_errors[None], advantage[None], self.config.beta)[0]
            losses.append(margin + self.config.distance * distance.mean())
        return self.back(torch.stack(losses), velocities.totals(r))


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
    """Train a copy of a stage's network on single assets. The stage's own network is unchanged, and is the
    reference.

    Args: singles: of that stage; ranks, common: see trainer.train.
    Raises: ValueError, before anything is written, for assets that cannot be trained on; further errors as in
        train_stage.
    """
    stage = conditioned.stage
    check_singles(conditioned, singles, config.loss)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> LabelPasses:
        common = (config, policy, reference, run.ranks)
        if config.loss == NFT:
            return SingleUpdates(conditioned, singles, *common)
        # a group in which all are equal has advantages of 0, and would only dilute the batch
        groups = [group for group in by_condition(singles).values() if len({asset.r for asset in group}) > 1]
        return GroupUpdates(conditioned, groups, *common)

    latents = {asset.id: asset.latent for asset in singles}
    columns = [[asset.id, asset.condition, asset.r] for asset in singles]
    # rank 0 hashes for all; a run cannot be resumed with other assets
    known = ranks.broadcast(
        {"base": stage.hash, "singles": latents_checksum(latents, columns)} if ranks.main else None
    )
    return train(stage, config, known, start, Path(out), ranks=ranks, shards=True, **common)


def check_singles(conditioned: ConditionedStage, singles: Sequence[Single], loss: str = NFT) -> None:
    """Raise ValueError for assets that cannot be trained on (see train_stage), or labels without signal."""
    stage = conditioned.stage
    who = f"train_singles({stage.name})"
    if not singles:
        raise ValueError(f"{who}: expected labelled assets, got none. Label some.")
    check_unique(who, singles, "assets")
    for asset in singles:
        if asset.stage != stage.name:
            raise ValueError(
                f"{who}: expected assets of this stage, got {asset.id!r} of {asset.stage!r}. Train that stage"
                " on it."
            )
        if not (math.isfinite(asset.r) and 0 <= asset.r <= 1):
            raise ValueError(
                f"{who}: expected r from 0 to 1, got {asset.r} of {asset.id!r}. See preferences/goodness.py."
            )
        stage.check(f"{who}, asset {asset.id!r}", asset.latent)
        if not bool(torch.isfinite(feats_of(asset.latent)).all()):
            raise ValueError(
                f"{who}: expected finite latents, but {asset.id!r} has others. Remove the asset."
            )
    # r = 1/2 for all gives a loss without any gradient
    if all(abs(asset.r - 0.5) <= EVEN for asset in singles):
        raise ValueError(
            f"{who}: expected labels that distinguish assets, but all {len(singles)} are neutral. Label more"
            " assets, or in finer steps."
        )
    # DGPO compares within a prompt only
    if loss == DGPO and all(
        len({asset.r for asset in group}) < 2 for group in by_condition(singles).values()
    ):
        raise ValueError(
            f"{who}: expected assets of one prompt that differ in rank, got ties everywhere. Label several"
            " assets of a prompt."
        )
    device = next(stage.model.parameters()).device
    # a few assets are enough: the convention of time is a property of the network
    some = singles[:8]
    cond = to_device(conditioned.conditions([asset.condition for asset in some]), device)
    check_convention(stage, collate([asset.latent for asset in some]).to(device), cond)


@dataclass(frozen=True)
class OfflineBench(Bench):
    """Training data of the arms of an offline run.

    All arms are evaluated on the same noises of held-out prompts.

    labels                       the loss of single assets, on people's labels
    randomised, inverted         controls: r shuffled within prompts must have no effect, 1 - r must do harm
    dpo                          DPO on the problem's pairs
    dpo-randomised, dpo-inverted the same pairs, each inverted at random, or all inverted
    """

    labelled: Labelled  # assets with people's labels
    singles: SinglesConfig  # of the loss of single assets

    @property
    def conditions(self) -> Collection[str] | None:
        """Return the prompts to train on, or None for all if the problem has no held-out evaluator."""
        has_evaluator = self.problem.final is not None or self.problem.chooser is not None
        return self.problem.train_conditions if has_evaluator else None

    def inputs(self) -> dict:
        return {"labels": self.labelled.identity, "singles": asdict(self.singles)}

    def answers(self, arm: str) -> list:
        """Return the pairs or single assets that an arm is trained on."""
        if not arm.startswith(DPO):
            return self.labelled.singles(self.stage.name, self.conditions, arm, self.singles.seed)
        # the DPO arms share the pairs; their controls invert a random half of them, or all
        pairs = self.problem.train_pairs[self.stage.name]
        if arm == DPO:
            return list(pairs)
        return used(pairs, RANDOMISED if arm.endswith(RANDOMISED) else INVERTED, self.dpo.seed, pairs)

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        # the same loss settings for an arm and its controls; only the labels differ
        what = (ConditionedStage(self.stage, self.problem.pipeline), self.answers(arm))
        return (
            train_stage(*what, self.dpo, out, **options)
            if arm.startswith(DPO)
            else train_singles(*what, self.singles, out, **options)
        )

    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        return {"answers": len(self.answers(arm))}
