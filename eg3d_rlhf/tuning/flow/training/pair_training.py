"""Train a stage on preference pairs: DPO and its relatives, fine-tuning on the preferred ones.

An update takes a batch of pairs in passes, in turn and side by side on ranks, equal to one pass over the
whole batch. Known signs that a training goes wrong come from threads of users of Diffusion-DPO, flow_grpo
(#47, #190), diffusers (#6565) and OPA-DPO (#10). A loss near log 2 is none of them: it may look flat while
the win rate rises.

Shape letters as in sparse.py; P pairs, B time bins.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.policies import shared_copy
from eg3d_rlhf.models.sparse import Latent, collate, parts_of, separate, single
from eg3d_rlhf.tuning.flow.base.conditioning import each, to_device
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, check_unique
from eg3d_rlhf.tuning.flow.base.stage import check_convention
from eg3d_rlhf.tuning.flow.training.accuracy import PairAccuracy
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.dpo import (
    BINNED,
    TIME_BINS,
    PairDraw,
    PairErrors,
    draw_pairs,
    pair_loss,
    pair_stats,
)
from eg3d_rlhf.tuning.flow.training.memory_estimate import Start, fit_passes
from eg3d_rlhf.tuning.flow.training.reference import FrozenModel
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.training.sharding import sharded
from eg3d_rlhf.tuning.flow.training.trainer import (
    NOTHING,
    REGULARISE,
    Descent,
    StageResult,
    recomputing,
    train,
    win_rate_signs,
    win_rates,
)
from training.distributed import SINGLE, Ranks
from training.phases import GradientSum, Layout, derive_seed, sum_over_ranks
from training.storage import checksum

Item = tuple[int, PreferencePair]  # the pass over the pairs, and one of them
Example = TypeVar("Example")


class Order(Generic[Example]):
    """Which examples an update meets: passes over all of them, each in an order of its own, one after the
    other.

    Args: batch: examples of an update.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int):
        self.examples = examples
        self.batch = batch
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def items(self, step: int) -> list[tuple[int, Example]]:
        """(which pass, example) of the whole batch; it may run over the end of a pass, or hold several where
        there are few examples.
        """
        items = []
        for number in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(number, len(self.examples))
            if epoch not in self._orders:
                self._orders = {
                    epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
                }
            items.append((epoch, self.examples[self._orders[epoch][place]]))
        return items


PAIRS = 64  # that the latest figures are taken over
SEPARATED = 0.95  # implicit accuracy above which pairs are told apart too well to teach more
DIVERGED = 2  # times the rejected ones' error at the start, where no reference holds it
HISTORY = 10  # lines before spikes can be told from usual ones
CALM = "Raise beta or lower lr."


def pair_signs(lines: Sequence[Mapping], preference: bool = True) -> dict[str, str]:
    """Warnings by name, as of the last line; the caller says each once.

    Args:
        lines: of stats.jsonl so far: step, pairs, loss, implicit_accuracy, margin, w_diff, l_diff, grad_norm,
            and win_rate where measured.
        preference: False for plain fine-tuning on the preferred ones, where telling pairs apart means
            nothing.
    """
    updates = [line for line in lines if line.get("pairs")]
    rates = win_rates(lines)
    signs = win_rate_signs(rates)
    last = updates[-1] if updates else {}
    before = updates[:-1]
    for name, times in (("loss", 4), ("grad_norm", 10)) if len(before) >= HISTORY else ():
        usual = median(line[name] for line in before)
        if last[name] > times * usual > 0 and "spikes" not in signs:
            signs["spikes"] = (
                f"step {last['step']}: {name} {last[name]:.3g} is over {times} times its median {usual:.3g}."
                f" {CALM}"
            )
    if updates and last.get("l_error", 0) > DIVERGED * updates[0].get("l_error", math.inf):
        signs["divergence"] = (
            f"step {last['step']}: the rejected ones' error is {last['l_error']:.3g} after"
            f" {updates[0]['l_error']:.3g}, and that of the preferred {last['w_error']:.3g} after"
            f" {updates[0]['w_error']:.3g}; this loss has no lower bound. Lower loser_weight or steps."
        )
    return signs | (_margins(updates, rates) if preference and updates else {})


def recent(lines: Sequence[Mapping], name: str) -> float | None:
    """Mean of a figure over the last lines that hold PAIRS pairs; None before there are as many."""
    values = 0.0
    pairs = 0
    for line in reversed(lines):
        values = values + line[name] * line["pairs"]
        pairs = pairs + line["pairs"]
        if pairs >= PAIRS:
            return values / pairs
    return None


