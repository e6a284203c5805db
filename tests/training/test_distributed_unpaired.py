"""Training on unpaired labels gives on two ranks what it gives on one."""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.preferences.unpaired import from_pairs
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.presets import Preset
from eg3d_rlhf.rewards.settings import TrainOptions, with_changes
from eg3d_rlhf.rewards.slab_presets import HEADS, PRESETS
from tests.rewards.test_network_training import SHAPE, filled, toy_labels
from tests.training.test_distributed import REWARD, finish, in_float64, largest_difference, start
from training.distributed import SINGLE, Ranks

UNPAIRED = REWARD.replace(
    "test_distributed import reward_training", "test_distributed_unpaired import unpaired_training"
).replace("reward_training(", "unpaired_training(")


def unpaired_training(ranks: Ranks) -> dict[str, torch.Tensor]:
    """An epoch with unpaired labels beside the pairs, then one step on these alone; the losses and the
    bandwidth, too.
    """
    pairs = toy_labels(9)
    val = toy_labels(6, 100)
    single = toy_labels(10, 200)
    PRESETS["rank-test"] = Preset(network=replace(HEADS, slab_shape=SHAPE).to_dict())
    options = with_changes(
        TrainOptions(preset="rank-test"), epochs=1, batch=4, unpaired_batch=6, regression=0.5, divergence=1.0
    )
    results = {}
    with in_float64() as cache:
        data = TrainData(
            train=pairs,
            val=val,
            store=filled(pairs, val, single, cache=cache),
            unpaired=from_pairs(single),
            unpaired_val=from_pairs(val),
        )
        for name, changes in {
            "mixed": {},
            "alone": {"pairs": 0.0, "scalar": 0.0, "bradley_terry": 0.0, "unpaired_batch": 20},
        }.items():
            trained = train_reward(data, with_changes(options, **changes), ranks=ranks)
            results |= {f"{name}.{key}": value for key, value in trained.model.state_dict().items()}
            record = trained.history[0]
            figures = {
                **record["loss"],
                "correct": record["train_accuracy"],
                "auc": record["val_auc"],
                "bandwidth": trained.bandwidth,
            }
            results |= {f"{name}:{key}": torch.tensor(value) for key, value in figures.items()}
    return results


@pytest.mark.long
def test_unpaired_labels_on_two_ranks_equal_one(tmp_path):
    finish(start(UNPAIRED, str(tmp_path / "two.pt")))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    single_rank = unpaired_training(SINGLE)
    assert single_rank.keys() == two.keys() and float(single_rank["alone:divergence"]) < -0.01
    figures = [name for name in single_rank if ":" in name]
    differences = {name: float((single_rank[name] - two[name]).abs()) for name in figures}
    assert max(differences["mixed:divergence"], differences["alone:divergence"]) <= 1e-6, differences
    assert max(differences.values()) <= 5e-6, differences
    states = [{name: value for name, value in state.items() if "." in name} for state in (single_rank, two)]
    assert {value.dtype for value in states[0].values()} == {torch.float64}
    assert largest_difference(*states) <= 1e-5
