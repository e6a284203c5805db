"""Networks against the original implementation, for every reference network in the fixtures folder.

Truncations, seeds of draws and noise modes are read from the arrays' names, how entries were left out from
their shapes.
"""

import csv
import functools
import json
import re

import numpy as np
import pytest
import torch

from tests.compat.absent import some
from tests.compat.reference import (
    ROOT,
    Draws,
    array_names,
    arrays,
    build,
    discover,
    load_case,
    of_set,
    relative_error,
    thinned,
)
from training.discriminator import filtered_resizing

FOLDER = ROOT / "eg3d"
CASES = discover("small_*") + discover("full_*")
INPUTS = ("in_z", "in_c", "in_c_cond", "in_points")
TABLES = sorted(FOLDER.glob("*_[GD]_state_dict_shapes.tsv"))
# images under recorded draws from a base, and their noise mode
DRAWN = re.compile(r"rng(\d+)(?:_noise_(\w+?))?_(?:image_raw|depth)_sub")
TRUNCATED = re.compile(r"ws_psi(\d+)(?:_cut(\d+))?")
SAMPLED = re.compile(r"sigma_sample_psi(\d+)")
EXACT = {"ws", "num_ws", "planes_sub", "planes_mean", "planes_std", "planes_nonoise_mean", "sigma", "rgb"}
EXACT |= {"ray_origins", "ray_dirs_sub"}
RENDERED = {"feature_samples_sub", "weights_total", "image_raw", "image_depth", "image_sub", "image_crop"}
RENDERED |= {"image_mean_std", "D_logits_fake", "D_logits_real"}
pytestmark = pytest.mark.usefixtures("fixtures_dir")


def tolerance(key: str) -> float | None:
    """Return the relative tolerance of a recorded array; None for an array that no test computes."""
    if key in EXACT or TRUNCATED.fullmatch(key) or SAMPLED.fullmatch(key):
        return 1e-5
    return 1e-4 if key in RENDERED or DRAWN.fullmatch(key) else None


def psi(digits: str) -> float:
    """Convert the digits of a name to a number: 07 -> 0.7."""
    return int(digits) / 10 ** (len(digits) - 1)


def inputs_of(reference) -> dict[str, torch.Tensor]:
    """Return latents, cameras and points of a case; skip the test where a set has left them out."""
    return {
        name.removeprefix("in_"): torch.as_tensor(value)
        for name, value in zip(INPUTS, of_set(reference, *INPUTS), strict=True)
    }


def compute(G, D, recipe: dict, inputs: dict[str, torch.Tensor], keys) -> dict:
    """Compute the arrays of `keys`, whole, by their names without _sub.

    Args: recipe: the JSON's settings of inference.
    """
    G.eval(), D.eval()
    z, c, cond, points = (inputs[name.removeprefix("in_")] for name in INPUTS)
    with torch.no_grad():
        ws = G.mapping(z, cond)
        out: dict = {"ws": ws[:, 0], "num_ws": ws.shape[1]}
        for key in keys:
            if truncated := TRUNCATED.fullmatch(key):
                cutoff = truncated[2] and int(truncated[2])
                cut = G.mapping(z, cond, truncation_psi=psi(truncated[1]), truncation_cutoff=cutoff)
                layers = recipe.get("cut_layers") or [0, (cutoff or 1) - 1, cutoff or 0, cut.shape[1] - 1]
                out[key] = cut[:, 0] if cutoff is None else cut[:, layers]
            if sampled := SAMPLED.fullmatch(key):
                fields = G.sample(points, None, z, cond, truncation_psi=psi(sampled[1]), noise_mode="const")
                out[key] = fields["sigma"]
        planes = G.planes(ws, noise_mode="const").flatten(1, 2)
        out |= {"planes": planes, "planes_mean": planes.mean([2, 3]), "planes_std": planes.std([2, 3])}
        out["planes_nonoise_mean"] = G.planes(ws, noise_mode="none").mean([3, 4]).flatten(1)
        fields = G.sample_mixed(points, None, ws, noise_mode="const")
        out |= {"sigma": fields["sigma"], "rgb": fields["rgb"]}
        return out | render(G, D, ws, c, keys, recipe)


