"""The training loop on tiny networks: optimisers, moving average, ADA, errors, and what may not depend on
what.
"""

import pytest
import torch

from eg3d_rlhf.experiments.run import Run
from tests import tiny_runs
from tests.rejections import check_message
from tests.tiny_runs import assert_same, build_loop, build_networks, state
from training.augment import AugmentPipe
from training.config import LoopConfig
from training.loop import TrainingLoop
from training.phases import Loss, LossNotFiniteError, Phase, derive_seed, lazy_adam


def begin(loop):
    """Give a loop its images, as `run` does, so that `step` can be called."""
    loop.trained_object.begin(0)
    loop.trained_object.fetch()
    return loop


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(("interval", "share"), [(4, 4 / 5), (16, 16 / 17), (None, 1.0)])
def test_lazy_adam_scales_learning_rate_and_betas(interval, share):
    group = lazy_adam(Square(), 0.002, interval, betas=(0.5, 0.99)).param_groups[0]
    assert group["lr"] == pytest.approx(0.002 * share, rel=1e-12)
    assert group["betas"] == pytest.approx((0.5**share, 0.99**share), rel=1e-12)


def test_phases_share_optimisers_and_scale_the_lazy_ones(tiny_data, tmp_path):
    phases = {
        p.name: p
        for p in build_loop(tiny_data, tmp_path, gan={"density_reg_every": 4, "d_reg_interval": 16}).phases
    }
    assert list(phases) == ["Gmain", "Greg", "Dmain", "Dreg"]
    assert {n: (p.interval, p.gain) for n, p in phases.items()} == {
        "Gmain": (1, 1),
        "Greg": (4, 4),
        "Dmain": (1, 1),
        "Dreg": (16, 16),
    }
    assert (
        phases["Gmain"].optimizer is phases["Greg"].optimizer
        and phases["Dmain"].optimizer is phases["Dreg"].optimizer
    )
    assert phases["Gmain"].optimizer.param_groups[0]["lr"] == pytest.approx(0.002 * 4 / 5)
    assert phases["Dmain"].optimizer.param_groups[0]["lr"] == pytest.approx(0.002 * 16 / 17)


def test_without_density_regularisation_g_has_one_uncorrected_phase(tiny_data, tmp_path):
    loop = build_loop(tiny_data, tmp_path, gan={"density_reg": 0})
    assert [p.name for p in loop.phases] == ["Gboth", "Dmain", "Dreg"]
    assert loop.phases[0].optimizer.param_groups[0]["lr"] == 0.002
    begin(loop).step()


def test_lazy_phases_run_every_interval_iterations(tiny_data, tmp_path):
    loop = begin(build_loop(tiny_data, tmp_path, gan={"density_reg_every": 2, "d_reg_interval": 3}))
    loop._run_phase = lambda phase, *_: ran.append((loop.batch_idx, phase.name))
    ran = []
    for _ in range(4):
        loop.step()
    assert [i for i, name in ran if name == "Gmain"] == [0, 1, 2, 3]
    assert [i for i, name in ran if name == "Greg"] == [0, 2]
    assert [i for i, name in ran if name == "Dreg"] == [0, 3]


def test_a_phase_optimises_its_own_network_alone(tiny_data, tmp_path):
    loop = begin(build_loop(tiny_data, tmp_path))
    for phase in loop.phases:
        before_G = state(loop.trained_object.nets.G)
        before_D = state(loop.trained_object.nets.D)
        loop._run_phase(phase)
        other, before = (
            (loop.trained_object.nets.D, before_D)
            if phase.name[0] == "G"
            else (loop.trained_object.nets.G, before_G)
        )
        buffers = dict(other.named_buffers())  # w_avg moves in the discriminator's pass
        now = state(other)
        assert_same(
            {k: v for k, v in before.items() if k not in buffers},
            {k: v for k, v in now.items() if k not in buffers},
        )
        assert not any(
            p.requires_grad
            for net in (loop.trained_object.nets.G, loop.trained_object.nets.D)
            for p in net.parameters()
        )


