"""The reward network and its losses against reference values computed with the published network
(fixtures/reward).

Sizes come from the arrays, and the small network from its weights. What is left may be stated in recipe.json;
`PRESENT` holds what the values in tests/references were made with.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.preferences import losses
from eg3d_rlhf.rewards.networks import MLP, RewardOutput
from eg3d_rlhf.rewards.release import ReleaseConfig, arch_from_state
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER, RewardArch
from eg3d_rlhf.rewards.unet3d import slice_max_feature
from tests.compat import reference
from tests.compat.absent import some
from tests.compat.reference import ROOT, array_names, arrays, crc_random, existing, of_set, read_json, thinned

OUTPUT_TOLERANCE = 2e-5  # relative; observed float32 deviation at most 4e-6
GRADIENT_TOLERANCE = 3e-4  # of (norm + 1e-6 * largest norm)
RECON_GRADIENT_TOLERANCE = 2e-3  # the L1's signs and the minimum and maximum magnify rounding
FOLDER = ROOT / "reward"
PRESENT = {
    "salt": "",  # before a parameter's name, in its checksum
    "small_weights": 0.02,  # factor of the first trunk layer, and of the gates of squeeze and excitation
    "groups": 8,  # of the small network
    "value_max": 100,  # upper end of the self-normalised range
    "full_shape": [129, 141, 128],  # of the slabs for the full-size network; full_fwd.npz states it, too
    "full_seeds": {"a": 2024, "b": 2025},
    "loss_weights": {},  # where they are not the published ones
}
RECIPE = {**PRESENT, **read_json(FOLDER / "recipe.json")}
WEIGHTS = losses.LossWeights(**RECIPE["loss_weights"])
# of a pair's two orders one is drawn from this epoch on
DRAWN_FROM_EPOCH = RECIPE["loss_weights"].get("drawn_from_epoch", 3)
REDUCED_FILES = [path.stem for path in sorted(FOLDER.glob("red_*.npz")) if path.stem != "red_state"]
MLPS = [path.stem for path in sorted(FOLDER.glob("mlp*.npz"))]
TABLES = [path.stem.removeprefix("state_dict_") for path in sorted(FOLDER.glob("state_dict_*.tsv"))]
reduced_files = pytest.mark.parametrize(
    "file", some(REDUCED_FILES, "this set has no reward/red_*.npz beside red_state.npz")
)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(scope="module")
def folder(fixtures_dir):
    return fixtures_dir / "reward"


close = functools.partial(reference.close, tolerance=OUTPUT_TOLERANCE)


def recipe_state(model, recipe=RECIPE):
    """Weights that every name determines: normal draws seeded by crc32(salt + name),
    scaled by the fixtures' recipe.
    """
    state = {}
    for name, old in model.state_dict().items():
        n = crc_random(recipe["salt"] + name, tuple(old.shape))
        if old.ndim >= 2:
            n = n / np.sqrt(np.prod(old.shape[1:]))
            if name == "MLP.input_layer.weight" or name.endswith(
                ("se_module.cSE.fc1.weight", "se_module.sSE.conv.weight")
            ):
                n = recipe["small_weights"] * n
        else:
            n = 1 + 0.1 * n if name.endswith("groupnorm.weight") else 0.1 * n
        state[name] = torch.from_numpy(n.astype(np.float32))
    return state


def recipe_slab(depth, height, width, seed, value_max=RECIPE["value_max"]):
    r = np.random.RandomState(seed)
    a = r.standard_normal(depth)
    b = r.standard_normal(height)
    c = r.standard_normal(width)
    v = a[:, None, None] + b[:, None] + c + 0.5 * r.standard_normal((depth, height, width))
    v = v.astype(np.float32)
    return torch.from_numpy((v - v.min()) / (v.max() - v.min()) * np.float32(value_max))[None, None]


def arch_of(state, recipe=RECIPE) -> RewardArch:
    """Return the architecture whose state dict has these shapes."""
    return arch_from_state(state, ReleaseConfig(groups=recipe["groups"]))


def rows(file: str) -> list[tuple[str, str]]:
    """Read (name, shape) of a table, in state-dict order; skip the test where a set has left it out."""
    lines = existing(FOLDER / f"state_dict_{file}.tsv").read_text().splitlines()[1:]
    return [tuple(line.split("\t")[1:3]) for line in lines]


def dimensions(shape: str) -> list[int]:
    return [] if shape == "scalar" else [int(n) for n in shape.split("x")]


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


def reduced(dtype=torch.float32):
    with arrays(FOLDER / "red_state.npz") as stored:
        state = {k: torch.from_numpy(stored[k]) for k in stored.files}
    model = RewardModel(arch_of(state))
    model.load_state_dict(state)
    return model.to(dtype)


def prefix_of(dtype) -> str:
    """Return the prefix of the values' keys in a precision."""
    return "" if dtype is torch.float32 else "f64_"


