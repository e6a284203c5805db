"""Full-head generators against the original implementations, for every generator in the fixtures: plane
samplers with gradients, then whole networks, whose weights come from their names.

Which network a case is, is told by its state dict alone, as the reader of pickles does; salts, seeds, sizes,
cameras and resolution by its JSON, partly in words.
"""

import contextlib
import csv
import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import as_generator
from eg3d_rlhf.generators.pickles.rebuild import family_of
from tests.compat.absent import some
from tests.compat.reference import (
    ROOT,
    Draws,
    arrays,
    crc_random,
    existing,
    hold,
    of_set,
    relative_error,
    thinned,
)
from torch_utils.ops.implementations import implementation
from training.fullhead import HyPlaneHeadGenerator, PanoHeadGenerator
from training.rendering.cameras import FOV_to_intrinsics, LookAtPoseSampler, pack_label
from training.rendering.renderer import generate_planes

FOLDER = ROOT / "reward_zoo"
CASES = [
    (path.stem, name)
    for path in sorted(FOLDER.glob("*_generator*.json"))
    for name, case in json.loads(path.read_text()).items()
    if isinstance(case, dict) and "kwargs" in case
]
SINGULAR = 1e6  # reference gradients beyond are those of a pole
MOST_POLES = 6  # points of a set that may have none other
pytestmark = pytest.mark.usefixtures("fixtures_dir")
every_case = pytest.mark.parametrize(
    ("file", "case"), some(CASES, "this set has no reward_zoo/*_generator*.json with a case", width=2)
)
NUMBER = r"[+-]?\d+(?:\.\d+)?"
# what each kind of entry is multiplied by: (words of the JSON before the number, where it does not say)
FACTORS = {
    "mapping_weight": (r"mapping\.fc\*\.weight", 100),
    "mapping_bias": (r"and \.bias", 10),
    "camera": (r"t_mapping\.fc1\.\*", 0.02),
    "affine": (r"affine\.bias 1\+", 0.1),
    "bias": ("noise_strength", 0.1),
    "w_avg": ("w_avg", 0.3),
    "density_row": ("row 0 x", 40),
}


def numbers(text: str) -> list[float]:
    """All numbers of a text."""
    return [float(number) for number in re.findall(NUMBER, text)]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What a JSON says of its cases, in words and in figures."""

    told: dict

    def after(self, field: str, word: str, until: str = r"[,;)]|$") -> str:
        """What stands behind a word in one of the fields."""
        return re.search(rf"{word}(.*?)(?:{until})", self.told[field])[1]

    def number(self, word: str, field: str = "cameras", default: float | None = None) -> float:
        """The number behind a word."""
        found = re.search(rf"{word} ?({NUMBER})", self.told.get(field, ""))
        if found is None and default is not None:
            return default
        return float(found[1])

    @functools.cached_property
    def factors(self) -> dict[str, float]:
        return {name: self.number(word, "weights", default) for name, (word, default) in FACTORS.items()}

    @property
    def channels(self) -> int:
        """Return the number of channels of the features that the sampler reads."""
        stated = re.search(r"features \[N, planes, M, (\d+)\]", self.told["sampler"])
        return int(stated[1]) if stated else 32

    def labels(self, yaws: list[float], pitch: float) -> torch.Tensor:
        """Cameras [N, 25]."""
        target = torch.tensor(
            [float(part) for part in self.after("cameras", r"look-at \(", r"\)").split(",")]
        )
        poses = [
            LookAtPoseSampler.sample(np.pi / 2 + yaw, np.pi / 2 + pitch, target, radius=self.number("radius"))
            for yaw in yaws
        ]
        return pack_label(torch.cat(poses), FOV_to_intrinsics(self.number("fov")))

    def cameras(self) -> tuple[torch.Tensor, torch.Tensor]:
        """That of the mapping, for every latent, and those that look: the JSON's, in turn where there are
        more latents.
        """
        yaws = numbers(self.after("cameras", "cameras yaw", ", pitch").replace("and", " "))
        count = len(self.told["seeds"])
        front = self.labels([0.0], 0.0).expand(count, -1)
        return front, self.labels(
            [yaws[i % len(yaws)] for i in range(count)], self.number("pitch pi/2", default=0.0)
        )

    def drawn(self, part: str, shape=None) -> torch.Tensor:
        """Normal draws of the sampler's test: 'planes' of the stated shape, else of this one."""
        seed, stated = re.search(
            rf"{part}.*?RandomState\((\d+)\)(?:\.standard_normal\(([\d, ]+)\))?", self.told["sampler"]
        ).groups()
        shape = tuple(map(int, stated.split(","))) if shape is None else tuple(shape)
        return torch.from_numpy(np.random.RandomState(int(seed)).standard_normal(shape))


@functools.cache
def recipe(file: str) -> Recipe:
    return Recipe(json.loads((FOLDER / f"{file}.json").read_text()))


