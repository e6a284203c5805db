"""The tool that measures an update at full size, on small models."""

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes import flow_step
from eg3d_rlhf.tuning.flow.families.trellis import random_flows

SMALL = random_flows.Size(stage="latent", pairs=2, steps=3, voxels=60, blocks=1, width=64, grid=8, rank=2)


@pytest.mark.parametrize("stage", random_flows.STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_real_updates(stage, dtype):
    row = flow_step.measure(replace(SMALL, stage=stage, grid=4 if stage == "structure" else 8, dtype=dtype))
    assert row["loss"][0] == pytest.approx(math.log(2), abs=1e-6)  # adapters that are still off change nothing
    assert all(norm > 0 and math.isfinite(norm) for norm in row["grad_norm"])
    assert dtype == "bfloat16" or row["loss"][2] != row["loss"][0]  # the first updates of bfloat16 blocks may round to nothing
    assert row["peak_bytes"] > 50e6 and row["peak_bytes_of_gpu"] is None and len(row["seconds_per_update"]) == 3
    assert row["trained_parameters"] == 2 * (64 + 192 + 64 + 64 + 64 + 64 + 768 + 128 + 64 + 64)


def test_the_defaults_are_the_full_size():
    with torch.device("meta"):
        for stage, millions in (("structure", 543.0), ("latent", 587.8)):
            built = random_flows.build_stage(random_flows.Size(stage=stage, device="meta"))
            assert sum(p.numel() for p in built.model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_shells_are_thin_and_of_the_size_asked_for():
    coords = random_flows.shell(8000, 64, torch.Generator().manual_seed(0))
    assert coords.shape == (8000, 3) and len(coords.unique(dim=0)) == 8000 and coords.dtype == torch.int32
    assert ((coords >= 0) & (coords < 64)).all()
    inside = coords.float().sub(31.5).norm(dim=1)
    assert inside.min() > 15


@pytest.mark.long  # a fresh process imports everything
def test_prints_json_of_a_stage_in_a_process_of_its_own():
    arguments = ["--stage=latent", "--set=voxels=60", "--set=blocks=1", "--set=width=64", "--set=rank=2"]
    result = CliRunner().invoke(flow_step.step, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["updates"]
    assert row["voxels"] == 60 and row["loss"][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pairs=1,x"], "--pairs: expected positive numbers with commas between them, got '1,x'"),
        (["--set=width=100"], "a multiple of 64, got 100"),
    ],
)
def test_refuses_numbers_that_are_none(arguments, text):
    result = CliRunner().invoke(flow_step.step, arguments)
    assert result.exit_code == 2 and text in result.stderr
