"""The reward network and its losses against reference values computed with the published network
(fixtures/reward).
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.preferences import losses
from eg3d_rlhf.rewards.networks import MLP, RewardOutput
from eg3d_rlhf.rewards.slab_network import PAPER, RewardArch, RewardModel
from eg3d_rlhf.rewards.unet3d import slice_max_feature
from tests.compat import reference
from tests.compat.reference import arrays, crc_random, existing

OUTPUT_TOLERANCE = 2e-5  # relative; observed float32 deviation at most 4e-6
GRADIENT_TOLERANCE = 3e-4  # of (norm + 1e-6 * largest norm)
RECON_GRADIENT_TOLERANCE = 2e-3  # the L1's signs and the minimum and maximum magnify rounding
REDUCED = RewardArch(feature_maps=(4, 8, 16), pool_size=256, trunk=(24, 24), embedding=32, heads=(16, 8))


@pytest.fixture(scope="module")
def folder(fixtures_dir):
    return fixtures_dir / "reward"


close = functools.partial(reference.close, tolerance=OUTPUT_TOLERANCE)


def recipe_state(model):
    """Weights that every name determines: normal draws seeded by crc32(name),
    scaled by the fixtures' recipe.
    """
    state = {}
    for name, old in model.state_dict().items():
        n = crc_random(name, tuple(old.shape))
        if old.ndim >= 2:
            n = n / np.sqrt(np.prod(old.shape[1:]))
            if name == "MLP.input_layer.weight" or name.endswith(
                ("se_module.cSE.fc1.weight", "se_module.sSE.conv.weight")
            ):
                n = 0.02 * n
        else:
            n = 1 + 0.1 * n if name.endswith("groupnorm.weight") else 0.1 * n
        state[name] = torch.from_numpy(n.astype(np.float32))
    return state


def recipe_slab(depth, height, width, seed):
    r = np.random.RandomState(seed)
    a = r.standard_normal(depth)
    b = r.standard_normal(height)
    c = r.standard_normal(width)
    v = a[:, None, None] + b[:, None] + c + 0.5 * r.standard_normal((depth, height, width))
    v = v.astype(np.float32)
    return torch.from_numpy((v - v.min()) / (v.max() - v.min()) * np.float32(100))[None, None]


def check_gradients(gradients, names, norms, projections, tolerance):
    scale = 1e-6 * np.nanmax(norms)
    for name, norm, projection in zip(names, norms, projections, strict=True):
        gradient = gradients[str(name)]
        if np.isnan(norm):
            assert gradient is None, f"{name}: expected no gradient"
            continue
        if str(name).startswith("Conv3DModule.conv3d_for_recon"):
            continue  # analytically zero; the reference holds rounding noise
        g = gradient.double().numpy()
        room = tolerance * (norm + scale)
        assert abs(np.linalg.norm(g) - norm) <= room, name
        assert abs((g * crc_random(f"proj:{name}", g.shape)).sum() - projection) <= room, name


def collect(model, slab=None):
    found = {k: p.grad for k, p in model.named_parameters()}
    return found if slab is None else {**found, "input": slab.grad}


def reduced(folder, dtype=torch.float32):
    model = RewardModel(REDUCED)
    with arrays(folder / "red_state.npz") as state:
        model.load_state_dict({k: torch.from_numpy(state[k]) for k in state.files})
    return model.to(dtype)


@pytest.mark.parametrize(("file", "arch", "count"), [("full", PAPER, 12_686_699), ("reduced", REDUCED, None)])
def test_state_dict_has_the_published_names_order_and_shapes(folder, file, arch, count):
    lines = existing(folder / f"state_dict_{file}.tsv").read_text().splitlines()[1:]
    want = [tuple(line.split("\t")[1:3]) for line in lines]
    model = RewardModel(arch)
    assert [(k, "x".join(map(str, v.shape))) for k, v in model.state_dict().items()] == want
    if count:
        assert sum(p.numel() for p in model.parameters()) == count


def test_weight_recipe_gives_the_stored_reduced_weights(folder):
    model = reduced(folder)
    for name, value in recipe_state(model).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["mlp2", "mlp3"])
def test_mlp_matches_reference(folder, name):
    with arrays(folder / f"{name}.npz") as d:
        hidden = [len(d[k]) for k in d.files if k.endswith("bias") and not k.startswith("output")]
        mlp = MLP(d["x"].shape[1], hidden, d["y"].shape[1])
        mlp.load_state_dict({k: torch.from_numpy(d[k]) for k in d.files if "layer" in k})
        close(mlp(torch.from_numpy(d["x"])), d["y"], tolerance=2e-6)


def test_nearest_resampling_picks_the_reference_indices(folder):
    with arrays(folder / "nearest_index.npz") as d:
        for key in d.files:
            n_in, n_out = map(int, key[1:].split("_"))
            ramp = torch.arange(n_in, dtype=torch.float32)[None, None, :, None, None].expand(1, 1, n_in, 2, 2)
            got = F.interpolate(ramp, size=(n_out, 2, 2), mode="nearest")[0, 0, :, 0, 0]
            assert got.tolist() == d[key].tolist() == [i * n_in // n_out for i in range(n_out)], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("file", ["red_odd", "red_even"])
def test_reduced_network_stages_and_outputs_match(folder, file, dtype):
    model = reduced(folder, dtype)
    prefix = "" if dtype is torch.float32 else "f64_"
    tolerance = OUTPUT_TOLERANCE if dtype is torch.float32 else 1e-10
    stages = {}
    unet = model.Conv3DModule
    for kind, modules in (
        ("enc", unet.encoders),
        ("dec", unet.decoders),
        ("up", [d.upsampling for d in unet.decoders]),
    ):
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda _m, _i, out, key=f"{kind}{i}": stages.__setitem__(key, out))
    unet.final_conv.register_forward_hook(lambda _m, _i, out: stages.__setitem__("final_conv", out))
    with arrays(folder / f"{file}.npz") as d, torch.no_grad():
        for item in "ab":
            slab = torch.from_numpy(d[f"slab_{item}"]).to(dtype)[None, None]
            out = model(slab, reconstruct=True)
            for key, value in stages.items():
                step = 4 if key.startswith("enc") else 5
                close(value[0, :, ::step, ::step, ::step], d[f"{prefix}{item}_{key}"], tolerance=tolerance)
                if f"{prefix}{item}_{key}_sum" in d.files:
                    close(
                        [value.double().sum(), value.double().abs().sum()],
                        d[f"{prefix}{item}_{key}_sum"],
                        tolerance=tolerance,
                    )
            close(
                slice_max_feature(stages["final_conv"][:, 4:], slab.shape[2]),
                d[f"{prefix}{item}_slice_max"],
                tolerance=tolerance,
            )
            close(model.features(slab), d[f"{prefix}{item}_global"], tolerance=tolerance)
            close(out.embedding, d[f"{prefix}{item}_feat"], tolerance=tolerance)
            close(out.scalar, d[f"{prefix}{item}_scalar"], tolerance=tolerance)
            close(model.score(slab), d[f"{prefix}{item}_scalar_forward"], tolerance=tolerance)
            close(out.log_strength, d[f"{prefix}{item}_bt_log"], tolerance=tolerance)
            close(out.log_strength.exp(), d[f"{prefix}{item}_bt"], tolerance=2 * tolerance)
            recon = out.reconstruction.double()
            close(
                [recon.min(), recon.max(), recon.sum(), recon.abs().sum()],
                d[f"{prefix}{item}_recon_stats"],
                tolerance=tolerance,
            )
            if dtype is torch.float32:
                close(out.reconstruction, d[f"{item}_recon"], tolerance=tolerance)
        both = torch.from_numpy(np.stack([d["slab_a"], d["slab_b"]])).to(dtype)[:, None]
        a, b = model.embed(both).split(1)  # one batch of two equals two batches of one
        close(model.pair_logits(a, b), d[f"{prefix}pairs_ab"], tolerance=tolerance)
        close(model.pair_logits(b, a), d[f"{prefix}pairs_ba"], tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("file", ["red_odd", "red_even"])
@pytest.mark.parametrize("source", ["scalar_a", "scalar_raw"])
def test_reduced_scalar_gradients_match(folder, file, dtype, source):
    model = reduced(folder, dtype)
    prefix = "" if dtype is torch.float32 else "f64_"
    tolerance = GRADIENT_TOLERANCE if dtype is torch.float32 else 1e-8
    with arrays(folder / f"{file}.npz") as d:
        start = d["slab_a"] if source == "scalar_a" else d["raw"]
        slab = torch.from_numpy(start).to(dtype)[None, None].requires_grad_()
        fed = slab if source == "scalar_a" else (slab - slab.min()) / (slab.max() - slab.min()) * 100
        score = model.score(fed)
        if source == "scalar_raw":
            close(score, d[f"{prefix}scalar_raw_value"], tolerance=max(tolerance / 15, 1e-10))
        score.sum().backward()
        names, norms, projections = (d[f"{prefix}{source}_grad_{k}"] for k in ("names", "norm", "proj"))
        check_gradients(collect(model, slab), names, norms, projections, tolerance)
        close(slab.grad[0, 0, ::3, ::3, ::3], d[f"{prefix}{source}_grad_input_sub"], tolerance=tolerance)


def combined(model, slabs, reconstruct, epoch=0, seed=0):
    out: RewardOutput = model(slabs, reconstruct=reconstruct)
    index = torch.tensor([0]), torch.tensor([1])
    generator = torch.Generator().manual_seed(seed)
    loss = losses.PreferenceLoss(losses.LossWeights())
    return loss(out, *index, pair_logits=model.pair_logits, observed=slabs, epoch=epoch, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("file", ["red_odd", "red_even"])
@pytest.mark.parametrize("variant", ["loss", "loss_norecon"])
def test_reduced_losses_and_their_gradients_match(folder, file, dtype, variant):
    model = reduced(folder, dtype)
    key = ("" if dtype is torch.float32 else "f64_") + variant
    single = dtype is torch.float32
    with arrays(folder / f"{file}.npz") as d:
        slabs = torch.from_numpy(np.stack([d["slab_a"], d["slab_b"]])).to(dtype)[:, None]
        terms = combined(model, slabs, reconstruct=variant == "loss")
        peers = {"pairs": "paired_loss", "scalar": "scalar_rwd_loss", "bradley_terry": "BT_rwd_loss"}
        peers |= {"strength": "l2_reg_lambda", "reconstruction": "reco_loss"}
        for term, value in terms.items():
            close(value, d[f"{key}_{peers[term]}"], tolerance=3e-5 if single else 1e-8)
        total = sum(terms.values())
        close(total, d[f"{key}_total_loss"], tolerance=OUTPUT_TOLERANCE if single else 1e-9)
        if variant == "loss":
            recon = model(slabs, reconstruct=True).reconstruction
            close(
                losses.reconstruction_loss(recon, slabs),
                d[f"{key}_recon_per_item"],
                tolerance=OUTPUT_TOLERANCE if single else 1e-9,
            )
        total.backward()
        limit = (
            {True: RECON_GRADIENT_TOLERANCE, False: GRADIENT_TOLERANCE}[variant == "loss"] if single else 1e-7
        )
        check_gradients(collect(model), *(d[f"{key}_grad_{k}"] for k in ("names", "norm", "proj")), limit)
        nothing = {str(k) for k in d[f"{variant}_none_grads"]}
        assert {k for k, p in model.named_parameters() if p.grad is None} == nothing


@pytest.mark.parametrize("file", ["red_odd", "red_even"])
def test_from_epoch_three_one_order_is_drawn(folder, file):
    model = reduced(folder)
    with arrays(folder / f"{file}.npz") as d, torch.no_grad():
        slabs = torch.from_numpy(np.stack([d["slab_a"], d["slab_b"]]))[:, None]
        seen = {round(float(combined(model, slabs, False, epoch=3, seed=s)["pairs"]), 4) for s in range(12)}
        assert seen == {round(float(d["ce_ab_t0"]), 4), round(float(d["ce_ba_t1"]), 4)}
        assert round(float(d["loss_e3_paired"]), 4) in seen


def full_size(dtype=torch.float32):
    model = RewardModel(PAPER)
    model.load_state_dict(recipe_state(model))
    return (
        model.to(dtype),
        recipe_slab(129, 141, 128, 2024).to(dtype),
        recipe_slab(129, 141, 128, 2025).to(dtype),
    )


def test_full_size_network_matches(folder):
    model, slab_a, slab_b = full_size()
    with arrays(folder / "full_fwd.npz") as d, torch.no_grad():
        for name, first in zip(d["weight_check_names"], d["weight_check_first4"], strict=True):
            flat = model.state_dict()[str(name)].flatten()
            np.testing.assert_array_equal(flat[:4].numpy(), first[: flat.numel()])
        np.testing.assert_array_equal(slab_a[0, 0, ::16, ::16, ::16].numpy(), d["slab_a_sub"])
        sums = {}
        for kind, modules in (("enc", model.Conv3DModule.encoders), ("dec", model.Conv3DModule.decoders)):
            for i, module in enumerate(modules):
                module.register_forward_hook(
                    lambda _m, _i, o, key=f"{kind}{i}": sums.__setitem__(
                        key, (o.shape, [o.double().sum(), o.double().abs().sum()])
                    )
                )
        embeddings = {}
        features = []
        model.MLP.register_forward_pre_hook(lambda _m, inputs: features.append(inputs[0]))
        for item, slab in (("a", slab_a), ("b", slab_b)):
            out = model(slab, reconstruct=item == "a")
            close(features[-1], d[f"{item}_global"])
            embeddings[item] = out.embedding
            close(out.embedding, d[f"{item}_feat"])
            close(out.scalar, d[f"{item}_scalar"])
            close(out.log_strength, d[f"{item}_bt_log"])
            close(out.log_strength.exp(), d[f"{item}_bt"])
            if item == "a":
                for key, (shape, value) in sums.items():
                    assert tuple(shape) == tuple(d[f"{key}_shape"])
                    close(value, d[f"{key}_sum"])
                recon = out.reconstruction
                close(recon[0, 0, ::8, ::8, ::8], d["a_recon_sub"])
                close(
                    [recon.min(), recon.max(), recon.double().sum(), recon.double().abs().sum()],
                    d["a_recon_stats"],
                )
        close(model.pair_logits(embeddings["a"], embeddings["b"]), d["pairs_ab"])
        close(model.pair_logits(embeddings["b"], embeddings["a"]), d["pairs_ba"])


@pytest.mark.long
def test_full_size_scalar_gradients_match(folder):
    model, slab, _ = full_size()
    slab.requires_grad_()
    score = model.score(slab)
    score.sum().backward()
    with arrays(folder / "full_grad.npz") as d:
        close(score, d["scalar"])
        check_gradients(
            collect(model, slab), d["grad_names"], d["grad_norm"], d["grad_proj"], GRADIENT_TOLERANCE
        )
        close(slab.grad[0, 0, ::8, ::8, ::8], d["input_grad_sub"], tolerance=GRADIENT_TOLERANCE)


@pytest.mark.long
def test_full_size_network_matches_in_double_precision(folder):
    model, slab_a, slab_b = full_size(torch.float64)
    with arrays(folder / "full_f64.npz") as d:
        slab_a.requires_grad_()
        feature = model.features(slab_a)
        close(feature, d["a_global"], tolerance=1e-7)
        a = model.MLP(feature)
        score = model.scalar_rwd_head(a)
        close(score, d["a_scalar"], tolerance=1e-7)
        score.sum().backward()
        check_gradients(collect(model, slab_a), d["grad_names"], d["grad_norm"], d["grad_proj"], 1e-6)
        with torch.no_grad():
            out = model(slab_b)
            close(out.scalar, d["b_scalar"], tolerance=1e-7)
            close(out.log_strength, d["b_bt_log"], tolerance=1e-7)
            close(model.pair_logits(a, out.embedding), d["pairs_ab"], tolerance=1e-7)
            close(model.pair_logits(out.embedding, a), d["pairs_ba"], tolerance=1e-7)
