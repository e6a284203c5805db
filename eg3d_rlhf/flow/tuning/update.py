"""One update of a stage's policy on a batch of pairs: passes in turn and side by side on ranks, equal to one pass over the whole batch.

Shape letters as in sparse.py; P pairs, B time bins.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from eg3d_rlhf.flow.condition import each
from eg3d_rlhf.flow.dpo import TIME_BINS, DpoConfig, PairDraw, PairErrors, draw_pairs, pair_loss, pair_stats
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.pairs import PreferencePair
from eg3d_rlhf.flow.reference import Reference
from eg3d_rlhf.flow.sparse import collate, feats_of, separate, with_feats
from eg3d_rlhf.flow.stage import FlowStage, Pipeline
from eg3d_rlhf.preferences.losses import aggregate
from training.config import check_knobs, knob
from training.distributed import Ranks
from training.phases import LossNotFiniteError, derive_seed
from training.rounds import GradientSum, Layout, sum_over_ranks

_train = functools.partial(knob, group="Training")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run besides its networks and pairs; the defaults suit TRELLIS."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # what is minimised
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # adapters to train; None trains every parameter
    steps: int = _train(3000, "Length of a stage's training.", metavar="UPDATES", low=1)
    batch: int = _train(4, "Per update, over all processes and passes.", metavar="PAIRS", low=1)
    batch_gpu: int | None = _train(None, "Per pass and process: decides memory, not the result.", metavar="PAIRS", low=1, shown="batch")
    lr: float = _train(5e-6, "AdamW's learning rate.", above=0)
    warmup: int = _train(100, "Over which the learning rate rises from 0.", metavar="UPDATES", low=0)
    weight_decay: float = _train(0.01, "AdamW's, apart from the gradient.", low=0)
    clip: float = _train(1.0, "Largest norm of the gradient over all parameters.", above=0)
    bf16: bool = False  # passes in bfloat16 where torch's autocast does so; parameters and sums stay float32
    ema: float | None = _train(None, "Decay of a moving average per update, which is then measured and kept.", above=0, below=1)
    draws: int | None = _train(None, "Different times and noises per pair, then the first again; none: always new ones.", low=1)
    cache_reference: bool = _train(False, "Keep the reference's errors per pair and draw; wants --draws.")
    held_out_every: int = _train(100, "Between win rates; one is measured before the first.", metavar="UPDATES", low=1)
    patience: int = _train(5, "Win rates in a row without a new best, after which training stops.", low=1)
    max_drop: float = _train(0.2, "Below the best win rate, at which it stops at once.", above=0)
    log_every: int = _train(10, "Per line of stats.jsonl.", metavar="UPDATES", low=1)
    checkpoint_every: int = _train(200, "Between resumable states.", metavar="UPDATES", low=1)
    seed: int = 0  # >= 0: adapters, order, times, noises, dropout

    def __post_init__(self):
        check_knobs(self)
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(f"TrainConfig.batch_gpu: expected a divisor of batch={self.batch}, got {self.batch_gpu}. Choose one.")
        if self.cache_reference and self.draws is None:
            raise ValueError("TrainConfig.cache_reference: expected draws that come again, got draws=None. Set draws, to 8 say.")


BINNED = ("pairs", "implicit_accuracy", "margin", "w_diff", "l_diff")  # sums over the pairs of each time bin
Item = tuple[int, PreferencePair]  # which of its draws, and a pair


class Order:
    """Which pairs an update meets: passes over all pairs, each in an order of its own, one after the other."""

    def __init__(self, pairs: Sequence[PreferencePair], config: TrainConfig):
        self.pairs, self.config = pairs, config
        self._orders: dict[int, np.ndarray] = {}

    def items(self, step: int) -> list[Item]:
        """Those of the whole batch; a batch may run over the end of a pass, or hold several where there are few pairs."""
        found, config = [], self.config
        for number in range(step * config.batch, (step + 1) * config.batch):
            epoch, place = divmod(number, len(self.pairs))
            if epoch not in self._orders:
                self._orders = {epoch: np.random.default_rng([config.seed, epoch]).permutation(len(self.pairs))}
            found.append((epoch % config.draws if config.draws else epoch, self.pairs[self._orders[epoch][place]]))
        return found


class Updates:
    """What a stage's parameters go through; `run` is one update.

    Args:
        policy: the network in training; parameters: of it, those that are trained; reference: None where the loss needs none.
        pairs: of the stage, checked; ranks: this process among those that train together.
    Raises: ValueError where a batch cannot be divided over ranks and passes.
    """

    def __init__(
        self, pipeline: Pipeline, stage: FlowStage, pairs: Sequence[PreferencePair], config: TrainConfig, policy: torch.nn.Module,
        parameters: Iterable[torch.nn.Parameter], reference: Reference | None, ranks: Ranks,
    ):
        self.pipeline, self.stage, self.config, self.ranks = pipeline, stage, config, ranks
        self.policy, self.parameters, self.reference = policy, list(parameters), reference
        self.device = self.parameters[0].device
        size = config.batch_gpu or max(config.batch // ranks.world, 1)
        if config.batch % (ranks.world * size):
            raise ValueError(
                f"train_stage: expected a batch of a multiple of {ranks.world} processes x {size} pairs per pass (batch_gpu), "
                f"got {config.batch}. Change one."
            )
        self.order, self.layout = Order(pairs, config), Layout(config.batch, ranks, size)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)

    def lr(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        return self.config.lr * min(1.0, (step + 1) / max(self.config.warmup, 1))

    def run(self, step: int) -> dict:
        """One update. Returns loss, grad_norm, pairs, and bins, the sums of BINNED over time bins, of all ranks.

        Losses of a batch are added up as masses and divided once: of the mean, the mass of a part is its number of pairs, of Dr. DPO its
        sum of exp(-loss / beta). The gradients of parts add up to those of the whole batch either way.
        Raises: LossNotFiniteError for a loss or gradient that is not finite; the parameters are then as they were.
        """
        items, layout = self.order.items(step), self.layout
        gradients, totals = GradientSum(self.parameters, layout.here), torch.zeros(2 + len(BINNED) * TIME_BINS, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.train()
        for turn in range(layout.here):
            part = sorted(items[layout.rows(turn)], key=lambda item: item[0])  # two draws where a batch runs over the end of a pass
            for epoch, group in itertools.groupby(part, key=lambda item: item[0]):
                pairs = [pair for _, pair in group]
                draw = self._draw(pairs, epoch, items)
                torch.manual_seed(derive_seed(self.config.seed, "dropout", step, self.ranks.rank + turn * self.ranks.world, epoch))
                totals += self._pass(draw, pairs, epoch)
            gradients.end_round()
        gradients.finish()
        sum_over_ranks(self.ranks, self.parameters, [totals])
        return self._step(step, totals, items)

    def _draw(self, pairs: Sequence[PreferencePair], epoch: int, items: Sequence[Item]) -> PairDraw:
        """Weights whose mean over a batch is to be 1 are divided by the mean over the whole batch, not over this part of it."""
        name, config = self.stage.name, self.config
        cond = self.pipeline.conditions([pair.condition for pair in pairs], name)
        no_cond = self.pipeline.no_condition(len(pairs), name) if config.dpo.condition_dropout else None
        draw = draw_pairs(self.stage, pairs, cond, no_cond, config.dpo, config.seed, epoch, self.device)
        if draw.weight is not None and all(pair.provenance.get("w2_norm") == "batch" for _, pair in items):
            weight = torch.tensor([pair.w2 for pair in pairs], device=self.device)
            draw = replace(draw, weight=weight / float(np.mean([pair.w2 for _, pair in items])))
        if config.dpo.kind != "sft":
            return draw
        count = len(pairs)  # the preferred ones alone
        x_0, eps, x_t = (collate(separate(batch)[:count]) for batch in (draw.x_0, draw.eps, draw.x_t))
        return replace(draw, x_0=x_0, eps=eps, x_t=x_t, t=draw.t[:count], cond=each(lambda c: c[:count], draw.cond))

    def _pass(self, draw: PairDraw, pairs: Sequence[PreferencePair], epoch: int) -> torch.Tensor:
        """Add the gradients of a part of the batch; returns [2 + len(BINNED) B]: mass, mass times loss, then the sums."""
        config, stage, ref = self.config.dpo, self.stage, None
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)
        if self.reference is not None:
            with autocast:
                ref = self.reference.errors(stage, draw, [(pair.id, epoch) for pair in pairs])
        with autocast:
            v = stage.velocity(draw.x_t, draw.t, draw.cond, self.policy)
        errors = stage.path.errors(with_feats(v, feats_of(v).float()), draw.x_0, draw.eps)
        sft = config.kind == "sft"
        found = PairErrors(preferred=errors, rejected=torch.zeros_like(errors)) if sft else PairErrors.split(errors, ref)
        losses = pair_loss(found, config, draw.weight)
        mass = losses.new_tensor(float(len(losses)))
        if config.aggregation == "drdpo":
            mass = torch.exp(-(losses.detach() / config.drdpo_beta).clamp(max=80)).sum()  # float32 is 0 above some 90
        loss = mass * aggregate(losses, config.aggregation, config.drdpo_beta)
        loss.backward()
        totals = torch.zeros(2 + len(BINNED) * TIME_BINS, device=self.device)
        totals[:2] = torch.stack([mass, loss.detach()])
        if ref is not None:
            stats = pair_stats(found, found.delta(config.loser_weight, config.clamp), draw.t)
            totals[2:] = torch.cat([stats[f"bins/{name}"] for name in BINNED])
        return totals

    def _step(self, step: int, totals: torch.Tensor, items: Sequence[Item]) -> dict:
        """Clip and step; the figures of the update."""
        config = self.config
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        mass, loss, *sums, norm = torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        loss = loss / mass if mass else math.nan
        if not math.isfinite(loss) or not math.isfinite(norm):
            ids = ", ".join(pair.id for _, pair in items[:3])
            raise LossNotFiniteError(
                f"train_stage({self.stage.name}): expected a finite loss and gradient in update {step + 1}, got {loss:g} and {norm:g} "
                f"(pairs {ids}, ...). Use a lower lr or a larger beta, and no bf16 if it is on."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        if config.dpo.aggregation == "drdpo":  # the whole batch's mass is its loss
            loss = -config.dpo.drdpo_beta * math.log(mass / len(items))
        bins = dict(zip(BINNED, np.reshape(sums, (-1, TIME_BINS)).tolist(), strict=True)) if self.reference is not None else {}
        return {"loss": loss, "grad_norm": norm, "pairs": len(items), "bins": bins}
