"""Write values of the reward on σ slabs by this project's own code, with another small network, other slabs
and other settings; see make_set.

Left out: the double precision of the full-size network, its table of names, and half of what one small file
could hold.
"""

import json
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.slab import normalise_slab
from eg3d_rlhf.preferences import losses
from eg3d_rlhf.rewards.networks import MLP
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER, RewardArch
from tests.compat import test_reward as tests
from tests.compat.reference import crc_random

ARCH = RewardArch(
    feature_maps=(6, 12, 18),
    groups=6,
    recon_channels=3,
    feature_channels=3,
    pool_size=120,
    trunk=(20, 20),
    embedding=24,
    heads=(14, 10),
)


def make(root: Path, seed: int) -> None:
    folder = root / "reward"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "salt": f"second {seed}:",
        "small_weights": 0.03,
        "groups": ARCH.groups,
        "value_max": 60 + seed,
        "full_seeds": {"a": 900 + seed, "b": 700 + seed},
        "loss_weights": {"pairs": 0.8, "scalar": 2e-3, "reconstruction": 0.02, "drawn_from_epoch": 2},
        "slab": {"resolution": 90 + seed, "crop": [0.2, 0.3, 0.25, 0.1, 0.35, 0.15], "box_warp": 1.25},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
    random = np.random.RandomState(seed + 200)
    geometry(folder, recipe, random)
    layers(folder, random)
    model = RewardModel(ARCH)
    model.load_state_dict(tests.recipe_state(model, recipe))
    np.savez_compressed(folder / "red_state.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
    rows = [
        f"{i}\t{name}\t{'x'.join(map(str, value.shape))}\tfloat32\t{value.numel()}"
        for i, (name, value) in enumerate(model.state_dict().items())
    ]
    (folder / "state_dict_reduced.tsv").write_text("\n".join(["index\tname\tshape\tdtype\tnumel", *rows]))
    both = (torch.float32, torch.float64)
    reduced(folder / "red_flat.npz", recipe, (14, 21, 25), seed, both, ("loss", "loss_norecon"))
    reduced(folder / "red_tall.npz", recipe, (23, 26, 16), seed + 50, both[:1], ("loss_norecon",))
    full(folder, recipe)


def geometry(folder: Path, recipe: dict, random: np.random.RandomState) -> None:
    """Write the skewed lattice at a few points, normalisation with ties, and nearest resampling."""
    spec = SlabSpec(**recipe["slab"], lattice="skewed")
    shape = np.array(spec.shape[::-1])
    index = np.stack([random.randint(0, size, 9) for size in shape], axis=1)
    x, y, z = index.T
    np.savez(
        folder / "slab_axes.npz",
        crop=np.array(spec.index_ranges),
        idx_xyz=index,
        coords_xyz=spec.points().numpy()[z, y, x],
        shape_xyz=shape,
    )
    values = random.randint(0, 4, (3, 2, 4)).astype(np.float32)
    cotangent = random.standard_normal(values.shape).astype(np.float32)
    slab = torch.from_numpy(values)[None].requires_grad_()
    out = normalise_slab(slab, float(recipe["value_max"]))
    (gradient,) = torch.autograd.grad(out, slab, torch.from_numpy(cotangent)[None])
    np.savez(
        folder / "normalise_self.npz",
        x=values,
        w=cotangent,
        y=out[0].detach().numpy(),
        grad_x=gradient[0].numpy(),
        lo=0.0,
        hi=float(recipe["value_max"]),
    )
    pairs = [(17, 19), (22, 23), (9, 12)]
    nearest = {f"n{a}_{b}": np.arange(b) * a // b for a, b in pairs}
    np.savez(folder / "nearest_index.npz", **nearest)


def layers(folder: Path, random: np.random.RandomState) -> None:
    mlp = MLP(9, [8, 8, 6], 2)
    state = {k: 0.4 * random.standard_normal(v.shape) for k, v in mlp.state_dict().items()}
    mlp.load_state_dict({k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()})
    x = torch.from_numpy(random.standard_normal((5, 9)).astype(np.float32))
    values = {k: v.numpy() for k, v in mlp.state_dict().items()}
    np.savez(folder / "mlp4.npz", x=x.numpy(), y=mlp(x).detach().numpy(), **values)


def numbers(value) -> np.ndarray:
    """Convert a tensor, or a list of tensors, to the array that is stored."""
    if isinstance(value, list):
        return np.array([float(number) for number in value])
    return np.asarray(value.detach())


def gradients(d: dict, key: str, of: dict) -> None:
    """Return names, norms and projections of gradients."""
    rows = []
    for name, gradient in of.items():
        if gradient is None:
            rows.append((np.nan, np.nan))
        else:
            g = gradient.double().numpy()
            rows.append((np.linalg.norm(g), (g * crc_random(f"proj:{name}", g.shape)).sum()))
    d |= {f"{key}_names": np.array(list(of)), f"{key}_norm": np.array(rows)[:, 0]}
    d[f"{key}_proj"] = np.array(rows)[:, 1]


def reduced(path: Path, recipe: dict, shape: tuple, seed: int, dtypes, variants) -> None:
    random = np.random.RandomState(seed)
    slabs = {item: tests.recipe_slab(*shape, seed + i, recipe["value_max"]) for i, item in enumerate("ab")}
    d = {f"slab_{item}": slab[0, 0].numpy() for item, slab in slabs.items()}
    d["raw"] = (3 * random.standard_normal(shape)).astype(np.float32)
    weights = losses.LossWeights(**recipe["loss_weights"])
    for dtype in dtypes:
        prefix = tests.prefix_of(dtype)

        def fresh(dtype=dtype) -> RewardModel:
            model = RewardModel(ARCH)
            model.load_state_dict(tests.recipe_state(model, recipe))
            return model.to(dtype)

        model = fresh()
        with torch.no_grad():
            for item, slab in slabs.items():
                for key, value in tests.item_values(model, slab.to(dtype)).items():
                    value = (
                        value[..., ::3, ::3, ::3]
                        if key[:2] in ("en", "de", "up") and "sum" not in key
                        else value
                    )
                    if key == "final_conv":
                        value = value[:, ::4, ::4, ::4]
                    d[f"{prefix}{item}_{key}"] = numbers(value)
            a, b = (model.embed(slab.to(dtype)) for slab in slabs.values())
            d[f"{prefix}pairs_ba"] = model.pair_logits(b, a).numpy()
        for source in ("scalar_b", "scalar_raw"):
            model = fresh()
            start = d["raw"] if source == "scalar_raw" else d["slab_b"]
            slab, score = tests.scalar_with_gradients(
                model, start, dtype, source == "scalar_raw", recipe["value_max"]
            )
            gradients(d, f"{prefix}{source}_grad", tests.collect(model, slab))
            d[f"{prefix}{source}_value"] = numbers(score)
            d[f"{prefix}{source}_grad_input_sub"] = slab.grad[0, 0, ::2, ::2, ::2].numpy()
        pair = torch.cat([slab.to(dtype) for slab in slabs.values()])
        for variant in variants:
            model = fresh()
            terms = tests.combined(model, pair, variant == "loss", weights=weights)
            total = sum(terms.values())
            total.backward()
            key = prefix + variant
            d |= {f"{key}_{tests.PEERS[term]}": numbers(value) for term, value in terms.items()}
            d[f"{key}_total_loss"] = numbers(total)
            gradients(d, f"{key}_grad", tests.collect(model))
            nothing = [name for name, p in model.named_parameters() if p.grad is None]
            d[f"{variant}_none_grads"] = np.array(nothing)
            if variant == "loss":
                recon = model(pair, reconstruct=True).reconstruction
                d[f"{key}_recon_per_item"] = numbers(losses.reconstruction_loss(recon, pair))
        if dtype is torch.float32:
            with torch.no_grad():
                out = model(pair, reconstruct=False)
                a, b = out.embedding.split(1)
                for name, logits in (("ce_ab_t0", (a, b)), ("ce_ba_t1", (b, a))):
                    target = torch.tensor([int(name[-1])])
                    d[name] = numbers(torch.nn.functional.cross_entropy(model.pair_logits(*logits), target))
    np.savez_compressed(path, **d)


def full(folder: Path, recipe: dict) -> None:
    """Write the values of the published network on small slabs."""
    model = RewardModel(PAPER)
    model.load_state_dict(tests.recipe_state(model, recipe))
    slabs = {
        item: tests.recipe_slab(40, 35, 33, seed, recipe["value_max"])
        for item, seed in recipe["full_seeds"].items()
    }
    d: dict = {"slab_b_sub": slabs["b"][0, 0, ::12, ::12, ::12].numpy()}
    names = ["MLP.input_layer.weight", "Conv3DModule.final_conv.bias"]
    d["weight_check_names"] = np.array(names)
    first = [model.state_dict()[name].flatten()[:3].numpy() for name in names]
    d["weight_check_first4"] = np.stack(first)
    with torch.no_grad():
        for item, slab in slabs.items():
            values = tests.full_values(model, item, slab, reconstruct=item == "a")
            if item == "a":
                values |= tests.full_stages(model, slab)
            for key, value in values.items():
                value = value[::5, ::5, ::5] if key.endswith("_sub") else value
                d[key] = np.array(value) if key.endswith("_shape") else numbers(value)
        a, b = (torch.from_numpy(d[f"{item}_feat"]) for item in "ab")
        d["pairs_ab"] = model.pair_logits(a, b).numpy()
    np.savez_compressed(folder / "full_fwd.npz", **d)
    slab = slabs["a"].requires_grad_()
    score = model.score(slab)
    score.sum().backward()
    d = {"scalar": numbers(score)}
    gradients(d, "grad", tests.collect(model, slab))
    np.savez_compressed(folder / "full_grad.npz", **d)
