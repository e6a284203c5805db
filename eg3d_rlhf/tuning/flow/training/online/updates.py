"""Do one update of online tuning: generate groups of samples, score them, compute advantages, and do steps of
the optimiser by one of the losses. The logged figures are:

    reward, <name>      weighted sum of the trained rewards, mean over samples; mean of each trained or
                        held-out reward by its name
    spread, alike       standard deviation of the reward within groups; share of groups with equal rewards
    kl                  distance from the reference: divergence of steps, or m((v - v_ref)^2) of velocities
    drift               m((v - v_ref)^2) / m((u - v_ref)^2): how far the velocity has moved from the
                        reference's, relative to the reference's distance from the samples
    clip_high, clip_low, clipped, ratio, ratio_std      on steps: shares above and below the clip, share
                                                        without gradient, mean and standard deviation of
                                                        ratio - 1
    moved, lag          on finished samples: m((v - v_old)^2) and m((v_old - v_ref)^2), both divided by
                        m((u - v_old)^2)
    r, r_ends           nft: mean goodness, and share at 0 or 1
    "gated"             share of samples to which the penalty of the distance applies

Shapes: N samples, V voxels and C channels, as in models/sparse.py; R rewards, G groups of a process, B of
all, K samples of a group.
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
    as_used,
    normal_scores,
    several,
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

# names of states
OLD = "old."
REFERENCE = "reference."
GATE = "gate"


class OnlineUpdates(Descent):
    """Descent on groups of samples that the policy itself generates.

    Args: as Descent; reference: the frozen network.
    Raises: ValueError if groups cannot be divided over ranks.
    """

    def __init__(
        self, task: Task, config: OnlineConfig, policy: torch.nn.Module, reference: FrozenModel, ranks: Ranks
    ):
        super().__init__(task.stage, config, policy, ranks)
        if config.batch % ranks.world:
            raise ValueError(
                f"--batch: expected a multiple of {ranks.world} processes, got {config.batch} groups. Change"
                " the batch or the number of processes."
            )
        self.config = config
        self.task = task
        self.order = Order(task.conditions, config.batch, config.seed)
        self.explorer = Explorer(task=task, config=config, policy=policy, reference=reference)
        # losses on steps sample from the policy itself; the others from a snapshot that follows it
        self.old = None if config.on_steps else Snapshot(policy, self.trained_parameters)
        self.objective: OnSteps | OnLatents
        self.objective = (
            OnSteps(config, self.explorer) if self.old is None else OnLatents(config, self.explorer, self.old)
        )
        self.gate = Gate() if task.gate else None
        last = ("clipped", "clipped", "<5.3f") if config.on_steps else ("lag", "lag", "<8.2e")
        self.columns = (
            ("reward", "reward", "<+8.4f"),
            ("spread", "spread", "<7.4f"),
            ("kl", "kl", "<8.2e"),
            last,
        )

    def run(self, step: int) -> dict:
        """Do one update, see Descent; the module describes the figures."""
        config = self.config
        K = self.config.group
        ranks = self.ranks
        items = self.order.items(step)
        seeds = [derive_seed("group", config.seed, step, number) % 2**31 for number in range(len(items))]
        # this rank's groups; each rank takes every world-th
        mine = slice(ranks.rank, None, ranks.world)
        prompts = [prompt for _, prompt in items[mine]]
        drawn = self.objective.draw(prompts, seeds[mine], step)
        rewards, heldout = self._scored(drawn)
        # of all ranks' groups, [B, K], since advantages may be normalised over the whole batch
        advantage = self._advantage(as_used(rewards, config.use, seeds))
        held, figures = self._held(rewards, heldout)
        figures |= {"samples": config.batch * K, **self._reward_figures(rewards, heldout, advantage, drawn)}
        # this rank's samples again: [G, K] -> [n]
        rank_advantage, rank_held = (values[mine].flatten().to(self.device) for values in (advantage, held))
        # means over the optimiser's steps on these samples
        sums = dict.fromkeys(("loss", "grad_norm", *self.objective.sums[2:]), 0.0)
        for number in range(config.passes):
            self.optimizer.zero_grad(set_to_none=True)
            totals = torch.zeros(len(self.objective.sums), device=self.device)
            size = config.batch_gpu or len(rank_advantage)  # samples of a part, as they were generated
            parts = zip(drawn, rank_advantage.split(size), strict=True)
            for (samples, of_samples), of_held in zip(parts, rank_held.split(size), strict=True):
                sums_of_part = self.objective.add(samples, of_samples, of_held, step, number)
                totals += torch.stack([sums_of_part[name] for name in self.objective.sums])
            sum_over_ranks(ranks, self.parameters, [totals])
            mass, loss, norm, *others = self.descend(step, totals, "prompts " + ", ".join(prompts[:3]))
            of_pass = dict(zip(self.objective.sums[2:], (value / mass for value in others), strict=True))
            for name, value in {"loss": loss, "grad_norm": norm, **of_pass}.items():
                sums[name] += value / config.passes
        self._after(step)
        return figures | self._shares(sums)

    # Rewards and advantages.

    def _scored(self, drawn: Sequence[Drawn]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score the samples of all ranks: rewards [R, B, K], and held-out rewards by name, [B, K] each."""
        scored = [self.task.scores(samples.x_0, samples.conditions, samples.seeds) for samples in drawn]
        rewards = torch.cat([values for values, _ in scored], 1)  # [R, n]
        heldout = {name: torch.cat([others[name] for _, others in scored]) for name in scored[0][1]}
        everyone = self.ranks.gather(
            [rewards.tolist(), {name: values.tolist() for name, values in heldout.items()}]
        )

        def grouped_by_prompt(parts: list) -> torch.Tensor:
            """Join the values of all ranks, [..., n] each, to [..., B, K] in the order of the groups."""
            # [..., G, ranks, K]: group number g * ranks + r is the g-th group of rank r
            grouped = torch.stack(
                [torch.tensor(part).unflatten(-1, (-1, self.config.group)) for part in parts], -2
            )
            return grouped.flatten(-3, -2)

        return grouped_by_prompt([part for part, _ in everyone]), {
            name: grouped_by_prompt([others[name] for _, others in everyone]) for name in heldout
        }

    def _advantage(self, rewards: torch.Tensor) -> torch.Tensor:
        """Compute advantages [B, K] from rewards [R, B, K]."""
        config = self.config
        clip = self.config.adv_clip
        # several rewards have a normalisation of their own, see advantages.several
        if len(rewards) > 1:
            return several(rewards, self.task.weights, clip=clip)
        if config.advantage == "ranks":
            return normal_scores(rewards[0]).clamp(-clip, clip)
        return advantages(rewards[0], Scale(over=config.advantage), clip)

    def _held(
        self, rewards: torch.Tensor, heldout: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the factor of each sample's distance, [B, K] of mean 1, and its figures.

        Without a gate all factors are 1.
        """
        if self.gate is None:
            return torch.ones_like(rewards[0]), {}
        weights = torch.tensor(self.task.weights).view(-1, 1)
        others = torch.stack([heldout[name].flatten() for name in self.task.gate])
        gated = self.gate((weights * rewards.flatten(1)).sum(0), others).float()
        # mean 1, so that the gate does not change the total weight of the distance
        return (gated / gated.mean()).view(rewards[0].shape), {"gated": float(gated.mean())}

    def _reward_figures(
        self,
        rewards: torch.Tensor,
        heldout: Mapping[str, torch.Tensor],
        advantage: torch.Tensor,
        drawn: Sequence[Drawn],
    ) -> dict[str, float]:
        """Compute the figures of rewards and of the samples' moves."""
        # [R, B, K] -> [B, K]
        total = (torch.tensor(self.task.weights).view(-1, 1, 1) * rewards).sum(0)
        # a group counts if it has no spread in any of the rewards
        alike = (rewards == rewards[..., :1]).all(-1).all(0).float()
        figures = {"reward": total.mean(), "spread": total.std(1, correction=0).mean(), "alike": alike.mean()}
        figures |= {
            f"reward/{name}": values.mean() for name, values in zip(self.task.rewards, rewards, strict=True)
        }
        figures |= {f"heldout/{name}": values.mean() for name, values in heldout.items()}
        # many r at 0 or 1 mean that advantages are cut off, and adv_clip is too small
        if self.config.loss == "nft":
            r = goodness(advantage, self.config.adv_clip)
            figures |= {"r": r.mean(), "r_ends": ((r == 0) | (r == 1)).float().mean()}
        if totals := self.objective.totals_of(drawn):
            sums = torch.stack(list(totals.values())).to(self.device)
            sum_over_ranks(self.ranks, [], [sums])
            sums_by_name = dict(zip(totals, sums, strict=True))
            # the quotient of sums over all ranks, not the mean of the ranks' quotients
            figures |= {
                "kl": sums_by_name["kl"] / sums_by_name["moves"],
                "drift": sums_by_name["drift"] / sums_by_name["missing"].clamp(min=1e-12),
            }
        return {name: float(value) for name, value in figures.items()}

    def _shares(self, means: dict[str, float]) -> dict[str, float]:
        """Compute the logged figures from means over samples."""
        if self.config.on_steps:
            # the variance may be below 0 by rounding
            spread = max(means.pop("ratio_square") - means["ratio"] ** 2, 0.0) ** 0.5
            names = {"high": "clip_high", "low": "clip_low", "stopped": "clipped"}
            return {**{names.get(name, name): value for name, value in means.items()}, "ratio_std": spread}
        # 1e-12 guards the quotients where a network predicts its samples exactly
        old = max(means.pop("old_missing"), 1e-12)
        missing = max(means.pop("missing"), 1e-12)
        stopped = means.pop("stopped")
        return {
            **means,
            "clipped": stopped,
            "moved": means["moved"] / old,
            "lag": means["lag"] / old,
            "drift": means["kl"] / missing,
        }

    # Networks that follow the policy.

    def _after(self, step: int) -> None:
        """Move the sampling network towards the policy, and reset the reference where it is due."""
        if self.old is not None:
            self.old.follow(decay(self.config.decay, (step + 1) * self.config.passes))
        # the reference becomes the current network: from then on `kl` measures the distance from it
        if self.config.reset is not None and (step + 1) % self.config.reset == 0:
            self.explorer.reference = Snapshot(self.policy, self.trained_parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state of the sampling network, of a reference that was reset, and of the gate."""
        # prefixes keep the names of the three apart in one file
        state = {} if self.old is None else {OLD + name: value for name, value in self.old.values.items()}
        if isinstance(self.explorer.reference, Snapshot):
            state |= {REFERENCE + name: value for name, value in self.explorer.reference.values.items()}
        if self.gate is not None:
            state[GATE] = torch.tensor([self.gate.share, *self.gate.past], dtype=torch.float64)
        return state

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""

        def named(prefix: str) -> dict[str, torch.Tensor]:
            """Return the tensors under a prefix, by the parameters' names."""
            return {
                name: tensors[prefix + name] for name in self.trained_parameters if prefix + name in tensors
            }

        if self.old is not None:
            self.old.load(named(OLD))
        # absent where the reference was never reset: it is then the untuned network
        if reference := named(REFERENCE):
            self.explorer.reference = Snapshot(self.policy, self.trained_parameters)
            self.explorer.reference.load(reference)
        if self.gate is not None:
            share, *past = tensors[GATE].tolist()
            self.gate = Gate(share=share, past=past)

    # Warnings.

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        return online_signs(lines, self.config.on_steps)

    def ends(self, record: Mapping) -> str | None:
        return too_far(record, self.config.max_drift)


def train_online(
    task: Task,
    config: OnlineConfig,
    out: Path,
    known: Mapping,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on its own samples.

    Folder, lines, checkpoints and resume are those of trainer.py.

    Args: known: JSON that names the rewards and the networks of the other stages; common: see trainer.train.
    Raises: ValueError for settings that do not fit the stage; further errors as in train_stage.
    """
    # raises ValueError for steps that the sampler does not have, before anything is written
    config.sampling(task.stage)

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> OnlineUpdates:
        assert reference is not None  # needs_reference is True for all losses of online tuning
        return OnlineUpdates(task, config, policy, reference, run.ranks)

    # part of training_options.json: a run cannot be resumed with other rewards or prompts
    options = {
        "base": task.stage.hash,
        "conditions": list(task.conditions),
        "rewards": list(task.rewards),
        "weights": list(task.weights),
        "gate": list(task.gate),
        **known,
    }
    return train(task.stage, config, options, start, Path(out), **common)


# Signs of failing online tuning in the lines of stats.jsonl: warnings by name, and the criterion to stop.

ALIKE = 0.9  # share of groups with equal rewards, above which a warning is given
STOPPED = 0.9  # share of samples without gradient, likewise
ENDS = 0.5  # share of samples with a goodness of 0 or 1, likewise
CALM = "Raise --kl, lower --lr, or train fewer updates."
LINES = 3  # lines in a row that a sign must last


def _lasting(lines: Sequence[Mapping], name: str, limit: float) -> Mapping | None:
    """Return the last line if a figure was above a limit in LINES lines in a row, else None."""
    # evaluations write lines without the figures of updates
    last = [line for line in lines if name in line][-LINES:]
    return last[-1] if len(last) == LINES and min(line[name] for line in last) > limit else None


def online_signs(lines: Sequence[Mapping], on_steps: bool) -> dict[str, str]:
    """Return warnings by name, as of the last line."""
    signs = win_rate_signs(win_rates(lines), CALM)
    if line := _lasting(lines, "alike", ALIKE):
        # only samplers with noise have the second flag
        more = "--group or --sde-noise" if on_steps else "--group"
        signs["alike"] = (
            f"step {line['step']}: in {line['alike']:.0%} of the groups all rewards are equal, and give no"
            f" gradient. Raise {more}, or use a finer reward."
        )
    if line := _lasting(lines, "clipped", STOPPED):
        signs["clip"] = (
            f"step {line['step']}: the clip removes {line['clipped']:.0%} of the gradients. Raise clip_range,"
            " or use one pass."
        )
    if line := _lasting(lines, "r_ends", ENDS):
        signs["ends"] = (
            f"step {line['step']}: {line['r_ends']:.0%} of the samples have a goodness of 0 or 1. Raise"
            " adv_clip."
        )
    if fallen := unconfirmed(lines):
        signs["unconfirmed"] = fallen
    return signs


def unconfirmed(lines: Sequence[Mapping]) -> str | None:
    """Return a warning if the trained reward has risen while every held-out reward has fallen, else None.

    The means of the first and of the last LINES lines are compared. A change counts if it exceeds half of the
    figure's range over the run.
    """
    rewarded = [line for line in lines if "reward" in line]
    names = [name for name in rewarded[0] if name.startswith("heldout/")] if rewarded else []
    if len(rewarded) < 2 * LINES or not names:
        return None

    def risen(name: str) -> float:
        """Return the rise of a figure as a share of its range."""
        values = [line[name] for line in rewarded]
        start, end = (sum(part) / LINES for part in (values[:LINES], values[-LINES:]))
        return (end - start) / max(max(values) - min(values), 1e-12)

    if risen("reward") > 0.5 and all(risen(name) < -0.5 for name in names):
        shown = ", ".join(
            f"{name.removeprefix('heldout/')} {rewarded[-1][name]:.3g} from {rewarded[0][name]:.3g}"
            for name in names
        )
        return (
            f"step {rewarded[-1]['step']}: the trained reward rises, while the held-out rewards fall:"
            f" {shown}. {CALM}"
        )
    return None


def too_far(record: Mapping, limit: float | None) -> str | None:
    """Return why training must stop after a line, or None to continue."""
    # a line of an evaluation alone has no drift
    drift = record.get("drift")
    if limit is None or drift is None or drift <= limit:
        return None
    return f"the policy drift is {drift:.2f}, more than {limit:g}. {CALM}"
