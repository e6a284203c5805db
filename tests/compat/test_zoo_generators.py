"""Full-head generators against the original implementations, for every generator in the fixtures: plane samplers with gradients, then whole
networks, whose weights come from their names.

Which network a case is, is told by its state dict alone, as the reader of pickles does.
"""

import contextlib
import csv
import functools
import json

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import of
from eg3d_rlhf.generators.pickles.families import kind_of
from tests.compat.reference import ROOT, Draws, crc_random, relative_error
from torch_utils.ops.implementations import implementation
from training.fullhead import HyPlaneHeadGenerator, PanoHeadGenerator, SphereHeadGenerator
from training.rendering.cameras import FOV_to_intrinsics, LookAtPoseSampler, pack_label
from training.rendering.renderer import generate_planes

FOLDER = ROOT / "reward_zoo"
CASES = [
    (path.stem, name) for path in sorted(FOLDER.glob("*_generator.json"))
    for name, case in json.loads(path.read_text()).items() if isinstance(case, dict) and "kwargs" in case
]
ANGLE_HANGS_ON_A_SIGN = [400, 404, 406]  # points at the origin, a pole, a seam: left out for directions without radius
SINGULAR = 1e6  # reference gradients beyond are those of a pole

pytestmark = [
    pytest.mark.usefixtures("fixtures_dir"),
    pytest.mark.skipif(not CASES, reason=f"no reference generators at {FOLDER}; set EG3D_RLHF_FIXTURES to the folder above"),
]


