"""Do one update of online tuning: generate groups of samples, score them, compute advantages, and do steps of
the optimiser by one of the losses (losses.py). The logged metrics are listed below. In their formulas m is
the mean over the elements of a sample, v the velocity of the policy, v_ref that of the reference, v_old that
of the sampling network, and u the target velocity.

All losses:
    reward              weighted sum of the trained rewards, averaged over samples
    reward/<name>       mean of the trained reward of this name
    heldout/<name>      mean of the held-out reward of this name
    spread              standard deviation of the reward within a group, averaged over groups
    alike               share of groups in which all samples have equal rewards
    kl                  distance from the reference: divergence of steps, or m((v - v_ref)^2) of velocities
    drift               m((v - v_ref)^2) / m((u - v_ref)^2): squared difference from the reference's
                        velocity, divided by the reference's squared error
    "gated"             share of samples to which the penalty of the distance applies, if there is a gate
Losses on the sampler's steps:
    clip_high, clip_low share of ratios of densities above and below the clip
    clipped             share of samples without gradient
    ratio, ratio_std    mean and standard deviation of ratio - 1
Losses on finished samples:
    moved, lag          m((v - v_old)^2) and m((v_old - v_ref)^2), both divided by m((u - v_old)^2)
    clipped             share of samples without gradient
    r, r_ends           nft only: mean goodness, and share of samples with a goodness of 0 or 1

Shapes: N samples, V voxels and C channels, as in models/sparse.py; R rewards, G groups of a process, B
groups of all processes, K samples of a group, n = G K samples of a process.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.tuning.flow.training.losses import goodness
from eg3d_rlhf.tuning.flow.training.online.advantages import (
    Gate,
    Scale,
    advantages,
    apply_control,
    combine_rewards,
    normal_scores,
)
from eg3d_rlhf.tuning.flow.training.online.objectives import OnLatents, OnSteps
from eg3d_rlhf.tuning.flow.training.online.scored_samples import Drawn, Explorer, Task
from eg3d_rlhf.tuning.flow.training.online.settings import OnlineConfig
from eg3d_rlhf.tuning.flow.training.online.snapshot import Snapshot, decay
from eg3d_rlhf.tuning.flow.training.pair_training import Order
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.trainer import Descent, StageResult, train, win_rate_signs, win_rates
from training.distributed import Ranks
from training.phases import derive_seed, sum_over_ranks

# prefixes and names of the tensors in checkpoints
OLD = "old."
REFERENCE = "reference."
GATE = "gate"


class OnlineUpdates(Descent):
    """Objective of a training on groups of samples that the policy itself generates.

    Args:
        task: stage, prompts and rewards.
        config: settings of the training.
        policy: network in training.
        reference: frozen reference network.
        ranks: this process among the processes that train together.

    Raises: ValueError if the groups of an update cannot be divided evenly over the processes.
    """

    def __init__(
        self, task: Task, config: OnlineConfig, policy: torch.nn.Module, reference: FrozenModel, ranks: Ranks
    ):
        super().__init__(task.stage, config, policy, ranks)
        if config.batch % ranks.world:
            raise ValueError(
                f"--batch: {config.batch} groups cannot be divided evenly over {ranks.world} processes."
                " Choose a multiple of the number of processes, or another number of processes."
            )
        self.config = config
        self.task = task
        self.order = Order(task.prompts, config.batch, config.seed)
        self.explorer = Explorer(task=task, config=config, policy=policy, reference=reference)
        # losses on steps sample from the policy itself, and the other losses from a snapshot that follows it
        self.old = None if config.on_steps else Snapshot(policy, self.trained_parameters)
        self.objective: OnSteps | OnLatents
        self.objective = (
            OnSteps(config, self.explorer) if self.old is None else OnLatents(config, self.explorer, self.old)
        )
        self.gate = Gate() if task.gate else None
        last_column = ("clipped", "clipped", "<5.3f") if config.on_steps else ("lag", "lag", "<8.2e")
        # (name of the metric, title of the column, format)
        self.columns = (
            ("reward", "reward", "<+8.4f"),
            ("spread", "spread", "<7.4f"),
            ("kl", "kl", "<8.2e"),
            last_column,
        )

    def run(self, step: int) -> dict:
        """Do one update, see Descent. The docstring of the module describes the metrics."""
        config = self.config
        K = self.config.group
        ranks = self.ranks
        prompt_items = self.order.items(step)
        # one seed for each group, below 2**31
        seeds = [
            derive_seed("group", config.seed, step, group_number) % 2**31
            for group_number in range(len(prompt_items))
        ]
        # the groups of this rank: every world-th group, beginning with group number `rank`
        rank_groups = slice(ranks.rank, None, ranks.world)
        prompts = [prompt for _, prompt in prompt_items[rank_groups]]
        sampled_passes = self.objective.draw(prompts, seeds[rank_groups], step)
        rewards, heldout_by_name = self._scored(sampled_passes)
        # of all ranks' groups, [B, K], since advantages may be normalised over the whole batch
        advantage = self._advantage(apply_control(rewards, config.use, seeds))
        distance_factor, metrics = self._distance_factor(rewards, heldout_by_name)
        metrics |= {
            "samples": config.batch * K,
            **self._reward_metrics(rewards, heldout_by_name, advantage, sampled_passes),
        }
        # this rank's samples again: [G, K] -> [n]
        rank_advantage = advantage[rank_groups].flatten().to(self.device)
        rank_factor = distance_factor[rank_groups].flatten().to(self.device)
        # averaged over the optimiser's steps on these samples; the first two sums are the number of samples
        # and the loss, which `descend` returns by themselves
        means = dict.fromkeys(("loss", "grad_norm", *self.objective.sums[2:]), 0.0)
        for optimizer_step in range(config.passes):
            self.optimizer.zero_grad(set_to_none=True)
            totals = torch.zeros(len(self.objective.sums), device=self.device)
            pass_size = config.batch_gpu or len(rank_advantage)  # number of samples in a pass, as in sampling
            pass_advantages = rank_advantage.split(pass_size)
            pass_factors = rank_factor.split(pass_size)
            for samples, pass_advantage, pass_factor in zip(
                sampled_passes, pass_advantages, pass_factors, strict=True
            ):
                pass_sums = self.objective.add(samples, pass_advantage, pass_factor, step, optimizer_step)
                totals += torch.stack([pass_sums[name] for name in self.objective.sums])
            sum_over_ranks(ranks, self.parameters, [totals])
            # three prompts are enough to find the update of an error
            example_names = "prompts " + ", ".join(prompts[:3])
            sample_count, loss, grad_norm, *further_sums = self.descend(step, totals, example_names)
            further_means = {
                name: metric_value / sample_count
                for name, metric_value in zip(self.objective.sums[2:], further_sums, strict=True)
            }
            for name, metric_value in {"loss": loss, "grad_norm": grad_norm, **further_means}.items():
                means[name] += metric_value / config.passes
        self._after(step)
        return metrics | self._logged_metrics(means)

    # Rewards and advantages.

    def _scored(self, sampled_passes: Sequence[Drawn]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score the samples of this rank, and gather the scores of all ranks.

        Returns: the trained rewards [R, B, K]; and the held-out rewards by name, [B, K] each.
        """
        pass_scores = [
            self.task.scores(samples.x_0, samples.prompts, samples.seeds) for samples in sampled_passes
        ]
        rewards = torch.cat([pass_rewards for pass_rewards, _ in pass_scores], 1)  # [R, n]
        heldout_by_name = {
            name: torch.cat([heldout_values[name] for _, heldout_values in pass_scores])
            for name in pass_scores[0][1]
        }
        scores_of_ranks = self.ranks.gather(
            [
                rewards.tolist(),
                {name: heldout_rewards.tolist() for name, heldout_rewards in heldout_by_name.items()},
            ]
        )

        def grouped_by_prompt(rank_values: list) -> torch.Tensor:
            """Join the values of all ranks, [..., n] each, to [..., B, K] in the order of the groups."""
            # [..., G, ranks, K]: group number g * ranks + r is the g-th group of rank r
            group_values = torch.stack(
                [
                    torch.tensor(values_of_rank).unflatten(-1, (-1, self.config.group))
                    for values_of_rank in rank_values
                ],
                -2,
            )
            return group_values.flatten(-3, -2)

        return grouped_by_prompt([rank_rewards for rank_rewards, _ in scores_of_ranks]), {
            name: grouped_by_prompt([heldout_values[name] for _, heldout_values in scores_of_ranks])
            for name in heldout_by_name
        }

    def _advantage(self, rewards: torch.Tensor) -> torch.Tensor:
        """Compute the advantages of all samples, [B, K], from the trained rewards [R, B, K]."""
        config = self.config
        clip = config.adv_clip
        # several rewards have a normalisation of their own, see combine_rewards
        if len(rewards) > 1:
            return combine_rewards(rewards, self.task.weights, clip=clip)
        if config.advantage == "ranks":
            return normal_scores(rewards[0]).clamp(-clip, clip)
        return advantages(rewards[0], Scale(over=config.advantage), clip)

    def _distance_factor(
        self, rewards: torch.Tensor, heldout_by_name: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the factor of each sample's distance from the reference, and the metrics of the gate.

        The samples that the gate selects have equal factors, and the other samples have the factor 0. The
        mean of the factors is 1. Without a gate all factors are 1, and there are no metrics.

        Args:
            rewards: trained rewards [R, B, K].
            heldout_by_name: held-out rewards by name, [B, K] each.
        Returns: the factors [B, K]; and the metrics by name.
        """
        if self.gate is None:
            return torch.ones_like(rewards[0]), {}
        weights = torch.tensor(self.task.weights).view(-1, 1)
        heldout_rewards = torch.stack([heldout_by_name[name].flatten() for name in self.task.gate])
        # 1 for samples to which the penalty applies, else 0, [B * K]
        is_selected = self.gate((weights * rewards.flatten(1)).sum(0), heldout_rewards).float()
        # mean 1, so that the gate does not change the total weight of the distance
        return (is_selected / is_selected.mean()).view(rewards[0].shape), {"gated": float(is_selected.mean())}

    def _reward_metrics(
        self,
        rewards: torch.Tensor,
        heldout_by_name: Mapping[str, torch.Tensor],
        advantage: torch.Tensor,
        sampled_passes: Sequence[Drawn],
    ) -> dict[str, float]:
        """Compute the metrics of the rewards and of the samples' moves, by name.

        Args:
            rewards: trained rewards [R, B, K].
            heldout_by_name: held-out rewards by name, [B, K] each.
            advantage: advantages [B, K].
            sampled_passes: samples of this process, in passes.
        """
        # [R, B, K] -> [B, K]
        weighted_rewards = (torch.tensor(self.task.weights).view(-1, 1, 1) * rewards).sum(0)
        # 1 for each group in which every reward has equal values, [B]
        all_equal = (rewards == rewards[..., :1]).all(-1).all(0).float()
        metrics = {
            "reward": weighted_rewards.mean(),
            "spread": weighted_rewards.std(1, correction=0).mean(),
            "alike": all_equal.mean(),
        }
        metrics |= {
            f"reward/{name}": scores.mean() for name, scores in zip(self.task.rewards, rewards, strict=True)
        }
        metrics |= {f"heldout/{name}": scores.mean() for name, scores in heldout_by_name.items()}
        # if many r are 0 or 1, advantages are clipped and adv_clip is too small
        if self.config.loss == "nft":
            r = goodness(advantage, self.config.adv_clip)
            metrics |= {"r": r.mean(), "r_ends": ((r == 0) | (r == 1)).float().mean()}
        if totals := self.objective.totals_of(sampled_passes):
            # one tensor, so that one collective operation sums all of them
            sums = torch.stack(list(totals.values())).to(self.device)
            sum_over_ranks(self.ranks, [], [sums])
            sums_by_name = dict(zip(totals, sums, strict=True))
            # the quotient of sums over all ranks, not the mean of the ranks' quotients
            metrics |= {
                "kl": sums_by_name["kl"] / sums_by_name["moves"],
                "drift": sums_by_name["drift"] / sums_by_name["missing"].clamp(min=1e-12),
            }
        return {name: float(metric_value) for name, metric_value in metrics.items()}

    def _logged_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Convert the means of the objective's sums to the metrics that are logged, by name."""
        if self.config.on_steps:
            # variance = mean of squares - square of the mean; it may be below 0 by rounding
            ratio_std = max(means.pop("ratio_square") - means["ratio"] ** 2, 0.0) ** 0.5
            logged_names = {"high": "clip_high", "low": "clip_low", "stopped": "clipped"}
            return {
                **{logged_names.get(name, name): metric_value for name, metric_value in means.items()},
                "ratio_std": ratio_std,
            }
        # 1e-12 guards the quotients where a network predicts its samples exactly
        old_error = max(means.pop("old_missing"), 1e-12)
        ref_error = max(means.pop("missing"), 1e-12)
        stopped_share = means.pop("stopped")
        return {
            **means,
            "clipped": stopped_share,
            "moved": means["moved"] / old_error,
            "lag": means["lag"] / old_error,
            "drift": means["kl"] / ref_error,
        }

    # Networks that follow the policy.

    def _after(self, step: int) -> None:
        """Do what follows an update: move the sampling network, and renew the reference if that is due."""
        if self.old is not None:
            self.old.follow(decay(self.config.decay, (step + 1) * self.config.passes))
        # the reference becomes the current network: from then on `kl` measures the distance from it
        if self.config.reset is not None and (step + 1) % self.config.reset == 0:
            self.explorer.reference = Snapshot(self.policy, self.trained_parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of checkpoints, by name: sampling network, renewed reference, and gate."""
        # prefixes keep the names of the three apart in one file
        state_tensors = (
            {} if self.old is None else {OLD + name: value for name, value in self.old.values.items()}
        )
        if isinstance(self.explorer.reference, Snapshot):
            state_tensors |= {
                REFERENCE + name: value for name, value in self.explorer.reference.values.items()
            }
        if self.gate is not None:
            state_tensors[GATE] = torch.tensor([self.gate.share, *self.gate.past], dtype=torch.float64)
        return state_tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore sampling network, reference and gate from the tensors that `tensors` returned."""

        def tensors_under(prefix: str) -> dict[str, torch.Tensor]:
            """Return the tensors whose names have a prefix, by the name of the parameter after it."""
            return {
                name: tensors[prefix + name] for name in self.trained_parameters if prefix + name in tensors
            }

        if self.old is not None:
            self.old.load(tensors_under(OLD))
        # empty if the reference was never renewed; it is then the untuned network
        if reference_tensors := tensors_under(REFERENCE):
            self.explorer.reference = Snapshot(self.policy, self.trained_parameters)
            self.explorer.reference.load(reference_tensors)
        if self.gate is not None:
            # the order is that of `tensors`
            share, *past = tensors[GATE].tolist()
            self.gate = Gate(share=share, past=past)

    # Warnings.

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        return online_signs(lines, self.config.on_steps)

    def ends(self, stats_line: Mapping) -> str | None:
        return too_far(stats_line, self.config.max_drift)


def train_online(
    task: Task,
    config: OnlineConfig,
    out: Path,
    identity: Mapping,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on samples that it generates during training.

    The folder, the lines of stats.jsonl, checkpoints and resuming are described in trainer.py.

    Args:
        task: stage, prompts and rewards.
        config: settings of the training.
        out: folder of the run.
        identity: JSON that identifies the rewards and the networks of the other stages.
        common: further keyword arguments of trainer.train.

    Raises: ValueError for settings that do not fit the stage; further errors as in train_stage.
    """
    # called only for its check: it raises ValueError for steps that the sampler does not have, before
    # anything is written
    config.sampling(task.stage)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> OnlineUpdates:
        assert reference is not None  # needs_reference is True for all losses of online tuning
        return OnlineUpdates(task, config, policy, reference, run.ranks)

    # part of training_options.json: a run cannot be resumed with other rewards or prompts
    training_inputs = {
        "base": task.stage.hash,
        "conditions": list(task.prompts),
        "rewards": list(task.rewards),
        "weights": list(task.weights),
        "gate": list(task.gate),
        **identity,
    }
    return train(task.stage, config, training_inputs, start, Path(out), **common)


# Warnings about failing trainings, from the lines of stats.jsonl, and the criterion to stop a training.

ALIKE = 0.9  # share of groups with equal rewards, above which a warning is given
STOPPED = 0.9  # share of samples without gradient, above which a warning is given
ENDS = 0.5  # share of samples with a goodness of 0 or 1, above which a warning is given
CALM = "Raise --kl, lower --lr, or train fewer updates."
LINES = 3  # number of lines in a row in which a limit must be exceeded before a warning is given


def _lasting(lines: Sequence[Mapping], name: str, limit: float) -> Mapping | None:
    """Return the last line with a metric if the metric is above a limit in the last LINES such lines.

    Return None if it is not, or if there are fewer such lines.

    Args:
        lines: lines of stats.jsonl so far.
        name: name of the metric.
        limit: value above which the metric must be.
    """
    # evaluations write lines without the metrics of updates
    recent_lines = [line for line in lines if name in line][-LINES:]
    return (
        recent_lines[-1]
        if len(recent_lines) == LINES and min(line[name] for line in recent_lines) > limit
        else None
    )


def online_signs(lines: Sequence[Mapping], on_steps: bool) -> dict[str, str]:
    """Return the warnings that the lines of stats.jsonl so far give reason for, by name.

    Args: lines: lines of stats.jsonl; on_steps: whether the loss acts on the sampler's steps.
    """
    signs = win_rate_signs(win_rates(lines), CALM)
    if line := _lasting(lines, "alike", ALIKE):
        # only samplers with noise have the second flag
        option_names = "--group or sde_noise (--set)" if on_steps else "--group"
        signs["alike"] = (
            f"step {line['step']}: in {line['alike']:.0%} of the groups all rewards are equal and give no"
            f" gradient. Raise {option_names}, or use a reward with finer values."
        )
    if line := _lasting(lines, "clipped", STOPPED):
        signs["clip"] = (
            f"step {line['step']}: the clip removes {line['clipped']:.0%} of the gradients. Raise"
            " --clip-range, or do one optimiser step per update (--set passes=1)."
        )
    if line := _lasting(lines, "r_ends", ENDS):
        signs["ends"] = (
            f"step {line['step']}: {line['r_ends']:.0%} of the samples have a goodness of 0 or 1. Raise"
            " adv_clip (--set)."
        )
    if warning := unconfirmed(lines):
        signs["unconfirmed"] = warning
    return signs


def unconfirmed(lines: Sequence[Mapping]) -> str | None:
    """Return a warning if the trained reward has risen while every held-out reward has fallen.

    Return None otherwise, and if there are no held-out rewards or fewer than 2 x LINES lines. The means of
    the first and of the last LINES lines are compared. A change counts if it exceeds half of the range of
    the reward's values over the run.
    """
    reward_lines = [line for line in lines if "reward" in line]
    heldout_names = [name for name in reward_lines[0] if name.startswith("heldout/")] if reward_lines else []
    if len(reward_lines) < 2 * LINES or not heldout_names:
        return None

    def relative_rise(name: str) -> float:
        """Return the rise of a reward as a share of its range; a fall is negative."""
        reward_values = [line[name] for line in reward_lines]
        first_mean = sum(reward_values[:LINES]) / LINES
        last_mean = sum(reward_values[-LINES:]) / LINES
        # 1e-12 guards the quotient if all values are equal
        return (last_mean - first_mean) / max(max(reward_values) - min(reward_values), 1e-12)

    if relative_rise("reward") > 0.5 and all(relative_rise(name) < -0.5 for name in heldout_names):
        changes = ", ".join(
            f"{name.removeprefix('heldout/')} {reward_lines[-1][name]:.3g} from {reward_lines[0][name]:.3g}"
            for name in heldout_names
        )
        return (
            f"step {reward_lines[-1]['step']}: the trained reward rises, while the held-out rewards fall:"
            f" {changes}. {CALM}"
        )
    return None


def too_far(stats_line: Mapping, max_drift: float | None) -> str | None:
    """Return the reason why training must stop after a line, or None if it continues.

    Args: stats_line: line of stats.jsonl; max_drift: largest allowed policy drift; None: no limit.
    """
    # lines of evaluations have no drift
    drift = stats_line.get("drift")
    if max_drift is None or drift is None or drift <= max_drift:
        return None
    return f"the policy drift is {drift:.2f}, more than {max_drift:g}. {CALM}"
