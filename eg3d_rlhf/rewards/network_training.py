"""Train a reward network on labelled pairs, on unpaired labels, or on both.

Losses and reference samples are those of arXiv 2606.27305 (2026), reward training. Training stops early by
the accuracy on validation pairs, and an interrupted run resumes exactly. The test split is never read here.

An *observation* is the input that the network reads from a shape. A *reference sample* is a sample at a low
truncation psi, which should score above every labelled shape.

Shapes: N observations of a step, in B blocks (winners, losers, and reference samples, if there are any); P
compared pairs; U unpaired labels; M entries of an embedding; W ranks.
"""

import contextlib
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError, StopRequest
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import PreferenceLoss, UnpairedOutput, median_distance, reconstruction_loss
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, endless_batches, resample_labels
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import auc, log_loss, margins, score_seeds
from eg3d_rlhf.rewards.networks import RewardNetwork, RewardOutput, builder_of
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab
from eg3d_rlhf.rewards.presets import preset
from eg3d_rlhf.rewards.settings import TrainOptions
from training.distributed import SINGLE, Ranks
from training.phases import RowDraws, sum_over_ranks
from training.storage import checksum, write_atomic

# The training state is the file from which a reward training resumes. It contains everything that changes
# during training, and the options of the run.


def save_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Write everything that a resumed run needs to a file, atomically.

    Args:
        path: file to write.
        state: state of the training.
        options: settings of the training; `load_state` rejects the file if the resumed run has other ones.
    """
    training_values = {
        "epoch": state.epoch,
        "history": state.history,
        "best_epoch": state.best_epoch,
        "options": asdict(options),
    }
    # Only runs with unpaired labels have a bandwidth. Without it the key is left out, as in files of earlier
    # versions.
    if state.bandwidth is not None:
        training_values["bandwidth"] = state.bandwidth
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
    }
    file_buffer = io.BytesIO()
    # The values are a JSON string inside the tensor file, so that torch.load can read it with
    # weights_only=True, which runs no code from the file.
    torch.save(
        {
            **tensors,
            "plain": json.dumps(training_values),
            "sha256": checksum(_flatten(tensors), training_values),
        },
        file_buffer,
    )
    write_atomic(path, file_buffer.getvalue())


def _flatten(nested, key_path: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors inside nested dictionaries and lists, by their path, for example "/model/MLP.0".

    Values of all other types are left out.
    """
    if isinstance(nested, torch.Tensor):
        return {key_path: nested}
    if isinstance(nested, dict):
        keys_and_values = list(nested.items())
    else:
        keys_and_values = list(enumerate(nested)) if isinstance(nested, (list, tuple)) else []
    tensors = {}
    for nested_key, nested_value in keys_and_values:
        tensors.update(_flatten(nested_value, f"{key_path}/{nested_key}"))
    return tensors