def _margins(lines: Sequence[Mapping], rates: Sequence[tuple[int, float]]) -> dict[str, str]:
    accuracy, margin, w_diff, l_diff = (
        recent(lines, name) for name in ("implicit_accuracy", "margin", "w_diff", "l_diff")
    )
    if accuracy is None or margin is None or w_diff is None or l_diff is None:
        return {}
    signs = {}
    step = lines[-1]["step"]
    if accuracy > SEPARATED:
        signs["separated"] = (
            f"step {step}: implicit accuracy {accuracy:.3f} is above {SEPARATED}; the pairs are separated;"
            " more of it over-optimises. " + REGULARISE
        )
        if len(rates) > 1 and max(abs(rate - rates[0][1]) for _, rate in rates) <= NOTHING:
            signs["no-effect"] = (
                f"step {step}: implicit accuracy {accuracy:.3f}, but the held-out win rate is"
                f" {rates[-1][1]:.3f} after {rates[0][1]:.3f} at the start. The pairs are not what this"
                " generator makes (off-policy): sample pairs from it, or fine-tune on them first."
            )
    earlier = mean(line["margin"] for line in lines[: max(1, len(lines) // 2)])
    if (
        w_diff > 0.1 * l_diff
        and w_diff > 0
        and margin > max(0.0, earlier)
        and all(x["w_diff"] > 0 for x in lines[-3:])
    ):
        signs["preferred-worse"] = (
            f"step {step}: the margin grows while the error of the preferred ones is {w_diff:.3g} above the"
            f" reference's; this is likelihood displacement. {REGULARISE}"
        )
    return signs


MARGINS = (
    ("implicit_accuracy", "accuracy", "<5.3f"),
    ("margin", "margin", "<+9.2e"),
    ("w_diff", "w_diff", "<+9.2e"),
    ("l_diff", "l_diff", "<+9.2e"),
)
# where there is no reference to tell margins by
ERRORS = (("w_error", "w_error", "<8.4f"), ("l_error", "l_error", "<8.4f"))


class Passes(Descent, Generic[Example]):
    """Updates on examples, whose batch is taken in passes, in turn and side by side on ranks.

    Losses of a batch are added up and divided once, by its number of examples: the gradients of parts add up
    to the whole batch's.
    Args: as Descent; config has batch and batch_gpu; examples: all of them; reference: None where the loss
        needs none.
    Raises: ValueError where a batch cannot be divided over ranks and passes.
    """

    sums = 2  # figures of a pass: how many examples, the sum of their losses, then the training's own
    what = "examples"

    def __init__(
        self,
        conditioned: ConditionedStage,
        examples: Sequence[Example],
        config: Any,
        policy: torch.nn.Module,
        reference: FrozenModel | None,
        ranks: Ranks,
    ):
        super().__init__(conditioned.stage, config, policy, ranks)
        self.conditioned = conditioned
        self.config = config
        self.reference = reference
        size = config.batch_gpu or max(config.batch // ranks.world, 1)
        if config.batch % (ranks.world * size):
            raise ValueError(
                f"train_stage: expected a batch of a multiple of {ranks.world} processes x {size} {self.what}"
                f" per pass (batch_gpu), got {config.batch}. Change one."
            )
        self.order = Order(examples, config.batch, config.seed)
        self.layout = Layout(config.batch, ranks, size)

    def run(self, step: int) -> dict:
        """See Descent."""
        items = self.order.items(step)
        layout = self.layout
        gradients = GradientSum(self.parameters, layout.here)
        totals = torch.zeros(self.sums, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.train()
        for turn in range(layout.here):
            for epoch, examples in self._draws(items, turn):
                seed = derive_seed(
                    self.training.seed, "dropout", step, self.ranks.rank + turn * self.ranks.world, epoch
                )
                totals += self.backward(examples, epoch, seed)
            gradients.end_round()
        gradients.finish()
        # those that are, were summed
        sum_over_ranks(self.ranks, [p for p in self.parameters if not sharded(p)], [totals])
        return self.figures(step, totals, items)

    def _draws(self, items: Sequence[tuple[int, Example]], turn: int) -> list[tuple[int, list[Example]]]:
        """This rank's part of a turn by the pass over the examples: two draws where a batch runs over the end
        of a pass.

        Sharded networks need as many on every rank: one that has fewer takes its largest in halves.
        """
        world = self.ranks.world
        first = turn * self.ranks.world
        rows = [items[first + rank :: self.layout.total] for rank in range(world)]
        draws: dict[int, list[Example]] = {}
        for epoch, example in sorted(rows[self.ranks.rank], key=lambda item: item[0]):
            draws.setdefault(epoch, []).append(example)
        parts = [*draws.items()]
        most = (
            max(len({epoch for epoch, _ in of_rank}) for of_rank in rows)
            if sharded(self.parameters[0])
            else 0
        )
        while len(parts) < most:
            epoch, largest = parts.pop(max(range(len(parts)), key=lambda place: len(parts[place][1])))
            parts += [(epoch, largest[: len(largest) // 2]), (epoch, largest[len(largest) // 2 :])]
        return parts

    @abstractmethod
    def backward(self, examples: Sequence[Example], epoch: int, dropout: int) -> torch.Tensor:
        """Add the gradients of a part of the batch; returns its [sums].

        Args: dropout: seed of torch's generator in the pass.
        """

    @abstractmethod
    def figures(self, step: int, totals: torch.Tensor, items: Sequence[tuple[int, Example]]) -> dict:
        """Clip and step; the figures of the update."""


class Updates(Passes[PreferencePair]):
    """What a stage's parameters go through on pairs.

    Args: as Passes; unseen: pairs to evaluate on.
    """

    # also both errors, and what is binned
    sums = 4 + len(BINNED) * TIME_BINS
    what = "pairs"

    def __init__(self, *common: Any, unseen: PairAccuracy | None = None):
        super().__init__(*common)
        self.unseen = unseen
        self.evaluates = unseen is not None
        self.columns = ERRORS if self.config.dpo.kind == "dro" else MARGINS

    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        return pair_signs(lines, self.config.needs_reference)

    def evaluate(self) -> dict[str, float]:
        """Accuracy and margin on pairs that are not trained on."""
        return (
            {}
            if self.unseen is None
            else self.unseen.figures(
                self.policy, self.reference or FrozenModel(shared_copy(self.stage.model))
            )
        )

    def backward(self, examples: Sequence[PreferencePair], epoch: int, dropout: int) -> torch.Tensor:
        draw = self._draw(examples, epoch)
        torch.manual_seed(dropout)
        return self._pass(draw)

    def _draw(self, pairs: Sequence[PreferencePair], epoch: int) -> PairDraw:
        config = self.config
        cond = self.conditioned.conditions([pair.condition for pair in pairs])
        no_cond = self.conditioned.no_condition(len(pairs)) if config.dpo.condition_dropout else None
        draw = draw_pairs(self.stage, pairs, cond, no_cond, config.dpo, config.seed, epoch, self.device)
        if config.dpo.kind != "sft":
            return draw
        count = len(pairs)  # the preferred ones alone
        x_0, eps, x_t = (collate(separate(batch)[:count]) for batch in (draw.x_0, draw.eps, draw.x_t))
        return replace(
            draw, x_0=x_0, eps=eps, x_t=x_t, t=draw.t[:count], cond=each(lambda c: c[:count], draw.cond)
        )

    def _pass(self, draw: PairDraw) -> torch.Tensor:
        """Add the gradients of a part of the batch; see `sums`."""
        config = self.config.dpo
        stage = self.stage
        ref = None
        if self.reference is not None:
            ref = self.reference.errors(stage, draw)
        v = stage.velocity(draw.x_t, draw.t, draw.cond, self.policy)
        errors = stage.path.errors(single(v), draw.x_0, draw.eps)
        sft = config.kind == "sft"
        pair_errors = (
            PairErrors(preferred=errors, rejected=torch.zeros_like(errors))
            if sft
            else PairErrors.split(errors, ref)
        )
        losses = pair_loss(pair_errors, config, draw.weight)
        mass = losses.new_tensor(float(len(losses)))
        loss = mass * losses.mean()
        loss.backward()
        totals = torch.zeros(self.sums, device=self.device)
        totals[:4] = torch.stack(
            [mass, loss.detach(), pair_errors.preferred.detach().sum(), pair_errors.rejected.detach().sum()]
        )
        if ref is not None:
            stats = pair_stats(pair_errors, pair_errors.delta(config.loser_weight), draw.t)
            totals[4:] = torch.cat([stats[name] for name in BINNED])
        return totals

    def figures(self, step: int, totals: torch.Tensor, items: Sequence[Item]) -> dict:
        """Pairs, and bins, the sums of BINNED over time bins, of all ranks; of dro both errors instead."""
        dpo = self.config.dpo
        seen = "pairs " + ", ".join(pair.id for _, pair in items[:3])
        _, loss, norm, preferred, rejected, *sums = self.descend(step, totals, seen)
        bins = (
            dict(zip(BINNED, np.reshape(sums, (-1, TIME_BINS)).tolist(), strict=True))
            if self.reference is not None
            else {}
        )
        figures = {"loss": loss, "grad_norm": norm, "pairs": len(items), "bins": bins}
        return figures | (
            {"w_error": preferred / len(items), "l_error": rejected / len(items)} if dpo.kind == "dro" else {}
        )


def pairs_checksum(pairs: Sequence[PreferencePair]) -> str:
    """Hash of pairs' latents and columns."""
    latents = {f"{p.id}/{side}": getattr(p, side) for p in pairs for side in ("preferred", "rejected")}
    return latents_checksum(latents, [[p.id, p.condition, p.source, p.w2] for p in pairs])


def latents_checksum(latents: Mapping[str, Latent], columns: list[list]) -> str:
    """Hash of latents by name, and of what is known of them."""
    return checksum(
        {
            f"{name}/{key}": value
            for name, latent in latents.items()
            for key, value in parts_of(latent).items()
        },
        columns,
    )


UNBOUNDED = (
    "dro has no lower bound and no reference: the rejected ones' error may grow without end, and the network"
    " with it. Give --loser-weight below 1, a held-out judge or few updates."
)


def train_stage(
    conditioned: ConditionedStage,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    out: Path,
    *,
    unseen: Sequence[PreferencePair] = (),
    ranks: Ranks = SINGLE,
    say: Callable[[str], None] = print,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on pairs; the stage's own is left as it is, and is the reference.

    Args:
        pairs: of that stage. unseen: pairs of conditions that are not trained on: accuracy and margin on them
            are logged at every evaluation, and without `held_out` the parameters with the best accuracy are
            kept. Without either the last ones are.
        out: folder for everything written, see trainer.py; ranks, say, common: see trainer.train.
    Raises: ValueError, before anything is written, for no pairs, pairs of another stage, ids that occur
        twice, latents that the stage cannot have, and a network whose data lie at the other end of time; for
        settings or folders that do not fit, and losses that are not finite; StoppedError after a signal.
    """
    stage = conditioned.stage
    check_pairs(conditioned, pairs)
    if unseen:
        check_pairs(conditioned, unseen)
    accuracy = PairAccuracy(conditioned, unseen, seed=config.seed) if unseen else None
    if config.dpo.kind == "dro":
        say(f"Warning: {UNBOUNDED}")

    def part(n: int) -> Start:
        own = replace(config, batch=n, batch_gpu=None)
        return lambda of, policy, reference: Updates(
            replace(conditioned, stage=of), pairs, own, policy, reference, SINGLE
        )

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> Descent:
        size, again = fit_passes(
            stage, config, config.batch_gpu or max(config.batch // ranks.world, 1), part, ranks, say
        )
        recomputing(policy, again)
        own = replace(config, batch_gpu=config.batch_gpu or size)
        return Updates(conditioned, pairs, own, policy, reference, run.ranks, unseen=accuracy)

    hashed = {"pairs": pairs, "unseen": unseen} if unseen else {"pairs": pairs}
    origin = (
        {"base": stage.hash, **{name: pairs_checksum(of) for name, of in hashed.items()}}
        if ranks.main
        else None
    )
    known = ranks.broadcast(origin)
    return train(stage, config, known, start, Path(out), ranks=ranks, say=say, shards=True, **common)


def check_pairs(conditioned: ConditionedStage, pairs: Sequence[PreferencePair]) -> None:
    """Raise ValueError for what cannot be trained on; see train_stage."""
    stage = conditioned.stage
    who = f"train_stage({stage.name})"
    if not pairs:
        raise ValueError(f"{who}: expected pairs to learn from, got none. Make or label some.")
    check_unique(who, pairs)
    for pair in pairs:
        if pair.stage != stage.name:
            raise ValueError(
                f"{who}: expected pairs of this stage, got {pair.id!r} of {pair.stage!r}. Train that stage"
                " on it."
            )
        for side in ("preferred", "rejected"):
            stage.check(f"{who}, pair {pair.id!r}, {side}", getattr(pair, side))
    device = next(stage.model.parameters()).device
    some = pairs[:8]
    cond = to_device(conditioned.conditions([pair.condition for pair in some]), device)
    check_convention(stage, collate([pair.preferred for pair in some]).to(device), cond)
