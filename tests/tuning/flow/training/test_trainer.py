"""Test the training of one stage: what it learns, what it leaves unchanged, and that a resumed run equals an
uninterrupted one.
"""

import copy
import importlib.util
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.dpo import draw_pairs
from eg3d_rlhf.tuning.flow.training.pair_training import Order, Updates, pair_signs
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import policy_and_reference
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import NAMES, TinyPipeline, structure_pairs, tiny_config, voxel_pairs
from tests.tuning.flow.tiny_trainings import at, contents, interrupt, judge, run, with_everything
from training.distributed import Ranks
from training.phases import LossNotFiniteError


def weights(folder, stage="voxels") -> dict[str, torch.Tensor]:
    return tuned_model(stage_of(TinyPipeline(), stage).model, folder).state_dict()


# What is learned.


@pytest.mark.parametrize("stage", ["structure", "voxels"])
def test_dpo_tells_pairs_apart_from_log_2_on(tmp_path, stage):
    pairs = structure_pairs(24) if stage == "structure" else voxel_pairs(24)
    result = run(tmp_path / "run", pairs, tiny_config(log_every=1), stage=stage)
    first = result.stats[0]
    last = result.stats[-1]
    assert (
        first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        and first["margin"] == 0
        and first["implicit_accuracy"] == 0.5
    )
    assert (
        last["implicit_accuracy"] > 0.8
        and last["margin"] > 0
        and last["w_diff"] < 0 < last["l_diff"]
        and last["loss"] < 0.6
    )
    assert last["margin"] == pytest.approx(last["l_diff"] - last["w_diff"], rel=1e-5)
    bins = last["time_bins"]
    assert sum(bins["pairs"]) == 8 and all(
        (n == 0) == (m is None) for n, m in zip(bins["pairs"], bins["margin"], strict=True)
    )
    assert sum(n * m for n, m in zip(bins["pairs"], bins["margin"], strict=True) if n) / 8 == pytest.approx(
        last["margin"]
    )
    assert [line["step"] for line in result.stats] == list(range(1, 41)) and result.kept_step == 40


def test_the_generator_and_the_other_stage_are_left_as_they_are(tmp_path):
    pipeline = TinyPipeline()
    before = [copy.deepcopy(s.model.state_dict()) for s in pipeline.stages]
    models = [s.model for s in pipeline.stages]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for i, lora in enumerate([LoraConfig(rank=2, targets=("to_out",)), None]):
        result = run(
            tmp_path / str(i),
            config=tiny_config(lora=lora, steps=10),
            pipeline=pipeline,
            held_out=judge(pipeline),
        )
        tuned = tuned_model(models[1], result.weights)
        cond = pipeline.conditioning(NAMES, "structure")
        given = (torch.ones(3, 2, 2, 2, 2), torch.full([3], 0.5), cond)
        assert not torch.equal(tuned(*given), models[1](*given))
    assert torch.equal(torch.rand(3), expected)  # torch's own generator as well
    assert [s.model for s in pipeline.stages] == models
    for stage, state in zip(pipeline.stages, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in stage.model.state_dict().items())