def load_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Read a training state from a file on rank 0 and copy it into the `state` of every rank.

    Args:
        path: file that `save_state` wrote.
        state: state of the training, which is changed in place.
        options: settings of this run.
    Raises: ValueError if the file is damaged or is no training state, or if its run had other options.
    """
    file_tensors = None
    if state.ranks.is_main:
        # The copy is writable, as torch requires.
        file_tensors = {"file": torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())}
    # Ranks on other machines may have no access to the file, so rank 0 sends its bytes.
    file_bytes = state.ranks.broadcast_named(file_tensors)["file"]
    try:
        stored_state = torch.load(
            io.BytesIO(file_bytes.numpy().tobytes()), map_location="cpu", weights_only=True
        )
        training_values = json.loads(stored_state["plain"])
        if stored_state.pop("sha256") != checksum(_flatten(stored_state), training_values):
            raise ValueError("the checksum does not match")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        cause = type(error).__name__
        raise ValueError(
            f"{path}: this training state is damaged and cannot be read ({cause}). Delete the file to start"
            " the training again."
        ) from error
    # A conversion to JSON and back turns tuples into lists, as in the file.
    requested_options = json.loads(json.dumps(asdict(options)))
    stored_options = version_0_1.settings(training_values["options"])
    changed_names = sorted(
        name
        for name, requested_value in requested_options.items()
        if stored_options.get(name) != requested_value
    )
    if changed_names:
        raise ValueError(
            f"{path}: the training was started with different values of {', '.join(changed_names)}. Pass the"
            " values with which it was started, or delete the file to start the training again."
        )
    state.model.load_state_dict(stored_state["model"])
    state.optimizer.load_state_dict(stored_state["optimizer"])
    state.epoch = training_values["epoch"]
    state.history = training_values["history"]
    state.best_epoch = training_values["best_epoch"]
    state.best = stored_state["best"]
    state.bandwidth = training_values.get("bandwidth")


# Distribution of a training step over ranks: the items of each rank, the exchange of values between ranks,
# and random numbers that are equal to those of a run with a single rank.


@dataclass(frozen=True)
class Share:
    """Items (pairs or unpaired labels) of a training step that this rank processes: every W-th item.

    The last step of an epoch may have fewer items than there are ranks. A rank without an item then processes
    the first item with weight 0, because all ranks must take part in the exchange of gradients.
    """

    count: int  # number of items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        """Indices of this rank's items in the step. The list is empty only if the step has no items."""
        # A rank without an item takes item 0; `[0][:0]` is empty.
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0][: self.count]

    @property
    def weight(self) -> float:
        """Weight in 0..1 of this rank's mean over `rows` in the mean over all items of the step."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / max(self.count, 1)

    def select_from_blocks(self, values: np.ndarray) -> np.ndarray:
        """Select the values of this rank's items.

        Args: values: values [B * count] of B blocks of `count` items each.
        Returns: values [B * len(rows)] of B blocks of this rank's items.
        """
        return values.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Collect the values of all items of the step on every rank.

        Differentiable only in the values of this rank's items.

        Args: values: values [len(rows), ...] of this rank's items.
        Returns: values [count, ...] of all items, in the order of the step.
        """
        if self.ranks.world == 1:
            return values
        step_values = values.new_zeros(self.count, *values.shape[1:])
        item_indices = torch.tensor(self.rows, device=values.device)
        # A rank without items must not overwrite the first item, which belongs to rank 0.
        if not self.weight:
            return self.ranks.sum_(step_values, "exchange embeddings")
        step_values[item_indices] = values.detach()
        # The sum carries no gradient. index_copy replaces this rank's rows by the original values, which do.
        return self.ranks.sum_(step_values, "exchange embeddings").index_copy(0, item_indices, values)

    def update(
        self,
        model: torch.nn.Module,
        metrics: dict[str, float],
        should_stop: bool,
        metric_weights: Mapping[str, float],
    ) -> tuple[dict[str, float], bool]:
        """Sum the model's gradients over ranks, in place, and compute the metrics of the complete step.

        Args:
            model: network whose gradients are summed.
            metrics: metrics of this rank, by name.
            should_stop: True if this rank was asked to stop.
            metric_weights: weight of this rank's value in the mean over the step, by name of the metric; a
                metric that is not named has the weight `Share.weight`.
        Returns: the metrics of the complete step, and True if any rank was asked to stop.
        """
        if self.ranks.world == 1:
            return metrics, should_stop
        has_items = float(self.weight > 0)
        # 'strength' is a norm over samples, so its squares are summed. All other metrics are means.
        weighted_metrics = [
            metric_value**2 * has_items
            if metric_name == "strength"
            else metric_value * metric_weights.get(metric_name, self.weight)
            for metric_name, metric_value in metrics.items()
        ]
        metric_sums = torch.tensor(
            [*weighted_metrics, float(should_stop)],
            dtype=torch.float32,
            device=next(model.parameters()).device,
        )
        # Metrics and the request to stop are sent together with the gradients, in one exchange.
        sum_over_ranks(self.ranks, model.parameters(), [metric_sums])
        *metric_totals, stop_requests = metric_sums.tolist()
        step_metrics = {
            metric_name: metric_sum**0.5 if metric_name == "strength" else metric_sum
            for metric_name, metric_sum in zip(metrics, metric_totals, strict=True)
        }
        return step_metrics, stop_requests > 0