def shapes_of(file: str, case: str) -> dict[str, tuple[int, ...]]:
    """Read the entries of a case's state dict; skip the test where a set has left them out."""
    stem = re.sub("_generator", "", file)
    with existing(FOLDER / f"{stem}_{case}_state_dict.tsv").open() as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    return {
        row["name"]: () if row["shape"] == "scalar" else tuple(map(int, row["shape"].split("x")))
        for row in rows
    }


def scaled(salt: str, name: str, shape: tuple[int, ...], factors: dict[str, float]) -> np.ndarray:
    """An entry of a state dict by the recipe of the JSON files."""
    value = np.asarray(crc_random(f"{salt}G.{name}", shape))
    leaf = name.rsplit(".", 1)[-1]
    if name.startswith("backbone.mapping.fc"):
        return value * factors["mapping_weight" if leaf == "weight" else "mapping_bias"]
    if name.startswith("t_mapping.fc1."):
        return value * factors["camera"]
    if name.endswith("affine.bias"):
        return 1 + factors["affine"] * value
    if leaf in ("bias", "noise_strength"):
        return value * factors["bias"]
    if name == "decoder.net.2.weight":
        value[0] *= factors["density_row"]
    return value * (factors["w_avg"] if leaf == "w_avg" else 1)


def set_weights(G, about: dict, told: Recipe) -> None:
    """Set the weights of the recipe."""
    for name, tensor in G.state_dict().items():
        if not name.endswith("resample_filter"):
            value = scaled(told.told["salt"], name, tuple(tensor.shape), told.factors)
            tensor.copy_(torch.as_tensor(value.astype(np.float32)))
    G.decoder.net[2].bias[0] = about["decoder_net_2_bias_0"]


@functools.cache
def build(file: str, case: str):
    """(network with its weights, reference arrays by name)."""
    told = recipe(file)
    about = told.told[case]
    kwargs = about["kwargs"]
    stored = arrays(FOLDER / f"{file}.npz")
    kind = family_of(
        about["class_name"].rpartition(".")[2], shapes_of(file, case), kwargs["rendering_kwargs"]
    )
    G = kind.cls(**kwargs).eval().requires_grad_(False)
    set_weights(G, about, told)
    reference = {key.removeprefix(f"{case}/"): stored[key] for key in stored if key.startswith(f"{case}/")}
    (points,) = of_set(stored, "points")
    return G, {**reference, "points": points}


@functools.cache
def outputs(file: str, case: str, impl: str) -> dict:
    """What the reference recorded, computed here."""
    G, ref = build(file, case)
    with implementation(impl) if impl == "ref" else contextlib.nullcontext():
        return compute(G, recipe(file), torch.from_numpy(ref["points"]))


@torch.no_grad()
def compute(G, told: Recipe, points: torch.Tensor) -> dict:
    """Compute latents, cameras, images and densities, whole. Args: points: [1, P, 3]."""
    seeds = told.told["seeds"]
    z = torch.from_numpy(
        np.stack([np.random.RandomState(seed).randn(G.z_dim) for seed in seeds]).astype(np.float32)
    )
    front, c = told.cameras()
    cutoff = int(told.number("cutoff", default=0)) or None
    ws = G.mapping(z, front, truncation_psi=told.number("psi"), truncation_cutoff=cutoff)
    moved = G.moved_camera(z, c)
    computed = {
        "ws": ws,
        "ws_psi1": G.mapping(z, front),
        "c_after": moved,
        "delta_c": (moved - c)[:, [3, 7, 11]],
    }
    for prefix, label in (("", c), ("adapted_", moved)):
        with Draws(None).injected():
            out = G.synthesis(
                ws, label, neural_rendering_resolution=int(told.number("render")), noise_mode="const"
            )
        computed |= {prefix + key: value for key, value in out.items()}
    out = G.sample_mixed(points.expand(len(z), -1, -1), None, ws, noise_mode="const")
    computed["sigma"] = out["sigma"].squeeze(2)
    computed["rgb"] = out["rgb"]
    computed["field"] = as_generator(G).field(ws).density(points[0])
    return computed


def even_points(G, points: np.ndarray) -> np.ndarray:
    """Which points [P, 3] have an angle that does not hang on the sign of a zero: of HyPlaneHead not the
    origin, lower pole, seam.
    """
    x, y, z = points.T
    hangs = (z == 0) & ((x < 0) | ((x == 0) & (y <= 0)))
    return ~hangs | (not isinstance(G, HyPlaneHeadGenerator))


def planes_of(G, told: Recipe) -> torch.Tensor:
    """Return the planes of the sampler's test in the reference's layout."""
    planes = told.drawn("planes")
    if isinstance(G, PanoHeadGenerator):  # stated for one number of slices
        slices = G.rendering_kwargs["triplane_depth"]
        planes = told.drawn("planes", (*planes.shape[:2], told.channels * slices, *planes.shape[3:]))
    return planes.float()


