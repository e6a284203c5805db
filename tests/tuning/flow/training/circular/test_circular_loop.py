"""Test the loop: what each step trains and on which pairs, what stays unchanged, and what a stopped or
changed run repeats.
"""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes.circular_dpo import TOY_RUN
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, read_pairs
from eg3d_rlhf.tuning.flow.base.sampling import crossed, scores, wins
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training.circular import circular_loop
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop, run_loop
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import SAME, NoPairsError, select_and_weigh
from eg3d_rlhf.tuning.flow.training.circular.settings import Weighing, with_regulariser
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from tests.rejections import raising
from tests.tuning.flow.tiny_problem import HUMAN, SETTINGS, tiny_problem


@pytest.fixture
def trained(monkeypatch):
    """Return the calls of train_stage as (stage, source of the pairs, config)."""
    calls = []

    def counted(conditioned, pairs, config, out, **options):
        calls.append((conditioned.stage.name, pairs[0].source, config))
        return train_stage(conditioned, pairs, config, out, **options)

    monkeypatch.setattr(circular_loop, "train_stage", counted)
    return calls


def loop_in(folder, problem=None, settings=SETTINGS) -> CircularLoop:
    quiet = {"say": lambda line: None}
    return CircularLoop(problem=problem or tiny_problem(), settings=settings, store=Store(folder), **quiet)