@pytest.mark.parametrize("file", some(TABLES, "this set has no reward/state_dict_*.tsv"))
def test_state_dict_has_the_published_names_order_and_shapes(file):
    want = rows(file)
    shapes = {name: torch.empty(dimensions(shape)) for name, shape in want}
    model = RewardModel(PAPER if file == "full" else arch_of(shapes))
    assert [(k, "x".join(map(str, v.shape)) or "scalar") for k, v in model.state_dict().items()] == want
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(dimensions(s)) for _, s in want)


def test_weight_recipe_gives_the_stored_reduced_weights():
    model = reduced()
    for name, value in recipe_state(model).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", some(MLPS, "this set has no reward/mlp*.npz"))
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


def totals(value) -> list:
    """Compute the sum, and the sum of magnitudes."""
    return [value.double().sum(), value.double().abs().sum()]


def reconstructed(recon) -> list:
    """Compute the smallest and the largest value, the sum, and the sum of magnitudes."""
    return [recon.min().double(), recon.max().double(), *totals(recon)]


def stages_of(model, slab) -> dict:
    """Compute the outputs of the U-Net's stages; the network itself may run fused ops, without stages."""
    stages = {}
    unet = model.Conv3DModule
    modules = {
        **{f"enc{i}": module for i, module in enumerate(unet.encoders)},
        **{f"dec{i}": module for i, module in enumerate(unet.decoders)},
        **{f"up{i}": module.upsampling for i, module in enumerate(unet.decoders)},
        "final_conv": unet.final_conv,
    }
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: stages.__setitem__(key, out))
        for key, module in modules.items()
    ]
    unet(slab)
    for hook in hooks:
        hook.remove()
    return stages


def item_values(model, slab) -> dict:
    """Compute the values of a slab [1, 1, D, H, W] by their names; stages are whole."""
    stages = stages_of(model, slab)
    out = model(slab, reconstruct=True)
    values = {key: value[0] for key, value in stages.items()}
    values |= {f"{key}_sum": totals(value) for key, value in stages.items()}
    features = stages["final_conv"][:, model.arch.recon_channels :]
    return values | {
        "slice_max": slice_max_feature(features, slab.shape[2]),
        "global": model.features(slab),
        "feat": out.embedding,
        "scalar": out.scalar,
        "scalar_forward": model.score(slab),
        "bt_log": out.log_strength,
        "bt": out.log_strength.exp(),
        "recon": out.reconstruction[0, 0],
        "recon_stats": reconstructed(out.reconstruction.double()),
    }


