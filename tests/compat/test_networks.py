"""Networks against the original implementation, for every reference network in the fixtures folder."""

import csv
import functools
import re

import numpy as np
import pytest
import torch

from tests.compat.reference import ROOT, Draws, array_names, build, discover, load_case, relative_error
from training.discriminator import filtered_resizing

# images under recorded draws from a base, and their noise mode
DRAWN = re.compile(r"rng(\d+)(?:_noise_(\w+?))?_image_raw_sub")
CASES = discover("small_*") + discover("full_*")
pytestmark = pytest.mark.usefixtures("fixtures_dir")


@functools.cache
def run(name: str) -> dict:
    """All inference outputs of one network, by the reference's keys, plus the reference arrays themselves."""
    case, ref, G, D = load_case(name)
    G.eval(), D.eval()
    z, c, cond, points = (torch.as_tensor(ref[k]) for k in ("in_z", "in_c", "in_c_cond", "in_points"))
    out: dict = {"_case": case, "_ref": ref}
    with torch.no_grad():
        ws = G.mapping(z, cond)
        out["ws"], out["ws_psi07"] = ws[:, 0], G.mapping(z, cond, truncation_psi=0.7)[:, 0]
        out["ws_psi07_cut5"] = G.mapping(z, cond, truncation_psi=0.7, truncation_cutoff=5)[:, [0, 4, 5, 13]]
        planes = G.planes(ws, noise_mode="const").flatten(1, 2)
        stride = planes.shape[-1] // ref["planes_sub"].shape[-1]
        out["planes_sub"] = planes[:, :, ::stride, ::stride]
        out["planes_mean"], out["planes_std"] = planes.mean([2, 3]), planes.std([2, 3])
        out["planes_nonoise_mean"] = G.planes(ws, noise_mode="none").mean([3, 4]).flatten(1)
        fields = G.sample_mixed(points, None, ws, noise_mode="const")
        out["sigma"], out["rgb"] = fields["sigma"], fields["rgb"][:, : ref["rgb"].shape[1]]
        out["sigma_sample_psi07"] = G.sample(points, None, z, cond, truncation_psi=0.7, noise_mode="const")[
            "sigma"
        ]
        out.update(render(G, D, ws, c, ref, case["inference"]))
    return out


def strided(x: torch.Tensor, reference: np.ndarray) -> torch.Tensor:
    """Every k-th entry of axis 1, with the stride that gives the reference's length."""
    count = reference.shape[1]
    if count == 0 or x.shape[1] == count:
        return x
    stride = next(s for s in (10, 11, 37) if len(range(0, x.shape[1], s)) == count)
    return x[:, ::stride]


def render(G, D, ws, c, ref, recipe: dict) -> dict:
    """Rays, rendered features, images and logits. Args: recipe: what the case's JSON says of inference."""
    res = G.neural_rendering_resolution
    out = {}
    origins, directions = G.ray_sampler(c[:, :16].view(-1, 4, 4), c[:, 16:].view(-1, 3, 3), res)
    out["ray_origins"], out["ray_dirs_sub"] = origins[:, :1], strided(directions, ref["ray_dirs_sub"])
    planes = G.planes(ws, noise_mode="const")
    with Draws(None).injected():
        features, _, total = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)
    out["feature_samples_sub"], out["weights_total"] = strided(features, ref["feature_samples_sub"]), total
    with Draws(None).injected() as draws:
        img = G.synthesis(ws, c, noise_mode="const")
    out["_fixed_draws"] = draws.log
    image = img["image"]
    stride = image.shape[-1] // ref["image_sub"].shape[-1]
    out["image_raw"], out["image_depth"] = img["image_raw"], img["image_depth"]
    out["image_sub"], out["image_crop"] = image[:, :, ::stride, ::stride], image[:, :, -24:, -24:]
    out["image_mean_std"] = torch.stack([image.mean([2, 3]), image.std([2, 3])])
    out["D_logits_fake"] = D(img, c)
    real = np.random.RandomState(recipe.get("real_seed", 321)).random_sample(tuple(image.shape)) * 2 - 1
    real = torch.as_tensor(real.astype(np.float32))
    out["D_logits_real"] = D({"image": real, "image_raw": filtered_resizing(real, res)}, c)
    for key in (key for key in ref if DRAWN.fullmatch(key)):
        base, noise = DRAWN.fullmatch(key).groups()
        prefix = key.removesuffix("_image_raw_sub")
        mode = noise or "const"
        with Draws(int(base)).injected():
            img = G.synthesis(ws, c, noise_mode=mode)
        out[f"{prefix}_image_raw_sub"], out[f"{prefix}_depth_sub"] = (
            img["image_raw"][:, :, ::2, ::2],
            img["image_depth"][:, :, ::2, ::2],
        )
    return out


TOLERANCE = {
    **{
        key: 1e-5
        for key in (
            "ws",
            "ws_psi07",
            "ws_psi07_cut5",
            "planes_sub",
            "planes_mean",
            "planes_std",
            "planes_nonoise_mean",
        )
    },
    **{key: 1e-5 for key in ("sigma", "rgb", "sigma_sample_psi07", "ray_origins", "ray_dirs_sub")},
    **{key: 1e-4 for key in ("feature_samples_sub", "weights_total", "image_raw", "image_depth")},
    **{key: 1e-4 for key in ("image_sub", "image_mean_std", "image_crop")},
    **{key: 1e-4 for key in ("D_logits_fake", "D_logits_real")},
}
CHECKS = [
    (name, key)
    for name in CASES
    for key in array_names(ROOT / "eg3d" / f"{name}_infer.npz")
    if key in TOLERANCE or "rng" in key
]


@pytest.mark.parametrize(("name", "key"), CHECKS)
def test_inference(name, key):
    out = run(name)
    assert relative_error(out[key], out["_ref"][key]) <= TOLERANCE.get(key, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_reference_array_is_compared(name):
    out = run(name)
    assert {k for k in out["_ref"] if not k.startswith("in_")} - {"num_ws"} <= {
        key for case, key in CHECKS if case == name
    }
    assert [d[:2] for d in out["_case"]["inference"]["fixed_draws"]] == out["_fixed_draws"]


@pytest.mark.parametrize(
    ("network", "table"), [(0, "full_G_state_dict_shapes.tsv"), (1, "full_D_state_dict_shapes.tsv")]
)
def test_full_size_state_dict(network, table):
    """Names, order, shapes and kinds of the published configuration."""
    path = ROOT / "eg3d" / table
    names = discover("full_*")
    if not path.exists() or not names:
        pytest.skip(f"{table} is not in this fixtures folder")
    import json

    config = json.loads((ROOT / "eg3d" / f"{names[0]}.json").read_text())["config"]
    module = build(config)[network]
    parameters = dict(module.named_parameters())
    ours = [
        [k, str(list(v.shape)), "param" if k in parameters else "buffer", str(v.dtype)]
        for k, v in module.state_dict().items()
    ]
    theirs = list(csv.reader(path.open(), delimiter="\t"))[1:]
    assert ours == theirs
