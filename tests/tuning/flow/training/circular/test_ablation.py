"""Test the nine groups of the ablation: their trainings, the steps that they share, and the numbers of their
table.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import rate, with_interval, write
from eg3d_rlhf.tuning.flow.base.evaluation import evaluate, spread
from eg3d_rlhf.tuning.flow.base.settings import Evaluation
from eg3d_rlhf.tuning.flow.training.circular import ablation, circular_loop
from eg3d_rlhf.tuning.flow.training.circular.ablation import Ablation, tabled
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop
from eg3d_rlhf.tuning.flow.training.circular.settings import ARMS, GROUPS, AblationPlan, parse_groups
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from tests.rejections import raising
from tests.tuning.flow.tiny_problem import HELD_OUT, SETTINGS, full, tiny_problem

EVALUATION = Evaluation(per_condition=3, batch=8)


def test_letters():
    assert (
        parse_groups("a..i") == list("abcdefghi")
        and parse_groups("d") == ["d", "i"]
        and parse_groups("a..c, e") == list("abcei")
    )
    assert parse_groups("regulariser,d,a") == ["a", "d", "i", "regulariser"] and parse_groups("a..i") == list(
        GROUPS
    )
    for wrong in ("", "j", "a..regulariser", "winners", "c..a", "a.d", "a..z", "A"):
        with raising("a..i", repr(wrong)):
            parse_groups(wrong)


def test_tasks_wait_for_what_groups_share():
    tasks = AblationPlan(seeds=(0, 1)).tasks()
    assert list(tasks)[:2] == ["0/people/last", "1/people/last"]  # what most others wait for
    assert tasks["0/pairs"] == ["0/people/last"] and tasks["1/a"] == tasks["1/g"] == tasks["1/h"] == [
        "1/people/last",
        "1/pairs",
    ]
    assert (
        tasks["0/b"] == ["0/people/last", "0/people/first"]
        and tasks["0/c"] == ["0/people/first"]
        and tasks["0/d"] == ["0/people/last"]
    )
    assert (
        tasks["0/e"] == ["0/supervised/first"]
        and tasks["0/f"] == ["0/supervised/last"]
        and tasks["0/i"] == []
    )
    assert "1/i" not in tasks and len(tasks) == 2 * (5 + 8) + 1
    assert {
        name: needs
        for name, needs in AblationPlan(groups=("i", *ARMS), seeds=(0,)).tasks().items()
        if name[2:] in ARMS
    } == {f"0/{arm}": ["0/people/last", "0/pairs"] for arm in ARMS}
    assert set(AblationPlan(groups=("c", "i"), seeds=(0,)).tasks()) == {"0/people/first", "0/c", "0/i"}


def halfway(assets, prompts):
    """Return a reward that is not always higher for the tuned network."""
    return -(full(assets, prompts) - 0.48).abs()


def test_arms_differ_from_the_loop_in_what_the_first_stage_learns_alone(tmp_path, monkeypatch):
    """All arms start from the same networks and noises, and the table compares each arm with group (a)."""
    plan = AblationPlan(groups=("a", "i", *ARMS), seeds=(0,), evaluation=Evaluation(per_condition=2, batch=8))
    calls = []
    problem = tiny_problem(reward=halfway)

    def watched(conditioned, pairs, config, out, **options):
        calls.append((conditioned.stage.name, pairs, config))
        return train_stage(conditioned, pairs, config, out, **options)

    monkeypatch.setattr(circular_loop, "train_stage", watched)
    loop = CircularLoop(problem=problem, settings=SETTINGS, store=Store(tmp_path), say=lambda line: None)
    results = run_tasks(plan.tasks(), lambda: Ablation(plan=plan, loop_of=lambda seed: loop), [], 1, None)
    assert [stage for stage, _, _ in calls] == ["voxels"] + 6 * ["structure"]
    (_, pairs, config), *arms = calls[1:]
    regulariser, randomised, inverted, winners, people = arms
    assert len({results[f"0/{name}"]["trainings"]["structure"]["artefact"] for name in ("a", *ARMS)}) == 6

    def same(a, b):
        return torch.equal(a.preferred, b.preferred) and torch.equal(a.rejected, b.rejected)

    for _, own, _ in (regulariser, winners):
        assert all(same(p, q) and p.w2 == q.w2 for p, q in zip(own, pairs, strict=True))
    assert (regulariser[2].dpo.beta, regulariser[2].dpo.sft_weight) == (
        1e-6,
        config.dpo.sft_weight,
    ) and winners[2].dpo.kind == "sft"
    assert all(
        torch.equal(p.preferred, q.rejected) and p.w2 == q.w2 for p, q in zip(inverted[1], pairs, strict=True)
    )
    order = [same(p, q) for p, q in zip(randomised[1], pairs, strict=True)]
    assert 0 < sum(order) < len(order)
    assert all(
        same(p, q) or torch.equal(p.preferred, q.rejected) for p, q in zip(randomised[1], pairs, strict=True)
    )
    origins = {p.provenance["human_pair"] for p in pairs}
    assert {p.id for p in people[1]} == origins and {p.source for p in people[1]} == {"human"}
    for _, _, own in (randomised, inverted, people):
        assert own == config
    data = tabled(results, plan, {})
    assert list(data["groups"]) == ["a", "i", *ARMS] and {f"a_vs_{arm}" for arm in ARMS} <= set(
        data["pairwise"]
    )
    assert (
        "| (people_first) |" in ablation.markdown(data)
        and len(ablation.plot(data).axes[1].get_yticklabels()) == 6
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run all nine groups with two seeds; return results, plan, calls of train_stage, and the worker."""
    folder = tmp_path_factory.mktemp("ablation")
    calls = []
    plan = AblationPlan(seeds=(0, 1), evaluation=EVALUATION)
    problem = tiny_problem(reward=halfway)

    def loop_of(seed):
        return CircularLoop(
            problem=problem, settings=replace(SETTINGS, seed=seed), store=Store(folder), say=lambda line: None
        )

    def counted(conditioned, pairs, config, out, **options):
        stage = conditioned.stage.name
        calls.append(
            (config.seed, stage, pairs[0].source, config.dpo.kind, len(pairs), pairs[0].w2 is not None)
        )
        return train_stage(conditioned, pairs, config, out, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(circular_loop, "train_stage", counted)
    handler = Ablation(plan=plan, loop_of=loop_of)
    results = run_tasks(plan.tasks(), lambda: handler, [], 1, folder)
    yield results, plan, calls, handler
    patch.undo()


def test_groups_train_what_they_should_and_share_it(whole):
    results, plan, calls, _ = whole
    own = [call[1:] for call in calls if call[0] == 0]
    # two stages by people, two supervised, and the loop with both, without w1, without w2
    assert len(own) == 7 and len(calls) == 14
    assert [(stage, kind) for stage, source, kind, _, _ in own if source == "human"] == [
        ("voxels", "sigmoid"),
        ("voxels", "sft"),
        ("structure", "sigmoid"),
        ("structure", "sft"),
    ]
    looped = {(n, weighed) for _, source, _, n, weighed in own if source == "loop"}
    kept = min(n for n, _ in looped)
    all_changed = max(n for n, _ in looped)
    assert looped == {(kept, True), (all_changed, True), (kept, False)} and kept < all_changed

    def content(letter):
        return {
            stage: row["artefact"]
            for stage, row in (results[f"0/{letter}"]["trainings"] if letter != "i" else {}).items()
        }

    a, b, c, d = (content(letter) for letter in "abcd")
    assert a["voxels"] == b["voxels"] == d["voxels"] == content("g")["voxels"] == content("h")["voxels"]
    assert (
        b["structure"] == c["structure"]
        and set(c) == {"structure"}
        and set(d) == {"voxels"}
        and content("i") == {}
    )
    assert set(content("e")) == {"structure"} and set(content("f")) == {"voxels"}
    assert len({one["structure"] for one in (a, b, content("e"), content("g"), content("h"))}) == 5


def test_the_table_in_json_markdown_and_figure(whole, tmp_path):
    results, plan, _, _ = whole
    paths = write(tabled(results, plan, {}), tmp_path, "ablation", ablation.markdown, ablation.plot)
    assert [path.name for path in paths] == ["ablation.json", "ablation.md", "ablation.png"]
    data = json.loads(paths[0].read_text())
    assert set(data["groups"]) == set(GROUPS) and data["conditions"] == len(HELD_OUT) and data["noises"] == 3
    for group in data["groups"].values():
        low, high = group["ci95"]
        assert 0 <= low <= group["win_rate"] <= high <= 1 and [s["seed"] for s in group["seeds"]] == [0, 1]
        assert set(group["parts"]) == {"filled", "value"} and set(group["evaluators"]) == {
            "final",
            "chooser",
            "reward",
        }
        assert set(group["spread"]) == {"structure", "score"}
    assert data["groups"]["i"]["win_rate"] == 0.5 and data["groups"]["i"]["ci95"] == [0.5, 0.5]
    assert data["groups"]["i"]["spread"]["structure"]["of_base"] == 1
    assert len(data["pairwise"]) == 36 and {"a_vs_d", "a_vs_b", "a_vs_c", "a_vs_i"} <= set(data["pairwise"])
    assert data["pairwise"]["a_vs_i"] == {k: data["groups"]["a"][k] for k in ("win_rate", "ci95", "seeds")}
    text = paths[1].read_text()
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("|")]
    assert all(f"({letter})" in rows for letter in GROUPS if len(letter) == 1)
    rated = with_interval(data["pairwise"]["a_vs_d"])
    assert any("(a)" in line and "(d)" in line and rated in line for line in text.splitlines())
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_rates_are_means_over_paired_assets_with_intervals_over_conditions():
    rng = np.random.default_rng(0)
    a = rng.normal(0.4, 1, (2, 30, 5))
    b = rng.normal(0, 1, (2, 30, 5))
    one = rate(a, b, [3, 4])
    won = a > b
    assert one["win_rate"] == pytest.approx(won.mean()) and one["ci95"][0] < one["win_rate"] < one["ci95"][1]
    assert [s["seed"] for s in one["seeds"]] == [3, 4] and one["seeds"][1]["win_rate"] == pytest.approx(
        won[1].mean()
    )
    other = rate(b, a, [3, 4])
    assert other["win_rate"] == pytest.approx(1 - one["win_rate"])
    assert rate(a, a, [3, 4])["ci95"] == [0.5, 0.5]
    spread_out = won.mean(axis=(0, 2))  # the interval is of 30 conditions, not of 300 assets
    assert one["ci95"][1] - one["ci95"][0] == pytest.approx(2 * 1.96 * spread_out.std() / 30**0.5, rel=0.15)


def test_evaluators_see_the_same_noises_whatever_the_generator():
    problem = tiny_problem()
    found = evaluate(problem, {}, EVALUATION)
    assert found == evaluate(problem, {}, replace(EVALUATION, batch=100))
    assert found["conditions"] == list(HELD_OUT) and np.shape(found["scores"]["final"]) == (2, 3)
    assert np.allclose(2 * np.array(found["scores"]["filled"]), found["scores"]["final"])
    assert set(evaluate(replace(problem, final=None), {}, EVALUATION)["scores"]) == set(found["scores"]) - {
        "final"
    }
    broken = replace(problem, final=lambda assets, conditions: problem.final(assets, conditions) / 0)
    with raising("final", "inf"):
        evaluate(broken, {}, EVALUATION)


def test_spread_of_equal_latents_is_zero():
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert spread([x, x, x]) == 0 and spread([x, x + 1]) == pytest.approx(0.5**0.5)
