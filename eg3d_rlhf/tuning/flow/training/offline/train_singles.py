"""Train a stage on latents of single assets, each with a goodness r in 0..1.

The loss is that of DiffusionNFT (Zheng et al. 2025) for each asset by itself, or that of DGPO (Luo et al.
2025) for the assets of a prompt. losses.py has the equations.

The untuned network is the reference, and it also serves as the sampling network v_old of the losses, although
other networks may have generated the assets. The sampling network never follows the policy, since training
then diverges on a finite set of assets (losses.nft_loss). Times are sampled by the stage's own schedule, but
not below MIN_TIME, where errors hardly depend on the asset. Guidance is not used. The folder of a run,
checkpoints and resuming are described in trainer.py.

In the formulas below, v is the velocity of the policy, v_ref that of the reference, u the target velocity,
and m the mean over the elements of a sample.

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

MIN_TIME = 0.02  # smallest time to train on, in 0..1
EVEN = 1e-9  # largest distance from 1/2 of an r that counts as neutral and gives no gradient
FAR = 0.9  # squared distance from the reference, divided by its squared error, above which a warning is given
CALM = "Raise --trust or --kl, lower --lr, or train fewer updates."


@dataclass(frozen=True, kw_only=True)
class SingleDraw:
    """Noisy latents of a batch of N assets, with the time and the target of each."""

    x_t: Batch  # N mixtures of latents and noises at the times t
    t: torch.Tensor  # [N] in MIN_TIME..1
    target: Batch  # N target velocities u
    cond: Condition  # N rows


def draw_singles(
    conditioned_stage: ConditionedStage,
    singles: Sequence[Single],
    asset_names: Sequence[str],
    seed: int,
    epoch: int,
    device: torch.device,
) -> SingleDraw:
    """Sample a time and a noise for each asset.

    Times and noises depend on (seed, name, epoch) alone and are generated on the CPU, so that they are the
    same in every batch and on every device.

    Args:
        conditioned_stage: stage of the assets.
        singles: the N assets.
        asset_names: name of each asset, [N]; assets with the same name share their time and noise.
        seed: seed of the times and noises.
        epoch: number of the pass over the data.
        device: device of the result.
    """
    stage = conditioned_stage.stage
    latents = [asset.latent for asset in singles]
    x_0 = collate(latents).to(device)
    seeds = [derive_seed(seed, name, epoch, "noise") for name in asset_names]
    eps = stage.noise(seeds, coords_of(latents)).to(device)
    asset_times = [
        stage.path.times(1, torch.Generator().manual_seed(derive_seed(seed, name, epoch, "time")))
        for name in asset_names
    ]
    # one time for each asset, [N]
    t = torch.cat(asset_times).clamp(min=MIN_TIME).to(device)
    cond = to_device(conditioned_stage.conditioning([asset.condition for asset in singles]), device)
    return SingleDraw(x_t=stage.path.mix(x_0, t, eps), t=t, target=stage.path.velocity(x_0, eps), cond=cond)


class Velocities:
    """Velocities of the policy and of the reference for a batch, in float32.

    Args: stage: stage of both networks; draw: batch; policy: network in training; reference: frozen network.
    """

    def __init__(self, stage: FlowStage, draw: SingleDraw, policy: torch.nn.Module, reference: FrozenModel):
        self.draw = draw
        self.path = stage.path
        # `single` converts to float32, since squares of small differences are computed below
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
        """Compute the squared distance m((v - v_ref)^2), [N]. Differentiable in: the policy's parameters."""
        return self.path.apart(self.v, self.ref)

    def nft(self, r: torch.Tensor, trust: float) -> torch.Tensor:
        """Compute DiffusionNFT's loss of each asset, [N], with C = 1 and b = trust (see losses.nft_loss).

        Differentiable in: the policy's parameters.

        Args: r: goodness of each asset in 0..1, [N]; trust: factor b.
        """
        # C = 1, since r comes from labels and not from a clipped advantage
        errors = nft_errors(
            self.v, self.ref, self.draw.target, self.path.sigma(self.draw.t), trust, mean=self.path.per_sample
        )
        return nft_loss(errors, r, 1.0, trust)

    def totals(self, r: torch.Tensor) -> torch.Tensor:
        """Sum five metrics over the samples, [5]. Not differentiable.

        The metrics are: 1 (the sum is the number of samples); the distance; the reference's error; 1 if the
        label is not neutral; and 1 if the policy agrees with a label that is not neutral. The policy agrees
        with a label if its error is below the reference's error for r above 1/2, or above it for r below 1/2.
        Equal errors count one half.

        Args: r: goodness of each asset in 0..1, [N].
        """
        errors = self.errors.detach()  # metrics must not keep the graph in memory
        ref_errors = self.ref_errors
        is_decided = (r - 0.5).abs() > EVEN
        # 1 if the signs of both factors are equal, 0 if they differ, one half for equal errors
        agreement = 0.5 * (1 + ((ref_errors - errors) * (r - 0.5)).sign())
        sample_count = r.new_tensor(float(len(r)))
        return torch.stack(
            [
                sample_count,
                self.distance.detach().sum(),
                ref_errors.sum(),
                is_decided.float().sum(),
                (agreement * is_decided).sum(),
            ]
        )


