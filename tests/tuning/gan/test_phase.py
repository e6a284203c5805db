"""The reward phase inside the loop, built as train.py builds it."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.core.seeds import CALIBRATION, STANDARDISATION
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import as_generator
from eg3d_rlhf.modes import gan as gan_mode
from eg3d_rlhf.modes.gan import GAN
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.tuning.gan import settings as gan_settings
from eg3d_rlhf.tuning.gan.phase import RewardConfig, RewardTerms
from eg3d_rlhf.tuning.gan.reward_run import build
from tests import tiny_runs
from tests.rejections import raising, rejected
from tests.tiny_runs import assert_same, state, train_flags
from training import checkpoint, storage
from training.networks import state_hash

RUN = ("--kimg=0.08", "--tick=0.04", "--snap=0", "--no-summary")  # 20 iterations, two checkpoints


@pytest.fixture(scope="module")
def settings(tiny_data, tiny_networks, tiny_reward, other_reward, tmp_path_factory):
    """Resolved settings from train.py's flags; 'REWARD' stands for those that switch the reward on."""
    folder = tmp_path_factory.mktemp("runs")

    def resolve(*flags: str) -> gan_settings.Settings:
        reward = (
            [f"--reward-ckpt={tiny_reward}", f"--heldout-reward={other_reward}", "--reward=sigma"]
            if "REWARD" in flags
            else []
        )
        arguments = train_flags(
            tiny_data, tiny_networks, folder, *RUN, *reward, *[f for f in flags if f != "REWARD"]
        )
        return gan_mode.resolve(GAN.command.make_context("train", arguments).params)

    return resolve


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """Finished runs by name: their objects and folders."""
    folder = tmp_path_factory.mktemp("finished")
    flags = {
        "gan": (),
        "zero": ("REWARD", "--lambda-r=0"),
        "ten": ("REWARD", "--lambda-r=10", "--set=reward_shaping=reference"),
    }
    finished = {}
    for name, values in flags.items():
        s = settings(*values)
        objects = build(s, Run(folder / name, {}))
        objects.loop.run()
        finished[name] = (objects, folder / name)
    return finished


def test_lambda_zero_is_bitwise_the_gan_run(runs):
    gan, zero, ten = (runs[name][0] for name in ("gan", "zero", "ten"))
    assert gan.loop.batch_idx == zero.loop.batch_idx == 20
    for name in ("G", "D", "G_ema"):
        assert_same(state(getattr(gan.nets, name)), state(getattr(zero.nets, name)))
        differing = state(getattr(ten.nets, name))
        assert any(not torch.equal(v, differing[k]) for k, v in state(getattr(gan.nets, name)).items()), (
            "the reward does something"
        )
    tensors = [storage.read_tensors(checkpoint.available(runs[name][1])[-1])[0] for name in ("gan", "zero")]
    assert_same(*tensors)


def test_the_reference_never_changes(runs, tiny_networks):
    original = tiny_runs.networks.load(tiny_networks).G_ema
    for name in ("zero", "ten"):
        assert state_hash(runs[name][0].before) == state_hash(original)
    phase_state = runs["ten"][0].loop.phases[-1].state
    assert state_hash(phase_state.G_ref) == state_hash(original)
    assert all(p.grad is None and not p.requires_grad for p in phase_state.parameters())
    assert all(p.grad is None and not p.requires_grad for p in runs["ten"][0].reward.parameters())


def test_the_reward_phase_moves_g_alone(settings, tmp_path):
    loop = build(settings("REWARD"), Run(tmp_path, {})).loop
    nets = loop.trained_object.nets
    phase = loop.phases[-1]
    before_G = state(nets.G)
    before_D = state(nets.D)
    before_ema = state(nets.G_ema)
    loop.trained_object.begin(0)
    loop.trained_object.fetch()
    loop._run_phase(phase)
    assert_same(before_D, state(nets.D))
    assert_same(before_ema, state(nets.G_ema))
    assert all(p.grad is None for p in nets.D.parameters())
    moved = {k for k, v in state(nets.G).items() if not torch.equal(v, before_G[k])}
    assert {
        "decoder.net.0.weight",
        "backbone.mapping.fc0.weight",
        "backbone.synthesis.b16.conv1.weight",
    } <= moved
    assert not any(k.startswith("superresolution") or k.endswith("w_avg") for k in moved)
    assert (
        phase.optimizer is not loop.phases[0].optimizer
        and phase.optimizer.param_groups[0]["lr"] == loop.options["rlr"]
    )


@pytest.fixture(scope="module")
def parts(tiny_data, tiny_networks, tiny_reward):
    """Networks, reward and a batch."""
    return tiny_runs.networks.load(tiny_networks), load_reward(tiny_reward), tiny_runs.batch(tiny_data)


