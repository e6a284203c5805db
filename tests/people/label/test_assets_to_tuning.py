"""From a TRELLIS folder to a tuned first stage, by the commands: assets are drawn, judged in the browser,
made into pairs, learnt from.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eg3d_rlhf.tuning.flow.conditions import CONDITIONS, write_conditions
from eg3d_rlhf.tuning.flow.pairs import read_pairs
from eg3d_rlhf.tuning.flow.work import SHOWN, Work
from tests.people.label.browser import Page, browser, needs_chromium
from tests.tuning.flow.trellis import tiny_trellis

__all__ = ["browser"]
ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, *words: str) -> str:
    """A job of the door, or train.py, in `folder`; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "eg3d_rlhf", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
@needs_chromium
def test_from_drawn_assets_to_a_tuned_first_stage(browser, tmp_path):
    root = tiny_trellis.write_trellis(tmp_path / "ROOT")
    write_conditions(tmp_path / CONDITIONS, tiny_trellis.tokens())
    run(
        tmp_path,
        "flow",
        "new",
        "WORK",
        f"--pipeline={root}",
        f"--conditions={CONDITIONS}",
        "--each=3",
        "--set=split=0.3,0.2,0.5",
        "--device=cpu",
    )
    run(tmp_path, "flow", "draw", "WORK", "--device=cpu")
    work = Work.open(tmp_path / "WORK")
    label = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tools" / "label.py"),
            "--assets=WORK/drawn/base",
            "--up=z",
            "--campaign=chairs",
            "--pairs=6",
            "--port=0",
            "--db=sqlite:///labels.db",
            "--set=cache=cache",
            *(f"--set={name}=0" for name in ("training", "gold", "repeat_share", "swap_share")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = next(line for line in label.stdout if line.startswith("label at "))
        page = Page(browser, said.split()[2].rstrip("/")).open()
        chosen = ["ArrowLeft", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowRight", "ArrowLeft"]
        for key in chosen[:-1]:
            page.press(key)
        page.answer(chosen[-1])
        page.ready("finished")
        page.sent()
        assert page.errors == [] and page.strangers == []
        page.context.close()
    finally:
        label.terminate()
        label.wait(20)
    run(
        tmp_path,
        "label",
        "export",
        "judged.jsonl",
        "--kind=asset-pairs",
        "--campaign=chairs",
        "--db=sqlite:///labels.db",
    )
    judged = lines(tmp_path / "judged.jsonl")
    assert len(judged) == 6 and sum(line["tie"] for line in judged) == 1
    assert {line["condition"] for line in judged} == set(work.names(*SHOWN))
    made = run(tmp_path, "flow", "tune", "WORK", "--labels=judged.jsonl", "--pairs-only", "--device=cpu")
    assert "pairs with a majority: 5 of stage structure, 5 of stage latent" in made
    drawn = {line["look_at"]: line for line in work.lines()}
    pairs = read_pairs(tmp_path / "WORK" / "pairs" / "structure")[0]
    first = next(line for line in judged if not line["tie"])
    preferred, rejected = (
        load_file(work.drawn() / drawn[Path(first[side]).name]["structure"])["mean"]
        for side in ("preferred", "rejected")
    )
    assert sum(pair.preferred.equal(preferred) and pair.rejected.equal(rejected) for pair in pairs) == 1
    flags = (
        "--mode=circular-dpo --stage=structure --pairs=WORK/pairs --steps=2 --batch=2 --lr=0.02"
        " --set=choose_noises=0 --set=warmup=0"
    )
    run(tmp_path, "train", f"--pipeline={root}", *flags.split(), "--set=no_summary=true", "--device=cpu")
    (stats,) = (tmp_path / "runs" / "artefacts").glob("structure-*/training/stats.jsonl")
    # which is kept, these few answers say
    assert [line["step"] for line in lines(stats)] == [0, 2] and lines(stats)[-1]["grad_norm"] > 0
    assert list((tmp_path / "runs").glob("00000-*/structure/adapter_model.safetensors"))