def sampled(G, told: Recipe, points: np.ndarray):
    """Read features at points [1, P, 3]; return them and both gradients of their product with a cotangent."""
    planes = planes_of(G, told).requires_grad_()
    points = torch.from_numpy(points).repeat(len(planes), 1, 1).requires_grad_()
    # channel c, slice d is their channel c D + d
    ours = planes.unflatten(2, (told.channels, -1)) if isinstance(G, PanoHeadGenerator) else planes
    features = G.renderer.read(generate_planes("panohead"), ours, points, told.number("box_warp", "sampler"))
    (features * told.drawn("cotangent", features.shape).float()).sum().backward()
    return features.detach(), planes.grad, points.grad


def projected(gradient: torch.Tensor, told: Recipe) -> tuple[float, float]:
    """Compute the norm of the planes' gradient, and its product with a random direction."""
    direction = told.drawn("d_planes_proj", gradient.shape)
    return float(gradient.double().norm()), float((gradient.double() * direction).sum())


@every_case
def test_the_sampler_and_its_gradients(file, case):
    G, ref = build(file, case)
    told = recipe(file)
    values, expected = of_set(ref, "sample_features_sub", "sample_d_points")
    features, of_planes, of_points = sampled(G, told, ref["points"])
    kept = even_points(G, ref["points"][0])
    directions_alone = not kept.all()
    assert relative_error(thinned(features, values)[:, :, kept], values[:, :, kept]) < 2e-5
    kept &= np.isfinite(expected).all(axis=1) & (np.abs(expected) < SINGULAR).all(axis=1)
    assert kept.sum() >= len(kept) - told.told.get("most_poles", MOST_POLES)
    assert np.isfinite(of_points.numpy()).all()
    assert relative_error(of_points[0][kept], expected[kept]) < 2e-5
    if not directions_alone:  # the points left out are part of these sums
        sums, product = of_set(ref, "sample_sum", "sample_d_planes_proj")
        np.testing.assert_allclose(totals(features), sums, rtol=2e-5)
        np.testing.assert_allclose(projected(of_planes, told), product, rtol=2e-5)


@pytest.mark.parametrize("impl", ["auto", "ref"])
@every_case
def test_the_whole_network(file, case, impl):
    _, ref = build(file, case)
    computed = outputs(file, case, impl)

    def near(name: str, tolerance: float):
        return lambda wanted: close(thinned(computed[name], wanted), wanted, tolerance, name)

    def close(value, wanted, tolerance, name):
        assert relative_error(value, wanted) < tolerance, name

    def ws_sub(wanted):
        layers = recipe(file).told.get("ws_layers") or [*range(wanted.shape[1] - 1), -1]
        assert relative_error(computed["ws"][:, layers], wanted) < 2e-5

    def ws_sum(wanted):
        assert float(computed["ws_psi1"].double().sum()) == pytest.approx(float(wanted), rel=2e-5)

    def layers(wanted):
        assert computed["ws"].shape[1] == int(wanted)

    def depth(wanted):
        if "image_mask" not in ref:
            return
        # a ray of 1e-7 has a mean depth by weights that rounding makes
        opacity = (ref["image_mask"] + 0.001) / 1.002
        seen = computed["image_depth"].numpy()
        assert relative_error(seen * opacity, wanted * opacity) < 1e-5
        assert relative_error(seen[opacity > 1e-3], wanted[opacity > 1e-3]) < 1e-4

    def summed(name: str, tolerance: float = 1e-4):
        return lambda wanted: np.testing.assert_allclose(totals(computed[name]), wanted, rtol=tolerance)

    exact = 1e-4 if impl == "auto" else 1e-3  # torch's exp is another on other processors
    hold(
        ref,
        {
            "num_ws": layers,
            "ws_sub": ws_sub,
            "ws_psi1_sum": ws_sum,
            "delta_c": near("delta_c", 2e-5),
            "c_after": near("c_after", 2e-5),
            "image_depth": depth,
            "image_raw": near("image_raw", 1e-4),
            "image_mask": near("image_mask", 1e-4),
            "adapted_image_raw_sum": summed("adapted_image_raw"),
            "adapted_image_depth_sum": summed("adapted_image_depth", exact),
            "adapted_image_mask_sum": summed("adapted_image_mask"),
            "image_sub": near("image", 1e-4),
            "image_sum": summed("image"),
            "rgb_sub": near("rgb", 1e-4),
        },
    )


@pytest.mark.parametrize("key", ["sigma", "field"])
@every_case
def test_the_density(file, case, key):
    G, ref = build(file, case)
    (sigma,) = of_set(ref, "sigma")
    kept = even_points(G, ref["points"][0])
    assert np.abs(outputs(file, case, "auto")[key].numpy() - sigma)[:, kept].max() < 2e-5 * np.ptp(sigma)
    if "sigma_stats" in ref:
        assert np.ptp(sigma) == pytest.approx(float(np.ptp(ref["sigma_stats"])), rel=1e-3)


def totals(values: torch.Tensor) -> tuple[float, float]:
    """Sum, and sum of magnitudes."""
    return float(values.double().sum()), float(values.double().abs().sum())