def terms_of(parts, **config) -> RewardTerms:
    nets, reward, _ = parts
    return RewardTerms(nets.G, nets.G_ema, reward, RewardConfig(**{"consistency_resolution": 12, **config}))


def test_the_loss_is_minus_lambda_times_the_clipped_reward(parts):
    nets, reward, batch = parts
    terms = terms_of(parts, lambda_r=7.0, reward_clip="none", lambda_sigma=0.0)
    (loss,) = terms.losses(batch)
    ws = nets.G.mapping(batch.gen_z, batch.gen_c)
    scores = reward.score(as_generator(nets.G).field(ws))
    torch.testing.assert_close(loss.value, -7 * scores)
    torch.testing.assert_close(loss.stats["RLHF/reward"], scores)
    assert loss.stats["RLHF/clipped"].tolist() == [0, 0, 0, 0]


def test_a_standardised_reward_is_not_blown_up_beyond_its_log_odds(parts):
    """Fault: scores of a reward from randomised labels hardly varied and were multiplied by up to 10.

    Every shape then drifted.
    """
    nets, reward, batch = parts
    losses = {}
    for temperature in (None, 1e3):
        provenance = {} if temperature is None else {"temperature": temperature}
        standardised = Reward(reward.observation, reward.network, provenance)
        terms = terms_of((nets, standardised, batch), reward_shaping="standardised", reward_clip="none")
        losses[temperature] = next(terms.losses(batch)).stats["RLHF/shaped"].abs().max()
        scale = float(terms.state.shaping.scale)
        assert scale <= (10 if temperature is None else 1 / temperature) * 1.0001
    assert losses[1e3] < losses[None]


def test_a_sample_meets_the_same_references_in_whichever_round_or_rank(parts):
    """Fault: the references of a round, and of a rank, began where the one before had ended."""
    terms = terms_of(parts, reward_shaping="reference", lambda_sigma=0.0)
    batch = replace(parts[2], cur_nimg=8)
    full = next(terms.losses(batch)).stats["RLHF/shaped"]
    for rounds in (2, 4):
        for turn in reversed(range(rounds)):
            rows = range(4)[turn::rounds]
            part = replace(batch, gen_z=batch.gen_z[rows], gen_c=batch.gen_c[rows], rows=rows)
            torch.testing.assert_close(
                next(terms.losses(part)).stats["RLHF/shaped"], full[rows], rtol=1e-5, atol=1e-6
            )
    later = next(terms.losses(replace(batch, cur_nimg=12))).stats["RLHF/shaped"]
    assert not torch.allclose(full, later), "the next images meet the next references"


