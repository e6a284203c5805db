"""Train a stage on preference pairs: by DPO and related losses, or by fine-tuning on the preferred samples.

An update computes a batch of pairs in passes, one after the other and in parallel on ranks. The result equals
that of one pass over the whole batch. The warnings about failing trainings come from reports of users of
Diffusion-DPO, flow_grpo (#47, #190), diffusers (#6565) and OPA-DPO (#10). A loss near log 2 is no such sign:
it may look flat while the win rate rises.

Shapes: N samples, V voxels and C channels, as in models/sparse.py; P pairs, B time bins.
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

Item = tuple[int, PreferencePair]  # (epoch, pair)
Example = TypeVar("Example")


class Order(Generic[Example]):
    """Order of the examples: epochs over all of them, each in a random order of its own.

    Args: batch: number of examples of an update; seed: of the orders.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int):
        self.examples = examples
        self.batch = batch
        self.seed = seed
        # the order of the newest epoch alone: updates ask for epochs in ascending order
        self._orders: dict[int, np.ndarray] = {}

    def items(self, step: int) -> list[tuple[int, Example]]:
        """Return (epoch, example) for the whole batch of an update.

        A batch may cross the end of an epoch, or cover several epochs if there are few examples. The result
        depends on `step` alone, so a resumed run meets the same examples.
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


PAIRS = 64  # number of pairs that recent figures are averaged over
SEPARATED = 0.95  # implicit accuracy above which pairs hold little more signal
DIVERGED = 2  # times the first error of the rejected samples, for losses without a reference
HISTORY = 10  # lines that are needed before a value counts as a spike
CALM = "Raise beta or lower lr."


def pair_signs(lines: Sequence[Mapping], preference: bool = True) -> dict[str, str]:
    """Return warnings by name, as of the last line; the caller prints each once.

    Args:
        lines: of stats.jsonl so far: step, pairs, loss, implicit_accuracy, margin, w_diff, l_diff, grad_norm,
            and win_rate where measured.
        preference: False for losses without a reference, whose margins are not measured.
    """
    # lines of evaluations alone have no pairs
    updates = [line for line in lines if line.get("pairs")]
    rates = win_rates(lines)
    signs = win_rate_signs(rates)
    last = updates[-1] if updates else {}
    before = updates[:-1]
    # the norm of the gradient varies more than the loss, so its limit is larger
    for name, times in (("loss", 4), ("grad_norm", 10)) if len(before) >= HISTORY else ():
        usual = median(line[name] for line in before)
        # `> 0` excludes a median of 0, of which every value would be a multiple
        if last[name] > times * usual > 0 and "spikes" not in signs:
            signs["spikes"] = (
                f"step {last['step']}: {name} {last[name]:.3g} is over {times} times its median {usual:.3g}."
                f" {CALM}"
            )
    # only dro logs both errors
    if updates and last.get("l_error", 0) > DIVERGED * updates[0].get("l_error", math.inf):
        signs["divergence"] = (
            f"step {last['step']}: the error of the rejected samples rose from {updates[0]['l_error']:.3g} to"
            f" {last['l_error']:.3g}, and that of the preferred ones is {last['w_error']:.3g} after"
            f" {updates[0]['w_error']:.3g}; this loss has no lower bound. Lower loser_weight or steps."
        )
    return signs | (_margins(updates, rates) if preference and updates else {})


def recent(lines: Sequence[Mapping], name: str) -> float | None:
    """Average a figure over the last lines with PAIRS pairs in all; None if there are fewer pairs."""
    # lines may hold different numbers of pairs, so each is weighted by its own
    values = 0.0  # sum over pairs
    pairs = 0  # number of pairs
    for line in reversed(lines):
        values = values + line[name] * line["pairs"]
        pairs = pairs + line["pairs"]
        if pairs >= PAIRS:
            return values / pairs
    return None


def _margins(lines: Sequence[Mapping], rates: Sequence[tuple[int, float]]) -> dict[str, str]:
    """Return warnings about margins and errors, by name."""
    # None as long as there are fewer than PAIRS pairs
    accuracy, margin, w_diff, l_diff = (
        recent(lines, name) for name in ("implicit_accuracy", "margin", "w_diff", "l_diff")
    )
    if accuracy is None or margin is None or w_diff is None or l_diff is None:
        return {}
    signs = {}
    step = lines[-1]["step"]
    if accuracy > SEPARATED:
        signs["separated"] = (
            f"step {step}: implicit accuracy {accuracy:.3f} is above {SEPARATED}: the pairs are separated,"
            " and further updates over-optimise. " + REGULARISE
        )
        # pairs from another generator can be separated without any change of the generator's own samples
        if len(rates) > 1 and max(abs(rate - rates[0][1]) for _, rate in rates) <= NOTHING:
            signs["no-effect"] = (
                f"step {step}: implicit accuracy {accuracy:.3f}, but the held-out win rate is"
                f" {rates[-1][1]:.3f} after {rates[0][1]:.3f} at the start. The pairs are not what this"
                " generator makes (off-policy): sample pairs from it, or fine-tune on them first."
            )
    # A margin can grow although both errors rise, if the rejected error rises faster. The warning asks for a
    # rise of the preferred error that is lasting and not small beside that of the rejected error.
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
# without a reference there are no margins, so both errors are shown
ERRORS = (("w_error", "w_error", "<8.4f"), ("l_error", "l_error", "<8.4f"))


class Passes(Descent, Generic[Example]):
    """Descent whose batches are computed in passes, one after the other and in parallel on ranks.

    The losses of a batch are summed and divided once by the number of examples, so that the gradients of the
    passes add up to that of the whole batch.
    Args: as Descent; config has batch and batch_gpu; examples: all of them; reference: None if the loss needs
        none.
    Raises: ValueError if a batch cannot be divided over ranks and passes.
    """

    sums = 2  # figures of a pass: number of examples, sum of their losses, then those of the subclass
    what = "examples"  # noun for messages

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
        # by default a rank takes its whole part of the batch in one pass
        size = config.batch_gpu or max(config.batch // ranks.world, 1)
        if config.batch % (ranks.world * size):
            raise ValueError(
                f"train_stage: the batch must be a multiple of {ranks.world} processes x {size} {self.what}"
                f" per pass (batch_gpu), got {config.batch}. Change the batch or batch_gpu."
            )
        self.order = Order(examples, config.batch, config.seed)
        self.layout = Layout(config.batch, ranks, size)

    def run(self, step: int) -> dict:
        """Do one update, see Descent."""
        items = self.order.items(step)
        layout = self.layout
        gradients = GradientSum(self.parameters, layout.here)
        totals = torch.zeros(self.sums, device=self.device)  # summed over passes here, over ranks below
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.train()
        for turn in range(layout.here):
            # the seed of the dropout differs for every part of the batch, on every rank
            for epoch, examples in self._draws(items, turn):
                seed = derive_seed(
                    self.training.seed, "dropout", step, self.ranks.rank + turn * self.ranks.world, epoch
                )
                totals += self.backward(examples, epoch, seed)
            gradients.end_round()
        gradients.finish()
        # FSDP has summed the gradients of sharded parameters already
        sum_over_ranks(self.ranks, [p for p in self.parameters if not sharded(p)], [totals])
        return self.figures(step, totals, items)

    def _draws(self, items: Sequence[tuple[int, Example]], turn: int) -> list[tuple[int, list[Example]]]:
        """Return this rank's examples of a turn, grouped by epoch.

        There is more than one group where a batch crosses the end of an epoch. With sharded networks every
        rank must do the same number of backward passes: a rank with fewer groups divides its largest one.
        """
        world = self.ranks.world
        first = turn * self.ranks.world
        # all ranks' examples of this turn; interleaved, as Layout deals them out
        rows = [items[first + rank :: self.layout.total] for rank in range(world)]
        draws: dict[int, list[Example]] = {}  # epoch -> examples
        for epoch, example in sorted(rows[self.ranks.rank], key=lambda item: item[0]):
            draws.setdefault(epoch, []).append(example)
        parts = [*draws.items()]
        # largest number of groups on any rank; without sharding, ranks need not agree
        most = (
            max(len({epoch for epoch, _ in of_rank}) for of_rank in rows)
            if sharded(self.parameters[0])
            else 0
        )
        while len(parts) < most:
            # parameters are gathered and gradients summed by all ranks together, once a pass
            epoch, largest = parts.pop(max(range(len(parts)), key=lambda place: len(parts[place][1])))
            parts += [(epoch, largest[: len(largest) // 2]), (epoch, largest[len(largest) // 2 :])]
        return parts

    @abstractmethod
    def backward(self, examples: Sequence[Example], epoch: int, dropout: int) -> torch.Tensor:
        """Compute and add the gradients of a part of the batch, and return its figures [sums].

        Args: dropout: seed of torch's global generator in the pass.
        """

    @abstractmethod
    def figures(self, step: int, totals: torch.Tensor, items: Sequence[tuple[int, Example]]) -> dict:
        """Do the optimiser's step, and return the figures of the update."""