class LabelPasses(Passes[Example]):
    """Base class of the updates by the losses of DiffusionNFT and of DGPO."""

    sums = 2 + 5  # number of examples and loss, see Passes, then the five of Velocities.totals
    columns = (
        ("agreement", "agreement", "<5.3f"),
        ("distance", "distance", "<8.2e"),
        ("drift", "drift", "<6.3f"),
    )

    def velocities(
        self, singles: Sequence[Single], asset_names: Sequence[str], epoch: int, dropout_seed: int
    ) -> Velocities:
        """Compute the velocities of both networks for assets.

        Args:
            singles: the N assets.
            asset_names: name of each asset, on which its time and noise depend, [N].
            epoch: number of the pass over the data.
            dropout_seed: seed of torch's global generator in the pass.
        """
        # the random numbers of times and noises come from generators of their own
        draw = draw_singles(
            self.conditioned_stage, singles, asset_names, self.config.seed, epoch, self.device
        )
        # after sampling, which must not depend on how many random numbers the dropout takes
        torch.manual_seed(dropout_seed)
        assert self.reference is not None  # both losses need it
        return Velocities(self.stage, draw, self.policy, self.reference)

    def back(self, losses: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Run the backward pass of the losses' sum, and return the sums of the pass, [2 + 5].

        The sums are the number of examples, the loss, and `totals`.

        Args:
            losses: loss of each example, [number of examples].
            totals: result of Velocities.totals, [5].
        """
        # the sum and not the mean, since `descend` divides by the number of examples of the whole batch
        losses.sum().backward()
        return torch.cat(
            [torch.stack([losses.new_tensor(float(len(losses))), losses.detach().sum()]), totals]
        )

    def finish_update(
        self, step: int, totals: torch.Tensor, batch_items: Sequence[tuple[int, Example]]
    ) -> dict:
        """Do the optimiser's step, and return the metrics of the update.

        The metric "distance" is the mean squared distance from the reference. "drift" is this distance
        divided by the reference's own squared error. "agreement" is the share of labels with which the policy
        agrees, among the labels that are not neutral (see Velocities.totals).
        """
        _, loss, grad_norm, sample_count, distance, ref_error, decided_count, agreement_count = self.descend(
            step, totals, f"{len(batch_items)} {self.what}"
        )
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "samples": int(sample_count),
            "distance": distance / sample_count,
            "drift": distance / ref_error if ref_error else 0.0,
            # a batch may by chance have neutral labels alone; 0.5 is neither agreement nor disagreement
            "agreement": agreement_count / decided_count if decided_count else 0.5,
        }

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        signs = win_rate_signs(win_rates(lines), CALM)
        # evaluations write lines without the metrics of updates
        last_stats_line = next((line for line in reversed(lines) if "drift" in line), None)
        if last_stats_line is not None and last_stats_line["drift"] > FAR:
            signs["far"] = (
                f"step {last_stats_line['step']}: the squared distance from the untuned network's velocities"
                f" is {last_stats_line['drift']:.2f} times that network's squared error, so the network moves"
                f" away from the labelled assets. {CALM}"
            )
        return signs


class SingleUpdates(LabelPasses[Single]):
    """Updates by the loss of DiffusionNFT, which is computed for each asset independently."""

    what = "assets"

    def backward(self, examples: Sequence[Single], epoch: int, dropout_seed: int) -> torch.Tensor:
        # each asset has its own time and noise, which depend on its id
        velocities = self.velocities(examples, [asset.id for asset in examples], epoch, dropout_seed)
        r = torch.tensor([asset.r for asset in examples], device=self.device)  # [N]
        return self.back(
            velocities.nft(r, self.config.trust) + self.config.distance * velocities.distance,
            velocities.totals(r),
        )


Ranked = Sequence[Single]  # all assets of one prompt


class GroupUpdates(LabelPasses[Ranked]):
    """Updates by the loss of DGPO, computed for up to `group` assets of one prompt at one time and noise."""

    what = "groups"

    def members(self, group: Ranked, epoch: int) -> list[Single]:
        """Choose at most `group` assets of a prompt, which are compared in an epoch.

        Args: group: all assets of the prompt; epoch: number of the pass over the data.
        """
        if len(group) <= self.config.group:
            return list(group)
        generator = torch.Generator().manual_seed(
            derive_seed(self.config.seed, group[0].condition, epoch, "members")
        )
        # sorted: the chosen assets stay in the order of the data
        indices = torch.randperm(len(group), generator=generator)[: self.config.group]
        return [group[i] for i in sorted(indices.tolist())]

    def backward(self, examples: Sequence[Ranked], epoch: int, dropout_seed: int) -> torch.Tensor:
        groups = [self.members(group, epoch) for group in examples]
        singles = [asset for group in groups for asset in group]
        # times and noises depend on the prompt: all assets of a group share them, as DGPO's loss needs
        velocities = self.velocities(singles, [asset.condition for asset in singles], epoch, dropout_seed)
        r = torch.tensor([asset.r for asset in singles], device=self.device)
        group_sizes = [len(group) for group in groups]
        losses = []
        # [N] -> one tensor [K] for each group
        quantities = (velocities.errors, velocities.ref_errors, velocities.distance, r)
        split_quantities = [quantity.split(group_sizes) for quantity in quantities]
        # groups may differ in size, so the loss is computed for one group, [1, K], at a time
        for errors, ref_errors, distance, group_r in zip(*split_quantities, strict=True):
            # advantages come from ranks alone: labels order the assets, but differences of labels have no
            # meaning
            advantage = torch.from_numpy(normal_scores(group_r.cpu().numpy())).to(errors)
            group_loss = dgpo_loss(errors[None], ref_errors[None], advantage[None], self.config.beta)[0]
            losses.append(group_loss + self.config.distance * distance.mean())
        return self.back(torch.stack(losses), velocities.totals(r))


# The training.


def train_singles(
    conditioned_stage: ConditionedStage,
    singles: Sequence[Single],
    config: SinglesConfig,
    out: Path,
    *,
    ranks: Ranks = SINGLE,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on single assets. The stage's own network is the reference.

    Args:
        conditioned_stage: stage whose network is copied and trained.
        singles: labelled assets of that stage.
        config: settings of the training.
        out: folder of the run.
        ranks: this process among the processes that train together.
        common: further keyword arguments of trainer.train.

    Raises: ValueError, before anything is written, for assets that cannot be trained on; further errors as in
        train_stage.
    """
    stage = conditioned_stage.stage
    check_singles(conditioned_stage, singles, config.loss)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> LabelPasses:
        common = (config, policy, reference, run.ranks)
        if config.loss == NFT:
            return SingleUpdates(conditioned_stage, singles, *common)
        # a group with equal labels has advantages of 0, and would only make the batch effectively smaller
        groups = [group for group in by_condition(singles).values() if len({asset.r for asset in group}) > 1]
        return GroupUpdates(conditioned_stage, groups, *common)

    latents = {asset.id: asset.latent for asset in singles}
    label_rows = [[asset.id, asset.condition, asset.r] for asset in singles]
    # rank 0 hashes for all; a run cannot be resumed with other assets
    training_inputs = ranks.broadcast(
        {"base": stage.hash, "singles": latents_checksum(latents, label_rows)} if ranks.is_main else None
    )
    return train(stage, config, training_inputs, start, Path(out), ranks=ranks, shards=True, **common)


def check_singles(conditioned_stage: ConditionedStage, singles: Sequence[Single], loss: str = NFT) -> None:
    """Raise ValueError for assets that cannot be trained on, or for labels that do not distinguish assets.

    Args:
        conditioned_stage: stage that is trained.
        singles: labelled assets.
        loss: name of the loss; DGPO also needs several labels for one prompt.
    """
    stage = conditioned_stage.stage
    caller = f"train_singles({stage.name})"
    if not singles:
        raise ValueError(
            f"{caller}: the list of labelled assets is empty, but at least one is needed. Label assets of"
            " this stage."
        )
    check_unique(caller, singles, "assets")
    for asset in singles:
        if asset.stage != stage.name:
            raise ValueError(
                f"{caller}: the asset {asset.id!r} belongs to stage {asset.stage!r}. Train that stage on this"
                " asset, or remove it."
            )
        if not (math.isfinite(asset.r) and 0 <= asset.r <= 1):
            raise ValueError(
                f"{caller}: the goodness r must be from 0 to 1, got {asset.r} for the asset {asset.id!r}."
                " Correct this label."
            )
        stage.check(f"{caller}, asset {asset.id!r}", asset.latent)
        if not bool(torch.isfinite(feats_of(asset.latent)).all()):
            raise ValueError(
                f"{caller}: the latent of the asset {asset.id!r} has NaN or infinite values. Remove the"
                " asset."
            )
    # r = 1/2 for all gives a loss without any gradient
    if all(abs(asset.r - 0.5) <= EVEN for asset in singles):
        raise ValueError(
            f"{caller}: all {len(singles)} labels are neutral (r = 1/2), so there is nothing to learn. Label"
            " more assets, so that at least one label is not neutral."
        )
    # DGPO compares only assets of one prompt
    if loss == DGPO and all(
        len({asset.r for asset in group}) < 2 for group in by_condition(singles).values()
    ):
        raise ValueError(
            f"{caller}: the loss dgpo compares assets of one prompt, but no prompt has assets with different"
            " labels. Label at least two assets of one prompt differently."
        )
    device = next(stage.model.parameters()).device
    # a few assets are enough: the convention of time is a property of the network
    sample_assets = singles[:8]
    cond = to_device(conditioned_stage.conditioning([asset.condition for asset in sample_assets]), device)
    check_convention(stage, collate([asset.latent for asset in sample_assets]).to(device), cond)


@dataclass(frozen=True)
class OfflineBench(Bench):
    """Training data of the arms of an offline run.

    All arms are evaluated on the same noises of held-out prompts.

    labels                       loss of single assets, on people's labels
    randomised                   control with r shuffled within each prompt, which should have no effect
    inverted                     control with 1 - r in place of r, which should make the assets worse
    dpo                          DPO on the problem's pairs
    dpo-randomised               control with each pair inverted at random
    dpo-inverted                 control with all pairs inverted
    """

    labelled: Labelled  # assets with people's labels
    singles: SinglesConfig  # settings of the training on single assets

    @property
    def prompts(self) -> Collection[str] | None:
        """Return the prompts to train on, or None if the problem has no held-out evaluator.

        None means all prompts: without an evaluator, no prompts have to be held out.
        """
        has_evaluator = self.problem.final is not None or self.problem.chooser is not None
        return self.problem.train_prompts if has_evaluator else None

    def inputs(self) -> dict:
        return {"labels": self.labelled.identity, "singles": asdict(self.singles)}

    def answers(self, arm: str) -> list:
        """Return the pairs or single assets that an arm is trained on."""
        if not arm.startswith(DPO):
            return self.labelled.singles(self.stage.name, self.prompts, arm, self.singles.seed)
        # the DPO arms share the pairs; their controls invert a random half of the pairs, or all of them
        pairs = self.problem.train_pairs[self.stage.name]
        if arm == DPO:
            return list(pairs)
        return used(pairs, RANDOMISED if arm.endswith(RANDOMISED) else INVERTED, self.dpo.seed, pairs)

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        # the same loss settings for an arm and its controls; only the labels differ
        conditioned_stage = ConditionedStage(self.stage, self.problem.pipeline)
        answers = self.answers(arm)
        if arm.startswith(DPO):
            return train_stage(conditioned_stage, answers, self.dpo, out, **options)
        return train_singles(conditioned_stage, answers, self.singles, out, **options)

    def measure(
        self, arm: str, stage_result: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks
    ) -> dict:
        return {"answers": len(self.answers(arm))}
