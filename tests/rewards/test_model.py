"""Properties of the reward network and its file format."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards import slab_presets
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import RewardArch
from eg3d_rlhf.rewards.unet3d import slice_max_feature
from tests.rejections import raising

PRESETS = {name: RewardArch.from_dict(entry.network) for name, entry in slab_presets.PRESETS.items()}
SMALL_PRESETS = [name for name in PRESETS if name != "paper"]
SPEC = SlabSpec(resolution=32, crop=(0.25, 0.25, 0.2, 0.25, 0.3, 0.33))
SHAPE = SPEC.shape  # odd and even sides


@pytest.fixture(params=SMALL_PRESETS)
def model(request):
    torch.manual_seed(0)
    arch = PRESETS[request.param]
    return RewardModel(replace(arch, slab_shape=SHAPE) if arch.extractor == "strided" else arch).eval()


def slabs(n, seed=0):
    return torch.rand(n, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 100


def test_batch_equals_items_one_by_one(model):
    x = slabs(3)
    torch.testing.assert_close(
        model.score(x), torch.cat([model.score(item[None]) for item in x]), rtol=1e-4, atol=1e-5
    )


def test_swapping_a_pair_negates_the_margin(model):
    a = model.embed(slabs(4))
    b = model.embed(slabs(4, 1))
    torch.testing.assert_close(model.pair_margin(a, b), -model.pair_margin(b, a))
    torch.testing.assert_close(model.pair_margin(a, a), torch.zeros(4))


def test_forward_agrees_with_score_and_reconstructs_at_the_slabs_size(model):
    x = slabs(2)
    if model.arch.extractor == "strided":
        with raising("reconstruct"):
            model(x, reconstruct=True)
        torch.testing.assert_close(model(x).scalar, model.score(x))
        return
    out = model(x, reconstruct=True)
    torch.testing.assert_close(out.scalar, model.score(x))
    assert (
        out.reconstruction.shape == x.shape
        and out.log_strength.shape == (2,)
        and model(x).reconstruction is None
    )


def strided():
    torch.manual_seed(0)
    return RewardModel(replace(PRESETS["heads"], slab_shape=SHAPE)).eval()


def test_strided_score_is_invariant_to_mirroring_and_depends_on_positions():
    model = strided()
    x = slabs(3)
    torch.testing.assert_close(model.score(x), model.score(x.flip(-1)))
    assert not torch.allclose(model.score(x), model.score(x.flip(-2)))


def test_strided_extractor_standardises_by_training_slabs():
    model = strided()
    x = slabs(8)
    model.extractor.calibrate(x)
    both = torch.cat([x, x.flip(-1)])[:, 0]
    torch.testing.assert_close(model.extractor.slab_mean, both.mean(dim=0))
    torch.testing.assert_close(model.extractor.slab_mean, model.extractor.slab_mean.flip(-1))
    assert model.extractor.slab_scale.min() > 0


def test_score_gradient_reaches_the_slab(model):
    x = slabs(2).requires_grad_()
    (g,) = torch.autograd.grad(model.score(x).sum(), x)
    assert torch.isfinite(g).all() and g.abs().sum() > 0
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    m = model.double()
    x64 = x.detach().double()
    (g64,) = torch.autograd.grad(m.score(x64.requires_grad_()).sum(), x64)
    h = 1e-6
    numeric = (m.score(x64 + h * d) - m.score(x64 - h * d)).sum() / (2 * h)
    torch.testing.assert_close((g64 * d).sum(), numeric.detach(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("depth", "bins"), [(129, 8192), (33, 256), (32, 256), (7, 7), (20, 6)])
def test_slice_feature_equals_the_adaptive_pool_and_its_gradient(depth, bins):
    x = torch.randn(2, 4, depth, 5, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, bins, dtype=torch.float64)
    mine = slice_max_feature(x, bins)
    (mine * direction).sum().backward()
    gradient = x.grad
    x.grad = None
    theirs = F.adaptive_max_pool3d(x.max(dim=1).values, (bins, 1, 1)).view(2, bins)
    (theirs * direction).sum().backward()
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(gradient, x.grad)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, *SHAPE), torch.zeros(0, 1, *SHAPE), torch.zeros(1, 1, 2, 18, 16)]
)
def test_wrong_slabs_are_rejected(bad):
    with raising(", ".join(map(str, bad.shape[-3:]))):
        RewardModel(PRESETS["small"]).score(bad)


def test_bad_architectures_are_rejected():
    with raising("pooling", "slice_max", "grid", "'mean'"):
        RewardArch(feature_maps=(8, 16), pooling="mean")
    with raising("RewardArch", "'colour'"):
        RewardArch.from_dict({"feature_maps": [8, 16], "colour": 1})
    with raising("NormConv", " 12.", " 8 "):
        RewardModel(RewardArch(feature_maps=(12, 16), pool_size=16))


def test_round_trip_keeps_scores_slab_and_meta(tmp_path, model):
    known = {"psi": 1.0, "generator": "ab", "test_accuracy": {"n": 3}}
    loaded = load_reward(Reward(SigmaSlab(SPEC), model, known).save(tmp_path / "r.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded.score_observed(slabs(2)), model.score(slabs(2)))
    assert (loaded.observation, loaded.provenance) == (SigmaSlab(SPEC), known)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]


@pytest.fixture
def saved(tmp_path):
    return Reward(SigmaSlab(SPEC), RewardModel(PRESETS["tiny"])).save(tmp_path / "r.safetensors")


def test_truncated_and_foreign_files_are_rejected(saved, tmp_path):
    weight_bytes = saved.read_bytes()
    described = saved.with_suffix(".json")
    for damaged in (weight_bytes[: len(weight_bytes) // 2], b"", b"hello"):
        saved.write_bytes(damaged)
        with raising("r.safetensors"):
            load_reward(saved)
    for text, name in (('{"format": "other"}', "format"), ('{"form', "JSON")):
        described.write_text(text)
        with raising(described.name, name):
            load_reward(saved)
    described.unlink()
    with raising("r.json", kind=FileNotFoundError):
        load_reward(saved)
    # a wrong path is no missing description
    for suffix in (".safetensors", ".pt"):
        with raising(f"none{suffix}", kind=FileNotFoundError) as caught:
            load_reward(tmp_path / f"none{suffix}")
        assert ".json" not in str(caught.value)
    with raising(str(tmp_path), "reward.safetensors"):
        load_reward(tmp_path)


def test_published_state_dict_loads_from_pt_with_or_without_wrapper(tmp_path):
    model = RewardModel()
    for content in (model.state_dict(), {"state_dict": model.state_dict()}):
        torch.save(content, tmp_path / "best_model.pt")
        loaded = load_reward(tmp_path / "best_model.pt")
        assert torch.equal(loaded.network.MLP.input_layer.weight, model.MLP.input_layer.weight)
        assert loaded.observation.shape == (1, 129, 141, 128) and loaded.provenance == {}


def test_meta_must_be_json(tmp_path):
    with raising("JSON"):
        Reward(SigmaSlab(SPEC), RewardModel(PRESETS["tiny"]), {"x": torch.zeros(1)}).save(
            tmp_path / "r.safetensors"
        )
    assert not list(tmp_path.iterdir())