class Step:
    """Labels of one training step, over all ranks, and the share of this rank.

    Args:
        pairs: labelled pairs of the step.
        shapes: unpaired labels of the step.
        ranks: processes that share the step.
    """

    def __init__(self, pairs: Sequence[Preference], shapes: Sequence[UnpairedPreference], ranks: Ranks):
        self.pairs = pairs
        self.shapes = shapes
        self.ranks = ranks
        self.pair_share = Share(len(pairs), ranks)
        self.shape_share = Share(len(shapes), ranks)

    def draws(self, pair_row_count: int) -> contextlib.AbstractContextManager:
        """Return a context in which each sample gets the random numbers that it has in a run with one rank.

        Args:
            pair_row_count: number of this rank's observations of pairs in the forward pass. They come first,
                block by block (winners, losers, reference samples). The observations of unpaired labels
                follow.
        """
        if self.ranks.world == 1:
            return contextlib.nullcontext()
        # Blocks of winners, losers, and perhaps reference samples; max avoids a division by 0 without pairs.
        block_count = pair_row_count // max(len(self.pair_share.rows), 1)
        # Index of each of this rank's observations in the batch of a single rank
        pair_indices = []
        for block_index in range(block_count):
            pair_indices += [block_index * len(self.pairs) + row for row in self.pair_share.rows]
        shape_indices = [block_count * len(self.pairs) + row for row in self.shape_share.rows]
        return RowDraws(
            [*pair_indices, *shape_indices],
            block_count * len(self.pairs) + len(self.shapes),
        )


MOMENTUM = 0.9  # momentum of the moving average over steps of the divergence's bandwidth
# Smallest bandwidth of the divergence. It is needed if all embeddings coincide, whose median distance is 0.
MIN_BANDWIDTH = 1e-3