def test_fine_tuning_reads_the_preferred_alone(tmp_path):
    config = tiny_config(dpo=DpoConfig(kind="sft"), log_every=1, steps=5)
    pairs = voxel_pairs(24)
    turned = [replace(p, rejected=q.rejected) for p, q in zip(pairs, voxel_pairs(24, seed=9), strict=True)]
    a = run(tmp_path / "a", pairs, config)
    b = run(tmp_path / "b", turned, config)
    assert a.stats == b.stats and "margin" not in a.stats[0]
    pipeline = TinyPipeline()
    stage = stage_of(pipeline, "voxels")
    batch = [pair for _, pair in Order(pairs, config.batch, config.seed).items(0)]
    draw = draw_pairs(
        stage,
        batch,
        pipeline.conditioning([p.condition for p in batch], "voxels"),
        None,
        config.dpo,
        config.seed,
        0,
    )
    expected = stage.path.errors(stage.model(draw.x_t, draw.t, draw.cond), draw.x_0, draw.eps)[:8].mean()
    assert a.stats[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_the_held_out_win_rate_rises_and_the_best_is_kept(tmp_path):
    pipeline = TinyPipeline()
    held_out = judge(pipeline)
    result = run(tmp_path / "run", pipeline=pipeline, held_out=held_out)
    rates = {line["step"]: line["win_rate"] for line in result.stats if "win_rate" in line}
    assert (
        rates[0] == 0.5 and list(rates)[:3] == [0, 10, 20] and result.kept_step == max(rates, key=rates.get)
    )
    assert rates[result.kept_step] > 0.7
    assert held_out(tuned_model(pipeline.stages[1].model, result.weights)) == rates[result.kept_step]


def test_a_judge_that_sees_nothing_keeps_the_start_and_stops_early(tmp_path):
    lines = []
    result = run(
        tmp_path / "run", config=tiny_config(patience=2), held_out=lambda model: 0.5, say=lines.append
    )
    assert result.kept_step == 0 and [line["step"] for line in result.stats] == [0, 5, 10, 15, 20]
    assert "20" in lines[-1] and "0.500" in lines[-1] and not lines[-1].startswith("step ")
    base = TinyPipeline().stages[1].model
    tuned = tuned_model(base, result.weights, merge=True)
    assert torch.equal(tuned.to_out.weight, base.to_out.weight)


# The collapse guard.


def test_an_unanchored_run_at_a_small_beta_is_caught_and_the_better_network_kept(tmp_path):
    """Without regularisation the policy moves away from the rejected samples without end: the win rate rises
    and then falls. A regularised run keeps its win rate.
    """
    pipeline = TinyPipeline()
    held_out = judge(pipeline)
    pairs = voxel_pairs(48, gap=0.6)
    small = DpoConfig(beta=0.5)
    settings = {"steps": 150, "log_every": 10, "patience": 100}
    free = run(
        tmp_path / "free",
        pairs,
        tiny_config(dpo=small, max_drop=1.0, **settings),
        pipeline,
        held_out=held_out,
    )
    rates = {line["step"]: line["win_rate"] for line in free.stats if "win_rate" in line}
    assert rates[150] < 0.2 < 0.9 < rates[free.kept_step] and 0 < free.kept_step < 50
    assert {w.split(":")[0] for w in free.warnings} == {
        "separated",
        "preferred-worse",
        "collapse",
        "past-best",
    }

    stopped = run(
        tmp_path / "stopped", pairs, tiny_config(dpo=small, **settings), pipeline, held_out=held_out
    )
    last = stopped.stats[-1]
    assert (
        last["step"] < 100
        and last["win_rate"] < rates[free.kept_step] - 0.2
        and stopped.kept_step == free.kept_step
    )
    assert {w.split(":")[0] for w in stopped.warnings} >= {"past-best"}
    assert held_out(tuned_model(pipeline.stages[1].model, stopped.weights)) == rates[free.kept_step]

    anchored = DpoConfig(beta=4.0, loser_weight=0.5, sft_weight=0.5)
    result = run(
        tmp_path / "anchored", pairs, tiny_config(dpo=anchored, **settings), pipeline, held_out=held_out
    )
    assert result.stats[-1]["win_rate"] > 0.9 and result.warnings == []


def test_dro_says_that_nothing_holds_it_and_a_lighter_loser_does(tmp_path):
    """Without a bound the loss falls below 0 and the error of the rejected samples grows.

    With half the weight on the rejected samples, the error of the preferred ones does not change.
    """
    ends = {}
    printed = []
    for weight in (1.0, 0.3):
        config = tiny_config(dpo=DpoConfig(kind="dro", loser_weight=weight), lr=0.05, log_every=10)
        ends[weight] = run(tmp_path / str(weight), voxel_pairs(24), config, say=printed.append)
    free, held = (ends[weight].stats[-1] for weight in (1.0, 0.3))
    assert any(line.startswith("Warning: ") and "dro" in line for line in printed)
    assert "l_error" in printed[1]
    assert free["loss"] == pytest.approx(free["w_error"] - free["l_error"], rel=1e-4) and free["loss"] < -1
    assert free["l_error"] > 2 * held["l_error"] and held["w_error"] < free["w_error"]
    assert [w.split(":")[0] for w in ends[1.0].warnings] == ["divergence"] and ends[0.3].warnings == []


# The same, however it is computed.


CASES = {
    "mean": DpoConfig(beta=20.0, sft_weight=0.3, loser_weight=0.5, condition_dropout=0.3),
    "sft": DpoConfig(kind="sft"),
}


@pytest.mark.parametrize("case", CASES)
def test_accumulated_passes_equal_one(tmp_path, case):
    pairs = voxel_pairs(20, w2=True)  # batches of 8 run over the end of a pass of 20
    results = [
        run(tmp_path / str(n), pairs, tiny_config(dpo=CASES[case], batch_gpu=n, steps=6, log_every=1))
        for n in (None, 4, 1)
    ]
    whole, *parts = [weights(r.weights) for r in results]
    for part, result in zip(parts, results[1:], strict=True):
        for name, value in whole.items():
            assert torch.allclose(part[name], value, rtol=1e-3, atol=1e-5), name
        assert [x["loss"] for x in result.stats] == pytest.approx(
            [x["loss"] for x in results[0].stats], rel=1e-4
        )


def test_every_pass_over_the_pairs_has_all_of_them_in_another_order():
    pairs = voxel_pairs(10)
    config = tiny_config(batch=4)
    items = [item for step in range(5) for item in Order(pairs, config.batch, config.seed).items(step)]
    first = items[:10]
    second = items[10:]
    assert {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    assert {p.id for _, p in first} == {p.id for _, p in second} == {p.id for p in pairs}
    assert [p.id for _, p in first] != [p.id for _, p in second]
    few = Order(pairs[:3], config.batch, config.seed).items(0)
    assert [e for e, _ in few] == [0, 0, 0, 1]


def test_bfloat16_passes_learn_about_the_same_and_keep_float32_masters(tmp_path):
    half = TinyPipeline()
    for stage in half.stages:
        stage.precision = "bfloat16"
    a = run(tmp_path / "float32")
    b = run(tmp_path / "bfloat16", pipeline=half)
    assert a.stats[-1]["loss"] != b.stats[-1]["loss"] and a.stats[-1]["margin"] == pytest.approx(
        b.stats[-1]["margin"], rel=0.3
    )
    assert {v.dtype for v in weights(b.weights).values()} == {torch.float32}


def test_a_cosine_falls_to_2_percent_and_constant_stays(tmp_path):
    runs = [
        run(tmp_path / kind, config=tiny_config(schedule=kind, log_every=1))
        for kind in ("constant", "cosine")
    ]
    constant, cosine = ([line["lr"] for line in result.stats] for result in runs)
    assert constant[:5] == cosine[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01]) and set(
        constant[5:]
    ) == {0.01}
    assert cosine[-1] == pytest.approx(0.0002) and cosine[5:] == sorted(cosine[5:], reverse=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_adamw_asks_for_its_package(tmp_path):
    with raising("bitsandbytes"):
        run(tmp_path / "run", config=tiny_config(optimizer="adamw8bit"))


# Stopped and resumed.


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    with_everything(out)
    return contents(out)


def resumed(out) -> dict[str, bytes]:
    with_everything(out, resume=True)
    assert (
        not list(out.glob("checkpoint-*")) and not list(out.glob("kept-*")) and not list(out.glob(".*.tmp"))
    )
    return contents(out)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("moment", "states"), [("line", [20, 30]), ("write", [10])])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, straight, moment, states):
    out = tmp_path / "run"
    replace_file = os.replace

    def die_at_a_state(source, target):
        return die() if "checkpoint-000000020" in str(target) else replace_file(source, target)

    child = os.fork()
    if not child:  # dies by SIGKILL, at a line or between a state's bytes and its name
        if moment == "write":
            os.replace = die_at_a_state
        try:
            with_everything(out, say=at("step     32/", die))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [
        f"checkpoint-{n:09d}.safetensors" for n in states
    ]
    assert resumed(out) == straight


