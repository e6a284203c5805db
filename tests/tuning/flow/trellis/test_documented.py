"""The commands of docs/circular-dpo.md for a TRELLIS folder, run as they stand, on the tiny one."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.modes import flow_files as commands
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import load_pipeline
from eg3d_rlhf.tuning.flow.generate import generate
from tests.tuning.flow.trellis.tiny_trellis import NAMES, tokens

FEW = "--steps=12 --lr=0.02 --set=warmup=0 --choose-noises=0 --table-noises=2 --loop-pairs=2 --roles=reward --device=cpu".split()


class Clip:
    """In place of weights that are not on this machine."""

    def __init__(self, name, device):
        pass

    def conditions(self, texts):
        assert tuple(texts) == NAMES
        return tokens()


def documented() -> list[list[str]]:
    """Lines of the page with placeholders, without what is said beside them."""
    page = (Path(__file__).resolve().parents[4] / "docs" / "circular-dpo.md").read_text()
    lines = page.partition("## TRELLIS\n")[2].splitlines()
    return [shlex.split(re.split(r"\s{2,}", line.strip())[0])[1:] for line in lines if re.match(r"    python .*--pipeline=ROOT", line)]


def write_ranks(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rank": 1 + row["seed"]}) + "\n" for row in rows))


@pytest.mark.long
def test_from_texts_to_a_folder_that_stock_trellis_loads(trellis_root, tmp_path, monkeypatch):
    monkeypatch.setattr("eg3d_rlhf.tuning.flow.families.trellis.family.TextEncoder", Clip)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("\n".join(NAMES))
    places = {"ROOT": str(trellis_root)}
    called = []
    for program, *flags in documented():
        filled = [f"{name}={places.get(value, value)}" if "=" in flag else flag
                  for flag, (name, _, value) in ((flag, flag.partition("=")) for flag in flags)]
        done = CliRunner().invoke(*((train.main, [*filled, *FEW]) if program == "train.py" else (commands.main, filled)))
        assert done.exit_code == 0, (program, filled, done.output, done.exception)
        called.append("train" if program == "train.py" else flags[0])
        if called[-1] == "draw":
            write_ranks(tmp_path / "ASSETS" / "ranking.jsonl")
        if called[-1] == "train":
            (places["RUN"],) = map(str, (tmp_path / "runs").glob("00000-*"))
    assert called == ["conditions", "draw", "ranking", "train", "export"]
    base, tuned = (load_pipeline(root, tokens()) for root in (trellis_root, tmp_path / "TUNED"))
    for one, other in zip(base.stages, tuned.stages, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)), one.name
    assert generate(tuned, [NAMES[0]], [0])[0].means.isfinite().all()