def test_a_reward_of_another_box_is_rejected_and_one_of_another_generator_is_a_warning(parts, capsys):
    """Fault: box_warp was never compared, and any generator was scored without a word."""
    nets, reward, _ = parts
    generator = as_generator(nets.G_ema)
    larger = Reward(SigmaSlab(replace(reward.observation.spec, box_warp=2.0)), reward.network)
    with raising("--reward-ckpt", "box_warp", "2.0", "1.0"):
        check_reward(larger, generator, "--reward-ckpt")
    check_reward(Reward(reward.observation, reward.network, {"generator": state_hash(nets.G_ema)}), generator)
    check_reward(reward, generator)  # a published one, which does not say
    assert capsys.readouterr().err == ""
    check_reward(
        Reward(reward.observation, reward.network, {"generator": "f" * 64, "architecture": "eg3d"}), generator
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: ") and "f" * 12 in line and state_hash(nets.G_ema)[:12] in line


def test_the_bundled_heads_reward_is_no_default_for_other_generators(tiny_data, tiny_networks, tmp_path):
    """Fault: --cfg=ffhq --reward=sigma took the bundled reward of heads."""
    flags = [
        "--cfg=ffhq",
        f"--data={tiny_data}",
        f"--init={tiny_networks}",
        "--reward=sigma",
        f"--outdir={tmp_path}",
    ]
    result = tiny_runs.run(*flags)
    rejected(result, "--reward-ckpt", "--cfg=ffhq", "--reward=sigma")
    mine = tmp_path / "mine.safetensors"
    mine.touch()
    for more, expected in (((), None), ((f"--reward-ckpt={mine}",), str(mine))):
        settings = json.loads(tiny_runs.run(*flags, *more, "--dry-run").stdout)
        assert settings["reward_ckpt"] == expected and settings["heldout_reward"] is None


def test_a_trust_region_that_leaves_out_the_untuned_scores_is_named(parts):
    _, _, batch = parts
    highest = next(terms_of(parts, reward_clip="none").losses(batch)).stats["RLHF/reward"].max().item()
    with pytest.warns(UserWarning, match=r"--reward-clip.*\b100\s*%"):
        terms_of(parts, reward_clip=f"{highest + 1e3},{highest + 1e4}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms_of(parts, reward_clip="none")


def test_samples_outside_the_clip_have_no_gradient(parts):
    nets, _, batch = parts
    scores = next(terms_of(parts, reward_clip="none").losses(batch)).stats["RLHF/reward"].detach()
    low = sorted(scores.tolist())[0]
    high = sorted(scores.tolist())[-1]
    margin = (high - low) / 100
    assert margin > 0
    terms = terms_of(parts, reward_clip=f"{low + margin},{high - margin}")
    nets.G.requires_grad_(True)
    loss = next(terms.losses(batch))
    parameters = [p for p in nets.G.parameters()]
    for i in range(4):
        grads = torch.autograd.grad(loss.value[i], parameters, retain_graph=True, allow_unused=True)
        total = sum(float(g.abs().sum()) for g in grads if g is not None)
        inside = low < scores[i] < high
        assert (total > 0) == inside
        assert loss.stats["RLHF/clipped"][i] == (not inside)
    nets.G.requires_grad_(False)
    bounds = torch.tensor([low + margin, high - margin])
    torch.testing.assert_close(loss.value.detach(), -10 * scores.clamp(*bounds.tolist()))


def test_consistency_terms_vanish_at_the_reference_and_grow_with_distance(parts):
    nets, _, batch = parts
    terms = terms_of(parts, lambda_sigma=0.5, lambda_front=2.0)
    at_start = list(terms.losses(batch))[1]
    assert at_start.value.max() <= 1e-6, (
        "G starts as its own moving average; in training it only rounds differently"
    )
    bias = nets.G.decoder.net[2].bias
    with torch.no_grad():
        bias[0] += 3.0
    try:
        moved = list(terms.losses(batch))[1]
        torch.testing.assert_close(
            moved.stats["RLHF/consistency"], torch.full([4], 3.0), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            moved.stats["RLHF/front_growth"], torch.full([4], 3.0), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(moved.value, torch.full([4], 0.5 * 3 + 2 * 3.0), rtol=1e-4, atol=1e-3)
    finally:
        with torch.no_grad():
            bias[0] -= 3.0
    assert len(list(terms_of(parts, lambda_sigma=0.0).losses(batch))) == 1


def consistency_loss(terms: RewardTerms, batch):
    """Return the density-consistency loss of a generator that has moved by 3 everywhere.

    The latents are the same for all callers.
    """
    bias = terms.generator.module.decoder.net[2].bias
    torch.manual_seed(3)
    with torch.no_grad():
        bias[0] += 3.0
    try:
        return list(terms.losses(batch))[1]
    finally:
        with torch.no_grad():
            bias[0] -= 3.0


def untuned_scores(parts) -> torch.Tensor:
    """Return rewards of the latents of that loss under the untuned generator."""
    nets, reward, batch = parts
    torch.manual_seed(3)
    ws = nets.G_ema.mapping(
        torch.randn_like(batch.gen_z), batch.gen_c, truncation_psi=RewardConfig.consistency_psi
    )
    return reward.score(as_generator(nets.G_ema).field(ws)).detach()


def test_a_gate_of_1_is_bitwise_the_published_term(parts):
    _, _, batch = parts
    ungated = consistency_loss(terms_of(parts, lambda_sigma=0.5), batch)
    gated = consistency_loss(
        terms_of(parts, lambda_sigma=0.5, consistency_gate=1.0, reward_clip="-10,q0.55"), batch
    )
    assert torch.equal(ungated.value, gated.value) and torch.equal(
        ungated.value, 0.5 * ungated.stats["RLHF/consistency"]
    )
    assert ungated.stats.keys() == gated.stats.keys() and "RLHF/consistency_weight" not in ungated.stats


def test_the_gate_holds_with_full_weight_what_scored_above_the_clip_before_tuning(parts):
    _, _, batch = parts
    scores = untuned_scores(parts)
    low, high = sorted(scores.tolist())[1:3]  # two of four lie above the middle
    middle = (low + high) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the calibration's samples need not lie on both sides
        terms = terms_of(
            parts, lambda_sigma=0.5, lambda_front=2.0, consistency_gate=0.1, reward_clip=f"-1000,{middle}"
        )
    loss = consistency_loss(terms, batch)
    expected = torch.where(scores > middle, 1.0, 0.1)
    assert sorted(expected.tolist()) == pytest.approx([0.1, 0.1, 1, 1])
    assert torch.equal(loss.stats["RLHF/consistency_weight"], expected), (
        "by the untuned shape, though the tuned one has moved"
    )
    consistency = loss.stats["RLHF/consistency"]
    growth = loss.stats["RLHF/front_growth"]
    # front growth has no per-sample weight
    torch.testing.assert_close(loss.value, 0.5 * expected * consistency + 2 * growth)
    nothing = consistency_loss(
        terms_of(parts, lambda_sigma=0.5, consistency_gate=0.0, reward_clip="-1000,q0.55"), batch
    )
    assert torch.equal(nothing.value == 0, nothing.stats["RLHF/consistency_weight"] == 0)


def test_above_a_quantile_of_the_untuned_scores_the_reward_pushes_nothing(parts):
    nets, _, batch = parts
    terms = terms_of(parts, consistency_gate=0.1, reward_clip="-1000,q0.55")
    high = terms.state.bounds[1]
    assert high == torch.quantile(terms.initial_scores, 0.55)
    nets.G.requires_grad_(True)
    loss = next(terms.losses(batch))
    above = loss.stats["RLHF/reward"] > high
    parameters = list(nets.G.parameters())
    for i in range(4):
        grads = torch.autograd.grad(loss.value[i], parameters, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == (not above[i])
    nets.G.requires_grad_(False)
    assert 0 < above.sum() < 4


def test_a_gate_that_no_untuned_shape_passes_is_named(parts):
    _, _, batch = parts
    with pytest.warns(UserWarning, match=r"--consistency-gate.*\b1000\b.*--reward-clip"):
        terms_of(parts, consistency_gate=0.1, reward_clip="-1000,1000")


def test_calibration_uses_the_untuned_generator(parts):
    nets, reward, _ = parts
    terms = terms_of(parts, reward_shaping="standardised", reward_clip="iqr")
    assert terms.initial_scores.shape == (STANDARDISATION.count,)
    assert terms_of(parts).initial_scores.shape == (CALIBRATION.count,)
    low, high = torch.quantile(terms.initial_scores, torch.tensor([0.25, 0.75])).tolist()
    kept = [
        score
        for score in terms.initial_scores.tolist()
        if low - 1.5 * (high - low) <= score <= high + 1.5 * (high - low)
    ]
    assert terms.state.shaping.mean.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    shaped = (terms.initial_scores - terms.state.shaping.mean) * terms.state.shaping.scale
    low, high = torch.quantile(shaped, torch.tensor([0.25, 0.75])).tolist()
    assert terms.state.bounds.tolist() == pytest.approx(
        [low - 1.5 * (high - low), high + 1.5 * (high - low)], rel=1e-5
    )


def test_a_resumed_reward_run_equals_the_straight_one(runs, tmp_path):
    _, straight = runs["ten"]
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    final = checkpoint.available(folder)[-1]
    final.unlink()
    assert [p.name for p in checkpoint.available(folder)] == ["checkpoint-000000040.safetensors"]
    tensors, _, _ = checkpoint.read(folder)
    names = {
        "phase_Grlhf.shaping.references",
        "phase_Grlhf.bounds",
        "optim_Grlhf.0.exp_avg",
    }
    assert names <= set(tensors) and any(k.startswith("phase_Grlhf.G_ref.") for k in tensors)
    GAN.resume(GAN.read(folder), folder)
    assert (folder / "stats.jsonl").read_text() == (straight / "stats.jsonl").read_text()
    assert_same(*(storage.read_tensors(path / final.name)[0] for path in (straight, folder)))


def test_resume_takes_the_reference_from_the_checkpoint(runs, tiny_networks, tmp_path):
    """The reference is the one that the run started with, even if the initial file has changed meanwhile."""
    objects, straight = runs["ten"]
    s = gan_settings.Settings.from_values(
        {**objects.loop.options, "init": str(tmp_path / "other.safetensors")}
    )
    tiny_runs.networks.save(tmp_path / "other.safetensors", tiny_runs.build_networks(seed=9))
    resumed = build(s, Run(tmp_path / "run", {})).loop
    before = state_hash(resumed.phases[-1].state.G_ref)
    shutil.copytree(straight, tmp_path / "run")
    # Checkpoints of earlier versions hold one number more.
    newest = checkpoint.available(tmp_path / "run")[-1]
    tensors, meta = storage.read_tensors(newest, "checkpoint")
    older = {**tensors, "phase_Grlhf.shaping.offset": torch.tensor(12)}
    storage.write_tensors(newest, "checkpoint", older, meta)
    resumed.resume(tmp_path / "run")
    original = state_hash(tiny_runs.networks.load(tiny_networks).G_ema)
    assert before != original and state_hash(resumed.phases[-1].state.G_ref) == original
    assert_same(state(resumed.phases[-1].state), state(objects.loop.phases[-1].state))
    pair = [checkpoint.optimizer_tensors("x", loop.phases[-1].optimizer) for loop in (resumed, objects.loop)]
    assert_same(*pair)
