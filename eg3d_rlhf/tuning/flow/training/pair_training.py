"""Train a stage on preference pairs: by DPO and related losses, or by fine-tuning on the preferred samples.

An update computes a batch of pairs in passes, one after the other on a rank and in parallel on ranks. The
result equals the result of one pass over the whole batch. The warnings about failing trainings are based on
the issues that users reported for Diffusion-DPO, flow_grpo (#47, #190), diffusers (#6565) and OPA-DPO (#10).
A loss near log 2 gives no warning: the loss may look constant while the win rate rises.

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
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from eg3d_rlhf.tuning.flow.training.sharding import sharded
from eg3d_rlhf.tuning.flow.training.trainer import (
    RATE_NOISE,
    Descent,
    StageResult,
    set_recompute,
    train,
    win_rate_signs,
    win_rates,
)
from training.distributed import SINGLE, Ranks
from training.phases import GradientSum, Layout, derive_seed, sum_over_ranks
from training.storage import checksum

Item = tuple[int, PreferencePair]  # (number of the epoch, pair)
Example = TypeVar("Example")


class Order(Generic[Example]):
    """Order in which examples are trained on: epochs over all examples, each in its own random order.

    Args:
        examples: all examples.
        batch: number of examples in an update.
        seed: seed of the random orders.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int):
        self.examples = examples
        self.batch = batch
        self.seed = seed
        # only the order of the newest epoch is cached, since updates need epochs in ascending order
        self._orders: dict[int, np.ndarray] = {}

    def items(self, step: int) -> list[tuple[int, Example]]:
        """Return (number of the epoch, example) for each example in the batch of update number `step`.

        A batch may cross the end of an epoch, or cover several epochs if there are few examples. The result
        depends on `step` alone, so a resumed run trains on the same examples.
        """
        batch_items = []
        for example_number in range(step * self.batch, (step + 1) * self.batch):
            epoch, position_in_epoch = divmod(example_number, len(self.examples))
            if epoch not in self._orders:
                self._orders = {
                    epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
                }
            batch_items.append((epoch, self.examples[self._orders[epoch][position_in_epoch]]))
        return batch_items


PAIRS = 64  # number of most recent pairs over which metrics are averaged
SEPARATED = 0.95  # implicit accuracy above which the pairs contain little further signal
# factor by which the error of the rejected samples may exceed its first value, for losses without a reference
DIVERGED = 2
HISTORY = 10  # number of earlier lines that are needed before a value can count as a spike
CALM = "Raise beta or lower lr."


def pair_signs(
    lines: Sequence[Mapping],
    preference: bool = True,
    dpo: DpoConfig = DpoConfig(),  # noqa: B008 (frozen)
) -> dict[str, str]:
    """Return the warnings that the lines of stats.jsonl so far give reason for, by name.

    The caller prints each warning once.

    Args:
        lines: lines of stats.jsonl so far, with step, pairs, loss, implicit_accuracy, margin, w_diff, l_diff,
            grad_norm, and win_rate if it was measured.
        preference: whether margins are measured; False for losses without a reference.
        dpo: settings of the loss, which the warnings advise to change.
    """
    # lines of evaluations alone have no pairs
    update_lines = [line for line in lines if line.get("pairs")]
    rates = win_rates(lines)
    signs = win_rate_signs(rates, dpo.remedy)
    last_update_line = update_lines[-1] if update_lines else {}
    earlier_lines = update_lines[:-1]
    # the norm of the gradient varies more than the loss, so its limit is larger
    spike_limits = (("loss", 4), ("grad_norm", 10)) if len(earlier_lines) >= HISTORY else ()
    for name, factor in spike_limits:
        median_value = median(line[name] for line in earlier_lines)
        # `> 0` excludes a median of 0, of which every value would be a multiple
        if last_update_line[name] > factor * median_value > 0 and "spikes" not in signs:
            signs["spikes"] = (
                f"step {last_update_line['step']}: {name} {last_update_line[name]:.3g} is over {factor} times"
                f" its median {median_value:.3g}. {CALM}"
            )
    # only the loss dro logs the errors themselves; inf makes the comparison false for the other losses
    if update_lines and last_update_line.get("l_error", 0) > DIVERGED * update_lines[0].get(
        "l_error", math.inf
    ):
        signs["divergence"] = (
            f"step {last_update_line['step']}: the error of the rejected samples rose from"
            f" {update_lines[0]['l_error']:.3g} to {last_update_line['l_error']:.3g}, and the error of the"
            f" preferred samples is {last_update_line['w_error']:.3g} after"
            f" {update_lines[0]['w_error']:.3g}. This loss has no lower bound. Lower loser_weight or steps."
        )
    return signs | (_margins(update_lines, rates, dpo.remedy) if preference and update_lines else {})


