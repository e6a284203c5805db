"""The known failure of the loop: its pairs are told apart at once, and a third step without anchors runs away. It is seen and stopped."""

from dataclasses import replace

import pytest

from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.tuning.flow.circular.loop import CircularLoop
from eg3d_rlhf.tuning.flow.generate import crossed, scores, wins
from eg3d_rlhf.tuning.flow.toy.bundled import TOY_DEFAULTS, toy_problem


@pytest.mark.long
def test_an_unanchored_third_step_at_a_small_beta_is_caught(tmp_path):
    problem = toy_problem()
    loose = replace(TOY_DEFAULTS.loop, dpo=replace(TOY_DEFAULTS.loop.dpo, beta=20.0, loser_weight=1.0, sft_weight=0.0), steps=400)
    settings = replace(TOY_DEFAULTS, loop=replace(loose, held_out_every=25))
    loop = CircularLoop(problem=problem, settings=settings, store=Store(tmp_path), say=lambda line: None)
    lines = {"voxels": (loop.from_people("voxels"),)}
    pairs = loop.pairs("structure", lines)
    guarded = loop.from_loop("structure", pairs, lines)
    record, rates = guarded.record, dict(guarded.record["win_rates"])
    assert any(warning.startswith(("separated", "collapse", "past-best")) for warning in record["warnings"]), record["warnings"]
    assert max(rates) < loose.steps  # stopped
    assert rates[record["kept_step"]] == max(rates.values()) >= 0.5

    free = CircularLoop(problem=problem, settings=replace(settings, choosing=None), store=Store(tmp_path), say=lambda line: None)
    last = free.from_loop("structure", pairs, lines)
    assert last.record["kept_step"] == loose.steps
    conditions, seeds = crossed(problem.held_out_conditions, 8, seed=99)
    kept, runaway = (
        scores(problem.pipeline, problem.chooser, conditions, seeds, loop.models({**lines, "structure": (one,)}), batch=96)
        for one in (guarded, last)
    )
    assert float(wins(kept, runaway).mean()) > 0.6