def test_a_signal_ends_it_with_a_state_to_go_on_from(tmp_path, straight):
    before = signal.getsignal(signal.SIGTERM)
    with raising("SIGTERM", "'voxels'", "8", kind=StoppedError):
        with_everything(
            tmp_path / "run", say=at("step      8/", lambda: os.kill(os.getpid(), signal.SIGTERM))
        )
    assert signal.getsignal(signal.SIGTERM) == before
    assert resumed(tmp_path / "run") == straight


def test_a_run_killed_before_its_first_state_starts_over_and_a_finished_one_is_left(tmp_path, straight):
    out = tmp_path / "run"
    lines = []
    with pytest.raises(KeyboardInterrupt):
        with_everything(out, say=at("step      4/", interrupt))
    assert resumed(out) == straight
    again = with_everything(out, resume=True, say=lines.append)
    assert contents(out) == straight and lines == [] and again.stats[-1]["step"] == 40 and again.kept_step > 0


def test_full_parameters_resume_to_the_same_bits(tmp_path):
    config = tiny_config(lora=None, checkpoint_every=10)
    whole = run(tmp_path / "a", config=config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", config=config, say=at("step     25/", interrupt))
    parts = run(tmp_path / "b", config=config, resume=True)
    assert (parts.weights / "model.safetensors").read_bytes() == (
        whole.weights / "model.safetensors"
    ).read_bytes()
    assert parts.stats == whole.stats


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, straight):
    with pytest.raises(KeyboardInterrupt):
        with_everything(tmp_path / "run", say=at("step     32/", interrupt))
    state = tmp_path / "run" / "checkpoint-000000030.safetensors"
    data = bytearray(state.read_bytes())
    data[-100] ^= 1
    state.write_bytes(data)
    assert resumed(tmp_path / "run") == straight


