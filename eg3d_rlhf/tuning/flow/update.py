"""One update of a stage's policy on a batch of pairs: passes in turn and side by side on ranks, equal to one pass over the whole batch.

Shape letters as in sparse.py; P pairs, B time bins.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from eg3d_rlhf.models.sparse import collate, feats_of, separate, with_feats
from eg3d_rlhf.preferences.losses import aggregate
from eg3d_rlhf.tuning.flow.condition import each
from eg3d_rlhf.tuning.flow.descent import Descent, StageTraining, train_knob
from eg3d_rlhf.tuning.flow.dpo import BINNED, TIME_BINS, DpoConfig, PairDraw, PairErrors, draw_pairs, pair_loss, pair_stats
from eg3d_rlhf.tuning.flow.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.progress import signs
from eg3d_rlhf.tuning.flow.reference import CachedErrors, Reference
from eg3d_rlhf.tuning.flow.stage import FlowStage, Pipeline
from training.distributed import Ranks
from training.phases import derive_seed
from training.rounds import GradientSum, Layout, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageTraining):
    """Everything that decides a training on pairs besides its networks and pairs."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # what is minimised
    batch: int = train_knob(4, "Per update, over all processes and passes.", metavar="PAIRS", low=1)
    batch_gpu: int | None = train_knob(None, "Per pass and process: decides memory, not the result.", metavar="PAIRS", low=1, shown="batch")
    draws: int | None = train_knob(None, "Different times and noises per pair, then the first again; none: always new ones.", low=1)
    cache_reference: bool = train_knob(False, "Keep the reference's errors per pair and draw; wants --draws.")

    def __post_init__(self):
        super().__post_init__()
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(f"TrainConfig.batch_gpu: expected a divisor of batch={self.batch}, got {self.batch_gpu}. Choose one.")
        if self.cache_reference and self.draws is None:
            raise ValueError("TrainConfig.cache_reference: expected draws that come again, got draws=None. Set draws, to 8 say.")

    @property
    def needs_reference(self) -> bool:
        """See StageTraining."""
        return self.dpo.needs_reference


Item = tuple[int, PreferencePair]  # which of its draws, and a pair
Example = TypeVar("Example")


class Order(Generic[Example]):
    """Which examples an update meets: passes over all of them, each in an order of its own, one after the other.

    Args: batch: examples of an update; draws: of every example, after which the first comes again; None: always new ones.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int, draws: int | None = None):
        self.examples, self.batch, self.seed, self.draws = examples, batch, seed, draws
        self._orders: dict[int, np.ndarray] = {}

    def items(self, step: int) -> list[tuple[int, Example]]:
        """(which draw, example) of the whole batch; it may run over the end of a pass, or hold several where there are few examples."""
        found = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(number, len(self.examples))
            if epoch not in self._orders:
                self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))}
            found.append((epoch % self.draws if self.draws else epoch, self.examples[self._orders[epoch][place]]))
        return found


MARGINS = (
    ("implicit_accuracy", "accuracy", "<5.3f"), ("margin", "margin", "<+9.2e"), ("w_diff", "w_diff", "<+9.2e"),
    ("l_diff", "l_diff", "<+9.2e"),
)  # fmt: skip
ERRORS = (("w_error", "w_error", "<8.4f"), ("l_error", "l_error", "<8.4f"))  # where there is no reference to tell margins by


class Updates(Descent):
    """What a stage's parameters go through on pairs.

    Args: as Descent; pairs: of the stage, checked; reference: None where the loss needs none.
    Raises: ValueError where a batch cannot be divided over ranks and passes.
    """

    def __init__(
        self, pipeline: Pipeline, stage: FlowStage, pairs: Sequence[PreferencePair], config: TrainConfig, policy: torch.nn.Module,
        parameters: Iterable[torch.nn.Parameter], reference: Reference | None, ranks: Ranks,
    ):
        super().__init__(stage, config, policy, parameters, ranks)
        self.pipeline, self.config, self.reference = pipeline, config, reference
        self.columns = ERRORS if config.dpo.kind == "dro" else MARGINS
        size = config.batch_gpu or max(config.batch // ranks.world, 1)
        if config.batch % (ranks.world * size):
            raise ValueError(
                f"train_stage: expected a batch of a multiple of {ranks.world} processes x {size} pairs per pass (batch_gpu), "
                f"got {config.batch}. Change one."
            )
        self.order, self.layout = Order(pairs, config.batch, config.seed, config.draws), Layout(config.batch, ranks, size)

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        """See Descent."""
        return signs(lines, self.config.needs_reference)

    def save(self) -> None:
        """See Descent: the reference's errors, where they are kept."""
        if isinstance(self.reference, CachedErrors):
            self.reference.save()

    def run(self, step: int) -> dict:
        """See Descent: pairs, and bins, the sums of BINNED over time bins, of all ranks; of dro both errors instead.

        Losses of a batch are added up as masses and divided once: of the mean, the mass of a part is its number of pairs, of Dr. DPO its
        sum of exp(-loss / beta). The gradients of parts add up to those of the whole batch either way.
        """
        items, layout = self.order.items(step), self.layout
        gradients, totals = GradientSum(self.parameters, layout.here), torch.zeros(4 + len(BINNED) * TIME_BINS, device=self.device)
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
        """Add the gradients of a part of the batch; returns [4 + len(BINNED) B]: mass, mass times loss, then
        sums of both errors and of what is binned."""
        config, stage, ref = self.config.dpo, self.stage, None
        if self.reference is not None:
            with self.autocast():
                ref = self.reference.errors(stage, draw, [(pair.id, epoch) for pair in pairs])
        with self.autocast():
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
        totals = torch.zeros(4 + len(BINNED) * TIME_BINS, device=self.device)
        totals[:4] = torch.stack([mass, loss.detach(), found.preferred.detach().sum(), found.rejected.detach().sum()])
        if ref is not None:
            stats = pair_stats(found, found.delta(config.loser_weight, config.clamp), draw.t)
            totals[4:] = torch.cat([stats[f"bins/{name}"] for name in BINNED])
        return totals

    def _step(self, step: int, totals: torch.Tensor, items: Sequence[Item]) -> dict:
        """Clip and step; the figures of the update."""
        dpo = self.config.dpo
        seen = "pairs " + ", ".join(pair.id for _, pair in items[:3])
        mass, loss, norm, preferred, rejected, *sums = self.descend(step, totals, seen)
        if dpo.aggregation == "drdpo":  # the whole batch's mass is its loss
            loss = -dpo.drdpo_beta * math.log(mass / len(items))
        bins = dict(zip(BINNED, np.reshape(sums, (-1, TIME_BINS)).tolist(), strict=True)) if self.reference is not None else {}
        figures = {"loss": loss, "grad_norm": norm, "pairs": len(items), "bins": bins}
        return figures | ({"w_error": preferred / len(items), "l_error": rejected / len(items)} if dpo.kind == "dro" else {})
