"""A tiny TRELLIS's structure stage, tuned by `solid`, and its table beside the best of n and what only looks
sound.

Its weights are random, so nothing here says that tuning helps: only that both commands run on the released
layout, that every row is there, and that the bound on fidelity counts, whatever looks sound.
"""

import json
import math

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.evaluation.solids import CONTROLS
from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.families.opening import split_prompts
from eg3d_rlhf.tuning.flow.training.settings import ArmsSource
from tests.tuning.flow.families.trellis.tiny_trellis import tokens, write_trellis

NAMES = tuple(
    f"a {colour} {shape}"
    for colour in ("red", "blue", "green", "grey")
    for shape in ("chair", "lamp", "tree", "house", "boat")
)
FEW = (
    "--mode=online --stage=structure --reward=solid --steps=4 --batch=2 --group=4 --lr=0.01 --lora-rank=4"
    " --set=warmup=0 --device=cpu"
)


@pytest.mark.long
def test_the_structure_stage_is_tuned_and_held_against_controls(tmp_path):
    root = write_trellis(tmp_path / "TRELLIS-text-tiny")
    write_conditioning(tmp_path / "conditioning.safetensors", tokens(NAMES))
    known = f"--conditioning={tmp_path / 'conditioning.safetensors'}"
    flags = [f"--pipeline={root}", known, f"--outdir={tmp_path / 'runs'}", "--table-noises=2"]
    done = CliRunner().invoke(train.main, [*FEW.split(), *flags])
    assert done.exit_code == 0, (done.output, done.exception)
    (run,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line) for line in (run / "nft-0" / "stats.jsonl").read_text().splitlines()]
    assert steps and all(0 <= line["reward/solid"] <= 1 for line in steps)

    path = tmp_path / "solid.json"
    done = CliRunner().invoke(
        main, ["report", "solid", str(run), f"--pipeline={root}", "--n=16", "--device=cpu", f"--out={path}"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(path.read_text())
    held = split_prompts(NAMES, ArmsSource.seed, ArmsSource.held_out)[2]
    assert (
        found["what"].startswith(f"{len(held)} ")
        and f" x {16 // len(held)} " in found["what"]
        and "structure" in found["what"]
    )
    lines = found["lines"]
    assert list(lines) == ["untuned", run.name, "best of 4", *CONTROLS]
    assert all(f"| {name} |" in done.output for name in lines)
    numbers = [
        value
        for line in lines.values()
        for row in line.values()
        for value in (row if isinstance(row, list) else [row])
    ]
    assert all(map(math.isfinite, numbers))
    assert all("change" in lines[name] for name in (run.name, *CONTROLS))
    untuned = lines["untuned"]
    blob = lines["ball of its volume"]
    assert lines["best of 4"]["reward"] >= untuned["reward"] > 0
    assert blob["closed"] == 1 and blob["solid"] > untuned["solid"], "a ball looks sounder"
    assert blob["fidelity"] < 0.75 and blob["change_ci95"][1] < 0, "and is not called better"
    assert all(line["reward"] <= line["solid"] for line in lines.values())

    done = CliRunner().invoke(main, ["report", "solid", f"--pipeline={root}", "--n=4", "--device=cpu"])
    assert done.exit_code == 2 and "--conditioning" in done.stderr and "Traceback" not in done.output