# Refusals.


def test_a_folder_with_another_run_is_rejected(tmp_path):
    out = tmp_path / "run"
    run(out, config=tiny_config(steps=2))
    with raising(str(out)):
        run(out, config=tiny_config(steps=2))
    with raising("config.dpo.beta", "7.0", "20.0", "config.lr", "0.5"):
        run(out, config=tiny_config(steps=2, dpo=DpoConfig(beta=7.0), lr=0.5), resume=True)
    with raising(str(out), " pairs "):
        run(out, voxel_pairs(24, seed=1), tiny_config(steps=2), resume=True)
    pipeline = TinyPipeline()
    pipeline.stages[1].model.to_out.weight.data += 1
    with raising(str(out), " base "):
        run(out, config=tiny_config(steps=2), pipeline=pipeline, resume=True)
    run(out, config=tiny_config(steps=2, batch_gpu=4), resume=True)  # memory may change


def test_pairs_that_do_not_fit_are_rejected_before_anything_is_written(tmp_path):
    pairs = voxel_pairs(4)
    cases = [
        ([], ("(voxels)", "pairs", "empty")),
        (structure_pairs(4), ("(voxels)", "'pair-0'", "'structure'")),
        ([pairs[0], pairs[0]], ("(voxels)", "1", "'pair-0'")),
        ([replace(p, stage="voxels") for p in structure_pairs(2)], ("'pair-0'", "preferred", "voxels")),
    ]
    for wrong, names in cases:
        with raising(*names):
            run(tmp_path / "run", wrong)
    with raising("structure", "voxels", "'colours'"):
        run(tmp_path / "run", pairs, stage="colours")
    assert not (tmp_path / "run").exists()


def test_a_network_of_the_other_convention_is_rejected(tmp_path):
    pipeline = TinyPipeline()
    pairs = voxel_pairs(8, gap=6.0)
    model = pipeline.stages[1].model
    with torch.no_grad():
        model.to_out.weight[:, 4] = -6.0  # the condition's constant: v points from data of mean 6
    run(tmp_path / "right", pairs, tiny_config(steps=1), pipeline)
    pipeline.stages[1].data_at_one = True
    with raising("'voxels'", "data_at_one=False"):
        run(tmp_path / "wrong", pairs, tiny_config(steps=1), pipeline)


def test_a_loss_that_is_not_finite_names_the_pairs_and_the_last_state(tmp_path):
    config = tiny_config(dpo=DpoConfig(kind="dro"), lr=1e30, clip=1e30, warmup=0, checkpoint_every=1)
    with raising("(voxels)", "pair-", str(tmp_path / "run"), kind=LossNotFiniteError) as caught:
        run(tmp_path / "run", config=config)
    assert re.search(r"\b(inf|nan)\b", str(caught.value))


def test_wrong_settings_are_named():
    for changes, names in [
        ({"steps": 0}, ("steps", ">= 1", "0")),
        ({"batch": 6, "batch_gpu": 4}, ("TrainConfig.batch_gpu", "batch=6", "4")),
    ]:
        with raising(*names):
            TrainConfig(**changes)
    pipeline = TinyPipeline()
    policy, reference = policy_and_reference(pipeline.stages[1], tiny_config())
    with raising("batch_gpu", "3", "2", "8"):
        Updates(
            ConditionedStage(pipeline.stages[1], pipeline),
            voxel_pairs(4),
            tiny_config(),
            policy,
            reference,
            Ranks(world=3),
        )


# Each known failure sign is seen, and a healthy run shows none.


def lines(count, *, rates=None, **figures):
    """Make lines of 16 pairs, one every 10 updates.

    A value is a number or a function of the line's number; rates: win rates by update.
    """
    usual = {
        "loss": 0.69,
        "implicit_accuracy": 0.6,
        "margin": 1e-3,
        "w_diff": -5e-4,
        "l_diff": 5e-4,
        "grad_norm": 1.0,
    }
    found = [] if rates is None else [{"step": 0, "pairs": 0, "win_rate": rates[0]}]
    for i in range(count):
        values = {k: v(i) if callable(v) else v for k, v in {**usual, **figures}.items()}
        found.append({"step": 10 * (i + 1), "pairs": 16, **values})
        if rates is not None and 10 * (i + 1) in rates:
            found[-1]["win_rate"] = rates[10 * (i + 1)]
    return found