@pytest.mark.parametrize(("cur_nimg", "rampup"), [(0, 0.05), (100, 0.05), (10_000, 0.05), (100, None)])
def test_moving_average(tiny_data, tmp_path, cur_nimg, rampup):
    loop = build_loop(tiny_data, tmp_path, gan={"ema_kimg": 0.02, "ema_rampup": rampup})
    G = loop.trained_object.nets.G
    G_ema = loop.trained_object.nets.G_ema
    generator = torch.Generator().manual_seed(1)
    for tensor in G.state_dict().values():
        tensor += torch.randn(tensor.shape, generator=generator)
    G.neural_rendering_resolution = 12
    before = state(G_ema)
    target = state(G)
    loop.trained_object.after_step(cur_nimg, 1)
    half_life = 20.0 if rampup is None else min(20.0, cur_nimg * rampup)
    beta = 0.5 ** (4 / half_life) if half_life > 0 else 0.0
    parameters = dict(G.named_parameters())
    assert set(state(G_ema)) - set(parameters)
    for name, value in state(G_ema).items():
        if name in parameters:
            expected = beta * before[name].double() + (1 - beta) * target[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, target[name]), f"{name}: buffers are copied"
    assert_same(target, state(G))
    assert G_ema.neural_rendering_resolution == 12 and G_ema.rendering_kwargs == G.rendering_kwargs


def ada_loop(data, folder, p):
    pipe = AugmentPipe(xflip=1).requires_grad_(False)
    pipe.p.fill_(p)
    return (
        build_loop(
            data,
            folder,
            augment_pipe=pipe,
            gan={"aug": "ada", "target": 0.6, "ada_interval": 2, "ada_kimg": 0.1},
        ),
        pipe,
    )


@pytest.mark.parametrize(
    ("sign", "p", "expected"), [(0.9, 0.2, 0.28), (0.1, 0.2, 0.12), (0.6, 0.2, 0.2), (-1.0, 0.05, 0.0)]
)
def test_ada_moves_towards_its_target_and_stops_at_zero(tiny_data, tmp_path, sign, p, expected):
    loop, pipe = ada_loop(tiny_data, tmp_path, p)  # a step is 4 images * 2 iterations / 100 images = 0.08
    loop.trained_object.ada_stats.report("Loss/signs/real", torch.tensor(sign, dtype=torch.float64))
    loop.trained_object.after_step(0, 1)
    assert float(pipe.p) == pytest.approx(p), "between the intervals nothing moves"
    loop.trained_object.after_step(0, 2)
    assert float(pipe.p) == pytest.approx(expected, abs=1e-6)
    assert loop.trained_object.ada_stats.mean("Loss/signs/real") is None
    loop.trained_object.after_step(0, 2)
    assert float(pipe.p) == pytest.approx(expected, abs=1e-6), "no evidence, no step"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tiny_data, tmp_path, value):
    def phases(nets):
        def losses(batch):
            bad = value if batch.cur_nimg >= 20 else 0.0
            yield Loss(next(nets.G.parameters()).sum().expand(4) * 0 + bad, {})

        optimizer = lazy_adam(nets.G, 1e-3)
        return [Phase(name="Gextra", module=nets.G, optimizer=optimizer, losses=losses, own_optimizer=True)]

    loop = build_loop(tiny_data, tmp_path, phases=phases)
    with pytest.raises(LossNotFiniteError) as caught:
        loop.run()
    last = str(tmp_path / "checkpoint-000000016.safetensors")
    check_message(str(caught.value), ("Gextra", "iteration 5", "20 images", str(value), last))
    assert isinstance(caught.value, ValueError), "the command line turns it into one line"


def test_a_further_phase_without_gradient_changes_nothing(tiny_data, tmp_path):
    def idle(nets):
        optimizer = lazy_adam(nets.G, 0.1)

        def losses(batch):
            drawn = torch.randn([batch.gen_z.shape[0]]).abs()  # its own draws, any number of them
            ws = nets.G.mapping(batch.gen_z, batch.gen_c)
            yield Loss(ws.mean(dim=[1, 2]) * 0 + drawn, {"Idle/drawn": drawn})
            yield Loss(sum(p.sum() for p in nets.G.parameters()).expand(len(drawn)) * 0, {})

        return [Phase(name="Gidle", module=nets.G, optimizer=optimizer, losses=losses, own_optimizer=True)]

    loops = [build_loop(tiny_data, tmp_path / str(i), phases=p) for i, p in enumerate([(), idle])]
    for loop in loops:
        loop.run()
    for name in ("G", "D", "G_ema"):
        assert_same(*(state(getattr(loop.trained_object.nets, name)) for loop in loops))
    without, extra = ((tmp_path / str(i) / "stats.jsonl").read_text() for i in (0, 1))
    assert "Idle/drawn" in extra and "Idle/drawn" not in without