def state(module: torch.nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_three_steps_from_back_to_front_that_leave_the_base_alone(tmp_path, trained):
    loop = loop_in(tmp_path)
    before = {stage.name: state(stage.model) for stage in loop.problem.pipeline.stages}
    lines, steps = run_loop(loop)
    assert [(s["step"], s["stage"]) for s in steps] == [
        ("people", "voxels"),
        ("pairs", "structure"),
        ("loop", "structure"),
    ]
    assert [(stage, source) for stage, source, _ in trained] == [("voxels", "human"), ("structure", "loop")]
    for stage in loop.problem.pipeline.stages:
        assert equal(before[stage.name], state(stage.model))
    assert {k: len(v) for k, v in lines.items()} == {"voxels": 1, "structure": 1}
    only_last = loop.models({"voxels": lines["voxels"]})
    assert set(only_last) == {"voxels"}  # the first step has nothing to say of the structure


def test_artefacts_keep_their_names(tmp_path):
    """The hashes were recorded at commit 52ebe99.

    If they changed, every network of every user would be trained again.
    """
    loop = loop_in(tmp_path)
    made = [loop.from_people("voxels"), loop.from_people("structure", supervised=True)]
    names = ["voxels-human-7d10d09826d8875d", "structure-human-fc1ae42c868803ab"]
    assert [artefact.folder.name for artefact in made] == names


def test_a_later_round_with_nothing_to_learn_from_ends_the_loop(tmp_path, monkeypatch):
    kept = []

    def scarce(pairs, weighing):
        kept.append(len(pairs))
        if len(kept) == 1:
            return select_and_weigh(pairs, weighing)
        raise NoPairsError("loop: expected pairs to learn from, got none.")

    monkeypatch.setattr(circular_loop, "select_and_weigh", scarce)
    said = []
    loop = replace(loop_in(tmp_path, settings=replace(SETTINGS, rounds=3)), say=said.append)
    lines, steps = run_loop(loop)
    assert {stage: len(line) for stage, line in lines.items()} == {"voxels": 1, "structure": 1} and steps[-1][
        "round"
    ] == 2
    (warning,) = [line for line in said if line.startswith("Warning: ")]
    assert "round 2" in warning and "round 1" in warning


def test_a_loop_that_finds_nothing_keeps_the_tuned_last_stage(tmp_path, monkeypatch):
    def nothing(pairs, weighing):
        raise NoPairsError("loop: expected pairs to learn from, got none.")

    monkeypatch.setattr(circular_loop, "select_and_weigh", nothing)
    said = []
    lines, steps = run_loop(replace(loop_in(tmp_path), say=said.append))
    assert list(lines) == ["voxels"] and [step["step"] for step in steps] == ["people", "pairs"]
    (warning,) = [line for line in said if line.startswith("Warning: ")]
    assert "voxels" in warning and "structure" not in warning


def test_a_stopped_run_goes_on_with_the_step_it_was_in(tmp_path, trained, monkeypatch):
    whole, _ = run_loop(loop_in(tmp_path / "whole"))
    stopped = loop_in(tmp_path / "stopped")
    monkeypatch.setattr(stopped, "from_loop", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_loop(stopped)
    trained.clear()
    lines, _ = run_loop(loop_in(tmp_path / "stopped"))
    assert [stage for stage, _, _ in trained] == ["structure"]
    assert {k: [a.content for a in v] for k, v in lines.items()} == {
        k: [a.content for a in v] for k, v in whole.items()
    }


def test_what_does_not_depend_on_a_changed_setting_is_kept(tmp_path, trained):
    run_loop(loop_in(tmp_path))
    trained.clear()
    _, steps = run_loop(loop_in(tmp_path, settings=replace(SETTINGS, loop=replace(SETTINGS.loop, lr=0.01))))
    assert [stage for stage, _, _ in trained] == ["structure"]
    run_loop(loop_in(tmp_path, settings=replace(SETTINGS, weighing=Weighing(use_w2=False))))
    assert [stage for stage, _, _ in trained] == ["structure", "structure"]
    run_loop(loop_in(tmp_path, settings=replace(SETTINGS, seed=1)))
    assert [stage for stage, _, _ in trained[2:]] == ["voxels", "structure"]
    run_loop(loop_in(tmp_path, problem=tiny_problem(identity={"problem": "another"})))
    assert len(trained) == 6


def test_memory_and_checkpoints_are_no_part_of_a_result(tmp_path, trained):
    run_loop(loop_in(tmp_path))
    changed = {"batch_gpu": 2, "checkpoint_every": 1}
    run_loop(
        loop_in(
            tmp_path,
            settings=replace(
                SETTINGS, human=replace(HUMAN, **changed), loop=replace(SETTINGS.loop, **changed)
            ),
        )
    )
    assert len(trained) == 2


def test_a_second_round_starts_from_the_first(tmp_path, trained, monkeypatch):
    sides = []
    original = circular_loop.make_in_chunks

    def watched(folder, make, *args, **options):
        sides.append(
            (state(make.tuned_models["voxels"]), {k: state(v) for k, v in make.reference_models.items()})
        )
        return original(folder, make, *args, **options)

    monkeypatch.setattr(circular_loop, "make_in_chunks", watched)
    loop = loop_in(tmp_path, settings=replace(SETTINGS, rounds=2))
    lines, steps = run_loop(loop)
    assert [s["round"] for s in steps] == [1, 1, 1, 2, 2, 2] and {k: len(v) for k, v in lines.items()} == {
        "voxels": 2,
        "structure": 2,
    }
    (_, un_first), (op_second, un_second) = sides
    assert un_first == {}  # the base
    assert equal(un_second["voxels"], state(loop.models({"voxels": lines["voxels"][:1]})["voxels"]))
    assert equal(op_second, state(loop.models(lines)["voxels"]))
    assert [stage for stage, _, _ in trained] == ["voxels", "structure"] * 2


def test_every_round_has_noises_of_its_own(tmp_path, trained):
    """The seeds of the first round are those of a run of one round.

    All seeds of the second round, of samples and of trainings, differ from them.
    """
    one, _ = run_loop(loop_in(tmp_path / "one"))
    trained.clear()
    loop = loop_in(tmp_path / "two", settings=replace(SETTINGS, rounds=2))
    two, steps = run_loop(loop)
    assert {k: v[0].content for k, v in two.items()} == {k: v[0].content for k, v in one.items()}
    made = [loop.store.root / step["artefact"] / "pairs" for step in steps if step["step"] == "pairs"]
    first, second = ({p.provenance["noise_seed"] for p in read_pairs(place)[0]} for place in made)
    assert len(first) == len(second) == 24 and not first & second
    assert (
        len({config.seed for _, _, config in trained[:2]})
        == len({config.seed for _, _, config in trained[2:]})
        == 1
    )
    assert trained[0][2].seed == SETTINGS.seed != trained[2][2].seed
    assert len({step["artefact"] for step in steps}) == 6


def test_three_stages_are_trained_one_after_the_other(tmp_path, trained):
    lines, steps = run_loop(loop_in(tmp_path, tiny_problem(stages=3)))
    assert [(s["step"], s["stage"]) for s in steps] == [
        ("people", "detail"),
        ("pairs", "voxels"),
        ("loop", "voxels"),
        ("pairs", "structure"),
        ("loop", "structure"),
    ]
    assert set(lines) == {"structure", "voxels", "detail"}


def test_the_win_rate_of_a_step_compares_that_stage_alone(tmp_path, monkeypatch):
    seen = []

    def watched(*args, held_out, **options):
        seen.append(held_out)
        return train_stage(*args, held_out=held_out, **options)

    monkeypatch.setattr(circular_loop, "train_stage", watched)
    loop = loop_in(tmp_path)
    voxels = (loop.from_people("voxels"),)
    models = loop.models({"voxels": voxels})
    loop.from_people("structure", {"voxels": voxels})
    held_out = seen[-1]
    assert held_out.other_models == models and held_out.baseline_models == models and len(held_out.seeds) == 4
    loop_in(tmp_path, tiny_problem(chooser=None)).from_people("structure")
    assert len(seen) == 3 and seen[-1] is None
    # the structure as it was, on the same noises: ties
    assert held_out(loop.problem.pipeline.stages[0].model) == 0.5


def test_a_loop_without_a_pair_to_learn_from_says_why():
    x = torch.zeros(3, 4, 4, 4)
    pair = PreferencePair(
        id="p",
        condition="red",
        stage="structure",
        preferred=x,
        rejected=x,
        source="loop",
        reward_preferred=1.0,
        reward_rejected=0.0,
        provenance={SAME: True},
    )
    with raising("1", "same_structure 1, w1 0"):
        select_and_weigh([pair], Weighing())


def test_settings():
    stage = tiny_problem().pipeline.stages[0]
    own = HUMAN.for_stage(stage, 7)
    assert own.seed == 7 and own.lora.targets == ("to_q", "to_out")
    asked = replace(HUMAN, lora=LoraConfig(targets=("to_q",)))
    assert asked.for_stage(stage, 7).lora.targets == ("to_q",)
    assert replace(HUMAN, lora=None).for_stage(stage, 7).lora is None
    plain = TrainConfig()
    assert (
        with_regulariser(plain).dpo.loser_weight,
        with_regulariser(plain).dpo.sft_weight,
        with_regulariser(plain).dpo.beta,
    ) == (
        0.5,
        0.5,
        4 * plain.dpo.beta,
    )
    with raising("roles", "tuned", "reward", "winner"):
        Weighing(roles="winner")


# The known failure of the loop: its pairs are told apart at once, and a third step without anchors runs away.
# It is seen and stopped.


@pytest.mark.long
def test_an_unregularised_third_step_at_a_small_beta_is_caught(tmp_path):
    problem = toy_problem()
    loose = replace(
        TOY_RUN.loop, dpo=replace(TOY_RUN.loop.dpo, beta=20.0, loser_weight=1.0, sft_weight=0.0), steps=400
    )
    settings = replace(TOY_RUN, loop=replace(loose, held_out_every=25))
    loop = CircularLoop(problem=problem, settings=settings, store=Store(tmp_path), say=lambda line: None)
    lines = {"voxels": (loop.from_people("voxels"),)}
    pairs = loop.pairs("structure", lines)
    guarded = loop.from_loop("structure", pairs, lines)
    record = guarded.record
    rates = dict(guarded.record["win_rates"])
    assert any(
        warning.startswith(("separated", "collapse", "past-best")) for warning in record["warnings"]
    ), record["warnings"]
    assert max(rates) < loose.steps  # stopped
    assert rates[record["kept_step"]] == max(rates.values()) >= 0.5

    alone = replace(problem, unseen_pairs=None)
    free = CircularLoop(
        problem=alone, settings=replace(settings, choosing=None), store=Store(tmp_path), say=lambda line: None
    )
    last = free.from_loop("structure", pairs, lines)
    assert last.record["kept_step"] == loose.steps
    conditions, seeds = crossed(problem.held_out_prompts, 8, seed=99)
    kept, runaway = (
        scores(
            problem.pipeline,
            problem.chooser,
            conditions,
            seeds,
            loop.models({**lines, "structure": (one,)}),
            batch_size=96,
        )
        for one in (guarded, last)
    )
    assert float(wins(kept, runaway).mean()) > 0.6