def test_a_healthy_run_shows_none():
    assert pair_signs([]) == {} and pair_signs(lines(0, rates={0: 0.5})) == {}
    assert (
        pair_signs(
            lines(
                40, rates={0: 0.5, 100: 0.6, 400: 0.7}, margin=lambda i: 1e-4 * i, w_diff=lambda i: -5e-5 * i
            )
        )
        == {}
    )
    assert pair_signs(lines(40, loss=0.6931)) == {}  # a flat loss is no sign


def test_pairs_that_are_separated():
    found = pair_signs(lines(6, implicit_accuracy=0.97))
    assert list(found) == ["separated"]
    assert all(figure in found["separated"] for figure in ("60", "0.970", "0.95", "loser_weight"))
    assert pair_signs(lines(3, implicit_accuracy=1.0)) == {}  # too few pairs to say
    assert pair_signs(lines(6, implicit_accuracy=0.97), preference=False) == {}


def test_pairs_that_are_separated_without_effect_are_off_policy():
    found = pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5, 200: 0.51}))
    assert (
        set(found) == {"separated", "no-effect"}
        and "off-policy" in found["no-effect"]
        and "0.510 after 0.500" in found["no-effect"]
    )
    assert "no-effect" not in pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5, 200: 0.6}))
    assert "no-effect" not in pair_signs(lines(20, implicit_accuracy=0.99, rates={0: 0.5}))
    # on its way down
    assert "no-effect" not in pair_signs(
        lines(20, implicit_accuracy=0.99, rates={0: 0.5, 100: 0.8, 200: 0.5})
    )


def test_running_from_the_rejected():
    growing = {"margin": lambda i: 1e-3 * i, "w_diff": lambda i: 2e-3 * i, "l_diff": lambda i: 3e-3 * i}
    found = pair_signs(lines(20, **growing))
    assert list(found) == ["preferred-worse"]
    assert all(figure in found["preferred-worse"] for figure in ("200", "0.035"))
    # the margin shrinks
    assert pair_signs(lines(20, **{**growing, "margin": lambda i: 1e-3 * (20 - i)})) == {}
    # next to nothing beside the rejected
    assert pair_signs(lines(20, **{**growing, "w_diff": lambda i: 1e-4 * i})) == {}


def test_a_win_rate_that_falls():
    def found(*rates):
        return pair_signs(lines(40, rates={100 * i: rate for i, rate in enumerate(rates)}))

    assert (
        found(0.5, 0.72, 0.66, 0.65) == {}
        and found(0.5, 0.72, 0.58) == {}
        and found(0.5, 0.72, 0.58, 0.66, 0.58) == {}
    )
    assert list(found(0.5, 0.72, 0.6, 0.58)) == ["past-best"] == list(found(0.5, 0.72, 0.51))
    past_best = found(0.5, 0.72, 0.6, 0.58)["past-best"]
    assert all(figure in past_best for figure in ("300", "0.580", "0.720", "100"))
    assert set(found(0.5, 0.72, 0.31)) == {"past-best", "collapse"}
    assert all(figure in found(0.5, 0.72, 0.31)["collapse"] for figure in ("200", "0.310"))
    assert list(found(0.5, 0.47, 0.46)) == ["collapse"] and found(0.5, 0.46) == {}  # once is within the noise
    assert found(0.3, 0.35, 0.34) == {}  # better than it began


@pytest.mark.parametrize(("name", "factor"), [("loss", 5), ("grad_norm", 11)])
def test_spikes(name, factor):
    found = pair_signs(lines(20, **{name: lambda i: factor if i == 19 else 1.0}))
    assert list(found) == ["spikes"] and all(part in found["spikes"] for part in ("200", f"{name} {factor}"))
    assert pair_signs(lines(20, **{name: lambda i: factor / 2 if i == 19 else 1.0})) == {}
    assert pair_signs(lines(5, **{name: lambda i: factor if i == 4 else 1.0})) == {}
    assert "spikes" in pair_signs(lines(20, **{name: lambda i: factor if i == 19 else 1.0}), preference=False)


def test_a_loss_without_a_floor_that_diverges():
    growing = {"w_error": lambda i: 1.0 + 0.1 * i, "l_error": lambda i: 1.0 + 0.2 * i}
    found = pair_signs(lines(20, **growing), preference=False)
    assert list(found) == ["divergence"] and "4.8" in found["divergence"]
    assert pair_signs(lines(4, **growing), preference=False) == {}