class Updates(Passes[PreferencePair]):
    """Descent on preference pairs.

    Args: as Passes; unseen: pairs to evaluate on, which are not trained on.
    """

    # number of pairs, loss, preferred error, rejected error, then BINNED x TIME_BINS
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
        """Measure accuracy and margin on pairs that are not trained on."""
        # a loss without a reference is evaluated against the untuned network
        return (
            {}
            if self.unseen is None
            else self.unseen.figures(
                self.policy, self.reference or FrozenModel(shared_copy(self.stage.model))
            )
        )

    def backward(self, examples: Sequence[PreferencePair], epoch: int, dropout: int) -> torch.Tensor:
        draw = self._draw(examples, epoch)
        # after sampling: it must not depend on how many random numbers the dropout takes
        torch.manual_seed(dropout)
        return self._pass(draw)

    def _draw(self, pairs: Sequence[PreferencePair], epoch: int) -> PairDraw:
        """Sample times and noises of pairs; for fine-tuning, keep the preferred samples alone."""
        config = self.config
        cond = self.conditioned.conditions([pair.condition for pair in pairs])
        no_cond = self.conditioned.no_condition(len(pairs)) if config.dpo.condition_dropout else None
        draw = draw_pairs(self.stage, pairs, cond, no_cond, config.dpo, config.seed, epoch, self.device)
        if config.dpo.kind != "sft":
            return draw
        count = len(pairs)
        # sparse samples have different lengths, so a batch cannot be sliced: it is separated and collated
        x_0, eps, x_t = (collate(separate(batch)[:count]) for batch in (draw.x_0, draw.eps, draw.x_t))
        return replace(
            draw, x_0=x_0, eps=eps, x_t=x_t, t=draw.t[:count], cond=each(lambda c: c[:count], draw.cond)
        )

    def _pass(self, draw: PairDraw) -> torch.Tensor:
        """Compute and add the gradients of sampled pairs, and return their figures; see `sums`."""
        config = self.config.dpo
        stage = self.stage
        # before the policy's pass, so that its activations do not have to be kept meanwhile
        ref = None
        if self.reference is not None:
            ref = self.reference.errors(stage, draw)
        # [2P], or [P] for fine-tuning
        v = stage.velocity(draw.x_t, draw.t, draw.cond, self.policy)
        errors = stage.path.errors(single(v), draw.x_0, draw.eps)
        sft = config.kind == "sft"
        # fine-tuning has no rejected samples; zeros keep the figures in one layout
        pair_errors = (
            PairErrors(preferred=errors, rejected=torch.zeros_like(errors))
            if sft
            else PairErrors.split(errors, ref)
        )
        losses = pair_loss(pair_errors, config, draw.weight)
        mass = losses.new_tensor(float(len(losses)))
        # the sum over the pairs; `descend` divides by the mass of the whole batch
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
        """Do the step, and return its figures: "bins" holds the sums of BINNED over time bins.

        They are sums over all ranks. For dro both mean errors take the place of the margins.
        """
        dpo = self.config.dpo
        # three ids are enough to find the batch of an error
        seen = "pairs " + ", ".join(pair.id for _, pair in items[:3])
        _, loss, norm, preferred, rejected, *sums = self.descend(step, totals, seen)
        # [len(BINNED) * TIME_BINS] -> one row for each figure
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
    """Hash the latents and columns of pairs."""
    # part of training_options.json: a run cannot be resumed with other pairs
    latents = {f"{p.id}/{side}": getattr(p, side) for p in pairs for side in ("preferred", "rejected")}
    return latents_checksum(latents, [[p.id, p.condition, p.source, p.w2] for p in pairs])