def recent(lines: Sequence[Mapping], name: str) -> float | None:
    """Average a metric over the last lines that together have at least PAIRS pairs.

    Return None if all lines together have fewer pairs.
    """
    # lines may hold different numbers of pairs, so each is weighted by its own
    value_sum = 0.0
    pair_count = 0
    for line in reversed(lines):
        value_sum = value_sum + line[name] * line["pairs"]
        pair_count = pair_count + line["pairs"]
        if pair_count >= PAIRS:
            return value_sum / pair_count
    return None


def _margins(lines: Sequence[Mapping], rates: Sequence[tuple[int, float]], remedy: str) -> dict[str, str]:
    """Return warnings about margins and errors, by name.

    Args:
        lines: lines of stats.jsonl that summarise updates.
        rates: (number of the update, win rate) of all evaluations.
        remedy: sentence that says which settings to change.
    """
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
            f" and further updates over-optimise. {remedy}"
        )
        # pairs from another generator can be separated without any change of the generator's own samples
        if len(rates) > 1 and max(abs(rate - rates[0][1]) for _, rate in rates) <= RATE_NOISE:
            signs["no-effect"] = (
                f"step {step}: implicit accuracy {accuracy:.3f}, but the held-out win rate is"
                f" {rates[-1][1]:.3f} after {rates[0][1]:.3f} at the start. The pairs do not"
                " come from this generator (off-policy). Sample pairs from it, or fine-tune on them first."
            )
    # A margin can grow although both errors rise, if the rejected error rises faster. The warning is given
    # only if the rise of the preferred error is lasting, and not small against the rise of the rejected
    # error.
    # mean margin over the first half of the lines, at least one
    early_margin = mean(line["margin"] for line in lines[: max(1, len(lines) // 2)])
    if (
        w_diff > 0.1 * l_diff
        and w_diff > 0
        and margin > max(0.0, early_margin)
        and all(line["w_diff"] > 0 for line in lines[-3:])
    ):
        signs["preferred-worse"] = (
            f"step {step}: the margin grows while the error of the preferred samples is {w_diff:.3g} above"
            f" the reference's; this is likelihood displacement. {remedy}"
        )
    return signs


# columns of the status line: (name of the metric, title, format)
MARGINS = (
    ("implicit_accuracy", "accuracy", "<5.3f"),
    ("margin", "margin", "<+9.2e"),
    ("w_diff", "w_diff", "<+9.2e"),
    ("l_diff", "l_diff", "<+9.2e"),
)
# losses without a reference have no margins, so the errors themselves are printed
ERRORS = (("w_error", "w_error", "<8.4f"), ("l_error", "l_error", "<8.4f"))


class Passes(Descent, Generic[Example]):
    """Objective whose batches are computed in passes, one after the other on a rank, in parallel on ranks.

    The losses of a batch are summed and divided once by the number of examples, so that the gradients of the
    passes add up to the gradient of the whole batch.

    Args:
        conditioned_stage: stage whose network is trained.
        examples: all examples of the training.
        config: settings of the training, with batch and batch_gpu.
        policy: network in training.
        reference: reference network; None if the loss needs none.
        ranks: this process among the processes that train together.

    Raises: ValueError if a batch cannot be divided over ranks and passes.
    """

    # number of sums that a pass returns: number of examples, sum of their losses, then those of the subclass
    sums = 2
    what = "examples"  # noun for messages

    def __init__(
        self,
        conditioned_stage: ConditionedStage,
        examples: Sequence[Example],
        config: Any,
        policy: torch.nn.Module,
        reference: FrozenModel | None,
        ranks: Ranks,
    ):
        super().__init__(conditioned_stage.stage, config, policy, ranks)
        self.conditioned_stage = conditioned_stage
        self.config = config
        self.reference = reference
        # by default a rank computes its whole part of the batch in one pass
        pass_size = config.batch_gpu or max(config.batch // ranks.world, 1)
        if config.batch % (ranks.world * pass_size):
            raise ValueError(
                f"train_stage: the batch must be a multiple of {ranks.world} processes x {pass_size}"
                f" {self.what} per pass (batch_gpu), got {config.batch}. Choose another --batch, or set"
                " batch_gpu to a number that divides it."
            )
        self.order = Order(examples, config.batch, config.seed)
        self.layout = Layout(config.batch, ranks, pass_size)

    def run(self, step: int) -> dict:
        """Do one update, see Descent."""
        batch_items = self.order.items(step)
        layout = self.layout
        gradients = GradientSum(self.parameters, layout.rounds_per_rank)
        totals = torch.zeros(self.sums, device=self.device)  # summed over passes here, over ranks below
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.train()
        # a round is one pass on every rank
        for round_number in range(layout.rounds_per_rank):
            # the seed of the dropout differs for every part of the batch, on every rank
            for epoch, examples in self._draws(batch_items, round_number):
                dropout_seed = derive_seed(
                    self.training.seed,
                    "dropout",
                    step,
                    self.ranks.rank + round_number * self.ranks.world,
                    epoch,
                )
                totals += self.backward(examples, epoch, dropout_seed)
            gradients.end_round()
        gradients.finish()
        # FSDP has summed the gradients of sharded parameters already
        sum_over_ranks(self.ranks, [p for p in self.parameters if not sharded(p)], [totals])
        return self.finish_update(step, totals, batch_items)

    def _draws(
        self, batch_items: Sequence[tuple[int, Example]], round_number: int
    ) -> list[tuple[int, list[Example]]]:
        """Return this rank's examples of a round, grouped by epoch: (number of the epoch, its examples).

        There is more than one group if a batch crosses the end of an epoch. With sharded networks every
        rank must do the same number of backward passes: a rank with fewer groups divides its largest one.

        Args:
            batch_items: (number of the epoch, example) for the whole batch.
            round_number: number of the round, which is one pass on every rank, counted from 0.
        """
        world = self.ranks.world
        first_index = round_number * self.ranks.world
        # the examples of each rank in this round; ranks take the items of a batch alternately, see Layout
        items_of_ranks = [batch_items[first_index + rank :: self.layout.total] for rank in range(world)]
        examples_by_epoch: dict[int, list[Example]] = {}  # epoch -> examples
        for epoch, example in sorted(items_of_ranks[self.ranks.rank], key=lambda item: item[0]):
            examples_by_epoch.setdefault(epoch, []).append(example)
        # in ascending order of the epochs, since dictionaries keep the order of insertion
        epoch_groups = [*examples_by_epoch.items()]
        # largest number of groups on any rank; without sharding, ranks need not agree
        group_count = 0
        if sharded(self.parameters[0]):
            group_count = max(len({epoch for epoch, _ in rank_items}) for rank_items in items_of_ranks)
        while len(epoch_groups) < group_count:
            # parameters are gathered and gradients summed by all ranks together, once a pass
            largest_index = max(range(len(epoch_groups)), key=lambda index: len(epoch_groups[index][1]))
            epoch, largest_group = epoch_groups.pop(largest_index)
            half_size = len(largest_group) // 2
            epoch_groups += [(epoch, largest_group[:half_size]), (epoch, largest_group[half_size:])]
        return epoch_groups

    @abstractmethod
    def backward(self, examples: Sequence[Example], epoch: int, dropout_seed: int) -> torch.Tensor:
        """Compute and add the gradients of a part of the batch, and return the sums of its metrics, [sums].

        Args:
            examples: examples of the part, all of one epoch.
            epoch: number of the epoch, on which times and noises depend.
            dropout_seed: seed of torch's global generator in the pass.
        """

    @abstractmethod
    def finish_update(
        self, step: int, totals: torch.Tensor, batch_items: Sequence[tuple[int, Example]]
    ) -> dict:
        """Do the optimiser's step, and return the metrics of the update.

        Args:
            step: number of the update, counted from 0.
            totals: sums over all passes and ranks, [sums].
            batch_items: (number of the epoch, example) for the whole batch.
        """


class Updates(Passes[PreferencePair]):
    """Objective of a training on preference pairs (DPO, DRO or fine-tuning).

    Args:
        common: all arguments of Passes, in its order.
        unseen: evaluator on held-out pairs; None: nothing is evaluated.
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
        return pair_signs(lines, self.config.needs_reference, self.config.dpo)

    def evaluate(self) -> dict[str, float]:
        """Measure accuracy and margin on held-out pairs, see PairAccuracy.metrics.

        Return an empty mapping if there are no held-out pairs.
        """
        if self.unseen is None:
            return {}
        # a loss without a reference is evaluated against the untuned network
        reference = self.reference or FrozenModel(shared_copy(self.stage.model))
        return self.unseen.metrics(self.policy, reference)

    def backward(self, examples: Sequence[PreferencePair], epoch: int, dropout_seed: int) -> torch.Tensor:
        draw = self._draw(examples, epoch)
        # after sampling: it must not depend on how many random numbers the dropout takes
        torch.manual_seed(dropout_seed)
        return self._pass(draw)

    def _draw(self, pairs: Sequence[PreferencePair], epoch: int) -> PairDraw:
        """Sample times and noises of pairs. For fine-tuning, the result has the preferred samples only."""
        config = self.config
        cond = self.conditioned_stage.conditioning([pair.condition for pair in pairs])
        no_cond = (
            self.conditioned_stage.null_conditioning(len(pairs)) if config.dpo.condition_dropout else None
        )
        draw = draw_pairs(self.stage, pairs, cond, no_cond, config.dpo, config.seed, epoch, self.device)
        if config.dpo.kind != "sft":
            return draw
        pair_count = len(pairs)
        # sparse samples have different lengths, so a batch cannot be sliced: it is separated and collated
        x_0, eps, x_t = (collate(separate(batch)[:pair_count]) for batch in (draw.x_0, draw.eps, draw.x_t))
        return replace(
            draw,
            x_0=x_0,
            eps=eps,
            x_t=x_t,
            t=draw.t[:pair_count],
            cond=each(lambda c: c[:pair_count], draw.cond),
        )

    def _pass(self, draw: PairDraw) -> torch.Tensor:
        """Compute and add the gradients at sampled times and noises, and return the metrics' sums, [sums]."""
        config = self.config.dpo
        stage = self.stage
        # the reference is computed first, since the activations of the policy would take memory meanwhile
        ref_errors = None
        if self.reference is not None:
            ref_errors = self.reference.errors(stage, draw)
        # [2P], or [P] for fine-tuning
        v = stage.velocity(draw.x_t, draw.t, draw.cond, self.policy)
        errors = stage.path.errors(single(v), draw.x_0, draw.eps)
        is_sft = config.kind == "sft"
        # fine-tuning has no rejected samples; zeros give the sums the same layout as for the other losses
        pair_errors = (
            PairErrors(preferred=errors, rejected=torch.zeros_like(errors))
            if is_sft
            else PairErrors.split(errors, ref_errors)
        )
        losses = pair_loss(pair_errors, config, draw.weight)
        mass = losses.new_tensor(float(len(losses)))
        # the sum over the pairs; `descend` divides by the mass of the whole batch
        loss = mass * losses.mean()
        loss.backward()
        totals = torch.zeros(self.sums, device=self.device)
        # the order is that of the comment at `sums`
        totals[:4] = torch.stack(
            [mass, loss.detach(), pair_errors.preferred.detach().sum(), pair_errors.rejected.detach().sum()]
        )
        if ref_errors is not None:
            stats = pair_stats(pair_errors, pair_errors.delta(config.loser_weight), draw.t)
            totals[4:] = torch.cat([stats[name] for name in BINNED])
        return totals

    def finish_update(self, step: int, totals: torch.Tensor, batch_items: Sequence[Item]) -> dict:
        """Do the optimiser's step, and return the metrics of the update.

        The entry "bins" has the sums of the BINNED metrics over all ranks in each time bin; it is empty for a
        loss without a reference. The loss dro has the mean errors w_error and l_error instead.
        """
        dpo = self.config.dpo
        # three ids are enough to find the batch of an error
        example_names = "pairs " + ", ".join(pair.id for _, pair in batch_items[:3])
        _, loss, grad_norm, preferred_error_sum, rejected_error_sum, *bin_sums = self.descend(
            step, totals, example_names
        )
        # [len(BINNED) * TIME_BINS] -> one row for each metric
        bins = (
            dict(zip(BINNED, np.reshape(bin_sums, (-1, TIME_BINS)).tolist(), strict=True))
            if self.reference is not None
            else {}
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "pairs": len(batch_items), "bins": bins}
        return metrics | (
            {
                "w_error": preferred_error_sum / len(batch_items),
                "l_error": rejected_error_sum / len(batch_items),
            }
            if dpo.kind == "dro"
            else {}
        )


def pairs_checksum(pairs: Sequence[PreferencePair]) -> str:
    """Hash the latents, ids, prompts, sources and weights of pairs."""
    # part of training_options.json: a run cannot be resumed with other pairs
    latents = {f"{p.id}/{role}": getattr(p, role) for p in pairs for role in ("preferred", "rejected")}
    return latents_checksum(latents, [[p.id, p.condition, p.source, p.w2] for p in pairs])


def latents_checksum(latents: Mapping[str, Latent], columns: list[list]) -> str:
    """Hash latents with their names, and rows of further values (ids, prompts, labels) in `columns`."""
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
    " the network diverge. Use a held-out evaluator, or few updates."
)


def train_stage(
    conditioned_stage: ConditionedStage,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    out: Path,
    *,
    unseen: Sequence[PreferencePair] = (),
    ranks: Ranks = SINGLE,
    say: Callable[[str], None] = print,
    **common: Any,
) -> StageResult:
    """Train a copy of a stage's network on preference pairs. The stage's own network is the reference.

    Args:
        conditioned_stage: stage whose network is copied and trained.
        pairs: preference pairs of that stage.
        config: settings of the training.
        out: folder of the run, see trainer.py.
        unseen: pairs of prompts that are not trained on. Accuracy and margin on them are logged at every
            evaluation, and the parameters with the best accuracy are kept unless `held_out` is given. Without
            `unseen` and `held_out`, the last parameters are kept.
        ranks: this process among the processes that train together.
        say: function that prints status lines and warnings.
        common: further keyword arguments of trainer.train.

    Raises:
        ValueError: before anything is written, for an empty list of pairs, pairs of another stage, ids that
            occur twice, latents that the stage cannot have, and a network with the opposite convention of
            time; later for settings or folders that do not fit.
        LossNotFiniteError: for a loss that is not finite.
        StoppedError: after a signal to stop.
    """
    stage = conditioned_stage.stage
    check_pairs(conditioned_stage, pairs)
    if unseen:
        check_pairs(conditioned_stage, unseen)
    # the same seed, but other times and noises than in training
    pair_accuracy = PairAccuracy(conditioned_stage, unseen, seed=config.seed) if unseen else None
    if config.dpo.kind == "dro":
        # not advised where it is set already
        weight_advice = " Set loser_weight below 1 (--set)." if config.dpo.loser_weight >= 1 else ""
        say(f"Warning: {UNBOUNDED}{weight_advice}")

    def estimated_start(pair_count: int) -> Start:
        """Return the argument `start` of cost_of_update for an update of `pair_count` pairs."""
        estimated_config = replace(config, batch=pair_count, batch_gpu=None)
        return lambda fake_stage, policy, reference: Updates(
            replace(conditioned_stage, stage=fake_stage), pairs, estimated_config, policy, reference, SINGLE
        )

    def start(run: Run, policy: torch.nn.Module, reference: FrozenModel | None) -> Descent:
        pass_size, recompute = fit_passes(
            stage,
            config,
            config.batch_gpu or max(config.batch // ranks.world, 1),
            estimated_start,
            ranks,
            say,
        )
        set_recompute(policy, recompute)
        # the size of a pass is not in the recorded options, so a run may be resumed on a device of other
        # memory
        sized_config = replace(config, batch_gpu=config.batch_gpu or pass_size)
        return Updates(
            conditioned_stage, pairs, sized_config, policy, reference, run.ranks, unseen=pair_accuracy
        )

    # rank 0 hashes, since large sets take time; the other ranks receive the result
    pair_sets = {"pairs": pairs, "unseen": unseen} if unseen else {"pairs": pairs}
    checksums = None
    if ranks.is_main:
        checksums = {"base": stage.hash}
        checksums |= {name: pairs_checksum(hashed_pairs) for name, hashed_pairs in pair_sets.items()}
    further_options = ranks.broadcast(checksums)
    return train(
        stage, config, further_options, start, Path(out), ranks=ranks, say=say, shards=True, **common
    )


def check_pairs(conditioned_stage: ConditionedStage, pairs: Sequence[PreferencePair]) -> None:
    """Raise ValueError for pairs that cannot be trained on; see train_stage."""
    stage = conditioned_stage.stage
    caller = f"train_stage({stage.name})"
    if not pairs:
        raise ValueError(
            f"{caller}: the list of preference pairs is empty, but at least one pair is needed. Label or"
            " generate pairs of this stage."
        )
    check_unique(caller, pairs)
    # checked before anything is written: a wrong pair would otherwise stop the run in the middle
    for pair in pairs:
        if pair.stage != stage.name:
            raise ValueError(
                f"{caller}: the pair {pair.id!r} belongs to stage {pair.stage!r}. Train that stage on this"
                " pair, or remove it."
            )
        for role in ("preferred", "rejected"):
            stage.check(f"{caller}, pair {pair.id!r}, {role}", getattr(pair, role))
    device = next(stage.model.parameters()).device
    # a few pairs are enough: the convention of time is a property of the network
    sample_pairs = pairs[:8]
    cond = to_device(conditioned_stage.conditioning([pair.condition for pair in sample_pairs]), device)
    check_convention(stage, collate([pair.preferred for pair in sample_pairs]).to(device), cond)
