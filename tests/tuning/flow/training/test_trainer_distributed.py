"""Test that several processes train the same network as one, and that they stop and resume together."""

import json

import pytest
import torch

from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from tests.training.test_distributed import finish, start
from tests.tuning.flow.tiny_flow import TinyPipeline
from tests.tuning.flow.tiny_trainings import CASES, case_of, contents, toy_case
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
    for name in ("dpo", "full"):
        try:
            case_of(out / f"stopped-{name}", name, ranks=ranks, stop=True)
        except StoppedError as error:
            print(error)
        case_of(out / f"stopped-{name}", name, ranks=ranks, resume=True)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    printed = finish(start(CODE, str(out)))
    stopped = [first.splitlines() for first, _ in printed]  # of each rank, both cases
    assert [len(lines) for lines in stopped] == [2, 2]
    assert all(part in line for lines in stopped for line in lines for part in ("SIGTERM", "'voxels'", "2"))
    return out


def weights(folder) -> dict[str, torch.Tensor]:
    return tuned_model(TinyPipeline().stages[1].model, folder).state_dict()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(tmp_path, two, case):
    one = case_of(tmp_path / "run", case, batch_gpu=4)  # as many passes, so the same dropout
    assert json.loads((two / case / "result.json").read_text())["kept_step"] == one.kept_step
    expected = weights(one.weights)
    got = weights(two / case / "policy")
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    lines = [json.loads(line) for line in (two / case / "stats.jsonl").read_text().splitlines()]
    for a, b in zip(one.stats, lines, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "grad_norm", "margin", "win_rate", "implicit_accuracy"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), (a["step"], name)


@pytest.mark.parametrize("case", ["dpo", "full"])
def test_ranks_stop_together_and_resume_to_the_same_bits(two, case):
    assert contents(two / f"stopped-{case}") == contents(two / case)


SHARDED = """
import sys
from pathlib import Path
import torch
from eg3d_rlhf.tuning.flow.training import trainer
from tests.tuning.flow.tiny_trainings import toy_case
from training.distributed import process_group
torch.set_num_threads(1)
shard = trainer.shard
def printing_shard(model, ranks):
    before = sum(p.numel() for p in model.parameters())
    shard(model, ranks)
    print(sum(p.to_local().numel() for p in model.parameters()) / before)
trainer.shard = printing_shard
with process_group(torch.device("cpu"), 2.0) as ranks:
    toy_case(Path(sys.argv[1]), sys.argv[2], ranks=ranks)
"""


@pytest.mark.long
@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_ten_updates_of_every_parameter_divided_over_two_ranks_equal_one_process(tmp_path, stage):
    printed = finish(start(SHARDED, str(tmp_path / "two"), stage))
    assert all(float(share) == pytest.approx(0.5, abs=0.01) for share, _ in printed)
    one = toy_case(tmp_path / "one", stage)
    lines = [json.loads(line) for line in (tmp_path / "two" / "stats.jsonl").read_text().splitlines()]
    for a, b in zip(one.stats, lines, strict=True):
        for name in a.keys() - {"time_bins"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["step"], name)
    expected, got, base = (
        read(load_network(stage), folder)
        for read, folder in (
            (tuned_state, one.weights),
            (tuned_state, tmp_path / "two" / "policy"),
            (lambda model, _: model.state_dict(), None),
        )
    )
    # a bias of keys adds the same to all scores: its gradient is rounding, which Adam magnifies
    keys = ("to_qkv.bias", "to_kv.bias")
    base = {name: value for name, value in base.items() if not name.endswith(keys)}
    moved = max(float((expected[name] - base[name]).abs().max()) for name in base)
    apart = max(float((expected[name] - got[name]).abs().max()) for name in base)
    print(f"{stage}: moved {moved:.2g}, apart {apart:.2g}")
    assert apart < 1e-5 < 1e-4 < moved


def tuned_state(model, folder) -> dict[str, torch.Tensor]:
    return tuned_model(model, folder).state_dict()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_shares_of_a_list_join_to_the_whole(monkeypatch, count):
    ranks = [Ranks(rank=rank, world=3) for rank in range(3)]
    shares = [[item + 1 for item in each.share(list(range(count)))] for each in ranks]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: shares)  # what the group would bring
    assert ranks[1].gather_in_order(shares[1]) == [item + 1 for item in range(count)]
