"""Several processes train what one trains, and stop and resume together."""

import json

import pytest
import torch

from eg3d_rlhf.models.policies import tuned_model
from tests.training.test_distributed import finish, start
from tests.tuning.flow.tiny_flow import TinyPipeline
from tests.tuning.flow.tiny_trainings import CASES, case_of, contents
from training.distributed import Ranks

CODE = """
import sys
from pathlib import Path
import torch
from eg3d_rlhf.experiments.process import StoppedError
from tests.tuning.flow.tiny_trainings import CASES, case_of
from training.distributed import process_group
torch.set_num_threads(1)
out = Path(sys.argv[1])
with process_group(torch.device("cpu"), 2.0) as ranks:
    for name in CASES:
        case_of(out / name, name, ranks=ranks)
    try:
        case_of(out / "stopped", "dpo", ranks=ranks, stop=True)
    except StoppedError as error:
        print(error)
    case_of(out / "stopped", "dpo", ranks=ranks, resume=True)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    printed = finish(start(CODE, str(out)))
    text = "SIGTERM: training of stage 'voxels' stopped after update 2; resume it.\n"
    assert [first for first, _ in printed] == [text, text]
    return out


def weights(folder) -> dict[str, torch.Tensor]:
    return tuned_model(TinyPipeline().stages[1].model, folder).state_dict()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(tmp_path, two, case):
    one = case_of(tmp_path / "run", case, batch_gpu=4)  # as many passes, so the same dropout
    assert json.loads((two / case / "result.json").read_text())["kept_step"] == one.kept_step
    expected, got = weights(one.weights), weights(two / case / "policy")
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    lines = [json.loads(line) for line in (two / case / "stats.jsonl").read_text().splitlines()]
    for a, b in zip(one.stats, lines, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "grad_norm", "margin", "win_rate", "implicit_accuracy"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), (a["step"], name)


def test_ranks_stop_together_and_resume_to_the_same_bits(two):
    assert contents(two / "stopped") == contents(two / "dpo")


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_shares_of_a_list_join_to_the_whole(monkeypatch, count):
    ranks = [Ranks(rank=rank, world=3) for rank in range(3)]
    shares = [[item + 1 for item in each.share(list(range(count)))] for each in ranks]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: shares)  # what the group would bring
    assert ranks[1].joined(shares[1]) == [item + 1 for item in range(count)]
