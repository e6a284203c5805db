"""`flow label` in the browser, and `flow study` with answers through the store, by the commands alone."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.experiments.media.sheet import MARGIN
from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.modes.flow_study import SIDE
from eg3d_rlhf.people.label.entities import Choice
from eg3d_rlhf.tuning.flow.toy.bundled import load_network
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, TEST, Work
from tests.modes.flow_works import answer_all, flow, serving, with_encoder, write_images, write_prompts
from tests.people.label.browser import browser, needs_chromium
from tests.people.label.plans import answer_all as answer_stored
from tests.rejections import check_message
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis

__all__ = ["browser"]
pytestmark = pytest.mark.long


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    return tmp_path


@needs_chromium
def test_the_image_is_beside_the_pair_and_a_defective_asset_stops_nothing(here, browser):
    root = write_image_trellis(here / "ROOT")
    flow("new", "WORK", f"--pipeline={root}", f"--images={write_images(here / 'PICTURES')}", "--each=2")
    flow("sample", "WORK")
    work = Work.open(here / "WORK")
    seen = set()
    broken = work.lines()[0]
    (work.asset_folder() / broken["look_at"]).write_bytes(b"ply\nbroken")

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
                *(work.asset_folder() / line["look_at"] for line in work.lines() if line["condition"] == name)
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


@pytest.fixture
def answered(monkeypatch):
    """In place of a server: whoever would meet the page prefers the side that `better` gives, and answers
    everything at once. Returns the names of the campaigns that were served, and the conditions shown.
    """
    served = []
    seen = set()

    def better(left, right):
        seen.update((left.condition, right.condition))
        if ("tuned" in left.source) == ("tuned" in right.source):
            return Choice.TIE
        return Choice.LEFT if "tuned" in left.source else Choice.RIGHT

    def serve(options, *args, **kwargs):
        campaign = options.store.campaign(options.campaign)
        answer_stored(
            options.store, campaign.id, options.store.annotator_without_token("local", "admin").id, better
        )
        served.append(campaign.settings.name)

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    return served, seen


def reported(*flags) -> list[tuple[str, str]]:
    """Contests that `flow study --report` tells of: what the training is compared with, and pairs."""
    printed = flow("study", "WORK", "--report", *flags)
    return re.findall(r"^(tune-\d+) .*?\b(base|control)\b.*?(\d+ of \d+)", printed, re.M)


def test_a_study_shows_test_conditions_alone_first_against_the_base_then_against_the_control(here, answered):
    served, seen = answered
    prompts = f"--prompts={write_prompts(here / 'p.txt')}"
    flow("new", "WORK", "--pipeline=toy", prompts, "--each=2", "--set=split=0.5,0.25,0.25")
    work = Work.open(here / "WORK")
    flow("sample", "WORK")
    write_tuned(here / "WORK" / "tune-00", "voxels", 0.2)
    write_tuned(here / "WORK" / "tune-00" / "control", "voxels", 0.1)
    ask = " ".join(("eg3d-rlhf", "flow", "study", "WORK"))
    check_message(flow("study", "WORK", "--report", code=2), ("study-00", ask))
    for against in ("base", "control"):
        flow("study", "WORK", "--n=4")
        design = json.loads((here / "WORK" / "study-00" / against / "design.json").read_text())
        assert served[-1] == design["name"] == f"study-00-{against}"
        assert design["up"] == "z" and {row["prompt"] for row in design["assets"]} <= set(work.names(TEST))
        sources = {design[side]["source"].rpartition("/")[2] for side in ("a", "b")}
        assert sources == {"tuned-00", "test-base" if against == "base" else "control-00"}
    assert seen and seen <= set(work.names(TEST))
    lines = {
        name: {(line["condition"], line["seed"]) for line in work.lines(name)}
        for name in ("test-base", "tuned-00", "control-00")
    }
    assert lines["test-base"] == lines["tuned-00"] == lines["control-00"]
    assert reported() == [("tune-00", "base", "4 of 4"), ("tune-00", "control", "4 of 4")]
    with Image.open("WORK/study-00/images.png") as picture:
        shown = np.asarray(picture)[:, 110 + MARGIN :]  # rows: before, tuned, control
    rows = [shown[top : top + SIDE] for top in range(MARGIN + 4, len(shown) - SIDE, SIDE + 4)]
    assert len(rows) == 3 and all((row < 255).mean() > 0.05 for row in rows)
    assert not (rows[0] == rows[1]).all() and not (rows[1] == rows[2]).all()
    check_message(flow("study", "WORK", code=2), ("study-00", "--report"))
    write_tuned(here / "WORK" / "tune-01", "voxels", 0.3)
    # of the new training: nothing yet
    check_message(flow("study", "WORK", "--report", code=2), ("study-01", ask))
    check_message(flow("study", "WORK", "--against=control", code=2), ("--against=control", "tune-01"))
    flow("study", "WORK", "--n=2", "--gold-every=0")
    assert served[2:] == ["study-01-base"]
    design = json.loads((here / "WORK" / "study-01" / "base" / "design.json").read_text())
    assert design["gold_every"] == 0
    assert reported() == [("tune-01", "base", "2 of 2")]
    assert ("tune-00", "base", "4 of 4") in reported("--set=tune=tune-00")
