"""Test estimates of memory and time against torch's profiler on real tensors, and against closed forms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from eg3d_rlhf.core.memory import GIB, MemoryTrace
from eg3d_rlhf.models import hunyuan3d
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.trellis import flows
from eg3d_rlhf.models.weights import empty
from eg3d_rlhf.tuning.flow.base.family import SizedStage
from eg3d_rlhf.tuning.flow.base.sampling import stage_noise
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, Sampling, SparseVoxels, TokenSet
from eg3d_rlhf.tuning.flow.families import released_sizes
from eg3d_rlhf.tuning.flow.families.hunyuan3d import LORA_TARGETS, MAIN, call
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.memory_estimate import Cost, choose_pass
from eg3d_rlhf.tuning.flow.training.pair_training import Updates
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import policy_and_reference, set_recompute, trained_parameters
from eg3d_rlhf.tuning.flow.workspace import estimate
from eg3d_rlhf.tuning.flow.workspace.estimate import ZeroConditioning, pairs_of
from eg3d_rlhf.tuning.flow.workspace.published_memory import PRECISION, published_costs
from tests.rejections import raising
from torch_utils.ops.implementations import implementation
from training.distributed import SINGLE

# A quarter of the published widths, fewer tokens and blocks.


def shape_set(make) -> SizedStage:
    config = hunyuan3d.DenoiserConfig(
        input_size=256,
        in_channels=64,
        hidden_size=512,
        context_dim=256,
        depth=3,
        num_heads=4,
        text_len=100,
        qk_norm=True,
        qkv_bias=False,
        num_moe_layers=1,
        num_experts=4,
        use_attention_pooling=False,
    )
    stage = FlowStage(
        name="shape",
        model=make(partial(hunyuan3d.Denoiser, config)),
        latents=TokenSet(tokens=256, channels=64),
        call=call,
        data_at_one=True,
        lora_targets=LORA_TARGETS,
        sampling=Sampling(steps=2),
    )
    return SizedStage(stage=stage, conditioning={MAIN: [100, 256]})


COMMON = dict(
    in_channels=8,
    out_channels=8,
    model_channels=256,
    cond_channels=256,
    num_blocks=2,
    num_head_channels=64,
    qk_rms_norm=True,
)


def structure(make) -> SizedStage:
    model = make(
        partial(flows.StructureFlow, flows.StructureFlowConfig(resolution=8, patch_size=1, **COMMON))
    )
    return SizedStage(
        conditioning=[100, 256],
        stage=FlowStage(name="structure", model=model, latents=DenseGrid(channels=8, resolution=8)),
    )


def voxels(make) -> SizedStage:
    config = flows.LatentFlowConfig(resolution=16, patch_size=2, io_block_channels=(32,), **COMMON)
    model = make(partial(flows.LatentFlow, config))
    return SizedStage(
        conditioning=[100, 256],
        stage=FlowStage(name="latent", model=model, latents=SparseVoxels(channels=8, resolution=16)),
    )


def really(make):
    torch.manual_seed(0)
    return make()


def allocated(run) -> int:
    """Measure the peak memory of torch's CPU allocator while `run` runs, above the memory before.

    torch's own kernels are used, as on other devices, because those for AVX-512 take less memory.
    """
    with implementation("ref"), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = {"shape": shape_set, "structure": structure, "latent": voxels}


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        pytest.param("shape", False, marks=pytest.mark.long),
        pytest.param("shape", True, marks=pytest.mark.long),
        ("structure", False),
        pytest.param("structure", True, marks=pytest.mark.long),
        pytest.param("latent", False, marks=pytest.mark.long),
        pytest.param("latent", True, marks=pytest.mark.long),
    ],
)
def test_an_update_takes_what_is_estimated_from_sizes_alone(case, recompute):
    found = estimate.update(CASES[case](empty), 1, recompute)
    sized = CASES[case](really)
    weights = sum(p.nbytes for p in sized.stage.model.state_dict().values())
    config = TrainConfig(batch=1, warmup=0).for_stage(sized.stage, 0)
    policy, reference = policy_and_reference(sized.stage, config)
    set_recompute(policy, recompute)
    updates = Updates(
        ConditionedStage(sized.stage, ZeroConditioning(sized)),
        pairs_of(sized.stage, 1),
        config,
        policy,
        reference,
        SINGLE,
    )
    updates.run(0)
    held = sum(p.nbytes for p in trained_parameters(policy).values()) * 3  # adapters and their moments
    measured = weights + held + allocated(lambda: updates.run(1))
    assert found.bytes == pytest.approx(measured, rel=0.15)
    assert measured > 1.1 * weights


@pytest.mark.long
def test_full_tuning_holds_a_copy_gradients_and_moments():
    sized = structure(empty)
    weights = sum(p.numel() * 4 for p in sized.stage.model.parameters())
    full, lora = (estimate.update(sized, 1, True, lora=lora).bytes for lora in (None, LoraConfig()))
    assert 5 * weights < full < lora + 5 * weights  # its own, the copy, its gradients, two moments


@pytest.mark.parametrize(
    "case", ["structure", *(pytest.param(case, marks=pytest.mark.long) for case in ("shape", "latent"))]
)
def test_drawing_takes_what_is_estimated(case):
    found = estimate.sampling_cost(CASES[case](empty), 2)
    sized = CASES[case](really)
    stage = sized.stage
    weights = sum(p.nbytes for p in stage.model.state_dict().values())
    places = [getattr(x, "coords", None) for x in estimate.latents_of(stage, 2)]
    cond = ZeroConditioning(sized).null_conditioning(2, stage.name)
    measured = weights + allocated(
        lambda: estimate.sample(stage, stage_noise(stage, [0, 0], places), cond, cond, Sampling(steps=1))
    )
    assert found.bytes == pytest.approx(measured, rel=0.15)


def test_multiplications_are_counted_as_by_hand():
    tokens = 64
    width = 32
    with MemoryTrace() as trace:
        layer = torch.nn.Linear(width, 3 * width)
        q, k, v = layer(torch.zeros(1, tokens, width)).view(1, tokens, 3, 1, width).permute(2, 0, 3, 1, 4)
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert trace.flops == 2 * tokens * width * 3 * width + 4 * tokens**2 * width
    assert trace.peak >= 4 * (3 * width * width + 3 * width + tokens * 4 * width)


@pytest.mark.parametrize("name", released_sizes())
def test_published_generators_have_their_published_sizes(name):
    numbers = {
        "TRELLIS-text-large": [547_154_952, 587_849_608],
        "TRELLIS-image-large": [559_737_864, 600_432_520],
        "TRELLIS.2-4B": [1_292_179_976, 1_292_253_728, 1_292_253_728, 1_292_302_880],
        "Hunyuan3D-2.1": [3_050_758_720],
        "SAM 3D Objects": [959_962_133 + 4096 * 1024, 600_432_520],
    }
    assert [
        sum(t.numel() for t in s.stage.model.state_dict().values()) for s in released_sizes()[name]()
    ] == numbers[name]


def test_shells_are_thin_and_of_the_size_asked_for():
    coords = estimate.shell(8000, 64, torch.Generator().manual_seed(0))
    assert coords.shape == (8000, 3) and len(coords.unique(dim=0)) == 8000 and coords.dtype == torch.int32
    assert ((coords >= 0) & (coords < 64)).all() and coords.float().sub(31.5).norm(dim=1).min() > 15


def test_the_fastest_update_that_fits_is_chosen():
    def costs(n: int, again: bool) -> Cost:
        return Cost(bytes=10 + n * (2 if again else 10), flops=n)

    assert [choose_pass(costs, 4, space) for space in (50, 49, 20, 19, 18, 14, 11)] == [
        (4, False),
        (2, False),
        (1, False),
        (4, True),
        (4, True),
        (2, True),
        None,
    ]
    assert (
        choose_pass(costs, 4, 1000, recompute=True) == (4, True)
        and choose_pass(costs, 1, 12, recompute=False) is None
    )


def test_what_fits_nowhere_is_told_with_figures():
    rows = estimate.estimate([structure(empty)])
    assert {(row.what, row.recompute) for row in rows} == {("sample", False), ("lora", False), ("lora", True)}
    untimed, timed = (
        estimate.table([replace(row, seconds=seconds) for row in rows]) for seconds in (None, 2.0)
    )
    assert "time" not in untimed and "2 s" in timed
    estimate.check_fits(rows, 1 << 40, "flow new")
    least = min(row.bytes for row in rows if row.what == "sample") / estimate.SHARE / GIB
    names = (f"{least:.1f} GiB", "0.0", "'structure'", "(sample, ", "--set precision=bfloat16")
    with raising(*names):
        estimate.check_fits(rows, 1 << 20, "flow new")


def cost(stage, what, weights, peak) -> estimate.StageCost:
    return estimate.StageCost(
        stage=stage, what=what, precision="bfloat16", recompute=False, weights=weights, bytes=peak, flops=1
    )


def test_a_sample_holds_all_stages_and_an_update_its_own():
    costs = [cost("a", "sample", 100, 1000), cost("a", "lora", 100, 2000), cost("b", "sample", 30, 500)]
    single, half = (
        {(row.stage, row.what): row.bytes for row in estimate.rows_of(costs, dtype=dtype)}
        for dtype in ("float32", "bfloat16")
    )
    assert single == {
        ("a", "sample"): 1000 + 4 * 30,
        ("a", "lora"): 2000,
        ("b", "sample"): 500 + 4 * 100,
    }
    assert half == {
        ("a", "sample"): 1000 - 2 * 100 + 2 * 30,
        ("a", "lora"): 2000 - 2 * 100,
        ("b", "sample"): 500 - 2 * 30 + 2 * 100,
    }


def test_processes_divide_the_state_of_full_tuning_alone():
    costs = [cost("a", "full", 100, 5000), cost("a", "lora", 100, 2000)]
    full, lora = (row.bytes for row in estimate.rows_of(costs, gpus=4))
    # weight, gradient and two moments of float32 on one of four processes
    assert full == 5000 - 16 * 100 * 3 // 4 and lora == 2000


def test_the_published_costs_belong_to_the_published_networks():
    stages_by_generator = {name: make() for name, make in released_sizes().items()}
    assert list(published_costs()) == list(stages_by_generator)
    for name, costs in published_costs().items():
        for stage in stages_by_generator[name]:
            stage_costs = [cost for cost in costs if cost.stage == stage.stage.name]
            kinds = [(cost.what, cost.recompute) for cost in stage_costs]
            assert kinds == [("sample", False), *((w, r) for w in ("lora", "full") for r in (False, True))]
            assert {cost.weights for cost in stage_costs} == {estimate.weight_count(stage)}
            sample, lora, less, full, full_less = (cost.bytes for cost in stage_costs)
            assert 4 * stage_costs[0].weights < sample < less < lora < full and less < full_less < full


@pytest.mark.long
def test_a_published_cost_is_what_is_traced_today():
    (stage,) = [stage for stage in released_sizes()["TRELLIS-image-large"]() if stage.stage.name == "latent"]
    traced = estimate.sampling_cost(replace(stage, stage=replace(stage.stage, precision=PRECISION)), 1)
    (stated,) = [
        cost
        for cost in published_costs()["TRELLIS-image-large"]
        if (cost.stage, cost.what) == ("latent", "sample")
    ]
    assert stated.bytes == pytest.approx(traced.bytes, rel=0.01) and stated.flops == traced.flops
