"""Test that two processes give the same tuned network as one process."""

import json

import pytest
import torch

from eg3d_rlhf.models.policies import tuned_model
from tests.training.test_distributed import finish, start
from tests.tuning.flow.tiny_flow import TinyPipeline
from tests.tuning.flow.training.online.test_groups import run

CODE = """
import sys
from pathlib import Path
import torch
from eg3d_rlhf.tuning.flow.training.online.updates import train_online
from tests.tuning.flow.training.online.test_groups import config_of, task_of
from training.distributed import process_group
torch.set_num_threads(1)
with process_group(torch.device("cpu"), 2.0) as ranks:
    config = config_of(batch=4, kl=0.1, steps=4, loss=sys.argv[2], advantage="batch")
    train_online(task_of(), config, Path(sys.argv[1]), {}, ranks=ranks, say=lambda line: None)
"""


@pytest.mark.long
@pytest.mark.parametrize("loss", ["grpo", "nft", "dgpo"])
def test_two_ranks_equal_one(tmp_path, loss):
    finish(start(CODE, str(tmp_path / "two"), loss))
    one = run(tmp_path / "one", batch=4, kl=0.1, steps=4, loss=loss, advantage="batch")
    states = [
        tuned_model(TinyPipeline().stages[1].model, folder).state_dict()
        for folder in (one.weights, tmp_path / "two" / "policy")
    ]
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=1e-3, atol=1e-5), name
    lines = [json.loads(line) for line in (tmp_path / "two" / "stats.jsonl").read_text().splitlines()]
    for a, b in zip(one.stats, lines, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