def test_frozen_layers_of_d_take_no_gradient_and_keep_their_names(tiny_data, tmp_path):
    free = build_networks()
    loop = begin(build_loop(tiny_data, tmp_path, nets=build_networks(freezed=3)))
    D = loop.trained_object.nets.D
    before = state(loop.trained_object.nets.D)
    assert set(before) == set(free.D.state_dict())
    frozen = set(dict(D.named_buffers())) & {k for k, _ in free.D.named_parameters()}
    # The first block has fromrgb, conv0, conv1 and skip: layers 0 to 3.
    assert frozen == {
        f"b32.{layer}.{kind}" for layer in ("fromrgb", "conv0", "conv1") for kind in ("weight", "bias")
    }
    loop.step()
    now = state(D)
    assert all(torch.equal(now[k], before[k]) and not D.get_buffer(k).requires_grad for k in frozen)
    assert not torch.equal(now["b32.skip.weight"], before["b32.skip.weight"])


def test_a_run_leaves_the_documented_files(tiny_data, tmp_path):
    loop = build_loop(tiny_data, tmp_path / "run")
    loop.run()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-000000016.safetensors",
        "checkpoint-000000032.safetensors",
        "fakes000000-032.png",
        "fakes000000-032_depth.png",
        "fakes000000-032_raw.png",
        "fakes_init.png",
        "fakes_init_depth.png",
        "fakes_init_raw.png",
        "network-snapshot-000000-032.safetensors",
        "reals.png",
        "stats.jsonl",
        "timing.jsonl",
    ]
    saved = tiny_runs.networks.load(tmp_path / "run" / "network-snapshot-000000-032.safetensors")
    assert_same(state(saved.G_ema), state(loop.trained_object.nets.G_ema))
    assert saved.cur_nimg == 32


class Slope:
    """A subject without a GAN: one weight, fitted to 3 by noisy samples."""

    device = torch.device("cpu")

    def __init__(self):
        self.net = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.collectors = {}
        self.seen = 0
        self.net.weight.zero_()
        self.moving = self.net

    def modules(self):
        return {"net": self.net}

    def meta(self):
        return {"seen": self.seen}

    def restore(self, meta):
        self.seen = meta["seen"]

    def idle(self, *_): ...

    begin = end = fetch = observe = snapshot = idle

    def batch_for(self, phase, cur_nimg):
        return lambda turn: torch.randn(
            [4, 1], generator=torch.Generator().manual_seed(derive_seed(phase, cur_nimg))
        )

    def after_step(self, cur_nimg, batch_idx):
        self.seen += 1

    def report(self, stats):
        return {"weight": f"{float(self.net.weight):.2f}"}


def slope_loop(folder, kimg: float) -> TrainingLoop:
    subject = Slope()

    def losses(x):
        error = (subject.net(x) - 3 * x).square().squeeze(1)
        yield Loss(error, {"error": error})

    phases = [Phase(name="Slope", module=subject.net, optimizer=lazy_adam(subject.net, 0.1), losses=losses)]
    return TrainingLoop(subject, phases, LoopConfig(kimg=kimg, tick=0.2, batch=4), Run(folder, {}))


def test_the_loop_trains_what_is_no_gan_and_resumes_it_exactly(tmp_path, capsys):
    straight = slope_loop(tmp_path / "straight", 0.8)
    stopped = slope_loop(tmp_path / "stopped", 0.4)
    straight.run()
    stopped.run()
    resumed = slope_loop(tmp_path / "stopped", 0.8)
    resumed.resume()
    resumed.run()
    assert (
        float(straight.trained_object.net.weight) == pytest.approx(3, abs=0.1)
        and resumed.trained_object.seen == 200
    )
    assert_same(straight.trained_object.net.state_dict(), resumed.trained_object.net.state_dict())
    assert (tmp_path / "straight" / "stats.jsonl").read_text() == (
        tmp_path / "stopped" / "stats.jsonl"
    ).read_text()
    assert "weight 3.0" in capsys.readouterr().out
