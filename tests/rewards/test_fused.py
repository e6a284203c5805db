"""Fused features of a U-Net, and their gradients to slab and weights, equal those of its own modules."""

import copy
import weakref

import pytest
import torch

from eg3d_rlhf.rewards import fused
from eg3d_rlhf.rewards.ensembles import RewardEnsemble
from eg3d_rlhf.rewards.fused import group_affine, group_gradient, group_weights
from eg3d_rlhf.rewards.network_training import TrainData, train_reward
from eg3d_rlhf.rewards.settings import with_changes
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER, PRESETS, RewardArch
from tests.rejections import raising
from tests.rewards.test_network_training import OPTIONS, filled, toy_labels
from tests.torch_utils.compilers import needs_cpp
from torch_utils.ops.implementations import implementation

pytestmark = needs_cpp
HEADS = {"trunk": (16, 16), "embedding": 16, "heads": (8, 8)}
NETWORKS = {
    **{
        name: (RewardArch.from_dict(PRESETS[name].network), (24, 27, 23))
        for name in ("tiny", "small", "small-slice")
    },
    "unpatched slabs": (RewardArch(feature_maps=(8, 16, 32, 64), pool_size=64, **HEADS), (17, 21, 19)),
    "unpatched slabs, cells": (RewardArch(feature_maps=(8, 16), pooling="grid", **HEADS), (9, 10, 33)),
    "no conv1": (RewardArch(feature_maps=(8, 16), patch=2, pool_size=64, **HEADS), (18, 17, 16)),
    "one group": (RewardArch(feature_maps=(8, 16), groups=16, pool_size=64, **HEADS), (8, 9, 10)),
}


def frozen(arch, seed=0):
    torch.manual_seed(seed)
    model = RewardModel(arch).eval().requires_grad_(False)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    return model


def slabs(*shape, seed=1):
    return torch.rand([shape[0], 1, *shape[1:]], generator=torch.Generator().manual_seed(seed)) * 100


def features_and_gradient(model, x, impl="auto"):
    """Return features, and the gradient of a random combination of them."""
    x = x.clone().requires_grad_()
    with implementation(impl):
        features = model.features(x)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features)
        (gradient,) = torch.autograd.grad(features, x, weights)
    return features.detach(), gradient