def described(file: str, case: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """A case's description, and the shapes of its state dict."""
    with (FOLDER / f"{file.removesuffix('_generator')}_{case}_state_dict.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    shapes = {row["name"]: () if row["shape"] == "scalar" else tuple(map(int, row["shape"].split("x"))) for row in rows}
    return json.loads((FOLDER / f"{file}.json").read_text())[case], shapes


def scaled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An entry of a state dict by the recipe of the JSON files."""
    value = np.asarray(crc_random("G." + name, shape))
    leaf = name.rsplit(".", 1)[-1]
    if name.startswith("backbone.mapping.fc"):
        return value * (100 if leaf == "weight" else 10)
    if name.startswith("t_mapping.fc1."):
        return value * 0.02
    if name.endswith("affine.bias"):
        return 1 + 0.1 * value
    if leaf in ("bias", "noise_strength"):
        return value * 0.1
    if name == "decoder.net.2.weight":
        value[0] *= 40
    return value * (0.3 if leaf == "w_avg" else 1)


@functools.cache
def build(file: str, case: str):
    """(network with its weights, reference arrays by name)."""
    told, shapes = described(file, case)
    kwargs = told["kwargs"]
    G = kind_of(told["class_name"].rpartition(".")[2], shapes, kwargs["rendering_kwargs"]).cls(**kwargs).eval().requires_grad_(False)
    for name, tensor in G.state_dict().items():
        if not name.endswith("resample_filter"):
            tensor.copy_(torch.as_tensor(scaled(name, tuple(tensor.shape)).astype(np.float32)))
    G.decoder.net[2].bias[0] = told["decoder_net_2_bias_0"]
    arrays = np.load(FOLDER / f"{file}.npz")
    reference = {key.removeprefix(f"{case}/"): arrays[key] for key in arrays if key.startswith(f"{case}/")}
    return G, {**reference, "points": arrays["points"]}


def cameras(*yaws: float, pitch: float) -> torch.Tensor:
    """Labels [N, 25] that look at the origin."""
    poses = [LookAtPoseSampler.sample(np.pi / 2 + yaw, np.pi / 2 + pitch, torch.zeros(3), radius=2.7) for yaw in yaws]
    return pack_label(torch.cat(poses), FOV_to_intrinsics(18.837))


@functools.cache
def outputs(file: str, case: str, impl: str) -> dict:
    """What the reference recorded, computed here."""
    G, ref = build(file, case)
    z = torch.from_numpy(np.stack([np.random.RandomState(seed).randn(G.z_dim) for seed in (3, 4)]).astype(np.float32))
    front, c = cameras(0, 0, pitch=0), cameras(0.4, -2.5, pitch=-0.2)
    with torch.no_grad(), implementation(impl) if impl == "ref" else contextlib.nullcontext():
        ws = G.mapping(z, front, truncation_psi=0.7, truncation_cutoff=14)
        moved = G.moved_camera(z, c)
        found = {"ws": ws, "ws_psi1": G.mapping(z, front), "c_after": moved, "delta_c": (moved - c)[:, [3, 7, 11]]}
        for prefix, label in (("", c), ("adapted_", moved)):
            with Draws(None).injected():
                out = G.synthesis(ws, label, neural_rendering_resolution=16, noise_mode="const")
            found |= {prefix + key: value for key, value in out.items()}
        out = G.sample_mixed(torch.from_numpy(ref["points"]).expand(2, -1, -1), None, ws, noise_mode="const")
        found["sigma"], found["rgb"] = out["sigma"].squeeze(2), out["rgb"]
        found["field"] = of(G).field(ws).density(torch.from_numpy(ref["points"][0]))
    return found


def random(seed: int, shape) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))


def sampler_planes(G) -> torch.Tensor:
    """The recorded sampler's input in the original's layout, as a leaf."""
    shapes = {PanoHeadGenerator: (2, 3, 32 * G.rendering_kwargs["triplane_depth"]), SphereHeadGenerator: (2, 2, 3, 32)}
    return random(800, (*shapes.get(type(G), (2, 4, 32)), 10, 10)).requires_grad_()


@pytest.mark.parametrize(("file", "case"), CASES)
def test_the_sampler_and_its_gradients(file, case):
    G, ref = build(file, case)
    planes, points = sampler_planes(G), torch.from_numpy(ref["points"]).repeat(2, 1, 1).requires_grad_()
    ours = planes.unflatten(2, (32, -1)) if isinstance(G, PanoHeadGenerator) else planes  # channel c, slice d is their channel c D + d
    features = G.renderer.read(generate_planes("panohead"), ours, points, 1.0)
    (features * random(801, features.shape)).sum().backward()
    directions_alone = isinstance(G, HyPlaneHeadGenerator)
    kept = np.ones(points.shape[1], dtype=bool)
    kept[ANGLE_HANGS_ON_A_SIGN if directions_alone else []] = False
    assert relative_error(features[:, :, kept, ::8], ref["sample_features_sub"][:, :, kept]) < 2e-5
    expected = ref["sample_d_points"]
    kept &= np.isfinite(expected).all(axis=1) & (np.abs(expected) < SINGULAR).all(axis=1)
    assert kept.sum() >= 406 and np.isfinite(points.grad.numpy()).all()
    assert relative_error(points.grad[0][kept], expected[kept]) < 2e-5
    if not directions_alone:  # the points left out are part of these sums
        np.testing.assert_allclose(totals(features.detach()), ref["sample_sum"], rtol=2e-5)
        direction = torch.from_numpy(np.random.RandomState(802).standard_normal(planes.shape))
        found = float(planes.grad.double().norm()), float((planes.grad.double() * direction).sum())
        np.testing.assert_allclose(found, ref["sample_d_planes_proj"], rtol=2e-5)


@pytest.mark.parametrize("impl", ["auto", "ref"])
@pytest.mark.parametrize(("file", "case"), CASES)
def test_the_whole_network(file, case, impl):
    G, ref = build(file, case)
    found = outputs(file, case, impl)
    layers = found["ws"].shape[1]
    assert layers == int(ref["num_ws"])
    some = next(some for some in ([0, 1, layers - 1], [0, 1, 2, layers - 1]) if len(some) == ref["ws_sub"].shape[1])
    assert relative_error(found["ws"][:, some], ref["ws_sub"]) < 2e-5
    assert float(found["ws_psi1"].double().sum()) == pytest.approx(float(ref["ws_psi1_sum"]), rel=2e-5)
    assert relative_error(found["delta_c"], ref["delta_c"]) < 2e-5 and relative_error(found["c_after"], ref["c_after"]) < 2e-5
    opacity = (ref["image_mask"] + 0.001) / 1.002  # a ray of 1e-7 has a mean depth by weights that rounding makes
    depth, expected = found["image_depth"].numpy(), ref["image_depth"]
    assert relative_error(depth * opacity, expected * opacity) < 1e-5
    assert relative_error(depth[opacity > 1e-3], expected[opacity > 1e-3]) < 1e-4
    for name in ("image_raw", "image_depth", "image_mask"):
        assert name == "image_depth" or relative_error(found[name], ref[name]) < 1e-4, name
        exact = name != "image_depth" or impl == "auto"  # torch's exp is another on other processors
        np.testing.assert_allclose(totals(found[f"adapted_{name}"]), ref[f"adapted_{name}_sum"], rtol=1e-4 if exact else 1e-3)
    assert relative_error(found["image"][:, :, ::8, ::8], ref["image_sub"]) < 1e-4
    np.testing.assert_allclose(totals(found["image"]), ref["image_sum"], rtol=1e-4)
    assert relative_error(found["rgb"][:, ::8, ::8], ref["rgb_sub"]) < 1e-4


@pytest.mark.parametrize("key", ["sigma", "field"])
@pytest.mark.parametrize(("file", "case"), CASES)
def test_the_density(file, case, key):
    G, ref = build(file, case)
    kept = np.ones(ref["sigma"].shape[1], dtype=bool)
    kept[ANGLE_HANGS_ON_A_SIGN if isinstance(G, HyPlaneHeadGenerator) else []] = False
    error = np.abs(outputs(file, case, "auto")[key].numpy() - ref["sigma"])[:, kept].max()
    assert error < 2e-5 * np.ptp(ref["sigma"])
    assert np.ptp(ref["sigma"]) == pytest.approx(float(np.ptp(ref["sigma_stats"])), rel=1e-3)


def test_no_family_is_left_out():
    assert {type(build(*case)[0]) for case in CASES} == {PanoHeadGenerator, SphereHeadGenerator, HyPlaneHeadGenerator}


def totals(values: torch.Tensor) -> tuple[float, float]:
    """Sum, and sum of magnitudes."""
    return float(values.double().sum()), float(values.double().abs().sum())