def render(G, D, ws, c, keys, recipe: dict) -> dict:
    """Compute rays, rendered features, images and logits."""
    res = G.neural_rendering_resolution
    out: dict = {}
    origins, directions = G.ray_sampler(c[:, :16].view(-1, 4, 4), c[:, 16:].view(-1, 3, 3), res)
    out |= {"ray_origins": origins, "ray_dirs": directions}
    planes = G.planes(ws, noise_mode="const")
    with Draws(None).injected():
        features, _, total = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)
    out |= {"feature_samples": features, "weights_total": total}
    with Draws(None).injected() as draws:
        img = G.synthesis(ws, c, noise_mode="const")
    out["fixed_draws"] = draws.log
    image = img["image"]
    out |= {"image_raw": img["image_raw"], "image_depth": img["image_depth"], "image": image}
    out["image_mean_std"] = torch.stack([image.mean([2, 3]), image.std([2, 3])])
    out["D_logits_fake"] = D(img, c)
    real = np.random.RandomState(recipe.get("real_seed", 321)).random_sample(tuple(image.shape)) * 2 - 1
    real = torch.as_tensor(real.astype(np.float32))
    out["D_logits_real"] = D({"image": real, "image_raw": filtered_resizing(real, res)}, c)
    for base, noise in sorted(
        {DRAWN.fullmatch(key).groups(default="") for key in keys if DRAWN.fullmatch(key)}
    ):
        prefix = f"rng{base}_noise_{noise}" if noise else f"rng{base}"
        with Draws(int(base)).injected() as draws:
            img = G.synthesis(ws, c, noise_mode=noise or "const")
        out |= {f"{prefix}_image_raw": img["image_raw"], f"{prefix}_depth": img["image_depth"]}
        out[f"rng{base}_draws"] = draws.log
    return out


@functools.cache
def run(name: str) -> tuple[dict, dict, dict]:
    """Return the JSON's settings of inference, a case's arrays, and the same arrays computed here."""
    reference = dict(arrays(FOLDER / f"{name}_infer.npz"))
    inputs = inputs_of(reference)
    case, G, D = load_case(name)
    recipe = case.get("inference", {})
    return recipe, reference, compute(G, D, recipe, inputs, reference)


CHECKS = [
    (name, key)
    for name in CASES
    for key in array_names(FOLDER / f"{name}_infer.npz")
    if tolerance(key) is not None
]


@pytest.mark.parametrize(("name", "key"), some(CHECKS, "this set has no eg3d/small_*_infer.npz", width=2))
def test_inference(name, key):
    _, reference, out = run(name)
    wanted = reference[key]
    if key == "image_crop":  # the lower right corner
        height, width = wanted.shape[2:]
        got = out["image"][:, :, -height:, -width:]
    else:
        got = thinned(out[key.removesuffix("_sub")], wanted, first=True)
    assert relative_error(got, wanted) <= tolerance(key)


@pytest.mark.parametrize("name", some(CASES, "this set has no eg3d/small_*.json and no eg3d/full_*.json"))
def test_every_reference_array_is_compared(name):
    recipe, reference, out = run(name)
    assert {key for key in reference if not key.startswith("in_")} <= {
        key for case, key in CHECKS if case == name
    }
    for key, draws in recipe.items():
        if key.endswith("_draws") and draws and key in out:
            assert [draw[:2] for draw in draws] == out[key], key


@pytest.mark.parametrize(
    "table", some(TABLES, "this set has no eg3d/*_state_dict_shapes.tsv"), ids=lambda p: p and p.stem
)
def test_full_size_state_dict(table):
    """Names, order, shapes and kinds of the published configuration."""
    stem, part = re.fullmatch(r"(.+)_([GD])_state_dict_shapes", table.stem).groups()
    names = discover(f"{stem}*")
    if not names:
        pytest.skip(f"this set has no eg3d/{stem}*.json, which states the configuration of {table.name}")
    config = json.loads((FOLDER / f"{names[0]}.json").read_text())["config"]
    module = build(config)["GD".index(part)]
    parameters = dict(module.named_parameters())
    ours = [
        [k, str(list(v.shape)), "param" if k in parameters else "buffer", str(v.dtype)]
        for k, v in module.state_dict().items()
    ]
    theirs = list(csv.reader(table.open(), delimiter="\t"))[1:]
    assert ours == theirs