def slabs_of(d, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Return the slabs [1, 1, D, H, W] of a file, by their letters."""
    names = [key for key in d.files if re.fullmatch(r"slab_\w+", key)]
    return {key.removeprefix("slab_"): torch.from_numpy(d[key]).to(dtype)[None, None] for key in names}


def stacked(d, dtype=torch.float32) -> torch.Tensor:
    """Return the pair [2, 1, D, H, W]; skip the test where a set has left it out."""
    return torch.from_numpy(np.stack(of_set(d, "slab_a", "slab_b"))).to(dtype)[:, None]


@precisions
@reduced_files
def test_reduced_network_stages_and_outputs_match(folder, file, dtype):
    model = reduced(dtype)
    prefix = prefix_of(dtype)
    tolerance = OUTPUT_TOLERANCE if dtype is torch.float32 else 1e-10
    compared = 0
    with arrays(folder / f"{file}.npz") as d, torch.no_grad():
        for item, slab in slabs_of(d, dtype).items():
            keys = [key for key in d.files if key.startswith(f"{prefix}{item}_")]
            values = item_values(model, slab)
            for key in keys:
                name = key.removeprefix(f"{prefix}{item}_")
                value = values[name]
                if not isinstance(value, list) and value.ndim > 1 and d[key].ndim == value.ndim:
                    value = thinned(value, d[key])
                close(value, d[key], tolerance=2 * tolerance if name == "bt" else tolerance)
                compared += 1
        if {f"{prefix}pairs_ab", f"{prefix}pairs_ba"} & set(d.files):
            both = stacked(d, dtype)
            a, b = model.embed(both).split(1)  # one batch of two equals two batches of one
            for key, logits in (("pairs_ab", (a, b)), ("pairs_ba", (b, a))):
                if f"{prefix}{key}" in d:
                    close(model.pair_logits(*logits), d[f"{prefix}{key}"], tolerance=tolerance)
                    compared += 1
    if not compared:
        pytest.skip(f"reward/{file}.npz of this set has no values {prefix}a_...")


SOURCES = [
    (file, match[1])
    for file in REDUCED_FILES
    for key in array_names(FOLDER / f"{file}.npz")
    if (match := re.fullmatch(r"(scalar_\w+?)_grad_names", key))
]


@precisions
@pytest.mark.parametrize(
    ("file", "source"), some(SOURCES, "this set has no reward/red_*.npz with scalar_..._grad_names", width=2)
)
def test_reduced_scalar_gradients_match(folder, file, dtype, source):
    model = reduced(dtype)
    key = f"{prefix_of(dtype)}{source}"
    tolerance = GRADIENT_TOLERANCE if dtype is torch.float32 else 1e-8
    with arrays(folder / f"{file}.npz") as d:
        item = source.removeprefix("scalar_")
        (start,) = of_set(d, f"slab_{item}" if f"slab_{item}" in d else item)
        wanted = of_set(d, *(f"{key}_grad_{k}" for k in ("names", "norm", "proj")))
        slab, score = scalar_with_gradients(model, start, dtype, raw=f"slab_{item}" not in d)
        if f"{key}_value" in d:
            close(score, d[f"{key}_value"], tolerance=max(tolerance / 15, 1e-10))
        check_gradients(collect(model, slab), *wanted, tolerance)
        if f"{key}_grad_input_sub" in d:
            kept = d[f"{key}_grad_input_sub"]
            close(thinned(slab.grad[0, 0], kept), kept, tolerance=tolerance)


def scalar_with_gradients(model, start, dtype, raw: bool, value_max=RECIPE["value_max"]):
    """Return a slab with its gradient, and its reward. Args: raw: self-normalise it first."""
    slab = torch.from_numpy(start).to(dtype)[None, None].requires_grad_()
    fed = (slab - slab.min()) / (slab.max() - slab.min()) * value_max if raw else slab
    score = model.score(fed)
    score.sum().backward()
    return slab, score


def combined(model, slabs, reconstruct, epoch=0, seed=0, weights=WEIGHTS):
    out: RewardOutput = model(slabs, reconstruct=reconstruct)
    index = torch.tensor([0]), torch.tensor([1])
    generator = torch.Generator().manual_seed(seed)
    loss = losses.PreferenceLoss(weights)
    return loss(
        out, *index, pair_logits=model.pair_logits, network_input=slabs, epoch=epoch, generator=generator
    )


# our names of the terms, and those of the published code
PEERS = {"pairs": "paired_loss", "scalar": "scalar_rwd_loss", "bradley_terry": "BT_rwd_loss"}
PEERS |= {"strength": "l2_reg_lambda", "reconstruction": "reco_loss"}


@precisions
@reduced_files
@pytest.mark.parametrize("variant", ["loss", "loss_norecon"])
def test_reduced_losses_and_their_gradients_match(folder, file, dtype, variant):
    model = reduced(dtype)
    key = prefix_of(dtype) + variant
    single = dtype is torch.float32
    with arrays(folder / f"{file}.npz") as d:
        (total_loss,) = of_set(d, f"{key}_total_loss")
        slabs = stacked(d, dtype)
        terms = combined(model, slabs, reconstruct=variant == "loss")
        for term, value in terms.items():
            if f"{key}_{PEERS[term]}" in d:
                close(value, d[f"{key}_{PEERS[term]}"], tolerance=3e-5 if single else 1e-8)
        total = sum(terms.values())
        close(total, total_loss, tolerance=OUTPUT_TOLERANCE if single else 1e-9)
        if f"{key}_recon_per_item" in d:
            recon = model(slabs, reconstruct=True).reconstruction
            close(
                losses.reconstruction_loss(recon, slabs),
                d[f"{key}_recon_per_item"],
                tolerance=OUTPUT_TOLERANCE if single else 1e-9,
            )
        wanted = of_set(d, *(f"{key}_grad_{k}" for k in ("names", "norm", "proj")))
        total.backward()
        limit = (
            {True: RECON_GRADIENT_TOLERANCE, False: GRADIENT_TOLERANCE}[variant == "loss"] if single else 1e-7
        )
        check_gradients(collect(model), *wanted, limit)
        if f"{variant}_none_grads" in d:
            nothing = {str(k) for k in d[f"{variant}_none_grads"]}
            assert {k for k, p in model.named_parameters() if p.grad is None} == nothing


@reduced_files
def test_from_some_epoch_one_order_is_drawn(folder, file):
    model = reduced()
    with arrays(folder / f"{file}.npz") as d, torch.no_grad():
        first, second = of_set(d, "ce_ab_t0", "ce_ba_t1")
        slabs = stacked(d)
        epoch = DRAWN_FROM_EPOCH
        seen = {
            round(float(combined(model, slabs, False, epoch=epoch, seed=s)["pairs"]), 4) for s in range(12)
        }
        assert seen == {round(WEIGHTS.pairs * float(order), 4) for order in (first, second)}
        for key in (key for key in d.files if re.fullmatch(r"loss_e\d+_paired", key)):
            assert round(float(d[key]), 4) in seen or int(re.search(r"\d+", key)[0]) < epoch


def full_slabs(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Make the slabs of the full-size network, by their letters."""
    forward = FOLDER / "full_fwd.npz"
    shape = RECIPE["full_shape"]
    if "enc0_shape" in array_names(forward):
        shape = arrays(forward)["enc0_shape"][2:].tolist()
    return {item: recipe_slab(*shape, seed).to(dtype) for item, seed in RECIPE["full_seeds"].items()}


def full_size(dtype=torch.float32):
    model = RewardModel(PAPER)
    model.load_state_dict(recipe_state(model))
    return model.to(dtype), full_slabs(dtype)


def full_values(model, item: str, slab, reconstruct: bool = False) -> dict:
    """Compute the values of a slab by the names in full_fwd.npz; the reconstruction is whole."""
    features = []
    hook = model.MLP.register_forward_pre_hook(lambda _m, inputs: features.append(inputs[0]))
    out = model(slab, reconstruct=reconstruct)
    hook.remove()
    values = {"global": features[-1], "feat": out.embedding, "scalar": out.scalar}
    values |= {"bt_log": out.log_strength, "bt": out.log_strength.exp()}
    if reconstruct:
        values["recon_sub"] = out.reconstruction[0, 0]
        values["recon_stats"] = reconstructed(out.reconstruction)
    return {f"{item}_{key}": value for key, value in values.items()}


def full_stages(model, slab) -> dict:
    """Compute shapes and sums of the stages, by their names in full_fwd.npz."""
    stages = stages_of(model, slab)
    shapes = {f"{key}_shape": list(value.shape) for key, value in stages.items()}
    return shapes | {f"{key}_sum": totals(value) for key, value in stages.items()}


@pytest.mark.long  # the reduced networks below are compared in every run
def test_full_size_network_matches(folder):
    with arrays(folder / "full_fwd.npz") as d, torch.no_grad():
        model, slabs = full_size()
        if "weight_check_names" in d:
            for name, first in zip(d["weight_check_names"], d["weight_check_first4"], strict=True):
                flat = model.state_dict()[str(name)].flatten()[: len(first)]
                np.testing.assert_array_equal(flat.numpy(), first[: flat.numel()])
        embeddings = {}
        for item, slab in slabs.items():
            if f"slab_{item}_sub" in d:
                kept = d[f"slab_{item}_sub"]
                np.testing.assert_array_equal(thinned(slab[0, 0], kept), kept)
            values = full_values(model, item, slab, reconstruct=item == "a")
            embeddings[item] = values[f"{item}_feat"]
            if item == "a":
                values |= full_stages(model, slab)
            for key in (key for key in values if key in d):
                value = values[key]
                if key.endswith("_shape"):
                    assert value == d[key].tolist(), key
                    continue
                close(thinned(value, d[key]) if key.endswith("_sub") else value, d[key])
        for key in (key for key in d.files if re.fullmatch(r"pairs_\w\w", key)):
            first, second = (embeddings[item] for item in key[-2:])
            close(model.pair_logits(first, second), d[key])


@pytest.mark.long
def test_full_size_scalar_gradients_match(folder):
    with arrays(folder / "full_grad.npz") as d:
        (scalar,) = of_set(d, "scalar")
        model, slabs = full_size()
        slab = slabs["a"].requires_grad_()
        score = model.score(slab)
        score.sum().backward()
        close(score, scalar)
        wanted = of_set(d, "grad_names", "grad_norm", "grad_proj")
        check_gradients(collect(model, slab), *wanted, GRADIENT_TOLERANCE)
        if "input_grad_sub" in d:
            kept = d["input_grad_sub"]
            close(thinned(slab.grad[0, 0], kept), kept, tolerance=GRADIENT_TOLERANCE)


@pytest.mark.long
def test_full_size_network_matches_in_double_precision(folder):
    with arrays(folder / "full_f64.npz") as d:
        wanted = of_set(d, "grad_names", "grad_norm", "grad_proj")
        model, slabs = full_size(torch.float64)
        slab = slabs["a"].requires_grad_()
        feature = model.features(slab)
        a = model.MLP(feature)
        score = model.scalar_rwd_head(a)
        score.sum().backward()
        check_gradients(collect(model, slab), *wanted, 1e-6)
        with torch.no_grad():
            out = model(slabs["b"])
            values = {
                "a_global": feature,
                "a_scalar": score,
                "b_scalar": out.scalar,
                "b_bt_log": out.log_strength,
                "pairs_ab": model.pair_logits(a, out.embedding),
                "pairs_ba": model.pair_logits(out.embedding, a),
            }
        for key in (key for key in values if key in d):
            close(values[key], d[key], tolerance=1e-7)