def check(model, x):
    truth = features_and_gradient(model.double(), x.double(), "ref")
    model.float()
    assert fused.is_supported(model, x)
    for value, expected in zip(features_and_gradient(model, x), truth, strict=True):
        assert (value - expected).abs().max() < 3e-6 * expected.abs().max()
    with torch.no_grad():
        assert (model.features(x) - truth[0]).abs().max() < 3e-6 * truth[0].abs().max()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_features_and_gradients(name):
    arch, shape = NETWORKS[name]
    check(frozen(arch), slabs(2, *shape))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_batch_with_weights_in_the_layout_channels_last(name):
    """Tuning stores the weights so. A coarsest volume of less than 4 voxels was then read transposed."""
    arch, shape = NETWORKS[name]
    model = frozen(arch)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)
    for sizes in (shape, tuple(max(size // 2, 8) for size in shape)):
        check(model, slabs(3, *sizes))


def test_changed_weights_are_read_again():
    arch, shape = NETWORKS["small-slice"]
    model = frozen(arch)
    check(model, slabs(1, *shape))
    model.load_state_dict(frozen(arch, seed=3).state_dict())
    check(model, slabs(1, *shape))
    check(copy.deepcopy(model), slabs(1, *shape))
    for convolution in (m for m in model.modules() if isinstance(m, torch.nn.Conv3d)):
        convolution.to(memory_format=torch.channels_last_3d)
    check(model, slabs(1, *shape))


def test_backward_works_twice_but_there_is_no_second_derivative():
    arch, shape = NETWORKS["small"]
    model = frozen(arch)
    x = slabs(1, *shape).requires_grad_()
    score = model.score(x)
    first, second = (torch.autograd.grad(score, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model.score(x), x, create_graph=True)
    with implementation("torch"):
        (gradient,) = torch.autograd.grad(model.score(x), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().max() > 0


def gradients_of(model, x, impl="auto"):
    """Return gradients, by name, to the slab and the U-Net's weights.

    They belong to a random combination of features and reconstruction.
    """
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with implementation(impl):
        features_and_reconstruction = model.reconstruct(x)
        weights = [
            torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).to(t)
            for t in features_and_reconstruction
        ]
        sum((t * w).sum() for t, w in zip(features_and_reconstruction, weights, strict=True)).backward()
    return {
        "slab": x.grad,
        **{name: p.grad for name, p in model.Conv3DModule.named_parameters() if p.grad is not None},
    }


def check_weights(model, x):
    truth = gradients_of(model.double(), x.double(), "ref")
    gradients = gradients_of(model.float(), x)
    used = (name for name, _ in model.Conv3DModule.named_parameters() if "conv1d_for_recon" not in name)
    assert gradients.keys() == truth.keys() == {"slab", *used}
    largest = max(t.abs().max() for t in truth.values())
    # Some sums over complete volumes cancel; torch in float32 is equally inaccurate there.
    for name, expected in truth.items():
        bound = max(
            1e-5 * expected.abs().max(), 2e-6 * largest if "se_module" in name or "for_recon" in name else 0
        )
        assert (gradients[name] - expected).abs().max() <= bound, name
    return gradients


@pytest.mark.parametrize("name", list(NETWORKS))
def test_gradients_of_the_weights(name):
    arch, shape = NETWORKS[name]
    model = frozen(arch).requires_grad_(True)
    x = slabs(2, *shape)
    gradients = check_weights(model, x)
    again = gradients_of(model, x)
    assert all(torch.equal(value, again[key]) for key, value in gradients.items())


def test_frozen_weights_get_no_gradient_and_the_others_the_same():
    arch, shape = NETWORKS["small-slice"]
    model = frozen(arch).requires_grad_(True)
    x = slabs(1, *shape)
    all_gradients = gradients_of(model, x)
    for name, p in model.Conv3DModule.named_parameters():
        p.requires_grad_("conv2" in name or "conv1.bias" in name)
    gradients = gradients_of(model, x)
    assert {
        name for name in all_gradients if "conv2" in name or "conv1.bias" in name or name == "slab"
    } == gradients.keys()
    # On some processors, torch multiplies differently if a weight is frozen.
    for name, value in gradients.items():
        torch.testing.assert_close(
            value, all_gradients[name], rtol=0, atol=1e-5 * float(all_gradients[name].abs().max())
        )


def test_weights_that_changed_after_the_forward_pass_are_rejected():
    arch, shape = NETWORKS["small"]
    model = frozen(arch).requires_grad_(True)
    score = model.score(slabs(1, *shape)).sum()
    with torch.no_grad():
        model.Conv3DModule.encoders[0].basic_module.conv3.conv.weight.mul_(2)
    with raising("inplace", kind=RuntimeError):
        score.backward()


def test_volumes_are_freed_with_the_maps():
    arch, shape = NETWORKS["small"]
    model = frozen(arch).requires_grad_(True)
    x = slabs(1, *shape)
    maps = fused.maps(model, model._patches(x))
    run = weakref.ref(maps[1].grad_fn.run)
    assert run() is not None
    del maps
    assert run() is None


@pytest.mark.parametrize("preset", ["tiny", "small-slice"])
def test_training_has_the_losses_of_the_reference(preset):
    train = toy_labels(8)
    val = toy_labels(4, 100)
    train_data = TrainData(train=train, val=val, store=filled(train, val))
    options = with_changes(OPTIONS, preset=preset, epochs=2, lr=1e-4, reconstruction=0.01)
    history = train_reward(train_data, options).history
    with implementation("ref"):
        expected = train_reward(train_data, options).history
    # Adam's first steps follow the signs of gradients, and rounding changes some signs.
    for epoch, tolerance in ((0, 1e-5), (1, 1e-4)):
        assert history[epoch]["loss"] == pytest.approx(expected[epoch]["loss"], rel=tolerance, abs=tolerance)


def test_unsupported_networks_use_their_own_modules():
    arch, shape = NETWORKS["small"]
    model = frozen(arch)
    x = slabs(1, *shape)
    assert not fused.is_supported(model.double(), x.double())
    narrow = frozen(RewardArch(feature_maps=(4, 8), pool_size=64, **HEADS))  # fewer channels than lanes
    assert not fused.is_supported(narrow, x)
    with implementation("ref"):
        assert not fused.is_supported(frozen(arch), x)
    ensemble = RewardEnsemble.from_networks([frozen(arch, s) for s in (0, 1)])
    with implementation("ref"):
        reference = ensemble.score(x)
    torch.testing.assert_close(ensemble.score(x), reference, atol=2e-5, rtol=2e-5)


def test_group_normalisation_and_its_gradient():
    norm = torch.nn.GroupNorm(4, 8).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, g = torch.randn(2, 2, 8, 3, 4, 5, dtype=torch.float64).unbind()
    x.requires_grad_()
    truth, *weights = torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], g)

    def sums(gradient):
        return torch.stack(
            [gradient.flatten(2).sum(dim=2), (gradient * x.detach()).flatten(2).sum(dim=2)], dim=2
        )

    def spread(values):
        return values[..., None, None, None]

    scale, shift = group_affine(norm, sums(x.detach()), 60)
    torch.testing.assert_close(x * spread(scale) + spread(shift), norm(x), atol=1e-5, rtol=1e-5)
    f = group_gradient(norm, sums(x.detach()), sums(g), 60)
    torch.testing.assert_close(
        spread(f[..., 0]) * g + spread(f[..., 1]) * x.detach() + spread(f[..., 2]), truth
    )
    for value, expected in zip(group_weights(norm, sums(x.detach()), sums(g), 60), weights, strict=True):
        torch.testing.assert_close(value, expected.float())


@pytest.mark.long
def test_full_size():
    slab = torch.nn.functional.interpolate(
        slabs(1, 9, 9, 9), size=(129, 141, 128), mode="trilinear", align_corners=True
    )
    model = frozen(PAPER)
    features, gradient = features_and_gradient(model.double(), slab.double(), "ref")
    value, near = features_and_gradient(model.float(), slab)
    assert (value - features).abs().max() < 3e-6 * features.abs().max()
    # If rounding decides which of two equal maxima is larger, their gradient goes to one voxel or the other.
    # That happens in float32 without fused operators, too.
    assert ((near - gradient).abs() > 3e-6 * gradient.abs().max()).double().mean() < 1e-3
