"""Test the precision of passes: training, win rates and samples use the same one, and trained parameters stay
float32.
"""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.models.policies import ADAPTER
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.models.weights import read
from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
from eg3d_rlhf.tuning.flow.base.sampling import stage_latents
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.workspace.tune import tune
from tests.tuning.flow import labelled


def test_a_cpu_computes_in_float32_and_cuda_in_bfloat16_unless_set_otherwise():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        assert [chosen_precision("auto", device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert chosen_precision("float32", "cuda") == "float32" and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_a_problem_has_one_precision_for_all_that_its_networks_do(stage):
    exact, half = (open_problem(ProblemSource(precision=precision)) for precision in ("auto", "bfloat16"))
    assert (exact.identity["precision"], half.identity["precision"]) == ("float32", "bfloat16")
    place = [torch.tensor([[2, 3, 4], [3, 3, 4]], dtype=torch.int32)] if stage == "voxels" else [None]
    a, b = (
        feats_of(stage_latents(p.pipeline, stage_of(p.pipeline, stage), ["red ball"], [0], place))
        for p in (exact, half)
    )
    assert b.dtype == torch.float32 and not torch.equal(a, b) and float((a - b).abs().mean()) < 0.1
    assert {p.dtype for p in stage_of(half.pipeline, stage).model.parameters()} == {torch.float32}


@pytest.mark.long
def test_training_in_bfloat16_learns_what_float32_does_and_keeps_adapters_in_float32(tmp_path):
    found = {}
    for precision in ("float32", "bfloat16"):
        problem = labelled.toy(3)
        for stage in problem.pipeline.stages:
            stage.precision = precision
        report = tune(
            problem,
            replace(labelled.tuning(3), stages=("voxels",), control=False),
            tmp_path / precision,
            say=lambda line: None,
        )
        found[precision] = report["stages"]["voxels"]["held_out"]
        print(f"{precision}: {found[precision]['accuracy']:.3f} {found[precision]['interval']}")
        adapters = read(tmp_path / precision / "training" / "voxels" / "policy" / ADAPTER, "adapters")
        assert adapters and {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    low, high = found["float32"]["interval"]
    assert low <= found["bfloat16"]["accuracy"] <= high
