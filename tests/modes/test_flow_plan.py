"""`flow plan`, whose number of pairs is compared with simulated tests, and `flow status`, whose next command
is compared with the steps of a folder.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from eg3d_rlhf.core.statistics import clustered_rate
from eg3d_rlhf.models.policies import META
from eg3d_rlhf.modes.flow_next import next_command
from eg3d_rlhf.modes.flow_plan import CARD_NAMES
from eg3d_rlhf.people.label.entities import LOCAL, Choice
from eg3d_rlhf.tuning.flow.workspace.answers import splits_of
from eg3d_rlhf.tuning.flow.workspace.estimate import Row
from eg3d_rlhf.tuning.flow.workspace.plan import (
    CARDS,
    PROMPT_CORRELATION,
    SHARE_OF_PEAK,
    Plan,
    estimate_times,
    held_out_pairs,
    label_goal,
    make_plan,
)
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, Work
from tests.modes.flow_works import flow, with_encoder, write_images, write_prompts
from tests.people.label.plans import answer_all
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis

NAMES = [f"{colour} {shape}" for shape in ("ball", "box") for colour in ("red", "green", "blue")]


@pytest.fixture
def work(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", NAMES)
    new = ("--pipeline=toy", f"--prompts={prompts}", "--each=3", "--device=cpu")
    flow("new", tmp_path / "WORK", *new, "--set=split=0.3,0.5,0.2")
    return Work.open(tmp_path / "WORK")


def passed(accuracy: float, pair_count: int, prompt_count: int, studies: int = 400) -> float:
    """Share of simulated tests whose interval is above one half. The accuracies of the prompts have a beta
    distribution, so that the outcomes of a prompt have the correlation PROMPT_CORRELATION.
    """
    generator = np.random.default_rng(0)
    strength = 1 / PROMPT_CORRELATION - 1  # a + b of the beta distribution
    prompts = np.arange(pair_count) % prompt_count
    count = 0
    for _ in range(studies):
        rates = generator.beta(accuracy * strength, (1 - accuracy) * strength, prompt_count)
        outcomes = generator.random(pair_count) < rates[prompts]
        count += clustered_rate(outcomes.astype(float), prompts.tolist()).lo > 0.5
    return count / studies


@pytest.mark.parametrize(("accuracy", "prompts"), [(0.7, 25), (0.7, 8), (0.6, 40)])
def test_the_number_of_pairs_has_the_stated_power(accuracy, prompts):
    pairs = held_out_pairs(accuracy, prompts, 0.05)
    assert 0.73 <= passed(accuracy, pairs, prompts) <= 0.93
    # a third of the pairs shows it less often, and equal labels pass in at most 5 % of the tests
    assert passed(accuracy, pairs // 3, prompts) < 0.65
    assert passed(0.5, pairs, prompts) < 0.06


def test_too_few_inputs_are_said_with_the_number_that_is_enough(work):
    goal = label_goal(work, 0.6)
    assert goal.pairs is None and goal.prompts == 2 and goal.least_inputs > len(work.names())
    # the number of prompts grows with the number of inputs
    splits = {split: work.names(split) for split in work.splits}
    factor = -(-goal.least_inputs // len(work.names()))
    larger = {
        split: tuple(f"{name} {i}" for name in names for i in range(factor))
        for split, names in splits.items()
    }
    assert label_goal(replace(work, splits=larger), 0.6).pairs is not None
    assert held_out_pairs(0.7, 2, 0.05) is None  # fewer prompts than a test needs


def test_the_plan_counts_what_the_steps_make(work):
    plan = make_plan(work)
    shown = work.names(*SHOWN)
    assert (plan.assets, plan.most_pairs) == (3 * len(shown), 3 * len(shown))
    assert plan.study_assets == 3 * 3 * len(work.names("test"))
    assert len(splits_of(work, shown)[2]) == plan.goals[0].prompts
    figures = json.loads(flow("plan", work.folder, "--json"))
    assert figures["assets"] == plan.assets and figures["bytes_per_asset"] is None
    assert figures["seconds_per_pair"] == 8 and figures["times"] is None
    assert json.loads(flow("plan", work.folder, "--json", "--seconds=3"))["seconds_per_pair"] == 3
    flow("sample", work.folder, "--device=cpu")
    total = sum(path.stat().st_size for path in work.asset_folder().iterdir() if path.name.startswith("0000"))
    figures = json.loads(flow("plan", work.folder, "--json"))
    assert figures["bytes_per_asset"] == pytest.approx(total / plan.assets)
    assert flow("plan", work.folder).splitlines()[-1] == f"next: {figures['next']}"


def test_times_are_operations_divided_by_the_rate():
    shared = {"batch": 1, "precision": "bfloat16", "dtype": "float32", "bytes": 0}
    rows = [
        Row(stage=stage, what=what, recompute=recompute, flops=flops, seconds=flops / 1e12, **shared)
        for stage, flops in (("a", 3e12), ("b", 5e12))
        for what, recompute in (("sample", False), ("lora", False), ("lora", True))
    ]
    plan = make_plan_of(10, 6)
    times = estimate_times(plan, rows, card=None, steps=100, batch=4, stages=("b",))
    assert times.sample == pytest.approx(10 * 8) and times.study == pytest.approx(6 * 8)
    assert times.tune == pytest.approx(2 * 100 * 4 * 5)
    on_card = estimate_times(plan, rows, card="a100", steps=100, batch=4, stages=("b",))
    assert on_card.sample == pytest.approx(10 * 8e12 / (SHARE_OF_PEAK * 312e12))
    assert set(CARD_NAMES) == set(CARDS)


def make_plan_of(assets: int, study_assets: int) -> Plan:
    return Plan(assets=assets, study_assets=study_assets, most_pairs=0, goals=())


@pytest.mark.long
def test_a_card_is_faster_than_another_in_proportion(tmp_path, monkeypatch):
    with_encoder(tmp_path, monkeypatch)
    root = write_image_trellis(tmp_path / "ROOT")
    images = write_images(tmp_path / "PICTURES")
    flow("new", tmp_path / "WORK", f"--pipeline={root}", f"--images={images}", "--each=2")
    slow, fast = (
        json.loads(flow("plan", tmp_path / "WORK", f"--card={card}", "--json"))["times"]
        for card in ("l4", "h100")
    )
    assert slow["sample"] / fast["sample"] == pytest.approx(989 / 121)
    assert slow["sample"] == pytest.approx(12 * slow["asset_operations"] / slow["rate"])
    assert slow["update_operations"] > 0
    assert "h100" in flow("plan", tmp_path / "WORK", "--card=h100")


def command(*words: object) -> str:
    """Return a flow command as it is printed."""
    return " ".join(["eg3d-rlhf", "flow", *map(str, words)])


def test_the_next_command_follows_the_steps(work, monkeypatch):
    folder = work.folder

    def last(printed: str) -> str:
        return printed.splitlines()[-1]

    assert last(flow("status", folder)) == "next: " + command("sample", folder)
    assert last(flow("sample", folder, "--device=cpu")) == "next: " + command("label", folder)
    assert "15 of 15" in flow("status", folder)
    few = {"most": 5}  # three practice pairs, and two pairs

    def serve(options, *args, on_listening, **kwargs):
        on_listening("http://nowhere")
        store = options.store
        person = store.annotator_without_token(LOCAL, "admin").id
        campaign = store.campaign(options.campaign)
        answer_all(store, campaign.id, person, lambda a, b: Choice.LEFT, **few)

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    flow("label", folder, "--pairs=9")
    status = flow("status", folder)
    assert (
        "2 of 9" in status
        and last(status) == "next: " + command("label", folder)
        and command("tune", folder) in status
    )
    few.clear()
    flow("label", folder, "--pairs=9")
    assert "9 of 9" in flow("status", folder)
    assert next_command(work) == command("tune", folder)
    assert last(flow("tune", folder, "--pairs-only")) == "next: " + command("tune", folder)
    # a training that was stopped, then one without and one with a learnable signal
    tune = folder / "tune-00"
    tune.mkdir()
    assert next_command(work) == command("tune", folder)
    report = {"stages": {"structure": {"learnable_signal": False}, "voxels": {"learnable_signal": True}}}
    (tune / "report.json").write_text(json.dumps(report))
    assert next_command(work) == command("label", folder, "--set", "campaign=more-2")
    (tune / "voxels").mkdir()
    (tune / "voxels" / META).write_text("{}")
    status = flow("status", folder)
    assert "structure no learnable signal" in status and "voxels learnable signal" in status
    assert last(status) == "next: " + command("study", folder)
