"""`flow label` and `flow study` in the browser, by the commands alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.experiments.media.sheet import MARGIN
from eg3d_rlhf.models.lora import LoraConfig, add_lora, lora_parameters
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.modes.flow_study import SIDE
from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.work import SHOWN, TEST, Work
from tests.modes.flow_works import answer_all, flow, serving, with_encoder, write_pictures, write_prompts
from tests.people.label.browser import browser, needs_chromium
from tests.tuning.flow.trellis.tiny_trellis import write_image_trellis

__all__ = ["browser"]
pytestmark = [pytest.mark.long, needs_chromium]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    return tmp_path


def test_the_picture_is_beside_the_pair_and_one_broken_asset_stops_nothing(here, browser):
    root = write_image_trellis(here / "ROOT")
    flow("new", "WORK", f"--pipeline={root}", f"--pictures={write_pictures(here / 'PICTURES')}", "--each=2")
    flow("draw", "WORK")
    work = Work.open(here / "WORK")
    seen = set()
    broken = work.lines()[0]
    (work.drawn() / broken["look_at"]).write_bytes(b"ply\nbroken")

    with serving(browser, "WORK", job="label", cwd=here) as page:
        assert page.page.locator("#promptImage").evaluate("image => image.naturalWidth") == 50

        def first_seed(left, right):
            seen.update((left.condition, right.condition))
            return left.seed < right.seed

        asked = answer_all(page, work.database, first_seed)
    labels = work.labels()
    assert asked >= labels.pairs == 5  # of six conditions of two assets each, one has a broken one
    assert seen == set(work.names(*SHOWN)) - {broken["condition"]} | ({broken["condition"]} & seen)
    assert not seen & set(work.names(TEST))
    assert all(
        by == 0 or to == 0
        for by, to in (
            labels.votes(
                *(work.drawn() / line["look_at"] for line in work.lines() if line["condition"] == name)
            )
            for name in work.names(*SHOWN)
        )
    )


def write_tuned(folder, stage, scale):
    """Adapters of random numbers, as a training leaves them."""
    model = load_network(stage)
    add_lora(model, LoraConfig(rank=2, targets=("to_qkv", "to_out")), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    save_policy(model, folder / stage, {"step": 1})


def test_a_study_shows_test_conditions_alone_first_against_the_base_then_against_the_control(here, browser):
    flow(
        "new",
        "WORK",
        "--pipeline=toy",
        f"--prompts={write_prompts(here / 'p.txt')}",
        "--each=2",
        "--set=split=0.5,0.25,0.25",
    )
    work = Work.open(here / "WORK")
    flow("draw", "WORK")
    write_tuned(here / "WORK" / "tune-00", "voxels", 0.2)
    write_tuned(here / "WORK" / "tune-00" / "control", "voxels", 0.1)
    assert "expected answers, got none" in flow("study", "WORK", "--report", code=2)
    for against in ("base", "control"):
        seen = set()
        with serving(browser, "WORK", "--n=4", job="study", cwd=here) as page:
            database = f"sqlite:///{here}/WORK/study-00/{against}/study.db"

            def tuned(left, right, seen=seen):
                seen.update((left.condition, right.condition))
                return (
                    "tuned" in left.source if ("tuned" in left.source) != ("tuned" in right.source) else None
                )

            assert "tuned" not in page.page.evaluate("document.body.innerText").lower()  # blind
            answer_all(page, database, tuned)
        assert seen <= set(work.names(TEST))
        design = json.loads((here / "WORK" / "study-00" / against / "design.json").read_text())
        assert design["up"] == "z" and {row["prompt"] for row in design["assets"]} <= set(work.names(TEST))
        sources = {design[side]["source"].rpartition("/")[2] for side in ("a", "b")}
        assert sources == {"tuned-00", "test-base" if against == "base" else "control-00"}
    lines = {
        name: {(line["condition"], line["seed"]) for line in work.lines(name)}
        for name in ("test-base", "tuned-00", "control-00")
    }
    assert lines["test-base"] == lines["tuned-00"] == lines["control-00"]
    said = flow("study", "WORK", "--report")
    assert "tune-00 against base: 4 of 4 pairs" in said and "tune-00 against control: 4 of 4 pairs" in said
    assert "WORK/study-00/pictures.png" in said
    with Image.open("WORK/study-00/pictures.png") as picture:
        shown = np.asarray(picture)[:, 110 + MARGIN :]  # rows: before, tuned, control
    rows = [shown[top : top + SIDE] for top in range(MARGIN + 4, len(shown) - SIDE, SIDE + 4)]
    assert len(rows) == 3 and all((row < 255).mean() > 0.05 for row in rows)
    assert not (rows[0] == rows[1]).all() and not (rows[1] == rows[2]).all()
    assert "over" in flow("study", "WORK", code=2)
    write_tuned(here / "WORK" / "tune-01", "voxels", 0.3)
    assert "no control" not in flow("study", "WORK", "--report", code=2)  # of the new training: nothing yet
    assert "expected a control" in flow("study", "WORK", "--against=control", code=2)
    with serving(browser, "WORK", "--n=2", job="study", cwd=here) as page:
        answer_all(page, f"sqlite:///{here}/WORK/study-01/base/study.db", lambda left, right: None)
    assert "tune-01 against base: 2 of 2" in flow("study", "WORK", "--report")
    assert "tune-00 against base: 4 of 4" in flow("study", "WORK", "--report", "--set=tune=tune-00")