def new_network(options: TrainOptions, observation: Observation) -> RewardNetwork:
    """Create an untrained network that reads an observation.

    Args:
        options: settings of the training, which name the preset and the backbone's file.
        observation: input of the network. It gives the kind of the network, and for strided convolutions,
            whose number of features depends on it, also the shape of the slabs.
    Raises: ValueError if the preset is unknown, or if a backbone's file is missing in the options, not
        allowed or does not match; FileNotFoundError if the backbone's file does not exist.
    """
    kind = observation.kind
    description = dict(preset(options.preset, kind).network)
    if description.get("slab_shape"):
        description["slab_shape"] = observation.shape[1:]
    if options.backbone and "backbone" not in description:
        raise ValueError(
            f"--backbone={options.backbone} has no effect, because the preset {options.preset} of the"
            f" observation {kind} has no backbone. Remove --backbone."
        )
    if options.backbone:
        description["backbone"] = options.backbone
    return builder_of(kind)(description)


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Labels and observations of a reward training."""

    train: Sequence[Preference]  # pairs for training
    val: Sequence[Preference]  # pairs for validation
    store: ObservationCache  # observations of all labelled seeds
    references: Sequence[int] = ()  # seeds of the reference samples
    reference_store: ObservationCache | None = None  # observations of the reference samples
    observation: Observation = SigmaSlab()
    unpaired: Sequence[UnpairedPreference] = ()  # unpaired labels for training; each states a preference
    unpaired_val: Sequence[UnpairedPreference] = ()  # unpaired labels for validation

    def trains_on_pairs(self, options: TrainOptions) -> bool:
        """Return True if the network is trained on pairs.

        Otherwise it is trained on unpaired labels only, and pairs serve only to choose the epoch.
        """
        return options.weights.on_pairs or not self.unpaired

    def steps(self, options: TrainOptions) -> int:
        """Return the number of steps of an epoch."""
        if self.trains_on_pairs(options):
            return math.ceil(len(self.train) / options.batch)
        return math.ceil(len(self.unpaired) / options.unpaired_batch)


@dataclass
class TrainState:
    """Everything that changes during training and that a resumed run needs."""

    model: RewardNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # number of finished epochs
    history: list[dict] = field(default_factory=list)  # one record per epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict of the best epoch so far
    best_epoch: int = -1  # index of the best epoch so far, from 0; -1 before the first epoch
    # Bandwidth of the divergence's kernel, a moving average over steps; None before the first unpaired labels
    bandwidth: float | None = None
    ranks: Ranks = SINGLE  # processes of the run, and the rank of this process
    request: StopRequest = field(default_factory=StopRequest)  # records SIGTERM and SIGINT


def train_reward(
    data: TrainData,
    options: TrainOptions,
    *,
    device: str | torch.device = "cpu",
    state_file: Path | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    ranks: Ranks = SINGLE,
    start: RewardNetwork | None = None,
) -> TrainState:
    """Train a reward network, and return the training state with the weights of the best epoch.

    The best epoch has the highest accuracy on validation pairs, and among equal ones the lowest log loss.

    Training ends after `options.epochs` epochs, or after `options.patience` epochs without a new best epoch.
    Random numbers depend only on the seed and the epoch, so a run that is resumed from `state_file` is equal
    to an uninterrupted run.

    Args:
        data: labels and observations.
        options: settings of the training.
        device: device of the network.
        state_file: file that is written after each epoch; if it exists, training resumes from it. None writes
            no file.
        on_step: function that is called after each step.
        on_epoch: function that is called with the record of each epoch.
        ranks: processes that train together; the labels of each step are distributed over them.
        start: network from whose weights training starts; `options.start` states its hash. None for a random
            initialisation.
    Returns: the state after training, whose model has the weights of the best epoch and is in eval mode.
    Raises: ValueError if pairs or unpaired labels are missing, or if `state_file` belongs to a run with other
        options; StoppedError after SIGTERM or SIGINT.
    """
    if not data.train or not data.val:
        raise ValueError(
            "train_reward: expected at least one training pair and one validation pair, got"
            f" {len(data.train)} training pairs and {len(data.val)} validation pairs. Label more pairs."
        )
    _check_unpaired(data, options)
    # Members of an ensemble differ more if each is trained on its own bootstrap sample of the labels.
    if options.bootstrap:
        pair_rng = np.random.default_rng([options.seed, len(data.train)])
        pair_indices = pair_rng.integers(len(data.train), size=len(data.train))
        resampled_labels = resample_labels(
            data.unpaired, np.random.default_rng([options.seed, len(data.unpaired), 1])
        )
        data = replace(data, train=[data.train[i] for i in pair_indices], unpaired=resampled_labels)
    # A separate random state, so that the initialisation depends only on the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = new_network(options, data.observation).to(device)
    optimizer_class = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    optimizer = optimizer_class(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    state = TrainState(model, optimizer, ranks=ranks)
    calibration_seeds = [seed for label in data.train for seed in (label.winner, label.loser)]
    calibration_seeds += [label.seed for label in data.unpaired]
    # The calibration comes before the weights of `start`, which also contain statistics and replace it.
    model.calibrate(lambda: data.store.take(calibration_seeds, device))
    if start is not None:
        model.load_state_dict(start.state_dict())
    if state_file is not None and ranks.broadcast(state_file.is_file()):
        load_state(state_file, state, options)
    # All ranks start from the weights and buffers of rank 0.
    ranks.broadcast_((*model.parameters(), *model.buffers()))
    # The index of the last finished epoch is state.epoch - 1.
    while state.epoch < options.epochs and state.epoch - 1 - state.best_epoch < options.patience:
        with state.request:
            epoch_record = _epoch(state, data, options, on_step)
        state.history.append(epoch_record)
        state.epoch += 1
        # max() returns the first of equal records, so a later epoch must be better to become the best one.
        if epoch_record is max(
            state.history, key=lambda epoch: (epoch["val_accuracy"], -epoch["val_log_loss"])
        ):
            state.best_epoch = epoch_record["epoch"]
            state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if state_file is not None and ranks.is_main:
            save_state(state_file, state, options)
        if on_epoch:
            on_epoch(epoch_record)
    model.load_state_dict(state.best)
    model.eval().requires_grad_(False)
    return state


def _check_unpaired(data: TrainData, options: TrainOptions) -> None:
    """Raise ValueError if the weights of the loss and the unpaired labels do not match.

    The terms `regression` and `divergence` need unpaired labels of preferred shapes and of shapes that are
    not preferred, and only these terms use unpaired labels.
    """
    has_unpaired_loss = options.weights.regression or options.weights.divergence
    preferences = {label.preferred for label in data.unpaired}
    if data.unpaired and not has_unpaired_loss:
        raise ValueError(
            "--unpaired has no effect, because --regression and --divergence are 0. Set one of them above 0,"
            " or remove --unpaired."
        )
    if has_unpaired_loss and not preferences:
        raise ValueError(
            "--regression or --divergence is above 0 and needs labels of single shapes, but there are none"
            " for the training. Pass --unpaired=FILE, or set --regression and --divergence to 0."
        )
    if has_unpaired_loss and preferences != {True, False}:
        raise ValueError(
            "--regression or --divergence is above 0 and needs labels of preferred shapes and of shapes that"
            f" are not preferred, but all {len(data.unpaired)} training labels are of"
            f" {'preferred shapes' if True in preferences else 'shapes that are not preferred'}. Add labels"
            f" of {'shapes that are not preferred' if True in preferences else 'preferred shapes'} to"
            " --unpaired."
        )


def _epoch(
    state: TrainState, data: TrainData, options: TrainOptions, on_step: Callable[[], None] | None
) -> dict:
    """Train for one epoch, and then evaluate the network on the validation pairs.

    Args:
        state: state of the training, which is changed.
        data: labels and observations of the training.
        options: settings of the training.
        on_step: function that is called after each step.
    Returns: dict of JSON values, the record of the epoch. "loss" contains the loss terms by name, averaged
        over the steps. The other entries are "epoch" (from 0), "seconds", "lr", "train_accuracy",
        "val_accuracy", "val_log_loss" and, with unpaired validation labels, "val_auc".
    """
    start_time = time.monotonic()
    # Random numbers depend on the seed and the epoch only, so a resumed epoch draws the same numbers. The
    # second stream serves unpaired labels, so that they do not change the order of the pairs.
    pair_rng = np.random.default_rng([options.seed, state.epoch])
    unpaired_rng = np.random.default_rng([options.seed, state.epoch, 1])
    generator = torch.Generator().manual_seed(int(pair_rng.integers(2**62)))
    step_count = data.steps(options)
    unpaired_batches = endless_batches(data.unpaired, options.unpaired_batch, unpaired_rng)
    metrics: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):  # dropout reads the global generator
        torch.manual_seed(int(pair_rng.integers(2**62)))
        state.model.train()
        pair_order = pair_rng.permutation(len(data.train) if data.trains_on_pairs(options) else 0)
        for step_index in range(step_count):
            if options.cosine:
                # Half a cosine over all epochs, updated at every step
                progress = (state.epoch + step_index / step_count) / options.epochs
                state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * progress))
            pairs = [
                data.train[i]
                for i in pair_order[step_index * options.batch : (step_index + 1) * options.batch]
            ]
            # Metrics are averaged over pairs, so that a short last step counts less. Without pairs, all steps
            # count equally.
            step_weight, total_weight = (len(pairs), len(pair_order)) if pairs else (1, step_count)
            step_labels = Step(pairs, next(unpaired_batches) if data.unpaired else [], state.ranks)
            step_metrics = _step(state, step_labels, data, options, (pair_rng, unpaired_rng), generator)
            for metric_name, metric_value in step_metrics.items():
                metrics[metric_name] = (
                    metrics.get(metric_name, 0.0) + metric_value * step_weight / total_weight
                )
            if on_step:
                on_step()
    # All other metrics are loss terms.
    train_accuracy = metrics.pop("correct")
    # Dropout off for validation.
    state.model.eval()
    scores = score_seeds(
        state.model,
        data.store,
        [seed for label in data.val for seed in (label.winner, label.loser)],
        state.ranks,
    )
    pair_margins = margins(scores, data.val)
    epoch_record = {
        "epoch": state.epoch,
        "seconds": time.monotonic() - start_time,
        "lr": state.optimizer.param_groups[0]["lr"],
        "loss": metrics,
        "train_accuracy": train_accuracy,
        "val_accuracy": float((pair_margins > 0).mean()),
        "val_log_loss": log_loss(pair_margins),
    }
    if data.unpaired_val:
        scores = score_seeds(
            state.model, data.store, [label.seed for label in data.unpaired_val], state.ranks
        )
        preferred_scores = [scores[label.seed] for label in data.unpaired_val if label.preferred is True]
        other_scores = [scores[label.seed] for label in data.unpaired_val if label.preferred is False]
        epoch_record["val_auc"] = auc(preferred_scores, other_scores)
    return epoch_record


def _step(
    state: TrainState,
    step_labels: Step,
    data: TrainData,
    options: TrainOptions,
    rngs: tuple[np.random.Generator, np.random.Generator],
    generator: torch.Generator,
) -> dict[str, float]:
    """Update the network on the labels of one step.

    Args:
        state: state of the training, which is changed.
        step_labels: labels of the step.
        data: labels and observations of the training.
        options: settings of the training.
        rngs: two random generators; the first one serves pairs, and the second one unpaired labels.
        generator: random numbers of the loss, which chooses presentation orders.
    Returns: the weighted loss terms by name and, as "correct", the share of pairs that the scores order as
        labelled.
    """
    device = next(state.model.parameters()).device
    loss_weights = options.weights
    preference_loss = PreferenceLoss(loss_weights)
    loss_terms = {}
    metrics = {}
    pair_rng, unpaired_rng = rngs
    pair_batch = (
        _pair_batch(step_labels.pairs, step_labels.pair_share, data, options, pair_rng, device)
        if step_labels.pairs
        else None
    )
    observations = [] if pair_batch is None else [pair_batch[0]]
    if step_labels.shapes:
        observations.append(
            _observe_shapes(step_labels.shapes, step_labels.shape_share, data, options, unpaired_rng, device)
        )
    pair_row_count = 0 if pair_batch is None else len(pair_batch[0])
    # One forward pass for pairs and unpaired labels, so that batch normalisation, if the network has any,
    # averages over both.
    with step_labels.draws(pair_row_count):
        network_output = state.model(
            observations[0] if len(observations) == 1 else torch.cat(observations),
            reconstruct=loss_weights.reconstruction > 0,
        )
    if pair_batch is not None:
        pair_observations, better_indices, worse_indices = pair_batch
        pair_count = len(step_labels.pair_share.rows)
        pair_output = network_output.rows(0, pair_row_count)
        # The loss of pairs draws random numbers for blocks of pairs.
        with (
            contextlib.nullcontext()
            if step_labels.ranks.world == 1
            else RowDraws(step_labels.pair_share.rows, len(step_labels.pairs), blocks=True)
        ):
            loss_terms = preference_loss(
                pair_output,
                better_indices,
                worse_indices,
                pair_logits=state.model.pair_logits,
                network_input=pair_observations,
                epoch=state.epoch,
                generator=generator,
            )
        # The first `pair_count` rows are winners, and the next `pair_count` rows are losers.
        is_correct = pair_output.scalar[:pair_count] > pair_output.scalar[pair_count : 2 * pair_count]
        metrics["correct"] = float(is_correct.float().mean())
    if step_labels.shapes:
        unpaired_output, correct_share = _unpaired_output(
            network_output.rows(pair_row_count, len(network_output.scalar)), step_labels, state
        )
        loss_terms |= preference_loss.unpaired(unpaired_output)
        # If there are pairs, they already contributed "correct" and the reconstruction.
        if pair_batch is None:
            metrics["correct"] = correct_share
            if network_output.reconstruction is not None:
                loss_terms["reconstruction"] = (
                    loss_weights.reconstruction
                    * reconstruction_loss(network_output.reconstruction, observations[0]).mean()
                )
    return _update(state, step_labels, loss_terms, metrics)


def _update(
    state: TrainState, step_labels: Step, loss_terms: dict[str, torch.Tensor], metrics: dict[str, float]
) -> dict[str, float]:
    """Compute the gradients of the loss terms, and update the network with the gradients of all ranks.

    Args:
        state: state of the training, which is changed.
        step_labels: labels of the step.
        loss_terms: weighted loss terms of this rank, by name.
        metrics: further metrics of this rank, by name.
    Returns: the loss terms and metrics of the complete step, by name.
    Raises: StoppedError if any rank was asked to stop.
    """
    main_share = step_labels.pair_share if step_labels.pairs else step_labels.shape_share
    equal_weight = 1 / step_labels.ranks.world
    # Every rank computes the divergence of the complete step, but differentiates only its own embeddings. The
    # sum of gradients over ranks is then the gradient of the divergence, so its weight is 1.
    term_weights = {"regression": step_labels.shape_share.weight, "divergence": 1.0}
    state.optimizer.zero_grad(set_to_none=True)
    # Terms are multiplied by this rank's share, so that the sum over ranks is the mean over the step.
    total_loss = sum(
        loss_term * term_weights.get(term_name, main_share.weight)
        for term_name, loss_term in loss_terms.items()
    )
    # The type of `sum` includes the int 0, which it returns without terms.
    cast(torch.Tensor, total_loss).backward()
    metrics = {
        **{term_name: float(loss_term.detach()) for term_name, loss_term in loss_terms.items()},
        **metrics,
    }
    # Metrics that every rank computes for the complete step have equal weights.
    metric_weights = {"regression": step_labels.shape_share.weight, "divergence": equal_weight}
    if not step_labels.pairs:
        metric_weights["correct"] = equal_weight
    stop_requested = state.request.received is not None
    metrics, should_stop = main_share.update(state.model, metrics, stop_requested, metric_weights)
    # All ranks stop at the same step, before the update. Otherwise a rank would wait for a stopped rank
    # without end.
    if should_stop:
        raise StoppedError(f"stopped in epoch {state.epoch + 1}")
    state.optimizer.step()
    return metrics


def _unpaired_output(
    network_output: RewardOutput, step_labels: Step, state: TrainState
) -> tuple[UnpairedOutput, float]:
    """Prepare the input of the loss terms on unpaired labels, and update the kernel's `state.bandwidth`.

    Args:
        network_output: output of the network for this rank's unpaired labels.
        step_labels: labels of the step.
        state: state of the training.
    Returns: the input of the loss terms, and an accuracy in 0..1. The accuracy is computed over all pairs of
        a preferred shape and a shape of the step that is not preferred: it is the share of the pairs in which
        the preferred shape has the higher score.
    """
    device = network_output.scalar.device
    share = step_labels.shape_share
    target_rewards = torch.tensor(
        [step_labels.shapes[i].target for i in share.rows], dtype=network_output.scalar.dtype, device=device
    )
    is_preferred = torch.tensor([label.preferred is True for label in step_labels.shapes], device=device)
    # [U, M + 1]: embeddings of length 1, and in the last column the scores, of the shapes of all ranks. One
    # tensor needs only one exchange.
    step_output = share.gather(
        torch.cat(
            [
                torch.nn.functional.normalize(network_output.embedding),
                network_output.scalar.detach()[:, None],
            ],
            1,
        )
    )
    embedding = step_output[:, :-1]
    scores = step_output[:, -1].detach()
    # The bandwidth is the median distance of a step, averaged over steps.
    step_bandwidth = max(float(median_distance(embedding)), MIN_BANDWIDTH)
    if state.bandwidth is None:
        state.bandwidth = step_bandwidth
    else:
        state.bandwidth = MOMENTUM * state.bandwidth + (1 - MOMENTUM) * step_bandwidth
    correct_share = float((scores[is_preferred][:, None] > scores[~is_preferred]).float().mean())
    return (
        UnpairedOutput(
            scalar=network_output.scalar,
            target=target_rewards,
            embedding=embedding,
            preferred=is_preferred,
            bandwidth=state.bandwidth,
        ),
        correct_share,
    )


def _observe_shapes(
    labels: Sequence[UnpairedPreference],
    share: Share,
    data: TrainData,
    options: TrainOptions,
    rng: np.random.Generator,
    device,
):
    """Return the observations of this rank's unpaired labels, augmented at random.

    Args:
        labels: unpaired labels of the complete step.
        share: labels of the step that this rank processes.
        data: labels and observations of the training.
        options: settings of the training.
        rng: random numbers of the augmentation.
        device: device of the result.
    Returns: observations [len(share.rows), ...].
    """
    observations = data.store.take([labels[i].seed for i in share.rows], device)
    if not options.mirror:
        return observations
    # Random numbers are drawn for all labels of the step and then selected, so that every label gets the same
    # number as in a run with one rank.
    return data.observation.augment(observations, rng.random(len(labels))[share.rows])


def _pair_batch(
    pairs: Sequence[Preference],
    share: Share,
    data: TrainData,
    options: TrainOptions,
    rng: np.random.Generator,
    device,
):
    """Return the observations and the comparisons of this rank's labelled pairs.

    The observations [N, ...] are a block of winners, a block of losers and, if the run has reference samples,
    a block of these. With reference samples, every labelled pair gives three comparisons: winner before
    loser, reference sample before winner, and reference sample before loser. Without them it gives only the
    first of these.

    Args:
        pairs: labelled pairs of the complete step.
        share: pairs of the step that this rank processes.
        data: labels and observations of the training.
        options: settings of the training.
        rng: random numbers of reference samples and augmentation.
        device: device of the results.
    Returns: the observations [N, ...], the index of the better observation of each comparison, and the index
        of the worse one, int64 [P] each.
    """
    step_pair_count = len(pairs)
    rank_pairs = [pairs[i] for i in share.rows]
    pair_count = len(rank_pairs)
    observations = data.store.take(
        [pair.winner for pair in rank_pairs] + [pair.loser for pair in rank_pairs], device
    )
    # The index of a sample is its index in the block plus `pair_count` times the index of the block.
    pair_rows = torch.arange(pair_count)
    better_indices = [pair_rows]
    worse_indices = [pair_rows + pair_count]
    if data.references and data.reference_store is not None:
        # One random reference sample is chosen per pair of the complete step, and this rank's are selected.
        reference_indices = share.select_from_blocks(rng.integers(len(data.references), size=step_pair_count))
        reference_seeds = [data.references[i] for i in reference_indices]
        observations = torch.cat([observations, data.reference_store.take(reference_seeds, device)])
        better_indices += [pair_rows + 2 * pair_count, pair_rows + 2 * pair_count]
        worse_indices += [pair_rows, pair_rows + pair_count]
    if options.mirror:
        # One random number per observation of the complete step
        block_count = len(observations) // pair_count
        draws = share.select_from_blocks(rng.random(block_count * step_pair_count))
        observations = data.observation.augment(observations, draws)
    return observations, torch.cat(better_indices).to(device), torch.cat(worse_indices).to(device)