def latents_checksum(latents: Mapping[str, Latent], columns: list[list]) -> str:
    """Hash latents by name, and their columns (ids, prompts, labels)."""
    # sparse and named latents have several tensors; each is hashed under its own key
    return checksum(
        {
            f"{name}/{key}": value
            for name, latent in latents.items()
            for key, value in parts_of(latent).items()
        },
        columns,
    )


UNBOUNDED = (
    "dro has no lower bound and no reference: the error of the rejected samples may grow without end, and"
    " the network diverge. Use --loser-weight below 1, a held-out evaluator, or few updates."
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
    """Train a copy of a stage's network on pairs. The stage's own network is unchanged and is the reference.

    Args:
        pairs: of that stage. unseen: pairs of prompts that are not trained on: accuracy and margin on them
            are logged at every evaluation, and without `held_out` the parameters with the best accuracy are
            kept. Without either of them the last parameters are kept.
        out: folder for everything written, see trainer.py; ranks, say, common: see trainer.train.
    Raises: ValueError, before anything is written, for no pairs, pairs of another stage, ids that occur
        twice, latents that the stage cannot have, and a network with the opposite convention of time;
        ValueError for settings or folders that do not fit, and losses that are not finite; StoppedError after
        a signal.
    """
    stage = conditioned.stage
    check_pairs(conditioned, pairs)
    if unseen:
        check_pairs(conditioned, unseen)
    # the same seed, but other times and noises than in training
    accuracy = PairAccuracy(conditioned, unseen, seed=config.seed) if unseen else None
    if config.dpo.kind == "dro":
        say(f"Warning: {UNBOUNDED}")

    def part(n: int) -> Start:
        """Make the `start` of a memory estimate, whose update has n pairs."""
        estimated = replace(config, batch=n, batch_gpu=None)
        return lambda fake_stage, policy, reference: Updates(
            replace(conditioned, stage=fake_stage), pairs, estimated, policy, reference, SINGLE
        )

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> Descent:
        size, again = fit_passes(
            stage, config, config.batch_gpu or max(config.batch // ranks.world, 1), part, ranks, say
        )
        recomputing(policy, again)
        # the size of a pass is not in the recorded options, so another device may choose another one
        sized = replace(config, batch_gpu=config.batch_gpu or size)
        return Updates(conditioned, pairs, sized, policy, reference, run.ranks, unseen=accuracy)

    # rank 0 hashes, since large sets take time; the other ranks receive the result
    hashed = {"pairs": pairs, "unseen": unseen} if unseen else {"pairs": pairs}
    origin = (
        {"base": stage.hash, **{name: pairs_checksum(of) for name, of in hashed.items()}}
        if ranks.main
        else None
    )
    known = ranks.broadcast(origin)
    return train(stage, config, known, start, Path(out), ranks=ranks, say=say, shards=True, **common)


def check_pairs(conditioned: ConditionedStage, pairs: Sequence[PreferencePair]) -> None:
    """Raise ValueError for pairs that cannot be trained on; see train_stage."""
    stage = conditioned.stage
    who = f"train_stage({stage.name})"
    if not pairs:
        raise ValueError(f"{who}: expected preference pairs, got none. Make or label some.")
    check_unique(who, pairs)
    # before anything is written: a wrong pair would otherwise be met in the middle of a run
    for pair in pairs:
        if pair.stage != stage.name:
            raise ValueError(
                f"{who}: expected pairs of this stage, got {pair.id!r} of {pair.stage!r}. Train that"
                " stage on it."
            )
        for side in ("preferred", "rejected"):
            stage.check(f"{who}, pair {pair.id!r}, {side}", getattr(pair, side))
    device = next(stage.model.parameters()).device
    # a few pairs are enough: the convention of time is a property of the network
    some = pairs[:8]
    cond = to_device(conditioned.conditions([pair.condition for pair in some]), device)
    check_convention(stage, collate([pair.preferred for pair in some]).to(device), cond)
